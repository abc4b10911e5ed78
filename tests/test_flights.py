"""Flights: orders of events that a busy machine brings about once in a hundred thousand calls."""

from __future__ import annotations

import threading
from typing import Any

import pytest

import memo
from memo.flights import FLIGHTS


def test_one_who_joined_but_has_not_boarded_is_told_the_truth(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Between joining a flight and boarding it, it may land: what it carries is still checked.

    1. A leads.  2. Somebody else's process invalidates.  3. B, whose call begins now, joins.
    4. A lands.  5. B boards, and must not take what A computed from before the invalidation.
    """
    computing, invalidated, joined = threading.Event(), threading.Event(), threading.Event()
    runs: list[int] = []

    @memo.cache
    def load() -> int:
        runs.append(1)
        if len(runs) == 1:
            computing.set()
            assert invalidated.wait(10)
            assert joined.wait(10)
        return len(runs)

    first: list[Any] = []
    leader = threading.Thread(target=lambda: first.append(load()))
    leader.start()
    assert computing.wait(10)
    monkeypatch.setattr(FLIGHTS, "detach", lambda turns: 0)  # as if from another process
    load.invalidate()
    invalidated.set()
    board = FLIGHTS.board

    def late(flight: Any, port: Any) -> Any:
        joined.set()
        leader.join(10)
        return board(flight, port)

    monkeypatch.setattr(FLIGHTS, "board", late)
    assert load() == 2
    assert first == [1]
