"""Time: ttl in all its forms, live ttls, and refreshes in the background."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import math
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from checkout import ROOT, SUPPORT
from folders import FOLDER
from hypothesis import given, settings
from hypothesis import strategies as st
from inner_faults import failing
from inside import inside, set_clock
from ports import run, start
from providers import InADict
from redis_server import RedisServer
from styles import STYLES, Style
from time_ahead import Ahead
from waiting import await_until, until

import memo
from memo.coordination import leases
from memo.metrics.running_computations import COMPUTATIONS
from memo.records.stamp_types import Times
from memo.runtime import events
from memo.runtime.clock import SECOND
from memo.settings.options import Policy
from memo.testing import ManualClock, isolated, recording
from memo.validity import check

styles = pytest.mark.parametrize("style", STYLES, ids=repr)


class Source:
    """The source that functions of these tests load; without a sound key, so it changes none."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.runs = 0
        self.fail = False
        self.seconds = 0.0
        self.seen: list[Any] = []

    def load(self) -> int:
        with self.lock:
            self.runs += 1
            number = self.runs
        if self.fail:
            raise ConnectionError("source is away")
        return number


@pytest.fixture
def source() -> Source:
    return Source()


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


def cached(style: Style, source: Source, **options: Any) -> Any:
    def load(x: int = 0) -> Any:
        number = source.load()
        if source.seconds:
            yield source.seconds
        return number

    return style.cached(load, version="1", **options)


def settled(style: Style, f: Any, *args: Any) -> Any:
    """One call, and then the end of what it has begun in the background."""
    if style.is_async:

        async def inside() -> Any:
            answer = await f(*args)
            assert await memo.drain(10)
            return answer

        return asyncio.run(inside())
    answer = style.call(f, *args)
    assert memo.runtime.blocking.drain_blocking(10)
    return answer


# --- ttl -----------------------------------------------------------------------------------------


@styles
@pytest.mark.parametrize(
    ("ttl", "seconds"),
    [
        (90, 90),
        (0.5, 0.5),
        (timedelta(minutes=2), 120),
        ("1h30m", 5400),
        ("250ms", 0.25),
        ("2 d", 172_800),
        (lambda result: 10 + result, 11),
        (lambda result: timedelta(seconds=20 * result), 20),
        (lambda result: "30s", 30),
    ],
    ids=["int", "float", "timedelta", "text", "ms", "days", "call", "call timedelta", "call text"],
)
def test_every_form_of_ttl(
    style: Style, source: Source, clock: ManualClock, ttl: Any, seconds: float
) -> None:
    """A result is fresh for exactly as long as its ttl says, in each of its forms."""
    f = cached(style, source, ttl=ttl)
    with isolated(clock=clock):
        assert style.call(f) == 1
        clock.advance(seconds * 0.99)
        assert style.call(f) == 1
        clock.advance(seconds * 0.02)
        assert style.call(f) == 2


@styles
@pytest.mark.parametrize("ttl", [None, lambda result: None], ids=["none", "callable"])
def test_no_expiry(style: Style, source: Source, clock: ManualClock, ttl: Any) -> None:
    """None means that nothing expires."""
    f = cached(style, source, ttl=ttl)
    with isolated(clock=clock):
        style.call(f)
        clock.advance(10 * 365 * 86_400)
        assert style.call(f) == 1


@styles
@pytest.mark.parametrize("answer", [0, -1, True, "5", math.nan, b"5s"], ids=repr)
def test_a_ttl_callable_that_gives_nonsense(style: Style, source: Source, answer: Any) -> None:
    """Then the result is returned and not stored, and an event says why (I5)."""
    f = cached(style, source, ttl=lambda result: answer)
    with recording() as seen:
        assert style.call(f) == 1
    assert style.call(f) == 2
    assert next(e.detail for e in seen if e.kind == events.ERROR).startswith("OptionError: ttl=")


@settings(deadline=None)
@given(
    ttl=st.floats(min_value=0.001, max_value=1e8),
    draw=st.floats(min_value=0, max_value=1, exclude_max=True),
)
def test_jitter_never_lengthens(ttl: float, draw: float) -> None:
    """With `use_jitter` a ttl lies between 90 % and 100 % of what was promised, never above."""
    import random
    from unittest.mock import patch

    jittered = Policy(ttl=ttl, use_jitter=True)
    with patch.object(random, "random", lambda: draw):
        got = check.ttl_ns(jittered, None)
        live = check.ttl_ns(jittered, None, live_ttl=ttl)
    assert got == live
    assert got <= ttl * SECOND
    assert got >= min(1, ttl * SECOND)
    assert got >= int(ttl * SECOND * 0.9 * (1 - 1e-12)) - 1  # floats have 16 digits


def test_jitter_spreads() -> None:
    """A thousand entries of one ttl expire over all of the tenth, not together."""
    jittered = Policy(ttl=1000.0, use_jitter=True)
    drawn = sorted(check.ttl_ns(jittered, None) / SECOND for _ in range(1000))
    assert 900 <= drawn[0] < 910
    assert 990 < drawn[-1] <= 1000
    assert check.ttl_ns(Policy(ttl=1000.0), None) == 1000 * SECOND


@styles
def test_jitter_of_a_function(style: Style, source: Source, clock: ManualClock) -> None:
    """Entries of a function with `use_jitter` are gone by their ttl, and some of them before."""
    f = cached(style, source, ttl=100, use_jitter=True)
    with isolated(clock=clock):
        for x in range(40):
            style.call(f, x)
        clock.advance(89.9)
        assert all(f.is_cached(x) for x in range(40))
        clock.advance(5)
        assert 0 < sum(f.is_cached(x) for x in range(40)) < 40
        clock.advance(5.2)
        assert not any(f.is_cached(x) for x in range(40))


@styles
def test_jitter_of_a_live_ttl(style: Style, source: Source, clock: ManualClock) -> None:
    """A live ttl is shortened as well, for entries that exist, and always alike for one entry."""
    f = cached(style, source, ttl=60, use_jitter=True, ttl_key="ttl.spread")
    with isolated(clock=clock):
        for x in range(40):
            style.call(f, x)
        memo.live["ttl.spread"] = 1000
        clock.advance(899)
        assert all(f.is_cached(x) for x in range(40))
        clock.advance(50)
        left = [x for x in range(40) if f.is_cached(x)]
        assert 0 < len(left) < 40
        assert left == [x for x in range(40) if f.is_cached(x)]
        clock.advance(52)
        assert not any(f.is_cached(x) for x in range(40))


# --- live ttls -----------------------------------------------------------------------------------


@styles
def test_live_ttl_acts_on_entries_that_exist(
    style: Style, source: Source, clock: ManualClock
) -> None:
    """A live ttl counts from now on, shorter or longer, also for what is stored; and goes again."""
    f = cached(style, source, ttl=60, ttl_key="ttl.products")
    with isolated(clock=clock):
        assert style.call(f) == 1
        clock.advance(30)
        memo.live["ttl.products"] = 20
        assert not f.is_cached()
        memo.live["ttl.products"] = 40
        assert f.is_cached()
        clock.advance(5000)
        assert not f.is_cached()
        memo.live["ttl.products"] = "2h"
        assert style.call(f) == 1
        memo.live["ttl.products"] = None
        clock.advance(70_000)
        assert style.call(f) == 1
        del memo.live["ttl.products"]
        assert style.call(f) == 2


@styles
def test_an_entry_outlives_a_short_ttl(style: Style, source: Source, clock: ManualClock) -> None:
    """An entry stored with a short ttl is still there when the live ttl is raised."""
    f = cached(style, source, ttl=0.05, ttl_key="ttl.short")
    plain = cached(style, source, ttl=0.05, name="plain")
    with isolated(clock=clock):
        assert style.call(f) == 1
        style.call(plain)
        memo.decorators.assembly.reset()  # so that the memory tier has nothing
        set_clock(clock)
        clock.advance(0.3)
        assert not f.is_cached()
        memo.live["ttl.short"] = 60
        assert style.call(f) == 1


@styles
def test_a_live_ttl_is_that_of_new_entries(
    style: Style, source: Source, clock: ManualClock
) -> None:
    """A result is stored with the live ttl, not with the decorator's."""
    f = cached(style, source, ttl=60, ttl_key="ttl.new")
    with isolated(clock=clock):
        memo.live["ttl.new"] = 1000
        style.call(f)
        clock.advance(900)
        assert style.call(f) == 1
        clock.advance(200)
        assert style.call(f) == 2


@styles
def test_a_long_live_ttl_keeps_what_is_stored_for_so_long(style: Style, source: Source) -> None:
    """Tiers are told to keep an entry for the live ttl that was in force when it was stored."""
    told: list[float] = []

    class Told(InADict):
        async def set(self, key: str, value: bytes, ttl: float | None = None) -> None:
            told.append(ttl or 0)
            await super().set(key, value, ttl)

    f = cached(style, source, ttl=60, ttl_key="ttl.long", provider=Told())
    memo.live["ttl.long"] = "30d"
    style.call(f)
    assert 30 * 86_400 - 5 < max(told) <= 30 * 86_400


@styles
def test_live_ttl_from_a_file(style: Style, source: Source, tmp_path: Path) -> None:
    """A TOML file that is changed acts on entries that exist, within a second."""
    path = tmp_path / "live.toml"
    path.write_text("[ttl]\nfile = 60\n")
    f = cached(style, source, ttl=0.001, ttl_key="ttl.file")
    with memo.configure(live_file=path):
        assert style.call(f) == 1
        assert style.call(f) == 1
        path.write_text('[ttl]\nfile = "1ms"\n')
        until(lambda: not f.is_cached(), 3.0)
        assert style.call(f) == 2


LIVE = """
import sys, time
import memo
from waiting import until
memo.configure(redis_url=sys.argv[1], directory=sys.argv[2])
@memo.cache(ttl=60, ttl_key="ttl.shared", name="shared", version="1")
def load():
    return time.time()
first = load()
print("loaded", flush=True)
sys.stdin.readline()
time.sleep(1.0)           # nothing is asked meanwhile
print(load() == first, memo.live.get("ttl.shared"), flush=True)
sys.stdin.readline()
until(lambda: load() and memo.live.get("ttl.shared") is None)
print(time.time(), flush=True)
"""


def test_shared_live_ttl_reaches_all_kernels(redis_server: RedisServer, tmp_path: Path) -> None:
    """`memo.live.set(..., shared=True)` counts everywhere within a second, calls or not."""
    kernels = [start(LIVE, redis_server.url, tmp_path / host) for host in ("a", "b")]
    try:
        for kernel in kernels:
            assert kernel.stdout is not None
            assert kernel.stdin is not None
            assert kernel.stdout.readline() == "loaded\n"
        with memo.configure(redis_url=redis_server.url):
            memo.live.set("ttl.shared", "1ms", shared=True)
            for kernel in kernels:
                kernel.stdin.write("\n")  # type: ignore[union-attr]
                kernel.stdin.flush()  # type: ignore[union-attr]
            for kernel in kernels:
                assert kernel.stdout.readline() == "False 0.001\n"  # type: ignore[union-attr]
                kernel.stdin.write("\n")  # type: ignore[union-attr]
                kernel.stdin.flush()  # type: ignore[union-attr]
            deleted = time.time()
            assert memo.live.delete("ttl.shared", shared=True) in (True, False)
            for kernel in kernels:
                seen = float(kernel.stdout.readline())  # type: ignore[union-attr]
                assert seen - deleted < 1.0
            memo.decorators.assembly.reset()
    finally:
        for kernel in kernels:
            kernel.kill()
            kernel.communicate()


@styles
def test_shared_live_ttl_here(style: Style, source: Source, redis_server: RedisServer) -> None:
    """The process that sets a shared ttl sees it at the next call, and keeps it without Redis."""
    f = cached(style, source, ttl=60, ttl_key="ttl.here")
    with memo.configure(redis_url=redis_server.url):
        assert style.call(f) == 1
        memo.live.set("ttl.here", "1ms", shared=True)
        until(lambda: not f.is_cached())
        assert style.call(f) == 2
        redis_server.kill()
        with recording() as seen:
            until(lambda: f.is_cached() or "live configuration" in [e.reason for e in seen])
        assert style.call(f) == 3
        assert memo.live["ttl.here"] == 0.001
        redis_server.restart()
        memo.decorators.assembly.reset()
    assert "ttl.here" not in memo.live


LOOKS: dict[str, Callable[[Any], Any]] = {
    "call": lambda f: f() == 1,
    "is_cached": lambda f: f.is_cached(),
    "peek": lambda f: f.peek() == 1,
}


@pytest.mark.parametrize("how", LOOKS)
def test_every_look_asks_the_shared_source(
    source: Source, how: str, clock: ManualClock, redis_server: RedisServer
) -> None:
    """A shared ttl is asked for by a call, also one that memory answers, and by a look."""
    f = cached(STYLES[0], source, ttl=60, ttl_key="ttl.asked")
    with isolated(clock=clock, redis_url=redis_server.url):
        assert f() == f() == 1
        memo.live.set("ttl.asked", "1ms", shared=True)
        clock.advance(0.005)
        assert not LOOKS[how](f)


def test_shared_without_redis_is_an_error() -> None:
    """If no Redis is configured, `shared=True` is an error that says what to set."""
    with pytest.raises(memo.OptionError, match="set redis_url first"):
        memo.live.set("ttl.x", 5, shared=True)


# --- age -----------------------------------------------------------------------------------------

ELSEWHERE = bytes(range(16))
"""The start of another machine."""


@pytest.mark.parametrize(
    ("ttl", "ahead", "kind", "reason"),
    [
        (100, 30, "fresh", ""),
        (100, 59, "fresh", ""),
        (100, 61, "miss", "clock"),
        (-1, 61, "miss", "clock"),
        (-1, -(10**6), "fresh", ""),
        (100, -99, "fresh", ""),
        (100, -101, "miss", "expired"),
    ],
)
def test_age_of_another_hosts_entry(
    clock: ManualClock, ttl: int, ahead: int, kind: str, reason: str
) -> None:
    """It is told by the wall clocks; what comes from the future has no age and is not believed."""
    finished = clock.wall_ns() + ahead * SECOND
    lasts = ttl * SECOND if ttl > 0 else ttl
    times = Times(finished, finished, ELSEWHERE, 0, lasts, 0, 0)
    asked = Policy(ttl=ttl if ttl > 0 else None)
    assert check.judge(times, asked, clock)[:2] == (kind, reason)


def test_age_of_this_hosts_entry(clock: ManualClock) -> None:
    """It is told by the clock that counts from the start of the machine and never steps (I9)."""
    times = Times(
        clock.wall_ns(), clock.wall_ns(), clock.boot_id, clock.boot_ns(), 100 * SECOND, 0, 0
    )
    for step in (-(10**6), 10**7, -5):
        clock.step(step)
        assert check.judge(times, Policy(ttl=100), clock).kind == "fresh"
    clock.advance(99)
    assert check.judge(times, Policy(ttl=100), clock).kind == "fresh"
    clock.advance(2)
    assert check.judge(times, Policy(ttl=100), clock).kind == "miss"


# --- stale windows -------------------------------------------------------------------------------


@styles
@pytest.mark.parametrize(
    ("revalidate", "if_error"), [(10, 50), (50, 10), (0, 50), (50, 0)], ids=lambda n: str(n)
)
def test_the_two_windows_are_separate(
    style: Style, source: Source, clock: ManualClock, revalidate: int, if_error: int
) -> None:
    """`stale_while_revalidate` answers at once, `stale_if_error` after an error."""
    windows = {"stale_while_revalidate": revalidate, "stale_if_error": if_error}
    f = cached(style, source, ttl=100, **windows)
    with isolated(clock=clock), recording() as seen:
        assert style.call(f) == 1
        source.fail = True
        for past in (5, 30, 70):
            clock.advance(100 + past if past == 5 else (past - (5 if past == 30 else 30)))
            del seen[:]
            if past < max(revalidate, if_error):
                assert settled(style, f) == 1
                reasons = [event.reason for event in seen if event.kind == events.STALE]
                at_once = past < revalidate
                assert reasons == ["expired" if at_once else "error: ConnectionError"]
            else:
                with pytest.raises(ConnectionError):
                    style.call(f)


# --- refreshes -----------------------------------------------------------------------------------


@styles
@pytest.mark.parametrize("window", ["ahead", "revalidate"])
def test_a_stale_answer_does_not_wait(
    style: Style, source: Source, clock: ManualClock, window: str
) -> None:
    """A stale answer comes at the speed of a hit, while a job of half a second refreshes it."""
    options: dict[str, Any] = {"refresh_ahead": True, "refresh_threshold": 0.5}
    if window == "revalidate":
        options = {"stale_while_revalidate": 100}
    f = cached(style, source, ttl=100, **options)
    with isolated(clock=clock), recording() as seen:
        style.call(f)
        clock.advance(60 if window == "ahead" else 110)
        source.seconds = 0.5
        waits: list[float] = []

        def calls() -> None:
            for _ in range(20):
                begun = time.perf_counter()
                assert f() == 1
                waits.append(time.perf_counter() - begun)

        async def acalls() -> None:
            for _ in range(20):
                begun = time.perf_counter()
                assert await f() == 1
                waits.append(time.perf_counter() - begun)
            assert await memo.drain(10)

        if style.is_async:
            asyncio.run(acalls())
        else:
            calls()
            assert memo.runtime.blocking.drain_blocking(10)
        assert style.call(f) == 2
    assert sorted(waits)[10] < 0.005
    assert max(waits) < 0.3
    assert source.runs == 2
    stale = [event for event in seen if event.kind == events.STALE]
    assert len(stale) == 20
    assert {event.reason for event in stale} == {"ahead" if window == "ahead" else "expired"}


@styles
def test_where_a_refresh_runs(style: Style, source: Source, clock: ManualClock) -> None:
    """On the loop of the caller, or in one of `POOL` threads of memo's for sync code."""
    places: list[Any] = source.seen

    def load(x: int) -> Any:
        source.load()
        loop = asyncio.get_running_loop() if style.is_async else None
        places.append((loop, threading.current_thread().name))
        yield 0.05

    f = style.cached(load, version="1", ttl=10, stale_while_revalidate=100)

    async def stale() -> None:
        await asyncio.gather(*(f(x) for x in range(12)))
        here = asyncio.get_running_loop()
        assert await memo.drain(10)
        assert {place[0] for place in places[12:]} == {here}

    with isolated(clock=clock):
        for x in range(12):
            style.call(f, x)
        clock.advance(20)
        if style.is_async:
            asyncio.run(stale())
        else:
            for x in range(12):
                style.call(f, x)
            names = [thread.name for thread in threading.enumerate()]
            assert names.count("memo-background") <= memo.runtime.blocking.POOL_THREADS
            assert memo.runtime.blocking.drain_blocking(10)
            assert {place[1] for place in places[12:]} == {"memo-background"}
    assert len(places) == 24


def fill_the_pool(report: Any, started: threading.Semaphore) -> None:
    """Let one stale `report(n)` per thread of the pool refresh itself, until each has begun."""
    for n in range(memo.runtime.blocking.POOL_THREADS):
        assert report(n) == n + 1
    for _ in range(memo.runtime.blocking.POOL_THREADS):
        assert started.acquire(timeout=10)


@pytest.mark.parametrize("need_it", [True, False])
def test_no_call_waits_for_a_refresh_that_waits_for_a_thread(
    source: Source, clock: ManualClock, need_it: bool
) -> None:
    """A call whose refresh is queued computes by itself, also if it is part of another refresh."""
    slow, go, started = threading.Event(), threading.Event(), threading.Semaphore(0)
    rates = cached(STYLES[0], source, ttl=10, stale_while_revalidate=10)

    @memo.cache(ttl=10, stale_while_revalidate=1000, version="1")
    def report(n: int) -> int:
        if slow.is_set():
            started.release()
            go.wait(30)
        return n + rates()

    with isolated(clock=clock), recording() as seen:
        assert [report(n) for n in range(4)] == [1, 2, 3, 4]
        clock.advance(15)
        slow.set()
        fill_the_pool(report, started)
        assert rates() == 1  # stale, and its refresh is queued behind the others
        clock.advance(10)  # now it is too old
        if need_it:
            go.set()
        answers: list[int] = []
        caller = threading.Thread(target=lambda: answers.append(rates()), daemon=True)
        caller.start()
        caller.join(10)
        go.set()
        assert answers == [2]
        assert memo.runtime.blocking.drain_blocking(10)
        assert [report(n) for n in range(4)] == [2, 3, 4, 5]
    assert source.runs == 2
    done = [e.function for e in seen if e.kind == events.REFRESH_DONE]
    assert done == [report.function_id] * 4


async def test_arefresh_of_sync_functions_that_wait_for_each_other() -> None:
    """`arefresh` computes a sync function in a thread of its own, however many do so at once."""
    all_here = threading.Barrier(20)

    @memo.cache(version="1")
    def load(n: int) -> int:
        all_here.wait(10)
        return n

    with isolated():
        found = await asyncio.gather(*(load.arefresh(n) for n in range(20)))
    assert found == list(range(20))


async def test_a_failed_refresh_is_no_unretrieved_exception(
    source: Source, clock: ManualClock
) -> None:
    """If the function or memo itself fails in a refresh, the event loop gets no error."""
    f = cached(STYLES[1], source, ttl=10, stale_while_revalidate=100)
    heard: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: heard.append(context))

    with isolated(clock=clock), recording() as seen:
        await f()
        clock.advance(20)
        source.fail = True
        assert await f() == 1
        assert await memo.drain(5)
        inside(f).history.backoff.clear()
        with failing("acquire"):
            assert await f() == 1
            assert await memo.drain(5)
        gc.collect()
        await asyncio.sleep(0)
    assert heard == []
    failed = [event.reason for event in seen if event.kind == events.REFRESH_FAILED]
    assert failed == ["ConnectionError", "dropped"]
    assert [e.reason for e in seen if e.kind == events.ERROR] == ["background"]


@styles
def test_one_refresh_per_key(style: Style, source: Source, clock: ManualClock) -> None:
    """However many callers find it stale at once, one refresh runs."""
    f = cached(style, source, ttl=100, stale_while_revalidate=100)
    with isolated(clock=clock):
        style.call(f)
        clock.advance(110)
        source.seconds = 0.3

        async def many() -> list[int]:
            answers = await asyncio.gather(*(f() for _ in range(50)))
            await memo.drain(10)
            return answers

        answers = asyncio.run(many()) if style.is_async else style.together([f] * 50)
        memo.runtime.blocking.drain_blocking(10)
        assert answers == [1] * 50
        assert source.runs == 2


REFRESHER = """
import asyncio, sys, time, threading
import memo
memo.configure(redis_url=sys.argv[1] or None)
log = sys.argv[2]
lock = threading.Lock()
def note():
    with lock, open(log, "a") as file:
        file.write("run\\n")
options = dict(ttl=600, stale_while_revalidate=100, name="refreshed", version="1")
if sys.argv[3] == "async":
    @memo.cache(**options)
    async def load():
        note()
        await asyncio.sleep(0.5)
        return time.time()
    call = lambda: load()
else:
    @memo.cache(**options)
    def load():
        note()
        time.sleep(0.5)
        return time.time()
    async def call(): return load()

async def main():
    first = await call()          # every process has it in its memory tier
    print("ready", flush=True)
    if sys.stdin.readline().strip() == "expire":
        load.expire()
        print("expired", flush=True)
        sys.stdin.readline()
    end = time.monotonic() + 60
    answers = set()
    while len(answers) < 2 and time.monotonic() < end:
        answers.add(await call())
        await asyncio.sleep(0.01)
    await memo.drain(5)
    print(len(answers), flush=True)
asyncio.run(main())
"""


@pytest.mark.parametrize("style", ["sync", "async"])
@pytest.mark.parametrize("shared", ["redis", "disk"])
def test_one_refresh_per_cluster(
    style: str, shared: str, tmp_path: Path, redis_server: RedisServer
) -> None:
    """Of 4 processes that serve a stale value for a while one refreshes it, and all see that."""
    log = tmp_path / "runs"
    url = redis_server.url if shared == "redis" else ""
    kernels = [start(REFRESHER, url, log, style) for _ in range(4)]
    try:
        for kernel in kernels:
            assert kernel.stdout is not None
            assert kernel.stdin is not None
            assert kernel.stdout.readline() == "ready\n"
        kernels[0].stdin.write("expire\n")  # type: ignore[union-attr]
        kernels[0].stdin.flush()  # type: ignore[union-attr]
        assert kernels[0].stdout.readline() == "expired\n"  # type: ignore[union-attr]
        computed = len(log.read_text().split())
        for kernel in kernels:
            kernel.stdin.write("\n")  # type: ignore[union-attr]
            kernel.stdin.flush()  # type: ignore[union-attr]
        for kernel in kernels:
            assert kernel.stdout.readline() == "2\n"  # type: ignore[union-attr]
        assert len(log.read_text().split()) == computed + 1
    finally:
        for kernel in kernels:
            kernel.kill()
            kernel.communicate()


@styles
def test_a_failed_refresh_keeps_the_old_value(
    style: Style, source: Source, clock: ManualClock, ahead: Ahead
) -> None:
    """It is an event, it is not tried again at once, and the value lasts to its hard limit."""
    f = cached(style, source, ttl=100, stale_while_revalidate=100)
    ahead.stop()
    with isolated(clock=clock), recording() as seen, warnings.catch_warnings():
        warnings.simplefilter("error")
        assert style.call(f) == 1
        source.fail = True
        clock.advance(110)
        for _ in range(10):
            assert settled(style, f) == 1
        assert source.runs == 2
        ahead.advance(1.1)
        assert settled(style, f) == 1
        assert settled(style, f) == 1
        assert source.runs == 3
        ahead.advance(1.1)  # the pause has doubled
        assert settled(style, f) == 1
        assert source.runs == 3
        clock.advance(100)
        with pytest.raises(ConnectionError):
            style.call(f)
        source.fail = False
        assert style.call(f) == 5
    failed = [event for event in seen if event.kind == events.REFRESH_FAILED]
    assert [event.reason for event in failed] == ["ConnectionError"] * 2
    assert not leases.HELD_LEASES


class Heavy:
    """A result that takes long to pickle, if that is wanted."""

    pickling, go = threading.Event(), threading.Event()

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> Any:
        if self.number == 1:
            self.pickling.set()
            assert self.go.wait(20)
        return Heavy, (self.number,)


def test_the_old_value_answers_while_its_refresh_is_stored() -> None:
    """A stale value answers at once until the new one can be had, not only while that is made."""
    runs: list[int] = []

    @memo.cache(ttl=None, stale_while_revalidate=60, version="1", name="tests:heavy")
    def load() -> Heavy:
        runs.append(len(runs))
        return Heavy(runs[-1])

    load()
    load.expire()
    assert load().number == 0
    assert Heavy.pickling.wait(20)
    with recording() as heard:
        assert load().number == 0
    kinds = [event.kind for event in heard]
    Heavy.go.set()
    assert "stale" in kinds
    until(lambda: load().number == 1)
    assert runs == [0, 1]


def test_a_refresh_that_was_overtaken_does_not_replace_the_newer_result() -> None:
    """Of two refreshes at the same time the one that began later stays stored."""
    turns = [threading.Event(), threading.Event()]
    begun = threading.Semaphore(0)
    runs: list[int] = []

    @memo.cache(ttl=None, version="1", name="tests:overtaken")
    def load() -> int:
        number = len(runs)
        runs.append(number)
        begun.release()
        assert turns[number].wait(20)
        return number

    threads = [threading.Thread(target=load.refresh) for _ in turns]
    for thread in threads:
        thread.start()
        assert begun.acquire(timeout=20)
    for thread, turn in reversed(list(zip(threads, turns, strict=True))):
        turn.set()
        thread.join()
    assert load.is_cached()
    assert load() == 1
    assert runs == [0, 1]


@styles
def test_back_off_begins_anew_after_a_success(
    style: Style, source: Source, clock: ManualClock, ahead: Ahead
) -> None:
    """A refresh that succeeded has the next failure tried again as soon as the first one was."""
    f = cached(style, source, ttl=100, stale_while_revalidate=1000)
    with isolated(clock=clock):
        style.call(f)
        pauses = []
        for fail in (True, True, False, True):
            source.fail = fail
            clock.advance(110)
            ahead.advance(100)
            settled(style, f)
            pauses.append([pause for _, pause in inside(f).history.backoff.values()])
    assert pauses == [[1.0], [2.0], [], [1.0]]


@styles
def test_context_variables_travel(style: Style, source: Source, clock: ManualClock) -> None:
    """A refresh sees the context variables of the call that set it off."""
    user: contextvars.ContextVar[str] = contextvars.ContextVar("user")

    def load() -> str:
        source.seen.append(user.get("nobody"))
        return "value"

    f = style.cached(load, version="1", ttl=10, stale_while_revalidate=100)

    def calls() -> None:
        user.set("ann")
        settled(style, f) if not style.is_async else asyncio.run(f())
        clock.advance(20)
        user.set("bob")
        if style.is_async:
            settled(style, f)
        else:
            f()
            memo.runtime.blocking.drain_blocking(5)

    with isolated(clock=clock):
        contextvars.copy_context().run(calls)
    expected = ["nobody" if style.name == "threads" else "ann", "bob"]
    assert source.seen == expected


async def test_a_refresh_is_no_part_of_what_set_it_off(clock: ManualClock) -> None:
    """A refresh may ask for the very computation that started it: neither waits for the other."""
    refreshing = asyncio.Event()
    inner_runs, outer_runs = Source(), Source()

    @memo.cache(ttl=10, stale_while_revalidate=1000, version="1")
    async def inner() -> int:
        if inner_runs.load() == 1:
            return 1
        refreshing.set()
        return 10 * await outer()

    @memo.cache(ttl=1, version="1")
    async def outer() -> int:
        found = await inner()
        if outer_runs.load() == 2:
            await refreshing.wait()
        return found

    with isolated(clock=clock), recording() as seen:
        assert await outer() == 1
        clock.advance(20)
        assert await outer() == 1
        assert await memo.drain(5)
        assert await inner() == 10
    assert [event.kind for event in seen].count(events.REFRESH_DONE) == 1


async def test_a_refresh_that_never_began_stops_no_other(
    source: Source, clock: ManualClock
) -> None:
    """A refresh that is cancelled before its first line leaves the key free for the next one."""
    f = cached(STYLES[1], source, ttl=10, stale_while_revalidate=1000)
    with isolated(clock=clock):
        assert await f() == 1
        clock.advance(20)
        assert await f() == 1
        mine = [task for task in asyncio.all_tasks() if task.get_name().startswith("memo-refresh")]
        assert len(mine) == 1
        mine[0].cancel()
        await asyncio.gather(*mine, return_exceptions=True)
        assert source.runs == 1, "it had begun"
        assert await f() == 1
        assert await memo.drain(5)
        assert await asyncio.wait_for(f(), 5) == 2


@styles
def test_a_refresh_that_another_process_has_is_not_asked_for_at_every_call(
    style: Style, source: Source, clock: ManualClock, ahead: Ahead
) -> None:
    """While another process refreshes, stale answers ask about that now and then only."""
    f = cached(style, source, ttl=10, stale_while_revalidate=1000)
    ahead.stop()
    with isolated(clock=clock), recording() as seen:
        style.call(f)
        clock.advance(20)
        chain = memo.decorators.assembly.default_chain()
        assert chain.host is not None
        lock = chain.host.lock(chain.name(f.function_id, f.key()))
        assert lock.try_acquire("another process")
        for _ in range(10):
            assert settled(style, f) == 1
        assert [event.kind for event in seen].count(events.REFRESH_STARTED) == 1
        ahead.advance(1)
        assert settled(style, f) == 1
        lock.release()
    assert [event.kind for event in seen].count(events.REFRESH_STARTED) == 2
    assert source.runs == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning")
def test_a_refresh_in_a_loop_that_was_closed(source: Source, clock: ManualClock) -> None:
    """A loop that is closed with a refresh in it stops no later refresh of the key."""
    f = cached(STYLES[1], source, ttl=10, stale_while_revalidate=1000)

    async def begin() -> None:
        assert await f() == 1
        await await_until(lambda: source.runs == 2)

    with isolated(clock=clock):
        assert asyncio.run(f()) == 1
        clock.advance(20)
        source.seconds = 60.0
        loop = asyncio.new_event_loop()
        loop.run_until_complete(begin())
        loop.close()
        left = [task for task in memo.runtime.native.TASKS if not task.done()]
        assert len(left) == 1
        left[0]._log_destroy_pending = False  # type: ignore[attr-defined]
        source.seconds = 0.0
        assert settled(STYLES[1], f) == 1
        assert not leases.HELD_LEASES
        assert settled(STYLES[1], f) == 1
        assert asyncio.run(f()) == 3
    memo.runtime.native.TASKS.clear()
    del left
    gc.collect()
    assert COMPUTATIONS.here() == []


@styles
def test_a_refresh_never_brings_back_what_was_invalidated(
    style: Style, source: Source, clock: ManualClock
) -> None:
    """A stale window is for expiry alone: an invalidated value does not answer, refresh or not."""
    f = cached(style, source, ttl=10, stale_while_revalidate=1000)
    with isolated(clock=clock):
        style.call(f)
        clock.advance(20)
        f.invalidate()
        assert style.call(f) == 2


async def test_drain_waits(source: Source, clock: ManualClock) -> None:
    """`await memo.drain()` returns True when the refreshes have ended."""
    f = cached(STYLES[1], source, ttl=10, stale_while_revalidate=1000)
    with isolated(clock=clock):
        await f()
        clock.advance(20)
        source.seconds = 0.2
        assert await f() == 1
        assert await memo.drain(5) is True
        assert source.runs == 2
        assert await f() == 2


async def test_drain_drops_what_takes_too_long(source: Source, clock: ManualClock) -> None:
    """Past its timeout `drain` cancels what still runs, frees its lease, and returns False."""
    f = cached(STYLES[1], source, ttl=10, stale_while_revalidate=1000)
    with isolated(clock=clock), recording() as seen:
        await f()
        clock.advance(20)
        source.seconds = 60.0
        assert await f() == 1
        await await_until(lambda: source.runs == 2)
        begun = time.monotonic()
        assert await memo.drain(0.1) is False
        assert time.monotonic() - begun < 1.0
        assert not leases.HELD_LEASES
    assert [e.reason for e in seen if e.kind == events.REFRESH_FAILED] == ["dropped"]


async def test_drain_waits_for_sync_refreshes_too(source: Source, clock: ManualClock) -> None:
    """`drain` waits for work in the pool until the timeout, and then leaves it."""
    f = cached(STYLES[0], source, ttl=10, stale_while_revalidate=1000)
    with isolated(clock=clock):
        f()
        clock.advance(20)
        source.seconds = 2.0
        f()
        begun = time.monotonic()
        assert await memo.drain(0.05) is False
        assert time.monotonic() - begun < 1.0
        assert await memo.drain(10) is True
        assert source.runs == 2
        assert f() == 2


EXIT = """
import asyncio, atexit, sys, time
atexit.register(lambda: print(time.monotonic(), flush=True))  # what is registered first ends last
import memo
from waiting import await_until, until
memo.configure(redis_url=sys.argv[1] or None)
kind, seconds = sys.argv[2], float(sys.argv[3])
options = dict(ttl=None, stale_while_revalidate=100, use_lock=True, version="1", name="exit")
runs = []
if kind == "sync":
    @memo.cache(**options)
    def load():
        runs.append(1)
        time.sleep(seconds if len(runs) > 1 else 0)
    load(); load.expire(); load()
    until(lambda: len(runs) == 2)
else:
    @memo.cache(**options)
    async def load():
        runs.append(1)
        await asyncio.sleep(seconds if len(runs) > 1 else 0)
    async def main():
        await load(); load.expire(); await load()
        await await_until(lambda: len(runs) == 2)
    if kind == "run":
        asyncio.run(main())
    else:                       # as a kernel: the loop is never closed
        loop = asyncio.new_event_loop()
        loop.run_until_complete(main())
assert len(runs) == 2
print(time.monotonic())
"""


@pytest.mark.parametrize("shared", ["redis", "disk"])
@pytest.mark.parametrize("kind", ["sync", "run", "loop"])
@pytest.mark.parametrize("seconds", [0.3, 60.0])
def test_interpreter_exit(
    kind: str, seconds: float, shared: str, cache_home: Path, redis_server: RedisServer
) -> None:
    """A refresh that runs at exit ends or is dropped: no word, no hang, no lease left behind."""
    url = redis_server.url if shared == "redis" else ""
    process = subprocess.run(
        [sys.executable, "-W", "default", "-c", EXIT, url, kind, str(seconds)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(SUPPORT)))},
        timeout=30,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    last_line, over = map(float, process.stdout.split())
    assert over - last_line < 6.0  # it is given 1.5 s, and would take 60
    assert not redis_server.client().keys("memo:2:l:*")
    assert not list((cache_home / FOLDER).glob("locks/*"))


def test_exit_lets_a_short_refresh_end() -> None:
    """Work that is nearly done at interpreter exit is completed, not lost."""
    code = """
import time, sys
import memo
from memo.runtime import events
from memo.settings.options import Policy
from memo.records.stamp_types import Times
memo.on_event(lambda event: print(event.kind, flush=True) if "refresh" in event.kind else None)
runs = []
@memo.cache(ttl=None, stale_while_revalidate=100, version="1")
def load():
    runs.append(1)
    time.sleep(0.3)
load(); load.expire(); load()
"""
    assert run(code).split() == ["refresh_started", "refresh_done"]
