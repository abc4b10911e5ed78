"""Faults: fail, or kill, any single operation of a call; the caller gets the right value.

Every file, SQLite and Redis operation of a call is numbered, and each in turn made to fail (in the
long mode, `MEMO_TEST_LONG=1`, every pair of them too), or the process is killed at it.
"""

from __future__ import annotations

import asyncio
import errno
import os
import signal
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
from typing import Any

import memo
import numpy as np
import pytest
from memo import cache, files, ledger, locks, manifests, payloads
from memo import disk as disk_module
from memo import sqlite as sqlite_module
from memo.assembly import default_chain
from memo.config import configure
from memo.drivers import BLOCKING, drain_blocking, drive
from memo.wire import Wire
from ports import ROOT, run
from redis_server import RedisServer

LONG = bool(os.environ.get("MEMO_TEST_LONG"))
ROOMS = (files, payloads, locks, ledger, manifests, disk_module, sqlite_module)
"""The modules that touch files."""
WRITING = frozenset(
    "write writev pwrite link rename replace unlink ftruncate utime mkdir chmod fchmod fsync".split()
)
SYSTEM = WRITING | frozenset("open fstat stat lstat listdir read pread".split())
PIECES = {"os": SYSTEM, "fcntl": frozenset({"flock"}), "mmap": frozenset({"mmap"})}
SIZE = 20_000
"""Numbers in a result: 160 KB, so a payload of its own."""


class Faults:
    """Numbers the operations, and does something at some of them.

    Attributes:
        at: the numbers, from 1.
        how: gets the name of the operation; raises, or kills.
        after: what is done, is done after the operation: it happened, and nobody knows.
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
        """Whether it is this operation's turn."""
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
    original = Wire._exchange

    async def exchange(self: Wire, port: Any, question: Any) -> Any:
        hit = faults.step("redis")
        if hit and not faults.after:
            faults.how("redis")
        answer = await original(self, port, question)
        if hit:
            faults.how("redis")
        return answer

    return exchange


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
        patch.setattr(Wire, "_exchange", _exchange(faults))
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
    """Try all single numbers until one is not reached, then in the long mode all pairs."""
    last = 0
    for number in count(1, 1 if LONG else step):
        if reached(frozenset({number})) < number:
            break
        last = number
    if LONG:
        for pair in combinations(range(1, last + 1), 2):
            reached(frozenset(pair))
    return last


def _begin(world: World, phase: str) -> None:
    """What is there before the phase that is disturbed."""
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

    def once(at: frozenset[int]) -> int:
        directory = tmp_path / f"{next(serial)}"
        if server is not None:
            server.client().flushall()
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
                sound = told.complete or any("journalled:" in how for how in told.tiers.values())
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
        ("first", ["disk"], False, 5),
        ("first", ["memory", "redis", "disk"], True, 7),
        ("miss", ["disk"], True, 1),
        ("miss", ["memory", "redis", "disk"], False, 1),
        ("hit", ["disk"], False, 1),
        ("hit", ["redis", "disk"], True, 1),
        ("invalidate", ["disk"], True, 1),
        ("invalidate", ["memory", "redis", "disk"], False, 1),
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
    assert _disturbed(tmp_path, tiers, redis_server, world_of, phase, after=True) > 5


# --- SIGKILL -------------------------------------------------------------------------------------


KILLING = """
import gc, os, signal, sys, warnings
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_faults as faults
from memo.config import configure

def in_a_child(work):
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
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
        else:
            world.call()

def judge(directory, phase):
    faults.judge(Path(directory), phase)

directory, phase, step, after = sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5] == "after"
killed, number = 0, 1 + (step // 2 if after else 0)
while True:
    place = f"{directory}/{number}"
    if phase != "first":
        assert in_a_child(lambda: work(place, 0, phase, after)) == 0
    status = in_a_child(lambda: work(place, number, phase, after))
    assert in_a_child(lambda: judge(place, phase)) == 0, f"killed at operation {number}"
    if status == 0:
        break
    assert os.WTERMSIG(status) == signal.SIGKILL
    killed += 1
    number += step
print(killed)
"""


def judge(directory: Path, phase: str) -> None:
    """See, in a fresh process, that a killed store left the old or the new, and nothing else."""
    world = World(False, use_lock=True)
    with configure(directory=directory, tiers=["memory", "disk"]):
        begun = time.monotonic()
        world.epoch = 3
        answer = world.call()
        allowed = {"refresh": {1, 2}, "clear": {1, 3}, "first": {2, 3}}[phase]
        assert answer in allowed, f"epoch {answer} after {phase}"
        assert time.monotonic() - begun < 2, "a dead process' lock was waited for"
        assert world.call() == answer
        assert world.ran <= 1
        assert world.function.refresh(7)["epoch"] == 3
        tier: Any = default_chain().tiers[-1]
        drive(tier.sweep(BLOCKING))
        home = directory / "memo"
        left = {p.name for p in (home / "payloads").rglob("*") if p.is_file()}
        kinds = sorted(("." in name, name.rpartition(".")[2] in ("tmp", "rec")) for name in left)
        assert kinds == [(False, False), (True, False)], f"left behind: {sorted(left)}"
        assert list((home / "locks").iterdir()) == []
        for path in ("host.sqlite", "entries/cache.db"):
            with sqlite3.connect(home / path) as connection:
                assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            connection.close()


@pytest.mark.parametrize(
    ("phase", "step"), [("first", 14), ("refresh", 7), ("clear", 11)], ids=["first", "refresh", "clear"]
)
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.timeout(600 if LONG else 120)
def test_a_kill_at_any_operation_leaves_old_or_new(
    tmp_path: Path, phase: str, step: int, when: str
) -> None:
    """SIGKILL before or after any operation: the next process finds old or new, whole, no rest."""
    tests = Path(__file__).parent
    killed = run(KILLING, tests, tmp_path, phase, 1 if LONG else step, when)
    assert int(killed) > 3
