"""Soft invalidation: `memo.expire` and `f.expire` let entries expire, and stale windows apply."""

from __future__ import annotations

import inspect
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
from providers import InADict
from time_ahead import Ahead

import memo
from memo import cache
from memo.runtime.blocking import drain_blocking

RUNS: dict[str, int] = {}


@pytest.fixture(autouse=True)
def fresh_counts() -> None:
    RUNS.clear()


def loads(**options: Any) -> Any:
    @cache(name="shop:soft_load", version="1", **{"ttl": None, **options})
    def load(region: str, year: int = 2024) -> int:
        RUNS["n"] = RUNS.get("n", 0) + 1
        return RUNS["n"]

    return load


HOW: dict[str, Callable[[Any], Any]] = {
    "function": lambda f: f.expire(),
    "arguments": lambda f: f.expire(region="EU"),
    "call": lambda f: f.expire("EU", 2024),
    "tag": lambda f: memo.expire(tag="sales"),
    "prefix": lambda f: memo.expire(prefix="shops"),
    "name": lambda f: memo.expire(function="soft_load"),
    "address": lambda f: memo.expire(key=f.address("EU")),
    "key": lambda f: memo.expire(key=f.key("EU")),
}


@pytest.mark.parametrize("how", HOW)
def test_the_old_value_is_served_while_it_is_refreshed(where: Any, how: str) -> None:
    """Within `stale_while_revalidate` an expired entry answers once more, and one refresh runs."""
    with where:
        load = loads(stale_while_revalidate=60, tags=["sales"], key_prefix="shops")
        assert load("EU") == 1
        done = HOW[how](load)
        assert (done.matched, repr(done).split()[0]) == (1, "expired")
        with memo.testing.recording() as heard:
            assert load("EU") == 1
            assert drain_blocking(10)
        kinds = [event.kind for event in heard]
        assert (kinds.count("stale"), kinds.count("refresh_done")) == (1, 1)
        assert load("EU") == 2
        assert load.is_cached("EU")


def test_an_expired_entry_that_still_answers_is_counted(where: Any) -> None:
    """Invalidating or expiring it matches it, also by itself; one without a window is gone."""
    with where:
        load, plain = loads(stale_while_revalidate=60, tags=["old"]), loads(tags=["gone"])
        load("EU"), plain("EU")
        memo.expire(tag="old"), memo.expire(tag="gone")
        assert memo.expire(tag="old", strict=True).matched == 1
        assert load.is_cached("EU")
        assert load.invalidate("EU").matched == 1
        assert (memo.invalidate(tag="old").matched, memo.invalidate(tag="gone").matched) == (0, 0)


@pytest.mark.parametrize("how", HOW)
def test_without_a_window_it_is_computed_anew(where: Any, how: str) -> None:
    """Without a stale window nothing old is served; what was stored since is good."""
    with where:
        load = loads(tags=["sales"], key_prefix="shops")
        assert load("EU") == 1
        HOW[how](load)
        assert not load.is_cached("EU")
        assert load("EU") == load("EU") == 2


def test_others_do_not_expire(where: Any) -> None:
    """Only entries that include the arguments expire."""
    with where:
        load = loads()
        load("EU"), load("US")
        load.expire(region="EU")
        assert (load.is_cached("EU"), load.is_cached("US")) == (False, True)


@pytest.mark.parametrize("first", ["invalidate", "expire"])
def test_an_invalidation_is_stronger_whatever_comes_first(where: Any, first: str) -> None:
    """An entry invalidated before or after it expired is not served, in any stale window."""
    with where:
        load = loads(stale_while_revalidate=60, stale_if_error=60)
        assert load("EU") == 1
        calls = [load.invalidate, load.expire]
        for call in calls if first == "invalidate" else calls[::-1]:
            call(region="EU")
        assert load("EU") == 2


def test_an_expired_value_answers_when_computing_raises(where: Any) -> None:
    """`stale_if_error` serves the expired value if the function raises."""
    broken: dict[str, bool] = {}

    @cache(ttl=None, stale_if_error=60, version="1", name="shop:broken")
    def load() -> str:
        if broken:
            raise OSError
        return "old"

    with where:
        assert load() == "old"
        broken["now"] = True
        load.expire()
        assert load() == "old"
        load.invalidate()
        with pytest.raises(OSError):
            load()


def test_what_was_built_on_it_expires_too(where: Any) -> None:
    """An outer entry has expired when what it was built on has, and its own window applies."""
    load = loads()

    @cache(ttl=None, version="1", name="shop:report", stale_while_revalidate=60)
    def report() -> int:
        return 10 * load("EU")

    with where:
        assert report() == 10
        load.expire()
        assert report() == 10
        assert drain_blocking(10)
        assert report() == 20


async def test_the_awaitable_twins() -> None:
    """`aexpire` of a function and of the module do the same inside an event loop."""
    runs: dict[str, int] = {}

    @cache(ttl=None, version="1", name="shop:soft_aload", stale_while_revalidate=60)
    async def load() -> int:
        runs["n"] = runs.get("n", 0) + 1
        return runs["n"]

    assert await load() == 1
    assert (await load.aexpire()).matched == 1
    assert await load() == 1
    assert await memo.drain(10)
    assert await load() == 2
    assert (await memo.aexpire(function="soft_aload")).matched == 1
    assert await load() == 2
    assert await memo.drain(10)
    assert await load() == 3


def test_another_process_expires(where: Any) -> None:
    """An entry that another process expires has expired here."""
    load = loads()
    with where:
        load("EU")
        url = memo.settings.configuration.current().redis_url
        code = (
            f"import memo; memo.configure(redis_url={url!r}, deadline=5); "
            "print(memo.expire(function='shop:soft_load').matched)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout == "1\n", done.stderr
        assert load("EU") == 2


def test_a_store_of_ones_own() -> None:
    """With a store of four methods the whole group expires."""
    load = loads(provider=InADict(), stale_while_revalidate=60)
    assert load("EU") == 1
    load.expire(region="EU")
    assert load("EU") == 1
    assert drain_blocking(10)
    assert load("EU") == 2


def test_a_result_computed_meanwhile_is_stored_as_expired() -> None:
    """Expired while it was computed, a result answers within the window, and one refresh runs."""
    under_way, go_on = threading.Event(), threading.Event()

    @cache(ttl=None, version="1", name="shop:meanwhile", stale_while_revalidate=60)
    def load() -> int:
        RUNS["n"] = mine = RUNS.get("n", 0) + 1
        if mine == 1:
            under_way.set()
            go_on.wait(5)
        return mine

    answers: list[int] = []
    caller = threading.Thread(target=lambda: answers.append(load()))
    caller.start()
    assert under_way.wait(5)
    load.expire()
    go_on.set()
    caller.join()
    assert answers == [1]
    with memo.testing.recording() as heard:
        assert load() == 1
        assert drain_blocking(10)
    assert heard[0].kind == "stale"
    assert load() == RUNS["n"] == 2


def test_the_window_begins_when_it_expires(ahead: Ahead) -> None:
    """However old an entry is, its window is counted from when it was let expire."""
    load = loads(stale_while_revalidate=60)
    assert load("EU") == 1
    load.expire()
    ahead.advance(61)
    assert load("EU") == 2


def test_the_window_begins_by_the_clock_of_the_cache() -> None:
    """With a clock that a test has moved, an entry that has just expired is within its window."""
    load, clock = loads(stale_while_revalidate=60), memo.testing.ManualClock()
    with memo.testing.isolated(clock=clock):
        value = load("EU")
        clock.advance(3600)
        load.expire()
        assert load.peek("EU", default=None) == value
        clock.advance(61)
        assert load.peek("EU", default=None) is None


def test_the_window_begins_with_the_first_expiry() -> None:
    """An entry that expired for its argument gets no second window when its function expires."""
    load, clock = loads(stale_while_revalidate=60), memo.testing.ManualClock()
    with memo.testing.isolated(clock=clock):
        value = load("EU")
        load.expire(region="EU")
        clock.advance(50)
        load.expire()
        assert load.peek("EU", default=None) == value
        clock.advance(11)
        assert load.peek("EU", default=None) is None
        load.refresh("EU")
        load.expire()
        assert load.peek("EU", default=None) == value + 1


def test_a_step_of_the_wall_clock_does_not_lengthen_the_window() -> None:
    """I9: the age of the entry also tells how long ago it expired, whatever the wall clock says."""
    load, clock = loads(stale_while_revalidate=60, ttl=86_400), memo.testing.ManualClock()
    with memo.testing.isolated(clock=clock):
        value = load("EU")
        clock.advance(100)
        load.expire()
        clock.advance(50)
        clock.step(-3600)
        assert load.peek("EU", default=None) == value
        clock.advance(11)
        assert load.peek("EU", default=None) is None


def test_an_expiry_at_a_time_that_has_not_come_leaves_no_window() -> None:
    """If the wall clock was far ahead when an entry expired, no old value is served."""
    load, clock = loads(stale_while_revalidate=60), memo.testing.ManualClock()
    with memo.testing.isolated(clock=clock):
        load("EU")
        clock.step(3600)
        load.expire()
        clock.step(-3600)
        assert load.peek("EU", default=None) is None


def test_explain_says_who_let_it_expire(where: Any) -> None:
    """`explain` names the soft invalidation with its reason, and does not blame the ttl."""
    load = loads()
    with where:
        load("EU")
        load.expire(region="EU", reason="new data")
        told = str(load.explain("EU"))
        assert "miss (expired)" in told
        assert "expired for this region" in told
        assert "new data" in told


def test_the_four_take_the_same_options() -> None:
    """`invalidate`, `expire` and their awaitable forms have one signature, with real types."""
    family = (memo.invalidate, memo.ainvalidate, memo.expire, memo.aexpire)
    first, *others = map(inspect.signature, family)
    assert list(first.parameters) == ["prefix", "tag", "function", "key", "reason", "strict"]
    assert [one.parameters for one in others] == [first.parameters] * 3
    assert all(one.annotation != "Any" for one in first.parameters.values())
    load = loads()
    methods = (load.invalidate, load.ainvalidate, load.expire, load.aexpire)
    of_load = [inspect.signature(one).parameters for one in methods]
    assert list(of_load[0]) == ["region", "year", "reason"]
    assert of_load == of_load[:1] * 4


def test_an_entry_is_fresh_for_less_than_its_ttl() -> None:
    """When its age is the ttl, it has expired."""
    clock = memo.testing.ManualClock()

    @memo.cache(ttl=10)
    def load() -> int:
        return 1

    with memo.testing.isolated(clock=clock):
        load()
        clock.advance(9.999)
        assert load.is_cached()
        clock.advance(0.001)
        assert not load.is_cached()
