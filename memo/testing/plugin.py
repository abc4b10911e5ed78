"""Fixtures of pytest: `pytest_plugins = ["memo.testing.plugin"]` in `conftest.py` loads them.

`memo_cache` is an empty cache for one test, with a clock that stands still::

    def test_a_report_is_made_once_an_hour(memo_cache):
        report(2024)
        with memo_cache.expecting(report, hits=1, computed=0):
            report(2024)
        memo_cache.clock.advance(3600)
        with memo_cache.expecting(report, misses=1):
            report(2024)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from memo.decorators.cached_function import CachedFunction
from memo.runtime.events import Event
from memo.runtime.named_tuple import NamedTuple
from memo.testing import ManualClock, expecting, isolated, recording


class MemoCache(NamedTuple):
    """The cache of one test.

    Attributes:
        directory: the directory of its entries.
        clock: its time, which stands still until the test moves it.
        events: everything that has happened so far, in order.
    """

    directory: Path
    clock: ManualClock
    events: list[Event]

    def expecting(
        self, function: CachedFunction[..., Any] | str | None = None, /, **counts: int
    ) -> AbstractContextManager[list[Event]]:
        """Assert how the calls inside a block are answered; see `memo.testing.expecting`."""
        return expecting(function, **counts)


@pytest.fixture
def memo_clock() -> ManualClock:
    """The clock of `memo_cache`: it stands still until the test moves it."""
    return ManualClock()


@pytest.fixture
def memo_cache(memo_clock: ManualClock) -> Iterator[MemoCache]:
    """An empty cache for one test: its own directory and secret, no Redis, a frozen clock.

    What is configured while the test runs ends with it.
    """
    with isolated(clock=memo_clock) as directory, recording() as heard:
        yield MemoCache(directory, memo_clock, heard)
