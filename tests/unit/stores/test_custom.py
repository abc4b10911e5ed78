"""A user's own store: what it is asked, and what becomes of one that answers wrongly."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ports import blocking, run
from providers import InADict, InADictAtOnce
from redis_server import RedisServer
from styles import STYLES, Style

import memo
from memo.errors import TierError
from memo.records.stamp_types import Ref
from memo.stores.custom import CustomTier
from memo.testing import recording
from memo.validity.stamps import Turn

styles = pytest.mark.parametrize("style", STYLES, ids=str)
IN_FILES = """
import hashlib, os, sys
from pathlib import Path
import memo

class InFiles:
    def __init__(self, place, down=False):
        self.place, self.down = Path(place), down
        self.place.mkdir(exist_ok=True)
    def file(self, key):
        if self.down:
            raise OSError("down")
        return self.place / hashlib.sha256(key.encode()).hexdigest()
    async def get(self, key):
        path = self.file(key)
        return path.read_bytes() if path.exists() else None
    async def set(self, key, value, ttl=None):
        self.file(key).write_bytes(value)
    async def delete(self, key):
        self.file(key).unlink(missing_ok=True)
    async def clear(self):
        pass

def loaded(place, down=False):
    @memo.cache(ttl=600, provider=InFiles(place, down), name="stored:load", version="1")
    def load(x):
        return os.getpid()
    return load
"""
"""A store that processes share; `loaded` makes a function that is cached there."""
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


class Cancelled(InADict):
    async def get(self, key: str) -> bytes | None:
        raise asyncio.CancelledError


@styles
def test_a_cancellation_inside_a_store_is_a_fault_of_the_tier(style: Style) -> None:
    """The caller gets the result: it was not the caller that was cancelled."""
    load, _ = cached(style, Cancelled(), 5)
    with recording() as events:
        assert style.call(load, 1) == style.call(load, 1) == 5
    assert any("Cancelled" in event.detail for event in events if event.kind == "error")


class InTexts(InADict):
    """Returns payloads, or the fields of groups, as something that are not their bytes."""

    def __init__(self, prefix: str, wrong: Any) -> None:
        super().__init__()
        self.prefix, self.wrong = prefix, wrong

    async def get(self, key: str) -> Any:
        found = await super().get(key)
        return self.wrong if found is not None and key.startswith(self.prefix) else found


@styles
@pytest.mark.parametrize("wrong", [5, "text"])
def test_a_wrong_payload_is_a_fault_of_the_tier(style: Style, wrong: Any) -> None:
    """The call computes, and an event names the store and the type."""
    load, ran = cached(style, InTexts("memo:p:", wrong), RESULTS["with a payload"])
    style.call(load, 1)
    with recording() as heard:
        assert np.array_equal(style.call(load, 1), RESULTS["with a payload"])
    assert ran == [1, 1]
    said = [event.detail for event in heard if event.kind == "error"]
    assert any("InTexts.get returned" in one for one in said), said


def test_a_store_without_data_is_reported_once() -> None:
    """This host adopts its generations, so what it stored before is computed again."""
    before = memo.cache(ttl=None, version="1", name="tests:before")(lambda x: x)
    before(1)
    provider = InADict()
    for number in range(2):
        load = memo.cache(provider=provider, name=f"tests:{number}")(lambda x: x)
        with recording() as events:
            load(1)
        lost = [event for event in events if event.kind == "tier_lost"]
        assert [event.tier for event in lost] == ["InADict"] * (number == 0)
    with recording() as events:
        before(1)
    assert [event.reason for event in events if event.kind == "miss"] == ["invalidated"]


def test_notes_that_are_not_text_are_a_fault_of_the_tier() -> None:
    """A group that another program has overwritten is an error of the store."""
    provider = InADict()
    generations = CustomTier(provider).generations
    blocking(lambda port: generations.turn(port, [Turn("t:x")], "{}"))
    provider.store.update(dict.fromkeys(provider.store, b"\xff\xfe"))
    with pytest.raises(TierError, match="UnicodeDecodeError"):
        blocking(lambda port: generations.notes(port, Ref("t:x")))


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


def test_what_a_store_missed_is_replayed_by_the_next_process(tmp_path: Path) -> None:
    """An invalidation that could not reach the store holds in a process that begins later."""
    call = f"{IN_FILES}print(loaded({str(tmp_path / 'store')!r})(1))"
    before = run(call)
    assert run(call) == before
    run(f"{IN_FILES}loaded({str(tmp_path / 'store')!r}, down=True).invalidate()")
    after = run(call)
    assert after != before
    assert run(call) == after


def test_each_store_of_a_class_gets_what_it_missed() -> None:
    """Of two stores of a class in a process, each gets the invalidations that it missed."""

    class Stubborn(InADict):
        down = False

        async def set(self, key: str, value: bytes, ttl: float | None = None) -> None:
            if self.down:
                raise OSError("down")
            await super().set(key, value, ttl)

    stores = Stubborn(), Stubborn()
    ran: list[str] = []

    @memo.cache(ttl=60, provider=stores[0], name="first")
    def first(x: int) -> int:
        ran.append("first")
        return x

    @memo.cache(ttl=60, provider=stores[1], name="second")
    def second(x: int) -> int:
        ran.append("second")
        return x

    first(1), second(1)
    stores[0].down = True
    first.invalidate()
    assert second(1) == 1  # it takes the row of the journal
    stores[0].down = False
    assert first(1) == 1
    assert ran == ["first", "second", "first"]
