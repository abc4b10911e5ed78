"""Reseeding: a Redis that came back empty gets this host's generations again.

Rules of this module:

1.  Each host registers in Redis, beside an *epoch* that is made once.  A host that finds another
    epoch than before knows that Redis has lost its data.
2.  A host that is alone in its namespace has all invalidations on its own disk.  Whatever group
    Redis lost, it may give back, when the group is asked for.
3.  Where other hosts were seen within `REMEMBERED`, they may have invalidated what this host has
    not heard of.  With `"recompute"` nothing is given back; with `"trust_disk"` all groups of this
    host are, once for each new epoch.
4.  Only a group that is missing is given back.  An invalidation of a missing group writes it, so
    nothing that was invalidated since comes back.
5.  A Redis that has gone back to an older state may have lost invalidations: a host that finds its
    own registration there older than what it wrote invalidates everything.
6.  A host that was not alone, and finds after a loss that another one gave groups back, has joined
    after that one last looked: it invalidates all of them.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from memo.errors import TierError
from memo.runtime.events import TIER_LOST, Event, emit
from memo.runtime.port import Port
from memo.stores.protocols import Census, Host, Losable
from memo.validity import stamps
from memo.validity.stamps import Turn

LOOK_EVERY = 5.0
"""Seconds after which a host looks again for other hosts."""
LOOK_SOON = 1.0
"""Seconds until the next look where the tier takes no writes."""
REMEMBERED = 30 * 86400.0
"""Seconds for which another host counts that was seen once."""
FORGOTTEN = 43_200.0
"""Seconds without a look after which a registration may have been removed by other hosts."""
BATCH = 500
"""Groups that are given back in one exchange."""
_NOTE = "census "
_WHY = json.dumps({"reason": "Redis lost its data"})

_log = logging.getLogger("memo.stores")


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
    """

    def __init__(self, tier: Losable, host: Host, *, trusts_disk: bool) -> None:
        self._tier = tier
        self._host = host
        self._trusts_disk = trusts_disk
        self._id = stamps.token()
        self._known: _Known | None = None
        self._look_at = 0.0
        self._interruptions = -1
        self._recovering = False
        self._given = ""
        self._registered = 0.0
        self._lock = threading.Lock()
        tier.on_lost = self.give_back
        if trusts_disk:
            tier.tomb = REMEMBERED

    def due(self) -> bool:
        """True if to `look` before anything is read from the tier."""
        return time.monotonic() >= self._look_at or self.interrupted()

    def interrupted(self) -> bool:
        """True if the tier may have lost something since the last look began."""
        return self._tier.interruptions != self._interruptions

    async def look(self, port: Port) -> None:
        """Register this host, see which others there are, and notice a loss; never raises."""
        self._interruptions = self._tier.interruptions
        self._look_at = time.monotonic() + LOOK_EVERY
        try:
            await self._look(port)
        except TierError:  # met again, and said, by the read that follows
            self._interruptions = self._tier.interruptions
            self._look_at = time.monotonic() + LOOK_SOON if self._tier.read_only else 0.0

    async def _look(self, port: Port) -> _Known:
        known = self._known
        if known is None:
            known = await port.offload(self._recall)
        census = await self._tier.census(port, self._id, known.epoch)
        found = _Known(census.epoch, time.time() if census.others else known.others_at)
        if known.epoch not in ("", census.epoch):
            await self._recover(port, census, found)
        elif census.before < self._registered and census.now - self._registered < FORGOTTEN:
            await self._tier.turn(port, [Turn("n")], _WHY)
            self._tell("an older state; results are computed again", logging.WARNING)
        self._registered = max(self._registered, census.now)
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
            await self._tier.seed(port, tables)
            return True
        known = await self._look(port)
        if not known.alone:
            return self._trusts_disk  # if that was a loss, all of them have been given back
        if self._given != known.epoch:
            await self._tier.giving_back(port, self._id)
            self._given = known.epoch
        await self._tier.seed(port, tables)
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
                await self._tier.turn(port, [Turn("n")], _WHY)
                await self._tier.giving_back(port, "")
        finally:
            self._recovering = False
        how, level = "no data; results are computed again", logging.WARNING
        if found.alone:
            how, level = "no data; results stay valid: no other host uses it", logging.INFO
        elif self._trusts_disk:
            how, level = (
                'no data; results on this host stay valid (on_redis_loss="trust_disk")',
                logging.INFO,
            )
        else:
            how += ' (on_redis_loss="trust_disk" would keep those on each host)'
        self._tell(how, level)

    async def _give_back_all(self, port: Port) -> None:
        generations = self._host.generations
        with suppress(TierError):
            names = await port.offload(generations.all_names)
            for at in range(0, len(names), BATCH):
                tables = await port.offload(generations.tables, names[at : at + BATCH])
                await self._tier.seed(port, tables)

    def _tell(self, how: str, level: int) -> None:
        where = self._tier.where
        emit(Event(TIER_LOST, tier=self._tier.name, detail=f"{where}: {how}"))
        _log.log(level, "memo: %s has come back with %s.", where, how)

    # --- what is kept on the disk ----------------------------------------------------------------

    def _recall(self) -> _Known:
        with suppress(TierError):
            self._id = self._host.id or self._id
            text = self._host.noted(_NOTE + self._tier.where)
            return _known(text)
        return _Known()

    def _remember(self, known: _Known) -> None:
        with suppress(TierError):  # then the process has it
            self._host.note(_NOTE + self._tier.where, json.dumps(known))


def _known(text: str) -> _Known:
    try:
        epoch, others_at = json.loads(text)
        return _Known(str(epoch), float(others_at))
    except (ValueError, TypeError):
        return _Known()
