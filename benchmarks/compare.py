"""Two commits of memo, side by side: `python -m benchmarks.compare OLD NEW`.

By default memo's subjects of all rows of `docs/performance.md` are timed, processes of both
commits in turns, with the `benchmarks` of this checkout.  A ratio is the median of the ratios of
neighbours.

`--instructions` counts instead (`valgrind --tool=callgrind`): what a call on a hot path executes,
whatever else the machine does.  Two numbers of calls are run, and their difference counts, so that
starting up does not.  Work done by the clock is included (statistics, looks at files), up to a
tenth in memory.

A commit may also be `.`: the files as they are.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.__main__ import Bench
from benchmarks.machine import ROOT, places
from benchmarks.plan import ROWS
from benchmarks.report import shown

FEW, MANY = 200, 1200
"""Calls of the two runs whose instructions are compared."""
WORST = 1.02
"""The ratio of instructions from which a path counts as slower."""
TENTH = 1.1
"""The ratio of times from which a row counts as slower."""

PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
import memo
path, calls = sys.argv[2], int(sys.argv[3])
memo.configure(
    directory=sys.argv[4], secret="0123456789abcdef" * 4, redis_url=None,
    memory_limit=0 if path in ("disk", "set", "map") else "256MiB",
)
value = {"id": 7, "name": "Ada", "email": "ada@example.org", "score": 1.5, "tags": ["a", "b"]}

@memo.cache(ttl=None, version="1", name="compare")
def record(number: int, text: str):
    return value

@memo.cache(ttl=None, version="1", name="compare.async")
async def arecord(number: int, text: str):
    return value

@memo.cache(ttl=None, version="1", name="compare.frame")
def frame():
    import numpy as np
    return np.zeros(100_000)

def run(calls):
    if path in ("memory", "disk"):
        for _ in range(calls): record(7, "Ada")
    elif path == "set":
        for i in range(calls): record(i, "Ada")
    elif path == "key":
        for _ in range(calls): record.key(7, "Ada")
    elif path == "map":
        for _ in range(calls): frame()
    else:
        import asyncio
        async def go():
            for _ in range(calls): await arecord(7, "Ada")
        asyncio.run(go())

run(50)
run(calls)
"""
PATHS = ("memory", "memory async", "disk", "set", "map", "key")


def checked_out(commit: str, into: Path) -> Path:
    """Return a directory with `memo` of a commit and `benchmarks` of this checkout."""
    shutil.copytree(ROOT / "benchmarks", into / "benchmarks")
    if commit == ".":
        shutil.copytree(ROOT / "memo", into / "memo")
        return into
    archive = subprocess.run(
        ["git", "archive", commit, "memo"],  # noqa: S607 - the git and tar on PATH
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    subprocess.run(
        ["tar", "-x", "-C", str(into)],  # noqa: S607
        input=archive.stdout,
        check=True,
    )
    return into


def instructions(tree: Path, path: str) -> float:
    """Count the instructions of one call on a hot path."""
    few, many = (executed(tree, path, calls) for calls in (FEW, MANY))
    return (many - few) / (MANY - FEW)


def executed(tree: Path, path: str, calls: int) -> int:
    """Count the instructions of a process that makes this many calls with a commit."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("MEMO_")}
    valgrind = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null"]
    with tempfile.TemporaryDirectory(prefix="memo-compare-") as directory:
        done = subprocess.run(
            [*valgrind, sys.executable, "-c", PROGRAM, str(tree), path, str(calls), directory],
            env={**kept, "PYTHONHASHSEED": "0", "HOME": directory},
            cwd=directory,
            check=True,
            capture_output=True,
            text=True,
        )
    return int(re.findall(r"Collected : (\d+)", done.stderr)[0])


def count(old: Path, new: Path) -> bool:
    """Print the instructions of each hot path; true if the new commit executes more."""
    worst = 0.0
    print(f"{'path':14}{'old':>12}{'new':>12}   new / old   (instructions of a call)")
    for path in PATHS:
        before, after = instructions(old, path), instructions(new, path)
        worst = max(worst, after / before)
        print(f"{path:14}{before:12,.0f}{after:12,.0f}   {after / before:9.3f}", flush=True)
    return worst > WORST


def take_turns(old: Path, new: Path, title: str, turns: int) -> bool:
    """Print memo's figures of each row of both commits; true if the new one is slower."""
    taken: dict[tuple[str, str], tuple[list[float], list[float]]] = {}
    with places() as machine:
        for turn in range(turns):
            benches = (Bench(machine, 1, tree=old), Bench(machine, 1, tree=new))
            for row in ROWS:
                for subject in row.ours if title in row.title else ():
                    pair = taken.setdefault((row.title, subject), ([], []))
                    for which in (0, 1) if turn % 2 == 0 else (1, 0):
                        figure = benches[which].figure(row, subject)
                        if isinstance(figure, str):
                            raise SystemExit(f"{row.title}, {subject}: {figure}")
                        pair[which].append(figure)
    worst = 0.0
    print("| work | old | new | new / old |", "| --- | --- | --- | --- |", sep="\n")
    for (name, subject), (before, after) in taken.items():
        row = next(row for row in ROWS if row.title == name)
        ratio = statistics.median(b / a if a else 1.0 for a, b in zip(before, after, strict=True))
        worst = max(worst, ratio)
        medians = (shown(statistics.median(figures), row) for figures in (before, after))
        print(f"| {name} ({subject}) | {' | '.join(medians)} | {ratio:.2f} |")
    return worst > TENTH


def main() -> int:
    """Print both commits' figures; 1 if the new commit is slower by more than is allowed."""
    options = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    options.formatter_class = argparse.RawDescriptionHelpFormatter
    options.add_argument("old")
    options.add_argument("new", nargs="?", default=".")
    options.add_argument("--instructions", action="store_true", help="count, with valgrind")
    options.add_argument("--only", default="", help="rows whose titles have this text")
    options.add_argument("--turns", type=int, default=5, help="processes of each commit (5)")
    given = options.parse_args()
    if given.instructions and shutil.which("valgrind") is None:
        raise SystemExit("no valgrind: install it, or leave out --instructions")
    with tempfile.TemporaryDirectory(prefix="memo-compare-") as scratch:
        old = checked_out(given.old, Path(scratch, "old"))
        new = checked_out(given.new, Path(scratch, "new"))
        if given.instructions:
            return int(count(old, new))
        return int(take_turns(old, new, given.only, given.turns))


if __name__ == "__main__":
    sys.exit(main())
