"""The payload store: what is too big for Redis reaches other hosts by a folder or a bucket."""

from __future__ import annotations

import gc
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import fsspec.asyn
import numpy as np
import psutil
import pytest
from deployments import until
from fsspec.implementations.local import LocalFileSystem
from moto.server import ThreadedMotoServer
from redis_server import RedisServer
from styles import STYLES, Style

import memo
from memo.records.codec import payload
from memo.records.payload_pieces import PayloadInMemory
from memo.runtime.blocking import drain_blocking
from memo.stores.redis.payload_store import PAYLOAD_KEPT_SECONDS, PayloadStore
from memo.testing import recording

N = 300_000
"""Numbers of an array of 2.4 MB."""
styles = pytest.mark.parametrize("style", STYLES[:2], ids=str)


class Bucket:
    """A bucket of an S3 server on loopback."""

    def __init__(self, server: ThreadedMotoServer) -> None:
        host, port = server.get_host_and_port()
        self.endpoint = f"http://{host}:{port}"
        self.client = boto3.client("s3", endpoint_url=self.endpoint)
        self.client.create_bucket(Bucket="results")
        self.url = "s3://results/memo"

    def connections(self) -> list[Any]:
        port = int(self.endpoint.rpartition(":")[2])
        return [
            one
            for one in psutil.Process().net_connections("tcp")
            if one.raddr and port in (one.raddr.port, one.laddr.port)
        ]

    def files(self) -> list[str]:
        found = self.client.list_objects_v2(Bucket="results").get("Contents", [])
        return [one["Key"] for one in found]

    def damage(self, name: str) -> None:
        data = self.client.get_object(Bucket="results", Key=name)["Body"].read()
        self.client.put_object(Bucket="results", Key=name, Body=data[:-1] + b"\x01")

    def remove(self, name: str) -> None:
        self.client.delete_object(Bucket="results", Key=name)


class Folder:
    """A folder that hosts share."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.url = str(path)

    def files(self) -> list[str]:
        return [str(path) for path in self.path.rglob("*") if path.is_file()]

    def damage(self, name: str) -> None:
        data = Path(name).read_bytes()
        Path(name).write_bytes(data[:-1] + b"\x01")

    def remove(self, name: str) -> None:
        os.unlink(name)


@pytest.fixture(scope="module", autouse=True)
def s3() -> Iterator[ThreadedMotoServer]:
    """An S3 server, and fsspec's thread, which stays; before descriptors are counted."""
    fsspec.asyn.get_loop()
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield server
    server.stop()


@pytest.fixture(params=["folder", "s3"])
def place(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Any]:
    if request.param == "folder":
        yield Folder(tmp_path / "shared")
        return
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    bucket = Bucket(request.getfixturevalue("s3"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", bucket.endpoint)
    yield bucket
    for name in bucket.files():
        bucket.remove(name)
    bucket.client.close()
    memo.testing.reset()
    until(lambda: gc.collect() >= 0 and not bucket.connections(), 20)


class Hosts:
    """Hosts that share a Redis and a payload store, each with a directory of its own."""

    def __init__(self, server: RedisServer, place: Any, directory: Path) -> None:
        self._settings = {
            "redis_url": server.url,
            "redis_value_limit": "1MiB",
            "payload_store": place.url,
            "memory_limit": 0,
            "deadline": 5,
        }
        self._directory = directory

    def on(self, name: str) -> Any:
        return memo.configure(directory=self._directory / name, **self._settings)


@pytest.fixture
def hosts(redis_server: RedisServer, place: Any, tmp_path: Path) -> Hosts:
    return Hosts(redis_server, place, tmp_path)


def numbers(style: Style = STYLES[0]) -> tuple[Any, list[int]]:
    ran: list[int] = []

    def load(n: int) -> Any:
        ran.append(n)
        return np.arange(n)

    return style.cached(load, ttl=600), ran


@styles
def test_another_host_gets_what_redis_does_not_take(hosts: Hosts, place: Any, style: Style) -> None:
    """A payload above `redis_value_limit` goes to the store behind the call, for all hosts."""
    load, ran = numbers(style)
    with hosts.on("one"), recording() as events:
        style.call(load, N)
        assert drain_blocking(20)
    assert [event.tier for event in events if event.kind == "uploaded"] == ["redis"]
    assert len(place.files()) == 1
    with hosts.on("two"):
        assert np.array_equal(style.call(load, N), np.arange(N))
        place.remove(place.files()[0])
        assert np.array_equal(style.call(load, N), np.arange(N))  # it is on this host's disk now
    assert ran == [N]


@pytest.mark.parametrize("harm", ["damage", "remove"])
def test_a_payload_that_is_not_whole_is_computed(hosts: Hosts, place: Any, harm: str) -> None:
    """One that was changed or removed in the store is never used."""
    load, ran = numbers()
    with hosts.on("one"):
        load(N)
        assert drain_blocking(20)
    getattr(place, harm)(place.files()[0])
    with hosts.on("two"):
        assert np.array_equal(load(N), np.arange(N))
        assert np.array_equal(load(N), np.arange(N))
        assert drain_blocking(20)
    assert ran == [N, N]


def test_small_payloads_go_to_redis(hosts: Hosts, place: Any) -> None:
    """A payload that Redis takes is not written to the store."""
    load, ran = numbers()
    with hosts.on("one"):
        load(1000), load(100_000)
        assert drain_blocking(20)
    assert place.files() == []
    with hosts.on("two"):
        load(1000), load(100_000)
    assert ran == [1000, 100_000]


def test_clearing_takes_the_payloads_along(hosts: Hosts, place: Any) -> None:
    """Clearing the whole namespace empties its part of the store."""
    load, _ = numbers()
    with hosts.on("one"):
        load(N)
        assert drain_blocking(20)
        from memo.decorators.assembly import default_chain
        from memo.runtime.blocking import BLOCKING, drive

        drive(default_chain().clear(BLOCKING))
    assert place.files() == []


def test_a_store_that_is_away(
    redis_server: RedisServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Results are returned and kept on this host; one warning names the store, as health does."""
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    hosts = Hosts(redis_server, Folder(blocked / "shared"), tmp_path)
    load, ran = numbers()
    with hosts.on("one"):
        for n in (N, N + 1, N, N + 1):
            assert np.array_equal(load(n), np.arange(n))
        assert drain_blocking(20)
        health = memo.health()
    assert ran == [N, N + 1]
    told = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(told) == 1
    assert str(blocked / "shared") in told[0]
    assert "payload_store" in told[0]
    assert not health.ok
    assert health.capabilities["payload store"] is False


def test_health_tries_the_store(hosts: Hosts, place: Any) -> None:
    """`memo.health()` writes and reads there, and leaves nothing."""
    with hosts.on("one"):
        assert memo.health().capabilities["payload store"] is True
    assert place.files() == []


def test_old_payloads_are_swept(place: Any) -> None:
    """A payload goes when no entry can name it any more; one stored again in time stays."""
    days = 86400.0
    old, kept = payload([memoryview(b"a" * 500)]), payload([memoryview(b"b" * 500)])
    clock = [time.time()]
    store = PayloadStore(place.url, "memo/2", lambda: clock[0])
    store.store(old), store.store(kept)
    clock[0] += PAYLOAD_KEPT_SECONDS + days
    store.store(kept)  # too old to outlive a new entry: written again
    assert len(place.files()) == 2
    for path in place.files():
        if isinstance(place, Folder) and kept.digest.hex() in path:
            os.utime(path, (clock[0], clock[0]))
    clock[0] += PAYLOAD_KEPT_SECONDS
    store.store(payload([memoryview(b"c" * 500)]))
    assert not any(old.digest.hex() in path for path in place.files())
    assert isinstance(place, Bucket) or store.fetch(kept.digest, PayloadInMemory(kept.size))


def test_two_hosts_may_sweep_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A payload that another host removes meanwhile is no fault of the store."""
    place = Folder(tmp_path / "shared")
    clock = [time.time()]
    store = PayloadStore(place.url, "memo/2", lambda: clock[0])
    store.store(payload([memoryview(b"a" * 500)]))
    remove = LocalFileSystem.rm_file

    def removed_by_both(fs: Any, path: str) -> None:
        remove(fs, path)
        remove(fs, path)

    monkeypatch.setattr(LocalFileSystem, "rm_file", removed_by_both)
    clock[0] += 3 * PAYLOAD_KEPT_SECONDS
    for data in (b"b", b"c"):  # the sweep behind the first removes all, as old as the clock is
        store.store(payload([memoryview(data * 500)]))
    assert len(place.files()) == 1


@pytest.mark.parametrize("value", ["nowhere://bucket", 5])
def test_a_wrong_store_is_named(value: Any) -> None:
    """A value that cannot be a store is an error that names the setting."""
    with pytest.raises(memo.SettingError, match="payload_store"):
        memo.configure(payload_store=value)
