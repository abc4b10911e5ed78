"""Summaries: short texts that describe arguments for display, without secrets."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable
from typing import Any, Final

from memo.errors import encodable, shown
from memo.keys import resolvers
from memo.keys.encoding import atoms

MAX_ARGUMENT_CHARACTERS: Final = 80
"""Maximum length of one argument in a summary, in characters."""
MAX_SUMMARY_BYTES: Final = 2000
"""Maximum size of a summary in bytes."""
MAX_SHOWN_ITEMS: Final = 16
"""Maximum number of values in a container that is written out."""
MAX_SHOWN_BITS: Final = 200
"""Maximum number of bits in a number that is written out."""
SPECIAL_PREFIX: Final = "@"
"""Prefix of names in a summary that are not arguments, such as `"@self"`."""
RESOLVED: Final = "@key"
"""Name in a summary for the value of a `key_resolver`."""
RESULT_SHAPE: Final = "@result"
"""Name in the summary of an entry for the type and shape of its value."""
BUILT_ON: Final = "@built"
"""Name in the summary of an entry for the result that limits its lifetime."""
MASK: Final = "***"
"""Shown in place of an argument whose name says that it is secret."""
MORE: Final = "more"
"""Shown in place of the arguments that do not fit into a summary."""

MAX_KNOWN_ARGUMENT_NAMES: Final = 1024
"""Most names of arguments that are remembered as secret or not."""

_json: Final = json.JSONEncoder(ensure_ascii=False).encode
_NAMES_TO_MASK: Final = r"(?i)pass(word|wd|phrase)?$|secret|token|api_?key|credential|auth"


def mask_address(address: str, prefix: str, summary: str, *, resolved: bool) -> str:
    """Return an address for display: mask the arguments that are masked in the summary.

    Args:
        prefix: the prefix of the address.
        summary: the summary of the arguments; if it cannot be read, all of them are masked.
        resolved: a `key_resolver` has made it, so the positions of arguments in it are unknown.
    """
    if f'"{MASK}"' not in summary and f'"{MORE}"' not in summary:
        return address
    try:
        texts = [
            parts[0]
            for name, parts in json.loads(summary).items()
            if not name.startswith(SPECIAL_PREFIX)
        ]
    except (ValueError, TypeError, AttributeError, LookupError):
        return f"{prefix}:{MASK}"
    if MASK not in texts and MORE not in texts:
        return address
    words = address.removeprefix(prefix).removeprefix(":").split(":")
    if resolved or MORE in texts or len(words) != len(texts):
        return f"{prefix}:{MASK}"
    shown = [MASK if text == MASK else word for text, word in zip(texts, words, strict=True)]
    return ":".join((prefix, *shown))


@functools.lru_cache(MAX_KNOWN_ARGUMENT_NAMES)
def is_secret(name: str) -> bool:
    """True if the name of an argument says that it is secret."""
    return re.search(_NAMES_TO_MASK, name) is not None


def describe_value(name: str, value: Any) -> str:
    """Describe an argument in a short text: big values by their shape, secrets masked."""
    if is_secret(name):
        return MASK
    try:
        return _describe(value)
    except Exception:  # the value's own methods may raise anything
        return type(value).__name__


def _describe(value: Any) -> str:
    kind = type(value).__name__
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple) and all(isinstance(size, int) for size in shape) and shape:
        return f"{kind} {'x'.join(map(str, shape))}"[:MAX_ARGUMENT_CHARACTERS]
    if isinstance(value, (str, bytes)):
        return shown(
            value if len(value) <= MAX_ARGUMENT_CHARACTERS else value[:MAX_ARGUMENT_CHARACTERS],
            MAX_ARGUMENT_CHARACTERS,
        )
    if value is None or isinstance(value, (bool, int, float)):
        long = isinstance(value, int) and value.bit_length() > MAX_SHOWN_BITS
        return kind if long else shown(value, MAX_ARGUMENT_CHARACTERS)
    if resolvers.has_readable_text(value):
        return (
            shown(format(value), MAX_ARGUMENT_CHARACTERS)
            if isinstance(value, str)
            else str(value)[:MAX_ARGUMENT_CHARACTERS]
        )
    if isinstance(value, (list, tuple, set, frozenset, dict)):
        return _describe_container(value)
    return kind


def _describe_container(value: Any) -> str:
    text = _short_repr(value, [MAX_SHOWN_ITEMS])
    return text if text is not None else f"{type(value).__name__} of {len(value)}"


def _short_repr(value: Any, left: list[int]) -> str | None:
    """Return the `repr` of a value that is short, plain and without secrets; else None."""
    left[0] -= 1
    kind = type(value)
    if left[0] < 0 or kind not in atoms.PLAIN_OR_CONTAINER_TYPES:
        return None
    if kind is int and value.bit_length() > MAX_SHOWN_BITS:
        return None
    if hasattr(value, "__len__") and len(value) > (
        MAX_ARGUMENT_CHARACTERS if kind in atoms.PLAIN_TYPES else left[0]
    ):
        return None
    if kind is dict:
        if any(is_secret(str(key)) for key in value):
            return None
        parts = [part for pair in value.items() for part in pair]
    else:
        parts = [] if kind in atoms.PLAIN_TYPES else list(value)
    if any(_short_repr(part, left) is None for part in parts):
        return None
    text = repr(value)
    return text if len(text) <= MAX_ARGUMENT_CHARACTERS else None


def make_summary(arguments: Iterable[tuple[str, str, str]]) -> str:
    """Return JSON of argument name -> [short text, digest], at most `MAX_SUMMARY_BYTES` long.

    Args:
        arguments: name, short text and digest of each.
    """
    described = [_entry(name, text, digest) for name, text, digest in arguments]
    text = _whole(described)
    while len(text.encode()) > MAX_SUMMARY_BYTES:
        described.pop()
        text = _whole([*described, _entry("…", MORE, "")])
    return text


def _whole(entries: list[str]) -> str:
    """Return the JSON of a summary with these entries."""
    return encodable(f"{{{', '.join(entries)}}}")  # JSON has the same escape for a lone surrogate


def _entry(name: str, text: str, digest: str) -> str:
    return f"{_json(name)}: [{_json(text)}, {_json(digest)}]"


def with_result(text: str, value: Any, *, raised: bool = False) -> str:
    """Add the type and shape of the result to a summary, if they fit.

    Args:
        raised: the value is an exception that was raised.
    """
    try:
        shape = describe_shape(value)
    except Exception:  # the value's own methods may raise anything
        shape = type(value).__name__
    shape = f"raised {shape}" if raised else shape
    whole = _with_entry(text, RESULT_SHAPE, shape)
    return whole if len(whole.encode()) <= MAX_SUMMARY_BYTES else text


def with_built_on(text: str, path: str, until: int) -> str:
    """Add to a summary the results that limit an entry's lifetime, if they fit.

    Args:
        path: the calls, each built on the next.
        until: when the last of them expires, in nanoseconds since the epoch.
    """
    whole = _with_entry(text, BUILT_ON, path, str(until))
    return whole if len(whole.encode("utf-8", "replace")) <= MAX_SUMMARY_BYTES else text


def _with_entry(summary: str, name: str, text: str, digest: str = "") -> str:
    """Return the JSON of a summary with one more entry, without parsing it."""
    separator = ", " if len(summary) > len("{}") else ""
    return f"{summary[:-1]}{separator}{encodable(_entry(name, text, digest))}}}"


def built_on(text: str) -> tuple[str, int] | None:
    """Return the results that `with_built_on` has added to a summary, and when they expire."""
    found = json.loads(text).get(BUILT_ON)
    return None if found is None else (str(found[0]), int(found[1]))


def describe_shape(value: Any) -> str:
    """Describe a value by its type and size, without its content: `DataFrame 1000x5`."""
    kind = type(value).__name__
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple) and all(isinstance(size, int) for size in shape):
        return f"{kind} {'x'.join(map(str, shape))}".rstrip()[:MAX_ARGUMENT_CHARACTERS]
    if isinstance(value, (str, bytes, list, tuple, set, frozenset, dict)):
        return f"{kind} of {len(value)}"[:MAX_ARGUMENT_CHARACTERS]
    return kind[:MAX_ARGUMENT_CHARACTERS]
