"""Canonical encoding of values: equal bytes for equal values, different ones for others.

Rules of this module:

1.  A value is encoded as its *kind* and its content, prefixed by its length, so that encodings in a
    row cannot be confused.  Content longer than `atoms.MAX_LITERAL_BYTES` is replaced by its
    digest, so even the largest value has a short encoding; nothing is sampled.
2.  Two values have the same encoding if they have the same type and nothing that a computation may
    read distinguishes them.  The order of a dict counts; identity, sharing, interning, memory
    layout, the order of a set and PYTHONHASHSEED do not.  `docs/keys.md` has the policy for each
    type.
3.  A reference to an enclosing value is encoded as the number of steps up to it, so encoding
    terminates.
4.  A value without a sound encoding is `Unkeyable`, with the path to it.  There is no fallback to
    `repr`, addresses, or `hash`.

Types outside the builtins are looked up once and remembered: `register_key` and `__memo_key__`
first, then `lookup` finds the encoder of a library (arrays, tables) or of `python_types` (Python's
own types and user classes).
"""

from __future__ import annotations

import json
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, TypeVar

from memo.errors import OptionError, public, shown
from memo.keys.encoding.atoms import (
    BACK_REFERENCE,
    ENCODED_IN_C_FROM_ITEMS,
    FALSE,
    ITEMS_PER_STEP,
    NONE,
    SIMPLE,
    TRUE,
    binary,
    floating,
    hashed,
    integer,
    plain_sequence,
    text,
    with_length,
)

MAX_IN_CYCLES: Final = 1_000_000
"""Maximum number of encodings inside of cycles in one value; beyond it the value is refused."""
DEEP_RECURSION_LIMIT: Final = 10_000
"""The recursion limit, in frames, for a value that is nested deeper than the current one allows."""
VALUES_PER_SORT: Final = 1 << 15
"""Maximum number of values sorted in one step: it takes 20 ms, in which no other thread runs."""
_SAMPLE_STRIDE: Final = 4093
"""Distance between sampled values: a prime, so that no period in the values matches it."""
_NEVER: Final = 1 << 62
NO_REPLACEMENTS: Final[Mapping[int, Mapping[str, Any]]] = {}

T = TypeVar("T")

Encoder = Callable[[Any, "Walk"], bytes]
CodeOf = Callable[[Any, type | None], str]
"""Returns the text for the code of a function or class; for a method, of the class that it is bound
to."""


class Unkeyable(Exception):  # noqa: N818 - a fact about a value; `KeyingError` is the error
    """A value has no sound key.

    Attributes:
        path: from the given value to the one without a key, as `["clients"][2]`.
        kind: the type of the latter.
        fix: what to do about it, in one line.
    """

    def __init__(self, kind: str, fix: str, path: str = "") -> None:
        super().__init__(kind, fix, path)
        self.kind = kind
        self.fix = fix
        self.path = path

    def prepend_step(self, step: str) -> None:
        """Prepend a step to the path."""
        self.path = step + self.path

    def __str__(self) -> str:
        return f"{self.path or 'the value'} is {self.kind}, which has no sound key: {self.fix}"


# --- containers ----------------------------------------------------------------------------------


def index_step(index: int) -> str:
    """Return the path step into a sequence."""
    return f"[{index}]"


def key_step(key: Any) -> str:
    """Return the path step into a mapping."""
    return f"[{json.dumps(key, ensure_ascii=False) if type(key) is str else shown(key, 40)}]"


def sequence(values: Sequence[Any], walk: Walk, step: Callable[[int], str] = index_step) -> bytes:
    """Encode the items of an ordered collection; `step` names an item in a path."""
    if len(values) >= ENCODED_IN_C_FROM_ITEMS:
        stream = plain_sequence(
            values[at : at + ITEMS_PER_STEP] for at in range(0, len(values), ITEMS_PER_STEP)
        )
        if stream is not None:
            return stream
    return b"".join(_each(values, walk, step))


def _each(values: Iterable[Any], walk: Walk, step: Callable[[int], str]) -> list[bytes]:
    encodings: list[bytes] = []
    known = _encoders.get
    try:
        for value in values:
            kind = type(value)
            encoder = known(kind) or _found.get(kind) or _find(kind)
            encodings.append(encoder(value, walk))
    except Unkeyable as error:
        error.prepend_step(step(len(encodings)))
        raise
    return encodings


def mapping(value: dict[Any, Any], walk: Walk, step: Callable[[Any], str] = key_step) -> bytes:
    """Encode the items of a mapping whose order does not count."""
    keys = list(value)
    if set(map(type, keys)) == {str}:
        keys = sorted_encodings(keys)
        values = [value[key] for key in keys]
        return (
            b"S"
            + with_length(sequence(keys, walk))
            + sequence(values, walk, lambda i: step(keys[i]))
        )
    codes = _each(keys, walk, lambda i: f".keys(){step(keys[i])}")
    contents = _each(value.values(), walk, lambda i: step(keys[i]))
    pairs = [(code, content) for code, content in zip(codes, contents, strict=True)]
    return b"".join([code + content for code, content in sorted_encodings(pairs)])


def sorted_encodings(values: list[T]) -> list[T]:
    """Sort values; if they are many, in parts, so that other threads can run in between."""
    if len(values) <= VALUES_PER_SORT:
        return sorted(values)  # type: ignore[type-var]
    from bisect import bisect

    marks: list[Any] = sorted(values[::_SAMPLE_STRIDE])[::8]  # type: ignore[type-var]
    parts: list[list[T]] = [[] for _ in range(len(marks) + 1)]
    for value in values:
        parts[bisect(marks, value)].append(value)
    return [value for part in parts for value in sorted(part)]  # type: ignore[type-var]


def ordered(value: dict[Any, Any], walk: Walk) -> bytes:
    """Encode the items of a mapping whose order counts."""
    keys = list(value)
    codes = sequence(keys, walk, lambda i: f".keys(){key_step(keys[i])}")
    return with_length(codes) + sequence(list(value.values()), walk, lambda i: key_step(keys[i]))


def unordered(values: Iterable[Any], walk: Walk) -> bytes:
    """Encode the items of an unordered collection."""
    codes = _each(values, walk, lambda _: "{…}")
    codes = sorted_encodings(codes)
    return b"".join(codes)


# --- the walk ------------------------------------------------------------------------------------


class Walk:
    """The state of one encoding: the objects around the current one, and those already encoded.

    Args:
        code_of: see `CodeOf`; called for the user's functions and classes in the value.
        given: address of an object -> attributes that replace its own.
    """

    __slots__ = ("_being_keyed", "_in_cycles", "_known", "_lowest", "_stack", "code_of", "given")

    def __init__(
        self, code_of: CodeOf, given: Mapping[int, Mapping[str, Any]] = NO_REPLACEMENTS
    ) -> None:
        self.code_of = code_of
        self.given = given
        self._stack: dict[int, int] = {}
        self._known: dict[int, tuple[Any, bytes]] = {}
        self._being_keyed: set[int] = set()
        self._lowest = _NEVER
        self._in_cycles = 0

    def encode(self, value: Any, step: str = "") -> bytes:
        """Encode a part of a value; `step` names it in a path."""
        try:
            return encode(value, self)
        except Unkeyable as error:
            error.prepend_step(step)
            raise

    def sequence(self, values: Sequence[Any], step: Callable[[int], str] = index_step) -> bytes:
        """Encode the items of an ordered collection."""
        return sequence(values, self, step)

    def refuse(self, value: Any, fix: str) -> Unkeyable:
        """Return the error for a value that has no sound key."""
        return Unkeyable(type_name(type(value)), fix)

    def encode_container(
        self, value: Any, content: Encoder, letter: bytes, kind: bytes = b""
    ) -> bytes:
        """Encode a value with parts: `letter`, `kind`, and `content(value, walk)`.

        An object that was encoded before is not encoded again, unless it is in a cycle: then its
        encoding depends on where the cycle is entered.
        """
        identity = id(value)
        if identity in self._known:
            return self._known[identity][1]
        depth = len(self._stack)
        if identity in self._stack:
            return self._encode_back_reference(value, identity, depth)
        self._stack[identity] = depth
        outer, self._lowest = self._lowest, _NEVER
        try:
            encoding = letter + with_length(kind + content(value, self))
        finally:
            del self._stack[identity]
            lowest, self._lowest = self._lowest, min(outer, self._lowest)
        if lowest >= depth:
            self._lowest = outer
            self._known[identity] = (value, encoding)
        else:
            self._count_in_cycles(value)
        return encoding

    def _encode_back_reference(self, value: Any, identity: int, depth: int) -> bytes:
        if identity in self._being_keyed:
            raise self.refuse(value, "its key contains the value itself; leave it out of the key.")
        at = self._stack[identity]
        self._lowest = min(self._lowest, at)
        return BACK_REFERENCE(b"^", depth - at)

    def _count_in_cycles(self, value: Any) -> None:
        self._in_cycles += 1
        if self._in_cycles > MAX_IN_CYCLES:
            raise self.refuse(
                value, "its parts refer to each other too densely; pass them one by one."
            )

    def encode_key(self, value: Any, function: Callable[[Any], Any], name: str) -> bytes:
        """Encode the result of a user's key function for a value."""
        try:
            key = function(value)
        except Unkeyable:
            raise
        except Exception as error:
            message = f"{name} raised {type(error).__name__}: {shown(str(error))}"
            raise self.refuse(value, f"{message}.") from error
        self._being_keyed.add(id(value))
        try:
            return self.encode(key, f".{name}()")
        finally:
            self._being_keyed.discard(id(value))


def _contained(letter: bytes, content: Encoder) -> Encoder:
    return lambda value, walk: walk.encode_container(value, content, letter)


_encoders: Final[dict[type, Encoder]] = {
    type(None): lambda value, walk: NONE,
    bool: lambda value, walk: TRUE if value else FALSE,
    int: lambda value, walk: integer(value),
    float: lambda value, walk: floating(value),
    str: lambda value, walk: text(value),
    bytes: lambda value, walk: binary(value),
    tuple: _contained(b"(", sequence),
    list: _contained(b"[", sequence),
    dict: _contained(b"{", ordered),
    set: _contained(b"<", unordered),
    frozenset: _contained(b"|", unordered),
}
BUILTIN: Final = frozenset(_encoders)
"""Types whose encoding cannot be replaced."""


def encode(value: Any, walk: Walk) -> bytes:
    """Encode a value as part of a walk."""
    kind = type(value)
    encoder = _encoders.get(kind) or _found.get(kind) or _find(kind)
    return encoder(value, walk)


def encoding(
    value: Any,
    code_of: CodeOf,
    path: str = "",
    given: Mapping[int, Mapping[str, Any]] = NO_REPLACEMENTS,
) -> bytes:
    """Return the canonical encoding of a value, which takes a few hundred bytes at most.

    `memo.keys.values.value_encoding` is this with the code versions of functions.

    Args:
        value: any value.
        path: the name of the value in an error.
        code_of, given: see `Walk`.

    Raises:
        Unkeyable: the value, or something in it, has no sound key.
    """
    encoder = SIMPLE.get(type(value))
    if encoder is not None:
        return encoder(value)
    try:
        try:
            return encode(value, Walk(code_of, given))
        except RecursionError:
            return _encode_deeply_nested(value, code_of, given)
    except Unkeyable as error:
        error.prepend_step(path)
        raise
    except Exception as error:  # the value's own methods may raise anything
        fix = f"reading it raised {type(error).__name__}: {shown(str(error))}."
        raise Unkeyable(type_name(type(value)), fix, path) from error


def _encode_deeply_nested(
    value: Any, code_of: CodeOf, given: Mapping[int, Mapping[str, Any]]
) -> bytes:
    """Encode a value that is nested deeper than the recursion limit allows.

    The limit stays raised.  It applies to all threads, and lowering it while another one is deep in
    recursion crashes the process.
    """
    sys.setrecursionlimit(max(sys.getrecursionlimit(), DEEP_RECURSION_LIMIT))
    try:
        return encode(value, Walk(code_of, given))
    except RecursionError:
        fix = "it is nested too deeply; flatten it."
        raise Unkeyable(type_name(type(value)), fix) from None


def digest(value: Any, code_of: CodeOf, path: str = "") -> bytes:
    """Return the digest of a value: that of its `encoding`."""
    return hashed(encoding(value, code_of, path))


# --- other types ---------------------------------------------------------------------------------

KEY_METHOD: Final = "__memo_key__"
_found: weakref.WeakKeyDictionary[type, Encoder] = weakref.WeakKeyDictionary()
_registered: weakref.WeakKeyDictionary[type, Callable[[Any], Any]] = weakref.WeakKeyDictionary()


@public
def register_key(type_: type, function: Callable[[Any], Any]) -> None:
    """Use `function(value)` as the key of the values of a type and of its subclasses.

    The type itself is part of the key.  A class of your own may instead define a method
    `__memo_key__(self)`.  The result of either must have a key itself.

    Args:
        type_: the class whose values get the key.
        function: takes a value, and returns what represents it in the key.

    Raises:
        OptionError: `type_` is not a class, or a builtin one whose keys are fixed.
    """
    if not isinstance(type_, type):
        raise OptionError("type_", type_, "must be a class.")
    if type_ in BUILTIN or type_ in (object, type):
        raise OptionError("type_", type_, "has a key already that cannot be replaced.")
    if not callable(function):
        raise OptionError("function", function, "must be a function of the value.")
    _registered[type_] = function
    _found.clear()


class RefusingEncoder:
    """An encoder that refuses: no value of its type has a key.

    Args:
        fix: what to do about it.
    """

    def __init__(self, fix: str) -> None:
        self._fix = fix

    def __call__(self, value: Any, walk: Walk) -> bytes:
        raise walk.refuse(value, self._fix)


def is_refused(kind: type) -> bool:
    """True if no value of a type has a key."""
    return isinstance(_encoders.get(kind) or _found.get(kind) or _find(kind), RefusingEncoder)


def _find(kind: type) -> Encoder:
    """Find the encoder of a type, and remember it as long as the type lives."""
    encoder = _user_encoder(kind)
    if encoder is None:
        from memo.keys.encoding import lookup  # most keys do not need it

        encoder = lookup.find(kind)
    _found[kind] = encoder
    return encoder


def _user_encoder(kind: type) -> Encoder | None:
    """Return the encoder of the nearest `register_key` or `__memo_key__`; None: neither."""
    for base in kind.__mro__:
        if base in _registered:
            return _key_encoder(_registered[base], "register_key")
        if KEY_METHOD in vars(base):
            method = vars(base)[KEY_METHOD]
            if method is None:
                return RefusingEncoder(f"its class says so by {KEY_METHOD} = None.")
            return _key_encoder(lambda value: getattr(value, KEY_METHOD)(), KEY_METHOD)
    return None


def _key_encoder(function: Callable[[Any], Any], name: str) -> Encoder:
    def content(value: Any, walk: Walk) -> bytes:
        return encode_class(value, walk) + walk.encode_key(value, function, name)

    return lambda value, walk: walk.encode_container(value, content, b"K")


# --- classes -------------------------------------------------------------------------------------


def type_name(kind: type) -> str:
    """Return `module.qualname` for an error, without the module for builtins."""
    name = f"{module_of(kind)}.{kind.__qualname__}"
    return name.removeprefix("builtins.")


def module_of(kind: type) -> str:
    """Return the name of the module of a class; some C classes have none that can be read."""
    module = kind.__module__
    return module if isinstance(module, str) else ""


def encode_class(value: Any, walk: Walk) -> bytes:
    """Encode a value's class."""
    return walk.encode(type(value))
