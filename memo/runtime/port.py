"""The port: how a coroutine of the engine waits, on an event loop or in a plain thread.

The engine and the tiers are written once, as coroutines that take a port.  Under the port of
`native` they suspend on the running event loop.  Under that of `blocking` no method suspends, so
that one step of the coroutine is the whole call.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar

T = TypeVar("T")

PATIENT: ContextVar[float] = ContextVar("memo_patient", default=0.0)
"""Time, by `time.monotonic`, until which the caller waits for what others have locked."""


@contextmanager
def patient(seconds: float) -> Iterator[None]:
    """Let the calls in this block wait for locks of others, at most `seconds` in all.

    Only calls that may block wait: those in threads, never on an event loop.
    """
    token = PATIENT.set(time.monotonic() + seconds)
    try:
        yield
    finally:
        PATIENT.reset(token)


class Later:
    """An answer that sync code fetches only when `Port.settle` needs it."""

    __slots__ = ("get",)

    def __init__(self, get: Callable[[], Any]) -> None:
        self.get = get


TOGETHER: ContextVar[dict[object, Any] | None] = ContextVar("memo_together", default=None)
"""Questions that sync code collects; None: it asks one after another."""


@contextmanager
def together() -> Iterator[None]:
    """Collect what sync code asks in this block; it is sent together once an answer is needed."""
    token = TOGETHER.set({})
    try:
        yield
    finally:
        TOGETHER.reset(token)


class Waiter(Protocol):
    """A flag that one caller waits on and any other can set; made by `Port.waiter`."""

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
    """True where coroutines may suspend, so where `settle` takes awaitables."""

    async def settle(self, value: Any) -> Any:
        """Await `value` (native), or hand it back as it is (blocking: it is there, or `Later`).

        A foreign coroutine, such as a user's provider, is run to its end on a loop of
        its own when the port is blocking.
        """
        ...

    async def offload(self, function: Callable[..., T], *args: Any, apart: bool = False) -> T:
        """Call a function that may block: in a thread (native), or here (blocking).

        Args:
            function: what to call.
            args: its arguments.
            apart: it may take long: not in the small pool, which other calls wait for.
        """
        ...

    async def wait(self, waiter: Waiter, timeout: float | None) -> bool:
        """Wait until `waiter` is set; False when `timeout` seconds went by first."""
        ...

    def waiter(self) -> Waiter:
        """A new waiter for the caller that runs now."""
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

        The port that `work` gets is the one of the place it runs in.  Context variables travel.

        Args:
            work: what to run.
            name: of the task, for people.
            ended: called when it has ended, also when it was cancelled before it began.
            apart: in a thread also where a loop runs, so that it neither holds up that loop nor
                ends with it.  Without a loop: not in the small pool, so that it begins at once.
        """
        ...

    async def sleep(self, seconds: float) -> None:
        """Let `seconds` go by."""
        ...

    def every(self, seconds: float, work: Callable[[Port], Coroutine[Any, Any, Any]]) -> Handle:
        """Run `work(port)` at a fixed interval, over a blocking port in a thread of its own.

        Not on the loop, which the user's code may block.
        """
        ...

    def cancelled(self) -> bool:
        """True if the running task was asked to stop (blocking: never)."""
        ...

    def client(self) -> object:
        """Scope in which a client connection may be shared: the running loop, or the process."""
        ...
