"""Atoms: encode plain values, and combine encodings.

An encoding begins with a letter, its *kind*, which determines its length; so encodings in a row
cannot be confused.  Content longer than `MAX_LITERAL_BYTES` is replaced by its digest.
"""

from __future__ import annotations

import io
import math
import operator
import pickle
import struct
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

from memo.records import codec
from memo.runtime.checksums import blake2b

DIGEST_BYTES: Final = 20
"""Bytes of a digest."""
MAX_LITERAL_BYTES: Final = 200
"""Content of up to this many bytes is part of the encoding itself."""
PARALLEL_HASH_FROM_BYTES: Final = 1 << 20
"""Content of at least this many bytes is hashed in parallel, on all cores."""
ENCODED_IN_C_FROM_ITEMS: Final = 24
"""A sequence of at least this many plain values is encoded in C code."""
_CHARACTERS_PER_STEP: Final = 4 << 20
"""Characters of a long text that are encoded at a time."""
ITEMS_PER_STEP: Final = 4096
"""Items of such a sequence that are encoded at a time: that many stay in the processor's cache."""

_LENGTHS: Final = [bytes([n]) for n in range(MAX_LITERAL_BYTES + 1)]
_STRINGS: Final = [b"s" + length for length in _LENGTHS]
_INTEGER: Final = struct.Struct("<cq").pack
_FLOAT: Final = struct.Struct("<cd").pack
BACK_REFERENCE: Final = struct.Struct("<cI").pack
NONE: Final = b"N"
TRUE: Final = b"T"
FALSE: Final = b"F"
_NAN: Final = _FLOAT(b"f", math.nan)


def with_length(content: bytes | bytearray | memoryview) -> bytes:
    """Return content after its length, or its digest if it is longer than `MAX_LITERAL_BYTES`."""
    length = len(content)
    if length <= MAX_LITERAL_BYTES:
        return _LENGTHS[length] + content
    if length < PARALLEL_HASH_FROM_BYTES:
        return b"\xff" + blake2b(content, digest_size=DIGEST_BYTES).digest()
    return b"\xfe" + codec.digest(content if isinstance(content, bytes) else memoryview(content))


def node(kind: str, content: bytes) -> bytes:
    """Return the encoding of a value whose kind has no letter of its own."""
    return b"~" + with_length(kind.encode()) + with_length(content)


def hashed(encoding: bytes) -> bytes:
    """Return the digest of an encoding: `DIGEST_BYTES`."""
    return blake2b(encoding, digest_size=DIGEST_BYTES).digest()


def short_digest(data: bytes) -> str:
    """Return the digest of some bytes for names and addresses: 16 hexadecimal digits."""
    return blake2b(data, digest_size=8).hexdigest()


def text(value: str) -> bytes:
    """Encode a str."""
    if len(value) > PARALLEL_HASH_FROM_BYTES:
        return b"s\xfe" + codec.digest_of(_encoded(value))
    try:
        data = value.encode()
    except UnicodeEncodeError:
        data = value.encode("utf-8", "surrogatepass")
    length = len(data)
    return _STRINGS[length] + data if length <= MAX_LITERAL_BYTES else b"s" + with_length(data)


def _encoded(value: str) -> Iterator[bytes]:
    """Encode a long text in UTF-8, in pieces, so that other threads can run in between."""
    for at in range(0, len(value), _CHARACTERS_PER_STEP):
        yield value[at : at + _CHARACTERS_PER_STEP].encode("utf-8", "surrogatepass")


def integer(value: int) -> bytes:
    """Encode an int of any size."""
    try:
        return _INTEGER(b"i", value)
    except struct.error:
        size = value.bit_length() // 8 + 1
        return b"I" + with_length(value.to_bytes(size, "little", signed=True))


def floating(value: float) -> bytes:
    """Encode a float by its bits: -0.0 differs from 0.0, and all NaNs are equal."""
    return _FLOAT(b"f", value) if value == value else _NAN  # noqa: PLR0124


def binary(value: bytes) -> bytes:
    """Encode bytes."""
    return b"b" + with_length(value)


PLAIN_TYPES: Final[frozenset[type]] = frozenset({int, str, float, bytes, bool, type(None)})
"""Types whose values are plain."""
PLAIN_OR_CONTAINER_TYPES: Final[frozenset[type]] = PLAIN_TYPES | {list, tuple, dict, set, frozenset}


class _Strict(pickle.Pickler):
    """Pickles builtin types only, and none of their subclasses."""

    def reducer_override(self, value: Any) -> Any:
        raise TypeError(type(value))


def plain_sequence(pieces: Iterable[Any]) -> bytes | None:
    """Encode a sequence of plain values in C code; None if a value is not plain.

    It is pickled without a memo table, so the result does not depend on sharing or interning.

    Args:
        pieces: lists or tuples of `ITEMS_PER_STEP` values; the last one may be shorter.
    """
    stream = io.BytesIO()
    pickler = _Strict(stream, protocol=5)
    pickler.fast = True
    for piece in pieces:
        if not _are_texts(piece):
            kinds = set(map(type, piece))
            if not kinds <= PLAIN_TYPES:
                return None
            if float in kinds and any(map(operator.ne, piece, piece)):
                piece = [v if v == v else math.nan for v in piece]  # noqa: PLR0124, PLW2901
        try:
            pickler.dump(piece if type(piece) is list else list(piece))
        except TypeError:  # a subclass of `str`
            return None
    return b"P" + with_length(stream.getbuffer())


def _are_texts(values: Any) -> bool:
    """True if all values are instances of `str`: twice as fast as checking each type."""
    if type(values[0]) is not str:
        return False
    try:
        "".join(values)
    except TypeError:
        return False
    return True


SIMPLE: Final[dict[type, Callable[[Any], bytes]]] = {
    int: integer,
    str: text,
    float: floating,
    bytes: binary,
}
"""Type -> the encoder of its values, for the types of most arguments."""
