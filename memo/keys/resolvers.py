"""Resolvers: the `key_resolver` option, checked and parsed once, at decoration.

For each call a resolver returns an encoding, which becomes the key, and a text, which becomes the
address.  `"{id}"` of 1 and of "1" has one text and two encodings: one address, two keys.
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
from memo.runtime.named_tuple import NamedTuple
from memo.settings import options

Bound = Mapping[str, Any]


class Resolved(NamedTuple):
    """The result of a resolver for one call."""

    encoding: bytes
    text: str


class Resolver(Protocol):
    """A checked `key_resolver`.

    Attributes:
        needs: the arguments without which it cannot resolve; None: all of them.
        names: the arguments that select entries, besides the resolved value.
        plain: only plain values of `names` select entries, as the resolver may exist to avoid the
            others.
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


def resolver(given: Any, names: Collection[str], extra: str, own: str) -> Resolver:
    """Compile a `key_resolver` for a function.

    Args:
        given: a callable, a template, or a list of argument names.
        names: the names of the function's arguments, without `own`.
        open_: the function takes `**kwargs`, so any other name is valid too.
        own: the name of its `self` or `cls`, or `""`.

    Raises:
        OptionError: it names something that is not an argument, is empty, or is malformed.
    """
    if isinstance(given, str):
        return Template(given, names, extra, own)
    if callable(given):
        return Function(given, names, extra, own)
    if isinstance(given, Sequence) and all(isinstance(name, str) for name in given):
        return Names(given, names, extra)
    raise _wrong(given, "must be a function, a template or a list of argument names.")


def _wrong(given: Any, fix: str) -> OptionError:
    return OptionError("key_resolver", given, fix)


def _check(given: Any, name: str, names: Collection[str], extra: str) -> None:
    options.refuse_whole_keywords("key_resolver", given, name, extra)
    if name not in names and not extra:
        listed = ", ".join(names) or "none"
        raise _wrong(given, f"{name!r} is not an argument of the function, which has: {listed}.")


def looked_up(bound: Bound, name: str) -> Any:
    """Return an argument by its name.

    Raises:
        KeyingError: this call does not have that argument of `**kwargs`.
    """
    try:
        return bound[name]
    except KeyError:
        raise KeyingError(f"key_resolver needs {name!r}, which this call does not have.") from None


# --- a list of names -----------------------------------------------------------------------------


class Names:
    """A list of argument names: the key consists of their values."""

    plain = False
    head = ""

    def __init__(self, given: Sequence[str], names: Collection[str], extra: str) -> None:
        if not given:
            raise _wrong(given, "is empty; name the arguments that matter.")
        for name in given:
            _check(given, name, names, extra)
        if len(set(given)) < len(given):
            raise _wrong(given, "names an argument twice.")
        self.needs = self.names = tuple(given)

    def resolve(self, bound: Bound) -> Resolved:
        values = [(name, looked_up(bound, name)) for name in self.names]
        encodings = [canonical.encoding(value, name) for name, value in values]
        spoken = [words(value, e) for (_, value), e in zip(values, encodings, strict=True)]
        return Resolved(b"".join(encodings), ":".join(spoken))


# --- a template ----------------------------------------------------------------------------------


class Field(NamedTuple):
    """A placeholder: the argument, the attributes and items taken from it, and its format."""

    name: str
    steps: tuple[tuple[bool, str | int], ...]
    path: str
    conversion: str
    format: str


_FIELD: Final = r"(\w+)((?:\.\w+|\[[^\]\[]+\])*)"
_STEP: Final = r"\.(\w+)|\[([^\]\[]+)\]"


class Template:
    """A template such as `"order:{order.id}"`.

    The key consists of the values of its placeholders.
    """

    plain = False

    def __init__(self, given: str, names: Collection[str], extra: str, own: str) -> None:
        self._parts = _parsed(given)
        fields = [part for part in self._parts if isinstance(part, Field)]
        if not fields:
            raise _wrong(given, 'has no placeholder such as "{order_id}".')
        for field in fields:
            if field.name != own:
                _check(given, field.name, names, extra)
        self.needs = tuple(dict.fromkeys(field.name for field in fields))
        self.names = tuple(dict.fromkeys(f.name for f in fields if not f.steps and f.name != own))
        first = self._parts[0]
        self.head = first.rpartition(":")[0].rstrip(":") if isinstance(first, str) else ""

    def resolve(self, bound: Bound) -> Resolved:
        encodings, spoken = [], []
        for part in self._parts:
            if isinstance(part, str):
                spoken.append(part)
                continue
            value = _followed(part, looked_up(bound, part.name))
            encodings.append(canonical.encoding(value, part.path))
            spoken.append(words(value, encodings[-1]))
        return Resolved(b"".join(encodings), "".join(spoken))


def tag(given: str, names: Collection[str], extra: str, own: str) -> str | Template:
    """Return a fixed tag as it is, or a template parsed.

    Raises:
        OptionError: it names something that is not an argument, or is malformed.
    """
    try:
        parts = _parsed(given)
        if not any(isinstance(part, Field) for part in parts):
            return "".join(part for part in parts if isinstance(part, str))
        return Template(given, names, extra, own)
    except OptionError as error:
        raise OptionError("tags", given, error.fix) from None


def _parsed(given: str) -> list[str | Field]:
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
    match = re.fullmatch(_FIELD, name)
    if match is None or match[1].isdigit() or "{" in spec or conversion not in ("", "s", "r", "a"):
        raise _wrong(given, f'has the placeholder "{{{name}}}"; write {{argument.attribute[key]}}.')
    steps = tuple(
        (True, attribute) if attribute else (False, int(key) if key.isdigit() else key)
        for attribute, key in re.findall(_STEP, match[2])
    )
    return Field(match[1], steps, name, conversion, spec)


_CONVERSIONS: Final[dict[str, Callable[[Any], str]]] = {"s": str, "r": repr, "a": ascii}


def _followed(field: Field, value: Any) -> Any:
    """Return the value of a placeholder, or its text if the template has a format for it."""
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


class Function:
    """A function that takes the bound arguments by name: the key is its result."""

    plain = True
    head = ""

    def __init__(
        self, given: Callable[..., Any], names: Collection[str], extra: str, own: str
    ) -> None:
        self._function = given
        self._wanted = declared("key_resolver", given, names, extra, own)
        self.needs = None if self._wanted is None else self._wanted
        self.names = None if self._wanted is None else tuple(n for n in self._wanted if n != own)
        self._own = own

    def resolve(self, bound: Bound) -> Resolved:
        value = call_resolver(self._function, "key_resolver", self._wanted, self._own, bound)
        if value is None:
            raise KeyingError("key_resolver returned None; let it return a text.")
        encoding = canonical.encoding(value, "key_resolver()")
        return Resolved(encoding, words(value, encoding))


def declared(
    option: str, function: Callable[..., Any], names: Collection[str], extra: str, own: str
) -> tuple[str, ...] | None:
    """Return the arguments that a user's function takes by name; None: all, by `**kwargs`.

    Raises:
        OptionError: it takes something that is not an argument, or its signature cannot be read.
    """
    if options.is_async(function):
        raise OptionError(option, function, "must not be async: the key is made before waiting.")
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        fix = "has no signature that can be read; wrap it in a lambda."
        raise OptionError(option, function, fix) from None
    if any(p.kind in (p.VAR_POSITIONAL, p.POSITIONAL_ONLY) for p in parameters):
        raise OptionError(option, function, "gets the arguments by name; declare them by name.")
    wanted = [p for p in parameters if p.kind is not p.VAR_KEYWORD]
    for parameter in wanted:
        known = parameter.name in names or parameter.name == own or bool(extra)
        if parameter.default is parameter.empty:
            options.refuse_whole_keywords(option, function, parameter.name, extra)
        if not known and parameter.default is parameter.empty:
            listed = ", ".join(names) or "none"
            fix = f"takes {parameter.name!r}, which is not an argument; there are: {listed}."
            raise OptionError(option, function, fix)
    if len(wanted) < len(parameters):
        return None
    return tuple(p.name for p in wanted if p.name in names or p.name == own or extra)


def call_resolver(
    function: Callable[..., Any],
    option: str,
    wanted: tuple[str, ...] | None,
    own: str,
    bound: Bound,
) -> Any:
    """Call a user's function with the bound arguments.

    Raises:
        KeyingError: it raised; the user's exception is the cause.
    """
    if wanted is None:
        chosen = {name: value for name, value in bound.items() if name != own}
    else:
        chosen = {name: bound[name] for name in wanted if name in bound}
    try:
        return function(**chosen)
    except Exception as error:
        raise KeyingError(f"{option} raised {type(error).__name__}: {error}") from error


# --- address texts ---------------------------------------------------------------------------

_SPOKEN: Final = (str, int, float, complex, enum.Enum)
_BASES: Final = frozenset(
    {
        *("datetime.date", "datetime.time", "datetime.timedelta"),
        *("pathlib.PurePath", "pathlib._local.PurePath"),
    }
)
_OTHERS: Final = frozenset({"uuid.UUID", "decimal.Decimal", "fractions.Fraction"})


def words(value: Any, encoding: bytes) -> str:
    """Return the text of a value in an address.

    Text, numbers, None, enum members, dates, paths, UUID: as in an f-string.  Any other value: 16
    hexadecimal digits of its digest.
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
    return issubclass(kind, _SPOKEN) or _speaks(kind)


@functools.lru_cache(maxsize=256)
def _speaks(kind: type) -> bool:
    numpy = sys.modules.get("numpy")
    if numpy is not None and issubclass(kind, numpy.generic):
        return not issubclass(kind, numpy.void)
    if not _BASES.isdisjoint(map(canonical.type_name, kind.__mro__)):
        return True
    return canonical.type_name(kind) in _OTHERS


def with_argument(error: Unkeyable, function: str, name: str) -> KeyingError:
    """Turn an `Unkeyable` into the caller's error: function, argument, path, type and fix."""
    fix = error.fix.replace("ignore=[...]", f'ignore=["{name}"]')
    at = error.path or name
    return KeyingError(
        f"{label(function)}: argument {name!r}: {at} is {error.kind}, which has no sound key: {fix}"
    )
