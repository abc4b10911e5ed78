"""Inventory: the entries of this host, as `%cache_ls` lists them and `%cache_clear` drops them.

Only headers are read, never a value.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from html import escape
from typing import TYPE_CHECKING, Any

from memo.decorators import assembly, names
from memo.decorators.cached_function import CachedFunction, functions
from memo.engine.call import Function, reload_live_if_due
from memo.engine.explaining import list_headers, list_shared_headers
from memo.engine.invalidating import own_refs
from memo.errors import EntryError, OptionError, TierError, label, nearest_hint, public
from memo.keys.encoding import atoms
from memo.keys.values import value_encoding
from memo.metrics import formatting, rendering
from memo.metrics.snapshots import matches
from memo.records import seal
from memo.records.seal import Header
from memo.records.stamp_types import CallStamp, FileStamp, Generation, Stamp
from memo.runtime.blocking import BLOCKING, drive
from memo.runtime.clock import SECOND, Clock
from memo.runtime.events import MISS
from memo.runtime.named_tuple import NamedTuple
from memo.runtime.port import Port
from memo.runtime.reasons import EXPIRED, GENERATION_LOST, INVALIDATED, SOURCE_UNREACHABLE
from memo.settings.checks import TIERS
from memo.settings.options import Policy
from memo.stores.chain import Chain
from memo.stores.protocols import Listable, Listed, ServerTier, display_name
from memo.validity import check, dependencies, stamps
from memo.validity.check import age

if TYPE_CHECKING:
    import pandas as pd


class Item(NamedTuple):
    """An entry of this host.

    Attributes:
        header: everything known without loading its value.
        size: bytes of its record and its payload.
        tiers: names of the tiers that hold it now.
        state: `FRESH`, `STALE`, `EXPIRED`, `INVALIDATED`, or one of the words below.
        age: seconds since it was computed; None: unknown.
        left: seconds for which it stays fresh, infinity without expiry, 0 or less if it has
            expired; None: it is not valid, or that is unknown.
    """

    header: Header
    size: int
    tiers: tuple[str, ...] = ()
    state: str = ""
    age: float | None = None
    left: float | None = None


OUTDATED = "outdated"
"""The code of its function, or a dependency, has changed since."""
IN_DOUBT = "in doubt"
"""A result that it was built on may have changed (`cutoff`): the next call checks that first."""
UNKNOWN = "unknown"
"""No tier can be asked now, or a remote source cannot, and the entry must not answer without it."""


ORDERS: dict[str, Callable[[Item], float]] = {
    "newest": lambda item: item.header.times.finished,
    "oldest": lambda item: -item.header.times.finished,
    "size": lambda item: item.size,
    "cost": lambda item: item.header.times.cost,
}
"""Name of an order -> sort key, the largest first."""


class Selection(NamedTuple):
    """A selection of entries, and their order.

    Attributes:
        patterns: names of functions, as `memo.metrics.snapshots.matches` reads them; none: all.
        where: argument -> value; entries must have all of them.
        tag: a tag that they must have; None: any.
        tier: a tier that must hold them; None: any.
        by: one of `ORDERS`.
    """

    patterns: Sequence[str] = ()
    where: Mapping[str, Any] = {}
    tag: str | None = None
    tier: str | None = None
    by: str = "newest"

    @property
    def is_by_name(self) -> bool:
        """True if names alone determine which entries are selected, the newest first."""
        return not (self.where or self.tag or self.tier) and self.by == "newest"

    def matches_entry(self, header: Header) -> bool:
        """True if an entry matches, in whichever tier it is."""
        groups = {s.ref.group for s in header.stamps if type(s) is Generation}
        tagged = self.tag is None or stamps.group("t", self.tag) in groups
        return tagged and matches(header.function, *self.patterns) and self._has_arguments(header)

    def _has_arguments(self, header: Header) -> bool:
        given = json.loads(header.summary) if self.where else {}
        return self.where.keys() <= given.keys() and all(
            given[name][1] == atoms.short_digest(_encoding(header.function, name, value))
            for name, value in self.where.items()
        )


def _encoding(function_id: str, name: str, value: Any) -> bytes:
    """Return the encoding of an argument as its function makes it, such as of an annotated path."""
    known = next((one for one in functions() if one.function_id == function_id), None)
    if known is None:
        return value_encoding(value, name)
    return known._function.keyer.encode_argument(name, value)


def items(wanted: Selection, limit: int | None = None) -> tuple[list[Item], int]:
    """Return the selected entries, at most `limit` of them, and their total number.

    Raises:
        MemoError: a setting is wrong, a value has no key, or there is no such tier.
    """
    chain = assembly.default_chain()
    tiers = dict.fromkeys((*TIERS, *(tier.name for tier in chain.tiers)))
    if wanted.tier is not None and wanted.tier not in tiers:
        fix = f"the tiers are {', '.join(tiers)}{nearest_hint(wanted.tier, tiers)}"
        raise OptionError("tier", wanted.tier, fix)
    return drive(_items(BLOCKING, chain, wanted, limit))


def table(shown: Sequence[Item]) -> formatting.Table:
    """Return a table of entries, with the tiers that hold each."""
    listed = [(item.header, item.size) for item in shown]
    tiers = [", ".join(item.tiers) for item in shown]
    ages = [item.age for item in shown]
    left = [item.left for item in shown]
    return rendering.entries(listed, ages, left, tiers, list(map(_state_text, shown)))


def _state_text(item: Item) -> str:
    """Describe the state of an entry in words."""
    return f"{item.state}, raises" if item.header.flags & seal.RAISED else item.state


async def _items(
    port: Port,
    chain: Chain,
    wanted: Selection,
    limit: int | None,
    prefix: str | None = None,
    from_redis: Sequence[tuple[Header, int]] = (),
) -> tuple[list[Item], int]:
    whole = f"{chain.namespace}:" if prefix is None else prefix
    if limit is not None and wanted.is_by_name:
        return await _newest(port, chain, wanted, limit, whole)
    listed = await list_headers(port, chain, whole)
    here = {header.key for header, _ in listed}
    listed += [one for one in from_redis if one[0].key not in here]
    found = [Item(header, size) for header, size in listed if wanted.matches_entry(header)]
    found.sort(key=ORDERS[wanted.by], reverse=True)
    shown = found if wanted.tier else found[:limit]
    places = await _holding_tiers(port, chain, [item.header for item in shown])
    shown = [item._replace(tiers=at) for item, at in zip(shown, places, strict=True)]
    if wanted.tier:
        found = shown = [item for item in shown if wanted.tier in item.tiers]
    return await _with_states(port, chain, shown[:limit]), len(found)


async def _newest(
    port: Port, chain: Chain, wanted: Selection, limit: int, prefix: str
) -> tuple[list[Item], int]:
    """Return the newest entries of some functions, and their number, without reading the others."""
    found: dict[str, Item] = {}
    lists: list[tuple[Listable, dict[str, int]]] = []
    for tier in chain.listing:
        with suppress(TierError):
            heads = await tier.count_by_prefix(port, prefix)
            own = {
                head: count for head, count in heads.items() if _is_selected(chain, wanted, head)
            }
            lists.append((tier, own))
            among = [prefix] if len(own) == len(heads) else list(own)
            covers_most = len(own) == len(heads)
            for one in await tier.newest(port, among, limit, covers_most=covers_most):
                item = _item(chain, one)
                if item is None:
                    continue
                other = found.get(item.header.key)
                if other is None or item.size > other.size:  # memory may lack the payload
                    found[item.header.key] = item
    shown = sorted(found.values(), key=ORDERS["newest"], reverse=True)[:limit]
    places = await _holding_tiers(port, chain, [item.header for item in shown])
    shown = [item._replace(tiers=at) for item, at in zip(shown, places, strict=True)]
    return await _with_states(port, chain, shown), await _count(port, lists)


def _is_selected(chain: Chain, wanted: Selection, head: str) -> bool:
    """True if entries with this head are selected, and sealed with one of our secrets."""
    rest, _, secret = head[:-1].rpartition(":")
    function = rest.removeprefix(f"{chain.namespace}:{{").removesuffix("}")
    ours = {one.id.hex() for one in chain.secrets}
    return secret in ours and matches(function, *wanted.patterns)


def _item(chain: Chain, listed: Listed) -> Item | None:
    try:
        return Item(chain.header_of(listed.name, listed.record), listed.size)
    except EntryError:
        return None


async def _count(port: Port, lists: Sequence[tuple[Listable, dict[str, int]]]) -> int:
    """Return the number of entries in some tiers, counting each once."""
    filled = [(tier, own) for tier, own in lists if own]
    if len(filled) == 1:
        return sum(filled[0][1].values())
    names: set[str] = set()
    for tier, own in filled:
        for head in own:
            names.update(await tier.names(port, head))
    return len(names)


async def _with_states(port: Port, chain: Chain, shown: Sequence[Item]) -> list[Item]:
    """Add to some entries their states, and their ages by the clock that the states go by."""
    headers = [item.header for item in shown]
    ages = [age(header.times, chain.clock) for header in headers]
    judged = await _judge(port, chain, headers)
    return [
        item._replace(state=state, age=None if old is None else old / SECOND, left=left)
        for item, (state, left), old in zip(shown, judged, ages, strict=True)
    ]


class _Judged(NamedTuple):
    """The state of an entry, and how long it stays fresh; see `Item`."""

    state: str
    left: float | None = None


async def states(port: Port, chain: Chain, headers: Sequence[Header]) -> list[str]:
    """Return the state of some entries: what the next call of each would find; loads no value."""
    return [judged.state for judged in await _judge(port, chain, headers)]


async def _judge(port: Port, chain: Chain, headers: Sequence[Header]) -> list[_Judged]:
    refs = {s.ref: None for h in headers for s in h.stamps if type(s) is Generation}
    try:
        now = dict(zip(refs, await chain.authorities.states(port, list(refs)), strict=True))
    except TierError:
        return [_Judged(UNKNOWN)] * len(headers)
    whys = await _why_changed(port, headers)
    known = {function.function_id: function._function_in_mode() for function in functions()}
    for function in known.values():
        await reload_live_if_due(port, function)
    codes = {name: f.keyer.identity.digest() for name, f in known.items() if not f.keyer.method}
    found: list[_Judged] = []
    for header in headers:
        present = [now[stamp.ref] for stamp in header.stamps if type(stamp) is Generation]
        of_stamps = check.reasons_from(header.stamps, present, whys)
        reason = check.combine(header.stamps, of_stamps)
        if reason and not check.may_answer(reason):
            turned = reason in (INVALIDATED, GENERATION_LOST)
            found.append(_Judged(INVALIDATED if turned else OUTDATED))
        elif header.code != codes.get(header.function, header.code):
            found.append(_Judged(OUTDATED))
        else:
            found.append(_judge_age(header, reason, known.get(header.function), chain.clock))
    return found


def _judge_age(header: Header, reason: str, function: Function | None, clock: Clock) -> _Judged:
    """Judge an entry whose stamps hold, or whose reason passes `check.may_answer`."""
    times, raised = header.times, bool(header.flags & seal.RAISED)
    if function is None:
        verdict = check.final_verdict(check.judge_by_record(clock), times, reason, raised=raised)
        left = check.remaining(times, Policy(ttl=None), clock)
    else:
        verdict = check.final_verdict(function.judge, times, reason, raised=raised)
        left = function.remaining(times, raised=raised)
    if verdict.reason == SOURCE_UNREACHABLE and not verdict.renewable:
        return _Judged(UNKNOWN)
    seconds = math.inf if left is None else left / SECOND
    if verdict.renewable:
        return _Judged(IN_DOUBT, seconds)
    if verdict.reason == EXPIRED:  # perhaps before its ttl was over
        seconds = min(seconds, 0.0)
    return _Judged(EXPIRED if verdict.kind == MISS else verdict.kind, seconds)


async def _why_changed(port: Port, headers: Sequence[Header]) -> dict[Stamp, str]:
    """Return for each dependency of some entries why it does not hold, or `""`."""
    sources = list(
        {s: None for h in headers for s in h.stamps if isinstance(s, (FileStamp, CallStamp))}
    )
    return dict(zip(sources, await dependencies.check(port, sources), strict=True))


async def _holding_tiers(
    port: Port, chain: Chain, headers: Sequence[Header]
) -> list[tuple[str, ...]]:
    """Return the tiers that hold each of some entries; a tier that cannot be asked is left out."""
    names = [chain.name(header.function, header.key) for header in headers]
    found: list[tuple[str, ...]] = [()] * len(names)
    for tier in chain.tiers:
        if not isinstance(tier, (Listable, ServerTier)) or not names:
            continue
        try:
            answers = await tier.holds(port, names)
        except TierError:
            continue
        found = [(*at, tier.name) if held else at for at, held in zip(found, answers, strict=True)]
    return found


# --- memo.entries --------------------------------------------------------------------------------


async def _in_redis(port: Port, chain: Chain, prefix: str) -> tuple[list[tuple[Header, int]], str]:
    """Return header and size of a shared tier's entries, and a sentence about missing ones."""
    shared = chain.authorities.shared
    if shared is None:
        return [], ""
    name, without = display_name(shared.name), "entries that only it has are missing here"
    if not isinstance(shared, ServerTier):
        return [], f"{name} cannot be listed: {without}."
    try:
        found, whole = await list_shared_headers(port, chain, shared, prefix)
    except TierError:
        return [], f"{name} did not answer: {without}."
    return found, "" if whole else f"{name} was not searched completely: some {without}."


class Stored(NamedTuple):
    """An entry, as `memo.entries` lists it.  Times are in seconds, the size in bytes.

    Attributes:
        function: its name as tables show it.
        arguments: name -> short text.
        state: `"fresh"`, `"stale"`, `"expired"`, `"invalidated"`, `"outdated"` (its code or a
            dependency has changed), `"in doubt"` (a result that it was built on may have changed,
            and is asked for first) or `"unknown"` (a tier or a remote source cannot be asked now).
        age: since it was computed; None: unknown.
        ttl: that it was stored with; None: no expiry.
        size: size of its record and payload.
        cost: how long its computation took.
        tiers: names of the tiers that hold it.
        tags: the tags by which it can be invalidated.
        address: as `memo.invalidate(key=...)` takes it, with secrets masked.
        key: its key; `memo.invalidate(key=...)` takes it too.
    """

    function: str
    arguments: Mapping[str, str]
    state: str
    age: float | None
    ttl: float | None
    size: int
    cost: float
    tiers: tuple[str, ...]
    tags: tuple[str, ...]
    address: str
    key: str


class Entries(list[Stored]):
    """Entries in a list, newest first; a table in a notebook and in a terminal."""

    def __init__(self, found: Sequence[Item], missing: str = "") -> None:
        super().__init__(map(_as_record, found))
        self._items = found
        self.missing = missing

    def to_frame(self) -> pd.DataFrame:
        """Return a pandas DataFrame, one row for each entry.

        Raises:
            MissingExtraError: pandas is not installed.
        """
        return formatting.frame_of(self, Stored._fields)

    def __repr__(self) -> str:
        if not self:
            return f"No entries. {self.missing}".strip()
        shown = formatting.table_text(table(self._items))
        return f"{shown}\n\n{self.missing}" if self.missing else shown

    def _repr_html_(self) -> str:
        shown = formatting.table_html(table(self._items)) if self else "No entries. "
        return formatting.with_style(shown + escape(self.missing))


def _as_record(item: Item) -> Stored:
    header, size, tiers, state, old, _ = item
    groups = [ref.group for ref in own_refs(header)]
    return Stored(
        label(header.function),
        rendering.arguments(header),
        state,
        old,
        None if header.times.ttl < 0 else header.times.ttl / SECOND,
        size,
        header.times.cost / SECOND,
        tiers,
        tuple(group[2:] for group in groups if group.startswith("t:")),
        rendering.address(header),
        header.key,
    )


@public
def entries(
    function: CachedFunction[..., Any] | Callable[..., Any] | str | None = None,
    **arguments: Any,
) -> Entries:
    """List what is stored on this host, as records; no value is loaded.

    ::

        memo.entries(load, region="EU").to_frame()

    Args:
        function: a cached function, or any name that tables show; None: all of them.
        arguments: only entries with these arguments.

    Raises:
        OptionError: no function has the name, or several have; or it has no such argument.
    """
    here = {one.function_id: one for one in functions()}
    chain = assembly.default_chain()
    prefix = f"{chain.namespace}:"
    if function is not None:
        identity = drive(names.function_named(BLOCKING, "function", function, list(here)))
        prefix = chain.prefix(identity)
        known = here.get(identity)
        if known is not None:
            chain = known._function.chain()
            known._function.keyer.check_names("entries", arguments)
    wanted = Selection(where=arguments)
    from_redis, missing = drive(_in_redis(BLOCKING, chain, prefix))
    found, _ = drive(_items(BLOCKING, chain, wanted, None, prefix, from_redis))
    return Entries(found, missing)
