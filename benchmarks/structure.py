"""Size of the package, and a call's path through it: `python -m benchmarks.structure`.

Counted, not timed, so that a busy machine changes nothing.  A flow runs until it is warm; then
`sys.setprofile` counts calls into memo's files, and the files, of one call in its own thread.

    python -m benchmarks.structure [--redis redis://127.0.0.1:6379]
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import io
import os
import secrets
import sys
import tempfile
import tokenize
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import memo

PACKAGE = Path(memo.__file__).parent
WARM = 20
"""Calls before those that are counted."""
TIMES = 9
"""Calls that are counted; the shortest is reported."""
_LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}


class Size(NamedTuple):
    """The size of the package.

    Attributes:
        entries: folders and modules of `memo/`, without what begins with an underscore.
        modules: Python files.
        lines: of code, without docstrings, comments and empty lines.
    """

    entries: int
    modules: int
    lines: int


class Way(NamedTuple):
    """The path of one call: calls into memo, and distinct modules."""

    calls: int
    modules: int


def size() -> Size:
    """Measure the package that is imported."""
    files = list(PACKAGE.rglob("*.py"))
    names = [one.name for one in PACKAGE.iterdir() if one.suffix in ("", ".py")]
    entries = [name for name in names if not name.startswith("_")]
    lines = sum(_code_lines(one.read_text("utf-8")) for one in files)
    return Size(len(entries), len(files), lines)


def _code_lines(source: str) -> int:
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        value = node.value if isinstance(node, ast.Expr) else None
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            docstrings.update(range(value.lineno, (value.end_lineno or value.lineno) + 1))
    counted: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _LAYOUT:
            counted.update(range(token.start[0], token.end[0] + 1))
    return len(counted - docstrings)


@contextmanager
def counting() -> Iterator[list[str]]:
    """Yield a list that gets the file of each call into memo."""
    inside = f"{PACKAGE}{os.sep}"
    found: list[str] = []

    def seen(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(inside):
            found.append(frame.f_code.co_filename)

    sys.setprofile(seen)
    try:
        yield found
    finally:
        sys.setprofile(None)


def way(call: Callable[[], Any]) -> Way:
    """Return the path of a warm call: the shortest of `TIMES`.

    Now and then one does more, such as a look at the host's file, a millisecond after the last.
    """
    for _ in range(WARM):
        call()
    found = []
    for _ in range(TIMES):
        with counting() as files:
            call()
        found.append(Way(len(files), len(set(files))))
    return min(found)


def memory_hit() -> Way:
    """A sync hit in memory, memory and disk being the tiers."""

    @memo.cache(ttl=600, name="structure:memory")
    def load(region: str) -> dict[str, str]:
        return {"region": region}

    with memo.configure(tiers=["memory", "disk"]):
        return way(lambda: load("EU"))


def redis_hit(url: str) -> Way:
    """An async hit in Redis, which is the only tier."""

    @memo.cache(ttl=600, name="structure:redis")
    async def load(region: str) -> dict[str, str]:
        return {"region": region}

    async def run() -> Way:
        for _ in range(WARM):
            await load("EU")
        found = []
        for _ in range(TIMES):
            with counting() as files:
                await load("EU")
            found.append(Way(len(files), len(set(files))))
        return min(found)

    with memo.configure(tiers=["redis"], redis_url=url, deadline=5):
        return asyncio.run(run())


def locked_miss(url: str) -> Way:
    """A sync miss with `use_lock`, Redis and disk being the tiers."""
    number = iter(range(10**6))

    @memo.cache(ttl=600, use_lock=True, name=f"structure:{secrets.token_hex(8)}")
    def load(x: int) -> int:
        return x

    with memo.configure(tiers=["redis", "disk"], redis_url=url, deadline=5):
        return way(lambda: load(next(number)))


def partial_invalidation() -> Way:
    """`load.invalidate(region=...)` of one entry, memory and disk being the tiers."""

    @memo.cache(ttl=600, name="structure:partial")
    def load(region: str, year: int) -> str:
        return f"{region} {year}"

    with memo.configure(tiers=["memory", "disk"]):
        load("EU", 2024)
        return way(lambda: load.invalidate(region="EU"))


def main() -> None:
    """Print all figures."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument(
        "--redis", default="", help="URL of a server; without it two rows are left out"
    )
    url = options.parse_args().redis
    print(size())
    with tempfile.TemporaryDirectory() as place, memo.configure(directory=place):
        print("sync hit in memory", memory_hit())
        print("partial invalidation", partial_invalidation())
        if url:
            print("async hit with Redis", redis_hit(url))
            print("miss with use_lock", locked_miss(url))


if __name__ == "__main__":
    main()
