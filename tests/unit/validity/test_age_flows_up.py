"""Age flows up: what is built on an expiring or a stale answer is no fresher than that answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from ways import PLACES, Way

import memo
from memo.errors import OptionError
from memo.testing import ManualClock, isolated, recording

RUNS: Counter[str] = Counter()


@pytest.fixture
def clock() -> ManualClock:
    RUNS.clear()
    return ManualClock()


@pytest.fixture(params=PLACES, autouse=True)
def _at(request: pytest.FixtureRequest, clock: ManualClock) -> Iterator[None]:
    """Disk alone, or a real Redis over the disk, under a clock that the test sets."""
    settings = {}
    if request.param != "disk":
        settings["redis_url"] = request.getfixturevalue("redis_server").url
    with isolated(clock=clock, **settings):
        yield


def _three(way: Way, inner: Any, middle: Any, outer: Any) -> tuple[Any, Any, Any]:
    """Three functions, each built on the one before, with these options."""
    base = way.cached(lambda x: RUNS.update(["raw"]) or 1, name="raw", **inner)
    if way.name == "async":

        @memo.cache(version="1", name="clean", **middle)
        async def clean(x: Any) -> Any:
            RUNS["clean"] += 1
            return await base(x)

        @memo.cache(version="1", name="report", **outer)
        async def report() -> Any:
            RUNS["report"] += 1
            return await clean("EU")

        return base, clean, report

    @memo.cache(version="1", name="clean", **middle)
    def tidy(x: Any) -> Any:
        RUNS["clean"] += 1
        return base(x)

    @memo.cache(version="1", name="report", **outer)
    def total() -> Any:
        RUNS["report"] += 1
        return tidy("EU")

    return base, tidy, total


INHERIT = {"ttl": "inherit"}


def test_inherit_without_anything_that_expires(way: Way, clock: ManualClock) -> None:
    """Without a ttl beneath, there is none above."""
    _, _, report = _three(way, {"ttl": None}, INHERIT, INHERIT)
    way.call(report)
    clock.advance(10 * 365 * 86_400)
    RUNS.clear()
    way.call(report)
    assert RUNS == {}


def test_explain_shows_where_a_lifetime_comes_from(way: Way, clock: ManualClock) -> None:
    """The path leads to the call that expires, and says when."""
    _, _, report = _three(way, {"ttl": 240}, INHERIT, {**INHERIT, "stale_while_revalidate": "1h"})
    way.call(report)
    said = str(report.explain())
    assert "built on clean:EU, that on raw:EU, fresh for 4 min 00 s more" in said
    clock.advance(480)
    said = str(report.explain())
    assert "built on clean:EU, that on raw:EU, expired 4 min 00 s ago" in said


def test_what_is_built_on_a_stale_answer_is_stale(way: Way, clock: ManualClock) -> None:
    """A result with a long ttl of its own is computed anew once the stale answer was refreshed."""
    window = {"stale_while_revalidate": "1h"}
    base, _, report = _three(way, {"ttl": 60, **window}, {"ttl": 3600}, {"ttl": 3600, **window})
    way.call(base, "EU")
    clock.advance(90)
    way.call(report)  # of a stale answer of `raw`, which is refreshed meanwhile
    memo.runtime.blocking.drain_blocking(10)
    said = str(report.explain())
    assert "stale" in said
    assert "built on clean:EU, that on raw:EU, expired 30.0 s ago" in said
    RUNS.clear()
    with recording() as events:
        way.call(report)
        memo.runtime.blocking.drain_blocking(10)
    assert "stale" in [event.kind for event in events]
    assert RUNS == {"clean": 1, "report": 1}
    RUNS.clear()
    with recording() as events:
        way.call(report)
    assert [event.kind for event in events] == ["hit"]


def test_an_answer_that_expires_meanwhile_was_fresh(way: Way, clock: ManualClock) -> None:
    """A result counts as it was when it was used: a slow computation is stored all the same."""
    base = way.cached(lambda x: 1, name="raw", ttl=60)

    if way.name == "async":

        @memo.cache(ttl=3600, version="1")
        async def slow() -> Any:
            RUNS["slow"] += 1
            value = await base("EU")
            clock.advance(90)
            return value

        outer: Any = slow
    else:

        @memo.cache(ttl=3600, version="1")
        def also_slow() -> Any:
            RUNS["slow"] += 1
            value = base("EU")
            clock.advance(90)
            return value

        outer = also_slow
    way.call(outer)
    way.call(outer)
    assert RUNS["slow"] == 1


def test_an_old_value_instead_of_an_error_counts_as_stale(way: Way, clock: ManualClock) -> None:
    """`stale_if_error` beneath makes what is built on it stale too."""
    fails: list[bool] = []

    def body(x: Any) -> Any:
        if fails:
            raise LookupError
        return 1

    base = way.cached(body, name="raw", ttl=60, stale_if_error="1h")
    if way.name == "async":

        @memo.cache(ttl=3600, version="1")
        async def built() -> Any:
            RUNS["built"] += 1
            return await base("EU")

        outer: Any = built
    else:

        @memo.cache(ttl=3600, version="1")
        def also_built() -> Any:
            RUNS["built"] += 1
            return base("EU")

        outer = also_built
    way.call(base, "EU")
    clock.advance(90)
    fails.append(True)
    way.call(outer)
    way.call(outer)
    assert RUNS["built"] == 2
    fails.clear()
    way.call(outer)
    way.call(outer)
    assert RUNS["built"] == 3


def test_a_ttl_of_another_word_is_refused() -> None:
    """`"inherit"` is the only word."""
    with pytest.raises(OptionError, match="inherits"):
        memo.cache(ttl="inherits")
