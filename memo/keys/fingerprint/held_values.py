"""Fingerprints: comparable texts of the values in globals, defaults and captured variables.

A fingerprint is a short text that is equal for equal values, together with the user's functions and
classes in the value.  These are not part of the text, which has `@0`, `@1`, … in their place:
`function_version` follows them, so that an edit behind a table of handlers is noticed.

Numbers are shown as they are; everything else is shown as a digest, since a global may be a secret.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import marshal
import sys
import types
import typing
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from memo.keys import origin
from memo.keys.encoding import canonical
from memo.keys.encoding.atoms import short_digest
from memo.records import codec
from memo.runtime.named_tuple import NamedTuple

STABLE = "__memo_stable__"
"""The attribute that `memo.keys.fingerprint.function_version.stable` sets."""
MAX_ELEMENTS = 20_000
"""Elements of a structure that are followed one by one; the rest is not tracked."""

CodeRef = types.FunctionType | type
"""A function or class of the user's in a value, whose code is followed."""


class SelfState(NamedTuple):
    """The state of `self` that a method reads.

    Attributes:
        names: the attributes that may be stored on the object, sorted.
        whole: `self` is passed elsewhere, so all of its attributes count.
        slots: name -> the class's slot for it.
        changed: names that the code in reach assigns, sets or fills.
        originals: state that the method changes itself, as other processes have found: label and
            path -> original text.
    """

    names: tuple[str, ...] = ()
    whole: bool = False
    slots: Mapping[str, Any] = types.MappingProxyType({})
    changed: frozenset[str] = frozenset()
    originals: Mapping[str, str] = types.MappingProxyType({})


STATELESS = SelfState()


class ValueFingerprint(NamedTuple):
    """The fingerprint of a value: its content as text, and where that may change.

    Attributes:
        text: equal for equal values.
        refs: the user's functions and classes in the value, in the order of their `@n`.
        mutable: the value may change in place, so it must be checked again.
        left_out: (path in the value, why) of parts without a sound key.
        packages: (distribution, version) of the value's types.
        noted: (text, function or class) inside of values that `canonical` keys, where no order
            exists to number them by.
    """

    text: str
    refs: tuple[CodeRef, ...] = ()
    mutable: bool = False
    left_out: tuple[tuple[str, str], ...] = ()
    packages: frozenset[tuple[str, str]] = frozenset()
    noted: tuple[tuple[str, CodeRef], ...] = ()

    def same(self, other: ValueFingerprint) -> bool:
        """True if two fingerprints, taken in one process, are of equal values."""
        held = {id(ref) for _, ref in self.noted} == {id(ref) for _, ref in other.noted}
        return (
            held
            and self.text == other.text
            and len(self.refs) == len(other.refs)
            and all(a is b for a, b in zip(self.refs, other.refs, strict=True))
        )


NO_VALUE: Any = object()
"""Marks a missing value."""
MISSING_FINGERPRINT = ValueFingerprint("absent")
NO_SUBSTITUTES: Mapping[str, str] = types.MappingProxyType({})


def fingerprint_of(
    value: Any, quiet: bool = False, given: Mapping[str, str] = NO_SUBSTITUTES
) -> ValueFingerprint:
    """Return the fingerprint of a value.

    Args:
        value: any value; parts without a sound key are left out and listed in `left_out`.
        quiet: do not list them (for values that an installed library keeps for itself).
        given: path in the value -> text that replaces that of the part.
    """
    if value is NO_VALUE:
        return MISSING_FINGERPRINT
    walk = FingerprintWalk(given)
    try:
        text = walk.text(value, "")
    except RecursionError:
        text = "too deep"
        walk.left_out.append(("", "is nested too deeply"))
    return ValueFingerprint(
        text,
        tuple(walk.refs),
        walk.mutable,
        () if quiet else tuple(walk.left_out),
        frozenset(walk.packages),
        tuple(walk.noted.values()),
    )


def fingerprint_with(value: Any, given: Mapping[str, str]) -> ValueFingerprint:
    """Return the fingerprint of a value with other texts for some of its paths."""
    return fingerprint_of(value, given=given)


MAX_DETAILS = 1000
"""Maximum number of parts of a value that are distinguished when it is compared part by part."""


def details(value: Any) -> dict[str, str]:
    """Return the fingerprint of each part of a value, for comparison within this process.

    Returns:
        Path in the value -> text; for a value of many parts only the whole, under `""`.
    """
    if value is NO_VALUE:
        return {"": MISSING_FINGERPRINT.text}
    walk = _PartsWalk()
    try:
        walk.text(value, "")
    except RecursionError:
        return {"": fingerprint_of(value).text}
    return walk.found


def snapshot(value: Any) -> bytes | None:
    """Return bytes that differ if a small structure of plain values does; None for other values.

    Faster than a fingerprint by an order of magnitude.  The snapshots of equal values may differ
    (by the order of a set); those of different values always do.
    """
    try:
        return marshal.dumps(value, 2) if _plain(value, [1000]) else None
    except (ValueError, RecursionError):  # it contains itself
        return None


def _plain(value: Any, budget: list[int]) -> bool:
    budget[0] -= 1
    if budget[0] < 0:
        return False
    kind = type(value)
    if kind in (list, tuple, set, frozenset):
        return all(_plain(item, budget) for item in value)
    if kind is dict:
        return all(_plain(k, budget) and _plain(v, budget) for k, v in value.items())
    return kind in IMMUTABLE_BUILTINS and kind is not bytes


def qualified_name(value: Any) -> str:
    """Return `"module:qualname"` of a function or a class."""
    module = getattr(value, "__module__", None)
    module = module if isinstance(module, str) and module else "__main__"
    name = getattr(value, "__qualname__", None) or type(value).__qualname__
    return f"{'__main__' if module == '__mp_main__' else module}:{name}"


IMMUTABLE_BUILTINS: frozenset[type] = frozenset(
    {int, float, complex, bool, str, bytes, type(None), type(...), type(NotImplemented)}
)
_IMMUTABLE_CLASSES = frozenset(
    [
        "builtins.range",
        "decimal.Decimal",
        "fractions.Fraction",
        "uuid.UUID",
        "re.Pattern",
        "zoneinfo.ZoneInfo",
        "datetime.date",
        "datetime.datetime",
        "datetime.time",
        "datetime.timedelta",
        "datetime.timezone",
        "pathlib.PosixPath",
        "pathlib.PurePosixPath",
        "pathlib.WindowsPath",
        "pathlib.PureWindowsPath",
        "pathlib._local.PosixPath",
        "pathlib._local.PurePosixPath",
    ]
)
C_FUNCTION_TYPES = (
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    types.MethodWrapperType,
    types.ClassMethodDescriptorType,
)
_TRANSPARENT = frozenset({"types.SimpleNamespace", "argparse.Namespace"})
"""Classes whose objects have no state besides their attributes."""
_TYPE_PARTS = ("__supertype__", "__bound__", "__constraints__")
"""Types in a `NewType` and a `TypeVar`."""
_KEYED_WHOLE = frozenset({"numba"})
"""Distributions whose functions depend on nothing but their options and what they wrap."""
_BARE_BASES = frozenset({"abc", "typing", "collections.abc", "enum", "dataclasses"})
"""Modules of base classes whose objects have no state of their own."""


def _atom(value: Any) -> str:
    if isinstance(value, str):
        return f"str {short_digest(value.encode('utf-8', 'surrogatepass'))}"
    if isinstance(value, bytes):
        return f"bytes {short_digest(value)}"
    if isinstance(value, int) and value.bit_length() > 256:
        return f"int {value:x}"
    return f"{type(value).__name__} {value!r}"


class FingerprintWalk:
    """Traverses one value for its fingerprint; see `canonical.Walk` for keys."""

    def __init__(self, given: Mapping[str, str] = NO_SUBSTITUTES) -> None:
        self.given = given
        self.refs: list[CodeRef] = []
        self.mutable = False
        self.left_out: list[tuple[str, str]] = []
        self.noted: dict[int, tuple[str, CodeRef]] = {}
        self.packages: set[tuple[str, str]] = set()
        self.done: dict[int, tuple[str, Any]] = {}
        self.open: dict[int, int] = {}
        self.left = MAX_ELEMENTS
        self._has_keyless = False

    def text(self, value: Any, path: str) -> str:
        """Return the text of one value; `path` leads to it, for `left_out`."""
        if self.given and path in self.given:
            return self.given[path]
        if type(value) in IMMUTABLE_BUILTINS:
            return _atom(value)
        known = self.done.get(id(value))
        if known is not None:
            return known[0]
        if id(value) in self.open:
            return f"cycle {len(self.open) - self.open[id(value)]}"
        self.left -= 1
        if self.left < 0:
            self.left_out.append((path, "is too large to be followed"))
            return "…"
        self.open[id(value)] = len(self.open)
        try:
            text = self._text(value, path)
        except RecursionError:
            raise
        except Exception as error:  # the value's own methods may raise anything
            name = type(value).__qualname__
            self.mutable = True
            self.left_out.append((path, f"{name} raised {type(error).__name__} when it was read"))
            text = f"unreadable {name}"
        finally:
            del self.open[id(value)]
        self.done[id(value)] = (text, value)
        return text

    def _text(self, value: Any, path: str) -> str:
        if issubclass(type(value), (types.FunctionType, type)):
            return self._code(value, path)
        if _is_proxy(type(value)):
            return self.text(value._get_current_object(), path)
        special = _SPECIAL.get(type(value))
        if special is not None:
            return special(self, value, path)
        if _is_wrapper(type(value)):
            parts = (value.__wrapped__, value._self_wrapper, value._self_instance)
            return f"wrapper {','.join(self.text(part, path) for part in parts)}"
        if isinstance(value, types.ModuleType):
            return self._module(value, path)
        if isinstance(value, enum.Enum):
            return f"{self._code(type(value), path)}.{value.name} {self.text(value.value, path)}"
        if type(value).__module__ == "typing":
            return self._generic(value, path)
        return self._instance(value, path)

    # functions, classes, modules

    def _code(self, value: CodeRef, path: str) -> str:
        if vars(value).get(STABLE):
            self.left_out.append((path, f"{qualified_name(value)} is marked stable"))
            return f"stable {qualified_name(value)}"
        if isinstance(value, type):
            return self._class(value)
        whose = origin.of_namespace(value.__globals__, value.__code__.co_filename)
        inner = wrapped(value)
        if whose.kind == origin.MEMO:
            return "memo" if inner is None else self.text(inner, path)
        return self._ref(value)

    def _class(self, value: type) -> str:
        whose = origin.of_type(value)
        if whose.kind == origin.USER:
            return self._ref(value)
        self._package(whose)
        return f"class {qualified_name(value)}"

    def _ref(self, value: CodeRef) -> str:
        self.refs.append(value)
        return f"@{len(self.refs) - 1}"

    def _package(self, whose: origin.Origin) -> None:
        if whose.kind == origin.INSTALLED:
            self.packages.add((whose.name, whose.version))

    def _module(self, value: types.ModuleType, path: str) -> str:
        whose = origin.of_module(value)
        self._package(whose)
        if whose.kind == origin.USER:
            self.left_out.append((path, f"module {value.__name__} is used as a value"))
        return f"module {value.__name__}"

    def _builtin(self, value: Any, path: str) -> str:
        holder = getattr(value, "__self__", None)
        name = getattr(value, "__qualname__", value.__name__)
        if holder is not None and not isinstance(holder, types.ModuleType):
            return f"method {name} {self.text(holder, path)}"
        cls = getattr(value, "__objclass__", None)
        module = cls.__module__ if cls is not None else value.__module__
        whose = origin.find(module) if isinstance(module, str) else None
        if whose is None or whose.kind == origin.USER:
            self.left_out.append((path, f"{module}.{name} is a C function without a known version"))
        else:
            self._package(whose)
        return f"builtin {module}.{name}"

    def _method(self, value: types.MethodType, path: str) -> str:
        bound = self.text(value.__self__, path)
        return f"method {self.text(value.__func__, path)} of {bound}"

    def _partial(self, value: functools.partial[Any], path: str) -> str:
        parts = [self.text(value.func, path)]
        parts += [self.text(item, f"{path}.args[{at}]") for at, item in enumerate(value.args)]
        keywords = value.keywords
        parts += [f"{n}={self.text(keywords[n], f'{path}.{n}')}" for n in keywords]
        return f"partial({','.join(parts)})"

    def _held(self, value: Any, path: str) -> str:
        """Return the text of a descriptor, by the functions that it holds."""
        names = ("__func__", "fget", "fset", "fdel", "func", "method", "dispatcher")
        held = [(n, getattr(value, n, None)) for n in names]
        parts = [f"{n}={self.text(v, path)}" for n, v in held if v is not None]
        if isinstance(value, functools.partialmethod):
            parts += [self.text((value.args, value.keywords), path)]
        return f"{type(value).__name__}({','.join(parts)})"

    def _generic(self, value: Any, path: str) -> str:
        """Return the text of `list[int]`, `Callable[[int], str]`, `int | None`, `NewType`."""
        if typing.get_origin(value) is None:
            held = [getattr(value, name, None) for name in _TYPE_PARTS]
            return f"type({value!r},{','.join(self.text(part, path) for part in held)})"
        parts = [self.text(typing.get_origin(value), path)]
        parts += [self.text(item, path) for item in typing.get_args(value)]
        return f"type({','.join(parts)})"

    # containers

    def _plain_container_text(self, value: Any) -> str | None:
        """Return the text of a container of plain values in one step, or None."""
        if self._has_keyless or not _is_plain_container(value):
            return None
        try:
            return f"{type(value).__name__} {self._canonical(value)}"
        except RecursionError:
            raise
        except Exception:  # a buffer of ctypes among the values, or they are nested too deeply
            self._has_keyless = True  # what is inside is not tried again at each level
            return None

    def _sequence(self, value: Any, path: str) -> str:
        self.mutable |= type(value) is not tuple
        whole = self._plain_container_text(value)
        if whole is not None:
            return whole
        items = [self.text(item, f"{path}[{at}]") for at, item in enumerate(list(value))]
        return f"{type(value).__name__} [{','.join(items)}]{getattr(value, 'maxlen', '')}"

    def _set(self, value: Any, path: str) -> str:
        self.mutable |= type(value) is not frozenset
        whole = self._plain_container_text(value)
        if whole is not None:
            return whole
        items = [self.text(item, path) for item in sorted(value, key=_sort_key)]
        return f"{type(value).__name__} {{{','.join(items)}}}"

    def _mapping(self, value: Any, path: str) -> str:
        self.mutable = True
        whole = self._plain_container_text(value)
        if whole is not None:
            return whole
        items = list(value.items())
        factory = self.text(getattr(value, "default_factory", None), path)
        lines = [
            f"{self.text(k, path)}:{self.text(v, f'{path}[{_key_text(k)}]')}" for k, v in items
        ]
        return f"{type(value).__name__} {{{','.join(lines)}}} {factory}"

    # everything else

    def _instance(self, value: Any, path: str) -> str:
        kind = type(value)
        whose = origin.of_type(kind)
        mine = whose.kind == origin.USER
        if "_decorated_fun" in vars(kind):
            return self._task(kind, path)
        if origin.is_compiled(kind):
            return self._builtin(value, path)
        inner = None if mine or whose.name in _KEYED_WHOLE else wrapped(value)
        if inner is not None:
            own = bound_object(value)
            bound = "" if own is None else f" of {self.text(own, path)}"
            return f"wrapped {self.text(inner, path)}{bound}"
        if whose.kind == origin.MEMO:
            return f"memo {kind.__qualname__}"
        name = f"{kind.__module__}.{kind.__qualname__}"
        self.mutable |= not is_immutable(kind)
        cls = self._code(kind, path)
        if is_transparent(kind):
            return f"{self._state(value, cls, path)} {self._content(value, path)}"
        try:
            by_name = self.callables(value, path) if _is_pickled_specially(kind) else ""
            return f"{cls} {self._canonical(value)}{by_name}"
        except RecursionError:
            raise
        except Exception as error:  # including an error in the value's own methods
            if mine and not any(map(_is_written_in_c, kind.__mro__)):
                return self._state(value, cls, path)
            self.left_out.append((path + getattr(error, "path", ""), f"{name} has no sound key"))
            return f"{cls} {self.callables(value, path)}"

    def _task(self, kind: type, path: str) -> str:
        """Return the text of a Celery task: its function, and the user's classes of it."""
        bases = [base for base in kind.__mro__[1:] if origin.of_type(base).kind == origin.USER]
        parts = [vars(kind)["run"], *bases]
        return f"task {','.join(self.text(part, path) for part in parts)}"

    def _content(self, value: Any, path: str) -> str:
        """Return the text of the items of an object whose class derives from a container."""
        for kinds, special in _CONTAINERS:
            if isinstance(value, kinds):
                return special(self, value, path)
        return ""

    def _canonical(self, value: Any) -> str:
        return canonical.digest(value, self._note).hex()[:32]

    def _note(self, value: CodeRef, _owner: type | None) -> str:
        """Return the text of a function or class inside a value that `canonical` keys.

        It is remembered, so that the code that it reaches is followed as well.
        """
        if vars(value).get(STABLE):
            self.left_out.append(("", f"{qualified_name(value)} is marked stable"))
            return qualified_name(value)
        code = _bytecode_text(value).encode("utf-8", "surrogatepass")
        text = f"{qualified_name(value)} {short_digest(code)}"
        self.noted[id(value)] = (text, value)
        return text

    def _state(self, value: Any, cls: str, path: str) -> str:
        """Return the text of an object of a user's class: its attributes, one by one."""
        state = dict(getattr(value, "__dict__", {}))
        for slot in slots_of(type(value)):
            with contextlib.suppress(AttributeError):  # the slot is empty
                state[slot.__name__] = slot.__get__(value)
        parts = [f"{n}={self.text(state[n], f'{path}.{n}')}" for n in sorted(state, key=str)]
        return f"{cls}({','.join(parts)})"

    def callables(self, value: Any, path: str) -> str:
        """Return the text of the functions in a library's object (`numpy.vectorize(f)`)."""
        state = getattr(value, "__dict__", None)
        if not isinstance(state, dict):
            return ""
        kinds = (types.FunctionType, types.MethodType, functools.partial)
        held = [(n, v) for n, v in sorted(state.items()) if isinstance(v, kinds)]
        return ",".join(f"{n}={self.text(v, f'{path}.{n}')}" for n, v in held)


class _TooManyError(RecursionError):
    """A value has too many parts; it ends a walk in the same way as a value that is too deep."""


class _PartsWalk(FingerprintWalk):
    """Records the text of each part of a value."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, str] = {}

    def text(self, value: Any, path: str) -> str:
        text = super().text(value, path)
        self.found[path] = text
        if len(self.found) > MAX_DETAILS:
            raise _TooManyError
        return text

    def _plain_container_text(self, value: Any) -> str | None:
        return None if len(value) <= MAX_DETAILS else super()._plain_container_text(value)

    def _ref(self, value: CodeRef) -> str:
        return f"@{qualified_name(value)} {id(value)}"


def _is_proxy(kind: type) -> bool:
    """True if objects of a class are proxies of a Celery task, before and after its first use."""
    module = sys.modules.get("celery.local")
    return module is not None and issubclass(kind, module.Proxy)


def _is_wrapper(kind: type) -> bool:
    """True if objects of a class are functions decorated by wrapt."""
    held = getattr(kind, "_self_wrapper", None)
    return isinstance(held, (types.GetSetDescriptorType, types.MemberDescriptorType))


def _is_pickled_specially(kind: type) -> bool:
    """True if objects of a library's class are pickled in a special way, such as by name."""
    from memo.keys.encoding import lookup  # most values do not need it

    return not codec.has_default_reduce(kind) and lookup.find_adapter(kind) is None


def wrapped(value: Any) -> Any:
    """Return the function under a decorator, as `functools.wraps` and memo record it."""
    state = getattr(value, "__dict__", None)
    found = state.get("__wrapped__") if isinstance(state, Mapping) else None
    if found is None and origin.is_of_memo(type(value)):
        found = getattr(value, "__wrapped__", None)
    return found


def bound_object(value: Any) -> Any:
    """Return the object that a method cached by memo is bound to, or None."""
    return getattr(value, "__self__", None) if origin.is_of_memo(type(value)) else None


DESCRIPTORS: dict[type, str] = {
    staticmethod: "__func__",
    classmethod: "__func__",
    types.MethodType: "__func__",
    property: "fget",
    functools.cached_property: "func",
    functools.partial: "func",
    functools.partialmethod: "func",
}


def layers(value: Any) -> Iterator[Any]:
    """Yield a class attribute and the functions inside it: under decorators and descriptors."""
    for _ in range(64):
        yield value
        name = DESCRIPTORS.get(type(value))
        value = wrapped(value) if name is None else getattr(value, name)
        if value is None:
            return


def innermost(function: Any) -> Any:
    """Return the function under all decorators and descriptors."""
    *_, last = layers(function)
    return last


def is_immutable(kind: type) -> bool:
    """True if values of a type, and all that they hold, never change in place."""
    return (
        kind in IMMUTABLE_BUILTINS or f"{kind.__module__}.{kind.__qualname__}" in _IMMUTABLE_CLASSES
    )


def is_transparent(kind: type) -> bool:
    """True if objects of a class have no state but their attributes and items."""
    if f"{kind.__module__}.{kind.__qualname__}" in _TRANSPARENT:
        return True
    if hasattr(kind, "__memo_key__") or origin.of_type(kind).kind != origin.USER:
        return False
    return all(map(_holds_nothing, kind.__mro__))


def slots_of(kind: type) -> list[Any]:
    """Return the slots of a class and its bases."""
    return [
        slot
        for base in kind.__mro__
        for name, slot in vars(base).items()
        if isinstance(slot, types.MemberDescriptorType) and name != "__dict__"
    ]


def _holds_nothing(base: type) -> bool:
    """True if objects have no hidden state from a base class: it is not written in C."""
    if base is object or base in _CONTAINER_TYPES or base.__module__ in _BARE_BASES:
        return True
    kind = origin.of_type(base).kind
    written = any(isinstance(value, types.FunctionType) for value in vars(base).values())
    if kind == origin.USER:
        return not _is_written_in_c(base)
    return kind == origin.PYTHON and written


def _is_written_in_c(base: type) -> bool:
    """True if a class of no known package is written in C, and may have hidden state."""
    if origin.of_type(base).kind != origin.USER:
        return False
    kinds = (types.GetSetDescriptorType, types.MethodDescriptorType, types.WrapperDescriptorType)
    return any(
        isinstance(value, kinds) and value.__objclass__ is base
        for name, value in vars(base).items()
        if name not in {"__dict__", "__weakref__"}
    )


def _is_plain_container(value: Any) -> bool:
    """True if a container holds only plain values, at any depth."""
    if type(value) not in (list, tuple, dict, set, frozenset) or not value:
        return False
    try:
        marshal.dumps(value, 2)
    except ValueError:
        return False
    return True


def _sort_key(value: Any) -> tuple[str, list[str]]:
    """Return a sort key that depends on no hash or address."""
    shot = fingerprint_of(value)
    return shot.text, [qualified_name(ref) + _bytecode_text(ref) for ref in shot.refs]


def _bytecode_text(ref: CodeRef) -> str:
    if isinstance(ref, type):
        return ""
    from memo.keys.fingerprint import normalized_code

    return normalized_code.bytecode(ref.__code__)


def _key_text(value: Any) -> str:
    return repr(value) if isinstance(value, (str, int)) else type(value).__name__


_Special = Callable[[FingerprintWalk, Any, str], str]
_CONTAINERS: tuple[tuple[Any, _Special], ...] = (
    (Mapping, FingerprintWalk._mapping),
    ((list, tuple, deque), FingerprintWalk._sequence),
    ((set, frozenset), FingerprintWalk._set),
)
_CONTAINER_TYPES = frozenset({list, tuple, dict, set, frozenset, deque})


def _table(*rows: tuple[Iterable[Any], _Special]) -> dict[type, _Special]:
    return {kind: special for kinds, special in rows for kind in kinds}


_SPECIAL = _table(
    ((list, tuple, deque), FingerprintWalk._sequence),
    ((set, frozenset), FingerprintWalk._set),
    ((dict, OrderedDict, defaultdict, Counter, types.MappingProxyType), FingerprintWalk._mapping),
    ((types.MethodType,), FingerprintWalk._method),
    ((functools.partial,), FingerprintWalk._partial),
    ((staticmethod, classmethod, property), FingerprintWalk._held),
    (
        (functools.cached_property, functools.partialmethod, functools.singledispatchmethod),
        FingerprintWalk._held,
    ),
    (C_FUNCTION_TYPES, FingerprintWalk._builtin),
    ((types.GenericAlias, types.UnionType), FingerprintWalk._generic),
)
