"""The benchmarks judge: what rises is not flat, what misses its goal is said to."""

from __future__ import annotations

import math
from xml.etree import ElementTree as ET

from checkout import ROOT

from benchmarks import growth, report, soak


def test_what_rises_is_not_flat() -> None:
    """A series is flat while its second half is no higher than its first, and its limit is kept."""
    series = soak.Series("descriptors", float, slack=8)
    assert soak.is_flat(series, [10, 60, 70, 68, 71, 70])
    assert not soak.is_flat(series, [10, 60, 70, 90, 110, 130])
    assert not soak.is_flat(soak.Series("disk", float, limit=60), [10, 60, 67, 67, 60, 60])


def test_figures_are_measured_anew_without_losing_the_prose() -> None:
    """`python -m benchmarks` keeps the sections of its page that are written by hand."""
    page = ROOT / "docs" / "performance.md"
    rest = report.prose(page)
    assert "## A process that runs for long" in rest
    written = report.page([], 0, 1, quick=False, rest=rest)
    assert written.endswith("\n" + rest)
    headings = [line for line in page.read_text("utf-8").splitlines() if line.startswith("#")]
    assert [line for line in written.splitlines() if line.startswith("#")] == headings
    assert written.splitlines()[:9] == page.read_text("utf-8").splitlines()[:9]


def test_the_picture_is_whole() -> None:
    """The picture of a soak is well-formed, with a line for each series."""
    series = [soak.Series("threads", float), soak.Series("disk", float, limit=60)]
    drawn = ET.fromstring(soak.picture(series, [[1, 2, 3], [0, 0, 0]], 5))
    lines = [one for one in drawn.iter() if one.tag.endswith("polyline")]
    assert [len(str(line.get("points")).split()) for line in lines] == [3, 3]


def test_a_goal_that_is_missed_is_said_to() -> None:
    """A row says whether its goal is reached, which each of the real rows can miss."""
    row = growth.Row("work", (1, 4), "linear", float, lambda small, large: large <= 4 * small)
    assert list(growth.lines([row]))[-1].endswith("| linear | yes |")
    row = row._replace(measure=lambda size: float(size * size))
    assert list(growth.lines([row]))[-1].endswith("| linear | **no** |")
    assert not [one.title for one in growth.ROWS if one.holds(1e9, math.inf)]


def test_a_row_that_cannot_be_measured_says_why() -> None:
    """Neither a figure nor a verdict stands where a machine lacks what the row needs."""

    def measure(size: int) -> float:
        raise growth.NotHereError("it takes root")

    row = growth.Row("work", (1, 4), "linear", measure, lambda small, large: True)
    said = "| work | 1 / 4 | not measured: it takes root | | linear | |"
    assert list(growth.lines([row]))[-1] == said


def test_a_quick_look_measures_two_sizes() -> None:
    """`--quick` leaves a smaller and a larger size of each row, none larger than in full."""
    for row in growth.ROWS:
        small, large = growth.quicker(row).sizes
        assert small < large <= row.sizes[1] or large == 2 * small


def test_each_row_of_growth_stands_on_the_page() -> None:
    """The page has every row, with its sizes and its goal, and a new figure takes its place."""
    page = growth.PAGE.read_text("utf-8")
    for row in growth.ROWS:
        assert growth.with_row(page, f"| {row.title} | new |") != page, row.title
        [line] = [one for one in page.splitlines() if one.startswith(f"| {row.title} | ")]
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        assert cells[1] == " / ".join(f"{size:,}" for size in row.sizes), row.title
        assert cells[4] == row.goal, row.title
    last = growth.ROWS[-1].title
    changed = growth.with_row(page, f"| {last} | new |").splitlines()
    pairs = list(zip(page.splitlines(), changed, strict=True))
    assert [new for old, new in pairs if old != new] == [f"| {last} | new |"]
