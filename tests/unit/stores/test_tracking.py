"""`coherence="tracking"`: a hit in memory asks no server, and is outdated for a short time only."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import waiting
from chaos import Proxy, Scripted, free_port
from inside import inside
from ports import blocking, run, start
from redis_server import RedisServer
from time_ahead import Ahead

import memo
from memo import cache, configure
from memo.decorators import assembly
from memo.inspection import doctor
from memo.records.seal import Entry
from memo.runtime.blocking import BLOCKING
from memo.runtime.events import ERROR
from memo.stores.redis import tracking as tracking_module
from memo.stores.redis.redis_tier import Redis
from memo.stores.redis.tracking import MAX_OUTDATED_SECONDS, Listener, parse
from memo.testing import ManualClock, recording
from memo.validity.stamps import Turn

PATIENCE = 30.0
"""Seconds after which what must happen soon has not happened."""
RUNS: list[Any] = []
"""One for each computation."""


@pytest.fixture(autouse=True)
def _no_runs() -> None:
    RUNS.clear()


@pytest.fixture
def tracking(redis_server: RedisServer, set_limits: Callable[..., None]) -> RedisServer:
    """A Redis, and settings that have hits in memory answered without it; no machine is slow."""
    set_limits(tracking_bound=PATIENCE)
    configure(redis_url=redis_server.url, coherence="tracking", deadline=5.0)
    return redis_server


@pytest.fixture
def as_promised(tracking: RedisServer, set_limits: Callable[..., None]) -> RedisServer:
    """The same, with the bound that is promised."""
    set_limits(tracking_bound=MAX_OUTDATED_SECONDS)
    return tracking


@pytest.fixture
def unheard(tracking: RedisServer) -> Iterator[None]:
    """The connection of the listener is there, and no push of Redis arrives on it."""
    with Proxy(tracking.port) as proxy:
        proxy.without = b"invalidate"
        listener_in_use().url = proxy.url
        yield
        assembly.reset()


def until(holds: Callable[[], Any]) -> Any:
    """Wait for a condition; what it gave."""
    found: list[Any] = []
    waiting.until(lambda: found.append(holds()) or found[-1], PATIENCE)
    return found[-1]


def listener_in_use() -> Listener:
    """The listener of the default chain."""
    found = assembly.default_chain().authorities.listener
    assert isinstance(found, Listener)
    return found


def is_quick(function: Any, *args: Any) -> bool:
    """True if the next call asks no server."""
    call = inside(function).keyer.call(args, {})
    found = assembly.default_chain().at_hand(lambda: BLOCKING, function.function_id, call.text)
    return isinstance(found, Entry)


def proven(function: Any, *args: Any) -> Any:
    """Call until a call asks no server; its answer."""

    def quick() -> bool:
        value = function(*args)
        if asyncio.iscoroutine(value):
            asyncio.run(value)
        return is_quick(function, *args)

    until(quick)
    value = function(*args)
    return asyncio.run(value) if asyncio.iscoroutine(value) else value


def elsewhere(url: str, function: Any, **arguments: str) -> float:
    """Invalidate as another host does; when it had returned."""
    tier = Redis(url, deadline=5.0)
    turn = Turn(f"f:{function.function_id}", tuple(sorted(arguments.items())))
    blocking(lambda port: tier.turn(port, [turn], "{}"))
    returned = time.monotonic()
    tier.close()
    return returned


@cache(ttl=None, name="tracking:load", version="1")
def load(region: str) -> int:
    RUNS.append(region)
    return len(RUNS)


@cache(ttl=None, name="tracking:fetch", version="1")
async def fetch(region: str) -> int:
    RUNS.append(region)
    return len(RUNS)


@cache(ttl=None, name="tracking:report", version="1")
def report(region: str) -> int:
    return load(region) * 100


def _nothing() -> int:
    return 0


@cache(ttl=None, name="tracking:sourced", version="1", tags=["slow"], depends_on=[_nothing])
def sourced(region: str) -> int:
    RUNS.append(region)
    return len(RUNS)


@cache(ttl=None, name="tracking:array", version="1", tags=["slow"])
def array(region: str) -> Any:
    RUNS.append(region)
    return np.arange(20_000)


@contextlib.contextmanager
def commands(server: RedisServer) -> Iterator[list[str]]:
    """The commands that Redis gets inside the block, except the listener's echoes."""
    seen: list[str] = []
    client = server.client()
    with server.client().monitor() as monitor:
        client.ping()
        while monitor.next_command()["command"] != "PING":
            pass
        yield seen
        client.ping()
        while (command := monitor.next_command()["command"]) != "PING":
            if not command.startswith("ECHO"):
                seen.append(command)


# --- purpose --------------------------------------------------------------------------------------


def test_a_hit_asks_nobody(tracking: RedisServer) -> None:
    """While nothing is invalidated, a hit in memory sends Redis no command, sync and async."""
    first = proven(load, "EU")

    async def many() -> list[int]:
        return [await fetch("EU") for _ in range(50)]

    second = proven(fetch, "EU")
    with commands(tracking) as asked, recording() as seen:
        assert {load("EU") for _ in range(50)} == {first}
        assert set(asyncio.run(many())) == {second}
    assert asked == []
    assert {(event.kind, event.tier) for event in seen} == {("hit", "memory")}


def test_strict_asks_each_time(redis_server: RedisServer) -> None:
    """With `coherence="strict"` there is no listener, and each hit is a question to Redis."""
    configure(redis_url=redis_server.url, deadline=5.0)
    load("EU")
    with commands(redis_server) as asked:
        load("EU")
        load("EU")
    assert len(asked) >= 2
    assert assembly.default_chain().authorities.listener is None


def test_no_hit_on_the_disk_alone_is_quick(tracking: RedisServer) -> None:
    """Without a memory tier nothing is proven, so that each hit asks Redis what is true."""
    with memo.configure(tiers=["disk", "redis"], coherence="tracking"):
        load("EU")
        assert load("EU") == 1
        assert not is_quick(load, "EU")
        elsewhere(tracking.url, load)
        assert load("EU") == 2


@pytest.mark.parametrize("function", [sourced, array], ids=["depends_on", "buffers"])
def test_what_is_not_quick_asks_nobody_either(tracking: RedisServer, function: Any) -> None:
    """A hit in memory that has to look at a source, or copy buffers, asks Redis nothing."""
    function("EU")
    listener = listener_in_use()
    until(lambda: function("EU") is not None and listener.mark() is not None)
    function("EU")
    with commands(tracking) as asked, recording() as seen:
        function("EU")
    assert asked == []
    assert [event.tier for event in seen] == ["memory"]
    returned = elsewhere(tracking.url, function)
    until(lambda: function("EU") is not None and len(RUNS) == 2)
    assert time.monotonic() - returned < PATIENCE


def test_many_loops_and_threads_share_one_connection(tracking: RedisServer) -> None:
    """Threads and event loops answer from memory at once, with one listening connection."""
    proven(load, "EU")
    proven(fetch, "EU")

    def work(_: int) -> set[int]:
        async def inside() -> set[int]:
            return {await fetch("EU") for _ in range(50)}

        return asyncio.run(inside()) | {load("EU") for _ in range(50)}

    with commands(tracking) as asked, ThreadPoolExecutor(4) as pool:
        assert len(set.union(*pool.map(work, range(4)))) == 2
    assert asked == []
    assert len(listening_clients(tracking)) == 1


def listening_clients(server: RedisServer) -> list[Any]:
    """The connections of which the server knows that they track."""
    return [row for row in server.client().client_list() if "t" in row["flags"]]


# --- invalidations -------------------------------------------------------------------------------

OTHER = """
import sys, memo
url, directory = sys.argv[1:]
memo.configure(redis_url=url, directory=directory, deadline=5.0)

@memo.cache(ttl=None, name="tracking:load", version="1")
def load(region):
    return -1

for line in sys.stdin:
    region = line.strip()
    went = load.invalidate(region=region) if region != "slow" else memo.invalidate(tag="slow")
    assert went.complete
    print("done", flush=True)
"""


@contextlib.contextmanager
def another_process(url: str, directory: Path) -> Iterator[Callable[[str], None]]:
    """A process that invalidates `load` for a region, or the tag `"slow"`, and then says so."""
    with start(OTHER, url, directory) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def invalidate(region: str) -> None:
            print(region, file=process.stdin, flush=True)
            assert process.stdout is not None
            assert process.stdout.readline() == "done\n"

        yield invalidate
        process.stdin.close()
        process.wait(PATIENCE)


def test_another_host_is_heard(tracking: RedisServer, tmp_path: Path) -> None:
    """An entry that a process of another host invalidates is computed anew after the push."""
    with another_process(tracking.url, tmp_path / "other") as invalidate:
        for _ in range(3):
            before = proven(load, "EU")
            kept = proven(load, "US")
            invalidate("EU")
            until(lambda before=before: load("EU") != before)
            assert load("US") == kept


@pytest.mark.usefixtures("unheard")
def test_this_host_is_heard_at_once(tracking: RedisServer, cache_home: Path) -> None:
    """An entry that another process of this host invalidated is gone, push or no push (I1)."""
    with another_process(tracking.url, cache_home) as invalidate:
        for _ in range(20):
            before = proven(load, "EU")
            invalidate("EU")
            assert load("EU") != before


@pytest.mark.usefixtures("unheard")
@pytest.mark.parametrize("function", [sourced, array], ids=["depends_on", "buffers"])
def test_this_host_is_heard_where_hits_are_not_quick(
    tracking: RedisServer, cache_home: Path, function: Any
) -> None:
    """The same holds of hits that look at a source, or copy buffers (I1)."""
    with another_process(tracking.url, cache_home) as invalidate:
        for round_ in range(1, 6):
            function("EU")
            until(lambda: listener_in_use().mark() is not None)
            function("EU")
            with commands(tracking) as asked:
                function("EU")
            assert (asked, len(RUNS)) == ([], round_)
            invalidate("slow")
            function("EU")
            assert len(RUNS) == round_ + 1


@pytest.mark.usefixtures("tracking", "unheard")
@pytest.mark.parametrize("whole", [False, True])
def test_this_process_is_heard_at_once(whole: bool) -> None:
    """An entry that this process invalidated is not given any more when that has returned (I1)."""
    for _ in range(20):
        before = proven(load, "EU"), proven(fetch, "EU")
        load.invalidate() if whole else load.invalidate(region="EU")
        memo.invalidate(function=fetch) if whole else fetch.invalidate("EU")
        assert load("EU") != before[0]
        assert asyncio.run(fetch("EU")) != before[1]


@pytest.mark.usefixtures("tracking", "unheard")
def test_this_process_is_heard_where_the_host_cannot_be_written() -> None:
    """An invalidation that could not be written down on the host acts in this process at once."""
    before = proven(load, "EU")
    with recording() as seen:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))  # as if the disk were full
        try:
            assert load.invalidate("EU").tiers["redis"] == "done"
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = [event.detail for event in seen if event.kind == ERROR]  # also of background writes
    assert sum("the disk is full" in one for one in said) == 1, said
    proven(fetch, "EU")  # the host is read again, so hits are quick
    assert load("EU") != before


def test_what_was_built_on_it_is_heard(tracking: RedisServer) -> None:
    """A hit that was built on another is invalid as soon as the push for that other has come."""
    assert proven(report, "EU") == 100
    elsewhere(tracking.url, load)
    until(lambda: report("EU") == 200)
    assert proven(report, "EU") == 200
    load.invalidate("EU")
    assert report("EU") == 300


def test_word_between_question_and_answer_is_not_lost(tracking: RedisServer) -> None:
    """A change after Redis has answered, and before that is remembered, is noticed."""
    overtaken: list[bytes] = []

    def overtake(reply: bytes) -> None:
        if not overtaken:
            overtaken.append(reply)
            count = listener.count
            elsewhere(tracking.url, load)
            until(lambda: listener.count > count)

    with Proxy(tracking.port) as proxy:
        configure(redis_url=proxy.url, coherence="tracking", deadline=PATIENCE)
        listener = listener_in_use()
        listener.url = tracking.url
        before = proven(load, "EU")
        listener.invalidate_marks()
        proxy.hold_reply = overtake
        assert load("EU") == before  # it began before the invalidation
        assert overtaken
        assert not is_quick(load, "EU")
        assert load("EU") != before
        assembly.reset()


def test_what_was_found_untrue_is_not_vouched_for(tracking: RedisServer) -> None:
    """An entry that Redis said is invalid stays so while nothing takes its place."""
    proven(load, "EU")
    elsewhere(tracking.url, load)
    until(lambda: load.peek("EU", default="gone") == "gone")
    for _ in range(3):
        assert not is_quick(load, "EU")
        assert load.peek("EU", default="gone") == "gone"


def test_what_only_this_host_knows_is_not_vouched_for(redis_server: RedisServer) -> None:
    """While Redis is listened to and cannot be asked, no entry becomes quick."""
    with Proxy(redis_server.port) as proxy:
        configure(redis_url=proxy.url, coherence="tracking")
        listener_in_use().url = redis_server.url
        before = proven(load, "EU")
        listener, count = listener_in_use(), listener_in_use().count
        proxy.mode = "refuse"
        proxy.cut_all()
        elsewhere(redis_server.url, load)
        until(lambda: listener.count > count)
        for _ in range(3):
            assert load("EU") == before  # known to this host, as with "strict"
            assert not is_quick(load, "EU")
        proxy.mode = "pass"
        until(lambda: load("EU") != before)
        assembly.reset()


def test_an_entry_of_another_host_is_quick_here(tracking: RedisServer, tmp_path: Path) -> None:
    """A result of another host is answered from memory here, and this host can invalidate it."""
    with configure(directory=str(tmp_path / "other")):
        before = load("EU")
    with recording() as seen:
        assert proven(load, "EU") == before
    assert not [event for event in seen if event.kind == "miss"]
    load.invalidate(region="EU")
    assert load("EU") != before


# --- Redis and the way to it ---------------------------------------------------------------------


def test_a_flush_is_heard(tracking: RedisServer) -> None:
    """After FLUSHALL nothing of before is given, once word has come: other hosts share it."""
    tracking.client().hset("memo:2:hosts", "h:another", int(time.time()))
    before = proven(load, "EU")
    tracking.client().flushall()
    until(lambda: load("EU") != before)


def test_a_lost_group_is_heard(tracking: RedisServer) -> None:
    """A generation that Redis evicts, where other hosts share it, makes its entries invalid."""
    tracking.client().hset("memo:2:hosts", "h:another", int(time.time()))
    before = proven(load, "EU")
    assert tracking.client().delete("memo:2:g:{f:tracking:load}") == 1
    until(lambda: load("EU") != before)


@pytest.mark.parametrize("way", ["killed", "empty", "cut"])
def test_the_connection_is_made_anew(tracking: RedisServer, way: str) -> None:
    """When Redis or the connection was gone, each entry is asked about once before it is quick."""
    before = proven(load, "EU")
    listener = listener_in_use()
    base = listener.oldest_valid
    if way == "cut":
        tracking.client().execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    else:
        tracking.kill()
        until(lambda: not listener.listening)
        tracking.restart(empty=way == "empty")
    until(lambda: listener.oldest_valid > base and listener.listening)
    assert not is_quick(load, "EU")
    after = proven(load, "EU")
    assert after == before
    elsewhere(tracking.url, load)
    until(lambda: load("EU") != after)


class HalfDead(Proxy):
    """A way to Redis on which nothing of what a listener is sent arrives while it is `deaf`."""

    deaf = False

    def _reply(self, client: socket.socket, data: bytes, before: int) -> bool:
        return self.deaf or super()._reply(client, data, before)


@pytest.fixture
def half_dead(as_promised: RedisServer) -> Iterator[HalfDead]:
    """The way of the listener alone leads through it; the bound is the one that is promised."""
    with HalfDead(as_promised.port) as proxy:
        listener_in_use().url = proxy.url
        yield proxy
        assembly.reset()


def test_a_silent_connection_is_noticed_within_the_bound(
    tracking: RedisServer, half_dead: HalfDead
) -> None:
    """If pushes get lost, an entry is given for at most `MAX_OUTDATED_SECONDS` longer."""
    before = proven(load, "EU")
    half_dead.deaf = True
    returned = elsewhere(tracking.url, load)
    oldest = 0.0
    ends = returned + PATIENCE
    while True:
        begun = time.monotonic()
        if load("EU") != before:
            break
        oldest = max(oldest, begun - returned)
        assert begun < ends
    assert oldest < MAX_OUTDATED_SECONDS
    assert not listener_in_use().listening
    half_dead.deaf = False
    until(lambda: listener_in_use().listening)
    proven(load, "EU")


def test_a_frozen_redis_is_noticed_within_the_bound(as_promised: RedisServer) -> None:
    """A Redis that hangs is believed for `MAX_OUTDATED_SECONDS`, and again when it is back."""
    configure(deadline=0.25)
    proven(load, "EU")
    listener = listener_in_use()
    as_promised.freeze()
    frozen = time.monotonic()
    limit = listener.now() + int((MAX_OUTDATED_SECONDS + 0.001) * 1e9)
    until(lambda: not listener.listening)
    assert listener.until <= limit
    assert not is_quick(load, "EU")
    assert time.monotonic() - frozen < PATIENCE
    as_promised.thaw()
    until(lambda: is_quick(load, "EU") or load("EU") is None)


def test_an_outage_is_what_it_is_without(tracking: RedisServer) -> None:
    """While Redis is away, hits and invalidations of this host go on as with `"strict"`."""
    before = proven(load, "EU")
    tracking.stop()
    until(lambda: not listener_in_use().listening)
    assert load("EU") == before
    assert not load.invalidate("EU").complete
    anew = load("EU")
    assert anew != before
    tracking.restart()
    assert proven(load, "EU") >= anew


def test_without_permission_each_hit_asks(
    tracking: RedisServer, set_limits: Callable[..., None]
) -> None:
    """A Redis user who may not listen has strict coherence, and one event says so."""
    tracking.client().acl_setuser(
        "deaf",
        enabled=True,
        passwords=["+pw"],
        keys=["*"],
        commands=["+@all", "-client|tracking"]
        if tracking.version >= (7,)
        else ["+@all", "-client"],
    )
    try:
        configure(redis_url=f"redis://deaf:pw@127.0.0.1:{tracking.port}/0")
        set_limits(tracking_pause=0.01)
        with recording() as seen:
            until(lambda: load("EU") and listener_in_use().refused)
            client = tracking.client()
            taken = client.info("stats")["total_connections_received"]
            until(lambda: client.info("stats")["total_connections_received"] > taken + 5)
        listener = listener_in_use()
        refused = [e for e in seen if e.kind == ERROR and e.reason == "tracking"]
        assert [event.tier for event in refused] == ["redis"]
        assert "NOPERM" in refused[0].detail
        assert "pw" not in refused[0].detail
        assert not is_quick(load, "EU")
        assert "strict" in listener.state
        facts = blocking(assembly.default_chain().health)["redis"]
        assert facts["tracking"].startswith("strict (forbids")
        warned = [one for one in doctor.examine() if one.level == doctor.WARN]
        assert any("strict (forbids" in one.said for one in warned)
        elsewhere(tracking.url, load)
        assert load("EU") == 2
    finally:
        assembly.reset()
        tracking.client().acl_deluser("deaf")


def test_a_user_with_a_password_listens(tracking: RedisServer) -> None:
    """The least that an ACL must allow is what the documents say."""
    words = ["+@read", "+@write", "+@scripting", "+info", "+dbsize", "+hello", "+echo"]
    client = "+client|tracking"
    tracking.client().acl_setuser(
        "ann", enabled=True, passwords=["+s3cret/x"], keys=["*"], commands=[*words, client]
    )
    try:
        configure(redis_url=f"redis://ann:s3cret%2Fx@127.0.0.1:{tracking.port}/0")
        proven(load, "EU")
    finally:
        assembly.reset()
        tracking.client().acl_deluser("ann")


@pytest.mark.parametrize(
    "answer",
    [
        b"-ERR unknown command\r\n",
        b"+OK\r\n",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"*1\r\n" * 9000,
    ],
    ids=["refused", "confused", "http", "deep"],
)
def test_what_is_no_redis_is_never_listened_to(answer: bytes) -> None:
    """With any program at the other end, nothing is vouched for and nothing raises."""
    with Scripted(answer) as server:
        listener = Listener(server.url, b"memo:2:g:{", 1.0, "nowhere")
        assert listener.mark() is None
        until(lambda: server.accepted > 1 or listener.refused)
        assert listener.mark() is None
        assert listener.renew_mark(listener.count, ["n"]) is None
        listener.close()


def test_nobody_there() -> None:
    """If nothing listens at the port, it tries again, later and later, until it is closed."""
    listener = Listener(f"redis://127.0.0.1:{free_port()}/0", b"memo:2:g:{", 1.0, "nowhere")
    assert listener.mark() is None
    until(lambda: "refuses" in listener.state)
    assert not listener.wait(0.05)
    listener.close()


# --- threads and processes -----------------------------------------------------------------------


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "memo-listener"]


def test_the_thread_ends_with_the_chain(tracking: RedisServer) -> None:
    """Closing the chain ends thread and connection; the next use makes them anew."""
    proven(load, "EU")
    assert len(threads()) == 1
    assembly.default_chain().close()
    assert not threads()
    until(lambda: not listening_clients(tracking))
    proven(load, "EU")


@pytest.mark.usefixtures("tracking")
def test_the_thread_ends_when_nobody_wants_it(ahead: Ahead) -> None:
    """A process that asks nothing for a while keeps no connection; it comes back when wanted."""
    before = proven(load, "EU")
    until(lambda: ahead.advance(2 * tracking_module.IDLE_CONNECTION_SECONDS) or not threads())
    assert not listener_in_use().listening
    assert proven(load, "EU") == before


def test_no_thread_without_a_hit(tracking: RedisServer) -> None:
    """Listening starts only when there is an entry in memory to listen for."""
    load("EU")
    assert not threads()


FORKED = """
import json, os, sys, time, memo
from memo.decorators import assembly
from memo.validity.stamps import Turn
from memo.stores.redis.redis_tier import Redis
from memo.records.seal import Entry
from memo.runtime.blocking import BLOCKING, drive
url, directory = sys.argv[1:]
memo.configure(redis_url=url, directory=directory, coherence="tracking", deadline=5.0)
runs = []

@memo.cache(ttl=None, name="tracking:forked", version="1")
def load(region):
    return time.time_ns()

def quick():
    call = load._function.keyer.call(("EU",), {})
    found = assembly.default_chain().at_hand(lambda: BLOCKING, load.function_id, call.text)
    return isinstance(found, Entry)

def proven():
    ends = time.monotonic() + 30
    while not quick():
        load("EU")
        assert time.monotonic() < ends
    return load("EU")

first = proven()
inherited = assembly.default_chain().authorities.listener._receiver.sock.fileno()
child = os.fork()
if not child:
    code = 1
    try:
        try:
            os.fstat(inherited)
            raise SystemExit("the parent's connection is open in the child")
        except OSError:
            pass
        assert not quick()
        assert proven() == first
        tier = Redis(url, deadline=5.0)
        drive(tier.turn(BLOCKING, [Turn("f:tracking:forked")], "{}"))
        ends = time.monotonic() + 30
        while load("EU") == first:
            assert time.monotonic() < ends
        code = 0
    finally:
        os._exit(code)
assert os.waitpid(child, 0)[1] == 0
ends = time.monotonic() + 30
while load("EU") == first:
    assert time.monotonic() < ends
proven()
print("both")
"""


def test_a_fork_listens_for_itself(redis_server: RedisServer, tmp_path: Path) -> None:
    """After a fork the child listens anew, on a connection of its own, and the parent goes on."""
    quiet = "import warnings; warnings.simplefilter('ignore')\n"
    assert run(quiet + FORKED, redis_server.url, tmp_path / "home") == "both"


LEAVING = """
import sys, time, memo
from memo.decorators import assembly
url, directory = sys.argv[1:]
memo.configure(redis_url=url, directory=directory, coherence="tracking", deadline=5.0)

@memo.cache(ttl=None, name="tracking:leaving", version="1")
def load(region):
    return 1

load("EU")
load("EU")
assert assembly.default_chain().authorities.listener.wait(30)
print("listening", flush=True)
"""


def test_the_interpreter_exits_promptly(redis_server: RedisServer, tmp_path: Path) -> None:
    """A program that listens ends when it is done, without waiting for the listener."""
    with start(LEAVING, redis_server.url, tmp_path / "home") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "listening\n"
        begun = time.monotonic()
        assert process.wait(PATIENCE) == 0
        assert time.monotonic() - begun < tracking_module.IDLE_CONNECTION_SECONDS / 2


def test_health_says_so(tracking: RedisServer) -> None:
    """`memo doctor` and `%cache_stats` tell whether it listens."""
    assert blocking(assembly.default_chain().health)["redis"]["tracking"] == "listening"
    found = [one for one in doctor.examine() if one.topic == "redis"]
    assert [one.level for one in found if "tracking" in one.said] == [doctor.GOOD]


# --- marks, by themselves ------------------------------------------------------------------------


def heard(clock: ManualClock) -> Listener:
    """A listener without a thread, that listens for a second of its clock."""
    listener = Listener("redis://nowhere", b"memo:2:g:{", 1.0, "nowhere", clock)
    listener.until = clock.boot_ns() + int(MAX_OUTDATED_SECONDS * 1e9)
    return listener


def test_marks_hold_until_something_is_heard() -> None:
    """A mark holds for the groups of which nothing was heard, and is renewed for them."""
    listener = heard(ManualClock())
    mark = listener.mark()
    assert mark is not None
    assert listener.renew_mark(mark, ["f:a"]) == mark
    listener.record_changes(["f:b", "n"])
    later = listener.renew_mark(mark, ["f:a"])
    assert later is not None
    assert later > mark
    assert listener.renew_mark(mark, ["f:a", "f:b"]) is None
    assert listener.renew_mark(later, ["f:b"]) == later
    listener.invalidate_marks()
    assert listener.renew_mark(later, ["f:a"]) is None
    assert listener.mark() is not None


def test_marks_do_not_outlive_the_bound() -> None:
    """Without another echo, no mark is given or holds after `MAX_OUTDATED_SECONDS`."""
    clock = ManualClock()
    listener = heard(clock)
    mark = listener.mark()
    assert mark is not None
    clock.advance(MAX_OUTDATED_SECONDS * 0.99)
    assert listener.renew_mark(mark, []) == mark
    clock.advance(MAX_OUTDATED_SECONDS * 0.01)
    assert listener.renew_mark(mark, []) is None
    assert listener.state.startswith("strict")


def test_groups_are_bounded() -> None:
    """Past `MAX_TRACKED_GROUPS` groups it forgets them, and with them all earlier marks."""
    listener = heard(ManualClock())
    mark = listener.mark()
    assert mark is not None
    listener.record_changes([f"g{number}" for number in range(tracking_module.MAX_TRACKED_GROUPS)])
    assert listener.renew_mark(mark, ["x"]) is not None
    listener.record_changes(["d"])
    assert listener.renew_mark(mark, ["x"]) is None
    assert len(listener.changed_at) <= tracking_module.MAX_TRACKED_GROUPS


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"+OK\r\n", b"OK"),
        (b":12\r\n", b"12"),
        (b"_\r\n", None),
        (b"$-1\r\n", None),
        (b"$5\r\na\r\nbc\r\n", b"a\r\nbc"),
        (b"*0\r\n", []),
        (b"%1\r\n+a\r\n*2\r\n:1\r\n#t\r\n", [b"a", [b"1", b"t"]]),
        (b">2\r\n$10\r\ninvalidate\r\n*1\r\n$3\r\nabc\r\n", [b"invalidate", [b"abc"]]),
        (b">2\r\n$10\r\ninvalidate\r\n_\r\n", [b"invalidate", None]),
    ],
)
def test_messages_in_any_pieces(data: bytes, message: Any) -> None:
    """A message is read when it is whole, and not before; what follows stays."""
    for size in range(len(data)):
        with pytest.raises(IndexError):
            parse(bytearray(data[:size]), 0)
    assert parse(bytearray(data + b"+more\r\n"), 0) == (message, len(data))
