"""Matching: the valid entries that an invalidation is about to drop.

Looking is for the answer alone: it is bounded in time, reads headers and this host's generations
only, and never changes what is invalidated.  A shared tier is searched where the caller wants to be
sure: each search looks at all the names there.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from memo.errors import EntryError, TierError
from memo.records.seal import Header
from memo.records.stamp_types import Generation, Ref
from memo.runtime.port import Port
from memo.runtime.ports import BLOCKING, drive
from memo.stores.chain import Chain
from memo.validity.check import broken, texts
from memo.validity.lifetimes import age
from memo.validity.results import unfolded
from memo.validity.stamps import Turn, concerns

BOUND = 0.05
"""Seconds that looking for matching entries may take, from the first of them on."""
ALWAYS = 100
"""Entries that are looked at however long it takes: opening the index alone may take `BOUND`."""
SEEN = 500
"""Addresses of other entries that are kept, to find the one that was probably meant."""
FIRST = 5
"""Entries that are kept with their headers, to be shown."""


class Matches(NamedTuple):
    """Entries on this host that an invalidation is about to drop.

    Attributes:
        number: how many valid entries were found.
        partial: looking was given up, so there may be more.
        first: the headers of the first few.
        others: addresses of valid entries that it does not concern.
        groups: their generations: `"p:products"`, `"t:sales"`.
    """

    number: int = 0
    partial: bool = False
    first: tuple[Header, ...] = ()
    others: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()


async def matching(port: Port, chains: Iterable[Chain], turns: Sequence[Turn]) -> Matches:
    """The valid entries of this host that some invalidations would drop."""
    if not turns:
        return Matches()
    return await port.offload(_matching, tuple(chains), tuple(turns))


async def matching_afar(port: Port, chains: Iterable[Chain], turns: Sequence[Turn]) -> Matches:
    """The valid entries of shared tiers that some invalidations would drop."""
    until = time.monotonic() + BOUND
    found: dict[str, Header] = {}
    partial = False
    for chain in chains:
        listing: Any = getattr(chain.authorities.shared, "listed", None)
        if listing is None:
            continue
        try:
            listed, whole = await listing(port, _common_prefix(chain, turns), until)
        except TierError:
            partial = True
            continue
        partial = partial or not whole
        for name, record in listed:
            with suppress(EntryError):
                header = chain.opened(name, record).header
                if concerns(turns, own_refs(header)) and await _is_valid_afar(port, chain, header):
                    found[header.key] = header
    return Matches(len(found), partial, tuple(found.values())[:FIRST])


def _matching(chains: Sequence[Chain], turns: Sequence[Turn]) -> Matches:
    until = time.monotonic() + BOUND
    found: dict[str, Header] = {}
    others: dict[str, None] = {}
    groups: dict[str, None] = {}
    partial = False
    for chain in chains:
        prefix = _common_prefix(chain, turns)
        for header in drive(_listed(chain, prefix, until)):
            if header is None:
                partial = True
            elif not concerns(turns, own_refs(header)):
                if len(others) < SEEN:
                    others.setdefault(header.address)
                    groups.update(dict.fromkeys(ref.group for ref in own_refs(header)))
            elif header.key not in found and is_valid(chain, header):
                found[header.key] = header
    first = tuple(found.values())[:FIRST]
    return Matches(len(found), partial, first, tuple(others), tuple(groups))


def _common_prefix(chain: Chain, turns: Sequence[Turn]) -> str:
    """Common prefix of the names of all entries that some turns may concern."""
    groups = {turn.group for turn in turns}
    only = groups.pop() if len(groups) == 1 else ""
    return chain.prefix(only[2:]) if only.startswith("f:") else f"{chain.namespace}:"


async def _listed(chain: Chain, prefix: str, until: float) -> list[Header | None]:
    """The headers of a chain's entries on this host; None: not all of them could be read."""
    found: list[Header | None] = []
    seen: set[str] = set()
    for tier in chain.tiers:
        entries: Any = getattr(tier, "entries", None)
        if entries is None:
            continue
        try:
            async for listed in entries(BLOCKING, prefix):
                if len(seen) >= ALWAYS and time.monotonic() > until:
                    return [*found, None]
                if listed.name not in seen:
                    seen.add(listed.name)
                    with suppress(EntryError):
                        found.append(chain.opened(listed.name, listed.record).header)
        except TierError:
            found.append(None)
    return found


def own_refs(header: Header) -> Iterator[Ref]:
    """The generations of a call itself, without those of the calls that it was built on.

    They come first in a header, and begin with the namespace and the function.
    """
    mine = f"f:{header.function}"
    seen = False
    for stamp in header.stamps:
        if type(stamp) is not Generation:
            continue
        if stamp.ref.group.startswith("f:"):
            if seen or stamp.ref.group != mine:
                return
            seen = True
        yield stamp.ref


def is_valid(chain: Chain, header: Header) -> bool:
    """True if an entry has not expired, and its own generations hold as far as this host knows."""
    host = chain.host
    if _is_over(chain, header):
        return False
    if host is None:
        return True
    own = _own(header)
    try:
        now = host.generations.read([stamp.ref for stamp in own])
    except TierError:
        return False
    return not broken([stamp.state.text for stamp in own], texts(now))


async def _is_valid_afar(port: Port, chain: Chain, header: Header) -> bool:
    """True if an entry has not expired, and its own generations hold."""
    if _is_over(chain, header):
        return False
    own = _own(header)
    try:
        now = await chain.authorities.states(port, [stamp.ref for stamp in own])
    except TierError:
        return False
    return not broken([stamp.state.text for stamp in own], texts(now))


def _is_over(chain: Chain, header: Header) -> bool:
    """True if an entry is too old to answer."""
    old = age(header.times, chain.clock)
    _, _, _, _, ttl, grace, _ = header.times
    return old is None or (ttl >= 0 and old >= ttl + grace)


def _own(header: Header) -> list[Generation]:
    absolute, _ = unfolded(header.stamps)  # what results vouch for is asked before it is gone
    return [stamp for stamp in absolute if type(stamp) is Generation]
