"""Providers that tests hand to `@cache`: what a user would write."""

from __future__ import annotations


class InADict:
    """The ten lines of `memo.stores.protocols.CacheProtocol`."""

    def __init__(self) -> None:
        self.store: dict[str, bytes] = {}

    async def get(self, key: str) -> bytes | None:
        return self.store.get(key)

    async def set(self, key: str, value: bytes, ttl: float | None = None) -> None:
        self.store[key] = value

    async def delete(self, key: str) -> None:
        self.store.pop(key, None)

    async def clear(self) -> None:
        self.store.clear()
