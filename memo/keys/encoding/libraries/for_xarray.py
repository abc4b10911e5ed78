"""Encode xarray's datasets, arrays and variables whose data is in memory.

Reading `.attrs`, displaying and copying change a variable internally, so a value is encoded by what
can be read of it: names, dimensions, values, attributes and encoding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from memo.keys.encoding import canonical
from memo.keys.encoding.canonical import Encoder, Walk
from memo.keys.encoding.libraries.for_arrays import node

_LOAD: Final = "its data is not loaded; pass value.load(), or its path with depends_on=[...]."
_INDEX_ADAPTERS: Final = {"PandasIndexingAdapter", "CoordinateTransformIndexingAdapter"}
"""xarray's wrappers of indexes, which are in memory even where xarray treats them as lazy."""


def _variable(value: Any, walk: Walk) -> bytes:
    held = value._data
    is_index = any(base.__name__ in _INDEX_ADAPTERS for base in type(held).__mro__)
    if not value._in_memory and not is_index and not hasattr(held, "dask"):
        raise walk.refuse(value, _LOAD)
    data = held if hasattr(held, "dask") else value.data
    return b"".join(
        [
            walk.encode(tuple(value.dims)),
            walk.encode(data, ".data"),
            walk.encode(dict(value.attrs), ".attrs"),
            walk.encode(dict(value.encoding), ".encoding"),
        ]
    )


def _variables(variables: Mapping[Any, Any], walk: Walk) -> bytes:
    names = list(variables)
    contents = [walk.encode(variables[name], canonical.key_step(name)) for name in names]
    return walk.encode(names) + b"".join(contents)


def _indexes(value: Any, walk: Walk) -> bytes:
    """Encode the types of the indexes; their values are the coordinates."""
    return walk.encode({name: type(index) for name, index in value.xindexes.items()})


def _dataset(value: Any, walk: Walk) -> bytes:
    return b"".join(
        [
            _variables(value.variables, walk),
            walk.encode(set(value.coords)),
            _indexes(value, walk),
            walk.encode(dict(value.attrs), ".attrs"),
            walk.encode(dict(value.encoding), ".encoding"),
        ]
    )


def _array(value: Any, walk: Walk) -> bytes:
    coordinates = {name: value.coords[name].variable for name in value.coords}
    return b"".join(
        [
            walk.encode(value.name, ".name"),
            walk.encode(value.variable),
            _variables(coordinates, walk),
            _indexes(value, walk),
        ]
    )


def _tree(value: Any, walk: Walk) -> bytes:
    """Encode a tree: its name, and each node's own data."""
    own = {part.path: part.to_dataset(inherit=False) for part in value.subtree}
    return walk.encode(value.name, ".name") + walk.encode(own)


ADAPTERS: Final[dict[str, Encoder]] = {
    "xarray.Variable": node("variable", _variable),
    "xarray.DataArray": node("dataarray", _array),
    "xarray.Dataset": node("dataset", _dataset),
    "xarray.DataTree": node("tree", _tree),
}
"""`package.class` -> encoder, for values of the class and its subclasses."""
