"""Redis that is away, slow, cut, damaged, or answers with errors: bounded, told once, recovered."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest
from chaos import BlackHole, Proxy, Scripted, free_port
from redis_records import record
from redis_server import RedisServer

from memo.errors import TierError, TierUnavailable
from memo.records.codec import payload
from memo.records.stamp_types import LOST, Generation, Ref
from memo.runtime import events
from memo.runtime.blocking import BLOCKING, drive
from memo.runtime.events import TIER_DOWN, TIER_UP, Event
from memo.runtime.native import native
from memo.runtime.port import Port
from memo.stores.redis.redis_tier import Redis
from memo.stores.redis.transport import breaker as breakers
from memo.stores.redis.transport.breaker import (
    FIRST_BACKOFF_SECONDS,
    MAX_BACKOFF_SECONDS,
    Breaker,
)
from memo.stores.redis.transport.exchange import MIN_BYTES_PER_SECOND
from memo.stores.redis.transport.faults import CONNECTION_CLOSED, REFUSED, REPLIES, SILENT
from memo.validity.stamps import Turn

Work = Callable[[Port], Coroutine[Any, Any, Any]]
DEADLINE = 0.25
PATIENT = 2.0
"""Seconds of a deadline where time is not what is tested, and the machine may be busy."""
MARGIN = 0.3
"""Seconds that a busy machine may add to a deadline."""


def blocking(work: Work) -> Any:
    return drive(work(BLOCKING))


def looping(work: Work) -> Any:
    async def inside() -> Any:
        return await work(native())

    return asyncio.run(inside())


@pytest.fixture(params=[blocking, looping], ids=["sync", "async"])
def run(request: pytest.FixtureRequest) -> Callable[[Work], Any]:
    """Runs a coroutine over a port: in this thread, or on a loop of its own."""
    looping(_warm)  # neither importing redis-py nor reading settings is measured here
    return request.param


async def _warm(port: Port) -> None:
    import memo.stores.redis.transport.loop_connections
    import memo.stores.redis.transport.thread_connections  # noqa: F401
    from memo.settings import configuration

    configuration.current()


@pytest.fixture
def heard() -> Iterator[list[Event]]:
    """The events of tiers going down and up."""
    found: list[Event] = []
    remove = events.on_event(lambda e: found.append(e) if e.kind in (TIER_DOWN, TIER_UP) else None)
    yield found
    remove()


@pytest.fixture
def proxy(redis_server: RedisServer) -> Iterator[Proxy]:
    with Proxy(redis_server.port) as proxy:
        yield proxy


async def failing(port: Port, work: Work) -> tuple[TierError, float]:
    """The error that some work raises, and how long that took."""
    begun = time.perf_counter()
    with pytest.raises(TierError) as caught:
        await work(port)
    return caught.value, time.perf_counter() - begun


async def answered(port: Port, work: Work, seconds: float) -> Any:
    """Return what some work gives once Redis is asked again, within so many seconds."""
    end = time.monotonic() + seconds
    while True:
        try:
            return await work(port)
        except TierUnavailable:
            assert time.monotonic() < end, "it did not come back"
            await port.sleep(0.01)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


# --- bounds --------------------------------------------------------------------------------------


@pytest.mark.timing
def test_refused(run: Any, heard: list[Event], caplog: pytest.LogCaptureFixture) -> None:
    """Refused: 10 ms once, then 0.1 ms a call; one event, one warning that says how to fix it."""
    tier = Redis(f"redis://ann:s3cret@127.0.0.1:{free_port()}/0")
    lookup = lambda port: tier.lookup(port, "memo:k")

    async def work(port: Port) -> None:
        error, seconds = await failing(port, lookup)
        assert isinstance(error, TierUnavailable)
        assert seconds < 0.01
        quick = [(await failing(port, lookup))[1] for _ in range(100)]
        assert sorted(quick)[50] < 0.0001

    run(work)
    tier.close()
    assert [e.kind for e in heard] == [TIER_DOWN]
    (warning,) = warnings_of(caplog)
    assert "refuses connections" in warning
    assert "redis_url" in warning
    assert "s3cret" not in warning + repr(heard)
    assert "ann" not in (warning + repr(heard)).replace("cannot", "")


def test_a_server_that_is_no_cluster(
    redis_server: RedisServer, run: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The warning names the scheme to write instead."""
    tier = Redis(f"redis+cluster://127.0.0.1:{redis_server.port}")
    run(lambda port: failing(port, lambda port: tier.lookup(port, "memo:k")))
    tier.close()
    (warning,) = warnings_of(caplog)
    assert "is no cluster" in warning
    assert "Write redis:// in redis_url." in warning


def test_sentinels_that_are_down(run: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The warning shows none of redis-py's objects."""
    tier = Redis(f"redis+sentinel://127.0.0.1:{free_port()}/mymaster/0")
    run(lambda port: failing(port, lambda port: tier.lookup(port, "memo:k")))
    tier.close()
    (warning,) = warnings_of(caplog)
    assert "has Sentinels that know no primary [No master found for 'mymaster']." in warning


@pytest.mark.timing
def test_silent(proxy: Proxy, run: Any, heard: list[Event]) -> None:
    """Silent: one deadline, then no call waits, however long it lasts."""
    tier = Redis(proxy.url)
    proxy.mode = "silence"
    lookup = lambda port: tier.lookup(port, "memo:k")

    async def work(port: Port) -> None:
        slow, end = [], time.perf_counter() + 2
        while time.perf_counter() < end:
            _, seconds = await failing(port, lookup)
            if seconds > 0.2:
                slow.append(seconds)
            await port.sleep(0.001)
        assert len(slow) <= 1
        assert max(slow) < DEADLINE + MARGIN

    run(work)
    tier.close()
    assert [e.kind for e in heard] == [TIER_DOWN]


@pytest.mark.timing
def test_dripped_reply(proxy: Proxy, run: Any) -> None:
    """A reply that comes byte by byte is given up at the deadline, not at the last byte."""
    tier = Redis(proxy.url)
    run(lambda port: tier.store(port, "memo:k", b"x" * 500, None, None))
    run(lambda port: tier.lookup(port, "memo:k"))
    proxy.mode = "drip"
    _, seconds = run(lambda port: failing(port, lambda port: tier.lookup(port, "memo:k")))
    assert 0.9 * DEADLINE < seconds < DEADLINE + MARGIN
    tier.close()


@pytest.mark.timing
def test_silent_while_connecting(run: Any) -> None:
    """A host that takes no connection costs a deadline."""
    hole = BlackHole()
    tier = Redis(hole.url)
    _, seconds = run(lambda port: failing(port, lambda port: tier.lookup(port, "memo:k")))
    assert 0.9 * DEADLINE < seconds < DEADLINE + MARGIN
    tier.close()
    hole.close()


@pytest.mark.timing
def test_silent_while_logging_in(run: Any) -> None:
    """A server that never answers to the password costs a deadline."""
    with Scripted(b"") as server:
        tier = Redis(server.url.replace("//", "//ann:s3cret@"))
        error, seconds = run(lambda port: failing(port, lambda port: tier.lookup(port, "memo:k")))
        assert 0.9 * DEADLINE < seconds < DEADLINE + MARGIN
        assert "s3cret" not in str(error)
        tier.close()


@pytest.mark.timing
def test_slow_name(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name whose lookup hangs costs a deadline, and threads share the one that hangs."""
    asked, over = [], threading.Event()

    def hang(*args: Any, **kwargs: Any) -> Any:
        asked.append(args)
        over.wait(0.6)
        raise socket.gaierror("nobody knows")

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    tier = Redis("redis://nowhere.invalid:6379/0")
    for _ in range(2):
        _, seconds = run(lambda port: failing(port, lambda port: tier.lookup(port, "memo:k")))
        assert 0.9 * DEADLINE < seconds < DEADLINE + MARGIN
        patient(tier)
    assert len(asked) <= (1 if run is blocking else 2)  # a loop does not wait for an earlier one
    tier.close()
    over.set()


def test_unresolvable(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that does not exist opens the breaker at once."""

    def unknown(*args: Any, **kwargs: Any) -> Any:
        raise socket.gaierror("nobody knows")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    tier = Redis("redis://nowhere.invalid:6379/0")
    error, _ = run(lambda port: failing(port, lambda port: tier.lookup(port, "memo:k")))
    assert "name" in str(error)
    assert tier.client.breaker.open
    tier.close()


@pytest.mark.timing
@pytest.mark.parametrize(("pause", "arrives"), [(0.03, True), (0.3, False)])
def test_big_replies_have_more_time(run: Any, pause: float, arrives: bool) -> None:
    """A payload may take 0.25 s and a second for each 50 MB of it; a slower one is given up."""
    size = 40_000_000
    with Scripted(b"$%d\r\n%s\r\n" % (size, bytes(size)), echoes=True) as server:
        server.piece, server.pause = 4_000_000, pause
        tier = Redis(server.url)
        fetch = lambda port: tier.payload(port, bytes(32), size)
        begun = time.perf_counter()
        if arrives:
            assert run(fetch) is not None
            assert time.perf_counter() - begun > DEADLINE
        else:
            assert (
                run(lambda port: failing(port, fetch))[1] < DEADLINE + size / MIN_BYTES_PER_SECOND
            )
        tier.close()


@pytest.mark.parametrize(("seconds", "times"), [(0.1, 100), (1.1, 4)])
def test_busy_loop_is_not_held_against_redis(
    redis_server: RedisServer, seconds: float, times: int
) -> None:
    """A loop that is blocked again and again does not make Redis late, connecting included."""
    tier = Redis(redis_server.url)

    async def work(port: Port) -> None:
        async def block() -> None:
            for _ in range(times):
                time.sleep(seconds)
                await asyncio.sleep(0)

        blocker = asyncio.create_task(block())
        for _ in range(3):
            await tier.lookup(port, "memo:k")
            tier.client.connections.loops[port.loop].flush()
        blocker.cancel()

    looping(work)
    assert tier.outages == 0
    tier.close()


@pytest.mark.timing
def test_many_callers_of_a_silent_server(proxy: Proxy) -> None:
    """With a thousand callers at once a silent server costs each a deadline at most."""
    tier = Redis(proxy.url)
    proxy.mode = "silence"

    async def work(port: Port) -> None:
        begun = time.perf_counter()
        calls = (failing(port, lambda port: tier.lookup(port, "memo:k")) for _ in range(1000))
        await asyncio.gather(*calls)
        assert time.perf_counter() - begun < 2 * DEADLINE + 3 * MARGIN

    looping(work)
    tier.close()


# --- cut and damaged -----------------------------------------------------------------------------


def operations(tier: Redis) -> dict[str, Work]:
    sent = payload((memoryview(b"y" * 300),))
    refs = [Ref("n"), Ref("f:m:f", (("a", "0" * 16),))]
    return {
        "lookup": lambda port: tier.lookup(port, "memo:k"),
        "payload": lambda port: tier.payload(port, sent.digest, sent.size),
        "store": lambda port: tier.store(port, "memo:j", b"v", sent, 5),
        "drop": lambda port: tier.drop(port, "memo:i"),
        "clear": lambda port: tier.clear(port, "memo:i"),
        "states": lambda port: tier.states(port, refs),
        "begin": lambda port: tier.stamp_states(port, refs),
        "turn": lambda port: tier.turn(port, [Turn("t:x")], "{}"),
        "notes": lambda port: tier.notes(port, refs[0]),
        "acquire": lambda port: tier.leases.acquire(port, "x", "me"),
        "release": lambda port: tier.leases.release(port, "x", "me"),
    }


def patient(tier: Redis) -> None:
    """Let the breaker forget, so that each fault is met by itself."""
    tier.client.breaker = Breaker("redis", tier.client.where)


@pytest.mark.parametrize("name", list(operations(Redis("redis://x"))))
def test_cut_at_every_byte(proxy: Proxy, run: Any, name: str) -> None:
    """Cut at any byte of a reply an operation fails as a TierError or works, and the next works."""
    tier = Redis(proxy.url, deadline=PATIENT)
    run(operations(tier)[name])
    tier.close()
    for at in range(0, 60, 1 if name in ("lookup", "states") else 7):
        proxy.cut_at = at
        with contextlib.suppress(TierError):
            run(operations(tier)[name])
        assert tier.client.breaker.fault in (None, CONNECTION_CLOSED)
        proxy.cut_at = None
        patient(tier)
        tier.close()
        run(operations(tier)[name])
    tier.close()


def test_flipped_byte(proxy: Proxy, run: Any) -> None:
    """With any byte of a reply damaged the answer is damaged or an error, and the next is right."""
    tier = Redis(proxy.url, deadline=0.05)
    refs = [Ref("n"), Ref("t:x")]
    right = run(lambda port: tier.stamp_states(port, refs))

    async def work(port: Port) -> None:
        for at in range(90):
            proxy.flip_at = at
            tier.close()
            for _ in range(2):
                patient(tier)
                try:
                    states = await tier.states(port, refs)
                except TierError:
                    continue
                assert len(states) == len(right)
            proxy.flip_at = None
            proxy.cut_all()
            patient(tier)
            tier.client.deadline = 1.0
            assert await tier.states(port, refs) == right
            tier.client.deadline = 0.05

    run(work)
    tier.close()


def test_answers_of_others_are_not_taken(redis_server: RedisServer, run: Any) -> None:
    """A reply that answers another question is never taken for one's own."""
    stale = b"*3\r\n$4\r\n9999\r\n$16\r\nAAAAAAAAAAAAAAAA\r\n$0\r\n\r\n"
    with Scripted(stale) as server:
        tier = Redis(server.url, deadline=PATIENT)
        error, _ = run(lambda port: failing(port, lambda port: tier.states(port, [Ref("n")])))
        assert "RESP" in str(error)
        tier.close()


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"\x15\x03\x03\x00\x02\x02\x28",
        b"+OK\r\n",
        b":1\r\n",
        b"$-1\r\n",
        b"*0\r\n",
        b"*-1\r\n",
        b"$99999999999\r\n",
        b"*99999999999\r\n",
        b"*536870911\r\n",
        b"*1000000\r\n",
        b"\x00" * 100,
        b"-\r\n",
        b"-MOVED\r\n",
        b"-MOVED x y\r\n",
        b"\xff\xfe\r\n",
        b"-ERR \xff\xfe\r\n",
    ],
)
def test_another_protocol(answer: bytes, run: Any) -> None:
    """Any unexpected reply of a server is a TierError in bounded time."""
    with Scripted(answer) as server:
        for name in ("lookup", "states", "turn", "payload", "store", "clear", "drop", "notes"):
            tier = Redis(server.url, deadline=0.1)
            begun = time.perf_counter()
            try:
                run(operations(tier)[name])
            except TierError:
                pass
            else:
                assert answer in (b":1\r\n", b"$-1\r\n", b"*0\r\n", b"*-1\r\n", b"+OK\r\n")
            assert time.perf_counter() - begun < 1.5
            tier.close()


@pytest.mark.parametrize("code", [c for c in REPLIES if c not in ("NOSCRIPT", "MAXCLIENTS")])
def test_error_replies(code: str, run: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Every error reply is a TierError with its code's meaning, and one warning."""
    fault = REPLIES[code]
    text = {"MOVED": "1 127.0.0.1:1", "ASK": "1 127.0.0.1:1", "WRONGPASS": "invalid pair"}
    with Scripted(f"-{code} {text.get(code, 'some text')}\r\n".encode()) as server:
        tier = Redis(server.url, deadline=PATIENT)
        for _ in range(4):
            error, _ = run(lambda port: failing(port, lambda port: tier.lookup(port, "memo:k")))
            assert isinstance(error, TierUnavailable) == fault.down
            assert fault.text in str(error)
        assert tier.client.breaker.open == fault.down
        tier.close()
    assert len(warnings_of(caplog)) == 1


def test_error_inside_old_scripts(run: Any) -> None:
    """Redis 6.2 wraps the code of an error inside a script; it is found all the same."""
    text = "-ERR Error running script (call to f_1): @user_script:3: -READONLY You can't write\r\n"
    with Scripted(text.encode()) as server:
        tier = Redis(server.url, deadline=PATIENT)
        error, _ = run(lambda port: failing(port, lambda port: tier.turn(port, [Turn("n")], "")))
        assert "replica" in str(error)
        tier.close()


def test_too_many_clients(redis_server: RedisServer, run: Any) -> None:
    """A server that has too many clients is left alone."""
    client = redis_server.client()
    client.config_set("maxclients", 1)
    tier = Redis(redis_server.url, deadline=PATIENT)
    error, _ = run(lambda port: failing(port, lambda port: tier.lookup(port, "memo:k")))
    assert "too many clients" in str(error)
    tier.close()
    client.config_set("maxclients", 1000)


def test_no_password(redis_server: RedisServer, run: Any) -> None:
    """A server that wants a password, or another one, is left alone, and the message says so."""
    client = redis_server.client()
    client.config_set("requirepass", "right")
    try:
        for url, text in (
            (redis_server.url, "asks for a password"),
            (redis_server.url.replace("//", "//:wr0ng@"), "refuses this user or password"),
        ):
            tier = Redis(url, deadline=PATIENT)
            error, _ = run(lambda port, t=tier: failing(port, lambda port: t.lookup(port, "k")))
            assert text in str(error)
            assert "wr0ng" not in str(error)
            assert tier.client.breaker.open
            tier.close()
    finally:
        client.config_set("requirepass", "")


def test_full_server(redis_server: RedisServer, run: Any) -> None:
    """A full Redis takes no entries, but reads, leases and above all invalidations still work."""
    tier = Redis(redis_server.url, deadline=PATIENT)
    refs = [Ref("n"), Ref("f:m:f", (("a", "0" * 16),))]
    before = run(lambda port: tier.stamp_states(port, refs[:1]))
    run(lambda port: tier.store(port, "memo:k", b"v", None, None))
    redis_server.client().config_set("maxmemory", 1)
    with pytest.raises(TierError, match="OOM"):
        run(lambda port: tier.store(port, "memo:j", b"v" * 100, None, None))
    assert run(lambda port: tier.lookup(port, "memo:k")).record == b"v"
    run(lambda port: tier.turn(port, [Turn("n"), Turn("f:m:f", (("a", "0" * 16),))], "{}"))
    after = run(lambda port: tier.stamp_states(port, refs))
    assert after[0] != before[0]
    assert all(state.text for state in after)
    assert run(lambda port: tier.leases.acquire(port, "x", "me")) is None
    assert run(lambda port: tier.leases.renew(port, "x", "me")) is True
    assert run(lambda port: tier.leases.release(port, "x", "me")) is True
    assert not tier.client.breaker.open
    tier.close()


def test_read_only_replica(redis_server: RedisServer, run: Any) -> None:
    """A read-only replica is read, and its refusal to write does not open the breaker."""
    tier = Redis(redis_server.url, deadline=PATIENT)
    run(lambda port: tier.store(port, "memo:k", b"v", None, None))
    client = redis_server.client()
    client.replicaof("127.0.0.1", free_port())
    try:
        for name in ("store", "turn", "acquire"):
            with pytest.raises(TierError, match="replica"):
                run(operations(tier)[name])
        assert tier.read_only
        assert run(lambda port: tier.stamp_states(port, [Ref("never")])) == [LOST]
        assert run(lambda port: tier.lookup(port, "memo:k")).record == b"v"
        assert not tier.client.breaker.open
    finally:
        client.replicaof("NO", "ONE")
        tier.close()


def test_stuck_in_a_script(redis_server: RedisServer, run: Any) -> None:
    """A server that is stuck in a user's script is left alone until it is free again."""
    client = redis_server.client(socket_timeout=0.2)
    client.config_set("lua-time-limit", 10)
    tier = Redis(redis_server.url)
    run(lambda port: tier.lookup(port, "memo:k"))
    with pytest.raises(Exception, match="Timeout"):
        client.eval("while true do end", 0)
    try:
        for _ in range(3):
            error, seconds = run(lambda port: failing(port, lambda p: tier.lookup(p, "memo:k")))
            assert seconds < DEADLINE + 1.0
        assert "script" in str(error)
    finally:
        redis_server.client().script_kill()
        tier.close()


def test_foreign_types(redis_server: RedisServer, run: Any) -> None:
    """A value of a foreign type at any key of ours is a TierError, and the tier goes on."""
    client = redis_server.client()
    tier = Redis(redis_server.url, deadline=PATIENT)
    sent = payload((memoryview(b"y" * 300),))
    mark = Generation(Ref("n"), LOST)
    for key, names in (
        ("memo:2:k", ["lookup"]),
        (f"memo:2:p:{sent.digest.hex()}", ["payload"]),
        ("memo:2:g:{n}", ["states", "notes"]),
        ("memo:2:l:{x}", ["acquire", "release"]),
    ):
        client.lpush(key, "foreign")
        for name in names:
            with pytest.raises(TierError, match="WRONGTYPE"):
                run(operations(tier)[name])
        client.delete(key)
        for name in names:
            run(operations(tier)[name])
        run(lambda port: tier.store(port, "memo:k", record(mark), None, None))
    assert not tier.client.breaker.open
    tier.close()


def test_forbidden_key(redis_server: RedisServer, run: Any) -> None:
    """A Redis user without access to memo's keys gets a TierError that says so."""
    client = redis_server.client()
    client.acl_setuser("bob", enabled=True, nopass=True, keys=["other:*"], commands=["+@all"])
    tier = Redis(redis_server.url.replace("//", "//bob:x@"))
    try:
        for name in ("lookup", "states", "turn", "store", "acquire"):
            with pytest.raises(TierError, match="forbids"):
                run(operations(tier)[name])
        assert not tier.client.breaker.open
    finally:
        tier.close()
        client.acl_deluser("bob")


# --- going and coming ----------------------------------------------------------------------------


@pytest.mark.timing
def test_killed_and_restarted(
    redis_server: RedisServer, run: Any, heard: list[Event], caplog: pytest.LogCaptureFixture
) -> None:
    """Killed in mid-run Redis costs milliseconds; restarted it is used again by itself."""
    caplog.set_level(logging.INFO, "memo")
    tier = Redis(redis_server.url)
    lookup = lambda port: tier.lookup(port, "memo:k")

    async def work(port: Port) -> None:
        await tier.store(port, "memo:k", b"v", None, None)
        redis_server.kill()
        outages = tier.outages
        _, seconds = await failing(port, lookup)
        assert seconds < 0.01
        assert tier.outages > outages
        assert (await failing(port, lookup))[1] < 0.001
        redis_server.restart()
        assert await answered(port, lookup, 2 * FIRST_BACKOFF_SECONDS + 1) is not None

    run(work)
    tier.close()
    assert [e.kind for e in heard] == [TIER_DOWN, TIER_UP]
    assert len(warnings_of(caplog)) == 1
    assert any("answers again" in r.getMessage() for r in caplog.records)


@pytest.mark.timing
def test_frozen_and_thawed(redis_server: RedisServer, run: Any, heard: list[Event]) -> None:
    """Frozen Redis is probed in the background: no call waits, and its return is noticed."""
    tier = Redis(redis_server.url)

    async def work(port: Port) -> None:
        await tier.lookup(port, "memo:k")
        redis_server.freeze()
        while not tier.client.breaker.open:
            await failing(port, lambda port: tier.lookup(port, "memo:k"))
        end = time.monotonic() + 1
        while time.monotonic() < end:
            _, seconds = await failing(port, lambda port: tier.lookup(port, "memo:k"))
            assert seconds < 0.02
            await port.sleep(0.005)
        redis_server.thaw()
        await answered(port, lambda port: tier.lookup(port, "memo:k"), MAX_BACKOFF_SECONDS)

    run(work)
    tier.close()
    assert [e.kind for e in heard] == [TIER_DOWN, TIER_UP]


def test_idle_connections_that_died(redis_server: RedisServer, run: Any) -> None:
    """A restart between two calls, or a firewall that forgets connections, costs no answer."""
    tier = Redis(redis_server.url, deadline=PATIENT)

    async def work(port: Port) -> None:
        if port.native:
            await asyncio.gather(*(tier.lookup(port, "memo:k") for _ in range(10)))
        await tier.store(port, "memo:k", b"v", None, None)
        for _ in range(3):
            redis_server.client().client_kill_filter(_type="normal", skipme=True)
            found = await tier.lookup(port, "memo:k")
            assert found is not None

    run(work)
    assert tier.outages == 0
    tier.close()


def test_cut_with_reset(proxy: Proxy, run: Any) -> None:
    """Connections that are reset while idle are replaced."""
    tier = Redis(proxy.url, deadline=PATIENT)

    async def work(port: Port) -> None:
        for _ in range(5):
            await tier.lookup(port, "memo:k")
            proxy.cut_all(reset=True)

    run(work)
    assert tier.outages == 0
    tier.close()


def test_no_secret_in_a_traceback(run: Any) -> None:
    """Neither message nor traceback nor anything chained to an error shows user or password."""
    import traceback

    tier = Redis(f"redis://ann:s3cret@127.0.0.1:{free_port()}/0")
    error, _ = run(lambda port: failing(port, lambda port: tier.lookup(port, "memo:k")))
    assert "s3cret" not in "".join(traceback.format_exception(error))
    tier.close()


# --- the breaker by itself -----------------------------------------------------------------------


class Time:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def broken() -> tuple[Breaker, Time]:
    clock = Time()
    return Breaker("redis", "host:1/0", clock), clock


def test_breaker_opens_after_one_refusal_or_silence_or_two_cuts(heard: list[Event]) -> None:
    """One refusal or silence opens it, so do two cuts in a row; one cut and a success do not."""
    for fault in (REFUSED, SILENT):
        one, _ = broken()
        one.record_fault(fault)
        assert one.open
    two, _ = broken()
    two.record_fault(CONNECTION_CLOSED)
    two.record_success()
    two.record_fault(CONNECTION_CLOSED)
    assert not two.open
    two.record_fault(CONNECTION_CLOSED)
    assert two.open


def test_breaker_lets_one_probe(heard: list[Event]) -> None:
    """After the back-off one caller probes, the others are turned away; its success closes it."""
    breaker, clock = broken()
    breaker.record_fault(REFUSED)
    with pytest.raises(TierUnavailable):
        breaker.admit()
    clock.now += FIRST_BACKOFF_SECONDS
    assert breaker.admit() is True
    with pytest.raises(TierUnavailable):
        breaker.admit()
    breaker.record_success()
    assert breaker.admit() is False
    assert [e.kind for e in heard] == [TIER_DOWN, TIER_UP]
    assert heard[1].seconds == pytest.approx(FIRST_BACKOFF_SECONDS)


def test_breaker_backs_off(heard: list[Event]) -> None:
    """Each failed probe doubles the back-off up to its limit, and the outage stays one outage."""
    breaker, clock = broken()
    breaker.record_fault(REFUSED)
    waits = []
    for _ in range(8):
        begun = clock.now
        while True:
            try:
                assert breaker.admit()
                break
            except TierUnavailable:
                clock.now += 0.01
        waits.append(clock.now - begun)
        breaker.record_fault(REFUSED, probe=True)
    for number, wait in enumerate(waits):
        longest = min(MAX_BACKOFF_SECONDS, FIRST_BACKOFF_SECONDS * 2**number)
        assert (1 - breakers.BACKOFF_JITTER) * longest - 0.02 <= wait <= longest + 0.02
    assert [e.kind for e in heard] == [TIER_DOWN]


def test_breaker_remembers_flapping(heard: list[Event]) -> None:
    """A server that comes and goes is trusted more slowly each time; one that held, at once."""
    breaker, clock = broken()
    for _ in range(4):
        breaker.record_fault(REFUSED)
        clock.now = max(clock.now, breaker.retry_at)
        assert breaker.admit()
        breaker.record_success()
    breaker.record_fault(REFUSED)
    assert breaker.retry_at - clock.now > 2 * FIRST_BACKOFF_SECONDS
    clock.now = breaker.retry_at
    assert breaker.admit()
    breaker.record_success()
    clock.now += MAX_BACKOFF_SECONDS
    breaker.record_fault(REFUSED)
    assert breaker.retry_at - clock.now <= FIRST_BACKOFF_SECONDS


def test_breaker_survives_a_lost_probe() -> None:
    """A probe that was cancelled, or never reports back, is replaced by another."""
    breaker, clock = broken()
    breaker.record_fault(REFUSED)
    clock.now += FIRST_BACKOFF_SECONDS
    assert breaker.admit()
    breaker.abandon_probe()
    assert breaker.admit()
    clock.now += breakers.PROBE_LIFE_SECONDS
    assert breaker.admit()


def test_late_failures_do_not_prolong_an_outage() -> None:
    """Questions that were under way when it opened fail without changing the back-off."""
    breaker, _ = broken()
    breaker.record_fault(REFUSED)
    before = breaker.retry_at
    for _ in range(10):
        breaker.record_fault(SILENT)
    assert breaker.retry_at == before
