"""Connecting that takes longer than a question may: TLS, a topology, Sentinels; and silence.

Another host has stored results in Redis, over an address that is quick; what takes its time is the
first reply of each connection over the address that is tested.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from chaos import Proxy
from deployments import Authority, Cluster, Sentinels, free_ports, tls_server
from redis_server import RedisServer

import memo
from memo.settings.redis_urls import parse
from memo.stores.redis.client import Client
from memo.stores.redis.transport.loop_connections import LoopConnections
from memo.stores.redis.transport.thread_connections import ThreadConnections

STORED = 60
"""Results that another host has stored."""


class Slow(Proxy):
    """Passes the first reply of each connection on after `greets` seconds, entries after `answers`.

    Behind TLS that first reply is the server's part of the handshake.
    """

    greets = 0.0
    answers = 0.0

    def _reply(self, client: Any, data: bytes, before: int) -> bool:
        if not before:
            self._over.wait(self.greets)
        elif len(data) > 5000:
            self._over.wait(self.answers)
        return super()._reply(client, data, before)


class Redis:
    """A Redis with a quick way to it and a slow one.

    Attributes:
        settings: of the quick way.
        slow: of the slow one.
        proxy: in the slow one.
    """

    def __init__(self, url: str, port: int, through: str, **options: Any) -> None:
        more = {"tiers": ["redis"], "redis_options": options}
        self.proxy = Slow(port)
        self.settings = {"redis_url": url, "deadline": 5.0, **more}
        self.slow = {"redis_url": through.format(self.proxy.port), **more}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    found = Cluster(tmp_path_factory.mktemp("cluster"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def sentinels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sentinels]:
    found = Sentinels(tmp_path_factory.mktemp("sentinels"))
    yield found
    found.close()


@pytest.fixture(params=["plain", "TLS", "cluster", "Sentinel"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Redis]:
    """Each kind of Redis; its slow way is slow to connect, to tell its topology, or its primary."""
    if request.param == "TLS":
        authority = Authority(tmp_path / "ca")
        with tls_server(tmp_path, authority, mutual=False) as tls:
            url = f"rediss://127.0.0.1:{tls.port}/0"
            options = {"ssl_ca_certs": str(authority.file)}
            found = Redis(url, tls.port, "rediss://127.0.0.1:{}/0", **options)
            with found.proxy:
                yield found
            return
    if request.param == "cluster":
        nodes: Cluster = request.getfixturevalue("cluster")
        found = Redis(nodes.url, nodes.masters[0].port, "redis+cluster://127.0.0.1:{}")
    elif request.param == "Sentinel":
        group: Sentinels = request.getfixturevalue("sentinels")
        through = "redis+sentinel://127.0.0.1:{}/mymaster/0"
        found = Redis(group.url, group.sentinels[0].port, through)
    else:
        one: RedisServer = request.getfixturevalue("redis_server")
        found = Redis(one.url, one.port, "redis://127.0.0.1:{}/0")
    with found.proxy:
        yield found


class Host:
    """A host that calls a cached function, on threads or on one event loop.

    Attributes:
        ran: the arguments of each computation.
    """

    def __init__(self, name: str, runner: asyncio.Runner | None) -> None:
        self._runner = runner
        self.ran: list[int] = []
        ran = self.ran

        def work(x: int) -> bytes:
            ran.append(x)
            return os.urandom(8000)

        async def work_on_a_loop(x: int) -> bytes:
            return work(x)

        wrap = memo.cache(ttl=600, name=f"slow:{name}", version="1")
        self._cached = wrap(work if runner is None else work_on_a_loop)

    def computes(self, x: int) -> bool:
        """True if a call computes."""
        before = len(self.ran)
        assert len(self._cached(x) if self._runner is None else self._runner.run(self._called(x)))
        return len(self.ran) > before

    async def _called(self, x: int) -> Any:
        return await self._cached(x)

    def pause(self, seconds: float) -> None:
        """Let other work of this host go on."""
        if self._runner is None:
            time.sleep(seconds)
        else:
            self._runner.run(asyncio.sleep(seconds))


@pytest.fixture(params=["threads", "loop"])
def host(request: pytest.FixtureRequest) -> Iterator[Host]:
    if request.param == "threads":
        yield Host(request.node.name, None)
        return
    with asyncio.Runner() as runner:
        yield Host(request.node.name, runner)


def stored(server: Redis, host: Host) -> None:
    """Let another host store results."""
    with memo.configure(**server.settings):
        assert all(host.computes(x) for x in range(STORED))


@pytest.mark.parametrize("server", ["plain", "TLS"], indirect=True)
def test_connecting_and_a_question_have_a_deadline_each(server: Redis, host: Host) -> None:
    """Both together may take longer than a deadline: the value comes from Redis all the same."""
    stored(server, host)
    server.proxy.greets = server.proxy.answers = 0.7
    with memo.configure(**server.slow, deadline=1.2):
        assert not host.computes(0)


def test_connecting_may_take_as_long_as_a_larger_deadline(server: Redis, host: Host) -> None:
    """Connecting, a topology or a primary that takes 0.6 s: the first call already hits."""
    stored(server, host)
    server.proxy.greets = 0.6
    with memo.configure(**server.slow, deadline=3.0):
        assert not any(host.computes(x) for x in range(3))


def test_connecting_goes_on_when_the_caller_has_left(server: Redis, host: Host) -> None:
    """If it takes longer than the deadline, calls compute until it is done; then they hit."""
    stored(server, host)
    server.proxy.greets = 0.4
    with memo.configure(**server.slow, deadline=0.25):
        ends = time.monotonic() + 20
        left = iter(range(STORED))
        while host.computes(next(left)):
            assert time.monotonic() < ends
            host.pause(0.25)


def test_a_further_connection_of_a_thread_has_no_more_time(redis_server: RedisServer) -> None:
    """Redis hangs while several threads ask: none of them waits longer than the first."""
    crowd = 6
    waited: list[float] = []

    @memo.cache(ttl=600, name="slow:crowd", version="1")
    def work(x: int) -> int:
        return x

    def timed(x: int) -> None:
        begun = time.perf_counter()
        assert work(x) == x
        waited.append(time.perf_counter() - begun)

    with memo.configure(redis_url=redis_server.url, tiers=["redis"], deadline=0.25):
        work(0), work(0)
        redis_server.freeze()
        threads = [threading.Thread(target=timed, args=(x,)) for x in range(crowd)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        redis_server.thaw()
    assert len(waited) == crowd
    assert max(waited) < 0.8


def test_a_thread_uses_a_connection_that_is_given_back(redis_server: RedisServer) -> None:
    """While further connections take their time, threads share the one that there is, and hit."""
    crowd = 6
    server = Redis(redis_server.url, redis_server.port, "redis://127.0.0.1:{}/0")
    host = Host("shared", None)
    stored(server, host)
    with server.proxy, memo.configure(**server.slow, deadline=5.0):
        assert not host.computes(0)
        server.proxy.greets = 30.0
        with ThreadPoolExecutor(crowd) as pool:
            assert not any(pool.map(host.computes, range(crowd)))


def test_a_sentinel_that_is_down_costs_no_wait(sentinels: Sentinels, host: Host) -> None:
    """The next one is asked at once: the first call already hits."""
    options = {"tiers": ["redis"], "deadline": 1.5}
    (down,) = free_ports(1)
    with memo.configure(redis_url=sentinels.url, **options):
        assert all(host.computes(x) for x in range(3))
    with memo.configure(redis_url=sentinels.url.replace("//", f"//127.0.0.1:{down},"), **options):
        assert not any(host.computes(x) for x in range(3))


@pytest.mark.parametrize("on_a_loop", [False, True], ids=["threads", "loop"])
def test_connections_that_open_at_once_forget_no_sentinel(
    sentinels: Sentinels, on_a_loop: bool
) -> None:
    """A Sentinel that is down comes first; all that find the next one move it to the front."""
    (down,) = free_ports(1)
    ports = [down, *(server.port for server in sentinels.sentinels)]
    address = parse(f"redis+sentinel://{','.join(f'127.0.0.1:{port}' for port in ports)}/mymaster")

    def known(pool: Any) -> list[int]:
        asked = pool.sentinel_manager.sentinels
        return sorted(one.connection_pool.connection_kwargs["port"] for one in asked)

    async def gathered() -> list[int]:
        loop = LoopConnections(address, {}, Client("redis://", 5.0), lambda: None)
        pool = loop.nodes.pool
        await asyncio.gather(*(pool.get_connection() for _ in range(8)))
        loop.close_now()
        return known(pool)

    def side_by_side() -> list[int]:
        threads = ThreadConnections(address, {}, Client("redis://", 5.0))
        pool = threads.nodes(5.0).pool
        with ThreadPoolExecutor(16) as crowd:
            for _ in range(10):
                pool.sentinel_manager.sentinels.sort(
                    key=lambda one: one.connection_pool.connection_kwargs["port"] != down
                )
                for taken in [crowd.submit(pool.get_connection) for _ in range(16)]:
                    pool.release(taken.result())
                pool.disconnect()
        threads.close()
        return known(pool)

    assert (asyncio.run(gathered()) if on_a_loop else side_by_side()) == sorted(ports)
