"""`explain(plan=True)`: what would run beneath a call, without running anything."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import pytest

import memo
from memo.testing import recording

RUNS: Counter[str] = Counter()
RAW: dict[str, int] = {}


class Pipeline:
    """`report` over `clean` of each region over `raw`; the last two perhaps with cutoff."""

    def __init__(self, cutoff: bool) -> None:
        RUNS.clear()
        RAW.update(EU=11, US=21)

        @memo.cache(ttl=None, version="1", cutoff=cutoff)
        def raw(region: str) -> int:
            RUNS["raw"] += 1
            return RAW[region]

        @memo.cache(ttl=None, version="1", cutoff=cutoff)
        def clean(region: str) -> int:
            RUNS["clean"] += 1
            return raw(region) % 10

        @memo.cache(ttl=None, version="1")
        def report() -> int:
            RUNS["report"] += 1
            return clean("EU") + clean("US")

        self.raw, self.clean, self.report = raw, clean, report
        report()
        RUNS.clear()

    def plan(self) -> list[tuple[int, str, str]]:
        steps = self.report.explain(plan=True).steps
        return [(step.depth, step.does, step.call.rpartition(".")[2]) for step in steps]


@pytest.fixture(params=["disk", "redis over disk"], autouse=True)
def _place(request: pytest.FixtureRequest) -> None:
    if request.param != "disk":
        memo.configure(redis_url=request.getfixturevalue("redis_server").url)


def test_a_hit_needs_nothing_beneath() -> None:
    """A call that would hit is one step."""
    assert Pipeline(cutoff=True).plan() == [(0, "hit", "report")]


@pytest.mark.parametrize("cutoff", [False, True])
def test_what_an_invalidated_call_would_use(cutoff: bool) -> None:
    """Beneath what would be computed stands what it used last time, hits included."""
    pipeline = Pipeline(cutoff)
    pipeline.clean.invalidate("EU")
    pipeline.report.invalidate()
    assert pipeline.plan() == [
        (0, "compute", "report"),
        (1, "compute", "clean:EU"),
        (2, "hit", "raw:EU"),
        (1, "hit", "clean:US"),
    ]
    assert not RUNS


def test_without_cutoff_everything_above_is_computed() -> None:
    """An invalidated load means its whole branch."""
    pipeline = Pipeline(cutoff=False)
    pipeline.raw.invalidate("EU")
    assert pipeline.plan() == [
        (0, "compute", "report"),
        (1, "compute", "clean:EU"),
        (2, "compute", "raw:EU"),
        (1, "hit", "clean:US"),
    ]


def test_a_mode_counts_for_the_calls_beneath() -> None:
    """Entries that are too old for the current mode are computed, at every depth."""
    pipeline = Pipeline(cutoff=False)
    time.sleep(0.02)
    with memo.mode(max_age=0.01):
        assert {does for _, does, _ in pipeline.plan()} == {"compute"}
    assert pipeline.plan() == [(0, "hit", "report")]


def test_a_plan_comes_true() -> None:
    """The plan names exactly the calls that run; nothing is computed, stored or counted for it."""
    pipeline = Pipeline(cutoff=True)
    pipeline.raw.invalidate("EU")
    with recording() as events:
        expected = [call for _, does, call in pipeline.plan() if does == "compute"]
    assert events == []
    with recording() as events:
        pipeline.report()
    ran = [event.function.rpartition(".")[2] for event in events if event.kind == "computed"]
    assert expected == ["raw:EU"]
    assert ran == ["raw"]


def test_it_says_how_long_that_took() -> None:
    """Each step has the seconds of the last computation; a call never made has none."""
    pipeline = Pipeline(cutoff=True)
    pipeline.raw.invalidate("EU")
    said = str(pipeline.report.explain(plan=True))
    assert "plan:\n    revalidate " in said
    assert said.count("last time") == 3
    steps = pipeline.raw.explain("DE", plan=True).steps
    assert [(step.does, step.seconds) for step in steps] == [("compute", None)]


def test_after_an_edit_it_knows_what_was_used() -> None:
    """A call whose code changed is planned by its last entry with the same arguments."""
    pipeline = Pipeline(cutoff=True)

    def redefined(**options: Any) -> Any:
        @memo.cache(ttl=None, name=pipeline.report.function_id, **options)
        def report() -> int:
            return pipeline.clean("EU") + pipeline.clean("US")

        return report

    steps = redefined(version="2").explain(plan=True).steps
    assert [(step.depth, step.does) for step in steps] == [(0, "compute"), (1, "hit"), (1, "hit")]
    assert steps[0].seconds is not None


def test_an_edit_beneath_is_planned() -> None:
    """Calls beneath whose code changed too are computed, and the plan says so."""

    def define(factor: int) -> tuple[Any, Any]:
        def helper(x: int) -> int:
            return x * factor

        @memo.cache(ttl=None, name="tests:inner", cutoff=True)
        def inner(x: int) -> int:
            RUNS["inner"] += 1
            return helper(x)

        @memo.cache(ttl=None, name="tests:outer")
        def outer() -> int:
            RUNS["outer"] += 1
            return inner(1) + inner(2)

        return outer, inner

    RUNS.clear()
    define(1)[0]()
    outer, inner = define(2)
    RUNS.clear()
    steps = outer.explain(plan=True).steps
    wanted = [("compute", "outer"), ("compute", "inner:1"), ("compute", "inner:2")]
    assert [(step.does, step.call) for step in steps] == wanted
    assert {step.reason for step in steps} == {"code changed"}
    inner(2)
    steps = outer.explain(plan=True).steps
    assert [step.does for step in steps] == ["compute", "compute", "hit"]
    RUNS.clear()
    assert outer() == 6
    assert RUNS == {"outer": 1, "inner": 1}
    assert [step.does for step in outer.explain(plan=True).steps] == ["hit"]


def test_an_argument_of_that_name_is_the_functions() -> None:
    """Of a function that has an argument `plan`, that is meant."""

    @memo.cache
    def load(plan: str) -> str:
        return plan

    load("a")
    assert load.explain(plan="a").hit
    assert not load.explain(plan="b").hit


def test_of_an_async_function() -> None:
    """`aexplain` has it as well."""
    import asyncio

    @memo.cache(ttl=None, version="1")
    async def load(x: int) -> int:
        return x

    async def main() -> Any:
        await load(1)
        return (await load.aexplain(1, plan=True)).steps

    assert [step.does for step in asyncio.run(main())] == ["hit"]
