"""Policy: how long an entry may be used, as pure data and one pure function.

`judge` takes an entry's recorded times, the policy of the function as it is now, and the present,
and answers with a `Verdict`.  Whether an entry is *true* (its stamps) is `stamps`' business
and is decided before: an invalidated value is never served as stale (stale windows are for expiry
alone, RFC 5861).
"""

from __future__ import annotations

import math
import time
from typing import Any, NamedTuple, cast

from memo.records.stamp_types import Times
from memo.runtime.clock import SECOND, Clock
from memo.runtime.reasons import CLOCK, EXPIRED
from memo.settings.durations import seconds
from memo.settings.options import INHERIT, Policy

FRESH = "fresh"
STALE = "stale"
MISS = "miss"

BORN_STALE = 0
"""The ttl, in nanoseconds, of what was built on a stale answer."""
JITTER = 0.1
"""`use_jitter` shortens a ttl by a uniform share of up to this much, and never lengthens it."""
FUTURE_TOLERANCE = 60 * SECOND
"""How far ahead of this host's wall clock another host's may be before an entry is refused."""
_NAMELESS = bytes(16)


class Verdict(NamedTuple):
    """Verdict on the age of an entry.

    Attributes:
        kind: `FRESH`, `STALE` (use it, refresh it) or `MISS`.
        reason: for a miss, why; for stale, `"ahead"` (still within its ttl) or `"expired"`.
        fallback: a miss whose old value may still answer if the computation raises.
        renewable: a miss whose value may prove right: results that it was built on may have
            changed, and can be asked (`cutoff`).
    """

    kind: str
    reason: str = ""
    fallback: bool = False
    renewable: bool = False


def _judge_expired(verdict: Verdict, policy: Policy, at: int) -> Verdict:
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


def judge(
    times: Times,
    policy: Policy,
    clock: Clock,
    live_ttl: float | None = None,
    expired: int | None = None,
) -> Verdict:
    """May an entry whose stamps hold be used now?

    Args:
        times: the entry's.
        policy: the function's, as it is now (which may be stricter than when it was stored).
        clock: reads the present.
        live_ttl: seconds, the value that the live configuration has for `policy.ttl_key`; it
            replaces the entry's own ttl.  `math.inf`: no expiry.
        expired: when it was let expire, in nanoseconds since the epoch; None: it was not.
    """
    if expired is not None:
        return _judge_expired(judge(times, policy, clock, live_ttl), policy, expired)
    if policy.max_age is not None:
        old = age(times, clock)
        if old is None or old >= policy.max_age * SECOND:
            return Verdict(MISS, CLOCK if old is None else EXPIRED)
    ttl = ttl_in_force(times, policy, live_ttl)
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


def remaining(
    times: Times, policy: Policy, clock: Clock, live_ttl: float | None = None
) -> int | None:
    """Nanoseconds for which an entry is still fresh, below 0 after that; None: no expiry."""
    ttl = ttl_in_force(times, policy, live_ttl)
    if ttl is None:
        return None
    old = age(times, clock)
    return 0 if old is None else int(ttl - old)


def ttl_in_force(times: Times, policy: Policy, live_ttl: float | None) -> float | None:
    """The ttl that counts for an entry now, in seconds; None: it does not expire."""
    recorded = times.ttl
    if recorded == BORN_STALE:
        return BORN_STALE
    if live_ttl is not None:
        return None if live_ttl == math.inf else live_ttl * SECOND * _share(times, policy)
    ttl = policy.ttl
    if ttl is None or not isinstance(ttl, (int, float)):
        return None if recorded < 0 else recorded
    now = ttl * SECOND
    return recorded if 0 <= recorded < now else now


def _share(times: Times, policy: Policy) -> float:
    """The part of a live ttl that `use_jitter` leaves to an entry, always the same for one entry.

    It was drawn when the entry was stored: the last digits of a ttl with jitter are random.
    """
    return 1 - JITTER * (times.ttl % 1000) / 1000 if policy.use_jitter else 1.0


def ttl_ns(
    policy: Policy, result: Any, live_ttl: float | None = None, inherited: int | None = None
) -> int:
    """Nanoseconds of freshness for a result that is stored now; -1: no expiry.

    Args:
        policy: the function's.
        result: what it returned.
        live_ttl: as for `judge`.
        inherited: how long the shortest-lived result that it was built on is still fresh; None: as
            long as it lies there.

    Raises:
        OptionError: a `ttl` callable gave what is not a ttl.
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

        ttl *= 1 - random.random() * JITTER
    return max(1, int(ttl * SECOND))
