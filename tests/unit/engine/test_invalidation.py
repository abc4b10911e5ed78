"""The promises of invalidation: its reach and cost, and that nothing brings an old value back."""

from __future__ import annotations

import asyncio
import contextvars
import errno
import socket
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import mutants
import numpy as np
import pytest
from chaos import Proxy
from folders import FOLDER
from inside import inside
from ports import blocking
from providers import InADict
from redis_server import RedisServer
from time_ahead import Ahead
from waiting import await_until, until

import memo
from memo import cache, invalidate_cache
from memo.decorators import assembly
from memo.engine import answering, invalidating, used_calls
from memo.errors import OptionError
from memo.records.stamp_types import Ref
from memo.runtime.blocking import drain_blocking
from memo.testing import ManualClock, isolated, recording
from memo.validity import stamps

Server = RedisServer
COUNT: dict[str, int] = {}
"""The number of runs of each body; a container, so that its content is no part of any code."""


def ran(name: str) -> int:
    """Count a run; which one it is."""
    COUNT[name] = COUNT.get(name, 0) + 1
    return COUNT[name]


@pytest.fixture(autouse=True)
def fresh_counts() -> None:
    COUNT.clear()


def loads(name: str = "load", **options: Any) -> Any:
    """A cached function of two arguments whose result says which run made it."""

    @cache(name=f"tests:{name}", version="1", **{"ttl": None, **options})
    def load(region: str, year: int = 2024) -> str:
        return f"{region} {year} #{ran(name)}"

    return load


# --- reach ----------------------------------------------------------------------------------------


def test_partial_arguments_reach_what_includes_them() -> None:
    """`f.invalidate(region="EU")` invalidates every entry with that region, and no other."""
    load = loads()
    for region in ("EU", "US"):
        for year in (2023, 2024):
            load(region, year)
    load.invalidate(region="EU")
    assert [load.is_cached(r, y) for r in ("EU", "US") for y in (2023, 2024)] == [0, 0, 1, 1]
    load.invalidate(year=2023)
    assert [load.is_cached("US", y) for y in (2023, 2024)] == [False, True]


def test_a_full_call_reaches_that_call_alone() -> None:
    """With all arguments given, in whatever spelling, exactly one entry goes."""
    load = loads()
    load("EU"), load("EU", 2023)
    load.invalidate("EU", year=2024)
    assert not load.is_cached("EU")
    assert load.is_cached("EU", 2023)


def test_without_arguments_all_entries_go() -> None:
    """`f.invalidate()` reaches every entry of the function, and none of another."""
    load, other = loads(), loads("other")
    load("EU"), load("US"), other("EU")
    load.invalidate()
    assert not load.is_cached("EU")
    assert not load.is_cached("US")
    assert other.is_cached("EU")


def test_an_unknown_argument_is_an_error() -> None:
    """A name that the function does not have is said so, with the helper; nothing is dropped."""
    load = loads()
    load("EU")
    with pytest.raises(OptionError, match="invalidate='land'"):
        load.invalidate(land="EU")
    with pytest.raises(OptionError, match="expire='land'"):
        load.expire(land="EU")
    with pytest.raises(OptionError, match="expire='land'"):
        asyncio.run(load.aexpire(land="EU"))
    assert load.is_cached("EU")


TARGETS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "tag": lambda f: {"tag": "sales"},
    "prefix": lambda f: {"prefix": "sales"},
    "prefix with colon": lambda f: {"prefix": "sales:"},
    "function": lambda f: {"function": f},
    "identity": lambda f: {"function": f.function_id},
}


@pytest.mark.parametrize("target", TARGETS)
def test_targets_at_module_level(target: str) -> None:
    """`memo.invalidate(tag=|prefix=|function=)` reaches what it names, and no others."""
    load, other = loads(tags=["sales"], key_prefix="sales"), loads("other", key_prefix="salesmen")
    load("EU"), other("EU")
    outcome = memo.invalidate(**TARGETS[target](load))
    assert outcome.complete
    assert not load.is_cached("EU")
    assert other.is_cached("EU")


@pytest.mark.parametrize("target", TARGETS)
async def test_targets_at_module_level_awaited(target: str) -> None:
    """`memo.ainvalidate` does the same inside an event loop."""
    load = loads(tags=["sales"], key_prefix="sales")
    await asyncio.to_thread(load, "EU")
    assert (await memo.ainvalidate(**TARGETS[target](load))).complete
    assert not await load.ais_cached("EU")


def test_tags_of_the_arguments() -> None:
    """A callable of the arguments gives each call tags of its own."""
    load = loads(tags=lambda region, year: [f"region:{region}"])
    load("EU"), load("US")
    memo.invalidate(tag="region:EU")
    assert not load.is_cached("EU")
    assert load.is_cached("US")


def test_an_address_is_never_a_pattern() -> None:
    """`memo.invalidate(key=...)` reaches what has exactly this address; `*` is a letter."""
    load = loads(key_prefix="sales", key_resolver="{region}:{year}")
    load("EU"), load("EU*"), load("U")
    assert load.address("EU") == "sales:EU:2024"
    with pytest.raises(OptionError, match="prefix='sales'"):
        memo.invalidate(key="sales:EU*:2024")
    assert [load.is_cached(r) for r in ("EU", "EU*", "U")] == [True, True, True]
    memo.invalidate(key="sales:EU")
    assert load.is_cached("EU")
    memo.invalidate(key="sales:EU:2024")
    assert not load.is_cached("EU")


def test_outer_prefixes_reach_inner_ones() -> None:
    """A prefix reaches what lies below it at a `:`, not what merely begins with its letters."""
    inner, near = loads(key_prefix="shop:sales"), loads("near", key_prefix="shops")
    inner("EU"), near("EU")
    memo.invalidate(prefix="shop")
    assert not inner.is_cached("EU")
    assert near.is_cached("EU")


def test_the_whole_namespace() -> None:
    """The generation of the namespace reaches everything in it."""
    load, other = loads(), loads("other")
    load("EU"), other("EU")
    chain = assembly.default_chain()
    blocking(lambda port: chain.authorities.turn(port, [stamps.Turn("n")], "{}"))
    assert not load.is_cached("EU")
    assert not other.is_cached("EU")


@pytest.mark.parametrize("given", [{}, {"tag": "a", "prefix": "b"}, {"tag": ""}])
def test_exactly_one_target(given: dict[str, str]) -> None:
    """No target, two, or an empty one is an error that says what to write."""
    with pytest.raises(OptionError):
        memo.invalidate(**given)


def test_the_reason_is_kept() -> None:
    """`reason=` comes back in the result, in the event, and with the generation for `explain`."""
    load = loads()
    load("EU")
    with recording() as heard:
        outcome = load.invalidate(region="EU", reason="dataset 2026-11 loaded")
    assert outcome.reason == "dataset 2026-11 loaded"
    assert [e.reason for e in heard if e.kind == "invalidated"] == ["dataset 2026-11 loaded"]
    chain = assembly.default_chain()
    arguments = inside(load).keyer.argument_digests(("EU", 2024), {})[0]
    ref = Ref(f"f:{load.function_id}", arguments)
    notes = blocking(lambda port: chain.host.generations.notes(port, ref))
    assert any("dataset 2026-11 loaded" in note for _, note in notes)


async def test_the_reason_of_a_twin_is_kept() -> None:
    """`reason=` of `f.ainvalidate` and `memo.ainvalidate` is shown by `explain` as well."""
    load = loads()
    await asyncio.to_thread(load, "EU")
    assert (await load.ainvalidate(region="EU", reason="first reason")).reason == "first reason"
    assert "first reason" in str(await load.aexplain("EU"))
    await asyncio.to_thread(load, "EU")
    assert (await memo.ainvalidate(function=load, reason="second")).reason == "second"
    assert ": second" in str(await load.aexplain("EU"))


@pytest.mark.parametrize(
    "target", [{"prefix": "sales"}, {"key": "sales:EU:2024"}, {"tag": "daily"}], ids=str
)
def test_the_reason_is_shown_whatever_was_named(target: dict[str, str]) -> None:
    """`explain` shows the reason of an invalidation by prefix, by address and by tag."""
    load = loads(key_prefix="sales", tags=["daily"])
    load("EU")
    memo.invalidate(**target, reason="dataset 2026-11 loaded")
    assert "dataset 2026-11 loaded" in str(load.explain("EU"))


def test_an_address_may_have_several_keys() -> None:
    """One address reaches every key that has it: `1` and `"1"`, and other functions' too."""
    load, other = loads(key_prefix="sales"), loads("other", key_prefix="sales")
    load("EU", 1), load("EU", "1"), load("EU", 2), other("EU", 1)
    memo.invalidate(key="sales:EU:1")
    assert [load.is_cached("EU", year) for year in (1, "1", 2)] == [False, False, True]
    assert not other.is_cached("EU", 1)


# --- the result, tier by tier --------------------------------------------------------------------


def test_the_result_says_how_it_went(redis_server: Server) -> None:
    """Each tier is named: done, or journalled because it could not be reached."""
    load = loads()
    with memo.configure(redis_url=redis_server.url):
        load("EU")
        assert dict(load.invalidate().tiers) == dict.fromkeys(("memory", "redis", "disk"), "done")
        redis_server.stop()
        outcome = load.invalidate()
        assert not outcome.complete
        assert outcome.tiers["disk"] == "done"
        assert outcome.tiers["redis"].startswith("journalled")
        assert "journalled" in repr(outcome)


def test_a_journal_that_cannot_be_struck_is_no_error(redis_server: Server) -> None:
    """That Redis has it but the journal cannot be told, or the other way round, raises nothing."""
    load = loads()
    with memo.configure(redis_url=redis_server.url):
        load("EU")
        assert load.invalidate().complete
        journal = assembly.default_chain().host.journal  # type: ignore[union-attr]
        with closing(sqlite3.connect(journal.host_database.file.path)) as file:
            for change in ("DELETE", "UPDATE"):
                file.execute(
                    f"CREATE TRIGGER no_{change} BEFORE {change} ON journal"
                    " BEGIN SELECT RAISE(ABORT, 'no more'); END"
                )
        with recording() as heard:
            assert load.invalidate().complete
            redis_server.stop()
            assert not load.invalidate().complete
        assert "no more" in str([event for event in heard if event.kind == "error"])


# --- cost -----------------------------------------------------------------------------------------


class Heard(list[str]):
    """Commands that clients sent, and those that scripts ran, in upper case."""

    def __init__(self) -> None:
        super().__init__()
        self.inside: list[str] = []


@contextmanager
def monitor(server: Server) -> Iterator[Heard]:
    """All commands that reach a Redis inside the block, as MONITOR tells them."""
    heard = Heard()
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
        connection.sendall(b"MONITOR\r\n")
        lines = connection.makefile("rb")
        assert lines.readline() == b"+OK\r\n"
        yield heard
        client = server.client()
        client.echo("the end of the story")
        for line in lines:
            text = line.decode("utf-8", "replace")
            if "the end of the story" in text:
                break
            command = text.split('"')[1].upper()
            (heard.inside if " lua]" in text else heard).append(command)
        lines.close()
    heard[:] = [
        command for command in heard if command not in ("CLIENT", "HELLO", "SELECT", "INFO")
    ]


def one_exchange(heard: Heard) -> bool:
    """True if these were sent in one piece: one script alone, or commands up to a signature."""
    return heard == ["EVALSHA"] or (heard[-1] == "ECHO" and heard.count("ECHO") == 1)


@pytest.mark.parametrize("memory", [0, 1 << 20], ids=["redis first", "memory in front"])
@pytest.mark.parametrize("tags", [0, 30])
def test_a_hit_is_one_round_trip(redis_server: Server, memory: int, tags: int) -> None:
    """With any number of tags, arguments and inner calls, a hit asks Redis once."""
    inner = loads(tags=[f"inner{n}" for n in range(tags)], key_prefix="a:b:c:d")

    @cache(ttl=None, version="1", name="tests:outer", tags=[f"tag{n}" for n in range(tags)])
    def outer(first: int, second: str = "2", *rest: int, **more: int) -> list[str]:
        return [inner("EU", year) for year in range(tags + 1)]

    with memo.configure(redis_url=redis_server.url, memory_limit=memory, deadline=5):
        made = outer(1, "2", 3, 4, five=5)
        for groups in ("plain", "with parts"):
            for _ in range(2):  # scripts and connections are there, and what to read is known
                outer(1, "2", 3, 4, five=5)
            with monitor(redis_server) as heard:
                assert outer(1, "2", 3, 4, five=5) == made
            assert one_exchange(heard), (groups, heard)
            inner.invalidate(region="US")


def test_a_hit_with_a_big_payload_is_one_round_trip(redis_server: Server) -> None:
    """Buffers beside the record are mapped from this host's disk: Redis is asked once."""

    @cache(ttl=None, version="1", name="tests:array")
    def load() -> Any:
        return np.arange(300_000)

    with memo.configure(redis_url=redis_server.url, deadline=5):
        load(), load()
        assert drain_blocking(10)  # on its way to Redis
        with monitor(redis_server) as heard:
            assert load()[-1] == 299_999
    assert one_exchange(heard), heard


async def test_a_hit_of_a_coroutine_is_one_round_trip(redis_server: Server) -> None:
    """The same inside an event loop."""

    @cache(ttl=None, version="1", name="tests:async", tags=["a", "b"])
    async def load(region: str) -> int:
        return ran("async")

    with memo.configure(redis_url=redis_server.url, deadline=5):
        await load("EU"), await load("EU")
        with monitor(redis_server) as heard:
            assert await load("EU") == 1
        assert one_exchange(heard), heard
        await assembly.default_chain().tiers[1].aclose()  # type: ignore[attr-defined]


TURNS: dict[str, Callable[[Any], Any]] = {
    "function": lambda f: f.invalidate(),
    "partial": lambda f: f.invalidate(region="EU"),
    "tag": lambda f: memo.invalidate(tag="sales"),
    "prefix": lambda f: memo.invalidate(prefix="sales"),
}


@pytest.mark.parametrize("how", TURNS)
def test_invalidating_does_not_grow_with_what_is_there(redis_server: Server, how: str) -> None:
    """One script (a tag: two), no SCAN, no KEYS, and no more with 3,000 entries than with one."""
    load = loads(tags=["sales"], key_prefix="sales")
    with memo.configure(redis_url=redis_server.url, deadline=5):
        load("EU")
        TURNS[how](load)
        with monitor(redis_server) as few:
            TURNS[how](load)
        client, record = redis_server.client(), b"x" * 100
        names = (assembly.default_chain().name(load.function_id, f"{n:040x}") for n in range(3000))
        client.mset(dict.fromkeys(names, record))
        with monitor(redis_server) as many:
            TURNS[how](load)
    assert few == many == ["EVALSHA", "ECHO"] * (2 if how == "tag" else 1)
    assert few.inside == many.inside
    assert not {"SCAN", "KEYS", "HSCAN", "HGETALL"} & {*many, *many.inside}


@pytest.fixture(params=[0.0, invalidating.COUNT_SECONDS])
def counting(request: pytest.FixtureRequest, set_limits: Callable[..., None]) -> float:
    """Seconds that an invalidation may spend on counting what it matched."""
    set_limits(counting_seconds=request.param)
    return float(request.param)


@pytest.mark.timing
def test_invalidating_takes_milliseconds_whatever_is_there(
    redis_server: Server, counting: float
) -> None:
    """Function-wide with 200,000 entries in Redis: under 10 ms, and what counting is given."""
    load = loads()
    with memo.configure(redis_url=redis_server.url, deadline=5):
        load("EU")
        client = redis_server.client()
        chain = assembly.default_chain()
        for start in range(0, 200_000, 20_000):
            keys = range(start, start + 20_000)
            client.mset({chain.name(load.function_id, f"{n:040x}"): b"x" for n in keys})
        taken = []
        for _ in range(20):
            begun = time.perf_counter()
            load.invalidate()
            taken.append(time.perf_counter() - begun)
    assert sorted(taken)[10] < 0.010 + counting


@pytest.mark.timing
def test_invalidating_takes_milliseconds_on_disk_alone(cache_home: Path, counting: float) -> None:
    """Function-wide with 200,000 entries in the index of the disk: the same."""
    load = loads()
    load("EU")
    chain = assembly.default_chain()
    [index] = cache_home.glob("memo/**/cache.db")
    with closing(sqlite3.connect(index, timeout=10)) as database, database:
        columns = "raw, store_time, access_time, access_count, tag, size, mode"
        database.executemany(
            f"INSERT INTO Cache (key, value, {columns}) SELECT ?, value, {columns} FROM Cache"
            " WHERE rowid = 1",
            ((chain.name(load.function_id, f"{n:040x}"),) for n in range(200_000)),
        )
        count = database.execute("SELECT count(*) FROM Cache").fetchone()[0]
    assert count == 200_001
    assert load.is_cached("EU")
    taken = []
    for _ in range(20):
        begun = time.perf_counter()
        load.invalidate()
        taken.append(time.perf_counter() - begun)
    assert not load.is_cached("EU")
    assert sorted(taken)[10] < 0.010 + counting


# --- nothing comes back --------------------------------------------------------------------------


def test_lost_generations_are_misses(redis_server: Server) -> None:
    """If two hosts share a Redis, an entry that lost one of its groups is computed anew."""
    load = loads(tags=["sales"], key_prefix="shop:sales")
    client = redis_server.client()
    client.hset("memo:2:hosts", "h:another", int(time.time()))
    with memo.configure(redis_url=redis_server.url, deadline=5):
        load("EU")
        groups = sorted(client.keys("memo:2:g:*"))
        assert len(groups) == 5
        for group in groups:
            before = load("EU")
            assert load.is_cached("EU")
            client.delete(group)
            assert not load.is_cached("EU"), group
            assert load("EU") != before
        before = load("EU")
        client.flushall()
        client.hset("memo:2:hosts", "h:another", int(time.time()))
        assert not load.is_cached("EU")
        assert load("EU") != before


def test_a_lost_group_revives_nothing_that_was_invalidated(redis_server: Server) -> None:
    """An invalidated entry stays so when the tokens that said it are gone."""
    load = loads()
    client = redis_server.client()
    with memo.configure(redis_url=redis_server.url, deadline=5):
        old = load("EU")
        load.invalidate(region="EU")
        for field in ("!", "?"):
            client.hdel(f"memo:2:g:{{f:{load.function_id}}}", field)
        client.delete(f"memo:2:g:{{f:{load.function_id}}}")
        assert not load.is_cached("EU")
        assert load("EU") != old


@contextmanager
def two_hosts(server: Server, place: Path, **more: Any) -> Iterator[tuple[Any, Any]]:
    """Two context managers: what runs inside them runs on one host or the other."""

    def host(name: str) -> Callable[[], Any]:
        settings = {"directory": place / name, "redis_url": server.url, "deadline": 5, **more}
        return lambda: memo.configure(**settings)

    yield host("here"), host("there")


@pytest.mark.parametrize("memory", [0, 1 << 20], ids=["disk", "memory"])
def test_another_host_invalidates(redis_server: Server, tmp_path: Path, memory: int) -> None:
    """A copy on disk, or in memory, that another host invalidated is refused while Redis is up."""
    load = loads()
    with two_hosts(redis_server, tmp_path, memory_limit=memory) as (here, there):
        with here():
            old = load("EU")
            assert load.is_cached("EU")
        with there():
            assert load("EU") == old
            load.invalidate(region="EU")
        with here():
            redis_server.client().delete(*redis_server.client().keys("memo:2:{*"))
            assert not load.is_cached("EU")
            assert load("EU") != old


# --- outages -------------------------------------------------------------------------------------


def test_an_outage_is_made_up_for(redis_server: Server, tmp_path: Path) -> None:
    """An invalidation made while Redis was away is replayed before anything is read from it."""
    load = loads()
    with memo.configure(redis_url=redis_server.url, memory_limit=0):
        old = load("EU")
        redis_server.stop()
        load.invalidate(region="EU", reason="while away")
        assert not load.is_cached("EU")
        redis_server.restart()
    assembly.reset()  # another process of this host, which has no answers of its own
    with (
        memo.configure(redis_url=redis_server.url, memory_limit=0, deadline=5),
        recording() as heard,
    ):
        assert load("EU") != old
    assert [event.reason for event in heard if event.kind == "replayed"] == ["while away"]


def test_each_redis_is_told_what_it_missed(
    redis_server: Server, redis_private: Server, tmp_path: Path
) -> None:
    """Telling another Redis does not make up for what one Redis missed."""
    load = loads()
    with memo.configure(redis_url=redis_server.url, memory_limit=0, deadline=5):
        old = load("EU")
        redis_server.stop()
        load.invalidate(region="EU")
    with memo.configure(redis_url=redis_private.url, memory_limit=0, deadline=5):
        load("US")
    redis_server.restart()
    assembly.reset()
    with memo.configure(redis_url=redis_server.url, memory_limit=0, deadline=5):
        assert load("EU") != old


def test_no_other_host_is_spared_the_replay(redis_server: Server, tmp_path: Path) -> None:
    """After the replay the other host refuses its copy as well."""
    load = loads()
    with two_hosts(redis_server, tmp_path, memory_limit=0) as (here, there):
        with here():
            old = load("EU")
        with there():
            assert load("EU") == old
        redis_server.stop()
        with here():
            assert not load.invalidate(region="EU").complete
        redis_server.restart()
        assembly.reset()
        with here():
            load("US")
        with there():
            assert load("EU") != old


def test_while_redis_is_away_the_host_obeys_itself(redis_server: Server) -> None:
    """Without Redis, invalidations of this host hold, and its other entries are still good."""
    load = loads()
    with memo.configure(redis_url=redis_server.url):
        eu, us = load("EU"), load("US")
        redis_server.stop()
        load.invalidate(region="EU")
        assert load("EU") != eu
        assert load("US") == us


@contextmanager
def locked(place: Path) -> Iterator[None]:
    """Another process holds the lock on the host's file."""
    with closing(sqlite3.connect(place / FOLDER / "host.sqlite", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield


@pytest.mark.parametrize("shared", [False, True], ids=["disk", "redis"])
async def test_an_invalidation_outlasts_a_lock(
    redis_server: Server, tmp_path: Path, shared: bool
) -> None:
    """A lock that costs a lookup its answer keeps no invalidation from being written."""
    load = loads()
    url = {"redis_url": redis_server.url, "deadline": 5} if shared else {}
    with memo.configure(directory=tmp_path, **url):
        for call in (load.invalidate, load.ainvalidate):
            old = load("EU")
            other = sqlite3.connect(
                tmp_path / FOLDER / "host.sqlite", isolation_level=None, check_same_thread=False
            )
            other.execute("BEGIN IMMEDIATE")
            ending = threading.Timer(0.6, other.close)
            ending.start()
            outcome = call()
            told = await outcome if call == load.ainvalidate else outcome
            assert set(told.tiers.values()) == {"done"}
            ending.join()
            assert load("EU") != old


def given_up(ahead: Ahead, call: Callable[[], Any]) -> Any:
    """The outcome of an invalidation that finds the file of the host locked, ten seconds later."""
    passing = threading.Timer(
        0.2, ahead.work, [2 * memo.stores.authorities.INVALIDATION_LOCK_SECONDS]
    )
    passing.start()
    outcome = call()
    passing.join()
    return outcome


@pytest.mark.parametrize("memory_limit", ["1MiB", 0], ids=["memory", "disk"])
def test_what_could_not_be_written_is_obeyed_here(
    tmp_path: Path, ahead: Ahead, memory_limit: str | int
) -> None:
    """Until an invalidation is written no old value is given; then it holds for all processes."""
    load = loads()
    with memo.configure(directory=tmp_path, memory_limit=memory_limit):
        old = load("EU")
        assert load("EU") == old
        with locked(tmp_path):
            outcome = given_up(ahead, lambda: load.invalidate(region="EU"))
            assert outcome.tiers["disk"].startswith("failed: ")
            assert not outcome.complete
            assert load("EU") == "EU 2024 #2"
        ahead.advance(2 * memo.stores.disk.host_state.INVALIDATION_RETRY_SECONDS)
        assert not load.is_cached("EU")
        assembly.reset()  # another process
        assert not load.is_cached("EU")
        assert load("EU") == load("EU") == "EU 2024 #3"


def test_what_neither_arrived_nor_was_journalled_is_sent(
    redis_server: Server, tmp_path: Path, ahead: Ahead
) -> None:
    """This process sends it before it reads from Redis again, although no journal has it."""
    load = loads()
    with memo.configure(directory=tmp_path, redis_url=redis_server.url, memory_limit=0, deadline=5):
        old = load("EU")
        with locked(tmp_path):
            redis_server.stop()
            outcome = given_up(ahead, lambda: load.invalidate(region="EU"))
            assert outcome.tiers["redis"].startswith("failed, and not journalled")
            assert load("EU") != old
        redis_server.restart()
        with recording() as heard:
            until(lambda: load("EU") == old or any(event.kind == "replayed" for event in heard))
            assert load("EU") != old
    assembly.reset()
    with memo.configure(directory=tmp_path / "b", redis_url=redis_server.url, deadline=5):
        assert load("EU") != old


def test_processes_with_and_without_redis_share_a_directory(
    redis_server: Server, tmp_path: Path
) -> None:
    """An invalidation by a process without Redis reaches one that has it, and stays."""
    load = loads()

    @contextmanager
    def process(**url: Any) -> Iterator[None]:
        assembly.reset()
        with memo.configure(directory=tmp_path, memory_limit=0, deadline=5, **url):
            yield

    with process(redis_url=redis_server.url):
        old = load("EU")
    with process():
        assert load("EU") == old
        load.invalidate(region="EU", reason="without Redis")
        load.invalidate(region="EU", reason="without Redis")
        assert len(assembly.default_chain().host.journal.due_rows()) == 1  # type: ignore[union-attr]
    with process(redis_url=redis_server.url), recording() as heard:
        load("US")
        assert load("EU") != old
    assert [e.reason for e in heard if e.kind == "replayed"] == ["without Redis"]
    with process():
        assert load("EU") not in (old, "")
        assert not assembly.default_chain().host.journal.due_rows()  # type: ignore[union-attr]


def test_what_waits_for_any_redis_is_bounded(
    tmp_path: Path, set_limits: Callable[..., None]
) -> None:
    """If no process ever has Redis again, the waiting invalidations become one of everything."""
    set_limits(waiting_invalidations=3)
    load = loads()
    with memo.configure(directory=tmp_path):
        host = assembly.default_chain().host
        assert host is not None
        for year in range(5):
            load.invalidate(year=year)
        assert host.journal.due_rows() == [], "no process has a shared tier"
        host.journal.mark_done(host.journal.add([stamps.Turn("t:x")], "{}"))
        for year in range(4):
            load.invalidate(year=year)
        assert [turns for _, turns, _ in host.journal.due_rows()] == [[stamps.Turn("n")]]


# --- on to what was built on it ------------------------------------------------------------------


def _levels(depth: int) -> list[Any]:
    """Cached functions, each of which calls the one before; the first is `load`."""
    chain = [loads("raw")]
    for level in range(depth):
        below = chain[-1]

        def made(region: str, below: Any = below, level: int = level) -> str:
            return f"{below(region)} < {ran(f'level{level}')}"

        chain.append(
            cache(ttl=None, version="1", name=f"tests:level{level}", ignore=["below", "level"])(
                made
            )
        )
    return chain


@pytest.mark.parametrize("warm", [False, True], ids=["computed", "hit"])
@pytest.mark.parametrize("memory", [0, 1 << 20], ids=["disk", "memory"])
def test_over_any_number_of_levels(warm: bool, memory: int) -> None:
    """Invalidating what lies at the bottom reaches the top, also when all between was a hit."""
    raw, *_, top = levels = _levels(6)
    with memo.configure(memory_limit=memory):
        if warm:
            for function in levels:
                function("EU")
        top("EU"), top("US")
        raw.invalidate(region="EU")
        assert [f.is_cached("EU") for f in levels] == [False] * 7
        assert [f.is_cached("US") for f in levels] == [True] * 7


WAYS: dict[str, Callable[[Any], list[str]]] = {}


def way(function: Callable[[Any], list[str]]) -> Callable[[Any], list[str]]:
    WAYS[function.__name__] = function
    return function


@way
def directly(raw: Any) -> list[str]:
    return [raw("EU")]


@way
def thread(raw: Any) -> list[str]:
    found: list[str] = []
    worker = threading.Thread(target=lambda: found.append(raw("EU")))
    worker.start()
    worker.join()
    return found


@way
def thread_in_thread(raw: Any) -> list[str]:
    found: list[str] = []
    outer = threading.Thread(target=lambda: found.extend(thread(raw)))
    outer.start()
    outer.join()
    return found


@way
def subclass(raw: Any) -> list[str]:
    class Worker(threading.Thread):
        found = ""

        def run(self) -> None:
            self.found = raw("EU")

    worker = Worker()
    worker.start()
    worker.join()
    return [worker.found]


@way
def executor(raw: Any) -> list[str]:
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(raw, ["EU"]))


POOL: list[ThreadPoolExecutor] = []


@way
def older_executor(raw: Any) -> list[str]:
    return [POOL[0].submit(raw, "EU").result()]


@way
def loop(raw: Any) -> list[str]:
    async def main() -> str:
        return await asyncio.get_running_loop().run_in_executor(None, raw, "EU")

    return [asyncio.run(main())]


@way
def to_thread(raw: Any) -> list[str]:
    async def main() -> str:
        return await asyncio.to_thread(raw, "EU")

    return [asyncio.run(main())]


@way
def peeked(raw: Any) -> list[str]:
    contextvars.Context().run(raw, "EU")  # in a place without a known computation
    return [raw.peek("EU")]


@way
def refreshed(raw: Any) -> list[str]:
    return [raw.refresh("EU")]


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("warm", [False, True], ids=["computed", "hit"])
def test_over_threads(name: str, warm: bool) -> None:
    """Reads of a computation in threads that it starts are part of it; no others are."""
    raw, how = loads("raw"), WAYS[name]
    with ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()  # its thread is older than the computation
        POOL[:] = [pool]

        @cache(ttl=None, version="1", name=f"tests:over {name}")
        def report() -> list[str]:
            return how(raw)

        if warm:
            raw("EU")
        first = report()
        raw.invalidate(region="US")
        assert report.is_cached()
        raw.invalidate(region="EU")
        assert not report.is_cached()
        assert report() != first
        POOL.clear()


@pytest.mark.parametrize("warm", [False, True], ids=["computed", "hit"])
async def test_over_tasks(warm: bool) -> None:
    """Reads of a computation in tasks that it starts are part of it."""

    @cache(ttl=None, version="1", name="tests:araw")
    async def raw(region: str) -> int:
        return ran("raw")

    async def inner(region: str) -> int:
        return await asyncio.create_task(raw(region))

    @cache(ttl=None, version="1", name="tests:areport")
    async def report() -> list[int]:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(inner(region)) for region in ("EU", "US")]
        return [task.result() for task in tasks]

    if warm:
        await raw("EU")
    await report()
    assert await report.ais_cached()
    await raw.ainvalidate(region="ASIA")
    assert await report.ais_cached()
    await raw.ainvalidate(region="EU")
    assert not await report.ais_cached()


def test_a_pool_thread_serves_whom_it_works_for() -> None:
    """A pool whose threads one computation started records for the next what is the next's."""
    raw = loads("raw")
    with ThreadPoolExecutor(1) as pool:

        @cache(ttl=None, version="1", name="tests:pooled")
        def report(region: str) -> str:
            return pool.submit(raw, region).result()

        report("EU"), report("US")
        raw.invalidate(region="US")
        assert report.is_cached("EU")
        assert not report.is_cached("US")


@pytest.mark.parametrize("how", ["__call__", "refresh"])
def test_a_thread_that_a_computation_started_may_refresh_it_later(how: str) -> None:
    """Once a computation is over, its threads may ask for the same result as any other caller."""
    raw = loads("raw")
    with ThreadPoolExecutor(2) as pool:

        @cache(ttl=None, version="1", name="tests:later")
        def report() -> str:
            threads.append(threading.Thread(target=late))
            threads[-1].start()
            return pool.submit(raw, "EU").result()

        def late() -> None:
            if go_on.wait(5) and len(threads) == 1:
                answers.append(report.refresh())

        threads: list[threading.Thread] = []
        answers: list[str] = []
        go_on = threading.Event()
        first = getattr(report, how)()
        go_on.set()
        threads[0].join()
        assert answers == [first] == [pool.submit(report.refresh).result()]
        for thread in threads:
            thread.join()


def test_threads_outside_a_computation_are_left_alone() -> None:
    """A thread that no cached computation started runs as Python made it."""
    loads("raw")("EU")
    seen: list[Any] = []
    thread = threading.Thread(target=lambda: seen.append(used_calls.context_for_thread()))
    thread.start()
    thread.join()
    assert "run" not in vars(thread)
    assert seen == [None]


def test_a_thread_that_starts_at_the_second_try(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the system refused a thread, another `start` runs what it was made for."""
    raw, seen = loads("raw"), []
    name = "_start_joinable_thread" if sys.version_info >= (3, 13) else "_start_new_thread"

    def refused(*_: Any, **__: Any) -> Any:
        raise RuntimeError("can't start new thread")

    @cache(ttl=None, version="1", name="tests:second_try")
    def report() -> int:
        thread = threading.Thread(target=lambda: seen.append(raw("EU")))
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="can't start"):
            patch.setattr(threading, name, refused)
            thread.start()
        thread.start()
        thread.join()
        return len(seen)

    assert report() == 1
    raw.invalidate()
    assert not report.is_cached()


def test_a_thread_that_outlives_its_computation_adds_nothing() -> None:
    """A read after a computation has returned is no part of it."""
    raw, go_on = loads("raw"), threading.Event()
    late: list[threading.Thread] = []
    seen: list[Any] = []

    def read_late() -> None:
        go_on.wait(5)
        raw("EU")
        seen.append(used_calls.context_for_thread())

    @cache(ttl=None, version="1", name="tests:outlived")
    def report() -> int:
        late.append(threading.Thread(target=read_late))
        late[0].start()
        return 1

    report()
    go_on.set()
    late[0].join()
    raw.invalidate()
    assert report.is_cached()
    assert seen == [None], "what it starts from now on is no part of it either"


def test_a_thread_of_a_computation_that_asks_for_it_is_told() -> None:
    """A thread whose computation waits for it, and that asks for that result, gets an error."""
    raised: list[BaseException] = []

    @cache(ttl=None, version="1", name="tests:itself")
    def itself() -> int:
        def ask() -> None:
            try:
                itself()
            except memo.ReentryError as error:
                raised.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        thread.join(5)
        return 1

    assert itself() == 1
    assert raised


def test_what_an_error_was_built_on_counts() -> None:
    """A computation that caught an inner error is built on what the inner one had read."""
    raw = loads("raw")

    @cache(ttl=None, version="1", name="tests:failing")
    def failing() -> str:
        raise ValueError(raw("EU"))

    @cache(ttl=None, version="1", name="tests:catching")
    def catching() -> str:
        try:
            return failing()
        except ValueError as error:
            return str(error)

    catching()
    assert catching.is_cached()
    raw.invalidate(region="EU")
    assert not catching.is_cached()


def test_many_reads_are_bounded() -> None:
    """Past a limit one stamp of the function stands for many, and the entry is still cached."""
    raw, many = loads("raw"), stamps.MAX_REFS_PER_GROUP + 50

    @cache(ttl=None, version="1", name="tests:wide")
    def wide() -> int:
        return len([raw("EU", year) for year in range(many)])

    wide()
    assert wide.is_cached()
    found = blocking(
        lambda port: assembly.default_chain().lookup(
            port, wide.function_id, wide.key(), inside(wide).judge
        )
    )
    assert len(found.entry.header.stamps) < 20
    for again in range(3):
        raw.invalidate("EU", again)
        assert not wide.is_cached()
        wide()
        assert wide.is_cached(), "entries of different ages must not keep it from being cached"
    raw.invalidate("US")
    assert not wide.is_cached(), "one stamp for the function: any call of it counts"


def test_many_reads_that_changed_underway_are_not_trusted() -> None:
    """When one of many reads is invalidated during the computation, its entry is not believed."""
    raw, many = loads("raw"), stamps.MAX_REFS_PER_GROUP + 50

    @cache(ttl=None, version="1", name="tests:wide underway")
    def wide() -> int:
        for year in range(many):
            raw("EU", year)
        raw.invalidate("EU", 7)
        return many

    wide()
    assert not wide.is_cached()


# --- refreshes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{"stale_while_revalidate": 100}, {"refresh_ahead": True, "stale_if_error": 100}],
    ids=["revalidate", "ahead"],
)
def test_an_invalidated_value_is_never_stale(options: dict[str, Any]) -> None:
    """Stale windows are for expiry alone: what was invalidated is computed, not served."""
    clock = ManualClock()
    with isolated(clock=clock):
        load = loads(ttl=10, **options)
        load("EU")
        clock.advance(9 if "refresh_ahead" in options else 50)
        load.invalidate()
        assert load("EU").endswith("#2")


def test_stale_if_error_does_not_revive_what_was_invalidated_underway() -> None:
    """An old value that is invalidated while its successor fails does not answer in its place."""
    clock = ManualClock()
    with isolated(clock=clock):

        @cache(ttl=10, stale_if_error=100, version="1", name="tests:failing later")
        def load() -> int:
            if ran("load") == 1:
                return 1
            if COUNT["load"] == 3:
                load.invalidate()
            raise ValueError("broken")

        assert load() == 1
        clock.advance(50)
        assert load() == 1
        with pytest.raises(ValueError, match="broken"):
            load()


def test_a_refresh_that_is_invalidated_underway_is_dropped() -> None:
    """It is not stored over what was computed after it, and the event says why."""
    clock, under_way, go_on = ManualClock(), threading.Event(), threading.Event()
    with isolated(clock=clock), recording() as heard:

        @cache(ttl=10, stale_while_revalidate=100, version="1", name="tests:refreshed")
        def load() -> int:
            mine = ran("load")
            if mine == 2:
                under_way.set()
                go_on.wait(5)
            return mine

        assert load() == 1
        clock.advance(50)
        assert load() == 1
        assert under_way.wait(5)
        load.invalidate()
        assert load() == 3
        go_on.set()
        memo.runtime.blocking.drain_blocking(5)
        assert load() == 3
        assert COUNT["load"] == 3
    assert [e.reason for e in heard if e.kind == "refresh_failed"] == ["invalidated"]


@pytest.mark.parametrize("verb", ["invalidate", "expire"])
def test_an_overtaken_computation_does_not_replace_a_later_one(verb: str) -> None:
    """A call that began after `invalidate` or `expire` is computed anew, and its result stays."""
    under_way, go_on = threading.Event(), threading.Event()

    @cache(ttl=None, version="1", name="tests:overtaken", stale_while_revalidate=60)
    def load() -> int:
        mine = ran("load")
        if mine == 1:
            under_way.set()
            go_on.wait(5)
        return mine

    answers: list[int] = []
    first = threading.Thread(target=lambda: answers.append(load()))
    first.start()
    assert under_way.wait(5)
    getattr(load, verb)()
    assert load() == 2
    go_on.set()
    first.join()
    assert answers == [1]
    assert load() == COUNT["load"] == 2


def test_a_result_that_is_not_stored_is_still_held_to_its_stamps() -> None:
    """Callers that join a computation whose result `cache_if` refuses get no invalidated value."""
    under_way, go_on = threading.Event(), threading.Event()

    @cache(ttl=None, version="1", name="tests:turned down", cache_if=lambda value: value != 1)
    def load() -> int:
        mine = ran("load")
        if mine == 1:
            under_way.set()
            go_on.wait(5)
        return mine

    answers: list[int] = []
    first = threading.Thread(target=load)
    first.start()
    assert under_way.wait(5)
    turn = stamps.Turn(f"f:{load.function_id}")
    chain = assembly.default_chain()
    # by another process: nothing is detached
    blocking(lambda port: chain.authorities.turn(port, [turn], "{}"))
    second = threading.Thread(target=lambda: answers.append(load()))
    second.start()
    _a_caller_waits()
    go_on.set()
    first.join()
    second.join()
    assert answers == [2]


# --- answers never go back -----------------------------------------------------------------------


@pytest.mark.parametrize("why", ["disk full", "cache_if"])
def test_a_result_that_was_not_stored_is_not_gone_back_behind(why: str) -> None:
    """After a newer result that no tier has, the older entry does not answer again (I2)."""

    class Disk(InADict):
        full = False

        async def set(self, key: str, value: bytes, ttl: float | None = None) -> None:
            if self.full:
                raise OSError(errno.ENOSPC, "disk full")
            await super().set(key, value, ttl)

    store = Disk()
    load = loads(
        provider=store, cache_if=lambda value: why == "disk full" or not value.endswith("#2")
    )
    assert load("EU").endswith("#1")
    store.full = why == "disk full"
    assert load.refresh("EU").endswith("#2")
    store.full = False
    assert load("EU").endswith("#3")


@pytest.mark.parametrize("memory", [0, 1 << 20], ids=["disk", "memory"])
@pytest.mark.parametrize("how", ["called", "peeked"])
def test_what_was_given_is_not_gone_back_behind(memory: int, how: str) -> None:
    """An older computation that is stored after a newer one was given does not answer (I2)."""
    load = loads()

    def tier(name: str) -> Any:
        return next(t for t in assembly.default_chain().tiers if t.name == name)

    with memo.configure(memory_limit=memory):
        load("EU")
        name = assembly.default_chain().name(load.function_id, load.key("EU"))
        older = bytes(blocking(lambda port: tier("disk").lookup(port, name)).record)
        assert load.refresh("EU").endswith("#2")
        assembly.reset()  # a process that has given no answers yet
        assert [load.is_cached("EU") for _ in range(2)] == [True, True]  # now memory has it too
        assert (load("EU") if how == "called" else load.peek("EU")).endswith("#2")
        blocking(lambda port: tier("disk").store(port, name, older, None, None))
        if memory:
            blocking(lambda port: tier("memory").drop(port, name))
        assert load("EU").endswith("#3")


def test_a_joiner_does_not_go_back() -> None:
    """A caller that joins a computation older than an answer already given looks again (I2)."""
    under_way, go_on = threading.Event(), threading.Event()

    @cache(ttl=None, version="1", name="tests:joined")
    def load() -> int:
        mine = ran("load")
        if mine == 1:
            under_way.set()
            go_on.wait(5)
        return mine

    first = threading.Thread(target=load)
    first.start()
    assert under_way.wait(5)
    chain, answers = assembly.default_chain(), []
    # as an answer from another process would
    chain.latest_answers.record(load.key(), time.time_ns())
    second = threading.Thread(target=lambda: answers.append(load()))
    second.start()
    _a_caller_waits()
    go_on.set()
    first.join()
    second.join()
    assert answers == [2]


def _a_caller_waits() -> None:
    flight = next(iter(answering.FLIGHTS.joinable_flights()))
    until(lambda: flight.waiters)


def test_a_refresh_that_another_process_invalidated_is_dropped() -> None:
    """An invalidation by another process is noticed before the result is stored."""
    clock = ManualClock()
    with isolated(clock=clock), recording() as heard:

        @cache(ttl=10, stale_while_revalidate=100, version="1", name="tests:refreshed elsewhere")
        def load() -> int:
            mine = ran("load")
            if mine == 2:
                turn, chain = stamps.Turn(f"f:{load.function_id}"), assembly.default_chain()
                blocking(lambda port: chain.authorities.turn(port, [turn], "{}"))
            return mine

        load()
        clock.advance(50)
        load()
        memo.runtime.blocking.drain_blocking(5)
        kinds = [event.kind for event in heard]
        assert kinds.count("stored") == 1
        assert [e.reason for e in heard if e.kind == "refresh_failed"] == ["invalidated"]
        assert load() == 3


class Unloadable:
    """Cannot be loaded any more once `broken` is set."""

    broken = False

    def __setstate__(self, state: Any) -> None:
        if type(self).broken:
            raise ValueError("on purpose")

    def __getstate__(self) -> Any:
        return 1


def test_an_entry_that_does_not_load_does_not_stop_the_lock(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With `use_lock`, a fresh entry that cannot be loaded is computed anew, not waited for."""
    runs: list[int] = []

    @cache(ttl=None, version="1", use_lock=True)
    def load() -> Any:
        runs.append(1)
        return Unloadable() if len(runs) == 1 else len(runs)

    load()
    assert load.is_cached()
    monkeypatch.setattr(Unloadable, "broken", True)
    assert load() == 2
    assert load() == 2


# --- invalidate_cache ----------------------------------------------------------------------------


async def test_the_product_service(tmp_path: Path) -> None:
    """The example of the specification works as it stands, and leaves other products alone."""
    for product, price in (("1", "1"), ("2", "2")):
        (tmp_path / product).write_text(price)

    class ProductService:
        @cache(ttl=300, key_prefix="products")
        async def get_product_details(self, product_id: str) -> dict[str, Any]:
            return {"price": int((tmp_path / product_id).read_text())}

        @invalidate_cache(
            key_prefix="products",
            key_resolver=lambda result, **kwargs: f"products:{kwargs['product_id']}",
        )
        async def update_product_details(self, product_id: str, data: dict[str, Any]) -> bool:
            (tmp_path / product_id).write_text(str(data["price"]))
            return True

    service = ProductService()
    assert await service.get_product_details("1") == {"price": 1}
    assert await service.get_product_details(product_id="2") == {"price": 2}
    assert await service.update_product_details("1", {"price": 10})
    assert await service.get_product_details.ais_cached("2")
    assert not await service.get_product_details.ais_cached("1")
    assert await service.get_product_details("1") == {"price": 10}


class Update:
    """An update that awaits; its entry must be there until it has ended."""

    def __init__(self, load: Any) -> None:
        self.load = load

    async def work(self, region: str) -> str:
        assert self.load.is_cached("EU")
        if region == "nowhere":
            raise ValueError(region)
        return region

    async def __call__(self, region: str) -> str:
        return await self.work(region)


AWAITED: dict[str, Callable[[Update], Any]] = {
    "async def": lambda update: update.work,
    "async __call__": lambda update: update,
    "partial": lambda update: partial(update.work),
    "def that returns a coroutine": lambda update: lambda region: update.work(region),
}


@pytest.mark.parametrize("how", AWAITED)
async def test_what_is_awaited_has_returned_afterwards(how: str) -> None:
    """Any function that returns an awaitable drops entries when that has ended without an error."""
    load = loads(key_prefix="sales")
    update = invalidate_cache(key_prefix="sales")(AWAITED[how](Update(load)))
    assert asyncio.iscoroutinefunction(update) == (how != "def that returns a coroutine")
    load("EU")
    with pytest.raises(ValueError, match="nowhere"):
        await update("nowhere")
    assert load.is_cached("EU")
    assert await update("EU") == "EU"
    assert not load.is_cached("EU")


def test_class_and_static_methods_invalidate() -> None:
    """`invalidate_cache` goes over or under `classmethod` and `staticmethod`."""
    load = loads(key_prefix="sales")

    class Service:
        @invalidate_cache(key_prefix="sales", key_resolver=lambda result, year: f"EU:{year}")
        @classmethod
        def over_class(cls, year: int) -> None: ...

        @classmethod
        @invalidate_cache(key_prefix="sales", key_resolver=lambda result, year: f"EU:{year}")
        def under_class(cls, year: int) -> None: ...

        @invalidate_cache(key_prefix="sales", key_resolver=lambda result, year: f"EU:{year}")
        @staticmethod
        def over_static(year: int) -> None: ...

        @staticmethod
        @invalidate_cache(key_prefix="sales", key_resolver=lambda result, year: f"EU:{year}")
        def under_static(year: int) -> None: ...

    for owner in (Service, Service()):
        for name in ("over_class", "under_class", "over_static", "under_static"):
            load("EU"), load("EU", 2023)
            getattr(owner, name)(2023)
            assert [load.is_cached("EU"), load.is_cached("EU", 2023)] == [True, False], name


def test_nothing_is_dropped_when_the_function_raises() -> None:
    """An update that failed leaves the entries as they are."""
    load = loads(key_prefix="sales")

    @invalidate_cache(key_prefix="sales")
    def update() -> None:
        raise ValueError("no")

    load("EU")
    with pytest.raises(ValueError, match="no"):
        update()
    assert load.is_cached("EU")


def test_several_addresses_and_the_result() -> None:
    """`key_resolver` takes the arguments that it declares, the result too, and may give a list."""
    load = loads(key_prefix="sales", key_resolver="{region}")

    @invalidate_cache(key_prefix="sales", key_resolver=lambda result, first: [first, *result])
    def update(first: str, second: int = 2) -> list[str]:
        return ["sales:US"]

    load("EU"), load("US"), load("ASIA")
    assert update("EU") == ["sales:US"]
    assert [load.is_cached(r) for r in ("EU", "US", "ASIA")] == [False, False, True]


def test_functions_and_match() -> None:
    """`functions=` with `match=` drops the entries whose arguments of these names are the same."""
    load = loads()

    @invalidate_cache(functions=[load], match=["region"])
    def update(region: str, value: int) -> None:
        return None

    load("EU"), load("EU", 2023), load("US")
    update(value=1, region="EU")
    assert [load.is_cached("EU"), load.is_cached("EU", 2023), load.is_cached("US")] == [0, 0, 1]


def test_methods_as_functions() -> None:
    """`functions=` takes methods of every kind, inside the class body and outside."""

    class Service:
        @cache(version="1", ttl=None)
        def load(self, region: str) -> int:
            return ran("load")

        @classmethod
        @cache(version="1", ttl=None)
        def make(cls, region: str) -> int:
            return ran("make")

        @staticmethod
        @cache(version="1", ttl=None)
        def read(region: str) -> int:
            return ran("read")

        @invalidate_cache(functions=[load, make, read], match=["region"])
        def update(self, region: str) -> None: ...

    @invalidate_cache(functions=[Service.load, Service.make, Service().read], match=["region"])
    def update(region: str) -> None: ...

    service = Service()
    for change in (service.update, update):
        before = [f(r) for f in (service.load, service.make, service.read) for r in ("EU", "US")]
        change("EU")
        after = [f(r) for f in (service.load, service.make, service.read) for r in ("EU", "US")]
        assert [old == new for old, new in zip(before, after, strict=True)] == [False, True] * 3


def test_tags_of_the_decorator() -> None:
    """`tags=` drops what has them."""
    load = loads(tags=["sales"])

    @invalidate_cache(tags=["sales"])
    def update() -> None:
        return None

    load("EU")
    update()
    assert not load.is_cached("EU")


@pytest.mark.parametrize("answer", ["raises", "an empty text"])
def test_a_resolver_that_fails_drops_the_whole_prefix(answer: str) -> None:
    """The result reaches the caller, the whole prefix goes, an event and a warning say so."""
    load, other = loads(key_prefix="sales"), loads("other", key_prefix="rest")
    given: dict[str, Any] = {"an empty text": ""}

    @invalidate_cache(key_prefix="sales", key_resolver=lambda result: [given[answer]])
    def update() -> str:
        return "done"

    load("EU"), load("US"), other("EU")
    with pytest.warns(UserWarning, match="the whole prefix was invalidated"), recording() as heard:
        assert update() == "done"
    assert [load.is_cached("EU"), load.is_cached("US"), other.is_cached("EU")] == [0, 0, 1]
    assert [e.reason for e in heard if e.kind == "error"] == ["key_resolver"]


def test_a_resolver_that_fails_without_a_prefix_drops_everything() -> None:
    """If the affected groups cannot be told, all entries are invalid."""
    load = loads()

    @invalidate_cache(key_resolver=lambda result: result["missing"])
    def update() -> dict[str, str]:
        return {}

    load("EU")
    with pytest.warns(UserWarning, match="everything was invalidated"):
        assert update() == {}
    assert not load.is_cached("EU")


def test_an_argument_without_a_key_drops_all_entries_of_the_function() -> None:
    """`match=` on a value that has no key reaches all entries, and the result its caller."""
    load = loads()

    @invalidate_cache(functions=[load], match=["region"])
    def update(region: Any) -> str:
        return "done"

    load("EU")
    with pytest.warns(UserWarning, match="all entries"):
        assert update(threading.Lock()) == "done"
    assert not load.is_cached("EU")


async def test_a_cancelled_update_still_drops_what_it_names(redis_server: Server) -> None:
    """The function has returned, so its entries go, though the caller does not wait any more."""
    load = loads(key_prefix="sales")
    begun, go = threading.Event(), threading.Event()

    def hold(asked: bytes) -> None:
        begun.set()
        go.wait(20)

    @invalidate_cache(key_prefix="sales")
    async def update() -> None:
        return None

    with Proxy(redis_server.port) as proxy, memo.configure(redis_url=proxy.url, deadline=20):
        await asyncio.to_thread(load, "EU")
        assert await load.ais_cached("EU")
        proxy.hold = hold
        task = asyncio.create_task(update())
        await await_until(begun.is_set)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        go.set()
        await memo.drain(20)
        assert not await load.ais_cached("EU")
        await asyncio.to_thread(assembly.reset)


@pytest.mark.parametrize(
    "given",
    [{}, {"match": ["region"]}, {"key_resolver": "a:{b}"}, {"functions": [len]}],
    ids=["nothing", "match alone", "a text", "no cached function"],
)
def test_options_of_the_decorator_are_checked(given: dict[str, Any]) -> None:
    """Options that cannot work are an error at decoration."""
    with pytest.raises((OptionError, TypeError)):

        @invalidate_cache(**given)
        def update(region: str) -> None:
            return None


@pytest.mark.timing
@pytest.mark.parametrize(("memory", "most"), [(0, 1.15), (1 << 20, 1.8)], ids=["disk", "memory"])
def test_stamps_cost_a_hit_little(memory: int, most: float) -> None:
    """A hit on disk takes at most 15 % longer than one that compares no stamps.

    A hit in memory takes some 2 µs more, which is a larger share of so little.
    """
    load = loads(tags=["sales"])

    def hits(*, compares: bool) -> float:
        with nullcontext() if compares else mutants.applied(mutants.comparison):
            begun = time.perf_counter()
            for _ in range(200):
                load("EU")
            return time.perf_counter() - begun

    with memo.configure(memory_limit=memory):
        load("EU")
        taken: dict[bool, list[float]] = {True: [], False: []}
        for attempt in range(1000):  # until a busy machine has had a quiet moment for either
            for compares in (True, False):
                taken[compares].append(hits(compares=compares))
            if attempt > 20 and min(taken[True]) < most * min(taken[False]):
                return
    pytest.fail(f"{min(taken[True]) / min(taken[False]):.2f} times as long")


@pytest.mark.parametrize("helper", ["ainvalidate", "aexpire"])
@pytest.mark.parametrize("bound", [False, True])
async def test_arguments_of_an_invalidation_are_read_in_a_thread(helper: str, bound: bool) -> None:
    """They may be big, so they are not read on the event loop."""
    threads: list[int] = []

    class Big:
        def __getstate__(self) -> str:
            threads.append(threading.get_ident())
            return "big"

    class Service:
        @cache(version="1")
        async def load(self, data: Any) -> None: ...

    @cache(version="1")
    async def load(data: Any) -> None: ...

    await getattr(Service().load if bound else load, helper)(Big())
    assert threads
    assert threading.get_ident() not in threads
