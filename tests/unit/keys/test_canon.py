"""Canonical encoding: equal values have one key, all others have different ones."""

from __future__ import annotations

import array
import collections
import copy
import dataclasses
import datetime as dt
import decimal
import enum
import fractions
import functools
import gc
import ipaddress
import itertools
import json
import math
import operator
import os
import pathlib
import pickle
import random
import re
import socket
import struct
import subprocess
import sys
import threading
import types
import typing
import uuid
import weakref
import zoneinfo
from collections.abc import Callable
from typing import Any

import attrs
import pydantic
import pytest
from checkout import ROOT, SUPPORT
from hypothesis import given, settings
from hypothesis import strategies as st

from memo import register_key
from memo.errors import OptionError
from memo.keys.encoding.canonical import Unkeyable
from memo.keys.fingerprint.function_version import Identity
from memo.keys.values import value_digest as digest


class Colour(enum.Enum):
    RED = 1
    BLUE = 2
    CRIMSON = 1  # noqa: PIE796  # an alias


class Number(enum.IntEnum):
    ONE = 1


class Mode(enum.Flag):
    R = 1
    W = 2


class Other(enum.Enum):
    RED = 1


Point = collections.namedtuple("Point", "x y")  # noqa: PYI024  # this kind, too


class Pair(typing.NamedTuple):
    x: Any
    y: Any


@dataclasses.dataclass
class Data:
    x: int = 1
    y: Any = None


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    x: int = 1


@attrs.define
class Attrs:
    x: int = 1


@attrs.frozen(cache_hash=True)
class Hashed:
    x: int = 1


@attrs.frozen(cache_hash=True, slots=False)
class HashedOpen:
    x: int = 1


class Model(pydantic.BaseModel):
    x: int = 1
    _hidden: int = pydantic.PrivateAttr(default=0)


class Plain:
    def __init__(self, **state: Any) -> None:
        self.__dict__.update(state)


class Slotted:
    __slots__ = ("x", "y")

    def __init__(self, x: int) -> None:
        self.x = x


class Text(str):
    __slots__ = ()


class Many(list):  # type: ignore[type-arg]
    pass


class Keys(dict):  # type: ignore[type-arg]
    pass


class Group(set):  # type: ignore[type-arg]
    pass


class Ordered(collections.OrderedDict):  # type: ignore[type-arg]
    pass


class Couple(Pair):
    """A named tuple with attributes."""


class Strange(enum.Enum):
    """Members whose values cannot be told apart."""

    ONE = math.nan
    OTHER = float("nan")


def named(value: Any) -> Any:
    """A value with an attribute of its own."""
    value.name = "mine"
    return value


class Lazy:
    def __init__(self, n: int) -> None:
        self.n = n

    @functools.cached_property
    def square(self) -> int:
        return self.n**2


def helper(x: int) -> int:
    return x + 1


def adder(n: int) -> Any:
    return lambda x: x + n


UTC = dt.UTC
BERLIN = zoneinfo.ZoneInfo("Europe/Berlin")
MOMENT = dt.datetime(2024, 10, 27, 2, 30)  # noqa: DTZ001  # zones are put in below

DISTINCT: dict[str, Any] = {
    "dict in another order": {"b": 2, "a": 1},
    "dict of numbers": {1: 1, (2,): 2},
    "dict of numbers in another order": {(2,): 2, 1: 1},
    "defaultdict ba": collections.defaultdict(int, b=2, a=1),
    "Counter ab": collections.Counter("ab"),
    "Counter ba": collections.Counter("ba"),
    "keywords ab": functools.partial(dict, a=1, b=2),
    "keywords ba": functools.partial(dict, b=2, a=1),
    "dicts in a long list": [{"a": 1, "b": 2}] * 30,
    "dicts in a long list, in another order": [{"b": 2, "a": 1}] * 30,
    "None": None,
    "True": True,
    "False": False,
    "1": 1,
    "1.0": 1.0,
    "1+0j": 1 + 0j,
    "'1'": "1",
    "b'1'": b"1",
    "bytearray": bytearray(b"1"),
    "memoryview": memoryview(b"1"),
    "array": array.array("B", b"1"),
    "array signed": array.array("b", b"1"),
    "Decimal 1": decimal.Decimal(1),
    "Decimal 1.0": decimal.Decimal("1.0"),
    "Fraction": fractions.Fraction(1),
    "IntEnum": Number.ONE,
    "Enum": Colour.RED,
    "Enum blue": Colour.BLUE,
    "Enum other": Other.RED,
    "Flag": Mode.R,
    "Flags": Mode.R | Mode.W,
    "0": 0,
    "-1": -1,
    "256": 256,
    "2**63": 2**63,
    "-2**63": -(2**63),
    "2**64": 2**64,
    "2**63-1": 2**63 - 1,
    "0.0": 0.0,
    "-0.0": -0.0,
    "inf": math.inf,
    "nan": math.nan,
    "''": "",
    "b''": b"",
    "nul": "\0",
    "'None'": "None",
    "composed": "\u00e9",
    "decomposed": "e\u0301",
    "surrogate": "\ud800",
    "long": "a" * 1000,
    "longer": "a" * 1001,
    "very long": "a" * (1 << 20),
    "very long bytes": b"a" * (1 << 20),
    "Text": Text("1"),
    "()": (),
    "[]": [],
    "{}": {},
    "set()": set(),
    "frozenset()": frozenset(),
    "(1,)": (1,),
    "[1]": [1],
    "{1}": {1},
    "frozenset {1}": frozenset({1}),
    "{True}": {True},
    "{1: 1}": {1: 1},
    "{'1': 1}": {"1": 1},
    "{1: '1'}": {1: "1"},
    "(1, 2)": (1, 2),
    "(2, 1)": (2, 1),
    "((1, 2),)": ((1, 2),),
    "((1,), 2)": ((1,), 2),
    "(1, (2,))": (1, (2,)),
    "[[], []]": [[], []],
    "[[[]]]": [[[]]],
    "['a', 'b']": ["a", "b"],
    "['ab']": ["ab"],
    "['a', ('b',)]": ["a", ("b",)],
    "namedtuple": Point(1, 2),
    "another namedtuple": Pair(1, 2),
    "OrderedDict ab": collections.OrderedDict(a=1, b=2),
    "OrderedDict ba": collections.OrderedDict(b=2, a=1),
    "dict ab": {"a": 1, "b": 2},
    "defaultdict": collections.defaultdict(int, a=1, b=2),
    "defaultdict list": collections.defaultdict(list, a=1, b=2),
    "Counter": collections.Counter(a=1, b=2),
    "Keys": Keys(a=1, b=2),
    "mappingproxy": types.MappingProxyType({"a": 1, "b": 2}),
    "ChainMap": collections.ChainMap({"a": 1}, {"b": 2}),
    "deque": collections.deque([1, 2]),
    "deque maxlen": collections.deque([1, 2], 2),
    "Many": Many([1, 2]),
    "Group": Group([1, 2]),
    "Group named": named(Group([1, 2])),
    "Ordered named": named(Ordered(a=1)),
    "Ordered": Ordered(a=1),
    "Point named": named(Couple(1, 2)),
    "Couple": Couple(1, 2),
    "dict_keys": {1: 2}.keys(),
    "dict_values": {1: 2}.values(),
    "dict_items": {1: 2}.items(),
    "range": range(3),
    "range 0 3 1": range(1, 3),
    "slice": slice(3),
    "slice 0": slice(0, 3),
    "Ellipsis": ...,
    "NotImplemented": NotImplemented,
    "many ints": list(range(50)),
    "many floats": [float(n) for n in range(50)],
    "many bools": [True, False] * 25,
    "many texts": [str(n) for n in range(50)],
    "many bytes": [str(n).encode() for n in range(50)],
    "many ints tuple": tuple(range(50)),
    "many mixed": [*range(49), None],
    "many nested": [*range(49), []],
    "date": dt.date(2024, 10, 27),
    "datetime": MOMENT,
    "fold": MOMENT.replace(fold=1),
    "microsecond": MOMENT.replace(microsecond=1),
    "utc": MOMENT.replace(tzinfo=UTC),
    "zone utc": MOMENT.replace(tzinfo=zoneinfo.ZoneInfo("UTC")),
    "offset": MOMENT.replace(tzinfo=dt.timezone(dt.timedelta(hours=1))),
    "named offset": MOMENT.replace(tzinfo=dt.timezone(dt.timedelta(hours=1), "X")),
    "berlin": MOMENT.replace(tzinfo=BERLIN),
    "berlin fold": MOMENT.replace(tzinfo=BERLIN, fold=1),
    "paris": MOMENT.replace(tzinfo=zoneinfo.ZoneInfo("Europe/Paris")),
    "time": dt.time(2, 30),
    "time fold": dt.time(2, 30, fold=1),
    "timedelta": dt.timedelta(seconds=1),
    "zone": BERLIN,
    "timezone": UTC,
    "path": pathlib.Path("a/b"),
    "pure path": pathlib.PurePosixPath("a/b"),
    "windows path": pathlib.PureWindowsPath("a/b"),
    "'a/b'": "a/b",
    "pattern": re.compile("a"),
    "pattern i": re.compile("a", re.IGNORECASE),
    "pattern bytes": re.compile(b"a"),
    "uuid": uuid.UUID(int=1),
    "address": ipaddress.ip_address("10.0.0.1"),
    "network": ipaddress.ip_network("10.0.0.1"),
    "Data": Data(),
    "Data 2": Data(2),
    "Data y": Data(1, 1),
    "Frozen": Frozen(),
    "Attrs": Attrs(),
    "Hashed": Hashed(),
    "Model": Model(),
    "Model 2": Model(x=2),
    "Plain": Plain(),
    "Plain x": Plain(x=1),
    "Plain nested": Plain(x=Plain(x=1)),
    "Slotted": Slotted(1),
    "Slotted 2": Slotted(2),
    "Lazy": Lazy(1),
    "SimpleNamespace": types.SimpleNamespace(x=1),
    "exception": ValueError("a"),
    "other exception": TypeError("a"),
    "len": len,
    "max": max,
    "str.upper": str.upper,
    "'a'.upper": "a".upper,
    "'b'.upper": "b".upper,
    "dict.fromkeys": dict.fromkeys,
    "math.sin": math.sin,
    "json.dumps": json.dumps,
    "helper": helper,
    "lambda 1": lambda x: x + 1,
    "lambda 2": lambda x: x + 2,
    "adder 1": adder(1),
    "adder 2": adder(2),
    "partial": functools.partial(helper, 1),
    "partial 2": functools.partial(helper, 2),
    "partial key": functools.partial(helper, x=1),
    "bound": Data().__init__,  # type: ignore[misc]
    "bound 2": Data(2).__init__,  # type: ignore[misc]
    "itemgetter": operator.itemgetter(1),
    "itemgetter 2": operator.itemgetter(1, 2),
    "attrgetter": operator.attrgetter("a"),
    "module": json,
    "other module": math,
    "type": int,
    "other type": float,
    "own type": Data,
    "list[int]": list[int],
    "list[str]": list[str],
    "int | str": int | str,
    "Optional": typing.Optional[int],  # noqa: UP045
    "Any": typing.Any,
    "object type": object,
    "type type": type,
    "Random": random.Random(1),
    "Random 2": random.Random(2),
}


def pairs_of(values: dict[str, Any]) -> list[tuple[str, str]]:
    """Names of values that have one digest."""
    found: dict[bytes, str] = {}
    clashes = []
    for name, value in values.items():
        key = digest(value)
        if key in found:
            clashes.append((found[key], name))
        found[key] = name
    return clashes


def test_different_values_have_different_keys() -> None:
    """Values that a function could tell apart have different keys, bare and inside of a list."""
    assert pairs_of(DISTINCT) == []
    assert pairs_of({name: [value] for name, value in DISTINCT.items()}) == []
    assert pairs_of({name: {"a": value} for name, value in DISTINCT.items()}) == []


COPIED = [
    name
    for name in DISTINCT
    if name not in ("memoryview", "dict_keys", "dict_values", "dict_items", "mappingproxy")
    and "adder" not in name
    and "lambda" not in name
    and "module" not in name
]


@pytest.mark.parametrize("name", COPIED)
def test_copies_have_one_key(name: str) -> None:
    """A copy, deep or through pickle, has the key of its original."""
    value = DISTINCT[name]
    assert digest(copy.deepcopy(value)) == digest(value)
    assert digest(pickle.loads(pickle.dumps(value))) == digest(value)


def shuffled(items: Any) -> list[Any]:
    items = list(items)
    random.Random(7).shuffle(items)
    return items


def asked(value: Any) -> Any:
    """A value that remembers what it worked out."""
    assert getattr(value, "square", 9) == 9
    assert isinstance(value, Lazy) or hash(value) == hash(value)
    return value


ONE = 1000
SAME: dict[str, tuple[Any, Any]] = {
    "set order": (set(range(100)), set(shuffled(range(100)))),
    "attribute order": (Plain(a=1, b=2), Plain(b=2, a=1)),
    "shared": ([[ONE]] * 2, [[ONE], [ONE]]),
    "shared text": ([str(12345)] * 40, [str(n) for n in [12345] * 40]),
    "int": (10**20, 10**10 * 10**10),
    "nan": (math.nan, struct.unpack("<d", b"\x01\0\0\0\0\0\xf8\xff")[0]),
    "nan in a list": ([math.nan] * 30, [-math.nan] * 30),
    "nan in a tuple": ((math.nan,), (-math.nan,)),
    "alias": (Colour.RED, Colour.CRIMSON),
    "unread cached property": (Lazy(3), asked(Lazy(3))),
    "unhashed attrs": (Hashed(3), asked(Hashed(3))),
    "unhashed open attrs": (HashedOpen(3), asked(HashedOpen(3))),
    "sets in a long list": ([set(range(99))] * 30, [set(shuffled(range(99)))] * 30),
    "fields set": (Model(), Model(x=1)),
    "path": (pathlib.PurePosixPath("a//b/."), pathlib.PurePosixPath("a/b")),
    "lambda": (eval("lambda x: x + 1"), eval("lambda x:  (x + 1)")),
    "closure": (adder(1), adder(1)),
    "bound method": ("abc".upper, "".join("abc").upper),
    "memoryview": (memoryview(b"abcd")[::2], memoryview(b"ac")),
    "zone": (zoneinfo.ZoneInfo("UTC"), zoneinfo.ZoneInfo.no_cache("UTC")),
    "lru_cache": (functools.lru_cache(helper), functools.lru_cache(maxsize=3)(helper)),
}


@pytest.mark.parametrize("name", SAME)
def test_equal_values_have_one_key(name: str) -> None:
    """Order where there is none, sharing, interning and what was derived are not in the key."""
    one, other = SAME[name]
    assert digest(one) == digest(other)


SCRIPT = """
import sys
sys.path[:0] = {paths!r}
import test_canon
from memo.keys.values import value_digest as digest
print({{name: digest(value).hex() for name, value in test_canon.DISTINCT.items()}})
"""


@pytest.mark.parametrize("seed", ["0", "1", "4242"])
def test_keys_are_the_same_in_every_process(seed: str) -> None:
    """No key depends on PYTHONHASHSEED, on addresses, or on what the process did before."""
    here = os.path.dirname(os.path.abspath(__file__))
    script = SCRIPT.format(paths=[str(ROOT), str(SUPPORT), here])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        env={**os.environ, "PYTHONHASHSEED": seed},
        capture_output=True,
        text=True,
        check=True,
    )
    theirs = eval(done.stdout)
    mine = {name: digest(value).hex() for name, value in DISTINCT.items()}
    assert {n for n in mine if mine[n] != theirs[n]} == set()


def test_classes_do_not_depend_on_those_made_after_them() -> None:
    """From Python 3.13 on attrs gives one function to all classes, and the name of the last one."""

    def digest() -> str:
        return Identity(lambda: Attrs).digest()

    before = digest()

    @attrs.define
    class Other:
        y: int = 2

    assert Other() != Attrs()
    assert digest() == before


# --- cycles, sharing and depth -------------------------------------------------------------------


def ring(*items: Any) -> list[Any]:
    value: list[Any] = [*items]
    value.append(value)
    return value


def test_values_that_contain_themselves_have_keys() -> None:
    """A cycle through lists, dicts and objects ends, and what is in it counts."""
    table: dict[str, Any] = {}
    table["me"] = table
    object_ = Plain(name="a")
    object_.me = [object_]
    assert digest(ring(1)) == digest(ring(1)) != digest(ring(2))
    assert digest(table) != digest({"me": {}})
    assert digest(object_) == digest(copy.deepcopy(object_))
    assert digest(ring(ring(1))) != digest(ring(ring(2)))


def test_parents_and_children_know_each_other() -> None:
    """A tree whose nodes know their parent has one key per tree."""

    def tree(label: str) -> Plain:
        root = Plain(name="root", parent=None, children=[])
        for name in ("a", label):
            root.children.append(Plain(name=name, parent=root, children=[]))
        return root

    assert digest(tree("b")) == digest(tree("b")) != digest(tree("c"))
    assert digest(tree("b").children[0]) != digest(tree("c").children[0])


def test_shared_parts_are_looked_at_once() -> None:
    """A value of 2**60 paths takes as long as it has parts, and equals its unshared copy."""
    deep: Any = [1]
    flat: Any = [1]
    for _ in range(60):
        deep = [deep, deep]
    for _ in range(10):
        flat = [copy.deepcopy(flat), copy.deepcopy(flat)]
    shared: Any = [1]
    for _ in range(10):
        shared = [shared, shared]
    digest(deep)
    assert digest(shared) == digest(flat)


def test_a_dense_cycle_is_refused_in_time(set_limits: Callable[..., None]) -> None:
    """Objects that all know each other are refused rather than walked for ever."""
    set_limits(parts_of_cycles=2000)
    crowd = [Plain(n=n) for n in range(12)]
    for one in crowd:
        one.others = crowd
        one.friends = [*crowd]
    with pytest.raises(Unkeyable, match="densely"):
        digest(crowd)


def test_deep_nesting() -> None:
    """A list nested 1500 deep has a key, one nested without end has none."""

    def nested(core: Any) -> Any:
        for _ in range(1500):
            core = [core]
        return core

    assert digest(nested(1)) == digest(nested(1)) != digest(nested(2))
    bottomless: Any = 1
    for _ in range(20_000):
        bottomless = (bottomless,)
    with pytest.raises(Unkeyable, match="nested too deeply"):
        digest(bottomless)


def test_parts_that_pass_away_are_not_mistaken_for_each_other() -> None:
    """Parts made on the way live as long as the walk, so that no address is used twice."""

    class Fresh:
        def __init__(self, n: int) -> None:
            self.n = n

        def __reduce__(self) -> Any:
            return Fresh, ([self.n, [self.n]],)

    many = [Fresh(n) for n in range(500)]
    assert len({digest([one]) for one in many}) == 500
    assert digest(many[:2]) != digest([many[0], many[0]])


# --- values without a key -------------------------------------------------------------------------


def generator() -> Any:
    yield 1


async def coroutine() -> None: ...


REFUSED: dict[str, Any] = {
    "file": lambda: open(os.devnull),  # noqa: SIM115
    "lock": threading.Lock,
    "rlock": threading.RLock,
    "event": threading.Event,
    "thread local": threading.local,
    "generator": generator,
    "iterator": lambda: iter([1]),
    "map": lambda: map(str, [1]),
    "count": itertools.count,
    "socket": socket.socket,
    "object": object,
    "weakref": lambda: weakref.ref(Plain),
    "frame": sys._getframe,
    "code": lambda: compile("1", "", "eval"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_handles_have_no_key(name: str) -> None:
    """A value that stands for something outside of itself, or is used up by reading, is refused."""
    value = REFUSED[name]()
    try:
        with pytest.raises(Unkeyable) as caught:
            digest({"clients": [1, 2, value]}, "config")
    finally:
        if hasattr(value, "close"):
            value.close()
    assert caught.value.path.startswith('config["clients"][2]')
    assert caught.value.fix


def test_a_coroutine_is_refused_with_its_mend() -> None:
    """A forgotten await is told as such."""
    value = coroutine()
    with pytest.raises(Unkeyable, match="await it first"):
        digest(value)
    value.close()


LOCK = threading.Lock()
PATHS: dict[str, tuple[Any, str]] = {
    "": (LOCK, "x"),
    "index": ([[0, LOCK]], "x[0][1]"),
    "key": ({"a": {1: LOCK}}, 'x["a"][1]'),
    "mixed keys": ({1: 1, "a": LOCK}, 'x["a"]'),
    "attribute": (Plain(inner=Plain(lock=LOCK)), "x.inner.lock"),
    "field": (Data(1, [LOCK]), "x.y[0]"),
    "namedtuple": (Point(1, LOCK), "x.y"),
    "list subclass": (Many([1, LOCK]), "x[1]"),
    "dict subclass": (Keys(a=LOCK), 'x["a"]'),
    "OrderedDict": (collections.OrderedDict(a=LOCK), 'x["a"]'),
    "many": ([LOCK] * 50, "x[0]"),
    "captured": (adder(LOCK), "x.<captured>.n"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", PATHS)
def test_an_error_has_the_path(name: str) -> None:
    """The path leads from the argument to the very part that has no key."""
    value, path = PATHS[name]
    with pytest.raises(Unkeyable) as caught:
        digest(value, "x")
    assert (caught.value.path, caught.value.kind) == (path, "_thread.lock")


# --- keys of the user's own ----------------------------------------------------------------------


class Raising:
    """An error in a value's own methods is no error of memo's."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)

    @property
    def __class__(self) -> Any:
        raise RuntimeError("class")

    __memo_key__ = property(lambda self: self.anything)


def test_what_raises_when_it_is_read_has_no_key() -> None:
    """Any error in a value's own methods becomes an error that says so."""
    with pytest.raises(Unkeyable, match="RuntimeError"):
        digest([Raising()])


def test_members_with_like_values_are_told_apart() -> None:
    """Two members of an enum whose values cannot be told apart differ by their names."""
    assert Strange.ONE is not Strange.OTHER
    assert digest(Strange.ONE.value) == digest(Strange.OTHER.value)
    assert digest(Strange.ONE) != digest(Strange.OTHER)


def test_a_captured_marker_is_no_handle() -> None:
    """A function that has captured a bare `object()` has a key, as one with such a default has."""

    def made(marker: object) -> Any:
        return lambda x: x is marker

    assert digest(made(object())) == digest(made(object())) != digest(made(None))


@pytest.mark.parametrize(
    "sources",
    [
        ("lambda a, b: 1", "lambda a, /, b: 1"),
        ("lambda a, b: 1", "lambda a, *, b: 1"),
        ("lambda a: 1", "lambda a: 2"),
        ("lambda a: a.x", "lambda a: a.y"),
        ("lambda a: (lambda: 1)", "lambda a: (lambda: 2)"),
    ],
)
def test_functions_of_others_that_have_no_name_are_their_bytecode(sources: tuple[str, str]) -> None:
    """A function that an installed module made, and keeps under no name, counts by what it does."""
    import json

    def made(source: str) -> Any:
        return eval(compile(source, json.__file__, "eval"), vars(json))

    assert digest(made(sources[0])) == digest(made(sources[0])) != digest(made(sources[1]))


def test_register_key() -> None:
    """A registered type is keyed by what its function gives, under its own class, and inherited."""

    class Client:
        def __init__(self, url: str) -> None:
            self.url = url
            self.lock = threading.Lock()

    class Special(Client):
        pass

    with pytest.raises(Unkeyable):
        digest(Client("a"))
    register_key(Client, lambda client: client.url)
    assert digest(Client("a")) == digest(Client("a")) != digest(Client("b"))
    assert digest(Client("a")) not in (digest("a"), digest(Special("a")))
    register_key(Special, lambda client: [client.url, 2])
    assert digest(Special("a")) == digest(Special("a")) != digest(Special("b"))


def test_registered_keys_count_in_long_lists() -> None:
    """A subclass of `str` is keyed by its own rule among however many plain texts."""

    class Folded(str):
        __slots__ = ()

        def __memo_key__(self) -> Any:
            return self.lower()

    assert digest(["a"] * 50 + [Folded("B")]) == digest(["a"] * 50 + [Folded("b")])
    assert digest(["a"] * 50 + [Folded("b")]) != digest(["a"] * 50 + ["b"])


@pytest.mark.parametrize("kind", [int, dict, object, "no class"])
def test_register_key_checks(kind: Any) -> None:
    """Builtin types keep their keys, and a key needs a class."""
    with pytest.raises(OptionError):
        register_key(kind, repr)


def test_memo_key() -> None:
    """`__memo_key__` keys the values of a class; None refuses them; itself it cannot contain."""

    class Named:
        def __init__(self, name: Any) -> None:
            self.name = name
            self.noise = random.random()

        def __memo_key__(self) -> Any:
            return self.name

    class Selfish(Named):
        def __memo_key__(self) -> Any:
            return [self]

    class Secretive(Named):
        __memo_key__ = None  # type: ignore[assignment]

    class Broken(Named):
        def __memo_key__(self) -> Any:
            raise ValueError("no name")

    assert digest(Named("a")) == digest(Named("a")) != digest(Named("b"))
    with pytest.raises(Unkeyable, match="contains the value itself"):
        digest(Selfish("a"))
    with pytest.raises(Unkeyable, match="__memo_key__ = None"):
        digest(Secretive("a"))
    with pytest.raises(Unkeyable, match="raised ValueError: 'no name'"):
        digest(Broken("a"))
    with pytest.raises(Unkeyable) as caught:
        digest([Named(LOCK)], "x")
    assert caught.value.path == "x[0].__memo_key__()"


def test_types_are_not_kept_alive() -> None:
    """A class that is not used any more is forgotten, with its encoder."""

    class Passing:
        pass

    digest(Passing())
    gone = weakref.ref(Passing)
    del Passing
    for _ in range(300):  # memo.identity remembers so many at most

        class Another:
            pass

        digest(Another())
    gc.collect()
    assert gone() is None


def test_a_class_edited_is_another_class() -> None:
    """Methods compute: an object of an edited class has another key, of an equal one it has not."""

    def made(factor: int) -> Any:
        source = f"class Model:\n    def predict(self, x):\n        return x * {factor}\n"
        namespace: dict[str, Any] = {"__name__": "__main__"}
        exec(source, namespace)
        return namespace["Model"]()

    assert digest(made(2)) == digest(made(2)) != digest(made(3))


# --- properties ----------------------------------------------------------------------------------

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=-3, max_value=3)
    | st.floats()
    | st.sampled_from([0.0, 1.0, -0.0])
    | st.text(max_size=4)
    | st.binary(max_size=4)
    | st.sampled_from(["1", b"1", "", b"", Number.ONE, Colour.RED, decimal.Decimal(1)])
    | st.decimals(allow_nan=False)
    | st.dates()
    | st.datetimes(timezones=st.none() | st.just(UTC) | st.just(BERLIN))
    | st.timedeltas()
    | st.uuids()
    | st.complex_numbers()
)
HASHABLE = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3).map(tuple) | st.frozensets(inner, max_size=3),
    max_leaves=6,
)
VALUES = st.recursive(
    HASHABLE,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, min_size=20, max_size=30)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(HASHABLE, inner, max_size=3)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3).map(collections.OrderedDict)
        | st.sets(HASHABLE, max_size=3)
        | st.builds(Data, inner, inner)
        | st.builds(Plain, a=inner, b=inner)
        | st.builds(Point, inner, inner)
        | st.lists(inner, max_size=3).map(Many)
    ),
    max_leaves=12,
)


def model(value: Any) -> Any:
    """A description of a value by a slow and simple rule: type and observable content."""
    kind = type(value)
    if kind is float:
        return "float", "nan" if math.isnan(value) else struct.pack("<d", value)
    if kind is complex:
        return "complex", model(value.real), model(value.imag)
    if kind in (list, tuple, Many, Point):
        return kind.__name__, tuple(map(model, value))
    if kind in (set, frozenset):
        return kind.__name__, frozenset(map(model, value))
    if kind is dict:
        counted = collections.Counter((model(k), model(v)) for k, v in value.items())
        return "dict", frozenset(counted.items())
    if kind is collections.OrderedDict:
        return "OrderedDict", tuple((model(k), model(v)) for k, v in value.items())
    if kind in (Data, Plain):
        return kind.__name__, model(vars(value))
    if isinstance(value, dt.datetime):
        return "datetime", value.replace(tzinfo=None), str(value.tzinfo), value.fold
    if kind is decimal.Decimal:
        return "Decimal", str(value)
    return kind.__name__, value


@settings(max_examples=500, deadline=None)
@given(VALUES, VALUES)
def test_two_values_have_one_key_exactly_when_they_are_equal(one: Any, other: Any) -> None:
    """No two unequal values have one key, no two equal ones have two."""
    assert (digest(one) == digest(other)) == (model(one) == model(other))


@settings(max_examples=300, deadline=None)
@given(VALUES, st.integers())
def test_rebuilt_values_have_one_key(value: Any, seed: int) -> None:
    """A copy with sets filled in another order, sharing nothing, has the same key."""
    assert digest(rebuilt(value, random.Random(seed))) == digest(value)
    assert digest(pickle.loads(pickle.dumps(value))) == digest(value)


def rebuilt(value: Any, chance: random.Random) -> Any:
    kind = type(value)
    if kind in (list, tuple, Many):
        return kind(rebuilt(item, chance) for item in value)
    if kind in (set, frozenset):
        items = [rebuilt(item, chance) for item in value]
        chance.shuffle(items)
        return kind(items)
    if kind is dict:
        return {rebuilt(k, chance): rebuilt(v, chance) for k, v in value.items()}
    if kind is str:
        return "".join(list(value))
    return copy.deepcopy(value)


@settings(max_examples=200, deadline=None)
@given(VALUES, st.data())
def test_one_change_is_another_key(value: Any, data: st.DataObject) -> None:
    """Replacing any one part of a value by an unequal one changes its key."""
    part = data.draw(VALUES)
    for holder in ([value, 1], [[value], 1], {"a": value}, Data(value), (value,)):
        changed = copy.copy(holder)
        if isinstance(changed, list):
            changed[0] = part if changed[0] is value else [part]
        elif isinstance(changed, dict):
            changed["a"] = part
        elif isinstance(changed, tuple):
            changed = (part,)
        else:
            changed.x = part
        assert (digest(changed) == digest(holder)) == (model(part) == model(value))
