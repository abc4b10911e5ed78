"""The servers behind an address, as redis-py's clients know them, and the login at a server.

redis-py does the connecting, login, TLS, pools, Sentinels and the topology of a cluster.
Connecting has its own time limit: `CONNECT_SECONDS` for each step, `LOOP_CONNECT_SECONDS` on a
loop.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

import redis
import redis.asyncio
import redis.asyncio.cluster
import redis.asyncio.sentinel
import redis.cluster
import redis.sentinel
from redis.backoff import NoBackoff
from redis.exceptions import MovedError

from memo.settings.redis_urls import CLUSTER, SENTINEL, SOCKET, Address
from memo.stores.redis.transport.exchange import Exchange, Stream, is_closed, run_exchange
from memo.stores.redis.transport.redis_errors import MissingFileError
from memo.stores.redis.transport.resp import ErrorReply

T = TypeVar("T")
MAX_CONNECTIONS = 32
"""Maximum number of connections in use per process or loop, and as many again for commands that
wait."""
CONNECT_SECONDS = 1.0
"""Seconds that each step of connecting may take: TCP, TLS, login."""
LOOP_CONNECT_SECONDS = 10.0
"""Like `CONNECT_SECONDS`, for an event loop: its timers also count the time for which other work
blocks it."""
MIN_OPEN_WAIT_SECONDS = 0.25
"""Minimum number of seconds that a caller waits for a connection to be opened; longer if its
deadline is longer."""
TOPOLOGY_REFRESH_SECONDS = 0.5
"""Minimum number of seconds between two queries of a cluster's topology."""
BUSY_TEXT = "all connections to Redis are busy"
_DRIVER_INFO = importlib.util.find_spec("redis.driver_info") is not None
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


Route = Any
"""A key, which selects the server that has it, or a server itself."""


class Nodes:
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


def slow_step(address: Address) -> str:
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


def was_renewed(connection: Any) -> bool:
    """True if the pool has reopened the connection since this was last asked."""
    was_renewed = getattr(connection, "was_renewed", False)
    connection.was_renewed = False
    return bool(was_renewed)


async def _log_in_async(connection: Any) -> None:
    """Like `_log_in`, on an event loop."""
    with _describing_login_errors(connection, partial(abort, connection)):
        await connection.on_connect()
        stream = Stream(connection)
        await stream.run(Exchange((), 0, CONNECT_SECONDS))
        stream.detach()


class ThreadNodes(Nodes):
    """Connection pools for threads."""

    def __init__(self, address: Address, options: dict[str, Any]) -> None:
        given = _arguments(address, options, redis.retry.Retry)  # pyright: ignore[reportAttributeAccessIssue]
        given["redis_connect_func"] = _log_in
        if address.kind == CLUSTER:
            node: Any = redis.cluster.ClusterNode
            nodes = [node(*host) for host in address.hosts]
            try:
                self.cluster = redis.RedisCluster(startup_nodes=nodes, **given)
            except BaseException:
                for one in nodes:
                    if one.redis_connection is not None:
                        one.redis_connection.close()
                raise
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


class LoopNodes(Nodes):
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
            abort(connection)  # pools check what they hand out, nodes of a cluster do not
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


def abort(connection: Any) -> None:
    """Close an asynchronous connection at once; never raises, never waits."""
    writer = connection._writer
    connection.used = False
    if writer is not None:
        connection._parser.on_disconnect()
        with contextlib.suppress(RuntimeError):  # the loop is closed
            writer.transport.abort()
        connection._reader = connection._writer = None
