"""Refuse handles on external data, since the data can change behind them.

A file system, an open database or an array on disk is identified by its location, which says
nothing about its content.  As arguments such handles are errors; as globals they are left out and
listed.
"""

from __future__ import annotations

from typing import Any, Final

from memo.keys.encoding import python_types
from memo.keys.encoding.canonical import Encoder, RefusingEncoder, Walk

DATA_ELSEWHERE: Final = (
    "its data is stored elsewhere and may change; pass its path and name the path in "
    "depends_on=[...], choose what counts by key_resolver, or name the argument in ignore=[...]."
)
_HANDLE: Final = RefusingEncoder(DATA_ELSEWHERE)
_HANDLE_CLASSES: Final = (
    *("zarr.Array", "zarr.AsyncArray", "zarr.Group", "zarr.AsyncGroup", "zarr.Store"),
    *("pyarrow.Dataset", "pyarrow.Scanner", "pyarrow.FileSystem", "pyarrow.NativeFile"),
    *("pyarrow.ParquetFile", "pyarrow.ParquetDataset", "pyarrow.RecordBatchReader"),
    *("fsspec.AbstractFileSystem", "fsspec.AbstractBufferedFile", "fsspec.FSMap"),
    *("fsspec.OpenFile", "fsspec.OpenFiles", "fsspec.LocalFileOpener"),
    *("h5py.HLObject", "h5py.AttributeManager", "netCDF4.Dataset", "netCDF4.Variable"),
    *("shelve.Shelf", "dbm._Database", "diskcache.Cache", "diskcache.FanoutCache"),
    *("diskcache.Deque", "diskcache.Index", "zict.File", "partd.Interface"),
    *("ibis.BaseBackend", "duckdb.DuckDBPyConnection", "duckdb.DuckDBPyRelation"),
    *("_duckdb.DuckDBPyConnection", "_duckdb.DuckDBPyRelation"),
    *("sqlalchemy.Engine", "sqlalchemy.Connection", "sqlalchemy.Session"),
    *("sqlalchemy.AsyncEngine", "sqlalchemy.AsyncConnection", "sqlalchemy.AsyncSession"),
)


def _ibis(value: Any, walk: Walk) -> bytes:
    """Encode an expression of ibis, unless it reads the tables of a database."""
    backends, _ = value._find_backends()
    if backends:
        raise walk.refuse(value, DATA_ELSEWHERE)
    return python_types.plain_object(value, walk)


ADAPTERS: Final[dict[str, Encoder]] = {
    **dict.fromkeys(_HANDLE_CLASSES, _HANDLE),
    "ibis.Expr": _ibis,
}
"""`package.class` -> encoder, for values of the class and its subclasses."""
