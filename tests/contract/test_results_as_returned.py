"""A hit gives what the function returned: same type, same class; else the result is not stored."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import memo


class Handle:
    """Pickles as something else."""

    def __reduce__(self) -> Any:
        return list, ()


def plain() -> dict[str, int]:
    return {"a": 1}


class Made:
    """Is made by a function, which makes something else."""

    def __reduce__(self) -> Any:
        return plain, ()


class Broken:
    """Pickles, and does not load."""

    def __reduce__(self) -> Any:
        return int, ("no number",)


def text_file(tmp_path: Path) -> Any:
    path = tmp_path / "data.txt"
    path.write_text("some text")
    return open(path)  # the function's result


class Negated:
    """Changes its numbers in place when it is loaded."""

    def __init__(self, numbers: Any) -> None:
        self.numbers = numbers

    def __getstate__(self) -> Any:
        return -self.numbers

    def __setstate__(self, numbers: Any) -> None:
        numbers *= -1
        self.numbers = numbers


CHANGED = {
    "open file": text_file,
    "open file in a list": lambda tmp_path: [text_file(tmp_path)],
    "open file in a mapping": lambda tmp_path: {"a": {"b": text_file(tmp_path)}},
    "memoryview": lambda tmp_path: memoryview(b"abc"),
    "memoryview in a list": lambda tmp_path: [memoryview(b"abc")],
    "another type": lambda tmp_path: Handle(),
    "another type in a list": lambda tmp_path: [Handle()],
    "another type in an object": lambda tmp_path: types.SimpleNamespace(of={"a": Handle()}),
    "another type by a function": lambda tmp_path: (1, Made()),
    "does not load": lambda tmp_path: Broken(),
    "does not load, in a mapping": lambda tmp_path: {"a": Broken()},
}


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("make", CHANGED.values(), ids=CHANGED)
def test_what_would_come_back_as_another_type_is_not_stored(make: Any, tmp_path: Path) -> None:
    """One warning says so; every call computes and gets what the function returned."""
    kept: list[Any] = []

    @memo.cache(version="1", name=f"changed {id(make)}")
    def load() -> Any:
        kept.append(make(tmp_path))
        return kept[-1]

    with pytest.warns(UserWarning, match="computed at each call") as caught:
        first = load()
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = load()
    assert first is kept[0]
    assert second is kept[1]
    assert not load.is_cached()


def test_the_warning_names_the_type_that_would_be_another() -> None:
    """It says which type it is, and whether it is the result or something in it."""

    @memo.cache(version="1", name="holder")
    def holder() -> Any:
        return [Handle()]

    @memo.cache(version="1", name="itself")
    def itself() -> Any:
        return Handle()

    with pytest.warns(UserWarning, match="a list that holds a Handle that would load as .*list"):
        holder()
    with pytest.warns(UserWarning, match="a Handle that would load as .*list"):
        itself()


def test_a_dtype_of_another_c_type_is_the_same_dtype() -> None:
    """A `longlong` loads as `int64`, which is equal; tree models of scikit-learn contain it."""

    @memo.cache(version="1", name="longlong")
    def longlong() -> Any:
        return [np.dtype(np.longlong)]

    longlong()
    assert longlong.is_cached()
    assert longlong() == [np.dtype(np.longlong)]


@pytest.mark.filterwarnings("ignore::ResourceWarning")
async def test_the_same_for_async_functions(tmp_path: Path) -> None:
    """`async def` and `def` keep the same results."""

    @memo.cache(version="1", name="async file")
    async def load() -> Any:
        return text_file(tmp_path)

    with pytest.warns(UserWarning, match="computed at each call"):
        first = await load()
    assert (await load()) is not first


# --- awaitables -----------------------------------------------------------------------------------


class Reference:
    """May be awaited any number of times, as the references of Ray and Dask's collections."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __await__(self) -> Any:
        yield from asyncio.sleep(0).__await__()
        return self.value


def test_an_object_that_can_be_awaited_is_cached() -> None:
    """Having `__await__` alone is no reason not to store a result."""
    runs: list[int] = []

    @memo.cache(version="1", name="reference")
    def load(x: int) -> Reference:
        runs.append(x)
        return Reference(x)

    assert load(1).value == 1
    assert load(1).value == 1
    assert runs == [1]


def test_a_dask_collection_is_cached() -> None:
    """A `def` may return a Dask collection."""
    import dask.bag

    runs: list[int] = []

    @memo.cache(version="1", name="bag")
    def load(x: int) -> Any:
        runs.append(x)
        return dask.bag.from_sequence(range(x))

    assert load(3).compute(scheduler="sync") == [0, 1, 2]
    assert load(3).compute(scheduler="sync") == [0, 1, 2]
    assert runs == [3]


def test_a_coroutine_is_not_cached() -> None:
    """A result that can be awaited only once is not stored, with one warning."""

    async def inner() -> int:
        return 1

    @memo.cache(version="1", name="coroutine")
    def load() -> Any:
        return inner()

    with pytest.warns(UserWarning, match="async def"):
        assert asyncio.run(load()) == 1
    assert asyncio.run(load()) == 1


# --- classes of a notebook or script --------------------------------------------------------------

SCRIPT = """
    import dataclasses, enum, sys
    import memo
    memo.configure(directory=sys.argv[1])

    @dataclasses.dataclass
    class Result:
        value: int
        def twice(self):
            return {twice}

    class Colour(enum.Enum):
        RED = 1

    @memo.cache(version="1", name="nb:load")
    def load(x):
        print("computed")
        class Local:
            pass
        return [Result(x), Colour.RED, Local()]

    result, colour, local = load(2)
    known = isinstance(result, Result), colour is Colour.RED
    print(*known, result.twice(), type(local).__qualname__)
"""


def run(folder: Path, **given: str) -> list[str]:
    script = folder / "nb.py"
    script.write_text(textwrap.dedent(SCRIPT).format(**given))
    done = subprocess.run(
        [sys.executable, str(script), str(folder / "cache")],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split("\n")[:-1]


def test_an_instance_is_of_the_class_that_the_program_has_now(tmp_path: Path) -> None:
    """After a restart a hit is `isinstance` of the class in `__main__`, if its code is the same.

    A class that only a call makes has its full name, which is part of keys.
    """
    local = "load.<locals>.Local"
    assert run(tmp_path, twice="2 * self.value") == ["computed", f"True True 4 {local}"]
    assert run(tmp_path, twice="2 * self.value") == [f"True True 4 {local}"]
    assert run(tmp_path, twice="'other'") == ["computed", f"True True other {local}"]


def test_a_type_that_writes_to_its_buffers_when_loaded_is_stored() -> None:
    """The check of its first result leaves the result as it is; each hit has the same numbers."""
    ran: list[int] = []

    @memo.cache(ttl=None, version="1", name="returned:negated")
    def negated() -> Negated:
        ran.append(1)
        return Negated(np.arange(100_000))

    for _ in range(3):
        assert (negated().numbers == np.arange(100_000)).all()
    assert ran == [1]
