"""How costs grow: the same work at two sizes, in one run: `python -m benchmarks growth`."""

from __future__ import annotations

import importlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import memo


class Row(NamedTuple):
    """Work at two sizes.

    Attributes:
        title: of the work.
        sizes: the small and the large one.
        goal: in words.
        seconds: what the work takes at a size.
    """

    title: str
    sizes: tuple[int, int]
    goal: str
    seconds: Callable[[int], float]


def _addresses(count: int) -> float:
    """An `invalidate_cache` that names so many addresses; the median of three."""
    start = iter(range(0, 10**9, 10_000))

    @memo.invalidate_cache(
        key_prefix="growth",
        key_resolver=lambda result, first: [f"growth:{first + x}" for x in range(count)],
    )
    def update(first: int) -> None:
        """Change products."""

    def once() -> float:
        memo.invalidate(prefix="growth")
        begun = time.perf_counter()
        update(next(start))
        return time.perf_counter() - begun

    return statistics.median(once() for _ in range(3))


def _functions(count: int) -> float:
    """The first call of the last functions of a module that has so many; the median of 50."""
    name = f"growth_{count}"
    lines = [f"@memo.cache(ttl=600)\ndef f{n}(x):\n    return x + {n}" for n in range(count)]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, f"{name}.py").write_text("import memo\n" + "\n".join(lines))
        sys.path.insert(0, folder)
        module: Any = importlib.import_module(name)
        sys.path.remove(folder)
        taken = []
        for number in range(count):
            begun = time.perf_counter()
            getattr(module, f"f{number}")(1)
            taken.append(time.perf_counter() - begun)
    return statistics.median(taken[-50:])


def _tags(count: int) -> float:
    """A hit on an entry with so many tags; the median of 200."""
    names = [f"tag-{count}-{n}" for n in range(count)]

    @memo.cache(ttl=600, tags=names, name=f"tagged_{count}")
    def load(x: int) -> int:
        return x

    load(1)
    taken = []
    for _ in range(200):
        begun = time.perf_counter()
        load(1)
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken)


ROWS = (
    Row("`invalidate_cache` that names addresses", (500, 2000), "linear, 0.3 s", _addresses),
    Row("first call of the last of so many functions", (200, 1000), "flat, 4 ms", _functions),
    Row("hit on an entry with so many tags, memory", (10, 1000), "linear, 1 ms", _tags),
)


def table() -> list[str]:
    """The rows as a Markdown table, measured now in a directory of their own."""
    lines = ["| what | sizes | takes | ratio | goal |", "| --- | --- | --- | --- | --- |"]
    with (
        tempfile.TemporaryDirectory() as folder,
        memo.configure(directory=folder, secret="growth" * 6),
    ):
        for row in ROWS:
            small, large = (row.seconds(size) for size in row.sizes)
            sizes = " / ".join(f"{size:,}" for size in row.sizes)
            takes = f"{small * 1e3:.2f} / {large * 1e3:.2f} ms"
            lines.append(f"| {row.title} | {sizes} | {takes} | {large / small:.1f} | {row.goal} |")
    return lines


def main() -> None:
    """Measure and print."""
    print(*table(), sep="\n")
