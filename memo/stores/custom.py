"""Custom stores: a user's get, set and delete over bytes as a tier."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Final

from memo.errors import EntryError, OptionError, TierError, described
from memo.records import seal
from memo.records.codec import Payload, aligned_bytes
from memo.records.seal import Entry
from memo.records.stamp_types import LOST, Ref, State
from memo.runtime import events
from memo.runtime.port import Port
from memo.settings.secret_keys import Secret
from memo.stores.protocols import Found, RecordToStore, Source, key_in
from memo.validity import generations, stamps
from memo.validity.stamps import Turn

_CALLS: Final[Mapping[str, tuple[Any, ...]]] = {
    "get": ("key",),
    "set": ("key", b"", None),
    "delete": ("key",),
    "clear": (),
    "get_many": (["key"],),
    "set_many": ({"key": b""}, None),
}
"""Method -> the arguments it is called with."""
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
    """Check that a provider has the methods of a `CacheProtocol`.

    Raises:
        OptionError: a method is missing or does not fit; the message says what to pass instead.
    """
    if type(provider).__module__.partition(".")[0] in _CLIENTS:
        fix = "is a Redis client: write memo.configure(redis_url=...) and no provider."
        raise OptionError("provider", provider, fix)
    if isinstance(provider, (str, bytes)):
        fix = "is text: write memo.configure(redis_url=...) and no provider."
        raise OptionError("provider", provider, fix)
    methods = {name: getattr(provider, name, None) for name in _CALLS}
    missing = [n for n, m in methods.items() if not callable(m) and n not in _OPTIONAL]
    if missing:
        fix = f"has no {', '.join(missing)}(); a provider has async get, set, delete and clear."
        raise OptionError("provider", provider, fix)
    for name, method in methods.items():
        if method is not None:
            _check_method(provider, name, method)


def _check_method(provider: Any, name: str, method: Any) -> None:
    if inspect.ismethod(method) and inspect.isfunction(method.__func__):
        wrapped = hasattr(method.__func__, "__wrapped__")
        if not (inspect.iscoroutinefunction(method) or wrapped):
            fix = f"its {name} is not a coroutine function: write `async def {_SHOWN[name]}`."
            raise OptionError("provider", provider, fix)
    try:
        inspect.signature(method).bind(*_CALLS[name])
    except TypeError:
        fix = f"its {name} has other parameters than {_SHOWN[name]}."
        raise OptionError("provider", provider, fix) from None
    except ValueError:  # written in C: errors show when it is called
        pass


_CLIENTS: Final = frozenset({"redis", "valkey", "fakeredis"})


class CustomTier:
    """A user's `CacheProtocol` as a tier with generations.

    Each field of a generation group has its own key (`memo:g:<group>:<field>`), so that two
    processes that invalidate at the same time cannot undo each other.  Such a store has no atomic
    table, so there are no shapes: the fields `*` and `!`, each single argument, and all arguments
    together are read, and an invalidation by any other set of arguments turns the whole group.
    """

    shared = True
    read_only = False
    budget = None

    def __init__(self, provider: Any) -> None:
        _check(provider)
        self.provider = provider
        self.name = type(provider).__name__
        where = getattr(provider, "where", None)
        self.where = self.name if where is None else f"{self.name}@{where}"
        self.generations = CustomGenerations(self)
        self._secrets: tuple[Secret, ...] = ()

    async def await_store(self, port: Port, work: Any) -> Any:
        """Await a coroutine of the user's store; any error is a fault of the tier.

        So is a cancellation that was not the caller's, for instance of what the store shares.
        """
        try:
            return await port.settle(work)
        except BaseException as error:
            cancelled = type(error).__name__ == "CancelledError" and not port.is_cancelled()
            if not cancelled and not isinstance(error, Exception):
                raise
            raise TierError(f"{self.name}: {described(error)}") from error

    def trust(self, secrets: tuple[Secret, ...]) -> None:
        """Set the secrets that a record must be sealed with."""
        self._secrets = secrets

    async def lookup(self, port: Port, name: str) -> Found | None:
        """Return the record under a name.

        With `get_many` its generations and payload are read with it.
        """
        record = await self.await_store(port, self.provider.get(name))
        if record is None:
            return None
        record = self._bytes("get", record)
        if not hasattr(self.provider, "get_many"):
            return Found(record)
        try:
            entry = seal.unpack(record, self._secrets, name.partition(":")[0], key_in(name))
        except EntryError:  # the chain gets the same error, and reports it
            return Found(record)
        found: Found = await self.await_store(port, self._found_with_states(record, entry))
        return found

    async def _found_with_states(self, record: bytes, entry: Entry) -> Found:
        generations = self.generations
        keys = generations.keys(entry.refs)
        payload = []
        if entry.buffers:
            payload = [_payload_key(seal.payload_digest(entry.buffers))]
        values = await self.read([*keys, *payload])
        states = tuple(generations.states_in(entry.refs, values))
        data = values[payload[0]] if payload else None
        whole = data is not None and len(data) == seal.payload_size(entry.buffers)
        return Found(record, FetchedPayload(data) if data is not None and whole else None, states)

    async def read(self, keys: Sequence[str]) -> dict[str, bytes | None]:
        """Read the values of some keys, in one call if the provider has `get_many`."""
        keys = list(dict.fromkeys(keys))
        get_many = getattr(self.provider, "get_many", None)
        if get_many is None:
            values = [await self.provider.get(key) for key in keys]
        else:
            values = list(await get_many(keys))
            if len(values) != len(keys):
                raise TierError(f"its get_many returned {len(values)} values for {len(keys)} keys")
        verb = "get" if get_many is None else "get_many"
        pairs = zip(keys, values, strict=True)
        return {key: None if v is None else self._bytes(verb, v) for key, v in pairs}

    async def write(self, items: Mapping[str, bytes], ttl: float | None) -> None:
        """Store some values, in one call if the provider has `set_many`."""
        set_many = getattr(self.provider, "set_many", None)
        if set_many is not None and len(items) > 1:
            await set_many(dict(items), ttl)
            return
        for key, value in items.items():
            await self.provider.set(key, value, ttl)

    def _bytes(self, verb: str, value: Any) -> bytes:
        if not isinstance(value, (bytes, bytearray, memoryview)):
            raise TierError(f"{self.name}.{verb} returned {type(value).__name__} instead of bytes")
        return bytes(value)

    async def payload(self, port: Port, digest: bytes, size: int) -> Source | None:
        data = await self.await_store(port, self.provider.get(_payload_key(digest)))
        data = None if data is None else self._bytes("get", data)
        return None if data is None or len(data) != size else FetchedPayload(data)

    async def store(
        self,
        port: Port,
        name: str,
        record: bytes,
        payload: Payload | None,
        lifetime: float | None,
    ) -> None:
        items = {} if payload is None else {_payload_key(payload.digest): aligned_bytes(payload)}
        await self.await_store(port, self.write({**items, name: record}, lifetime))

    async def store_many(self, port: Port, records: Sequence[RecordToStore]) -> None:
        """See `memo.stores.protocols.StoresMany.store_many`.

        All get the longest of the lifetimes.
        """
        lives = [lifetime for _, _, lifetime in records if lifetime is not None]
        longest = max(lives) if len(lives) == len(records) else None
        await self.await_store(
            port, self.write({name: record for name, record, _ in records}, longest)
        )

    async def drop(self, port: Port, name: str) -> bool:
        await self.await_store(port, self.provider.delete(name))
        return True

    async def clear(self, port: Port, prefix: str) -> int:
        clear = getattr(self.provider, "clear", None)
        if clear is None:
            raise TierError(f"{self.name} has no clear()")
        await self.await_store(port, clear())
        return 0

    async def health(self, port: Port) -> dict[str, Any]:
        return {"up": True}

    def close(self) -> None:
        return


class FetchedPayload:
    """A payload read from the user's store: a `memo.stores.protocols.Source`."""

    identity: object | None = None

    def __init__(self, data: bytes) -> None:
        self._data = data

    def open(self, size: int) -> memoryview:
        return memoryview(bytearray(self._data))


_NAMESPACE: Final = "n"
_NO_GENERATIONS: Final = (
    "it is new or has lost its data; results that this host stored before are computed again"
)


class CustomGenerations:
    """Generations over get and set; see `memo.stores.protocols.Generations`."""

    def __init__(self, tier: CustomTier) -> None:
        self._tier = tier

    async def states(self, port: Port, refs: Sequence[Ref]) -> list[State]:
        states: list[State] = await self._tier.await_store(port, self._states(refs))
        return states

    async def stamp_states(self, port: Port, refs: Sequence[Ref]) -> list[State]:
        states: list[State] = await self._tier.await_store(port, self._stamp_states(refs))
        return states

    async def turn(self, port: Port, turns: Sequence[Turn], note: str) -> None:
        await self._tier.await_store(port, self._turn(turns, note))

    async def notes(self, port: Port, ref: Ref) -> list[tuple[str, str]]:
        notes: list[tuple[str, str]] = await self._tier.await_store(port, self._notes(ref))
        return notes

    def keys(self, refs: Sequence[Ref]) -> list[str]:
        """Return the keys to read for the states of some refs."""
        return [_key(ref.group, name) for ref in refs for name in _names(ref)]

    def states_in(self, refs: Sequence[Ref], values: Mapping[str, bytes | None]) -> list[State]:
        """Return the states of some refs, from the values of `keys`."""
        return [stamps.state_of(ref, self._fields(ref, values)) for ref in refs]

    def _fields(self, ref: Ref, values: Mapping[str, bytes | None]) -> dict[str, str]:
        """Return the fields that a ref can read.

        `?` (the shapes) is derived from those that exist.
        """
        fields = {}
        for name in (stamps.ALL, stamps.LAST):
            if value := values[_key(ref.group, name)]:
                fields[name] = value.decode()
        shapes = []
        for pairs in generations.readable_fields(ref):
            if value := values[_key(ref.group, stamps.field(pairs))]:
                fields[stamps.field(pairs)] = value.decode()
                shapes.append(stamps.shape(pairs))
        if shapes:
            fields[stamps.SHAPES] = "|".join(shapes)
        return fields

    async def _states(self, refs: Sequence[Ref]) -> list[State]:
        return self.states_in(refs, await self._tier.read(self.keys(refs)))

    async def _stamp_states(self, refs: Sequence[Ref]) -> list[State]:
        states = await self._states(refs)
        missing = {ref.group for ref, state in zip(refs, states, strict=True) if state == LOST}
        if not missing:
            return states
        tokens = {_key(group, stamps.ALL): stamps.token().encode() for group in sorted(missing)}
        await self._tier.write(tokens, None)
        if _NAMESPACE in missing:  # every entry depends on it
            events.emit(
                events.Event(events.TIER_LOST, tier=self._tier.name, detail=_NO_GENERATIONS)
            )
        return await self._states(refs)

    async def _notes(self, ref: Ref) -> list[tuple[str, str]]:
        fields = self._fields(ref, await self._tier.read(self.keys([ref])))
        return generations.notes_for(fields, ref)

    async def _turn(self, turns: Sequence[Turn], note: str) -> None:
        values = {}
        for turn in turns:
            for field, value in generations.fields_without_table(turn, note).items():
                values[_key(turn.group, field)] = value.encode()
        await self._tier.write(values, None)


def _key(group: str, field: str) -> str:
    return f"memo:g:{group}:{field}"


def _payload_key(digest: bytes) -> str:
    return f"memo:p:{digest.hex()}"


def _names(ref: Ref) -> list[str]:
    return [stamps.ALL, stamps.LAST, *map(stamps.field, generations.readable_fields(ref))]
