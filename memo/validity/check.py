"""The check: do the stamps of an entry still hold?

Asked here for every path to an answer and for every store.  A path may skip work, such as parsing
a header or asking a tier, but never this question.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter

from memo.records.stamp_types import Generation, Result, Stamp, State, Times
from memo.runtime.port import Port
from memo.runtime.reasons import EXPIRED, GENERATION_LOST, INVALIDATED, SOURCE_UNREACHABLE
from memo.validity import dependencies
from memo.validity.lifetimes import MISS, Verdict
from memo.validity.results import unproven
from memo.validity.stamps import expired_at

Judge = Callable[..., Verdict]
"""Gives the verdict on an entry by its times, by when it was let expire (None: it was not), by
whether it is an exception that was raised, and by whether a source of it cannot be asked."""


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
    """The reason of an entry that only results it was built on put in doubt: they can be asked.

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
    """When an entry was let expire, if that is all that can be said against it; else None."""
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
