"""The port: how a coroutine of the engine waits, on an event loop or in a plain thread.

The engine and the tiers are written once, as coroutines that take a port.  With the port of
`native` they suspend on the running event loop.  With that of `blocking` no method suspends, so one
step of the coroutine is the whole call.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    import asyncio

T = TypeVar("T")

LOCK_WAIT_UNTIL: ContextVar[float] = ContextVar("memo_patient", default=0.0)
"""Time, by `time.monotonic`, until which the caller waits for locks of other processes."""


@contextmanager
def waiting_for_locks(seconds: float) -> Iterator[None]:
    """Let the calls in this block wait for locks of other processes, up to `seconds` in all.

    Only calls in threads wait, never those on an event loop.
    """
    token = LOCK_WAIT_UNTIL.set(time.monotonic() + seconds)
    try:
        yield
    finally:
        LOCK_WAIT_UNTIL.reset(token)


class Deferred:
    """A future answer, which sync code fetches only when `Port.settle` needs it."""

    __slots__ = ("get",)

    def __init__(self, get: Callable[[], Any]) -> None:
        self.get = get


SHARED_ROUND_TRIPS: ContextVar[dict[object, Any] | None] = ContextVar("memo_together", default=None)
"""Batches of lookups that sync code collects; None: it sends each at once."""


@contextmanager
def sharing_round_trips() -> Iterator[None]:
    """Collect the lookups of sync code in this block, and send them when one is needed."""
    token = SHARED_ROUND_TRIPS.set({})
    try:
        yield
    finally:
        SHARED_ROUND_TRIPS.reset(token)


class Waiter(Protocol):
    """A flag that one caller waits on and any other can set; created by `Port.waiter`."""

    def set(self) -> None:
        """Wake the waiter.  Safe from every thread, repeatedly, and after it has ended."""
        ...


class Handle(Protocol):
    """Background work that can be cancelled; returned by `Port.spawn` and `Port.every`."""

    def cancel(self) -> None:
        """Ask it to stop, from any thread; a thread that has begun cannot be stopped."""
        ...

    def is_dead(self) -> bool:
        """True if it can never end, since its loop is closed."""
        ...


MAX_STEP_SECONDS = 0.01
"""Seconds after which a long loop lets other tasks run: a fifth of what may block an event loop."""


class Steps:
    """Splits a long loop of a coroutine into steps, between which other tasks run."""

    __slots__ = ("_begun", "_port")

    def __init__(self, port: Port) -> None:
        self._port = port
        self._begun = time.perf_counter() if port.native else math.inf

    async def pause_if_due(self) -> None:
        """Let other tasks run if this step took `MAX_STEP_SECONDS`."""
        if time.perf_counter() - self._begun >= MAX_STEP_SECONDS:
            await self._port.turn()
            self._begun = time.perf_counter()


class Port(Protocol):
    """Waiting (`settle`, `offload`, `wait`, `sleep`) and background work (`spawn`, `every`)."""

    native: bool
    """True if coroutines may suspend, so that `settle` takes awaitables."""

    async def settle(self, value: Any) -> Any:
        """Await `value` (native), or return it (blocking: it is complete, or a `Deferred`).

        A foreign coroutine, such as a user's provider, runs on a loop of its own if the port is
        blocking.
        """
        ...

    async def offload(self, function: Callable[..., T], *args: Any, own_thread: bool = False) -> T:
        """Call a function that may block: in a thread (native), or here (blocking).

        Args:
            function: the function to call.
            args: its arguments.
            own_thread: it may take long, so use a thread outside the small pool.
        """
        ...

    async def wait(self, waiter: Waiter, timeout: float | None) -> bool:
        """Wait until `waiter` is set; False if `timeout` seconds passed first."""
        ...

    def waiter(self) -> Waiter:
        """Return a new waiter for the caller that runs now."""
        ...

    def spawn(
        self,
        work: Callable[[Port], Coroutine[Any, Any, Any]],
        name: str,
        on_end: Callable[[], None] | None = None,
        *,
        own_thread: bool = False,
    ) -> Handle:
        """Run `work(port)` in the background: a task of the loop, or a thread of a small pool.

        `work` gets the port of the loop or thread that it runs in.  Context variables are copied.

        Args:
            work: the coroutine function to run.
            name: the task's name, for display.
            on_end: called when the work has ended, even if it was cancelled before it began.
            own_thread: use one, even on a loop: the work begins at once, does not block the
                loop, and outlives it.
        """
        ...

    async def sleep(self, seconds: float) -> None:
        """Wait for `seconds`."""
        ...

    async def turn(self) -> None:
        """Let the other tasks of the loop run before a step that takes milliseconds (native).

        If many tasks wait for a turn, only one of them gets it in each iteration of the loop.
        """
        ...

    def every(self, seconds: float, work: Callable[[Port], Coroutine[Any, Any, Any]]) -> Handle:
        """Run `work(port)` at a fixed interval, over the blocking port in a daemon thread.

        It never runs on the loop, since the user's code may block that.
        """
        ...

    def is_cancelled(self) -> bool:
        """True if the running task is being cancelled (blocking: never)."""
        ...

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """The event loop, whose tasks may share a connection; None for the blocking port."""
        ...
