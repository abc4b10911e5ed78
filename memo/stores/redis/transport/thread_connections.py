"""Connections that the threads of a process share.

Rules of this module:

1.  A caller waits at most `MIN_OPEN_WAIT_SECONDS` for connecting; after that the connection is for
    the next caller.
2.  At most `MAX_CONNECTIONS` of a process are in use.  If all are busy, a caller waits for one as
    long as an exchange may take, then goes on without Redis.  Commands that wait at the server have
    a separate limit of the same size, and do not wait for a connection.  A thread that opens
    another connection uses one that becomes free meanwhile; if opening takes too long, that is a
    fault of the server only if the server has answered nothing in that time.
3.  A connection that died while idle is replaced once.  Every command of memo may be sent twice.
4.  After a fault the topology of a cluster, and the primary of Sentinels, are queried again.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from redis import exceptions

from memo.errors import TierError
from memo.settings.redis_urls import Address, parse
from memo.stores.redis.transport.exchange import (
    BusyError,
    Exchange,
    WrongSizeError,
    run_exchange,
)
from memo.stores.redis.transport.nodes import (
    BUSY_TEXT,
    MAX_CONNECTIONS,
    MIN_OPEN_WAIT_SECONDS,
    TOPOLOGY_REFRESH_SECONDS,
    Route,
    ThreadNodes,
    slow_step,
    was_renewed,
)

REUSE_SECONDS = 1.0
"""Seconds for which threads reuse a connection without redis-py's pool, which checks it and renews
its login."""
_FREE_CHECK_SECONDS = 0.001
"""Seconds between two checks for a connection that has become free."""
_CLOSED_HERE_TEXT = "the connection was closed here"


class ThreadConnections:
    """Connections that the threads of this process share.

    Args:
        address: the address of the server.
        options: arguments of redis-py's clients, beyond those in the address.
        on_replaced: called when a connection that died while idle was replaced.

    Attributes:
        answers: changes whenever an exchange has succeeded.
        closed: closed for good.
        slow: describes what takes too long if connecting does.
    """

    def __init__(
        self, address: Address, options: dict[str, Any], on_replaced: Callable[[], None]
    ) -> None:
        self._address = address
        self._options = options
        self.on_replaced = on_replaced
        self.slow = slow_step(address)
        self._lock = threading.Lock()
        self._nodes: ThreadNodes | None = None
        self._opening: _Opening | None = None
        self._refreshed = 0.0
        self._is_ready = False
        self.closed = False
        self.answers = 0
        self._kept: dict[Any, list[Any]] = {}

    def nodes(self, seconds: float) -> ThreadNodes:
        """Return the servers; creates their client first, or queries the topology again.

        Args:
            seconds: the caller's deadline; connecting has at least `MIN_OPEN_WAIT_SECONDS`.

        Raises:
            Exception: any error of redis-py, for `fault_of`.
        """
        nodes = self._nodes if self._is_ready else None
        return nodes or self._connected_nodes(b"", seconds)

    def exchange(
        self, route: Route, exchange: Exchange, check: Callable[[], None], *, blocks: bool = False
    ) -> list[Any]:
        """Run an exchange with the server of a route.

        Args:
            check: called after a wait; raises if the exchange is no longer wanted.
            blocks: the command waits at the server.

        Raises:
            BusyError: no connection became free.
            Exception: any error of redis-py, for `fault_of`.
        """
        try:
            nodes = (self._nodes if self._is_ready else None) or self._connected_nodes(
                route, exchange.seconds
            )
            pool = nodes.of(route)
            connection = self._take_connection(pool, exchange.seconds, check, blocks)
            used = connection.used
            try:
                return self._talk(pool, connection, exchange)
            except ConnectionError:
                if not used:
                    raise
            # It may have died while it was idle, and the others that are kept with it.
            self.on_replaced()
            self._release_kept()
            exchange.restart()
            connection = self._take_connection(pool, exchange.seconds, check, blocks)
            return self._talk(pool, connection, exchange)
        except TierError:
            raise
        except Exception:
            if self.closed:
                raise TierError(_CLOSED_HERE_TEXT) from None
            raise

    def _talk(self, pool: Any, connection: Any, exchange: Exchange) -> list[Any]:
        try:
            answer = run_exchange(connection, exchange)
        except BaseException as error:
            connection.disconnect()
            connection.used = False
            pool.release(connection)
            if isinstance(error, WrongSizeError):
                return [False]
            raise
        connection.used = True
        self.answers += 1
        if not self.closed:
            self._kept.setdefault(pool, []).append(connection)
        else:
            connection.disconnect()
            pool.release(connection)
        return answer

    def _take_connection(
        self, pool: Any, seconds: float, check: Callable[[], None], blocks: bool
    ) -> Any:
        """Take a connection of a pool: the last one used, if redis-py has checked it recently.

        Otherwise the first one that is opened, or that another thread returns.
        """
        kept = self._kept.setdefault(pool, [])
        wait = None
        try:
            while True:
                while kept:
                    with contextlib.suppress(IndexError):  # another thread has taken it
                        connection = kept.pop()
                        if time.monotonic() < connection.until:
                            return connection
                        pool.release(connection)
                if wait is None:
                    wait = _Wait(self, pool, seconds, blocks)
                connection = wait.step()
                if connection is not None:
                    return connection
                check()
        finally:
            if wait is not None:
                wait.leave()

    def _release_kept(self) -> None:
        """Give the connections that are kept back to their pools."""
        for pool, connections in list(self._kept.items()):
            while connections:
                with contextlib.suppress(IndexError):
                    pool.release(connections.pop())

    def _connected_nodes(self, route: Route, seconds: float) -> ThreadNodes:
        """Return the servers, with a connection to that of the route ready."""
        for last in (False, True):
            with self._lock:
                if self.closed:
                    raise TierError(_CLOSED_HERE_TEXT)
                opening = self._opening
                mine = opening is None
                if opening is None:
                    opening = self._opening = _Opening(
                        partial(self._open, route), self._end_opening
                    )
            if mine:
                opening.start()
            if not opening.done.wait(max(MIN_OPEN_WAIT_SECONDS, seconds)):
                raise TimeoutError(self.slow)
            if opening.error is None:
                break
            if mine or last:  # an attempt that began earlier may have met a fault that is over
                raise opening.error
        nodes = self._nodes
        if nodes is None:
            raise TierError(_CLOSED_HERE_TEXT)
        return nodes

    def _open(self, route: Route) -> None:
        nodes = self._nodes
        self._release_kept()
        if nodes is None:
            nodes = ThreadNodes(self._address, self._options)
            self._refreshed = time.monotonic()
        elif time.monotonic() - self._refreshed > TOPOLOGY_REFRESH_SECONDS:
            nodes.refresh()
            self._refreshed = time.monotonic()
        pool = nodes.of(route)
        pool.release(pool.get_connection())
        with self._lock:
            if not self.closed:
                self._nodes, self._is_ready = nodes, True
                return
        nodes.close()

    def _end_opening(self) -> None:
        with self._lock:
            self._opening = None

    def reconnect(self) -> None:
        """After a fault, connect again and query the topology before the next exchange."""
        self._is_ready = False

    def flush(self) -> None:
        """Close the idle connections."""
        self._release_kept()
        nodes = self._nodes
        if nodes is not None and nodes.cluster is None:
            nodes.pool.disconnect(inuse_connections=False)

    def close(self) -> None:
        """Close all connections for good, even those in use."""
        with self._lock:
            self.closed = True
            nodes, self._nodes, self._is_ready, self._kept = self._nodes, None, False, {}
        if nodes is not None:
            nodes.close()


class _Wait:
    """A thread's wait for a connection of a pool: until one opens or is returned.

    Args:
        threads: the owner of the pool.
        pool: a pool of redis-py.
        seconds: the caller's deadline.
        blocks: the thread must not wait until one is returned.

    Raises:
        BusyError: all connections are in use, and it must not wait.
    """

    def __init__(self, threads: ThreadConnections, pool: Any, seconds: float, blocks: bool) -> None:
        self._threads = threads
        self._pool = pool
        self._answers = threads.answers
        self._opening = self._start_opening()
        if self._opening is None and blocks:
            raise BusyError(BUSY_TEXT)
        self._ends = time.monotonic() + (
            seconds if self._opening is None else max(MIN_OPEN_WAIT_SECONDS, seconds)
        )

    def step(self) -> Any:
        """Return the connection that was opened; None after `_FREE_CHECK_SECONDS` without one.

        Raises:
            BusyError: none came in time, although the server answers other callers.
            TimeoutError: none came in time.
            Exception: connecting failed.
        """
        if time.monotonic() >= self._ends:
            if self._opening is None or self._threads.answers != self._answers:
                raise BusyError(BUSY_TEXT)
            raise TimeoutError(self._threads.slow)
        opening = self._opening = self._opening or self._start_opening()
        if opening is not None and not opening.done.wait(_FREE_CHECK_SECONDS):
            return None
        if opening is None or isinstance(opening.error, exceptions.MaxConnectionsError):
            time.sleep(_FREE_CHECK_SECONDS)
            return None
        connection = opening.take()
        connection.until = time.monotonic() + REUSE_SECONDS
        if was_renewed(connection):
            self._threads.on_replaced()
        connection.used = getattr(connection, "used", False)
        return connection

    def leave(self) -> None:
        """Stop waiting; a connection that opens now is for the next caller."""
        if self._opening is not None:
            self._opening.leave()

    def _start_opening(self) -> _Opening | None:
        """Let redis-py check a connection or open one; None if all are in use."""
        if len(self._pool._in_use_connections) >= MAX_CONNECTIONS:
            return None
        opening = _Opening(self._pool.get_connection, on_late=self._put_back)
        opening.start()
        return opening

    def _put_back(self, connection: Any) -> None:
        if self._threads.closed:
            connection.disconnect()
        self._pool.release(connection)


class _Opening:
    """A thread that connects; a caller that gives up leaves it running.

    Args:
        work: connects, and returns the result.
        on_end: called when that has ended.
        on_late: called with its result if the caller has left.

    Attributes:
        done: set when it has ended.
        result: the result of `work`.
        error: the error that `work` raised, or None.
    """

    def __init__(
        self,
        work: Callable[[], Any],
        on_end: Callable[[], None] | None = None,
        on_late: Callable[[Any], None] | None = None,
    ) -> None:
        self._work = work
        self._on_end = on_end
        self._on_late = on_late
        self._left = False
        self._lock = threading.Lock()
        self.done = threading.Event()
        self.result: Any = None
        self.error: Exception | None = None

    def start(self) -> None:
        """Start the thread; while the interpreter shuts down, connect in this one."""
        try:
            threading.Thread(target=self._run, name="memo-connect", daemon=True).start()
        except RuntimeError:
            self._run()

    def take(self) -> Any:
        """Return the result, once it is done.

        Raises:
            Exception: connecting failed.
        """
        if self.error is not None:
            raise self.error
        self._on_late = None
        return self.result

    def leave(self) -> None:
        """Stop waiting; a connection that was opened but not taken is for the next caller."""
        with self._lock:
            self._left = True
            if not self.done.is_set():
                return
        self._hand_over()

    def _run(self) -> None:
        try:
            self.result = self._work()
        except Exception as error:
            self.error = error
        if self._on_end is not None:
            self._on_end()
        with self._lock:
            self.done.set()
            if not self._left:
                return
        self._hand_over()

    def _hand_over(self) -> None:
        if self.error is None and self._on_late is not None:
            self._on_late(self.result)


def dedicated_connection(url: str, options: dict[str, Any]) -> tuple[Any, socket.socket]:
    """Open a dedicated connection to one server; return it, logged in, and its socket.

    Raises:
        Exception: any error of redis-py, for `fault_of`.
    """
    connection = ThreadNodes(parse(url), options).pool.get_connection()
    return connection, connection._sock
