"""Bind the arguments of calls by a plan, which is made from the signature at decoration."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

from memo.runtime.named_tuple import NamedTuple

ARGUMENT: Final = "__memo_argument__"
"""Method of an annotation that converts the argument to the value that counts for the key."""
NOT_GIVEN: Final[Any] = object()
"""Marks an argument that is not given."""


class Plan(NamedTuple):
    """A signature, prepared for binding.

    Attributes:
        self_name: the name of `self` or `cls`, or `""`; the other attributes leave it out.
        positional: the parameters that may be given by position, in order.
        positional_only_count: how many of them are positional-only.
        var_positional: the name of `*args`, or `""`.
        keyword_only: the keyword-only parameters.
        var_keyword: the name of `**kwargs`, or `""`.
        defaults: default values by name.
        names: all parameters but `**kwargs`, in the order of the values that `bind` returns.
    """

    self_name: str
    positional: tuple[str, ...]
    positional_only_count: int
    var_positional: str
    keyword_only: tuple[str, ...]
    var_keyword: str
    defaults: Mapping[str, Any]
    names: tuple[str, ...]


def make_plan(signature: inspect.Signature, method: bool) -> Plan:
    """Prepare a signature for binding; for a method, without its `self` or `cls`."""
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
    plan: Plan, args: Sequence[Any], kwargs: Mapping[str, Any], not_given: Any = None
) -> tuple[list[Any], dict[str, Any]]:
    """Return the values of `plan.names` for a call, and the entries of `**kwargs` in their order.

    Args:
        not_given: value of arguments that are not given; None: take their default, or raise.  With
            it, positional-only arguments may be named, if no `**kwargs` takes their names.

    Raises:
        BindingError: the arguments do not fit.
    """
    count = len(plan.positional)
    values = list(args[:count])
    if len(args) > count and not plan.var_positional:
        raise BindingError
    left = dict(kwargs)
    nameable = not_given is not None and not plan.var_keyword
    positional_only = plan.positional_only_count
    if left and not left.keys().isdisjoint(plan.positional[positional_only : len(values)]):
        raise BindingError
    values += [
        _take(plan, plan.positional[index], left, index >= positional_only or nameable, not_given)
        for index in range(len(values), count)
    ]
    if plan.var_positional:
        rest = tuple(args[count:])
        values.append(rest if rest or not_given is None else not_given)
    values += [_take(plan, name, left, True, not_given) for name in plan.keyword_only]
    if left and not plan.var_keyword:
        raise BindingError
    return values, left


def _take(plan: Plan, name: str, left: dict[str, Any], by_name: bool, not_given: Any) -> Any:
    if by_name and name in left:
        return left.pop(name)
    if not_given is not None:
        return not_given
    try:
        return plan.defaults[name]
    except KeyError:
        raise BindingError from None


def signature_of(function: Callable[..., Any]) -> inspect.Signature:
    """Return the signature of a function; one that takes any arguments if it cannot be read."""
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):  # it is written in C; a wrong call raises there
        return inspect.signature(lambda *args, **kwargs: None)


def empty_function(name: str, signature: inspect.Signature) -> Callable[..., None]:
    """Return a function that does nothing, for the error with which Python refuses a wrong call."""
    bare = [
        parameter.replace(
            annotation=parameter.empty,
            default=parameter.empty if parameter.default is parameter.empty else None,
        )
        for parameter in signature.parameters.values()
    ]
    text = str(inspect.Signature(bare))[1:-1]
    made: Callable[..., None] = eval(f"lambda {text}: None")  # noqa: S307 - names and None only
    made.__qualname__ = name
    return made


def annotated_converters(
    function: Callable[..., Any], signature: inspect.Signature
) -> dict[str, Callable[[Any], Any]]:
    """Return the converters that annotations define, by parameter; see `ARGUMENT`."""
    parts = annotations_of(function, signature)
    found = ((name, getattr(part, ARGUMENT, None)) for name, part in parts)
    return {name: function_of for name, function_of in found if callable(function_of)}


def annotations_of(
    function: Callable[..., Any], signature: inspect.Signature
) -> Iterator[tuple[str, Any]]:
    """Yield each parameter with its annotation and, for an `Annotated`, with each of its parts."""
    namespace = getattr(inspect.unwrap(function), "__globals__", {})
    for name, parameter in signature.parameters.items():
        annotation = parameter.annotation
        if isinstance(annotation, str):
            annotation = _evaluate(annotation, namespace)
        for part in (annotation, *getattr(annotation, "__metadata__", ())):
            yield name, part


def _evaluate(annotation: str, namespace: dict[str, Any]) -> Any:
    try:
        return eval(annotation, namespace)  # noqa: S307 - the user's own annotation
    except Exception:  # it may have names that exist for type checkers only
        return None
