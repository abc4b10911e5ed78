"""Modes of calls: `memo.mode`, `MEMO_MODE`, `f.using`; and `f.put`."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import warnings
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest

import memo
from memo import NotCachedError, OptionError, SettingError, cache
from memo.testing import ManualClock, isolated, recording

RUNS: dict[str, int] = {}


@pytest.fixture(autouse=True)
def fresh_counts() -> None:
    RUNS.clear()


def ran(name: str = "n") -> int:
    RUNS[name] = RUNS.get(name, 0) + 1
    return RUNS[name]


def loads(**options: Any) -> Any:
    @cache(name="shop:load", version="1", **{"ttl": None, **options})
    def load(region: str) -> int:
        return ran()

    return load


def aloads(**options: Any) -> Any:
    @cache(name="shop:aload", version="1", **{"ttl": None, **options})
    async def load(region: str) -> int:
        await asyncio.sleep(0)
        return ran()

    return load


def test_refresh_computes_and_stores(where: Any) -> None:
    """In the mode "refresh" a call computes, and the new value is stored."""
    load = loads()
    with where:
        assert load("EU") == 1
        with memo.mode("refresh"):
            assert load("EU") == 2
        assert load("EU") == 2


def test_off_neither_reads_nor_stores(where: Any) -> None:
    """In the mode "off" a call computes, and the cache keeps what it had."""
    load = loads()
    with where:
        assert load("EU") == 1
        with memo.mode("off"):
            assert load("EU") == 2
            assert load("US") == 3
        assert load("EU") == 1
        assert not load.is_cached("US")


def test_only_never_computes(where: Any) -> None:
    """In the mode "only" a call is answered from the cache, or raises with the explanation."""
    load = loads()
    with where:
        load("EU")
        with memo.mode("only"):
            assert load("EU") == 1
            with pytest.raises(NotCachedError, match="miss") as caught:
                load("US")
        assert caught.value.explanation.hit is False
        assert RUNS == {"n": 1}


def test_only_refreshes_nothing() -> None:
    """A stale value is served in the mode "only", and no refresh begins."""
    load = loads(stale_while_revalidate=60)
    load("EU")
    load.expire()
    with memo.mode("only"), recording() as heard:
        assert load("EU") == 1
    assert "refresh_started" not in [event.kind for event in heard]


def test_max_age(where: Any) -> None:
    """With `max_age` an older entry does not answer; what is computed then is stored."""
    load = loads(stale_while_revalidate=60)
    with where:
        assert load("EU") == 1
        with memo.mode(max_age="1h"):
            assert load("EU") == 1
        with memo.mode(max_age=1e-9):
            assert load("EU") == 2
        with memo.mode("only", max_age=1e-9), pytest.raises(NotCachedError, match="max_age"):
            load("EU")
        assert load("EU") == 2


async def test_modes_of_coroutines() -> None:
    """The modes do the same for an `async def`."""
    load = aloads()
    assert await load("EU") == 1
    with memo.mode("refresh"):
        assert await load("EU") == 2
    with memo.mode("off"):
        assert await load("EU") == 3
    with memo.mode("only"):
        assert await load("EU") == 2
        with pytest.raises(NotCachedError):
            await load("US")
    with memo.mode(max_age=1e-9):
        assert await load("EU") == 4
    assert await load("EU") == 4


async def test_tasks_have_modes_of_their_own() -> None:
    """A gather of two tasks in two modes does what each says."""
    load = aloads()
    assert await load("EU") == 1
    inside = asyncio.Event()

    async def refreshed() -> int:
        with memo.mode("refresh"):
            inside.set()
            await asyncio.sleep(0)
            return await load("EU")

    async def only() -> Any:
        with memo.mode("only"):
            await inside.wait()
            with pytest.raises(NotCachedError):
                await load("US")
            return "refused"

    assert await asyncio.gather(refreshed(), only()) == [2, "refused"]
    assert await load("EU") == 2


def test_other_threads_are_not_affected() -> None:
    """A mode holds in the context that set it."""
    load = loads()
    load("EU")
    found: list[int] = []
    with memo.mode("refresh"):
        thread = threading.Thread(target=lambda: found.append(load("EU")))
        thread.start()
        thread.join()
    assert found == [1]


def test_a_mode_reaches_what_is_called_inside() -> None:
    """In the mode "refresh" everything beneath a call is computed anew as well."""
    load = loads()

    @cache(ttl=None, version="1", name="shop:report")
    def report() -> int:
        return 10 * load("EU")

    assert report() == 10
    with memo.mode("refresh"):
        assert report() == 20
    assert report() == 20


def test_off_inside_a_computation_keeps_the_dependency() -> None:
    """A result that was built on a call in the mode "off" goes when that is invalidated."""
    load = loads()

    @cache(ttl=None, version="1", name="shop:report")
    def report() -> int:
        with memo.mode("off"):
            return 10 * load("EU")

    assert report() == report() == 10
    load.invalidate()
    assert report() == 20


def test_off_inside_a_computation_leaves_what_is_stored(where: Any) -> None:
    """In the mode "off" inside a computation, too, the cache keeps what it had."""

    @cache(ttl=None, version="1", name="shop:rows")
    def rows(region: str) -> Iterator[int]:
        yield ran("rows")

    @cache(ttl=None, version="1", name="shop:each", each="xs")
    def each(xs: list[int]) -> list[int]:
        return [ran("each") for _ in xs]

    @cache(ttl=None, version="1", name="shop:report")
    def report() -> list[int]:
        with memo.mode("off"):
            return [load("EU"), *rows("EU"), *each([1])]

    with where:
        load = loads()
        assert [load("EU"), *rows("EU"), *each([1])] == [1, 1, 1]
        assert report() == [2, 2, 2]
        assert [load("EU"), *rows("EU"), *each([1])] == [1, 1, 1]


def test_off_inside_a_computation_keeps_the_dependency_on_a_generator() -> None:
    """So does one that was built on the items of a generator in the mode "off", sync or async."""

    @cache(ttl=None, version="1", name="shop:rows")
    def rows(region: str) -> Iterator[int]:
        yield ran("rows")

    @cache(ttl=None, version="1", name="shop:arows")
    async def arows(region: str) -> AsyncIterator[int]:
        yield ran("arows")

    @cache(ttl=None, version="1", name="shop:report")
    def report() -> list[int]:
        with memo.mode("off"):
            return list(rows("EU"))

    @cache(ttl=None, version="1", name="shop:areport")
    async def areport() -> list[int]:
        return [row async for row in arows.using(mode="off")("EU")]

    assert report() == report() == [1]
    assert not rows.is_cached("EU"), "nothing is stored in this mode"
    rows.invalidate()
    assert report() == [2]
    assert asyncio.run(areport()) == asyncio.run(areport()) == [1]
    arows.invalidate("EU")
    assert asyncio.run(areport()) == [2]


def test_modes_nest() -> None:
    """The inner mode holds, and the outer one again after it."""
    load = loads()
    load("EU")
    with memo.mode("only"):
        with memo.mode("refresh"):
            assert load("EU") == 2
        with pytest.raises(NotCachedError):
            load("US")


@pytest.mark.parametrize("wrong", ["fresh", 5, True])
def test_a_wrong_mode_is_an_error(wrong: Any) -> None:
    """An unknown mode is refused where it is written."""
    with pytest.raises(OptionError, match="refresh"):
        memo.mode(wrong)
    with pytest.raises(OptionError, match="refresh"):
        loads().using(mode=wrong)
    with pytest.raises(OptionError, match="max_age"):
        memo.mode(max_age=-1)


@pytest.mark.parametrize(("mode", "printed"), [("off", "1 2"), ("refresh", "1 2"), ("", "1 1")])
def test_the_environment_sets_it(mode: str, printed: str) -> None:
    """`MEMO_MODE` sets the mode of a process."""
    code = (
        "import memo\n"
        "runs = []\n"
        "@memo.cache(version='1')\n"
        "def f():\n    runs.append(1)\n    return len(runs)\n"
        "print(f(), f())"
    )
    import os

    env = {**os.environ, "MEMO_MODE": mode}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout.strip() == printed, done.stderr


def test_a_wrong_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bad `MEMO_MODE` is an error that names where it came from."""
    monkeypatch.setenv("MEMO_MODE", "sometimes")
    memo.testing.reset()
    with pytest.raises(SettingError, match=r"mode.*MEMO_MODE"):
        loads()("EU")


# --- using ---------------------------------------------------------------------------------------


def test_using_is_for_its_own_calls(where: Any) -> None:
    """`f.using(...)` is the same function in another mode; what it calls is not affected."""
    load = loads()

    @cache(ttl=None, version="1", name="shop:report")
    def report() -> int:
        return 10 * load("EU")

    with where:
        assert report() == 10
        assert report.using(mode="refresh")() == 10
        assert RUNS == {"n": 1}
        assert load.using(mode="refresh")("EU") == 2
        assert load.using(max_age="1h")("EU") == 2
        assert load.using(max_age=1e-9)("EU") == 3
        assert load("EU") == 3
        with pytest.raises(NotCachedError):
            load.using(mode="only")("US")
        assert load.using(mode="only").function_id == load.function_id


def test_using_another_ttl() -> None:
    """With `ttl` an entry is judged by it, and stored with it."""
    load = loads(ttl=60)
    short = load.using(ttl=1e-9)
    assert load("EU") == 1
    assert short("EU") == 2
    assert not load.is_cached("EU"), "it was stored with the short ttl"


async def test_using_of_a_coroutine_and_of_a_method() -> None:
    """It works on `async def` and on methods."""

    class Service:
        @cache(ttl=None, version="1", name="shop:Service.get")
        async def get(self, x: int) -> int:
            return ran()

    service = Service()
    assert await service.get(1) == 1
    assert await service.get.using(mode="refresh")(1) == 2
    assert await service.get(1) == 2
    assert await service.get.using(max_age="1h")(1) == 2


# --- put -----------------------------------------------------------------------------------------


def test_put_stores_without_computing(where: Any) -> None:
    """`f.put(value, ...)` stores a value that calls get; an invalidation drops it as any other."""
    load = loads()
    with where:
        load.put(42, "EU")
        assert load("EU") == 42
        assert RUNS == {}
        load.put(43, region="EU")
        assert load("EU") == 43
        load.invalidate("EU")
        assert load("EU") == 1


async def test_put_of_coroutines_and_methods() -> None:
    """It works on `async def` and on methods; `aput` does not block the event loop."""

    class Service:
        @cache(ttl=None, version="1", name="shop:Service.get")
        async def get(self, x: int) -> int:
            return ran()

    service, load = Service(), aloads()
    await load.aput(42, "EU")
    assert await load("EU") == 42
    await service.get.aput(5, 1)
    assert await service.get(1) == 5
    service.get.put(6, 1)
    assert await service.get(1) == 6


def test_put_of_a_replaying_function(capsys: pytest.CaptureFixture[str]) -> None:
    """A value put for a function with `replay` shows nothing."""
    load = loads(replay=True)
    load.put(42, "EU")
    assert load("EU") == 42
    assert capsys.readouterr().out == ""


# --- wrong calls ---------------------------------------------------------------------------------


@pytest.mark.parametrize("replay", [False, True])
def test_a_wrong_call_raises_at_the_call(replay: bool) -> None:
    """Arguments that do not fit raise `TypeError` where the call is written, also of coroutines."""

    class Service:
        @cache(replay=replay)
        async def get(self, x: int) -> int:
            return x

    load = aloads(replay=replay)
    for wrong in (
        lambda: load("EU", yeer=2),
        lambda: load(),
        lambda: load("EU", "US"),
        lambda: load("EU", region="EU"),
        lambda: Service().get(),
        lambda: Service().get(1, y=2),
    ):
        with pytest.raises(TypeError, match="argument"):
            wrong()


def refusal(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Return the message of the `TypeError` that a call raises."""
    with pytest.raises(TypeError) as caught:
        function(*args, **kwargs)
    return str(caught.value)


@pytest.mark.parametrize("decorate", [cache, cache(each="xs")], ids=["plain", "each"])
def test_a_wrong_call_raises_the_error_of_the_plain_function(decorate: Any) -> None:
    """It is word for word Python's, also of a method without an object and of helpers."""

    class Plain:
        def get(self, xs: Any, /, y: int, *, z: int = 1, w: int) -> Any:
            return xs

        def some(self, xs: Any, *, z: int = 1) -> Any:
            return xs

    class Cached:
        get, some = decorate(Plain.get), decorate(Plain.some)

    cases: list[tuple[Any, Any, tuple[Any, ...], dict[str, Any]]] = [
        (Plain.get, Cached.get, (), {}),
        (Plain.some, Cached.some, (), {}),
        (Plain().some, Cached().some, (), {}),
        *((Plain().get, Cached().get, (1, 2, 3)[:count], {}) for count in range(4)),
        (Plain().get, Cached().get, (1, 2, 3), {"w": 1}),
        (Plain().get, Cached().get, (1, 2), {"y": 3, "w": 1}),
        (Plain().get, Cached().get, (), {"xs": 1, "y": 2, "w": 1}),
        (Plain().get, Cached().get, (1, 2), {"w": 1, "v": 2}),
    ]
    for plain, cached, args, kwargs in cases:
        wanted = refusal(plain, args, kwargs)
        for call in (cached, cached.key, cached.is_cached, cached.explain, cached.peek):
            assert refusal(call, args, kwargs) == wanted


def test_explain_says_that_calls_are_not_answered_from_the_cache() -> None:
    """With `enabled=False`, and in the modes "off" and "refresh", no call hits."""
    load, aload = loads(), aloads()
    load("EU"), asyncio.run(aload("EU"))
    ways: list[tuple[AbstractContextManager[Any], str]] = [
        (memo.configure(enabled=False), "disabled"),
        (memo.mode("off"), 'mode "off"'),
        (memo.mode("refresh"), 'mode "refresh"'),
    ]
    for way, reason in ways:
        with way:
            for found in (
                load.explain("EU"),
                aload.explain("EU"),
                asyncio.run(load.aexplain("EU")),
            ):
                assert (found.hit, found.reason) == (False, reason)
    assert load.explain("EU").hit


def test_helpers_see_the_age_that_calls_are_limited_to() -> None:
    """`peek`, `is_cached` and `explain` answer for a call as it would go with `max_age`."""
    clock = ManualClock()
    with isolated(clock=clock):
        load, aload = loads(), aloads()
        load("EU"), asyncio.run(aload("EU"))
        clock.advance(10)
        young, ayoung = load.using(max_age=5), aload.using(max_age=5)
        assert (young.is_cached("EU"), young.peek("EU"), young.explain("EU").hit) == (
            False,
            None,
            False,
        )
        assert not asyncio.run(ayoung.ais_cached("EU"))
        assert not asyncio.run(ayoung.aexplain("EU")).hit
        with memo.mode(max_age=5):
            assert (load.is_cached("EU"), asyncio.run(aload.apeek("EU"))) == (False, None)
        assert load.using(max_age=60).is_cached("EU")
        assert load.is_cached("EU")


def test_a_warning_is_given_once_also_where_a_mode_limits_the_age() -> None:
    """Calls in a mode leave for later calls what others leave."""

    @cache(ttl=60)
    def lock(x: int) -> Any:
        return threading.Lock()

    with isolated(), warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        for _ in range(3):
            with memo.mode(max_age="1m"):
                lock(1)
            lock(1)
    assert len([one for one in given if "cannot be pickled" in str(one.message)]) == 1
