"""Costs grow no faster than the work: two sizes in one run, side by side."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from observed import calls_of

import memo
from memo.coordination.flights import Flights
from memo.keys.fingerprint.source_history import Manifests
from memo.records.stamp_types import Ref
from memo.runtime.blocking import BLOCKING, drive
from memo.stores.disk import sqlite_file
from memo.stores.disk.disk_tier import MAX_INDEX_RECORD_BYTES, Disk
from memo.stores.disk.host_state import Host
from memo.stores.disk.index import Index
from memo.stores.disk.payload_files import Payloads
from memo.validity.stamps import Turn


def _best(work: Callable[[], object], rounds: int = 3) -> float:
    """Seconds of the fastest of some rounds."""
    taken = []
    for _ in range(rounds):
        begun = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begun)
    return min(taken)


@pytest.mark.timing
def test_invalidating_many_addresses_is_linear() -> None:
    """Four times as many addresses take at most eight times as long; they took sixteen times."""
    first = iter(range(0, 10**9, 10_000))

    @memo.invalidate_cache(
        key_prefix="p",
        key_resolver=lambda result, n, start: [f"p:{start + x}" for x in range(n)],
    )
    def update(n: int, start: int) -> None:
        """Change `n` products."""

    def updated(n: int) -> float:
        def work() -> None:
            memo.invalidate(prefix="p")
            update(n, next(first))

        return _best(work)

    few, many = updated(400), updated(1600)
    assert many < 8 * few


@pytest.mark.timing
def test_invalidating_many_calls_during_many_computations_is_linear() -> None:
    """Four times as many of both take at most eight times as long; they took sixteen times."""

    def detached(count: int) -> float:
        flights = Flights()
        for one in range(count):
            flights.join(f"call {one}", (Ref("f:f", (("x", f"{one}"),)),))
        others = [Turn("f:f", (("x", f"{one}"),), whole=True) for one in range(count, 2 * count)]
        return _best(lambda: flights.detach(others))

    few, many = detached(300), detached(1200)
    assert many < 8 * few


def test_writing_down_a_code_version_does_not_list_the_others(tmp_path) -> None:
    """The first call of the 1,000th function costs what that of the first costs."""
    manifests = Manifests(tmp_path / "cache")
    manifests.directory.parent.mkdir(mode=0o700)
    with calls_of(Manifests.prune) as listed:
        for number in range(1000):
            manifests.save(f"{number:032x}", lambda: {"f": "def f(): ..."})
    assert len(listed) <= 2


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    host = Host(tmp_path / "cache")
    disk = Disk(tmp_path / "cache", 1 << 30, host)
    yield disk
    disk.close()
    host.close()


def _put(disk: Disk, name: str, record: bytes = b"x") -> None:
    drive(disk.store(BLOCKING, name, record, None, None))


@pytest.fixture
def small_batches(set_limits: Callable[..., None]) -> None:
    """Five entries are cleared in one transaction."""
    set_limits(cleared_at_once=5)


@pytest.mark.usefixtures("small_batches")
def test_clearing_gives_way_to_other_threads(disk: Disk) -> None:
    """While many entries are cleared the writers of the same process wait for a batch at most."""
    drive(disk.store_many(BLOCKING, [(f"ns:{{f}}:s:{n}", b"x", None) for n in range(50)]))
    with calls_of(Disk.write, Index.clear_some) as done:
        assert drive(disk.clear(BLOCKING, "ns:")) == 50
    assert done.count("clear_some") >= 10
    assert "clear_some clear_some" not in " ".join(done), "two in one transaction"


def test_files_are_removed_while_others_may_write(disk: Disk) -> None:
    """A clear removes the files of entries when it has let go of the index."""
    for number in range(3):
        _put(disk, f"a:{number}", bytes(MAX_INDEX_RECORD_BYTES + 1))
    free = []

    def look() -> None:
        free.append(disk.index_file.writing.acquire(blocking=False))
        if free[-1]:
            disk.index_file.writing.release()

    def look_from_elsewhere() -> None:
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()

    with calls_of(Payloads.remove, then=look_from_elsewhere):
        assert drive(disk.clear(BLOCKING, "a:")) == 3
    assert free == [True, True, True]
    assert not [path for path in disk.payloads.directory.rglob("*") if path.is_file()]


@pytest.mark.usefixtures("small_batches")
def test_entries_of_others_are_looked_at_once(disk: Disk) -> None:
    """Each batch of a clear begins where the one before ended, however many others are newer."""
    for number in range(200):
        _put(disk, f"a:{number}")
    for number in range(190):
        _put(disk, f"b:{number}")
    steps = []
    disk.index_file.writer.set_progress_handler(lambda: steps.append(1), 100)
    assert drive(disk.clear(BLOCKING, "a:")) == 200
    disk.index_file.writer.set_progress_handler(None, 0)
    assert len(drive(disk.names(BLOCKING, ""))) == 190
    assert len(steps) < 350  # 570 where each batch reads them again


def test_a_clear_leaves_the_connection_as_it_was(disk: Disk) -> None:
    """The settings of a clear, more memory and a longer log, end with it."""
    _put(disk, "a:1")
    writer = disk.index_file.writer
    names = "cache_size", "wal_autocheckpoint"
    before = [writer.execute(f"PRAGMA {name}").fetchone() for name in names]
    statements: list[str] = []
    writer.set_trace_callback(statements.append)
    drive(disk.clear(BLOCKING, "a:"))
    writer.set_trace_callback(None)
    assert all(any(f"PRAGMA {name}=" in one for one in statements) for name in names)
    assert [writer.execute(f"PRAGMA {name}").fetchone() for name in names] == before


def test_a_log_does_not_stay_long(tmp_path) -> None:
    """After a big change the `-wal` file of the index is cut to what the documents say."""
    host = Host(tmp_path / "cache")
    disk = Disk(tmp_path / "cache", 1 << 30, host)
    drive(disk.store(BLOCKING, "a", b"x", None, None))
    with disk.index_file.writing, disk.index_file.transaction() as connection:
        connection.execute("CREATE TABLE big (content)")
        connection.executemany("INSERT INTO big VALUES (?)", [(bytes(4000),)] * 3000)
    for number in range(3):
        drive(disk.store(BLOCKING, f"b{number}", b"x", None, None))
    assert (
        tmp_path / "cache" / "entries" / "cache.db-wal"
    ).stat().st_size <= sqlite_file.KEPT_LOG_BYTES
    disk.close()
    host.close()


def _nested(depth: int) -> Callable[[int], object]:
    """A call of so many cached functions, each of which calls the next."""

    def step(x: int, rest: tuple[Any, ...]) -> int:
        return rest[0](x, rest[1:]) + 1 if rest else x

    steps = tuple(
        memo.cache(step, name=f"pipeline:step_{depth}_{number}", ignore=["rest"], ttl=600)
        for number in range(depth)
    )
    return lambda x: steps[0](x, steps[1:])


@contextmanager
def _computations() -> Iterator[list[str]]:
    """The functions that are computed meanwhile."""
    found: list[str] = []
    stop = memo.on_event(lambda e: found.append(e.function) if e.kind == "computed" else None)
    try:
        yield found
    finally:
        stop()


def test_what_deep_calls_inherit_is_small() -> None:
    """200 deep a record takes 8 KiB at most, and an invalidation far below reaches it."""
    call = _nested(200)
    assert call(1) == 200
    assert max(entry.size for entry in memo.entries()) <= 8 << 10
    with _computations() as computed:
        assert call(1) == 200
    assert not computed
    memo.invalidate(function="pipeline:step_200_150", reason="new data")
    with _computations() as computed:
        assert call(1) == 200
    assert len(computed) == 151


def _lines(work: Callable[[], object]) -> int:
    """Count the lines of memo that a piece of work runs, whatever the machine.

    Without `metrics`, which shares its counters once in so many seconds.
    """
    count, ours = 0, str(Path(memo.__file__).parent)

    def trace(frame: FrameType, event: str, _: object) -> Callable[..., Any] | None:
        nonlocal count
        name = frame.f_code.co_filename
        if event == "call" and (not name.startswith(ours) or "metrics" in name):
            return None
        count += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


def test_nesting_costs_what_its_depth_says() -> None:
    """Four times as deep runs at most five times as many lines; it ran nine times as many."""
    few, many = _nested(50), _nested(200)
    few(0), many(0)
    assert _lines(lambda: many(1)) < 5 * _lines(lambda: few(1))


def _lattice(depth: int) -> Callable[[int], object]:
    """A call of so many cached functions, each of which calls the next two."""

    def step(x: int, rest: tuple[Any, ...]) -> int:
        return 1 + sum(rest[n](x, rest[n + 1 :]) for n in range(min(2, len(rest))))

    steps = tuple(
        memo.cache(step, name=f"lattice:step_{number}", ignore=["rest"], ttl=600)
        for number in range(depth)
    )
    return lambda x: steps[0](x, steps[1:])


@pytest.mark.parametrize("memory_limit", [0, 1 << 26])
def test_what_was_inherited_twice_still_counts(tmp_path, memory_limit) -> None:
    """If calls inherit in two ways, each invalidation reaches everything that was built on it."""
    with memo.configure(directory=tmp_path / "cache", memory_limit=memory_limit):
        call = _lattice(90)
        call(1)
        for below in (89, 45, 1):
            with _computations() as computed:
                call(1)
            assert not computed
            memo.invalidate(function=f"lattice:step_{below}", reason="new data")
            with _computations() as computed:
                call(1)
            assert len(computed) == below + 1


def test_explain_names_the_path_far_below() -> None:
    """A miss for something many calls below says what was invalidated, and why."""
    call = _nested(60)
    call(1)
    memo.invalidate(function="pipeline:step_60_59", reason="new data")
    told = "\n".join(memo.explain("pipeline:step_60_0", 1, ()).facts)
    assert "step_60_59" in told
    assert "new data" in told
