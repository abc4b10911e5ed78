"""Payloads in pieces, between this host's disk and a shared tier.

Rules of this module:

1.  A payload is moved in pieces of `PIECE` bytes, so that the memory needed does not grow with it:
    a leaving payload is a map whose pages are released once they are sent, an arriving one is
    written to its file piece by piece.
2.  Arriving bytes are hashed on the way, against the table of a record with a valid seal.  If the
    digest differs, they are never mapped, and their file is removed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from memo.errors import TierError
from memo.records import codec
from memo.records.codec import Payload
from memo.records.seal import ALIGN, Buffer, payload_digest, payload_size

PIECE = 1 << 20
"""Bytes that are moved at a time: few enough to stay in the processor's cache from the socket to
the file.  One thread hashes them, at 6 GB/s here: they are too few for more."""


class Sink(Protocol):
    """Receives the bytes of one reply."""

    size: int

    def begin(self) -> None:
        """Start with the first byte; forget earlier ones."""
        ...

    def room(self, at: int) -> memoryview:
        """Return a buffer for the bytes from `at` on, as many as fit now."""
        ...

    def took(self, piece: memoryview) -> None:
        """Accept the buffer that `room` returned: it is filled."""
        ...


class Held:
    """A payload in a buffer of its own: a `Sink`, and then a `memo.stores.protocols.Source`."""

    __slots__ = ("_data", "identity", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self.identity: object | None = None
        self._data: memoryview | None = None

    def begin(self) -> None:
        """See `Sink`."""
        self._data = memoryview(bytearray(self.size))

    def room(self, at: int) -> memoryview:
        """See `Sink`."""
        assert self._data is not None
        return self._data[at : at + PIECE]

    def took(self, piece: memoryview) -> None:
        """See `Sink`."""

    def open(self, size: int) -> memoryview:
        """Return the buffer itself, to one caller, which may write to it.

        Raises:
            TierError: it has another size, or was returned before.
        """
        data, self._data = self._data, None
        if data is None or len(data) != size:
            raise TierError("a payload was used before, or has another size than its record says")
        return data


class Leaving(Payload):
    """A payload that is mapped from a file only to be sent."""

    __slots__ = ()

    def pieces(self) -> Iterator[memoryview | bytes]:
        """Yield all its bytes, aligned as stored; each piece is released afterwards."""
        at = 0
        for view in self.views:
            for start in range(0, view.nbytes, PIECE):
                yield view[start : start + PIECE]
                codec.let_go(view, at + start, PIECE)
            yield bytes(-view.nbytes % ALIGN)
            at += view.nbytes + -view.nbytes % ALIGN


def aligned_pieces(payload: Payload) -> Iterator[memoryview | bytes]:
    """Yield all bytes of a payload in memory, aligned as stored."""
    for view in payload.views:
        yield view
        yield bytes(-view.nbytes % ALIGN)


def leaving(mapped: memoryview, table: Sequence[Buffer]) -> Leaving:
    """Return the payload of a table, in a private map that was not written to."""
    return Leaving(payload_digest(table), tuple(table), tuple(codec.slices(mapped, table)))


class Arriving:
    """A payload that is fetched once there is a file for it.

    Args:
        table: its buffers, from a record with a valid seal.
        fetch: blocks until a `Sink` has all of it; False if it is gone.

    Attributes:
        digest, size: of the payload.
        fault: the error that `fetch` raised.
    """

    def __init__(self, table: Sequence[Buffer], fetch: Callable[[Sink], bool]) -> None:
        self.table = tuple(table)
        self.digest = payload_digest(self.table)
        self.size = payload_size(self.table)
        self.fault: TierError | None = None
        self._fetch = fetch

    def write(self, descriptor: int) -> None:
        """Fetch the payload into a new file.

        Raises:
            TierError: it could not be fetched, is gone, or does not match the table.
            OSError: it could not be written.
        """
        sink = _File(descriptor, self.table, self.size)
        try:
            there = self._fetch(sink)
        except TierError as error:
            if sink.fault is not None:
                raise sink.fault from None
            self.fault = error
            raise
        if not (there and sink.check.whole()):
            self.fault = TierError("a payload is gone" if not there else "a payload was changed")
            raise self.fault


class _File:
    """A `Sink` that writes to a file what it hashes."""

    def __init__(self, descriptor: int, table: Sequence[Buffer], size: int) -> None:
        self.size = size
        self.fault: OSError | None = None
        self.check = Check(table)
        self._table = table
        self._descriptor = descriptor
        self._piece = memoryview(bytearray(min(PIECE, size)))

    def begin(self) -> None:
        self.check = Check(self._table)
        os.lseek(self._descriptor, 0, os.SEEK_SET)

    def room(self, at: int) -> memoryview:
        return self._piece

    def took(self, piece: memoryview) -> None:
        self.check.update(piece)
        try:
            while piece:
                piece = piece[os.write(self._descriptor, piece) :]
        except OSError as error:
            self.fault = error
            raise TierError("no room for a payload") from error


class Check:
    """Checks that bytes in pieces are the buffers of a table, aligned as stored."""

    def __init__(self, table: Sequence[Buffer]) -> None:
        self._left = iter(table)
        self._good = True
        self._next()

    def _next(self) -> None:
        """Go on to the next buffer that is not empty."""
        for buffer in self._left:
            self._buffer: Buffer | None = buffer
            self._hasher: Any = codec.hasher()
            self._due, self._pad = buffer.size, -buffer.size % ALIGN
            if buffer.size:
                return
            self._end(buffer)
        self._buffer = None

    def _end(self, buffer: Buffer) -> None:
        self._good = self._good and self._hasher.digest() == buffer.digest

    def update(self, piece: memoryview) -> None:
        """Add the next bytes."""
        while piece and self._buffer is not None:
            if self._due:
                own, piece = piece[: self._due], piece[self._due :]
                self._hasher.update(own)
                self._due -= len(own)
                if self._due:
                    return
                self._end(self._buffer)
            skipped = min(len(piece), self._pad)
            piece, self._pad = piece[skipped:], self._pad - skipped
            if not self._pad:
                self._next()
        self._good = self._good and not piece

    def whole(self) -> bool:
        """True if all of it has come, and every buffer has its digest."""
        return self._good and self._buffer is None
