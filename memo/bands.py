"""Bands: arrays that do not lie in order, copied into order a band at a time, for hashing.

Rules of this module:

1.  A band lies in one buffer, which the next band overwrites: whoever takes a band is done with it
    before asking for the next.  So the memory that is needed does not grow with the array.
2.  A band is copied in tiles that stay in the cache of a core, by several threads; numpy lets
    others run while it copies.  Where no thread can be started, this one copies alone.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

BAND: Final = 16 << 20
"""Bytes that are copied into order at once."""
TILE: Final = 256 << 10
"""Bytes of a tile: about a third of what a core keeps close."""
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
                pool = stack.enter_context(_pool())
            place = buffer[: part.nbytes]
            _copy(place.view(part.dtype).reshape(part.shape), part, pool)
            yield memoryview(place)


def _pool() -> ThreadPoolExecutor:
    from concurrent import futures

    return futures.ThreadPoolExecutor(THREADS - 1, thread_name_prefix="memo-bands")


def _copy(target: Any, source: Any, pool: ThreadPoolExecutor | None) -> None:
    """Copy an array tile by tile along its longest axis."""
    tiles = list(_tiles(target, source))
    if pool is None or len(tiles) < THREADS:
        _fill(tiles)
        return
    try:
        others = [pool.submit(_fill, tiles[at::THREADS]) for at in range(1, THREADS)]
    except RuntimeError:  # the interpreter goes down, or there are threads enough
        _fill(tiles)
        return
    _fill(tiles[::THREADS])
    for other in others:
        other.result()


def _tiles(target: Any, source: Any) -> Iterator[tuple[Any, Any]]:
    axis = max(range(source.ndim), key=lambda axis: source.shape[axis])
    target, source = target.swapaxes(0, axis), source.swapaxes(0, axis)
    step = max(1, TILE * len(source) // source.nbytes)
    for start in range(0, len(source), step):
        yield target[start : start + step], source[start : start + step]


def _fill(tiles: list[tuple[Any, Any]]) -> None:
    for target, source in tiles:
        target[...] = source
