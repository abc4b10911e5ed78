"""The codec: values to bytes and back.

cloudpickle, protocol 5, with the big buffers (arrays, pandas blocks, Arrow buffers) out of band, so
that they can be written once, named by their digest, and mapped instead of read.
"""

from __future__ import annotations

import io
import mmap
import pickle
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

from memo.errors import EntryError, type_named
from memo.records.buffers import SMALL, reduced
from memo.records.seal import (
    ALIGN,
    COMPRESSED,
    RAISED,
    Buffer,
    Header,
    payload_digest,
    payload_size,
)
from memo.runtime.named_tuple import NamedTuple
from memo.runtime.reasons import UNREADABLE

OUT_OF_BAND = 64 * 1024
"""Bytes of buffers from which a value gets a payload; below, everything is in the stream."""
_MULTITHREADED = 1024 * 1024
"""Bytes from which BLAKE3 is worth more than one thread."""
_WINDOW = 8 * 1024 * 1024
"""Bytes that are hashed at a time when a payload is verified."""
_PIECE = 4 * 1024 * 1024
"""Bytes that are copied at a time."""
PATIENT = 256 * 1024
"""Bytes of a stream from which it is loaded so that other threads get their turn."""
_LIBRARIES = ("numpy", "pandas", "pyarrow", "polars", "scipy", "torch")

_ALTERED = (io.TextIOWrapper, memoryview)
"""Types whose objects cloudpickle pickles as `StringIO` and `bytes`."""

storing: ContextVar[bool] = ContextVar("memo_storing", default=False)
"""True while a result is pickled, which takes no settings along."""


class Payload(NamedTuple):
    """The big buffers of a value: what the header records of them, and the bytes themselves.

    Attributes:
        digest: 32 bytes, the payload's name.
        table: each buffer's size and digest, in order.
        views: each buffer's bytes, contiguous, one dimension of unsigned bytes.
    """

    digest: bytes
    table: tuple[Buffer, ...]
    views: tuple[memoryview, ...]

    @property
    def size(self) -> int:
        """Bytes, aligned as they are stored."""
        return payload_size(self.table)


class Encoded(NamedTuple):
    """A value as bytes.

    Attributes:
        stream: the pickle stream, or all of it compressed.
        payload: the big buffers, where they are not in the stream.
        codec: how it was written, for people.
        flags: `memo.records.seal.COMPRESSED`.
    """

    stream: bytes
    payload: Payload | None
    codec: str
    flags: int = 0

    def __repr__(self) -> str:
        """Without the stream, which holds the value."""
        return f"<Encoded {len(self.stream)} bytes>"


class Encodable:
    """A result that encodes itself: a stream, which is written while it grows.

    Attributes:
        returned: what the generator returned.
    """

    returned: Any = None

    def encoded(self, returned: bytes) -> Encoded:
        """As it is stored.

        Args:
            returned: the pickle of what the generator returned.
        """
        raise NotImplementedError


class AlteredError(Exception):
    """A value, or something in it, would not load as what it is.

    Args:
        kind: the type that would be another one.
        fault: what would happen to it.
    """

    def __init__(self, kind: type, fault: str) -> None:
        super().__init__(kind, fault)
        self.kind = kind
        self.fault = fault

    def of(self, result: type) -> str:
        """The fault in a sentence about a result of some type."""
        return self.fault if result is self.kind else f"holds {type_named(self.kind)} that {self}"

    def __str__(self) -> str:
        return self.fault


def is_reduced_plainly(kind: type) -> bool:
    """True if a class leaves it to `object` how pickle saves its objects."""
    given: Any = kind
    return given.__reduce_ex__ is object.__reduce_ex__ and given.__reduce__ is object.__reduce__


Reduce = Callable[[Any], Any]
"""The reduction of an object, or `NotImplemented`: the usual one."""


def encode(
    value: Any, compress: int | None = None, reduce: Reduce = lambda value: NotImplemented
) -> Encoded:
    """A value as a pickle stream and, where it has big buffers, a payload.

    Args:
        value: what a function returned.
        compress: bytes from which it is compressed, if it gets smaller; None: never.
        reduce: asked for every object that has no way of its own here.

    Raises:
        Exception: any error of pickling this value.
    """
    views: list[memoryview] = []

    def keep(buffer: pickle.PickleBuffer) -> bool:
        """Take a large buffer out of the stream; True: it stays there."""
        view = _flat(buffer)
        if view is None or view.nbytes < SMALL:
            return True
        views.append(view)
        return False

    token = storing.set(True)
    try:
        stream = _pickled(value, keep, reduce)
        beside = sum(view.nbytes for view in views)
        if compress is not None and len(stream) + beside >= compress:
            with suppress(ImportError):
                packed = zstd().packed(stream, views)
                if packed is not None:
                    return Encoded(packed, None, f"{described()} zstd", COMPRESSED)
        if beside >= OUT_OF_BAND:
            return Encoded(stream, payload(tuple(views)), described())
        if views:
            stream = _pickled(value, None, reduce)
    finally:
        storing.reset(token)
    return Encoded(stream, None, described())


def inline(value: Any, reduce: Reduce) -> bytes:
    """A value as one pickle, its buffers included.

    Raises:
        Exception: any error of pickling this value.
    """
    token = storing.set(True)
    try:
        return _pickled(value, None, reduce)
    finally:
        storing.reset(token)


def zstd() -> Any:
    """The module that compresses, which most processes never need."""
    from memo.records import zstd_frames

    return zstd_frames


def by_value(value: Any) -> bytes:
    """A function with all that it reaches, as a pickle for a process without its source."""
    import cloudpickle

    packed: bytes = cloudpickle.dumps(value, protocol=5)
    return packed


def modules_by_value() -> set[str]:
    """Modules whose functions and classes cloudpickle takes along by value."""
    import cloudpickle

    return {"__main__", *cloudpickle.list_registry_pickle_by_value()}


def _pickled(
    value: Any, keep: Callable[[pickle.PickleBuffer], bool] | None, reduce: Reduce
) -> bytes:
    sink = _Sink()
    _pickler()(sink, keep, reduce).dump(value)
    return b"".join(sink.parts)


class _Sink:
    """A file to pickle into.

    It is asked every 64 KiB, and since it is Python, other threads get their turn then: pickling
    and loading by themselves keep the interpreter until they are done.
    """

    __slots__ = ("parts",)

    def __init__(self) -> None:
        self.parts: list[bytes] = []

    def write(self, data: bytes | memoryview) -> int:
        self.parts.append(bytes(data))  # bytes need no copy; other buffers are gone afterwards
        return len(data)


class _Source:
    """A file to load from, see `_Sink`."""

    __slots__ = ("_at", "_view")

    def __init__(self, stream: memoryview | bytes) -> None:
        self._view = memoryview(stream)
        self._at = 0

    def read(self, size: int = -1) -> bytes:
        at = self._at
        piece = bytes(self._view[at:] if size < 0 else self._view[at : at + size])
        self._at += len(piece)
        return piece

    def readinto(self, buffer: memoryview) -> int:
        """Fill a buffer, in pieces: copying 100 MB at once takes 50 ms."""
        size = min(len(buffer), len(self._view) - self._at)
        for start in range(0, size, _PIECE):
            end = min(start + _PIECE, size)
            buffer[start:end] = self._view[self._at + start : self._at + end]
        self._at += size
        return size

    def readline(self) -> bytes:
        rest = bytes(self._view[self._at :])  # for opcodes that protocol 5 does not write
        return self.read(rest.find(b"\n") + 1 or len(rest))


@lru_cache(maxsize=1)
def _pickler() -> Any:
    """A `cloudpickle.Pickler` that asks `buffers` first."""
    import cloudpickle

    class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
        def __init__(self, file: Any, keep: Any, reduce: Reduce) -> None:
            super().__init__(file, protocol=5, buffer_callback=keep)
            self.reduce = reduce
            self.seen: dict[tuple[str, int, int], Any] = {}

        def reducer_override(self, obj: Any) -> Any:
            if isinstance(obj, _ALTERED):  # cloudpickle would make another type of it
                back = "bytes" if isinstance(obj, memoryview) else "StringIO"
                raise AlteredError(type(obj), f"would load as {back}")
            done = reduced(self, obj)
            if done is NotImplemented:
                done = self.reduce(obj)
            return super().reducer_override(obj) if done is NotImplemented else done

    return Pickler


def _flat(buffer: pickle.PickleBuffer) -> memoryview | None:
    try:
        return buffer.raw()
    except BufferError:  # neither C- nor Fortran-contiguous
        return None


def payload(views: tuple[memoryview, ...]) -> Payload:
    """A payload of some buffers, hashed where they lie."""
    table = tuple(Buffer(v.nbytes, digest(v)) for v in views)
    return Payload(payload_digest(table), table, views)


def digest(view: memoryview | bytes) -> bytes:
    """BLAKE3 of some bytes, on all cores when they are many."""
    from blake3 import blake3

    threads = blake3.AUTO if len(view) >= _MULTITHREADED else 1
    return blake3(view, max_threads=threads).digest()


def digest_of(pieces: Iterable[bytes]) -> bytes:
    """As `digest`, of bytes that come in pieces."""
    from blake3 import blake3

    hasher = blake3(max_threads=blake3.AUTO)
    for piece in pieces:
        hasher.update(piece)
    return hasher.digest()


def hasher(size: int = 0) -> Any:
    """A BLAKE3 that takes its bytes in pieces, on all cores when `size` says that they are many."""
    from blake3 import blake3

    return blake3(max_threads=blake3.AUTO if size >= _MULTITHREADED else 1)


def is_whole(payload: memoryview, table: Sequence[Buffer]) -> bool:
    """True if a payload that was just mapped has the buffers of a table.

    Pages are released once they are read, so that this takes no memory.
    """
    at = 0
    for buffer in table:
        digester = hasher(buffer.size)
        for start in range(at, at + buffer.size, _WINDOW):
            digester.update(payload[start : min(start + _WINDOW, at + buffer.size)])
            let_go(payload, start, _WINDOW)
        if digester.digest() != buffer.digest:
            return False
        at += -(-buffer.size // ALIGN) * ALIGN
    return True


def let_go(payload: memoryview, start: int, size: int) -> None:
    """Release the pages of a window of a map that was not written to yet."""
    if isinstance(payload.obj, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        page = start - start % mmap.PAGESIZE
        payload.obj.madvise(
            mmap.MADV_DONTNEED, page, min(size + mmap.PAGESIZE, len(payload.obj) - page)
        )


def decode(
    stream: memoryview | bytes,
    payload: memoryview | None,
    table: Sequence[Buffer],
    flags: int = 0,
) -> Any:
    """The value of a stream and its payload.

    Args:
        stream: from an entry whose seal held.
        payload: the payload's bytes with its buffers aligned; writable and private, since arrays
            will lie in it.  None when `table` is empty.
        table: the buffers' sizes.
        flags: the header's.

    Raises:
        EntryError: `"unreadable"`: it does not load here (a class is gone, a library has changed).
    """
    if flags & ~(COMPRESSED | RAISED):
        raise EntryError(UNREADABLE, "written by a later version of memo")
    if flags & COMPRESSED:
        stream, payload, table = inflated(stream)
    try:
        patient = len(stream) > PATIENT
        if not (table or patient):
            return pickle.loads(stream)
        views = slices(payload, table)
        if not patient:
            return pickle.loads(stream, buffers=views)
        return pickle.Unpickler(_Source(stream), buffers=views).load()
    except Exception as error:
        raise EntryError(UNREADABLE, f"does not load: {type(error).__name__}") from error


def inflated(stream: memoryview | bytes) -> tuple[Any, Any, Any]:
    """A compressed pickle stream, the payload beside it and its table.

    Raises:
        EntryError: it cannot be read, or not here.
    """
    try:
        return zstd().unpacked(stream)  # type: ignore[no-any-return]
    except ImportError as error:
        raise EntryError(UNREADABLE, "is compressed with zstd, which is not installed") from error


def slices(payload: memoryview | None, table: Sequence[Buffer]) -> list[memoryview]:
    """The buffers of a payload, without copying."""
    views: list[memoryview] = []
    at = 0
    for buffer in table:
        assert payload is not None
        views.append(payload[at : at + buffer.size])
        at += -(-buffer.size // ALIGN) * ALIGN
    return views


def payload_of(view: memoryview, header: Header) -> Payload:
    """A stored payload in one piece, as the one that was stored."""
    views: list[memoryview] = []
    at = 0
    for buffer in header.buffers:
        views.append(view[at : at + buffer.size])
        at += -(-buffer.size // ALIGN) * ALIGN
    return Payload(payload_digest(header.buffers), header.buffers, tuple(views))


def aligned(payload: Payload) -> bytes:
    """A payload's bytes in one piece, its buffers aligned."""
    parts: list[bytes | memoryview] = []
    for view in payload.views:
        parts += (view, bytes(-view.nbytes % ALIGN))
    return b"".join(parts)


def described() -> str:
    """How streams are written here: pickle protocol, Python, and the libraries in use."""
    parts = [f"pickle5 python{sys.version_info.major}.{sys.version_info.minor}"]
    for name in _LIBRARIES:
        version = getattr(sys.modules.get(name), "__version__", None)
        if version:
            parts.append(f"{name}{version.split('.')[0]}")
    return " ".join(parts)
