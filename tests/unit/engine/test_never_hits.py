"""A function that never hits with arguments that look the same says so once."""

from __future__ import annotations

import uuid
import warnings
from typing import Any

import pytest

import memo


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

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):
            load(Session("a"), 1)
    with pytest.warns(UserWarning, match="`session`.*Session.*__memo_key__") as caught:
        load(Session("a"), 1)
    assert "never:load" in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(6):
            load(Session("a"), 1)


@pytest.mark.parametrize("make", [Point, lambda x: {"x": x}, lambda x: [x] * 3, str])
def test_arguments_that_look_different_warn_about_nothing(make: Any) -> None:
    """A loop over many different values is no fault."""

    @memo.cache(version="1", name="never:other")
    def load(value: Any) -> int:
        return 1

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for x in range(20):
            load(make(x))


def test_equal_values_computed_again_warn_about_nothing() -> None:
    """What is invalidated and computed again has one key."""

    @memo.cache(version="1", name="never:again")
    def load(value: Point) -> int:
        return 1

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(8):
            load(Point(1))
            load.invalidate()


def test_arrays_of_one_shape_warn_about_nothing() -> None:
    """Values that are known by their content are different if their keys are."""
    import numpy as np

    @memo.cache(version="1", name="never:arrays")
    def load(value: Any) -> int:
        return 1

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for x in range(8):
            load(np.full(100_000, x))
