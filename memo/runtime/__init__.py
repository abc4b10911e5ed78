"""The lowest layer: clock, events, threads and event loops, forks, private files.

Imports `errors` only. Start with `port.py`: the engine is written once and waits through a port;
`blocking.py` has the port for sync code and `native.py` the one for async code.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

VERSION = "0.2.0"
"""The version of memo, in the lowest folder so that all others can import it."""
FORMAT = 2
"""The version of everything that is stored.  It is part of each name in Redis and of a namespace's
directory, so that two versions of memo with different formats can share a Redis and a directory."""


def lazy_attributes(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a `__getattr__` for a package that imports some of its names at their first use.

    Annotations name types of big modules in this way (`stores.Chain`), so that
    `typing.get_type_hints` finds them, and `import memo` need not import the modules.

    Args:
        package: the `__name__` of the package.
        modules: name -> the module that has it, or that it is.
    """

    def attribute(name: str) -> Any:
        module = modules.get(name)
        if module is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        found: Any = importlib.import_module(module)
        if not module.endswith(f".{name}"):  # otherwise it is the module itself
            found = getattr(found, name)
        vars(sys.modules[package])[name] = found
        return found

    return attribute
