"""Invalidations win, answers never go back, computations do not overlap: the past is judged.

See `history`.  Each configuration runs for less than a second; with `MEMO_TEST_LONG=1` each takes
`MEMO_TEST_SECONDS` (20).  Then one step in 50 is an invalidation instead of one in 20: what costs
time are the runs that follow one, not the calls between them, nor what the checker writes down.
The end of the run tells how many calls there were and what was wrong with them;
`MEMO_TEST_CALLS=1000000` asserts that there were so many.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import history
import ports
import pytest
from deployments import Cluster, Sentinels
from history import Asked, Gone, History, Nursery, Run, Stage
from redis_server import RedisServer, binary, valkey

from memo.errors import TierError
from memo.runtime.blocking import BLOCKING, drive
from memo.runtime.clock import SECOND, Clock
from memo.stores.disk.host_state import Host
from memo.stores.redis.tracking import MAX_OUTDATED_SECONDS

LONG = bool(os.environ.get("MEMO_TEST_LONG"))
SECONDS = float(os.environ.get("MEMO_TEST_SECONDS", "20" if LONG else "0.7"))
pytestmark = pytest.mark.timeout(60 + 4 * SECONDS)
LARGE: dict[str, Any] = {"invalidate": 0.02, "busy": 0.002} if LONG else {}
"""More of the plan of each configuration."""
PATIENT = {"deadline": 5.0}
"""Without faults a slow machine is none: Redis may take its time."""
TRACKING = {"coherence": "tracking"}
FOREVER: dict[str, Any] = {"ttl": None}
AGING: dict[str, Any] = {
    "ttl": 0.06,
    "refresh_ahead": True,
    "refresh_threshold": 0.3,
    "stale_while_revalidate": 0.2,
    "stale_if_error": 0.2,
}
LOCKED: dict[str, Any] = {"ttl": None, "use_lock": True, "lock_timeout": None}


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    """The source of the workers of this module."""
    nursery = Nursery()
    yield nursery
    nursery.close()


Judge = Callable[..., History]


@pytest.fixture
def judged(record_property: Callable[[str, object], None]) -> Judge:
    """Lets a stage happen: nothing breaks an invariant, and it was not empty.

    On a machine so busy that it was nearly empty it goes on for longer.  Tells what was in it.
    `bound`: seconds for which word of what another host invalidated may travel.
    """

    def judge(
        stage: Stage, *, exclusive: bool = False, calls: int = 20, bound: float = 0.0
    ) -> History:
        invalidates = stage.plan.get("invalidate", True)
        for _ in range(3):
            past = stage.run()
            wrong = broken(past, stage, exclusive, bound)
            enough = past.made > calls and (len(past.gone) > 1 or not invalidates)
            if exclusive and past.down:  # a tier was too slow: one run at a time is not promised
                wrong["I3"], enough = [], False
            if enough or any(wrong.values()):
                break
            stage.lengthen()
        counts = {
            "calls": past.made,
            "runs": len(past.runs),
            "invalidations": len(past.gone),
            "violations": sum(map(len, wrong.values())),
            "tiers_down": past.down,
            "faults": len(past.faults),
        }
        record_property("history", counts)
        report = [f"{what}: {len(bad)}, such as {bad[:3]}" for what, bad in wrong.items() if bad]
        assert not report, f"{counts}; {report}; faults: {past.faults[:10]}"
        assert enough, counts
        return past

    return judge


def broken(past: History, stage: Stage, exclusive: bool, bound: float) -> dict[str, list[str]]:
    """Faults in a history -> the invariant that each breaks."""
    away = stage.away if stage.hosts > 1 else ()
    return {
        "I1": history.stale(past, away, int(bound * 1e9)),
        "I2": history.backwards(past),
        "I3": history.overlaps(past) if exclusive else [],
        "I4": history.foreign(past),
        "raised": past.raised,
    }


def settings(tiers: tuple[str, ...], server: RedisServer | None, **more: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"tiers": list(tiers), **more}
    if server is not None:
        given["redis_url"] = server.url
    return given


def stage(
    nursery: Nursery, place: Path, tiers: tuple[str, ...], options: dict[str, Any], **more: Any
) -> Stage:
    server, plan = more.pop("redis", None), more.pop("plan", {})
    given = settings(tiers, server, **more.pop("settings", PATIENT))
    return Stage(
        nursery,
        place,
        SECONDS,
        redis=server,
        plan={"settings": given, "options": options, **LARGE, **plan},
        **more,
    )


# --- without faults ------------------------------------------------------------------------------

DISK, FRONT = ("disk",), ("memory", "disk")


@pytest.mark.parametrize(
    ("tiers", "options"),
    [(DISK, FOREVER), (FRONT, FOREVER), (FRONT, AGING), (FRONT, LOCKED)],
    ids=["disk", "memory-disk", "aging", "locked"],
)
def test_on_one_host(
    judged: Judge, nursery: Nursery, tmp_path: Path, tiers: tuple[str, ...], options: dict[str, Any]
) -> None:
    """Processes, threads and loops that share a directory never see what was invalidated."""
    here = stage(nursery, tmp_path, tiers, options)
    judged(here, exclusive=options is LOCKED)


@pytest.mark.parametrize(
    ("tiers", "options"),
    [
        (("redis", "disk"), FOREVER),
        (("memory", "redis", "disk"), FOREVER),
        (("memory", "redis", "disk"), AGING),
        (("memory", "redis", "disk"), LOCKED),
    ],
    ids=["redis-disk", "memory-redis-disk", "aging", "locked"],
)
def test_on_two_hosts(
    judged: Judge,
    nursery: Nursery,
    tmp_path: Path,
    redis_server: RedisServer,
    tiers: tuple[str, ...],
    options: dict[str, Any],
) -> None:
    """Hosts (directories) that share a Redis never see what either of them invalidated."""
    here = stage(nursery, tmp_path, tiers, options, redis=redis_server, workers=4, hosts=2)
    judged(here, exclusive=options is LOCKED)


@pytest.mark.parametrize("coherence", ["strict", "tracking"])
@pytest.mark.parametrize("options", [FOREVER, AGING, LOCKED], ids=["forever", "aging", "locked"])
@pytest.mark.parametrize("hosts", [1, 2])
def test_cutoff(
    judged: Judge,
    nursery: Nursery,
    tmp_path: Path,
    redis_server: RedisServer,
    hosts: int,
    options: dict[str, Any],
    coherence: str,
) -> None:
    """A result that outlives an invalidation of its input has the value of a later run."""
    tracked = coherence == "tracking"
    here = stage(
        nursery,
        tmp_path,
        ("memory", "redis", "disk"),
        options,
        redis=redis_server,
        workers=2 * hosts,
        hosts=hosts,
        settings={**PATIENT, "coherence": coherence},
        plan={"cutoff": True, "ask": 0.6},
    )
    here.seconds += MAX_OUTDATED_SECONDS * tracked
    judged(here, exclusive=options is LOCKED, bound=MAX_OUTDATED_SECONDS * tracked)


def test_cutoff_on_disk_alone(judged: Judge, nursery: Nursery, tmp_path: Path) -> None:
    """The same without Redis."""
    judged(stage(nursery, tmp_path, FRONT, FOREVER, plan={"cutoff": True, "ask": 0.6}))


OPTIONS = pytest.mark.parametrize(
    "options", [FOREVER, AGING, LOCKED], ids=["forever", "aging", "locked"]
)
SHAPES: dict[str, dict[str, Any]] = {
    "each": {"shape": "each", "years": 4},
    "streams": {"shape": "streams"},
}


@OPTIONS
@pytest.mark.parametrize("shape", SHAPES)
def test_elements_and_streams_on_disk_alone(
    judged: Judge, nursery: Nursery, tmp_path: Path, options: dict[str, Any], shape: str
) -> None:
    """Elements of a collection, items of a stream, and what is built on them, keep the promises.

    With a lock each element, and each stream, has one run at a time.
    """
    here = stage(nursery, tmp_path, FRONT, options, plan=SHAPES[shape])
    judged(here, exclusive=options is LOCKED)


@OPTIONS
@pytest.mark.parametrize("shape", SHAPES)
def test_elements_and_streams_on_two_hosts(
    judged: Judge,
    nursery: Nursery,
    tmp_path: Path,
    redis_server: RedisServer,
    options: dict[str, Any],
    shape: str,
) -> None:
    """The same between hosts that share a Redis."""
    here = stage(
        nursery,
        tmp_path,
        ("memory", "redis", "disk"),
        options,
        redis=redis_server,
        workers=4,
        hosts=2,
        plan=SHAPES[shape],
    )
    judged(here, exclusive=options is LOCKED)


def test_cutoff_of_elements(
    judged: Judge, nursery: Nursery, tmp_path: Path, redis_server: RedisServer
) -> None:
    """With `each`, what outlives an invalidation has the value of a later run of that element."""
    here = stage(
        nursery,
        tmp_path,
        ("memory", "redis", "disk"),
        FOREVER,
        redis=redis_server,
        workers=4,
        hosts=2,
        plan={**SHAPES["each"], "cutoff": True, "ask": 0.6},
    )
    judged(here)


@pytest.mark.parametrize("shape", SHAPES)
def test_elements_and_streams_with_killed_workers(
    judged: Judge, nursery: Nursery, tmp_path: Path, redis_server: RedisServer, shape: str
) -> None:
    """A worker that is killed in the middle leaves neither a part of a stream nor a lease."""
    here = stage(
        nursery,
        tmp_path,
        ("memory", "redis", "disk"),
        LOCKED,
        redis=redis_server,
        workers=4,
        hosts=2,
        faults=killing,
        plan={**SHAPES[shape], "lease": 1.0},
    )
    judged(here, calls=5)  # most of the time is spent waiting for leases of the dead
    assert here.killed > 1


@OPTIONS
def test_tracking_on_two_hosts(
    judged: Judge,
    nursery: Nursery,
    tmp_path: Path,
    redis_server: RedisServer,
    options: dict[str, Any],
) -> None:
    """With `coherence="tracking"` a host sees its own invalidations at once, others in time."""
    here = stage(
        nursery,
        tmp_path,
        ("memory", "redis", "disk"),
        options,
        redis=redis_server,
        workers=4,
        hosts=2,
        settings={**PATIENT, **TRACKING},
    )
    here.seconds += MAX_OUTDATED_SECONDS
    judged(here, exclusive=options is LOCKED, bound=MAX_OUTDATED_SECONDS)


def test_one_run_each_without_invalidations(
    judged: Judge, nursery: Nursery, tmp_path: Path, redis_server: RedisServer
) -> None:
    """With `use_lock`, and nothing invalidated, each key is computed once in the whole cluster."""
    here = stage(
        nursery,
        tmp_path,
        ("memory", "redis", "disk"),
        LOCKED,
        redis=redis_server,
        workers=4,
        hosts=2,
        plan={"invalidate": 0.0, "busy": 0.2},
    )
    past = judged(here, exclusive=True, calls=50)
    keys = [run.key for run in past.runs]
    assert sorted(keys) == sorted(set(keys))


FIRST_USE = """
import sys, threading
from importlib import import_module
both = threading.Barrier(2)
failed = []
def use(module):
    both.wait()
    try:
        import_module(module)
    except Exception as error:
        failed.append(repr(error))
modules = ("memo.stores.redis.client", "memo.stores.redis.transport.loop_connections")
threads = [threading.Thread(target=use, args=(module,)) for module in modules]
import memo
for thread in threads: thread.start()
for thread in threads: thread.join()
print(failed)
"""


def test_a_thread_and_a_loop_may_be_the_first_together() -> None:
    """No thread gets half of the Redis client because another one is importing it as well."""
    assert [ports.run(FIRST_USE) for _ in range(3)] == ["[]"] * 3


# --- with faults ---------------------------------------------------------------------------------


def killing(stage: Stage) -> None:
    stage.wait(0.1, 0.2)
    stage.kill_one()


def emptying(stage: Stage) -> None:
    stage.wait(0.1, 0.3)
    stage.outage(stage.redis.kill, lambda: stage.redis.restart(empty=True), random.random() * 0.3)


def restarting(stage: Stage) -> None:
    stage.wait(0.1, 0.3)
    stage.outage(stage.redis.kill, stage.redis.restart, random.random() * 0.3)


def freezing(stage: Stage) -> None:
    stage.wait(0.1, 0.3)
    stage.outage(stage.redis.freeze, stage.redis.thaw, random.random() * 0.5)


def losing(stage: Stage) -> None:
    """Delete one key of ours, whichever it is."""
    stage.wait(0, 0.01)
    client = stage.redis.client()
    name = client.randomkey()
    if name is not None:
        client.delete(name)


def cutting(stage: Stage) -> None:
    """Close every connection, those that listen among them."""
    stage.wait(0, 0.2)
    stage.redis.client().execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")


FAULTS = [killing, emptying, restarting, freezing, losing]


@pytest.mark.parametrize("coherence", ["strict", "tracking"])
@pytest.mark.parametrize("faults", FAULTS, ids=[f.__name__ for f in FAULTS])
def test_with_faults_on_one_host(
    judged: Judge,
    nursery: Nursery,
    tmp_path: Path,
    redis_server: RedisServer,
    faults: Any,
    coherence: str,
) -> None:
    """Under any fault of workers or Redis, a host never sees entries that it has invalidated."""
    here = stage(
        nursery,
        tmp_path,
        ("memory", "redis", "disk"),
        random.choice([FOREVER, AGING, LOCKED]),
        redis=redis_server,
        faults=faults,
        settings={"deadline": 0.1, "coherence": coherence},
    )
    judged(here)
    assert faults is not killing or here.killed > 1


@pytest.mark.parametrize("faults", [killing, losing, cutting], ids=["killing", "losing", "cutting"])
def test_tracking_with_faults_on_two_hosts(
    judged: Judge, nursery: Nursery, tmp_path: Path, redis_server: RedisServer, faults: Any
) -> None:
    """Under any fault of listeners, entries another host invalidated are gone within the bound."""
    here = stage(
        nursery,
        tmp_path,
        ("memory", "redis", "disk"),
        FOREVER,
        redis=redis_server,
        workers=4,
        hosts=2,
        faults=faults,
        settings={**PATIENT, **TRACKING},
    )
    here.seconds += MAX_OUTDATED_SECONDS
    judged(here, bound=MAX_OUTDATED_SECONDS)


@pytest.mark.parametrize("faults", [killing, losing], ids=["killing", "losing"])
def test_with_faults_on_two_hosts(
    judged: Judge, nursery: Nursery, tmp_path: Path, redis_server: RedisServer, faults: Any
) -> None:
    """While Redis is up, a worker that is killed or a key that is lost revives nothing anywhere."""
    here = stage(
        nursery,
        tmp_path,
        ("memory", "redis", "disk"),
        FOREVER,
        redis=redis_server,
        workers=4,
        hosts=2,
        faults=faults,
    )
    judged(here)


@pytest.mark.skipif(not LONG, reason="outages have a way back of seconds: MEMO_TEST_LONG=1")
@pytest.mark.parametrize("faults", [emptying, freezing], ids=["emptying", "freezing"])
def test_with_outages_on_two_hosts(
    judged: Judge, nursery: Nursery, tmp_path: Path, redis_server: RedisServer, faults: Any
) -> None:
    """Between hosts all holds again when Redis is back and has been told what it missed."""

    def seldom(stage: Stage) -> None:
        stage.wait(8, 8)
        faults(stage)

    here = stage(
        nursery,
        tmp_path,
        ("memory", "redis", "disk"),
        FOREVER,
        redis=redis_server,
        workers=4,
        hosts=2,
        faults=seldom,
        settings={"deadline": 0.5},
    )
    judged(here)


def test_killed_on_disk_alone(judged: Judge, nursery: Nursery, tmp_path: Path) -> None:
    """Workers that are killed at any moment revive nothing on a disk that they share."""
    here = stage(nursery, tmp_path, FRONT, AGING, faults=killing)
    judged(here)
    assert here.killed > 1


MANY_KEYS = {"regions": 4, "invalidate": 0.1, "busy": 0.001}
"""Many keys in one group: a group is begun again for one while others wait to be looked up."""


class Ahead(Clock):
    """A clock so far ahead that all groups are over, or those that were only invalidated."""

    def wall_ns(self) -> int:
        return time.time_ns() + random.choice([3600, 10**9, 10**9]) * SECOND


def sweeping(stage: Stage) -> None:
    """Forget groups that are in use, all or a part of them, at a random moment."""
    stage.wait(0, 0.01)
    for file in stage.place.glob("host*/**/host.sqlite"):
        host = Host(file.parent, Ahead())
        with suppress(TierError):  # it was made just now
            drive(host.generations.sweep(BLOCKING))
        host.close()


@pytest.mark.parametrize("options", [AGING, {"ttl": 60}], ids=["aging", "minute"])
def test_while_groups_are_swept(
    judged: Judge, nursery: Nursery, tmp_path: Path, options: dict[str, Any]
) -> None:
    """Groups that are forgotten while they are in use revive nothing."""
    judged(stage(nursery, tmp_path, FRONT, options, faults=sweeping, plan=MANY_KEYS))


def test_while_groups_are_swept_on_two_hosts(
    judged: Judge, nursery: Nursery, tmp_path: Path, redis_server: RedisServer
) -> None:
    """Nor where hosts learn from Redis what they have forgotten."""
    tiers = ("memory", "redis", "disk")
    more: dict[str, Any] = {"workers": 4, "hosts": 2, "faults": sweeping, "plan": MANY_KEYS}
    judged(stage(nursery, tmp_path, tiers, {"ttl": 60}, redis=redis_server, **more))


# --- Redis fails over ----------------------------------------------------------------------------

SHARES_AGAIN = 10.0
"""Seconds after the loss of a server within which hosts share again."""


def lost_after(seconds: float, lose: Callable[[], None]) -> Callable[[Stage], None]:
    """A server is lost once, so many seconds after the beginning; then hosts find their way back.

    An invalidation of one host in that time is promised to that host alone.
    """

    def faults(stage: Stage) -> None:
        if not stage.away:
            stage.wait(seconds, seconds)
            begun = history.now()
            stage.away.append((begun, begun + int(SHARES_AGAIN * 1e9)))
            lose()
        stage.wait(0.1, 0.1)

    return faults


def shared(past: History, after: int, until: int) -> list[Asked]:
    """Answers that a host got from a run of another one that began after a moment."""
    hosts = {call.process: call.host for call in past.calls}
    made = {run.id: hosts.get(run.process) for run in past.runs if run.start > after}
    return [
        call
        for call in past.calls
        if call.end < until and made.get(call.runs[0][0], call.host) not in (call.host, None)
    ]


@pytest.mark.cluster
@pytest.mark.timeout(300)
@pytest.mark.parametrize("program", [binary, valkey])
@pytest.mark.parametrize("kind", ["sentinel", "cluster"])
def test_a_server_is_lost(
    judged: Judge, nursery: Nursery, tmp_path: Path, kind: str, program: Callable[[], str]
) -> None:
    """Over 30 s with a failover: no exception, nothing stale, and hosts share again within 10 s."""
    servers: Any
    if kind == "sentinel":
        servers = Sentinels(tmp_path / "servers", program())
        lose = servers.primary.kill
    else:
        servers = Cluster(tmp_path / "servers", replicas=1, program=program())
        lose = servers.masters[0].kill
    try:
        here = Stage(
            nursery,
            tmp_path / "stage",
            30,
            workers=4,
            hosts=2,
            plan={
                "settings": {"redis_url": servers.url, "deadline": 2.0},
                "options": {"ttl": 600},
                "regions": 8,
                "pause": 0.01,
                "invalidate": 0.02,
            },
            faults=lost_after(8, lose),
        )
        past = judged(here)
    finally:
        servers.close()
    ((begun, ended),) = here.away
    assert {call.key.partition("/")[0] for call in shared(past, begun, ended)} == {
        *("load", "fetch", "report", "areport")
    }


# --- the end of a run ----------------------------------------------------------------------------


@pytest.mark.parametrize(("workers", "wanted", "code"), [("0", "20", 0), ("2", "1_000_000_000", 1)])
def test_a_run_counts_its_calls(tmp_path: Path, workers: str, wanted: str, code: int) -> None:
    """The last lines give calls and violations of all workers; too few calls fail the run."""
    here = Path(__file__)
    names = [f"{here.name}::test_on_one_host[{one}]" for one in ("disk", "memory-disk")]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-n", workers, "-p", "no:cacheprovider"),
            *("--basetemp", str(tmp_path / "inside"), *names),
        ],
        cwd=here.parent,
        env={**os.environ, "MEMO_TEST_CALLS": wanted, "MEMO_TEST_SECONDS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    told = re.search(r"history: 2 configurations, ([\d,]+) calls, .* 0 violations", done.stdout)
    assert told is not None, done.stdout
    assert int(told[1].replace(",", "")) > 40
    assert ("calls fewer than wanted" in done.stdout) == bool(code)


# --- the judge himself ---------------------------------------------------------------------------


def _call(begin: int, end: int, start: int, *, host: str = "h", process: str = "p") -> Asked:
    return Asked("load/a/b", begin, end, process, host, (("r", "load/a/b", start, start),))


def test_the_judge_knows_cutoff() -> None:
    """An older run behind an answer needs a later one with the same data, before the answer."""
    gone = Gone("load", "*", "*", 10, 11, "h")
    runs = (("r", "report/a/b", 2, 2), ("l", "load/a/b", 1, 1))
    call = Asked("report/a/b", 20, 30, "p", "h", runs)

    def judge(*later: Run) -> int:
        old = [Run("r", "report/a/b", 2, 2, 3, "p"), Run("l", "load/a/b", 1, 1, 2, "p", "x")]
        return len(history.stale(History([*old, *later], [call], [gone])))

    assert judge() == 1
    assert judge(Run("m", "load/a/b", 12, 12, 13, "p", "x")) == 0
    assert judge(Run("m", "load/a/b", 12, 12, 13, "p", "y")) == 1
    assert judge(Run("m", "load/a/b", 9, 9, 13, "p", "x")) == 1
    assert judge(Run("m", "load/a/b", 31, 31, 33, "p", "x")) == 1
    direct = Asked("load/a/b", 20, 30, "p", "h", (("l", "load/a/b", 1, 1),))
    past = [Run("l", "load/a/b", 1, 1, 2, "p", "x"), Run("m", "load/a/b", 12, 12, 13, "p", "x")]
    assert len(history.stale(History(past, [direct], [gone]))) == 1


def test_the_judge_sees_a_stale_answer() -> None:
    """A run from before an invalidation that had returned is seen, from during it is let pass."""
    gone = Gone("load", "a", "*", 10, 20, "h")
    assert history.stale(History(calls=[_call(21, 22, 9)], gone=[gone]))
    assert not history.stale(History(calls=[_call(19, 22, 9), _call(21, 22, 10)], gone=[gone]))
    assert not history.stale(History(calls=[_call(21, 22, 9)], gone=[gone._replace(region="z")]))


def test_the_judge_sees_stale_inner_values() -> None:
    """A fresh report that holds a stale value is stale."""
    runs = (("x", "report/a/b", 30, 30), ("y", "load/a/b", 9, 9))
    call = Asked("report/a/b", 29, 40, "p", "h", runs)
    assert history.stale(History(calls=[call], gone=[Gone("load", "*", "*", 10, 20, "h")]))
    assert not history.stale(History(calls=[call], gone=[Gone("report", "*", "*", 10, 20, "h")]))


def test_the_judge_excuses_other_hosts_during_an_outage() -> None:
    """An invalidation by one host while Redis is away is promised to that host alone."""
    mine, others = (Gone("load", "a", "b", 10, 20, host) for host in ("h", "i"))
    away = [(15, 30)]
    assert history.stale(History(calls=[_call(21, 22, 9)], gone=[mine]), away)
    assert not history.stale(History(calls=[_call(21, 22, 9)], gone=[others]), away)
    assert not history.stale(History(calls=[_call(35, 36, 9)], gone=[others]), away)
    later = [(25, 30)]
    assert history.stale(History(calls=[_call(35, 36, 9)], gone=[others]), later)
    assert not history.stale(History(calls=[_call(28, 29, 9)], gone=[others]), later)


def test_the_judge_lets_word_travel_between_hosts() -> None:
    """An entry that another host invalidated may answer for the bound, one of this host may not."""
    mine, others = (Gone("load", "a", "b", 10, 20, host) for host in ("h", "i"))
    assert history.stale(History(calls=[_call(21, 22, 9)], gone=[mine]), bound=5)
    assert not history.stale(History(calls=[_call(25, 26, 9)], gone=[others]), bound=5)
    assert history.stale(History(calls=[_call(26, 27, 9)], gone=[others]), bound=5)


def test_the_judge_sees_answers_that_go_back() -> None:
    """An older run after a newer one is seen, in one process, where the calls did not overlap."""
    assert history.backwards(History(calls=[_call(1, 2, 50), _call(3, 4, 40)]))
    assert not history.backwards(History(calls=[_call(1, 3, 50), _call(2, 4, 40)]))
    other = _call(3, 4, 40, process="q")
    assert not history.backwards(History(calls=[_call(1, 2, 50), other]))


def test_the_judge_sees_overlaps() -> None:
    """Two runs of a key at once are seen, unless an invalidation came in between."""
    first, second = Run("x", "load/a/b", 1, 1, 9, "p"), Run("y", "load/a/b", 5, 5, 12, "q")
    assert history.overlaps(History(runs=[first, second]))
    cause = Gone("load", "a", "b", 3, 4, "h")
    assert not history.overlaps(History(runs=[first, second], gone=[cause]))
    assert not history.overlaps(History(runs=[first, second._replace(start=9)]))


def test_the_judge_sees_what_nobody_computed() -> None:
    """An answer without a run behind it, or with the run of another key, is seen."""
    call = _call(1, 2, 1)
    assert history.foreign(History(calls=[call]))
    assert history.foreign(History(calls=[call], runs=[Run("r", "load/x/b", 1, 1, 2, "p")]))
    assert not history.foreign(History(calls=[call], runs=[Run("r", "load/a/b", 1, 1, 2, "p")]))
