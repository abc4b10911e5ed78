"""Policy: how long an entry may be used, as pure data and one pure function.

`judge` takes an entry's recorded times, the policy of the function as it is now, and the present,
and answers with a `Verdict`.  Whether an entry is *true* (its stamps) is `stamps`' business
and is decided before: an invalidated value is never served as stale (stale windows are for expiry
alone, RFC 5861).
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from memo.errors import OptionError
from memo.runtime.clock import SECOND, Clock

# Why a look-up was a miss: one word each, the same in events, statistics and explanations.
ABSENT = "not cached yet"  # no tier has an entry
EXPIRED = "expired"  # past its ttl and its stale windows
INVALIDATED = "invalidated"  # a generation turned since the computation began
GENERATION_LOST = "validity record lost"  # flushed or evicted: nothing tells if it holds
FILE_CHANGED = "file changed"
DEPENDENCY_CHANGED = "dependency changed"  # a depends_on callable answers something else
UNREADABLE = "unreadable"  # damaged, truncated, of another format, or it does not load
UNAUTHENTIC = "signed with another secret"  # no secret of this process sealed it
OLDER = "older"  # an answer already given was computed later (I2)
CLOCK = "clock"  # from the future: its age cannot be told
PAYLOAD_MISSING = "payload missing"  # the record is here, its buffers are not
UNREACHABLE = "validity not known"  # every tier that could tell is away
DISABLED = "disabled"

FRESH = "fresh"
STALE = "stale"
MISS = "miss"

JITTER = 0.1
"""`use_jitter` shortens a ttl by a uniform share of up to this much, and never lengthens it."""
FUTURE_TOLERANCE = 60 * SECOND
"""How far ahead of this host's wall clock another host's may be before an entry is refused."""
DEFAULT_THRESHOLD = 0.8
_NAMELESS = bytes(16)


class Verdict(NamedTuple):
    """What may be done with an entry.

    Attributes:
        kind: `FRESH`, `STALE` (use it, refresh it) or `MISS`.
        reason: for a miss, why; for stale, `"ahead"` (still within its ttl) or `"expired"`.
        fallback: a miss whose old value may still answer if the computation raises.
    """

    kind: str
    reason: str = ""
    fallback: bool = False


def judge_expired(verdict: Verdict, policy: Policy, at: int) -> Verdict:
    """The verdict on an entry that was let expire before its ttl was over.

    Args:
        verdict: what it would be otherwise.
        at: when it was let expire, in nanoseconds since the epoch.
    """
    if verdict.kind == MISS:
        return verdict
    past = max(0, time.time_ns() - at)
    if past < policy.stale_while_revalidate * SECOND:
        return Verdict(STALE, EXPIRED)
    return Verdict(MISS, EXPIRED, fallback=past < policy.stale_if_error * SECOND)


class Times(NamedTuple):
    """The times of an entry, all in nanoseconds.

    Attributes:
        started: wall clock when the computation began (never goes back for one key).
        finished: wall clock when it ended.
        boot_id: the start of the machine on which `finished_boot` was read.
        finished_boot: `Clock.boot_ns` when it ended.
        ttl: how long it is fresh after `finished`; -1: no expiry.
        grace: how long after that it may still serve as stale or as fallback.
        cost: how long the computation took.
    """

    started: int
    finished: int
    boot_id: bytes
    finished_boot: int
    ttl: int
    grace: int
    cost: int


def age(times: Times, clock: Clock) -> int | None:
    """Nanoseconds since the computation ended; None when no clock can tell.

    On the machine and start that computed it, by the clock that cannot step.  Elsewhere by the wall
    clocks of the two hosts, which may differ by as much as the hosts' clocks do.
    """
    _, finished, here, finished_boot, _, _, _ = times  # a fifth of what the names would take
    boot_id = clock.boot_id
    if here == boot_id and boot_id != _NAMELESS:
        return max(0, clock.boot_ns() - finished_boot)
    difference = clock.wall_ns() - finished
    if difference < -FUTURE_TOLERANCE:
        return None
    return max(0, difference)


class Policy(NamedTuple):
    """How a function's entries age; checked at decoration, so always sound.

    Attributes:
        ttl: seconds, None for no expiry, or a callable of the result that gives either.
        use_jitter: shorten each ttl by up to `JITTER`.
        refresh_ahead: answer from the cache and refresh from `refresh_threshold * ttl` on.
        refresh_threshold: fraction of the ttl, in (0, 1).
        stale_while_revalidate: seconds past the ttl in which the old value answers, refreshed.
        stale_if_error: seconds past the ttl in which the old value answers if computing raises.
        use_lock: single flight across processes and hosts.
        lock_timeout: longest wait for another holder, in seconds; None: as long as it lives.
        ttl_key: key in the live configuration that overrides `ttl`.
        cache_if: predicate of the result; False: return it, do not store it.
        retry_after: seconds after a failure in which an old value answers without another try.
        max_age: seconds; older entries do not answer, whatever their ttl and stale windows.
        soft_timeout: seconds after which an old value answers while the computation goes on; 0:
            never.
        errors: exception types that are remembered, each with its ttl in seconds or None.
    """

    ttl: float | Callable[[Any], Any] | None = 60.0
    use_jitter: bool = False
    refresh_ahead: bool = False
    refresh_threshold: float = DEFAULT_THRESHOLD
    stale_while_revalidate: float = 0.0
    stale_if_error: float = 0.0
    use_lock: bool = False
    lock_timeout: float | None = 30.0
    ttl_key: str | None = None
    cache_if: Callable[[Any], bool] | None = None
    max_age: float | None = None
    retry_after: float = 0.0
    soft_timeout: float = 0.0
    errors: tuple[tuple[type[Exception], float | None], ...] = ()

    @property
    def of_errors(self) -> Policy:
        """How remembered exceptions age: by the ttl that each was stored with, and never stale."""
        return Policy(ttl=None, max_age=self.max_age)

    def error_ttl(self, error: BaseException) -> int | None:
        """Nanoseconds for which an exception is remembered; -1: no expiry, None: it is not.

        The nearest type in its method resolution order counts, so the most specific one.
        """
        known = dict(self.errors)
        kind = next((kind for kind in type(error).__mro__ if kind in known), None)
        if kind is None:
            return None
        ttl = known[kind]
        return -1 if ttl is None else max(1, int(ttl * SECOND))

    @property
    def grace(self) -> float:
        """Seconds past the ttl for which an entry is worth keeping."""
        return max(self.stale_while_revalidate, self.stale_if_error)


def judge(times: Times, policy: Policy, clock: Clock, live_ttl: float | None = None) -> Verdict:
    """May an entry whose stamps hold be used now?

    Args:
        times: the entry's.
        policy: the function's, as it is now (which may be stricter than when it was stored).
        clock: reads the present.
        live_ttl: seconds, the value that the live configuration has for `policy.ttl_key`; it
            replaces the entry's own ttl.  `math.inf`: no expiry.
    """
    if policy.max_age is not None:
        old = age(times, clock)
        if old is None or old >= policy.max_age * SECOND:
            return Verdict(MISS, CLOCK if old is None else EXPIRED)
    ttl = _ttl_in_force(times, policy, live_ttl)
    if ttl is None and times.boot_id == clock.boot_id:
        return _FRESH
    old = age(times, clock)
    if old is None:
        return Verdict(MISS, CLOCK)
    if ttl is None:
        return _FRESH
    if old < ttl:
        if policy.refresh_ahead and old >= ttl * policy.refresh_threshold:
            return Verdict(STALE, "ahead")
        return _FRESH
    past = old - ttl
    if past < policy.stale_while_revalidate * SECOND:
        return Verdict(STALE, EXPIRED)
    return Verdict(MISS, EXPIRED, fallback=past < policy.stale_if_error * SECOND)


_FRESH = Verdict(FRESH)


def _ttl_in_force(times: Times, policy: Policy, live_ttl: float | None) -> float | None:
    if live_ttl is not None:
        return None if live_ttl == math.inf else live_ttl * SECOND * _share(times, policy)
    recorded = times.ttl
    ttl = policy.ttl
    if ttl is None or callable(ttl):
        return None if recorded < 0 else recorded
    now = ttl * SECOND
    return recorded if 0 <= recorded < now else now


def _share(times: Times, policy: Policy) -> float:
    """The part of a live ttl that `use_jitter` leaves to an entry, always the same for one entry.

    It was drawn when the entry was stored: the last digits of a ttl with jitter are random.
    """
    return 1 - JITTER * (times.ttl % 1000) / 1000 if policy.use_jitter else 1.0


def ttl_ns(policy: Policy, result: Any, live_ttl: float | None = None) -> int:
    """Nanoseconds of freshness for a result that is stored now; -1: no expiry.

    Raises:
        OptionError: a `ttl` callable gave what is not a ttl.
    """
    ttl: float | None
    if live_ttl is not None:
        ttl = None if live_ttl == math.inf else live_ttl
    elif callable(policy.ttl):
        ttl = seconds("ttl", policy.ttl(result))
    else:
        ttl = policy.ttl
    if ttl is None:
        return -1
    if policy.use_jitter:
        import random

        ttl *= 1 - random.random() * JITTER
    return max(1, int(ttl * SECOND))


_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_PART = r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d|w)"
_WHOLE = rf"(?a)\s*(?:{_PART}\s*)+"


LONGEST = 4.6e9
"""Seconds that a time in an entry can have at most, a stale window included."""


def seconds(
    option: str, value: Any, *, zero: bool = False, mend: str = "write None for no limit"
) -> float | None:
    """Seconds from a number, a `timedelta`, a text such as `"1h30m"`, or None for no limit.

    Args:
        option: the name to use in the error.
        value: what the user wrote.  Units in a text: ms, s, m, h, d, w.
        zero: whether 0 is allowed.
        mend: what to write instead of a number that is out of range.

    Raises:
        OptionError: for 0 (unless allowed), negative, NaN, infinite, bool, and texts without units.
    """
    if value is None:
        return None
    least = "0 or more" if zero else "more than 0"
    number = _number_of_seconds(option, value, mend)
    if math.isnan(number) or math.isinf(number):
        raise OptionError(option, value, f"must be finite; {mend}.")
    if number > LONGEST:
        raise OptionError(option, value, f"is more than {LONGEST / 31_557_600:.0f} years; {mend}.")
    if number < 0 or (number == 0 and not zero):
        raise OptionError(option, value, f"must be {least}; {mend}.")
    return number


def _number_of_seconds(option: str, value: Any, mend: str) -> float:
    if isinstance(value, bool):
        raise OptionError(option, value, "is a bool; write a number of seconds.")
    if isinstance(value, (int, float)):
        try:
            return float(value)
        except OverflowError:
            raise OptionError(option, value, f"is too large; {mend}.") from None
    if isinstance(value, str):
        if not re.fullmatch(_WHOLE, value):
            raise OptionError(option, value, 'has no units; write for instance "90s" or "1h30m".')
        return sum(float(number) * _UNITS[unit] for number, unit in re.findall(_PART, value))
    from datetime import timedelta

    if isinstance(value, timedelta):
        return value.total_seconds()
    raise OptionError(
        option, value, 'must be seconds, a timedelta, a text such as "1h30m", or None.'
    )
