"""Recovery of a Redis that has lost its data: detect it, and restore this host's generations.

Rules of this module:

1.  Each host registers in Redis, beside an *epoch* that is created once.  A host that finds another
    epoch than before knows that Redis has lost its data.
2.  A host that is alone in its namespace has all invalidations on its own disk.  It may restore
    any group that Redis lost, as soon as that group is read.
3.  Other hosts that were seen within `HOST_PRESENT_SECONDS` may have invalidated groups without
    this host's knowledge.  With `"recompute"` nothing is restored; with `"trust_disk"` all groups
    of this host are, once for each new epoch.
4.  Only a missing group is restored.  Invalidating a missing group creates it, so nothing that was
    invalidated since comes back.
5.  A Redis that has gone back to an older state may have lost invalidations: a host that finds
    fewer of its own registrations there than it made invalidates everything.
6.  A host that was not alone, and finds after a loss that another host has restored groups, must
    have registered after that host last did: it invalidates all of them.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from contextlib import suppress

from memo.errors import TierError
from memo.runtime import events
from memo.runtime.named_tuple import NamedTuple
from memo.runtime.port import Port
from memo.stores.protocols import Census, Host, ServerTier
from memo.validity import stamps
from memo.validity.stamps import Turn

REGISTER_SECONDS = 5.0
"""Seconds after which a host checks again for other hosts."""
EARLY_REGISTER_SECONDS = 1.0
"""Seconds until the next check if the tier takes no writes."""
HOST_PRESENT_SECONDS = 30 * 86400.0
"""Seconds for which another host counts as present after it was last seen."""
FORGOTTEN_SECONDS = 43_200.0
"""Seconds without a check after which other hosts may have removed this host's registration."""
GROUPS_PER_EXCHANGE = 500
"""Number of groups that are restored in one exchange."""
_CENSUS_NOTE = "census "
_LOST_DATA_NOTE = json.dumps({"reason": "Redis lost its data"})


class _ServerState(NamedTuple):
    """The state of a shared tier as this host knows it.

    Attributes:
        epoch: see `Census`; `""` if the tier was never used.
        others_at: when another host was last seen, in Unix seconds; 0: never.
    """

    epoch: str = ""
    others_at: float = 0.0

    @property
    def alone(self) -> bool:
        return time.time() - self.others_at > HOST_PRESENT_SECONDS


class LossRecovery:
    """Detects that a shared tier has lost its data, and restores what is safe to restore.

    Args:
        tier: the shared tier.
        host: this host.
        trusts_disk: the setting `on_redis_loss` is `"trust_disk"`.

    Attributes:
        interruptions: the tier's count when the last check began.  If the count differs now, the
            tier may have lost something since.
        tombstone_life: see `ServerTier.set_up_recovery`.
    """

    def __init__(self, tier: ServerTier, host: Host, *, trusts_disk: bool) -> None:
        self.tier = tier
        self._host = host
        self._trusts_disk = trusts_disk
        self._id = stamps.token()
        self._known: _ServerState | None = None
        self._register_at = 0.0
        self.interruptions = -1
        self._recovering = False
        self._restored_epoch = ""
        self._registered = 0.0
        self._registrations = 0
        self._lock = threading.Lock()
        self.tombstone_life = HOST_PRESENT_SECONDS if trusts_disk else None

    def must_register(self) -> bool:
        """True if `register` must run before anything is read from the tier."""
        changed = self.tier.client.interruptions != self.interruptions
        return changed or time.monotonic() >= self._register_at

    async def register(self, port: Port) -> None:
        """Register this host, find other hosts, and detect a loss; never raises."""
        self.interruptions = self.tier.client.interruptions
        self._register_at = time.monotonic() + REGISTER_SECONDS
        try:
            await self._register(port)
        except TierError:  # the read that follows gets the same error, and reports it
            self.interruptions = self.tier.client.interruptions
            self._register_at = (
                time.monotonic() + EARLY_REGISTER_SECONDS if self.tier.read_only else 0.0
            )

    async def _register(self, port: Port) -> _ServerState:
        known, times = self._known, self._registrations
        if known is None:
            known = await port.offload(self._load_known)
        census = await self.tier.census(port, self._id, known.epoch)
        # this host's count of registrations only grows: a repeated value means an older state
        went_back = census.registrations is not None and census.registrations <= times
        found = _ServerState(census.epoch, time.time() if census.others else known.others_at)
        if known.epoch not in ("", census.epoch):
            await self._recover(port, census, found)
        elif went_back and census.now - self._registered < FORGOTTEN_SECONDS:
            await self.tier.generations.turn(port, [Turn("n")], _LOST_DATA_NOTE)
            self._report_loss("an older state; results are computed again", warn=True)
        self._registered = max(self._registered, census.now)
        last = 0 if went_back or census.registrations is None else self._registrations
        self._registrations = max(last, census.registrations or 0)
        self._known = found
        if found.epoch != known.epoch or found.others_at > known.others_at + REGISTER_SECONDS:
            await port.offload(self._save_known, found)
        return found

    async def restore_groups(self, port: Port, groups: Sequence[str]) -> bool:
        """Restore those missing groups that this host may; return True if there were any.

        Raises:
            TierError: the tier did not take them.
        """
        try:
            tables = await port.offload(self._host.generations.fields_of_groups, groups)
        except TierError:  # an invalidation is not written yet, so the state here is uncertain
            return False
        if not tables:
            return False
        if self._recovering:
            await self.tier.seed(port, tables)
            return True
        known = await self._register(port)
        if not known.alone:
            return self._trusts_disk  # if Redis lost them, all of them have been restored already
        if self._restored_epoch != known.epoch:
            await self.tier.record_restoring(port, self._id)
            self._restored_epoch = known.epoch
        await self.tier.seed(port, tables)
        return True

    async def _recover(self, port: Port, census: Census, found: _ServerState) -> None:
        """Restore or invalidate groups after the tier has lost its data, and report that."""
        with self._lock:
            if self._recovering:
                return
            self._recovering = self._trusts_disk and not found.alone
        try:
            if self._recovering and time.time() - census.created_at < HOST_PRESENT_SECONDS:
                await self._restore_all(port)
            elif census.was_restored and not found.alone:
                await self.tier.generations.turn(port, [Turn("n")], _LOST_DATA_NOTE)
                await self.tier.record_restoring(port, "")
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
        self._report_loss(how, warn=warn)

    async def _restore_all(self, port: Port) -> None:
        generations = self._host.generations
        with suppress(TierError):
            names = await port.offload(generations.all_groups)
            for at in range(0, len(names), GROUPS_PER_EXCHANGE):
                tables = await port.offload(
                    generations.fields_of_groups, names[at : at + GROUPS_PER_EXCHANGE]
                )
                await self.tier.seed(port, tables)

    def _report_loss(self, how: str, *, warn: bool) -> None:
        import logging  # imported already by a shared tier

        where = self.tier.where
        events.emit(events.Event(events.TIER_LOST, tier=self.tier.name, detail=f"{where}: {how}"))
        level = logging.WARNING if warn else logging.INFO
        logging.getLogger("memo.stores").log(level, "memo: %s has come back with %s.", where, how)

    # --- on this host's disk ----------------------------------------------------------------------

    def _load_known(self) -> _ServerState:
        with suppress(TierError):
            self._id = self._host.id or self._id
            text = self._host.load_note(_CENSUS_NOTE + self.tier.where)
            return _parse_server_state(text)
        return _ServerState()

    def _save_known(self, known: _ServerState) -> None:
        with suppress(TierError):  # then only this process remembers it
            self._host.save_note(_CENSUS_NOTE + self.tier.where, json.dumps(known))


def _parse_server_state(text: str) -> _ServerState:
    try:
        epoch, others_at = json.loads(text)
        return _ServerState(str(epoch), float(others_at))
    except (ValueError, TypeError):
        return _ServerState()
