"""Inputs: what a result depends on besides its arguments, first of all the state of `self`."""

from __future__ import annotations

import ast
import asyncio
import functools
import inspect
import linecache
import operator
import os
import sqlite3
import subprocess
import sys
import textwrap
import threading
import types
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import key_mutants
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import memo

Maker = Callable[[str], Any]
RUNS: list[Any] = []


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path) -> Any:
    RUNS.clear()
    with memo.configure(directory=tmp_path / "cache"):
        yield


def run(value: Any) -> Any:
    """The result of a call, be it of an `async def`."""
    return asyncio.run(value) if inspect.iscoroutine(value) else value


# --- four kinds of classes, sync and async --------------------------------------------------------


class Plain:
    def __init__(self, tenant: str) -> None:
        self.tenant = tenant

    @memo.cache
    def get(self, x: int) -> str:
        RUNS.append(x)
        return f"{self.tenant} {x}"

    @memo.cache
    async def aget(self, x: int) -> str:
        RUNS.append(x)
        return f"{self.tenant} {x}"


@dataclass(frozen=True)
class Frozen:
    tenant: str

    @memo.cache
    def get(self, x: int) -> str:
        RUNS.append(x)
        return f"{self.tenant} {x}"

    @memo.cache
    async def aget(self, x: int) -> str:
        RUNS.append(x)
        return f"{self.tenant} {x}"


class Slotted:
    __slots__ = ("tenant",)

    def __init__(self, tenant: str) -> None:
        self.tenant = tenant

    @memo.cache
    def get(self, x: int) -> str:
        RUNS.append(x)
        return f"{self.tenant} {x}"

    @memo.cache
    async def aget(self, x: int) -> str:
        RUNS.append(x)
        return f"{self.tenant} {x}"


class Base:
    prefix = ""

    def __init__(self, tenant: str) -> None:
        self._tenant = tenant

    @property
    def tenant(self) -> str:
        return self._name()

    def _name(self) -> str:
        return self.prefix + self._tenant


class Derived(Base):
    def _name(self) -> str:
        return super()._name()

    @memo.cache
    def get(self, x: int) -> str:
        RUNS.append(x)
        return f"{self.tenant} {x}"

    @memo.cache
    async def aget(self, x: int) -> str:
        RUNS.append(x)
        return f"{self.tenant} {x}"


KINDS: list[Maker] = [Plain, Frozen, Slotted, Derived]
each_kind = pytest.mark.parametrize("make", KINDS)
each_way = pytest.mark.parametrize("way", ["get", "aget"])


class Held:
    """Its properties are made of callables that are no Python functions."""

    def __init__(self, tenant: str) -> None:
        self._tenant = tenant

    tenant = property(operator.attrgetter("_tenant"))
    once = functools.cached_property(operator.attrgetter("_tenant"))
    half = property(functools.partial(lambda mark, self: self._tenant + mark, "!"))

    @memo.cache
    def get(self, name: str) -> str:
        return {"tenant": self.tenant, "once": self.once, "half": self.half}[name]

    @memo.cache
    def stored(self) -> Any:
        return super().__getattribute__("_tenant")


class Heir(Held):
    @memo.cache
    def inherited(self) -> Any:
        return super().tenant


def test_what_a_property_of_another_callable_reads_counts() -> None:
    """All attributes count if a property or a method of `object` does not tell what it reads."""
    for tenant in ("a", "b"):
        assert [Held(tenant).get(name) for name in ("tenant", "once")] == [tenant] * 2
        assert Held(tenant).get("half") == f"{tenant}!"
        assert Held(tenant).stored() == Heir(tenant).inherited() == tenant


@each_way
@each_kind
def test_objects_in_other_states_have_entries_of_their_own(make: Maker, way: str) -> None:
    """`Client("a").get(1)` and `Client("b").get(1)` are different entries; equal ones share one."""
    assert run(getattr(make("a"), way)(1)) == "a 1"
    assert run(getattr(make("b"), way)(1)) == "b 1"
    assert run(getattr(make("a"), way)(1)) == "a 1"
    assert RUNS == [1, 1]


@each_way
@pytest.mark.parametrize("make", [kind for kind in KINDS if kind is not Frozen])
def test_an_object_that_changed_misses(make: Maker, way: str) -> None:
    """An attribute that changes between calls is another input; changed back, it hits."""
    client = make("a")
    name = "_tenant" if make is Derived else "tenant"
    assert run(getattr(client, way)(1)) == "a 1"
    setattr(client, name, "b")
    assert run(getattr(client, way)(1)) == "b 1"
    setattr(client, name, "a")
    assert run(getattr(client, way)(1)) == "a 1"
    assert RUNS == [1, 1]


@each_way
@each_kind
def test_the_suite_notices_a_key_without_state(
    make: Maker, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the state in the key, b gets a's answer: the tests above would notice."""
    key_mutants.attributes_left_out(monkeypatch)
    run(getattr(make("a"), way)(2))
    assert run(getattr(make("b"), way)(2)) == "a 2"


def test_what_a_method_does_not_read_is_no_input() -> None:
    """An attribute that the method never reads, sound or not, is not in its key."""
    one, two = Plain("a"), Plain("a")
    two.more = threading.Lock()  # type: ignore[attr-defined]
    assert one.get.key(1) == two.get.key(1)


def test_addresses_do_not_contain_self() -> None:
    """Two objects have one address for one call, and two keys."""
    one, two = Plain("a"), Plain("b")
    assert one.get.address(1) == two.get.address(1)
    assert one.get.key(1) != two.get.key(1)


# --- how state is reached -------------------------------------------------------------------------


def helper(client: Any) -> str:
    return str(client.tenant)


class Escaping(Plain):
    @memo.cache
    def get(self, x: int) -> str:
        RUNS.append(x)
        return helper(self)


class Nested(Plain):
    @memo.cache
    def get(self, x: int) -> str:
        RUNS.append(x)
        return "".join(self.tenant for _ in range(1))


class Lambda(Plain):
    @memo.cache
    def get(self, x: int) -> str:
        RUNS.append(x)
        give = lambda: self.tenant  # the point of the test
        return give()


class Getattr:
    def __init__(self, tenant: str) -> None:
        self._held = {"tenant": tenant}

    def __getattr__(self, name: str) -> Any:
        return self._held[name]

    @memo.cache
    def get(self, x: int) -> str:
        RUNS.append(x)
        return str(self.tenant)


class Cached(Plain):
    @functools.cached_property
    def upper(self) -> str:
        return self.tenant.upper()

    @memo.cache
    def get(self, x: int) -> str:
        RUNS.append(x)
        return self.upper.lower()


class Descriptor:
    def __set_name__(self, owner: type, name: str) -> None:
        self.name = f"_{name}"

    def __get__(self, instance: Any, owner: type) -> Any:
        return self if instance is None else getattr(instance, self.name)

    def __set__(self, instance: Any, value: Any) -> None:
        setattr(instance, self.name, value)


class Described:
    tenant = Descriptor()

    def __init__(self, tenant: str) -> None:
        self.tenant = tenant

    @memo.cache
    def get(self, x: int) -> str:
        RUNS.append(x)
        return str(self.tenant)


class Overridden:
    tenant = "class"

    def __init__(self, tenant: str) -> None:
        if tenant != "class":
            self.tenant = tenant

    @memo.cache
    def get(self, x: int) -> str:
        RUNS.append(x)
        return self.tenant


class Inner:
    def __init__(self, tenant: str) -> None:
        self.tenant = tenant
        self.lock = threading.Lock()


class Holding:
    def __init__(self, tenant: str) -> None:
        self.inner = Inner(tenant)

    @memo.cache
    def get(self, x: int) -> str:
        RUNS.append(x)
        return self.inner.tenant


class Contained(dict[str, str]):
    def __init__(self, tenant: str) -> None:
        super().__init__(tenant=tenant)

    @memo.cache
    def get_it(self, x: int) -> str:
        RUNS.append(x)
        return self["tenant"]

    get = get_it  # type: ignore[assignment]


def passed_on(function: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(*args: Any) -> Any:
        return function(*args)

    return wrapper


class Wrapped(Plain):
    @memo.cache
    @passed_on
    def get(self, x: int) -> str:
        RUNS.append(x)
        return self.tenant


class Other(Plain):
    @memo.cache
    def inner(self, x: int) -> str:
        return self.tenant

    @memo.cache
    def get(self, x: int) -> str:
        RUNS.append(x)
        return self.inner(x)


WAYS: list[Maker] = [
    Escaping, Nested, Lambda, Getattr, Cached, Described, Overridden, Contained, Wrapped, Other,
]  # fmt: skip


@pytest.mark.parametrize("make", WAYS)
def test_state_counts_however_a_method_reaches_it(make: Maker) -> None:
    """Helpers, closures, hooks, descriptors, overridden attributes, contents, decorators."""
    one, two = make("a"), make("b")
    assert one.get(1) == "a"
    assert two.get(1) == "b"
    assert one.get(1) == make("a").get(1) == "a"
    assert RUNS == [1, 1]


def test_a_class_attribute_and_an_instance_attribute_are_told_apart() -> None:
    """An object that overrides a class attribute has another entry than one that does not."""
    assert Overridden("class").get(1) == "class"
    assert Overridden("own").get(1) == "own"


def test_only_what_escapes_counts_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A survey that forgets that `self` goes elsewhere would share a helper's results."""
    key_mutants.escape_forgotten(monkeypatch)

    class Fresh(Plain):
        @memo.cache
        def get(self, x: int) -> str:
            return helper(self)

    assert Fresh("a").get(1) == "a"
    assert Fresh("b").get(1) == "a"


# --- state without a sound key --------------------------------------------------------------------


class Locked:
    def __init__(self, tenant: str) -> None:
        self.tenant = tenant
        self.lock = threading.Lock()

    @memo.cache
    def get(self, x: int) -> str:
        with self.lock:
            return f"{self.tenant} {x}"


def test_an_attribute_without_a_key_is_left_out_listed_and_warned_about_once() -> None:
    """The warning names the three ways to decide, and `explain` lists the attribute."""
    with pytest.warns(UserWarning, match="reads self.lock") as told:
        assert [Locked(tenant).get(1) for tenant in "aba"] == ["a 1", "b 1", "a 1"]
    assert Locked("a").get.is_cached(1)
    assert len(told) == 1
    text = str(told[0].message)
    assert "__cache_key__()" in text
    assert 'key_resolver="{self.tenant}:{x}"' in text
    assert 'ignore=["self"]' in text
    assert any("self.lock" in one for one in Locked("a").get.explain(1).untracked)


def test_the_sound_part_of_an_attribute_counts() -> None:
    """An object that holds a lock beside a name counts by the name."""
    with pytest.warns(UserWarning, match="self.inner.lock"):
        assert Holding("a").get(1) == "a"
    assert Holding("b").get(1) == "b"


def test_the_three_ways_to_decide() -> None:
    """`__cache_key__`, a resolver that names `self`, and `ignore=["self"]` each end the warning."""

    class Said(Locked):
        def __cache_key__(self) -> str:
            return self.tenant

    class Resolved(Locked):
        @memo.cache(key_resolver="{self.tenant}:{x}")
        def get(self, x: int) -> str:
            with self.lock:
                return f"{self.tenant} {x}"

    class Ignored(Locked):
        @memo.cache(ignore=["self"])
        def get(self, x: int) -> str:
            with self.lock:
                return f"{self.tenant} {x}"

    for made in (Said, Resolved):
        assert made("a").get(1) == "a 1"
        assert made("b").get(1) == "b 1"
    assert Ignored("a").get(1) == Ignored("b").get(1) == "a 1"


def test_a_pinned_version_still_counts_state() -> None:
    """`version=` pins the code, not the object."""

    class Pinned(Plain):
        @memo.cache(version="1")
        def get(self, x: int) -> str:
            return self.tenant

    assert (Pinned("a").get(1), Pinned("b").get(1)) == ("a", "b")


# --- invalidation ---------------------------------------------------------------------------------


@each_kind
def test_invalidation_of_one_object_and_of_all(make: Maker) -> None:
    """`obj.f.invalidate()` is for the object's state, `Class.f.invalidate()` for every object."""
    one, two = make("a"), make("b")
    for client in (one, two):
        client.get(1)
        client.get(2)
    one.get.invalidate(1)
    assert [one.get.is_cached(1), one.get.is_cached(2)] == [False, True]
    assert two.get.is_cached(1)
    one.get.invalidate()
    assert not one.get.is_cached(2)
    assert two.get.is_cached(2)
    one.get(1)
    type(one).get.invalidate(1)
    assert not one.get.is_cached(1)
    assert not two.get.is_cached(1)
    assert two.get.is_cached(2)
    type(one).get.invalidate()
    assert not two.get.is_cached(2)


def test_async_and_soft_invalidation_of_one_object() -> None:
    """The awaitable twins and `expire` are for the object's state as well."""
    one, two = Plain("a"), Plain("b")

    async def main() -> None:
        for client in (one, two):
            await client.aget(1)
        await one.aget.ainvalidate(1)
        assert not await one.aget.ais_cached(1)
        assert await two.aget.ais_cached(1)
        await two.aget.aexpire(1)
        assert not await two.aget.ais_cached(1)

    asyncio.run(main())
    one.get(1)
    two.get(1)
    one.get.expire()
    assert [one.get.is_cached(1), two.get.is_cached(1)] == [False, True]


class ProductService:
    """The example of the specification, over a database of its own."""

    def __init__(self, database: str) -> None:
        self.database = database

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self.database)

    @memo.cache(ttl=300, key_prefix="products")
    async def get_product_details(self, product_id: str) -> dict[str, Any]:
        RUNS.append(product_id)
        with closing(self._connect()) as db:
            row = db.execute("SELECT name FROM products WHERE id = ?", (product_id,)).fetchone()
        return {"name": row[0]}

    @memo.invalidate_cache(
        key_prefix="products",
        key_resolver=lambda result, **kwargs: f"products:{kwargs['product_id']}",
    )
    async def update_product_details(self, product_id: str, data: dict[str, Any]) -> None:
        with closing(self._connect()) as db, db:
            db.execute("UPDATE products SET name = ? WHERE id = ?", (data["name"], product_id))


def test_product_services_over_two_databases(tmp_path: Path) -> None:
    """Each has its own products; an update drops the product of both, and nothing else."""
    services = []
    for shop in ("north", "south"):
        path = tmp_path / f"{shop}.db"
        with closing(sqlite3.connect(path)) as db, db:
            db.execute("CREATE TABLE products (id TEXT, name TEXT)")
            db.executemany(
                "INSERT INTO products VALUES (?, ?)", [("1", f"{shop} 1"), ("2", f"{shop} 2")]
            )
        services.append(ProductService(str(path)))
    north, south = services

    async def main() -> None:
        for service, shop in ((north, "north"), (south, "south")):
            for product in "12":
                details = await service.get_product_details(product)
                assert details == {"name": f"{shop} {product}"}
        await north.update_product_details("1", {"name": "new"})
        for service in services:
            assert not await service.get_product_details.ais_cached("1")
            assert await service.get_product_details.ais_cached("2")
        assert await north.get_product_details("1") == {"name": "new"}
        assert await south.get_product_details("1") == {"name": "south 1"}

    asyncio.run(main())


SERVICES = """
import asyncio, sys, test_inputs
north, south = map(test_inputs.ProductService, ("north.db", "south.db"))

async def main():
    if sys.argv[1] == "update":
        await north.update_product_details("1", {"name": "new"})
    cached = [await one.get_product_details.ais_cached(p) for one in (north, south) for p in "12"]
    names = [(await one.get_product_details(p))["name"] for one in (north, south) for p in "12"]
    print([cached, names, len(test_inputs.RUNS)])

asyncio.run(main())
"""


def test_product_services_in_several_processes(tmp_path: Path) -> None:
    """Another process hits for both databases, and an update there drops one product of both."""
    for shop in ("north", "south"):
        with closing(sqlite3.connect(tmp_path / f"{shop}.db")) as db, db:
            db.execute("CREATE TABLE products (id TEXT, name TEXT)")
            rows = [(product, f"{shop} {product}") for product in "12"]
            db.executemany("INSERT INTO products VALUES (?, ?)", rows)

    def process(does: str) -> Any:
        places = os.pathsep.join([os.path.dirname(__file__), *sys.path])
        made = subprocess.run(
            [sys.executable, "-c", SERVICES, does],
            cwd=tmp_path,
            env={**os.environ, "MEMO_DIRECTORY": str(tmp_path / "shared"), "PYTHONPATH": places},
            capture_output=True,
            text=True,
            check=True,
        )
        return ast.literal_eval(made.stdout)

    old, new = (
        ["north 1", "north 2", "south 1", "south 2"],
        ["new", "north 2", "south 1", "south 2"],
    )
    assert process("read") == [[False] * 4, old, 4]
    assert process("read") == [[True] * 4, old, 0]
    assert process("update") == [[False, True, False, True], new, 2]
    assert process("read") == [[True] * 4, new, 0]


# --- another process ------------------------------------------------------------------------------

SCRIPT = """
import sys
import memo

class Client:
    def __init__(self, tenant):
        self.tenant = tenant

    @memo.cache
    def get(self, x):
        return f"{self.tenant} {x}"

client = Client(sys.argv[1])
print(client.get.is_cached(1), client.get(1))
"""


def test_an_equal_object_in_another_process_hits(tmp_path: Path) -> None:
    """The key of a state is the same in every process; another state is another key."""
    script = tmp_path / "client.py"
    script.write_text(textwrap.dedent(SCRIPT))

    def other(tenant: str) -> str:
        command = [sys.executable, str(script), tenant]
        environment = {"MEMO_DIRECTORY": str(tmp_path / "shared"), "PYTHONHASHSEED": "random"}
        made = subprocess.run(
            command, env={**os.environ, **environment}, capture_output=True, text=True, check=True
        )
        return made.stdout.strip()

    assert [other("a"), other("a"), other("b")] == ["False a 1", "True a 1", "False b 1"]


# --- order ----------------------------------------------------------------------------------------


@memo.cache
def columns(table: dict[str, int]) -> list[str]:
    RUNS.append(1)
    return list(table)


@memo.cache
async def acolumns(**table: int) -> list[str]:
    RUNS.append(1)
    return list(table)


class Table:
    def __init__(self, table: dict[str, int]) -> None:
        self.table = table

    @memo.cache
    def columns(self) -> list[str]:
        RUNS.append(1)
        return list(self.table)


TABLE = {"a": 1, "b": 2}


@memo.cache
def columns_of_a_global() -> list[str]:
    RUNS.append(1)
    return list(TABLE)


def test_the_order_of_a_dict_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function can read it: of an argument, of `**kwargs`, of `self`, and of a global."""
    ab, ba = {"a": 1, "b": 2}, {"b": 2, "a": 1}
    assert [columns(ab), columns(ba)] == [["a", "b"], ["b", "a"]]
    assert [run(acolumns(**ab)), run(acolumns(**ba))] == [["a", "b"], ["b", "a"]]
    assert [Table(ab).columns(), Table(ba).columns()] == [["a", "b"], ["b", "a"]]
    assert columns_of_a_global() == ["a", "b"]
    monkeypatch.setitem(globals(), "TABLE", ba)
    assert columns_of_a_global() == ["b", "a"]
    assert len(RUNS) == 8


def test_the_order_of_a_set_and_of_attributes_does_not_count() -> None:
    """A collection without an order has none in a key."""

    class Pair:
        def __init__(self, *names: str) -> None:
            for name in names:
                setattr(self, name, name)

    @memo.cache
    def take(value: Any) -> int:
        return 1

    assert take.key({1, 1 << 20, 5}) == take.key({5, 1 << 20, 1})
    assert take.key(Pair("a", "b")) == take.key(Pair("b", "a"))


def test_one_address_for_every_order_of_keyword_arguments() -> None:
    """An address names a call for people: it hits the entries of every order."""
    assert acolumns.address(a=1, b=2) == acolumns.address(b=2, a=1)
    run(acolumns(a=1, b=2))
    run(acolumns(b=2, a=1))
    memo.invalidate(key=acolumns.address(a=1, b=2))
    assert not acolumns.is_cached(a=1, b=2)
    assert not acolumns.is_cached(b=2, a=1)


def test_explain_names_the_order_and_the_attribute() -> None:
    """A miss is explained by what differs: an order, an attribute; never by an option."""
    run(acolumns(a=1, b=2))
    told = str(acolumns.explain(b=2, a=1))
    assert "another order of its keyword arguments" in told
    assert "replay" not in told
    Plain("a").get(1)
    told = str(Plain("b").get.explain(1))
    assert "self.tenant is 'b'; the nearest entry has 'a'" in told


# --- random functions -----------------------------------------------------------------------------

FORMS = {
    "global": "GLOBAL",
    "container": "TABLE['k'][0]",
    "helper": "assist()",
    "deep": "chain(1)",
    "closure": "captured",
    "decorator": "decorated()",
    "default": "by",
    "argument": "x",
    "attribute": "self.first",
    "method": "self.through()",
    "property": "self.shown",
    "nested": "self.nested.value",
    "method of nested": "self.other.double()",
    "class": "self.kind",
    "inherited": "self.base",
    "super": "self.above()",
    "comprehension": "sum(self.listed[n] for n in range(1))",
}
"""The ways in which a function reads its inputs."""
INPUTS = tuple(FORMS)
SOURCE = """
import memo

GLOBAL = {global}
TABLE = {{"k": [{container}]}}
HELPED = {helper}
DEEP = {deep}

def assist():
    return HELPED

def chain(n):
    return chain(n - 1) if n else bottom()

def bottom():
    return DEEP

def adding(n):
    def decorate(function):
        def wrapper():
            return function() + n
        return wrapper
    return decorate

@adding({decorator})
def decorated():
    return 0

class Nested:
    def __init__(self, value, doubled):
        self.value, self.doubled = value, doubled

    def double(self):
        return self.doubled

class Base:
    def above(self):
        return self.over

def make(captured):
    class Made(Base):
        kind = {class}

        def through(self):
            return self.second

        @property
        def shown(self):
            return self.third

        def above(self):
            return super().above()

        @memo.cache(name="random:{name}")
        {define} f(self, x, by={default}):
            RUNS.append(x)
            return [{body}]

    return Made

made = make({closure})()
made.first, made.second, made.third = {attribute}, {method}, {property}
made.base, made.over, made.listed = {inherited}, {super}, [{comprehension}]
made.nested, made.other = Nested({nested}, 0), Nested(0, {method of nested})
"""
_number = iter(range(1 << 30))


@dataclass
class Random:
    """A method of a grammar: which inputs it reads, and the present value of every input."""

    reads: tuple[str, ...]
    name: str
    define: str

    def made(self, values: dict[str, int]) -> Any:
        """The object, its class and its module, made anew as another process would."""
        text = SOURCE.format(
            **values,
            body=", ".join(FORMS[name] for name in self.reads),
            name=self.name,
            define=self.define,
        )
        module = types.ModuleType("random_function")
        vars(module)["RUNS"] = _Mute()
        file = f"<random {next(_number)}>"
        linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
        sys.modules["random_function"] = module
        try:
            exec(compile(text, file, "exec", dont_inherit=True), vars(module))
            return run(module.made.f(values["argument"]))  # type: ignore[attr-defined]
        finally:
            del sys.modules["random_function"], linecache.cache[file]


class _Mute:
    """Counts computations without being an input of them."""

    @memo.stable
    def append(self, value: Any) -> None:
        RUNS.append(value)


@dataclass
class Trial:
    """One random function, its inputs, and the input that changes."""

    reads: tuple[str, ...]
    values: dict[str, int]
    changed: str
    define: str

    def play(self) -> None:
        """Equal inputs hit; after one has changed the call misses if the function reads it."""
        RUNS.clear()
        function = Random(self.reads, f"f{next(_number)}", self.define)
        values = dict(self.values)
        first = function.made(values)
        assert function.made(values) == first == [values[name] for name in self.reads]
        assert len(RUNS) == 1
        values[self.changed] += 100
        assert function.made(values) == [values[name] for name in self.reads]
        # these are inputs though the body does not read them; `super()` reaches the whole class
        more = ("argument", "default", *["class"] * ("super" in self.reads))
        assert len(RUNS) == 1 + (self.changed in (*self.reads, *more))
        values[self.changed] -= 100
        assert function.made(values) == first
        assert len(RUNS) <= 2


TRIALS = st.builds(
    Trial,
    st.lists(st.sampled_from(INPUTS), min_size=1, unique=True).map(tuple),
    st.fixed_dictionaries({name: st.integers(0, 9) for name in INPUTS}),
    st.sampled_from(INPUTS),
    st.sampled_from(["def", "async def"]),
)
random_functions = settings(
    max_examples=40,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@random_functions
@given(TRIALS)
def test_equal_inputs_hit_and_a_changed_one_misses(trial: Trial) -> None:
    """A method that reads globals, helpers, closures and attributes, in any combination."""
    trial.play()


@pytest.mark.parametrize("changed", INPUTS)
def test_each_input_of_a_random_function_counts(changed: str) -> None:
    """Each form of input by itself, so that none depends on the luck of the draw."""
    Trial((changed,), dict.fromkeys(INPUTS, 1), changed, "def").play()


@pytest.mark.filterwarnings("ignore")
def test_the_property_notices_what_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutant: without the state of `self` in the key, random functions get old values."""
    key_mutants.attributes_left_out(monkeypatch)
    with pytest.raises(AssertionError):
        Trial(("attribute",), dict.fromkeys(INPUTS, 1), "attribute", "def").play()


# --- state that a computation changes itself ------------------------------------------------------


class Counting:
    """Counts, keeps a log and opens a session on its way, as clients do."""

    def __init__(self, tenant: str | None) -> None:
        self.tenant = tenant
        self.requests = 0
        self.log: list[int] = []
        self.session: Any = None

    def _session(self) -> Any:
        if self.session is None:
            self.session = threading.Lock()
        return self.session

    @memo.cache
    def get(self, x: int) -> str:
        RUNS.append(x)
        self.requests += 1
        self.log.append(x)
        with self._session():
            return f"{self.tenant} {x}"


def test_what_a_computation_changes_itself_leaves_its_key() -> None:
    """Counters, logs and sessions: one warning, then hits; `explain` names each."""
    one = Counting("a")
    with pytest.warns(UserWarning, match="changes self.log, self.requests, self.session") as told:
        assert [one.get(1), one.get(1), one.get(1), one.get(2)] == ["a 1", "a 1", "a 1", "a 2"]
    assert len(told) == 1
    assert RUNS == [1, 2]
    listed = one.get.explain(1).untracked
    assert "get() changes `self.requests`: left out of its key" in listed
    assert Counting("a").get.is_cached(1)
    assert Counting("b").get(1) == "b 1"
    assert one.get(1) == "a 1"
    one.requests = 100
    assert not one.get.is_cached(1), "a change between calls is none of its own"


def test_what_changes_between_calls_is_a_miss() -> None:
    """An attribute that is set from outside between two calls stays an input."""
    client = Plain("a")
    assert client.get(1) == "a 1"
    client.tenant = "b"
    assert client.get(1) == "b 1"
    client.tenant = "a"
    assert client.get(1) == "a 1"
    assert RUNS == [1, 1]


class Waiting:
    def __init__(self, tenant: str) -> None:
        self.tenant = tenant

    @memo.cache
    def get(self, x: int) -> str:
        during()
        return f"{self.tenant} {x}"


during: Callable[[], None] = lambda: None


def test_a_change_from_outside_during_a_computation_stays_an_input(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An attribute that nothing in reach sets was set by another thread: nothing is stored."""
    client = Waiting("a")

    @memo.stable
    def other() -> None:
        client.__dict__["tenant"] = "b"

    monkeypatch.setattr(other, "__name__", "during")
    monkeypatch.setitem(globals(), "during", other)
    assert client.get(1) == "b 1"
    assert not Waiting("a").get.is_cached(1)
    assert not Waiting("b").get.is_cached(1)
    assert Waiting("c").get.key(1) != Waiting("d").get.key(1)
