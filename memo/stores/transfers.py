"""Transfers: big entries are uploaded in the background, and downloaded to this host's disk.

Rules of this module:

1.  An entry is uploaded later only if every lookup that misses it in the shared tier also asks
    this host's disk; otherwise the call returns when the shared tier has the entry.
2.  A payload from a shared tier is stored on this host's disk with its record, so that it is
    downloaded once.  Other lookups that need it wait for the download.
3.  Big transfers emit one event at their beginning and one at their end.
4.  The queue holds names.  When the turn of a name comes, the entry that is then on this host's
    disk under that name is sent.  So waiting uploads take no memory, and the newest entry is sent.
5.  At most `CONCURRENT_UPLOADS` run at once, never two of one name.  If `MAX_QUEUED_BYTES` are
    queued, the next upload is refused and the caller sends it itself, so no caller outruns the
    network.
6.  An upload always ends exactly once.  Actions that wait for it, such as releasing the lease under
    which the entry was computed, run then.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from memo.errors import EntryError, TierError
from memo.records import seal
from memo.records.codec import Payload
from memo.records.payload_pieces import IncomingPayload, outgoing
from memo.records.seal import Entry
from memo.records.stamp_types import Times
from memo.runtime import events, fork
from memo.runtime.port import Port, Waiter
from memo.stores.protocols import MEMORY, Found, LocalTier, ServerTier, Source, Tier

Work = Callable[[Port], Coroutine[Any, Any, None]]
BACKGROUND_UPLOAD_BYTES = 1 << 20
"""Entries of at least this many bytes are sent in the background: 1 MiB takes 10 ms at 1 Gbit/s."""
CONCURRENT_UPLOADS = 2
"""Number of concurrent uploads."""
MAX_QUEUED_BYTES = 512 << 20
"""Maximum number of queued bytes: 5 s at 1 Gbit/s, which is well below the `lock_timeout` of
waiting callers."""
JOIN_WAIT_SECONDS = 30.0
"""Seconds after which a lookup that waits for another one's download starts its own."""


class Transfers:
    """Uploads and fetches of one chain.

    Args:
        tiers: the tiers of the chain, in order.
        writes_to_all: entries are written to every tier.
        asks_all: if a tier has nothing, the next one is asked.
        open_entry: parses the record found under a name; raises `EntryError`.
        lifetime: returns for how many seconds an entry still lives; None: forever.
        fault: reports a fault of a tier: name of the tier, error, key.

    Attributes:
        uploads: entries on their way to the shared tier.
    """

    def __init__(
        self,
        tiers: Sequence[Tier],
        *,
        writes_to_all: bool,
        asks_all: bool,
        open_entry: Callable[[str, bytes], Entry],
        lifetime: Callable[[Times], float | None],
        fault: Callable[[str, TierError, str], None],
    ) -> None:
        self.local = next((t for t in tiers if not t.shared and t.name != MEMORY), None)
        self._server = next((t for t in tiers if isinstance(t, ServerTier)), None)
        self._writes_to_all = writes_to_all
        self._later = writes_to_all and asks_all and self.local is not None
        self._open_entry = open_entry
        self._lifetime = lifetime
        self._fault = fault
        self.uploads = Uploads(self._send)
        self._downloads: dict[bytes, list[Waiter]] = {}
        self._lock = threading.Lock()

    # --- to a shared tier ------------------------------------------------------------------------

    def can_upload_later(
        self, tier: Tier, name: str, record: int, payload: Payload | None = None
    ) -> bool:
        """True if an entry can go to a tier in the background, because this host's disk has it.

        Args:
            tier: any tier of the chain.
            name: the name of the entry.
            record: bytes of its record.
            payload: its payload.
        """
        server = self._server if self._later else None
        if server is None or tier is not server or record > server.value_limit:
            return False
        moved = payload.size if payload is not None and server.accepts_payload(payload.size) else 0
        return record + moved > BACKGROUND_UPLOAD_BYTES or self.uploads.get(name) is not None

    def _as_server(self, tier: Tier) -> ServerTier | None:
        return self._server if self._server is tier else None

    def queue_upload(self, port: Port, name: str, size: int) -> bool:
        """Queue the upload of an entry from this host's disk; False: the caller has to send it."""
        return self.uploads.add(port, name, size) is not None

    def after_uploads(self, work: Work) -> bool:
        """Run `work` when the last queued upload ends; False if there is none."""
        return any(upload.run_after(work) for upload in self.uploads.all())

    async def _send(self, port: Port, name: str) -> None:
        server = self._server
        assert self.local is not None
        assert server is not None
        begun = time.perf_counter()
        entry: Entry | None = None
        detail = "it is not on this host's disk any more"
        try:
            found = await self.local.lookup(port, name)
            if found is not None:
                entry = self._open_entry(name, found.record)
                _emit(events.UPLOAD_STARTED, entry, server.name)
                lifetime = self._lifetime(entry.header.times)
                await server.store(port, name, found.record, _mapped(found, entry), lifetime)
                _emit(events.UPLOADED, entry, server.name, begun)
                return
        except (TierError, EntryError) as error:
            detail = str(error)
            if isinstance(error, TierError) and entry is not None:
                self._fault(server.name, error, entry.header.key)
        _emit(events.UPLOAD_FAILED, entry, server.name, begun, detail)

    # --- from a shared tier ----------------------------------------------------------------------

    async def payload(self, port: Port, tier: Tier, name: str, entry: Entry) -> Source | None:
        """Return the payload of an entry from any tier, or None.

        Raises:
            TierError: the tier could not read it.
        """
        size = seal.payload_size(entry.header.buffers)
        if self._as_server(tier) is None or size <= BACKGROUND_UPLOAD_BYTES:
            return await self._source(port, tier, name, entry)
        begun = time.perf_counter()
        _emit(events.FETCH_STARTED, entry, tier.name)
        kind, detail = events.FETCH_FAILED, "it is not there any more"
        try:
            source = await self._source(port, tier, name, entry)
            if source is not None:
                kind, detail = events.FETCHED, ""
        except TierError as error:
            detail = str(error)
            raise
        finally:
            _emit(kind, entry, tier.name, begun, detail)
        return source

    async def _source(self, port: Port, tier: Tier, name: str, entry: Entry) -> Source | None:
        server = self._as_server(tier)
        if server is not None and self._writes_to_all and isinstance(self.local, LocalTier):
            source = await self._download(port, server, name, entry)
            if source is not None:
                return source
        table = entry.header.buffers
        return await tier.payload(port, seal.payload_digest(table), seal.payload_size(table))

    async def _download(
        self, port: Port, server: ServerTier, name: str, entry: Entry
    ) -> Source | None:
        """Download a payload to this host's disk; return its source, or None if the disk fails."""
        local = self.local
        assert isinstance(local, LocalTier)
        digest = seal.payload_digest(entry.header.buffers)
        size = seal.payload_size(entry.header.buffers)
        arriving = IncomingPayload(entry.header.buffers, lambda sink: server.fetch(digest, sink))
        lifetime = self._lifetime(entry.header.times)
        waiter = self._join_download(port, digest)
        try:
            if waiter is not None:
                await port.wait(waiter, JOIN_WAIT_SECONDS)
                if source := await local.payload(port, digest, size):
                    return source
            return await local.receive(port, name, entry.record, arriving, lifetime)
        except TierError as error:
            if arriving.fault is not None:
                raise arriving.fault from None
            self._fault(local.name, error, entry.header.key)
            return None
        finally:
            if waiter is None:
                self._end_download(digest)

    def _join_download(self, port: Port, digest: bytes) -> Waiter | None:
        """Return a waiter for another caller's download; None: this caller has to download."""
        with self._lock:
            waiting = self._downloads.get(digest)
            if waiting is None:
                self._downloads[digest] = []
                return None
            waiter = port.waiter()
            waiting.append(waiter)
            return waiter

    def _end_download(self, digest: bytes) -> None:
        with self._lock:
            waiting = self._downloads.pop(digest, [])
        for waiter in waiting:
            waiter.set()


def _mapped(found: Found, entry: Entry) -> Payload | None:
    """Map the payload of an entry on this host's disk, for its upload."""
    table = entry.header.buffers
    if not table:
        return None
    if found.source is None:
        raise TierError("its payload is not on this host's disk any more")
    return outgoing(found.source.open(seal.payload_size(table)), table)


def _emit(kind: str, entry: Entry | None, tier: str, begun: float = 0.0, detail: str = "") -> None:
    function, key, size = "", "", 0
    if entry is not None:
        function, key, size = entry.header.function, entry.header.key, entry.size
    seconds = time.perf_counter() - begun if begun else 0.0
    event = events.Event(kind, function, key, tier, "", seconds, size, detail=detail)
    events.emit(event)


# --- uploads, one after another ------------------------------------------------------------------


class Upload:
    """The upload of one entry, waiting or running."""

    __slots__ = ("_after", "_lock", "ended", "name", "size")

    def __init__(self, name: str, size: int) -> None:
        self.name = name
        self.size = size
        self.ended = False
        self._after: list[Work] = []
        self._lock = threading.Lock()

    def run_after(self, work: Work) -> bool:
        """Run `work` when the upload has ended.

        False, without running it, if it has ended already.
        """
        with self._lock:
            if not self.ended:
                self._after.append(work)
            return not self.ended

    async def end(self, port: Port) -> None:
        """Mark the upload as ended, and run the actions that wait for it."""
        with self._lock:
            self.ended = True
        for work in self._after:
            try:
                await work(port)
            except Exception as error:  # the other actions still have to run
                _report_background_error(error)


class Uploads:
    """The uploads of one chain.

    Args:
        send: sends the entry stored under a name; it reports faults of a tier itself.
    """

    def __init__(self, send: Callable[[Port, str], Coroutine[Any, Any, None]]) -> None:
        self._send = send
        self.after_fork()
        fork.renew_in_child(self)

    def after_fork(self) -> None:
        """Forget all uploads: after a fork they belong to the parent."""
        self._lock = threading.Lock()
        self._waiting: OrderedDict[str, Upload] = OrderedDict()
        self._running: dict[str, Upload] = {}
        self._bytes = 0
        self._workers = 0

    def get(self, name: str) -> Upload | None:
        """Return the last upload of a name, if it has not ended."""
        return self._waiting.get(name) or self._running.get(name)

    def all(self) -> list[Upload]:
        """Return the uploads that have not ended."""
        with self._lock:
            return [*self._waiting.values(), *self._running.values()]

    def add(self, port: Port, name: str, size: int) -> Upload | None:
        """Queue the upload of a name; None if too many bytes are queued already."""
        with self._lock:
            if name in self._waiting:
                return self._waiting[name]
            if (
                self._waiting
                and name not in self._running
                and self._bytes + size > MAX_QUEUED_BYTES
            ):
                return None
            upload = self._waiting[name] = Upload(name, size)
            self._bytes += size
            starts = self._workers < CONCURRENT_UPLOADS
            self._workers += starts
        if starts:
            port.spawn(self._work, "memo-upload", own_thread=True)
        return upload

    def _next(self) -> Upload | None:
        """Return the next upload that may run; None, and one worker less, if there is none."""
        with self._lock:
            free = (name for name in self._waiting if name not in self._running)
            name = next(free, None)
            if name is None:
                self._workers -= 1
                return None
            upload = self._running[name] = self._waiting.pop(name)
            self._bytes -= upload.size
            return upload

    async def _work(self, port: Port) -> None:
        while (upload := self._next()) is not None:
            try:
                await self._send(port, upload.name)
            except Exception as error:
                _report_background_error(error)
            finally:
                with self._lock:
                    self._running.pop(upload.name, None)
                await upload.end(port)


def _report_background_error(error: Exception) -> None:
    detail = f"upload: {type(error).__name__}"
    events.emit(events.Event(events.ERROR, reason="background", detail=detail))
