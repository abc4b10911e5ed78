"""Cached functions bound to an object: methods."""

from __future__ import annotations

import copy
import functools
import inspect
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, Self, TypeVar

from memo.decorators import cached_function
from memo.decorators.helpers import (
    ITS_OWN,
    OwnAnnotations,
    OwnDoc,
    is_helper,
    takes_any_arguments,
    without_parameter,
)
from memo.errors import at_the_call, public
from memo.runtime.blocking import BLOCKING, drive

P = ParamSpec("P")
R = TypeVar("R")

if TYPE_CHECKING:

    class _Helpers(cached_function.CachedFunction[P, R]):
        """The helpers of a bound function, for type checkers: `__getattr__` provides them."""

        def __get__(  # type: ignore[override]  # it is bound already
            self, instance: object, owner: type | None = None
        ) -> Self: ...

else:
    _Helpers = Generic


class BoundFunction(_Helpers[P, R]):
    """A cached function bound to an object, whose state is part of its keys."""

    __slots__ = ("__func__", "__self__", "__weakref__")
    __doc__ = OwnDoc(__doc__)  # pyright: ignore[reportAssignmentType]
    __annotations__ = OwnAnnotations()
    _INVALIDATIONS = {  # noqa: RUF012 - unannotated: `__annotations__` is the function's
        "invalidate": (False, False),
        "ainvalidate": (True, False),
        "expire": (False, True),
        "aexpire": (True, True),
    }
    """Helper -> (it is a coroutine function, it expires entries rather than invalidating them)."""

    def __init__(self, function: cached_function.CachedFunction[Any, R], instance: Any) -> None:
        self.__func__ = function
        self.__self__ = instance

    @takes_any_arguments
    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return self.__func__(self.__self__, *args, **kwargs)
        except Exception as error:
            at_the_call(error)
            raise

    def _attribute(self, name: str) -> Any:
        """Return an attribute of the cached function; bind it to the object if it is a helper."""
        if name == "__signature__":
            return without_parameter(inspect.signature(self.__func__.__wrapped__), 0)
        if name == "__dict__":  # the state of the cached function is not that of its methods
            raise AttributeError(name)
        found = getattr(self.__func__, name)
        if name == "using":
            return functools.update_wrapper(functools.partial(_bound_using, self), found)
        if name in {"put", "aput"}:
            return self._with_signature_of(functools.partial(self._put_own, found), found, 1)
        if name in self._INVALIDATIONS:
            own = functools.partial(self._invalidate_own, *self._INVALIDATIONS[name])
            of_class = isinstance(self.__self__, type)
            return self._with_signature_of(functools.partial(found) if of_class else own, found)
        if is_helper(type(self.__func__), name):
            made = functools.partial(found, self.__self__)
            made.__doc__, made.__annotations__ = found.__doc__, {}
            return made
        return found

    if not TYPE_CHECKING:  # a misspelled attribute is an error for type checkers
        __getattr__ = _attribute

    def _with_signature_of(self, made: Any, found: Any, at: int = 0) -> Any:
        """Give a bound helper the name, docstring and signature of the original, without `self`."""
        functools.update_wrapper(made, found)
        made.__signature__ = without_parameter(inspect.signature(found), at)
        return made

    def _put_own(self, put: Any, value: Any, /, *args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        return put(value, self.__self__, *args, **kwargs)

    @public
    def _invalidate_own(
        self, awaited: bool, soft: bool, /, *args: Any, reason: str = ITS_OWN, **kwargs: Any
    ) -> Any:
        """Invalidate the entries of an object in its current state."""
        function, own = self.__func__, self.__self__
        if awaited:
            return function._invalidate_on_loop(own, args, kwargs, reason, soft=soft)
        return drive(function._checked_invalidation(own, args, kwargs, reason, soft=soft)(BLOCKING))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, BoundFunction)
            and self.__func__ is other.__func__
            and self.__self__ is other.__self__
        )

    def __hash__(self) -> int:
        return hash((id(self.__func__), id(self.__self__)))

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: Any) -> Self:
        return type(self)(self.__func__, copy.deepcopy(self.__self__, memo))

    def __reduce__(self) -> Any:
        return BoundFunction, (self.__func__, self.__self__)

    def __repr__(self) -> str:
        own = self.__self__
        return f"<bound {self.__func__!r} of {getattr(own, '__name__', type(own).__name__)}>"


def _bound_using(method: BoundFunction[Any, Any], **given: Any) -> BoundFunction[Any, Any]:
    return BoundFunction(method.__func__.using(**given), method.__self__)
