"""Keys and addresses: one call, one key, however it is written; and keys by hand."""

from __future__ import annotations

import datetime as dt
import decimal
import enum
import functools
import inspect
import json
import pathlib
import threading
import time
import uuid
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memo.errors import KeyingError, OptionError
from memo.keys import call_keys
from memo.keys.call_keys import (
    Call,
    Keyer,
    address,
    address_digest,
    normal_prefix,
    possible_prefixes,
)
from memo.keys.fingerprint.function_version import Identity
from memo.records.stamp_types import Ref

CODE = "0" * 32
LOCK = threading.Lock()


def keyer(function: Callable[..., Any], **given: Any) -> Keyer:
    options: dict[str, Any] = {
        "identity": Identity(function, digest=given.pop("code", CODE)),
        "function_id": f"app:{function.__qualname__.rpartition('.')[2]}",
        "key_prefix": None,
        "key_resolver": None,
        "ignore": (),
        "tags": (),
        "method": False,
    }
    return Keyer(function, **{**options, **given})


def call(keyer: Keyer, *args: Any, **kwargs: Any) -> Call:
    return keyer.call(args, kwargs)


def key(keyer: Keyer, *args: Any, **kwargs: Any) -> str:
    return call(keyer, *args, **kwargs).text


# --- spellings -----------------------------------------------------------------------------------


def ordinary(a: Any, b: Any = 2, *, c: Any = 3) -> None: ...


def positional(a: Any, b: Any = 2, /, c: Any = 3) -> None: ...


def variable(a: Any, *rest: Any, b: Any = 2, **extra: Any) -> None: ...


def pair(a: Any, b: Any) -> None: ...


def nothing() -> None: ...


SPELLINGS: dict[str, tuple[Any, list[Any]]] = {
    "ordinary": (
        ordinary,
        [
            ((1,), {}),
            ((1, 2), {}),
            ((1,), {"b": 2}),
            ((), {"a": 1}),
            ((), {"b": 2, "a": 1}),
            ((1, 2), {"c": 3}),
            ((), {"c": 3, "b": 2, "a": 1}),
        ],
    ),
    "positional": (positional, [((1,), {}), ((1, 2), {}), ((1, 2, 3), {}), ((1,), {"c": 3})]),
    "variable": (variable, [((1,), {}), ((), {"a": 1}), ((1,), {"b": 2})]),
    "rest": (variable, [((1, 5, 6), {}), ((1, 5, 6), {"b": 2})]),
    "extra": (variable, [((1,), {"x": 1, "y": 2}), ((), {"x": 1, "y": 2, "a": 1})]),
    "pair": (pair, [((1, 2), {}), ((1,), {"b": 2}), ((), {"b": 2, "a": 1})]),
    "nothing": (nothing, [((), {})]),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_all_spellings_of_a_call_are_one(name: str) -> None:
    """Positional, by keyword, reordered, defaults written out: one key, address, and digests."""
    function, spellings = SPELLINGS[name]
    keyer_ = keyer(function)
    calls = [keyer_.call(args, kwargs) for args, kwargs in spellings]
    assert len({(c.text, c.address, c.arguments, c.refs, c.summary) for c in calls}) == 1


def test_a_look_at_its_attributes_changes_no_key_of_a_partial() -> None:
    """A partial saves its `__dict__` once anything has asked for it; it is the same value."""
    value = functools.partial(len, [1])
    before = key(keyer(ordinary), value)
    assert vars(value) == {}
    assert key(keyer(ordinary), value) == before


DIFFERENT: list[Any] = [
    ((1,), {}),
    ((2,), {}),
    (("1",), {}),
    ((True,), {}),
    ((1, 3), {}),
    ((1, (3,)), {}),
    ((1, 3, 4), {}),
    ((1, (3, 4)), {}),
    ((1,), {"b": 3}),
    ((1,), {"x": 3}),
    ((1,), {"y": 3}),
    ((1,), {"x": 3, "y": 4}),
    ((1,), {"x": 4, "y": 3}),
    ((1,), {"extra": {"x": 3}}),
    ((1,), {"rest": (3,)}),
    ((1,), {"x-y": 3}),
]


def test_other_calls_are_others() -> None:
    """Any difference in the function's arguments makes another key."""
    keyer_ = keyer(variable)
    calls = [keyer_.call(args, kwargs) for args, kwargs in DIFFERENT]
    assert len({c.text for c in calls}) == len(DIFFERENT)
    assert len({c.arguments for c in calls}) == len(DIFFERENT)


def test_rest_is_not_flattened() -> None:
    """`f("a", ("b",))` and `f("a", "b")` are two calls."""

    def f(*args: Any) -> None: ...

    assert key(keyer(f), "a", ("b",)) != key(keyer(f), "a", "b")


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_binding_is_that_of_python(data: st.DataObject) -> None:
    """Calls that Python binds alike have one key, calls that it refuses have none."""
    function = data.draw(st.sampled_from([ordinary, positional, variable, pair, nothing]))
    values = st.sampled_from([1, 2, 3, "1"])
    names = st.sampled_from(["a", "b", "c", "rest", "extra", "x"])
    spelling = st.tuples(
        st.lists(values, max_size=4).map(tuple), st.dictionaries(names, values, max_size=3)
    )
    keyer_ = keyer(function)
    seen = []
    for args, kwargs in (data.draw(spelling), data.draw(spelling)):
        try:
            bound = inspect.signature(function).bind(*args, **kwargs)
        except TypeError:
            with pytest.raises(TypeError, match=rf"^{function.__name__}\(\)"):
                keyer_.call(args, kwargs)
            return
        bound.apply_defaults()
        extra = bound.arguments.get("extra", {})
        normal = {**bound.arguments, "extra": sorted(extra.items())}
        seen.append((keyer_.call(args, kwargs).text, repr(normal)))
    (one, first), (other, second) = seen
    assert (one == other) == (first == second)


def test_the_function_the_class_and_the_code_count() -> None:
    """The same arguments of another function, code version or parameter name are another key."""

    def pair_renamed(a: Any, c: Any) -> None: ...

    one = keyer(pair)
    texts = {
        key(one, 1, 2),
        key(keyer(pair, code="1" * 32), 1, 2),
        key(keyer(pair, function_id="other:pair"), 1, 2),
        key(keyer(pair_renamed, function_id="app:pair"), 1, 2),
    }
    assert len(texts) == 4
    assert all(len(text) == 40 for text in texts)
    assert keyer(pair).call((1, 2), {}).text == key(one, 1, 2)


# --- arguments without a key ----------------------------------------------------------------------


def test_an_error_names_everything() -> None:
    """Function, argument, path, type and fix are in the message, and it is a TypeError."""

    def load(config: Any, *rest: Any, **extra: Any) -> None: ...

    keyer_ = keyer(load)
    with pytest.raises(KeyingError) as caught:
        call(keyer_, {"clients": [1, 2, LOCK]})
    message = str(caught.value)
    for part in ("app:load", "'config'", 'config["clients"][2]', "_thread.lock", "register_key"):
        assert part in message
    assert 'ignore=["config"]' in message
    assert isinstance(caught.value, TypeError)
    with pytest.raises(KeyingError, match=r"rest\[1\] is _thread.lock"):
        call(keyer_, 1, 2, LOCK)
    with pytest.raises(KeyingError, match=r"argument 'db': db is _thread.lock"):
        call(keyer_, 1, db=LOCK)


def test_a_marker_as_default_is_no_obstacle() -> None:
    """A bare `object()` as default stands for itself; handed in from elsewhere it is an error."""
    missing = object()

    def f(a: Any, b: Any = missing) -> None: ...

    keyer_ = keyer(f)
    assert key(keyer_, 1) == key(keyer_, 1, missing) != key(keyer_, 1, None)
    with pytest.raises(KeyingError):
        call(keyer_, 1, object())


def test_ignored_arguments() -> None:
    """An ignored argument may be anything, and is in neither key, address nor selection."""
    keyer_ = keyer(ordinary, ignore=["b"])
    one, other = call(keyer_, 1, LOCK), call(keyer_, 1, open)
    assert (one.text, one.address, one.arguments) == (other.text, other.address, other.arguments)
    assert one.address == "ordinary:1:3"
    assert [name for name, _ in one.arguments] == ["a", "c"]
    assert key(keyer_, 2) != one.text
    extra = keyer(variable, ignore=["session", "rest"])
    assert key(extra, 1, LOCK, session=LOCK) == key(extra, 1) != key(extra, 1, other=1)


@pytest.mark.parametrize("ignore", [["z"], "a", [1], [""]])
def test_ignore_is_checked(ignore: Any) -> None:
    """A name that is no argument, or a text instead of a list, is an error at decoration."""
    with pytest.raises(OptionError, match="ignore"):
        keyer(ordinary, ignore=ignore)


# --- methods -------------------------------------------------------------------------------------


class Service:
    def get(self, product: Any, lang: Any = "en") -> None: ...

    @classmethod
    def of(cls, product: Any) -> None: ...


class Special(Service):
    pass


class Tenant(Service):
    def __init__(self, name: Any) -> None:
        self.name = name

    def __cache_key__(self) -> Any:
        return self.name


def test_self_is_not_in_the_key_but_its_class_is() -> None:
    """Two instances share entries, two classes do not; `__cache_key__` sets instances apart."""
    keyer_ = keyer(Service.get, method=True)
    assert key(keyer_, Service(), "1") == key(keyer_, Service(), product="1")
    assert key(keyer_, Service(), "1") != key(keyer_, Special(), "1")
    assert key(keyer_, Tenant("a"), "1") == key(keyer_, Tenant("a"), "1", "en")
    assert key(keyer_, Tenant("a"), "1") != key(keyer_, Tenant("b"), "1")
    assert key(keyer_, Tenant("a"), "1") != key(keyer_, Special(), "1")
    with pytest.raises(KeyingError, match=r"'self': self.__cache_key__\(\) is _thread.lock"):
        call(keyer_, Tenant(LOCK), "1")
    with pytest.raises(TypeError, match=r"Service.get\(\) missing 2 required .* 'self'"):
        call(keyer_)


def test_class_methods() -> None:
    """`cls` is the class; a `__cache_key__` for instances says nothing of it."""
    keyer_ = keyer(Service.of.__func__, method=True)
    assert len({key(keyer_, kind, "1") for kind in (Service, Special, Tenant)}) == 3
    assert key(keyer_, Service, "1") == key(keyer_, Service, product="1")


def test_method_is_learned_late() -> None:
    """A function that becomes a method when its class is made is keyed as one from then on."""
    keyer_ = keyer(Service.get, key_prefix="products")
    keyer_.method = True
    made = call(keyer_, Service(), "42")
    assert made.address == "products:42:en"
    assert [name for name, _ in made.arguments] == ["@self", "lang", "product"]


# --- addresses -----------------------------------------------------------------------------------


def get_product_details(self: Any, product_id: Any) -> None: ...


@pytest.mark.parametrize("prefix", ["products", "products:"])
def test_the_address_is_prefix_and_arguments(prefix: str) -> None:
    """`key_prefix="products"` of argument "42" is "products:42", with and without the colon."""
    keyer_ = keyer(get_product_details, key_prefix=prefix, method=True)
    assert call(keyer_, Service(), "42").address == "products:42"
    assert call(keyer_, Service(), 42).address == "products:42"
    assert key(keyer_, Service(), 42) != key(keyer_, Service(), "42")


class Shade(enum.Enum):
    DARK = "d"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a:b", "a:b"),
        (1, "1"),
        (1.5, "1.5"),
        (True, "True"),
        (None, "None"),
        (np.int64(7), "7"),
        (np.float64(1.5), "1.5"),
        (uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (dt.date(2024, 1, 2), "2024-01-02"),
        (decimal.Decimal("1.50"), "1.50"),
        (pathlib.PurePosixPath("a/b"), "a/b"),
        (Shade.DARK, "Shade.DARK"),
    ],
)
def test_words_are_those_of_an_f_string(value: Any, text: str) -> None:
    """A value with a format of its own stands in an address as an f-string writes it."""
    assert call(keyer(pair, key_prefix="p"), value, 1).address == f"p:{text}:1" == f"p:{value}:1"


def test_other_values_are_digests() -> None:
    """A list, a frame, an object: 16 hexadecimal digits, the same for equal values."""
    keyer_ = keyer(pair, key_prefix="p")
    one, other = call(keyer_, [1], {"b": 2}), call(keyer_, [1], {"b": 2})
    prefix, first, second = one.address.split(":")
    assert (prefix, len(first), len(second)) == ("p", 16, 16)
    assert one.address == other.address
    assert first == dict(one.arguments)["a"]


def test_rest_and_extra_in_addresses() -> None:
    """`*args` follow each other; `**kwargs` stand with their names, sorted."""
    assert call(keyer(variable), 1, 2, 3, y=5, x=4).address == "variable:1:2:3:2:x=4:y=5"
    assert call(keyer(nothing)).address == "nothing"


def test_addresses_by_hand() -> None:
    """Prefixes and addresses can be made and taken apart without a call."""
    assert normal_prefix("a:b::") == "a:b"
    assert address("a:b", "1", "2") == "a:b:1:2"
    assert possible_prefixes("a:b:1") == ["a", "a:b", "a:b:1"]
    with pytest.raises(OptionError, match="key_prefix"):
        normal_prefix(":")
    made = call(keyer(pair, key_prefix="a:b"), 1, 2)
    assert made.refs[2:] == (
        Ref("p:a", (("@", address_digest("a:b:1:2")),)),
        Ref("p:a:b", (("@", address_digest("a:b:1:2")),)),
    )


def test_refs() -> None:
    """A call depends on the namespace, its function with its arguments, its prefix, its tags."""
    made = call(keyer(pair, tags=["raw", "eu"]), 1, [2])
    digests = dict(made.arguments)
    assert made.refs == (
        Ref("n"),
        Ref("f:app:pair", made.arguments),
        Ref("p:pair", (("@", address_digest(made.address)),)),
        Ref("t:raw"),
        Ref("t:eu"),
    )
    assert set(digests) == {"a", "b"}
    assert all(len(d) == 16 for d in digests.values())


def test_tags_of_the_arguments() -> None:
    """`tags` may be a function of the bound arguments, by name."""
    keyer_ = keyer(pair, tags=lambda a: [f"user-{a}"])
    assert Ref("t:user-7") in call(keyer_, 7, 8).refs
    assert key(keyer_, 7, 8) == key(keyer(pair), 7, 8)
    with pytest.raises(OptionError, match="tags"):
        keyer(pair, tags=lambda z: [])
    with pytest.raises(OptionError, match="tags"):
        call(keyer(pair, tags=lambda a: "raw"), 1, 2)
    with pytest.raises(KeyingError, match="tags raised ZeroDivisionError"):
        call(keyer(pair, tags=lambda a: [str(1 / a)]), 0, 2)


@pytest.mark.parametrize("name", ["a,b", "a=b", "a|b", "a b", "*", "@", "", "class?"])
def test_odd_names_do_not_break_shapes(name: str) -> None:
    """Names that are no identifiers stand in refs as `%` and a digest."""
    names = [n for n, _ in call(keyer(variable), 1, **{name: 2}).arguments]
    assert sum(n.startswith("%") and len(n) == 9 for n in names) == 1
    assert not set("".join(names)) & set(",=|*@ ")


def test_an_extra_may_be_called_like_a_parameter() -> None:
    """`f(1, a=2)` of `def f(a, /, **kw)` has two arguments, and either selects."""

    def f(a: Any, /, **kw: Any) -> None: ...

    keyer_ = keyer(f)
    made = call(keyer_, 1, a=2)
    assert len(dict(made.arguments)) == 2
    assert set(keyer_.argument_digests((), {"a": 2})[0]) < set(made.arguments)
    assert set(keyer_.argument_digests((1,), {})[0]) < set(made.arguments)


def test_what_a_call_depends_on_does_not_change_under_way() -> None:
    """A function that changes its arguments changes neither digests nor refs of the call."""
    box, again = [1], [1]
    made = call(keyer(pair), box, 1)
    box.append(2)
    assert made.arguments == call(keyer(pair), again, 1).arguments


# --- summaries -----------------------------------------------------------------------------------


def test_summary() -> None:
    """Short texts for people: values where short, shapes where big, secrets not at all."""
    made = call(
        keyer(variable),
        "x" * 500,
        b=np.zeros((1000, 3)),
        token="hunter2",
        api_key="hunter2",
        few=[1, "a"],
        login={"password": "hunter2"},
        many=list(range(100)),
        when=dt.date(2024, 1, 2),
        thing=functools.partial(print),
        number=10**5000,
    )
    summary = json.loads(made.summary)
    assert summary["b"][0] == "ndarray 1000x3"
    assert summary["few"][0] == "[1, 'a']"
    assert summary["many"][0] == "list of 100"
    assert summary["when"][0] == "2024-01-02"
    assert summary["thing"][0] == "partial"
    assert len(summary["a"][0]) <= 80
    assert "hunter2" not in made.summary
    assert all(digest == dict(made.arguments)[name] for name, (_, digest) in summary.items())


def test_summary_is_bounded() -> None:
    """At most 2,000 bytes, valid JSON, whatever comes."""
    made = call(keyer(variable), 1, **{f"argument_{n}": "ä" * 100 for n in range(200)})
    assert len(made.summary.encode()) <= 2000
    assert json.loads(made.summary)["…"]


# --- keys by hand --------------------------------------------------------------------------------


class User:
    def __init__(self, number: Any, **more: Any) -> None:
        self.id = number
        self.more = more
        self.lock = threading.Lock()


def order(order_id: Any, user: Any = None, *, lang: Any = "en") -> None: ...


def test_a_template() -> None:
    """`"{order_id}"`: only the placeholder counts; 1 and "1" are one address and two keys."""
    keyer_ = keyer(order, key_prefix="orders", key_resolver="{order_id}")
    one = call(keyer_, 1, LOCK, lang="de")
    assert one.address == "orders:1" == call(keyer_, "1").address
    assert one.text == key(keyer_, order_id=1) != key(keyer_, "1")
    assert one.text != key(keyer(order, key_prefix="orders"), 1)


def test_templates_reach_attributes_and_items() -> None:
    """`{user.id}` and `{user.more[city]}` are followed; the rest of the object does not matter."""
    keyer_ = keyer(
        order, key_prefix="o", key_resolver="{user.id}/{user.more[city]}/{user.more[n][0]}"
    )
    user = User(7, city="Berlin", n=[3])
    assert call(keyer_, 1, user).address == "o:7/Berlin/3"
    assert key(keyer_, 1, user) == key(keyer_, 2, User(7, city="Berlin", n=[3, 4]))
    assert key(keyer_, 1, user) != key(keyer_, 1, User("7", city="Berlin", n=[3]))
    with pytest.raises(KeyingError, match=r"app:order: key_resolver: \{user.id\} raised Attribute"):
        call(keyer_, 1, None)
    with pytest.raises(KeyingError, match="KeyError: 'city'"):
        call(keyer_, 1, User(7))
    with pytest.raises(KeyingError, match=r"argument 'user': user.id is _thread.lock"):
        call(keyer_, 1, User(LOCK, city=1, n=[1]))


def test_templates_format() -> None:
    """A format says what counts: `{when:%Y-%m}` keys by month; braces can be written."""
    keyer_ = keyer(order, key_prefix="o", key_resolver="{{x}}{order_id:%Y-%m}{lang!r}")
    one = call(keyer_, dt.date(2024, 1, 2))
    assert one.address == "o:{x}2024-01'en'"
    assert one.text == key(keyer_, dt.date(2024, 1, 30)) != key(keyer_, dt.date(2024, 2, 1))


def test_templates_are_parsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No call parses the template again."""
    keyer_ = keyer(order, key_resolver="{order_id}:{user.id}")
    import string

    monkeypatch.setattr(string.Formatter, "parse", None)
    call(keyer_, 1, User(2))


@pytest.mark.parametrize(
    "template",
    [
        *("{nope}", "{}", "{0}", "{order_id", "order_id}", "constant", "", "{a b}", "{.id}"),
        *("{order_id:{lang}}", "{order_id!x}", "{order_id.}", "{user[}"),
    ],
)
def test_bad_templates(template: str) -> None:
    """Unknown or malformed placeholders, or none at all, are errors at decoration."""
    with pytest.raises(OptionError, match="key_resolver"):
        keyer(order, key_resolver=template)


def test_a_list_of_names() -> None:
    """Only the named arguments count, by type and value, in the order of the list."""
    keyer_ = keyer(order, key_prefix="o", key_resolver=["lang", "order_id"])
    one = call(keyer_, 1, LOCK)
    assert one.address == "o:en:1"
    assert one.text == key(keyer_, 1, None) != key(keyer_, "1")
    assert key(keyer_, ("a", ("b",))) != key(keyer_, ("a", "b"))
    assert [name for name, _ in one.arguments] == ["@", "lang", "order_id"]


@pytest.mark.parametrize("names", [[], ["nope"], ["lang", "lang"], [1], 5, {"lang"}])
def test_bad_lists(names: Any) -> None:
    """An empty list, unknown names, or something else are errors at decoration."""
    with pytest.raises(OptionError, match="key_resolver"):
        keyer(order, key_resolver=names)


def test_a_function_of_the_arguments() -> None:
    """It takes what it declares, `**kwargs` gets all; its text is not prefixed twice."""
    declared = keyer(order, key_prefix="orders", key_resolver=lambda order_id: f"{order_id}")
    everything = keyer(
        order, key_prefix="orders", key_resolver=lambda **kw: f"orders:{kw['order_id']}"
    )
    assert call(declared, 42).address == "orders:42" == call(everything, 42, LOCK).address
    assert key(declared, 42) == key(declared, "42", LOCK)
    listed = keyer(order, key_resolver=lambda **kw: sorted(kw))
    assert key(listed, 1) == key(listed, 2)
    method = keyer(Service.get, method=True, key_resolver=lambda **kw: " ".join(sorted(kw)))
    assert call(method, Service(), 1).address == "get:lang product"
    own = keyer(Service.get, method=True, key_resolver=lambda self, product: (self.name, product))
    assert key(own, Tenant("a"), 1) != key(own, Tenant("b"), 1)
    assert key(own, Tenant("a"), 1) == key(own, Tenant("a"), 1)


def test_other_results_of_a_function() -> None:
    """A tuple is keyed by its content; None and an exception are the caller's mistake."""
    keyer_ = keyer(order, key_prefix="o", key_resolver=lambda order_id: (order_id, 1))
    assert key(keyer_, 1) == key(keyer_, 1) != key(keyer_, 2)
    assert len(call(keyer_, 1).address) == len("o:") + 16
    with pytest.raises(KeyingError, match="app:order: key_resolver returned None"):
        call(keyer(order, key_resolver=lambda order_id: None), 1)
    with pytest.raises(KeyingError, match="key_resolver raised ZeroDivisionError") as caught:
        call(keyer(order, key_resolver=lambda order_id: str(1 / order_id)), 0)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    with pytest.raises(KeyingError, match=r"key_resolver\(\)\[0\] is _thread.lock"):
        call(keyer(order, key_resolver=lambda order_id: [LOCK]), 1)


async def asynchronous(order_id: Any) -> str:
    return "a"


@pytest.mark.parametrize(
    "function",
    [lambda nope: "", lambda *args: "", lambda order_id, /: "", asynchronous, str],
    ids=["unknown", "args", "positional", "async", "builtin"],
)
def test_bad_functions(function: Any) -> None:
    """A function that cannot be called with the arguments by name is an error at decoration."""
    with pytest.raises(OptionError, match="key_resolver"):
        keyer(order, key_resolver=function)


def test_a_function_may_have_more_parameters_with_defaults() -> None:
    """A parameter that is no argument keeps its default; partials and objects will do."""
    keyer_ = keyer(order, key_resolver=lambda order_id, salt="x": f"{salt}{order_id}")
    assert call(keyer_, 1).address == "order:x1"
    assert key(keyer_, 1) == key(
        keyer(order, key_resolver=functools.partial(lambda order_id, s: f"{s}{order_id}", s="x")), 1
    )


def test_addresses_without_a_prefix() -> None:
    """A resolved text brings its prefix along, and is found under it and the function's name."""
    template = call(keyer(order, key_resolver="order:{order_id}"), 42)
    assert template.addresses == (("order", "order:42"),) or template.address == "order:42"
    shop = call(keyer(order, key_resolver="shop:cart:{order_id}"), 42)
    assert shop.addresses == (("shop:cart", "shop:cart:42"), ("order", "order:shop:cart:42"))
    function = call(keyer(order, key_resolver=lambda order_id: f"cart:{order_id}"), 42)
    assert function.addresses == (("order", "order:cart:42"), ("cart", "cart:42"))
    for made, text in ((template, "order:42"), (shop, "shop:cart:42"), (function, "cart:42")):
        pair = (("@", address_digest(text)),)
        assert any(Ref(f"p:{one}", pair) in made.refs for one in possible_prefixes(text))


# --- selecting for invalidation ------------------------------------------------------------------


def test_partial() -> None:
    """The given arguments by their digests; all of them, and it is known to be the whole."""
    keyer_ = keyer(ordinary)
    made = call(keyer_, 1, 2, c=3)
    assert keyer_.argument_digests((1, 2), {"c": 3}) == (made.arguments, True)
    assert keyer_.argument_digests((), {"b": 2}) == (made.arguments[1:2], False)
    assert keyer_.argument_digests((1,), {"c": 3}) == (
        (made.arguments[0], made.arguments[2]),
        False,
    )
    assert keyer_.argument_digests((), {}) == ((), False)
    assert keyer_.argument_digests((), {"b": 9})[0] not in made.arguments


def test_partial_of_rest_and_extra() -> None:
    """`*args` select when some are given; entries of `**kwargs` select by their own names."""
    keyer_ = keyer(variable)
    made = call(keyer_, 1, 2, 3, region="EU", year=2024)
    for args, kwargs in (((1,), {}), ((1, 2, 3), {}), ((), {"region": "EU"}), ((), {"b": 2})):
        pairs, whole = keyer_.argument_digests(args, kwargs)
        assert pairs, (args, kwargs)
        assert set(pairs) <= set(made.arguments)
        assert not whole
    assert not set(keyer_.argument_digests((1, 2), {})[0]) <= set(made.arguments)
    assert keyer_.argument_digests((1, 2, 3), {"b": 2})[1] is False  # other calls may have more


def test_partial_is_checked() -> None:
    """Unknown names, too many arguments, and what selects nothing are errors."""
    keyer_ = keyer(ordinary, ignore=["b"])
    for args, kwargs in (((), {"z": 1}), ((1, 2, 3), {}), ((1,), {"a": 1}), ((), {"b": 1})):
        with pytest.raises(OptionError):
            keyer_.argument_digests(args, kwargs)
    assert keyer_.argument_digests((1, LOCK), {}) == keyer_.argument_digests((1,), {})
    with pytest.raises(OptionError, match="match"):
        keyer_.check_names("match", ["z"])
    with pytest.raises(OptionError, match="ignored"):
        keyer_.check_names("match", ["b"])
    keyer_.check_names("match", ["a", "c"])


def test_partial_of_a_method_selects_by_object_where_one_is_given() -> None:
    """Without an object the entries of all objects are selected; with one, those of its state."""
    keyer_ = keyer(Service.get, method=True)
    made = call(keyer_, Service(), "42", "de")
    assert keyer_.argument_digests(("42",), {"lang": "de"}) == (made.arguments[1:], False)
    assert keyer_.argument_digests(("42",), {"lang": "de"}, Service()) == (made.arguments, True)
    assert set(keyer_.argument_digests((), {"lang": "de"})[0]) < set(made.arguments)


def test_partial_with_a_resolver() -> None:
    """All arguments of the resolver select exactly; some, the entries with these; others, none."""
    for resolver in ("{order_id}", ["order_id"], lambda order_id: order_id):
        keyer_ = keyer(order, key_resolver=resolver)
        made = call(keyer_, 42, LOCK)
        pairs, _ = keyer_.argument_digests((42,), {})
        assert pairs == (("@", dict(made.arguments)["@"]),)
        assert keyer_.argument_digests((42, LOCK), {})[0] == pairs
        assert keyer_.argument_digests((43,), {})[0] != pairs
        with pytest.raises(OptionError, match="selects no entries"):
            keyer_.argument_digests((), {"lang": "en"})
    two = keyer(order, key_resolver=["order_id", "lang"])
    made = call(two, 42)
    assert set(two.argument_digests((42,), {})[0]) < set(made.arguments)
    assert set(two.argument_digests((), {"lang": "en"})[0]) < set(made.arguments)
    free = keyer(order, key_resolver=lambda **kw: f"{kw['order_id']}")
    made = call(free, 42, LOCK)
    assert set(free.argument_digests((42,), {})[0]) < set(made.arguments)
    assert set(free.argument_digests((), {"lang": "en"})[0]) < set(made.arguments)


def test_a_resolver_spares_the_rest() -> None:
    """An argument that the resolver only looks at is not hashed."""

    class Costly:
        id = 7

        def __memo_key__(self) -> Any:
            raise AssertionError("hashed")

    for resolver in ("{order_id.id}", lambda order_id: order_id.id):
        made = call(keyer(order, key_resolver=resolver), Costly())
        assert made.address == "order:7"
        assert [name for name, _ in made.arguments] == ["@"]


# --- annotations ---------------------------------------------------------------------------------


class Upper:
    """An annotation that says how an argument is keyed."""

    @staticmethod
    def __memo_argument__(value: str) -> str:
        return value.upper()


def by_annotation(path: Upper, other: Annotated[str, Upper], third: "list[Missing]") -> None: ...  # type: ignore[name-defined] # noqa: F821, UP037


def test_an_annotation_can_change_how_an_argument_is_keyed() -> None:
    """`__memo_argument__` of an annotation, also inside `Annotated`, gives what is keyed."""
    keyer_ = keyer(by_annotation)
    assert key(keyer_, "a", "b", "c") == key(keyer_, "A", other="B", third="c")
    assert key(keyer_, "a", "b", "c") != key(keyer_, "a", "b", "C")


class Proxy:
    """An argument that raises when anything but its key is asked for."""

    @property
    def __class__(self) -> Any:
        raise RuntimeError("class")

    @property
    def shape(self) -> Any:
        raise RuntimeError("shape")

    def __memo_key__(self) -> str:
        return "proxy"


def test_summaries_and_addresses_of_proxies() -> None:
    """A value that raises when it is looked at has an address and a summary all the same."""
    call = keyer(pair).call((1, Proxy()), {})
    assert json.loads(call.summary)["b"][0] == "Proxy"
    assert len(call.address.rpartition(":")[2]) == 16


# --- speed ---------------------------------------------------------------------------------------


def per_call(work: Callable[[], object], times: int = 20_000) -> float:
    best = float("inf")
    for _ in range(7):
        start = time.perf_counter()
        for _ in range(times):
            work()
        best = min(best, (time.perf_counter() - start) / times)
    return best


@pytest.mark.timing
def test_a_small_key_is_quick() -> None:
    """The whole key of `(int, str)` takes at most 4 µs, by position, by name, and for a method."""
    plain, method, args = keyer(pair), keyer(Service.get, method=True), (12345, "a text")
    service = Service()
    assert per_call(lambda: plain.call(args, {})) < 4e-6
    assert per_call(lambda: plain.call(args[:1], {"b": "a text"})) < 6e-6
    assert per_call(lambda: method.call((service, *args), {})) < 4e-6


ALIKE = st.sampled_from(
    [0, 0.0, -0.0, False, 1, 1.0, True, None, "", b"", "a", b"a", "1", 2**70, float(2**70), 1j]
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(ALIKE, ALIKE, st.sampled_from([CODE, "1" * 32])), max_size=40))
def test_calls_that_come_again_have_the_keys_they_had(
    calls: list[tuple[Any, Any, str]],
) -> None:
    """A remembered call answers only itself: not one that is equal, or of other code."""

    def kept(a: Any, b: Any) -> None: ...

    maker = keyer(kept)
    for a, b, code in calls * 3:
        fresh = keyer(kept, code=code)
        maker.identity = fresh.identity
        made, wanted = maker.call((a, b), {}), fresh.call((a, b), {})
        assert made.text == wanted.text
        assert made.arguments == wanted.arguments
        assert made.addresses == wanted.addresses
        assert made.summary == wanted.summary


def test_what_is_kept_of_calls_is_bounded() -> None:
    """A thousand calls that come again leave a few hundred behind, and long texts none."""

    def f(a: Any) -> None: ...

    maker = keyer(f)
    for _ in range(3):
        for number in range(3 * call_keys.MAX_MEMOIZED_CALLS):
            key(maker, number)
    assert 0 < len(maker.memoized) <= call_keys.MAX_MEMOIZED_CALLS
    for number in range(2 * call_keys.MAX_CALLS_SEEN_ONCE):
        key(maker, -number)
    assert len(maker.seen_once) <= call_keys.MAX_CALLS_SEEN_ONCE
    before = set(maker.memoized)
    for value in ("x" * (call_keys.MAX_MEMOIZED_CHARACTERS + 1), b"x", 1.5, True, (1,)):
        for _ in range(3):
            key(maker, value)
    assert set(maker.memoized) == before
    key(maker, 10**6)
    assert call(maker, 10**6) is call(maker, 10**6), "which is what this is for"


def test_what_others_decide_is_asked_each_time() -> None:
    """Calls whose keys, or tags, a function of the user's makes are not kept."""
    turns: list[int] = []

    def resolver(a: Any) -> str:
        turns.append(a)
        return f"x:{len(turns)}"

    def f(a: Any) -> None: ...

    maker = keyer(f, key_resolver=resolver)
    assert len({key(maker, 1) for _ in range(4)}) == 4
    tagged = keyer(f, tags=lambda a: [resolver(a)])
    for _ in range(4):
        assert call(tagged, 1).refs
    assert len(turns) == 8


def test_no_signature_is_read_on_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that fits binds by the plan alone."""
    keyer_ = keyer(ordinary, key_resolver=lambda a: a, tags=lambda b: [])
    monkeypatch.setattr(inspect, "signature", None)
    monkeypatch.setattr(inspect.Signature, "bind", None)
    assert key(keyer_, 1, b=2) == key(keyer_, a=1)
