"""Stamps in blocks read back as they were, and what is no block is refused."""

from __future__ import annotations

import json

import pytest

from memo.records import stamp_blocks
from memo.records.stamp_blocks import BLOCK_FROM_GENERATIONS, Block, Stamps
from memo.records.stamp_types import FileStamp, Generation, Ref, State

MANY = tuple(
    Generation(Ref(f"f:{n}", None if n % 3 else (("x", f"{n:016x}"),)), State(f"token-{n}", ""))
    for n in range(2 * BLOCK_FROM_GENERATIONS)
)
OWN = (Generation(Ref("n"), State("own", "last")), FileStamp("/data", "facts"))


def test_few_stamps_stay_as_they_are() -> None:
    """Below the bound nothing is gathered, and own stamps never are."""
    few = (*OWN, *MANY[: BLOCK_FROM_GENERATIONS - 1])
    assert stamp_blocks.with_block(few, OWN) is few
    assert stamp_blocks.with_block(MANY, MANY) is MANY


def test_gathered_stamps_read_back_as_they_were() -> None:
    """Packing and unpacking changes neither the stamps nor their blocks."""
    made = stamp_blocks.with_block((*OWN, *MANY), OWN)
    assert tuple(made) == (*OWN, *MANY)
    found = stamp_blocks.unpack(stamp_blocks.pack(made))
    assert found == made
    assert isinstance(found, Stamps)
    assert found.blocks == (Block.of(MANY),)
    assert found.loose == OWN


def test_a_block_is_packed_once() -> None:
    """An entry further out holds the bytes of the block that it inherited."""
    inner = stamp_blocks.with_block(MANY, ())
    outer = Stamps.of(OWN, stamp_blocks.blocks_of(inner))
    assert stamp_blocks.blocks_of(inner)[0].packed in stamp_blocks.pack(outer)


@pytest.mark.parametrize(
    "part",
    [b"[]", b"[1,2,3,4]", b'[["a"],[],["b"],["c"]]', b"{}", b"[[],[],[],[]]]", b"x", b""],
)
def test_what_is_no_block_is_refused(part: bytes) -> None:
    """A sealed record of another program's making is no entry, and no crash."""
    whole = b"B" + b"".join(len(p).to_bytes(4, "big") + p for p in (b"[]", part))
    with pytest.raises((ValueError, TypeError)):
        stamp_blocks.unpack(whole)
    with pytest.raises(ValueError, match="too short"):
        stamp_blocks.unpack(b"B" + (100).to_bytes(4, "big") + json.dumps([]).encode())
