"""Encode Dask collections by the token of what they compute, if that is deterministic.

The token of a collection that reads files was made with the collection, but the files are read when
it is computed.  So such a collection is a handle on external data, and is refused.
"""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Iterator
from typing import Any, Final

from memo.keys.encoding import atoms, canonical
from memo.keys.encoding.canonical import Encoder, Walk
from memo.keys.encoding.libraries.for_arrays import node
from memo.keys.encoding.libraries.for_handles import DATA_ELSEWHERE

_STORES: Final = frozenset({"zarr", "h5py", "netCDF4", "xarray", "tiledb"})
"""Packages whose objects in a graph are read when the graph runs."""
_READING_FUNCTIONS: Final = re.compile(
    r"(numpy|pandas|polars|pyarrow|xarray)\.(\w+\.)*(read|scan|open|load|fromfile|genfromtxt)"
    r"|pandas\.io\.|dask\.bytes\.|dask\.bag\.(text|avro)\."
    r"|dask\.dataframe\.(\w+\.)*io\.(csv|hdf|json|orc|parquet|sql)\."
)
"""Functions that read files or databases, by module and name."""


def _collection(value: Any, walk: Walk) -> bytes:
    for task in dict(value.__dask_graph__()).values():
        if any(map(_is_external, _parts_of_task(task))):
            raise walk.refuse(value, DATA_ELSEWHERE)
    dask = sys.modules["dask"]
    with dask.config.set({"tokenize.ensure-deterministic": True}):
        return atoms.text(sys.modules["dask.base"].tokenize(value))


def _parts_of_task(task: Any) -> Iterator[Any]:
    """Yield the function and the arguments of a task; for one that needs others only its value."""
    if getattr(task, "dependencies", None):
        yield getattr(task, "value", task)
        return
    todo = [task]
    while todo:
        part = todo.pop()
        if type(part) in (list, tuple, set):
            todo.extend(part)
        elif type(part) is dict:
            todo.extend(part.values())
        elif isinstance(part, functools.partial):
            todo += (part.func, part.args, part.keywords)
        elif canonical.module_of(type(part)) == "dask._task_spec":
            todo += [getattr(part, name, None) for name in ("func", "args", "kwargs", "value")]
        else:
            yield part


def _is_external(part: Any) -> bool:
    """True if a part of a task is a file, or reads one."""
    kind = type(part)
    if canonical.module_of(kind).partition(".")[0] in _STORES or isinstance(part, os.PathLike):
        return True
    if f"{canonical.module_of(kind)}.{kind.__qualname__}" == "numpy.memmap":
        return True
    if canonical.is_refused(kind):
        return True
    module = getattr(part, "__module__", None) or canonical.module_of(kind)
    return bool(_READING_FUNCTIONS.match(f"{module}.{getattr(part, '__name__', '')}"))


ADAPTERS: Final[dict[str, Encoder]] = {"dask.DaskMethodsMixin": node("dask", _collection)}
"""`package.class` -> encoder, for values of the class and its subclasses."""
