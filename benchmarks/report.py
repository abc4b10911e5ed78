"""The table and the picture of a run."""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Mapping, Sequence
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

from benchmarks.plan import Row

PACKAGES = (
    *("aiocache", "cachetools", "cachier", "cashews", "checkpointer", "diskcache"),
    *("dogpile.cache", "joblib", "numpy", "pandas", "pyarrow", "redis"),
)
PROSE = "## Which types map"
"""The heading from which on the page is written by hand."""


class Result(NamedTuple):
    """A row's figures; a text in place of one says why there is none."""

    row: Row
    floor: float | str | None
    found: Mapping[str, float | str]
    title: str
    runs: Mapping[str, float | str]

    @property
    def best_peer(self) -> tuple[str, float] | None:
        """The fastest peer, and its figure."""
        peers = [(self.found[p], p) for p in self.row.peers if p in self.found]
        numbers = [(figure, p) for figure, p in peers if isinstance(figure, float | int)]
        return (min(numbers)[1], min(numbers)[0]) if numbers else None

    def bound(self) -> float | None:
        """The most that memo may take; None if what it depends on was not measured."""
        floor = self.floor if isinstance(self.floor, float | int) else math.nan
        bound = self.row.bound(floor, self.best_peer[1] if self.best_peer else math.nan)
        return None if math.isnan(bound) else bound

    def disturbed(self) -> str:
        """The subject that took less than the floor, if the target depends on the floor."""
        floor, row = self.floor, self.row
        if not isinstance(floor, float | int) or row.floor.startswith("hit among"):
            return ""
        if row.bound(floor, 1.0) == row.bound(2 * floor, 1.0):
            return ""
        if row.bound(floor, math.inf) < floor:  # the target is to beat it
            return ""
        figures = {w: f for w, f in self.found.items() if isinstance(f, float | int)}
        return next((who for who, figure in figures.items() if figure < 0.95 * floor), "")

    def reached(self, subject: str) -> str:
        """`yes` if a subject of memo reached its target, else `no` and the ratio to it."""
        bound, figure = self.bound(), self.found[subject]
        if bound is None or math.isinf(bound) or not isinstance(figure, float | int):
            return ""
        if who := self.disturbed():
            return f"undecided: {who} beat the floor, so that was disturbed"
        if self.row.runs and self.runs[subject] != self.row.runs:
            return f"**no**: {self.runs[subject]} runs"
        return "yes" if figure <= bound else f"**no**: {figure / bound:.2f} x the target"


def shown(figure: float | str | None, row: Row) -> str:
    """Format a figure for display."""
    if figure is None:
        return ""
    if isinstance(figure, str):
        return f"fails ({figure[:60]})"
    if row.figure == "peak_bytes":
        return f"{figure / 1e6:,.1f} MB"
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if figure >= size:
            return f"{figure / size:.3g} {unit}" if figure < 1000 * size else f"{figure:,.0f} s"
    return f"{figure * 1e6:.3g} µs"


def prose(path: Path) -> str:
    """Return the hand-written part of a page, which stays when the figures are measured anew."""
    _, heading, rest = path.read_text(encoding="utf-8").partition(PROSE)
    return heading + rest


def page(
    results: Sequence[Result], begun: float, load: float, *, quick: bool, rest: str = ""
) -> str:
    """Return the page: the table, all subjects' figures, how it was measured, and the `rest`."""
    text = [
        "# Performance",
        "",
        "Measured by `python -m benchmarks`, on any machine.  The figures are of one",
        "machine; the ratios should hold on others.  Where a peer wins, the table says so.",
        "",
        "![memo against the floor and the best peer](performance.svg)",
        "",
        "| work | floor | best peer | memo | to reach | reached |",
        "| --- | --- | --- | --- | --- | --- |",
        *(line for result in results for line in lines(result)),
        "",
        "## All of them",
        "",
        *(line for result in results for line in _all_figures(result)),
        "",
        "## How",
        "",
        *_how(begun, load, quick=quick),
    ]
    return "\n".join(text) + "\n" + ("\n" + rest if rest else "")


def lines(result: Result) -> list[str]:
    """Return a row of the table, with one line for each subject of memo."""
    row, best = result.row, result.best_peer
    floor = f"{shown(result.floor, row)} ({row.floor})" if row.floor else ""
    peer = f"{shown(best[1], row)} ({best[0]})" if best else ""
    return [
        f"| {result.title}{f' ({subject})' if len(row.ours) > 1 else ''} | {floor} | {peer} "
        f"| {shown(result.found[subject], row)} | {row.target} | {result.reached(subject)} |"
        for subject in row.ours
    ]


def _all_figures(result: Result) -> list[str]:
    row = result.row
    runs = {who: f" ({count:g} runs)" for who, count in result.runs.items() if count != 1}
    figures = ", ".join(
        f"{who} {shown(figure, row)}{runs.get(who, '')}" for who, figure in result.found.items()
    )
    notes = f" ({row.notes}.)" if row.notes else ""
    return [f"- {result.title}: {figures}.{notes}"]


def _how(begun: float, load: float, *, quick: bool) -> list[str]:
    day = time.strftime("%Y-%m-%d", time.gmtime(begun))
    size = "with smaller values and one process each (`--quick`)" if quick else "in full"
    return [
        f"Run {size} on {day}, on {platform.system()} {platform.machine()} with",
        f"{os.cpu_count()} cores, Python {platform.python_version()}.  The load of the machine was",
        f"{load:.1f} when it began and {os.getloadavg()[0]:.1f} when it ended, this run included:",
        "look at ratios, and at a target missed or met by a few per cent as undecided.  Each",
        "figure is the median of fresh processes, each of which gives a median; where a call takes",
        "microseconds, the subjects of a row took turns.  What one thread does by itself, without",
        "Redis, was measured on the core that was the quietest.",
        "A subject that computes again instead of hitting fails.  No subject can beat a floor;",
        "where one did, load disturbed it, and whether the target was reached is undecided.",
        "Versions: " + ", ".join(f"{p} {_version(p)}" for p in PACKAGES) + ".",
    ]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(missing)"


# --- the picture ---------------------------------------------------------------------------------

_WIDTH, _LEFT, _LINE, _TOP = 920, 330, 30, 64
_COLOURS = {"floor": "#9aa0a6", "best peer": "#e8710a", "memo": "#1a73e8"}


def picture(results: Sequence[Result]) -> str:
    """Draw an SVG: for each row the floor, the best peer and memo, on a logarithmic time scale."""
    timed = [r for r in results if r.row.figure == "value"]
    marks = [(r, _marks(r)) for r in timed]
    values = [v for _, row in marks for v in row.values()]
    if not values:
        return '<svg xmlns="http://www.w3.org/2000/svg"/>\n'
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    height = _TOP + _LINE * len(marks) + 20

    def x(value: float) -> float:
        share = (math.log10(value) - low) / max(1, high - low)
        return _LEFT + share * (_WIDTH - _LEFT - 40)

    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
            'font-family="sans-serif" font-size="13">'
        ),
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
    ]
    for place, (name, colour) in enumerate(_COLOURS.items()):
        at = _LEFT + place * 120
        parts.append(f'<circle cx="{at}" cy="18" r="6" fill="{colour}"/>')
        parts.append(f'<text x="{at + 12}" y="22">{name}</text>')
    for power in range(low, high + 1):
        at = x(10.0**power)
        line = f'<line x1="{at:.0f}" x2="{at:.0f}" y1="{_TOP - 14}" y2="{height - 14}"'
        parts.append(f'{line} stroke="#e0e0e0"/>')
        parts.append(
            f'<text x="{at:.0f}" y="{_TOP - 20}" text-anchor="middle">{_tick(power)}</text>'
        )
    for place, (result, row) in enumerate(marks):
        y = _TOP + _LINE * place + 8
        label = escape(result.title)
        parts.append(f'<text x="{_LEFT - 14}" y="{y + 4}" text-anchor="end">{label}</text>')
        for name, value in row.items():
            circle = f'<circle cx="{x(value):.1f}" cy="{y}" r="6" fill="{_COLOURS[name]}"'
            shape = shown(value, result.row)
            parts.append(f'{circle} fill-opacity="0.85"><title>{name}: {shape}</title></circle>')
    return "\n".join([*parts, "</svg>", ""])


def _marks(result: Result) -> dict[str, float]:
    ours = result.found[result.row.ours[0]]
    best = result.best_peer
    found = {"floor": result.floor, "best peer": best[1] if best else None, "memo": ours}
    return {k: float(v) for k, v in found.items() if isinstance(v, float | int) and v > 0}


def _tick(power: int) -> str:
    """Format a power of ten seconds for display."""
    unit, base = ("s", 0) if power >= 0 else ("ms", -3) if power >= -3 else ("µs", -6)
    return f"{10.0 ** (power - base):g} {unit}"
