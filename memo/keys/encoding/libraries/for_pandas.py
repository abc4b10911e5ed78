"""Encode pandas frames, series, indexes and extension arrays.

Rules of this module:

1.  A frame is encoded by class, index and columns with their names, the dtype of each column, the
    values, `attrs` and flags.  How columns are grouped in blocks is layout, not value.
2.  Long columns are hashed one by one, short ones of one dtype in strips whose number of columns
    depends only on the shape and the dtype.  So contiguous columns are hashed in place; if the data
    is stored by rows, several columns are copied and hashed in one pass over the rows.
3.  The bytes under a missing value do not count; the kind of missing value does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from memo.keys.encoding import atoms, canonical
from memo.keys.encoding.canonical import Encoder, Walk
from memo.keys.encoding.libraries import for_arrays, for_arrow
from memo.keys.encoding.libraries.for_arrays import node, numpy

LONG_COLUMN_BYTES: Final = 1 << 20
"""Columns of at least this many bytes are hashed one by one."""
STRIP_BYTES: Final = 8 << 20
"""Bytes of a strip of short columns."""

# --- frames --------------------------------------------------------------------------------------


def _frame(value: Any, walk: Walk) -> bytes:
    return b"".join(
        [
            walk.encode(value.index, ".index"),
            walk.encode(value.columns, ".columns"),
            _facts(value, walk),
            _columns(value, walk),
        ]
    )


def _facts(value: Any, walk: Walk) -> bytes:
    """Encode the other attributes of a frame or series besides its values."""
    own = {name: getattr(value, name, None) for name in getattr(value, "_metadata", ())}
    own.pop("_name", None)
    content = walk.encode(bool(value.flags.allows_duplicate_labels))
    content += walk.encode(dict(value.attrs) if value.attrs else None, ".attrs")
    return content + (
        walk.encode(own) if own and canonical.module_of(type(value))[:6] != "pandas" else b"-"
    )


def _columns(value: Any, walk: Walk) -> bytes:
    """Encode the dtype of each column, then for each dtype the values of its columns."""
    np = numpy()
    blocks = value._mgr.blocks
    kinds = [_kind(block.values, walk) for block in blocks]
    owner = np.empty(value.shape[1], dtype=np.int32)
    row = np.empty(value.shape[1], dtype=np.int64)
    for number, block in enumerate(blocks):
        places = block.mgr_locs.as_array
        owner[places] = number
        row[places] = np.arange(len(places))
    order = list(dict.fromkeys(kinds[number] for number in _first_seen(owner)))
    group = (
        np.array([order.index(kind) for kind in kinds], dtype=np.int32)[owner] if blocks else owner
    )
    content = atoms.with_length(b"".join(order)) + for_arrays.encode_bytes(
        for_arrays.raw_bytes(group)
    )
    for number, kind in enumerate(order):
        members = np.flatnonzero(group == number)
        content += kind + atoms.with_length(_group(value, blocks, owner, row, members, walk))
    return content


def _first_seen(owner: Any) -> list[int]:
    """Return the distinct numbers of an array, in the order of their first occurrence."""
    numbers, first = numpy().unique(owner, return_index=True)
    return [int(numbers[i]) for i in first.argsort()]


def _kind(values: Any, walk: Walk) -> bytes:
    """Return the dtype of a block, as bytes that can be compared."""
    if type(values) is numpy().ndarray:
        return atoms.with_length(for_arrays.dtype(values.dtype, walk))
    return atoms.with_length(canonical.encode_class(values, walk) + _dtype(values.dtype, walk))


def _group(value: Any, blocks: Any, owner: Any, row: Any, members: Any, walk: Walk) -> bytes:
    """Encode the values of the columns of one dtype, in the order of the columns."""
    some = blocks[owner[members[0]]].values
    plain = _plain(some)
    if plain is not None and plain.dtype.kind not in "OT":
        return _strips(blocks, owner[members], row[members], plain)
    return b"".join(
        atoms.with_length(
            _column(blocks[owner[m]].values, int(row[m]), f"[{_label(value, m)}]", walk)
        )
        for m in members
    )


def _label(value: Any, at: Any) -> str:
    return canonical.key_step(value.columns[int(at)])[1:-1]


def _plain(values: Any) -> Any:
    """Return the numpy array whose rows are a block's columns, or None."""
    if getattr(values, "ndim", 1) != 2:
        return None
    return values if type(values) is numpy().ndarray else getattr(values, "_ndarray", None)


def _strips(blocks: Any, owner: Any, row: Any, plain: Any) -> bytes:
    """Encode the content of columns of one dtype: long ones one by one, short ones in strips.

    Args:
        plain: the values of one of the blocks; all have its dtype and its number of rows.
    """
    column = max(1, plain.shape[1] * plain.dtype.itemsize)
    if column >= LONG_COLUMN_BYTES:
        return b"".join(for_arrays.encode_rows(run) for run in _runs(blocks, owner, row))
    many = STRIP_BYTES // column
    content = b""
    for at in range(0, len(owner), many):
        runs = _runs(blocks, owner[at : at + many], row[at : at + many])
        content += for_arrays.encode_bytes(
            piece for run in runs for piece in for_arrays.raw_bytes(run)
        )
    return content


def _runs(blocks: Any, owner: Any, row: Any) -> Iterator[Any]:
    """Yield slices of blocks for runs of columns that are stored side by side."""
    np = numpy()
    breaks = np.flatnonzero((np.diff(owner) != 0) | (np.diff(row) != 1)) + 1
    starts, ends = [0, *breaks.tolist()], [*breaks.tolist(), len(owner)]
    for start, end in zip(starts, ends, strict=True):
        first = int(row[start])
        yield _plain(blocks[int(owner[start])].values)[first : first + end - start]


def _column(values: Any, row: int, step: str, walk: Walk) -> bytes:
    plain = _plain(values)
    if plain is None:
        return walk.encode(values, step)
    try:
        return for_arrays.elements(plain[row], walk)
    except canonical.Unkeyable as error:
        error.prepend_step(step)
        raise


def _series(value: Any, walk: Walk) -> bytes:
    name = walk.encode(value.name, ".name")
    return walk.encode(value.index, ".index") + name + _facts(value, walk) + _values(value, walk)


def _values(value: Any, walk: Walk) -> bytes:
    """Encode the values of a series or index."""
    values = value._values
    if type(values) is numpy().ndarray:
        return for_arrays.ndarray(values, walk)
    return walk.encode(values)


# --- indexes -------------------------------------------------------------------------------------


def _index(value: Any, walk: Walk) -> bytes:
    names = walk.encode(list(value.names), ".names")
    return names + walk.encode(getattr(value, "freq", None)) + _values(value, walk)


def _range(value: Any, walk: Walk) -> bytes:
    return walk.encode((list(value.names), value.start, value.stop, value.step))


def _levels(value: Any, walk: Walk) -> bytes:
    """Encode a MultiIndex by the values at each level; unused level values are layout."""
    parts = [walk.encode(value.get_level_values(i)) for i in range(value.nlevels)]
    return atoms.with_length(b"".join(parts)) + walk.encode(value.sortorder)


# --- extension arrays ----------------------------------------------------------------------------


def _dtype(value: Any, walk: Walk) -> bytes:
    """Encode a pandas dtype; the categories of a categorical are encoded with its values."""
    kind = type(value).__name__
    if kind == "CategoricalDtype":
        return walk.encode((kind, value.ordered))
    if kind == "DatetimeTZDtype":
        return walk.encode((kind, value.unit)) + walk.encode(value.tz, ".tz")
    if kind == "StringDtype":
        return walk.encode((kind, value.storage, repr(value.na_value)))
    if kind == "SparseDtype":
        return walk.encode((kind, str(value.subtype))) + walk.encode(value.fill_value)
    return atoms.text(kind) + atoms.text(str(value))


def _categorical(value: Any, walk: Walk) -> bytes:
    categories = walk.encode(value.categories, ".categories")
    return _dtype(value.dtype, walk) + categories + for_arrays.ndarray(value.codes, walk)


def _backed(value: Any, walk: Walk) -> bytes:
    """Encode an array over one numpy array: dates, times, periods, objects."""
    freq = None if type(value).__name__ == "PeriodArray" else getattr(value, "freq", None)
    return _dtype(value.dtype, walk) + walk.encode(freq) + for_arrays.ndarray(value._ndarray, walk)


def _nullable(value: Any, walk: Walk) -> bytes:
    """Encode a masked array of pandas, without the inaccessible data under its mask."""
    data, mask = value._data, value._mask
    if mask.any():
        data = numpy().where(mask, data.dtype.type(0), data)
    return (
        _dtype(value.dtype, walk) + for_arrays.ndarray(data, walk) + for_arrays.ndarray(mask, walk)
    )


def _arrow(value: Any, walk: Walk) -> bytes:
    held = value._pa_array
    parts = held.chunks if hasattr(held, "chunks") else [held]
    return _dtype(value.dtype, walk) + for_arrow.chunks(parts, held.type, walk)


def _sparse(value: Any, walk: Walk) -> bytes:
    places = value.sp_index.indices if hasattr(value.sp_index, "indices") else None
    if places is None:
        places = value.sp_index.to_int_index().indices
    head = _dtype(value.dtype, walk) + atoms.integer(len(value))
    return head + for_arrays.ndarray(places, walk) + for_arrays.ndarray(value.sp_values, walk)


def _intervals(value: Any, walk: Walk) -> bytes:
    return walk.encode(value.closed) + walk.encode(value.left) + walk.encode(value.right)


ADAPTERS: Final[dict[str, Encoder]] = {
    "pandas.DataFrame": node("frame", _frame),
    "pandas.Series": node("series", _series),
    "pandas.Index": node("index", _index),
    "pandas.RangeIndex": node("index", _range),
    "pandas.MultiIndex": node("index", _levels),
    "pandas.Categorical": node("column", _categorical),
    "pandas.NDArrayBackedExtensionArray": node("column", _backed),
    "pandas.BaseMaskedArray": node("column", _nullable),
    "pandas.ArrowExtensionArray": node("column", _arrow),
    "pandas.SparseArray": node("column", _sparse),
    "pandas.IntervalArray": node("column", _intervals),
}
"""`package.class` -> encoder, for values of the class and its subclasses."""
