"""A keyword of the user's function may have any name, also one that memo uses itself."""

from __future__ import annotations

from typing import Any

import pytest

import memo

NAMES = (
    *("self", "cls", "function", "args", "kwargs", "port", "call", "instance", "owner", "name"),
    *("value", "reason", "default", "key", "mode", "ttl", "max_age", "result", "error", "light"),
)
Given = tuple[int, tuple[tuple[str, Any], ...]]
CALLS = ("key", "address", "is_cached", "explain", "peek", "refresh", "invalidate", "expire")
AWAITED = (
    "akey",
    "aaddress",
    "ais_cached",
    "aexplain",
    "apeek",
    "arefresh",
    "ainvalidate",
    "aexpire",
)


def given(x: int, kw: dict[str, Any]) -> Given:
    return x, tuple(sorted(kw.items()))


@memo.cache
def plain(x: int, **kw: Any) -> Given:
    return given(x, kw)


@memo.cache(replay=True)
def replayed(x: int, **kw: Any) -> Given:
    return given(x, kw)


@memo.cache
async def awaited(x: int, **kw: Any) -> Given:
    return given(x, kw)


class Methods:
    @memo.cache
    def method(this, x: int, **kw: Any) -> Given:
        return given(x, kw)

    @memo.cache
    @classmethod
    def of_class(this, x: int, **kw: Any) -> Given:
        return given(x, kw)


KINDS = {
    "function": plain,
    "replayed": replayed,
    "method": Methods().method,
    "class method": Methods.of_class,
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_keyword_with_a_name_of_ours(kind: str, name: str) -> None:
    """Calls, modes and every helper take it as an argument of the function."""
    cached: Any = KINDS[kind]
    kw = {name: 3}
    wanted = (1, ((name, 3),))
    assert cached(1, **kw) == cached(1, **kw) == wanted
    assert cached.is_cached(1, **kw)
    assert not cached.is_cached(1, **{name: 4})
    for helper in CALLS:
        getattr(cached, helper)(1, **kw)
    assert not cached.is_cached(1, **kw)
    for kind_of_mode in ("off", "refresh", "only"):
        with memo.mode(kind_of_mode):
            assert cached(1, **kw) == wanted
    cached.put((2, ()), 1, **kw)
    assert cached.using(max_age=60)(1, **kw) == (2, ())


@pytest.mark.parametrize("name", NAMES)
async def test_a_keyword_of_an_async_function_with_a_name_of_ours(name: str) -> None:
    """The same of an `async def` and of the awaitable helpers."""
    kw = {name: 3}
    assert await awaited(1, **kw) == await awaited(1, **kw) == (1, ((name, 3),))
    assert await awaited.ais_cached(1, **kw)
    for helper in AWAITED:
        await getattr(awaited, helper)(1, **kw)
    assert not await awaited.ais_cached(1, **kw)
    await awaited.aput((2, ()), 1, **kw)
    assert await awaited(1, **kw) == (2, ())


@pytest.mark.parametrize("name", NAMES)
def test_a_keyword_of_a_function_that_invalidates(name: str) -> None:
    """`invalidate_cache` passes it on, and invalidates."""

    @memo.invalidate_cache(functions=[plain], match=["x"])
    def update(x: int, **kw: Any) -> Given:
        return given(x, kw)

    plain(1)
    assert update(1, **{name: 3}) == (1, ((name, 3),))
    assert not plain.is_cached(1)
