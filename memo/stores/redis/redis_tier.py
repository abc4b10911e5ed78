"""Redis as a tier: records, payloads, and the generations that all hosts share.

All its keys are prefixed with the namespace and the version of the format; every key expires:

================================ =================================================================
key                              content and lifetime
================================ =================================================================
`{namespace}:2:{function}:…`     a record; lives as long as the entry, and without a ttl for the
                                 setting `retention` after it was stored or last used
`{namespace}:2:p:{digest}`       a payload; as long as the longest-lived entry stored with it
`{namespace}:2:g:{group}`        a group of generations (`stamps`), a hash; as long as the
                                 longest-lived entry that names it, plus `EXTRA_GROUP_SECONDS`
`{namespace}:2:l:…`, `…:w:…`     leases and their bells (`cluster_leases`)
`{namespace}:2:hosts`            the hosts that use the namespace, and the epoch (`loss_recovery`),
                                 a hash; `DEFAULT_RETENTION` after it was last read
`{namespace}:2:c:{function}:…`   state that a function changes itself (`shared_changes`), a hash;
                                 `DEFAULT_RETENTION` after the last addition
`{namespace}:live`               the shared live configuration, a hash; `DEFAULT_RETENTION` after it
                                 was last written, or read by any process
================================ =================================================================

Braces in a key are the hash tag of a cluster: the entries of a function, and each group, are on one
server.  A lookup is one round trip to each server concerned: plain commands for the record and
for the groups that it is likely to name (`lookups`).  Their order does not matter, since a
state that does not match is a miss.  Nothing that Redis returns is trusted here; the caller checks
the seal.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from memo import runtime
from memo.errors import TierError
from memo.records import seal
from memo.records.codec import Payload, aligned_pieces
from memo.records.payload_pieces import OutgoingPayload, PayloadInMemory, PayloadSink
from memo.records.seal import Entry
from memo.records.stamp_types import LOST, Ref, State
from memo.runtime.port import Port
from memo.settings.checks import DEFAULT_RETENTION, DEFAULT_VALUE_LIMIT_BYTES
from memo.stores.protocols import REDIS, Census, Lookup, RecordToStore, RestoreGroups, Source
from memo.stores.redis.client import Client
from memo.stores.redis.cluster_leases import RedisLeases
from memo.stores.redis.lookups import Lookups, RecordLookup
from memo.stores.redis.payload_store import PAYLOAD_KEPT_SECONDS, PayloadStore
from memo.stores.redis.scripts import CREATE_GROUP, EXTEND_LIFE, SEED, TURN, NoScriptsError
from memo.stores.redis.transport.exchange import MIN_BYTES_PER_SECOND
from memo.stores.redis.transport.resp import Command, decoded, encoded, pack
from memo.validity import generations, stamps
from memo.validity.generations import MIN_GROUP_SECONDS, TOMBSTONE_SECONDS
from memo.validity.stamps import Turn

if TYPE_CHECKING:
    from memo.stores.redis.tracking import Listener

NAMES_PER_SCAN = 1000
"""Names that one step of `clear` scans."""
MAX_LISTED_BYTES = 1 << 16
"""Records above this many bytes are not read for counting."""
EXTRA_GROUP_SECONDS = 30.0
"""Seconds by which a group outlives the entries that name it."""
HOST_ABSENT_SECONDS = 86_400.0
"""Seconds after which a host that was not seen is no longer registered."""
LIVE_EXTENSION_SECONDS = 86_400.0
"""Seconds after which reading the shared live configuration extends its life again."""
MAX_KNOWN_LIFETIMES = 65_536
"""Maximum number of groups whose lifetimes are remembered."""
_MAX_LIFETIME_MS = 10**14
"""Milliseconds (3,000 years) above which Redis might refuse a lifetime."""
_PTTL_OF_MISSING_KEY = -2
"""The answer of PTTL for a missing key."""
_SEND_ATTEMPTS = 4
"""Number of attempts to send a payload that appears or disappears in Redis meanwhile."""
_GLOB_SPECIALS = re.compile(r"([*?\[\]\\^])")


class Redis:
    """A Redis as a tier, its generations, and its leases.

    Args:
        url: see `redis_urls`; user and password in it are never shown.
        namespace: in front of all names.
        deadline: seconds that one operation may take in all; the time for transferring data at
            `memo.stores.redis.transport.exchange.MIN_BYTES_PER_SECOND` is added.
        value_limit: bytes; larger payloads go to `payload_store`, larger records are refused.
        tracking: let Redis push changes, so that a memory tier need not ask each time.
        options: arguments of redis-py's clients, beyond those in the URL.
        payload_store: a folder or bucket for payloads above `value_limit`; None: there is none.
        retention: seconds that an entry without a ttl stays after it was stored or last used.

    Attributes:
        where: identifies this store in the journal.
        leases: see `cluster_leases`.
        client: the client of the server, with its breakers.
        listener: receives changes of the generations, with `tracking`; else None.
        lookup: see `memo.stores.protocols.Tier`.
        get_ready, start_lookup, prepare_lookup, start_reading: see
            `memo.stores.protocols.ServerTier`.
    """

    name = REDIS
    shared = True
    budget = None

    def __init__(
        self,
        url: str,
        *,
        namespace: str = "memo",
        deadline: float = 0.25,
        value_limit: int = DEFAULT_VALUE_LIMIT_BYTES,
        tracking: bool = False,
        options: Mapping[str, Any] | None = None,
        payload_store: str | None = None,
        retention: float = DEFAULT_RETENTION,
    ) -> None:
        self.client = Client(url, deadline, options)
        self._retention = retention
        self._extended: dict[str, float] = {}
        self.where = f"redis {self.client.where} {namespace}"
        self.value_limit = value_limit
        self._namespace = namespace
        folder = f"{namespace}/{runtime.FORMAT}"
        self.payload_store = PayloadStore(payload_store, folder) if payload_store else None
        self._prefix = f"{namespace}:{runtime.FORMAT}:".encode()
        self.leases = RedisLeases(self.client, self._prefix)
        self._groups = self._prefix + b"g:{"
        self._payloads = self._prefix + b"p:"
        self._live = f"{namespace}:live".encode()
        self._live_kept = -LIVE_EXTENSION_SECONDS
        self._hosts = self._prefix + b"hosts"
        self._own_changes = self._prefix + b"c:"
        self._restore_groups: RestoreGroups | None = None
        self._tombstone_life = float(TOMBSTONE_SECONDS)
        self._lookups = Lookups(self.client, namespace, self._prefix, self._group_key)
        self.get_ready = self.client.get_ready
        self.lookup = self._lookups.lookup
        self.start_lookup = self._lookups.start_lookup
        self.prepare_lookup = self._lookups.prepare_lookup
        self.start_reading = self._lookups.start_reading
        self._kept = (
            self._groups,
            self._hosts,
            self._own_changes,
            self._live,
            *self.leases.prefixes,
        )
        self._lives: dict[str, float] = {}
        self._created: set[str] = set()
        self.listener = (
            self._listener(url, options) if tracking and not self.client.clustered else None
        )

    def __repr__(self) -> str:
        return f"<Redis {self.client.where}>"

    def _listener(self, url: str, options: Mapping[str, Any] | None) -> Listener:
        from memo.stores.redis.tracking import Listener

        client = self.client
        listener = Listener(url, self._groups, client.deadline, client.where, options=options)
        client.on_recover.append(listener.wake)
        return listener

    @property
    def generations(self) -> Redis:
        """Itself: it is an authority on validity."""
        return self

    @property
    def outages(self) -> int:
        """Number of operations that failed."""
        return self.client.outages

    @property
    def read_only(self) -> bool:
        """True if it accepts no writes now, so that a missing group cannot be created."""
        return self.client.writes.open

    def _group_key(self, group: str) -> bytes:
        return b"%s%s}" % (self._groups, encoded(group))

    # --- entries ---------------------------------------------------------------------------------

    async def payload(self, port: Port, digest: bytes, size: int) -> Source | None:
        """Return the payload with a digest, or None."""
        held = PayloadInMemory(size)
        return held if await port.offload(self.fetch, digest, held) else None

    def fetch(self, digest: bytes, sink: PayloadSink) -> bool:
        """Pass a payload to a sink, in this thread; False if it is not stored.

        Raises:
            TierError: Redis did not return it, or the sink refused it.
        """
        key = self._payload_name(digest)
        command = pack(b"GET", key)
        client = self.client
        if sink.size <= self.value_limit or self.payload_store is None:
            work = partial(client.ask, parse=bool, key=key, sink=sink)
            return client.run_blocking(lambda port: work(port, command))
        return self.payload_store.fetch(digest, sink)

    def accepts_payload(self, size: int) -> bool:
        """See `memo.stores.protocols.ServerTier.accepts_payload`."""
        return size <= self.value_limit or self.payload_store is not None

    async def store(
        self,
        port: Port,
        name: str,
        record: bytes,
        payload: Payload | None,
        lifetime: float | None,
    ) -> None:
        """Store a record, after its payload unless that is too big; extend the life of its groups.

        Raises:
            TierError: the record is too big, or Redis did not take it.
        """
        if len(record) > self.value_limit:
            raise TierError(f"a record of {len(record)} bytes is too big for Redis")
        lifetime = self._retention if lifetime is None else lifetime
        if payload is not None and payload.size <= self.value_limit:
            await self._store_payload(port, payload, lifetime)
        elif payload is not None and self.payload_store is not None:
            await port.offload(self.payload_store.store, payload)
            lifetime = min(lifetime, PAYLOAD_KEPT_SECONDS)
        await self._set_record(port, self._lookups.key(name), record, lifetime)
        await self._keep_groups(port, [(record, lifetime)])

    async def store_many(self, port: Port, records: Sequence[RecordToStore]) -> None:
        """See `memo.stores.protocols.StoresMany.store_many`; one exchange with each server."""
        lives = [self._retention if life is None else life for _, _, life in records]
        commands = []
        for (name, record, _), life in zip(records, lives, strict=True):
            key = self._lookups.key(name)
            head, tail = _set_command(key, len(record), b"PX", b"%d" % _milliseconds(life))
            commands.append((key, b"".join((head, record, tail))))
        for reply in await self.client.ask_each(port, commands, writes=True):
            _check_ok(reply)
        await self._keep_groups(
            port, [(record, life) for (_, record, _), life in zip(records, lives, strict=True)]
        )

    def record_use(self, port: Port, name: str, entry: Entry, age: float) -> None:
        """Extend the life of an entry without a ttl that has answered."""
        now = time.monotonic()
        if age < self._retention / 2 or now < self._extended.get(name, 0.0):
            return
        if len(self._extended) >= MAX_KNOWN_LIFETIMES:
            self._extended.clear()
        self._extended[name] = now + self._retention / 4

        async def extend(port: Port) -> None:
            with suppress(TierError):  # it expires a little early, which costs only a miss
                await self._extend_life(port, name, entry)

        port.spawn(extend, "memo-extend")

    async def _extend_life(self, port: Port, name: str, entry: Entry) -> None:
        life = b"%d" % _milliseconds(self._retention)
        if entry.buffers:
            await self._extend_payload(
                port, self._payload_name(seal.payload_digest(entry.buffers)), life
            )
        key = self._lookups.key(name)
        await self.client.ask(port, pack(b"PEXPIRE", key, life), parse=int, key=key, writes=True)
        await self._keep_groups(port, [(entry.record, self._retention)])

    async def _store_payload(self, port: Port, payload: Payload, lifetime: float) -> None:
        """Store a payload, which entries may share, without shortening the life that it has.

        Another host may store it at any moment, so each command keeps a longer life as it is.

        Raises:
            TierError: Redis did not take it.
        """
        name = self._payload_name(payload.digest)
        before = await self.client.ask(port, pack(b"PTTL", name), parse=int, key=name)
        life = b"%d" % _milliseconds(lifetime)
        there = before != _PTTL_OF_MISSING_KEY
        for _ in range(_SEND_ATTEMPTS):
            words = (b"XX", b"KEEPTTL") if there else (b"NX", b"PX", life)
            if await self._set_payload(port, name, payload, words):
                break
            there = not there  # it was stored or has expired meanwhile
        else:
            raise TierError("a payload keeps appearing and disappearing in Redis")
        if there and before < _milliseconds(lifetime):
            await self._extend_payload(port, name, life)

    async def _set_payload(
        self, port: Port, name: bytes, payload: Payload, words: Sequence[bytes]
    ) -> bool:
        head, tail = _set_command(name, payload.size, *words)
        if isinstance(payload, OutgoingPayload):
            seconds = self.client.deadline + payload.size / MIN_BYTES_PER_SECOND
            return await self.client.ask(
                port,
                head,
                tail,
                parse=_parse_set,
                key=name,
                seconds=seconds,
                writes=True,
                body=payload.pieces,
            )
        parts = aligned_pieces(payload)
        return await self.client.ask(
            port, head, *parts, tail, parse=_parse_set, key=name, writes=True
        )

    async def _extend_payload(self, port: Port, name: bytes, life: bytes) -> None:
        """Extend the life of a payload to at least `life` milliseconds."""
        await self._extend_lives(port, [((name,), (life, b""))])

    async def _keep_groups(self, port: Port, kept: Sequence[tuple[bytes, float]]) -> None:
        """Let the groups that records name live as long as the records, given with lifetimes."""
        now = time.monotonic()
        calls = []
        for record, lifetime in kept:
            for group in seal.groups_of(record):
                shortens = group in self._created and group.startswith("t:")
                if (
                    not shortens
                    and self._lives.get(group, 0.0) >= now + lifetime + EXTRA_GROUP_SECONDS / 2
                ):
                    continue
                self._created.discard(group)
                seconds = (lifetime + EXTRA_GROUP_SECONDS) * (
                    1 if shortens or lifetime < MIN_GROUP_SECONDS else 1.1
                )
                words = (b"%d" % _milliseconds(seconds), b"1" if shortens else b"")
                calls.append(((self._group_key(group),), words))
                self._note_expiry(group, now + seconds)
        if calls:
            await self._extend_lives(port, calls)

    async def _extend_lives(
        self, port: Port, calls: Sequence[tuple[tuple[bytes], tuple[bytes, bytes]]]
    ) -> None:
        """Run `EXTEND_LIFE`, or do the same in two steps if Redis runs no scripts."""
        try:
            await self.client.run_each(port, EXTEND_LIFE, calls)
        except NoScriptsError:
            commands = [(key, pack(b"PTTL", key)) for (key,), _ in calls]
            times = await self.client.ask_each(port, commands)
            await self._set_lives(
                port,
                [
                    (key, life)
                    for ((key,), (life, may_shorten)), left in zip(calls, times, strict=True)
                    if may_shorten or left < int(life)
                ],
            )

    async def _set_lives(self, port: Port, lives: Sequence[tuple[bytes, bytes]]) -> None:
        """Set the life of each key, in milliseconds; does nothing to missing keys."""
        if lives:
            commands = [(key, pack(b"PEXPIRE", key, life)) for key, life in lives]
            await self.client.ask_each(port, commands, writes=True)

    def _note_expiry(self, group: str, until: float) -> None:
        if len(self._lives) >= MAX_KNOWN_LIFETIMES:
            self._lives.clear()
        self._lives[group] = until

    async def _set_record(self, port: Port, key: bytes, record: bytes, lifetime: float) -> None:
        life = b"%d" % _milliseconds(lifetime)
        head, tail = _set_command(key, len(record), b"PX", life)
        await self.client.ask(port, head, record, tail, parse=_check_ok, key=key, writes=True)

    async def holds(self, port: Port, names: Sequence[str]) -> list[bool]:
        """For each of some names, return True if it is stored here; one round trip.

        Raises:
            TierError: Redis did not answer.
        """
        keys = [self._lookups.key(name) for name in names]
        found = await self.client.ask_each(port, [(key, pack(b"EXISTS", key)) for key in keys])
        return [bool(one) for one in found]

    async def search(
        self, port: Port, prefix: str, until: float, limit: int | None = None
    ) -> tuple[list[tuple[str, bytes]], bool]:
        """See `memo.stores.protocols.ServerTier.search`; skips records over `MAX_LISTED_BYTES`."""
        start = self._lookups.key(prefix)
        start = start if start != self._prefix else start + b"{"
        pattern = _GLOB_SPECIALS.sub(r"\\\1", start.decode()).encode() + b"*"
        found: list[tuple[str, bytes]] = []
        whole = True
        for node in await self.client.nodes(port):
            cursor = None
            while cursor != b"0":
                if time.monotonic() > until or (limit is not None and len(found) >= limit):
                    return found, False
                command = pack(
                    b"SCAN", cursor or b"0", b"MATCH", pattern, b"COUNT", b"%d" % NAMES_PER_SCAN
                )
                cursor, keys = await self.client.ask(port, command, parse=_page, key=node)
                ranges = [
                    (key, pack(b"GETRANGE", key, b"0", b"%d" % MAX_LISTED_BYTES)) for key in keys
                ]
                records = await self.client.ask_each(port, ranges) if ranges else []
                whole = whole and all(len(_bytes(one)) <= MAX_LISTED_BYTES for one in records)
                found += [
                    (f"{self._namespace}:{decoded(key[len(self._prefix) :])}", record)
                    for key, record in zip(keys, records, strict=True)
                    if len(record) <= MAX_LISTED_BYTES
                ]
        return found, whole

    async def drop(self, port: Port, name: str) -> bool:
        """Drop a name; True if it was stored."""
        key = self._lookups.key(name)
        return bool(
            await self.client.ask(port, pack(b"UNLINK", key), parse=int, key=key, writes=True)
        )

    async def clear(self, port: Port, prefix: str) -> int:
        """Drop every entry whose name begins with `prefix`; scans all names, in steps.

        Payloads and generations under such a prefix are dropped too, but not counted.  The group of
        the namespace stays, since a host may restore the others; so do leases, own changes and the
        live configuration.
        """
        kept: tuple[bytes, ...] = self._kept
        uncounted = self._payloads, self._groups
        if self._groups.startswith(self._lookups.key(prefix)):
            kept = (self._group_key("n"), *(start for start in kept if start != self._groups))
            self._lives.clear()
        pattern = _GLOB_SPECIALS.sub(r"\\\1", self._lookups.key(prefix).decode()).encode() + b"*"
        dropped = 0
        for node in await self.client.nodes(port):
            cursor = None
            while cursor != b"0":
                command = pack(
                    b"SCAN", cursor or b"0", b"MATCH", pattern, b"COUNT", b"%d" % NAMES_PER_SCAN
                )
                cursor, names = await self.client.ask(port, command, parse=_page, key=node)
                if names := [name for name in names if not name.startswith(kept)]:
                    await self.client.ask_each(
                        port, [(name, pack(b"UNLINK", name)) for name in names], writes=True
                    )
                    dropped += sum(not name.startswith(uncounted) for name in names)
        if self.payload_store is not None and self._payloads.startswith(self._lookups.key(prefix)):
            await port.offload(self.payload_store.clear)
        return dropped

    def _payload_name(self, digest: bytes) -> bytes:
        return self._payloads + digest.hex().encode()

    # --- generations -----------------------------------------------------------------------------

    def set_up_recovery(self, restore: RestoreGroups, tombstone_life: float | None) -> None:
        """See `memo.stores.protocols.ServerTier.set_up_recovery`."""
        self._restore_groups = restore
        self._tombstone_life = TOMBSTONE_SECONDS if tombstone_life is None else tombstone_life

    async def states(self, port: Port, refs: Sequence[Ref]) -> list[State]:
        """Read each ref: one round trip, two if parts were invalidated lately."""
        states = await self._lookups.read(port, refs)
        if LOST in states and await self._restore_missing(port, refs, states):
            states = await self._lookups.read(port, refs)
        return states

    async def _restore_missing(
        self, port: Port, refs: Sequence[Ref], states: Sequence[State]
    ) -> bool:
        """Restore missing groups from this host, if it may; True if there were any."""
        if self._restore_groups is None or self.read_only:
            return False
        pairs = zip(refs, states, strict=True)
        missing = dict.fromkeys(ref.group for ref, state in pairs if state == LOST)
        return await self._restore_groups(port, list(missing))

    async def stamp_states(self, port: Port, refs: Sequence[Ref]) -> list[State]:
        """Like `states`, but create missing groups, and let every group live for at least a day.

        If Redis takes no writes, a missing group reads `LOST`.
        """
        try:
            states = await self.states(port, refs)
        except TierError as error:
            if error.kind != "WRONGTYPE":
                raise
            states = [LOST] * len(refs)
        missing = self._missing(refs, states)
        if not missing:
            return states
        try:
            await self._create_missing(port, sorted(missing))
        except TierError:
            if self.read_only or LOST not in states:
                return states
            raise
        return await self.states(port, refs)

    def stamp_states_in(self, lookup: Lookup) -> list[State] | None:
        """See `memo.stores.protocols.ServerTier.stamp_states_in`."""
        assert isinstance(lookup, RecordLookup)
        states = lookup.states()
        return None if states is None or self._missing(lookup.refs, states) else list(states)

    def _missing(self, refs: Sequence[Ref], states: Sequence[State]) -> set[str]:
        """Return the groups that `stamp_states` creates, or whose life it extends."""
        soon, missing = time.monotonic() + MIN_GROUP_SECONDS / 2, set()
        for (group, _), state in zip(refs, states, strict=True):
            lasts = group.startswith("t:") or self._lives.get(group, 0.0) >= soon
            if state == LOST or not lasts:  # most functions have few groups besides those of tags
                missing.add(group)
        return missing

    async def _create_missing(self, port: Port, groups: Sequence[str]) -> None:
        life = b"%d" % _milliseconds(MIN_GROUP_SECONDS)
        tokens = [stamps.token().encode()] * len(groups)  # equal tokens compress well in stamps
        keys = [self._group_key(group) for group in groups]
        now = time.monotonic()
        try:
            calls = [
                ((key,), (token, life, b"1" if not group.startswith("t:") else b"", b"*"))
                for key, token, group in zip(keys, tokens, groups, strict=True)
            ]
            made = [
                bool(answer[0]) for answer in await self.client.run_each(port, CREATE_GROUP, calls)
            ]
        except NoScriptsError:
            commands: list[Command] = []
            for key, token in zip(keys, tokens, strict=True):
                commands += [
                    (key, pack(b"HSETNX", key, b"*", token)),
                    (key, pack(b"PTTL", key)),
                ]
            answers = await self.client.ask_each(port, commands, writes=True)
            made = [bool(one) for one in answers[::2]]
            await self._set_lives(
                port,
                [
                    (key, life)
                    for key, group, new, left in zip(keys, groups, made, answers[1::2], strict=True)
                    if new or left < (0 if group.startswith("t:") else int(life))
                ],
            )
        for group, new in zip(groups, made, strict=True):
            self._note_expiry(
                group, now + MIN_GROUP_SECONDS if new or not group.startswith("t:") else 0.0
            )
            if new:
                self._created = self._created if len(self._created) < MAX_KNOWN_LIFETIMES else set()
                self._created.add(group)

    async def census(self, port: Port, host: str, epoch: str) -> Census:
        """See `memo.stores.protocols.ServerTier.census`.

        If only the epoch is missing, and not the generations, it was evicted: it is restored.
        """
        key, field, count = self._hosts, b"h:" + host.encode(), b"n:" + host.encode()
        whole = self._group_key("n")
        now = int(time.time())
        commands = [
            (key, pack(b"HINCRBY", key, count, b"1")),
            (key, pack(b"HSET", key, field, b"%d" % now)),
            (key, pack(b"PEXPIRE", key, b"%d" % _milliseconds(DEFAULT_RETENTION))),
            (key, pack(b"HGETALL", key)),
            (whole, pack(b"EXISTS", whole)),
        ]
        times, _, _, flat, there = await self.client.ask_each(port, commands, writes=True)
        fields: dict[str, str] = self.client.parse_answer(_fields, flat)
        evicted = "epoch" not in fields
        if evicted:
            value = epoch if epoch and there else f"{stamps.token()}{time.time():.0f}"
            made = [
                (key, pack(b"HSETNX", key, b"epoch", value.encode())),
                (key, pack(b"HGET", key, b"epoch")),
            ]
            _, found = await self.client.ask_each(port, made, writes=True)
            fields["epoch"] = decoded(_bytes(found))
        giver = fields.get("giver", "")
        others = {name: _number(seen) for name, seen in fields.items() if name.startswith("h:")}
        others.pop(field.decode())
        if gone := [
            name for name, seen in others.items() if seen < time.time() - HOST_ABSENT_SECONDS
        ]:
            counts = (f"n:{name[2:]}" for name in gone)
            command = pack(b"HDEL", key, *map(str.encode, (*gone, *counts)))
            await self.client.ask(port, command, parse=int, key=key, writes=True)
        made_at = _number(fields["epoch"][stamps.TOKEN_CHARACTERS :])
        was_restored = giver not in ("", host)
        times = None if evicted else int(times)
        return Census(fields["epoch"], made_at, len(others), was_restored, times, now)

    async def record_restoring(self, port: Port, host: str) -> None:
        """See `memo.stores.protocols.ServerTier.record_restoring`."""
        key = self._hosts
        command = (
            pack(b"HSET", key, b"giver", host.encode()) if host else pack(b"HDEL", key, b"giver")
        )
        await self.client.ask(port, command, parse=int, key=key, writes=True)

    async def seed(self, port: Port, groups: Mapping[str, Mapping[str, str]]) -> None:
        """See `memo.stores.protocols.ServerTier.seed`; does nothing without scripts."""
        calls = []
        for group, fields in groups.items():
            words = [encoded(word) for p in fields.items() for word in p]
            calls.append(
                ((self._group_key(group),), (b"%d" % _milliseconds(MIN_GROUP_SECONDS), *words))
            )
            self._created.discard(group)
            self._note_expiry(group, time.monotonic() + MIN_GROUP_SECONDS)
        with suppress(NoScriptsError):
            await self.client.run_each(port, SEED, calls)

    async def turn(self, port: Port, turns: Sequence[Turn], note: str) -> None:
        """Invalidate; each group in one step, and `TAGS` before any tag."""
        first = [turn for turn in turns if turn.group == stamps.TAGS]
        if 0 < len(first) < len(turns):
            await self.turn(port, first, note)
            turns = [turn for turn in turns if turn.group != stamps.TAGS]
        tombstone_life = b"%d" % _milliseconds(self._tombstone_life)
        bounds = (
            b"%d" % stamps.MAX_GROUP_FIELDS,
            tombstone_life,
            b"%d" % generations.MAX_GROUP_SHAPES,
        )
        calls = []
        for turn in turns:
            value = (stamps.token_for(turn, note) + note).encode()
            shape, field = stamps.shape(turn.arguments), stamps.field(turn.arguments)
            words = (shape.encode(), field.encode(), value, *bounds)
            calls.append(((self._group_key(turn.group),), words))
        try:
            await self.client.run_each(port, TURN, calls)
        except NoScriptsError:
            await self._turn_whole_groups(port, turns, note, tombstone_life)

    async def _turn_whole_groups(
        self, port: Port, turns: Sequence[Turn], note: str, tombstone_life: bytes
    ) -> None:
        """Invalidate without scripts, each group by one HSET, which is atomic.

        Other fields of a group stay, since to delete them is another step; no earlier state can
        hold, as `*` is new.
        """
        commands: list[Command] = []
        for group in generations.by_group(turns):
            key = self._group_key(group)
            write = generations.change_for({}, Turn(group), note).write
            words = [encoded(word) for pair in write.items() for word in pair]
            commands += [(key, pack(b"HSET", key, *words)), (key, pack(b"PTTL", key))]
        times = (await self.client.ask_each(port, commands, writes=True))[1::2]
        keys = [key for key, _ in commands[1::2]]
        await self._set_lives(
            port,
            [(key, tombstone_life) for key, left in zip(keys, times, strict=True) if left < 0],
        )

    async def notes(self, port: Port, ref: Ref) -> list[tuple[str, str]]:
        """Return (field, note) of every invalidation that affects a ref."""
        key = self._group_key(ref.group)
        fields = await self.client.ask(port, pack(b"HGETALL", key), parse=_fields, key=key)
        return generations.notes_for(fields, ref)

    # --- own changes of functions ----------------------------------------------------------------

    async def own_changes(self, port: Port, name: str) -> dict[str, str]:
        """Return the own changes that all hosts have stored under a name.

        Raises:
            TierError: they cannot be read.
        """
        key = self._own_changes + encoded(name)
        return await self.client.ask(port, pack(b"HGETALL", key), parse=_fields, key=key)

    async def add_own_changes(self, port: Port, name: str, own_changes: Mapping[str, str]) -> None:
        """Add own changes not stored yet; all under the name live for `DEFAULT_RETENTION`.

        Raises:
            TierError: they could not be written.
        """
        key = self._own_changes + encoded(name)
        commands = [pack(b"HSETNX", key, encoded(n), encoded(v)) for n, v in own_changes.items()]
        commands.append(pack(b"PEXPIRE", key, b"%d" % _milliseconds(DEFAULT_RETENTION)))
        await self.client.ask_each(port, [(key, one) for one in commands], writes=True)

    # --- the live configuration ------------------------------------------------------------------

    def live(self) -> dict[str, str]:
        """Return the shared live configuration; blocks for at most a deadline.

        Raises:
            TierError: it cannot be read.
        """
        command, key = pack(b"HGETALL", self._live), self._live
        client = self.client
        found = client.run_blocking(lambda port: client.ask(port, command, parse=_fields, key=key))
        if found and time.monotonic() > self._live_kept + LIVE_EXTENSION_SECONDS:
            self._live_kept = time.monotonic()
            with suppress(TierError):  # its life is long enough
                self._write_live()
        return found

    def publish(self, key: str, text: str | None) -> None:
        """Set or delete a key of the shared live configuration; blocks as `live`.

        Raises:
            TierError: it could not be written.
        """
        words: tuple[bytes, ...] = (b"HDEL", self._live, key.encode())
        if text is not None:
            words = (b"HSET", *words[1:], text.encode())
        self._write_live(pack(*words))

    def _write_live(self, *commands: bytes) -> None:
        """Send commands for the live configuration; it then lives for `DEFAULT_RETENTION`."""
        client, live = self.client, self._live
        lasts = pack(b"PEXPIRE", live, b"%d" % _milliseconds(DEFAULT_RETENTION))
        all_of_it = [(live, command) for command in (*commands, lasts)]
        client.run_blocking(lambda port: client.ask_each(port, all_of_it, writes=True))

    # --- housekeeping ----------------------------------------------------------------------------

    async def health(self, port: Port) -> Mapping[str, Any]:
        """Return facts about the server, even while the breaker is open.

        Returns:
            `up`, `where`, `breaker` (`"open"` or `"closed"`); if it is up `version`, `used` and
            `limit` (bytes of memory; 0: no limit), `policy` (of eviction), `names` (number of keys
            in this database); else `error`.  With `tracking`: `tracking`, `"listening"` or
            `"strict (why)"`.
        """
        facts = await self._facts_of_server(port)
        if self.listener is not None:
            if facts["up"] and not self.listener.listening:
                await port.offload(self.listener.wait, self.client.deadline)
            facts["tracking"] = self.listener.state
        return facts

    async def _facts_of_server(self, port: Port) -> dict[str, Any]:
        try:
            facts, names = await self.client.ask_while_open(
                port, pack(b"INFO"), pack(b"DBSIZE"), parse=_facts, replies=2
            )
        except TierError as error:
            fault = self.client.breaker.fault
            fix = "" if fault is None else fault.fix
            answers = error.kind in ("NOPERM", "UNKNOWN")  # this user may not read the figures
            state = {"up": answers, "where": self.client.where, "breaker": self._breaker()}
            return state if answers else {**state, "error": str(error), "fix": fix}
        return {
            "up": True,
            "breaker": self._breaker(),
            "where": self.client.where,
            "version": facts.get("valkey_version") or facts.get("redis_version", "?"),
            "used": int(facts.get("used_memory", 0)),
            "limit": int(facts.get("maxmemory", 0)),
            "policy": facts.get("maxmemory_policy", "?"),
            "names": names,
        }

    async def capabilities(self, port: Port) -> dict[str, str]:
        """Try what sharing needs; return for each capability `""`, or why it fails.

        It uses names of its own, which expire within a minute.
        """
        name, group = f"{self._namespace}:{{memo doctor}}:probe", "f:memo doctor"
        tried: dict[str, Callable[[], Coroutine[Any, Any, Any]]] = {
            "write": lambda: self._set_record(
                port, self._lookups.key(name), b"probe", EXTRA_GROUP_SECONDS
            ),
            "read": lambda: self.lookup(port, name),
            "script": lambda: self.client.runs_scripts(port),
            "lease": lambda: self._try_lease(port, name),
            "invalidation": lambda: self._try_turn(port, group),
        }
        store = self.payload_store
        if store is not None:
            tried["payload store"] = lambda: port.offload(store.probe)
        outcome = {}
        for capability, work in tried.items():
            try:
                outcome[capability] = "it is forbidden" if await work() is False else ""
            except TierError as error:
                outcome[capability] = str(error)
        return outcome

    async def _try_lease(self, port: Port, name: str) -> bool:
        holder = stamps.token()
        other = await self.leases.acquire(port, name, holder)
        return other is not None or await self.leases.release(port, name, holder)

    async def _try_turn(self, port: Port, group: str) -> bool:
        refs = [Ref(group)]
        before = await self.stamp_states(port, refs)
        await self.turn(port, [Turn(group)], "{}")
        after = await self.states(port, refs)
        key = self._group_key(group)
        command = pack(b"PEXPIRE", key, b"%d" % _milliseconds(EXTRA_GROUP_SECONDS))
        await self.client.ask(port, command, parse=int, key=key, writes=True)
        return LOST not in (*before, *after) and before != after

    def _breaker(self) -> str:
        return "open" if self.client.breaker.open else "closed"

    def close(self) -> None:
        """Close all connections; they are opened again when the tier is used again."""
        self._close_others()
        self.client.close()

    async def aclose(self) -> None:
        """Like `close`, and wait until those of the running loop are closed."""
        import asyncio

        await asyncio.to_thread(self._close_others)
        await self.client.aclose()

    def _close_others(self) -> None:
        """Close the listener and other separate connections.

        Waits for at most two deadlines each.
        """
        if self.listener is not None:
            self.listener.close()
        if self.payload_store is not None:
            self.payload_store.close()
        self.leases.close()


def _set_command(name: bytes, size: int, *words: bytes) -> tuple[bytes, bytes]:
    """Return the parts of a SET command before and after its value of `size` bytes."""
    head = b"*%d\r\n$3\r\nSET\r\n$%d\r\n%s\r\n$%d\r\n" % (3 + len(words), len(name), name, size)
    return head, b"\r\n" + pack(*words).partition(b"\r\n")[2]


# Parsers of replies: each raises if the reply has another form.


def _fields(flat: list[Any]) -> dict[str, str]:
    return dict(zip(map(decoded, flat[::2]), map(decoded, flat[1::2]), strict=True))


def _page(answer: list[Any]) -> tuple[bytes, list[bytes]]:
    cursor, names = answer
    return _bytes(cursor), [_bytes(name) for name in names]


def _facts(answers: list[Any]) -> tuple[dict[str, str], int]:
    info, names = answers
    lines = (line.partition(":") for line in decoded(info).splitlines())
    return {name: value for name, _, value in lines}, int(names)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


def _check_ok(answer: Any) -> None:
    if answer != b"OK":
        raise ValueError("not confirmed")


def _parse_set(answer: Any) -> bool:
    if answer not in (b"OK", None):
        raise ValueError("not confirmed")
    return answer is not None


def _bytes(answer: Any) -> bytes:
    if not isinstance(answer, bytes):
        raise TypeError("not bytes")
    return answer


def _milliseconds(seconds: float) -> int:
    return max(1, int(min(seconds * 1000, _MAX_LIFETIME_MS)))
