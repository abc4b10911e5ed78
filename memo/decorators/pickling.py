"""Pickle cached functions: by reference if a worker can import them, else by value.

The pickles call `_apply_using`, `_import_function`, `_unpickle_function` and `_rebuild_function`:
their names and arguments are part of the format.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from memo.decorators.bound_functions import BoundFunction
from memo.keys.fingerprint.function_version import Identity
from memo.records import codec
from memo.settings import configuration

if TYPE_CHECKING:
    from memo.decorators.cached_function import CachedFunction


def reduce_function(function: CachedFunction[Any, Any]) -> Any:
    """Return the value that `__reduce__` returns for a cached function."""
    original = function._original
    if original is not None:
        return _apply_using, (
            original,
            codec.pickle_by_value(_arguments_of_using(function, original)),
        )
    module, name = function.__module__, getattr(function, "__qualname__", "")
    settings = _settings()
    if module != "__main__" and _look_up(module, name) is function:
        return _import_function, (module, name, *settings)
    if not _by_value.get():
        return _unpickle_function, (_pickle_by_value(function), *settings)
    given = {**function._options, "name": function.function_id}
    code = function._function.keyer.identity.digest()
    return _rebuild_function, (type(function), function.__wrapped__, given, code, function.of_class)


def _arguments_of_using(
    function: CachedFunction[Any, Any], original: CachedFunction[Any, Any]
) -> dict[str, Any]:
    """Return the arguments with which `original.using` makes a function again."""
    kind, max_age = function._own_mode or (None, None)
    ttl = function._function.policy.ttl
    own = {} if ttl is original._function.policy.ttl else {"ttl": ttl}
    return {"mode": kind, "max_age": max_age, **own}


def _apply_using(original: CachedFunction[Any, Any], packed: bytes) -> CachedFunction[Any, Any]:
    """Return `original.using(...)`."""
    import pickle

    return original.using(**pickle.loads(packed))


def _settings() -> tuple[dict[str, Any], str]:
    """Return the settings to send to a worker, and this process; for a stored pickle neither."""
    return (
        ({}, "")
        if codec.storing.get()
        else (configuration.settings_for_workers(), configuration.PROCESS)
    )


_by_value: ContextVar[bool] = ContextVar("memo_whole", default=False)
"""True while cloudpickle pickles a cached function with everything that it reaches."""


def _pickle_by_value(function: CachedFunction[Any, Any]) -> bytes:
    """Pickle a function by value, for picklers that cannot do that themselves."""
    token = _by_value.set(True)
    try:
        return codec.pickle_by_value(function)
    finally:
        _by_value.reset(token)


def _unpickle_function(packed: bytes, settings: Mapping[str, Any], sender: str) -> Any:
    """Adopt the sender's settings, and unpickle a function that was pickled by value."""
    import pickle

    configuration.adopt(settings, sender)
    return pickle.loads(packed)


def _look_up(module: str, name: str) -> Any:
    """Look up a dotted name in a module; for a method, the function itself."""
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)  # `None` has no such attribute
    return found.__func__ if isinstance(found, BoundFunction) else found


def _import_function(module: str, name: str, settings: Mapping[str, Any], sender: str) -> Any:
    """Adopt the sender's settings, and import a function by its name."""
    configuration.adopt(settings, sender)
    importlib.import_module(module)
    found = _look_up(module, name)
    if found is None:
        raise AttributeError(f"module {module!r} has no cached function {name!r}")
    return found


def _rebuild_function(
    kind: type[CachedFunction[Any, Any]],
    function: Callable[..., Any],
    given: Mapping[str, Any],
    code: str,
    of_class: bool,
) -> CachedFunction[Any, Any]:
    """Decorate a function again that was pickled by value, with its id and code version."""
    made = kind._make_copy(function, given)
    made._function.keyer.identity = Identity(function, digest=code)
    if of_class:
        made._bind_to_class()
    return made
