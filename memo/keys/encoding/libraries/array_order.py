"""Copy non-contiguous arrays into C order for hashing, one band at a time.

Rules of this module:

1.  A band is in one buffer, which the next band overwrites: a reader is done with a band before
    asking for the next.  So the memory needed does not grow with the array.
2.  A band is copied in tiles that fit in a core's cache, by several threads; numpy releases the GIL
    while it copies.  If no thread can be started, the caller copies alone.
"""

from __future__ import annotations

import functools
import itertools
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

BAND_BYTES: Final = 16 << 20
"""Bytes that are copied into order at a time."""
TILE_BYTES: Final = 256 << 10
"""Bytes of a tile: about a third of a core's cache."""
HASHED_TILE_BYTES: Final = 1 << 20
"""Bytes of a tile that is hashed by the thread that copied it."""
TILE_ROWS: Final = 8
"""Rows in such a tile: as many 8-byte numbers as a processor reads at a time."""
PARALLEL_COPY_FROM_BYTES: Final = 4 << 20
"""Bands of at least this many bytes are copied by several threads."""
COPY_THREADS: Final = min(8, os.cpu_count() or 1)


def cut_in_bands(array: Any) -> Iterator[Any]:
    """Split an array into parts of at most `BAND_BYTES`, along its first axes."""
    if array.nbytes <= BAND_BYTES:
        yield array
        return
    rows = BAND_BYTES * len(array) // array.nbytes
    if rows:
        yield from (array[start : start + rows] for start in range(0, len(array), rows))
    elif array.ndim > 1:
        for row in array:
            yield from cut_in_bands(row)
    else:
        yield from (array[at : at + 1] for at in range(len(array)))


def in_c_order(parts: Iterable[Any]) -> Iterator[memoryview]:
    """Yield the bytes of each array in C order, all in one buffer, one after another.

    Args:
        parts: plain arrays of any layout and size; `cut_in_bands` makes small ones.
    """
    np = sys.modules["numpy"]
    buffer = np.empty(0, np.uint8)
    with ExitStack() as stack:
        pool = None
        for part in parts:
            if buffer.nbytes < part.nbytes:
                buffer = np.empty(part.nbytes, np.uint8)
            if pool is None and part.nbytes >= PARALLEL_COPY_FROM_BYTES:
                pool = stack.enter_context(make_pool() or nullcontext())
            place = buffer[: part.nbytes]
            _copy(place.view(part.dtype).reshape(part.shape), part, pool)
            yield memoryview(place)


def threads_per_row(rows: int) -> int:
    """Return how many threads may hash each of `rows` rows in `feed_rows`."""
    return max(1, COPY_THREADS // rows)


def feed_rows(takers: Sequence[Callable[[Any], object]], array: Any) -> None:
    """Pass each taker the bytes of its row of a 2-D array, piece by piece and in order.

    For rows that are not contiguous: each thread copies some of them, tile by tile, and passes them
    on while they are cached.  Different takers are called from different threads, each from only
    one.
    """
    count = min(COPY_THREADS, len(array))
    bounds = [len(array) * at // count for at in range(count + 1)]
    parts = [(takers[a:b], array[a:b]) for a, b in itertools.pairwise(bounds)]
    with make_pool() or nullcontext() as pool:
        _run([functools.partial(_feed, *part) for part in parts], pool)


def _feed(takers: Sequence[Callable[[Any], object]], rows: Any) -> None:
    for at in range(0, len(rows), TILE_ROWS):
        _feed_some(takers[at : at + TILE_ROWS], rows[at : at + TILE_ROWS])


def _feed_some(takers: Sequence[Callable[[Any], object]], rows: Any) -> None:
    np = sys.modules["numpy"]
    step = max(1, HASHED_TILE_BYTES // (len(rows) * rows.dtype.itemsize))
    tile = np.empty((len(rows), step), rows.dtype)
    for start in range(0, rows.shape[1], step):
        part = rows[:, start : start + step]
        place = tile[:, : part.shape[1]]
        place[...] = part
        for taker, row in zip(takers, place, strict=True):
            taker(memoryview(row.view(np.uint8)))


class _Job:
    """Work that the first thread to call it does; others wait for its end.

    If a pool cannot start a thread, `submit` raises with the work already queued: a thread of the
    pool may do it at any time, as well as the caller.
    """

    def __init__(self, work: Callable[[], None]) -> None:
        self._work: Callable[[], None] | None = work
        self._error: BaseException | None = None
        self._lock = threading.Lock()

    def __call__(self) -> None:
        with self._lock:
            work, self._work = self._work, None
            try:
                if work is not None:
                    work()
            except BaseException as error:
                self._error = error
            if self._error is not None:
                raise self._error


def _run(work: Sequence[Callable[[], None]], pool: ThreadPoolExecutor | None) -> None:
    """Run jobs in threads, the first one here; all of them here if no thread can be started."""
    if pool is None:
        for one in work:
            one()
        return
    others = []
    mine: list[Callable[[], None]] = list(work[:1])
    for job in map(_Job, work[1:]):
        try:
            others.append(pool.submit(job))
        except RuntimeError:  # the interpreter is shutting down, or there are too many threads
            mine.append(job)
    for one in mine:
        one()
    for other in others:
        other.result()


def make_pool() -> ThreadPoolExecutor | None:
    """Return a pool of threads that copy and hash the parts of a big array.

    None if there is one processor, or the main thread has ended: pools cannot be imported then.
    """
    if COPY_THREADS == 1:
        return None
    try:
        from concurrent.futures.thread import ThreadPoolExecutor
    except RuntimeError:
        return None
    return ThreadPoolExecutor(COPY_THREADS - 1, thread_name_prefix="memo-bands")


def _copy(target: Any, source: Any, pool: ThreadPoolExecutor | None) -> None:
    """Copy an array tile by tile along its longest axis."""
    tiles = list(_tiles(target, source))
    if pool is None or len(tiles) < COPY_THREADS:
        _fill(tiles)
        return
    _run([functools.partial(_fill, tiles[at::COPY_THREADS]) for at in range(COPY_THREADS)], pool)


def _tiles(target: Any, source: Any) -> Iterator[tuple[Any, Any]]:
    axis = max(range(source.ndim), key=lambda axis: source.shape[axis])
    target, source = target.swapaxes(0, axis), source.swapaxes(0, axis)
    step = max(1, TILE_BYTES * len(source) // source.nbytes)
    for start in range(0, len(source), step):
        yield target[start : start + step], source[start : start + step]


def _fill(tiles: list[tuple[Any, Any]]) -> None:
    for target, source in tiles:
        target[...] = source
