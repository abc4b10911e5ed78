"""Mapping: a hit on a big value is a private map of its file, and the stored bytes never change."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from checkout import ROOT, SUPPORT
from observed import calls_of
from pandas.testing import assert_frame_equal
from time_ahead import Ahead

from memo import cache
from memo.engine import loading
from memo.records import codec
from memo.records.codec import Payload
from memo.settings.secret_keys import Secret
from memo.stores.disk import payload_files
from memo.stores.disk.payload_files import VOUCHER_FROM_BYTES, PayloadFile, Payloads
from memo.testing import reset

ROWS = 20_000
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(autouse=True)
def no_memory_tier(cache_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small payloads may lie in the memory tier: without it each hit is a map of the file."""
    monkeypatch.setenv("MEMO_MEMORY_LIMIT", "0")


def frame() -> pd.DataFrame:
    """One column of every kind that maps, and one that is rebuilt."""
    names = [f"name-{i % 777}" for i in range(ROWS)]
    return pd.DataFrame(
        {
            "int": np.arange(ROWS),
            "float": np.arange(ROWS) / 7,
            "bool": np.arange(ROWS) % 2 == 0,
            "date": pd.date_range("2020", periods=ROWS, freq="s"),
            "zone": pd.date_range("2020", periods=ROWS, freq="s", tz="UTC"),
            "delta": pd.to_timedelta(np.arange(ROWS), unit="s"),
            "category": pd.Categorical.from_codes(np.arange(ROWS) % 500, range(500)),
            "masked": pd.array(range(ROWS), dtype="Int64"),
            "arrow": pd.array(names, dtype="string[pyarrow]"),
            "object": pd.Series(names, dtype=object),
            "period": pd.period_range("2000", periods=ROWS, freq="h"),
        }
    )


def scribble(value: pd.DataFrame) -> None:
    """Write into every column, through pandas and into the very buffers."""
    for place, name in enumerate(value.columns):
        value.isetitem(place, value[name].iloc[::-1].to_numpy(copy=True))
    for block in value._mgr.blocks:
        array: Any = block.values  # noqa: PD011 - a block's own
        if isinstance(array, np.ndarray):
            array.fill(array.flat[-1])


def scribble_in_place(value: pd.DataFrame) -> None:
    """Write into each buffer that the map has, without pandas making copies."""
    for block in value._mgr.blocks:
        array: Any = block.values  # noqa: PD011 - a block's own
        for part in ("_ndarray", "_codes", "_data", "_mask"):
            inner = getattr(array, part, None)
            if isinstance(inner, np.ndarray):
                inner.view("u1").fill(1)
        if isinstance(array, np.ndarray) and array.dtype != object:
            array.view("u1").fill(1)


def stored_files(home: Path) -> dict[Path, bytes]:
    """Every payload file under the cache directory, with its bytes."""
    return {p: p.read_bytes() for p in home.rglob("payloads/*/*") if p.suffix != ".seal"}


@cache(ttl=None, name="test_mapping:make")
def make() -> pd.DataFrame:
    return frame()


@pytest.mark.parametrize("write", [scribble, scribble_in_place])
def test_writing_to_a_hit_changes_neither_the_file_nor_another_hit(
    cache_home: Path, write: Callable[[pd.DataFrame], None]
) -> None:
    """Every kind of column can be written after a hit, and no other caller sees it."""
    make()
    before = stored_files(cache_home)
    assert before
    hit, other = make(), make()
    write(hit)
    assert_frame_equal(other, frame())
    assert_frame_equal(make(), frame())
    assert stored_files(cache_home) == before
    assert make.cache_info().misses == 1


def test_what_the_caller_of_a_miss_writes_is_not_stored(cache_home: Path) -> None:
    """The first caller has the function's own result; writing to it does not change the entry."""
    scribble_in_place(make())
    assert_frame_equal(make(), frame())


ARRAYS: dict[str, Callable[[], Any]] = {
    "array": lambda: np.arange(ROWS),
    "dates": lambda: np.arange(ROWS).astype("M8[s]"),
    "transposed": lambda: np.arange(ROWS * 6).reshape(2, 3, -1).transpose(2, 0, 1),
    "slice": lambda: np.arange(2 * ROWS)[::2],
    "records": lambda: np.zeros(ROWS, dtype=[("a", "i8"), ("b", "M8[s]")]),
    "masked": lambda: np.ma.array(np.arange(ROWS), mask=np.arange(ROWS) % 2 == 0),
    "nested": lambda: {"a": [np.arange(ROWS), (np.ones(ROWS),)]},
}


@cache(ttl=None, name="test_mapping:array")
def array(name: str) -> Any:
    return ARRAYS[name]()


def arrays_in(value: Any) -> list[Any]:
    """The arrays in a value, however deep."""
    if isinstance(value, np.ndarray):
        return [value]
    inner = value.values() if isinstance(value, dict) else value
    return [one for each in inner for one in arrays_in(each)]


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_of_every_kind_are_private(cache_home: Path, name: str) -> None:
    """Every kind of array can be written after a hit, and no other caller sees it."""
    array(name)
    before = stored_files(cache_home)
    for one in arrays_in(array(name)):
        one[:] = one[-1]
    pairs = zip(arrays_in(array(name)), arrays_in(ARRAYS[name]()), strict=True)
    assert all(np.array_equal(back, made) for back, made in pairs)
    assert stored_files(cache_home) == before


@cache(ttl=None, name="test_mapping:tables")
def tables() -> tuple[pl.DataFrame, pa.Table]:
    data = {"n": list(range(ROWS)), "s": ["a text of some length"] * ROWS}
    return pl.DataFrame(data), pa.table(data)


def test_polars_and_arrow_are_private(cache_home: Path) -> None:
    """A polars frame can be written after a hit; an Arrow table's buffers are this process' own."""
    tables()
    before = stored_files(cache_home)
    first, table = tables()
    first[0, "n"] = -1
    second, again = tables()
    assert second["n"][0] == 0
    assert again == table
    assert stored_files(cache_home) == before


# --- other processes -----------------------------------------------------------------------------

CHILD = """
import sys, os, time, pathlib
sys.path[:0] = {paths!r}
import numpy as np, memo
from memo import cache

@cache(ttl=None, name="test_mapping:big", version="1")
def big(n):
    return np.arange(n)

"""


def start(program: str) -> subprocess.Popen[str]:
    """A process of its own with the same cache."""
    code = CHILD.format(paths=[str(ROOT), str(SUPPORT)]) + program
    return subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen[str], say: str = "") -> str:
    out, _ = process.communicate(say, timeout=60)
    assert process.returncode == 0
    return out.strip()


@cache(ttl=None, name="test_mapping:big", version="1")
def big(n: int) -> Any:
    return np.arange(n)


def test_two_processes_write_at_once(cache_home: Path) -> None:
    """Two processes that write all over the same value see their own writes and no others."""
    big(ROWS)
    before = stored_files(cache_home)
    writes = """
hit = big({n})
hit[:] = {mark}
print("ready", flush=True)
sys.stdin.readline()
assert (hit == {mark}).all() and (big({n}) == np.arange({n})).all()
print(big.cache_info().misses)
"""
    two = [start(writes.format(n=ROWS, mark=mark)) for mark in (-1, -2)]
    for process in two:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    assert [finish(process, "go\n") for process in two] == ["0", "0"]
    assert stored_files(cache_home) == before


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_fork_after_a_hit_shares_nothing_that_is_written(cache_home: Path) -> None:
    """Parent and child of a fork each have their own copy of a mapped value."""
    big(ROWS)
    hit = big(ROWS)
    child = os.fork()
    if not child:
        hit[:] = -1
        os._exit(0 if (big(ROWS) == np.arange(ROWS)).all() else 1)
    _, status = os.waitpid(child, 0)
    assert status == 0
    assert (hit == np.arange(ROWS)).all()


@LINUX
def test_hit_under_a_memory_limit(cache_home: Path) -> None:
    """A value is mapped and read without memory for a second copy of it."""
    n = 16 << 20  # 128 MiB
    big(n)
    program = f"""
import resource
big({ROWS})
used = int(open("/proc/self/statm").read().split()[0]) * {mmap.PAGESIZE}
resource.setrlimit(resource.RLIMIT_AS, (used + {n * 8 * 3 // 2}, -1))
hit = big({n})
assert hit[-1] == {n - 1}
hit[0] = 7
try:
    bytearray({n * 8})
except MemoryError:
    print("no room", big.cache_info().misses)
"""
    big(ROWS)
    assert finish(start(program)) == "no room 0"


@LINUX
def test_hit_takes_no_memory(cache_home: Path) -> None:
    """The peak of resident memory of a first hit does not grow with the value."""
    n = 16 << 20  # 128 MiB
    big(n), big(ROWS)
    program = f"""
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(l.split()[1]) for l in lines if l.startswith("VmHWM"))
big({ROWS})
before = peak()
hit = big({n})
assert big.cache_info().misses == 0
print(peak() - before)
"""
    assert int(finish(start(program))) < 5_000


@LINUX
def test_full_verification_takes_no_memory(cache_home: Path) -> None:
    """Without a voucher, hashing a payload holds on to a few megabytes at a time."""
    n = 16 << 20
    big(n), big(ROWS)
    for voucher in cache_home.rglob("*.seal"):
        voucher.unlink()
    program = f"""
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(l.split()[1]) for l in lines if l.startswith("VmHWM"))
big({ROWS})
before = peak()
hit = big({n})
assert big.cache_info().misses == 0
print(peak() - before)
"""
    assert int(finish(start(program))) < 30_000


@LINUX
@pytest.mark.parametrize("first", [f"big({ROWS})", "pass"], ids=["later", "first"])
def test_store_takes_no_memory(
    cache_home: Path, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    """Storing hashes and writes a value where it lies; the memory tier makes no copy either.

    Nor does the check of the first result of a type.
    """
    n = 16 << 20
    program = f"""
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(l.split()[1]) for l in lines if l.startswith("VmHWM"))
{first}
value = np.arange({n})
@cache(ttl=None, version="1")
def give():
    return value
before = peak()
give()
print(peak() - before)
"""
    monkeypatch.delenv("MEMO_MEMORY_LIMIT")
    assert int(finish(start(program))) < 30_000


# --- the file underneath -------------------------------------------------------------------------


def test_value_survives_the_removal_of_its_file(cache_home: Path) -> None:
    """A mapped value stays whole when its entry is evicted and its file is gone."""
    big(ROWS)
    hit = big(ROWS)
    big.cache_clear()
    for path in stored_files(cache_home):
        path.unlink(missing_ok=True)
    assert (hit == np.arange(ROWS)).all()
    hit[:] = 1
    assert (big(ROWS) == np.arange(ROWS)).all()


def test_value_survives_the_replacement_of_its_file(cache_home: Path) -> None:
    """A mapped value stays as it was when another file takes the place of its own."""
    big(ROWS)
    hit = big(ROWS)
    for path, data in stored_files(cache_home).items():
        other = path.with_suffix(".other")
        other.write_bytes(bytes(len(data)))
        other.rename(path)
    assert (hit == np.arange(ROWS)).all()
    assert (big(ROWS) == np.arange(ROWS)).all(), "and the replacement is not believed"


def test_truncated_file_is_a_miss(cache_home: Path) -> None:
    """A payload that is shorter than its record says is never mapped."""
    big(ROWS)
    for path in stored_files(cache_home):
        os.truncate(path, 4096)
    assert (big(ROWS) == np.arange(ROWS)).all()
    assert big.cache_info().misses == 2


# --- vouchers ------------------------------------------------------------------------------------

SECRET = Secret(b"s" * 32)
OTHER = Secret(b"t" * 32)
DATA = bytes(range(256)) * (VOUCHER_FROM_BYTES // 256 + 1)


@pytest.fixture
def payload() -> Payload:
    """A payload that is big enough for a voucher."""
    return codec.payload((memoryview(DATA),))


@pytest.fixture
def files(tmp_path: Path) -> Payloads:
    """A directory of payloads whose owner has a secret."""
    made = Payloads(tmp_path / "payloads")
    made.directory.mkdir()
    made.secrets = (SECRET,)
    return made


def keep(files: Payloads, payload: Payload) -> PayloadFile:
    with files.write(payload, None) as name:
        assert name is not None
    source = files.source(name)
    assert source is not None
    return source


def test_writer_vouches_for_what_it_wrote(files: Payloads, payload: Payload) -> None:
    """The next process need not hash a payload that was stored whole."""
    source = keep(files, payload)
    assert source.is_verified(payload.digest)
    found = files.find(payload.digest, payload.size)
    assert found is not None
    assert found.is_verified(payload.digest)


def test_voucher_is_for_one_digest_and_one_secret(files: Payloads, payload: Payload) -> None:
    """A voucher says nothing of another digest, nor to one with another secret."""
    source = keep(files, payload)
    assert not source.is_verified(bytes(32))
    assert not PayloadFile(source.path, (OTHER,)).is_verified(payload.digest)
    assert not PayloadFile(source.path, ()).is_verified(payload.digest)
    assert PayloadFile(source.path, (OTHER, SECRET)).is_verified(payload.digest)


def touch_time(path: str) -> None:
    os.utime(path)


def write_and_set_time_back(path: str) -> None:
    facts = os.stat(path)
    with open(path, "r+b") as file:
        file.write(b"x")
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def replace_with_equal_times(path: str) -> None:
    facts = os.stat(path)
    with open(f"{path}.new", "wb") as file:
        file.write(bytes(facts.st_size))
    os.utime(f"{path}.new", ns=(facts.st_atime_ns, facts.st_mtime_ns))
    os.rename(f"{path}.new", path)


@pytest.mark.parametrize("change", [touch_time, write_and_set_time_back, replace_with_equal_times])
def test_voucher_ends_with_the_file_it_was_for(
    files: Payloads, payload: Payload, change: Callable[[str], None]
) -> None:
    """After any change of a payload, also with its times set back, it is hashed again."""
    source = keep(files, payload)
    change(source.path)
    assert not PayloadFile(source.path, (SECRET,)).is_verified(payload.digest)


def test_voucher_ends_with_the_boot(files: Payloads, payload: Payload, ahead: Ahead) -> None:
    """Nothing is fsynced, so after a restart of the machine a payload is hashed once again."""
    source = keep(files, payload)
    ahead.boot(b"another boot id.")
    assert not source.is_verified(payload.digest)
    source.mark_verified(payload.digest)
    assert source.is_verified(payload.digest)


def test_no_voucher_where_the_boot_has_no_name(
    files: Payloads, payload: Payload, ahead: Ahead
) -> None:
    """If the system does not say when it started, no voucher counts."""
    ahead.boot(bytes(16))
    assert not keep(files, payload).is_verified(payload.digest)


def test_nobody_vouches_for_a_file_that_changed_just_now(
    files: Payloads, payload: Payload, ahead: Ahead
) -> None:
    """Within a tick of the file system's clock a change might not show, so no voucher counts."""
    source = keep(files, payload)
    Path(payload_files.voucher_path(source.path)).unlink()
    assert isinstance(source.identity, tuple)
    changed = source.identity[4]
    ahead.stop_wall(changed)
    source.mark_verified(payload.digest)
    assert not source.is_verified(payload.digest)
    ahead.stop_wall(changed + 12_000_001)  # files may be 12 ms behind the clock
    source.mark_verified(payload.digest)
    assert source.is_verified(payload.digest)


def test_change_right_after_storing_shows(files: Payloads, payload: Payload) -> None:
    """However soon after a store its file is changed in place, the voucher holds no more."""
    for _ in range(20):
        source = keep(files, payload)
        write_and_set_time_back(source.path)
        assert not PayloadFile(source.path, (SECRET,)).is_verified(payload.digest)


def test_forged_voucher_is_not_believed(files: Payloads, payload: Payload) -> None:
    """A voucher of any other bytes is as good as none."""
    source = keep(files, payload)
    path = Path(payload_files.voucher_path(source.path))
    good = path.read_bytes()
    for bad in (b"", good[:-1], good + b"x", OTHER.id + good[8:], bytes(len(good))):
        path.write_bytes(bad)
        assert not source.is_verified(payload.digest)


def test_voucher_goes_with_its_payload(files: Payloads, payload: Payload) -> None:
    """Neither removing nor sweeping leaves a voucher for nothing behind."""
    source = keep(files, payload)
    voucher = Path(payload_files.voucher_path(source.path))
    assert voucher.exists()
    assert files.sweep(lambda name: True) == 0
    files.remove(source.path.removeprefix(f"{files.directory}/"))
    assert not voucher.exists()
    voucher.write_bytes(b"left behind")
    assert files.sweep(lambda name: False) == 1
    assert not voucher.exists()


@pytest.fixture
def hashed() -> Iterator[list[int]]:
    """The payloads that are hashed in full, by their size."""
    loading.VERIFIED_PAYLOADS.clear()
    with calls_of(codec.has_valid_digests, note=lambda given: len(given["payload"])) as seen:
        yield seen
    loading.VERIFIED_PAYLOADS.clear()


def test_big_payload_is_not_hashed_by_the_next_process(cache_home: Path, hashed: list[int]) -> None:
    """The first hit of a process on what another stored costs nothing that grows with it."""
    n = VOUCHER_FROM_BYTES // 8
    big(n)
    reset()
    assert (big(n) == np.arange(n)).all()
    assert hashed == []


def test_payload_without_a_voucher_is_hashed_once(cache_home: Path, hashed: list[int]) -> None:
    """Without a voucher the first process to read hashes, and vouches for the next."""
    n = VOUCHER_FROM_BYTES // 8
    big(n)
    for voucher in cache_home.rglob("*.seal"):
        voucher.unlink()
    for _ in range(2):
        reset()
        loading.VERIFIED_PAYLOADS.clear()
        assert (big(n) == np.arange(n)).all()
    assert hashed == [n * 8]


def test_changed_payload_is_found_out_in_spite_of_its_voucher(
    cache_home: Path, hashed: list[int]
) -> None:
    """A byte changed in place, with the times set back, is found by the next process."""
    n = VOUCHER_FROM_BYTES // 8
    big(n)
    (path,) = {p.resolve() for p in stored_files(cache_home) if "." not in p.name}
    write_and_set_time_back(str(path))
    reset()
    assert (big(n) == np.arange(n)).all()
    assert big.cache_info().misses >= 1
    assert n * 8 in hashed
