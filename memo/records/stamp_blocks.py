"""Stamps as bytes, in blocks: stamps that nested calls inherit are packed only once.

An entry names every generation that it depends on, including those inherited from the calls that it
used.  If each level packed all of them again, calls nested `n` deep would cost `n * n`.  So
inherited generations are gathered into a *block* once there are `BLOCK_FROM_GENERATIONS` of them,
and outer entries contain the same block: its bytes are copied, its objects are shared.

The bytes are either one part, or `B` and several parts, each after its length in 4 bytes: first the
stamps outside blocks, then the blocks.  The former are a JSON list of `["g", group, arguments,
text, last]`, `["f", ...]` and so on, where `arguments` is a list of [name, digest], or null for
anything in the group.  A block is a JSON list of four columns: groups, arguments, texts and lasts.
A long part is deflated, since its rows have most of their text in common.
"""

from __future__ import annotations

import json
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import repeat
from typing import Any, Self

from memo.errors import EntryError
from memo.records.stamp_types import CallStamp, FileStamp, Generation, Ref, Result, Stamp, State
from memo.runtime.named_tuple import new_tuple
from memo.runtime.reasons import UNREADABLE

BLOCK_FROM_GENERATIONS = 64
"""Minimum number of inherited generations outside of blocks that become a block."""
DEFLATE_FROM_BYTES = 512
"""Parts of at least this many bytes are deflated."""
MAX_INFLATED_BYTES = 64 << 20
"""Maximum size in bytes of decompressed stamps."""
_SEVERAL_PARTS = b"B"
_LENGTH_BYTES = 4

PackedGeneration = Sequence[Any]
"""A generation as it is packed: "g", group, arguments, text and last."""


class Block:
    """Inherited generations that stay together; equal blocks have equal bytes.

    Attributes:
        packed: its bytes.
        packed_generations: its generations, as packed.
    """

    def __init__(self, packed: bytes, packed_generations: Sequence[PackedGeneration]) -> None:
        self.packed = packed
        self.packed_generations = packed_generations

    @classmethod
    def of(cls, generations: Sequence[Generation]) -> Self:
        packed_generations = [("g", *stamp.ref, *stamp.state) for stamp in generations]
        made = cls(_pack_rows(list(zip(*packed_generations, strict=True))[1:]), packed_generations)
        made.__dict__["generations"] = tuple(generations)
        return made

    @cached_property
    def generations(self) -> tuple[Generation, ...]:
        """Its generations, as stamps."""
        return tuple(map(generation, self.packed_generations))

    @cached_property
    def states(self) -> Mapping[Ref, State]:
        """The state that each of its refs had."""
        return dict(self.generations)

    @cached_property
    def most_in_one_group(self) -> int:
        """The number of its refs in the group that has the most of them."""
        return max(Counter(ref.group for ref in self.states).values())

    @cached_property
    def weight(self) -> int:
        """Bytes that it takes in memory, about six for each packed one."""
        return len(self.packed) + sum(map(deep_size, self.packed_generations))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Block) and self.packed == other.packed

    def __hash__(self) -> int:
        return hash(self.packed)


class Stamps(tuple[Stamp, ...]):  # noqa: SLOT001 - a tuple's size varies: it has no slots
    """Stamps, the last of which are in blocks.

    Attributes:
        loose: the stamps before the blocks.
        blocks: the blocks with the other stamps, in order.
    """

    loose: tuple[Stamp, ...]
    blocks: tuple[Block, ...]

    @classmethod
    def of(cls, loose: Iterable[Stamp], blocks: Iterable[Block]) -> Self:
        outside, inside = tuple(loose), tuple(blocks)
        whole: list[Stamp] = [*outside]
        for block in inside:
            whole += block.generations
        made = cls(whole)
        made.loose, made.blocks = outside, inside
        return made


def blocks_of(stamps: tuple[Stamp, ...]) -> tuple[Block, ...]:
    """Return the blocks at the end of some stamps."""
    return stamps.blocks if isinstance(stamps, Stamps) else ()


def loose_of(stamps: tuple[Stamp, ...]) -> tuple[Stamp, ...]:
    """Return the stamps that are in no block."""
    return stamps.loose if isinstance(stamps, Stamps) else stamps


def with_block(stamps: tuple[Stamp, ...], own: Iterable[Stamp]) -> tuple[Stamp, ...]:
    """Gather inherited generations outside of blocks into a new block, if they are many.

    Args:
        stamps: without results, which refer to others by position.
        own: those that are not inherited.
    """
    loose, mine = loose_of(stamps), set(own)
    inherited = [s for s in loose if type(s) is Generation and s not in mine]
    if len(inherited) < BLOCK_FROM_GENERATIONS:
        return stamps
    kept = [s for s in loose if type(s) is not Generation or s in mine]
    return Stamps.of(kept, (*blocks_of(stamps), Block.of(inherited)))


def deep_size(part: object) -> int:
    """Return the bytes of an object and everything that it holds."""
    size = sys.getsizeof(part)
    return size + sum(map(deep_size, part)) if isinstance(part, (tuple, list)) else size


# --- one generation -------------------------------------------------------------------------------


def generation(packed: PackedGeneration) -> Generation:
    """Unpack a generation.

    Raises:
        EntryError: it is malformed.
    """
    return new_tuple(Generation, (ref_of(packed), new_tuple(State, tuple(packed[3:]))))


def ref_of(packed: PackedGeneration) -> Ref:
    """Return the ref of a packed generation.

    Raises:
        EntryError: it is malformed.
    """
    _, group, arguments, _, _ = packed
    try:
        if arguments is not None:
            arguments = tuple([(name, digest) for name, digest in arguments])
    except (TypeError, ValueError):
        raise EntryError(UNREADABLE, "sealed, but malformed: a generation") from None
    return new_tuple(Ref, (group, arguments))


# --- as bytes -------------------------------------------------------------------------------------


def pack(stamps: tuple[Stamp, ...]) -> bytes:
    """Pack stamps into bytes."""
    loose = _pack_rows(list(map(_row, loose_of(stamps))))
    blocks = blocks_of(stamps)
    if not blocks:
        return loose
    parts = (loose, *(block.packed for block in blocks))
    return _SEVERAL_PARTS + b"".join(len(p).to_bytes(_LENGTH_BYTES, "big") + p for p in parts)


def unpack(text: bytes | memoryview) -> tuple[Stamp, ...]:
    """Return the stamps that were packed by `pack`.

    Raises:
        ValueError, TypeError, IndexError: the bytes do not come from `pack`.
    """
    rows, blocks = rows_and_blocks(text)
    stamps = map(_stamp, rows)
    return Stamps.of(stamps, blocks) if blocks else tuple(stamps)


def rows_and_blocks(text: bytes | memoryview) -> tuple[list[Any], list[Block]]:
    """Return the rows of stamps outside blocks, and the blocks.

    Raises:
        ValueError: the bytes do not come from `pack`.
    """
    if text[:1] != _SEVERAL_PARTS:
        return _unpack_rows(text), []
    loose, *others = _parts(text)
    blocks = []
    for packed in others:
        groups, arguments, texts, lasts = _unpack_rows(packed)
        rows = zip(repeat("g", len(groups)), groups, arguments, texts, lasts, strict=True)
        blocks.append(Block(bytes(packed), list(rows)))
    return _unpack_rows(loose), blocks


def _parts(text: bytes | memoryview) -> Iterator[bytes | memoryview]:
    at = len(_SEVERAL_PARTS)
    while at < len(text):
        begin = at + _LENGTH_BYTES
        at = begin + int.from_bytes(text[at:begin], "big")
        if at > len(text):
            raise ValueError("stamps: a part is too short")
        yield text[begin:at]


def _row(stamp: Stamp) -> Sequence[Any]:
    if isinstance(stamp, Generation):
        return ("g", *stamp.ref, *stamp.state)
    if isinstance(stamp, FileStamp):
        return ("f", *stamp)
    if isinstance(stamp, Result):
        return ("r", *stamp)
    return ("c", *stamp)


def _pack_rows(rows: Sequence[Sequence[Any]]) -> bytes:
    text = _json(rows).encode()
    return text if len(text) < DEFLATE_FROM_BYTES else zlib.compress(text, 4)


_json: Callable[[Any], str] = json.JSONEncoder(separators=(",", ":")).encode
_from_json = json.JSONDecoder().raw_decode


def _unpack_rows(text: bytes | memoryview) -> list[Any]:
    if text[:1] != b"[":
        text = _inflate(text)
    whole = str(text, "utf-8")
    rows, end = _from_json(whole)
    if end != len(whole) or not isinstance(rows, list):
        raise ValueError("stamps: not a list, or bytes behind it")
    return rows


def _inflate(text: bytes | memoryview) -> bytes:
    inflater = zlib.decompressobj()
    try:
        whole = inflater.decompress(text, MAX_INFLATED_BYTES)
    except zlib.error as error:
        raise ValueError(f"stamps: {error}") from None
    if not inflater.eof or inflater.unused_data:
        raise ValueError("stamps: the compressed part has the wrong length")
    return whole


def _stamp(row: list[Any]) -> Stamp:
    kind = row[0]
    if kind == "g":
        _, group, pairs, text, last = row
        arguments = None if pairs is None else tuple(map(tuple, pairs))
        return new_tuple(
            Generation, (new_tuple(Ref, (group, arguments)), new_tuple(State, (text, last)))
        )
    if kind == "f":
        return FileStamp(*row[1:])
    if kind == "c":
        return CallStamp(*row[1:])
    if kind == "r":
        _, function, key, digest, arguments, beneath, wave = row
        return Result(function, key, digest, arguments, tuple(beneath), wave)
    raise ValueError(f"unknown stamp {kind!r}")
