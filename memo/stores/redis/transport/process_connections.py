"""The connections of a process to one Redis: those of its threads, and those of each event loop.

redis-py is imported with the first of them, which takes half a second.
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections.abc import Mapping
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from memo.runtime import fork
from memo.runtime.port import Port
from memo.settings.redis_urls import Address
from memo.stores.redis.transport.coalescing import Owner

if TYPE_CHECKING:
    from memo.stores.redis.transport.loop_connections import LoopConnections
    from memo.stores.redis.transport.thread_connections import ThreadConnections

_LOOP_CONNECTIONS = "memo.stores.redis.transport.loop_connections"


class ProcessConnections:
    """The connections of this process to one Redis; a forked child opens its own.

    Args:
        address: the address of the server.
        options: arguments of redis-py's clients, beyond those in the address.
        owner: the client, referenced weakly: when it is collected, all connections are closed.

    Attributes:
        loops: event loop -> its connections.
    """

    def __init__(self, address: Address, options: Mapping[str, Any], owner: Owner) -> None:
        self._address = address
        self._options = dict(options)
        self._owner = weakref.proxy(owner)
        self._reset()
        fork.renew_in_child(self)

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._threads: dict[bool, ThreadConnections] = {}
        self.loops: dict[Any, LoopConnections] = {}

    def of_threads(self, *, blocks: bool = False) -> ThreadConnections:
        """Return the connections of threads.

        Args:
            blocks: those for commands that wait at the server.
        """
        return self._threads.get(blocks) or self._create_threads(blocks)

    def _create_threads(self, blocks: bool) -> ThreadConnections:
        from memo.stores.redis.transport.thread_connections import ThreadConnections

        with self._lock:
            if blocks not in self._threads:
                new = ThreadConnections(self._address, self._options, self._owner)
                self._threads[blocks] = new
                # before the collector reaches their sockets, and if work opened them after `close`
                weakref.finalize(self, _close_here, new, os.getpid()).atexit = False
            return self._threads[blocks]

    async def of_loop(self, port: Port) -> LoopConnections:
        """Return the connections of the running event loop.

        Raises:
            Exception: any error of redis-py, for `fault_of`.
        """
        where = port.loop
        known = self.loops.get(where)
        if known is not None:
            return known
        if not hasattr(sys.modules.get(_LOOP_CONNECTIONS), "LoopConnections"):
            await port.offload(import_module, _LOOP_CONNECTIONS)
        from memo.stores.redis.transport.loop_connections import LoopConnections

        with self._lock:
            for key, loop in list(self.loops.items()):
                if loop.loop.is_closed():
                    loop.forget()
                    del self.loops[key]
            if where not in self.loops:
                ended = partial(self.loops.pop, where, None)
                new = LoopConnections(self._address, self._options, self._owner, ended)
                self.loops[where] = new
            return self.loops[where]

    def reconnect(self) -> None:
        """After a fault, connect again before the next exchange: roles may have changed."""
        for threads in list(self._threads.values()):
            threads.reconnect()
        for loop in list(self.loops.values()):
            loop.reconnect_soon()

    def flush(self) -> None:
        """Close the idle connections of threads: one of them may hold unexpected data."""
        for threads in list(self._threads.values()):
            threads.flush()

    def close(self) -> None:
        """Close all connections: those of threads now, those of loops as soon as each loop can."""
        for loop in self._close_threads():
            loop.close()

    async def aclose(self) -> None:
        """Like `close`, and wait until those of the running loop are closed."""
        import asyncio

        for loop in self._close_threads():
            if loop.loop is asyncio.get_running_loop():
                await loop.aclose()
            else:
                loop.close()

    def _close_threads(self) -> list[LoopConnections]:
        """Close the connections of threads, and return those of loops, which are left to close."""
        with self._lock:
            threads, loops = list(self._threads.values()), list(self.loops.values())
            self._threads, self.loops = {}, {}
        for one in threads:
            one.close()
        return loops

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self.close()

    def after_fork(self) -> None:
        _inherited.append((self._threads, self.loops))
        self._reset()


def _close_here(threads: ThreadConnections, process: int) -> None:
    """Close connections, but those that were inherited: that would disturb the parent."""
    if os.getpid() == process:
        threads.close()


_inherited: list[Any] = []
"""Connections inherited from a parent process: closing them here would disturb the parent."""
