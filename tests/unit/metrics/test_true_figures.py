"""Figures are true to the clock: each is compared with a stopwatch."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from typing import Any

import pytest
from inside import joined
from time_ahead import Ahead

import memo
from memo import cache
from memo.decorators import assembly
from memo.metrics import rendering
from memo.metrics.recorder import open_span, reset
from memo.runtime.blocking import BLOCKING, drain_blocking, drive
from memo.testing import ManualClock, isolated

NEAR = 0.25
"""Seconds that a busy machine may add; less than any wrong figure is off."""


@pytest.fixture(autouse=True)
def _from_zero() -> None:
    """Count from zero, after a call for which modules are imported and files are made."""

    @cache(version="1", name="first")
    def first() -> None: ...

    @cache(version="1", name="afirst")
    async def afirst() -> None: ...

    first()
    asyncio.run(afirst())
    reset()


def timed(call: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def test_sharing_a_computation_saves_no_waiting(ahead: Ahead) -> None:
    """Nine callers that wait for one computation each waited for it: nothing was saved."""

    @cache(version="1")
    async def load(x: int) -> int:
        await joined(8)
        ahead.work(0.5)
        return x

    async def main() -> float:
        begun = time.perf_counter()
        await asyncio.gather(*(load(1) for _ in range(9)))
        return time.perf_counter() - begun

    took = asyncio.run(main())
    total = memo.stats().total
    assert (total.misses, total.coalesced) == (1, 8)
    assert total.saved < 0.1
    assert total.compute_seconds == pytest.approx(took, abs=NEAR)


def test_a_late_joiner_saves_the_rest(ahead: Ahead) -> None:
    """A caller that joins half-way saves the half that it did not wait for."""

    @cache(version="1")
    async def load(x: int) -> int:
        ahead.work(0.4)
        half.set()
        await joined(1)
        ahead.work(0.4)
        return x

    async def main() -> None:
        first = asyncio.ensure_future(load(1))
        await half.wait()
        begun = time.perf_counter()
        await load(1)
        waits.append(time.perf_counter() - begun)
        await first

    waits: list[float] = []
    half = asyncio.Event()
    asyncio.run(main())
    assert memo.stats().total.saved == pytest.approx(0.8 - waits[0], abs=NEAR)


def test_computing_is_exclusive(ahead: Ahead) -> None:
    """Time that an outer call spends in cached calls is theirs; the sum is the clock's."""

    @cache(version="1")
    def inner(x: int) -> int:
        ahead.work(0.3)
        return x

    @cache(version="1")
    def outer() -> int:
        ahead.work(0.2)
        return inner(1) + inner(2)

    took = timed(outer)
    parts = {name.rpartition(".")[2]: part for name, part in memo.stats().functions.items()}
    assert parts["outer"].compute_seconds == pytest.approx(0.2, abs=NEAR)
    assert parts["inner"].compute_seconds == pytest.approx(0.6, abs=NEAR)
    assert memo.stats().total.compute_seconds == pytest.approx(took, abs=NEAR)


def test_concurrent_inner_calls_count_once_for_the_outer(ahead: Ahead) -> None:
    """Three inner calls at once are one stretch of the outer call's time, not three."""

    @cache(version="1")
    async def inner(x: int) -> int:
        if await together.wait() == 0:
            ahead.work(0.4)
        await together.wait()
        return x

    @cache(version="1")
    async def outer() -> None:
        await asyncio.gather(inner(1), inner(2), inner(3))
        ahead.work(0.3)

    together = asyncio.Barrier(3)
    asyncio.run(outer())
    parts = {name.rpartition(".")[2]: part for name, part in memo.stats().functions.items()}
    assert parts["outer"].compute_seconds == pytest.approx(0.3, abs=NEAR)
    assert parts["inner"].compute_seconds == pytest.approx(1.2, abs=2 * NEAR)


def test_a_hit_saves_what_the_caller_would_have_waited(ahead: Ahead) -> None:
    """A hit on the outer call saves its whole time once, its inner calls included."""

    @cache(version="1")
    def inner(x: int) -> int:
        ahead.work(0.3)
        return x

    @cache(version="1")
    def outer() -> int:
        ahead.work(0.2)
        return inner(1)

    took = timed(outer)
    again = timed(outer)
    assert memo.stats().total.saved == pytest.approx(took - again, abs=NEAR)


def test_a_stale_answer_saves_once(ahead: Ahead) -> None:
    """A stale answer saves its cost; its refresh, in the background, nothing."""

    @cache(version="1")
    def inner() -> int:
        ahead.work(0.4)
        return 1

    @cache(version="1", ttl=0.3, stale_while_revalidate=60)
    def outer() -> int:
        return inner()

    clock = ManualClock()
    with isolated(clock=clock):
        took = timed(outer)
        clock.advance(0.35)
        again = timed(outer)
        assert drain_blocking(10)
    total = memo.stats().total
    assert total.stale == 1
    assert total.saved == pytest.approx(took - again, abs=NEAR)


def test_a_cache_that_is_slower_than_the_function_saves_nothing() -> None:
    """Time saved is never negative."""

    @cache(version="1")
    def quick(x: int) -> int:
        return x

    for _ in range(3):
        quick(1)
    assert memo.stats().total.saved >= 0
    assert "\u2212" not in repr(memo.stats())


def test_the_headline_adds_up() -> None:
    """Hits, stale hits, misses and shared computations are all of the calls."""

    @cache(version="1")
    async def load(x: int) -> int:
        await released.wait()
        return x

    async def call(keys: list[int], joining: int) -> None:
        released.clear()
        calls = asyncio.gather(*map(load, keys))
        await joined(joining)
        released.set()
        await calls

    async def main() -> None:
        await call([0, 1, 2] * 4, joining=9)
        await call([0, 1, 2, 3] * 2, joining=1)

    released = asyncio.Event()
    asyncio.run(main())
    words = rendering.headline(memo.stats())
    found = re.findall(r"(\d+) (?:hits?|miss(?:es)?|stale|shared)", words)
    assert sum(map(int, found)) == 20, words


def test_a_report_of_a_cell_that_only_computed_saves_nothing(ahead: Ahead) -> None:
    """The line under a cell of concurrent callers does not claim what they waited for."""

    @cache(version="1")
    async def load(x: int) -> int:
        await joined(8)
        ahead.work(0.3)
        return x

    async def main() -> None:
        await asyncio.gather(*(load(1) for _ in range(9)))

    span = open_span()
    asyncio.run(main())
    span.end()
    said = rendering.report(span)
    saved = re.search(r"saved ([\d.]+) (ms|µs|s)", said)
    assert saved is None or saved[2] != "s", said


def test_without_redis_nothing_waits_for_it() -> None:
    """Invalidations are not said to be under way to a Redis that is not there."""

    @cache(version="1")
    def load(x: int) -> int:
        return x

    load(1)
    load.invalidate(1)
    memo.invalidate(tag="never")
    health = drive(assembly.default_chain().health(BLOCKING))
    assert health["host"]["journal"] == 0


def test_after_new_settings_no_tier_is_called_down() -> None:
    """A Redis that was refused is not called down once the settings name none."""

    @cache(version="1")
    def load(x: int) -> int:
        return x

    with memo.configure(redis_url="redis://127.0.0.1:1"):
        load(1)
        assert memo.stats().tiers["redis"].up is False
    load(2)
    assert memo.stats().tiers["redis"].up is None


def test_an_expired_hit_is_said_to_be_expired() -> None:
    """`explain` counts no time that is left where none is."""

    @cache(version="1", ttl=0.05, stale_while_revalidate=60)
    def load(x: int) -> int:
        return x

    clock = ManualClock()
    with isolated(clock=clock):
        load(1)
        clock.advance(0.1)
        said = str(load.explain(1))
    assert "\u2212" not in said
    assert "-" not in said.partition("fresh for")[2][:3]
    assert re.search(r"expired [\d.]+ m?s ago", said)


def test_a_miss_after_an_edit_is_counted_as_one() -> None:
    """The figures say "code changed" in the same cases as `explain`, and only then."""

    def defined(step: int) -> Any:
        if step == 1:

            @cache(name="edited")
            def first(x: int) -> int:
                return x + 1

            return first

        @cache(name="edited")
        def second(x: int) -> int:
            return x + 2

        return second

    before = defined(1)
    before(1)
    start = memo.stats()
    assert start.functions["edited"].misses_by_reason == {"not cached yet": 1}
    after = defined(2)
    assert after.explain(1).reason == "code changed"
    after(1)
    after(5)
    counted = {"not cached yet": 1, "code changed": 1}
    now = memo.stats()
    assert (now - start).functions["edited"].misses_by_reason == counted
    assert now.total.misses == 3
    with memo.report() as span:
        after(1)
    assert span.stats.total.misses == 0, "what is found out later belongs to no later stretch"
    assert "code changed 1" in repr(memo.stats("edited"))
