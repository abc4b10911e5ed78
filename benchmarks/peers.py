"""memo and its peers, each as its own documentation says it should be used.

A *subject* is a name such as `"joblib mmap"`; `decorated` gives a function as that subject caches
it.  Every subject has its entries under `place.directory`, or in the Redis of `place.redis`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

HUGE = 1 << 40


class Place(NamedTuple):
    """The places where a subject stores its entries.

    Attributes:
        directory: an empty directory, kept from the process that stores to those that hit.
        redis: the URL of a server.
        port: of that server.
    """

    directory: str
    redis: str
    port: int


Function = Callable[..., Any]
Decorate = Callable[[Place, Function], Function]


def _memo(**settings: Any) -> Decorate:
    """Use memo over tiers; `use_lock` goes to the decorator, the rest to `configure`."""
    lock = settings.pop("use_lock", False)

    def decorate(place: Place, function: Function) -> Function:
        import memo

        chosen = {
            "directory": place.directory,
            "secret": "0123456789abcdef" * 4,
            "size_limit": HUGE,
            **{k: place.redis if v == "redis" else v for k, v in settings.items()},
        }
        memo.configure(**chosen)
        return memo.cache(ttl=None, name="work", version="1", use_lock=lock)(function)

    return decorate


def _lru(_place: Place, function: Function) -> Function:
    return functools.lru_cache(maxsize=None)(function)


def _cachetools(_place: Place, function: Function) -> Function:
    from cachetools import TTLCache, cached

    return cached(TTLCache(1024, 3600))(function)


def _cachier(**options: Any) -> Decorate:
    def decorate(place: Place, function: Function) -> Function:
        from cachier import cachier

        return cachier(cache_dir=place.directory, **options)(function)

    return decorate


def _aiocache(_place: Place, function: Function) -> Function:
    from aiocache import Cache, cached

    return cached(ttl=3600, cache=Cache.MEMORY)(function)


def _aiocache_redis(place: Place, function: Function) -> Function:
    from aiocache import Cache, cached
    from aiocache.serializers import PickleSerializer

    redis = {"endpoint": "127.0.0.1", "port": place.port, "timeout": 60, "pool_max_size": 2000}
    return cached(ttl=3600, cache=Cache.REDIS, serializer=PickleSerializer(), **redis)(function)


def _cashews(url: str, *, lock: bool = False) -> Decorate:
    def decorate(place: Place, function: Function) -> Function:
        from cashews import Cache

        cache = Cache()
        cache.setup(url.format(redis=place.redis, directory=place.directory), secret=None)
        return cache(ttl="1h", lock=lock)(function)

    return decorate


def _dogpile(backend: str) -> Decorate:
    def decorate(place: Place, function: Function) -> Function:
        from dogpile.cache import make_region

        arguments: dict[str, Any] = {}
        if "redis" in backend:
            arguments = {"url": place.redis, "distributed_lock": True, "thread_local_lock": False}
        region = make_region().configure(backend, 3600, arguments)
        return region.cache_on_arguments()(function)

    return decorate


def _diskcache(place: Place, function: Function) -> Function:
    from diskcache import Cache

    return Cache(place.directory, size_limit=HUGE).memoize()(function)


def _checkpointer(place: Place, function: Function) -> Function:
    from checkpointer import Checkpointer

    return Checkpointer(directory=Path(place.directory), verbosity=0)(function)


def _joblib(**options: Any) -> Decorate:
    def decorate(place: Place, function: Function) -> Function:
        from joblib import Memory

        return Memory(place.directory, verbose=0, **options).cache(function)

    return decorate


_LIMIT = {"redis_value_limit": "256MiB", "deadline": 30.0}
SUBJECTS: dict[str, Decorate] = {
    "lru_cache": _lru,
    "memo": _memo(redis_url=None),
    "memo async": _memo(redis_url=None),
    "memo tracking": _memo(redis_url="redis", coherence="tracking"),
    "memo tracking async": _memo(redis_url="redis", coherence="tracking"),
    "memo disk": _memo(redis_url=None, memory_limit=0),
    "memo Redis": _memo(redis_url="redis", memory_limit=0),
    "memo Redis async": _memo(redis_url="redis", memory_limit=0),
    "memo Redis + host": _memo(redis_url="redis", **_LIMIT),
    "memo lock async": _memo(redis_url="redis", use_lock=True),
    "cachetools": _cachetools,
    "cachier": _cachier(backend="memory"),
    "cachier pickle": _cachier(backend="pickle", separate_files=True),
    "aiocache": _aiocache,
    "aiocache Redis": _aiocache_redis,
    "cashews": _cashews("mem://?check_interval=10&size=10000"),
    "cashews disk": _cashews("disk://?directory={directory}"),
    "cashews Redis": _cashews("{redis}"),
    "cashews lock": _cashews("{redis}", lock=True),
    "dogpile": _dogpile("dogpile.cache.memory_pickle"),
    "dogpile Redis": _dogpile("dogpile.cache.redis"),
    "diskcache": _diskcache,
    "checkpointer": _checkpointer,
    "joblib": _joblib(),
    "joblib mmap": _joblib(mmap_mode="c"),
}
ASYNC = {"aiocache", "aiocache Redis", "cashews", "cashews disk", "cashews Redis", "cashews lock"}


def is_async(subject: str) -> bool:
    """True if a subject caches coroutine functions."""
    return subject in ASYNC or subject.endswith(" async")


def decorated(subject: str, place: Place, plain: Function, coroutine: Function) -> Function:
    """Decorate the plain function, or the coroutine function, as a subject does."""
    return SUBJECTS[subject](place, coroutine if is_async(subject) else plain)
