"""Authorities: the tiers that decide on validity, and the replay of missed invalidations.

Rules of this module:

1.  The authority is the first shared tier (Redis) or, while that is down, this host's generations.
    The host *learns* the tokens that the shared authority reads, so that it can judge in its place.
2.  An invalidation is journalled on the host before it is sent to a shared tier.  If it does not
    arrive, it is replayed with a fresh token before anything else is read from that tier.
3.  An invalidation that can be neither sent nor journalled is kept by this process, which sends it
    before it reads anything from that tier.
4.  While the shared tier is up, this host's generations do not replace it: they lack what other
    hosts have invalidated.  If the host cannot read its journal, nothing is valid.
5.  A Redis that has lost its data gets this host's generations again: see `redis.loss_recovery`.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from memo.errors import TierError, TierUnavailable, shortened
from memo.records.stamp_types import LOST, Generation, Ref, Stamp, State
from memo.runtime import events
from memo.runtime.clock import SECOND, Clock
from memo.runtime.port import Port, waiting_for_locks
from memo.runtime.reasons import UNREACHABLE
from memo.stores.protocols import (
    REDIS,
    Adopting,
    Generations,
    Host,
    Journal,
    PendingLookup,
    ServerTier,
    Tier,
    display_name,
)
from memo.stores.redis.loss_recovery import LossRecovery
from memo.validity import check
from memo.validity.results import UsedResult
from memo.validity.stamps import Turn, parse_note, without_soft

T = TypeVar("T")
_Read = Callable[[Generations], Coroutine[Any, Any, list[State]]]
RECENT_SECONDS = 30.0
"""Seconds for which an acknowledged invalidation may still be lost: when the shared tier fails over
or restarts, its last writes may not have reached its replica or disk."""
MAX_RECENT_INVALIDATIONS = 10_000
"""Maximum number of these invalidations that a process remembers."""
SHARED_READ_ATTEMPTS = 3
"""Number of times a read from a shared tier is tried if each attempt is interrupted."""
INVALIDATION_LOCK_SECONDS = 10.0
"""Seconds for which an invalidation waits for a locked file of this host."""
MAX_REASON_CHARACTERS = 500
"""Maximum length in characters of the reason that is kept with an invalidation."""


class JournalUnreadableError(TierUnavailable):
    """This host cannot read whether a shared tier has missed an invalidation."""


class InterruptedReadError(TierUnavailable):
    """Every attempt to read a shared tier was interrupted, so its answer may be an older state.

    The tier may be up, so this host must not judge in its place.
    """


class Authorities:
    """The generations of the shared tier and of this host; the first one that answers decides.

    Args:
        tiers: the tiers of the chain, in order.
        fault: reports a fault: name of the tier, error, key.

    Attributes:
        shared: the tier that decides while it is up; None: this host decides.
        listener: receives changes from that tier; None: the tier is asked each time.
        host: state of this host; None: there is none, and a tier's own generations count.
        recovery: detects that Redis has lost its data; None: Redis is not used.
    """

    def __init__(self, tiers: Sequence[Tier], fault: Callable[[str, TierError, str], None]) -> None:
        self._tiers = tiers
        self._report = fault
        self.shared: Tier | None = next(
            (tier for tier in tiers if tier.shared and tier.generations is not None), None
        )
        shared = self.shared
        self._server = shared if isinstance(shared, ServerTier) else None
        self.listener = None if self._server is None else self._server.listener
        self._adopting = [tier for tier in tiers if isinstance(tier, Adopting)]
        self.host: Host | None = None
        self.recovery: LossRecovery | None = None
        self._unsent: list[tuple[Sequence[Turn], str]] = []
        self._recent: deque[tuple[float, Sequence[Turn], str]] = deque(
            maxlen=MAX_RECENT_INVALIDATIONS
        )
        self._interruptions = 0
        self._last_success = 0.0

    def set_up(self, host: Host | None, *, trusts_disk: bool) -> None:
        """Set this host, and the policy for a shared tier that has lost its data."""
        self.host = host
        if host is not None and self._server is not None:
            recovery = LossRecovery(self._server, host, trusts_disk=trusts_disk)
            self._server.set_up_recovery(recovery.restore_groups, recovery.tombstone_life)
            self.recovery = recovery

    def _fault(self, tier: str, error: TierError) -> None:
        self._report(tier, error, "")

    # --- what is valid ---------------------------------------------------------------------------

    def _authorities(self) -> list[Generations]:
        found: list[Generations] = []
        if self.shared is not None and self.shared.generations is not None:
            found.append(self.shared.generations)
        if self.host is not None:
            found.append(self.host.generations)
        return found or [t.generations for t in self._tiers[:1] if t.generations]

    def _tier_of(self, authority: Generations) -> str:
        """Return the name under which faults of an authority are reported."""
        if self.shared is not None and authority is self.shared.generations:
            return self.shared.name  # the log leaves Redis to its breaker, which warns once
        return "host" if self.host is not None else self._tiers[0].name

    async def states(self, port: Port, refs: Sequence[Ref]) -> list[State]:
        """Read the states of refs from the first authority that answers.

        Raises:
            TierUnavailable: none answers.
        """
        return (await self.states_and_authority(port, refs))[0]

    async def states_and_authority(
        self, port: Port, refs: Sequence[Ref]
    ) -> tuple[list[State], Generations]:
        """Like `states`, and the authority that answered."""
        return await self._ask_in_order(port, lambda one: one.states(port, refs))

    async def stamp_states(
        self, port: Port, refs: Sequence[Ref], pending: PendingLookup | None = None
    ) -> list[State]:
        """Read refs for the stamps of a computation that is about to begin.

        The host is read first and then learns what the shared authority answers, so that an
        invalidation on this host in between is not undone.

        Args:
            pending: a lookup to the shared authority that has read them already; see
                `Chain.lookup_with_stamps`.
        """
        before = await self.host_states(port, refs) if pending is None else pending.host_states
        now = None if pending is None else self._states_in(pending)
        if now is None:
            now, _ = await self._ask_in_order(
                port, lambda one: one.stamp_states(port, refs), creates=True
            )
        if self.host is not None and before is not None and now != before:
            try:
                await port.offload(self.host.generations.learn, refs, before, now)
            except TierError as error:
                self._fault("host", error)
        return now

    async def host_states(self, port: Port, refs: Sequence[Ref]) -> Sequence[State] | None:
        """Return the states on this host, before a shared authority is asked.

        None if there is no such authority, or if this host cannot be read.
        """
        if self.host is None or self.shared is None:
            return None
        try:
            return await self.host.generations.states(port, refs)
        except TierError as error:
            self._fault("host", error)
            return None

    def _states_in(self, pending: PendingLookup) -> list[State] | None:
        if self._server is None or self.was_interrupted():
            return None
        try:
            return self._server.stamp_states_in(pending.lookup)
        except TierError:  # `stamp_states` gets the same error, and reports it
            return None

    async def _ask_in_order(
        self, port: Port, read: _Read, *, creates: bool = False
    ) -> tuple[list[State], Generations]:
        """Return the states from the first authority that answers, and which one that is.

        Args:
            read: asks one authority.
            creates: missing groups are created, so only a read-only authority can lack some.

        Raises:
            TierUnavailable: none answers.
        """
        for authority in self._authorities():
            shared = self.shared
            if shared is not None and authority is not shared.generations:
                shared = None
            try:
                if shared is not None:
                    states = await self.read_shared(port, partial(read, authority))
                else:
                    states = await read(authority)
                if LOST in states and (creates or (shared is not None and shared.read_only)):
                    states = await self._with_host_states(read, states)
            except JournalUnreadableError as error:
                self._fault("host", error)
                raise
            except InterruptedReadError as error:
                self._fault(self._tier_of(authority), error)
                raise
            except TierError as error:
                self._fault(self._tier_of(authority), error)
                continue
            return states, authority
        raise TierUnavailable("no tier knows which entries are valid")

    async def _with_host_states(self, read: _Read, states: list[State]) -> list[State]:
        """Fill in this host's states for the groups that a read-only authority lacks.

        Results that are computed meanwhile are judged by these states.  Once the authority takes
        writes again it still lacks these groups, so those results are computed once more.

        Raises:
            TierUnavailable: this host cannot be read either.
        """
        if self.host is None:
            raise TierUnavailable("no tier knows which entries are valid")
        own = await read(self.host.generations)
        return [mine if state == LOST else state for mine, state in zip(own, states, strict=True)]

    async def notes(self, port: Port, ref: Ref) -> list[tuple[str, str]]:
        """Return (field, note) of a ref's invalidations, from the first authority that answers."""
        for authority in self._authorities():
            try:
                return await authority.notes(port, ref)
            except TierError as error:
                self._fault(self._tier_of(authority), error)
        return []

    async def why_invalid(
        self, port: Port, stamps: Sequence[Stamp], states: Sequence[State] | None = None
    ) -> str:
        """Return why stamps do not hold any more; "" if they do.

        Args:
            states: the current states of the generations among them, if they were read already.
        """
        refs = [stamp.ref for stamp in stamps if type(stamp) is Generation]
        if states is None or len(states) != len(refs) or LOST in states:
            # the answer is incomplete, or this host may be able to give the group back
            try:
                states = await self._current_states(port, refs)
            except TierError:
                return UNREACHABLE
        return await check.why_invalid(port, stamps, states)

    async def _current_states(self, port: Port, refs: Sequence[Ref]) -> Sequence[State]:
        """Return the current states of refs.

        Raises:
            TierError: no tier can be asked.
        """
        if self.shared is not None or self.host is None:
            return await self.states(port, refs)
        try:  # the same as `states`, with fewer steps
            return await self.host.generations.states(port, refs)
        except TierError as error:
            self._fault("host", error)
            raise

    async def why_changed(self, port: Port, used: Sequence[UsedResult]) -> list[str]:
        """Return for each used result why it may have changed; "" if its stamps hold.

        Raises:
            TierError: no tier can be asked.
        """
        stamps = [stamp for result in used for stamp in result.stamps]
        refs = [stamp.ref for stamp in stamps if type(stamp) is Generation]
        reasons = iter(await check.reasons(port, stamps, await self.states(port, refs)))
        found: list[str] = []
        for result in used:
            own = [next(reasons) for _ in result.stamps]
            found.append(check.combine(result.stamps, own))
        return found

    # --- invalidations ---------------------------------------------------------------------------

    async def turn(self, port: Port, turns: Sequence[Turn], note: str) -> dict[str, str]:
        """Invalidate; return for each tier `"done"`, or why it failed and what happens next."""
        for adopting in self._adopting:
            try:
                await adopting.adopt(port)
            except TierError as error:
                self._fault(adopting.name, error)
        outcome: dict[str, str] = {}
        row = await self._turn_host(port, turns, note, outcome)
        for tier in self._tiers:
            outcome.setdefault(tier.name, "done")
        if self.shared is not None and self.shared.generations is not None:
            begun = time.monotonic()
            try:
                await self.shared.generations.turn(port, turns, note)
                self._recent.append((time.monotonic(), turns, note))
                self._note_success(begun)
            except TierError as error:
                how = await self._keep_undelivered(port, self.shared, row, error)
                if row is None or self.shared.where == self.shared.name:
                    # another store of this name may take the row, since nothing tells them apart
                    self._unsent.append((turns, note))
                outcome[self.shared.name] = how
                row = None
            finally:
                if self.listener is not None:
                    self.listener.record_changes({turn.group: None for turn in turns})
        if row is not None and self.host is not None:
            await self._mark_row(port, self.host.journal.mark_done, row)
        return outcome

    async def _turn_host(
        self, port: Port, turns: Sequence[Turn], note: str, outcome: dict[str, str]
    ) -> int | None:
        if self.host is None:
            return None
        note = with_receivers(note, ["*" if self.shared is None else self.shared.where])
        try:
            with waiting_for_locks(INVALIDATION_LOCK_SECONDS):
                if self.shared is not None:
                    return await port.offload(self.host.journal.add, turns, note)
                await self.host.generations.turn(port, turns, note)
        except TierError as error:
            self._fault("host", error)
            outcome["disk"] = self.host.generations.queue_unwritten(turns, note, error)
        return None

    async def _keep_undelivered(
        self, port: Port, tier: Tier, row: int | None, error: TierError
    ) -> str:
        self._fault(tier.name, error)
        if row is None or self.host is None:
            return (
                f"failed, and not journalled: {error}; this process sends it before its next read"
            )
        if await self._mark_row(port, self.host.journal.mark_failed, row):
            return "journalled: unreachable, replayed before its next read"
        return "journalled: unreachable, replayed here before its next read, elsewhere within 5 s"

    async def _mark_row(self, port: Port, verb: Callable[[int], None], row: int) -> bool:
        """Record the outcome of a journal row; if that fails, the row stays due and is replayed."""
        try:
            await port.offload(verb, row)
        except TierError as error:
            self._fault("host", error)
            return False
        return True

    def has_missed_turns(self) -> bool:
        """True if the shared authority may have missed an invalidation."""
        if self._unsent or (self.recovery is not None and self.recovery.must_register()):
            return True
        if self.host is None or self.shared is None:
            return False
        try:
            return self.host.journal.has_due_rows_now(self.shared.where, no_opening=True)
        except TierError:  # `lookup` gets the same error, and reports it
            return True

    def was_interrupted(self) -> bool:
        """True if the shared tier may have restarted since the last replay."""
        recovery = self.recovery
        if recovery is None:
            return False
        return recovery.tier.client.interruptions != recovery.interruptions

    async def read_shared(self, port: Port, read: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Read from the shared tier, once it has all invalidations that it missed.

        If the connection dies and is replaced while `read` runs, the server may have restarted with
        an older state, so that answer is discarded and the read is tried again.

        Raises:
            InterruptedReadError: every attempt was interrupted.
            TierError: the tier cannot be reached.
        """
        for _ in range(SHARED_READ_ATTEMPTS):
            await self._catch_up(port)
            found = await read()
            if not self.was_interrupted():
                return found
        raise InterruptedReadError("its connections were interrupted during each attempt to read")

    def _note_success(self, begun: float) -> None:
        """Note that an exchange begun at this time succeeded: the shared tier ran until then."""
        if not self.was_interrupted():
            self._last_success = begun

    async def _catch_up(self, port: Port) -> None:
        """Replay the invalidations that the shared tier missed, before it is read.

        Raises:
            TierError: the tier cannot be reached.
        """
        host, tier = self.host, self.shared
        assert tier is not None
        assert tier.generations is not None
        if self.recovery is not None and self.recovery.must_register():
            await self._resend_recent(port, self.recovery.tier)
            begun = time.monotonic()
            await self.recovery.register(port)
            self._note_success(begun)
        if self._unsent:
            await self._send_unsent(port, tier, tier.generations)
        if host is None:
            return
        for row, turns, text in await _due_rows(port, host.journal, tier.where):
            await self._turn_again(port, tier.generations, turns, text)
            await self._mark_row(port, host.journal.mark_done, row)
            self._emit_replayed(tier, turns, text)

    async def _resend_recent(self, port: Port, tier: ServerTier) -> None:
        """After a fault, repeat the invalidations that this process has sent shortly before.

        Raises:
            TierError: they cannot be sent.
        """
        interruptions = tier.client.interruptions
        if interruptions == self._interruptions:
            return
        since = self._last_success - RECENT_SECONDS
        for sent in list(self._recent):
            at, turns, note = sent
            if at > since:
                await self._turn_again(port, tier.generations, turns, note)
            with suppress(ValueError):  # another thread has removed it
                self._recent.remove(sent)
        self._interruptions = interruptions

    async def _turn_again(
        self, port: Port, shared: Generations, turns: Sequence[Turn], note: str
    ) -> None:
        """Send invalidations that a shared tier may lack, except those that it certainly has.

        It has those after which it reads the same as this host: it lost its data, say, and got it
        back from here.  Sending these again would invalidate what was computed since.

        Raises:
            TierError: the shared tier cannot be reached.
        """
        refs = [Ref(turn.group, without_soft(turn.arguments)) for turn in turns]
        try:
            here = [] if self.host is None else await self.host.generations.states(port, refs)
        except TierError:  # an invalidation is not written yet, say
            here = []
        if here:
            pairs = zip(turns, here, await shared.states(port, refs), strict=True)
            turns = [turn for turn, own, there in pairs if own == LOST or own != there]
        if turns:
            await shared.turn(port, turns, note)

    async def _send_unsent(self, port: Port, tier: Tier, generations: Generations) -> None:
        """Send the invalidations that neither arrived nor could be journalled.

        Raises:
            TierError: they cannot be sent.
        """
        for unsent in list(self._unsent):
            await generations.turn(port, *unsent)
            with suppress(ValueError):  # another thread has removed it
                self._unsent.remove(unsent)
            self._emit_replayed(tier, *unsent)

    def _emit_replayed(self, tier: Tier, turns: Sequence[Turn], note: str) -> None:
        reason = str(parse_note(note).get("reason", ""))
        detail = f"{len(turns)} groups"
        events.emit(events.Event(events.REPLAYED, tier=tier.name, reason=reason, detail=detail))


async def _due_rows(
    port: Port, journal: Journal, where: str
) -> Sequence[tuple[int, Sequence[Turn], str]]:
    """Return the rows of this host's journal that are due for a shared tier.

    Raises:
        JournalUnreadableError: the journal cannot be read.
    """
    try:
        if not await journal.has_due_rows(port, where):
            return ()
        return await port.offload(journal.due_rows, where)
    except TierError as error:
        raise JournalUnreadableError(str(error)) from error


def make_note(reason: str, by: str, clock: Clock) -> str:
    """Return the note of an invalidation: JSON with `at` (Unix seconds), `by` and `reason`."""
    reason = str(reason)
    kept = shortened(reason, MAX_REASON_CHARACTERS)
    return json.dumps({"at": round(clock.wall_ns() / SECOND, 3), "by": by, "reason": kept})


def with_receivers(note: str, to: list[str]) -> str:
    """Add to a note the stores that have not received the invalidation yet."""
    return f'{note.removesuffix("}")}, "to": {json.dumps(to)}}}'


def receivers(notes: Iterable[str]) -> str:
    """Return the tiers that have not received some invalidations, as part of a sentence."""
    to = [str(one) for note in notes for one in parse_note(note).get("to", ())]
    return " and ".join(dict.fromkeys(map(_receiver, to)))


def _receiver(where: str) -> str:
    """Return the name of a store from its `where`: `redis HOST NAMESPACE`, or `NAME@ID`."""
    if where == "*" or where.startswith(f"{REDIS} "):
        return display_name(REDIS)
    return where.partition("@")[0]


def is_for_any(note: str) -> bool:
    """True if a journalled invalidation is meant for the next shared tier in use."""
    return note.replace(" ", "").endswith('"to":["*"]}')
