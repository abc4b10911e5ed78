"""Early cutoff: what was built on a result stays valid while that result comes back equal.

One suite for sync, async and threads, on disk alone and with Redis over the disk.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from checkout import ROOT
from redis_server import RedisServer
from ways import Way, fresh_process

import memo
from memo.testing import recording

RUNS: Counter[str] = Counter()
RAW: dict[str, Any] = {}


@pytest.fixture(autouse=True)
def _emptied() -> None:
    RUNS.clear()
    RAW.clear()
    RAW.update(EU=11, US=21)


class Pipeline:
    """`report` is built on `clean` of each region, and that on `raw`: loaded, last digit, sum."""

    def __init__(self, way: Way, **options: Any) -> None:
        cutoff, outer = {"cutoff": True, "ttl": None}, {"ttl": None, **options}
        self.way = way
        if way.name == "async":

            @memo.cache(version="1", **cutoff)
            async def raw(region: str) -> Any:
                RUNS[f"raw {region}"] += 1
                return RAW[region]

            @memo.cache(version="1", **cutoff)
            async def clean(region: str) -> Any:
                RUNS[f"clean {region}"] += 1
                return await raw(region) % 10

            @memo.cache(version="1", **outer)
            async def report() -> Any:
                RUNS["report"] += 1
                return sum(await asyncio.gather(clean("EU"), clean("US")))

            self.raw, self.clean, self.report = raw, clean, report
        else:

            @memo.cache(version="1", **cutoff)
            def load(region: str) -> Any:
                RUNS[f"raw {region}"] += 1
                return RAW[region]

            @memo.cache(version="1", **cutoff)
            def tidy(region: str) -> Any:
                RUNS[f"clean {region}"] += 1
                return load(region) % 10

            @memo.cache(version="1", **outer)
            def total() -> Any:
                RUNS["report"] += 1
                return sum(tidy(region) for region in ("EU", "US"))

            self.raw, self.clean, self.report = load, tidy, total

    def __call__(self) -> Any:
        return self.way.call(self.report)

    def ran(self) -> list[str]:
        """The functions that ran since the last look."""
        ran = sorted(RUNS.elements())
        RUNS.clear()
        return ran


@pytest.fixture
def pipeline(way: Way, place: str) -> Pipeline:
    return Pipeline(way)


EVERYTHING = ["clean EU", "clean US", "raw EU", "raw US", "report"]


def test_a_direct_invalidation_is_absolute(pipeline: Pipeline) -> None:
    """A result that is invalidated itself is computed, even if its inputs are equal."""
    pipeline()
    pipeline.ran()
    pipeline.report.invalidate()
    pipeline()
    assert pipeline.ran() == ["report"]
    pipeline.raw.invalidate("EU")
    pipeline.report.invalidate()
    pipeline()
    assert pipeline.ran() == ["raw EU", "report"]
    pipeline.clean.invalidate("EU")
    pipeline()
    assert pipeline.ran() == ["clean EU"]


def test_an_event_and_a_column_say_so(pipeline: Pipeline) -> None:
    """Revalidated answers are no misses, and the time that they save is counted once."""
    pipeline()
    pipeline.raw.invalidate("EU")
    before = memo.stats()
    with recording() as events:
        pipeline()
    told = [event for event in events if event.kind == "revalidated"]
    assert [event.function.rpartition(".")[2] for event in told] in (
        ["clean", "report"],
        ["tidy", "total"],
    )
    assert [event.reason for event in told] == ["invalidated", "invalidated"]
    total = (memo.stats() - before).total
    assert (total.revalidated, total.misses, total.computed) == (2, 1, 1)
    assert total.saved == pytest.approx(sum(event.saved for event in told[1:]))
    assert "· 2 revalidated ·" in repr(memo.stats())


def test_refresh_of_the_inner_function(pipeline: Pipeline) -> None:
    """A refresh after an invalidation counts as the answer of the function that is asked."""
    pipeline()
    pipeline.raw.invalidate("EU")
    pipeline.raw.refresh("EU")
    pipeline.ran()
    pipeline()
    assert pipeline.ran() == []
    RAW["EU"] = 17
    pipeline.raw.invalidate("EU")
    pipeline.raw.refresh("EU")
    pipeline.ran()
    assert pipeline() == 8
    assert pipeline.ran() == ["clean EU", "report"]


def test_refresh_of_the_outer_function_computes(pipeline: Pipeline) -> None:
    """A caller that asks for a computation gets one."""
    pipeline()
    pipeline.ran()
    pipeline.report.refresh()
    assert pipeline.ran() == ["report"]


def test_within_a_stale_window_it_is_renewed_in_the_background(way: Way, place: str) -> None:
    """A value that an inner function let expire is served, and then checked instead of computed."""
    pipeline = Pipeline(way, stale_while_revalidate="1h")
    pipeline()
    pipeline.ran()
    pipeline.clean.expire("EU")
    with recording() as events:
        assert pipeline() == 2
        memo.runtime.blocking.drain_blocking(10)
    assert "stale" in [event.kind for event in events]
    assert pipeline.ran() == ["clean EU"]
    with recording() as events:
        assert pipeline() == 2
    assert [event.kind for event in events] == ["hit"]


def test_age_is_kept(way: Way, place: str) -> None:
    """Renewing an entry makes it no younger."""
    pipeline = Pipeline(way, ttl=3600)
    pipeline()
    first = memo.entries(pipeline.report)[0]
    pipeline.raw.invalidate()
    pipeline()
    again = memo.entries(pipeline.report)[0]
    assert again.age > first.age
    assert again.ttl == first.ttl


def test_frames_keep_their_payload(way: Way, place: str) -> None:
    """A big result that is renewed lies in the tiers as it did, and loads."""
    np = pytest.importorskip("numpy")

    def source(x: str) -> Any:
        RUNS["source"] += 1
        return np.arange(100_000.0)

    inner = way.cached(source, name="tests:source", cutoff=True)
    if way.name == "async":

        @memo.cache(ttl=None, version="1")
        async def big() -> Any:
            RUNS["big"] += 1
            return await inner("a") + 1

        outer: Any = big
    else:

        @memo.cache(ttl=None, version="1")
        def also_big() -> Any:
            RUNS["big"] += 1
            return inner("a") + 1

        outer = also_big
    way.call(outer)
    inner.invalidate()
    assert way.call(outer)[-1] == 100_000.0
    fresh_process()
    assert way.call(outer)[-1] == 100_000.0
    assert RUNS == {"source": 2, "big": 1}


def test_explain_and_entries_say_what_is_in_doubt(pipeline: Pipeline) -> None:
    """An entry that may be renewed is not called invalidated."""
    pipeline()
    pipeline.raw.invalidate("EU")
    said = str(pipeline.report.explain())
    assert "first checks" in said
    assert "if equal, it stays valid" in said
    assert [entry.state for entry in memo.entries(pipeline.report)] == ["in doubt"]
    assert pipeline.report.invalidate().matched == 1


def test_a_result_without_a_key_warns_once(way: Way, place: str) -> None:
    """A result that cannot be compared is stored without cutoff, and the one warning says so."""

    def body(x: str) -> Any:
        RUNS["odd"] += 1
        return _Keyless()

    inner = way.cached(body, name="tests:odd", cutoff=True)
    with pytest.warns(UserWarning, match=r"cutoff=True and returned a _Keyless that has no key"):
        way.call(inner, "a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        way.call(inner, "b")
        way.call(inner, "a")
    assert RUNS == {"odd": 2}


class _Keyless:
    """Can be pickled, and has no key."""

    def __memo_key__(self) -> Any:
        return object()


def test_what_is_not_stored_is_not_asked_twice(way: Way, place: str) -> None:
    """A function whose results are not stored runs once for each call of the outer one."""
    inner = way.cached(_counted, name="tests:unstored", cutoff=True, cache_if=lambda value: False)
    outer = _over(way, inner)
    way.call(outer)
    RUNS.clear()
    inner.invalidate()
    way.call(outer)
    assert RUNS == {"inner": 1, "outer": 1}


def test_an_inner_function_that_raises_is_the_outer_functions_affair(way: Way, place: str) -> None:
    """If the function that is asked raises, the outer one runs, and meets the exception itself."""
    RAW["x"] = 1

    def body(x: str) -> Any:
        if RAW["x"] is None:
            raise LookupError("no data")
        return RAW["x"]

    inner = way.cached(body, name="tests:raising", cutoff=True)
    outer = _over(way, inner)
    assert way.call(outer) == 1
    RAW["x"] = None
    inner.invalidate()
    with pytest.raises(LookupError, match="no data"):
        way.call(outer)


def test_what_was_used_after_a_change_is_not_asked(way: Way, place: str) -> None:
    """Results are asked in the order in which they were used, up to the first that changed."""
    RAW.update(choice="left", left=1, right=2)

    def body(x: str) -> Any:
        RUNS[x] += 1
        return RAW[x]

    inner = way.cached(body, name="tests:choice", cutoff=True)
    if way.name == "async":

        @memo.cache(ttl=None, version="1")
        async def chosen() -> Any:
            return await inner(await inner("choice"))

        outer: Any = chosen
    else:

        @memo.cache(ttl=None, version="1")
        def also_chosen() -> Any:
            return inner(inner("choice"))

        outer = also_chosen
    assert way.call(outer) == 1
    RAW["choice"] = "right"
    inner.invalidate()
    RUNS.clear()
    assert way.call(outer) == 2
    assert RUNS == {"choice": 1, "right": 1}


def test_what_was_used_together_is_asked_together(place: str) -> None:
    """Loads that an async function gathered are asked at the same time, not one after the other."""
    under_way: list[int] = [0, 0]
    all_there = asyncio.Event()

    @memo.cache(ttl=None, version="1", cutoff=True)
    async def load(x: int) -> int:
        under_way[0] += 1
        under_way[1] = max(under_way)
        if under_way[0] == 20:
            all_there.set()
        if x < 20:
            await asyncio.wait_for(all_there.wait(), 10)
        else:
            await asyncio.sleep(0.01)
        under_way[0] -= 1
        return x

    @memo.cache(ttl=None, version="1")
    async def together() -> int:
        RUNS["outer"] += 1
        return sum(await asyncio.gather(*map(load, range(20))))

    @memo.cache(ttl=None, version="1")
    async def in_a_row() -> int:
        RUNS["outer"] += 1
        return sum([await load(x) for x in range(20, 25)])

    async def main(outer: Any, total: int) -> None:
        assert await outer() == total
        load.invalidate()
        under_way[1] = 0
        all_there.clear()
        assert await outer() == total

    asyncio.run(main(together, 190))
    assert under_way[1] == 20
    asyncio.run(main(in_a_row, 110))
    assert under_way[1] == 1
    assert RUNS == {"outer": 2}


def test_two_results_of_which_one_vouches_for_the_other(way: Way, place: str) -> None:
    """A result that is used directly counts, though another one that was built on it is equal."""
    RAW["x"] = 11
    base = way.cached(lambda x: RAW[x], name="tests:base", cutoff=True)
    if way.name == "async":

        @memo.cache(ttl=None, version="1", cutoff=True)
        async def digit() -> Any:
            return await base("x") % 10

        @memo.cache(ttl=None, version="1")
        async def both() -> Any:
            return await digit(), await base("x")

        outer: Any = both
    else:

        @memo.cache(ttl=None, version="1", cutoff=True)
        def last() -> Any:
            return base("x") % 10

        @memo.cache(ttl=None, version="1")
        def pair() -> Any:
            return last(), base("x")

        outer = pair
    assert way.call(outer) == (1, 11)
    RAW["x"] = 21
    base.invalidate()
    assert way.call(outer) == (1, 21)


def test_elements_are_asked_and_renewed_one_by_one(way: Way, place: str) -> None:
    """With `each`, an element that comes back equal keeps what was built on it."""
    RAW.update({1: 11, 2: 22, 3: 33})
    base = way.cached(lambda x: RAW[x], name="tests:base", cutoff=True)
    if way.name == "async":

        @memo.cache(ttl=None, version="1", cutoff=True, each="ids")
        async def digits(ids: list[int]) -> list[int]:
            RUNS.update(f"digit {one}" for one in ids)
            return [await base(one) % 10 for one in ids]

        @memo.cache(ttl=None, version="1")
        async def total() -> Any:
            RUNS["total"] += 1
            return sum(await digits([1, 2, 3]))

        outer: Any = total
    else:

        @memo.cache(ttl=None, version="1", cutoff=True, each="ids")
        def last(ids: list[int]) -> list[int]:
            RUNS.update(f"digit {one}" for one in ids)
            return [base(one) % 10 for one in ids]

        @memo.cache(ttl=None, version="1")
        def add_up() -> Any:
            RUNS["total"] += 1
            return sum(last([1, 2, 3]))

        outer = add_up
    assert way.call(outer) == 6
    RUNS.clear()
    base.invalidate(2)
    assert way.call(outer) == 6
    assert RUNS == {}
    RAW[2] = 32
    base.invalidate(2)
    assert way.call(outer) == 6
    assert "total" not in RUNS
    RAW[2] = 37
    base.invalidate(2)
    assert way.call(outer) == 11


def _counted(x: str) -> Any:
    RUNS["inner"] += 1
    return x


def _over(way: Way, inner: Any) -> Any:
    """A cached function over `inner("x")`."""
    if way.name == "async":

        @memo.cache(ttl=None, version="1")
        async def outer() -> Any:
            RUNS["outer"] += 1 if inner.function_id == "tests:unstored" else 0
            return await inner("x")

        return outer

    @memo.cache(ttl=None, version="1")
    def also_outer() -> Any:
        RUNS["outer"] += 1 if inner.function_id == "tests:unstored" else 0
        return inner("x")

    return also_outer


# --- other processes, other hosts -----------------------------------------------------------------

WORKER = """
import sys, memo
sys.path.insert(0, {support!r})
memo.configure(directory={directory!r}, redis_url={url!r})
ran = []
@memo.cache(ttl=None, version="1", cutoff=True, name="other:raw")
def raw(x): ran.append("raw"); return 7
@memo.cache(ttl=None, version="1", name="other:report")
def report(): ran.append("report"); return raw("x") + 1
{doing}
print(ran, report())
memo.runtime.blocking.drain_blocking(5)
"""


def _worker(directory: Path, url: str | None, doing: str = "report()") -> str:
    text = WORKER.format(support=str(ROOT), directory=str(directory), url=url, doing=doing)
    done = subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return done.stdout.strip()


@pytest.mark.parametrize("hosts", [1, 2])
def test_across_processes_and_hosts(hosts: int, tmp_path: Path, redis_server: RedisServer) -> None:
    """One process invalidates, another one finds the result equal, and a third hits."""
    places = [tmp_path / f"host{number % hosts}" for number in range(3)]
    assert _worker(places[0], redis_server.url) == "['report', 'raw'] 8"
    assert _worker(places[1], redis_server.url, "raw.invalidate(); report()") == "['raw'] 8"
    assert _worker(places[2], redis_server.url) == "[] 8"
    assert _worker(places[0], redis_server.url) == "[] 8"


LOCKED = """
import time
runs = open({log!r}, "a", buffering=1)
@memo.cache(ttl=None, version="1", cutoff=True, name="other:raw", use_lock=True)
def raw(x):
    runs.write("raw\\n")
    time.sleep(1)
    return 7
@memo.cache(ttl=None, version="1", name="other:report", use_lock=True)
def report():
    runs.write("report\\n")
    return raw("x") + 1
"""


@pytest.mark.parametrize("hosts", [1, 2])
def test_with_use_lock_the_cluster_asks_once(
    hosts: int, tmp_path: Path, redis_server: RedisServer
) -> None:
    """Processes that prove the same entry right at the same time run the inner function once."""
    log = tmp_path / "runs"
    doing = LOCKED.format(log=str(log))
    places = [tmp_path / f"host{number % hosts}" for number in range(2)]
    _worker(places[0], redis_server.url, f"{doing}report()")
    _worker(places[0], redis_server.url, "raw.invalidate(); sys.exit()")
    log.write_text("")
    with ThreadPoolExecutor(2) as pool:
        said = list(pool.map(lambda at: _worker(at, redis_server.url, doing), places))
    assert said == ["[] 8", "[] 8"]
    assert log.read_text("utf-8").split() == ["raw"]


def test_slow_functions_that_are_asked_again_hold_up_no_other_call() -> None:
    """Many async results ask plain functions again; other calls, which need threads, go on."""
    goes_on, asked, slow = threading.Event(), threading.Semaphore(0), []

    @memo.cache(cutoff=True, ttl=None, version="1")
    def raw(number: int) -> int:
        if slow:
            asked.release()
            assert goes_on.wait(30)
        return number

    @memo.cache(ttl=None, version="1")
    async def report(number: int) -> int:
        return raw(number)

    @memo.cache(ttl=None, version="1")
    async def other() -> bytes:
        return bytes(1_000_000)

    async def main() -> None:
        await asyncio.gather(*map(report, range(16)))
        await raw.ainvalidate()
        slow.append(True)
        reports = asyncio.gather(*map(report, range(16)))
        try:
            for _ in range(16):
                assert await asyncio.to_thread(asked.acquire, timeout=15)
            async with asyncio.timeout(15):
                await other()
        finally:
            goes_on.set()
            await reports

    asyncio.run(main())


@pytest.mark.parametrize("x", [[1, 2], (1, 2), {1, 2}, np.array([1, 2]), pd.Index([1, 2])], ids=str)
def test_an_element_is_asked_for_in_a_collection_of_the_callers_type(x: Any) -> None:
    """With `each`, a function gets no other type of collection than its callers gave it."""
    kinds: list[type] = []

    @memo.cache(each="x", cutoff=True, ttl=None, version="1", name="tests:elements")
    def elements(x: Any) -> dict[int, int]:
        kinds.append(type(x))
        return {int(one): 2 * int(one) for one in x}

    @memo.cache(ttl=None, version="1", name="tests:outer")
    def outer() -> int:
        kinds.append(int)
        return sum(elements(x).values())

    assert outer() == 6
    elements.invalidate(x=1)
    assert outer() == 6
    assert kinds == [int, type(x), type(x)]


SOURCE = {"rate": 1}


def test_a_method_of_a_class_that_is_pickled_by_value_is_asked_with_its_own_globals() -> None:
    """Its object, which is kept to ask again, brings a copy of the method: that answers nothing."""

    class Rates:
        @memo.cache(ttl=None, cutoff=True, version="1", name="tests:rate")
        def rate(self, day: str) -> int:
            return SOURCE["rate"]

    rates = Rates()

    @memo.cache(ttl=None, version="1", name="tests:outer")
    def outer() -> int:
        return rates.rate("monday")

    for rate in (1, 2, 3, 4):
        SOURCE["rate"] = rate
        rates.rate.invalidate()
        assert outer() == rates.rate("monday") == rate
    own = [one for one in memo.functions() if one.function_id == "tests:rate"]
    assert own == [Rates.rate]
