"""Writing: which tiers of a chain an entry goes to, and in which batches.

A big entry goes to a shared tier in the background, from this host's disk: see `transfers`.  A tier
that refuses an entry causes an event, and the others get it all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress

from memo.errors import TierError
from memo.records.codec import Payload
from memo.records.seal import Entry
from memo.records.stamp_types import Generation, Stamp, Times
from memo.runtime.named_tuple import NamedTuple
from memo.runtime.port import Port
from memo.stores.protocols import MEMORY, FrontTier, Host, StoresMany, Tier, key_in
from memo.stores.transfers import Transfers

BATCHED_RECORD_BYTES = 32 * 1024
"""A record of at most this many bytes may be stored in one batch with others."""
ENTRIES_PER_WRITE = 256
"""Maximum number of entries in one batch: between batches other processes can write."""
BYTES_PER_WRITE = 256 * 1024
"""Bytes of records at which a batch is complete."""


class EntryToStore(NamedTuple):
    """An entry to store: see `Writer.store`."""

    name: str
    record: bytes
    payload: Payload | None
    times: Times


class Writer:
    """Writes entries to the tiers of a chain.

    Args:
        tiers: the tiers of the chain, in order.
        transfers: the uploads and downloads of the chain.
        only_first: write to the first tier after memory only, and to the rest while it is down.
        lifetime: seconds for which tiers keep an entry with these times; None: forever.
        fault: reports a fault of a tier: name of the tier, error, key.

    Attributes:
        host: state that the processes of this host share; None: there is none.
    """

    def __init__(
        self,
        tiers: Sequence[Tier],
        transfers: Transfers,
        *,
        only_first: bool,
        lifetime: Callable[[Times], float | None],
        fault: Callable[[str, TierError, str], None],
    ) -> None:
        self.host: Host | None = None
        self._tiers = tiers
        self._transfers = transfers
        self._only_first = only_first
        self._lifetime = lifetime
        self._fault = fault

    async def store(
        self,
        port: Port,
        name: str,
        record: bytes,
        payload: Payload | None,
        times: Times,
    ) -> tuple[str, ...]:
        """Store an entry as the write strategy says; return the names of the tiers that took it.

        A big entry goes to a shared tier in the background, from this host's disk: see `transfers`.
        """
        lifetime = self._lifetime(times)
        size = len(record) + (payload.size if payload else 0)
        stored, later = [], []
        for tier in self._tiers:
            if self._transfers.can_upload_later(tier, name, len(record), payload):
                later.append(tier)
                continue
            if await self._put(port, tier, name, record, payload, lifetime):
                stored.append(tier.name)
                if self._only_first and tier.name != MEMORY:
                    break
        for tier in later:
            local = self._transfers.local
            if local and local.name in stored and self._transfers.queue_upload(port, name, size):
                continue
            if await self._put(port, tier, name, record, payload, lifetime):
                stored.append(tier.name)
        if payload is not None and stored == [MEMORY]:  # which may have kept the record alone
            memory = next(tier for tier in self._tiers if tier.name == MEMORY)
            if isinstance(memory, FrontTier):
                await memory.store_whole(port, name, record, payload, lifetime)
        return tuple(stored)

    async def store_all(self, port: Port, items: Sequence[EntryToStore]) -> list[tuple[str, ...]]:
        """Like `store`, for several entries; small ones share a transaction or a round trip."""
        if len(items) == 1:
            return [await self.store(port, *items[0])]
        small = [at for at, item in enumerate(items) if self._is_small(item)]
        stored: dict[int, tuple[str, ...]] = {}
        for batch in _batches(small, items) if len(small) > 1 else ():
            tiers = await self._store_some(port, [items[at] for at in batch])
            stored.update(dict.fromkeys(batch, tiers))
        for at, item in enumerate(items):
            if at not in stored:
                stored[at] = await self.store(port, *item)
        return [stored[at] for at in range(len(items))]

    def _is_small(self, item: EntryToStore) -> bool:
        return (
            item.payload is None
            and len(item.record) <= BATCHED_RECORD_BYTES
            and not any(
                self._transfers.can_upload_later(t, item.name, len(item.record))
                for t in self._tiers
            )
        )

    async def _store_some(self, port: Port, items: Sequence[EntryToStore]) -> tuple[str, ...]:
        """Store small entries in one batch; return the names of the tiers that took all of them."""
        kept = [(item.name, item.record, self._lifetime(item.times)) for item in items]
        stored = []
        for tier in self._tiers:
            if isinstance(tier, StoresMany):
                try:
                    await tier.store_many(port, kept)
                except TierError as error:
                    self._fault(tier.name, error, key_in(items[0].name))
                    continue
            else:
                done = [await self._put(port, tier, n, record, None, t) for n, record, t in kept]
                if not all(done):
                    continue
            stored.append(tier.name)
            if self._only_first and tier.name != MEMORY:
                break
        return tuple(stored)

    async def keep_groups(
        self, port: Port, entries: Sequence[tuple[Iterable[Stamp], Times]]
    ) -> None:
        """Keep the host's groups as long as entries with these stamps live; sweep others if due."""
        if self.host is None:
            return
        generations = self.host.generations
        groups: dict[str, None] = {}
        longest: float | None = 0.0
        for stamps, times in entries:
            groups |= {stamp.ref.group: None for stamp in stamps if type(stamp) is Generation}
            life = self._lifetime(times)
            longest = None if life is None or longest is None else max(life, longest)
        await generations.extend_life(port, groups, longest)
        if generations.is_sweep_due():

            async def sweep(port: Port) -> None:
                with suppress(TierError):  # a later write gets the same error, and reports it
                    await generations.sweep(port)

            port.spawn(sweep, "memo-sweep")

    async def _put(
        self,
        port: Port,
        tier: Tier,
        name: str,
        record: bytes,
        payload: Payload | None,
        lifetime: float | None,
    ) -> bool:
        if tier.read_only:
            return False
        try:
            await tier.store(port, name, record, payload, lifetime)
        except TierError as error:
            self._fault(tier.name, error, key_in(name))
            return False
        return True

    async def copy_up(self, port: Port, place: int, name: str, entry: Entry) -> None:
        """Copy an entry to the tiers above the one at a place, with its remaining lifetime."""
        lifetime = self._lifetime(entry.times)
        if self._tiers[place].shared:
            await self.keep_groups(port, [(entry.stamps, entry.times)])
        above = [tier for tier in self._tiers[:place] if not entry.buffers]
        slow = [tier for tier in above if tier.name != MEMORY]
        for tier in above:
            if self._transfers.can_upload_later(tier, name, len(entry.record)):
                slow.remove(tier)
                if self._transfers.uploads.get(name) is None:
                    self._transfers.queue_upload(port, name, len(entry.record))
            elif tier not in slow:
                await self._put(port, tier, name, entry.record, None, lifetime)
        if slow:

            async def work(port: Port) -> None:
                for tier in slow:
                    await self._put(port, tier, name, entry.record, None, lifetime)

            port.spawn(work, "memo-heal")


def _batches(places: Sequence[int], items: Sequence[EntryToStore]) -> Iterator[list[int]]:
    """Split the positions of items into batches; see `ENTRIES_PER_WRITE` and `BYTES_PER_WRITE`."""
    batch: list[int] = []
    size = 0
    for at in places:
        if batch and (len(batch) >= ENTRIES_PER_WRITE or size >= BYTES_PER_WRITE):
            yield batch
            batch, size = [], 0
        batch.append(at)
        size += len(items[at].record)
    if batch:
        yield batch
