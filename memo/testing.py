"""For tests of code that uses memo: a cache of its own, a clock that the test moves, the events.

::

    from memo.testing import ManualClock, isolated, recording

    def test_report_is_made_once():
        with isolated(), recording() as events:
            report(2024)
            report(2024)
        assert [event.kind for event in events if event.kind == "hit"] == ["hit"]

    def test_report_expires():
        clock = ManualClock()
        with isolated(clock=clock):
            report(2024)
            clock.advance(3600)
            assert not report.is_cached(2024)
"""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from memo.decorators import assembly
from memo.engine import used_calls
from memo.inspection.under_way import BOARD
from memo.metrics.recorder import reset as reset_stats
from memo.runtime import ownership, ports
from memo.runtime.clock import SECOND, SYSTEM, Clock
from memo.runtime.events import Event, on_event
from memo.settings import configuration
from memo.settings.live_values import live


class ManualClock(Clock):
    """A clock that stands still until it is moved.

    It begins at the present, so that it may be put before entries that exist.
    """

    wall_ns: Callable[[], int]
    boot_ns: Callable[[], int]

    def __init__(self) -> None:
        self._wall = SYSTEM.wall_ns()
        self._boot = SYSTEM.boot_ns()
        self.wall_ns = lambda: self._wall
        self.boot_ns = lambda: self._boot

    def advance(self, seconds: float) -> None:
        """Let `seconds` go by, on both readings."""
        self._wall += int(seconds * SECOND)
        self._boot += int(seconds * SECOND)

    def step(self, seconds: float) -> None:
        """Set the wall clock forward, or back where `seconds` is negative; no time goes by."""
        self._wall += int(seconds * SECOND)


@contextmanager
def isolated(*, clock: Clock | None = None, **settings: Any) -> Iterator[Path]:
    """An empty cache of its own: a fresh directory, a fresh secret, no Redis.

    Settings of the environment and of `pyproject.toml` stay in force where they are not about
    these; what is configured inside ends with the block.  An async test that ends with background
    work (a refresh) under way should `await memo.drain()` before it leaves the block.

    Args:
        clock: tells the time of this cache, for instance a `ManualClock`; not the time that
            `lock_timeout` and other waits take.
        settings: as for `memo.configure`, for instance `redis_url` of a test server.

    Yields:
        The directory, which goes when the block ends.

    Raises:
        SettingError: for a setting with a wrong value.
    """
    with tempfile.TemporaryDirectory(prefix="memo-", ignore_cleanup_errors=True) as place:
        given = {"directory": place, "secret": secrets.token_hex(32), "redis_url": None, **settings}
        with configuration.configure(**given):
            if clock is not None:
                assembly.default_chain().clock = clock
            try:
                yield Path(place)
            finally:
                ports.drain_blocking(ports.EXIT_GRACE)
                BOARD.close()
                assembly.reset()


@contextmanager
def recording() -> Iterator[list[Event]]:
    """Every event that happens inside the block, in order."""
    heard: list[Event] = []
    remove = on_event(heard.append)
    try:
        yield heard
    finally:
        remove()


def reset() -> None:
    """Set memo back to how it was when it was imported, for this process.

    Background work ends (for at most `drivers.EXIT_GRACE` seconds), connections and files are
    closed, `configure`d settings, the counters and the live configuration are forgotten.  What is
    stored stays.
    """
    ports.drain_blocking(ports.EXIT_GRACE)
    BOARD.close()
    used_calls.stop_carrying()
    assembly.reset()
    configuration.reset()
    live.clear()
    ownership.forget()
    reset_stats()
