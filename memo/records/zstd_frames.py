"""zstd: with the option `compress`, a big result is one compressed stream inside its record.

====== ======= ====================================================================================
offset bytes   content
====== ======= ====================================================================================
0      8       length of the pickle stream
8      4       number of buffers beside it
12     8 each  lengths of the buffers
...    ...     one zstd frame: the pickle stream and the buffers, each aligned as in a payload
====== ======= ====================================================================================

Rules of this module:

1.  To the record this is a stream like any other: its seal covers the compressed bytes and the
    lengths, and is checked before anything is decompressed.
2.  Decompressing takes as much memory as the lengths say, and no more: a frame that announces
    another length, or has more or fewer bytes, is refused.
3.  A result that does not get smaller by a tenth is not compressed, so that it can be mapped.
"""

from __future__ import annotations

import mmap
import struct
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from memo.errors import EntryError
from memo.records.seal import Buffer, aligned, padding
from memo.runtime.reasons import UNREADABLE

COMPRESSION_LEVEL = 3
"""zstd's own default.  Level 1 saves a fifth of the time, level 6 takes up to 3.5 times as long."""
MAX_COMPRESSED_SHARE = 0.9
"""Largest size of a compressed result, as a fraction of its original size."""
COMPRESSION_CHUNK_BYTES = 1 << 20
"""Bytes that are compressed or decompressed at a time, so that other threads can run."""
_HEAD = struct.Struct(">QI")


def zstd_module() -> Any:
    """Return Python's own module (3.14 and later), or its backport."""
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    return zstd


def compress(stream: bytes, views: Sequence[memoryview]) -> bytes | None:
    """Compress a pickle stream and its buffers; None if that is not worthwhile."""
    sizes = (len(stream), *(view.nbytes for view in views))
    total = sum(map(aligned, sizes))
    machine = zstd_module().ZstdCompressor(level=COMPRESSION_LEVEL)
    machine.set_pledged_input_size(total)
    parts = [_HEAD.pack(sizes[0], len(views)), struct.pack(f">{len(views)}Q", *sizes[1:])]
    size = 0
    for piece in _pieces(memoryview(stream), *views):
        parts.append(machine.compress(piece))
        size += len(parts[-1])
        if size > total * MAX_COMPRESSED_SHARE:
            return None
    parts.append(machine.flush())
    return b"".join(parts) if size + len(parts[-1]) <= total * MAX_COMPRESSED_SHARE else None


def decompressed_size(stream: memoryview | bytes) -> int:
    """Return the decompressed size of a compressed stream in bytes.

    Raises:
        EntryError: `"unreadable"`: it is not such a stream.
    """
    return sum(map(aligned, _lengths(stream)[0]))


def decompress(stream: memoryview | bytes) -> tuple[memoryview, memoryview, tuple[Buffer, ...]]:
    """Return the pickle stream, the payload and its table, in private, writable memory.

    Raises:
        EntryError: `"unreadable"`: it does not match its lengths.
    """
    sizes, at = _lengths(stream)
    total = sum(map(aligned, sizes))
    frame = memoryview(stream)[at:]
    try:
        announced = zstd_module().get_frame_info(frame[:64]).decompressed_size
        if announced != total:
            raise EntryError(UNREADABLE, f"a zstd frame of {announced} bytes instead of {total}")
        room = memoryview(mmap.mmap(-1, total))
        decompress_into(frame, room)
    except (zstd_module().ZstdError, OSError, OverflowError, ValueError) as error:
        raise EntryError(UNREADABLE, f"does not decompress: {type(error).__name__}") from error
    end = aligned(sizes[0])
    return room[: sizes[0]], room[end:], tuple(Buffer(size, b"") for size in sizes[1:])


def decompress_into(frame: memoryview, room: memoryview) -> None:
    """Decompress exactly one frame, which must fill `room`."""
    machine = zstd_module().ZstdDecompressor()
    at = fed = 0
    while not machine.eof:
        piece = frame[fed : fed + COMPRESSION_CHUNK_BYTES] if machine.needs_input else b""
        if machine.needs_input and not piece:
            raise EntryError(UNREADABLE, "a zstd frame without its end")
        fed += len(piece)
        got = machine.decompress(piece, max_length=min(COMPRESSION_CHUNK_BYTES, len(room) - at + 1))
        if len(got) > len(room) - at:
            raise EntryError(UNREADABLE, "a zstd frame longer than announced")
        room[at : at + len(got)] = got
        at += len(got)
    if at != len(room) or fed != len(frame) or machine.unused_data:
        raise EntryError(
            UNREADABLE, "a zstd frame shorter than announced, or followed by other bytes"
        )


def _lengths(stream: memoryview | bytes) -> tuple[tuple[int, ...], int]:
    """Return the lengths of the pickle stream and of its buffers; and where the frame begins."""
    try:
        first, count = _HEAD.unpack_from(stream)
        more = struct.unpack_from(f">{count}Q", stream, _HEAD.size)
    except struct.error as error:
        raise EntryError(UNREADABLE, "not a compressed stream") from error
    return (first, *more), _HEAD.size + 8 * count


def _pieces(*views: memoryview) -> Iterator[memoryview | bytes]:
    for view in views:
        for start in range(0, view.nbytes, COMPRESSION_CHUNK_BYTES):
            yield view[start : start + COMPRESSION_CHUNK_BYTES]
        yield padding(view.nbytes)
