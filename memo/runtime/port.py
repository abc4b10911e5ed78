"""The port: how a coroutine of the engine waits, on an event loop or in a plain thread.

The engine and the tiers are written once, as coroutines that take a port.  With the port of
`native` they suspend on the running event loop.  With that of `blocking` no method suspends, so one
step of the coroutine is the whole call.
"""

from __future__ import annotations

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
"""Queries that sync code collects; None: it sends one after another."""


@contextmanager
def sharing_round_trips() -> Iterator[None]:
    """Collect the queries of sync code in this block; they are sent together once one is needed."""
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
    """Handle of a spawned task."""

    def cancel(self) -> None:
        """Ask it to stop, from any thread; a thread that has begun cannot be stopped."""
        ...

    def dead(self) -> bool:
        """True if it can never end, because the loop that it ran on is closed."""
        ...


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

    async def offload(self, function: Callable[..., T], *args: Any, apart: bool = False) -> T:
        """Call a function that may block: in a thread (native), or here (blocking).

        Args:
            function: the function to call.
            args: its arguments.
            apart: it may take long, so it must not occupy the small pool that other calls use.
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
        ended: Callable[[], None] | None = None,
        *,
        apart: bool = False,
    ) -> Handle:
        """Run `work(port)` in the background: a task of the loop, or a thread of a small pool.

        The port passed to `work` is that of the place it runs in.  Context variables are copied.

        Args:
            work: the coroutine function to run.
            name: the task's name, for display.
            ended: called when it has ended, even if it was cancelled before it began.
            apart: use a thread even on a loop, so that it neither blocks that loop nor ends with
                it. Without a loop: not in the small pool, so that it begins at once.
        """
        ...

    async def sleep(self, seconds: float) -> None:
        """Wait for `seconds`."""
        ...

    def every(self, seconds: float, work: Callable[[Port], Coroutine[Any, Any, Any]]) -> Handle:
        """Run `work(port)` at a fixed interval, over a blocking port in a thread of its own.

        Not on the loop, which the user's code may block.
        """
        ...

    def cancelled(self) -> bool:
        """True if the running task was asked to stop (blocking: never)."""
        ...

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """The running event loop, whose tasks may share a connection; None: it is a thread."""
        ...
