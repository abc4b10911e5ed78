"""Lookups that happen at the same time share round trips, and nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import redis
from chaos import Proxy, Scripted
from inside import inside
from ports import blocking, looping
from redis.credentials import StreamingCredentialProvider
from redis_records import A, B, record
from redis_server import RedisServer
from waiting import STUCK, until, wait_for

import memo

# its first import takes a while, in which lookups are not gathered
import memo.stores.redis.transport.loop_connections
from memo.coordination.flights import FLIGHTS
from memo.errors import TierError
from memo.records.stamp_types import LOST, Generation, Ref
from memo.runtime.blocking import BLOCKING, drive
from memo.runtime.port import Port
from memo.settings.redis_urls import parse
from memo.stores.protocols import PendingLookup
from memo.stores.redis.client import Client
from memo.stores.redis.lookups import Group
from memo.stores.redis.redis_tier import Redis
from memo.stores.redis.transport import exchange
from memo.stores.redis.transport.coalescing import COMMANDS_PER_BATCH, Batch, Failure
from memo.stores.redis.transport.faults import CONNECTION_CLOSED, GARBLED
from memo.stores.redis.transport.loop_connections import LoopConnections
from memo.stores.redis.transport.nodes import MAX_CONNECTIONS
from memo.stores.redis.transport.resp import command_bytes, pack
from memo.stores.redis.transport.thread_connections import REUSE_SECONDS
from memo.validity import stamps
from memo.validity.stamps import ALL, LAST, SHAPES, Turn

MANY = 1000
PATIENT = 5.0
REFS = [Ref("n"), Ref("f:m:f", (("a", A), ("b", B))), Ref("p:m", (("@", A),))]


@pytest.fixture
def tier(redis_server: RedisServer) -> Iterator[Redis]:
    tier = Redis(redis_server.url, deadline=PATIENT)
    yield tier
    tier.close()


@pytest.fixture
def proxy(redis_server: RedisServer) -> Iterator[Proxy]:
    with Proxy(redis_server.port) as proxy:
        yield proxy


class Token:
    """A token as redis-py's credential providers hand them on."""

    def __init__(self, user: str, value: str) -> None:
        self.user = user
        self.value = value

    def try_get(self, key: str) -> str:
        return self.user

    def get_value(self) -> str:
        return self.value


def name(number: int) -> str:
    return f"memo:{{m:f}}:secret:{number}"


def fill(tier: Redis, count: int, sizes: Callable[[], int] = lambda: 10) -> dict[str, bytes]:
    """Store records, and let the tier know what they name; name -> record."""
    begun = blocking(lambda port: tier.stamp_states(port, REFS))
    marks = [Generation(ref, state) for ref, state in zip(REFS, begun, strict=True)]
    stored = {}
    for number in range(count):
        stored[name(number)] = record(*marks, stream=b"%d:" % number + bytes(sizes()))
        blocking(lambda port, n=number: tier.store(port, name(n), stored[name(n)], None, None))
    blocking(lambda port: taught(tier, port))
    return stored


async def taught(tier: Redis, port: Port) -> None:
    for _ in range(2):
        found = await tier.lookup(port, name(0))
        assert found is not None
        assert found.states_of is not None
        read = found.states_of(REFS)
    assert read is not None


async def gathered(tier: Redis, port: Port, numbers: Sequence[int]) -> list[Any]:
    return await asyncio.gather(
        *(tier.lookup(port, name(n)) for n in numbers), return_exceptions=True
    )


# --- few round trips -----------------------------------------------------------------------------


def test_gathered_look_ups_share_packets(redis_server: RedisServer, proxy: Proxy) -> None:
    """1,000 lookups at once take a fortieth of the packets, on one connection."""
    tier = Redis(proxy.url, deadline=PATIENT)
    stored = fill(tier, MANY)
    redis_server.client().config_resetstat()
    before = proxy.packets, proxy.accepted

    async def work(port: Port) -> None:
        found = await gathered(tier, port, range(MANY))
        assert [one.record for one in found] == list(stored.values())

    looping(work)
    assert proxy.packets - before[0] <= MANY / 40
    assert proxy.accepted - before[1] == 1
    counts = redis_server.commands()
    assert counts["get"] == MANY
    assert counts["echo"] <= MANY / COMMANDS_PER_BATCH * 1.5 + 2
    assert counts["hmget"] <= (counts["echo"] + 2) * len(REFS)
    assert counts.get("evalsha", 0) <= 1, "only the one who opens the connection"
    tier.close()


def test_hits_share_packets(redis_server: RedisServer, proxy: Proxy) -> None:
    """So do 1,000 hits of a cached function in one `asyncio.gather`, which computes nothing."""
    ran = []

    @memo.cache(ttl=None)
    async def load(number: int) -> int:
        ran.append(number)
        return number

    async def all_of_them() -> list[int]:
        return list(await asyncio.gather(*map(load, range(MANY))))

    async def main() -> int:
        await all_of_them()
        await load(0)
        before = proxy.packets
        assert await all_of_them() == list(range(MANY))
        return proxy.packets - before

    with memo.configure(redis_url=proxy.url, tiers=["redis"], deadline=PATIENT):
        packets = asyncio.run(main())
    assert len(ran) == MANY
    assert packets <= MANY / 40


def test_hits_in_memory_share_packets(redis_server: RedisServer, proxy: Proxy) -> None:
    """Hits in memory, whose stamps lie in Redis, ask for each group once in each packet."""

    @memo.cache(ttl=None)
    async def load(number: int) -> int:
        return number

    async def main() -> int:
        await asyncio.gather(*map(load, range(MANY)))
        before = proxy.packets
        redis_server.client().config_resetstat()
        assert list(await asyncio.gather(*map(load, range(MANY)))) == list(range(MANY))
        return proxy.packets - before

    with memo.configure(redis_url=proxy.url, tiers=["memory", "redis"], deadline=PATIENT):
        packets = asyncio.run(main())
    assert packets <= 20
    assert redis_server.commands()["hmget"] <= 20 * 3
    assert "get" not in redis_server.commands()


def test_what_many_ask_is_asked_once(tier: Redis, redis_server: RedisServer) -> None:
    """The same lookup by many at once is one command."""
    fill(tier, 1)
    redis_server.client().config_resetstat()

    async def work(port: Port) -> None:
        assert len({one.record for one in await gathered(tier, port, [0] * 500)}) == 1

    looping(work)
    assert redis_server.commands()["get"] <= 3


def test_a_lone_caller_waits_for_nobody(proxy: Proxy) -> None:
    """A lookup that finds nothing under way is sent before the loop comes round."""
    tier = Redis(proxy.url, deadline=PATIENT)
    fill(tier, 1)

    async def work(port: Port) -> None:
        await tier.lookup(port, name(0))
        before = proxy.packets
        assert tier.start_lookup(port, name(0)) is not None
        assert wait_for(lambda: proxy.packets > before)  # while the loop is held up
        await tier.lookup(port, name(0))

    looping(work)
    tier.close()


def test_who_look_again_together_do_so_once(redis_server: RedisServer) -> None:
    """Two whose lookups a flight has overtaken do not take each other's for another such."""

    @memo.cache(ttl=None)
    async def load(number: int) -> int:
        return number

    async def main() -> list[int]:
        await load(0)
        key, chain = load.key(1), inside(load).chain()
        name = chain.name(load.function_id, key)
        calls = [asyncio.create_task(load(1)) for _ in range(2)]
        await asyncio.sleep(0)  # both have asked, and nothing has come yet
        FLIGHTS.finish(FLIGHTS.join(name, ())[0], None)
        return list(await asyncio.wait_for(asyncio.gather(*calls), PATIENT))

    with memo.configure(redis_url=redis_server.url, tiers=["redis"], deadline=PATIENT):
        assert asyncio.run(main()) == [1, 1]


# --- whose answer it is --------------------------------------------------------------------------


def test_everybody_gets_his_own(tier: Redis, redis_server: RedisServer) -> None:
    """In random batches, of records of any size, present, absent or foreign, each gets its own."""
    chance = random.Random(7)
    stored = fill(tier, 60, lambda: chance.choice((0, 100, 5_000, 200_000)))
    redis_server.client().lpush(name(70).replace("memo:", "memo:2:"), "a list")

    async def one(port: Port, number: int) -> None:
        if number == 70:
            with pytest.raises(TierError, match="WRONGTYPE"):
                await tier.lookup(port, name(number))
            return
        found = await tier.lookup(port, name(number))
        assert (None if found is None else found.record) == stored.get(name(number))

    async def work(port: Port) -> None:
        for _ in range(40):
            wanted = [chance.randrange(75) for _ in range(chance.randrange(1, 200))]
            begun = [asyncio.create_task(one(port, number)) for number in wanted]
            await asyncio.sleep(0)
            begun += [asyncio.create_task(one(port, number)) for number in wanted[:10]]
            await asyncio.gather(*begun)

    looping(work)
    assert not tier.client.breaker.open


def test_everybody_gets_his_own_among_threads(tier: Redis) -> None:
    """So it is when threads ask at once."""
    stored = fill(tier, 60, lambda: random.choice((0, 100, 5_000, 100_000)))
    wrong: list[Any] = []

    def ask(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(60):
            number = chance.randrange(75)
            found = drive(tier.lookup(BLOCKING, name(number)))
            if (None if found is None else found.record) != stored.get(name(number)):
                wrong.append(number)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not wrong
    assert tier.outages == 0


@pytest.mark.parametrize("together", [1, 30])
def test_invalidation_is_seen_by_the_next_batch(tier: Redis, together: int) -> None:
    """A group turned, whole or in part, before a lookup began reads otherwise in it (I1)."""
    fill(tier, together)
    turns = (Turn("n"), Turn("f:m:f", (("a", A),)), Turn("p:m", (("@", A),)), Turn("f:m:f"))

    async def work(port: Port) -> None:
        for turn in turns:
            before = await tier.stamp_states(port, REFS)
            await tier.turn(port, [turn], "{}")
            now = await tier.states(port, REFS)
            assert now != before
            for found in await gathered(tier, port, range(together)):
                read = found.states_of(REFS)
                assert read is None or list(read) == now

    looping(work)


def test_a_hit_without_a_coroutine_is_judged_as_any(redis_server: RedisServer) -> None:
    """The short way takes nothing invalidated, older than an answer, or behind a replay."""
    ran: list[int] = []

    @memo.cache(ttl=None)
    def load(number: int) -> int:
        ran.append(number)
        return len(ran)

    with memo.configure(redis_url=redis_server.url, tiers=["redis"], deadline=PATIENT):
        assert [load(1) for _ in range(4)] == [1] * 4
        load.invalidate()
        assert [load(1) for _ in range(4)] == [2] * 4
        key, chain = load.key(1), inside(load).chain()
        asked = chain.at_hand(lambda: BLOCKING, load.function_id, key)
        assert isinstance(asked, PendingLookup)
        assert chain.finish_lookup(asked, key) is not None
        chain.latest_answers.record(key, time.time_ns() + 10**12)
        assert load(1) == 3
        assert chain.host is not None
        assert chain.at_hand(lambda: BLOCKING, load.function_id, key) is not None
        journal = chain.host.journal
        journal.mark_failed(journal.add([Turn("t:x")], '{"to": ["redis elsewhere"]}'))
        assert chain.at_hand(lambda: BLOCKING, load.function_id, key) is not None
        journal.mark_failed(journal.add([Turn("t:x")], '{"to": ["*"]}'))
        assert chain.at_hand(lambda: BLOCKING, load.function_id, key) is None
        assert load(1) == 3
        assert chain.at_hand(lambda: BLOCKING, load.function_id, key) is not None
        assert [note for _, _, note in journal.due_rows()] == ['{"to": ["redis elsewhere"]}']


def test_a_thread_believes_no_answer_to_another_question() -> None:
    """Replies with a wrong signature to a blocking call are a fault, and reach no caller."""
    with Scripted(b"$1\r\nx\r\n") as server:
        tier = Redis(server.url, deadline=PATIENT)
        with pytest.raises(TierError):
            blocking(lambda port: tier.lookup(port, name(0)))
        assert tier.client.breaker.fault is GARBLED
        tier.close()


# --- threads -------------------------------------------------------------------------------------


def test_a_crowd_of_threads_is_served(tier: Redis, redis_server: RedisServer) -> None:
    """Many more threads than `MAX_CONNECTIONS` all get their answers."""
    stored = fill(tier, 100)
    wrong: list[Any] = []

    def ask(number: int) -> None:
        for _ in range(5):
            found = blocking(lambda port: tier.lookup(port, name(number)))
            if found is None or found.record != stored[name(number)]:
                wrong.append(number)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENT)
    assert not wrong
    assert tier.outages == 0
    clients = redis_server.client().client_list()
    assert len(clients) <= MAX_CONNECTIONS + 1


def test_connections_of_threads_that_died_are_replaced(
    redis_server: RedisServer, proxy: Proxy
) -> None:
    """Several connections of threads that died while they were idle are no fault to any caller."""
    tier = Redis(proxy.url, deadline=STUCK)
    stored = fill(tier, 1)
    look = lambda: blocking(lambda port: tier.lookup(port, name(0)))

    def look_together(count: int) -> None:
        before = proxy.packets
        redis_server.freeze()
        threads = [threading.Thread(target=look) for _ in range(count)]
        for thread in threads:
            thread.start()
        until(lambda: proxy.packets == before + count)
        redis_server.thaw()
        for thread in threads:
            thread.join()
        until(lambda: "memo-connect" not in {one.name for one in threading.enumerate()})

    look_together(4)
    look_together(proxy.connected)  # each of the connections was used
    proxy.cut_all(reset=True)
    until(lambda: not proxy.connected)
    for _ in range(4):
        assert look().record == stored[name(0)]
    assert tier.outages == 0
    assert tier.client.interruptions > 0
    tier.close()


def test_closing_while_threads_ask_is_no_outage(tier: Redis, redis_server: RedisServer) -> None:
    """An exchange that is cut by closing the connections here is no fault, and none stays open."""
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            with contextlib.suppress(TierError):
                blocking(lambda port: tier.lookup(port, name(0)))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(500):
        tier.close()
        time.sleep(0)
    over.set()
    for thread in threads:
        thread.join(PATIENT)
    assert tier.outages == 0
    assert tier.client.breaker.fault is None
    tier.close()
    assert wait_for(lambda: len(redis_server.client().client_list()) == 1)


def test_a_new_login_reaches_connections_in_use(redis_server: RedisServer) -> None:
    """A connection that threads use without a pause is logged in again when the token changes."""

    class Tokens(StreamingCredentialProvider):
        told: Callable[[Any], None]

        def get_credentials(self) -> tuple[str, str]:
            return "default", "first"

        def on_next(self, callback: Callable[[Any], None]) -> None:
            self.told = callback

        def on_error(self, callback: Callable[[Exception], None]) -> None:
            pass

        def is_streaming(self) -> bool:
            return True

    redis_server.client().acl_setuser("default", enabled=True, nopass=True)
    tokens = Tokens()
    tier = Redis(redis_server.url, deadline=PATIENT, options={"credential_provider": tokens})
    look = lambda: blocking(lambda port: tier.lookup(port, name(0)))
    look()
    before = redis_server.commands()["auth"]
    tokens.told(Token("default", "second"))
    assert wait_for(lambda: look() or redis_server.commands()["auth"] > before, 3 * REUSE_SECONDS)
    tier.close()


# --- callers that leave, connections that break ---------------------------------------------------


def test_who_is_cancelled_takes_nobody_along(tier: Redis, redis_server: RedisServer) -> None:
    """Half of the callers of a batch are cancelled while it is under way; the others are served."""
    stored = fill(tier, 100)

    async def work(port: Port) -> None:
        await tier.lookup(port, name(0))
        redis_server.freeze()
        calls = [asyncio.create_task(tier.lookup(port, name(n))) for n in range(100)]
        for _ in range(3):
            await asyncio.sleep(0)
        for call in calls[::2]:
            call.cancel()
        redis_server.thaw()
        found = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(one, asyncio.CancelledError) for one in found[::2])
        assert [one.record for one in found[1::2]] == list(stored.values())[1::2]  # type: ignore[union-attr]
        assert (await tier.lookup(port, name(0))) is not None

    looping(work)
    assert tier.outages == 0


def test_who_opens_the_connection_may_be_cancelled(tier: Redis, redis_server: RedisServer) -> None:
    """The first caller of all is cancelled while it connects; those behind are served."""
    fill(tier, 10)

    async def work(port: Port) -> None:
        calls = [asyncio.create_task(tier.lookup(port, name(n))) for n in range(10)]
        for _ in range(2):
            await asyncio.sleep(0)
        calls[0].cancel()
        found = await asyncio.gather(*calls, return_exceptions=True)
        assert all(one.record for one in found[1:])  # type: ignore[union-attr]

    looping(work)
    assert tier.outages == 0


@pytest.mark.parametrize("at", [0, 1, 700, 5_000, 20_000])
def test_cut_in_the_midst_of_a_batch(proxy: Proxy, at: int) -> None:
    """A connection that is cut fails all that is on it as one fault; each caller falls through."""
    tier = Redis(proxy.url, deadline=PATIENT)
    stored = fill(tier, 100)
    proxy.cut_at = at

    async def work(port: Port) -> None:
        found = await gathered(tier, port, range(100))
        for number, one in enumerate(found):
            assert isinstance(one, TierError) or one.record == stored[name(number)]
        assert any(isinstance(one, TierError) for one in found)
        assert tier.outages <= 2
        assert tier.client.breaker.fault is CONNECTION_CLOSED
        proxy.cut_at = None
        tier.client.breaker.record_success()
        assert all(one.record for one in await gathered(tier, port, range(100)))

    looping(work)
    tier.close()


def test_a_lane_that_died_is_replaced(proxy: Proxy) -> None:
    """Commands sent on a connection that turns out to be dead are sent again, unnoticed."""
    tier = Redis(proxy.url, deadline=PATIENT)
    stored = fill(tier, 100)

    async def work(port: Port) -> None:
        for _ in range(3):
            found = await gathered(tier, port, range(100))
            assert [one.record for one in found] == list(stored.values())
            proxy.cut_all(reset=True)

    looping(work)
    assert tier.outages == 0
    tier.close()


@pytest.mark.parametrize("reset", [False, True])
def test_a_connection_closed_while_it_is_handed_over_is_told(proxy: Proxy, reset: bool) -> None:
    """A command sent over it fails, though its transport has ended before."""
    client = Client(proxy.url, PATIENT)

    async def work() -> None:
        loop = LoopConnections(parse(proxy.url), {}, client, lambda: None)
        connection = await loop.nodes.pool.get_connection()
        proxy.cut_all(reset=reset)
        with pytest.raises(redis.ConnectionError):
            await connection.read_response(disconnect_on_error=False)
        stream = exchange.Stream(connection)
        told = asyncio.get_running_loop().create_future()
        stream.send(exchange.Exchange((pack(b"PING"),), 1, PATIENT), told.set_result)
        async with asyncio.timeout(PATIENT):
            assert isinstance(await told, ConnectionError)
        await stream.detach().disconnect()

    asyncio.run(work())


def test_the_answer_to_another_question_is_nobodys() -> None:
    """Replies with a wrong signature reach no caller: one fault, however many waited."""
    with Scripted(b"$1\r\nx\r\n") as server:
        tier = Redis(server.url, deadline=PATIENT)

        async def work(port: Port) -> None:
            found = await gathered(tier, port, range(COMMANDS_PER_BATCH))
            assert all(isinstance(one, TierError) for one in found)

        looping(work)
        assert tier.client.breaker.fault is GARBLED
        assert tier.outages <= 2
        tier.close()


def test_a_redis_that_cannot_save_is_read(tier: Redis, redis_server: RedisServer) -> None:
    """It refuses writes, and `PING`; lookups go on."""
    stored, client = fill(tier, 10), redis_server.client()
    config = client.config_get()
    taken = Path(config["dir"], config["dbfilename"])
    taken.unlink(missing_ok=True)
    taken.mkdir()
    client.config_set("save", "3600 1")
    client.bgsave()
    assert wait_for(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err")
    with pytest.raises(redis.ResponseError, match="MISCONF"):
        client.ping()

    async def work(port: Port) -> None:
        found = await gathered(tier, port, range(10))
        assert [one.record for one in found] == list(stored.values())

    looping(work)
    assert blocking(lambda port: tier.lookup(port, name(0))).record == stored[name(0)]
    assert tier.outages == 0
    taken.rmdir()
    client.save()


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_a_big_answer_earns_its_time(asynchronous: bool, set_limits: Callable[..., None]) -> None:
    """A batch that brings much may take longer than the deadline, as the bytes come in."""
    set_limits(transfer_rate=1_000_000)  # so that a slow machine is fast enough
    size, deadline = 4_000_000, 0.1
    with Scripted(b"$%d\r\n%s\r\n" % (size, bytes(size)), echoes=True) as server:
        server.piece, server.pause = size, 3 * deadline
        tier = Redis(server.url, deadline=deadline)
        read = lambda port: tier.client.look_up(
            port, ((b"x", pack(b"GET", b"x")),), parse=lambda found: found[0]
        )
        assert len((looping if asynchronous else blocking)(read)) == size
        tier.close()


# --- groups that are read along -------------------------------------------------------------------


def test_states_are_those_of_the_stamps() -> None:
    """A group's plain fields give what `stamps.state_of` reads, or nothing."""
    chance = random.Random(3)
    for _ in range(500):
        fields = {key: chance.choice(("", "t" * 16, "u" * 20)) for key in (ALL, LAST)}
        fields[SHAPES] = chance.choice(("", "a", "a|a,b"))
        reply = [fields[key].encode() or None for key in (ALL, LAST, SHAPES)]
        for arguments in (None, (), (("a", A),)):
            ref = Ref("f:x", arguments)
            group = Group(b"key")
            for _ in range(2):
                state = group.state("f:x", arguments, reply)
                if fields[SHAPES] and arguments:
                    assert state is None
                else:
                    assert state == stamps.state_of(ref, {k: v for k, v in fields.items() if v})


@pytest.mark.parametrize("reply", [None, 5, b"text", [], [b"x"], [1, 2, 3], [None] * 3, [[]] * 3])
def test_no_reply_makes_reading_raise(reply: Any) -> None:
    """Any reply of a server in the place of a group's fields is a lost group."""
    assert [Group(b"key").state(ref.group, ref.arguments, reply) for ref in REFS] == [LOST] * 3


def test_groups_are_learned(tier: Redis, redis_server: RedisServer) -> None:
    """The first lookup reads the record, the next one the groups that it named as well."""
    begun = blocking(lambda port: tier.stamp_states(port, REFS))
    marks = [Generation(ref, state) for ref, state in zip(REFS, begun, strict=True)]
    for number, kept in enumerate((marks[:1], marks[:1], marks)):
        blocking(lambda port, n=number, k=kept: tier.store(port, name(n), record(*k), None, None))

    async def look(port: Port, number: int) -> Any:
        refs = REFS if number == 2 else REFS[:1]
        found = await tier.lookup(port, name(number))
        assert found is not None
        assert found.states_of is not None
        return found.states_of(refs)

    assert blocking(lambda port: look(port, 0)) is None
    assert blocking(lambda port: look(port, 1)) == (begun[0],)
    assert blocking(lambda port: look(port, 2)) is None
    assert blocking(lambda port: look(port, 2)) == tuple(begun)
    assert blocking(lambda port: look(port, 1)) == (begun[0],)


def test_what_covers_a_call_is_read_along(tier: Redis, redis_server: RedisServer) -> None:
    """Once a part was invalidated, the second lookup of an entry reads its fields at once."""
    fill(tier, 1)
    blocking(lambda port: tier.turn(port, [Turn("f:m:f", (("a", A),))], "{}"))

    async def look(port: Port) -> Any:
        found = await tier.lookup(port, name(0))
        assert found is not None
        return found.states_of(REFS)  # type: ignore[misc]

    assert blocking(look) is None
    now = blocking(lambda port: tier.states(port, REFS))
    redis_server.client().config_resetstat()
    assert list(blocking(look)) == now
    assert redis_server.commands()["echo"] == 1
    blocking(lambda port: tier.turn(port, [Turn("f:m:f", (("a", A), ("b", B)))], "{}"))
    assert blocking(look) is None
    after = blocking(lambda port: tier.states(port, REFS))
    assert after != now
    assert list(blocking(look)) == after


# --- batches -------------------------------------------------------------------------------------


def test_a_batch_sends_each_command_once() -> None:
    """Each caller gets the replies to its commands, in its order, whatever the others asked."""
    chance = random.Random(5)

    async def work() -> None:
        loop = asyncio.get_running_loop()
        for _ in range(200):
            batch, asked = Batch(), []
            for _ in range(chance.randrange(1, 20)):
                keys = [b"%d" % chance.randrange(9) for _ in range(3)]
                commands = [(key, pack(b"GET", key)) for key in keys]
                asked.append((loop.create_future(), commands))
                batch.add(commands, asked[-1][0])
            sent = list(batch.commands)
            assert sorted(sent) == sorted({one for _, some in asked for _, one in some})
            assert batch.distribute(sent, lambda error: Failure(TierError("")))
            assert all(
                future.result() == list(command_bytes(commands)) for future, commands in asked
            )

    asyncio.run(work())
