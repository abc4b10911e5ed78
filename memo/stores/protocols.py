"""Tiers: the places where entries lie, and the chain that asks them in turn.

A *tier* holds records under names and knows nothing of what is in them.  A tier that also holds
*generations* can be the *authority* on validity.  Everything is a coroutine over the port, so
that sync and async callers run the same lines.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from memo.errors import TierError
from memo.records.codec import Payload
from memo.records.payload_pieces import Arriving, Sink
from memo.records.seal import Entry
from memo.records.stamp_blocks import Claim
from memo.records.stamp_types import Ref, State
from memo.runtime.named_tuple import NamedTuple
from memo.runtime.port import Port
from memo.settings.secret_keys import Secret
from memo.validity.stamps import Turn

if TYPE_CHECKING:
    from memo.stores.chain import Chain
    from memo.stores.disk.home import Home

MEMORY = "memory"
REDIS = "redis"
DISK = "disk"


def title(tier: str) -> str:
    """The name of a tier in a sentence."""
    return "Redis" if tier == REDIS else tier


@runtime_checkable
class CacheProtocol(Protocol):
    """Protocol of a user's own store: four async methods over bytes make it a tier.

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

    It may forget anything at any time, and need not honour `ttl`: an entry carries its own times.
    """

    async def get(self, key: str) -> bytes | None:
        """The bytes stored under a key, or None."""
        ...

    async def set(self, key: str, value: bytes, ttl: float | None = None) -> Any:
        """Store bytes; `ttl` is in seconds, None for no expiry."""
        ...

    async def delete(self, key: str) -> Any:
        """Forget a key; one that is not there is no error."""
        ...

    async def clear(self) -> Any:
        """Forget everything."""
        ...


LEASE = 30.0
"""Seconds that a cluster lease lives without renewal."""


class Source(Protocol):
    """Source of a payload's bytes."""

    @property
    def identity(self) -> object | None:
        """Names this version of these bytes, so that they are verified once; None: each time."""
        ...

    def open(self, size: int) -> memoryview:
        """All `size` bytes, aligned as stored: a private, writable view (a copy-on-write map).

        What a tier has no copy of any more is opened once: ask the tier for another.

        Raises:
            TierError: the bytes are gone, or are not `size` bytes.
        """
        ...


@runtime_checkable
class Vouching(Protocol):
    """A source whose bytes need not be verified by each process."""

    def vouched(self, digest: bytes) -> bool:
        """True if a process with one of our secrets has verified this version of the bytes."""
        ...

    def vouch(self, digest: bytes) -> None:
        """Record for other processes that this version of the bytes has this digest."""
        ...


Part = tuple[str, Any]
"""A group, and the (name, digest) of each argument or None for anything in it: a `Ref`, or like
one."""


class Found(NamedTuple):
    """A tier's answer for a name.

    Attributes:
        record: as it was stored.
        source: the record's payload where this tier has it, else None.
        states: where the tier is an authority: the present states of the record's generation
            stamps, in the order of the stamps, read together with the record.  Else None.
        read: where the tier is an authority: gives the present states of parts of groups, read
            together with the record; None where these were not read.  Asked only about a record
            whose seal held, it learns what to read with the next.
    """

    record: bytes
    source: Source | None = None
    states: tuple[State, ...] | None = None
    read: Callable[[Sequence[Part]], tuple[State, ...] | None] | None = None


class Asked:
    """A question to a tier that is under way; each tier that can be asked so has its own kind.

    Args:
        answer: what `Port.settle` makes the tier's answer of; its settler puts it back.

    Attributes:
        begun: when, on the performance counter.
        since: `Flights.landed` at that time.
        chain: the chain that asked.
        name: what was looked up.
        entry: the entry whose states were asked for; None: a record was.
        before: what this host read of the refs that are read along; None: there is no host.
    """

    __slots__ = ("answer", "before", "begun", "chain", "entry", "name", "since")

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.begun = 0.0
        self.since = 0
        self.chain: object = None
        self.name = ""
        self.entry: Any = None
        self.before: Sequence[State] | None = None

    def found(self) -> Any:
        """The answer, once it is settled.

        Raises:
            TierError: the tier did not do its work.
        """
        raise NotImplementedError


@runtime_checkable
class Prompt(Protocol):
    """A tier that can be asked by a plain function, so that a hit costs no coroutine.

    None is the answer where it cannot: `Tier.lookup` and `Generations.states` can.
    """

    async def get_ready(self, port: Port) -> None:
        """Get ready to be asked on an event loop.  Raises `TierError`."""
        ...

    def ask(self, port: Port, name: str, refs: Sequence[Ref] = ()) -> Asked | None:
        """Begin to look up a name: a `Found`, or None; refs are read along, for `begun`."""
        ...

    def question(self, name: str, refs: Sequence[Ref]) -> Asked | None:
        """As `ask`, not sent yet: `send` does that, or a lease is acquired with it."""
        ...

    def send(self, port: Port, asked: Asked) -> bool:
        """Begin to ask a question; False where that takes a coroutine."""
        ...

    def begun(self, asked: Asked) -> list[State] | None:
        """As `Generations.begin` for the refs that were read along; None where that takes more.

        Raises:
            TierError: the tier did not do its work.
        """
        ...

    def ask_states(self, port: Port, refs: Sequence[Ref]) -> Asked | None:
        """Begin to read refs: a tuple of states, or None where that takes more."""
        ...


class Listed(NamedTuple):
    """An entry, for `memo ls` and `%cache_ls`.

    Attributes:
        name: what it is stored under.
        record: as stored.
        size: bytes of the record and its payload.
        stored_at: Unix seconds.
        entry: what the record was found to be, where that is known.
    """

    name: str
    record: bytes
    size: int
    stored_at: float
    entry: Entry | None = None


class Tier(Protocol):
    """A place for records.  Every method raises `TierError` when it could not do its work."""

    @property
    def name(self) -> str:
        """Name in events and statistics: `"memory"`, `"redis"`, `"disk"`, or a class' name."""
        ...

    @property
    def where(self) -> str:
        """Identity of the store: an invalidation that it missed is replayed to the same one."""
        ...

    @property
    def generations(self) -> Generations | None:
        """Its generations, where it can be an authority."""
        ...

    @property
    def shared(self) -> bool:
        """True if other hosts see it too, so that it decides on validity."""
        ...

    @property
    def read_only(self) -> bool:
        """True if it takes no writes now."""
        ...

    @property
    def budget(self) -> int | None:
        """Bytes that it may hold in all; None: another program decides that."""
        ...

    async def lookup(self, port: Port, name: str) -> Found | None:
        """Look up a name; None: there is nothing."""
        ...

    async def payload(self, port: Port, digest: bytes, size: int) -> Source | None:
        """A payload by its digest, if this tier has it."""
        ...

    async def store(
        self,
        port: Port,
        name: str,
        record: bytes,
        payload: Payload | None,
        lifetime: float | None,
    ) -> None:
        """Keep a record and its payload for `lifetime` seconds (None: for good), whole or not."""
        ...

    async def drop(self, port: Port, name: str) -> bool:
        """Forget a name; True when it was there."""
        ...

    async def clear(self, port: Port, prefix: str) -> int:
        """Forget every name that begins with `prefix`; how many were dropped."""
        ...

    async def health(self, port: Port) -> Mapping[str, Any]:
        """Facts for `%cache_stats` and `memo doctor`: at least `{"up": bool}`, sizes in bytes."""
        ...

    def close(self) -> None:
        """Let go of connections and descriptors, which are opened again when they are needed."""
        ...


Kept = tuple[str, bytes, float | None]
"""A name, the record to keep under it, and for how many seconds (None: for good)."""


@runtime_checkable
class StoresMany(Protocol):
    """A tier that keeps many small records at once for less than one after the other."""

    async def store_many(self, port: Port, records: Sequence[Kept]) -> None:
        """As `Tier.store` for records without payloads; where it raises, some may be kept."""
        ...


@runtime_checkable
class Front(Protocol):
    """A tier in this process that can keep an object beside a record, so that it is parsed once."""

    limit: int
    """Bytes that it may add to the process."""

    def read(self) -> list[str]:
        """The names that were read since this was last called."""
        ...

    def peek(self, name: str) -> object | None:
        """The object remembered beside the record under a name."""
        ...

    def at_hand(self, name: str) -> bytes | None:
        """The record that lies under a name now, if it has no payload."""
        ...

    def remember(self, name: str, parsed: object, record: bytes | None = None) -> None:
        """Keep an object beside a record, while that very record lies there."""
        ...


@runtime_checkable
class Near(Protocol):
    """A tier that can look small records up in less time than a coroutine takes."""

    def at_hand(self, name: str) -> bytes | None:
        """The record under a name; None: `lookup` it, which also says what went wrong."""
        ...


@runtime_checkable
class CountsReads(Protocol):
    """A tier that evicts what was not read lately, and counts the reads of tiers above it too."""

    def was_read(self, port: Port, name: str) -> None:
        """Count a read of an entry that a tier above answered."""
        ...

    def count_reads_of(self, front: Callable[[], Iterable[str]]) -> None:
        """Count the names that `front()` gives: those read there since it was last called."""
        ...


@runtime_checkable
class Retains(Protocol):
    """A shared tier in which an entry without a ttl lives for a time after its last use."""

    def was_used(self, port: Port, name: str, entry: Entry, age: float) -> None:
        """Extend the life of an entry that has answered at an age in seconds."""
        ...


@runtime_checkable
class SharesFindings(Protocol):
    """A tier through which hosts tell each other what they found out about a function."""

    name: str

    async def findings(self, port: Port, name: str) -> dict[str, str]:
        """The findings under a name.  Raises `TierError`."""
        ...

    async def add_findings(self, port: Port, name: str, findings: Mapping[str, str]) -> None:
        """Add those that are not there yet.  Raises `TierError`."""
        ...


@runtime_checkable
class SharesSettings(Protocol):
    """A tier that holds the live configuration of all hosts."""

    def live(self) -> dict[str, str]:
        """All of it, in this thread.  Raises `TierError`."""
        ...

    def publish(self, key: str, text: str | None) -> None:
        """Set a key, or remove it, in this thread.  Raises `TierError`."""
        ...


@runtime_checkable
class ChecksRecords(Protocol):
    """A tier that looks into records itself, and so must know what they are sealed with."""

    def trust(self, secrets: tuple[Secret, ...]) -> None:
        """Believe records that one of these secrets sealed, and no others."""
        ...


@runtime_checkable
class Adopting(Protocol):
    """A tier whose entries get the generations of the chain that it joins, such as a bundle."""

    @property
    def name(self) -> str:
        """See `Tier.name`."""
        ...

    def join(self, chain: Chain) -> None:
        """Be a tier of a chain."""
        ...

    async def adopt(self, port: Port) -> None:
        """Note which entries are valid, before anything is invalidated.  Raises `TierError`."""
        ...


@runtime_checkable
class Tracked(Protocol):
    """A shared tier that may push word of what changes there."""

    listener: Listener | None
    """Hears of changes of the generations; None: that was not asked for."""


class Leases(Protocol):
    """Cluster leases, as a shared tier has them.  Raises `TierError` as a `Tier` does."""

    async def acquire(
        self, port: Port, name: str, holder: str, question: Asked | None = None
    ) -> tuple[str, float] | None:
        """Take a free lease; None when taken, else its holder and the seconds it still has.

        Args:
            question: an `Asked` of the same tier, not sent yet: asked behind the lease in the same
                exchange if that is possible, else its `answer` stays None.
        """
        ...

    async def renew(self, port: Port, name: str, holder: str) -> bool:
        """Give it `LEASE` more seconds; False when it is not ours any more."""
        ...

    async def release(self, port: Port, name: str, holder: str) -> None:
        """Free it if it is ours, and wake every waiter."""
        ...

    async def replace(self, port: Port, name: str, old: str, new: str) -> bool:
        """Take it from a holder that is known to be dead; False when that is not the holder."""
        ...

    async def wait(self, port: Port, name: str, timeout: float) -> None:
        """Return when it is released, or after `timeout` seconds."""
        ...


@runtime_checkable
class Leasing(Protocol):
    """A shared tier that has leases."""

    @property
    def leases(self) -> Leases:
        """Its leases."""
        ...


@runtime_checkable
class Lists(Protocol):
    """A tier of this host that can list its entries.  Every method raises `TierError`."""

    @property
    def name(self) -> str:
        """See `Tier.name`."""
        ...

    def entries(self, prefix: str = "") -> Iterator[Listed]:
        """Every entry whose name begins with `prefix`; not for an event loop."""
        ...

    async def names(self, port: Port, prefix: str = "") -> list[str]:
        """The names that begin with `prefix`."""
        ...

    async def heads(self, port: Port, prefix: str) -> dict[str, int]:
        """Count the names that begin with `prefix`, by what they have before the key."""
        ...

    async def newest(
        self, port: Port, prefixes: Sequence[str], most: int, *, all_of_them: bool
    ) -> list[Listed]:
        """The entries stored last, at most so many for each prefix of names.

        Args:
            all_of_them: the prefixes cover most of what is here.
        """
        ...


@runtime_checkable
class Holds(Protocol):
    """A tier that can tell which names it has without reading them."""

    @property
    def name(self) -> str:
        """See `Tier.name`."""
        ...

    async def holds(self, port: Port, names: Sequence[str]) -> list[bool]:
        """True for each name that is here.  Raises `TierError`."""
        ...


@runtime_checkable
class Searches(Protocol):
    """A shared tier that can be searched for entries, for as long as there is time."""

    async def listed(
        self, port: Port, prefix: str, until: float, most: int | None = None
    ) -> tuple[list[tuple[str, bytes]], bool]:
        """Name and record of the entries whose names begin with `prefix`, and whether that is all.

        Args:
            until: when to stop, on the monotonic clock.
            most: stop when there are so many.

        Raises:
            TierError: it cannot be searched.
        """
        ...


class Listener(Protocol):
    """Word of every change of a shared tier's generations, as it happens: `Tier.listener`.

    An entry verified at a *mark* is valid while no message came about its groups since.
    """

    def mark(self) -> int | None:
        """Mark to keep with what is verified from now on; None: it does not listen (yet)."""
        ...

    def still(self, mark: int, groups: Sequence[str]) -> int | None:
        """A mark, renewed, when it listens and heard nothing of these groups since; else None."""
        ...

    def hear(self, groups: Iterable[str]) -> None:
        """Hear of changed groups from the invalidation itself."""
        ...


@runtime_checkable
class Afar(Protocol):
    """A shared tier that gives its payloads in pieces, and may be stored to in the background."""

    name: str
    value_limit: int
    """Bytes; larger payloads and records are not taken."""

    def takes(self, size: int) -> bool:
        """True if it takes a payload of this size."""
        ...

    def fetch(self, digest: bytes, sink: Sink) -> bool:
        """Hand a payload to a sink, in this thread; False: it is not here.  Raises `TierError`."""
        ...

    async def store(
        self,
        port: Port,
        name: str,
        record: bytes,
        payload: Payload | None,
        lifetime: float | None,
    ) -> None:
        """See `Tier.store`."""
        ...


@runtime_checkable
class Receiving(Protocol):
    """A tier of this host that keeps what comes from afar while it comes."""

    async def receive(
        self, port: Port, name: str, record: bytes, payload: Arriving, lifetime: float | None
    ) -> Source | None:
        """Keep a record and a payload that is fetched now, as `store` does; where it lies then."""
        ...


class Generations(Protocol):
    """Generations that a tier holds: see `stamps`.  Raises `TierError` as a `Tier` does."""

    async def states(self, port: Port, refs: Sequence[Ref]) -> list[State]:
        """Read each ref; `LOST` for a group that has no `*`."""
        ...

    async def begin(self, port: Port, refs: Sequence[Ref]) -> list[State]:
        """As `states`, but a group without `*` gets one first: for stamps before computing."""
        ...

    async def turn(self, port: Port, turns: Sequence[Turn], note: str) -> None:
        """Invalidate: write one fresh token per turn (and to `!`), each group atomically.

        `note` is JSON for people (`by`, `at`, `reason`), kept behind the token.
        """
        ...

    async def notes(self, port: Port, ref: Ref) -> list[tuple[str, str]]:
        """(field, note) of every invalidation that a ref has seen, for `explain`."""
        ...


class Census(NamedTuple):
    """Hosts of a namespace, as a shared tier has them.

    Attributes:
        epoch: a token made when the tier was first used, or first used after it lost its data.
        made: when, in Unix seconds.
        others: how many other hosts are registered.
        given_back: whether another host that took itself for the only one has given groups back.
        times: how often this host has registered, this time included; None: it is not known.
        now: when it has this time, in Unix seconds.
    """

    epoch: str
    made: float
    others: int
    given_back: bool
    times: int | None
    now: float


@runtime_checkable
class Losable(Protocol):
    """A shared tier with generations that may come back without them.

    Attributes:
        on_lost: called with groups that are missing, before they count as lost; whether any of
            them is there now.
        tomb: seconds that a group lives which an invalidation finds missing.
    """

    name: str
    tomb: float
    where: str
    on_lost: Callable[[Port, Sequence[str]], Coroutine[Any, Any, bool]] | None

    @property
    def interruptions(self) -> int:
        """Unchanged since a moment: it is the same server, and it has not restarted since."""
        ...

    @property
    def read_only(self) -> bool:
        """See `Tier.read_only`."""
        ...

    async def census(self, port: Port, host: str, epoch: str) -> Census:
        """Register a host that has seen an epoch (`""`: none); the registered hosts."""
        ...

    async def seed(self, port: Port, groups: Mapping[str, Mapping[str, str]]) -> None:
        """Write those of some groups that are missing: field -> value."""
        ...

    async def giving_back(self, port: Port, host: str) -> None:
        """Note that a host gives groups back as the only one; `""`: it was not the only one."""
        ...

    async def turn(self, port: Port, turns: Sequence[Turn], note: str) -> None:
        """See `Generations.turn`."""
        ...


class Journal(Protocol):
    """Invalidations that a shared tier has not had yet, on this host's disk."""

    def add(self, turns: Sequence[Turn], note: str) -> int:
        """Write one down, durably, and turn the host's own generations with it; its number."""
        ...

    def fail(self, row: int) -> None:
        """Note that one did not reach the shared tier: the next read there replays it first."""
        ...

    def done(self, row: int) -> None:
        """Strike one that reached the shared tier."""
        ...

    async def overdue(self, port: Port) -> bool:
        """True if any must be replayed before the next read from a shared tier; about 1 µs."""
        ...

    def maybe_due(self) -> bool:
        """As `overdue`, at once: True where that takes longer than a moment to tell."""
        ...

    def rows(self) -> list[tuple[int, list[Turn], str]]:
        """(number, turns, note) of the rows that are due."""
        ...


class HostGenerations(Generations, Protocol):
    """The generations that the processes of one host share."""

    def read(self, refs: Sequence[Ref]) -> list[State]:
        """As `states`, as a plain function."""
        ...

    def texts(self, claims: Iterable[Claim]) -> list[str]:
        """The text of what each generation reads now.

        Raises:
            TierError: the host cannot tell.
            EntryError: a claim cannot be read.
        """
        ...

    def learn(self, refs: Sequence[Ref], before: Sequence[State], now: Sequence[State]) -> None:
        """Adopt what a shared authority reads, where this host still reads `before`."""
        ...

    def names(self, kind: str, most: int) -> list[str]:
        """Names of the groups of one kind (`"f:"`, `"p:"`, `"t:"`), at most `most`."""
        ...

    def tables(self, groups: Sequence[str]) -> dict[str, dict[str, str]]:
        """The fields of groups; those that this host does not have are left out."""
        ...

    def all_names(self) -> list[str]:
        """All groups that this host has."""
        ...

    async def outlive(self, port: Port, groups: Iterable[str], lifetime: float | None) -> None:
        """Let groups be known for as long as an entry that names them; None: it has no end."""
        ...

    def sweep_due(self) -> bool: ...

    async def sweep(self, port: Port) -> int:
        """Forget the groups that no entry can name any more; how many.

        Raises:
            TierError: it could not be written.
        """
        ...

    async def clear(self, port: Port) -> None:
        """Forget all groups but that of the namespace.

        Raises:
            TierError: it could not be written.
        """
        ...

    def owe(self, turns: Sequence[Turn], note: str, error: TierError) -> str:
        """An invalidation could not be written; what happens now, for people."""
        ...


class Lock(Protocol):
    """A lock that the kernel frees when its holder dies."""

    def try_acquire(self, holder: str = "") -> bool: ...

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
    def home(self) -> Home: ...

    def noted(self, name: str) -> str: ...

    def note(self, name: str, text: str) -> None: ...

    def lock(self, name: str) -> Lock: ...
