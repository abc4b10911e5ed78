"""Progress: one line for all work that takes longer than half a second, with the time left.

This covers computations, waits for other processes, and transfers to and from Redis.  A listener on
the events keeps track of them, and a ticker redraws the lines four times a second. They go to a
`Screen`: in a notebook that of `magics`, in a terminal bars of `rich`.  Fast calls show nothing,
and without a viewer nothing is drawn.
"""

from __future__ import annotations

import statistics
import sys
import threading
import time
from typing import Any, Protocol

from memo.coordination.flights import current_path
from memo.coordination.leases import Holder
from memo.decorators.cached_function import CachedFunction, functions
from memo.engine.explaining import headers_of
from memo.errors import MemoError, label
from memo.metrics import formatting
from memo.metrics.recorder import COUNTERS
from memo.runtime import events, fork
from memo.runtime.blocking import DISPLAYS
from memo.runtime.clock import SECOND
from memo.runtime.events import Event
from memo.runtime.memory_budget import remember
from memo.runtime.named_tuple import NamedTuple
from memo.runtime.port import Handle, Port
from memo.stores.protocols import function_in

SHOWN_AFTER_SECONDS = 0.5
"""Seconds after which a computation or a wait is shown."""
UPDATE_SECONDS = 0.25
"""Seconds between two updates of the lines."""
_MAX_KNOWN_DURATIONS = 4096
"""Keys whose last duration is remembered."""
_MAX_ESTIMATES = 20
"""Maximum number of runs whose end is estimated in one update."""
_MAX_COMPARED_ENTRIES = 20
"""Maximum number of recent entries of a function from which the time of a new key is estimated."""


class Line(NamedTuple):
    """One line of progress: the running computations of a function.

    Attributes:
        what: the function and its activity, such as `load() runs`.
        seconds: since it began; once over, how long it took by the clock.
        expected: seconds that it will take in all, from earlier runs; None: unknown.
        over: it has ended.
        word: `"running "` if `seconds` is the time of another process; else `""`.
        done: number of runs that have ended, out of `begun`.
        begun: number of runs that have begun.
        each: seconds per call; None: unknown.
        left: seconds until the last running one is expected to end; None: unknown.
        depth: number of other lines that it is nested in.
    """

    what: str
    seconds: float
    expected: float | None = None
    over: bool = False
    word: str = ""
    done: int = 0
    begun: int = 1
    each: float | None = None
    left: float | None = None
    depth: int = 0

    @property
    def share(self) -> float | None:
        """The fraction that is done, 0 to 1; None: unknown."""
        if self.begun > 1:
            return self.done / self.begun
        return min(1.0, self.seconds / self.expected) if self.expected else None

    def __str__(self) -> str:
        return f"{'  ' * self.depth}{self._phrase()}"

    def _phrase(self) -> str:
        spent = formatting.duration(self.seconds)
        if self.begun > 1:
            parts = [f"{self.begun} in {spent}" if self.over else f"{self.done} of {self.begun}"]
            parts += [f"{formatting.duration(self.each)} each"] if self.each is not None else []
            parts += [f"{formatting.duration(self.left)} left"] if self.left is not None else []
            return f"{self.what}: {', '.join(parts)}"
        if self.over:
            return f"{self.what} took {spent}"
        if self.expected is not None:
            return f"{self.what}, {self.word}{spent} of about {formatting.duration(self.expected)}"
        return f"{self.what}, {self.word}{spent}{'' if self.word else ' so far'}"


class Screen(Protocol):
    """A place that shows lines of progress."""

    def open(self) -> bool:
        """True if there is a viewer now."""
        ...

    def show(self, lines: list[Line]) -> None:
        """Replace the lines by these."""

    def close(self, lines: list[Line]) -> None:
        """End the stretch with these lines; nothing is running any more."""


class TerminalScreen:
    """Bars of `rich` on standard error; they are removed when all work has ended."""

    def __init__(self) -> None:
        self._bars: Any = None

    def open(self) -> bool:
        return sys.stderr is not None and sys.stderr.isatty()

    def show(self, lines: list[Line]) -> None:
        if self._bars is None:
            self._bars = self._start_bars()
        bars = self._bars
        for task in list(bars.task_ids):
            bars.remove_task(task)
        for line in lines:
            done = line.share
            total = None if done is None else 1.0
            bars.add_task(str(line), total=total, completed=done or 0.0)
        bars.refresh()

    def _start_bars(self) -> Any:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        color = "cyan"  # by default bars are red
        bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(24, complete_style=color, finished_style=color, pulse_style=color),
            console=Console(file=sys.stderr),
            auto_refresh=False,  # it would start a thread; the ticker refreshes
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        bars.start()
        return bars

    def close(self, lines: list[Line]) -> None:
        bars, self._bars = self._bars, None
        if bars is not None:
            bars.stop()


class _Run:
    """A running computation, wait or transfer."""

    def __init__(self, event: Event) -> None:
        self.kind = event.kind
        self.size = event.size
        self.tier = event.tier
        self.function = event.function
        self.key = event.key
        self.waits = event.kind == events.WAITING
        self.holder = Holder.parse(event.detail) if self.waits else None
        self.since = time.monotonic()
        self.until = 0.0
        self.expected: float | None = None
        self.looked = False
        path = [] if self.waits else [function_in(flight.name) for flight in current_path()]
        self.around = [name for name in path if name != self.function]

    @property
    def spent(self) -> float:
        """Seconds since it began, up to its end."""
        return (self.until or time.monotonic()) - self.since


class _Group:
    """Running and finished computations of one function since the stretch began."""

    def __init__(self, run: _Run) -> None:
        self.first = run
        self.running: list[_Run] = []
        self.done = 0
        self.seconds = 0.0
        self.until = 0.0

    def add(self, run: _Run) -> None:
        """Add a run that begins."""
        self.running.append(run)

    def end(self, run: _Run) -> None:
        """Note that a run has ended."""
        self.running.remove(run)
        self.done += 1
        self.seconds += run.spent
        self.until = run.until

    @property
    def spent(self) -> float:
        """Seconds that all runs took together."""
        return self.seconds + sum(run.spent for run in self.running)

    def line(self, depth: int = 0) -> Line:
        """Return all of it in one line."""
        run = self.running[0] if self.running else self.first
        count, over = self.done + len(self.running), not self.running
        if count > 1:
            known = [r.expected for r in self.running if r.expected is not None]
            each = self.seconds / self.done if self.done else statistics.mean(known or [0.0])
            ends = [(r.expected or each) - r.spent for r in self.running]
            seconds = (self.until if over else time.monotonic()) - self.first.since
            left = max(0.0, *ends, 0.0) if each and not over else None
            what = _name(run) if run.kind == events.COMPUTE_STARTED else _activity(run)
            return Line(what, seconds, None, over, "", self.done, count, each or None, left, depth)
        if run.holder is None or run.holder.since is None:
            what = _name(run) if over and run.kind == events.COMPUTE_STARTED else _activity(run)
            return Line(what, run.spent, None if run.waits else run.expected, over, depth=depth)
        running = max(0.0, time.time() - run.holder.since)
        return Line(_activity(run), running, run.expected, over, "running ", depth=depth)


def _name(run: _Run) -> str:
    name = label(run.function).rpartition(":")[2]
    return name if name.endswith(")") else f"{name}()"


def _activity(run: _Run) -> str:
    if run.kind in _MOVES:
        return f"{_name(run)}: {formatting.size(run.size)} {_MOVES[run.kind]} {run.tier}"
    if run.waits:
        return f"{_name(run)} waits for {holder_name(run.holder)}"
    return f"{_name(run)} runs"


def holder_name(holder: Holder | None) -> str:
    """Name the holder of a lease for display: `kernel 4123 on host a`."""
    return "another process" if holder is None else f"kernel {holder.process} on host {holder.node}"


class Watcher:
    """Keeps track of running work, and shows it while there is a viewer.

    A *stretch* is a running cell of a notebook, or else a time in which anything is running.  In a
    stretch each function has one line, however often it runs.
    """

    def __init__(self) -> None:
        self._screen: Screen = TerminalScreen()
        self._start_over()
        self._stop: Any = None

    def _start_over(self) -> None:
        """Forget all work: at creation, and in the child of a fork."""
        self._waking = threading.Lock()
        self._showing = threading.RLock()  # a run that ends during a redraw is not drawn after it
        self.runs: dict[tuple[str, str], _Run] = {}
        self._groups: dict[tuple[str, str], _Group] = {}
        self._shown: set[tuple[str, str]] = set()
        self._in_cell = False
        self.known: dict[str, float] = {}
        self.latest: dict[str, float] = {}
        self.rates: dict[str, float] = {}
        self.ticker: Handle | None = None

    @property
    def on(self) -> bool:
        """True if it listens."""
        return self._stop is not None

    def switch(self, *, on: bool) -> None:
        """Begin to listen, or stop and show nothing any more."""
        if on == self.on:
            return
        if on:
            self._stop = COUNTERS.listen(self.handle)
            return
        self._stop()
        self._stop = None
        self.runs.clear()
        self._stop_if_idle()
        self._finish()

    def show_on(self, screen: Screen | None) -> None:
        """Show progress on this screen from now on; None: in the terminal."""
        self._finish()
        self._in_cell = False
        self._screen = screen or TerminalScreen()

    def begin_cell(self) -> None:
        """Assign the lines from now on to one cell of a notebook, until it ends."""
        self._finish()
        self._in_cell = True

    def end_cell(self) -> None:
        """End the cell: its lines are final, except those of computations that still run."""
        self._in_cell = False
        self._finish()

    def handle(self, event: Event) -> None:
        """Handle an event."""
        kind = event.kind
        if kind in _BEGINNINGS:
            if not event.reason:
                self._begin(kind, event)
        elif kind == events.COMPUTED:
            self._remember(event)
        elif kind in _ENDS:
            if kind in (events.UPLOADED, events.FETCHED) and event.seconds:
                self.rates[_ENDS[kind]] = event.size / event.seconds
            self._end(_ENDS[kind], event.key)

    def _begin(self, kind: str, event: Event) -> None:
        at = (kind, event.key)
        run = _Run(event)
        with self._showing:
            before = self.runs.get(at)
            if before is not None and run.waits:  # the wait goes on, for another holder
                before.holder, before.looked = run.holder, False
                return
            self.runs[at] = run
            self._groups.setdefault((kind, event.function), _Group(run)).add(run)
        self._start_updates()

    def _remember(self, event: Event) -> None:
        self.latest[event.function] = event.seconds
        remember(self.known, event.key, event.seconds, _MAX_KNOWN_DURATIONS)

    def _start_updates(self) -> None:
        with self._waking:
            if self.ticker is None:
                self.ticker = DISPLAYS.every(UPDATE_SECONDS, self._tick)

    def _stop_if_idle(self) -> bool:
        """If nothing is running, stop the updates and return True."""
        with self._waking:
            if self.runs:
                return False
            ticker, self.ticker = self.ticker, None
        if ticker is not None:
            ticker.cancel()
        return True

    def _end(self, kind: str, key: str) -> None:
        with self._showing:
            run = self.runs.pop((kind, key), None)
            if run is None:
                return
            run.until = time.monotonic()
            group = self._groups.get((kind, run.function))
            if group is not None and run in group.running:
                group.end(run)
            if not self.runs and not self._in_cell:
                self._finish()

    def _finish(self) -> None:
        """End the stretch: computations that still run belong to the next one."""
        with self._showing:
            shown, self._shown = self._shown, set()
            lines = [line for at, line in self._lines(shown) if at[0] != events.WAITING]
            self._groups.clear()
            for (kind, _), run in self.runs.items():
                self._groups.setdefault((kind, run.function), _Group(run)).add(run)
            if shown:
                self._screen.close(lines)

    def _lines(self, shown: set[tuple[str, str]]) -> list[tuple[tuple[str, str], Line]]:
        """Return a line for each group that is shown, nested ones below the outer one."""
        around = {name: None for kind, name in shown if kind == events.COMPUTE_STARTED}
        found: list[tuple[tuple[str, ...], tuple[str, str], Line]] = []
        for at, group in self._groups.items():
            if at in shown:
                outer = tuple(name for name in group.first.around if name in around)
                found.append(((*outer, at[1]), at, group.line(len(outer))))
        order = {name: place for place, (_, name) in enumerate(self._groups)}
        found.sort(key=lambda one: [order.get(name, 0) for name in one[0]])
        return [(at, line) for _, at, line in found]

    async def _tick(self, port: Port) -> None:
        if self._stop_if_idle():
            return
        with self._showing:
            late = {
                at for at, g in self._groups.items() if g.running and g.spent >= SHOWN_AFTER_SECONDS
            }
            unknown = [run for at in late for run in self._groups[at].running if not run.looked]
        if not late or not self._screen.open():
            return
        for run in unknown[:_MAX_ESTIMATES]:
            run.looked = True
            run.expected = await self._expected(port, run)
        with self._showing:
            late = {at for at in late if at in self._groups and self._groups[at].running}
            if late:
                self._shown |= late
                self._screen.show([line for _, line in self._lines(self._shown)])

    async def _expected(self, port: Port, run: _Run) -> float | None:
        """Return the estimated seconds, from earlier runs of this key, else of its function.

        A wait uses its holder's estimate before that of other keys; a transfer the rate of the
        latest one.
        """
        if run.kind in _MOVES:
            rate = self.rates.get(run.kind)
            return run.size / rate if rate else None
        if run.key in self.known:
            return self.known[run.key]
        found = next((f for f in functions() if f.function_id == run.function), None)
        costs, own = ([], False) if found is None else await _recorded(port, found, run.key)
        if run.holder is not None and run.holder.expected is not None and not own:
            return run.holder.expected
        return statistics.median(costs) if costs else self.latest.get(run.function)


_ENDS = {
    events.COMPUTE_ENDED: events.COMPUTE_STARTED,
    events.WAIT_ENDED: events.WAITING,
    events.UPLOADED: events.UPLOAD_STARTED,
    events.UPLOAD_FAILED: events.UPLOAD_STARTED,
    events.FETCHED: events.FETCH_STARTED,
    events.FETCH_FAILED: events.FETCH_STARTED,
}
_BEGINNINGS = frozenset(_ENDS.values())
_MOVES = {events.UPLOAD_STARTED: "to", events.FETCH_STARTED: "from"}


async def _recorded(
    port: Port, function: CachedFunction[Any, Any], key: str
) -> tuple[list[float], bool]:
    """Return the seconds of a key's computations, from this host's entries; else its function's.

    Returns:
        The latest ones, and True if they are the key's own.
    """
    try:
        found = await headers_of(port, function._function.chain(), function.function_id)
    except MemoError:  # a fault of the cache: no bar
        return [], False
    own = [header for header in found if header.key == key]
    latest = sorted(own or found, key=lambda header: -header.times.finished)[:_MAX_COMPARED_ENTRIES]
    return [header.times.cost / SECOND for header in latest], bool(own)


WATCHER = Watcher()
fork.in_child(WATCHER._start_over)


def progress(*, on: bool = True) -> None:
    """Show work that takes longer than half a second, or stop showing it.

    Work means computations, waits for other processes, and transfers to and from Redis.

    `%load_ext memo` turns it on; a script calls it itself.  Without a viewer (standard error is not
    a terminal, a notebook runs unattended) nothing is shown.
    """
    WATCHER.switch(on=on)
