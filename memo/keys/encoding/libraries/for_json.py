"""Encode what reads and checks JSON.

The coders of msgspec by their settings, pydantic's type adapters by their type, and the maps in the
validators of jsonschema.
"""

from __future__ import annotations

from typing import Any, Final

from memo.keys.encoding.canonical import Encoder, Walk, unordered
from memo.keys.encoding.libraries.for_arrays import node

_SETTINGS: Final = (
    *("type", "strict", "dec_hook", "ext_hook", "float_hook"),
    *("enc_hook", "decimal_format", "uuid_format", "order"),
)
_CONSTRAINTS: Final = (
    *("gt", "ge", "lt", "le", "multiple_of", "pattern", "min_length", "max_length", "tz"),
    *("title", "description", "examples", "extra_json_schema", "extra"),
)


def _coder(value: Any, walk: Walk) -> bytes:
    return walk.encode({name: getattr(value, name, None) for name in _SETTINGS})


def _constraint(value: Any, walk: Walk) -> bytes:
    return walk.encode([getattr(value, name, None) for name in _CONSTRAINTS])


def _adapter(value: Any, walk: Walk) -> bytes:
    """Encode a type adapter; its schema has addresses of classes."""
    return walk.encode((value._type, value._config))


def _map(value: Any, walk: Walk) -> bytes:
    """Encode a hash map of rpds, each of which has an order of its own."""
    return unordered(list(value.items()), walk)


ADAPTERS: Final[dict[str, Encoder]] = {
    "msgspec.Decoder": node("decoder", _coder),
    "msgspec.Encoder": node("encoder", _coder),
    "msgspec.Meta": node("constraint", _constraint),
    "pydantic.TypeAdapter": node("adapter", _adapter),
    "rpds.HashTrieMap": node("map", _map),
    "rpds.HashTrieSet": node("set", lambda value, walk: unordered(list(value), walk)),
}
"""`package.class` -> encoder, for values of the class and its subclasses."""
