"""The seal: what others wrote is never believed, and never unpickled, whatever it looks like."""

from __future__ import annotations

import json
import os
import pickle
import random
import sqlite3
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from folders import FOLDER
from hypothesis import given, settings
from hypothesis import strategies as st
from inside import set_clock
from observed import calls_of
from redis_server import RedisServer

import memo
from memo import cache
from memo.decorators.assembly import default_chain
from memo.errors import EntryError
from memo.records import codec, seal, stamp_blocks
from memo.records.seal import Buffer, Entry, Header
from memo.records.stamp_types import CallStamp, FileStamp, Generation, Ref, State, Times
from memo.runtime.reasons import UNAUTHENTIC, UNREADABLE
from memo.settings.configuration import configure
from memo.settings.secret_keys import Secret
from memo.testing import ManualClock, recording

LONG = bool(os.environ.get("MEMO_TEST_LONG"))
MUTANTS = 1_000_000 if LONG else 20_000
SECRET, OTHER = Secret(b"s" * 32), Secret(b"o" * 32)
MINE, THEIRS = "11" * 32, "22" * 32
"""Two secrets as users write them."""
loaded: list[str] = []
"""The canaries that were unpickled."""


class Canary:
    """Records that it was unpickled."""

    def __reduce__(self) -> Any:
        return loaded.append, ("unpickled",)


@pytest.fixture(autouse=True)
def nothing_loaded() -> Iterator[None]:
    loaded.clear()
    yield
    assert loaded == [], "something that was not authentic was unpickled"


def header(**changes: Any) -> Header:
    given = Header(
        "memo",
        "ab" * 20,
        "shop:load",
        "cd" * 16,
        "load:EU",
        "pickle5 python3.11",
        "host/1",
        '{"region":["EU","00"]}',
        Times(1, 2, bytes(range(16)), 3, 60, 0, 5),
        (
            Generation(Ref("f:shop:load", (("region", "00" * 8),)), State("t" * 22, "l" * 22)),
            Generation(Ref("n", None), State("t" * 22, "")),
            FileStamp("/data/x.csv", "12 34 56"),
            CallStamp("shop:load#0", "ff" * 20),
        ),
        (Buffer(70_000, b"d" * 32),),
    )
    return given._replace(**changes)


STREAM = pickle.dumps({"answer": 42})
RECORD = seal.pack(header(), STREAM, SECRET)


def opened(record: bytes, *secrets: Secret) -> Entry:
    return seal.unpack(record, secrets or (SECRET,), "memo", "ab" * 20)


def refused(record: bytes, *secrets: Secret) -> str:
    """Why a record is refused; fails where it is not, or by any other exception."""
    with pytest.raises(EntryError) as caught:
        opened(record, *secrets)
    return caught.value.reason


def sealed(record: bytes, secret: Secret = SECRET) -> bytes:
    """A record with its seal made anew, as only one with the secret can."""
    head = record[:8] + secret.id
    return head + secret.seal(head, record[48:]) + record[48:]


# --- the format ----------------------------------------------------------------------------------


NUMBERS = st.integers(-(2**63), 2**63 - 1)
TIMES = st.builds(Times, NUMBERS, NUMBERS, st.binary(min_size=16, max_size=16), *[NUMBERS] * 4)
PLAIN = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
STAMPS = st.one_of(
    st.builds(
        Generation,
        st.builds(Ref, PLAIN, st.none() | st.lists(st.tuples(PLAIN, PLAIN)).map(tuple)),
        st.builds(State, PLAIN, PLAIN),
    ),
    st.builds(FileStamp, PLAIN, PLAIN, st.booleans(), every=st.floats(allow_nan=False)),
    st.builds(CallStamp, PLAIN, PLAIN),
)
BUFFERS = st.builds(Buffer, st.integers(0, 2**40), st.binary(min_size=32, max_size=32))
HEADERS = st.builds(
    Header,
    *[PLAIN] * 8,
    TIMES,
    st.lists(STAMPS, max_size=4).map(tuple),
    st.lists(BUFFERS, max_size=3).map(tuple),
    st.integers(0, 2**32 - 1),
)


@given(HEADERS, st.binary(max_size=300))
@settings(max_examples=100, deadline=None)
def test_what_is_packed_is_unpacked(made: Header, stream: bytes) -> None:
    """Header, stamps, buffers and stream come back as they were, whatever they hold."""
    entry = seal.unpack(seal.pack(made, stream, SECRET), [SECRET], made.namespace, made.key)
    assert entry.header == made
    assert bytes(entry.stream) == stream
    assert entry.refs == tuple(s.ref for s in made.stamps if isinstance(s, Generation))


PLAIN_STAMPS = st.lists(STAMPS.filter(lambda stamp: isinstance(stamp, Generation)), max_size=4)


@given(HEADERS, PLAIN_STAMPS, st.binary(max_size=300))
@settings(max_examples=100, deadline=None)
def test_a_glance_sees_what_is_unpacked(made: Header, marks: list[Any], stream: bytes) -> None:
    """`unpack_hit` gives what `unpack` gives for a plain record, and None for any other."""
    for one in (made, made._replace(stamps=tuple(marks), buffers=())):
        record = seal.pack(one, stream, SECRET)
        seen = seal.unpack_hit(record, [SECRET], one.namespace, one.key)
        entry = seal.unpack(record, [SECRET], one.namespace, one.key)
        assert (seen is not None) == (entry.plain and one.key.isascii())  # as all of ours are
        if seen is not None:
            assert (seen.times, seen.stamps) == (entry.times, entry.stamps)
            assert (bytes(seen.stream), seen.size) == (bytes(entry.stream), entry.size)
        assert seal.unpack_hit(record, [SECRET], one.namespace, one.key + "x") is None
        assert seal.unpack_hit(record, [SECRET], one.namespace + "x", one.key) is None


def test_a_field_that_is_too_long_is_refused_when_packing() -> None:
    """A field that its length field cannot hold is an `EntryError`, not a torn record."""
    with pytest.raises(EntryError, match="65,535"):
        seal.pack(header(address="x" * 65_536), STREAM, SECRET)


@pytest.mark.parametrize("mask", [1, 0x80, 0xFF])
def test_every_byte_counts(mask: int) -> None:
    """A record with any one byte turned over is refused."""
    for at in range(len(RECORD)):
        changed = RECORD[:at] + bytes([RECORD[at] ^ mask]) + RECORD[at + 1 :]
        assert refused(changed) == (UNREADABLE if at < 8 else UNAUTHENTIC), at


def test_every_length_but_its_own_is_refused() -> None:
    """A record that was cut, or to which something was added, is refused."""
    for length in range(len(RECORD)):
        assert refused(RECORD[:length]) in (UNREADABLE, UNAUTHENTIC)
    for more in (b"\0", b"\n", RECORD, STREAM):
        assert refused(RECORD + more) == UNAUTHENTIC


def mutant(chance: random.Random, record: bytes) -> bytes:
    """A record with bytes changed, cut out, put in, repeated or taken from elsewhere in it."""
    made = bytearray(record)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(made) + 1)
        to = min(len(made), at + chance.choice((1, 2, 4, 8, 32, 200)))
        match chance.randrange(6):
            case 0:
                made[at:to] = chance.randbytes(to - at)
            case 1:
                del made[at:to]
            case 2:
                made[at:at] = chance.randbytes(chance.choice((1, 2, 4, 48)))
            case 3:
                made[at:at] = made[at:to]
            case 4:
                made[at:to] = chance.choice((b"\0", b"\xff", b"\x7f", b"[", b'"')) * (to - at)
            case 5 if at + 4 <= len(made):
                number = chance.choice((0, 1, 2**31, 2**32 - 1, len(made), chance.randrange(4096)))
                made[at : at + 4] = struct.pack(">I", number)
    return bytes(made)


def test_mutated_records_are_refused() -> None:
    """Any change of a record is refused with an `EntryError` and nothing else."""
    chance = random.Random(7)
    for _ in range(MUTANTS):
        changed = mutant(chance, RECORD)
        if changed == RECORD:
            continue
        with pytest.raises(EntryError):
            opened(changed)


def test_the_parser_survives_what_is_sealed() -> None:
    """Even a malformed record that our own secret sealed is an entry or an `EntryError`."""
    chance = random.Random(11)
    parsed = 0
    for _ in range(MUTANTS):
        changed = sealed(RECORD[:48] + mutant(chance, RECORD[48:]))
        try:
            opened(changed)
        except EntryError:
            continue
        parsed += 1
    assert parsed > 0, "the mutants never came as far as an entry"


PLAIN = header(
    stamps=(
        Generation(Ref("f:shop:load", (("region", "00" * 8),)), State("t" * 22, "l" * 22)),
        Generation(Ref("f:shop:now"), State("u" * 22, "")),
        Generation(Ref("n", None), State("t" * 22, "")),
    ),
    buffers=(),
)
"""The parts that `unpack_hit` reads."""


def told_by(entry: Entry) -> tuple[Any, ...]:
    packed_generations = [
        (*stamp_blocks.ref_of(claim), claim[3]) for claim in entry.packed_generations
    ]
    return entry.times, packed_generations, bytes(entry.stream), entry.record, entry.size


def glanced(record: bytes) -> Entry | None:
    return seal.unpack_hit(record, [SECRET], "memo", PLAIN.key)


def test_a_glance_tells_what_unpacking_tells() -> None:
    """The short way to an entry gives the same as the long one, with all its stamps."""
    record = seal.pack(PLAIN, STREAM, SECRET)
    entry = glanced(record)
    assert entry is not None
    assert entry.plain
    assert told_by(entry) == told_by(opened(record))
    assert entry.header == opened(record).header
    assert entry.refs == tuple(stamp.ref for stamp in PLAIN.stamps if isinstance(stamp, Generation))
    assert list(map(stamp_blocks.ref_of, entry.packed_generations)) == list(entry.refs)
    assert [text for _, _, _, text, _ in entry.packed_generations] == [
        s.state.text for s in entry.generations
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"buffers": (Buffer(70_000, b"d" * 32),)},
        {"flags": seal.COMPRESSED},
        {"stamps": (FileStamp("/data/x.csv", "12 34 56"),)},
        {"stamps": (*PLAIN.stamps, CallStamp("shop:load#0", "ff" * 20))},
        {"key": "cd" * 20},
        {"namespace": "other"},
        {"namespace": "mem", "key": "o" + PLAIN.key},
    ],
    ids=["payload", "flags", "file", "call", "key", "namespace", "shifted"],
)
def test_a_glance_leaves_the_rest_to_unpacking(changes: dict[str, Any]) -> None:
    """`unpack_hit` gives None for a record that it cannot judge or that `unpack` refuses."""
    assert glanced(seal.pack(PLAIN._replace(**changes), STREAM, SECRET)) is None


def test_no_mutant_passes_at_a_glance() -> None:
    """After any change of a record `unpack_hit` refuses it; sealed again, it reads the same."""
    chance = random.Random(13)
    record = seal.pack(PLAIN, STREAM, SECRET)
    agreed = 0
    for _ in range(MUTANTS):
        changed = mutant(chance, record)
        with suppress(EntryError):
            assert changed == record or glanced(changed) is None
        changed = sealed(record[:48] + changed[48:])
        with suppress(EntryError):
            entry = glanced(changed)
            if entry is not None:
                assert told_by(entry) == told_by(opened(changed))
                agreed += 1
    assert agreed > 0


def test_a_seal_is_compared_again_for_other_bytes() -> None:
    """Only the very bytes that were checked under a name are taken without comparing the seal."""
    checked = seal.CheckedRecords([SECRET], "memo")
    record = seal.pack(PLAIN, STREAM, SECRET)
    with calls_of(seal.check_seal) as compared:
        for _ in range(3):
            assert checked.unpack_hit("name", bytes(bytearray(record)), PLAIN.key) is not None
        assert len(compared) == 2, "kept from the second time on"
        for at in range(16, len(record)):
            changed = record[:at] + bytes([record[at] ^ 1]) + record[at + 1 :]
            with pytest.raises(EntryError):
                checked.unpack_hit("name", changed, PLAIN.key)
        assert checked.unpack_hit("other", record, PLAIN.key) is not None
    assert len(compared) == 3 + len(record) - 16


def test_what_was_glanced_at_is_bounded() -> None:
    """Entries that are kept from one hit to the next take no more than their budget."""
    checked = seal.CheckedRecords([SECRET], "memo")
    for number in range(2000):
        key = f"{number:040x}"
        record = seal.pack(PLAIN._replace(key=key), b"x" * 1000, SECRET)
        assert checked.unpack_hit(key, record, key) is not None
        assert key not in checked.known
        assert checked.unpack_hit(key, record, key) is not None
        kept = sum(
            len(entry.record) + seal.CHECKED_OVERHEAD_BYTES for entry in checked.known.values()
        )
        assert kept == checked.held_bytes <= seal.MAX_CHECKED_BYTES
        assert key in checked.known or kept > seal.MAX_CHECKED_BYTES - 2 * (
            len(record) + seal.CHECKED_OVERHEAD_BYTES
        )
    assert f"{0:040x}" in checked.known, "not pushed out by what came later"
    for number in range(seal.MAX_SEEN_ONCE_NAMES):
        key = f"{number:038x}-0"
        checked.unpack_hit(key, seal.pack(PLAIN._replace(key=key), b"", SECRET), key)
    assert not checked.known, "until so much was met that it is old"
    assert len(checked.once) <= seal.MAX_SEEN_ONCE_NAMES


def test_a_record_that_changes_takes_the_place_of_the_one_before() -> None:
    """Of entries that were stored anew, the latest is kept, and its bytes are counted."""
    checked = seal.CheckedRecords([SECRET], "memo")
    for size in (10, 1000, 0, 500):
        record = seal.pack(PLAIN, b"x" * size, SECRET)
        for _ in range(2):
            assert checked.unpack_hit("name", record, PLAIN.key) is not None
    assert checked.known["name"].record == record
    assert checked.held_bytes == len(record) + seal.CHECKED_OVERHEAD_BYTES


@given(st.binary(max_size=400))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_refused(text: bytes) -> None:
    """Bytes without a seal are refused, with and without the look of a record."""
    refused(text)
    refused(RECORD[:16] + text)
    refused(RECORD[:48] + text)


@given(st.recursive(st.none() | st.integers() | st.text(max_size=3), st.lists, max_leaves=12))
@settings(max_examples=300, deadline=None)
def test_any_stamps_are_read_or_refused(stamps: Any) -> None:
    """Stamps that are JSON, but of another shape, are an `EntryError`, never anything else."""
    text = json.dumps(stamps).encode()
    made = RECORD[:48]
    places = struct.unpack_from(">III", RECORD, 48)
    middle = RECORD[60 : places[1]]
    ends = struct.pack(">III", places[1] + len(text), places[1], len(text))
    with suppress(EntryError):
        opened(sealed(made + ends + middle + text + RECORD[places[0] :]))


# --- seals and their purpose ----------------------------------------------------------------------


def test_an_entry_belongs_to_its_key_and_namespace() -> None:
    """An authentic entry that was moved to another key or namespace is refused."""
    assert opened(RECORD).header.key == "ab" * 20
    for namespace, key in (("memo", "ba" * 20), ("other", "ab" * 20), ("", ""), ("memo", "")):
        with pytest.raises(EntryError, match="another key") as caught:
            seal.unpack(RECORD, [SECRET], namespace, key)
        assert caught.value.reason == UNAUTHENTIC


def test_an_unknown_secret_is_refused() -> None:
    """An entry sealed with another secret is refused, also under our secret's id."""
    theirs = seal.pack(header(), pickle.dumps(Canary()), OTHER)
    assert refused(theirs) == UNAUTHENTIC
    assert refused(theirs[:8] + SECRET.id + theirs[16:]) == UNAUTHENTIC


def test_rotation() -> None:
    """Any secret of the list opens, none that was taken from it."""
    old = seal.pack(header(), STREAM, OTHER)
    assert bytes(opened(old, SECRET, OTHER).stream) == STREAM
    assert bytes(opened(RECORD, OTHER, SECRET).stream) == STREAM
    assert refused(old, SECRET) == UNAUTHENTIC


def test_the_entry_does_not_choose_the_algorithm() -> None:
    """Flags, codec and format of an entry cannot weaken its seal, or any other."""
    import hashlib

    body = RECORD[48:]
    weak = [
        bytes(32),
        hashlib.blake2b(RECORD[:16] + body, digest_size=32).digest(),
        hashlib.sha256(RECORD[:16] + body).digest(),
        hashlib.md5(body, usedforsecurity=False).digest() * 2,
    ]
    for forged in weak:
        assert refused(RECORD[:16] + forged + body) == UNAUTHENTIC
    for magic in (b"\x89memo\r\n\x00", b"\x89memo\r\n\x02", b"none:\0\0\0"):
        assert refused(magic + RECORD[8:]) == UNREADABLE
    for flags in (0, 1, 2**32 - 1):
        made = seal.pack(header(flags=flags, codec="none"), STREAM, SECRET)
        assert refused(made[:16] + bytes(32) + made[48:]) == UNAUTHENTIC


def test_a_secret_does_not_show() -> None:
    """Neither repr nor pickle of a secret has its bytes, and its id does not contain them."""
    assert repr(SECRET) == f"<Secret {SECRET.id.hex()}>"
    assert b"ss" not in SECRET.id
    with pytest.raises(TypeError, match="never pickled"):
        pickle.dumps(SECRET)


# --- the whole way: what lies in Redis and on the disk -------------------------------------------


def canary_record(secret: Secret, name: str, text: str, function: str) -> bytes:
    """The record that an attacker who knows everything but the secret would store."""
    made = header(namespace=name, key=text, function=function, buffers=(), stamps=())
    return seal.pack(made, pickle.dumps(Canary()), secret)


def with_redis(server: RedisServer, **more: Any) -> Any:
    return configure(**{"redis_url": server.url, "tiers": ["redis"], "deadline": 5.0, **more})


def make(name: str = "seal:load", **options: Any) -> tuple[Callable[[int], Any], list[int]]:
    ran: list[int] = []

    @cache(name=name, version="1", **{"ttl": None, **options})
    def load(x: int) -> int:
        ran.append(x)
        return x + 100

    return load, ran


def stored_name(load: Any, x: int) -> str:
    return default_chain().name(load.function_id, load.key(x))


def redis_name(load: Any, x: int) -> str:
    return stored_name(load, x).replace("memo:", "memo:2:", 1)


def test_a_forged_record_in_redis_is_computed_anew(redis_server: RedisServer) -> None:
    """Records of others at our names are never believed or unpickled; ours replace them."""
    client = redis_server.client()
    with with_redis(redis_server):
        load, ran = make()
        assert load(1) == 101
        name = redis_name(load, 1)
        whole = client.get(name)
        forged = [
            canary_record(OTHER, "memo", load.key(1), load.function_id),
            whole[:48] + canary_record(OTHER, "memo", load.key(1), load.function_id)[48:],
            whole[:-1] + b"X",
            pickle.dumps(Canary()),
            b"",
        ]
        for times, record in enumerate(forged, 2):
            client.set(name, record)
            assert load(1) == 101
            assert len(ran) == times, "a forged record was believed"
        assert load(1) == 101
        assert len(ran) == len(forged) + 1, "what was computed was not stored over it"


def test_an_entry_moved_in_redis_is_refused(redis_server: RedisServer) -> None:
    """An authentic entry under the name of another call or function answers no other call."""
    client = redis_server.client()
    with with_redis(redis_server):
        load, ran = make()
        twin, twins = make("seal:twin")
        assert (load(1), load(2), twin(1)) == (101, 102, 101)
        first = client.get(redis_name(load, 1))
        client.set(redis_name(load, 2), first)
        client.set(redis_name(twin, 1), first)
        assert (load(2), twin(1)) == (102, 101)
        assert (ran, twins) == ([1, 2, 2], [1, 1])


def test_two_secrets_on_one_redis_keep_out_of_each_others_way(redis_server: RedisServer) -> None:
    """Processes with two secrets do not see or evict each other's entries; both keep hitting."""
    load, ran = make()
    for secret in (MINE, THEIRS, MINE, THEIRS, MINE):
        with with_redis(redis_server, secret=secret):
            assert load(1) == 101
    assert len(ran) == 2


def test_secrets_are_rotated_by_a_list(redis_server: RedisServer) -> None:
    """With the old secret second in the list its entries still answer; without it they do not."""
    load, ran = make()
    with with_redis(redis_server, secret=MINE):
        load(1)
    with with_redis(redis_server, secret=[THEIRS, MINE]):
        assert load(1) == 101
        load(2)
    assert ran == [1, 2]
    with with_redis(redis_server, secret=THEIRS):
        load(2)
        assert ran == [1, 2], "what was stored after the rotation has the new secret"
        load(1)
    assert ran == [1, 2, 1]


@pytest.mark.parametrize("tiers", [["redis"], ["disk"], ["memory", "disk"]])
def test_expiry_is_enforced_from_the_header(
    redis_server: RedisServer, tiers: list[str], cache_home: Path
) -> None:
    """An entry whose expiry was taken away where it lies is past its ttl all the same (I9)."""
    clock = ManualClock()
    with with_redis(redis_server, tiers=tiers):
        load, ran = make(ttl=10)
        set_clock(clock)
        load(1)
        if tiers == ["redis"]:
            assert redis_server.client().persist(redis_name(load, 1))
        else:
            with sqlite3.connect(cache_home / FOLDER / "entries" / "cache.db") as index:
                assert index.execute("UPDATE Cache SET expire_time = NULL").rowcount == 1
            index.close()
        clock.advance(9)
        load(1)
        assert ran == [1]
        clock.advance(2)
        load(1)
        assert ran == [1, 1]


def test_forged_payload_bytes_in_redis_are_never_believed(redis_server: RedisServer) -> None:
    """A payload from Redis is hashed each time, before anything is built on it."""
    client = redis_server.client()
    with with_redis(redis_server):
        ran: list[int] = []

        @cache(name="seal:frame", version="1", ttl=None)
        def frame(x: int) -> Any:
            ran.append(x)
            return np.arange(50_000, dtype=np.int64) + x

        expected = frame(1)
        [name] = client.keys("memo:2:p:*")
        good = client.get(name)
        assert np.array_equal(frame(1), expected)
        assert ran == [1]
        for at in (0, len(good) // 2, 50_000 * 8 - 1):
            forged = bytearray(good)
            forged[at] ^= 1
            client.set(name, bytes(forged))
            assert np.array_equal(frame(1), expected)
        for forged in (good[:-64], good + bytes(64), b""):
            client.set(name, forged)
            assert np.array_equal(frame(1), expected)
        assert len(ran) == 7
        assert np.array_equal(frame(1), expected)
        assert len(ran) == 7, "the payload was not replaced"


def test_a_payload_of_another_entry_is_not_taken(redis_server: RedisServer) -> None:
    """Authentic bytes of another payload, of the same size, are not what the record names."""
    client = redis_server.client()
    with with_redis(redis_server):

        @cache(name="seal:frames", version="1", ttl=None)
        def frame(x: int) -> Any:
            return np.full(50_000, x)

        frame(1)
        [first] = client.keys("memo:2:p:*")
        frame(2)
        [second] = set(client.keys("memo:2:p:*")) - {first}
        client.set(second, client.get(first))
        assert frame(2)[0] == 2


@pytest.mark.parametrize("damage", ["flip", "zero", "other"])
def test_damaged_payload_files_are_never_believed(cache_home: Path, damage: str) -> None:
    """A payload file that was changed behind our back, with its times put back, is a miss."""
    ran: list[int] = []

    def made() -> Callable[[int], Any]:
        @cache(name="seal:file", version="1", ttl=None)
        def frame(x: int) -> Any:
            ran.append(x)
            return np.arange(300_000, dtype=np.int64) + x

        return frame

    with configure(tiers=["disk"]):
        frame = made()
        assert frame(1)[-1] == 300_000
        found = [p for p in (cache_home / FOLDER / "payloads").rglob("*") if p.is_file()]
        [path] = {p.stat().st_ino: p for p in found if p.suffix != ".seal"}.values()
        facts = path.stat()
        data = bytearray(path.read_bytes())
        if damage == "flip":
            data[1_000_000] ^= 4
        else:
            data[:] = bytes(len(data)) if damage == "zero" else data[::-1]
        path.write_bytes(data)
        os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
        memo.testing.reset()
        with configure(tiers=["disk"]):
            again = frame(1)
        assert np.array_equal(again, np.arange(300_000, dtype=np.int64) + 1)
        assert ran == [1, 1]


def test_a_voucher_is_not_forged(cache_home: Path) -> None:
    """A voucher written without the secret vouches for nothing."""
    from memo.stores.disk import payload_files

    ran: list[int] = []

    @cache(name="seal:vouched", version="1", ttl=None)
    def frame() -> Any:
        ran.append(1)
        return np.arange(payload_files.VOUCHER_FROM_BYTES // 8 + 1, dtype=np.int64)

    with configure(tiers=["disk"]):
        whole = frame()
        [voucher] = (cache_home / FOLDER / "payloads").rglob("*.seal")
        assert voucher.stat().st_mode & 0o777 == 0o600
        [path] = [p for p in voucher.parent.iterdir() if p.name == voucher.stem]
        with path.open("r+b") as file:
            file.seek(4096)
            file.write(b"\xff")
        source = payload_files.PayloadFile(str(path), [OTHER])
        source.open(path.stat().st_size)
        digest = bytes.fromhex(path.name)
        voucher.write_bytes(payload_files.voucher_text(OTHER, digest, source.identity))  # type: ignore[arg-type]
        memo.testing.reset()
        with configure(tiers=["disk"]):
            assert np.array_equal(frame(), whole)
    assert len(ran) == 2


def test_a_forged_row_of_the_index_is_never_unpickled(cache_home: Path) -> None:
    """Content under our names in the index is never unpickled unless it is authentic."""
    with configure(tiers=["disk"]):
        load, ran = make()
        load(1)
        name, text = stored_name(load, 1), load.key(1)
        forged = [
            (canary_record(OTHER, "memo", text, load.function_id), 1),
            (pickle.dumps(Canary()), 1),
            (pickle.dumps(Canary()), 4),  # diskcache's mode of a pickle
        ]
        for times, (value, mode) in enumerate(forged, 2):
            with sqlite3.connect(cache_home / FOLDER / "entries" / "cache.db") as index:
                index.execute(
                    "UPDATE Cache SET value = ?, mode = ? WHERE key = ?", (value, mode, name)
                )
            index.close()
            assert load(1) == 101
            assert len(ran) == times


def test_a_forged_record_is_told() -> None:
    """A record that is not authentic is an event, so that it can be looked into."""
    with configure(tiers=["memory", "disk"]):
        load, _ = make()
        load(1)
        chain = default_chain()
        front: Any = chain.tiers[0]
        name = stored_name(load, 1)
        from memo.runtime.blocking import BLOCKING, drive

        forged = canary_record(OTHER, "memo", load.key(1), load.function_id)
        for tier in chain.tiers:
            drive(tier.store(BLOCKING, name, forged, None, None))
        assert front.peek(name) is None
        with recording() as heard:
            assert load(1) == 101
    assert [e.reason for e in heard if e.kind == "error"] == [UNAUTHENTIC] * 2
    assert [e.reason for e in heard if e.kind == "miss"] == [UNAUTHENTIC]


def test_streams_are_loaded_only_after_the_seal() -> None:
    """Nothing is hashed as text, inflated, allocated or parsed before the seal was compared."""
    with calls_of(seal.check_seal, seal.parse) as calls:
        opened(RECORD)
        refused(RECORD[:-1])
    assert calls == ["check_seal", "parse", "check_seal"]


def test_lengths_of_others_allocate_nothing() -> None:
    """A record that claims to be enormous is refused before anything of that size is made."""
    import tracemalloc

    huge = RECORD[:48] + b"\xff" * 12 + RECORD[60:]
    tracemalloc.start()
    try:
        refused(huge)
        refused(sealed(huge))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000


def test_a_value_survives_the_codec() -> None:
    """A stream and its table are enough to make the value again."""
    value = {"x": np.arange(20_000), "y": "text"}
    encoded = codec.encode(value)
    assert encoded.payload is not None
    back = codec.decode(
        encoded.stream,
        memoryview(bytearray(codec.aligned_bytes(encoded.payload))),
        encoded.payload.table,
    )
    assert np.array_equal(back["x"], value["x"])
    assert back["y"] == "text"
