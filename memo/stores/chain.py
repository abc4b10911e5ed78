"""The chain: asks its tiers in order; one of them decides what is valid.

Rules of this module:

1.  A record is used only if its seal holds for this namespace and key, its stamps still read the
    same at the *authority*, its timestamps are plausible, and no earlier answer was computed later.
2.  `authorities` decides what is valid.
3.  If a shared authority pushes its changes (`Listener`), an entry in memory that it has confirmed
    stays valid until a change of its groups arrives or this host's generations turn.
4.  A tier that fails causes an event, and the next tier is asked.
5.  Big entries are uploaded to the shared tier from this host's disk, in the background, and are
    downloaded from there to this host's disk: see `transfers`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from operator import itemgetter
from typing import Any, Literal, cast

from memo.errors import EntryError, OptionError, TierError, TierUnavailable, public, shown
from memo.records import seal
from memo.records.seal import Entry, Header
from memo.records.stamp_types import Ref, State, Times
from memo.runtime import events
from memo.runtime.clock import SECOND, SYSTEM_CLOCK, Clock
from memo.runtime.events import MISS
from memo.runtime.named_tuple import NamedTuple
from memo.runtime.port import Port
from memo.runtime.reasons import (
    ABSENT,
    OLDER,
    PAYLOAD_MISSING,
    UNREACHABLE,
)
from memo.settings.secret_keys import Secret
from memo.stores.authorities import Authorities, is_for_any, receivers
from memo.stores.confirmed import Confirmation, ConfirmedEntries
from memo.stores.protocols import (
    BIG_RECORD_BYTES,
    MEMORY,
    Adopting,
    ChecksRecords,
    Found,
    FrontTier,
    Host,
    Listable,
    LocalTier,
    PendingLookup,
    ServerTier,
    Source,
    Tier,
    key_in,
)
from memo.stores.shared_changes import SharedChanges
from memo.stores.transfers import Transfers, Work
from memo.stores.writing import Writer
from memo.validity import check
from memo.validity.check import Judge, LatestAnswers, Verdict, age, state_texts, why_changed

_group_part = itemgetter(1, 2)
"""The part of a group that a `PackedGeneration` names."""

ReadStrategy = Literal["on_miss_or_error", "on_error"]
WriteStrategy = Literal["write_through", "write_around"]


class Answer(NamedTuple):
    """The chain's answer for a key.

    Attributes:
        verdict: how the entry may be used.
        entry: the entry; for a miss only with `verdict.fallback` or `verdict.renewable`.
        tier: the name of the tier that answered.
        source: the source of the entry's payload, if it has one.
    """

    verdict: Verdict
    entry: Entry | None = None
    tier: str = ""
    source: Source | None = None


class Chain:
    """Tiers in the order in which they are asked.

    A call first asks `at_hand`; if that sends a lookup, `finish_lookup` ends it.  If nothing was at
    hand, `lookup` asks every tier.  A lookup may be sent before: `start_lookup` is for an element
    of a collection, `prepare_lookup` and `lookup_with_stamps` also read the stamps of the
    computation that follows a miss.

    Args:
        tiers: `Tier` objects; what `CacheFallbackFactory.create` makes of names and user classes.
        read_strategy: `"on_miss_or_error"`: ask the next tier when one has no usable entry or
            fails; `"on_error"`: only when it fails.  A memory tier in front is always asked, and
            never ends the search.
        write_strategy: `"write_through"`: every tier; `"write_around"`: the first (after memory)
            only, the rest while it is down.
        self_healing: write what a lower tier answered back above it, in the background, with its
            remaining lifetime.

    Attributes:
        first: name of the first tier.
        front: the memory tier, if it is the first one, or None.
        host: state that the processes of this host share; None: there is none.
        uploads: entries on their way to the shared tier.
        writer: writes entries to the tiers.
        listing: the tiers that can list their entries.
        leases: the leases of the first tier that has any; None if no tier has.

    Raises:
        OptionError: an unknown strategy, or no tier.
    """

    @public
    def __init__(
        self,
        tiers: Sequence[Tier],
        *,
        read_strategy: ReadStrategy = "on_miss_or_error",
        write_strategy: WriteStrategy = "write_through",
        self_healing: bool = True,
    ) -> None:
        _check_options(tiers, read_strategy, write_strategy)
        self.tiers = tuple(tiers)
        self.read_strategy = read_strategy
        self.write_strategy = write_strategy
        self.self_healing = self_healing
        self.namespace = "memo"
        self.secrets: tuple[Secret, ...] = ()
        self._secret_id = ""
        self._checked = seal.CheckedRecords((), self.namespace)
        self.clock: Clock = SYSTEM_CLOCK
        self.host: Host | None = None
        self.authorities = Authorities(self.tiers, self._fault)
        self._classify_tiers()
        self.shared_changes = SharedChanges(None, self.namespace, (), self._fault)
        self.latest_answers = LatestAnswers(0 if self.front is None else self.front.limit)
        self._transfers = Transfers(
            [tier for tier in self.tiers if not tier.read_only],
            writes_to_all=write_strategy == "write_through",
            asks_all=read_strategy == "on_miss_or_error",
            open_entry=self.open_entry,
            lifetime=self._lifetime,
            fault=self._fault,
        )
        self.uploads = self._transfers.uploads
        self.writer = Writer(
            self.tiers,
            self._transfers,
            only_first=write_strategy == "write_around",
            lifetime=self._lifetime,
            fault=self._fault,
        )

    def _classify_tiers(self) -> None:
        """Note which tiers can do what, so that no call has to check it.

        `_authority` is the shared tier that decides on validity, if there is one, and
        `_authority_server` the same tier if it is a server; a user's shared store is none.
        `_quick_disk` and `_quick_server` are the tiers that `at_hand` may read or ask.
        """
        tiers, authority = self.tiers, self.authorities.shared
        first: object = tiers[0]
        self.first = tiers[0].name
        self.listing = tuple(tier for tier in tiers if isinstance(tier, Listable))
        self._server = next((tier for tier in tiers if isinstance(tier, ServerTier)), None)
        self.leases = None if self._server is None else self._server.leases
        self._disk = next((tier for tier in tiers if isinstance(tier, LocalTier)), None)
        self.front = first if isinstance(first, FrontTier) else None
        self._authority = authority
        self._quick_disk = first if isinstance(first, LocalTier) and authority is None else None
        self._authority_server = authority if isinstance(authority, ServerTier) else None
        listener = self.authorities.listener
        self._asks_each_time = authority is not None and listener is None
        self._confirmed: ConfirmedEntries | None = None
        if self.front is not None and listener is not None:
            self._confirmed = ConfirmedEntries(self.front, listener, self.authorities, self._fault)
        behind = tiers[self.front is not None :]
        self._quick_server = None
        if self._confirmed is None and authority is not None and authority is behind[0]:
            self._quick_server = self._authority_server

    def set_up(
        self,
        namespace: str,
        secrets: tuple[Secret, ...],
        host: Host | None,
        *,
        trusts_disk: bool = False,
    ) -> Chain:
        """Give the chain its namespace, secrets and host; done once, at assembly."""
        self.namespace = namespace
        self.secrets = secrets
        self._secret_id = secrets[0].id.hex()
        self._checked = seal.CheckedRecords(secrets, namespace)
        self.host = self.writer.host = host
        self.authorities.set_up(host, trusts_disk=trusts_disk)
        self.shared_changes = SharedChanges(self._server, namespace, secrets, self._fault)
        for tier in self.tiers:
            if isinstance(tier, ChecksRecords):
                tier.trust(secrets)
            if isinstance(tier, Adopting):
                tier.join(self)
            if isinstance(tier, LocalTier) and self.front is not None:
                tier.count_reads_of(self.front.take_read_names)
        return self

    def __repr__(self) -> str:
        return f"<Chain {' > '.join(t.name for t in self.tiers)}>"

    # --- names -----------------------------------------------------------------------------------

    def name(self, function: str, key: str, secret: Secret | None = None) -> str:
        """Return the name of an entry: namespace, function, the secret's id, and the key."""
        secret_id = self._secret_id if secret is None else secret.id.hex()
        return f"{self.namespace}:{{{function}}}:{secret_id}:{key}"

    def prefix(self, function: str) -> str:
        """Return the common prefix of the names of a function's entries.

        The braces are a Redis hash tag.
        """
        return f"{self.namespace}:{{{function}}}:"

    # --- reading ---------------------------------------------------------------------------------

    async def lookup(
        self,
        port: Port,
        function: str,
        key: str,
        judge: Judge,
        pending: PendingLookup | None = None,
        exclude: Tier | None = None,
    ) -> Answer:
        """Return the best usable entry of a key, under any of the secrets, newest secret first.

        Args:
            pending: the lookup that `start_lookup` began for this key, answered by now.
            exclude: a tier that is neither asked nor written to.
        """
        answer = await self._lookup(port, self.name(function, key), key, judge, pending, exclude)
        if answer.verdict.reason != ABSENT:
            return answer
        for secret in self.secrets[1:]:
            name = self.name(function, key, secret)
            older = await self._lookup(port, name, key, judge, None, exclude)
            if older.verdict.reason != ABSENT:
                return older
        return answer

    async def _lookup(
        self,
        port: Port,
        name: str,
        key: str,
        judge: Judge,
        pending: PendingLookup | None = None,
        exclude: Tier | None = None,
    ) -> Answer:
        miss = Answer(Verdict(MISS, ABSENT))
        for place, tier in enumerate(self.tiers):
            if tier is exclude:
                continue
            try:
                found = await self._ask(port, tier, name, pending)
            except TierError as error:
                self._fault(tier.name, error, key)
                if miss.verdict.reason == ABSENT:
                    miss = Answer(Verdict(MISS, UNREACHABLE))
                continue
            if found is not None:
                answer = await self._judge_found(port, found, tier, name, key, judge)
                if answer.verdict.kind != MISS:
                    self._record_use(port, name, answer.entry, in_authority=tier is self._authority)
                    if place and exclude is None and self.self_healing and answer.entry:
                        await self.writer.copy_up(port, place, name, answer.entry)
                    return answer
                if miss.entry is None:
                    miss = answer
            if self.read_strategy == "on_error" and tier.name != MEMORY:
                break
        return miss

    async def _ask(
        self, port: Port, tier: Tier, name: str, pending: PendingLookup | None
    ) -> Found | None:
        if tier is not self._authority:
            return await tier.lookup(port, name)
        if pending is not None and not self.authorities.was_interrupted():
            return cast("Found | None", pending.lookup.found())
        return await self.authorities.read_shared(port, partial(tier.lookup, port, name))

    async def _judge_found(
        self,
        port: Port,
        found: Found,
        tier: Tier,
        name: str,
        key: str,
        judge: Judge,
    ) -> Answer:
        try:
            if len(found.record) > BIG_RECORD_BYTES:
                entry = await port.offload(self._entry, found, tier, name)
            else:
                entry = self._entry(found, tier, name)
        except EntryError as error:
            self._event(events.ERROR, key, tier.name, error.reason, error.detail)
            return Answer(Verdict(MISS, error.reason))
        if self._confirmed is not None and tier.name == MEMORY:
            states = await self._confirmed.states(port, name, entry)
        else:
            states = self._states_in(found, tier, entry)
        reason = await self.authorities.why_invalid(port, entry.stamps, states)
        if reason and not check.may_answer(reason):
            return Answer(Verdict(MISS, reason))
        if self.latest_answers.is_newer_than(key, entry.times.started):
            return Answer(Verdict(MISS, OLDER))
        verdict = check.final_verdict(
            judge, entry.times, reason, raised=bool(entry.flags & seal.RAISED)
        )
        if verdict.kind == MISS and not (verdict.fallback or verdict.renewable):
            return Answer(verdict)
        source = found.source
        if source is None and entry.buffers:
            source = await self._payload(port, name, entry)
            if source is None:
                return Answer(Verdict(MISS, PAYLOAD_MISSING))
        return Answer(verdict, entry, tier.name, source)

    def _states_in(self, found: Found, tier: Tier, entry: Entry) -> Sequence[State] | None:
        """Return the states that the authority read together with the record.

        None if some are missing.
        """
        if tier is not self._authority:
            return None
        return found.states if found.states_of is None else found.states_of(entry.refs)

    def _entry(self, found: Found, tier: Tier, name: str) -> Entry:
        """Parse the entry in a record; one in memory is parsed and checked only once."""
        front = self.front
        if front is None or tier is not front:
            return self.open_entry(name, found.record)
        known = front.peek(name)
        if type(known) is Confirmation:
            known = known.entry
        if isinstance(known, Entry) and known.record is found.record:
            return known
        entry = self.open_entry(name, found.record).compact()
        front.remember(name, entry, found.record)
        return entry

    def open_entry(self, name: str, record: bytes) -> Entry:
        """Check and parse the entry in a record that was found under a name.

        Raises:
            EntryError: it cannot be read, or its seal does not hold.
        """
        return seal.unpack(record, self.secrets, self.namespace, key_in(name))

    def header_of(self, name: str, record: bytes) -> Header:
        """Return the header of a record found under a name; raises as `open_entry` does."""
        return seal.open_record(record, self.secrets, self.namespace, key_in(name))[0]

    def _parse_at_hand(self, front: FrontTier, name: str, key: str) -> Entry | None:
        """Parse a record in memory for the first time, and remember the entry beside it.

        Raises:
            EntryError: the seal of the record does not hold.
        """
        record = front.at_hand(name)
        if record is None or len(record) > BIG_RECORD_BYTES:  # `lookup` does that off the loop
            return None
        known = seal.unpack_hit(record, self.secrets, self.namespace, key)
        if known is not None:
            front.remember(name, known, record)
        return known

    def at_hand(
        self, port: Callable[[], Port], function: str, key: str, since: int = 0
    ) -> Entry | PendingLookup | None:
        """Return a valid entry without a coroutine, or a lookup for `finish_lookup`, or None.

        An entry comes from the first tier, if this host's generations are the authority or the
        authority pushes its changes.  A lookup goes to the authority, if that is the first tier,
        or the second one and memory has the entry.  None: use `lookup`.

        Args:
            port: called for the port only if one is needed.
            since: see `PendingLookup`.
        """
        name = f"{self.namespace}:{{{function}}}:{self._secret_id}:{key}"  # `name`, one call less
        host = self.host
        try:
            if host is not None and not self._asks_each_time:
                entry = self._entry_in_first(name, key)
                if entry is not None and entry.texts is not None:
                    present = host.generations.current_texts(entry.packed_generations)
                    return None if why_changed(entry.texts, present) else entry
            if self._quick_server is None or self.authorities.has_missed_turns():
                return None
            return self._start_quick_lookup(self._quick_server, port(), name, key, since)
        except (TierError, EntryError):
            return None  # `lookup` gets the same error, and reports it

    def _entry_in_first(self, name: str, key: str) -> Entry | None:
        """Return the entry of the first tier under a name, if a plain function can read it."""
        if self._confirmed is not None:
            return self._confirmed.entry(name)
        front = self.front
        if front is not None:
            known = front.peek(name)
            if known is None:
                return self._parse_at_hand(front, name, key)
            return known if type(known) is Entry else None
        record = None if self._quick_disk is None else self._quick_disk.at_hand(name)
        return None if record is None else self._checked.unpack_hit(name, record, key)

    def _start_quick_lookup(
        self, server: ServerTier, port: Port, name: str, key: str, since: int
    ) -> PendingLookup | None:
        if self.front is None:
            lookup = server.start_lookup(port, name)
            if lookup is None:
                return None
            return PendingLookup(self, port, name, lookup, server.name, None, since)
        entry = self.front.peek(name) or self._parse_at_hand(self.front, name, key)
        if not isinstance(entry, Entry) or not entry.plain:
            return None
        lookup = server.start_reading(port, list(map(_group_part, entry.packed_generations)))
        if lookup is None:
            return None
        return PendingLookup(self, port, name, lookup, self.front.name, entry, since)

    def start_lookup(self, port: Port, function: str, key: str) -> PendingLookup | None:
        """Send the lookup that `lookup` would send to the shared tier; None: use `lookup`.

        For the elements of a collection, whose lookups share round trips in this way.
        """
        return _send(self._prepare_lookup(port, function, key))

    def _prepare_lookup(
        self,
        port: Port,
        function: str,
        key: str,
        refs: Sequence[Ref] = (),
        before: Sequence[State] | None = None,
    ) -> PendingLookup | None:
        """Prepare a lookup of a key in the shared tier; None: use `lookup`."""
        if self._authority_server is None or self.authorities.has_missed_turns():
            return None
        name = self.name(function, key)
        if self.front is not None and self.front.peek(name) is not None:
            return None
        server = self._authority_server
        lookup = server.prepare_lookup(name, refs)
        if lookup is None:
            return None
        return PendingLookup(self, port, name, lookup, server.name, host_states=before)

    async def prepare_lookup(
        self, port: Port, function: str, key: str, refs: Sequence[Ref]
    ) -> PendingLookup | None:
        """Prepare a lookup that also reads the stamps of the computation that follows a miss.

        Args:
            refs: refs to be read in the same exchange, for `Authorities.stamp_states`.
        """
        before = await self.authorities.host_states(port, refs)
        return self._prepare_lookup(port, function, key, refs, before)

    async def lookup_with_stamps(
        self, port: Port, function: str, key: str, refs: Sequence[Ref]
    ) -> PendingLookup | None:
        """Like `prepare_lookup`, sent and awaited."""
        pending = _send(await self.prepare_lookup(port, function, key, refs))
        if pending is not None:
            pending.lookup.answer = await port.settle(pending.lookup.answer)
        return pending

    async def get_ready(self, port: Port) -> None:
        """Connect an event loop to the shared tier, before many lookups at once."""
        if self._authority_server is not None:
            with suppress(TierError):  # `lookup` gets the same error, and reports it
                await self._authority_server.get_ready(port)

    def finish_lookup(self, pending: PendingLookup, key: str) -> Entry | None:
        """Return the entry of an answered lookup if it is valid and has no payload; else None.

        None: use `lookup`.
        """
        entry = pending.entry
        try:
            found = pending.lookup.found()
            if entry is not None:
                states = found
            elif found is None or len(found.record) > BIG_RECORD_BYTES:
                return None
            else:
                entry = self._checked.unpack_hit(pending.name, found.record, key)
                states = (
                    None
                    if entry is None
                    else found.states_of(list(map(_group_part, entry.packed_generations)))
                )
        except (TierError, EntryError):
            return None
        if entry is None or entry.texts is None or states is None:
            return None
        if why_changed(entry.texts, state_texts(states)):
            return None
        if self.authorities.was_interrupted():  # it may have answered from an older state
            return None
        self._record_use(pending.port, pending.name, entry, in_authority=pending.entry is None)
        return entry

    def _record_use(
        self, port: Port, name: str, entry: Entry | None, *, in_authority: bool
    ) -> None:
        """Record that an entry has answered: without a ttl it then lives longer in a shared tier.

        Args:
            in_authority: it was read in the shared tier, so the disk has not counted the read.
        """
        if in_authority and self._disk is not None:
            self._disk.record_read(port, name)
        if entry is not None and entry.times.ttl < 0 and self._authority_server is not None:
            old = age(entry.times, self.clock) or 0
            self._authority_server.record_use(port, name, entry, old / SECOND)

    async def _payload(self, port: Port, name: str, entry: Entry) -> Source | None:
        size = seal.payload_size(entry.header.buffers)
        digest = seal.payload_digest(entry.header.buffers)
        for tier in sorted(self.tiers, key=lambda t: t.shared):
            try:
                if tier.shared:
                    source = await self._transfers.payload(port, tier, name, entry)
                else:
                    source = await tier.payload(port, digest, size)
            except TierError as error:
                self._fault(tier.name, error, entry.header.key)
                continue
            if source is not None:
                return source
        return None

    def _lifetime(self, times: Times) -> float | None:
        """Return the seconds for which tiers keep an entry; None: forever."""
        left = check.kept_for(times, self.clock)
        return None if left is None else max(0.001, left / SECOND)

    # --- all entries -----------------------------------------------------------------------------

    async def drop(self, port: Port, name: str) -> list[str]:
        """Drop one entry; return the tiers that had it."""
        dropped = []
        for tier in self.tiers:
            try:
                if await tier.drop(port, name):
                    dropped.append(tier.name)
            except TierError as error:
                self._fault(tier.name, error)
        return dropped

    async def stored_header(self, port: Port, name: str) -> Header | None:
        """Return the header of an entry from any tier, valid or not; None if no tier has it."""
        for tier in self.tiers:
            try:
                found = await tier.lookup(port, name)
                if found is not None:
                    return self.header_of(name, found.record)
            except (TierError, EntryError):
                continue
        return None

    async def clear(self, port: Port, prefix: str | None = None) -> dict[str, int | str]:
        """Drop all entries with a prefix; return per tier their number, or why it failed.

        Without a prefix it drops the whole namespace and its generations, which the caller has
        invalidated before.
        """
        everything, prefix = prefix is None, prefix or f"{self.namespace}:"
        outcome: dict[str, int | str] = {}
        for tier in self.tiers:
            try:
                outcome[tier.name] = await tier.clear(port, prefix)
            except TierError as error:
                self._fault(tier.name, error)
                outcome[tier.name] = f"failed: {error}"
        if everything and self.host is not None:
            with suppress(TierError):  # a later sweep removes them
                await self.host.generations.clear(port)
        return outcome

    async def health(self, port: Port) -> dict[str, dict[str, Any]]:
        """Return facts about every tier, for display."""
        facts: dict[str, dict[str, Any]] = {}
        for tier in self.tiers:
            try:
                facts[tier.name] = dict(await tier.health(port))
            except TierError as error:
                facts[tier.name] = {"up": False, "error": str(error)}
        if self.host is not None:
            try:
                rows = self.host.journal.due_rows()
            except TierError:  # the disk reports it
                rows = []
            if not any(tier.shared for tier in self.tiers):  # the journal waits for a Redis
                rows = [row for row in rows if not is_for_any(row[2])]
            facts.setdefault("host", {})["journal"] = len(rows)
            if rows:
                facts["host"]["to"] = receivers(row[2] for row in rows)
        return facts

    def after_uploads(self, work: Work) -> bool:
        """Run `work` when the current uploads have ended; False if there is none."""
        return self._transfers.after_uploads(work)

    def close(self) -> None:
        """Close connections and descriptors."""
        for tier in self.tiers:
            tier.close()

    # --- events ----------------------------------------------------------------------------------

    def _fault(self, tier: str, error: TierError, key: str = "") -> None:
        if isinstance(error, TierUnavailable) and error.reported:
            return
        kind = "unavailable" if isinstance(error, TierUnavailable) else "error"
        self._event(events.ERROR, key, tier, kind, str(error))

    def _event(self, kind: str, key: str, tier: str, reason: str, detail: str) -> None:
        events.emit(events.Event(kind, key=key, tier=tier, reason=reason, detail=detail))


def _send(pending: PendingLookup | None) -> PendingLookup | None:
    """Send a prepared lookup; None if that failed or needs a coroutine: use `lookup`."""
    try:
        return pending if pending is not None and pending.lookup.send(pending.port) else None
    except TierError:
        return None  # `lookup` gets the same error, and reports it


def _check_options(tiers: Sequence[Tier], read_strategy: str, write_strategy: str) -> None:
    """Check the arguments of a chain.

    Raises:
        OptionError: one of them is wrong; the message names it.
    """
    if not isinstance(tiers, Sequence):
        fix = "must be a list of tiers; CacheFallbackFactory.create() makes the usual ones."
        raise OptionError("tiers", tiers, fix)
    if not tiers:
        raise OptionError("tiers", tiers, "must name at least one tier.")
    wrong = [tier for tier in tiers if not isinstance(getattr(tier, "name", None), str)]
    if wrong:
        advice = "which is not a tier; CacheFallbackFactory.create() makes the usual ones."
        raise OptionError("tiers", tiers, f"has {shown(wrong[0])}, {advice}")
    _one_of("read_strategy", read_strategy, ("on_miss_or_error", "on_error"))
    _one_of("write_strategy", write_strategy, ("write_through", "write_around"))


def _one_of(option: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise OptionError(option, value, f"must be one of {', '.join(map(repr, allowed))}.")
