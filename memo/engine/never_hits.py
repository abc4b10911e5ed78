"""Warn about a function that never hits although its arguments look the same each time.

Some objects get a new key each time although nothing visible about them has changed: they hold a
random number, an address or a time.  A function called with them would never hit, without a word.

Two arguments look the same if the visible parts of their keys are equal: public attributes or, for
an object without any, its `repr`.  Then they differ in something private.  For a function that is a
captured variable that it changes itself (`nonlocal n; n += 1`).

A result that is built on a function of another provider never hits either: its own provider has no
record of that function's invalidations.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from types import FunctionType
from typing import Any, Final

from memo.engine.call import Function, Job, warn_at_definition
from memo.errors import label
from memo.keys.encoding import atoms, canonical
from memo.keys.fingerprint.function_version import changed_names, code_digest
from memo.keys.fingerprint.held_values import qualified_name
from memo.keys.values import value_encoding
from memo.records.stamp_types import Stamp
from memo.runtime.port import Port
from memo.runtime.reasons import GENERATION_LOST

KEYS_BEFORE_WARNING: Final = 5
"""Number of different keys for arguments that look the same at which the warning is given."""
_MAX_APPEARANCES: Final = 64
"""Maximum number of different texts of visible arguments that are remembered for a function."""
MAX_DEPTH: Final = 3
"""Levels of nested objects that are compared."""
MAX_SHOWN_ATTRIBUTES: Final = 3
"""Maximum number of private attributes that the warning names."""
_SHORTENED: Final = r"\.\.\.|…| at 0x[0-9a-fA-F]+"
"""Signs that a `repr` leaves something out."""


def warn_if_keys_differ(job: Job) -> None:
    """Record a call that is computed; warn if calls that look equal have different keys.

    That is after `KEYS_BEFORE_WARNING` different keys.
    """
    function = job.function
    if function.history.keys_by_appearance is None:
        return
    try:
        appearance, names = _visible_call(job)
    except Exception:  # a value's `repr` may raise anything
        return
    if not names:
        return
    keys = function.history.keys_by_appearance.setdefault(appearance, set())
    keys.add(job.call.text)
    if len(keys) >= KEYS_BEFORE_WARNING:
        function.history.keys_by_appearance = None
        _warn(function, names)
    elif len(function.history.keys_by_appearance) > _MAX_APPEARANCES:
        function.history.keys_by_appearance.clear()


async def warn_if_never_valid(port: Port, job: Job, known: Sequence[Stamp], inner: str) -> None:
    """Warn if the tier that judges a result has no record of what the result is built on.

    Args:
        known: the stamps of the result.
        inner: a function that the result is built on and that another tier judges.
    """
    if await job.chain.authorities.why_invalid(port, known) != GENERATION_LOST:
        return
    job.function.history.warned = True
    warn_at_definition(
        job.function.run,
        f"{label(job.function.id)} never hits: it is built on {label(inner)}, whose entries "
        "another provider keeps; give both functions the same provider",
    )


def _visible_call(job: Job) -> tuple[str, list[str]]:
    """Return the visible parts of a call as text, and the arguments that have hidden parts too."""
    arguments = [(*one, _visible_parts(one[1], MAX_DEPTH)) for one in job.call.encoded_arguments()]
    names = [
        f"`{name}` ({canonical.type_name(type(value))}{_private_parts(value)})"
        for name, value, _, visible in arguments
        if visible is not None
    ]
    if not names:
        return "", []
    parts = [
        f"{name} {encoding.hex() if visible is None else visible}"
        for name, _, encoding, visible in arguments
    ]
    return "\n".join([job.call.code, *parts]), names


def _visible_parts(value: Any, depth: int) -> str | None:
    """Return the user-visible parts of a value's key; None if all of it is visible."""
    kind = type(value)
    if kind in atoms.PLAIN_TYPES or kind in canonical.BUILTIN:
        return None
    if own := _own_cells(value):
        return _visible_function(value, own)
    from memo.keys.encoding import python_types  # most calls do not need it

    if not python_types.is_object(kind):
        return None
    attributes = getattr(value, "__dict__", None)
    if not attributes or not depth:
        text = repr(value)
        return (
            f"{canonical.type_name(kind)} {text}"
            if text and not re.search(_SHORTENED, text)
            else None
        )
    shown = [canonical.type_name(kind)]
    for name in sorted(name for name in attributes if not name.startswith("_")):
        part = _visible_parts(attributes[name], depth - 1)
        if part is None:
            part = value_encoding(attributes[name], name).hex()
        shown.append(f"{name}={part}")
    return " ".join(shown)


def _own_cells(value: Any) -> frozenset[str]:
    """Return the captured variables that a function changes itself."""
    if type(value) is not FunctionType or value.__closure__ is None:
        return frozenset()
    return changed_names(value) & frozenset(value.__code__.co_freevars)


def _visible_function(value: Any, own: frozenset[str]) -> str:
    captured = zip(value.__code__.co_freevars, value.__closure__, strict=True)
    kept = {name: cell.cell_contents for name, cell in captured if name not in own}
    facts = value_encoding((kept, value.__defaults__, value.__kwdefaults__))
    return f"{qualified_name(value)} {code_digest(value)} {facts.hex()}"


def _private_parts(value: Any) -> str:
    """Describe an object's private attributes, or the variables that a function changes itself."""
    if own := _own_cells(value):
        return f" that changes its {', '.join(sorted(own)[:MAX_SHOWN_ATTRIBUTES])}"
    names = [name for name in getattr(value, "__dict__", ()) if name.startswith("_")]
    return f" with {', '.join(names[:MAX_SHOWN_ATTRIBUTES])}" if names else ""


def _warn(function: Function, names: list[Any]) -> None:
    warn_at_definition(
        function.run,
        f"{label(function.id)} was computed {KEYS_BEFORE_WARNING} times for arguments that look "
        f"the same and have a different key each time: {', '.join(names)}; if they are equal, "
        "define their key "
        "with a method __memo_key__ on the class, memo.register_key, key_resolver, or ignore=[...]",
    )
