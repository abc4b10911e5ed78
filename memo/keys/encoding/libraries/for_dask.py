"""Dask collections: by the token that Dask gives to what they compute, if it is deterministic."""

from __future__ import annotations

import sys
from typing import Any, Final

from memo.keys.encoding import atoms, canonical
from memo.keys.encoding.canonical import Encoder, Walk
from memo.keys.encoding.libraries.for_arrays import node
from memo.keys.encoding.libraries.for_handles import ELSEWHERE

_STORES: Final = frozenset({"zarr", "h5py", "netCDF4", "xarray", "tiledb"})
"""Packages whose objects in a graph are read when the graph runs."""


def _collection(value: Any, walk: Walk) -> bytes:
    for task in dict(value.__dask_graph__()).values():
        held = getattr(task, "value", task)
        if canonical.module_of(type(held)).partition(".")[0] in _STORES:
            raise walk.refuse(value, ELSEWHERE)
    dask = sys.modules["dask"]
    with dask.config.set({"tokenize.ensure-deterministic": True}):
        return atoms.text(sys.modules["dask.base"].tokenize(value))


ADAPTERS: Final[dict[str, Encoder]] = {"dask.DaskMethodsMixin": node("dask", _collection)}
"""`package.class` -> encoder, for the values of the class and of its subclasses."""
