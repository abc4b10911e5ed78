"""Spools: the items of a generator, pickled and collected as they are produced.

Each item is pickled by itself.  Pickles are grouped in chunks of about `SPOOL_CHUNK_BYTES`:

====== ======= ====================================================================================
offset bytes   content
====== ======= ====================================================================================
0      8       number of items
8      8 each  lengths of their pickles
...    ...     the pickles
====== ======= ====================================================================================

A compressed chunk (`compress`) consists of `_PACKED`, followed by the output of `zstd_frames`.

Rules of this module:

1.  The chunks are the buffers of an entry's payload.  If all of them together are small they are in
    the entry's stream instead.
2.  Up to `MAX_IN_MEMORY_BYTES` a spool is in memory, beyond that in an unnamed file with the layout
    of the payload.  So storing or loading a stream of any size takes the memory of a few chunks.
3.  What is read back from that file is checked against the digest that it was written with.
"""

from __future__ import annotations

import os
import pickle
import struct
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import IO, TYPE_CHECKING, Any

from memo.errors import EntryError, TierError
from memo.records import codec
from memo.records.codec import PAYLOAD_FROM_BYTES, Encoded
from memo.records.payload_pieces import IncomingPayload, PayloadSink
from memo.records.seal import STREAM, Buffer, aligned, padding
from memo.runtime.named_tuple import NamedTuple
from memo.runtime.reasons import UNREADABLE

if TYPE_CHECKING:
    from pathlib import Path

SPOOL_CHUNK_BYTES = 1 << 20
"""Bytes of pickles at which a chunk is full."""
MAX_IN_MEMORY_BYTES = 4 << 20
"""Bytes of a spool above which it is in a file."""
_NUMBER = struct.Struct(">Q")
_PACKED = b"\xff" * _NUMBER.size
"""More items than there can be."""


def _pack_items(items: Sequence[bytes]) -> bytes:
    lengths = struct.pack(f">{len(items)}Q", *map(len, items))
    return b"".join((_NUMBER.pack(len(items)), lengths, *items))


def _unpack_items(chunk: memoryview) -> list[memoryview]:
    """Return the pickles in a chunk.

    Raises:
        EntryError: it is not a chunk.
    """
    if chunk[: len(_PACKED)] == _PACKED:
        chunk = codec.decompress(chunk[len(_PACKED) :])[0]
    try:
        (count,) = _NUMBER.unpack_from(chunk)
        lengths = struct.unpack_from(f">{count}Q", chunk, _NUMBER.size)
    except struct.error as error:
        raise EntryError(UNREADABLE, "not a chunk of a stream") from error
    at = _NUMBER.size * (1 + count)
    found: list[memoryview] = []
    for length in lengths:
        found.append(chunk[at : at + length])
        at += length
    return found


def load_item(item: bytes | memoryview) -> Any:
    """Load an item from its pickle.

    Raises:
        EntryError: it does not load here.
    """
    return codec.unpickled(item)


class Contents(NamedTuple):
    """The content of a stored sequence, as the stream of its entry has it.

    Attributes:
        number: number of items.
        returned: what the generator returned.
        chunks: all chunks; None: they are the payload.
    """

    number: int
    returned: Any
    chunks: tuple[bytes, ...] | None


class Stream:
    """A stored sequence, which can be read repeatedly, one chunk at a time.

    Attributes:
        count, returned: see `Contents`.
    """

    def __init__(
        self, contents: Contents, payload: memoryview | None, table: Sequence[Buffer]
    ) -> None:
        self.count = contents.number
        self.returned = contents.returned
        self._chunks = contents.chunks
        self._payload = payload
        self._table = tuple(table)

    def items(self, start: int = 0) -> Iterator[Any]:
        """Yield its items, from a position on.

        Raises:
            EntryError: an item does not load here.
        """
        at = 0
        for chunk in self._views():
            for item in _unpack_items(chunk):
                if at >= start:
                    yield load_item(item)
                at += 1

    def _views(self) -> Iterator[memoryview]:
        if self._chunks is not None:
            for chunk in self._chunks:
                yield memoryview(chunk)
            return
        assert self._payload is not None
        at = 0
        for buffer in self._table:
            yield self._payload[at : at + buffer.size]
            codec.release_pages(self._payload, at, buffer.size)
            at += aligned(buffer.size)


class _SpoolPayload(IncomingPayload):
    """The payload of a spool: written to a disk piece by piece, passed on as views of its file."""

    def __init__(self, spool: Spool) -> None:
        super().__init__(spool.table, self._read)
        self._spool = spool

    @property
    def views(self) -> tuple[memoryview, ...]:
        """See `memo.records.codec.Payload`."""
        return tuple(self._spool.chunks())

    def _read(self, sink: PayloadSink) -> bool:
        sink.begin()
        at = 0
        for chunk in self._spool.chunks():
            for piece in (chunk, memoryview(padding(chunk.nbytes))):
                done = 0
                while done < piece.nbytes:
                    room = sink.buffer_at(at)
                    size = min(len(room), piece.nbytes - done)
                    room[:size] = piece[done : done + size]
                    sink.accept(room[:size])
                    done, at = done + size, at + size
        return True


class Spool(codec.Encodable):
    """The items that a generator has produced so far.  Not thread-safe.

    Args:
        folder: the directory for its file, if it needs one; None: that of temporary files.
        compress: size in bytes from which items are compressed; None: never.

    Attributes:
        count: items so far.
        size: bytes of the full chunks.
        table: the table of the full chunks.
        returned: what the generator returned.
        fault: why it stopped keeping items, or `""`.
    """

    def __init__(self, folder: Path | None = None, compress: int | None = None) -> None:
        self.count = self.size = self._given = 0
        self._compress = compress
        self.table: list[Buffer] = []
        self.returned: Any = None
        self.fault = ""
        self._folder = folder
        self._full: list[bytes] = []
        self._file: IO[bytes] | None = None
        self._starts: list[int] = []
        self._offsets: list[int] = []
        self._open: list[bytes] = []
        self._bytes = 0

    @property
    def shape(self) -> tuple[int]:
        """The number of items, for summaries."""
        return (self.count,)

    def add(self, item: bytes) -> None:
        """Add the pickle of the next item.

        Raises:
            OSError: the disk is full.
        """
        self._open.append(item)
        self.count += 1
        self._bytes += len(item)
        if self._bytes >= SPOOL_CHUNK_BYTES:
            self._close_chunk()

    def stop(self, fault: str) -> None:
        """Drop all items, and keep no further ones."""
        self.fault = fault
        self.close()

    def close(self) -> None:
        """Close its file and drop its items."""
        self._full, self._open = [], []
        if self._file is not None:
            self._file.close()
            self._file = None

    def _close_chunk(self) -> None:
        chunk = self._compress_chunk(_pack_items(self._open))
        self._starts.append(self.count - len(self._open))
        self._offsets.append(self.size)
        self._open, self._bytes = [], 0
        if self._file is None and self.size + len(chunk) > MAX_IN_MEMORY_BYTES:
            self._file = self._open_file()
            for one in self._full:
                self._write(one)
            self._full = []
        if self._file is None:
            self._full.append(chunk)
        else:
            self._write(chunk)
        self.table.append(Buffer(len(chunk), codec.digest(chunk)))
        self.size += aligned(len(chunk))

    def _compress_chunk(self, chunk: bytes) -> bytes:
        """Compress a chunk if that is wanted and worthwhile."""
        self._given += len(chunk)
        if self._compress is None or self._given < self._compress:
            return chunk
        with suppress(ImportError):
            packed: bytes | None = codec.zstd().compress(chunk, [])
            if packed is not None:
                return _PACKED + packed
        return chunk

    def _open_file(self) -> IO[bytes]:
        """Open an unnamed file in the cache directory, since temporary files may be in memory."""
        import tempfile  # most sequences stay in memory

        try:
            return tempfile.TemporaryFile(dir=self._folder, buffering=0)
        except OSError:
            return tempfile.TemporaryFile(buffering=0)

    def _write(self, chunk: bytes) -> None:
        assert self._file is not None
        for piece in (memoryview(chunk), memoryview(padding(len(chunk)))):
            left = piece
            while left:
                left = left[self._file.write(left) or 0 :]

    # --- reading ---------------------------------------------------------------------------------

    def chunk(self, index: int) -> memoryview:
        """Return a full chunk.

        Raises:
            TierError: its file does not have what was written.
        """
        if self._file is None:
            return memoryview(self._full[index])
        size, digest = self.table[index]
        data = os.pread(self._file.fileno(), size, self._offsets[index])
        if codec.digest(data) != digest:
            raise TierError("a spooled chunk was changed")
        return memoryview(data)

    def chunks(self) -> Iterator[memoryview]:
        """Yield the full chunks, in order."""
        return map(self.chunk, range(len(self.table)))

    def item(self, index: int, cursor: Cursor) -> bytes | memoryview:
        """Return the pickle of an item; `cursor` belongs to one reader."""
        first = self.count - len(self._open)
        if index >= first:
            return self._open[index - first]
        if not cursor.start <= index < cursor.start + len(cursor.items):
            at = bisect_right(self._starts, index) - 1
            cursor.start, cursor.items = self._starts[at], _unpack_items(self.chunk(at))
        return cursor.items[index - cursor.start]

    # --- storing ---------------------------------------------------------------------------------

    def encode(self, returned: bytes) -> Encoded:
        """Encode all items in the form that is stored; nothing may be added after that.

        Args:
            returned: the pickle of what the generator returned.
        """
        if self._open:
            self._close_chunk()
        small = self.size < PAYLOAD_FROM_BYTES
        chunks = tuple(map(bytes, self.chunks())) if small else None
        stream = pickle.dumps((self.count, returned, chunks), 5)
        payload: Any = None if small else _SpoolPayload(self)
        return Encoded(stream, payload, codec.pickle_format(), STREAM)

    def items(self) -> Iterator[Any]:
        """Yield the items, loaded one by one."""
        cursor = Cursor()
        for index in range(self.count):
            yield load_item(self.item(index, cursor))


class Cursor:
    """The reading position of one reader of a spool: its current chunk."""

    __slots__ = ("items", "start")

    def __init__(self) -> None:
        self.start = 0
        self.items: list[memoryview] = []


def read_contents(stream: memoryview | bytes) -> Contents:
    """Return the content of an entry's stream.

    Raises:
        EntryError: it does not load.
    """
    try:
        count, returned, chunks = codec.unpickled(stream)
    except (TypeError, ValueError) as error:
        raise EntryError(UNREADABLE, "not a stored stream") from error
    return Contents(count, load_item(returned), chunks)
