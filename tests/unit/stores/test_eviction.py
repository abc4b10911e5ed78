"""Eviction: the budget is held, and what is worth least per byte goes first."""

from __future__ import annotations

import os
import signal
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from folders import FOLDER
from ports import run, start
from redis_server import RedisServer
from time_ahead import Ahead

import memo
from memo import cache
from memo.decorators.assembly import default_chain
from memo.records import codec, seal
from memo.records.seal import Header
from memo.records.stamp_types import Times
from memo.runtime.blocking import BLOCKING, Blocking, drain_blocking, drive
from memo.runtime.clock import SECOND
from memo.runtime.port import waiting_for_locks
from memo.settings.configuration import configure
from memo.settings.secret_keys import Secret
from memo.stores.disk.disk_tier import EARLY_SWEEP_SECONDS, REPORT_SECONDS, Disk
from memo.stores.disk.host_state import Host

MIB = 1 << 20
SECRET = Secret(b"s" * 32)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    host = Host(tmp_path / "cache")
    disk = Disk(tmp_path / "cache", 10 * MIB, host)
    yield disk
    assert drain_blocking(20)
    disk.close()
    host.close()


class Alone(Blocking):
    """Sync code that does nothing in the background."""

    def spawn(self, *_: Any, **__: Any) -> Any:
        return None


def put(
    disk: Disk,
    name: str,
    seconds: float,
    size: int = MIB,
    code: str = "c1",
    port: Blocking = BLOCKING,
) -> None:
    """Store an entry whose computation took so many seconds."""
    payload = codec.payload((memoryview(os.urandom(size)),))
    times = Times(1, 2, bytes(16), 3, -1, 0, int(seconds * SECOND))
    header = Header("memo", name, "f", code, "", "", "", "", times, (), payload.table)
    record = seal.pack(header, b"stream", SECRET)
    drive(disk.store(port, f"memo:{{f}}:00:{name}", record, payload, None))


def held(disk: Disk) -> set[str]:
    """The keys that are there, looked up in a way that is no use of them."""
    return {name.rpartition(":")[2] for name in drive(disk.names(BLOCKING, ""))}


def read(disk: Disk, name: str) -> None:
    assert drive(disk.lookup(BLOCKING, f"memo:{{f}}:00:{name}")) is not None


def used(directory: Path) -> int:
    """Bytes of the disk that a directory takes, without the log of the index."""
    paths = [p for p in directory.rglob("*") if p.is_file()]
    paths = [p for p in paths if not p.name.endswith(("-wal", "-shm"))]
    return sum({p.stat().st_ino: p.stat().st_blocks * 512 for p in paths}.values())


def test_what_costs_least_per_byte_goes_first(disk: Disk) -> None:
    """Among entries of one age and size, those go that are computed again most quickly."""
    for number in range(9):
        put(disk, f"n{number}", seconds=0.001 if number in (3, 6) else 10)
    put(disk, "new", seconds=10)
    put(disk, "newer", seconds=10)
    assert held(disk) == {f"n{n}" for n in range(9) if n not in (3, 6)} | {"new", "newer"}


def test_size_counts_against_an_entry(disk: Disk) -> None:
    """Of two that took equally long, the bigger goes."""
    put(disk, "small", seconds=1, size=100_000)
    put(disk, "big", seconds=1, size=6 * MIB)
    put(disk, "new", seconds=1, size=5 * MIB)
    assert held(disk) == {"small", "new"}


def test_age_counts_against_an_entry(disk: Disk, ahead: Ahead) -> None:
    """An entry that cost more goes too, when it has not been used for long enough."""
    put(disk, "dear", seconds=100)
    put(disk, "dearest", seconds=100_000)
    ahead.advance(12 * 86_400)
    for number in range(8):
        put(disk, f"n{number}", seconds=1)
    assert held(disk) >= {"dearest", "n0", "n7"}
    assert "dear" not in held(disk)


def test_what_is_read_survives(disk: Disk, ahead: Ahead) -> None:
    """Reading an entry makes it as good as new."""
    for number in range(9):
        put(disk, f"n{number}", seconds=1)
    ahead.advance(3600)
    read(disk, "n0")
    read(disk, "n4")
    for number in range(5):
        ahead.advance(1)
        put(disk, f"later{number}", seconds=1)
    assert held(disk) >= {"n0", "n4"}
    assert not held(disk) & {"n1", "n2", "n3"}


def used_at(directory: Path, name: str) -> float:
    """The time that the rank of an entry counts from, in the index as others see it."""
    with closing(sqlite3.connect(directory / "entries" / "cache.db")) as index:
        row = index.execute(
            "SELECT access_time - CAST(tag AS INTEGER) FROM Cache WHERE key LIKE ?", (f"%{name}",)
        ).fetchone()
    return float(row[0])


def test_who_only_reads_counts_too(disk: Disk, ahead: Ahead) -> None:
    """A process that stores nothing tells what it reads, in the background, once in a while."""
    put(disk, "a", seconds=1)
    put(disk, "b", seconds=1)
    now = time.time()
    ahead.step(7200)
    read(disk, "a")
    assert used_at(disk.directory, "a") < now + 3600, "a lookup wrote"
    ahead.advance(2 * REPORT_SECONDS)
    read(disk, "b")
    assert drain_blocking(20)
    assert used_at(disk.directory, "a") > now + 3600
    assert used_at(disk.directory, "b") > now + 3600


def test_hits_without_a_look_up_count_too(disk: Disk, ahead: Ahead) -> None:
    """Reads by the quick way are told with the rest: when that is due, a lookup comes first."""
    name = "memo:{f}:00:a"
    drive(disk.store(BLOCKING, name, b"record", None, None))
    now = time.time()
    ahead.step(7200)
    assert disk.at_hand(name) == b"record"
    ahead.advance(2 * REPORT_SECONDS)
    assert disk.at_hand(name) is None
    read(disk, "a")
    assert drain_blocking(20)
    assert used_at(disk.directory, "a") > now + 3600
    assert disk.at_hand(name) == b"record"


def test_small_stores_of_two_hold_the_budget(tmp_path: Path) -> None:
    """A process that checks the budget once for many small stores leaves space for others."""
    host = Host(tmp_path / "cache")
    disks = [Disk(tmp_path / "cache", 2 * MIB, host) for _ in range(2)]
    for number in range(600):
        for at, one in enumerate(disks):
            drive(one.store(BLOCKING, f"memo:{{f}}:00:{number}.{at}", bytes(4000), None, None))
    assert drive(disks[0].health(BLOCKING))["bytes"] <= 2 * MIB
    for one in disks:
        one.close()
    host.close()


def test_who_reads_for_a_moment_only_counts_when_it_ends(disk: Disk, ahead: Ahead) -> None:
    """The reads of a short program are told when it closes the tier."""
    put(disk, "a", seconds=1)
    now = time.time()
    ahead.step(7200)
    read(disk, "a")
    disk.close()
    assert used_at(disk.directory, "a") > now + 3600


@pytest.mark.parametrize(
    "tiers", [["memory", "disk"], ["redis", "disk"], ["memory", "redis", "disk"]]
)
def test_hits_above_the_disk_count_too(
    cache_home: Path, redis_server: RedisServer, ahead: Ahead, tiers: list[str]
) -> None:
    """Entries that memory or Redis answers are in use: the disk hears of it at process exit."""
    with configure(tiers=tiers, redis_url=redis_server.url, deadline=5.0):

        @cache(name="eviction:above", version="1", ttl=None)
        def load(x: int) -> int:
            return x

        load(1)
        load(2)
        memo.testing.reset()
    now = time.time()
    ahead.step(7200)
    with configure(tiers=tiers, redis_url=redis_server.url, deadline=5.0):
        keys = load.key(1), load.key(2)
        load.refresh(2)
        load(1)  # what follows is answered above the disk
        disk: Any = default_chain().tiers[-1]
        disk.report_reads()
        ahead.step(7200)
        for _ in range(3):
            load(1)
        disk.close()
        assert used_at(cache_home / FOLDER, keys[0]) > now + 10800
        assert used_at(cache_home / FOLDER, keys[1]) < now + 10800, "who is not read is not told"


def test_a_program_that_ends_tells_what_it_read(tmp_path: Path) -> None:
    """At the end of the interpreter too, and without a word."""
    code = (
        "import sys, time, memo\n"
        "from memo.settings.configuration import configure\n"
        "configure(directory=sys.argv[1], tiers=['memory', 'disk'])\n"
        "@memo.cache(name='eviction:end', version='1', ttl=None)\n"
        "def load(x): return x\n"
        "real = time.time\n"
        "if sys.argv[2] == 'later': time.time = lambda: real() + 7200\n"
        "print(load(1), load.key(1))\n"
    )
    before = time.time()
    run(code, tmp_path, "now")
    key = run(code, tmp_path, "later").split()[1]
    assert used_at(tmp_path / FOLDER, key) > before + 3600


def test_replaced_code_goes_first(disk: Disk) -> None:
    """Results of an older version of the code go before all else, however dear."""
    for number in range(4):
        put(disk, f"old{number}", seconds=10_000, code="c1")
    for number in range(5):
        put(disk, f"new{number}", seconds=0.01, code="c2")
    for number in range(4):
        put(disk, f"newer{number}", seconds=0.01, code="c2")
    assert held(disk) == {f"new{n}" for n in range(5)} | {f"newer{n}" for n in range(4)}


def test_only_new_code_looks_at_all_entries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first store of a process is no dearer among many entries of the same code."""
    host = Host(tmp_path / "cache")
    before = Disk(tmp_path / "cache", MIB, host)
    put(before, "old", seconds=1, code="c1")
    before.close()
    statements: list[str] = []
    connect = sqlite3.connect

    def traced(*args: Any, **options: Any) -> sqlite3.Connection:
        connection = connect(*args, **options)
        connection.set_trace_callback(statements.append)
        return connection

    monkeypatch.setattr(sqlite3, "connect", traced)
    after = Disk(tmp_path / "cache", MIB, host)
    put(after, "same", seconds=1, code="c1")
    assert [s for s in statements if "substr(tag" in s] == []
    put(after, "new", seconds=1, code="c2")
    assert len([s for s in statements if "substr(tag" in s]) == 1
    after.close()
    host.close()


def test_a_process_that_goes_on_with_older_code(tmp_path: Path, ahead: Ahead) -> None:
    """The next process with newer code finds what it has stored meanwhile."""
    host = Host(tmp_path / "cache")
    old, new, next_one = (Disk(tmp_path / "cache", 10 * MIB, host) for _ in range(3))
    put(old, "old", seconds=10_000, code="c1")
    put(new, "new", seconds=1, code="c2")
    ahead.advance(100)
    for number in range(2):
        put(old, f"late{number}", seconds=10_000, code="c1")
    for number in range(12):
        put(next_one, f"n{number}", seconds=1, code="c2")
    assert not {"late0", "late1"} & held(next_one)
    for disk in (old, new, next_one):
        disk.close()
    host.close()


def test_code_that_comes_back_counts_again(disk: Disk) -> None:
    """Entries of a version to which the user has gone back survive once they are read."""
    put(disk, "old", seconds=10, code="c1")
    put(disk, "other", seconds=10, code="c2")
    read(disk, "old")
    for number in range(12):
        put(disk, f"n{number}", seconds=1, code="c2")
    assert "old" in held(disk)


def test_no_more_goes_than_must(disk: Disk) -> None:
    """Space for one entry takes one entry of its size, not ten."""
    for number in range(9):
        put(disk, f"n{number}", seconds=1)
    before = len(held(disk))
    put(disk, "new", seconds=1)
    assert len(held(disk)) >= before


def test_the_budget_is_held_by_many_writers(tmp_path: Path) -> None:
    """Threads that store at once do not exceed the budget by more than a tenth."""
    directory = tmp_path / "cache"
    host = Host(directory)
    disks = [Disk(directory, 20 * MIB, host) for _ in range(3)]

    def work(disk: Disk, seed: int) -> None:
        with waiting_for_locks(60):  # the disk may be slow, and others give up sooner
            for number in range(25):
                put(disk, f"{seed}-{number}", seconds=1, size=MIB // 2 + number * 30_000)

    threads = [threading.Thread(target=work, args=(d, n)) for n, d in enumerate(disks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert 15 * MIB < used(directory) < 22 * MIB
    for disk in disks:
        disk.close()
    host.close()


def test_no_store_pays_for_a_budget_that_shrank(tmp_path: Path, ahead: Ahead) -> None:
    """A store evicts for 10 ms at most; those that follow and the background do the rest."""
    host = Host(tmp_path / "cache")
    before = Disk(tmp_path / "cache", 1 << 30, host)
    small = [(f"memo:{{f}}:00:{number}", bytes(1000), None) for number in range(5000)]
    drive(before.store_many(BLOCKING, small))
    before.close()
    after = Disk(tmp_path / "cache", 2 * MIB, host)
    there = len(held(after))
    ahead.stop()
    with ahead.slow(0.001):  # 1 ms for each batch
        put(after, "new", seconds=1, size=100, port=Alone())
    first = there - len(held(after))
    stores = 0
    while drive(after.health(BLOCKING))["bytes"] > 2 * MIB and stores < 100:
        put(after, f"{stores}", seconds=1, size=100)
        assert drain_blocking(20)
        stores += 1
    after.close()
    host.close()
    assert 0 < first <= 11 * 100
    assert 0 < stores < 100


def test_an_entry_in_use_survives_its_eviction(ahead: Ahead) -> None:
    """An array that is in use stays whole while its entry goes."""
    with configure(tiers=["disk"], size_limit=8 * MIB):

        @cache(name="eviction:frame", version="1", ttl=None)
        def frame(x: int) -> Any:
            ahead.work(0.02 * x)  # each is worth more than those before
            return np.full(500_000, x)

        frame(0)
        mapped = frame(0)
        for x in range(1, 6):
            frame(x)
        assert not frame.is_cached(0)
        mapped += 1
        assert (mapped == 1).all()


def whole(directory: Path) -> int:
    """Bytes of all files below a directory, each once."""
    found = {}
    for path in directory.rglob("*"):
        with suppress(FileNotFoundError):
            facts = path.stat()
            if path.is_file():
                found[facts.st_ino] = facts.st_size
    return sum(found.values())


KILLED = """
import os, signal, sys
import memo
from memo.stores.disk.index import Index
from observed import calls_of

memo.configure(directory=sys.argv[1], size_limit=20 << 20, secret="x" * 40)
load = memo.cache(lambda x: os.urandom(2 << 20), name="load")
with calls_of(Index.put_rows, then=lambda: os.kill(os.getpid(), signal.SIGKILL)):
    load(int.from_bytes(os.urandom(4), "big"))
"""


def test_writers_killed_in_mid_store_leave_the_budget_as_it_is(
    tmp_path: Path, ahead: Ahead
) -> None:
    """Leftovers of killed processes go as soon as another stores, not an hour later."""
    for _ in range(6):
        with start(KILLED, tmp_path) as process:
            assert process.wait(30) == -signal.SIGKILL
    assert whole(tmp_path) >= 2 * MIB  # the last one's at least
    ahead.advance(EARLY_SWEEP_SECONDS)  # they have swept too, each once a second
    with configure(directory=tmp_path, size_limit=20 * MIB, secret="x" * 40):
        load = cache(lambda x: os.urandom(2 << 20), name="load")
        load(1)
        drain_blocking()
        assert whole(tmp_path) <= 3 * MIB


def test_the_budget_is_held_by_the_directory(tmp_path: Path) -> None:
    """Logs and generations included, a directory takes at most a tenth more than its limit."""
    with configure(directory=tmp_path, size_limit=12 * MIB, secret="x" * 40, memory_limit=0):
        load = cache(lambda x: {"id": x, "text": "x" * 2000}, name="load")
        most = 0
        for x in range(8000):
            load(x)
            if x % 500 == 0:
                most = max(most, whole(tmp_path))
        assert 8 * MIB < most <= 1.1 * 12 * MIB
