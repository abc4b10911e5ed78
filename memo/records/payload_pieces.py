"""Payloads in pieces, between this host's disk and a shared tier.

Rules of this module:

1.  A payload is moved in pieces of `TRANSFER_CHUNK_BYTES`, so the memory needed does not grow with
    it: an outgoing payload is mapped and its pages are released once they are sent; an incoming one
    is written to its file piece by piece.
2.  Incoming bytes are hashed on the way and compared with the table of a record with a valid seal.
    If a digest differs, the bytes are never mapped, and their file is removed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from memo.errors import TierError
from memo.records import codec
from memo.records.codec import Payload
from memo.records.seal import Buffer, aligned, padding, payload_digest, payload_size

TRANSFER_CHUNK_BYTES = 1 << 20
"""Bytes that are moved at a time: few enough to stay in the processor's cache between the socket
and the file, and too few for hashing them in several threads to pay."""


class PayloadSink(Protocol):
    """Receives the bytes of a payload, in pieces."""

    size: int

    def begin(self) -> None:
        """Start again with the first byte."""
        ...

    def buffer_at(self, at: int) -> memoryview:
        """Return a buffer for the bytes from `at` on, as many as fit now."""
        ...

    def accept(self, piece: memoryview) -> None:
        """Accept the buffer that `buffer_at` returned, now filled."""
        ...


class PayloadInMemory:
    """A payload that is received into memory.

    First a `PayloadSink`; when it is filled, a `memo.stores.protocols.Source`.
    """

    __slots__ = ("_data", "identity", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self.identity: object | None = None
        self._data: memoryview | None = None

    def begin(self) -> None:
        """See `PayloadSink`."""
        self._data = memoryview(bytearray(self.size))

    def buffer_at(self, at: int) -> memoryview:
        """See `PayloadSink`."""
        assert self._data is not None
        return self._data[at : at + TRANSFER_CHUNK_BYTES]

    def accept(self, piece: memoryview) -> None:
        """See `PayloadSink`."""

    def open(self, size: int) -> memoryview:
        """Return the buffer itself, to one caller, which may write to it.

        Raises:
            TierError: it has another size, or was returned before.
        """
        data, self._data = self._data, None
        if data is None or len(data) != size:
            raise TierError("the payload was opened before, or its size differs from the record's")
        return data


class OutgoingPayload(Payload):
    """A payload that is mapped from a file only to be sent."""

    __slots__ = ()

    def pieces(self) -> Iterator[memoryview | bytes]:
        """Yield all its bytes, aligned as stored; each piece is released afterwards."""
        at = 0
        for view in self.views:
            for start in range(0, view.nbytes, TRANSFER_CHUNK_BYTES):
                yield view[start : start + TRANSFER_CHUNK_BYTES]
                codec.release_pages(view, at + start, TRANSFER_CHUNK_BYTES)
            yield padding(view.nbytes)
            at += aligned(view.nbytes)


def outgoing(mapped: memoryview, table: Sequence[Buffer]) -> OutgoingPayload:
    """Return a payload over a private map that was not written to."""
    return OutgoingPayload(
        payload_digest(table), tuple(table), tuple(codec.buffers_of(mapped, table))
    )


class IncomingPayload:
    """A payload that is fetched straight into its file.

    Args:
        table: its buffers, from a record with a valid seal.
        fetch: blocks until a `PayloadSink` has all of it; returns False if it is missing.

    Attributes:
        digest, size: of the payload.
        fault: the error that `fetch` raised.
    """

    def __init__(self, table: Sequence[Buffer], fetch: Callable[[PayloadSink], bool]) -> None:
        self.table = tuple(table)
        self.digest = payload_digest(self.table)
        self.size = payload_size(self.table)
        self.fault: TierError | None = None
        self._fetch = fetch

    def write(self, descriptor: int) -> None:
        """Fetch the payload into a new file.

        Raises:
            TierError: it could not be fetched, is missing, or does not match the table.
            OSError: it could not be written.
        """
        sink = _FileSink(descriptor, self.table, self.size)
        try:
            there = self._fetch(sink)
        except TierError as error:
            if sink.fault is not None:
                raise sink.fault from None
            self.fault = error
            raise
        if not (there and sink.check.is_complete()):
            self.fault = TierError(
                "the payload is missing" if not there else "the payload does not match its digests"
            )
            raise self.fault


class _FileSink:
    """A `PayloadSink` that hashes bytes and writes them to a file."""

    def __init__(self, descriptor: int, table: Sequence[Buffer], size: int) -> None:
        self.size = size
        self.fault: OSError | None = None
        self.check = DigestCheck(table)
        self._table = table
        self._descriptor = descriptor
        self._piece = memoryview(bytearray(min(TRANSFER_CHUNK_BYTES, size)))

    def begin(self) -> None:
        self.check = DigestCheck(self._table)
        os.lseek(self._descriptor, 0, os.SEEK_SET)

    def buffer_at(self, at: int) -> memoryview:
        return self._piece

    def accept(self, piece: memoryview) -> None:
        self.check.update(piece)
        try:
            while piece:
                piece = piece[os.write(self._descriptor, piece) :]
        except OSError as error:
            self.fault = error
            raise TierError("the payload could not be written") from error


class DigestCheck:
    """Checks that pieces of bytes add up to the buffers of a table, aligned as stored."""

    def __init__(self, table: Sequence[Buffer]) -> None:
        self._left = iter(table)
        self._good = True
        self._next()

    def _next(self) -> None:
        """Go on to the next buffer that is not empty."""
        for buffer in self._left:
            self._buffer: Buffer | None = buffer
            self._hasher: Any = codec.hasher()
            self._due, self._pad = buffer.size, len(padding(buffer.size))
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

    def is_complete(self) -> bool:
        """True if all bytes have arrived and every buffer has its digest."""
        return self._good and self._buffer is None
