"""Cluster leases on a real Redis: one holder, woken waiters, no orphans."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from chaos import Proxy
from ports import blocking, looping
from redis_server import RedisServer
from waiting import STUCK, await_until, until, wait_for

import memo
from memo.errors import TierError
from memo.runtime.port import Port
from memo.stores.protocols import LEASE_SECONDS
from memo.stores.redis.cluster_leases import RedisLeases
from memo.stores.redis.redis_tier import Redis

PATIENT = 5.0
"""A deadline in seconds that a busy machine keeps."""


@pytest.fixture(params=[blocking, looping], ids=["sync", "async"])
def run(request: pytest.FixtureRequest) -> Any:
    """Runs a coroutine over a port: in this thread, or on a loop of its own."""
    return request.param


@pytest.fixture
def tier(redis_server: RedisServer) -> Iterator[Redis]:
    tier = Redis(redis_server.url, deadline=PATIENT)
    yield tier
    tier.close()


def within(seconds: float, condition: Callable[[], bool]) -> bool:
    return wait_for(condition, seconds)


def answers(tier: Redis) -> bool:
    try:
        blocking(lambda port: tier.lookup(port, "memo:k"))
    except TierError:
        return False
    return True


def test_one_holder(tier: Redis, redis_server: RedisServer, run: Any) -> None:
    """The first caller has it, the others are told the holder; given back it is free."""
    leases = tier.leases
    assert run(lambda port: leases.acquire(port, "x", "me")) is None
    assert run(lambda port: leases.acquire(port, "x", "me")) is None
    assert run(lambda port: leases.acquire(port, "x", "you"))[0] == "me"
    assert run(lambda port: leases.acquire(port, "y", "you")) is None
    assert LEASE_SECONDS - 5 < redis_server.client().ttl("memo:2:l:{x}") <= LEASE_SECONDS
    assert run(lambda port: leases.release(port, "x", "you")) is False
    assert run(lambda port: leases.release(port, "x", "me")) is True
    assert run(lambda port: leases.release(port, "x", "me")) is False
    assert run(lambda port: leases.acquire(port, "x", "you")) is None


def test_renewed_and_replaced(tier: Redis, redis_server: RedisServer, run: Any) -> None:
    """Only its holder renews a lease, and only from its holder can it be taken over."""
    client, leases = redis_server.client(), tier.leases
    run(lambda port: leases.acquire(port, "x", "me"))
    client.pexpire("memo:2:l:{x}", 1000)
    assert run(lambda port: leases.renew(port, "x", "you")) is False
    assert client.pttl("memo:2:l:{x}") <= 1000
    assert run(lambda port: leases.renew(port, "x", "me")) is True
    assert client.pttl("memo:2:l:{x}") > 20_000
    assert run(lambda port: leases.replace(port, "x", "you", "her")) is False
    assert run(lambda port: leases.replace(port, "x", "me", "you")) is True
    assert run(lambda port: leases.acquire(port, "x", "me"))[0] == "you"
    client.delete("memo:2:l:{x}")
    assert run(lambda port: leases.renew(port, "x", "you")) is False


def test_a_dead_holder(tier: Redis, run: Any) -> None:
    """A lease that is not renewed is free when its time is over, and waiting ends with it."""
    leases = RedisLeases(tier.client, b"memo:2:", lease=0.3)
    run(lambda port: leases.acquire(port, "x", "dead"))
    begun = time.monotonic()

    async def take(port: Port) -> None:
        while await leases.acquire(port, "x", "me"):
            await leases.wait(port, "x", 5)

    run(take)
    assert 0.25 < time.monotonic() - begun < 0.3 + 1.2


@pytest.mark.parametrize("waiting", [1, 12])
def test_all_waiters_are_woken(
    tier: Redis, redis_server: RedisServer, waiting: int, run: Any
) -> None:
    """Giving a lease back wakes all waiting callers, within milliseconds, sync and async."""
    leases, woken = tier.leases, []
    blocking(lambda port: leases.acquire(port, "x", "me"))

    async def wait(port: Port) -> None:
        await leases.wait(port, "x", 5)
        woken.append(time.monotonic())

    if run is blocking:
        threads = [threading.Thread(target=run, args=(wait,)) for _ in range(waiting)]
    else:

        async def wait_all(port: Port) -> None:
            await asyncio.gather(*(wait(port) for _ in range(waiting)))

        threads = [threading.Thread(target=run, args=(wait_all,))]
    for thread in threads:
        thread.start()
    client = redis_server.client()
    assert within(5, lambda: client.info("clients")["blocked_clients"] == waiting)
    freed = time.monotonic()
    blocking(lambda port: leases.release(port, "x", "me"))
    for thread in threads:
        thread.join()
    assert len(woken) == waiting
    assert max(woken) - freed < 0.2


def test_no_wake_up_is_lost(tier: Redis, run: Any) -> None:
    """Given back between learning its holder and waiting for it: waiting ends at once."""

    async def work(port: Port) -> float:
        await tier.leases.acquire(port, "x", "me")
        assert (await tier.leases.acquire(port, "x", "you"))[0] == "me"
        await tier.leases.release(port, "x", "me")
        begun = time.monotonic()
        await tier.leases.wait(port, "x", 5)
        return time.monotonic() - begun

    assert run(work) < 0.1


def test_the_next_holder_silences_the_bell(tier: Redis, run: Any) -> None:
    """Once another holder has the lease, new callers do wait."""

    async def work(port: Port) -> float:
        await tier.leases.acquire(port, "x", "me")
        await tier.leases.release(port, "x", "me")
        await tier.leases.acquire(port, "x", "you")
        begun = time.monotonic()
        await tier.leases.wait(port, "x", 0.3)
        return time.monotonic() - begun

    assert 0.25 < run(work) < 0.5


def test_waiting_is_no_polling(tier: Redis, redis_server: RedisServer) -> None:
    """A caller that waits three seconds sends at most ten commands a second, and is no outage."""
    blocking(lambda port: tier.leases.acquire(port, "x", "me"))
    client = redis_server.client()
    client.config_resetstat()

    async def work(port: Port) -> None:
        end = time.monotonic() + 3
        while time.monotonic() < end:
            assert (await tier.leases.acquire(port, "x", "you"))[0] == "me"
            await tier.leases.wait(port, "x", end - time.monotonic())

    looping(work)
    stats = client.info("commandstats")
    sent = sum(stats[f"cmdstat_{name}"]["calls"] for name in ("evalsha", "blmove"))
    assert sent <= 30
    assert tier.outages == 0


def test_mutual_exclusion(tier: Redis) -> None:
    """Tasks and threads that all want one lease have it one at a time, and all get it."""
    inside, most, done = 0, 0, 0
    lock = threading.Lock()

    async def one(port: Port, who: str) -> None:
        nonlocal inside, most, done
        while await tier.leases.acquire(port, "x", who):
            await tier.leases.wait(port, "x", 5)
        with lock:
            inside += 1
            most = max(most, inside)
        await port.sleep(0.002)
        with lock:
            inside -= 1
            done += 1
        await tier.leases.release(port, "x", who)

    def tasks() -> None:
        async def work(port: Port) -> None:
            await asyncio.gather(*(one(port, f"task {i}") for i in range(10)))

        looping(work)

    threads = [threading.Thread(target=tasks)]
    for i in range(6):
        target = lambda i=i: blocking(lambda port: one(port, f"thread {i}"))
        threads.append(threading.Thread(target=target))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, done) == (1, 16)


@pytest.mark.parametrize("when", ["hold", "hold_reply"], ids=["on its way", "granted"])
def test_a_cancelled_acquire_leaves_no_orphan(redis_server: RedisServer, when: str) -> None:
    """Cancelled before or after the server has granted it, an acquisition leaves the lease free."""
    reached, cancelled = threading.Event(), threading.Event()
    client = redis_server.client()

    def pause(data: bytes) -> None:
        if not reached.is_set():
            reached.set()
            assert cancelled.wait(STUCK)

    with Proxy(redis_server.port) as proxy:
        tier = Redis(proxy.url, deadline=PATIENT)

        async def work(port: Port) -> None:
            await tier.leases.acquire(port, "warm", "me")
            await tier.leases.release(port, "warm", "me")
            client.config_resetstat()
            setattr(proxy, when, pause)
            task = asyncio.create_task(tier.leases.acquire(port, "x", "me"))
            await await_until(reached.is_set)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert task.cancelled()

        looping(work)
        if when == "hold":
            until(lambda: "get" in redis_server.commands())  # the first release came too early
        cancelled.set()
        until(lambda: redis_server.commands().get("set"))
        proxy.hold = lambda data: time.sleep(0.1)
        tier.leases.close()  # waits until it is released once more
        assert not client.exists("memo:2:l:{x}")
        tier.close()


def test_a_lost_answer_leaves_no_orphan(redis_server: RedisServer, run: Any) -> None:
    """An acquisition that timed out, though the server did it, is taken back."""
    with Proxy(redis_server.port) as proxy:
        tier = Redis(proxy.url)

        async def work(port: Port) -> None:
            await tier.leases.acquire(port, "warm", "me")
            redis_server.client().config_resetstat()
            proxy.mode = "silence"
            with pytest.raises(TierError):
                await tier.leases.acquire(port, "x", "me")

        run(work)
        assert redis_server.commands()["set"] == 1, "the server did it"
        proxy.mode = "pass"
        client = redis_server.client()
        assert within(3, lambda: answers(tier) and not client.exists("memo:2:l:{x}"))
        assert within(2, lambda: not tier.leases.orphans)
        tier.close()


def test_an_orphan_is_not_retried_with_every_command(redis_server: RedisServer) -> None:
    """If only its release fails, other commands work undisturbed, and it is retried later."""
    refused: list[bytes] = []

    def refuse(data: bytes) -> None:
        if b":l:" in data:
            refused.append(data)
            raise ConnectionResetError

    with Proxy(redis_server.port) as proxy:
        tier = Redis(proxy.url, deadline=PATIENT)
        proxy.hold = refuse
        with pytest.raises(TierError):
            blocking(lambda port: tier.leases.acquire(port, "x", "me"))
        end = time.monotonic() + 0.2
        while time.monotonic() < end:
            answers(tier)
        assert len(refused) <= 4
        proxy.hold = lambda data: None
        assert within(5, lambda: answers(tier) and not tier.leases.orphans)
        tier.close()


def test_an_orphan_of_a_frozen_server(redis_server: RedisServer) -> None:
    """A lease that a frozen server grants when it thaws is taken back when it answers."""
    tier = Redis(redis_server.url)
    blocking(lambda port: tier.leases.acquire(port, "warm", "me"))
    blocking(lambda port: tier.leases.release(port, "warm", "me"))
    client = redis_server.client()
    client.config_resetstat()
    redis_server.freeze()
    for _ in range(2):
        with pytest.raises(TierError):
            blocking(lambda port: tier.leases.acquire(port, "x", "me"))
    until(lambda: not any(one.name == "memo-undo" for one in threading.enumerate()))
    redis_server.thaw()
    until(lambda: redis_server.commands().get("set"))
    until(lambda: answers(tier) and not client.exists("memo:2:l:{x}"))
    tier.close()


def test_a_release_that_was_lost_is_repeated(redis_server: RedisServer, run: Any) -> None:
    """A lease whose release did not reach the server is released when the server answers again."""

    def refuse(data: bytes) -> None:
        raise ConnectionResetError

    with Proxy(redis_server.port) as proxy:
        tier = Redis(proxy.url, deadline=PATIENT)
        run(lambda port: tier.leases.acquire(port, "x", "me"))
        proxy.hold = refuse
        with pytest.raises(TierError):
            run(lambda port: tier.leases.release(port, "x", "me"))
        proxy.hold = lambda data: None
        client = redis_server.client()
        until(lambda: answers(tier) and not client.exists("memo:2:l:{x}"))
        tier.close()


def test_waiting_for_a_server_that_goes(redis_server: RedisServer, run: Any) -> None:
    """A caller that waits when the server dies is told at once."""
    tier = Redis(redis_server.url)
    run(lambda port: tier.leases.acquire(port, "x", "me"))
    timer = threading.Timer(0.2, redis_server.kill)
    timer.start()
    begun = time.monotonic()
    with pytest.raises(TierError):
        run(lambda port: tier.leases.wait(port, "x", 5))
    assert time.monotonic() - begun < 2.0
    timer.join()
    tier.close()


def test_a_cancelled_wait(tier: Redis, redis_server: RedisServer) -> None:
    """A wait that is cancelled frees its connection at the server."""
    client = redis_server.client()

    async def work(port: Port) -> None:
        await tier.leases.acquire(port, "x", "me")
        task = asyncio.create_task(tier.leases.wait(port, "x", 5))
        await await_until(lambda: client.info("clients")["blocked_clients"] == 1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await await_until(lambda: client.info("clients")["blocked_clients"] == 0)

    looping(work)


def test_more_waiters_than_connections(tier: Redis) -> None:
    """Waiting never takes the connections of others, and more than 32 waiters all get through."""

    async def work(port: Port) -> None:
        for i in range(80):
            await tier.leases.acquire(port, f"x{i}", "me")
        waits = [asyncio.create_task(tier.leases.wait(port, f"x{i}", 2.0)) for i in range(80)]
        begun = time.monotonic()
        await tier.lookup(port, "memo:k")
        assert time.monotonic() - begun < 1.5
        await asyncio.gather(*waits)

    looping(work)
    assert tier.outages == 0


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_a_miss_under_a_lease_takes_four_round_trips(
    redis_server: RedisServer, is_async: bool
) -> None:
    """Lookup, lease with lookup and stamps, record, release: what follows asks no more."""

    @memo.cache(ttl=600, use_lock=True)
    def load(number: int) -> int:
        return number

    @memo.cache(ttl=600, use_lock=True)
    async def aload(number: int) -> int:
        return number

    counts = []

    def counted() -> None:
        counts.append(redis_server.commands()["echo"])
        redis_server.client().config_resetstat()

    async def calls() -> None:
        for number in range(9):
            assert await aload(number) == number
            counted()

    with memo.configure(redis_url=redis_server.url, tiers=["redis"], deadline=5):
        if is_async:
            asyncio.run(calls())
        else:
            for number in range(9):
                assert load(number) == number
                counted()
    assert min(counts) == 4  # the first learn, and now and then the hosts are counted


def test_a_run_of_a_generator_takes_as_many(redis_server: RedisServer) -> None:
    """The lease of a generator's run brings the lookup along, too."""

    @memo.cache(ttl=600, use_lock=True)
    def rows(number: int) -> Iterator[int]:
        yield number

    counts = []
    with memo.configure(redis_url=redis_server.url, tiers=["redis"], deadline=5):
        for number in range(9):
            redis_server.client().config_resetstat()
            assert list(rows(number)) == [number]
            counts.append(redis_server.commands()["echo"])
    assert min(counts) == 4


def test_an_invalidation_after_the_lease_is_taken_drops_the_result(
    redis_server: RedisServer,
) -> None:
    """The stamps are from before the computation, though they came with the lookup."""
    runs = []

    @memo.cache(ttl=600, use_lock=True)
    def load(number: int) -> int:
        runs.append(number)
        if len(runs) == 2:
            load.invalidate(number)
        return len(runs)

    with memo.configure(redis_url=redis_server.url, tiers=["redis"], deadline=5):
        load(0)
        assert load(1) == 2
        assert load(1) == 3
        assert load(1) == 3


def test_a_key_of_another_type_costs_the_lease_and_not_the_call(redis_server: RedisServer) -> None:
    """A lookup behind a lease that cannot be read is a fault: reported, and computed without it."""
    faults = []

    @memo.cache(ttl=600, use_lock=True, name="wrongtype")
    def load(x: int) -> int:
        return x

    forget = memo.on_event(lambda event: faults.append(event) if event.kind == "error" else None)
    with memo.configure(redis_url=redis_server.url, tiers=["redis"], deadline=5):
        assert load(1) == 1
        client = redis_server.client()
        [group] = client.keys("*:g:{f:wrongtype}")
        client.set(group, b"text")
        assert load(2) == 2
        assert within(5, lambda: not client.keys("*:l:*"))
    forget()
    assert "lease" in {event.reason for event in faults}
