"""`memo.testing` gives a test a cache of its own, a clock and the events."""

from __future__ import annotations

from pathlib import Path

import pytest

import memo
from memo.testing import ManualClock, expecting, isolated, recording, reset

pytest_plugins = ["pytester"]


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


def test_clock_ends_the_window_of_what_was_let_expire() -> None:
    """After `expire()`, a stale window is over when the test's clock has left it."""
    runs = []

    @memo.cache(ttl=None, stale_while_revalidate=60)
    def load() -> int:
        runs.append(1)
        return len(runs)

    clock = ManualClock()
    with isolated(clock=clock):
        load()
        load.expire()
        clock.advance(120)
        assert load() == 2, "not the stale value"


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


def test_expecting_says_how_calls_were_answered() -> None:
    """The block passes where the counts are right, and tells what was there where they are not."""
    double, _ = counted()
    with isolated():
        with expecting(double, misses=1, computed=1, hits=0) as heard:
            double(1)
        assert "computed" in [event.kind for event in heard]
        with expecting(hits=2):
            double(1)
            double(1)
        with (
            pytest.raises(AssertionError, match=r"expected hits=1, but .* hits=0, misses=1, comp"),
            expecting(double, hits=1),
        ):
            double(2)
        with (
            pytest.raises(AssertionError, match=r"missed: not cached yet"),
            expecting(double.function_id, misses=0),
        ):
            double(3)


def test_expecting_counts_one_function_only() -> None:
    """Calls of other functions are not counted, and an unknown count is named."""
    double, _ = counted()
    other, _ = memo.cache(lambda x: x, name="other"), None
    with isolated():
        with expecting(double, hits=0, misses=0):
            other(1)
        with (
            pytest.raises(memo.OptionError, match="did you mean 'misses'"),
            expecting(double, mises=1),
        ):
            pass


def test_what_is_configured_inside_ends_with_the_block() -> None:
    """Also a setting that the block itself did not set."""
    double, runs = counted()
    with isolated():
        memo.configure(enabled=False)
        assert double(1) == double(1) == 2
    assert runs == [1, 1]
    double(2)
    assert double.is_cached(2)


APP = """
import memo

@memo.cache(ttl="1h")
def report(year):
    return [year]
"""
USE = """
import app

def test_a_report_is_made_once_an_hour(memo_cache):
    app.report(2024)
    with memo_cache.expecting(app.report, hits=1, computed=0):
        app.report(2024)
    memo_cache.clock.advance(3600)
    with memo_cache.expecting(app.report, misses=1):
        app.report(2024)
    assert [event.kind for event in memo_cache.events].count("hit") == 1
    assert any(memo_cache.directory.rglob("*"))

def test_the_next_test_begins_empty(memo_cache):
    with memo_cache.expecting(app.report, misses=1):
        app.report(2024)

def test_the_clock_stands_still(memo_cache, memo_clock):
    assert memo_cache.clock is memo_clock
    assert memo_clock.wall_ns() == memo_clock.wall_ns()

def test_that_fails(memo_cache):
    with memo_cache.expecting(app.report, hits=1):
        app.report(2024)
"""


def test_the_plugin_gives_a_cache_to_each_test(pytester: pytest.Pytester) -> None:
    """A project loads the fixtures in its conftest.py; each test has a cache of its own."""
    pytester.makeconftest('pytest_plugins = ["memo.testing.plugin"]')
    pytester.makepyfile(app=APP, test_app=USE)
    done = pytester.runpytest_subprocess("-p", "no:asyncio")
    done.assert_outcomes(passed=3, failed=1)
    done.stdout.fnmatch_lines(["*report: expected hits=1, but there were hits=0, misses=1,*"])
    assert "memo/testing" not in done.stdout.str(), "no frame of memo's own"
