"""Big results and Redis: uploads behind the caller's back, and fetches that take no memory."""

from __future__ import annotations

import asyncio
import gc
import mmap
import os
import resource
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chaos import Proxy
from checkout import ROOT
from hypothesis import given
from hypothesis import strategies as st
from inner_faults import failing
from observed import calls_of
from redis_server import RedisServer

import memo
from memo import cache
from memo.decorators import assembly
from memo.records import codec
from memo.records.payload_pieces import TRANSFER_CHUNK_BYTES, DigestCheck, outgoing
from memo.records.seal import ALIGN
from memo.runtime import events
from memo.runtime.blocking import BLOCKING, drain_blocking, drive
from memo.runtime.native import drain
from memo.stores.disk import payload_files
from memo.stores.redis.redis_tier import Redis
from memo.stores.transfers import CONCURRENT_UPLOADS, MAX_QUEUED_BYTES, Upload, Uploads
from memo.testing import recording, reset

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
BIG = 300_000
"""Numbers of an array of 2.4 MB: more than is sent while the caller waits."""


@pytest.fixture
def shared(redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> RedisServer:
    """Redis over disk, with time enough for a busy machine."""
    monkeypatch.setenv("MEMO_REDIS_URL", redis_server.url)
    monkeypatch.setenv("MEMO_DEADLINE", "10")
    return redis_server


class Gate:
    """Lets uploads through to a Redis when it is opened.

    Attributes:
        url: the way to that Redis.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.reached = threading.Event()
        self.opened = threading.Event()


@pytest.fixture
def gate(redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """Every upload waits at it, on its way to Redis, before a byte of it is there."""

    def hold(asked: bytes) -> None:
        if (b"PTTL\r\n" in asked and b":p:" in asked) or len(asked) > 50_000:
            gate.reached.set()
            gate.opened.wait(60)

    with Proxy(redis_server.port) as proxy:
        gate = Gate(proxy.url)
        proxy.hold = hold
        monkeypatch.setenv("MEMO_REDIS_URL", proxy.url)
        yield gate
        gate.opened.set()
        drain_blocking(10)
        reset()


def kinds(seen: list[events.Event], *wanted: str) -> list[events.Event]:
    return [event for event in seen if event.kind in wanted]


UPLOADS = (events.UPLOADED, events.UPLOAD_FAILED)


def records(server: RedisServer) -> list[bytes]:
    return list(server.client().keys("memo:2:{*"))


def redis_tier() -> Any:
    return next(tier for tier in assembly.default_chain().tiers if tier.name == "redis")


def numbers_sync(name: str, **options: Any) -> Any:
    @cache(ttl=600, name=name, version="1", **options)
    def numbers(n: int) -> Any:
        return np.arange(n)

    return numbers


# --- the caller ----------------------------------------------------------------------------------


def test_the_caller_does_not_wait_for_the_upload(shared: RedisServer, gate: Gate) -> None:
    """A big result is returned when this host has it; what has it is said, and when Redis does."""
    numbers = numbers_sync("n")
    with recording() as seen:
        numbers(BIG)
        assert gate.reached.wait(10)
        (stored,) = kinds(seen, events.STORED)
        assert stored.tier == "memory,disk"
        assert stored.detail == "redis follows"
        assert not kinds(seen, *UPLOADS)
        assert not records(shared)
        gate.opened.set()
        assert drain_blocking(10)
    (done,) = kinds(seen, *UPLOADS)
    assert (done.kind, done.tier, done.function) == (events.UPLOADED, "redis", "n")
    assert done.size > BIG * 8
    assert done.key == numbers.key(BIG)
    assert len(records(shared)) == 1


def test_the_caller_of_an_async_function_does_not_wait_either(
    shared: RedisServer, gate: Gate
) -> None:
    """The same for `async def`; the end of its loop does not end the upload."""

    @cache(ttl=600, name="n", version="1")
    async def numbers(n: int) -> Any:
        return np.arange(n)

    async def main() -> None:
        await numbers(BIG)
        assert gate.reached.wait(10)
        assert not await drain(0.01)

    asyncio.run(main())
    assert not records(shared)
    gate.opened.set()
    assert drain_blocking(10)
    assert len(records(shared)) == 1


def test_what_the_caller_does_to_the_value_is_not_uploaded(shared: RedisServer, gate: Gate) -> None:
    """The upload is of what was stored, not of what the caller has made of it since."""
    numbers = numbers_sync("n")
    numbers(BIG)[:] = -1
    gate.opened.set()
    drain_blocking(10)
    assert elsewhere("n", BIG) == ["0", str(BIG - 1)]


@pytest.mark.parametrize(
    "settings",
    [{"tiers": "redis"}, {"tiers": "memory,redis"}, {"read_strategy": "on_error"}],
    ids=str,
)
def test_it_waits_where_this_host_could_not_answer(
    shared: RedisServer, settings: dict[str, Any]
) -> None:
    """Without a disk tier that every lookup reaches, the result is in Redis on its return."""
    numbers = numbers_sync("n")
    with memo.configure(**settings), recording() as seen:
        numbers(BIG)
        assert len(records(shared)) == 1
    assert "redis" in kinds(seen, events.STORED)[0].tier
    assert not kinds(seen, *UPLOADS)


def test_only_the_first_tier_is_written_around(shared: RedisServer) -> None:
    """With `write_around` a big result goes to Redis at once, and nowhere else."""
    numbers = numbers_sync("n")
    with memo.configure(write_strategy="write_around"), recording() as seen:
        numbers(BIG)
        assert len(records(shared)) == 1
    assert kinds(seen, events.STORED)[0].tier == "memory,redis"


def test_small_results_are_in_redis_when_they_are_returned(shared: RedisServer) -> None:
    """Below a mebibyte nothing is put off."""
    numbers = numbers_sync("n")
    with recording() as seen:
        numbers(TRANSFER_CHUNK_BYTES // 8 - 1000)
        assert len(records(shared)) == 1
    assert not kinds(seen, *UPLOADS)


def test_a_big_record_is_uploaded_too(shared: RedisServer) -> None:
    """A value without buffers is put off just so, and comes whole."""

    @cache(ttl=600, name="text", version="1")
    def text(n: int) -> bytes:
        return b"x" * n

    with recording() as seen:
        text(3_000_000)
        drain_blocking(10)
    assert kinds(seen, events.STORED)[0].tier == "memory,disk"
    assert kinds(seen, *UPLOADS)[0].kind == events.UPLOADED
    reset()
    with memo.configure(directory=str(Path(os.environ["MEMO_DIRECTORY"]) / "other")):
        assert text.peek(3_000_000) == b"x" * 3_000_000


@pytest.mark.parametrize("make", [lambda n: np.arange(n), lambda n: b"x" * n * 8])
def test_a_hit_meanwhile_uploads_nothing_twice(
    shared: RedisServer, gate: Gate, make: Callable[[int], Any]
) -> None:
    """Hits on this host while an upload waits neither compute nor send the entry again."""

    @cache(ttl=600, name="n", version="1")
    def numbers(n: int) -> Any:
        return make(n)

    with memo.configure(memory_limit=0), recording() as seen:
        numbers(BIG)
        assert gate.reached.wait(10)
        for _ in range(3):
            assert len(numbers(BIG)) >= BIG
        gate.opened.set()
        drain_blocking(10)
    assert len(kinds(seen, events.COMPUTED)) == 1
    assert len(kinds(seen, *UPLOADS)) == 1


# --- faults, invalidations, newer results ---------------------------------------------------------


def test_redis_gone_is_one_event(shared: RedisServer) -> None:
    """An upload that fails says so once; the result stays where it is."""

    @cache(ttl=600, name="n", version="1")
    def numbers(n: int) -> Any:
        shared.stop()
        return np.arange(n)

    with recording() as seen:
        numbers(BIG)
        drain_blocking(30)
        (failed,) = kinds(seen, *UPLOADS)
        assert failed.kind == events.UPLOAD_FAILED
        assert "refuses connections" in failed.detail or "closes" in failed.detail
        assert numbers(BIG)[-1] == BIG - 1
    assert len(kinds(seen, events.COMPUTED)) == 1


def test_what_is_evicted_meanwhile_is_not_uploaded(shared: RedisServer, gate: Gate) -> None:
    """An entry that has gone from this host before its turn is a failed upload, and no more."""
    numbers = numbers_sync("n")
    ours = [numbers_sync(f"other{i}") for i in range(CONCURRENT_UPLOADS)]
    with recording() as seen:
        for other in ours:
            other(BIG)
        numbers(BIG + 1)  # waits for a worker
        chain = assembly.default_chain()
        drive(chain.tiers[-1].drop(BLOCKING, chain.name("n", numbers.key(BIG + 1))))
        gate.opened.set()
        drain_blocking(10)
    failed = kinds(seen, events.UPLOAD_FAILED)
    assert [event.detail for event in failed] == ["it is not on this host's disk any more"]
    assert len(kinds(seen, events.UPLOADED)) == CONCURRENT_UPLOADS


def test_an_invalidation_meanwhile_wins(shared: RedisServer, gate: Gate) -> None:
    """A result invalidated before its upload was done is believed by no host (I1)."""
    numbers = numbers_sync("n")
    numbers(BIG)
    assert gate.reached.wait(10)
    assert numbers.invalidate().complete
    gate.opened.set()
    drain_blocking(10)
    assert len(records(shared)) == 1, "the upload came too late"
    assert not numbers.is_cached(BIG)
    assert elsewhere("n", BIG) == ["1", str(BIG - 1)]


def test_a_newer_result_is_what_arrives(shared: RedisServer, gate: Gate) -> None:
    """A result stored while an older one is uploaded is not overwritten by that."""
    sizes = [BIG, 10]

    @cache(ttl=600, name="n", version="1")
    def numbers() -> Any:
        return np.arange(sizes.pop(0))

    numbers()
    assert gate.reached.wait(10)
    numbers.refresh()
    gate.opened.set()
    assert drain_blocking(10)
    assert not sizes
    reset()
    with memo.configure(directory=str(Path(os.environ["MEMO_DIRECTORY"]) / "other")):
        assert len(numbers.peek()) == 10


# --- single flight over hosts ---------------------------------------------------------------------

HOST = """
import sys, os
import numpy as np
import memo
from memo import cache
runs = 0
@cache(ttl=600, name=sys.argv[1], version="1", use_lock=len(sys.argv) > 4)
def numbers(n):
    global runs
    runs += 1
    return np.arange(n)
memo.configure(directory=sys.argv[3])
print("ready", flush=True)
value = numbers(int(sys.argv[2]))
print(runs, int(value[-1]), flush=True)
"""


def host(name: str, n: int, *lock: str) -> subprocess.Popen[str]:
    """Another host: a process with a directory of its own."""
    directory = Path(os.environ["MEMO_DIRECTORY"]).parent / f"elsewhere{os.urandom(4).hex()}"
    command = [sys.executable, "-c", HOST, name, str(n), str(directory), *lock]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)


def elsewhere(name: str, n: int) -> list[str]:
    """Return how often the function runs on another host, and the last number that it gets."""
    with host(name, n) as process:
        out, _ = process.communicate(timeout=60)
    return out.split()[1:]


def leases(server: RedisServer) -> list[bytes]:
    return server.client().keys("memo:2:l:*")


def test_the_lease_is_held_until_redis_has_the_result(shared: RedisServer, gate: Gate) -> None:
    """With `use_lock` a waiter on another host gets the lease when it finds the entry (I3)."""
    numbers = numbers_sync("n", use_lock=True)
    numbers(BIG)
    assert gate.reached.wait(10)
    assert len(leases(shared)) == 1
    with host("n", BIG, "lock") as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        assert len(leases(shared)) == 1
        gate.opened.set()
        assert other.stdout.readline().split() == ["0", str(BIG - 1)]
    drain_blocking(10)
    assert not leases(shared)


def test_the_lease_is_freed_when_the_upload_fails(shared: RedisServer, gate: Gate) -> None:
    """A call that waits for a result that cannot be uploaded computes it, and waits no longer."""
    numbers = numbers_sync("n", use_lock=True)
    numbers(BIG)
    assert gate.reached.wait(10)
    shared.client().config_set("maxmemory", 1)
    with recording() as seen:
        gate.opened.set()
        drain_blocking(10)
    assert [event.kind for event in kinds(seen, *UPLOADS)] == [events.UPLOAD_FAILED]
    assert [event.tier for event in kinds(seen, events.ERROR)] == [
        "redis"
    ]  # counted in the figures
    assert not leases(shared)
    assert elsewhere("n", BIG)[0] == "1"


def test_one_refresh_in_the_cluster_although_its_upload_takes_time(
    shared: RedisServer, gate: Gate
) -> None:
    """The lease of a refresh too ends when the other hosts can see what it brought."""
    numbers = numbers_sync("n", stale_while_revalidate=600)
    gate.opened.set()
    numbers(BIG)
    drain_blocking(10)
    gate.opened.clear()
    gate.reached.clear()
    memo.live["ttl.n"] = "1ms"
    fresh = numbers_sync("n", stale_while_revalidate=600, ttl_key="ttl.n")
    fresh(BIG)
    assert gate.reached.wait(10)
    assert len(leases(shared)) == 1
    gate.opened.set()
    drain_blocking(10)
    assert not leases(shared)


# --- the queue ------------------------------------------------------------------------------------


class Sent:
    """Uploads that a test lets end."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.gates: dict[str, threading.Event] = {}
        self.uploads = Uploads(self.send)

    async def send(self, port: Any, name: str) -> None:
        gate = self.gates.setdefault(name, threading.Event())
        self.begun.append(name)
        assert gate.wait(10)
        if name == "bad":
            raise RuntimeError(name)

    def add(self, name: str, size: int = 1) -> Upload | None:
        self.gates.setdefault(name, threading.Event())
        return self.uploads.add(BLOCKING, name, size)

    def end(self, *names: str) -> None:
        for name in names:
            self.gates[name].set()

    def until(self, count: int) -> list[str]:
        end = threading.Event()
        for _ in range(1000):
            if len(self.begun) >= count:
                return self.begun
            end.wait(0.01)
        raise AssertionError(self.begun)


@pytest.fixture
def sent() -> Iterator[Sent]:
    sent = Sent()
    yield sent
    sent.end(*sent.gates)
    drain_blocking(10)


def test_a_few_run_at_once_in_their_order(sent: Sent) -> None:
    """No more than the workers run at once; the others wait their turn."""
    names = [f"u{i}" for i in range(CONCURRENT_UPLOADS + 2)]
    for name in names:
        sent.add(name)
    assert set(sent.until(CONCURRENT_UPLOADS)) == set(names[:CONCURRENT_UPLOADS])
    assert len(sent.begun) == CONCURRENT_UPLOADS
    sent.end(*names)
    assert set(sent.until(len(names))) == set(names)


def test_one_name_is_uploaded_once_at_a_time(sent: Sent) -> None:
    """A result stored again while it is uploaded is uploaded again afterwards, once."""
    first = sent.add("a")
    sent.until(1)
    again = sent.add("a")
    assert again is not first
    assert sent.add("a") is again
    sent.add("b")
    assert sent.until(2) == ["a", "b"]
    sent.end("a", "b")
    assert sent.until(3) == ["a", "b", "a"]
    assert drain_blocking(10)
    assert len(sent.begun) == 3
    assert sent.uploads.get("a") is None


def test_too_much_is_refused(sent: Sent) -> None:
    """If too many bytes wait already, the caller has to send its payload itself."""
    running = [f"r{i}" for i in range(CONCURRENT_UPLOADS)]
    for count, name in enumerate(running, 1):
        assert sent.add(name, MAX_QUEUED_BYTES)
        sent.until(count)
    assert sent.add("waits", MAX_QUEUED_BYTES)
    assert sent.add("more") is None
    assert sent.add("waits", MAX_QUEUED_BYTES), "it waits already"
    assert sent.add(running[0], MAX_QUEUED_BYTES), "or an older one would overwrite it"
    sent.end(*sent.gates)
    assert drain_blocking(10)
    assert sent.add("more", 2 * MAX_QUEUED_BYTES)


def later(done: list[str], name: str) -> Callable[[Any], Any]:
    async def work(port: Any) -> None:
        done.append(name)

    return work


def test_what_comes_after_comes_once(sent: Sent) -> None:
    """Work that follows an upload is done when it has ended, and never later."""
    done: list[str] = []
    upload = sent.add("a")
    assert upload is not None
    assert upload.run_after(later(done, "a"))
    assert not done
    sent.end("a")
    assert drain_blocking(10)
    assert done == ["a"]
    assert not upload.run_after(later(done, "never"))
    assert done == ["a"]


def test_a_worker_survives_what_nobody_foresaw(sent: Sent) -> None:
    """An error of ours in an upload is an event; what was to come after it comes, and the next."""
    done: list[str] = []
    with recording() as seen:
        for _ in range(CONCURRENT_UPLOADS):
            upload = sent.add("bad")
            assert upload is not None
            assert upload.run_after(later(done, "bad"))
            sent.end("bad")
            assert drain_blocking(10)
        sent.add("good")
        assert "good" in sent.until(CONCURRENT_UPLOADS + 1)
    assert done == ["bad"] * CONCURRENT_UPLOADS
    assert [event.reason for event in seen] == ["background"] * CONCURRENT_UPLOADS


def test_settings_that_end_cut_no_upload_off(
    redis_server: RedisServer, gate: Gate, tmp_path: Path
) -> None:
    """Results of a `with memo.configure(...)` block are uploaded; then its chain goes."""
    numbers = numbers_sync("n")
    alive = assembly.default_chain()
    with memo.configure(redis_url=gate.url, deadline=10, directory=tmp_path / "block"):
        numbers(BIG)
        assert gate.reached.wait(10)
        chain = weakref.ref(assembly.default_chain())
    gate.opened.set()
    assert drain_blocking(10)
    assert len(records(redis_server)) == 1
    assert assembly.default_chain() is alive
    gc.collect()
    assert chain() is None


def test_leases_that_cannot_be_freed_stop_no_upload(shared: RedisServer) -> None:
    """After any error in freeing a lease after an upload, later results are uploaded and freed."""
    numbers = numbers_sync("n", use_lock=True)
    with failing("release", CONCURRENT_UPLOADS) as failed, recording() as seen:
        for more in range(CONCURRENT_UPLOADS + 1):
            numbers(BIG + more)
            assert drain_blocking(10)
    assert len(failed) == CONCURRENT_UPLOADS
    assert len(kinds(seen, events.UPLOADED)) == CONCURRENT_UPLOADS + 1
    assert len(leases(shared)) == CONCURRENT_UPLOADS  # those end by themselves
    assert elsewhere("n", BIG + CONCURRENT_UPLOADS)[0] == "0"


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_has_no_uploads(sent: Sent) -> None:
    """Waiting uploads are the parent's: a child neither sends them nor waits for them."""
    sent.add("a")
    sent.until(1)
    sent.add("b")
    child = os.fork()
    if not child:
        os._exit(0 if sent.uploads.get("a") is None and sent.uploads.get("b") is None else 1)
    _, status = os.waitpid(child, 0)
    assert status == 0
    assert sent.uploads.get("b")


# --- the end of the process -----------------------------------------------------------------------

SCRIPT = """
import asyncio, sys, time
import numpy as np
from memo import cache
@cache(ttl=600, name="n", version="1")
async def numbers(n):
    return np.arange(n)
asyncio.run(numbers(int(sys.argv[1])))
"""


def test_a_script_that_ends_at_once_has_uploaded(shared: RedisServer) -> None:
    """A result that a program stored as its last act is in Redis when it has ended."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", SCRIPT, str(BIG)], env=env, check=True, timeout=60)
    assert elsewhere("n", BIG) == ["0", str(BIG - 1)]


FROZEN = """
import os, signal, sys
import numpy as np
from memo import cache
@cache(ttl=600, name="n", version="1")
def numbers(n):
    os.kill(int(sys.argv[2]), signal.SIGSTOP)
    return np.arange(n)
numbers(int(sys.argv[1]))
print("returned", flush=True)
"""


def test_the_end_of_a_program_is_not_put_off_for_long(shared: RedisServer) -> None:
    """An upload to a Redis that hangs holds up neither the call nor, for long, the exit."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "MEMO_DEADLINE": "300"}
    command = [sys.executable, "-c", FROZEN, str(BIG), str(shared.pid)]
    try:
        done = subprocess.run(
            command, env=env, check=True, timeout=60, capture_output=True, text=True
        )
    finally:
        os.kill(shared.pid, 18)
    assert done.stdout == "returned\n"


# --- fetches --------------------------------------------------------------------------------------


@pytest.fixture
def stored(shared: RedisServer) -> Any:
    """A function whose result lies in Redis, of a host that has another directory now."""
    numbers = numbers_sync("n")
    numbers(BIG)
    drain_blocking(10)
    reset()
    home = Path(os.environ["MEMO_DIRECTORY"]).parent / "second"
    with memo.configure(directory=str(home)):
        yield numbers


def payload_name(server: RedisServer) -> bytes:
    (name,) = server.client().keys("memo:2:p:*")
    return name


def test_a_payload_is_fetched_once_for_each_host(shared: RedisServer, stored: Any) -> None:
    """The first hit fetches to this host's disk; from then on it is mapped from there."""
    with recording() as seen:
        assert stored(BIG)[-1] == BIG - 1
        assert [e.kind for e in kinds(seen, events.FETCH_STARTED, events.FETCHED)] == [
            events.FETCH_STARTED,
            events.FETCHED,
        ]
        shared.client().delete(payload_name(shared))
        assert stored(BIG)[-1] == BIG - 1
    assert len(kinds(seen, events.FETCHED)) == 1
    assert not kinds(seen, events.COMPUTED, events.ERROR)


async def test_a_payload_is_fetched_from_a_loop(shared: RedisServer, stored: Any) -> None:
    """The same in an event loop."""

    @cache(ttl=600, name="n", version="1")
    async def numbers(n: int) -> Any:
        raise AssertionError

    assert (await numbers(BIG))[-1] == BIG - 1
    shared.client().delete(payload_name(shared))
    assert (await numbers(BIG))[0] == 0


async def test_many_who_want_a_payload_fetch_it_once(shared: RedisServer, stored: Any) -> None:
    """While a payload comes, other callers in this process wait for it."""

    @cache(ttl=600, name="n", version="1")
    async def numbers(n: int) -> Any:
        raise AssertionError

    client = shared.client()
    before = client.info("stats")["total_net_output_bytes"]
    values = await asyncio.gather(*(numbers(BIG) for _ in range(20)))
    assert [value[-1] for value in values] == [BIG - 1] * 20
    sent = client.info("stats")["total_net_output_bytes"] - before
    assert BIG * 8 < sent < 2 * BIG * 8


def files(home: Path) -> list[Path]:
    return [path for path in home.rglob("payloads/*/*") if path.is_file()]


@pytest.mark.parametrize("at", [0, TRANSFER_CHUNK_BYTES - 1, TRANSFER_CHUNK_BYTES + 1, BIG * 8 - 1])
def test_a_changed_payload_is_not_kept(shared: RedisServer, stored: Any, at: int) -> None:
    """One flipped bit in what arrives: it is not believed, and no file of it stays (I10)."""
    name, client = payload_name(shared), shared.client()
    byte = client.getrange(name, at, at)[0]
    client.setrange(name, at, bytes([byte ^ 1]))
    with recording() as seen:
        assert stored.peek(BIG) is None
        assert not files(memo.settings.configuration.current().directory)
        assert (
            kinds(seen, events.FETCH_FAILED)[0].detail == "the payload does not match its digests"
        )
        assert stored(BIG)[-1] == BIG - 1
    assert len(kinds(seen, events.COMPUTED)) == 1


@pytest.mark.parametrize("change", ["gone", "short", "long", "another kind"])
def test_a_payload_of_another_size_is_none(shared: RedisServer, stored: Any, change: str) -> None:
    """A payload that is gone, or is not what its record says, is a miss."""
    name, client = payload_name(shared), shared.client()
    if change in ("gone", "another kind"):
        client.delete(name)
    if change == "short":
        client.set(name, client.getrange(name, 0, -2))
    if change == "long":
        client.append(name, b"x")
    if change == "another kind":
        client.rpush(name, b"x")
    with recording() as seen:
        assert stored.peek(BIG) is None
    assert not files(memo.settings.configuration.current().directory)
    assert len(kinds(seen, events.FETCH_FAILED)) == 1
    assert stored(BIG)[-1] == BIG - 1
    drain_blocking(10)
    if change != "another kind":  # which is an answer by itself
        assert redis_tier().outages == 0, "nothing unread is taken for another's answer"


def test_a_disk_without_room_is_no_hindrance(shared: RedisServer, stored: Any) -> None:
    """If the payload cannot be kept it is used all the same, from memory."""
    room, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, most))
    try:
        with recording() as seen:
            assert stored(BIG)[-1] == BIG - 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, most))
    assert len(kinds(seen, events.FETCHED)) == 1
    assert not kinds(seen, events.COMPUTED)
    errors = kinds(seen, events.ERROR)
    assert [event.tier for event in errors] == ["disk"]
    assert not files(memo.settings.configuration.current().directory)


def test_a_connection_that_broke_while_it_was_idle(shared: RedisServer, stored: Any) -> None:
    """A fetch over a connection that died while it was idle is sent over another."""
    kill = lambda: shared.client().client_kill_filter(_type="normal", skipme=True)
    with recording() as seen, calls_of(Redis.fetch, then=kill) as fetched:
        assert stored(BIG)[-1] == BIG - 1
    assert fetched
    assert len(kinds(seen, events.FETCHED)) == 1
    assert redis_tier().outages == 0


PEAK = """
import sys, os
import numpy as np
import memo
from memo.runtime.blocking import drain_blocking
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(l.split()[1]) for l in lines if l.startswith("VmHWM"))
value = None
@memo.cache(ttl=None, name="n", version="1")
def numbers(n):
    return np.arange(n) if value is None else value
n = int(sys.argv[2])
with memo.configure(directory=sys.argv[1], redis_value_limit="256MiB"):
    numbers(200_000); drain_blocking(60); numbers(200_000)
    if sys.argv[3] == "store":
        value = np.arange(n)
    before = peak()
    numbers(n)
    drain_blocking(60)
    print(peak() - before, memo.settings.configuration.current().redis_url is not None)
"""


@LINUX
def test_storing_and_fetching_take_no_memory(shared: RedisServer, tmp_path: Path) -> None:
    """Neither an upload nor a fetch of 128 MiB takes more than a fraction of that."""
    n = 16 << 20
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    for what in ("store", "fetch"):
        command = [sys.executable, "-c", PEAK, str(tmp_path / what), str(n), what]
        done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
        kilobytes, _ = done.stdout.split()
        assert int(kilobytes) < 30_000, what


# --- pieces ---------------------------------------------------------------------------------------


@given(
    st.lists(st.sampled_from([0, 1, 63, 64, 65, 1000]), max_size=5),
    st.lists(st.integers(1, 200), max_size=20),
    st.integers(-1, 400),
)
def test_any_pieces_are_judged_as_the_whole(sizes: list[int], cuts: list[int], flip: int) -> None:
    """However bytes come, they are taken for the payload if, and only if, they are it."""
    payload = codec.payload(tuple(memoryview(os.urandom(size)) for size in sizes))
    data = bytearray(codec.aligned_bytes(payload))
    if 0 <= flip < len(data):
        data[flip] ^= 1
    check, at = DigestCheck(payload.table), 0
    view = memoryview(data)
    for cut in cuts:
        check.update(view[at : at + cut])
        at += cut
    check.update(view[at:])
    assert check.is_complete() == codec.has_valid_digests(view, payload.table)


def test_half_and_too_much_are_not_whole() -> None:
    """A stream that stops short, or goes on, is not the payload."""
    payload = codec.payload((memoryview(b"a" * 100), memoryview(b"b" * 64)))
    data = codec.aligned_bytes(payload)
    for wrong in (data[:-1], data[:100], b"", data + b"\0"):
        check = DigestCheck(payload.table)
        check.update(memoryview(wrong))
        assert not check.is_complete()


def test_a_leaving_payload_is_what_was_stored(tmp_path: Path) -> None:
    """The pieces of a map are the aligned bytes, none longer than a piece."""
    sent = codec.payload((memoryview(os.urandom(TRANSFER_CHUNK_BYTES + 5)), memoryview(b"x" * 7)))
    store = payload_files.Payloads(tmp_path / "payloads")
    store.directory.mkdir()
    with store.write(sent, None) as name:
        assert name is not None
    source = store.source(name)
    assert source is not None
    mapped = outgoing(source.open(sent.size), sent.table)
    assert isinstance(mapped.views[0].obj, mmap.mmap)
    for _ in range(2):  # a connection that died while it was idle is replaced
        pieces = [bytes(piece) for piece in mapped.pieces()]
        assert b"".join(pieces) == codec.aligned_bytes(sent)
        assert max(map(len, pieces)) == TRANSFER_CHUNK_BYTES
    assert mapped.size % ALIGN == 0
