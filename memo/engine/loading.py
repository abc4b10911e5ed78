"""Load the values of entries; each payload file is verified once."""

from __future__ import annotations

import threading
import time
from typing import Any

from memo.engine.call import NOTHING, Job, Raised, emit
from memo.errors import EntryError, TierError
from memo.records import codec, seal
from memo.records.seal import Entry, Header
from memo.runtime import events
from memo.runtime.clock import SECOND
from memo.runtime.events import MISS
from memo.runtime.memory_budget import remember
from memo.runtime.port import Port
from memo.runtime.reasons import PAYLOAD_MISSING, UNREADABLE
from memo.stores.chain import Answer
from memo.stores.protocols import PendingLookup, SharesVerification, Source
from memo.validity.check import Verdict

OFFLOADED_STREAM_BYTES = 1 << 20
"""A pickle stream of more bytes than this is loaded off the event loop."""


async def look_up_and_load(
    port: Port, job: Job, pending: PendingLookup | None = None
) -> tuple[Answer, Any]:
    """Look a call up; return the chain's answer, and the value, or `NOTHING` if none may be used.

    Args:
        pending: see `Chain.lookup`.
    """
    function, key = job.function, job.call.text
    found = await job.chain.lookup(port, function.id, key, function.judge, pending)
    if found.verdict.kind == MISS or found.entry is None:
        return found, NOTHING
    try:
        return found, await load(port, found)
    except (EntryError, TierError) as error:
        reason = error.reason if isinstance(error, EntryError) else PAYLOAD_MISSING
        emit(job, events.ERROR, tier=found.tier, reason=reason, detail=str(error))
        return Answer(Verdict(MISS, reason), found.entry), NOTHING


async def load(port: Port, found: Answer) -> Any:
    """Load the value of an answer; `Raised` for a stored exception (`cache_errors`).

    Raises:
        EntryError: it does not load, or its payload is not the one that was sealed.
        TierError: its payload is gone.
    """
    entry = found.entry
    assert entry is not None
    big = len(entry.stream) > OFFLOADED_STREAM_BYTES
    if entry.plain and not (big and port.native):
        return codec.unpickled(entry.stream)
    header, source = entry.header, found.source
    if port.native and (big or header.flags or _must_verify(source, header.buffers)):
        value = await port.offload(_load, entry, header, source)
    else:
        value = _load(entry, header, source)
    return _with_note(entry, value) if header.flags & seal.RAISED else value


def _with_note(entry: Entry, error: BaseException) -> Raised:
    """Add a note to a stored exception that says when it was raised."""
    when = time.localtime(entry.times.finished // SECOND)
    error.add_note(f"memo: raised at {time.strftime('%X', when)}, remembered by cache_errors")
    return Raised(error)


def _load(entry: Entry, header: Header, source: Source | None) -> Any:
    table = header.buffers
    payload = _verified_payload(source, table)
    if header.flags & seal.STREAM:
        from memo.records import spool  # only generators need it

        return spool.Stream(spool.read_contents(entry.stream), payload, table)
    return codec.decode(entry.stream, payload, table, header.flags)


def _verified_payload(source: Source | None, table: tuple[seal.Buffer, ...]) -> memoryview | None:
    """Return the verified payload of an answer; None if it has none."""
    if not table:
        return None
    assert source is not None
    view = source.open(seal.payload_size(table))
    if _must_verify(source, table):
        verify(source, view, table)
    return view


def verify(source: Source, view: memoryview, table: tuple[seal.Buffer, ...]) -> None:
    """Check the digest of a payload, unless another process has recorded that it is right.

    Raises:
        EntryError: the digest differs.
    """
    digest = seal.payload_digest(table)
    verifying = source if isinstance(source, SharesVerification) else None
    if verifying is None or not verifying.is_verified(digest):
        if not codec.has_valid_digests(view, table):
            raise EntryError(UNREADABLE, "a payload does not have its digest")
        if verifying is not None:
            verifying.mark_verified(digest)
    with _verified_lock:
        remember(VERIFIED_PAYLOADS, (source.identity, digest), None, MAX_VERIFIED_PAYLOADS)


MAX_VERIFIED_PAYLOADS = 4096
"""Maximum number of verified payloads that are remembered; older ones are verified again."""
_verified_lock = threading.Lock()
VERIFIED_PAYLOADS: dict[tuple[Any, bytes], None] = {}
"""Identity of the file, and digest, of each payload that this process has verified."""


def _must_verify(source: Source | None, table: tuple[seal.Buffer, ...]) -> bool:
    if source is None:
        return False
    identity = source.identity
    return identity is None or (identity, seal.payload_digest(table)) not in VERIFIED_PAYLOADS
