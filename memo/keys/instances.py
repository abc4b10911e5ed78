"""The state of `self` that a method reads: its attributes, each with its encoding.

Rules of this module:

1.  `reachable` says which attributes a method reads, directly or through what it calls on `self`;
    when `self` goes elsewhere, all of them count.
2.  Attributes are read where Python stores them, in `__dict__` and slots.  No property runs; what
    properties read counts instead, and the value that a `cached_property` keeps does not.
3.  What has no sound key is left out and listed.  An object of a user's class is looked into, so
    that its sound parts count.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Final, NamedTuple

from memo.keys.bindings import ABSENT
from memo.keys.encoding import atoms, canonical
from memo.keys.encoding.atoms import SIMPLE
from memo.keys.encoding.canonical import Unkeyable
from memo.keys.fingerprint import held_values
from memo.keys.fingerprint.function_version import code_digest
from memo.keys.fingerprint.held_values import State
from memo.keys.offloading import refuse_heavy

_PLAIN: Final[dict[type, Callable[[Any], bytes]]] = {
    **SIMPLE,
    type(None): lambda _: atoms.NONE,
    bool: lambda value: atoms.TRUE if value else atoms.FALSE,
}
"""The encodings of the plain types, as `canonical` has them."""
_CONTAINERS: Final = frozenset({list, dict, set, bytearray, deque, defaultdict, Counter})
_GENERATORS: Final = frozenset(
    {"random.Random", "numpy.random._generator.Generator", "numpy.random.mtrand.RandomState"}
)
_NOTHING: Final = b"-"
"""The encoding of an attribute that the object does not have."""


class Attributes(NamedTuple):
    """The attributes of one object that count.

    Attributes:
        names: of the attributes.
        values: aligned with `names`; `ABSENT`: the object has none of this name.
        encodings: aligned with `names`.
        lost: (path, type) of what has no sound key.
    """

    names: tuple[str, ...] = ()
    values: Sequence[Any] = ()
    encodings: Sequence[bytes] = ()
    lost: tuple[tuple[str, str], ...] = ()


_made: Any = tuple.__new__  # a named tuple in half the time
EMPTY: Final = Attributes()


def attributes(own: Any, state: State, light: bool = False) -> Attributes:
    """The attributes of an object that count.

    Args:
        own: the object; of a class nothing counts, since its attributes are in the code version.
        state: what is read.
        light: refuse values so big that their key takes long to make.

    Raises:
        HeavyError: with `light`: a value is big.
    """
    if isinstance(own, type):
        return EMPTY
    if state.whole:
        return _whole(own, state, light)
    if not state.names:
        return EMPTY
    try:
        held = object.__getattribute__(own, "__dict__")
        values = [held[name] for name in state.names]
        encodings = [_PLAIN[type(value)](value) for value in values]
    except (AttributeError, KeyError, TypeError):  # the commonest case costs the least
        held = _held(own)
        values = [held.get(name, ABSENT) for name in state.names]
        values = [_slot(own, state, n, v) for n, v in zip(state.names, values, strict=True)]
        return _encoded(state.names, values, light)
    found: Attributes = _made(Attributes, (state.names, values, encodings, ()))
    return found


def changes(before: Attributes, now: Attributes, state: State) -> tuple[list[str], list[str]]:
    """The attributes that changed while a method ran: by its own doing, and all others.

    Its own are those that code in its reach sets, and containers and generators that were changed
    in place.  For anything else another thread is as likely a cause, so it stays an input.
    """
    later = {n: (v, e) for n, v, e in zip(*now[:3], strict=True) if n}
    own: list[str] = []
    others: list[str] = []
    for name, value, encoding in zip(*before[:3], strict=True):
        if name not in later or later[name][1] == encoding:
            continue
        in_place = later[name][0] is value and _is_container(value)
        (own if in_place or name in state.stored else others).append(name)
    own += [name for name in later if name not in before.names and name in state.stored]
    return own, others


def _is_container(value: Any) -> bool:
    kind = type(value)
    whole = f"{kind.__module__}.{kind.__qualname__}"
    return kind in _CONTAINERS or whole in _GENERATORS


def _held(own: Any) -> dict[str, Any]:
    try:
        found = object.__getattribute__(own, "__dict__")
    except AttributeError:
        return {}
    return found if isinstance(found, dict) else {}


def _slot(own: Any, state: State, name: str, value: Any) -> Any:
    if value is not ABSENT or name not in state.slots:
        return value
    try:
        return state.slots[name].__get__(own)
    except AttributeError:  # nothing was put there
        return ABSENT


def _whole(own: Any, state: State, light: bool) -> Attributes:
    """Every attribute of an object, and what it contains where its class has other bases."""
    kind = type(own)
    derived = {
        name
        for base in kind.__mro__
        for name, value in vars(base).items()
        if isinstance(value, cached_property)
    }
    found = {name: value for name, value in _held(own).items() if name not in derived}
    for slot in held_values.slots_of(kind):
        try:
            found[slot.__name__] = slot.__get__(own)
        except AttributeError:
            continue
    names = sorted(name for name in map(str, found) if name not in state.changed)
    result = _encoded(tuple(names), [found[name] for name in names], light)
    content = _content(own, kind)
    return Attributes(
        (*result.names, ""),
        (*result.values, None),
        (*result.encodings, canonical.encoding(names) + content),
        result.lost,
    )


def _content(own: Any, kind: type) -> bytes:
    """What an object contains beside its attributes; nothing where its class is plain."""
    if kind.__base__ is object and not hasattr(kind, canonical.KEY_METHOD):
        return b""
    try:
        return atoms.sized(canonical.encoding(own))
    except Unkeyable:
        shot = held_values.image(own, quiet=True)
        return atoms.text(shot.text)


def _encoded(names: tuple[str, ...], values: list[Any], light: bool) -> Attributes:
    if light:
        refuse_heavy([value for value in values if value is not ABSENT], {})
    try:
        simple = [_NOTHING if v is ABSENT else _PLAIN[type(v)](v) for v in values]
        return Attributes(names, tuple(values), tuple(simple))
    except KeyError:
        pass
    lost: list[tuple[str, str]] = []
    encodings = [_one(name, v, lost) for name, v in zip(names, values, strict=True)]
    return Attributes(names, tuple(values), tuple(encodings), tuple(lost))


def _one(name: str, value: Any, lost: list[tuple[str, str]]) -> bytes:
    if value is ABSENT:
        return _NOTHING
    try:
        return canonical.encoding(value, name)
    except Unkeyable:
        pass
    shot = held_values.image(value)
    lost += [(f"{name}{path}", why) for path, why in shot.lost]
    if not shot.lost:
        lost.append((name, f"{canonical.type_name(type(value))} has no sound key"))
    refs = [code_digest(ref) for ref in (*shot.refs, *(ref for _, ref in shot.noted))]
    return b"%" + atoms.sized(b"".join(map(atoms.text, (shot.text, *refs))))
