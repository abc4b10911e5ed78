"""The code version: one digest of the code of a function and of everything that it reaches.

A digest is kept with everything that it depends on (`unchanged.KnownVersion`), and stays valid as
long as that is unchanged.  `reachable` finds what a function reaches.
"""

from __future__ import annotations

import os
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from memo.errors import KeyingError, OptionError, encodable, public, shown
from memo.keys.encoding.atoms import short_digest
from memo.keys.fingerprint import own_changes
from memo.keys.fingerprint.held_values import (
    DESCRIPTORS,
    STABLE,
    SelfState,
    fingerprint_of,
    innermost,
    layers,
    qualified_name,
)
from memo.keys.fingerprint.own_changes import BeforeComputation, may_change
from memo.runtime.checksums import blake2b
from memo.runtime.memory_budget import remember

if TYPE_CHECKING:
    from memo.keys.fingerprint.unchanged import KnownVersion

F = TypeVar("F", bound=Callable[..., Any])

_SLOW_CHECKS_BEFORE_WARNING = 8
"""Slow checks of the globals that a function reads before a warning names the slowest one.  A first
computation makes fewer; after it, the state that the function changes itself is known."""
_CHANGES_BEFORE_WARNING = 3
"""Changes of the same state, not by the function's own code, before a warning is given."""
_MAX_OWNERS = 64
"""Classes of `self` for which one method's digest is kept."""


class Identity:
    """The identity of one function, and its current code version.

    Args:
        function: any callable.
        version: used as the digest; the code is not tracked then.
        name: the function's id instead of `"module:qualname"`; with a version the id stays the same
            wherever the function is defined.
        digest: the digest that the process computed which sent this very function here.
        shipped: use the bytecode for the digest; it is the same if cloudpickle has shipped the
            function without its source.
        ignored: labels of state that does not count, such as `global:api`.
        find_originals: returns the state that the function changes itself, as other processes of
            this host have found: label and path -> original text.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        version: str | None = None,
        digest: str | None = None,
        name: str | None = None,
        shipped: bool = False,
        ignored: Iterable[str] = (),
        find_originals: Callable[[], Mapping[str, str]] = dict,
    ) -> None:
        self.function = function
        self._shipped = shipped
        self._ignored = frozenset(ignored)
        self._find_originals = find_originals
        self._pinned = digest if version is None else _pinned(function, version, name)
        self.versions: dict[type | None, KnownVersion] = {}
        self._pinned_versions: dict[type, KnownVersion] = {}
        self._own_changes: dict[str, None] = {}
        self._others: dict[tuple[str, ...], int] = {}
        self._adopted: Mapping[str, str] = {}
        self._named_variables: frozenset[str] = frozenset()
        self._bytecode_text = False
        self._home: weakref.ref[type] | None = None

    def digest(self, owner: type | None = None) -> str:
        """Return the current code version: 32 hex digits.

        If nothing has changed this only compares identities, and checks the values that may change
        in place.

        Args:
            owner: for a method the class of `self`, so that what `self.other()` reaches is followed
                in it. By default the class that the method was defined in.
        """
        return self._current(owner).digest if self._pinned is None else self._pinned

    def digest_for_call(self, owner: type | None = None) -> str:
        """Like `digest`; warn once if such a check takes long, since each call waits for it."""
        if self._pinned is not None:
            return self._pinned
        seen = self.versions.get(owner)
        if seen is None or not seen.is_unchanged():
            return self._survey_again(owner).digest
        if seen.slow >= _SLOW_CHECKS_BEFORE_WARNING and not self._bytecode_text:
            self._warn_of_slow_check(seen)
        return seen.digest

    def _warn_of_slow_check(self, seen: KnownVersion) -> None:
        """Warn once about the global whose check takes the most time at every call."""
        seen.slow = 0  # a busy machine makes a check slow now and then
        label, cost = seen.slowest_global(self._own_changes)
        if not cost:
            return
        self._bytecode_text = True
        inner = innermost(self.function)
        kind, _, name = label.partition(":")
        fix = f'pass ignore=["{label}"] to leave it out of the key'
        if kind == "attribute":
            kind, fix = "class", f"mark the class with memo.stable({name.rpartition(':')[2]})"
        digits = 1 if cost >= 0.001 else 2
        message = (
            f"{qualified_name(inner)} reads the {kind} {name.rpartition(':')[2]}, and each call "
            f"takes {cost * 1000:.{digits}f} ms to see that it has not changed; if it never "
            f"affects the result, {fix}"
        )
        self._warn(message)

    def state(self, owner: type) -> SelfState:
        """Return the state of `self` that the method reads, as `digest` last found it."""
        if self._pinned is None:
            seen = self.versions.get(owner)
            return (seen if seen is not None else self._survey_again(owner)).state
        known = self._pinned_versions.get(owner)
        if known is None:
            known = self._pinned_versions[owner] = self._survey(owner)
        return known.state

    def begin(self, owner: type | None) -> tuple[str, list[BeforeComputation], frozenset[str]]:
        """Record the state and the names that the function may change, before a computation.

        Returns:
            The code version; the state and the names, for `own_changes.changes_since`.
        """
        if self._pinned is not None:
            return self._pinned, [], frozenset()
        seen = self._current(owner)
        names = seen.changed
        found = [
            (w.at, w.read, fingerprint_of) for w in seen.watched if may_change(w.fingerprint, names)
        ]
        return seen.digest, own_changes.record_before(found, names), names

    def note_own_changes(self, changed: Iterable[str]) -> list[str]:
        """Record the state that a computation has changed itself; return the names that are new."""
        new = [one for one in changed if one not in self._own_changes]
        self._own_changes.update(dict.fromkeys(new))
        return new

    def may_change_state(self, owner: type | None) -> bool:
        """True if the function may change state, so that other hosts may have found such state."""
        seen = (self.versions if self._pinned is None else self._pinned_versions).get(owner)  # type: ignore[arg-type]
        return seen is not None and seen.may_change()

    def adopt_own_changes(self, originals: Mapping[str, str]) -> bool:
        """Adopt the state that other hosts found the function to change; True if that is new.

        The originals that the first host has stored count, so that all hosts make the same keys.
        """
        if originals == self._adopted:
            return False
        self._adopted = dict(originals)
        self.versions.clear()
        self._pinned_versions.clear()
        return True

    def adopted_changes(self, owner: type | None) -> list[str]:
        """Return the adopted own changes that apply, as names such as `api.requests`."""
        seen = self._current(owner) if self._pinned is None else self._pinned_versions.get(owner)  # type: ignore[arg-type]
        return [] if seen is None else own_changes.display_names(seen.known_changes)

    def changes_often(self, others: tuple[str, ...]) -> bool:
        """Count a change of this state by other code; True at the one that calls for a warning."""
        times = self._others[others] = self._others.get(others, 0) + 1
        return times == _CHANGES_BEFORE_WARNING

    def parts(self, owner: type | None = None) -> dict[str, str]:
        """Return the parts of the digest: name -> normalized source, number or digest.

        Parts are `"module:function"`, `"module:Class"`, `"global:NAME"`, `"closure:…"`,
        `"default:…"`, `"attribute:…"`, `"package:name"` and `"python"`.
        """
        if self._pinned is not None:
            return {"version": self._pinned}
        return dict(self._current(owner).parts)

    def untracked(self, owner: type | None = None) -> list[str]:
        """List the state that the digest leaves out: `"global:c: app.Client has no sound key"`."""
        name = getattr(innermost(self.function), "__name__", "the function")
        changed = sorted({*self._own_changes, *self.adopted_changes(owner)})
        left_out = [f"{name}() changes `{one}`: left out of its key" for one in changed]
        return (
            left_out
            if self._pinned is not None
            else left_out + sorted(self._current(owner).left_out)
        )

    def _current(self, owner: type | None) -> KnownVersion:
        seen = self.versions.get(owner)
        return seen if seen is not None and seen.is_unchanged() else self._survey_again(owner)

    def _survey_again(self, owner: type | None) -> KnownVersion:
        try:
            seen = self._survey(owner or self._owner())
        except Exception as error:  # such as a class with hooks that raise
            fault = f"its code cannot be read: {type(error).__name__}: {shown(str(error))}"
            fix = 'pin it with version="1", or mark what raises with memo.stable'
            raise KeyingError(
                f"{qualified_name(innermost(self.function))}: {fault}; {fix}."
            ) from error
        if len(self.versions) >= _MAX_OWNERS:
            self.versions.clear()
        self.versions[owner] = seen
        if seen.unmatched:
            self._warn_of_unmatched_names(seen)
        if seen.context_variables - self._named_variables:
            self._warn_of_context_variables(seen)
        return seen

    def _survey(self, owner: type | None) -> KnownVersion:
        from memo.keys.fingerprint.reachable import survey

        return survey(
            self.function,
            owner,
            shipped=self._shipped,
            ignored=self._ignored,
            find_originals=self._all_originals,
        )

    def _all_originals(self) -> Mapping[str, str]:
        return {**self._find_originals(), **self._adopted}

    def _warn_of_unmatched_names(self, seen: KnownVersion) -> None:
        """Warn once about names of `ignore` that the function does not read."""
        unmatched, self._ignored = seen.unmatched, self._ignored - seen.unmatched
        read = sorted({name for name in seen.parts if name.startswith("global:")})
        there = f"; it reads {', '.join(read)}" if read else ""
        warnings.warn(
            f"{qualified_name(innermost(self.function))}: ignore={sorted(unmatched)!r} names no "
            f"global that it reads{there}.",
            stacklevel=2,
        )

    def _warn_of_context_variables(self, seen: KnownVersion) -> None:
        """Warn once about context variables, since calls in two contexts share one entry."""
        new = sorted(seen.context_variables - self._named_variables)
        self._named_variables |= seen.context_variables
        names = ", ".join(label.rpartition(":")[2] for label in new)
        some = f"s {names}, whose values are" if len(new) > 1 else f" {names}, whose value is"
        ignorable = [label for label in new if label.startswith("global:")]
        fix = f" or, if it never affects the result, ignore={ignorable!r}" if ignorable else ""
        self._warn(
            f"{qualified_name(innermost(self.function))} reads the context variable{some} not part "
            "of the key, so that calls in all contexts share one result; pass what it needs as an "
            f"argument{fix}"
        )

    def _warn(self, message: str) -> None:
        """Give a warning that points to the function."""
        code = getattr(innermost(self.function), "__code__", None)
        if code is None:
            warnings.warn(message, stacklevel=3)
        else:
            warnings.warn_explicit(message, UserWarning, code.co_filename, code.co_firstlineno)

    def _owner(self) -> type | None:
        """Return the class of the function; remembered, since its name may be rebound."""
        known = None if self._home is None else self._home()
        if known is not None and _holds(known, self.function):
            return known
        found = _class_of(self.function)
        self._home = None if found is None else weakref.ref(found)
        return found


@public
def stable(function: F) -> F:
    """Mark a helper function or a class as not tracked: editing it changes no code version.

    Args:
        function: a Python function or a class.

    Returns:
        The same function or class.

    Raises:
        OptionError: it cannot be marked, such as a function written in C.
    """
    try:
        setattr(function, STABLE, True)
    except (AttributeError, TypeError):
        raise OptionError(
            "function", function, "cannot be marked as stable; mark a Python function or a class."
        ) from None
    return function


_known: dict[int, Identity] = {}
_MAX_KNOWN_DIGESTS = 256
"""Functions and classes in arguments whose digest is kept."""


def code_digest(function: Any, owner: type | None = None) -> str:
    """Return the digest of the code of a function or class and of everything that it reaches.

    Args:
        function: a function or a class.
        owner: for a method, the class that it is bound to.
    """
    return _identity_of(function).digest(owner)


def changed_names(function: Any) -> frozenset[str]:
    """Return the names that the code of a function or class assigns, sets or fills."""
    return _identity_of(function)._current(None).changed


def _identity_of(function: Any) -> Identity:
    found = _known.get(id(function))
    if found is None:  # known functions are kept alive, so an address is never reused
        found = Identity(function, shipped=True)
        remember(_known, id(function), found, _MAX_KNOWN_DIGESTS)
    return found


def function_id(function: Callable[..., Any], name: str | None = None) -> str:
    """Return `"module:qualname"`, or `name` if one is given.

    For a function of a script or a notebook the file replaces `__main__`, with a digest of the
    directory (`etl.py~1f3a90bc:load`), so that two scripts share nothing.  A notebook whose front
    end does not tell its file stays `__main__`.
    """
    if name is not None:
        return encodable(name)
    inner = innermost(function)
    held = inner if type(function) in DESCRIPTORS else function
    module, _, qualname = qualified_name(held).partition(":")
    if module != "__main__":
        return encodable(f"{module}:{qualname}")
    namespace = getattr(inner, "__globals__", None) or vars(sys.modules["__main__"])
    return encodable(f"{_main(namespace)}:{qualname}")


def _main(namespace: Mapping[str, Any]) -> str:
    spec = namespace.get("__spec__")
    if spec is not None and getattr(spec, "name", None):
        return str(spec.name)
    file = (
        namespace.get("__file__")
        or namespace.get("__vsc_ipynb_file__")
        or os.environ.get("JPY_SESSION_NAME")
    )
    if not isinstance(file, str) or not file:
        return "__main__"
    folder, name = os.path.split(os.path.abspath(file))
    return f"{name}~{short_digest(os.fsencode(folder))[:8]}"


def _pinned(function: Callable[..., Any], version: str, name: str | None) -> str:
    text = f"version\0{function_id(function, name)}\0{version}"
    return blake2b(encodable(text).encode(), digest_size=16).hexdigest()


# --- methods --------------------------------------------------------------------------------------


def _holds(cls: type, function: Any) -> bool:
    inner = innermost(function)
    name = getattr(inner, "__name__", "")
    values = [vars(cls)[name]] if name in vars(cls) else []
    return any(
        layer is inner for value in [*values, *vars(cls).values()] for layer in layers(value)
    )


def _class_of(function: Any) -> type | None:
    """Return the class in whose body a function was defined, if its module still has that class."""
    inner = innermost(function)
    names = getattr(inner, "__qualname__", "").split(".")[:-1]
    namespace: Any = getattr(inner, "__globals__", None)
    found: Any = None
    for name in names:
        if namespace is None:
            return None
        found = namespace.get(name)
        namespace = vars(found) if isinstance(found, type) else None
    return found if isinstance(found, type) and _holds(found, function) else None
