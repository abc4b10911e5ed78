"""A function that never hits with arguments that look the same says so once."""

from __future__ import annotations

import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from providers import InADict

import memo


@contextmanager
def nothing_said() -> Iterator[None]:
    """Fails where anything warns: a warning that is an error would be a fault of the cache."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    assert [str(warning.message) for warning in caught] == []


class Session:
    """Keeps a random number, so each one has a key of its own."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._token = uuid.uuid4().hex


class Point:
    """Says what it is."""

    def __init__(self, x: int) -> None:
        self.x = x

    def __repr__(self) -> str:
        return f"Point({self.x})"


def test_a_function_that_never_hits_warns_once() -> None:
    """The warning names the function, the argument and the ways to decide."""

    @memo.cache(version="1", name="never:load")
    def load(session: Session, x: int) -> int:
        return x

    with nothing_said():
        for _ in range(4):
            load(Session("a"), 1)
    with pytest.warns(UserWarning, match="`session`.*Session with _token.*__memo_key__") as caught:
        load(Session("a"), 1)
    assert "never:load" in str(caught[0].message)
    with nothing_said():
        for _ in range(6):
            load(Session("a"), 1)


class Silent:
    """Says nothing of itself, and so looks like any other by its `repr`."""

    def __init__(self, x: int) -> None:
        self.x = x


class Shortened:
    """Says but a part of what it is."""

    __slots__ = ("x",)

    def __init__(self, x: int) -> None:
        self.x = x

    def __repr__(self) -> str:
        return "Shortened(...)"


class Around:
    """Has another object inside."""

    def __init__(self, x: int) -> None:
        self.inner = Silent(x)


class Hiding(Point):
    """Has a public attribute that its `repr` leaves out."""

    def __init__(self, x: int) -> None:
        super().__init__(1)
        self.y = x


@pytest.mark.parametrize("make", [Silent, Shortened, Around, Hiding])
def test_objects_that_differ_warn_about_nothing(make: Any) -> None:
    """State that a `repr` leaves out counts: a loop over such objects is no fault."""

    @memo.cache(version="1", name="never:silent")
    def load(value: Any) -> int:
        return 1

    with nothing_said():
        for x in range(20):
            load(make(x))


def test_an_object_inside_an_object_is_looked_into() -> None:
    """The private part that differs may lie deeper."""

    class Client:
        def __init__(self) -> None:
            self.session = Session("a")

    @memo.cache(version="1", name="never:inside")
    def load(client: Client) -> int:
        return 1

    for _ in range(4):
        load(Client())
    with pytest.warns(UserWarning, match="`client`"):
        load(Client())


@pytest.mark.parametrize("make", [Point, lambda x: {"x": x}, lambda x: [x] * 3, str])
def test_arguments_that_look_different_warn_about_nothing(make: Any) -> None:
    """A loop over many different values is no fault."""

    @memo.cache(version="1", name="never:other")
    def load(value: Any) -> int:
        return 1

    with nothing_said():
        for x in range(20):
            load(make(x))


def test_equal_values_computed_again_warn_about_nothing() -> None:
    """A call that is invalidated and computed again has one key."""

    @memo.cache(version="1", name="never:again")
    def load(value: Point) -> int:
        return 1

    with nothing_said():
        for _ in range(8):
            load(Point(1))
            load.invalidate()


def test_arrays_of_one_shape_warn_about_nothing() -> None:
    """Values that are known by their content are different if their keys are."""
    import numpy as np

    @memo.cache(version="1", name="never:arrays")
    def load(value: Any) -> int:
        return 1

    with nothing_said():
        for x in range(8):
            load(np.full(100_000, x))


def counting() -> Any:
    """A function that counts its calls in a variable that it captured."""
    count = 0

    def step(x: int) -> int:
        nonlocal count
        count += 1
        return x + 1

    return step


def test_a_function_that_changes_what_it_captured_warns() -> None:
    """As a default argument it has another key after each computation: said once, by name."""

    @memo.cache(version="1", name="never:steps")
    def load(x: int, step: Any = counting()) -> int:  # noqa: B008 - what is tested
        return int(step(x))

    with nothing_said():
        for _ in range(4):
            load(1)
    with pytest.warns(UserWarning, match="`step`.*changes its count.*ignore") as caught:
        load(1)
    assert "never:steps" in str(caught[0].message)


def test_functions_that_captured_other_values_do_not_warn() -> None:
    """A value that a function captured and only reads counts like an argument."""

    @memo.cache(version="1", name="never:above")
    def above(keep: Any) -> list[int]:
        return list(filter(keep, range(9)))

    def more_than(limit: int) -> Any:
        return lambda x: x > limit

    with nothing_said():
        for limit in range(7):
            assert len(above(more_than(limit))) == 8 - limit


def test_a_result_that_its_provider_cannot_judge_warns_once() -> None:
    """The provider of the outer function has no record of the invalidations of the inner one."""
    store = InADict()
    runs = []

    @memo.cache(version="1", name="never:inner")
    def inner(x: int) -> int:
        return x

    @memo.cache(version="1", name="never:outer", provider=store)
    def outer(x: int) -> int:
        runs.append(x)
        return inner(x)

    with pytest.warns(UserWarning, match="^never:outer never hits: it is built on never:inner, "):
        outer(1)
    with nothing_said():
        outer(1)
    assert runs == [1, 1]


@pytest.mark.parametrize("outside", [True, False], ids=["same provider", "provider inside"])
def test_results_that_hit_warn_about_nothing(outside: bool) -> None:
    """Functions of one provider may use each other, and this host judges what a provider keeps."""
    store = InADict()
    runs = []

    @memo.cache(version="1", name="never:stored", provider=store)
    def stored(x: int) -> int:
        return x

    @memo.cache(version="1", name="never:using", provider=store if outside else None)
    def using(x: int) -> int:
        runs.append(x)
        return stored(x)

    with nothing_said():
        stored(1)
        using(1)
        using(1)
    assert runs == [1]
