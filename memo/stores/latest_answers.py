"""Floors: when the computations behind the latest answers of this process began (I2).

No answer comes from an older computation than one that was given before.
"""

from __future__ import annotations

import sys
import threading

from memo.runtime.clock import Clock
from memo.runtime.memory_budget import BUDGET

FLOORS = 65_536
"""How many keys' latest answers are remembered at least, where memory is no concern."""
LEAST = 4096
"""As many in any case."""
_SHARE = 2048
"""Bytes of the memory limit for each of them."""
_EACH = sys.getsizeof("0" * 40) + sys.getsizeof(1 << 62)
"""Bytes of a key and a time."""


class Floors:
    """The floor of each key that was answered lately.  Safe from every thread.

    Args:
        limit: of the memory tier in bytes; 0: there is none.
    """

    def __init__(self, limit: int = 0) -> None:
        self._most = min(FLOORS, max(LEAST, limit // _SHARE)) if limit else FLOORS
        self.floors: dict[str, int] = {}
        self.old_floors: dict[str, int] = {}
        self._lock = threading.Lock()
        BUDGET.add_table(self)

    def __sizeof__(self) -> int:
        """Bytes of all floors."""
        tables = (self.floors, self.old_floors)
        return sum(sys.getsizeof(table) + _EACH * len(table) for table in tables)

    def rise(self, key: str, started: int) -> None:
        """Remember when the computation behind the latest answer for a key began."""
        if self.floors.get(key, 0) < started:
            with self._lock:
                self.floors[key] = max(started, self._floor(key))
                if len(self.floors) >= self._most:
                    self.old_floors, self.floors = self.floors, {}

    def _floor(self, key: str) -> int:
        """When the computation behind the latest answer for a key began; 0: not known.

        In this order, since the younger floors become the old ones while others look.
        """
        return self.floors.get(key) or self.old_floors.get(key, 0)

    def admits(self, key: str, started: int) -> bool:
        """True if an answer that was computed then may be given: now none before it may (I2)."""
        if self.floors.get(key) == started:
            return True
        if self.older(key, started):
            return False
        self.rise(key, started)
        return True

    def older(self, key: str, started: int) -> bool:
        """True if an answer already given for a key was computed later (I2)."""
        return started < (self.floors.get(key) or self.old_floors.get(key, 0))

    def has_answered(self, key: str) -> bool:
        """True if this process has stored or used an entry of this key."""
        return self._floor(key) > 0

    def start_time(self, key: str, clock: Clock) -> int:
        """A start time for a computation: the wall clock, but never before an answer given."""
        return max(clock.wall_ns(), self._floor(key) + 1)
