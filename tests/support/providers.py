"""Providers that tests hand to `@cache`: what a user would write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


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


class InADictAtOnce(InADict):
    """The same with the two optional methods; counts its calls.

    Attributes:
        calls: which methods were called.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    async def get(self, key: str) -> bytes | None:
        self.calls.append("get")
        return await super().get(key)

    async def set(self, key: str, value: bytes, ttl: float | None = None) -> None:
        self.calls.append("set")
        await super().set(key, value, ttl)

    async def get_many(self, keys: Sequence[str]) -> list[bytes | None]:
        self.calls.append("get_many")
        return [self.store.get(key) for key in keys]

    async def set_many(self, items: Mapping[str, bytes], ttl: float | None = None) -> None:
        self.calls.append("set_many")
        self.store.update(items)
