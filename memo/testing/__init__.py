"""Test helpers for code that uses memo: an isolated cache, a clock that the test moves, events.

::

    from memo.testing import ManualClock, expecting, isolated

    def test_report_is_made_once():
        with isolated():
            report(2024)
            with expecting(report, hits=1, computed=0):
                report(2024)

    def test_report_expires():
        clock = ManualClock()
        with isolated(clock=clock):
            report(2024)
            clock.advance(3600)
            assert not report.is_cached(2024)

With pytest, `pytest_plugins = ["memo.testing.plugin"]` in `conftest.py` gives the same as fixtures.

May import every folder, and none imports it.  Start with `isolated`.
"""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from memo.decorators import assembly
from memo.decorators.cached_function import CachedFunction
from memo.engine import used_calls
from memo.errors import OptionError, label, nearest_hint
from memo.metrics.recorder import reset as reset_stats
from memo.metrics.running_computations import COMPUTATIONS
from memo.runtime import blocking, events, ownership
from memo.runtime.clock import SECOND, SYSTEM_CLOCK, Clock
from memo.runtime.events import Event, on_event
from memo.settings import configuration, secret_keys


class ManualClock(Clock):
    """A clock that stands still until it is moved.

    It starts at the current time, so that it can be used with entries that exist.
    """

    wall_ns: Callable[[], int]
    boot_ns: Callable[[], int]

    def __init__(self) -> None:
        self._wall = SYSTEM_CLOCK.wall_ns()
        self._boot = SYSTEM_CLOCK.boot_ns()
        self.wall_ns = lambda: self._wall
        self.boot_ns = lambda: self._boot

    def advance(self, seconds: float) -> None:
        """Let `seconds` pass, on both readings."""
        self._wall += int(seconds * SECOND)
        self._boot += int(seconds * SECOND)

    def step(self, seconds: float) -> None:
        """Set the wall clock forward, or back if `seconds` is negative; no time passes."""
        self._wall += int(seconds * SECOND)


@contextmanager
def isolated(*, clock: Clock | None = None, **settings: Any) -> Iterator[Path]:
    """Use an empty cache: a temporary directory, a new secret, no Redis.

    Other settings of the environment and of `pyproject.toml` stay in force; what is configured
    inside ends with the block.  An async test that ends while background work (a refresh) is
    running should `await memo.drain()` before it leaves the block.

    Args:
        clock: tells the time of this cache, for instance a `ManualClock`; it does not affect
            `lock_timeout` and other waits.
        settings: as for `memo.configure`, for instance `redis_url` of a test server.

    Yields:
        The directory, which is removed at the end of the block.

    Raises:
        SettingError: for a setting with a wrong value.
    """
    with tempfile.TemporaryDirectory(prefix="memo-", ignore_cleanup_errors=True) as place:
        given = {"directory": place, "secret": secrets.token_hex(32), "redis_url": None, **settings}
        with configuration.restoring(), configuration.configure(**given):
            if clock is not None:
                assembly.default_chain().clock = clock
            try:
                yield Path(place)
            finally:
                blocking.drain_blocking(blocking.EXIT_GRACE_SECONDS)
                COMPUTATIONS.close()
                assembly.reset()


KIND_BY_COUNT: Final = {
    "hits": events.HIT,
    "stale": events.STALE,
    "misses": events.MISS,
    "shared": events.COALESCED,
    "computed": events.COMPUTED,
}
"""Outcome that a test can expect -> the kind of its events."""


@contextmanager
def expecting(
    function: CachedFunction[..., Any] | str | None = None, /, **counts: int
) -> Iterator[list[Event]]:
    """Assert how the calls inside a block are answered.

    ::

        with expecting(load, hits=1, computed=0):
            load("EU")

    Args:
        function: a cached function, or its id; None: all of them.
        counts: numbers of `hits`, `stale`, `misses`, `shared` and `computed`; others are not
            checked.

    Yields:
        The events of the block, in order.

    Raises:
        AssertionError: at the end of the block, if a number differs.
        OptionError: there is no such count.
    """
    for name, count in counts.items():
        if name not in KIND_BY_COUNT:
            known = ", ".join(KIND_BY_COUNT)
            raise OptionError(
                name, count, f"is not counted{nearest_hint(name, KIND_BY_COUNT)}; give {known}"
            )
    wanted = function.function_id if isinstance(function, CachedFunction) else function
    with recording() as heard:
        yield heard
    mine = [event for event in heard if wanted is None or event.function == wanted]
    found = {
        name: sum(event.kind == KIND_BY_COUNT[name] for event in mine) for name in KIND_BY_COUNT
    }
    if any(found[name] != count for name, count in counts.items()):
        __tracebackhide__ = True
        expected = ", ".join(f"{name}={count}" for name, count in counts.items())
        seen = ", ".join(
            f"{name}={found[name]}" for name in KIND_BY_COUNT if found[name] or name in counts
        )
        why = {event.reason: None for event in mine if event.kind == events.MISS}
        reasons = f" (missed: {', '.join(why)})" if why else ""
        what = "all functions" if wanted is None else label(wanted)
        raise AssertionError(f"{what}: expected {expected}, but there were {seen}{reasons}")


@contextmanager
def recording() -> Iterator[list[Event]]:
    """Record every event that happens inside the block, in order."""
    heard: list[Event] = []
    remove = on_event(heard.append)
    try:
        yield heard
    finally:
        remove()


def reset() -> None:
    """Reset memo in this process to the state after its import.

    Background work ends (within `blocking.EXIT_GRACE_SECONDS`), connections and files are closed,
    and `configure`d settings, the counters, the live configuration and a secret that could not be
    kept are forgotten.  Stored entries stay.
    """
    blocking.drain_blocking(blocking.EXIT_GRACE_SECONDS)
    COMPUTATIONS.close()
    used_calls.stop_following_threads()
    assembly.reset()
    configuration.reset()
    secret_keys.forget()
    assembly.live.clear()
    ownership.forget()
    reset_stats()
