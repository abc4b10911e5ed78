"""Each guard is needed: with any single one taken out, the history checker finds a broken promise.

`tests/support/mutants.py` takes them out, in the workers.  Where a guard has another behind it, a
deterministic test shows what is lost without it.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import history
import mutants
import pytest
from history import History, Nursery, Stage
from redis_server import RedisServer

import memo
from memo import cache
from memo.coordination.flights import FLIGHTS
from memo.runtime.blocking import drain_blocking
from memo.stores.authorities import Authorities

TRIES = 30
"""So often a mutant may be lucky: on a busy machine few calls fit into a run."""
FAST: dict[str, Any] = {"ttl": None}
SLOW = {"busy": 0.03, "invalidate": 0.2, "regions": 1}
CUTOFF = {"busy": 0.01, "invalidate": 0.1, "regions": 1, "cutoff": True, "ask": 0.6}
FRONT = ["memory", "disk"]


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    """The source of the workers of this module."""
    nursery = Nursery()
    yield nursery
    nursery.close()


def noticed(
    make: Callable[[int], Stage], judge: Callable[[History], list[str]], tries: int = TRIES
) -> bool:
    """True if the judge finds something wrong within some tries."""
    return any(judge(make(attempt).run()) for attempt in range(tries))


def plan(mutant: str, tiers: list[str], **more: Any) -> dict[str, Any]:
    options, settings = more.pop("options", FAST), more.pop("settings", {})
    given = {"tiers": tiers, "deadline": 5.0, **settings}
    return {"mutant": mutant, "settings": given, "options": options, **more}


@pytest.mark.parametrize(
    ("mutant", "tiers", "more"),
    [
        ("comparison", ["disk"], {}),
        ("comparison", FRONT, {}),
        ("comparison_in_memory", FRONT, {}),
        ("comparison_by_the_host", ["disk"], {}),
        ("comparison_by_the_host", FRONT, {}),
        ("stamps_afterwards", ["disk"], SLOW),
        ("stamps_afterwards", FRONT, SLOW),
        ("flights", ["disk"], SLOW),
        ("landing", ["disk"], SLOW),
        ("digests", ["disk"], CUTOFF),
        ("digests", FRONT, CUTOFF),
        ("comparison", FRONT, {"shape": "each"}),
        ("comparison", FRONT, {"shape": "streams"}),
        ("stamps_afterwards", FRONT, {**SLOW, "shape": "each"}),
        ("stamps_afterwards", FRONT, {**SLOW, "shape": "streams"}),
        ("flights", FRONT, {**SLOW, "shape": "each"}),
        ("joining", FRONT, {**SLOW, "shape": "streams"}),
        ("digests", FRONT, {**CUTOFF, "shape": "each"}),
    ],
)
def test_a_guard_is_missed(
    nursery: Nursery, tmp_path: Path, mutant: str, tiers: list[str], more: dict[str, Any]
) -> None:
    """Without it, a call gives what was invalidated before it began (I1)."""

    def make(attempt: int) -> Stage:
        return Stage(nursery, tmp_path / str(attempt), 2.5, plan=plan(mutant, tiers, **more))

    assert noticed(make, history.stale)


def test_the_comparison_is_missed_with_redis(
    nursery: Nursery, tmp_path: Path, redis_server: RedisServer
) -> None:
    """Without it, one host gives what the other has invalidated (I1)."""
    made = plan("comparison", ["redis", "disk"], settings={"redis_url": redis_server.url})

    def make(attempt: int) -> Stage:
        return Stage(nursery, tmp_path / str(attempt), 2.5, hosts=2, plan=made)

    assert noticed(make, history.stale)


def test_without_a_mutant_nothing_is_wrong(nursery: Nursery, tmp_path: Path) -> None:
    """The tests that catch the mutants let the real memo pass."""

    def make(attempt: int) -> Stage:
        made = plan("", FRONT, **SLOW, cutoff=attempt % 2 == 1)
        return Stage(nursery, tmp_path / str(attempt), 0.5, plan=made)

    assert not noticed(make, lambda past: history.stale(past) + history.backwards(past), tries=4)


# --- guards behind guards ------------------------------------------------------------------------


def _call_after_invalidation() -> tuple[str, int]:
    """The answer of a call that begins after an invalidation while an older one still runs."""
    under_way, go_on = threading.Event(), threading.Event()
    given: list[str] = []

    @cache(ttl=None, version="1", name="mutants:detached")
    def load() -> str:
        given.append("old" if not given else "new")
        if len(given) == 1:
            under_way.set()
            go_on.wait(5)
        return given[-1]

    first = threading.Thread(target=load)
    first.start()
    assert under_way.wait(5)
    load.invalidate()
    threading.Timer(0.5, go_on.set).start()
    begun = time.monotonic()
    answer = load()
    waited = time.monotonic() - begun
    go_on.set()
    first.join()
    return answer, round(waited * 2)


def test_whoever_comes_after_an_invalidation_does_not_wait() -> None:
    """A detached flight keeps no later caller waiting."""
    assert _call_after_invalidation() == ("new", 0)


def test_detaching_is_missed() -> None:
    """Without it the later caller waits for the old computation; only the landing protects it."""
    with mutants.applied(mutants.detaching):
        assert _call_after_invalidation()[1] == 1


def _answers_around_an_older_run() -> list[int]:
    """The answers before and after a run is stored that began before the one behind the first."""
    under_way, go_on = threading.Event(), threading.Event()
    numbers = itertools.count()

    @cache(ttl=None, version="1", name="mutants:answer_order")
    def load() -> int:
        mine = next(numbers)
        if mine == 0:
            under_way.set()
            go_on.wait(30)
        return mine

    oldest = threading.Thread(target=load.refresh)
    oldest.start()
    assert under_way.wait(30)
    load.refresh()
    before = load()
    go_on.set()
    oldest.join()
    return [before, load()]


def test_an_older_run_does_not_replace_the_latest_answer() -> None:
    """The run behind an answer never began before that of an earlier answer (I2)."""
    assert _answers_around_an_older_run() == [1, 1]


def test_the_order_of_answers_is_missed() -> None:
    """Without the start of the latest answer, answers go back (I2)."""
    with mutants.applied(mutants.answer_order):
        assert _answers_around_an_older_run() == [1, 0]


def _answer_after_an_outage(server: RedisServer) -> int:
    """The answer once Redis is back, of a call that was invalidated while Redis was away."""
    numbers = itertools.count()

    @cache(ttl=None, version="1", name="mutants:replay")
    def load() -> int:
        return next(numbers)

    settings: dict[str, Any] = {"redis_url": server.url, "tiers": ["redis", "disk"]}
    with memo.configure(deadline=5, **settings):
        assert load() == 0
        assert drain_blocking(30)
        server.kill()
        load.invalidate()
        server.restart()
    with memo.configure(deadline=6, **settings):  # a chain that knows of no outage
        return load()


def test_what_redis_missed_is_replayed(redis_server: RedisServer) -> None:
    """Redis gives nothing that was invalidated while it was away (I7)."""
    assert _answer_after_an_outage(redis_server) == 1


def test_the_replay_is_missed(redis_server: RedisServer) -> None:
    """Without it, Redis gives what was invalidated while it was away (I1)."""
    with mutants.applied(mutants.replay):
        assert _answer_after_an_outage(redis_server) == 0


def test_errors_of_before_are_not_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception of a computation that was invalidated does not reach later callers."""
    under_way, go_on = threading.Event(), threading.Event()
    count: list[int] = []

    @cache(ttl=None, version="1", name="mutants:raising")
    def load() -> str:
        count.append(1)
        if len(count) == 1:
            under_way.set()
            go_on.wait(5)
            raise ValueError("old")
        return "new"

    def first() -> None:
        with pytest.raises(ValueError, match="old"):
            load()

    thread = threading.Thread(target=first)
    thread.start()
    assert under_way.wait(5)
    load.invalidate()
    assert load() == "new"
    go_on.set()
    thread.join()


def test_every_mutant_is_named() -> None:
    """Nothing in the list of mutants is without a test."""
    text = Path(__file__).read_text("utf-8")
    assert [name for name in mutants.APPLY if name not in text] == []
    assert FLIGHTS.joinable_flights() == []
    assert Authorities.why_invalid.__module__ == "memo.stores.authorities"
