"""Named tuples of memo behave as those of `typing`."""

from __future__ import annotations

import pickle
import typing

import pytest

from memo.runtime.named_tuple import NamedTuple


class Ours(NamedTuple):
    """A point.

    Attributes:
        x: across.
    """

    x: int
    y: int = 2
    unit: str = "cm"

    @property
    def area(self) -> int:
        return self.x * self.y


class Theirs(typing.NamedTuple):
    """A point.

    Attributes:
        x: across.
    """

    x: int
    y: int = 2
    unit: str = "cm"

    @property
    def area(self) -> int:
        return self.x * self.y


@pytest.mark.parametrize("name", ["_fields", "_field_defaults", "__doc__", "__module__"])
def test_the_class_has_the_same_facts(name: str) -> None:
    """Fields, defaults, docstring and module."""
    assert getattr(Ours, name) == getattr(Theirs, name)


def test_values_behave_alike() -> None:
    """They print, compare, are pickled and are missing arguments alike."""
    ours, theirs = Ours(3), Theirs(3)
    assert ours == theirs == (3, 2, "cm")
    assert repr(ours).replace("Ours", "Theirs") == repr(theirs)
    assert ours.area == theirs.area == 6
    assert pickle.loads(pickle.dumps(ours)) == ours
    assert type(ours._replace(x=4)) is Ours
    with pytest.raises(TypeError, match="'x'"):
        Ours()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
