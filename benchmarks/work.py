"""The cached functions of the rows, which return prepared values, and these values."""

from __future__ import annotations

from typing import Any

READY: dict[str, Any] = {}
"""Kind -> the value; a function below gives it, so that making it is not measured."""
BIG = 1_000_000
"""Bytes from which a file is a big value's."""
COMPUTED: list[int] = []
"""One number for each time that a function below ran: a hit adds none."""


def make(kind: str, size: int) -> Any:
    """Make a value of about `size` bytes.

    Args:
        kind: `"floats"` (a frame of ten columns), `"mixed"` (a frame of ints, floats, strings,
            dates and categories), or `"array"`.
        size: bytes.
    """
    import numpy as np
    import pandas as pd

    random = np.random.default_rng(0)
    if kind == "array":
        return random.random(size // 8)
    if kind == "floats":
        return pd.DataFrame(random.random((size // 80, 10)), columns=list("abcdefghij"))
    rows = size // 100
    columns: dict[str, Any] = {f"int{i}": random.integers(0, 1 << 40, rows) for i in range(4)}
    columns |= {f"float{i}": random.random(rows) for i in range(4)}
    columns["name"] = [f"customer-{i:07d}" for i in range(rows)]
    columns["date"] = pd.date_range("2020", periods=rows, freq="s")
    columns["kind"] = pd.Categorical.from_codes(np.arange(rows) % 5, list("abcde"))
    return pd.DataFrame(columns)


def record(number: int, text: str) -> dict[str, Any]:
    """Return a dict of five fields, made from an int and a str."""
    COMPUTED.append(number)
    return {
        "id": number,
        "name": text,
        "email": "ada@example.org",
        "score": 1.5,
        "tags": ["a", "b"],
    }


async def arecord(number: int, text: str) -> dict[str, Any]:
    """As `record`."""
    COMPUTED.append(number)
    return {
        "id": number,
        "name": text,
        "email": "ada@example.org",
        "score": 1.5,
        "tags": ["a", "b"],
    }


def frame(kind: str) -> Any:
    """Return the prepared value of a kind."""
    return READY[kind]


async def aframe(kind: str) -> Any:
    """As `frame`."""
    return READY[kind]
