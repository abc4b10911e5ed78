"""State that computations change themselves, and its value before they did.

Rules of this module:

1.  A key contains the *base* of a value: its state when something other than a computation set it.
    A request counter that is at 7 after six computations still counts as 1.
2.  A change during a computation is the computation's own if the code that it reaches assigns, sets
    or fills something of that name, or if the value is a random generator.  Any other change counts
    as an input.
3.  A change between computations is not their own: the changed value is the new base.
4.  Processes and hosts share the *originals* of what a function changes itself: the label and path
    of the changed part, and its text in the base.  They apply to a value that this process sees for
    the first time, if the code here still changes something of that name: a counter, a clock or a
    generator then counts as it does there.

Values are compared by their *fingerprint*: a `ValueFingerprint`, or the encoding of an attribute.
"""

from __future__ import annotations

import re
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from memo.keys.fingerprint import held_values
from memo.keys.fingerprint.held_values import ValueFingerprint
from memo.runtime import fork
from memo.runtime.named_tuple import NamedTuple

MAX_TRACKED_VALUES: Final = 1024
"""Maximum number of tracked values; beyond it the least recently used one counts as it is now."""
_NUMBERS: Final = ("int ", "float ")
_GENERATORS: Final = (
    "class random:Random",
    "class numpy.random._generator:Generator",
    "class numpy.random.mtrand:RandomState",
)
_SUBSCRIPT: Final = r"\[(?:'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|[^\]]*)\]"

Details = Mapping[str, str]
"""Path in a value -> the text of the part there."""
AnyFingerprint = ValueFingerprint | bytes


class ValuePlace(NamedTuple):
    """The place of a value.

    Attributes:
        holder: the namespace, class, captured variable or object that holds it.
        name: its name there.
        label: its name for display: `global:api`, `self.client`.
    """

    holder: Any
    name: str
    label: str

    @property
    def variable(self) -> str:
        """The last part of the label."""
        return re.split(r"[.:]", self.label)[-1]


class _Tracked:
    """A value that a computation may change: its base, and its latest known state.

    Attributes:
        owner: returns the holder or the value, to detect another object at the same address.
        base: its fingerprint before computations changed it.
        base_details: the details of that fingerprint; empty if they were not taken.
        after: its fingerprint after the last computation.
        details: the details of that fingerprint.
        names: the names that the code of running computations changes.
        running: number of running computations that may change it.
    """

    __slots__ = ("after", "base", "base_details", "details", "names", "owner", "running")

    def __init__(
        self,
        owner: Callable[[], Any],
        base: AnyFingerprint,
        after: AnyFingerprint,
        details: Details,
    ) -> None:
        self.owner = owner
        self.base = base
        self.after = after
        self.base_details = self.details = details
        self.names: frozenset[str] = frozenset()
        self.running = 0

    def set_by_others(self, fingerprint: AnyFingerprint, details: Details) -> None:
        """Take over a new base, since something other than a computation has set the value."""
        self.base = self.after = fingerprint
        self.base_details = self.details = details


class CurrentValue(NamedTuple):
    """A value and its current fingerprint.

    Attributes:
        at: its place.
        value: the value itself.
        fingerprint: its current fingerprint.
        fingerprint_with: returns the fingerprint of a value with other texts at some of its paths.
    """

    at: ValuePlace
    value: Any
    fingerprint: AnyFingerprint
    fingerprint_with: Callable[[Any, Mapping[str, str]], AnyFingerprint]


class BeforeComputation(NamedTuple):
    """A value as it was when a computation began."""

    at: ValuePlace
    read: Callable[[], Any]
    fingerprint_of: Callable[[Any], AnyFingerprint]
    value: Any
    tracked: _Tracked
    details: Details


class Changes(NamedTuple):
    """The changes that happened during a computation.

    Attributes:
        own: what the computation itself changed, for display: `api.requests`.
        originals: label and path of that -> original text, for other processes.
        others: what something else changed meanwhile, for display.
    """

    own: tuple[str, ...] = ()
    originals: Mapping[str, str] = {}
    others: tuple[str, ...] = ()


class Registry:
    """The values of this process that computations may change."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._held: OrderedDict[tuple[int, str], _Tracked] = OrderedDict()

    def base(
        self, current: CurrentValue, find_originals: Callable[[], Mapping[str, str]] = dict
    ) -> AnyFingerprint:
        """Return the fingerprint of a value that counts as an input.

        Args:
            find_originals: returns its originals that other processes have found, by path.
        """
        fingerprint = current.fingerprint
        if not self._held and find_originals is dict:
            return fingerprint
        with self.lock:
            tracked = self._find(current.at, current.value)
            if tracked is None:
                return self._first_base(current, find_originals())
            if same_fingerprint(tracked.after, fingerprint):
                return tracked.base
            details = held_values.details(current.value)
            if tracked.running and not _changed_by_others(
                current.at, _changed_paths(tracked.details, details), details, tracked.names
            ):
                return tracked.base
            if not tracked.running:
                tracked.set_by_others(fingerprint, details)
            return fingerprint

    def record(
        self,
        at: ValuePlace,
        read: Callable[[], Any],
        fingerprint_of: Callable[[Any], AnyFingerprint],
        names: frozenset[str],
    ) -> BeforeComputation:
        """Record a value before a computation that may change it."""
        value = read()
        fingerprint, details = fingerprint_of(value), held_values.details(value)
        with self.lock:
            tracked = self._find(at, value)
            if tracked is None:
                tracked = self._track(
                    at,
                    value,
                    _Tracked(_weak_reference(at, value), fingerprint, fingerprint, details),
                )
            elif not tracked.running and not same_fingerprint(tracked.after, fingerprint):
                tracked.set_by_others(fingerprint, details)
            tracked.running += 1
            tracked.names |= names
        return BeforeComputation(at, read, fingerprint_of, value, tracked, details)

    def changes_since(self, before: BeforeComputation, names: frozenset[str]) -> Changes:
        """Return the changes in a value since a computation began."""
        at, tracked = before.at, before.tracked
        value = before.read()
        details = held_values.details(value)
        changed = _changed_paths(before.details, details)
        fingerprint = before.fingerprint_of(value) if changed else None
        with self.lock:
            tracked.running -= 1
            if fingerprint is None:
                return Changes()
            others = _changed_by_others(at, changed, details, names)
            if others:
                tracked.set_by_others(fingerprint, details)
                return Changes(others=tuple(_display_name(at, path) for path in others))
            if value is not before.value and self._find(at, value) is not tracked:
                made = _Tracked(_reference_to_holder(at), tracked.base, fingerprint, details)
                made.base_details = tracked.base_details
                self._held[_registry_key(at)] = made
            tracked.after, tracked.details = fingerprint, details
        own = [_display_name(at, path) for path in changed]
        base = tracked.base_details
        originals = {f"{at.label}|{p}": base.get(p, "") for p in changed if "[" not in p}
        return Changes(tuple(own), {k: t for k, t in originals.items() if _can_be_shared(t)})

    def _find(self, at: ValuePlace, value: Any) -> _Tracked | None:
        for key, owner in (((id(value), ""), value), (_registry_key(at), at.holder)):
            tracked = self._held.get(key)
            if tracked is not None and tracked.owner() is owner:
                self._held.move_to_end(key)
                return tracked
        return None

    def _track(self, at: ValuePlace, value: Any, tracked: _Tracked) -> _Tracked:
        by_object = tracked.owner() is value
        self._held[(id(value), "") if by_object else _registry_key(at)] = tracked
        while len(self._held) > MAX_TRACKED_VALUES:
            self._held.popitem(last=False)
        return tracked

    def _first_base(self, current: CurrentValue, originals: Mapping[str, str]) -> AnyFingerprint:
        """Return the base of a value seen for the first time, from its originals by path."""
        at, value, fingerprint, fingerprint_with = current
        if not originals:
            return fingerprint
        details = held_values.details(value)
        known = {
            p: t for p, t in originals.items() if _type_name(details.get(p, "")) == _type_name(t)
        }
        base = fingerprint_with(value, known) if known else fingerprint
        self._track(at, value, _Tracked(_weak_reference(at, value), base, fingerprint, details))
        return base


REGISTRY: Final = Registry()
fork.in_child(REGISTRY.lock._at_fork_reinit)  # type: ignore[attr-defined]


def _weak_reference(at: ValuePlace, value: Any) -> Callable[[], Any]:
    """Return a weak reference to a value; if it takes none, to its holder."""
    if not held_values.is_immutable(type(value)) and not isinstance(value, type):
        try:
            return weakref.ref(value)
        except TypeError:
            pass
    return _reference_to_holder(at)


def _reference_to_holder(at: ValuePlace) -> Callable[[], Any]:
    try:
        return weakref.ref(at.holder)
    except TypeError:
        return lambda: at.holder


def _registry_key(at: ValuePlace) -> tuple[int, str]:
    return id(at.holder), at.name or "cell"


def same_fingerprint(one: AnyFingerprint, other: AnyFingerprint) -> bool:
    """True if two values have the same fingerprint."""
    if isinstance(one, ValueFingerprint) and isinstance(other, ValueFingerprint):
        return one.same(other)
    return one == other


def _type_name(text: str) -> str:
    return text.partition(" ")[0]


def number_in(text: str) -> int | float | None:
    """Return the number that a fingerprint's text stands for, or None."""
    kind, _, number = text.partition(" ")
    return None if f"{kind} " not in _NUMBERS else int(number) if kind == "int" else float(number)


def is_generator(kind: type) -> bool:
    """True for the classes of random generators."""
    return f"class {kind.__module__}:{kind.__qualname__}" in _GENERATORS


def _can_be_shared(text: str) -> bool:
    return text.startswith((*_NUMBERS, *_GENERATORS))


def _changed_paths(before: Details, now: Details) -> list[str]:
    """Return the innermost paths that differ; for added and removed items, their container."""
    found: set[str] = set()
    for path in before.keys() | now.keys():
        if before.get(path) != now.get(path):
            gone = path not in before or path not in now
            found.add(_container_path(path) if gone else path)
    return sorted(p for p in found if not any(_is_inside(q, p) for q in found))


def _container_path(path: str) -> str:
    while path.endswith("]"):
        last = [found.start() for found in re.finditer(_SUBSCRIPT, path)]
        if not last or not re.fullmatch(_SUBSCRIPT, path[last[-1] :]):
            break
        path = path[: last[-1]]
    return path


def _is_inside(path: str, outer: str) -> bool:
    return path != outer and path.startswith(outer) and path[len(outer)] in ".["


def _changed_by_others(
    at: ValuePlace, changed: Iterable[str], details: Details, names: frozenset[str]
) -> list[str]:
    """Return the changed paths that the code of a computation does not change itself, by name."""
    return [
        path
        for path in changed
        if _changed_name(at, path) not in names
        and not details.get(path, "").startswith(_GENERATORS)
    ]


def _changed_name(at: ValuePlace, path: str) -> str:
    bare = re.sub(_SUBSCRIPT, "", path)
    return bare.rpartition(".")[2] or at.variable


def _display_name(at: ValuePlace, path: str) -> str:
    """Name a part of a value as in the source: `api.requests`, `C.calls`, `self.log`."""
    kind, colon, rest = at.label.partition(":")
    name, path = rest.rpartition(":")[2] if colon else kind, _container_path(path)
    return (at.variable if kind in ("closure", "default") else name) + path


def applicable(
    originals: Mapping[str, str], names: frozenset[str], *, strict: bool = False
) -> dict[str, str]:
    """Return the originals that apply to code which changes some names.

    Args:
        strict: the names include those that methods of objects in attributes of `self` change.
    """
    return {
        key: text
        for key, text in originals.items()
        if text.startswith(_GENERATORS)
        or (_is_inside_attribute(key) and not strict)
        or _changed_name(*_split_key(key)) in names
    }


def originals_of(at: ValuePlace, originals: Mapping[str, str]) -> dict[str, str]:
    """Return the originals of one value, by path."""
    start = f"{at.label}|"
    return {k.removeprefix(start): t for k, t in originals.items() if k.startswith(start)}


def display_names(originals: Iterable[str]) -> list[str]:
    """Return the state that originals belong to, named as in the source: `api.requests`."""
    return sorted({_display_name(*_split_key(key)) for key in originals})


def label_of(key: str) -> str:
    """Return the label of the value in a key of originals."""
    return key.partition("|")[0]


def _is_inside_attribute(key: str) -> bool:
    label, _, path = key.partition("|")
    return label.startswith("self.") and path != ""


def _split_key(key: str) -> tuple[ValuePlace, str]:
    label, _, path = key.partition("|")
    return ValuePlace(None, "", label), path


Candidate = tuple[ValuePlace, Callable[[], Any], Callable[[Any], AnyFingerprint]]
"""The place of a value that a computation may change, with functions to read and fingerprint it."""


def may_change(fingerprint: ValueFingerprint, names: frozenset[str]) -> bool:
    """True if code that changes these names may change a value with this fingerprint."""
    return bool(names) or any(kind in fingerprint.text for kind in _GENERATORS)


def record_before(
    candidates: Iterable[Candidate], names: frozenset[str]
) -> list[BeforeComputation]:
    """Record values before a computation that may change them."""
    return [
        REGISTRY.record(at, read, fingerprint_of, names) for at, read, fingerprint_of in candidates
    ]


def changes_since(before: Iterable[BeforeComputation], names: frozenset[str]) -> Changes:
    """Return the changes in these values since the computation began."""
    every = [REGISTRY.changes_since(one, names) for one in before]
    originals = {key: text for one in every for key, text in one.originals.items()}
    return Changes(
        tuple(sorted({path for one in every for path in one.own})),
        originals,
        tuple(dict.fromkeys(path for one in every for path in one.others)),
    )
