"""Tallies: the running numbers of one function, and what each kind of event adds to them.

Only `memo.metrics.recorder.COUNTERS` changes a tally, under its lock.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from math import log2

from memo.runtime import events
from memo.runtime.clock import SECOND
from memo.runtime.events import REFRESHED_ELSEWHERE, Event

_STEPS_PER_DOUBLING = 8
"""Steps per doubling in the histogram of hit times: a median is accurate to about 4.5 %."""
_STEP_OF_ONE_SECOND = 30 * _STEPS_PER_DOUBLING
"""Step of one second; step 0 is everything up to a nanosecond."""
MAX_TIMELINE_POINTS = 128
"""Maximum number of points of a timeline; beyond it, two neighbours are merged into one of twice
the width."""
MAX_OPEN_MISSES = 4096
"""Maximum number of keys whose running computation is remembered."""
MAX_OUTCOMES = 4096
"""Maximum number of keys per function whose latest outcome is remembered, for the graph."""
MAX_UNEXPLAINED = 256
"""Maximum number of misses per function that wait for a better explanation."""
MAX_STORED_KEYS = 65536
"""Maximum number of stored keys that are remembered per function, for `cache_info().currsize`: by
their hashes, so that the texts need not be kept."""


class Tally:
    """The running numbers of one function; `snapshots.freeze` makes a `FunctionStats` of them.

    Attributes without a namesake there:
        unexplained: key -> reason of its miss, until the cause is looked for.
        explained_later: (first reason, better reason) -> number of misses.
        stored_keys: hashes of the keys of stored entries.
        outcomes: key -> kind of the event that answered it last.
        open_misses: key -> (reason, second) of each miss whose computation has not ended.
        points: the timeline: start of a step in nanoseconds -> its hits, stale hits and misses.
        bucket: the current step.
        second: the second that `bucket` was chosen for.
        width: nanoseconds of a step.
    """

    __slots__ = (
        "bucket",
        "bytes_read",
        "bytes_stored",
        "coalesced",
        "compute_seconds",
        "computed",
        "errors_by_reason",
        "explained_later",
        "failed_by_type",
        "hit_seconds",
        "hit_times",
        "hits_by_tier",
        "invalidations",
        "leases_lost",
        "lock_timeouts",
        "misses_by_reason",
        "open_misses",
        "outcomes",
        "points",
        "refreshes_done",
        "refreshes_failed",
        "refreshes_running",
        "revalidated",
        "saved",
        "second",
        "stale_by_tier",
        "stored",
        "stored_keys",
        "unexplained",
        "wait_seconds",
        "waits",
        "width",
    )  # fmt: skip

    def __init__(self, running: int = 0) -> None:
        self.hits_by_tier: defaultdict[str, int] = defaultdict(int)
        self.stale_by_tier: dict[str, int] = {}
        self.misses_by_reason: dict[str, int] = {}
        self.unexplained: dict[str, str] = {}
        self.explained_later: dict[tuple[str, str], int] = {}
        self.failed_by_type: dict[str, int] = {}
        self.errors_by_reason: dict[str, int] = {}
        self.hit_times: defaultdict[int, int] = defaultdict(int)
        self.stored_keys: set[int] = set()
        self.outcomes: dict[str, str] = {}
        self.open_misses: dict[str, list[tuple[str, int]]] = {}
        self.refreshes_running = running
        self.refreshes_done = self.refreshes_failed = self.computed = self.stored = 0
        self.bytes_stored = self.bytes_read = self.waits = self.lock_timeouts = self.leases_lost = 0
        self.coalesced = self.invalidations = self.revalidated = 0
        self.compute_seconds = self.hit_seconds = self.saved = self.wait_seconds = 0.0
        self.width = SECOND
        self.points: dict[int, list[int]] = {}
        self.bucket = [0, 0, 0]
        self.second = -1

    def roll(self, second: int) -> None:
        """Advance the timeline to the bucket for a second, in nanoseconds since the epoch."""
        while len(self.points) >= MAX_TIMELINE_POINTS:
            self._widen()
        self.second = second
        self.bucket = self.points.setdefault(second - second % self.width, [0, 0, 0])

    def _widen(self) -> None:
        self.width *= 2
        points: dict[int, list[int]] = {}
        for start, counts in self.points.items():
            into = points.setdefault(start - start % self.width, [0, 0, 0])
            for index, count in enumerate(counts):
                into[index] += count
        self.points = points


class TierTally:
    """The running numbers of one tier that are not part of any function's tally."""

    __slots__ = ("downs", "errors", "up")

    def __init__(self) -> None:
        self.errors = 0
        self.downs = 0
        self.up: bool | None = None


def _increment(counts: dict[str, int], name: str) -> None:
    counts[name] = counts.get(name, 0) + 1


def _note_outcome(tally: Tally, event: Event) -> None:
    if len(tally.outcomes) < MAX_OUTCOMES or event.key in tally.outcomes:
        tally.outcomes[event.key] = event.kind


def histogram_step(seconds: float) -> int:
    """Return the step of a time in the histogram of hit times."""
    return int(log2(seconds) * _STEPS_PER_DOUBLING + _STEP_OF_ONE_SECOND) if seconds > 1e-9 else 0


def step_seconds(step: int) -> float:
    """Return the time in the middle of a step."""
    return float(2 ** ((step - _STEP_OF_ONE_SECOND + 0.5) / _STEPS_PER_DOUBLING))


def _stale(tally: Tally, event: Event) -> None:
    _note_outcome(tally, event)
    _increment(tally.stale_by_tier, event.tier)
    tally.bytes_read += event.size
    tally.hit_seconds += event.seconds
    tally.saved += max(0.0, event.saved - event.seconds)
    tally.hit_times[histogram_step(event.seconds)] += 1
    tally.bucket[1] += 1


def _miss(tally: Tally, event: Event) -> None:
    _increment(tally.misses_by_reason, event.reason)
    tally.bucket[2] += 1
    if len(tally.open_misses) >= MAX_OPEN_MISSES:
        tally.open_misses.clear()
    tally.open_misses.setdefault(event.key, []).append((event.reason, tally.second))


def _close_miss(tally: Tally, key: str) -> tuple[str, int] | None:
    """End the first open miss of a key, and return its reason and second."""
    misses = tally.open_misses.get(key)
    if not misses:
        return None
    miss = misses.pop(0)
    if not misses:
        del tally.open_misses[key]
    return miss


def _computed(tally: Tally, event: Event) -> None:
    tally.computed += 1
    _note_outcome(tally, event)
    miss = _close_miss(tally, event.key)
    if miss is not None and len(tally.unexplained) < MAX_UNEXPLAINED:
        tally.unexplained[event.key] = miss[0]


def _compute_ended(tally: Tally, event: Event) -> None:
    tally.compute_seconds += event.seconds


def _failed(tally: Tally, event: Event) -> None:
    _increment(tally.failed_by_type, event.reason)
    _close_miss(tally, event.key)


def _coalesced(tally: Tally, event: Event) -> None:
    """Count an answer from a shared computation, and take its miss back."""
    tally.coalesced += 1
    _answered_after_all(tally, event)


def _revalidated(tally: Tally, event: Event) -> None:
    """Count a confirmed value, and take the miss of its lookup back."""
    if event.reason == events.BY_REFRESH:  # no caller waited for it
        return
    tally.revalidated += 1
    _answered_after_all(tally, event)


def _answered_after_all(tally: Tally, event: Event) -> None:
    tally.outcomes.setdefault(event.key, events.COMPUTED)
    tally.saved += event.saved
    miss = _close_miss(tally, event.key)
    if miss is not None:
        reason, second = miss
        tally.misses_by_reason[reason] -= 1
        bucket = tally.points.get(second - second % tally.width, [0, 0, 0])
        bucket[2] = max(0, bucket[2] - 1)
        if not tally.misses_by_reason[reason]:
            del tally.misses_by_reason[reason]


def _stored(tally: Tally, event: Event) -> None:
    tally.stored += 1
    tally.bytes_stored += event.size
    if len(tally.stored_keys) < MAX_STORED_KEYS:
        tally.stored_keys.add(hash(event.key))


def _refresh_started(tally: Tally, _event: Event) -> None:
    tally.refreshes_running += 1


def _refresh_done(tally: Tally, event: Event) -> None:
    tally.refreshes_running = max(0, tally.refreshes_running - 1)
    tally.refreshes_done += event.reason != REFRESHED_ELSEWHERE


def _refresh_failed(tally: Tally, _event: Event) -> None:
    tally.refreshes_running = max(0, tally.refreshes_running - 1)
    tally.refreshes_failed += 1


def _invalidated(tally: Tally, event: Event) -> None:
    tally.invalidations += 1
    if event.key:
        tally.stored_keys.discard(hash(event.key))
    else:
        tally.stored_keys.clear()


def _waited(tally: Tally, event: Event) -> None:
    tally.waits += 1
    tally.wait_seconds += event.seconds


def _lock_timeout(tally: Tally, _event: Event) -> None:
    tally.lock_timeouts += 1


def _lease_lost(tally: Tally, _event: Event) -> None:
    tally.leases_lost += 1


def _error(tally: Tally, event: Event) -> None:
    _increment(tally.errors_by_reason, event.reason)


COUNTERS_BY_KIND: dict[str, Callable[[Tally, Event], None]] = {
    events.STALE: _stale,
    events.MISS: _miss,
    events.COMPUTED: _computed,
    events.COMPUTE_ENDED: _compute_ended,
    events.FAILED: _failed,
    events.COALESCED: _coalesced,
    events.REVALIDATED: _revalidated,
    events.STORED: _stored,
    events.REFRESH_STARTED: _refresh_started,
    events.REFRESH_DONE: _refresh_done,
    events.REFRESH_FAILED: _refresh_failed,
    events.INVALIDATION: _invalidated,
    events.WAITED: _waited,
    events.LOCK_TIMEOUT: _lock_timeout,
    events.LEASE_LOST: _lease_lost,
    events.ERROR: _error,
}
"""Counting function for each kind of event; `Counters` itself counts hits."""
TIER_KINDS = frozenset({events.ERROR, events.TIER_DOWN, events.TIER_UP})
"""Kinds of events that are about a tier itself."""
