"""Frames: which encoder a class of numpy, pandas, polars, pyarrow, scipy or torch has.

None of them is imported by memo: a value of theirs can only be met where they are imported, and is
known by the module and the name of a class that it inherits from.
"""

from __future__ import annotations

from typing import Final

from memo import arrays, columns, tables
from memo.canon import Encoder, module_of

ADAPTERS: Final = {**arrays.ADAPTERS, **columns.ADAPTERS, **tables.ADAPTERS}


def find(kind: type) -> Encoder | None:
    """The encoder of a class of these libraries or of a subclass, the nearest; or None."""
    for base in kind.__mro__:
        package = module_of(base).partition(".")[0]
        encoder = ADAPTERS.get(f"{package}.{base.__qualname__}")
        if encoder is not None:
            return encoder
    return None
