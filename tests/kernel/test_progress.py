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
from chaos import Proxy
from checkout import ROOT
from kernels import Kernel
from observed import calls_of
from redis_server import RedisServer
from sheets import Sheet
from time_ahead import Ahead
from waiting import until, wait_for

import memo
from memo import cache
from memo.coordination.leases import Holder
from memo.jupyter.progress_view import (
    SHOWN_AFTER_SECONDS,
    WATCHER,
    Line,
    TerminalScreen,
    holder_name,
)
from memo.runtime import events
from memo.runtime.blocking import drain_blocking
from memo.runtime.events import Event
from memo.testing import recording, reset


def ticker_gone() -> bool:
    return wait_for(lambda: all(one.name != "memo-show" for one in threading.enumerate()))


def test_a_long_computation_is_shown(sheet: Sheet, ahead: Ahead) -> None:
    """After half a second it is seen to run; when it has ended, how long it took."""

    @cache(name="etl:slow", version="1")
    def slow(x: int) -> int:
        ahead.work(1.2)
        until(lambda: sheet.has("slow()"))
        return x

    slow(1)
    assert sheet.shown
    first = sheet.shown[0][0]
    assert SHOWN_AFTER_SECONDS < 1.2 <= first.seconds
    assert str(first).startswith("slow() runs, ")
    assert first.share is None
    (last,) = map(str, sheet.closed[0])
    assert re.fullmatch(r"slow\(\) took 1\.[2-9] s", last)
    assert ticker_gone()


async def test_a_long_async_computation_is_shown(sheet: Sheet, ahead: Ahead) -> None:
    """The same for `async def`, once per computation with any number of callers."""

    @cache(name="slow", version="1")
    async def slow(x: int) -> int:
        if await together.wait() == 0:
            ahead.work(1.0)
            await sheet.shows("slow()")
        await together.wait()
        return x

    together = asyncio.Barrier(2)
    await asyncio.gather(slow(1), slow(1), slow(2))
    assert str(sheet.shown[0][0]).startswith("slow(): 0 of 2")
    (line,) = map(str, sheet.closed[0])
    assert re.fullmatch(r"slow\(\): 2 in 1\.\d s, 1\.\d s each", line)
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


def test_the_expected_end_comes_from_this_kernel(sheet: Sheet, ahead: Ahead) -> None:
    """A key that was computed here before is expected to take as long again."""

    @cache(name="slow", version="1")
    def slow(x: int) -> int:
        ahead.work(0.9)
        if known:
            until(lambda: sheet.has("slow()"))
        return x

    known: list[int] = []
    known.append(slow(1))
    slow.invalidate(1)
    sheet.shown.clear()
    slow(1)
    line = sheet.shown[0][0]
    assert line.expected == pytest.approx(0.9, abs=0.15)
    assert line.share == pytest.approx(line.seconds / 0.9, abs=0.15)
    assert re.fullmatch(r"slow\(\) runs, [\d.]+ m?s of about [\d.]+ m?s", str(line))


def test_the_expected_end_comes_from_recorded_entries(sheet: Sheet, ahead: Ahead) -> None:
    """Another key of the function is expected to take what its stored entries cost."""

    @cache(name="slow", version="1")
    def slow(x: int) -> int:
        ahead.work(0.8)
        if x == 2:
            until(lambda: sheet.has("slow()"))
        return x

    slow(1)
    WATCHER.known.clear()
    WATCHER.latest.clear()
    sheet.shown.clear()
    slow(2)
    assert sheet.shown[0][0].expected == pytest.approx(0.8, abs=0.15)


def test_nothing_where_nobody_looks(sheet: Sheet, ahead: Ahead) -> None:
    """Without a viewer, and once it is switched off, nothing is shown."""

    @cache(name="slow", version="1")
    def slow(x: int) -> bool:
        ahead.work(0.9)
        if x == 1:
            until(lambda: sheet.asked >= 2)
        return WATCHER.ticker is not None

    sheet.looked_at = False
    assert slow(1)
    sheet.looked_at = True
    memo.progress(on=False)
    assert not slow(2), "it would be shown, had it taken longer"
    assert not sheet.shown
    assert not sheet.closed


def test_a_computation_that_raises_or_is_cancelled_ends(sheet: Sheet, ahead: Ahead) -> None:
    """However it ends, its line does not stay."""

    @cache(name="slow", version="1")
    async def slow(x: int) -> int:
        ahead.work(0.8)
        sheet.shown.clear()
        await sheet.shows("slow()")
        if not x:
            tasks[0].cancel()
            await asyncio.Event().wait()
        raise KeyError(x)

    async def main() -> None:
        with pytest.raises(KeyError):
            await slow(1)
        tasks.append(asyncio.ensure_future(slow(0)))
        with pytest.raises(asyncio.CancelledError):
            await tasks[0]

    tasks: list[asyncio.Future[int]] = []

    asyncio.run(main())
    assert len(sheet.closed) == 2
    assert not WATCHER.runs


def test_background_refreshes_show_nothing(sheet: Sheet, ahead: Ahead) -> None:
    """A refresh in the background shows nothing, though what is called meanwhile is shown."""

    @cache(name="slow", version="1", ttl=10, stale_while_revalidate=60)
    def slow(x: int) -> int:
        assert go.wait(20)
        return x

    @cache(name="other", version="1")
    def other(x: int) -> None:
        ahead.work(0.9)
        until(lambda: sheet.has("other()"))

    go = threading.Event()
    go.set()
    slow(1)
    ahead.advance(11)
    go.clear()
    with recording() as heard:
        slow(1)
        other(1)
        go.set()
        assert drain_blocking(20)
    assert events.REFRESH_DONE in [event.kind for event in heard]
    assert not any("slow()" in str(line) for lines in sheet.shown for line in lines)


@pytest.fixture
def slow_redis(
    redis_server: RedisServer, sheet: Sheet, ahead: Ahead, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Proxy]:
    """A Redis to and from which payloads take 0.9 s, and until they are shown."""

    def hold(asked: bytes) -> None:
        if len(asked) > 10_000 or (b"GET\r\n" in asked and b":p:" in asked):
            ahead.work(0 if sheet.has("moved()") else 0.9)
            until(lambda: sheet.has("moved()"))

    monkeypatch.setenv("MEMO_DEADLINE", "20")
    WATCHER.rates.clear()
    with Proxy(redis_server.port) as proxy:
        monkeypatch.setenv("MEMO_REDIS_URL", proxy.url)
        proxy.hold = hold
        yield proxy
        reset()


@cache(name="moved", version="1")
def moved(n: int) -> Any:
    return np.arange(n)


@pytest.mark.usefixtures("slow_redis")
def test_a_long_upload_is_shown(sheet: Sheet) -> None:
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


@pytest.mark.usefixtures("slow_redis")
def test_a_long_fetch_is_shown(sheet: Sheet, tmp_path: Path) -> None:
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


def test_a_transfer_that_fails_ends(sheet: Sheet, slow_redis: Proxy) -> None:
    """The line of an upload goes when Redis does."""
    stopped = threading.Event()
    slow_redis.hold = lambda asked: len(asked) < 10_000 or stopped.wait(20)
    moved(300_000)
    until(lambda: WATCHER.runs)
    slow_redis.mode = "refuse"
    slow_redis.cut_all()
    stopped.set()
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
    ahead: Ahead,
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

        ahead.advance(0.5)
        assert shared_(2.5) == 2.5
    line = sheet.shown[0][0]
    told = rf"shared\(\) waits for {of(holder)}, running [\d.]+ m?s of about [\d.]+ m?s"
    assert re.fullmatch(told, str(line)), str(line)
    assert line.seconds >= 1.0  # it ran for half a second before any call waited
    assert line.expected == pytest.approx(0.5, abs=0.2)  # its last one
    assert not sheet.closed[0]
    assert not WATCHER.runs


def test_an_entry_of_the_key_knows_better_what_to_expect(
    sheet: Sheet, tmp_path: Path, ahead: Ahead
) -> None:
    """Of a key that was computed before, its own duration is expected, not the holder's last."""

    @cache(name="shared", use_lock=True, version="1")
    def shared(x: float) -> float:
        ahead.work(x / 2)
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
        WATCHER.handle(
            Event(events.WAITING, "f", "key", detail=f"1f3a/a/{pid}/99ff/{time.time()}/")
        )

    waiting(1)
    until(lambda: sheet.shown)
    assert str(sheet.shown[-1][0]).startswith("f() waits for kernel 1 on host a, running ")
    waiting(2)
    count = len(sheet.shown)
    until(lambda: len(sheet.shown) >= count + 2)
    line = sheet.shown[-1][0]
    assert line.what == "f() waits for kernel 2 on host a"
    WATCHER.handle(Event(events.WAIT_ENDED, "f", "key"))
    assert sheet.closed == [[]]


def test_holders_for_people() -> None:
    """A holder is named by process and host; what its text does not tell is not made up."""
    assert holder_name(Holder.parse("1f3a/a/4123/99ff")) == "kernel 4123 on host a"
    assert holder_name(Holder.parse("")) == "another process"
    assert Holder.parse("1f3a/a/4123/99ff/12.5/40") == ("a", "4123", 12.5, 40.0)
    assert Holder.parse("1f3a/a/4123/99ff/12.5/") == ("a", "4123", 12.5, None)
    assert Holder.parse("1f3a/a/4123/99ff/soon/x") == ("a", "4123", None, None)
    line = Line("f() waits for kernel 4123 on host a", 12.0, 40.0, word="running ")
    assert str(line) == "f() waits for kernel 4123 on host a, running 12.0 s of about 40.0 s"
    assert str(line._replace(expected=None)).endswith("host a, running 12.0 s")


def test_hits_do_not_reach_it(sheet: Sheet) -> None:
    """Hits cost nothing more while progress is on: it hears none of them."""
    memo.progress(on=False)
    memo.progress()

    @cache(name="f")
    def f(x: int) -> int:
        return x

    with calls_of(type(WATCHER).handle, note=lambda given: given["event"].kind) as heard:
        f(1), f(1)
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
    assert not re.search(r"\x1b\[[39]1m", text), "nothing red that needs no action"
    assert text.rstrip().endswith(("\x1b[?25h", "\x1b[2K", "\x1b[1A\x1b[2K"))


def test_a_script_without_a_terminal_shows_nothing() -> None:
    """If standard error is no terminal, nothing is printed."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=env)
    assert done.stdout == "[]\n"
    assert done.stderr == ""
    assert not TerminalScreen().open()


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


async def test_one_line_per_function_with_its_own_times(sheet: Sheet, ahead: Ahead) -> None:
    """Nine concurrent calls of three durations are one line; each took what the clock says."""

    @cache(name="load", version="1")
    async def load(x: int) -> int:
        begun = time.perf_counter()
        await together.wait()
        await waves[x % 3].wait()
        each.append(time.perf_counter() - begun)
        return x

    async def work() -> None:
        await together.wait()
        for count, wave in enumerate(waves):
            ahead.work(0.4)
            await sheet.shows(f"load(): {3 * count} of 9")
            wave.set()

    together, waves = asyncio.Barrier(10), [asyncio.Event() for _ in range(3)]
    each: list[float] = []
    begun = time.perf_counter()
    await asyncio.gather(work(), *map(load, range(9)))
    took = time.perf_counter() - begun
    shown = [str(lines[0]) for lines in sheet.shown]
    assert all(len(lines) == 1 for lines in sheet.shown)
    assert any(
        re.fullmatch(r"load\(\): [36] of 9, [\d.]+ m?s each, [\d.]+ m?s left", s) for s in shown
    )
    (line,) = sheet.closed[0]
    assert line.seconds == pytest.approx(took, abs=0.6)  # a busy machine
    assert line.each == pytest.approx(sum(each) / 9, abs=0.1)


def test_what_is_part_of_another_call_stands_below_it(sheet: Sheet, ahead: Ahead) -> None:
    """Nested calls are indented under the outer one, each with its own duration."""

    @cache(name="load", version="1")
    def load(x: int) -> int:
        ahead.work(0.7)
        until(lambda: sheet.has("load()"))
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
    assert any(re.search(r"step\(\): 2 of 3, \d", u["text/plain"]) for u in updates)
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
