"""Invalidate: turn generations in every chain that may hold entries, and count the matches.

Counting the matches is for the report only, and never changes what is invalidated, also if it
fails.  It is bounded in time, and reads only headers and this host's generations.  A shared tier is
searched only if the caller requests it, since each search scans all names there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

from memo.coordination.flights import FLIGHTS
from memo.engine.call import error_text, writer_name
from memo.errors import EntryError, TierError, TierUnavailable, label
from memo.records.seal import Header
from memo.records.stamp_types import Generation, Ref, Result, Stamp, State
from memo.runtime import events
from memo.runtime.named_tuple import NamedTuple
from memo.runtime.port import Port
from memo.stores.authorities import make_note
from memo.stores.chain import Chain
from memo.stores.protocols import Listed, ServerTier, display_name
from memo.validity import stamps
from memo.validity.check import expiry, is_useless, state_texts, why_changed
from memo.validity.results import unflatten
from memo.validity.stamps import Affected, Turn

COUNT_SECONDS = 0.05
"""Seconds that counting matches may take, from the first match on."""
MIN_COUNTED = 100
"""Entries that are examined however long it takes: opening the index may take `COUNT_SECONDS`."""
MAX_OTHER_ADDRESSES = 500
"""Maximum number of addresses of other entries that are kept, to suggest the one that was probably
intended."""
MAX_SHOWN_HEADERS = 5
"""Maximum number of headers of matching entries that are kept for display."""
HERE: Final = "on this host"


class Matches(NamedTuple):
    """The entries that an invalidation is about to drop.

    Attributes:
        number: how many valid entries were found.
        partial: the search stopped early, so there may be more.
        first: the headers of the first few.
        others: addresses of entries that are not affected.
        groups: the generation groups of those: `"p:products"`, `"t:sales"`.
        failed: the search raised an error, so there may be more.
    """

    number: int = 0
    partial: bool = False
    first: tuple[Header, ...] = ()
    others: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    failed: bool = False


Hint = Callable[[Matches], str]
"""Returns a hint for the user if an invalidation matched nothing, or `""`."""


class Invalidation(NamedTuple):
    """The report of an invalidation: its outcome in each tier, and the entries that matched.

    Attributes:
        target: the target, for display.
        tiers: tier -> `"done"`, or why not and what happens now.
        reason: the caller's reason.
        matched: how many valid entries this host knew of.  They are counted before they are
            dropped, for at most 50 ms.  Entries that only a shared tier has are dropped without
            being counted, unless the call was strict and this host had none.
        at_least: counting stopped early, so there may be more.
        hint: if nothing matched, the target that was probably intended.
        verb: `"invalidated"` or `"expired"`.
        first: the headers of the first few.
        uncounted: a shared tier may have had more entries than this host, and was not searched.
        place: a phrase that says where the matched entries are.
        shared: the names of the shared tiers, as part of a sentence.
        counting_failed: counting raised an error, so there may be more; an event says which.
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
    shared: str = ""
    counting_failed: bool = False

    @property
    def complete(self) -> bool:
        """True if every tier has carried the invalidation out."""
        return all(how == "done" for how in self.tiers.values())

    @property
    def missed(self) -> bool:
        """True if there was certainly no valid entry on this host and in the tiers searched."""
        return not (self.matched or self.at_least)

    @property
    def counted(self) -> str:
        """Return the number of matches as text: `12 entries on this host`."""
        entries = "entry" if self.matched == 1 else "entries"
        found = f"{self.matched:,} {entries} {self.place}"
        if not self.at_least:
            return found
        if self.counting_failed:
            return f"at least {found}, counting failed"
        if self.place != HERE:
            found = f"at least {found}" if self.matched else f"no entry {HERE}"
            return f"{found}; {self.shared} could not be searched completely"
        return f"at least {found}, counting was stopped after {COUNT_SECONDS * 1000:.0f} ms"

    def __repr__(self) -> str:
        how = ", ".join(f"{tier}: {what}" for tier, what in self.tiers.items())
        target = label(self.target)
        if not self.missed:
            return f"{self.verb} {target}: {self.counted} ({how})"
        undone = "" if self.complete else f" ({how})"
        message = f"nothing matched {target}{self.uncounted_caveat}{undone}"
        return f"{message}{'; ' * bool(self.hint)}{self.hint}"

    @property
    def uncounted_caveat(self) -> str:
        """The caveat of a count of zero if a shared tier was not searched, or `""`."""
        if not self.uncounted:
            return ""
        return f" {HERE}; entries that are only in {self.shared} were {self.verb} uncounted"

    def _repr_html_(self) -> str:
        from memo.metrics import formatting

        facts = {**self.tiers, **({"reason": self.reason} if self.reason else {})}
        if self.missed:
            title = f"Nothing matched {label(self.target)}{self.uncounted_caveat}"
            facts = {**({"hint": self.hint} if self.hint else {}), **facts}
        else:
            title = f"{self.verb.capitalize()} {label(self.target)}: {self.counted}"
        return formatting.facts_html(title, facts)


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
    search_shared: bool = False,
) -> Invalidation:
    """Invalidate entries in every chain that may hold them.

    Args:
        soft: let them expire instead, so that stale windows still apply.
        count: count the matching entries.
        hint: called if nothing matched.
        search_shared: if this host has no match, search the shared tiers too.
    """
    every = tuple(chains)
    wanted = tuple(turns)
    shared_tiers = [chain.authorities.shared for chain in every]
    shown = [display_name(tier.name) for tier in shared_tiers if tier is not None]
    shared = " and ".join(dict.fromkeys(shown))
    may_be_shared = bool(wanted and shared)
    found, in_shared = Matches(partial=True), False
    if count:
        search = search_shared and may_be_shared
        found, in_shared = await _count(port, every, wanted, search_shared=search)
    if soft:
        wanted = tuple(map(stamps.as_soft, wanted))
    tiers = await _turn_all(port, every, wanted, reason)
    advice = ""
    if hint is not None and not (found.number or found.partial):
        try:
            advice = hint(found)
        except Exception as error:  # methods of the user's values, say: the entries are dropped
            _emit_fault("hint", error)
    verb = "expired" if soft else "invalidated"
    return Invalidation(
        *(target, tiers, reason, found.number, found.partial, advice, verb, found.first),
        uncounted=may_be_shared and not (in_shared or found.number or found.partial),
        place=f"in {shared} and not {HERE}" if in_shared else HERE,
        shared=shared,
        counting_failed=found.failed,
    )


async def _count(
    port: Port, chains: Sequence[Chain], turns: Sequence[Turn], *, search_shared: bool
) -> tuple[Matches, bool]:
    """Count the matches on this host, or, if it has none, in the shared tiers if requested.

    No fault of the count may stop the invalidation: it is an event, and the count is partial.

    Returns:
        The matches, and True if they are those in the shared tiers.
    """
    found = Matches()
    try:
        found = await port.offload(matches_on_host, chains, turns)
        if not search_shared or found.number or found.partial:
            return found, False
        in_shared = await matches_in_shared(port, chains, turns)
        return in_shared._replace(others=found.others, groups=found.groups), True
    except Exception as error:
        _emit_fault("count", error)
        return found._replace(partial=True, failed=True), False


async def count_on_host(port: Port, chain: Chain, function: str, code: str | None) -> int | None:
    """Count the entries of a function on this host that may answer a call.

    Args:
        code: its code version; None: the entries of all versions count.

    Returns:
        Their number; None if the chain cannot list them, or not within `COUNT_SECONDS`.
    """
    if not chain.listing:
        return None
    try:
        return await port.offload(_count_valid, chain, function, code)
    except Exception as error:
        _emit_fault("count", error)
        return None


def _count_valid(chain: Chain, function: str, code: str | None) -> int | None:
    keys: set[str] = set()
    until = time.monotonic() + COUNT_SECONDS
    for header in _headers_on_host(chain, chain.prefix(function), until):
        if header is None:
            return None
        if header.code in (code or header.code, "") and _is_valid_here(chain, header):
            keys.add(header.key)
    return len(keys)


def _emit_fault(part: str, error: Exception) -> None:
    """Emit an event about a fault in a part of the report."""
    events.emit(events.Event(events.ERROR, reason=part, detail=error_text(error)))


async def _turn_all(
    port: Port, chains: Sequence[Chain], turns: tuple[Turn, ...], reason: str
) -> dict[str, str]:
    """Turn generations in several chains; return the outcome by tier."""
    tiers: dict[str, str] = {}
    for chain in chains:
        note = make_note(reason, writer_name(), chain.clock)
        for tier, how in (await chain.authorities.turn(port, turns, note)).items():
            if tiers.get(tier, "done") == "done":
                tiers[tier] = how
    FLIGHTS.detach(turns)
    for function in {_function_of(turn): None for turn in turns} or ("",):
        about = _turns_text(turns)
        events.emit(events.Event(events.INVALIDATION, function, reason=reason, detail=about))
    return tiers


def _turns_text(turns: Iterable[Turn]) -> str:
    """Describe an invalidation by its groups and argument names, without values of arguments."""
    shown = (
        f"{turn.group} by {stamps.shape(turn.arguments)}" if turn.arguments else turn.group
        for turn in turns
    )
    return ", ".join(dict.fromkeys(shown))


def _function_of(turn: Turn) -> str:
    """Return the function that a turn concerns; `""` if it is for a prefix, tag or namespace."""
    return turn.group[2:] if turn.group.startswith("f:") else ""


# --- counting matches -----------------------------------------------------------------------------


async def matches_in_shared(port: Port, chains: Iterable[Chain], turns: Sequence[Turn]) -> Matches:
    """Find the valid entries of shared tiers that some turns would drop."""
    until = time.monotonic() + COUNT_SECONDS
    affected = Affected(turns)
    found: dict[str, Header] = {}
    partial = False
    for chain in chains:
        shared = chain.authorities.shared
        if shared is None:
            continue
        if not isinstance(shared, ServerTier):  # a user's own store cannot be searched
            partial = True
            continue
        try:
            listed, whole = await shared.search(port, _common_prefix(chain, turns), until)
        except TierError:
            partial = True
            continue
        partial = partial or not whole
        for name, record in listed:
            header = await _match_in_shared(port, chain, affected, name, record)
            if header is not None:
                found[header.key] = header
    return Matches(len(found), partial, tuple(found.values())[:MAX_SHOWN_HEADERS])


async def _match_in_shared(
    port: Port, chain: Chain, affected: Affected, name: str, record: bytes
) -> Header | None:
    """Return the header of an entry in the shared tier if it is valid and affected."""
    try:
        header = chain.header_of(name, record)
    except EntryError:
        return None
    if not affected.has_any(own_refs(header)):
        return None
    own = _own_generations(header)
    try:
        now = await chain.authorities.states(port, [stamp.ref for stamp in own])
    except TierError:
        return None
    return header if _is_valid(chain, header, own, now) else None


def matches_on_host(chains: Sequence[Chain], turns: Sequence[Turn]) -> Matches:
    """Find the valid entries of this host that some turns would drop; blocks the thread."""
    if not turns:
        return Matches()
    until, affected = time.monotonic() + COUNT_SECONDS, Affected(turns)
    found: dict[str, Header] = {}
    others: dict[str, None] = {}
    groups: dict[str, None] = {}
    partial = False
    for chain in chains:
        prefix = _common_prefix(chain, turns)
        for header in _headers_on_host(chain, prefix, until):
            if header is None:
                partial = True
            elif not affected.has_any(own := own_refs(header)):
                if len(others) < MAX_OTHER_ADDRESSES:
                    others.setdefault(header.address)
                    groups.update(dict.fromkeys(ref.group for ref in own))
            elif header.key not in found and _is_valid_here(chain, header):
                found[header.key] = header
    first = tuple(found.values())[:MAX_SHOWN_HEADERS]
    return Matches(len(found), partial, first, tuple(others), tuple(groups))


def _is_valid_here(chain: Chain, header: Header) -> bool:
    """True if an entry is valid as far as this host knows."""
    own = _own_generations(header)
    if chain.host is None:  # only its age is known
        return _is_valid(chain, header, [], [])
    try:
        now = chain.host.generations.read([stamp.ref for stamp in own])
    except TierError:
        return False
    return _is_valid(chain, header, own, now)


def _common_prefix(chain: Chain, turns: Sequence[Turn]) -> str:
    """Return the longest prefix of the names of all entries that some turns may concern."""
    groups = {turn.group for turn in turns}
    only = groups.pop() if len(groups) == 1 else ""
    return chain.prefix(only[2:]) if only.startswith("f:") else f"{chain.namespace}:"


def _headers_on_host(chain: Chain, prefix: str, until: float) -> list[Header | None]:
    """List the headers of a chain's entries on this host; a None among them: some are missing."""
    found: list[Header | None] = []
    seen: set[str] = set()
    for tier in chain.listing:
        try:
            for listed in tier.entries(prefix):
                if len(seen) >= MIN_COUNTED and time.monotonic() > until:
                    return [*found, None]
                if listed.name not in seen:
                    seen.add(listed.name)
                    found += _header_of(chain, listed)
        except TierError as error:
            if not (isinstance(error, TierUnavailable) and error.reported):
                found.append(None)  # else nothing of it can be used here
    return found


def _header_of(chain: Chain, listed: Listed) -> list[Header]:
    """Return the header of a listed entry; nothing if it is not authentic."""
    if listed.entry is not None:  # its seal has been checked already
        return [listed.entry.header]
    try:
        return [chain.header_of(listed.name, listed.record)]
    except EntryError:
        return []


def own_refs(header: Header) -> list[Ref]:
    """Return the generations of a call itself, without those of the calls that it was built on.

    In a header they come first, beginning with those of the namespace and the function.
    """
    mine = f"f:{header.function}"
    seen, refs = False, []
    for stamp in header.stamps:
        if type(stamp) is not Generation:
            continue
        if stamp.ref.group.startswith("f:"):
            if seen or stamp.ref.group != mine:
                break
            seen = True
        refs.append(stamp.ref)
    return refs


def _is_valid(
    chain: Chain, header: Header, own: Sequence[Generation], now: Sequence[State]
) -> bool:
    """True if an entry is not too old for any use, and its own generations let it answer.

    Args:
        now: the current states of those.
    """
    reason = why_changed([stamp.state.text for stamp in own], state_texts(now))
    expired = expiry(reason)
    return (not reason or expired is not None) and not is_useless(
        header.times, chain.clock, expired
    )


def _own_generations(header: Header) -> list[Generation]:
    absolute: Sequence[Stamp] = header.stamps
    if absolute and type(absolute[-1]) is Result:
        absolute, _ = unflatten(absolute)  # its other stamps count only if a result differs
    return [stamp for stamp in absolute if type(stamp) is Generation]
