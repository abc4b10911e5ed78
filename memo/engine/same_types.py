"""Make results load with the types that they were returned with.

Rules of this module:

1.  cloudpickle stores a class of a notebook, script or function by value, so in another process it
    loads as a different class.  Here such a class is stored by name and code version as well, and
    loads as the class of that name if its code is unchanged.  If the code has changed, the entry is
    unreadable, and the function runs again.  If there is no class of that name (in a worker), the
    stored one is used.
2.  A type whose objects load as another type (or do not load) is detected by loading its first
    result once, when that is encoded.  The same holds for objects inside a result whose type
    defines its own pickling.
"""

from __future__ import annotations

import copyreg
import inspect
import os
import pickle
import sys
import types
import weakref
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from typing import Any, cast

from memo.errors import EntryError
from memo.keys import origin
from memo.keys.encoding.atoms import PLAIN_OR_CONTAINER_TYPES, PLAIN_TYPES
from memo.keys.fingerprint.function_version import code_digest
from memo.records import codec

_MAX_CHECKED_ITEMS = 64
"""Largest container whose members are all checked for being plain."""
_AS_BASE = frozenset({"numpy.memmap"})
"""Types whose objects are stored as objects of their base class, as documented."""
_NEW_OBJECT: tuple[Any, ...] = (copyreg.__newobj__, copyreg.__newobj_ex__)  # type: ignore[attr-defined]
_STATE = 2
"""Position of the state in what `__reduce__` returns."""
_loads_as: weakref.WeakKeyDictionary[type, str] = weakref.WeakKeyDictionary()
"""Type -> how its objects differ when loaded; `""` if they load unchanged."""
_pickled_types: weakref.WeakSet[type] = weakref.WeakSet()
"""Types of objects that were pickled so far."""


def encode(value: Any, result: Any, compress: int | None) -> codec.Encoded:
    """Encode a result for storage.

    Args:
        value: the value to store: the result, or the result with its output.
        result: the result itself.
        compress: see `codec.encode`.

    Raises:
        Exception: it cannot be pickled, or loads as another type.
    """
    if isinstance(value, codec.Encodable):
        return value.encode(pickle_item(value.returned))
    encoded = codec.encode(value, compress, _pickle_by_name)
    kind = type(result)
    if kind in PLAIN_OR_CONTAINER_TYPES or kind.__module__.partition(".")[0] == origin.THIS_PACKAGE:
        return encoded
    if f"{kind.__module__}.{kind.__qualname__}" in _AS_BASE:
        return encoded
    _check_type(result, kind)
    return encoded


def encode_arguments(value: Any) -> codec.Encoded:
    """Encode arguments of a call, so that it can be repeated with the classes of this process.

    Raises:
        Exception: they cannot be pickled.
    """
    return codec.encode(value, None, _pickle_by_name)


def pickle_item(value: Any) -> bytes:
    """Pickle one item of a stream.

    Raises:
        Exception: it cannot be pickled, or loads as another type.
    """
    if _is_plain(value, 3):
        return pickle.dumps(value, 5)
    stream = codec.encode_inline(value, _pickle_by_name)
    if type(value) not in PLAIN_OR_CONTAINER_TYPES:
        _check_type(value, type(value))
    return stream


def _is_plain(value: Any, depth: int) -> bool:
    """True if plain `pickle` is enough and loads the value unchanged."""
    kind = type(value)
    if kind in PLAIN_TYPES:
        return True
    if not depth or len(value) > _MAX_CHECKED_ITEMS if kind in (list, tuple, dict) else True:
        return False
    inside = (*value, *value.values()) if kind is dict else value
    return all(_is_plain(one, depth - 1) for one in inside)


def _check_type(value: Any, kind: type) -> None:
    """Check, once for each type, that its objects load as that type.

    Raises:
        codec.AlteredError: they load as another type.
    """
    if kind not in _loads_as:
        _loads_as[kind] = ""  # prevents recursion, as its objects may contain each other
        try:
            _loads_as[kind] = _type_change(*codec.pickled(value, _pickle_by_name), kind)
        except BaseException:
            del _loads_as[kind]
            raise
    if _loads_as[kind]:
        raise codec.AlteredError(kind, _loads_as[kind])


def _is_made_by_other(value: Any, kind: type) -> bool:
    """True if pickle would rebuild an object by calling something else than its own class."""
    if codec.has_default_reduce(kind):
        return False
    try:
        made = value.__reduce_ex__(5)
    except Exception:  # pickling will report it, or uses another method
        return False
    if isinstance(made, str):
        return False
    plain = made[0] in _NEW_OBJECT and bool(made[1])
    maker = made[1][0] if plain else made[0]
    return not (isinstance(maker, type) and issubclass(maker, kind))


def _type_change(stream: bytes, views: Sequence[memoryview], kind: type) -> str:
    """Load a pickled object; describe how its type differs, `""` if it does not.

    It is loaded from its own buffers, which may be large; if its type has to write to them, from a
    copy.
    """
    try:
        back = type(_unpickle(stream, views))
    except EntryError as error:
        return f"cannot be loaded again: {error}"
    if (back.__module__, back.__qualname__) == (kind.__module__, kind.__qualname__):
        return ""
    if back.__module__ == kind.__module__ == "numpy.dtypes":  # C's names of one type of integers
        return ""
    return f"would load as {back.__module__}.{back.__qualname__}"


def _unpickle(stream: bytes, views: Sequence[memoryview]) -> Any:
    if views:
        with suppress(EntryError):
            return codec.unpickled(stream, [view.toreadonly() for view in views])
    return codec.unpickled(stream, codec.copies(views))


def is_awaitable_once(value: Any) -> bool:
    """True if a value can be awaited only once: a coroutine, or a future of an event loop."""
    if isinstance(value, (Coroutine, types.GeneratorType)):
        return inspect.isawaitable(value)
    asyncio = sys.modules.get("asyncio")
    return asyncio is not None and bool(asyncio.isfuture(value))


# --- classes of the program ----------------------------------------------------------------------


def _pickle_by_name(value: Any) -> Any:
    """Pickle a class of `__main__` by name, code version and, for a worker, by value.

    Raises:
        codec.AlteredError: an object would load as another type.
    """
    kind = type(value)
    if not issubclass(kind, type):
        if kind not in _pickled_types:
            _pickled_types.add(kind)
            if _is_made_by_other(value, kind):
                _check_type(value, kind)
        elif fault := _loads_as.get(kind):
            raise codec.AlteredError(kind, fault)
        return _reduction_of_error(value) if isinstance(value, BaseException) else NotImplemented
    if origin.of_type(value).kind != origin.USER:
        return NotImplemented
    place = (value.__module__, value.__qualname__)
    if place[0] not in codec.modules_by_value() and _find(*place) is value:
        return NotImplemented
    try:
        version = code_digest(value)
    except Exception:  # a class without a code version is stored by value only
        return NotImplemented
    token = _tokens.setdefault(value, os.urandom(16).hex())
    _classes_by_token[token] = value
    return loaded_class, (*place, version, token, codec.pickle_by_value(value))


def _reduction_of_error(error: BaseException) -> Any:
    """Reduce an exception whose class has an `__init__` of its own and no other pickling.

    Python would call the class with `args`, which are what `super().__init__` was given.  Dask, as
    soon as it is imported, pickles exceptions with their traceback; those of a cache have none.
    """
    kind = type(error)
    registered = copyreg.dispatch_table.get(kind)
    by_dask = getattr(registered, "__module__", "") == "tblib.pickling_support"
    if registered is not None and not by_dask:
        return NotImplemented
    reduce: Any = kind.__reduce__
    if (
        not isinstance(kind.__init__, types.FunctionType)
        or isinstance(kind.__new__, types.FunctionType)
        or not isinstance(reduce, types.MethodDescriptorType)
        or kind.__reduce_ex__ is not object.__reduce_ex__
    ):
        return error.__reduce_ex__(codec.PICKLE_PROTOCOL) if by_dask else NotImplemented
    reduced: Any = error.__reduce__()
    slots = copyreg._slotnames(kind)  # type: ignore[attr-defined]
    state = {name: getattr(error, name) for name in slots if hasattr(error, name)}
    if len(reduced) > _STATE:
        state |= reduced[_STATE]
    return rebuild_error, (kind, reduced[1]), state or None


def rebuild_error(kind: type[BaseException], args: tuple[Any, ...]) -> BaseException:
    """Make an exception without calling the `__init__` of its class."""
    built_in = kind
    while not isinstance(built_in.__init__, types.WrapperDescriptorType):
        built_in = cast("type[BaseException]", built_in.__base__)
    made = built_in.__new__(kind, *args)
    built_in.__init__(made, *args)
    return made


_tokens: weakref.WeakKeyDictionary[type, str] = weakref.WeakKeyDictionary()
_classes_by_token: weakref.WeakValueDictionary[str, type] = weakref.WeakValueDictionary()
"""Classes of this process by the token in their pickles.

They are looked up here rather than unpickled: cloudpickle would replace the methods of the existing
class by copies that have no source.
"""


def _find(module: str, name: str) -> Any:
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def loaded_class(module: str, name: str, version: str, token: str, packed: bytes) -> Any:
    """Return this process's class for a stored instance.

    Raises:
        LookupError: the class has changed.
    """
    found = _find(module, name)
    if not isinstance(found, type):
        found = _classes_by_token.get(token)
    if found is None:
        found = pickle.loads(packed)  # part of a sealed entry
        found.__qualname__ = name  # cloudpickle loses the part that tells where it was defined
        return found
    if code_digest(found) != version:
        raise LookupError(f"the class {name} has changed")
    return found
