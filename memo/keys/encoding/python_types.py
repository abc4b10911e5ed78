"""Encode values of Python's own types and of user classes.

Rules of this module:

1.  An object is encoded by class and state: what pickle would save of it, without derived values
    (`functools.cached_property`) and without order where there is none.
2.  A handle on something outside (a file, a lock, a socket, a running generator) is refused, and so
    is a value that reading exhausts (an iterator).
"""

from __future__ import annotations

import collections
import copyreg
import enum
import functools
import gc
import io
import re
import struct
import types
import weakref
import zoneinfo
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any, Final

from memo.keys import origin
from memo.keys.encoding import atoms, callables, canonical
from memo.keys.encoding.canonical import Encoder, Walk, encode_class, mapping, ordered, unordered
from memo.records import codec

HANDLES: Final = frozenset(
    {
        *(
            "_io",
            "_sqlite3",
            "_thread",
            "asyncio",
            "concurrent",
            "contextvars",
            "ctypes",
            "io",
            "mmap",
        ),
        *("multiprocessing", "queue", "select", "selectors", "signal", "socket", "sqlite3", "ssl"),
        *("subprocess", "tempfile", "threading", "weakref"),
    }
)
"""Modules whose objects are handles on something outside of the value."""
_DERIVED_NAMES: Final = frozenset({"_attrs_cached_hash", "__pydantic_fields_set__"})
_NAMED: Final = (
    types.MethodWrapperType,
    types.WrapperDescriptorType,
    types.MethodDescriptorType,
    types.ClassMethodDescriptorType,
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
)


def _node(kind: str, content: Encoder) -> Encoder:
    prefix = atoms.with_length(kind.encode())
    return lambda value, walk: walk.encode_container(value, content, b"~", prefix)


# --- Python's own types --------------------------------------------------------------------------


def _member(value: enum.Enum, walk: Walk) -> bytes:
    return encode_class(value, walk) + walk.encode(value.name) + walk.encode(value.value, ".value")


def _path(value: PurePath, walk: Walk) -> bytes:
    return encode_class(value, walk) + atoms.text(str(value))


def _zone(value: zoneinfo.ZoneInfo, walk: Walk) -> bytes:
    if value.key is None:
        raise walk.refuse(value, "it has no key; make it by ZoneInfo(name).")
    return encode_class(value, walk) + atoms.text(value.key)


def _pattern(value: re.Pattern[Any], walk: Walk) -> bytes:
    return walk.encode(value.pattern) + atoms.integer(value.flags)


def _struct(value: struct.Struct, walk: Walk) -> bytes:
    return walk.encode(value.format)


def _comparison(value: Any, walk: Walk) -> bytes:
    """Encode what `functools.cmp_to_key` returns: the function that compares, and the object."""
    return walk.encode(gc.get_referents(value))


def _view(value: memoryview, _walk: Walk) -> bytes:
    shape = atoms.text(f"{value.format} {value.shape}")
    flat = value if value.c_contiguous else memoryview(value.tobytes())
    return shape + atoms.with_length(flat.cast("B") if flat.nbytes else b"")


def _array(value: bytearray, _walk: Walk) -> bytes:
    return atoms.with_length(value)


def _buffer(value: Any, walk: Walk) -> bytes:
    """Encode a file in memory: its content, and the position up to which it was read."""
    if value.closed:
        raise walk.refuse(value, "it is closed; pass its content.")
    return encode_class(value, walk) + walk.encode((value.getvalue(), value.tell()))


def _set(value: Any, walk: Walk) -> bytes:
    """Encode a subclass of set or frozenset: the items without order, and the state."""
    return (
        encode_class(value, walk)
        + atoms.with_length(unordered(value, walk))
        + _own_state(value, walk)
    )


def _ordered(value: Any, walk: Walk) -> bytes:
    """Encode an OrderedDict: the items in order, and the state of a subclass."""
    return (
        encode_class(value, walk)
        + atoms.with_length(ordered(value, walk))
        + _own_state(value, walk)
    )


def _tuple(value: Any, walk: Walk) -> bytes:
    """Encode a subclass of tuple: the items with their field names, and the state."""
    names = getattr(type(value), "_fields", ())
    items = walk.sequence(
        list(value), lambda i: f".{names[i]}" if i < len(names) else canonical.index_step(i)
    )
    return encode_class(value, walk) + atoms.with_length(items) + _own_state(value, walk)


def _own_state(value: Any, walk: Walk) -> bytes:
    try:
        state = value.__getstate__()
    except RecursionError:
        raise
    except Exception as error:
        raise walk.refuse(value, _REGISTER) from error
    return _state(type(value), state, walk)


_exact: Final[dict[type, Encoder]] = {
    types.FunctionType: _node("function", callables.function),
    types.BuiltinFunctionType: _node("builtin", callables.builtin),
    types.MethodType: _node("method", callables.method),
    type(functools.lru_cache(lambda: None)): _node("lru_cache", callables.lru_cached),
    re.Pattern: _node("pattern", _pattern),
    struct.Struct: _node("struct", _struct),
    type(functools.cmp_to_key(lambda a, b: 0)): _node("comparison", _comparison),
    memoryview: _node("memoryview", _view),
    bytearray: _node("bytearray", _array),
    types.MappingProxyType: _node("mappingproxy", lambda v, walk: ordered(dict(v), walk)),
    type({}.keys()): _node("dict_keys", lambda v, walk: canonical.sequence(list(v), walk)),
    type({}.values()): _node("dict_values", lambda v, walk: canonical.sequence(list(v), walk)),
    type({}.items()): _node("dict_items", lambda v, walk: canonical.sequence(list(v), walk)),
    object: canonical.RefusingEncoder("it has only its identity; use an enum member or None."),
    **dict.fromkeys(_NAMED, _node("descriptor", callables.descriptor)),
}
_families: Final[tuple[tuple[type, Encoder], ...]] = (
    (enum.Enum, _node("enum", _member)),
    (type, _node("type", callables.class_)),
    (types.ModuleType, _node("module", callables.module)),
    (PurePath, _node("path", _path)),
    (zoneinfo.ZoneInfo, _node("zone", _zone)),
    (io.BytesIO, _node("buffer", _buffer)),
    (io.StringIO, _node("buffer", _buffer)),
    (set, _node("set", _set)),
    (frozenset, _node("frozenset", _set)),
    (collections.OrderedDict, _node("ordered", _ordered)),
)
_TUPLE_ENCODER: Final = _node("tuple", _tuple)
_COMPILED: Final = _node("builtin", callables.compiled)
_CACHED: Final = _node("cached", callables.memo_cached)
_OBJECT: Final = _node(
    "object",
    lambda value, walk: _object(value, walk),  # noqa: PLW0108  # it stands below
)


def plain_object(value: Any, walk: Walk) -> bytes:
    """Encode an object that has no adapter: its class and state."""
    return _OBJECT(value, walk)


def is_object(kind: type) -> bool:
    """True if values of a type are encoded by their attributes."""
    return find(kind) is _OBJECT


def find(kind: type) -> Encoder:
    """Return the encoder of a type of Python's or of a user's.

    For a type without a key it is an encoder that refuses.
    """
    if kind in _exact:
        return _exact[kind]
    for base, encoder in _families:
        if issubclass(kind, base):
            return encoder
    if issubclass(kind, tuple) and _is_plain(kind):
        return _TUPLE_ENCODER
    if origin.is_compiled(kind):
        return _COMPILED
    if hasattr(kind, "__call__") and origin.is_of_memo(kind):  # noqa: B004
        return _CACHED
    fix = _why_refused(kind)
    if fix:
        return canonical.RefusingEncoder(fix)
    return _OBJECT


def _is_plain(kind: type) -> bool:
    """True if pickle saves a value of this class in Python's default way."""
    return codec.has_default_reduce(kind) and kind not in copyreg.dispatch_table


_REGISTER: Final = "register a key with memo.register_key, or name the argument in ignore=[...]."


def _why_refused(kind: type) -> str:
    """Return the fix for a type whose values cannot have a key, or `""`."""
    if hasattr(kind, "__await__") or issubclass(kind, types.AsyncGeneratorType):
        return "await it first, and pass the result."
    if hasattr(kind, "__next__"):
        top = canonical.module_of(kind).partition(".")[0]
        if top in HANDLES or top == "tempfile":
            return "pass its path or its content, or name the argument in ignore=[...]."
        return "reading it exhausts it; pass a list of its items."
    if canonical.module_of(kind).partition(".")[0] in HANDLES and not issubclass(
        kind, BaseException
    ):
        return _REGISTER
    return ""


# --- objects -------------------------------------------------------------------------------------


def _object(value: Any, walk: Walk) -> bytes:
    """Encode an object by what pickle would save of it."""
    reduced = _reduce(value, walk)
    content = encode_class(value, walk)
    if isinstance(reduced, str):
        return content + _global(value, reduced, walk)
    function, arguments, state, items, pairs = (*reduced, None, None, None)[:5]
    if isinstance(value, functools.partial) and type(state) is tuple and state[-1:] == ({},):
        state = (*state[:-1], None)  # its `__dict__` is None until something has accessed it
    if id(value) in walk.given:
        state = _with_replacements(state, walk.given[id(value)])
    return (
        content
        + atoms.with_length(_encode_construction(value, function, arguments, walk))
        + atoms.with_length(_state(type(value), state, walk))
        + atoms.with_length(b"" if items is None else walk.sequence(list(items)))
        + (b"" if pairs is None else ordered(dict(pairs), walk))
    )


def _with_replacements(state: Any, given: Mapping[str, Any]) -> Any:
    """Return the state of an object, with some of its attributes replaced."""
    if type(state) is tuple:
        return tuple(_with_replacements(part, given) for part in state)
    if type(state) is not dict:
        return state
    return {name: given.get(name, part) for name, part in state.items()}


def _reduce(value: Any, walk: Walk) -> Any:
    try:
        # distributed registers reducers for exceptions that include their tracebacks
        theirs = isinstance(value, BaseException)
        reducer = None if theirs else copyreg.dispatch_table.get(type(value))
        reduced = reducer(value) if reducer else value.__reduce_ex__(4)
    except RecursionError:
        raise
    except Exception as error:
        raise walk.refuse(value, _REGISTER) from error
    if isinstance(reduced, str) or (type(reduced) is tuple and 2 <= len(reduced) <= 6):
        return reduced
    raise walk.refuse(value, _REGISTER)


def _encode_construction(value: Any, function: Any, arguments: Any, walk: Walk) -> bytes:
    """Encode the call that makes an object; empty if it is that of its class, as usual."""
    if function in (copyreg.__newobj__, copyreg.__newobj_ex__) and arguments[0] is type(value):  # type: ignore[attr-defined]
        return walk.sequence(list(arguments[1:]), lambda i: f".__getnewargs__()[{i}]")
    if function is type(value):
        return b"C" + walk.sequence(list(arguments), lambda i: f".__reduce__()[1][{i}]")
    made = walk.encode(function, ".__reduce__()[0]")
    return b"R" + made + walk.sequence(list(arguments), lambda i: f".__reduce__()[1][{i}]")


def _global(value: Any, name: str, walk: Walk) -> bytes:
    """Encode an object by its name in a module, if the object is really there."""
    places = [
        getattr(value, "__module__", None),
        canonical.module_of(type(value)).partition(".")[0],
    ]
    for place in (*places, "builtins"):
        if place and callables.look_up(place, name) is value:
            return atoms.text(f"{place}:{name}")
    raise walk.refuse(value, _REGISTER)


def _state(kind: type, state: Any, walk: Walk) -> bytes:
    """Encode the attributes of an object, without those that are derived from others."""
    if state is None:
        return b""
    if type(state) is tuple and len(state) == 2 and isinstance(state[1], dict):
        inner = atoms.with_length(_state(kind, state[0], walk))
        return b"2" + inner + _state(kind, state[1], walk)
    if type(state) is not dict:
        return walk.encode(state, ".__getstate__()")
    if state.keys() >= {"__dict__", "__pydantic_fields_set__"}:  # a pydantic model
        state = {**state, **(state["__dict__"] or {})}
        del state["__dict__"]
    derived = _derived(kind)
    kept = {name: part for name, part in state.items() if name not in derived}
    return mapping(kept, walk, _attribute_step)


_derived_of: Final[weakref.WeakKeyDictionary[type, frozenset[str]]] = weakref.WeakKeyDictionary()


def _derived(kind: type) -> frozenset[str]:
    """Return the attributes of a class that are derived from others and cached."""
    known = _derived_of.get(kind)
    if known is None:
        found = [
            name
            for base in kind.__mro__
            for name, value in vars(base).items()
            if isinstance(value, functools.cached_property)
        ]
        known = _derived_of[kind] = _DERIVED_NAMES.union(found)
    return known


def _attribute_step(name: Any) -> str:
    return f".{name}" if type(name) is str and name.isidentifier() else canonical.key_step(name)
