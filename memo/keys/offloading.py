"""Decide whether arguments are so big that their key should be made off the event loop.

Making a key reads every byte of every argument: about 1 ms for 1 MB of small objects.  Moving the
work to a thread costs 0.1 ms.  Arguments that may take more than a few milliseconds are recognized
by cheap checks of types, lengths and shapes; their content is not read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from math import prod
from typing import Any, Final

from memo.keys.encoding import atoms

OFFLOADED_FROM_BYTES: Final = 2 << 20
"""Arguments of more bytes than this get their key in a thread: hashing them takes about 1 ms."""
OBJECT_BYTES: Final = 256
"""Weight of an object in bytes: encoding it takes as long as hashing that many."""
MAX_EXAMINED: Final = 256
"""Maximum number of containers and objects that are examined; a value that has more is heavy."""
_LIGHT: Final = frozenset({int, float, bool, complex, type(None)})
_WITHOUT_PARTS: Final = _LIGHT | {str, bytes}
_TABLE_LIBRARIES: Final = frozenset({"numpy", "pandas", "polars", "pyarrow", "scipy", "torch"})
_SMALL_MODULES: Final = frozenset(
    {
        *("builtins", "datetime", "decimal", "enum", "fractions", "functools"),
        *("pathlib", "types", "uuid"),
    }
)
"""Modules whose objects are small, or are not traversed to make a key."""


class HeavyError(Exception):
    """The arguments are so big that their key should be made in a thread."""


def _light_text(value: str) -> bytes:
    if len(value) > OFFLOADED_FROM_BYTES:
        raise HeavyError
    return atoms.text(value)


def _light_bytes(value: bytes) -> bytes:
    if len(value) > OFFLOADED_FROM_BYTES:
        raise HeavyError
    return atoms.binary(value)


LIGHT_ENCODERS: Final[Mapping[type, Callable[[Any], bytes]]] = {
    **atoms.SIMPLE,
    str: _light_text,
    bytes: _light_bytes,
}
"""Like `atoms.SIMPLE`, for callers on an event loop: a long value raises `HeavyError`."""


def refuse_heavy(args: Collection[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuse heavy arguments.

    Raises:
        HeavyError: making their key may take more than a few milliseconds.
    """
    if is_heavy(args, kwargs):
        raise HeavyError


def is_heavy(args: Collection[Any], kwargs: Mapping[str, Any]) -> bool:
    """True if making the key of these arguments may take more than a few milliseconds."""
    for value in args:
        kind = type(value)
        if kind in _LIGHT:
            continue
        if kind is str or kind is bytes:
            if len(value) > OFFLOADED_FROM_BYTES:
                return True
        elif _is_heavy_value(value):
            return True
    return bool(kwargs) and is_heavy(kwargs.values(), {})


def _is_heavy_value(value: Any) -> bool:
    left = OFFLOADED_FROM_BYTES
    waiting = [value]
    for _ in range(MAX_EXAMINED):
        value = waiting.pop()
        left -= _weight(value, waiting)
        if left < 0:
            return True
        if not waiting:
            return False
    return True


def _weight(value: Any, waiting: list[Any]) -> int:
    """Return the weight of a value without its parts, which are added to `waiting`."""
    kind = type(value)
    if kind in _WITHOUT_PARTS:
        return OBJECT_BYTES + (len(value) if kind is str or kind is bytes else 0)
    if isinstance(value, dict):
        return _items_weight(value.keys(), waiting) + _items_weight(value.values(), waiting)
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return _items_weight(value, waiting)
    if isinstance(value, (bytearray, memoryview)):
        return memoryview(value).nbytes
    module = kind.__module__.partition(".")[0]
    if module in _TABLE_LIBRARIES:
        return _table_weight(value)
    if module not in _SMALL_MODULES:
        waiting += _attributes(value)
    return OBJECT_BYTES


def _items_weight(values: Collection[Any], waiting: list[Any]) -> int:
    if len(values) > OFFLOADED_FROM_BYTES // OBJECT_BYTES:
        return OFFLOADED_FROM_BYTES + 1
    kinds = set(map(type, values))
    if not kinds <= _WITHOUT_PARTS:
        waiting += [value for value in values if type(value) not in _WITHOUT_PARTS]
    size = OBJECT_BYTES * len(values)
    if not kinds.isdisjoint((str, bytes)):
        size += sum(len(value) for value in values if type(value) in (str, bytes))
    return size


def _table_weight(value: Any) -> int:
    """Return the weight of a library's array or table: its bytes, or 16 bytes per cell."""
    if type(value).__name__ == "ndarray" and not value.dtype.hasobject:
        size: int = value.nbytes
        return size
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple):
        return OBJECT_BYTES + 16 * int(prod(shape))
    return OBJECT_BYTES + 16 * (len(value) if hasattr(type(value), "__len__") else 0)


def _attributes(value: Any) -> Iterable[Any]:
    """Return the attributes of an object, without running code of its class."""
    if isinstance(value, type):
        return ()
    try:
        found = list(object.__getattribute__(value, "__dict__").values())
    except (AttributeError, TypeError):
        found = []
    for base in type(value).__mro__:
        for name in _slot_names(base):
            try:
                found.append(object.__getattribute__(value, name))
            except (AttributeError, TypeError):
                continue
    return found


def _slot_names(kind: type) -> Iterable[str]:
    names = kind.__dict__.get("__slots__", ())
    return (names,) if isinstance(names, str) else names
