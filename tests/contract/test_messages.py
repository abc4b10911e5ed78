"""Errors name the argument, its value, and what to write instead."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Any

import pytest

import memo
from memo import CacheFallbackFactory, OptionError, cache, invalidate_cache


@cache(name="shop:load", version="1")
def load(region: str, year: int = 2024) -> str:
    return f"{region} {year}"


class Shop:
    @classmethod
    @cache(name="shop:Shop.sales", version="1")
    def sales(cls, region: str) -> str:
        return region


def plain(region: str) -> str:
    return region


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "an option in another case": (lambda: cache(TTL=5), "TTL=5: .* did you mean 'ttl'?"),
    "an option like no other": (lambda: cache(foo=5), "foo=5: .* there are: ttl, key_prefix, "),
    "an unknown unit": (lambda: cache(ttl="2 hours"), "ttl='2 hours': .* units are ms, s, m, h"),
    "a negative text": (lambda: cache(ttl="-5s"), "ttl='-5s': is not a duration; "),
    "an empty text": (lambda: cache(ttl=""), "ttl='': is not a duration; "),
    "a bare number": (lambda: cache(ttl="5"), "ttl='5': has no units; write for instance"),
    "None for a list": (lambda: cache(tags=None), r'tags=None: .* for instance \["a"\]'),
    "a text for a list": (lambda: cache(ignore="x"), r'ignore=\'x\': .* for instance \["x"\]'),
    "a URL as provider": (lambda: cache(provider="redis://h"), r"memo\.configure\(redis_url="),
    "the factory as provider": (
        lambda: cache(provider=CacheFallbackFactory),
        r"write CacheFallbackFactory\.create\(\)",
    ),
    "the factory's method as provider": (
        lambda: cache(provider=CacheFallbackFactory.create),
        r"write CacheFallbackFactory\.create\(\)",
    ),
    "a bare decorator": (lambda: invalidate_cache(plain), "is a function; write @invalidate_cache"),
    "a decorated number": (
        lambda: invalidate_cache(key_prefix="shop")(5),
        "function=5: must be a function; write @invalidate_cache",
    ),
    "two targets": (
        lambda: memo.invalidate(prefix="shop", tag="eu"),
        "prefix='shop': is given with tag='eu'; give exactly one of prefix=, tag=",
    ),
    "no target": (lambda: memo.expire(), "prefix=None: give exactly one of prefix=, tag="),
    "a misspelt argument": (
        lambda: load.invalidate(yeer=2024),
        "'yeer': is not an argument .* region, year; did you mean 'year'?",
    ),
    "another argument": (lambda: load.expire(colour=1), "'colour': .* which has: region, year."),
    "a function that is not cached": (
        lambda: memo.explain(plain, "EU"),
        "function=<function plain.*: is not cached; give a function that @cache decorates",
    ),
    "a hook that is none": (lambda: memo.on_event(5), "hook=5: must be a function"),
    "a bundle without a path": (
        lambda: memo.export_bundle(None),  # type: ignore[arg-type]
        "path=None: must be the path of a file",
    ),
    "an empty path": (lambda: memo.import_bundle(""), "path='': must be the path of a file"),
    "a key that is no text": (
        lambda: memo.export_bundle("b", key=5),  # type: ignore[arg-type]
        "key=<class 'int'>: is not text",
    ),
    "a number of tiers": (lambda: memo.Chain(5), "tiers=5: must be a list of tiers"),  # type: ignore[arg-type]
    "settings of the factory": (
        lambda: CacheFallbackFactory.create("redis"),  # type: ignore[arg-type]
        r"settings='redis': must be left out; memo\.configure",
    ),
    "a provider of nothing": (
        lambda: memo.instrument(meter_provider="http://h"),  # type: ignore[arg-type]
        r"meter_provider='http://h': must be a provider .* get_meter\(\)",
    ),
    "a text for a flag": (
        lambda: memo.invalidate(tag="t", strict="yes"),  # type: ignore[arg-type]
        "strict='yes': must be True or False",
    ),
    "another text for a flag": (
        lambda: memo.stats(shared="all"),
        "shared='all': must be True or False",
    ),  # type: ignore[arg-type]
    "a timeout in words": (
        lambda: asyncio.run(memo.drain("5s")),  # type: ignore[arg-type]
        "timeout='5s': must be seconds",
    ),
    "a pattern that is none": (lambda: memo.stats(5), "patterns=5: must be a cached function"),
}


@cache(name="shop:many", version="1")
def many(x: int, **filters: int) -> int:
    return x


KEYWORDS: dict[str, Callable[[], Any]] = {
    "key_resolver='x:{filters}'": lambda: cache(key_resolver="x:{filters}"),
    r"key_resolver='x:{filters\[a\]}'": lambda: cache(key_resolver="x:{filters[a]}"),
    r"key_resolver=\['x', 'filters'\]": lambda: cache(key_resolver=["x", "filters"]),
    "key_resolver=<function <lambda>": lambda: cache(key_resolver=lambda filters: "x"),
    "tags='x:{filters}'": lambda: cache(tags=["x:{filters}"]),
    "tags=<function <lambda>": lambda: cache(tags=lambda x, filters: ["x"]),
    "depends_on='/data/{filters}.csv'": lambda: cache(depends_on="/data/{filters}.csv"),
    "depends_on=<function <lambda>": lambda: cache(depends_on=lambda filters: 1),
    "key_resolver='{filters}'": lambda: invalidate_cache(key_resolver="{filters}"),
    "key_resolver=<function .*<lambda>": lambda: invalidate_cache(key_resolver=lambda filters: "x"),
    "tags='y:{filters}'": lambda: invalidate_cache(tags=["y:{filters}"]),
}


@pytest.mark.parametrize("said", KEYWORDS)
def test_the_name_of_the_keywords_themselves_is_refused(said: str) -> None:
    """An option that names `**filters`, and not a keyword, is refused at decoration."""
    with pytest.raises(OptionError) as raised:
        KEYWORDS[said]()(many.__wrapped__)
    fix = r".*: 'filters' is the \*\* parameter itself; name the keywords .* takes \*\*filters\."
    assert re.match(said + fix, str(raised.value)), str(raised.value)


@pytest.mark.parametrize("case", WRONG)
def test_an_error_names_the_argument_its_value_and_the_fix(case: str) -> None:
    """A wrong argument is refused at once, in words that say what to write."""
    call, said = WRONG[case]
    with pytest.raises(OptionError) as raised:
        call()
    assert re.search(said, str(raised.value)), str(raised.value)


def test_statistics_of_a_cached_function() -> None:
    """`memo.stats` takes a cached function as well as its name."""
    load("EU"), Shop.sales("EU")
    for named in (load, load.function_id, "load"):
        assert list(memo.stats(named).functions) == [load.function_id]
    assert list(memo.stats(Shop.sales).functions) == ["shop:Shop.sales"]


def test_a_class_method_is_shown_with_its_class() -> None:
    """The repr of a class method names the class, not `type`."""
    assert repr(Shop.sales).endswith(" of Shop>")
    assert repr(Shop().sales).endswith(" of Shop>")
