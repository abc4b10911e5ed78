"""Records to store in Redis by hand, and a wait for what a server is about to do."""

from __future__ import annotations

from typing import Any

from memo.records import seal
from memo.records.stamp_types import Times
from memo.settings.secret_keys import Secret

SECRET = Secret(b"s" * 32)
A, B = "a" * 16, "b" * 16


def record(*marks: Any, stream: bytes = b"stream") -> bytes:
    times = Times(1, 2, bytes(16), 3, 4, 5, 6)
    header = seal.Header(
        "memo", "key", "m:f", "code", "p:1", "pickle5", "host/1", "{}", times, tuple(marks)
    )
    return seal.pack(header, stream, SECRET)
