"""Kinds of functions that can be decorated, those that cannot, and the helpers they get."""

from __future__ import annotations

import abc
import asyncio
import contextlib
import copy
import dataclasses
import enum
import functools
import inspect
import subprocess
import sys
import threading
import time
import types
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
from inside import joined
from observed import calls_of
from styles import STYLES, Style
from waiting import await_until, until

import memo
from memo.coordination.flights import FLIGHTS
from memo.records import codec
from memo.runtime import events
from memo.testing import recording

styles = pytest.mark.parametrize("style", STYLES, ids=repr)


class Tally:
    """Counts calls; all tallies have one key, so that counting changes no function."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.calls: list[Any] = []

    def __memo_key__(self) -> str:
        return "tally"

    def __call__(self, *what: Any) -> int:
        with self.lock:
            self.calls.append(what[0] if len(what) == 1 else what)
            return len(self.calls)


@pytest.fixture
def tally() -> Tally:
    return Tally()


def settle(value: Any) -> Any:
    """The result of a call, sync or async, from outside a loop."""
    if not inspect.iscoroutine(value):
        return value
    return asyncio.run(value)


# --- methods -------------------------------------------------------------------------------------


def services(tally: Tally, is_async: bool) -> Any:
    """A class with methods of every kind, in both orders of the decorators, and a subclass."""
    if is_async:

        class AsyncService:
            @memo.cache
            async def method(self, x: int) -> str:
                return f"{type(self).__name__} {x} {tally('method', x)}"

            @classmethod
            @memo.cache
            async def outside(cls, x: int) -> str:
                return f"{cls.__name__} {x} {tally('outside', x)}"

            @memo.cache
            @classmethod
            async def inside(cls, x: int) -> str:
                return f"{cls.__name__} {x} {tally('inside', x)}"

            @staticmethod
            @memo.cache
            async def static_outside(x: int) -> str:
                return f"static {x} {tally('static_outside', x)}"

            @memo.cache
            @staticmethod
            async def static_inside(x: int) -> str:
                return f"static {x} {tally('static_inside', x)}"

        return AsyncService

    class Service:
        @memo.cache
        def method(self, x: int) -> str:
            return f"{type(self).__name__} {x} {tally('method', x)}"

        @classmethod
        @memo.cache
        def outside(cls, x: int) -> str:
            return f"{cls.__name__} {x} {tally('outside', x)}"

        @memo.cache
        @classmethod
        def inside(cls, x: int) -> str:
            return f"{cls.__name__} {x} {tally('inside', x)}"

        @staticmethod
        @memo.cache
        def static_outside(x: int) -> str:
            return f"static {x} {tally('static_outside', x)}"

        @memo.cache
        @staticmethod
        def static_inside(x: int) -> str:
            return f"static {x} {tally('static_inside', x)}"

    return Service


METHODS = ["method", "outside", "inside", "static_outside", "static_inside"]
kinds_of = pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])


@kinds_of
@pytest.mark.parametrize("name", METHODS)
def test_methods(tally: Tally, is_async: bool, name: str) -> None:
    """Methods of every kind are cached by their arguments, not by the instance."""
    service = services(tally, is_async)
    first = settle(getattr(service(), name)(1))
    assert settle(getattr(service(), name)(1)) == first
    assert settle(getattr(service(), name)(x=1)) == first
    if name != "method":
        assert settle(getattr(service, name)(1)) == first
    assert tally.calls == [(name, 1)]
    settle(getattr(service(), name)(2))
    assert len(tally.calls) == 2


@kinds_of
@pytest.mark.parametrize("name", ["method", "outside", "inside"])
def test_methods_of_another_class(tally: Tally, is_async: bool, name: str) -> None:
    """The class is part of the key: a subclass has entries of its own."""
    service = services(tally, is_async)
    other = type("Other", (service,), {})
    assert settle(getattr(service(), name)(1)).startswith(service.__name__)
    assert settle(getattr(other(), name)(1)).startswith("Other 1")


@kinds_of
@pytest.mark.parametrize("name", METHODS)
def test_helpers_of_methods(tally: Tally, is_async: bool, name: str) -> None:
    """`obj.method.refresh(x)` and its like take the arguments of the call, without `self`."""
    service = services(tally, is_async)
    method = getattr(service(), name)
    assert not method.is_cached(1)
    assert method.peek(1) is None
    assert method.refresh(1).endswith(" 1 1")
    assert method.is_cached(1)
    assert method.is_cached(x=1)
    assert method.peek(1).endswith(" 1 1")
    assert method.key(1) == method.key(x=1) != method.key(2)
    assert method.address(1).endswith(f"{name}:1")
    assert settle(method(1)).endswith(" 1 1")
    assert method.cache_info().hits == 1
    settle(method(2))
    assert method.invalidate(x=1).complete
    assert not method.is_cached(1)
    assert method.is_cached(2)
    method.cache_clear()
    assert not method.is_cached(2)
    assert method.cache_info()[:2] == (0, 0)


@kinds_of
@pytest.mark.parametrize("name", METHODS)
async def test_awaitable_helpers_of_methods(tally: Tally, is_async: bool, name: str) -> None:
    """The twins with an `a` do the same inside a running loop."""
    method = getattr(services(tally, is_async)(), name)
    assert not await method.ais_cached(1)
    assert (await method.arefresh(1)).endswith(" 1 1")
    assert await method.ais_cached(1)
    assert (await method.apeek(1)).endswith(" 1 1")
    assert await method.akey(1) == method.key(1)
    assert await method.aaddress(1) == method.address(1)
    assert (await method.ainvalidate(1)).complete
    assert not await method.ais_cached(1)
    await method.arefresh(1)
    await method.acache_clear()
    assert await method.apeek(1, default="gone") == "gone"


def in_bodies() -> dict[str, Any]:
    """Classes of several makers, each with a cached class method that says its class."""

    class Abstract(abc.ABC):
        @abc.abstractmethod
        def load(self) -> None: ...

        @classmethod
        @memo.cache(ttl=5)
        def make(cls, x: int = 0) -> str:
            return f"{cls.__name__} {x}"

    @dataclasses.dataclass(slots=True)
    class Data:
        field: int = 0

        @classmethod
        @memo.cache
        def make(cls, x: int = 0) -> str:
            return f"{cls.__name__} {x}"

    class Colour(enum.Enum):
        RED = 1

        @classmethod
        @memo.cache
        def make(cls, x: int = 0) -> str:
            return f"{cls.__name__} {x}"

    class Through:
        def mine(function: Any) -> Any:  # type: ignore[misc]  # a decorator of the body's own
            return memo.cache(ttl=5)(function)

        @classmethod
        @mine
        def make(klass, x: int = 0) -> str:
            return f"{klass.__name__} {x}"

    return {"abc": Abstract, "dataclass": Data, "enum": Colour, "through": Through}


@pytest.mark.parametrize("name", in_bodies())
def test_class_methods_know_their_class(name: str) -> None:
    """The helpers of a cached class method know the class, and leave no trace."""
    made = in_bodies()[name]
    assert made.make.key() == made.make.key(0) == made.make.key(x=0) != made.make.key(1)
    assert not made.make.is_cached()
    assert made.make.refresh() == f"{made.__name__} 0"
    assert made.make.is_cached(0)
    assert made.make.peek() == made.make()
    assert not [n for n in vars(made) if "memo" in n]


def test_class_methods_of_subclasses_know_their_class() -> None:
    """A method taken from a subclass is bound to the subclass."""
    base = in_bodies()["abc"]
    other = type("Other", (base,), {})
    assert other.make.refresh(1) == "Other 1"
    assert other.make.is_cached(1)
    assert not base.make.is_cached(1)
    assert other.make.key(1) != base.make.key(1)


def test_a_function_beside_class_methods_stays_what_it_is(tally: Tally) -> None:
    """Only what `classmethod` holds is bound to the class."""

    class Service:
        @memo.cache
        def load(self, x: int) -> str:
            return f"{type(self).__name__} {tally(x)}"

        @staticmethod
        @memo.cache
        def plain(x: int) -> int:
            return tally(x)

        @classmethod
        @memo.cache
        def make(cls, x: int) -> str:
            return cls.__name__

    assert Service.load(Service(), 1) == Service().load(1) == "Service 1"
    assert Service.plain(2) == Service().plain(2)
    assert Service.load.key(Service(), 1) == Service().load.key(1)


def test_a_class_method_by_value_knows_its_class() -> None:
    """Cloudpickle carries a class with its cached class methods."""
    again = cloudpickle.loads(cloudpickle.dumps(in_bodies()["abc"]))
    assert again.make.refresh(3) == "Abstract 3"


def test_instances_with_a_key_of_their_own(tally: Tally) -> None:
    """`__cache_key__` puts the instance into the keys of its methods."""

    class Tenant:
        def __init__(self, name: str) -> None:
            self.name = name

        def __cache_key__(self) -> str:
            return self.name

        @memo.cache
        def load(self, x: int) -> str:
            return f"{self.name} {tally(x)}"

    assert Tenant("a").load(1) == Tenant("a").load(1) == "a 1"
    assert Tenant("b").load(1) == "b 2"


def test_first_parameter_of_any_name(tally: Tally) -> None:
    """A method is one by where it stands, not by what it calls its `self`."""

    class Service:
        @memo.cache
        def load(this, x: int) -> int:
            return tally(x)

        @memo.cache
        @classmethod
        def make(klass, x: int) -> int:
            return tally(x)

    assert Service().load(1) == Service().load(1)
    assert Service.make(1) == Service().make(1)
    assert Service.make.is_cached(1)
    Service.make.invalidate(1)
    assert not Service.make.is_cached(1)


def test_assigned_to_a_class_later(tally: Tally) -> None:
    """A function that becomes a method after the class body is a method."""

    class Service:
        def __init__(self, number: int) -> None:
            self.number = number

    @memo.cache
    def load(this: Any, x: int) -> int:
        return tally(x)

    Service.load = load  # type: ignore[attr-defined]
    assert Service(1).load(1) == Service(2).load(1)  # type: ignore[attr-defined]
    assert tally.calls == [1]


@memo.cache
def shout(word: str) -> str:
    """Used as a default of a dataclass."""
    return word.upper()


@dataclasses.dataclass
class Settings:
    """Holds a cached function, which is not a method of it."""

    change: Callable[[str], str] = shout


def test_a_default_of_a_dataclass_is_no_method() -> None:
    """A cached function that is only an attribute of a class keeps all its arguments."""
    assert [Settings().change(word) for word in ("a", "b")] == ["A", "B"]
    assert shout.address("a") == "shout:a"


def test_a_function_called_as_a_method_of_a_number() -> None:
    """The value of `self` counts, whatever its type."""

    @memo.cache
    def double(self: Any) -> Any:
        return self * 2

    type("Holder", (), {"double": double})().double.address()  # it is a method now
    assert [double(1), double(2), double("a")] == [2, 4, "aa"]


def test_a_cached_function_below_keeps_its_own_options(tally: Tally) -> None:
    """Stacked decorators are two cached functions, also with another decorator in between."""

    def doubled(function: Any) -> Any:
        @functools.wraps(function)
        def wrapper(*args: Any) -> Any:
            return 2 * function(*args)

        return wrapper

    @memo.cache(ttl=5, name="outer")
    @memo.cache(ttl=60, name="inner")
    def load(x: int) -> int:
        return tally(x)

    @memo.cache
    @doubled
    @memo.cache
    def total(x: int) -> int:
        return x

    assert repr(load) == "<cached outer ttl=5.0>"
    assert load(1) == load(1) == 1
    assert [total(3), total(3), total(4)] == [6, 6, 8]


# --- other callables -----------------------------------------------------------------------------


class Tariff:
    """A class of the module, so that its methods have its name."""

    def __init__(self, rate: int) -> None:
        self.rate = rate

    def price(self, hours: int, extra: int = 0) -> int:
        return self.rate * hours + extra

    async def aprice(self, hours: int, extra: int = 0) -> int:
        return self.rate * hours + extra

    @memo.cache
    def cached(self, hours: int) -> int:
        return self.rate * hours


@kinds_of
def test_bound_method(is_async: bool) -> None:
    """A bound method is cached with all its arguments, and with the state of its object."""
    one, two = (memo.cache(t.aprice if is_async else t.price) for t in (Tariff(2), Tariff(3)))
    assert [settle(one(hours)) for hours in (1, 2, 1)] == [2, 4, 2]
    assert settle(two(1)) == 3
    assert one.address(1) == f"Tariff.{'aprice' if is_async else 'price'}:1:0"
    one.invalidate(1)
    assert not one.is_cached(1)
    assert one.is_cached(2)


@kinds_of
def test_partial(tally: Tally, is_async: bool) -> None:
    """A `functools.partial` is cached with what it binds as arguments."""

    def load(a: int, b: int) -> tuple[int, int, int]:
        return a, b, tally(a, b)

    async def aload(a: int, b: int) -> tuple[int, int, int]:
        return a, b, tally(a, b)

    base: Any = aload if is_async else load
    one, two = memo.cache(functools.partial(base, 1)), memo.cache(functools.partial(base, 2))
    by_name = memo.cache(functools.partial(base, b=5))
    assert settle(one(9)) == settle(one(9)) == (1, 9, 1)
    assert settle(two(9)) == (2, 9, 2)
    assert settle(one(b=9)) == (1, 9, 1)
    assert settle(by_name(7)) == settle(by_name(7)) == (7, 5, 3)
    assert asyncio.iscoroutinefunction(one) == is_async


@kinds_of
def test_callable_object(tally: Tally, is_async: bool) -> None:
    """An object with `__call__`, sync or async, can be decorated."""

    class Load:
        def __init__(self, factor: int) -> None:
            self.factor = factor

        def __call__(self, x: int) -> int:
            tally(x)
            return self.factor * x

    class AsyncLoad(Load):
        async def __call__(self, x: int) -> int:  # type: ignore[override]
            tally(x)
            return self.factor * x

    kind = AsyncLoad if is_async else Load
    f = memo.cache(kind(3))
    assert settle(f(2)) == settle(f(2)) == 6
    assert tally.calls == [2]
    g = memo.cache(kind(5))
    assert settle(g(2)) == 10
    h = memo.cache(functools.partial(kind(7), 2))
    assert settle(h()) == settle(h()) == 14
    assert tally.calls == [2, 2, 2]


def test_cached_methods_are_told_apart_by_their_objects() -> None:
    """The object of a bound cached method is an input, wherever a function has the method from."""

    def calling(method: Any) -> Any:
        return memo.cache(lambda hours: method(hours))

    two, three = Tariff(2), Tariff(3)
    for make in (calling, memo.cache, lambda method: memo.cache(functools.partial(method))):
        assert [make(tariff.cached)(5) for tariff in (two, three)] == [10, 15]
    held = calling(two.cached)
    assert held(1) == 2
    two.rate = 4
    assert held(1) == 4


class Counting:
    """A callable object that counts its calls, with a setting."""

    def __init__(self) -> None:
        self.rate, self.calls = 2, 0

    def __call__(self, x: int) -> int:
        self.calls += 1
        return self.rate * x

    def times(self, x: int) -> int:
        self.calls += 1
        return self.rate * x


@pytest.mark.filterwarnings("ignore:.*changes function.calls:UserWarning")
@pytest.mark.parametrize(
    "made", [lambda o: o, lambda o: o.times, functools.partial], ids=["object", "method", "partial"]
)
def test_the_state_of_a_callable_counts(made: Callable[[Any], Any]) -> None:
    """A changed attribute of a cached object is a miss; a counter that it moves itself is not."""
    counting = Counting()
    f = memo.cache(made(counting))
    assert [f(1), f(2), f(1), f(2)] == [2, 4, 2, 4]
    assert counting.calls == 2
    counting.rate = 5
    assert f(1) == 5


def test_attributes_set_on_a_cached_function_count() -> None:
    """They are read like those of other functions; a counter that the function moves is not one."""

    @memo.cache
    def scaled(x: int) -> int:
        counted.runs.append(x)  # type: ignore[attr-defined]
        return x * scaled.factor  # type: ignore[attr-defined, no-any-return]

    @memo.cache
    def counted(x: int) -> int:
        counted.runs.append(x)  # type: ignore[attr-defined]
        return x

    counted.runs = []  # type: ignore[attr-defined]
    results = []
    for factor in (2, 2, 3):
        scaled.factor = factor  # type: ignore[attr-defined]
        results.append(scaled(1))
    assert results == [2, 2, 3]
    assert counted(5) == counted(5) == 5
    assert counted.runs == [1, 1, 5]  # type: ignore[attr-defined]


def test_copies_of_a_cached_method_stay_bound() -> None:
    """A copy of a bound cached method is bound to the object, a deep copy to a copy of it."""
    tariff = Tariff(2)
    again, other = copy.copy(tariff.cached), copy.deepcopy([tariff.cached])[0]
    assert again.__self__ is tariff is not other.__self__
    assert again(3) == other(3) == 6


def test_lambdas_of_one_line_are_two_functions() -> None:
    """Two lambdas are told apart by their code."""
    f, g = memo.cache(lambda x: x + 1), memo.cache(lambda x: x + 2)
    assert (f(1), g(1), f(1)) == (2, 3, 2)


def _as_list(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(*args: Any) -> Any:
        return list(function(*args))

    return wrapper


def _blocking(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(*args: Any) -> Any:
        async def run() -> Any:
            return await function(*args)

        return asyncio.run(run())

    return wrapper


def _sum_as_async(function: Any) -> Any:
    @functools.wraps(function)
    async def wrapper(*args: Any) -> Any:
        return sum([item async for item in function(*args)])

    return wrapper


def _as_async(function: Any) -> Any:
    @functools.wraps(function)
    async def wrapper(*args: Any) -> Any:
        return function(*args)

    return wrapper


def _logged(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(*args: Any) -> Any:
        result = function(*args)
        return result  # noqa: RET504 - as people write it

    return wrapper


def _single(x: int) -> int:
    return x


async def _asingle(x: int) -> int:
    return x


def _items(x: int) -> Any:
    yield x


async def _aitems(x: int) -> Any:
    yield x


class _CallableItems:
    def __call__(self, x: int) -> Any:
        yield x


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (_as_list(_items), list),
        (_blocking(_asingle), int),
        (_logged(_blocking(_asingle)), int),
        (_sum_as_async(_aitems), types.CoroutineType),
        (_as_async(_single), types.CoroutineType),
        (_logged(_single), int),
        (_logged(_asingle), types.CoroutineType),
        (_logged(_items), types.GeneratorType),
        (_logged(_aitems), types.AsyncGeneratorType),
        (_CallableItems(), types.GeneratorType),
    ],
)
def test_a_decorator_below_decides_what_a_call_returns(function: Any, kind: type) -> None:
    """A cached function returns what the function returns, also if a wrapper has changed that."""
    f = memo.cache(function)
    for _ in range(2):
        got = f(1)
        assert isinstance(got, kind)
        if kind is types.CoroutineType:
            assert asyncio.run(got) == 1
        elif kind is types.AsyncGeneratorType:
            assert settle(_collected(got)) == [1]
        else:
            assert got == 1 if kind is int else list(got) == [1]
    assert f.is_cached(1)


def test_a_cached_context_manager_stays_one() -> None:
    """`@cache` over `@contextmanager` returns what that returns, which cannot be stored."""
    f, g = map(
        memo.cache, (contextlib.contextmanager(_items), contextlib.asynccontextmanager(_aitems))
    )

    async def entered() -> int:
        async with g(1) as got:
            return int(got)

    with pytest.warns(UserWarning, match="computed at each call"), f(1) as got:
        assert got == 1
    with pytest.warns(UserWarning, match="computed at each call"):
        assert asyncio.run(entered()) == 1


async def _collected(items: Any) -> list[Any]:
    return [item async for item in items]


def test_forms_of_entries_are_told_apart() -> None:
    """With a version of its own, a function may become a generator, or be cached by element."""

    def whole(x: Any) -> Any:
        return [x]

    def items(x: Any) -> Any:
        yield x

    def fixed(function: Any, **given: Any) -> Any:
        return memo.cache(name="fixed", version="1", **given)(function)

    assert list(fixed(items)(1)) == [1]
    assert fixed(whole)(1) == [1]
    assert list(fixed(items)(1)) == [1]
    assert fixed(lambda x: list(x), each="x")([1]) == [1]
    assert fixed(whole)(1) == [1]


def _rows() -> Any:
    yield 1


async def _arows() -> Any:
    yield 1


@pytest.mark.parametrize(
    "body", [_rows, _arows, functools.partial(_rows)], ids=["def", "async", "partial"]
)
def test_generators(body: Any) -> None:
    """A generator is cached item by item; nothing is invalidated after one, which has not run."""
    memo.cache(body)
    with pytest.raises(memo.OptionError, match="has not run when it returns"):
        memo.invalidate_cache(key_prefix="rows")(body)


@pytest.mark.parametrize(
    "body", [5, None, "load", property(lambda self: 1)], ids=["int", "none", "str", "property"]
)
def test_what_is_no_function_is_refused(body: Any) -> None:
    """The error says what to write."""
    with pytest.raises(memo.OptionError, match="must be a function"):
        memo.cache(ttl=5)(body)


async def test_sync_function_that_returns_an_awaitable(tally: Tally) -> None:
    """A coroutine is returned as it is, each time a fresh one; one warning says why."""

    async def work(x: int) -> int:
        return x

    class Picklable:
        def __await__(self) -> Any:
            yield from ()
            return 9

    @memo.cache
    def load(x: int) -> Any:
        tally(x)
        return work(x) if x else Picklable()

    with warnings.catch_warnings(record=True) as caught, recording() as seen:
        warnings.simplefilter("always")
        assert [await load(1), await load(1), await load(0), await load(0)] == [1, 1, 9, 9]
    assert tally.calls == [1, 1, 0]
    mine = [str(w.message) for w in caught if "awaited only once" in str(w.message)]
    assert len(mine) == 1
    assert "load" in mine[0]
    assert "async def" in mine[0]
    assert [event.kind for event in seen].count(events.STORED) == 1


def test_sync_function_that_returns_a_generator(tally: Tally) -> None:
    """An iterator is never returned exhausted: each caller gets its own."""

    @memo.cache
    def load() -> Any:
        tally(0)
        return (x for x in range(3))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert [list(load()), list(load())] == [[0, 1, 2]] * 2
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(lambda _: list(load()), range(4))) == [[0, 1, 2]] * 4
    assert len([w for w in caught if "cannot be pickled" in str(w.message)]) == 1


def test_it_looks_like_what_it_decorates() -> None:
    """Name, docstring, signature, module and kind are the function's own."""

    @memo.cache(ttl=5)
    async def load(x: int, *, y: str = "a") -> float:
        """Load it."""
        return 1.0

    assert load.__name__ == "load"
    assert load.__doc__ == "Load it."
    assert load.__module__ == __name__
    assert str(inspect.signature(load)) == "(x: 'int', *, y: 'str' = 'a') -> 'float'"
    assert inspect.iscoroutinefunction(load.__wrapped__)
    assert asyncio.iscoroutinefunction(load)
    assert "load" in repr(load)
    assert "ttl=5" in repr(load)


# --- helpers of a decorated function --------------------------------------------------------------


def loader(tally: Tally, is_async: bool, **options: Any) -> Any:
    if is_async:

        @memo.cache(**options)
        async def aload(x: int, y: int = 0) -> list[int]:
            await asyncio.sleep(0)
            return [tally(x, y)]

        return aload

    @memo.cache(**options)
    def load(x: int, y: int = 0) -> list[int]:
        return [tally(x, y)]

    return load


def check_helpers(f: Any, call: Any) -> None:
    assert f.peek(1) is None
    assert f.peek(1, default=[0]) == [0]
    assert not f.is_cached(1)
    assert f.refresh(1) == [1]
    assert f.refresh(1) == [2]
    assert f.peek(1) == [2]
    assert f.peek(x=1, y=0) == [2]
    assert f.is_cached(1)
    assert f.key(1) == f.key(1, 0) == f.key(y=0, x=1)
    assert len(f.key(1)) == 40
    assert call(1) == [2]
    info = f.cache_info()
    assert (info.hits, info.misses) == (1, 0)
    assert call(5) == [3]
    assert f.cache_info() == (1, 1, None, 2)
    f.invalidate(5)
    assert f.cache_info() == (1, 1, None, 1)
    outcome = f.invalidate(y=0)
    assert outcome.complete
    assert outcome.tiers
    assert not f.is_cached(1)
    assert not f.is_cached(5)
    assert call(1) == [4]
    f.cache_clear()
    assert not f.is_cached(1)
    assert f.cache_info()[:2] == (0, 0)


def test_the_size_of_the_cache_is_what_may_answer() -> None:
    """`currsize` counts no entry that was invalidated by its tag, has expired or has other code."""

    def loads(version: str) -> Any:
        return memo.cache(name="tests:sized", version=version, ttl=60, tags=["t:{x}"])(lambda x: x)

    load = loads("1")
    load(1), load(2), load(3)
    assert load.cache_info().currsize == 3
    memo.invalidate(tag="t:1")
    load.expire(2)
    assert load.cache_info().currsize == 1
    edited = loads("2")
    edited(9)
    assert edited.cache_info().currsize == 1


async def test_arguments_called_like_an_option_of_a_helper(tally: Tally) -> None:
    """If the function itself has a `reason` or a `default`, helpers take it for an argument."""

    @memo.cache
    def get(name: str, default: int = 0, reason: str = "") -> str:
        return f"{name} {default} {reason}"

    get("a"), get("a", 5), get("a", reason="audit")
    assert get.peek("a", default=5) == await get.apeek("a", default=5) == "a 5 "
    assert get.peek("a", default=6) is None
    assert get.peek("b") is None
    get.invalidate(reason="audit")
    assert [get.is_cached("a"), get.is_cached("a", reason="audit")] == [True, False]
    await get.ainvalidate(default=5)
    assert [get.is_cached("a"), get.is_cached("a", 5)] == [True, False]


@kinds_of
def test_looking_loads_nothing(tally: Tally, is_async: bool) -> None:
    """`is_cached` and `key` neither compute nor load the value; `__wrapped__` asks no cache."""
    f = loader(tally, is_async)
    settle(f(1))
    memo.decorators.assembly.reset()
    with calls_of(codec.unpickled) as loaded, recording() as seen:
        assert f.is_cached(1)
        assert not f.is_cached(2)
        f.key(1)
    assert seen == loaded == []
    assert settle(f.__wrapped__(1)) == [2]
    assert settle(f(1)) == [1]


@kinds_of
def test_helpers_outside_a_loop(tally: Tally, is_async: bool) -> None:
    """`refresh`, `peek`, `is_cached`, `key`, `invalidate`, `cache_info`, `cache_clear`, at once."""
    f = loader(tally, is_async)
    check_helpers(f, lambda x: settle(f(x)))


@kinds_of
async def test_helpers_inside_a_running_loop(tally: Tally, is_async: bool) -> None:
    """The same calls work inside a running loop, on sync and async functions alike."""
    f = loader(tally, is_async)

    def call(x: int) -> Any:
        if not is_async:
            return f(x)
        with ThreadPoolExecutor(1) as pool:  # the loop waits, as it does for the helpers
            return pool.submit(asyncio.run, f(x)).result()

    check_helpers(f, call)


@kinds_of
async def test_awaitable_helpers(tally: Tally, is_async: bool) -> None:
    """Each helper that may wait has an awaitable twin."""
    f = loader(tally, is_async)
    assert await f.apeek(1, default=[0]) == [0]
    assert not await f.ais_cached(1)
    assert await f.arefresh(1) == [1]
    assert await f.arefresh(1) == [2]
    assert await f.apeek(1) == [2]
    assert await f.ais_cached(1)
    assert await f.akey(1) == f.key(1)
    assert await f.aaddress(1) == f.address(1)
    assert await f.acache_info() == f.cache_info()
    assert (await f.ainvalidate(x=1)).complete
    assert not await f.ais_cached(1)
    await f.arefresh(1)
    await f.acache_clear()
    assert not await f.ais_cached(1)


@kinds_of
async def test_arefresh_does_not_block_the_loop(tally: Tally, is_async: bool) -> None:
    """The loop goes on while `arefresh` computes."""
    begun, go = threading.Event(), threading.Event()

    @memo.cache(version="1")
    def slow() -> bool:
        begun.set()
        return go.wait(20)

    @memo.cache(version="1")
    async def aslow() -> bool:
        begun.set()
        return await asyncio.to_thread(go.wait, 20)

    f = aslow if is_async else slow
    task = asyncio.create_task(f.arefresh())
    await await_until(begun.is_set)
    go.set()
    assert await task, "the loop went on only when it had ended"


@kinds_of
def test_errors_of_a_refresh_reach_the_caller(is_async: bool) -> None:
    """`refresh` raises what the function raises, and the old value stays."""
    state = {"fail": False}
    lock = threading.Lock()

    class Source:
        def __init__(self) -> None:
            self.lock = lock

        def load(self) -> str:
            if state["fail"]:
                raise LookupError("mine")
            return "old"

    source = Source()

    @memo.cache(version="1")
    def load() -> str:
        return source.load()

    @memo.cache(version="1")
    async def aload() -> str:
        return source.load()

    f: Any = aload if is_async else load
    settle(f())
    state["fail"] = True
    with pytest.raises(LookupError, match="mine"):
        f.refresh()
    assert f.peek() == "old"


@kinds_of
def test_disabled_helpers(tally: Tally, is_async: bool) -> None:
    """With `enabled=False` the helpers neither read nor store."""
    f = loader(tally, is_async)
    settle(f(1))
    with memo.configure(enabled=False):
        assert f.peek(1) is None
        assert not f.is_cached(1)
        assert f.refresh(1) == [2]
        assert asyncio.run(f.arefresh(1)) == [3]
        assert asyncio.run(f.apeek(1)) is None
        assert not asyncio.run(f.ais_cached(1))
    assert f.peek(1) == [1]


def test_wrong_arguments_are_a_type_error(tally: Tally) -> None:
    """Arguments that do not fit are the function's own TypeError."""
    f = loader(tally, False)
    with pytest.raises(TypeError, match=r"missing|required"):
        f()
    with pytest.raises(TypeError, match="z"):
        f.peek(1, z=5)
    with pytest.raises(memo.OptionError, match="z"):
        f.invalidate(z=5)


# --- recursion -----------------------------------------------------------------------------------


def seconds_to_error(call: Any) -> float:
    begun = time.perf_counter()
    with pytest.raises(memo.ReentryError, match="own result"):
        call()
    return time.perf_counter() - begun


@styles
def test_reentry_within_100_ms(style: Style) -> None:
    """A computation that asks for its own result gets a typed error within 100 ms."""

    def load(x: int) -> Any:
        return (yield f(x))

    f = style.cached(load)
    settled = style.cached(lambda: 1)
    style.call(settled)  # late imports are done
    assert min(seconds_to_error(lambda i=i: style.call(f, i)) for i in range(3)) < 0.1


FIRST_CALL = """
import asyncio, sys, time, memo
memo.configure(directory=sys.argv[1])
def check(begun, error):
    print(type(error).__name__, time.process_time() - begun < 0.1)
@memo.cache
def load(x):
    begun = time.process_time()
    try:
        return load(x)
    except Exception as error:
        check(begun, error)
@memo.cache(use_lock=True)
async def aload(x):
    begun = time.process_time()
    try:
        return await aload(x)
    except Exception as error:
        check(begun, error)
load(1) if sys.argv[2] == "sync" else asyncio.run(aload(1))
"""


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_reentry_in_the_first_call_on_a_busy_machine(kind: str, tmp_path: Path) -> None:
    """The error takes at most 100 ms of the process's time, and is no matter of waiting."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(4)]
    try:
        command = [sys.executable, "-c", FIRST_CALL, tmp_path, kind]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert done.stdout == "ReentryError True\n", done.stderr


@styles
def test_reentry_across_two_functions(style: Style) -> None:
    """A asks for B, which asks for A: the same error, at once."""

    def first(x: int) -> Any:
        return (yield b(x))

    def second(x: int) -> Any:
        return (yield a(x))

    a, b = style.cached(first, version="1"), style.cached(second, version="1")
    style.call(style.cached(lambda: 1))
    assert min(seconds_to_error(lambda i=i: style.call(a, i)) for i in range(3)) < 0.1


@styles
def test_reentry_through_refresh(style: Style) -> None:
    """A computation that refreshes itself gets the error too, and not a stack overflow."""

    def load(x: int) -> Any:
        return f.refresh(x) if not style.is_async else (yield f.arefresh(x))

    f = style.cached(load, version="1") if style.is_async else memo.cache(version="1")(_refreshing)
    seconds_to_error(lambda: style.call(f, 1))


def _refreshing(x: int) -> Any:
    return next(f for f in memo.functions() if f.__wrapped__ is _refreshing).refresh(x)


def test_reentry_across_threads() -> None:
    """Two threads whose computations wait for each other: one gets the error, neither hangs."""
    barrier = threading.Barrier(2, timeout=5)

    @memo.cache(version="1")
    def a(x: int) -> str:
        barrier.wait()
        return f"a({b(x)})"

    @memo.cache(version="1")
    def b(x: int) -> str:
        if not barrier.broken and threading.current_thread().name.startswith("b"):
            barrier.wait()
        return f"b({a(x)})"

    def call(f: Any, x: int) -> Any:
        threading.current_thread().name = f.__name__
        try:
            return f(x)
        except memo.ReentryError as error:
            return error

    for x in range(20):
        barrier.reset()
        with ThreadPoolExecutor(2) as pool:
            futures = [pool.submit(call, f, x) for f in (a, b)]
            results = [future.result(5) for future in futures]
        assert any(isinstance(result, memo.ReentryError) for result in results)


def test_reentry_in_a_chain_of_threads() -> None:
    """A thread leads two nested computations, another one waits for the outer: no deadlock."""
    inner_runs, outer_waits = threading.Event(), threading.Event()

    @memo.cache(version="1")
    def outer() -> Any:
        return middle()

    @memo.cache(version="1")
    def middle() -> Any:
        inner_runs.set()
        assert outer_waits.wait(5)
        until(lambda: any(flight.waiters for flight in FLIGHTS.joinable_flights()))
        return other()

    @memo.cache(version="1")
    def other() -> Any:
        assert inner_runs.wait(5)
        outer_waits.set()
        return outer()

    def call(f: Any) -> Any:
        try:
            return f()
        except memo.ReentryError as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        results = [task.result(5) for task in [pool.submit(call, outer), pool.submit(call, other)]]
    assert any(isinstance(result, memo.ReentryError) for result in results)


def test_reentry_in_a_thread_that_shares_the_context() -> None:
    """In a thread of `asyncio.to_thread`, which has the context, it is noticed too."""

    @memo.cache(version="1")
    async def load(x: int) -> Any:
        return await asyncio.to_thread(asyncio.run, load(x))

    seconds_to_error(lambda: asyncio.run(load(1)))


async def test_no_false_alarm_among_siblings(tally: Tally) -> None:
    """Two branches of one computation may want the same: they share it."""

    @memo.cache(version="1")
    async def leaf(x: int) -> int:
        await joined(3)
        return tally(x)

    @memo.cache(version="1")
    async def branch(x: int) -> int:
        return await leaf(0)

    @memo.cache(version="1")
    async def root() -> list[int]:
        return await asyncio.gather(branch(1), branch(2), leaf(0), leaf(0))

    assert await root() == [1, 1, 1, 1]
    assert tally.calls == [0]


@kinds_of
def test_depth_500(is_async: bool) -> None:
    """Cached recursion with other arguments works to depth 500, and each level is stored."""

    @memo.cache
    def depth(n: int) -> int:
        return 0 if n == 0 else 1 + depth(n - 1)

    @memo.cache
    async def adepth(n: int) -> int:
        return 0 if n == 0 else 1 + await adepth(n - 1)

    f: Any = adepth if is_async else depth
    with recording() as seen:
        assert settle(f(500)) == 500
    assert f.is_cached(250)
    assert Counter(event.kind for event in seen)[events.COMPUTED] == 501


async def test_first_calls_that_are_gathered_leave_the_loop_free() -> None:
    """The code of one function is read at a time: other tasks run in between."""
    from memo.keys.fingerprint import reachable

    rounds, read = [0], []
    loop = asyncio.get_running_loop()

    def turn() -> None:
        rounds[0] += 1
        ticking[0] = loop.call_soon(turn)

    loads = []
    for number in range(12):

        async def load(x: int) -> int:
            return x

        loads.append(memo.cache(load, name=f"load {number}"))
    ticking = [loop.call_soon(turn)]
    try:
        with calls_of(reachable.survey, then=lambda: read.append(rounds[0])):
            made = await asyncio.gather(*(load(x) for x, load in enumerate(loads)))
        assert made == list(range(12))
    finally:
        ticking[0].cancel()
    assert len(read) == len(set(read)) == 12
