"""Invalidating: turn generations in every chain that may hold entries, and say what that hit."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Final, NamedTuple

from memo.engine.call import writer
from memo.engine.coordination.flights import FLIGHTS
from memo.engine.matching import BOUND, Matches, matching, matching_afar
from memo.errors import label
from memo.records.seal import Header
from memo.runtime import events
from memo.runtime.port import Port
from memo.stores.authorities import make_note
from memo.stores.chain import Chain
from memo.validity import stamps
from memo.validity.stamps import Turn

HERE: Final = "on this host"
AFAR: Final = "in Redis and not on this host"
Hint = Callable[[Port, Matches], Awaitable[str]]
"""Gives a hint for people about an invalidation that matched nothing; `""`: none."""


class Invalidation(NamedTuple):
    """How an invalidation went, and what it hit.

    Attributes:
        target: what was invalidated, for people.
        tiers: tier -> `"done"`, or why not and what happens now.
        reason: the caller's.
        matched: how many valid entries this host knew of.  It is counted for at most 50 ms, before
            they are dropped; what Redis alone has is dropped without being counted, unless the
            caller was strict and this host had none.
        at_least: counting stopped early, so there may be more.
        hint: where nothing matched, what was probably meant.
        verb: `"invalidated"` or `"expired"`.
        first: headers of the first few.
        uncounted: a shared tier may have had entries that this host did not, and was not searched.
        place: where the entries are that matched.
    """

    target: str
    tiers: Mapping[str, str]
    reason: str = ""
    matched: int = 0
    at_least: bool = False
    hint: str = ""
    verb: str = "invalidated"
    first: tuple[Header, ...] = ()
    uncounted: bool = False
    place: str = HERE

    @property
    def complete(self) -> bool:
        """True if every tier has it already."""
        return all(how == "done" for how in self.tiers.values())

    @property
    def missed(self) -> bool:
        """True if it is certain that this host, and what was searched, had no valid entry of it."""
        return not (self.matched or self.at_least)

    @property
    def counted(self) -> str:
        """How many entries it hit: `12 entries on this host`."""
        entries = "entry" if self.matched == 1 else "entries"
        found = f"{self.matched:,} {entries} {self.place}"
        if not self.at_least:
            return found
        if self.place == AFAR:
            return f"at least {found}, Redis could not be searched whole"
        return f"at least {found}, counting was stopped after {BOUND * 1000:.0f} ms"

    def __repr__(self) -> str:

        how = ", ".join(f"{tier}: {what}" for tier, what in self.tiers.items())
        target = label(self.target)
        if not self.missed:
            return f"{self.verb} {target}: {self.counted} ({how})"
        undone = "" if self.complete else f" ({how})"
        said = f"nothing matched {target}{self.beyond}{undone}"
        return f"{said}{'; ' * bool(self.hint)}{self.hint}"

    @property
    def beyond(self) -> str:
        """The doubt that a count of zero leaves."""
        if not self.uncounted:
            return ""
        return f" on this host; entries that only Redis has were {self.verb} uncounted"

    def _repr_html_(self) -> str:
        from memo.metrics import rendering

        facts = {**self.tiers, **({"reason": self.reason} if self.reason else {})}
        if self.missed:
            said = f"Nothing matched {label(self.target)}{self.beyond}"
            facts = {**({"hint": self.hint} if self.hint else {}), **facts}
        else:
            said = f"{self.verb.capitalize()} {label(self.target)}: {self.counted}"
        return rendering.facts_html(said, facts)


async def invalidate(
    port: Port,
    chains: Iterable[Chain],
    turns: Iterable[Turn],
    target: str,
    reason: str = "",
    *,
    soft: bool = False,
    count: bool = True,
    hint: Hint | None = None,
    sure: bool = False,
) -> Invalidation:
    """Invalidate entries in every chain that may hold them.

    Args:
        soft: let them expire instead, so that stale windows still apply.
        count: look for what it hits.
        hint: asked when nothing was hit.
        sure: where this host has none, search the shared tier.
    """
    every = tuple(chains)
    wanted = tuple(turns)
    found = await matching(port, every, wanted) if count else Matches(partial=True)
    uncounted = bool(wanted) and any(chain.authorities.shared is not None for chain in every)
    uncounted = uncounted and not (found.number or found.partial)
    place = HERE
    if sure and uncounted:
        afar = await matching_afar(port, every, wanted)
        found = afar._replace(others=found.others, groups=found.groups)
        uncounted, place = False, AFAR
    if soft:
        wanted = tuple(map(stamps.softened, wanted))
    tiers = await _turn(port, every, wanted, reason)
    said = ""
    if hint is not None and not (found.number or found.partial):
        said = await hint(port, found)
    verb = "expired" if soft else "invalidated"
    return Invalidation(
        *(target, tiers, reason, found.number, found.partial, said, verb, found.first),
        uncounted=uncounted,
        place=place,
    )


async def _turn(
    port: Port, chains: Sequence[Chain], turns: tuple[Turn, ...], reason: str
) -> dict[str, str]:
    """Turn generations; how it went, tier by tier."""
    note = make_note(reason, writer())
    tiers: dict[str, str] = {}
    for chain in chains:
        for tier, how in (await chain.authorities.turn(port, turns, note)).items():
            if tiers.get(tier, "done") == "done":
                tiers[tier] = how
    FLIGHTS.detach(turns)
    for function in {_function_of(turn): None for turn in turns} or ("",):
        about = _about(turns)
        events.emit(events.Event(events.INVALIDATED, function, reason=reason, detail=about))
    return tiers


def _about(turns: Iterable[Turn]) -> str:
    """Describe an invalidation without any argument's value: groups, and names of arguments."""
    return ", ".join(
        f"{turn.group} by {stamps.shape(turn.arguments)}" if turn.arguments else turn.group
        for turn in turns
    )


def _function_of(turn: Turn) -> str:
    """The function that an invalidation is about; `""` for a prefix, a tag or a namespace."""
    return turn.group[2:] if turn.group.startswith("f:") else ""
