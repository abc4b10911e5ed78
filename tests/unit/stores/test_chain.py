"""The chain: strategies, healing, and tiers that fail, over real tiers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inside import inside
from redis_server import RedisServer
from time_ahead import Ahead

import memo
from memo import OptionError
from memo.decorators.assembly import default_chain
from memo.records.seal import Entry
from memo.records.stamp_types import LOST, Generation, Ref
from memo.runtime.blocking import BLOCKING, drain_blocking, drive
from memo.testing import recording
from memo.validity.check import LatestAnswers, why_changed

Tiers = list[str]


class Store:
    """A user's store that can fail, and counts what it is asked for records."""

    def __init__(self) -> None:
        self.store: dict[str, bytes] = {}
        self.ttls: dict[str, float | None] = {}
        self.fails = False
        self.asked = 0

    async def get(self, key: str) -> bytes | None:
        self._check()
        self.asked += not key.startswith("memo:g:")
        return self.store.get(key)

    async def set(self, key: str, value: bytes, ttl: float | None = None) -> None:
        self._check()
        self.store[key] = value
        self.ttls[key] = ttl

    async def delete(self, key: str) -> None:
        self._check()
        self.store.pop(key, None)

    async def clear(self) -> None:
        self._check()
        self.store.clear()

    def _check(self) -> None:
        if self.fails:
            raise ConnectionError("away")

    def records(self) -> dict[str, bytes]:
        return {k: v for k, v in self.store.items() if not k.startswith("memo:g:")}


class First(Store):
    """The first tier."""


class Second(Store):
    """The second tier."""


def made(**options: Any) -> tuple[Any, First, Second, list[int]]:
    first, second, runs = First(), Second(), []

    def load(x: int) -> int:
        runs.append(x)
        return x

    memo.configure(tiers=(first, second), **options)
    return memo.cache(ttl=100)(load), first, second, runs


def test_write_through_writes_every_tier() -> None:
    """`write_through` keeps an entry in every tier."""
    f, first, second, _ = made(write_strategy="write_through")
    f(1)
    assert first.records().keys() == second.records().keys() != set()


def test_write_around_writes_the_first_tier_and_the_rest_while_it_is_down() -> None:
    """`write_around` keeps an entry in the first tier only, or in the next while that is down."""
    f, first, second, _ = made(write_strategy="write_around")
    f(1)
    assert len(first.records()) == 1
    assert not second.records()
    first.fails = True
    f(2)
    first.fails = False
    assert len(first.records()) == 1
    assert len(second.records()) == 1


def test_on_miss_or_error_asks_the_next_tier() -> None:
    """`on_miss_or_error`: the next tier is asked when one has nothing, and when one fails."""
    f, first, _, runs = made(self_healing=False)
    f(1)
    for key in first.records():
        del first.store[key]
    assert f(1) == 1
    first.fails = True
    assert f(1) == 1
    assert runs == [1]


def test_on_error_asks_the_next_tier_only_when_one_fails() -> None:
    """`on_error`: a miss of the first tier is the answer; a failure is not."""
    f, first, second, runs = made(read_strategy="on_error", self_healing=False)
    f(1)
    records = dict(first.records())
    for key in records:
        del first.store[key]
    asked = second.asked
    f(1)
    assert runs == [1, 1]
    assert second.asked == asked
    first.fails = True
    assert f(1) == 1
    assert runs == [1, 1]


def test_self_healing_writes_back_with_the_remaining_lifetime(ahead: Ahead) -> None:
    """An answer of the second tier is written back to the first, with the time that is left."""
    f, first, _, runs = made()
    f(1)
    (name,) = first.records()
    record = first.store.pop(name)
    first.ttls.clear()
    ahead.advance(10)
    assert f(1) == 1
    assert drain_blocking(5)
    assert first.store[name] == record
    assert 60 < (first.ttls[name] or 0) <= 90
    assert runs == [1]


def test_without_self_healing_nothing_is_written_back() -> None:
    """`self_healing=False` leaves the tiers as they are."""
    f, first, _, _ = made(self_healing=False)
    f(1)
    (name,) = first.records()
    del first.store[name]
    f(1)
    assert drain_blocking(5)
    assert name not in first.store


def test_every_tier_failing_costs_no_result() -> None:
    """With every tier down each call computes, and says so in events."""
    f, first, second, runs = made()
    first.fails = second.fails = True
    with recording() as seen:
        assert [f(1), f(1)] == [1, 1]
    assert runs == [1, 1]
    assert any(event.kind == "error" for event in seen)


def test_memory_keeps_big_results_that_no_tier_behind_it_takes(tmp_path: Path) -> None:
    """Behind it a disk maps them faster than memory copies them, but here it takes nothing."""
    (tmp_path / "file").touch()
    memo.configure(directory=tmp_path / "file" / "cache")
    runs: list[int] = []

    @memo.cache(ttl=100)
    def load(size: int) -> Any:
        runs.append(size)
        return np.zeros(size, np.uint8)

    with pytest.warns(match="results are kept in the memory"):
        assert load(3 << 20).size == load(3 << 20).size == 3 << 20
    assert runs == [3 << 20]


def test_default_chains() -> None:
    """Disk alone without a Redis URL; Redis over disk with one; memory in front unless it is 0."""
    assert [t.name for t in default_chain().tiers] == ["memory", "disk"]
    with memo.configure(memory_limit=0):
        assert [t.name for t in default_chain().tiers] == ["disk"]
    with memo.configure(redis_url="redis://127.0.0.1:1"):
        assert [t.name for t in default_chain().tiers] == ["memory", "redis", "disk"]
    with memo.configure(tiers=("disk", "memory")):
        assert [t.name for t in default_chain().tiers] == ["disk", "memory"]


def quick(function: Any, *args: Any) -> bool:
    """True if the next call is answered without a coroutine."""
    call = inside(function).keyer.call(args, {})
    found = default_chain().at_hand(lambda: BLOCKING, function.function_id, call.text)
    return isinstance(found, Entry)


def test_a_hit_on_the_disk_alone_is_a_function_call() -> None:
    """A small entry is answered at once, until anything that it depends on was invalidated."""
    ran: list[str] = []

    @memo.cache(ttl=None, version="1", tags=["all"])
    def load(region: str, year: int) -> dict[str, int]:
        ran.append(region)
        return {"runs": len(ran)}

    @memo.cache(ttl=None, version="1", tags=["all"])
    def now() -> int:
        ran.append("now")
        return len(ran)

    @memo.cache(ttl=None, version="1")
    def report() -> int:
        return load("EU", 2024)["runs"] * 100

    with memo.configure(tiers=["disk"]):
        load("EU", 2024), load("US", 2024), now(), report()
        assert [quick(load, "EU", 2024), quick(load, "US", 2024), quick(now)] == [True] * 3
        assert quick(report)
        load.invalidate(region="EU")
        assert [quick(load, "EU", 2024), quick(load, "US", 2024), quick(now)] == [False, True, True]
        assert not quick(report)
        assert load("EU", 2024) == {"runs": 4}
        assert report() == 400
        assert [quick(load, "EU", 2024), quick(report)] == [True, True]
        memo.invalidate(tag="all")
        assert not any([quick(load, "EU", 2024), quick(load, "US", 2024), quick(now)])
        first = load("US", 2024)
        first["runs"] = 0
        assert load("US", 2024) == {"runs": 5}, "a caller changed what another got"


def test_a_hit_at_once_is_not_gone_back_behind() -> None:
    """An entry that is older than an answer given is no hit on one tier alone (I2)."""
    ran: list[str] = []

    @memo.cache(ttl=None, version="1")
    def load(tier: str) -> int:
        ran.append(tier)
        return len(ran)

    for tier in ("disk", "memory"):
        with memo.configure(tiers=[tier]):
            first = load(tier)
            assert load(tier) == first
            assert quick(load, tier)
            chain, key = default_chain(), load.key(tier)
            chain.latest_answers.record(key, chain.latest_answers.start_time(key, chain.clock) + 1)
            assert load(tier) == first + 1
    assert ran == ["disk", "disk", "memory", "memory"]


def test_the_latest_answers_of_many_keys_are_remembered() -> None:
    """The latest answers of at least `most` keys are remembered, and no key's goes back."""
    known = LatestAnswers(max_keys=100)
    for number in range(1000):
        known.record(f"k{number}", number + 1)
        known.record(f"k{number}", number)
        kept = range(max(0, number - 99), number + 1)
        assert all(known.is_newer_than(f"k{n}", n) for n in kept)
        assert not any(known.is_newer_than(f"k{n}", n + 1) for n in kept)
        assert len(known) <= 200


def test_a_chain_as_provider(tmp_path: Path) -> None:
    """A `Chain` of one's own is a provider, and works as the settings' chain does."""
    runs: list[int] = []
    chain = memo.CacheFallbackFactory.create()

    @memo.cache(provider=chain)
    def f(x: int) -> int:
        runs.append(x)
        return x

    assert [f(1), f(1)] == [1, 1]
    f.invalidate()
    assert f(1) == 1
    assert runs == [1, 1]
    chain.close()


@pytest.mark.parametrize(
    ("option", "value"), [("read_strategy", "sometimes"), ("write_strategy", "never")]
)
def test_unknown_strategies(option: str, value: str) -> None:
    """An unknown strategy is an error that names it and what there is."""
    with pytest.raises(OptionError, match=f"{option}='{value}'.*one of"):
        memo.Chain([*default_chain().tiers], **{option: value})
    with pytest.raises(OptionError, match="at least one tier"):
        memo.Chain([])


@pytest.mark.parametrize("tiers", ["disk", "memory", "redis"])
def test_a_lost_generation_holds_for_nothing(
    tiers: str, redis_server: RedisServer, tmp_path: Path
) -> None:
    """A stamp that was taken of a group that did not exist is refused, also while there is none."""
    lost = Generation(Ref("f:nothing"), LOST)
    with memo.configure(tiers=tiers, redis_url=redis_server.url):
        chain = default_chain()
        assert drive(chain.authorities.why_invalid(BLOCKING, [lost]))
        assert why_changed(
            [LOST.text], chain.host.generations.current_texts([("g", "f:nothing", (), "", "")])
        )
