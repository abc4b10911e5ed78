"""The seal: the binary format of an entry, and how it is authenticated.

An entry is one *record*: a header, readable without unpickling, and a pickle stream.  Big buffers
are in a separate payload that the header names by digest.

====== ====== =====================================================================================
offset bytes  content
====== ====== =====================================================================================
0      8      magic; its last byte is the format
8      8      id of the secret that sealed the record
16     32     seal: keyed BLAKE2b-256 over bytes 0-15 and everything from byte 48 on
48     4 x 3  lengths: whole header up to the stream; offset and length of the stamps (absolute)
60     ...    fixed part `_FIXED_PART`, then the texts, the buffer table, the stamps
...    ...    the stream
====== ====== =====================================================================================

All integers are big-endian.  The algorithm belongs to the format, never to the entry; the seal is
compared in constant time, before anything after it is parsed, decompressed, allocated or loaded.
The stamps, as packed by `stamp_blocks`, are at a known position, so that they can be compared
without reading the rest.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterable, Sequence
from itertools import starmap
from typing import cast

from memo.errors import EntryError
from memo.records import stamp_blocks
from memo.records.stamp_blocks import (
    Block,
    PackedGeneration,
    Stamps,
    blocks_of,
    deep_size,
    generation,
    loose_of,
)
from memo.records.stamp_types import Generation, Ref, Result, Stamp, Times
from memo.runtime.checksums import blake2b, compare_digest
from memo.runtime.named_tuple import NamedTuple, new_tuple
from memo.runtime.reasons import UNAUTHENTIC, UNREADABLE
from memo.settings.secret_keys import Secret

RECORD_MAGIC = b"\x89memo\r\n\x01"
ALIGN = 64
"""Alignment of a payload's buffers, as numpy's and Arrow's kernels prefer."""
MAX_HEADER_TEXT_BYTES = 0xFFFF
"""Maximum size in bytes of a text in a header."""

_SEAL_AT = 16
_LENGTHS_AT = 48
_PLACES = struct.Struct(">III")
_FIXED_PART = struct.Struct(">Qqqqqqq16sI7H2I")
_FIXED_AT = _LENGTHS_AT + _PLACES.size
_OUTLINE = struct.Struct(_PLACES.format + _FIXED_PART.format[1:])
_TEXTS_AT = _LENGTHS_AT + _OUTLINE.size
_BUFFER = struct.Struct(">Q32s")


MAX_CHECKED_BYTES = 4 * 1024 * 1024
"""Maximum size in bytes of all records that `CheckedRecords` keeps."""
MAX_SEEN_ONCE_NAMES = 4096
"""Maximum number of names that `CheckedRecords` remembers as seen once; beyond it all of them are
forgotten."""
MAX_CHECKED_RECORD_BYTES = 32 * 1024
"""Maximum size in bytes of a record that it keeps."""
CHECKED_OVERHEAD_BYTES = 1536
"""Approximate bytes that an entry takes there besides its record (measured with tracemalloc)."""

COMPRESSED = 1
"""Flag: the stream is compressed with zstd."""
RAISED = 2
"""Flag: the value is an exception that the function raised."""
STREAM = 4
"""Flag: the value is the sequence of a generator; see `spool`."""


class Buffer(NamedTuple):
    """One buffer of a payload: its length in bytes and its BLAKE3 digest."""

    size: int
    digest: bytes


def payload_digest(buffers: Iterable[Buffer]) -> bytes:
    """Return the name of a payload: 32 bytes that depend on all its buffers in order."""
    return blake2b(
        b"".join(_BUFFER.pack(*b) for b in buffers), digest_size=32, person=b"memo payload"
    ).digest()


def aligned(size: int) -> int:
    """Return a number of bytes, rounded up to a multiple of `ALIGN`."""
    return size + -size % ALIGN


def padding(size: int) -> bytes:
    """Return the zeros that follow so many bytes up to a multiple of `ALIGN`."""
    return bytes(-size % ALIGN)


def payload_size(buffers: Iterable[Buffer]) -> int:
    """Return the bytes of a payload with its buffers aligned."""
    return sum(aligned(buffer.size) for buffer in buffers)


class Header(NamedTuple):
    """Metadata of an entry, readable without loading its value.

    Attributes:
        namespace, key: the namespace and the key it was computed for; compared with those of the
            lookup.
        function: id of the function, `"module:qualname"`.
        code: the function's code version.
        address: the readable name for invalidation, `"prefix:arg:arg"`.
        codec: how the stream was written, with the major versions of the libraries concerned.
        writer: `"host/pid"` of the process that computed it.
        summary: JSON, argument name -> short text and digest, for display and for `explain`.
        times: see `memo.records.stamp_types.Times`.
        stamps: the stamps that must hold for it to be valid.
        buffers: the buffers of its payload, in order; empty if all of it is in the stream.
        flags: `COMPRESSED`, `RAISED`, `STREAM`.
    """

    namespace: str
    key: str
    function: str
    code: str
    address: str
    codec: str
    writer: str
    summary: str
    times: Times
    stamps: tuple[Stamp, ...]
    buffers: tuple[Buffer, ...] = ()
    flags: int = 0


class Entry:
    """A record with a valid seal.

    Attributes:
        record: the whole record as stored.
        stream: the pickle stream, still packed.
        times: see `memo.records.stamp_types.Times`.
        packed_generations: its generations as they are packed, if it is plain.
        texts: the texts of their states; None if it is not plain.
        plain: nothing but these generations can invalidate it: it has no other stamps than results
            that depend on them, no payload, no flags.
        blocks: the blocks at the end of its generations.
        results: True if there are results among its stamps; `packed_generations` has none.
        size: bytes of the record and its payload.
    """

    __slots__ = (
        "_header",
        "blocks",
        "packed_generations",
        "plain",
        "record",
        "results",
        "size",
        "stream",
        "texts",
        "times",
    )

    def __init__(
        self,
        record: bytes,
        stream: memoryview,
        times: Times,
        packed_generations: Sequence[PackedGeneration],
        plain: bool,
        size: int,
        header: Header | None = None,
        results: bool = False,
        blocks: tuple[Block, ...] = (),
    ) -> None:
        self.record = record
        self.blocks = blocks
        self.results = results
        self.stream = stream
        self.times = times
        self.packed_generations = packed_generations
        self.plain = plain
        self.texts = [text for _, _, _, text, _ in packed_generations] if plain else None
        self.size = size
        self._header = header

    @property
    def header(self) -> Header:
        """All metadata; parsed at each access unless it is kept."""
        if self._header is None:  # read each time, so that an entry in memory does not grow
            return parse(memoryview(self.record))[0]
        return self._header

    @property
    def stamps(self) -> tuple[Stamp, ...]:
        """The stamps that must hold for it to be valid."""
        simple = self.plain and not self.results and self._header is None
        return self.generations if simple else self.header.stamps

    @property
    def generations(self) -> tuple[Generation, ...]:
        """Its stamps that are generations."""
        if self.plain and self.blocks:
            made = Stamps.of(map(generation, self._loose), self.blocks)
            return cast("tuple[Generation, ...]", made)
        if self.plain:
            return tuple(map(generation, self.packed_generations))
        return tuple([stamp for stamp in self.header.stamps if type(stamp) is Generation])

    @property
    def _loose(self) -> Sequence[PackedGeneration]:
        """The packed generations outside of blocks."""
        inside = sum(len(block.packed_generations) for block in self.blocks)
        return self.packed_generations[: len(self.packed_generations) - inside]

    @property
    def recorded_texts(self) -> list[str]:
        """The texts of the states of its generations, in order."""
        if self.texts is not None:
            return self.texts
        return [stamp.state.text for stamp in self.generations]

    @property
    def refs(self) -> tuple[Ref, ...]:
        """The refs of its generations, in order."""
        return tuple([stamp.ref for stamp in self.generations])

    @property
    def buffers(self) -> tuple[Buffer, ...]:
        """The buffers of its payload."""
        return () if self.plain else self.header.buffers

    @property
    def flags(self) -> int:
        """The flags of its header."""
        return 0 if self.plain else self.header.flags

    def compact(self) -> Entry:
        """Return the entry without its parsed header, to be kept in memory."""
        if not self.plain or self._header is None:
            return self
        parts = (self.record, self.stream, self.times, self.packed_generations, True, self.size)
        return Entry(*parts, results=self.results, blocks=self.blocks)

    def __sizeof__(self) -> int:
        """Return its size in bytes, without the record."""
        shared = 2 * _POINTER_BYTES * len(self.packed_generations) + sum(
            block.weight for block in self.blocks
        )
        parts = (self.times, self._loose, self._header)
        return object.__sizeof__(self) + _VIEW_BYTES + shared + sum(map(deep_size, parts))

    def __repr__(self) -> str:
        """Omit the stream, which contains the value."""
        return f"<Entry {self.header.function} {self.header.key} {self.size} bytes>"

    def _repr_html_(self) -> str:
        from html import escape

        return f"<code>{escape(repr(self))}</code>"


_POINTER_BYTES = 8
_VIEW_BYTES = sys.getsizeof(memoryview(b"")) + 144
"""Bytes of a view of a record, and of what the interpreter keeps behind it."""


def entry(header: Header, stream: memoryview, record: bytes) -> Entry:
    """Make an entry of its header, its stream and the whole record."""
    size = len(record) + payload_size(header.buffers)
    plain = not (header.buffers or header.flags)
    blocks, loose = blocks_of(header.stamps), loose_of(header.stamps)
    packed_generations: list[PackedGeneration] = []
    results = 0
    for stamp in loose:
        if type(stamp) is Generation:
            packed_generations.append(("g", *stamp.ref, *stamp.state))
        elif type(stamp) is Result:
            results += 1
        else:
            plain = False
    for block in blocks:
        packed_generations += block.packed_generations
    if not plain:
        packed_generations = []
    return Entry(
        record, stream, header.times, packed_generations, plain, size, header, results > 0, blocks
    )


def pack(header: Header, stream: bytes | memoryview, secret: Secret) -> bytes:
    """Return a sealed record."""
    h = header
    texts = (h.namespace, h.key, h.function, h.code, h.address, h.codec, h.writer)
    short = list(map(str.encode, texts))
    for text in short:
        if len(text) > MAX_HEADER_TEXT_BYTES:
            raise EntryError(UNREADABLE, "a header field is longer than 65,535 bytes")
    summary = h.summary.encode()
    table = b"".join(starmap(_BUFFER.pack, h.buffers))
    stamps = stamp_blocks.pack(h.stamps)
    t = h.times
    fixed = _FIXED_PART.pack(
        len(stream),
        t.started,
        t.finished,
        t.finished_boot,
        t.ttl,
        t.grace,
        t.cost,
        t.boot_id,
        h.flags,
        *map(len, short),
        len(summary),
        len(table),
    )
    middle = b"".join((fixed, *short, summary, table))
    stamps_at = _LENGTHS_AT + _PLACES.size + len(middle)
    places = _PLACES.pack(stamps_at + len(stamps), stamps_at, len(stamps))
    head = RECORD_MAGIC + secret.id
    parts = (places, middle, stamps, stream)
    return b"".join((head, secret.seal(head, *parts), *parts))


def unpack(record: bytes, secrets: Sequence[Secret], namespace: str, key: str) -> Entry:
    """Return the entry in a record; see `open_record`."""
    header, stream = open_record(record, secrets, namespace, key)
    return entry(header, stream, record)


def open_record(
    record: bytes, secrets: Sequence[Secret], namespace: str, key: str
) -> tuple[Header, memoryview]:
    """Return header and stream of a record, if one of these secrets sealed it for this key.

    Raises:
        EntryError: `"unreadable"` (not a record of this format), or `"unauthentic"` (sealed by an
            unknown secret, changed since, or sealed for another key or namespace).
    """
    view = memoryview(record)
    if len(view) < _LENGTHS_AT + _PLACES.size + _FIXED_PART.size or view[:8] != RECORD_MAGIC:
        raise EntryError(UNREADABLE, "not a record of this format")
    check_seal(record, view, secrets)
    try:
        header, stream = parse(view)
    except (struct.error, ValueError, KeyError, TypeError, IndexError) as error:
        raise EntryError(UNREADABLE, f"sealed, but malformed: {error}") from None
    if header.namespace != namespace or header.key != key:
        raise EntryError(UNAUTHENTIC, "sealed for another key")
    return header, stream


def unpack_hit(record: bytes, secrets: Sequence[Secret], namespace: str, key: str) -> Entry | None:
    """Return the entry in a record, as `unpack`, but read no more of it than a hit needs.

    None if that is not enough: it has a payload, or stamps that are not generations, or `unpack`
    would refuse it for another reason than its seal.

    Raises:
        EntryError: `"unauthentic"`.
    """
    if len(record) < _TEXTS_AT or not record.startswith(RECORD_MAGIC):
        return None
    view = memoryview(record)
    check_seal(record, view, secrets)
    (
        end, stamps_at, stamps_size, size, started, finished, boot, ttl, grace, cost, boot_id,
        flags, of_namespace, of_key, _, _, _, _, _, _, of_buffers,
    ) = _OUTLINE.unpack_from(record, _LENGTHS_AT)  # fmt: skip
    place = f"{namespace}{key}".encode()
    if (
        stamps_at + stamps_size != end
        or end + size != len(record)
        or of_namespace + of_key != len(place)
        or of_key != len(key)
        or not record.startswith(place, _TEXTS_AT)
        or flags
        or of_buffers
    ):
        return None
    try:
        rows, blocks = stamp_blocks.rows_and_blocks(record[stamps_at:end])
        packed_generations = [row for row in rows if row[0] != "r"]
        for kind, _, _, _, _ in packed_generations:
            if kind != "g":
                return None
        results = len(packed_generations) < len(rows)
        for block in blocks:
            packed_generations += block.packed_generations
    except (ValueError, TypeError, IndexError):
        return None
    times = new_tuple(Times, (started, finished, boot_id, boot, ttl, grace, cost))
    size = len(record)
    return Entry(
        record, view[end:], times, packed_generations, True, size, None, results, tuple(blocks)
    )


class CheckedRecords:
    """Recently checked records, so that a record with many hits is checked only once.

    If the bytes under a name equal those checked before, their seal holds too; each set of secrets
    has a table of its own.  A record is kept from its second lookup on, since keeping one-off
    records costs more than checking them.  A full table takes no more records; it is emptied once
    enough others were seen.

    Args:
        secrets, namespace: as for `unpack_hit`.
    """

    def __init__(self, secrets: Sequence[Secret], namespace: str) -> None:
        self._secrets = secrets
        self._namespace = namespace
        self.known: dict[str, Entry] = {}
        self.once: dict[str, None] = {}
        self.held_bytes = 0

    def unpack_hit(self, name: str, record: bytes, key: str) -> Entry | None:
        """Like the function `unpack_hit`, for a record stored under a name.

        Raises:
            EntryError: `"unauthentic"`.
        """
        known = self.known.get(name)
        if known is not None and known.record == record:
            return known
        entry = unpack_hit(record, self._secrets, self._namespace, key)
        if name not in self.once:
            if len(self.once) >= MAX_SEEN_ONCE_NAMES:
                self.once, self.known, self.held_bytes = {}, {}, 0
            self.once[name] = None
        elif entry is not None and len(record) <= MAX_CHECKED_RECORD_BYTES:
            more = (
                len(record)
                + CHECKED_OVERHEAD_BYTES
                - (0 if known is None else len(known.record) + CHECKED_OVERHEAD_BYTES)
            )
            if self.held_bytes + more <= MAX_CHECKED_BYTES:
                self.held_bytes += more
                self.known[name] = entry
        return entry


class Worth(NamedTuple):
    """The facts by which eviction ranks an entry.

    Attributes:
        cost: nanoseconds that its computation took.
        code: the function's code version.
    """

    cost: int
    code: str


def worth_of(record: bytes) -> Worth | None:
    """Return the `Worth` in a record, authenticated or not; None if it is not a record."""
    if not record.startswith(RECORD_MAGIC) or len(record) < _TEXTS_AT:
        return None
    facts = _OUTLINE.unpack_from(record, _LENGTHS_AT)
    at = _TEXTS_AT + sum(facts[12:15])
    code = record[at : at + facts[15]]
    if len(code) != facts[15]:
        return None
    return Worth(facts[9], code.decode("utf-8", "replace"))


def finished_at(record: bytes) -> int:
    """Return when the computation of a record ended, authenticated or not; 0: not a record."""
    if not record.startswith(RECORD_MAGIC) or len(record) < _TEXTS_AT:
        return 0
    at: int = _OUTLINE.unpack_from(record, _LENGTHS_AT)[5]
    return at


def check_seal(record: bytes, view: memoryview, secrets: Sequence[Secret]) -> None:
    """Authenticate a record with one of the reader's secrets."""
    head = record[:_SEAL_AT]
    for secret in secrets:
        if head.endswith(secret.id):
            if compare_digest(secret.seal(head, view[_LENGTHS_AT:]), record[_SEAL_AT:_LENGTHS_AT]):
                return
            raise EntryError(UNAUTHENTIC, "changed since it was sealed")
    raise EntryError(UNAUTHENTIC, "sealed by an unknown secret")


def parse(view: memoryview) -> tuple[Header, memoryview]:
    """Parse the header of a record whose seal was checked; return it and the pickle stream."""
    header_end, stamps_at, stamps_size = _PLACES.unpack_from(view, _LENGTHS_AT)
    fixed = _FIXED_PART.unpack_from(view, _FIXED_AT)
    length, started, finished, boot, ttl, grace, cost, boot_id, flags = fixed[:9]
    table_size = fixed[17]
    texts, at = _read_texts(view, fixed[9:17])
    table = view[at : at + table_size]
    at += table_size
    if at != stamps_at or at + stamps_size != header_end or header_end + length != len(view):
        raise ValueError("lengths do not add up")
    buffers = tuple(Buffer(*b) for b in _BUFFER.iter_unpack(table)) if table_size else ()
    times = Times(started, finished, boot_id, boot, ttl, grace, cost)
    stamps = stamp_blocks.unpack(view[stamps_at:header_end])
    namespace, key, function, code, address, codec, writer, summary = texts
    header = Header(
        namespace, key, function, code, address, codec, writer, summary, times, stamps, buffers,
        flags,
    )  # fmt: skip
    return header, view[header_end:]


def _read_texts(view: memoryview, sizes: Sequence[int]) -> tuple[list[str], int]:
    """Return the texts of a header, and where they end."""
    at = _FIXED_AT + _FIXED_PART.size
    end = at + sum(sizes)
    whole = str(view[at:end], "utf-8")
    texts: list[str] = []
    if len(whole) == end - at:  # one byte per character
        at = 0
        for size in sizes:
            texts.append(whole[at : at + size])
            at += size
        return texts, end
    for size in sizes:
        texts.append(str(view[at : at + size], "utf-8"))
        at += size
    return texts, end


def groups_of(record: bytes) -> list[str]:
    """Return the groups that a record names, which was sealed or verified here.

    Empty if it is not a record.
    """
    if not record.startswith(RECORD_MAGIC):
        return []
    try:
        _, at, size = _PLACES.unpack_from(record, _LENGTHS_AT)
        rows, blocks = stamp_blocks.rows_and_blocks(memoryview(record)[at : at + size])
        named: dict[str, None] = {}
        for packed_generations in (rows, *(block.packed_generations for block in blocks)):
            for kind, name, *_ in packed_generations:
                if kind == "g" and isinstance(name, str):
                    named[name] = None
        return list(named)
    except (ValueError, TypeError, IndexError, KeyError, RecursionError, struct.error):
        return []
