"""Explain why a call would hit or miss, from recorded facts; nothing is computed or loaded.

The facts are the headers of entries (summaries of arguments, times, stamps), the notes of
invalidations, and the manifests of code versions.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from html import escape
from typing import Any

from memo.engine.answering import rekey
from memo.engine.call import Function, Job, make_call, reload_live_if_due
from memo.errors import EntryError, TierError, label
from memo.keys.call_keys import Call
from memo.keys.fingerprint.source_history import Manifests
from memo.keys.summaries import BUILT_ON, MASK, RESOLVED, RESULT_SHAPE, SPECIAL_PREFIX, built_on
from memo.metrics import formatting, rendering
from memo.records import codec, seal
from memo.records.seal import Entry, Header
from memo.records.stamp_types import ADDRESS, CallStamp, FileStamp, Generation, Ref, Stamp, State
from memo.runtime.clock import SECOND
from memo.runtime.events import MISS, STALE
from memo.runtime.named_tuple import NamedTuple
from memo.runtime.port import Port
from memo.runtime.reasons import (
    ABSENT,
    CLOCK,
    DEPENDENCY_CHANGED,
    EXPIRED,
    FILE_CHANGED,
    GENERATION_LOST,
    INVALIDATED,
    OLDER,
    PAYLOAD_MISSING,
    SOURCE_UNREACHABLE,
    UNAUTHENTIC,
    UNREACHABLE,
    UNREADABLE,
)
from memo.stores.chain import Answer, Chain
from memo.stores.protocols import ServerTier
from memo.validity import dependencies, generations, results, stamps
from memo.validity.check import (
    BORN_STALE,
    Verdict,
    age,
    exceeds_max_age,
    judge_by_record,
    why_changed,
)

CODE_CHANGED = "code changed"
OTHER_ARGUMENTS = "other arguments"
EVICTED = "evicted"
_FAULT_FACTS = {
    UNREADABLE: "the entry is damaged, or of another format; the next call replaces it",
    UNAUTHENTIC: "the entry is not sealed with a secret of this process, so it is never loaded",
    PAYLOAD_MISSING: "the entry's record is here, but no tier has its payload any more",
    OLDER: "a later computation has already answered in this process",
    CLOCK: "the entry is from the future: the clock of this host, or of its writer's, is wrong",
    UNREACHABLE: "no tier that knows what is valid can be reached",
}
"""Reasons that have nothing to do with the call, each as a fact."""
_INVALID = (INVALIDATED, GENERATION_LOST, FILE_CHANGED, DEPENDENCY_CHANGED, SOURCE_UNREACHABLE)
MAX_SEARCHED_ENTRIES = 2000
"""Maximum number of entries of a function that are searched for the nearest one."""
SEARCH_SECONDS = 0.25
"""Seconds for which Redis is searched for entries that this host does not have."""
MAX_REDIS_ENTRIES = 10_000
"""Maximum number of entries of Redis that are read."""


class Step(NamedTuple):
    """A cached call in a plan.

    Attributes:
        call: its address, without secret arguments.
        function: the id of its function.
        does: `"hit"`, `"hit, then refresh"`, `"compute"`, or `"revalidate"`: the results that it
            was built on are got again first, and it is computed only if one of them differs.
        reason: why it is not a hit.
        seconds: how long it took last time, including the calls inside it; None if unknown.
        depth: number of calls around it.
    """

    call: str
    function: str
    does: str
    reason: str
    seconds: float | None
    depth: int

    def __str__(self) -> str:
        why = f" ({self.reason})" if self.reason else ""
        took = (
            "" if self.seconds is None else f", took {formatting.duration(self.seconds)} last time"
        )
        return f"{'  ' * self.depth}{self.does} {self.call}{why}{took}"


@dataclass(frozen=True, slots=True)
class Explanation:
    """An explanation of how a call would be answered.

    Attributes:
        call: the call's address, without secret arguments.
        hit: the call would be answered from the cache.
        reason: one of the reasons in `runtime.reasons` or in this module.
        facts: sentences for the reader.
        diff: lines of a unified diff, if code has changed.
        untracked: inputs that the function reads but that are not part of its code version.
        steps: the plan, if one was requested: this call, and the cached calls beneath it that would
            be computed, revalidated or hit.
    """

    call: str
    hit: bool
    reason: str
    facts: tuple[str, ...] = ()
    diff: tuple[str, ...] = ()
    untracked: tuple[str, ...] = ()
    steps: tuple[Step, ...] = ()

    def __str__(self) -> str:
        head = f"{self.call}: {'hit' if self.hit else 'miss'} ({self.reason})"
        lines = [head, *(f"  {fact}" for fact in self.facts)]
        lines += [f"  {line}" for line in self.diff]
        lines += [f"  not tracked: {one}" for one in self.untracked]
        lines += ["  plan:", *(f"    {step}" for step in self.steps)] if self.steps else []
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        facts = "".join(f"<li>{escape(fact)}</li>" for fact in self.facts)
        lost = "".join(
            f'<li class="memo-dim">not tracked: {escape(one)}</li>' for one in self.untracked
        )
        diff = "".join(map(_diff_line_html, self.diff))
        colour = rendering.PLOT_COLOURS["hits" if self.hit else "misses"]
        return formatting.with_style(
            f"<p><b>{escape(self.call)}</b>: "
            f'<b style="color:{colour}">{"hit" if self.hit else "miss"}</b> '
            f"({escape(self.reason)})</p>"
            + (f"<ul>{facts}{lost}</ul>" if facts or lost else "")
            + (f"<pre>{diff}</pre>" if diff else "")
            + (f"<pre>{escape(chr(10).join(map(str, self.steps)))}</pre>" if self.steps else "")
        )


def _diff_line_html(line: str) -> str:
    colour = {"+": rendering.PLOT_COLOURS["hits"], "-": rendering.PLOT_COLOURS["misses"]}.get(
        line[:1]
    )
    text = escape(line)
    return f'<span style="color:{colour}">{text}</span>\n' if colour else f"{text}\n"


async def explain(
    port: Port,
    function: Function,
    manifests: Manifests,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Explanation:
    """Explain whether this call would be answered from the cache, and why."""
    chain = function.chain()
    await reload_live_if_due(port, function)
    call = await make_call(port, function, args, kwargs)
    job = Job(function, chain, call, args, kwargs)
    call = (await rekey(port, job) or job).call
    code = function.keyer.code(args)
    found = await chain.lookup(port, function.id, call.text, function.judge)
    owner = function.keyer.owner(args)
    untracked = (*call.left_out, *function.keyer.identity.untracked(owner))
    if found.verdict.kind != MISS and found.entry is not None:
        reason = found.verdict.kind
        facts = _hit_facts(function, found, chain)
        if _is_expired_early(function, found.verdict, found.entry):
            facts += await _invalid_facts(port, chain, found.entry.header)
        return Explanation(call.shown, True, reason, tuple(facts), (), untracked)
    reason = found.verdict.reason
    stored = await headers_of(port, chain, function.id)
    own = next((header for header in stored if header.key == call.text), None)
    facts = []
    diff: Sequence[str] = ()
    if reason in _INVALID and own:
        facts = await _invalid_facts(port, chain, own)
        if found.verdict.renewable:
            facts += await _unconfirmed_facts(port, chain, own)
    elif reason == EXPIRED and own:
        facts = await _invalid_facts(port, chain, own) or _expired_facts(function, chain, own)
    elif reason in _FAULT_FACTS:
        facts = [_FAULT_FACTS[reason]]
    elif reason == ABSENT and own and _is_past_windows(function, own):  # tiers hide expired entries
        reason, facts = EXPIRED, _expired_facts(function, chain, own)
    elif reason == ABSENT:
        wanted = _MissingCall(call, code, function.keyer.identity.parts(owner))
        reason, facts, diff = _not_cached_facts(chain, manifests, wanted, stored)
    return Explanation(call.shown, False, reason, tuple(facts), tuple(diff), untracked)


# --- hits -----------------------------------------------------------------------------------------


def _hit_facts(function: Function, found: Answer, chain: Chain) -> list[str]:
    assert found.entry is not None
    header = found.entry.header
    times = header.times
    old = _span(age(times, chain.clock) or 0)
    left = _remaining_text(function, found.verdict, found.entry)
    facts = [
        f"in {found.tier}, computed {old} ago by {header.writer} in {_span(times.cost)}; {left}",
        *_built_on_facts(chain, header),
    ]
    if found.verdict.reason:
        facts.append(f"the next call answers at once and refreshes it ({found.verdict.reason})")
    if header.flags & seal.RAISED:
        facts.append("the function raised: the call raises that again (cache_errors)")
    if header.flags & seal.COMPRESSED:
        whole = formatting.size(codec.zstd().decompressed_size(found.entry.stream))
        facts.append(f"compressed with zstd: {formatting.size(found.entry.size)} for {whole}")
    facts += [_source_text(stamp) for stamp in header.stamps if isinstance(stamp, _SOURCE_STAMPS)]
    return facts


def _remaining_text(function: Function, verdict: Verdict, entry: Entry) -> str:
    """Describe for how long an entry that answers is still fresh."""
    if _is_expired_early(function, verdict, entry):
        return "expired"
    left = function.remaining(entry.times, raised=bool(entry.flags & seal.RAISED))
    if left is None:
        return "no expiry"
    return f"fresh for {_span(left)} more" if left > 0 else f"expired {_span(-left)} ago"


def _is_expired_early(function: Function, verdict: Verdict, entry: Entry) -> bool:
    """True if an entry that answers was expired, by `memo.expire`, before its ttl was over."""
    left = function.remaining(entry.times, raised=bool(entry.flags & seal.RAISED))
    return verdict.reason == EXPIRED and (left is None or left > 0)


_SOURCE_STAMPS = (FileStamp, CallStamp)
"""Stamps of things outside the cache."""


def _source_text(stamp: Stamp) -> str:
    if isinstance(stamp, FileStamp):
        return f"depends on {stamp.path}" + (" (by content)" if stamp.by_content else "")
    assert isinstance(stamp, CallStamp)
    return f"depends on the callable {stamp.name}"


# --- misses ---------------------------------------------------------------------------------------


async def headers_of(port: Port, chain: Chain, function: str) -> list[Header]:
    """Return the headers of a function's entries in the tiers of this host."""
    found = await list_headers(port, chain, chain.prefix(function), MAX_SEARCHED_ENTRIES)
    return [header for header, _ in found]


async def list_headers(
    port: Port, chain: Chain, prefix: str, limit: int | None = None
) -> list[tuple[Header, int]]:
    """List header and size of each entry of this host that a secret of ours authenticates.

    Args:
        prefix: list only entries whose names begin with it.
        limit: stop after this many.
    """
    return await port.offload(_list_headers, chain, prefix, limit)


def _list_headers(chain: Chain, prefix: str, limit: int | None) -> list[tuple[Header, int]]:
    found: dict[str, tuple[Header, int]] = {}
    for tier in chain.listing:
        with suppress(TierError):
            for listed in tier.entries(prefix):
                header = _parsed_header(chain, listed.name, listed.record)
                if header is not None and listed.size > found.get(header.key, (None, -1))[1]:
                    found[header.key] = (header, listed.size)  # memory may lack the payload
                if limit is not None and len(found) >= limit:
                    return list(found.values())
    return list(found.values())


async def list_shared_headers(
    port: Port, chain: Chain, server: ServerTier, prefix: str
) -> tuple[list[tuple[Header, int]], bool]:
    """List header and size of a shared tier's entries, and whether those are all of them.

    Raises:
        TierError: the tier failed.
    """
    until = time.monotonic() + SEARCH_SECONDS
    listed, whole = await server.search(port, prefix, until, MAX_REDIS_ENTRIES)
    found: list[tuple[Header, int]] = []
    for name, record in listed:
        header = _parsed_header(chain, name, record)
        if header is not None:
            found.append((header, len(record) + seal.payload_size(header.buffers)))
    return found, whole


def _parsed_header(chain: Chain, name: str, record: bytes) -> Header | None:
    try:
        return chain.header_of(name, record)
    except EntryError:
        return None


async def _invalid_facts(port: Port, chain: Chain, header: Header) -> list[str]:
    facts = []
    generations = [s for s in header.stamps if isinstance(s, Generation)]
    try:
        now = await chain.authorities.states(port, [stamp.ref for stamp in generations])
    except TierError:
        now = []
    for stamp, state in zip(generations, now, strict=False):
        if why_changed([stamp.state.text], [state.text]):
            causes = await _invalidation_facts(port, chain, stamp, state)
            path = await _used_through(port, chain, header, stamp)
            facts += [f"{one}{path}" for one in causes]
    sources = [stamp for stamp in header.stamps if isinstance(stamp, _SOURCE_STAMPS)]
    for source, why in zip(sources, await dependencies.check(port, sources), strict=True):
        if why == SOURCE_UNREACHABLE:
            fix = "with stale_if_error=... the entry would answer in the meantime"
            facts.append(f"{_source_text(source)}, which cannot be reached; {fix}")
        elif why:
            facts.append(f"{_source_text(source)}, which has changed")
    return facts


async def _used_through(port: Port, chain: Chain, header: Header, stamp: Generation) -> str:
    """Name the functions through which an entry uses a call that was invalidated; `""` if none."""
    groups = [s.ref.group for s in header.stamps if isinstance(s, Generation)]
    called = [group[2:] for group in dict.fromkeys(groups) if group.startswith("f:")]
    if stamp.ref.group[2:] in (*called[:1], *(called[1:2] if len(called) == 2 else ())):
        return ""
    through = []
    for function in called[1:]:
        if function == stamp.ref.group[2:]:
            continue
        used = await headers_of(port, chain, function)
        if any(s.ref == stamp.ref for h in used for s in h.stamps if isinstance(s, Generation)):
            through.append(label(function))
    return f"; used through {' and '.join(through)}" if through else ""


async def _unconfirmed_facts(port: Port, chain: Chain, header: Header) -> list[str]:
    """Name the results that an entry was built on and that the next call gets again first."""
    _, used_results = results.unflatten(header.stamps)
    whys = await chain.authorities.why_changed(port, used_results)
    names = [label(one.result.function) for one, why in zip(used_results, whys, strict=True) if why]
    many = formatting.quantity(len(names), "result")
    listed = _counted_names(names)
    return [
        (
            f"the next call first checks {many} that it was built on ({listed}); if equal, "
            "it stays valid"
        )
    ]


def _counted_names(names: Sequence[str]) -> str:
    each = {name: names.count(name) for name in dict.fromkeys(names)}
    return ", ".join(name if count == 1 else f"{count} of {name}" for name, count in each.items())


async def _invalidation_facts(
    port: Port, chain: Chain, stamp: Generation, state: State
) -> list[str]:
    """Describe the invalidations since a stamp was taken, with their times, authors and reasons."""
    if not state.text:
        return [f"the generation of {_group_text(stamp.ref.group)} is gone (flushed or evicted)"]
    kept = await chain.authorities.notes(port, stamp.ref)
    notes = [(field, _parsed_note(text)) for field, text in kept]
    noted = [(field, note) for field, note in notes if note]
    later = generations.changed_fields(stamp.state, state)
    since = [(field, note) for field, note in noted if field in later]
    facts = [
        f"{_group_text(stamp.ref.group)} {_selection_text(field)} {_note_text(note)}"
        for field, note in since or noted[-1:]
    ]
    return facts or [f"{_group_text(stamp.ref.group)} was invalidated"]


def _selection_text(field: str) -> str:
    """Describe which entries of a group an invalidation selected."""
    if field == stamps.ALL:
        return "invalidated"
    names = stamps.names_of(field)
    done = "expired" if stamps.SOFT in names else "invalidated"
    names = [name for name in names if name != stamps.SOFT]
    if not names:
        return done
    listed = ",".join(names)
    return f"{done} at this address" if listed == ADDRESS else f"{done} for this {listed}"


def _group_text(group: str) -> str:
    kind, _, name = group.partition(":")
    words = {"n": "the namespace", "f": "function", "p": "prefix", "t": "tag"}
    return f"{words.get(kind, kind)} {label(name)}".rstrip()


def _parsed_note(text: str) -> dict[str, Any]:
    """Parse a note written by `memo.stores.authorities.make_note`; `{}` if it is malformed."""
    try:
        facts = json.loads(text)
        return {**facts, "at": float(facts["at"])}
    except (ValueError, KeyError, TypeError):
        return {}


def _note_text(note: Mapping[str, Any]) -> str:
    at = formatting.date_and_time(note["at"])
    reason = f": {note['reason']}" if note.get("reason") else ""
    return f"at {at} by {note.get('by', '?')}{reason}"


def _is_past_windows(function: Function, header: Header) -> bool:
    """True if an entry is past its ttl and its stale windows."""
    verdict = function.judge(header.times, None, bool(header.flags & seal.RAISED))
    return verdict.kind == MISS and verdict.reason == EXPIRED


def _expired_facts(function: Function, chain: Chain, header: Header) -> list[str]:
    old = age(header.times, chain.clock)
    if old is None:
        return ["its age is unknown: it is from the future"]
    limit = function.policy.max_age
    if limit is not None and exceeds_max_age(old, function.policy):
        return [f"computed {_span(old)} ago, and max_age is {_span(limit * SECOND)}"]
    ttl = function.ttl_in_force(header.times, raised=bool(header.flags & seal.RAISED))
    if ttl is None:
        return [f"computed {_span(old)} ago, no expiry"]
    if ttl == BORN_STALE:
        return [
            *_built_on_facts(chain, header),
            f"so it was already stale when it was computed, {_span(old)} ago",
        ]
    return [
        f"expired {_span(max(0, old - ttl))} ago: computed {_span(old)} ago, ttl {_span(ttl)}",
        *_built_on_facts(chain, header),
    ]


def _built_on_facts(chain: Chain, header: Header) -> list[str]:
    """Name the result that limits an entry's lifetime, and the results between the two."""
    found = built_on(header.summary)
    if found is None:
        return []
    path, until = found
    left = until - chain.clock.wall_ns()
    when = f"expired {_span(-left)} ago" if left <= 0 else f"fresh for {_span(left)} more"
    return [f"built on {path}, {when}"]


class _MissingCall(NamedTuple):
    """A call without an entry, with its code version and the parts of that."""

    call: Call
    code: str
    parts: Mapping[str, str]


def _not_cached_facts(
    chain: Chain, manifests: Manifests, missing: _MissingCall, stored: list[Header]
) -> tuple[str, list[str], list[str]]:
    call, code, _ = missing
    if chain.latest_answers.has(call.text):
        return (
            EVICTED,
            ["this process has stored or used it; it was evicted or cleared since"],
            [],
        )
    wanted = json.loads(call.summary)
    same = [
        h for h in stored if _argument_digests(json.loads(h.summary)) == _argument_digests(wanted)
    ]
    if same and all(header.code != code for header in same):
        latest = max(same, key=lambda header: header.times.finished)
        return CODE_CHANGED, *_code_facts(manifests, missing, latest)
    others = [header for header in stored if header.code == code] or stored
    if not others:
        return ABSENT, ["no entry of this function is on this host"], []
    nearest = min(others, key=lambda header: len(_differences(json.loads(header.summary), wanted)))
    facts = [
        _difference_text(*found) for found in _differences(json.loads(nearest.summary), wanted)
    ]
    if not facts:  # the summaries are the same
        facts.append(_hidden_difference_text(call, code, nearest))
    many = f"the nearest of {len(stored)} entries" if len(stored) > 1 else "the only entry"
    facts.append(f"{many}: {rendering.address(nearest)}{_arguments_text(nearest)}")
    return OTHER_ARGUMENTS, facts, []


def _arguments_text(header: Header) -> str:
    """List an entry's arguments if its address has only the digest of one, such as a tuple."""
    if not re.search(r":[0-9a-f]{16}(:|$)", header.address):
        return ""
    described = json.loads(header.summary).items()
    texts = [f"{name}={pair[0]}" for name, pair in described if not name.startswith(SPECIAL_PREFIX)]
    return f", which is {', '.join(texts)}" if texts else ""


def _hidden_difference_text(call: Call, code: str, nearest: Header) -> str:
    """Explain why an entry with equal argument summaries has another key."""
    if nearest.code != code:
        return "its arguments are the same; the code or something that it reads has changed"
    if call.depends_on_order:
        return "its arguments are the same, in another order of its keyword arguments"
    return "its arguments are the same; the entry was stored with another choice of replay"


def _difference_text(name: str, before: str, after: str) -> str:
    """Describe how an argument differs from that of the nearest entry, by their summaries."""
    what = "the result of key_resolver" if name == RESOLVED else name.removeprefix(SPECIAL_PREFIX)
    if before == after == MASK:
        return f"{what} is not that of the nearest entry"
    if before == after:  # its value is too big for the summary
        return f"{what} is another {after} than that of the nearest entry"
    return f"{what} is {after}; the nearest entry has {before}"


def _argument_digests(summary: Mapping[str, Any]) -> dict[str, Any]:
    return {name: pair[1] for name, pair in summary.items() if name not in (RESULT_SHAPE, BUILT_ON)}


def _differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    nothing = ("nothing", "")
    return [
        (name, str(before.get(name, nothing)[0]), str(after.get(name, nothing)[0]))
        for name in dict.fromkeys((*before, *after))
        if name not in (RESULT_SHAPE, BUILT_ON)
        and before.get(name, nothing)[1] != after.get(name, nothing)[1]
    ]


def _code_facts(
    manifests: Manifests, missing: _MissingCall, header: Header
) -> tuple[list[str], list[str]]:
    before = manifests.load(header.code)
    if before is None:
        return ["the code has changed; its earlier source is not known on this host"], []
    facts: list[str] = []
    diff: list[str] = []
    for name, old, new in _changes(before, missing.parts):
        facts.append(_change_text(name, old, new))
        if old is not None and new is not None:
            diff += _diff(name, old, new)
    return facts, diff


def _changes(
    before: Mapping[str, str], after: Mapping[str, str]
) -> list[tuple[str, str | None, str | None]]:
    """Return the parts of a code version that differ from those of an earlier one."""
    names = sorted({*before, *after})
    pairs = ((name, before.get(name), after.get(name)) for name in names)
    return [(name, old, new) for name, old, new in pairs if old != new]


def _change_text(name: str, old: str | None, new: str | None) -> str:
    """Describe one change: `code of clean() changed`, `global THRESHOLD changed`."""
    kind, _, rest = name.partition(":")
    if kind in _VALUE_KINDS:
        what = f"{kind} {rest}"
    elif name in _PART_TEXTS:
        what = _PART_TEXTS[name]
    else:
        what = f"code of {label(name).rpartition(':')[2]}()"
    return f"{what} {'is new' if old is None else 'is gone' if new is None else 'changed'}"


_VALUE_KINDS = frozenset({"global", "closure", "default", "attribute", "package"})
"""Kinds of parts of a code version that are values, not code."""
_PART_TEXTS = {
    "cell": "code of the cell",
    "outputs": "the choice of outputs",
    "python": "the version of Python",
    "version": "the version given by hand",
}


async def changed_code(
    port: Port, function: Function, manifests: Manifests, keys: Sequence[str]
) -> dict[str, str]:
    """Describe the code changes because of which calls were computed, by key.

    The entry of each key is compared with the entry before it that has the same arguments and
    another code version.
    """
    chain = function.chain()
    stored = await headers_of(port, chain, function.id)
    own = {header.key: header for header in stored}
    found = {key: _code_change(manifests, own[key], stored) for key in keys if key in own}
    return {key: words for key, words in found.items() if words}


def _code_change(manifests: Manifests, own: Header, stored: Sequence[Header]) -> str:
    """Describe what changed between an entry and the one before it; `""` if nothing did."""
    earlier = [
        header
        for header in stored
        if header.code != own.code and header.times.started < own.times.started
    ]
    wanted = _argument_digests(json.loads(own.summary)) if earlier else {}
    same = [header for header in earlier if _argument_digests(json.loads(header.summary)) == wanted]
    if not same:
        return ""
    before = manifests.load(max(same, key=lambda header: header.times.started).code)
    after = manifests.load(own.code)
    if before is None or after is None:
        return CODE_CHANGED
    changes = [_change_text(*change) for change in _changes(before, after)]
    return changes[0] + (f" (and {len(changes) - 1} more)" if len(changes) > 1 else "")


def _diff(name: str, old: str, new: str) -> Iterable[str]:
    import difflib

    lines = difflib.unified_diff(old.splitlines(), new.splitlines(), name, name, lineterm="", n=1)
    return list(lines)


def _span(nanoseconds: float) -> str:
    return formatting.duration(nanoseconds / SECOND)


# --- plans ----------------------------------------------------------------------------------------


PLANNED_HIT, PLANNED_REFRESH, PLANNED_REVALIDATION, PLANNED_COMPUTATION = (
    "hit",
    "hit, then refresh",
    "revalidate",
    "compute",
)
MAX_PLAN_STEPS = 1000
"""Maximum number of steps in a plan."""


class Planner:
    """Builds the plan of a call.

    Args:
        port: runs the lookups.
        chain: the chain in which entries are looked up.
        functions: the functions of this process, by id.
    """

    def __init__(self, port: Port, chain: Chain, functions: Mapping[str, Function]) -> None:
        self._port = port
        self._chain = chain
        self._functions = functions
        self._listed: dict[str, list[Header]] = {}
        self._seen: set[str] = set()
        self.steps: list[Step] = []

    async def add(self, function: str, key: str, shown: str = "", depth: int = 0) -> None:
        """Add the steps of a call, and of the calls beneath it.

        Args:
            shown: its address for display, if known.
        """
        if key in self._seen or len(self.steps) >= MAX_PLAN_STEPS:
            return
        self._seen.add(key)
        known = self._functions.get(function)
        judge = judge_by_record(self._chain.clock) if known is None else known.judge
        found = await self._chain.lookup(self._port, function, key, judge)
        last = await self._stored_header(function, key)
        does, reason = _step_kind(found), found.verdict.reason
        if last is not None and _has_other_code(known, last):
            now = [
                one
                for one in await self._with_equal_arguments(last)
                if not _has_other_code(known, one)
            ]
            if now:
                await self.add(function, now[0].key, shown, depth)
                return
            does, reason = PLANNED_COMPUTATION, CODE_CHANGED
        self.steps.append(
            Step(
                shown or (label(function) if last is None else rendering.address(last)),
                function,
                does,
                "" if does == PLANNED_HIT else reason,
                None if last is None else last.times.cost / SECOND,
                depth,
            )
        )
        if last is None or does in (PLANNED_HIT, PLANNED_REFRESH):
            return
        for inner, inner_key in await self._calls_beneath(
            last, only_doubtful=does == PLANNED_REVALIDATION
        ):
            await self.add(inner, inner_key, depth=depth + 1)

    async def add_root(self, function: str, key: str, shown: str, summary: str) -> None:
        """Add the call to plan; if it has no entry, take the latest one with equal arguments."""
        await self.add(function, key, shown)
        if self.steps[-1].seconds is not None:
            return
        wanted = _arguments(summary)
        same = [
            one for one in await self._headers_of(function) if _arguments(one.summary) == wanted
        ]
        if not same:
            return
        last = max(same, key=lambda header: header.times.finished)
        reason = self.steps[-1].reason
        if reason == ABSENT and _has_other_code(self._functions.get(function), last):
            reason = CODE_CHANGED
        self.steps[-1] = self.steps[-1]._replace(reason=reason, seconds=last.times.cost / SECOND)
        for inner, inner_key in await self._calls_beneath(last, only_doubtful=False):
            await self.add(inner, inner_key, depth=1)

    async def _stored_header(self, function: str, key: str) -> Header | None:
        return await self._chain.stored_header(self._port, self._chain.name(function, key))

    async def _with_equal_arguments(self, header: Header) -> list[Header]:
        """Return the entries with the same function and arguments, whatever their code version."""
        wanted = _arguments(header.summary)
        every = await self._headers_of(header.function)
        return [one for one in every if _arguments(one.summary) == wanted]

    async def _headers_of(self, function: str) -> list[Header]:
        if function not in self._listed:
            self._listed[function] = await headers_of(self._port, self._chain, function)
        return self._listed[function]

    async def _calls_beneath(self, header: Header, *, only_doubtful: bool) -> list[tuple[str, str]]:
        """Return function and key of each call that an entry was built on directly."""
        absolute, used_results = results.unflatten(header.stamps)
        if only_doubtful:
            doubts = await self._chain.authorities.why_changed(self._port, used_results)
            used_results = [one for one, doubt in zip(used_results, doubts, strict=True) if doubt]
        calls = [(one.result.function, one.result.key) for one in used_results]
        if only_doubtful:
            return calls
        return [*await self._calls_without_cutoff(header, absolute), *calls]

    async def _calls_without_cutoff(
        self, header: Header, absolute: Iterable[Stamp]
    ) -> list[tuple[str, str]]:
        """Return the calls beneath an entry without `cutoff`, found by their generations."""
        wanted = [ref for ref in _call_refs(absolute) if ref != own_ref(header)]
        found: dict[Ref, Header] = {}
        for ref in wanted:
            for one in await self._headers_of(ref.group[2:]):
                before = found.get(ref)
                if own_ref(one) == ref and (before is None or before.times < one.times):
                    found[ref] = one
        inner = {
            ref for one in found.values() for ref in _call_refs(one.stamps) if ref != own_ref(one)
        }
        return [(one.function, one.key) for ref, one in found.items() if ref not in inner]


def _has_other_code(function: Function | None, header: Header) -> bool:
    """True if an entry has another code version than its function has here.

    False for a method, since its code version depends on the object.
    """
    if function is None or function.keyer.method or not header.code:
        return False
    return function.keyer.code(()) != header.code


def _call_refs(known: Iterable[Stamp]) -> list[Ref]:
    """Return the generations of single calls in some stamps."""
    refs = [stamp.ref for stamp in known if type(stamp) is Generation]
    return [ref for ref in refs if ref.group.startswith("f:") and ref.arguments is not None]


def own_ref(header: Header) -> Ref | None:
    """Return the generation of an entry's own call, if it is stamped with one."""
    name = f"f:{header.function}"
    return next((ref for ref in _call_refs(header.stamps) if ref.group == name), None)


def _arguments(summary: str) -> dict[str, str]:
    found = json.loads(summary)
    return {name: pair[1] for name, pair in found.items() if not name.startswith(RESULT_SHAPE[:1])}


def _step_kind(found: Answer) -> str:
    if found.verdict.kind == MISS:
        return PLANNED_REVALIDATION if found.verdict.renewable else PLANNED_COMPUTATION
    return PLANNED_REFRESH if found.verdict.kind == STALE else PLANNED_HIT
