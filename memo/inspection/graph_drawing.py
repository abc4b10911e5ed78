"""Drawings of the graph of cached calls: as SVG, and as a tree for terminals.

networkx assigns calls to layers; what a result was built on is on its left.  Boxes have their own
background and dark text, so that the drawing is readable on light and dark pages, even as an image.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Protocol

from memo.errors import label
from memo.metrics import formatting, rendering
from memo.metrics.formatting import Styled, cell_len, cut_to_width
from memo.runtime.named_tuple import NamedTuple

if TYPE_CHECKING:
    import networkx as nx

RUNNING, ONLY_STORED = "running", "stored"
STATE_COLOURS = {
    "hit": "#9fd8b0",
    "computed": "#a9cdf5",
    "stored": "#d9dde3",
    "running": "#d3bdf2",
    "stale": "#f6d98b",
    "in doubt": "#f6d98b",
    "expired": "#f0c2a0",
    "invalidated": "#f3b0a8",
    "outdated": "#f3b0a8",
}
"""State -> background; dark text on each has a contrast above 7 : 1."""
STATE_MEANINGS = {
    "hit": "answered from the cache in this process",
    "computed": "computed by this process",
    "stored": "stored, and still valid",
    "running": "being computed now",
    "stale": "still answers, and is refreshed at the next call",
    "in doubt": "built on results that may have changed: the next call checks those first",
    "expired": "past its lifetime: the next call computes it",
    "invalidated": "no longer valid: the next call computes it",
    "outdated": "its code or a dependency has changed: the next call computes it",
    "unknown": "a tier or remote source that decides whether it is valid cannot be reached",
}
"""State -> its explanation in the legend."""
BOX_WIDTH, BOX_HEIGHT = 188, 58
BOLD_CHARACTERS = 23
"""Number of characters of bold text that fit into a box."""
_ACROSS, _DOWN, _EDGE = 56, 16, 12
ORDERING_SWEEPS = 4
"""Number of times each layer is sorted by the positions of neighbours, to reduce crossings."""
STATE_STYLES = {"hit": "green", "computed": "blue", "running": "magenta", "stale": "yellow"}


@dataclass(frozen=True, slots=True)
class Node:
    """A cached call, or all calls of one function.

    Attributes:
        id: identifies it in `Graph.edges`.
        function: id of the function; `label` is its readable name.
        arguments: the arguments as short text; `""` for a group.
        state: `hit` or `computed` (by this process), `stored` (by an earlier run), `running`, or
            why the next call computes: `stale`, `in doubt`, `expired`, `invalidated`, `outdated`.
        seconds: how long the computation took; for a group the sum.
        size: bytes stored.
        calls: number of calls in a group.
        key: key of its entry; `""` for a group or a call without an entry.
        finished: when it was computed, in seconds since the epoch; 0: unknown.
    """

    id: str
    function: str
    arguments: str = ""
    state: str = ONLY_STORED
    seconds: float = 0.0
    size: int = 0
    calls: int = 1
    key: str = ""
    finished: float = 0.0

    @property
    def label(self) -> str:
        """The readable name of the function."""
        return label(self.function)

    @property
    def facts(self) -> str:
        """Return time and size, and the number of calls."""
        many = [formatting.quantity(self.calls, "call")] if self.calls > 1 else []
        known = [formatting.duration(self.seconds)] if self.seconds else []
        held = [formatting.size(self.size)] if self.size else []
        return formatting.SEPARATOR.join([*many, *known, *held])


class Graph(Protocol):
    """The graph to draw: see `memo.inspection.call_graph.Graph`."""

    @property
    def nodes(self) -> Sequence[Node]:
        """The boxes."""
        ...

    @property
    def edges(self) -> Sequence[tuple[str, str]]:
        """The arrows, by the ids of the boxes."""
        ...


def to_networkx(edges: Iterable[tuple[str, str]]) -> nx.DiGraph[str]:
    """Return the edges as a directed graph of networkx."""
    import networkx as nx

    return nx.DiGraph(list(edges))


class Placed(NamedTuple):
    """A node and its upper left corner."""

    node: Node
    x: int
    y: int


def layers(graph: Graph) -> list[list[str]]:
    """Return the ids of the nodes, layer by layer, each after everything that it was built on."""
    import networkx as nx

    made = to_networkx(graph.edges)
    made.add_nodes_from(node.id for node in graph.nodes)
    while not nx.is_directed_acyclic_graph(made):  # functions that call each other
        made.remove_edge(*nx.find_cycle(made)[-1][:2])
    # reversed, so that each call is next to those that use it
    generations = list(nx.topological_generations(made.reverse()))
    found = [sorted(layer) for layer in reversed(generations)]
    for sweep in range(ORDERING_SWEEPS):
        place = {name: at for layer in found for at, name in enumerate(layer)}
        for layer in found if sweep % 2 == 0 else reversed(found):
            near = made.pred if sweep % 2 == 0 else made.succ
            middle = {
                name: sum(place[n] for n in near[name]) / len(near[name])
                if near[name]
                else float(place[name])
                for name in layer
            }
            layer.sort(key=lambda name: (middle[name], name))
            place.update({name: at for at, name in enumerate(layer)})
    return found


def place_nodes(graph: Graph) -> tuple[dict[str, Placed], int, int]:
    """Return the position of each node, and the width and height of the drawing."""
    nodes = {node.id: node for node in graph.nodes}
    found = layers(graph)
    tallest = max(map(len, found), default=0)
    places: dict[str, Placed] = {}
    for column, layer in enumerate(found):
        top = (tallest - len(layer)) * (BOX_HEIGHT + _DOWN) // 2
        for row, name in enumerate(layer):
            x = _EDGE + column * (BOX_WIDTH + _ACROSS)
            places[name] = Placed(nodes[name], x, _EDGE + top + row * (BOX_HEIGHT + _DOWN))
    wide = 2 * _EDGE + len(found) * (BOX_WIDTH + _ACROSS) - _ACROSS
    return places, wide, 2 * _EDGE + tallest * (BOX_HEIGHT + _DOWN) - _DOWN


def svg(graph: Graph) -> str:
    """Return the drawing; `""` for an empty graph."""
    if not graph.nodes:
        return ""
    places, wide, high = place_nodes(graph)
    present = dict.fromkeys(place.node.state for place in places.values())
    wide = max(wide, 2 * _EDGE + 96 * len(present))
    lines = "".join(_edge_svg(places[a], places[b]) for a, b in graph.edges)
    boxes = "".join(map(_box_svg, places.values()))
    legend = "".join(_legend_svg(state, at, high) for at, state in enumerate(present))
    many = formatting.quantity(len(graph.nodes), "node")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high + 26}" '
        f'width="{wide}" height="{high + 26}" style="max-width:100%;height:auto" role="img" '
        f'aria-label="Cached calls and what they were built on: {many}" '
        f'font-family="system-ui, sans-serif" font-size="12">'
        '<defs><marker id="memo-arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" fill="#888"/></marker></defs>'
        f"{lines}{boxes}{legend}</svg>"
    )


def _edge_svg(start: Placed, end: Placed) -> str:
    x1, y1 = start.x + BOX_WIDTH, start.y + BOX_HEIGHT // 2
    x2, y2 = end.x, end.y + BOX_HEIGHT // 2
    bend = max(24, (x2 - x1) // 2)
    return (
        f'<path d="M{x1} {y1}C{x1 + bend} {y1} {x2 - bend} {y2} {x2} {y2}" fill="none" '
        'stroke="#888" stroke-width="1.4" marker-end="url(#memo-arrow)"/>'
    )


def _box_svg(place: Placed) -> str:
    node, x, y = place
    fill = STATE_COLOURS.get(node.state, "#d9dde3")
    texts = [
        (_short(node.label), 'font-weight="600"', 18),
        (node.arguments, "", 34),
        (node.facts or node.state, 'font-size="11"', 50),
    ]
    lines = "".join(
        f'<text x="{x + 10}" y="{y + down}" fill="#1b1f24" {style}>{escape(_fitting(text))}</text>'
        for text, style, down in texts
    )
    return (
        f'<g class="memo-node" data-id="{escape(node.id)}" data-key="{escape(node.key)}" '
        f'data-function="{escape(node.function)}" data-state="{node.state}">'
        f"<title>{escape(tooltip(node))}</title>"
        f'<rect x="{x}" y="{y}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="7" fill="{fill}" '
        f'stroke="#5b6470"/>{lines}</g>'
    )


def _short(name: str) -> str:
    """Shorten a name so that it fits in bold: without its module, if both are too long."""
    return cut_to_width(
        name if cell_len(name) <= BOLD_CHARACTERS else name.rpartition(":")[2], BOLD_CHARACTERS
    )


def _fitting(text: str) -> str:
    return cut_to_width(text, 27)


def _legend_svg(state: str, at: int, high: int) -> str:
    x = _EDGE + at * 96
    return (
        f'<rect x="{x}" y="{high + 6}" width="12" height="12" rx="3" '
        f'fill="{STATE_COLOURS.get(state, "#d9dde3")}" stroke="#5b6470"/>'
        f'<text x="{x + 18}" y="{high + 16}" fill="#808080">{escape(state)}</text>'
    )


def tooltip(node: Node) -> str:
    """Return facts about a node, one per line."""
    call = f"{node.label}({node.arguments})" if node.calls == 1 else node.label
    lines = [call, f"{node.state}: {STATE_MEANINGS.get(node.state, node.state)}"]
    if node.calls > 1:
        lines.append(f"{formatting.quantity(node.calls, 'call')}: {node.arguments}")
    if node.seconds:
        lines.append(f"computing took {formatting.duration(node.seconds)}")
    if node.size:
        lines.append(f"{formatting.size(node.size)} stored")
    if node.finished:
        lines.append(f"computed {formatting.duration(max(0.0, time.time() - node.finished))} ago")
    return "\n".join(lines)


# --- for terminals -------------------------------------------------------------------------------


def tree(graph: Graph, width: int = 80) -> list[Styled]:
    """Return the graph as lines.

    Final results first, each with the calls it was built on below it.
    """
    if not graph.nodes:
        return [Styled(rendering.NO_CALLS)]
    nodes = {node.id: node for node in graph.nodes}
    inputs: dict[str, list[str]] = {name: [] for name in nodes}
    for a, b in graph.edges:
        inputs[b].append(a)
    used = {a for a, _ in graph.edges}
    lines: list[Styled] = []
    drawn: set[str] = set()

    def branch(name: str, lead: str, mark: str) -> None:
        node, again = nodes[name], name in drawn and inputs[name]
        drawn.add(name)
        facts = (
            "see above"
            if again
            else formatting.SEPARATOR.join(filter(None, (node.state, node.facts)))
        )
        room = width - cell_len(lead + mark) - cell_len(facts) - 2
        call = f"{node.label}({node.arguments})" if node.calls == 1 else node.label
        text = f"{lead}{mark}{cut_to_width(call, max(12, room))}  {facts}"
        lines.append(Styled(text, STATE_STYLES.get(node.state, "")))
        if not again:
            below = lead + {"": "", "├─ ": "│  ", "└─ ": "   "}[mark]
            for at, part in enumerate(inputs[name], 1):
                branch(part, below, "└─ " if at == len(inputs[name]) else "├─ ")

    for name in [name for name in nodes if name not in used] or list(nodes)[:1]:
        branch(name, "", "")
    return lines
