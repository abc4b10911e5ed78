"""Encode statements, expressions and tables of SQLAlchemy by the cache key of their compiled SQL.

Compiling or printing a statement changes it, and a `Table` is compared by identity; so a statement
is encoded by its cache key, with each table spelled out, and by its bound values.
"""

from __future__ import annotations

import enum
import types
from typing import Any, Final

from memo.keys.encoding import atoms
from memo.keys.encoding.canonical import Encoder, Walk
from memo.keys.encoding.libraries.for_arrays import node

_ENCODED_AS_VALUE: Final = (*atoms.PLAIN_TYPES, enum.Enum, type)
_BUILTIN_OR_PYTHON_FUNCTIONS: Final = (types.BuiltinFunctionType, types.FunctionType)


def _element(value: Any, walk: Walk) -> bytes:
    key = value._generate_cache_key()
    if key is None:
        raise walk.refuse(value, "it has a part that SQLAlchemy cannot cache; pass its text.")
    parameters = [(bound.type._static_cache_key, bound.effective_value) for bound in key.bindparams]
    options = dict(getattr(value, "_execution_options", None) or {})
    return b"".join(
        [
            _part(key.key, walk),
            *(_part(kind, walk) + walk.encode(bound) for kind, bound in parameters),
            walk.encode(options),
        ]
    )


def _part(part: Any, walk: Walk) -> bytes:
    """Encode a part of a cache key."""
    if isinstance(part, (tuple, list)):
        return b"(" + atoms.with_length(b"".join(_part(one, walk) for one in part))
    if isinstance(part, dict):
        return b"{" + _part(tuple(part.items()), walk)
    if isinstance(part, (*_ENCODED_AS_VALUE, *_BUILTIN_OR_PYTHON_FUNCTIONS)):
        return walk.encode(part)
    if hasattr(part, "columns") and hasattr(part, "metadata"):
        return _table(part, walk)
    mapped = getattr(part, "class_", None)  # a mapper of the ORM
    if isinstance(mapped, type):
        return b"M" + walk.encode(mapped)
    raise walk.refuse(part, "it is a part of a statement that has no sound key; pass its text.")


def _table(value: Any, walk: Walk) -> bytes:
    columns = [
        (
            column.name,
            column.key,
            repr(column.type),
            column.primary_key,
            column.nullable,
            sorted(key.target_fullname for key in column.foreign_keys),
        )
        for column in value.columns
    ]
    return walk.encode((value.name, value.schema, columns))


ADAPTERS: Final[dict[str, Encoder]] = {
    "sqlalchemy.Table": node("table", _table),
    "sqlalchemy.ClauseElement": node("statement", _element),
}
"""`package.class` -> encoder, for values of the class and its subclasses."""
