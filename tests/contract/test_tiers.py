"""The promises of every tier (see `Tier`), including a user's own store of ten lines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ports import RUNNERS
from providers import InADict, InADictAtOnce
from waiting import until

from memo.records.codec import payload
from memo.stores.custom import CustomTier
from memo.stores.disk.disk_tier import Disk
from memo.stores.disk.host_state import Host
from memo.stores.memory import Memory
from memo.stores.protocols import StoresMany
from memo.stores.redis.redis_tier import Redis

NAME = "memo:{module:load}:0123:abcdef"


@pytest.fixture(params=["memory", "disk", "redis", "adapted", "adapted at once"])
def tier(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    if request.param == "memory":
        yield Memory(1 << 24)
    elif request.param == "disk":
        host = Host(tmp_path / "cache")
        disk = Disk(tmp_path / "cache", 1 << 30, host)
        yield disk
        disk.close()
        host.close()
    elif request.param == "redis":
        redis = Redis(request.getfixturevalue("redis_server").url, namespace="memo", deadline=5)
        yield redis
        redis.close()
    else:
        yield CustomTier(InADict() if request.param == "adapted" else InADictAtOnce())


@pytest.fixture(params=RUNNERS)
def run(request: pytest.FixtureRequest) -> Callable[..., Any]:
    return RUNNERS[request.param]


def test_what_is_stored_is_found(tier: Any, run: Any) -> None:
    """A record comes back byte for byte, and a newer one replaces it."""
    for record in (b"\x89first\x00\xff", b"second" * 20_000):
        run(lambda port, record=record: tier.store(port, NAME, record, None, None))
        found = run(lambda port: tier.lookup(port, NAME))
        assert found.record == record


def test_what_is_not_there_is_none(tier: Any, run: Any) -> None:
    """An unknown name is None, not an error."""
    assert run(lambda port: tier.lookup(port, "memo:{f}:0:unknown")) is None
    assert run(lambda port: tier.payload(port, b"\x01" * 32, 64)) is None


def test_dropped_and_cleared(tier: Any, run: Any) -> None:
    """A dropped or cleared entry is gone; dropping twice is no error."""
    run(lambda port: tier.store(port, NAME, b"r", None, None))
    run(lambda port: tier.drop(port, NAME))
    run(lambda port: tier.drop(port, NAME))
    assert run(lambda port: tier.lookup(port, NAME)) is None
    run(lambda port: tier.store(port, NAME, b"r", None, None))
    run(lambda port: tier.clear(port, "memo:{module:load}:"))
    assert run(lambda port: tier.lookup(port, NAME)) is None


def test_payload_by_its_digest(tier: Any, run: Any) -> None:
    """A payload lies beside its record, and opens as a private writable copy."""
    made = payload((memoryview(b"a" * 100_000), memoryview(b"b" * 50)))
    run(lambda port: tier.store(port, NAME, b"record", made, None))

    def check(port: Any) -> Any:
        async def look() -> None:
            for _ in range(2):
                found = await tier.lookup(port, NAME)
                assert found.record == b"record"
                source = found.source or await tier.payload(port, made.digest, made.size)
                view = source.open(made.size)
                assert bytes(view[:100_000]) == b"a" * 100_000
                assert bytes(view[100_032:100_082]) == b"b" * 50
                view[0] = 0
            view.release()

        return look()

    run(check)


def test_lifetime(tier: Any, run: Any) -> None:
    """A record with a lifetime is there before, and a tier that keeps time has lost it after."""
    run(lambda port: tier.store(port, NAME, b"r", None, 60))
    assert run(lambda port: tier.lookup(port, NAME)).record == b"r"
    if isinstance(tier, CustomTier):
        return  # a user's store need not keep time: the entry itself does
    run(lambda port: tier.store(port, NAME, b"r", None, 0.15))
    until(lambda: run(lambda port: tier.lookup(port, NAME)) is None)


def test_many_at_once(tier: Any, run: Any) -> None:
    """Records that are kept at once are found one by one, and replace what was there."""
    names = [f"{NAME}{number}" for number in range(300)]
    run(lambda port: tier.store(port, names[0], b"old" * 20_000, None, None))
    if not isinstance(tier, StoresMany):
        return
    made = [
        (name, f"record {at}".encode(), 60.0 if at % 2 else None) for at, name in enumerate(names)
    ]
    made[7] = (names[7], b"big" * 20_000, None)
    run(lambda port: tier.store_many(port, made))
    for name, record, _ in made:
        assert run(lambda port, name=name: tier.lookup(port, name)).record == record


def test_health(tier: Any, run: Any) -> None:
    """A tier that works says that it is up."""
    assert run(lambda port: tier.health(port))["up"] is True
