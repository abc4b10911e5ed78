"""The live view as data: what it shows, and what its buttons do; pages: `test_browser.py`."""

from __future__ import annotations

import math
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib import resources
from typing import Any

import pytest
from time_ahead import Ahead
from waiting import until, wait_for

import memo
from memo import cache
from memo.inspection.live_view import Model, call_of
from memo.metrics.recorder import reset
from memo.metrics.running_computations import COMPUTATIONS
from memo.settings import configuration
from memo.testing import recording


@pytest.fixture(autouse=True)
def _from_zero() -> None:
    reset()


def row(state: dict[str, Any], text: str) -> dict[str, Any]:
    """The entry that has a text among its cells."""
    rows = state["entries"]["rows"]
    return next(r for r in rows if any(text in cell["text"] for cell in r["cells"]))


def looked(model: Model) -> dict[str, Any]:
    """The state, with the entries as they are now."""
    model.list_at = 0.0
    return model.state()


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without anywidget: an error with the install line."""
    monkeypatch.setitem(sys.modules, "anywidget", None)
    with pytest.raises(memo.MissingExtraError, match=r"pip install 'jupyter-memo\[notebook\]'"):
        memo.dashboard()


def test_the_page_loads_nothing_from_elsewhere() -> None:
    """The page's files name no other host, and put every text in as text."""
    view, tables = (resources.files("memo") / at / "static" for at in ("inspection", "metrics"))
    files = [view / "view.js", view / "page.js", view / "view.css"]
    for file in (*files, tables / "sort.js", tables / "tables.css"):
        text = file.read_text("utf-8")
        assert set(re.findall(r"https?://[^\s\"'`]+", text)) <= {"http://www.w3.org/2000/svg"}
        assert not re.search(r"innerHTML|insertAdjacentHTML|eval\(|@import|url\(", text)


def test_the_state_is_what_happened(ahead: Ahead) -> None:
    """Functions with their plot, entries with their state and shape, the graph, and the tiers."""

    @cache(name="etl:slow", version="1")
    def slow(region: str) -> list[str]:
        ahead.work(0.05)
        return [region] * 3

    @cache(name="etl:sum")
    def total() -> int:
        return len(slow("EU"))

    model = Model()
    assert model.state()["functions"]["rows"] == []
    total(), slow("EU")
    state = looked(model)
    found = {r["cells"][0]["text"]: r for r in state["functions"]["rows"]}
    assert list(found) == ["etl:slow", "etl:sum"]
    assert found["etl:slow"]["here"] is True
    points = found["etl:slow"]["plot"]["points"]
    assert [sum(p[i] for p in points) for i in (1, 2, 3)] == [1, 0, 1]
    assert {name for name, _, _ in state["tiers"]} >= {"memory", "disk"}
    entry = row(state, "region='EU'")
    assert entry["preview"].startswith("list of 3")
    assert entry["why"] == ""
    assert "etl:slow" in state["graph"]["svg"]


def test_what_this_notebook_defines_comes_first() -> None:
    """Entries of other notebooks and scripts come after this one's, also where they are newer."""

    @cache(name="mine", version="1")
    def mine(x: int) -> int:
        return x

    mine(1)
    source = "from memo import cache\ncache(abs, name='theirs', version='1')(1)"
    subprocess.run([sys.executable, "-c", source], check=True)
    names = [r["cells"][0]["text"] for r in Model().state()["entries"]["rows"]]
    assert names == ["mine", "theirs"]


def test_no_value_is_in_what_is_shown() -> None:
    """The type and the size of a value are shown, nothing of what it holds."""

    @cache(name="load")
    def load(x: int) -> str:
        return "confidential"

    load(1)
    state = Model().state()
    assert row(state, "x=1")["preview"].startswith("str of 12")
    assert "confidential" not in str(state)


def test_what_is_under_way_is_shown() -> None:
    """A computation that runs is listed with its arguments, since when, and how long it will."""
    begun, go = threading.Event(), threading.Event()

    @cache(name="slow", version="1")
    def slow(x: int) -> int:
        begun.set()
        go.wait(5)
        return x

    go.set()
    slow(0)
    go.clear(), begun.clear()
    thread = threading.Thread(target=slow, args=(1,))
    at = time.time()
    thread.start()
    try:
        assert begun.wait(5)
        (run,) = Model().state()["running"]
    finally:
        go.set()
        thread.join()
    assert (run["function"], run["call"], run["doing"]) == ("slow", "slow:1", "computing")
    assert run["since"] == pytest.approx(at, abs=0.5)
    assert run["about"]
    assert run["share"] is not None
    assert Model().state()["running"] == []


def _whole(x: Any) -> list[Any]:
    return _runs(x)


def _items(x: Any) -> Iterator[Any]:
    yield from _runs(x)


def _runs(x: Any) -> list[Any]:
    BEGUN.set()
    assert GO.wait(20)
    if FAILS.is_set():
        raise ValueError
    return [x]


BEGUN, GO, FAILS = threading.Event(), threading.Event(), threading.Event()


@pytest.mark.parametrize(
    ("run", "options"),
    [
        (_whole, {"name": "fails:whole"}),
        (_whole, {"name": "fails:each", "each": "x"}),
        (_items, {"name": "fails:items"}),
    ],
    ids=["whole", "each", "generator"],
)
def test_a_failed_run_says_nothing_of_the_next(run: Any, options: Any) -> None:
    """The time of a run that raised, or was left, is not expected of the next one."""
    load = cache(version="1", **options)(run)
    for event in (BEGUN, FAILS):
        event.clear()
    GO.set(), FAILS.set()
    with recording() as heard, suppress(ValueError):
        list(load([1]))
    assert [one.detail for one in heard if one.kind == "compute_ended"] == ["ValueError"]
    for event in (BEGUN, FAILS, GO):
        event.clear()
    thread = threading.Thread(target=lambda: list(load([1])))
    thread.start()
    try:
        assert BEGUN.wait(20)
        (shown,) = Model().state()["running"]
    finally:
        GO.set()
        thread.join()
    assert shown["about"] == ""
    assert shown["share"] is None


def test_a_stream_that_is_left_says_nothing_of_the_next() -> None:
    """A generator that its consumer has left has not ended as it would have."""

    @cache(name="rows", version="1")
    def rows() -> Iterator[int]:
        yield 1
        yield 2

    with recording() as heard:
        made = rows()
        next(made), made.close()
        list(rows())
    assert [e.detail for e in heard if e.kind == "compute_ended"] == ["interrupted", ""]


def test_the_graph_follows_long_computations() -> None:
    """It is drawn anew when one has begun and when it has ended, not only every few seconds."""
    begun, go = threading.Event(), threading.Event()

    @cache(name="slow", version="1")
    def slow(x: int) -> int:
        begun.set()
        go.wait(20)
        return x

    model = Model(every=math.inf)  # longer than this machine has been up
    model.state()
    thread = threading.Thread(target=slow, args=(1,))
    thread.start()
    try:
        assert begun.wait(5)
        until(lambda: 'data-state="running"' in model.state()["graph"]["svg"])
    finally:
        go.set()
        thread.join()
    assert 'data-state="computed"' in model.state()["graph"]["svg"]


WORKER = """
import sys, time
from memo import cache
@cache(name="far", version="1")
def far(x):
    print("running", flush=True)
    sys.stdin.readline()
    return x
far(7)
print("over", flush=True)
sys.stdin.readline()
"""


def worker() -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WORKER]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)


def test_what_runs_in_other_processes_is_shown() -> None:
    """Three processes that compute are seen while they do; one that ends or is killed is not."""
    model = Model(shared=True)
    started = [worker() for _ in range(3)]
    try:
        for one in started:
            assert one.stdout is not None
            assert one.stdout.readline() == "running\n"
        state = looked(model)
        assert {run["call"] for run in state["running"]} == {"far:7"}
        processes = {f"process {one.pid}" for one in started}
        assert {run["where"] for run in state["running"]} == processes
        first, killed, _ = started
        assert first.stdin is not None
        assert first.stdout is not None
        first.stdin.write("\n"), first.stdin.flush()
        assert first.stdout.readline() == "over\n"
        killed.kill(), killed.wait()
        left = {run["where"] for run in looked(model)["running"]}
        assert left == {f"process {started[2].pid}"}
    finally:
        for one in started:
            one.kill(), one.communicate()


TWICE = """
import sys, threading
from memo import cache
@cache(name="twice", version="1")
def twice(x):
    sys.stdout.write("running\\n"), sys.stdout.flush()  # in one write
    assert go.wait(20)
    return x
go = threading.Event()
threads = [threading.Thread(target=twice.refresh, args=(7,)) for _ in range(2)]
[thread.start() for thread in threads]
sys.stdin.readline()
go.set()
[thread.join() for thread in threads]
print("over", flush=True)
sys.stdin.readline()
"""


def test_two_computations_of_one_call_are_shown_until_both_have_ended() -> None:
    """Two refreshes of one call at the same time are two lines, and neither is left behind."""
    command, pipe = [sys.executable, "-c", TWICE], subprocess.PIPE
    one = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
    model = Model(shared=True)
    try:
        assert one.stdout is not None
        assert one.stdin is not None
        assert [one.stdout.readline() for _ in range(2)] == ["running\n"] * 2
        assert [run["call"] for run in looked(model)["running"]] == ["twice:7"] * 2
        one.stdin.write("\n"), one.stdin.flush()
        assert one.stdout.readline() == "over\n"
        assert looked(model)["running"] == []
    finally:
        one.kill(), one.communicate()


def test_a_process_is_counted_while_it_computes() -> None:
    """Its calls so far are in the figures of all processes, not only at the end of a long one."""
    quick = "quick = cache(abs, name='quick', version='1')\nquick(1), quick(1)\nfar(7)"
    source = WORKER.replace("far(7)", quick)
    pipe = subprocess.PIPE
    one = subprocess.Popen([sys.executable, "-c", source], stdin=pipe, stdout=pipe, text=True)
    try:
        assert one.stdout is not None
        assert one.stdout.readline() == "running\n"
        until(lambda: Model(shared=True).state()["headline"].startswith("1 hit · 2 misses"))
    finally:
        one.kill(), one.communicate()


def test_the_file_of_what_runs_goes_with_the_process() -> None:
    """A process takes its file away at its end."""
    done = worker()
    assert done.stdout is not None
    done.stdout.readline()
    folder = configuration.home() / "stats"
    assert [p for p in folder.glob("*.now") if p.stem.startswith(f"{done.pid}-")]
    done.communicate("\n\n")
    assert not [p for p in folder.glob("*.now") if p.stem.startswith(f"{done.pid}-")]
    COMPUTATIONS.close()


def test_buttons_invalidate_and_say_what_goes_with_it() -> None:
    """Invalidate drops one entry and what was built on it, or all of a function, and says which."""

    @cache(name="load")
    def load(region: str) -> str:
        return region

    @cache(name="report")
    def report() -> str:
        return load("EU")

    report(), load("US")
    model = Model()
    entry = row(model.state(), "region='EU'")
    model.press({"do": "invalidate", "key": entry["key"]})
    said = model.said[entry["key"]]
    assert "load(region='EU')" in said
    assert "report()" in said
    assert "US" not in said
    assert not load.is_cached("EU")
    assert not report.is_cached()
    assert load.is_cached("US")
    model.press({"do": "invalidate", "function": "load"})
    assert "load(region='US')" in model.said["load"]
    assert not load.is_cached("US")
    model.press({"do": "invalidate", "function": "load"})
    assert "No entry here was still valid" in model.said["load"]


@pytest.mark.parametrize("path", ["data/*.csv", "x" * 50_000, "0" * 40])
def test_the_button_invalidates_an_entry_whatever_its_address_is(path: str) -> None:
    """An address may contain a `*`, be shortened in the header, or look like a key."""

    @cache(key_resolver="{path}")
    def load(path: str) -> int:
        return 1

    load(path), load("another")
    model = Model()
    entry = next(r for r in model.state()["entries"]["rows"] if "another" not in str(r["cells"]))
    model.press({"do": "invalidate", "key": entry["key"]})
    assert model.said[entry["key"]].startswith("Invalidated")
    assert not load.is_cached(path)
    assert load.is_cached("another")


def test_the_filter_narrows_the_entries_down() -> None:
    """Words of the filter are looked for in names, arguments, states and tiers."""

    @cache(name="load")
    def load(region: str) -> str:
        return region

    load("EU"), load("US")
    load.invalidate("US")
    model = Model()
    model.press({"do": "show", "filter": "load invalidated"})
    rows = model.state()["entries"]["rows"]
    assert [r["cells"][1]["text"] for r in rows] == ["region='US'"]
    model.press({"do": "show", "filter": "nothing like it"})
    assert model.state()["entries"]["count"] == 0


@pytest.mark.parametrize("kind", ["def", "async def"])
async def test_buttons_refresh(kind: str) -> None:
    """Refresh computes an entry again with the very arguments of its key."""
    calls: list[Any] = []
    if kind == "def":

        @cache(name="load", version="1")
        def load(region: str, year: int = 2024) -> int:
            calls.append((region, year))
            return len(calls)

        load("EU", year=2023)
    else:

        @cache(name="load", version="1")
        async def load(region: str, year: int = 2024) -> int:
            calls.append((region, year))
            return len(calls)

        await load("EU", year=2023)
    model = Model()
    (entry,) = model.state()["entries"]["rows"]
    model.press({"do": "refresh", "key": entry["key"]})
    said = model.said[entry["key"]]
    assert said == "Refreshing load(region='EU', year=2023) in the background."
    first = model.state()["answers"][entry["key"]]
    await memo.drain(5)
    assert calls == [("EU", 2023)] * 2
    assert load.peek("EU", 2023) == 2
    model.press({"do": "refresh", "key": entry["key"]})
    assert model.said[entry["key"]] == said
    assert model.state()["answers"][entry["key"]] != first, "the page waits for another answer"
    await memo.drain(5)


def test_what_cannot_be_read_back_is_not_refreshed() -> None:
    """If the summary does not have all arguments, the button is off, and it says why."""

    @cache(name="load")
    def load(rows: list[int], name: str) -> int:
        return len(rows)

    load(list(range(100)), "x" * 300)
    model = Model()
    (entry,) = model.state()["entries"]["rows"]
    assert "by hand" in entry["why"]
    model.press({"do": "refresh", "key": entry["key"]})
    assert "by hand" in model.said[entry["key"]]
    header = model.items[0].header
    assert call_of(header) is None
    load([], "x")
    whole = next(r for r in looked(model)["entries"]["rows"] if not r["why"])
    known = next(item.header for item in model.items if item.header.key == whole["key"])
    assert call_of(known) == (load, {"rows": [], "name": "x"})
    assert call_of(known._replace(key="0" * 40)) is None
    assert call_of(header._replace(summary='{"rows": ["__import__(\'os\')", ""]}')) is None


def test_an_element_is_not_refreshed_alone() -> None:
    """The button is off for an element of a collection, and says why."""

    @cache(name="load", each="ids")
    def load(ids: list[int]) -> list[int]:
        return ids

    load([1, 2])
    model = Model()
    entry = row(model.state(), "ids=1")
    assert "one element of a collection" in entry["why"]
    model.press({"do": "refresh", "key": entry["key"]})
    assert "one element of a collection" in model.said[entry["key"]]


@pytest.mark.parametrize(
    "message", [{}, {"key": "0" * 40}, {"do": "show", "order": 3}, {"do": "x"}, [1], None]
)
def test_strange_messages_do_nothing(message: Any) -> None:
    """A message that is none of ours breaks nothing."""
    model = Model()
    model.press(message)
    assert model.state()["entries"]["count"] == 0


@pytest.fixture
def widget() -> Iterator[Any]:
    """A dashboard outside of a kernel."""
    made = memo.dashboard()
    yield made
    made.close()


def test_it_looks_only_while_it_is_seen(widget: Any) -> None:
    """The ticker runs while there is a view, and ends with the last one or with `close()`."""

    def ticking() -> bool:
        return any(thread.name == "memo-show" for thread in threading.enumerate())

    def settles(wanted: bool) -> bool:
        return wait_for(lambda: ticking() == wanted)

    assert not ticking()
    widget._handle_custom_msg({"do": "open"}, [])
    widget._handle_custom_msg({"do": "open"}, [])
    assert settles(True)

    @cache(name="load")
    def load(x: int) -> int:
        return x

    load(1)
    until(lambda: widget.state["functions"]["rows"])
    assert widget.state["functions"]["rows"][0]["cells"][0]["text"] == "load"
    widget._handle_custom_msg({"do": "shut"}, [])
    assert ticking()
    widget._handle_custom_msg({"do": "shut"}, [])
    assert settles(False)
    widget._handle_custom_msg({"do": "open"}, [])
    assert settles(True)
    widget.close()
    assert settles(False)


def test_a_button_changes_what_is_shown_at_once(widget: Any) -> None:
    """The answer to a button is in the next state, without waiting for a look."""
    widget._handle_custom_msg({"do": "invalidate", "key": "gone"}, [])
    assert widget.state["said"] == {"gone": "That entry no longer exists."}


def test_without_scripts_the_same_facts_are_shown(widget: Any) -> None:
    """If no widget is drawn, the output has the tables and the graph as SVG."""

    @cache(name="load")
    def load(region: str) -> str:
        return region

    load("EU")
    widget.model.list_at = 0.0
    data, _ = widget._repr_mimebundle_()
    assert "<svg" in data["text/html"]
    assert "region=&#x27;EU&#x27;" in data["text/html"]
    assert "region='EU'" in data["text/plain"]
    assert "object at 0x" not in data["text/plain"]
