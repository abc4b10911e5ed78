"""The registry of libraries: which encoder a class of numpy, pandas, xarray, SQLAlchemy, … has.

None of them is imported by memo: a value of theirs can only be met where they are imported, and is
known by the module and the name of a class that it inherits from.  To add a library, write a module
`libraries/for_<library>.py` with its `ADAPTERS` and name it in `LIBRARIES`.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from typing import Final

from memo.keys.encoding.canonical import Encoder, module_of

LIBRARIES: Final = (
    "for_arrays",
    "for_arrow",
    "for_pandas",
    "for_dask",
    "for_handles",
    "for_science",
    "for_spacy",
    "for_sqlalchemy",
    "for_xarray",
)
"""Modules that know the values of libraries."""


@functools.cache
def adapters() -> Mapping[str, Encoder]:
    """`package.class` -> encoder, of all libraries."""
    found: dict[str, Encoder] = {}
    for name in LIBRARIES:
        found.update(importlib.import_module(f"{__package__}.libraries.{name}").ADAPTERS)
    return found


def find(kind: type) -> Encoder | None:
    """The encoder of a class of these libraries or of a subclass, the nearest; or None."""
    for base in kind.__mro__:
        package = module_of(base).partition(".")[0]
        encoder = adapters().get(f"{package}.{base.__qualname__}")
        if encoder is not None:
            return encoder
    return None
