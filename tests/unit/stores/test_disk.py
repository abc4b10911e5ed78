"""The disk tier: whole or not at all, mapped, within its budget, whatever happens to its files."""

from __future__ import annotations

import asyncio
import os
import pickle
import random
import signal
import sqlite3
import stat
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
from ports import RUNNERS, blocking, start
from ports import run as run_process
from sqlite_damage import damage_file
from time_ahead import Ahead
from waiting import STUCK, until

import memo
from memo.errors import TierError
from memo.records import codec
from memo.runtime.blocking import BLOCKING, POOL_THREADS, drain_blocking
from memo.runtime.native import native
from memo.runtime.port import waiting_for_locks
from memo.stores.disk import cache_directory, sqlite_file
from memo.stores.disk import disk_tier as disk_module
from memo.stores.disk.disk_tier import MAX_INDEX_RECORD_BYTES, Disk
from memo.stores.disk.host_state import Host
from memo.stores.protocols import Found

MIB = 1 << 20


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def host(directory):
    host = Host(directory)
    yield host
    host.close()


@pytest.fixture
def disk(directory, host):
    disk = Disk(directory, 64 * MIB, host)
    yield disk
    disk.close()


@pytest.fixture(params=RUNNERS)
def run(request):
    return RUNNERS[request.param]


def payload(*buffers: bytes) -> codec.Payload:
    return codec.payload(tuple(memoryview(b) for b in buffers))


def put(disk, name, record=b"record", payload=None, lifetime=None, run=blocking):
    run(lambda port: disk.store(port, name, record, payload, lifetime))


def get(disk, name, run=blocking) -> Found | None:
    return run(lambda port: disk.lookup(port, name))


def files(directory: Path) -> list[str]:
    """All payload files, without their directory."""
    return sorted(p.name for p in (directory / "payloads").rglob("*") if p.is_file())


def shape(names: list[str]) -> dict[str, int]:
    """The numbers of canonical names, links, records and temporary files."""
    kinds = {"canonical": 0, "link": 0, "record": 0, "temporary": 0}
    for name in names:
        if name.endswith(".rec"):
            kinds["record"] += 1
        elif name.endswith(".tmp"):
            kinds["temporary"] += 1
        else:
            kinds["link" if "." in name else "canonical"] += 1
    return kinds


IN_A_PROCESS = """
import os, sys
from pathlib import Path
from memo.records import codec
from memo.stores.disk.disk_tier import Disk
from memo.runtime.blocking import BLOCKING, drive
from memo.stores.disk.host_state import Host
directory = Path(sys.argv[1])
host = Host(directory)
disk = Disk(directory, 64 << 20, host)
def payload(*buffers):
    return codec.payload(tuple(memoryview(b) for b in buffers))
def put(name, record=b"record", payload=None):
    drive(disk.store(BLOCKING, name, record, payload, None))
def get(name):
    return drive(disk.lookup(BLOCKING, name))
"""


# --- storing and finding -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size", [0, 1, MAX_INDEX_RECORD_BYTES, MAX_INDEX_RECORD_BYTES + 1, 3 * MIB]
)
def test_a_record_of_any_size_is_found_as_it_was_stored(disk, run, size):
    """Records in the index and records in files are found whole, over both ports."""
    record = os.urandom(size)
    assert get(disk, "a", run) is None
    put(disk, "a", record, run=run)
    assert get(disk, "a", run) == Found(record)
    assert get(disk, "b", run) is None
    put(disk, "a", b"new", run=run)
    assert get(disk, "a", run) == Found(b"new")
    assert files(disk.directory) == []


@pytest.mark.parametrize("record", [b"small", bytes(MAX_INDEX_RECORD_BYTES + 1)])
def test_a_payload_is_mapped_with_its_buffers_aligned(disk, run, record):
    """A payload's buffers lie at multiples of 64, as they were, with zeros between them."""
    held = payload(b"x" * 100, b"", b"y" * 64, b"z")
    put(disk, "a", record, held, run=run)
    found = get(disk, "a", run)
    assert found.record == record
    view = found.source.open(held.size)
    assert len(view) == held.size == 128 + 64 + 64
    assert [bytes(v) for v in codec.buffers_of(view, held.table)] == [bytes(v) for v in held.views]
    by_digest = run(lambda port: disk.payload(port, held.digest, held.size))
    assert bytes(by_digest.open(held.size)) == bytes(view)
    assert run(lambda port: disk.payload(port, held.digest, held.size + 64)) is None
    assert run(lambda port: disk.payload(port, bytes(32), held.size)) is None


def test_a_payload_of_many_buffers_is_written_whole(disk):
    """More buffers than one write takes arrive in order."""
    held = payload(*(os.urandom(random.randrange(200)) for _ in range(3000)))
    put(disk, "a", payload=held)
    view = get(disk, "a").source.open(held.size)
    assert all(
        bytes(a) == bytes(b)
        for a, b in zip(codec.buffers_of(view, held.table), held.views, strict=True)
    )


def test_writing_to_a_mapped_payload_changes_nobody_elses(disk):
    """A view is writable, and neither the file nor other views see what is written (I8)."""
    held = payload(os.urandom(2 * MIB))
    put(disk, "a", payload=held)
    one, two = (get(disk, "a").source.open(held.size) for _ in range(2))
    before = bytes(two)
    one[:] = bytes(len(one))
    assert bytes(two) == before
    assert bytes(get(disk, "a").source.open(held.size)) == before


def test_a_mapped_payload_outlives_its_entry(disk):
    """A mapped value stays as it was when the entry is replaced, dropped and cleared."""
    data = os.urandom(MIB)
    held = payload(data)
    put(disk, "a", payload=held)
    view = get(disk, "a").source.open(held.size)
    put(disk, "a", payload=payload(os.urandom(MIB)))
    blocking(lambda port: disk.clear(port, ""))
    assert files(disk.directory) == []
    assert bytes(view) == data


def test_opening_does_not_depend_on_the_size(disk):
    """Mapping 32 MiB takes less than 3 ms (0.03 ms on a quiet machine) and no memory."""
    held = payload(bytes(32 * MIB))
    put(disk, "a", payload=held)
    times = []
    for _ in range(50):
        begun = time.perf_counter()
        view = get(disk, "a").source.open(held.size)
        times.append(time.perf_counter() - begun)
        del view
    assert min(times) < 3e-3


def test_equal_payloads_are_stored_once(disk):
    """Entries with equal payloads share one file; the last of them takes it along."""
    held = payload(os.urandom(MIB))
    for name in "abc":
        put(disk, name, payload=held)
    paths = [p for p in (disk.directory / "payloads").rglob("*") if p.is_file()]
    assert shape(files(disk.directory)) == {"canonical": 1, "link": 3, "record": 0, "temporary": 0}
    assert len({p.stat().st_ino for p in paths}) == 1
    assert paths[0].stat().st_nlink == 4
    blocking(lambda port: disk.drop(port, "a"))
    put(disk, "b", b"other")
    assert shape(files(disk.directory))["link"] == 1
    assert get(disk, "c").source.open(held.size)
    blocking(lambda port: disk.drop(port, "c"))
    assert files(disk.directory) == []


def test_the_identity_of_a_payload_names_its_bytes(disk):
    """The identity stays while the file does, and is another when it was touched or replaced."""
    held = payload(bytes(MIB))
    put(disk, "a", payload=held)
    source = get(disk, "a").source
    identity = source.identity
    assert identity is not None
    source.open(held.size)
    assert source.identity == identity == get(disk, "a").source.identity

    def changed():  # the clock of a file system may tick in steps of 10 ms
        with open(source.path, "r+b") as file:
            file.write(b"!")
        return get(disk, "a").source.identity != identity

    until(changed)


def test_an_entry_expires_with_its_lifetime(directory, host):
    """An entry is there until its lifetime has passed; one without stays."""
    clock = Ahead()
    disk = Disk(directory, MIB, host, clock)
    put(disk, "a", lifetime=100)
    put(disk, "b")
    assert get(disk, "a")
    clock.step(101)
    assert get(disk, "a") is None
    assert get(disk, "b")
    disk.close()


def test_at_hand_is_what_a_look_up_finds(directory, host):
    """A small record that lies in the index, until it expires or goes; of the rest nothing."""
    clock = Ahead()
    disk = Disk(directory, MIB, host, clock)
    assert disk.at_hand("a") is None, "nothing is open yet"
    put(disk, "a", b"record", lifetime=100)
    put(disk, "payload", b"record", payload(bytes(100_000)))
    put(disk, "big", os.urandom(MAX_INDEX_RECORD_BYTES + 1))
    assert disk.at_hand("a") == b"record"
    assert [disk.at_hand(name) for name in ("b", "payload", "big")] == [None] * 3
    clock.step(101)
    assert disk.at_hand("a") is None
    clock.step(-101)
    put(disk, "a", b"another")
    assert disk.at_hand("a") == b"another"
    blocking(lambda port: disk.drop(port, "a"))
    assert disk.at_hand("a") is None
    for name in ("payload", "big"):
        assert get(disk, name)
        assert disk.at_hand(name) is None
        put(disk, name, b"small")
        assert get(disk, name) == Found(b"small")
        assert disk.at_hand(name) == b"small"
    disk.close()


@pytest.mark.parametrize("damage", ["garbage", "tables"])
def test_a_fault_is_met_once(disk, directory, damage):
    """A fault of a quick lookup is raised by the lookup that follows, and by no other."""
    for number in range(200):
        put(disk, f"n{number}", os.urandom(2000))
    disk.close()
    get(disk, "n0")
    damage_file(directory / "entries" / "cache.db", damage, "Cache")
    assert [disk.at_hand(f"n{number}") for number in range(200)].count(None) > 0
    with pytest.raises(TierError):
        get(disk, "n1")
    assert get(disk, "n1") is None


def test_looking_up_writes_nothing(disk, monkeypatch):
    """A hit leaves no trace in the index: no commit, no statistics, no time of use."""
    put(disk, "a")
    get(disk, "a")
    version = disk.index_file.reader.execute("PRAGMA data_version").fetchone()
    changes = disk.index_file.writer.total_changes
    for _ in range(10):
        get(disk, "a")
        get(disk, "b")
        assert disk.at_hand("a") == b"record"
    assert disk.index_file.reader.execute("PRAGMA data_version").fetchone() == version
    assert disk.index_file.writer.total_changes == changes


def test_drop_and_clear_say_what_they_did(disk, run):
    """`drop` tells whether it was there, `clear` how many began so; what others have stays."""
    held = payload(os.urandom(MIB))
    for name in ("x:1", "x:2", "y:1"):
        put(disk, name, payload=held)
    assert run(lambda port: disk.drop(port, "x:1"))
    assert not run(lambda port: disk.drop(port, "x:1"))
    assert run(lambda port: disk.clear(port, "x:")) == 1
    assert run(lambda port: disk.names(port)) == ["y:1"]
    assert get(disk, "y:1").source.open(held.size)
    assert run(lambda port: disk.clear(port, "")) == 1
    assert files(disk.directory) == []


def test_clearing_many_entries_takes_all_of_them(disk):
    """A clear of more entries than one transaction takes leaves none, and no others gone."""
    for number in range(2100):
        put(disk, f"a:{number}")
    put(disk, "b:1")
    assert blocking(lambda port: disk.clear(port, "a:")) == 2100
    assert blocking(lambda port: disk.names(port)) == ["b:1"]


def test_entries_are_listed_by_name(disk, run):
    """`entries` gives name, record, bytes and time of storing, page after page; `names` names."""
    pages = [(f"x:0:{number:04}", b"", None) for number in range(2 * disk_module.ROWS_PER_PAGE)]
    blocking(lambda port: disk.store_many(port, pages))
    held, big = payload(bytes(1000)), os.urandom(MAX_INDEX_RECORD_BYTES + 1)
    put(disk, "x:1", b"one")
    put(disk, "x:2", b"two", held)
    put(disk, "x:3", big)
    put(disk, "x:4", big, held)
    put(disk, "y", b"other")

    async def listed(port):
        return await port.offload(list, disk.entries("x:"))

    *small, e1, e2, e3, e4 = run(listed)
    assert [e.name for e in small] == [name for name, _, _ in pages]
    entries = [e1, e2, e3, e4]
    assert [(e.name, e.record) for e in entries] == [
        ("x:1", b"one"),
        ("x:2", b"two"),
        ("x:3", big),
        ("x:4", big),
    ]
    assert [e.size for e in entries] == [3, 3 + held.size, len(big), len(big) + held.size]
    assert all(abs(e.stored_at - time.time()) < 60 for e in entries)
    names = [*(name for name, _, _ in pages), "x:1", "x:2", "x:3", "x:4"]
    assert run(lambda port: disk.names(port, "x:")) == names


def test_health_tells_sizes_in_bytes(disk, run):
    """`health` has what statistics show: up, entries, bytes, budget."""
    put(disk, "a", payload=payload(bytes(MIB)))
    facts = run(disk.health)
    assert facts["up"] is True
    assert facts["entries"] == 1
    assert MIB <= facts["bytes"] < MIB + 200_000
    assert facts["budget"] == 64 * MIB


def test_everything_is_the_owners_only(disk, directory):
    """Directories are 0700 and files 0600, whatever the umask."""
    for mask in (0, 0o777):
        old = os.umask(mask)
        try:
            put(
                disk,
                f"a{mask}",
                bytes(MAX_INDEX_RECORD_BYTES + 1),
                payload(bytes([mask % 251]) * 1000),
            )
        finally:
            os.umask(old)
    for path in directory.rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600), path


def test_another_users_directory_is_refused(tmp_path):
    """The cache directory of another user is refused before anything is written to it."""
    if os.geteuid() != 0:
        pytest.fail("only root can give a directory away; run this test as root")
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    os.chown(theirs, 12345, 12345)
    disk = Disk(theirs, MIB, Host(theirs))
    with (
        pytest.warns(cache_directory.DirectoryWarning, match="another user"),
        pytest.raises(TierError),
    ):
        put(disk, "a")
    assert list(theirs.iterdir()) == []


# --- budget --------------------------------------------------------------------------------------


def test_the_budget_is_held(directory, host):
    """After any stores, index and payloads together stay within the budget; the newest stay."""
    disk = Disk(directory, 8 * MIB, host)
    for number in range(60):
        put(disk, f"n{number}", os.urandom(random.choice([100, 100_000])), payload(os.urandom(MIB)))
        held = sum(p.stat().st_size for p in {_inode(p): p for p in _all(directory)}.values())
        assert held < 8 * MIB * 1.1 + 4 * MIB  # and the log of the index
        assert blocking(disk.health)["bytes"] <= 8 * MIB * 1.1
    assert get(disk, "n59").source is not None
    assert get(disk, "n0") is None
    assert shape(files(directory))["link"] == blocking(disk.health)["entries"]
    disk.close()


def _all(directory: Path) -> list[Path]:
    return [p for p in directory.rglob("*") if p.is_file()]


def _inode(path: Path) -> int:
    return path.stat().st_ino


def test_room_is_made_for_what_is_big(directory, host):
    """One big entry makes as many small ones go as it needs, before it is written."""
    disk = Disk(directory, 8 * MIB, host)
    for number in range(40):
        put(disk, f"n{number}", payload=payload(os.urandom(150_000)))
    put(disk, "big", payload=payload(os.urandom(5 * MIB)))
    assert asyncio.run(memo.drain(30)), "what evicts in the background opens the index again"
    assert blocking(disk.health)["bytes"] <= 8 * MIB
    assert get(disk, "n39")
    disk.close()


def test_background_work_opens_no_closed_tier(directory, host, ahead):
    """Background work that a closed tier began earlier does not open its index again."""
    released = threading.Event()

    async def wait(port: Any) -> None:
        assert released.wait(30)

    disk = Disk(directory, MIB, host)
    put(disk, "first")
    ahead.advance(disk_module.SWEEP_SECONDS + 1)
    for _ in range(POOL_THREADS):  # the sweep that the next store begins waits behind these
        BLOCKING.spawn(wait, "wait")
    put(disk, "second")
    disk.close()
    released.set()
    assert drain_blocking(30)
    assert not disk.index_file.is_open


def test_what_has_expired_goes_first(directory, host, ahead):
    """When space is needed, expired entries go before old ones."""
    disk = Disk(directory, 5 * MIB, host)
    put(disk, "old", payload=payload(os.urandom(MIB)))
    for number in range(3):
        put(disk, f"brief{number}", payload=payload(os.urandom(MIB)), lifetime=0.001)
    ahead.advance(0.01)
    put(disk, "new", payload=payload(os.urandom(2 * MIB)))
    assert get(disk, "old")
    assert get(disk, "new")
    disk.close()


@pytest.mark.parametrize(("size", "most"), [(100, 1), (MAX_INDEX_RECORD_BYTES + 1, 600)])
def test_small_records_share_a_transaction(disk, size, most):
    """Many small records that are kept at once take one transaction; those in files, their own."""
    put(disk, "first")
    records = [(f"n{at}", bytes(size), None) for at in range(200)]
    statements = []
    disk.index_file.writer.set_trace_callback(statements.append)
    blocking(lambda port: disk.store_many(port, records))
    disk.index_file.writer.set_trace_callback(None)
    taken = [one for one in statements if one.startswith("BEGIN")]
    assert most // 3 <= len(taken) <= most
    assert all(get(disk, name).record == record for name, record, _ in records)


def test_many_records_keep_the_budget(disk, directory, host):
    """Records that are kept at once evict what is worth least, as single ones do."""
    disk.size_limit = 8 * MIB
    for turn in range(80):
        made = [(f"n{100 * turn + at}", bytes(1000), None) for at in range(100)]
        blocking(lambda port, made=made: disk.store_many(port, made))
    assert blocking(disk.health)["bytes"] <= 8 * MIB * 1.1
    assert get(disk, "n7999")
    assert not get(disk, "n0")


def test_what_never_fits_is_a_tier_error(directory, host):
    """An entry larger than the budget is refused, and evicts no other."""
    disk = Disk(directory, 2 * MIB, host)
    put(disk, "a")
    for record, held in ((bytes(3 * MIB), None), (b"", payload(bytes(3 * MIB)))):
        with pytest.raises(TierError, match="do not fit"):
            put(disk, "b", record, held)
    assert get(disk, "a")
    assert files(directory) == []
    disk.close()


# --- damage to the files --------------------------------------------------------------------------


def test_a_missing_or_short_payload_is_a_tier_error(disk):
    """A payload that is gone, short, long, a link or a directory is never mapped."""
    held = payload(os.urandom(MIB))
    put(disk, "a", payload=held)
    path = Path(get(disk, "a").source.path)
    for size in (MIB - 1, 0, MIB + 1):
        os.truncate(path, size)
        with pytest.raises(TierError):
            get(disk, "a").source.open(held.size)
    path.unlink()
    with pytest.raises(TierError):
        get(disk, "a").source.open(held.size)
    path.symlink_to("/dev/zero")
    with pytest.raises(TierError):
        get(disk, "a").source.open(held.size)
    path.unlink()
    path.mkdir()
    with pytest.raises(TierError):
        get(disk, "a").source.open(held.size)
    path.rmdir()


def test_a_missing_record_file_is_a_miss(disk):
    """A record in a file that is gone is a miss; the next store repairs it."""
    put(disk, "a", bytes(MAX_INDEX_RECORD_BYTES + 1))
    for path in (disk.directory / "payloads").rglob("*.rec"):
        path.unlink()
    assert get(disk, "a") is None
    put(disk, "a", bytes(MAX_INDEX_RECORD_BYTES + 1))
    assert get(disk, "a")


@pytest.mark.parametrize("harm", ["flip", "truncate"])
def test_a_damaged_payload_is_replaced_by_the_next_store(disk, harm):
    """A payload that is not what its name says is not shared, but written anew."""
    data = os.urandom(MIB)
    held = payload(data)
    put(disk, "a", payload=held)
    with open(get(disk, "a").source.path, "r+b") as file:
        file.write(bytes([data[0] ^ 1])) if harm == "flip" else file.truncate(1000)
    put(disk, "b", payload=held)
    assert bytes(get(disk, "b").source.open(held.size)) == data
    put(disk, "a", payload=held)
    assert bytes(get(disk, "a").source.open(held.size)) == data
    assert shape(files(disk.directory)) == {"canonical": 1, "link": 2, "record": 0, "temporary": 0}


@pytest.mark.parametrize(
    "damage", ["garbage", "head", "empty", "half", "tables", "settings", "gone"]
)
@pytest.mark.parametrize("running", [True, False])
def test_a_damaged_index_is_set_aside(disk, directory, damage, running):
    """After any damage to the index, lookups give the right record or none, and it comes back."""
    held = payload(os.urandom(100_000))
    for number in range(200):
        put(disk, f"n{number}", f"record {number}".encode() * 10, held if number == 7 else None)
    if not running:
        disk.close()
    damage_file(directory / "entries" / "cache.db", damage, "Cache")
    for number in range(200):
        try:
            found = get(disk, f"n{number}")
        except TierError:
            continue
        assert found is None or found.record == f"record {number}".encode() * 10
    for attempt in range(3):
        try:
            put(disk, "new", b"new", held)
            break
        except TierError:
            assert attempt < 2
    assert get(disk, "new").record == b"new"
    assert get(disk, "new").source.open(held.size)
    blocking(lambda port: disk.clear(port, ""))
    assert files(directory) == []
    put(disk, "new", b"newer")
    assert get(disk, "new") == Found(b"newer")
    assert blocking(disk.health)["entries"] == 1


def test_what_a_lost_index_named_is_swept(disk, directory):
    """Payloads of an index that was set aside are removed by the sweep that follows."""
    put(disk, "a", payload=payload(os.urandom(100_000)))
    disk.close()
    damage_file(directory / "entries" / "cache.db", "garbage", "Cache")
    put(disk, "b")
    blocking(lambda port: disk.sweep(port))
    assert files(directory) == []


def test_a_directory_removed_while_running_is_made_anew(disk, directory):
    """After `rm -rf` the next lookup is a miss and the next store is found, by others too."""
    held = payload(os.urandom(100_000))
    put(disk, "a", payload=held)
    get(disk, "a")
    run_process("import shutil, sys; shutil.rmtree(sys.argv[1])", directory)
    assert get(disk, "b") is None
    put(disk, "a", b"again", held)
    assert get(disk, "a").record == b"again"
    assert run_process(IN_A_PROCESS + "print(get('a').record)", directory) == "b'again'"


def test_two_disks_of_one_process_agree_after_the_index_was_replaced(disk, directory, host):
    """When one process has set the index aside, others notice with their next store."""
    other = Disk(directory, 64 * MIB, host)
    put(other, "a")
    put(disk, "b")
    disk.index_file.set_aside()
    put(disk, "c")
    put(other, "d")
    assert get(disk, "d")
    assert get(other, "c")
    other.close()


def test_a_directory_that_cannot_be_used_is_a_tier_error(tmp_path, run):
    """A file where the directory should be: `TierError` from every method, and nothing else."""
    path = tmp_path / "file"
    path.write_text("x")
    disk = Disk(path / "cache", MIB, Host(path / "cache"))
    for use in (
        lambda port: disk.lookup(port, "a"),
        lambda port: disk.store(port, "a", b"", None, None),
        lambda port: disk.store(port, "a", b"", payload(bytes(1000)), None),
        lambda port: disk.drop(port, "a"),
        lambda port: disk.clear(port, ""),
        disk.names,
    ):
        with warnings.catch_warnings(), pytest.raises(TierError):
            warnings.simplefilter("ignore", cache_directory.DirectoryWarning)
            run(use)
    facts = run(disk.health)
    assert not facts["up"]
    assert facts["directory"] == str(path / "cache")
    assert "MEMO_DIRECTORY" in facts["fix"]
    assert run(lambda port: disk.payload(port, bytes(32), 0)) is None
    disk.close()


def test_a_foreign_lock_costs_a_quarter_of_a_second(disk, directory):
    """A locked index is a `TierError` after 0.25 s at most; lookups go on; nothing is left."""
    put(disk, "a")
    other = sqlite3.connect(directory / "entries" / "cache.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    begun = time.monotonic()
    with pytest.raises(TierError):
        put(disk, "b", payload=payload(os.urandom(1000)))
    assert time.monotonic() - begun < 0.25 + 1.0  # a busy machine
    assert files(directory) == []
    assert get(disk, "a")
    other.execute("ROLLBACK")
    other.close()
    put(disk, "b")
    assert get(disk, "b")


def test_an_index_that_somebody_has_locked_is_opened_and_read(disk, directory, host):
    """A foreign lock stops no process from opening the index and looking up; a store fails soon."""
    put(disk, "a")
    other = sqlite3.connect(directory / "entries" / "cache.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    late = Disk(directory, MIB, host)
    assert get(late, "a")
    begun = time.monotonic()
    with pytest.raises(TierError):
        put(late, "b")
    assert time.monotonic() - begun < 2  # 0.25 s on a quiet machine, not diskcache's minute
    other.close()
    put(late, "b")
    assert get(late, "b")
    late.close()


def test_a_kill_while_the_index_is_made_leaves_none_or_a_whole_one(directory):
    """Workers killed while they make the index leave one that others can use."""
    for number in range(10):
        where = directory / str(number)
        with start(IN_A_PROCESS + "print('ready', flush=True)\nput('a')\n", where) as process:
            assert process.stdout.readline() == "ready\n"
            time.sleep(0.003 * number)
            process.kill()
        host = Host(where)
        disk = Disk(where, MIB, host)
        put(disk, "b")
        assert get(disk, "b")
        assert not list(where.rglob("*.damaged"))
        disk.close()
        host.close()


async def test_a_foreign_lock_does_not_hold_up_the_loop(disk, directory):
    """While a store waits for a lock the event loop runs on, and so do lookups (I6)."""
    port = native()
    await disk.store(port, "a", b"record", None, None)
    other = sqlite3.connect(directory / "entries" / "cache.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with waiting_for_locks(STUCK):
        storing = asyncio.create_task(disk.store(port, "b", b"record", None, None))
    for _ in range(10):
        await asyncio.sleep(0.01)
        assert await disk.lookup(port, "a")
    assert not storing.done()
    other.close()
    await storing
    assert await disk.lookup(port, "b")


@pytest.mark.parametrize(
    ("limit", "value"), [("RLIMIT_FSIZE", "40_000"), ("RLIMIT_NOFILE", "next_descriptor")]
)
def test_a_full_disk_or_table_of_files_is_a_tier_error(directory, limit, value):
    """When no more can be written or opened: a `TierError`, nothing left over, and it goes on."""
    code = IN_A_PROCESS + (
        "import resource, signal\n"
        "from memo.errors import TierError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "put('a', payload=payload(bytes(1000))); get('a')\n"
        "next_descriptor = os.open('/dev/null', os.O_RDONLY); os.close(next_descriptor)\n"
        f"soft, hard = resource.getrlimit(resource.{limit})\n"
        f"resource.setrlimit(resource.{limit}, ({value}, hard))\n"
        "for record, held in ((b'x', payload(bytes(300_000))), (bytes(300_000), None)):\n"
        "    try: put('b', record, held)\n"
        "    except TierError: print('refused')\n"
        "    assert get('a').record == b'record'\n"
        f"resource.setrlimit(resource.{limit}, (soft, hard))\n"
        "assert get('b') is None\n"
        "put('b', payload=payload(bytes(300_000)))\n"
        "assert get('b').source.open(300_032)\n"
        "disk.close(); host.close()\n"
    )
    assert run_process(code, directory).split() == ["refused", "refused"]
    assert shape(files(directory)) == {"canonical": 2, "link": 2, "record": 0, "temporary": 0}


# --- trust ---------------------------------------------------------------------------------------


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_planted_pickle_is_never_loaded(disk, directory, tmp_path):
    """Rows in diskcache's pickle modes, as key or as value, are not seen (CVE-2025-69872)."""
    put(disk, "a")
    trap = tmp_path / "sprung"
    bomb = pickle.dumps(Bomb(trap))
    with sqlite3.connect(directory / "entries" / "cache.db") as connection:
        connection.execute("UPDATE Cache SET mode = 4, value = ? WHERE key = 'a'", (bomb,))
        connection.execute(
            "INSERT INTO Cache (key, raw, mode, value) VALUES (?, 0, 4, ?)", (bomb, bomb)
        )
        (directory / "entries" / "x.val").write_bytes(bomb)
        connection.execute(
            "INSERT INTO Cache (key, raw, mode, filename) VALUES ('f', 1, 4, 'x.val')"
        )
    connection.close()
    assert get(disk, "a") is None
    assert get(disk, "f") is None
    assert blocking(lambda port: disk.names(port)) == ["a", "f"]

    assert list(disk.entries()) == []
    put(disk, "a", b"mended")
    assert get(disk, "a").record == b"mended"
    index = disk.index
    for action in (
        lambda: index.get("f"),
        lambda: list(index),
        lambda: index.set("x", object()),
        lambda: index.set(("x",), b""),
        lambda: index.peekitem(),
    ):
        with pytest.raises(TierError):
            action()
    blocking(lambda port: disk.clear(port, ""))
    assert not trap.exists()


@pytest.mark.parametrize(
    "row",
    [
        ("close", 1),
        ("_disk", "x"),
        ("sqlite_evil", "x"),
        ("eviction_policy", 7),
        ("size_limit", "much"),
    ],
)
def test_planted_settings_are_refused(disk, directory, row):
    """Settings that are not diskcache's, or of another type, make the index one to set aside."""
    put(disk, "a")
    disk.close()
    with sqlite3.connect(directory / "entries" / "cache.db") as connection:
        connection.execute("INSERT OR REPLACE INTO Settings VALUES (?, ?)", row)
    connection.close()
    assert get(disk, "a") is None
    put(disk, "a", b"new")
    assert get(disk, "a").record == b"new"
    assert (directory / "entries" / "cache.db.damaged").exists()


@pytest.mark.parametrize(
    "name", ["../../precious", "/{0}", "a/../../../precious", "ab/" + "0" * 64]
)
def test_a_planted_file_name_leads_nowhere(disk, directory, tmp_path, name):
    """A file name in the index that we would not write is neither opened nor removed."""
    precious = tmp_path / "precious"
    precious.write_bytes(bytes(64))
    (directory / "payloads" / "a").mkdir(parents=True)
    put(disk, "a")
    name = name.format(precious)
    with sqlite3.connect(directory / "entries" / "cache.db") as connection:
        connection.execute("UPDATE Cache SET filename = ?", (name,))
    connection.close()
    assert get(disk, "a").source is None
    put(disk, "a")
    blocking(lambda port: disk.clear(port, ""))
    assert precious.exists()


@pytest.mark.parametrize("value", ["text", 7, 1.5, None])
def test_a_row_of_the_wrong_type_is_never_returned(disk, directory, value):
    """A value that is no bytes, or an expiry that is no number, is a `TierError` or a miss."""
    put(disk, "a")
    put(disk, "b", lifetime=100)
    with sqlite3.connect(directory / "entries" / "cache.db") as connection:
        connection.execute("UPDATE Cache SET value = ? WHERE key = 'a'", (value,))
        connection.execute("UPDATE Cache SET expire_time = 'never' WHERE key = 'b'")
    connection.close()
    if value is None:
        with pytest.raises(TierError):
            get(disk, "a")
    else:
        with pytest.raises(TierError):
            get(disk, "a")
    with pytest.raises(TierError):
        get(disk, "b")
    put(disk, "a", b"mended")
    assert get(disk, "a").record == b"mended"


# --- many at once --------------------------------------------------------------------------------


def test_threads_may_store_and_look_up_at_once(disk):
    """Threads that store, replace, look up and drop find whole entries or none."""
    failures: list[BaseException] = []
    payloads = {n: payload(bytes([n]) * 80_000) for n in range(4)}

    def work(seed):
        chance = random.Random(seed)
        try:
            for _ in range(60):
                name = f"n{chance.randrange(5)}"
                number = chance.randrange(4)
                if chance.random() < 0.5:
                    put(
                        disk,
                        name,
                        bytes([number]) * chance.choice([10, MAX_INDEX_RECORD_BYTES + 1]),
                        payloads[number],
                    )
                elif chance.random() < 0.1:
                    blocking(lambda port, name=name: disk.drop(port, name))
                else:
                    _check_whole(get(disk, name), payloads[0].size)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    blocking(lambda port: disk.clear(port, ""))
    assert files(disk.directory) == []


def _check_whole(found: Found | None, size: int) -> None:
    """Record and payload of an entry are of the same store."""
    if found is None:
        return
    assert len(set(found.record)) == 1
    if found.source is None:
        return
    try:
        view = found.source.open(size)
    except TierError:  # replaced meanwhile
        return
    assert set(bytes(view)) == {found.record[0]}


def test_processes_may_open_and_store_at_once(directory):
    """Processes that make the directory at the same moment all store, and see each other's."""
    code = IN_A_PROCESS + (
        "print('ready', flush=True)\nsys.stdin.readline()\n"
        "for n in range(20): put(f'{sys.argv[2]}:{n}', payload=payload(bytes([n]) * 1000))\n"
        "disk.close(); host.close()\n"
    )
    processes = [start(code, directory, number) for number in range(4)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        process.communicate()
        assert process.returncode == 0
    host = Host(directory)
    disk = Disk(directory, 64 * MIB, host)
    assert len(blocking(lambda port: disk.names(port))) == 80
    assert shape(files(directory)) == {"canonical": 20, "link": 80, "record": 0, "temporary": 0}
    for number in range(4):
        blocking(lambda port, number=number: disk.clear(port, f"{number}:"))
    assert files(directory) == []
    disk.close()
    host.close()


def test_a_kill_in_the_middle_of_stores_leaves_old_or_new(directory):
    """Workers killed in mid-store leave whole entries, and a sweep leaves nothing else."""
    code = IN_A_PROCESS + (
        "import random\n"
        "payloads = [payload(bytes([n]) * 300_000, bytes([n]) * 70_000) for n in range(5)]\n"
        "print('ready', flush=True)\n"
        "while True:\n"
        "    n = random.randrange(5)\n"
        "    record = bytes([n]) * random.choice([10, 50_000])\n"
        "    put(f'n{random.randrange(3)}', record, payloads[n])\n"
    )
    size = payload(bytes(300_000), bytes(70_000)).size
    host = Host(directory)
    disk = Disk(directory, 64 * MIB, host)
    leftovers = 0
    for number in range(12):
        with start(code, directory) as process:
            assert process.stdout.readline() == "ready\n"
            time.sleep(0.01 + 0.003 * number)
            process.send_signal(signal.SIGKILL)
        for name in ("n0", "n1", "n2"):
            found = get(disk, name)
            if found is not None:
                assert len(set(found.record)) == 1
                view = found.source.open(size)
                assert set(bytes(view)) <= {found.record[0], 0}
        leftovers += blocking(lambda port: disk.sweep(port))
        kinds = shape(files(directory))
        assert kinds["temporary"] == 0
        assert kinds["link"] == len(blocking(lambda port: disk.names(port)))
        for name in ("n0", "n1", "n2"):
            if found := get(disk, name):
                assert found.source.open(size)
    put(disk, "works", b"still")
    assert get(disk, "works")
    blocking(lambda port: disk.clear(port, ""))
    assert files(directory) == []
    disk.close()
    host.close()


def test_a_sweep_leaves_alone_what_a_living_writer_has(disk, directory):
    """A file that a writer has not yet put into the index survives a sweep; a dead writer's not."""
    held = payload(os.urandom(100_000))
    with disk.payloads.write(held, bytes(MAX_INDEX_RECORD_BYTES + 1)) as name:
        assert blocking(lambda port: disk.sweep(port)) == 0
        assert disk.payloads.source(name).open(held.size)
        before = files(directory)
    assert files(directory) == before
    assert blocking(lambda port: disk.sweep(port)) == 3
    assert files(directory) == []


def test_a_sweep_is_due_once_an_hour_per_host(disk, directory, host):
    """The first process to store after an hour sweeps, and no other does for another hour."""
    put(disk, "a")
    orphan = directory / "payloads" / "ab"
    orphan.mkdir(parents=True)
    (orphan / ("0" * 32 + ".tmp")).write_bytes(b"x")
    old = time.time() - 2 * disk_module.SWEEP_SECONDS
    os.utime(directory / "entries" / "swept", (old, old))
    disk.last_sweep_at = -disk_module.SWEEP_SECONDS
    put(disk, "b")
    until(lambda: not files(directory))
    other = Disk(directory, MIB, host)
    assert not other.is_sweep_due()
    other.close()


def test_a_fork_shares_nothing_but_the_files(directory):
    """After a fork both processes store and look up, and see each other's entries."""
    code = IN_A_PROCESS + (
        "put('a', payload=payload(bytes(1000)))\n"
        "view = get('a').source.open(1024)\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    try:\n"
        "        assert get('a').source.open(1024)\n"
        "        view[0] = 7\n"
        "        put('b', b'child')\n"
        "        disk.close()\n"
        "        os._exit(0)\n"
        "    except BaseException as error:\n"
        "        print(repr(error), flush=True)\n"
        "        os._exit(1)\n"
        "put('c')\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
        "assert view[0] == 0\n"
        "print(get('b').record, get('c').record)\n"
        "disk.close(); host.close()\n"
    )
    assert run_process(code, directory) == "b'child' b'record'"


def test_a_look_up_costs_less_than_a_hit_of_diskcache(disk, tmp_path):
    """A lookup of a small record takes at most 0.8 of `diskcache.Cache.memoize`'s hit."""
    diskcache = pytest.importorskip("diskcache")
    name = "memo:{f:module:function}:0123456789abcdef:" + "0" * 40
    put(disk, name, os.urandom(700))
    peer = diskcache.Cache(str(tmp_path / "peer"))

    @peer.memoize()
    def load(number, text):
        return {"a": 1, "b": 2.0, "c": "x", "d": None, "e": [number, text]}

    load(1, "x")

    def best(function):
        times = []
        for _ in range(30):
            begun = time.perf_counter()
            for _ in range(100):
                function()
            times.append((time.perf_counter() - begun) / 100)
        return min(times)

    ours = best(lambda: get(disk, name))
    theirs = best(lambda: load(1, "x"))
    peer.close()
    assert ours <= 0.8 * theirs


@pytest.mark.parametrize("file", ["entries", "generations"])
def test_statements_in_files_are_whole_and_used(file: str) -> None:
    """Each statement of an SQL file is one complete statement, and the modules beside it use it."""
    found = sqlite_file.statements(file)
    code = "\n".join(path.read_text() for path in Path(sqlite_file.__file__).parent.glob("*.py"))
    assert found
    for name, text in found.items():
        assert sqlite3.complete_statement(text), name
        assert text.count(";") == 1, name
        assert f'"{name}"' in code, name
