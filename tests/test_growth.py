"""Costs grow no faster than the work: two sizes in one run, side by side."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

import memo
from memo.keys.fingerprint.source_history import Manifests


def _best(work: Callable[[], object], rounds: int = 3) -> float:
    """Seconds of the fastest of some rounds."""
    taken = []
    for _ in range(rounds):
        begun = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begun)
    return min(taken)


@pytest.mark.timing
def test_invalidating_many_addresses_is_linear() -> None:
    """Four times as many addresses take at most eight times as long; they took sixteen times."""
    first = iter(range(0, 10**9, 10_000))

    @memo.invalidate_cache(
        key_prefix="p",
        key_resolver=lambda result, n, start: [f"p:{start + x}" for x in range(n)],
    )
    def update(n: int, start: int) -> None:
        """Change `n` products."""

    def updated(n: int) -> float:
        def work() -> None:
            memo.invalidate(prefix="p")
            update(n, next(first))

        return _best(work)

    few, many = updated(400), updated(1600)
    assert many < 8 * few


def test_writing_down_a_code_version_does_not_list_the_others(tmp_path, monkeypatch) -> None:
    """The first call of the 1,000th function costs what that of the first costs."""
    manifests = Manifests(tmp_path / "cache")
    manifests._directory.parent.mkdir(mode=0o700)
    listed = []
    monkeypatch.setattr(Manifests, "_prune", lambda self: listed.append(1))
    for number in range(1000):
        manifests.save(f"{number:032x}", lambda: {"f": "def f(): ..."})
    assert len(listed) <= 2
