"""Snapshots: what the cache did, as frozen numbers.

Snapshots can be added, subtracted and converted to JSON and back; so a kernel, a span of time and
all kernels of a directory are shown by the same code.  `memo.stats` returns them, and `rendering`
shows them.
"""

from __future__ import annotations

import fnmatch
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from memo.errors import label
from memo.metrics.counters import MAX_TIMELINE_POINTS, Tally, step_seconds
from memo.runtime.clock import SECOND
from memo.runtime.named_tuple import NamedTuple

if TYPE_CHECKING:
    import pandas as pd

JSON_FORMAT = 1
"""Version of the JSON form."""

Counts = Mapping[str, int]


class CacheInfo(NamedTuple):
    """The four numbers of `functools.lru_cache`'s `cache_info()`.

    Attributes:
        hits: answers from the cache, including stale and shared ones.
        misses: calls that had to compute.
        maxsize: always None: the tiers limit bytes, not entries.
        currsize: entries on this host that may answer a call.  If they cannot be counted, or not
            within 50 ms: those that this process stored since it last invalidated any of them.
    """

    hits: int
    misses: int
    maxsize: None
    currsize: int


class Point(NamedTuple):
    """The events in one interval of a timeline; `start` is in seconds since the epoch."""

    start: float
    hits: int
    stale: int
    misses: int


@dataclass(frozen=True, slots=True)
class FunctionStats:
    """Counts and times of one function, or of several added up.

    Attributes:
        hits_by_tier: fresh answers by the tier that had them.
        stale_by_tier: answers past their ttl or refresh threshold, by tier.
        misses_by_reason: calls that had to compute, by reason, in the words of `runtime.reasons`.
        refreshes_running, refreshes_done, refreshes_failed: background refreshes.
        coalesced: callers that shared a computation which another caller had begun.
        computed: how often the function ran and returned.
        compute_seconds: how long the function ran itself, whether it returned or raised, without
            the cached calls inside it.
        failed_by_type: how often the function itself raised, by type of the exception.
        errors_by_reason: faults of the cache that no caller noticed.
        stored: results written; `bytes_stored` their bytes.
        bytes_read: bytes of the entries that answered.
        hit_seconds: time spent in lookups that answered.
        hit_times: histogram of those times; see `memo.metrics.counters.histogram_step`.
        saved: seconds that callers would have waited longer without the cache: for each answer the
            recorded cost of its computation, less the time that the answer took, at least 0.
        waits, wait_seconds: waits for another process's computation.
        lock_timeouts, leases_lost: waits that timed out, leases lost while computing.
        invalidations: invalidations of the function by this process.
        revalidated: callers that got a stored value which was in doubt and was confirmed
            (`cutoff`).
        width: seconds that each point of the timeline covers.
        timeline: hits, stale hits and misses over time.
    """

    hits_by_tier: Counts = field(default_factory=dict)
    stale_by_tier: Counts = field(default_factory=dict)
    misses_by_reason: Counts = field(default_factory=dict)
    refreshes_running: int = 0
    refreshes_done: int = 0
    refreshes_failed: int = 0
    coalesced: int = 0
    computed: int = 0
    compute_seconds: float = 0.0
    failed_by_type: Counts = field(default_factory=dict)
    errors_by_reason: Counts = field(default_factory=dict)
    stored: int = 0
    bytes_stored: int = 0
    bytes_read: int = 0
    hit_seconds: float = 0.0
    hit_times: Mapping[int, int] = field(default_factory=dict)
    saved: float = 0.0
    waits: int = 0
    wait_seconds: float = 0.0
    lock_timeouts: int = 0
    leases_lost: int = 0
    invalidations: int = 0
    revalidated: int = 0
    width: float = 1.0
    timeline: tuple[Point, ...] = ()

    @property
    def hits(self) -> int:
        """Fresh answers, from any tier."""
        return sum(self.hits_by_tier.values())

    @property
    def stale(self) -> int:
        """Stale answers, from any tier."""
        return sum(self.stale_by_tier.values())

    @property
    def misses(self) -> int:
        """Calls that had to compute, for any reason."""
        return sum(self.misses_by_reason.values())

    @property
    def errors(self) -> int:
        """Faults of the cache of any kind."""
        return sum(self.errors_by_reason.values())

    @property
    def failed(self) -> int:
        """The number of calls that the function itself answered by raising."""
        return sum(self.failed_by_type.values())

    @property
    def answers(self) -> int:
        """Calls that did not have to compute: hits, stale, shared, revalidated."""
        return self.hits + self.stale + self.coalesced + self.revalidated

    @property
    def calls(self) -> int:
        """Answers and misses."""
        return self.answers + self.misses

    @property
    def hit_rate(self) -> float | None:
        """Fraction of calls that the cache answered, 0 to 1; None without calls."""
        return self.answers / self.calls if self.calls else None

    @property
    def median_hit(self) -> float | None:
        """Median time of a lookup that answered, in seconds, to about 4.5 %; None without one."""
        return median(self.hit_times)

    def bars(self, limit: int) -> tuple[float, list[Point]]:
        """Return the timeline without gaps: seconds per bar, and at most `limit` bars."""
        width, points = self.width, list(self.timeline)
        while points and (points[-1].start - points[0].start) / width >= limit:
            width *= 2
            points = _merge_points(points, width)
        if not points:
            return width, []
        known = {point.start: point for point in points}
        count = round((points[-1].start - points[0].start) / width) + 1
        starts = (points[0].start + index * width for index in range(count))
        return width, [known.get(start, Point(start, 0, 0, 0)) for start in starts]

    def __add__(self, other: FunctionStats) -> FunctionStats:
        return combine((self, other))

    def __sub__(self, earlier: FunctionStats) -> FunctionStats:
        """Return the difference to an earlier snapshot of the same function.

        Without the timeline.
        """
        return _subtract(self, earlier)


def freeze(tally: Tally, explained: bool = True) -> FunctionStats:
    """Return the current numbers of a function.

    Args:
        explained: count misses under the reasons that were found later.
    """
    misses = _explained(tally) if explained else dict(tally.misses_by_reason)
    return FunctionStats(
        dict(tally.hits_by_tier), dict(tally.stale_by_tier), misses,
        tally.refreshes_running, tally.refreshes_done, tally.refreshes_failed, tally.coalesced,
        tally.computed, tally.compute_seconds,
        dict(tally.failed_by_type), dict(tally.errors_by_reason),
        tally.stored, tally.bytes_stored, tally.bytes_read,
        tally.hit_seconds, dict(tally.hit_times), tally.saved,
        tally.waits, tally.wait_seconds, tally.lock_timeouts, tally.leases_lost,
        tally.invalidations, tally.revalidated, tally.width / SECOND,
        tuple(Point(at / SECOND, *tally.points[at]) for at in sorted(tally.points)),
    )  # fmt: skip


def _explained(tally: Tally) -> dict[str, int]:
    misses = dict(tally.misses_by_reason)
    for (before, after), count in tally.explained_later.items():
        moved = min(count, misses.get(before, 0))
        misses[before] = misses.get(before, 0) - moved
        misses[after] = misses.get(after, 0) + moved
    return {reason: count for reason, count in misses.items() if count}


_FIELDS = tuple(f.name for f in fields(FunctionStats) if f.name not in ("width", "timeline"))


@dataclass(frozen=True, slots=True)
class TierStats:
    """Counts and times of one tier.

    Attributes:
        hits: fresh answers from it; `stale` the stale ones.
        errors: faults of this tier.
        downs: how often its breaker opened.
        up: its last known state; None if nothing was reported.
        health: what the tier itself reports (`Tier.health`), if it was asked.
    """

    hits: int = 0
    stale: int = 0
    errors: int = 0
    downs: int = 0
    up: bool | None = None
    health: Mapping[str, Any] = field(default_factory=dict)

    def __add__(self, other: TierStats) -> TierStats:
        return TierStats(
            self.hits + other.hits,
            self.stale + other.stale,
            self.errors + other.errors,
            self.downs + other.downs,
            self.up if other.up is None else other.up,
            {**self.health, **other.health},
        )


@dataclass(frozen=True, slots=True, repr=False)
class Stats:
    """A snapshot of the counters: text in a terminal, a table in a notebook.

    Attributes:
        functions: id of a function (`"module:qualname"`) -> its numbers.
        other: events of no function, such as the invalidation of a tag.
        tiers: name -> what the tier did.
        since: when counting began, in seconds since the epoch.
        until: when the snapshot was taken.
        processes: number of processes that it adds up.
        patterns: the functions that were asked for; none: all.
    """

    functions: Mapping[str, FunctionStats] = field(default_factory=dict)
    other: FunctionStats = field(default_factory=FunctionStats)
    tiers: Mapping[str, TierStats] = field(default_factory=dict)
    since: float = 0.0
    until: float = 0.0
    processes: int = 1
    patterns: tuple[str, ...] = ()

    @property
    def total(self) -> FunctionStats:
        """The sum of all functions, and of events of no function."""
        return combine((*self.functions.values(), self.other))

    def select(self, *patterns: str) -> Stats:
        """Return the functions that match one of the patterns, as `matches` does; none: all."""
        if not patterns:  # then events of no function stay as well
            return self
        chosen = {f: s for f, s in self.functions.items() if matches(f, *patterns)}
        return replace(self, functions=chosen, other=FunctionStats(), patterns=patterns)

    def with_health(self, health: Mapping[str, Mapping[str, Any]]) -> Stats:
        """Return the same with the health of the tiers (`Tier.health`), by name of the tier."""
        tiers = dict(self.tiers)
        for name, facts in health.items():
            known = tiers.get(name, TierStats())
            up = facts.get("up")
            up = known.up if up is None else bool(up)
            tiers[name] = replace(known, health=dict(facts), up=up)
        return replace(self, tiers=tiers)

    def __add__(self, other: Stats) -> Stats:
        return total_of((self, other))

    def __sub__(self, earlier: Stats) -> Stats:
        """Return the difference to an earlier snapshot of the same process."""
        nothing = FunctionStats()
        functions = {f: s - earlier.functions.get(f, nothing) for f, s in self.functions.items()}
        return replace(
            self, functions=functions, other=self.other - earlier.other, since=earlier.until
        )

    def to_json(self) -> str:
        """Return JSON for `from_json`; derived numbers are included for other readers."""
        return json.dumps(as_document(self), default=str)

    @classmethod
    def from_json(cls, text: str | bytes) -> Stats:
        """Return the snapshot that `to_json` wrote.

        Raises:
            ValueError: the text is not such a snapshot.
        """
        return _parse(text)

    def to_frame(self) -> pd.DataFrame:
        """Return a pandas DataFrame, one row per function.

        Raises:
            MissingExtraError: pandas is not installed.
        """
        from memo.metrics import formatting

        rows = {function: _row(stats) for function, stats in self.functions.items()}
        columns = list(_row(FunctionStats()))
        make = formatting.import_pandas().DataFrame.from_dict
        frame: pd.DataFrame = make(rows, orient="index", columns=columns)
        frame.index.name = "function"
        return frame

    def __repr__(self) -> str:
        from memo.metrics import rendering  # imported only if something is shown

        return rendering.text(self)

    def _repr_html_(self) -> str:
        from memo.metrics import rendering

        return rendering.html(self)


def matches(function: str, *patterns: str) -> bool:
    """True if a function's id matches one of some patterns; none given: every one does.

    A pattern is compared with the whole id, the module, the qualified name and the bare name; case
    counts.  `load`, `etl:Sales.load`, `etl`, `Sales.load`, `lo*` all match `etl:Sales.load`.
    """
    short = label(function)
    module, _, qualname = short.rpartition(":")
    names = (function, short, module, qualname, qualname.rpartition(".")[2])
    return not patterns or any(
        name == pattern or fnmatch.fnmatchcase(name, pattern)  # a name may have brackets in it
        for pattern in patterns
        for name in names
        if name
    )


def median(histogram: Mapping[int, int]) -> float | None:
    """Return the median, in seconds, of a histogram of hit times; None if it is empty."""
    steps = sorted(histogram)
    half = sum(histogram.values()) / 2
    for step, seen in zip(steps, accumulate(histogram[step] for step in steps), strict=True):
        if seen >= half:
            return step_seconds(step)
    return None


# --- Adding and subtracting ---------------------------------------------------------------------


def combine(parts: Iterable[FunctionStats]) -> FunctionStats:
    """Add up several snapshots and their timelines."""
    parts = tuple(parts)
    sums: dict[str, Any] = {name: _sum([getattr(p, name) for p in parts]) for name in _FIELDS}
    width, timeline = _merge_timelines([(p.width, p.timeline) for p in parts])
    if not parts:
        return FunctionStats()
    return FunctionStats(**sums, width=width, timeline=timeline)


def _sum(values: list[Any]) -> Any:
    if not values or not isinstance(values[0], Mapping):
        return sum(values)
    counts: dict[Any, int] = {}
    for value in values:
        for name, count in value.items():
            counts[name] = counts.get(name, 0) + count
    return counts


def _subtract(now: FunctionStats, earlier: FunctionStats) -> FunctionStats:
    differences: dict[str, Any] = {}
    for name in _FIELDS:
        a, b = getattr(now, name), getattr(earlier, name)
        if isinstance(a, Mapping):
            differences[name] = {k: n - b.get(k, 0) for k, n in a.items() if n > b.get(k, 0)}
        else:
            differences[name] = a - b
    return FunctionStats(**{**differences, "refreshes_running": now.refreshes_running})


def _merge_timelines(
    lines: list[tuple[float, tuple[Point, ...]]],
) -> tuple[float, tuple[Point, ...]]:
    lines = [line for line in lines if line[1]]
    if not lines:
        return 1.0, ()
    width = max(width for width, _ in lines)
    points = _merge_points([point for _, timeline in lines for point in timeline], width)
    while len(points) > MAX_TIMELINE_POINTS:
        width *= 2
        points = _merge_points(points, width)
    return width, tuple(points)


def _merge_points(points: Iterable[Point], width: float) -> list[Point]:
    """Merge the points of a timeline into steps of `width` seconds."""
    sums: dict[float, list[int]] = {}
    for start, *counts in points:
        into = sums.setdefault(start // width * width, [0, 0, 0])
        for index, count in enumerate(counts):
            into[index] += count
    return [Point(start, *sums[start]) for start in sorted(sums)]


def total_of(parts: Iterable[Stats]) -> Stats:
    """Add up snapshots of several processes."""
    parts = tuple(parts)
    if not parts:
        return Stats(processes=0)
    names = dict.fromkeys(name for part in parts for name in part.functions)
    tiers: dict[str, TierStats] = {}
    for part in parts:
        for name, tier in part.tiers.items():
            tiers[name] = tiers.get(name, TierStats()) + tier
    return Stats(
        {n: combine(p.functions[n] for p in parts if n in p.functions) for n in names},
        combine(part.other for part in parts),
        tiers,
        min(part.since for part in parts),
        max(part.until for part in parts),
        sum(part.processes for part in parts),
    )


# --- JSON and frames ----------------------------------------------------------------------------

_DERIVED = ("hits", "stale", "misses", "errors", "failed", "hit_rate", "median_hit")


def as_document(stats: Stats) -> dict[str, Any]:
    """Return a snapshot as JSON data."""
    return {
        "format": JSON_FORMAT,
        "since": stats.since,
        "until": stats.until,
        "processes": stats.processes,
        "functions": {name: _with_derived(s) for name, s in stats.functions.items()},
        "other": _with_derived(stats.other),
        "tiers": {name: asdict(tier) for name, tier in stats.tiers.items()},
    }


def _with_derived(stats: FunctionStats) -> dict[str, Any]:
    return {**asdict(stats), **{name: getattr(stats, name) for name in _DERIVED}}


def _parse(text: str | bytes) -> Stats:
    document = json.loads(text)
    if not isinstance(document, dict) or document.get("format") != JSON_FORMAT:
        raise ValueError("not a snapshot of memo's statistics")
    try:
        return Stats(
            {str(name): _function(part) for name, part in document["functions"].items()},
            _function(document["other"]),
            {str(name): _tier(part) for name, part in document["tiers"].items()},
            float(document["since"]),
            float(document["until"]),
            int(document["processes"]),
        )
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"not a snapshot of memo's statistics: {error!r}") from error


def _function(part: Mapping[str, Any]) -> FunctionStats:
    values: dict[str, Any] = {}
    for f in fields(FunctionStats):
        given = part[f.name]
        if f.name == "timeline":
            values[f.name] = tuple(Point(float(p[0]), *map(int, p[1:4])) for p in given)
        elif f.name == "hit_times":
            values[f.name] = {int(step): int(count) for step, count in given.items()}
        elif f.type == "Counts":
            values[f.name] = {str(name): int(count) for name, count in given.items()}
        else:
            values[f.name] = _finite(given) if f.type == "float" else int(given)
    if values["width"] <= 0:
        raise ValueError("the timeline has no width")
    return FunctionStats(**values)


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{number} is not finite")
    return number


def _tier(part: Mapping[str, Any]) -> TierStats:
    hits, stale, errors, downs = (int(part[name]) for name in ("hits", "stale", "errors", "downs"))
    up = part["up"]
    there = None if up is None else bool(up)
    return TierStats(hits, stale, errors, downs, there, dict(part["health"]))


def _row(stats: FunctionStats) -> dict[str, Any]:
    row: dict[str, Any] = {name: getattr(stats, name) for name in _DERIVED}
    row.update({name: getattr(stats, name) for name in _FIELDS if name != "hit_times"})
    return row
