"""Probes: whether a structure is still made of the very same objects, told as cheaply as can be.

Rules of this module:

1.  A probe holds what stood in each part of a structure that may change in place: the items of a
    list, the attributes of an object.  It stands while each part holds these objects, by identity.
    So it may fall though an equal value was put there; it never stands though one has changed.
2.  What holds state that cannot be read so (an array, an object written in C, a mapping of a
    user's own making, a long text) has no probe, and neither has a structure of many objects:
    `held_values` looks at those each time.
3.  A value that `held_values` does not look into (functions, classes, what has no key by its type)
    counts by its identity.
"""

from __future__ import annotations

import enum
import functools
import operator
import types
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from memo.keys.fingerprint import held_values, origin

MOST: Final = 1000
"""Objects in the largest structure that is probed: a probe keeps them."""
LONG: Final = 10_000
"""Characters or bytes of the longest text in it."""

Part = tuple[Callable[[], Sequence[Any]], Sequence[Any]]
"""Reads a part, and what it held."""

_SAME: Final = operator.is_
_TEXTS: Final = (str, bytes)
_SEQUENCES: Final = (list, deque, set)
_FIXED: Final = (tuple, frozenset)
_MAPPINGS: Final = (dict, OrderedDict, defaultdict, Counter)
_LEAVES: Final = (types.FunctionType, type, types.ModuleType, types.GenericAlias, types.UnionType)
_BUILTINS: Final = (
    types.BuiltinFunctionType,
    types.MethodWrapperType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    types.ClassMethodDescriptorType,
)
_BASES: Final = (list, deque, set, tuple, frozenset)


class Probe:
    """Contents of a structure's parts when they were seen.

    Args:
        value: the structure.
        parts: how to read its parts, and what they held.
    """

    __slots__ = ("_parts", "_value")

    def __init__(self, value: Any, parts: list[Part]) -> None:
        self._value = value
        self._parts = parts

    def stands(self, value: Any) -> bool:
        """True if a value is this structure, and all its parts hold what they held."""
        if value is not self._value:
            return False
        try:
            for read, held in self._parts:
                now = read()
                if len(now) != len(held) or not all(map(_SAME, now, held)):
                    return False
        except (RuntimeError, AttributeError):  # another thread changes it just now
            return False
        return True


class _Opaque(Exception):  # noqa: N818  # a fact about a value
    """A part of a structure cannot be probed."""


def probe(value: Any) -> Probe | None:
    """The probe of a structure as it is now; None: it has none."""
    prober = _Prober()
    try:
        prober.take(value)
    except Exception:  # opaque, too deep, or an error in the value's own methods
        return None
    return Probe(value, prober.parts)


class _Prober:
    """Makes one probe."""

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.seen: dict[int, Any] = {}

    def take(self, value: Any) -> None:
        """Take in a value and all that it holds."""
        if id(value) in self.seen:
            return
        self.seen[id(value)] = value
        kind = type(value)
        if len(self.seen) > MOST or (kind in _TEXTS and len(value) > LONG):
            raise _Opaque
        if kind in _FIXED:
            self._all(value)
        elif kind in _SEQUENCES:
            self._part(functools.partial(list, value))
        elif kind in _MAPPINGS:
            read = _defaulted if kind is defaultdict else _items
            self._part(functools.partial(read, value))
        elif not (held_values.is_fixed(kind) or issubclass(kind, _LEAVES)):
            self._object(value, kind)

    def _all(self, values: Iterable[Any]) -> None:
        for value in values:
            self.take(value)

    def _part(self, read: Callable[[], Sequence[Any]]) -> None:
        held = read()
        self.parts.append((read, held))
        self._all(held)

    def _object(self, value: Any, kind: type) -> None:
        if kind in _BUILTINS:
            self.take(getattr(value, "__self__", None))
        elif kind is types.MethodType:
            self._all((value.__self__, value.__func__))
        elif kind is functools.partial:
            self._all((value.func, *value.args, value.keywords))
        elif issubclass(kind, enum.Enum):
            self.take(value.value)
        elif held_values.is_open(kind):
            self._state(value, kind)
        elif origin.of_type(kind).kind == origin.MEMO:
            self.take(held_values.wrapped(value))
        elif not _is_refused(value, kind):
            raise _Opaque

    def _state(self, value: Any, kind: type) -> None:
        """An object of a class of the user's: its attributes, and what it contains."""
        slots = held_values.slots_of(kind)
        if getattr(value, "__dict__", None) is not None:
            self._part(functools.partial(_attributes, value))
        if slots:
            self._part(functools.partial(_slotted, value, slots))
        if issubclass(kind, Mapping):
            if kind.items is not dict.items or kind.__iter__ is not dict.__iter__:
                raise _Opaque
            self._part(functools.partial(_items, value))
        for base in _BASES:
            if issubclass(kind, base):
                if kind.__iter__ is not base.__iter__:
                    raise _Opaque
                self._part(functools.partial(list, value))


def _items(value: dict[Any, Any]) -> list[Any]:
    return [*value, *value.values()]


def _defaulted(value: defaultdict[Any, Any]) -> list[Any]:
    return [value.default_factory, *value, *value.values()]


def _attributes(value: Any) -> list[Any]:
    """The class of an object, and the names and values of its attributes."""
    state = value.__dict__
    return [type(value), *state, *state.values()]


def _slotted(value: Any, slots: Sequence[Any]) -> list[Any]:
    """The class of an object, and what is in its slots."""
    return [type(value), *[_slot(value, slot) for slot in slots]]


def _slot(value: Any, slot: Any) -> Any:
    try:
        return slot.__get__(value)
    except AttributeError:  # nothing was put there
        return _Opaque


def _is_refused(value: Any, kind: type) -> bool:
    """True if a value has no key by its type alone, and holds nothing that is looked at."""
    from memo.keys.encoding import canonical

    return canonical.is_refused(kind) and getattr(value, "__dict__", None) is None
