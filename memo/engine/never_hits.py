"""One warning for a function that computes again and again for arguments that look the same.

Some objects have another key each time although nothing of them has changed for their user: they
keep a random number, an address or a time.  Such a function would never hit, without a word.
"""

from __future__ import annotations

import re
import warnings
from typing import Any, Final

from memo.engine.call import Function, Job
from memo.errors import label
from memo.keys.encoding import atoms, canonical

ENOUGH: Final = 5
"""Different keys of equal looks after which the warning comes."""
_KEPT: Final = 64
"""Looks of a function that are remembered."""
_ADDRESS: Final = re.compile(r" at 0x[0-9a-fA-F]+")


def notice(job: Job) -> None:
    """Take note of a call that is computed; warn at the fifth that looks the same."""
    function = job.function
    if function.looks is None:
        return
    try:
        look, names = _look(job)
    except Exception:  # whatever the `repr` of a value raises
        return
    if not names:
        return
    keys = function.looks.setdefault(look, set())
    keys.add(job.call.text)
    if len(keys) >= ENOUGH:
        function.looks = None
        _warn(function, names)
    elif len(function.looks) > _KEPT:
        function.looks.clear()


def _look(job: Job) -> tuple[str, list[str]]:
    """What a call looks like, and its arguments whose keys may differ though they look the same."""
    from memo.keys.encoding import python_types  # types of calls that were computed need it

    parts: list[str] = [job.function.code(job.args)]
    names: list[str] = []
    for name, value, encoding in job.call.encoded():
        kind = type(value)
        if kind in atoms.PLAIN or kind in canonical.BUILTIN or not python_types.is_object(kind):
            parts.append(f"{name} {encoding.hex()}")
        else:
            parts.append(f"{name} {canonical.type_name(kind)} {_ADDRESS.sub('', repr(value))}")
            names.append(f"`{name}` ({canonical.type_name(kind)})")
    return "\n".join(parts), names


def _warn(function: Function, names: list[Any]) -> None:
    warnings.warn(
        f"{label(function.id)} was computed {ENOUGH} times for arguments that look the same and "
        f"have another key each time: {', '.join(names)}; if they are equal, say what counts: "
        "give the class a method __memo_key__, "
        "use memo.register_key, key_resolver, or ignore=[...]",
        stacklevel=2,
    )
