"""`retry_after`: a failed computation is not tried again at once while an old value can answer."""

from __future__ import annotations

from typing import Any

import pytest
from time_ahead import Ahead

from memo import OptionError, cache

RUNS: dict[str, int] = {}


@pytest.fixture(autouse=True)
def fresh_counts() -> None:
    RUNS.clear()


def attempt() -> str:
    """The first run succeeds, the second and third fail, later ones succeed."""
    RUNS["n"] = RUNS.get("n", 0) + 1
    if RUNS["n"] in (2, 3):
        raise OSError("down")
    return f"run {RUNS['n']}"


def loads(**options: Any) -> Any:
    return cache(name="tests:load", version="1", ttl=None, **options)(lambda: attempt())


def test_without_it_each_call_tries() -> None:
    """Without `retry_after` every call computes, and falls back."""
    load = loads(stale_if_error=60)
    load()
    load.expire()
    assert (load(), load(), load()) == ("run 1", "run 1", "run 4")


def test_it_is_tried_again_after_the_pause(ahead: Ahead) -> None:
    """When the pause is over the function runs again, and what it gives is stored."""
    load = loads(stale_if_error=60, retry_after=30)
    load()
    load.expire()
    load()
    ahead.advance(31)
    assert load() == "run 1"  # run 3 fails
    ahead.advance(31)
    assert load() == load() == "run 4"


def test_an_invalidated_value_is_not_served() -> None:
    """The pause serves nothing that was invalidated: the function runs, and its error is raised."""
    load = loads(stale_if_error=60, retry_after=60)
    load()
    load.expire()
    load()
    load.invalidate()
    with pytest.raises(OSError, match="down"):
        load()


@pytest.mark.parametrize("value", [-1, "x", True])
def test_wrong_values(value: Any) -> None:
    """A wrong length is refused, and so is the option without an old value to serve."""
    with pytest.raises(OptionError, match="retry_after"):
        loads(stale_if_error=60, retry_after=value)
    with pytest.raises(OptionError, match="needs stale_if_error"):
        loads(retry_after=5)
