"""Patches: functions and classes that the user has attached to those of a library.

`np.mean = mine`, `pd.DataFrame.tidy = tidy` and registered accessors (`frame.geo`) change what a
function computes without appearing in its code.  They are found by the names that the code
mentions.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from typing import Any

from memo.keys import origin
from memo.keys.fingerprint.held_values import layers

_EXTENSIBLE = {
    "pandas": ("DataFrame", "Series", "Index"),
    "polars": ("DataFrame", "LazyFrame", "Series", "Expr"),
    "xarray": ("Dataset", "DataArray", "DataTree"),
}
"""Classes whose objects are commonly arguments, and which libraries let users extend."""


def extensible_classes() -> Iterator[type]:
    """Yield the classes of loaded libraries that accessors are registered on."""
    for package, names in _EXTENSIBLE.items():
        held = vars(sys.modules.get(package, types)) if package in sys.modules else {}
        for name in names:
            if isinstance(held.get(name), type):
                yield held[name]


def is_user_defined(value: Any) -> bool:
    """True if an attribute of a library's module or class is the user's or holds one."""
    return any(
        _is_user_code(one) or any(map(_is_user_code, _values_held_by(one))) for one in layers(value)
    )


def is_fixed(value: Any) -> bool:
    """True if an attribute of a library's module never changes, unless it is patched."""
    return callable(value) or issubclass(type(value), types.ModuleType)


def _is_user_code(value: Any) -> bool:
    if type(value) is types.FunctionType:
        whose = origin.of_namespace(value.__globals__, value.__code__.co_filename)
        return whose.kind == origin.USER
    if issubclass(type(value), type):
        return origin.of_type(value).kind == origin.USER
    return False


def _values_held_by(value: Any) -> list[Any]:
    """Return the values that an accessor or other object holds; a callable's class, too."""
    if isinstance(value, (types.FunctionType, type, types.ModuleType)):
        return []
    state = getattr(value, "__dict__", None)
    held = list(state.values()) if isinstance(state, dict) else []
    return [*held, type(value)] if callable(value) else held


class AttributeCount:
    """A class to which attributes may be added, with its current number of them."""

    def __init__(self, cls: type) -> None:
        self._members = vars(cls)
        self._size = len(self._members)

    def is_unchanged(self) -> bool:
        """True if the class still has as many attributes."""
        return len(self._members) == self._size
