"""Redis as a tier: records, payloads, and the generations that all hosts share.

What lies there, all of it under the namespace:

=============================== ==================================================================
key                             what
=============================== ==================================================================
the entry's name                a record; dies with the entry
`{namespace}:p:{digest}`        a payload; dies with the last entry stored with it
`{namespace}:g:{group}`         a group of generations (`memo.stamps`), a hash; never dies
`{namespace}:l:…`, `…:w:…`      leases and their bells (`memo.grants`)
`{namespace}:live`              the shared live configuration, a hash
=============================== ==================================================================

A look-up is one round trip whatever the number of stamps: plain commands for the record and the
groups that it is likely to name (`memo.prefetch`), or, where that is not known, a script.  The
record is read before the groups, never after them.  Nothing that Redis says is believed here;
whoever asked checks the seal.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from memo import stamps
from memo.breaker import RATE
from memo.codec import Payload
from memo.errors import TierError
from memo.grants import RedisLeases
from memo.port import Port
from memo.prefetch import BIG, Expected, Plan, Prefetch
from memo.scripts import LOOKUP, STATES, TURN, pack
from memo.seal import ALIGN
from memo.stamps import Ref, State, Turn
from memo.tiers import REDIS, Asked, Found, Source
from memo.transit import Held, Leaving, Sink
from memo.wire import Wire

if TYPE_CHECKING:
    from memo.listener import Listener

VALUE_LIMIT = 64 * 1024 * 1024
"""Bytes up to which a record or a payload is sent to Redis, unless a setting says otherwise."""
BATCH = 1000
"""Names that one step of `clear` looks at."""
_LONGEST = 10**14
"""Milliseconds (3,000 years) above which Redis might refuse a lifetime."""
_GLOB = re.compile(r"([*?\[\]\\^])")


class Redis:
    """A Redis server as a tier, its generations, and its leases.

    Args:
        url: `redis://`, `rediss://` or `unix://`; user and password in it are never shown.
        namespace: in front of the names of everything but entries, whose names have it already.
        deadline: seconds that one operation may take in all; what is moved may take its time at
            `memo.breaker.RATE` on top.
        value_limit: bytes; larger payloads are not sent, larger records are refused.
        tracking: let Redis push word of what changes, so that a memory tier need not ask each time.

    Attributes:
        where: names this store among all others, for the journal.
        leases: see `memo.grants`.
        wire: the way to the server, with its breaker.
        listener: hears of changes of the generations, with `tracking`; else None.
    """

    name = REDIS
    shared = True

    def __init__(
        self,
        url: str,
        *,
        namespace: str = "memo",
        deadline: float = 0.25,
        value_limit: int = VALUE_LIMIT,
        tracking: bool = False,
    ) -> None:
        self.wire = Wire(url, deadline)
        self.where = f"redis {self.wire.where} {namespace}"
        self.value_limit = value_limit
        self.leases = RedisLeases(self.wire, namespace)
        self._groups = f"{namespace}:g:".encode()
        self._payloads = f"{namespace}:p:".encode()
        self._live = f"{namespace}:live".encode()
        self._prefetch = Prefetch(self._groups)
        self._kept = (self._groups, *self.leases.prefixes, self._live)
        self.listener = self._listener(url) if tracking else None

    def __repr__(self) -> str:
        return f"<Redis {self.wire.where}>"

    def _listener(self, url: str) -> Listener:
        from memo.listener import Listener

        listener = Listener(url, self._groups, self.wire.deadline, self.wire.where)
        self.wire.on_recover.append(listener.wake)
        return listener

    @property
    def generations(self) -> Redis:
        """Itself: it is an authority on what is true."""
        return self

    @property
    def outages(self) -> int:
        """How often an operation failed; unchanged since a moment: nothing was lost since."""
        return self.wire.outages

    # --- entries ---------------------------------------------------------------------------------

    async def lookup(self, port: Port, name: str) -> Found | None:
        """The record under a name and what its generations read now, in one round trip."""
        asked = self.ask(port, name)
        if asked is not None:
            asked.answer = await port.settle(asked.answer)
            return asked.found()
        expected = self._prefetch.expected(name)
        keys, shared = (name.encode(),), not expected.big
        found = await self.wire.run(port, LOOKUP, keys, self._groups, parse=_found, shared=shared)
        if found is None or found.states is None:
            return found
        expected.big = len(found.record) > BIG
        return found._replace(read=partial(expected.told, found.states))

    def ask(self, port: Port, name: str) -> AskedRecord | None:
        """As `lookup`, by a plain function; None where that takes a coroutine."""
        expected = self._prefetch.expected(name)
        plan = expected.plan
        if plan is None or expected.big or plan.resting:
            return None
        key = name.encode()
        command = b"*2\r\n$3\r\nGET\r\n$%d\r\n%s\r\n" % (len(key), key)
        answer = self.wire.prompt(port, (command, *plan.commands))
        return None if answer is None else AskedRecord(answer, self.wire, expected, plan)

    def ask_states(self, port: Port, refs: Sequence[Ref]) -> AskedStates | None:
        """As `states`, by a plain function; None where that takes a coroutine."""
        plan = self._prefetch.plan(refs)
        if plan is None:
            return None
        answer = self.wire.prompt(port, plan.commands)
        return None if answer is None else AskedStates(answer, self.wire, plan, refs)

    async def payload(self, port: Port, digest: bytes, size: int) -> Source | None:
        """The payload with a digest, if it is here."""
        held = Held(size)
        return held if await port.offload(self.fetch, digest, held) else None

    def fetch(self, digest: bytes, sink: Sink) -> bool:
        """Receive a payload, in this thread; False: it is not here.

        Raises:
            TierError: Redis did not give it, or the sink did not take it.
        """
        command = pack(b"GET", self._payload_name(digest))
        return self.wire.here(lambda port: self.wire.ask(port, command, parse=bool, sink=sink))

    async def store(
        self,
        port: Port,
        name: str,
        record: bytes,
        payload: Payload | None,
        lifetime: float | None,
    ) -> None:
        """Keep a record, after its payload if that is not too big.

        Raises:
            TierError: the record is too big, or Redis did not take it.
        """
        if len(record) > self.value_limit:
            raise TierError(f"a record of {len(record)} bytes is too big for Redis")
        if payload is not None and payload.size <= self.value_limit:
            await self._store_payload(port, payload, lifetime)
        await self._set(port, name.encode(), [record], lifetime)

    async def _store_payload(self, port: Port, payload: Payload, lifetime: float | None) -> None:
        """Keep a payload; it outlives whatever was stored with it before."""
        name = self._payload_name(payload.digest)
        before = await self.wire.ask(port, pack(b"PTTL", name), parse=int)
        if lifetime is not None:
            lifetime = None if before == -1 else max(lifetime, before / 1000)
        if isinstance(payload, Leaving):
            head, tail = _set(name, payload.size, lifetime)
            seconds = self.wire.deadline + payload.size / RATE
            await self.wire.ask(port, head, tail, parse=_ok, seconds=seconds, body=payload.pieces)
            return
        parts: list[bytes | memoryview] = []
        for view in payload.views:
            parts += (view, bytes(-view.nbytes % ALIGN))
        await self._set(port, name, parts, lifetime)

    async def _set(
        self,
        port: Port,
        name: bytes,
        value: list[bytes | memoryview] | list[bytes],
        lifetime: float | None,
    ) -> None:
        head, tail = _set(name, sum(map(len, value)), lifetime)
        await self.wire.ask(port, head, *value, tail, parse=_ok)

    async def holds(self, port: Port, names: Sequence[str]) -> list[bool]:
        """Whether each of some names is here, in one round trip.

        Raises:
            TierError: nobody can tell.
        """
        commands = [pack(b"EXISTS", name.encode()) for name in names]
        count = len(commands)

        def parse(answer: Any) -> list[bool]:
            return [bool(int(one)) for one in (answer if count > 1 else [answer])]

        return await self.wire.ask(port, *commands, parse=parse, replies=count)

    async def drop(self, port: Port, name: str) -> bool:
        """Forget a name; True when it was there."""
        return bool(await self.wire.ask(port, pack(b"UNLINK", name.encode()), parse=int))

    async def clear(self, port: Port, prefix: str) -> int:
        """Forget every entry whose name begins with `prefix`; looks at all names, in steps.

        Payloads go with a prefix that covers them, and are not counted.  Generations, leases and
        the live configuration stay.
        """
        pattern = _GLOB.sub(r"\\\1", prefix).encode() + b"*"
        cursor, dropped = b"0", 0
        while True:
            command = pack(b"SCAN", cursor, b"MATCH", pattern, b"COUNT", b"%d" % BATCH)
            cursor, names = await self.wire.ask(port, command, parse=_page)
            if names := [name for name in names if not name.startswith(self._kept)]:
                await self.wire.ask(port, pack(b"UNLINK", *names), parse=int)
                dropped += sum(not name.startswith(self._payloads) for name in names)
            if cursor == b"0":
                return dropped

    def _payload_name(self, digest: bytes) -> bytes:
        return self._payloads + digest.hex().encode()

    # --- generations -----------------------------------------------------------------------------

    async def states(self, port: Port, refs: Sequence[Ref]) -> list[State]:
        """What each ref reads now."""
        return await self._read(port, refs)

    async def begin(self, port: Port, refs: Sequence[Ref]) -> list[State]:
        """As `states`, but a group that has no `*` gets one first."""
        tokens = [stamps.token().encode() for _ in refs]
        return await self._read(port, refs, *tokens)

    async def _read(self, port: Port, refs: Sequence[Ref], *tokens: bytes) -> list[State]:
        def parse(answer: list[Any]) -> list[State]:
            states = _states(answer)
            if len(states) != len(refs):
                raise ValueError("more or fewer states than were asked for")
            return states

        words = (self._groups, _json(refs), *tokens)
        return await self.wire.run(port, STATES, (), *words, parse=parse)

    async def turn(self, port: Port, turns: Sequence[Turn], note: str) -> None:
        """Invalidate; all groups in one step."""
        rows = [(t.group, stamps.shape(t.arguments), stamps.field(t.arguments)) for t in turns]
        tokens = [stamps.token().encode() for _ in turns]
        words = (self._groups, _json(rows), note.encode(), *tokens)
        await self.wire.run(port, TURN, (), *words, parse=len)

    async def notes(self, port: Port, ref: Ref) -> list[tuple[str, str]]:
        """(field, note) of every invalidation that a ref has seen."""
        command = pack(b"HGETALL", self._groups + ref.group.encode())
        fields = await self.wire.ask(port, command, parse=_fields)
        seen = stamps.read(ref, fields)
        names = {stamps.ALL, *(part.rpartition(":")[0] for part in seen.text.split("|")[1:])}
        if ref.arguments is None:
            names = set(fields) - {stamps.SHAPES, stamps.LAST}
        kept = ((name, fields.get(name, "")[stamps.TOKEN :]) for name in sorted(names))
        return [(name, note) for name, note in kept if note]

    # --- the live configuration ------------------------------------------------------------------

    def live(self) -> dict[str, str]:
        """The shared live configuration; blocks for a deadline at most.

        Raises:
            TierError: it cannot be read.
        """
        command = pack(b"HGETALL", self._live)
        return self.wire.here(lambda port: self.wire.ask(port, command, parse=_fields))

    def publish(self, key: str, text: str | None) -> None:
        """Set a key of the shared live configuration, or take it away; blocks as `live`.

        Raises:
            TierError: it could not be written.
        """
        words: tuple[bytes, ...] = (b"HDEL", self._live, key.encode())
        if text is not None:
            words = (b"HSET", *words[1:], text.encode())
        self.wire.here(lambda port: self.wire.ask(port, pack(*words), parse=int))

    # --- housekeeping ----------------------------------------------------------------------------

    async def health(self, port: Port) -> Mapping[str, Any]:
        """Facts about the server, asked whatever the breaker thinks.

        Returns:
            `up`, `where`, `breaker` (`"open"` or `"closed"`); when it is up `version`, `used` and
            `limit` (bytes of memory; 0: no limit), `policy` (of eviction), `names` (of all who use
            this database); else `error`.  With `tracking`: `tracking`, `"listening"` or
            `"strict (why)"`.
        """
        facts = await self._facts_of_server(port)
        if self.listener is not None:
            if facts["up"] and not self.listener.listening:
                await port.offload(self.listener.wait, self.wire.deadline)
            facts["tracking"] = self.listener.state
        return facts

    async def _facts_of_server(self, port: Port) -> dict[str, Any]:
        try:
            facts, names = await self.wire.reach(
                port, pack(b"INFO"), pack(b"DBSIZE"), parse=_facts, replies=2
            )
        except TierError as error:
            return {
                "up": False,
                "where": self.wire.where,
                "breaker": self._breaker(),
                "error": str(error),
            }
        return {
            "up": True,
            "breaker": self._breaker(),
            "where": self.wire.where,
            "version": facts.get("redis_version", "?"),
            "used": int(facts.get("used_memory", 0)),
            "limit": int(facts.get("maxmemory", 0)),
            "policy": facts.get("maxmemory_policy", "?"),
            "names": names,
        }

    def _breaker(self) -> str:
        return "open" if self.wire.breaker.open else "closed"

    def close(self) -> None:
        """Let go of all connections; they are made again when the tier is used again."""
        self._close_others()
        self.wire.close()

    async def aclose(self) -> None:
        """As `close`, and wait until those of the running loop are closed."""
        import asyncio

        await asyncio.to_thread(self._close_others)
        await self.wire.aclose()

    def _close_others(self) -> None:
        """Close what connects by itself; waits for two deadlines at most, for each."""
        if self.listener is not None:
            self.listener.close()
        self.leases.close()


class AskedRecord(Asked):
    """A look-up of a record and of the groups that it is likely to name."""

    __slots__ = ("_expected", "_plan", "_wire")

    def __init__(self, answer: Any, wire: Wire, expected: Expected, plan: Plan) -> None:
        super().__init__(answer)
        self._wire = wire
        self._expected = expected
        self._plan = plan

    def found(self) -> Found | None:
        """See `Asked`."""
        return self._wire.parsed(self._seen, self.answer)

    def _seen(self, replies: list[Any]) -> Found | None:
        record = replies[0]
        if record is None:
            return None
        expected = self._expected
        expected.big = len(_bytes(record)) > BIG
        return Found(record, read=partial(expected.states, self._plan, replies[1:]))


class AskedStates(Asked):
    """A look at the groups that refs name."""

    __slots__ = ("_plan", "_refs", "_wire")

    def __init__(self, answer: Any, wire: Wire, plan: Plan, refs: Sequence[Ref]) -> None:
        super().__init__(answer)
        self._wire = wire
        self._plan = plan
        self._refs = refs

    def found(self) -> tuple[State, ...] | None:
        """See `Asked`."""
        return self._wire.parsed(self._read, self.answer)

    def _read(self, replies: list[Any]) -> tuple[State, ...] | None:
        return self._plan.states(self._refs, replies)


def _set(name: bytes, size: int, lifetime: float | None) -> tuple[bytes, bytes]:
    """A SET of `size` bytes: what is sent before them, and what behind."""
    expiry = () if lifetime is None else (b"PX", b"%d" % _milliseconds(lifetime))
    head = b"*%d\r\n$3\r\nSET\r\n$%d\r\n%s\r\n$%d\r\n" % (3 + len(expiry), len(name), name, size)
    return head, b"\r\n" + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in expiry)


# What answers must look like: each raises where they look otherwise.


def _found(answer: list[Any]) -> Found | None:
    if not answer:
        return None
    record = _bytes(answer.pop(0))
    return Found(record, None, None if answer == [None] else tuple(_states(answer)))


def _states(flat: list[Any]) -> list[State]:
    """States from their texts and lasts in turn."""
    if len(flat) % 2:
        raise ValueError("half a state")
    words = map(_text, flat)
    return list(map(State, words, words))


def _fields(flat: list[Any]) -> dict[str, str]:
    return dict(zip(map(_text, flat[::2]), map(_text, flat[1::2]), strict=True))


def _page(answer: list[Any]) -> tuple[bytes, list[bytes]]:
    cursor, names = answer
    return _bytes(cursor), [_bytes(name) for name in names]


def _facts(answers: list[Any]) -> tuple[dict[str, str], int]:
    info, names = answers
    lines = (line.partition(":") for line in _text(info).splitlines())
    return {name: value for name, _, value in lines}, int(names)


def _ok(answer: Any) -> None:
    if answer != b"OK":
        raise ValueError("not confirmed")


def _bytes(answer: Any) -> bytes:
    if not isinstance(answer, bytes):
        raise TypeError("not bytes")
    return answer


def _text(word: bytes) -> str:
    return word.decode("utf-8", "surrogateescape")


def _json(rows: Sequence[Any]) -> bytes:
    return json.dumps(rows, separators=(",", ":")).encode()


def _milliseconds(seconds: float) -> int:
    return max(1, int(min(seconds * 1000, _LONGEST)))
