"""Connections that threads share: they are reused, limited in number, and closed for good."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from redis_server import RedisServer
from waiting import until

from memo.errors import TierError
from memo.settings.redis_urls import parse
from memo.stores.redis.client import Client
from memo.stores.redis.transport.exchange import BusyError, Exchange
from memo.stores.redis.transport.resp import pack
from memo.stores.redis.transport.thread_connections import ThreadConnections

PATIENT = 15.0
"""Seconds of a deadline that no test reaches."""


@pytest.fixture
def threads(
    redis_server: RedisServer, set_limits: Callable[..., None]
) -> Iterator[ThreadConnections]:
    """Connections to a server, of which two may be in use."""
    set_limits(connections=2)
    client = Client(redis_server.url, PATIENT)
    threads = ThreadConnections(parse(redis_server.url), {}, client)
    yield threads
    threads.close()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def run(threads: ThreadConnections, *words: bytes, blocks: bool = False) -> Any:
    """Run one command; return its reply."""
    exchange = Exchange((pack(*words),), 1, PATIENT)
    return threads.exchange(b"key", exchange, lambda: None, blocks=blocks)[0]


def occupied(
    threads: ThreadConnections, pool: ThreadPoolExecutor, server: RedisServer, *, blocks: bool
) -> list[Future[Any]]:
    """Occupy both connections with a command that waits at the server for an element of a list."""
    waits = [
        pool.submit(run, threads, b"BLPOP", b"bell", b"%d" % PATIENT, blocks=blocks)
        for _ in range(2)
    ]
    until(lambda: server.client().info("clients")["blocked_clients"] == 2)
    return waits


def end(waits: list[Future[Any]], server: RedisServer) -> None:
    server.client().rpush("bell", *range(len(waits)))
    assert {one.result()[0] for one in waits} == {b"bell"}


def opened(client: Any) -> int:
    """Return how many connections the server has taken so far."""
    return int(client.info("stats")["total_connections_received"])


def test_a_thread_reuses_the_connection_that_another_thread_opened(
    threads: ThreadConnections, pool: ThreadPoolExecutor, redis_server: RedisServer
) -> None:
    client = redis_server.client()
    run(threads, b"PING")
    before = opened(client)
    for _ in range(20):
        assert pool.submit(run, threads, b"PING").result() == b"PONG"
    assert opened(client) == before


def test_a_connection_that_died_before_its_first_use_is_replaced(
    threads: ThreadConnections, redis_server: RedisServer
) -> None:
    threads.nodes(PATIENT)
    redis_server.client().client_kill_filter(_type="normal", skipme=True)
    assert run(threads, b"PING") == b"PONG"


def test_a_thread_waits_until_a_connection_becomes_free(
    threads: ThreadConnections, pool: ThreadPoolExecutor, redis_server: RedisServer
) -> None:
    waits = occupied(threads, pool, redis_server, blocks=False)
    third = pool.submit(run, threads, b"PING")
    assert not third.done()
    end(waits, redis_server)
    assert third.result() == b"PONG"


def test_a_command_that_waits_at_the_server_is_refused_at_once_if_all_connections_are_in_use(
    threads: ThreadConnections, pool: ThreadPoolExecutor, redis_server: RedisServer
) -> None:
    """It would wait behind commands like itself."""
    waits = occupied(threads, pool, redis_server, blocks=True)
    with pytest.raises(BusyError):
        run(threads, b"BLPOP", b"bell", b"%d" % PATIENT, blocks=True)
    assert not any(one.done() for one in waits)
    end(waits, redis_server)


def test_a_thread_that_waits_for_a_connection_when_all_are_closed(
    threads: ThreadConnections, pool: ThreadPoolExecutor, redis_server: RedisServer
) -> None:
    """It ends with an error, and leaves none open."""
    waits = occupied(threads, pool, redis_server, blocks=False)
    asked = threading.Event()

    def wait() -> Any:
        exchange = Exchange((pack(b"PING"),), 1, 10 * PATIENT)
        return threads.exchange(b"key", exchange, asked.set)

    third = pool.submit(wait)
    assert asked.wait(PATIENT)  # it has looked for a connection in vain
    client = redis_server.client()
    before = client.info("clients")["connected_clients"]
    threads.close()
    with pytest.raises(TierError, match="closed here"):
        third.result(PATIENT)
    for one in waits:
        with pytest.raises(TierError, match="closed here"):
            one.result(PATIENT)
    until(lambda: client.info("clients")["connected_clients"] == before - len(waits))
