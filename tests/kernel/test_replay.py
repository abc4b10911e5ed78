"""`replay=True`: what a function prints and displays comes back with its cached results."""

from __future__ import annotations

import asyncio
import io
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from checkout import ROOT
from kernels import Kernel
from waiting import until

import memo
from memo import cache
from memo.coordination.flights import FLIGHTS
from memo.engine import replay
from memo.errors import OptionError
from memo.testing import ManualClock, isolated


def said(capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """The text on both streams since the last look."""
    return tuple(capsys.readouterr())  # type: ignore[return-value]


def speak(x: int) -> int:
    print("out", x)
    print("err", x, file=sys.stderr)
    print("more", x)
    return x * 2


SHOWN = ("out 1\nmore 1\n", "err 1\n")


async def test_a_hit_shows_what_the_computation_showed(capsys: pytest.CaptureFixture[str]) -> None:
    """Sync and async: both streams, the caller that computes live, each hit again."""
    sync = cache(replay=True, version="1", name="sync")(speak)

    @cache(replay=True, version="1")
    async def aspeak(x: int) -> int:
        await asyncio.sleep(0)
        return speak(x)

    for _ in range(3):
        assert sync(1) == 2
        assert said(capsys) == SHOWN
        assert await aspeak(1) == 2
        assert said(capsys) == SHOWN
    assert sync.cache_info()[:2] == aspeak.cache_info()[:2] == (2, 1)


def test_without_it_nothing_is_shown_again(capsys: pytest.CaptureFixture[str]) -> None:
    """The default is off: a hit is silent, and what a call costs is not wrapped."""
    f = cache(version="1", name="quiet")(speak)
    f(1), f(1)
    assert said(capsys) == SHOWN
    assert type(sys.stdout) is not replay.Stream


def test_the_computing_caller_sees_it_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    """Printed text passes through while the function runs, not when it is done."""
    seen: list[str] = []

    @cache(replay=True, version="1")
    def f(x: int) -> int:
        print("first")
        seen.append(capsys.readouterr().out)
        print("second")
        return x

    f(1)
    assert seen == ["first\n"]
    assert said(capsys)[0] == "second\n"
    f(1)
    assert said(capsys)[0] == "first\nsecond\n"


async def test_concurrent_tasks_are_not_mixed(capsys: pytest.CaptureFixture[str]) -> None:
    """Output of another task in that time, cached or not, is in no other record."""

    @cache(replay=True, version="1")
    async def f(x: str) -> str:
        for i in range(5):
            print(x, i)
            await asyncio.sleep(0)
        return x

    async def other() -> None:
        for _ in range(8):
            print("other")
            await asyncio.sleep(0)

    await asyncio.gather(f("a"), other(), f("b"))
    assert said(capsys)[0].count("other") == 8
    for x in "ab":
        await f(x)
        assert said(capsys)[0] == "".join(f"{x} {i}\n" for i in range(5))


def test_concurrent_threads_are_not_mixed(capsys: pytest.CaptureFixture[str]) -> None:
    """Nor is what another thread prints; a thread of the computation is part of it."""
    inside, go = threading.Event(), threading.Event()

    @cache(replay=True, version="1")
    def f(x: int) -> int:
        inside.set()
        assert go.wait(5)
        with ThreadPoolExecutor(1) as pool:
            pool.submit(print, "from a pool").result()
        thread = threading.Thread(target=print, args=("from a thread",))
        thread.start()
        thread.join()
        return x

    caller = threading.Thread(target=f, args=(1,))
    caller.start()
    assert inside.wait(5)
    print("somebody else")
    go.set()
    caller.join()
    assert said(capsys)[0] == "somebody else\nfrom a pool\nfrom a thread\n"
    f(1)
    assert said(capsys)[0] == "from a pool\nfrom a thread\n"


async def test_joiners_are_shown_it(capsys: pytest.CaptureFixture[str]) -> None:
    """Callers that share a computation see its output, once it has landed."""
    go = asyncio.Event()

    @cache(replay=True, version="1")
    async def f(x: int) -> int:
        print("computing")
        await go.wait()
        return x

    calls = [asyncio.create_task(f(1)) for _ in range(3)]
    while "computing" not in (first := capsys.readouterr().out):
        await asyncio.sleep(0)
    assert first == "computing\n"
    go.set()
    assert await asyncio.gather(*calls) == [1, 1, 1]
    assert said(capsys)[0] == "computing\n" * 2
    assert f.cache_info().misses == 1


def test_joining_threads_are_shown_it(capsys: pytest.CaptureFixture[str]) -> None:
    """The same for threads that share a computation."""
    inside, go = threading.Event(), threading.Event()

    @cache(replay=True, version="1")
    def f(x: int) -> int:
        print("computing")
        inside.set()
        assert go.wait(60)
        return x

    threads = [threading.Thread(target=f, args=(1,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert inside.wait(5)
    until(lambda: sum(len(flight.waiters) for flight in FLIGHTS.joinable_flights()) == 2)
    go.set()
    for thread in threads:
        thread.join()
    assert said(capsys)[0] == "computing\n" * 3


def test_nested_functions(capsys: pytest.CaptureFixture[str]) -> None:
    """Output of an inner cached function, computed or replayed, is part of the outer's output."""

    @cache(replay=True, version="1")
    def inner(x: int) -> int:
        print("inner", x)
        return x

    @cache(replay=True, version="1")
    def outer(x: int) -> int:
        print("before")
        inner(1)
        inner(2)
        print("after")
        return x

    inner(1)
    said(capsys)
    for _ in range(2):
        outer(1)
        assert said(capsys)[0] == "before\ninner 1\ninner 2\nafter\n"
    inner(2)
    assert said(capsys)[0] == "inner 2\n"


def test_an_exception_stores_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """Output that a function showed before it raised was shown, and is not kept."""

    @cache(replay=True, version="1")
    def f(x: int) -> int:
        print("trying")
        raise KeyError(x)

    for _ in range(2):
        with pytest.raises(KeyError):
            f(1)
        assert said(capsys)[0] == "trying\n"
    assert not f.is_cached(1)
    assert type(sys.stdout) is not replay.Stream


def test_a_refresh_in_the_background_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    """A background refresh shows nothing itself: hits after it show its output."""
    count: list[int] = []

    @cache(replay=True, version="1", ttl=0.05, stale_while_revalidate=3600)
    def f(x: int) -> int:
        count.append(x)
        print("run", len(count))
        return len(count)

    clock = ManualClock()
    with isolated(clock=clock):
        f(1)
        clock.advance(0.1)
        assert f(1) == 1
        assert memo.runtime.blocking.drain_blocking(5)  # type: ignore[attr-defined]
        assert said(capsys)[0] == "run 1\n" * 2
        assert f(1) == 2
        assert said(capsys)[0] == "run 2\n"


async def test_what_else_one_can_do_with_it(capsys: pytest.CaptureFixture[str]) -> None:
    """`peek` gives the bare value and shows nothing; `refresh` shows what it does, once."""

    @cache(replay=True, version="1")
    def f(x: int) -> int:
        print("run")
        return x

    @cache(replay=True, version="1")
    async def g(x: int) -> int:
        print("run")
        return x

    assert f.peek(1, default="none") == "none"
    assert f.refresh(1) == await f.arefresh(1) == await g.arefresh(1) == 1
    assert said(capsys)[0] == "run\n" * 3
    assert f.peek(1) == await f.apeek(1) == g.peek(1) == await g.apeek(1) == 1
    assert f.explain(1).hit
    assert said(capsys)[0] == ""
    with memo.configure(enabled=False):
        assert (f(1), await g(1)) == (1, 1)
    assert said(capsys)[0] == "run\n" * 2


def test_options_see_the_bare_result() -> None:
    """`ttl`, `cache_if` and warnings are about what the function returned."""
    seen: list[Any] = []

    def sees(result: Any) -> bool:
        seen.append(result)
        return True

    f = cache(replay=True, version="1", cache_if=sees, ttl=lambda r: seen.append(r) or 60)(speak)
    f(1)
    assert seen == [2, 2]
    g = cache(replay=True, version="1", name="g")(lambda x: (i for i in range(x)))
    with pytest.warns(UserWarning, match="returned a generator that cannot be pickled"):
        assert list(g(3)) == [0, 1, 2]


def test_turning_it_on_is_another_entry(capsys: pytest.CaptureFixture[str]) -> None:
    """An entry with output is never taken for one without it, nor the other way round."""
    plain = cache(version="1", name="same")(speak)
    assert plain(1) == 2
    replaying = cache(replay=True, version="1", name="same")(speak)
    assert replaying(1) == replaying(1) == plain(1) == 2
    assert said(capsys)[0] == SHOWN[0] * 3


def test_that_it_was_turned_on_is_explained() -> None:
    """Entries from before are named, and why they do not count."""
    cache(name="replay:turned")(speak)(1)
    told = str(cache(name="replay:turned", replay=True)(speak).explain(1))
    assert "the entry was stored with another choice of replay" in told


def test_methods(capsys: pytest.CaptureFixture[str]) -> None:
    """It works on methods, class methods and static methods."""

    class Sales:
        @cache(replay=True, version="1")
        def load(self, x: int) -> int:
            print("load")
            return x

        @classmethod
        @cache(replay=True, version="1")
        def make(cls, x: int) -> int:
            print("make")
            return x

        @staticmethod
        @cache(replay=True, version="1")
        def help(x: int) -> int:
            print("help")
            return x

    for _ in range(2):
        assert (Sales().load(1), Sales.make(1), Sales.help(1)) == (1, 1, 1)
        assert said(capsys)[0] == "load\nmake\nhelp\n"


def test_what_is_kept_is_bounded(capsys: pytest.CaptureFixture[str]) -> None:
    """Past a limit nothing more is kept, which a replay says; the first caller saw all of it."""
    many = replay.MAX_KEPT_OUTPUT // 100_000 + 10

    @cache(replay=True, version="1")
    def f(x: int) -> int:
        for _ in range(many):
            print("x" * 99_999)
        return x

    f(1)
    assert said(capsys)[0].count("\n") == many
    f(1)
    out, err = said(capsys)
    assert out.count("\n") == many - 10
    assert "not kept" in err


def test_output_that_was_replaced_takes_no_space() -> None:
    """Only what is kept counts: the last state of a display, and output since the last clearing."""
    page = "x" * (replay.MAX_KEPT_OUTPUT // 3)
    recorder = replay.Recorder()
    for number in range(10):
        named = {"transient": {"display_id": "page"}, "update": number > 0}
        recorder.display({"data": {"text/plain": f"{number}{page}"}, **named})
    assert [bundle["data"] for _, bundle in recorder.shown] == [{"text/plain": f"9{page}"}]
    for number in range(10):
        recorder.clear(wait=bool(number % 2))
        recorder.write("stdout", f"{number}{page}")
    assert recorder.shown == (("stdout", f"9{page}"),)


def test_a_broken_stream_costs_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hit whose output goes nowhere, as a pipe without a reader, still gives the result."""
    f = cache(replay=True, version="1")(speak)
    f(1)
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stdout", closed)
    monkeypatch.setattr(sys, "stderr", None)
    assert f(1) == 2


def test_streams_that_were_redirected_meanwhile(capsys: pytest.CaptureFixture[str]) -> None:
    """Code that redirects a stream gets the output, and afterwards everything is as it was."""
    from contextlib import redirect_stdout

    ours = sys.stdout

    @cache(replay=True, version="1")
    def f(x: int) -> int:
        print("shown")
        with redirect_stdout(io.StringIO()) as hidden:
            print("hidden")
        assert hidden.getvalue() == "hidden\n"
        return x

    for _ in range(2):
        f(1)
        assert said(capsys)[0] == "shown\n"
    assert sys.stdout is ours
    with redirect_stdout(io.StringIO()) as elsewhere:
        f(1)
        f.refresh(1)
    assert elsewhere.getvalue() == "shown\n" * 2
    assert sys.stdout is ours


@pytest.mark.parametrize("value", [1, "yes", None])
def test_it_is_a_flag(value: Any) -> None:
    """Anything but True or False is an error at decoration."""
    with pytest.raises(OptionError, match=r"replay=.* must be True or False"):
        cache(replay=value)


SCRIPT = """
from memo import cache
import sys
@cache(replay=True, version="1", name="script:f")
def f(x):
    print("printed", x)
    print("warned", x, file=sys.stderr)
    return x
print(f(1))
assert "IPython" not in sys.modules
"""


def test_in_scripts(tmp_path: Path) -> None:
    """Another process replays what the first one showed, without IPython."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=env, check=True
        )
        assert (done.stdout, done.stderr) == ("printed 1\n1\n", "warned 1\n")


TERMINAL = """
from memo import cache
from IPython.display import display
@cache(replay=True)
def f(x):
    print("printed")
    display("displayed")
    return x

f(1)
f(1)
"""


def test_in_a_terminal(tmp_path: Path) -> None:
    """IPython in a terminal shows a display as text, once each time."""
    command = [sys.executable, "-m", "IPython", "--no-banner", "--colors=NoColor"]
    done = subprocess.run(
        [*command, "--simple-prompt"],
        input=TERMINAL,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "dumb"},
        check=True,
    )
    assert done.stdout.count("printed\n") == done.stdout.count("'displayed'\n") == 2, done.stdout


# --- in a kernel ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    """A real kernel with memo loaded."""
    kernel = Kernel(tmp_path_factory.mktemp("kernel"))
    yield kernel
    kernel.close()


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_displays_come_back(kernel: Kernel, kind: str) -> None:
    """In a kernel displays are replayed too, in their order, in the cell that hits."""
    wait = "await " if kind == "async def" else ""
    kernel.run(f"""
        from IPython.display import HTML, display
        @cache(replay=True)
        {kind} shows(x):
            print("first")
            display(HTML("<b>shown</b>"))
            handle = display("begun", display_id=True)
            handle.update("done")
            print("last", file=sys.stderr)
            return x
        import sys
    """)
    first = kernel.run(f"r = {wait}shows('{kind}')")
    again = kernel.run(f"r = {wait}shows('{kind}')")
    for shown in (first, again):
        assert (shown.stdout, shown.stderr) == ("first\n", "last\n")
        assert shown.bundles[0]["text/html"] == "<b>shown</b>"
    assert len(again.bundles) == 2
    assert again.bundles[1]["text/plain"] == "'done'"
    left = "vars(get_ipython().display_pub).get('publish'), type(sys.stdout).__name__"
    assert kernel.run(f"print({left})").stdout == "None OutStream\n"


def test_widgets_are_not_replayed(kernel: Kernel) -> None:
    """Of a widget, whose model lives in one kernel only, the plain text comes back."""
    kernel.run("""
        import ipywidgets
        @cache(replay=True)
        def slides(x):
            display(ipywidgets.IntSlider(3))
            return x
    """)
    view = "application/vnd.jupyter.widget-view+json"
    assert view in kernel.run("r = slides(1)").bundles[0]
    again = kernel.run("r = slides(1)").bundles[0]
    assert view not in again
    assert "IntSlider" in again["text/plain"]


def test_a_cleared_output_is_cleared(kernel: Kernel) -> None:
    """Output that `clear_output` took away while the function ran does not come back."""
    kernel.run("""
        from IPython.display import clear_output
        @cache(replay=True)
        def clears(x):
            print("gone")
            clear_output(wait=True)
            print("stays")
            return x
        clears(1)
    """)
    assert kernel.run("r = clears(1)").stdout == "stays\n"


def test_other_tasks_of_a_kernel_are_not_in_a_cells_record(kernel: Kernel) -> None:
    """`%%cache` keeps what its own cell shows, not what a task of an earlier one prints."""
    kernel.run("""
        go = asyncio.Event()
        async def background():
            await go.wait()
            print("from the background")
        task = asyncio.create_task(background())
    """)
    cell = "%%cache\ngo.set()\nawait task\nprint('mine')"
    kernel.run(cell)
    assert kernel.run(cell).stdout == "mine\n"
