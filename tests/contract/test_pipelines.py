"""Pipelines: every feature in every way of calling, on one host and on two.

Each test goes through one feature as a user would, and moves on to another process, or to the
other host, between its steps (`site.elsewhere`).  What a feature does in odd cases is tested beside
the module that does it.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from ways import PAIRS, Site, Way, fresh_process

import memo
from memo.testing import ManualClock, recording

KEY = "k" * 40
RUNS: Counter[str] = Counter()
RAW: dict[str, int] = {}
pytestmark = pytest.mark.parametrize(
    ("way", "site"), PAIRS, indirect=True, ids=map(" on ".join, PAIRS)
)


@pytest.fixture(autouse=True)
def _emptied() -> None:
    RUNS.clear()
    RAW.clear()
    RAW.update(EU=11, US=21)


def ran() -> list[str]:
    """The functions that ran since the last look, in order of their names."""
    names = sorted(RUNS.elements())
    RUNS.clear()
    return names


class Pipeline:
    """`report` is built on `clean` of each region, and that on `raw`: loaded, last digit, sum."""

    def __init__(self, way: Way, *options: dict[str, Any]) -> None:
        self.way = way

        async def raw(region: str) -> int:
            RUNS[f"raw {region}"] += 1
            return RAW[region]

        async def clean(region: str) -> int:
            RUNS[f"clean {region}"] += 1
            loaded: int = await way.ask(self.raw, region)
            return loaded % 10

        async def report() -> int:
            RUNS["report"] += 1
            parts = [await way.ask(self.clean, region) for region in ("EU", "US")]
            return sum(parts)

        bodies = (raw, clean, report)
        given = options or ({"cutoff": True}, {"cutoff": True}, {})
        made = [way.define(body, **more) for body, more in zip(bodies, given, strict=True)]
        self.raw, self.clean, self.report = made

    def __call__(self) -> Any:
        return self.way.call(self.report)


EVERYTHING = ["clean EU", "clean US", "raw EU", "raw US", "report"]


def test_cutoff_through_two_levels(way: Way, site: Site) -> None:
    """A run stops at the level where a result is equal; an invalidation of a result is absolute."""
    pipeline = Pipeline(way)
    assert (pipeline(), ran()) == (2, EVERYTHING)
    pipeline.raw.invalidate("EU")
    site.elsewhere()
    with recording() as events:
        assert (pipeline(), ran()) == (2, ["raw EU"])
    told = [event.function for event in events if event.kind == "revalidated"]
    assert told == ["tests:clean", "tests:report"]
    site.elsewhere()
    assert (pipeline(), ran()) == (2, [])
    RAW["EU"] = 31
    pipeline.raw.invalidate()
    site.elsewhere()
    assert (pipeline(), ran()) == (2, ["clean EU", "raw EU", "raw US"])
    RAW["EU"] = 15
    pipeline.raw.invalidate("EU")
    site.elsewhere()
    assert (pipeline(), ran()) == (6, ["clean EU", "raw EU", "report"])
    pipeline.report.invalidate()
    site.elsewhere()
    assert (pipeline(), ran()) == (6, ["report"])
    pipeline.raw.invalidate("EU")
    assert way.together(*[pipeline.report] * 8) == [6] * 8
    assert ran() == ["raw EU"]


def test_a_lifetime_is_inherited(way: Way, site: Site) -> None:
    """`ttl="inherit"`: through every level, from the result that expires first."""
    clock, inherit = ManualClock(), {"ttl": "inherit"}
    site.set(clock)
    pipeline = Pipeline(way, {"ttl": 100}, inherit, inherit)
    way.call(pipeline.clean, "EU")
    clock.advance(60)
    assert (pipeline(), ran()) == (2, EVERYTHING)
    clock.advance(39)
    site.elsewhere()
    assert (pipeline(), ran()) == (2, [])
    assert "built on clean:EU, that on raw:EU, fresh for 1." in str(pipeline.report.explain())
    clock.advance(2)
    site.elsewhere()
    assert (pipeline(), ran()) == (2, ["clean EU", "raw EU", "report"])


def test_a_result_of_a_stale_answer_is_stale(way: Way, site: Site) -> None:
    """A result built on a stale answer is computed anew when that has been refreshed."""
    clock, long = ManualClock(), {"ttl": 3600}
    site.set(clock)
    pipeline = Pipeline(way, {"ttl": 60, "stale_while_revalidate": "1h"}, long, long)
    way.call(pipeline.raw, "EU")
    clock.advance(90)
    RAW["EU"] = 12
    site.elsewhere()
    assert pipeline() == 2  # of the old value of `raw`, which is refreshed meanwhile
    site.elsewhere()
    RUNS.clear()
    assert (pipeline(), ran()) == (3, ["clean EU", "report"])
    site.elsewhere()
    assert (pipeline(), ran()) == (3, [])


@pytest.mark.parametrize("check", ["time", "content"])
def test_a_file_as_a_dependency(way: Way, site: Site, tmp_path: Path, check: Any) -> None:
    """A touched file costs one load and nothing else, by content not even that; a change counts."""
    for region, number in RAW.items():
        (tmp_path / f"{region}.txt").write_text(str(number))

    def read() -> None:
        for region in RAW:
            RAW[region] = int((tmp_path / f"{region}.txt").read_text())

    depends = {"depends_on": memo.File(tmp_path / "{region}.txt", check=check), "cutoff": True}
    pipeline = Pipeline(way, depends, {}, {})
    assert (pipeline(), ran()) == (2, EVERYTHING)
    os.utime(tmp_path / "EU.txt", (1, 1))
    site.elsewhere()
    assert (pipeline(), ran()) == (2, ["raw EU"] if check == "time" else [])
    (tmp_path / "EU.txt").write_text("15")
    read()
    site.elsewhere()
    assert (pipeline(), ran()) == (6, ["clean EU", "raw EU", "report"])


def test_each_element_is_cached(way: Way, site: Site) -> None:
    """One run computes what is missing; order, duplicates and invalidations go by element."""

    async def squares(ids: list[int]) -> dict[int, int]:
        RUNS.update(f"run of {one}" for one in ids)
        return {one: one * one for one in ids if one != 5}

    async def total(ids: tuple[int, ...]) -> int:
        RUNS["total"] += 1
        return sum((await way.ask(squares_of, list(ids))).values())

    squares_of = way.define(squares, each="ids", cutoff=True)
    outer = way.define(total)
    assert way.call(squares_of, [1, 2, 2]) == {1: 1, 2: 4}
    assert ran() == ["run of 1", "run of 2"]
    site.elsewhere()
    assert list(way.call(squares_of, [3, 1, 5]).items()) == [(3, 9), (1, 1)]
    assert ran() == ["run of 3", "run of 5"]
    assert (way.call(outer, (1, 2, 3)), ran()) == (14, ["total"])
    squares_of.invalidate(ids=[2, 5])
    site.elsewhere()
    assert (way.call(outer, (1, 2, 3)), ran()) == (14, ["run of 2"])
    assert way.call(squares_of, [1, 2, 3, 5]) == {1: 1, 2: 4, 3: 9}
    assert ran() == ["run of 5"]
    squares_of.invalidate()
    answers = way.together(lambda: squares_of([1, 2, 3]), lambda: squares_of([3, 2, 4]))
    assert answers == [{1: 1, 2: 4, 3: 9}, {3: 9, 2: 4, 4: 16}]
    assert ran() == [f"run of {one}" for one in range(1, 5)]


def test_a_generator_is_replayed(way: Way, site: Site) -> None:
    """Seen while it is produced, stored when it has ended; if left or invalidated, not at all."""

    async def rows(count: int) -> AsyncIterator[bytes]:
        RUNS["begun"] += 1
        for number in range(count):
            RUNS["items"] += 1
            yield bytes([number]) * 100_000
        if count == 3:
            made.invalidate(3)

    made = way.define(rows)
    assert way.run(lambda: way.read(made(60), 2)) == [bytes([n]) * 100_000 for n in (0, 1)]
    assert dict(RUNS) == {"begun": 1, "items": 2}
    site.elsewhere()
    wanted = [bytes([number]) * 100_000 for number in range(60)]
    assert way.run(lambda: way.read(made(60))) == wanted
    assert dict(RUNS) == {"begun": 2, "items": 62}
    site.elsewhere()
    assert way.run(lambda: way.read(made(60))) == wanted
    made.invalidate(60)
    site.elsewhere()
    way.run(lambda: way.read(made(60), 1))
    assert dict(RUNS) == {"begun": 3, "items": 63}
    for _ in range(2):
        assert len(way.run(lambda: way.read(made(3)))) == 3
    assert RUNS["begun"] == 5


def test_an_exception_is_remembered(way: Way, site: Site) -> None:
    """`cache_errors`: raised again without a run, until it is invalidated."""

    async def load(x: int) -> int:
        RUNS["load"] += 1
        raise KeyError(x)

    made = way.define(load, cache_errors={LookupError: 60})
    for _ in range(2):
        with pytest.raises(KeyError, match="7"):
            way.call(made, 7)
        site.elsewhere()
    assert ran() == ["load"]
    made.invalidate(7)
    site.elsewhere()
    with pytest.raises(KeyError):
        way.call(made, 7)
    assert ran() == ["load"]


def test_a_failed_computation_is_not_tried_at_once(way: Way, site: Site) -> None:
    """`retry_after`: the old value answers, and the function rests, unless it is invalidated."""

    async def load() -> str:
        RUNS["load"] += 1
        if RUNS["load"] > 1:
            raise OSError("down")
        return "old"

    made = way.define(load, stale_if_error=600, retry_after=600)
    assert way.call(made) == "old"
    made.expire()
    site.elsewhere()
    with recording() as events:
        assert [way.call(made) for _ in range(3)] == ["old"] * 3
    reasons = [event.reason for event in events if event.kind == "stale"]
    assert reasons == ["error: OSError", "retry_after", "retry_after"]
    assert RUNS["load"] == 2
    made.invalidate()
    with pytest.raises(OSError, match="down"):
        way.call(made)


def test_the_old_value_answers_in_time(way: Way, site: Site) -> None:
    """`soft_timeout`: a slow computation goes on behind the old value, and is stored."""
    go = threading.Event()

    async def load() -> str:
        RUNS["load"] += 1
        if RUNS["load"] > 1:
            await way.wait(go)
        return f"run {RUNS['load']}"

    made = way.define(load, stale_if_error=600, soft_timeout=0.05)

    async def old() -> Any:
        try:
            return await way.ask(made)
        finally:
            go.set()

    assert way.call(made) == "run 1"
    made.expire()
    site.elsewhere()
    with recording() as events:
        assert way.run(old) == "run 1"
        site.elsewhere()
    assert [event.reason for event in events if event.kind == "stale"] == ["soft_timeout"]
    assert way.call(made) == "run 2"


def test_a_bundle_is_a_tier(way: Way, site: Site, tmp_path: Path) -> None:
    """Entries in a file answer where their key is known, and are invalidated like others."""
    path = tmp_path / "made.memo"
    pipeline = Pipeline(way)
    pipeline()
    assert memo.export_bundle(path, [pipeline.clean, pipeline.raw], key=KEY).entries == 4
    memo.decorators.assembly.reset()
    memo.configure(directory=tmp_path / "another", redis_url=None)
    with pytest.raises(memo.BundleError, match="NOT VERIFIED"):
        memo.import_bundle(path)
    RUNS.clear()
    tiers = ["memory", *([] if site.url is None else ["redis"]), "disk", memo.Bundle(path, KEY)]
    memo.configure(tiers=tiers, redis_url=site.url, namespace="another")
    assert (pipeline(), ran()) == (2, ["report"])
    pipeline.raw.invalidate("EU")
    fresh_process()
    assert (pipeline(), ran()) == (2, ["raw EU"])


def test_a_plan_comes_true(way: Way, site: Site) -> None:
    """The plan runs nothing, and names what then runs, in another process too."""
    pipeline = Pipeline(way)
    pipeline()
    pipeline.raw.invalidate("EU")
    site.elsewhere()
    RUNS.clear()
    steps = pipeline.report.explain(plan=True).steps
    assert [(step.depth, step.does, step.call) for step in steps] == [
        (0, "revalidate", "report"),
        (1, "revalidate", "clean:EU"),
        (2, "compute", "raw:EU"),
    ]
    assert all(step.seconds is not None for step in steps)
    assert ran() == []
    assert (pipeline(), ran()) == (2, ["raw EU"])
