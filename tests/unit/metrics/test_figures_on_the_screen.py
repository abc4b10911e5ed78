"""Every figure that a person sees, against a stopwatch: concurrent, nested, shared and stale calls.

The stopwatch stands around each call and inside of each function.  A duration on the screen lies
between the two, so a busy machine moves the bounds and not the verdict.
"""

from __future__ import annotations

import asyncio
import re
import threading
import time
import xml.etree.ElementTree as ET
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
from click.testing import CliRunner
from sheets import Sheet
from time_ahead import Ahead
from waiting import until

import memo
from memo import cache
from memo.cli.commands import main
from memo.inspection.live_view import Model
from memo.metrics import rendering
from memo.metrics.recorder import open_span, reset
from memo.runtime.blocking import drain_blocking

SLACK = 0.003
"""Seconds by which clocks of different kinds may differ."""
PREEMPTED = 0.25
"""Seconds for which a busy machine may stop a thread between two neighbouring lines."""
UNITS = {"ns": 1e-9, "µs": 1e-6, "ms": 1e-3, "s": 1.0}
SPAN = re.compile(r"([\d.]+) (ns|µs|ms|s)\b")


class Span(NamedTuple):
    """The least and the most that a duration can be, in seconds."""

    least: float
    most: float

    def __add__(self, other: Any) -> Span:
        return Span(self.least + other.least, self.most + other.most)

    def __sub__(self, other: Span) -> Span:
        return Span(self.least - other.most, self.most - other.least)


NOTHING = Span(0.0, 0.0)


def shown(text: str) -> Span:
    """The durations that a text of rounded figures stands for."""
    found = SPAN.search(text)
    assert found, text
    half = 0.5 * 10.0 ** -len(found[1].partition(".")[2])
    unit = UNITS[found[2]]
    return Span((float(found[1]) - half) * unit, (float(found[1]) + half) * unit)


def agree(text: str, measured: Span, what: str) -> None:
    """A figure on the screen is one that the stopwatch allows."""
    told = shown(text)
    assert told.most >= measured.least - SLACK, f"{what}: {text} shown, {measured} measured"
    assert told.least <= measured.most + SLACK, f"{what}: {text} shown, {measured} measured"


class Stopwatch:
    """Measures calls from outside and functions from inside, by name."""

    def __init__(self) -> None:
        self.inside: dict[str, list[tuple[float, float]]] = defaultdict(list)
        self.outside: dict[str, list[tuple[float, float]]] = defaultdict(list)

    @contextmanager
    def body(self, name: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self.inside[name].append((begun, time.perf_counter()))

    def call(self, name: str, call: Callable[[], Any]) -> Any:
        begun = time.perf_counter()
        result = call()
        self.outside[name].append((begun, time.perf_counter()))
        return result

    async def acall(self, name: str, call: Callable[[], Awaitable[Any]]) -> Any:
        begun = time.perf_counter()
        result = await call()
        self.outside[name].append((begun, time.perf_counter()))
        return result

    def took(self, name: str) -> Span:
        """Seconds that the one computation of a call took."""
        return Span(self._only(self.inside[name]), self._only(self.outside[name]))

    def waited(self, name: str) -> Span:
        """Seconds that the one call of a name waited, which computed nothing."""
        return Span(0.0, self._only(self.outside[name]))

    def age(self, name: str) -> Span:
        """Seconds since the one computation of a call ended."""
        now = time.perf_counter()
        return Span(now - self.outside[name][0][1], now - self.inside[name][0][1])

    @staticmethod
    def _only(spans: list[tuple[float, float]]) -> float:
        ((begun, ended),) = spans
        return ended - begun


class Screens:
    """All that is shown of what happened: tables, graph, lines, and what the live view draws."""

    def __init__(self, line: str) -> None:
        self.line = line
        self.state = Model().state()
        self.headline: str = self.state["headline"]
        text = CliRunner().invoke(main, ["stats"]).output
        assert " ".join(text.split()).startswith(f"memo: {self.headline.rpartition(' · ')[0]}")

    def function(self, name: str) -> dict[str, str]:
        """The row of a function in the table: title -> text."""
        found = self.state["functions"]
        return next(row for row in _rows(found) if row["function"] == name)

    def entry(self, name: str, arguments: str = "") -> dict[str, str]:
        """The row of an entry in the live view, which `memo ls` and `%cache_ls` show too."""
        found = _rows(self.state["entries"])
        return next(r for r in found if (r["function"], r["arguments"]) == (name, arguments))

    def node(self, name: str, arguments: str = "") -> tuple[str, str]:
        """Of the node of a call: the text on it, and what it explains when it is pointed at."""
        for node in ET.fromstring(self.state["graph"]["svg"]).iter(f"{SVG}g"):
            texts = [one.text or "" for one in node.iter(f"{SVG}text")]
            if texts and texts[0] == name and texts[1] == arguments:
                return texts[2], (node.find(f"{SVG}title").text or "")  # type: ignore[union-attr]
        raise AssertionError(f"no node {name}({arguments})")

    def check_call(self, name: str, arguments: str, took: Span, age: Callable[[], Span]) -> None:
        """Cost and age of a call are the clock's in the list, on its node and in what that says."""
        row, (facts, explained) = self.entry(name, arguments), self.node(name, arguments)
        agree(row["cost"], took, "cost in the list")
        agree(row["age"], Span(0.0, age().most), "age in the list")
        agree(facts, took, "time on the node")
        agree(_after("computing took", explained), took, "time that the node explains")
        agree(_after("computed", explained.splitlines()[-1]), Span(0.0, age().most), "its age")


SVG = "{http://www.w3.org/2000/svg}"


def _rows(table: dict[str, Any]) -> list[dict[str, str]]:
    cells = [[cell["text"] for cell in row["cells"]] for row in table["rows"]]
    return [dict(zip(table["titles"], texts, strict=True)) for texts in cells]


def _after(word: str, text: str) -> str:
    assert word in text, text
    return text.partition(word)[2]


@pytest.fixture
def watches(sheet: Sheet) -> Stopwatch:
    """Count from zero, after a call for which modules are imported and files are made."""

    @cache(version="1", name="first")
    def first() -> None: ...

    first()
    memo.invalidate(function="first")
    reset()
    return Stopwatch()


def test_concurrent_calls(watches: Stopwatch, sheet: Sheet, ahead: Ahead) -> None:
    """Three calls at once, then three hits: each took its own time, and saves no more than that."""

    @cache(name="load", version="1", ttl=3600)
    async def load(x: int) -> int:
        with watches.body(f"load {x}"):
            await sheet.shows("load()")
            await turns[x].wait()
            ahead.work(0.1 * x)
            turns[x + 1].set()
        return x

    async def run(note: str) -> None:
        await asyncio.gather(*(watches.acall(f"{note} {x}", lambda x=x: load(x)) for x in range(3)))

    turns = [asyncio.Event() for _ in range(4)]
    turns[0].set()
    span = open_span()
    watches.call("all", lambda: asyncio.run(run("load")))
    asyncio.run(run("again"))
    span.end()
    screens = Screens(rendering.report(span))

    each = [watches.took(f"load {x}") for x in range(3)]
    again = [watches.waited(f"again {x}") for x in range(3)]
    computing, saved = sum(each, NOTHING), sum(each, NOTHING) - sum(again, NOTHING)
    row = screens.function("load")
    assert [row[title] for title in ("hits", "misses", "answered")] == ["3", "3", "50 %"]
    agree(row["computing"], computing, "computing")
    agree(row["saved"], saved, "saved in the table")
    agree(_after("saved", screens.headline), saved, "saved in the headline")
    agree(_after("saved", screens.line), saved, "saved under the cell")
    assert screens.line.startswith("3 hits (memory) · 3 misses: load() not cached yet (3")
    median = sorted(one.most for one in again)
    agree(row["median hit"], Span(0.0, median[2] * 1.05), "median hit")
    for x in range(3):
        screens.check_call("load", f"x={x}", each[x], lambda x=x: watches.age(f"load {x}"))
    (line,) = sheet.lines
    told = re.fullmatch(r"load\(\): 3 in ([\d.]+ m?s), ([\d.]+ m?s) each", line)
    assert told, line
    bodies = [watches.inside[f"load {x}"][0] for x in range(3)]
    whole = Span(max(e for _, e in bodies) - min(b for b, _ in bodies), watches.waited("all").most)
    agree(told[1], whole, "all of them in progress")
    agree(told[2], Span(computing.least / 3, computing.most / 3), "each in progress")


def test_nested_calls(watches: Stopwatch, sheet: Sheet, ahead: Ahead) -> None:
    """The time that a call spends in another cached call is counted there, and once."""

    @cache(name="load", version="1", ttl=3600)
    def load() -> int:
        with watches.body("load"):
            until(lambda: sheet.has("load()"))
        return 1

    @cache(name="report", version="1", ttl=3600)
    def report() -> int:
        with watches.body("report"):
            ahead.work(0.2)
            return int(watches.call("load", load))

    span = open_span()
    watches.call("report", report)
    watches.call("again", report)
    span.end()
    screens = Screens(rendering.report(span))

    inner, outer, again = watches.took("load"), watches.took("report"), watches.waited("again")
    own = outer - inner
    assert own.least > 0.1
    agree(screens.function("load")["computing"], inner, "computing of the inner one")
    agree(screens.function("report")["computing"], own, "computing of the outer one")
    agree(screens.function("report")["saved"], outer - again, "saved")
    assert screens.function("load")["saved"] == "0 s"
    agree(_after("saved", screens.headline), outer - again, "saved in the headline")
    agree(_after("saved", screens.line), outer - again, "saved under the cell")
    assert screens.headline.startswith("1 hit · 2 misses · 33.3 % answered")
    screens.check_call("load", "", inner, lambda: watches.age("load"))
    screens.check_call("report", "", outer, lambda: watches.age("report"))
    first, second = sheet.lines
    agree(_after("report() took", first), outer, "the outer one in progress")
    agree(_after("  load() took", second), inner, "the inner one in progress")
    said = str(report.explain())
    agree(_after("computed", said), watches.age("report"), "age in what explain says")
    agree(re.split(r" by \S+ in ", said)[1], outer, "cost in what explain says")


def test_calls_that_share_a_computation(watches: Stopwatch, sheet: Sheet, ahead: Ahead) -> None:
    """A caller that joins half-way saves the half that it did not wait for; others nothing."""

    @cache(name="load", version="1", ttl=3600)
    async def load() -> int:
        with watches.body("load"):
            begun.set()
            await half.wait()
            await sheet.shows("load()")
            ahead.work(0.2)
        return 1

    async def run() -> None:
        calls = [asyncio.ensure_future(watches.acall(n, load)) for n in ("load", "at once")]
        await begun.wait()
        ahead.work(0.4)
        calls.append(asyncio.ensure_future(watches.acall("late", load)))
        await asyncio.sleep(0)
        half.set()
        await asyncio.gather(*calls)

    begun, half = asyncio.Event(), asyncio.Event()
    span = open_span()
    asyncio.run(run())
    span.end()
    screens = Screens(rendering.report(span))

    took, late = watches.took("load"), watches.waited("late").most
    saved = Span(max(0.0, took.least - late), took.most - late + 2 * PREEMPTED)
    row = screens.function("load")
    assert [row[title] for title in ("hits", "misses", "shared", "answered")] == [
        *("0", "1", "2", "66.7 %")
    ]
    agree(row["computing"], took, "computing")
    for text in (row["saved"], _after("saved", screens.headline), _after("saved", screens.line)):
        agree(text, saved, "saved")
    assert screens.headline.startswith("0 hits · 1 miss · 2 shared · 66.7 % answered")
    assert screens.line.startswith("1 miss: load() not cached yet · 2 shared · saved ")
    screens.check_call("load", "", took, lambda: watches.age("load"))
    (line,) = sheet.lines
    agree(_after("load() took", line), took, "progress")


def test_stale_calls(watches: Stopwatch, ahead: Ahead) -> None:
    """A stale answer saves its cost once; its refresh is computing, and waiting for no caller."""

    @cache(name="load", version="1", ttl=0.3, stale_while_revalidate=3600)
    def load() -> int:
        with watches.body(names.pop(0)):
            ahead.work(0.4)
        return 1

    names = ["load", "refresh"]
    watches.call("load", load)
    until(lambda: "expired" in str(load.explain()))
    said = str(load.explain())
    beyond = watches.age("load") - Span(0.3, 0.3)
    agree(_after("expired", said), Span(0.0, beyond.most), "time since it expired")
    agree(re.split(r" by \S+ in ", said)[1], watches.took("load"), "cost in what explain says")
    assert Model().state()["entries"]["rows"][0]["cells"][2]["text"] == "stale"
    span = open_span()
    begun = time.perf_counter()
    watches.call("stale", load)
    until(lambda: watches.inside["refresh"])
    assert drain_blocking(20)
    ended = time.perf_counter()
    span.end()
    screens = Screens(rendering.report(span))

    took = watches.took("load")
    refreshed = Span(Stopwatch._only(watches.inside["refresh"]), ended - begun)
    saved = took - watches.waited("stale")
    row = screens.function("load")
    assert [row[title] for title in ("hits", "stale", "misses", "refreshed")] == ["0", *"111"]
    agree(row["computing"], took + refreshed, "computing")
    agree(row["saved"], saved, "saved in the table")
    agree(_after("saved", screens.headline), saved, "saved in the headline")
    assert screens.line.startswith("1 stale, refreshed · saved ")
    agree(_after("saved", screens.line), saved, "saved under the cell")
    entry = screens.entry("load")
    agree(entry["cost"], refreshed, "cost of the refreshed entry")
    agree(entry["age"], Span(0.0, time.perf_counter() - watches.inside["refresh"][0][1]), "age")


def test_what_is_under_way(watches: Stopwatch) -> None:
    """A running computation shows for how long it has run, and how long it took the last time."""

    @cache(name="load", version="1")
    def load(x: int) -> int:
        with watches.body(names.pop(0)):
            ran.set()
            go.wait(20)
        return 1

    names, ran, go = ["load", "another", "later"], threading.Event(), threading.Event()
    threading.Timer(0.3, go.set).start()
    watches.call("load", lambda: load(1))
    load(2)  # another call of the function took less
    load.invalidate(1)
    go.clear(), ran.clear()
    begun = time.perf_counter()
    thread = threading.Thread(target=load, args=(1,))
    thread.start()
    try:
        assert ran.wait(20)
        computing = time.perf_counter()
        until(lambda: time.perf_counter() - computing > 0.2)
        before = time.perf_counter()
        (run,) = Model().state()["running"]
        after = time.perf_counter()
    finally:
        go.set()
        thread.join()
    agree(run["spent"], Span(before - computing, after - begun), "time so far")
    agree(run["about"], watches.took("load"), "time that it is expected to take")
    share = shown(run["spent"]).least / shown(run["about"]).least
    assert run["share"] == pytest.approx(min(1.0, share), abs=0.05)
