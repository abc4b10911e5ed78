"""Values and classes seen while a digest was made, to tell whether they are unchanged.

Everything that was read is kept with the place it was read from.  What may change in place is
looked at again each time; `function_version.Seen` asks.
"""

from __future__ import annotations

import marshal
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from memo.keys import own_changes
from memo.keys.fingerprint.held_values import (
    MISSING,
    Image,
    image,
    image_with,
    snapshot,
)
from memo.keys.fingerprint.probes import Probe, probe
from memo.keys.own_changes import At, Sight

Get = Callable[[Any, Any], Any]
"""Reads a name of a namespace: `(name, default) -> object`."""


class Cell:
    """A captured variable, to be read as a mapping is."""

    def __init__(self, cell: types.CellType) -> None:
        self.cell = cell

    def get(self, _name: str, default: Any) -> Any:
        """Value of the variable; `default` while it has none."""
        try:
            return self.cell.cell_contents
        except ValueError:
            return default


Place = tuple[int, str]
"""The address of a namespace and a name in it."""


class Spot(NamedTuple):
    """Location of a value.

    Attributes:
        of: the namespace, class or captured variable.
        get: reads it.
        name: in it.
    """

    of: Any
    get: Get
    name: str

    @property
    def place(self) -> Place:
        """Name of this location."""
        return id(self.of), self.name

    def value(self) -> Any:
        """Present value there, or `MISSING`."""
        return self.get(self.name, MISSING)


def spot(namespace: Mapping[str, Any], name: str) -> Spot:
    """A name of a module or a function."""
    return Spot(namespace, namespace.get, name)


def member(cls: type, name: str) -> Spot:
    """A name of a class."""
    return Spot(cls, vars(cls).get, name)


def captured(cell: types.CellType) -> Spot:
    """A variable of a closure."""
    return Spot(cell, Cell(cell).get, "")


class Watch:
    """A value that may change, and where it lies.

    Attributes:
        at: where it lies.
        said: what it said when it was last looked at.
        base: what of that counts: see `own_changes`.
    """

    probe: Probe | None

    def __init__(self, where: Spot, at: At, value: Any, said: Image, base: Image) -> None:
        self._get, self._name = where.get, where.name
        self.at = at
        self.said = said
        self.base = base
        self._remember(value)

    def _remember(self, value: Any) -> None:
        """Look at a value so that it is known again, the quickest way first."""
        plain = not (self.said.refs or self.said.noted or self.said.lost)
        self.snapshot = snapshot(value) if plain else None
        self.probe = probe(value) if self.snapshot is None else None

    def read(self) -> Any:
        """Present value there, or `MISSING`."""
        return self._get(self._name, MISSING)

    def is_same(self) -> bool:
        """True if what lies there now is what was remembered, without looking any closer.

        A value that had a snapshot is not checked for what it may hold again: what `marshal`
        confuses (`bytes` and other buffers) never looks like what a snapshot was taken of.
        """
        value = self._get(self._name, MISSING)
        if self.snapshot is None:
            return self.probe is not None and self.probe.stands(value)
        try:
            return marshal.dumps(value, 2) == self.snapshot
        except ValueError:
            return False

    def stands(self) -> bool:
        """True if what lies there now counts the same."""
        if self.is_same():
            return True
        value = self.read()
        said = image(value)
        if not said.same(self.said):
            base = own_changes.REGISTRY.base(Sight(self.at, value, said, image_with))
            if not (isinstance(base, Image) and base.same(self.base)):
                return False
            self.said = said
        self._remember(value)
        return True


class Shape(NamedTuple):
    """A class as it was: its attributes by identity."""

    cls: type
    bases: tuple[type, ...]
    members: Mapping[str, Any]
    names: tuple[str, ...]
    values: tuple[Any, ...]
    size: int

    def without(self, name: str) -> Shape:
        """The same but for one attribute, which is looked at in another way."""
        pairs = [p for p in zip(self.names, self.values, strict=True) if p[0] != name]
        return self._replace(names=tuple(n for n, _ in pairs), values=tuple(v for _, v in pairs))

    def stands(self) -> bool:
        """True if the class still has these attributes, and no others."""
        get = self.members.get
        if len(self.members) != self.size or self.cls.__bases__ is not self.bases:
            return False
        for name, value in zip(self.names, self.values, strict=True):
            if get(name, MISSING) is not value:
                return False
        return True
