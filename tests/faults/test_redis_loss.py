"""A Redis that comes back empty: what hosts give back, and what stays invalidated."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from inner_faults import interrupted_each_time
from redis_server import RedisServer
from time_ahead import Ahead
from waiting import until

import memo
from memo.decorators.assembly import default_chain
from memo.errors import TierError
from memo.runtime.blocking import BLOCKING, drive
from memo.stores.redis.loss_recovery import REGISTER_SECONDS
from memo.stores.redis.transport.resp import pack
from memo.testing import recording


def flushed(server: RedisServer) -> None:
    server.client().flushall()


def restarted(server: RedisServer) -> None:
    server.restart(empty=True)


LOSSES = {"flushed": flushed, "restarted": restarted}
losses = pytest.mark.parametrize("lose", LOSSES.values(), ids=LOSSES)
memories = pytest.mark.parametrize("memory", [0, 1 << 20], ids=["no memory tier", "memory"])


class Hosts:
    """Hosts that share a Redis: each has a directory of its own."""

    def __init__(self, server: RedisServer, directory: Path, **settings: Any) -> None:
        self._settings = {"redis_url": server.url, "deadline": 2.0, "memory_limit": 0, **settings}
        self._directory = directory

    def on(self, name: str) -> Any:
        return memo.configure(directory=self._directory / name, **self._settings)

    def __getitem__(self, name: str) -> Callable[[Callable[[], Any]], Any]:
        def run(work: Callable[[], Any]) -> Any:
            with self.on(name):
                return work()

        return run


def counting(**options: Any) -> Any:
    """A cached function that returns how often it ran, for each argument."""
    ran: list[int] = []

    @memo.cache(ttl=600, tags=["users"], key_prefix="load", **options)
    def load(x: int) -> tuple[int, int]:
        ran.append(x)
        return x, len(ran)

    return load


def comes_back(work: Callable[[], Any]) -> Any:
    """Wait until Redis takes an invalidation of something else again."""
    until(lambda: memo.invalidate(tag="nothing has it").tiers["redis"] == "done")
    return work()


@losses
@memories
def test_a_lone_host_loses_nothing(
    redis_server: RedisServer, tmp_path: Path, lose: Any, memory: int
) -> None:
    """Entries on the disk of the only host are still valid, and go back to Redis."""
    load = counting()
    with Hosts(redis_server, tmp_path, memory_limit=memory).on("one"):
        first = [load(x) for x in range(5)]
        load.invalidate(3)
        first[3] = load(3)
        memo.invalidate(key="load:4")
        lose(redis_server)
        assert comes_back(lambda: [load(x) for x in range(3)]) == first[:3]
        assert load(4) != first[4]
        assert load(4) == load(4)
        assert load(3) == first[3]
        assert [load(x) for x in range(3)] == first[:3]
    with Hosts(redis_server, tmp_path).on("one"):
        assert [load(x) for x in range(3)] == first[:3]
    assert redis_server.client().keys("memo:2:g:*")


@losses
def test_a_lone_host_forgets_no_invalidation(
    redis_server: RedisServer, tmp_path: Path, lose: Any
) -> None:
    """Entries invalidated before, during or after the loss are computed again."""
    load = counting()
    with Hosts(redis_server, tmp_path).on("one"):
        first = [load(x) for x in range(6)]
        load.invalidate(0)
        memo.invalidate(key="load:1")
        lose(redis_server)
        comes_back(lambda: load.invalidate(2))
        memo.invalidate(key="load:3")
        again = [load(x) for x in range(6)]
        assert [a == b for a, b in zip(again, first, strict=True)] == [False] * 4 + [True] * 2


@memories
@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_lone_host_keeps_what_it_computed_after_an_invalidation(
    redis_server: RedisServer, tmp_path: Path, memory: int, when: str
) -> None:
    """An invalidation that Redis lost or never got drops nothing that was computed since."""
    load = counting()
    with Hosts(redis_server, tmp_path, memory_limit=memory).on("one"):
        [load(x) for x in range(6)]
        if when == "meanwhile":
            redis_server.kill()
        load.invalidate(0), memo.invalidate(tag="users"), memo.expire(prefix="load")
        again = [load(x) for x in range(5)]
        assert [count for _, count in again] == list(range(7, 12))
        redis_server.restart(empty=True)
        assert comes_back(lambda: [load(x) for x in range(5)]) == again
        assert not load.is_cached(5)


@losses
def test_several_hosts_compute_again(
    redis_server: RedisServer, tmp_path: Path, lose: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Another host of the namespace may have invalidated anything: one warning says so."""
    load = counting()
    hosts = Hosts(redis_server, tmp_path)
    hosts["one"](lambda: load(1))
    hosts["two"](lambda: load(1))
    memo.testing.reset()
    first = hosts["one"](lambda: load(1))
    hosts["two"](lambda: load.invalidate(1))
    lose(redis_server)
    caplog.clear()
    with recording() as events, hosts.on("one"):
        assert comes_back(lambda: load(1)) != first
        assert load(1) == load(1)
    assert len([event for event in events if event.kind == "tier_lost"]) == 1
    told = [
        r.getMessage() for r in caplog.records if "has come back with no data" in r.getMessage()
    ]
    assert len(told) == 1
    assert 'on_redis_loss="trust_disk"' in told[0]


@losses
def test_trust_disk_keeps_what_each_host_has(
    redis_server: RedisServer, tmp_path: Path, lose: Any
) -> None:
    """With `on_redis_loss="trust_disk"` results stay valid on each host that has them on disk."""
    load = counting()
    hosts = Hosts(redis_server, tmp_path, on_redis_loss="trust_disk")
    first = hosts["one"](lambda: [load(x) for x in range(5)])
    other = hosts["two"](lambda: [load(x) for x in range(5, 10)])
    lose(redis_server)
    assert hosts["one"](lambda: comes_back(lambda: [load(x) for x in range(5)])) == first
    assert hosts["two"](lambda: comes_back(lambda: [load(x) for x in range(5, 10)])) == other


@losses
@pytest.mark.parametrize(
    "drop",
    [
        lambda load: load.invalidate(),
        lambda load: load.invalidate(2),
        lambda load: memo.invalidate(tag="users"),
        lambda load: memo.invalidate(prefix="load"),
        lambda load: memo.invalidate(key="load:2"),
    ],
    ids=["function", "arguments", "tag", "prefix", "address"],
)
def test_an_invalidation_after_the_loss_holds_on_all_hosts(
    redis_server: RedisServer, tmp_path: Path, lose: Any, drop: Any
) -> None:
    """A host that learns of the loss after another one has invalidated brings nothing back."""
    load = counting()
    hosts = Hosts(redis_server, tmp_path, on_redis_loss="trust_disk")
    first = hosts["one"](lambda: load(2))
    assert hosts["two"](lambda: load(2)) == first
    lose(redis_server)
    hosts["two"](lambda: comes_back(lambda: drop(load)))
    assert hosts["one"](lambda: load(2)) != first


def test_an_invalidation_writes_a_missing_group(redis_server: RedisServer, tmp_path: Path) -> None:
    """One that finds nothing in Redis leaves word there, which expires."""
    client = redis_server.client()
    with Hosts(redis_server, tmp_path).on("one"):
        memo.invalidate(tag="never seen")
    assert 0 < client.ttl("memo:2:g:{t:never seen}") <= 120


def test_a_host_that_joins_is_noticed(redis_server: RedisServer, tmp_path: Path) -> None:
    """The first host no longer counts itself alone once a second one has registered."""
    load = counting()
    hosts = Hosts(redis_server, tmp_path)
    first = hosts["one"](lambda: load(1))
    assert hosts["two"](lambda: load(1)) == first
    client = redis_server.client()
    for group in client.keys("memo:2:g:*"):
        client.delete(group)
    assert hosts["one"](lambda: load(1)) != first


def test_a_host_that_joined_unseen_puts_it_right(redis_server: RedisServer, tmp_path: Path) -> None:
    """Generations that one of several hosts gave back go when the other one is there again."""
    load = counting()
    hosts = Hosts(redis_server, tmp_path)
    first = hosts["one"](lambda: load(1))
    hosts["two"](lambda: load(1))
    hosts["two"](lambda: load.invalidate(1))
    flushed(redis_server)
    hosts["one"](lambda: load(1))
    memo.testing.reset()
    hosts["two"](lambda: load(1))
    fresh = hosts["one"](lambda: load(1))
    assert fresh != first
    memo.testing.reset()
    assert hosts["two"](lambda: load(1)) == fresh == hosts["one"](lambda: load(1))


def test_evicted_groups_do_not_count_as_a_loss(redis_server: RedisServer, tmp_path: Path) -> None:
    """With `trust_disk`, groups that a Redis evicted, which lost nothing, do not come back."""
    load = counting()
    hosts = Hosts(redis_server, tmp_path, on_redis_loss="trust_disk")
    hosts["one"](lambda: load(1))
    hosts["two"](lambda: load(1))
    memo.testing.reset()
    first = hosts["one"](lambda: load(1))
    hosts["two"](lambda: load.invalidate(1))
    client = redis_server.client()
    for group in client.keys("memo:2:g:{f:*"):
        client.delete(group)
    client.delete("memo:2:hosts")
    assert hosts["one"](lambda: load(1)) != first


def test_the_choice_is_checked() -> None:
    """A wrong `on_redis_loss` is named, with the choices."""
    with pytest.raises(memo.SettingError, match="trust_disk"):
        memo.configure(on_redis_loss="keep")


def test_a_lone_host_is_told_quietly(
    redis_server: RedisServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A loss that costs nothing is an event and no warning."""
    load = counting()
    with Hosts(redis_server, tmp_path).on("one"), recording() as events:
        load(1)
        flushed(redis_server)
        load(1)
    assert [event.tier for event in events if event.kind == "tier_lost"] == ["redis"]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.fixture
def forgetful(tmp_path: Path) -> Any:
    """A redis-server that keeps only what it is told to save."""
    server = RedisServer(tmp_path / "forgetful", "--appendonly", "no")
    yield server
    server.close()


@pytest.mark.parametrize("drop", ["arguments", "function", "tag"])
def test_an_invalidation_that_redis_forgot(forgetful: Any, tmp_path: Path, drop: str) -> None:
    """One that Redis had acknowledged, and lost when it was killed, is sent once more."""
    load = counting()
    with Hosts(forgetful, tmp_path).on("one"):
        first = load(1)
        forgetful.client().save()
        told = {
            "arguments": lambda: load.invalidate(1),
            "function": load.invalidate,
            "tag": lambda: memo.invalidate(tag="users"),
        }[drop]()
        assert told.tiers["redis"] == "done"
        forgetful.kill()
        forgetful.restart()
        assert load(1) != first


@memories
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_a_connection_that_died_is_not_believed(
    forgetful: Any, tmp_path: Path, memory: int, asynchronous: bool
) -> None:
    """The first lookup after Redis was killed may find an older state: it is made once more."""
    ran: list[int] = []

    @memo.cache(ttl=600)
    def load(x: int) -> int:
        ran.append(x)
        return len(ran)

    @memo.cache(ttl=600)
    async def aload(x: int) -> int:
        return load.__wrapped__(x)

    cached = aload if asynchronous else load

    async def rounds() -> tuple[int, int]:
        call = (lambda: aload(1)) if asynchronous else (lambda: _ready(load(1)))
        for _ in range(5):  # by now a hit takes one round trip
            first = await call()
        await asyncio.to_thread(forgetful.client().save)
        assert cached.invalidate(1).tiers["redis"] == "done"
        forgetful.kill()
        forgetful.restart()
        return first, await call()

    with Hosts(forgetful, tmp_path, memory_limit=memory).on("one"):
        first, then = asyncio.run(rounds())
    assert then != first


@memories
def test_an_answer_that_was_interrupted_each_time_is_not_believed(
    redis_server: RedisServer, tmp_path: Path, memory: int
) -> None:
    """If the connection dies during every attempt, the call computes; this host does not judge."""
    load = counting()
    with Hosts(redis_server, tmp_path, memory_limit=memory).on("one"):
        first = load(1)
        assert load(1) == first
        with interrupted_each_time(), recording() as events:
            assert load(1) != first
        assert any(e.tier == "redis" and "interrupted" in e.detail for e in events)
        assert load(1) == load(1)


def test_an_error_reply_does_not_interrupt_a_read(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    """A server that refuses another command meanwhile runs on, so its answer is believed."""
    with Hosts(redis_server, tmp_path).on("one"):
        authorities = default_chain().authorities
        tier: Any = authorities.shared

        async def read() -> str:
            with pytest.raises(TierError, match="UNKNOWN"):
                await tier.client.ask(BLOCKING, pack(b"NO.SUCH.COMMAND"), parse=bool)
            return "answer"

        assert drive(authorities.read_shared(BLOCKING, read)) == "answer"


async def _ready(value: int) -> int:
    return value


def test_an_invalidation_that_redis_forgot_long_ago(
    forgetful: Any, tmp_path: Path, ahead: Ahead
) -> None:
    """State that Redis lost is sent once more, however long the process was idle since."""
    load = counting()
    with Hosts(forgetful, tmp_path).on("one"):
        first = load(1)
        forgetful.client().save()
        load.invalidate(1)
        forgetful.kill()
        forgetful.restart()
        ahead.advance(3600)
        assert load(1) != first


def test_a_redis_that_goes_back_is_noticed(
    forgetful: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    ahead: Ahead,
) -> None:
    """A Redis restored from an older snapshot brings nothing back; one warning says so."""
    load = counting()
    hosts = Hosts(forgetful, tmp_path)
    first = hosts["one"](lambda: load(1))
    hosts["two"](lambda: load(1))
    forgetful.client().save()
    hosts["two"](lambda: load.invalidate(1))
    memo.testing.reset()  # the process that has invalidated is gone
    with hosts.on("one"):
        load(2)
        forgetful.kill()
        forgetful.restart()
        ahead.advance(2 * REGISTER_SECONDS)
        assert load(1) != first
    told = [r.getMessage() for r in caplog.records if "older state" in r.getMessage()]
    assert len(told) == 1


@contextmanager
def nothing_lost(server: RedisServer, directory: Path) -> Iterator[None]:
    """Calls of one host, which takes Redis for whole all the time."""
    with Hosts(server, directory).on("one"), recording() as events:
        yield
    assert [event for event in events if event.kind == "tier_lost"] == []


def test_a_late_registration_is_no_loss(
    redis_server: RedisServer, tmp_path: Path, ahead: Ahead
) -> None:
    """Another process of the host that registers seconds late is not taken for an older state."""
    load = counting()
    with nothing_lost(redis_server, tmp_path):
        first = load(1)
        client = redis_server.client()
        [name] = [f for f in client.hkeys("memo:2:hosts") if f.startswith(b"h:")]
        for _ in range(3):
            ahead.advance(2 * REGISTER_SECONDS)
            assert load(1) == first
            client.hset("memo:2:hosts", name, int(time.time()) - 3)


def test_an_evicted_list_of_hosts_is_no_loss(
    redis_server: RedisServer, tmp_path: Path, ahead: Ahead
) -> None:
    """A full Redis may evict the list of hosts and keep the groups: results stay valid."""
    load = counting()
    with nothing_lost(redis_server, tmp_path):
        first = load(1)
        for _ in range(3):
            ahead.advance(2 * REGISTER_SECONDS)
            assert load(1) == first  # registered
            assert redis_server.client().delete("memo:2:hosts") == 1
        ahead.advance(2 * REGISTER_SECONDS)
        assert load(1) == first
