"""Flights: at most one computation per key in this process.

The first caller *leads*; the others *join* and wait.  Rules of this module:

1.  A flight has no owner: a caller that leaves it (cancelled or interrupted) affects no other.
    When the last one has left, the computation is cancelled, unless it is a refresh.
2.  A flight ends once: it *finishes* with a `FlightResult`, or it is *abandoned*, and one of the
    waiting callers leads a new one.
3.  An invalidation *detaches* a flight: no further caller joins it, and its result is not
    stored.  Its leader gets the result; the waiting callers look the entry up again.  If it is a
    soft one, the result is stored, as an entry that has expired.
4.  A caller that would wait for a flight that is waiting for that caller, directly or through other
    flights, gets a `ReentryError` immediately.
5.  Callers do not join a refresh that is still queued for a thread, since the threads may be
    waiting for them.  The first caller leads a new flight, and the queued refresh is dropped.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any

from memo.errors import ReentryError, label
from memo.records.codec import Encoded
from memo.records.seal import Entry
from memo.records.stamp_types import Ref, Stamp
from memo.runtime import fork
from memo.runtime.memory_budget import remember
from memo.runtime.named_tuple import NamedTuple
from memo.runtime.port import Handle, Port, Waiter
from memo.validity.stamps import Affected, Turn, is_soft

MAX_RECENT_FLIGHTS = 4096
"""Number of ended flights whose names are remembered."""


class FlightResult(NamedTuple):
    """The result of a computation.

    Attributes:
        value: the value that the function returned.
        error: the exception that it raised, or None.
        entry: the entry that was stored, or None.
        encoded: the bytes from which each caller that joined makes a copy; None: it cannot be
            copied.
        valid: its stamps still held after the last caller had joined.
        stamps: the stamps of everything that the computation used; None if some are unknown.
        known_stamps: the stamps that are known, even if others are not.
        started: when the computation began, in nanoseconds; 0 if it did not.
        cache_failed: the cache failed before the function ran: each caller computes alone.
        revalidated: an old value was confirmed: each caller looks it up.
    """

    value: Any = None
    error: BaseException | None = None
    entry: Entry | None = None
    encoded: Encoded | None = None
    valid: bool = True
    stamps: tuple[Stamp, ...] | None = None
    known_stamps: tuple[Stamp, ...] = ()
    started: int = 0
    cache_failed: bool = False
    revalidated: bool = False


class Flight:
    """A computation in progress, with the callers that wait for it.

    Attributes:
        name: the name under which the entry of its call is stored.
        refs: the generations that its entry depends on.
        background: it is a refresh that no caller has joined.
        queued: it is a refresh that has not begun.
        kept_running: it goes on even if no caller waits.
        result: its result; None while it runs, and if it was abandoned.
        over: it has ended.
        detached: an invalidation has closed it, so its result is not stored.
        join_count: number of callers that have joined.
        waiters: the waiters of the callers that are waiting.
        handle: the task or thread that computes; None: the leader itself does.
        call: the call, once its computation has begun.
        stream: the run of a generator, which consumers share.
        expected_duration: seconds that its computation took last time, or None.
        waits_for: the flights that its computation is waiting for.
    """

    __slots__ = (
        "background",
        "call",
        "detached",
        "expected_duration",
        "handle",
        "join_count",
        "kept_running",
        "name",
        "over",
        "queued",
        "refs",
        "result",
        "stream",
        "waiters",
        "waits_for",
    )

    def __init__(self, name: str, refs: Sequence[Ref], *, background: bool) -> None:
        self.name = name
        self.refs = refs
        self.background = self.queued = background
        self.kept_running = False
        self.result: FlightResult | None = None
        self.over = False
        self.detached = False
        self.join_count = 0
        self.waiters: list[Waiter] = []
        self.handle: Handle | None = None
        self.call: Any = None
        self.stream: Any = None
        self.expected_duration: float | None = None
        self.waits_for: list[Flight] = []

    def __repr__(self) -> str:
        return f"<Flight {self.name} {'over' if self.over else 'under way'}>"


_path: ContextVar[tuple[Flight, ...]] = ContextVar("memo_path", default=())
"""The flights that the running code is computing, outermost first: cached functions call others."""


def current_path() -> tuple[Flight, ...]:
    """Return the flights that the running code is computing, outermost first."""
    return _path.get()


@contextmanager
def on_path(path: tuple[Flight, ...]) -> Iterator[None]:
    """Let a block that runs in another thread count as part of these computations."""
    token = _path.set(path)
    try:
        yield
    finally:
        _path.reset(token)


class Flights:
    """The flights of this process."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._active: dict[str, Flight] = {}
        self._recent: dict[str, int] = {}
        self.ended_count = 0
        """Number of flights that have ended."""

    def join(
        self, name: str, refs: Sequence[Ref], *, background: bool = False
    ) -> tuple[Flight, bool]:
        """Join the flight of this name, or lead a new one; return it, and True for its leader.

        Raises:
            ReentryError: the flight waits, directly or not, for the caller.
        """
        path = _path.get()
        with self._lock:
            flight = self._active.get(name)
            if flight is not None and not background and path and _waits_for_any(flight, path):
                raise _reentry(name)
            if flight is not None and flight.queued and not background:
                flight.over = True  # it has no waiters
                flight = None
            leads = flight is None
            if flight is None:
                flight = self._active[name] = Flight(name, refs, background=background)
            else:
                flight.join_count += not background
            if not background:
                flight.background = False
                if path:  # under the lock of the check above, so that crossing calls see each other
                    path[-1].waits_for.append(flight)
            return flight, leads

    def begin_refresh(self, flight: Flight) -> bool:
        """Let callers join a refresh from now on; False if a caller has taken its place."""
        with self._lock:
            flight.queued = False
            return not flight.over

    def join_since(self, name: str, refs: Sequence[Ref], since: int) -> tuple[Flight | None, bool]:
        """Join a flight or lead one; None if one may have ended since the lookup: look up again.

        Args:
            since: `ended_count` before the caller looked the entry up.
        """
        flight, leads = self.join(name, refs)
        may_have_ended = (
            self._recent.get(name, 0) > since or self.ended_count - since > MAX_RECENT_FLIGHTS
        )
        if leads and may_have_ended:
            self._withdraw(flight)
            self.forget_wait(flight)
            return None, False
        return flight, leads

    def forget_wait(self, flight: Flight) -> None:
        """Record that the computation around this call no longer waits for a flight."""
        path = _path.get()
        if path:
            with self._lock:
                if flight in path[-1].waits_for:
                    path[-1].waits_for.remove(flight)

    def abandon(self, flight: Flight) -> None:
        """End a flight without a result, unless it has ended."""
        if not flight.over:
            self.finish(flight, None)

    def abandon_if_lost(self, flight: Flight) -> bool:
        """Abandon a flight that can never finish because its loop is closed; True if it was."""
        handle = flight.handle
        if flight.over or handle is None or not handle.is_dead():
            return False
        self.abandon(flight)
        return True

    def add_waiter(self, flight: Flight, port: Port) -> Waiter:
        """Return a waiter that is set when the flight ends; pass it to `remove_waiter` later."""
        waiter = port.waiter()
        with self._lock:
            if flight.over:
                waiter.set()
            else:
                flight.waiters.append(waiter)
        return waiter

    def remove_waiter(self, flight: Flight, waiter: Waiter) -> None:
        """Remove the waiter of a caller; if it was the last one, cancel the computation."""
        with self._lock:
            if waiter in flight.waiters:
                flight.waiters.remove(waiter)
            unwanted = not (
                flight.over or flight.waiters or flight.background or flight.kept_running
            )
            unwanted = unwanted and flight.handle is not None
            if unwanted and self._active.get(flight.name) is flight:
                del self._active[flight.name]
        if unwanted and flight.handle is not None:  # None: the leader computes in its own thread
            flight.handle.cancel()

    def keep_running(self, flight: Flight) -> None:
        """Let a computation finish even if no caller waits: later calls use its result."""
        flight.kept_running = True

    def close(self, flight: Flight) -> int:
        """Close the flight to new callers, and return how many have joined."""
        with self._lock:
            if self._active.get(flight.name) is flight:
                del self._active[flight.name]
            self.ended_count += 1
            remember(self._recent, flight.name, self.ended_count, MAX_RECENT_FLIGHTS)
            return flight.join_count

    def finish(self, flight: Flight, result: FlightResult | None) -> None:
        """End a flight, and wake the waiting callers; without a result it is abandoned."""
        self.close(flight)
        self._end(flight, result)

    def _withdraw(self, flight: Flight) -> None:
        """End a flight whose leader looks the entry up again instead of computing.

        It does not count as ended; otherwise two callers could withdraw because of each other
        forever.
        """
        with self._lock:
            if self._active.get(flight.name) is flight:
                del self._active[flight.name]
        self._end(flight, None)

    def _end(self, flight: Flight, result: FlightResult | None) -> None:
        with self._lock:
            flight.result = result
            flight.over = True
            waiters, flight.waiters = flight.waiters, []
        for waiter in waiters:
            waiter.set()

    def detach(self, turns: Iterable[Turn]) -> int:
        """Close to new callers the flights that an invalidation concerns; return their number."""
        if not self._active:
            return 0
        wanted = list(turns)
        affected = Affected(wanted)
        dropped = Affected(turn for turn in wanted if not is_soft(turn.arguments))
        with self._lock:
            names = [n for n, f in self._active.items() if affected.has_any(f.refs)]
            for name in names:
                flight = self._active.pop(name)
                # an expired run of a generator would be stored over the one that follows it
                flight.detached = flight.stream is not None or dropped.has_any(flight.refs)
        return len(names)

    def supersede(self, flight: Flight) -> None:
        """Close a flight whose key another process has invalidated: the next caller computes."""
        with self._lock:
            if self._active.get(flight.name) is flight:
                del self._active[flight.name]
            flight.detached = True

    def joinable_flights(self) -> list[Flight]:
        """Return the flights that a caller could join now."""
        with self._lock:
            return list(self._active.values())


def _reentry(name: str) -> ReentryError:
    function = label(name[name.find("{") + 1 : name.rfind("}")])
    return ReentryError(
        f"the computation of {function} asks for its own result; "
        "a cached function that calls itself must do so with other arguments"
    )


def refuse_reentry(name: str) -> None:
    """Raise an error if the running code is computing `name` already.

    Raises:
        ReentryError: the computation asks for its own result.
    """
    if any(flight.name == name and not flight.over for flight in _path.get()):
        raise _reentry(name)


def _waits_for_any(flight: Flight, path: tuple[Flight, ...]) -> bool:
    """True if `flight` waits for one of `path`, directly or through other flights."""
    seen: set[int] = set()
    todo = [flight]
    while todo:
        current = todo.pop()
        if current in path:
            return True
        if id(current) not in seen:
            seen.add(id(current))
            todo.extend(current.waits_for)
    return False


class inside:
    """Let the code of a block count as the computation of a flight: `with inside(flight): ...`.

    Args:
        background: no caller waits for it, so it is not part of the computation that started it.
    """

    __slots__ = ("_background", "_flight", "_token")
    FRAMES = 16
    """Python frames that one level of cached recursion adds to the user's own."""

    def __init__(self, flight: Flight, *, background: bool = False) -> None:
        self._flight = flight
        self._background = background

    def __enter__(self) -> None:
        path = (self._flight,) if self._background else (*_path.get(), self._flight)
        self._token = _path.set(path)
        if len(path) % 16 == 0:
            _raise_recursion_limit(len(path))

    def __exit__(self, *_: object) -> None:
        with suppress(ValueError):  # its loop is closed: it ends in the context of the collector
            _path.reset(self._token)


_limit = sys.getrecursionlimit()


def _raise_recursion_limit(depth: int) -> None:
    """Raise the recursion limit by the number of memo's frames, which leaves user code its own."""
    wanted = _limit + (depth + 32) * inside.FRAMES
    if sys.getrecursionlimit() < wanted:
        sys.setrecursionlimit(wanted)


FLIGHTS = Flights()

fork.in_child(FLIGHTS._reset)
