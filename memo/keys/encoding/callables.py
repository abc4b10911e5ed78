"""Encode callables: functions, methods, classes and modules.

Rules of this module:

1.  A class of the user's is encoded by name and code, since its methods compute; any other by name.
2.  A function is encoded by its code and its captured variables.  A user's function by the code
    with everything that it reaches; any other by its name, or by its bytecode.
3.  A module of the user's is encoded by its content; any other by name and version.
"""

from __future__ import annotations

import sys
import types
import weakref
from collections.abc import Iterator
from typing import Any, Final

from memo.keys import origin
from memo.keys.encoding import atoms, canonical
from memo.keys.encoding.canonical import Unkeyable, Walk, mapping, type_name

# --- classes and modules -------------------------------------------------------------------------


_names: Final[weakref.WeakKeyDictionary[type, bytes]] = weakref.WeakKeyDictionary()


def class_(value: type, walk: Walk) -> bytes:
    """Encode a class: its name and, for a user's class, its code."""
    known = _names.get(value)
    if known is not None:
        return known
    name = atoms.text(f"{canonical.module_of(value)}:{value.__qualname__}")
    if origin.of_type(value).kind == origin.USER:
        return name + atoms.text(walk.code_of(value, None))
    _names[value] = name
    return name


def module(value: types.ModuleType, walk: Walk) -> bytes:
    """Encode a module: a user's by its content, any other by name and version."""
    whose = origin.of_module(value)
    facts = atoms.text(value.__name__) + atoms.text(whose.name) + atoms.text(whose.version)
    if whose.kind != origin.USER:
        return facts
    parts = {name: part for name, part in vars(value).items() if not name.startswith("__")}
    return facts + b"".join(_part(name, parts[name], walk) for name in sorted(parts))


def _part(name: str, value: Any, walk: Walk) -> bytes:
    if isinstance(value, types.ModuleType):
        return atoms.text(name) + atoms.text(value.__name__)
    try:
        return atoms.text(name) + walk.encode(value)
    except Unkeyable:
        return b""


# --- functions -----------------------------------------------------------------------------------


def function(value: types.FunctionType, walk: Walk, owner: type | None = None) -> bytes:
    """Encode a function: its code with everything that it reaches, and its captured variables.

    Args:
        owner: for a method, the class that it is bound to.
    """
    cells = value.__closure__ or ()
    captured = {
        name: _content(cell)
        for name, cell in zip(value.__code__.co_freevars, cells, strict=True)
        if not _is_sentinel(_content(cell))
    }
    defaults = {
        name: default
        for name, default in (*_positional(value), *(value.__kwdefaults__ or {}).items())
        if not _is_sentinel(default)
    }
    return (
        _code(value, walk, owner)
        + atoms.with_length(mapping(captured, walk, lambda name: f".<captured>.{name}"))
        + mapping(defaults, walk, lambda name: f".<defaults>.{name}")
    )


def _positional(value: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """Yield the positional parameters that have a default, with it."""
    defaults = value.__defaults__ or ()
    count = value.__code__.co_argcount
    return zip(value.__code__.co_varnames[count - len(defaults) : count], defaults, strict=True)


def _is_sentinel(value: Any) -> bool:
    """True for a bare `object()`: a marker with which the code compares."""
    return type(value) is object


def _code(value: types.FunctionType, walk: Walk, owner: type | None) -> bytes:
    """Encode the code of a function: a user's by version, any other by name or bytecode."""
    namespace, code = value.__globals__, value.__code__
    if origin.of_namespace(namespace, code.co_filename).kind == origin.USER:
        return atoms.text(walk.code_of(value, owner))
    place = f"{value.__module__}:{value.__qualname__}"
    if look_up(value.__module__, value.__qualname__) is value:
        return atoms.text(place)
    return atoms.text(place) + walk.sequence(_bytecode(code))


def _bytecode(code: types.CodeType) -> list[Any]:
    constants = [_bytecode(c) if isinstance(c, types.CodeType) else c for c in code.co_consts]
    names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
    counts = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
    return [code.co_code, constants, names, counts]


def look_up(module: str | None, name: str) -> Any:
    """Look up a dotted name in a module; None if there is none."""
    found: Any = sys.modules.get(module or "")
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # the variable is not bound yet
        return ()


def builtin(value: types.BuiltinFunctionType, walk: Walk) -> bytes:
    """Encode a function written in C: its name, and the object it is bound to."""
    owner = value.__self__
    if owner is None or isinstance(owner, types.ModuleType):
        return atoms.text(f"{value.__module__}:{value.__qualname__}")
    return atoms.text(value.__name__) + walk.encode(owner, ".__self__")


def compiled(value: Any, walk: Walk) -> bytes:
    """Encode a function compiled by Cython: its module and name."""
    found = look_up(value.__module__, value.__qualname__)
    if getattr(found, "__func__", found) is not value:
        raise walk.refuse(
            value, "its module has no function of its name; pass a function of your own."
        )
    return atoms.text(f"{value.__module__}:{value.__qualname__}")


def method(value: types.MethodType, walk: Walk) -> bytes:
    """Encode a bound method: the object it is bound to, and its function."""
    bound = walk.encode(value.__self__, ".__self__")
    if type(value.__func__) is not types.FunctionType:
        return bound + walk.encode(value.__func__)
    owner = value.__self__ if isinstance(value.__self__, type) else type(value.__self__)
    return bound + function(value.__func__, walk, owner)


def descriptor(value: Any, walk: Walk) -> bytes:
    """Encode a method of a class written in C: its name, and the object it is bound to."""
    owner = getattr(value, "__self__", None)
    name = atoms.text(f"{type_name(value.__objclass__)}:{value.__name__}")
    return name + walk.encode(owner, ".__self__")


def lru_cached(value: Any, walk: Walk) -> bytes:
    """Encode a function wrapped by `functools.lru_cache`."""
    return walk.encode(value.__wrapped__, ".__wrapped__")


def memo_cached(value: Any, walk: Walk) -> bytes:
    """Encode a function cached by memo: the function, and the object it is bound to."""
    wrapped = getattr(value, "__wrapped__", None)
    if wrapped is None:
        raise walk.refuse(value, "pass the function itself.")
    owner = getattr(value, "__self__", None)
    return walk.encode(wrapped, ".__wrapped__") + walk.encode(owner, ".__self__")
