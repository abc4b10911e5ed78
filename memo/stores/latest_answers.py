"""Floors: when the computations behind the latest answers of this process began (I2).

No answer comes from an older computation than one that was given before.
"""

from __future__ import annotations

import threading

from memo.runtime.clock import Clock

FLOORS = 65_536
"""How many keys' latest answers are remembered at least."""


class Floors:
    """The floor of each key that was answered lately.  Safe from every thread."""

    def __init__(self) -> None:
        self._floors: dict[str, int] = {}
        self._old_floors: dict[str, int] = {}
        self._lock = threading.Lock()

    def rise(self, key: str, started: int) -> None:
        """Remember when the computation behind the latest answer for a key began."""
        if self._floors.get(key, 0) < started:
            with self._lock:
                self._floors[key] = max(started, self._floor(key))
                if len(self._floors) >= FLOORS:
                    self._old_floors, self._floors = self._floors, {}

    def _floor(self, key: str) -> int:
        """When the computation behind the latest answer for a key began; 0: not known.

        In this order, since the younger floors become the old ones while others look.
        """
        return self._floors.get(key) or self._old_floors.get(key, 0)

    def older(self, key: str, started: int) -> bool:
        """Whether an answer already given for a key was computed later (I2)."""
        return started < (self._floors.get(key) or self._old_floors.get(key, 0))

    def has_answered(self, key: str) -> bool:
        """Whether this process has stored or used an entry of this key."""
        return self._floor(key) > 0

    def start_time(self, key: str, clock: Clock) -> int:
        """A start time for a computation: the wall clock, but never before an answer given."""
        return max(clock.wall_ns(), self._floor(key) + 1)
