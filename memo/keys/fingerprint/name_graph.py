"""Graphs of functions and classes that reach each other by name, and one digest of a graph.

The digest ignores sharing: indistinguishable nodes count once.  So it does not depend on the order
of definitions, on cycles, or on a cell that defines a helper having run twice while both helpers
are still in use.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from memo.runtime.checksums import blake2b

Key = tuple[int, int]
"""Key of a node: the address of its object, and the address of the class of `self` or 0."""


class Node:
    """A function or a class of the graph.

    Attributes:
        name: `"module:qualname"`.
        text: normalized source, or the first line of a class.
        facts: (label, text) of plain values.
        edges: (label, node).
    """

    __slots__ = ("edges", "facts", "name", "text")

    def __init__(self, name: str, text: str) -> None:
        self.name = name
        self.text = text
        self.facts: set[tuple[str, str]] = set()
        self.edges: set[tuple[str, Key]] = set()


def digest(nodes: Mapping[Key, Node], root: Key) -> str:
    """Return 32 hex digits for a root and everything that it reaches."""
    marks = node_marks(nodes)
    return _mark([marks[root], *sorted(set(marks.values()))])


def node_marks(nodes: Mapping[Key, Node]) -> dict[Key, str]:
    """Return a mark for each node, equal for indistinguishable nodes.

    Partition refinement: a node's mark combines its content and the marks of what it reaches,
    repeated until no more nodes are distinguished.  A round depends only on marks, so two graphs
    that are equal up to sharing have the same marks after the same number of rounds.
    """
    own = {key: _mark([node.name, node.text, *_flat(node.facts)]) for key, node in nodes.items()}
    marks = own
    while True:
        distinct = len(set(marks.values()))
        marks = {
            key: _mark([own[key], *_flat((label, marks[to]) for label, to in node.edges)])
            for key, node in nodes.items()
        }
        if len(set(marks.values())) == distinct:
            return marks


def _flat(pairs: Iterable[tuple[str, str]]) -> Iterator[str]:
    for pair in sorted(set(pairs)):
        yield from pair


def _mark(parts: Iterable[str]) -> str:
    mark = blake2b(digest_size=16)
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        mark.update(len(data).to_bytes(8, "little") + data)
    return mark.hexdigest()


def parts(nodes: Mapping[Key, Node]) -> dict[str, str]:
    """Return the texts of the nodes by name; names that several nodes share get numbers."""
    texts: dict[str, set[str]] = {}
    for node in nodes.values():
        for name, text in [(node.name, node.text), *node.facts]:
            if name:
                texts.setdefault(name, set()).add(text)
    found: dict[str, str] = {}
    for name in sorted(texts):
        for at, text in enumerate(sorted(texts[name])):
            found[name if at == 0 else f"{name}#{at + 1}"] = text
    return found
