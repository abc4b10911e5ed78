"""A user's own store as a tier: nothing but get, set and delete over bytes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Final

from memo.errors import OptionError, TierError
from memo.records.codec import Payload, aligned
from memo.records.stamp_types import Ref, State
from memo.runtime.port import Port
from memo.stores.protocols import Found, Generations, Source
from memo.validity import stamps
from memo.validity.stamps import Turn

_CALLS: Final[Mapping[str, tuple[Any, ...]]] = {
    "get": ("key",),
    "set": ("key", b"", None),
    "delete": ("key",),
    "clear": (),
    "get_many": (["key"],),
    "set_many": ({"key": b""}, None),
}
"""Method -> what it is called with."""
_SHOWN: Final = {
    "get": "get(key)",
    "set": "set(key, value, ttl=None)",
    "delete": "delete(key)",
    "clear": "clear()",
    "get_many": "get_many(keys)",
    "set_many": "set_many(items, ttl=None)",
}
_OPTIONAL: Final = ("get_many", "set_many")


def _check(provider: Any) -> None:
    """That a provider has the methods of a `CacheProtocol`.

    Raises:
        OptionError: it has not, or they do not fit; the message says what to pass instead.
    """
    if type(provider).__module__.partition(".")[0] in _CLIENTS:
        mend = "is a Redis client: write memo.configure(redis_url=...) and no provider."
        raise OptionError("provider", provider, mend)
    methods = {name: getattr(provider, name, None) for name in _CALLS}
    missing = [n for n, m in methods.items() if not callable(m) and n not in _OPTIONAL]
    if missing:
        mend = f"has no {', '.join(missing)}(); a provider has async get, set, delete and clear."
        raise OptionError("provider", provider, mend)
    for name, method in methods.items():
        if method is not None:
            _check_method(provider, name, method)


def _check_method(provider: Any, name: str, method: Any) -> None:
    if inspect.ismethod(method) and inspect.isfunction(method.__func__):
        wrapped = hasattr(method.__func__, "__wrapped__")
        if not (inspect.iscoroutinefunction(method) or wrapped):
            mend = f"its {name} is no coroutine: write `async def {_SHOWN[name]}`."
            raise OptionError("provider", provider, mend)
    try:
        inspect.signature(method).bind(*_CALLS[name])
    except TypeError:
        mend = f"its {name} does not take what it is called with: {_SHOWN[name]}."
        raise OptionError("provider", provider, mend) from None
    except ValueError:  # written in C: it says when it is called
        pass


_CLIENTS: Final = frozenset({"redis", "valkey", "fakeredis"})


class Adapted:
    """A user's `CacheProtocol` as a tier, generations included.

    Each generation field is a key of its own (`memo:g:<group>:<field>`), so that two processes that
    invalidate at once cannot undo each other.  Without an atomic table there are no shapes: fields
    are read for `*`, `!`, each single argument and all of them together; an invalidation by some
    other set of arguments turns the whole group.
    """

    shared = True

    def __init__(self, provider: Any) -> None:
        _check(provider)
        self.provider = provider
        self.name = type(provider).__name__
        self.where = f"{self.name}@{getattr(provider, 'where', id(provider))}"
        self.generations: Generations | None = AdaptedGenerations(self)

    async def call(self, port: Port, work: Any) -> Any:
        """Await a coroutine of the user's; whatever it raises is a fault of the tier."""
        try:
            return await port.settle(work)
        except Exception as error:
            raise TierError(f"{self.name}: {type(error).__name__}: {error}") from error

    async def lookup(self, port: Port, name: str) -> Found | None:
        record = await self.call(port, self.provider.get(name))
        if record is None:
            return None
        if not isinstance(record, (bytes, bytearray, memoryview)):
            raise TierError(f"{self.name}.get gave {type(record).__name__} instead of bytes")
        record = bytes(record)
        return Found(record)

    async def payload(self, port: Port, digest: bytes, size: int) -> Source | None:
        data = await self.call(port, self.provider.get(f"memo:p:{digest.hex()}"))
        return None if data is None or len(data) != size else Bytes(bytes(data))

    async def store(
        self,
        port: Port,
        name: str,
        record: bytes,
        payload: Payload | None,
        lifetime: float | None,
    ) -> None:
        if payload is not None:
            data = aligned(payload)
            key = f"memo:p:{payload.digest.hex()}"
            await self.call(port, self.provider.set(key, data, lifetime))
        await self.call(port, self.provider.set(name, record, lifetime))

    async def drop(self, port: Port, name: str) -> bool:
        await self.call(port, self.provider.delete(name))
        return True

    async def clear(self, port: Port, prefix: str) -> int:
        clear = getattr(self.provider, "clear", None)
        if clear is None:
            raise TierError(f"{self.name} has no clear()")
        await self.call(port, clear())
        return 0

    async def health(self, port: Port) -> dict[str, Any]:
        return {"up": True}

    def close(self) -> None:
        return


class Bytes:
    """A payload in memory."""

    identity: object | None = None

    def __init__(self, data: bytes) -> None:
        self._data = data

    def open(self, size: int) -> memoryview:
        return memoryview(bytearray(self._data))


class AdaptedGenerations:
    """Generations over nothing but get and set."""

    def __init__(self, tier: Adapted) -> None:
        self._tier = tier

    async def states(self, port: Port, refs: Sequence[Ref]) -> list[State]:
        states: list[State] = await self._tier.call(port, self._states(refs))
        return states

    async def begin(self, port: Port, refs: Sequence[Ref]) -> list[State]:
        states: list[State] = await self._tier.call(port, self._begin(refs))
        return states

    async def turn(self, port: Port, turns: Sequence[Turn], note: str) -> None:
        await self._tier.call(port, self._turn(turns, note))

    async def notes(self, port: Port, ref: Ref) -> list[tuple[str, str]]:
        fields: dict[str, str] = await self._tier.call(port, self._fields(ref))
        return [(name, value[stamps.TOKEN :]) for name, value in fields.items()]

    async def _get(self, group: str, field: str) -> str:
        value = await self._tier.provider.get(f"memo:g:{group}:{field}")
        return "" if value is None else bytes(value).decode()

    async def _set(self, group: str, field: str, value: str) -> None:
        await self._tier.provider.set(f"memo:g:{group}:{field}", value.encode(), None)

    async def _fields(self, ref: Ref) -> dict[str, str]:
        """The fields that a ref can read, with `?` made up from those that exist."""
        fields = {}
        for name in (stamps.ALL, stamps.LAST):
            if value := await self._get(ref.group, name):
                fields[name] = value
        shapes = []
        for pairs in _readable(ref):
            if value := await self._get(ref.group, stamps.field(pairs)):
                fields[stamps.field(pairs)] = value
                shapes.append(stamps.shape(pairs))
        if shapes:
            fields[stamps.SHAPES] = "|".join(shapes)
        return fields

    async def _states(self, refs: Sequence[Ref]) -> list[State]:
        return [stamps.read(ref, await self._fields(ref)) for ref in refs]

    async def _begin(self, refs: Sequence[Ref]) -> list[State]:
        for ref in refs:
            if not await self._get(ref.group, stamps.ALL):
                await self._set(ref.group, stamps.ALL, stamps.token())
        return await self._states(refs)

    async def _turn(self, turns: Sequence[Turn], note: str) -> None:
        for turn in turns:
            token = stamps.token_for(turn)
            if stamps.is_soft(turn.arguments):  # always of the whole group: one field to read
                await self._set(turn.group, stamps.field(_EXPIRED), token + note)
                await self._set(turn.group, stamps.LAST, token)
                continue
            field = stamps.field(turn.arguments)
            narrow = turn.whole or len(turn.arguments) == 1
            await self._set(turn.group, field if narrow else stamps.ALL, token + note)
            await self._set(turn.group, stamps.LAST, token)


_EXPIRED = ((stamps.SOFT, ""),)


def _readable(ref: Ref) -> list[tuple[tuple[str, str], ...]]:
    if not ref.arguments:
        return [_EXPIRED]
    singles: list[tuple[tuple[str, str], ...]] = [_EXPIRED, *((pair,) for pair in ref.arguments)]
    return singles if len(singles) == 2 else [*singles, tuple(ref.arguments)]
