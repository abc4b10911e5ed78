"""Leases: at most one computation per key on a host and in a cluster (`use_lock`).

Two locks, one inside the other:

*host*
    `flock` on a file of the key, in the cache directory.  The kernel frees it when its holder dies,
    so a waiter on the same host takes over at once.
*cluster*
    A record in the shared tier with `LEASE` seconds to live, renewed every third of that by a
    thread and released by compare-and-delete.  If a process holds the host lock and finds that the
    cluster lease names its own host, the lease holder must be dead, and it replaces the lease.

So at most one process of each host waits for the cluster lease.  It is woken when the lease is
released, and checks every second in case the holder has died.  The other processes of its host poll
the host lock every 2 to 20 ms.
Both locks carry a text with the holder, its start time and its expected duration: see `Holder`.
If the shared tier is down, the host lock alone still limits this host to one computation.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

from memo.engine.coordination.flights import FLIGHTS, Flight
from memo.errors import TierError, TierUnavailable
from memo.runtime import events, fork
from memo.runtime.blocking import at_exit
from memo.runtime.named_tuple import NamedTuple
from memo.runtime.port import Handle, Port, Waiter, waiting_for_locks
from memo.settings.options import Policy
from memo.stores.chain import Chain
from memo.stores.protocols import LEASE, Leases, Lock, PendingLookup
from memo.stores.transfers import Upload

LOOK_AGAIN = 0.5
"""Seconds after which a waiting caller checks that the computing event loop is still open."""
POLL = (0.002, 0.02)
"""Polling interval of a host lock in seconds: it starts at the first value and doubles up to the
second while the holder stays the same."""
PATIENCE = 2.0
"""Seconds for which a lease holder waits for a locked cache file (others wait 0.25 s): if it gives
up, every waiting process has to recompute."""
_AFTER_EXPIRY = 0.01
"""Seconds after the expiry of a lease at which a waiting process checks it again."""
WAIT = 1.0
"""Longest single wait for the cluster lease in seconds; after that its holder is checked."""


class Holder(NamedTuple):
    """The holder of a lease, as parsed from the lease's text.

    Attributes:
        node: host name.
        process: process id.
        since: when its computation began, in Unix seconds by its own clock; None: not yet.
        expected: seconds that the computation took last time; None if the holder does not know.
    """

    node: str
    process: str
    since: float | None = None
    expected: float | None = None

    @classmethod
    def of(cls, text: str) -> Holder | None:
        """Parse the text of a lease; None if it names no holder."""
        parts = text.split("/")
        if len(parts) < 4:
            return None
        since, expected = map(_number, (*parts[4:6], "", "")[:2])
        return cls(parts[1], parts[2], since, expected)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


Question = Callable[[], Coroutine[Any, Any, PendingLookup | None]]
"""Makes a look-up that is not sent yet; None: it cannot be sent that way."""


class Lease:
    """Outcome of asking for a lease.

    Attributes:
        acquired: this process holds it.
        waited: seconds that it took to get it.
        asked: the look-up that was sent with the acquisition, answered after it; None: there was
            none.
    """

    __slots__ = (
        "_announced",
        "_expected",
        "_leases",
        "_lock",
        "_look_at",
        "_name",
        "_ticker",
        "acquired",
        "asked",
        "flight",
        "holder",
        "text",
        "waited",
    )

    def __init__(
        self, name: str, holder: str, flight: Flight, expected: float | None = None
    ) -> None:
        self._name = name
        self.flight = flight
        self._lock: Lock | None = None
        self._leases: Leases | None = None
        self._ticker: Handle | None = None
        self._announced: str | None = None
        self._look_at = 0.0
        self._expected = expected
        self.asked: PendingLookup | None = None
        self.holder = self.text = holder
        self.acquired = False
        self.waited = 0.0

    def sign(self) -> str:
        """Return the text for a lease that is acquired now: holder, time and expected duration."""
        expected = "" if self._expected is None else f"{self._expected:.3f}"
        self.text = f"{self.holder}/{time.time():.3f}/{expected}"
        return self.text

    def emit_waiting(self, holder: str) -> None:
        """Emit the start of a wait with its holder; again when the holder changes."""
        if self._announced is None or (holder and holder != self._announced):
            self._announced = holder
            self._emit(events.WAITING, holder)

    def is_check_due(self) -> bool:
        """True if it is time to look at the holder."""
        now = time.monotonic()
        due = now >= self._look_at
        if due:
            self._look_at = now + WAIT
        return due

    def emit_wait_ended(self) -> None:
        """Emit the end of the wait, if there was one."""
        if self._announced is not None:
            self._announced = None
            self._emit(events.WAIT_ENDED)

    def _emit(self, kind: str, holder: str = "") -> None:
        function = self._name.partition("{")[2].rpartition("}")[0]
        events.emit(events.Event(kind, function, _key(self._name), detail=holder))

    def keep(self, port: Port, lock: Lock | None, leases: Leases | None) -> Lease:
        """Keep the acquired lease: renew it until it is released."""
        self.acquired = True
        self._lock, self._leases = lock, leases
        HELD_LEASES.add(self)
        if leases is not None or port.native:
            self._ticker = port.every(LEASE / 3, self._renew)
        return self

    async def _renew(self, port: Port) -> None:
        handle = self.flight.handle
        if handle is not None and handle.is_dead():  # its event loop is closed, and no caller waits
            await self.release(port)
        if self._leases is None:
            return
        try:
            kept = await self._leases.renew(port, self._name, self.text)
        except TierError:
            return  # the next renewal may get through in time
        if not kept:
            self._leases = None
            events.emit(events.Event(events.LEASE_LOST, key=_key(self._name)))

    async def release(self, port: Port, after: Upload | None = None) -> None:
        """Release it; calling this twice is harmless.

        Args:
            after: when this upload has ended, so that a waiting process finds the entry.
        """
        if after is not None and after.run_after(self.release):
            return
        HELD_LEASES.discard(self)
        ticker, self._ticker = self._ticker, None
        lock, self._lock = self._lock, None
        leases, self._leases = self._leases, None
        if ticker is not None:
            ticker.cancel()
        try:
            if leases is not None:
                await leases.release(port, self._name, self.text)
        except TierError as error:
            events.emit(events.Event(events.ERROR, reason="lease", detail=str(error)))
        finally:
            if lock is not None:
                lock.release()


HELD_LEASES: set[Lease] = set()
"""The leases that this process holds; released at interpreter exit."""


async def _release_all(port: Port) -> None:
    for held in tuple(HELD_LEASES):
        await held.release(port)


at_exit(_release_all)
fork.in_child(HELD_LEASES.clear)


async def acquire_lease(
    port: Port,
    chain: Chain,
    name: str,
    policy: Policy,
    flight: Flight,
    *,
    refresh: bool = False,
    expected: float | None = None,
    question: Question | None = None,
) -> Lease | None:
    """Acquire the lease of a key; None if the policy wants none.

    With `refresh` this only tries, and never waits.  Otherwise it waits for at most
    `policy.lock_timeout` seconds; then the caller computes without the lease, with an event.
    Waiting processes see that the computation takes `expected` seconds.

    Args:
        question: makes the look-up to send in the same exchange: `Lease.asked`.
    """
    if not (policy.use_lock or refresh):
        return None
    begun = time.monotonic()
    limit = 0.0 if refresh else policy.lock_timeout
    end = None if limit is None else begun + limit
    held = Lease(name, _holder_name(chain), flight, expected)
    lock = _host_lock(chain, name)
    leases = chain.leases
    try:
        if lock is not None and not await _take_host_lock(
            port, lock, held, end, first=leases is not None
        ):
            return _gave_up(held, lock, begun, refresh)
        if leases is not None and not await _take_cluster_lease(
            port, leases, name, held, end, question
        ):
            if lock is not None:
                lock.release()
            return _gave_up(held, None, begun, refresh)
        if leases is not None and lock is not None:
            lock.label(held.text)
    except BaseException:
        if lock is not None:
            lock.release()
        raise
    finally:
        held.emit_wait_ended()
    held.waited = time.monotonic() - begun
    return held.keep(port, lock, leases)


def patience(policy: Policy) -> AbstractContextManager[None]:
    """Let operations in this block wait for a lock of SQLite while a lease is held."""
    return waiting_for_locks(PATIENCE) if policy.use_lock else nullcontext()


async def wait_until_over(
    port: Port, flight: Flight, waiter: Waiter, every: float | None = LOOK_AGAIN
) -> None:
    """Wait until a flight is over; the lease of one that can never finish is freed.

    Args:
        every: seconds between two looks at the loop that computes; None: it is the caller's.
    """
    while not await port.wait(waiter, every):
        if FLIGHTS.abandon_if_lost(flight):
            await free_lost_lease(port, flight)


async def free_lost_lease(port: Port, flight: Flight) -> None:
    """Free the lease of a flight that can never finish."""
    for held in tuple(HELD_LEASES):
        if held.flight is flight:
            await held.release(port)


def _gave_up(held: Lease, lock: Lock | None, begun: float, refresh: bool) -> Lease:
    held.waited = time.monotonic() - begun
    if not refresh:
        holder = lock.holder() if lock is not None else ""
        events.emit(
            events.Event(
                events.LOCK_TIMEOUT, key=_key(held._name), seconds=held.waited, detail=holder
            )
        )
    return held


def _host_lock(chain: Chain, name: str) -> Lock | None:
    if chain.host is None:
        return None
    try:
        return chain.host.lock(name)
    except TierError as error:
        if not (isinstance(error, TierUnavailable) and error.reported):
            events.emit(events.Event(events.ERROR, reason="lock", detail=str(error)))
        return None


async def _take_host_lock(
    port: Port, lock: Lock, held: Lease, end: float | None, *, first: bool
) -> bool:
    """Acquire the host lock; `first`: the cluster lease follows, and no computation runs yet."""
    shortest, longest = POLL
    pause, known = shortest, ""
    while True:
        try:
            if lock.try_acquire(held.holder if first else held.sign()):
                return True
        except TierError as error:  # compute without a lock rather than block on a fault
            events.emit(events.Event(events.ERROR, reason="lock", detail=str(error)))
            return True
        if end is not None and time.monotonic() >= end:
            return False
        holder = lock.holder()
        if holder != known:  # another holder: the one before may have stored the result
            pause, known = shortest, holder
        if held.is_check_due():
            held.emit_waiting(holder)
        await port.sleep(pause)
        pause = min(longest, pause * 2)


async def _take_cluster_lease(
    port: Port,
    leases: Leases,
    name: str,
    held: Lease,
    end: float | None,
    question: Question | None,
) -> bool:
    """Take the cluster lease; True also if the cluster is down, as the host lock then suffices."""
    try:
        while True:
            who = held.sign()
            asked = None if question is None else await question()
            lookup = None if asked is None else asked.lookup
            held_by = await leases.acquire(port, name, who, lookup)
            if held_by is None:
                held.asked = None if lookup is None or lookup.answer is None else asked
                return True
            other, rest = held_by
            if _host_of(other) == _host_of(who) and await leases.replace(port, name, other, who):
                return True
            left = WAIT if end is None else min(WAIT, end - time.monotonic())
            if left <= 0:
                return False
            left = min(left, rest + _AFTER_EXPIRY)  # a holder that dies wakes no waiter
            held.emit_waiting(other)
            await leases.wait(port, name, left)
    except TierError as error:
        events.emit(events.Event(events.ERROR, reason="lease", detail=str(error)))
        return True


def _holder_name(chain: Chain) -> str:
    """Return a new name for a holder: host id, host name, process, a random token."""
    host = ""
    if chain.host is not None:
        with suppress(TierError):  # no host id: other processes will not treat us as of their host
            host = chain.host.id
    host = host or os.urandom(8).hex()
    return f"{host}/{os.uname().nodename}/{os.getpid()}/{os.urandom(8).hex()}"


def _host_of(holder: str) -> str:
    return holder.partition("/")[0]


def _key(name: str) -> str:
    return name.rpartition(":")[2]
