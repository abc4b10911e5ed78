"""Keepers of generations: every store that has some, for the tests that all of them pass.

To add one, add a line to `KEEPERS`: a context manager that gives a fresh one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from redis_server import RedisServer

from memo.stores.custom import CustomTier
from memo.stores.disk.host_state import Host
from memo.stores.memory import Memory
from memo.stores.redis.redis_tier import Redis


class Provider:
    """A user's store: a dictionary."""

    def __init__(self) -> None:
        self.data: dict[str, bytes] = {}

    async def get(self, key: str) -> bytes | None:
        return self.data.get(key)

    async def set(self, key: str, value: bytes, ttl: float | None) -> None:
        self.data[key] = value

    async def delete(self, key: str) -> None:
        self.data.pop(key, None)

    async def clear(self) -> None:
        self.data.clear()


@contextmanager
def _memory(directory: Path, server: RedisServer) -> Iterator[Any]:
    yield Memory(1 << 20).generations


@contextmanager
def _host(directory: Path, server: RedisServer) -> Iterator[Any]:
    host = Host(directory / "cache")
    yield host.generations
    host.close()


@contextmanager
def _redis(directory: Path, server: RedisServer) -> Iterator[Any]:
    tier = Redis(server.url, deadline=5.0)
    yield tier
    tier.close()


@contextmanager
def _redis_without_scripts(directory: Path, server: RedisServer) -> Iterator[Any]:
    admin = server.client()
    rule = ("~*", "+@all", "-eval", "-evalsha")
    admin.execute_command("ACL", "SETUSER", "few", "on", ">p", *rule)
    tier = Redis(server.url.replace("//", "//few:p@"), deadline=5.0)
    try:
        yield tier
    finally:
        tier.close()
        admin.execute_command("ACL", "DELUSER", "few")


@contextmanager
def _custom(directory: Path, server: RedisServer) -> Iterator[Any]:
    yield CustomTier(Provider()).generations


NO_SCRIPTS = "redis without scripts"
"""It invalidates the whole group instead of some arguments."""
CUSTOM = "custom"
"""A store of get and set: it cannot list what a group has."""
KEEPERS = {
    "memory": _memory,
    "host": _host,
    "redis": _redis,
    NO_SCRIPTS: _redis_without_scripts,
    CUSTOM: _custom,
}
