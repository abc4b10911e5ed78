"""`compress`: big results as one compressed stream under the seal, inflated only behind it."""

from __future__ import annotations

import asyncio
import json
import os
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
from checkout import ROOT
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from inside import joined
from observed import calls_of
from pandas.testing import assert_frame_equal
from redis_server import RedisServer

import memo
from memo import OptionError, SettingError, cache
from memo.cli.commands import main
from memo.errors import EntryError
from memo.records import codec, seal, zstd_frames
from memo.runtime import events
from memo.runtime.blocking import drain_blocking
from memo.runtime.reasons import UNREADABLE
from memo.settings import configuration
from memo.settings.configuration import current
from memo.testing import recording, reset

N = 50_000
VALUES: dict[str, Any] = {
    "array": np.arange(N),
    "frame": pd.DataFrame({"a": np.arange(N), "b": np.arange(N) / 8, "c": ["text"] * N}),
    "text": "words " * N,
    "bytes": bytes(N * 2),
    "bytearray": bytearray(N * 2),
    "list": [list(range(100))] * 500 + list(range(30_000)),
    "several": {"x": np.zeros(N), "y": [np.arange(N, dtype="i2"), np.ones((2, N))]},
    "dates": pd.Series(pd.date_range("2020", periods=N, freq="s")),
}


def same(one: Any, other: Any) -> bool:
    return repr(codec.encode(one).stream) == repr(codec.encode(other).stream)


@pytest.fixture(autouse=True)
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hits come from the disk."""
    monkeypatch.setenv("MEMO_MEMORY_LIMIT", "0")


# --- the codec -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VALUES)
def test_there_and_back(name: str) -> None:
    """Every kind of value comes back from its compressed form as it was, and is writable."""
    value = VALUES[name]
    encoded = codec.encode(value, 1000)
    assert encoded.flags == seal.COMPRESSED
    assert encoded.payload is None
    assert encoded.codec.endswith(" zstd")
    plain = codec.encode(value)
    whole = len(plain.stream) + (plain.payload.size if plain.payload else 0)
    assert len(encoded.stream) < 0.9 * whole
    back = codec.decode(encoded.stream, None, (), encoded.flags)
    assert type(back) is type(value)
    if isinstance(value, pd.DataFrame):
        assert_frame_equal(back, value)
        back.iloc[0, 0] = 7
    elif isinstance(value, np.ndarray):
        assert np.array_equal(back, value)
        back[0] = 7
    else:
        assert same(back, value)


@pytest.mark.parametrize("size", [80_000, 4_000_000])
def test_what_does_not_get_smaller_stays_as_it_is(size: int) -> None:
    """Random bytes are stored as if `compress` were off, so that they can be mapped."""
    value = np.frombuffer(os.urandom(size), dtype="i8").copy()
    encoded = codec.encode(value, 1000)
    assert encoded.flags == 0
    assert encoded.payload is not None


def test_below_the_size_nothing_is_compressed() -> None:
    """The size counts the pickle stream and the buffers together."""
    value = np.zeros(N)
    assert codec.encode(value, N * 8 - 1).flags == seal.COMPRESSED
    assert codec.encode(value, N * 8 + 1000).flags == 0
    assert codec.encode(value).flags == 0


@given(st.lists(st.binary(max_size=300), max_size=4), st.binary(max_size=300))
def test_any_lengths(views: list[bytes], stream: bytes) -> None:
    """Streams and buffers of any length, empty ones too, come back where they belong."""
    views = [view * 40 for view in views]
    packed = zstd_frames.compress(stream * 40 + bytes(4000), [memoryview(view) for view in views])
    if packed is None:
        return
    back, payload, table = zstd_frames.decompress(packed)
    assert bytes(back) == stream * 40 + bytes(4000)
    assert [bytes(view) for view in codec.buffers_of(payload, table)] == views
    assert zstd_frames.decompressed_size(packed) == len(back) + -len(back) % 64 + len(payload)


def compressed(size: int = N * 8) -> bytes:
    packed = zstd_frames.compress(bytes(size), [])
    assert packed is not None
    return packed


def frame_of(data: bytes, *, pledged: bool = True) -> bytes:
    machine = zstd_frames.zstd_module().ZstdCompressor(level=3)
    if pledged:
        machine.set_pledged_input_size(len(data))
    return bytes(machine.compress(data) + machine.flush())


def claiming(length: int, frame: bytes) -> bytes:
    return struct.pack(">QI", length, 0) + frame


BOMB = bytes(64 << 20)


@pytest.mark.parametrize(
    "stream",
    [
        b"",
        b"\0" * 11,
        struct.pack(">QI", 64, 5),
        struct.pack(">QI", 64, 2**32 - 1),
        claiming(64, b""),
        claiming(64, b"not a frame at all"),
        claiming(64, frame_of(BOMB)),
        claiming(64, frame_of(bytes(64), pledged=False)),
        claiming(0, frame_of(b"")),
        claiming(2**62, frame_of(bytes(64))),
        claiming(128, frame_of(bytes(64))),
        claiming(64, frame_of(bytes(64)) + b"x"),
        claiming(64, frame_of(bytes(64)) + frame_of(bytes(64))),
        claiming(64, frame_of(bytes(64))[:-1]),
        compressed()[:-1],
        compressed()[:40],
    ],
)
def test_a_frame_that_is_not_what_its_lengths_say_is_refused(stream: bytes) -> None:
    """A zip bomb, half a frame, and one too many: none of them is inflated past the lengths."""
    with pytest.raises(EntryError) as caught:
        zstd_frames.decompress(stream)
    assert caught.value.reason == UNREADABLE


def test_a_frame_that_lies_about_its_length_stops_at_it() -> None:
    """A frame whose header announces less than it has is inflated up to that, and refused."""
    small, big = frame_of(bytes(1 << 20)), frame_of(bytes(2 << 20))
    # Magic, descriptor, and the length in four bytes: the body of the longer one behind it.
    assert small[:5] == big[:5]
    stream = claiming(1 << 20, small[:9] + big[9:])
    with pytest.raises(EntryError):
        zstd_frames.decompress(stream)


def test_what_announces_another_length_is_not_even_begun() -> None:
    """The header of a zip bomb is enough: nothing is allocated for it, nothing inflated."""
    with (
        calls_of(zstd_frames.decompress_into) as begun,
        pytest.raises(EntryError, match="67108864 bytes instead of 64"),
    ):
        zstd_frames.decompress(claiming(64, frame_of(BOMB)))
    assert begun == []


def test_no_more_memory_than_the_lengths_say() -> None:
    """A bomb of a gigabyte behind a small length takes nothing near that."""
    program = """
import resource, struct, sys
from memo.records import codec
from memo.records import seal
from memo.records import zstd_frames
machine = zstd_frames.zstd_module().ZstdCompressor(level=3)
machine.set_pledged_input_size(1 << 30)
frame = b"".join(machine.compress(bytes(1 << 20)) for _ in range(1 << 10)) + machine.flush()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    codec.decode(struct.pack(">QI", 1 << 20, 0) + frame, None, (), seal.COMPRESSED)
except Exception as error:
    print(type(error).__name__, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
    name, more = done.stdout.split()
    assert name == "EntryError"
    assert int(more) < 20_000 * (1024 if sys.platform == "darwin" else 1)


def test_flags_of_a_later_version_are_refused() -> None:
    """An entry with a flag that is not known here is unreadable, and so a miss."""
    with pytest.raises(EntryError, match="later version"):
        codec.decode(codec.encode(1).stream, None, (), 128)


# --- the chain ------------------------------------------------------------------------------------


def numbers_of(**options: Any) -> Any:
    @cache(ttl=600, name="numbers", version="1", **options)
    def numbers(n: int) -> Any:
        return np.arange(n)

    return numbers


def payload_files(home: Path) -> list[Path]:
    return [path for path in home.rglob("payloads/*/*") if path.suffix != ".rec"]


@pytest.mark.parametrize("memory", ["0", "256MiB"])
def test_a_compressed_result_is_a_hit(cache_home: Path, memory: str) -> None:
    """From the disk and from memory alike, each caller has a value of its own."""
    numbers = numbers_of(compress=True)
    with memo.configure(memory_limit=memory):
        numbers(N)
        assert not payload_files(cache_home)
        with calls_of(codec.decode, note=lambda given: given["flags"]) as loaded:
            for _ in range(3):
                hit = numbers(N)
                assert hit[-1] == N - 1
                hit[:] = -1
        assert numbers.cache_info().misses == 1
    assert loaded == [seal.COMPRESSED] * 3, "a compressed stream is never unpickled as it is"


class Thread(NamedTuple):
    """Says in which thread it was loaded."""

    name: str

    def __reduce__(self) -> Any:
        return in_this_thread, ()


def in_this_thread() -> Thread:
    return Thread(threading.current_thread().name)


async def test_joiners_and_hits_of_an_async_function() -> None:
    """A caller that joins a computation gets a copy, and hits are inflated in a thread."""

    @cache(ttl=600, name="numbers", version="1", compress=True)
    async def numbers(n: int) -> Any:
        await joined(1)
        return np.arange(n), Thread("of the function")

    with memo.configure(memory_limit="64MiB"):
        made = await asyncio.gather(numbers(N), numbers(N))
        (one, _), (two, _) = made
        one[0] = two[1] = 5
        three, loaded = await numbers(N)
    assert list(three[:3]) == [0, 1, 2]
    assert loaded == Thread("memo-offload")
    assert sorted(thread.name for _, thread in made) == ["memo-offload", "of the function"]


def test_older_and_newer_entries_are_read(cache_home: Path) -> None:
    """An entry stored without `compress` is read with it, and the other way round."""
    for before, after in ((False, True), (True, False)):
        first, second = numbers_of(compress=before), numbers_of(compress=after)
        first(N)
        assert second.peek(N)[-1] == N - 1
        first.cache_clear()


def test_the_setting_is_for_functions_that_say_nothing(cache_home: Path) -> None:
    """`compress` of the settings acts where the decorator has none, at the next store."""
    silent, off = numbers_of(), numbers_of(compress=False)
    for value, sizes in (("true", (N,)), ("100KiB", (N,)), ("1GiB", ()), (False, ())):
        with memo.configure(compress=value):
            for n in (N, 9_000):
                silent.refresh(n)
                assert ("zstd" in str(silent.explain(n))) == (n in sizes or value == "true")
            off.refresh(N)
            assert "zstd" not in str(off.explain(N))
    assert configuration.current().compress is None


def test_explain_and_ls_show_it(cache_home: Path) -> None:
    """`explain` and `memo ls` show how a result is stored, and what that saved."""
    numbers = numbers_of(compress=True)
    numbers(N)
    assert "compressed with zstd: " in str(numbers.explain(N))
    assert "KiB for 390.8 KiB" in str(numbers.explain(N))
    assert " zstd" in CliRunner().invoke(main, ["ls"]).output
    facts = json.loads(CliRunner().invoke(main, ["ls", "--json"]).output)
    assert facts["compressed"] is True


def test_a_compressed_result_goes_to_other_hosts(
    redis_server: RedisServer, cache_home: Path, tmp_path: Path
) -> None:
    """Through Redis as one record, without a payload, in the background when it is big."""
    with memo.configure(redis_url=redis_server.url, deadline=10):
        numbers = numbers_of(compress=True)
        numbers(40 * N)
        drain_blocking(10)
        assert not redis_server.client().keys("memo:2:p:*")
        reset()
    with memo.configure(redis_url=redis_server.url, deadline=10, directory=str(tmp_path / "b")):
        assert numbers.peek(40 * N)[-1] == 40 * N - 1


def stored_record(home: Path) -> Path:
    (path,) = home.rglob("payloads/*/*.rec")
    return path


@pytest.mark.parametrize("at", [-1, -1000, 20, 0.5])
def test_what_the_seal_does_not_cover_is_never_inflated(cache_home: Path, at: float) -> None:
    """One flipped bit anywhere in a stored record: zstd does not see a byte of it (I10)."""

    @cache(ttl=600, name="text", version="1", compress=True)
    def text(n: int) -> str:
        return "".join(map(chr, np.random.default_rng(1).integers(97, 110, n)))

    text(400_000)
    path = stored_record(cache_home)
    data = bytearray(path.read_bytes())
    data[int(at if isinstance(at, int) else len(data) * at)] ^= 1
    path.write_bytes(data)
    reset()
    with calls_of(zstd_frames.decompress) as seen:
        assert text.peek(400_000) is None
    assert not seen


def test_a_sealed_record_that_does_not_inflate_is_a_miss(cache_home: Path) -> None:
    """Nonsense that is sealed with the right secret is a miss, not an error."""
    numbers = numbers_of(compress=True)
    numbers(N)
    path = stored_record(cache_home)
    header, stream = seal.parse(memoryview(path.read_bytes()))
    path.write_bytes(seal.pack(header, bytes(stream[:-5]), current().secrets[0]))
    reset()
    with recording() as seen:
        assert numbers(N)[-1] == N - 1
    assert [e.reason for e in seen if e.kind == events.MISS] == [UNREADABLE]
    assert numbers(N)[-1] == N - 1


def test_without_the_package_results_are_stored_as_they_are(
    cache_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If zstd cannot be imported nothing is lost, and a compressed entry is a miss."""
    numbers = numbers_of(compress=True)
    numbers(N)
    for package in ("backports", "compression"):
        monkeypatch.setitem(sys.modules, package, None)
    with recording() as seen:
        assert numbers(N)[-1] == N - 1
        assert numbers(N)[-1] == N - 1
    assert [event.kind for event in seen].count(events.COMPUTED) == 1
    assert "zstd" not in str(numbers.explain(N))


# --- cost -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["", "big", "-1MiB", "1 apple", 0, -5, 1.5, b"1MiB", ["1MiB"]])
def test_bad_values_are_errors_at_decoration(value: Any) -> None:
    """Neither True nor False nor a size: the error names option, value and fix."""
    with pytest.raises(OptionError, match=r"(?s)compress=.*must be True, False, or the size"):
        cache(compress=value)
    with pytest.raises(SettingError, match="compress"):
        memo.configure(compress=value)


@pytest.mark.parametrize(
    ("value", "size"),
    [("on", 64 << 10), ("off", None), ("1MiB", 1 << 20), (5_000, 5_000), ("no", None)],
)
def test_the_setting_takes_what_the_option_takes(value: Any, size: int | None) -> None:
    """True, False or a size, also as text of the environment."""
    with memo.configure(compress=value):
        assert configuration.current().compress == size


def test_zstd_is_imported_when_it_is_needed() -> None:
    """Neither memo nor a store without `compress` imports it."""
    program = """
import sys, memo
@memo.cache
def f(x):
    return "x" * 100_000
f(1), f(1)
print([name for name in sys.modules if "zstd" in name])
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
    assert done.stdout == "[]\n"
