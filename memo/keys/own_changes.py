"""State that computations change themselves, and its value before they did.

Rules of this module:

1.  A key contains the *base* of a value: its state when something other than a computation set it.
    A request counter that is at 7 after six computations still counts as 1.
2.  A change during a computation is the computation's own if the code that it reaches assigns, sets
    or fills something of that name, or if the value is a random generator.  Any other change counts
    as an input.
3.  A change between computations is not their own: the changed value is the new base.
4.  What other processes and hosts have learned about a function applies to a value that this
    process sees for the first time, if the code here still changes something of that name: a
    counter, a clock or a generator counts as it did there.

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
from memo.runtime.named_tuple import NamedTuple

MOST: Final = 1024
"""Most values that are remembered; beyond it the least recently used one counts as it is."""
_SHARED: Final = ("int ", "float ")
_GENERATORS: Final = (
    "class random:Random",
    "class numpy.random._generator:Generator",
    "class numpy.random.mtrand:RandomState",
)
_SUBSCRIPT: Final = r"\[(?:'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|[^\]]*)\]"

Details = Mapping[str, str]
"""Path in a value -> its text."""
AnyFingerprint = ValueFingerprint | bytes


class At(NamedTuple):
    """The place of a value.

    Attributes:
        holder: the namespace, class, captured variable or object that has it.
        name: its name there.
        label: its readable name: `global:api`, `self.client`.
    """

    holder: Any
    name: str
    label: str

    @property
    def variable(self) -> str:
        """Last part of the label."""
        return re.split(r"[.:]", self.label)[-1]


class _Tracked:
    """A value that a computation may change: its base and its present state.

    Attributes:
        owner: returns the holder or the value, to detect another object at the same address.
        base: its fingerprint before computations changed it.
        at_base: details of that fingerprint; empty if they were not taken.
        after: its fingerprint after the last computation.
        details: details of that fingerprint.
        names: the names that the code of running computations changes.
        running: number of running computations that may change it.
    """

    __slots__ = ("after", "at_base", "base", "details", "names", "owner", "running")

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
        self.at_base = self.details = details
        self.names: frozenset[str] = frozenset()
        self.running = 0

    def set_by_others(self, fingerprint: AnyFingerprint, details: Details) -> None:
        self.base = self.after = fingerprint
        self.at_base = self.details = details


class CurrentValue(NamedTuple):
    """A value, and its present fingerprint.

    Attributes:
        at: its place.
        value: the value itself.
        fingerprint: its present fingerprint.
        fingerprint_with: returns the fingerprint of a value with other texts for some of its paths.
    """

    at: At
    value: Any
    fingerprint: AnyFingerprint
    fingerprint_with: Callable[[Any, Mapping[str, str]], AnyFingerprint]


class BeforeComputation(NamedTuple):
    """A value as it was when a computation began."""

    at: At
    read: Callable[[], Any]
    fingerprint_of: Callable[[Any], AnyFingerprint]
    value: Any
    held: _Tracked
    details: Details


class Changes(NamedTuple):
    """The changes that a computation has made.

    Attributes:
        own: names for display: `api.requests`.
        learned: label and path -> original text; for other processes.
        others: labels of values that something else changed meanwhile.
    """

    own: tuple[str, ...] = ()
    learned: Mapping[str, str] = {}
    others: tuple[str, ...] = ()


class Registry:
    """The values of this process that computations may change."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._held: OrderedDict[tuple[int, str], _Tracked] = OrderedDict()

    def base(
        self, current: CurrentValue, learned: Callable[[], Mapping[str, str]] = dict
    ) -> AnyFingerprint:
        """Return the fingerprint of a value that counts as an input.

        Args:
            learned: returns what other processes have learned about it, by path.
        """
        fingerprint = current.fingerprint
        if not self._held and learned is dict:
            return fingerprint
        with self._lock:
            held = self._find(current.at, current.value)
            if held is None:
                return self._first(current, learned())
            if same_fingerprint(held.after, fingerprint):
                return held.base
            details = held_values.details(current.value)
            if held.running and not _others(
                current.at, _changed(held.details, details), details, held.names
            ):
                return held.base
            if not held.running:
                held.set_by_others(fingerprint, details)
            return fingerprint

    def begin(
        self,
        at: At,
        read: Callable[[], Any],
        say: Callable[[Any], AnyFingerprint],
        names: frozenset[str],
    ) -> BeforeComputation:
        """Record a value before a computation that may change it."""
        value = read()
        fingerprint, details = say(value), held_values.details(value)
        with self._lock:
            held = self._find(at, value)
            if held is None:
                held = self._put(
                    at, value, _Tracked(_of(at, value), fingerprint, fingerprint, details)
                )
            elif not held.running and not same_fingerprint(held.after, fingerprint):
                held.set_by_others(fingerprint, details)
            held.running += 1
            held.names |= names
        return BeforeComputation(at, read, say, value, held, details)

    def end(self, begun: BeforeComputation, names: frozenset[str]) -> Changes:
        """Return the changes that a computation has made in one value."""
        at, held = begun.at, begun.held
        value = begun.read()
        details = held_values.details(value)
        changed = _changed(begun.details, details)
        fingerprint = begun.fingerprint_of(value) if changed else None
        with self._lock:
            held.running -= 1
            if fingerprint is None:
                return Changes()
            others = _others(at, changed, details, names)
            if others:
                held.set_by_others(fingerprint, details)
                return Changes(others=tuple(_shown(at, path) for path in others))
            if value is not begun.value and self._find(at, value) is not held:
                made = _Tracked(_of_holder(at), held.base, fingerprint, details)
                made.at_base = held.at_base
                self._held[_place(at)] = made
            held.after, held.details = fingerprint, details
        own = [_shown(at, path) for path in changed]
        learned = {f"{at.label}|{p}": held.at_base.get(p, "") for p in changed if "[" not in p}
        return Changes(tuple(own), {k: t for k, t in learned.items() if _is_shared(t)})

    def _find(self, at: At, value: Any) -> _Tracked | None:
        for key, owner in (((id(value), ""), value), (_place(at), at.holder)):
            held = self._held.get(key)
            if held is not None and held.owner() is owner:
                self._held.move_to_end(key)
                return held
        return None

    def _put(self, at: At, value: Any, held: _Tracked) -> _Tracked:
        by_object = held.owner() is value
        self._held[(id(value), "") if by_object else _place(at)] = held
        while len(self._held) > MOST:
            self._held.popitem(last=False)
        return held

    def _first(self, current: CurrentValue, learned: Mapping[str, str]) -> AnyFingerprint:
        """Return the base of a value that is seen for the first time, by what was learned."""
        at, value, fingerprint, say = current
        if not learned:
            return fingerprint
        details = held_values.details(value)
        known = {p: t for p, t in learned.items() if _kind(details.get(p, "")) == _kind(t)}
        base = say(value, known) if known else fingerprint
        self._put(at, value, _Tracked(_of(at, value), base, fingerprint, details))
        return base


REGISTRY: Final = Registry()


def _of(at: At, value: Any) -> Callable[[], Any]:
    """Return a weak reference to a value or, if that is impossible, to its holder."""
    if not held_values.is_immutable(type(value)) and not isinstance(value, type):
        try:
            return weakref.ref(value)
        except TypeError:
            pass
    return _of_holder(at)


def _of_holder(at: At) -> Callable[[], Any]:
    try:
        return weakref.ref(at.holder)
    except TypeError:
        return lambda: at.holder


def _place(at: At) -> tuple[int, str]:
    return id(at.holder), at.name or "cell"


def same_fingerprint(one: AnyFingerprint, other: AnyFingerprint) -> bool:
    """True if two values have the same fingerprint."""
    if isinstance(one, ValueFingerprint) and isinstance(other, ValueFingerprint):
        return one.same(other)
    return one == other


def _kind(text: str) -> str:
    return text.partition(" ")[0]


def number(text: str) -> int | float | None:
    """Return the number in a fingerprint, or None."""
    kind, _, number = text.partition(" ")
    return None if f"{kind} " not in _SHARED else int(number) if kind == "int" else float(number)


def is_generator(kind: type) -> bool:
    """True for the classes of random generators."""
    return f"class {kind.__module__}:{kind.__qualname__}" in _GENERATORS


def _is_shared(text: str) -> bool:
    return text.startswith((*_SHARED, *_GENERATORS))


def _changed(before: Details, now: Details) -> list[str]:
    """Return the innermost paths that differ; for added or removed items, their container."""
    found: set[str] = set()
    for path in before.keys() | now.keys():
        if before.get(path) != now.get(path):
            gone = path not in before or path not in now
            found.add(_container(path) if gone else path)
    return sorted(p for p in found if not any(_is_inside(q, p) for q in found))


def _container(path: str) -> str:
    while path.endswith("]"):
        last = [found.start() for found in re.finditer(_SUBSCRIPT, path)]
        if not last or not re.fullmatch(_SUBSCRIPT, path[last[-1] :]):
            break
        path = path[: last[-1]]
    return path


def _is_inside(path: str, outer: str) -> bool:
    return path != outer and path.startswith(outer) and path[len(outer)] in ".["


def _others(at: At, changed: Iterable[str], details: Details, names: frozenset[str]) -> list[str]:
    """Return the changed paths that the code of a computation does not change by name."""
    return [
        path
        for path in changed
        if _name(at, path) not in names and not details.get(path, "").startswith(_GENERATORS)
    ]


def _name(at: At, path: str) -> str:
    bare = re.sub(_SUBSCRIPT, "", path)
    return bare.rpartition(".")[2] or at.variable


def _shown(at: At, path: str) -> str:
    """Return a part of a value as the code writes it: `api.requests`, `C.calls`, `self.log`."""
    kind, colon, rest = at.label.partition(":")
    name, path = rest.rpartition(":")[2] if colon else kind, _container(path)
    return (at.variable if kind in ("closure", "default") else name) + path


def applying(
    learned: Mapping[str, str], names: frozenset[str], *, strict: bool = False
) -> dict[str, str]:
    """Return the learned facts that apply to code that changes some names.

    Args:
        strict: include objects in attributes of `self`, whose methods may be missing in the names.
    """
    return {
        key: text
        for key, text in learned.items()
        if text.startswith(_GENERATORS)
        or (_inside_self(key) and not strict)
        or _name(*_placed(key)) in names
    }


def learned_of(at: At, learned: Mapping[str, str]) -> dict[str, str]:
    """Return the learned facts of one value, by path."""
    start = f"{at.label}|"
    return {k.removeprefix(start): t for k, t in learned.items() if k.startswith(start)}


def shown(learned: Iterable[str]) -> list[str]:
    """Return what learned facts are about, as code writes it: `api.requests`."""
    return sorted({_shown(*_placed(key)) for key in learned})


def label_of(key: str) -> str:
    """Return the label of the value that a learned fact is about."""
    return key.partition("|")[0]


def _inside_self(key: str) -> bool:
    label, _, path = key.partition("|")
    return label.startswith("self.") and path != ""


def _placed(key: str) -> tuple[At, str]:
    label, _, path = key.partition("|")
    return At(None, "", label), path


Candidate = tuple[At, Callable[[], Any], Callable[[Any], AnyFingerprint]]
"""The place of a value that a computation may change, with its reader and its encoder."""


def may_change(fingerprint: ValueFingerprint, names: frozenset[str]) -> bool:
    """True if code that changes these names may change a value with this fingerprint."""
    return bool(names) or any(kind in fingerprint.text for kind in _GENERATORS)


def begin(found: Iterable[Candidate], names: frozenset[str]) -> list[BeforeComputation]:
    """Record values before a computation that may change them."""
    return [REGISTRY.begin(at, read, say, names) for at, read, say in found]


def end(begun: Iterable[BeforeComputation], names: frozenset[str]) -> Changes:
    """Return the changes that a computation has made in all of them."""
    every = [REGISTRY.end(one, names) for one in begun]
    learned = {key: text for one in every for key, text in one.learned.items()}
    return Changes(
        tuple(sorted({path for one in every for path in one.own})),
        learned,
        tuple(dict.fromkeys(path for one in every for path in one.others)),
    )
