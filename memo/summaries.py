"""Summaries: short texts of arguments for people, without secrets."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any, Final

from memo import atoms, resolvers
from memo.errors import shown

TEXT: Final = 80
"""Most characters of one argument in a summary."""
SUMMARY: Final = 2000
"""Most bytes of a summary."""

_SECRET: Final = re.compile(
    r"pass(word|wd|phrase)?$|secret|token|api_?key|credential|auth", re.IGNORECASE
)


def described_value(name: str, value: Any) -> str:
    """A short text of an argument for people; big values by their shape, secrets not at all."""
    if _SECRET.search(name):
        return "***"
    try:
        return _described(value)
    except Exception:  # whatever the value's own methods raise
        return type(value).__name__


def _described(value: Any) -> str:
    kind = type(value).__name__
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple) and all(isinstance(size, int) for size in shape) and shape:
        return f"{kind} {'x'.join(map(str, shape))}"[:TEXT]
    if isinstance(value, (str, bytes)):
        return shown(value if len(value) <= TEXT else value[:TEXT], TEXT)
    if value is None or isinstance(value, (bool, int, float)):
        return shown(value, TEXT) if not isinstance(value, int) or abs(value) < 1 << 200 else kind
    if resolvers.speaks(value):
        return shown(format(value), TEXT) if isinstance(value, str) else str(value)[:TEXT]
    if isinstance(value, (list, tuple, set, frozenset, dict)):
        return _described_container(value)
    return kind


def _described_container(value: Any) -> str:
    told = f"{type(value).__name__} of {len(value)}"
    if len(value) > 8:
        return told
    parts = [*value, *value.values()] if isinstance(value, dict) else list(value)
    plain = all(type(p) in atoms.PLAIN for p in parts)
    secret = isinstance(value, dict) and any(_SECRET.search(str(key)) for key in value)
    if plain and not secret and all(len(str(p)) <= TEXT for p in parts):
        return shown(value, TEXT)
    return told


def summary(arguments: Iterable[tuple[str, Any, str]]) -> str:
    """JSON for people: argument name -> [short text, digest]; at most `SUMMARY` bytes.

    Args:
        arguments: name, value and digest of each.
    """
    described = {name: [described_value(name, value), digest] for name, value, digest in arguments}
    text = json.dumps(described, ensure_ascii=False)
    while len(text.encode("utf-8", "replace")) > SUMMARY:
        described.popitem()
        text = json.dumps({**described, "…": ["more", ""]}, ensure_ascii=False)
    return text
