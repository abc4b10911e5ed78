"""Leases: at most one computation per key on a host and in a cluster (`use_lock`).

Two locks, one inside the other:

*host*
    `flock` on a file of the key, in the cache directory.  The kernel frees it when its holder dies,
    so a waiter on the same host takes over at once.
*cluster*
    A record in the shared tier with `LEASE_SECONDS` to live.  A thread renews it every third of
    that time; it is released by compare-and-delete.  If a process has the host lock and finds that
    the cluster lease names its own host, the lease holder must be dead, so it replaces the lease.

So at most one process of each host waits for the cluster lease.  It is woken when the lease is
released, and checks every second in case the holder has died.  The other processes of its host poll
the host lock: every 2 ms at first, and every 100 ms later on.
Both locks carry a text with the holder, its start time and its expected duration: see `Holder`.
While the shared tier is down, the host lock alone limits this host to one computation.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

from memo.coordination.flights import FLIGHTS, Flight
from memo.errors import TierError, TierUnavailable
from memo.runtime import events, fork
from memo.runtime.blocking import at_exit
from memo.runtime.named_tuple import NamedTuple
from memo.runtime.port import Handle, Port, Waiter, waiting_for_locks
from memo.settings.options import Policy
from memo.stores.chain import Chain
from memo.stores.protocols import (
    LEASE_SECONDS,
    Leases,
    Lock,
    PendingLookup,
    function_in,
    key_in,
)
from memo.stores.transfers import Upload

LOOP_CHECK_SECONDS = 0.5
"""Seconds after which a waiting caller checks that the event loop that computes is still open."""
POLL_SECONDS = (0.002, 0.1)
"""Shortest and longest polling interval of a host lock in seconds; see `_poll_interval`."""
DEAD_HOLDER_SECONDS = 0.5
"""Seconds after which a host lock is tried although its file is unchanged: the holder may have
died."""
HOLDER_LOCK_SECONDS = 2.0
"""Seconds that a lease holder waits for a locked cache file (others wait 0.25 s).  If it
gives up, every waiting process has to recompute."""
_AFTER_EXPIRY_SECONDS = 0.01
"""Seconds that a waiting process adds to the remaining life of a lease before it checks again."""
MAX_WAIT_SECONDS = 1.0
"""Longest single wait for the cluster lease in seconds; then the waiting process checks its
holder."""


class Holder(NamedTuple):
    """The holder of a lease, parsed from the lease's text.

    Attributes:
        node: host name.
        process: process id.
        since: when its computation began, in Unix seconds by its own clock; None: not yet.
        expected: seconds that the computation took last time; None if unknown.
    """

    node: str
    process: str
    since: float | None = None
    expected: float | None = None

    @classmethod
    def parse(cls, text: str) -> Holder | None:
        """Parse the text of a lease; return None if it names no holder."""
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


MakeLookup = Callable[[], Coroutine[Any, Any, PendingLookup | None]]
"""Makes a lookup without sending it; None if it cannot be sent together with another command."""


class Lease:
    """The lease of one key, or a failed attempt to get it.

    Attributes:
        acquired: this process holds it.
        confirmed: the shared tier did not fail when it was acquired, or has renewed it since.
        waited: seconds that acquiring it took.
        pending_lookup: the lookup that was sent along with the acquisition, with its reply, or
            None.
        flight: the computation that it is for.
        holder_name: the unique name of this holder.
        text: the text of the lease: the holder's name and, once it computes, times.
    """

    __slots__ = (
        "_announced_holder",
        "_expected",
        "_leases",
        "_lock",
        "_name",
        "_next_check",
        "_renewal",
        "acquired",
        "confirmed",
        "flight",
        "holder_name",
        "pending_lookup",
        "text",
        "waited",
    )

    def __init__(
        self, name: str, holder_name: str, flight: Flight, expected: float | None = None
    ) -> None:
        self._name = name
        self.flight = flight
        self._lock: Lock | None = None
        self._leases: Leases | None = None
        self._renewal: Handle | None = None
        self._announced_holder: str | None = None
        self._next_check = 0.0
        self._expected = expected
        self.pending_lookup: PendingLookup | None = None
        self.holder_name = self.text = holder_name
        self.acquired = False
        self.confirmed = True
        self.waited = 0.0

    def new_text(self) -> str:
        """Make the text for a lease acquired now: holder, time and expected duration."""
        expected = "" if self._expected is None else f"{self._expected:.3f}"
        self.text = f"{self.holder_name}/{time.time():.3f}/{expected}"
        return self.text

    def emit_waiting(self, holder: str) -> None:
        """Emit the event of a wait that begins, or whose holder has changed."""
        if self._announced_holder is None or (holder and holder != self._announced_holder):
            self._announced_holder = holder
            self.emit(events.WAITING, detail=holder)

    def is_check_due(self) -> bool:
        """True if the holder was not checked for `MAX_WAIT_SECONDS`."""
        now = time.monotonic()
        due = now >= self._next_check
        if due:
            self._next_check = now + MAX_WAIT_SECONDS
        return due

    def emit_wait_ended(self) -> None:
        """Emit the event that the wait has ended, if there was one."""
        if self._announced_holder is not None:
            self._announced_holder = None
            self.emit(events.WAIT_ENDED)

    def emit(self, kind: str, **facts: Any) -> None:
        """Emit an event about the call that the lease is for."""
        events.emit(events.Event(kind, function_in(self._name), key_in(self._name), **facts))

    def hold(self, port: Port, lock: Lock | None, leases: Leases | None) -> Lease:
        """Take possession of the locks; renew the lease until it is released."""
        self.acquired = True
        self._lock, self._leases = lock, leases
        HELD_LEASES.add(self)
        if leases is not None or port.native:
            self._renewal = port.every(LEASE_SECONDS / 3, self._renew)
        return self

    async def _renew(self, port: Port) -> None:
        handle = self.flight.handle
        if handle is not None and handle.is_dead():  # its event loop is closed
            await self.release(port)
        leases = self._leases
        if leases is None:
            return
        try:
            kept = await leases.renew(port, self._name, self.text)
        except TierError:
            return  # the next renewal may get through in time
        if kept:
            self.confirmed = True
            return
        if self._leases is None:  # it was released meanwhile
            return
        self._leases = None
        if self.confirmed:
            self.emit(events.LEASE_LOST)

    async def release(self, port: Port, after: Upload | None = None) -> None:
        """Release the lease; a second call does nothing.

        Args:
            after: release it when this upload has ended, so that waiting processes find the entry.
        """
        if after is not None and after.run_after(self.release):
            return
        HELD_LEASES.discard(self)
        renewal, self._renewal = self._renewal, None
        lock, self._lock = self._lock, None
        leases, self._leases = self._leases, None
        if renewal is not None:
            renewal.cancel()
        try:
            if leases is not None:
                await leases.release(port, self._name, self.text)
        except TierError as error:
            self.emit(events.ERROR, reason="lease", detail=str(error))
        finally:
            if lock is not None:
                lock.release()


HELD_LEASES: set[Lease] = set()
"""The leases of this process; the interpreter releases them when it exits."""


async def _release_all(port: Port) -> None:
    for lease in tuple(HELD_LEASES):
        await lease.release(port)


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
    make_lookup: MakeLookup | None = None,
) -> Lease | None:
    """Acquire the lease of a key; return None if the policy needs none.

    It waits at most `policy.lock_timeout` seconds; then, after an event, the caller computes
    without the lease.

    Args:
        refresh: try once, without waiting.
        expected: seconds that the computation took last time, for the waiting processes.
        make_lookup: makes a lookup to send in the same exchange; see `Lease.pending_lookup`.
    """
    if not (policy.use_lock or refresh):
        return None
    begun = time.monotonic()
    limit = 0.0 if refresh else policy.lock_timeout
    end = None if limit is None else begun + limit
    lease = Lease(name, _holder_name(chain), flight, expected)
    lock = _host_lock(chain, name, lease)
    leases = chain.leases
    try:
        if lock is not None and not await _take_host_lock(
            port, lock, lease, end, lease_follows=leases is not None
        ):
            return _give_up(lease, lock, begun, refresh)
        if leases is not None and not await _take_cluster_lease(
            port, leases, name, lease, end, make_lookup
        ):
            if lock is not None:
                lock.release()
            return _give_up(lease, None, begun, refresh)
        if leases is not None and lock is not None:
            lock.label(lease.text)
    except BaseException:
        if lock is not None:
            lock.release()
        raise
    finally:
        lease.emit_wait_ended()
    lease.waited = time.monotonic() - begun
    return lease.hold(port, lock, leases)


def lock_patience(policy: Policy) -> AbstractContextManager[None]:
    """With `use_lock`, let this block wait `HOLDER_LOCK_SECONDS` for locks of SQLite."""
    return waiting_for_locks(HOLDER_LOCK_SECONDS) if policy.use_lock else nullcontext()


async def wait_until_over(
    port: Port, flight: Flight, waiter: Waiter, check_every: float | None = LOOP_CHECK_SECONDS
) -> None:
    """Wait until a flight is over; abandon it and free its lease if it can never finish.

    Args:
        check_every: seconds between checks of the event loop that computes; None: it is the
            caller's own.
    """
    while not await port.wait(waiter, check_every):
        if FLIGHTS.abandon_if_lost(flight):
            await free_lost_lease(port, flight)


async def free_lost_lease(port: Port, flight: Flight) -> None:
    """Free the lease of a flight that can never finish."""
    for lease in tuple(HELD_LEASES):
        if lease.flight is flight:
            await lease.release(port)


def _give_up(lease: Lease, lock: Lock | None, begun: float, refresh: bool) -> Lease:
    """Return the lease as not acquired; emit the timeout, unless it was for a refresh."""
    lease.waited = time.monotonic() - begun
    if not refresh:
        holder = lock.holder() if lock is not None else ""
        lease.emit(events.LOCK_TIMEOUT, seconds=lease.waited, detail=holder)
    return lease


def _host_lock(chain: Chain, name: str, lease: Lease) -> Lock | None:
    """Return the host lock of a key; None, after an event, if it cannot be made."""
    if chain.host is None:
        return None
    try:
        return chain.host.lock(name)
    except TierError as error:
        if not (isinstance(error, TierUnavailable) and error.reported):
            lease.emit(events.ERROR, reason="lock", detail=str(error))
        return None


async def _take_host_lock(
    port: Port, lock: Lock, lease: Lease, end: float | None, *, lease_follows: bool
) -> bool:
    """Acquire the host lock; False if that took too long.

    Args:
        end: when to give up, in monotonic seconds; None: never.
        lease_follows: the cluster lease is acquired next, so no computation begins yet.
    """
    known, since, next_try = "", time.monotonic(), 0.0
    while True:
        now = time.monotonic()
        if now >= next_try or lock.may_be_free():
            next_try = now + DEAD_HOLDER_SECONDS
            try:
                if lock.try_acquire(lease.holder_name if lease_follows else lease.new_text()):
                    return True
            except TierError as error:  # better to compute without a lock than to wait for a fault
                lease.emit(events.ERROR, reason="lock", detail=str(error))
                return True
            holder = lock.holder()
            if holder != known:  # the previous holder may have stored the result
                known, since = holder, now
            if lease.is_check_due():
                lease.emit_waiting(holder)
        if end is not None and now >= end:
            return False
        interval = _poll_interval(now - since)
        await port.sleep(interval if end is None else min(interval, end - now))


def _poll_interval(waited: float) -> float:
    """Return the seconds until a host lock is polled again: a twentieth of the wait so far.

    It varies, so that many waiting calls do not poll at the same time.

    Args:
        waited: seconds that the caller has waited for the same holder.
    """
    shortest, longest = POLL_SECONDS
    return min(longest, max(shortest, waited / 20)) * (1 - random.random() / 4)


async def _take_cluster_lease(
    port: Port,
    leases: Leases,
    name: str,
    lease: Lease,
    end: float | None,
    make_lookup: MakeLookup | None,
) -> bool:
    """Take the cluster lease; False if that took too long.

    True if the shared tier is down, too: the host lock is then enough.
    """
    try:
        while True:
            text = lease.new_text()
            pending = None if make_lookup is None else await make_lookup()
            lookup = None if pending is None else pending.lookup
            held_by = await leases.acquire(port, name, text, lookup)
            if held_by is None:
                lease.pending_lookup = None if lookup is None or lookup.answer is None else pending
                return True
            other, rest = held_by
            if _host_id(other) == _host_id(text) and await leases.replace(port, name, other, text):
                return True
            left = MAX_WAIT_SECONDS
            if end is not None:
                left = min(left, end - time.monotonic())
            if left <= 0:
                return False
            left = min(left, rest + _AFTER_EXPIRY_SECONDS)  # a holder that has died wakes no waiter
            lease.emit_waiting(other)
            await leases.wait(port, name, left)
    except TierError as error:  # it may have the lease all the same, so that is released later
        lease.confirmed = False
        lease.emit(events.ERROR, reason="lease", detail=str(error))
        return True


def _holder_name(chain: Chain) -> str:
    """Make a unique name for a holder: host id, host name, process, a random token."""
    host = ""
    if chain.host is not None:
        with suppress(TierError):  # without an id, no other process takes our host for its own
            host = chain.host.id
    host = host or os.urandom(8).hex()
    return f"{host}/{os.uname().nodename}/{os.getpid()}/{os.urandom(8).hex()}"


def _host_id(holder: str) -> str:
    return holder.partition("/")[0]
