"""A user's own store: what it is asked, and what becomes of one that answers wrongly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from providers import InADictAtOnce
from redis_server import RedisServer
from styles import STYLES, Style

import memo
from memo.testing import recording

styles = pytest.mark.parametrize("style", STYLES, ids=str)
RESULTS = {"small": 5, "with a payload": np.arange(100_000)}


def cached(style: Style, provider: Any, result: Any) -> tuple[Any, list[int]]:
    ran: list[int] = []

    def load(x: int) -> Any:
        ran.append(x)
        return result

    options = {"ttl": 60, "tags": ["a", "b"], "key_prefix": "load:more", "provider": provider}
    return style.cached(load, **options), ran


@styles
@pytest.mark.parametrize("result", RESULTS.values(), ids=RESULTS)
def test_a_hit_costs_two_round_trips(style: Style, result: Any) -> None:
    """With `get_many` a hit asks for the record, and for all that tells whether it is valid."""
    provider = InADictAtOnce()
    load, ran = cached(style, provider, result)
    style.call(load, 1)
    for _ in range(3):
        provider.calls.clear()
        assert np.array_equal(style.call(load, 1), result)
        assert provider.calls == ["get", "get_many"]
    assert ran == [1]


@styles
def test_storing_costs_few_round_trips(style: Style) -> None:
    """With `set_many` a result and its payload go together, and so do groups."""
    provider = InADictAtOnce()
    load, _ = cached(style, provider, RESULTS["with a payload"])
    style.call(load, 1)
    assert provider.calls.count("set") == 0
    assert provider.calls.count("set_many") == 2


@styles
@pytest.mark.parametrize(
    "drop",
    [
        lambda load: load.invalidate(),
        lambda load: load.invalidate(1),
        lambda load: memo.invalidate(tag="b", strict=False),
    ],
    ids=["function", "arguments", "tag"],
)
def test_invalidations_act(style: Style, drop: Any) -> None:
    """An invalidated entry is computed again, read in a batch or one by one."""
    provider = InADictAtOnce()
    memo.configure(tiers=[provider])
    load, ran = cached(style, None, 5)
    style.call(load, 1), style.call(load, 2)
    drop(load)
    style.call(load, 1), style.call(load, 1)
    assert ran[2:] == [1]


class Short(InADictAtOnce):
    async def get_many(self, keys: Sequence[str]) -> list[bytes | None]:
        return []


class Texts(InADictAtOnce):
    async def get_many(self, keys: Sequence[str]) -> list[Any]:
        return ["text" for _ in keys]


class Raises(InADictAtOnce):
    async def get_many(self, keys: Sequence[str]) -> list[bytes | None]:
        raise ConnectionError("away")


@styles
@pytest.mark.parametrize("kind", [Short, Texts, Raises])
def test_a_wrong_get_many_is_a_fault_of_the_tier(style: Style, kind: Any) -> None:
    """The caller gets the result, and an event names the store."""
    load, _ = cached(style, kind(), 5)
    with recording() as events:
        assert style.call(load, 1) == style.call(load, 1) == 5
    assert any(kind.__name__ in event.detail for event in events if event.kind == "error")


def test_redis_keeps_the_groups_of_long_stamps(redis_server: RedisServer) -> None:
    """Inputs of a result live in Redis as long as the result, however many they are."""

    def part(number: int) -> Any:
        @memo.cache(ttl=None, name=f"part:{number}")
        def load() -> int:
            return number

        return load

    parts = [part(number) for number in range(60)]

    @memo.cache(ttl=None, name="whole")
    def whole() -> int:
        return sum(load() for load in parts)

    with memo.configure(redis_url=redis_server.url, tiers=["redis"], deadline=2.0):
        assert whole() == sum(range(60))
    client = redis_server.client()
    assert min(client.ttl(key) for key in client.keys("memo:2:g:{f:*")) > 29 * 86400
