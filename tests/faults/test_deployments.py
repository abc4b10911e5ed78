"""Redis as people run it: cluster, Sentinel, TLS, ACL users, replicas, refused writes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from chaos import Proxy
from checkout import ROOT, SUPPORT
from click.testing import CliRunner
from deployments import Authority, Cluster, Sentinels, Server, free_ports, tls_server, until
from redis_server import RedisServer, binary, valkey

import memo
from memo.cli.commands import main
from memo.decorators.assembly import default_chain
from memo.inspection.doctor import FAIL, GOOD, examine
from memo.runtime.blocking import BLOCKING, drive

KINDS = ("write", "read", "script", "lease", "invalidation")


PROGRAMS = {"redis": binary, "valkey": valkey}


@pytest.fixture(scope="module", params=PROGRAMS)
def cluster(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    found = Cluster(tmp_path_factory.mktemp("cluster"), program=PROGRAMS[request.param]())
    yield found
    found.close()


@pytest.fixture(params=PROGRAMS)
def sentinels(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Sentinels]:
    found = Sentinels(tmp_path, PROGRAMS[request.param]())
    yield found
    found.close()


@pytest.fixture(params=["sync", "async"])
def load(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A cached function that says how often it ran, called the same way sync or async."""
    ran: list[Any] = []
    if request.param == "sync":

        @memo.cache(ttl=60, tags=["users"], key_prefix="load", name=f"load:{request.param}")
        def work(x: int) -> tuple[int, int]:
            ran.append(x)
            return x, len(ran)

        work.ran = ran  # type: ignore[attr-defined]
        work.each = lambda xs: [work(x) for x in xs]  # type: ignore[attr-defined]
        yield work
        return

    @memo.cache(ttl=60, tags=["users"], key_prefix="load", name=f"load:{request.param}")
    async def work_async(x: int) -> tuple[int, int]:
        ran.append(x)
        return x, len(ran)

    async def gathered(xs: Any) -> list[Any]:
        return list(await asyncio.gather(*map(work_async, xs)))

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def run(work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, loop).result(30)

    async def call(x: int) -> Any:
        return await work_async(x)

    class Caller:
        each = staticmethod(lambda xs: run(gathered(xs)))

        def __call__(self, x: int) -> Any:
            return run(call(x))

        def __getattr__(self, name: str) -> Any:
            return getattr(work_async, name)

    caller: Any = Caller()
    caller.ran = ran
    yield caller

    async def end() -> None:  # as `asyncio.run` does
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await loop.shutdown_asyncgens()

    run(end())
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def only_redis(url: str, **settings: Any) -> Any:
    return memo.configure(redis_url=url, tiers=["redis"], **{"deadline": 5.0, **settings})


def works(load: Any) -> None:
    """Calls hit, invalidations act: whole, in part, by tag, by address, by prefix."""
    first = load.each(range(20))
    assert load.each(range(20)) == first
    assert load(3) == first[3]
    load.invalidate(3)
    assert load(3) != first[3]
    assert load(4) == first[4]
    memo.invalidate(key="load:6")
    assert load(6) != first[6]
    assert load(7) == first[7]
    load.invalidate()
    assert load(7) != first[7]
    kept = load(7)
    memo.invalidate(tag="users")
    assert load(7) != kept
    second = load.each(range(20))
    assert load.each(range(20)) == second
    memo.invalidate(prefix="load")
    assert load(8) != second[8]


# --- cluster -------------------------------------------------------------------------------------


def test_a_cluster_is_shared(cluster: Cluster, load: Any) -> None:
    """Through `redis+cluster://` calls hit and every kind of invalidation acts."""
    with only_redis(cluster.url, namespace="works"):
        works(load)


def test_a_cluster_is_used_as_a_whole(cluster: Cluster) -> None:
    """Functions and groups spread over all masters, and every key expires."""

    def made(number: int) -> Any:
        @memo.cache(ttl=60, name=f"spread:{number}", tags=[f"tag{number}"])
        def work() -> int:
            return number

        return work

    with only_redis(cluster.url, namespace="spread"):
        for number in range(30):
            assert made(number)() == number
    for server in cluster.masters:
        keys = [key for key in server.ask("KEYS", "*") if key.startswith(b"spread:")]
        assert len(keys) > 10
        assert all(server.ask("PTTL", key) > 0 for key in keys)


def test_a_lease_in_a_cluster(cluster: Cluster) -> None:
    """`use_lock` works in a cluster: one computation for two hosts that ask at once."""
    with only_redis(cluster.url, namespace="lease"):
        leases = default_chain().tiers[0].leases  # type: ignore[attr-defined]
        assert drive(leases.acquire(BLOCKING, "lease:{f}:x", "one")) is None
        assert drive(leases.acquire(BLOCKING, "lease:{f}:x", "two"))[0] == "one"
        assert drive(leases.release(BLOCKING, "lease:{f}:x", "one"))
        assert drive(leases.acquire(BLOCKING, "lease:{f}:x", "two")) is None


def test_clear_in_a_cluster(cluster: Cluster, load: Any) -> None:
    """Clearing a function reaches what lies on every node."""
    with only_redis(cluster.url, namespace="clear"):
        load.each(range(5))
        assert load.is_cached(3)
        load.cache_clear()
        assert not load.is_cached(3)


def test_a_slot_that_moves(tmp_path: Path, load: Any) -> None:
    """While slots move to another node, and after, calls give right values and hit again.

    An invalidation reaches its group on either node.
    """
    cluster = Cluster(tmp_path)
    try:
        with only_redis(cluster.url):
            first = load.each(range(10))
            names = [key for keys in cluster.names() for key in keys]
            slots = [
                Slot(cluster, next(key for key in names if mark in key))
                for mark in (b"{load:", b"g:{f:load:")
            ]
            for slot in slots:
                slot.begin()
                slot.move(2)
            for x in range(10):
                assert load(x)[0] == x
            for slot in slots:
                slot.move(1)
            assert load.invalidate(9).tiers["redis"] == "done"
            assert load(9)[0] == 9
            for slot in slots:
                slot.end()
            assert load.invalidate(8).tiers["redis"] == "done"
            until(lambda: load(0) == load(0) and load(1) == load(1), 10)
            again = load.each(range(10))
            assert load.each(range(10)) == again
            assert [x for x, _ in again] == [x for x, _ in first]
    finally:
        cluster.close()


class Slot:
    """The slot of a key in a cluster, to be moved to another node."""

    def __init__(self, cluster: Cluster, key: bytes) -> None:
        self._masters = cluster.masters
        self._number = cluster.servers[0].ask("CLUSTER", "KEYSLOT", key)
        self._source = next(s for s in self._masters if key in s.ask("KEYS", "*"))
        self._target = next(s for s in self._masters if s is not self._source)

    def begin(self) -> None:
        """From now on keys that have moved are asked for at the target."""
        ids = [server.ask("CLUSTER", "MYID").decode() for server in (self._source, self._target)]
        self._id = ids[1]
        self._target.ask("CLUSTER", "SETSLOT", self._number, "IMPORTING", ids[0])
        self._source.ask("CLUSTER", "SETSLOT", self._number, "MIGRATING", ids[1])

    def move(self, share: int) -> None:
        """Move one in so many keys."""
        for key in self._source.ask("CLUSTER", "GETKEYSINSLOT", self._number, 1000)[::share]:
            self._source.ask("MIGRATE", "127.0.0.1", self._target.port, key, 0, 5000)

    def end(self) -> None:
        """The slot is the target's."""
        for server in self._masters:
            server.ask("CLUSTER", "SETSLOT", self._number, "NODE", self._id)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_a_look_up_is_one_round_trip_to_each_node(cluster: Cluster, asynchronous: bool) -> None:
    """Records and generations on one node are read in one batch."""
    with contextlib.ExitStack() as stack:
        proxies = {one.port: stack.enter_context(Proxy(one.port)) for one in cluster.masters}

        def remap(place: tuple[str, int]) -> tuple[str, int]:
            return place[0], proxies[place[1]].port if place[1] in proxies else place[1]

        options = {"ttl": 60, "tags": [f"tag{n}" for n in range(12)]}

        @memo.cache(name="round trips", **options)
        def work(x: int) -> int:
            return x

        @memo.cache(name="round trips on a loop", **options)
        async def work_on_a_loop(x: int) -> int:
            return x

        async def calls() -> None:
            for number in range(13):
                if number == 3:  # from now on it is connected, and nothing is missing
                    for proxy in proxies.values():
                        proxy.packets = 0
                assert (await work_on_a_loop(1) if asynchronous else work(1)) == 1

        url = f"redis+cluster://127.0.0.1:{cluster.masters[0].port}"
        with only_redis(url, namespace="trips", redis_options={"address_remap": remap}):
            asyncio.run(calls())
        assert [proxy.packets for proxy in proxies.values()] == [10] * 3


@pytest.mark.cluster
def test_a_node_of_a_cluster_is_killed(tmp_path: Path, load: Any) -> None:
    """No exception reaches a caller, no value is stale, and sharing is back within 10 s."""
    cluster = Cluster(tmp_path, replicas=1)
    try:
        with only_redis(cluster.url, deadline=0.25):
            load.each(range(30))
            cluster.masters[0].kill()
            begun = time.monotonic()
            while time.monotonic() - begun < 15:
                for x in range(10):
                    assert load(x)[0] == x
                before = load(1)
                told = load.invalidate(1)
                if told.tiers["redis"] == "done":
                    assert load(1) != before
                count = len(load.ran)
                load.each(range(30))
                load.each(range(30))
                if len(load.ran) - count <= 30 and load.is_cached(1) and load.is_cached(29):
                    break
            assert time.monotonic() - begun < 10
    finally:
        cluster.close()


# --- Sentinel ------------------------------------------------------------------------------------


@pytest.mark.cluster
def test_sentinel_and_a_failover(sentinels: Sentinels, load: Any) -> None:
    """Through `redis+sentinel://` calls hit; after a failover they do on the new primary."""
    with memo.configure(redis_url=sentinels.url, deadline=0.25, memory_limit=0):
        works(load)
        load.each(range(5))
        sentinels.fail_over()
        begun = time.monotonic()
        while not any(b"{load:" in key for key in sentinels.replica.ask("KEYS", "memo:2:{*")) or (
            load.invalidate(0).tiers["redis"] != "done"
        ):
            assert time.monotonic() - begun < 10
            for x in range(5):
                assert load(x)[0] == x
            load.invalidate(1)
            load(1)
        # Invalidations made during the outage may still be sent again, each of which costs a miss.
        until(lambda: load.each(range(20)) == load.each(range(20)), 10)
        works(load)


# --- Valkey --------------------------------------------------------------------------------------


def test_a_valkey_is_shared(tmp_path: Path, load: Any, caplog: pytest.LogCaptureFixture) -> None:
    """With a Valkey behind `redis://` all of it works, leases and tracking too, without a word."""

    @memo.cache(ttl=60, use_lock=True, name="locked on Valkey")
    def locked() -> int:
        return 5

    server = RedisServer(tmp_path / "valkey", program=valkey())
    try:
        with only_redis(server.url, directory=tmp_path / "memo"):
            works(load)
            assert locked() == locked() == 5
            assert {
                one.topic: one.level for one in examine() if "redis" in one.topic
            } == dict.fromkeys(("redis", *(f"redis {kind}" for kind in KINDS)), GOOD)
        with memo.configure(redis_url=server.url, coherence="tracking", deadline=2.0):
            works(load)
            facts = drive(default_chain().health(BLOCKING))["redis"]
            assert facts["tracking"] == "listening"
    finally:
        server.close()
    assert not [record.getMessage() for record in caplog.records]


# --- TLS -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mutual", [False, True], ids=["TLS", "mTLS"])
def test_tls_with_a_private_authority(tmp_path: Path, load: Any, mutual: bool) -> None:
    """With the authority's file, and for mTLS a certificate of one's own, calls hit."""
    authority = Authority(tmp_path / "ca")
    with tls_server(tmp_path, authority, mutual=mutual) as server:
        options = {"ssl_ca_certs": str(authority.file)}
        if mutual:
            certificate, key = authority.issue("client")
            options |= {"ssl_certfile": str(certificate), "ssl_keyfile": str(key)}
        with only_redis(f"rediss://127.0.0.1:{server.port}/0", redis_options=options):
            works(load)


def test_a_scheme_that_does_not_fit_the_port_is_named(
    redis_server: RedisServer, tmp_path: Path, load: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Without TLS to a port for TLS, and the other way round, the warning says what is wrong."""
    with (
        tls_server(tmp_path, Authority(tmp_path / "ca"), mutual=False) as server,
        only_redis(f"redis://127.0.0.1:{server.port}/0", deadline=0.25),
    ):
        for x in range(3):  # one connection that is closed may be an accident, two are a fault
            load(x)
    with only_redis(redis_server.url.replace("redis://", "rediss://"), deadline=0.25):
        load(3)
    one, two = (r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING)
    assert "write rediss:// in redis_url" in one
    assert "TLS, which this port may not speak" in two


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "certificate verify failed"),
        ({"ssl_ca_certs": "/nowhere/ca.crt"}, "/nowhere/ca.crt"),
    ],
)
def test_what_is_wrong_with_tls_is_named(
    tmp_path: Path, load: Any, options: Any, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The one warning has OpenSSL's reason or the missing file, and never says "start it"."""
    authority = Authority(tmp_path / "ca")
    with tls_server(tmp_path, authority, mutual=False) as server:
        with only_redis(f"rediss://127.0.0.1:{server.port}/0", redis_options=options):
            assert load(1)[0] == 1
        (warning,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
        assert said in warning
        assert "Start it" not in warning


# --- access rights --------------------------------------------------------------------------------

ACL = (
    "~memo:* +get +set +hmget +hgetall +hset +hsetnx +hincrby +hdel +hlen +hget +exists "
    "+unlink +del +pttl +pexpire +type +scan +getrange +echo +eval +evalsha +blmove +rpush +select"
)
"""The rule in docs/deployments.md."""


def test_the_acl_rule_suffices(
    redis_server: RedisServer, load: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A user with the rule that docs/deployments.md shows can do all that memo does.

    Only the figures of `memo doctor` need more, and without them nothing is lost, nor logged.
    """
    page = (ROOT / "docs" / "deployments.md").read_text("utf-8")
    assert ACL in page.replace("\n", " ")
    admin = redis_server.client()
    admin.execute_command("ACL", "SETUSER", "worker", "on", ">pass", *ACL.split())
    url = redis_server.url.replace("//", "//worker:pass@")
    try:
        with only_redis(url):
            works(load)

            @memo.cache(ttl=60, use_lock=True, name="locked")
            def locked() -> int:
                return 5

            assert locked() == locked() == 5
            load.cache_clear()
            with pytest.raises(memo.NothingMatchedError):
                memo.invalidate(prefix="misspelt", strict=True)
            denied = admin.execute_command("ACL", "LOG")
            assert not denied, denied
            assert all(memo.health().capabilities.values())
            assert not [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    finally:
        admin.execute_command("ACL", "DELUSER", "worker")
        admin.execute_command("ACL", "LOG", "RESET")


MORE = {
    "tracking": "+hello +client|tracking",
    "doctor": "+info +dbsize",
    "cluster": "+cluster|slots +cluster|shards +command +asking",
}
"""The words that docs/deployments.md adds to the rule."""


def test_the_acl_rule_for_tracking_and_figures(redis_server: RedisServer, load: Any) -> None:
    """With what the page adds for them, tracking listens and `memo doctor` shows the version."""
    page = (ROOT / "docs" / "deployments.md").read_text("utf-8").replace("`", "")
    admin = redis_server.client()
    rule = [*ACL.split(), *MORE["tracking"].split(), *MORE["doctor"].split()]
    assert all(added in page for added in MORE.values())
    admin.execute_command("ACL", "SETUSER", "worker", "on", ">pass", *rule)
    url = redis_server.url.replace("//", "//worker:pass@")
    try:
        with memo.configure(redis_url=url, coherence="tracking", deadline=2.0):
            works(load)
            facts = drive(default_chain().health(BLOCKING))["redis"]
        assert facts["tracking"] == "listening"
        assert facts["version"]
        assert not admin.execute_command("ACL", "LOG")
    finally:
        admin.execute_command("ACL", "DELUSER", "worker")
        admin.execute_command("ACL", "LOG", "RESET")


def test_the_acl_rule_for_a_cluster(cluster: Cluster, load: Any) -> None:
    """With what the page adds for a cluster, all of it works there."""
    rule = [*ACL.replace("memo:", "ruled:").split(), *MORE["cluster"].split()]
    for server in cluster.servers:
        server.ask("ACL", "SETUSER", "worker", "on", ">pass", *rule)
    with only_redis(cluster.url.replace("//", "//worker:pass@"), namespace="ruled"):
        works(load)
        load.cache_clear()
    for server in cluster.servers:
        assert not server.ask("ACL", "LOG")
        server.ask("ACL", "DELUSER", "worker")


LOST = {
    "-blmove": "",
    "-getrange": "could not be searched",
    "-scan": "could not be searched",
    "-info -dbsize": "",
}
"""Commands without which memo works, and what a strict invalidation says then."""


@pytest.mark.parametrize("denied", LOST)
def test_what_is_lost_without_a_command(
    redis_server: RedisServer, load: Any, denied: str, tmp_path: Path
) -> None:
    """Calls, leases and invalidations work without it; a strict one says what it cannot search."""
    admin = redis_server.client()
    rule = [*ACL.split(), *MORE["doctor"].split(), *denied.split()]
    admin.execute_command("ACL", "SETUSER", "worker", "on", ">pass", *rule)
    try:
        url = redis_server.url.replace("//", "//worker:pass@")
        with only_redis(url, directory=tmp_path):
            works(load)

            @memo.cache(ttl=60, use_lock=True, name=f"lost {denied}")
            def locked() -> float:
                return time.perf_counter()

            assert locked() == locked()
            assert memo.health().ok
            if LOST[denied]:
                told = memo.invalidate(prefix="misspelt", strict=True)
                assert LOST[denied] in str(told)
            else:
                with pytest.raises(memo.NothingMatchedError):
                    memo.invalidate(prefix="misspelt", strict=True)
    finally:
        admin.execute_command("ACL", "DELUSER", "worker")
        admin.execute_command("ACL", "LOG", "RESET")


def test_credential_providers(redis_server: RedisServer, load: Any) -> None:
    """`redis_options` takes redis-py's credential providers."""
    admin = redis_server.client()
    admin.execute_command("ACL", "SETUSER", "token", "on", ">pass", "~*", "+@all")
    provider = redis.UsernamePasswordCredentialProvider("token", "pass")
    try:
        with only_redis(redis_server.url, redis_options={"credential_provider": provider}):
            works(load)
            names = {client["user"] for client in admin.client_list()}
            assert "token" in names
    finally:
        admin.execute_command("ACL", "DELUSER", "token")


@pytest.mark.parametrize("denied", ["-evalsha", "-eval -evalsha", "-info -config -client -script"])
def test_commands_that_are_forbidden(redis_server: RedisServer, load: Any, denied: str) -> None:
    """Without scripts, or without `INFO`, `CONFIG` and `CLIENT`, calls still hit."""
    admin = redis_server.client()
    admin.execute_command("ACL", "SETUSER", "few", "on", ">p", "~*", "+@all", *denied.split())
    try:
        with only_redis(redis_server.url.replace("//", "//few:p@")):
            # What is asked while the first refusal is on its way may be computed once more.
            until(lambda: load.each(range(5)) == load.each(range(5)), 10)
            first = load.each(range(5))
            load.invalidate()
            assert load(1) != first[1]
            assert load(1) == load(1)
            kept = load(1)
            memo.invalidate(tag="users")
            assert load(1) != kept
    finally:
        admin.execute_command("ACL", "DELUSER", "few")


RENAMED = ("CLIENT", "SCRIPT", "EVALSHA", "INFO", "CONFIG", "DBSIZE", "PING")


@pytest.fixture
def renamed(tmp_path: Path) -> Iterator[Server]:
    """A server whose provider has renamed commands in its redis.conf, or taken them away."""
    conf = tmp_path / "redis.conf"
    names = ("", *(f"renamed-{number}" for number in range(1, len(RENAMED))))
    lines = [f'rename-command {old} "{new}"' for old, new in zip(RENAMED, names, strict=True)]
    conf.write_text("\n".join(lines), encoding="utf-8")
    server = Server(tmp_path / "renamed", free_ports(1)[0], str(conf))
    yield server
    server.kill()


def test_commands_that_are_renamed(renamed: Server, load: Any, tmp_path: Path) -> None:
    """Nor does it matter that a provider renamed them or took them away; health says it is well."""
    for name in RENAMED:
        with pytest.raises(redis.ResponseError, match="unknown command"):
            renamed.ask(name)
    url = f"redis://127.0.0.1:{renamed.port}/0"
    with only_redis(url, directory=tmp_path / "memo"):
        until(lambda: load.each(range(5)) == load.each(range(5)), 10)
        works(load)
        assert memo.health().capabilities == dict.fromkeys(KINDS, True)


def test_tracking_where_client_is_renamed(
    renamed: Server, load: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """`coherence="tracking"` works as `"strict"`; one warning names the command that is missing."""
    with memo.configure(
        redis_url=f"redis://127.0.0.1:{renamed.port}/0", coherence="tracking", deadline=2.0
    ):
        until(lambda: load.each(range(5)) == load.each(range(5)), 10)
        works(load)
        facts = drive(default_chain().health(BLOCKING))["redis"]
    assert facts["tracking"] == "strict (does not have a command: UNKNOWN)"
    (told,) = [r.getMessage() for r in caplog.records if "hits in memory" in r.getMessage()]
    assert "unknown command 'CLIENT'" in told


def test_capabilities_are_tried_once(redis_server: RedisServer, load: Any) -> None:
    """Neither what works nor what is forbidden is tried again with each operation."""
    admin = redis_server.client()
    rule = ("~*", "+@all", "-eval", "-evalsha")
    admin.execute_command("ACL", "SETUSER", "few", "on", ">p", *rule)
    try:
        for url in (redis_server.url, redis_server.url.replace("//", "//few:p@")):
            with only_redis(url):
                for _ in range(2):
                    load.each(range(5)), load.invalidate(), load(1)
                admin.config_resetstat()
                for x in range(10):
                    load(x), load.invalidate(x)
                stats = admin.info("commandstats")
                assert "cmdstat_eval" not in stats
                assert url == redis_server.url or "cmdstat_evalsha" not in stats
    finally:
        admin.execute_command("ACL", "DELUSER", "few")


# --- reads, but does not write -------------------------------------------------------------------


def replica(server: RedisServer) -> Callable[[], None]:
    client = server.client()
    client.replicaof("127.0.0.1", 1)
    return lambda: client.replicaof("NO", "ONE")


def too_few_replicas(server: RedisServer) -> Callable[[], None]:
    client = server.client()
    client.config_set("min-replicas-to-write", 1)
    return lambda: client.config_set("min-replicas-to-write", 0)


def cannot_save(server: RedisServer) -> Callable[[], None]:
    client = server.client()
    config = client.config_get()
    taken = Path(config["dir"], config["dbfilename"])
    taken.unlink(missing_ok=True)
    taken.mkdir()
    client.config_set("save", "3600 1")
    client.bgsave()
    until(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err")

    def undo() -> None:
        taken.rmdir()
        client.save()
        client.config_set("save", "")

    return undo


def full(server: RedisServer) -> Callable[[], None]:
    client = server.client()
    client.config_set("maxmemory", 1)
    return lambda: client.config_set("maxmemory", 0)


def reads_only(server: RedisServer) -> Callable[[], None]:
    client = server.client()
    client.execute_command("ACL", "SETUSER", "default", "-@write")
    return lambda: client.execute_command("ACL", "SETUSER", "default", "+@all")


def refused(server: RedisServer) -> int:
    """The number of commands that it has refused."""
    rows = server.client().info("commandstats").values()
    return sum(row["rejected_calls"] + row["failed_calls"] for row in rows)


REFUSALS = {
    "replica": replica,
    "min-replicas": too_few_replicas,
    "failing save": cannot_save,
    "full": full,
    "read-only user": reads_only,
}


@pytest.mark.parametrize("how", REFUSALS)
@pytest.mark.parametrize("memory", [0, 1 << 20], ids=["no memory tier", "memory"])
def test_a_redis_that_reads_but_does_not_write(
    redis_server: RedisServer, load: Any, how: str, memory: int
) -> None:
    """Hits go on; what is computed hits; an invalidation acts here at once, and arrives later."""
    with memo.configure(redis_url=redis_server.url, deadline=2.0, memory_limit=memory):
        first = load.each(range(5))
        undo = REFUSALS[how](redis_server)
        try:
            assert load.each(range(5)) == first

            @memo.cache(ttl=60, name=f"never before {how} {memory}")
            def new(x: int) -> float:
                return time.perf_counter()

            assert new(1) == new(1) == new(1)
            before = new(2)
            assert new(2) == before
            new.invalidate(2)
            assert new(2) != before
            assert new(2) == new(2)
            fresh = load.each(range(100, 110))
            for _ in range(5):
                assert load.each(range(100, 110)) == fresh
            told = load.invalidate(1)
            assert load(1) != first[1]
            kept = load(1)
            assert load(1) == load(1) == kept
            assert told.tiers["redis"].startswith("done" if how == "full" else "journalled")
            count = len(load.ran)
            for _ in range(30):
                load.each((1, 2, 3, 100, 105))
            assert len(load.ran) == count, "it flaps"
            before = refused(redis_server)
            load.each(range(300, 340))
            assert how == "full" or refused(redis_server) - before < 30, "each write is tried"
        finally:
            undo()

        def written() -> bool:
            load.each(range(200, 202))
            load(201)
            return bool(load.invalidate(2).tiers["redis"] == "done")

        until(written, 10)
        assert load(1) != first[1]


# --- addresses -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("redis://cache?sslcert=x", "sslcert"),
        ("redis://cache?socket_timeout=5", "deadline"),
        ("redis+sentinel://one,two", "mymaster"),
        ("redis://one,two", "redis+cluster"),
        ("redis+cluster://one/3", "database 0"),
        ("valkey://cache", "redis+sentinel://"),
        ("redis://:a/b@cache", "write `/` as %2F"),
        ("redis://:a?b@cache", "`?` as %3F"),
        ("redis://user:12#34@cache", "`#` as %23"),
        ("rediss://cache?ssl_cert_reqs=maybe", "required, optional, none"),
        ("rediss://cache?ssl_check_hostname=maybe", "true or false"),
        ("rediss://cache?ssl_min_version=TLSv1_2", "771 for TLS 1.2"),
    ],
)
def test_wrong_addresses_are_named(url: str, said: str) -> None:
    """The error of a wrong URL names the fault and the text to write."""
    with pytest.raises(memo.SettingError, match="redis_url") as caught:
        memo.configure(redis_url=url)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ssl_ca_cert": "x"}, "did you mean 'ssl_ca_certs'"),
        ({"retry": 3}, "does not retry"),
        ("password", "is not a mapping"),
        ({"db": "first"}, "number of a database"),
        ({"credential_provider": "me"}, "get_credentials"),
        ({"credential_provider": object(), "password": "x"}, "either"),
    ],
)
def test_wrong_options_are_named(options: Any, said: str) -> None:
    """An argument that redis-py does not have, or that memo needs for itself, is an error."""
    with pytest.raises(memo.SettingError, match="redis_options") as caught:
        memo.configure(redis_options=options)
    assert said in str(caught.value)


def test_options_reach_redis_py_as_it_takes_them() -> None:
    """Text of a URL becomes a number or a truth value where redis-py wants one, and only there."""
    from memo.settings import redis_urls

    query = "ssl_min_version=771&ssl_check_hostname=0&password=yes&db=2"
    found = redis_urls.parse(f"rediss://cache?{query}").options
    wanted = {"ssl_min_version": 771, "ssl_check_hostname": False, "password": "yes", "db": 2}
    assert found == wanted


def test_no_options_are_shown_that_are_no_mapping(monkeypatch: pytest.MonkeyPatch) -> None:
    """Text in place of `redis_options` may have a password in it; the error says what to write."""
    from memo.settings import configuration

    monkeypatch.setenv("MEMO_REDIS_OPTIONS", '{"password": "hunter2"}')
    configuration.reload()
    with pytest.raises(memo.SettingError, match=r"\[tool.memo.redis_options\]") as caught:
        configuration.current()
    assert "hunter2" not in str(caught.value)


def test_options_from_a_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`[tool.memo.redis_options]` holds arguments of redis-py; their values never show."""
    from memo.settings import configuration

    text = '[tool.memo.redis_options]\nusername = "ann"\npassword = "s3cret"\n'
    (tmp_path / "pyproject.toml").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    configuration.reload()
    found = configuration.current().redis_options
    assert found is not None
    assert found["username"] == "ann"
    assert "s3cret" not in repr(configuration.current())


def test_a_database_that_does_not_exist(
    redis_server: RedisServer, load: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A database number out of range is named as that."""
    with only_redis(redis_server.url.replace("/0", "/99")):
        assert load(1)[0] == 1
    assert any("does not have that database" in r.getMessage() for r in caplog.records)


def test_doctor_tries_each_capability(redis_server: RedisServer, tmp_path: Path) -> None:
    """`memo doctor` says what works and what does not, and exits with 1 where sharing does not."""
    admin = redis_server.client()
    rule = ("~*", "+@all", "-eval", "-evalsha", "-info")
    admin.execute_command("ACL", "SETUSER", "few", "on", ">p", *rule)
    try:
        with only_redis(redis_server.url, directory=tmp_path):
            found = {one.topic: one.level for one in examine()}
            assert [found[f"redis {kind}"] for kind in KINDS] == [GOOD] * 5
            assert CliRunner().invoke(main, ["doctor"]).exit_code == 0
        with only_redis(redis_server.url.replace("//", "//few:p@"), directory=tmp_path):
            found = {one.topic: one.level for one in examine()}
            assert CliRunner().invoke(main, ["doctor"]).exit_code == 1
        assert [found[f"redis {kind}"] for kind in KINDS] == [GOOD, GOOD, FAIL, FAIL, GOOD]
    finally:
        admin.execute_command("ACL", "DELUSER", "few")
    assert all(0 < admin.ttl(key) <= 60 for key in admin.keys("memo:2:*doctor*"))


# --- keys in Redis --------------------------------------------------------------------------------


def test_every_key_expires(redis_server: RedisServer) -> None:
    """Entries, groups and leases expire; a tag goes within a minute after its last entry's ttl."""

    @memo.cache(ttl=20, tags=["customer:7"], use_lock=True, key_prefix="sales", name="short")
    def short(x: int) -> int:
        return x

    @memo.cache(ttl=None, name="for good")
    def lasting() -> int:
        return 1

    with only_redis(redis_server.url):
        short(1), short(1), lasting(), lasting()
        for number in range(50):
            memo.invalidate(key=f"sales:{number}")
        memo.live.set("ttl.sales", "5m", shared=True)
    client = redis_server.client()
    lives = {key: client.ttl(key) for key in client.keys("*")}
    assert all(0 < seconds <= 34 * 86400 for seconds in lives.values()), lives
    assert lives[b"memo:2:g:{t:customer:7}"] <= 60
    assert all(lives[key] <= 120 for key in lives if b"{p:sales:" in key)


def test_the_live_configuration_lasts_while_it_is_read(redis_server: RedisServer) -> None:
    """Shared live values stay for a month after any process has read them."""
    client = redis_server.client()
    with memo.configure(redis_url=redis_server.url):
        memo.live.set("ttl.kept", "5m", shared=True)
        client.pexpire("memo:live", 60_000)

        @memo.cache(ttl_key="ttl.kept", name="kept")
        def load() -> int:
            return 1

        load()
        until(lambda: client.ttl("memo:live") > 29 * 86400, 5)
        assert memo.live["ttl.kept"] == 300


def test_a_foreign_value_at_a_group_is_replaced(
    redis_server: RedisServer, load: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A list where memo keeps generations costs one computation; the warning names its key."""
    client = redis_server.client()
    with only_redis(redis_server.url):
        load(1)
        for group in client.keys("memo:2:g:*"):
            client.delete(group)
            client.lpush(group, "foreign")
        load(1)
        kept = load(1)
        assert load(1) == load(1) == kept
    (told,) = [r.getMessage() for r in caplog.records if "WRONGTYPE" in r.getMessage()]
    assert re.search(r"Key: memo:2:g:\{.+\}", told), told


def test_the_command_that_an_acl_forbids_is_named(
    redis_server: RedisServer, load: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The one warning about what cannot be written has the command."""
    admin = redis_server.client()
    rule = ("~*", "+@all", "-set", "-hset")
    admin.execute_command("ACL", "SETUSER", "some", "on", ">p", *rule)
    try:
        with only_redis(redis_server.url.replace("//", "//some:p@")):
            load(1), load(1)
    finally:
        admin.execute_command("ACL", "DELUSER", "some")
    told = [r.getMessage() for r in caplog.records if "stored on this host" in r.getMessage()]
    assert len(told) == 1
    assert re.search("'h?set' command", told[0]), told


def test_many_waiters_keep_their_time_limit(redis_server: RedisServer) -> None:
    """100 callers that wait for leases of others compute after `lock_timeout`, not later."""

    @memo.cache(ttl=60, use_lock=True, lock_timeout=0.5, name="waited for")
    def slow(x: int) -> int:
        return x

    with only_redis(redis_server.url):
        chain = default_chain()
        leases = chain.tiers[0].leases  # type: ignore[attr-defined]
        for x in range(100):
            name = chain.name(slow.function_id, slow.key(x))
            assert drive(leases.acquire(BLOCKING, name, "elsewhere/host/1/x")) is None
        seconds: list[float] = []

        def call(x: int) -> None:
            begun = time.perf_counter()
            assert slow(x) == x
            seconds.append(time.perf_counter() - begun)

        threads = [threading.Thread(target=call, args=(x,)) for x in range(100)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(seconds) == 100
    assert min(seconds) > 0.4
    assert statistics.median(seconds) < 1.5  # a busy machine holds some threads up
    assert max(seconds) < 5


def test_health_as_data(redis_server: RedisServer, tmp_path: Path) -> None:
    """`memo.health()` has each capability, a table and a frame; not ok where one is missing."""
    admin = redis_server.client()
    rule = ("~*", "+@all", "-eval", "-evalsha")
    admin.execute_command("ACL", "SETUSER", "few", "on", ">p", *rule)
    try:
        with only_redis(redis_server.url, directory=tmp_path):
            good = memo.health()
        with only_redis(redis_server.url.replace("//", "//few:p@"), directory=tmp_path):
            bad = memo.health()
    finally:
        admin.execute_command("ACL", "DELUSER", "few")
    assert good.ok
    assert good.capabilities == dict.fromkeys(KINDS, True)
    assert not bad.ok
    assert bad.capabilities == {**good.capabilities, "script": False, "lease": False}
    assert list(bad.to_frame()["topic"]) == [finding.topic for finding in bad]
    assert "fail  redis lease" in repr(bad)
    assert "redis lease" in bad._repr_html_()
    redis_server.stop()
    with only_redis(redis_server.url, directory=tmp_path):
        gone = memo.health()
    assert not gone.ok
    assert gone.capabilities == {}


# --- a rolling upgrade ---------------------------------------------------------------------------


@pytest.mark.parametrize("tiers", [["redis"], ["disk"]], ids="+".join)
def test_two_formats_side_by_side(
    redis_server: RedisServer, tmp_path: Path, tiers: list[str]
) -> None:
    """Versions of memo that store in different formats share a Redis and a directory in turn."""
    settings = {"redis_url": redis_server.url, "directory": str(tmp_path), "tiers": tiers}
    code = """
import json, sys
import limits
limits.change(stored_format=int(sys.argv[1]))
import memo
memo.configure(**json.loads(sys.argv[2]))
ran = []
@memo.cache(name="upgrade:load", version="1", ttl=None)
def load(x):
    ran.append(x)
    return x
load(1), load(2)
if sys.argv[3:]:
    load.invalidate(1)
print(ran)
"""

    def ran(version: int, *invalidates: str) -> str:
        command = [sys.executable, "-c", code, str(version), json.dumps(settings), *invalidates]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(SUPPORT)))}
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
        assert done.stderr == ""
        return done.stdout.strip()

    assert ran(2) == "[1, 2]"
    assert ran(3) == "[1, 2]", "it does not take what the other version stored"
    assert ran(2) == "[]", "nor did it spoil that"
    assert ran(3, "invalidates") == "[]"
    assert ran(2) == "[]", "an invalidation reaches the entries of its own version"
    assert ran(3) == "[1]"
