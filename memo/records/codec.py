"""The codec: turn values into bytes and back.

Uses cloudpickle, protocol 5, with the big buffers (arrays, pandas blocks, Arrow buffers) out of
band, so that they can be written once, named by their digest, and mapped instead of read.
"""

from __future__ import annotations

import io
import mmap
import pickle
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

from memo.errors import EntryError, type_named
from memo.records.buffers import MAX_STREAM_BUFFER_BYTES, reduction_of
from memo.records.seal import (
    COMPRESSED,
    RAISED,
    Buffer,
    Header,
    aligned,
    padding,
    payload_digest,
    payload_size,
)
from memo.runtime.named_tuple import NamedTuple
from memo.runtime.reasons import UNREADABLE

PICKLE_PROTOCOL = 5
"""The first one with buffers out of band."""
PAYLOAD_FROM_BYTES = 64 * 1024
"""A value with at least this many bytes of buffers gets a payload; below, all is in the stream."""
_MULTITHREADED_FROM_BYTES = 1024 * 1024
"""BLAKE3 uses several threads for at least this many bytes."""
_HASH_CHUNK_BYTES = 8 * 1024 * 1024
"""Bytes that are hashed at a time when a payload is verified."""
_COPY_CHUNK_BYTES = 4 * 1024 * 1024
"""Bytes that are copied at a time."""
LOADED_IN_PIECES_FROM_BYTES = 256 * 1024
"""A stream of at least this many bytes is loaded in pieces, so that other threads can run."""
_NAMED_LIBRARIES = ("numpy", "pandas", "pyarrow", "polars", "scipy", "torch")

_ALTERED_TYPES = (io.TextIOWrapper, memoryview)
"""Types whose objects cloudpickle pickles as `StringIO` and `bytes`."""

storing: ContextVar[bool] = ContextVar("memo_storing", default=False)
"""True while a result is pickled, which must not include settings."""

_MAX_LOADING_DEPTH = 8
"""Maximum number of values that are loaded inside each other, by the code of their classes."""
_loading_depth: ContextVar[int] = ContextVar("memo_loading_depth", default=0)


class Payload(NamedTuple):
    """The big buffers of a value: what the header records about them, and the bytes themselves.

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
        """Bytes of the payload, aligned as stored."""
        return payload_size(self.table)


class Encoded(NamedTuple):
    """A value as bytes.

    Attributes:
        stream: the pickle stream, or all of the value compressed.
        payload: the big buffers, if they are not in the stream.
        codec: describes how it was written, for display.
        flags: `memo.records.seal.COMPRESSED`.
    """

    stream: bytes
    payload: Payload | None
    codec: str
    flags: int = 0

    def __repr__(self) -> str:
        """Omit the stream, which contains the value."""
        return f"<Encoded {len(self.stream)} bytes>"


class Encodable:
    """A result that encodes itself: the items of a generator, pickled as they are produced.

    Attributes:
        returned: what the generator returned.
    """

    returned: Any = None

    def encode(self, returned: bytes) -> Encoded:
        """Encode it in the form that is stored.

        Args:
            returned: the pickle of what the generator returned.
        """
        raise NotImplementedError


class AlteredError(Exception):
    """A value, or something in it, would load as another type.

    Args:
        kind: the type that would change.
        fault: what would happen to it.
    """

    def __init__(self, kind: type, fault: str) -> None:
        super().__init__(kind, fault)
        self.kind = kind
        self.fault = fault

    def of(self, result: type) -> str:
        """Return the fault as part of a sentence about a result of some type."""
        return self.fault if result is self.kind else f"holds {type_named(self.kind)} that {self}"

    def __str__(self) -> str:
        return self.fault


def has_default_reduce(kind: type) -> bool:
    """True if a class leaves pickling of its objects to `object`."""
    given: Any = kind
    return given.__reduce_ex__ is object.__reduce_ex__ and given.__reduce__ is object.__reduce__


Reduce = Callable[[Any], Any]
"""The reduction of an object, or `NotImplemented` for the usual one."""


def encode(
    value: Any, compress: int | None = None, reduce: Reduce = lambda value: NotImplemented
) -> Encoded:
    """Encode a value as a pickle stream and, if it has big buffers, a payload.

    Args:
        value: what a function returned.
        compress: size in bytes from which it is compressed, if that makes it smaller; None: never.
        reduce: called for every object that is not reduction_of here.

    Raises:
        Exception: any error of pickling this value.
    """
    stream, views = pickled(value, reduce)
    beside = sum(view.nbytes for view in views)
    if compress is not None and len(stream) + beside >= compress:
        with suppress(ImportError):
            packed = zstd().compress(stream, views)
            if packed is not None:
                return Encoded(packed, None, f"{pickle_format()} zstd", COMPRESSED)
    if beside >= PAYLOAD_FROM_BYTES:
        return Encoded(stream, payload(tuple(views)), pickle_format())
    if views:
        stream = encode_inline(value, reduce)
    return Encoded(stream, None, pickle_format())


def pickled(value: Any, reduce: Reduce) -> tuple[bytes, list[memoryview]]:
    """Return the pickle stream of a value, and its big buffers where they lie.

    Raises:
        Exception: any error of pickling this value.
    """
    views: list[memoryview] = []

    def keep(buffer: pickle.PickleBuffer) -> bool:
        """Take a large buffer out of the stream; True if it stays in it."""
        view = _raw_view(buffer)
        if view is None or view.nbytes < MAX_STREAM_BUFFER_BYTES:
            return True
        views.append(view)
        return False

    token = storing.set(True)
    try:
        return _pickle(value, keep, reduce), views
    finally:
        storing.reset(token)


def encode_inline(value: Any, reduce: Reduce) -> bytes:
    """Encode a value as one pickle, including its buffers.

    Raises:
        Exception: any error of pickling this value.
    """
    token = storing.set(True)
    try:
        return _pickle(value, None, reduce)
    finally:
        storing.reset(token)


def zstd() -> Any:
    """Return the module for compression, which most processes never need."""
    from memo.records import zstd_frames

    return zstd_frames


def pickle_by_value(value: Any) -> bytes:
    """Pickle a function and all that it reaches by value, for a process without its source."""
    import cloudpickle

    packed: bytes = cloudpickle.dumps(value, protocol=PICKLE_PROTOCOL)
    return packed


def modules_by_value() -> set[str]:
    """Return the modules whose functions and classes cloudpickle pickles by value."""
    import cloudpickle

    return {"__main__", *cloudpickle.list_registry_pickle_by_value()}


def _pickle(
    value: Any, keep: Callable[[pickle.PickleBuffer], bool] | None, reduce: Reduce
) -> bytes:
    sink = _PickleOutput()
    _pickler()(sink, keep, reduce).dump(value)
    return b"".join(sink.parts)


class _PickleOutput:
    """A file to pickle into.

    Pickling holds the GIL until it is done.  The pickler calls `write`, which is Python code, every
    64 KiB, so other threads can run in between.
    """

    __slots__ = ("parts",)

    def __init__(self) -> None:
        self.parts: list[bytes] = []

    def write(self, data: bytes | memoryview) -> int:
        self.parts.append(bytes(data))  # bytes need no copy; other buffers are invalid afterwards
        return len(data)


class _PickleInput:
    """A file to load from; its methods let other threads run, as those of `_PickleOutput` do."""

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
        """Fill a buffer in pieces: copying 100 MB at once takes 50 ms."""
        size = min(len(buffer), len(self._view) - self._at)
        for start in range(0, size, _COPY_CHUNK_BYTES):
            end = min(start + _COPY_CHUNK_BYTES, size)
            buffer[start:end] = self._view[self._at + start : self._at + end]
        self._at += size
        return size

    def readline(self) -> bytes:
        rest = bytes(self._view[self._at :])  # for opcodes that protocol 5 does not write
        return self.read(rest.find(b"\n") + 1 or len(rest))


@lru_cache(maxsize=1)
def _pickler() -> Any:
    """Return a subclass of `cloudpickle.Pickler` that tries the reducers of `buffers` first."""
    import cloudpickle

    class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
        def __init__(self, file: Any, keep: Any, reduce: Reduce) -> None:
            super().__init__(file, protocol=PICKLE_PROTOCOL, buffer_callback=keep)
            self.reduce = reduce
            self.seen: dict[tuple[str, int, int], Any] = {}

        def reducer_override(self, obj: Any) -> Any:
            if isinstance(obj, _ALTERED_TYPES):  # cloudpickle would change the type
                back = "bytes" if isinstance(obj, memoryview) else "StringIO"
                raise AlteredError(type(obj), f"would load as {back}")
            done = reduction_of(self, obj)
            if done is NotImplemented:
                done = self.reduce(obj)
            return super().reducer_override(obj) if done is NotImplemented else done

    return Pickler


def _raw_view(buffer: pickle.PickleBuffer) -> memoryview | None:
    try:
        return buffer.raw()
    except BufferError:  # neither C- nor Fortran-contiguous
        return None


def payload(views: tuple[memoryview, ...]) -> Payload:
    """Make a payload of some buffers, hashed in place."""
    table = tuple(Buffer(v.nbytes, digest(v)) for v in views)
    return Payload(payload_digest(table), table, views)


def digest(view: memoryview | bytes) -> bytes:
    """Return the BLAKE3 digest of some bytes, on all cores if they are many."""
    from blake3 import blake3

    threads = blake3.AUTO if len(view) >= _MULTITHREADED_FROM_BYTES else 1
    return blake3(view, max_threads=threads).digest()


def digest_of(pieces: Iterable[bytes]) -> bytes:
    """Like `digest`, for bytes that come in pieces."""
    from blake3 import blake3

    hasher = blake3(max_threads=blake3.AUTO)
    for piece in pieces:
        hasher.update(piece)
    return hasher.digest()


def hasher(size: int = 0) -> Any:
    """Return a BLAKE3 hasher for pieces; it uses all cores if `size` is big."""
    from blake3 import blake3

    return blake3(max_threads=blake3.AUTO if size >= _MULTITHREADED_FROM_BYTES else 1)


def has_valid_digests(payload: memoryview, table: Sequence[Buffer]) -> bool:
    """True if a payload that was just mapped has the buffers of a table.

    Pages are released once they were read, so that this takes no memory.
    """
    at = 0
    for buffer in table:
        digester = hasher(buffer.size)
        for start in range(at, at + buffer.size, _HASH_CHUNK_BYTES):
            digester.update(payload[start : min(start + _HASH_CHUNK_BYTES, at + buffer.size)])
            release_pages(payload, start, _HASH_CHUNK_BYTES)
        if digester.digest() != buffer.digest:
            return False
        at += aligned(buffer.size)
    return True


def has_clear_gaps(payload: memoryview, table: Sequence[Buffer]) -> bool:
    """True if the bytes between the buffers of a payload are zeros."""
    at = 0
    for buffer in table:
        if any(payload[at + buffer.size : at + aligned(buffer.size)]):
            return False
        at += aligned(buffer.size)
    return True


def release_pages(payload: memoryview, start: int, size: int) -> None:
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
    """Load a value from its pickle stream and its payload.

    Args:
        stream: from an entry with a valid seal.
        payload: the payload's bytes with its buffers aligned; writable and private, since arrays
            will use that memory.  None if `table` is empty.
        table: the buffers' sizes.
        flags: the header's flags.

    Raises:
        EntryError: `"unreadable"`: it does not load here (a class is gone, a library has changed).
    """
    if flags & ~(COMPRESSED | RAISED):
        raise EntryError(UNREADABLE, "written by a later version of memo")
    if flags & COMPRESSED:
        stream, payload, table = decompress(stream)
    return unpickled(stream, buffers_of(payload, table) if table else ())


def unpickled(stream: memoryview | bytes, views: Sequence[memoryview] = ()) -> Any:
    """Load a value from its pickle stream and its big buffers.

    Raises:
        EntryError: `"unreadable"`, see `decode`; also if values load each other without end, as one
            whose `__reduce__` calls the cached function that made it.
    """
    depth = _loading_depth.get()
    if depth == _MAX_LOADING_DEPTH:
        raise EntryError(UNREADABLE, "loads itself")
    token = _loading_depth.set(depth + 1)
    try:
        if len(stream) > LOADED_IN_PIECES_FROM_BYTES:
            return pickle.Unpickler(_PickleInput(stream), buffers=views).load()
        return pickle.loads(stream, buffers=views)
    except Exception as error:
        raise EntryError(UNREADABLE, f"does not load: {type(error).__name__}") from error
    finally:
        _loading_depth.reset(token)


def decompress(stream: memoryview | bytes) -> tuple[Any, Any, Any]:
    """Return a compressed pickle stream, its payload and its table.

    Raises:
        EntryError: it is malformed, or zstd is not installed.
    """
    try:
        return zstd().decompress(stream)  # type: ignore[no-any-return]
    except ImportError as error:
        raise EntryError(UNREADABLE, "is compressed with zstd, which is not installed") from error


def buffers_of(payload: memoryview | None, table: Sequence[Buffer]) -> list[memoryview]:
    """Return the buffers of a payload, without copying."""
    views: list[memoryview] = []
    at = 0
    for buffer in table:
        assert payload is not None
        views.append(payload[at : at + buffer.size])
        at += aligned(buffer.size)
    return views


def payload_of(view: memoryview, header: Header) -> Payload:
    """Return the payload of a header over its stored bytes."""
    views = tuple(buffers_of(view, header.buffers))
    return Payload(payload_digest(header.buffers), header.buffers, views)


def copies(views: Sequence[memoryview]) -> list[memoryview]:
    """Copy buffers into private memory, to load another value from them."""
    return [memoryview(bytearray(view)) for view in views]


def detached(encoded: Encoded) -> Encoded:
    """Copy the buffers of an encoded value, so that it no longer shares memory with the value."""
    payload = encoded.payload
    if payload is None:
        return encoded
    return encoded._replace(payload=payload._replace(views=tuple(copies(payload.views))))


def aligned_pieces(payload: Payload) -> Iterator[memoryview | bytes]:
    """Yield the buffers of a payload, each followed by its padding."""
    for view in payload.views:
        yield view
        yield padding(view.nbytes)


def aligned_bytes(payload: Payload) -> bytes:
    """Return a payload's bytes in one piece, with its buffers aligned."""
    return b"".join(aligned_pieces(payload))


def pickle_format() -> str:
    """Describe how streams are written here: pickle protocol, Python, and the libraries in use."""
    parts = [f"pickle{PICKLE_PROTOCOL} python{sys.version_info.major}.{sys.version_info.minor}"]
    for name in _NAMED_LIBRARIES:
        version = getattr(sys.modules.get(name), "__version__", None)
        if version:
            parts.append(f"{name}{version.split('.')[0]}")
    return " ".join(parts)
