"""Time that has passed as far as this process can tell: tests advance it instead of sleeping.

For code that takes no clock of its own, a pause between two attempts for instance; where a
`memo.testing.ManualClock` can be given, give that.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from memo.runtime.blocking import drain_blocking
from memo.runtime.clock import SECOND, SYSTEM_CLOCK, Clock

_WALL_NS, _BOOT_NS = time.time_ns, SYSTEM_CLOCK.boot_ns
_MONOTONIC, _PERF_COUNTER = time.monotonic, time.perf_counter
_STUCK = 30.0


class Ahead(Clock):
    """The clock of this machine, ahead by what a test has added; it goes on meanwhile."""

    def __init__(self) -> None:
        self._passed = 0.0
        self._stepped = 0.0
        self._stands: float | None = None
        self._slow = 0.0
        self._wall_stands: int | None = None

    def wall_ns(self) -> int:
        if self._wall_stands is not None:
            return self._wall_stands
        return _WALL_NS() + int((self._passed + self._stepped) * SECOND)

    def boot_ns(self) -> int:
        return _BOOT_NS() + int(self._passed * SECOND)

    def wall(self) -> float:
        return self.wall_ns() / SECOND

    def monotonic(self) -> float:
        self._passed += self._slow
        return (_MONOTONIC() if self._stands is None else self._stands) + self._passed

    def perf_counter(self) -> float:
        return _PERF_COUNTER() + self._passed

    def advance(self, seconds: float) -> None:
        """Let `seconds` go by, on every reading, when no work in the background has a deadline."""
        assert drain_blocking(_STUCK), "work in the background does not end"
        self._passed += seconds

    def work(self, seconds: float) -> None:
        """As `advance`, in the body of a function: so long it works, as far as memo can tell."""
        self._passed += seconds

    def step(self, seconds: float) -> None:
        """Set the wall clock forward, or back where `seconds` is negative; no time goes by."""
        self._stepped += seconds

    def boot(self, boot_id: bytes) -> None:
        """Let the machine have started anew, with this id."""
        SYSTEM_CLOCK.boot_id = boot_id

    def stop_wall(self, wall_ns: int) -> None:
        """Let the wall clock stand at a time."""
        self._wall_stands = wall_ns

    def stop(self) -> None:
        """Let the monotonic clock stand: it goes on by what `advance` and `work` add only.

        Timers of event loops stand as well.
        """
        self._stands = _MONOTONIC()

    @contextmanager
    def slow(self, seconds: float) -> Iterator[None]:
        """Until the block ends, `seconds` go by before each reading of the monotonic clock.

        As on a slow machine: what may take long is over after so many looks at the clock.
        """
        self._slow = seconds
        try:
            yield
        finally:
            self._slow = 0.0


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ahead]:
    """The clock of the whole process, for the length of a test."""
    clock = Ahead()
    readings = {
        "time": clock.wall,
        "time_ns": clock.wall_ns,
        "monotonic": clock.monotonic,
        "perf_counter": clock.perf_counter,
    }
    with monkeypatch.context() as patch:
        for name, reading in readings.items():
            patch.setattr(time, name, reading)
        for name in ("wall_ns", "boot_ns", "boot_id"):
            patch.setattr(SYSTEM_CLOCK, name, getattr(clock, name))
        yield clock
