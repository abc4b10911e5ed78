"""`each`: results are cached for each element of a collection; one run computes what is missing."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
from inside import joined
from observed import calls_of
from ports import blocking
from redis_server import RedisServer
from waiting import await_until, counted_turns, until
from ways import Way, fresh_process, kinds

import memo
from memo import NotCachedError, OptionError, ReentryError, cache
from memo.decorators import assembly
from memo.engine.computing import GENERATIONS_PER_STEP
from memo.engine.explaining import list_headers
from memo.engine.used_calls import UsedCalls
from memo.records.stamp_blocks import with_block
from memo.testing import ManualClock, isolated, recording

RUNS: list[Any] = []
"""The collections with which the function ran."""


@pytest.fixture(autouse=True)
def fresh_counts() -> None:
    RUNS.clear()


def squares(x: Any) -> Any:
    RUNS.append(x)
    return [one * one for one in x]


def by_element(x: Any) -> Any:
    """A dict that leaves out what is negative."""
    RUNS.append(x)
    return {one: one * one for one in x if one >= 0}


def table(x: Any) -> Any:
    RUNS.append(list(x))
    rows = [one for one in x for _ in range(max(0, one))]
    return pd.DataFrame({"square": [one * one for one in rows]}, index=pd.Index(rows, name="x"))


def by_text(x: Any) -> Any:
    return {one: str(one) for one in x}


def table_by_text(x: Any) -> Any:
    return pd.Series([str(one) for one in x], index=pd.Index(x, dtype=object)).drop_duplicates()


def series(x: Any) -> Any:
    RUNS.append(list(x))
    return pd.Series({one: one * one for one in x if one >= 0}, name="square")


# --- elements that are computed -------------------------------------------------------------------


def test_elements_are_counted(way: Way) -> None:
    """Each element is a hit or a miss of its own."""
    load = way.cached(squares, each="x")
    way.call(load, [1, 2])
    with recording() as heard:
        way.call(load, [1, 2, 3])
    assert sorted(kinds(heard)) == ["computed", "hit", "hit", "miss"]


def test_duplicates_are_computed_once(way: Way) -> None:
    """An element that comes twice is passed on once; a list has its result twice."""
    load = way.cached(squares, each="x")
    assert way.call(load, [2, 1, 2]) == [4, 1, 4]
    assert RUNS == [[2, 1]]
    assert way.call(load, [1, 1]) == [1, 1]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ((1, 2), (2,)),
        ({1, 2}, {2}),
        (frozenset({1, 2}), frozenset({2})),
        (range(1, 3), [2]),
        ({1: "a", 2: "b"}.keys(), [2]),
        (np.array([1, 2], dtype=np.int32), np.array([2], dtype=np.int32)),
        (pd.Index([1, 2], name="k"), pd.Index([2], name="k")),
        (pd.Series([1, 2], index=["a", "b"]), pd.Series([2], index=["b"])),
    ],
    ids=lambda value: type(value).__name__,
)
def test_collections_keep_their_type(given: Any, wanted: Any) -> None:
    """The missing elements come in a collection of the caller's type."""
    load = Way("sync").cached(by_element, each="x")
    load([1])
    assert load(given) == {1: 1, 2: 4}
    if isinstance(wanted, (list, tuple, set, frozenset)):
        assert type(RUNS[1]) is type(wanted)
        assert RUNS[1] == wanted
    elif isinstance(wanted, np.ndarray):
        np.testing.assert_array_equal(RUNS[1], wanted, strict=True)
    else:
        assert RUNS[1].equals(wanted)
        assert RUNS[1].name == wanted.name


def test_dates() -> None:
    """Dates of numpy and pandas are elements like others."""
    days = np.array(["2026-01-01", "2026-01-02"], dtype="datetime64[D]")
    load = Way("sync").cached(lambda x: RUNS.append(x) or [str(day) for day in x], each="x")
    assert load(days) == load(days) == ["2026-01-01", "2026-01-02"]
    stamps = pd.DatetimeIndex(days)
    assert load(stamps)[0].startswith("2026-01-01")
    assert len(RUNS) == 2


@pytest.mark.parametrize("value", ["abc", b"ab", {1: 2}, 7, None, (n for n in [1])])
def test_what_is_no_collection(value: Any) -> None:
    """Anything else is an error that names the parameter and says what to pass."""
    load = Way("sync").cached(squares, each="x")
    with pytest.raises(OptionError, match=r"x=.*each= takes a list, tuple"):
        load(value)


def test_nothing(way: Way, place: str) -> None:
    """Without elements the function itself answers."""
    load = way.cached(squares, each="x")
    assert way.call(load, []) == []
    assert RUNS == [[]]


# --- answers --------------------------------------------------------------------------------------


def test_dicts(way: Way, place: str) -> None:
    """A dict by element; an element that is not in it is remembered as such."""
    load = way.cached(by_element, each="x")
    assert way.call(load, [2, -1]) == {2: 4}
    answer = way.call(load, [3, -1, 2])
    assert list(answer.items()) == [(3, 9), (2, 4)]
    assert RUNS == [[2, -1], [3]]


def test_tables(way: Way, place: str) -> None:
    """A DataFrame by its index, with any number of rows for an element, none included."""
    load = way.cached(table, each="x")
    way.call(load, [2, 0])
    found = way.call(load, [1, 0, 2])
    wanted = pd.DataFrame({"square": [1, 4, 4]}, index=pd.Index([1, 2, 2], name="x"))
    pd.testing.assert_frame_equal(found, wanted)
    nothing = way.call(load, [0])
    assert list(nothing.columns) == ["square"]
    assert nothing.empty
    assert RUNS == [[2, 0], [1]]


def test_series(way: Way) -> None:
    """A Series by its index."""
    load = way.cached(series, each="x")
    way.call(load, [2, -1])
    pd.testing.assert_series_equal(
        way.call(load, [1, -1, 2]), pd.Series([1, 4], index=[1, 2], name="square")
    )
    assert RUNS == [[2, -1], [1]]


def test_a_computed_answer_looks_like_a_stored_one(way: Way) -> None:
    """The first answer has the caller's order, like those from the cache."""
    load = way.cached(lambda x: {one: one for one in sorted(x)}, each="x")
    assert list(way.call(load, [3, 1, 2])) == list(way.call(load, [3, 1, 2])) == [3, 1, 2]


@pytest.mark.parametrize("answer", [[1], {1}, "ab", None])
def test_an_answer_that_cannot_be_divided(way: Way, answer: Any) -> None:
    """It reaches the caller as it is, is not stored, and one warning says what to return."""
    load = way.cached(lambda x: RUNS.append(x) or answer, each="x")
    with pytest.warns(UserWarning, match="return a list or tuple aligned with `x`"):
        assert way.call(load, [1, 2]) == answer
    assert RUNS == [[1, 2]]
    assert way.call(load, [1, 2]) == answer
    assert RUNS == [[1, 2]] * 2


@pytest.mark.parametrize(
    ("answer", "named"),
    [
        ({"1": 1, "2": 4}, "'1'"),
        ({1: 1, 2: 4, 3: 9}, "3"),
        (pd.DataFrame({"x": [1, 2], "square": [1, 4]}), "0"),
        (pd.Series([1, 4], index=["a", "b"]), "'a'"),
    ],
)
def test_an_answer_by_something_else(way: Way, answer: Any, named: str) -> None:
    """Keys that are no elements are not dropped: the whole answer reaches the caller, and is told.

    So it is with a table whose index has the numbers of its rows, not the elements.
    """
    load = way.cached(lambda x: RUNS.append(x) or answer, each="x")
    with pytest.warns(UserWarning, match=rf"has the key {named}, which is no element of `x`"):
        found = way.call(load, [1, 2])
    assert type(found) is type(answer)
    assert len(found) == len(answer)
    way.call(load, [1, 2])
    assert RUNS == [[1, 2]] * 2


def test_an_answer_that_cannot_be_divided_of_some(way: Way) -> None:
    """If only some elements were missing, the function is asked for the whole collection."""

    def odd(x: Any) -> Any:
        RUNS.append(x)
        return [one * one for one in x] if 3 not in x else [len(x)]

    load = way.cached(odd, each="x")
    way.call(load, [1, 2])
    with pytest.warns(UserWarning, match="1 results for 2 elements"):
        assert way.call(load, [1, 3, 4]) == [3]
    assert RUNS == [[1, 2], [3, 4], [1, 3, 4]]


def test_answers_of_different_kinds() -> None:
    """A function that returns now a list, now a dict, is asked for the whole collection then."""

    def either(x: Any) -> Any:
        RUNS.append(x)
        return [0] if x == [1] else {one: one for one in x}

    load = Way("sync").cached(either, each="x")
    load([1])
    with pytest.warns(UserWarning, match="was a dict and a list for different elements"):
        assert load([1, 2]) == {1: 1, 2: 2}


def test_stored_answers_of_different_kinds(way: Way) -> None:
    """Results that do not go together are no answer: not for `peek`, not in the mode "only"."""
    load = way.cached(lambda x: type(x)(one * one for one in x), each="x")
    way.call(load, [1]), way.call(load, (2,))
    assert load.peek([1, 2], default="none") == "none"
    with (
        memo.mode("only"),
        pytest.raises(NotCachedError, match="was a list and a tuple for different elements"),
    ):
        way.call(load, [1, 2])


@pytest.mark.parametrize("by", [by_text, table_by_text])
@pytest.mark.parametrize("x", [[1, True], [0.0, -0.0], [2, 2.0]], ids=str)
def test_elements_that_are_equal_have_one_label(by: Any, x: list[Any]) -> None:
    """A dict or a table has one result for two elements that are equal: none of them is stored."""
    load = Way("sync").cached(by, each="x")
    with pytest.warns(UserWarning, match="has one result for the equal elements"):
        load(x)
    assert not load.is_cached([x[0]])
    assert [str(load([one])) for one in x] == [str(by([one])) for one in x]
    assert [str(load([one])) for one in x] == [str(by([one])) for one in x], "from the cache"


def test_results_are_copies(way: Way) -> None:
    """Changing a returned result changes nothing that is stored."""
    load = way.cached(lambda x: [[one] for one in x], each="x")
    way.call(load, [1])[0].append("changed")
    assert way.call(load, [1]) == [[1]]


# --- errors ---------------------------------------------------------------------------------------


def test_an_error_reaches_the_caller(way: Way, place: str) -> None:
    """An exception of the function is raised; nothing is stored, and stored elements stay."""

    def picky(x: Any) -> Any:
        RUNS.append(x)
        if 0 in x:
            raise ZeroDivisionError
        return [1 / one for one in x]

    load = way.cached(picky, each="x")
    way.call(load, [1])
    with pytest.raises(ZeroDivisionError):
        way.call(load, [1, 2, 0])
    assert way.call(load, [1, 2]) == [1, 0.5]
    assert RUNS == [[1], [2, 0], [2]]


def test_old_values_instead_of_an_error(way: Way) -> None:
    """`stale_if_error`: the old values of all elements answer where each has one."""

    def flaky(x: Any) -> Any:
        RUNS.append(x)
        if len(RUNS) == 2:
            raise OSError
        return [len(RUNS)] * len(x)

    load = way.cached(flaky, each="x", stale_if_error=60)
    assert way.call(load, [1, 2]) == [1, 1]
    load.expire()
    assert way.call(load, [1, 2]) == [1, 1]
    assert way.call(load, [2]) == [3]


def test_a_stale_element_is_refreshed(way: Way) -> None:
    """`stale_while_revalidate`: the old value answers; that element alone is computed again."""

    def counted(x: Any) -> Any:
        RUNS.append(x)
        return [len(RUNS)] * len(x)

    load = way.cached(counted, each="x", stale_while_revalidate=60)
    way.call(load, (1, 2))
    load.expire(x=[2])
    assert way.call(load, (1, 2)) == [1, 1]
    memo.runtime.blocking.drain_blocking(5)
    assert way.call(load, (1, 2)) == [1, 2]
    assert RUNS == [(1, 2), (2,)]


# --- invalidation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [2, [2], (2,), {2}])
def test_invalidation_by_element(way: Way, place: str, given: Any) -> None:
    """An element, by itself or in a collection, drops its entry and no other."""
    load = way.cached(squares, each="x")
    way.call(load, [1, 2, 3])
    done = load.invalidate(x=given)
    assert done.matched == 1
    way.call(load, [1, 2, 3])
    assert RUNS == [[1, 2, 3], [2]]


def test_invalidation_of_several_and_of_all() -> None:
    """Several elements drop several entries; no argument drops all."""
    load = Way("sync").cached(squares, each="x")
    load([1, 2, 3])
    assert load.invalidate([1, 3]).matched == 2
    load([1, 2, 3])
    load.invalidate()
    load([1, 2, 3])
    assert RUNS == [[1, 2, 3], [1, 3], [1, 2, 3]]


def test_addresses_tags_and_prefixes_are_those_of_elements() -> None:
    """The address and the tags of an entry have its element in the place of the collection."""
    load = cache(version="1", key_prefix="squares", tags=["no:{x}"], each="x")(squares)
    load([1, 2, 3])
    assert load.address([2]) == load.address(2) == "squares:2"
    memo.invalidate(key="squares:2")
    load([1, 2, 3])
    memo.invalidate(tag="no:3")
    load([1, 2, 3])
    memo.invalidate(key=load.key(1))
    load([1, 2, 3])
    assert RUNS == [[1, 2, 3], [2], [3], [1]]


def test_after_an_update() -> None:
    """`invalidate_cache(functions=, match=)` with a collection drops its elements."""
    load = Way("sync").cached(squares, each="x")

    @memo.invalidate_cache(functions=[load], match=["x"])
    def update(x: list[int]) -> None:
        """Update some."""

    load([1, 2, 3])
    update([1, 2])
    load([1, 2, 3])
    assert RUNS == [[1, 2, 3], [1, 2]]


def test_an_element_invalidated_while_it_is_computed(way: Way) -> None:
    """It is not stored; the others are."""

    def invalidating(x: Any) -> Any:
        RUNS.append(x)
        if len(RUNS) == 1:
            load.invalidate(x=2)
        return [one * one for one in x]

    load = way.cached(invalidating, each="x")
    way.call(load, [1, 2, 3])
    way.call(load, [1, 2, 3])
    assert RUNS == [[1, 2, 3], [2]]


def test_files_by_element(way: Way, tmp_path: Any) -> None:
    """A dependency with the element in its name concerns that element alone."""
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)

    def read(x: Any) -> Any:
        RUNS.append(x)
        return [(tmp_path / one).read_text() for one in x]

    load = way.cached(read, each="x", depends_on=f"{tmp_path}/{{x}}")
    assert way.call(load, ["a", "b"]) == ["a", "b"]
    (tmp_path / "b").write_text("changed")
    assert way.call(load, ["a", "b"]) == ["a", "changed"]
    assert RUNS == [["a", "b"], ["b"]]


def test_what_is_built_on_elements_goes_with_them() -> None:
    """An outer result depends on the elements that it used, and on no others."""
    load = Way("sync").cached(squares, each="x")

    @cache(name="tests:total", version="1")
    def total(x: list[int]) -> int:
        return sum(load(x)) + 1000 * len(RUNS)

    first = total([1, 2])
    load([3])
    load.invalidate(x=3)
    assert total([1, 2]) == first
    load.invalidate(x=2)
    assert total([1, 2]) != first


def test_inner_reads_concern_every_element_of_a_run() -> None:
    """Results that a run read through other cached functions count for all of its elements."""

    @cache(name="tests:factor", version="1")
    def factor() -> int:
        return 2

    load = Way("sync").cached(lambda x: RUNS.append(x) or [factor() * one for one in x], each="x")
    load([1, 2])
    factor.invalidate()
    assert load([2]) == [4]
    assert RUNS == [[1, 2], [2]]


# --- several calls at once ------------------------------------------------------------------------


class Slow:
    """Computes slowly enough that calls overlap; tells what ran."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.go = threading.Event()

    def __call__(self, x: Any) -> Any:
        RUNS.append(x)
        self.begun.set()
        assert self.go.wait(20)
        return [one * one for one in x]


SLOW = Slow()


def slowly(x: Any) -> Any:
    return SLOW(x)


@pytest.mark.parametrize("lock", [False, True])
def test_overlapping_calls_compute_no_element_twice(way: Way, place: str, lock: bool) -> None:
    """Of two calls that overlap each computes what the other does not, and both get everything."""
    SLOW.__init__()  # type: ignore[misc]
    load = way.cached(slowly, each="x", use_lock=lock)
    if way.name == "async":

        async def main() -> list[Any]:
            first = asyncio.create_task(load([1, 2, 3]))
            await asyncio.to_thread(SLOW.begun.wait, 20)
            second = asyncio.create_task(load([2, 3, 4]))
            await await_until(lambda: len(RUNS) == 2)
            SLOW.go.set()
            return list(await asyncio.gather(first, second))

        answers = asyncio.run(main())
    else:
        answers = [None, None]

        def call(at: int, x: list[int]) -> None:
            answers[at] = load(x)

        threads = [threading.Thread(target=call, args=(0, [1, 2, 3]))]
        threads[0].start()
        assert SLOW.begun.wait(20)
        threads.append(threading.Thread(target=call, args=(1, [2, 3, 4])))
        threads[1].start()
        until(lambda: len(RUNS) == 2)
        SLOW.go.set()
        for thread in threads:
            thread.join(20)
    assert answers == [[1, 4, 9], [4, 9, 16]]
    assert RUNS == [[1, 2, 3], [4]]


def test_calls_that_cross_do_not_wait_for_each_other(way: Way) -> None:
    """Calls with the same elements in other orders all end; each element is computed once."""
    load = way.cached(squares, each="x", use_lock=True)
    orders = [[1, 2, 3, 4], [4, 3, 2, 1], [2, 4, 1, 3], [3, 1, 4, 2]]
    answers = way.together(*(lambda x=x: load(x) for x in orders))
    assert answers == [[one * one for one in x] for x in orders]
    assert sorted(one for run in RUNS for one in run) == [1, 2, 3, 4]


def test_processes_compute_no_element_twice(place: str, tmp_path: Any) -> None:
    """With `use_lock` two processes whose calls overlap compute each element once."""
    import json
    import os
    import subprocess
    import sys

    log = tmp_path / "log"
    program = (
        "import json, sys, time, memo\n"
        "url, log, start = sys.argv[1:4]\n"
        "if url: memo.configure(redis_url=url)\n"
        "@memo.cache(name='tests:load', version='1', each='x', use_lock=True)\n"
        "def load(x):\n"
        "    open(log, 'a').write(''.join(f'{one}\\n' for one in x))\n"
        "    time.sleep(0.3)\n"
        "    return [one * one for one in x]\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "print(json.dumps(load(list(range(int(start), int(start) + 20)))))\n"
    )
    url = memo.settings.configuration.current().redis_url or ""
    running = [
        subprocess.Popen(
            [sys.executable, "-c", program, url, str(log), start],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=dict(os.environ),
        )
        for start in ("0", "10", "5")
    ]
    for one in running:
        assert one.stdout is not None
        assert one.stdout.readline() == "ready\n"
    outputs = []
    for one in running:
        assert one.stdin is not None
        one.stdin.write("go\n")
        one.stdin.flush()
    for one in running:
        outputs.append(json.loads(one.communicate(timeout=60)[0]))
    assert outputs[0] == [n * n for n in range(20)]
    assert outputs[1] == [n * n for n in range(10, 30)]
    lines = sorted(map(int, log.read_text().split()))
    assert lines == list(range(30))


def test_a_cancelled_caller_leaves_the_others_alone() -> None:
    """A caller that is cancelled leaves the run to others that wait for some of its elements."""

    async def main() -> Any:
        go = asyncio.Event()

        @cache(name="tests:load", version="1", each="x")
        async def load(x: list[int]) -> list[int]:
            RUNS.append(x)
            await go.wait()
            return [one * one for one in x]

        first = asyncio.create_task(load([1, 2]))
        await await_until(lambda: bool(RUNS))
        second = asyncio.create_task(load([2]))
        await joined(1)
        first.cancel()
        await asyncio.wait([first])
        go.set()
        return await second

    assert asyncio.run(main()) == [4]
    assert RUNS == [[1, 2]]


def test_a_run_without_callers_is_stopped() -> None:
    """When the last caller is cancelled the function is cancelled too."""
    stopped: list[bool] = []

    async def main() -> None:
        @cache(name="tests:load", version="1", each="x")
        async def load(x: list[int]) -> list[int]:
            RUNS.append(x)
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                stopped.append(True)
                raise
            return x

        task = asyncio.create_task(load([1, 2]))
        await await_until(lambda: bool(RUNS))
        task.cancel()
        await await_until(lambda: bool(stopped))

    asyncio.run(main())
    assert stopped == [True]


def test_a_run_that_asks_for_its_own_element(way: Way) -> None:
    """A run that asks for an element of its own is refused; for others it is served."""

    def inner(x: Any) -> Any:
        RUNS.append(list(x))
        return [one + sum(load([one - 1])) if one > 1 else one for one in x]

    load = Way("sync").cached(inner, each="x")
    assert load([4]) == [10]
    assert RUNS == [[4], [3], [2], [1]]
    endless = Way("sync").cached(lambda x: endless(x), each="x", name="tests:endless")
    with pytest.raises(ReentryError):
        endless([1, 2])


@pytest.mark.parametrize("operation", ["acall", "apeek", "ais_cached", "aexplain"])
async def test_other_tasks_run_between_elements(
    operation: str, set_limits: Callable[..., None]
) -> None:
    """Many elements are handled in steps, so that they do not block the event loop."""

    @cache(ttl=60, version="1", each="x")
    async def load(x: Any) -> Any:
        return squares(x)

    wanted, answer = list(range(200)), squares(range(200))
    await load(wanted)
    set_limits(step_seconds=0)
    with counted_turns() as turns:
        await getattr(load, operation, load)(wanted)
    assert turns.count >= len(wanted)
    assert await load(wanted) == answer


@pytest.mark.parametrize("operation", ["acall", "arefresh", "aput"])
async def test_other_tasks_run_between_stored_elements(
    operation: str, set_limits: Callable[..., None]
) -> None:
    """Many results are stored in steps, so that they do not block the event loop."""

    @cache(ttl=60, version="1", each="x")
    async def load(x: Any) -> Any:
        return squares(x)

    set_limits(step_seconds=0, entries_per_step=10)
    wanted, stored_at = list(range(50)), Counter[int]()
    given = (squares(wanted), wanted) if operation == "aput" else (wanted,)
    with counted_turns() as turns:
        forget = memo.on_event(lambda e: stored_at.update([turns.count] * (e.kind == "stored")))
        await getattr(load, operation, load)(*given)
        forget()
    assert stored_at.total() == len(wanted)
    assert max(stored_at.values()) == 10
    assert await load(wanted) == squares(wanted)


async def test_many_used_results_are_merged_in_a_thread() -> None:
    """Many stamps of what a result was built on are merged in a thread."""

    @cache(ttl=60, version="1", each="x", tags=["square:{x}"])
    async def load(x: Any) -> Any:
        return squares(x)

    @cache(ttl=60, version="1")
    async def total(n: int) -> int:
        return sum(await load(range(n)))

    with calls_of(UsedCalls.merge_with, with_block, note=lambda _: threading.get_ident()) as merged:
        assert await total(GENERATIONS_PER_STEP) == sum(squares(range(GENERATIONS_PER_STEP)))
    assert threading.get_ident() not in merged


# --- the rest of the surface ----------------------------------------------------------------------


def test_methods() -> None:
    """Methods work alike, for each object."""

    class Client:
        def __init__(self, factor: int) -> None:
            self.factor = factor

        @cache(version="1", each="ids")
        def get(self, region: str, ids: list[int], *, unit: str = "m") -> list[int]:
            RUNS.append(ids)
            return [self.factor * one for one in ids]

    two, three = Client(2), Client(3)
    assert two.get("EU", [1, 2]) == [2, 4]
    assert three.get("EU", ids=[2, 1]) == [6, 3]
    assert two.get("EU", [2, 3]) == [4, 6]
    two.get.invalidate(ids=[2])
    assert three.get("EU", [2]) == [6]
    two.get("EU", [1, 2, 3])
    assert RUNS == [[1, 2], [2, 1], [3], [2]]


def test_peek_and_put_and_is_cached(way: Way, place: str) -> None:
    """The helpers speak of all elements of a call."""
    load = way.cached(squares, each="x")
    assert load.peek([1], default="none") == "none"
    load.put([1, 4], [1, 2])
    assert load.peek([2, 1]) == [4, 1]
    assert load.is_cached([1, 2])
    assert not load.is_cached([1, 3])
    assert "the nearest entry" in str(load.explain([1, 3]))
    assert load.explain([1, 2]).hit
    assert "plan:" in str(load.explain([1, 3], plan=True))
    assert RUNS == []
    with pytest.raises(OptionError, match="1 results for 2 elements"):
        load.put([1], [1, 2])


def test_what_was_peeked_at_is_not_gone_back_behind() -> None:
    """After a peek at a newer result an older one that is stored does not answer (I2)."""

    @cache(each="x", name="tests:load", version="1", ttl=None)
    def load(x: list[int]) -> list[int]:
        RUNS.append(x)
        return [len(RUNS)] * len(x)

    def disk() -> Any:
        return next(tier for tier in assembly.default_chain().tiers if tier.name == "disk")

    with memo.configure(memory_limit=0):
        load([1])
        name = assembly.default_chain().name(load.function_id, load.key(1))
        older = bytes(blocking(lambda port: disk().lookup(port, name)).record)
        assert load.refresh([1]) == [2]
        assembly.reset()  # a process that has given no answers yet
        assert load.peek([1]) == [2]
        blocking(lambda port: disk().store(port, name, older, None, None))
        assert load([1]) == [3]


@pytest.mark.parametrize(
    "options", [{"ttl": lambda _: 10**10}, {"cache_if": lambda _: 1 / 0}], ids=["ttl", "cache_if"]
)
def test_a_callable_that_keeps_elements_from_being_stored(options: Any) -> None:
    """A mistake of a user's `ttl` or `cache_if` is reported once, and costs no result (I12)."""
    load = cache(each="x", name="tests:load", version="1", **options)(squares)
    with pytest.warns(UserWarning, match=r"cannot be stored .*computed at each call") as caught:
        assert load([1, 2]) == [1, 4]
    assert len(caught) == 1
    with recording() as heard:
        assert load([1, 2]) == [1, 4]
    assert [event.reason for event in heard if event.kind == "error"] == ["store"] * 2
    assert RUNS == [[1, 2]] * 2


def test_refresh(way: Way) -> None:
    """`refresh` computes all elements in one run, whatever is stored."""
    load = way.cached(squares, each="x")
    way.call(load, [1])
    assert load.refresh([1, 2]) == [1, 4]
    way.call(load, [1, 2])
    assert RUNS == [[1], [1, 2]]


def test_modes(way: Way) -> None:
    """In "only" every element is needed, in "off" none; "refresh" computes all."""
    load = way.cached(squares, each="x")
    way.call(load, [1])
    with memo.mode("only"):
        assert way.call(load, [1]) == [1]
        with pytest.raises(NotCachedError, match="x is 2; the nearest entry has 1"):
            way.call(load, [1, 2])
    with memo.mode("off"):
        way.call(load, [1, 3])
    with memo.mode("refresh"):
        way.call(load, [1, 2])
    assert RUNS == [[1], [1, 3], [1, 2]]
    assert not load.is_cached([3])


@pytest.mark.parametrize("mode", [None, "off", "refresh"])
def test_a_stop_iteration_of_the_function(mode: Any) -> None:
    """It reaches the caller, in every mode."""

    @cache(each="x")
    def load(x: Any) -> Any:
        raise StopIteration("mine")

    with pytest.raises(StopIteration, match="mine"):
        load.using(mode=mode)([1, 2])


def test_where_nothing_is_cached(way: Way) -> None:
    """With `enabled=False` every call and every refresh is the function's own."""
    load = way.cached(squares, each="x")
    with memo.configure(enabled=False):
        assert way.call(load, [1]) == load.refresh([1]) == [1]
        assert load.peek([1], default="none") == "none"
    assert RUNS == [[1], [1]]


class Slow:
    """An element whose key takes a second."""

    def __init__(self, number: int, clock: ManualClock) -> None:
        self.number, self.clock = number, clock

    def __memo_key__(self) -> int:
        self.clock.advance(1)
        return self.number


def test_elements_of_one_run_begin_when_it_does() -> None:
    """A slow key does not make an element older than the run: it could then hide a later one."""
    clock, begun = ManualClock(), []

    @cache(each="x", ttl=60)
    async def load(x: list[Slow]) -> list[int]:
        begun.append(clock.wall_ns())
        return [one.number for one in x]

    with isolated(clock=clock):
        asyncio.run(load([Slow(number, clock) for number in range(3)]))
        chain = assembly.default_chain()
        prefix = chain.prefix(load.function_id)
        headers = [header for header, _ in blocking(lambda port: list_headers(port, chain, prefix))]
    assert {header.times.started for header in headers} == set(begun)
    assert len(headers) == 3


def test_ttl_of_elements() -> None:
    """Elements age one by one."""
    clock = ManualClock()
    with isolated(clock=clock):
        load = cache(name="tests:load", version="1", ttl=10, each="x")(squares)
        load([1])
        clock.advance(6)
        load([1, 2])
        clock.advance(6)
        load([1, 2])
    assert RUNS == [[1], [2], [1]]


def test_key_needs_one_element() -> None:
    """A key or an address is that of one element."""
    load = Way("sync").cached(squares, each="x")
    with pytest.raises(OptionError, match="must be a single element"):
        load.key([1, 2])


def test_a_wrong_call_raises_as_the_function_would(way: Way) -> None:
    """A call that does not fit is a TypeError."""
    load = way.cached(squares, each="x")
    with pytest.raises(TypeError, match="y"):
        way.call(load, [1], y=2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"each": "y"}, "each='y': is not a parameter of its own; the parameters are: x"),
        ({"each": ""}, "must be a text"),
        ({"each": "x", "ignore": ["x"]}, "is ignored"),
        ({"each": "x", "replay": True}, "replay=True: cannot be combined with each="),
        ({"each": "x", "cache_errors": {KeyError: 1}}, "cannot be combined with each="),
        ({"each": "x", "soft_timeout": 1, "stale_if_error": 1}, "cannot be combined with each="),
    ],
)
def test_wrong_options(options: Any, said: str) -> None:
    """Each mistake is an error at decoration that says what to write."""
    with pytest.raises(OptionError, match=said):
        cache(**options)(squares)


def test_many_elements(place: str) -> None:
    """A thousand elements are stored and found, the second time without a run."""
    load = Way("sync").cached(squares, each="x")
    wanted = list(range(1000))
    assert load(wanted) == load(wanted) == [one * one for one in wanted]
    assert len(RUNS) == 1


@pytest.mark.parametrize("memory_limit", [0, 1 << 24])
def test_elements_share_round_trips(way: Way, redis_server: RedisServer, memory_limit: int) -> None:
    """A hit of 400 elements reads the groups that they name a few times, not 400 times."""
    memo.configure(redis_url=redis_server.url, memory_limit=memory_limit, deadline=5)
    load = way.cached(squares, each="x")
    wanted = list(range(400))
    way.call(load, wanted)
    way.call(load, wanted)
    client = redis_server.client()
    client.config_resetstat()
    with recording() as events:
        assert way.call(load, wanted) == [one * one for one in wanted]
    assert kinds(events) == ["hit"] * 400
    stats = client.info("commandstats")
    assert stats["cmdstat_hmget"]["calls"] < 60
    assert stats.get("cmdstat_get", {"calls": 0})["calls"] == (0 if memory_limit else 400)


@pytest.mark.parametrize("memory_limit", [0, 1 << 24])
def test_missing_elements_share_round_trips(
    way: Way, redis_server: RedisServer, memory_limit: int
) -> None:
    """400 elements are looked up in vain and stored in a few round trips, not in 800."""
    memo.configure(redis_url=redis_server.url, memory_limit=memory_limit, deadline=5)
    load = way.cached(squares, each="x")
    way.call(load, [1000])
    client = redis_server.client()
    before = client.info("stats")["total_reads_processed"]
    with recording() as events:
        assert way.call(load, list(range(400))) == [one * one for one in range(400)]
    # of 400 elements: a server may read what was sent at once in several pieces
    assert client.info("stats")["total_reads_processed"] - before < 600
    assert [event.tier for event in events if event.kind == "stored"] == ["redis,disk"] * 400 or (
        memory_limit
    )
    fresh_process()
    assert way.call(load, list(range(400))) == [one * one for one in range(400)]
    assert len(RUNS) == 2


@pytest.mark.parametrize("strategy", ["write_through", "write_around"])
def test_elements_are_stored_while_redis_is_away(redis_server: RedisServer, strategy: Any) -> None:
    """Then the disk alone keeps them; that Redis did not is told once, not for each element."""
    memo.configure(redis_url=redis_server.url, memory_limit=0, write_strategy=strategy)
    load = Way("sync").cached(squares, each="x")
    load([1])
    redis_server.kill()
    with recording() as events:
        load(list(range(2, 102)))
    assert {event.tier for event in events if event.kind == "stored"} == {"disk"}
    assert sum(event.kind in ("error", "tier_down") for event in events) < 110  # of lookups
    redis_server.restart()
    before = len(RUNS)
    with memo.configure(tiers=["disk"]):
        load(list(range(2, 102)))
    assert len(RUNS) == before


def test_a_big_element_among_small_ones(way: Way, place: str) -> None:
    """An element with a payload is stored by itself, the others together."""
    import numpy as np

    load = way.cached(
        lambda x: RUNS.append(x) or [np.full(50_000, one) if one == 3 else one for one in x],
        each="x",
    )
    way.call(load, [1, 2, 3, 4])
    fresh_process()
    answer = way.call(load, [1, 2, 3, 4])
    assert [answer[0], answer[1], answer[3]] == [1, 2, 4]
    np.testing.assert_array_equal(answer[2], np.full(50_000, 3))
    assert RUNS == [[1, 2, 3, 4]]


def test_an_element_that_cannot_be_pickled(way: Way) -> None:
    """It is computed at each call, and the others are stored."""

    def locks(x: Any) -> Any:
        RUNS.append(x)
        return [threading.Lock() if one == 2 else one for one in x]

    load = way.cached(locks, each="x")
    with pytest.warns(UserWarning, match="cannot be pickled"):
        way.call(load, [1, 2, 3])
    way.call(load, [1, 2, 3])
    assert RUNS == [[1, 2, 3], [2]]


def test_elements_that_are_asked_together_when_redis_goes(
    way: Way, redis_server: RedisServer
) -> None:
    """If Redis does not answer, they are hits of the disk; an event says why."""
    memo.configure(redis_url=redis_server.url, memory_limit=0, deadline=5)
    load = way.cached(squares, each="x")
    wanted = list(range(300))
    way.call(load, wanted)
    redis_server.kill()
    with recording() as events:
        assert way.call(load, wanted) == [one * one for one in wanted]
    assert len(RUNS) == 1
    assert {event.tier for event in events if event.kind == "hit"} == {"disk"}
    assert {"error", "tier_down"} & {event.kind for event in events}
    redis_server.restart()
