"""Transfers: what is big goes to a shared tier behind the calls, and comes from there to the disk.

Rules of this module:

1.  An entry goes later only where each look-up that does not find it there asks this host's disk as
    well; else the call returns when the shared tier has it.
2.  A payload that comes from a shared tier is kept by this host's disk, record and all, so that it
    comes once.  A lookup that needs it meanwhile waits for it.
3.  Both are told by events when they are big: one at the beginning, one at the end.
4.  An upload is a name.  What lies under that name on this host's disk when its turn comes is what
    is sent, so that what waits takes no memory, and a newer entry takes the place of an older one.
5.  At most `WORKERS` run at once, never two of one name.  Where `WAITING` bytes wait already, the
    next one is refused, and its caller sends it: no caller stores faster than the network.
6.  An upload ends once, however it ends.  What was to come after it, such as freeing the lease
    under which the entry was computed, comes then.
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
from memo.records.payload_pieces import Arriving, leaving
from memo.records.seal import Entry
from memo.records.stamp_types import Times
from memo.runtime import events, fork
from memo.runtime.port import Port, Waiter
from memo.stores.protocols import MEMORY, Afar, Found, Receiving, Source, Tier

Work = Callable[[Port], Coroutine[Any, Any, None]]
BIG = 1 << 20
"""Bytes from which an entry is sent in the background: 1 MiB takes 10 ms at 1 Gbit/s."""
WORKERS = 2
"""Uploads that run at once."""
WAITING = 512 << 20
"""Bytes that may wait: 5 s at 1 Gbit/s, so well below the `lock_timeout` of waiting callers."""
PATIENCE = 30.0
"""Seconds after which a lookup that waits for another's fetch of a payload fetches it itself."""


class Transfers:
    """Uploads and fetches of one chain.

    Args:
        tiers: of the chain.
        keeps: whether every tier is written to.
        searches: whether the next tier is asked when one has nothing.
        opened: the entry in a record found under a name; raises `EntryError`.
        remaining: seconds that an entry has still to live; None: no end.
        fault: tells of a tier's fault: tier, error, key.

    Attributes:
        uploads: entries on their way to the shared tier.
    """

    def __init__(
        self,
        tiers: Sequence[Tier],
        *,
        keeps: bool,
        searches: bool,
        opened: Callable[[str, bytes], Entry],
        remaining: Callable[[Times], float | None],
        fault: Callable[[str, TierError, str], None],
    ) -> None:
        self.local = next((t for t in tiers if not t.shared and t.name != MEMORY), None)
        self._far = next((t for t in tiers if t.shared and isinstance(t, Afar)), None)
        self._keeps = keeps
        self._later = keeps and searches and self.local is not None
        self._opened = opened
        self._remaining = remaining
        self._fault = fault
        self.uploads = Uploads(self._send)
        self._arrivals: dict[bytes, list[Waiter]] = {}
        self._lock = threading.Lock()

    # --- to a shared tier ------------------------------------------------------------------------

    def later(self, tier: Tier, name: str, record: int, payload: Payload | None = None) -> bool:
        """True if an entry goes to a tier in the background, where this host's disk has it.

        Args:
            tier: any of the chain.
            name: what it is stored under.
            record: its bytes.
            payload: of the entry.
        """
        far = self._far if self._later else None
        here: object = tier
        if far is None or here is not far or record > far.value_limit:
            return False
        moved = payload.size if payload is not None and far.takes(payload.size) else 0
        return record + moved > BIG or self.uploads.get(name) is not None

    def _as_far(self, tier: Tier) -> Afar | None:
        far: object = self._far
        return self._far if far is tier else None

    def begin(self, port: Port, name: str, size: int) -> bool:
        """Send what this host's disk has under a name; False: the caller has to send it himself."""
        return self.uploads.add(port, name, size) is not None

    def when_sent(self, work: Work) -> bool:
        """Have `work` done when an upload ends that is under way or about to be; False: none is."""
        return any(upload.then(work) for upload in self.uploads.all())

    async def _send(self, port: Port, name: str) -> None:
        far = self._far
        assert self.local is not None
        assert far is not None
        begun = time.perf_counter()
        entry: Entry | None = None
        detail = "it is not on this host's disk any more"
        try:
            found = await self.local.lookup(port, name)
            if found is not None:
                entry = self._opened(name, found.record)
                _tell(events.UPLOAD_STARTED, entry, far.name)
                lifetime = self._remaining(entry.header.times)
                await far.store(port, name, found.record, _mapped(found, entry), lifetime)
                _tell(events.UPLOADED, entry, far.name, begun)
                return
        except (TierError, EntryError) as error:
            detail = str(error)
        _tell(events.UPLOAD_FAILED, entry, far.name, begun, detail)

    # --- from a shared tier ----------------------------------------------------------------------

    async def payload(self, port: Port, tier: Tier, name: str, entry: Entry) -> Source | None:
        """The payload of an entry, from any tier; None: it is not there.

        Raises:
            TierError: the tier could not give it.
        """
        size = seal.payload_size(entry.header.buffers)
        if self._as_far(tier) is None or size <= BIG:
            return await self._source(port, tier, name, entry)
        begun = time.perf_counter()
        _tell(events.FETCH_STARTED, entry, tier.name)
        kind, detail = events.FETCH_FAILED, "it is not there any more"
        try:
            source = await self._source(port, tier, name, entry)
            if source is not None:
                kind, detail = events.FETCHED, ""
        except TierError as error:
            detail = str(error)
            raise
        finally:
            _tell(kind, entry, tier.name, begun, detail)
        return source

    async def _source(self, port: Port, tier: Tier, name: str, entry: Entry) -> Source | None:
        far = self._as_far(tier)
        if far is not None and self._keeps and isinstance(self.local, Receiving):
            source = await self._received(port, far, name, entry)
            if source is not None:
                return source
        table = entry.header.buffers
        return await tier.payload(port, seal.payload_digest(table), seal.payload_size(table))

    async def _received(self, port: Port, far: Afar, name: str, entry: Entry) -> Source | None:
        """A payload that is on this host's disk from now on; None: it cannot be kept there."""
        here: object = self.local
        assert isinstance(here, Receiving)
        digest = seal.payload_digest(entry.header.buffers)
        size = seal.payload_size(entry.header.buffers)
        arriving = Arriving(entry.header.buffers, lambda sink: far.fetch(digest, sink))
        lifetime = self._remaining(entry.header.times)
        assert self.local is not None
        waiter = self._join(port, digest)
        try:
            if waiter is not None:
                await port.wait(waiter, PATIENCE)
                if source := await self.local.payload(port, digest, size):
                    return source
            return await here.receive(port, name, entry.record, arriving, lifetime)
        except TierError as error:
            if arriving.fault is not None:
                raise arriving.fault from None
            self._fault(self.local.name, error, entry.header.key)
            return None
        finally:
            if waiter is None:
                self._leave(digest)

    def _join(self, port: Port, digest: bytes) -> Waiter | None:
        """Waiter that is set when a payload under way has arrived; None: none is under way."""
        with self._lock:
            waiting = self._arrivals.get(digest)
            if waiting is None:
                self._arrivals[digest] = []
                return None
            waiter = port.waiter()
            waiting.append(waiter)
            return waiter

    def _leave(self, digest: bytes) -> None:
        with self._lock:
            waiting = self._arrivals.pop(digest, [])
        for waiter in waiting:
            waiter.set()


def _mapped(found: Found, entry: Entry) -> Payload | None:
    """The payload of an entry on this host's disk, to be sent from where it lies."""
    table = entry.header.buffers
    if not table:
        return None
    if found.source is None:
        raise TierError("its payload is not on this host's disk any more")
    return leaving(found.source.open(seal.payload_size(table)), table)


def _tell(kind: str, entry: Entry | None, tier: str, begun: float = 0.0, detail: str = "") -> None:
    function, key, size = "", "", 0
    if entry is not None:
        function, key, size = entry.header.function, entry.header.key, entry.size
    seconds = time.perf_counter() - begun if begun else 0.0
    event = events.Event(kind, function, key, tier, "", seconds, size, detail=detail)
    events.emit(event)


# --- uploads, one after another ------------------------------------------------------------------


class Upload:
    """One entry on its way, or about to be."""

    __slots__ = ("_after", "_lock", "name", "over", "size")

    def __init__(self, name: str, size: int) -> None:
        self.name = name
        self.size = size
        self.over = False
        self._after: list[Work] = []
        self._lock = threading.Lock()

    def then(self, work: Work) -> bool:
        """Have `work` done when it has ended; False, and nothing done, if it has."""
        with self._lock:
            if not self.over:
                self._after.append(work)
            return not self.over

    async def end(self, port: Port) -> None:
        """Note that the upload has ended, and do what waits for that."""
        with self._lock:
            self.over = True
        for work in self._after:
            try:
                await work(port)
            except Exception as error:  # the others still have their turn
                _complain(error)


class Uploads:
    """The uploads of one chain.

    Args:
        send: sends what lies under a name; a fault of a tier is its own to tell.
    """

    def __init__(self, send: Callable[[Port, str], Coroutine[Any, Any, None]]) -> None:
        self._send = send
        self.after_fork()
        fork.renewed_in_child(self)

    def after_fork(self) -> None:
        """Forget all of them: after a fork they are the parent's."""
        self._lock = threading.Lock()
        self._waiting: OrderedDict[str, Upload] = OrderedDict()
        self._running: dict[str, Upload] = {}
        self._bytes = 0
        self._workers = 0

    def get(self, name: str) -> Upload | None:
        """The last upload of a name, where it has not ended."""
        return self._waiting.get(name) or self._running.get(name)

    def all(self) -> list[Upload]:
        """The uploads that have not ended."""
        with self._lock:
            return [*self._waiting.values(), *self._running.values()]

    def add(self, port: Port, name: str, size: int) -> Upload | None:
        """Send what lies under a name, in the background; None: too much waits already."""
        with self._lock:
            if name in self._waiting:
                return self._waiting[name]
            if self._waiting and name not in self._running and self._bytes + size > WAITING:
                return None
            upload = self._waiting[name] = Upload(name, size)
            self._bytes += size
            starts = self._workers < WORKERS
            self._workers += starts
        if starts:
            port.spawn(self._work, "memo-upload", apart=True)
        return upload

    def _next(self) -> Upload | None:
        """Next upload that may run; None, and one worker less, if there is none."""
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
                _complain(error)
            finally:
                with self._lock:
                    self._running.pop(upload.name, None)
                await upload.end(port)


def _complain(error: Exception) -> None:
    detail = f"upload: {type(error).__name__}"
    events.emit(events.Event(events.ERROR, reason="background", detail=detail))
