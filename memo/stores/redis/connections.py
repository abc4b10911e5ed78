"""Connections to Redis: redis-py's clients, for the threads of a process and for an event loop.

redis-py does the connecting, login, TLS, pools, Sentinels and the topology of a cluster.  Rules of
this module:

1.  Connecting has its own time limit: `CONNECT_SECONDS` for each step, `LOOP_CONNECT_SECONDS` on a
    loop.  A caller waits at most `MIN_OPEN_WAIT_SECONDS`; after that the connection is for the
    next caller.
2.  At most `MAX_CONNECTIONS` of a process, or of a loop, are in use.  If all are busy, a caller
    waits for one as long as an exchange may take, then goes on without Redis.  Commands that wait
    at the server have a separate limit of the same size, and do not wait for a connection.  A
    thread that opens another connection uses one that becomes free meanwhile; if opening takes too
    long, that is a fault of the server only if the server has answered nothing in that time.
3.  A connection that died while idle is replaced once.  Every command of memo may be sent twice.
4.  After a fault the topology of a cluster, and the primary of Sentinels, are queried again.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import importlib.util
import os
import socket
import ssl
import threading
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Iterator, Sequence
from contextvars import Context
from functools import partial
from typing import Any, TypeVar

import redis
import redis.asyncio
import redis.asyncio.cluster
import redis.asyncio.sentinel
import redis.cluster
import redis.sentinel
from redis import exceptions
from redis.backoff import NoBackoff
from redis.exceptions import MovedError

from memo.errors import TierError
from memo.settings.redis_urls import CLUSTER, SENTINEL, SOCKET, Address, parse
from memo.stores.redis import breaker
from memo.stores.redis.breaker import REPLIES, Fault
from memo.stores.redis.coalescing import Coalescer, Failure, LoopOwner
from memo.stores.redis.exchange import (
    LATE_SECONDS,
    MAX_EXCUSES,
    BusyError,
    Command,
    ErrorReply,
    Exchange,
    GarbledError,
    Stream,
    WrongSizeError,
    is_closed,
    run_exchange,
)

T = TypeVar("T")
MAX_CONNECTIONS = 32
"""Maximum number of connections in use per process or loop, and as many again for commands that
wait."""
CONNECT_SECONDS = 1.0
"""Seconds that each step of connecting may take: TCP, TLS, login."""
LOOP_CONNECT_SECONDS = 10.0
"""As `CONNECT_SECONDS`, for an event loop: its timers also count the time for which other work
blocks it."""
MIN_OPEN_WAIT_SECONDS = 0.25
"""Minimum number of seconds that a caller waits for a connection to be opened; longer if its
deadline is longer."""
CONCURRENT_OPENINGS = 4
"""Connections that a loop opens concurrently: many callers without one share the first connections,
instead of each making a TLS handshake."""
TOPOLOGY_REFRESH_SECONDS = 0.5
"""Minimum number of seconds between two queries of a cluster's topology."""
REUSE_SECONDS = 1.0
"""Seconds for which threads reuse a connection without redis-py's pool, which checks it and renews
its login."""
_FREE_CHECK_SECONDS = 0.001
"""Seconds between two checks for a connection that has become free."""
_CLOSED_HERE_TEXT = "the connection was closed here"
_BUSY_TEXT = "all connections to Redis are busy"
_DRIVER_INFO = importlib.util.find_spec("redis.driver_info") is not None


class MissingFileError(Exception):
    """A file that an option names does not exist."""


_FILE_OPTIONS = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")


def _arguments(address: Address, options: dict[str, Any], retry: Any) -> dict[str, Any]:
    """Return the arguments for a client of redis-py, of either family."""
    given = {**address.options, **options}
    for name in _FILE_OPTIONS:
        if given.get(name) and not os.path.isfile(given[name]):
            raise MissingFileError(f"{name}: there is no file {given[name]}")
    given.pop("sentinel_kwargs", None)
    if address.kind != CLUSTER:
        given.pop("address_remap", None)
    silent = ("driver_info",) if _DRIVER_INFO else ("lib_name", "lib_version")
    given |= dict.fromkeys(silent)  # no CLIENT SETINFO
    given |= {"protocol": 2, "retry": retry(NoBackoff(), 0)}
    on_threads = retry is redis.retry.Retry  # pyright: ignore[reportAttributeAccessIssue]
    seconds = CONNECT_SECONDS if on_threads else LOOP_CONNECT_SECONDS
    given |= {"socket_timeout": seconds, "socket_connect_timeout": seconds}
    given["max_connections"] = MAX_CONNECTIONS if on_threads else 3 * MAX_CONNECTIONS
    if address.tls:
        given["ssl"] = True
    if address.kind == SOCKET:
        given["unix_socket_path"] = address.path
    elif address.kind not in (SENTINEL, CLUSTER):
        given["host"], given["port"] = address.hosts[0]
    return given


def _sentinels(family: Any, address: Address, options: dict[str, Any], given: Any) -> Any:
    """Return a client of the primary that Sentinels name, for threads or for a loop."""
    alike = ("socket_timeout", "socket_connect_timeout", "retry")  # the next one may be up
    their = {**{name: given[name] for name in alike}, **dict(options.get("sentinel_kwargs") or {})}
    group = family(list(address.hosts), sentinel_kwargs=their, **given)
    return group.master_for(address.service)


@contextlib.contextmanager
def _own_copy(group: T) -> Iterator[T]:
    """Yield a copy of a group of Sentinels, whose order the group adopts afterwards.

    redis-py moves the Sentinel that answered to the front of its list.  If two callers do that at
    the same time, one Sentinel ends up in the list twice and another one is lost.
    """
    known: Any = group
    mine: Any = copy.copy(group)
    mine.sentinels = list(known.sentinels)
    yield mine
    known.sentinels = mine.sentinels


class _ThreadSentinels(redis.sentinel.Sentinel):
    """Sentinels for threads; see `_own_copy`."""

    def discover_master(self, service_name: str) -> Any:
        with _own_copy(self) as mine:
            return super(_ThreadSentinels, mine).discover_master(service_name)  # type: ignore[no-untyped-call]


class _LoopSentinels(redis.asyncio.sentinel.Sentinel):
    """Sentinels for an event loop; see `_own_copy`."""

    async def discover_master(self, service_name: str) -> Any:
        with _own_copy(self) as mine:
            return await super(_LoopSentinels, mine).discover_master(service_name)


Ask = Callable[[Sequence[Command]], "asyncio.Future[Any]"]
"""Takes commands, and returns their future replies: a list of them, or a `Failure`."""
Route = Any
"""A key, which selects the server that has it, or a server itself."""


class _Nodes:
    """The servers behind an address, as one family of redis-py's clients knows them.

    Attributes:
        cluster: the client of a cluster; None if there is one server.
    """

    cluster: Any = None
    pool: Any = None

    def of(self, route: Route) -> Any:
        """Return the server that a route leads to."""
        if self.cluster is None:
            return self.pool
        if not isinstance(route, bytes):
            return route
        return self._pool_of(self.cluster.get_node_from_key(route))

    def all(self) -> list[Any]:
        """Return every server that has keys."""
        if self.cluster is None:
            return [self.pool]
        return [self._pool_of(node) for node in self.cluster.get_primaries()]

    def redirect_target(self, reply: ErrorReply) -> Any:
        """Return the server that a redirection names; None if it is not known yet."""
        words = str(reply).partition(" ")[2]
        move = MovedError(words)
        node = self.cluster.get_node(move.host, move.port)
        return None if node is None else self._pool_of(node)

    def _pool_of(self, node: Any) -> Any:
        return node


def _slow(address: Address) -> str:
    """Name the step that takes too long; a port without TLS does not answer a handshake."""
    return "connecting; over TLS, which this port may not speak" if address.tls else "connecting"


_PERHAPS_TLS_TEXT = "closed at the first exchange, as a TLS port does: write rediss:// in redis_url"


@contextlib.contextmanager
def _describing_login_errors(connection: Any, let_go: Callable[[], None]) -> Iterator[None]:
    """Explain an error of the first exchange, and close the connection if it fails."""
    _note_renewal(connection)
    try:
        yield
    except ConnectionError as error:
        let_go()
        if isinstance(connection, (redis.SSLConnection, redis.asyncio.SSLConnection)):
            raise
        raise ConnectionError(_PERHAPS_TLS_TEXT) from error
    except BaseException:
        let_go()
        raise


def _log_in(connection: Any) -> None:
    """Log in and read one reply, so that nothing stays unread that the server sends unasked.

    That may be an error before it closes the connection, or what TLS sends after its handshake.
    The pools of redis-py would take it for the reply to an earlier command.
    """
    with _describing_login_errors(connection, connection.disconnect):
        connection.on_connect()
        run_exchange(connection, Exchange((), 0, CONNECT_SECONDS))


def _note_renewal(connection: Any) -> None:
    """Detect that a pool reopens a connection which died while it was idle."""
    if getattr(connection, "used", False):
        connection.used, connection.was_renewed = False, True


def _was_renewed(connection: Any) -> bool:
    was_renewed = getattr(connection, "was_renewed", False)
    connection.was_renewed = False
    return bool(was_renewed)


async def _log_in_async(connection: Any) -> None:
    """As `_log_in`, on an event loop."""
    with _describing_login_errors(connection, partial(_abort, connection)):
        await connection.on_connect()
        stream = Stream(connection)
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        exchange = Exchange((), 0, CONNECT_SECONDS)
        stream.send(exchange, partial(_settle, done))
        await done
        exchange.answer()
        stream.detach()


class _ThreadNodes(_Nodes):
    """Connection pools for threads."""

    def __init__(self, address: Address, options: dict[str, Any]) -> None:
        given = _arguments(address, options, redis.retry.Retry)  # pyright: ignore[reportAttributeAccessIssue]
        given["redis_connect_func"] = _log_in
        if address.kind == CLUSTER:
            node: Any = redis.cluster.ClusterNode
            nodes = [node(*host) for host in address.hosts]
            self.cluster = redis.RedisCluster(startup_nodes=nodes, **given)
        elif address.kind == SENTINEL:
            self.pool = _sentinels(_ThreadSentinels, address, options, given).connection_pool
        else:
            self.pool = redis.Redis(**given).connection_pool

    def _pool_of(self, node: Any) -> Any:
        return self.cluster.get_redis_connection(node).connection_pool

    def refresh(self) -> None:
        """Query the topology again; idle connections are reopened."""
        if self.cluster is not None:
            self.cluster.nodes_manager.initialize()
        else:
            self.pool.disconnect(inuse_connections=False)

    def close(self) -> None:
        """Close all connections; those in use when they are returned."""
        with contextlib.suppress(Exception):
            if self.cluster is not None:
                self.cluster.close()
            else:
                self.pool.disconnect()


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
        self.slow = _slow(address)
        self._lock = threading.Lock()
        self._nodes: _ThreadNodes | None = None
        self._opening: _Opening | None = None
        self._refreshed = 0.0
        self._is_ready = False
        self.closed = False
        self.answers = 0
        self._kept: dict[Any, list[Any]] = {}

    def nodes(self, seconds: float) -> _ThreadNodes:
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

    def _connected_nodes(self, route: Route, seconds: float) -> _ThreadNodes:
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
            nodes = _ThreadNodes(self._address, self._options)
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
            raise BusyError(_BUSY_TEXT)
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
                raise BusyError(_BUSY_TEXT)
            raise TimeoutError(self._threads.slow)
        opening = self._opening = self._opening or self._start_opening()
        if opening is not None and not opening.done.wait(_FREE_CHECK_SECONDS):
            return None
        if opening is None or isinstance(opening.error, exceptions.MaxConnectionsError):
            time.sleep(_FREE_CHECK_SECONDS)
            return None
        connection = opening.take()
        connection.until = time.monotonic() + REUSE_SECONDS
        if _was_renewed(connection):
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
    connection = _ThreadNodes(parse(url), options).pool.get_connection()
    return connection, connection._sock


# --- an event loop -------------------------------------------------------------------------------


class _LoopNodes(_Nodes):
    """Connection pools, or nodes of a cluster, for one event loop."""

    def __init__(self, address: Address, options: dict[str, Any]) -> None:
        given = _arguments(address, options, redis.asyncio.retry.Retry)  # pyright: ignore[reportAttributeAccessIssue]
        if address.kind != CLUSTER:
            given["redis_connect_func"] = _log_in_async
        if address.kind == CLUSTER:
            given.pop("ssl_password", None)
            nodes = [redis.asyncio.cluster.ClusterNode(*host) for host in address.hosts]
            self.cluster = redis.asyncio.RedisCluster(startup_nodes=nodes, **given)
        elif address.kind == SENTINEL:
            self.pool = _sentinels(_LoopSentinels, address, options, given).connection_pool
        else:
            self.pool = redis.asyncio.Redis(**given).connection_pool

    async def refresh(self) -> None:
        """Query the topology; idle connections are reopened."""
        if self.cluster is not None:
            await self.cluster.nodes_manager.initialize()
        else:
            await self.pool.disconnect(inuse_connections=False)

    async def acquire(self, node: Any) -> Any:
        """Take a connection to a server."""
        if self.cluster is None:
            return await node.get_connection()
        connection = node.acquire_connection()
        if connection.is_connected and is_closed(connection):
            _abort(connection)  # pools check what they hand out, nodes of a cluster do not
            connection.was_renewed = True
        try:
            await connection.connect()
        except BaseException:
            node.release(connection)
            raise
        return connection

    async def release(self, node: Any, connection: Any) -> None:
        """Return a connection."""
        if self.cluster is None:
            await node.release(connection)
        else:
            node.release(connection)

    def connections(self) -> list[Any]:
        """Return all connections, open or not."""
        if self.cluster is None:
            return [
                connection
                for pool in self._pools()
                for connection in (*pool._available_connections, *pool._in_use_connections)
            ]
        return list({id(c): c for node in self._members() for c in node._connections}.values())

    def idle(self) -> list[Any]:
        """Return the connections that are neither in use nor being opened."""
        if self.cluster is None:
            return [free for pool in self._pools() for free in pool._available_connections]
        return list({id(c): c for node in self._members() for c in node._free}.values())

    def _pools(self) -> list[Any]:
        group = getattr(self.pool, "sentinel_manager", None)
        sentinels = [] if group is None else [one.connection_pool for one in group.sentinels]
        return [self.pool, *sentinels]

    def _members(self) -> list[Any]:
        """Return the nodes of a cluster, compared by identity."""
        manager = self.cluster.nodes_manager
        known = (*manager.nodes_cache.values(), *manager.startup_nodes.values())
        return [*known, *self.cluster.startup_nodes]


class LoopConnections:
    """Connections that the tasks of one event loop share; created and used on that loop.

    Args:
        address, options: see `ThreadConnections`.
        owner: the client.
        ended: called when the loop has ended.

    Attributes:
        look_up: sends commands that only read; None: call `get_ready` first.
    """

    def __init__(
        self, address: Address, options: dict[str, Any], owner: LoopOwner, ended: Callable[[], Any]
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self._owner = owner
        self._ended = ended
        self.nodes = _LoopNodes(address, options)
        self._slow = _slow(address)
        self._slots = {blocks: asyncio.Semaphore(MAX_CONNECTIONS) for blocks in (False, True)}
        self._openings = asyncio.Semaphore(CONCURRENT_OPENINGS)
        self._refreshing = asyncio.Lock()
        self._refreshed = -TOPOLOGY_REFRESH_SECONDS
        self._coalescers: dict[Any, Coalescer] = {}
        self._streams: dict[Stream, Any] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._keeper: AsyncGenerator[None, None] | None = None
        self.look_up: Ask | None = None

    # --- look-ups --------------------------------------------------------------------------------

    async def get_ready(self) -> None:
        """Set `look_up`: register for the end of the loop, and query the topology of a cluster."""
        if self._keeper is None:
            await self._keep()
        if self.look_up is None:
            if self.nodes.cluster is None:
                self.look_up = self._coalescer(self.nodes.pool).ask
            else:
                await self._within_time(self._refresh_topology())

    def _look_up_at_each(self, commands: Sequence[Command]) -> asyncio.Future[Any]:
        """Look up commands at the servers of a cluster that have their keys."""
        parts: dict[Any, list[int]] = {}
        for place, (key, _) in enumerate(commands):
            parts.setdefault(self.nodes.of(key), []).append(place)
        if len(parts) == 1:
            (node,) = parts
            return self._coalescer(node).ask(commands)
        return _GatheredReplies(self.loop, len(commands)).gather(
            (self._coalescer(node).ask([commands[place] for place in places]), places)
            for node, places in parts.items()
        )

    def _coalescer(self, node: Any) -> Coalescer:
        found = self._coalescers.get(node)
        if found is None:
            opened = partial(self._open_stream, node)
            found = self._coalescers[node] = Coalescer(self._owner, opened, self._release_stream)
        return found

    # --- exchanges -------------------------------------------------------------------------------

    async def exchange(
        self, route: Route, exchange: Exchange, check: Callable[[], None], *, blocks: bool = False
    ) -> list[Any]:
        """As `ThreadConnections.exchange`."""
        slots = self._slots[blocks]
        if slots.locked():
            if blocks:
                raise BusyError(_BUSY_TEXT)
            await self._queue(slots, exchange.seconds, check)
        else:
            await slots.acquire()
        try:
            await self.get_ready()
            return await self._exchange(self.nodes.of(route), exchange, check)
        finally:
            slots.release()

    async def _queue(
        self, slots: asyncio.Semaphore, seconds: float, check: Callable[[], None]
    ) -> None:
        try:
            async with asyncio.timeout(seconds):
                await slots.acquire()
        except TimeoutError:
            raise BusyError(_BUSY_TEXT) from None
        try:
            check()
        except BaseException:
            slots.release()
            raise

    async def _exchange(
        self, node: Any, exchange: Exchange, check: Callable[[], None]
    ) -> list[Any]:
        for again in (True, False):
            stream = await self._open_stream(node, check)
            done: asyncio.Future[None] = self.loop.create_future()
            fresh = not getattr(stream.connection, "used", False)
            stream.connection.used = True
            try:
                stream.send(exchange, partial(_settle, done))
                await done
                answer = exchange.answer()
            except ConnectionError:
                self._release_stream(stream)
                if fresh or not again:
                    raise
                self._owner.record_replacement()
                exchange.restart()
                continue
            except BaseException:
                stream.fail(ConnectionError("given up"))
                self._release_stream(stream)
                raise
            self._streams.pop(stream, None)
            if stream.closed:  # closed meanwhile
                return answer
            await self.nodes.release(node, stream.detach())
            return answer
        raise AssertionError

    # --- connections -----------------------------------------------------------------------------

    async def _open_stream(self, node: Any, check: Callable[[], None] | None = None) -> Stream:
        waits = self._openings.locked()
        async with self._openings:
            if waits and check is not None:  # not for the probe of a server that may answer again
                check()
            connection = await self._within_time(
                self.nodes.acquire(node), lambda late: self._return_late(node, late)
            )
        if _was_renewed(connection):
            self._owner.record_replacement()
        stream = Stream(connection)
        self._streams[stream] = node
        return stream

    async def _within_time(
        self, work: Coroutine[Any, Any, T], late: Callable[[T], None] | None = None
    ) -> T:
        """Return the result of connecting; the attempt goes on if its caller gives up.

        Raises:
            TimeoutError: it takes too long.
        """
        task = self.loop.create_task(work, name="memo-connect", context=Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            for _ in range(MAX_EXCUSES):
                seconds = max(MIN_OPEN_WAIT_SECONDS, self._owner.deadline)
                due = self.loop.time() + seconds
                await asyncio.wait({task}, timeout=seconds)
                if task.done() or self.loop.time() - due < LATE_SECONDS:
                    break
        finally:
            if not task.done():
                task.add_done_callback(partial(_finish_late, late))
        if not task.done():
            raise TimeoutError(self._slow)
        return task.result()

    def _return_late(self, node: Any, connection: Any) -> None:
        """Return a connection that came too late for its caller to its pool."""
        task = self.loop.create_task(self.nodes.release(node, connection), context=Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _release_stream(self, stream: Stream) -> None:
        """Return the connection of a closed stream to its pool, which reopens it."""
        node = self._streams.pop(stream, None)
        if node is None:
            return
        _abort(stream.connection)
        if not self.loop.is_closed():
            self._return_late(node, stream.connection)

    async def _refresh_topology(self) -> None:
        """Query the topology of a cluster, unless another task has done so."""
        async with self._refreshing:
            if (
                self.look_up is None
                and self.loop.time() - self._refreshed > TOPOLOGY_REFRESH_SECONDS
            ):
                self._refreshed = self.loop.time()
                await self.nodes.refresh()
                self.look_up = self._look_up_at_each

    def reconnect_soon(self) -> None:
        """After a fault, query the topology before the next exchange; from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop has been closed since
            self.loop.call_soon_threadsafe(self._reconnect)

    def _reconnect(self) -> None:
        if self.nodes.cluster is not None:
            self.look_up = None
        self.flush()

    async def _keep(self) -> None:
        """Have the loop close the connections when it ends."""
        _live.add(self)
        self._keeper = self._until_the_end()
        await self._keeper.__anext__()

    async def _until_the_end(self) -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            self._ended()
            self.close_now()
            for _ in range(3):  # so that the transports can close their sockets
                await asyncio.sleep(0)

    def flush(self) -> None:
        """Close the idle connections."""
        for coalescer in list(self._coalescers.values()):
            coalescer.flush()
        for connection in self.nodes.idle():
            if connection.is_connected:
                _abort(connection)

    def close_now(self) -> None:
        """Close all connections, even those in use; on their own loop."""
        _live.discard(self)
        self.look_up = None
        for coalescer in list(self._coalescers.values()):
            coalescer.close()
        self._coalescers.clear()
        for task in list(self._tasks):
            task.cancel()
        for stream in list(self._streams):
            stream.fail(ConnectionError("closed here"))
        self._streams.clear()
        for connection in self.nodes.connections():
            _abort(connection)

    async def aclose(self) -> None:
        """Close all connections and wait until they are closed; on their own loop."""
        keeper, self._keeper = self._keeper, None
        self.close_now()
        if keeper is not None:
            await keeper.aclose()

    def close(self) -> None:
        """Close all connections as soon as the loop can; from any thread."""
        if self.loop.is_closed():
            self.forget()
            return
        with contextlib.suppress(RuntimeError):  # the loop has been closed since
            self.loop.call_soon_threadsafe(self.close_now)

    def forget(self) -> None:
        """Drop the connections of a loop that ended without closing them."""
        _live.discard(self)
        self.look_up = None
        for connection in self.nodes.connections():
            connection._reader = connection._writer = None
        self._coalescers.clear()
        self._streams.clear()


def _abort(connection: Any) -> None:
    """Close an asynchronous connection at once; never raises, never waits."""
    writer = connection._writer
    connection.used = False
    if writer is not None:
        connection._parser.on_disconnect()
        with contextlib.suppress(RuntimeError):  # the loop is closed
            writer.transport.abort()
        connection._reader = connection._writer = None


def _settle(future: asyncio.Future[None], error: Exception | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)


def _finish_late(late: Callable[[Any], None] | None, task: asyncio.Task[Any]) -> None:
    """Pass on the result of an attempt that ended too late for its caller."""
    if not task.cancelled() and task.exception() is None and late is not None:
        late(task.result())


class _GatheredReplies:
    """The replies of several servers, in the order of the commands."""

    def __init__(self, loop: asyncio.AbstractEventLoop, count: int) -> None:
        self.future: asyncio.Future[Any] = loop.create_future()
        self._found: list[Any] = [None] * count
        self._missing = 0

    def gather(self, parts: Iterable[tuple[asyncio.Future[Any], list[int]]]) -> asyncio.Future[Any]:
        """Wait for all parts, each a future and the positions of its replies."""
        both = list(parts)
        self._missing = len(both)
        for future, places in both:
            future.add_done_callback(partial(self._take_part, places))
        return self.future

    def _take_part(self, places: list[int], part: asyncio.Future[Any]) -> None:
        self._missing -= 1
        if self.future.done() or part.cancelled():
            return
        answer = part.result()
        if type(answer) is Failure:
            self.future.set_result(answer)
            return
        for place, reply in zip(places, answer, strict=True):
            self._found[place] = reply
        if not self._missing:
            self.future.set_result(self._found)


_live: set[LoopConnections] = set()
"""Loops with open connections: these are closed explicitly, never left to the garbage collector."""


# --- classifying errors ------------------------------------------------------------------------


def fault_of(error: BaseException) -> Fault:
    """Classify an exception of redis-py, of an exchange, or of a layer below."""
    if isinstance(error, (ErrorReply, exceptions.RedisError)):
        code = str(getattr(error, "status_code", ""))
        if code not in REPLIES:
            code = _code(str(error)) or _CODE_BY_ERROR.get(type(error), "")
        if isinstance(error, exceptions.AuthenticationError) and "invalid" in str(error):
            code = "WRONGPASS"
        if code:
            return REPLIES[code]
        if isinstance(error, (ErrorReply, exceptions.ResponseError)):
            return breaker.OTHER
    causes = list(_causes(error))
    if any(type(cause).__name__ == "MasterNotFoundError" for cause in causes):
        return REPLIES["MASTERS"]
    for fault, kinds in _FAULTS_BY_ERROR:
        if any(isinstance(cause, kinds) for cause in causes):
            return fault
    return breaker.GARBLED


_CODE_BY_ERROR: dict[type[BaseException], str] = {
    exceptions.OutOfMemoryError: "OOM",
    exceptions.ReadOnlyError: "READONLY",
    exceptions.BusyLoadingError: "LOADING",
    exceptions.NoPermissionError: "NOPERM",
    exceptions.MasterDownError: "MASTERDOWN",
    exceptions.ClusterDownError: "CLUSTERDOWN",
    exceptions.MovedError: "MOVED",
    exceptions.AskError: "ASK",
    exceptions.TryAgainError: "TRYAGAIN",
    exceptions.ClusterCrossSlotError: "CROSSSLOT",
    exceptions.AuthenticationError: "NOAUTH",
    exceptions.AuthenticationWrongNumberOfArgsError: "WRONGPASS",
}
"""The code of each exception of redis-py, which removes it from some texts."""


def _code(text: str) -> str:
    """Return the code of an error reply; `""` if it has none, or one that is not in `REPLIES`.

    Redis 6.2 hides the code of an error inside a script behind `ERR Error running script`.
    """
    if "invalid username-password" in text or "without any password" in text:
        return "WRONGPASS"
    if "Authentication required" in text:
        return "NOAUTH"
    if "DB index is out of range" in text:
        return "DATABASE"
    if "unknown command" in text.lower():
        return "UNKNOWN"
    if "max number of clients" in text:
        return "MAXCLIENTS"
    if "user executing the script" in text:
        return "NOPERM"
    words = (word.strip("-:") for word in text.split())
    return next((word for word in words if word in REPLIES), "")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


_FAULTS_BY_ERROR: tuple[tuple[Fault, Any], ...] = (
    (REPLIES["CLUSTERDOWN"], exceptions.SlotNotCoveredError),
    (breaker.MISSING_FILE, MissingFileError),
    (breaker.INSECURE, ssl.SSLError),
    (breaker.UNRESOLVED, socket.gaierror),
    (breaker.REFUSED, (ConnectionRefusedError, FileNotFoundError, PermissionError)),
    (breaker.SILENT, (TimeoutError, exceptions.TimeoutError)),
    (breaker.CONNECTION_CLOSED, (ConnectionError, EOFError)),
    (breaker.GARBLED, (exceptions.InvalidResponse, GarbledError)),
    (breaker.REFUSED, OSError),  # no route to the host, no such network
    (breaker.CONNECTION_CLOSED, exceptions.ConnectionError),
)
