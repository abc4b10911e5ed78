"""The dashboard: what the cache does now, as a live widget in a notebook.

The kernel pushes its state once a second while the widget is seen somewhere, also while a cell
runs; the page sends back which button was pressed.  The page's part is the plain module below: no
script and no style comes from anywhere else, and every text is put in as text.
"""

from __future__ import annotations

import ast
import json
import time
from collections import deque
from typing import Any

from memo import assembly, display
from memo.clock import SECOND
from memo.decorators import CachedFunction, functions
from memo.drivers import BLOCKING, drive, native
from memo.errors import MemoError, MissingExtraError
from memo.explanations import LOOKED_AT, listing
from memo.figures import Stats, label
from memo.flights import FLIGHTS
from memo.invalidation import invalidate
from memo.port import Handle, Port
from memo.seal import Header
from memo.stats import stats
from memo.summaries import RESOLVED

INTERVAL = 1.0
"""Seconds between two looks."""
HISTORY = 120
"""Looks that the drawing goes back."""
ENTRIES = 15
"""Most expensive entries that are listed."""
LISTED_EVERY = 5.0
"""Seconds between two looks at the entries on the disk."""


class Model:
    """What the dashboard shows, as plain data, and what its buttons do."""

    def __init__(self) -> None:
        self._before: Stats | None = None
        self._rates: deque[tuple[int, int, int]] = deque(maxlen=HISTORY)
        self._headers: list[tuple[Header, int]] = []
        self._listed = 0.0
        self.said = ""
        """How the last button went."""

    def state(self) -> dict[str, Any]:
        """Everything that the page draws."""
        now = stats()
        self._count(now)
        try:
            health = drive(assembly.default_chain().health(BLOCKING))
            self._list()
        except MemoError as error:
            health = {"settings": {"up": False, "error": str(error)}}
        return {
            "headline": display.headline(now),
            "rates": [list(rate) for rate in self._rates],
            "tiers": [list(line) for line in display.tiers(now.with_health(health))],
            "flights": sorted(_flights()),
            "functions": [_function(name, now) for name in _by_saving(now)],
            "entries": [self._entry(header, size) for header, size in self._headers],
            "said": self.said,
        }

    def _count(self, now: Stats) -> None:
        """Hits, stale hits and misses since the last look."""
        before, self._before = self._before, now
        if before is None or now.since != before.since:
            return
        new = now.total - before.total
        self._rates.append((new.hits + new.coalesced, new.stale, new.misses))

    def _list(self) -> None:
        if time.monotonic() - self._listed < LISTED_EVERY:
            return
        chain = assembly.default_chain()
        found = drive(listing(BLOCKING, chain, f"{chain.namespace}:", LOOKED_AT))
        found.sort(key=lambda entry: -entry[0].times.cost)
        self._headers = found[:ENTRIES]
        self._listed = time.monotonic()

    def _entry(self, header: Header, size: int) -> dict[str, Any]:
        age = max(0.0, time.time() - header.times.finished / SECOND)
        given = display.arguments(header)
        return {
            "key": header.key,
            "function": label(header.function),
            "arguments": ", ".join(f"{name}={text}" for name, text in given.items()),
            "cost": display.duration(header.times.cost / SECOND),
            "size": display.size(size),
            "age": display.duration(age),
            "refreshes": call_of(header) is not None,
        }

    def press(self, message: Any) -> None:
        """Do what a button says: `{"do": "invalidate" | "refresh", "key" | "function": …}`."""
        try:
            self.said = self._press(dict(message))
        except (MemoError, TypeError, ValueError) as error:
            self.said = f"That did not work: {error}"
        self._listed = 0.0

    def _press(self, message: dict[str, Any]) -> str:
        if message.get("function"):
            function = _named(str(message["function"]))
            return "" if function is None else _told(function.invalidate(reason="dashboard"))
        header = next((h for h, _ in self._headers if h.key == message.get("key")), None)
        if header is None:
            return "That entry has gone."
        if message.get("do") == "refresh":
            return _refresh(header)
        done = invalidate(key=header.address, reason="dashboard")
        return _told(done._replace(target=f"key {display.address(header)}"))


def _by_saving(now: Stats) -> list[str]:
    return sorted(now.functions, key=lambda name: (-now.functions[name].saved, name))


def _function(name: str, now: Stats) -> dict[str, Any]:
    part = now.functions[name]
    return {
        "id": name,
        "label": label(name),
        "hits": display.number(part.hits),
        "stale": display.number(part.stale),
        "misses": display.number(part.misses),
        "answered": display.percent(part.hit_rate),
        "saved": display.duration(part.saved),
        "here": _named(name) is not None,
    }


def _flights() -> list[list[str]]:
    """(function, what it does) of the computations and refreshes under way in this kernel."""
    return [
        [
            label(flight.name.partition("{")[2].rpartition("}")[0]),
            "refreshing" if flight.background else "computing",
        ]
        for flight in FLIGHTS.under_way()
    ]


def _named(identity: str) -> CachedFunction[Any, Any] | None:
    return next((f for f in functions() if f.function_id == identity), None)


def _told(done: Any) -> str:
    how = ", ".join(f"{tier}: {what}" for tier, what in done.tiers.items())
    return f"Invalidated {label(done.target)} ({how})"


# --- refreshing an entry --------------------------------------------------------------------------


def call_of(header: Header) -> tuple[CachedFunction[Any, Any], dict[str, Any]] | None:
    """The function and the arguments that make an entry's key again.

    Only where the function is in this kernel, and the entry's summary has every argument in full:
    whether it has is decided by the key, which must be the same.
    """
    function = _named(header.function)
    if function is None:
        return None
    try:
        summary = json.loads(header.summary)
        summary.pop(RESOLVED, None)
        given = {name: ast.literal_eval(parts[0]) for name, parts in summary.items()}
        same = function.key(**given) == header.key
    except (ValueError, SyntaxError, TypeError, LookupError, AttributeError, MemoError):
        return None
    return (function, given) if same else None


def _refresh(header: Header) -> str:
    """Compute an entry anew, in the background."""
    call = call_of(header)
    if call is None:
        return "Its arguments cannot be read back; call its refresh() by hand."
    function, given = call

    async def work(_: Port) -> None:
        if function.is_async:
            await function.arefresh(**given)
        else:
            function.refresh(**given)

    port: Port = native() if function.is_async else BLOCKING
    port.spawn(work, f"memo-dashboard-{function.function_id}")
    return f"Refreshing {label(display.address(header))}"


# --- the widget -----------------------------------------------------------------------------------


def dashboard() -> Any:
    """A live view of the cache: rates, tiers, what is under way, the most expensive entries.

    Returns:
        A widget for JupyterLab, Notebook 7 and VS Code; `close()` ends it.

    Raises:
        MissingExtraError: anywidget is not installed.
    """
    try:
        return _widget_class()()
    except ImportError:
        raise MissingExtraError(
            "memo.dashboard() needs anywidget: pip install 'jupyter-memo[notebook]'"
        ) from None


def _widget_class() -> Any:
    """The class of the widget, which cannot be named before anywidget is imported."""
    import anywidget
    import traitlets

    class Dashboard(anywidget.AnyWidget):
        """The widget."""

        _esm = _ESM
        _css = display.STYLE.removeprefix("<style>").removesuffix("</style>") + _CSS
        state = traitlets.Dict().tag(sync=True)

        def __init__(self) -> None:
            self.model = Model()
            self._views = 0
            self._ticker: Handle | None = None
            super().__init__(state=self.model.state())
            self.on_msg(self._hear)

        def _hear(self, _: Any, message: Any, __: Any) -> None:
            if message.get("do") == "open":
                self._watch(self._views + 1)
            elif message.get("do") == "shut":
                self._watch(self._views - 1)
            else:
                self.model.press(message)
                self.state = self.model.state()

        def _watch(self, views: int) -> None:
            """Look while somebody looks."""
            self._views = max(0, views)
            if self._views and self._ticker is None:
                self._ticker = BLOCKING.every(INTERVAL, self._look)
            elif not self._views and self._ticker is not None:
                self._ticker.cancel()
                self._ticker = None

        async def _look(self, _: Port) -> None:
            self.state = self.model.state()

        def close(self) -> None:
            self._watch(0)
            super().close()

    return Dashboard


# Two classes deep: each output of a notebook brings memo's style along, also later than this one.
_CSS = """
.memo .memo-dashboard{display:grid;gap:.6em;padding:.4em 0}
.memo .memo-dashboard h4{margin:.4em 0 0;font-weight:600}
.memo .memo-dashboard button{font:inherit;font-size:.85em;color:inherit;background:transparent;
border:1px solid var(--memo-line);border-radius:3px;padding:.1em .6em;margin-left:.3em;
cursor:pointer}
.memo .memo-dashboard button:disabled{opacity:.4;cursor:default}
.memo .memo-dashboard button:focus-visible{outline:2px solid currentColor;outline-offset:1px}
.memo .memo-dashboard svg{width:100%;max-width:640px;height:72px;
border-bottom:1px solid var(--memo-line)}
.memo .memo-dashboard td.memo-args{white-space:normal;overflow-wrap:anywhere;min-width:8em}
.memo .memo-key{display:inline-block;width:.8em;height:.8em;margin:0 .3em 0 .8em}
"""

_ESM = r"""
const COLOURS = [["hits", "#3a9d5d"], ["stale", "#c98a00"], ["misses", "#c9503f"]];

function make(name, text, parent, className) {
  const made = document.createElement(name);
  if (text !== undefined && text !== null) made.textContent = text;
  if (className) made.className = className;
  if (parent) parent.appendChild(made);
  return made;
}

function button(parent, text, title, press) {
  const made = make("button", text, parent);
  made.type = "button";
  made.title = title;
  if (press) made.addEventListener("click", press); else made.disabled = true;
}

function table(parent, titles, texts) {
  const made = make("table", null, make("div", null, parent, "memo-wide"));
  const row = make("tr", null, make("thead", null, made));
  titles.forEach((title, i) => {
    make("th", title, row, i < texts ? "memo-text" : "").scope = "col";
  });
  return make("tbody", null, made);
}

function plot(parent, rates) {
  const space = "http://www.w3.org/2000/svg", count = 120, high = 60;
  const top = Math.max(1, ...rates.map((rate) => rate[0] + rate[1] + rate[2]));
  const drawing = document.createElementNS(space, "svg");
  drawing.setAttribute("viewBox", `0 0 ${count * 4} ${high}`);
  drawing.setAttribute("preserveAspectRatio", "none");
  drawing.setAttribute("role", "img");
  drawing.setAttribute("aria-label", "hits, stale hits and misses per second");
  rates.forEach((rate, at) => {
    let base = high;
    rate.forEach((value, kind) => {
      const height = (value / top) * high;
      base -= height;
      if (!value) return;
      const bar = document.createElementNS(space, "rect");
      bar.setAttribute("x", (count - rates.length + at) * 4);
      bar.setAttribute("y", base);
      bar.setAttribute("width", 3);
      bar.setAttribute("height", height);
      bar.setAttribute("fill", COLOURS[kind][1]);
      drawing.appendChild(bar);
    });
  });
  parent.appendChild(drawing);
  const last = rates.length ? rates[rates.length - 1] : [0, 0, 0];
  const legend = make("p", "per second", parent, "memo-dim");
  COLOURS.forEach(([name, colour], kind) => {
    make("span", null, legend, "memo-key").style.background = colour;
    legend.append(`${name} ${last[kind]}`);
  });
}

function functionsTable(root, state, send) {
  make("h4", "Functions", root);
  const body = table(root, ["function", "hits", "stale", "misses", "answered", "saved", ""], 1);
  state.functions.forEach((one) => {
    const row = make("tr", null, body);
    make("th", one.label, row, "memo-text").scope = "row";
    [one.hits, one.stale, one.misses, one.answered, one.saved].forEach((t) => make("td", t, row));
    button(make("td", null, row), "Invalidate", "make every entry of it untrue",
      one.here ? () => send({ do: "invalidate", function: one.id }) : null);
  });
}

function entriesTable(root, state, send) {
  make("h4", "Most expensive entries on this host", root);
  const body = table(root, ["function", "arguments", "cost", "size", "age", ""], 2);
  state.entries.forEach((one) => {
    const row = make("tr", null, body);
    make("th", one.function, row, "memo-text").scope = "row";
    make("td", one.arguments, row, "memo-text memo-args");
    [one.cost, one.size, one.age].forEach((t) => make("td", t, row));
    const cell = make("td", null, row);
    button(cell, "Refresh", one.refreshes ? "compute it anew, in the background"
      : "its arguments cannot be read back",
      one.refreshes ? () => send({ do: "refresh", key: one.key }) : null);
    button(cell, "Invalidate", "make it untrue",
      () => send({ do: "invalidate", key: one.key }));
  });
}

function draw(root, state, send) {
  const focus = root.contains(document.activeElement)
    ? Array.from(root.querySelectorAll("button")).indexOf(document.activeElement) : -1;
  root.replaceChildren();
  make("p", null, root).append(make("b", "memo "), state.headline);
  plot(root, state.rates);
  const tiers = make("div", null, root);
  state.tiers.forEach(([name, said, well]) => {
    const line = make("p", null, tiers, "memo-dim");
    make("b", name, line, well ? "" : "memo-bad");
    line.append(` ${said}`);
  });
  const doing = state.flights.map(([name, what]) => `${name} ${what}`).join(" · ");
  make("p", `Under way: ${doing || "nothing"}`, root, "memo-flights");
  if (state.functions.length) functionsTable(root, state, send);
  if (state.entries.length) entriesTable(root, state, send);
  make("p", state.said, root, "memo-dim memo-said").setAttribute("role", "status");
  if (focus >= 0) root.querySelectorAll("button")[focus]?.focus();
}

function render({ model, el }) {
  const root = make("div", null, make("div", null, el, "memo"), "memo-dashboard");
  const send = (message) => model.send(message);
  let pressed = false;
  const update = () => { if (!pressed) draw(root, model.get("state"), send); };
  const release = () => { if (pressed) { pressed = false; setTimeout(update); } };
  root.addEventListener("pointerdown", () => { pressed = true; }); // a redraw would lose the click
  window.addEventListener("pointerup", release);
  model.on("change:state", update);
  update();
  send({ do: "open" });
  return () => {
    model.off("change:state", update);
    window.removeEventListener("pointerup", release);
    send({ do: "shut" });
  };
}

export default { render };
"""
