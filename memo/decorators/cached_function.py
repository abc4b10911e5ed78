"""The decorator `cache`, and the cached functions that it returns.

The kind of a function (`def` or `async def`) is decided once, at decoration.  A sync function runs
the engine over the blocking port, in the caller's thread; an async one over its running loop.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import itertools
import os
import sys
import time
import warnings
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import suppress
from contextvars import ContextVar
from typing import (
    TYPE_CHECKING,
    Any,
    Concatenate,
    Generic,
    ParamSpec,
    Self,
    TypeAlias,
    TypeVar,
    cast,
    get_overloads,
    overload,
)

from memo import engine, metrics, stores
from memo.decorators import assembly, classmethods
from memo.decorators.helpers import (
    NotGiven,
    OwnAnnotations,
    OwnDoc,
    helper,
    passes_on,
    without,
)
from memo.engine import replay
from memo.engine.call import NOTHING, Function, NotYet, Raised, hindered, keyed
from memo.errors import (
    NotCachedError,
    OptionError,
    at_the_call,
    ending_at_the_call,
    label,
    public,
    users,
)
from memo.keys import bindings
from memo.keys.bindings import ABSENT
from memo.keys.call_keys import GLOBAL, Call, Keyer
from memo.keys.encoding import canonical
from memo.keys.fingerprint.function_version import Identity, function_id
from memo.keys.offloading import HeavyError
from memo.metrics.recorder import COUNTERS, cache_info
from memo.records import codec
from memo.runtime.blocking import BLOCKING, Blocking, drive
from memo.runtime.native import native, run_elsewhere
from memo.runtime.port import Port
from memo.runtime.reasons import DISABLED
from memo.settings import configuration, durations, modes, options
from memo.settings.modes import Mode
from memo.settings.options import Policy
from memo.stores.protocols import CacheProtocol
from memo.validity.dependencies import Dependencies, File
from memo.validity.stamps import Turn

if TYPE_CHECKING:
    from typing import TypedDict, Unpack

P = ParamSpec("P")
Q = ParamSpec("Q")
R = TypeVar("R")
S = TypeVar("S")
T = TypeVar("T")

_functions: weakref.WeakSet[CachedFunction[Any, Any]] = weakref.WeakSet()
MISSING: Any = NotGiven("<its own>")
_numbers = itertools.count()
Ttl: TypeAlias = "float | durations.timedelta | str | Callable[[Any], Any] | None"
"""A ttl: seconds, a `timedelta`, `"1h30m"`, None for no expiry, or a callable of the result."""
Span: TypeAlias = "float | durations.timedelta | str"
"""A length of time: seconds, a `timedelta`, or a text such as `"1h30m"`."""
Dependency: TypeAlias = "str | os.PathLike[str] | File | Callable[..., Any]"
"""A file, directory, glob or URL, a `memo.File`, or a callable."""
Drop: TypeAlias = "Callable[[Port], Coroutine[Any, Any, engine.Invalidation]]"
"""A checked invalidation that runs over a port."""


if TYPE_CHECKING:

    class Options(TypedDict, total=False):
        """The options of `cache`, for `cache(f, ttl=5)`; see there."""

        ttl: Ttl
        key_prefix: str | None
        key_resolver: Callable[..., Any] | str | Sequence[str] | None
        use_jitter: bool
        use_lock: bool
        lock_timeout: Span | None
        refresh_ahead: bool
        refresh_threshold: float | None
        provider: CacheProtocol | stores.Chain | None
        ttl_key: str | None
        tags: Iterable[str] | Callable[..., Iterable[str]]
        depends_on: Dependency | Iterable[Dependency]
        check_every: Span
        ignore: Iterable[str]
        version: str | None
        stale_while_revalidate: Span
        stale_if_error: Span
        retry_after: Span
        soft_timeout: Span
        cache_errors: Mapping[type[Exception], Span | None] | None
        each: str | None
        cutoff: bool
        name: str | None
        cache_if: Callable[[Any], bool] | None
        compress: bool | int | str | None
        replay: bool


def functions() -> list[CachedFunction[Any, Any]]:
    """Return the cached functions of this process by id; of several with one id the latest."""
    return sorted(_functions, key=lambda function: (function.function_id, function._number))


class CachedFunction(Generic[P, R]):
    """A function whose results are cached, as returned by `@cache`.

    Calling it returns what the function would return.  Attributes:
        function_id: its id, `"module:qualname"` or its `name`.
        __wrapped__: the function itself, uncached.
    """

    __wrapped__: Callable[P, R]
    _using: Mode | None = None

    def __init__(self, function: Callable[P, R], given: Mapping[str, Any]) -> None:
        options.function("function", function)
        self.of_class = False
        self._helpers: dict[str, Callable[..., Any]] = {}
        self._given = dict(given)
        self._number = next(_numbers)
        self.is_async = isinstance(self, CachedCoroutine)
        self.function_id = function_id(function, given["name"])
        self._function = _assemble(function, self.function_id, given)
        self._adopt(function)
        _functions.add(self)

    def _adopt(self, function: Callable[P, R]) -> None:
        functools.update_wrapper(self, function)
        for name in ("__code__", "__defaults__", "__kwdefaults__"):
            if hasattr(function, name):
                setattr(self, name, getattr(function, name))
        if self.is_async and sys.version_info >= (3, 12):
            inspect.markcoroutinefunction(self)  # type: ignore[type-var]

    @passes_on
    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        function = self._function
        if (
            modes.CURRENT.get() is not None
            or self._using is not None
            or assembly.usual_at != configuration.revision
        ):
            __tracebackhide__ = True  # hides the frame in IPython and pytest, here and below
            mode = self._mode()
            if mode.kind is not None:
                with ending_at_the_call():
                    return cast("R", self._in_mode(mode.kind, aged(function, mode), args, kwargs))
            function = aged(function, mode)
        begun = time.perf_counter()
        try:
            call = function.call(args, kwargs)
            result = engine.answering.at_hand(_blocking, function, call, begun)
        except Exception as error:
            if hindered(error):
                __tracebackhide__ = True
                return self.__wrapped__(*args, **kwargs)
            at_the_call(error)
            raise
        asked = result.asked if type(result) is NotYet else None
        if asked is not None:
            result = engine.answering.settled(BLOCKING, function, call, asked)
        if type(result) is NotYet:
            result = drive(engine.answering.answer(BLOCKING, function, call, args, kwargs, asked))
            if type(result) is Raised:
                __tracebackhide__ = True
                raise result.again()
        return result  # type: ignore[no-any-return]

    def _mode(self) -> Mode:
        """Return the mode of a call: of `using`, else of the context, else of the settings."""
        return (self._using or Mode()).over(modes.CURRENT.get()).over(assembly.mode())

    def _aged(self) -> Function:
        """Return the function with the ages that the mode of a call allows its entries."""
        return aged(self._function, self._mode())

    def _in_mode(
        self, kind: str, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Answer a call in a mode other than the default."""
        __tracebackhide__ = True
        if kind == modes.OFF and not (assembly.enabled() and engine.answering.is_inside()):
            return self.__wrapped__(*args, **kwargs)
        if kind == modes.ONLY:
            result = drive(engine.answering.only(BLOCKING, function, args, kwargs))
            if result is NOTHING:
                raise NotCachedError(self._explained(function, args, kwargs))
            if type(result) is Raised:
                raise result.again()
            return result
        keep = kind == modes.REFRESH
        result = drive(engine.answering.refresh(BLOCKING, function, args, kwargs, keep=keep))
        if type(result) is Raised:
            raise result.again()
        return result

    @public
    def using(
        self,
        *,
        mode: modes.Kind | None = None,
        max_age: float | str | durations.timedelta | None = None,
        ttl: Ttl = MISSING,
    ) -> Self:
        """Return the same function with other settings for its calls, not for calls inside them.

        ::

            load.using(max_age="1m")("EU")

        Args:
            mode: as for `memo.mode`.
            max_age: older entries are not used, even within their ttl.
            ttl: replaces the function's own, for storing and for judging entries.

        Raises:
            OptionError: an argument is wrong.
        """
        made = object.__new__(type(self))
        made.__dict__.update(self.__dict__)
        made._using = modes.checked(mode, max_age).over(self._using)
        if ttl is not MISSING:
            made._function = self._function.under(
                self._function.policy._replace(ttl=options.given_ttl("ttl", ttl))
            )
        return made

    # Which of them fits is told by the call that the function takes: a class method's begins with
    # the class, a method's with the instance, and a static method's with neither.
    @overload
    def __get__(  # type: ignore[misc]  # not every cached function takes a class
        self: Callable[Concatenate[type[S], Q], T], instance: None, owner: type[S]
    ) -> BoundFunction[Q, T]: ...
    @overload
    def __get__(self, instance: None, owner: type) -> Self: ...
    @overload
    def __get__(  # type: ignore[misc]
        self: Callable[Concatenate[type[S], Q], T], instance: S, owner: type[S] | None = None
    ) -> BoundFunction[Q, T]: ...
    @overload
    def __get__(
        self: Callable[Concatenate[S, Q], T], instance: S, owner: type | None = None
    ) -> BoundFunction[Q, T]: ...
    @overload
    def __get__(self, instance: object, owner: type | None = None) -> Self: ...
    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if self.of_class:
            return BoundFunction(self, owner or type(instance))
        if instance is None:
            return self
        if not self._function.keyer.takes_self:  # assigned to a class after its body, or a `klass`
            self._function.keyer.method = True
        return BoundFunction(self, instance)

    def __set_name__(self, owner: type, name: str) -> None:
        self._function.keyer.method = True

    def _bind_to_class(self) -> None:
        """Turn into a class method: bound to the class, even when accessed through an instance.

        `classmethods` explains why `classmethod` alone is not enough.
        """
        self.of_class = self._function.keyer.method = True

    def __repr__(self) -> str:
        return f"<cached {self.function_id}{_shown_policy(self._function)}>"

    def _repr_html_(self) -> str:
        """Name, ttl and counters as HTML; no entry is read."""
        from memo.metrics import rendering

        info = self.cache_info()
        facts = {
            "signature": inspect.signature(self.__wrapped__),
            "fresh for": _span(self._function.policy.ttl),
            "addresses": f"{self._function.keyer.prefix}:…",
            "here": f"{rendering.counted(info.hits, 'hit')}, "
            f"{rendering.counted(info.misses, 'miss', 'misses')}",
        }
        return rendering.facts_html(f"cached {label(self.function_id)}", facts)

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: Any) -> Self:
        return self

    def __reduce__(self) -> Any:
        """Pickle by reference if it can be imported, else by value with its id and code version.

        So a worker finds the same entries although it has neither file nor source.  The settings
        made with `configure` in this process are included (`configuration.carried`).
        """
        module, name = self.__module__, getattr(self, "__qualname__", "")
        settings = _settings()
        if module != "__main__" and _at(module, name) is self:
            return _found, (module, name, *settings)
        if not _whole.get():
            return _unpacked, (_packed(self), *settings)
        given = {**self._given, "name": self.function_id}
        code = self._function.identity.digest()
        return _rebuilt, (type(self), self.__wrapped__, given, code, self.of_class)

    # --- helpers ---------------------------------------------------------------------------------

    @helper()
    def key(self, /, *args: P.args, **kwargs: P.kwargs) -> str:
        """Return the key of this call: 40 hexadecimal digits, for `memo.invalidate(key=...)`."""
        f = self._function
        call = f.call(args, dict(kwargs))
        give(call, self.function_id)
        return call.text

    @helper()
    async def akey(self, /, *args: P.args, **kwargs: P.kwargs) -> str:
        """As `key`, without blocking the event loop while big arguments are hashed."""
        return await native().offload(functools.partial(self.key, *args, **kwargs))

    @helper()
    def address(self, /, *args: P.args, **kwargs: P.kwargs) -> str:
        """Return the address of this call, `"prefix:arg:arg"`, for `memo.invalidate(key=...)`."""
        f = self._function
        return f.call(args, dict(kwargs)).address

    @helper()
    async def aaddress(self, /, *args: P.args, **kwargs: P.kwargs) -> str:
        """As `address`, without blocking the event loop while big arguments are hashed."""
        return await native().offload(functools.partial(self.address, *args, **kwargs))

    @helper(partial=True, reason="")
    def invalidate(
        self, /, *args: Any, reason: str = MISSING, **kwargs: Any
    ) -> engine.Invalidation:
        """Invalidate every entry whose arguments include the given ones; without any: all entries.

        Args:
            args, kwargs: arguments of the function; any of them may be left out.
            reason: kept with the invalidation, and shown by `explain`.  If the function has an
                argument of this name, it is that argument instead.

        Returns:
            The entries that matched, and the outcome in each tier.

        Raises:
            OptionError: the function has no such argument, or the value is a function.
        """
        return drive(self._dropped(ABSENT, args, kwargs, reason)(BLOCKING))

    @helper(partial=True, reason="")
    async def ainvalidate(
        self, /, *args: Any, reason: str = MISSING, **kwargs: Any
    ) -> engine.Invalidation:
        """As `invalidate`, without blocking the event loop."""
        return await self._dropped(ABSENT, args, kwargs, reason)(native())

    @helper(partial=True, reason="")
    def expire(self, /, *args: Any, reason: str = MISSING, **kwargs: Any) -> engine.Invalidation:
        """Let entries expire now; arguments, result and errors are those of `invalidate`.

        Within `stale_while_revalidate` the old value is served while one refresh runs.
        """
        return drive(self._dropped(ABSENT, args, kwargs, reason, soft=True)(BLOCKING))

    @helper(partial=True, reason="")
    async def aexpire(
        self, /, *args: Any, reason: str = MISSING, **kwargs: Any
    ) -> engine.Invalidation:
        """As `expire`, without blocking the event loop."""
        return await self._dropped(ABSENT, args, kwargs, reason, soft=True)(native())

    def _apart(
        self, kwargs: dict[str, Any], name: str, given: Any, otherwise: Any
    ) -> tuple[dict[str, Any], Any]:
        """Separate a helper's own option from the call's arguments.

        If the function has an argument of that name, the value belongs to the call.
        """
        if given is MISSING or name not in self._function.keyer.plan.names:
            return kwargs, otherwise if given is MISSING else given
        return {**kwargs, name: given}, otherwise

    def _dropped(
        self,
        own: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        reason: str,
        *,
        soft: bool = False,
    ) -> Drop:
        """Drop entries as a caller's `invalidate` or `expire` asks for it; see `_drop`."""
        kwargs, reason = self._apart(kwargs, "reason", reason, "")
        _refuse_predicates(args, kwargs)
        return self._drop(args, kwargs, reason, own=own, soft=soft)

    def _drop(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        reason: str,
        *,
        own: Any = ABSENT,
        soft: bool = False,
        count: bool = True,
    ) -> Drop:
        """Return the invalidation of entries whose arguments include the given ones.

        Args:
            own: the object whose entries they are; `ABSENT`: all objects.
        """
        from memo.engine import invalidating

        keyer = self._function.keyer
        given = f"({keyer.described(args, kwargs)})" if args or kwargs else ""
        return functools.partial(
            invalidating.invalidate,
            chains=[self._function.chain()],
            turns=self._turns(args, kwargs, own),
            target=f"{self.function_id}{given}",
            reason=reason,
            soft=soft,
            count=count,
            hint=lambda _: keyer.mistyped(args, kwargs),
        )

    def _turns(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], own: Any) -> list[Turn]:
        """Return the turns that invalidate the entries whose arguments include the given ones."""
        state = self._function.state(own)
        pairs, whole = self._function.keyer.partial(args, kwargs, own, state)
        return [Turn(f"f:{self.function_id}", pairs, whole)]

    @helper()
    def refresh(self, /, *args: P.args, **kwargs: P.kwargs) -> Any:
        """Compute now, store, and return the value; an async function runs on a loop of its own."""
        __tracebackhide__ = True
        if not assembly.enabled():
            return _plainly(self.__wrapped__, args, kwargs)
        if self.is_async:
            result = run_elsewhere(
                lambda port: engine.answering.refresh(port, self._function, args, kwargs)
            )
        else:
            result = drive(engine.answering.refresh(BLOCKING, self._function, args, kwargs))
        if type(result) is Raised:
            raise result.again()
        return replay.bare(result)

    @helper()
    async def arefresh(self, /, *args: P.args, **kwargs: P.kwargs) -> Any:
        """As `refresh`, without blocking the event loop."""
        __tracebackhide__ = True
        port = native()
        if self.is_async and not assembly.enabled():
            return await cast("Awaitable[Any]", self.__wrapped__(*args, **kwargs))
        if self.is_async:
            result = await engine.answering.refresh(port, self._function, args, kwargs)
            if type(result) is Raised:
                raise result.again()
            return replay.bare(result)
        return await port.offload(functools.partial(self.refresh, *args, **kwargs))

    @helper(value=inspect.Parameter.empty)
    def put(self, value: Any, /, *args: P.args, **kwargs: P.kwargs) -> None:
        """Store a value as the result of a call, without computing it."""
        if assembly.enabled():
            drive(engine.answering.put(BLOCKING, self._function, args, kwargs, value))

    @helper(value=inspect.Parameter.empty)
    async def aput(self, value: Any, /, *args: P.args, **kwargs: P.kwargs) -> None:
        """As `put`, without blocking the event loop."""
        if assembly.enabled():
            await engine.answering.put(native(), self._function, args, kwargs, value)

    @helper(default=None)
    def peek(self, /, *args: Any, default: Any = MISSING, **kwargs: Any) -> Any:
        """Return the stored value if a call would use it, else `default` (None); never computes.

        If the function has an argument called `default`, it is that one, and the default is None.
        """
        kwargs, default = self._apart(kwargs, "default", default, None)
        if not assembly.enabled():
            return default
        return replay.bare(
            drive(engine.answering.peek(BLOCKING, self._aged(), args, kwargs, default))
        )

    @helper(default=None)
    async def apeek(self, /, *args: Any, default: Any = MISSING, **kwargs: Any) -> Any:
        """As `peek`, without blocking the event loop."""
        kwargs, default = self._apart(kwargs, "default", default, None)
        if not assembly.enabled():
            return default
        return replay.bare(
            await engine.answering.peek(native(), self._aged(), args, kwargs, default)
        )

    @helper()
    def is_cached(self, /, *args: P.args, **kwargs: P.kwargs) -> bool:
        """True if this call would be answered from the cache; does not load the value."""
        enabled = assembly.enabled()
        return enabled and drive(engine.answering.is_cached(BLOCKING, self._aged(), args, kwargs))

    @helper()
    async def ais_cached(self, /, *args: P.args, **kwargs: P.kwargs) -> bool:
        """As `is_cached`, without blocking the event loop."""
        enabled = assembly.enabled()
        return enabled and await engine.answering.is_cached(native(), self._aged(), args, kwargs)

    @helper()
    def explain(self, /, *args: Any, plan: bool = MISSING, **kwargs: Any) -> engine.Explanation:
        """Explain whether this call would hit, and if not, why; neither computes nor loads.

        Args:
            plan: also list which cached calls beneath it would be computed, revalidated or hit, and
                how long they took last time.  If the function has an argument of this name, it is
                that argument instead.
        """
        kwargs, wanted = self._apart(kwargs, "plan", plan, False)
        function = self._aged()
        found = self._as_things_are(self._explained(function, args, kwargs))
        return drive(self._planned(BLOCKING, function, found, args, kwargs)) if wanted else found

    def _as_things_are(self, found: engine.Explanation) -> engine.Explanation:
        """Return the explanation, or the reason why the cache answers no call at present."""
        kind = self._mode().kind
        if not assembly.enabled():
            source = configuration.current().sources["enabled"]
            why = (DISABLED, f"the setting enabled is false ({source}): every call computes")
        elif kind == modes.OFF:
            why = (f'mode "{kind}"', "calls neither read nor store")
        elif kind == modes.REFRESH:
            why = (f'mode "{kind}"', "calls compute and store")
        else:
            return found
        import dataclasses

        return dataclasses.replace(found, hit=False, reason=why[0], facts=(why[1],), diff=())

    async def _planned(
        self,
        port: Port,
        function: Function,
        found: engine.Explanation,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> engine.Explanation:
        from memo.engine.explaining import Planner

        known = {one.function_id: one._function for one in functions()}
        planner = Planner(port, function.chain(), {**known, self.function_id: function})
        call = await keyed(port, function, args, kwargs)
        await planner.like(self.function_id, call.text, call.shown, call.summary)
        import dataclasses

        return dataclasses.replace(found, steps=tuple(planner.steps))

    def _explained(
        self, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> engine.Explanation:
        from memo.engine import explaining

        return drive(explaining.explain(BLOCKING, function, assembly.manifests(), args, kwargs))

    @helper()
    async def aexplain(
        self, /, *args: Any, plan: bool = MISSING, **kwargs: Any
    ) -> engine.Explanation:
        """As `explain`, without blocking the event loop."""
        from memo.engine import explaining

        kwargs, wanted = self._apart(kwargs, "plan", plan, False)
        port, function = native(), self._aged()
        written = assembly.manifests()
        found = await explaining.explain(port, function, written, args, kwargs)
        found = self._as_things_are(found)
        return await self._planned(port, function, found, args, kwargs) if wanted else found

    def cache_info(self) -> metrics.CacheInfo:
        """Hits, misses, maxsize (None) and currsize, as for `functools.lru_cache`."""
        return cache_info(self.function_id)

    async def acache_info(self) -> metrics.CacheInfo:
        """As `cache_info`; neither of them blocks."""
        return self.cache_info()

    def cache_clear(self) -> None:
        """Drop every entry of this function, and reset its counters."""
        drive(self._clear(BLOCKING))

    async def acache_clear(self) -> None:
        """As `cache_clear`, without blocking the event loop."""
        await self._clear(native())

    async def _clear(self, port: Port) -> None:
        chain = self._function.chain()
        done = await self._drop((), {}, "cache_clear")(port)
        if done.missed:
            await self._say_nothing_cleared(port)
        await chain.clear(port, chain.prefix(self.function_id))
        COUNTERS.reset(self.function_id)

    async def _say_nothing_cleared(self, port: Port) -> None:
        """Warn once, naming the functions whose entries were probably intended."""
        from memo.decorators import names

        known = await names.functions_known(port, [])
        bare = self.function_id.rpartition(":")[2]
        others = [one for one in known if one.rpartition(":")[2] == bare]
        others = [label(one) for one in others if one != self.function_id]
        if others and not self.__dict__.get("_said_nothing_cleared"):
            self._said_nothing_cleared = True
            warnings.warn(
                f"{label(self.function_id)}.cache_clear() cleared nothing: no entry of it is on "
                f"this host. Entries of the same name are of {', '.join(sorted(others))}.",
                stacklevel=2,
            )


class CachedCoroutine(CachedFunction[P, R]):
    """A cached `async def`: calling it returns a coroutine."""

    _is_coroutine = property(lambda self: _asyncio_marker())
    _has_begun = False

    @passes_on
    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> Any:
        if kwargs or len(args) != self._function.keyer.usual:
            try:
                self._function.keyer.check_call(args, kwargs)
            except TypeError as error:
                at_the_call(error)
                raise
        return self._called(args, kwargs)

    async def _called(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        function = self._function
        if (
            modes.CURRENT.get() is not None
            or self._using is not None
            or assembly.usual_at != configuration.revision
        ):
            __tracebackhide__ = True
            mode = self._mode()
            function = aged(function, mode)
            if mode.kind is not None:
                with ending_at_the_call():
                    return await self._awaited_in_mode(mode.kind, function, args, kwargs)
        begun = time.perf_counter()
        try:
            try:
                call = function.call(args, kwargs, True) if self._has_begun else None
            except HeavyError:  # hashing them here would block the event loop
                call = None  # made below, so that errors have no context
            if call is None:
                call = await self._keyed(function, args, kwargs)
            result = engine.answering.at_hand(native, function, call, begun)
        except Exception as error:
            if hindered(error):
                __tracebackhide__ = True
                return await cast("Awaitable[Any]", self.__wrapped__(*args, **kwargs))
            at_the_call(error)
            raise
        asked = result.asked if type(result) is NotYet else None
        if asked is not None:
            asked.answer = await asked.answer
            result = engine.answering.settled(native(), function, call, asked)
        if type(result) is NotYet:
            result = await engine.answering.answer(native(), function, call, args, kwargs, asked)
            if type(result) is Raised:
                __tracebackhide__ = True
                raise result.again()
        return result

    async def _keyed(
        self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Call:
        """Make a key in a thread, since it would block the event loop."""
        if not self._has_begun:  # reading its code takes milliseconds: one function at a time
            await native().turn()
            self._has_begun = True
            with suppress(HeavyError):
                return function.call(args, kwargs, True)
        return await keyed(native(), function, args, kwargs)

    async def _awaited_in_mode(
        self, kind: str, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Answer a call in a mode other than the default."""
        __tracebackhide__ = True
        if kind == modes.OFF and not (assembly.enabled() and engine.answering.is_inside()):
            return await cast("Awaitable[Any]", self.__wrapped__(*args, **kwargs))
        port = native()
        if kind == modes.ONLY:
            result = await engine.answering.only(port, function, args, kwargs)
            if result is NOTHING:
                from memo.engine import explaining

                written = assembly.manifests()
                raise NotCachedError(
                    await explaining.explain(port, function, written, args, kwargs)
                )
            if type(result) is Raised:
                raise result.again()
            return result
        keep = kind == modes.REFRESH
        result = await engine.answering.refresh(port, function, args, kwargs, keep=keep)
        if type(result) is Raised:
            raise result.again()
        return result


class ReplayingFunction(CachedFunction[P, R]):
    """A cached function that replays what the computation printed and displayed (`replay`)."""

    @passes_on
    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return cast("R", replay.performed(super().__call__(*args, **kwargs)))
        except Exception as error:
            users(error)
            raise


class ReplayingCoroutine(CachedCoroutine[P, R]):
    """As `ReplayingFunction`, for an `async def`."""

    async def _called(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            return replay.performed(await super()._called(args, kwargs))
        except Exception as error:
            users(error)
            raise


def _asyncio_marker() -> object:
    coroutines = sys.modules.get("asyncio.coroutines")
    return getattr(coroutines, "_is_coroutine", None)


if TYPE_CHECKING:

    class _Helpers(CachedFunction[P, R]):
        """The helpers of a bound function, provided by its `__getattr__`."""

        def __get__(  # type: ignore[override]  # it is bound already
            self, instance: object, owner: type | None = None
        ) -> Self: ...

else:
    _Helpers = Generic


class BoundFunction(_Helpers[P, R]):
    """A cached function as a method of an instance, whose state is part of its keys."""

    __slots__ = ("__func__", "__self__", "__weakref__")
    __doc__ = OwnDoc(__doc__)  # pyright: ignore[reportAssignmentType]
    __annotations__ = OwnAnnotations()
    _DROPS = {  # noqa: RUF012 - unannotated: `__annotations__` is the function's
        "invalidate": (False, False),
        "ainvalidate": (True, False),
        "expire": (False, True),
        "aexpire": (True, True),
    }
    """Name -> (it is awaited, it is soft)."""
    _CALLS = (
        *("key", "akey", "address", "aaddress", "refresh", "arefresh", "peek", "apeek"),
        *("is_cached", "ais_cached"),
    )

    def __init__(self, function: CachedFunction[Any, R], instance: Any) -> None:
        self.__func__ = function
        self.__self__ = instance

    @passes_on
    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return self.__func__(self.__self__, *args, **kwargs)
        except Exception as error:
            at_the_call(error)
            raise

    def _attribute(self, name: str) -> Any:
        """Return an attribute of the cached function; a helper bound to the object."""
        if name == "__signature__":
            return without(inspect.signature(self.__func__.__wrapped__), 0)
        found = getattr(self.__func__, name)
        if name == "using":
            return functools.update_wrapper(functools.partial(_bound_using, self), found)
        if name in {"put", "aput"}:
            return self._like(functools.partial(self._put, found), found, 1)
        if name in self._DROPS:
            own = functools.partial(self._drop_own, *self._DROPS[name])
            of_class = isinstance(self.__self__, type)
            return self._like(functools.partial(found) if of_class else own, found)
        if name in self._CALLS or name in {"explain", "aexplain"}:
            made = functools.partial(found, self.__self__)
            made.__doc__, made.__annotations__ = found.__doc__, {}
            return made
        return found

    if not TYPE_CHECKING:  # a misspelled attribute is an error for type checkers
        __getattr__ = _attribute

    def _like(self, made: Any, found: Any, at: int = 0) -> Any:
        """Return a helper bound to the object, with the function's signature without `self`."""
        functools.update_wrapper(made, found)
        made.__signature__ = without(inspect.signature(found), at)
        return made

    def _put(self, put: Any, value: Any, /, *args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        return put(value, self.__self__, *args, **kwargs)

    @public
    def _drop_own(
        self, awaited: bool, soft: bool, /, *args: Any, reason: str = MISSING, **kwargs: Any
    ) -> Any:
        """Invalidate the entries of an object in its present state."""
        drop = self.__func__._dropped(self.__self__, args, kwargs, reason, soft=soft)
        return _in_this_loop(drop) if awaited else drive(drop(BLOCKING))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, BoundFunction)
            and self.__func__ is other.__func__
            and self.__self__ is other.__self__
        )

    def __hash__(self) -> int:
        return hash((id(self.__func__), id(self.__self__)))

    def __reduce__(self) -> Any:
        return BoundFunction, (self.__func__, self.__self__)

    def __repr__(self) -> str:
        own = self.__self__
        return f"<bound {self.__func__!r} of {getattr(own, '__name__', type(own).__name__)}>"


async def _in_this_loop(drop: Drop) -> engine.Invalidation:
    return await drop(native())


_GIVEN = 4096
"""Most keys whose calls this process remembers after it has returned them."""
_given: dict[str, Turn] = {}


def give(call: Call, function_id: str) -> None:
    """Remember the call behind a key that is returned, so that the key can be invalidated."""
    if len(_given) >= _GIVEN:
        with suppress(KeyError, StopIteration, RuntimeError):  # other threads do the same
            del _given[next(iter(_given))]
    _given[call.text] = Turn(f"f:{function_id}", call.arguments, whole=True)


def given_call(key: str) -> Turn | None:
    """Return the turn for the call with a key that this process has returned.

    None if it has not.
    """
    return _given.get(key)


def _refuse_predicates(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Check that no argument of an invalidation is a function, which would select nothing.

    Raises:
        OptionError: one is.
    """
    for name, value in (*enumerate(args, 1), *kwargs.items()):
        if inspect.isroutine(value):
            which = name if isinstance(name, str) else f"argument {name}"
            fix = (
                "is a function, and predicates are not supported: give the values one by one, "
                "or for a call that takes a function memo.invalidate(key=f.key(...))."
            )
            raise OptionError(which, value, fix)


def _bound_using(method: BoundFunction[Any, Any], **given: Any) -> BoundFunction[Any, Any]:
    return BoundFunction(method.__func__.using(**given), method.__self__)


def aged(function: Function, mode: Mode) -> Function:
    """Return a function with the ages that a mode allows its entries."""
    if mode.max_age is None:
        return function
    return function.under(function.policy._replace(max_age=mode.max_age))


@overload
def explain(
    function: CachedFunction[P, R], /, *args: P.args, **kwargs: P.kwargs
) -> engine.Explanation: ...
@overload
def explain(function: str, /, *args: Any, **kwargs: Any) -> engine.Explanation: ...
def explain(function: Any, /, *args: Any, **kwargs: Any) -> engine.Explanation:
    """Explain whether a call would hit, and if not, why; as `function.explain(...)`.

    Args:
        function: a cached function of this process, or any name of it that tables show.

    Raises:
        OptionError: no function of this process has the name, or several have; or it is not cached.
    """
    if isinstance(function, str):
        from memo.decorators import names

        here = {one.function_id: one for one in functions()}
        function = here[names.one_of("function", function, list(here))]
    if not hasattr(function, "explain"):
        fix = "is not cached; give a function that @cache decorates, or its name."
        raise OptionError("function", function, fix)
    found: engine.Explanation = function.explain(*args, **kwargs)
    return found


if not TYPE_CHECKING:  # its types are those of the overloads
    explain = public(explain)


def _plainly(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Call a function, `async def` or `def`, from sync code, as if it were not cached."""
    __tracebackhide__ = True
    result = function(*args, **kwargs)
    if not inspect.iscoroutine(result):
        return result

    async def settled(port: Port) -> Any:
        return await port.settle(result)

    return run_elsewhere(settled)


def _shown_policy(function: Function) -> str:
    ttl = function.policy.ttl
    return " ttl=f(result)" if callable(ttl) else f" ttl={ttl}"


def _span(ttl: Any) -> str:
    """Describe a ttl in words."""
    from memo.metrics import rendering

    if callable(ttl):
        return "as its result says"
    if ttl == options.INHERIT:
        return "as long as what it was built on"
    return "ever" if ttl is None else rendering.duration(ttl)


def _dependencies(
    function: Callable[..., Any], identity: str, given: Mapping[str, Any]
) -> Dependencies | None:
    signature = bindings.signature(function)
    annotations = bindings.hints(function, signature)
    made = Dependencies(
        *(identity, given["depends_on"], signature, annotations, canonical.digest),
        check_every=given["check_every"],
    )
    return made or None


def _asked(
    port: Port, function: Function, call: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Coroutine[Any, Any, Any]:
    return engine.answering.answer(port, function, call, args, kwargs)


def _blocking() -> Blocking:
    return BLOCKING


def _assemble(function: Callable[..., Any], identity: str, given: Mapping[str, Any]) -> Function:
    replay = options.flag("replay", given["replay"])
    ignored = options.texts("ignore", given["ignore"])
    state = [label for label in ignored if label.startswith(GLOBAL)]
    keyer = Keyer(
        function,
        function_id=identity,
        key_prefix=options.text("key_prefix", given["key_prefix"]),
        key_resolver=given["key_resolver"],
        ignore=[name for name in ignored if name not in state],
        tags=_tags(given["tags"]),
        method=_is_method(function),
        replay=replay,
    )
    return Function(
        identity,
        function,
        keyer,
        Identity(
            function,
            version=options.text("version", given["version"]),
            name=given["name"],
            ignored=state,
            learned=functools.partial(assembly.changed, identity),
        ),
        _policy(given),
        assembly.chain_of(given["provider"]),
        _asked,
        assembly.live_ttl(given["ttl_key"]),
        _dependencies(function, identity, given),
        assembly.write_down,
        assembly.compress(given["compress"]),
        replay=replay,
        cutoff=options.flag("cutoff", given["cutoff"]),
        is_async=options.is_async(function),
        teach=assembly.teach,
    )


_POLICY = (
    "ttl",
    "use_jitter",
    "use_lock",
    "lock_timeout",
    "refresh_ahead",
    "refresh_threshold",
    "ttl_key",
    "stale_while_revalidate",
    "stale_if_error",
    "retry_after",
    "soft_timeout",
    "cache_errors",
    "cache_if",
)


def _policy(given: Mapping[str, Any]) -> Policy:
    return options.policy(**{name: given[name] for name in _POLICY})


def _tags(tags: Any) -> Any:
    return tags if callable(tags) else options.texts("tags", tags)


def _is_method(function: Callable[..., Any]) -> bool:
    """True if a function is being decorated in a class body and takes `self` or `cls`."""
    outer, _, _ = getattr(function, "__qualname__", "").rpartition(".")
    if not outer or outer.endswith("<locals>"):
        return False
    code = getattr(inspect.unwrap(function), "__code__", None)
    return code is not None and code.co_varnames[:1] in {("self",), ("cls",), ("mcs",)}


def _settings() -> tuple[dict[str, Any], str]:
    """Return settings to send to a worker, and the process that sends them."""
    return ({}, "") if codec.storing.get() else (configuration.carried(), configuration.PROCESS)


_whole: ContextVar[bool] = ContextVar("memo_whole", default=False)
"""True while cloudpickle pickles a cached function with everything that it reaches."""


def _packed(function: CachedFunction[Any, Any]) -> bytes:
    """Pickle a function by value, so that a pickler without support for functions can carry it."""
    token = _whole.set(True)
    try:
        return codec.by_value(function)
    finally:
        _whole.reset(token)


def _unpacked(packed: bytes, settings: Mapping[str, Any], sender: str) -> Any:
    import pickle

    configuration.adopt(settings, sender)
    return pickle.loads(packed)


def _at(module: str, name: str) -> Any:
    """Look up a dotted name in a module; for a method, the function itself."""
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)  # `None` has no such attribute
    return found.__func__ if isinstance(found, BoundFunction) else found


def _found(module: str, name: str, settings: Mapping[str, Any], sender: str) -> Any:
    configuration.adopt(settings, sender)
    importlib.import_module(module)
    found = _at(module, name)
    if found is None:
        raise AttributeError(f"module {module!r} has no cached function {name!r}")
    return found


def _rebuilt(
    kind: type[CachedFunction[Any, Any]],
    function: Callable[..., Any],
    given: Mapping[str, Any],
    code: str,
    of_class: bool,
) -> CachedFunction[Any, Any]:
    made = kind(function, given)
    made._function.identity = Identity(function, digest=code)
    if of_class:
        made._bind_to_class()
    return made


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
        options.no_property(args[0])
    bound = _SIGNATURE.bind(*args, **kwargs)
    bound.apply_defaults()
    given = dict(bound.arguments)
    _check(given)
    return public(functools.partial(_decorated, given=given))


_SIGNATURE = inspect.signature(get_overloads(cache)[1]).replace(
    return_annotation=inspect.Signature.empty
)
cache.__signature__ = _SIGNATURE  # type: ignore[attr-defined]
if not TYPE_CHECKING:  # its types are those of the overloads
    cache = public(cache)


def _is_wrapper(value: Any) -> bool:
    return isinstance(value, (staticmethod, classmethod))


def _check(given: Mapping[str, Any]) -> None:
    """Check the options that can be checked without the function."""
    options.texts("ignore", given["ignore"])
    options.text("name", given["name"], options.LONGEST)
    options.text("version", given["version"])
    options.text("key_prefix", given["key_prefix"])
    options.flag("replay", given["replay"])
    options.text("each", given["each"])
    options.flag("cutoff", given["cutoff"])
    _tags(given["tags"])
    assembly.chain_of(given["provider"])
    assembly.compress(given["compress"])
    _policy(given)


def _decorated(function: Any, given: Mapping[str, Any]) -> Any:
    if isinstance(function, staticmethod):
        return staticmethod(_decorated(function.__func__, given))
    if isinstance(function, classmethod):
        made = _decorated(function.__func__, given)
        made._bind_to_class()
        return made
    options.function("function", function)
    made = _kind(function, given)(function, given)
    classmethods.expect(made, made._bind_to_class, function)
    return made


def _kind(function: Any, given: Mapping[str, Any]) -> type[CachedFunction[Any, Any]]:
    """Return the class of the cached function to create."""
    if options.generates(function):
        from memo.decorators import streaming

        return streaming.kind(function, given)
    if given["each"] is None:
        return _KINDS[options.is_async(function), given["replay"]]
    from memo.decorators import elementwise

    return elementwise.kind(function, given)


_KINDS: dict[tuple[bool, bool], type[CachedFunction[Any, Any]]] = {
    (False, False): CachedFunction,
    (True, False): CachedCoroutine,
    (False, True): ReplayingFunction,
    (True, True): ReplayingCoroutine,
}
"""(it is an `async def`, it replays) -> the class of the cached function."""
