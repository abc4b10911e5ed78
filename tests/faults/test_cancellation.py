"""Cancelling and interrupting, the normal path in a notebook, affect no other caller."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from checkout import ROOT
from folders import FOLDER
from inside import joined
from ports import start
from redis_server import RedisServer
from waiting import await_until

import memo
from memo.coordination import leases
from memo.coordination.flights import FLIGHTS
from memo.runtime import native
from memo.testing import recording


class Gate:
    """Counts the runs of a function for a test; it has no sound key, so it changes none."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.begun = 0
        self.cancelled = 0
        self.ended = 0

    async def work(self, seconds: float) -> int:
        self.begun += 1
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        self.ended += 1
        return self.ended


@pytest.fixture
def gate() -> Gate:
    return Gate()


def make(gate: Gate, **options: Any) -> Any:
    @memo.cache(version="1", **options)
    async def load(x: int, seconds: float = 0.3) -> list[int]:
        return [await gate.work(seconds)]

    return load


async def begun(gate: Gate, times: int = 1) -> None:
    await await_until(lambda: gate.begun >= times)


async def gone(condition: Callable[[], Any], within: float = 0.1) -> None:
    """Wait until a condition does not hold any more."""
    await await_until(lambda: not condition(), within)


def lock_files(home: Path) -> list[Path]:
    return list((home / FOLDER).glob("locks/*"))


@pytest.fixture(params=["process", "host", "redis"])
def use_lock(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Without a lease, with one of this host, and with one of a Redis."""
    if request.param == "redis":
        memo.configure(redis_url=request.getfixturevalue("redis_server").url)
    yield request.param != "process"
    memo.decorators.assembly.reset()


async def free(gate: Gate, home: Path) -> None:
    """The lease is free within 100 ms, with nothing left behind."""
    await gone(lambda: FLIGHTS.joinable_flights())
    await gone(lambda: leases.HELD_LEASES)
    await gone(lambda: lock_files(home))


async def test_cancelled_follower(gate: Gate, use_lock: bool) -> None:
    """A follower that is cancelled takes no other caller with it."""
    f = make(gate, use_lock=use_lock)
    calls = [asyncio.create_task(f(1)) for _ in range(4)]
    await begun(gate)
    calls[2].cancel()
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert [r for i, r in enumerate(results) if i != 2] == [[1]] * 3
    assert isinstance(results[2], asyncio.CancelledError)
    assert (gate.begun, gate.cancelled) == (1, 0)


async def test_cancelled_leader(gate: Gate, use_lock: bool) -> None:
    """When the leader is cancelled its followers get what it has begun."""
    f = make(gate, use_lock=use_lock)
    calls = [asyncio.create_task(f(1)) for _ in range(4)]
    await begun(gate)
    calls[0].cancel()
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert isinstance(results[0], asyncio.CancelledError)
    assert results[1:] == [[1]] * 3
    assert (gate.begun, gate.cancelled) == (1, 0)


async def test_all_cancelled(gate: Gate, use_lock: bool, cache_home: Path) -> None:
    """When all have gone the computation is cancelled, its lease free, and the next computes."""
    f = make(gate, use_lock=use_lock)
    calls = [asyncio.create_task(f(1)) for _ in range(4)]
    await begun(gate)
    for call in calls:
        call.cancel()
    await free(gate, cache_home)
    assert gate.cancelled == 1
    await asyncio.gather(*calls, return_exceptions=True)
    assert await f(1, 0.0) == [1]
    assert not f.is_cached(1)


async def test_cancelled_before_it_began(gate: Gate, cache_home: Path) -> None:
    """A call that is cancelled before its first line leaves no flight behind."""
    f = make(gate)
    for steps in range(6):
        call = asyncio.create_task(f(1, 0.0))
        for _ in range(steps):
            await asyncio.sleep(0)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
    await gone(lambda: FLIGHTS.joinable_flights())
    assert await asyncio.wait_for(f(1, 0.0), 2)


@pytest.mark.parametrize("offset", [0.0, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05])
async def test_wait_for(gate: Gate, use_lock: bool, cache_home: Path, offset: float) -> None:
    """A time-out at any moment frees the lease, and the next call computes at once."""
    f = make(gate, use_lock=use_lock)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(f(1, 5.0), offset)
    await free(gate, cache_home)
    begun = time.monotonic()
    assert await f(2, 0.0)
    assert await f(1, 0.0)
    assert time.monotonic() - begun < 1.0


async def test_a_waiter_for_another_process_is_cancelled(
    gate: Gate, use_lock: bool, cache_home: Path
) -> None:
    """A call that is cancelled while it waits for a lease does not take it away from its holder."""
    f = make(gate, use_lock=use_lock)
    if not use_lock:
        pytest.skip("there is no lease to wait for")
    with _held(f):
        call = asyncio.create_task(f(1, 0.0))
        await await_until(FLIGHTS.joinable_flights)
        assert gate.begun == 0
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        await gone(lambda: FLIGHTS.joinable_flights())
        assert gate.begun == 0
    assert await f(1, 0.0) == [1]


def _name(f: Any) -> str:
    return memo.decorators.assembly.default_chain().name(f.function_id, f.key(1, 0.0))


class _held:
    """The lock of a key, as if another process had it."""

    def __init__(self, f: Any) -> None:
        host = memo.decorators.assembly.default_chain().host
        assert host is not None
        self.lock = host.lock(_name(f))

    def __enter__(self) -> None:
        assert self.lock.try_acquire("another/process")

    def __exit__(self, *_: object) -> None:
        self.lock.release()


async def test_cancelled_error_of_the_function_itself(gate: Gate) -> None:
    """A function that raises CancelledError by itself cancels no task."""

    @memo.cache(version="1")
    async def load() -> None:
        await joined(2)
        raise asyncio.CancelledError("mine")

    results = await asyncio.gather(*(load() for _ in range(3)), return_exceptions=True)
    assert [type(r) for r in results] == [asyncio.CancelledError] * 3
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


def test_leader_in_a_loop_that_ends(gate: Gate) -> None:
    """A thread that waits for the loop of another one computes itself when that loop ends."""
    f = make(gate)

    async def leave() -> None:
        task = asyncio.create_task(f(1, 30.0))
        await begun(gate)
        led.set()
        await joined(1)
        assert not task.done()

    async def follow() -> str:
        call = asyncio.create_task(f(1, 30.0))
        await begun(gate, 2)
        call.cancel()
        return "computed here"

    led = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(asyncio.run, leave())
        assert led.wait(5)
        assert pool.submit(asyncio.run, follow()).result(5) == "computed here"
        first.result(5)
    assert gate.begun == 2


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning")
def test_leader_in_a_loop_that_was_closed(gate: Gate, cache_home: Path) -> None:
    """A loop that is closed with a computation in it blocks no other caller, and keeps no lease."""
    f = make(gate, use_lock=True)
    loop = asyncio.new_event_loop()
    task = loop.create_task(f(1, 30.0))
    loop.run_until_complete(begun(gate))
    loop.close()
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    now = time.monotonic()
    gate_before = gate.begun

    async def quick() -> Any:
        call = asyncio.create_task(f(1, 30.0))
        await begun(gate, gate_before + 1)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)

    asyncio.run(asyncio.wait_for(quick(), 5))
    assert time.monotonic() - now < 2.0
    assert not leases.HELD_LEASES
    assert not lock_files(cache_home)
    native.TASKS.clear()
    del task
    gc.collect()


async def test_refresh_that_is_cancelled_before_it_began(gate: Gate) -> None:
    """A refresh that its loop cancels before its first line does not stop later ones."""
    clock = memo.testing.ManualClock()
    f = make(gate, ttl=10, stale_while_revalidate=1000)
    with memo.testing.isolated(clock=clock):

        def stale() -> Any:
            return asyncio.run(f(1, 0.0))

        first = await asyncio.to_thread(stale)
        clock.advance(11)
        for _ in range(3):  # `asyncio.run` cancels what it has begun
            assert await asyncio.to_thread(stale) == first
        await gone(lambda: FLIGHTS.joinable_flights())
        with recording() as seen:
            while await f(1, 0.0) == first:
                await memo.drain(5)
        assert "refresh_done" in [event.kind for event in seen]


INTERRUPTED = """
import sys, threading, time, json
import memo
from memo.coordination import leases
from inside import joiners
from memo.coordination.flights import FLIGHTS
from memo.runtime.events import WAITING
from waiting import until

memo.configure(redis_url=sys.argv[1] or None)
runs = [0]
lock = threading.Lock()

@memo.cache(use_lock=True, version="1", name="interrupted:load")
def load(seconds):
    with lock:
        runs[0] += 1
        print("begun", runs[0], flush=True)
    time.sleep(seconds)
    return seconds

def tell(event):
    if event.kind == WAITING:
        print("waiting", flush=True)

memo.on_event(tell)
results = []
if sys.argv[2] == "followed":
    def later():
        until(lambda: runs[0])
        results.append("joined")
        results.append(load(2.0))
    threading.Thread(target=later, daemon=True).start()
    def joined():
        until(joiners)
        with lock:
            print("joined", flush=True)
    threading.Thread(target=joined, daemon=True).start()
try:
    load(2.0)
    print("not interrupted", flush=True)
except KeyboardInterrupt:
    at = time.monotonic()
    if sys.argv[2] == "followed":
        until(lambda: len(results) == 2)
    until(lambda: not FLIGHTS.joinable_flights() and not leases.HELD_LEASES)
    free = time.monotonic() - at
    print(json.dumps({"free": free, "runs": runs[0], "results": results}), flush=True)
"""


@pytest.mark.parametrize("shared", ["redis", "disk"])
@pytest.mark.parametrize("kind", ["alone", "followed"])
def test_keyboard_interrupt_in_a_sync_call(
    kind: str, shared: str, cache_home: Path, redis_server: RedisServer
) -> None:
    """Ctrl-C reaches the caller at once; the lease is free, and a follower computes itself."""
    url = redis_server.url if shared == "redis" else ""
    process = start(INTERRUPTED, url, kind)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun 1\n"
        if kind == "followed":
            assert process.stdout.readline() == "joined\n"
        interrupted = time.monotonic()
        process.send_signal(signal.SIGINT)
        line = process.stdout.readline()
        if kind == "followed":
            assert line == "begun 2\n"
            line = process.stdout.readline()
        found = json.loads(line)
        if kind == "alone":
            assert time.monotonic() - interrupted < 1.5
            assert found["free"] < 0.1
            assert found["runs"] == 1
        else:
            assert found["results"] == ["joined", 2.0]
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.communicate()
    assert not lock_files(cache_home)
    assert not redis_server.client().keys("memo:2:l:*")


def test_keyboard_interrupt_while_waiting_for_another_process(
    cache_home: Path, redis_server: RedisServer
) -> None:
    """Ctrl-C while a call waits for a lease that another process holds ends the wait at once."""
    holder = start(INTERRUPTED, redis_server.url, "alone")
    waiter = start(INTERRUPTED, redis_server.url, "alone")
    try:
        assert holder.stdout is not None
        assert waiter.stdout is not None
        first = {process.stdout.readline() for process in (holder, waiter)}
        assert first == {"begun 1\n", "waiting\n"}
        waiter.send_signal(signal.SIGINT)
        holder.send_signal(signal.SIGINT)
        for process in (holder, waiter):
            output, _ = process.communicate(timeout=20)
            assert json.loads(output.splitlines()[-1])["free"] < 0.1, output
    finally:
        for process in (holder, waiter):
            process.kill()
            process.communicate()
    assert not redis_server.client().keys("memo:2:l:*")


def test_interrupt_of_an_async_program(cache_home: Path, tmp_path: Path) -> None:
    """Ctrl-C in `asyncio.run` ends the program at once, without a word from memo."""
    code = """
import asyncio, memo
@memo.cache(use_lock=True)
async def load(x):
    print("begun", flush=True)
    await asyncio.sleep(60)
asyncio.run(load(1))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGINT)
    begun = time.monotonic()
    _, errors = process.communicate(timeout=10)
    assert time.monotonic() - begun < 2.0
    assert "KeyboardInterrupt" in errors.splitlines()[-1]
    assert "Task was destroyed" not in errors
    assert "ignored" not in errors
    assert not lock_files(cache_home)
