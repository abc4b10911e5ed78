"""Values seen while a digest was made, to tell whether it still stands.

Everything that was read is kept with the place it was read from.  A digest stands while each place
still holds the same object: one identity comparison each.  What may change in place is looked at
again each time.
"""

from __future__ import annotations

import marshal
import types
from collections.abc import Callable, Collection, Mapping
from time import perf_counter, thread_time
from typing import Any, NamedTuple

from memo.keys import own_changes
from memo.keys.fingerprint.held_values import (
    MISSING,
    STATELESS,
    Image,
    State,
    image,
    image_with,
    snapshot,
)
from memo.keys.fingerprint.library_patches import Grown
from memo.keys.fingerprint.probes import Probe, probe
from memo.keys.own_changes import At, Sight, may_change

Get = Callable[[Any, Any], Any]
"""Reads a name of a namespace: `(name, default) -> object`."""
SLOW = 0.0001
"""Seconds that each call may spend to see that globals have not changed before it is said."""
_SLOW_CLASS = 0.001
"""The same for the attributes of classes, which cost a little in every program."""
_QUICK = SLOW / 10
_ROUNDS = 10
_LONG = 0.005
"""Looks at a value of which the fastest tells what it takes, and seconds after which these end."""


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


class Seen:
    """A digest, and all that must stay as it is for the digest to stand.

    Attributes:
        slow: how often it took longer than `SLOW` to see that values still stand.
        quick: it took so much less than `SLOW` that it is not timed until one has changed.
        places: (reader of a namespace, name, object).
        functions: (function, its code, its defaults, its keyword defaults).
        state: of `self`, which each object has its own of.
        changed: names that the code in reach assigns, sets or fills.
        unmet: labels to ignore that were not met.
        learned: what other processes have found that the code changes itself.
    """

    __slots__ = (
        *("changed", "digest", "functions", "lost", "parts", "places", "shapes", "slow", "state"),
        *("learned", "quick", "unmet", "watches"),
    )

    def __init__(
        self,
        digest: str,
        parts: dict[str, str],
        lost: frozenset[str],
        places: list[tuple[Get, str, Any]],
        functions: list[tuple[types.FunctionType, Any, Any, Any]],
        shapes: list[Shape | Grown],
        watches: list[Watch],
        state: State = STATELESS,
        changed: frozenset[str] = frozenset(),
        unmet: frozenset[str] = frozenset(),
        learned: tuple[str, ...] = (),
    ) -> None:
        self.digest = digest
        self.parts = parts
        self.lost = lost
        self.places = places
        self.functions = functions
        self.shapes = shapes
        self.watches = watches
        self.slow = 0
        self.quick = False
        self.state = state
        self.changed = changed
        self.unmet = unmet
        self.learned = learned

    def stands(self) -> bool:
        """True if nothing changed since; identity comparisons, the quickest first."""
        for get, name, value in self.places:
            if get(name, MISSING) is not value:
                return False
        for function, its_code, defaults, keywords in self.functions:
            if (
                function.__code__ is not its_code
                or function.__defaults__ is not defaults
                or function.__kwdefaults__ is not keywords
            ):
                return False
        for shape in self.shapes:
            if not shape.stands():
                return False
        return not self.watches or self._values_stand()

    def may_change(self) -> bool:
        """True if a computation may change something that was seen, or the state of `self`."""
        state = self.state
        seen = bool(self.changed or state.names or state.whole)
        return seen or any(may_change(watch.said, self.changed) for watch in self.watches)

    def _values_stand(self) -> bool:
        if self.quick:
            for watch in self.watches:
                if not watch.is_same():
                    break
            else:
                return True
        begun = perf_counter()
        for watch in self.watches:
            if not watch.stands():
                return False
        taken = perf_counter() - begun
        if taken > SLOW:
            self.slow += 1
        self.quick = taken < _QUICK
        return True

    def costliest(self, named: Collection[str] = ()) -> tuple[str, float]:
        """The global that takes the longest to be looked at, and the seconds; 0: none takes long.

        By its label in `parts`, attributes by the label of their class.

        Args:
            named: variables that a warning has named already.
        """
        costs = {"": 0.0}
        for watch in self.watches:
            kind, _, name = watch.at.label.partition(":")
            if kind not in ("global", "attribute"):  # there is no way out but to pass it
                continue
            if watch.at.variable in named:
                continue
            taken: list[float] = []  # by what this thread works: the machine may be busy
            while len(taken) < _ROUNDS and sum(taken) < _LONG:
                begun = thread_time()
                watch.stands()
                taken.append(thread_time() - begun)
            owner = name.rpartition(".")[0] if kind == "attribute" else name
            label = f"{kind}:{owner}"
            costs[label] = costs.get(label, 0.0) + min(taken)
        label = max(costs, key=lambda one: costs[one])
        bound = _SLOW_CLASS if label.startswith("attribute:") else SLOW
        return label, costs[label] if sum(costs.values()) > bound else 0.0
