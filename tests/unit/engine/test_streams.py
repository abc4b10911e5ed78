"""Generators: streamed to the first consumer, stored when they have ended, replayed."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import ports
import pytest
from inside import joined
from time_ahead import Ahead
from waiting import await_until, counted_turns, until
from ways import Way, fresh_process, kinds

import memo
from memo import NotCachedError, OptionError, ReentryError, cache
from memo.testing import ManualClock, isolated, recording

SEEN: list[Any] = []
"""The steps of the generators, in order."""


@pytest.fixture(autouse=True)
def fresh_counts() -> None:
    SEEN.clear()


def counting(n: int) -> Iterator[Any]:
    SEEN.append("begins")
    try:
        for i in range(n):
            SEEN.append(i)
            yield [i]
        SEEN.append("ends")
    finally:
        SEEN.append("closed")


def cached(way: Way, body: Callable[..., Iterator[Any]] = counting, **options: Any) -> Any:
    """A cached generator over a body; an async one where the way is async."""
    options = {"name": "tests:rows", "version": "1", "ttl": None, **options}
    if way.name == "async":

        @cache(**options)
        async def arows(n: int) -> AsyncIterator[Any]:
            for item in (made := body(n)):
                await asyncio.sleep(0)
                try:
                    yield item
                except GeneratorExit:
                    made.close()  # type: ignore[attr-defined]
                    raise

        return arows

    @cache(**options)
    def rows(n: int) -> Iterator[Any]:
        return (yield from body(n))

    return rows


def read(way: Way, made: Any, most: int | None = None) -> list[Any]:
    """The items of a stream, or the first of them; then it is closed."""
    items: list[Any] = way.run(lambda: way.read(made, most))
    return items


# --- stored and replayed --------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["option", "setting"])
@pytest.mark.parametrize("size", ["1KiB", "1MiB", "20MiB"])
def test_compress_holds_for_items(way: Way, place: str, given: str, size: str) -> None:
    """`compress`, the option and the setting: items from that size on lie there compressed."""
    if given == "setting":
        memo.configure(compress=size)
    options = {"compress": size} if given == "option" else {}
    rows = cached(way, lambda n: iter([f"{i} " * 20_000 for i in range(n)]), **options)
    wanted = [f"{i} " * 20_000 for i in range(100)]
    assert read(way, rows(100)) == wanted
    fresh_process()
    assert read(way, rows(100)) == wanted
    (entry,) = memo.entries(rows)
    least, most = {"1KiB": (0, 100_000), "1MiB": (0, 2_200_000), "20MiB": (4_000_000, 8_000_000)}[
        size
    ]
    assert least < entry.size < most


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_stream_is_stored_and_replayed(way: Way, place: str, count: int) -> None:
    """The second call replays what the first gave, in a fresh process as well; no second run."""
    rows = cached(way)
    wanted = [[i] for i in range(count)]
    assert read(way, rows(count)) == wanted
    assert read(way, rows(count)) == wanted
    fresh_process()
    assert read(way, rows(count)) == wanted
    assert SEEN.count("begins") == 1


def test_the_first_consumer_sees_items_as_they_are_produced(way: Way) -> None:
    """Nothing runs before the first item is wanted, and nothing runs ahead."""
    rows = cached(way)
    made = rows(3)
    assert SEEN == []
    assert read(way, made, 2) == [[0], [1]]
    assert SEEN == ["begins", 0, 1, "closed"]


def test_a_stream_counts_as_one_call(way: Way) -> None:
    """The run is a miss and a computation, each replay a hit."""
    rows = cached(way)
    with recording() as heard:
        read(way, rows(2))
        read(way, rows(2))
    assert kinds(heard) == ["miss", "computed", "hit"]


def test_the_returned_value_is_replayed() -> None:
    """The return value of the generator is the value of `yield from`, from the cache as well."""

    @cache(version="1")
    def rows() -> Any:
        yield 1
        return {"total": 1}

    def outer() -> Any:
        got = yield from rows()
        SEEN.append(got)

    assert list(outer()) == list(outer()) == [1]
    assert SEEN == [{"total": 1}] * 2


def test_items_are_copies(way: Way, place: str) -> None:
    """Changing an item changes neither the store nor what others get."""
    rows = cached(way)
    read(way, rows(2))[0].append("changed")
    again = read(way, rows(2))
    assert again == [[0], [1]]
    again[0].append("changed")
    assert read(way, rows(2)) == [[0], [1]]


def test_items_of_any_type(way: Way) -> None:
    """Arrays, mixed containers and None are items like others."""
    given = [np.arange(5), {"a": (1, None)}, None, "x" * 10, b"", {1, 2}, range(3)]

    def body(n: int) -> Iterator[Any]:
        SEEN.append("begins")
        yield from given

    rows = cached(way, body)
    read(way, rows(1))
    found = read(way, rows(1))
    np.testing.assert_array_equal(found[0], given[0])
    assert found[1:] == given[1:]
    assert SEEN == ["begins"]


def test_many_chunks(way: Way, place: str) -> None:
    """A stream of several chunks, past what is kept in memory, is the same when it is replayed."""

    def body(n: int) -> Iterator[Any]:
        SEEN.append("begins")
        for i in range(n):
            yield bytes([i % 256]) * 100_000

    rows = cached(way, body)
    first = read(way, rows(80))
    fresh_process()
    assert read(way, rows(80)) == first
    assert SEEN == ["begins"]


def test_calls_that_do_not_fit(way: Way) -> None:
    """A wrong call raises at the call, before the first item."""
    rows = cached(way)
    with pytest.raises(TypeError, match="m"):
        rows(m=1)


# --- abandoned, failed, invalidated ---------------------------------------------------------------


def test_an_abandoned_stream_leaves_nothing(way: Way, place: str) -> None:
    """A consumer that stops early closes the generator, and nothing is stored."""
    rows = cached(way)
    read(way, rows(5), 2)
    assert SEEN == ["begins", 0, 1, "closed"]
    assert not rows.is_cached(5)
    assert len(read(way, rows(5))) == 5


def test_a_forgotten_stream_leaves_nothing() -> None:
    """A stream that goes out of scope is closed like any generator, its lease freed."""
    rows = cached(Way("sync"), use_lock=True)
    made = rows(5)
    next(made)
    del made
    gc.collect()
    assert SEEN[-1] == "closed"
    assert len(list(rows(5))) == 5


def failing(n: int) -> Iterator[Any]:
    SEEN.append("begins")
    yield [0]
    raise KeyError(n)


def test_a_failed_stream_leaves_nothing(way: Way, place: str) -> None:
    """The consumer sees the items before the exception; the next call runs again."""
    rows = cached(way, failing)
    for _ in range(2):
        made = rows(3)
        with pytest.raises(KeyError, match="3"):
            read(way, made)
    assert SEEN == ["begins"] * 2
    assert not rows.is_cached(3)


def test_an_invalidation_in_mid_stream(way: Way, place: str) -> None:
    """A sequence invalidated while it was produced is not stored, and no later call joins it."""

    def body(n: int) -> Iterator[Any]:
        SEEN.append("begins")
        yield [0]
        if len(SEEN) == 1:
            rows.invalidate()
        yield [1]

    rows = cached(way, body)
    assert read(way, rows(1)) == [[0], [1]]
    assert not rows.is_cached(1)
    read(way, rows(1))
    assert SEEN == ["begins"] * 2


def test_a_call_after_an_invalidation_has_a_run_of_its_own() -> None:
    """A call that begins after an invalidation does not read from a run that began before."""
    rows = cached(Way("sync"))
    old = rows(2)
    next(old)
    rows.invalidate()
    new = rows(2)
    next(new)
    assert SEEN.count("begins") == 2
    assert list(old) == list(new) == [[1]]


def numbered(n: int) -> Iterator[Any]:
    """Items that tell which run they are of."""
    SEEN.append("begins")
    yield from [[len(SEEN)]] * n


def test_items_that_were_seen_are_an_answer(way: Way, place: str) -> None:
    """After a consumer saw items of a later run, no call replays those of an earlier one (I2)."""
    rows = cached(way, numbered)
    assert read(way, rows(2)) == [[1], [1]]
    with memo.mode("refresh"):
        assert read(way, rows(2), 1) == [[2]]
    assert read(way, rows(2)) == [[3], [3]]


def test_a_run_is_not_joined_after_items_of_a_later_one() -> None:
    """A call takes no part in a run that began before one whose items were seen (I2)."""
    rows = cached(Way("async"), numbered)

    async def main() -> None:
        mine, new = rows(2), rows(2)
        assert await mine.__anext__() == [1]
        assert await asyncio.to_thread(read, Way("async"), rows(2), 1) == [[2]]
        assert await new.__anext__() == [3]
        await mine.aclose()
        await new.aclose()

    asyncio.run(main())


def test_calls_after_an_invalidation_elsewhere_share_a_run() -> None:
    """Calls that may not read from a run, since another process invalidated it, lead one (I3)."""
    rows = cached(Way("sync"))
    old = rows(2)
    next(old)
    ports.run("import memo; memo.invalidate(function='tests:rows')")
    first, second = rows(2), rows(2)
    assert next(first) == next(second) == [0]
    assert SEEN.count("begins") == 2
    assert list(old) == list(first) == list(second) == [[1]]
    assert rows.is_cached(2)


def test_a_run_that_is_being_left_is_waited_for() -> None:
    """A call that comes while the last consumer leaves begins a run when that one has ended."""
    closing, go = threading.Event(), threading.Event()

    def body(n: int) -> Iterator[Any]:
        SEEN.append("begins")
        try:
            yield from range(n)
        finally:
            closing.set()
            assert go.wait(20)
            SEEN.append("closed")

    rows = cached(Way("sync"), body)
    leaves = threading.Thread(target=read, args=(Way("sync"), rows(2), 1))
    comes = threading.Thread(target=read, args=(Way("sync"), rows(2)))
    with recording() as heard:
        leaves.start()
        assert closing.wait(20)
        comes.start()
        until(lambda: kinds(heard).count("miss") == 2)
        with suppress(AssertionError):
            until(lambda: SEEN.count("begins") == 2, 0.2)
        go.set()
        leaves.join(20)
        comes.join(20)
    assert SEEN == ["begins", "closed"] * 2


def test_a_consumer_that_invalidates_gets_the_lease() -> None:
    """With `use_lock` a call does not wait for a run that waits for this very consumer."""
    rows = cached(Way("sync"), use_lock=True, lock_timeout=10)
    old = rows(2)
    next(old)
    rows.invalidate()
    new = rows(2)
    with recording() as heard:
        assert next(new) == [0]
        assert list(old) == [[1]]
        assert other_process_waits()
        assert list(new) == [[1]]
    assert not other_process_waits()
    assert not {"lock_timeout", "waiting"} & {event.kind for event in heard}


WAITS = """
from memo import cache
from memo.testing import recording

@cache(name="tests:rows", version="1", ttl=None, use_lock=True, lock_timeout=0.01)
def rows(n: int):
    yield [0]

with recording() as heard:
    next(rows(2))
print("lock_timeout" in {event.kind for event in heard})
"""


def other_process_waits() -> bool:
    """True if another process finds the lease of `rows(2)` taken, until it computes by itself."""
    return ports.run(WAITS) == "True"


def test_old_items_instead_of_an_error(way: Way) -> None:
    """`stale_if_error`: where the generator raises before its first item the old ones answer."""

    def flaky(n: int) -> Iterator[Any]:
        SEEN.append("begins")
        if len(SEEN) == 2:
            raise OSError
        yield len(SEEN)

    rows = cached(way, flaky, stale_if_error=60)
    assert read(way, rows(1)) == [1]
    rows.expire()
    assert read(way, rows(1)) == [1]
    assert read(way, rows(1)) == [3]


def test_a_stale_stream_is_refreshed(way: Way) -> None:
    """`stale_while_revalidate`: the old items answer while the generator runs in the background."""

    def body(n: int) -> Iterator[Any]:
        SEEN.append("begins")
        yield len(SEEN)

    rows = cached(way, body, stale_while_revalidate=60)
    assert read(way, rows(1)) == [1]
    rows.expire()
    if way.name == "async":

        async def main() -> list[Any]:
            items = [item async for item in rows(1)]
            await memo.drain(10)
            return items

        assert asyncio.run(main()) == [1]
    else:
        assert read(way, rows(1)) == [1]
        memo.runtime.blocking.drain_blocking(10)
    assert read(way, rows(1)) == [2]
    assert len(SEEN) == 2


def test_what_cannot_be_pickled_is_not_stored(way: Way) -> None:
    """Its consumer gets every item; one warning says why each call runs."""

    def body(n: int) -> Iterator[Any]:
        SEEN.append("begins")
        yield [1]
        yield threading.Lock()
        yield [2]

    rows = cached(way, body)
    with pytest.warns(UserWarning, match="yielded a lock that cannot be pickled"):
        first = read(way, rows(1))
    assert (first[0], first[2]) == ([1], [2])
    assert len(read(way, rows(1))) == 3
    assert SEEN == ["begins"] * 2


# --- several consumers ----------------------------------------------------------------------------


def test_two_consumers_share_one_run() -> None:
    """Either may be ahead; each sees everything, with objects of its own."""
    rows = cached(Way("sync"))
    one, two = rows(4), rows(4)
    assert next(one) == [0]
    first = next(two)
    assert first == [0]
    assert [next(two), next(two)] == [[1], [2]]
    assert list(one) == [[1], [2], [3]]
    assert list(two) == [[3]]
    assert SEEN.count("begins") == 1
    assert rows.is_cached(4)


def test_a_consumer_that_leaves_ends_no_other() -> None:
    """The run goes on for the other consumer, whichever began it, and is stored."""
    rows = cached(Way("sync"))
    one, two = rows(3), rows(3)
    next(one)
    next(two)
    one.close()
    assert "closed" not in SEEN
    assert list(two) == [[1], [2]]
    assert rows.is_cached(3)


def test_threads_share_one_run() -> None:
    """Threads that consume a stream at the same time see the same, from one run."""
    rows = cached(Way("sync"))
    answers = Way("threads").together(*[lambda: list(rows(2000))] * 4)
    assert answers == [[[i] for i in range(2000)]] * 4
    assert SEEN.count("begins") == 1


def test_tasks_share_one_run() -> None:
    """Tasks of one loop as well."""
    rows = cached(Way("async"))

    async def all_of_them() -> list[Any]:
        return [item async for item in rows(300)]

    async def main() -> list[Any]:
        return list(await asyncio.gather(*(all_of_them() for _ in range(4))))

    assert asyncio.run(main()) == [[[i] for i in range(300)]] * 4
    assert SEEN.count("begins") == 1


async def test_other_tasks_run_between_items(set_limits: Callable[..., None]) -> None:
    """A consumer of many items does not block the event loop, even if the generator never waits."""

    @cache(ttl=60, version="1")
    async def load(n: int) -> AsyncIterator[int]:
        for item in range(n):
            yield item

    set_limits(step_seconds=0)
    for _ in range(2):
        with counted_turns() as turns:
            seen_at = [turns.count async for _ in load(50)]
        assert len(set(seen_at)) >= 25


def test_a_cancelled_consumer() -> None:
    """A consumer cancelled in mid-item ends the run; the other goes on with one of its own."""
    hang = True

    @cache(version="1")
    async def rows() -> AsyncIterator[int]:
        SEEN.append("begins")
        yield 0
        if hang:
            SEEN.append("hangs")
            await asyncio.Event().wait()
        yield 1

    async def all_of_them() -> list[int]:
        return [item async for item in rows()]

    async def main() -> list[int]:
        nonlocal hang
        first = asyncio.create_task(all_of_them())
        await await_until(lambda: "hangs" in SEEN)
        second = asyncio.create_task(all_of_them())
        await joined(1)
        hang = False
        first.cancel()
        return await second

    assert asyncio.run(main()) == [0, 1]
    assert SEEN == ["begins", "hangs", "begins"]


def test_another_loop_has_a_run_of_its_own() -> None:
    """An async generator belongs to one loop; a consumer of another does not wait for it."""
    rows = cached(Way("async"))

    async def main() -> list[Any]:
        mine = rows(2)
        await mine.__anext__()
        others = await asyncio.to_thread(read, Way("async"), rows(2))
        assert [item async for item in mine] == [[1]]
        return others

    assert asyncio.run(main()) == [[0], [1]]


def test_a_generator_that_reads_itself() -> None:
    """It is refused, as any computation that waits for itself."""

    @cache(version="1")
    def rows() -> Iterator[int]:
        yield 1
        yield from rows()

    with pytest.raises(ReentryError):
        list(rows())


def test_processes_share_one_run(place: str, tmp_path: Any) -> None:
    """With `use_lock` a second process waits, and replays what the first has stored."""
    program = (
        "import sys, time, memo\n"
        "url, log = sys.argv[1:3]\n"
        "if url: memo.configure(redis_url=url)\n"
        "@memo.cache(name='tests:rows', version='1', use_lock=True)\n"
        "def rows():\n"
        "    open(log, 'a').write('begins\\n')\n"
        "    for i in range(5):\n"
        "        time.sleep(0.05)\n"
        "        yield i\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "print(list(rows()))\n"
    )
    url = memo.settings.configuration.current().redis_url or ""
    log = tmp_path / "log"
    running = [
        subprocess.Popen(
            [sys.executable, "-c", program, url, str(log)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=dict(os.environ),
        )
        for _ in range(3)
    ]
    for one in running:
        assert one.stdout is not None
        assert one.stdout.readline() == "ready\n"
    for one in running:
        assert one.stdin is not None
        one.stdin.write("go\n")
        one.stdin.flush()
    assert [one.communicate(timeout=60)[0] for one in running] == ["[0, 1, 2, 3, 4]\n"] * 3
    assert log.read_text() == "begins\n"


# --- results built on streams ---------------------------------------------------------------------


@pytest.mark.parametrize("most", [1, None])
def test_what_consumes_a_stream_depends_on_it(most: int | None) -> None:
    """Also where it stops early, and whether the stream was live or replayed."""
    rows = cached(Way("sync"))

    @cache(name="tests:outer", version="1")
    def outer(run: int) -> int:
        SEEN.append("outer")
        return len(read(Way("sync"), rows(3), most))

    for run in range(2):
        outer(run)
        rows.invalidate()
        outer(run)
        assert SEEN.count("outer") == 2
        SEEN.clear()
        list(rows(3))  # stored now: the second round replays it
        SEEN.clear()


def test_a_stream_depends_on_what_it_reads() -> None:
    """An inner result that the generator read invalidates its entry."""

    @cache(name="tests:inner", version="1")
    def inner(i: int) -> int:
        return i

    rows = cached(Way("sync"), lambda n: (SEEN.append(i) or inner(i) for i in range(n)))
    list(rows(3))
    inner.invalidate(2)
    list(rows(3))
    assert SEEN == [0, 1, 2] * 2


@pytest.mark.parametrize("way_round", ["stream on value", "value on stream"])
def test_age_flows_through_streams(way_round: str) -> None:
    """`ttl="inherit"`: fresh as long as what it was built on, be that or itself a stream."""
    clock = ManualClock()
    over = way_round == "value on stream"

    @cache(name="tests:rows", version="1", ttl=10 if over else "inherit")
    def rows() -> Iterator[int]:
        SEEN.append("rows")
        yield 1 if over else value()

    @cache(name="tests:value", version="1", ttl="inherit" if over else 10)
    def value() -> int:
        SEEN.append("value")
        return sum(rows()) if over else 1

    outer: Callable[[], Any] = value if over else lambda: list(rows())
    with isolated(clock=clock):
        outer()
        clock.advance(9)
        outer()
        assert len(SEEN) == 2
        clock.advance(2)
        outer()
        assert len(SEEN) == 4


def test_time_in_a_stream_is_its_own(ahead: Ahead) -> None:
    """The time of a generator is not counted once more for the computation that consumes it."""

    @cache(name="tests:slow", version="1")
    def rows() -> Iterator[int]:
        for i in range(3):
            ahead.work(0.1)
            yield i

    @cache(name="tests:sum", version="1")
    def total() -> int:
        return sum(rows())

    with recording() as heard:
        total()
    took = {e.function: e.seconds for e in heard if e.kind == "compute_ended"}
    assert took["tests:slow"] >= 0.3
    assert took["tests:sum"] < 0.3, "0.3 s and more if they counted here too"


# --- the rest of the surface ----------------------------------------------------------------------


def test_helpers(way: Way, place: str) -> None:
    """The helpers give streams, and take them."""
    rows = cached(way)
    assert rows.peek(2, default="none") == "none"
    assert not rows.is_cached(2)
    rows.put(iter([[7], [8]]), 2)
    assert rows.is_cached(2)
    assert read(way, rows(2)) == [[7], [8]]
    assert read(way, rows.peek(2)) == [[7], [8]]
    assert read(way, rows.refresh(2)) == [[0], [1]]
    assert read(way, rows(2)) == [[0], [1]]
    assert SEEN.count("begins") == 1
    assert memo.entries(rows)[0].state == "fresh"


def test_modes(way: Way) -> None:
    """In "only" what is stored is replayed, in "off" the function runs; "refresh" stores too."""
    rows = cached(way)
    with memo.mode("only"), pytest.raises(NotCachedError):
        rows(2)
    with memo.mode("off"):
        assert len(read(way, rows(2))) == 2
    assert not rows.is_cached(2)
    with memo.mode("refresh"):
        made = rows(2)
    assert len(read(way, made)) == 2
    assert rows.is_cached(2)
    with memo.mode("only"):
        assert read(way, rows(2)) == [[0], [1]]
    assert SEEN.count("begins") == 2


def test_where_nothing_is_cached(way: Way) -> None:
    """With `enabled=False` every call and every refresh is the function's own."""
    rows = cached(way)
    with memo.configure(enabled=False):
        assert read(way, rows(1)) == read(way, rows.refresh(1)) == [[0]]
        assert rows.peek(1) is None
    assert SEEN.count("begins") == 2


def test_methods() -> None:
    """Generator methods work alike."""

    class Table:
        def __init__(self, name: str) -> None:
            self.name = name

        @cache(version="1")
        def rows(self, n: int) -> Iterator[str]:
            SEEN.append(self.name)
            for i in range(n):
                yield f"{self.name}{i}"

    a, b = Table("a"), Table("b")
    assert list(a.rows(2)) == list(a.rows(2)) == ["a0", "a1"]
    assert list(b.rows(1)) == ["b0"]
    assert SEEN == ["a", "b"]


def test_it_is_a_generator(way: Way) -> None:
    """A call returns a generator of the function's kind and name."""
    made = cached(way)(1)
    assert (hasattr(made, "__anext__"), hasattr(made, "__next__")) == (
        way.name == "async",
        way.name != "async",
    )
    assert made.__name__ in ("rows", "arows")
    read(way, made)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"each": "n"}, "each='n': cannot be combined with a generator"),
        ({"replay": True}, "cannot be combined with a generator"),
        ({"cache_errors": {KeyError: 1}}, "cannot be combined with a generator"),
        ({"soft_timeout": 1, "stale_if_error": 1}, "cannot be combined with a generator"),
        ({"cutoff": True}, "return a list instead"),
        ({"ttl": lambda result: 5}, "needs a result"),
        ({"cache_if": bool}, "needs a result"),
        ({"tags": ["x:{result}"]}, "need a result"),
    ],
)
def test_wrong_options(options: Any, said: str) -> None:
    """An option that cannot be combined with a generator is an error at decoration."""
    with pytest.raises(OptionError, match=said):
        cache(**options)(counting)


def test_a_ttl_of_the_result_is_refused_by_using_too() -> None:
    """There is no result, so `using` takes no function of it, either."""
    rows = cache(ttl=60)(counting)
    with pytest.raises(OptionError, match="needs a result, which a generator does not have"):
        rows.using(ttl=lambda _: 5)
    assert list(rows.using(ttl="5s")(1)) == [[0]]


LONG = bool(os.environ.get("MEMO_TEST_LONG"))


@pytest.mark.timeout(600)
def test_a_stream_larger_than_memory_takes_little(cache_home: Any) -> None:
    """A stream of 200 MB takes less than 120 MB of memory; with MEMO_TEST_LONG=1 one of 1 GB."""
    items = 1_000_000 if LONG else 200_000
    program = (
        "import sys, memo\n"
        "@memo.cache(version='1', ttl=None)\n"
        "def rows():\n"
        "    for i in range(int(sys.argv[1])):\n"
        "        yield i.to_bytes(8, 'big') * 125\n"
        "for _ in range(2):\n"
        "    assert sum(len(row) for row in rows()) == int(sys.argv[1]) * 1000\n"
        "assert memo.stats().total.hits == 1\n"
        "status = open('/proc/self/status').read()\n"
        "print(int(status.partition('VmHWM:')[2].split()[0]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(items)],
        capture_output=True,
        text=True,
        check=True,
        timeout=500,
    )
    assert int(done.stdout) < 120 * 1024
