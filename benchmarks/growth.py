"""How costs grow: the same work at two sizes, in one run: `python -m benchmarks growth`.

Prints the table of "How costs grow" in `docs/performance.md`, and with `--write` puts its rows in
the place of those there; takes minutes, and more on a busy machine.  `--only TEXT` chooses rows by
their titles.  A row that fails or takes too long says so, and the others go on.  The rows with
Redis need `redis-server` on the path, those with a full disk need root, to mount a small file
system; where that cannot be they say so.  `--quick` takes smaller sizes: for a look at whether
everything runs.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import importlib
import itertools
import multiprocessing
import os
import shutil
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import memo
from benchmarks.machine import ROOT
from memo.decorators import assembly

SECRET = "growth" * 6
MODULE = 100
"""Functions of a module that is made for a row of many functions."""
MIB = 1 << 20
PATIENCE = 300.0
"""Seconds that one size of a row may take."""
PAGE = ROOT / "docs" / "performance.md"
SECTION = "## How costs grow\n"


class NotHereError(Exception):
    """A row needs something that this machine lacks; the text names it."""


class Row(NamedTuple):
    """Work at two sizes.

    Attributes:
        title: of the work.
        sizes: the small and the large one.
        goal: in words.
        measure: what the work takes at a size: seconds, or what `unit` says.
        unit: that the figures are shown in.
        holds: whether the goal is reached, by the two figures and their sizes.
    """

    title: str
    sizes: tuple[int, int]
    goal: str
    measure: Callable[[int], float]
    holds: Callable[[float, float], bool]
    unit: str = "ms"


def _timed(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def _median(work: Callable[[], object], rounds: int) -> float:
    return statistics.median(_timed(work) for _ in range(rounds))


# --- invalidations, functions, tags ---------------------------------------------------------------


def _addresses(count: int) -> float:
    """Time an `invalidate_cache` that names `count` addresses; the median of three."""
    start = itertools.count(0, 10_000)

    @memo.invalidate_cache(
        key_prefix="growth",
        key_resolver=lambda result, first: [f"growth:{first + x}" for x in range(count)],
    )
    def update(first: int) -> None:
        """Change products."""

    def once() -> float:
        memo.invalidate(prefix="growth")
        return _timed(lambda: update(next(start)))

    return statistics.median(once() for _ in range(3))


def _functions(count: int) -> float:
    """Time the first call of the last functions of a module with `count` of them; median of 50."""
    name = f"growth_{count}"
    lines = [f"@memo.cache(ttl=600)\ndef f{n}(x):\n    return x + {n}" for n in range(count)]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, f"{name}.py").write_text("import memo\n" + "\n".join(lines))
        sys.path.insert(0, folder)
        module: Any = importlib.import_module(name)
        sys.path.remove(folder)
        taken = [_timed(lambda n=n: getattr(module, f"f{n}")(1)) for n in range(count)]
    return statistics.median(taken[-50:])


def _lag(count: int) -> float:
    """Return the longest pause of an event loop while first calls of functions are gathered.

    Without the garbage collector, which takes a tenth of a second by itself among so much code.
    """
    functions: list[Any] = []
    with tempfile.TemporaryDirectory() as folder:
        sys.path.insert(0, folder)
        for first in range(0, count, MODULE):
            name = f"growth_lag_{count}_{first}"
            lines = [
                f"@memo.cache(ttl=600)\nasync def f{n}(x):\n    return x + {first + n}"
                for n in range(MODULE)
            ]
            Path(folder, f"{name}.py").write_text("import memo\n" + "\n".join(lines))
            module = importlib.import_module(name)
            functions += [getattr(module, f"f{n}") for n in range(MODULE)]
        sys.path.remove(folder)
        gc.collect()
        gc.disable()
        try:
            return asyncio.run(_longest_step(functions))
        finally:
            gc.enable()


async def _longest_step(functions: Sequence[Any]) -> float:
    late, over = [0.0], asyncio.Event()

    async def tick() -> None:
        while not over.is_set():
            begun = time.perf_counter()
            await asyncio.sleep(0.001)
            late.append(time.perf_counter() - begun - 0.001)

    await functions[0](0)  # imports are no part of it
    ticking = asyncio.create_task(tick())
    await asyncio.gather(*(function(1) for function in functions))
    over.set()
    await ticking
    return max(late)


def _tags(count: int) -> float:
    """Time a hit on an entry with `count` tags; the median of 200."""
    names = [f"tag-{count}-{n}" for n in range(count)]

    @memo.cache(ttl=600, tags=names, name=f"tagged_{count}")
    def load(x: int) -> int:
        return x

    load(1)
    return _median(lambda: load(1), 200)


def _attributes(count: int) -> float:
    """Time a hit on a method that reads `count` attributes; the fastest batch of 20 calls."""
    values = [n if n % 3 == 0 else f"text {n}" if n % 3 == 1 else n + 0.5 for n in range(count)]
    names = [f"a{n}" for n in range(count)]
    reads = ", ".join(f"self.{name}" for name in names)
    namespace: dict[str, Any] = {"memo": memo, "__name__": "growth_methods"}
    exec(  # noqa: S102 - a class with so many attributes has to be written
        f"class Client:\n    @memo.cache(ttl=600, name='reads_{count}')\n"
        f"    def load(self, x):\n        return [x, {reads}]\n",
        namespace,
    )
    client = namespace["Client"]()
    vars(client).update(zip(names, values, strict=True))

    def batch() -> None:
        for _ in range(20):
            client.load(1)

    batch()
    return min(_timed(batch) for _ in range(1000)) / 20


# --- nesting --------------------------------------------------------------------------------------


def _nested(depth: int) -> Callable[[int], object]:
    """Make a chain of `depth` cached functions, each of which calls the next."""

    def step(x: int, rest: tuple[Any, ...]) -> int:
        return rest[0](x, rest[1:]) + 1 if rest else x

    steps = tuple(
        memo.cache(step, name=f"step_{depth}_{number}", ignore=["rest"], ttl=600)
        for number in range(depth)
    )
    return lambda x: steps[0](x, steps[1:])


def _nesting(depth: int) -> float:
    """CPU time of a call nested that deep, stored at each level; the least of nine."""
    call, arguments = _nested(depth), itertools.count()
    call(next(arguments))

    def worked() -> float:
        begun = time.thread_time()
        call(next(arguments))
        return time.thread_time() - begun

    return min(worked() for _ in range(9))


def _nested_hit(depth: int) -> float:
    """Time a hit on the outermost of `depth` nested calls; the median of 50."""
    call = _nested(depth)
    call(1)
    return _median(lambda: call(1), 50)


def _nested_record(depth: int) -> float:
    """Bytes of the record of the outermost of `depth` nested calls."""
    with _elsewhere():
        _nested(depth)(1)
        return float(max(entry.size for entry in memo.entries()))


@contextmanager
def _elsewhere(**settings: Any) -> Iterator[str]:
    """Use an empty directory."""
    with (
        tempfile.TemporaryDirectory() as folder,
        memo.configure(directory=folder, secret=SECRET, **settings),
    ):
        yield folder


# --- many entries ---------------------------------------------------------------------------------

_COLUMNS = (
    "store_time, expire_time, access_time, access_count, tag, size, mode, filename, value, raw"
)
_FILL = (
    f"INSERT INTO Cache (key, {_COLUMNS})"  # noqa: S608 - constants
    " WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?)"
    f" SELECT substr(key, 1, length(key) - 32) || lower(hex(randomblob(16))), {_COLUMNS}"
    " FROM n, (SELECT * FROM Cache LIMIT 1)"
)


@contextmanager
def _many(count: int, real: int = 100, **settings: Any) -> Iterator[Any]:
    """Make a function with `count` entries on the disk, some of them real, in a warm process."""

    def load(x: int) -> dict[str, Any]:
        return {"id": x, "name": f"n{x}", "tags": ["a", "b"]}

    with _elsewhere(tiers=["disk"], **settings) as folder:
        function = memo.cache(load, name="many", ttl=3600)
        function(-1)
        [index] = Path(folder).rglob("cache.db")
        with closing(sqlite3.connect(index)) as connection:
            with connection:
                connection.execute(_FILL, (count - real,))
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        for x in range(real):
            function(x)
        yield function


def _listing(count: int) -> float:
    """Time `memo ls` among `count` entries; the median of five."""
    from memo.inspection import inventory

    with _many(count):
        return _median(lambda: inventory.items(inventory.Selection(), 50), 5)


def _clearing(count: int) -> float:
    """Seconds per entry that `cache_clear` drops, of `count`."""
    with _many(count) as function:
        return _timed(function.cache_clear) / count


def _holding(count: int) -> float:
    """Longest wait of another thread for the index while `count` entries are cleared."""
    from memo.stores.disk.disk_tier import Disk

    taken: list[float] = []
    write = Disk.write

    def timed(disk: Disk, work: Callable[[Any], Any]) -> Any:
        begun = time.perf_counter()
        done = write(disk, work)
        taken.append(time.perf_counter() - begun)
        return done

    with _many(count) as function:
        Disk.write = timed  # type: ignore[method-assign]
        try:
            function.cache_clear()
        finally:
            Disk.write = write  # type: ignore[method-assign]
    return max(taken)


def _whole(count: int) -> float:
    """Time the invalidation of a whole function with `count` entries; the median of 20."""
    with _many(count) as function:
        return _median(function.invalidate, 20)


def _among(count: int) -> float:
    """Time a hit among `count` entries on the disk; the median of the 100 that are real."""
    with _many(count) as function:
        return statistics.median(_timed(lambda x=x: function(x)) for x in range(100))


def _beside_diskcache(count: int) -> float:
    """Time a hit among `count` entries on the disk, as a multiple of `diskcache.Cache.get`."""
    import diskcache

    value = {"id": 1, "name": "n1", "tags": ["a", "b"]}
    with (
        _many(count) as function,
        tempfile.TemporaryDirectory() as folder,
        closing(diskcache.Cache(folder, size_limit=1 << 34)) as other,
    ):
        with other.transact():
            for x in range(count):
                other.set(x, value, expire=3600)
        places = range(0, count, max(1, count // 100))
        pairs = [
            (_timed(lambda x=x: function(x)), _timed(lambda p=p: other.get(p)))
            for _ in range(5)
            for x, p in zip(range(100), places, strict=False)
        ]
    return statistics.median(a for a, _ in pairs) / statistics.median(b for _, b in pairs)


def _storing(count: int) -> float:
    """Time a call that stores a small result, as a multiple of `diskcache.Cache.set`."""
    import diskcache

    value = {"id": 1, "name": "n1", "tags": ["a", "b"]}
    with _elsewhere(tiers=["disk"]) as folder:
        load = memo.cache(lambda x: dict(value), name="stored", ttl=600)
        with closing(diskcache.Cache(f"{folder}/other")) as other:
            for x in range(100):
                load(-x), other.set(-x, value, expire=600)
            pairs = [
                (
                    _timed(lambda x=x: load(x)),
                    _timed(lambda x=x: other.set(x, value, expire=600)),
                )
                for x in range(1, count)
            ]
    return statistics.median(a for a, _ in pairs) / statistics.median(b for _, b in pairs)


# --- Redis ----------------------------------------------------------------------------------------


@contextmanager
def _redis(*more: str, **settings: Any) -> Iterator[Any]:
    """Start a server and configure memo to use it; yield a client of it."""
    import redis

    program = shutil.which("redis-server")
    if program is None:
        raise FileNotFoundError("redis-server: apt install redis-server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [program, "--port", str(port), "--save", "", "--appendonly", "no", *more]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        client = redis.Redis(port=port)
        for _ in range(200):
            try:
                client.ping()
                break
            except redis.ConnectionError:
                time.sleep(0.05)
        with _elsewhere(redis_url=f"redis://127.0.0.1:{port}/0", deadline=5.0, **settings):
            yield client
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(10)


def _left(client: Any) -> float:
    """Longest remaining life of a key in Redis, in seconds; infinity: one never expires."""
    lives = [client.pttl(name) for name in client.scan_iter(count=1000)]
    return float("inf") if -1 in lives else max(lives, default=0) / 1000


def _addresses_in_redis(count: int) -> float:
    """Longest life of a key in Redis after `count` updates of different products."""
    with _redis() as client:

        @memo.invalidate_cache(key_prefix="products", key_resolver="products:{product}")
        def update(product: int) -> None:
            """Change a product."""

        for product in range(count):
            update(product)
        return _left(client)


def _groups_left(count: int) -> float:
    """Groups in Redis and on the host after `count` updates and `memo clear --all`."""
    from memo.runtime.blocking import BLOCKING, drive

    with _redis() as client:

        @memo.invalidate_cache(key_prefix="products", key_resolver="products:{product}")
        def update(product: int) -> None:
            """Change a product."""

        for product in range(count):
            update(product)
        chain = memo.CacheFallbackFactory.create()
        drive(chain.clear(BLOCKING))
        names = list(client.scan_iter(b"*:g:*", count=1000))
        assert chain.host is not None
        here = chain.host.generations.all_groups()
        return float(sum(not name.endswith(b"{n}") for name in names) + len(set(here) - {"n"}))


def _tags_in_redis(count: int) -> float:
    """Seconds from the end of a ttl of 2 s until the last of `count` tags is gone from Redis."""
    with _redis() as client:
        load = memo.cache(lambda user: user, name="user", ttl=2, tags=["user:{user}"])
        for user in range(count):
            load(user)
        tags = [name for name in client.scan_iter(b"*:g:*", count=1000) if b"{t:user" in name]
        lives = [client.pttl(name) for name in tags]
        return float("inf") if -1 in lives else max(lives) / 1000 - 2


def _full_redis(count: int) -> float:
    """Fraction of repeated calls that hit, on a Redis of 4 MB that `count` tags have filled."""
    policy = ("--maxmemory", "4mb", "--maxmemory-policy", "volatile-lru")
    with _redis(*policy, memory_limit=0, tiers=["redis"]):
        for at in range(0, count, 500):
            tags = [f"user:{user}" for user in range(at, at + 500)]
            memo.invalidate_cache(tags=tags)(lambda: None)()
        load = memo.cache(lambda x: x, name="full", ttl=600, tags=["a"])
        hits = 0
        for x in range(400):
            load(x)
            before = load.cache_info().hits
            load(x)
            hits += load.cache_info().hits - before
        return hits / 400


def _kept_in_redis(count: int) -> float:
    """Longest life of a key in Redis after `count` results without a ttl, in seconds.

    Records live for `retention`, 30 days; the generations that they name a tenth longer.
    """
    with _redis() as client:
        load = memo.cache(lambda x: x, name="kept", ttl=None)
        for x in range(count):
            load(x)
        assert client.dbsize() >= count
        return _left(client)


def _gathered(count: int) -> float:
    """Seconds per hit of `count` hits in one gather, from Redis; the fastest of five."""
    with _redis(memory_limit=0, tiers=["redis"]):

        @memo.cache(name="gathered", ttl=600)
        async def load(x: int) -> int:
            return x

        async def run() -> float:
            await asyncio.gather(*(load(x) for x in range(count)))
            taken = []
            for _ in range(5):
                begun = time.perf_counter()
                await asyncio.gather(*(load(x) for x in range(count)))
                taken.append(time.perf_counter() - begun)
            return min(taken) / count

        return asyncio.run(run())


def _each(work: str, redis: bool, count: int) -> float:
    """Seconds per element of one call with `count` elements; the median of five.

    Args:
        work: `"store"`: computed and stored; `"hit"`: found.
        redis: on Redis over the disk, else on the disk alone.
    """
    with _redis(memory_limit=0) if redis else _elsewhere(memory_limit=0):

        @memo.cache(name=f"each_{work}_{count}", ttl=600, each="ids")
        def load(ids: Sequence[int]) -> list[int]:
            return [one + 1 for one in ids]

        load([-1])
        taken = []
        for turn in range(5):
            wanted = range(turn * count, (turn + 1) * count)
            if work == "hit":
                load(wanted)
            taken.append(_timed(lambda wanted=wanted: load(wanted)))
        return statistics.median(taken) / count


def _evicting(count: int) -> float:
    """Longest of 700 stores into a budget that `count` entries slightly exceed."""
    with _many(count, real=0, size_limit=count * 900) as function:
        assembly.reset()  # as a process that finds a directory beyond its limit
        function.is_cached(-1)
        return max(_timed(lambda x=x: function(x)) for x in range(700))


def _first_call(count: int) -> float:
    """Seconds from `import memo` to the first answer of a new process, with `count` entries."""
    with _many(count):
        folder = str(memo.CacheFallbackFactory.create().tiers[-1].directory.parent)
        kept = {k: v for k, v in os.environ.items() if not k.startswith("MEMO_")}
        kept |= {"PYTHONPATH": str(ROOT), "MEMO_DIRECTORY": folder, "MEMO_SECRET": SECRET}
        command = [sys.executable, "-c", _FIRST]
        found = [
            float(subprocess.run(command, env=kept, capture_output=True, check=True).stdout)
            for _ in range(5)
        ]
    return statistics.median(found)


_FIRST = """
import time
begun = time.perf_counter()
import memo
memo.cache(lambda x: x, name="first", ttl=60)(1)
print(time.perf_counter() - begun)
"""


# --- space ----------------------------------------------------------------------------------------


def _grown(limit: int) -> float:
    """Growth of a process that fills `memory_limit` (MiB), as a multiple of the limit."""
    command = [sys.executable, "-c", _GROWN, str(limit << 20)]
    kept = {k: v for k, v in os.environ.items() if not k.startswith("MEMO_")}
    done = subprocess.run(
        command, env={**kept, "PYTHONPATH": str(ROOT)}, capture_output=True, check=True
    )
    return float(done.stdout)


_GROWN = """
import sys, tempfile
import memo

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

limit = int(sys.argv[1])
with tempfile.TemporaryDirectory() as folder, memo.configure(
    directory=folder, secret="x" * 40, memory_limit=limit
):
    load = memo.cache(lambda x: {"id": x, "name": f"n{x}", "tags": ["a"]}, name="load", ttl=3600)
    for x in range(200):
        load(-x)
    before = resident()
    for x in range(limit // 1000):
        load(x)
        load(x)
    print((resident() - before) / limit)
"""


def _directory(limit: int) -> float:
    """Size of a directory whose `size_limit` (MiB) is used up, as a multiple of the limit."""
    most = 0
    with _elsewhere(size_limit=limit << 20, memory_limit=0) as folder:
        load = memo.cache(lambda x: os.urandom(2000), name="load")
        for x in range(limit * 500):
            load(x)
            if x % 500 == 0:
                files = [path for path in Path(folder).rglob("*") if path.is_file()]
                most = max(most, sum(path.stat().st_size for path in files))
    return most / (limit << 20)


def _after_kills(count: int) -> float:
    """Size of the same directory, full, after `count` processes were killed in mid-store."""
    from memo.runtime.blocking import drain_blocking
    from memo.stores.disk.disk_tier import EARLY_SWEEP_SECONDS

    limit = 20 * MIB
    with _elsewhere(size_limit=limit, memory_limit=0) as folder:
        load = memo.cache(lambda x: os.urandom(MIB), name="load")
        for x in range(30):
            load(x)
        kept = {k: v for k, v in os.environ.items() if not k.startswith("MEMO_")}
        kept |= {"PYTHONPATH": str(ROOT), "MEMO_DIRECTORY": folder, "MEMO_SECRET": SECRET}
        kept["MEMO_SIZE_LIMIT"] = str(limit)
        for _ in range(count):
            done = subprocess.run([sys.executable, "-c", _KILLED], env=kept, check=False)
            assert done.returncode == -signal.SIGKILL
        time.sleep(EARLY_SWEEP_SECONDS)  # the killed ones have looked too, each once a second
        load(100)
        drain_blocking()
        files = {path.stat().st_ino: path for path in Path(folder).rglob("*") if path.is_file()}
        return sum(path.stat().st_size for path in files.values()) / limit


_KILLED = """
import os, signal
import memo
from memo.stores.disk.index import Index

Index.put_rows = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
memo.cache(lambda x: os.urandom(1 << 20), name="load")(os.getpid())
"""


def _log(count: int) -> float:
    """Longest log of a SQLite file, in MiB, while four threads store `count` results."""
    most = 0
    with _elsewhere(memory_limit=0) as folder:
        load = memo.cache(lambda x: os.urandom(2000), name="load", ttl=600, tags=["user:{x}"])
        with ThreadPoolExecutor(4) as pool:
            for at in range(0, count, 100):
                list(pool.map(load, range(at, at + 100)))
                logs = [path.stat().st_size for path in Path(folder).rglob("*-wal")]
                most = max(most, *logs)
    return most / MIB


@contextmanager
def _small_disk(size: int) -> Iterator[str]:
    """Mount a file system of `size` MiB; yield a directory on it.

    Raises:
        NotHereError: none can be mounted.
    """
    if os.geteuid():
        raise NotHereError("it takes root to mount a small file system")
    with tempfile.TemporaryDirectory() as folder:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}m,mode=700", "tmpfs", folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise NotHereError(done.stderr.strip())
        try:
            with memo.configure(
                directory=f"{folder}/cache",
                secret=SECRET,
                size_limit=1 << 30,
                memory_limit=0,
            ):
                yield folder
        finally:
            command = ["umount", "-l", folder]
            subprocess.run(command, check=True)


def _on_a_full_disk(size: int) -> float:
    """Fraction of the results still stored after writing three times what fits."""
    with _small_disk(size):
        load = memo.cache(lambda x: os.urandom(200_000), name="blob", ttl=3600)
        count = 15 * size
        found = 0
        for x in range(count):
            load(x)
            found += load.is_cached(x)
        return found / count


def _said_of_a_full_disk(size: int) -> float:
    """Warnings while others fill the disk repeatedly and no entry is left to evict."""
    with _small_disk(size) as folder, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        load = memo.cache(lambda x: os.urandom(200_000), name="blob", ttl=3600)
        load(0)
        for x in range(1, 30):
            with suppress(OSError), open(f"{folder}/filler", "ab", buffering=0) as filler:
                while True:
                    filler.write(bytes(4096))
            assert len(load(x)) == 200_000
        return float(sum("is full" in str(one.message) for one in said))


# --- big globals ----------------------------------------------------------------------------------


class _Unit:
    def __init__(self, number: int) -> None:
        self.number = number


class _Registry:
    def __init__(self, size: int) -> None:
        self.units = {f"unit{n}": _Unit(n) for n in range(size)}


_registry = _Registry(0)


def _big_global(size: int) -> float:
    """Time a hit of a function that reads a global made of `size` objects; the median of 9.

    Infinite if that takes more than its goal and no warning names the global.
    """
    global _registry
    _registry = _Registry(size)
    convert = memo.cache(lambda x: len(_registry.units) + x, name=f"convert_{size}", ttl=600)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        convert(1)
        taken = _median(lambda: convert(1), 9)
    named = any('ignore=["global:_registry"]' in str(one.message) for one in said)
    return taken if named or taken <= 0.0001 else float("inf")


def _flat(goal: float, ratio: float = 2.0) -> Callable[[float, float], bool]:
    return lambda small, large: large <= max(goal, 0.0) or (goal == 0 and large <= ratio * small)


ROWS = (
    Row(
        "`invalidate_cache` that names addresses", (500, 2000), "linear, 300 ms", _addresses,
        lambda small, large: large <= 0.3 and large <= 8 * small,
    ),
    Row(
        "first call of the last of so many functions", (1000, 5000), "flat, 4 ms", _functions,
        _flat(0.004),
    ),
    Row(
        "the loop stands still while so many first calls are gathered", (1000, 5000), "50 ms",
        _lag, _flat(0.05),
    ),
    Row("hit on an entry with so many tags, memory", (10, 1000), "1 ms", _tags, _flat(0.001)),
    Row(
        "hit on a method that reads so many attributes", (1, 17), "1 µs for each", _attributes,
        lambda small, large: large - small <= 16e-6, "µs",
    ),
    Row(
        "calls nested so deep, computed and stored: CPU", (50, 200), "linear", _nesting,
        lambda small, large: large <= 6 * small,
    ),
    Row("hit on the outermost of them", (50, 200), "0.5 ms", _nested_hit, _flat(0.0005)),
    Row(
        "record of the outermost of them", (50, 200), "8 KiB", _nested_record, _flat(8192), "bytes"
    ),
    Row("`memo ls` among so many entries", (20_000, 150_000), "300 ms", _listing, _flat(0.3)),
    Row(
        "`cache_clear` of so many, for each entry", (20_000, 150_000), "20 µs", _clearing,
        _flat(20e-6), "µs",
    ),
    Row(
        "the longest that it holds the lock", (20_000, 150_000), "50 ms", _holding,
        _flat(0.05),
    ),
    Row(
        "invalidation of a whole function", (1000, 150_000), "flat", _whole,
        lambda small, large: large <= 2 * small,
    ),
    Row(
        "`import memo` to the first answer", (1000, 150_000), "flat", _first_call,
        lambda small, large: large <= 1.3 * small,
    ),
    Row(
        "hit among so many on the disk", (1000, 200_000), "flat", _among,
        lambda small, large: large <= 2 * small, "µs",
    ),
    Row(
        "the same as a multiple of diskcache's `get`", (1000, 200_000), "1.0", _beside_diskcache,
        _flat(1.0), "times",
    ),
    Row(
        "small result computed and stored, of diskcache's `set`", (200, 1000), "1.5", _storing,
        _flat(1.5), "times",
    ),
    Row(
        "the longest of 700 stores that evict", (5000, 150_000), "50 ms", _evicting, _flat(0.05)
    ),
    Row(
        "growth of a process / `memory_limit` of MiB", (8, 64), "1.3", _grown, _flat(1.3), "times"
    ),
    Row("directory / `size_limit` of MiB", (10, 40), "1.1", _directory, _flat(1.1), "times"),
    Row(
        "the same of 20 MiB after so many kills in mid-store", (2, 8), "1.1", _after_kills,
        _flat(1.1), "times",
    ),
    Row(
        "log of a file of SQLite after so many stores", (2000, 10_000), "4 MiB", _log,
        _flat(4.0), "MiB",
    ),
    Row(
        "calls that are stored on a disk of MiB that is full", (8, 32), "100 %", _on_a_full_disk,
        lambda small, large: small == large == 1, "%",
    ),
    Row(
        "warnings where others fill a disk of MiB", (8, 32), "1", _said_of_a_full_disk,
        lambda small, large: small == large == 1, "warnings",
    ),
    Row(
        "hit that reads a global of so many objects", (100, 5000),
        "0.1 ms, or a warning that names it", _big_global,
        lambda small, large: large < float("inf"),
    ),
    Row(
        "longest life of a key in Redis after so many updates", (500, 5000), "30 days",
        _addresses_in_redis, _flat(30.1 * 86_400), "s",
    ),
    Row(
        "the same of so many results without a ttl", (100, 1000), "33 days", _kept_in_redis,
        _flat(33.1 * 86_400), "s",
    ),
    Row(
        "groups that `memo clear --all` leaves of so many updates", (500, 5000), "0", _groups_left,
        lambda small, large: small == large == 0, "groups",
    ),
    Row(
        "each of so many tags in Redis after the last ttl", (500, 5000), "60 s", _tags_in_redis,
        _flat(60), "s",
    ),
    Row(
        "hits on a Redis of 4 MB after so many tags", (1000, 30_000), "90 %", _full_redis,
        lambda small, large: 0.9 <= large <= 1, "%",
    ),
    Row(
        "each of so many hits in one gather, Redis", (100, 1000), "20 µs", _gathered,
        _flat(20e-6), "µs",
    ),
    *(
        Row(
            f"each of so many elements of one `each` call {does}, {place}", (100, 1000), "flat",
            partial(_each, work, redis), _flat(0), "µs",
        )
        for work, does in (("store", "computed and stored"), ("hit", "found"))
        for redis, place in ((False, "disk"), (True, "Redis over disk"))
    ),
)  # fmt: skip
_SCALE = {"ms": 1e3, "µs": 1e6, "%": 100.0}
_WHOLE = ("bytes", "groups", "s", "warnings")
"""Units of which there are no parts."""


def lines(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the rows as a Markdown table; each is measured when it is requested."""
    yield "| what | sizes | takes | ratio | goal | reached |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for row in rows:
        sizes = " / ".join(f"{size:,}" for size in row.sizes)
        try:
            small, large = (row.measure(size) for size in row.sizes)
        except NotHereError as error:
            yield f"| {row.title} | {sizes} | not measured: {error} | | {row.goal} | |"
            continue
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            yield f"| {row.title} | {sizes} | {said} | | {row.goal} | **no** |"
            continue
        scale = _SCALE.get(row.unit, 1.0)
        digits = 0 if row.unit in _WHOLE else 2
        takes = f"{small * scale:,.{digits}f} / {large * scale:,.{digits}f} {row.unit}"
        reached = "yes" if row.holds(small, large) else "**no**"
        ratio = f"{large / small:.1f}" if small else ""
        yield f"| {row.title} | {sizes} | {takes} | {ratio} | {row.goal} | {reached} |"


def main(arguments: Sequence[str]) -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(prog="python -m benchmarks growth", description=__doc__)
    options.add_argument("--only", default="", help="rows whose titles have this text")
    options.add_argument("--quick", action="store_true", help="smaller sizes")
    options.add_argument("--write", action="store_true", help="put the rows into the page")
    given = options.parse_args(arguments)
    rows = [row for row in ROWS if given.only in row.title]
    if given.quick:
        rows = [quicker(row) for row in rows]
    begun = time.monotonic()
    for line in lines([row._replace(measure=partial(_apart, row.title)) for row in rows]):
        print(line, flush=True)
        print(f"  {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
        if given.write:
            PAGE.write_text(with_row(PAGE.read_text("utf-8"), line), "utf-8")


def with_row(page: str, line: str) -> str:
    """Return the page with a row of the table replaced, found by its title."""
    before, _, rest = page.partition(SECTION)
    section, heading, after = rest.partition("\n## ")
    title = line.partition(" | ")[0] + " | "
    rows = [line if old.startswith(title) else old for old in section.split("\n")]
    return before + SECTION + "\n".join(rows) + heading + after


def _apart(title: str, size: int) -> float:
    """Measure a row in a separate process, so that other rows leave nothing behind for it.

    Raises:
        TimeoutError: it takes more than `PATIENCE` seconds.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        try:
            return pool.apply_async(_measured, (title, size)).get(PATIENCE)
        except multiprocessing.TimeoutError:
            raise TimeoutError(f"more than {PATIENCE:.0f} s") from None


def _measured(title: str, size: int) -> float:
    warnings.simplefilter("ignore")  # an update of what was never computed matches nothing
    [row] = [row for row in ROWS if row.title == title]
    with _elsewhere():
        return row.measure(size)


def quicker(row: Row) -> Row:
    """Return the row with smaller sizes."""
    small, large = row.sizes
    return row._replace(sizes=(small, max(2 * small, large // 10)))
