"""The registry of libraries: encoders for classes of numpy, pandas, xarray, SQLAlchemy and others.

memo imports none of them: their values only occur where they are imported, and are recognized by
the module and name of a class that they inherit from.  To add a library, write a module
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
"""Modules with the encoders of libraries."""


@functools.cache
def adapters() -> Mapping[str, Encoder]:
    """Return `package.class` -> encoder, for all libraries."""
    found: dict[str, Encoder] = {}
    for name in LIBRARIES:
        found.update(importlib.import_module(f"{__package__}.libraries.{name}").ADAPTERS)
    return found


def find(kind: type) -> Encoder | None:
    """Return the encoder of a class of these libraries or of its nearest base; else None."""
    for base in kind.__mro__:
        package = module_of(base).partition(".")[0]
        encoder = adapters().get(f"{package}.{base.__qualname__}")
        if encoder is not None:
            return encoder
    return None
