"""Explain: would a call hit, and if not, why; from recorded facts, without computing or loading.

The facts are the headers of entries (arguments' summaries, times, stamps), the notes of
invalidations, and the manifests of code versions.
"""

from __future__ import annotations

import difflib
import html
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from memo import seal, sources, stamps
from memo.chain import Answer, Chain
from memo.clock import SECOND
from memo.engine import Function
from memo.errors import EntryError, TierError
from memo.keys import Call
from memo.manifests import Manifests
from memo.policy import (
    ABSENT,
    DEPENDENCY_CHANGED,
    EXPIRED,
    FILE_CHANGED,
    GENERATION_LOST,
    INVALIDATED,
    MISS,
    age,
)
from memo.port import Port
from memo.seal import Header

CODE_CHANGED = "code changed"
ARGUMENTS = "other arguments"
NEVER = "never computed"
EVICTED = "evicted"
LOOKED_AT = 2000
"""Most entries of a function that are looked at for the nearest one."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why a call would be answered as it would.

    Attributes:
        call: the call's address.
        hit: whether it would be answered from the cache.
        reason: one of the words of `memo.policy` or of this module.
        facts: sentences for people.
        diff: lines of a unified diff, where code changed.
        untracked: what the function reads that is not part of its identity.
    """

    call: str
    hit: bool
    reason: str
    facts: tuple[str, ...] = ()
    diff: tuple[str, ...] = ()
    untracked: tuple[str, ...] = ()

    def __str__(self) -> str:
        head = f"{self.call}: {'hit' if self.hit else 'miss'} ({self.reason})"
        lines = [head, *(f"  {fact}" for fact in self.facts)]
        lines += [f"  {line}" for line in self.diff]
        lines += [f"  not tracked: {one}" for one in self.untracked]
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        escape = html.escape
        colour = "#2e7d32" if self.hit else "#c62828"
        facts = "".join(f"<li>{escape(fact)}</li>" for fact in self.facts)
        lost = "".join(f"<li>not tracked: {escape(one)}</li>" for one in self.untracked)
        diff = "".join(_coloured(line) for line in self.diff)
        return (
            f"<div><b>{escape(self.call)}</b>: "
            f'<b style="color:{colour}">{"hit" if self.hit else "miss"}</b> '
            f"({escape(self.reason)})<ul>{facts}{lost}</ul>"
            + (f"<pre>{diff}</pre>" if diff else "")
            + "</div>"
        )


def _coloured(line: str) -> str:
    colour = {"+": "#2e7d32", "-": "#c62828"}.get(line[:1])
    text = html.escape(line)
    return f'<span style="color:{colour}">{text}</span>\n' if colour else f"{text}\n"


async def explain(
    port: Port,
    function: Function,
    manifests: Manifests,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Explanation:
    """Would this call be answered from the cache, and why or why not?"""
    chain = function.chain()
    call = function.keyer.call(function.code(args), args, kwargs)
    found = await chain.lookup(port, function.id, call.text, function.judge)
    untracked = tuple(function.identity.untracked())
    if found.verdict.kind != MISS and found.entry is not None:
        reason = found.verdict.kind
        return Explanation(call.address, True, reason, _hit(found, chain), (), untracked)
    reason = found.verdict.reason
    stored = await _stored(port, chain, function.id)
    own = next((header for header in stored if header.key == call.text), None)
    facts: Sequence[str] = ()
    diff: Sequence[str] = ()
    if reason in (INVALIDATED, GENERATION_LOST, FILE_CHANGED, DEPENDENCY_CHANGED) and own:
        facts = await _untrue(port, chain, own)
    elif reason == EXPIRED and own:
        facts = _expired(function, chain, own)
    elif reason == ABSENT:
        reason, facts, diff = _absent(function, chain, manifests, call, stored)
    return Explanation(call.address, False, reason, tuple(facts), tuple(diff), untracked)


# --- hits -----------------------------------------------------------------------------------------


def _hit(found: Answer, chain: Chain) -> tuple[str, ...]:
    assert found.entry is not None
    header = found.entry.header
    times = header.times
    old = age(times, chain.clock) or 0
    left = "no expiry" if times.ttl < 0 else f"fresh for {_span(times.ttl - old)} more"
    facts = [
        f"in {found.tier}, computed {_span(old)} ago by {header.writer} in {_span(times.cost)}; "
        + left,
    ]
    if found.verdict.reason:
        facts.append(f"the next call answers at once and refreshes it ({found.verdict.reason})")
    facts += [_source(stamp) for stamp in header.stamps if not isinstance(stamp, _GENERATION)]
    return tuple(facts)


_GENERATION = stamps.Generation


def _source(stamp: stamps.Stamp) -> str:
    if isinstance(stamp, stamps.File):
        return f"depends on {stamp.path}" + (" (by content)" if stamp.by_content else "")
    assert isinstance(stamp, stamps.Call)
    return f"depends on the callable {stamp.name}"


# --- misses ---------------------------------------------------------------------------------------


async def _stored(port: Port, chain: Chain, function: str) -> list[Header]:
    """The headers of a function's entries in the tiers of this host that can list them."""
    headers: dict[str, Header] = {}
    for tier in chain.tiers:
        listing = getattr(tier, "entries", None)
        if listing is None:
            continue
        try:
            async for listed in listing(port, chain.prefix(function)):
                key = listed.name.rpartition(":")[2]
                try:
                    entry = seal.unpack(listed.record, chain.secrets, chain.namespace, key)
                except EntryError:
                    continue
                headers.setdefault(key, entry.header)
                if len(headers) >= LOOKED_AT:
                    break
        except TierError:
            continue
    return list(headers.values())


async def _untrue(port: Port, chain: Chain, header: Header) -> list[str]:
    facts = []
    generations = [s for s in header.stamps if isinstance(s, stamps.Generation)]
    try:
        now = await chain.states(port, [stamp.ref for stamp in generations])
    except TierError:
        now = []
    for stamp, state in zip(generations, now, strict=False):
        if state.text != stamp.state.text:
            facts += await _turned(port, chain, stamp, state)
    for stamp in header.stamps:
        if not isinstance(stamp, stamps.Generation) and await sources.check(port, stamp):
            facts.append(f"{_source(stamp)}, which has changed")
    return facts


async def _turned(
    port: Port, chain: Chain, stamp: stamps.Generation, state: stamps.State
) -> list[str]:
    if not state.text:
        return [f"the generation of {_group(stamp.ref.group)} is gone (flushed or evicted)"]
    notes = await chain.notes(port, stamp.ref)
    facts = []
    for field, text in notes:
        told = _note(text)
        if told:
            selected = "" if field == stamps.ALL else f" where {field.partition('=')[0]}"
            facts.append(f"{_group(stamp.ref.group)} invalidated{selected} {told}")
    return facts or [f"{_group(stamp.ref.group)} was invalidated"]


def _group(group: str) -> str:
    kind, _, name = group.partition(":")
    words = {"n": "the namespace", "f": "function", "p": "prefix", "t": "tag"}
    return f"{words.get(kind, kind)} {name}".rstrip()


def _note(text: str) -> str:
    try:
        facts = json.loads(text)
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(facts["at"]))
    except (ValueError, KeyError, TypeError):
        return ""
    reason = f": {facts['reason']}" if facts.get("reason") else ""
    return f"at {at} by {facts.get('by', '?')}{reason}"


def _expired(function: Function, chain: Chain, header: Header) -> list[str]:
    old = age(header.times, chain.clock)
    if old is None:
        return ["its age cannot be told: it comes from the future"]
    live = function.live_ttl()
    ttl = header.times.ttl if live is None else int(live * SECOND)
    return [f"computed {_span(old)} ago, with a ttl of {_span(ttl)}"]


def _absent(
    function: Function, chain: Chain, manifests: Manifests, call: Call, stored: list[Header]
) -> tuple[str, list[str], list[str]]:
    if chain.has_answered(call.text):
        return EVICTED, ["this process has stored or used it; it was evicted or cleared since"], []
    wanted = json.loads(call.summary)
    same = [h for h in stored if _digests(json.loads(h.summary)) == _digests(wanted)]
    code = function.identity.digest()
    if same and all(header.code != code for header in same):
        latest = max(same, key=lambda header: header.times.finished)
        return CODE_CHANGED, *_code(function, manifests, latest)
    others = [header for header in stored if header.code == code] or stored
    if not others:
        return NEVER, ["no entry of this function is on this host"], []
    nearest = min(others, key=lambda header: len(_differing(json.loads(header.summary), wanted)))
    facts = [
        f"{name} is {after}; the nearest entry has {before}"
        for name, before, after in _differing(json.loads(nearest.summary), wanted)
    ]
    facts.append(f"the nearest of {len(stored)} entries: {nearest.address}")
    return ARGUMENTS, facts, []


def _digests(summary: Mapping[str, Any]) -> dict[str, Any]:
    return {name: pair[1] for name, pair in summary.items()}


def _differing(
    before: Mapping[str, Any], after: Mapping[str, Any]
) -> list[tuple[str, str, str]]:
    nothing = ("nothing", "")
    return [
        (name, str(before.get(name, nothing)[0]), str(after.get(name, nothing)[0]))
        for name in dict.fromkeys((*before, *after))
        if before.get(name, nothing)[1] != after.get(name, nothing)[1]
    ]


def _code(
    function: Function, manifests: Manifests, header: Header
) -> tuple[list[str], list[str]]:
    before = manifests.load(header.code)
    if before is None:
        return ["the code changed; its earlier source is not known on this host"], []
    after = function.identity.parts()
    facts: list[str] = []
    diff: list[str] = []
    for name in sorted({*before, *after}):
        old, new = before.get(name), after.get(name)
        if old == new:
            continue
        if old is None or new is None:
            facts.append(f"{name} {'is new' if old is None else 'is gone'}")
        elif "\n" in old + new:
            facts.append(f"code of {name} changed")
            diff += _diff(name, old, new)
        else:
            facts.append(f"{name} changed")
            diff += _diff(name, old, new)
    return facts, diff


def _diff(name: str, old: str, new: str) -> Iterable[str]:
    lines = difflib.unified_diff(old.splitlines(), new.splitlines(), name, name, lineterm="", n=1)
    return list(lines)


def _span(nanoseconds: float) -> str:
    seconds = nanoseconds / SECOND
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1), ("ms", 1e-3)):
        if abs(seconds) >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"
