"""`f.explain`: would a call hit, and if not, why; every reason, as text and as HTML."""

from __future__ import annotations

import importlib
import math
import os
import re
import sys
import threading
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from ports import blocking
from providers import InADict

import memo
from memo import cache
from memo.decorators import assembly
from memo.engine.explaining import Explanation, list_headers
from memo.runtime import events
from memo.testing import ManualClock, isolated, recording


@pytest.fixture
def clock() -> Iterator[ManualClock]:
    """An empty cache on a clock that the test moves."""
    clock = ManualClock()
    with isolated(clock=clock):
        yield clock


def shows(explanation: Explanation, *wanted: str) -> None:
    """The text and the HTML say all of this, the HTML escaped."""
    text, html = str(explanation), explanation._repr_html_()
    plain = unescape(re.sub(r"<style>.*?</style>|<[^>]*>", "", html, flags=re.DOTALL))
    assert repr(explanation) == text
    for part in wanted:
        assert part in text
        assert part in plain


class Code:
    """A module on disk that a test edits and loads again."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "pipe_under_test.py"

    def load(self, source: str) -> Any:
        self.path.write_text("from memo import cache\n" + source)
        importlib.invalidate_caches()
        sys.modules.pop(self.path.stem, None)
        for cached in self.path.parent.glob("__pycache__/*"):
            cached.unlink()
        return importlib.import_module(self.path.stem)


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Code]:
    """A module that is edited."""
    monkeypatch.syspath_prepend(str(tmp_path))
    yield Code(tmp_path)
    sys.modules.pop("pipe_under_test", None)


# --- hits -----------------------------------------------------------------------------------------


def test_a_hit_says_where_and_how_long(clock: ManualClock) -> None:
    """A hit names its tier, its age, the process that computed it, and how long it is fresh."""

    @cache(ttl=60, name="load")
    def load(region: str) -> str:
        return region

    load("EU")
    clock.advance(20)
    explanation = load.explain("EU")
    assert explanation.hit
    assert explanation.reason == "fresh"
    shows(
        explanation, "load:EU: hit", "in memory, computed 20.0 s ago by ", "fresh for 40.0 s more"
    )


def test_a_stale_hit_says_that_it_is_refreshed(clock: ManualClock) -> None:
    """A value past its ttl but within its stale window is a hit that is refreshed."""

    @cache(ttl=60, stale_while_revalidate=60, name="load")
    def load(region: str) -> str:
        return region

    load("EU")
    clock.advance(60)
    shows(load.explain("EU"), "hit (stale)", "; expired 0 s ago")
    clock.advance(1)
    explanation = load.explain("EU")
    assert explanation.hit
    assert explanation.reason == "stale"
    shows(explanation, "answers at once and refreshes it (expired)")


def test_a_hit_goes_by_the_ttl_that_judges_it(clock: ManualClock) -> None:
    """The remaining time is that by the live ttl, and by the ttl of `using`, not the stored one."""

    @cache(ttl=60, ttl_key="ttl.load", name="load")
    def load(region: str) -> str:
        return region

    load("EU")
    memo.live.set("ttl.load", 1000)
    clock.advance(500)
    shows(load.explain("EU"), "load:EU: hit (fresh)", "fresh for 8 min 20 s more")
    memo.live.set("ttl.load", math.inf)
    shows(load.explain("EU"), "load:EU: hit (fresh)", "no expiry")

    @cache(ttl=None, name="plain")
    def plain(region: str) -> str:
        return region

    plain("EU")
    clock.advance(20)
    shows(plain.using(ttl=60).explain("EU"), "fresh for 40.0 s more")


def test_a_hit_that_was_let_expire_says_so(clock: ManualClock) -> None:
    """`memo.expire` ends its freshness, whatever is left of the ttl, and is named."""

    @cache(ttl=3600, stale_while_revalidate=60, name="load")
    def load(region: str) -> str:
        return region

    load("EU")
    memo.expire(function=load, reason="new prices")
    explanation = load.explain("EU")
    assert (explanation.hit, explanation.reason) == (True, "stale")
    shows(explanation, "; expired", "function load expired", "new prices")
    assert "fresh for" not in str(explanation)


def test_explaining_neither_computes_nor_loads(clock: ManualClock) -> None:
    """`explain` runs nothing, unpickles nothing and counts nothing."""
    ran: list[str] = []

    class Loud:
        def __reduce__(self) -> Any:
            return _loud, ()

    @cache(name="load")
    def load(region: str) -> Any:
        ran.append(region)
        return Loud()

    load("EU")
    loads.clear()
    with recording() as heard:
        load.explain("EU")
        load.explain("US")
        memo.explain(load, "EU")
    assert ran == ["EU"]
    assert not loads
    assert not [e for e in heard if e.kind in (events.HIT, events.MISS, events.COMPUTED)]


loads: list[int] = []


def _loud() -> int:
    loads.append(1)
    return 1


# --- misses ---------------------------------------------------------------------------------------


def test_never_computed(clock: ManualClock) -> None:
    """Without any entry of the function: not cached yet."""

    @cache(name="load")
    def load(region: str) -> str:
        return region

    explanation = load.explain("EU")
    assert not explanation.hit
    assert explanation.reason == "not cached yet"
    shows(explanation, "load:EU: miss (not cached yet)", "no entry of this function")


def test_other_arguments_are_named_with_both_values(clock: ManualClock) -> None:
    """It names the argument that differs from the nearest entry, with both summaries."""

    @cache(name="load")
    def load(region: str, year: int, full: bool = False) -> str:
        return region

    load("EU", 2023)
    load("US", 2020, True)
    explanation = load.explain("EU", year=2024)
    assert explanation.reason == "other arguments"
    shows(explanation, "year is 2024; the nearest entry has 2023", "the nearest of 2 entries")
    assert "region is" not in str(explanation)


def test_big_arguments_are_named_by_their_shape(clock: ManualClock) -> None:
    """Frames are summed up by their shapes, and secrets not at all."""
    import pandas as pd

    @cache(name="fit")
    def fit(frame: Any, api_key: str) -> int:
        return len(frame)

    fit(pd.DataFrame({"a": [1, 2]}), "one")
    explanation = fit.explain(pd.DataFrame({"a": [1, 2, 3]}), "other")
    shows(explanation, "frame is DataFrame 3x1; the nearest entry has DataFrame 2x1")
    shows(explanation, "api_key is not that of the nearest entry", "the only entry")
    again = fit.explain(pd.DataFrame({"a": [1, 3]}), "one")
    shows(again, "frame is another DataFrame 2x1 than that of the nearest entry")


def test_containers_are_shown_while_they_are_short(clock: ManualClock) -> None:
    """A short nested argument is written out; a long one, or one with a secret, is summed up."""

    @cache(name="fit")
    def fit(options: Any) -> int:
        return 1

    fit({"a": [1, 2], "b": {"c": None}})
    shows(
        fit.explain({"a": [1, 3]}), "options is {'a': [1, 3]}; the nearest entry has {'a': [1, 2]"
    )
    fit.cache_clear()
    fit({"deep": {"token": "hunter2"}})
    hidden = str(fit.explain({"deep": {"token": "hunter3"}}))
    assert "options is another dict of 1" in hidden
    assert "hunter" not in hidden
    assert "dict of 100" in str(fit.explain({n: n for n in range(100)}))
    assert "list of 1;" in str(fit.explain([[10**400]]))


class Shop:
    """A class whose methods are explained."""

    def __init__(self, tenant: str) -> None:
        self.tenant = tenant

    def __cache_key__(self) -> str:
        return self.tenant

    @cache(name="shop_load")
    def load(self, x: int) -> int:
        return self.helper(x)

    def helper(self, x: int) -> int:
        return x

    @cache(name="shop_make")
    @classmethod
    def make(cls, x: int) -> int:
        return x


class Branch(Shop):
    """A class with another helper."""

    def helper(self, x: int) -> int:
        return x + 1


def test_another_class_or_instance_is_named(clock: ManualClock) -> None:
    """An entry of another class, or of an instance with another key, is no edit of the code."""
    Shop("a").load(1)
    Shop.make(1)
    shows(Shop("b").load.explain(1), "self is Shop('b'); the nearest entry has Shop('a')")
    shows(Branch("a").load.explain(1), "self is Branch('a'); the nearest entry has Shop('a')")
    shows(Branch.make.explain(1), "cls is Branch; the nearest entry has Shop")
    for explanation in (Shop("b").load.explain(1), Branch("a").load.explain(1)):
        assert explanation.reason == "other arguments"
    assert Shop("a").load.explain(2).facts[0] == "x is 2; the nearest entry has 1"


def test_an_edited_method_shows_the_diff(
    clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Code that a method reaches in the class of `self` is compared for that class."""
    Branch("a").load(1)

    def helper(self: Any, x: int) -> int:
        return x + 2

    monkeypatch.setattr(Branch, "helper", helper)
    explanation = Branch("a").load.explain(1)
    assert explanation.reason == "code changed"
    assert not Shop("a").load.explain(1).hit
    assert any("helper" in fact for fact in explanation.facts)


def test_what_a_resolver_gives_is_named(clock: ManualClock) -> None:
    """With a `key_resolver` it is what that gives that differs."""

    @cache(name="order", key_resolver=lambda order: order["id"])
    def order(order: dict[str, int]) -> int:
        return 1

    order({"id": 1})
    shows(order.explain({"id": 2}), "the result of key_resolver is '2'; the nearest entry has '1'")


def test_changed_code_shows_the_diff(code: Code) -> None:
    """An edited helper is named, and the lines that changed are shown as a diff."""
    first = """
LIMIT = 3
def clean(x):
    return x < 1
@cache
def load(region):
    return clean(len(region)) and LIMIT
"""
    code.load(first).load("EU")
    edited = code.load(first.replace("x < 1", "x < 2"))
    explanation = edited.load.explain("EU")
    assert explanation.reason == "code changed"
    shows(explanation, "code of clean() changed", "-    return x < 1", "+    return x < 2")
    assert "LIMIT" not in str(explanation)


def test_a_changed_global_is_named(code: Code) -> None:
    """A global that the function reads counts as code, and is named with both values."""
    first = "LIMIT = 3\n@cache\ndef load(region):\n    return LIMIT\n"
    code.load(first).load("EU")
    explanation = code.load(first.replace("3", "4")).load.explain("EU")
    assert explanation.reason == "code changed"
    shows(explanation, "global LIMIT changed", "-int 3", "+int 4")


def test_changed_code_without_a_manifest(code: Code) -> None:
    """If the earlier source is not known on this host, it says so."""
    first = "@cache\ndef load(region):\n    return 1\n"
    code.load(first).load("EU")
    for path in assembly.manifests().directory.glob("*.json"):
        path.unlink()
    explanation = code.load(first.replace("1", "2")).load.explain("EU")
    shows(explanation, "code changed", "its earlier source is not known on this host")


@pytest.mark.parametrize("later", [61.0, 5000.0])
def test_expired(clock: ManualClock, later: float) -> None:
    """It says when the entry was computed and what its ttl is, also when no tier gives it out."""

    @cache(ttl=60, name="load")
    def load(region: str) -> str:
        return region

    load("EU")
    clock.advance(later)
    explanation = load.explain("EU")
    assert explanation.reason == "expired"
    shows(explanation, "computed 1", "ttl 1 min", "expired ")


def test_expired_by_the_ttl_that_judges_it(clock: ManualClock) -> None:
    """The ttl of `using` and the live one are named, as they are judged."""

    @cache(ttl=None, name="load")
    def load(region: str) -> str:
        return region

    load("EU")
    clock.advance(100)
    shows(load.using(ttl=10).explain("EU"), "expired 1 min 30 s ago", "ttl 10.0 s")

    @cache(ttl=3600, ttl_key="ttl.live", name="live")
    def live(region: str) -> str:
        return region

    live("EU")
    clock.advance(100)
    shows(live.using(ttl=10).explain("EU"), "expired 1 min 30 s ago", "ttl 10.0 s")
    memo.live.set("ttl.live", 20)
    shows(live.using(ttl=10).explain("EU"), "expired 1 min 20 s ago", "ttl 20.0 s")
    memo.live.set("ttl.live", math.inf)
    live.expire("EU")
    shows(live.explain("EU"), "function live expired")


def test_expired_and_gone_from_every_tier(clock: ManualClock) -> None:
    """An entry that no tier gives out any more, since it is past its ttl, has expired, too."""

    @cache(ttl=0.05, name="load")
    def load(region: str) -> str:
        return region

    load("EU")
    clock.advance(0.15)
    explanation = load.explain("EU")
    assert explanation.reason == "expired"
    shows(explanation, "ttl 50.0 ms")


def test_invalidated_when_by_whom_and_why(clock: ManualClock) -> None:
    """It says when, by which process, why, and what was invalidated; not what came before."""

    @cache(name="load", tags=["daily"])
    def load(region: str, year: int) -> str:
        return region

    load("EU", 2024)
    load.invalidate(reason="older than the entry")
    clock.advance(5)
    load("EU", 2024)
    clock.advance(5)
    load.invalidate(region="US", reason="of no concern")
    assert load.explain("EU", 2024).hit
    load.invalidate(region="EU", reason="new <prices>")
    explanation = load.explain("EU", 2024)
    assert explanation.reason == "invalidated"
    shows(explanation, "function load invalidated for this region at 20", "new <prices>")
    assert f"/{os.getpid()}" in str(explanation)
    assert "of no concern" not in str(explanation)
    assert "older than the entry" not in str(explanation)
    load("EU", 2024)
    memo.invalidate(tag="daily", reason="nightly")
    shows(load.explain("EU", 2024), "tag daily invalidated at", ": nightly")


def test_invalidated_through_what_it_used(clock: ManualClock) -> None:
    """An entry that was built on another says which one was invalidated."""

    @cache(name="raw")
    def raw(region: str) -> str:
        return region

    @cache(name="report")
    def report(region: str) -> str:
        return raw(region)

    report("EU")
    raw.invalidate("EU", reason="reloaded")
    explanation = report.explain("EU")
    assert explanation.reason == "invalidated"
    shows(explanation, "function raw invalidated for this region", "reloaded")


def test_a_changed_file_is_named(tmp_path: Path, clock: ManualClock) -> None:
    """A file that the entry depends on is named when it has changed."""
    path = tmp_path / "data.csv"
    path.write_text("a")

    @cache(name="load", depends_on=memo.File(path))
    def load() -> str:
        return path.read_text()

    load()
    assert load.explain().hit
    shows(load.explain(), f"depends on {path}")
    path.write_text("something else")
    explanation = load.explain()
    assert explanation.reason == "file changed"
    shows(explanation, f"depends on {path}, which has changed")


def test_a_changed_dependency_is_named(clock: ManualClock) -> None:
    """A callable that the entry depends on is named when it answers something else."""
    table = {"version": 1}

    def version() -> int:
        return table["version"]

    @cache(name="load", depends_on=version, version="1")
    def load() -> int:
        return 1

    load()
    table["version"] = 2
    explanation = load.explain()
    assert explanation.reason == "dependency changed"
    shows(explanation, "depends on the callable load#0, which has changed")


def test_evicted(clock: ManualClock) -> None:
    """An entry that this process stored and no tier has any more was evicted or cleared."""

    @cache(name="load")
    def load(region: str) -> str:
        return region

    load("EU")
    chain = assembly.default_chain()
    memo.runtime.blocking.drive(chain.clear(memo.runtime.blocking.BLOCKING))
    explanation = load.explain("EU")
    assert explanation.reason == "evicted"
    shows(explanation, "evicted or cleared since")


@pytest.mark.parametrize(
    ("at", "reason", "said"),
    [
        (0, "unreadable", "damaged, or of another format"),
        (-1, "signed with another secret", "never loaded"),
    ],
)
def test_damaged_and_forged_entries(clock: ManualClock, at: int, reason: str, said: str) -> None:
    """An entry that is damaged, or that none of our secrets sealed, is said to be so."""
    place = InADict()

    @cache(name="load", provider=place)
    def load(region: str) -> str:
        return region

    load("EU")
    for key, record in place.store.items():
        damaged = bytearray(record)
        damaged[at] ^= 1
        place.store[key] = bytes(damaged)
    explanation = load.explain("EU")
    assert explanation.reason == reason
    shows(explanation, said)


def test_what_is_not_tracked_is_listed(clock: ManualClock) -> None:
    """State that the function reads and that has no key is listed, with hits and with misses."""
    lock = threading.Lock()

    @cache(name="load")
    def load(region: str) -> str:
        with lock:
            return region

    wanted = ("not tracked: closure:", "load.lock: _thread.lock has no sound key")
    shows(load.explain("EU"), *wanted)
    load("EU")
    shows(load.explain("EU"), *wanted)


async def test_async_functions_explain_alike(clock: ManualClock) -> None:
    """`explain` is immediate on async functions, and has an awaitable twin."""

    @cache(name="load")
    async def load(region: str) -> str:
        return region

    await load("EU")
    assert load.explain("EU").hit
    explanation = await load.aexplain("US")
    shows(explanation, "region is 'US'; the nearest entry has 'EU'")


def test_the_html_follows_the_theme(clock: ManualClock) -> None:
    """The HTML has memo's own style, which takes its colours from the page."""

    @cache(name="load")
    def load(region: str) -> str:
        return region

    html = load.explain("EU")._repr_html_()
    assert 'class="memo"' in html
    assert "var(--jp-content-font-color1" in html


# --- the line that says what changed --------------------------------------------------------------


def test_a_report_says_which_code_changed(code: Code, capsys: pytest.CaptureFixture[str]) -> None:
    """`memo.report()` prints one line, in which a miss names the code that changed."""
    first = "def clean(x):\n    return x\n@cache\ndef load(x):\n    return clean(x)\n"
    with memo.report():
        code.load(first).load(1)
    assert capsys.readouterr().err == "memo: 1 miss: load() not cached yet\n"
    edited = code.load(first.replace("return x\n", "return x + 1\n"))
    with memo.report() as span:
        edited.load(1)
        edited.load(1)
    line = capsys.readouterr().err
    assert line.startswith("memo: 1 hit (memory) · 1 miss: code of clean() changed")
    assert span.stats.total.hits == 1


def test_a_report_of_nothing_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    """A block that used no cache prints nothing; one that raised prints its line."""

    @cache(name="load")
    def load(x: int) -> float:
        return 1 / x

    with memo.report():
        pass
    assert capsys.readouterr().err == ""
    with pytest.raises(ZeroDivisionError), memo.report():
        load(0)
    assert "1 raised" in capsys.readouterr().err


def test_invalidations_name_their_function() -> None:
    """An invalidation of a function is counted for it; one of a tag for none."""

    @cache(name="load")
    def load(x: int) -> int:
        return x

    load(1)
    with recording() as heard:
        load.invalidate(1)
        memo.invalidate(tag="t")
    told = [event.function for event in heard if event.kind == events.INVALIDATION]
    assert told == ["load", ""]
    assert memo.stats("load").functions["load"].invalidations == 1


# --- values and paths ----------------------------------------------------------------------------


@cache(name="path:load", ttl=None)
def load_point(point: tuple[int, int]) -> int:
    return sum(point)


@cache(name="path:middle", ttl=None)
def middle_point(point: tuple[int, int]) -> int:
    return load_point(point) + 1


@cache(name="path:top", ttl=None)
def top_point(point: tuple[int, int]) -> int:
    return middle_point(point) + 1


def test_a_tuple_is_shown_by_its_value() -> None:
    """Beside an address that has a digest of it stand the arguments as they are."""
    load_point((1, 2))
    told = str(load_point.explain((1, 3)))
    assert "point is (1, 3); the nearest entry has (1, 2)" in told
    assert "which is point=(1, 2)" in told


def test_the_path_through_cached_calls_is_named() -> None:
    """An inner call that was invalidated is named, and the calls between."""
    assert top_point((1, 2)) == 5
    load_point.invalidate((1, 2), reason="new data")
    told = str(top_point.explain((1, 2)))
    assert "path:load invalidated for this point" in told
    assert "new data; used through path:middle" in told
    assert "used through" not in str(middle_point.explain((1, 2)))


def test_an_invalidation_of_before_is_not_blamed() -> None:
    """A result that was computed after an invalidation, and expired since, tells of that alone."""

    @cache(name="shop:blamed")
    def inner(x: int) -> int:
        return x

    @cache(name="shop:outer")
    def outer(x: int) -> int:
        return inner(x)

    outer(1)
    inner.invalidate(1)
    assert "invalidated for this x" in str(outer.explain(1))
    outer(1)
    inner.expire(1)
    told = str(outer.explain(1))
    assert "expired for this x" in told
    assert "invalidated for this x" not in told


def test_listing_stops_at_its_limit_over_all_tiers() -> None:
    """`limit` bounds the entries of all tiers together, not those of each."""

    @cache(name="shop:many", version="1", ttl=None)
    def many(x: int) -> int:
        return x

    last = max(range(4), key=many.key)  # the disk lists by key
    with memo.configure(memory_limit=0):
        for x in {*range(4)} - {last}:
            many(x)
    many(last)  # this one is in memory as well
    chain = assembly.default_chain()
    for limit, wanted in ((None, 4), (3, 3), (1, 1)):
        found = blocking(lambda port: list_headers(port, chain, chain.prefix("shop:many"), limit))  # noqa: B023
        assert len(found) == wanted
