"""The check of an entry: its stamps, its age, and that no newer answer was given.

Every path to an answer and every store uses it.  A path may skip work, such as parsing a header or
asking a tier, but never this check.

An entry whose stamps do not hold is never served as stale: the windows of a policy apply only to
expiry (RFC 5861).  `judge` is a pure function of an entry's recorded times, the function's present
policy, and the current time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter
from sys import getsizeof
from threading import Lock
from typing import Any, Protocol, cast

from memo.records.stamp_types import FileStamp, Generation, Result, Stamp, State, Times
from memo.runtime.clock import SECOND, Clock
from memo.runtime.events import MISS, STALE
from memo.runtime.memory_budget import BUDGET
from memo.runtime.named_tuple import NamedTuple
from memo.runtime.port import Port
from memo.runtime.reasons import (
    CLOCK,
    EXPIRED,
    GENERATION_LOST,
    INVALIDATED,
    SOURCE_UNREACHABLE,
)
from memo.settings.durations import seconds
from memo.settings.options import INHERIT, Policy
from memo.validity import dependencies
from memo.validity.results import split_reasons
from memo.validity.stamps import expired_at

FRESH = "fresh"
"""The kind of a verdict: use it.  The others, `STALE` and `MISS`, are kinds of events too."""

AHEAD = "ahead"
"""The reason of a `STALE` verdict on an entry within its ttl (`refresh_ahead`)."""
BORN_STALE = 0
"""The ttl, in nanoseconds, of results that were built on a stale answer."""
TTL_JITTER = 0.1
"""`use_jitter` shortens a ttl by a random fraction of up to this, and never lengthens it."""
FUTURE_TOLERANCE_NS = 60 * SECOND
"""Nanoseconds by which another host's wall clock may be ahead before its entries are refused."""
_NAMELESS = bytes(16)
MAX_LATEST_ANSWERS = 65_536
"""Number of keys whose latest answers are remembered, memory permitting."""
_MIN_LATEST_ANSWERS = 4096
"""Number of keys whose latest answers are always remembered."""
_LIMIT_BYTES_PER_KEY = 2048
"""Bytes of the memory limit per remembered key."""
_REMEMBERED_KEY_BYTES = getsizeof("0" * 40) + getsizeof(1 << 62)
"""Bytes that one remembered key takes: its text and its time."""


class Verdict(NamedTuple):
    """The verdict on the age of an entry.

    Attributes:
        kind: `FRESH`, `STALE` (use it, refresh it) or `MISS`.
        reason: for a miss, why; for stale, `AHEAD` or `EXPIRED`.
        fallback: a miss whose old value may still answer if the computation raises.
        renewable: a miss whose value may be confirmed: `cutoff` results that it was built on may
            have changed, and can be asked for again.
    """

    kind: str
    reason: str = ""
    fallback: bool = False
    renewable: bool = False


# --- stamps --------------------------------------------------------------------------------------


class Expired(str):
    """The reason for an entry that was expired by `memo.expire`.

    Its text is `EXPIRED`, or `SOURCE_UNREACHABLE` if a source cannot be queried either.

    Attributes:
        at: when, in nanoseconds since the epoch.
    """

    __slots__ = ("at",)
    at: int

    @classmethod
    def since(cls, at: int, text: str = EXPIRED) -> Expired:
        reason = cls(text)
        reason.at = at
        return reason


class Unconfirmed(str):
    """The reason for an entry that only results put in doubt, which can be asked for again.

    Attributes:
        at: when the first of them was expired, if nothing else happened to them; else None.
    """

    __slots__ = ("at",)
    at: int | None

    @classmethod
    def since(cls, reason: str, at: int | None) -> Unconfirmed:
        made = cls(reason)
        made.at = at
        return made


def expiry(reason: str) -> int | None:
    """Return when an entry was expired; None if there is another reason against it."""
    return reason.at if isinstance(reason, (Expired, Unconfirmed)) else None


def may_answer(reason: str) -> bool:
    """True if a policy may let an entry answer despite a reason."""
    return reason == SOURCE_UNREACHABLE or isinstance(reason, (Expired, Unconfirmed))


def may_fall_back(reason: str) -> bool:
    """True if a policy may let an entry answer after an error, despite a reason or `""`."""
    return not reason or reason == SOURCE_UNREACHABLE or expiry(reason) is not None


def is_unchanged(recorded: str, present: str) -> bool:
    """True if the text of a state is the recorded one; a lost one, `""`, never holds."""
    return recorded == present != ""


def why_changed(recorded: list[str], present: list[str]) -> str:
    """Return why generations have changed since they were recorded; "" if they have not.

    Args:
        recorded: the texts of their states in the entry.
        present: the texts of their states now; a lost one, `""`, never holds.

    Returns:
        One of the reasons; an `Expired` if the entry was only expired.
    """
    if recorded == present and "" not in present:
        return ""
    times: list[int] = []
    for before, now in zip(recorded, present, strict=True):
        if not is_unchanged(before, now):
            at = expired_at(before, now) if now else None
            if at is None:
                return INVALIDATED if now else GENERATION_LOST
            times.append(at)
    return Expired.since(min(times)) if times else ""


def state_texts(states: Iterable[State]) -> list[str]:
    """Return the texts of states, for `why_changed`."""
    return list(map(_text, states))


_text = itemgetter(State._fields.index("text"))


async def why_invalid(port: Port, stamps: Sequence[Stamp], states: Sequence[State]) -> str:
    """Return why stamps do not hold any more; "" if they do.

    Args:
        stamps: stamps of any kind.
        states: the current states of the generations among them, in the same order.

    Returns:
        One of the reasons; an `Expired` or an `Unconfirmed` if that is the only one.
    """
    recorded = [stamp.state.text for stamp in stamps if type(stamp) is Generation]
    if len(recorded) == len(stamps):
        return why_changed(recorded, state_texts(states))
    if type(stamps[-1]) is Result:
        return combine(stamps, await reasons(port, stamps, states))
    reason = why_changed(recorded, state_texts(states))
    if reason and not isinstance(reason, Expired):
        return reason
    others = [stamp for stamp in stamps if type(stamp) is not Generation]
    local = [stamp for stamp in others if not dependencies.is_remote(stamp)]
    files: list[Stamp] = [stamp for stamp in local if type(stamp) is FileStamp]
    each = ([stamp] for stamp in local if type(stamp) is not FileStamp)
    for some in filter(None, (files, *each)):
        other = next(filter(None, await dependencies.check(port, some)), "")
        if other:
            return other
    found = await dependencies.check(port, list(filter(dependencies.is_remote, others)))
    whys = sorted(filter(None, found), key=lambda why: why == SOURCE_UNREACHABLE)
    if not whys:
        return reason
    return _with_expiry(whys[0], [reason.at] if isinstance(reason, Expired) else [])


def _with_expiry(hard: str, times: Sequence[int]) -> str:
    """Combine a reason other than expiry, or `""`, with the times at which an entry was expired."""
    if not times or hard not in ("", SOURCE_UNREACHABLE):
        return hard
    return Expired.since(min(times), hard or EXPIRED)


async def reasons(port: Port, stamps: Sequence[Stamp], states: Sequence[State]) -> list[str]:
    """Return for each stamp why it does not hold, or `""`; always `""` for a result."""
    others = [stamp for stamp in stamps if type(stamp) not in (Generation, Result)]
    whys = await dependencies.check(port, others)
    return reasons_from(stamps, states, dict(zip(others, whys, strict=True)))


def reasons_from(
    stamps: Iterable[Stamp], states: Iterable[State], whys: Mapping[Stamp, str]
) -> list[str]:
    """Like `reasons`, but the dependencies have been checked already.

    Args:
        whys: for each stamp of a dependency, why it does not hold, or `""`.
    """
    now = iter(states)
    found: list[str] = []
    for stamp in stamps:
        if type(stamp) is Generation:
            found.append(why_changed([stamp.state.text], [next(now).text]))
        else:
            found.append("" if type(stamp) is Result else whys[stamp])
    return found


_REASON_RANK = {INVALIDATED: 0, GENERATION_LOST: 0, SOURCE_UNREACHABLE: 2}
"""Reason -> its place if an entry has several; 1: any other.  The first one is given."""


def combine(stamps: Sequence[Stamp], reasons: Sequence[str]) -> str:
    """Combine the reasons of an entry's stamps into one, as `why_invalid` does."""
    if not any(reasons):
        return ""
    absolute, beneath = split_reasons(stamps, reasons)
    hard_ones = [why for why in (*absolute, *beneath) if not isinstance(why, Expired)]
    hard = min(hard_ones, key=lambda why: _REASON_RANK.get(why, 1), default="")
    times = [why.at for why in (*absolute, *beneath) if isinstance(why, Expired)]
    if absolute:
        return _with_expiry(hard, times)
    if beneath:
        return Unconfirmed.since(hard or EXPIRED, None if hard else min(times))
    return ""


# --- age -----------------------------------------------------------------------------------------


def _judge_expired(
    verdict: Verdict, times: Times, policy: Policy, clock: Clock, at: int
) -> Verdict:
    """Return the verdict on an entry that was expired before its ttl was over.

    Args:
        verdict: the verdict as if it had not been expired.
        times: the entry's times.
        policy: the function's current policy.
        clock: tells the current time.
        at: when it was expired, in nanoseconds since the epoch.
    """
    if verdict.kind == MISS:
        return verdict
    past = _time_since_expiry(times, clock, at)
    if past is None:
        return Verdict(MISS, CLOCK)
    if past < policy.stale_while_revalidate * SECOND:
        return Verdict(STALE, EXPIRED)
    return Verdict(MISS, EXPIRED, fallback=past < policy.stale_if_error * SECOND)


def _time_since_expiry(times: Times, clock: Clock, at: int) -> int | None:
    """Return the nanoseconds since an entry was expired; None if no clock can tell.

    They are also derived from the entry's age, so that the window of an entry that has expired does
    not begin again if the wall clock steps back.  The longer of the two times counts.

    Args:
        at: as for `_judge_expired`.
    """
    old = age(times, clock)
    if old is None:
        return None
    at = max(at, times.started)  # an expiry that is replayed late may also concern later entries
    past = max(old - max(0, at - times.finished), clock.wall_ns() - at)
    return None if past < -FUTURE_TOLERANCE_NS else max(0, past)


def age(times: Times, clock: Clock) -> int | None:
    """Return the nanoseconds since the computation ended; None if no clock can tell.

    On the same boot of the machine that computed it, a clock that cannot step is used.  Otherwise
    the wall clocks of the two hosts are compared, with whatever error they have.
    """
    # unpacking takes a fifth of the time that attribute access would
    _, finished, here, finished_boot, _, _, _ = times
    boot_id = clock.boot_id
    if here == boot_id and boot_id != _NAMELESS:
        return max(0, clock.boot_ns() - finished_boot)
    difference = clock.wall_ns() - finished
    if difference < -FUTURE_TOLERANCE_NS:
        return None
    return max(0, difference)


def judge(
    times: Times,
    policy: Policy,
    clock: Clock,
    live_ttl: float | None = None,
    expired: int | None = None,
) -> Verdict:
    """Judge by age whether an entry with valid stamps may be used now.

    Args:
        times: the entry's times.
        policy: the function's current policy, which may be stricter than when the entry was stored.
        clock: tells the current time.
        live_ttl: seconds that the live configuration sets for `policy.ttl_key`; they replace the
            entry's own ttl.  `math.inf`: it does not expire.
        expired: when it was expired, in nanoseconds since the epoch, or None.
    """
    if expired is not None:
        return _judge_expired(judge(times, policy, clock, live_ttl), times, policy, clock, expired)
    if policy.max_age is not None:
        old = age(times, clock)
        if old is None or exceeds_max_age(old, policy):
            return Verdict(MISS, CLOCK if old is None else EXPIRED)
    ttl = ttl_in_force(times, policy, live_ttl)
    if ttl is None and times.boot_id == clock.boot_id:
        return _FRESH_VERDICT
    old = age(times, clock)
    if old is None:
        return Verdict(MISS, CLOCK)
    if ttl is None:
        return _FRESH_VERDICT
    if old < ttl:
        if policy.refresh_ahead and old >= ttl * policy.refresh_threshold:
            return Verdict(STALE, AHEAD)
        return _FRESH_VERDICT
    past = old - ttl
    if past < policy.stale_while_revalidate * SECOND:
        return Verdict(STALE, EXPIRED)
    return Verdict(MISS, EXPIRED, fallback=past < policy.stale_if_error * SECOND)


_FRESH_VERDICT = Verdict(FRESH)


def kept_for(times: Times, clock: Clock) -> int | None:
    """Return the nanoseconds until an entry is past its ttl and its stale windows; None: never.

    If no clock can tell its age, it counts as new.
    """
    return _kept_after(times, age(times, clock) or 0)


def _kept_after(times: Times, old: int) -> int | None:
    return None if times.ttl < 0 else times.ttl + times.grace - old


def is_useless(times: Times, clock: Clock, expired: int | None = None) -> bool:
    """True if an entry is too old for any use, or no clock can tell its age.

    Args:
        expired: when it was expired, in nanoseconds since the epoch, or None.
    """
    if expired is not None:
        past = _time_since_expiry(times, clock, expired)
        if past is None or past >= times.grace:
            return True
    old = age(times, clock)
    left = None if old is None else _kept_after(times, old)
    return old is None or (left is not None and left <= 0)


def exceeds_max_age(old: int, policy: Policy) -> bool:
    """True if an entry of this age, in nanoseconds, is older than the policy lets it be."""
    return policy.max_age is not None and old >= policy.max_age * SECOND


def remaining(
    times: Times, policy: Policy, clock: Clock, live_ttl: float | None = None
) -> int | None:
    """Return the nanoseconds for which an entry is still fresh, negative after that.

    None if it does not expire.
    """
    ttl = ttl_in_force(times, policy, live_ttl)
    if ttl is None:
        return None
    old = age(times, clock)
    return 0 if old is None else int(ttl - old)


def ttl_in_force(times: Times, policy: Policy, live_ttl: float | None) -> float | None:
    """Return the ttl that applies to an entry now, in nanoseconds; None: it does not expire."""
    recorded = times.ttl
    if recorded == BORN_STALE:
        return BORN_STALE
    if live_ttl is not None:
        return None if live_ttl == math.inf else live_ttl * SECOND * _jitter_factor(times, policy)
    ttl = policy.ttl
    if ttl is None or not isinstance(ttl, (int, float)):
        return None if recorded < 0 else recorded
    now = ttl * SECOND
    return recorded if 0 <= recorded < now else now


def _jitter_factor(times: Times, policy: Policy) -> float:
    """Return the factor by which `use_jitter` shortens a live ttl; it is the same at each check.

    It is derived from the last digits of the stored ttl, which are random with jitter.
    """
    return 1 - TTL_JITTER * (times.ttl % 1000) / 1000 if policy.use_jitter else 1.0


def ttl_ns(
    policy: Policy, result: Any, live_ttl: float | None = None, inherited: int | None = None
) -> int:
    """Return the nanoseconds of freshness for a result that is stored now; -1: it does not expire.

    Args:
        policy: the function's policy.
        result: the result of the function.
        live_ttl: as for `judge`.
        inherited: how long the shortest-lived result that it was built on is still fresh; None: no
            limit.

    Raises:
        OptionError: a `ttl` callable returned something that is not a ttl.
    """
    if inherited is not None and inherited <= 0:
        return BORN_STALE
    if policy.ttl == INHERIT and live_ttl is None:
        return -1 if inherited is None else inherited
    ttl: float | None
    if live_ttl is not None:
        ttl = None if live_ttl == math.inf else live_ttl
    elif callable(policy.ttl):
        ttl = seconds("ttl", policy.ttl(result))
    else:
        ttl = cast("float | None", policy.ttl)
    if ttl is None:
        return -1
    if policy.use_jitter:
        import random

        ttl *= 1 - random.random() * TTL_JITTER
    return max(1, int(ttl * SECOND))


class Judge(Protocol):
    """Judges the age of an entry by the rules of its function."""

    def __call__(
        self,
        times: Times,
        expired: int | None = None,
        raised: bool = False,
        unreachable: bool = False,
        /,
    ) -> Verdict:
        """Return the verdict on an entry.

        Args:
            times: its times.
            expired: when `expire()` was called on it, in nanoseconds since the epoch, or None.
            raised: it is a stored exception.
            unreachable: a source that it depends on cannot be queried.
        """
        ...


def judge_by_record(clock: Clock) -> Judge:
    """Return the judge for a function that this process does not have: it goes by recorded ttls."""
    policy = Policy(ttl=None)

    def judged(times: Times, expired: int | None = None, *_: bool) -> Verdict:
        return judge(times, policy, clock, expired=expired)

    return judged


def only_fresh(judge: Judge) -> Judge:
    """Return a judge that refuses stale entries, and those with a source that cannot be queried."""

    def judged(
        times: Times, expired: int | None = None, raised: bool = False, unreachable: bool = False
    ) -> Verdict:
        verdict = judge(times, expired, raised, unreachable)
        if unreachable:
            return Verdict(MISS, SOURCE_UNREACHABLE)
        fresh = verdict.kind == FRESH or verdict.reason == AHEAD
        return verdict if fresh else Verdict(MISS, verdict.reason)

    return judged


def final_verdict(judge: Judge, times: Times, reason: str, *, raised: bool) -> Verdict:
    """Return the verdict on an entry whose stamps hold, or whose reason passes `may_answer`.

    Args:
        raised: the entry is a stored exception.
    """
    expired = expiry(reason)
    verdict = judge(times, expired, raised, reason == SOURCE_UNREACHABLE)
    if not isinstance(reason, Unconfirmed) or (verdict.kind != MISS and expired is not None):
        return verdict  # an expired entry may be served while its results are asked for
    by_age = judge(times, None, raised)
    within = by_age.kind != MISS and by_age.reason != EXPIRED
    fallback = expired is not None and verdict.fallback
    return Verdict(MISS, str(reason), fallback=fallback, renewable=within)


# --- order of answers ----------------------------------------------------------------------------


class LatestAnswers:
    """The start of the computation behind the latest answer for each key.  Thread-safe.

    After an answer, no older one is given for that key, whichever tier has it (I2).

    Args:
        memory_limit: limit of the memory tier in bytes; 0: there is none.
        max_keys: maximum number of keys to remember, whatever the limit.
    """

    def __init__(self, memory_limit: int = 0, max_keys: int = MAX_LATEST_ANSWERS) -> None:
        affordable = memory_limit // _LIMIT_BYTES_PER_KEY if memory_limit else max_keys
        self._max_keys = min(max_keys, max(_MIN_LATEST_ANSWERS, affordable))
        self._recent: dict[str, int] = {}
        self._previous: dict[str, int] = {}
        self._lock = Lock()
        BUDGET.add_table(self)

    def __len__(self) -> int:
        return len(self._recent) + len(self._previous)

    def __sizeof__(self) -> int:
        """Return the bytes of all keys and times."""
        tables = (self._recent, self._previous)
        return sum(getsizeof(table) + _REMEMBERED_KEY_BYTES * len(table) for table in tables)

    def record(self, key: str, started: int) -> None:
        """Record an answer for a key, by the time at which its computation began."""
        if self._recent.get(key, 0) < started:
            with self._lock:
                self._recent[key] = max(started, self._start_of(key))
                if len(self._recent) >= self._max_keys:
                    self._previous, self._recent = self._recent, {}

    def _start_of(self, key: str) -> int:
        """Return when the computation behind the latest answer for a key began; 0 if unknown.

        The recent answers are read first, since another thread may move them to the previous ones.
        """
        return self._recent.get(key) or self._previous.get(key, 0)

    def accept(self, key: str, started: int) -> bool:
        """Record an answer and return True; False if a later one was given before."""
        if self._recent.get(key) == started:
            return True
        if self.is_newer_than(key, started):
            return False
        self.record(key, started)
        return True

    def is_newer_than(self, key: str, started: int) -> bool:
        """True if the computation behind the latest answer for a key began after `started`."""
        return started < self._start_of(key)

    def has(self, key: str) -> bool:
        """True if this process has stored or used an entry of this key."""
        return self._start_of(key) > 0

    def start_time(self, key: str, clock: Clock) -> int:
        """Return the start time for a computation: now, but never before an earlier answer."""
        return max(clock.wall_ns(), self._start_of(key) + 1)
