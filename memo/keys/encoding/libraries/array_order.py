"""Bands: arrays that do not lie in order, copied into order a band at a time, for hashing.

Rules of this module:

1.  A band lies in one buffer, which the next band overwrites: a reader is done with a band
    before asking for the next.  So the memory that is needed does not grow with the array.
2.  A band is copied in tiles that stay in the cache of a core, by several threads; numpy lets
    others run while it copies.  Where no thread can be started, this one copies alone.
"""

from __future__ import annotations

import functools
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

BAND: Final = 16 << 20
"""Bytes that are copied into order at once."""
TILE: Final = 256 << 10
"""Bytes of a tile: about a third of what a core keeps close."""
FED: Final = 1 << 20
"""Bytes of a tile that is hashed by the thread that copied it."""
ROWS: Final = 8
"""Rows in such a tile: as many 8-byte numbers as a processor reads at once."""
SHARED: Final = 4 << 20
"""Bytes of a band from which threads share the work."""
THREADS: Final = min(8, os.cpu_count() or 1)


def cut(array: Any) -> Iterator[Any]:
    """An array in parts of at most `BAND` bytes, along its first axes."""
    if array.nbytes <= BAND:
        yield array
        return
    rows = BAND * len(array) // array.nbytes
    if rows:
        yield from (array[start : start + rows] for start in range(0, len(array), rows))
    elif array.ndim > 1:
        for row in array:
            yield from cut(row)
    else:
        yield from (array[at : at + 1] for at in range(len(array)))


def ordered(parts: Iterable[Any]) -> Iterator[memoryview]:
    """The bytes of each array in C order, all in one buffer, one after another.

    Args:
        parts: plain arrays, of any layout and any size; `cut` makes small ones.
    """
    np = sys.modules["numpy"]
    buffer = np.empty(0, np.uint8)
    with ExitStack() as stack:
        pool = None
        for part in parts:
            if buffer.nbytes < part.nbytes:
                buffer = np.empty(part.nbytes, np.uint8)
            if pool is None and part.nbytes >= SHARED and THREADS > 1:
                pool = stack.enter_context(make_pool())
            place = buffer[: part.nbytes]
            _copy(place.view(part.dtype).reshape(part.shape), part, pool)
            yield memoryview(place)


def spare(rows: int) -> int:
    """How many threads may hash one row while `feed` feeds as many."""
    return max(1, THREADS // rows)


def feed(takers: Sequence[Callable[[Any], object]], array: Any) -> None:
    """Give each taker the bytes of its row of a 2-D array, bit by bit and in order.

    For rows that do not lie in one piece: a thread copies some of them, tile by tile, and has them
    taken while they are close.  Takers are called from several threads, each from one.
    """
    count = min(THREADS, len(array))
    bounds = [len(array) * at // count for at in range(count + 1)]
    parts = [(takers[a:b], array[a:b]) for a, b in itertools.pairwise(bounds)]
    with make_pool() as pool:
        _run([functools.partial(_feed, *part) for part in parts], pool)


def _feed(takers: Sequence[Callable[[Any], object]], rows: Any) -> None:
    for at in range(0, len(rows), ROWS):
        _feed_some(takers[at : at + ROWS], rows[at : at + ROWS])


def _feed_some(takers: Sequence[Callable[[Any], object]], rows: Any) -> None:
    np = sys.modules["numpy"]
    step = max(1, FED // (len(rows) * rows.dtype.itemsize))
    tile = np.empty((len(rows), step), rows.dtype)
    for start in range(0, rows.shape[1], step):
        part = rows[:, start : start + step]
        place = tile[:, : part.shape[1]]
        place[...] = part
        for taker, row in zip(takers, place, strict=True):
            taker(memoryview(row.view(np.uint8)))


def _run(work: Sequence[Callable[[], None]], pool: ThreadPoolExecutor) -> None:
    """Do some work, each but the first in a thread; all of it here where none can be started."""
    others = []
    mine = list(work[:1])
    for one in work[1:]:
        try:
            others.append(pool.submit(one))
        except RuntimeError:  # the interpreter goes down, or there are threads enough
            mine.append(one)
    for one in mine:
        one()
    for other in others:
        other.result()


def make_pool() -> ThreadPoolExecutor:
    """The threads that copy and hash the parts of a big array."""
    from concurrent import futures

    return futures.ThreadPoolExecutor(THREADS - 1, thread_name_prefix="memo-bands")


def _copy(target: Any, source: Any, pool: ThreadPoolExecutor | None) -> None:
    """Copy an array tile by tile along its longest axis."""
    tiles = list(_tiles(target, source))
    if pool is None or len(tiles) < THREADS:
        _fill(tiles)
        return
    _run([functools.partial(_fill, tiles[at::THREADS]) for at in range(THREADS)], pool)


def _tiles(target: Any, source: Any) -> Iterator[tuple[Any, Any]]:
    axis = max(range(source.ndim), key=lambda axis: source.shape[axis])
    target, source = target.swapaxes(0, axis), source.swapaxes(0, axis)
    step = max(1, TILE * len(source) // source.nbytes)
    for start in range(0, len(source), step):
        yield target[start : start + step], source[start : start + step]


def _fill(tiles: list[tuple[Any, Any]]) -> None:
    for target, source in tiles:
        target[...] = source
