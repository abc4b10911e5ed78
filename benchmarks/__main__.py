"""All rows, side by side with the peers: `python -m benchmarks` writes docs/performance.md.

    python -m benchmarks growth     # how costs grow with the work: prints a table
    python -m benchmarks pipeline   # one of 100 partitions changes: prints a table
    python -m benchmarks soak --minutes 5   # what a process takes that runs for long: docs/soak.svg
    python -m benchmarks [--quick] [--runs 3] [--only TEXT] [--output docs/performance.md]

Each sample is a fresh process; each figure is the median of several, and the floor of a row is
measured in the same run.  Where a call takes microseconds, the subjects of a row take turns, so
that a slow spell of the machine meets all alike.  `--quick` takes smaller values, one run and under
two minutes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import growth, pipeline, report, soak
from benchmarks.machine import ROOT, FailedError, Machine, places
from benchmarks.peers import Place
from benchmarks.plan import ROWS, Row
from benchmarks.report import Result
from benchmarks.samples import Figures, Task

Cell = tuple[str, str, str, str, int]
QUICK_PEERS = 1
"""Number of peers of a row in quick mode: the first ones, which were fastest in a full run."""


EMPTY = ("stampede", "store_pairs")
"""Measures that need a place where nothing is stored, each time."""
TURNS = ("hit_record", "hit_many", "hit_threads")
"""Measures whose subjects take turns, and twice as often as the others are run."""


class Bench:
    """Measures rows; rows that need the same processes share them."""

    def __init__(
        self, machine: Machine, runs: int, *, quick: bool = False, tree: Path = ROOT
    ) -> None:
        self._machine = machine
        self._runs = runs
        self._quick = quick
        self._tree = tree
        self._done: dict[Cell, tuple[Figures, Figures] | str] = {}

    def row(self, row: Row) -> Result:
        """Measure a row: memo, its peers and the floor."""
        peers = row.peers[:QUICK_PEERS] if self._quick else row.peers
        if row.measure in TURNS:
            self._in_turns(row, (*row.ours, *peers, row.floor))
        found = {s: self.figure(row, s) for s in (*row.ours, *peers)}
        runs = {s: self.figure(row, s, "runs") for s in found} if row.runs else {}
        floor: float | str | None = None
        if any(row.floor == other.title for other in ROWS):
            other = next(other for other in ROWS if other.title == row.floor)
            floor = self.figure(other, other.ours[0])
        elif row.floor == "write()":
            floor = self.figure(row, row.ours[0], "write")
        elif row.floor:
            floor = self.figure(row, row.floor)
        return Result(row, floor, found, row.named(quick=self._quick), runs)

    def figure(self, row: Row, subject: str, name: str = "") -> float | str:
        """Return a figure, or the reason why there is none."""
        done = self._subject(row, subject)
        if isinstance(done, str):
            return done
        stored, hit = done
        figures = hit if row.measure else stored
        return figures.get(name or row.figure, "not measured")

    def _in_turns(self, row: Row, subjects: Sequence[str]) -> None:
        """Measure subjects in rounds, each subject once per round."""
        cells = [self._cell(row, subject) for subject in subjects if subject]
        begun = time.perf_counter()
        samples: dict[Cell, tuple[list[Figures], list[Figures]]] = {c: ([], []) for c in cells}
        for _ in range(self._runs if self._quick else 2 * self._runs):
            for cell in cells:
                if cell in self._done:
                    continue
                try:
                    for kept, more in zip(samples[cell], self._samples(cell, 1, 1), strict=True):
                        kept.extend(more)
                except FailedError as failed:
                    self._done[cell] = str(failed)
        for cell, (stored, hits) in samples.items():
            self._done.setdefault(cell, (_medians(stored), _medians(hits)))
        self._tell(row, "in turns", begun)

    def _subject(self, row: Row, subject: str) -> tuple[Figures, Figures] | str:
        cell = self._cell(row, subject)
        if cell not in self._done:
            begun = time.perf_counter()
            self._done[cell] = self._measured(cell)
            self._tell(row, subject, begun)
        return self._done[cell]

    def _tell(self, row: Row, subject: str, begun: float) -> None:
        taken = time.perf_counter() - begun
        name = row.named(quick=self._quick)
        print(f"  {name}: {subject} ({taken:.0f} s)", file=sys.stderr, flush=True)

    def _cell(self, row: Row, subject: str) -> Cell:
        size = row.quick_size if self._quick else row.size
        measure = row.measure or next(
            other.measure for other in ROWS if other.store == row.store and other.measure
        )
        if subject == row.floor and measure == "hit_elsewhere":
            measure = "hit_frame"
        return (subject, row.store, measure, row.kind, size)

    def _measured(self, cell: Cell) -> tuple[Figures, Figures] | str:
        """Return medians of the storing process and of the hitting processes."""
        places = self._runs if cell[2] in EMPTY else 1
        try:
            stored, hits = self._samples(cell, places, self._runs // places)
        except FailedError as failed:
            return str(failed)
        return _medians(stored), _medians(hits)

    def _samples(self, cell: Cell, places: int, each: int) -> tuple[list[Figures], list[Figures]]:
        """Run storing and hitting processes, this many of each per place.

        Raises:
            FailedError: one of them failed.
        """
        subject, store, measure, kind, size = cell
        stored: list[Figures] = []
        hits: list[Figures] = []
        for _ in range(places):
            with self._machine.place() as place:
                if store:
                    stored.append(self._sample(store, subject, place, kind, size))
                hits += [self._sample(measure, subject, place, kind, size) for _ in range(each)]
        return stored, hits

    def _sample(self, measure: str, subject: str, place: Place, kind: str, size: int) -> Figures:
        seconds = 0.05 if self._quick else 0.5
        return self._machine.sample(Task(measure, subject, place, kind, size, seconds), self._tree)


def _medians(samples: list[Figures]) -> Figures:
    names = samples[0] if samples else {}
    return {name: statistics.median(s[name] for s in samples) for name in names}


def main() -> None:
    """Measure, print the table, write the page and its picture."""
    if sys.argv[1:2] == ["pipeline"]:
        pipeline.main()
        return
    if sys.argv[1:2] == ["growth"]:
        growth.main(sys.argv[2:])
        return
    if sys.argv[1:2] == ["soak"]:
        raise SystemExit(soak.main(sys.argv[2:]))
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
    rest = report.prose(ROOT / "docs" / "performance.md")
    page = report.page(results, begun, load, quick=given.quick, rest=rest)
    print(page)
    output = given.output or (None if given.quick else ROOT / "docs" / "performance.md")
    if output is not None:
        output.write_text(page, encoding="utf-8")
        output.with_suffix(".svg").write_text(report.picture(results), encoding="utf-8")


if __name__ == "__main__":
    main()
