"""Three stages over 100 partitions, one of which changes: `python -m benchmarks pipeline`.

Each subject is used as its documentation says.  The stages sleep, so that the machine's load does
not count; what is beyond that is the subject's own work.  joblib and Hamilton do not follow files,
so they get the modification time as an argument.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

LOAD, CLEAN, REPORT = 0.01, 0.02, 0.1
"""Seconds that a call of each stage takes."""
PARTITIONS = 100
RAN: Counter[str] = Counter()


def load(path: str) -> list[float]:
    """Return the numbers in a file."""
    RAN["load"] += 1
    time.sleep(LOAD)
    return [float(one) for one in Path(path).read_text("utf-8").split()]


def clean(numbers: Sequence[float]) -> list[float]:
    """Return the positive ones."""
    RAN["clean"] += 1
    time.sleep(CLEAN)
    return [one for one in numbers if one > 0]


def report(parts: Sequence[Sequence[float]]) -> float:
    """Return their sum."""
    RAN["report"] += 1
    time.sleep(REPORT)
    return sum(map(sum, parts))


Run = Callable[[list[str]], float]


def _plain(_directory: str) -> Run:
    return lambda paths: report([clean(load(path)) for path in paths])


def _memo(directory: str) -> Run:
    import memo

    memo.configure(directory=directory, secret="0123456789abcdef" * 4)
    raw = memo.cache(ttl=None, cutoff=True, depends_on="{path}", version="1")(load)

    @memo.cache(ttl=None, cutoff=True, version="1")
    def cleaned(path: str) -> list[float]:
        return clean(raw(path))

    @memo.cache(ttl=None, version="1")
    def whole(paths: list[str]) -> float:
        return report([cleaned(path) for path in paths])

    return whole


def _joblib(directory: str) -> Run:
    from joblib import Memory

    memory = Memory(directory, verbose=0)

    def load_at(path: str, changed: int) -> list[float]:  # noqa: ARG001 - part of its key
        return load(path)

    raw, cleaned, whole = map(memory.cache, (load_at, clean, report))
    return lambda paths: whole([cleaned(raw(path, _changed(path))) for path in paths])


NODES = """
from benchmarks import pipeline
{stages}
def whole({parts}) -> float:
    return pipeline.report([{names}])
"""
STAGE = """
def raw_{n}(path_{n}: str, changed_{n}: int) -> list:
    return pipeline.load(path_{n})
def part_{n}(raw_{n}: list) -> list:
    return pipeline.clean(raw_{n})
"""


def _hamilton(directory: str) -> Run:
    from hamilton import driver

    numbers = range(PARTITIONS)
    text = NODES.format(
        stages="".join(STAGE.format(n=n) for n in numbers),
        parts=", ".join(f"part_{n}: list" for n in numbers),
        names=", ".join(f"part_{n}" for n in numbers),
    )
    Path(directory, "pipeline_nodes.py").write_text(text, "utf-8")
    sys.path.insert(0, directory)
    nodes = importlib.import_module("pipeline_nodes")
    sys.path.remove(directory)
    made = driver.Builder().with_modules(nodes).with_cache(path=f"{directory}/cache").build()

    def run(paths: list[str]) -> float:
        inputs: dict[str, Any] = {f"path_{n}": path for n, path in enumerate(paths)}
        inputs |= {f"changed_{n}": _changed(path) for n, path in enumerate(paths)}
        found: float = made.execute(["whole"], inputs=inputs)["whole"]
        return found

    return run


def _changed(path: str) -> int:
    return os.stat(path).st_mtime_ns


SUBJECTS: dict[str, Callable[[str], Run]] = {
    "memo, `cutoff=True`": _memo,
    "joblib.Memory": _joblib,
    "Hamilton's cache": _hamilton,
    "no cache": _plain,
}


class Took(NamedTuple):
    """The cost of one run: computations of each stage, and seconds."""

    ran: Counter[str]
    seconds: float

    def __str__(self) -> str:
        counts = " + ".join(str(self.ran[stage]) for stage in ("load", "clean", "report"))
        return f"{counts} | {self.seconds:.2f} s"


def measured(subject: str) -> list[Took]:
    """Measure four runs: the first, nothing changed, a file touched, a file changed."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        data = Path(directory, "data")
        data.mkdir()
        paths = [str(data / f"{number}.txt") for number in range(PARTITIONS)]
        for number, path in enumerate(paths):
            Path(path).write_text(f"{number} -1 2", "utf-8")
            os.utime(path, (1_000_000_000, 1_000_000_000))
        run = SUBJECTS[subject](directory)

        def once(expected: float) -> Took:
            RAN.clear()
            begun = time.perf_counter()
            found = run(paths)
            took = Took(RAN.copy(), time.perf_counter() - begun)
            if found != expected:
                raise AssertionError(f"{subject} gave {found} instead of {expected}")
            return took

        total = float(sum(range(PARTITIONS)) + 2 * PARTITIONS)
        took = [once(total), once(total)]
        os.utime(paths[7], (1_100_000_000, 1_100_000_000))
        took.append(once(total))
        Path(paths[7]).write_text("7.5 -1 2", "utf-8")
        os.utime(paths[7], (1_200_000_000, 1_200_000_000))
        took.append(once(total + 0.5))
        return took


def main() -> None:
    """Print the table."""
    print("| | first run | nothing changed | one file touched | one file changed |")
    print("| --- | --- | --- | --- | --- |")
    for subject in SUBJECTS:
        cells = [str(took).replace(" | ", ", ") for took in measured(subject)]
        print(f"| {subject} | {' | '.join(cells)} |")
