"""Two commits of memo on the hot paths: `python -m benchmarks.compare OLD NEW [--paired]`.

By default instructions are counted (`valgrind --tool=callgrind`): what a call executes, whatever
else the machine does.  Two numbers of calls are run, and the difference counts, so that starting up
does not.  What is done by time counts along (statistics, looks at files), by up to a tenth in
memory, so small differences are for `--paired`, which takes time: processes of both in turns.

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

ROOT = Path(__file__).resolve().parent.parent
FEW, MANY = 200, 1200
"""Calls of the two runs whose instructions are compared."""
TURNS = 11
"""Processes of each commit that are timed in turns."""
WORST = 1.02
"""The ratio of instructions from which a path counts as slower."""

PROGRAM = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
import memo
from memo.records import codec
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
    elif path == "encode":
        for _ in range(calls): codec.encode(value)
    elif path == "decode":
        stream = codec.encode(value).stream
        for _ in range(calls): codec.decode(stream, None, ())
    else:
        import asyncio
        async def go():
            for _ in range(calls): await arecord(7, "Ada")
        asyncio.run(go())

run(50)
begun = time.perf_counter()
run(calls)
print((time.perf_counter() - begun) / calls)
"""
PATHS = ("memory", "memory async", "disk", "set", "map", "key", "encode", "decode")


def checked_out(commit: str, into: Path) -> Path:
    """The files of a commit, in a directory of their own."""
    if commit == ".":
        shutil.copytree(ROOT / "memo", into / "memo")
        return into
    archive = subprocess.run(
        ["git", "archive", commit, "memo"],  # noqa: S607 - git and tar of whoever runs it
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    into.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        ["tar", "-x", "-C", str(into)],  # noqa: S607
        input=archive.stdout,
        check=True,
    )
    return into


def run(tree: Path, path: str, calls: int, before: list[str]) -> subprocess.CompletedProcess[str]:
    """One process of a commit that goes a path so many times."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("MEMO_")}
    with tempfile.TemporaryDirectory(prefix="memo-compare-") as directory:
        return subprocess.run(
            [*before, sys.executable, "-c", PROGRAM, str(tree), path, str(calls), directory],
            env={**kept, "PYTHONHASHSEED": "0", "HOME": directory},
            cwd=directory,
            check=True,
            capture_output=True,
            text=True,
        )


def instructions(tree: Path, path: str) -> float:
    """Instructions of one call."""
    valgrind = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null"]
    few, many = (
        int(re.findall(r"Collected : (\d+)", run(tree, path, n, valgrind).stderr)[0])
        for n in (FEW, MANY)
    )
    return (many - few) / (MANY - FEW)


def microseconds(old: Path, new: Path, path: str) -> tuple[float, float, float]:
    """Medians of both commits, and the median of the ratios of neighbours."""
    pairs = []
    for turn in range(TURNS):
        trees = (old, new) if turn % 2 == 0 else (new, old)
        taken = {tree: float(run(tree, path, 2000, []).stdout) * 1e6 for tree in trees}
        pairs.append((taken[old], taken[new]))
    before, after = map(statistics.median, zip(*pairs, strict=True))
    return before, after, statistics.median(b / a for a, b in pairs)


def main() -> int:
    """Print both figures for each path; 1 where the new commit is slower by more than `WORST`."""
    options = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    options.formatter_class = argparse.RawDescriptionHelpFormatter
    options.add_argument("old")
    options.add_argument("new", nargs="?", default=".")
    options.add_argument("--paired", action="store_true", help="time, in turns")
    options.add_argument("--only", choices=PATHS, action="append", help="this path; repeatable")
    given = options.parse_args()
    if not given.paired and shutil.which("valgrind") is None:
        raise SystemExit("no valgrind: install it, or take time with --paired")
    worst = 0.0
    with tempfile.TemporaryDirectory(prefix="memo-compare-") as scratch:
        old = checked_out(given.old, Path(scratch, "old"))
        new = checked_out(given.new, Path(scratch, "new"))
        unit = "µs" if given.paired else "instructions"
        print(f"{'path':14}{given.old:>16}{given.new:>16}   new / old   ({unit} a call)")
        for path in given.only or PATHS:
            if given.paired:
                before, after, ratio = microseconds(old, new, path)
            else:
                before, after = instructions(old, path), instructions(new, path)
                ratio = after / before
            worst = max(worst, ratio)
            print(f"{path:14}{before:16,.1f}{after:16,.1f}   {ratio:9.3f}", flush=True)
    return int(worst > WORST)


if __name__ == "__main__":
    sys.exit(main())
