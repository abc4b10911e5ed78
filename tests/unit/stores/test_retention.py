"""Entries that never expire go when their code was replaced long ago, and stay while in use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from deployments import until
from inside import set_clock
from ports import blocking
from redis_server import RedisServer
from time_ahead import Ahead

import memo
from memo.decorators.assembly import default_chain
from memo.errors import SettingError

DAY = 86_400


def load(version: str) -> memo.CachedFunction:
    return memo.cache(lambda x: x, name="kept", ttl=None, version=version)


def test_what_was_replaced_long_ago_goes_from_the_disk(tmp_path: Path, ahead: Ahead) -> None:
    """Entries of replaced code go after `retention`, those of present code never."""
    with memo.configure(directory=tmp_path / "cache", retention="10d", memory_limit=0):
        disk = default_chain().tiers[-1]
        for x in range(5):
            load("1")(x)
        ahead.step(100 * DAY)
        blocking(disk.sweep)
        assert load("1").is_cached(0)
        load("2")(0)
        ahead.step(9 * DAY)
        load("2")(1)
        blocking(disk.sweep)
        assert load("1").is_cached(0)
        ahead.step(2 * DAY)
        blocking(disk.sweep)
        assert not any(load("1").is_cached(x) for x in range(5))
        assert load("2").is_cached(0)
        assert load("2").is_cached(1)


@pytest.mark.parametrize("memory_limit", [0, "64MiB"])
def test_what_is_used_lives_on_in_redis(
    tmp_path: Path, redis_server: RedisServer, memory_limit: object
) -> None:
    """Without a ttl a record lives for `retention`, and longer only where it is used."""
    client = redis_server.client()
    settings: dict[str, Any] = {
        "redis_url": redis_server.url,
        "memory_limit": memory_limit,
        "retention": "10d",
    }
    settings |= {"directory": tmp_path / "cache", "deadline": 5.0}
    with memo.configure(**settings):
        load("1")(1), load("1")(2)
    records = [name for name in client.keys("*{kept}:*") if b":g:" not in name]
    groups = [name for name in client.keys("*:g:*") if name.endswith(b"kept}")]
    assert len(records) == 2
    assert groups
    assert all(9 * DAY < client.ttl(name) <= 10 * DAY for name in records)
    for name in (*records, *groups):
        client.expire(name, 3 * DAY)
    with memo.configure(**settings):
        load("1")(1)
        assert not any(client.ttl(name) > 3 * DAY for name in records)
        clock = Ahead()
        set_clock(clock)
        clock.advance(7 * DAY)
        load("1")(1)
        until(lambda: sorted(client.ttl(name) > 9 * DAY for name in records) == [False, True])
        until(lambda: all(client.ttl(name) > 9 * DAY for name in groups))


@pytest.mark.parametrize("value", ["0", "-1d", "month", True])
def test_a_retention_that_is_none_is_named(value: object) -> None:
    """The error names the setting, the value and what to write."""
    with pytest.raises(SettingError, match=r"(?s)retention.*30d"):
        memo.configure(retention=value)
