"""The decorator `cache`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, get_overloads, overload

from memo import stores
from memo.decorators import classmethods, function_options
from memo.decorators.cached_function import (
    CachedCoroutine,
    CachedFunction,
    ReplayingCoroutine,
    ReplayingFunction,
)
from memo.decorators.function_options import Dependency, Span, Ttl
from memo.errors import public
from memo.settings import options
from memo.stores.protocols import CacheProtocol

if TYPE_CHECKING:
    from typing import Unpack

    from memo.decorators.function_options import Options

P = ParamSpec("P")
R = TypeVar("R")


@overload
def cache(  # pyright: ignore[reportOverlappingOverload] - a ttl may be callable as well
    function: Callable[P, R], /, **options: Unpack[Options]
) -> CachedFunction[P, R]: ...
@overload
def cache(
    ttl: Ttl = 60,
    key_prefix: str | None = None,
    key_resolver: Callable[..., Any] | str | Sequence[str] | None = None,
    use_jitter: bool = False,
    use_lock: bool = False,
    lock_timeout: Span | None = 30,
    refresh_ahead: bool = False,
    refresh_threshold: float | None = None,
    provider: CacheProtocol | stores.Chain | None = None,
    ttl_key: str | None = None,
    *,
    tags: Iterable[str] | Callable[..., Iterable[str]] = (),
    depends_on: Dependency | Iterable[Dependency] = (),
    check_every: Span = 0,
    ignore: Iterable[str] = (),
    version: str | None = None,
    stale_while_revalidate: Span = 0,
    stale_if_error: Span = 0,
    retry_after: Span = 0,
    soft_timeout: Span = 0,
    cache_errors: Mapping[type[Exception], Span | None] | None = None,
    each: str | None = None,
    cutoff: bool = False,
    name: str | None = None,
    cache_if: Callable[[Any], bool] | None = None,
    compress: bool | int | str | None = None,
    replay: bool = False,
) -> Callable[[Callable[P, R]], CachedFunction[P, R]]: ...
def cache(*args: Any, **kwargs: Any) -> Any:
    """Cache the results of a function, `async def` or `def`, by its code and its arguments.

    Works bare (`@cache`) and called (`@cache(ttl="1h")`), on functions, methods, static methods and
    class methods.  Every option is checked at decoration.

    Args:
        ttl: how long a result is fresh: seconds, a `timedelta`, a text such as `"1h30m"`, None for
            no expiry, a callable that returns one of these from the result, or `"inherit"`: as long
            as the shortest-lived cached result that it was built on.
        key_prefix: address prefix; functions may share one.  Default: the function's name.
        key_resolver: replaces the automatic argument key: a callable of the bound arguments, a
            template such as `"order:{order_id}"`, or a list of argument names.
        use_jitter: shorten each ttl by a random fraction of up to 10 %.
        use_lock: compute a key only once across processes and hosts; within a process that is
            always so.
        lock_timeout: seconds to wait for another process's result before computing here; None: as
            long as that process lives.
        refresh_ahead: after `refresh_threshold * ttl` a hit also starts a refresh in the
            background.
        refresh_threshold: fraction of the ttl in (0, 1); default 0.8.
        provider: stores the entries: a `CacheProtocol` or a `Chain`; default: the settings' chain.
        ttl_key: key in `memo.live` whose value overrides `ttl`, also for existing entries.
        tags: names to invalidate by, templates such as `"user:{uid}"`, or a callable that returns
            them from the bound arguments, and from `result` if it takes that.
        depends_on: files, directories, globs, URLs (`https`, and all that fsspec supports), or
            callables of the arguments that they declare; a change invalidates entries.
        check_every: seconds for which the state of a URL is reused without asking again.
        ignore: names of arguments that are not part of the key; also `"self"`, and globals that the
            function reads, as `"global:api"`.
        version: a code version of your own, instead of the one derived from the code.
        stale_while_revalidate: seconds past the ttl in which the old value is served while it is
            refreshed (RFC 5861).
        stale_if_error: seconds past the ttl in which the old value is served if computing raises.
        retry_after: seconds after a failure in which the old value is served without another try.
        soft_timeout: seconds of waiting after which the old value is served, within
            `stale_if_error`; the computation goes on and is stored.
        cache_errors: exceptions to store and raise again, each with its ttl, such as
            `{LookupError: "5m"}`.
        each: the name of a parameter that holds a collection: results are cached for each of its
            elements, and one call computes all missing ones.
        cutoff: if a recomputed result equals the last one, results that were built on it stay
            valid.
        name: the function's id, instead of `"module:qualname"`.
        cache_if: predicate of the result; if it is False, the result is returned but not stored.
        compress: store big results compressed: True (from 64 KiB on), False, or a minimum size such
            as `"1MiB"`; None: as the setting `compress` says.
        replay: store what the function prints and displays with its result, and show it again with
            each answer from the cache.

    Raises:
        OptionError: an option is wrong; the message names it, its value and the fix.
    """
    if len(args) == 1 and (callable(args[0]) or _is_wrapper(args[0])):
        return cache(**kwargs)(args[0])
    if len(args) == 1:
        options.refuse_property(args[0])
    bound = _SIGNATURE.bind(*args, **kwargs)
    bound.apply_defaults()
    given = dict(bound.arguments)
    function_options.check(given)
    return public(functools.partial(_decorate, given=given))


_SIGNATURE = inspect.signature(get_overloads(cache)[1]).replace(
    return_annotation=inspect.Signature.empty
)
cache.__signature__ = _SIGNATURE  # type: ignore[attr-defined]
if not TYPE_CHECKING:  # its types are those of the overloads
    cache = public(cache)


def _is_wrapper(value: Any) -> bool:
    return isinstance(value, (staticmethod, classmethod))


def _decorate(function: Any, given: Mapping[str, Any]) -> Any:
    if isinstance(function, staticmethod):
        return staticmethod(_decorate(function.__func__, given))
    if isinstance(function, classmethod):
        made = _decorate(function.__func__, given)
        made._bind_to_class()
        return made
    options.function("function", function)
    made = _class_for(function, given)(function, given)
    made._made_in_class_body = classmethods.in_class_body()
    classmethods.bind_later(made, made._bind_to_class, function)
    return made


def _class_for(function: Any, given: Mapping[str, Any]) -> type[CachedFunction[Any, Any]]:
    """Return the class of the cached function to create."""
    if options.generator_kind(function):
        from memo.decorators import streaming

        return streaming.class_for(function, given)
    if given["each"] is None:
        return _CLASSES[options.is_async(function), given["replay"]]
    from memo.decorators import elementwise

    return elementwise.class_for(function, given)


_CLASSES: dict[tuple[bool, bool], type[CachedFunction[Any, Any]]] = {
    (False, False): CachedFunction,
    (True, False): CachedCoroutine,
    (False, True): ReplayingFunction,
    (True, True): ReplayingCoroutine,
}
"""(it is an `async def`, it replays) -> the class of the cached function."""
