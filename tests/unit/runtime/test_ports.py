"""Both ports keep the same promises, so that the engine is written once."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from ports import RUNNERS, Work
from waiting import STUCK, wait_for

from memo.errors import EventLoopError
from memo.runtime import events
from memo.runtime.blocking import BLOCKING, Pool, drive
from memo.runtime.native import drain, native
from memo.runtime.port import Port, Steps


@pytest.fixture(params=list(RUNNERS))
def run(request: pytest.FixtureRequest) -> Callable[[Work], Any]:
    """Runs `work(port)` over one of the ports."""
    return RUNNERS[request.param]


@pytest.fixture
def errors() -> Iterator[list[events.Event]]:
    """The faults of background work."""
    seen: list[events.Event] = []
    remove = events.on_event(lambda e: seen.append(e) if e.kind == events.ERROR else None)
    yield seen
    remove()


def test_offload_returns_and_raises_as_the_function_does(run: Callable[[Work], Any]) -> None:
    """The caller gets the result of the function, or its own exception."""

    async def work(port: Port) -> int:
        with pytest.raises(ZeroDivisionError):
            await port.offload(divmod, 1, 0)
        return sum(await port.offload(divmod, 7, 2))

    assert run(work) == 4


def test_a_waiter_is_set_from_any_thread(run: Callable[[Work], Any]) -> None:
    """`wait` returns True as soon as another thread sets the waiter, however often it does."""

    async def work(port: Port) -> bool:
        waiter = port.waiter()
        thread = threading.Thread(target=lambda: (waiter.set(), waiter.set()))
        thread.start()
        found = await port.wait(waiter, 20)
        thread.join()
        return found

    assert run(work) is True


def test_a_wait_that_times_out_says_so(run: Callable[[Work], Any]) -> None:
    """It returns False, and the waiter can be waited for again."""

    async def work(port: Port) -> list[bool]:
        waiter = port.waiter()
        first = await port.wait(waiter, 0.001)
        waiter.set()
        return [first, await port.wait(waiter, 20)]

    assert run(work) == [False, True]


@pytest.mark.parametrize("own_thread", [False, True])
def test_background_work_runs_with_a_port_and_ends_once(
    run: Callable[[Work], Any], own_thread: bool
) -> None:
    """`spawn` passes the port of the place where the work runs, and calls `on_end` once."""
    ended: list[str] = []

    async def work(port: Port) -> list[Any]:
        seen: list[Any] = []
        done = port.waiter()

        async def background(inner: Port) -> None:
            seen.append(await inner.offload(abs, -3))

        port.spawn(
            background, "test", lambda: (ended.append("end"), done.set()), own_thread=own_thread
        )
        assert await port.wait(done, 20)
        return seen

    assert run(work) == [3]
    assert ended == ["end"]


def test_background_work_that_raises_is_an_event(
    run: Callable[[Work], Any], errors: list[events.Event]
) -> None:
    """It has no caller, so its error is an event that names the work."""

    async def work(port: Port) -> None:
        ended = port.waiter()

        async def background(_: Port) -> None:
            raise LookupError("lost")

        port.spawn(background, "refresh of f", ended.set)
        await port.wait(ended, 20)

    run(work)
    assert wait_for(lambda: errors)
    assert [(e.reason, e.detail) for e in errors] == [
        ("background", "refresh of f: LookupError('lost')")
    ]


def test_cancelled_before_it_begins_it_still_ends() -> None:
    """A task that is cancelled at once runs no line, and `on_end` is called all the same."""

    async def inside() -> list[str]:
        seen: list[str] = []
        ended = asyncio.Event()

        async def background(_: Port) -> None:
            seen.append("ran")

        native().spawn(background, "test", ended.set)
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await asyncio.wait_for(ended.wait(), 20)
        return seen

    assert asyncio.run(inside()) == []


def test_a_loop_without_end_lets_others_run() -> None:
    """`Steps` gives other tasks a turn between two steps of a long loop."""

    async def inside() -> int:
        turns, over = 0, False

        async def other() -> None:
            nonlocal turns
            while not over:
                turns += 1
                await asyncio.sleep(0)

        task = asyncio.ensure_future(other())
        steps, end = Steps(native()), time.monotonic() + STUCK
        while turns < 3 and time.monotonic() < end:
            await steps.pause_if_due()
        over = True
        await task
        return turns

    assert asyncio.run(inside()) >= 3


def test_sync_code_never_suspends() -> None:
    """A coroutine that suspends over the blocking port is an error, and is closed."""

    async def work() -> None:
        await asyncio.sleep(0)

    with pytest.raises(RuntimeError, match="suspended over a blocking port"):
        drive(work())


def test_sync_code_awaits_a_users_coroutine_on_another_loop() -> None:
    """`settle` runs a foreign coroutine, also if a loop is running in this thread."""

    async def foreign() -> str:
        await asyncio.sleep(0)
        return threading.current_thread().name

    async def inside() -> str:
        return str(drive(BLOCKING.settle(foreign())))

    assert asyncio.run(inside()) != threading.current_thread().name


def test_the_native_port_needs_a_loop() -> None:
    """Without a running loop there is an error that says so."""
    with pytest.raises(EventLoopError, match="no asyncio loop runs here"):
        native()


def test_drain_waits_for_the_tasks_of_the_loop() -> None:
    """It returns True if all of them ended by themselves, and cancels those that are late."""

    async def inside() -> tuple[bool, list[str], bool]:
        seen: list[str] = []

        async def quick(port: Port) -> None:
            await port.sleep(0)
            seen.append("done")

        async def endless(_: Port) -> None:
            try:
                await asyncio.Event().wait()
            finally:
                seen.append("cancelled")

        native().spawn(quick, "test")
        in_time = await drain(20)
        native().spawn(endless, "test")
        return in_time, seen, await drain(0.001)

    assert asyncio.run(inside()) == (True, ["done", "cancelled"], False)


# --- pools of threads -----------------------------------------------------------------------------


def test_a_pool_runs_no_more_jobs_at_once_than_its_size() -> None:
    """The third of three jobs waits for a thread of two; one that must begin at once does not."""
    pool, go = Pool("test", 2), threading.Event()
    running: list[str] = []

    def job(name: str) -> Callable[[], None]:
        return lambda: (running.append(name), go.wait(20))[0]

    for name in ("first", "second", "third"):
        pool.submit(job(name))
    pool.submit(job("urgent"), at_once=True)
    assert wait_for(lambda: len(running) == 3)
    assert sorted(running) == ["first", "second", "urgent"]
    assert not pool.drain(0.001)
    go.set()
    assert pool.drain(20)
    assert len(running) == 4
