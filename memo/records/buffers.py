"""Reducers: pickle values with buffers so that loading only needs to map their bytes.

numpy, pandas, Arrow and scipy pass most buffers to the pickler out of band by themselves.  These
are the exceptions:

==================================== ============================================================
value                                how it is pickled here
==================================== ============================================================
datetime64, timedelta64, and other   the same bytes under a type that has a buffer, and the type
types without a buffer in numpy
arrays that are not contiguous       transposed if that is enough, else one contiguous copy
object arrays of strings             as Arrow strings; still turned into objects at each load
`memmap`, `matrix`, `recarray`,      the plain arrays in them
`MaskedArray`
two views of the very same bytes     stored once; the second is a copy after loading
slices of Arrow arrays               without the rest of the array that they were cut from
polars frames and series             as Arrow tables, which share polars' buffers
==================================== ============================================================

The stored pickles call the functions of this module, so their names and arguments are part of the
format.  Libraries are never imported here, since a value of theirs exists already; except pyarrow,
which polars and pandas may use without having loaded it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa  # type: ignore[import-untyped]

MAX_STREAM_BUFFER_BYTES = 4096
"""Maximum size in bytes of a buffer that stays in the stream, and of an array that is left as
it is."""
_TEXT_CHECK_FROM_ITEMS = 1024
"""Minimum number of elements of an object array that is checked for being all strings."""
_MAX_SHARED_RATIO = 1.25
"""Factor by which an Arrow array may refer to more bytes than its own before it is copied."""


class BufferPickler(Protocol):
    """The part of a pickler that a reducer sees."""

    seen: dict[tuple[str, int, int], Any]
    """(kind, address, bytes) -> the object that was pickled for them, kept alive until the end."""


Reducer = Callable[[BufferPickler, Any], Any]


def reduction_of(pickler: BufferPickler, obj: Any) -> Any:
    """Return the reduction of an object; `NotImplemented`: use that of its library."""
    kind = type(obj)
    reduce = _REDUCERS.get((kind.__module__, kind.__qualname__))
    if reduce is None and kind.__module__ == "pyarrow.lib":
        reduce = _arrow
    if reduce is None or not _is_theirs(kind):
        return NotImplemented
    return reduce(pickler, obj)


def _is_theirs(kind: type) -> bool:
    """True if a type is the one that its module has under its name."""
    module = sys.modules.get(kind.__module__)
    return getattr(module, kind.__qualname__, None) is kind


# --- numpy ---------------------------------------------------------------------------------------


def _array(pickler: BufferPickler, array: np.ndarray[Any, Any]) -> Any:
    dtype = array.dtype
    if dtype.hasobject:
        return _objects(array) if dtype.kind == "O" else NotImplemented
    if array.nbytes < MAX_STREAM_BUFFER_BYTES or dtype.kind == "T":
        return NotImplemented
    flags = array.flags
    if not (flags.c_contiguous or flags.f_contiguous):
        return _strided(array)
    key = ("array", array.__array_interface__["data"][0], array.nbytes)
    first = pickler.seen.get(key)
    if first is array:
        return NotImplemented
    if first is not None:
        return copied, (first, dtype, array.shape, "C" if flags.c_contiguous else "F")
    if _has_buffer(array):
        pickler.seen[key] = array
        return NotImplemented
    plain = array.view(_plain(dtype))
    pickler.seen[key] = plain
    return typed, (plain, dtype)


def _has_buffer(array: Any) -> bool:
    try:
        memoryview(array).release()
    except (ValueError, TypeError, BufferError):
        return False
    return True


def _plain(dtype: np.dtype[Any]) -> Any:
    """Return a type of the same size that has a buffer in numpy."""
    return "i8" if dtype.kind in "Mm" else f"V{dtype.itemsize}"


def _strided(array: np.ndarray[Any, Any]) -> Any:
    """Reduce an array that is contiguous in another order of its axes, or a contiguous copy."""
    order = sorted(range(array.ndim), key=lambda axis: -abs(array.strides[axis]))
    turned = array.transpose(order)
    if not turned.flags.c_contiguous:
        turned = turned.copy(order="C")
    return transposed, (turned, tuple(order.index(axis) for axis in range(array.ndim)))


def _objects(array: np.ndarray[Any, Any]) -> Any:
    """Reduce an object array of strings, with missing values of one kind, to Arrow strings."""
    if array.size < _TEXT_CHECK_FROM_ITEMS or not (
        array.flags.c_contiguous or array.flags.f_contiguous
    ):
        return NotImplemented
    order: Literal["C", "F"] = "C" if array.flags.c_contiguous else "F"
    texts = array.ravel(order=order)
    if type(texts[0]) is not str and type(texts[-1]) is not str:
        return NotImplemented
    kinds = list(map(type, texts))
    pa, others = loaded_pyarrow(), len(kinds) - kinds.count(str)
    if pa is None or len(set(kinds)) > 2:
        return NotImplemented
    try:
        arrow = pa.array(texts, type=pa.large_string(), from_pandas=True)
    except (pa.ArrowException, UnicodeError, TypeError, ValueError):
        return NotImplemented
    if arrow.null_count != others:  # bytes, or strings of another class
        return NotImplemented
    missing = next(t for t in texts if type(t) is not str) if others else None
    return strings, (arrow, missing, array.shape, order)


def _viewed(_: BufferPickler, array: Any) -> Any:
    """Reduce a subclass of ndarray that only views an array and adds nothing to it."""
    is_small = array.nbytes < MAX_STREAM_BUFFER_BYTES and array.flags.writeable
    if is_small or array.dtype.hasobject:
        return NotImplemented
    return viewed, (array.view(sys.modules["numpy"].ndarray), type(array))


def _masked(_: BufferPickler, array: Any) -> Any:
    is_small = array.nbytes < MAX_STREAM_BUFFER_BYTES and not array.hardmask  # numpy loses it
    if is_small or array.dtype.hasobject or array.dtype.names:
        return NotImplemented
    np = sys.modules["numpy"]
    mask = None if array.mask is np.ma.nomask else array.mask
    fill = None if array._fill_value is None else array.fill_value
    return masked, (array.data, mask, fill, array.hardmask)


def typed(plain: np.ndarray[Any, Any], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """Return an array of bytes under their own type."""
    return plain.view(dtype)


def transposed(turned: np.ndarray[Any, Any], axes: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Return an array with its axes in their own order."""
    return turned.transpose(axes)


def copied(
    first: np.ndarray[Any, Any], dtype: np.dtype[Any], shape: tuple[int, ...], order: Any
) -> np.ndarray[Any, Any]:
    """Return an independent copy of an array, under its own type and shape."""
    return first.ravel(order="K").copy().view(dtype).reshape(shape, order=order)


def strings(
    arrow: pa.Array, missing: Any, shape: tuple[int, ...], order: Any
) -> np.ndarray[Any, Any]:
    """Return an object array of strings."""
    texts: Any = arrow.to_numpy(zero_copy_only=False)
    if missing is not None:
        texts[arrow.is_null().to_numpy(zero_copy_only=False)] = missing
    if not texts.flags.writeable:
        texts = texts.copy()
    array: np.ndarray[Any, Any] = texts.reshape(shape, order=order)
    return array


def viewed(array: np.ndarray[Any, Any], kind: type) -> Any:
    """Return an array as a subclass."""
    return array.view(kind)


def masked(data: Any, mask: Any, fill: Any, hard: bool) -> Any:
    """Return a masked array over these two arrays."""
    np = sys.modules["numpy"]
    array = np.ma.MaskedArray(data, np.ma.nomask if mask is None else mask, fill_value=fill)
    return array.harden_mask() if hard else array


# --- Arrow and polars ----------------------------------------------------------------------------


def loaded_pyarrow() -> Any:
    """Return the pyarrow of this process; None if it is not installed."""
    try:
        import pyarrow as pa
    except ImportError:
        return None
    return pa


def _arrow(pickler: BufferPickler, value: Any) -> Any:
    pa = sys.modules["pyarrow"]
    if isinstance(value, pa.Buffer):
        first = pickler.seen.setdefault(("buffer", value.address, value.size), value)
        return NotImplemented if first is value else (same, (first,))
    if not isinstance(value, pa.Array) or isinstance(value, pa.ExtensionArray):
        return NotImplemented
    held = value.get_total_buffer_size()
    if held < MAX_STREAM_BUFFER_BYTES or held <= _MAX_SHARED_RATIO * value.nbytes:
        return NotImplemented
    own = pa.concat_arrays([value])
    return (
        (same, (own,)) if own.get_total_buffer_size() < held / _MAX_SHARED_RATIO else NotImplemented
    )


def _polars(_: BufferPickler, frame: Any) -> Any:
    """Reduce a polars frame to an Arrow table, if it survives the round trip."""
    pl, pa = sys.modules["polars"], loaded_pyarrow()
    if pa is None or frame.estimated_size() < MAX_STREAM_BUFFER_BYTES:
        return NotImplemented
    try:
        table = frame.to_arrow(compat_level=pl.CompatLevel.newest())
        if pl.from_arrow(table.slice(0, 0)).schema != frame.schema:
            return NotImplemented
    except Exception:  # a type that Arrow does not have; each raises its own exception
        return NotImplemented
    return polars_frame, (table,)


def _polars_series(pickler: BufferPickler, series: Any) -> Any:
    done = _polars(pickler, series.to_frame("_"))
    return done if done is NotImplemented else (polars_series, (*done[1], series.name))


def same(value: Any) -> Any:
    """Return the value; used to pickle one object in place of another."""
    return value


def polars_frame(table: pa.Table) -> Any:
    """Return a polars frame over the buffers of a table."""
    import polars as pl

    return pl.from_arrow(table, rechunk=False)


def polars_series(table: pa.Table, name: str) -> Any:
    """Return a polars series over the buffers of a table of one column."""
    return polars_frame(table).to_series().rename(name)


_REDUCERS: dict[tuple[str, str], Reducer] = {
    ("numpy", "ndarray"): _array,
    ("numpy", "memmap"): _viewed,
    ("numpy", "matrix"): _viewed,
    ("numpy.rec", "recarray"): _viewed,
    ("numpy", "recarray"): _viewed,
    ("numpy.ma", "MaskedArray"): _masked,
    ("numpy.ma.core", "MaskedArray"): _masked,
    ("polars.dataframe.frame", "DataFrame"): _polars,
    ("polars.series.series", "Series"): _polars_series,
}
