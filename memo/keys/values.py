"""The encoding and the digest of a value, with the code versions of the functions in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from memo.keys.encoding import canonical
from memo.keys.encoding.canonical import NO_REPLACEMENTS
from memo.keys.fingerprint.function_version import code_digest


def value_encoding(
    value: Any, path: str = "", given: Mapping[int, Mapping[str, Any]] = NO_REPLACEMENTS
) -> bytes:
    """Return the canonical encoding of a value, which takes a few hundred bytes at most.

    Args:
        value: any value.
        path: the name of the value in an error.
        given: see `canonical.Walk`.

    Raises:
        Unkeyable: the value, or something in it, has no sound key.
    """
    return canonical.encoding(value, code_digest, path, given)


def value_digest(value: Any, path: str = "") -> bytes:
    """Return the digest of a value: 20 bytes, the same for equal values in any process.

    Args:
        value: any value.
        path: the name of the value in an error.

    Raises:
        Unkeyable: the value, or something in it, has no sound key.
    """
    return canonical.digest(value, code_digest, path)
