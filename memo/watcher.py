"""Progress: what takes longer than half a second is seen to run, and for how long it will.

That is computations, waits for other processes, and payloads on their way to Redis or from there.

A listener on the stream of events keeps what is under way; the drivers' ticker looks at it four
times a second while anything is.  What is shown goes to a `Screen`: in a notebook the one that
`memo.magics` gives, in a terminal `rich`'s bars.  Fast calls show nothing, nor does anything that
no person looks at.
"""

from __future__ import annotations

import os
import statistics
import sys
import threading
import time
from collections import OrderedDict
from typing import Any, NamedTuple, Protocol

from memo import display, events
from memo.decorators import CachedFunction, functions
from memo.drivers import BLOCKING
from memo.errors import MemoError
from memo.events import Event
from memo.explanations import headers
from memo.figures import label
from memo.leases import Holder
from memo.port import Handle, Port
from memo.stats import COUNTERS

SHOWN_AFTER = 0.5
"""Seconds after which a computation or a wait is shown."""
TICK = 0.25
"""Seconds between two looks at what is under way."""
KNOWN = 4096
"""Keys whose last duration is remembered."""
_SIMILAR = 20
"""Latest entries of a function whose median cost is expected of a key that has none."""


class Line(NamedTuple):
    """One thing under way.

    Attributes:
        what: `load() runs`, or whom it waits for.
        seconds: since it began: the computation, where it is known when it did, also for a wait.
        expected: seconds that it will take in all, from an earlier run; None: not known.
        over: it has ended.
        word: in front of the time, where it is that of another process.
    """

    what: str
    seconds: float
    expected: float | None = None
    over: bool = False
    word: str = ""

    @property
    def share(self) -> float | None:
        """How much of it is done, 0 to 1; None: not known."""
        return min(1.0, self.seconds / self.expected) if self.expected else None

    def __str__(self) -> str:
        if self.over:
            return f"{self.what} took {display.duration(self.seconds)}"
        spent = display.duration(self.seconds)
        if self.expected is not None:
            return f"{self.what}, {self.word}{spent} of about {display.duration(self.expected)}"
        return f"{self.what}, {self.word}{spent}{'' if self.word else ' so far'}"


class Screen(Protocol):
    """Where progress is shown."""

    def open(self) -> bool:
        """Whether a person looks at it now."""
        ...

    def show(self, lines: list[Line]) -> None:
        """Show these lines in place of those before."""

    def close(self, lines: list[Line]) -> None:
        """Nothing is under way any more; these lines are the last."""


class Terminal:
    """Bars of `rich` on standard error; they go when nothing is under way any more."""

    def __init__(self) -> None:
        self._bars: Any = None

    def open(self) -> bool:
        return sys.stderr is not None and sys.stderr.isatty()

    def show(self, lines: list[Line]) -> None:
        if self._bars is None:
            self._bars = self._started()
        bars = self._bars
        for task in list(bars.task_ids):
            bars.remove_task(task)
        for line in lines:
            done = line.share
            total = None if done is None else 1.0
            bars.add_task(str(line), total=total, completed=done or 0.0)
        bars.refresh()

    def _started(self) -> Any:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=24))
        bars = Progress(
            *columns,
            console=Console(file=sys.stderr),
            auto_refresh=False,  # it would start a thread; the drivers' ticker refreshes
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
    """One computation, one wait or one transfer under way."""

    def __init__(self, event: Event) -> None:
        self.kind = event.kind
        self.size = event.size
        self.tier = event.tier
        self.function = event.function
        self.key = event.key
        self.waits = event.kind == events.WAITING
        self.holder = Holder.of(event.detail) if self.waits else None
        self.since = time.monotonic()
        self.expected: float | None = None
        self.looked = False

    def line(self, *, over: bool = False) -> Line:
        name = label(self.function).rpartition(":")[2]
        name = name if name.endswith(")") else f"{name}()"
        spent = time.monotonic() - self.since
        if self.kind in _MOVES:
            what = f"{name}: {display.size(self.size)} {_MOVES[self.kind]} {self.tier}"
            return Line(what, spent, self.expected, over)
        if not self.waits:
            return Line(name if over else f"{name} runs", spent, self.expected, over)
        what = f"{name} waits for {whom(self.holder)}"
        if self.holder is None or self.holder.since is None:
            return Line(what, spent, None, over)
        running = max(0.0, time.time() - self.holder.since)
        return Line(what, running, self.expected, over, "running ")


def whom(holder: Holder | None) -> str:
    """Who holds a lease, for people: `kernel 4123 on host a`."""
    return "another process" if holder is None else f"kernel {holder.process} on host {holder.node}"


class Watcher:
    """Keeps what is under way, and shows it while a person looks."""

    def __init__(self) -> None:
        self._screen: Screen = Terminal()
        self._start_over()
        self._stop: Any = None

    def _start_over(self) -> None:
        """Nothing is under way: at first, and in the child of a fork."""
        self._waking = threading.Lock()
        self._showing = threading.RLock()  # what ends while it is drawn is not drawn afterwards
        self._runs: dict[tuple[str, str], _Run] = {}
        self._shown: dict[tuple[str, str], _Run] = {}
        self._known: OrderedDict[str, float] = OrderedDict()
        self._latest: dict[str, float] = {}
        self._rates: dict[str, float] = {}
        self._ticker: Handle | None = None

    @property
    def on(self) -> bool:
        """Whether it listens."""
        return self._stop is not None

    def turn(self, *, on: bool) -> None:
        """Begin to listen, or stop and show nothing any more."""
        if on == self.on:
            return
        if on:
            self._stop = COUNTERS.listen(self.hear)
            return
        self._stop()
        self._stop = None
        self._runs.clear()
        self._rest()
        self._finish()

    def use(self, screen: Screen | None) -> None:
        """Show it on a screen from now on; None: in the terminal."""
        self._finish()
        self._screen = screen or Terminal()

    def hear(self, event: Event) -> None:
        """Take an event."""
        kind = event.kind
        if kind in _BEGINNINGS:
            if not event.reason:
                self._begin(kind, event)
        elif kind == events.COMPUTED:
            self._remember(event)
        elif kind in _ENDS:
            if kind in (events.UPLOADED, events.FETCHED) and event.seconds:
                self._rates[_ENDS[kind]] = event.size / event.seconds
            self._end(_ENDS[kind], event.key)

    def _begin(self, kind: str, event: Event) -> None:
        at = (kind, event.key)
        run, before = _Run(event), self._runs.get(at)
        if before is not None and run.waits:  # the wait goes on, for somebody else
            run.since = before.since
        if at in self._shown:
            self._shown[at] = run
        self._runs[at] = run
        self._wake()

    def _remember(self, event: Event) -> None:
        self._latest[event.function] = event.seconds
        self._known[event.key] = event.seconds
        self._known.move_to_end(event.key)
        if len(self._known) > KNOWN:
            self._known.popitem(last=False)

    def _wake(self) -> None:
        with self._waking:
            if self._ticker is None:
                self._ticker = BLOCKING.every(TICK, self._tick)

    def _rest(self) -> bool:
        """Look no more where nothing is under way; whether that is so."""
        with self._waking:
            if self._runs:
                return False
            ticker, self._ticker = self._ticker, None
        if ticker is not None:
            ticker.cancel()
        return True

    def _end(self, kind: str, key: str) -> None:
        run = self._runs.pop((kind, key), None)
        if run is None or time.monotonic() - run.since < SHOWN_AFTER:
            return
        with self._showing:
            if not any(name in self._runs for name in self._shown):
                self._finish()

    def _finish(self) -> None:
        """Nothing that was shown is under way any more."""
        with self._showing:
            shown, self._shown = self._shown, {}
            if shown:
                self._screen.close([run.line(over=True) for run in shown.values() if not run.waits])

    async def _tick(self, port: Port) -> None:
        if self._rest():
            return
        now = time.monotonic()
        late = {at: r for at, r in tuple(self._runs.items()) if now - r.since >= SHOWN_AFTER}
        if not late or not self._screen.open():
            return
        for run in late.values():
            if not run.looked:
                run.looked = True
                run.expected = await self._expected(port, run)
        with self._showing:
            late = {at: run for at, run in late.items() if self._runs.get(at) is run}
            if late:
                self._shown.update(late)
                self._screen.show([run.line() for run in late.values()])

    async def _expected(self, port: Port, run: _Run) -> float | None:
        """How long it took before: this key, else the function, here or wherever it was stored.

        Of a wait, what its holder expects comes before what is known of other keys; of a transfer,
        what its bytes took at the latest one's rate.
        """
        if run.kind in _MOVES:
            rate = self._rates.get(run.kind)
            return run.size / rate if rate else None
        if run.key in self._known:
            return self._known[run.key]
        found = next((f for f in functions() if f.function_id == run.function), None)
        costs, own = ([], False) if found is None else await _recorded(port, found, run.key)
        if run.holder is not None and run.holder.expected is not None and not own:
            return run.holder.expected
        return statistics.median(costs) if costs else self._latest.get(run.function)


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
    """Seconds of a key's computations, from its entries on this host, else of its function's.

    Returns:
        The latest ones, and whether they are the key's own.
    """
    try:
        found = await headers(port, function._function.chain(), function.function_id)
    except MemoError:  # a fault of the cache: no bar
        return [], False
    own = [header for header in found if header.key == key]
    latest = sorted(own or found, key=lambda header: -header.times.finished)[:_SIMILAR]
    return [header.times.cost / 1e9 for header in latest], bool(own)


WATCHER = Watcher()
if sys.platform != "win32":
    os.register_at_fork(after_in_child=WATCHER._start_over)


def progress(*, on: bool = True) -> None:
    """Show what takes longer than half a second, or show it no more.

    That is computations, waits for other processes, and transfers to and from Redis.

    `%load_ext memo` turns it on; a script does so itself.  Where nobody looks (standard error is no
    terminal, a notebook runs unattended) nothing is shown.
    """
    WATCHER.turn(on=on)
