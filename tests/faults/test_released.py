"""A block of `with memo.configure(...)` closes at its end what it opened, and nothing else."""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from folders import FOLDER
from providers import InADict
from redis_server import RedisServer

import memo
from memo.testing import recording

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@memo.cache(ttl=None)
def load(x: int) -> int:
    return x


def held() -> tuple[int, int, int]:
    """Descriptors, threads and chains of this process."""
    gc.collect()
    chains = sum(isinstance(one, memo.Chain) for one in gc.get_objects())
    return len(os.listdir("/proc/self/fd")), threading.active_count(), chains


def blocks(tmp_path: Path, more: dict[str, Any]) -> None:
    for number in range(20):
        with memo.configure(directory=tmp_path / f"{number}", **more):
            load(1)


def one_by_one(tmp_path: Path, more: dict[str, Any]) -> None:
    for number in range(20):
        memo.configure(directory=tmp_path / f"{number}", **more)
        load(1)


@pytest.mark.parametrize("how", [blocks, one_by_one])
@pytest.mark.parametrize("redis", [False, True])
def test_settings_that_no_setting_names_any_more(
    how: Callable[[Path, dict[str, Any]], None],
    redis: bool,
    tmp_path: Path,
    redis_server: RedisServer,
) -> None:
    """Descriptors, threads and chains do not grow with the number of settings used so far."""
    more: dict[str, Any] = {"redis_url": redis_server.url} if redis else {}
    load(0)
    how(tmp_path / "first", more)
    load(0)
    before = held()
    how(tmp_path / "second", more)
    load(0)
    after = held()
    assert after[0] <= before[0] + 2
    assert after[1] <= before[1]
    assert after[2] <= before[2]


def test_a_block_closes_at_its_end(tmp_path: Path) -> None:
    """Connections that a block opened are closed when it ends, not only at the next call."""
    load(0)
    before = held()
    for number in range(3):
        with memo.configure(directory=tmp_path / f"{number}"):
            load(1)
        assert held()[0] <= before[0]


def test_the_live_configuration_keeps_no_redis_that_is_closed(redis_server: RedisServer) -> None:
    """A Redis that a block used is let go after it: what opened it again late is closed by that."""

    def redises() -> list[object]:
        gc.collect()
        return [one for one in gc.get_objects() if type(one).__name__ == "Redis"]

    @memo.cache(ttl="1h", ttl_key="load", name="released:live")
    def loaded(number: int) -> int:
        return number

    before = len(redises())
    with memo.configure(redis_url=redis_server.url):
        memo.live.set("load", 60, shared=True)
        loaded(1)
        assert memo.live["load"] == 60
        assert len(redises()) == before + 1
    load(0)  # in the settings around the block
    assert len(redises()) == before


def test_what_comes_back_is_not_closed(tmp_path: Path) -> None:
    """The settings around a block are as warm as before when it ends."""
    load(7)
    with memo.configure(directory=tmp_path / "a"):
        load(7)
        with memo.configure(directory=tmp_path / "b"):
            load(7)
        with recording() as inside:
            load(7)
    with recording() as after:
        load(7)
    assert [(event.kind, event.tier) for event in (*inside, *after) if event.kind == "hit"] == [
        ("hit", "memory"),
        ("hit", "memory"),
    ]


def test_the_same_settings_in_two_blocks(tmp_path: Path) -> None:
    """A block inside one with the same settings closes nothing when it ends."""
    with memo.configure(directory=tmp_path / "a"):
        load(7)
        with memo.configure(directory=tmp_path / "a"):
            load(7)
        with recording() as seen:
            load(7)
    assert [event.tier for event in seen if event.kind == "hit"] == ["memory"]


def test_a_provider_goes_along_with_the_directory(tmp_path: Path) -> None:
    """A function with a store of its own uses the directory in force for its state on this host."""

    @memo.cache(ttl=None, provider=InADict())
    def kept(x: int) -> int:
        return x

    for name in ("a", "b"):
        with memo.configure(directory=tmp_path / name):
            kept(1)
            assert kept.is_cached(1)
            assert kept.invalidate(1).complete
            assert not kept.is_cached(1)
            assert (tmp_path / name / FOLDER / "host.sqlite").exists()
