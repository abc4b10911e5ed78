"""No call of the invalidation family claims to have dropped something that was not there."""

from __future__ import annotations

import asyncio
import gc
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell
from providers import InADict
from redis_server import RedisServer
from traitlets.config import Config

import memo
from memo.cli.commands import main
from memo.runtime.blocking import drain_blocking

HIT = "1 entry on this host"
MISSED = "nothing matched"


@pytest.fixture(autouse=True, scope="module")
def _no_other_providers() -> None:
    """Functions of other tests are freed: `memo clear` searches their providers as well."""
    gc.collect()


@pytest.fixture(autouse=True)
def _time_to_count(set_limits: Callable[..., None]) -> None:
    """Counting is not cut short on a busy machine, which the answer would say."""
    set_limits(counting_seconds=10.0)


def run(value: Any) -> Any:
    """The result of a call, be it of an `async def`."""
    return asyncio.run(value) if inspect.iscoroutine(value) else value


def answer(call: Callable[[], Any]) -> str:
    """The outcome of a call as text: its answer, its error, or its warnings."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            said = repr(run(call()))
        except (memo.MemoError, UsageError) as error:
            said = f"error: {error}"
    return "\n".join([said, *(str(one.message) for one in told)])


def says_so(said: str) -> bool:
    """True if an answer tells that nothing was dropped."""
    return (MISSED in said or said.startswith("error: ")) and HIT not in said


# --- module level and the command line ------------------------------------------------------------


def clear(**target: str) -> str:
    """`memo clear`, which ends with the status 1, or with an error, where nothing matched."""
    [(name, value)] = target.items()
    done = CliRunner().invoke(main, ["clear", f"--{name}", value])
    assert (done.exit_code == 0) == (HIT in done.output), done.output
    if done.output.startswith("Error: "):
        raise memo.MemoError(done.output)
    return done.output


CALLS: dict[str, Callable[..., Any]] = {
    "invalidate": memo.invalidate,
    "ainvalidate": memo.ainvalidate,
    "expire": memo.expire,
    "aexpire": memo.aexpire,
    "memo clear": clear,
}
TARGETS: dict[str, tuple[Callable[[Any], str], list[str]]] = {
    "prefix": (lambda f: "products", ["product", "Products", "products:42:1", "load"]),
    "tag": (lambda f: "sales", ["sale", "products", "sales:1"]),
    "function": (lambda f: f.function_id, ["laod", "shop:laod", "shop"]),
    "key": (lambda f: f.address(42), ["products:43", "products", "products:42:", "42"]),
    "key as of f.key": (lambda f: f.key(42), ["0" * 40]),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("call", CALLS)
def test_a_target_that_fits_nothing_is_told(call: str, target: str) -> None:
    """A typo, another case, another form or the name of something else: nothing was dropped."""

    @memo.cache(name="shop:load", ttl=None, key_prefix="products", tags=["sales"])
    def load(product: int) -> int:
        return product

    load(42)
    right, wrong = TARGETS[target]
    name = target.partition(" ")[0]
    for one in wrong:
        said = answer(lambda one=one: CALLS[call](**{name: one}))
        assert says_so(said), f"{name}={one!r}: {said}"
        assert load.is_cached(42)
    assert HIT in answer(lambda: CALLS[call](**{name: right(load)}))
    assert not load.is_cached(42)
    said = answer(lambda: CALLS[call](**{name: right(load)}))
    assert says_so(said), f"it was dropped already: {said}"


# --- on functions ---------------------------------------------------------------------------------


def _function() -> Any:
    @memo.cache(ttl=None)
    def f(x: int) -> int:
        return x

    return f


def _coroutine() -> Any:
    @memo.cache(ttl=None)
    async def f(x: int) -> int:
        return x

    return f


def _stream() -> Any:
    @memo.cache(ttl=None)
    def f(x: int) -> Iterator[int]:
        yield x

    return f


def _elements() -> Any:
    @memo.cache(ttl=None, each="x")
    def f(x: list[int]) -> list[int]:
        return list(x)

    return f


class Service:
    """Methods of every kind."""

    @memo.cache(ttl=None)
    def method(self, x: int) -> int:
        return x

    @memo.cache(ttl=None)
    async def amethod(self, x: int) -> int:
        return x

    @memo.cache(ttl=None)
    @classmethod
    def of_class(cls, x: int) -> int:
        return x

    @memo.cache(ttl=None)
    @staticmethod
    def static(x: int) -> int:
        return x

    @memo.cache(ttl=None, key_resolver="{x}")
    def resolved(self, x: int) -> int:
        return x


FUNCTIONS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "function": lambda: (f := _function(), f),
    "coroutine": lambda: (f := _coroutine(), f),
    "stream": lambda: (f := _stream(), lambda x: list(f(x))),
    "elements": lambda: (f := _elements(), lambda x: f([x])),
    "bound method": lambda: (f := Service().method, f),
    "bound coroutine": lambda: (f := Service().amethod, f),
    "method of a class": lambda: (Service.method, Service().method),
    "class method": lambda: (Service.of_class, Service.of_class),
    "static method": lambda: (Service.static, Service.static),
    "template": lambda: (Service().resolved, Service().resolved),
    "template of a class": lambda: (Service.resolved, Service().resolved),
}


@pytest.mark.parametrize("verb", ["invalidate", "ainvalidate", "expire", "aexpire"])
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_arguments_that_fit_nothing_are_told(kind: str, verb: str) -> None:
    """Other values, another type, an unknown name; and everything, once all is dropped."""
    function, call = FUNCTIONS[kind]()
    drop = getattr(function, verb)
    run(call(42))
    values: list[Any] = [[[43]], [["42"]]] if kind == "elements" else [[43], ["42"], [[42]]]
    for given in values:
        said = answer(lambda given=given: drop(*given))
        assert says_so(said), f"{given}: {said}"
    for wrong in ({"y": 42}, {"x": lambda x: x == 42}):
        assert answer(lambda wrong=wrong: drop(**wrong)).startswith("error: ")
    assert HIT in answer(lambda: drop([42] if kind == "elements" else 42))
    assert says_so(answer(drop))


def test_a_wrong_name_is_told_at_the_call() -> None:
    """`obj.f.ainvalidate(y=1)` raises before it is awaited, outside of any event loop as well."""
    for verb in ("ainvalidate", "aexpire"):
        with pytest.raises(memo.OptionError, match="'y'"):
            getattr(Service().amethod, verb)(y=1)


# --- circumstances --------------------------------------------------------------------------------


Server = Callable[[], RedisServer]


def _bundled(stack: ExitStack, load: Any, tmp_path: Path, _: Server) -> None:
    with memo.configure(directory=tmp_path / "elsewhere"):
        load(42)
        made = memo.export_bundle(tmp_path / "some.memo")
    bundle = memo.Bundle(tmp_path / "some.memo", key=made.key)
    stack.enter_context(memo.configure(tiers=["memory", "disk", bundle]))


def _redis(stack: ExitStack, load: Any, _: Path, server: Server) -> None:
    stack.enter_context(memo.configure(redis_url=server().url, deadline=5))


def _redis_gone(stack: ExitStack, load: Any, _: Path, server: Server) -> None:
    stack.enter_context(memo.configure(redis_url=server().url))
    load(42)
    server().kill()


def _memory(stack: ExitStack, *_: Any) -> None:
    stack.enter_context(memo.configure(tiers=["memory"]))


def _custom(stack: ExitStack, *_: Any) -> None:
    stack.enter_context(memo.configure(tiers=["memory", InADict()]))


def _off(stack: ExitStack, load: Any, *_: Any) -> None:
    load(42)
    stack.enter_context(memo.mode("off"))


def _disabled(stack: ExitStack, load: Any, *_: Any) -> None:
    load(42)
    stack.enter_context(memo.configure(enabled=False))


PLACES: dict[str, Callable[..., None]] = {
    "bundle": _bundled,
    "redis": _redis,
    "redis gone": _redis_gone,
    "memory": _memory,
    "custom": _custom,
    "off": _off,
    "disabled": _disabled,
}


@pytest.mark.parametrize("place", PLACES)
def test_every_place_tells(place: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Tiers of every kind, without Redis, and while the cache is off."""

    @memo.cache(name="shop:load", version="1", ttl=None, key_prefix="products", tags=["sales"])
    def load(product: int) -> int:
        return product

    def server() -> RedisServer:
        return request.getfixturevalue("redis_server")  # type: ignore[no-any-return]

    for drop, wrong in (
        (lambda: memo.invalidate(prefix="products"), lambda: memo.invalidate(prefix="product")),
        (lambda: load.invalidate(42), lambda: load.invalidate("42")),
        (lambda: memo.invalidate(key=load.key(42)), lambda: memo.invalidate(key="0" * 40)),
        (lambda: memo.expire(tag="sales"), lambda: memo.expire(tag="sale")),
    ):
        with ExitStack() as stack:
            PLACES[place](stack, load, tmp_path, server)
            load(42)
            drain_blocking(10)
            assert says_so(answer(wrong)), answer(wrong)
            assert HIT in answer(drop)
            assert says_so(answer(drop))
            if place == "redis gone":
                assert "journalled" in answer(drop)
                server().restart()


# --- invalidate_cache and the magics --------------------------------------------------------------

DECORATED: dict[str, dict[str, Any]] = {
    "prefix": {"key_prefix": "product"},
    "prefix and template": {"key_prefix": "product", "key_resolver": "{product}"},
    "template": {"key_resolver": "product:{product}"},
    "callable": {"key_prefix": "product", "key_resolver": lambda product: product},
    "tag": {"tags": ["sale"]},
}


@pytest.mark.parametrize("how", DECORATED)
@pytest.mark.parametrize("is_async", [False, True])
def test_a_decorator_that_fits_nothing_warns(how: str, is_async: bool) -> None:
    """A prefix, an address or a tag that nothing has: one warning that names what there is."""

    @memo.cache(name="shop:load", ttl=None, key_prefix="products", tags=["sales"])
    def load(product: int) -> int:
        return product

    def update(product: int) -> None: ...
    async def aupdate(product: int) -> None: ...

    load(42)
    written = memo.invalidate_cache(**DECORATED[how])(aupdate if is_async else update)
    said = "".join(answer(lambda: written(42)) for _ in range(8))
    assert load.is_cached(42)
    assert said.count(MISSED) == 1, said
    assert "products" in said or "sales" in said


MAGICS = ["load --where product=43", "load --where product='42'", "laod", "--tag sale", "sho*x"]


@pytest.mark.parametrize("line", MAGICS)
def test_a_magic_that_fits_nothing_says_so(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`%cache_clear` with another value, name or tag."""

    @memo.cache(name="shop:load", ttl=None, tags=["sales"])
    def load(product: int) -> int:
        return product

    load(42)
    shell = InteractiveShell(config=Config({"HistoryManager": {"enabled": False}}))
    memo.load_ipython_extension(shell)
    try:
        said = answer(lambda: shell.run_line_magic("cache_clear", line))
    finally:
        memo.unload_ipython_extension(shell)
    said = said if said.startswith("error: ") else capsys.readouterr().out
    assert says_so(said), said
    assert load.is_cached(42)
