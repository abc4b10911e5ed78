"""Connections that the threads of a process share.

Rules of this module:

1.  A caller waits at most `MIN_OPEN_WAIT_SECONDS` for connecting, or for its deadline if that is
    longer.  Connecting goes on in a thread of its own, for the next caller.
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
from concurrent.futures import Future, wait
from functools import partial
from typing import Any, TypeVar

from redis.exceptions import MaxConnectionsError

from memo.errors import TierError
from memo.settings.redis_urls import Address, parse
from memo.stores.redis.transport.coalescing import Owner
from memo.stores.redis.transport.exchange import BusyError, Exchange, WrongSizeError, run_exchange
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

T = TypeVar("T")
REUSE_SECONDS = 1.0
"""Seconds for which threads reuse a connection without redis-py's pool, which checks it and renews
its login.  Taking it from the pool each time makes a hit 29 % slower, 60 instead of 47 µs; the
row "same, Redis" of the benchmarks guards it."""
_FREE_CHECK_SECONDS = 0.001
"""Seconds between two checks for a connection that has become free."""
_CLOSED_HERE_TEXT = "the connection was closed here"


class ThreadConnections:
    """Connections that the threads of this process share.

    Args:
        address: the address of the server.
        options: arguments of redis-py's clients, beyond those in the address.
        owner: the client.

    Attributes:
        answers: changes whenever an exchange has succeeded.
        closed: closed for good.
        slow: describes what takes too long if connecting does.
    """

    def __init__(self, address: Address, options: dict[str, Any], owner: Owner) -> None:
        self._address = address
        self._options = options
        self.owner = owner
        self.slow = slow_step(address)
        self._lock = threading.Lock()
        self._nodes: ThreadNodes | None = None
        self._connecting: Future[ThreadNodes] | None = None
        self._refreshed = 0.0
        self._is_ready = False
        self.closed = False
        self.answers = 0
        self._servers: dict[Any, _ServerConnections] = {}

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
            server = self._server(nodes.of(route))
            connection = server.take(exchange.seconds, check, blocks)
            was_used = connection.used
            try:
                return server.run(connection, exchange)
            except ConnectionError:
                if not was_used:
                    raise
            # It may have died while it was idle, and other idle ones with it.
            self.owner.record_replacement()
            self._release_idle()
            exchange.restart()
            connection = server.take(exchange.seconds, check, blocks)
            return server.run(connection, exchange)
        except TierError:
            raise
        except Exception:
            if self.closed:
                raise TierError(_CLOSED_HERE_TEXT) from None
            raise

    def _server(self, pool: Any) -> _ServerConnections:
        server = self._servers.get(pool)
        return server or self._servers.setdefault(pool, _ServerConnections(self, pool))

    def _release_idle(self) -> None:
        """Return the idle connections to their pools, which check them."""
        for server in list(self._servers.values()):
            server.release_idle()

    def _connected_nodes(self, route: Route, seconds: float) -> ThreadNodes:
        """Return the servers, with a connection to that of the route ready."""
        for last in (False, True):
            with self._lock:
                if self.closed:
                    raise TierError(_CLOSED_HERE_TEXT)
                connecting, mine = self._connecting, False
                if connecting is None or connecting.done():
                    connecting, mine = Future(), True
                    self._connecting = connecting
            if mine:
                _run_in_thread(partial(self._connect, route), connecting)
            wait((connecting,), max(MIN_OPEN_WAIT_SECONDS, seconds))
            if not connecting.done():
                raise TimeoutError(self.slow)
            # an attempt that began earlier may have met a fault that is over
            if mine or last or connecting.exception() is None:
                return connecting.result()
        raise AssertionError

    def _connect(self, route: Route) -> ThreadNodes:
        nodes = self._nodes
        self._release_idle()
        if nodes is None:
            nodes = ThreadNodes(self._address, self._options)
            self._refreshed = time.monotonic()
        elif time.monotonic() - self._refreshed > TOPOLOGY_REFRESH_SECONDS:
            nodes.refresh()
            self._refreshed = time.monotonic()
        self._server(nodes.of(route)).open()
        with self._lock:
            if not self.closed:
                self._nodes, self._is_ready = nodes, True
                return nodes
        nodes.close()
        raise TierError(_CLOSED_HERE_TEXT)

    def reconnect(self) -> None:
        """After a fault, connect again and query the topology before the next exchange."""
        self._is_ready = False

    def flush(self) -> None:
        """Close the idle connections."""
        self._release_idle()
        nodes = self._nodes
        if nodes is not None and nodes.cluster is None:
            nodes.pool.disconnect(inuse_connections=False)

    def close(self) -> None:
        """Close all connections for good, even those in use."""
        with self._lock:
            self.closed = True
            nodes, self._nodes, self._is_ready, self._servers = self._nodes, None, False, {}
        if nodes is not None:
            nodes.close()


class _ServerConnections:
    """Connections of threads to one server: a pool of redis-py, and those reused without it.

    Args:
        threads: the connections to all servers.
        pool: a pool of redis-py.
    """

    def __init__(self, threads: ThreadConnections, pool: Any) -> None:
        self._threads = threads
        self._pool = pool
        self._idle: list[Any] = []

    def run(self, connection: Any, exchange: Exchange) -> list[Any]:
        """Run an exchange over a connection that was taken, and return the connection."""
        try:
            answer = run_exchange(connection, exchange)
        except BaseException as error:
            self._close(connection)
            if isinstance(error, WrongSizeError):
                return [False]
            raise
        connection.used = True
        self._threads.answers += 1
        self._put_back(connection)
        return answer

    def take(self, seconds: float, check: Callable[[], None], blocks: bool) -> Any:
        """Take an idle connection, else the first one that is opened or that a thread returns.

        Raises:
            BusyError: none came in time, although the server answers others; or all are in use, and
                the caller must not wait.
            TimeoutError: none came in time.
            Exception: connecting failed.
        """
        connection = self._pop_idle()
        if connection is not None:
            connection.used = True  # if only by waiting: it may have died meanwhile
            return connection
        answers = self._threads.answers
        opening = self._start_opening()
        ends = time.monotonic() + (
            seconds if opening is None else max(MIN_OPEN_WAIT_SECONDS, seconds)
        )
        while time.monotonic() < ends:
            opening = opening or self._start_opening()
            if opening is None and blocks:
                raise BusyError(BUSY_TEXT)
            if opening is None:
                time.sleep(_FREE_CHECK_SECONDS)
            has_ended = opening is not None and bool(wait((opening,), _FREE_CHECK_SECONDS).done)
            connection = self._pop_idle()
            if connection is not None:
                return connection
            if opening is not None and has_ended:
                if not isinstance(opening.exception(), MaxConnectionsError):
                    opening.result()
                opening = None  # another thread has taken the connection
            if self._threads.closed:
                raise TierError(_CLOSED_HERE_TEXT)
            check()
        if opening is None or self._threads.answers != answers:
            raise BusyError(BUSY_TEXT)
        raise TimeoutError(self._threads.slow)

    def _pop_idle(self) -> Any:
        """Take the last one used, if redis-py has checked it recently; None if there is none."""
        while self._idle:
            with contextlib.suppress(IndexError):  # another thread has taken it
                connection = self._idle.pop()
                if time.monotonic() < connection.reusable_until:
                    return connection
                self._pool.release(connection)
        return None

    def _start_opening(self) -> Future[None] | None:
        """Open a connection in a thread; None if all are in use."""
        if len(self._pool._in_use_connections) >= MAX_CONNECTIONS:
            return None
        opening: Future[None] = Future()
        _run_in_thread(self.open, opening)
        return opening

    def open(self) -> None:
        """Let redis-py check a connection or open one, for the first thread that takes it."""
        connection = self._pool.get_connection()
        connection.reusable_until = time.monotonic() + REUSE_SECONDS
        connection.used = getattr(connection, "used", False)
        try:
            if was_renewed(connection):
                self._threads.owner.record_replacement()
        finally:
            self._put_back(connection)

    def _put_back(self, connection: Any) -> None:
        if self._threads.closed:
            self._close(connection)
        else:
            self._idle.append(connection)

    def _close(self, connection: Any) -> None:
        connection.disconnect()
        connection.used = False
        self._pool.release(connection)

    def release_idle(self) -> None:
        """Return the idle connections to the pool."""
        while self._idle:
            with contextlib.suppress(IndexError):
                self._pool.release(self._idle.pop())


def _run_in_thread(work: Callable[[], T], outcome: Future[T]) -> None:
    """Connect in a thread; while the interpreter shuts down, in this one."""

    def run() -> None:
        try:
            result = work()
        except Exception as error:
            outcome.set_exception(error)
        else:
            outcome.set_result(result)

    try:
        threading.Thread(target=run, name="memo-connect", daemon=True).start()
    except RuntimeError:
        run()


def dedicated_connection(url: str, options: dict[str, Any]) -> tuple[Any, socket.socket]:
    """Open a dedicated connection to one server; return it, logged in, and its socket.

    Raises:
        Exception: any error of redis-py, for `fault_of`.
    """
    connection = ThreadNodes(parse(url), options).pool.get_connection()
    return connection, connection._sock
