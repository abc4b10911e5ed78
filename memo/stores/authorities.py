"""Authorities: the tier with the last word on validity, and what each of them missed.

Rules of this module:

1.  The authority is the first shared tier (Redis); while that is away, this host's generations.
    The host *learns* what the shared authority reads, so that it can judge while that is away.
2.  An invalidation is written down on the host before it is sent to a shared tier.  One that did
    not arrive is replayed, with a fresh token, before anything is read from that tier again.
3.  What can be neither sent nor written down is owed by this process: it is sent before the
    process reads anything there.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from memo.errors import TierError, TierUnavailable
from memo.records.stamp_types import LOST, Ref, State
from memo.runtime import events
from memo.runtime.port import Port, patient
from memo.stores.protocols import Generations, Host, Listener, Losable, Tier
from memo.validity.stamps import Turn

if TYPE_CHECKING:
    from memo.stores.reseeding import Reseeding

T = TypeVar("T")
LATELY = 30.0
"""Seconds for which an invalidation that a shared tier has acknowledged may be lost: when it fails
over, or restarts, its last writes may not have reached its replica or disk."""
MOST_LATELY = 10_000
"""Invalidations of which this is remembered."""
READS = 3
"""How often something is read from a shared tier at most, if that is interrupted each time."""
OUTLAST = 10.0
"""Seconds for which an invalidation waits for a lock of others on this host's file."""

REASON = 500
"""Characters of a reason that are kept with an invalidation."""


class Authorities:
    """The generations of a shared tier and of this host.

    Args:
        tiers: of the chain, in order.
        fault: tells of a fault: the name of a tier, the error, the key.

    Attributes:
        shared: the tier that has the last word while it is there; None: this host has it.
        listener: hears of changes there; None: every time it is asked.
        host: None: there is none, and a tier's own generations count.
        reseeding: what this host does when the shared tier has lost its data; None: nothing.
    """

    def __init__(self, tiers: Sequence[Tier], fault: Callable[[str, TierError, str], None]) -> None:
        self._tiers = tiers
        self._told = fault
        self.shared: Tier | None = next(
            (tier for tier in tiers if tier.shared and tier.generations is not None), None
        )
        self.listener: Listener | None = getattr(self.shared, "listener", None)
        self.host: Host | None = None
        self.reseeding: Reseeding | None = None
        self._owed: list[tuple[Sequence[Turn], str]] = []
        self._lately: deque[tuple[float, Sequence[Turn], str]] = deque(maxlen=MOST_LATELY)
        self._interruptions = 0
        self._unbroken = 0.0

    def settle_in(self, host: Host | None, *, trusts_disk: bool) -> None:
        """Give them this host, and what to do when a shared tier has lost its data."""
        self.host = host
        shared = self.shared
        if host is not None and isinstance(shared, Losable):
            from memo.stores.reseeding import Reseeding

            self.reseeding = Reseeding(shared, host, trusts_disk=trusts_disk)

    def _fault(self, tier: str, error: TierError) -> None:
        self._told(tier, error, "")

    # --- what is true ----------------------------------------------------------------------------

    def _each(self) -> list[Generations]:
        found: list[Generations] = []
        if self.shared is not None and self.shared.generations is not None:
            found.append(self.shared.generations)
        if self.host is not None:
            found.append(self.host.generations)
        return found or [t.generations for t in self._tiers[:1] if t.generations]

    async def states(self, port: Port, refs: Sequence[Ref]) -> list[State]:
        """Read refs at the first authority that answers.

        Raises:
            TierUnavailable: none does.
        """
        return await self._first(port, "states", refs)

    async def begin(self, port: Port, refs: Sequence[Ref]) -> list[State]:
        """Read refs for the stamps of a computation that is about to begin.

        The host learns what a shared authority reads: it is asked first, so that an invalidation on
        this host that comes in between is not undone.
        """
        if self.host is None:
            return await self._first(port, "begin", refs)
        own = self.host.generations
        try:
            before = await own.states(port, refs)
        except TierError as error:
            self._fault("host", error)
            return await self._first(port, "begin", refs)
        now = await self._first(port, "begin", refs)
        if now != before:
            try:
                await port.offload(own.learn, refs, before, now)
            except TierError as error:
                self._fault("host", error)
        return now

    async def _first(self, port: Port, verb: str, refs: Sequence[Ref]) -> list[State]:
        return (await self.asked(port, verb, refs))[0]

    async def asked(
        self, port: Port, verb: str, refs: Sequence[Ref]
    ) -> tuple[list[State], Generations]:
        """Answer of the first authority that can tell, and which one that is.

        Args:
            verb: `"states"` or `"begin"`.

        Raises:
            TierUnavailable: none can.
        """
        for authority in self._each():
            try:
                read = partial(getattr(authority, verb), port, refs)
                states: list[State]
                if self.shared is not None and authority is self.shared.generations:
                    states = await self.read(port, read)
                else:
                    states = await read()
                if LOST in states and (verb == "begin" or getattr(authority, "read_only", False)):
                    states = await self._filled(port, verb, refs, states)
            except TierError as error:
                self._fault("generations", error)
                continue
            return states, authority
        raise TierUnavailable("no tier can tell what is valid")

    async def _filled(
        self, port: Port, verb: str, refs: Sequence[Ref], states: list[State]
    ) -> list[State]:
        """States whose groups an authority that takes no writes does not have, from this host.

        What is computed here meanwhile is so judged here.  When the authority takes writes again,
        these groups are missing there, and what was computed under them is computed once more.

        Raises:
            TierUnavailable: this host cannot tell either.
        """
        if self.host is None:
            raise TierUnavailable("no tier can tell what is valid")
        own: list[State] = await getattr(self.host.generations, verb)(port, refs)
        return [mine if state == LOST else state for mine, state in zip(own, states, strict=True)]

    async def notes(self, port: Port, ref: Ref) -> list[tuple[str, str]]:
        """(field, note) of the invalidations that a ref has seen, from the first that can tell."""
        for authority in self._each():
            try:
                return await authority.notes(port, ref)
            except TierError as error:
                self._fault("generations", error)
        return []

    # --- invalidations ---------------------------------------------------------------------------

    async def turn(self, port: Port, turns: Sequence[Turn], note: str) -> dict[str, str]:
        """Invalidate; how it went, tier by tier: `"done"`, or why not and what will happen."""
        for tier in self._tiers:
            if before := getattr(tier, "before_turn", None):
                try:
                    await before(port)
                except TierError as error:
                    self._fault(tier.name, error)
        outcome: dict[str, str] = {}
        row = await self._turn_host(port, turns, note, outcome)
        for tier in self._tiers:
            outcome.setdefault(tier.name, "done")
        if self.shared is not None and self.shared.generations is not None:
            begun = time.monotonic()
            try:
                await self.shared.generations.turn(port, turns, note)
                self._lately.append((time.monotonic(), turns, note))
                self._went_well(begun)
            except TierError as error:
                how = await self._undelivered(port, self.shared, row, error)
                if row is None:
                    self._owed.append((turns, note))
                outcome[self.shared.name] = how
                row = None
            finally:
                if self.listener is not None:
                    self.listener.hear({turn.group: None for turn in turns})
        if row is not None and self.host is not None:
            await self._strike(port, self.host.journal.done, row)
        return outcome

    async def _turn_host(
        self, port: Port, turns: Sequence[Turn], note: str, outcome: dict[str, str]
    ) -> int | None:
        if self.host is None:
            return None
        note = addressed(note, ["*" if self.shared is None else _where(self.shared)])
        try:
            with patient(OUTLAST):
                if self.shared is not None:
                    return await port.offload(self.host.journal.add, turns, note)
                await self.host.generations.turn(port, turns, note)
        except TierError as error:
            self._fault("host", error)
            outcome["disk"] = self.host.generations.owe(turns, note, error)
        return None

    async def _undelivered(self, port: Port, tier: Tier, row: int | None, error: TierError) -> str:
        self._fault(tier.name, error)
        if row is None or self.host is None:
            return (
                f"failed, and not journalled: {error}; this process sends it before its next read"
            )
        if await self._strike(port, self.host.journal.fail, row):
            return "journalled: unreachable, replayed before its next read"
        return "journalled: unreachable, replayed here before its next read, elsewhere within 5 s"

    async def _strike(self, port: Port, verb: Callable[[int], None], row: int) -> bool:
        """Say how a journal row went; if that cannot be written, it is due in a while by itself."""
        try:
            await port.offload(verb, row)
        except TierError as error:
            self._fault("host", error)
            return False
        return True

    def behind(self) -> bool:
        """True if the shared authority may have missed an invalidation."""
        if self._owed or (self.reseeding is not None and self.reseeding.due()):
            return True
        try:
            return self.host is not None and self.host.journal.maybe_due()
        except TierError:  # `lookup` meets it again, and says so
            return True

    def interrupted(self) -> bool:
        """True if the shared tier may have restarted since it was last caught up with."""
        return self.reseeding is not None and self.reseeding.interrupted()

    async def read(self, port: Port, read: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Read from the shared tier when it has all that it missed.

        A connection that turns out to be dead is replaced while `read` runs; the server may be an
        older state of itself by then, so what it answered does not count.

        Raises:
            TierError: it cannot be reached.
        """
        for again in reversed(range(READS)):
            await self._catch_up(port)
            found = await read()
            if not (again and self.interrupted()):
                return found
        raise AssertionError

    def _went_well(self, begun: float) -> None:
        """An exchange that began then has succeeded: the shared tier ran until then, at least."""
        if not self.interrupted():
            self._unbroken = begun

    async def _catch_up(self, port: Port) -> None:
        """Replay what a shared tier missed; it is not read before.

        Raises:
            TierError: it cannot be reached.
        """
        host, tier = self.host, self.shared
        assert tier is not None
        assert tier.generations is not None
        if self.reseeding is not None and self.reseeding.due():
            await self._repeat(port, tier)
            begun = time.monotonic()
            await self.reseeding.look(port)
            self._went_well(begun)
        if self._owed:
            await self._pay(port, tier, tier.generations)
        if host is None or not await host.journal.overdue(port):
            return
        for row, turns, text in await port.offload(host.journal.rows):
            if not {_where(tier), "*"}.isdisjoint(_facts(text).get("to", ())):
                await tier.generations.turn(port, turns, text)
                await self._strike(port, host.journal.done, row)
                self._replayed(tier, turns, text)

    async def _repeat(self, port: Port, tier: Tier) -> None:
        """After a fault, send once more what this process had invalidated shortly before.

        Raises:
            TierError: it cannot be sent.
        """
        interruptions = getattr(tier, "interruptions", 0)
        if interruptions == self._interruptions or tier.generations is None:
            return
        since = self._unbroken - LATELY
        for sent in list(self._lately):
            at, turns, note = sent
            if at > since:
                await tier.generations.turn(port, turns, note)
            with suppress(ValueError):  # another caller has
                self._lately.remove(sent)
        self._interruptions = interruptions

    async def _pay(self, port: Port, tier: Tier, generations: Generations) -> None:
        """Send what neither arrived nor could be journalled."""
        for owed in list(self._owed):
            await generations.turn(port, *owed)
            with suppress(ValueError):  # another caller has
                self._owed.remove(owed)
            self._replayed(tier, *owed)

    def _replayed(self, tier: Tier, turns: Sequence[Turn], note: str) -> None:
        reason = str(_facts(note).get("reason", ""))
        detail = f"{len(turns)} groups"
        events.emit(events.Event(events.REPLAYED, tier=tier.name, reason=reason, detail=detail))


def make_note(reason: str, by: str) -> str:
    """Note about an invalidation for people: JSON with `at` (Unix seconds), `by`, `reason`."""
    reason = str(reason)
    kept = reason if len(reason) <= REASON else f"{reason[: REASON - 1]}…"
    return json.dumps({"at": round(time.time(), 3), "by": by, "reason": kept})


def addressed(text: str, to: list[str]) -> str:
    """The note of an invalidation, with the stores that have yet to hear of it."""
    return json.dumps({**_facts(text), "to": to})


def _facts(text: str) -> dict[str, Any]:
    try:
        facts = json.loads(text)
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}


def _where(tier: Tier) -> str:
    """The identity of a shared tier's store: a journalled invalidation is replayed to that one."""
    return str(getattr(tier, "where", tier.name))


def is_for_any(note: str) -> bool:
    """True if a journalled invalidation is for any shared tier, the next one to be used."""
    return note.replace(" ", "").endswith('"to":["*"]}')
