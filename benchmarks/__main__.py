"""All rows, side by side with the peers: `python -m benchmarks` writes docs/performance.md.

    python -m benchmarks [--quick] [--runs 3] [--only TEXT] [--output docs/performance.md]

Each sample is a fresh process; each figure is the median of several, and the floor of a row is
measured in the same run.  `--quick` takes smaller values, one run and under two minutes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

from benchmarks import report
from benchmarks.machine import ROOT, FailedError, Machine, places
from benchmarks.peers import Place
from benchmarks.plan import ROWS, Row
from benchmarks.report import Result
from benchmarks.samples import Figures, Task

Cell = tuple[str, str, str, str, int]
QUICK_PEERS = 1
"""How many peers a row has in quick mode: the first, which did best in a full run."""


EMPTY = ("stampede", "store_pairs")
"""Measures that need a place where nothing is stored, each time."""


class Bench:
    """Measures rows; rows that need the same processes share them."""

    def __init__(self, machine: Machine, runs: int, *, quick: bool) -> None:
        self._machine = machine
        self._runs = runs
        self._quick = quick
        self._done: dict[Cell, tuple[Figures, Figures] | str] = {}

    def row(self, row: Row) -> Result:
        """Everybody's figures for a row."""
        peers = row.peers[:QUICK_PEERS] if self._quick else row.peers
        found = {s: self._figure(row, s) for s in (*row.ours, *peers)}
        runs = {s: self._figure(row, s, "runs") for s in found} if row.runs else {}
        floor: float | str | None = None
        if any(row.floor == other.title for other in ROWS):
            other = next(other for other in ROWS if other.title == row.floor)
            floor = self._figure(other, other.ours[0])
        elif row.floor == "write()":
            floor = self._figure(row, row.ours[0], "write")
        elif row.floor:
            floor = self._figure(row, row.floor)
        return Result(row, floor, found, row.named(quick=self._quick), runs)

    def _figure(self, row: Row, subject: str, name: str = "") -> float | str:
        """A figure, or why there is none."""
        done = self._subject(row, subject)
        if isinstance(done, str):
            return done
        stored, hit = done
        figures = hit if row.measure else stored
        return figures.get(name or row.figure, "not measured")

    def _subject(self, row: Row, subject: str) -> tuple[Figures, Figures] | str:
        size = row.quick_size if self._quick else row.size
        measure = row.measure or next(
            other.measure for other in ROWS if other.store == row.store and other.measure
        )
        if subject == row.floor and measure == "hit_elsewhere":
            measure = "hit_frame"
        cell = (subject, row.store, measure, row.kind, size)
        if cell not in self._done:
            begun = time.perf_counter()
            self._done[cell] = self._measured(*cell)
            taken = time.perf_counter() - begun
            print(
                f"  {row.named(quick=self._quick)}: {subject} ({taken:.0f} s)",
                file=sys.stderr,
                flush=True,
            )
        return self._done[cell]

    def _measured(
        self, subject: str, store: str, measure: str, kind: str, size: int
    ) -> tuple[Figures, Figures] | str:
        """What the process that stores measures, and those that hit, each in medians."""
        stored: list[Figures] = []
        hits: list[Figures] = []
        places = self._runs if measure in EMPTY else 1
        try:
            for _ in range(places):
                with self._machine.place() as place:
                    if store:
                        stored.append(self._sample(store, subject, place, kind, size))
                    each = range(self._runs // places)
                    hits += [self._sample(measure, subject, place, kind, size) for _ in each]
        except FailedError as failed:
            return str(failed)
        return _medians(stored), _medians(hits)

    def _sample(self, measure: str, subject: str, place: Place, kind: str, size: int) -> Figures:
        seconds = 0.05 if self._quick else 0.5
        return self._machine.sample(Task(measure, subject, place, kind, size, seconds))


def _medians(samples: list[Figures]) -> Figures:
    names = samples[0] if samples else {}
    return {name: statistics.median(s[name] for s in samples) for name in names}


def main() -> None:
    """Measure, print the table, write the page and its picture."""
    options = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    options.formatter_class = argparse.RawDescriptionHelpFormatter
    options.add_argument("--quick", action="store_true", help="smaller values, one run")
    options.add_argument("--runs", type=int, default=0, help="processes per figure (3; quick: 1)")
    options.add_argument("--only", default="", help="rows whose titles have this text")
    options.add_argument("--output", type=Path, help="the page (docs/performance.md; quick: none)")
    given = options.parse_args()
    begun, load = time.time(), os.getloadavg()[0]
    rows = [row for row in ROWS if given.only in row.title]
    results = []
    with places() as machine:
        bench = Bench(machine, given.runs or (1 if given.quick else 3), quick=given.quick)
        for row in rows:
            results.append(bench.row(row))
            print(*report.lines(results[-1]), sep="\n", file=sys.stderr, flush=True)
    page = report.page(results, begun, load, quick=given.quick)
    print(page)
    output = given.output or (None if given.quick else ROOT / "docs" / "performance.md")
    if output is not None:
        output.write_text(page, encoding="utf-8")
        output.with_suffix(".svg").write_text(report.picture(results), encoding="utf-8")


if __name__ == "__main__":
    main()
