"""The check: may an entry be used?  Do its stamps hold, and is it young enough?

Asked here for every path to an answer and for every store.  A path may skip work, such as parsing
a header or asking a tier, but never these questions.

An entry whose stamps do not hold is never served as stale: the windows of a policy are for expiry
alone (RFC 5861).  `judge` is a pure function of an entry's recorded times, the function's policy as
it is now, and the present.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from typing import Any, cast

from memo.records.stamp_types import Generation, Result, Stamp, State, Times
from memo.runtime.clock import SECOND, Clock
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
from memo.validity.results import unproven
from memo.validity.stamps import expired_at

FRESH = "fresh"
STALE = "stale"
MISS = "miss"

BORN_STALE = 0
"""The ttl, in nanoseconds, of what was built on a stale answer."""
JITTER = 0.1
"""`use_jitter` shortens a ttl by a uniform share of up to this much, and never lengthens it."""
FUTURE_TOLERANCE = 60 * SECOND
"""Nanoseconds that another host's wall clock may be ahead before its entries are refused."""
_NAMELESS = bytes(16)


class Verdict(NamedTuple):
    """Verdict on the age of an entry.

    Attributes:
        kind: `FRESH`, `STALE` (use it, refresh it) or `MISS`.
        reason: for a miss, why; for stale, `"ahead"` (still within its ttl) or `"expired"`.
        fallback: a miss whose old value may still answer if the computation raises.
        renewable: a miss whose value may be confirmed: results that it was built on may have
            changed, and can be asked (`cutoff`).
    """

    kind: str
    reason: str = ""
    fallback: bool = False
    renewable: bool = False


# --- stamps --------------------------------------------------------------------------------------


class Expired(str):
    """The reason of an entry that was let expire (`memo.expire`).

    Attributes:
        at: when, in nanoseconds since the epoch.
    """

    __slots__ = ("at",)
    at: int

    @classmethod
    def since(cls, at: int) -> Expired:
        reason = cls(EXPIRED)
        reason.at = at
        return reason


class Unproven(str):
    """The reason of an entry that is in doubt only because of results that can be asked again.

    Attributes:
        at: when the last of them was let expire, if nothing else happened to them; else None.
    """

    __slots__ = ("at",)
    at: int | None

    @classmethod
    def since(cls, reason: str, at: int | None) -> Unproven:
        made = cls(reason)
        made.at = at
        return made


def expiry(reason: str) -> int | None:
    """The time at which an entry was let expire, if nothing else is against it; else None."""
    return reason.at if isinstance(reason, (Expired, Unproven)) else None


def may_answer(reason: str) -> bool:
    """True if a policy may let an entry answer in spite of a reason."""
    return reason == SOURCE_UNREACHABLE or isinstance(reason, (Expired, Unproven))


def broken(recorded: list[str], present: list[str]) -> str:
    """Why generations do not read as they did; "" if they do.

    Args:
        recorded: the texts of their states as an entry has them.
        present: the texts of their states now.  One that is lost, `""`, holds for nothing.

    Returns:
        One of the reasons; an `Expired` where the entry was let expire and nothing more.
    """
    if recorded == present and "" not in present:
        return ""
    times: list[int] = []
    for before, now in zip(recorded, present, strict=True):
        if before != now or not now:
            at = expired_at(before, now) if now else None
            if at is None:
                return INVALIDATED if now else GENERATION_LOST
            times.append(at)
    return Expired.since(min(times)) if times else ""


def texts(states: Iterable[State]) -> list[str]:
    """The texts of some states, to compare."""
    return list(map(_text, states))


_text = itemgetter(State._fields.index("text"))


async def why_invalid(port: Port, stamps: Sequence[Stamp], states: Sequence[State]) -> str:
    """Why stamps do not hold any more; "" if they do.

    Args:
        stamps: of any kind.
        states: what the generations among them read now, in the same order.

    Returns:
        One of the reasons; an `Expired` or an `Unproven` where that is all there is against them.
    """
    recorded = [stamp.state.text for stamp in stamps if type(stamp) is Generation]
    if len(recorded) == len(stamps):
        return broken(recorded, texts(states))
    if type(stamps[-1]) is Result:
        found = await reasons(port, stamps, states)
        return _weighed(stamps, found) if any(found) else ""
    reason = broken(recorded, texts(states))
    if reason and not isinstance(reason, Expired):
        return reason
    others = [stamp for stamp in stamps if type(stamp) is not Generation]
    for stamp in others:
        if not dependencies.is_far(stamp):
            [other] = await dependencies.check(port, [stamp])
            if other:
                return other
    found = await dependencies.check(port, list(filter(dependencies.is_far, others)))
    whys = sorted(filter(None, found), key=lambda why: why == SOURCE_UNREACHABLE)
    return whys[0] if whys else reason


async def reasons(port: Port, stamps: Sequence[Stamp], states: Sequence[State]) -> list[str]:
    """Why each of some stamps does not hold; of a result `""`."""
    now = iter(states)
    others = [stamp for stamp in stamps if type(stamp) not in (Generation, Result)]
    whys = iter(await dependencies.check(port, others))
    found: list[str] = []
    for stamp in stamps:
        if type(stamp) is Generation:
            found.append(broken([stamp.state.text], [next(now).text]))
        else:
            found.append("" if type(stamp) is Result else next(whys))
    return found


def _weighed(stamps: Sequence[Stamp], reasons: Sequence[str]) -> str:
    """Reason of a single stamp -> what it means for the entry, as `Chain.why_invalid` has it."""
    absolute, beneath = unproven(stamps, reasons)
    hard_ones = [why for why in (*absolute, *beneath) if not isinstance(why, Expired)]
    hard = min(hard_ones, key=lambda why: why == SOURCE_UNREACHABLE, default="")
    times = [why.at for why in (*absolute, *beneath) if isinstance(why, Expired)]
    if absolute:
        return hard or Expired.since(min(times))
    if beneath:
        return Unproven.since(hard or EXPIRED, None if hard else min(times))
    return ""


# --- age -----------------------------------------------------------------------------------------


def _judge_expired(verdict: Verdict, policy: Policy, clock: Clock, at: int) -> Verdict:
    """The verdict on an entry that was let expire before its ttl was over.

    Args:
        verdict: what it would be otherwise.
        clock: reads the present.
        at: when it was let expire, in nanoseconds since the epoch.
    """
    if verdict.kind == MISS:
        return verdict
    past = max(0, clock.wall_ns() - at)
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
    """Judge by age whether an entry whose stamps hold may be used now.

    Args:
        times: the entry's.
        policy: the function's, as it is now (which may be stricter than when it was stored).
        clock: reads the present.
        live_ttl: seconds, the value that the live configuration has for `policy.ttl_key`; it
            replaces the entry's own ttl.  `math.inf`: no expiry.
        expired: when it was let expire, in nanoseconds since the epoch; None: it was not.
    """
    if expired is not None:
        return _judge_expired(judge(times, policy, clock, live_ttl), policy, clock, expired)
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


Judge = Callable[..., Verdict]
"""Gives the verdict on an entry by its times, by when it was let expire (None: it was not), by
whether it is an exception that was raised, and by whether a source of it cannot be asked."""


def judged(judge: Judge, times: Times, reason: str, *, raised: bool) -> Verdict:
    """The verdict on an entry whose stamps hold, or that `may_answer`.

    Args:
        raised: it is an exception that was remembered.
    """
    expired = expiry(reason)
    verdict = judge(times, expired, raised, reason == SOURCE_UNREACHABLE)
    if not isinstance(reason, Unproven) or (verdict.kind != MISS and expired is not None):
        return verdict  # what was let expire may be served while the results are asked
    by_age = judge(times, None, raised)
    within = by_age.kind != MISS and by_age.reason != EXPIRED
    fallback = expired is not None and verdict.fallback
    return Verdict(MISS, str(reason), fallback=fallback, renewable=within)
