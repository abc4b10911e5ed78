"""The interfaces of tiers, and of the state that the processes of a host share.

A *tier* stores records under names and knows nothing of their contents.  A tier that also stores
*generations* can be the *authority* on validity.  Methods that do I/O are coroutines over the port,
so that sync and async callers run the same code.

=============== ====================================================================================
`CacheProtocol` all that a user's own store needs; `custom` makes a tier of it
`Tier`          required of every tier
`StoresMany`    optional: store many small records in one step
`ChecksRecords` optional: check seals before the chain does
`Listable`      optional: list the entries, for tiers of this host
`Adopting`      optional: entries from elsewhere that get this host's generations, as in a bundle
`FrontTier`     the memory tier
`LocalTier`     the disk tier
`ServerTier`    Redis
=============== ====================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from memo.errors import TierError
from memo.records.codec import Payload
from memo.records.payload_pieces import IncomingPayload, PayloadSink
from memo.records.seal import Entry
from memo.records.stamp_blocks import PackedGeneration
from memo.records.stamp_types import Ref, State
from memo.runtime.named_tuple import NamedTuple
from memo.runtime.port import Port
from memo.settings.secret_keys import Secret
from memo.validity.stamps import Turn

if TYPE_CHECKING:
    from memo.stores.chain import Chain
    from memo.stores.disk.cache_directory import CacheDirectory

MEMORY = "memory"
REDIS = "redis"
DISK = "disk"
BIG_RECORD_BYTES = 1 << 20
"""A record of more bytes is read from its file, and its seal checked, off the event loop."""


def function_in(name: str) -> str:
    """Return the id of the function in the name of an entry; `Chain.name` makes such names."""
    return name.partition("{")[2].rpartition("}:")[0]


def key_in(name: str) -> str:
    """Return the key in the name of an entry."""
    return name.rpartition(":")[2]


def display_name(tier: str) -> str:
    """Return the name of a tier as part of a sentence."""
    return "Redis" if tier == REDIS else tier


@runtime_checkable
class CacheProtocol(Protocol):
    """Interface of a user's own store: four async methods over bytes make it a tier.

    ::

        class InADict:
            def __init__(self):
                self.store = {}
            async def get(self, key):
                return self.store.get(key)
            async def set(self, key, value, ttl=None):
                self.store[key] = value
            async def delete(self, key):
                self.store.pop(key, None)
            async def clear(self):
                self.store.clear()

    It may forget anything at any time, and may ignore `ttl`: an entry carries its own times.
    An invalidation that it missed is replayed to the next store of the same class; if there are
    several on a host, an attribute `where` (a text) that differs tells them apart.
    """

    async def get(self, key: str) -> bytes | None:
        """Return the bytes stored under a key, or None."""
        ...

    async def set(self, key: str, value: bytes, ttl: float | None = None) -> Any:
        """Store bytes for `ttl` seconds; None: they do not expire."""
        ...

    async def delete(self, key: str) -> Any:
        """Delete a key; do nothing if it is missing."""
        ...

    async def clear(self) -> Any:
        """Delete everything."""
        ...


class Source(Protocol):
    """The bytes of a payload, in memory or in a file."""

    @property
    def identity(self) -> object | None:
        """Identifies this version of the bytes, to verify it only once; None: verify each time."""
        ...

    def open(self, size: int) -> memoryview:
        """Return all `size` bytes, aligned as stored, as a private and writable view.

        A source of bytes that the tier no longer has can be opened only once: ask the tier for
        another.

        Raises:
            TierError: the bytes are gone, or there are not `size` of them.
        """
        ...


@runtime_checkable
class SharesVerification(Protocol):
    """A source whose bytes one process verifies for all processes of the host."""

    def is_verified(self, digest: bytes) -> bool:
        """True if a process with one of our secrets has verified this version of the bytes."""
        ...

    def mark_verified(self, digest: bytes) -> None:
        """Record for other processes that this version of the bytes has this digest."""
        ...


GroupPart = tuple[str, Any]
"""A group, and the (name, digest) of each argument, or None for the whole group; as in `Ref`."""


class Found(NamedTuple):
    """A tier's answer for a name.

    Attributes:
        record: the record as it was stored.
        source: the source of its payload, if this tier has it, else None.
        states: the current states of the record's generation stamps, in the order of the stamps, if
            the tier is an authority and read them with the record; else None.
        states_of: returns the current states of parts of groups, if they were read with the record;
            else None.  It is called only for a record with a valid seal, and learns from that what
            to read with the next one.
    """

    record: bytes
    source: Source | None = None
    states: tuple[State, ...] | None = None
    states_of: Callable[[Sequence[GroupPart]], tuple[State, ...] | None] | None = None


class Listed(NamedTuple):
    """A stored entry, as listed by `memo ls` and `%cache_ls`.

    Attributes:
        name: the name that it is stored under.
        record: the record as stored.
        size: bytes of the record and its payload.
        stored_at: Unix seconds.
        entry: the parsed record, if the tier has it.
    """

    name: str
    record: bytes
    size: int
    stored_at: float
    entry: Entry | None = None


class Tier(Protocol):
    """A store of records.  Every method raises `TierError` if it fails."""

    @property
    def name(self) -> str:
        """Name in events and statistics: `"memory"`, `"redis"`, `"disk"`, or a class name."""
        ...

    @property
    def where(self) -> str:
        """Identifies the store: an invalidation that it missed is replayed to the same one."""
        ...

    @property
    def generations(self) -> Generations | None:
        """Its generations, if it can be an authority."""
        ...

    @property
    def shared(self) -> bool:
        """True if other hosts use it too, so that it decides on validity."""
        ...

    @property
    def read_only(self) -> bool:
        """True if it accepts no writes now."""
        ...

    @property
    def budget(self) -> int | None:
        """Maximum number of bytes that it holds; None: another program decides that."""
        ...

    async def lookup(self, port: Port, name: str) -> Found | None:
        """Look up a name; None if nothing is stored under it."""
        ...

    async def payload(self, port: Port, digest: bytes, size: int) -> Source | None:
        """Return a payload by its digest, if this tier has it."""
        ...

    async def store(
        self,
        port: Port,
        name: str,
        record: bytes,
        payload: Payload | None,
        lifetime: float | None,
    ) -> None:
        """Store a record and its payload atomically for `lifetime` seconds; None: forever."""
        ...

    async def drop(self, port: Port, name: str) -> bool:
        """Drop a name; True if it was stored."""
        ...

    async def clear(self, port: Port, prefix: str) -> int:
        """Drop every name that begins with `prefix`; return their number."""
        ...

    async def health(self, port: Port) -> Mapping[str, Any]:
        """Return facts for `%cache_stats` and `memo doctor`: at least `{"up": bool}`."""
        ...

    def close(self) -> None:
        """Close connections and descriptors; they are opened again when needed."""
        ...


# --- optional abilities of a tier ----------------------------------------------------------------


RecordToStore = tuple[str, bytes, float | None]
"""A name, the record to store under it, and its lifetime in seconds (None: forever)."""


@runtime_checkable
class StoresMany(Protocol):
    """A tier that stores many small records in one step."""

    async def store_many(self, port: Port, records: Sequence[RecordToStore]) -> None:
        """Like `Tier.store`, without payloads; if it raises, some records may have been stored."""
        ...


@runtime_checkable
class ChecksRecords(Protocol):
    """A tier that checks seals itself, and so needs the secrets."""

    def trust(self, secrets: tuple[Secret, ...]) -> None:
        """Accept only what one of these secrets has sealed."""
        ...


@runtime_checkable
class Listable(Protocol):
    """A tier of this host that can list its entries.  Every method raises `TierError`."""

    @property
    def name(self) -> str:
        """See `Tier.name`."""
        ...

    def entries(self, prefix: str = "") -> Iterator[Listed]:
        """Yield every entry whose name begins with `prefix`; not for an event loop."""
        ...

    async def names(self, port: Port, prefix: str = "") -> list[str]:
        """Return the names that begin with `prefix`."""
        ...

    async def count_by_prefix(self, port: Port, prefix: str) -> dict[str, int]:
        """Count the names that begin with `prefix`, grouped by the part before the key."""
        ...

    async def newest(
        self, port: Port, prefixes: Sequence[str], limit: int, *, covers_most: bool
    ) -> list[Listed]:
        """Return the entries stored last, at most `limit` for each prefix of names.

        Args:
            covers_most: the prefixes cover most entries of the tier.
        """
        ...

    async def holds(self, port: Port, names: Sequence[str]) -> list[bool]:
        """For each of some names, return True if it is stored here."""
        ...


@runtime_checkable
class Adopting(Protocol):
    """A tier whose entries get the generations of the chain that it joins, such as a bundle."""

    @property
    def name(self) -> str:
        """See `Tier.name`."""
        ...

    def join(self, chain: Chain) -> None:
        """Become a tier of a chain."""
        ...

    async def adopt(self, port: Port) -> None:
        """Note which entries are valid, before anything is invalidated.  Raises `TierError`."""
        ...


# --- kinds of tiers ------------------------------------------------------------------------------


@runtime_checkable
class FrontTier(Tier, Protocol):
    """The memory tier: it can keep an object beside a record, so that it is parsed once."""

    limit: int
    """Bytes that it may add to the process."""

    async def store_whole(
        self,
        port: Port,
        name: str,
        record: bytes,
        payload: Payload | None,
        lifetime: float | None,
    ) -> None:
        """Store an entry that no other tier took, with its payload, however big that is."""
        ...

    def take_read_names(self) -> list[str]:
        """Return the names that were read since the last call, and start a new list."""
        ...

    def peek(self, name: str) -> object | None:
        """Return the object remembered beside the record under a name."""
        ...

    def at_hand(self, name: str) -> bytes | None:
        """Return the record stored under a name now, if it has no payload."""
        ...

    def remember(self, name: str, parsed: object, record: bytes | None = None) -> None:
        """Keep an object beside a record, as long as that very record is stored."""
        ...


@runtime_checkable
class LocalTier(Tier, Protocol):
    """The disk tier: can be read without a coroutine, and stores payloads from a shared tier.

    It evicts what was not read lately, and counts the reads of the tiers above it too.
    """

    def at_hand(self, name: str) -> bytes | None:
        """Return the record under a name; None: use `lookup`, which also reports errors."""
        ...

    def record_read(self, port: Port, name: str) -> None:
        """Count a read of an entry, here or in a tier above."""
        ...

    def count_reads_of(self, front: Callable[[], Iterable[str]]) -> None:
        """Count the reads of a tier above too: `front()` returns the names read there since."""
        ...

    async def receive(
        self, port: Port, name: str, record: bytes, payload: IncomingPayload, lifetime: float | None
    ) -> Source | None:
        """Store a record, and the payload while it is fetched; return the source of the payload."""
        ...


RestoreGroups = Callable[[Port, Sequence[str]], Coroutine[Any, Any, bool]]
"""Restores missing groups of a server; returns True if there were any to restore."""


@runtime_checkable
class ServerTier(Tier, Protocol):
    """A server that all hosts share: Redis.

    Attributes:
        value_limit: bytes; larger payloads and records are refused.
    """

    value_limit: int

    @property
    def generations(self) -> Generations:
        """Its generations: it decides on validity while it is up."""
        ...

    @property
    def client(self) -> ServerClient:
        """The client of the server."""
        ...

    @property
    def leases(self) -> Leases:
        """Its leases."""
        ...

    @property
    def listener(self) -> Listener | None:
        """Receives changes of the generations; None: the server does not push them."""
        ...

    # Lookups by plain functions, so that a hit needs no coroutine.  If one returns None, use
    # `Tier.lookup` or `Generations.states`.

    async def get_ready(self, port: Port) -> None:
        """Prepare for queries on an event loop.  Raises `TierError`."""
        ...

    def start_lookup(self, port: Port, name: str) -> Lookup | None:
        """Begin to look up a name; the answer is a `Found`, or None."""
        ...

    def prepare_lookup(self, name: str, refs: Sequence[Ref]) -> Lookup | None:
        """Like `start_lookup`, not sent yet: `Lookup.send` or `Leases.acquire` sends it.

        Args:
            refs: refs to read in the same exchange, for `stamp_states_in`.
        """
        ...

    def stamp_states_in(self, lookup: Lookup) -> list[State] | None:
        """Return the states of refs that a lookup has read; None: use `Generations.stamp_states`.

        Raises:
            TierError: the tier failed.
        """
        ...

    def start_reading(self, port: Port, parts: Sequence[GroupPart]) -> Lookup | None:
        """Begin to read parts of groups; the answer is a tuple of states, or None: use `states`."""
        ...

    # What it stores.

    def record_use(self, port: Port, name: str, entry: Entry, age: float) -> None:
        """Extend the life of an entry that has answered at an age in seconds."""
        ...

    async def holds(self, port: Port, names: Sequence[str]) -> list[bool]:
        """For each of some names, return True if it is stored here.  Raises `TierError`."""
        ...

    async def search(
        self, port: Port, prefix: str, until: float, limit: int | None = None
    ) -> tuple[list[tuple[str, bytes]], bool]:
        """Search for entries whose names begin with `prefix`.

        Args:
            until: when to stop, on the monotonic clock.
            limit: the number of entries after which to stop; None: all.

        Returns:
            Their names and records, and True if none were left out.

        Raises:
            TierError: it cannot be searched.
        """
        ...

    # Payloads, in pieces and in the background.

    def accepts_payload(self, size: int) -> bool:
        """True if it can store a payload of this size."""
        ...

    def fetch(self, digest: bytes, sink: PayloadSink) -> bool:
        """Pass a payload to a sink, in this thread; False if it is missing.  Raises `TierError`."""
        ...

    # What hosts share besides entries: the own changes of functions, and the live configuration.

    async def own_changes(self, port: Port, name: str) -> dict[str, str]:
        """Return the own changes stored under a name; see `shared_changes`.  Raises `TierError`."""
        ...

    async def add_own_changes(self, port: Port, name: str, own_changes: Mapping[str, str]) -> None:
        """Add own changes under a name; existing ones stay as they are.  Raises `TierError`."""
        ...

    def live(self) -> dict[str, str]:
        """Return the live configuration; blocks.  Raises `TierError`."""
        ...

    def publish(self, key: str, text: str | None) -> None:
        """Set a key of the live configuration; None removes it.  Blocks.  Raises `TierError`."""
        ...

    # Recovery after the server has lost its data: see `redis.loss_recovery`.

    def set_up_recovery(self, restore: RestoreGroups, tombstone_life: float | None) -> None:
        """Let a host restore groups; done once, at assembly.

        Args:
            restore: called with missing groups before they count as lost.
            tombstone_life: lifetime in seconds of a group that an invalidation has to create; None:
                the server's own.
        """
        ...

    async def census(self, port: Port, host: str, epoch: str) -> Census:
        """Register a host, which has seen an epoch before (`""`: none); count the others."""
        ...

    async def seed(self, port: Port, groups: Mapping[str, Mapping[str, str]]) -> None:
        """Write the groups that are missing, each a mapping of field to value."""
        ...

    async def record_restoring(self, port: Port, host: str) -> None:
        """Record that a host restores groups because it is alone; `""`: no host does."""
        ...


# --- what a server tier consists of --------------------------------------------------------------


class Lookup(Protocol):
    """A lookup in a tier.

    Attributes:
        answer: a future answer for `Port.settle`; the caller replaces it by the result.  None if
            the lookup was not sent.
    """

    answer: Any

    def send(self, port: Port) -> bool:
        """Send the query; False if that needs a coroutine."""
        ...

    def found(self) -> Any:
        """Return the answer, once it is settled.

        Raises:
            TierError: the tier failed.
        """
        ...


class PendingLookup(NamedTuple):
    """A lookup in the shared tier that is under way.

    Attributes:
        chain: the chain that sent it.
        port: the port over which it was sent.
        name: the name that is looked up.
        lookup: the server's part of it.
        tier: name of the tier whose entry it confirms or finds.
        entry: the entry in memory whose states it reads; None if it reads a record.
        since: `Flights.ended_count` when it was sent.
        host_states: this host's states of the refs that are read with it; None if it has none.
    """

    chain: object
    port: Port
    name: str
    lookup: Lookup
    tier: str
    entry: Entry | None = None
    since: int = 0
    host_states: Sequence[State] | None = None


LEASE_SECONDS = 30.0
"""Seconds that a cluster lease lives without renewal."""


class Leases(Protocol):
    """The leases of a server, for all hosts.  Every method raises `TierError` if it fails."""

    async def acquire(
        self, port: Port, name: str, holder: str, lookup: Lookup | None = None
    ) -> tuple[str, float] | None:
        """Take a lease if it is free.

        Args:
            lookup: a lookup in the same tier that was not sent yet: it is sent in the same
                exchange if that is possible, else its `answer` stays None.

        Returns:
            None if the caller has the lease now; else its holder and the seconds that remain.
        """
        ...

    async def renew(self, port: Port, name: str, holder: str) -> bool:
        """Extend it by `LEASE_SECONDS`; False if the holder has lost it."""
        ...

    async def release(self, port: Port, name: str, holder: str) -> None:
        """Release it if the holder has it, and wake every waiter."""
        ...

    async def replace(self, port: Port, name: str, old: str, new: str) -> bool:
        """Hand it over from a holder that is dead; False if `old` does not hold it."""
        ...

    async def wait(self, port: Port, name: str, timeout: float) -> None:
        """Return when it is released, or after `timeout` seconds."""
        ...


class Listener(Protocol):
    """Receives each change of a shared tier's generations: see `ServerTier.listener`.

    An entry verified at a *mark* stays valid until a change of its groups arrives.
    """

    def mark(self) -> int | None:
        """Return a mark for entries that are verified from now on; None if it is not listening."""
        ...

    def renew_mark(self, mark: int, groups: Sequence[str]) -> int | None:
        """Return a renewed mark if no change of these groups came since, else None."""
        ...

    def record_changes(self, groups: Iterable[str]) -> None:
        """Record groups that this process has changed itself."""
        ...


class ServerClient(Protocol):
    """The client of a server that may restart.

    Attributes:
        interruptions: number of interruptions.  As long as it is the same, the server has not
            restarted.
    """

    interruptions: int


class Census(NamedTuple):
    """The hosts of a namespace, as registered in a shared tier.

    Attributes:
        epoch: a token created at the tier's first use, and again at the first use after a data
            loss.
        created_at: when it was created, in Unix seconds.
        others: number of other registered hosts.
        was_restored: another host, which believed to be the only one, has restored groups.
        registrations: number of times this host has registered, including now; None if unknown.
        now: the tier's own time, in Unix seconds.
    """

    epoch: str
    created_at: float
    others: int
    was_restored: bool
    registrations: int | None
    now: float


# --- generations, and what the processes of a host share -----------------------------------------


class Generations(Protocol):
    """Generations that a tier holds: see `stamps`.  Raises `TierError` as a `Tier` does."""

    async def states(self, port: Port, refs: Sequence[Ref]) -> list[State]:
        """Read each ref; `LOST` for a group without a `*` field."""
        ...

    async def stamp_states(self, port: Port, refs: Sequence[Ref]) -> list[State]:
        """Like `states`, but create missing groups first: for the stamps of a computation."""
        ...

    async def turn(self, port: Port, turns: Sequence[Turn], note: str) -> None:
        """Invalidate: write a fresh token for each turn (and to `!`), atomically per group.

        `note` is JSON for display (`by`, `at`, `reason`), stored after the token.
        """
        ...

    async def notes(self, port: Port, ref: Ref) -> list[tuple[str, str]]:
        """Return (field, note) of each invalidation that affects a ref, for `explain`."""
        ...


class Journal(Protocol):
    """Invalidations that a shared tier has not received yet, on this host's disk."""

    def add(self, turns: Sequence[Turn], note: str) -> int:
        """Record an invalidation durably and turn the host's own generations; return its row."""
        ...

    def mark_failed(self, row: int) -> None:
        """Mark a row as not delivered: the next read from the shared tier replays it first."""
        ...

    def mark_done(self, row: int) -> None:
        """Delete a row that reached the shared tier."""
        ...

    async def has_due_rows(self, port: Port, where: str) -> bool:
        """True if rows must be replayed before a shared tier is read; takes about 0.3 µs."""
        ...

    def has_due_rows_now(self, where: str, *, no_opening: bool = False) -> bool:
        """Like `has_due_rows`, in this thread.

        Args:
            where: identifies the shared tier.
            no_opening: return True instead of opening the file.
        """
        ...

    def due_rows(self, where: str | None = None) -> list[tuple[int, list[Turn], str]]:
        """Return (row, turns, note) of the rows that are due for a shared tier; None: for any."""
        ...


class HostGenerations(Generations, Protocol):
    """The generations that the processes of one host share."""

    def read(self, refs: Sequence[Ref]) -> list[State]:
        """Like `states`, but a plain function."""
        ...

    def current_texts(self, packed_generations: Iterable[PackedGeneration]) -> list[str]:
        """Return the current token of each generation.

        Raises:
            TierError: the host's file cannot be read.
            EntryError: a packed generation is malformed.
        """
        ...

    def learn(self, refs: Sequence[Ref], before: Sequence[State], now: Sequence[State]) -> None:
        """Adopt the states read from a shared authority, if this host still reads `before`."""
        ...

    def names(self, kind: str, limit: int) -> list[str]:
        """Return the names of the groups of one kind (`"f:"`, `"p:"`, `"t:"`), at most `limit`."""
        ...

    def fields_of_groups(self, groups: Sequence[str]) -> dict[str, dict[str, str]]:
        """Return the fields of groups; groups that this host does not have are left out."""
        ...

    def all_groups(self) -> list[str]:
        """Return all groups that this host has."""
        ...

    async def extend_life(self, port: Port, groups: Iterable[str], lifetime: float | None) -> None:
        """Keep groups at least as long as the entries that name them; None: forever."""
        ...

    def is_sweep_due(self) -> bool: ...

    async def sweep(self, port: Port) -> int:
        """Delete the groups that no entry can name any more; return their number.

        Raises:
            TierError: it could not be written.
        """
        ...

    async def clear(self, port: Port) -> None:
        """Delete all groups except the namespace's own.

        Raises:
            TierError: it could not be written.
        """
        ...

    def queue_unwritten(self, turns: Sequence[Turn], note: str, error: TierError) -> str:
        """Keep an invalidation that could not be written; return in words what happens next."""
        ...


class Lock(Protocol):
    """A lock that the kernel frees when its holder dies."""

    def try_acquire(self, holder: str = "") -> bool: ...

    def may_be_free(self) -> bool: ...

    def label(self, holder: str) -> None: ...

    def release(self) -> None: ...

    def holder(self) -> str: ...


class Host(Protocol):
    """State that the processes of one host share."""

    @property
    def id(self) -> str: ...

    @property
    def generations(self) -> HostGenerations: ...

    @property
    def journal(self) -> Journal: ...

    @property
    def cache_directory(self) -> CacheDirectory: ...

    def load_note(self, name: str) -> str: ...

    def save_note(self, name: str, text: str) -> None: ...

    def lock(self, name: str) -> Lock: ...
