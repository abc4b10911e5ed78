"""The promises of every chain, seen through `cache`: one store, a user's own, and several tiers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest
from providers import InADict
from styles import Style

import memo
from memo.testing import ManualClock, expecting, isolated

CHAINS = {
    "memory": ["memory"],
    "disk": ["disk"],
    "redis": ["redis"],
    "custom": ["custom"],
    "memory, disk": ["memory", "disk"],
    "redis, disk": ["redis", "disk"],
    "memory, redis, disk": ["memory", "redis", "disk"],
    "memory, custom, disk": ["memory", "custom", "disk"],
}


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture(params=CHAINS)
def tiers(request: pytest.FixtureRequest, clock: ManualClock) -> Iterator[list[Any]]:
    """An empty cache with these tiers, whose time the test moves."""
    names = CHAINS[request.param]
    chosen: list[Any] = [InADict() if name == "custom" else name for name in names]
    url = request.getfixturevalue("redis_server").url if "redis" in names else None
    with isolated(clock=clock, tiers=chosen, redis_url=url, deadline=5):
        yield chosen


@pytest.fixture(params=["sync", "async"])
def style(request: pytest.FixtureRequest) -> Style:
    return Style(request.param)


class Source:
    """A source of rows, which counts how often each region was loaded."""

    def __init__(self) -> None:
        self.loads: list[str] = []

    def rows(self, region: str) -> dict[str, Any]:
        self.loads.append(region)
        return {"region": region, "load": len(self.loads), "rows": [1, 2]}


@pytest.mark.usefixtures("tiers")
def test_computed_once_and_private(style: Style) -> None:
    """A second call hits; a caller that changes its result changes nothing for others."""
    source = Source()
    load = style.cached(source.rows, ttl=60, name="load")
    style.call(load, "EU")["rows"].append(3)
    style.call(load, "EU")["rows"].append(4)
    assert style.call(load, "EU")["rows"] == [1, 2]
    assert source.loads == ["EU"]


@pytest.mark.usefixtures("tiers")
def test_other_arguments_are_other_entries(style: Style) -> None:
    """Arguments that are equal but of other types do not share an entry."""
    load = style.cached(lambda value: type(value).__name__, ttl=60, name="load")
    values = [1, 1.0, True, "1", b"1", None, (1,), [1]]
    for _ in range(2):
        assert [style.call(load, value) for value in values] == [
            type(value).__name__ for value in values
        ]


@pytest.mark.usefixtures("tiers")
def test_invalidated_by_argument_tag_and_whole(style: Style) -> None:
    """An invalidation reaches what it names, in every tier, and nothing else."""
    source = Source()
    load = style.cached(source.rows, ttl=60, name="load", tags=["sales"])
    for region in ("EU", "US"):
        style.call(load, region)
    assert load.invalidate(region="EU").complete
    assert [style.call(load, region)["load"] for region in ("EU", "US")] == [3, 2]
    memo.invalidate(tag="sales")
    assert [style.call(load, region)["load"] for region in ("EU", "US")] == [4, 5]
    load.invalidate()
    assert [style.call(load, region)["load"] for region in ("EU", "US")] == [6, 7]


@pytest.mark.usefixtures("tiers")
def test_fresh_until_its_ttl(style: Style, clock: ManualClock) -> None:
    """An entry answers until its ttl has passed, also if the wall clock is set back."""
    source = Source()
    load = style.cached(source.rows, ttl=60, name="load")
    style.call(load, "EU")
    clock.advance(59)
    assert style.call(load, "EU")["load"] == 1
    clock.step(-3600)
    clock.advance(2)
    assert style.call(load, "EU")["load"] == 2


def call_and_drain(style: Style, function: Any, *args: Any) -> Any:
    """One call, and the end of the background work that it began."""

    async def called() -> Any:
        value = function(*args)
        value = await value if style.is_async else value
        assert await memo.drain(10)
        return value

    return asyncio.run(called())


@pytest.mark.usefixtures("tiers")
def test_stale_then_refreshed(style: Style, clock: ManualClock) -> None:
    """Within its stale window the old value answers at once, and a refresh replaces it."""
    source = Source()
    load = style.cached(source.rows, ttl=60, stale_while_revalidate=600, name="load")
    style.call(load, "EU")
    clock.advance(61)
    with expecting(load, stale=1):
        assert call_and_drain(style, load, "EU")["load"] == 1
    with expecting(load, hits=1, stale=0):
        assert style.call(load, "EU")["load"] == 2


@pytest.mark.usefixtures("tiers")
def test_big_results_come_back_equal(style: Style) -> None:
    """A frame whose buffers lie in a payload comes back equal, and is the caller's own."""
    frame = pd.DataFrame({"x": np.arange(200_000.0), "y": ["a", "b"] * 100_000})
    runs: list[int] = []

    def rows(region: str) -> pd.DataFrame:
        runs.append(1)
        return frame

    load = style.cached(rows, ttl=60, name="load")
    call_and_drain(style, load, "EU")
    found = style.call(load, "EU")
    pd.testing.assert_frame_equal(found, frame)
    found.loc[0, "x"] = -1.0
    pd.testing.assert_frame_equal(style.call(load, "EU"), frame)
    assert len(runs) == 1


@pytest.mark.usefixtures("tiers")
def test_looked_at_put_and_cleared(style: Style) -> None:
    """`is_cached`, `peek`, `put` and `cache_clear` see and change the same entries."""
    source = Source()
    load = style.cached(source.rows, ttl=60, name="load")
    assert not load.is_cached("EU")
    load.put({"rows": "mine"}, "EU")
    assert load.is_cached("EU")
    assert load.peek("EU") == style.call(load, "EU") == {"rows": "mine"}
    load.cache_clear()
    assert load.peek("EU", default="nothing") == "nothing"
    assert style.call(load, "EU")["load"] == 1
