"""The native port: coroutines, which suspend on the running event loop.

Background work is a task of the caller's loop; blocking work runs in threads of `blocking`.
The engine uses an event loop only through this port.  `blocking` has the loops on which sync code
runs coroutines, and the transport to Redis has its own connections for each loop.
"""

from __future__ import annotations

import contextvars
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

from memo.errors import EventLoopError, OptionError
from memo.runtime import fork
from memo.runtime.blocking import (
    BLOCKING,
    OFFLOAD,
    RENEWALS,
    drain_blocking,
    report_fault,
    run_in_function_loop,
    run_in_own_thread,
)
from memo.runtime.port import Handle, Port, Waiter

if TYPE_CHECKING:
    import asyncio

T = TypeVar("T")


class _LoopWaiter:
    """A future of one loop that any thread may set."""

    __slots__ = ("future", "loop")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.future: asyncio.Future[None] = loop.create_future()

    def set(self) -> None:
        try:
            self.loop.call_soon_threadsafe(self._set)
        except RuntimeError:  # the loop is closed, and its waiters are gone
            return

    def _set(self) -> None:
        if not self.future.done():
            self.future.set_result(None)


class _TaskHandle:
    """Cancels a task of some loop from any thread."""

    __slots__ = ("_loop", "_task")

    def __init__(self, task: asyncio.Task[Any], loop: asyncio.AbstractEventLoop) -> None:
        self._task = task
        self._loop = loop

    def cancel(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self._task.cancel)
        except RuntimeError:  # the loop is closed: none of its tasks runs any more
            return

    def is_dead(self) -> bool:
        return self._loop.is_closed() and not self._task.done()


TASKS: set[asyncio.Task[Any]] = set()


class Native:
    """The port of a running event loop."""

    native = True
    __slots__ = ("_turn", "loop")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._turn: asyncio.Lock | None = None

    async def turn(self) -> None:
        import asyncio

        if self._turn is None:
            self._turn = asyncio.Lock()
        await self._turn.acquire()
        self.loop.call_soon(self._turn.release)

    async def settle(self, value: Awaitable[T]) -> T:
        return await value

    async def offload(self, function: Callable[..., T], *args: Any, own_thread: bool = False) -> T:
        waiter = _LoopWaiter(self.loop)
        context = contextvars.copy_context()
        outcome: list[Any] = [None, None]

        def job() -> None:
            try:
                outcome[0] = context.run(function, *args)
            except BaseException as error:
                outcome[1] = error
            waiter.set()

        if own_thread:
            run_in_own_thread(job, context)
        else:
            OFFLOAD.submit(job)
        await waiter.future
        error = outcome.pop()
        if error is not None:
            raise error
        result: T = outcome.pop()
        return result

    async def wait(self, waiter: Waiter, timeout: float | None) -> bool:
        assert isinstance(waiter, _LoopWaiter)
        if timeout is None:
            await waiter.future
            return True
        import asyncio

        done, _ = await asyncio.wait({waiter.future}, timeout=timeout)
        return bool(done)

    def waiter(self) -> Waiter:
        return _LoopWaiter(self.loop)

    def spawn(
        self,
        work: Callable[[Port], Coroutine[Any, Any, Any]],
        name: str,
        on_end: Callable[[], None] | None = None,
        *,
        own_thread: bool = False,
    ) -> Handle:
        if own_thread:
            return BLOCKING.spawn(work, name, on_end, own_thread=True)
        task = self.loop.create_task(work(self), name=name)
        TASKS.add(task)
        task.add_done_callback(_finished)
        if on_end is not None:  # a task that is cancelled before it begins runs no line of `work`
            task.add_done_callback(lambda _: on_end())
        return _TaskHandle(task, self.loop)

    async def sleep(self, seconds: float) -> None:
        import asyncio

        await asyncio.sleep(seconds)

    def every(self, seconds: float, work: Callable[[Port], Coroutine[Any, Any, Any]]) -> Handle:
        return RENEWALS.every(seconds, work)

    def is_cancelled(self) -> bool:
        import asyncio

        task = asyncio.current_task()
        return task is not None and task.cancelling() > 0


def _finished(task: asyncio.Task[Any]) -> None:
    TASKS.discard(task)
    if not task.cancelled():
        error = task.exception()
        if error is not None:
            report_fault(task.get_name(), error)


def native() -> Native:
    """Return the port of the running event loop.

    Raises:
        EventLoopError: the caller does not run on an asyncio loop.
    """
    global _latest
    import asyncio

    # Within trio.run() a loop of asyncio may run as well, as in a kernel under %autoawait trio.
    sniffio = sys.modules.get("sniffio")
    other = None if sniffio is None else sniffio.thread_local.name
    if other is not None and other != "asyncio":
        raise _wrong_loop(other)
    try:
        loop, port = asyncio.get_running_loop(), _latest
    except RuntimeError:
        raise _wrong_loop(None) from None
    if port is None or port.loop is not loop:
        port = _latest = Native(loop)
    return port


def _wrong_loop(other: str | None) -> EventLoopError:
    here = "no asyncio loop runs here" if other is None else f"{other} runs here"
    thread = " in a thread, `await trio.to_thread.run_sync(load)`" if other == "trio" else ""
    return EventLoopError(
        f"async functions that memo caches run on asyncio, and {here}; cache a plain `def` and "
        f"call that{thread}. Of the helpers, use those without the leading `a`: `load.refresh()` "
        "instead of `load.arefresh()`, `memo.invalidate` instead of `memo.ainvalidate`."
    )


_latest: Native | None = None
"""The port that was used last: most processes have one loop."""


def run_elsewhere(work: Callable[[Native], Coroutine[Any, Any, T]]) -> T:
    """Run a coroutine of the engine over a native port from sync code, and wait for it.

    For sync helpers that must await a user's `async def`, such as `f.refresh()`.
    """

    async def inside() -> T:
        return await work(native())

    return run_in_function_loop(inside())


async def drain(timeout: float | None = None) -> bool:
    """Wait until the background work of this process has ended.

    Args:
        timeout: seconds; what still runs then is cancelled (tasks of this loop) or left to its
            daemon thread.  None: as long as it takes.

    Returns:
        True when everything ended by itself.

    Raises:
        OptionError: `timeout` is not a number.
    """
    import asyncio

    if timeout is not None and not isinstance(timeout, (int, float)):
        raise OptionError("timeout", timeout, "must be seconds, as a number, or None.")
    port = native()
    mine = [task for task in TASKS if task.get_loop() is port.loop and not task.done()]
    end = None if timeout is None else time.monotonic() + timeout
    whole = True
    if mine:
        _, late = await asyncio.wait(mine, timeout=timeout)
        for task in late:
            task.cancel()
        if late:
            whole = False
            await asyncio.wait(late, timeout=1.0)
    left = None if end is None else max(0.0, end - time.monotonic())
    return await port.offload(drain_blocking, left) and whole


fork.in_child(TASKS.clear)
