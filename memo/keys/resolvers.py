"""Resolvers: the forms of the option `key_resolver`, checked and parsed at decoration.

For each call a resolver returns an encoding, which goes into the key, and a text, which becomes the
address.  With `"{id}"`, 1 and "1" have one text but different encodings: one address, two keys.
"""

from __future__ import annotations

import enum
import functools
import inspect
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Final, Protocol

from memo.errors import KeyingError, OptionError, label
from memo.keys.encoding import atoms, canonical
from memo.keys.encoding.canonical import Unkeyable
from memo.keys.values import value_encoding
from memo.runtime.named_tuple import NamedTuple
from memo.settings import options

Bound = Mapping[str, Any]


class Resolved(NamedTuple):
    """The encoding and the text that a resolver returns for a call."""

    encoding: bytes
    text: str


class Resolver(Protocol):
    """A checked `key_resolver`.

    Attributes:
        needs: the arguments that it cannot do without; None: all of them.
        names: the arguments that select entries, besides the resolved value; None: all of them.
        plain: only plain values of `names` select entries, since the resolver may exist because
            others have no key.
        head: the prefix with which its texts begin, or `""`.
    """

    @property
    def needs(self) -> tuple[str, ...] | None: ...
    @property
    def names(self) -> tuple[str, ...] | None: ...
    @property
    def plain(self) -> bool: ...
    @property
    def head(self) -> str: ...

    def resolve(self, bound: Bound) -> Resolved:
        """Return the encoding and the text of a call.

        Args:
            bound: the arguments by name, including `self` or `cls`.
        """
        ...


def make_resolver(given: Any, names: Collection[str], var_keyword: str, self_name: str) -> Resolver:
    """Make the resolver for the `key_resolver` of a function.

    Args:
        given: a callable, a template, or a list of argument names.
        names: the names of the function's arguments, without `self` or `cls`.
        var_keyword: the name of its `**kwargs`, or `""`; with it any other name is valid too.
        self_name: the name of its `self` or `cls`, or `""`.

    Raises:
        OptionError: it names something that is not an argument, is empty, or is malformed.
    """
    if isinstance(given, str):
        return Template(given, names, var_keyword, self_name)
    if callable(given):
        return CallableResolver(given, names, var_keyword, self_name)
    if isinstance(given, Sequence) and all(isinstance(name, str) for name in given):
        return NamesResolver(given, names, var_keyword)
    raise _wrong(given, "must be a function, a template or a list of argument names.")


def _wrong(given: Any, fix: str) -> OptionError:
    return OptionError("key_resolver", given, fix)


def _check_argument(given: Any, name: str, names: Collection[str], var_keyword: str) -> None:
    options.refuse_whole_keywords("key_resolver", given, name, var_keyword)
    if name not in names and not var_keyword:
        listed = ", ".join(names) or "none"
        raise _wrong(given, f"{name!r} is not an argument of the function, which has: {listed}.")


def argument_of(bound: Bound, name: str) -> Any:
    """Return an argument by its name.

    Raises:
        KeyingError: it belongs to `**kwargs`, and this call does not have it.
    """
    try:
        return bound[name]
    except KeyError:
        raise KeyingError(f"key_resolver needs {name!r}, which this call does not have.") from None


# --- a list of names -----------------------------------------------------------------------------


class NamesResolver:
    """A list of argument names: their values make the key."""

    plain = False
    head = ""

    def __init__(self, given: Sequence[str], names: Collection[str], var_keyword: str) -> None:
        if not given:
            raise _wrong(given, "is empty; name the arguments that matter.")
        for name in given:
            _check_argument(given, name, names, var_keyword)
        if len(set(given)) < len(given):
            raise _wrong(given, "names an argument twice.")
        self.needs = self.names = tuple(given)

    def resolve(self, bound: Bound) -> Resolved:
        values = [(name, argument_of(bound, name)) for name in self.names]
        encodings = [value_encoding(value, name) for name, value in values]
        texts = [address_text(value, e) for (_, value), e in zip(values, encodings, strict=True)]
        return Resolved(b"".join(encodings), ":".join(texts))


# --- a template ----------------------------------------------------------------------------------


class Field(NamedTuple):
    """A placeholder: the argument, the attributes and items to take from it, and the format."""

    name: str
    steps: tuple[tuple[bool, str | int], ...]
    path: str
    conversion: str
    format: str


_FIELD_PATTERN: Final = r"(\w+)((?:\.\w+|\[[^\]\[]+\])*)"
_STEP_PATTERN: Final = r"\.(\w+)|\[([^\]\[]+)\]"


class Template:
    """A template such as `"order:{order.id}"`: the values of its placeholders make the key."""

    plain = False

    def __init__(
        self, given: str, names: Collection[str], var_keyword: str, self_name: str
    ) -> None:
        self._parts = _parse(given)
        fields = [part for part in self._parts if isinstance(part, Field)]
        if not fields:
            raise _wrong(given, 'has no placeholder such as "{order_id}".')
        for field in fields:
            if field.name != self_name:
                _check_argument(given, field.name, names, var_keyword)
        self.needs = tuple(dict.fromkeys(field.name for field in fields))
        self.names = tuple(
            dict.fromkeys(f.name for f in fields if not f.steps and f.name != self_name)
        )
        first = self._parts[0]
        self.head = first.rpartition(":")[0].rstrip(":") if isinstance(first, str) else ""

    def resolve(self, bound: Bound) -> Resolved:
        encodings, texts = [], []
        for part in self._parts:
            if isinstance(part, str):
                texts.append(part)
                continue
            value = _field_value(part, argument_of(bound, part.name))
            encodings.append(value_encoding(value, part.path))
            texts.append(address_text(value, encodings[-1]))
        return Resolved(b"".join(encodings), "".join(texts))


def parse_tag(
    given: str, names: Collection[str], var_keyword: str, self_name: str
) -> str | Template:
    """Parse a tag; return the text of a fixed one, else its template.

    Raises:
        OptionError: it names something that is not an argument, or is malformed.
    """
    try:
        parts = _parse(given)
        if not any(isinstance(part, Field) for part in parts):
            return "".join(part for part in parts if isinstance(part, str))
        return Template(given, names, var_keyword, self_name)
    except OptionError as error:
        raise OptionError("tags", given, error.fix) from None


def _parse(given: str) -> list[str | Field]:
    from string import Formatter

    parts: list[str | Field] = []
    try:
        for literal, name, spec, conversion in Formatter().parse(given):
            if literal:
                parts.append(literal)
            if name is not None:
                parts.append(_field(given, name, spec or "", conversion or ""))
    except OptionError:
        raise
    except ValueError as error:
        raise _wrong(given, f"is not a template: {error}.") from None
    return parts


def _field(given: str, name: str, spec: str, conversion: str) -> Field:
    match = re.fullmatch(_FIELD_PATTERN, name)
    if match is None or match[1].isdigit() or "{" in spec or conversion not in ("", "s", "r", "a"):
        raise _wrong(given, f'has the placeholder "{{{name}}}"; write {{argument.attribute[key]}}.')
    steps = tuple(
        (True, attribute) if attribute else (False, int(key) if key.isdigit() else key)
        for attribute, key in re.findall(_STEP_PATTERN, match[2])
    )
    return Field(match[1], steps, name, conversion, spec)


_CONVERSIONS: Final[dict[str, Callable[[Any], str]]] = {"s": str, "r": repr, "a": ascii}


def _field_value(field: Field, value: Any) -> Any:
    """Return the value of a placeholder; its text, if the template gives it a format."""
    try:
        for by_attribute, key in field.steps:
            value = getattr(value, str(key)) if by_attribute else value[key]
        if field.conversion:
            value = _CONVERSIONS[field.conversion](value)
        return format(value, field.format) if field.format else value
    except Exception as error:
        raised = f"{type(error).__name__}: {error}"
        raise KeyingError(f"key_resolver: {{{field.path}}} raised {raised}") from error


# --- a function ----------------------------------------------------------------------------------


class CallableResolver:
    """A function that takes the bound arguments by name: its result makes the key."""

    plain = True
    head = ""

    def __init__(
        self, given: Callable[..., Any], names: Collection[str], var_keyword: str, self_name: str
    ) -> None:
        self._function = given
        self._wanted = declared_arguments("key_resolver", given, names, var_keyword, self_name)
        self.needs = None if self._wanted is None else self._wanted
        self.names = (
            None if self._wanted is None else tuple(n for n in self._wanted if n != self_name)
        )
        self._self_name = self_name

    def resolve(self, bound: Bound) -> Resolved:
        value = call_resolver(self._function, "key_resolver", self._wanted, self._self_name, bound)
        if value is None:
            raise KeyingError("key_resolver returned None; let it return a text.")
        encoding = value_encoding(value, "key_resolver()")
        return Resolved(encoding, address_text(value, encoding))


def declared_arguments(
    option: str,
    function: Callable[..., Any],
    names: Collection[str],
    var_keyword: str,
    self_name: str,
) -> tuple[str, ...] | None:
    """Return the arguments that a user's function takes by name; None if it takes `**kwargs`.

    Raises:
        OptionError: it takes something that is not an argument, or its signature cannot be read.
    """
    if options.is_async(function):
        fix = "must not be async, since keys are made without waiting."
        raise OptionError(option, function, fix)
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        fix = "has no signature that can be read; wrap it in a lambda."
        raise OptionError(option, function, fix) from None
    if any(p.kind in (p.VAR_POSITIONAL, p.POSITIONAL_ONLY) for p in parameters):
        raise OptionError(option, function, "gets the arguments by name; declare them by name.")
    wanted = [p for p in parameters if p.kind is not p.VAR_KEYWORD]
    for parameter in wanted:
        known = parameter.name in names or parameter.name == self_name or bool(var_keyword)
        if parameter.default is parameter.empty:
            options.refuse_whole_keywords(option, function, parameter.name, var_keyword)
        if not known and parameter.default is parameter.empty:
            listed = ", ".join(names) or "none"
            fix = f"takes {parameter.name!r}, which is not an argument; there are: {listed}."
            raise OptionError(option, function, fix)
    if len(wanted) < len(parameters):
        return None
    return tuple(p.name for p in wanted if p.name in names or p.name == self_name or var_keyword)


def call_resolver(
    function: Callable[..., Any],
    option: str,
    wanted: tuple[str, ...] | None,
    self_name: str,
    bound: Bound,
) -> Any:
    """Call a user's function with the bound arguments.

    Raises:
        KeyingError: it raised; the user's exception is the cause.
    """
    if wanted is None:
        chosen = {name: value for name, value in bound.items() if name != self_name}
    else:
        chosen = {name: bound[name] for name in wanted if name in bound}
    try:
        return function(**chosen)
    except Exception as error:
        raise KeyingError(f"{option} raised {type(error).__name__}: {error}") from error


# --- address texts ---------------------------------------------------------------------------

_READABLE_TYPES: Final = (str, int, float, complex, enum.Enum)
_READABLE_BASES: Final = frozenset(
    {
        *("datetime.date", "datetime.time", "datetime.timedelta"),
        *("pathlib.PurePath", "pathlib._local.PurePath"),
    }
)
_READABLE_CLASSES: Final = frozenset({"uuid.UUID", "decimal.Decimal", "fractions.Fraction"})


def address_text(value: Any, encoding: bytes) -> str:
    """Return the text of a value in an address.

    Texts, numbers, None, enum members, dates, paths and UUIDs are formatted as in an f-string; any
    other value is represented by 16 hexadecimal digits of its digest.
    """
    if type(value) is str:
        return value
    if value is None or has_readable_text(value):
        try:
            return format(value)
        except Exception:
            return atoms.short_digest(encoding)
    return atoms.short_digest(encoding)


def has_readable_text(value: Any) -> bool:
    """True if a value has a short readable text."""
    kind: Any = type(value)
    return issubclass(kind, _READABLE_TYPES) or _is_readable_type(kind)


@functools.lru_cache(maxsize=256)
def _is_readable_type(kind: type) -> bool:
    numpy = sys.modules.get("numpy")
    if numpy is not None and issubclass(kind, numpy.generic):
        return not issubclass(kind, numpy.void)
    if not _READABLE_BASES.isdisjoint(map(canonical.type_name, kind.__mro__)):
        return True
    return canonical.type_name(kind) in _READABLE_CLASSES


def as_keying_error(error: Unkeyable, function: str, name: str) -> KeyingError:
    """Make the caller's error from an `Unkeyable`: it names function, argument, path and fix."""
    fix = error.fix.replace("ignore=[...]", f'ignore=["{name}"]')
    at = error.path or name
    return KeyingError(
        f"{label(function)}: argument {name!r}: {at} is {error.kind}, which has no sound key: {fix}"
    )
