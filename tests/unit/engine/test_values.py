"""Values: whatever a function returns reaches its caller, and nothing wrong is ever stored."""

from __future__ import annotations

import asyncio
import gc
import os
import pickle
import sys
import threading
import time
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inside import inside, joined
from observed import calls_of
from redis_server import RedisServer

import memo
from memo import cache
from memo.runtime import events
from memo.runtime.blocking import drain_blocking
from memo.settings.configuration import configure
from memo.testing import ManualClock, isolated, recording

LONG = bool(os.environ.get("MEMO_TEST_LONG"))
HUGE = 513 << 20
"""Bytes: more than Redis takes as one value."""


def both(made: Callable[[], Any], **options: Any) -> tuple[Any, Any, list[int]]:
    """A sync and an async cached function of the same body, and how often they ran."""
    ran: list[int] = []
    given = {"ttl": None, "version": "1", **options}

    @cache(name="values:sync", **given)
    def sync() -> Any:
        ran.append(0)
        return made()

    @cache(name="values:async", **given)
    async def coroutine() -> Any:
        ran.append(1)
        return made()

    return sync, lambda: asyncio.run(coroutine()), ran


# --- values that cannot be stored -----------------------------------------------------------------


def test_what_cannot_be_pickled_is_returned_with_one_warning() -> None:
    """An unpicklable result is the caller's own object; one warning per function, and an event."""
    lock = threading.Lock()
    sync, coroutine, ran = both(lambda: lock)
    for call in (sync, coroutine):
        with recording() as heard:
            with pytest.warns(UserWarning, match="cannot be pickled"):
                assert call() is lock
            assert call() is lock  # a second warning would be an error
        assert [e.reason for e in heard if e.kind == "error"] == ["unpicklable"] * 2
    assert ran == [0, 0, 1, 1]


class Raises:
    """Raises when it is pickled."""

    def __init__(self, error: type[BaseException]) -> None:
        self.error = error

    def __reduce__(self) -> Any:
        raise self.error("marked-value")


class Endless:
    """Recurs when it is pickled."""

    def __reduce__(self) -> Any:
        return Endless, (Endless(),)


class Wrong:
    """Gives what is no reduction."""

    def __reduce__(self) -> Any:
        return 42


class Slow:
    """Lets go of the interpreter while it is pickled."""

    def __reduce__(self) -> Any:
        time.sleep(0.01)
        return Slow, ()


@pytest.mark.parametrize(
    "value",
    [Raises(ValueError), Raises(MemoryError), Raises(StopIteration), Endless(), Wrong(), sys, open],
    ids=["raises", "memory", "stop", "endless", "wrong", "module", "fine"],
)
def test_whatever_pickling_does_the_caller_gets_the_result(value: Any) -> None:
    """A `__reduce__` that raises, recurs or talks nonsense is no business of the caller."""
    for call in both(lambda: value)[:2]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            first, second = call(), call()
        assert type(first) is type(value)
        assert type(second) is type(value)


class One:
    """Pickles as a call of the function that made it."""

    def __reduce__(self) -> Any:
        return one, ()


@cache(name="values:one", version="1", cache_if=lambda result: type(one()) is One)
def one() -> One:
    return One()


def test_pickling_and_options_may_ask_for_the_result_that_is_being_stored() -> None:
    """`__reduce__` and `cache_if` do not wait forever for the flight that runs them."""
    with pytest.warns(UserWarning, match="a One that cannot be pickled|does not load"):
        assert type(one()) is One
    assert type(one.refresh()) is One
    assert not one.is_cached()


def test_an_interrupt_while_pickling_is_an_interrupt() -> None:
    """Ctrl-C in the middle of pickling is not swallowed, and the next call works."""
    given: list[Any] = [Raises(KeyboardInterrupt), 1]

    @cache(name="values:interrupt", version="1", ttl=None)
    def load() -> Any:
        return given.pop(0)

    with pytest.raises(KeyboardInterrupt):
        load()
    assert load() == 1
    assert load() == 1


def test_a_slow_reduce_is_its_own_doing() -> None:
    """A result that takes long to pickle is stored and loaded like any other."""
    sync, coroutine, ran = both(lambda: [Slow(), 1])
    for call in (sync, coroutine):
        assert [[type(part) for part in call()] for _ in range(2)] == [[Slow, int]] * 2
    assert ran == [0, 1]


# --- values that cannot be loaded -----------------------------------------------------------------


@pytest.fixture
def module() -> Any:
    made = types.ModuleType("values_module")
    sys.modules["values_module"] = made
    exec("class Here:\n    def __init__(self): self.x = 1", made.__dict__)
    yield made
    sys.modules.pop("values_module", None)


@pytest.mark.parametrize("tiers", [["memory"], ["disk"], ["memory", "disk"]])
def test_a_class_that_is_gone_is_a_miss(module: Any, tiers: list[str]) -> None:
    """An entry that does not load here is computed anew, and said to be unreadable."""
    with configure(tiers=tiers):
        sync, coroutine, ran = both(lambda: module.Here() if hasattr(module, "Here") else "new")
        for call in (sync, coroutine):
            if not hasattr(module, "Here"):
                exec("class Here:\n    def __init__(self): self.x = 1", module.__dict__)
            assert call().x == 1
            assert call().x == 1
            del module.Here
            with recording() as heard:
                assert call() == "new"
            assert "unreadable" in {e.reason for e in heard if e.kind in ("error", "miss")}
            assert call() == "new"
    assert ran == [0, 0, 1, 1]


def explode(kind: str) -> Any:
    """Called by a pickle of `Exploding` when it is loaded."""
    raise {"value": ValueError, "attribute": AttributeError, "memory": MemoryError}[kind](kind)


class Exploding:
    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __reduce__(self) -> Any:
        return explode, (self.kind,)


@pytest.mark.parametrize("kind", ["value", "attribute", "memory"])
@pytest.mark.parametrize("tiers", [["memory"], ["disk"]])
def test_a_pickle_that_raises_on_load_is_a_miss(kind: str, tiers: list[str]) -> None:
    """A value that raises when it is loaded is computed at each call, and the caller gets it."""
    with configure(tiers=tiers):
        sync, coroutine, ran = both(lambda: Exploding(kind))
        for call in (sync, coroutine):
            for _ in range(3):
                assert type(call()) is Exploding
    assert ran == [0, 0, 0, 1, 1, 1]


def test_joiners_of_what_does_not_load_compute_themselves() -> None:
    """A result that cannot be copied reaches every caller all the same."""
    ran: list[int] = []

    @cache(name="values:joined", version="1", ttl=None)
    async def load() -> Any:
        ran.append(1)
        if len(ran) == 1:
            await joined(3)
        return Exploding("value")

    async def main() -> list[Any]:
        return await asyncio.gather(*(load() for _ in range(4)))

    assert [type(value) for value in asyncio.run(main())] == [Exploding] * 4


# --- ordinary values that are not ordinary -------------------------------------------------------


@pytest.mark.parametrize(
    "value", [None, False, 0, "", (), [], {}, b"", float("nan"), NotImplemented, ...], ids=repr
)
def test_values_that_look_like_nothing_are_values(value: Any) -> None:
    """None and everything else that is false is stored and found."""
    sync, coroutine, ran = both(lambda: value)
    for call in (sync, coroutine):
        assert repr(call()) == repr(call()) == repr(value)
    assert ran == [0, 1]


@pytest.mark.parametrize(
    "error",
    [ValueError("x"), StopIteration(3), KeyError("k"), StopAsyncIteration(), OSError(5, "x")],
)
def test_exceptions_that_are_returned_are_values(error: Exception) -> None:
    """An exception that is a result is stored and returned, not raised."""
    sync, coroutine, ran = both(lambda: error)
    for call in (sync, coroutine):
        for _ in range(2):
            found = call()
            assert type(found) is type(error)
            assert found.args == error.args
    assert ran == [0, 1]


@pytest.mark.parametrize("error", [ValueError, StopIteration, KeyError, GeneratorExit, SystemExit])
def test_exceptions_that_are_raised_are_raised_and_not_stored(error: type[BaseException]) -> None:
    """An exception of the function is raised, the very object, at each call."""
    given: list[BaseException] = []

    @cache(name="values:raising", version="1", ttl=None)
    def load() -> Any:
        given.append(error("marked"))
        raise given[-1]

    for times in (1, 2):
        with pytest.raises(error) as caught:
            load()
        assert caught.value is given[-1]
        assert len(given) == times


def test_results_that_alias_arguments_or_globals_are_cut_loose() -> None:
    """A hit shares nothing with the argument or the global that the first result was (I8)."""
    shared = {"count": [0]}

    @cache(name="values:alias", version="1", ttl=None)
    def same(x: list[int]) -> Any:
        return x

    @cache(name="values:global", version="1", ttl=None)
    def whole() -> Any:
        return shared

    given = [1, 2]
    assert same(given) is given
    given.append(3)
    assert same([1, 2]) == [1, 2]
    found = same([1, 2])
    found.append(9)
    assert same([1, 2]) == [1, 2]
    assert whole() is shared
    shared["count"].append(1)
    assert whole() == {"count": [0]}


def test_callers_that_share_a_computation_share_no_buffers() -> None:
    """A caller may change its array at once, also while others make their copies (I8)."""

    @cache(name="values:shared", version="1", ttl=60)
    def load() -> Any:
        time.sleep(0.05)  # until all have joined
        return np.zeros(1 << 20, np.uint8)

    found: list[int] = []

    def use() -> None:
        value = load()
        found.append(int(value.max()))
        value[:] = 5

    threads = [threading.Thread(target=use) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [0] * 6


def test_a_result_is_stored_as_it_was_when_it_was_returned() -> None:
    """Changes that the caller makes right after the call are not in the store."""
    with configure(tiers=["disk"]):

        @cache(name="values:array", version="1", ttl=None)
        def load() -> Any:
            return np.zeros(100_000)

        first = load()
        first += 1
        second = load()
        assert second.sum() == 0
        second += 1
        assert load().sum() == 0


def test_a_result_that_another_thread_changes_while_it_is_stored_is_never_torn() -> None:
    """Arrays that change while they are hashed and written are not found with a wrong digest."""
    stop = threading.Event()
    shared = np.zeros(400_000, dtype=np.int64)

    def churn() -> None:
        while not stop.is_set():
            shared[:] += 1

    with configure(tiers=["disk"]):

        @cache(name="values:churned", version="1", ttl=None)
        def load(x: int) -> Any:
            return shared

        thread = threading.Thread(target=churn)
        thread.start()
        try:
            for x in range(10):
                load(x)
        finally:
            stop.set()
            thread.join()
        memo.testing.reset()
    with configure(tiers=["disk"]), recording() as heard:
        for x in range(10):
            first, second = load(x), load(x)
            assert np.array_equal(first, second), "what was stored is not what is found"
    assert {e.reason for e in heard if e.kind == "error"} <= {"unreadable"}


def test_huge_values_stay_out_of_redis(redis_server: RedisServer, tmp_path: Path) -> None:
    """A value above `redis_value_limit` is stored on the disk, and a hit from there."""
    client = redis_server.client()
    values = (lambda: b"x" * 300_000, lambda: np.arange(300_000), lambda: "é" * 200_000)
    settings = {"redis_url": redis_server.url, "redis_value_limit": 100_000, "deadline": 5.0}
    for number, made in enumerate(values):
        with configure(directory=tmp_path / str(number), **settings):
            sync, coroutine, ran = both(made)
            for call in (sync, coroutine):
                assert np.array_equal(call(), made())
                assert np.array_equal(call(), made())
            assert ran == [0, 1]
            names = [name for name in client.keys("memo:*") if client.type(name) == b"string"]
            assert [name for name in names if client.strlen(name) > 100_000] == []
        memo.testing.reset()
        client.flushall()


def test_what_fits_nowhere_is_returned() -> None:
    """A value above every budget reaches its caller, at each call."""
    with configure(size_limit=2 << 20, memory_limit=1 << 20):
        sync, coroutine, ran = both(lambda: b"x" * 3_000_000)
        for call in (sync, coroutine):
            assert len(call()) == len(call()) == 3_000_000
    assert ran == [0, 0, 1, 1]


def _kept_on_the_disk_alone(
    url: str, made: Callable[[], Any], limit: int, deadline: float
) -> list[events.Event]:
    """Call a sync and an async function twice, at first without, then with an entry."""
    settings = {"redis_url": url, "redis_value_limit": limit, "size_limit": 1 << 40}
    with recording() as heard, configure(**settings, deadline=deadline):
        sync, coroutine, ran = both(made)
        for call, wanted in ((sync, [0]), (coroutine, [0, 1])):
            for _ in range(2):
                assert np.array_equal(call(), made())
                gc.collect()
            assert ran == wanted, "the disk has it"
        assert drain_blocking(30)
        assert sync.peek() is not None
        sync.cache_clear()
    return list(heard)


@pytest.mark.parametrize("kind", ["bytes", "array"])
def test_more_than_redis_takes(redis_server: RedisServer, kind: str) -> None:
    """A value too big for the server: result, disk and an event; Redis goes on for all else.

    Its limit for one value is 512 MB unless it is set lower, as here; it cuts the connection.
    """
    client = redis_server.client()
    client.config_set("proto-max-bulk-len", 1 << 20)
    made = {"bytes": lambda: b"x" * (3 << 20), "array": lambda: np.arange(3 << 18)}[kind]
    heard = _kept_on_the_disk_alone(redis_server.url, made, 64 << 20, 5.0)
    assert {event.tier for event in heard if event.kind == events.UPLOAD_FAILED} == {"redis"}
    with configure(redis_url=redis_server.url, tiers=["redis"], deadline=5.0):
        sync, coroutine, ran = both(lambda: "small")
        assert [sync(), sync(), coroutine(), coroutine()] == ["small"] * 4
        assert ran == [0, 1], "its breaker is open"


@pytest.mark.skipif(not LONG, reason="takes 2 GiB of memory and of disk; MEMO_TEST_LONG=1")
@pytest.mark.parametrize("kind", ["bytes", "array"])
@pytest.mark.timeout(600)
def test_half_a_gigabyte(redis_server: RedisServer, kind: str) -> None:
    """513 MiB, with the highest limit that a setting may name; Redis gets none of the bytes."""
    made = {"bytes": lambda: bytes(HUGE), "array": lambda: np.zeros(HUGE, dtype=np.uint8)}[kind]
    heard = _kept_on_the_disk_alone(redis_server.url, made, 512 << 20, 60.0)
    faults = (events.ERROR, events.UPLOAD_FAILED)
    assert {event.tier for event in heard if event.kind in faults} <= {"redis"}
    refused = [event for event in heard if "too big for Redis" in event.detail]
    assert bool(refused) == (kind == "bytes"), "an array's record fits, its bytes do not go there"
    client = redis_server.client()
    sizes = [client.strlen(n) for n in client.keys("memo:*") if client.type(n) == b"string"]
    assert max(sizes, default=0) < 1 << 20


# --- arguments that change -----------------------------------------------------------------------


def test_functions_that_change_their_arguments_have_the_key_of_before() -> None:
    """A result is stored under the arguments as they were when the call was made."""
    ran: list[int] = []

    @cache(name="values:sorting", version="1", ttl=None)
    def smallest(xs: list[int]) -> int:
        ran.append(1)
        xs.sort()
        return xs[0]

    @cache(name="values:popping", version="1", ttl=None)
    async def last(xs: list[int]) -> int:
        ran.append(2)
        return xs.pop()

    for _ in range(2):
        assert smallest([3, 1, 2]) == 1
        assert asyncio.run(last([3, 1, 2])) == 2
    assert ran == [1, 2]
    assert smallest([1, 2, 3]) == 1
    assert ran == [1, 2, 1]


STALE: dict[str, Any] = {"ttl": 10, "stale_while_revalidate": 1000}


def test_a_refresh_of_changed_arguments_is_not_stored_sync() -> None:
    """Arguments that the caller changed before or during a refresh make another key: not stored."""
    clock = ManualClock()
    begun, go_on = threading.Event(), threading.Event()
    waits = [False]

    @cache(name="values:refreshed", version="1", **STALE)
    def total(xs: list[int]) -> int:
        if waits[0]:
            begun.set()
            assert go_on.wait(5)
        return sum(xs)

    with isolated(clock=clock):
        assert total([1, 2]) == 3
        clock.advance(20)
        waits[0] = True
        given = [1, 2]
        with recording() as heard:
            assert total(given) == 3
            assert begun.wait(5)
            given.append(100)
            go_on.set()
            assert drain_blocking(5)
        assert [e.reason for e in heard if e.kind == events.REFRESH_FAILED] == ["arguments changed"]
        assert [e.reason for e in heard if e.kind == events.ERROR] == ["arguments changed"]
        assert total.peek([1, 2]) == 3
        assert total([1, 2]) == 3, "a sum of other arguments was stored under this key"
        assert drain_blocking(5)


async def test_a_refresh_of_changed_arguments_does_not_run_async() -> None:
    """Arguments that changed before the refresh began: the function is not even called."""
    clock = ManualClock()
    ran: list[int] = []

    @cache(name="values:refreshed_async", version="1", **STALE)
    async def total(xs: list[int]) -> int:
        ran.append(1)
        return sum(xs)

    with isolated(clock=clock):
        assert await total([1, 2]) == 3
        clock.advance(20)
        given = [1, 2]
        assert await total(given) == 3
        given.append(100)
        assert await memo.drain(5)
        assert ran == [1]
        assert await total([1, 2]) == 3
        assert await memo.drain(5)
        assert ran == [1, 1], "unchanged arguments are refreshed"
        assert total.peek([1, 2]) == 3


async def test_arguments_that_change_while_a_call_waits_its_turn_are_not_stored() -> None:
    """A caller that changes its argument during the lookup gets its result, and no other does."""

    @cache(name="values:turn", version="1", ttl=None)
    async def total(xs: list[int]) -> int:
        return sum(xs)

    given = [1, 2]
    task = asyncio.create_task(total(given))
    await asyncio.sleep(0)
    given.append(100)
    assert await task in (3, 103)
    assert await total([1, 2]) == 3


async def test_scalars_are_not_looked_at_twice() -> None:
    """Arguments that cannot change cost no second key."""

    @cache(name="values:scalars", version="1", ttl=None)
    async def load(a: int, b: str, *, c: Any = None) -> int:
        return a

    with calls_of(type(inside(load).keyer).call) as keyed:
        await load(1, "x", c=2.5)
    assert len(keyed) == 1


def test_pickle_is_what_makes_copies() -> None:
    """The helpers of this module are importable, so that a hit can load what they made."""
    assert pickle.loads(pickle.dumps(Slow())).__class__ is Slow
