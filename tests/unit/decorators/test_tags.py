"""Tags: fixed, templates of the arguments, and callables that may look at the result."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

import memo
from memo import OptionError, cache

RUNS: dict[str, int] = {}


@pytest.fixture(autouse=True)
def fresh_counts() -> None:
    RUNS.clear()


def loads(tags: Any, **options: Any) -> Any:
    @cache(name="shop:load", version="1", tags=tags, **{"ttl": None, **options})
    def load(uid: int, region: str = "EU") -> dict[str, Any]:
        RUNS["n"] = RUNS.get("n", 0) + 1
        return {"uid": uid, "owner": uid * 10, "n": RUNS["n"]}

    return load


ONE = {
    "template": (["all", "user:{uid}"], "user:1"),
    "two placeholders": (["{region}/{uid}"], "EU/1"),
    "literal braces": (["{{x}}:{uid}"], "{x}:1"),
    "callable": (lambda uid, region: [f"user:{uid}"], "user:1"),
    "callable of some": (lambda uid: [f"user:{uid}"], "user:1"),
    "result template": (["owner:{result[owner]}"], "owner:10"),
    "callable of the result": (lambda result: [f"owner:{result['owner']}"], "owner:10"),
    "of both": (lambda uid, result: [f"{uid}:{result['owner']}"], "1:10"),
}


@pytest.mark.parametrize("kind", ONE)
def test_a_tag_reaches_what_has_it(where: Any, kind: str) -> None:
    """An invalidation by a tag drops the entries that have it, and no other."""
    tags, tag = ONE[kind]
    with where:
        load = loads(tags)
        load(1), load(2)
        assert load.is_cached(1)
        assert memo.invalidate(tag=tag).matched == 1
        assert (load.is_cached(1), load.is_cached(2)) == (False, True)
        load(1)
        assert load.is_cached(1)


@pytest.mark.parametrize(
    "wrong", [["user:{id}"], ["user:{uid"], ["user:{0}"], lambda other: [], "x"]
)
def test_a_wrong_tag_is_an_error_at_decoration(wrong: Any) -> None:
    """An unknown placeholder, or one that is none, is refused and names the option."""
    with pytest.raises(OptionError, match="tags="):
        loads(wrong)


def test_an_invalidation_while_it_runs_counts(where: Any) -> None:
    """A tag of the result that is invalidated while the function runs keeps it from being kept."""
    running, over = threading.Event(), threading.Event()

    @cache(ttl=None, version="1", name="shop:slow", tags=lambda result: [f"owner:{result}"])
    def slow(uid: int) -> int:
        RUNS["n"] = RUNS.get("n", 0) + 1
        if RUNS["n"] == 1:
            running.set()
            assert over.wait(10)
        return uid * 10

    with where:
        thread = threading.Thread(target=slow, args=(1,))
        thread.start()
        assert running.wait(10)
        memo.invalidate(tag="owner:10")
        over.set()
        thread.join()
        assert not slow.is_cached(1)
        assert slow(1) == slow(1) == 10
        assert RUNS == {"n": 2}


async def test_tags_of_a_coroutines_result() -> None:
    """They work on `async def`."""

    @cache(ttl=None, version="1", name="shop:aload", tags=["owner:{result}"])
    async def load(uid: int) -> int:
        await asyncio.sleep(0)
        return uid * 10

    assert await load(1) == 10
    assert await load.ais_cached(1)
    assert (await memo.ainvalidate(tag="owner:10")).matched == 1
    assert not await load.ais_cached(1)


def test_tags_of_the_result_reach_what_is_built_on_it() -> None:
    """An outer result goes with the inner one."""
    load = loads(["owner:{result[owner]}"])

    @cache(ttl=None, version="1", name="shop:report")
    def report() -> int:
        return int(load(1)["n"])

    assert report() == report() == 1
    memo.invalidate(tag="owner:10")
    assert report() == 2


def test_tags_that_raise_lose_nothing() -> None:
    """A callable of the result that raises is an event; the caller gets the result."""
    load = loads(lambda result: [result["missing"]])
    with memo.testing.recording() as heard:
        assert load(1)["uid"] == 1
    assert [event.reason for event in heard if event.kind == "error"] == ["tags"]
    assert not load.is_cached(1)


def test_tags_of_what_is_put() -> None:
    """A value that is put has the tags of a result."""
    load = loads(["owner:{result[owner]}"])
    load.put({"owner": 7, "uid": 1, "n": 0}, 1)
    assert load.is_cached(1)
    assert memo.invalidate(tag="owner:7").matched == 1
