"""The codec: what comes back is what went in, and big buffers come back as views of the payload."""

from __future__ import annotations

import pickle
import sys
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from pandas.testing import assert_frame_equal, assert_series_equal

from memo.errors import EntryError
from memo.records import codec
from memo.records.seal import ALIGN, Buffer, payload_size

N = 20_000
NAMES = [f"name-{i % 777}" for i in range(N)]
RNG = np.random.default_rng(0)


def load(encoded: codec.Encoded) -> Any:
    """The value, over a private copy of its payload."""
    if encoded.payload is None:
        return codec.decode(encoded.stream, None, ())
    payload = memoryview(bytearray(codec.aligned_bytes(encoded.payload)))
    return codec.decode(encoded.stream, payload, encoded.payload.table)


def stored(value: Any) -> tuple[Any, int, int]:
    """The value that comes back, and the bytes of its stream and of its payload."""
    encoded = codec.encode(value)
    return load(encoded), len(encoded.stream), encoded.payload.size if encoded.payload else 0


def series(values: Any, **kwargs: Any) -> pd.Series:
    return pd.Series(values, **kwargs)


COLUMNS: dict[str, tuple[pd.Series, bool]] = {
    # name: the column, and whether it maps (else it is rebuilt)
    "int64": (series(range(N)), True),
    "float64": (series(RNG.random(N)), True),
    "bool": (series(np.arange(N) % 2 == 0).repeat(4).reset_index(drop=True), True),
    "datetime64": (series(pd.date_range("2020", periods=N, freq="s")), True),
    "datetime64 with a zone": (
        series(pd.date_range("2020", periods=N, freq="s", tz="Europe/Paris")),
        True,
    ),
    "timedelta64": (series(pd.to_timedelta(np.arange(N), unit="s")), True),
    "period": (series(pd.period_range("2000", periods=N, freq="h")), True),
    "interval": (series(pd.interval_range(0, N)), True),
    "category": (series(pd.Categorical.from_codes(np.arange(4 * N) % 900, range(900))), True),
    "masked Int64": (series(range(N), dtype="Int64"), True),
    "masked boolean": (series([True, None, False, True] * N, dtype="boolean"), True),
    "sparse": (series(pd.arrays.SparseArray(np.arange(N) % 2)), True),
    "Arrow str": (series(NAMES, dtype="string[pyarrow]"), True),
    "Arrow int64": (series(range(N), dtype="int64[pyarrow]"), True),
    "object of str": (series(NAMES, dtype=object), False),
    "object of str and None": (series([None, *NAMES[1:]], dtype=object), False),
    "object of str and nan": (series([*NAMES[1:], np.nan], dtype=object), False),
    "object of str and NA": (series([*NAMES[1:], pd.NA], dtype=object), False),
    "python str": (series(NAMES, dtype=pd.StringDtype("python")), False),
    "object of anything": (series([1.5, ("a",), *NAMES[2:]], dtype=object), False),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_column_comes_back_equal(name: str) -> None:
    """A pandas column of every kind comes back equal, with its dtype and its missing values."""
    column, _ = COLUMNS[name]
    back, _, _ = stored(column)
    assert_series_equal(column, back)
    assert [type(v) for v in column[:2]] == [type(v) for v in back[:2]]
    assert type(column.iloc[-1]) is type(back.iloc[-1])


@pytest.mark.parametrize("name", [name for name, (_, maps) in COLUMNS.items() if maps])
def test_buffers_of_a_column_leave_the_stream(name: str) -> None:
    """Mapped values keep no data in the stream, so loading takes no time per element."""
    _, stream, payload = stored(COLUMNS[name][0])
    assert payload >= codec.PAYLOAD_FROM_BYTES
    assert stream < 8192


@pytest.mark.parametrize("name", COLUMNS)
def test_column_can_be_written_after_loading(name: str) -> None:
    """A loaded column can be changed, and what is loaded next does not show it."""
    column, _ = COLUMNS[name]
    encoded = codec.encode(column)
    back = load(encoded)
    if isinstance(back.dtype, pd.SparseDtype):
        back.array.sp_values[0] = 9
    else:
        back.iloc[0] = back.iloc[5]
    assert_series_equal(load(encoded), column)


def test_mixed_frame_comes_back_equal() -> None:
    """A frame of every kind of column at once, with an index of dates, comes back equal."""
    kinds = {name: column[:N] for name, (column, _) in COLUMNS.items()}
    frame = pd.DataFrame(kinds).set_index("datetime64")
    back, _, _ = stored({"nested": [frame]})
    assert_frame_equal(frame, back["nested"][0])


BLOCK = np.arange(60_000).reshape(10, 60, 100)
DAYS = np.arange(N).astype("M8[D]")
ARRAYS: dict[str, np.ndarray[Any, Any]] = {
    "C order": BLOCK,
    "Fortran order": np.asfortranarray(BLOCK),
    "axes in another order": BLOCK.transpose(2, 0, 1),
    "every second": BLOCK[:, ::2],
    "backwards": BLOCK[::-1],
    "broadcast": np.broadcast_to(np.arange(300), (300, 300)),
    "datetime64": DAYS,
    "datetime64 in Fortran order": np.asfortranarray(DAYS.reshape(100, -1)),
    "datetime64, every second": DAYS.repeat(2)[::2],
    "big-endian": np.arange(N, dtype=">i8"),
    "complex": np.arange(N) * 1j,
    "records with dates": np.zeros(N, dtype=[("a", "i4"), ("b", "M8[s]")]),
    "fixed text": np.array(NAMES),
    "recarray": np.rec.array([(1, 2.0)] * N, dtype=[("a", "i4"), ("b", "f8")]),
    "masked": np.ma.array(np.arange(N), mask=np.arange(N) % 2 == 0, fill_value=7),
    "masked without a mask": np.ma.array(np.arange(N)),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_array_comes_back_equal_and_out_of_band(name: str) -> None:
    """An array of every layout comes back equal, of its own class, from the payload."""
    array = ARRAYS[name]
    back, stream, payload = stored(array)
    assert type(back) is type(array)
    assert (back.dtype, back.shape) == (array.dtype, array.shape)
    assert np.array_equal(back, array)
    assert back.flags.writeable
    assert payload == -(-array.nbytes // ALIGN) * ALIGN + (
        -(-N // ALIGN) * ALIGN if name == "masked" else 0
    )
    assert stream < 1024


def test_masked_array_keeps_its_mask_and_fill_value() -> None:
    """A masked array comes back with the same mask and fill value."""
    array = ARRAYS["masked"]
    back, _, _ = stored(array)
    assert np.array_equal(back.mask, array.mask)
    assert back.fill_value == 7


@pytest.mark.parametrize("dtype", ["U", "T", "O"])
def test_text_arrays_come_back_equal(dtype: str) -> None:
    """Arrays of text, of all three kinds that numpy has, come back equal in their shape."""
    kind = {"U": None, "T": np.dtypes.StringDType(), "O": object}[dtype]
    array = np.array(NAMES, dtype=kind).reshape(100, -1).T
    back, _, _ = stored(array)
    assert back.dtype == array.dtype
    assert back.tolist() == array.tolist()


@pytest.mark.parametrize("odd", ["\ud800", b"bytes", np.str_("subclass"), 1.5, float("nan"), None])
def test_object_array_keeps_the_types_of_its_elements(odd: object) -> None:
    """A value that is no plain string among the strings comes back as it was."""
    array = np.array([*NAMES, None], dtype=object)
    array[-1] = odd
    back, _, _ = stored(array)
    assert type(back[-1]) is type(odd)
    assert back[:-1].tolist() == NAMES
    assert repr(back[-1]) == repr(odd)


def test_two_kinds_of_missing_values_are_kept_apart() -> None:
    """None and nan in one column of strings stay None and nan."""
    back, _, _ = stored(np.array([*NAMES, None, np.nan], dtype=object))
    assert back[-2] is None
    assert back[-1] != back[-1]


def test_views_of_the_same_bytes_are_stored_once() -> None:
    """Views of one array under several shapes and types lie in the payload once."""
    array = BLOCK.copy()
    back, _, payload = stored([array, array.reshape(-1), array.view("f8"), array.T])
    assert payload == array.nbytes
    assert np.array_equal(back[1], array.reshape(-1))
    assert np.array_equal(back[2].view("i8"), array)
    assert np.array_equal(back[3], array.T)


def test_views_of_the_same_bytes_come_back_independent() -> None:
    """Two frames that share memory copy-on-write do not show each other's changes when loaded."""
    frame = pd.DataFrame(RNG.random((N, 3)))
    (one, other), _, payload = stored([frame, frame[:]])
    assert payload == 8 * N * 3
    one.iloc[0, 0] = 9.0
    one.to_numpy()
    assert_frame_equal(other, frame)


def test_dates_stored_once_under_both_types() -> None:
    """An array of dates and its view as integers share their bytes, whichever comes first."""
    for values in ([DAYS, DAYS[:], DAYS.view("i8")], [DAYS.view("i8"), DAYS]):
        back, _, payload = stored(values)
        assert payload == DAYS.nbytes
        assert all(np.array_equal(a, b) for a, b in zip(values, back, strict=True))


def test_same_object_comes_back_as_one_object() -> None:
    """An array that a value holds twice is one array when it is loaded."""
    array = np.arange(N)
    back, _, _ = stored({"a": array, "b": array})
    assert back["a"] is back["b"]


TABLE = pa.table({"n": np.arange(N), "s": NAMES})
ARROW: dict[str, Any] = {
    "table": TABLE,
    "slice of a table": TABLE.slice(7, 9000),
    "batch": TABLE.to_batches()[0],
    "array": TABLE["s"].chunk(0),
    "chunked": TABLE["n"],
    "dictionary": pa.chunked_array([pa.array(NAMES * 3).dictionary_encode()]),
    "nested": pa.array([[1, 2], [3]] * N),
}


@pytest.mark.parametrize("name", ARROW)
def test_arrow_comes_back_equal_and_out_of_band(name: str) -> None:
    """Arrow tables, batches and arrays come back equal, from the payload."""
    value = ARROW[name]
    back, stream, payload = stored(value)
    assert back == value
    assert payload
    assert stream < 8192


def test_slice_of_a_table_does_not_store_the_table() -> None:
    """A few rows cut from a table store those rows only."""
    _, stream, payload = stored(TABLE.slice(100, 10))
    assert stream + payload < 4096


def test_columns_that_two_tables_share_are_stored_once() -> None:
    """A table and a selection of its columns lie in the payload once."""
    (one, other), _, payload = stored([TABLE, TABLE.select(["n"])])
    assert (one, other) == (TABLE, TABLE.select(["n"]))
    assert payload == stored(TABLE)[2]


FRAME = pl.DataFrame(
    {
        "n": np.arange(N),
        "s": [f"a name longer than twelve bytes, {name}" for name in NAMES],
        "d": pl.Series(DAYS),
        "c": pl.Series(NAMES, dtype=pl.Categorical),
        "e": pl.Series(["x", "y"] * (N // 2), dtype=pl.Enum(["x", "y"])),
        "l": [[1, 2]] * N,
        "b": [True, None] * (N // 2),
    }
)
POLARS: dict[str, tuple[Any, bool]] = {
    "frame": (FRAME, True),
    "slice": (FRAME.slice(3, 9000), True),
    "two chunks": (pl.concat([FRAME, FRAME], rechunk=False), True),
    "series": (FRAME["s"], True),
    "what Arrow has no type for": (FRAME.select(pl.col("n").cast(pl.Int128)), False),
    "objects": (pl.DataFrame({"o": pl.Series([object, int] * 3000, dtype=pl.Object)}), False),
}


@pytest.mark.parametrize("name", POLARS)
def test_polars_comes_back_equal(name: str) -> None:
    """Polars frames and series come back equal, with schema and name; mapped where Arrow can."""
    value, maps = POLARS[name]
    if name == "objects":
        with pytest.raises(Exception):  # noqa: B017 - as polars has it
            stored(value)
        return
    back, _, payload = stored(value)
    assert back.equals(value)
    assert (payload > 0) == maps
    if isinstance(value, pl.Series):
        assert (back.name, back.dtype) == (value.name, value.dtype)
    else:
        assert back.schema == value.schema


def test_polars_frame_can_be_written_after_loading() -> None:
    """A loaded polars frame can be changed, and what is loaded next does not show it."""
    encoded = codec.encode(FRAME)
    back = load(encoded)
    back[0, "n"] = -1
    back[0, "s"] = "changed"
    assert load(encoded).equals(FRAME)


def test_read_only_arrays_stay_read_only(tmp_path: Any) -> None:
    """An array that the function gave read-only, such as a mapped file, is so when it is loaded."""
    np.save(tmp_path / "a.npy", np.arange(N))
    back, stream, _ = stored(np.load(tmp_path / "a.npy", mmap_mode="r"))
    assert type(back) is np.memmap
    assert not back.flags.writeable
    assert stream < 1024
    np.save(tmp_path / "b.npy", np.arange(3))
    back, _, _ = stored(np.load(tmp_path / "b.npy", mmap_mode="r"))
    assert not back.flags.writeable


def test_a_small_masked_array_keeps_its_hard_mask() -> None:
    """A hard mask is kept whatever the size of the array."""
    back, _, _ = stored(np.ma.array([1, 2], mask=[0, 1], hard_mask=True))
    assert back.hardmask
    back[1] = 7
    assert back[1] is np.ma.masked


class Endless:
    """Loads another of its kind when it is loaded."""

    loads = 0

    def __reduce__(self) -> Any:
        return next_one, ()


def next_one() -> Any:
    Endless.loads += 1
    return codec.unpickled(pickle.dumps(Endless()))


def test_values_that_load_each_other_without_end_do_not_load() -> None:
    """It is noticed after a few: each level may try several tiers."""
    with pytest.raises(EntryError):
        next_one()
    assert Endless.loads < 20


def test_small_values_have_no_payload() -> None:
    """Below `PAYLOAD_FROM_BYTES` of buffers all of a value is in the stream."""
    frame = pd.DataFrame({"a": range(100), "b": ["x"] * 100})
    back, _, payload = stored(frame)
    assert payload == 0
    assert_frame_equal(back, frame)


def test_small_buffers_of_a_big_value_stay_in_the_stream() -> None:
    """A buffer that is not worth a place of its own is not in the payload's table."""
    encoded = codec.encode([np.arange(N), *(np.arange(10) + i for i in range(50))])
    assert encoded.payload is not None
    assert len(encoded.payload.table) == 1
    assert load(encoded)[50][9] == 58


def test_type_that_claims_to_be_numpys_is_pickled_as_what_it_is() -> None:
    """A reducer is for the type that its library has, not for one of the same name."""

    class ndarray:
        __module__ = "numpy"

        def __reduce__(self) -> Any:
            return str, ("mine",)

    ndarray.__qualname__ = "ndarray"
    assert stored(ndarray())[0] == "mine"


def test_streams_load_without_pyarrow_unless_it_was_needed(monkeypatch: Any) -> None:
    """If pyarrow is missing, object strings are pickled as usual."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    back, _, payload = stored(np.array(NAMES, dtype=object))
    assert payload == 0
    assert back.tolist() == NAMES


def test_what_does_not_load_is_unreadable() -> None:
    """A stream that does not load raises `EntryError`, whatever it is that fails."""
    stream = pickle.dumps(FileNotFoundError).replace(b"FileNotFoundError", b"FileNotFoundErrar")
    with pytest.raises(EntryError, match="AttributeError"):
        codec.decode(stream, None, ())


def test_is_whole_sees_every_byte() -> None:
    """One changed byte in any buffer shows; padding does not count."""
    views = tuple(memoryview(RNG.bytes(size)) for size in (3 << 20, 65, 10))
    payload = codec.payload(views)
    data = bytearray(codec.aligned_bytes(payload))
    assert codec.has_valid_digests(memoryview(data), payload.table)
    ends = [0, (3 << 20) - 1, (3 << 20) + 64, (3 << 20) + 128 + 9]
    for place in ends:
        data[place] ^= 1
        assert not codec.has_valid_digests(memoryview(data), payload.table)
        data[place] ^= 1
    assert not codec.has_valid_digests(
        memoryview(data), (*payload.table[:2], Buffer(10, bytes(32)))
    )


def test_slices_are_views_of_the_payload() -> None:
    """`slices` copies nothing and finds each buffer at its aligned place."""
    views = (memoryview(b"a" * 5), memoryview(b"b" * 70), memoryview(b"c"))
    payload = codec.payload(views)
    data = memoryview(bytearray(codec.aligned_bytes(payload)))
    assert len(data) == payload_size(payload.table) == payload.size
    cut = codec.buffers_of(data, payload.table)
    assert [bytes(piece) for piece in cut] == [bytes(view) for view in views]
    assert all(piece.obj is data.obj for piece in cut)
