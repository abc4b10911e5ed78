"""Cluster leases: those of `leases`, kept in Redis.

A lease is a key that holds the text of its holder, unique to it, and that expires
`LEASE` seconds after its last renewal.  Rules of this module:

1.  It is renewed, handed on and given back by compare-and-set only.
2.  An acquisition whose answer was lost (a time-out, a cancelled task) is taken back, at once or
    when Redis is back: no orphan.
3.  Releasing a lease rings its *bell*, a list with one element that waiting processes move
    onto itself: each of them is woken, once.  The next holder takes the bell away.
4.  A holder that died rings no bell: waiting processes look again when its lease ends, and every
    second.
"""

from __future__ import annotations

import threading
from functools import partial
from typing import TYPE_CHECKING, Any

from memo.errors import TierError
from memo.runtime.port import Port
from memo.stores.protocols import LEASE
from memo.stores.redis.client import ACQUIRE, RELEASE, RENEW, Client
from memo.stores.redis.exchange import BusyError, pack, packed

if TYPE_CHECKING:
    from memo.stores.redis.redis_tier import AskedRecord

LOOK_EVERY = 1.0
"""Seconds after which a waiting process looks again, in case the holder died."""
LOOK_SOON = 0.05
"""Seconds after which a waiter looks again that found no connection to wait on."""
RING = 5.0
"""Seconds for which a process that comes late can still hear a bell."""
_UNDO_AFTER = (0.0, 0.5)
"""Seconds after which a lost acquisition is taken back: at once, and again in case it overtook."""


class RedisLeases:
    """The leases of a namespace on one Redis.

    Args:
        client: the way to it.
        prefix: in front of all names.
        lease: seconds that a lease lives.
    """

    def __init__(self, client: Client, prefix: bytes, lease: float = LEASE) -> None:
        self.lease = lease
        self._client = client
        self.lives = b"%d" % int(lease * 1000)
        self._rings = b"%d" % int(RING * 1000)
        self._lease_prefix = prefix + b"l:"
        self._bell_prefix = prefix + b"w:"
        self.orphans: set[tuple[str, str]] = set()
        self._undoing: set[threading.Thread] = set()
        self._closing = threading.Event()
        client.on_recover.append(self._adopt)

    @property
    def prefixes(self) -> tuple[bytes, bytes]:
        """Prefixes of the names of leases and bells."""
        return self._lease_prefix, self._bell_prefix

    async def acquire(
        self, port: Port, name: str, holder: str, question: AskedRecord | None = None
    ) -> tuple[str, float] | None:
        """Take a lease.

        Args:
            port: the caller's.
            name: of the lease.
            holder: text unique to the caller; a caller that has the lease keeps it.
            question: is asked in the same exchange, behind the lease, where that goes to one
                server; else its answer stays None.

        Returns:
            None when the caller has it now; else the text of the present holder and the seconds
            that its lease still has.

        Raises:
            TierError: the holder is not known.
        """
        keys, words = self._keys(name), (holder.encode(), self.lives)
        try:
            if question is None or self._client.clustered:
                return await self._client.run(port, ACQUIRE, keys, *words, parse=_holder)
            then = packed(question.commands)
            replies = await self._client.run(port, ACQUIRE, keys, *words, parse=list, then=then)
            question.answer = replies[1:]
            return self._client.parsed(_holder, replies[0])
        except BaseException:
            self._undo(name, holder)
            raise

    async def renew(self, port: Port, name: str, holder: str) -> bool:
        """Let a lease live on; False when the holder does not have it any more."""
        return await self.replace(port, name, holder, holder)

    async def replace(self, port: Port, name: str, old: str, new: str) -> bool:
        """Hand a lease on, with a full life; False when `old` does not have it."""
        words = (old.encode(), new.encode(), self.lives)
        return await self._client.run(port, RENEW, self._keys(name)[:1], *words, parse=_whether)

    async def release(self, port: Port, name: str, holder: str) -> bool:
        """Release a lease and wake all waiting processes; False when the holder did not have it."""
        try:
            return await self._release((name, holder), port)
        except BaseException:
            self._undo(name, holder)
            raise

    async def _release(self, held: tuple[str, str], port: Port) -> bool:
        name, holder = held
        words = (holder.encode(), self._rings)
        return await self._client.run(port, RELEASE, self._keys(name), *words, parse=_whether)

    async def wait(self, port: Port, name: str, timeout: float) -> None:
        """Wait until a lease may be free: it was given back, or `timeout` or a second went by.

        Raises:
            TierError: waiting is not possible; the caller computes without a lease.
        """
        seconds = min(max(timeout, 0.01), LOOK_EVERY)
        bell = self._keys(name)[1]
        command = pack(b"BLMOVE", bell, bell, b"LEFT", b"RIGHT", b"%.3f" % seconds)
        deadline = seconds + self._client.deadline
        try:
            await self._client.ask(
                port, command, parse=bool, key=bell, seconds=deadline, writes=True, blocks=True
            )
        except BusyError:  # too many wait already: look again soon, rather than queue
            await port.sleep(min(seconds, LOOK_SOON))

    def _keys(self, name: str) -> tuple[bytes, bytes]:
        lease = name.encode() if "{" in name else f"{{{name}}}".encode()
        return self._lease_prefix + lease, self._bell_prefix + lease

    def _undo(self, name: str, holder: str) -> None:
        """Give back a lease that this holder may own without knowing it."""
        self.orphans.add((name, holder))
        self._adopt()

    def _adopt(self) -> None:
        """Give orphans back in a thread, which outlives a cancelled task and a loop that ends."""
        if not self.orphans:
            return
        thread = threading.Thread(target=self._give_back, args=(self._closing,), name="memo-undo")
        try:
            thread.start()
        except RuntimeError:  # the interpreter is going down; the lease ends by itself
            return
        self._undoing.add(thread)

    def _give_back(self, closing: threading.Event) -> None:
        orphans = list(self.orphans)
        try:
            for seconds in _UNDO_AFTER:
                closing.wait(seconds)
                for orphan in orphans:
                    self._client.here(partial(self._release, orphan))
            self.orphans.difference_update(orphans)
        except TierError:
            return  # the breaker knows; when it closes this is done again
        finally:
            self._undoing.discard(threading.current_thread())

    def close(self) -> None:
        """Wait for leases that are being given back, for two deadlines at most."""
        closing, self._closing = self._closing, threading.Event()
        closing.set()
        for thread in list(self._undoing):
            thread.join(2 * self._client.deadline)


def _holder(answer: list[Any]) -> tuple[str, float] | None:
    if not answer:
        return None
    left = int(answer[1])  # negative: without an end
    return answer[0].decode("utf-8", "replace"), left / 1000 if left >= 0 else LOOK_EVERY


def _whether(answer: Any) -> bool:
    return bool(int(answer))
