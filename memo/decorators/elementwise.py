"""Cached functions over collections, cached element by element (`each`)."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from typing import Any, ParamSpec, TypeVar, cast

from memo import engine
from memo.decorators import assembly
from memo.decorators.cached_function import (
    CachedCoroutine,
    CachedFunction,
    remember_key,
    value_or_raise,
    with_max_age,
)
from memo.decorators.helpers import helper, takes_any_arguments
from memo.engine.call import Function, Raised, report_if_resource_failure
from memo.engine.sequences import elements
from memo.engine.sequences.elements import Batch, Each, ElementCall, UnsplittableError
from memo.errors import NotCachedError, OptionError, at_the_call, cut_to_user_frames
from memo.keys.bindings import NOT_GIVEN
from memo.keys.call_keys import Call
from memo.runtime.blocking import BLOCKING, drive
from memo.runtime.native import native
from memo.runtime.port import Steps
from memo.settings import modes, options
from memo.validity.stamps import Turn

P = ParamSpec("P")
R = TypeVar("R")


def class_for(function: Any, given: Mapping[str, Any]) -> type[CachedFunction[Any, Any]]:
    """Return the class of the cached function to create with `each`.

    Raises:
        OptionError: another option cannot be combined with it.
    """
    for name, why in _NOT_WITH_EACH.items():
        if given[name]:
            raise OptionError(name, given[name], f"cannot be combined with each=: {why}.")
    return ElementwiseCoroutine if options.is_async(function) else ElementwiseFunction


_NOT_WITH_EACH = {
    "replay": "the output of a run belongs to no single element",
    "cache_errors": "a run that raises says nothing about a single element",
    "soft_timeout": "an answer is assembled from many entries, old and new",
}
"""Options that cannot be combined with `each`, and why."""


class _Elementwise(CachedFunction[P, R]):
    """The common part of both classes."""

    __slots__ = ("_each",)

    def __init__(self, function: Callable[P, R], given: Mapping[str, Any]) -> None:
        super().__init__(function, given)
        each = self._each = Each(given["each"], self._function.keyer)

        def answer(
            port: Any, function: Function, _: Call, args: tuple[Any, ...], kwargs: Any
        ) -> Any:
            return elements.answer(port, function, each, args, kwargs)

        self._function.answer = answer
        self._function.key_arguments = each.of_one_element

    def _copy_slots(self, made: Any) -> None:
        super()._copy_slots(made)
        made._each = self._each

    def _make_batch(
        self, port: Any, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Coroutine[Any, Any, Batch]:
        return elements.make_batch(port, function, self._each, args, kwargs)

    async def _answer(self, port: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer a call in the current mode; return the value or `Raised`."""
        mode = self._mode()
        function = with_max_age(self._function, mode)
        if self._bypasses_cache(mode):
            return await self._call_uncached(args, kwargs)
        try:
            made = await self._make_batch(port, function, args, kwargs)
        except Exception as error:
            if not report_if_resource_failure(error):
                raise
            return await self._call_uncached(args, kwargs)
        if mode.kind is None:
            return await elements.answer_batch(port, made)
        if mode.kind == modes.ONLY and made.items:
            result = await elements.read_stored(port, made)
            if type(result) is ElementCall:
                job = result.job
                raise NotCachedError(await self._explain_call(port, function, job.args, job.kwargs))
            if isinstance(result, UnsplittableError):
                raise NotCachedError(await self._explain_unjoined(port, function, made, result))
            return result
        return await elements.refresh(port, made, keep=mode.kind == modes.REFRESH)

    async def _explain_unjoined(
        self, port: Any, function: Function, made: Batch, fault: UnsplittableError
    ) -> engine.Explanation:
        """Explain that all elements are stored, and make no answer together."""
        import dataclasses

        job = next(iter(made.calls.values())).job
        found = await self._explain_call(port, function, job.args, job.kwargs)
        facts = (f"each element is stored, and what is stored {fault}",)
        return dataclasses.replace(found, hit=False, reason="other elements", facts=facts)

    async def _call_uncached(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the result of the function itself, or `Raised`."""
        try:
            result: Any = self.__wrapped__(*args, **kwargs)
            return await result if self.is_async else result
        except Exception as error:  # a coroutine must not raise StopIteration
            return Raised(cut_to_user_frames(error))

    # --- helpers ---------------------------------------------------------------------------------

    def _single_call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        """Return the call of one element, given by itself or in a collection of one.

        Raises:
            OptionError: it is a collection of none or several.
            TypeError: the arguments do not fit the function.
        """
        self._function.keyer.check_call(args, kwargs)
        args, kwargs = self._each.of_one_element(args, kwargs)
        return self._function.keyer.call(args, kwargs)

    @helper()
    def key(self, /, *args: Any, **kwargs: Any) -> str:
        """Return the key of one element's entry, for `memo.invalidate(key=...)`."""
        call = self._single_call(args, kwargs)
        remember_key(call, self.function_id)
        return call.text

    @helper()
    def address(self, /, *args: Any, **kwargs: Any) -> str:
        """Return the address of one element's entry, for `memo.invalidate(key=...)`."""
        return self._single_call(args, kwargs).address

    def _turns(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], own: Any, helper: str
    ) -> list[Turn]:
        """Return the turns that invalidate the entries of an element, or of a whole collection."""
        before = int(self._function.keyer.method)  # `self` is not part of the arguments here
        value = self._each.find_value(args, kwargs, before)
        if value is NOT_GIVEN or not self._each.is_collection(value):
            return super()._turns(args, kwargs, own, helper)
        turns: list[Turn] = []
        for item in self._each.split(value).items:
            some = self._each.with_value(args, kwargs, item, before)
            turns += super()._turns(*some, own, helper)
        return turns

    async def _refresh(self, port: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return await elements.refresh(
            port, await self._make_batch(port, self._function, args, kwargs)
        )

    async def _put(self, port: Any, value: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if assembly.enabled():
            await elements.put(
                port, await self._make_batch(port, self._function, args, kwargs), value
            )

    async def _peek(self, port: Any, args: Any, kwargs: dict[str, Any], default: Any) -> Any:
        if not assembly.enabled():
            return default
        made = await self._make_batch(port, self._function_in_mode(), args, kwargs)
        return await elements.peek(port, made, default)

    async def _is_cached(self, port: Any, args: Any, kwargs: dict[str, Any]) -> bool:
        return await elements.is_cached(
            port, await self._make_batch(port, self._function_in_mode(), args, kwargs)
        )

    async def _explain(
        self, port: Any, args: Any, kwargs: dict[str, Any], plan: bool
    ) -> engine.Explanation:
        function = self._function_in_mode()
        made = await self._make_batch(port, function, args, kwargs)
        if not made.calls:
            fix = "has no elements, so nothing is looked up: the function itself is called."
            raise OptionError(self._each.name, self._each.value_in(args, kwargs), fix)
        first, *others = [element.job for element in made.calls.values()]
        found = await self._explain_call(port, function, first.args, first.kwargs)
        explained = first
        steps = Steps(port)
        for job in others if found.hit else ():
            await steps.pause_if_due()
            one = await self._explain_call(port, function, job.args, job.kwargs)
            if not one.hit:
                found, explained = one, job
                break
        found = self._with_mode(found)
        if not plan:
            return found
        return await self._with_plan(port, function, found, explained.args, explained.kwargs)


class ElementwiseFunction(_Elementwise[P, R]):
    """A cached `def` over a collection."""

    @takes_any_arguments
    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        __tracebackhide__ = True
        try:
            result = drive(self._answer(BLOCKING, args, kwargs))
        except Exception as error:
            at_the_call(error)
            raise
        return cast("R", value_or_raise(result))


class ElementwiseCoroutine(_Elementwise[P, R], CachedCoroutine[P, R]):
    """A cached `async def` over a collection."""

    async def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        __tracebackhide__ = True
        try:
            result = await self._answer(native(), args, kwargs)
        except Exception as error:
            at_the_call(error)
            raise
        return value_or_raise(result)
