"""Cached functions over collections, cached element by element (`each`)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

from memo.decorators import assembly
from memo.decorators.cached_function import (
    MISSING,
    CachedCoroutine,
    CachedFunction,
    aged,
    give,
)
from memo.decorators.helpers import helper, passes_on
from memo.engine import answering
from memo.engine.call import Function, Raised, hindered
from memo.engine.sequences import elements
from memo.engine.sequences.elements import Batch, Each, Place
from memo.errors import NotCachedError, OptionError, at_the_call
from memo.keys.bindings import ABSENT
from memo.keys.call_keys import Call
from memo.runtime.blocking import BLOCKING, drive
from memo.runtime.native import native, run_elsewhere
from memo.settings import modes, options
from memo.validity.stamps import Turn

if TYPE_CHECKING:
    from memo.engine.explaining import Explanation

P = ParamSpec("P")
R = TypeVar("R")


def kind(function: Any, given: Mapping[str, Any]) -> type[CachedFunction[Any, Any]]:
    """Return the class of the cached function to create with `each`.

    Raises:
        OptionError: another option cannot be combined with it.
    """
    for name, why in _ALONE.items():
        if given[name]:
            raise OptionError(name, given[name], f"does not go with each=: {why}.")
    return ElementwiseCoroutine if options.is_async(function) else ElementwiseFunction


_ALONE = {
    "replay": "what a run shows belongs to no single element",
    "cache_errors": "a run that raises says nothing about a single element",
    "soft_timeout": "an answer is made of many entries, old and new",
}
"""Options that cannot be combined with `each`, and why."""


class _Elementwise(CachedFunction[P, R]):
    """The common part of both kinds."""

    def __init__(self, function: Callable[P, R], given: Mapping[str, Any]) -> None:
        super().__init__(function, given)
        each = self._each = Each(given["each"], self._function.keyer)

        def ask(port: Any, function: Function, _: Call, args: tuple[Any, ...], kwargs: Any) -> Any:
            """Answer a call for one element, given in place of the collection."""
            args, kwargs = each.put(args, kwargs, [each.taken(args, kwargs)])
            return elements.answer(port, function, each, args, kwargs)

        self._function.ask = ask

    def _made(
        self, port: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Coroutine[Any, Any, Batch]:
        return elements.batch(port, self._function, self._each, args, kwargs)

    async def _answered(self, port: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the answer of a call in the mode in force, or `Raised`."""
        mode = self._mode()
        function = aged(self._function, mode)
        if mode.kind == modes.OFF and not (assembly.enabled() and answering.is_inside()):
            return await self._plainly(args, kwargs)
        try:
            made = await elements.batch(port, function, self._each, args, kwargs)
        except Exception as error:
            if not hindered(error):
                raise
            return await self._plainly(args, kwargs)
        if mode.kind is None:
            return await elements.answer_batch(port, made)
        if mode.kind == modes.ONLY and made.items:
            result = await elements.only(port, made)
            if type(result) is Place:
                raise NotCachedError(await self._told(port, function, result))
            return result
        return await elements.refresh(port, made, keep=mode.kind == modes.REFRESH)

    async def _plainly(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the result of the function itself."""
        result: Any = self.__wrapped__(*args, **kwargs)
        return await result if self.is_async else result

    async def _told(self, port: Any, function: Function, place: Place) -> Explanation:
        from memo.engine import explaining

        job = place.job
        return await explaining.explain(port, function, assembly.manifests(), job.args, job.kwargs)

    # --- helpers ---------------------------------------------------------------------------------

    def _one(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        """Return the call for one element, given by itself or in a collection of one.

        Raises:
            OptionError: there are several.
        """
        value = self._each.taken(args, kwargs)
        if self._each.is_collection(value):
            items = self._each.opened(value).items
            if len(items) != 1:
                fix = "must be a single element: each has a key and an address of its own."
                raise OptionError(self._each.name, value, fix)
            args, kwargs = self._each.put(args, kwargs, items[0])
        return self._function.call(args, kwargs)

    @helper()
    def key(self, /, *args: Any, **kwargs: Any) -> str:
        """Return the key of one element's entry, for `memo.invalidate(key=...)`."""
        call = self._one(args, kwargs)
        give(call, self.function_id)
        return call.text

    @helper()
    def address(self, /, *args: Any, **kwargs: Any) -> str:
        """Return the address of one element's entry, for `memo.invalidate(key=...)`."""
        return self._one(args, kwargs).address

    def _turns(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], own: Any) -> list[Turn]:
        """Return the turns that invalidate the entries of one element, or of a collection's."""
        before = int(self._function.keyer.method)  # `self` is not part of the arguments here
        value = self._each.found(args, kwargs, before)
        if value is ABSENT or not self._each.is_collection(value):
            return super()._turns(args, kwargs, own)
        turns: list[Turn] = []
        for item in self._each.opened(value).items:
            turns += super()._turns(*self._each.put(args, kwargs, item, before), own)
        return turns

    async def _refreshed(self, port: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return await elements.refresh(port, await self._made(port, args, kwargs))

    @helper()
    def refresh(self, /, *args: Any, **kwargs: Any) -> Any:
        """Compute every element now, in one run, store them, and return the answer."""
        __tracebackhide__ = True
        if not assembly.enabled():
            return CachedFunction.refresh(self, *args, **kwargs)
        if self.is_async:
            return _given(run_elsewhere(lambda port: self._refreshed(port, args, kwargs)))
        return _given(drive(self._refreshed(BLOCKING, args, kwargs)))

    @helper()
    async def arefresh(self, /, *args: Any, **kwargs: Any) -> Any:
        """As `refresh`, without blocking the event loop."""
        __tracebackhide__ = True
        if self.is_async and assembly.enabled():
            return _given(await self._refreshed(native(), args, kwargs))
        return await CachedFunction.arefresh(self, *args, **kwargs)

    async def _put(self, port: Any, value: Any, args: Any, kwargs: Any) -> None:
        if assembly.enabled():
            await elements.put(port, await self._made(port, args, kwargs), value)

    @helper(value=inspect.Parameter.empty)
    def put(self, value: Any, /, *args: Any, **kwargs: Any) -> None:
        """Store the answer of a call element by element, without computing it."""
        drive(self._put(BLOCKING, value, args, kwargs))

    @helper(value=inspect.Parameter.empty)
    async def aput(self, value: Any, /, *args: Any, **kwargs: Any) -> None:
        """As `put`, without blocking the event loop."""
        await self._put(native(), value, args, kwargs)

    async def _peeked(self, port: Any, args: Any, kwargs: dict[str, Any], given: Any) -> Any:
        kwargs, default = self._apart(kwargs, "default", given, None)
        if not assembly.enabled():
            return default
        made = await elements.batch(port, self._aged(), self._each, args, kwargs)
        return await elements.peek(port, made, default)

    @helper(default=None)
    def peek(self, /, *args: Any, default: Any = MISSING, **kwargs: Any) -> Any:
        """Return the answer if a call would find every element, else `default` (None).

        Never computes.
        """
        return drive(self._peeked(BLOCKING, args, kwargs, default))

    @helper(default=None)
    async def apeek(self, /, *args: Any, default: Any = MISSING, **kwargs: Any) -> Any:
        """As `peek`, without blocking the event loop."""
        return await self._peeked(native(), args, kwargs, default)

    async def _is_cached(self, port: Any, args: Any, kwargs: dict[str, Any]) -> bool:
        if not assembly.enabled():
            return False
        made = await elements.batch(port, self._aged(), self._each, args, kwargs)
        return await elements.is_cached(port, made)

    @helper()
    def is_cached(self, /, *args: Any, **kwargs: Any) -> bool:
        """True if every element would be answered from the cache; does not load any value."""
        return drive(self._is_cached(BLOCKING, args, kwargs))

    @helper()
    async def ais_cached(self, /, *args: Any, **kwargs: Any) -> bool:
        """As `is_cached`, without blocking the event loop."""
        return await self._is_cached(native(), args, kwargs)

    async def _explain(
        self, port: Any, args: Any, kwargs: dict[str, Any], plan: bool
    ) -> Explanation:
        kwargs, wanted = self._apart(kwargs, "plan", plan, False)
        function = self._aged()
        made = await elements.batch(port, function, self._each, args, kwargs)
        if not made.places:
            fix = "has no elements, so nothing is looked up: the function itself answers."
            raise OptionError(self._each.name, self._each.taken(args, kwargs), fix)
        first, *others = made.places.values()
        found, asked = await self._told(port, function, first), first.job
        for place in others:
            if not found.hit:
                break
            explanation = await self._told(port, function, place)
            if not explanation.hit:
                found, asked = explanation, place.job
        found = self._as_things_are(found)
        if not wanted:
            return found
        return await self._planned(port, function, found, asked.args, asked.kwargs)

    @helper()
    def explain(self, /, *args: Any, plan: bool = MISSING, **kwargs: Any) -> Explanation:
        """Explain whether every element would hit, and if not, why the first missing one misses.

        Args:
            plan: also list the cached calls beneath that element.
        """
        return drive(self._explain(BLOCKING, args, kwargs, plan))

    @helper()
    async def aexplain(self, /, *args: Any, plan: bool = MISSING, **kwargs: Any) -> Explanation:
        """As `explain`, without blocking the event loop."""
        return await self._explain(native(), args, kwargs, plan)


class ElementwiseFunction(_Elementwise[P, R]):
    """A cached `def` over a collection."""

    @passes_on
    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        __tracebackhide__ = True
        try:
            result = drive(self._answered(BLOCKING, args, kwargs))
        except Exception as error:
            at_the_call(error)
            raise
        return cast("R", _given(result))


class ElementwiseCoroutine(_Elementwise[P, R], CachedCoroutine[P, R]):
    """A cached `async def` over a collection."""

    async def _called(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        __tracebackhide__ = True
        try:
            result = await self._answered(native(), args, kwargs)
        except Exception as error:
            at_the_call(error)
            raise
        return _given(result)


def _given(result: Any) -> Any:
    """Return a result, or raise what the function raised."""
    __tracebackhide__ = True
    if type(result) is Raised:
        raise result.again()
    return result
