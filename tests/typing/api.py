"""The public API as type checkers must see it; read by mypy and pyright, never run.

`assert_type` says what a type must be; a `type: ignore` that is not needed is an error as well, so
each of them says that the line must be refused.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from datetime import timedelta
from typing import Any, assert_type

import memo
from memo import Invalidation, cache, invalidate_cache
from memo.engine.explaining import Explanation


@cache
def bare(x: int, *, y: str = "a") -> float:
    return 1.0


@cache(ttl="1h", key_prefix="p", tags=["t"], stale_if_error=60)
def called(x: int) -> list[str]:
    return []


@cache
async def bare_async(x: int) -> float:
    return 1.0


@cache(ttl=timedelta(hours=1), use_lock=True, refresh_ahead=True, refresh_threshold=0.5)
async def called_async(x: int) -> dict[str, int]:
    return {}


class Service:
    @cache
    def method(self, x: int) -> str:
        return ""

    @cache(ttl=5)
    async def async_method(self, x: int) -> bytes:
        return b""

    @staticmethod
    @cache
    def static(x: int) -> str:
        return ""

    @cache
    @staticmethod
    def cached_static(x: int) -> str:
        return ""

    @staticmethod
    @cache
    async def async_static() -> str:
        return ""

    @classmethod
    @cache
    def of_class(cls, x: int, *, y: str = "a") -> str:
        return ""

    @cache(ttl=5)
    @classmethod
    def cached_of_class(cls, x: int) -> str:
        return ""

    @classmethod
    @cache(ttl=5)
    async def async_of_class(cls, x: int) -> bytes:
        return b""

    @invalidate_cache(key_prefix="p")
    async def update(self, x: int) -> bool:
        return True


class Derived(Service):
    pass


@invalidate_cache(functions=[Service.of_class, Service.method], match=["x"])
def update_classes(x: int) -> bool:
    return True


@invalidate_cache(functions=[called], match=["x"])
def update(x: int) -> bool:
    return True


def calls() -> None:
    assert_type(bare(1), float)
    assert_type(bare(1, y="b"), float)
    assert_type(called(1), list[str])
    assert_type(Service.static(1), str)
    assert_type(Service().method(1), str)
    assert_type(update(1), bool)


def methods() -> None:
    assert_type(Service.of_class(1), str)
    assert_type(Service.of_class(1, y="b"), str)
    assert_type(Service().of_class(x=1), str)
    assert_type(Derived.of_class(1), str)
    assert_type(Service.cached_of_class(1), str)
    assert_type(Service().cached_of_class(1), str)
    assert_type(Service().static(1), str)
    assert_type(Service().static(x=1), str)
    assert_type(Service.cached_static(1), str)
    assert_type(Service().cached_static(1), str)
    assert_type(Service.method(Service(), 1), str)
    assert_type(Service.of_class.invalidate(x=1), Invalidation)
    assert_type(Service().of_class.expire(), Invalidation)
    assert_type(Service.of_class.key(1), str)
    assert_type(Service.cached_of_class.is_cached(1), bool)
    assert_type(Service.of_class.explain(1), Explanation)
    assert_type(memo.explain(Service.of_class, 1), Explanation)
    assert_type(Service().method.invalidate(1), Invalidation)
    assert_type(Service().method.explain(1), Explanation)
    assert_type(Service().method.using(max_age="1m")(1), str)
    assert_type(Service().static.invalidate(1), Invalidation)
    assert_type(Service().cached_static.explain(1), Explanation)
    assert_type(Service.of_class.function_id, str)


def refused_methods() -> None:
    Service.of_class("x")  # type: ignore[arg-type]
    Service.of_class()  # type: ignore[call-arg]
    Service().of_class(1, z=2)  # type: ignore[call-arg]
    Service.cached_of_class("x")  # type: ignore[arg-type]
    Service().cached_of_class("x")  # type: ignore[arg-type]
    Service().static("x")  # type: ignore[arg-type]
    Service().static()  # type: ignore[call-arg]
    Service().cached_static("x")  # type: ignore[arg-type]
    Service.of_class.key("x")  # type: ignore[arg-type]
    Service().method.refresh("x")  # type: ignore[arg-type]
    Service.method(1)  # type: ignore[call-arg, arg-type]
    Service().method.invalidaet()  # type: ignore[attr-defined]


def refused() -> None:
    bare("1")  # type: ignore[arg-type]
    bare(1, 2)  # type: ignore[call-arg, arg-type]
    bare(1, z=2)  # type: ignore[call-arg]
    called()  # type: ignore[call-arg]
    Service().method("x")  # type: ignore[arg-type]
    Service().method()  # type: ignore[call-arg]
    update("x")  # type: ignore[arg-type]
    cache(tll=5)  # type: ignore[call-overload]
    cache(use_lock="yes")  # type: ignore[call-overload]
    bare.key("x")  # type: ignore[arg-type]
    bare.refresh("x")  # type: ignore[arg-type]


async def awaited() -> None:
    assert_type(await bare_async(1), float)
    assert_type(await called_async(1), dict[str, int])
    assert_type(await Service().async_method(1), bytes)
    assert_type(await Service().update(1), bool)
    assert_type(await Service.async_of_class(1), bytes)
    assert_type(await Service().async_of_class(1), bytes)
    assert_type(await Service().async_static(), str)
    assert_type(await Service.async_of_class.ainvalidate(1), Invalidation)
    await Service.async_of_class("x")  # type: ignore[arg-type]
    await bare_async("1")  # type: ignore[arg-type]
    await bare(1)  # type: ignore[misc]


def helpers() -> None:
    assert_type(bare.invalidate(x=1), Invalidation)
    assert_type(bare.invalidate(), Invalidation)
    assert_type(bare.is_cached(1), bool)
    assert_type(bare.key(1), str)
    assert_type(bare.address(1, y="a"), str)
    assert_type(bare.cache_info().hits, int)
    bare.cache_clear()
    assert_type(bare.__wrapped__(1), float)
    assert_type(bare.function_id, str)
    assert_type(memo.invalidate(prefix="p"), Invalidation)


async def twins() -> None:
    assert_type(await bare.ainvalidate(1), Invalidation)
    assert_type(await bare_async.ais_cached(1), bool)
    assert_type(await bare.akey(1), str)
    assert_type(await bare.aaddress(1), str)
    assert_type((await bare_async.acache_info()).misses, int)
    await bare.akey("x")  # type: ignore[arg-type]
    await bare_async.acache_clear()
    assert_type(await memo.ainvalidate(tag="t"), Invalidation)
    assert_type(await memo.drain(1.0), bool)


def passed_on() -> None:
    sync: Callable[[int], list[str]] = called
    coroutine: Callable[[int], Coroutine[Any, Any, float]] = bare_async
    wrong: Callable[[str], list[str]] = called  # type: ignore[assignment]
    print(sync, coroutine, wrong)


def settings() -> None:
    with memo.configure(memory_limit="1GiB", redis_url=None):
        memo.live["ttl.x"] = 5
        memo.live["ttl.x"] = "1h"
        memo.live["ttl.x"] = timedelta(days=1)
        memo.live.set("ttl.x", None, shared=True)
        assert_type(memo.live["ttl.x"], float)
    memo.configure(memory_limits=5)  # type: ignore[call-arg]
