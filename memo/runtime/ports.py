"""The two ports; no other module starts threads or uses event loops directly.

`Native` suspends on the running loop.  `Blocking` never suspends, so `drive` runs a whole coroutine
of the engine in one step, in the caller's thread, without a loop; that is why sync cached functions
work inside Jupyter's own running loop.

Background work (refreshes, write-backs) is a task of the caller's loop, or runs in a small pool of
daemon threads.  `drain` waits for it; at interpreter exit it is waited for `EXIT_GRACE` seconds.
"""

from __future__ import annotations

import atexit
import contextvars
import inspect
import sys
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from memo.errors import EventLoopError
from memo.runtime import events, fork
from memo.runtime.port import Handle, Later, Port, Waiter

if TYPE_CHECKING:
    import asyncio
    import concurrent.futures

T = TypeVar("T")
EXIT_GRACE = 1.5
"""Seconds that background work may still take when the interpreter exits."""
POOL = 4
"""Most threads for background work of sync code, started when needed."""
_IDLE = 10.0
"""Seconds after which an idle pool thread ends."""


def drive(work: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that runs over a blocking port, in one step.

    Raises:
        RuntimeError: the coroutine suspended: some verb was not the port's.
    """
    if not _DEEP:
        return _drive(work)
    depth = getattr(_here, "depth", 0)
    if depth == _DEEP:
        return _on_a_fresh_stack(work)
    _here.depth = depth + 1
    try:
        return _drive(work)
    finally:
        _here.depth = depth


_DEEP = 64 if sys.version_info[:2] == (3, 12) else 0
"""Levels of cached recursion per thread on Python 3.12, where the limit of C frames is fixed."""
_here = threading.local()
"""How many coroutines of a thread run inside one another, where that is counted."""


def _on_a_fresh_stack(work: Coroutine[Any, Any, T]) -> T:
    outcome: list[Any] = []
    context = contextvars.copy_context()

    def run() -> None:
        try:
            outcome.append((context.run(drive, work), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run, name="memo-deep")
    thread.start()
    thread.join()
    result, error = outcome.pop()
    if error is not None:
        raise error
    value: T = result
    return value


def _drive(work: Coroutine[Any, Any, T]) -> T:
    try:
        work.send(None)
    except StopIteration as stop:
        result: T = stop.value
        return result
    work.close()
    raise RuntimeError("memo: a coroutine suspended over a blocking port")


def start_thread(work: Callable[[], None], name: str) -> None:
    """Start a daemon thread.

    Raises:
        RuntimeError: no thread can be started: there are too many, or the process is ending.
    """
    threading.Thread(target=work, name=name, daemon=True).start()


class Pool:
    """Daemon threads that run what is handed in, at most `size` at once; idle ones end."""

    def __init__(self, name: str, size: int) -> None:
        self._name = name
        self._size = size
        self._reset()

    def _reset(self) -> None:
        self._jobs: deque[Callable[[], None]] = deque()
        self._lock = threading.Lock()
        self._threads = 0
        self._idle = 0
        self._busy = 0
        self._work_there = threading.Condition(self._lock)
        self._quiet = threading.Condition(self._lock)

    def submit(self, job: Callable[[], None]) -> None:
        """Run `job()` in a thread of the pool, or here if there is none; it must not raise."""
        with self._lock:
            self._busy += 1
            self._jobs.append(job)
            start = self._idle < len(self._jobs) and self._threads < self._size
            self._threads += start
            self._work_there.notify()
        if start:
            try:
                start_thread(self._work, self._name)
            except RuntimeError:  # no more threads: another one of the pool runs it, or this one
                with self._lock:
                    self._threads -= 1
                    if self._threads or job not in self._jobs:
                        return
                    self._jobs.remove(job)
                self._run(job)

    def _work(self) -> None:
        while True:
            with self._lock:
                self._idle += 1
                there = self._work_there.wait_for(lambda: self._jobs, _IDLE)
                self._idle -= 1
                if not there:
                    self._threads -= 1
                    return
                job = self._jobs.popleft()
            self._run(job)
            del job

    def _run(self, job: Callable[[], None]) -> None:
        try:
            job()
        finally:
            with self._lock:
                self._busy -= 1
                if not self._busy:
                    self._quiet.notify_all()

    def drain(self, timeout: float | None) -> bool:
        """Wait until nothing runs and nothing is queued; False when `timeout` went by first."""
        with self._lock:
            return self._quiet.wait_for(lambda: not self._busy, timeout)


_pool = Pool("memo-background", POOL)
_apart = Pool("memo-background-apart", 64)
"""For computations of users' functions that need a thread of their own."""
_offload = Pool("memo-offload", 8)


class _Job:
    """A handle on work in the pool: it can be dropped until it has begun."""

    __slots__ = ("dropped",)

    def __init__(self) -> None:
        self.dropped = False

    def cancel(self) -> None:
        self.dropped = True

    def dead(self) -> bool:
        return False


class _Tick:
    """Work that is done at intervals until it is cancelled."""

    __slots__ = ("dropped", "due", "interval", "ticker", "work")

    def __init__(
        self,
        ticker: Ticker,
        interval: float,
        work: Callable[[Port], Coroutine[Any, Any, Any]],
    ) -> None:
        self.ticker = ticker
        self.interval = interval
        self.due = time.monotonic() + interval
        self.work = work
        self.dropped = False

    def cancel(self) -> None:
        self.dropped = True
        self.ticker.wake()

    def dead(self) -> bool:
        return False


class Ticker:
    """One daemon thread that does work at intervals; it ends when there is none left."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._reset()

    def _reset(self) -> None:
        self._changed = threading.Condition()
        self._ticks: list[_Tick] = []
        self._running = False

    def every(self, seconds: float, work: Callable[[Port], Coroutine[Any, Any, Any]]) -> Handle:
        """Run `work(port)` at a fixed interval, until the handle is cancelled."""
        tick = _Tick(self, seconds, work)
        with self._changed:
            self._ticks.append(tick)
            self._changed.notify()
            if not self._running:
                self._running = True
                try:
                    start_thread(self._run, self._name)
                except RuntimeError as error:  # a lease then lives as long as it was taken for
                    self._running = False
                    _complain(self._name, error)
        return tick

    def wake(self) -> None:
        with self._changed:
            self._ticks = [tick for tick in self._ticks if not tick.dropped]
            self._changed.notify()

    def _run(self) -> None:
        while (tick := self._next()) is not None:
            _report(self._name, partial(drive, tick.work(BLOCKING)))

    def _next(self) -> _Tick | None:
        with self._changed:
            while self._ticks:
                tick = min(self._ticks, key=lambda tick: tick.due)
                left = tick.due - time.monotonic()
                if left <= 0:  # ticks that were missed are not made up for
                    tick.due += tick.interval * (1 + -left // tick.interval)
                    return tick
                self._changed.wait(left)
            self._running = False
            return None


_ticker = Ticker("memo-renew")
DISPLAYS = Ticker("memo-show")
"""For displays: listing entries may be slow, and must not delay the renewal of a lease."""


class Blocking:
    """The port of sync code: everything is there when a verb returns."""

    native = False

    async def settle(self, value: Any) -> Any:
        if inspect.iscoroutine(value):
            return _portal(value)
        return value.get() if type(value) is Later else value

    async def offload(self, function: Callable[..., T], *args: Any, apart: bool = False) -> T:
        return function(*args)

    async def wait(self, waiter: Waiter, timeout: float | None) -> bool:
        assert isinstance(waiter, threading.Event)
        return waiter.wait(timeout)

    def waiter(self) -> Waiter:
        return threading.Event()

    def spawn(
        self,
        work: Callable[[Port], Coroutine[Any, Any, Any]],
        name: str,
        ended: Callable[[], None] | None = None,
        *,
        apart: bool = False,
    ) -> Handle:
        context = contextvars.copy_context()
        handle = _Job()

        def job() -> None:
            try:
                if not handle.dropped:
                    context.run(_report, name, lambda: drive(work(BLOCKING)))
            finally:
                if ended is not None:
                    ended()

        (_apart if apart else _pool).submit(job)
        return handle

    async def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def every(self, seconds: float, work: Callable[[Port], Coroutine[Any, Any, Any]]) -> Handle:
        return _ticker.every(seconds, work)

    def cancelled(self) -> bool:
        return False

    def client(self) -> object:
        return None


class _LoopWaiter:
    """A future of one loop that any thread may set."""

    __slots__ = ("future", "loop")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.future: asyncio.Future[None] = loop.create_future()

    def set(self) -> None:
        try:
            self.loop.call_soon_threadsafe(self._set)
        except RuntimeError:  # the loop is closed, and its waiters with it
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
        except RuntimeError:  # the loop is closed: nothing of its runs any more
            return

    def dead(self) -> bool:
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
        """Wait while another task has taken a turn in this round of the loop.

        For steps of milliseconds that many tasks may take at once: others run in between.
        """
        import asyncio

        if self._turn is None:
            self._turn = asyncio.Lock()
        await self._turn.acquire()
        self.loop.call_soon(self._turn.release)

    async def settle(self, value: Awaitable[T]) -> T:
        return await value

    async def offload(self, function: Callable[..., T], *args: Any, apart: bool = False) -> T:
        waiter = _LoopWaiter(self.loop)
        context = contextvars.copy_context()
        outcome: list[Any] = [None, None]

        def job() -> None:
            try:
                outcome[0] = context.run(function, *args)
            except BaseException as error:
                outcome[1] = error
            waiter.set()

        (_apart if apart else _offload).submit(job)
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
        ended: Callable[[], None] | None = None,
        *,
        apart: bool = False,
    ) -> Handle:
        if apart:
            return BLOCKING.spawn(work, name, ended)
        task = self.loop.create_task(work(self), name=name)
        TASKS.add(task)
        task.add_done_callback(_finished)
        if ended is not None:  # a task that is cancelled before it begins runs no line of `work`
            task.add_done_callback(lambda _: ended())
        return _TaskHandle(task, self.loop)

    async def sleep(self, seconds: float) -> None:
        import asyncio

        await asyncio.sleep(seconds)

    def every(self, seconds: float, work: Callable[[Port], Coroutine[Any, Any, Any]]) -> Handle:
        return _ticker.every(seconds, work)

    def cancelled(self) -> bool:
        import asyncio

        task = asyncio.current_task()
        return task is not None and task.cancelling() > 0

    def client(self) -> object:
        return self.loop


def _finished(task: asyncio.Task[Any]) -> None:
    TASKS.discard(task)
    if not task.cancelled():
        error = task.exception()
        if error is not None:
            _complain(task.get_name(), error)


def _report(name: str, work: Callable[[], Any]) -> None:
    try:
        work()
    except BaseException as error:
        _complain(name, error)


def _complain(name: str, error: BaseException) -> None:
    events.emit(events.Event(events.ERROR, reason="background", detail=f"{name}: {error!r}"))


BLOCKING = Blocking()


def native() -> Native:
    """The port of the running event loop.

    Raises:
        EventLoopError: no loop of asyncio runs the caller.
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


_portal_lock = threading.Lock()
_portal_loop: asyncio.AbstractEventLoop | None = None


def _portal(work: Coroutine[Any, Any, T]) -> T:
    """Run a foreign coroutine on a loop in a thread of its own, and wait for it."""
    import asyncio

    future: concurrent.futures.Future[T] = asyncio.run_coroutine_threadsafe(work, _portal_running())
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


def _portal_running() -> asyncio.AbstractEventLoop:
    global _portal_loop
    import asyncio

    with _portal_lock:
        if _portal_loop is None:
            loop = asyncio.new_event_loop()
            start_thread(loop.run_forever, "memo-portal")
            _portal_loop = loop
        return _portal_loop


def run_elsewhere(work: Callable[[Native], Coroutine[Any, Any, T]]) -> T:
    """Run a coroutine of the engine over a native port from sync code, and wait for it.

    For sync helpers that must await a user's `async def`, such as `f.refresh()`.
    """

    async def inside() -> T:
        return await work(native())

    return _portal(inside())


async def drain(timeout: float | None = None) -> bool:
    """Wait until the background work of this process has ended.

    Args:
        timeout: seconds; what still runs then is cancelled (tasks of this loop) or left to its
            daemon thread.  None: as long as it takes.

    Returns:
        True when everything ended by itself.
    """
    import asyncio

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


def drain_blocking(timeout: float | None = None) -> bool:
    """As `drain`, for sync code: waits for the background threads."""
    end = None if timeout is None else time.monotonic() + timeout
    ended = _pool.drain(timeout)
    return _apart.drain(None if end is None else max(0.0, end - time.monotonic())) and ended


_last: list[Callable[[Port], Coroutine[Any, Any, None]]] = []


def at_exit(work: Callable[[Port], Coroutine[Any, Any, None]]) -> None:
    """Run `work(port)` when the interpreter exits, after the background work has ended."""
    _last.append(work)


def _at_exit() -> None:
    if not drain_blocking(EXIT_GRACE):
        events.emit(events.Event(events.ERROR, reason="exit", detail="dropped background work"))
    for work in _last:
        drive(work(BLOCKING))


def _after_fork() -> None:
    global _portal_loop, _portal_lock
    _portal_lock = threading.Lock()
    _portal_loop = None
    TASKS.clear()
    _pool._reset()
    _apart._reset()
    _offload._reset()
    _ticker._reset()
    DISPLAYS._reset()


atexit.register(_at_exit)
fork.in_child(_after_fork)
