"""Weights: keys of big arguments are made off the event loop, and small calls do not notice."""

from __future__ import annotations

import threading
import timeit
from dataclasses import dataclass, field
from datetime import date
from typing import Any

import numpy as np
import pandas as pd
import pytest
from inside import inside

from memo import cache
from memo.keys.fingerprint.function_version import Identity
from memo.keys.offloading import HeavyError, is_heavy
from memo.settings.configuration import configure
from memo.testing import recording

MIB = 1 << 20


@dataclass
class Job:
    name: str = "job"
    data: Any = None
    steps: list[Any] = field(default_factory=list)


class Slotted:
    __slots__ = ("data", "missing")

    def __init__(self, data: Any) -> None:
        self.data = data


class Trap:
    """Asking for its attributes by name runs its code."""

    def __init__(self, data: Any) -> None:
        self.__dict__["data"] = data

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(name)

    @property
    def nbytes(self) -> int:
        raise AssertionError


def _circle() -> list[Any]:
    circle: list[Any] = [1]
    circle.append(circle)
    return circle


LIGHT = [
    *((), (1,), (None, 2.0, True), ("text", b"bytes"), ([1, 2, 3],), ({"a": {"b": [1]}},)),
    *((date(2026, 1, 1),), (np.zeros(1000),), (pd.DataFrame({"a": range(100)}),), (Job(),)),
    *((Slotted(1),), (Trap("x"),), (print,), (Job,), (list(range(1000)),), (set("abc"),)),
    (["text" * 10] * 100, np.arange(10), "x" * 1000),
]
HEAVY = [
    *(("x" * 3 * MIB,), (bytes(3 * MIB),), (bytearray(3 * MIB),), (memoryview(bytes(3 * MIB)),)),
    *((np.zeros(MIB),), (np.zeros((1000, 1000))[::2],), ([1, [2, np.zeros(MIB)]],)),
    *((list(range(100_000)),), (set(range(100_000)),), (dict.fromkeys(range(100_000)),)),
    *((pd.DataFrame({"a": range(1_000_000)}),), (pd.Series(["x"] * 1_000_000),)),
    *((pd.Index(range(1_000_000)),), ({"a": {"b": (np.zeros(MIB),)}},), (["x" * 50_000] * 100,)),
    *((Job(data=np.zeros(MIB)),), (Slotted(np.zeros(MIB)),), (Trap(bytes(3 * MIB)),)),
    *(([[n] for n in range(1000)],), (_circle(),), (np.array(["x"] * 200_000, dtype=object),)),
    (1, 2, "x", np.zeros(MIB)),
]


@pytest.mark.parametrize("number", range(len(LIGHT)))
def test_small_arguments_are_light(number: int) -> None:
    """Arguments whose key is made in less time than a thread is woken stay where they are."""
    assert not is_heavy(LIGHT[number], {})
    assert not is_heavy((), {str(at): value for at, value in enumerate(LIGHT[number])})


@pytest.mark.parametrize("number", range(len(HEAVY)))
def test_big_arguments_are_heavy(number: int) -> None:
    """A value of any type and depth that takes milliseconds to hash is heavy."""
    assert is_heavy(HEAVY[number], {})
    assert is_heavy((1,), {str(at): value for at, value in enumerate(HEAVY[number])})


class Told:
    """Says in which thread its key was made."""

    threads: list[threading.Thread] = []  # noqa: RUF012

    def __memo_key__(self) -> str:
        self.threads.append(threading.current_thread())
        return "told"


@pytest.mark.parametrize("verb", ["call", "peek", "is_cached", "refresh", "explain"])
async def test_keys_of_big_arguments_are_made_in_a_thread(verb: str) -> None:
    """On a loop only the keys of heavy arguments are made elsewhere, and they are the same keys."""

    @cache(name="weights:load", version="1", ttl=None)
    async def load(told: Told, data: Any) -> int:
        return len(data)

    calls = {"call": load, "peek": load.apeek, "is_cached": load.ais_cached}
    call = {**calls, "refresh": load.arefresh, "explain": load.aexplain}[verb]
    for data, here in ((b"small", True), (bytes(3 * MIB), False)):
        Told.threads.clear()
        await call(Told(), data)
        assert (Told.threads[0] is threading.current_thread()) == here
        if verb == "call":
            assert load.is_cached(Told(), data), "a sync look makes another key"


def test_without_a_loop_keys_are_made_in_place() -> None:
    """A sync function makes its keys in the caller's thread, whatever they are made of."""

    @cache(name="weights:sync", version="1", ttl=None)
    def load(told: Told, data: Any) -> int:
        return len(data)

    Told.threads.clear()
    load(Told(), bytes(3 * MIB))
    assert set(Told.threads) == {threading.current_thread()}


class Service:
    def __init__(self) -> None:
        self.data = np.zeros(MIB)

    @cache(name="weights:method", version="1", ttl=None)
    async def load(self, told: Told) -> int:
        return 1


async def test_what_a_method_is_bound_to_weighs_nothing() -> None:
    """`self` is no part of a key, so what it holds does not count."""
    Told.threads.clear()
    assert await Service().load(Told()) == 1
    assert Told.threads[0] is threading.current_thread()


async def test_an_argument_without_a_key_is_the_same_error() -> None:
    """An argument that cannot be keyed is an error that names it, in a thread too."""

    @cache(name="weights:bad", version="1", ttl=None)
    async def load(data: Any, lock: Any) -> int:
        return 1

    for call in (load, load.apeek):
        with pytest.raises(TypeError, match="lock") as caught:
            await call(bytes(3 * MIB), threading.Lock())
        error: BaseException | None = caught.value
        while error is not None:
            assert not isinstance(error, HeavyError), "what happened inside shows"
            error = error.__context__


@pytest.mark.parametrize("text", ["x" * 70_000, "é" * 40_000, "\ud800", "\ud800" * 70_000])
def test_calls_with_long_texts_are_stored(text: str) -> None:
    """A text that is longer than a header may hold, or not even Unicode, is an argument too."""
    ran: list[int] = []

    @cache(name="weights:text", version="1", ttl=None)
    def load(text: str) -> int:
        ran.append(1)
        return len(text)

    with configure(tiers=["disk"]), recording() as heard:
        assert load(text) == load(text) == len(text)
        assert ran == [1]
        load.invalidate(text)
        assert load(text) == len(text)
        assert ran == [1, 1]
    assert [event for event in heard if event.kind == "error"] == []


@pytest.mark.timing
def test_small_arguments_cost_no_look() -> None:
    """The check for big values costs the key of a number and a short text less than 0.1 µs."""
    keyer: Any = inside(Service.load).keyer.__class__(
        lambda number, text: None,
        identity=Identity(len, digest="code"),
        function_id="weights:f",
        key_prefix=None,
        key_resolver=None,
        ignore=(),
        tags=(),
        method=False,
    )
    calls = 20_000

    def took(light: bool) -> float:
        return timeit.timeit(lambda: keyer.call((7, "Ada"), {}, light), number=calls)

    pairs = [(took(True), took(False)) for _ in range(15)]
    light, simple = (min(times) for times in zip(*pairs, strict=True))
    assert (light - simple) / calls < 0.1e-6 + 0.1e-6  # and what the machine adds
