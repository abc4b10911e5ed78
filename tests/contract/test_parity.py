"""Every guarantee, the same for `def`, for `async def`, and for `def` from several threads."""

from __future__ import annotations

import threading
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from inner_faults import failing
from providers import InADict
from styles import STYLES, Style

import memo
from memo.runtime import events
from memo.testing import ManualClock, isolated, recording

pytestmark = pytest.mark.parametrize("style", STYLES, ids=repr)


def kinds(seen: list[events.Event]) -> Counter[str]:
    return Counter(event.kind for event in seen)


def test_second_call_is_a_hit(style: Style) -> None:
    """A result is computed once and then returned from the cache."""
    runs: list[int] = []

    def load(x: int) -> dict[str, int]:
        runs.append(x)
        return {"x": x}

    f = style.cached(load)
    assert [style.call(f, 1) for _ in range(3)] == [{"x": 1}] * 3
    assert style.call(f, 2) == {"x": 2}
    assert runs == [1, 2]


def test_hit_survives_a_restart(style: Style) -> None:
    """An entry stored over one set of connections is found on disk by the next one."""
    runs: list[int] = []

    def load(x: int) -> pd.DataFrame:
        runs.append(x)
        return pd.DataFrame({"x": range(x), "y": ["a"] * x})

    f = style.cached(load, ttl=None)
    first = style.call(f, 20_000)
    memo.decorators.assembly.reset()
    pd.testing.assert_frame_equal(style.call(f, 20_000), first)
    assert runs == [20_000]


def test_none_is_a_value(style: Style) -> None:
    """None is stored like any other result."""
    runs: list[int] = []

    def load() -> None:
        runs.append(1)

    f = style.cached(load)
    assert style.call(f) is None
    assert style.call(f) is None
    assert len(runs) == 1


def test_returned_object_is_isolated(style: Style) -> None:
    """Changing a returned object changes nothing for any other caller (I8)."""

    def load() -> dict[str, list[int]]:
        return {"rows": [1, 2]}

    f = style.cached(load)
    style.call(f)["rows"].append(3)
    style.call(f)["rows"].append(4)
    assert style.call(f) == {"rows": [1, 2]}


def test_single_flight(style: Style) -> None:
    """Thirty-two callers at once run one computation, and each gets a copy of its own (I3, I8)."""
    runs: list[int] = []

    def load(x: int) -> Any:
        runs.append(x)
        yield 0.1
        return [x]

    f = style.cached(load)
    results = style.together([lambda: f(7)] * 32)
    assert results == [[7]] * 32
    assert len({id(r) for r in results}) == 32
    assert runs == [7]


def test_exception_is_the_functions_own(style: Style) -> None:
    """An exception reaches every caller and is not stored."""
    runs: list[int] = []

    def load() -> Any:
        runs.append(1)
        yield 0.5  # so that all callers join, on a busy machine too
        raise LookupError("no such region")

    f = style.cached(load)
    results = style.together([f] * 5)
    assert [str(r) for r in results] == ["no such region"] * 5
    assert all(type(r) is LookupError for r in results)
    assert len(runs) == 1
    with pytest.raises(LookupError):
        style.call(f)
    assert len(runs) == 2


def test_traceback_shows_the_users_frames(style: Style) -> None:
    """Between the caller and the user's function there is one frame of memo, not twenty."""

    def load() -> None:
        raise LookupError("here")

    f = style.cached(load)
    with pytest.raises(LookupError) as caught:
        style.call(f)
    names = [str(entry.path) for entry in caught.traceback]
    assert sum("/memo/memo/" in name or name.endswith("engine.py") for name in names) <= 1
    assert caught.traceback[-1].name == "load"


def test_unpicklable_result_is_returned(style: Style) -> None:
    """A result that cannot be pickled reaches its caller, with one warning (I5)."""

    def load() -> Any:
        return threading.Lock()

    f = style.cached(load)
    with warnings.catch_warnings(record=True) as caught, recording() as seen:
        warnings.simplefilter("always")
        assert hasattr(style.call(f), "acquire")
        assert hasattr(style.call(f), "acquire")
    assert len([w for w in caught if "cannot be pickled" in str(w.message)]) == 1
    assert kinds(seen)[events.COMPUTED] == 2


def test_expires(style: Style) -> None:
    """Past its ttl a result is computed again."""
    clock = ManualClock()
    runs: list[int] = []

    def load() -> int:
        runs.append(1)
        return len(runs)

    f = style.cached(load, ttl=60)
    with isolated(clock=clock), recording() as seen:
        assert style.call(f) == 1
        clock.advance(59)
        assert style.call(f) == 1
        clock.advance(2)
        assert style.call(f) == 2
    assert [e.reason for e in seen if e.kind == events.MISS] == ["not cached yet", "expired"]


def test_wall_clock_that_steps_does_not_age(style: Style) -> None:
    """A step of the wall clock makes nothing older and nothing younger (I9)."""
    clock = ManualClock()
    runs: list[int] = []

    def load() -> int:
        runs.append(1)
        return len(runs)

    f = style.cached(load, ttl=60)
    with isolated(clock=clock):
        style.call(f)
        clock.step(-86_400)
        clock.advance(59)
        assert style.call(f) == 1
        clock.advance(2)
        assert style.call(f) == 2
        assert style.call(f) == 2, "what began before an earlier answer, by its clock, is no hit"


def test_stale_while_revalidate(style: Style) -> None:
    """In the stale window the old value answers at once and is refreshed behind it."""
    clock = ManualClock()
    runs: list[int] = []

    def load() -> Any:
        runs.append(1)
        number = len(runs)
        yield 0.0
        return number

    f = style.cached(load, ttl=60, stale_while_revalidate=60)
    with isolated(clock=clock), recording() as seen:
        assert style.call(f) == 1
        clock.advance(61)
        answers = _until(style, f, 2)
        assert answers[0] == 1
        assert set(answers) == {1, 2}
    counted = kinds(seen)
    assert counted[events.REFRESH_DONE] == 1
    assert len(runs) == 2


def _until(style: Style, f: Any, wanted: Any) -> list[Any]:
    """Call until the answer is `wanted`; all answers."""
    answers: list[Any] = []
    if style.is_async:

        async def poll() -> None:
            while not answers or answers[-1] != wanted:
                answers.append(await f())
                await memo.drain(5)
                assert len(answers) < 1000

        import asyncio

        asyncio.run(poll())
        return answers
    end = time.monotonic() + 10
    while not answers or answers[-1] != wanted:
        answers.append(style.call(f))
        memo.runtime.blocking.drain_blocking(5)
        assert time.monotonic() < end, answers
    return answers


def test_refresh_ahead(style: Style) -> None:
    """From the threshold on a fresh value answers at once and is refreshed behind it."""
    clock = ManualClock()
    runs: list[int] = []

    def load() -> int:
        runs.append(1)
        return len(runs)

    f = style.cached(load, ttl=100, refresh_ahead=True, refresh_threshold=0.5)
    with isolated(clock=clock):
        assert style.call(f) == 1
        clock.advance(49)
        assert style.call(f) == 1
        assert len(runs) == 1
        clock.advance(2)
        assert _until(style, f, 2)[0] == 1


def test_stale_if_error(style: Style) -> None:
    """In its window the old value stands in for an exception, and only there."""
    clock = ManualClock()
    fail = threading.Event()  # has no sound key, so it is no input of the function

    def load() -> str:
        if fail.is_set():
            raise ConnectionError("source is away")
        return "old"

    f = style.cached(load, ttl=10, stale_if_error=20)
    with isolated(clock=clock):
        assert style.call(f) == "old"
        fail.set()
        clock.advance(15)
        assert style.call(f) == "old"
        clock.advance(20)
        with pytest.raises(ConnectionError):
            style.call(f)


def test_invalidation_during_the_computation_wins(style: Style) -> None:
    """A computation that an invalidation overtook answers no later call (I1)."""
    runs: list[int] = []

    def load() -> int:
        runs.append(1)
        if len(runs) == 1:
            f.invalidate()
        return len(runs)

    f = style.cached(load)
    style.call(f)
    assert style.call(f) == 2
    assert style.call(f) == 2


def test_partial_invalidation(style: Style) -> None:
    """`f.invalidate(region="EU")` drops what has that argument, and nothing else."""
    runs: list[tuple[str, int]] = []

    def load(region: str, year: int = 2026) -> int:
        runs.append((region, year))
        return len(runs)

    f = style.cached(load)
    for region in ("EU", "US"):
        for year in (2025, 2026):
            style.call(f, region, year)
    del runs[:]
    f.invalidate(region="EU")
    for region in ("EU", "US"):
        for year in (2025, 2026):
            style.call(f, region, year)
    assert runs == [("EU", 2025), ("EU", 2026)]
    del runs[:]
    f.invalidate("US")
    f.invalidate("EU", 2025)
    for region in ("EU", "US"):
        for year in (2025, 2026):
            style.call(f, region, year)
    assert runs == [("EU", 2025), ("US", 2025), ("US", 2026)]


def test_transitive_invalidation(style: Style) -> None:
    """Invalidating an inner result invalidates the outer one, also if the inner call was a hit."""
    runs: list[str] = []

    def raw(region: str) -> str:
        runs.append(f"raw {region}")
        return region

    inner = style.cached(raw)

    def report(region: str) -> Any:
        runs.append(f"report {region}")
        data = yield inner(region)
        return f"report on {data}"

    outer = style.cached(report)
    for region in ("EU", "US"):
        style.call(inner, region)
        style.call(outer, region)
    del runs[:]
    inner.invalidate(region="EU")
    for region in ("EU", "US"):
        style.call(outer, region)
    assert runs == ["report EU", "raw EU"]


def test_what_is_named_goes(style: Style) -> None:
    """An address, a prefix, a tag and the function reach what they name, and nothing else."""
    runs: list[int] = []

    def load(x: int) -> int:
        runs.append(x)
        return x

    f = style.cached(load, key_prefix="rows", tags=lambda x: [f"tag{x}"])
    targets: list[tuple[dict[str, Any], list[int]]] = [
        ({"key": "rows:1"}, [1]),
        ({"tag": "tag2"}, [2]),
        ({"prefix": "rows"}, [1, 2]),
        ({"function": f}, [1, 2]),
    ]
    for target, gone in targets:
        style.call(f, 1), style.call(f, 2)
        del runs[:]
        assert memo.invalidate(**target).complete
        style.call(f, 1), style.call(f, 2)
        assert runs == gone, target


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("address", {"key_resolver": lambda result, x: f"rows:{x}"}),
        ("several", {"key_resolver": lambda result, **more: [str(more["x"]), result]}),
        ("match", {"match": ["x"]}),
        ("tags", {"tags": ["tag1"]}),
    ],
)
def test_an_update_drops_what_it_names(style: Style, name: str, options: dict[str, Any]) -> None:
    """`invalidate_cache` drops it when the function has returned, and nothing when it raised."""
    f = style.cached(lambda x: x, key_prefix="rows", tags=lambda x: [f"tag{x}"], name="rows")
    given = {**options, **({"functions": [f]} if name == "match" else {})}
    given |= {"key_prefix": "rows"} if "key_resolver" in options else {}

    def update(x: int, fail: bool = False) -> Any:
        yield 0.0
        assert f.is_cached(1)
        if fail:
            raise LookupError(x)
        return "rows:9"

    g = memo.invalidate_cache(**given)(style.written(update))
    style.call(f, 1), style.call(f, 2), style.call(f, 9)
    with pytest.raises(LookupError):
        style.call(g, 1, fail=True)
    assert [f.is_cached(x) for x in (1, 2)] == [True, True]
    assert style.call(g, 1) == "rows:9"
    assert [f.is_cached(x) for x in (1, 2)] == [False, True]
    assert f.is_cached(9) == (name != "several")


def test_a_source_that_changes(style: Style, tmp_path: Path) -> None:
    """A file or a callable in `depends_on` invalidates the entry when it changes."""
    path = tmp_path / "data.csv"
    path.write_text("1")
    state = {"version": 1}

    f = style.cached(
        lambda: path.read_text(), version="1", depends_on=[path, lambda: state["version"]]
    )
    assert style.call(f) == "1"
    path.write_text("22")
    assert style.call(f) == "22"
    assert f.is_cached()
    state["version"] = 2
    assert not f.is_cached()


def test_keys_by_hand(style: Style) -> None:
    """`key_resolver`, `ignore`, `version` and `name` make keys, whatever kind of function it is."""
    runs: list[int] = []

    def load(x: int, verbose: bool = False) -> int:
        runs.append(x)
        return x

    ways: list[Any] = [{"key_resolver": "{x}"}, {"key_resolver": ["x"]}, {"ignore": ["verbose"]}]
    for at, options in enumerate(ways):
        del runs[:]
        f = style.cached(load, name=f"one{at}", **options)
        g = style.cached(load, name=f"another{at}", **options)
        style.call(f, 1), style.call(f, 1, verbose=True), style.call(g, 1)
        assert runs == [1, 1], options
    one, two = (style.cached(load, name="pinned", version=version) for version in "12")
    style.call(one, 1)
    assert one.is_cached(1)
    assert not two.is_cached(1)


def test_looking_and_refreshing(style: Style) -> None:
    """`peek` never computes, `is_cached` says what it would find, `refresh` computes and stores."""
    runs: list[int] = []

    def load(x: int) -> list[int]:
        runs.append(x)
        return [x, len(runs)]

    f = style.cached(load)
    assert f.peek(1, default="none") == "none"
    assert not f.is_cached(1)
    assert runs == []
    assert f.refresh(1) == [1, 1]
    assert f.refresh(1) == [1, 2]
    assert f.peek(1) == style.call(f, 1) == [1, 2]
    f.cache_clear()
    assert not f.is_cached(1)


@pytest.mark.parametrize("error", [False, True], ids=["value", "error"])
def test_what_was_joined_counts(style: Style, error: bool) -> None:
    """A computation that waited for another's result is built on that: invalidating reaches it."""
    begun = threading.Event()

    def raw() -> Any:
        begun.set()
        yield 0.3
        if error:
            raise LookupError("not yet")
        return "raw"

    inner = style.cached(raw, version="1")

    def report() -> Any:
        while not begun.is_set():
            yield 0.001
        try:
            found = yield inner()
        except LookupError as caught:
            found = str(caught)
        return f"report on {found}"

    outer = style.cached(report, version="1")
    with recording() as seen:
        style.together([inner, outer])
    assert kinds(seen)[events.COALESCED] == 1
    assert outer.is_cached()
    inner.invalidate()
    assert not outer.is_cached()


def test_an_old_value_in_place_of_an_error_counts(style: Style) -> None:
    """A result built on a `stale_if_error` answer goes when that entry is invalidated."""
    clock = ManualClock()
    fail = threading.Event()

    def raw() -> str:
        if fail.is_set():
            raise ConnectionError("source is away")
        return "old"

    inner = style.cached(raw, version="1", ttl=10, stale_if_error=100)

    def report() -> Any:
        return f"report on {(yield inner())}"

    outer = style.cached(report, version="1", ttl=100, stale_while_revalidate=100)
    with isolated(clock=clock):
        style.call(inner)
        fail.set()
        clock.advance(20)
        assert style.call(outer) == "report on old"
        assert outer.peek(default="nothing") == "report on old"  # stored, as stale as it is
        inner.invalidate()
        assert outer.peek(default="nothing") == "nothing"


def test_a_fault_of_memo_itself_loses_no_result(style: Style) -> None:
    """If memo fails before the function ran, each caller computes for itself (I5)."""

    def load(x: int) -> Any:
        yield 0.05
        return [x]

    f = style.cached(load)
    with failing("acquire"), recording() as seen:
        assert style.together([lambda: f(7)] * 4) == [[7]] * 4
    assert {e.reason for e in seen if e.kind == events.ERROR} == {"engine"}
    assert style.call(f, 7) == [7]
    assert f.is_cached(7)


def test_an_update_reaches_stores_of_ones_own(style: Style) -> None:
    """`invalidate_cache` reaches every store in use, and one that only `provider` names."""
    mine, unused = InADict(), InADict()
    f = style.cached(lambda x: x, key_prefix="rows", provider=mine, name="mine")
    g = style.cached(lambda x: x, key_prefix="rows", name="default")
    style.call(f, 1), style.call(g, 1)
    style.call(memo.invalidate_cache(key_prefix="rows")(style.written(lambda: None)))
    assert not f.is_cached(1)
    assert not g.is_cached(1)
    named = memo.invalidate_cache(key_prefix="rows", provider=unused)
    style.call(named(style.written(lambda: None)))
    assert [key.partition(":p:rows")[1] for key in unused.store] == [":p:rows"] * 2


def test_reentry_is_an_error(style: Style) -> None:
    """A computation that asks for its own result gets a typed error at once."""

    def load(x: int) -> Any:
        return (yield f(x))

    f = style.cached(load)
    begun = time.perf_counter()
    with pytest.raises(memo.ReentryError, match=r"of (\S*:)?\S*load asks for its own result"):
        style.call(f, 1)
    assert time.perf_counter() - begun < 5


def test_recursion_with_other_arguments(style: Style) -> None:
    """Cached recursion works to depth 500."""
    if style.is_async:

        @memo.cache
        async def depth(n: int) -> int:
            return 0 if n == 0 else 1 + await depth(n - 1)

    else:

        @memo.cache
        def depth(n: int) -> int:
            return 0 if n == 0 else 1 + depth(n - 1)

    assert style.call(depth, 500) == 500


def test_cache_if(style: Style) -> None:
    """A result that the predicate refuses is returned and not stored."""
    runs: list[int] = []

    def load() -> list[int]:
        runs.append(1)
        return []

    f = style.cached(load, cache_if=bool)
    assert style.call(f) == []
    assert style.call(f) == []
    assert len(runs) == 2


def test_disabled(style: Style) -> None:
    """With `enabled=False` every call computes, and nothing is read or stored."""
    runs: list[int] = []

    def load() -> int:
        runs.append(1)
        return len(runs)

    f = style.cached(load)
    with memo.configure(enabled=False):
        assert style.call(f) == 1
        assert style.call(f) == 2
    assert style.call(f) == 3


def test_stop_iteration_of_the_user(style: Style) -> None:
    """A user's StopIteration reaches the caller as Python would have it."""

    def load() -> None:
        raise StopIteration("mine")

    f = style.cached(load)
    expected: type[Exception] = RuntimeError if style.is_async else StopIteration
    with pytest.raises(expected):
        style.call(f)


def test_ten_line_provider(style: Style) -> None:
    """A user's own store of ten lines works, invalidations included."""
    runs: list[int] = []
    provider = InADict()

    def load(x: int) -> pd.Series:
        runs.append(x)
        return pd.Series(range(x))

    f = style.cached(load, provider=provider)
    for n in (3, 50_000):
        style.call(f, n)
        pd.testing.assert_series_equal(style.call(f, n), pd.Series(range(n)))
    assert runs == [3, 50_000]
    f.invalidate(3)
    style.call(f, 3)
    style.call(f, 50_000)
    assert runs == [3, 50_000, 3]
    assert all(isinstance(v, bytes) for v in provider.store.values())


def test_broken_provider_never_reaches_the_caller(style: Style) -> None:
    """Any error of a provider still leaves the caller its result (I5)."""

    class Broken(InADict):
        async def get(self, *call: Any, **options: Any) -> Any:
            raise OSError("away")

        set = delete = clear = get

    f = style.cached(lambda x: x, provider=Broken())
    assert style.call(f, 5) == 5
    assert style.call(f, 5) == 5
