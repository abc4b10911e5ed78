"""Threads: what they share must not fail, leak, or hold each other up."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from checkout import ROOT, SUPPORT
from inner_faults import failing
from time_ahead import Ahead
from waiting import until

import memo
from memo.runtime.port import Port
from memo.testing import ManualClock, isolated, recording


def ran(script: str) -> subprocess.CompletedProcess[str]:
    """A program that was run to its end, in a process of its own."""
    command = [sys.executable, "-c", script]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(SUPPORT)))}
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False)


def test_hits_from_many_threads_on_a_small_memory_tier(cache_home: Path) -> None:
    """Threads that hit and threads that evict for new entries do not fail each other."""

    @memo.cache(ttl=None)
    def load(x: int) -> bytes:
        return bytes(1000)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with isolated(memory_limit=20_000), recording() as seen, ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda n: load(n % 23), range(4000)))
            chain_entries = [list(pool.map(lambda n: load(n % 23), range(400))) for _ in range(3)]
    finally:
        sys.setswitchinterval(before)
    assert len(chain_entries) == 3
    assert [event for event in seen if event.kind == "error"] == []


def test_hits_from_many_threads_while_the_entries_are_listed() -> None:
    """A hit moves its entry in the memory tier; that fails no thread that lists the entries."""

    @memo.cache(ttl=None)
    def load(x: int) -> int:
        return x

    ended = threading.Event()

    def hit() -> None:
        while not ended.is_set():
            for x in range(100):
                load(x)

    before = sys.getswitchinterval()
    with isolated(tiers=["memory"]), ThreadPoolExecutor(3) as pool:
        for x in range(100):
            load(x)
        sys.setswitchinterval(1e-6)
        try:
            hitting = [pool.submit(hit) for _ in range(3)]
            listed = [len(memo.entries(load)) for _ in range(20)]
        finally:
            ended.set()
            sys.setswitchinterval(before)
    assert listed == [100] * 20
    assert [one.result() for one in hitting] == [None] * 3


def test_more_big_results_than_are_remembered_as_verified() -> None:
    """Loading more different payloads than are remembered works from many threads at once."""
    script = """
import sys, threading, time, limits, memo, numpy as np
from concurrent.futures import ThreadPoolExecutor
from memo.testing import isolated, recording
limits.change(verified_payloads=8)
def other_threads_first(frame, event, given):
    if event == "c_return" and given in (iter, next) and "memo" in frame.f_code.co_filename:
        time.sleep(1e-4)
@memo.cache(ttl=None)
def load(x):
    return np.full(20_000, x)
with isolated(memory_limit=0):
    for x in range(24):
        load(x)
    threading.setprofile(other_threads_first)
    with recording() as seen, ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: int(load(n % 24)[0]), range(160)))
    threading.setprofile(None)
assert found == [n % 24 for n in range(160)]
print({event.kind for event in seen})
"""
    done = ran(script)
    assert done.stdout == "{'hit'}\n", done.stdout + done.stderr[-2000:]


def test_deeply_nested_arguments_in_several_threads() -> None:
    """Threads that key deeply nested arguments at once do not end the process."""
    script = """
import memo
from concurrent.futures import ThreadPoolExecutor
value = []
for _ in range(2000):
    value = [value]
@memo.cache
def load(value):
    return 1
with ThreadPoolExecutor(8) as pool:
    print(len(set(pool.map(lambda _: load.key(value), range(200)))))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.stdout == "1\n", done.stderr[:2000]


def test_threads_are_followed_only_from_the_first_computation_on() -> None:
    """`Thread.start` and `ThreadPoolExecutor.submit` are wrapped at the first computation."""
    script = """
import threading, memo
from concurrent.futures import ThreadPoolExecutor
from memo.testing import isolated
start, submit = threading.Thread.start, ThreadPoolExecutor.submit
@memo.cache
def load(): return 1
assert (threading.Thread.start, ThreadPoolExecutor.submit) == (start, submit)
with isolated(follow_threads=False):
    load()
    assert (threading.Thread.start, ThreadPoolExecutor.submit) == (start, submit)
with isolated():
    load()
    assert threading.Thread.start is not start and ThreadPoolExecutor.submit is not submit
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
shell.run_line_magic("load_ext", "memo")
shell.run_line_magic("unload_ext", "memo")
assert (threading.Thread.start, ThreadPoolExecutor.submit) == (start, submit)
print("whole")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.stdout.endswith("whole\n"), done.stderr[-2000:]


@pytest.mark.parametrize("follow", [True, False])
def test_follow_threads(follow: bool) -> None:
    """With `follow_threads` off, what a started thread reads is no part of the computation."""

    @memo.cache
    def inner() -> int:
        return 1

    @memo.cache
    def outer() -> int:
        got: list[int] = []
        thread = threading.Thread(target=lambda: got.append(inner()))
        thread.start()
        thread.join()
        return got[0]

    with isolated(follow_threads=follow):
        outer()
        inner.invalidate()
        assert outer.is_cached() is not follow


def test_the_renewal_of_leases_does_not_wait_for_what_is_shown() -> None:
    """A slow display holds up no lease: the two have threads of their own."""
    from memo.runtime.blocking import BLOCKING, DISPLAYS

    slow, renewed = threading.Event(), threading.Event()

    async def show(_: Any) -> None:
        slow.wait(5)

    async def renew(_: Any) -> None:
        renewed.set()

    handles = [DISPLAYS.every(0.001, show), BLOCKING.every(0.01, renew)]
    try:
        assert renewed.wait(2)
    finally:
        slow.set()
        for handle in handles:
            handle.cancel()


def test_a_job_that_raises_ends_no_thread_of_its_pool() -> None:
    """An error of a job in a pool is an event, and the thread goes on with the next job."""
    from memo.runtime.blocking import Pool

    def fail() -> None:
        raise SystemExit("no thread of the pool ends with this")

    pool, done = Pool("memo-offload-test", 1), threading.Event()
    with recording() as seen:
        pool.submit(fail)
        assert pool.drain(10)
        pool.submit(done.set)
        assert done.wait(10)
    errors = [(event.reason, event.detail) for event in seen if event.kind == "error"]
    assert [reason for reason, _ in errors] == ["background"]
    assert errors[0][1].startswith("memo-offload-test: SystemExit(")


def test_an_async_function_that_exits_ends_no_loop_of_memo() -> None:
    """Sync code that refreshes it gets the exception, and the loop goes on with the next call."""

    @memo.cache(name="threads:exits", version="1")
    async def load(x: int) -> int:
        if x == 0:
            raise SystemExit("not of the loop")
        return x

    found: list[Any] = []

    def refresh() -> None:
        for x in (0, 1):
            try:
                found.append(load.refresh(x))
            except SystemExit as error:
                found.append(str(error))

    thread = threading.Thread(target=refresh, daemon=True)
    thread.start()
    thread.join(10)
    assert found == ["not of the loop", 1]


def test_a_job_at_once_does_not_wait_for_the_others() -> None:
    """A job that one in the pool waits for has a thread, and runs in the caller's without one."""
    from memo.runtime import blocking

    pool, ran_at_once = blocking.Pool("memo-offload-test", 1), threading.Semaphore(0)

    def first() -> None:
        pool.submit(ran_at_once.release, at_once=True)
        assert ran_at_once.acquire(timeout=10)

    go = threading.Event()
    with recording() as seen:
        pool.submit(first)
        assert pool.drain(20)
        pool.submit(partial(go.wait, 20))
        pool.submit(partial(go.wait, 20))
        with failing("thread"):
            pool.submit(ran_at_once.release, at_once=True)
        assert ran_at_once.acquire(timeout=0)
        go.set()
        assert pool.drain(20)
    assert [event.detail for event in seen if event.kind == "error"] == []


def test_more_computations_in_own_threads_than_the_pool_has() -> None:
    """Sync functions with `soft_timeout` that use each other do not wait for a free thread."""
    count, clock = 66, ManualClock()
    slow, go, started = threading.Event(), threading.Event(), threading.Semaphore(0)
    options: dict[str, Any] = {"ttl": 10, "stale_if_error": 600, "soft_timeout": 30}

    @memo.cache(**options)
    def inner(n: int) -> bool:
        return slow.is_set()

    @memo.cache(**options)
    def outer(n: int) -> bool:
        if slow.is_set():
            started.release()
            go.wait(20)
        return inner(n)

    with isolated(clock=clock), ThreadPoolExecutor(count) as pool:
        assert not any(outer(n) for n in range(count))
        clock.advance(20)
        slow.set()
        answers = [pool.submit(outer, n) for n in range(count)]
        try:
            assert all(started.acquire(timeout=10) for _ in range(count))
        finally:
            go.set()
        assert all(answer.result(20) for answer in answers)


async def test_sync_work_that_waits_for_sync_work_through_a_loop() -> None:
    """Threads that wait for a loop of memo's do not hold up the threads that it needs."""
    from memo.runtime.native import native, run_elsewhere

    count = 64
    everyone_here = threading.Barrier(count)

    async def inside(port: Port) -> str:
        return await port.offload(lambda: "done", own_thread=True)

    def outside() -> str:
        everyone_here.wait(10)
        return run_elsewhere(inside)

    work = (native().offload(outside, own_thread=True) for _ in range(count))
    assert await asyncio.wait_for(asyncio.gather(*work), 20) == ["done"] * count


def test_missed_ticks_are_not_made_up_for(ahead: Ahead) -> None:
    """After a stall, work at intervals goes on at its interval, not in a burst."""
    from memo.runtime.blocking import BLOCKING

    times: list[float] = []

    async def tick(_: Any) -> None:
        if not times:
            ahead.work(0.5)
        times.append(time.monotonic())

    handle = BLOCKING.every(0.05, tick)
    until(lambda: len(times) >= 4)
    handle.cancel()
    assert times[3] - times[0] > 0.045


def test_the_first_call_after_the_main_thread_has_ended() -> None:
    """A cached function works, and hits, in a thread that outlives the main thread."""
    script = """
import threading, memo
runs = []
@memo.cache(ttl=None)
def load(x):
    runs.append(x)
    return x
def work():
    threading.main_thread().join()
    print([load(1), load(1), load(1), len(runs)], flush=True)
threading.Thread(target=work).start()
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.stdout == "[1, 1, 1, 1]\n", done.stderr[-2000:]


KINDS = """
import asyncio, memo
@memo.cache(ttl=None)
def load(x):
    return x
@memo.cache(ttl=None)
async def aload(x):
    return x
@memo.cache(ttl=None, each="many")
def double(many):
    return [2 * x for x in many]
@memo.cache(ttl=None)
def stream(x):
    yield x
"""
"""A program's first lines: a function of each kind."""


def test_the_first_call_without_a_descriptor_left() -> None:
    """A first call that can open no file gives what the function gives."""
    script = f"""{KINDS}
import os, resource
loop = asyncio.new_event_loop()
@memo.cache(ttl=None, each="many")
async def adouble(many):
    return [2 * x for x in many]
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
taken = []
try:
    while True:
        taken.append(os.open("/dev/null", os.O_RDONLY))
except OSError:
    pass
print(load(1), loop.run_until_complete(aload(2)), double([3, 4]), list(stream(5)), flush=True)
print(loop.run_until_complete(adouble([6])), flush=True)
for descriptor in taken:
    os.close(descriptor)
load(1)
print(load.is_cached(1))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.stdout == "1 2 [6, 8] [5]\n[12]\nTrue\n", done.stderr[-3000:]


def test_the_first_call_after_memo_was_replaced(tmp_path: Path) -> None:
    """If memo is gone from the disk, as in an upgrade, a function still returns its result."""
    shutil.copytree(ROOT / "memo", tmp_path / "memo", ignore=shutil.ignore_patterns("__pycache__"))
    script = f"""{KINDS}
import shutil, sys
assert memo.__file__.startswith(sys.argv[1])
shutil.rmtree(sys.argv[1])
print(load(1), asyncio.run(aload(2)), double([3, 4]), list(stream(5)))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "memo")],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert done.stdout == "1 2 [6, 8] [5]\n", done.stderr[-3000:]


PORTAL = """
import faulthandler, threading, memo
from concurrent.futures import ThreadPoolExecutor
from providers import InADict
from memo.testing import isolated
faulthandler.dump_traceback_later(30, exit=True)
"""
"""The first lines of a program that ends, even if its threads wait for each other."""


NESTED = {
    "a helper": """
@memo.cache
async def rates(): return 1
@memo.cache
async def report():
    rates.refresh()
    return await rates()
""",
    "helpers in each other": """
@memo.cache
async def first(): return 1
@memo.cache
async def rates():
    first.refresh()
    return await first()
@memo.cache
async def report(): return rates.refresh()
""",
    "a provider": """
@memo.cache(provider=InADict())
def rates(): return 1
@memo.cache
async def report(): return rates()
""",
    "a callable": """
@memo.cache
async def version(): return 3
async def changed():
    version.refresh()
    return await version()
@memo.cache(depends_on=changed)
def rates(): return 1
@memo.cache
async def report(): return rates()
""",
    "threads": """
@memo.cache
async def rates(x): return x
@memo.cache
async def report():
    with ThreadPoolExecutor(2) as pool:
        return sum(pool.map(rates.refresh, [0, 1]))
""",
}
"""An async function, which a sync helper computes on a loop; and what in it needs a loop."""


@pytest.mark.parametrize("what", NESTED)
def test_a_loop_of_memo_waits_for_no_other_work_of_its_own(what: str) -> None:
    """In an async function that a sync helper computes, sync code may need a loop in turn."""
    script = f"""{PORTAL}{NESTED[what]}
with isolated():
    report.refresh()
    print(report.refresh(), report.is_cached())
    rates.invalidate()
    print(report.is_cached())
"""
    done = ran(script)
    assert done.stdout == "1 True\nFalse\n", done.stderr[-3000:]


def test_a_computation_on_a_loop_of_memo_that_asks_for_itself() -> None:
    """A function that refreshes itself through sync helpers is refused, not waited for."""
    script = f"""{PORTAL}
@memo.cache
async def rates(): return report.refresh()
@memo.cache
async def report(): return rates.refresh()
with isolated():
    try:
        report.refresh()
    except memo.ReentryError as error:
        print(error)
"""
    done = ran(script)
    assert "asks for its own result" in done.stdout, done.stderr[-3000:]


def test_a_function_on_a_loop_of_memo_waits_for_another_thread_that_needs_one() -> None:
    """While a loop is blocked by a function's sync code, other threads reach their provider."""
    script = f"""{PORTAL}
computing, joined = threading.Event(), threading.Event()
@memo.cache(provider=InADict())
def rates():
    computing.set()
    joined.wait(20)
    return 1
@memo.cache
async def report():
    joined.set()
    return rates()
with isolated():
    thread = threading.Thread(target=rates)
    thread.start()
    computing.wait(20)
    print(report.refresh())
    thread.join()
"""
    done = ran(script)
    assert done.stdout == "1\n", done.stderr[-3000:]


REFRESH = """
import memo, pathlib, subprocess, sys
from memo.testing import recording
from waiting import until
place = pathlib.Path(sys.argv[1])
memo.configure(directory=place / "cache")
@memo.cache(ttl=None, stale_while_revalidate=60, name="shared:load", version="1")
def load():
    if len(sys.argv) > 2:
        print("refreshing", flush=True)
        sys.stdin.readline()
    return 1
if len(sys.argv) > 2:
    load()
    memo.runtime.blocking.drain_blocking(10)
    sys.exit()
load()
load.expire()
other = subprocess.Popen(
    [sys.executable, __file__, place, "other"], stdin=-1, stdout=-1, text=True
)
assert other.stdout.readline() == "refreshing\\n"
with recording() as seen:
    load()
    until(lambda: any(e.kind == "refresh_done" for e in seen))
other.communicate("go\\n")
print([e.reason for e in seen if e.kind == "refresh_done"], memo.stats().total.refreshes_done)
"""


def test_a_refresh_by_another_process_is_not_ours(tmp_path: Path) -> None:
    """A refresh that another process was quicker with says so, and counts as none of ours."""
    path = tmp_path / "both.py"
    path.write_text(REFRESH.replace("\\\\", "\\"))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(SUPPORT)))}
    done = subprocess.run(
        [sys.executable, path, tmp_path], capture_output=True, text=True, env=env, check=False
    )
    assert done.stdout == "['refreshed by another process'] 0\n", done.stderr[-2000:]
