"""The blocking port: plain functions, which wait in their own thread.

`Blocking` never suspends, so `drive` runs a whole coroutine of the engine in one step, in the
caller's thread and without a loop; that is why sync cached functions work inside Jupyter's own
running loop.

Background work (refreshes, write-backs) runs in a small pool of daemon threads.  `drain_blocking`
waits for it; at interpreter exit it may take `EXIT_GRACE_SECONDS` more.
All work of the engine that needs a thread gets it here.  The Redis tier, the shared statistics and
the hashing of big arrays start a few threads of their own.
"""

from __future__ import annotations

import atexit
import contextvars
import inspect
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from memo.runtime import events, fork
from memo.runtime.named_tuple import NamedTuple
from memo.runtime.port import Deferred, Handle, Port, Waiter

if TYPE_CHECKING:
    import asyncio
    import concurrent.futures

T = TypeVar("T")
EXIT_GRACE_SECONDS = 1.5
"""Seconds that background work may still take when the interpreter exits."""
POOL_THREADS = 4
"""Maximum number of threads for background work of sync code, started when needed."""
_IDLE_THREAD_SECONDS = 10.0
"""Seconds after which an idle pool thread ends."""


def drive(work: Coroutine[Any, Any, T]) -> T:
    """Return the result of a coroutine that runs over a blocking port, in one step.

    Raises:
        RuntimeError: the coroutine suspended, so it awaited something outside of the port.
    """
    if not _RECURSION_PER_THREAD:
        return _drive(work)
    depth = getattr(_nesting, "depth", 0)
    if depth == _RECURSION_PER_THREAD:
        return _drive_in_thread(work)
    _nesting.depth = depth + 1
    try:
        return _drive(work)
    finally:
        _nesting.depth = depth


_RECURSION_PER_THREAD = 64 if sys.version_info[:2] == (3, 12) else 0
"""Levels of cached recursion per thread on Python 3.12, where the limit of C frames is fixed."""
_nesting = threading.local()
"""Number of nested coroutines in a thread, where that is counted."""


def _drive_in_thread(work: Coroutine[Any, Any, T]) -> T:
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
        RuntimeError: no thread can be started: there are too many, or the process is exiting.
    """
    threading.Thread(target=work, name=name, daemon=True).start()


class Pool:
    """Daemon threads that run jobs, at most `size` at once; idle ones end."""

    def __init__(self, name: str, size: int) -> None:
        self._name = name
        self._size = size
        self.reset()

    def reset(self) -> None:
        """Start anew, in a process that was just forked."""
        self._jobs: deque[Callable[[], None]] = deque()
        self._lock = threading.Lock()
        self._threads = 0
        self._idle = 0
        self._busy = 0
        self._jobs_waiting = threading.Condition(self._lock)
        self._all_done = threading.Condition(self._lock)

    def submit(self, job: Callable[[], None], *, at_once: bool = False) -> None:
        """Run `job()` in a thread of the pool, or here if there is none; an error is an event.

        Args:
            job: the function to call.
            at_once: do not wait for other jobs: use one more thread than `size` if necessary.
        """
        with self._lock:
            self._busy += 1
            start = self._idle <= len(self._jobs) and (at_once or self._threads < self._size)
            if not start:
                self._jobs.append(job)
                self._jobs_waiting.notify()
                return
            self._threads += 1
        try:
            start_thread(partial(self._work, [job]), self._name)
        except RuntimeError:  # too many threads: another one of the pool runs it, or this one
            with self._lock:
                self._threads -= 1
                if self._threads and not at_once:
                    self._jobs.append(job)
                    self._jobs_waiting.notify()
                    return
            self._run(job)

    def _work(self, first: list[Callable[[], None]]) -> None:
        self._run(first.pop())  # from a list, so that an idle thread keeps no job alive
        while True:
            with self._lock:
                self._idle += 1
                there = self._jobs_waiting.wait_for(lambda: self._jobs, _IDLE_THREAD_SECONDS)
                self._idle -= 1
                if not there:
                    self._threads -= 1
                    return
                job = self._jobs.popleft()
            self._run(job)
            del job

    def _run(self, job: Callable[[], None]) -> None:
        try:
            _report(self._name, job)
        finally:
            with self._lock:
                self._busy -= 1
                if not self._busy:
                    self._all_done.notify_all()

    def drain(self, timeout: float | None) -> bool:
        """Wait until nothing runs and nothing is queued; False if `timeout` passed first."""
        with self._lock:
            return self._all_done.wait_for(lambda: not self._busy, timeout)


BACKGROUND = Pool("memo-background", POOL_THREADS)
"""For background work of sync code."""
OWN_THREADS = Pool("memo-background-own", 64)
"""For long work, such as computations of users' functions."""
OFFLOAD = Pool("memo-offload", 8)
"""For short work of async code that would block the event loop."""
_in_own_thread: ContextVar[bool] = ContextVar("memo_in_own_thread", default=False)
"""True in code for which a thread of `OWN_THREADS` may be waiting."""


def run_in_own_thread(
    job: Callable[[], None], context: contextvars.Context, *, at_once: bool = False
) -> None:
    """Run `job()`, whose work is done in `context`, in a thread of `OWN_THREADS`.

    If such a thread may be waiting for the job, the job does not wait for one.

    Args:
        at_once: see `Pool.submit`.
    """
    nested = _in_own_thread.get()
    context.run(_in_own_thread.set, True)
    OWN_THREADS.submit(job, at_once=at_once or nested)


class _Job:
    """A handle of work in the pool, which can be dropped until it has begun."""

    __slots__ = ("dropped",)

    def __init__(self) -> None:
        self.dropped = False

    def cancel(self) -> None:
        self.dropped = True

    def is_dead(self) -> bool:
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

    def is_dead(self) -> bool:
        return False


class Ticker:
    """One daemon thread that does work at intervals; it ends when there is none left."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.reset()

    def reset(self) -> None:
        """Start anew, in a process that was just forked."""
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
                    report_fault(self._name, error)
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
                if left <= 0:  # missed ticks are not made up for
                    tick.due += tick.interval * (1 + -left // tick.interval)
                    return tick
                self._changed.wait(left)
            self._running = False
            return None


RENEWALS = Ticker("memo-renew")
DISPLAYS = Ticker("memo-show")
"""For displays: listing entries may be slow, and must not delay the renewal of a lease."""


class Blocking:
    """The port of sync code: every operation is complete when its method returns."""

    native = False
    loop = None

    async def settle(self, value: Any) -> Any:
        if inspect.iscoroutine(value):
            return run_in_foreign_loop(value)
        return value.get() if type(value) is Deferred else value

    async def offload(self, function: Callable[..., T], *args: Any, own_thread: bool = False) -> T:
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
        on_end: Callable[[], None] | None = None,
        *,
        own_thread: bool = False,
    ) -> Handle:
        context = contextvars.copy_context()
        handle = _Job()

        def job() -> None:
            try:
                if not handle.dropped:
                    context.run(_report, name, lambda: drive(work(BLOCKING)))
            finally:
                if on_end is not None:
                    on_end()

        if own_thread:
            run_in_own_thread(job, context, at_once=True)
        else:
            BACKGROUND.submit(job)
        return handle

    async def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    async def turn(self) -> None:
        return

    def every(self, seconds: float, work: Callable[[Port], Coroutine[Any, Any, Any]]) -> Handle:
        return RENEWALS.every(seconds, work)

    def is_cancelled(self) -> bool:
        return False


BLOCKING = Blocking()


def _report(name: str, work: Callable[[], Any]) -> None:
    try:
        work()
    except BaseException as error:
        report_fault(name, error)


def report_fault(name: str, error: BaseException) -> None:
    """Report an error of background work, which has no caller, as an event."""
    events.emit(events.Event(events.ERROR, reason="background", detail=f"{name}: {error!r}"))


class LoopDepth(NamedTuple):
    """The number of event loops of memo's that are blocked until the running code returns.

    Attributes:
        function: those that run users' cached functions.
        foreign: those that run foreign coroutines, such as a provider's.
    """

    function: int = 0
    foreign: int = 0


_NO_LOOP = LoopDepth()
_loop_depth: ContextVar[LoopDepth] = ContextVar("memo_loop_depth", default=_NO_LOOP)
_loop_lock = threading.Lock()
_loops: dict[tuple[str, int], asyncio.AbstractEventLoop] = {}
"""Event loops, each in a thread of its own that is never stopped: what they run, depth -> loop."""


def current_loop_depth() -> LoopDepth:
    """Return the depth of the running code, for a thread that works for it."""
    return _loop_depth.get()


@contextmanager
def at_loop_depth(depth: LoopDepth) -> Iterator[None]:
    """Let a block that runs in another thread wait for the loops that code at `depth` may use."""
    token = _loop_depth.set(depth)
    try:
        yield
    finally:
        _loop_depth.reset(token)


def run_in_function_loop(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that calls users' functions on a loop in another thread, and wait for it.

    Such a function may call sync code, which blocks the loop and may need a loop in turn: it gets
    the one of the next depth.  Foreign coroutines have loops of their own, since other threads,
    for which such sync code waits, may need those.
    """
    depth = _loop_depth.get()
    inner = depth._replace(function=depth.function + 1)
    return _run_in_loop(("function", depth.function), inner, work)


def run_in_foreign_loop(work: Coroutine[Any, Any, T]) -> T:
    """Run a foreign coroutine on a loop in another thread, and wait for it."""
    depth = _loop_depth.get()
    inner = LoopDepth(depth.function + 1, depth.foreign + 1)
    return _run_in_loop(("foreign", depth.foreign), inner, work)


def _run_in_loop(place: tuple[str, int], inner: LoopDepth, work: Coroutine[Any, Any, T]) -> T:
    import asyncio

    async def run() -> T:  # in a copy of the caller's context
        _loop_depth.set(inner)
        return await work

    loop = _loop_at(place)
    future: concurrent.futures.Future[T] = asyncio.run_coroutine_threadsafe(run(), loop)
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


def _loop_at(place: tuple[str, int]) -> asyncio.AbstractEventLoop:
    import asyncio

    with _loop_lock:
        loop = _loops.get(place)
        if loop is None:
            loop = asyncio.new_event_loop()
            start_thread(partial(_run_loop, loop), "memo-portal")
            _loops[place] = loop
        return loop


def _run_loop(loop: asyncio.AbstractEventLoop) -> None:
    """Run a loop forever, also after a task on it has exited: its caller gets the exception."""
    while True:
        with suppress(SystemExit, KeyboardInterrupt):
            loop.run_forever()


def drain_blocking(timeout: float | None = None) -> bool:
    """Like `drain`, for sync code: waits for the background threads."""
    end = None if timeout is None else time.monotonic() + timeout
    ended = BACKGROUND.drain(timeout)
    return OWN_THREADS.drain(None if end is None else max(0.0, end - time.monotonic())) and ended


_exit_work: list[Callable[[Port], Coroutine[Any, Any, None]]] = []


def at_exit(work: Callable[[Port], Coroutine[Any, Any, None]]) -> None:
    """Run `work(port)` when the interpreter exits, after the background work has ended."""
    _exit_work.append(work)


def _at_exit() -> None:
    if not drain_blocking(EXIT_GRACE_SECONDS):
        events.emit(events.Event(events.ERROR, reason="exit", detail="dropped background work"))
    for work in _exit_work:
        drive(work(BLOCKING))


def _after_fork() -> None:
    global _loop_lock
    _loop_lock = threading.Lock()
    _loops.clear()
    for pool in (BACKGROUND, OWN_THREADS, OFFLOAD):
        pool.reset()
    RENEWALS.reset()
    DISPLAYS.reset()


atexit.register(_at_exit)
fork.in_child(_after_fork)
