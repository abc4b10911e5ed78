"""Progress: what runs for long is seen to run; fast calls and unwatched runs show nothing."""

from __future__ import annotations

import asyncio
import io
import os
import pty
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkout import ROOT
from kernels import Kernel
from redis_server import RedisServer
from sheets import Sheet
from time_ahead import Ahead
from waiting import until, wait_for

import memo
from memo import cache
from memo.engine.coordination.leases import Holder
from memo.jupyter.progress_view import SHOWN_AFTER, WATCHER, Line, Terminal, holder_name
from memo.runtime import events
from memo.runtime.blocking import drain_blocking
from memo.runtime.events import Event
from memo.stores.redis.redis_tier import Redis
from memo.testing import recording, reset


def ticker_gone() -> bool:
    return wait_for(lambda: all(one.name != "memo-show" for one in threading.enumerate()))


def test_a_long_computation_is_shown(sheet: Sheet) -> None:
    """After half a second it is seen to run; when it has ended, how long it took."""

    @cache(name="etl:slow")
    def slow(x: int) -> int:
        time.sleep(1.2)
        return x

    slow(1)
    assert sheet.shown
    first = sheet.shown[0][0]
    assert SHOWN_AFTER <= first.seconds < 1.2
    assert str(first).startswith("slow() runs, ")
    assert first.share is None
    (last,) = map(str, sheet.closed[0])
    assert re.fullmatch(r"slow\(\) took 1\.[2-9] s", last)
    assert ticker_gone()


async def test_a_long_async_computation_is_shown(sheet: Sheet) -> None:
    """The same for `async def`, once per computation with any number of callers."""

    @cache(name="slow")
    async def slow(x: int) -> int:
        await asyncio.sleep(1.0)
        return x

    await asyncio.gather(slow(1), slow(1), slow(2))
    assert str(sheet.shown[0][0]).startswith("slow(): 0 of 2")
    assert [str(line) for line in sheet.closed[0]] == ["slow(): 2 in 1.0 s, 1.0 s each"]
    assert ticker_gone()


def test_what_ends_while_it_is_drawn_is_not_drawn_again(sheet: Sheet) -> None:
    """A computation that ends in the middle of a look leaves its last line, not a running one."""
    order: list[str] = []
    drawing, ended = threading.Event(), threading.Event()

    def show(lines: list[Line]) -> None:
        drawing.set()
        ended.wait(0.3)  # the end has to wait until this was drawn
        order.append("show")

    def close(lines: list[Line]) -> None:
        order.append("close")
        ended.set()

    sheet.show, sheet.close = show, close  # type: ignore[method-assign]

    @cache(name="slow")
    def slow(x: int) -> int:
        assert drawing.wait(10)
        return x

    slow(1)
    assert ticker_gone()
    assert order[-1] == "close"
    assert order.count("close") == 1


def test_switching_off_looks_no_more(sheet: Sheet) -> None:
    """Work still under way when progress is switched off keeps no thread."""
    go = threading.Event()

    @cache(name="slow", version="1")
    def slow(x: int) -> bool:
        return go.wait(10)

    thread = threading.Thread(target=slow, args=(1,))
    thread.start()
    until(lambda: sheet.shown)
    assert WATCHER.ticker is not None
    memo.progress(on=False)
    assert WATCHER.ticker is None
    assert ticker_gone()
    go.set()
    thread.join()


def test_fast_calls_show_nothing(sheet: Sheet) -> None:
    """Computations shorter than half a second show nothing, however many there are."""

    @cache(name="fast")
    def fast(x: int) -> int:
        time.sleep(0.02)
        return x

    for x in range(40):
        fast(x)
    assert not sheet.shown
    assert not sheet.closed


def test_the_expected_end_comes_from_this_kernel(sheet: Sheet) -> None:
    """A key that was computed here before is expected to take as long again."""

    @cache(name="slow")
    def slow(x: int) -> int:
        time.sleep(0.9)
        return x

    slow(1)
    sheet.shown.clear()
    slow.invalidate(1)
    slow(1)
    line = sheet.shown[0][0]
    assert line.expected == pytest.approx(0.9, abs=0.15)
    assert line.share == pytest.approx(line.seconds / 0.9, abs=0.15)
    assert re.fullmatch(r"slow\(\) runs, [\d.]+ m?s of about [\d.]+ m?s", str(line))


def test_the_expected_end_comes_from_recorded_entries(sheet: Sheet) -> None:
    """Another key of the function is expected to take what its stored entries cost."""

    @cache(name="slow")
    def slow(x: int) -> int:
        time.sleep(0.8)
        return x

    slow(1)
    WATCHER.known.clear()
    WATCHER.latest.clear()
    sheet.shown.clear()
    slow(2)
    assert sheet.shown[0][0].expected == pytest.approx(0.8, abs=0.15)


def test_nothing_where_nobody_looks(sheet: Sheet) -> None:
    """Without a viewer, and once it is switched off, nothing is shown."""

    @cache(name="slow")
    def slow(x: int) -> int:
        time.sleep(0.9)
        return x

    sheet.looked_at = False
    slow(1)
    sheet.looked_at = True
    memo.progress(on=False)
    slow(2)
    assert not sheet.shown
    assert not sheet.closed


def test_a_computation_that_raises_or_is_cancelled_ends(sheet: Sheet) -> None:
    """However it ends, its line does not stay."""

    @cache(name="slow")
    async def slow(x: int) -> int:
        await asyncio.sleep(0.8 if x else 60)
        raise KeyError(x)

    async def main() -> None:
        with pytest.raises(KeyError):
            await slow(1)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(slow(0), 0.9)

    asyncio.run(main())
    assert len(sheet.closed) == 2
    assert not WATCHER.runs


def test_background_refreshes_show_nothing(sheet: Sheet, ahead: Ahead) -> None:
    """A refresh in the background shows nothing."""

    @cache(name="slow", ttl=10, stale_while_revalidate=60)
    def slow(x: int) -> int:
        time.sleep(0.01 if quick.is_set() else 0.9)
        return x

    quick = threading.Event()
    quick.set()
    slow(1)
    ahead.advance(11)
    quick.clear()
    with recording() as heard:
        slow(1)
        assert drain_blocking(20)
    assert events.REFRESH_DONE in [event.kind for event in heard]
    assert not sheet.shown


@pytest.fixture
def slow_redis(redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> RedisServer:
    """A Redis to and from which payloads take 0.9 s."""
    store, fetch = Redis.store, Redis.fetch

    async def storing(tier: Redis, port: Any, name: str, record: Any, payload: Any, t: Any) -> None:
        time.sleep(0.9 if payload else 0)
        await store(tier, port, name, record, payload, t)

    def fetching(tier: Redis, digest: bytes, sink: Any) -> bool:
        time.sleep(0.9)
        return fetch(tier, digest, sink)

    monkeypatch.setattr(Redis, "store", storing)
    monkeypatch.setattr(Redis, "fetch", fetching)
    monkeypatch.setenv("MEMO_REDIS_URL", redis_server.url)
    monkeypatch.setenv("MEMO_DEADLINE", "10")
    WATCHER.rates.clear()
    return redis_server


@cache(name="moved", version="1")
def moved(n: int) -> Any:
    return np.arange(n)


def test_a_long_upload_is_shown(sheet: Sheet, slow_redis: RedisServer) -> None:
    """A payload that takes its time to Redis is seen to go there; the second with its end."""
    moved(300_000)
    assert drain_blocking(10)
    first = sheet.shown[0][0]
    assert first.share is None
    assert str(first).startswith("moved(): 2.3 MiB to redis, ")
    assert re.fullmatch(r"moved\(\): 2.3 MiB to redis took [\d.]+ m?s", str(sheet.closed[0][0]))
    sheet.shown.clear()
    moved(600_000)
    assert drain_blocking(10)
    assert 1.2 < (sheet.shown[0][0].expected or 0) < 3.6, "by the size and the rate of the last"
    assert ticker_gone()


def test_a_long_fetch_is_shown(sheet: Sheet, slow_redis: RedisServer, tmp_path: Path) -> None:
    """A payload that takes its time from Redis is seen to come; from the disk nothing is shown."""
    moved(300_000)
    assert drain_blocking(10)
    reset()
    sheet.shown.clear()
    with memo.configure(directory=str(tmp_path / "other")):
        moved(300_000)
        assert str(sheet.shown[0][0]).startswith("moved(): 2.3 MiB from redis, ")
        sheet.shown.clear()
        moved(300_000)
        assert not sheet.shown
    assert not WATCHER.runs


def test_a_transfer_that_fails_ends(sheet: Sheet, slow_redis: RedisServer) -> None:
    """The line of an upload goes when Redis does."""
    moved(300_000)
    slow_redis.stop()
    assert drain_blocking(30)
    assert not WATCHER.runs
    assert not WATCHER.rates


HOLDER = """
import sys, time
from memo import cache
@cache(name="shared", use_lock=True, version="1")
def shared(x):
    print("running", flush=True)
    time.sleep(x)
    return x
for seconds in map(float, sys.argv[1:]):
    shared(seconds)
"""


def held(tmp_path: Path, *seconds: float) -> subprocess.Popen[bytes]:
    """A process that computes for so many seconds, one after the other; it is at the last now."""
    path = tmp_path / "holder.py"
    path.write_text(HOLDER)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(path), *map(str, seconds)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, env=env)
    assert holder.stdout is not None
    for _ in seconds:
        assert holder.stdout.readline() == b"running\n"
    return holder


def of(holder: subprocess.Popen[bytes]) -> str:
    return f"kernel {holder.pid} on host {os.uname().nodename}"


@pytest.mark.parametrize("shared", ["disk", "redis"])
def test_a_waiter_shows_whom_it_waits_for(
    sheet: Sheet,
    tmp_path: Path,
    shared: str,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    """A wait for another process shows which one, on which host, how long it runs, and will."""
    if shared == "redis":
        url = request.getfixturevalue("redis_server").url
        monkeypatch.setenv("MEMO_REDIS_URL", url)
    with held(tmp_path, 0.5, 2.5) as holder:

        @cache(name="shared", use_lock=True, version="1")
        def shared_(x: float) -> float:
            return x

        time.sleep(0.5)
        assert shared_(2.5) == 2.5
    line = sheet.shown[0][0]
    told = rf"shared\(\) waits for {of(holder)}, running [\d.]+ m?s of about [\d.]+ m?s"
    assert re.fullmatch(told, str(line)), str(line)
    assert line.seconds >= 1.0  # it ran for half a second before any call waited
    assert line.expected == pytest.approx(0.5, abs=0.2)  # its last one
    assert not sheet.closed[0]
    assert not WATCHER.runs


def test_an_entry_of_the_key_knows_better_what_to_expect(sheet: Sheet, tmp_path: Path) -> None:
    """Of a key that was computed before, its own duration is expected, not the holder's last."""

    @cache(name="shared", use_lock=True, version="1")
    def shared(x: float) -> float:
        time.sleep(x / 2)
        return x

    shared(2.0)
    shared.invalidate(2.0)
    WATCHER.known.clear()
    with held(tmp_path, 0.1, 2.0):
        shared(2.0)
    assert sheet.shown[-1][0].expected == pytest.approx(1.0, abs=0.3)


def test_a_waiter_learns_who_has_it_now(sheet: Sheet) -> None:
    """When another one has taken the lease since, the line names that one, and the wait goes on."""

    def waiting(pid: int) -> None:
        WATCHER.hear(Event(events.WAITING, "f", "key", detail=f"1f3a/a/{pid}/99ff/{time.time()}/"))

    waiting(1)
    until(lambda: sheet.shown)
    assert str(sheet.shown[-1][0]).startswith("f() waits for kernel 1 on host a, running ")
    waiting(2)
    count = len(sheet.shown)
    until(lambda: len(sheet.shown) >= count + 2)
    line = sheet.shown[-1][0]
    assert line.what == "f() waits for kernel 2 on host a"
    WATCHER.hear(Event(events.WAIT_ENDED, "f", "key"))
    assert sheet.closed == [[]]


def test_holders_for_people() -> None:
    """A holder is named by process and host; what its text does not tell is not made up."""
    assert holder_name(Holder.of("1f3a/a/4123/99ff")) == "kernel 4123 on host a"
    assert holder_name(Holder.of("")) == "another process"
    assert Holder.of("1f3a/a/4123/99ff/12.5/40") == ("a", "4123", 12.5, 40.0)
    assert Holder.of("1f3a/a/4123/99ff/12.5/") == ("a", "4123", 12.5, None)
    assert Holder.of("1f3a/a/4123/99ff/soon/x") == ("a", "4123", None, None)
    line = Line("f() waits for kernel 4123 on host a", 12.0, 40.0, word="running ")
    assert str(line) == "f() waits for kernel 4123 on host a, running 12.0 s of about 40.0 s"
    assert str(line._replace(expected=None)).endswith("host a, running 12.0 s")


def test_hits_do_not_reach_it(sheet: Sheet) -> None:
    """Hits cost nothing more while progress is on: it hears none of them."""
    heard = []
    WATCHER.hear, hear = lambda event: heard.append(event.kind) or hear(event), WATCHER.hear  # type: ignore[method-assign,func-returns-value]
    memo.progress(on=False)
    memo.progress()

    @cache(name="f")
    def f(x: int) -> int:
        return x

    f(1), f(1)
    del WATCHER.hear
    assert "computed" in heard
    assert "hit" not in heard


# --- screens --------------------------------------------------------------------------------------

SCRIPT = """
import sys, threading, time, memo
from memo import cache
@cache(name="slow", version="1")
def slow(x):
    time.sleep(1.0)
    return x
memo.progress()
slow(1)
slow.invalidate()
slow(1)
print(sorted(t.name for t in threading.enumerate() if "rich" in t.name.lower()))
"""


def test_a_script_in_a_terminal_shows_a_bar(tmp_path: Path) -> None:
    """On a terminal there is a bar with the expected end, and it is gone afterwards."""
    ours, theirs = pty.openpty()
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "100"}
    command = [sys.executable, "-c", SCRIPT]
    with subprocess.Popen(command, stderr=theirs, stdout=subprocess.PIPE, env=env) as script:
        os.close(theirs)
        seen = io.BytesIO()
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:  # the other end is closed
                break
            if not part:
                break
            seen.write(part)
        assert script.stdout is not None
        assert script.stdout.read() == b"[]\n"
    os.close(ours)
    text = seen.getvalue().decode()
    assert "slow() runs, " in text
    assert re.search(r"slow\(\) runs, [\d.]+ m?s of about 1\.\d s", text)
    assert "━" in text
    assert text.rstrip().endswith(("\x1b[?25h", "\x1b[2K", "\x1b[1A\x1b[2K"))


def test_a_script_without_a_terminal_shows_nothing() -> None:
    """If standard error is no terminal, nothing is printed."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=env)
    assert done.stdout == "[]\n"
    assert done.stderr == ""
    assert not Terminal().open()


SLOW = """
@cache(version="1")
def slow(x):
    time.sleep(1.1)
    return x
"""


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    """A real kernel with memo loaded."""
    kernel = Kernel(tmp_path_factory.mktemp("kernel"))
    yield kernel
    kernel.close()


def test_in_a_notebook(kernel: Kernel) -> None:
    """A cell shows a bar while its computation runs, then how long it took; a fast cell nothing."""
    kernel.run(SLOW)
    first = kernel.run("slow(1);")
    assert first.text.startswith("slow() runs, ")
    assert 'class="memo-bar"' not in first.html
    (updates,) = kernel.updates.values()
    assert re.fullmatch(r"slow\(\) took 1\.[1-9] s", updates[-1]["text/plain"])
    kernel.run("slow.invalidate()")
    again = kernel.run("slow(1);")
    assert re.search(r"of about 1\.[1-9] s", again.text)
    assert 'class="memo-bar"' in again.html
    assert not kernel.run("slow(1);").bundles
    kernel.run("memo.progress(on=False)")
    assert not kernel.run("slow(2);").bundles
    kernel.run("memo.progress()")
    kernel.client.allow_stdin = False  # as nbclient and papermill run it
    assert not kernel.run("slow(3);").bundles
    kernel.client.allow_stdin = True


async def test_one_line_per_function_with_its_own_times(sheet: Sheet) -> None:
    """Nine concurrent calls of three durations are one line; each took what the clock says."""

    @cache(name="load", version="1")
    async def load(x: int) -> int:
        await asyncio.sleep(0.4 * (1 + x % 3))
        return x

    begun = time.perf_counter()
    await asyncio.gather(*map(load, range(9)))
    took = time.perf_counter() - begun
    shown = [str(lines[0]) for lines in sheet.shown]
    assert all(len(lines) == 1 for lines in sheet.shown)
    assert any(
        re.fullmatch(r"load\(\): [36] of 9, [\d.]+ m?s each, [\d.]+ m?s left", s) for s in shown
    )
    (line,) = sheet.closed[0]
    assert line.seconds == pytest.approx(took, abs=0.6)  # a busy machine
    assert line.each == pytest.approx(0.8, abs=0.1)


def test_what_is_part_of_another_call_stands_below_it(sheet: Sheet) -> None:
    """Nested calls are indented under the outer one, each with its own duration."""

    @cache(name="load", version="1")
    def load(x: int) -> int:
        time.sleep(0.7)
        return x

    @cache(name="report", version="1")
    def report() -> int:
        return load(1) + load(2)

    report()
    lines = sheet.closed[0]
    assert str(lines[0]).startswith("report() took ")
    assert 1.4 <= lines[0].seconds < 2.4
    assert re.match(r"  load\(\): 2 in [12]\.\d s, ", str(lines[1]))
    assert 0.7 <= lines[1].each < 1.2


def test_a_loop_in_a_cell_is_one_line(kernel: Kernel) -> None:
    """Calls one after the other in a cell are one line, which becomes the report of the cell."""
    kernel.run("@cache(version='1')\ndef step(x):\n    time.sleep(0.6)\n    return x")
    kernel.run("%cache_report on")
    kernel.updates.clear()
    shown = kernel.run("for i in range(3): step(i)")
    kernel.run("%cache_report off")
    assert len(shown.bundles) == 1
    (updates,) = kernel.updates.values()
    assert any(
        "step(): 2 of 3, 0.6" in u["text/plain"] or "2 of 3, 60" in u["text/plain"] for u in updates
    )
    assert updates[-1]["text/plain"].startswith("3 misses: step() not cached yet")


def test_a_front_end_without_cells_gets_no_lines(kernel: Kernel) -> None:
    """`jupyter console` would keep each line for good, so it is shown none."""
    kernel.run("@cache(version='1')\ndef late(x):\n    time.sleep(0.8)\n    return x")
    kernel.has_cells = False
    try:
        assert not kernel.run("late(1);").bundles
    finally:
        kernel.has_cells = True
    assert kernel.run("late(2);").bundles
