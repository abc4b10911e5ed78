"""Inventory: the entries of this host, as `%cache_ls` lists them and `%cache_clear` drops them.

Only headers are read, never a value.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from memo import assembly, atoms, canon, display, sources
from memo import policy as policy_words
from memo.chain import Chain
from memo.decorators import functions
from memo.drivers import BLOCKING, drive
from memo.errors import TierError
from memo.explanations import listing
from memo.figures import matches
from memo.jobs import Function
from memo.policy import Policy, judge
from memo.port import Port
from memo.seal import Header
from memo.stamps import Generation, Ref, Stamp, State


class Item(NamedTuple):
    """An entry of this host.

    Attributes:
        header: what is known of it without loading its value.
        size: bytes of its record and its payload.
        tiers: names of those that hold it now.
        state: one of the words below.
    """

    header: Header
    size: int
    tiers: tuple[str, ...] = ()
    state: str = ""


FRESH = "fresh"
STALE = "stale"
"""It answers, and is refreshed."""
EXPIRED = "expired"
INVALIDATED = "invalidated"
OUTDATED = "outdated"
"""The code of its function, or what it depends on, has changed since."""
UNKNOWN = "unknown"
"""No tier can tell now."""


ORDERS: dict[str, Callable[[Item], float]] = {
    "newest": lambda item: item.header.times.finished,
    "oldest": lambda item: -item.header.times.finished,
    "size": lambda item: item.size,
    "cost": lambda item: item.header.times.cost,
}
"""What may come first -> what is sorted by, the largest first."""


class Wanted(NamedTuple):
    """Which entries are wanted, and in which order.

    Attributes:
        patterns: names of functions, as `memo.figures.matches` reads them; none: all.
        where: argument -> value; entries must have all of them.
        tag: one that they must have; None: any.
        tier: one that must hold them; None: any.
        by: one of `ORDERS`.
    """

    patterns: Sequence[str] = ()
    where: Mapping[str, Any] = {}
    tag: str | None = None
    tier: str | None = None
    by: str = "newest"

    def holds(self, header: Header) -> bool:
        """Whether an entry is one of them, wherever it lies."""
        groups = {s.ref.group for s in header.stamps if type(s) is Generation}
        tagged = self.tag is None or f"t:{self.tag}" in groups
        return tagged and matches(header.function, *self.patterns) and self._has(header)

    def _has(self, header: Header) -> bool:
        given = json.loads(header.summary) if self.where else {}
        return all(
            name in given and given[name][1] == atoms.short(canon.encoding(value, name))
            for name, value in self.where.items()
        )


def items(wanted: Wanted, limit: int | None = None) -> tuple[list[Item], int]:
    """The entries that are wanted, at most `limit` of them, and how many there are.

    Raises:
        MemoError: a setting is wrong, or a value has no key.
    """
    return drive(_items(BLOCKING, assembly.default_chain(), wanted, limit))


def table(shown: Sequence[Item]) -> display.Table:
    """Entries as they are listed, with the tiers that hold each."""
    listed = [(item.header, item.size) for item in shown]
    tiers = [", ".join(item.tiers) for item in shown]
    return display.entries(listed, time.time(), tiers, [item.state for item in shown])


async def _items(
    port: Port, chain: Chain, wanted: Wanted, limit: int | None
) -> tuple[list[Item], int]:
    listed = await listing(port, chain, f"{chain.namespace}:")
    found = [Item(header, size) for header, size in listed if wanted.holds(header)]
    found.sort(key=ORDERS[wanted.by], reverse=True)
    shown = found if wanted.tier else found[:limit]
    places = await _places(port, chain, [item.header for item in shown])
    shown = [item._replace(tiers=at) for item, at in zip(shown, places, strict=True)]
    if wanted.tier:
        found = shown = [item for item in shown if wanted.tier in item.tiers]
    shown = shown[:limit]
    told = await states(port, chain, [item.header for item in shown])
    return [item._replace(state=one) for item, one in zip(shown, told, strict=True)], len(found)


async def states(port: Port, chain: Chain, headers: Sequence[Header]) -> list[str]:
    """The state of some entries: what the next call of each would find, without loading a value."""
    refs = {s.ref: None for h in headers for s in h.stamps if type(s) is Generation}
    try:
        now = dict(zip(refs, await chain.authorities.states(port, list(refs)), strict=True))
    except TierError:
        return [UNKNOWN] * len(headers)
    others = {s: False for h in headers for s in h.stamps if type(s) is not Generation}
    for stamp in others:
        others[stamp] = bool(await sources.check(port, stamp))
    known = {function.function_id: function._function for function in functions()}
    codes = {name: f.identity.digest() for name, f in known.items() if not f.keyer.method}
    return [
        _state(header, now, others, known.get(header.function), codes.get(header.function), chain)
        for header in headers
    ]


def _state(
    header: Header,
    now: Mapping[Ref, State],
    changed: Mapping[Stamp, bool],
    function: Function | None,
    code: str | None,
    chain: Chain,
) -> str:
    own = [stamp for stamp in header.stamps if type(stamp) is Generation]
    if any(now[stamp.ref].text != stamp.state.text for stamp in own):
        return INVALIDATED
    if any(changed[stamp] for stamp in header.stamps if type(stamp) is not Generation):
        return OUTDATED
    if code is not None and header.code != code:
        return OUTDATED
    policy = Policy(ttl=None) if function is None else function.policy
    kind = judge(header.times, policy, chain.clock).kind
    if function is None:
        return FRESH if kind == policy_words.FRESH else EXPIRED
    return {policy_words.FRESH: FRESH, policy_words.STALE: STALE}.get(kind, EXPIRED)


async def _places(port: Port, chain: Chain, headers: Sequence[Header]) -> list[tuple[str, ...]]:
    """The tiers that hold each of some entries; a tier that cannot tell is left out."""
    names = [chain.name(header.function, header.key) for header in headers]
    found: list[tuple[str, ...]] = [()] * len(names)
    for tier in chain.tiers:
        holds: Any = getattr(tier, "holds", None)
        if holds is None or not names:
            continue
        try:
            answers = await holds(port, names)
        except TierError:
            continue
        found = [(*at, tier.name) if held else at for at, held in zip(found, answers, strict=True)]
    return found
