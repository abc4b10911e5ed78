"""Cached functions: the objects that the decorator `cache` returns.

A function's kind (`def` or `async def`) is decided once, at decoration.  A sync function runs the
engine over the blocking port, in the caller's thread; an async one over the running event loop.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import sys
import time
import warnings
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import suppress
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
    overload,
)

from memo import engine, metrics
from memo.decorators import assembly, pickling
from memo.decorators.bound_functions import BoundFunction
from memo.decorators.function_options import Ttl, make_function
from memo.decorators.helpers import ITS_OWN, helper, takes_any_arguments
from memo.engine import replay
from memo.engine.call import (
    NOTHING,
    Function,
    Raised,
    make_call,
    register_cutoff,
    report_if_resource_failure,
)
from memo.errors import (
    NotCachedError,
    OptionError,
    at_the_call,
    cut_to_user_frames,
    ending_at_the_call,
    label,
    public,
)
from memo.keys.bindings import NOT_GIVEN
from memo.keys.call_keys import Call
from memo.keys.fingerprint.function_version import function_id
from memo.keys.offloading import HeavyError
from memo.metrics.recorder import COUNTERS, cache_info
from memo.runtime.blocking import BLOCKING, Blocking, drive
from memo.runtime.memory_budget import remember
from memo.runtime.native import native, run_elsewhere
from memo.runtime.port import Port
from memo.runtime.reasons import DISABLED
from memo.settings import configuration, durations, modes, options
from memo.settings.modes import Mode
from memo.stores.protocols import PendingLookup
from memo.validity.stamps import Turn

P = ParamSpec("P")
Q = ParamSpec("Q")
R = TypeVar("R")
S = TypeVar("S")
T = TypeVar("T")

_functions: weakref.WeakSet[CachedFunction[Any, Any]] = weakref.WeakSet()
_serial_numbers = itertools.count()
Invalidate: TypeAlias = "Callable[[Port], Coroutine[Any, Any, engine.Invalidation]]"
"""A checked invalidation that runs over a port."""


def functions() -> list[CachedFunction[Any, Any]]:
    """Return the cached functions of this process by id; the latest one with an id comes last."""
    return sorted(_functions, key=lambda function: (function.function_id, function._serial_number))


class CachedFunction(Generic[P, R]):
    """A function whose results are cached, as returned by `@cache`.

    A call of it returns the same as a call of the function.  Attributes:
        function_id: its id, `"module:qualname"` or its `name`.
        __wrapped__: the function itself, uncached.
    """

    __slots__ = ("__dict__", "__weakref__", "_function", "_helpers", "_options")
    # not in `__dict__`, which `functools.wraps` copies to a wrapper, and pickle with that
    __wrapped__: Callable[P, R]
    _own_mode: Mode | None = None
    _original: CachedFunction[P, R] | None = None
    _is_copy = False
    _made_in_class_body = False

    def __init__(self, function: Callable[P, R], given: Mapping[str, Any]) -> None:
        options.function("function", function)
        self.of_class = False
        self._helpers: dict[str, Callable[..., Any]] = {}
        self._options = dict(given)
        self._serial_number = next(_serial_numbers)
        self.is_async = isinstance(self, CachedCoroutine)
        self.function_id = function_id(function, given["name"])
        self._function = make_function(function, self.function_id, given)
        self._copy_attributes(function)
        self._register()

    @classmethod
    def _make_copy(cls, function: Callable[P, R], given: Mapping[str, Any]) -> Self:
        """Make a function again that was pickled by value."""
        made = cls.__new__(cls)
        made._is_copy = True
        cls.__init__(made, function, given)
        return made

    def _register(self) -> None:
        """Let this function answer for its id, unless it is a copy and the original is here.

        A copy has its own globals, as they were when it was pickled.
        """
        if self._is_copy and any(
            one.function_id == self.function_id and not one._is_copy for one in _functions
        ):
            return
        _functions.add(self)
        register_cutoff(self._function)
        if self._function.dependencies is not None:
            self._function.dependencies.register()

    def _copy_attributes(self, function: Callable[P, R]) -> None:
        functools.update_wrapper(self, function, updated=())
        for name, value in getattr(function, "__dict__", {}).items():
            # another cached function below, or a wrapper of one, has attributes like ours
            if name not in self.__dict__ and not hasattr(type(self), name):
                setattr(self, name, value)
        for name in ("__code__", "__defaults__", "__kwdefaults__"):
            if hasattr(function, name):
                setattr(self, name, getattr(function, name))
        if self.is_async and sys.version_info >= (3, 12):
            inspect.markcoroutinefunction(self)  # type: ignore[type-var]

    @takes_any_arguments
    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        function = self._function
        if (
            modes.CURRENT_MODE.get() is not None
            or self._own_mode is not None
            or assembly.default_mode_revision != configuration.revision
        ):
            __tracebackhide__ = True  # IPython and pytest hide this frame, here and below
            mode = self._mode()
            if mode.kind is not None:
                with ending_at_the_call():
                    if self._bypasses_cache(mode):
                        return self.__wrapped__(*args, **kwargs)
                    found = drive(self._answer_in_mode(BLOCKING, mode, args, kwargs))
                    return cast("R", value_or_raise(found))
            function = with_max_age(function, mode)
        begun = time.perf_counter()
        try:
            call = function.keyer.call(args, kwargs)
            result = engine.answering.answer_from_first_tier(_blocking_port, function, call, begun)
        except Exception as error:
            if report_if_resource_failure(error):
                __tracebackhide__ = True
                return self.__wrapped__(*args, **kwargs)
            at_the_call(error)
            raise
        pending = result if type(result) is PendingLookup else None
        if pending is not None:
            result = engine.answering.answer_after_lookup(function, call, pending, begun)
        if result is NOTHING:
            result = drive(engine.answering.answer(BLOCKING, function, call, args, kwargs, pending))
            if type(result) is Raised:
                __tracebackhide__ = True
                raise result.again()
        return result  # type: ignore[no-any-return]

    def _mode(self) -> Mode:
        """Return the mode of a call: of `using`, else of the context, else of the settings."""
        return (self._own_mode or Mode()).over(modes.CURRENT_MODE.get()).over(assembly.mode())

    def _function_in_mode(self) -> Function:
        """Return the function with the limit that the current mode sets for the age of entries."""
        return with_max_age(self._function, self._mode())

    def _bypasses_cache(self, mode: Mode) -> bool:
        """True if a call is to run the function itself, and no computation records what it uses."""
        return mode.kind == modes.OFF and not (
            assembly.enabled() and engine.answering.is_inside_computation()
        )

    async def _answer_in_mode(
        self, port: Port, mode: Mode, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Answer a call in a mode other than the default; return the value or `Raised`."""
        __tracebackhide__ = True
        function = with_max_age(self._function, mode)
        if port.native and self._bypasses_cache(mode):
            return await cast("Awaitable[Any]", self.__wrapped__(*args, **kwargs))
        if mode.kind != modes.ONLY:
            keep = mode.kind == modes.REFRESH
            return await engine.answering.refresh(port, function, args, kwargs, keep=keep)
        result = await engine.answering.read_stored(port, function, args, kwargs)
        if result is NOTHING:
            raise NotCachedError(await self._explain_call(port, function, args, kwargs))
        return result

    @public
    def using(
        self,
        *,
        mode: modes.Kind | None = None,
        max_age: float | str | durations.timedelta | None = None,
        ttl: Ttl = ITS_OWN,
    ) -> Self:
        """Return the same function with other settings for its own calls, not for calls inside.

        ::

            load.using(max_age="1m")("EU")

        Args:
            mode: as for `memo.mode`.
            max_age: older entries are not used, even within their ttl.
            ttl: replaces the function's own ttl, when storing and when judging entries.

        Raises:
            OptionError: an argument is wrong.
        """
        made = object.__new__(type(self))
        made.__dict__.update(self.__dict__)
        self._copy_slots(made)
        made._original = self._original or self
        made._own_mode = modes.check_mode(mode, max_age).over(self._own_mode)
        if ttl is not ITS_OWN:
            made._function = self._function.with_policy(
                self._function.policy._replace(ttl=self._checked_ttl(ttl))
            )
        return made

    def _copy_slots(self, made: Any) -> None:
        made._function, made._helpers, made._options = self._function, self._helpers, self._options

    def _checked_ttl(self, ttl: Any) -> Any:
        """Return a ttl for `using` in the form that a policy has.

        Raises:
            OptionError: it is not a ttl for this kind of function.
        """
        return options.given_ttl("ttl", ttl)

    # The first parameter of the function selects the overload: a class method takes the class, a
    # method the instance, and a static method neither.
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
        if not self._function.keyer.method:  # assigned to a class after its body, or a `klass`
            self._function.keyer.method = True
        return BoundFunction(self, instance)

    def __set_name__(self, owner: type, name: str) -> None:
        """Turn into a method, unless the function was only assigned to an attribute.

        A default of a dataclass, for instance, is called without an object.
        """
        if self._made_in_class_body:
            self._function.keyer.method = True

    def _bind_to_class(self) -> None:
        """Turn into a class method: bound to the class, even when accessed through an instance.

        `classmethods` explains why `classmethod` alone is not enough.
        """
        self.of_class = self._function.keyer.method = True

    def __repr__(self) -> str:
        return f"<cached {self.function_id}{_policy_text(self._function)}>"

    def _repr_html_(self) -> str:
        """Name, ttl and counters as HTML; no entry is read."""
        from memo.metrics import formatting

        info = cache_info(self.function_id)
        facts = {
            "signature": inspect.signature(self.__wrapped__),
            "fresh for": _ttl_text(self._function.policy.ttl),
            "addresses": f"{self._function.keyer.prefix}:…",
            "here": f"{formatting.quantity(info.hits, 'hit')}, "
            f"{formatting.quantity(info.misses, 'miss', 'misses')}",
        }
        return formatting.facts_html(f"cached {label(self.function_id)}", facts)

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: Any) -> Self:
        return self

    def __reduce__(self) -> Any:
        """Pickle by reference if it can be imported, else by value with its id and code version.

        So a worker finds the same entries even without file and source.  Settings made with
        `configure` in this process are included (`configuration.settings_for_workers`).
        """
        return pickling.reduce_function(self)

    # --- helpers ---------------------------------------------------------------------------------

    @helper()
    def key(self, /, *args: P.args, **kwargs: P.kwargs) -> str:
        """Return the key of this call: 40 hexadecimal digits, for `memo.invalidate(key=...)`."""
        call = self._function.keyer.call(args, dict(kwargs))
        remember_key(call, self.function_id)
        return call.text

    @helper()
    async def akey(self, /, *args: P.args, **kwargs: P.kwargs) -> str:
        """Like `key`, without blocking the event loop while big arguments are hashed."""
        return await native().offload(functools.partial(self.key, *args, **kwargs))

    @helper()
    def address(self, /, *args: P.args, **kwargs: P.kwargs) -> str:
        """Return the address of this call, `"prefix:arg:arg"`, for `memo.invalidate(key=...)`."""
        return self._function.keyer.call(args, dict(kwargs)).address

    @helper()
    async def aaddress(self, /, *args: P.args, **kwargs: P.kwargs) -> str:
        """Like `address`, without blocking the event loop while big arguments are hashed."""
        return await native().offload(functools.partial(self.address, *args, **kwargs))

    @helper(partial=True, reason="")
    def invalidate(
        self, /, *args: Any, reason: str = ITS_OWN, **kwargs: Any
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
        return drive(self._checked_invalidation(NOT_GIVEN, args, kwargs, reason)(BLOCKING))

    @helper(partial=True, reason="")
    async def ainvalidate(
        self, /, *args: Any, reason: str = ITS_OWN, **kwargs: Any
    ) -> engine.Invalidation:
        """Like `invalidate`, without blocking the event loop."""
        return await self._invalidate_on_loop(NOT_GIVEN, args, kwargs, reason)

    @helper(partial=True, reason="")
    def expire(self, /, *args: Any, reason: str = ITS_OWN, **kwargs: Any) -> engine.Invalidation:
        """Let entries expire now; arguments, result and errors are those of `invalidate`.

        Within `stale_while_revalidate` the old value is served while one refresh runs.
        """
        return drive(
            self._checked_invalidation(NOT_GIVEN, args, kwargs, reason, soft=True)(BLOCKING)
        )

    @helper(partial=True, reason="")
    async def aexpire(
        self, /, *args: Any, reason: str = ITS_OWN, **kwargs: Any
    ) -> engine.Invalidation:
        """Like `expire`, without blocking the event loop."""
        return await self._invalidate_on_loop(NOT_GIVEN, args, kwargs, reason, soft=True)

    def _invalidate_on_loop(
        self, own: Any, args: Any, kwargs: dict[str, Any], reason: str, *, soft: bool = False
    ) -> Awaitable[engine.Invalidation]:
        """Check the names of arguments now, and return the invalidation, to be awaited.

        It reads the arguments in a thread, since they may be big.
        """
        names, _ = self._own_option(kwargs, "reason", reason, "")
        self._function.keyer.check_names("expire" if soft else "invalidate", names)

        async def invalidate() -> engine.Invalidation:
            port = native()
            checked = await port.offload(
                lambda: self._checked_invalidation(own, args, kwargs, reason, soft=soft)
            )
            return await checked(port)

        return invalidate()

    def _own_option(
        self, kwargs: dict[str, Any], name: str, given: Any, otherwise: Any
    ) -> tuple[dict[str, Any], Any]:
        """Separate a helper's own option from the call's arguments.

        If the function has an argument of that name, the value belongs to the call.
        """
        if given is ITS_OWN or name not in self._function.keyer.plan.names:
            return kwargs, otherwise if given is ITS_OWN else given
        return {**kwargs, name: given}, otherwise

    def _checked_invalidation(
        self,
        own: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        reason: str,
        *,
        soft: bool = False,
    ) -> Invalidate:
        """Check the arguments of `invalidate` or `expire`, and return the invalidation."""
        kwargs, reason = self._own_option(kwargs, "reason", reason, "")
        _refuse_predicates(args, kwargs)
        return self._invalidation(args, kwargs, reason, own=own, soft=soft)

    def _invalidation(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        reason: str,
        *,
        own: Any = NOT_GIVEN,
        soft: bool = False,
        count: bool = True,
    ) -> Invalidate:
        """Return the invalidation of entries whose arguments include the given ones.

        Args:
            own: the object whose entries they are; `NOT_GIVEN`: all objects.
        """
        from memo.engine import invalidating

        keyer = self._function.keyer
        given = f"({keyer.arguments_text(args, kwargs)})" if args or kwargs else ""
        return functools.partial(
            invalidating.invalidate,
            chains=[self._function.chain()],
            turns=self._turns(args, kwargs, own, "expire" if soft else "invalidate"),
            target=f"{self.function_id}{given}",
            reason=reason,
            soft=soft,
            count=count,
            hint=lambda _: keyer.type_mismatches(args, kwargs),
        )

    def _turns(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], own: Any, helper: str
    ) -> list[Turn]:
        """Return the turns that invalidate the entries whose arguments include the given ones."""
        state = self._function.keyer.state(own)
        pairs, whole = self._function.keyer.argument_digests(args, kwargs, own, state, helper)
        return [Turn(f"f:{self.function_id}", pairs, whole)]

    async def _refresh(self, port: Port, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute a call now; return the value or `Raised`."""
        result = await engine.answering.refresh(port, self._function, args, kwargs)
        return replay.unwrap(result)

    @helper()
    def refresh(self, /, *args: P.args, **kwargs: P.kwargs) -> Any:
        """Compute now, store and return the value; an async function gets its own event loop."""
        __tracebackhide__ = True
        if not assembly.enabled():
            return _call_uncached(self.__wrapped__, args, kwargs)
        if self.is_async:
            return value_or_raise(run_elsewhere(lambda port: self._refresh(port, args, kwargs)))
        return value_or_raise(drive(self._refresh(BLOCKING, args, kwargs)))

    @helper()
    async def arefresh(self, /, *args: P.args, **kwargs: P.kwargs) -> Any:
        """Like `refresh`, without blocking the event loop."""
        __tracebackhide__ = True
        if not self.is_async:
            compute = functools.partial(self.refresh, *args, **kwargs)
            return await native().offload(compute, own_thread=True)
        if not assembly.enabled():
            result = self.__wrapped__(*args, **kwargs)
            return await result if inspect.isawaitable(result) else result
        return value_or_raise(await self._refresh(native(), args, kwargs))

    async def _put(
        self, port: Port, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if assembly.enabled():
            await engine.answering.put(port, self._function, args, kwargs, value)

    @helper(value=inspect.Parameter.empty)
    def put(self, value: Any, /, *args: P.args, **kwargs: P.kwargs) -> None:
        """Store a value as the result of a call, without computing it."""
        drive(self._put(BLOCKING, value, args, kwargs))

    @helper(value=inspect.Parameter.empty)
    async def aput(self, value: Any, /, *args: P.args, **kwargs: P.kwargs) -> None:
        """Like `put`, without blocking the event loop."""
        await self._put(native(), value, args, kwargs)

    async def _peek(
        self, port: Port, args: tuple[Any, ...], kwargs: dict[str, Any], default: Any
    ) -> Any:
        if not assembly.enabled():
            return default
        found = await engine.answering.peek(port, self._function_in_mode(), args, kwargs, default)
        return replay.unwrap(found)

    @helper(default=None)
    def peek(self, /, *args: Any, default: Any = ITS_OWN, **kwargs: Any) -> Any:
        """Return the stored value if a call would use it, else `default` (None); never compute.

        If the function has an argument called `default`, it is that argument, and the default is
        None.
        """
        kwargs, default = self._own_option(kwargs, "default", default, None)
        return drive(self._peek(BLOCKING, args, kwargs, default))

    @helper(default=None)
    async def apeek(self, /, *args: Any, default: Any = ITS_OWN, **kwargs: Any) -> Any:
        """Like `peek`, without blocking the event loop."""
        kwargs, default = self._own_option(kwargs, "default", default, None)
        return await self._peek(native(), args, kwargs, default)

    async def _is_cached(self, port: Port, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        return await engine.answering.is_cached(port, self._function_in_mode(), args, kwargs)

    @helper()
    def is_cached(self, /, *args: P.args, **kwargs: P.kwargs) -> bool:
        """True if this call would be answered from the cache; the value is not loaded."""
        return assembly.enabled() and drive(self._is_cached(BLOCKING, args, kwargs))

    @helper()
    async def ais_cached(self, /, *args: P.args, **kwargs: P.kwargs) -> bool:
        """Like `is_cached`, without blocking the event loop."""
        return assembly.enabled() and await self._is_cached(native(), args, kwargs)

    async def _explain(
        self, port: Port, args: tuple[Any, ...], kwargs: dict[str, Any], plan: bool
    ) -> engine.Explanation:
        function = self._function_in_mode()
        found = self._with_mode(await self._explain_call(port, function, args, kwargs))
        return await self._with_plan(port, function, found, args, kwargs) if plan else found

    @helper()
    def explain(self, /, *args: Any, plan: bool = ITS_OWN, **kwargs: Any) -> engine.Explanation:
        """Explain whether this call would hit, and if not, why; nothing is computed or loaded.

        With `each`, the first element that misses is explained.

        Args:
            plan: also list which cached calls beneath it would be computed, revalidated or hit, and
                how long they took last time.  If the function has an argument of this name, it is
                that argument instead.
        """
        kwargs, plan = self._own_option(kwargs, "plan", plan, False)
        return drive(self._explain(BLOCKING, args, kwargs, plan))

    @helper()
    async def aexplain(
        self, /, *args: Any, plan: bool = ITS_OWN, **kwargs: Any
    ) -> engine.Explanation:
        """Like `explain`, without blocking the event loop."""
        kwargs, plan = self._own_option(kwargs, "plan", plan, False)
        return await self._explain(native(), args, kwargs, plan)

    def _with_mode(self, found: engine.Explanation) -> engine.Explanation:
        """Return the explanation; if the mode or a setting prevents hits, the reason for that."""
        kind = self._mode().kind
        if not assembly.enabled():
            source = configuration.current().sources["enabled"]
            reason, fact = DISABLED, f"the setting enabled is false ({source}): every call computes"
        elif kind == modes.OFF:
            reason, fact = f'mode "{kind}"', "calls neither read nor store"
        elif kind == modes.REFRESH:
            reason, fact = f'mode "{kind}"', "calls compute and store"
        else:
            return found
        import dataclasses

        return dataclasses.replace(found, hit=False, reason=reason, facts=(fact,), diff=())

    async def _with_plan(
        self,
        port: Port,
        function: Function,
        found: engine.Explanation,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> engine.Explanation:
        from memo.engine.explaining import Planner

        known = {one.function_id: one._function_in_mode() for one in functions()}
        planner = Planner(port, function.chain(), {**known, self.function_id: function})
        call = await make_call(port, function, args, kwargs)
        await planner.add_root(self.function_id, call.text, call.shown, call.summary)
        import dataclasses

        return dataclasses.replace(found, steps=tuple(planner.steps))

    async def _explain_call(
        self, port: Port, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> engine.Explanation:
        from memo.engine import explaining

        return await explaining.explain(port, function, assembly.manifests(), args, kwargs)

    def cache_info(self) -> metrics.CacheInfo:
        """Hits, misses, maxsize (None) and currsize, as for `functools.lru_cache`.

        Hits and misses are those of this process, currsize is the number of entries on this host.
        """
        return drive(self._cache_info(BLOCKING))

    async def acache_info(self) -> metrics.CacheInfo:
        """Like `cache_info`, without blocking the event loop."""
        return await self._cache_info(native())

    async def _cache_info(self, port: Port) -> metrics.CacheInfo:
        from memo.engine import invalidating

        if not assembly.enabled():
            return cache_info(self.function_id)
        keyer, chain = self._function.keyer, self._function.chain()
        code = None if keyer.method else keyer.identity.digest()
        count = await invalidating.count_on_host(port, chain, self.function_id, code)
        return cache_info(self.function_id, count)

    def cache_clear(self) -> None:
        """Drop every entry of this function, and reset its counters."""
        drive(self._clear(BLOCKING))

    async def acache_clear(self) -> None:
        """Like `cache_clear`, without blocking the event loop."""
        await self._clear(native())

    async def _clear(self, port: Port) -> None:
        chain = self._function.chain()
        done = await self._invalidation((), {}, "cache_clear")(port)
        await chain.clear(port, chain.prefix(self.function_id))
        COUNTERS.reset(self.function_id)
        if done.missed:  # last, since a warning may be an error
            await self._warn_nothing_cleared(port)

    async def _warn_nothing_cleared(self, port: Port) -> None:
        """Warn once, and name the functions whose entries were probably intended."""
        from memo.decorators import names

        known = await names.known_functions(port, [])
        bare = self.function_id.rpartition(":")[2]
        others = [one for one in known if one.rpartition(":")[2] == bare]
        others = [label(one) for one in others if one != self.function_id]
        if others and not self.__dict__.get("_said_nothing_cleared"):
            self._said_nothing_cleared = True
            warnings.warn(
                f"{label(self.function_id)}.cache_clear() cleared nothing: this host has no entry "
                f"of it. Functions of the same name: {', '.join(sorted(others))}.",
                stacklevel=2,
            )


class CachedCoroutine(CachedFunction[P, R]):
    """A cached `async def`: calling it returns a coroutine."""

    _is_coroutine = property(lambda self: _asyncio_marker())
    _code_was_read = False

    @takes_any_arguments
    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> Any:
        if kwargs or len(args) != self._function.keyer.usual_count:
            try:
                self._function.keyer.check_call(args, kwargs)
            except TypeError as error:
                at_the_call(error)
                raise
        return self._call(args, kwargs)

    async def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        function = self._function
        if (
            modes.CURRENT_MODE.get() is not None
            or self._own_mode is not None
            or assembly.default_mode_revision != configuration.revision
        ):
            __tracebackhide__ = True
            mode = self._mode()
            if mode.kind is not None:
                with ending_at_the_call():
                    return value_or_raise(await self._answer_in_mode(native(), mode, args, kwargs))
            function = with_max_age(function, mode)
        begun = time.perf_counter()
        try:
            try:
                call = function.keyer.call(args, kwargs, True) if self._code_was_read else None
            except HeavyError:  # hashing the arguments here would block the event loop
                call = None  # made below, so that its errors have no context
            if call is None:
                call = await self._make_key(function, args, kwargs)
            result = engine.answering.answer_from_first_tier(native, function, call, begun)
        except Exception as error:
            if report_if_resource_failure(error):
                __tracebackhide__ = True
                return await cast("Awaitable[Any]", self.__wrapped__(*args, **kwargs))
            at_the_call(error)
            raise
        pending = result if type(result) is PendingLookup else None
        if pending is not None:
            pending.lookup.answer = await pending.lookup.answer
            result = engine.answering.answer_after_lookup(function, call, pending, begun)
        if result is NOTHING:
            result = await engine.answering.answer(native(), function, call, args, kwargs, pending)
            if type(result) is Raised:
                __tracebackhide__ = True
                raise result.again()
        return result

    async def _make_key(
        self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Call:
        """Make a key that would block the event loop if it were made there."""
        if not self._code_was_read:  # that takes milliseconds, so other tasks get a turn before
            await native().turn()
            self._code_was_read = True
            with suppress(HeavyError):
                return function.keyer.call(args, kwargs, True)
        return await make_call(native(), function, args, kwargs)


class ReplayingFunction(CachedFunction[P, R]):
    """A cached function that replays what the computation printed and displayed (`replay`)."""

    @takes_any_arguments
    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return cast("R", replay.unwrap_and_replay(super().__call__(*args, **kwargs)))
        except Exception as error:
            cut_to_user_frames(error)
            raise


class ReplayingCoroutine(CachedCoroutine[P, R]):
    """Like `ReplayingFunction`, for an `async def`."""

    async def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            return replay.unwrap_and_replay(await super()._call(args, kwargs))
        except Exception as error:
            cut_to_user_frames(error)
            raise


def _asyncio_marker() -> object:
    coroutines = sys.modules.get("asyncio.coroutines")
    return getattr(coroutines, "_is_coroutine", None)


_MAX_RETURNED_KEYS = 4096
"""Maximum number of keys that this process remembers after it has returned them to the user."""
_turns_by_key: dict[str, Turn] = {}


def remember_key(call: Call, function_id: str) -> None:
    """Remember the call of a key that the user gets, so that the key can be invalidated."""
    turn = Turn(f"f:{function_id}", call.arguments, whole=True)
    remember(_turns_by_key, call.text, turn, _MAX_RETURNED_KEYS)


def turn_of_key(key: str) -> Turn | None:
    """Return the turn that invalidates the call of a key, if this process has returned the key."""
    return _turns_by_key.get(key)


_FUNCTION_TYPES = (functools.partial, CachedFunction, BoundFunction)
"""Types of functions besides those that `inspect.isroutine` knows."""


def _refuse_predicates(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse functions as arguments of an invalidation, since they would select nothing.

    Raises:
        OptionError: an argument is a function.
    """
    for name, value in (*enumerate(args, 1), *kwargs.items()):
        if inspect.isroutine(value) or isinstance(value, _FUNCTION_TYPES):
            which = name if isinstance(name, str) else f"argument {name}"
            fix = (
                "is a function, and predicates are not supported: give the values one by one or, "
                "for a call that takes a function, write memo.invalidate(key=f.key(...))."
            )
            raise OptionError(which, value, fix)


def with_max_age(function: Function, mode: Mode) -> Function:
    """Return a function with the limit that a mode sets for the age of its entries."""
    if mode.max_age is None:
        return function
    return function.with_policy(function.policy._replace(max_age=mode.max_age))


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
        OptionError: no function of this process has the name, several have it, or it is not cached.
    """
    if isinstance(function, str):
        from memo.decorators import names

        here = {one.function_id: one for one in functions()}
        function = here[names.only_fit("function", function, list(here))]
    if not hasattr(function, "explain"):
        fix = "is not cached; give a function that @cache decorates, or its name."
        raise OptionError("function", function, fix)
    found: engine.Explanation = function.explain(*args, **kwargs)
    return found


if not TYPE_CHECKING:  # its types are those of the overloads
    explain = public(explain)


def value_or_raise(result: Any) -> Any:
    """Return a result, or raise it if it is the exception of the function."""
    __tracebackhide__ = True
    if type(result) is Raised:
        raise result.again()
    return result


def _call_uncached(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Call a function, `async def` or `def`, from sync code, without the cache."""
    __tracebackhide__ = True
    result = function(*args, **kwargs)
    if not inspect.iscoroutine(result):
        return result

    async def settled(port: Port) -> Any:
        return await port.settle(result)

    return run_elsewhere(settled)


def _policy_text(function: Function) -> str:
    ttl = function.policy.ttl
    return " ttl=f(result)" if callable(ttl) else f" ttl={ttl}"


def _ttl_text(ttl: Any) -> str:
    """Describe a ttl in words."""
    from memo.metrics import formatting

    if callable(ttl):
        return "as its result says"
    if ttl == options.INHERIT:
        return "as long as the results it was built on"
    return "ever" if ttl is None else formatting.duration(ttl)


def _blocking_port() -> Blocking:
    return BLOCKING
