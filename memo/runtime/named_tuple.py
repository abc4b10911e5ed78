"""`NamedTuple` as in `typing`, without checking the annotations.

Type checkers see the one of `typing`.  That one compiles each annotation, which is a string here,
and takes 320 µs for a class of five fields; this one takes 90 µs.  `import memo` creates 50 such
classes, and is a tenth faster with this one.
"""

from __future__ import annotations

from collections import namedtuple
from typing import TYPE_CHECKING, Any

__all__ = ["NamedTuple", "new_tuple"]

new_tuple = tuple.__new__
"""Makes a named tuple of a class from all its fields, in a third to half of its own time."""

if TYPE_CHECKING:
    from typing import NamedTuple
else:

    class _Maker(type):
        """Makes a named tuple from the body of a class."""

        def __new__(cls, name: str, _bases: tuple[type, ...], body: dict[str, Any]) -> type:
            fields = body["__annotations__"]
            defaults = [body[field] for field in fields if field in body]
            module = body["__module__"]
            made = namedtuple(name, fields, defaults=defaults, module=module)  # noqa: PYI024
            for attribute in body.keys() - {*fields, "__module__"}:
                setattr(made, attribute, body[attribute])
            return made

    NamedTuple = type.__new__(_Maker, "NamedTuple", (), {})
