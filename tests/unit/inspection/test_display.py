"""The look of statistics: numbers for people, plain text, HTML and a drawing."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from itertools import pairwise
from xml.etree import ElementTree as ET

import pytest

from memo.metrics import formatting, rendering
from memo.metrics.formatting import Cell, Table
from memo.metrics.recorder import Counters, Span
from memo.metrics.rendering import PLOT_COLOURS
from memo.metrics.snapshots import Stats
from memo.runtime import events
from memo.runtime.clock import SECOND, Clock
from memo.runtime.events import Event

LOAD = "etl:load"
EVIL = '__main__:<img src=x onerror="alert(1)">&'
VOID = {"br", "img", "hr", "input"}


class Ticking(Clock):
    def __init__(self) -> None:
        self.now = 1_800_000_000 * SECOND
        self.wall_ns = lambda: self.now


class Reader(HTMLParser):
    """Reads HTML, and fails on tags that do not match."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.texts.append(data)


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert not reader.open
    return reader


@pytest.fixture
def clock() -> Ticking:
    return Ticking()


@pytest.fixture
def counters(clock: Ticking) -> Counters:
    return Counters(clock)


@pytest.fixture
def found(counters: Counters, clock: Ticking) -> Stats:
    """Two functions: hits in two tiers, a stale one that is refreshing, misses, a fault."""
    for tier in ("disk", "disk", "memory"):
        counters(Event(events.HIT, LOAD, "a", tier, seconds=14e-6, size=1 << 20, saved=20.9))
    clock.now += 30 * SECOND
    counters(Event(events.STALE, LOAD, "b", "disk", "ahead", seconds=1e-3, saved=20.9))
    counters(Event(events.REFRESH_STARTED, LOAD, "b"))
    counters(Event(events.MISS, EVIL, "c", reason="file changed"))
    counters(Event(events.COMPUTED, EVIL, "c", seconds=41.8))
    counters(Event(events.ERROR, EVIL, "c", "redis", "timeout"))
    counters(Event(events.TIER_DOWN, tier="redis"))
    return counters.snapshot()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "\u2013"),
        (0, "0 s"),
        (4.2e-8, "42 ns"),
        (1.4e-6, "1.4 µs"),
        (14e-6, "14 µs"),
        (0.0032, "3.2 ms"),
        (0.25, "250 ms"),
        (0.99949, "999 ms"),
        (0.9996, "1.0 s"),
        (41.8, "41.8 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 00 s"),
        (125, "2 min 05 s"),
        (12_000, "3 h 20 min"),
        (400_000, "4 d 15 h"),
        (-0.014, "\u221214.0 ms"),
    ],
)
def test_durations(seconds: float | None, text: str) -> None:
    """A time has the unit in which it is easiest to read, and never carries past it."""
    assert formatting.duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (None, "\u2013"),
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1_300_000_000, "1.2 GiB"),
        (1024**2 - 1, "1.0 MiB"),
        (5000 * 1024**4, "5000.0 TiB"),
    ],
)
def test_sizes(count: int | None, text: str) -> None:
    """A size is in powers of 1024, and never reads 1024.0 of the smaller unit."""
    assert formatting.size(count) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [(None, "\u2013"), (1.0, "100 %"), (0.99999, "99.9 %"), (0.5, "50 %"), (0, "0 %")],
)
def test_shares(share: float | None, text: str) -> None:
    """100 % is said only where nothing is missing."""
    assert formatting.percent(share) == text


def test_text_is_aligned(found: Stats) -> None:
    """In plain text every number stands right-aligned under its title."""
    text = rendering.text(found, width=160)
    lines = text.splitlines()
    head = next(line for line in lines if line.startswith("function"))
    row = next(line for line in lines if line.startswith("etl:load"))
    total = next(line for line in lines if line.startswith("total"))
    assert head.index("hits") + 4 == len(row[: row.index(" 3 ")]) + 2
    for line in (row, total):
        assert len(line) == len(head)
    assert "hits: disk 2 · memory 1" in text
    assert "misses: file changed 1" in text
    assert "1 running" in text
    assert "redis" in text
    assert "down" in text


def test_lines_break_between_facts() -> None:
    """A number stays on the line of its name, where there is room for both."""
    text = "hits: memory 4; misses: not cached yet 14; raised: OptionError 1 · ValueError 1"
    assert formatting.wrap(text, 41) == [
        "hits: memory 4;",
        "misses: not cached yet 14;",
        "raised: OptionError 1 · ValueError 1",
    ]
    assert max(map(len, formatting.wrap(text, 12))) <= 12


def test_columns_of_zeros_are_left_out(counters: Counters) -> None:
    """A table has the columns that say something, and always the main ones."""
    counters(Event(events.HIT, LOAD, "a", "disk", seconds=1e-4, saved=1.0))
    titles = rendering.table(counters.snapshot()).titles
    assert {"function", "hits", "misses", "saved", "median hit"} <= set(titles)
    assert not {"stale", "refreshed", "faults", "raised", "waited"} & set(titles)


def test_the_most_useful_function_is_first(found: Stats) -> None:
    """Functions are in the order of the time that they saved; the total is last."""
    table = rendering.table(found)
    assert [row[0].value for row in table.rows] == [LOAD, EVIL]
    assert table.total[0].text == "total"
    assert not rendering.table(found.select("load")).total


def test_empty_says_what_to_do() -> None:
    """Before anything was called, text and HTML say what to do."""
    assert "@cache" in rendering.text(Stats())
    assert "@cache" in "".join(read(rendering.html(Stats())).texts)
    assert rendering.svg(Stats()) == ""
    assert rendering.sparklines(Stats()) == ""


def test_repr_is_the_table(found: Stats) -> None:
    """A snapshot shows as its table, in a terminal and in a notebook."""
    assert repr(found) == rendering.text(found)
    assert "<table" in found._repr_html_()


def test_html_says_what_the_text_says(found: Stats) -> None:
    """Every number of the plain text is in the HTML."""
    texts = " ".join(read(rendering.html(found)).texts)
    for cell in (cell for row in rendering.table(found).rows for cell in row):
        assert cell.text in texts
    assert "saved 1 min 24 s" in texts
    assert "disk 2" in texts


def test_everything_is_escaped(found: Stats) -> None:
    """No name, reason or fact of a tier becomes markup, wherever it is shown."""
    odd = found.with_health({"<b>tier": {"<i>fact": "<u>value", "up": False}})
    table = Table(["<s>x", "y"], [[Cell("<s>a", '"><s>'), Cell("<s>b", '"><s>', "<s>note")]])
    for html in (
        rendering.html(odd, plot=True),
        formatting.with_style(formatting.table_html(table)),
        formatting.facts_html("<b>title", {"<i>name": "<u>value"}),
        rendering.report_html("<b>line"),
        formatting.lines_html("<b>line"),
    ):
        tags = {tag for tag, _ in read(html).seen}
        assert not tags & {"img", "i", "u", "s"}
        assert "<b>t" not in html
        assert "<b>l" not in html


def test_html_brings_no_colours_but_those_of_the_plot(found: Stats) -> None:
    """Text, lines and backgrounds are the theme's own, so light and dark both read well."""
    html = rendering.html(found, plot=True)
    colours = set(re.findall(r"#[0-9a-fA-F]{3,8}\b", html))
    assert colours <= set(PLOT_COLOURS.values())
    backgrounds = set(re.findall(r"background(?:-color)?:([^;}]+)", html))
    assert backgrounds <= {"transparent", "var(--memo-line)", *PLOT_COLOURS.values()}
    assert "var(--jp-content-font-color1" in html


def luminance(colour: str) -> float:
    parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("colour", PLOT_COLOURS.values())
@pytest.mark.parametrize("background", ["#ffffff", "#212121", "#111111"])
def test_plot_colours_have_contrast(colour: str, background: str) -> None:
    """Each colour of the plot has a contrast of 2.7 : 1 or more in light and dark themes."""
    light, dark = sorted((luminance(colour), luminance(background)), reverse=True)
    assert (light + 0.05) / (dark + 0.05) >= 2.7


def test_table_needs_no_script(found: Stats) -> None:
    """Without scripts the table is complete, and nothing says that it could be sorted."""
    html = rendering.html(found)
    stripped = re.sub(r"<script>.*?</script>", "", html, flags=re.DOTALL)
    assert stripped != html
    reader = read(stripped)
    assert " ".join(reader.texts) == " ".join(read(html).texts)
    attributes = {name for _, attrs in reader.seen for name in attrs}
    assert not {"onclick", "tabindex", "aria-sort"} & attributes


def test_two_tables_do_not_share_a_name(found: Stats) -> None:
    """Tables of two kernels on one page sort each by itself."""
    names = {re.search(r'table id="([^"]+)"', rendering.html(found))[1] for _ in range(5)}  # type: ignore[index]
    assert len(names) == 5


def test_sort_keys_are_numbers(found: Stats) -> None:
    """A column sorts by its number, not by the text that shows it."""
    reader = read(rendering.html(found))
    keys = [attrs["data-v"] for tag, attrs in reader.seen if tag == "td" and "data-v" in attrs]
    assert keys
    assert all(key == "" or float(key) is not None for key in keys if key is not None)


def test_svg_draws_every_call(found: Stats) -> None:
    """The plot is well-formed, and its bars name every hit, stale hit and miss."""
    root = ET.fromstring(rendering.svg(found))
    titles = " ".join(t.text or "" for t in root.iter("{http://www.w3.org/2000/svg}title"))
    counts = {n: sum(map(int, re.findall(rf"(\d+) {n}", titles))) for n in PLOT_COLOURS}
    assert counts == {"hits": 3, "stale": 1, "misses": 1}
    assert root.get("role") == "img"


def test_plots_have_bounded_bars(counters: Counters, clock: Ticking) -> None:
    """A day with long pauses has at most `BARS` bars, in time's own proportions."""
    for _ in range(50):
        clock.now += 1800 * SECOND
        counters(Event(events.HIT, LOAD, "a", "disk", seconds=1e-4))
    width, points = counters.snapshot().total.bars(rendering.MAX_BARS)
    assert len(points) <= rendering.MAX_BARS
    assert sum(point.hits for point in points) == 50
    starts = [point.start for point in points]
    assert {b - a for a, b in pairwise(starts)} == {width}


def test_sparks_are_the_plot_as_text(found: Stats) -> None:
    """A terminal gets the same plot in block characters."""
    hits, stale, misses, foot = rendering.sparklines(found).splitlines()
    assert hits.startswith("  hits  █")
    assert stale.endswith("▃")
    assert misses.endswith("▃")
    assert "1.0 s each" in foot
    assert rendering.sparklines(found) in rendering.text(found, plot=True)


def test_health_of_tiers_is_said_in_words(found: Stats) -> None:
    """Budgets, outages and waiting invalidations are said as people say them."""
    facts = {
        "disk": {"up": True, "size": 1_300_000_000, "size_limit": 10 << 30, "entries": 12},
        "host": {"journal": 2, "to": "Redis"},
    }
    lines = {name: (said, well) for name, said, well in rendering.tiers(found.with_health(facts))}
    assert lines["disk"] == ("2 hits · 1 stale · up · 1.2 GiB of 10.0 GiB · 12 entries", True)
    assert lines["host"] == ("2 invalidations on the way to Redis", True)
    assert lines["redis"] == ("1 error · down · 1 outage", False)


# --- The line under a cell ----------------------------------------------------------------------


def test_report_says_it_in_one_line(counters: Counters) -> None:
    """Hits with their tier, stale answers with their refresh, misses with their reason, time."""
    span = Span(counters)
    for _ in range(2):
        counters(Event(events.HIT, LOAD, "a", "disk", seconds=1e-4, saved=20.9))
    counters(Event(events.STALE, LOAD, "b", "disk", "ahead"))
    counters(Event(events.REFRESH_STARTED, LOAD, "b"))
    counters(Event(events.MISS, "etl:Sales.clean", "c", reason="expired"))
    span.end()
    assert rendering.report(span) == (
        "2 hits (disk) · 1 stale, refreshing · 1 miss: clean() expired · saved 41.8 s"
    )
    counters(Event(events.REFRESH_DONE, LOAD, "b"))
    assert "1 stale, refreshed · " in rendering.report(span)


def test_report_tells_whatever_the_event_tells(counters: Counters) -> None:
    """A miss that knows more than its reason says it; many of one kind are counted."""
    span = Span(counters)
    for _ in range(3):
        counters(
            Event(events.MISS, LOAD, reason="not cached yet", detail="code of clean() changed")
        )
    counters(Event(events.MISS, LOAD, reason="expired"))
    counters(Event(events.FAILED, LOAD, reason="KeyError"))
    span.end()
    assert rendering.report(span) == (
        "4 misses: code of clean() changed (3\u00d7), load() expired · 1 raised"
    )


def test_report_counts_shared_computations_once(counters: Counters) -> None:
    """Callers that shared another's computation are not said to have missed."""
    span = Span(counters)
    for _ in range(5):
        counters(Event(events.MISS, LOAD, "k", reason="not cached yet"))
    for _ in range(4):
        counters(Event(events.COALESCED, LOAD, "k", saved=1.0))
    span.end()
    assert rendering.report(span) == "1 miss: load() not cached yet · 4 shared · saved 4.0 s"
