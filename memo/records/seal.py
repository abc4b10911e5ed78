"""The seal: what an entry looks like as bytes, and why those bytes may be believed.

An entry is one *record*: a header, readable without unpickling, and a pickle stream.  Big buffers
lie beside it, in a payload that the header names by digest.

====== ====== =====================================================================================
offset bytes  what
====== ====== =====================================================================================
0      8      magic; its last byte is the format
8      8      id of the secret that sealed the record
16     32     seal: keyed BLAKE2b-256 over bytes 0-15 and everything from byte 48 on
48     4 x 3  lengths: whole header up to the stream; offset and length of the stamps (absolute)
60     ...    fixed part `_FIXED`, then the fields of `_TEXTS`, the buffer table, the stamps
...    ...    the stream
====== ====== =====================================================================================

All integers are big-endian.  The algorithm belongs to the format, never to the entry; the seal is
compared in constant time, and before anything behind it is parsed, inflated, allocated or loaded.
The stamps are UTF-8 JSON at a known place, so that they can be compared without reading the rest.
Where there are many, which is where cached calls are nested, they are deflated: what a computation
inherits from the calls that it used has most of its text in common.
"""

from __future__ import annotations

import json
import struct
import sys
import zlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from memo.errors import EntryError
from memo.records.stamp_types import Call, File, Generation, Ref, Result, Stamp, State, Times
from memo.runtime.checksums import blake2b, compare_digest
from memo.runtime.reasons import UNAUTHENTIC, UNREADABLE
from memo.settings.secret_keys import Secret

MAGIC = b"\x89memo\r\n\x01"
ALIGN = 64
"""Buffers of a payload begin at multiples of this, as numpy's and Arrow's kernels like it."""
LONGEST = 0xFFFF
"""Most bytes of a text in a header."""

_SEAL_AT = 16
_BODY_AT = 48
_PLACES = struct.Struct(">III")
_FIXED = struct.Struct(">Qqqqqqq16sI7H2I")
_FIXED_AT = _BODY_AT + _PLACES.size
_OUTLINE = struct.Struct(_PLACES.format + _FIXED.format[1:])
_TEXTS_AT = _BODY_AT + _OUTLINE.size
_BUFFER = struct.Struct(">Q32s")

GLANCES = 4 * 1024 * 1024
"""Bytes of entries that `Glances` keeps at most."""
ONCE = 4096
"""Names that `Glances` remembers to have met; then it forgets all."""
LOOKED_AT = 32 * 1024
"""Bytes of a record that is kept there at most."""
GLANCE = 1536
"""Bytes that an entry takes there besides its record, roughly (measured with tracemalloc)."""

DEFLATED = 1024
"""Bytes of stamps from which they are deflated."""
MOST_STAMPS = 64 << 20
"""Bytes that stamps are inflated to at most."""
COMPRESSED = 1
"""Flag: the stream is compressed with zstd."""
RAISED = 2
"""Flag: the value is an exception that the function raised."""
STREAM = 4
"""Flag: the value is what a generator gave; see `spool`."""


class Buffer(NamedTuple):
    """One buffer of a payload: its length in bytes and its BLAKE3 digest."""

    size: int
    digest: bytes


def payload_digest(buffers: Iterable[Buffer]) -> bytes:
    """The name of a payload: 32 bytes that depend on every byte of its buffers, and their order."""
    return blake2b(
        b"".join(_BUFFER.pack(*b) for b in buffers), digest_size=32, person=b"memo payload"
    ).digest()


def payload_size(buffers: Iterable[Buffer]) -> int:
    """Bytes of a payload with its buffers aligned."""
    return sum(-(-b.size // ALIGN) * ALIGN for b in buffers)


class Header(NamedTuple):
    """Metadata of an entry, readable without loading its value.

    Attributes:
        namespace, key: where it belongs; checked against what was asked for.
        function: identity of the function, `"module:qualname"`.
        code: the function's code version.
        address: what a person invalidates it by, `"prefix:arg:arg"`.
        codec: how the stream was written, with the majors of the libraries concerned.
        writer: `"host/pid"` of the process that computed it.
        summary: JSON, argument name -> short text and digest, for people and for `explain`.
        times: see `memo.records.stamp_types.Times`.
        stamps: what must hold for it to be valid.
        buffers: of its payload, in order; empty when all of it is in the stream.
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


Claim = Sequence[Any]
"""A generation as `pack_stamps` writes it: "g", group, arguments, text and last."""


class Entry:
    """A record whose seal held.

    Attributes:
        record: the whole record as stored.
        stream: the pickle stream, still packed.
        times: see `memo.records.stamp_types.Times`.
        claims: its generations, as `HostGenerations.texts` reads them, where it is plain.
        plain: whether those, read from here, are all that can invalidate it and all that it has:
            no other stamps than results that rest on them, no payload, no flags.
        results: whether there are results among its stamps, which `claims` does not have.
        size: bytes of the record and its payload.
    """

    __slots__ = (
        "_header",
        "claims",
        "plain",
        "record",
        "results",
        "size",
        "stream",
        "times",
    )

    def __init__(
        self,
        record: bytes,
        stream: memoryview,
        times: Times,
        claims: Sequence[Claim],
        plain: bool,
        size: int,
        header: Header | None = None,
        results: bool = False,
    ) -> None:
        self.record = record
        self.results = results
        self.stream = stream
        self.times = times
        self.claims = claims
        self.plain = plain
        self.size = size
        self._header = header

    @property
    def header(self) -> Header:
        """All that is known without loading the value."""
        if self._header is None:  # read anew each time: an entry in memory stays what it weighs
            return _parse(memoryview(self.record))[0]
        return self._header

    @property
    def stamps(self) -> tuple[Stamp, ...]:
        """Stamps that must hold for it to be valid."""
        simple = self.plain and not self.results
        return self.generations if simple else self.header.stamps

    @property
    def generations(self) -> tuple[Generation, ...]:
        """Those of its stamps that are generations."""
        if self.plain:
            return tuple([_generation(claim) for claim in self.claims])
        return tuple([stamp for stamp in self.header.stamps if type(stamp) is Generation])

    @property
    def recorded(self) -> list[str]:
        """The texts of their states, in the same order."""
        if self.plain:
            return [text for _, _, _, text, _ in self.claims]
        return [stamp.state.text for stamp in self.generations]

    @property
    def refs(self) -> tuple[Ref, ...]:
        """Their refs, in the same order."""
        return tuple([stamp.ref for stamp in self.generations])

    @property
    def buffers(self) -> tuple[Buffer, ...]:
        """Those of its payload."""
        return () if self.plain else self.header.buffers

    @property
    def flags(self) -> int:
        """As in its header."""
        return 0 if self.plain else self.header.flags

    def compact(self) -> Entry:
        """The entry without what can be read from its record again, to be kept in memory."""
        if not self.plain or self._header is None:
            return self
        parts = (self.record, self.stream, self.times, self.claims, True, self.size)
        return Entry(*parts, results=self.results)

    def __sizeof__(self) -> int:
        """Bytes that it takes besides its record."""
        parts = (self.times, self.claims, self._header)
        return object.__sizeof__(self) + _VIEW + sum(map(_weight, parts))

    def __repr__(self) -> str:
        """Without the stream, which holds the value."""
        return f"<Entry {self.header.function} {self.header.key} {self.size} bytes>"

    def _repr_html_(self) -> str:
        from html import escape

        return f"<code>{escape(repr(self))}</code>"


_VIEW = sys.getsizeof(memoryview(b"")) + 144
"""Bytes of a view of a record, and of what the interpreter keeps behind it."""


def _weight(part: object) -> int:
    """Bytes of an object and all that it holds."""
    size = sys.getsizeof(part)
    return size + sum(map(_weight, part)) if isinstance(part, (tuple, list)) else size


def _generation(claim: Claim) -> Generation:
    """The stamp that a claim is.

    Raises:
        EntryError: it cannot be read.
    """
    return _new(Generation, (claimed(claim), _new(State, tuple(claim[3:]))))


def claimed(claim: Claim) -> Ref:
    """The ref that a claim is about.

    Raises:
        EntryError: it cannot be read.
    """
    _, group, arguments, _, _ = claim
    try:
        if arguments is not None:
            arguments = tuple([(name, digest) for name, digest in arguments])
    except (TypeError, ValueError):
        raise EntryError(UNREADABLE, "sealed, but malformed: a generation") from None
    return _new(Ref, (group, arguments))


def entry(header: Header, stream: memoryview, record: bytes) -> Entry:
    """An entry of its parts."""
    size = len(record) + payload_size(header.buffers)
    plain = not (header.buffers or header.flags)
    told = header.stamps if plain else ()
    claims = [("g", *stamp.ref, *stamp.state) for stamp in told if type(stamp) is Generation]
    results = sum(type(stamp) is Result for stamp in header.stamps)
    plain = plain and len(claims) + results == len(header.stamps)
    return Entry(record, stream, header.times, claims, plain, size, header, results > 0)


def pack(header: Header, stream: bytes | memoryview, secret: Secret) -> bytes:
    """A sealed record."""
    h = header
    short = [
        t.encode() for t in (h.namespace, h.key, h.function, h.code, h.address, h.codec, h.writer)
    ]
    for text in short:
        if len(text) > LONGEST:
            raise EntryError(UNREADABLE, "a header field is longer than 65,535 bytes")
    summary = h.summary.encode()
    table = b"".join(_BUFFER.pack(*b) for b in h.buffers)
    stamps = pack_stamps(h.stamps)
    t = h.times
    fixed = _FIXED.pack(
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
    stamps_at = _BODY_AT + _PLACES.size + len(middle)
    places = _PLACES.pack(stamps_at + len(stamps), stamps_at, len(stamps))
    head = MAGIC + secret.id
    parts = (places, middle, stamps, stream)
    return b"".join((head, secret.seal(head, *parts), *parts))


def unpack(record: bytes, secrets: Sequence[Secret], namespace: str, key: str) -> Entry:
    """The entry in a record, if one of these secrets sealed it for this namespace and key.

    Raises:
        EntryError: `"unreadable"` (not a record of this format), or `"unauthentic"` (sealed by an
            unknown secret, changed since, or sealed for another key).
    """
    view = memoryview(record)
    if len(view) < _BODY_AT + _PLACES.size + _FIXED.size or view[:8] != MAGIC:
        raise EntryError(UNREADABLE, "not a record of this format")
    _check_seal(record, view, secrets)
    try:
        header, stream = _parse(view)
    except (struct.error, ValueError, KeyError, TypeError, IndexError) as error:
        raise EntryError(UNREADABLE, f"sealed, but malformed: {error}") from None
    if header.namespace != namespace or header.key != key:
        raise EntryError(UNAUTHENTIC, "sealed for another key")
    return entry(header, stream, record)


def glance(record: bytes, secrets: Sequence[Secret], namespace: str, key: str) -> Entry | None:
    """The entry in a record, as `unpack` has it, with no more of it read than a hit needs.

    None where that is not enough to tell: it has a payload, or stamps that are no generations, or
    `unpack` would refuse it for another reason than its seal.

    Raises:
        EntryError: `"unauthentic"`.
    """
    if len(record) < _TEXTS_AT or not record.startswith(MAGIC):
        return None
    view = memoryview(record)
    _check_seal(record, view, secrets)
    (
        end, stamps_at, stamps_size, size, started, finished, boot, ttl, grace, cost, boot_id,
        flags, of_namespace, of_key, _, _, _, _, _, _, of_buffers,
    ) = _OUTLINE.unpack_from(record, _BODY_AT)  # fmt: skip
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
        rows = _rows(record[stamps_at:end])
        claims = [row for row in rows if row[0] != "r"]
        for kind, _, _, _, _ in claims:
            if kind != "g":
                return None
    except (ValueError, TypeError, IndexError):
        return None
    times = _new(Times, (started, finished, boot_id, boot, ttl, grace, cost))
    results = len(claims) < len(rows)
    return Entry(record, view[end:], times, claims, True, len(record), results=results)


class Glances:
    """Recently checked records, so that one that is hit again and again is checked once.

    Equal bytes under the same name have the seal that was compared; one set of secrets has one such
    object.  A record is kept from the second time on that it is met, since to keep what does not
    come back costs more than to check it.  What there is no room for is not kept, until so many
    others were met that all is forgotten.

    Args:
        secrets, namespace: as for `glance`.
    """

    def __init__(self, secrets: Sequence[Secret], namespace: str) -> None:
        self._secrets = secrets
        self._namespace = namespace
        self._known: dict[str, Entry] = {}
        self._once: dict[str, None] = {}
        self._bytes = 0

    def glance(self, name: str, record: bytes, key: str) -> Entry | None:
        """As the function `glance`, of a record that lies under a name.

        Raises:
            EntryError: `"unauthentic"`.
        """
        known = self._known.get(name)
        if known is not None and known.record == record:
            return known
        entry = glance(record, self._secrets, self._namespace, key)
        if name not in self._once:
            if len(self._once) >= ONCE:
                self._once, self._known, self._bytes = {}, {}, 0
            self._once[name] = None
        elif entry is not None and len(record) <= LOOKED_AT:
            more = len(record) + GLANCE - (0 if known is None else len(known.record) + GLANCE)
            if self._bytes + more <= GLANCES:
                self._bytes += more
                self._known[name] = entry
        return entry


class Worth(NamedTuple):
    """Facts from which eviction ranks an entry.

    Attributes:
        cost: nanoseconds that its computation took.
        code: the function's code version.
    """

    cost: int
    code: str


def worth(record: bytes) -> Worth | None:
    """Worth that a record claims, authenticated or not; None where it is no record."""
    if not record.startswith(MAGIC) or len(record) < _TEXTS_AT:
        return None
    facts = _OUTLINE.unpack_from(record, _BODY_AT)
    at = _TEXTS_AT + sum(facts[12:15])
    code = record[at : at + facts[15]]
    if len(code) != facts[15]:
        return None
    return Worth(facts[9], code.decode("utf-8", "replace"))


def finished(record: bytes) -> int:
    """When the computation of a record ended, believed or not; 0 where it is no record."""
    if not record.startswith(MAGIC) or len(record) < _TEXTS_AT:
        return 0
    at: int = _OUTLINE.unpack_from(record, _BODY_AT)[5]
    return at


def _check_seal(record: bytes, view: memoryview, secrets: Sequence[Secret]) -> None:
    head = record[:_SEAL_AT]
    for secret in secrets:
        if head.endswith(secret.id):
            if compare_digest(secret.seal(head, view[_BODY_AT:]), record[_SEAL_AT:_BODY_AT]):
                return
            raise EntryError(UNAUTHENTIC, "changed since it was sealed")
    raise EntryError(UNAUTHENTIC, "sealed by an unknown secret")


def _parse(view: memoryview) -> tuple[Header, memoryview]:
    header_end, stamps_at, stamps_size = _PLACES.unpack_from(view, _BODY_AT)
    fixed = _FIXED.unpack_from(view, _FIXED_AT)
    length, started, finished, boot, ttl, grace, cost, boot_id, flags = fixed[:9]
    table_size = fixed[17]
    texts, at = _texts(view, fixed[9:17])
    table = view[at : at + table_size]
    at += table_size
    if at != stamps_at or at + stamps_size != header_end or header_end + length != len(view):
        raise ValueError("lengths do not add up")
    buffers = tuple(Buffer(*b) for b in _BUFFER.iter_unpack(table)) if table_size else ()
    times = Times(started, finished, boot_id, boot, ttl, grace, cost)
    stamps = unpack_stamps(view[stamps_at:header_end])
    namespace, key, function, code, address, codec, writer, summary = texts
    header = Header(
        namespace, key, function, code, address, codec, writer, summary, times, stamps, buffers,
        flags,
    )  # fmt: skip
    return header, view[header_end:]


def _texts(view: memoryview, sizes: Sequence[int]) -> tuple[list[str], int]:
    """The texts of a header, and where they end."""
    at = _FIXED_AT + _FIXED.size
    end = at + sum(sizes)
    whole = str(view[at:end], "utf-8")
    texts: list[str] = []
    if len(whole) == end - at:  # a byte a character
        at = 0
        for size in sizes:
            texts.append(whole[at : at + size])
            at += size
        return texts, end
    for size in sizes:
        texts.append(str(view[at : at + size], "utf-8"))
        at += size
    return texts, end


def pack_stamps(stamps: Iterable[Stamp]) -> bytes:
    """Stamps as JSON: a list of `["g", group, arguments, text, last]`, `["f", ...]` and so on.

    `arguments` is a list of [name, digest], or null for anything in the group.
    """
    rows: list[list[Any]] = []
    for stamp in stamps:
        if isinstance(stamp, Generation):
            rows.append(["g", stamp.ref.group, stamp.ref.arguments, *stamp.state])
        elif isinstance(stamp, File):
            rows.append(["f", *stamp])
        elif isinstance(stamp, Result):
            rows.append(["r", *stamp])
        else:
            rows.append(["c", *stamp])
    text = _json(rows).encode()
    return text if len(text) < DEFLATED else zlib.compress(text, 4)


_json = json.JSONEncoder(separators=(",", ":")).encode


def unpack_stamps(text: bytes | memoryview) -> tuple[Stamp, ...]:
    """The inverse of `pack_stamps`."""
    return tuple([_stamp(row) for row in _rows(text)])


def groups(record: bytes) -> list[str]:
    """The groups that a record names which was sealed or verified here; none if it is no record."""
    if not record.startswith(MAGIC):
        return []
    try:
        _, at, size = _PLACES.unpack_from(record, _BODY_AT)
        rows = _rows(memoryview(record)[at : at + size])
        named = dict.fromkeys(row[1] for row in rows if row[0] == "g")
        return [name for name in named if isinstance(name, str)]
    except (ValueError, TypeError, IndexError, KeyError, RecursionError, struct.error):
        return []


def _rows(text: bytes | memoryview) -> Any:
    if text[:1] != b"[":
        text = _inflated(text)
    whole = str(text, "utf-8")
    rows, end = _from_json(whole)
    if end != len(whole):
        raise ValueError("more than stamps")
    return rows


def _inflated(text: bytes | memoryview) -> bytes:
    inflater = zlib.decompressobj()
    try:
        whole = inflater.decompress(text, MOST_STAMPS)
    except zlib.error as error:
        raise ValueError(f"stamps: {error}") from None
    if not inflater.eof or inflater.unused_data:
        raise ValueError("stamps that do not end where they should")
    return whole


_from_json = json.JSONDecoder().raw_decode
_new = tuple.__new__  # a third of what a named tuple's own takes


def _stamp(row: list[Any]) -> Stamp:
    kind = row[0]
    if kind == "g":
        _, group, pairs, text, last = row
        arguments = None if pairs is None else tuple([(name, digest) for name, digest in pairs])
        return _new(Generation, (_new(Ref, (group, arguments)), _new(State, (text, last))))
    if kind == "f":
        return File(*row[1:])
    if kind == "c":
        return Call(*row[1:])
    if kind == "r":
        _, function, key, digest, arguments, beneath, wave = row
        return Result(function, key, digest, arguments, tuple(beneath), wave)
    raise ValueError(f"unknown stamp {kind!r}")
