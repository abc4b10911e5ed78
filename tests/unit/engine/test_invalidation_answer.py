"""The answer of an invalidation: what it hit, or which name was probably meant."""

from __future__ import annotations

import asyncio
import functools
import re
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from click.testing import CliRunner
from inner_faults import failing
from inside import inside
from providers import InADict
from redis_server import RedisServer

import memo
from memo import NothingMatchedError, OptionError, cache, invalidate_cache
from memo.cli.commands import main
from memo.engine import invalidating
from memo.metrics import rendering
from memo.runtime.blocking import BLOCKING, drive

chains = pytest.mark.parametrize("where", ["disk", "redis"])


@contextmanager
def place(where: str, request: pytest.FixtureRequest) -> Iterator[None]:
    """Disk alone, or Redis over disk."""
    if where == "disk":
        yield
        return
    server: RedisServer = request.getfixturevalue("redis_server")
    with memo.configure(redis_url=server.url, deadline=5):
        yield


def loads(name: str = "shop:load_rows", **options: Any) -> Any:
    @cache(name=name, version="1", **{"ttl": None, **options})
    def load(region: str, year: int = 2024) -> str:
        return f"{region} {year}"

    return load


def aloads(name: str = "shop:aload_rows", **options: Any) -> Any:
    @cache(name=name, version="1", **{"ttl": None, **options})
    async def load(region: str, year: int = 2024) -> str:
        return f"{region} {year}"

    return load


@chains
def test_the_answer_counts_what_it_hit(where: str, request: pytest.FixtureRequest) -> None:
    """`.matched` is the number of valid entries, and the repr says it with the tiers."""
    with place(where, request):
        load = loads()
        for year in (2022, 2023, 2024):
            load("EU", year), load("US", year)
        done = load.invalidate(region="EU")
        assert done.matched == 3
        tiers = "memory: done, redis: done, disk: done"
        tiers = tiers if where == "redis" else "memory: done, disk: done"
        assert (
            repr(done)
            == f"invalidated shop:load_rows(region='EU'): 3 entries on this host ({tiers})"
        )
        assert load.invalidate(region="EU").matched == 0, "they are invalid already"
        assert load.invalidate("US", 2024).matched == 1
        assert load.invalidate().matched == 2


async def test_the_answer_of_a_coroutine_counts_too() -> None:
    """`await f.ainvalidate()` and `await memo.ainvalidate()` say the same."""
    load = aloads(tags=["sales"])
    await asyncio.gather(load("EU"), load("US"))
    assert (await load.ainvalidate("EU")).matched == 1
    assert (await memo.ainvalidate(tag="sales")).matched == 1


@chains
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"prefix": "product"}, "nothing matched prefix 'product'; did you mean 'products'?"),
        ({"tag": "sale"}, "nothing matched tag 'sale'; did you mean 'sales'?"),
        ({"key": "products:EV:2024"},
         "nothing matched key 'products:EV:2024'; did you mean 'products:EU:2024'?"),
        ({"prefix": "zzz"}, "nothing matched prefix 'zzz'"),
    ],
    ids=["prefix", "tag", "key", "nothing near"],
)  # fmt: skip
def test_nothing_matched_is_said(
    where: str, request: pytest.FixtureRequest, wrong: dict[str, str], said: str
) -> None:
    """A target that matches nothing says so, names the nearest, and raises with `strict=True`."""
    with place(where, request):
        load = loads(key_prefix="products", tags=["sales"])
        load("EU")
        done = memo.invalidate(**wrong)
        start, semicolon, near = said.partition(";")
        beyond = " on this host; entries that are only in Redis were invalidated uncounted"
        start += beyond * (where == "redis")
        assert (done.matched, repr(done)) == (0, f"{start}{semicolon}{near}")
        with pytest.raises(NothingMatchedError) as caught:
            memo.invalidate(**wrong, strict=True)
        assert str(caught.value) == said, "Redis was searched"
        assert caught.value.outcome.complete, "the tiers were told all the same"
        assert load.is_cached("EU")
        right = {"prefix": "products", "tag": "sales", "key": load.address("EU")}
        name = next(iter(wrong))
        assert memo.invalidate(**{name: right[name]}, strict=True).matched == 1


def test_a_wrong_type_is_named() -> None:
    """A text for an argument that is annotated `int` is named in the answer."""
    load = loads()
    load("EU", 2024)
    done = load.invalidate(year="2024")
    assert done.matched == 0
    assert "year='2024' is a str, but is annotated int" in repr(done)
    assert load.invalidate(year=2024).matched == 1


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"days": "1"}, "days='1' is a str, but is annotated list[int]"),
        ({"days": (1,)}, "days=(1,) is a tuple, but is annotated list[int]"),
        ({"year": "1"}, "year='1' is a str, but is annotated Annotated[int, 'a year']"),
        ({"kind": 1}, "kind=1 is an int, but is annotated Literal['a', 'b']"),
    ],
)
def test_a_wrong_type_of_a_composed_annotation_is_named(wrong: Any, named: str) -> None:
    """So is one of a generic type, an `Annotated` and a `Literal`; a right one is not."""

    @cache(name="tests:composed")
    def load(
        days: list[int], year: Annotated[int, "a year"] = 1, kind: Literal["a", "b"] = "a"
    ) -> int:
        return 1

    assert repr(load.invalidate(**wrong)).endswith(f"; {named}")
    right = repr(load.invalidate(days=[1], year=1, kind="b"))
    assert right == "nothing matched tests:composed(days=[1], year=1, kind='b')"


def test_the_object_of_a_method_is_no_argument() -> None:
    """Naming it where entries of all objects are invalidated is an error that says what to do."""

    class Client:
        @cache
        def get(self, x: int) -> int:
            return x

    with pytest.raises(OptionError, match="call the helper on it instead"):
        Client.get.invalidate(self=Client(), x=1)


def test_a_function_is_no_predicate() -> None:
    """A function as a value selects nothing, so it is refused and nothing is dropped."""
    load = loads()
    load("EU")
    for how in (load.invalidate, load.expire):
        with pytest.raises(OptionError, match=r"region=.*predicates are not supported"):
            how(region=lambda region: region == "EU")
    assert load.is_cached("EU")


class Predicates:
    """A class with a cached method."""

    @cache
    def holds(self, region: str) -> bool:
        return region == "EU"


def test_a_partial_function_is_no_predicate_either() -> None:
    """Objects made of a function are refused as well: a `partial`, a cached function or method."""
    load = loads()
    load("EU")
    for predicate in (functools.partial(str.startswith, "E"), loads(), Predicates().holds):
        with pytest.raises(OptionError, match=r"region=.*predicates are not supported"):
            load.invalidate(region=predicate)
    assert load.is_cached("EU")


def test_a_positional_only_argument_is_named() -> None:
    """Arguments that a call gives by position only select entries by name, as all others do."""

    @cache(name="shop:prices", version="1")
    def prices(region: str, year: int, /, unit: str = "EUR") -> str:
        return f"{region} {year} {unit}"

    prices("EU", 2023), prices("EU", 2024), prices("US", 2024)
    assert prices.invalidate(year=2024).matched == 2
    assert prices.is_cached("EU", 2023)
    prices("US", 2024)

    @invalidate_cache(functions=[prices], match=["region"])
    def update(region: str) -> None: ...

    update("EU")
    assert not prices.is_cached("EU", 2023)
    assert prices.is_cached("US", 2024), "of another region"


# --- names ---------------------------------------------------------------------------------------


@chains
@pytest.mark.parametrize("name", ["shop:shown_by_name", "shown_by_name"])
def test_a_function_by_the_name_that_is_shown(
    where: str, request: pytest.FixtureRequest, name: str
) -> None:
    """`function=` takes the identity and the short name."""
    with place(where, request):
        load = loads("shop:shown_by_name")
        load("EU")
        assert memo.invalidate(function=name).matched == 1
        assert not load.is_cached("EU")


def test_an_unknown_or_ambiguous_name_is_an_error() -> None:
    """An unknown name lists the nearest, an ambiguous one what it could be; nothing is dropped."""
    one, other = loads("shop:load_rows"), loads("store:load_rows")
    one("EU"), other("EU")
    with pytest.raises(
        OptionError, match=r"function='shop:laod_rows'.*did you mean 'shop:load_rows'"
    ):
        memo.invalidate(function="shop:laod_rows")
    with pytest.raises(OptionError, match=r"function='load_rows'.*shop:load_rows.*store:load_rows"):
        memo.invalidate(function="load_rows")
    assert one.is_cached("EU")
    assert other.is_cached("EU")
    assert set(memo.stats().functions) <= {"shop:load_rows", "store:load_rows"}, "no phantom rows"


def test_a_function_of_another_process_is_known_by_its_name() -> None:
    """A function that another process cached here can be named without importing it."""
    code = (
        "import memo\n"
        "@memo.cache(ttl=None, name='jobs:nightly', tags=['sales'])\n"
        "def f(x): return x\n"
        "f(1), f(2)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert memo.invalidate(function="nightly").matched == 2
    assert memo.invalidate(tag="sales").matched == 0


@chains
def test_a_key_invalidates_its_call(where: str, request: pytest.FixtureRequest) -> None:
    """`key=` takes what `f.key(...)` gave, and drops exactly that call."""
    with place(where, request):
        load = loads()
        load("EU"), load("US")
        assert memo.invalidate(key=load.key("EU")).matched == 1
        assert (load.is_cached("EU"), load.is_cached("US")) == (False, True)


def test_a_key_of_another_process(cache_home: Any) -> None:
    """A key that another process printed is found by its entry."""
    code = (
        "import memo\n"
        "@memo.cache(ttl=None, name='jobs:keyed')\n"
        "def f(x): return x\n"
        "f(1); print(f.key(1))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert memo.invalidate(key=done.stdout.strip()).matched == 1
    assert memo.invalidate(key="0" * 40).matched == 0


@chains
def test_an_unknown_key_says_what_it_cannot_find(
    where: str, request: pytest.FixtureRequest
) -> None:
    """On hosts that share a Redis, calls that another host computes are not known by their keys."""
    with place(where, request):
        said = repr(memo.invalidate(key="0" * 40))
    assert ("another host is computing now" in said) == (where == "redis")
    assert said.startswith(f"nothing matched key '{'0' * 40}'")


TARGETS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "prefix": lambda load: {"prefix": "products"},
    "tag": lambda load: {"tag": "sales"},
    "function": lambda load: {"function": load},
    "address": lambda load: {"key": load.address("EU")},
    "key": lambda load: {"key": load.key("EU")},
}


@pytest.mark.parametrize("target", TARGETS)
def test_entries_that_only_redis_has(
    target: str, tmp_path: Path, redis_server: RedisServer
) -> None:
    """Another host's entries are dropped; the answer says that it did not count them, or counts."""
    load = loads(key_prefix="products", tags=["sales"])

    def host(name: str) -> Any:
        return memo.configure(directory=tmp_path / name, redis_url=redis_server.url, deadline=5)

    for strict in (False, True):
        with host("here"):
            load("EU"), load("US")
        with host(f"there {strict}"):
            done = memo.invalidate(**TARGETS[target](load), strict=strict)
        assert done.missed != strict
        if strict:
            number = 1 if "key" in TARGETS[target](load) else 2
            assert done.matched == number
            assert "in Redis and not on this host" in repr(done)
        else:
            assert "entries that are only in Redis were invalidated uncounted" in repr(done)
        with host("here"):
            assert not load.is_cached("EU")


def test_a_redis_that_cannot_be_searched(redis_server: RedisServer) -> None:
    """While Redis is away a strict invalidation does not claim that nothing matched."""
    load = loads(key_prefix="products")
    with memo.configure(redis_url=redis_server.url, deadline=5):
        load("EU")
        redis_server.kill()
        done = memo.invalidate(prefix="product", strict=True)
        assert (done.matched, done.at_least) == (0, True)
        assert "no entry on this host; Redis could not be searched completely" in repr(done)


def test_a_store_of_ones_own_goes_by_its_name(cache_home: Path) -> None:
    """The answer names the user's store, says what it did not count there, and claims nothing."""
    load = loads(key_prefix="products", provider=InADict())
    load("EU")
    done = memo.invalidate(prefix="products")
    assert repr(done) == (
        "nothing matched prefix 'products' on this host; "
        "entries that are only in InADict were invalidated uncounted"
    )
    load("EU")
    done = memo.invalidate(prefix="products", strict=True)  # it may have matched there
    assert "no entry on this host; InADict could not be searched completely" in repr(done)


def test_a_store_that_an_invalidation_did_not_reach_is_named(cache_home: Path) -> None:
    """`memo.health` and the table of statistics name the user's store, and not Redis."""
    store = InADict()
    load = loads(provider=store)
    load("EU")
    store.set = unreachable  # type: ignore[method-assign]
    assert "journalled" in load.invalidate().tiers["InADict"]
    [found] = [one for one in memo.health() if one.topic == "journal"]
    assert found.said == "1 invalidation not yet in InADict"
    assert found.fix == "Nothing: they are replayed before the next read from InADict."
    facts = drive(inside(load).chain().health(BLOCKING))
    [said] = [said for name, said, _ in rendering.tiers(memo.stats().with_health(facts))
              if name == "host"]  # fmt: skip
    assert said == "1 invalidation on the way to InADict"


async def unreachable(*_: Any, **__: Any) -> Any:
    raise OSError("the store is away")


@pytest.mark.parametrize("key", ["products:*", "products*", "products:a*"])
def test_a_star_in_a_key_is_an_error(key: str) -> None:
    """A pattern is refused, with the option that drops several."""
    with pytest.raises(OptionError, match=rf"key='{re.escape(key)}'.*prefix='products'"):
        memo.invalidate(key=key)


# --- bounds --------------------------------------------------------------------------------------


@pytest.fixture
def no_time_to_count(set_limits: Callable[..., None]) -> None:
    """The time for counting is over at once, as on a very slow machine."""
    set_limits(counting_seconds=0.0)


@pytest.mark.usefixtures("no_time_to_count")
def test_counting_is_bounded() -> None:
    """When the time for counting is over the answer says "at least", and everything is dropped."""
    load, many = loads(), 2 * invalidating.MIN_COUNTED
    for year in range(many):
        load("EU", year)
    done = load.invalidate()
    assert done.at_least
    assert repr(done).count("at least") == 1
    assert "on this host, counting was stopped after 0 ms" in repr(done)
    assert not any(load.is_cached("EU", year) for year in range(many))


@pytest.mark.usefixtures("no_time_to_count")
def test_a_few_entries_are_always_counted() -> None:
    """However slow the machine is, the answer for a small cache is exact."""
    load = loads(tags=["sales"])
    load("EU"), load("US")
    done = memo.invalidate(tag="sale")
    assert (done.matched, done.missed) == (0, True)
    done = memo.invalidate(tag="sales")
    assert (done.matched, done.at_least) == (2, False)


def test_without_a_usable_directory_memory_is_counted(tmp_path: Path) -> None:
    """Those entries count that this process can use, and a misspelt name is noticed."""
    (tmp_path / "file").touch()
    with memo.configure(directory=tmp_path / "file" / "cache"):
        load = loads(tags=["sales"])
        with pytest.warns(match="results are kept in the memory"):
            load("EU")
        done = memo.invalidate(tag="sale")
        assert (done.missed, "did you mean 'sales'?" in repr(done)) == (True, True)
        done = memo.invalidate(tag="sales")
        assert (done.matched, done.at_least) == (1, False)


@pytest.mark.parametrize("verb", ["invalidate", "expire"])
def test_a_fault_of_the_count_does_not_stop_the_invalidation(verb: str) -> None:
    """If counting raises, the entries are dropped all the same; the answer and an event say so."""
    load = loads(tags=["sales"])

    for drop in (getattr(load, verb), functools.partial(getattr(memo, verb), tag="sales")):
        load("EU")
        with failing("list"), memo.testing.recording() as heard:
            done = drop()
        assert not load.is_cached("EU")
        assert (done.matched, done.at_least, done.complete, done.missed) == (0, True, True, False)
        assert "at least 0 entries on this host, counting failed" in repr(done)
        [fault] = [event for event in heard if event.kind == "error"]
        assert fault.reason == "count"
        assert fault.detail.startswith("RuntimeError")


def test_a_fault_of_the_hint_is_an_event() -> None:
    """If the class in an annotation raises when it is compared, the answer has no hint."""

    class Refuses(type):
        def __instancecheck__(cls, instance: object) -> bool:
            raise RuntimeError("not now")

    class Unknown(metaclass=Refuses):
        pass

    def raw(region: Any) -> Any:
        return region

    raw.__annotations__["region"] = Unknown
    load = cache(raw, ttl=None, version="1")
    with memo.testing.recording() as heard:
        done = load.invalidate("EU")
    assert (done.matched, done.missed, done.hint) == (0, True, "")
    assert [event.reason for event in heard if event.kind == "error"] == ["hint"]


@pytest.mark.timing
def test_counting_takes_no_longer_than_it_may() -> None:
    """With 3,000 entries of another function in the namespace an answer takes under 0.1 s."""
    load = loads(tags=["a"])
    for year in range(3000):
        load("EU", year)
    begun = time.perf_counter()
    memo.invalidate(tag="b")
    assert time.perf_counter() - begun < 0.1


# --- invalidate_cache ----------------------------------------------------------------------------


def services(cached: Callable[..., Any], **options: Any) -> Any:
    """Something with a cached read and a write that invalidates it."""
    return invalidate_cache(**options)(cached)


@pytest.mark.parametrize(
    "resolver",
    [
        "products:{product_id}",
        "{product_id}",
        lambda product_id: product_id,
        lambda result: [result["id"], 99],
        "{result[id]}",
    ],
    ids=["template", "bare template", "an int", "a list of ints", "template of the result"],
)
def test_an_address_may_be_a_template_or_a_number(resolver: Any) -> None:
    """A template gives the address; what is no text is formatted as in a template."""
    read = cache(ttl=None, key_prefix="products")(lambda product_id: product_id)
    read(1), read(2)

    @invalidate_cache(key_prefix="products", key_resolver=resolver)
    def update(product_id: int) -> dict[str, int]:
        return {"id": product_id}

    update(1)
    assert (read.is_cached(1), read.is_cached(2)) == (False, True)


def test_a_template_is_checked_at_decoration() -> None:
    """An unknown placeholder is an error when the function is decorated."""
    with pytest.raises(OptionError, match="prodct_id"):
        invalidate_cache(key_resolver="products:{prodct_id}")(lambda product_id: 1)


def test_a_soft_invalidation_of_a_decorator() -> None:
    """`soft=True` lets the entries expire: within the stale window the old value is served."""
    runs: dict[str, int] = {}

    @cache(ttl=None, key_prefix="products", stale_while_revalidate=60, version="1")
    def read(product_id: int) -> int:
        runs["n"] = runs.get("n", 0) + 1
        return runs["n"]

    @invalidate_cache(key_prefix="products", key_resolver="{product_id}", soft=True)
    def update(product_id: int) -> None: ...

    assert read(1) == 1
    update(1)
    assert read(1) == 1


# --- the command line and the magics -------------------------------------------------------------


def test_the_command_line_says_what_it_hit() -> None:
    """`memo clear` exits 0 with the count, and 1 when nothing matched, with the nearest name."""
    load = loads(key_prefix="products")
    load("EU"), load("US")
    missed = CliRunner().invoke(main, ["clear", "--prefix", "product"])
    assert missed.exit_code == 1
    assert "did you mean 'products'?" in missed.output
    done = CliRunner().invoke(main, ["clear", "--function", "load_rows"])
    assert (done.exit_code, "2 entries on this host" in done.output) == (0, True)
    unknown = CliRunner().invoke(main, ["clear", "--function", "laod_rows"])
    assert unknown.exit_code == 1
    assert "did you mean" in unknown.output
    nothing = CliRunner().invoke(main, ["export", "bundle", "laod_rows"])
    assert (nothing.exit_code, "did you mean" in nothing.output) == (1, True)


def test_listing_says_what_was_probably_meant() -> None:
    """`memo ls` takes the names that it shows, and exits 1 when a name matched nothing."""
    load = loads()
    load("EU")
    assert CliRunner().invoke(main, ["ls", "shop:load_rows"]).exit_code == 0
    missed = CliRunner().invoke(main, ["ls", "shop:laod_rows"])
    assert missed.exit_code == 1
    assert "did you mean 'shop:load_rows'?" in missed.output + missed.stderr


def test_a_bare_name_of_a_long_module_is_near() -> None:
    """The command line and `memo.entries` name the same function for a misspelt bare name."""
    cache(lambda region: region, name="warehouse.pipelines.daily:replenish", version="1")("EU")
    meant = "did you mean 'warehouse.pipelines.daily:replenish'?"
    for command in ("ls", "stats"):
        missed = CliRunner().invoke(main, [command, "replinesh"])
        assert meant in missed.output + missed.stderr
    with pytest.raises(OptionError, match=re.escape(meant)):
        memo.entries("replinesh")


def test_explain_takes_a_name() -> None:
    """`memo.explain` takes a name that tables show, and names the nearest."""
    load = loads()
    load("EU")
    assert memo.explain("load_rows", "EU").hit
    assert memo.explain("shop:load_rows", "EU").hit
    with pytest.raises(OptionError, match="did you mean 'shop:load_rows'"):
        memo.explain("laod_rows", "EU")


def test_a_bound_method_refuses_predicates_too() -> None:
    """`obj.f.invalidate(...)` says the same as that of a function."""

    class Service:
        @cache(ttl=None)
        def get(self, x: int) -> int:
            return x

    service = Service()
    service.get(1)
    with pytest.raises(OptionError, match="predicates are not supported"):
        service.get.invalidate(lambda x: True)
    assert service.get.expire(1).matched == 1


# --- invalidate_cache and cache_clear ------------------------------------------------------------


def products(prefix: str, resolver: Any = None) -> Any:
    """A function that updates products, after which something is dropped."""

    @memo.invalidate_cache(key_prefix=prefix, key_resolver=resolver)
    def update(product: int) -> int:
        return product

    return update


def cached_products() -> Any:
    @memo.cache(key_prefix="products", name="shop:product")
    def product(product: int) -> int:
        return product

    return product


def test_a_decorator_with_a_misspelt_prefix_says_so_once() -> None:
    """`invalidate_cache(key_prefix="product")` drops nothing, and names the prefix there is."""
    load = cached_products()
    load(1)
    update = products("product")
    with pytest.warns(UserWarning, match=r"prefix 'product'; did you mean 'products'\?$") as told:
        update(1), update(1)
    assert len(told) == 1
    assert load.is_cached(1)


def test_a_decorator_whose_addresses_fit_nothing_says_so_once() -> None:
    """Addresses of another form than those there are: said after five calls, with an example."""
    load = cached_products()
    load(1)
    update = products("products", lambda product, **_: f"products:id={product}")
    with pytest.warns(UserWarning, match="such as 'products:1'") as told:
        [update(1) for _ in range(8)]
    assert len(told) == 1


def test_a_resolver_that_gives_none_is_told_of_once() -> None:
    """A resolver without a return names nothing; an empty list is a choice, and silent."""
    load = cached_products()
    load(1)
    update = products("products", lambda product, **_: None)
    with pytest.warns(UserWarning, match="returned None in 5 calls") as told:
        [update(1) for _ in range(8)]
    assert len(told) == 1
    update = products("products", lambda product, **_: [])
    [update(1) for _ in range(8)]
    assert load.is_cached(1)


def test_an_argument_without_a_key_drops_all_entries_of_the_function() -> None:
    """The warning says so, whatever the decorator's other targets are."""
    load = cached_products()
    load(1), load(2)
    update = memo.invalidate_cache(
        "products", lambda result: "1", functions=[load], match=["product"]
    )(lambda product: None)
    with pytest.warns(UserWarning, match="so all entries of shop:product were invalidated"):
        update(threading.Lock())
    assert not load.is_cached(2)


def test_a_warning_that_is_an_error_comes_last() -> None:
    """It is raised only when the entries of `functions`, too, are invalidated."""
    load = cached_products()
    load(1)
    update = memo.invalidate_cache("product", functions=[load])(lambda: 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="nothing here has the prefix 'product'"):
            update()
    assert not load.is_cached(1)


def test_a_warning_that_is_an_error_does_not_stop_cache_clear() -> None:
    """The counters begin again before it is raised."""
    one, other = loads("shop:cleared"), loads("store:cleared")
    one("EU"), other("EU"), other.invalidate()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="cleared nothing"):
            other.cache_clear()
    assert other.cache_info().misses == 0


def test_an_earlier_typo_is_not_suggested() -> None:
    """The names that were probably meant are those of entries and functions."""
    load = loads(key_prefix="products", tags=["sales"])
    load("EU")
    memo.invalidate(tag="sal"), memo.invalidate(prefix="prod")
    assert repr(memo.invalidate(tag="sale")).endswith("; did you mean 'sales'?")
    assert repr(memo.invalidate(prefix="product")).endswith("; did you mean 'products'?")


def test_a_decorator_that_hits_or_has_nothing_to_hit_is_silent() -> None:
    """No warning while nothing is cached, nor for products that are not cached just now."""
    load = cached_products()
    update = products("products", "{product}")
    update(1)
    load(1), load(2)
    update(2)
    [update(3) for _ in range(8)]
    assert load.is_cached(1)
    assert not load.is_cached(2)


def test_clearing_a_function_that_has_no_entries_says_where_they_are() -> None:
    """`cache_clear` of a function whose namesake has the entries."""
    one, other = loads("shop:cleared"), loads("store:cleared")
    one("EU")
    with pytest.warns(
        UserWarning, match="nothing: this host has no entry .* name: shop:cleared"
    ) as told:
        other.cache_clear(), other.cache_clear()
    assert len(told) == 1
    one.cache_clear()
    assert not one.is_cached("EU")


COMPUTING = """
import sys, time, memo
@memo.cache(name="shop:slow", ttl=None)
def slow(x):
    print(slow.key(x), flush=True)
    sys.stdin.readline()
    return x
slow(7)
print(slow.is_cached(7), flush=True)
"""


def test_a_key_of_a_call_that_another_process_computes(cache_home: Path) -> None:
    """A key that another process printed invalidates its call although that still runs (I1)."""
    other = subprocess.Popen(
        [sys.executable, "-c", COMPUTING], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdin is not None
    assert other.stdout is not None
    with other:
        key = other.stdout.readline().strip()
        memo.invalidate(key=key)
        other.stdin.write("go\n")
        other.stdin.flush()
        assert other.stdout.readline().strip() == "False"


def test_an_argument_without_annotation_has_no_wrong_type() -> None:
    """The answer says that nothing matched, and guesses at no type."""

    @cache(name="plain")
    def plain(year, region="EU"):  # type: ignore[no-untyped-def]
        return year

    plain(2024)
    assert repr(plain.invalidate(2025, region="US")) == "nothing matched plain(2025, region='US')"
