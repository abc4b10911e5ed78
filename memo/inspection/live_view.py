"""The live view as data: what its page shows, and what its buttons do.

`memo.dashboard()` and `memo ui` draw the same state with the same page (`static/view.js`).
It consists of counters, headers of entries and facts about tiers; no value is loaded.
"""

from __future__ import annotations

import ast
import json
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from memo.decorators import assembly
from memo.decorators.cached_function import CachedFunction, functions
from memo.decorators.invalidators import invalidate
from memo.errors import MemoError, label
from memo.inspection import call_graph, graph_drawing, inventory
from memo.inspection.gathered_stats import stats
from memo.inspection.inventory import Item, Selection
from memo.keys.summaries import BUILT_ON, RESOLVED, RESULT_SHAPE
from memo.metrics import formatting, rendering
from memo.metrics.running_computations import COMPUTATIONS, LONG_COMPUTATION_SECONDS, Running
from memo.metrics.snapshots import FunctionStats, Stats
from memo.records.seal import Header
from memo.runtime.blocking import BLOCKING, drive
from memo.runtime.clock import SECOND
from memo.runtime.native import native
from memo.runtime.port import Port
from memo.runtime.reasons import INVALIDATED

LISTING_SECONDS = 3.0
"""Seconds between two listings of the entries on the disk."""
MAX_LISTED_ENTRIES = 200
"""Maximum number of entries that one page lists; the filter narrows them down."""
MAX_NAMED_ENTRIES = 4
"""Maximum number of entries named in the answer to a button."""
PLOT_STEPS = 60
"""Time steps in the plot of one function."""


class Model:
    """The model of the live view: its state as plain data, and the commands of its buttons.

    Args:
        shared: show every process that shares the directory, as `memo ui` does, instead of this
            one.
        every: seconds between two listings of entries.
    """

    def __init__(self, *, shared: bool = False, every: float = LISTING_SECONDS) -> None:
        self.shared = shared
        self._every = every
        self.filter = ""
        self.order = "newest"
        self.items: list[Item] = []
        self._count = 0
        self._graph: dict[str, Any] = {}
        self.list_at = 0.0
        """Monotonic time at which entries and graph are read again; 0: at the next `state()`."""
        self._chain: Any = None
        self._long: set[tuple[int, str]] = set()
        self.said: dict[str, str] = {}
        """The outcome of the last button pressed beside each entry or function."""
        self.answers: dict[str, int] = {}
        """The number of that answer: two presses may have the same text."""

    def state(self) -> dict[str, Any]:
        """Return everything that the page draws."""
        now = stats(shared=self.shared)
        running = COMPUTATIONS.everywhere() if self.shared else COMPUTATIONS.here()
        error = ""
        try:
            chain = assembly.default_chain()
            health = drive(chain.health(BLOCKING))
            if self.shared:
                health.pop("memory", None)  # this process computes nothing
            self._relist_after_long_computations(running)
            self._list(chain)
        except MemoError as fault:
            health, error = {}, str(fault)
        return {
            "shared": self.shared,
            "headline": rendering.headline(now),
            "error": error,
            "running": [_running(run) for run in running],
            "functions": _functions(now),
            "tiers": [list(line) for line in rendering.tiers(now.with_health(health))],
            "entries": self._entries(),
            "graph": self._graph,
            "said": self.said,
            "answers": self.answers,
        }

    def _relist_after_long_computations(self, running: list[Running]) -> None:
        """Read entries and graph again if a long computation has begun or ended."""
        long = {
            (r.process, r.key) for r in running if time.time() - r.since >= LONG_COMPUTATION_SECONDS
        }
        if long != self._long:
            self._long, self.list_at = long, 0.0

    def _list(self, chain: Any) -> None:
        if chain is self._chain and time.monotonic() < self.list_at:
            return
        wanted = Selection(by=self.order)
        items, _ = inventory.items(wanted)
        words = self.filter.lower().split()
        own = {function.function_id for function in functions()}
        if not self.shared:  # this notebook's come first
            items.sort(key=lambda item: item.header.function not in own)
        found = [item for item in items if all(word in _text(item) for word in words)]
        self.items, self._count = found[:MAX_LISTED_ENTRIES], len(found)
        made = call_graph.graph_of(everything=self.shared)
        self._graph = {"svg": made.to_svg(), "text": "" if made.nodes else rendering.NO_CALLS}
        self._chain, self.list_at = chain, time.monotonic() + self._every

    def _entries(self) -> dict[str, Any]:
        table = inventory.table(self.items)
        rows = formatting.table_data(table)["rows"]
        for row, item in zip(rows, self.items, strict=True):
            row["key"] = item.header.key
            row["preview"] = preview(item)
            row["why"] = "" if call_of(item.header) else _why_not_refreshed(item.header)
        return {**formatting.table_data(table), "rows": rows, "count": self._count}

    def press(self, message: Any) -> None:
        """Carry out a command of the page.

        Args:
            message: `{"do": "invalidate" | "refresh" | "explain", "key" | "function": …}`, or
                `{"do": "show", "filter": text, "order": one of inventory.ORDERS}`.
        """
        if not isinstance(message, dict):
            return
        target = str(message.get("key") or message.get("function") or "")
        try:
            outcome = self._press(message)
        except (MemoError, TypeError, ValueError) as error:
            outcome = f"Failed: {error}"
        if target:
            self.said = {**dict(list(self.said.items())[-20:]), target: outcome}
            number = max(self.answers.values(), default=0) + 1
            kept = {name: at for name, at in self.answers.items() if name in self.said}
            self.answers = {**kept, target: number}
        self.list_at = 0.0

    def _press(self, message: dict[str, Any]) -> str:
        what = message.get("do")
        if what == "show":
            self.filter = str(message.get("filter", ""))[:200]
            order = message.get("order", self.order)
            self.order = order if order in inventory.ORDERS else self.order
            return ""
        if what == "invalidate" and message.get("function"):
            name = str(message["function"])
            return self._invalidate_and_list(lambda: invalidate(function=name, reason="live view"))
        key = str(message.get("key", ""))
        item = next((item for item in self.items if item.header.key == key), None)
        if item is None:
            return "That entry no longer exists."
        header = item.header
        if what == "refresh":
            return _refresh(header)
        if what == "explain":
            return _explained(item)
        if what == "invalidate":
            return self._invalidate_and_list(lambda: invalidate(key=header.key, reason="live view"))
        return ""

    def _invalidate_and_list(self, work: Callable[[], Any]) -> str:
        """Invalidate, and say which entries of this host were dropped."""
        headers = [item.header for item in inventory.items(Selection())[0]]
        chain = assembly.default_chain()
        before = drive(inventory.states(BLOCKING, chain, headers))
        done = work()
        after = drive(inventory.states(BLOCKING, chain, headers))
        pairs = zip(headers, before, after, strict=True)
        gone = [h for h, old, new in pairs if old != new and new == INVALIDATED]
        gone.sort(key=lambda header: header.times.finished)  # what was built on it comes after it
        how = ", ".join(f"{tier}: {what}" for tier, what in done.tiers.items())
        if not gone:
            return f"No entry here was still valid ({how})."
        calls = ", ".join(rendering.call_text(header) for header in gone[:MAX_NAMED_ENTRIES])
        more = f" and {len(gone) - MAX_NAMED_ENTRIES} more" if len(gone) > MAX_NAMED_ENTRIES else ""
        return f"Invalidated {calls}{more} ({how})."


def _text(item: Item) -> str:
    """Return the text that the filter searches."""
    header = item.header
    given = " ".join(f"{name}={text}" for name, text in rendering.arguments(header).items())
    return f"{label(header.function)} {given} {item.state} {' '.join(item.tiers)}".lower()


def _running(run: Running) -> dict[str, Any]:
    spent = max(0.0, time.time() - run.since)
    return {
        "function": run.label,
        "call": run.call,
        "since": run.since,
        "spent": formatting.duration(spent),
        "about": formatting.duration(run.expected) if run.expected else "",
        "share": min(1.0, spent / run.expected) if run.expected else None,
        "doing": "refreshing" if run.background else "computing",
        "where": "" if run.here else f"process {run.process}",
    }


def _functions(now: Stats) -> dict[str, Any]:
    """Return the table of functions, this process's first, each with its plot."""
    own = {function.function_id for function in functions()}
    table = rendering.table(now)
    rows = formatting.table_data(table)["rows"]
    for row in rows:
        name = row["cells"][0]["value"]
        row["function"] = name
        row["here"] = name in own
        row["plot"] = _plot(now.functions[name])
    rows.sort(key=lambda row: not row["here"])
    return {**formatting.table_data(table), "rows": rows}


def _plot(part: FunctionStats) -> dict[str, Any]:
    """Return the last `PLOT_STEPS` steps of hits, stale hits and misses, and a step's seconds."""
    width, points = part.bars(rendering.MAX_BARS)
    step = formatting.duration(width)
    return {"width": width, "step": step, "points": [list(point) for point in points[-PLOT_STEPS:]]}


def preview(item: Item) -> str:
    """Describe a stored value by its header, without loading it."""
    header = item.header
    try:
        shape = json.loads(header.summary).get(RESULT_SHAPE)
    except ValueError:
        shape = None
    parts = [str(shape[0])] if shape else []
    if header.buffers:
        held = formatting.size(sum(buffer.size for buffer in header.buffers))
        parts.append(f"{formatting.quantity(len(header.buffers), 'buffer')}, {held}")
    parts.append(f"written with {header.codec}")
    return formatting.SEPARATOR.join(parts)


def _explained(item: Item) -> str:
    """Explain the state of an entry in a sentence, and its origin."""
    header = item.header
    at = formatting.date_and_time(header.times.finished / SECOND)
    cost = formatting.duration(header.times.cost / SECOND)
    what = graph_drawing.STATE_MEANINGS.get(item.state, "stored, and valid: the next call is a hit")
    origin = f"Computed {at} by {header.writer} in {cost}: {preview(item)}."
    return f"{rendering.call_text(header)} is {item.state}: {what}. {origin}"


# --- refreshing an entry --------------------------------------------------------------------------


def _functions_named(identity: str) -> list[CachedFunction[Any, Any]]:
    """Return all functions with an id; a cell that ran again leaves its earlier one behind."""
    return [function for function in functions() if function.function_id == identity]


def _why_not_refreshed(header: Header) -> str:
    """Explain why an entry cannot be refreshed from here."""
    if not _functions_named(header.function):
        return "its function is not in this process"
    if any(function._options["each"] for function in _functions_named(header.function)):
        return "it is one element of a collection; call its refresh() by hand"
    return "its arguments cannot be read back; call its refresh() by hand"


def call_of(header: Header) -> tuple[CachedFunction[Any, Any], dict[str, Any]] | None:
    """Return the function and the arguments of an entry's call.

    None if this process does not have the function, or if the entry's summary shortens an argument;
    the key made from the arguments must be the entry's.
    """
    try:
        summary = json.loads(header.summary)
        summary.pop(RESOLVED, None)
        summary.pop(RESULT_SHAPE, None)
        summary.pop(BUILT_ON, None)
        given = {name: ast.literal_eval(parts[0]) for name, parts in summary.items()}
    except (ValueError, SyntaxError, TypeError, LookupError, AttributeError):
        return None
    for function in reversed(_functions_named(header.function)):
        if function._options["each"]:
            continue  # it takes a collection of the caller's type
        with suppress(ValueError, TypeError, MemoError):
            if function.key(**given) == header.key:
                return function, given
    return None


def _refresh(header: Header) -> str:
    """Recompute an entry in the background."""
    call = call_of(header)
    if call is None:
        return f"Not refreshed: {_why_not_refreshed(header)}."
    function, given = call

    async def work(_: Port) -> None:
        if function.is_async:
            await function.arefresh(**given)
        else:
            function.refresh(**given)

    port: Port = native() if function.is_async else BLOCKING
    port.spawn(work, f"memo-live-view-{function.function_id}")
    return f"Refreshing {rendering.call_text(header)} in the background."


def page_file(name: str) -> str:
    """Return the text of a file of the page: `page.html`, `view.js`, `view.css` or `page.js`."""
    return formatting.static_file(__package__, name)


def static_mimebundle(model: Model) -> dict[str, str]:
    """Return the same facts without a script: HTML with the graph as SVG, and plain text."""
    state = model.state()
    now = stats(shared=model.shared)
    running = [f"{run['call']} {run['doing']}, {run['spent']}" for run in state["running"]]
    parts = [rendering.html(now), formatting.lines_html("\n".join(running))]
    text = [rendering.text(now), *running]
    if model.items:
        table = inventory.table(model.items)
        parts.append(formatting.with_style(formatting.table_html(table)))
        text += ["", formatting.table_text(table)]
    parts.append(state["graph"].get("svg", ""))
    return {"text/html": "".join(parts), "text/plain": "\n".join(text)}
