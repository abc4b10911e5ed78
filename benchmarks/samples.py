"""One sample: a fresh process that measures and prints JSON.  Run by `benchmarks.machine`.

Each function below is a *measure*: it gets a `Task` and gives figures; seconds, but for those whose
names say bytes or a number.  A measure whose name begins with `store_` leaves entries behind for
the processes that hit them.
"""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import random
import statistics
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import work
from benchmarks.peers import Place, decorated, is_async

ARGUMENTS = (7, "Ada")
CONCURRENT = 1000
THREADS = 16
ALONE = ("hit_record", "hit_all", "store_all")
"""Measures of one thread that does not wait for another process."""


class Task(NamedTuple):
    """A task for one sample.

    Attributes:
        measure: the name of a function here.
        subject: a name of `benchmarks.peers`, or the name of a floor.
        place: the place of its entries.
        kind: of value, for `benchmarks.work.make`.
        size: bytes of the value, or number of entries.
        seconds: for how long.
    """

    measure: str
    subject: str
    place: Place
    kind: str = ""
    size: int = 0
    seconds: float = 0.5


Figures = dict[str, float]


# --- how time is taken ---------------------------------------------------------------------------


def per_call(call: Callable[[], Any], seconds: float, batch: int = 0) -> float:
    """Seconds that one call takes: the median of batches of about 10 ms, or of single calls."""
    call()
    begun = time.perf_counter()
    call()
    once = time.perf_counter() - begun
    batch = batch or max(1, int(0.01 / max(once, 1e-7)))
    taken = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(taken) < 3:
        begun = time.perf_counter()
        for _ in range(batch):
            call()
        taken.append((time.perf_counter() - begun) / batch)
    return statistics.median(taken)


async def per_await(call: Callable[[], Awaitable[Any]], seconds: float, batch: int = 0) -> float:
    """As `per_call`, for a coroutine function."""
    await call()
    begun = time.perf_counter()
    await call()
    once = time.perf_counter() - begun
    batch = batch or max(1, int(0.01 / max(once, 1e-7)))
    taken = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(taken) < 3:
        begun = time.perf_counter()
        for _ in range(batch):
            await call()
        taken.append((time.perf_counter() - begun) / batch)
    return statistics.median(taken)


def take_the_quietest_core() -> None:
    """Stay on the core that is fastest now; one whose sibling is busy is half as fast."""
    if not hasattr(os, "sched_setaffinity"):
        return
    taken = {}
    for core in os.sched_getaffinity(0):
        os.sched_setaffinity(0, {core})
        taken[core] = min(_spin() for _ in range(5))
    os.sched_setaffinity(0, {min(taken, key=lambda core: taken[core])})


def _spin() -> float:
    begun = time.perf_counter()
    for _ in range(40_000):
        pass
    return time.perf_counter() - begun


@lru_cache(maxsize=1)
def loop() -> asyncio.Runner:
    """Return the sample's only event loop: clients belong to the loop that made them."""
    return asyncio.Runner()


def timed(task: Task, function: Any, *arguments: Any, batch: int = 0) -> float:
    """Seconds of one hit, awaited if the subject is async.

    Raises:
        RuntimeError: it was computed again, so it was no hit.
    """
    if is_async(task.subject):
        taken = loop().run(per_await(lambda: function(*arguments), task.seconds, batch))
    else:
        taken = per_call(lambda: function(*arguments), task.seconds, batch)
    in_memory = task.measure == "hit_record" and not os.path.exists(marker(task))
    return only_hits(task, taken, allowed=int(in_memory))


def marker(task: Task) -> str:
    """Return the marker of the storing process: later processes fail if they miss."""
    return f"{task.place.directory}/stored"


def only_hits(task: Task, taken: float, allowed: int = 0) -> float:
    """Return a figure if nothing was computed but what was allowed.

    Raises:
        RuntimeError: it was computed again, so it was no hit.
    """
    if len(work.COMPUTED) > allowed:
        raise RuntimeError(f"{task.subject}: no hits, computed {len(work.COMPUTED)} times")
    return taken


def once(task: Task, function: Any, *arguments: Any) -> float:
    """Seconds of a single call."""
    if not is_async(task.subject):
        begun = time.perf_counter()
        function(*arguments)
        return time.perf_counter() - begun

    async def run() -> float:
        begun = time.perf_counter()
        await function(*arguments)
        return time.perf_counter() - begun

    return loop().run(run())


def resident(kind: str) -> int:
    """Bytes of resident memory: `"VmRSS"` now, `"VmHWM"` the most since `forget_peak`."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) for line in lines if line.startswith(kind)) * 1024


def forget_peak() -> int:
    """Start measuring the peak of resident memory; return the bytes resident now."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return 0
    return resident("VmRSS")


# --- small values --------------------------------------------------------------------------------


def records(task: Task) -> Any:
    """Return the cached function of small values."""
    return decorated(task.subject, task.place, work.record, work.arecord)


def store_record(task: Task) -> Figures:
    """Store the dict of five fields."""
    if task.subject == "open + read + loads":
        Path(task.place.directory, "record").write_bytes(pickle.dumps(work.record(*ARGUMENTS)))
    elif task.subject.startswith("redis-py GET") or task.subject.startswith("redis.asyncio"):
        import redis

        redis.Redis(port=task.place.port).set("record", pickle.dumps(work.record(*ARGUMENTS)))
    else:
        once(task, records(task), *ARGUMENTS)
    return {}


def hit_record(task: Task) -> Figures:
    """Time a hit on the dict of five fields."""
    if task.subject == "open + read + loads":
        path = Path(task.place.directory, "record")

        def load() -> Any:
            with open(path, "rb", buffering=0) as file:
                return pickle.loads(file.read())

        return {"value": per_call(load, task.seconds)}
    if task.subject == "redis-py GET":
        import redis

        client = redis.Redis(port=task.place.port)
        return {"value": per_call(lambda: client.get("record"), task.seconds)}
    if task.subject == "redis.asyncio GET":
        return {"value": asyncio.run(_get_awaited(task))}
    return {"value": timed(task, records(task), *ARGUMENTS)}


def hit_threads(task: Task) -> Figures:
    """Time hits of 16 threads at once: seconds from one answer to the next."""
    if task.subject == "redis-py GET":
        import redis

        client = redis.Redis(port=task.place.port)
        return {"value": per_answer(lambda: client.get("record"), task.seconds)}
    function = records(task)
    return {"value": only_hits(task, per_answer(lambda: function(*ARGUMENTS), task.seconds))}


def per_answer(call: Callable[[], Any], seconds: float) -> float:
    """Seconds from one answer to the next, with threads that call without a pause."""
    begin = threading.Barrier(THREADS + 1)
    over = threading.Event()
    answers: list[int] = []

    def ask() -> None:
        call()
        begin.wait()
        count = 0
        while not over.is_set():
            call()
            count += 1
        answers.append(count)

    threads = [threading.Thread(target=ask) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    begin.wait()
    begun = time.perf_counter()
    over.wait(seconds)
    over.set()
    for thread in threads:
        thread.join()
    return (time.perf_counter() - begun) / sum(answers)


async def _get_awaited(task: Task) -> float:
    from redis import asyncio as redis

    client = redis.Redis(port=task.place.port)
    try:
        return await per_await(lambda: client.get("record"), task.seconds)
    finally:
        await client.aclose()


# --- many at once --------------------------------------------------------------------------------


def store_many(task: Task) -> Figures:
    """Store 1,000 records in Redis."""
    if task.subject.startswith("redis"):
        import redis

        value = pickle.dumps(work.record(*ARGUMENTS))
        redis.Redis(port=task.place.port).mset({f"r{i}": value for i in range(CONCURRENT)})
        return {}
    function = records(task)

    async def run() -> None:
        for i in range(CONCURRENT):
            await function(i, "Ada")

    asyncio.run(run())
    return {}


def hit_many(task: Task) -> Figures:
    """Seconds per hit of 1,000 hits in one `asyncio.gather`."""
    return {"value": asyncio.run(_hit_many(task)) / CONCURRENT}


async def _hit_many(task: Task) -> float:
    if not task.subject.startswith("redis"):
        function = records(task)
        call = lambda: asyncio.gather(*(function(i, "Ada") for i in range(CONCURRENT)))  # noqa: E731
        return only_hits(task, await per_await(call, task.seconds, 1))
    from redis import asyncio as redis

    client = redis.Redis(port=task.place.port)
    at_once = asyncio.Semaphore(100)

    async def one(i: int) -> Any:
        async with at_once:
            return pickle.loads(await client.get(f"r{i}"))

    async def piped() -> Any:
        pipe = client.pipeline(transaction=False)
        for i in range(CONCURRENT):
            pipe.get(f"r{i}")
        return [pickle.loads(value) for value in await pipe.execute()]

    try:
        if "pipeline" in task.subject:
            return await per_await(piped, task.seconds, 1)
        return await per_await(
            lambda: asyncio.gather(*map(one, range(CONCURRENT))), task.seconds, 1
        )
    finally:
        await client.aclose()


def store_all(task: Task) -> Figures:
    """Fill a disk tier with small entries; seconds per entry of the last thousand."""
    function = records(task)
    for i in range(task.size - 1000):
        function(i, "Ada")
    taken = []
    for i in range(task.size - 1000, task.size):
        begun = time.perf_counter()
        function(i, "Ada")
        taken.append(time.perf_counter() - begun)
    return {"value": statistics.median(taken)}


def hit_all(task: Task) -> Figures:
    """Time a hit on one of many small entries, chosen at random."""
    function, choose = records(task), random.Random(0)
    taken = per_call(lambda: function(choose.randrange(task.size), "Ada"), task.seconds)
    return {"value": only_hits(task, taken)}


# --- big values ----------------------------------------------------------------------------------


def frames(task: Task) -> Any:
    """Return the cached function of big values."""
    return decorated(task.subject, task.place, work.frame, work.aframe)


def plain_bytes(value: Any) -> list[memoryview]:
    """Return the bare bytes of a value: the least that has to be written or hashed."""
    import numpy as np

    if isinstance(value, np.ndarray):
        return [memoryview(value).cast("B")]
    return [part for block in value._mgr.blocks for part in _parts(block.values)]


def _parts(values: Any) -> list[memoryview]:
    """Return the buffers of one block: an array, Arrow, dates or categories."""
    if hasattr(values, "_pa_array"):
        buffers = [b for chunk in values._pa_array.chunks for b in chunk.buffers()]
        return [memoryview(buffer).cast("B") for buffer in buffers if buffer is not None]
    plain = getattr(values, "_ndarray", values)
    plain = plain.view("i8") if plain.dtype.kind == "M" else plain
    return [memoryview(plain.ravel(order="K")).cast("B")]


def write(task: Task, value: Any) -> float:
    """Seconds of a `write()` of a value's bytes."""
    path = Path(task.place.directory, "floor")
    parts = plain_bytes(value)
    begun = time.perf_counter()
    with open(path, "wb", buffering=0) as file:
        for part in parts:
            done = 0
            while done < len(part):
                done += file.write(part[done:])
    taken = time.perf_counter() - begun
    path.unlink()
    return taken


PAIRS = 5
"""Stores of a big value in one process, each after a `write()` of the same bytes."""


def store_frame(task: Task) -> Figures:
    """Store a big value for the processes that hit it."""
    import numpy as np

    if task.subject == "np.load mmap":
        np.save(Path(task.place.directory, "floor.npy"), np.zeros(task.size // 8))
        return {}
    if task.subject == "redis-py GET":
        import redis

        redis.Redis(port=task.place.port).set("frame", bytes(task.size))
        return {}
    function = frames(task)
    work.READY["warm"] = work.make("array", 400_000)
    once(task, function, "warm")
    work.READY[task.kind] = work.make(task.kind, task.size)
    once(task, function, task.kind)
    return {}


def store_pairs(task: Task) -> Figures:
    """Store a big value: seconds, those of `write()` of the same bytes, and peak memory.

    The first big write of a process may take ten times as long as the next, since the system has
    to find the pages; a process that writes after a file was removed gets its pages.  So the pages
    are found first, floor and subject take turns, and what either wrote is removed before the next.
    The bytes differ each time, so that no subject can skip what is stored already.
    """
    value = work.make(task.kind, task.size)
    function = frames(task)
    work.READY["warm"] = work.make("array", 400_000)
    once(task, function, "warm")
    for _ in range(2):
        write(task, value)
    floors, stores, peaks = [], [], []
    for turn in range(PAIRS):
        value.iloc[0, 0] = float(turn)
        floors.append(write(task, value))
        work.READY[f"turn {turn}"] = value
        before = forget_peak()
        stores.append(once(task, function, f"turn {turn}"))
        peaks.append(resident("VmHWM") - before)
        remove_big(task.place.directory)
    return {
        "value": statistics.median(stores),
        "write": statistics.median(floors),
        "ratio": statistics.median(map(float.__truediv__, stores, floors)),
        "peak_bytes": max(0, *peaks),
    }


def remove_big(directory: str) -> None:
    """Remove the big files that a subject has written, to free their pages."""
    for path in Path(directory).rglob("*"):
        if path.is_file() and path.stat().st_size > work.BIG:
            path.unlink()


def hit_frame(task: Task) -> Figures:
    """Time the first and later hits on a big value; measure the peak memory."""
    import numpy as np
    import pandas as pd

    pd.DataFrame({"a": np.zeros(3)})  # what pandas imports late
    if task.subject == "np.load mmap":
        path = Path(task.place.directory, "floor.npy")
        return {"value": per_call(lambda: np.load(path, mmap_mode="c"), task.seconds, 1)}
    if task.subject == "redis-py GET":
        import redis

        client = redis.Redis(port=task.place.port)
        return {"value": per_call(lambda: client.get("frame"), task.seconds, 1)}
    function = frames(task)
    if task.subject.startswith("memo"):
        once(task, function, "warm")
    before = forget_peak()
    first = once(task, function, task.kind)
    peak = resident("VmHWM") - before
    value = timed(task, function, task.kind, batch=1)
    return {"value": value, "first": first, "peak_bytes": max(0, peak)}


def hit_elsewhere(task: Task) -> Figures:
    """Time the first hit on another host: the same Redis, an empty directory."""
    import tempfile

    import numpy as np
    import pandas as pd

    pd.DataFrame({"a": np.zeros(3)})
    with tempfile.TemporaryDirectory(dir=task.place.directory) as directory:
        here = task._replace(place=task.place._replace(directory=directory))
        function = frames(here)
        if task.subject.startswith("memo"):
            once(here, function, "warm")
        return {"value": once(here, function, task.kind)}


# --- keys ----------------------------------------------------------------------------------------


def key(task: Task) -> Figures:
    """Time the key of a call whose argument is a big value."""
    value = work.make(task.kind, task.size)
    if task.subject == "BLAKE3, all cores":
        from blake3 import blake3

        parts = plain_bytes(value)

        def call() -> Any:
            hasher = blake3(max_threads=blake3.AUTO)
            for part in parts:
                hasher.update(part)
            return hasher.digest()

    elif task.subject == "joblib":
        from joblib import hash as joblib_hash

        def call() -> Any:
            return joblib_hash(value)

    else:
        function = decorated(task.subject, task.place, _whole, _whole)

        def call() -> Any:
            return function.key(value)

    return {"value": per_call(call, task.seconds, 1)}


def _whole(value: Any) -> None:
    """Take a big value."""


# --- stampede ------------------------------------------------------------------------------------

PROCESSES, CALLERS, JOB = 4, 32, 0.5


def stampede(task: Task) -> Figures:
    """Seconds until 4 processes with 32 callers each, which start at once, have one result."""
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(PROCESSES), context.Queue()
    each = [
        context.Process(target=_callers, args=(task, barrier, answers)) for _ in range(PROCESSES)
    ]
    for process in each:
        process.start()
    taken = [answers.get(timeout=60) for _ in each]
    for process in each:
        process.join()
    runs = Path(task.place.directory, "runs").stat().st_size
    return {"value": max(taken), "runs": runs}


def _ran(directory: str) -> None:
    with open(Path(directory, "runs"), "ab") as file:
        file.write(b".")


def job(name: str, directory: str) -> str:
    """Half a second of work."""
    if name != "warm":
        _ran(directory)
        time.sleep(JOB)
    return name


async def ajob(name: str, directory: str) -> str:
    """As `job`."""
    if name != "warm":
        _ran(directory)
        await asyncio.sleep(JOB)
    return name


def _callers(task: Task, barrier: Any, answers: Any) -> None:
    from concurrent.futures import ThreadPoolExecutor

    function = decorated(task.subject, task.place, job, ajob)
    where = task.place.directory

    async def run() -> float:
        await function("warm", where)
        barrier.wait()
        begun = time.perf_counter()
        await asyncio.gather(*(function("job", where) for _ in range(CALLERS)))
        return time.perf_counter() - begun

    if is_async(task.subject):
        answers.put(asyncio.run(run()))
        return
    function("warm", where)
    with ThreadPoolExecutor(CALLERS) as pool:
        barrier.wait()
        begun = time.perf_counter()
        list(pool.map(lambda _: function("job", where), range(CALLERS)))
        answers.put(time.perf_counter() - begun)


def main() -> None:
    """Measure the task that the first argument describes; print the figures as JSON."""
    given = json.loads(sys.argv[1])
    given["place"] = Place(**given["place"])
    task = Task(**given)
    if task.measure in ALONE and "redis" not in task.subject.lower():
        take_the_quietest_core()
    figures = globals()[task.measure](task)
    if task.measure.startswith("store_"):
        Path(marker(task)).touch()
    print(json.dumps(figures))
    sys.stdout.flush()


if __name__ == "__main__":
    from benchmarks import samples  # the module by its own name: cached functions are found by it

    samples.main()
