"""Bindings: a signature prepared at decoration, and the values of a call bound by it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

from memo.runtime.named_tuple import NamedTuple

ARGUMENT: Final = "__memo_argument__"
"""Method of an annotation that returns what represents the argument in the key."""
NOT_GIVEN: Final[Any] = object()
"""Marks an argument that is not given."""


class Plan(NamedTuple):
    """A signature, prepared for binding.

    Attributes:
        own: the name of `self` or `cls`, or `""`; not among the other names.
        positional: parameters that may be given by position, in order.
        only: how many of them are positional-only.
        rest: the name of `*args`, or `""`.
        keyword: keyword-only parameters.
        extra: the name of `**kwargs`, or `""`.
        defaults: default values by name.
        names: every parameter but `**kwargs`, in the order of the values from `bind`.
    """

    own: str
    positional: tuple[str, ...]
    only: int
    rest: str
    keyword: tuple[str, ...]
    extra: str
    defaults: Mapping[str, Any]
    names: tuple[str, ...]


def plan(signature: inspect.Signature, method: bool) -> Plan:
    """Prepare a signature for binding; that of a method without its `self` or `cls`."""
    parameters = list(signature.parameters.values())
    own = ""
    if method and parameters and parameters[0].kind in _BY_POSITION:
        own = parameters.pop(0).name
    by_kind: dict[Any, list[str]] = {kind: [] for kind in inspect._ParameterKind}
    for parameter in parameters:
        by_kind[parameter.kind].append(parameter.name)
    only = by_kind[inspect.Parameter.POSITIONAL_ONLY]
    positional = only + by_kind[inspect.Parameter.POSITIONAL_OR_KEYWORD]
    rest = by_kind[inspect.Parameter.VAR_POSITIONAL]
    keyword = by_kind[inspect.Parameter.KEYWORD_ONLY]
    return Plan(
        own,
        tuple(positional),
        len(only),
        "".join(rest),
        tuple(keyword),
        "".join(by_kind[inspect.Parameter.VAR_KEYWORD]),
        {p.name: p.default for p in parameters if p.default is not p.empty},
        (*positional, *rest, *keyword),
    )


_BY_POSITION: Final = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
)


class BindingError(Exception):
    """The arguments do not fit the function."""


def bind(
    plan: Plan, args: Sequence[Any], kwargs: Mapping[str, Any], missing: Any = None
) -> tuple[list[Any], dict[str, Any]]:
    """Return the values of `plan.names` for a call, and the entries of `**kwargs` in their order.

    Args:
        missing: with `NOT_GIVEN`, mark arguments that are not given with it (and leave out
            defaults) instead of raising.  Positional-only arguments may be named then, if no
            `**kwargs` takes their names.

    Raises:
        BindingError: the arguments do not fit.
    """
    count = len(plan.positional)
    values = list(args[:count])
    if len(args) > count and not plan.rest:
        raise BindingError
    left = dict(kwargs)
    nameable = missing is not None and not plan.extra
    if left and not left.keys().isdisjoint(plan.positional[plan.only : len(values)]):
        raise BindingError
    values += [
        _taken(plan, plan.positional[index], left, index >= plan.only or nameable, missing)
        for index in range(len(values), count)
    ]
    if plan.rest:
        rest = tuple(args[count:])
        values.append(rest if rest or missing is None else missing)
    values += [_taken(plan, name, left, True, missing) for name in plan.keyword]
    if left and not plan.extra:
        raise BindingError
    return values, left


def _taken(plan: Plan, name: str, left: dict[str, Any], by_name: bool, missing: Any) -> Any:
    if by_name and name in left:
        return left.pop(name)
    if missing is not None:
        return missing
    try:
        return plan.defaults[name]
    except KeyError:
        raise BindingError from None


def signature(function: Callable[..., Any]) -> inspect.Signature:
    """Return the signature of a function.

    For a C function without one, a signature of any arguments.
    """
    try:
        return inspect.signature(function)
    except (
        TypeError,
        ValueError,
    ):  # written in C, without a signature: errors show when it is called
        return inspect.signature(lambda *args, **kwargs: None)


def annotated(
    function: Callable[..., Any], signature: inspect.Signature
) -> dict[str, Callable[[Any], Any]]:
    """Return the parameters whose annotation defines what represents them in the key."""
    parts = hints(function, signature)
    found = ((name, getattr(part, ARGUMENT, None)) for name, part in parts)
    return {name: function_of for name, function_of in found if callable(function_of)}


def hints(function: Callable[..., Any], signature: inspect.Signature) -> Iterator[tuple[str, Any]]:
    """Yield each parameter with its annotation, and with each part of an `Annotated`."""
    namespace = getattr(inspect.unwrap(function), "__globals__", {})
    for name, parameter in signature.parameters.items():
        annotation = parameter.annotation
        if isinstance(annotation, str):
            annotation = _evaluated(annotation, namespace)
        for part in (annotation, *getattr(annotation, "__metadata__", ())):
            yield name, part


def _evaluated(annotation: str, namespace: dict[str, Any]) -> Any:
    try:
        return eval(annotation, namespace)  # noqa: S307 - the user's own annotation
    except Exception:  # a name that exists for type checkers only
        return None
