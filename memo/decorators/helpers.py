"""Helpers: methods of a cached function, such as `f.peek`, with the function's own signature.

With it, completion and tooltips show the function's arguments, and a wrong argument raises at the
line that calls the helper.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from inspect import Parameter, Signature
from types import MethodType
from typing import Any, TypeVar, cast

from memo.errors import ending_at_the_call

F = TypeVar("F", bound=Callable[..., Any])


class NotGiven:
    """The default of an optional argument; signatures show it as the given text."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text


ANY = NotGiven("<any>")
ITS_OWN: Any = NotGiven("<its own>")


class _Helper:
    """A method whose signature depends on the function that its object caches.

    Args:
        method: the method.
        partial: each argument of the function may be left out.
        options: the method's own options, as parameters of its signature.
    """

    def __init__(
        self, method: Callable[..., Any], partial: bool, options: tuple[Parameter, ...]
    ) -> None:
        self._method = method
        self._name = method.__name__
        self._partial = partial
        self._options = options
        self.__doc__ = method.__doc__

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            return self._method
        made = instance._helpers.get(self._name)
        if made is None:
            made = instance._helpers[self._name] = self._method_for(instance.__wrapped__)
        return MethodType(made, instance)

    def _method_for(self, function: Callable[..., Any]) -> Any:
        """Make the method for one function, with its signature."""
        method = self._method
        made: Any = (_awaiting if inspect.iscoroutinefunction(method) else _calling)(self._name)
        made.__name__, made.__qualname__ = self._name, method.__qualname__
        made.__module__, made.__doc__ = method.__module__, method.__doc__
        try:
            signature = inspect.signature(function)
        except (TypeError, ValueError):  # it may be written in C
            return made
        made.__signature__ = Signature(
            list(self._parameters(signature)),
            return_annotation=inspect.signature(method).return_annotation,
        )
        return made

    def _parameters(self, signature: Signature) -> Iterator[Parameter]:
        given = [
            one.replace(default=ANY) if self._partial and one.kind not in _VARIADIC else one
            for one in signature.parameters.values()
        ]
        own = [one for one in self._options if one.name not in signature.parameters]
        yield Parameter("__function", Parameter.POSITIONAL_ONLY)
        if own and own[0].kind is Parameter.POSITIONAL_ONLY:
            given = [own.pop(0), *given]
        extra = [one for one in given if one.kind is Parameter.VAR_KEYWORD]
        yield from given[: len(given) - len(extra)]
        yield from own
        yield from extra


def is_helper(kind: type, name: str) -> bool:
    """True if a class declares a method with `helper`."""
    return isinstance(inspect.getattr_static(kind, name, None), _Helper)


def _calling(name: str) -> Any:
    """Make a method that calls the method of its class by name."""

    def called(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        with ending_at_the_call():
            return getattr(type(self), name)(self, *args, **kwargs)

    return called


def _awaiting(name: str) -> Any:
    """Make a coroutine method that calls the method of its class by name."""

    async def awaited(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        with ending_at_the_call():
            return await getattr(type(self), name)(self, *args, **kwargs)

    return awaited


_VARIADIC = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)


def helper(*, partial: bool = False, **options: Any) -> Callable[[F], F]:
    """Declare a method of a cached function that takes the function's own arguments.

    Args:
        partial: each of them may be left out.
        options: the method's own options with their defaults; an option whose default is
            `Parameter.empty` is the first one, given by position.
    """
    shown = tuple(
        Parameter(name, Parameter.POSITIONAL_ONLY)
        if default is Parameter.empty
        else Parameter(name, Parameter.KEYWORD_ONLY, default=default)
        for name, default in options.items()
    )

    def made(method: F) -> F:
        return cast("F", _Helper(method, partial, shown))

    return made


_ANY_ARGUMENTS = Signature(
    [
        Parameter("self", Parameter.POSITIONAL_ONLY),
        Parameter("args", Parameter.VAR_POSITIONAL),
        Parameter("kwargs", Parameter.VAR_KEYWORD),
    ]
)


def takes_any_arguments(method: F) -> F:
    """Let `__call__` have the signature `(*args, **kwargs)`, without annotations.

    `load?` shows it in IPython, beside the signature of the cached function.
    """
    cast("Any", method).__signature__ = _ANY_ARGUMENTS
    return method


class OwnDoc:
    """A docstring that belongs to the class on the class, and to the function on an instance.

    Args:
        text: the docstring of the class.
    """

    def __init__(self, text: str | None) -> None:
        self._text = text

    def __get__(self, instance: Any, owner: type | None = None) -> str | None:
        return self._text if instance is None else instance.__func__.__doc__


class OwnAnnotations(dict[str, Any]):
    """Annotations that are empty on the class, and the function's on an instance.

    When the annotations of a class without any are read, Python gives it an empty dict, which then
    hides those of its instances.
    """

    def __get__(self, instance: Any, owner: type | None = None) -> dict[str, Any]:
        found: dict[str, Any] = self if instance is None else instance.__func__.__annotations__
        return found


def without_parameter(signature: Signature, at: int) -> Signature:
    """Return a method's signature without the parameter of its object, which is at a position."""
    parameters = list(signature.parameters.values())
    if at < len(parameters) and parameters[at].kind is not Parameter.VAR_POSITIONAL:
        del parameters[at]
    return signature.replace(parameters=parameters)
