"""Texts that every store can write."""

from __future__ import annotations


def encodable(text: str) -> str:
    r"""A text as it is, with lone surrogates, which have no encoding, as `\ud800`."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()
