"""Export and import: chosen entries as one sealed file, with their origin.

`memo.stores.bundle_file` has the format of the file.
"""

from __future__ import annotations

import getpass
import json
import os
import platform
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from memo.decorators import assembly, names
from memo.decorators.cached_function import CachedFunction, functions
from memo.engine.call import writer_name
from memo.engine.explaining import list_headers
from memo.errors import BundleError, EntryError, OptionError, TierError, label, public
from memo.inspection.inventory import Selection
from memo.keys import summaries
from memo.metrics import formatting
from memo.records import codec, seal
from memo.records.codec import Payload
from memo.records.seal import Header
from memo.runtime import VERSION
from memo.runtime.blocking import BLOCKING, drive
from memo.runtime.clock import SECOND
from memo.runtime.events import MISS
from memo.runtime.named_tuple import NamedTuple
from memo.runtime.port import Port
from memo.settings.secret_keys import Secret
from memo.stores.bundle_file import (
    KEY_VARIABLE,
    Bundle,
    BundleItem,
    BundleOrigin,
    BundlePart,
    current_states,
    file_path,
    given_key,
    restamped,
    secret_of,
    write,
)
from memo.stores.chain import Chain
from memo.validity.check import Judge, is_useless, judge_by_record, only_fresh

Target = CachedFunction[..., Any] | Callable[..., Any] | str
SAME_CODE, OTHER_CODE, CODE_UNKNOWN = "same code", "other code", "code not known here"


class Exported(NamedTuple):
    """The outcome of an export.

    Attributes:
        path: the file.
        entries: number of entries.
        functions: number of functions.
        size: bytes.
        key: the key that importing it needs.
        generated: the key was generated for this bundle.
    """

    path: Path
    entries: int
    functions: int
    size: int
    key: str
    generated: bool

    def __repr__(self) -> str:
        """Omit the key."""
        entries = formatting.quantity(self.entries, "entry", "entries")
        of = formatting.quantity(self.functions, "function")
        key_hint = "; importing it needs its .key" if self.generated else ""
        return f"exported {entries} of {of}, {formatting.size(self.size)}, to {self.path}{key_hint}"


@public
def export_bundle(
    path: str | os.PathLike[str],
    function: Target | Sequence[Target] | None = None,
    /,
    *,
    where: Mapping[str, Any] | None = None,
    tag: str | None = None,
    key: str | None = None,
    note: str = "",
) -> Exported:
    """Write valid entries of this host to one file, sealed with a key of its own.

    ::

        made = memo.export_bundle("features.memo", load, where={"region": "EU"})
        made.key  # needed to import the file: send it by another channel

    Args:
        path: the file; an existing one is replaced.
        function: a cached function, a name that tables show, or several of them; None: all.
        where: argument -> value: only entries with these.
        tag: only entries with this tag.
        key: at least 32 characters; None: the variable `MEMO_BUNDLE_KEY`, else a new one.
        note: shown when it is imported.

    Raises:
        OptionError: no function has the name, or it has no valid entry.
        BundleError: the key is too short.
    """
    several = isinstance(function, Sequence) and not isinstance(function, str)
    given: list[Any] = list(function) if several else [function]  # type: ignore[arg-type]
    if not given:
        raise OptionError("function", function, "names no function; leave it out to export all.")
    wanted = Selection(where=where or {}, tag=tag)
    file = file_path(path)
    chosen = given_key(key)
    secret_key = chosen or secrets.token_hex(32)
    work = _export(BLOCKING, file, given, wanted, secret_key, note)
    items = drive(work)
    return Exported(
        file,
        len(items),
        len({item.function for item in items}),
        file.stat().st_size,
        secret_key,
        chosen is None,
    )


async def _export(
    port: Port, path: Path, given: Sequence[Any], wanted: Selection, key: str, note: str
) -> list[BundleItem]:
    secret = secret_of(key)
    here = {one.function_id: one for one in functions()}
    parts: list[BundlePart] = []
    searched: set[str] = set()
    usual = assembly.default_chain()
    for target in given:
        chain = usual
        prefix = f"{chain.namespace}:"
        if target is not None:
            identity = await names.function_named(port, "function", target, list(here))
            if identity in here:
                here[identity]._function.keyer.check_names("where", wanted.where)
                chain = here[identity]._function.chain()
            prefix = chain.prefix(identity)
        if prefix in searched:
            continue
        searched.add(prefix)
        by_record = judge_by_record(chain.clock)
        for header, _ in await list_headers(port, chain, prefix):
            if wanted.matches_entry(header):
                known = here.get(header.function)
                judge = by_record if known is None else known._function_in_mode().judge
                part = await _seal_part(port, chain, header, secret, judge)
                parts += [part] if part is not None else []
    if not parts:
        more = "" if wanted.tag is None else f", with tag={wanted.tag!r}"
        more += f", with the given {', '.join(wanted.where)}" if wanted.where else ""
        fix = f"no valid entry of this host matches{more}; see memo.entries()."
        named = "everything" if given == [None] else [str(one) for one in given]
        raise OptionError("export_bundle", named, fix)
    python = platform.python_version()
    by, system = f"{_user()}@{writer_name()}", f"{platform.system()} {platform.machine()}"
    origin = BundleOrigin(time.time(), by, VERSION, python, system, usual.namespace, note)
    await port.offload(write, path, origin, parts, secret)
    return [part.item for part in parts]


def _user() -> str:
    """Return the name of this user, or the number of one without a name, as in containers."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


async def _seal_part(
    port: Port, chain: Chain, header: Header, secret: Secret, judge: Judge
) -> BundlePart | None:
    """Return an entry, sealed for a bundle; None if it is not fresh, or incomplete here."""
    found = await chain.lookup(port, header.function, header.key, only_fresh(judge))
    entry = found.entry
    if found.verdict.kind == MISS or entry is None:
        return None
    view: memoryview | None = None
    if entry.buffers:
        assert found.source is not None
        view = found.source.open(seal.payload_size(entry.buffers))
        if not codec.has_valid_digests(view, entry.buffers):
            return None
    mine = entry.header._replace(namespace=chain.namespace)
    record = seal.pack(mine, entry.stream, secret)
    times = entry.times
    ttl = None if times.ttl < 0 else times.ttl / SECOND
    facts = (header.function, header.key, header.code, header.summary)
    moments = (times.finished / SECOND, ttl, times.cost / SECOND, entry.size)
    return BundlePart(BundleItem(*facts, *moments, (0, 0), None), record, view)


# --- looking at one -------------------------------------------------------------------------------


def describe_bundle(bundle: Bundle) -> list[str]:
    """Describe the origin and the content of a bundle, as lines of text."""
    origin = bundle.origin
    made = formatting.date_and_time(origin.made)
    verified = "sealed with this key" if bundle.verified else "NOT VERIFIED: the key is missing"
    lines = [
        f"{bundle.path.name}: {verified}",
        f"  made {made} by {origin.by}",
        f"  with memo {origin.memo}, Python {origin.python}, {origin.platform}",
    ]
    lines += [f"  note: {origin.note}"] if origin.note else []
    codes = drive(_compare_code(BLOCKING, assembly.default_chain(), bundle))
    for function, items in bundle.functions():
        entries = formatting.quantity(len(items), "entry", "entries")
        size = formatting.size(sum(item.size for item in items))
        newest = time.time() - max(item.computed for item in items)
        versions = sorted({codes[item.function, item.code] for item in items})
        lines.append(
            f"  {label(function)}: {entries}, {size}, newest computed "
            f"{formatting.duration(max(0.0, newest))} ago; {', '.join(versions)}"
        )
    return lines


async def _compare_code(port: Port, chain: Chain, bundle: Bundle) -> dict[tuple[str, str], str]:
    """Compare the code versions in a bundle with those that run here, by function and version.

    A function that this process does not have is compared with what it last stored on this host.
    """
    here = {one.function_id: one._function for one in functions()}
    versions: dict[tuple[str, str], str] = {}
    for function, items in bundle.functions():
        known = here.get(function)
        code = None
        if known is not None and not known.keyer.method:
            code = known.keyer.identity.digest()
        if code is None:
            stored = [
                header for header, _ in await list_headers(port, chain, chain.prefix(function))
            ]
            latest = max(stored, key=lambda header: header.times.finished, default=None)
            code = None if latest is None else latest.code
        for item in items:
            comparison = (
                CODE_UNKNOWN if code is None else SAME_CODE if item.code == code else OTHER_CODE
            )
            versions[function, item.code] = comparison
    return versions


class Imported(NamedTuple):
    """The outcome of an import: which entries were stored, and why the others were not.

    Attributes:
        bundle: the origin of the entries.
        stored: entries that may answer calls from now on.
        other_code: entries of a function with other code here: no call would find them, so they are
            not stored.
        expired: entries past their ttl; they are not stored.
        older: entries of which this host has a later result; they are not stored.
        changed: stored entries that depend on files which differ here.
    """

    bundle: Bundle
    stored: tuple[BundleItem, ...] = ()
    other_code: tuple[BundleItem, ...] = ()
    expired: tuple[BundleItem, ...] = ()
    older: tuple[BundleItem, ...] = ()
    changed: tuple[BundleItem, ...] = ()

    def lines(self) -> list[str]:
        """Describe the outcome in lines of text."""
        made = formatting.quantity(len(self.stored), "entry", "entries")
        lines = [f"imported {made} from {self.bundle.path.name}, made by {self.bundle.origin.by}"]
        left_out = (
            (self.other_code, "not imported: the function's code is different here"),
            (self.expired, "not imported: expired"),
            (self.older, "not imported: a later result is here already"),
            (self.changed, "will not be used: what it depends on is different here"),
        )
        for items, why in left_out:
            lines += [f"  {_item_text(item)}: {why}" for item in items[:10]]
            lines += [f"  and {len(items) - 10} more"] if len(items) > 10 else []
        return lines

    def __repr__(self) -> str:
        return "\n".join(self.lines())


def _item_text(item: BundleItem) -> str:
    """Return an entry as a call, for display."""
    given = {
        n: p[0] for n, p in json.loads(item.arguments).items() if n[0] != summaries.SPECIAL_PREFIX
    }
    return f"{label(item.function)}({', '.join(f'{n}={text}' for n, text in given.items())})"


@public
def import_bundle(path: str | os.PathLike[str] | Bundle, /, *, key: str | None = None) -> Imported:
    """Store the entries of a bundle here, as if they had been computed now.

    Their age counts from the time they were computed.  `memo.Bundle(path)` shows the origin of a
    bundle without its key.

    Args:
        path: the file, or a `Bundle`.
        key: the key that it was sealed with; None: that of the `Bundle`, or the variable
            `MEMO_BUNDLE_KEY`.

    Returns:
        The outcome for each entry.

    Raises:
        BundleError: the key is missing or wrong, or the file was changed, and nothing was stored.
            If the key is missing, the message repeats the origin that the file states.
    """
    if not isinstance(path, Bundle):
        bundle = Bundle(path, key)
    else:
        bundle = path if key is None else Bundle(path.path, key)
    if not bundle.verified:
        where = "\n".join(describe_bundle(bundle))
        message = f"The key is missing: give import_bundle(path, key=...), or {KEY_VARIABLE}."
        raise BundleError(f"{message}\n{where}")
    return drive(_import(BLOCKING, bundle))


async def _import(port: Port, bundle: Bundle) -> Imported:
    changed = await port.offload(bundle.changed_items)
    if changed:
        named = ", ".join(map(_item_text, changed[:10]))
        more = f" and {len(changed) - 10} more" if len(changed) > 10 else ""
        raise BundleError(f"{bundle.path.name} was changed since it was made: {named}{more}.")
    here = {one.function_id: one._function for one in functions()}
    default = assembly.default_chain()
    codes = await _compare_code(port, default, bundle)
    found: dict[str, list[BundleItem]] = {name: [] for name in Imported._fields[1:]}
    for item in bundle.items:
        function = here.get(item.function)
        if function is not None and codes[item.function, item.code] == OTHER_CODE:
            found["other_code"].append(item)
            continue
        chain = default if function is None else function.chain()
        judge = judge_by_record(chain.clock) if function is None else function.judge
        for outcome in await _store(port, chain, judge, bundle, item):
            found[outcome].append(item)
    return Imported(bundle, *(tuple(items) for items in found.values()))


async def _store(
    port: Port, chain: Chain, judge: Judge, bundle: Bundle, item: BundleItem
) -> list[str]:
    """Store one entry, and return the lists of the outcome that it belongs to."""
    try:
        entry = await port.offload(bundle.entry, item)
        payload = _payload(bundle, item, entry)
    except (EntryError, TierError) as error:  # it was changed during the import
        raise BundleError(f"{bundle.path.name}: {error}") from error
    if is_useless(entry.times, chain.clock):
        return ["expired"]
    here = await chain.lookup(port, item.function, item.key, judge)
    if here.verdict.kind != MISS and here.entry and entry.times.started < here.entry.times.started:
        return ["older"]
    states = await current_states(port, chain, [entry])
    header = restamped(entry, states)._replace(namespace=chain.namespace)
    record = seal.pack(header, entry.stream, chain.secrets[0])
    name = chain.name(item.function, item.key)
    if not await chain.writer.store(port, name, record, payload, entry.times):
        raise TierError(f"no tier could store {_item_text(item)}")
    changed = await chain.authorities.why_invalid(port, header.stamps)
    return ["stored", "changed"] if changed else ["stored"]


def _payload(bundle: Bundle, item: BundleItem, entry: seal.Entry) -> Payload | None:
    source = bundle.source(item)
    if source is None or not entry.buffers:
        return None
    view = source.open(seal.payload_size(entry.buffers))
    if not codec.has_valid_digests(view, entry.buffers):
        raise EntryError("unreadable", "a payload does not have its digest")
    slices = codec.buffers_of(view, entry.buffers)
    return Payload(seal.payload_digest(entry.buffers), tuple(entry.buffers), tuple(slices))
