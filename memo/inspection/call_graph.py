"""The graph of cached calls: what each stored result was built on.

An entry's stamps name the cached calls that its computation used, so the graph is read from the
headers of this host's entries: nothing is computed, and no value is loaded.  If there are more than
`MAX_SINGLE_CALLS` calls, they are grouped by function.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from memo.coordination.flights import FLIGHTS
from memo.decorators import assembly
from memo.engine.explaining import MAX_SEARCHED_ENTRIES, list_headers, own_ref
from memo.inspection import graph_drawing, inventory
from memo.inspection.graph_drawing import ONLY_STORED, RUNNING, Node, to_networkx
from memo.metrics import formatting, rendering
from memo.metrics.recorder import COUNTERS
from memo.metrics.running_computations import COMPUTATIONS, Running
from memo.records.seal import Header
from memo.records.stamp_types import Generation, Ref
from memo.runtime.blocking import BLOCKING, drive
from memo.runtime.clock import SECOND
from memo.runtime.events import STALE
from memo.runtime.port import Port
from memo.runtime.reasons import EXPIRED, INVALIDATED
from memo.validity.check import FRESH

MAX_SINGLE_CALLS = 40
"""Maximum number of calls that are shown one by one."""


@dataclass(frozen=True, slots=True)
class Graph:
    """Cached calls and what they were built on; an SVG drawing in a notebook, a tree in a terminal.

    Attributes:
        nodes: the calls.
        edges: (id, id of a call that was built on it).
    """

    nodes: tuple[Node, ...] = ()
    edges: tuple[tuple[str, str], ...] = field(default=())

    def grouped(self) -> Graph:
        """Return the same with one node for each function."""
        members: dict[str, list[Node]] = {}
        for node in self.nodes:
            members.setdefault(node.function, []).append(node)
        at = {node.id: node.function for node in self.nodes}
        edges = {(at[a], at[b]): None for a, b in self.edges if at[a] != at[b]}
        return Graph(tuple(_group(name, nodes) for name, nodes in members.items()), tuple(edges))

    def to_dict(self) -> dict[str, Any]:
        """Return `{"nodes": [...], "edges": [{"from": id, "to": id}]}` with plain values only."""
        names = ("id", "function", "label", "arguments", "state", "seconds", "size")
        more = ("calls", "key", "finished")
        return {
            "nodes": [{name: getattr(n, name) for name in (*names, *more)} for n in self.nodes],
            "edges": [{"from": a, "to": b} for a, b in self.edges],
        }

    def to_svg(self) -> str:
        """Return a drawing that needs no script and no page around it."""
        return graph_drawing.svg(self)

    def to_text(self, width: int = 80) -> str:
        """Return results with what they were built on below them, at most `width` columns wide."""
        return "\n".join(line.text for line in self.lines(width))

    def lines(self, width: int = 80) -> list[formatting.Styled]:
        """Return the same as lines with styles."""
        return graph_drawing.tree(self, width)

    def __repr__(self) -> str:
        return self.to_text()

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        bundle = {"text/plain": self.to_text()}
        return {**bundle, "image/svg+xml": self.to_svg()} if self.nodes else bundle


URGENT_STATES = (
    *(RUNNING, inventory.OUTDATED, INVALIDATED, EXPIRED),
    *(inventory.IN_DOUBT, STALE),
)
"""States that a group shows if any of its calls has them; else it shows the most frequent one."""


def _group(function: str, nodes: list[Node]) -> Node:
    states = Counter(node.state for node in nodes)
    worst = next((state for state in URGENT_STATES if states[state]), states.most_common(1)[0][0])
    counts = ", ".join(f"{count} {state}" for state, count in states.most_common())
    return Node(
        function,
        function,
        counts if len(nodes) > 1 else nodes[0].arguments,
        worst,
        sum(node.seconds for node in nodes),
        sum(node.size for node in nodes),
        sum(node.calls for node in nodes),
        "" if len(nodes) > 1 else nodes[0].key,
        max(node.finished for node in nodes),
    )


def graph(*, group: bool | None = None) -> Graph:
    """Return the cached calls of this process and what they were built on.

    It is an SVG drawing in a notebook and a tree in a terminal; `.to_svg()` and `.to_dict()` export
    it.

    Args:
        group: one node for each function; None: if there are more than 40 calls.
    """
    return graph_of(group=group)


def graph_of(*, everything: bool = False, group: bool | None = None) -> Graph:
    """Like `graph`, also beyond this process.

    Args:
        everything: everything stored on this host, also by other processes.
        group: one node for each function; None: if there are more than `MAX_SINGLE_CALLS` calls.
    """
    made = drive(_graph(BLOCKING, everything))
    whole = len(made.nodes) > MAX_SINGLE_CALLS if group is None else group
    return made.grouped() if whole else made


async def _graph(port: Port, everything: bool) -> Graph:
    chain = assembly.default_chain()
    outcomes = {} if everything else COUNTERS.outcomes()
    running = _running(everything=everything)
    wanted = {key for keys in outcomes.values() for key in keys}
    headers: dict[Ref, tuple[Header, int]] = {}
    if everything:
        _add(headers, await list_headers(port, chain, f"{chain.namespace}:", MAX_SEARCHED_ENTRIES))
        chosen = list(headers)
    else:
        await _follow(port, headers, {*outcomes, *(ref.group[2:] for ref in running)})
        chosen = list(_built_on(headers, wanted))
    chosen = sorted(chosen, key=lambda ref: headers[ref][0].times.finished)
    headers_chosen = [headers[ref][0] for ref in chosen]
    states = dict(zip(chosen, await inventory.states(port, chain, headers_chosen), strict=True))
    nodes: dict[Ref, Node] = {}
    for ref in chosen:
        header, size = headers[ref]
        seen = outcomes.get(header.function, {}).get(header.key, ONLY_STORED)
        state = RUNNING if ref in running else states[ref]
        nodes[ref] = _node(header, size, seen if state == FRESH else state)
    for ref in sorted(running, key=str):
        name = ref.group[2:]
        nodes.setdefault(ref, Node(_name(ref), name, running[ref], RUNNING))
    edges = [(a, b) for b in chosen for a in _used(headers[b][0], nodes)]
    return Graph(tuple(nodes.values()), _direct(nodes, edges))


async def _follow(
    port: Port, headers: dict[Ref, tuple[Header, int]], functions: Iterable[str]
) -> None:
    """Add the entries of some functions, and of everything that these were built on."""
    chain, known, left = assembly.default_chain(), set[str](), set(functions)
    while left:
        known |= left
        for name in left:
            _add(headers, await list_headers(port, chain, chain.prefix(name), MAX_SEARCHED_ENTRIES))
        left = {ref.group[2:] for header, _ in headers.values() for ref in _refs(header)} - known


def _add(headers: dict[Ref, tuple[Header, int]], found: Iterable[tuple[Header, int]]) -> None:
    """Add entries by call, the latest one of each call."""
    for header, size in found:
        own = _own_ref(header)
        before = headers.get(own)
        if before is None or before[0].times.finished < header.times.finished:
            headers[own] = (header, size)


def _refs(header: Header) -> list[Ref]:
    """Return the cached calls that an entry names: its own and what it was built on."""
    own = [stamp.ref for stamp in header.stamps if type(stamp) is Generation]
    return [ref for ref in own if ref.group.startswith("f:")]


def _own_ref(header: Header) -> Ref:
    return own_ref(header) or Ref(f"f:{header.function}", (("", header.key),))


def _used(header: Header, nodes: Mapping[Ref, Any]) -> list[Ref]:
    """Return the nodes of the calls that an entry was built on."""
    own = _own_ref(header)
    found = [ref for ref in _refs(header) if ref != own and ref in nodes]
    for whole in (ref for ref in _refs(header) if ref.arguments is None):
        found += [ref for ref in nodes if ref.group == whole.group and ref != own]
    return found


def _built_on(headers: Mapping[Ref, tuple[Header, int]], wanted: set[str]) -> set[Ref]:
    """Return the calls with some keys, and everything that they were built on."""
    left = [ref for ref, (header, _) in headers.items() if header.key in wanted]
    found: set[Ref] = set()
    while left:
        ref = left.pop()
        if ref not in found:
            found.add(ref)
            left += _used(headers[ref][0], headers)
    return found


def _running(*, everything: bool) -> dict[Ref, str]:
    """Return the running calls, each with its arguments for display."""
    runs = COMPUTATIONS.everywhere() if everything else COMPUTATIONS.here()
    known = (run for run in runs if run.arguments is not None)
    given = {Ref(f"f:{run.function}", run.arguments): _arguments_of(run) for run in known}
    refs = [ref for flight in FLIGHTS.joinable_flights() for ref in flight.refs]
    own = {ref for ref in refs if ref.group.startswith("f:") and ref.arguments is not None}
    return {**dict.fromkeys(own, ""), **given}


def _arguments_of(run: Running) -> str:
    """Return the arguments of a running call: its address without the name of the function."""
    name = run.label.rpartition(":")[2]
    return "" if run.call == name else run.call.removeprefix(f"{name}:")


def _name(ref: Ref) -> str:
    return f"{ref.group[2:]}({','.join(digest for _, digest in ref.arguments or ())})"


def _node(header: Header, size: int, state: str) -> Node:
    given = rendering.arguments(header)
    arguments = ", ".join(f"{name}={text}" for name, text in given.items())
    times = header.times
    return Node(
        _name(_own_ref(header)),
        header.function,
        arguments,
        state,
        times.cost / SECOND,
        size,
        1,
        header.key,
        times.finished / SECOND,
    )


def _direct(nodes: Mapping[Ref, Node], edges: list[tuple[Ref, Ref]]) -> tuple[tuple[str, str], ...]:
    """Return the edges that do not follow from others, as an entry names indirect inputs too."""
    made = to_networkx([(nodes[a].id, nodes[b].id) for a, b in edges])
    import networkx as nx

    if nx.is_directed_acyclic_graph(made):
        made = nx.transitive_reduction(made)
    return tuple(made.edges)
