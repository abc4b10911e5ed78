"""Detect whether the values and classes that a digest depends on are unchanged.

Everything that was read is kept with the location it was read from.  A value that may change in
place is checked each time (by `KnownVersion`), as cheaply as possible: by a
snapshot, by a probe, or else by its fingerprint.

Rules of probes:

1.  A probe keeps the objects in each mutable part of a structure: the items of a list, the
    attributes of an object.  It holds while each part has these very objects.  So it may fail
    although an equal value was put there; it never holds after a change.
2.  State that cannot be read this way (an array, an object written in C, a user's mapping class, a
    long text) has no probe, and neither has a structure of many objects: `held_values` makes a new
    fingerprint of those each time.
3.  A value that `held_values` does not traverse (functions, classes, a type that has no key) is
    compared by identity.
"""

from __future__ import annotations

import enum
import functools
import marshal
import operator
import types
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from time import perf_counter, thread_time
from typing import TYPE_CHECKING, Any, Final

from memo.keys import origin
from memo.keys.encoding import canonical
from memo.keys.fingerprint import held_values, own_changes
from memo.keys.fingerprint.held_values import (
    NO_VALUE,
    STATELESS,
    SelfState,
    ValueFingerprint,
    fingerprint_of,
    fingerprint_with,
    snapshot,
)
from memo.keys.fingerprint.own_changes import CurrentValue, ValuePlace, may_change
from memo.runtime.named_tuple import NamedTuple

if TYPE_CHECKING:
    from memo.keys.fingerprint.library_patches import AttributeCount

SLOW_CHECK_SECONDS = 0.0001
"""Seconds that each call may spend on checking globals before a warning is given."""
_SLOW_CLASS_CHECK_SECONDS = 0.001
"""The same for the attributes of classes, which cost a little in every program."""
_QUICK_CHECK_SECONDS = SLOW_CHECK_SECONDS / 10
"""If a check takes less than this, the next ones are not timed."""
_TIMING_ROUNDS = 10
_TIMING_SECONDS = 0.005
"""Number of times a value's check is timed (the fastest counts), and seconds after which timing
ends."""

Get = Callable[[Any, Any], Any]
"""Reads a name of a namespace: `(name, default) -> object`."""


class CapturedVariable:
    """A captured variable, with the interface of a mapping."""

    def __init__(self, cell: types.CellType) -> None:
        self.cell = cell

    def get(self, _name: str, default: Any) -> Any:
        """Return the value of the variable, or `default` if it has none."""
        try:
            return self.cell.cell_contents
        except ValueError:
            return default


Place = tuple[int, str]
"""The address of a namespace and a name in it."""


class Location(NamedTuple):
    """The location of a value.

    Attributes:
        of: the namespace, class or captured variable.
        get: reads it.
        name: the name in it.
    """

    of: Any
    get: Get
    name: str

    @property
    def place(self) -> Place:
        """The address of this location."""
        return id(self.of), self.name

    def value(self) -> Any:
        """Return the current value there, or `NO_VALUE`."""
        return self.get(self.name, NO_VALUE)


def location_of(namespace: Mapping[str, Any], name: str) -> Location:
    """Return the location of a name in a module or a function."""
    return Location(namespace, namespace.get, name)


def location_in_class(cls: type, name: str) -> Location:
    """Return the location of a name in a class."""
    return Location(cls, vars(cls).get, name)


def location_in_cell(cell: types.CellType) -> Location:
    """Return the location of a captured variable."""
    return Location(cell, CapturedVariable(cell).get, "")


class WatchedValue:
    """A value that may change, with its location.

    Attributes:
        at: its location.
        fingerprint: its fingerprint when it was last checked.
        base: the part of the fingerprint that counts: see `own_changes`.
    """

    probe: Probe | None

    def __init__(
        self,
        where: Location,
        at: ValuePlace,
        value: Any,
        fingerprint: ValueFingerprint,
        base: ValueFingerprint,
    ) -> None:
        self._get, self._name = where.get, where.name
        self.at = at
        self.fingerprint = fingerprint
        self.base = base
        self._remember(value)

    def _remember(self, value: Any) -> None:
        """Remember a value in the form that is fastest to compare: a snapshot, or else a probe."""
        plain = not (self.fingerprint.refs or self.fingerprint.noted or self.fingerprint.left_out)
        self.snapshot = snapshot(value) if plain else None
        self.probe = probe(value) if self.snapshot is None else None

    def read(self) -> Any:
        """Return the current value there, or `NO_VALUE`."""
        return self._get(self._name, NO_VALUE)

    def is_same(self) -> bool:
        """True if the fast comparison shows that the value is the remembered one.

        Comparing snapshots is enough: values that `marshal` confuses with each other (`bytes` and
        other buffers) get none.
        """
        value = self._get(self._name, NO_VALUE)
        if self.snapshot is None:
            return self.probe is not None and self.probe.is_unchanged(value)
        try:
            return marshal.dumps(value, 2) == self.snapshot
        except ValueError:
            return False

    def is_unchanged(self) -> bool:
        """True if the current value counts as the same input."""
        if self.is_same():
            return True
        value = self.read()
        fingerprint = fingerprint_of(value)
        if not fingerprint.same(self.fingerprint):
            base = own_changes.REGISTRY.base(
                CurrentValue(self.at, value, fingerprint, fingerprint_with)
            )
            if not (isinstance(base, ValueFingerprint) and base.same(self.base)):
                return False
            self.fingerprint = fingerprint
        self._remember(value)
        return True


class ClassAttributes(NamedTuple):
    """A class with its attributes, for comparison by identity."""

    cls: type
    bases: tuple[type, ...]
    members: Mapping[str, Any]
    names: tuple[str, ...]
    values: tuple[Any, ...]
    size: int

    def without(self, name: str) -> ClassAttributes:
        """Return a copy without one attribute, which is checked in another way."""
        pairs = [p for p in zip(self.names, self.values, strict=True) if p[0] != name]
        return self._replace(names=tuple(n for n, _ in pairs), values=tuple(v for _, v in pairs))

    def is_unchanged(self) -> bool:
        """True if the class still has these attributes, and no others."""
        get = self.members.get
        if len(self.members) != self.size or self.cls.__bases__ is not self.bases:
            return False
        for name, value in zip(self.names, self.values, strict=True):
            if get(name, NO_VALUE) is not value:
                return False
        return True


# --- probes --------------------------------------------------------------------------------------

MAX_PROBED: Final = 1000
"""Maximum number of objects in a structure that is probed, since the probe keeps them alive."""
MAX_PROBED_TEXT: Final = 10_000
"""Characters or bytes of the longest text in it."""

Part = tuple[Callable[[], Sequence[Any]], Sequence[Any]]
"""A function that reads a part, and the objects that the part had at first."""

_SAME: Final = operator.is_
_TEXT_TYPES: Final = (str, bytes)
_MUTABLE_SEQUENCES: Final = (list, deque, set)
_IMMUTABLE_CONTAINERS: Final = (tuple, frozenset)
_MAPPINGS: Final = (dict, OrderedDict, defaultdict, Counter)
_LEAVES: Final = (types.FunctionType, type, types.ModuleType, types.GenericAlias, types.UnionType)
_CONTAINER_BASES: Final = (list, deque, set, tuple, frozenset)


class KnownVersion:
    """A digest, and everything that must stay unchanged for it to stay valid.

    Attributes:
        slow: number of checks of the values that took longer than `SLOW_CHECK_SECONDS`.
        quick: the last check was so fast that the next ones are not timed.
        places: (reader of a namespace, name, object).
        functions: (function, its code, its defaults, its keyword defaults).
        state: the state of `self` that is read; each object has its own values.
        changed: names that the code in reach assigns, sets or fills.
        unmatched: labels in `ignore` that match nothing.
        known_changes: state in reach that the code changes itself, as other processes have found.
        context_variables: labels of the context variables in reach, whose values do not count.
    """

    __slots__ = (
        *(
            "changed",
            "digest",
            "functions",
            "left_out",
            "parts",
            "places",
            "classes",
            "slow",
            "state",
        ),
        *("context_variables", "known_changes", "quick", "unmatched", "watched"),
    )

    def __init__(
        self,
        digest: str,
        parts: dict[str, str],
        left_out: frozenset[str],
        places: list[tuple[Get, str, Any]],
        functions: list[tuple[types.FunctionType, Any, Any, Any]],
        classes: list[ClassAttributes | AttributeCount],
        watched: list[WatchedValue],
        state: SelfState = STATELESS,
        changed: frozenset[str] = frozenset(),
        unmatched: frozenset[str] = frozenset(),
        known_changes: tuple[str, ...] = (),
        context_variables: frozenset[str] = frozenset(),
    ) -> None:
        self.digest = digest
        self.parts = parts
        self.left_out = left_out
        self.places = places
        self.functions = functions
        self.classes = classes
        self.watched = watched
        self.slow = 0
        self.quick = False
        self.state = state
        self.changed = changed
        self.unmatched = unmatched
        self.known_changes = known_changes
        self.context_variables = context_variables

    def is_unchanged(self) -> bool:
        """True if nothing has changed since; the fastest comparisons come first."""
        for get, name, value in self.places:
            if get(name, NO_VALUE) is not value:
                return False
        for function, its_code, defaults, keywords in self.functions:
            if (
                function.__code__ is not its_code
                or function.__defaults__ is not defaults
                or function.__kwdefaults__ is not keywords
            ):
                return False
        for shape in self.classes:
            if not shape.is_unchanged():
                return False
        return not self.watched or self._values_are_unchanged()

    def may_change(self) -> bool:
        """True if a computation may change something that was seen, or the state of `self`."""
        state = self.state
        seen = bool(self.changed or state.names or state.whole)
        return seen or any(may_change(watch.fingerprint, self.changed) for watch in self.watched)

    def _values_are_unchanged(self) -> bool:
        if self.quick:
            for watch in self.watched:
                if not watch.is_same():
                    break
            else:
                return True
        begun = perf_counter()
        for watch in self.watched:
            if not watch.is_unchanged():
                return False
        taken = perf_counter() - begun
        if taken > SLOW_CHECK_SECONDS:
            self.slow += 1
        self.quick = taken < _QUICK_CHECK_SECONDS
        return True

    def slowest_global(self, named: Collection[str] = ()) -> tuple[str, float]:
        """Return the label of the global whose check is slowest, and its seconds; 0: none is slow.

        The label is the one in `parts`; for an attribute it is that of its class.

        Args:
            named: variables that a warning has named already.
        """
        costs = {"": 0.0}
        for watch in self.watched:
            kind, _, name = watch.at.label.partition(":")
            if kind not in (
                "global",
                "attribute",
            ):  # for other kinds there is no fix but to pass the value
                continue
            if watch.at.variable in named:
                continue
            taken: list[float] = []  # the thread's own time, since the machine may be busy
            while len(taken) < _TIMING_ROUNDS and sum(taken) < _TIMING_SECONDS:
                begun = thread_time()
                watch.is_unchanged()
                taken.append(thread_time() - begun)
            owner = name.rpartition(".")[0] if kind == "attribute" else name
            label = f"{kind}:{owner}"
            costs[label] = costs.get(label, 0.0) + min(taken)
        label = max(costs, key=lambda one: costs[one])
        bound = _SLOW_CLASS_CHECK_SECONDS if label.startswith("attribute:") else SLOW_CHECK_SECONDS
        return label, costs[label] if sum(costs.values()) > bound else 0.0


class Probe:
    """The contents of a structure's parts when they were read.

    Args:
        value: the structure.
        parts: how to read its parts, and what they had.
    """

    __slots__ = ("_parts", "_value")

    def __init__(self, value: Any, parts: list[Part]) -> None:
        self._value = value
        self._parts = parts

    def is_unchanged(self, value: Any) -> bool:
        """True if a value is this structure, and each part holds the same objects."""
        if value is not self._value:
            return False
        try:
            for read, held in self._parts:
                now = read()
                if len(now) != len(held) or not all(map(_SAME, now, held)):
                    return False
        except (RuntimeError, AttributeError):  # another thread is changing it
            return False
        return True


class _Opaque(Exception):  # noqa: N818 - a fact about a value
    """A part of a structure cannot be probed."""


def probe(value: Any) -> Probe | None:
    """Return the probe of a structure as it is now; None if it cannot be probed."""
    prober = _ProbeBuilder()
    try:
        prober.add(value)
    except Exception:  # opaque, too deep, or an error in the value's own methods
        return None
    return Probe(value, prober.parts)


class _ProbeBuilder:
    """Collects the parts of a structure for its probe."""

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.seen: dict[int, Any] = {}

    def add(self, value: Any) -> None:
        """Add a value and everything that it holds."""
        if id(value) in self.seen:
            return
        self.seen[id(value)] = value
        kind = type(value)
        if len(self.seen) > MAX_PROBED or (kind in _TEXT_TYPES and len(value) > MAX_PROBED_TEXT):
            raise _Opaque
        if kind in _IMMUTABLE_CONTAINERS:
            self._add_all(value)
        elif kind in _MUTABLE_SEQUENCES:
            self._add_part(functools.partial(list, value))
        elif kind in _MAPPINGS:
            read = _defaulted if kind is defaultdict else _items
            self._add_part(functools.partial(read, value))
        elif not (held_values.is_immutable(kind) or issubclass(kind, _LEAVES)):
            self._add_object(value, kind)

    def _add_all(self, values: Iterable[Any]) -> None:
        for value in values:
            self.add(value)

    def _add_part(self, read: Callable[[], Sequence[Any]]) -> None:
        held = read()
        self.parts.append((read, held))
        self._add_all(held)

    def _add_object(self, value: Any, kind: type) -> None:
        if kind in held_values.C_FUNCTION_TYPES:
            self.add(getattr(value, "__self__", None))
        elif kind is types.MethodType:
            self._add_all((value.__self__, value.__func__))
        elif kind is functools.partial:
            self._add_all((value.func, *value.args, value.keywords))
        elif issubclass(kind, enum.Enum):
            self.add(value.value)
        elif held_values.is_transparent(kind):
            self._add_state(value, kind)
        elif origin.is_of_memo(kind):
            self._add_all((held_values.wrapped(value), held_values.bound_object(value)))
        elif not _is_refused(value, kind):
            raise _Opaque

    def _add_state(self, value: Any, kind: type) -> None:
        """Add an object of a user's class: its attributes, and its content."""
        slots = held_values.slots_of(kind)
        if getattr(value, "__dict__", None) is not None:
            self._add_part(functools.partial(_attributes, value))
        if slots:
            self._add_part(functools.partial(_slotted, value, slots))
        if issubclass(kind, Mapping):
            if kind.items is not dict.items or kind.__iter__ is not dict.__iter__:
                raise _Opaque
            self._add_part(functools.partial(_items, value))
        for base in _CONTAINER_BASES:
            if issubclass(kind, base):
                if kind.__iter__ is not base.__iter__:
                    raise _Opaque
                self._add_part(functools.partial(list, value))


def _items(value: dict[Any, Any]) -> list[Any]:
    return [*value, *value.values()]


def _defaulted(value: defaultdict[Any, Any]) -> list[Any]:
    return [value.default_factory, *value, *value.values()]


def _attributes(value: Any) -> list[Any]:
    """Return the class of an object, and the names and values of its attributes."""
    state = value.__dict__
    return [type(value), *state, *state.values()]


def _slotted(value: Any, slots: Sequence[Any]) -> list[Any]:
    """Return the class of an object, and the values in its slots."""
    return [type(value), *[_slot(value, slot) for slot in slots]]


def _slot(value: Any, slot: Any) -> Any:
    try:
        return slot.__get__(value)
    except AttributeError:  # the slot is empty
        return _Opaque


def _is_refused(value: Any, kind: type) -> bool:
    """True if a value has no key because of its type, and has no attributes to check."""
    return canonical.is_refused(kind) and getattr(value, "__dict__", None) is None
