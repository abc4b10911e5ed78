"""Statistics: the counters of this process, and snapshots of them.

Rules of this module:

1.  `Counters` is a hook on `events`; nothing else counts.
2.  A hit costs it less than 0.7 µs (`tests/unit/metrics/test_stats.py` measures it): one check
    of the clock and one append; pending hits are counted later, many at a time.
3.  Numbers leave it as frozen `snapshots`; `shared_counters` shares them between processes.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Container
from sys import getsizeof
from typing import TYPE_CHECKING

from memo import metrics
from memo.metrics.counters import (
    COUNTERS_BY_KIND,
    MAX_OUTCOMES,
    TIER_KINDS,
    Tally,
    TierTally,
    histogram_step,
)
from memo.runtime import events, fork
from memo.runtime.clock import SECOND, SYSTEM_CLOCK, Clock
from memo.runtime.events import Event
from memo.runtime.memory_budget import BUDGET
from memo.settings import configuration

if TYPE_CHECKING:
    from memo.metrics.shared_counters import Publisher

MAX_PENDING_HITS = 256
"""Number of pending hits before they are counted."""
MAX_SPAN_MISSES = 100
"""Maximum number of misses whose reasons a span keeps."""


_KEY_BYTES = getsizeof(1 << 62)
"""Bytes of the hash of a key."""
_EMPTY = Tally()


class Counters:
    """Counts events; an instance is a hook.

    Args:
        clock: tells the time of the timeline's points.
        on_new_second: called, outside the lock, after the first event of a new second.
    """

    def __init__(
        self, clock: Clock = SYSTEM_CLOCK, on_new_second: Callable[[], None] | None = None
    ) -> None:
        self._now = clock.wall_ns
        self._on_new_second = on_new_second
        self._lock = threading.RLock()
        self._pending: list[Event] = []
        self._tallies: dict[str, Tally] = {}
        self._tiers: dict[str, TierTally] = {}
        self.listeners: tuple[tuple[Callable[[Event], None], Container[str] | None], ...] = ()
        self.since = self._now()
        self._second = self.since // SECOND * SECOND
        self._until = self._second + SECOND
        BUDGET.add_table(self)

    def __sizeof__(self) -> int:
        """Return the bytes of the remembered keys, the part that grows."""
        keys = [tally.stored_keys for tally in tuple(self._tallies.values())]
        return sum(getsizeof(known) + _KEY_BYTES * len(known) for known in keys)

    def __call__(self, event: Event) -> None:
        """Count one event.

        A hit only becomes pending: hits are counted `MAX_PENDING_HITS` at a time, or when a second
        has passed, so that each costs one append and one check of the clock.
        """
        if event[0] != "hit":
            self._count_now(event)
            return
        if self._now() >= self._until:
            self._roll()
        pending = self._pending
        pending.append(event)  # atomic, so that no lock is needed here
        if len(pending) > MAX_PENDING_HITS:
            self._drain()

    def _roll(self) -> None:
        """Advance to the current second; pending hits belong to the one before."""
        with self._lock:
            self._drain()
            self._second = self._now() // SECOND * SECOND
            self._until = self._second + SECOND
        if self._on_new_second:
            self._on_new_second()

    def _drain(self) -> None:
        """Count the pending hits."""
        with self._lock:
            count = len(self._pending)
            hits = self._pending[:count]
            del self._pending[:count]  # others may have appended since
            last, tally = None, _EMPTY
            by_tier, times = tally.hits_by_tier, tally.hit_times
            bucket, outcomes = tally.bucket, tally.outcomes
            for _, function, key, tier, _, seconds, size, saved, _ in hits:
                if function is not last:
                    last, tally = function, self._current_tally(function)
                    by_tier, times = tally.hits_by_tier, tally.hit_times
                    bucket, outcomes = tally.bucket, tally.outcomes
                if len(outcomes) < MAX_OUTCOMES or key in outcomes:
                    outcomes[key] = "hit"
                by_tier[tier] += 1
                times[histogram_step(seconds)] += 1
                bucket[0] += 1
                tally.bytes_read += size
                tally.hit_seconds += seconds
                if saved > seconds:
                    tally.saved += saved - seconds

    def _current_tally(self, function: str) -> Tally:
        """Return the tally of a function, with its timeline at the current second."""
        tally = self._tallies.get(function)
        if tally is None:
            tally = self._tallies[function] = Tally()
        if tally.second != self._second:
            tally.roll(self._second)
        return tally

    def _count_now(self, event: Event) -> None:
        if not self._second <= self._now() < self._until:  # the clock may have been set back
            self._roll()
        kind = event.kind
        with self._lock:
            if kind == events.RECONFIGURED:  # the earlier state of a tier is irrelevant now
                for tier in self._tiers.values():
                    tier.up = None
            count = COUNTERS_BY_KIND.get(kind)
            if count:
                count(self._current_tally(event.function), event)
            if kind in TIER_KINDS and event.tier:
                self._count_tier(event)
        for listener, kinds in self.listeners:
            if kinds is None or kind in kinds:
                listener(event)

    def _count_tier(self, event: Event) -> None:
        tier = self._tiers.setdefault(event.tier, TierTally())
        if event.kind == events.ERROR:
            tier.errors += 1
            return
        tier.up = event.kind == events.TIER_UP
        tier.downs += not tier.up

    def listen(
        self, listener: Callable[[Event], None], kinds: Container[str] | None = None
    ) -> Callable[[], None]:
        """Call `listener(event)` for every event but hits; return a function that removes it.

        Cheaper than a hook of `events.on_event`, since the many hits do not reach it.

        Args:
            kinds: the kinds of events to receive; None: all.
        """
        wanted = listener, kinds
        with self._lock:
            self.listeners = (*self.listeners, wanted)

        def remove() -> None:
            with self._lock:
                self.listeners = tuple(x for x in self.listeners if x is not wanted)

        return remove

    @property
    def used(self) -> bool:
        """True if anything was counted."""
        return bool(self._pending or self._tallies)

    @property
    def has_unexplained(self) -> bool:
        """True if `unexplained` may return misses."""
        return any(tally.unexplained for tally in tuple(self._tallies.values()))

    def unexplained(self, reason: str) -> dict[str, list[str]]:
        """Return function -> keys that were missed for a reason and computed since the last call.

        Each is returned once; `explain` takes the explanation.
        """
        with self._lock:
            found = {
                name: [key for key, why in tally.unexplained.items() if why == reason]
                for name, tally in self._tallies.items()
            }
            for tally in self._tallies.values():
                tally.unexplained.clear()
        return {name: keys for name, keys in found.items() if name and keys}

    def explain(self, function: str, before: str, after: str) -> None:
        """Count a miss under another reason than at first."""
        with self._lock:
            explained = self._tallies.setdefault(function, Tally()).explained_later
            explained[before, after] = explained.get((before, after), 0) + 1

    def snapshot(self, *, explained: bool = True) -> metrics.Stats:
        """Return the current numbers.

        Args:
            explained: count misses under the reasons that were found later; the difference of two
                snapshots is correct only without that.
        """
        from memo.metrics import snapshots

        with self._lock:
            self._drain()
            parts = {
                name: snapshots.freeze(tally, explained) for name, tally in self._tallies.items()
            }
            tiers = {
                name: snapshots.TierStats(errors=t.errors, downs=t.downs, up=t.up)
                for name, t in self._tiers.items()
            }
        other = parts.pop("", snapshots.FunctionStats())
        for part in parts.values():
            for name, hits in part.hits_by_tier.items():
                tiers[name] = tiers.get(name, snapshots.TierStats()) + snapshots.TierStats(
                    hits=hits
                )
            for name, stale in part.stale_by_tier.items():
                tiers[name] = tiers.get(name, snapshots.TierStats()) + snapshots.TierStats(
                    stale=stale
                )
        return snapshots.Stats(parts, other, tiers, self.since / SECOND, self._now() / SECOND)

    def outcomes(self) -> dict[str, dict[str, str]]:
        """Return function -> key -> how it was answered last.

        `"hit"`, `"stale"` or `"computed"`.
        """
        with self._lock:
            self._drain()
            return {name: dict(tally.outcomes) for name, tally in self._tallies.items() if name}

    def info(self, function: str, currsize: int | None = None) -> metrics.CacheInfo:
        """Return the `cache_info()` of a function.

        Args:
            function: its id.
            currsize: the number of its entries, if the caller knows it.
        """
        from memo.metrics.snapshots import CacheInfo

        with self._lock:
            self._drain()
            tally = self._tallies.get(function, _EMPTY)
            hits = sum(tally.hits_by_tier.values()) + sum(tally.stale_by_tier.values())
            hits += tally.coalesced + tally.revalidated
            size = len(tally.stored_keys) if currsize is None else currsize
            return CacheInfo(hits, sum(tally.misses_by_reason.values()), None, size)

    def reset(self, function: str | None = None) -> None:
        """Reset the numbers to zero, for one function or for all.

        Running refreshes and tiers that are down are still known.
        """
        with self._lock:
            self._drain()
            names = tuple(self._tallies) if function is None else (function,)
            for name in names:
                old = self._tallies.pop(name, _EMPTY)
                if old.refreshes_running:
                    self._tallies[name] = Tally(old.refreshes_running)
            if function is not None:
                return
            for tier in self._tiers.values():
                tier.errors = tier.downs = 0
            self.since = self._now()

    def start_over(self) -> None:
        """Start over in the child of a fork, with a new lock."""
        self._lock = threading.RLock()
        self._pending = []
        self._tallies = {}
        self._tiers = {}
        self.listeners = ()
        self.since = self._now()


# --- A stretch of time --------------------------------------------------------------------------


class Span:
    """The events between its creation and `end()`: in a cell, or in a `with` block.

    An open span does not slow hits down: they are the difference of two snapshots.  Refreshes of
    stale answers that finish after the end are still included.

    Args:
        counters: the counters to use.
        changed: called after the end, in the thread in which it happens, whenever a refresh of one
            of the span's stale answers begins or ends.
    """

    def __init__(self, counters: Counters, changed: Callable[[Span], None] | None = None) -> None:
        self._counters = counters
        self._changed = changed
        self._before = counters.snapshot(explained=False)
        self._ended: metrics.Stats | None = None
        self._mark = counters.since
        self.misses: list[Event] = []
        """The first `MAX_SPAN_MISSES` misses, with their reasons."""
        self.refreshes: dict[str, str] = {}
        """Key of a stale answer -> the state of its refresh: `""` (not begun) or one of the states
        in `runtime.events`."""
        self._remove = counters.listen(self._handle)

    def _handle(self, event: Event) -> None:
        if event.kind in _REFRESH_STATES:
            self._refresh(event)
        elif self._ended is not None:
            return
        elif event.kind == events.STALE and not event.reason.startswith("error"):
            self.refreshes.setdefault(event.key, "")
        elif event.kind == events.MISS and len(self.misses) < MAX_SPAN_MISSES:
            self.misses.append(event)
        elif event.kind in (events.COALESCED, events.REVALIDATED):
            self._drop_miss(event.key)

    def _drop_miss(self, key: str) -> None:
        """Drop the miss of a lookup that was answered after all."""
        for index in reversed(range(len(self.misses))):
            if self.misses[index].key == key:
                del self.misses[index]
                return

    def _refresh(self, event: Event) -> None:
        running = self._ended is None
        begins = running and event.kind == events.REFRESH_STARTED
        if event.key not in self.refreshes and not begins:
            return
        elsewhere = event.reason == events.REFRESHED_ELSEWHERE
        self.refreshes[event.key] = event.reason if elsewhere else _REFRESH_STATES[event.kind]
        if self._ended is None:
            return
        if self.is_complete:
            self.close()
        if self._changed:
            self._changed(self)

    def end(self) -> None:
        """End the span; refreshes that it began are still followed, without blocking."""
        if self._ended is not None:
            return
        self._ended = self._difference()
        if self.is_complete:
            self.close()

    def close(self) -> None:
        """Stop listening; a second call does nothing."""
        self._remove()

    @property
    def is_complete(self) -> bool:
        """True if every refresh of the span has ended."""
        return not any(state in ("", events.REFRESHING) for state in self.refreshes.values())

    @property
    def stats(self) -> metrics.Stats:
        """The numbers of the span, up to now or to its end."""
        return self._difference() if self._ended is None else self._ended

    def _difference(self) -> metrics.Stats:
        now = self._counters.snapshot(explained=False)
        was_reset = self._counters.since != self._mark
        return now if was_reset else now - self._before

    @property
    def used(self) -> bool:
        """True if any cached function was called."""
        total = self.stats.total
        return bool(total.calls or total.failed)


_REFRESH_STATES = {
    events.REFRESH_STARTED: events.REFRESHING,
    events.REFRESH_DONE: events.REFRESHED,
    events.REFRESH_FAILED: events.FAILED_REFRESH,
}


# --- The counters of this process ---------------------------------------------------------------


_publisher: Publisher | None = None


def _get_publisher() -> Publisher:
    global _publisher
    if _publisher is None:
        from memo.metrics.shared_counters import Publisher

        _publisher = Publisher(COUNTERS.snapshot, configuration.home)
    return _publisher


def publish() -> None:
    """Write this process's snapshot for the others, unless that was done within the last second."""
    _get_publisher()()


def publish_now() -> None:
    """Write it now."""
    _get_publisher().publish()


def publish_soon() -> None:
    """Write it within a fraction of a second, unless `cancel_publish_soon` is called first."""
    _get_publisher().publish_soon()


def cancel_publish_soon() -> None:
    """Cancel `publish_soon`: the last running computation has ended, and its end was counted."""
    _get_publisher().cancel_soon()


COUNTERS = Counters(on_new_second=publish)
"""The counters of this process."""


@functools.cache
def listen() -> None:
    """Start to count; `import memo` does this, and a second call does nothing."""
    events.add_hook(COUNTERS.__call__)  # the bound method saves a lookup for each event
    fork.in_child(_after_fork)


def _after_fork() -> None:
    COUNTERS.start_over()
    if _publisher is not None:
        _publisher.start_over()


def reset(function: str | None = None) -> None:
    """Reset this process's counters to zero, those of one function (by id) or all."""
    COUNTERS.reset(function)


def cache_info(function: str, currsize: int | None = None) -> metrics.CacheInfo:
    """Return the `cache_info()` of a function by its id; see `Counters.info`."""
    return COUNTERS.info(function, currsize)


def open_span(changed: Callable[[Span], None] | None = None) -> Span:
    """Begin a span over this process's counters; see `Span`."""
    return Span(COUNTERS, changed)
