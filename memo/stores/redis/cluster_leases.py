"""Cluster leases: one computation per key among all hosts, with the lease stored in Redis.

A lease is a key with its holder's unique text; it expires `LEASE_SECONDS` after its last renewal.
Rules of this module:

1.  It is renewed, handed over and released by compare-and-set only.
2.  An acquisition whose answer was lost (a timeout, a cancelled task) is undone, at once or when
    Redis is back, so there are no orphans.
3.  Releasing a lease rings its *bell*, a list with one element that waiting processes move onto
    itself: each of them is woken once.  The next holder removes the bell.
4.  A holder that dies rings no bell: waiting processes check the lease when it should expire, and
    every second.
"""

from __future__ import annotations

import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from memo.errors import TierError
from memo.runtime.port import Port
from memo.stores.protocols import LEASE_SECONDS
from memo.stores.redis.client import Client
from memo.stores.redis.scripts import ACQUIRE, RELEASE, RENEW
from memo.stores.redis.transport.exchange import BusyError
from memo.stores.redis.transport.resp import command_bytes, pack

if TYPE_CHECKING:
    from memo.stores.redis.lookups import RecordLookup

LEASE_CHECK_SECONDS = 1.0
"""Seconds after which a waiting process checks the lease, in case its holder has died."""
EARLY_LEASE_CHECK_SECONDS = 0.05
"""Seconds after which a waiter that found no connection to wait on checks the lease."""
BELL_LIFE_SECONDS = 5.0
"""Seconds for which a bell stays, for processes that begin to wait late."""
_UNDO_SECONDS = (0.0, 0.5)
"""Seconds after which a lost acquisition is undone: at once, and again in case it arrived later."""
UNDO_RETRY_SECONDS = 0.25
"""Seconds after which this is tried again if it failed, even if other commands work before."""


class RedisLeases:
    """The leases of a namespace on one Redis.

    Args:
        client: the client of that Redis.
        prefix: put in front of all names.
        lease: seconds that a lease lives without renewal.
    """

    def __init__(self, client: Client, prefix: bytes, lease: float = LEASE_SECONDS) -> None:
        self.lease = lease
        self._client = client
        self.life = b"%d" % int(lease * 1000)
        self._bell_life = b"%d" % int(BELL_LIFE_SECONDS * 1000)
        self._lease_prefix = prefix + b"l:"
        self._bell_prefix = prefix + b"w:"
        self.orphans: set[tuple[str, str]] = set()
        self._undoing: set[threading.Thread] = set()
        self._retry_at = self._scheduled_retry = 0.0
        self._closing = threading.Event()
        client.on_recover.append(self._retry_orphans)

    @property
    def prefixes(self) -> tuple[bytes, bytes]:
        """The prefixes of the keys of leases and bells."""
        return self._lease_prefix, self._bell_prefix

    async def acquire(
        self, port: Port, name: str, holder: str, lookup: RecordLookup | None = None
    ) -> tuple[str, float] | None:
        """Take a lease if it is free.

        Args:
            port: the caller's port.
            name: the name of the lease.
            holder: text unique to the caller; a caller that has the lease keeps it.
            lookup: a lookup to send in the same exchange; in a cluster, where its keys may be on
                another server, its answer stays None.

        Returns:
            None if the caller has the lease now; else the text of the current holder and the
            seconds until its lease expires.

        Raises:
            TierError: the holder is not known.
        """
        keys, words = self._keys(name), (holder.encode(), self.life)
        try:
            if lookup is None or self._client.clustered:
                return await self._client.run(port, ACQUIRE, keys, *words, parse=_parse_holder)
            then = command_bytes(lookup.commands)
            replies = await self._client.run(port, ACQUIRE, keys, *words, parse=list, then=then)
            lookup.answer = replies[1:]
            return self._client.parse_answer(_parse_holder, replies[0])
        except BaseException:
            self._undo(name, holder)
            raise

    async def renew(self, port: Port, name: str, holder: str) -> bool:
        """Extend a lease; False if the holder has lost it."""
        return await self.replace(port, name, holder, holder)

    async def replace(self, port: Port, name: str, old: str, new: str) -> bool:
        """Hand a lease over with a full life; False if `old` does not hold it."""
        words = (old.encode(), new.encode(), self.life)
        return await self._client.run(port, RENEW, self._keys(name)[:1], *words, parse=_parse_flag)

    async def release(self, port: Port, name: str, holder: str) -> bool:
        """Release a lease and wake all waiting processes; False if the holder had lost it."""
        try:
            return await self._release((name, holder), port)
        except BaseException:
            self._undo(name, holder)
            raise

    async def _release(self, held: tuple[str, str], port: Port) -> bool:
        name, holder = held
        words = (holder.encode(), self._bell_life)
        return await self._client.run(port, RELEASE, self._keys(name), *words, parse=_parse_flag)

    async def wait(self, port: Port, name: str, timeout: float) -> None:
        """Wait until a lease may be free: it was released, or `timeout` or one second passed.

        Raises:
            TierError: waiting is not possible, so the caller computes without a lease.
        """
        seconds = min(max(timeout, 0.01), LEASE_CHECK_SECONDS)
        bell = self._keys(name)[1]
        command = pack(b"BLMOVE", bell, bell, b"LEFT", b"RIGHT", b"%.3f" % seconds)
        deadline = seconds + self._client.deadline
        try:
            await self._client.ask(
                port, command, parse=bool, key=bell, seconds=deadline, writes=True, blocks=True
            )
        except BusyError:  # too many callers wait already: poll instead of queueing
            await port.sleep(min(seconds, EARLY_LEASE_CHECK_SECONDS))

    def _keys(self, name: str) -> tuple[bytes, bytes]:
        lease = name.encode() if "{" in name else f"{{{name}}}".encode()
        return self._lease_prefix + lease, self._bell_prefix + lease

    def _undo(self, name: str, holder: str) -> None:
        """Release a lease that this holder may have taken without knowing it."""
        self.orphans.add((name, holder))
        self._release_orphans()

    def _retry_orphans(self) -> None:
        """Release orphans, `UNDO_RETRY_SECONDS` after the last attempt began."""
        retry_at, delay = self._retry_at, self._retry_at - time.monotonic()
        if delay <= 0 or self._scheduled_retry != retry_at:
            self._scheduled_retry = retry_at
            self._release_orphans(max(0.0, delay))

    def _release_orphans(self, delay: float = 0.0) -> None:
        """Release orphans in a thread, which outlives a cancelled task and a closed loop."""
        if not self.orphans:
            return
        thread = threading.Thread(
            target=self._undo_orphans, args=(self._closing, delay), name="memo-undo"
        )
        try:
            thread.start()
        except RuntimeError:  # the interpreter is shutting down; the lease expires by itself
            return
        self._undoing.add(thread)

    def _undo_orphans(self, closing: threading.Event, delay: float) -> None:
        closing.wait(delay)
        orphans = list(self.orphans)
        try:
            for seconds in _UNDO_SECONDS:
                closing.wait(seconds)
                self._retry_at = time.monotonic() + UNDO_RETRY_SECONDS
                for orphan in orphans:
                    self._client.run_blocking(partial(self._release, orphan))
            self.orphans.difference_update(orphans)
        except TierError:
            return  # the breaker has recorded it; `_retry_orphans` is called when it closes
        finally:
            self._undoing.discard(threading.current_thread())

    def close(self) -> None:
        """Wait for leases that are being released, for at most two deadlines."""
        closing, self._closing = self._closing, threading.Event()
        closing.set()
        for thread in list(self._undoing):
            thread.join(2 * self._client.deadline)


def _parse_holder(answer: list[Any]) -> tuple[str, float] | None:
    if not answer:
        return None
    left = int(answer[1])  # negative: it does not expire
    return answer[0].decode("utf-8", "replace"), left / 1000 if left >= 0 else LEASE_CHECK_SECONDS


def _parse_flag(answer: Any) -> bool:
    return bool(int(answer))
