"""Values that take every call much time to be looked at are named, once."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

import memo


class Base(DeclarativeBase):
    """Of the models."""


class User(Base):
    """A model."""

    __tablename__ = "users"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


class Registry:
    """An object of a library, as pint's `UnitRegistry` is one: many objects that hold objects."""

    def __init__(self, size: int) -> None:
        self.units = {f"unit{n}": Unit(n) for n in range(size)}


class Unit:
    """A unit of a registry."""

    def __init__(self, number: int) -> None:
        self.number = number


units = Registry(5000)
some = Registry(400)
"""Takes a few tenths of a millisecond."""
few = Registry(3)


def warned(call: Any) -> list[str]:
    """The warnings of a call that computes and a dozen that hit."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(13):
            call(1)
    return [str(one.message) for one in caught]


def test_a_big_global_is_named_once_with_its_cost_and_the_way_out() -> None:
    """A hit that spends its time on looking at a global says which, how long, and what to do."""

    @memo.cache(ttl=600)
    def convert(x: int) -> int:
        return units.units["unit1"].number + x

    [said] = warned(convert)
    assert "reads the global units, and each call takes" in said
    assert " ms to see that it has not changed" in said
    assert 'ignore=["global:units"]' in said
    assert warned(convert) == []


def test_a_global_of_some_tenths_of_a_millisecond_is_named() -> None:
    """A cost between 0.1 and 1 ms is reported as well, with two digits."""

    @memo.cache(ttl=600)
    def convert(x: int) -> int:
        return some.units["unit1"].number + x

    [said] = warned(convert)
    assert "reads the global some, and each call takes" in said
    assert 'ignore=["global:some"]' in said


def test_the_cost_of_a_call_is_not_told_where_none_is_made() -> None:
    """A graph or a count compares code versions too, and does not warn about other functions."""

    @memo.cache(ttl=600)
    def convert(x: int) -> int:
        return units.units["unit1"].number + x

    convert(1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(13):
            convert.cache_info()
    assert [str(one.message) for one in caught] == []
    assert len(warned(convert)) == 1


def test_a_model_class_is_named_with_the_way_out_which_works() -> None:
    """For a class of SQLAlchemy the way out is `memo.stable`, after which nothing is said."""

    @memo.cache(ttl=600)
    def table(x: int) -> str:
        return f"{User.__tablename__} {x}"

    [said] = warned(table)
    assert "reads the class User, and each call takes" in said
    assert "memo.stable(User)" in said
    memo.stable(User)

    @memo.cache(ttl=600)
    def other(x: int) -> str:
        return f"{User.__tablename__} {x}"

    assert warned(other) == []


@pytest.mark.parametrize("value", [few, {"a": [1, 2, 3]}, "text"])
def test_small_values_are_looked_at_in_silence(value: Any) -> None:
    """Nothing is said of values that take no time."""

    @memo.cache(ttl=600)
    def load(x: int) -> str:
        return f"{value} {x}"

    assert warned(load) == []
