"""The state of `self` that a method reads: its attributes, each with its encoding.

Rules of this module:

1.  `reachable` determines which attributes a method reads, directly or through what it calls on
    `self`; if `self` is passed elsewhere, all of them count.
2.  Attributes are read where Python stores them, in `__dict__` and slots.  No property is called;
    what properties read counts instead, and the stored value of a `cached_property` does not.
3.  Changes made by a computation itself do not count: see `own_changes`.
4.  Values without a sound key are left out and listed.  An object of a user's class is traversed,
    so that its sound parts count.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property, partial
from typing import Any, Final

from memo.keys import own_changes
from memo.keys.bindings import NOT_GIVEN
from memo.keys.encoding import atoms, canonical
from memo.keys.encoding.atoms import SIMPLE
from memo.keys.encoding.canonical import Unkeyable
from memo.keys.fingerprint import held_values
from memo.keys.fingerprint.function_version import changed_names, code_digest
from memo.keys.fingerprint.held_values import NO_VALUE, State
from memo.keys.offloading import refuse_heavy
from memo.keys.own_changes import At, BeforeComputation, Changes, CurrentValue
from memo.runtime.named_tuple import NamedTuple, new_tuple

_PLAIN: Final[dict[type, Callable[[Any], bytes]]] = {
    **SIMPLE,
    type(None): lambda _: atoms.NONE,
    bool: lambda value: atoms.TRUE if value else atoms.FALSE,
}
"""The encodings of plain types, as in `canonical`."""
_NOTHING: Final = b"-"
"""The encoding of an attribute that the object does not have."""


class Attributes(NamedTuple):
    """The attributes of one object that count.

    Attributes:
        names: the names of the attributes.
        values: aligned with `names`; `NOT_GIVEN` if the object has none of this name.
        encodings: aligned with `names`.
        lost: (path, type) of each value without a sound key.
    """

    names: tuple[str, ...] = ()
    values: Sequence[Any] = ()
    encodings: Sequence[bytes] = ()
    lost: tuple[tuple[str, str], ...] = ()


_PLAINLY: Final[Any] = object.__getattribute__
EMPTY: Final = Attributes()
NOTHING_CHANGED: Final = Changes()


def attributes(own: Any, state: State, light: bool = False) -> Attributes:
    """Return the attributes of an object that count.

    Args:
        own: the object; for a class none count, since they are part of the code version.
        state: the attributes that the method reads.
        light: refuse values so big that making their key takes long.

    Raises:
        HeavyError: with `light`: a value is big.
    """
    if isinstance(own, type):
        return EMPTY
    changing = bool(state.learned) or (bool(_CHANGING) and type(own) in _CHANGING)
    if state.whole:
        return _whole(own, state, light, changing)
    if not state.names:
        return EMPTY
    found: Attributes
    if changing:
        return _with_bases(own, _looked_up(own, state, light), state)
    try:
        held = object.__getattribute__(own, "__dict__")
        values = [held[name] for name in state.names]
        encodings = [_PLAIN[type(value)](value) for value in values]
    except (AttributeError, KeyError, TypeError):  # so the most frequent case costs least
        return _looked_up(own, state, light)
    found = new_tuple(Attributes, (state.names, values, encodings, ()))
    return found


def is_plain(kind: type, state: State) -> bool:
    """True if the attributes of an object can be read directly from its `__dict__`."""
    if state.whole or state.learned or kind in _CHANGING:
        return False
    return not hasattr(kind, "__cache_key__") and not issubclass(kind, type)


def held(own: Any, kind: type) -> dict[str, Any]:
    """Return the `__dict__` of an object; empty if it has none."""
    plainly = kind.__getattribute__ is _PLAINLY  # if so, the faster way below runs no user code
    found = getattr(own, "__dict__", None) if plainly else _held(own)
    return found if type(found) is dict else {}


def _looked_up(own: Any, state: State, light: bool) -> Attributes:
    held = _held(own)
    values = [held.get(name, NOT_GIVEN) for name in state.names]
    values = [_slot(own, state, n, v) for n, v in zip(state.names, values, strict=True)]
    return _all_encoded(state.names, values, light)


class OwnBefore(NamedTuple):
    """The state of an object when a computation began.

    Attributes:
        own: the object.
        state: the attributes that the computation reads.
        plain: attributes that the computation does not change, with their encodings.
        begun: attributes that it may change.
        changed: the names that it changes.
    """

    own: Any
    state: State
    plain: Mapping[str, bytes]
    begun: Sequence[BeforeComputation]
    changed: frozenset[str]


def begin(own: Any, state: State) -> OwnBefore:
    """Record the attributes of an object before a computation.

    Pass the result to `end` afterwards.
    """
    held = _read(own, state)
    names = state.names if not state.whole else tuple(dict.fromkeys((*held, *state.changed)))
    objects = [name for name in names if type(held.get(name, NO_VALUE)) not in _PLAIN]
    changed = state.changed.union(*(_changed_by(held[n]) for n in objects if n in held))
    found = [
        (
            At(own, name, f"self.{name}"),
            partial(_present_value, own, state, name),
            partial(_encoding_of, name),
        )
        for name in names
        if name in changed or name in objects
    ]
    others = [n for n in names if n in held and n not in changed and n not in objects]
    plain = {name: _encoding_of(name, held[name]) for name in others}
    if found:
        _CHANGING[type(own)] = _CHANGING.get(type(own), 0) + 1
    return OwnBefore(own, state, plain, own_changes.begin(found, changed), changed)


def _changed_by(value: Any) -> frozenset[str]:
    """Return the names that methods of the objects in an attribute change."""
    shot = held_values.fingerprint_of(value, quiet=True)
    refs = (*shot.refs, *(ref for _, ref in shot.noted))
    return frozenset().union(*map(changed_names, refs))


def end(mine: OwnBefore) -> Changes:
    """Return the attributes of an object that a computation has changed."""
    own, begun = mine.own, mine.begun
    held = _read(own, mine.state) if mine.plain else {}
    others = [n for n, e in mine.plain.items() if _encoding_of(n, held.get(n, NO_VALUE)) != e]
    ended = own_changes.end(begun, mine.changed) if begun else NOTHING_CHANGED
    if begun and not ended.own:  # otherwise attributes of this class are looked up from now on
        _CHANGING[type(own)] -= 1
        if not _CHANGING[type(own)]:
            del _CHANGING[type(own)]
    return ended._replace(others=(*ended.others, *(f"self.{name}" for name in others)))


_CHANGING: weakref.WeakKeyDictionary[type, int] = weakref.WeakKeyDictionary()
"""Classes with attributes that computations change or are perhaps changing."""


def _read(own: Any, state: State) -> dict[str, Any]:
    """Return every attribute that is stored on an object."""
    found = dict(_held(own))
    slots = held_values.slots_of(type(own)) if state.whole else state.slots.values()
    for slot in slots:
        with suppress(AttributeError):  # the slot is empty
            found[slot.__name__] = slot.__get__(own)
    return found


def _present_value(own: Any, state: State, name: str) -> Any:
    return _read(own, state).get(name, NO_VALUE)


def _encoding_of(name: str, value: Any) -> bytes:
    return encoded(name, NOT_GIVEN if value is NO_VALUE else value, [])


def _encoding_with(name: str, value: Any, given: Mapping[str, str]) -> bytes:
    """Return an encoding with other texts for some paths in the value: `{".requests": "int 0"}`."""
    if "" in given:
        number = own_changes.number(given[""])
        return encoded(name, value if number is None else number, [], given=given)
    instead: dict[int, dict[str, Any]] = {}
    for path, text in given.items():
        *steps, last = path.split(".")[1:]
        holder, number = value, own_changes.number(text)
        for step in steps:
            holder = held(holder, type(holder)).get(step)
        if number is not None:
            instead.setdefault(id(holder), {})[last] = number
    return encoded(name, value, [], instead, given)


def _with_bases(own: Any, found: Attributes, state: State) -> Attributes:
    """Return attributes as they count: those changed by computations with their earlier values."""
    encodings: list[bytes] = []
    changed: list[str] = []
    for name, value, encoding in zip(*found[:3], strict=True):
        base = _base(own, state, name, NO_VALUE if value is NOT_GIVEN else value, encoding)
        encodings.append(base)
        if base != encoding:
            changed.append(name)
    lost = tuple(one for one in found.lost if re.split(r"[.\[]", one[0])[0] not in changed)
    return found._replace(encodings=encodings, lost=lost)


def _base(own: Any, state: State, name: str, value: Any, encoding: bytes) -> bytes:
    current = CurrentValue(
        At(own, name, f"self.{name}"), value, encoding, partial(_encoding_with, name)
    )
    learned = partial(_learned, current, state) if state.learned else dict
    base = own_changes.REGISTRY.base(current, learned)
    assert isinstance(base, bytes)
    return base


def _learned(current: CurrentValue, state: State) -> Mapping[str, str]:
    """Return other processes' findings about an attribute, if the code still changes it."""
    found = {k: t for k, t in state.learned.items() if own_changes.label_of(k) == current.at.label}
    if not found or current.value is NO_VALUE:
        return {}
    names = state.changed | _changed_by(current.value)
    return own_changes.learned_of(current.at, own_changes.applying(found, names, strict=True))


def _held(own: Any) -> dict[str, Any]:
    try:
        found = object.__getattribute__(own, "__dict__")
    except AttributeError:
        return {}
    return found if isinstance(found, dict) else {}


def _slot(own: Any, state: State, name: str, value: Any) -> Any:
    if value is not NOT_GIVEN or name not in state.slots:
        return value
    try:
        return state.slots[name].__get__(own)
    except AttributeError:  # the slot is empty
        return NOT_GIVEN


def _whole(own: Any, state: State, light: bool, changing: bool) -> Attributes:
    """Return every attribute of an object, and its own content if its class extends a container."""
    kind = type(own)
    derived = {
        name
        for base in kind.__mro__
        for name, value in vars(base).items()
        if isinstance(value, cached_property)
    }
    held = {str(name): value for name, value in _read(own, state).items() if name not in derived}
    names = sorted(held)
    result = _all_encoded(tuple(names), [held[name] for name in names], light)
    if changing:  # an attribute that a computation has added did not exist before
        result = _with_bases(own, result, state)
        there = [at for at, one in enumerate(result.encodings) if one != _NOTHING]
        names = [names[at] for at in there]
        result = result._replace(
            names=tuple(names),
            values=[result.values[at] for at in there],
            encodings=[result.encodings[at] for at in there],
        )
    content = _content(own, kind)
    return Attributes(
        (*result.names, ""),
        (*result.values, None),
        (*result.encodings, canonical.encoding(names) + content),
        result.lost,
    )


def _content(own: Any, kind: type) -> bytes:
    """Return the content of an object besides its attributes; empty if its class is plain."""
    if kind.__base__ is object and not hasattr(kind, canonical.KEY_METHOD):
        return b""
    try:
        return atoms.with_length(canonical.encoding(own))
    except Unkeyable:
        shot = held_values.fingerprint_of(own, quiet=True)
        return atoms.text(shot.text)


def _all_encoded(names: tuple[str, ...], values: list[Any], light: bool) -> Attributes:
    if light:
        refuse_heavy([value for value in values if value is not NOT_GIVEN], {})
    try:
        simple = [_NOTHING if v is NOT_GIVEN else _PLAIN[type(v)](v) for v in values]
        return Attributes(names, tuple(values), tuple(simple))
    except KeyError:
        pass
    lost: list[tuple[str, str]] = []
    encodings = [encoded(name, v, lost) for name, v in zip(names, values, strict=True)]
    return Attributes(names, tuple(values), tuple(encodings), tuple(lost))


def encoded(
    name: str,
    value: Any,
    lost: list[tuple[str, str]],
    instead: Mapping[int, Mapping[str, Any]] = canonical.NO_REPLACEMENTS,
    given: Mapping[str, str] = held_values.NO_SUBSTITUTES,
) -> bytes:
    """Return the encoding of one attribute, or of the sound parts of its value.

    Args:
        lost: receives the values without a sound key.
        instead: attributes that replace those of objects in the value.
        given: the same, by path, as texts.
    """
    if value is NOT_GIVEN:
        return _NOTHING
    if own_changes.is_generator(type(value)):  # so that a learned state gives the same encoding
        return b"%" + atoms.with_length(
            atoms.text(given.get("") or held_values.fingerprint_of(value).text)
        )
    try:
        return canonical.encoding(value, name, instead)
    except Unkeyable:
        pass
    shot = held_values.fingerprint_of(value, given=given)
    lost += [(f"{name}{path}", why) for path, why in shot.left_out]
    if not shot.left_out:
        lost.append((name, f"{canonical.type_name(type(value))} has no sound key"))
    refs = [code_digest(ref) for ref in (*shot.refs, *(ref for _, ref in shot.noted))]
    return b"%" + atoms.with_length(b"".join(map(atoms.text, (shot.text, *refs))))
