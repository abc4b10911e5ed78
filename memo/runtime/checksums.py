"""BLAKE2b and comparison in constant time, without `hashlib` and `hmac`.

Those two import OpenSSL, which is not needed here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hashlib import blake2b
    from hmac import compare_digest
else:
    try:
        from _blake2 import blake2b
        from _operator import _compare_digest as compare_digest
    except ImportError:  # another Python than CPython, or a later one
        from hashlib import blake2b
        from hmac import compare_digest

__all__ = ["blake2b", "compare_digest", "digest_of_file"]
_READ_BYTES = 1 << 20


def digest_of_file(file: Any) -> str:
    """Return the BLAKE2b digest, in hexadecimal, of what is left to read of a binary file."""
    digest = blake2b(digest_size=20)
    while piece := file.read(_READ_BYTES):
        digest.update(piece)
    return digest.hexdigest()
