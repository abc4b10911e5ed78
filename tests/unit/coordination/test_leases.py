"""Leases: one computation per key on a host and in a cluster, whatever happens to its holder."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from callers import Process, runs
from chaos import Proxy
from folders import FOLDER
from inner_faults import held_up
from observed import calls_of
from redis_server import RedisServer
from styles import STYLES, Style
from waiting import until

import memo
from memo.coordination import leases
from memo.decorators import assembly
from memo.runtime import events
from memo.stores.disk.file_locks import HostLock
from memo.testing import recording

STYLE_NAMES = ["sync", "async"]


@pytest.fixture
def processes() -> Iterator[list[Process]]:
    started: list[Process] = []
    yield started
    for process in started:
        process.kill()


def met(condition: Any) -> float:
    """Wait for a condition; the time at which it came true."""
    until(condition)
    return time.time()


@pytest.mark.parametrize("lease", [30.0, 0.15], ids=["lease", "short lease"])
@pytest.mark.parametrize("shared", ["redis", "disk"])
@pytest.mark.parametrize("style", STYLE_NAMES)
def test_one_computation_whatever_it_takes(
    style: str,
    shared: str,
    lease: float,
    log: Path,
    cache_home: Path,
    redis_server: RedisServer,
    processes: list[Process],
) -> None:
    """Of 4 processes x 32 callers of a cold key one computes, however short its lease."""
    settings = {"redis_url": redis_server.url, "deadline": 5.0} if shared == "redis" else {}
    plan = {"style": style, "callers": 32, "log": str(log), "lease": lease, "settings": settings}
    processes += [Process(**plan) for _ in range(4)]
    for process in processes:
        process.ready()
    for process in processes:
        process.go()
    results = [result for process in processes for result in process.end()["results"]]
    assert len(runs(log)) == 1
    assert results == [f"made by {runs(log)[0]}"] * 128
    assert not list((cache_home / FOLDER).glob("locks/*"))


def test_waiting_for_a_host_lock_costs_little() -> None:
    """A lock that stays held is rarely tried again: its file tells when it is released."""

    @memo.cache(ttl=60, version="1", use_lock=True, lock_timeout=0.3)
    def load(x: int) -> int:
        return x

    load(0)
    chain = assembly.default_chain()
    assert chain.host is not None
    held = chain.host.lock(chain.name(load.function_id, load.key(1)))
    assert held.try_acquire("another/process")
    with calls_of(HostLock.try_acquire) as tries:
        assert load(1) == 1
    held.release()
    assert len(tries) == 1


@pytest.mark.timing
@pytest.mark.parametrize("shared", ["redis", "disk"])
@pytest.mark.parametrize("style", STYLE_NAMES)
def test_waiting_takes_little_longer_than_the_computation(
    style: str, shared: str, log: Path, redis_server: RedisServer, processes: list[Process]
) -> None:
    """Of 4 processes x 32 callers all have the result within 1.5 times its computation."""
    settings = {"redis_url": redis_server.url} if shared == "redis" else {}
    plan = {"style": style, "callers": 32, "log": str(log), "settings": settings}
    walls = []
    for key in range(3):  # the machine may be busy with something else
        together = [Process(key=key, **plan) for _ in range(4)]
        processes += together
        for process in together:
            process.ready()
        begun = time.time()
        for process in together:
            process.go()
        walls.append(max(process.end()["ended"] for process in together) - begun)
        if walls[-1] < 1.5 * 0.5:
            break
    assert min(walls) < 1.5 * 0.5


@pytest.mark.parametrize("style", STYLE_NAMES)
def test_hosts_share_one_computation(
    style: str, log: Path, tmp_path: Path, redis_server: RedisServer, processes: list[Process]
) -> None:
    """Two hosts (two directories) on one Redis compute once, for five leases long."""
    plan = {"style": style, "callers": 4, "log": str(log), "lease": 0.8, "seconds": 4.0}
    for host in ("a", "b"):
        settings = {"redis_url": redis_server.url, "directory": str(tmp_path / host)}
        processes += [Process(settings=settings, **plan) for _ in range(2)]
    for process in processes:
        process.ready()
    for process in processes:
        process.go()
    assert len({r for p in processes for r in p.end()["results"]}) == 1
    assert len(runs(log)) == 1


@pytest.mark.parametrize("style", STYLE_NAMES)
def test_while_redis_is_away_a_host_computes_once(
    style: str, log: Path, redis_server: RedisServer, processes: list[Process]
) -> None:
    """With a Redis that refuses, the lock of the host keeps its processes to one computation."""
    redis_server.stop()
    settings = {"redis_url": redis_server.url}
    plan = {"style": style, "callers": 4, "log": str(log), "settings": settings, "seconds": 1.0}
    processes += [Process(**plan) for _ in range(3)]
    for process in processes:
        process.ready()
    for process in processes:
        process.go()
    assert len({result for p in processes for result in p.end()["results"]}) == 1
    assert len(runs(log)) == 1


def test_waiters_do_not_poll_redis(
    log: Path, tmp_path: Path, redis_server: RedisServer, processes: list[Process]
) -> None:
    """A waiter sends Redis at most 10 commands a second, and is woken when the result is there."""
    for host in ("a", "b"):
        settings = {"redis_url": redis_server.url, "directory": str(tmp_path / host)}
        processes.append(Process(settings=settings, log=str(log), seconds=3.0).ready())
    processes[0].go()
    until(lambda: runs(log))
    processes[1].go().waiting()  # the overhead at the start of a call is not waiting
    heard: list[str] = []
    with redis_server.client(socket_timeout=None).monitor() as monitor:
        end = time.monotonic() + 2.0
        killer = threading.Timer(2.2, redis_server.client().ping)
        killer.start()
        for command in monitor.listen():
            if time.monotonic() > end:
                break
            if command["client_type"] != "lua":
                heard.append(command["command"].split()[0])
        killer.join()
    assert 1 <= len(heard) <= 2 * 10, heard
    first, second = (process.end() for process in processes)
    assert len(runs(log)) == 1
    assert second["ended"] - first["ended"] < 1.0
    assert [kind for kind, _ in second["events"]].count(events.WAITED) == 1


@pytest.mark.parametrize("shared", ["redis", "disk"])
@pytest.mark.parametrize("style", STYLE_NAMES)
def test_killed_leader_is_replaced_on_its_host(
    style: str,
    shared: str,
    log: Path,
    redis_server: RedisServer,
    processes: list[Process],
) -> None:
    """On the same host another process takes over within a second of a SIGKILL."""
    settings = {"redis_url": redis_server.url} if shared == "redis" else {}
    plan = {"style": style, "log": str(log), "settings": settings}
    leader = Process(**plan, seconds=60.0).ready()
    follower = Process(**plan, seconds=0.1).ready()
    processes += [leader, follower]
    leader.go()
    until(lambda: len(runs(log)) == 1)
    follower.go().waiting()
    assert len(runs(log)) == 1
    killed = time.time()
    leader.kill()
    assert met(lambda: len(runs(log)) == 2) - killed < 2.0  # a second on a quiet machine
    assert follower.end()["results"] == [f"made by {follower.pid}"]


@pytest.mark.parametrize("style", STYLE_NAMES)
def test_killed_leader_is_replaced_on_another_host(
    style: str, log: Path, tmp_path: Path, redis_server: RedisServer, processes: list[Process]
) -> None:
    """On another host that happens within the rest of its lease and one second."""
    for host, seconds in (("a", 60.0), ("b", 0.1)):
        settings = {"redis_url": redis_server.url, "directory": str(tmp_path / host)}
        plan = {"style": style, "log": str(log), "lease": 1.5}
        processes.append(Process(settings=settings, seconds=seconds, **plan).ready())
    leader, follower = processes
    leader.go()
    until(lambda: len(runs(log)) == 1)
    follower.go().waiting()
    client = redis_server.client()
    [lease] = client.keys("memo:2:l:*")
    for _ in range(3):
        assert client.pexpire(lease, 1200)
        until(lambda: client.pttl(lease) > 1200)  # it is renewed
    assert len(runs(log)) == 1
    killed = time.time()
    leader.kill()
    assert met(lambda: len(runs(log)) == 2) - killed < 1.5 + 1.0 + 1.0  # a busy machine
    assert follower.end()["results"] == [f"made by {follower.pid}"]


@pytest.mark.parametrize("style", STYLES, ids=repr)
@pytest.mark.parametrize("shared", ["redis", "disk"])
def test_lock_timeout_computes_here(
    style: Style, shared: str, log: Path, redis_server: RedisServer, processes: list[Process]
) -> None:
    """Past `lock_timeout` the caller computes by itself, and an event says so."""
    settings = {"redis_url": redis_server.url} if shared == "redis" else {}
    processes.append(Process(log=str(log), seconds=60.0, settings=settings).ready().go())
    until(lambda: runs(log))
    options = {"use_lock": True, "name": "callers:load", "version": "1", "lock_timeout": 0.3}
    f = style.cached(lambda x: f"made here of {x}", **options)
    with memo.configure(**settings), recording() as seen:
        begun = time.monotonic()
        assert style.call(f, 7) == "made here of 7"
        waited = time.monotonic() - begun
        memo.decorators.assembly.reset()
    assert 0.3 <= waited < 3.0
    told = [event for event in seen if event.kind == events.LOCK_TIMEOUT]
    assert len(told) == 1
    assert 0.3 <= told[0].seconds < 3.0
    assert str(processes[0].pid) in told[0].detail
    assert told[0].function == "callers:load"


@pytest.mark.parametrize("style", STYLES, ids=repr)
@pytest.mark.parametrize("shared", ["redis", "disk"])
def test_lock_timeout_bounds_no_computation(
    style: Style, shared: str, redis_server: RedisServer
) -> None:
    """A computation that takes longer than `lock_timeout` keeps its lease and is stored."""
    settings = {"redis_url": redis_server.url, "deadline": 5.0} if shared == "redis" else {}
    client = redis_server.client()
    found: list[Any] = []

    def load() -> Any:
        yield 0.4
        chain = memo.decorators.assembly.default_chain()
        assert chain.host is not None
        lock = chain.host.lock(chain.name(f.function_id, f.key()))
        found.append((lock.try_acquire("another"), len(client.keys("memo:2:l:*"))))
        return 5

    f = style.cached(load, use_lock=True, lock_timeout=0.1, version="1", name="bounds")
    with memo.configure(**settings), recording() as seen:
        assert style.together([f] * 3) == [5] * 3
        assert f.is_cached()
        memo.decorators.assembly.reset()
    assert found == [(False, 1 if shared == "redis" else 0)]
    assert events.LOCK_TIMEOUT not in [event.kind for event in seen]


@pytest.mark.parametrize("style", STYLES, ids=repr)
def test_lock_timeout_of_nothing(style: Style, log: Path, processes: list[Process]) -> None:
    """`lock_timeout=0` does not wait: if the lease is taken, the call computes here at once."""
    processes.append(Process(log=str(log), seconds=60.0).ready().go())
    until(lambda: runs(log))
    options = {"use_lock": True, "name": "callers:load", "version": "1", "lock_timeout": 0}
    f = style.cached(lambda x: "here", **options)
    with recording() as seen:
        assert style.call(f, 7) == "here"
        assert style.call(f, 8) == "here"
    told = [event.seconds < 1.0 for event in seen if event.kind == events.LOCK_TIMEOUT]
    assert told == [True]


def test_lock_timeout_none_waits(log: Path, processes: list[Process]) -> None:
    """With `lock_timeout=None` a caller waits as long as the holder lives."""
    plan = {"log": str(log), "options": {"lock_timeout": None}}
    processes.append(Process(seconds=2.0, **plan).ready().go())
    until(lambda: runs(log))
    other = Process(seconds=2.0, **plan).ready().go()
    processes.append(other)
    assert other.end()["results"] == processes[0].end()["results"]
    assert len(runs(log)) == 1


@pytest.mark.parametrize("style", STYLES, ids=repr)
def test_without_use_lock_processes_do_not_wait(
    style: Style, log: Path, processes: list[Process]
) -> None:
    """Single flight across processes is what `use_lock` adds."""
    processes.append(Process(log=str(log), seconds=60.0).ready().go())
    until(lambda: runs(log))
    f = style.cached(lambda x: "here", name="callers:load", version="1")
    assert style.call(f, 7) == "here"


@pytest.fixture
def brief_leases(set_limits: Callable[..., None]) -> None:
    """A lease lasts 0.3 s, so that it is renewed several times within a test."""
    set_limits(lease=0.3)


@pytest.mark.usefixtures("brief_leases")
@pytest.mark.parametrize("style", STYLES, ids=repr)
def test_a_lost_lease_is_told(style: Style, redis_server: RedisServer) -> None:
    """A lease that was taken away is an event; the result is returned and stored."""

    def load() -> Any:
        yield 0.0
        redis_server.client().delete(*redis_server.client().keys("memo:2:l:*"))
        until(lambda: any(event.kind == events.LEASE_LOST for event in seen))
        return 5

    f = style.cached(load, use_lock=True, name="lost", version="1")
    with memo.configure(redis_url=redis_server.url), recording() as seen:
        assert style.call(f) == 5
        assert f.is_cached()
        memo.decorators.assembly.reset()
    assert [e.function for e in seen if e.kind == events.LEASE_LOST] == ["lost"]
    assert not leases.HELD_LEASES


@pytest.mark.usefixtures("brief_leases")
@pytest.mark.parametrize("style", STYLES, ids=repr)
def test_a_lease_that_was_never_held_is_not_lost(style: Style, redis_server: RedisServer) -> None:
    """A computation that began while Redis was down has no lease to lose when it is back."""
    asked: list[bytes] = []

    def refuse(data: bytes) -> None:
        if b":l:" in data:
            raise ConnectionResetError

    def load() -> Any:
        proxy.hold = lambda data: asked.append(data) if b":l:" in data else None
        until(lambda: len(asked) >= 4)  # two may undo the acquisition, so two are renewals
        yield 0.0
        return 5

    f = style.cached(load, use_lock=True, name="never_held", version="1")
    with Proxy(redis_server.port) as proxy, recording() as seen:
        proxy.hold = refuse
        with memo.configure(redis_url=proxy.url, deadline=5.0):
            assert style.call(f) == 5
            memo.decorators.assembly.reset()
    assert [e.kind for e in seen if e.kind in {events.LEASE_LOST, events.ERROR}] == [events.ERROR]


@pytest.mark.usefixtures("brief_leases")
@pytest.mark.parametrize("style", STYLES, ids=repr)
def test_a_lease_released_during_its_renewal_is_not_lost(
    style: Style, redis_server: RedisServer
) -> None:
    """A renewal that arrives after the release finds no lease, and that is no event."""
    released = threading.Event()
    with (
        held_up("renew", released) as renewing,
        memo.configure(redis_url=redis_server.url),
        recording() as seen,
    ):
        f = style.cached(lambda: renewing.wait(20), use_lock=True)
        assert style.call(f) is True
        until(lambda: not leases.HELD_LEASES)
        until(lambda: not redis_server.client().keys("memo:2:l:*"))
        released.set()
        until(lambda: not any(t.name == "memo-renew" for t in threading.enumerate()))
    assert events.LEASE_LOST not in [event.kind for event in seen]


@pytest.mark.parametrize("style", STYLES, ids=repr)
def test_a_lease_ends_with_its_computation(style: Style, redis_server: RedisServer) -> None:
    """When a call returns or raises its lease is free, in Redis and on the host."""

    def load(fail: bool) -> None:
        if fail:
            raise LookupError("mine")

    f = style.cached(load, use_lock=True)
    with memo.configure(redis_url=redis_server.url):
        style.call(f, False)
        with pytest.raises(LookupError):
            style.call(f, True)
        assert not redis_server.client().keys("memo:2:l:*")
        memo.decorators.assembly.reset()
    assert not leases.HELD_LEASES


@pytest.mark.usefixtures("brief_leases")
async def test_renewed_while_the_loop_is_blocked(redis_server: RedisServer) -> None:
    """A function that blocks its event loop keeps its lease: a thread renews it."""
    client = redis_server.client()

    @memo.cache(use_lock=True)
    async def load() -> int:
        [name] = client.keys("memo:2:l:*")
        for _ in range(3):
            assert client.persist(name)
            until(lambda: client.pttl(name) > 0)  # it ends again, so it was renewed
        return 5

    with memo.configure(redis_url=redis_server.url, deadline=5):
        assert await load() == 5
        memo.decorators.assembly.reset()


# --- locks of SQLite -----------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "during"])
@pytest.mark.parametrize("name", ["host.sqlite", "entries/cache.db"])
def test_a_lock_on_a_file_costs_no_second_computation(
    cache_home: Path, name: str, when: str
) -> None:
    """A lease holder outlasts a lock on a file: otherwise all waiting callers compute as well."""
    ran: list[int] = []
    held: list[sqlite3.Connection] = []
    timers: list[threading.Timer] = []

    def lock() -> None:
        other = sqlite3.connect(
            cache_home / FOLDER / name, isolation_level=None, check_same_thread=False
        )
        other.execute("BEGIN IMMEDIATE")
        held.append(other)
        timers.append(threading.Timer(0.7, other.close))  # more than the 0.25 s of others
        timers[-1].start()

    @memo.cache(name="leases:first", version="1", ttl=None)
    def first() -> int:
        return 1

    @memo.cache(name="leases:locked", version="1", ttl=None, use_lock=True)
    def load() -> int:
        ran.append(1)
        if when == "during":
            lock()
        return 1

    with memo.configure(tiers=["disk"]):
        first()
        if when == "before":
            lock()
        assert load() == 1
        for timer in timers:
            timer.join()
        assert load() == 1
        assert ran == [1], "it was not stored"


def test_without_a_lease_a_lock_on_a_file_costs_little(cache_home: Path) -> None:
    """A call that computes without a lease waits at most 0.25 s for a file, and has its result."""

    @memo.cache(name="leases:mine", version="1", ttl=None)
    def load(x: int) -> int:
        return x

    with memo.configure(tiers=["disk"]):
        load(0)
        other = sqlite3.connect(cache_home / FOLDER / "entries/cache.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        begun = time.monotonic()
        assert load(1) == 1
        took = time.monotonic() - begun
        other.close()
        assert took < leases.HOLDER_LOCK_SECONDS
        assert not load.is_cached(1)


@pytest.mark.parametrize("count", [2, 300])
def test_a_call_with_many_tags_and_a_lease_is_stored(redis_server: RedisServer, count: int) -> None:
    """However many tags it has, also the same one twice, each of them invalidates it."""
    runs: list[int] = []
    tags = [f"t{at}" for at in range(count)]

    @memo.cache(ttl=None, version="1", name="tests:tagged", use_lock=True, tags=[*tags, tags[0]])
    def load(x: int) -> int:
        runs.append(x)
        return x

    with memo.configure(redis_url=redis_server.url, memory_limit=0, deadline=5):
        load(1), load(1)
        assert runs == [1]
        memo.invalidate(tag=tags[-1])
        assert load(1) == 1
    assert runs == [1, 1]
