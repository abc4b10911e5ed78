"""The state of `self` that a method reads: its attributes, each with its encoding.

Rules of this module:

1.  `reachable` determines which attributes a method reads, directly or through what it calls on
    `self`; if `self` is passed elsewhere, all of them count.
2.  Attributes are read where Python stores them, in `__dict__` and slots.  No property is called;
    what properties read counts instead, and the stored value of a `cached_property` does not.
3.  Changes that a computation makes itself do not count: see `own_changes`.
4.  Values without a sound key are left out and listed.  An object of a user's class is traversed,
    so that its sound parts count.
"""

from __future__ import annotations

import re
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property, partial
from typing import Any, Final

from memo.keys.bindings import NOT_GIVEN
from memo.keys.encoding import atoms, canonical
from memo.keys.encoding.atoms import SIMPLE
from memo.keys.encoding.canonical import Unkeyable
from memo.keys.fingerprint import held_values, own_changes
from memo.keys.fingerprint.function_version import changed_names, code_digest
from memo.keys.fingerprint.held_values import NO_VALUE, SelfState
from memo.keys.fingerprint.own_changes import BeforeComputation, Changes, CurrentValue, ValuePlace
from memo.keys.offloading import refuse_heavy
from memo.keys.values import value_encoding
from memo.runtime import fork
from memo.runtime.named_tuple import NamedTuple, new_tuple

_PLAIN_ENCODERS: Final[dict[type, Callable[[Any], bytes]]] = {
    **SIMPLE,
    type(None): lambda _: atoms.NONE,
    bool: lambda value: atoms.TRUE if value else atoms.FALSE,
}
"""The encodings of plain types, as in `canonical`."""
_NO_ATTRIBUTE: Final = b"-"
"""The encoding of an attribute that the object does not have."""


class Attributes(NamedTuple):
    """The attributes of an object that count.

    Attributes:
        names: their names.
        values: their values, aligned with `names`; `NOT_GIVEN` if the object has no such attribute.
        encodings: the encodings of the values, aligned with `names`.
        left_out: path and description of each value without a sound key.
    """

    names: tuple[str, ...] = ()
    values: Sequence[Any] = ()
    encodings: Sequence[bytes] = ()
    left_out: tuple[tuple[str, str], ...] = ()


_DEFAULT_GETATTRIBUTE: Final[Any] = object.__getattribute__
NO_ATTRIBUTES: Final = Attributes()
NOTHING_CHANGED: Final = Changes()


def attributes_of(own: Any, state: SelfState, light: bool = False) -> Attributes:
    """Return the attributes of an object that count.

    Args:
        own: the object; a class has none, since its attributes are part of the code version.
        state: the attributes that the method reads.
        light: refuse values whose key would take long to make.

    Raises:
        HeavyError: with `light`: a value is too big.
    """
    if isinstance(own, type):
        return NO_ATTRIBUTES
    changing = bool(state.originals) or (bool(_CHANGING_CLASSES) and type(own) in _CHANGING_CLASSES)
    if state.whole:
        return _all_attributes(own, state, light, changing)
    if not state.names:
        return NO_ATTRIBUTES
    found: Attributes
    if changing:
        return _with_base_encodings(own, _look_up(own, state, light), state)
    try:
        held = object.__getattribute__(own, "__dict__")
        values = [held[name] for name in state.names]
        encodings = [_PLAIN_ENCODERS[type(value)](value) for value in values]
    except (AttributeError, KeyError, TypeError):  # checked last: the most frequent case is fast
        return _look_up(own, state, light)
    found = new_tuple(Attributes, (state.names, values, encodings, ()))
    return found


def is_plain(kind: type, state: SelfState) -> bool:
    """True if the attributes of such objects can be read directly from their `__dict__`."""
    if state.whole or state.originals or kind in _CHANGING_CLASSES:
        return False
    return not hasattr(kind, "__cache_key__") and not issubclass(kind, type)


def dict_of(own: Any, kind: type) -> dict[str, Any]:
    """Return the `__dict__` of an object; empty if it has none."""
    # with the default `__getattribute__`, `getattr` runs no user code, and is faster
    plainly = kind.__getattribute__ is _DEFAULT_GETATTRIBUTE
    found = getattr(own, "__dict__", None) if plainly else _dict_of(own)
    return found if type(found) is dict else {}


def _look_up(own: Any, state: SelfState, light: bool) -> Attributes:
    held = _dict_of(own)
    values = [held.get(name, NOT_GIVEN) for name in state.names]
    values = [_slot_value(own, state, n, v) for n, v in zip(state.names, values, strict=True)]
    return _encode_all(state.names, values, light)


class ObjectBefore(NamedTuple):
    """The state of an object when a computation began.

    Attributes:
        own: the object.
        state: the attributes that the method reads.
        unchanging: the attributes that the computation does not change, with their encodings.
        changing: the attributes that it may change.
        changed_names: the names that its code changes.
    """

    own: Any
    state: SelfState
    unchanging: Mapping[str, bytes]
    changing: Sequence[BeforeComputation]
    changed_names: frozenset[str]


def record_before(own: Any, state: SelfState) -> ObjectBefore:
    """Record the attributes of an object before a computation, for `changes_since` after it."""
    held = _stored_attributes(own, state)
    names = state.names if not state.whole else tuple(dict.fromkeys((*held, *state.changed)))
    objects = [name for name in names if type(held.get(name, NO_VALUE)) not in _PLAIN_ENCODERS]
    changed = state.changed.union(*(_names_changed_by(held[n]) for n in objects if n in held))
    found = [
        (
            ValuePlace(own, name, f"self.{name}"),
            partial(_current_value, own, state, name),
            partial(_encoding_of, name),
        )
        for name in names
        if name in changed or name in objects
    ]
    others = [n for n in names if n in held and n not in changed and n not in objects]
    plain = {name: _encoding_of(name, held[name]) for name in others}
    if found:
        _count_changing(type(own), 1)
    return ObjectBefore(own, state, plain, own_changes.record_before(found, changed), changed)


def _names_changed_by(value: Any) -> frozenset[str]:
    """Return the names that the methods of objects in an attribute change."""
    shot = held_values.fingerprint_of(value, quiet=True)
    refs = (*shot.refs, *(ref for _, ref in shot.noted))
    return frozenset().union(*map(changed_names, refs))


def changes_since(before: ObjectBefore) -> Changes:
    """Return the attributes of an object that have changed since a computation began."""
    own, changing = before.own, before.changing
    held = _stored_attributes(own, before.state) if before.unchanging else {}
    known = before.unchanging.items()
    others = [n for n, e in known if _encoding_of(n, held.get(n, NO_VALUE)) != e]
    ended = (
        own_changes.changes_since(changing, before.changed_names) if changing else NOTHING_CHANGED
    )
    if changing and not ended.own:  # otherwise the class stays in the table
        _count_changing(type(own), -1)
    return ended._replace(others=(*ended.others, *(f"self.{name}" for name in others)))


_CHANGING_CLASSES: weakref.WeakKeyDictionary[type, int] = weakref.WeakKeyDictionary()
"""Classes with attributes that computations change, or may be changing now; how many do."""
_counting = threading.Lock()
fork.in_child(_counting._at_fork_reinit)  # type: ignore[attr-defined]


def _count_changing(kind: type, step: int) -> None:
    with _counting:
        _CHANGING_CLASSES[kind] = _CHANGING_CLASSES.get(kind, 0) + step
        if not _CHANGING_CLASSES[kind]:
            del _CHANGING_CLASSES[kind]


def _stored_attributes(own: Any, state: SelfState) -> dict[str, Any]:
    """Return the attributes that are stored on an object, in its `__dict__` and its slots."""
    found = dict(_dict_of(own))
    slots = held_values.slots_of(type(own)) if state.whole else state.slots.values()
    for slot in slots:
        with suppress(AttributeError):  # the slot is empty
            found[slot.__name__] = slot.__get__(own)
    return found


def _current_value(own: Any, state: SelfState, name: str) -> Any:
    return _stored_attributes(own, state).get(name, NO_VALUE)


def _encoding_of(name: str, value: Any) -> bytes:
    return encode_attribute(name, NOT_GIVEN if value is NO_VALUE else value, [])


def _encoding_with_texts(name: str, value: Any, given: Mapping[str, str]) -> bytes:
    """Return an encoding with other texts at some paths in the value: `{".requests": "int 0"}`."""
    if "" in given:
        number = own_changes.number_in(given[""])
        return encode_attribute(name, value if number is None else number, [], given=given)
    instead: dict[int, dict[str, Any]] = {}
    for path, text in given.items():
        *steps, last = path.split(".")[1:]
        holder, number = value, own_changes.number_in(text)
        for step in steps:
            holder = dict_of(holder, type(holder)).get(step)
        if number is not None:
            instead.setdefault(id(holder), {})[last] = number
    return encode_attribute(name, value, [], instead, given)


def _with_base_encodings(own: Any, found: Attributes, state: SelfState) -> Attributes:
    """Return attributes as they count: as they were before computations changed them."""
    encodings: list[bytes] = []
    changed: list[str] = []
    for name, value, encoding in zip(*found[:3], strict=True):
        base = _base_encoding(own, state, name, NO_VALUE if value is NOT_GIVEN else value, encoding)
        encodings.append(base)
        if base != encoding:
            changed.append(name)
    lost = tuple(one for one in found.left_out if re.split(r"[.\[]", one[0])[0] not in changed)
    return found._replace(encodings=encodings, left_out=lost)


def _base_encoding(own: Any, state: SelfState, name: str, value: Any, encoding: bytes) -> bytes:
    current = CurrentValue(
        ValuePlace(own, name, f"self.{name}"), value, encoding, partial(_encoding_with_texts, name)
    )
    originals = partial(_originals_for, current, state) if state.originals else dict
    base = own_changes.REGISTRY.base(current, originals)
    assert isinstance(base, bytes)
    return base


def _originals_for(current: CurrentValue, state: SelfState) -> Mapping[str, str]:
    """Return the originals of an attribute, by path, as far as the code still changes them."""
    found = {
        k: t for k, t in state.originals.items() if own_changes.label_of(k) == current.at.label
    }
    if not found or current.value is NO_VALUE:
        return {}
    names = state.changed | _names_changed_by(current.value)
    return own_changes.originals_of(current.at, own_changes.applicable(found, names, strict=True))


def _dict_of(own: Any) -> dict[str, Any]:
    try:
        found = object.__getattribute__(own, "__dict__")
    except AttributeError:
        return {}
    return found if isinstance(found, dict) else {}


def _slot_value(own: Any, state: SelfState, name: str, value: Any) -> Any:
    if value is not NOT_GIVEN or name not in state.slots:
        return value
    try:
        return state.slots[name].__get__(own)
    except AttributeError:  # the slot is empty
        return NOT_GIVEN


def _all_attributes(own: Any, state: SelfState, light: bool, changing: bool) -> Attributes:
    """Return all attributes of an object and, if its class extends a container, its content."""
    kind = type(own)
    derived = {
        name
        for base in kind.__mro__
        for name, value in vars(base).items()
        if isinstance(value, cached_property)
    }
    held = {
        str(name): value
        for name, value in _stored_attributes(own, state).items()
        if name not in derived
    }
    names = sorted(held)
    result = _encode_all(tuple(names), [held[name] for name in names], light)
    if changing:  # an attribute that a computation has added did not exist before
        result = _with_base_encodings(own, result, state)
        there = [at for at, one in enumerate(result.encodings) if one != _NO_ATTRIBUTE]
        names = [names[at] for at in there]
        result = result._replace(
            names=tuple(names),
            values=[result.values[at] for at in there],
            encodings=[result.encodings[at] for at in there],
        )
    content = _content_encoding(own, kind)
    return Attributes(
        (*result.names, ""),
        (*result.values, None),
        (*result.encodings, value_encoding(names) + content),
        result.left_out,
    )


def _content_encoding(own: Any, kind: type) -> bytes:
    """Return the encoding of an object's content besides its attributes; empty if it has none."""
    of_python = not {"__dict__", "__slots__"}.isdisjoint(vars(kind))  # not an int, say
    if kind.__base__ is object and of_python and not hasattr(kind, canonical.KEY_METHOD):
        return b""
    try:
        return atoms.with_length(value_encoding(own))
    except Unkeyable:
        shot = held_values.fingerprint_of(own, quiet=True)
        return atoms.text(shot.text)


def _encode_all(names: tuple[str, ...], values: list[Any], light: bool) -> Attributes:
    if light:
        refuse_heavy([value for value in values if value is not NOT_GIVEN], {})
    try:
        simple = [_NO_ATTRIBUTE if v is NOT_GIVEN else _PLAIN_ENCODERS[type(v)](v) for v in values]
        return Attributes(names, tuple(values), tuple(simple))
    except KeyError:
        pass
    lost: list[tuple[str, str]] = []
    encodings = [encode_attribute(name, v, lost) for name, v in zip(names, values, strict=True)]
    return Attributes(names, tuple(values), tuple(encodings), tuple(lost))


def encode_attribute(
    name: str,
    value: Any,
    lost: list[tuple[str, str]],
    instead: Mapping[int, Mapping[str, Any]] = canonical.NO_REPLACEMENTS,
    given: Mapping[str, str] = held_values.NO_SUBSTITUTES,
) -> bytes:
    """Return the encoding of an attribute, or of the sound parts of its value.

    Args:
        lost: receives the values without a sound key.
        instead: values to use instead of attributes of objects in the value, by the objects' ids.
        given: the same as texts, by path.
    """
    if value is NOT_GIVEN:
        return _NO_ATTRIBUTE
    if own_changes.is_generator(type(value)):  # so that an original text gives the same encoding
        return b"%" + atoms.with_length(
            atoms.text(given.get("") or held_values.fingerprint_of(value).text)
        )
    try:
        return value_encoding(value, name, instead)
    except Unkeyable:
        pass
    shot = held_values.fingerprint_of(value, given=given)
    lost += [(f"{name}{path}", why) for path, why in shot.left_out]
    if not shot.left_out:
        lost.append((name, f"{canonical.type_name(type(value))} has no sound key"))
    refs = [code_digest(ref) for ref in (*shot.refs, *(ref for _, ref in shot.noted))]
    return b"%" + atoms.with_length(b"".join(map(atoms.text, (shot.text, *refs))))
