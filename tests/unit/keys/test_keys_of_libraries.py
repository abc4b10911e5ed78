"""Values of libraries: equal ones have one key, mere use changes none, and handles are refused."""

from __future__ import annotations

import copy
import io
import re
import shelve
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import dask
import dask.array
import dask.bag
import dask.dataframe
import diskcache
import fsspec
import jsonschema
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset
import pytest
import sqlalchemy as sa
import xarray as xr
import zarr
import zict

import memo
from memo.errors import KeyingError

zarr.zeros((1,), store=zarr.storage.MemoryStore())[:]
"""zarr starts the thread of its event loop when it first works, and keeps it: before any test."""


@memo.cache(version="1", name="libraries:load")
def load(x: Any) -> int:
    """A function of anything."""
    return 1


# --- equal values, one key ---


def dataset(**changes: Any) -> xr.Dataset:
    given: dict[str, Any] = {"values": [1.0, 2.0], "places": [10, 20], "attrs": {}, **changes}
    return xr.Dataset(
        {"a": ("t", np.array(given["values"]))},
        coords={"t": given["places"]},
        attrs=given["attrs"],
    )


def tree(**changes: Any) -> xr.DataTree:
    return xr.DataTree.from_dict({"/": xr.Dataset(), "/part": dataset(**changes)}, name="tree")


def table(width: int = 10) -> sa.Table:
    return sa.Table(
        "users",
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("name", sa.String(width)),
    )


def select(name: str = "ann", width: int = 10) -> Any:
    users = table(width)
    return sa.select(users.c.id).where(users.c.name == name).limit(5)


USES = {
    "xarray repr": (dataset, repr),
    "xarray attrs": (dataset, lambda value: value.attrs),
    "xarray html": (dataset, lambda value: value._repr_html_()),
    "xarray copied": (dataset, lambda value: value.copy(deep=True)),
    "xarray array": (lambda: dataset()["a"], lambda value: (repr(value), value.attrs, value.sum())),
    "xarray variable": (lambda: dataset()["a"].variable, lambda value: value.attrs),
    "xarray tree": (tree, lambda value: (repr(value), value["part"].attrs)),
    "xarray tree html": (tree, lambda value: value._repr_html_()),
    "jsonschema": (lambda: jsonschema.Draft7Validator({"type": "object"}), copy.deepcopy),
    "sqlalchemy": (select, str),
    "sqlalchemy compiled": (select, lambda value: value.compile()),
    "sqlalchemy table": (table, repr),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_mere_use_changes_no_key(use: tuple[Any, Any]) -> None:
    """To display, copy or compile a value changes nothing, and an equal one has its key."""
    make, touch = use
    value = make()
    before = load.key(value)
    used = touch(value)
    assert load.key(value) == before
    assert load.key(make()) == before
    if type(used) is type(value):
        assert load.key(used) == before


OTHERS = {
    "xarray values": (dataset(), dataset(values=[1.0, 3.0])),
    "xarray coordinates": (dataset(), dataset(places=[10, 30])),
    "xarray attributes": (dataset(), dataset(attrs={"unit": "m"})),
    "xarray tree": (tree(), tree(values=[1.0, 3.0])),
    "xarray names": (dataset(), dataset().rename(a="b")),
    "xarray dimensions": (dataset(), dataset().rename(t="u")),
    "xarray array name": (dataset()["a"], dataset()["a"].rename("b")),
    "jsonschema": (jsonschema.Draft7Validator({}), jsonschema.Draft7Validator({"a": 1})),
    "sqlalchemy value": (select(), select("bob")),
    "sqlalchemy limit": (select(), select().limit(6)),
    "sqlalchemy type": (sa.select(table()), sa.select(table(20))),
    "sqlalchemy lock": (select(), select().with_for_update(skip_locked=True)),
    "sqlalchemy hint": (select(), select().with_hint(table(), "x", "oracle")),
    "sqlalchemy table": (table(), table(20)),
    "generator": (np.random.RandomState(1), np.random.RandomState(2)),
    "bytes": (io.BytesIO(b"a"), io.BytesIO(b"b")),
    "text": (io.StringIO("a"), io.StringIO("b")),
    "bytes, text": (io.BytesIO(b"a"), io.StringIO("a")),
}


@pytest.mark.parametrize("pair", OTHERS.values(), ids=OTHERS)
def test_another_value_has_another_key(pair: tuple[Any, Any]) -> None:
    """Nothing that a computation may read is left out."""
    assert load.key(pair[0]) != load.key(pair[1])


INDEXES = {
    "range": lambda step: pd.DataFrame({"a": [1, 2]}, pd.RangeIndex(0, 2 * step, step)).to_xarray(),
    "several levels": lambda step: xr.Dataset(
        coords=xr.Coordinates.from_pandas_multiindex(
            pd.MultiIndex.from_tuples([("a", step)], names=["p", "q"]), "x"
        )
    ),
    "computed": lambda step: xr.Dataset(
        coords=xr.Coordinates.from_xindex(xr.indexes.RangeIndex.arange(0, 2 * step, step, dim="x"))
    ),
}


@pytest.mark.parametrize("make", INDEXES.values(), ids=INDEXES)
def test_any_index_of_xarray_has_a_key(make: Any) -> None:
    """Coordinates that xarray computes from an index when they are read count by their values."""
    assert load.key(make(1)) == load.key(make(1)) != load.key(make(2))


def test_a_buffer_is_its_content_and_its_place() -> None:
    """A `BytesIO` that was read up to some place gives another answer than a fresh one."""
    fresh, read = io.BytesIO(b"abc"), io.BytesIO(b"abc")
    assert load.key(fresh) == load.key(read)
    read.read(1)
    assert load.key(fresh) != load.key(read)
    read.close()
    with pytest.raises(KeyingError, match="closed"):
        load.key(read)


def test_an_opened_dataset_has_one_key_once_it_is_loaded(tmp_path: Path) -> None:
    """`load()` makes it a value; opened again, it has the same key."""
    path = tmp_path / "d.nc"
    dataset().to_netcdf(path, engine="scipy")
    keys = set()
    for _ in range(3):
        with xr.open_dataset(path, engine="scipy") as opened:
            keys.add(load.key(opened.load()))
    assert len(keys) == 1


# --- the same key in every process ---

VALUES = {
    "vectorizer": """
        from sklearn.feature_extraction.text import TfidfVectorizer
        value = TfidfVectorizer(stop_words=["and"]).fit(["one and two", "two and three"])
    """,
    "frozen distribution": """
        import scipy.stats
        value = scipy.stats.norm(loc=1)
        use = lambda: value.rvs(2)
    """,
    "spacy pipeline": """
        import spacy
        value = spacy.blank("en")
        value.add_pipe("sentencizer")
        value.add_pipe("entity_ruler").add_patterns([{"label": "A", "pattern": "one"}])
        use = lambda: value("one new word")
    """,
    "spacy document": """
        import spacy
        value = spacy.blank("en")("one or two words")
        use = lambda: [token.text for token in value]
    """,
    "spacy span and token": """
        import spacy
        document = spacy.blank("en")("one or two words")
        value = [document[1:3], document[1]]
    """,
    "vectorize": """
        import numba
        @numba.vectorize
        def value(x):
            return x + 1
        use = lambda: value(1.0)
    """,
    "vectorize types": """
        import numba
        @numba.vectorize(["float64(float64)"])
        def value(x):
            return x + 1
        use = lambda: value(1.0)
    """,
    "guvectorize": """
        import numba, numpy
        @numba.guvectorize(["(float64[:], float64[:])"], "(n)->(n)")
        def value(x, result):
            for i in range(len(x)):
                result[i] = x[i]
        use = lambda: value(numpy.arange(3.0))
    """,
    "astropy time": """
        from astropy.time import Time
        value = Time(["2020-01-01", "2021-01-01"])
        use = lambda: (value.utc, value.jd, value.tai, repr(value))
    """,
    "astropy time difference": """
        import astropy.units as u
        from astropy.time import TimeDelta
        value = TimeDelta(3 * u.s)
        use = lambda: (value.sec, repr(value))
    """,
    "astropy coordinates": """
        import astropy.units as u
        from astropy.coordinates import SkyCoord
        value = SkyCoord([10.0, 20.0] * u.deg, [1.0, 2.0] * u.deg)
        use = lambda: (value.galactic, value.to_string())
    """,
    "FITS header": """
        from astropy.io.fits import Header
        value = Header([("A", 1, "one"), ("B", "two")])
        use = lambda: (str(value), value["A"])
    """,
    "njit": """
        import numba
        @numba.njit
        def value(x):
            return x + 1
    """,
    "njit options": """
        import numba
        @numba.njit(fastmath=True)
        def value(x):
            return x + 1
    """,
    "astropy table": """
        from astropy.table import Table
        import astropy.units as u
        value = Table({"a": [1, 2], "b": [1.0, 2.0] * u.m}, meta={"k": 1})
    """,
    "astropy quantity": "import astropy.units as u; value = [1.0, 2.0] * u.m",
    "dask array": "import dask.array, numpy; value = dask.array.from_array(numpy.arange(6)) + 1",
    "dask bag": "import dask.bag; value = dask.bag.from_sequence([1, 2, 3]).map(abs)",
    "select": """
        import sqlalchemy as sa
        users = sa.Table("users", sa.MetaData(), sa.Column("id", sa.Integer))
        value = sa.select(users).where(users.c.id.in_([1, 2]))
    """,
    "xarray": "import xarray; value = xarray.Dataset({'a': ('t', [1, 2])})",
    "pydantic": """
        import pydantic
        class Model(pydantic.BaseModel):
            n: int = 1
            _private: int = pydantic.PrivateAttr(default=2)
        value = Model(n=2)
    """,
    "type adapter": """
        import pydantic
        class Item(pydantic.BaseModel):
            n: int = 1
        value = pydantic.TypeAdapter(list[Item])
    """,
    "msgspec": """
        import msgspec
        class Model(msgspec.Struct):
            n: int = 1
        value = Model(2)
    """,
}
RUN_EACH = "import runpy, sys; [runpy.run_path(one, run_name='__main__') for one in sys.argv[2:]]"
KEYS = """
import sys, warnings
warnings.simplefilter("ignore")
import copy, memo
import cloudpickle
memo.configure(directory=sys.argv[1])
use = lambda: None

@memo.cache(version="1", name="{script}:argument")
def load(x):
    return 1
{value}
@memo.cache(name="{script}:global")
def read(x):
    return value, x

before = load.key(value), read.key(1)
use()
print(*before, before == (load.key(value), read.key(1)))
if type(value).__module__.partition(".")[0] in ("astropy", "numba", "scipy", "spacy"):
    sent = cloudpickle.loads(cloudpickle.dumps(value))
    assert load.key(copy.deepcopy(value)) == load.key(sent) == before[0]
"""


LIBRARIES: dict[str, list[str]] = {}
"""First library that its text imports -> values."""
for name, text in VALUES.items():
    LIBRARIES.setdefault(re.findall(r"\w+", text)[1], []).append(name)


@pytest.mark.parametrize("names", LIBRARIES.values(), ids=LIBRARIES)
def test_a_value_has_one_key_in_every_process(names: list[str], tmp_path: Path) -> None:
    """As an argument and as a global that the code reads, used, copied and sent or not."""
    scripts = [tmp_path / f"{name.replace(' ', '_')}.py" for name in names]
    for name, script in zip(names, scripts, strict=True):
        text = KEYS.replace("{value}", textwrap.dedent(VALUES[name]))
        script.write_text(text.replace("{script}", script.stem))
    seen = set()
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", RUN_EACH, str(tmp_path / "cache"), *map(str, scripts)],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path), "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-1500:]
        seen.add(done.stdout)
    (keys,) = seen
    unchanged = dict(
        zip(names, [line.endswith(" True") for line in keys.splitlines()], strict=True)
    )
    assert unchanged == dict.fromkeys(names, True)


IN_MEMORY = {
    "frame": lambda: dask.dataframe.from_pandas(pd.DataFrame({"a": [1, 2, 3]}), npartitions=2),
    "frame of arrays": lambda: dask.dataframe.from_array(np.arange(6).reshape(3, 2)),
    "frame of a mapping": lambda: dask.dataframe.from_dict({"a": [1, 2]}, npartitions=1),
    "frame of an array": lambda: dask.dataframe.from_dask_array(dask.array.ones(3)),
    "random array": lambda: dask.array.random.default_rng(1).random(3),
    "grouped": lambda: IN_MEMORY["frame"]().groupby("a").sum(),
    "bag": lambda: dask.bag.from_sequence(["a", "b"]).map(str.upper),
    "delayed": lambda: dask.delayed(sum, pure=True)([1, 2]),
}


@pytest.mark.parametrize("make", IN_MEMORY.values(), ids=IN_MEMORY)
def test_a_dask_collection_of_values_has_a_key(make: Any) -> None:
    """A Dask collection made of values in memory has the key of an equal one."""
    assert load.key(make()) == load.key(make())


# --- handles to data that lies elsewhere ---


def zarr_array(folder: Path) -> Any:
    made = zarr.open_array(str(folder / "z"), mode="w", shape=(3,), dtype="i8")
    made[:] = 1
    return made


def arrow_dataset(folder: Path) -> Any:
    path = folder / "d.parquet"
    pd.DataFrame({"a": [1]}).to_parquet(path)
    return pa.dataset.dataset(str(path))


def lazy(folder: Path, **given: Any) -> Any:
    dataset().to_netcdf(folder / "d.nc", engine="scipy")
    return xr.open_dataset(folder / "d.nc", engine="scipy", **given)


def ibis_table(folder: Path) -> Any:
    import ibis

    database = ibis.duckdb.connect()
    database.con.execute("create table t (a int)")
    return database.table("t")


def duckdb_relation(folder: Path) -> Any:
    import duckdb

    return duckdb.connect().sql("select 1 as a")


def opened(folder: Path) -> Any:
    (folder / "f.txt").write_text("a")
    return fsspec.open(str(folder / "f.txt"))


def table_file(folder: Path, kind: str) -> Path:
    path = folder / f"table.{kind}"
    getattr(pd.DataFrame({"a": [1, 2]}), f"to_{kind}")(path)
    return path


HANDLES = {
    "zarr array": zarr_array,
    "zarr group": lambda folder: zarr.open_group(str(folder / "g"), mode="w"),
    "arrow dataset": arrow_dataset,
    "arrow file system": lambda folder: pa.fs.LocalFileSystem(),
    "lazy xarray": lazy,
    "lazy xarray array": lambda folder: lazy(folder)["a"],
    "chunked xarray": lambda folder: lazy(folder, chunks={}),
    "ibis": ibis_table,
    "ibis column": lambda folder: ibis_table(folder).a,
    "duckdb": duckdb_relation,
    "fsspec file system": lambda folder: fsspec.filesystem("file"),
    "fsspec mapper": lambda folder: fsspec.get_mapper(str(folder)),
    "fsspec file": opened,
    "sqlalchemy engine": lambda folder: sa.create_engine("sqlite://"),
    "shelf": lambda folder: shelve.DbfilenameShelf(str(folder / "shelf")),
    "diskcache": lambda folder: diskcache.Cache(str(folder)),
    "diskcache index": lambda folder: diskcache.Index(str(folder)),
    "zict": lambda folder: zict.File(str(folder)),
    "dask of zarr": lambda folder: dask.array.from_zarr(zarr_array(folder)),
    "dask of CSV": lambda folder: dask.dataframe.read_csv(table_file(folder, "csv")),
    "column of dask of CSV": lambda folder: (
        dask.dataframe.read_csv(table_file(folder, "csv")).a + 1
    ),
    "dask of Parquet": lambda folder: dask.dataframe.read_parquet(table_file(folder, "parquet")),
    "dask of text": lambda folder: dask.bag.read_text(str(table_file(folder, "csv"))),
    "dask that reads": lambda folder: dask.delayed(pd.read_csv)(str(table_file(folder, "csv"))),
    "dask of a path": lambda folder: dask.delayed(len)(folder / "f"),
    "dask of a mapped array": lambda folder: dask.array.from_array(
        np.memmap(folder / "m", dtype="i4", mode="w+", shape=(3,))
    ),
}


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore:fetch_arrow_table")
@pytest.mark.parametrize("make", HANDLES.values(), ids=HANDLES)
def test_a_handle_is_refused_as_an_argument(make: Any, tmp_path: Path) -> None:
    """Its data changes behind its back; the error says what to pass instead."""
    value = make(tmp_path)
    with pytest.raises(KeyingError, match=r"its path .*depends_on"):
        load.key(value)
    with pytest.raises(KeyingError):
        load.key([{"a": value}])


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore:fetch_arrow_table")
@pytest.mark.parametrize("make", HANDLES.values(), ids=HANDLES)
def test_a_handle_that_the_code_reads_is_listed(make: Any, tmp_path: Path) -> None:
    """As a global or captured variable it is left out, and `explain` says so."""
    value = make(tmp_path)

    @memo.cache(name="libraries:handle")
    def read() -> str:
        return repr(value)

    assert any("value" in line for line in read.explain().untracked)
