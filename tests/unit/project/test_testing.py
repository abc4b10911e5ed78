"""`memo.testing` gives a test a cache of its own, a clock and the events."""

from __future__ import annotations

from pathlib import Path

import pytest

import memo
from memo.testing import ManualClock, isolated, recording, reset


def counted():
    """A cached function, and the list of what it computed."""
    runs: list[int] = []

    @memo.cache(ttl="1h")
    def double(n: int) -> int:
        runs.append(n)
        return 2 * n

    return double, runs


def test_isolated_cache_is_empty_and_goes() -> None:
    """Inside, nothing stored outside is seen; outside, nothing stored inside is left."""
    double, runs = counted()
    assert double(1) == 2
    with isolated() as place:
        assert not double.is_cached(1)
        assert double(1) == double(1) == 2
        assert any(place.rglob("*"))
    assert not place.exists()
    assert double(1) == 2
    assert runs == [1, 1]


def test_isolated_takes_settings() -> None:
    """Any setting can be given, and ends with the block."""
    double, runs = counted()
    with isolated(enabled=False):
        assert double(1) == double(1) == 2
    assert runs == [1, 1]
    double(2)
    assert double.is_cached(2)


def test_isolated_refuses_wrong_settings() -> None:
    """A wrong setting is an error, as in `configure`."""
    with pytest.raises(memo.SettingError, match="size_limit"), isolated(size_limit="a lot"):
        pass


def test_clock_lets_entries_expire() -> None:
    """An hour of the test's clock is an hour of an entry's ttl."""
    double, runs = counted()
    clock = ManualClock()
    with isolated(clock=clock):
        double(1)
        clock.advance(3599)
        double(1)
        assert runs == [1]
        clock.advance(2)
        double(1)
        assert runs == [1, 1]


def test_step_of_the_wall_clock_is_no_time() -> None:
    """Setting the wall clock, forward or back, ages nothing (I9)."""
    double, runs = counted()
    clock = ManualClock()
    with isolated(clock=clock):
        double(1)
        clock.step(86400)
        double(1)
        clock.step(-2 * 86400)
        double(1)
    assert runs == [1]


def test_recording_hears_what_happens_inside() -> None:
    """Events inside the block are there in order, events after it are not."""
    double, _ = counted()
    with isolated():
        with recording() as heard:
            double(1)
            double(1)
        double(1)
    kinds = [event.kind for event in heard]
    assert kinds.count("hit") == 1
    assert kinds.index("computed") < kinds.index("hit")


def test_reset_forgets_settings_and_counts_but_keeps_entries(tmp_path: Path) -> None:
    """After `reset`, memo is as it was when it was imported; what is stored stays."""
    double, runs = counted()
    double(1)
    memo.configure(directory=tmp_path / "other")
    memo.live["ttl.x"] = 5
    reset()
    assert "ttl.x" not in memo.live
    assert double.cache_info().misses == 0
    assert double(1) == 2
    assert runs == [1]
