"""Arrays and tables: hashed whole and in place; layout is not in the key, everything else is."""

from __future__ import annotations

import copy
import itertools
import os
import pickle
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import scipy.sparse as sp
from blake3 import blake3
from checkout import ROOT, SUPPORT
from hypothesis import given, settings
from hypothesis import strategies as st
from ports import run

from memo.keys.encoding.canonical import Unkeyable
from memo.keys.encoding.libraries import for_arrays
from memo.keys.values import value_digest as digest

PANDAS_3 = int(pd.__version__.split(".")[0]) >= 3
NAN = float("nan")
pl.DataFrame({"a": ["x"]}).select(pl.col("a").str.join("")).item()
"""polars opens descriptors for its threads when it first works, and keeps them: before any test."""

# --- numpy ---------------------------------------------------------------------------------------

RECORD = np.dtype([("a", "i4"), ("b", "f8")])
PADDED = np.dtype([("a", "i4"), ("b", "f8")], align=True)


def with_attribute(frame: Any, **attrs: Any) -> Any:
    frame = frame.copy()
    frame.attrs.update(attrs)
    return frame


ARRAYS: dict[str, Any] = {
    "i8": np.arange(6),
    "list": [0, 1, 2, 3, 4, 5],
    "i4": np.arange(6, dtype="i4"),
    "u8": np.arange(6, dtype="u8"),
    "f8": np.arange(6, dtype="f8"),
    "big-endian": np.arange(6, dtype=">i8"),
    "big-endian, same bytes": np.arange(6).view(">i8"),
    "2x3": np.arange(6).reshape(2, 3),
    "3x2": np.arange(6).reshape(3, 2),
    "6x1": np.arange(6).reshape(6, 1),
    "changed at the end": np.array([0, 1, 2, 3, 4, 6]),
    "0-d": np.array(1),
    "one": np.array([1]),
    "scalar": np.int64(1),
    "scalar i4": np.int32(1),
    "int": 1,
    "float scalar": np.float64(1),
    "float": 1.0,
    "bool scalar": np.bool_(True),
    "bool": np.array([True]),
    "str scalar": np.str_("a"),
    "str": "a",
    "bytes scalar": np.bytes_(b"a"),
    "U1": np.array(["a"]),
    "U2": np.array(["a"], dtype="U2"),
    "S1": np.array([b"a"]),
    "object": np.array(["a"], dtype=object),
    "object int": np.array([1], dtype=object),
    "object True": np.array([True], dtype=object),
    "StringDType": np.array(["a"], dtype=np.dtypes.StringDType()),
    "StringDType na": np.array(["a"], dtype=np.dtypes.StringDType(na_object=None)),
    "empty": np.empty((0,)),
    "empty 0x3": np.empty((0, 3)),
    "empty 3x0": np.empty((3, 0)),
    "0.0": np.array([0.0]),
    "-0.0": np.array([-0.0]),
    "nan": np.array([NAN]),
    "nan scalar": np.float64(NAN),
    "M8[s]": np.array([0], dtype="M8[s]"),
    "M8[ns]": np.array([0], dtype="M8[ns]"),
    "m8[s]": np.array([0], dtype="m8[s]"),
    "NaT": np.array(["NaT"], dtype="M8[s]"),
    "M8 scalar": np.datetime64(0, "s"),
    "complex": np.array([1j]),
    "complex scalar": np.complex128(1j),
    "longdouble": np.array([1], dtype=np.longdouble),
    "longdouble scalar": np.longdouble(1),
    "record": np.zeros(2, RECORD),
    "padded": np.zeros(2, PADDED),
    "longlong": np.zeros(2, [("a", np.longlong)]),
    "recarray": np.zeros(2, RECORD).view(np.recarray),
    "renamed": np.zeros(2, [("a", "i4"), ("c", "f8")]),
    "sub-array": np.zeros(2, [("a", "i4", (2,))]),
    "record of objects": np.zeros(2, [("a", "O")]),
    "void": np.zeros(1, "V4"),
    "masked": np.ma.array([1, 2], mask=[0, 1]),
    "masked constant": np.ma.masked,
    "masked other": np.ma.array([1, 2], mask=[1, 0]),
    "masked none": np.ma.array([1, 2], mask=[0, 0]),
    "masked fill": np.ma.array([1, 2], mask=[0, 1], fill_value=7),
    "matrix": np.arange(6).reshape(2, 3).view(np.matrix),
    "dtype": np.dtype("i8"),
    "dtype f8": np.dtype("f8"),
    "dtype record": RECORD,
    "dtype padded": PADDED,
    "np.int64": np.int64,
    "sin": np.sin,
    "cos": np.cos,
    "mean": np.mean,
    "compiled": pd.api.types.is_scalar,
    "compiled other": pd.api.types.is_float,
    "compiled method": pd.Timestamp.now,
    "generator": np.random.default_rng(1),
    "generator 2": np.random.default_rng(2),
}
FRAME = pd.DataFrame({"a": [1, 2, 3], "b": [1.0, 2.0, 3.0], "c": ["x", "y", "z"]})
DAYS = pd.date_range("2024-01-01", periods=3)
TABLES: dict[str, Any] = {
    "frame": FRAME,
    "frame value": FRAME.assign(c=["x", "y", "w"]),
    "frame dtype": FRAME.assign(a=FRAME["a"].astype("i4")),
    "frame name": FRAME.rename(columns={"a": "A"}),
    "frame order": FRAME[["b", "a", "c"]],
    "frame rows": FRAME.iloc[::-1],
    "frame index": FRAME.set_axis([1, 2, 3]),
    "frame index name": FRAME.rename_axis("i"),
    "frame columns name": FRAME.rename_axis("i", axis=1),
    "frame attrs": with_attribute(FRAME, source="a"),
    "frame attrs other": with_attribute(FRAME, source="b"),
    "frame flags": FRAME.set_flags(allows_duplicate_labels=False),
    "frame object": FRAME.astype({"c": object}),
    "frame categorical": FRAME.astype({"c": "category"}),
    "frame swapped values": pd.DataFrame({"a": [1.0, 2.0, 3.0], "b": [1, 2, 3], "c": [*"xyz"]}),
    "frame two ints": pd.DataFrame({"a": [1, 2], "b": [3, 4]}),
    "frame two ints other": pd.DataFrame({"a": [1, 3], "b": [2, 4]}),
    "frame duplicate columns": pd.DataFrame([[1, 2]], columns=["a", "a"]),
    "frame no rows": FRAME.iloc[:0],
    "frame no columns": FRAME[[]],
    "frame nothing": pd.DataFrame(),
    "series": FRAME["a"],
    "series name": FRAME["a"].rename("A"),
    "series no name": FRAME["a"].rename(None),
    "one column": FRAME[["a"]],
    "numbers": FRAME["a"].to_numpy(),
    "index": pd.Index([0, 1, 2]),
    "index name": pd.Index([0, 1, 2], name="a"),
    "range": pd.RangeIndex(3),
    "range name": pd.RangeIndex(3, name="a"),
    "levels": pd.MultiIndex.from_arrays([[1, 2], [3, 4]]),
    "levels sorted": pd.MultiIndex.from_arrays([[1, 2], [3, 4]], sortorder=0),
    "days": DAYS,
    "days no freq": DAYS._with_freq(None),
    "days utc": DAYS.tz_localize("UTC"),
    "days berlin": DAYS.tz_localize("Europe/Berlin"),
    "days ns": DAYS.as_unit("ns"),
    "days s": DAYS.as_unit("s"),
    "days series": pd.Series(DAYS),
    "days series utc": pd.Series(DAYS.tz_localize("UTC")),
    "days series berlin": pd.Series(DAYS.tz_localize("Europe/Berlin")),
    "days series s": pd.Series(DAYS.as_unit("s")),
    "deltas": pd.to_timedelta([1, 2], unit="s"),
    "periods": pd.period_range("2024", periods=2, freq="D"),
    "periods M": pd.period_range("2024", periods=2, freq="M"),
    "periods series": pd.Series(pd.period_range("2024", periods=2, freq="D")),
    "intervals": pd.interval_range(0, 2),
    "intervals left": pd.interval_range(0, 2, closed="left"),
    "intervals series": pd.Series(pd.interval_range(0, 2)),
    "multi": pd.MultiIndex.from_product([[1, 2], ["a", "b"]]),
    "multi names": pd.MultiIndex.from_product([[1, 2], ["a", "b"]], names=["x", "y"]),
    "multi other": pd.MultiIndex.from_product([[1, 2], ["a", "c"]]),
    "tuples": pd.Index([(1, "a"), (1, "b"), (2, "a"), (2, "b")], tupleize_cols=False),
    "categorical": pd.Categorical(["a", "b"]),
    "categorical order": pd.Categorical(["a", "b"], categories=["b", "a"]),
    "categorical unused": pd.Categorical(["a", "b"], categories=["a", "b", "c"]),
    "categorical ordered": pd.Categorical(["a", "b"], ordered=True),
    "categorical series": pd.Series(["a", "b"], dtype="category"),
    "categorical index": pd.CategoricalIndex(["a", "b"]),
    "Int64": pd.array([1, None], dtype="Int64"),
    "Int32": pd.array([1, None], dtype="Int32"),
    "Int64 0": pd.array([1, 0], dtype="Int64"),
    "Float64": pd.array([1.0, None], dtype="Float64"),
    "boolean": pd.array([True, None], dtype="boolean"),
    "str": pd.Series(["a", None], dtype="str"),
    "str python": pd.Series(["a", None], dtype=pd.StringDtype("python")),
    "str pyarrow": pd.Series(["a", None], dtype=pd.StringDtype("pyarrow")),
    "str na python": pd.Series(["a", None], dtype=pd.StringDtype("python", na_value=np.nan)),
    "ArrowDtype str": pd.Series(["a", None], dtype=pd.ArrowDtype(pa.string())),
    "ArrowDtype int": pd.Series([1, None], dtype=pd.ArrowDtype(pa.int64())),
    "ArrowDtype list": pd.Series([[1], None], dtype=pd.ArrowDtype(pa.list_(pa.int64()))),
    "object None": pd.Series(["a", None], dtype=object),
    "object nan": pd.Series(["a", NAN], dtype=object),
    "object NA": pd.Series(["a", pd.NA], dtype=object),
    "object NaT": pd.Series(["a", pd.NaT], dtype=object),
    "object bytes": pd.Series(["a", b"a"], dtype=object),
    "object np.str_": pd.Series(["a", np.str_("a")], dtype=object),
    "object Decimal": pd.Series(["a", Decimal(1)], dtype=object),
    "sparse": pd.arrays.SparseArray([0, 0, 1]),
    "sparse fill": pd.arrays.SparseArray([0, 0, 1], fill_value=1),
    "sparse float": pd.arrays.SparseArray([0.0, 0.0, 1.0]),
    "sparse longer": pd.arrays.SparseArray([0, 0, 1, 0]),
    "sparse series": pd.Series([0, 0, 1], dtype=pd.SparseDtype(int, 0)),
    "NumpyExtensionArray": pd.Series([1, 2]).array,
    "Timestamp": pd.Timestamp("2024-01-01"),
    "Timestamp utc": pd.Timestamp("2024-01-01", tz="UTC"),
    "Timestamp ns": pd.Timestamp("2024-01-01").as_unit("ns") + pd.Timedelta(1, "ns"),
    "Timedelta": pd.Timedelta(1, "s"),
    "Period": pd.Period("2024-01-01", "D"),
    "Period M": pd.Period("2024-01", "M"),
    "Interval": pd.Interval(0, 1),
    "Interval left": pd.Interval(0, 1, closed="left"),
    "NaT": pd.NaT,
    "NA": pd.NA,
    "offset": pd.offsets.MonthEnd(),
    "offset 2": pd.offsets.MonthEnd(2),
    "CategoricalDtype": pd.CategoricalDtype(["a"]),
    "CategoricalDtype ordered": pd.CategoricalDtype(["a"], ordered=True),
    "DatetimeTZDtype": pd.DatetimeTZDtype("ns", "UTC"),
    "Int64Dtype": pd.Int64Dtype(),
}
SPARSE = sp.csr_array(np.array([[0.0, 1.0, 0.0], [2.0, 0.0, 3.0]]))
OTHERS: dict[str, Any] = {
    "csr": SPARSE,
    "csr matrix": sp.csr_matrix(SPARSE),
    "csc": SPARSE.tocsc(),
    "coo": SPARSE.tocoo(),
    "lil": SPARSE.tolil(),
    "dok": SPARSE.todok(),
    "dia": SPARSE.todia(),
    "bsr": SPARSE.tobsr((1, 1)),
    "bsr 2x3": SPARSE.tobsr((2, 3)),
    "csr f4": SPARSE.astype("f4"),
    "csr shape": sp.csr_array((SPARSE.data, SPARSE.indices, SPARSE.indptr), shape=(2, 4)),
    "csr value": SPARSE * 2,
    "coo 1-d": sp.coo_array(np.array([0.0, 1.0])),
    "coo 1-d other": sp.coo_array(np.array([1.0, 0.0])),
    "pa int": pa.array([1, 2, None]),
    "pa int 0": pa.array([1, 2, 0]),
    "pa int32": pa.array([1, 2, None], pa.int32()),
    "pa chunked": pa.chunked_array([[1, 2, None]]),
    "pa str": pa.array(["a", "b", None]),
    "pa str ''": pa.array(["a", "b", ""]),
    "pa str moved": pa.array(["ab", "", None]),
    "pa large str": pa.array(["a", "b", None], pa.large_string()),
    "pa str view": pa.array(["a", "b", None], pa.string_view()),
    "pa binary": pa.array([b"a", b"b", None]),
    "pa bool": pa.array([True, False, None]),
    "pa bool other": pa.array([True, True, None]),
    "pa null": pa.nulls(3),
    "pa null 4": pa.nulls(4),
    "pa list": pa.array([[1], [], None, [2, 3]]),
    "pa list moved": pa.array([[], [1], None, [2, 3]]),
    "pa list none": pa.array([[1], None, [], [2, 3]]),
    "pa large list": pa.array([[1], [], None, [2, 3]], pa.large_list(pa.int64())),
    "pa fixed list": pa.array([[1, 2], [3, 4]], pa.list_(pa.int64(), 2)),
    "pa struct": pa.array([{"a": 1, "b": "x"}, None]),
    "pa struct none": pa.array([{"a": 1, "b": "x"}, {"a": None, "b": None}]),
    "pa map": pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())),
    "pa dictionary": pa.array(["a", "b", "a"]).dictionary_encode(),
    "pa dictionary other": pa.DictionaryArray.from_arrays([1, 0, 1], ["b", "a"]),
    "pa decimal": pa.array([Decimal("1.0")]),
    "pa timestamp": pa.array([0], pa.timestamp("s")),
    "pa timestamp utc": pa.array([0], pa.timestamp("s", "UTC")),
    "pa date": pa.array([0], pa.date32()),
    "pa table": pa.table({"a": [1, 2]}),
    "pa table name": pa.table({"b": [1, 2]}),
    "pa table metadata": pa.table({"a": [1, 2]}).replace_schema_metadata({"a": "b"}),
    "pa table field metadata": pa.table(
        {"a": [1, 2]}, schema=pa.schema([pa.field("a", pa.int64(), metadata={"a": "b"})])
    ),
    "pa table not null": pa.table(
        {"a": [1, 2]}, schema=pa.schema([pa.field("a", pa.int64(), nullable=False)])
    ),
    "pa batch": pa.record_batch({"a": [1, 2]}),
    "pa no rows": pa.table({"a": [1, 2]}).slice(0, 0),
    "pa scalar": pa.scalar(1),
    "pa scalar f": pa.scalar(1.0),
    "pa type": pa.int64(),
    "pa type f": pa.float64(),
    "pa schema": pa.schema([("a", pa.int64())]),
    "pa buffer": pa.py_buffer(b"abc"),
    "pl frame": pl.DataFrame({"a": [1, 2]}),
    "pl frame name": pl.DataFrame({"b": [1, 2]}),
    "pl frame value": pl.DataFrame({"a": [1, 3]}),
    "pl frame empty": pl.DataFrame({"a": []}, schema={"a": pl.Int64}),
    "pl series": pl.Series("a", [1, 2]),
    "pl series null": pl.Series("a", [1, None]),
    "pl series null 2": pl.Series("a", [None, 1]),
    "pl series 0": pl.Series("a", [1, 0]),
    "pl Int32": pl.Series("a", [1, 2], pl.Int32),
    "pl Int128": pl.Series("a", [1, 2], pl.Int128),
    "pl Float": pl.Series("a", [1.0, 2.0]),
    "pl Float nan": pl.Series("a", [1.0, NAN]),
    "pl Boolean": pl.Series("a", [True, False]),
    "pl Boolean other": pl.Series("a", [True, True]),
    "pl String": pl.Series("a", ["x", "y"]),
    "pl String moved": pl.Series("a", ["xy", ""]),
    "pl String null": pl.Series("a", ["xy", None]),
    "pl Binary": pl.Series("a", [b"x", b"y"]),
    "pl Categorical": pl.Series("a", ["x", "y"], pl.Categorical),
    "pl Enum": pl.Series("a", ["x", "y"], pl.Enum(["x", "y"])),
    "pl Enum other": pl.Series("a", ["x", "y"], pl.Enum(["y", "x"])),
    "pl List": pl.Series("a", [[1], [], None, [2, None]]),
    "pl List moved": pl.Series("a", [[], [1], None, [2, None]]),
    "pl Array": pl.Series("a", [[1, 2]], pl.Array(pl.Int64, 2)),
    "pl Struct": pl.Series("a", [{"x": 1, "y": "a"}]),
    "pl Struct name": pl.Series("a", [{"x": 1, "z": "a"}]),
    "pl Decimal": pl.Series("a", [Decimal("1.5")]),
    "pl Datetime us": pl.Series("a", [0], pl.Datetime("us")),
    "pl Datetime ms": pl.Series("a", [0], pl.Datetime("ms")),
    "pl Datetime utc": pl.Series("a", [0], pl.Datetime("us", "UTC")),
    "pl Date": pl.Series("a", [0], pl.Date),
    "pl Duration": pl.Series("a", [0], pl.Duration),
    "pl Time": pl.Series("a", [0], pl.Time),
    "pl Null": pl.Series("a", [None, None]),
    "pl Object": pl.Series("a", [{1}, {2}], pl.Object),
    "pl Object other": pl.Series("a", [{1}, {3}], pl.Object),
    "pl dtype": pl.Int64(),
    "pl dtype class": pl.Int64,
}
DISTINCT = {**ARRAYS, **{f"pd {name}": v for name, v in TABLES.items()}, **OTHERS}


BEFORE_3 = [
    ("pd frame", "pd frame object"),
    ("pd days", "pd days ns"),
    ("pd str", "pd object None"),
]
"""Values that are the same before pandas 3: text is objects, and dates are nanoseconds."""


def test_different_arrays_and_tables_have_different_keys() -> None:
    """Type, dtype, byte order, shape, unit, zone, labels, names, attrs, missing kinds count."""
    found: dict[bytes, str] = {}
    clashes = []
    for name, value in DISTINCT.items():
        key = digest(value)
        clashes += [(found[key], name)] if key in found else []
        found[key] = name
    assert clashes == ([] if PANDAS_3 else BEFORE_3)


@pytest.mark.parametrize("name", DISTINCT)
def test_copies_have_one_key(name: str) -> None:
    """A deep copy, and one through pickle, has the key of its original."""
    value = DISTINCT[name]
    assert digest(copy.deepcopy(value)) == digest(value)
    if "big-endian" not in name and not name.startswith("pl Object"):  # not kept by pickle
        assert digest(pickle.loads(pickle.dumps(value))) == digest(value)


# --- layout is no value --------------------------------------------------------------------------


def padded(fill: int) -> Any:
    raw = np.full(2, fill, dtype=f"V{PADDED.itemsize}").view(PADDED)
    raw["a"], raw["b"] = 1, 2.0
    return raw


def blocks(consolidated: bool) -> Any:
    frame = pd.DataFrame(index=range(3))
    for name in "abcdef":
        frame[name] = np.arange(3.0) if name in "ace" else np.arange(3)
    return frame.copy() if consolidated else frame


def over_rows() -> Any:
    return pd.DataFrame(np.arange(12.0).reshape(4, 3), copy=False)


def big(order: str) -> Any:
    return np.arange(3_000_000.0).reshape(3, 1000, 1000).copy(order=order)  # type: ignore[call-overload]


def hidden(value: int) -> Any:
    array = pd.array([1, value, 3], dtype="Int64")
    array[1] = None
    array._data[1] = value
    return array


LEVELS = pd.MultiIndex.from_product([[1, 2], ["a", "b"]])
WIDE = pa.chunked_array([["a", None], ["bc", "d"], []])
STRUCTS = pa.array([None, {"a": 1, "b": "x"}, {"a": 2, "b": "y"}])


def used(frame: Any) -> Any:
    """A frame that remembers what it was asked."""
    assert frame.index.is_unique
    assert frame["a"].sum() == 6
    assert frame.columns.get_loc("b") == 1
    return frame


def unsorted() -> Any:
    return sp.csr_array(
        (np.array([1.0, 3.0, 2.0]), np.array([1, 2, 0]), np.array([0, 1, 3])), shape=(2, 3)
    )


def gaps(fields: dict[str, Any], values: tuple[int, ...]) -> tuple[Any, Any]:
    """Two records that differ only in bytes that belong to no field."""
    kind = np.dtype(fields)
    made = [np.full(2, fill, f"V{kind.itemsize}") for fill in (b"\0" * 12, b"\xff" * 12)]
    for raw in made:
        for name, value in zip(fields["names"], values, strict=True):
            raw.view(kind)[name] = value
    assert made[0].tobytes() != made[1].tobytes()
    return made[0].view(kind), made[1].view(kind)


def long_doubles(kind: str) -> tuple[Any, Any]:
    """Two arrays of long doubles with other bytes where none counts."""
    one, other = np.array([1, -2.5], kind), np.array([1, -2.5], kind)
    raw = other.view(np.uint8).reshape(2, -1)
    spare = raw.shape[1] - 10
    if np.finfo(np.longdouble).nmant == 63:
        raw[:, slice(spare) if kind[0] == ">" else slice(-spare, None)] = 7
    assert (one == other).all()
    return one, other


SAME: dict[str, Callable[[], tuple[Any, Any]]] = {
    "gap at the end": lambda: gaps(
        {"names": ["a"], "formats": ["i4"], "offsets": [0], "itemsize": 8}, (1,)
    ),
    "overlapping fields": lambda: gaps(
        {"names": ["a", "b"], "formats": ["i4", "i4"], "offsets": [0, 0], "itemsize": 8}, (1, 1)
    ),
    "gap between": lambda: gaps(
        {"names": ["a", "b"], "formats": ["i4", "i4"], "offsets": [0, 8], "itemsize": 12}, (1, 2)
    ),
    "long double": lambda: long_doubles("g"),
    "long double, big-endian": lambda: long_doubles(">g"),
    "fortran": lambda: (np.arange(6).reshape(2, 3), np.asfortranarray(np.arange(6).reshape(2, 3))),
    "fortran, big": lambda: (big("C"), big("F")),
    "transposed, big": lambda: (big("C"), big("C").T.copy().T),
    "strided": lambda: (np.arange(10)[::2], np.arange(0, 10, 2)),
    "reversed": lambda: (np.arange(5)[::-1], np.array([4, 3, 2, 1, 0])),
    "broadcast": lambda: (np.broadcast_to(1.5, (2000, 500)), np.full((2000, 500), 1.5)),
    "read-only": lambda: (np.arange(3), np.frombuffer(np.arange(3).tobytes(), dtype=int)),
    "unaligned": lambda: (
        np.arange(3),
        np.frombuffer(b"x" + np.arange(3).tobytes(), dtype="u1")[1:].view(int),
    ),
    "padding": lambda: (padded(0), padded(255)),
    "padding of long doubles": lambda: (
        np.array([1.0, 2.0], dtype=np.longdouble),
        np.array([1.0, 2.0, 3.0], dtype=np.longdouble)[:2] * 1,
    ),
    "scalar nan": lambda: (np.float64(NAN), np.float64(-NAN)),
    "object": lambda: (
        np.array([["a", 1]], dtype=object),
        np.asfortranarray(np.array([["".join("a"), 1]], dtype=object)),
    ),
    "native byte order": lambda: (np.arange(3), np.arange(3, dtype="<i8")),
    "blocks": lambda: (blocks(True), blocks(False)),
    "frame over rows": lambda: (over_rows(), over_rows().copy()),
    "columns one by one": lambda: (
        over_rows(),
        pd.DataFrame(dict(over_rows().items()), columns=pd.RangeIndex(3)),
    ),
    "slice": lambda: (
        FRAME.iloc[1:].reset_index(drop=True),
        FRAME.iloc[1:].copy().reset_index(drop=True),
    ),
    "slice of blocks": lambda: (blocks(True).iloc[::2], blocks(False).iloc[::2].copy()),
    "concatenated": lambda: (FRAME, pd.concat([FRAME[:1], FRAME[1:]])),
    "unused levels": lambda: (LEVELS[:2], LEVELS[:2].remove_unused_levels()),
    "order of levels": lambda: (
        pd.MultiIndex(levels=[["b", "a"]] * 2, codes=[[0, 1], [1, 0]]),
        pd.MultiIndex.from_arrays([["b", "a"], ["a", "b"]]),
    ),
    "under the mask": lambda: (hidden(7), hidden(8)),
    "sparse kinds": lambda: (
        pd.arrays.SparseArray([0, 0, 1], kind="block"),
        pd.arrays.SparseArray([0, 0, 1], kind="integer"),
    ),
    "used frame": lambda: (
        FRAME,
        used(FRAME.copy()),
    ),
    "str chunks": lambda: (
        pd.Series(["a", None, "c"], dtype=pd.StringDtype("pyarrow")),
        pd.concat(
            [pd.Series([x], dtype=pd.StringDtype("pyarrow")) for x in ["a", None, "c"]],
            ignore_index=True,
        ),
    ),
    "pa chunks": lambda: (WIDE, pa.chunked_array([WIDE.combine_chunks()])),
    "pa slice": lambda: (pa.array([0, 1, None, 3, 4])[1:4], pa.array([1, None, 3])),
    "pa bool slice": lambda: (
        pa.array([True] * 9 + [False, None])[8:],
        pa.array([True, False, None]),
    ),
    "pa str slice": lambda: (pa.array(["x", "a", None, "c"])[1:], pa.array(["a", None, "c"])),
    "pa list slice": lambda: (
        pa.array([[9], [1], None, [2, 3]])[1:],
        pa.array([[1], None, [2, 3]]),
    ),
    "pa struct slice": lambda: (STRUCTS[1:], pa.array(STRUCTS[1:].to_pylist())),
    "pa under nulls": lambda: (
        pa.Array.from_buffers(pa.int64(), 2, [pa.py_buffer(b"\1"), pa.py_buffer(np.array([1, 7]))]),
        pa.array([1, None]),
    ),
    "pa null strings": lambda: (
        pa.Array.from_buffers(
            pa.string(),
            3,
            [
                pa.py_buffer(b"\5"),
                pa.py_buffer(np.array([0, 1, 3, 4], "i4")),
                pa.py_buffer(b"aXXb"),
            ],
        ),
        pa.array(["a", None, "b"]),
    ),
    "pa no validity": lambda: (
        pa.array([1, 2, 3]),
        pa.Array.from_buffers(
            pa.int64(), 3, [pa.py_buffer(b"\7"), pa.py_buffer(np.array([1, 2, 3]))]
        ),
    ),
    "pa fixed list slice": lambda: (
        pa.array([[0, 0], [1, 2], None], pa.list_(pa.int64(), 2))[1:],
        pa.array([[1, 2], None], pa.list_(pa.int64(), 2)),
    ),
    "pa dictionary chunks": lambda: (
        pa.chunked_array(
            [pa.array(["a", "b"]).dictionary_encode(), pa.array(["b"]).dictionary_encode()]
        ),
        pa.chunked_array([pa.array(["a", "b", "b"]).dictionary_encode()]),
    ),
    "pa table chunks": lambda: (
        pa.concat_tables([pa.table({"a": [1]}), pa.table({"a": [2]})]),
        pa.table({"a": [1, 2]}),
    ),
    "pl chunks": lambda: (
        pl.concat(
            [pl.DataFrame({"a": ["x"], "b": [1]}), pl.DataFrame({"a": [None], "b": [2]})],
            rechunk=False,
        ),
        pl.DataFrame({"a": ["x", None], "b": [1, 2]}),
    ),
    "pl slice": lambda: (
        pl.DataFrame({"a": [0, 1, None], "b": [True, False, None]})[1:],
        pl.DataFrame({"a": [1, None], "b": [False, None]}),
    ),
    "pl list slice": lambda: (pl.Series([[9], [1], [], None])[1:], pl.Series([[1], [], None])),
    "pl sorted flag": lambda: (pl.Series([1, 2]).sort(), pl.Series([1, 2])),
    "unsorted csr": lambda: (unsorted(), SPARSE),
    "csr index width": lambda: (
        SPARSE,
        sp.csr_array(
            (SPARSE.data, SPARSE.indices.astype("i8"), SPARSE.indptr.astype("i8")), shape=(2, 3)
        ),
    ),
    "coo order": lambda: (
        sp.coo_array(([1.0, 2.0], ([0, 1], [1, 0])), shape=(2, 2)),
        sp.coo_array(([2.0, 1.0], ([1, 0], [0, 1])), shape=(2, 2)),
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_layout_is_not_in_the_key(name: str) -> None:
    """Strides, blocks, chunks, slices, padding and what lies under a mask make no difference."""
    one, other = SAME[name]()
    assert digest(one) == digest(other)


def test_a_mapped_array_is_an_array(tmp_path: Path) -> None:
    """An array in a file has the key of the same array in memory."""
    np.save(tmp_path / "a.npy", np.arange(6))
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    assert type(mapped) is np.memmap
    assert digest(mapped) == digest(np.arange(6))


def test_an_array_of_an_own_class_has_its_attributes() -> None:
    """A subclass of ndarray or DataFrame is its class, its data and what it says it carries."""

    class Quantity(np.ndarray):  # type: ignore[type-arg]
        unit = ""

    class Labelled(pd.DataFrame):
        _metadata = ["label"]  # noqa: RUF012
        label = ""

    one, other = np.arange(3).view(Quantity), np.arange(3).view(Quantity)
    one.unit, other.unit = "m", "s"
    assert len({digest(one), digest(other), digest(np.arange(3))}) == 3
    frame, labelled, again = FRAME.copy(), Labelled(FRAME), Labelled(FRAME)
    labelled.label = "a"
    assert len({digest(frame), digest(labelled), digest(again)}) == 3


# --- everything is hashed ------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 1, 12_345, 999_998, 999_999])
def test_nothing_is_sampled(at: int) -> None:
    """One bit anywhere in a big array, frame or list of strings is another key."""
    numbers = np.zeros(1_000_000)
    words = np.array(["a"] * 1_000_000, dtype=object)
    frame = pd.DataFrame({"n": numbers, "w": words, "s": pd.Series(words, dtype="str")})
    keys = [digest(numbers), digest(words), digest(frame), digest(frame)]
    numbers[at] = np.nextafter(0, 1)
    words[at] = "b"
    changed = [digest(numbers), digest(words)]
    for column, value in (("n", 1.0), ("s", "b")):
        other = frame.copy()
        other.loc[at, column] = value
        changed.append(digest(other))
    assert not [a for a, b in zip(keys, changed, strict=True) if a == b]


def test_big_arrays_are_not_copied() -> None:
    """Hashing 80 MB in place takes less than a tenth of that in memory."""
    import tracemalloc

    frame = pd.DataFrame(np.random.default_rng(0).random((2_000_000, 5)))
    column = pd.Series(frame[0].astype(str).head(300_000), dtype=pd.StringDtype("pyarrow"))
    digest(frame)
    tracemalloc.start()
    digest(frame)
    digest(column)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 << 20


def layouts(numbers: Any) -> dict[str, pd.DataFrame]:
    """One frame in many layouts."""
    rows, columns = numbers.shape
    wide = np.zeros((rows * 2, columns + 1), numbers.dtype)
    wide[::2, 1:] = numbers
    halves = [pd.DataFrame(part.copy()) for part in np.array_split(numbers, 2, axis=1)]
    return {
        "columns": pd.DataFrame(np.asfortranarray(numbers), copy=False),
        "rows": pd.DataFrame(np.ascontiguousarray(numbers), copy=False),
        "every other": pd.DataFrame(wide, copy=False).iloc[::2, 1:].set_axis(range(columns), axis=1)
        .reset_index(drop=True),
        "one by one": pd.DataFrame({n: numbers[:, n].copy() for n in range(columns)}, copy=False),
        "interleaved": pd.concat(
            [pd.DataFrame(numbers[:, at::2].copy()) for at in (0, 1)], axis=1
        )
        .iloc[:, np.argsort([*range(0, columns, 2), *range(1, columns, 2)])]
        .set_axis(pd.RangeIndex(columns), axis=1),
        "halves": pd.concat(halves, axis=1).set_axis(pd.RangeIndex(columns), axis=1),
        "backwards": pd.DataFrame(numbers[::-1].copy(), copy=False)
        .iloc[::-1].reset_index(drop=True),
    }  # fmt: skip


SMALL = {
    "band_bytes": 4096,
    "tile_bytes": 100,
    "parallel_from": 1000,
    "hashed_tile_bytes": 300,
    "tile_rows": 3,
    "threads": 4,
    "copied_whole": 500,
    "long_column": 2000,
    "strip_bytes": 5000,
}
"""Sizes by which everything that is cut for hashing is cut in little parts."""


@pytest.mark.parametrize("kind", ["f8", "i1", "M8[us]", "c16"])
@pytest.mark.parametrize("shape", [(1, 2), (7, 40), (1000, 3), (1000, 17), (40, 700), (0, 3)])
def test_bands_and_strips_are_not_in_the_key(
    set_limits: Callable[..., None], kind: str, shape: tuple[int, int]
) -> None:
    """However a frame lies, and however it is cut for hashing, it has one key."""
    set_limits(**SMALL)
    numbers = np.arange(shape[0] * shape[1]).reshape(shape).astype(kind)
    frames = layouts(numbers)
    assert len({digest(frame) for frame in frames.values()}) == 1
    plain = [numbers, np.asfortranarray(numbers), np.repeat(numbers, 2, axis=0)[::2]]
    assert len(set(map(digest, plain))) == 1


@pytest.mark.parametrize("shape", [(300_000, 3), (300_000, 17), (20_000, 40)])
def test_big_frames_have_one_key_in_any_layout(shape: tuple[int, int]) -> None:
    """A frame of several bands or strips has one key, whether it lies in columns or in rows."""
    numbers = np.random.default_rng(0).random(shape)
    frames = layouts(numbers)
    keys = {digest(frames[name]) for name in ("columns", "rows", "one by one")}
    assert len(keys) == 1
    numbers[-1, -1] += 1
    assert digest(pd.DataFrame(numbers)) not in keys


@pytest.mark.parametrize("long", [100, 100_000])
def test_every_place_of_a_frame_in_rows_counts(set_limits: Callable[..., None], long: int) -> None:
    """Two cells that change places make another key, wherever bands and strips end."""
    set_limits(**{**SMALL, "long_column": long})
    numbers = np.arange(40 * 36.0).reshape(40, 36)
    keys = {digest(pd.DataFrame(numbers, copy=False))}
    for (a, b), (c, d) in [
        ((0, 0), (0, 1)),
        ((15, 0), (16, 0)),
        ((0, 17), (0, 18)),
        ((39, 35), (0, 0)),
    ]:
        other = numbers.copy()
        other[a, b], other[c, d] = numbers[c, d], numbers[a, b]
        keys.add(digest(pd.DataFrame(other, copy=False)))
    assert len(keys) == 5


@pytest.mark.parametrize("started", [0, 1])
def test_bands_are_copied_alone_where_no_thread_starts(
    monkeypatch: pytest.MonkeyPatch, set_limits: Callable[..., None], started: int
) -> None:
    """At the end of the interpreter, where no thread can be started, big frames still have keys."""
    start, tries = threading.Thread.start, itertools.count()

    def limited(thread: threading.Thread) -> None:
        if next(tries) >= started:
            raise RuntimeError("can't start new thread")
        start(thread)

    rows = pd.DataFrame(np.random.default_rng(0).random((300_000, 5)), copy=False)
    fortran = np.asfortranarray(rows.to_numpy())
    keys = digest(rows), digest(fortran)
    set_limits(threads=4)
    monkeypatch.setattr(threading.Thread, "start", limited)
    assert (digest(rows), digest(fortran)) == keys
    assert next(tries) > started, "a thread was refused"


def test_big_frames_have_the_same_keys_on_one_processor(set_limits: Callable[..., None]) -> None:
    """If no second thread would help, the caller copies and hashes big frames itself."""
    rows = pd.DataFrame(np.random.default_rng(0).random((2_000_000, 2)), copy=False)
    values = rows, np.asfortranarray(rows.to_numpy())
    set_limits(threads=4)
    keys = [digest(value) for value in values]
    set_limits(threads=1)
    assert [digest(value) for value in values] == keys


LATE = """
import threading
import limits
import memo
import numpy as np
limits.change(threads=4)
@memo.cache
def load(x):
    return 1
numbers = np.random.default_rng(0).random((300_000, 5))
arrays = [np.asfortranarray(numbers), np.random.default_rng(0).random((5, 300_000)).T]
def work():
    threading.main_thread().join()
    print([(load(x), load.is_cached(x)) for x in arrays], flush=True)
threading.Thread(target=work).start()
"""


def test_big_arrays_have_keys_after_the_main_thread_has_ended() -> None:
    """In a thread that outlives the main thread, where pools cannot be imported any more."""
    assert run(LATE) == "[(1, True), (1, True)]"


def test_a_frame_in_rows_is_keyed_in_little_memory() -> None:
    """A frame of 160 MB that lies in rows takes one band of 16 MB, not a copy."""
    import tracemalloc

    frame = pd.DataFrame(np.zeros((1_000_000, 20)), copy=False)
    digest(frame)
    tracemalloc.start()
    digest(frame)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 24 << 20


def test_a_bad_element_is_found() -> None:
    """An element without a key is named by column and row."""
    lock = threading.Lock()
    with pytest.raises(Unkeyable) as caught:
        digest(pd.DataFrame({"a": [1, 2], "b": pd.Series(["x", lock], dtype=object)}), "df")
    assert caught.value.path == 'df["b"][1]'
    with pytest.raises(Unkeyable) as caught:
        digest([np.array([[1, lock]], dtype=object)], "x")
    assert caught.value.path == "x[0][0, 1]"
    with pytest.raises(Unkeyable, match="collect"):
        digest(pl.LazyFrame({"a": [1]}))


# --- across processes ----------------------------------------------------------------------------

SCRIPT = """
import sys
sys.path[:0] = {paths!r}
import test_frames
from memo.keys.values import value_digest as digest
print({{name: digest(value).hex() for name, value in test_frames.DISTINCT.items()}})
"""


@pytest.mark.parametrize("seed", ["0", "4242"])
def test_keys_are_the_same_in_every_process(seed: str) -> None:
    """No key of an array or table depends on PYTHONHASHSEED or on addresses."""
    here = os.path.dirname(os.path.abspath(__file__))
    script = SCRIPT.format(paths=[str(ROOT), str(SUPPORT), here])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        env={**os.environ, "PYTHONHASHSEED": seed},
        capture_output=True,
        text=True,
        check=True,
    )
    theirs = eval(done.stdout)
    mine = {name: digest(value).hex() for name, value in DISTINCT.items()}
    assert {n for n in mine if mine[n] != theirs[n]} == set()


ALONE = """
import sys
{block}
import {library} as library
import memo.keys.values
before = set(sys.modules)
print(memo.keys.values.value_digest({value}).hex())
new = {{m.partition(".")[0] for m in set(sys.modules) - before}}
assert not new & {{"numpy", "pandas", "pyarrow", "polars", "scipy", "torch"}} - {{{library!r}}}, new
"""
POLARS = 'library.DataFrame({"a": [1, None], "b": ["x", "é"], "c": [[1], []]})'
ARROW = 'library.table({"a": [1, None], "b": ["x", "é"], "c": [[1], []]}).slice(0, 2)'


@pytest.mark.parametrize(
    ("library", "value"), [("polars", POLARS), ("pyarrow", ARROW)], ids=["polars", "pyarrow"]
)
def test_each_library_stands_alone(library: str, value: str) -> None:
    """Polars and pyarrow are keyed without numpy and without each other, to the same key."""
    others = {"numpy", "pandas", "pyarrow", "polars"} - {library}
    block = "\n".join(f"sys.modules[{name!r}] = None" for name in sorted(others))
    script = ALONE.format(block=block, library=library, value=value)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    here = eval(value, {"library": sys.modules[library]})
    assert done.stdout.strip() == digest(here).hex()


def test_strings_are_shifted_alike_without_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offsets of sliced strings are made comparable by Python as they are by numpy."""
    parts = [pa.array(["ä", "b", None, "cd"])[1:], pa.array(["x", "yz"])]
    wide = [part.cast(pa.large_string()) for part in parts]
    values = [pa.chunked_array(parts), pa.chunked_array(wide)]
    keys = [digest(value) for value in values]
    monkeypatch.delitem(sys.modules, "numpy")
    assert [digest(value) for value in values] == keys
    whole = [pa.chunked_array([value.combine_chunks()]) for value in values]
    assert [digest(value) for value in whole] == keys


# --- torch ---------------------------------------------------------------------------------------


def test_torch() -> None:
    """Tensors are their dtype, shape, device, gradient flag and elements; strides are layout."""
    torch = pytest.importorskip("torch")
    base = torch.arange(6.0).reshape(2, 3)
    different = [
        base,
        base.half(),
        base.bfloat16(),
        base.reshape(3, 2),
        base + 1,
        base.clone().requires_grad_(True),
        torch.nn.Parameter(base),
        base.to_sparse(),
        torch.tensor(1),
        torch.tensor([True]),
        base.numpy(),
    ]
    assert len({digest(value) for value in different}) == len(different)
    assert digest(base) == digest(base.t().contiguous().t()) == digest(base.clone())
    assert digest(torch.tensor([1 + 1j]).conj()) == digest(torch.tensor([1 - 1j]))


# --- properties ----------------------------------------------------------------------------------

COLUMNS = {
    "i8": st.integers(-3, 3),
    "f8": st.sampled_from([0.0, 1.0, 2.5, NAN]),
    "object": st.sampled_from(["a", "b", "", None, 1, True, 1.0]),
    "str": st.sampled_from(["a", "b", ""]) | st.none(),
    "Int64": st.integers(-3, 3) | st.none(),
    "category": st.sampled_from(["a", "b"]),
    "M8[ns]": st.sampled_from([0, 1]),
    "bool": st.booleans(),
}


@st.composite
def frames(draw: Any) -> Any:
    """Small frames of every kind of column, so that equal ones are met often."""
    rows = draw(st.integers(0, 3))
    kinds = draw(st.lists(st.sampled_from(sorted(COLUMNS)), max_size=4))
    names = draw(st.permutations(["a", "b", "c", "d"]))
    columns = {}
    for name, kind in zip(names, kinds, strict=False):
        values = draw(st.lists(COLUMNS[kind], min_size=rows, max_size=rows))
        columns[name] = pd.Series(values, dtype=kind)
    frame = pd.DataFrame(columns, index=range(rows))
    if draw(st.booleans()):
        frame.index = pd.Index(draw(st.permutations(range(rows))), dtype="int64")
    return frame


def described(frame: Any) -> Any:
    """A description of a frame by a slow rule."""
    columns = [(n, str(frame[n].dtype), [*map(repr, frame[n].array)]) for n in frame.columns]
    categories = [
        (n, [*frame[n].cat.categories]) for n in frame if str(frame[n].dtype) == "category"
    ]
    labels = str(frame.columns.dtype)
    index = type(frame.index).__name__, frame.index.tolist()
    return repr((columns, categories, labels, index, len(frame)))


@settings(max_examples=300, deadline=None)
@given(frames(), frames())
def test_two_frames_have_one_key_exactly_when_they_are_equal(one: Any, other: Any) -> None:
    """No two unequal frames have one key, no two equal ones have two."""
    assert (digest(one) == digest(other)) == (described(one) == described(other))


@settings(max_examples=200, deadline=None)
@given(frames(), st.randoms())
def test_frames_put_together_otherwise_have_one_key(frame: Any, chance: random.Random) -> None:
    """Built column by column, consolidated, sliced out of a bigger one, pickled: one key."""
    byhand = pd.DataFrame(index=frame.index)
    byhand.columns = byhand.columns.astype(frame.columns.dtype)
    for name in frame.columns:
        byhand[name] = frame[name]
    byhand.columns = frame.columns
    bigger = pd.DataFrame({name: frame[name] for name in frame.columns}, index=frame.index)
    bigger["more"] = chance.random()
    for again in (
        byhand,
        byhand.copy(),
        bigger[list(frame.columns)],
        pickle.loads(pickle.dumps(frame)),
    ):
        again.columns = frame.columns
        assert digest(again) == digest(frame)


@settings(max_examples=100, deadline=None)
@given(frames(), st.data())
def test_one_changed_cell_is_another_key(frame: Any, data: st.DataObject) -> None:
    """A change of any single cell changes the key."""
    if not frame.size:
        return
    row = data.draw(st.integers(0, len(frame) - 1))
    column = data.draw(st.integers(0, frame.shape[1] - 1))
    kind = {"datetime64[ns]": "M8[ns]", "int64": "i8", "float64": "f8"}.get(
        str(frame.dtypes.iloc[column]), str(frame.dtypes.iloc[column])
    )
    value = data.draw(COLUMNS[kind])
    if kind == "category":
        value = data.draw(st.sampled_from(list(frame.iloc[:, column].cat.categories)))
    changed = frame.copy()
    values = list(changed.iloc[:, column].array)
    values[row] = pd.Timestamp(value) if kind == "M8[ns]" else value
    name = changed.columns[column]
    dtype = changed[name].dtype
    changed[name] = pd.Series(values, dtype=dtype, index=changed.index)
    assert (digest(changed) == digest(frame)) == (described(changed) == described(frame))


DTYPES = ("i1", "i8", ">i8", "u1", "f4", "f8", "?", "M8[s]", "M8[ns]", "m8[s]", "U1", "S1", "O")


@st.composite
def ndarrays(draw: Any) -> Any:
    """Small arrays of many dtypes, shapes and layouts, so that equal ones are met often."""
    shape = tuple(draw(st.lists(st.integers(0, 2), max_size=3)))
    size = int(np.prod(shape))
    numbers = draw(st.lists(st.integers(0, 1), min_size=size, max_size=size))
    array = np.array(numbers, dtype="i8").reshape(shape).astype(draw(st.sampled_from(DTYPES)))
    layout = draw(st.sampled_from(["C", "F", "strided", "backwards"]))
    if layout == "F":
        return np.asfortranarray(array)
    if layout == "strided" and array.ndim:
        return np.repeat(array, 2, axis=0)[::2]
    return array[::-1].copy()[::-1] if layout == "backwards" and array.ndim else array


LEAVES = frames() | ndarrays() | st.sampled_from([0, 1, True, False, 0.0, None, "a"])
NESTED = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.sampled_from(["a", "b", 1, None]), inner, max_size=3)
    ),
    max_leaves=5,
)


def told(value: Any) -> Any:
    """A description of a nested value by a slow rule."""
    if isinstance(value, np.ndarray):
        return "array", value.dtype.str, value.shape, repr(value.tolist())
    if isinstance(value, pd.DataFrame):
        return "frame", described(value)
    if isinstance(value, dict):
        return "dict", [(type(key), key, told(part)) for key, part in value.items()]
    if isinstance(value, list | tuple):
        return type(value), [told(part) for part in value]
    return type(value), value


@settings(max_examples=200, deadline=None)
@given(NESTED, NESTED)
def test_two_nested_values_have_one_key_exactly_when_they_are_equal(one: Any, other: Any) -> None:
    """Frames and arrays inside of containers: one key exactly when type and content are equal."""
    assert (digest(one) == digest(other)) == (told(one) == told(other))


@settings(max_examples=200, deadline=None)
@given(NESTED, NESTED, NESTED)
def test_parts_of_nested_values_do_not_run_into_each_other(a: Any, b: Any, c: Any) -> None:
    """However the same parts are bracketed, each way is another value."""
    ways = [[a, b, c], [[a, b], c], [a, [b, c]], [[a, b, c]], (a, b, c), {"a": a, "b": [b, c]}]
    assert len(set(map(digest, ways))) == len(ways)
    assert digest([a, b]) == digest([copy.deepcopy(a), copy.deepcopy(b)])
    assert (digest([a, b]) == digest([b, a])) == (told(a) == told(b))


# --- speed ---------------------------------------------------------------------------------------


def fastest(work: Callable[[], object], times: int = 9) -> float:
    best = float("inf")
    for _ in range(times):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


@pytest.mark.timing
def test_a_big_frame_takes_what_its_bytes_take() -> None:
    """400 MB of floats are keyed within 1.5 x multi-threaded BLAKE3 of the same bytes."""
    numbers = np.random.default_rng(0).random(50_000_000)
    frame = pd.DataFrame({f"c{i}": part for i, part in enumerate(np.split(numbers, 10))})
    view = memoryview(numbers.view(np.uint8))
    floor = fastest(lambda: blake3(view, max_threads=blake3.AUTO).digest())
    assert fastest(lambda: digest(numbers)) < 1.5 * floor
    assert fastest(lambda: digest(frame)) < 1.5 * floor


@pytest.mark.timing
def test_a_big_frame_in_rows_is_read_once() -> None:
    """200 MB of floats that lie in rows are keyed within 4 x multi-threaded BLAKE3 of them."""
    numbers = np.random.default_rng(0).random((2_500_000, 10))
    frame = pd.DataFrame(numbers, copy=False)
    view = memoryview(numbers.reshape(-1).view(np.uint8))
    floor = fastest(lambda: blake3(view, max_threads=blake3.AUTO).digest())
    assert fastest(lambda: digest(frame)) < 4 * floor


@pytest.mark.timing
def test_object_strings_take_one_conversion() -> None:
    """A million object strings are keyed within 1.5 x one conversion of them to Arrow."""
    words = np.array([f"str{n * 7919}" for n in range(1_000_000)], dtype=object)
    assert fastest(lambda: digest(words), 5) < 1.5 * fastest(lambda: pa.array(words), 5)


def test_pieces_are_what_is_hashed() -> None:
    """The sizes of the pieces into which bytes are cut make no difference."""
    data = bytes(range(256)) * 5000
    chance = random.Random(1)
    for size in (0, 1, 199, 200, 201, 65_535, 65_536, len(data)):
        cuts = sorted(chance.randrange(size + 1) for _ in range(5))
        pieces = [data[a:b] for a, b in zip([0, *cuts], [*cuts, size], strict=True)]
        assert for_arrays.encode_bytes(pieces) == for_arrays.encode_bytes([data[:size]])
