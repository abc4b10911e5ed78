"""The registry of libraries: encoders for classes of numpy, pandas, xarray, SQLAlchemy and others.

memo imports none of them: their values only occur where they are imported, and are recognized by
the module and name of a class that they inherit from.  Every module `libraries/for_<library>.py`
is part of the registry, by its `ADAPTERS`: to add a library, add a file.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping

from memo.keys.encoding import libraries, python_types
from memo.keys.encoding.canonical import Encoder, module_of


@functools.cache
def adapters() -> Mapping[str, Encoder]:
    """Return `package.class` -> encoder, for all libraries."""
    found: dict[str, Encoder] = {}
    for module in pkgutil.iter_modules(libraries.__path__, f"{libraries.__name__}."):
        if ".for_" in module.name:
            found.update(importlib.import_module(module.name).ADAPTERS)
    return found


def find(kind: type) -> Encoder:
    """Return the encoder of a type; for a type without a key, an encoder that refuses."""
    return find_adapter(kind) or python_types.find(kind)


def find_adapter(kind: type) -> Encoder | None:
    """Return the encoder of a class of these libraries or of its nearest base; else None."""
    for base in kind.__mro__:
        package = module_of(base).partition(".")[0]
        encoder = adapters().get(f"{package}.{base.__qualname__}")
        if encoder is not None:
            return encoder
    return None
