"""Authorities: the tier that decides on validity, and the invalidations that each tier missed.

Rules of this module:

1.  The authority is the first shared tier (Redis); while that is away, this host's generations.
    The host *learns* what the shared authority reads, so that it can judge while that is away.
2.  An invalidation is written down on the host before it is sent to a shared tier.  One that did
    not arrive is replayed, with a fresh token, before anything is read from that tier again.
3.  What can be neither sent nor written down is owed by this process: it is sent before the
    process reads anything there.
4.  While the shared tier is there, this host's generations do not stand in for it: they lack what
    other hosts have invalidated.  Where the host cannot read what it owes, nothing is valid.

A shared tier that came back empty gets this host's generations again (`Reseeding`):

4.  Each host registers in Redis, beside an *epoch* that is made once.  A host that finds another
    epoch than before knows that Redis has lost its data.
5.  A host that is alone in its namespace has all invalidations on its own disk.  Whatever group
    Redis lost, it may give back, when the group is asked for.
6.  Where other hosts were seen within `REMEMBERED`, they may have invalidated what this host has
    not heard of.  With `"recompute"` nothing is given back; with `"trust_disk"` all groups of this
    host are, once for each new epoch.
7.  Only a group that is missing is given back.  An invalidation of a missing group writes it, so
    nothing that was invalidated since comes back.
8.  A Redis that has gone back to an older state may have lost invalidations: a host that finds its
    own registrations there fewer than it knew of invalidates everything.
9.  A host that was not alone, and finds after a loss that another one gave groups back, has joined
    after that one last looked: it invalidates all of them.
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from memo.errors import TierError, TierUnavailable
from memo.records.stamp_types import LOST, Ref, State
from memo.runtime import events
from memo.runtime.named_tuple import NamedTuple
from memo.runtime.port import Port, patient
from memo.stores.protocols import (
    REDIS,
    Adopting,
    Asked,
    Census,
    Generations,
    Host,
    Journal,
    Losable,
    Prompt,
    Tier,
    Tracked,
    title,
)
from memo.validity import stamps
from memo.validity.stamps import Turn

T = TypeVar("T")
_Read = Callable[[Generations], Coroutine[Any, Any, list[State]]]
LATELY = 30.0
"""Seconds for which an invalidation that a shared tier has acknowledged may be lost: when it fails
over, or restarts, its last writes may not have reached its replica or disk."""
MOST_LATELY = 10_000
"""Invalidations of which this is remembered."""
READS = 3
"""Attempts to read something from a shared tier, if each of them is interrupted."""
OUTLAST = 10.0
"""Seconds for which an invalidation waits for a lock of others on this host's file."""
REASON = 500
"""Characters of a reason that are kept with an invalidation."""
LOOK_EVERY = 5.0
"""Seconds after which a host looks again for other hosts."""
LOOK_SOON = 1.0
"""Seconds until the next look where the tier takes no writes."""
REMEMBERED = 30 * 86400.0
"""Seconds for which a host that was seen counts as present."""
FORGOTTEN = 43_200.0
"""Seconds without a look after which a registration may have been removed by other hosts."""
BATCH = 500
"""Groups that are given back in one exchange."""
_NOTE = "census "
_WHY = json.dumps({"reason": "Redis lost its data"})


class UnknownDebtError(TierUnavailable):
    """This host cannot read whether a shared tier has missed an invalidation."""


class Authorities:
    """The generations of a shared tier and of this host.

    Args:
        tiers: of the chain, in order.
        fault: reports a fault: the name of a tier, the error, the key.

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
        shared = self.shared
        self.listener = shared.listener if isinstance(shared, Tracked) else None
        self._adopting = [tier for tier in tiers if isinstance(tier, Adopting)]
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
        return (await self.states_by(port, refs))[0]

    async def states_by(self, port: Port, refs: Sequence[Ref]) -> tuple[list[State], Generations]:
        """As `states`, and the authority that answered."""
        return await self._asked(port, lambda one: one.states(port, refs))

    async def begin(
        self, port: Port, refs: Sequence[Ref], asked: Asked | None = None
    ) -> list[State]:
        """Read refs for the stamps of a computation that is about to begin.

        The host learns what a shared authority reads: it is asked first, so that an invalidation on
        this host that comes in between is not undone.

        Args:
            asked: a question to the shared authority that read them along; see `Chain.ask_along`.
        """
        before = await self.before(port, refs) if asked is None else asked.before
        now = None if asked is None else self._begun(asked)
        if now is None:
            now, _ = await self._asked(port, lambda one: one.begin(port, refs), begins=True)
        if self.host is not None and before is not None and now != before:
            try:
                await port.offload(self.host.generations.learn, refs, before, now)
            except TierError as error:
                self._fault("host", error)
        return now

    async def before(self, port: Port, refs: Sequence[Ref]) -> Sequence[State] | None:
        """The states on this host, before a shared authority is asked; None: it cannot tell."""
        if self.host is None:
            return None
        try:
            return await self.host.generations.states(port, refs)
        except TierError as error:
            self._fault("host", error)
            return None

    def _begun(self, asked: Asked) -> list[State] | None:
        if self.interrupted() or not isinstance(self.shared, Prompt):
            return None
        try:
            return self.shared.begun(asked)
        except TierError:  # `begin` meets it again, and reports it
            return None

    async def _asked(
        self, port: Port, read: _Read, *, begins: bool = False
    ) -> tuple[list[State], Generations]:
        """Answer of the first authority that can tell, and which one that is.

        Args:
            read: asks one of them.
            begins: an authority that takes writes has every group then.

        Raises:
            TierUnavailable: none can.
        """
        for authority in self._each():
            try:
                if self.shared is not None and authority is self.shared.generations:
                    states = await self.read(port, partial(read, authority))
                else:
                    states = await read(authority)
                if LOST in states and (begins or getattr(authority, "read_only", False)):
                    states = await self._filled(read, states)
            except UnknownDebtError as error:
                self._fault("host", error)
                raise
            except TierError as error:
                self._fault("generations", error)
                continue
            return states, authority
        raise TierUnavailable("no tier can tell what is valid")

    async def _filled(self, read: _Read, states: list[State]) -> list[State]:
        """States of this host, for groups that a read-only authority does not have.

        Results that are computed here meanwhile are judged by these states.  When the authority
        takes writes again it lacks these groups, and the results under them are computed once more.

        Raises:
            TierUnavailable: this host cannot tell either.
        """
        if self.host is None:
            raise TierUnavailable("no tier can tell what is valid")
        own = await read(self.host.generations)
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
        """Invalidate; by tier the outcome: `"done"`, or why not and what will happen."""
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
        note = addressed(note, ["*" if self.shared is None else self.shared.where])
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
        """Record the outcome of a journal row; if that fails, the row is due again by itself."""
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
        reseeding = self.reseeding
        return reseeding is not None and reseeding.tier.interruptions != reseeding.interruptions

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
        if host is None:
            return
        for row, turns, text in await _overdue(port, host.journal):
            if not {tier.where, "*"}.isdisjoint(_facts(text).get("to", ())):
                await tier.generations.turn(port, turns, text)
                await self._strike(port, host.journal.done, row)
                self._replayed(tier, turns, text)

    async def _repeat(self, port: Port, tier: Tier) -> None:
        """After a fault, send once more what this process had invalidated shortly before.

        Raises:
            TierError: it cannot be sent.
        """
        interruptions = tier.interruptions if isinstance(tier, Losable) else 0
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
        """Send invalidations that neither arrived nor could be journalled."""
        for owed in list(self._owed):
            await generations.turn(port, *owed)
            with suppress(ValueError):  # another caller has
                self._owed.remove(owed)
            self._replayed(tier, *owed)

    def _replayed(self, tier: Tier, turns: Sequence[Turn], note: str) -> None:
        reason = str(_facts(note).get("reason", ""))
        detail = f"{len(turns)} groups"
        events.emit(events.Event(events.REPLAYED, tier=tier.name, reason=reason, detail=detail))


async def _overdue(port: Port, journal: Journal) -> Sequence[tuple[int, Sequence[Turn], str]]:
    """The rows of this host's journal that are due.

    Raises:
        UnknownDebtError: it cannot be read.
    """
    try:
        return await port.offload(journal.rows) if await journal.overdue(port) else ()
    except TierError as error:
        raise UnknownDebtError(str(error)) from error


def make_note(reason: str, by: str) -> str:
    """The note of an invalidation, for display: JSON with `at` (Unix seconds), `by`, `reason`."""
    reason = str(reason)
    kept = reason if len(reason) <= REASON else f"{reason[: REASON - 1]}…"
    return json.dumps({"at": round(time.time(), 3), "by": by, "reason": kept})


def addressed(note: str, to: list[str]) -> str:
    """A note of `make_note`, with the stores that have yet to hear of the invalidation."""
    return f'{note.removesuffix("}")}, "to": {json.dumps(to)}}}'


def _facts(text: str) -> dict[str, Any]:
    try:
        facts = json.loads(text)
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}


def receivers(notes: Iterable[str]) -> str:
    """The shared tiers that journalled invalidations are for, as a sentence names them."""
    to = [str(one) for note in notes for one in _facts(note).get("to", ())]
    return " and ".join(dict.fromkeys(map(_receiver, to)))


def _receiver(where: str) -> str:
    """The name in the identity of a store: `redis HOST NAMESPACE`, or `NAME@ID` of a user's own."""
    if where == "*" or where.startswith(f"{REDIS} "):
        return title(REDIS)
    return where.partition("@")[0]


def is_for_any(note: str) -> bool:
    """True if a journalled invalidation is for any shared tier, the next one to be used."""
    return note.replace(" ", "").endswith('"to":["*"]}')


# --- a shared tier that has lost its data ---------------------------------------------------------


class _Known(NamedTuple):
    """A host's knowledge of a shared tier.

    Attributes:
        epoch: see `Census`; `""`: it was never used.
        others_at: when another host was last seen, in Unix seconds; 0: never.
    """

    epoch: str = ""
    others_at: float = 0.0

    @property
    def alone(self) -> bool:
        return time.time() - self.others_at > REMEMBERED


class Reseeding:
    """Repair of a shared tier's losses by one host.

    Args:
        tier: the shared tier.
        host: this host.
        trusts_disk: the setting `on_redis_loss` is `"trust_disk"`.

    Attributes:
        interruptions: those of the tier when the last look began; it may have lost something since
            if there are others now.
    """

    def __init__(self, tier: Losable, host: Host, *, trusts_disk: bool) -> None:
        self.tier = tier
        self._host = host
        self._trusts_disk = trusts_disk
        self._id = stamps.token()
        self._known: _Known | None = None
        self._look_at = 0.0
        self.interruptions = -1
        self._recovering = False
        self._given = ""
        self._registered = 0.0
        self._times = 0
        self._lock = threading.Lock()
        tier.on_lost = self.give_back
        if trusts_disk:
            tier.tomb = REMEMBERED

    def due(self) -> bool:
        """True if `look` must run before anything is read from the tier."""
        changed = self.tier.interruptions != self.interruptions
        return changed or time.monotonic() >= self._look_at

    async def look(self, port: Port) -> None:
        """Register this host, see which others there are, and notice a loss; never raises."""
        self.interruptions = self.tier.interruptions
        self._look_at = time.monotonic() + LOOK_EVERY
        try:
            await self._look(port)
        except TierError:  # the read that follows meets it again, and reports it
            self.interruptions = self.tier.interruptions
            self._look_at = time.monotonic() + LOOK_SOON if self.tier.read_only else 0.0

    async def _look(self, port: Port) -> _Known:
        known, times = self._known, self._times
        if known is None:
            known = await port.offload(self._recall)
        census = await self.tier.census(port, self._id, known.epoch)
        # Each registration counts, also those of other processes: only an older state repeats one.
        went_back = census.times is not None and census.times <= times
        found = _Known(census.epoch, time.time() if census.others else known.others_at)
        if known.epoch not in ("", census.epoch):
            await self._recover(port, census, found)
        elif went_back and census.now - self._registered < FORGOTTEN:
            await self.tier.turn(port, [Turn("n")], _WHY)
            self._tell("an older state; results are computed again", warn=True)
        self._registered = max(self._registered, census.now)
        last = 0 if went_back or census.times is None else self._times
        self._times = max(last, census.times or 0)
        self._known = found
        if found.epoch != known.epoch or found.others_at > known.others_at + LOOK_EVERY:
            await port.offload(self._remember, found)
        return found

    async def give_back(self, port: Port, groups: Sequence[str]) -> bool:
        """Give back those of some missing groups that this host may; whether there were any.

        Raises:
            TierError: the tier did not take them.
        """
        try:
            tables = await port.offload(self._host.generations.tables, groups)
        except TierError:  # an invalidation is still to be written: nothing here is certain
            return False
        if not tables:
            return False
        if self._recovering:
            await self.tier.seed(port, tables)
            return True
        known = await self._look(port)
        if not known.alone:
            return self._trusts_disk  # if that was a loss, all of them have been given back
        if self._given != known.epoch:
            await self.tier.giving_back(port, self._id)
            self._given = known.epoch
        await self.tier.seed(port, tables)
        return True

    async def _recover(self, port: Port, census: Census, found: _Known) -> None:
        """The tier has lost its data."""
        with self._lock:
            if self._recovering:
                return
            self._recovering = self._trusts_disk and not found.alone
        try:
            if self._recovering and time.time() - census.made < REMEMBERED:
                await self._give_back_all(port)
            elif census.given_back and not found.alone:
                await self.tier.turn(port, [Turn("n")], _WHY)
                await self.tier.giving_back(port, "")
        finally:
            self._recovering = False
        how, warn = "no data; results are computed again", True
        if found.alone:
            how, warn = "no data; results stay valid: no other host uses it", False
        elif self._trusts_disk:
            how = 'no data; results on this host stay valid (on_redis_loss="trust_disk")'
            warn = False
        else:
            how += ' (on_redis_loss="trust_disk" would keep those on each host)'
        self._tell(how, warn=warn)

    async def _give_back_all(self, port: Port) -> None:
        generations = self._host.generations
        with suppress(TierError):
            names = await port.offload(generations.all_names)
            for at in range(0, len(names), BATCH):
                tables = await port.offload(generations.tables, names[at : at + BATCH])
                await self.tier.seed(port, tables)

    def _tell(self, how: str, *, warn: bool) -> None:
        import logging  # a shared tier has loaded it

        where = self.tier.where
        events.emit(events.Event(events.TIER_LOST, tier=self.tier.name, detail=f"{where}: {how}"))
        level = logging.WARNING if warn else logging.INFO
        logging.getLogger("memo.stores").log(level, "memo: %s has come back with %s.", where, how)

    # --- what is kept on the disk ----------------------------------------------------------------

    def _recall(self) -> _Known:
        with suppress(TierError):
            self._id = self._host.id or self._id
            text = self._host.noted(_NOTE + self.tier.where)
            return _known(text)
        return _Known()

    def _remember(self, known: _Known) -> None:
        with suppress(TierError):  # then the process has it
            self._host.note(_NOTE + self.tier.where, json.dumps(known))


def _known(text: str) -> _Known:
    try:
        epoch, others_at = json.loads(text)
        return _Known(str(epoch), float(others_at))
    except (ValueError, TypeError):
        return _Known()
