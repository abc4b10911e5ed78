"""`memo.dashboard()`: what it shows, and what its buttons do; see `test_lab.py` for the page."""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

import memo
from memo import cache
from memo.widget import _ESM, Model, call_of


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without anywidget: an error with the install line."""
    monkeypatch.setitem(sys.modules, "anywidget", None)
    with pytest.raises(memo.MissingExtraError, match=r"pip install 'jupyter-memo\[notebook\]'"):
        memo.dashboard()


def test_the_page_loads_nothing_from_elsewhere() -> None:
    """The page's module imports nothing, fetches nothing, and puts texts in as texts."""
    urls = set(re.findall(r"https?://[^\s\"'`]+", _ESM))
    assert urls == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"\bimport\b|fetch\(|innerHTML|insertAdjacentHTML|eval\(", _ESM)


def test_the_state_is_plain_data() -> None:
    """Rates, tiers, functions and the most expensive entries, most saved and most costly first."""

    @cache(name="etl:slow")
    def slow(region: str) -> str:
        time.sleep(0.05)
        return region

    @cache(name="quick")
    def quick(x: int) -> int:
        return x

    model = Model()
    assert model.state()["functions"] == []
    slow("EU"), slow("EU"), quick(1)
    state = model.state()
    assert state["rates"] == [[1, 0, 2]]
    assert [one["label"] for one in state["functions"]] == ["etl:slow", "quick"]
    assert {name for name, _, _ in state["tiers"]} >= {"memory", "disk"}
    model._listed = 0.0
    first, second = model.state()["entries"]
    assert (first["function"], first["arguments"]) == ("etl:slow", "region='EU'")
    assert first["refreshes"] is True
    assert second["function"] == "quick"
    assert model.state()["rates"][-1] == [0, 0, 0]


def test_what_is_under_way_is_shown() -> None:
    """Computations that run now are listed by function."""
    begun, go = threading.Event(), threading.Event()

    @cache(name="slow", version="1")
    def slow(x: int) -> int:
        begun.set()
        go.wait(5)
        return x

    thread = threading.Thread(target=slow, args=(1,))
    thread.start()
    begun.wait(5)
    assert Model().state()["flights"] == [["slow", "computing"]]
    go.set()
    thread.join()
    assert Model().state()["flights"] == []


def test_buttons_invalidate() -> None:
    """Invalidate drops one entry, or all of a function, and says what it did."""

    @cache(name="load")
    def load(region: str) -> str:
        return region

    load("EU"), load("US")
    model = Model()
    entry = next(e for e in model.state()["entries"] if "EU" in e["arguments"])
    model.press({"do": "invalidate", "key": entry["key"]})
    assert "Invalidated key load:EU (" in model.said
    assert not load.is_cached("EU")
    assert load.is_cached("US")
    model.press({"do": "invalidate", "function": "load"})
    assert "Invalidated load()" in model.said
    assert not load.is_cached("US")


@pytest.mark.parametrize("kind", ["def", "async def"])
async def test_buttons_refresh(kind: str) -> None:
    """Refresh computes an entry anew with the very arguments of its key."""
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
    (entry,) = model.state()["entries"]
    model.press({"do": "refresh", "key": entry["key"]})
    assert model.said == "Refreshing load:EU:2023"
    await memo.drain(5)
    assert calls == [("EU", 2023)] * 2
    assert load.peek("EU", 2023) == 2


def test_what_cannot_be_read_back_is_not_refreshed() -> None:
    """Where the summary has not all of the arguments, the button is off, and it says why."""

    @cache(name="load")
    def load(rows: list[int], name: str) -> int:
        return len(rows)

    load(list(range(100)), "x" * 300)
    model = Model()
    (entry,) = model.state()["entries"]
    assert entry["refreshes"] is False
    model.press({"do": "refresh", "key": entry["key"]})
    assert "by hand" in model.said
    header = model._headers[0][0]
    assert call_of(header) is None
    load([], "x")
    model._listed = 0.0
    whole = next(e for e in model.state()["entries"] if e["refreshes"])
    known = next(h for h, _ in model._headers if h.key == whole["key"])
    assert call_of(known) == (load, {"rows": [], "name": "x"})
    assert call_of(known._replace(key="0" * 40)) is None
    assert call_of(header._replace(summary='{"rows": ["__import__(\'os\')", ""]}')) is None


@pytest.mark.parametrize("message", [{}, {"key": "0" * 40}, {"function": "none"}, [1], None])
def test_strange_messages_do_nothing(message: Any) -> None:
    """A message that is none of ours breaks nothing."""
    Model().press(message)


@pytest.fixture
def widget() -> Iterator[Any]:
    """A dashboard outside of a kernel."""
    made = memo.dashboard()
    yield made
    made.close()


def test_it_looks_only_while_it_is_seen(widget: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ticker runs while there is a view, and ends with the last one or with `close()`."""

    def ticking() -> bool:
        return any(thread.name == "memo-renew" for thread in threading.enumerate())

    def settles(wanted: bool) -> bool:
        end = time.monotonic() + 3
        while ticking() != wanted and time.monotonic() < end:
            time.sleep(0.02)
        return ticking() == wanted

    assert not ticking()
    widget._handle_custom_msg({"do": "open"}, [])
    widget._handle_custom_msg({"do": "open"}, [])
    assert settles(True)

    @cache(name="load")
    def load(x: int) -> int:
        return x

    load(1)
    end = time.monotonic() + 4
    while not widget.state["functions"] and time.monotonic() < end:
        time.sleep(0.05)
    assert widget.state["functions"][0]["label"] == "load"
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
    assert widget.state["said"] == "That entry has gone."
