"""Confirmed entries: used from memory again without asking the shared authority.

An authority that pushes its changes (`Listener`) has confirmed them once.  They stay valid until a
change of their groups arrives, or this host's own generations turn.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from sys import getsizeof

from memo.errors import TierError
from memo.records.seal import Entry
from memo.records.stamp_types import State
from memo.runtime.port import Port
from memo.stores.authorities import Authorities
from memo.stores.protocols import FrontTier, Host, Listener
from memo.validity.check import state_texts, why_changed

LEARN_AGAIN_SECONDS = 1.0
"""Seconds until the host is asked to learn again after it could not."""


class Confirmation:
    """An entry of the memory tier that the shared authority has confirmed.

    Attributes:
        entry: the entry, valid when it was confirmed.
        mark: the listener's mark from before the query; renewed while no change is pushed.
        groups: the groups of its generations.
    """

    __slots__ = ("entry", "groups", "mark")

    def __init__(self, entry: Entry, mark: int) -> None:
        self.entry = entry
        self.mark = mark
        self.groups = tuple(dict.fromkeys(ref.group for ref in entry.refs))

    def __sizeof__(self) -> int:
        """Return the bytes of this object and its entry; the groups are strings of the entry."""
        return object.__sizeof__(self) + getsizeof(self.entry) + getsizeof(self.groups)


class ConfirmedEntries:
    """The confirmed entries of a chain, each beside its record in the memory tier.

    Args:
        front: the memory tier.
        listener: receives the changes of the shared authority.
        authorities: the authorities of the chain.
        fault: reports a fault of a tier: name of the tier, error.
    """

    def __init__(
        self,
        front: FrontTier,
        listener: Listener,
        authorities: Authorities,
        fault: Callable[[str, TierError], None],
    ) -> None:
        self._front = front
        self._listener = listener
        self._authorities = authorities
        self._fault = fault
        self._learn_at = 0.0

    def entry(self, name: str) -> Entry | None:
        """Return the entry under a name if it is confirmed and no change of its groups was pushed.

        The caller still has to compare this host's own generations.
        """
        known = self._front.peek(name)
        if type(known) is not Confirmation:
            return None
        mark = self._listener.renew_mark(known.mark, known.groups)
        if mark is None:
            return None
        known.mark = mark
        return known.entry

    async def states(self, port: Port, name: str, entry: Entry) -> Sequence[State] | None:
        """Return the current states of an entry's generations; confirm the entry if they hold.

        While it is confirmed, only this host is asked.  None if no tier could be asked.
        """
        host, listener = self._authorities.host, self._listener
        if host is None:
            return None
        try:
            if self.entry(name) is entry:
                own = host.generations.read(entry.refs)
                if _hold(entry, own):
                    return own
            mark = listener.mark()
            before = host.generations.read(entry.refs)
            states, by = await self._authorities.states_and_authority(port, entry.refs)
            if mark is None or by is host.generations or not _hold(entry, states):
                return states
            if await self._let_host_learn(port, host, entry, before, states):
                self._front.remember(name, Confirmation(entry, mark), entry.record)
        except TierError:  # the next lookup gets and reports the same error
            return None
        return states

    async def _let_host_learn(
        self,
        port: Port,
        host: Host,
        entry: Entry,
        before: Sequence[State],
        states: Sequence[State],
    ) -> bool:
        """Let this host learn the shared authority's states; True if it reads them now.

        Only then does a turn on this host invalidate the entry.

        Args:
            before: what the host read before the shared authority was asked.
            states: what the shared authority answered.
        """
        if _hold(entry, before):
            return True
        if time.monotonic() < self._learn_at:
            return False
        try:
            await port.offload(host.generations.learn, entry.refs, before, states)
            if _hold(entry, host.generations.read(entry.refs)):
                return True
        except TierError as error:
            self._fault("host", error)
        self._learn_at = time.monotonic() + LEARN_AGAIN_SECONDS
        return False


def _hold(entry: Entry, states: Sequence[State]) -> bool:
    """True if the generations of an entry still have the states that it recorded."""
    return not why_changed(entry.recorded_texts, state_texts(states))
