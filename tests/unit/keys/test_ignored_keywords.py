"""`ignore=["options"]` leaves out all that `**options` takes."""

from __future__ import annotations

from typing import Any

import pytest

import memo
from memo.errors import OptionError


def test_all_extra_keywords_are_ignored_by_the_name_of_their_parameter() -> None:
    """Calls that differ in them share one entry."""

    @memo.cache(version="1", name="ignored", ignore=["options"])
    def load(x: int, **options: Any) -> int:
        return x

    load(1, verbose=True)
    assert load.is_cached(1)
    assert load.is_cached(1, verbose=False, lock=object())
    assert load.key(1, a=1) == load.key(1)
    assert load.key(1) != load.key(2)
    load.invalidate(1)
    assert not load.is_cached(1, verbose=True)


def test_an_extra_keyword_is_ignored_by_its_own_name() -> None:
    """The others count."""

    @memo.cache(version="1", name="ignored", ignore=["verbose"])
    def load(x: int, **options: Any) -> int:
        return x

    assert load.key(1, verbose=True) == load.key(1)
    assert load.key(1, depth=1) != load.key(1)


def test_an_ignored_keyword_selects_nothing() -> None:
    """To invalidate by one is an error that says why."""

    @memo.cache(version="1", name="ignored", ignore=["options"])
    def load(x: int, **options: Any) -> int:
        return x

    with pytest.raises(OptionError, match="not part of the key"):
        load.invalidate(verbose=True)


def test_all_extra_positional_arguments_are_ignored_by_name() -> None:
    """The same for `*args`."""

    @memo.cache(version="1", name="ignored", ignore=["rest"])
    def load(x: int, *rest: Any) -> int:
        return x

    assert load.key(1, 2, 3) == load.key(1)
