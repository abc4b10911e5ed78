"""Encode the encoders and decoders of msgspec by their settings."""

from __future__ import annotations

from typing import Any, Final

from memo.keys.encoding.canonical import Encoder, Walk
from memo.keys.encoding.libraries.for_arrays import node

_SETTINGS: Final = (
    *("type", "strict", "dec_hook", "ext_hook", "float_hook"),
    *("enc_hook", "decimal_format", "uuid_format", "order"),
)


def _coder(value: Any, walk: Walk) -> bytes:
    return walk.encode({name: getattr(value, name, None) for name in _SETTINGS})


ADAPTERS: Final[dict[str, Encoder]] = {
    "msgspec.Decoder": node("decoder", _coder),
    "msgspec.Encoder": node("encoder", _coder),
}
"""`package.class` -> encoder, for values of the class and its subclasses."""
