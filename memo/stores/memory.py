"""The memory tier: the most recently used records, in this process, within a budget of bytes.

Records and payloads are kept as plain bytes, so changing a returned value does not affect them.
The object that a record was parsed into may be kept beside it; its size counts too.
All memory tiers of a process share one budget, see `memo.runtime.memory_budget`.
"""

from __future__ import annotations

import heapq
import itertools
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from memo.errors import TierError
from memo.records import seal
from memo.records.codec import Payload, aligned_bytes
from memo.records.seal import Entry
from memo.records.stamp_types import Ref, State
from memo.runtime import fork
from memo.runtime.clock import SECOND, SYSTEM_CLOCK, Clock
from memo.runtime.memory_budget import BUDGET, Budget
from memo.runtime.port import Port
from memo.stores import protocols
from memo.stores.protocols import Found, Generations, Listed, Source
from memo.validity import generations, stamps
from memo.validity.generations import Change
from memo.validity.stamps import ALL, Turn

ENTRY_OVERHEAD_BYTES = 384
"""Bytes of an entry besides its record, name and payload: the objects that hold them, and its slot
in the table."""
SPARE_SLOTS = 64
"""The queue is rebuilt once it has this many more slots than twice the number of entries."""
_uses = itertools.count(1)
"""Counts uses of entries in all memory tiers, so that any two uses can be ordered."""


class _Locked:
    """Data under one lock, which is held during forks; see `memo.runtime.fork.LockOwner`."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        fork.hold_locks_of(self)

    def fork_locks(self) -> tuple[threading.RLock]:
        """See `memo.runtime.fork.LockOwner.fork_locks`."""
        return (self._lock,)

    def renew_locks(self, *, whole: bool) -> None:
        """See `memo.runtime.fork.LockOwner.renew_locks`."""
        self._lock = threading.RLock()


class PayloadBytes:
    """A payload in memory: a `memo.stores.protocols.Source`."""

    __slots__ = ("data", "identity", "users")

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.identity: object | None = object()
        self.users = 0

    def open(self, size: int) -> memoryview:
        """Return a private, writable copy.

        Raises:
            TierError: the payload has another size.
        """
        if len(self.data) != size:
            raise TierError(f"a payload has {len(self.data)} bytes instead of {size}")
        return memoryview(bytearray(self.data))


class _Entry:
    __slots__ = ("digest", "expires", "found", "parsed", "read", "size", "used")

    def __init__(self, found: Found, digest: bytes | None, expires: int | None, size: int) -> None:
        self.found = found
        self.digest = digest
        self.expires = expires
        self.size = size
        self.parsed: object | None = None
        self.read = False
        self.used = next(_uses)


class Memory(_Locked):
    """A `memo.stores.protocols.Tier` in this process.

    Args:
        limit: bytes that this tier may add to the process.
        clock: tells what has expired.
        payload_limit: bytes; of an entry with a larger payload only the record is kept, since a
            tier behind this one maps the payload in less time than a copy takes.
        budget: what this tier shares with others.
    """

    name = where = protocols.MEMORY
    shared = read_only = False

    def __init__(
        self,
        limit: int,
        clock: Clock = SYSTEM_CLOCK,
        *,
        payload_limit: int | None = None,
        budget: Budget = BUDGET,
    ) -> None:
        super().__init__()
        self.limit = limit
        self._payload_limit = payload_limit
        self.generations: Generations | None = MemoryGenerations()
        self._clock = clock
        self._entries: dict[str, _Entry] = {}
        self._queue: list[tuple[int, str]] = []
        self._payloads: dict[bytes, PayloadBytes] = {}
        self._bytes = 0
        self._budget = budget
        budget.add_holder(self)

    @property
    def budget(self) -> int:
        """See `memo.stores.protocols.Tier.budget`."""
        return self.limit

    # --- looking up ------------------------------------------------------------------------------

    async def lookup(self, port: Port, name: str) -> Found | None:
        """See `memo.stores.protocols.Tier.lookup`."""
        entry = self._use(name)
        return None if entry is None else entry.found

    def peek(self, name: str) -> object | None:
        """Return the object remembered beside the record under a name, or None."""
        entry = self._use(name)
        return None if entry is None else entry.parsed

    def at_hand(self, name: str) -> bytes | None:
        """See `memo.stores.protocols.FrontTier.at_hand`; only for a record without a payload."""
        entry = self._use(name)
        return None if entry is None or entry.digest is not None else entry.found.record

    def remember(self, name: str, parsed: object, record: bytes | None = None) -> None:
        """Keep an object beside a record until the record is replaced or dropped.

        Args:
            name: the name of the record.
            parsed: the object that it was parsed into; every `peek` returns this very object.
            record: the record that was parsed; if another one is stored by now, nothing is kept.
        """
        weight = sys.getsizeof(parsed)
        with self._lock:
            entry = self._entries.get(name)
            if entry is None or (record is not None and entry.found.record is not record):
                return
            weight -= 0 if entry.parsed is None else sys.getsizeof(entry.parsed)
            entry.parsed = parsed
            entry.size += weight
            self._bytes += weight
        self._budget.enforce()

    def _use(self, name: str) -> _Entry | None:
        """Return an entry that has not expired, and mark it as most recently used.

        It takes no lock, since it only marks the entry; `_oldest` restores the order of the queue.
        """
        entry = self._entries.get(name)
        if entry is None or (entry.expires is not None and self._clock.boot_ns() >= entry.expires):
            return None
        entry.used = next(_uses)
        entry.read = True
        return entry

    def take_read_names(self) -> list[str]:
        """Return the names looked up since the last call, as far as they are still stored."""
        with self._lock:
            read = [(name, entry) for name, entry in self._entries.items() if entry.read]
        for _, entry in read:
            entry.read = False
        return [name for name, _ in read]

    async def payload(self, port: Port, digest: bytes, size: int) -> Source | None:
        """See `memo.stores.protocols.Tier.payload`."""
        payload = self._payloads.get(digest)
        return payload if payload is not None and len(payload.data) == size else None

    # --- writing ---------------------------------------------------------------------------------

    async def store(
        self,
        port: Port,
        name: str,
        record: bytes,
        payload: Payload | None,
        lifetime: float | None,
    ) -> None:
        """See `memo.stores.protocols.Tier.store`; an entry bigger than the budget is not kept."""
        if payload is not None and self._is_too_big(payload):
            payload = None
        await self.store_whole(port, name, record, payload, lifetime)

    async def store_whole(
        self,
        port: Port,
        name: str,
        record: bytes,
        payload: Payload | None,
        lifetime: float | None,
    ) -> None:
        """See `memo.stores.protocols.FrontTier.store_whole`."""
        size = sys.getsizeof(record) + sys.getsizeof(name) + ENTRY_OVERHEAD_BYTES
        if size + (payload.size if payload else 0) > self.limit:
            await self.drop(port, name)
            return
        expires = None if lifetime is None else self._clock.boot_ns() + int(lifetime * SECOND)
        held = await self._payload_bytes(port, payload)
        with self._lock:
            self._forget(name)
            if payload is None or held is None:
                entry = _Entry(Found(record), None, expires, size)
            else:
                held = self._payloads.setdefault(payload.digest, held)
                held.users += 1
                self._bytes += len(held.data) if held.users == 1 else 0
                entry = _Entry(Found(record, held), payload.digest, expires, size)
            self._insert(name, entry)
            self._bytes += size
            while self._bytes > self.limit and (oldest := self._oldest()) is not None:
                self._forget(oldest)
        self._budget.enforce()

    def held_bytes(self) -> int:
        """See `memo.runtime.memory_budget.Holder.held_bytes`."""
        return self._bytes

    def oldest_use(self) -> int | None:
        """See `memo.runtime.memory_budget.Holder.oldest_use`."""
        with self._lock:
            oldest = self._oldest()
            return None if oldest is None else self._entries[oldest].used

    def evict(self) -> None:
        """See `memo.runtime.memory_budget.Holder.evict`."""
        with self._lock:
            oldest = self._oldest()
            if oldest is not None:
                self._forget(oldest)

    def _insert(self, name: str, entry: _Entry) -> None:
        """Add an entry to the table and the queue; the caller holds the lock."""
        self._entries[name] = entry
        heapq.heappush(self._queue, (entry.used, name))
        if len(self._queue) > 2 * len(self._entries) + SPARE_SLOTS:
            self._queue = [(one.used, name) for name, one in self._entries.items()]
            heapq.heapify(self._queue)

    def _oldest(self) -> str | None:
        """Return the least recently used name, or None; the caller holds the lock.

        Each entry is in the queue with a time of use that is no later than its latest one.
        """
        queue = self._queue
        while queue:
            used, name = queue[0]
            entry = self._entries.get(name)
            if entry is None:
                heapq.heappop(queue)
            elif entry.used != used:
                heapq.heapreplace(queue, (entry.used, name))
            else:
                return name
        return None

    def _is_too_big(self, payload: Payload) -> bool:
        return self._payload_limit is not None and payload.size > self._payload_limit

    async def _payload_bytes(self, port: Port, payload: Payload | None) -> PayloadBytes | None:
        """Return a payload's bytes in one piece: those stored here, or a copy of its buffers."""
        if payload is None:
            return None
        held = self._payloads.get(payload.digest)
        if held is not None:
            return held
        return PayloadBytes(await port.offload(aligned_bytes, payload))

    def _forget(self, name: str) -> bool:
        entry = self._entries.pop(name, None)
        if entry is None:
            return False
        self._bytes -= entry.size
        if entry.digest is not None:
            held = self._payloads[entry.digest]
            held.users -= 1
            if not held.users:
                del self._payloads[entry.digest]
                self._bytes -= len(held.data)
        return True

    async def drop(self, port: Port, name: str) -> bool:
        """See `memo.stores.protocols.Tier.drop`."""
        with self._lock:
            return self._forget(name)

    async def clear(self, port: Port, prefix: str) -> int:
        """See `memo.stores.protocols.Tier.clear`."""
        with self._lock:
            return sum([self._forget(n) for n in list(self._entries) if n.startswith(prefix)])

    # --- looking at ------------------------------------------------------------------------------

    def entries(self, prefix: str = "") -> Iterator[Listed]:
        """Yield every entry whose name begins with `prefix`."""
        with self._lock:
            found = [(name, one) for name, one in self._entries.items() if name.startswith(prefix)]
        for name, one in found:
            held = None if one.digest is None else self._payloads.get(one.digest)
            size = len(one.found.record) + (0 if held is None else len(held.data))
            entry = getattr(one.parsed, "entry", one.parsed)
            known = entry if isinstance(entry, Entry) else None
            yield Listed(name, one.found.record, size, 0.0, known)

    async def newest(
        self, port: Port, prefixes: Sequence[str], limit: int, *, covers_most: bool
    ) -> list[Listed]:
        """Return the latest entries with one of the prefixes, at most `limit`."""
        every = [one for one in self.entries() if one.name.startswith(tuple(prefixes))]
        return heapq.nlargest(limit, every, key=lambda one: seal.finished_at(one.record))

    async def count_by_prefix(self, port: Port, prefix: str) -> dict[str, int]:
        """Count the names that begin with `prefix`, grouped by the part before the key."""
        with self._lock:
            names = [name for name in self._entries if name.startswith(prefix)]
        return dict(Counter(name.rpartition(":")[0] + ":" for name in names))

    async def names(self, port: Port, prefix: str = "") -> list[str]:
        """Return the names of all entries that begin with `prefix`."""
        with self._lock:
            return [name for name in self._entries if name.startswith(prefix)]

    async def holds(self, port: Port, names: Sequence[str]) -> list[bool]:
        """For each of some names, return True if it is stored here."""
        now = self._clock.boot_ns()
        found = [self._entries.get(name) for name in names]
        return [e is not None and (e.expires is None or now < e.expires) for e in found]

    async def health(self, port: Port) -> Mapping[str, Any]:
        """See `memo.stores.protocols.Tier.health`: up, entries, bytes, budget."""
        with self._lock:
            count, size = len(self._entries), self._bytes
        return {"up": True, "entries": count, "bytes": size, "budget": self.limit}

    def close(self) -> None:
        """Forget everything."""
        with self._lock:
            self._entries.clear()
            self._queue.clear()
            self._payloads.clear()
            self._bytes = 0


class MemoryGenerations(_Locked):
    """Generations of this process; see `memo.stores.protocols.Generations`."""

    def __init__(self) -> None:
        super().__init__()
        self._groups: dict[str, dict[str, str]] = {}

    def read(self, refs: Sequence[Ref]) -> list[State]:
        """Like `states`, but a plain function."""
        return [stamps.state_of(ref, self._groups.get(ref.group, {})) for ref in refs]

    async def states(self, port: Port, refs: Sequence[Ref]) -> list[State]:
        """See `memo.stores.protocols.Generations.states`."""
        return self.read(refs)

    async def stamp_states(self, port: Port, refs: Sequence[Ref]) -> list[State]:
        """See `memo.stores.protocols.Generations.stamp_states`."""
        with self._lock:
            for ref in refs:
                if ALL not in self._groups.get(ref.group, {}):
                    self._change(ref.group, Change({ALL: stamps.token()}))
        return self.read(refs)

    async def turn(self, port: Port, turns: Sequence[Turn], note: str) -> None:
        """See `memo.stores.protocols.Generations.turn`."""
        with self._lock:
            for group, own in generations.by_group(turns).items():
                fields = self._groups.get(group, {})
                self._change(group, generations.change_for_all(fields, own, note))

    async def notes(self, port: Port, ref: Ref) -> list[tuple[str, str]]:
        """See `memo.stores.protocols.Generations.notes`."""
        return generations.notes_for(self._groups.get(ref.group, {}), ref)

    def _change(self, group: str, change: Change) -> None:
        """Replace the fields atomically.

        A concurrent reader sees either the old or the new ones.
        """
        self._groups[group] = generations.apply(self._groups.get(group, {}), change)
