"""Graphs: functions and classes that reach each other by name, and one digest of them all.

The digest is of the graph up to sharing: nodes that nothing can tell apart count once.  So it does
not matter in which order things were defined, whether there are cycles, or whether a cell that
defines a helper was run twice and both helpers are still in use.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from memo.runtime.checksums import blake2b

Key = tuple[int, int]
"""Of a node: the address of its object, and of the class of `self` or 0."""


class Node:
    """A function or a class of the graph.

    Attributes:
        name: `"module:qualname"`.
        text: normalised source, or the head of a class.
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
    """32 hex digits that stand for a root and for all that it reaches."""
    marks = marks_of(nodes)
    return _mark([marks[root], *sorted(set(marks.values()))])


def marks_of(nodes: Mapping[Key, Node]) -> dict[Key, str]:
    """A mark for each node, equal for nodes that cannot be told apart.

    Partition refinement: a node's mark is of what it says and of the marks of what it reaches;
    again until no more nodes are told apart.  Since a round depends on marks alone, two graphs that
    are equal up to sharing have the same marks after the same number of rounds.
    """
    said = {key: _mark([node.name, node.text, *_flat(node.facts)]) for key, node in nodes.items()}
    marks = said
    while True:
        told = len(set(marks.values()))
        marks = {
            key: _mark([said[key], *_flat((label, marks[to]) for label, to in node.edges)])
            for key, node in nodes.items()
        }
        if len(set(marks.values())) == told:
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
    """Texts of the nodes by name; a name that several share gets numbers."""
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
