"""Faults: fail, or kill, any single operation of a call; the caller gets the right value.

Every file, SQLite and Redis operation of a call is numbered, and each in turn made to fail, or the
process is killed at it; so are pairs of them, and a fault after a kill.  In CI a part of them,
drawn with a fixed seed; all, and every pair, in the long mode, `MEMO_TEST_LONG=1`.
"""

from __future__ import annotations

import asyncio
import errno
import os
import random
import sqlite3
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import combinations, count
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from folders import FOLDER
from ports import ROOT, run, start
from redis_server import RedisServer
from time_ahead import Ahead

import memo
from memo import cache
from memo.decorators.assembly import default_chain
from memo.errors import TierError, TierUnavailable
from memo.keys.fingerprint import source_history
from memo.runtime import private_files
from memo.runtime.blocking import BLOCKING, drain_blocking, drive
from memo.settings.configuration import configure
from memo.stores.disk import cache_directory, file_locks, host_database, payload_files
from memo.stores.disk import disk_tier as disk_module
from memo.stores.disk import sqlite_file as sqlite_module
from memo.stores.redis.client import Client
from memo.testing import recording

LONG = bool(os.environ.get("MEMO_TEST_LONG"))
ROOMS = (
    private_files,
    payload_files,
    file_locks,
    host_database,
    source_history,
    disk_module,
    sqlite_module,
)
"""The modules that touch files."""
WRITING = frozenset(
    ["write", "writev", "pwrite", "link", "rename", "replace", "unlink", "ftruncate", "utime"]
) | {"mkdir", "chmod", "fchmod", "fsync"}
SYSTEM = WRITING | frozenset(["open", "fstat", "stat", "lstat", "listdir", "read", "pread"])
PIECES = {"os": SYSTEM, "fcntl": frozenset({"flock"}), "mmap": frozenset({"mmap"})}
SIZE = 20_000
"""Numbers in a result: 160 KB, so a payload of its own."""
PAIRS = 6
"""Pairs of operations that are tried in CI for each phase."""
AFTER_A_KILL = 8 if LONG else 1
"""Faults that are tried in the call after each kill."""


class Faults:
    """Numbers the operations, and does something at some of them.

    Attributes:
        at: the numbers, from 1.
        how: gets the name of the operation; raises, or kills.
        after: the fault follows the operation: it happened, but the caller does not learn of it.
        seen: the names of all operations so far.
    """

    def __init__(self, how: Callable[[str], None], at: frozenset[int], *, after: bool = False):
        self.how = how
        self.at = at
        self.after = after
        self.seen: list[str] = []
        self.on = False
        self._lock = threading.Lock()

    def step(self, name: str) -> bool:
        """True if it is this operation's turn."""
        if not self.on:
            return False
        with self._lock:
            self.seen.append(name)
            return len(self.seen) in self.at

    def around(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            hit = self.step(name)
            if hit and not self.after:
                self.how(name)
            result = work(*args, **kwargs)
            if hit and self.after:
                if name == "open":
                    os.close(result)
                if name in ("sql", "connect"):
                    result.close()
                self.how(name)
            return result

        return call


class Piece:
    """A module, some of whose functions are numbered."""

    def __init__(self, module: Any, names: frozenset[str], faults: Faults) -> None:
        for name in names & set(dir(module)):
            setattr(self, name, faults.around(name, getattr(module, name)))
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _sqlite(faults: Faults) -> Any:
    class Connection(sqlite3.Connection):
        def execute(self, *args: Any) -> Any:
            return faults.around("sql", super().execute)(*args)

        def executemany(self, *args: Any) -> Any:
            return faults.around("sql", super().executemany)(*args)

    piece = Piece(sqlite3, frozenset(), faults)

    def connect(*args: Any, **kwargs: Any) -> Any:
        return sqlite3.connect(*args, factory=Connection, **kwargs)

    piece.connect = faults.around("connect", connect)  # type: ignore[attr-defined]
    return piece


def _exchange(faults: Faults) -> Any:
    original = Client.run_exchange

    async def exchange(self: Client, *args: Any, **kwargs: Any) -> Any:
        hit = faults.step("redis")
        if hit and not faults.after:
            faults.how("redis")
        answer = await original(self, *args, **kwargs)
        if hit:
            faults.how("redis")
        return answer

    return exchange


def _parsed(faults: Faults) -> Any:
    original = Client.parse_answer

    def parsed(self: Client, parse: Any, answer: Any) -> Any:
        try:
            if faults.step("redis"):
                faults.how("redis")
        except ConnectionError as error:
            answer = self.as_failure(error)
        return original(self, parse, answer)

    return parsed


@contextmanager
def redis_fails() -> Iterator[None]:
    """Every exchange with Redis fails; afterwards it answers again, and is asked at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Client, "run_exchange", _exchange(Lasting(frozenset({"redis"}), 0, on=True)))
        yield
    [redis] = [tier for tier in default_chain().tiers if tier.name == "redis"]
    redis.client.breaker.record_success()  # type: ignore[attr-defined]


@contextmanager
def numbered(faults: Faults) -> Iterator[Faults]:
    """Number the operations of memo; `faults.on` begins it."""
    with pytest.MonkeyPatch.context() as patch:
        for room in ROOMS:
            for name, names in PIECES.items():
                if hasattr(room, name):
                    module = sys.modules[name]
                    patch.setattr(room, name, Piece(module, names, faults))
        patch.setattr(sqlite_module, "sqlite3", _sqlite(faults))
        patch.setattr(Client, "run_exchange", _exchange(faults))
        patch.setattr(Client, "parse_answer", _parsed(faults))
        try:
            yield faults
        finally:
            faults.on = False


def breaks(name: str) -> None:
    """The operation fails as operations of its kind do."""
    if name in ("sql", "connect"):
        error = sqlite3.OperationalError("disk I/O error")
        error.sqlite_errorcode = sqlite3.SQLITE_IOERR
        raise error
    if name == "redis":
        raise ConnectionResetError(errno.ECONNRESET, "reset")
    raise OSError(errno.EIO, "input/output error")


def value(x: int, epoch: int) -> dict[str, Any]:
    return {"x": x, "epoch": epoch, "frame": np.full(SIZE, x * 1000 + epoch)}


def epoch_of(found: Any, x: int) -> int:
    """The epoch of a result, which must be whole."""
    epoch = int(found["epoch"])
    assert found["x"] == x
    assert found["frame"].shape == (SIZE,)
    assert (found["frame"] == x * 1000 + epoch).all(), "parts of two results"
    return epoch


class World:
    """A cached function, sync or async, whose right answer the test knows."""

    def __init__(self, asynchronous: bool, **options: Any) -> None:
        self.epoch = 1
        self.ran = 0
        given = {"name": "faults:load", "version": "1", "ttl": None, **options}
        if asynchronous:

            @cache(**given)
            async def coroutine(x: int) -> Any:
                return self._compute(x)

            self.function: Any = coroutine
        else:

            @cache(**given)
            def load(x: int) -> Any:
                return self._compute(x)

            self.function = load
        self.asynchronous = asynchronous

    def _compute(self, x: int) -> Any:
        self.ran += 1
        return value(x, self.epoch)

    def _run(self, call: Callable[[], Any]) -> Any:
        if not self.asynchronous:
            return call()

        async def inside() -> Any:
            answer = await call()
            await memo.drain(5)
            return answer

        return asyncio.run(inside())

    def call(self, x: int = 7) -> int:
        return epoch_of(self._run(lambda: self.function(x)), x)

    def invalidate(self) -> Any:
        verb = self.function.ainvalidate if self.asynchronous else self.function.invalidate
        return self._run(verb)


PORTS = pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])


def _settings(directory: Path, tiers: list[str], server: RedisServer | None) -> dict[str, Any]:
    more = {"redis_url": server.url, "deadline": 5.0} if server is not None else {}
    return {"directory": directory, "tiers": tiers, **more}


def _sets(reached: Callable[[frozenset[int]], int], step: int) -> int:
    """Try single numbers until one is not reached, then pairs: in the long mode all of both."""
    last = 0
    for number in count(1, 1 if LONG else step):
        there = reached(frozenset({number}))
        if there < number:
            break
        last = max(last, there)
    pairs = list(combinations(range(1, last + 1), 2))
    for pair in pairs if LONG else random.Random(last).sample(pairs, PAIRS):
        reached(frozenset(pair))
    return last


def _begin(world: World, phase: str) -> None:
    """The state before the phase that is disturbed."""
    if phase == "miss":
        world.call(8)
    elif phase != "first":
        assert world.call() == 1
    drain_blocking(5)
    memo.testing.reset()


def _disturbed(
    tmp_path: Path,
    tiers: list[str],
    server: RedisServer | None,
    world_of: Callable[[], World],
    phase: str,
    after: bool,
    step: int = 1,
) -> int:
    """Disturb a phase at every operation; how many there are."""
    serial = count()
    client = server.client() if server is not None else None

    def once(at: frozenset[int]) -> int:
        directory = tmp_path / f"{next(serial)}"
        if client is not None:
            client.flushall()
        given = _settings(directory, tiers, server)
        world = world_of()
        with configure(**given):
            _begin(world, phase)
        with configure(**given), numbered(Faults(breaks, at, after=after)) as faults:
            faults.on = True
            try:
                if phase == "invalidate":
                    world.epoch = 2
                    told = world.invalidate()
                else:
                    assert world.call() == 1
                    told = None
                drain_blocking(5)
            finally:
                faults.on = False
            what = f"{faults.seen[min(at) - 1]} {sorted(at)}" if max(at) <= len(faults.seen) else ""
            if told is not None:
                sound = told.complete or any(
                    how.startswith("journalled") for how in told.tiers.values()
                )
                assert not sound or world.call() == 2, f"an invalidation was lost: {what}"
                return len(faults.seen)
            assert world.call() == 1, what
            before = world.ran
            assert world.call() == 1, what
            if len(at) == 1:
                assert world.ran == before, f"it was not stored by the call after the fault: {what}"
            reached = len(faults.seen)
        drain_blocking(5)
        memo.testing.reset()
        return reached

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return _sets(once, step)


@pytest.mark.parametrize(
    ("phase", "tiers", "asynchronous", "step"),
    [
        ("first", ["disk"], False, 11),
        ("first", ["memory", "redis", "disk"], True, 13),
        ("miss", ["disk"], True, 5),
        ("miss", ["memory", "redis", "disk"], False, 5),
        ("hit", ["disk"], False, 2),
        ("hit", ["redis", "disk"], True, 2),
        ("invalidate", ["disk"], True, 2),
        ("invalidate", ["memory", "redis", "disk"], False, 3),
    ],
    ids=str,
)
@pytest.mark.timeout(0 if LONG else 120)
def test_any_operation_may_fail(
    tmp_path: Path, request: Any, tiers: list[str], phase: str, asynchronous: bool, step: int
) -> None:
    """Whichever operation fails: the right value, and the next call works (I4, I5, I7)."""
    server = request.getfixturevalue("redis_server") if "redis" in tiers else None
    world_of = lambda: World(asynchronous, use_lock=True)
    total = _disturbed(tmp_path, tiers, server, world_of, phase, after=False, step=step)
    assert total > 5, "hardly anything was numbered"


@PORTS
@pytest.mark.parametrize("phase", ["miss", "hit", "invalidate"])
def test_any_operation_may_fail_after_it_was_done(
    tmp_path: Path, redis_server: RedisServer, phase: str, asynchronous: bool
) -> None:
    """An operation that took place though it seemed to fail, such as a lost reply, is no harm."""
    world_of = lambda: World(asynchronous)
    tiers = ["redis", "disk"]
    step = 7 if phase == "miss" else 4
    assert _disturbed(tmp_path, tiers, redis_server, world_of, phase, after=True, step=step) > 5


@PORTS
def test_an_invalidation_that_no_tier_takes_to_the_end(
    redis_server: RedisServer, asynchronous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis fails, and the journal cannot be written: the invalidation is still replayed (I7)."""
    world = World(asynchronous)
    with configure(redis_url=redis_server.url, tiers=["redis", "disk"], deadline=5.0):
        assert world.call() == 1
        host_database = default_chain().host.journal.host_database  # type: ignore[union-attr]
        write, written = host_database.write, []

        def once(work: Any, *, durable: bool) -> None:
            written.append(durable)
            if len(written) > 1:
                raise TierError("no more")
            write(work, durable=durable)

        world.epoch = 2
        with monkeypatch.context() as patch, redis_fails():
            patch.setattr(host_database, "write", once)
            told = world.invalidate()
        assert told.tiers["redis"].startswith("journalled: unreachable, replayed here")
        assert world.call() == 2


# --- SIGKILL -------------------------------------------------------------------------------------


KILLING = """
import gc, os, random, signal, sys, warnings
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_faults as faults
from memo.settings.configuration import configure

def in_a_child(work):
    child = os.fork()
    if child == 0:
        try:
            os._exit(3 if work() else 0)
        except BaseException as error:
            import traceback
            traceback.print_exc()
            os._exit(1)
    return os.waitpid(child, 0)[1]

def kill(name):
    os.kill(os.getpid(), signal.SIGKILL)

def work(directory, number, phase, after):
    world = faults.World(False, use_lock=True)
    with configure(directory=directory, tiers=["memory", "disk"]):
        if number:
            world.epoch = 2
            with faults.numbered(faults.Faults(kill, frozenset({number}), after=after)) as given:
                given.on = True
                if phase == "refresh":
                    world.function.refresh(7)
                elif phase == "clear":
                    world.function.cache_clear()
                else:
                    world.call()
                given.on = False
            return len(given.seen) >= number  # it failed by itself, so nothing came after it
        else:
            world.call()

def killed_at(number, fault, place, phase, after):
    if phase != "first":
        assert in_a_child(lambda: work(place, 0, phase, after)) == 0
    status = in_a_child(lambda: work(place, number, phase, after))
    told = f"killed at operation {number}, then operation {fault} failed"
    if fault:
        assert in_a_child(lambda: faults.disturbed(Path(place), phase, fault)) == 0, told
    assert in_a_child(lambda: faults.judge(Path(place), phase, fault > 0)) == 0, told
    return status

directory, phase, step, after = sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5] == "after"
chosen = random.Random(f"{phase} {after}")
killed, number, status = 0, 1 + (step // 2 if after else 0), 9
while status:
    for serial in range(int(sys.argv[6]) or 1):
        fault = chosen.randint(1, 60) if int(sys.argv[6]) else 0
        place = f"{directory}/{number}-{serial}"
        status = killed_at(number, fault, place, phase, after)
        killed += os.WIFSIGNALED(status)
        assert os.waitstatus_to_exitcode(status) in (0, 3, -signal.SIGKILL)
    number += step
print(killed)
"""
ALLOWED = {"refresh": {1, 2}, "clear": {1, 3}, "first": {2, 3}}
"""The epochs that may be found after a kill in a phase; 3 is that of the reader."""


def disturbed(directory: Path, phase: str, fault: int) -> None:
    """Call, in a fresh process after a kill, with a fault; then the next call works."""
    world = World(False, use_lock=True)
    with configure(directory=directory, tiers=["memory", "disk"]):
        world.epoch = 3
        with numbered(Faults(breaks, frozenset({fault}))) as faults:
            faults.on = True
            first = world.call()
        assert first in ALLOWED[phase] | {3}, f"epoch {first} after {phase}"
        again = world.call()
        assert first <= again, "an answer went back"
        assert again in {first, 3}
        assert world.ran <= 2


def judge(directory: Path, phase: str, computed: bool = False) -> None:
    """See, in a fresh process, that a killed store left the old or the new, and nothing else.

    Args:
        computed: a call with the reader's epoch has been made since.
    """
    world = World(False, use_lock=True)
    with configure(directory=directory, tiers=["memory", "disk"]):
        begun = time.monotonic()
        world.epoch = 3
        answer = world.call()
        allowed = ALLOWED[phase] | ({3} if computed else set())
        assert answer in allowed, f"epoch {answer} after {phase}"
        assert time.monotonic() - begun < 10, "a dead process' lock was waited for"
        assert world.call() == answer
        assert world.ran <= 1
        assert world.function.refresh(7)["epoch"] == 3
        tier: Any = default_chain().tiers[-1]
        drive(tier.sweep(BLOCKING))
        home = directory / FOLDER
        left = {p.name for p in (home / "payloads").rglob("*") if p.is_file()}
        kinds = sorted(("." in name, name.rpartition(".")[2] in ("tmp", "rec")) for name in left)
        assert kinds == [(False, False), (True, False)], f"left behind: {sorted(left)}"
        assert list((home / "locks").iterdir()) == []
        for path in ("host.sqlite", "entries/cache.db"):
            with sqlite3.connect(home / path) as connection:
                assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            connection.close()


@pytest.mark.parametrize(
    ("phase", "step"),
    [("first", 53), ("refresh", 31), ("clear", 37)],
    ids=["first", "refresh", "clear"],
)
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.timeout(600 if LONG else 120)
def test_a_kill_at_any_operation_leaves_old_or_new(
    tmp_path: Path, phase: str, step: int, when: str
) -> None:
    """SIGKILL before or after any operation: the next process finds old or new, whole, no rest."""
    assert _killed(tmp_path, phase, step, when, 0) > 3


@pytest.mark.parametrize(
    ("phase", "step", "when"),
    [("first", 61, "before"), ("refresh", 43, "after"), ("clear", 47, "before")],
)
@pytest.mark.timeout(3600 if LONG else 120)
def test_a_fault_after_a_kill(tmp_path: Path, phase: str, step: int, when: str) -> None:
    """SIGKILL at any operation and a fault in the next call: right values, then it works again."""
    assert _killed(tmp_path, phase, step, when, AFTER_A_KILL) > 2


def _killed(tmp_path: Path, phase: str, step: int, when: str, faults: int) -> int:
    """Kill at operations, one after the other; how many there were."""
    tests, step = Path(__file__).parent, 1 if LONG else step
    with start(KILLING, tests, tmp_path, phase, step, when, faults) as process:
        killed, _ = process.communicate(timeout=3600)
    assert process.returncode == 0
    return int(killed)


# --- a disk that does not take anything ----------------------------------------------------------


class Lasting(Faults):
    """Every operation of some kinds fails, as long as it is on."""

    def __init__(self, names: frozenset[str], code: int, *, on: bool = False) -> None:
        super().__init__(self._fail, frozenset())
        self.names = names
        self.code = code
        self.on = on

    def _fail(self, name: str) -> None:
        if name == "redis":
            breaks(name)
        if name in ("sql", "connect"):
            full = self.code == errno.ENOSPC
            told = "database or disk is full" if full else "attempt to write a readonly database"
            error = sqlite3.OperationalError(told)
            error.sqlite_errorcode = sqlite3.SQLITE_FULL if full else sqlite3.SQLITE_READONLY
            raise error
        raise OSError(self.code, os.strerror(self.code))

    def step(self, name: str) -> bool:
        return self.on and name in self.names


class Unopened(Faults):
    """SQLite cannot open a file, as long as a condition holds."""

    def __init__(self, code: int, holds: Callable[[], bool]) -> None:
        super().__init__(self._fail, frozenset())
        self.code = code
        self.holds = holds

    def _fail(self, name: str) -> None:
        error = sqlite3.OperationalError("unable to open database file")
        error.sqlite_errorcode = self.code
        raise error

    def step(self, name: str) -> bool:
        return name == "connect" and self.holds()


@PORTS
@pytest.mark.parametrize("opened", [False, True], ids=["at open", "running"])
@pytest.mark.parametrize(
    ("names", "code"),
    [
        (WRITING | {"sql"}, errno.ENOSPC),
        (frozenset({"write", "writev", "pwrite", "ftruncate"}), errno.ENOSPC),
        (WRITING | {"sql"}, errno.EROFS),
        (frozenset({"mkdir", "link", "rename", "replace", "unlink"}), errno.EACCES),
        (SYSTEM | {"connect"}, errno.EMFILE),
        (SYSTEM | {"sql", "connect"}, errno.EIO),
    ],
    ids=["full", "full files", "read-only", "unwritable", "descriptors", "broken"],
)
def test_a_disk_that_takes_nothing(
    cache_home: Path,
    names: frozenset[str],
    code: int,
    opened: bool,
    asynchronous: bool,
    ahead: Ahead,
) -> None:
    """Full, read-only, unwritable, out of descriptors: right values; later it is used again."""
    world = World(asynchronous)
    with configure(tiers=["disk"]):
        if opened:
            world.call(1)
        with numbered(Lasting(names, code)) as faults:
            faults.on = True
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                for x in (1, 2, 2, 3):
                    assert world.call(x) == 1
                    ahead.advance(
                        2 * cache_directory.DIRECTORY_RETRY_SECONDS
                    )  # it is tried again each time
            faults.on = False
            world.call(2)
            before = world.ran
            assert world.call(2) == 1
            assert world.ran == before
        left = [p.name for p in cache_home.rglob("*") if p.suffix == ".tmp"]
        assert left == []


@pytest.mark.parametrize("limit", ["RLIMIT_FSIZE", "RLIMIT_NOFILE"])
def test_real_limits(limit: str, tmp_path: Path) -> None:
    """With the kernel's own limits on files and descriptors every call gives its value."""
    allowed = "100_000" if limit == "RLIMIT_FSIZE" else "number"
    code = (
        "import os, resource, signal, sys\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "import test_faults as faults\n"
        "from memo.settings.configuration import configure\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "world = faults.World(False, use_lock=True)\n"
        "with configure(directory=sys.argv[2], tiers=['memory', 'disk']):\n"
        "    assert world.call(1) == 1\n"
        f"    soft, hard = resource.getrlimit(resource.{limit})\n"
        "    number = os.open('/dev/null', os.O_RDONLY); os.close(number)\n"
        f"    resource.setrlimit(resource.{limit}, ({allowed}, hard))\n"
        "    for x in (1, 2, 3):\n"
        "        assert world.call(x) == 1\n"
        f"    resource.setrlimit(resource.{limit}, (soft, hard))\n"
        "    world.call(4)\n"
        "    ran = world.ran\n"
        "    assert world.call(4) == 1\n"
        "    assert world.ran == ran\n"
        "print('done')\n"
    )
    assert run(code, Path(__file__).parent, tmp_path / "cache") == "done"


@PORTS
@pytest.mark.parametrize("use_lock", [False, True])
def test_redis_works_where_no_directory_can_be_made(
    redis_server: RedisServer, asynchronous: bool, use_lock: bool
) -> None:
    """Without a disk of any kind Redis is the cache, and still the authority on what is true."""
    world = World(asynchronous, use_lock=use_lock)
    with configure(directory="/proc/memo", redis_url=redis_server.url, deadline=5.0):
        assert world.call() == world.call() == 1
        assert world.ran == 1
        world.epoch = 2
        told = world.invalidate()
        assert told.tiers["redis"] == "done"
        assert world.call() == world.call() == 2
        assert world.ran == 2


@pytest.mark.parametrize("place", ["/proc/memo", "/dev/null/memo", "/dev/full"])
def test_a_directory_that_cannot_be_made(place: str) -> None:
    """If no directory can be made, functions are computed, and nothing is raised."""
    world = World(False)
    with configure(directory=place, tiers=["disk"]):
        assert [world.call(x) for x in (1, 1, 2)] == [1, 1, 1]


GARBAGE = [b"", b"garbage" * 1000, b"SQLite format 3\0" + b"\xff" * 5000, b"\xff" * 16]


@PORTS
@pytest.mark.parametrize("name", ["host.sqlite", "host.bell", "entries/cache.db"])
@pytest.mark.parametrize("garbage", range(len(GARBAGE)))
def test_garbage_in_place_of_a_file(
    cache_home: Path, name: str, garbage: int, asynchronous: bool
) -> None:
    """Any content in the place of memo's files: right values, and soon hits again.

    The bell is mapped while it is in use, so it is replaced then: what others cut off a mapped
    file, no program can read.
    """
    world = World(asynchronous)
    for closed in (True, False):
        with configure(tiers=["disk"]):
            world.call()
            if closed:
                memo.testing.reset()
            for suffix in ("-wal", "-shm"):
                Path(f"{cache_home}/memo/{name}{suffix}").unlink(missing_ok=True)
            path = cache_home / FOLDER / name
            if not closed and name == "host.bell":
                path.unlink()
            path.write_bytes(GARBAGE[garbage])
        with configure(tiers=["disk"]):
            for _ in range(3):
                assert world.call() == 1
            before = world.ran
            assert world.call() == 1
            assert world.ran == before


BREAKING: dict[str, Callable[[Path], Any]] = {
    "garbage": lambda path: path.write_bytes(b"garbage" * 1000),
    "half garbage": lambda path: path.write_bytes(path.read_bytes()[:100] + b"x" * 20_000),
    "empty": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.unlink(),
    "link": lambda path: (path.unlink(), path.symlink_to("/etc/passwd")),
    "dangling link": lambda path: (path.unlink(), path.symlink_to("/nowhere/at/all")),
    "directory": lambda path: (path.unlink(), path.mkdir()),
}


def _refusing(world: World, server: RedisServer) -> Any:
    """Invalidate while Redis fails, so that it is journalled; then let Redis answer again."""
    with redis_fails():
        return world.invalidate()


def _closed(path: Path, how: Callable[[Path], Any]) -> None:
    """Damage the host's file while no process has it open."""
    chain: Any = default_chain()
    chain.host.close()
    for suffix in ("-wal", "-shm"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)
    how(path)


@PORTS
@pytest.mark.parametrize("journalled", [True, False], ids=["journalled", "nothing waits"])
@pytest.mark.parametrize("how", BREAKING)
def test_a_broken_host_file_does_not_cost_redis(
    cache_home: Path, redis_server: RedisServer, how: str, journalled: bool, asynchronous: bool
) -> None:
    """It is set aside, Redis goes on, and an invalidation that waited in it is not lost (I7)."""
    world = World(asynchronous)
    path = cache_home / FOLDER / "host.sqlite"
    with (
        configure(redis_url=redis_server.url, tiers=["redis", "disk"], deadline=5.0),
        recording() as heard,
    ):
        assert world.call() == 1
        if journalled:
            world.epoch = 2
            assert _refusing(world, redis_server).tiers["redis"].startswith("journalled")
        _closed(path, BREAKING[how])
        assert world.call() == world.epoch
        ran = world.ran
        assert ran == 2, "what waits is not known: everything is invalidated, once"
        assert world.call() == world.epoch
        assert world.ran == ran
        told = [event for event in heard if event.reason == "journal"]
        assert [event.tier for event in told] == ["host"]
        redis: Any = default_chain().tiers[0]
        found = drive(redis.lookup(BLOCKING, default_chain().name(*_named(world))))
        assert found is not None, "Redis is not used"


def _named(world: World) -> tuple[str, str]:
    return world.function.function_id, world.function.key(7)


@PORTS
@pytest.mark.parametrize("journalled", [True, False], ids=["journalled", "nothing waits"])
def test_a_host_file_that_cannot_be_opened_does_not_cost_redis(
    cache_home: Path,
    redis_server: RedisServer,
    journalled: bool,
    asynchronous: bool,
) -> None:
    """If SQLite cannot open it the journal is read from a copy, and replayed once."""
    world = World(asynchronous)
    given = {"tiers": ["memory", "redis"], "redis_url": redis_server.url, "deadline": 5.0}
    with configure(**given):
        assert world.call() == 1
        if journalled:
            world.epoch = 2
            with redis_fails():
                assert world.invalidate().tiers["redis"].startswith("journalled")
        default_chain().host.close()  # type: ignore[union-attr]

        with numbered(Unopened(sqlite3.SQLITE_CANTOPEN, lambda: True)):
            assert world.call() == world.epoch
            ran = world.ran
            assert ran == (2 if journalled else 1)
            assert world.call() == world.call() == world.epoch
            assert world.ran == ran, "it is replayed again and again"
        assert not list(cache_home.rglob("*.damaged")), "it was good"


@PORTS
def test_a_host_file_that_cannot_be_read_at_all(
    cache_home: Path,
    redis_server: RedisServer,
    asynchronous: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After three looks it is set aside, and all that Redis holds is invalidated once."""
    world = World(asynchronous)
    with configure(redis_url=redis_server.url, tiers=["redis"], deadline=5.0):
        assert world.call() == 1
        default_chain().host.close()  # type: ignore[union-attr]
        file = cache_home / FOLDER / "host.sqlite"
        damaged = file.stat().st_ino

        def unreadable(path: Path) -> Any:
            raise TierError("no copy")

        monkeypatch.setattr("memo.stores.disk.recovery.read_journal", unreadable)
        there = lambda: file.exists() and file.stat().st_ino == damaged
        with numbered(Unopened(sqlite3.SQLITE_IOERR, there)):
            world.epoch = 2
            answers = [world.call() for _ in range(8)]
            assert not there()
            assert answers[-1] == 2, "Redis may hold what somebody has invalidated"
            ran = world.ran
            assert world.call() == 2
            assert world.ran == ran, "Redis is not used"


@PORTS
@pytest.mark.parametrize("tiers", [["redis"], ["memory", "redis", "disk"]], ids=len)
def test_a_journal_that_cannot_be_read_for_a_moment(
    redis_server: RedisServer, tmp_path: Path, tiers: list[str], asynchronous: bool
) -> None:
    """Its host believes nothing meanwhile: alone it knows of no other host's invalidations."""
    world = World(asynchronous)
    given = {"redis_url": redis_server.url, "tiers": tiers, "deadline": 5.0}

    def locked(*_: Any, **__: Any) -> NoReturn:
        raise TierUnavailable("database is locked")

    with configure(directory=tmp_path / "one", **given):
        assert world.call() == 1
        with configure(directory=tmp_path / "two", **given):
            world.epoch = 2
            assert world.invalidate().tiers["redis"] == "done"
        journal = type(default_chain().host.journal)  # type: ignore[union-attr]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(journal, "has_due_rows", locked)
            patch.setattr(journal, "has_due_rows_now", locked)
            assert world.call() == 2
        assert world.call() == world.call() == 2
        assert world.ran <= 3


@PORTS
def test_the_directory_goes_while_running(cache_home: Path, asynchronous: bool) -> None:
    """After `rm -rf` values are right, and an invalidation is not forgotten with the directory."""
    import shutil

    world = World(asynchronous)
    with configure(tiers=["memory", "disk"]):
        for _ in range(3):
            assert world.call() == world.epoch
            shutil.rmtree(cache_home, ignore_errors=True)
            assert world.call() == world.epoch
            assert world.call() == world.epoch
            world.epoch += 1
            shutil.rmtree(cache_home, ignore_errors=True)
            world.invalidate()
            assert world.call() == world.epoch


MAPPED = """
import gc, os, shutil, sys
sys.path.insert(0, sys.argv[1])
import numpy as np
from pathlib import Path
import memo, memo.testing
from memo.runtime import FORMAT
from memo.settings.configuration import configure

SIZE = 2_000_000

@memo.cache(name="faults:mapped", version="1", ttl=None)
def frame(x):
    return np.arange(SIZE) + x

home = Path(sys.argv[2])
held = []

def hold():
    found = frame(1)
    held.append(found)
    return found

def payloads():
    return [p for p in (home / f"memo.{FORMAT}" / "payloads").rglob("*") if p.is_file()]

with configure(directory=home, tiers=["disk"], size_limit=64 << 20):
    frame(1); hold()
    for path in payloads():           # replaced by others
        other = path.with_name("other")
        other.write_bytes(os.urandom(100)); os.replace(other, path)
    hold()                            # a miss, stored over it
    for x in range(2, 9):             # evicted
        frame(x)
    hold()
    frame.cache_clear(); hold()       # cleared
    frame.refresh(1); hold()          # refreshed
    for path in payloads():
        path.unlink()                 # deleted
    hold()
    memo.testing.reset()
with configure(directory=home, tiers=["disk"], size_limit=64 << 20):
    hold()
    shutil.rmtree(home)
    hold()
for found in held:
    found += 1                        # written to: private
    assert (found == np.arange(SIZE) + 2).all()
print(len(held))
"""


def test_mapped_results_outlive_their_files(tmp_path: Path) -> None:
    """Replaced, evicted, cleared, refreshed, deleted: a mapped array stays whole, and no SIGBUS."""
    assert run(MAPPED, Path(__file__).parent, tmp_path / "cache") == "8"


def test_no_file_that_may_be_mapped_is_ever_cut(tmp_path: Path) -> None:
    """Nothing but locks, bells and time stamps is truncated or opened to write over."""
    cut: list[str] = []

    class Watching(Faults):
        def around(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                if self.on and name == "ftruncate":
                    cut.append(os.readlink(f"/proc/self/fd/{args[0]}"))
                if self.on and name == "open" and args[1] & os.O_TRUNC:
                    cut.append(f"{args[0]} opened")
                return work(*args, **kwargs)

            return call

    world = World(False, use_lock=True)
    settings = configure(directory=tmp_path, tiers=["disk"])
    with settings, numbered(Watching(breaks, frozenset())) as faults:
        faults.on = True
        world.call()
        world.call()
        world.function.refresh(7)
        world.invalidate()
        world.function.cache_clear()
    allowed = ("bell", "swept")
    assert [path for path in cut if "/locks/" not in path and not path.endswith(allowed)] == []
    assert cut, "the watch does not work"


# --- processes, threads, loops -------------------------------------------------------------------


@pytest.mark.parametrize("use_lock", [False, True])
def test_fork_with_live_clients(redis_server: RedisServer, use_lock: bool) -> None:
    """Children of a process that is using Redis, disk and locks go on by themselves."""
    world = World(False, use_lock=use_lock)
    with configure(redis_url=redis_server.url, deadline=5.0):
        world.call(1)
        under_way = threading.Event()
        go_on = threading.Event()

        @cache(name="faults:slow", version="1", ttl=None, use_lock=use_lock)
        def slow() -> int:
            under_way.set()
            assert go_on.wait(20)
            return 1

        thread = threading.Thread(target=slow)
        thread.start()
        assert under_way.wait(5)
        children = []
        for number in range(4):
            child = os.fork()
            if child == 0:  # pragma: no cover - not seen from here
                code = 1
                try:
                    good = [world.call(x) for x in (1, 2, 3, 10 + number)] == [1] * 4
                    good &= asyncio.run(_in_a_loop(number)) == number
                    code = 0 if good else 2
                finally:
                    os._exit(code)
            children.append(child)
        for x in range(20):
            assert world.call(x) == 1
        assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4
        go_on.set()
        thread.join(5)
        assert not thread.is_alive()
        assert slow.peek() == 1


@cache(name="faults:in_a_loop", version="1", ttl=None)
async def _in_a_loop(x: int) -> int:
    return x


def test_spawned_processes(tmp_path: Path, redis_server: RedisServer) -> None:
    """A process that was spawned finds what its parent stored."""
    import worked

    settings = {"directory": tmp_path / "cache", "redis_url": redis_server.url, "deadline": 5.0}
    with configure(**settings):
        mine = worked.slow(str(tmp_path / "log"), 1)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import worked; from memo.settings.configuration import configure\n"
        "with configure(directory=sys.argv[2], redis_url=sys.argv[3], deadline=5.0):\n"
        "    print(worked.slow(sys.argv[4], 1))\n"
    )
    arguments = (Path(__file__).parent, tmp_path / "cache", redis_server.url, tmp_path / "log")
    assert run(code, *arguments) == mine


@pytest.mark.parametrize("tiers", [["disk"], ["memory", "redis", "disk"]])
def test_many_threads(redis_server: RedisServer, tiers: list[str]) -> None:
    """Sixteen threads that call, invalidate and clear at once get right values, and no deadlock."""
    world = World(False)
    wrong: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for number in range(25):
                x = (seed * 7 + number) % 5
                if number % 9 == 8:
                    world.function.invalidate(x)
                assert world.call(x) == 1
        except BaseException as error:
            wrong.append(error)

    with configure(tiers=tiers, redis_url=redis_server.url, deadline=5.0):
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert not any(thread.is_alive() for thread in threads)
    assert wrong == []


def test_many_loops(redis_server: RedisServer) -> None:
    """Loops one after another and at the same time share the cache, not connections."""

    async def use(number: int) -> list[int]:
        return list(await asyncio.gather(*(_in_a_loop(x) for x in (number, number + 1, 0))))

    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(3):
            if asyncio.run(use(number)) != [number, number + 1, 0]:
                wrong.append(number)

    with configure(redis_url=redis_server.url, deadline=5.0):
        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        work(99)
    assert wrong == []


EXITING = """
import asyncio, atexit, os, sys, threading, time
import memo
from memo.settings.configuration import configure
from memo.testing import ManualClock

how = sys.argv[2]
settings = {"directory": sys.argv[1], "deadline": 1.0}
if sys.argv[3] != "none":
    settings["redis_url"] = sys.argv[3]
configure(**settings)

@memo.cache(name="exit:load", version="1", ttl=None, stale_while_revalidate=1000, use_lock=True)
def load(x):
    if x == "slow":
        time.sleep(0.2)
    return x

@memo.cache(name="exit:aload", version="1", ttl=None, stale_while_revalidate=1000)
async def aload(x):
    await asyncio.sleep(0.05)
    return x

assert load("slow") == "slow"
load.expire()
if how == "refresh":
    assert load("slow") == "slow"
elif how == "atexit":
    atexit.register(lambda: print(load("late")))
elif how == "thread":
    main = threading.main_thread()
    threading.Thread(target=lambda: (main.join(), print(load("thread")))).start()
elif how == "daemon":
    at_work = threading.Semaphore(0)
    def work():
        for x in range(10**6):
            load(x)
            at_work.release()
    threading.Thread(target=work, daemon=True).start()
    for _ in range(10):
        at_work.acquire()
elif how == "loop":
    async def main():
        asyncio.get_running_loop().slow_callback_duration = 60  # a busy machine is no fault
        await aload(1)
        aload.expire()
        return await aload(1)
    assert asyncio.run(main()) == 1
elif how == "raise":
    load("slow")
    raise SystemExit(0)
print("end", flush=True)
"""


@pytest.mark.parametrize(
    ("how", "redis"),
    [
        ("refresh", True),
        ("atexit", False),
        ("thread", True),
        ("daemon", False),
        ("loop", True),
        ("raise", False),
    ],
)
def test_interpreter_exit(tmp_path: Path, redis_server: RedisServer, how: str, redis: bool) -> None:
    """A program that ends in the middle of anything ends at once, silently, with code 0."""
    where = redis_server.url if redis else "none"
    begun = time.monotonic()
    done = subprocess.run(
        [
            sys.executable,
            "-X",
            "dev",
            "-W",
            "error",
            "-c",
            EXITING,
            str(tmp_path / "c"),
            how,
            where,
        ],
        capture_output=True,
        text=True,
        timeout=30,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.stderr == ""
    assert done.returncode == 0
    assert "end" in done.stdout.split() or how == "raise"
    assert time.monotonic() - begun < 10
    left = list(tmp_path.glob("c/memo/locks/*"))
    assert left == [] or how == "daemon", "only a thread that was cut off leaves its lock, unlocked"
