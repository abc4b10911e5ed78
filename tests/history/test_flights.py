"""Flights: orders of events that a busy machine brings about once in a hundred thousand calls."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from observed import calls_of
from ports import run
from styles import STYLES, Style

import memo
from memo.coordination.flights import Flights
from memo.testing import recording


def test_one_who_joined_but_has_not_boarded_is_told_the_truth() -> None:
    """Between joining a flight and boarding it, it may land: what it carries is still checked.

    1. A leads.  2. Another process invalidates.  3. B, a call that begins now, joins.
    4. A lands.  5. B boards, and must not take what A computed from before the invalidation.
    """
    computing, invalidated, joined = threading.Event(), threading.Event(), threading.Event()
    runs: list[int] = []

    @memo.cache
    def load() -> int:
        runs.append(1)
        if len(runs) == 1:
            computing.set()
            assert invalidated.wait(60)
            assert joined.wait(60)
        return len(runs)

    first: list[Any] = []
    leader = threading.Thread(target=lambda: first.append(load()))
    leader.start()
    assert computing.wait(10)
    run(f"import memo; memo.invalidate(function={load.function_id!r})")
    invalidated.set()

    def late() -> None:
        joined.set()
        leader.join(10)

    with calls_of(Flights.add_waiter, then=late):
        assert load() == 2
    assert first == [1]


def test_one_who_looked_before_a_flight_landed_looks_again() -> None:
    """Between a look that found nothing and joining, a whole flight may go by (I3).

    1. A looks, and there is nothing.  2. B computes, and lands.  3. A would lead a flight.
    """
    runs: list[int] = []

    @memo.cache
    def load() -> int:
        runs.append(1)
        return len(runs)

    others: list[int] = []

    def late() -> None:
        if not others:
            others.append(0)
            other = threading.Thread(target=lambda: others.append(load()))
            other.start()
            other.join(10)

    with calls_of(Flights.join, then=late):
        assert load() == 1
    assert others == [0, 1]
    assert len(runs) == 1


@pytest.mark.parametrize("style", STYLES, ids=repr)
@pytest.mark.filterwarnings("ignore:.*cannot be pickled:UserWarning")
def test_what_was_computed_alone_vouches_for_nothing(style: Style) -> None:
    """A joiner that computes by itself knows no stamps: what is built on it is not kept (I1)."""
    begun = threading.Event()

    def raw() -> Any:
        begun.set()
        yield 0.3
        return threading.Lock()  # of which no joiner can have a copy

    inner = style.cached(raw, version="1")

    def report() -> Any:
        while not begun.is_set():
            yield 0.001
        yield inner()
        return "report"

    outer = style.cached(report, version="1")
    with recording() as seen:
        assert style.together([inner, outer])[1] == "report"
    assert not outer.is_cached()
    assert "store" not in [event.reason for event in seen], "nor is it tried"


FORKED = """
import os, signal, threading, warnings
import memo
warnings.simplefilter("ignore")
parent, begun, go = os.getpid(), threading.Event(), threading.Event()

@memo.cache(version="1")
def load():
    begun.set()
    if os.getpid() == parent:
        go.wait(30)
    return os.getpid()

thread = threading.Thread(target=load)
thread.start()
begun.wait(30)
child = os.fork()
if child == 0:
    signal.alarm(20)
    os._exit(load() != os.getpid())
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
go.set()
thread.join()
"""


def test_a_child_does_not_wait_for_its_parents_flights() -> None:
    """A process that was forked while another thread computed computes by itself."""
    assert run(FORKED) == "0"
