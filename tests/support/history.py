"""The history checker: workers call and invalidate, each writes down when; then the past is judged.

Every worker is a process with threads and event loops that call cached functions and invalidate
them.  What a function returns says which *run* made it and when that run began.  All times are of
one clock that the processes of a host share, so that afterwards the merged history can be held
against the invariants of the design:

I1  a call that began after an `invalidate()` had returned gives nothing of which the computation
    began before that `invalidate()` was called; a run of a `cutoff` function that another one was
    built on may be older, if a later run of the same key gave the same data;
I2  for one process and key, the start of the run behind successive answers never goes back;
I3  with `use_lock` and without faults, two runs of one key overlap only with cause;
I4  an answer is that of a run of its own key, and a stream that is read to its end is whole.

A key is that of a function, a region and a year.  In the shape `"each"` the years come as a
collection, and each element of an answer is judged by itself; in the shape `"streams"` the
functions are generators, which consumers read to the end or leave in the middle.

The long form; with `MEMO_TEST_SECONDS=30` it made 800,000 calls in 37 minutes at low priority, on
two cores that were busy with other work::

    MEMO_TEST_LONG=1 MEMO_TEST_CALLS=1000000 pytest tests/history/test_history.py
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import faulthandler
import itertools
import json
import os
import random
import secrets
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from checkout import ROOT, SUPPORT

EVERYTHING = "*"
"""Stands for a region or a year in the target of an invalidation: all of them."""
FOR_GOOD = 1 << 62
HANGS_AFTER = 45.0
"""Seconds that a worker may take for its last step; then it writes down where it is, and ends."""
HANGING = ".hanging"
"""Ends the name of the file that it writes."""
LOOPS: list[asyncio.AbstractEventLoop] = []
"""Event loops of this worker."""


def now() -> int:
    """Nanoseconds on the clock that all processes of this host share."""
    clock = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
    return time.clock_gettime_ns(clock)


# --- the plan -------------------------------------------------------------------------------------


def rest(most: float) -> None:
    """Take a random time, in seconds."""
    time.sleep(random.random() * most)


async def arest(most: float) -> None:
    """The same on a loop."""
    await asyncio.sleep(random.random() * most)


@dataclass
class Plan:
    """The work of one worker.

    Attributes:
        directory: of the cache: a host is a directory.
        log: directory of the records.
        until: `now()` at which it ends.
        settings: for `memo.configure`.
        options: for `memo.cache`.
        mutant: what to break on purpose, see `mutants`; "": nothing.
        threads: how many threads call the sync functions.
        tasks: how many tasks of one event loop call the async ones.
        shape: `"plain"`, `"each"` or `"streams"`.
        regions: how many values the first argument has.
        years: how many values the second has.
        invalidate: share of the steps that are an invalidation.
        busy: longest time, in seconds, that a computation takes.
        pause: longest time, in seconds, between two calls.
        ask: share of the steps that call the function that is built on the others.
        leave: share of the streams that their consumer leaves in the middle.
        cutoff: the functions that others are built on have `cutoff=True`, and give one of two
            values.
        environment: variables to set.
        lease: seconds that a lease lasts whose holder was killed.
    """

    directory: str
    log: str
    until: int
    settings: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    mutant: str = ""
    threads: int = 2
    tasks: int = 4
    shape: str = "plain"
    regions: int = 2
    years: int = 2
    invalidate: float = 0.05
    busy: float = 0.004
    pause: float = 0.001
    ask: float = 0.2
    leave: float = 0.2
    cutoff: bool = False
    environment: dict[str, str] = field(default_factory=dict)
    lease: float = 30.0


# --- the record -----------------------------------------------------------------------------------


class Run(NamedTuple):
    """One computation: its start lies between `since` (memo's own) and `start` (its first line).

    `data` is what it found, where that may be the same again.
    """

    id: str
    key: str
    since: int
    start: int
    end: int
    process: str
    data: str = ""


class Asked(NamedTuple):
    """One call of a key, and the runs behind its answer: its own first, then those that it used.

    A call over a collection (`each`) is several of these.
    """

    key: str
    begin: int
    end: int
    process: str
    host: str
    runs: tuple[tuple[str, str, int, int], ...]


class Gone(NamedTuple):
    """One invalidation that returned: of a function's region and year, either may be `*`."""

    function: str
    region: str
    year: str
    begin: int
    end: int
    host: str


class Log:
    """Appends records to a file of its own, each at once: a SIGKILL loses none that are whole."""

    def __init__(self, directory: str) -> None:
        self.process = f"{os.getpid()}-{secrets.token_hex(4)}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        self._file = os.open(f"{directory}/{self.process}.log", flags, 0o600)

    def write(self, *row: Any) -> None:
        os.write(self._file, json.dumps(row, separators=(",", ":")).encode() + b"\n")


@dataclass
class History:
    """The records of all workers of one run.

    Attributes:
        made: how many calls there were; one over a collection counts once.
        raised: what was raised, and what was wrong with an answer in itself.
        down: how often a worker took a tier for down.
        faults: of tiers, as memo told them: time, process, tier, reason, detail.
    """

    runs: list[Run] = field(default_factory=list)
    calls: list[Asked] = field(default_factory=list)
    gone: list[Gone] = field(default_factory=list)
    raised: list[str] = field(default_factory=list)
    made: int = 0
    down: int = 0
    faults: list[tuple[int, str, str, str, str]] = field(default_factory=list)

    @classmethod
    def read(cls, directory: Path) -> History:
        history, ends = cls(), {}
        for path in sorted(directory.glob("*.log")):
            lines = path.read_bytes().split(b"\n")
            for line in lines[:-1]:  # behind the last line feed: cut off by a SIGKILL
                kind, *row = json.loads(line)
                if kind == "ended":
                    ends[row[0]] = row[1]
                else:
                    history._add(kind, *row)
        history.runs = [run._replace(end=ends.get(run.id, run.end)) for run in history.runs]
        return history

    def _add(self, kind: str, *row: Any) -> None:
        if kind == "run":
            self.runs.append(Run(*row))
        elif kind == "call":
            *facts, answers = row
            self.made += 1
            for key, runs in answers:
                self.calls.append(Asked(key, *facts, tuple(map(tuple, runs))))
        elif kind == "gone":
            self.gone.append(Gone(*row))
        elif kind == "down":
            self.down += 1
        elif kind == "fault":
            self.faults.append(tuple(row))  # type: ignore[arg-type]
        else:
            self.raised.append(str(row))


# --- judging -------------------------------------------------------------------------------------


class Quiet(NamedTuple):
    """A time in which the servers behaved: what is promised between hosts, is promised here."""

    begin: int
    end: int


def covers(gone: Gone, key: str) -> bool:
    """Does an invalidation concern the runs of a key, `function/region/year`?"""
    function, region, year = key.split("/")
    return (
        gone.function in (function, EVERYTHING)
        and gone.region in (region, EVERYTHING)
        and gone.year in (year, EVERYTHING)
    )


def stale(history: History, faults: Iterable[tuple[int, int]] = (), bound: int = 0) -> list[str]:
    """I1: answers from before an invalidation that had returned.

    Args:
        history: all that was written down.
        faults: (begin, end) of times in which Redis could not be reached, its way back included.
            An invalidation by one host in that time is promised to that host alone.
        bound: nanoseconds for which word of what another host invalidated may travel.
    """
    away = list(faults)
    found = []
    latest = {}
    for key in {run[1] for call in history.calls for run in call.runs}:
        for host in {call.host for call in history.calls}:
            mine = [
                g if g.host == host else g._replace(end=g.end + bound)
                for g in history.gone
                if covers(g, key) and _promised(g, host, away)
            ]
            latest[key, host] = _Latest(mine)
    data = {run.id: run.data for run in history.runs}
    equal: dict[tuple[str, str], list[int]] = defaultdict(list)
    for run in history.runs:
        equal[run.key, run.data].append(run.start)
    for starts in equal.values():
        starts.sort()
    for call in history.calls:
        excused = any(b <= call.end and call.begin <= e for b, e in away)
        for identity, key, _, start in call.runs:
            gone = latest[key, call.host].before(call.begin, call.host if excused else None)
            if start < gone:
                starts = equal[key, data.get(identity, "")]
                later = starts[bisect.bisect_left(starts, gone) :][:1]
                proven = identity != call.runs[0][0] and data.get(identity) and later
                if proven and later[0] <= call.end:
                    continue  # a later run found the same
                found.append(
                    f"{call.key} asked from {call.begin} to {call.end} by {call.process} gave run "
                    f"{identity} of {key} begun at {start}, {(gone - start) / 1e6:.3f} ms before "
                    "an invalidation"
                )
    return found


def _promised(gone: Gone, host: str, faults: list[tuple[int, int]]) -> bool:
    if gone.host == host:
        return True
    return not any(b <= gone.end and gone.begin <= e for b, e in faults)


class _Latest:
    """When the last invalidation was called that had returned at a time."""

    def __init__(self, gone: Iterable[Gone]) -> None:
        every = sorted(gone, key=lambda g: g.end)
        self._tables = {None: self._table(every)}
        for host in {g.host for g in every}:
            self._tables[host] = self._table([g for g in every if g.host == host])

    @staticmethod
    def _table(gone: list[Gone]) -> tuple[list[int], list[int]]:
        return [g.end for g in gone], list(itertools.accumulate((g.begin for g in gone), max))

    def before(self, moment: int, host: str | None) -> int:
        ends, begins = self._tables.get(host, ([], []))
        place = bisect.bisect_left(ends, moment)
        return begins[place - 1] if place else -1


def backwards(history: History) -> list[str]:
    """I2: answers behind which lies a run that began before that of an earlier answer."""
    groups: dict[tuple[str, str], list[Asked]] = defaultdict(list)
    for call in history.calls:
        groups[call.process, call.key].append(call)
    found = []
    for calls in groups.values():
        ended = iter(sorted(calls, key=lambda call: call.end))
        earlier = next(ended, None)
        newest = -1
        for call in sorted(calls, key=lambda call: call.begin):
            while earlier is not None and earlier.end < call.begin:
                newest = max(newest, earlier.runs[0][2])
                earlier = next(ended, None)
            identity, key, _, start = call.runs[0]
            if start < newest:
                found.append(
                    f"{key} asked at {call.begin} by {call.process} gave run {identity}, begun "
                    f"{(newest - start) / 1e6:.3f} ms before one that it had given already"
                )
    return found


def overlaps(history: History) -> list[str]:
    """I3: runs of one key at the same time, without an invalidation between their starts."""
    groups: dict[str, list[Run]] = defaultdict(list)
    for run in history.runs:
        groups[run.key].append(run)
    found = []
    for key, runs in groups.items():
        runs.sort(key=lambda run: run.start)
        for first, second in itertools.pairwise(runs):
            if second.start < first.end and not _cause(history.gone, key, first, second):
                found.append(f"{key}: {first} and {second}")
    return found


def _cause(gone: Iterable[Gone], key: str, first: Run, second: Run) -> bool:
    return any(g.begin <= second.start and g.end >= first.since and covers(g, key) for g in gone)


def foreign(history: History) -> list[str]:
    """I4: answers that no run gave, or a run of another key."""
    known = {run.id: run.key for run in history.runs}
    return [
        f"{call.key} gave {run}"
        for call in history.calls
        for run in call.runs
        if known.get(run[0]) != run[1] or call.runs[0][1] != call.key
    ]


# --- the worker ----------------------------------------------------------------------------------

SINCE: ContextVar[int] = ContextVar("history_since", default=0)
"""When memo took the start time of the run that is about to begin."""


class Told(list[Any]):
    """The runs behind an answer; equal, for memo, to every other with the same data."""

    def __init__(self, runs: Iterable[Any] = (), data: str = "") -> None:
        super().__init__(runs)
        self.data = data

    def __memo_key__(self) -> str:
        return self.data


def written(outcome: Any) -> None:
    """An invalidation that could not be recorded would be none."""
    assert not any(how.startswith("failed") for how in outcome.tiers.values()), outcome


ITEMS = 3
"""The number of items of a stream."""


class Workload:
    """The functions that a worker calls, and how it invalidates them.

    `load` and `fetch` (async) are computed; `report` and `areport` are built on them.  Their code
    version is pinned: what they write to is no part of what they compute.
    """

    def __init__(self, plan: Plan) -> None:
        import memo

        self.plan = plan
        self.log = Log(plan.log)
        self.memo = memo
        self._starts: dict[str, list[int]] = defaultdict(list)
        self._watch_starts()
        memo.on_event(self._hear)
        make = {"plain": self._plain, "each": self._elementwise, "streams": self._streams}
        self.functions = make[plan.shape]()

    def _watch_starts(self) -> None:
        from memo.validity.check import LatestAnswers

        original, starts = LatestAnswers.start_time, self._starts

        def start_time(latest: LatestAnswers, key: str, clock: Any) -> int:
            SINCE.set(now())
            starts[key].append(SINCE.get())
            return original(latest, key, clock)

        LatestAnswers.start_time = start_time  # type: ignore[method-assign]

    def _hear(self, event: Any) -> None:
        if event.kind == "tier_down":
            self.log.write("down", event.tier)
        elif event.kind == "error" and event.tier:
            self.log.write("fault", now(), self.log.process, event.tier, event.reason, event.detail)

    def _cached(self, name: str, **more: Any) -> Any:
        return self.memo.cache(
            name=f"history:{name}",
            version="1",
            key_prefix=f"history:{name}",
            tags=[name, "history"],
            cutoff=self.plan.cutoff and name in ("load", "fetch"),
            **{**self.plan.options, **more},
        )

    # --- functions -------------------------------------------------------------------------------

    def _plain(self) -> dict[str, Any]:
        cached, run, busy = self._cached, self.run, self.plan.busy

        @cached("load")
        def load(region: str, year: str) -> Any:
            since, start = SINCE.get(), now()
            rest(busy)
            return run("load", region, year, since, start)

        @cached("fetch")
        async def fetch(region: str, year: str) -> Any:
            since, start = SINCE.get(), now()
            await arest(busy)
            return run("fetch", region, year, since, start)

        @cached("report")
        def report(region: str, year: str) -> Any:
            since, start = SINCE.get(), now()
            return run("report", region, year, since, start, load(region, year))

        @cached("areport")
        async def areport(region: str, year: str) -> Any:
            since, start = SINCE.get(), now()
            used = await asyncio.gather(fetch(region, year), asyncio.to_thread(load, region, year))
            return run("areport", region, year, since, start, *used)

        return {"load": load, "fetch": fetch, "report": report, "areport": areport}

    def _elementwise(self) -> dict[str, Any]:
        """`load` and `fetch` over a collection of years; a report is built on two of them."""
        cached, run, busy = self._cached, self.run, self.plan.busy

        @cached("load", each="year")
        def load(region: str, year: list[str]) -> Any:
            since, start = SINCE.get(), now()
            rest(busy)
            return [run("load", region, one, since, start) for one in year]

        @cached("fetch", each="year")
        async def fetch(region: str, year: list[str]) -> Any:
            since, start = SINCE.get(), now()
            await arest(busy)
            return {one: run("fetch", region, one, since, start) for one in year}

        @cached("report")
        def report(region: str, year: str) -> Any:
            since, start = SINCE.get(), now()
            return run("report", region, year, since, start, *load(region, [year, "y0"]))

        @cached("areport")
        async def areport(region: str, year: str) -> Any:
            since, start = SINCE.get(), now()
            fetched, loaded = await asyncio.gather(
                fetch(region, [year]), asyncio.to_thread(load, region, ["y0", year])
            )
            return run("areport", region, year, since, start, fetched[year], *loaded)

        return {"load": load, "fetch": fetch, "report": report, "areport": areport}

    def _streams(self) -> dict[str, Any]:
        """`load` and `fetch` are generators; a report is built on the items that it has read."""
        cached, run, busy = self._cached, self.run, self.plan.busy

        @cached("load")
        def load(region: str, year: str) -> Any:
            with self._streaming("load", region, year) as told:
                for at in range(ITEMS):
                    rest(busy / ITEMS)
                    yield at, told

        @cached("fetch")
        async def fetch(region: str, year: str) -> Any:
            with self._streaming("fetch", region, year) as told:
                for at in range(ITEMS):
                    await arest(busy / ITEMS)
                    yield at, told

        @cached("report")
        def report(region: str, year: str) -> Any:
            since, start = SINCE.get(), now()
            return run("report", region, year, since, start, self.consumed(load(region, year)))

        @cached("areport")
        async def areport(region: str, year: str) -> Any:
            since, start = SINCE.get(), now()
            used = await asyncio.gather(
                self.aconsumed(fetch(region, year)),
                asyncio.to_thread(lambda: self.consumed(load(region, year))),
            )
            return run("areport", region, year, since, start, *used)

        return {"load": load, "fetch": fetch, "report": report, "areport": areport}

    def run(
        self, function: str, region: str, year: str, since: int, start: int, *used: Any
    ) -> Told:
        """A result: the runs behind it, its own first; the run is on the record already."""
        key = f"{function}/{region}/{year}"
        identity = secrets.token_hex(6)
        data = random.choice("ab") if self.plan.cutoff else ""
        self.log.write("run", identity, key, since, start, now(), self.log.process, data)
        return Told([(identity, key, since, start), *itertools.chain(*used)], data)

    @contextlib.contextmanager
    def _streaming(self, function: str, region: str, year: str) -> Iterator[Told]:
        """The run of a generator, which is on the record before its first item."""
        start = now()  # of those that share a run, any may be the first to ask for an item
        # Other calls for the same key may have taken start times since: this run has the first.
        starts = self._starts[self.functions[function].key(region, year)]
        since = min(start, starts[0])
        del starts[:-1]
        told = self.run(function, region, year, since, start)
        try:
            yield told
        finally:
            self.log.write("ended", told[0][0], now())

    # --- consumers -------------------------------------------------------------------------------

    def consumed(self, stream: Any) -> list[Any]:
        """The runs behind the items of a stream that is read to its end, or left before."""
        leave, items = self._leaves(), []
        for item in stream:
            items.append(item)
            if len(items) == leave:
                stream.close()
                break
        return self._behind(items, leave)

    async def aconsumed(self, stream: Any) -> list[Any]:
        """As `consumed`."""
        leave, items = self._leaves(), []
        async for item in stream:
            items.append(item)
            if len(items) == leave:
                await stream.aclose()
                break
        return self._behind(items, leave)

    def _leaves(self) -> int:
        """After how many items a consumer leaves."""
        return random.randrange(1, ITEMS) if random.random() < self.plan.leave else ITEMS + 1

    def _behind(self, items: list[Any], leave: int) -> list[Any]:
        """The runs behind some items: one, or two where the first run was lost in the middle."""
        if [at for at, _ in items] != list(range(min(leave, ITEMS))):
            self.log.write("raised", f"a stream with the items {items}, left after {leave}")
        runs = {told[0][0]: told for _, told in items}
        return list(itertools.chain(*runs.values()))

    # --- steps -----------------------------------------------------------------------------------

    def arguments(self) -> tuple[str, str]:
        plan = self.plan
        return f"r{random.randrange(plan.regions)}", f"y{random.randrange(plan.years)}"

    def choose(self, name: str) -> tuple[str, Any]:
        """The arguments of a call."""
        region, year = self.arguments()
        if self.plan.shape != "each" or name in ("report", "areport"):
            return region, year
        years = [f"y{number}" for number in range(self.plan.years)]
        return region, random.sample(years, random.randint(1, len(years)))

    def note(self, function: str, arguments: tuple[str, Any], begin: int, answer: Any) -> None:
        """Write down a call, with the runs behind each part of its answer."""
        region, year = arguments
        if isinstance(year, list):
            parts = [answer[one] for one in year] if isinstance(answer, dict) else answer
            answers = [(f"{function}/{region}/{y}", p) for y, p in zip(year, parts, strict=True)]
        else:
            answers = [(f"{function}/{region}/{year}", answer)]
        self.log.write("call", begin, now(), self.log.process, self.plan.directory, answers)

    def target(self, *names: str) -> tuple[Callable[[str], Any], tuple[str, str, str]]:
        """A way to invalidate something, called with "" or "a", and what it covers."""
        name, (region, year) = random.choice(names), self.arguments()
        function, memo = self.functions[name], self.memo
        ways: list[tuple[Callable[[str], Any], tuple[str, str, str]]] = [
            (lambda a: getattr(function, f"{a}invalidate")(region, year), (name, region, year)),
            (lambda a: getattr(function, f"{a}invalidate")(region=region), (name, region, "*")),
            (lambda a: getattr(function, f"{a}invalidate")(year=year), (name, "*", year)),
            (lambda a: getattr(function, f"{a}invalidate")(), (name, "*", "*")),
            (
                lambda a: getattr(memo, f"{a}invalidate")(key=function.address(region, year)),
                (name, region, year),
            ),
            (lambda a: getattr(memo, f"{a}invalidate")(tag=name), (name, "*", "*")),
            (lambda a: getattr(memo, f"{a}invalidate")(function=function), (name, "*", "*")),
            (lambda a: getattr(memo, f"{a}invalidate")(prefix=f"history:{name}"), (name, "*", "*")),
            (lambda a: getattr(memo, f"{a}invalidate")(tag="history"), ("*", "*", "*")),
        ]
        return random.choice(ways)

    def step(self) -> None:
        """One sync call, or one invalidation."""
        if random.random() < self.plan.invalidate:
            way, covered = self.target("load", "report", "fetch")
            begin = now()
            written(way(""))
            self.log.write("gone", *covered, begin, now(), self.plan.directory)
            return
        name = "report" if random.random() < self.plan.ask else "load"
        arguments = self.choose(name)
        begin = now()
        answer = self.functions[name](*arguments)
        if isinstance(answer, Iterator):
            answer = self.consumed(answer)
        self.note(name, arguments, begin, answer)

    async def astep(self) -> None:
        """One async call, or one invalidation."""
        if random.random() < self.plan.invalidate:
            way, covered = self.target("fetch", "areport", "load")
            begin = now()
            written(await way("a"))
            self.log.write("gone", *covered, begin, now(), self.plan.directory)
            return
        name = "areport" if random.random() < self.plan.ask else "fetch"
        arguments = self.choose(name)
        begin = now()
        answer = self.functions[name](*arguments)
        if isinstance(answer, AsyncIterator):
            answer = await self.aconsumed(answer)
        else:
            answer = await answer
        self.note(name, arguments, begin, answer)

    # --- loops -------------------------------------------------------------------------------

    def work(self) -> None:
        while now() < self.plan.until:
            try:
                self.step()
            except Exception as error:
                self.log.write("raised", repr(error))
            if self.plan.pause:
                rest(self.plan.pause)

    async def awork(self) -> None:
        while now() < self.plan.until:
            try:
                await self.astep()
            except Exception as error:
                self.log.write("raised", repr(error))
            await arest(self.plan.pause)

    async def loop(self) -> None:
        LOOPS.append(asyncio.get_running_loop())
        await asyncio.gather(*(self.awork() for _ in range(self.plan.tasks)))
        await self.memo.drain(5)

    def live(self) -> None:
        threads = [threading.Thread(target=self.work) for _ in range(self.plan.threads)]
        if self.plan.tasks:
            threads.append(threading.Thread(target=lambda: asyncio.run(self.loop())))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def hang(log: str) -> None:
    """Write down what each thread and each task of a worker waits for, and end it."""
    with open(f"{log}/{os.getpid()}{HANGING}", "w", encoding="utf-8") as file:
        faulthandler.dump_traceback(file)
        for loop in LOOPS:
            for task in asyncio.all_tasks(loop):
                task.print_stack(file=file)
    os._exit(1)


def worker(plan: Plan) -> None:
    """The program of a worker process."""
    watch = threading.Timer((plan.until - now()) / 1e9 + HANGS_AFTER, hang, (plan.log,))
    watch.daemon = True
    watch.start()
    import limits

    import memo

    os.environ.update(plan.environment)
    limits.change(lease=plan.lease)
    memo.configure(directory=plan.directory, **plan.settings)
    if plan.mutant:
        import mutants

        mutants.APPLY[plan.mutant]()
    Workload(plan).live()


# --- the nursery ---------------------------------------------------------------------------------


def serve() -> None:
    """The program of the nursery process: it has imported everything, and forks each worker."""
    for name in (
        "memo",
        "memo.stores.disk.disk_tier",
        "memo.stores.disk.index",
        "memo.stores.memory",
        "memo.stores.redis.transport.loop_connections",
        "memo.stores.redis.transport.thread_connections",
    ):
        import_module(name)
    print("ready", flush=True)
    for line in sys.stdin:
        verb, argument = json.loads(line)
        if verb == "wait":
            _, status = os.waitpid(argument, 0)
            print(os.waitstatus_to_exitcode(status), flush=True)
        elif (pid := os.fork()) != 0:
            print(pid, flush=True)
        else:
            _born(argument)


def _born(plan: dict[str, Any]) -> NoReturn:
    code = 1
    try:
        os.dup2(2, 1)
        worker(Plan(**plan))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


class Nursery:
    """A process that forks workers, so that none of them has to import anything first."""

    def __init__(self) -> None:
        path = os.pathsep.join((str(ROOT), str(SUPPORT)))
        self._process = subprocess.Popen(
            [sys.executable, "-c", "import history; history.serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        assert self._answer() == "ready"

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def _ask(self, *order: Any) -> int:
        assert self._process.stdin is not None
        print(json.dumps(order), file=self._process.stdin, flush=True)
        return int(self._answer())

    def start(self, plan: Plan) -> int:
        """The process id of a new worker."""
        return self._ask("start", asdict(plan))

    def wait(self, pid: int) -> int:
        """The exit code of a worker, when it has ended; negative: of which signal it died."""
        return self._ask("wait", pid)

    def close(self) -> None:
        with self._process as process:
            assert process.stdin is not None
            process.stdin.close()


# --- the stage -----------------------------------------------------------------------------------


@dataclass
class Stage:
    """Workers, and what befalls them and Redis meanwhile.

    Args:
        nursery: where workers come from.
        place: a directory of its own.
        seconds: how long it goes.
        workers: how many processes.
        hosts: how many directories they are spread over.
        plan: more for `Plan`.
        redis: a `RedisServer`, where faults concern it.
        faults: called with the stage again and again until time is up; it makes one fault.
    """

    nursery: Nursery
    place: Path
    seconds: float
    workers: int = 3
    hosts: int = 1
    plan: dict[str, Any] = field(default_factory=dict)
    redis: Any = None
    faults: Callable[[Stage], None] | None = None
    away: list[tuple[int, int]] = field(default_factory=list)
    killed: int = 0

    def run(self) -> History:
        """Let it happen; what was written down."""
        log = self.place / "log"
        log.mkdir(parents=True)
        self.until = now() + int(self.seconds * 1e9)
        self._crew = [self._start(number) for number in range(self.workers)]
        try:
            while self.faults is not None and now() < self.until - int(0.2e9):
                self.faults(self)
            codes = [self.nursery.wait(self._crew.pop()) for _ in range(self.workers)]
            hanging = [path.read_text(encoding="utf-8") for path in log.glob(f"*{HANGING}")]
            assert not any(codes), "\n".join((f"exit codes {codes}", *hanging))
        finally:
            for pid in self._crew:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    self.nursery.wait(pid)
        return History.read(log)

    def lengthen(self) -> None:
        """Make ready to run once more, for longer."""
        self.place /= "longer"
        self.seconds *= 4
        self.away.clear()
        if self.redis is not None:
            self.redis.client().flushall()

    def _start(self, number: int) -> int:
        directory = self.place / f"host{number % self.hosts}"
        plan = Plan(str(directory), str(self.place / "log"), self.until, **self.plan)
        plan.environment = {n: v for n, v in os.environ.items() if n.startswith(("MEMO_", "XDG_"))}
        return self.nursery.start(plan)

    def kill_one(self) -> None:
        """SIGKILL a worker, and start another in its place."""
        number = random.randrange(self.workers)
        pid = self._crew[number]
        with contextlib.suppress(ProcessLookupError):  # it has done its work
            os.kill(pid, signal.SIGKILL)
        code = self.nursery.wait(pid)
        assert code in (0, -signal.SIGKILL), f"exit code {code}"
        self.killed += code != 0
        self._crew[number] = self._start(number)

    def wait(self, least: float, most: float) -> None:
        """Let the workers go on, for a random time."""
        time.sleep(random.uniform(least, most))

    def outage(self, begin: Callable[[], None], end: Callable[[], None], seconds: float) -> None:
        """A time without Redis; `away` covers the way back as well."""
        start = now()
        begin()
        self.wait(seconds, seconds)
        end()
        self.away.append((start, now() + int(6e9)))
