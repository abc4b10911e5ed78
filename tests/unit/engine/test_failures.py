"""`cache_errors` and `soft_timeout`: failures and slow computations with a policy."""

from __future__ import annotations

import copyreg
import threading
import traceback
from collections.abc import Iterator
from typing import Any

import pytest
from tblib import pickling_support
from ways import Way, fresh_process, kinds

import memo
from memo import OptionError, cache
from memo.testing import ManualClock, isolated, recording

RUNS: list[Any] = []


@pytest.fixture(autouse=True)
def fresh_counts() -> None:
    RUNS.clear()


def missing(x: Any) -> Any:
    RUNS.append(x)
    raise KeyError(x)


class PickyError(Exception):
    """Does not load: its `__init__` needs more than its `args`."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code

    def __reduce__(self) -> Any:  # as Python's own, whatever a library makes of exceptions
        return PickyError, self.args


class NotThereError(Exception):
    """Its `__init__` makes the text that its `args` hold."""

    def __init__(self, number: int, *, table: str = "orders") -> None:
        super().__init__(f"{number} is not in {table}")
        self.number = number


class RefusedError(OSError):
    """Its `__init__` has other arguments than that of `OSError`."""

    __slots__ = ("where",)

    def __init__(self, where: str, *, code: int) -> None:
        super().__init__(code, f"refused by {where}")
        self.where = where


# --- cache_errors ---------------------------------------------------------------------------------


def test_an_exception_is_remembered(way: Way, place: str) -> None:
    """A matching exception is raised again without another run, also in a new process."""
    load = way.cached(missing, cache_errors={LookupError: 60})
    for _ in range(2):
        with pytest.raises(KeyError, match="7"):
            way.call(load, 7)
    fresh_process()
    with pytest.raises(KeyError) as caught:
        way.call(load, 7)
    assert RUNS == [7]
    assert "remembered by cache_errors" in caught.value.__notes__[0]


def test_a_remembered_exception_is_a_hit(way: Way, place: str) -> None:
    """It counts as a hit; `explain` says that the call raises."""
    load = way.cached(missing, cache_errors={KeyError: 60})
    with recording() as heard:
        for _ in range(2):
            with pytest.raises(KeyError):
                way.call(load, 7)
    assert kinds(heard) == ["miss", "failed", "hit"]
    assert "raises that again" in str(load.explain(7))
    assert load.peek(7, default="none") == "none"


def test_other_exceptions_are_not_remembered(way: Way) -> None:
    """Without a matching type each call runs."""
    load = way.cached(missing, cache_errors={ValueError: 60})
    for _ in range(2):
        with pytest.raises(KeyError):
            way.call(load, 7)
    assert RUNS == [7, 7]


def test_the_nearest_type_counts() -> None:
    """Each type has its ttl, and the most specific one counts, whatever their order."""
    clock = ManualClock()
    with isolated(clock=clock):
        load = cache(name="tests:load", version="1", cache_errors={LookupError: 10, KeyError: 100})(
            missing
        )
        with pytest.raises(KeyError):
            load(1)
        clock.advance(50)
        with pytest.raises(KeyError):
            load(1)
        assert RUNS == [1]
        clock.advance(51)
        with pytest.raises(KeyError):
            load(1)
        assert RUNS == [1, 1]


def test_an_error_may_outlive_the_ttl_of_results() -> None:
    """The ttl of an exception is its own, be it longer or shorter than that of results."""
    clock = ManualClock()
    with isolated(clock=clock):
        load = cache(name="tests:load", version="1", ttl=5, cache_errors={KeyError: 100})(missing)
        for _ in range(2):
            with pytest.raises(KeyError):
                load(1)
            clock.advance(50)
        assert RUNS == [1]


@pytest.mark.parametrize("drop", ["invalidate", "expire"])
def test_a_remembered_exception_is_invalidated(way: Way, place: str, drop: str) -> None:
    """An invalidation, hard or soft, drops it like any entry; no stale window keeps it."""
    load = way.cached(
        missing, cache_errors={KeyError: 60}, stale_while_revalidate=60, stale_if_error=60
    )
    for _ in range(2):
        with pytest.raises(KeyError):
            way.call(load, 7)
    getattr(load, drop)(7)
    with pytest.raises(KeyError):
        way.call(load, 7)
    assert RUNS == [7, 7]


def test_an_old_value_goes_before_the_exception(way: Way) -> None:
    """If `stale_if_error` has an old value, the exception is neither raised nor kept."""

    def flaky(x: Any) -> str:
        RUNS.append(x)
        if len(RUNS) == 2:
            raise KeyError(x)
        return f"run {len(RUNS)}"

    load = way.cached(flaky, cache_errors={KeyError: 60}, stale_if_error=60)
    assert way.call(load, 1) == "run 1"
    load.expire()
    assert way.call(load, 1) == "run 1"
    assert way.call(load, 1) == "run 3"


def test_what_was_built_on_it_is_invalidated_with_it() -> None:
    """An exception that came through an inner cached call depends on what that was built on."""

    @cache(name="tests:inner", version="1")
    def inner() -> int:
        return len(RUNS)

    @cache(name="tests:outer", version="1", cache_errors={ValueError: None})
    def outer() -> None:
        RUNS.append("outer")
        raise ValueError(inner())

    for _ in range(2):
        with pytest.raises(ValueError, match="1"):
            outer()
    inner.invalidate()
    with pytest.raises(ValueError, match="2"):
        outer()
    assert len(RUNS) == 2


def test_an_exception_that_does_not_load_is_not_kept() -> None:
    """It reaches its caller, each call runs, and one warning says why."""

    @cache(name="tests:picky", version="1", cache_errors={Exception: 60})
    def load() -> None:
        RUNS.append(1)
        raise PickyError(4, "no")

    said = "raised a PickyError that cannot be loaded again"
    with pytest.raises(PickyError), pytest.warns(UserWarning, match=said):
        load()
    with pytest.raises(PickyError):
        load()
    assert len(RUNS) == 2


@pytest.fixture(params=["", "dask is imported"])
def registrations(request: pytest.FixtureRequest) -> Iterator[None]:
    """With dask, tblib pickles all exception types of the program, each with its traceback."""
    before = dict(copyreg.dispatch_table)
    for kind in (NotThereError, RefusedError, KeyError):
        copyreg.dispatch_table.pop(kind, None)
        if request.param:
            pickling_support.install(kind)
    yield
    copyreg.dispatch_table.clear()
    copyreg.dispatch_table.update(before)


@pytest.mark.usefixtures("registrations")
@pytest.mark.parametrize(
    "error",
    [NotThereError(7, table="users"), RefusedError("db", code=13), KeyError("x")],
    ids=repr,
)
def test_an_exception_is_raised_as_it_was(error: Exception) -> None:
    """Message, `args` and attributes are the same, whatever arguments its class takes."""

    @cache(name="tests:other_arguments", version="1", cache_errors={Exception: 60})
    def load() -> None:
        RUNS.append(1)
        raise error

    names = ("args", "errno", "strerror", "number", "where")
    wanted = [str(error), *(getattr(error, name, None) for name in names)]
    for _ in range(2):
        with pytest.raises(type(error)) as caught:
            load()
        got = [str(caught.value), *(getattr(caught.value, name, None) for name in names)]
        assert got == wanted
    assert len(RUNS) == 1
    frames = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert "load" not in frames, "a traceback was stored"


def test_only_mode_raises_it(way: Way) -> None:
    """In the mode "only" a remembered exception is an answer, so it is raised."""
    load = way.cached(missing, cache_errors={KeyError: 60})
    with pytest.raises(KeyError):
        way.call(load, 1)
    with memo.mode("only"), pytest.raises(KeyError) as caught:
        way.call(load, 1)
    assert type(caught.value) is KeyError
    assert RUNS == [1]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (KeyError, "must be a mapping"),
        ([KeyError], "must be a mapping"),
        ({"KeyError": 5}, "not an exception type"),
        ({KeyboardInterrupt: 5}, "ends programs"),
        ({KeyError: 0}, r"cache_errors\[KeyError\]=0: must be more than 0"),
        ({KeyError: "5"}, "has no units"),
    ],
)
def test_wrong_cache_errors(value: Any, said: str) -> None:
    """A wrong value is refused at decoration, and the message says what to write."""
    with pytest.raises(OptionError, match=said):
        cache(cache_errors=value)


# --- soft_timeout ---------------------------------------------------------------------------------


class Slow:
    """The first run is quick; later ones wait until they are let go."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.runs = 0

    def __call__(self, x: Any) -> str:
        self.runs += 1
        run = self.runs
        if run > 1:
            assert self.go.wait(30)
        return f"run {run}"


SLOW = Slow()


@pytest.fixture
def slow() -> Any:
    SLOW.__init__()  # type: ignore[misc]
    yield SLOW
    SLOW.go.set()


def slowly(x: Any) -> str:
    return SLOW(x)


def test_callers_share_the_slow_computation(slow: Slow) -> None:
    """Callers that give up one after another have begun one computation."""
    load = Way("threads").cached(slowly, stale_if_error=60, soft_timeout=0.05)
    load(1)
    load.expire()
    assert [load(1) for _ in range(3)] == ["run 1"] * 3
    assert slow.runs == 2


def test_a_quick_computation_is_waited_for(way: Way, slow: Slow) -> None:
    """A computation that ends in time is the answer."""
    slow.go.set()
    load = way.cached(slowly, stale_if_error=60, soft_timeout=20)
    way.call(load, 1)
    load.expire()
    assert way.call(load, 1) == "run 2"


def test_an_invalidated_value_is_waited_for(slow: Slow) -> None:
    """An invalidated value does not answer, however long the computation takes."""
    load = Way("threads").cached(slowly, stale_if_error=60, soft_timeout=0.01)
    load(1)
    load.invalidate()
    threading.Timer(0.2, slow.go.set).start()
    assert load(1) == "run 2"


def test_an_old_value_that_is_invalidated_while_waiting(slow: Slow) -> None:
    """An invalidation during the wait counts: the caller gets the new value."""
    load = Way("threads").cached(slowly, stale_if_error=60, soft_timeout=0.2)
    load(1)
    load.expire()
    threading.Timer(0.05, load.invalidate).start()
    threading.Timer(0.5, slow.go.set).start()
    assert load(1) == "run 2"


def test_what_is_built_on_the_old_value_goes_with_it(slow: Slow) -> None:
    """An outer result that was built on the old value is invalidated with it."""
    load = Way("sync").cached(slowly, stale_if_error=60, soft_timeout=0.05)

    @cache(name="tests:outer", version="1")
    def outer() -> str:
        return f"of {load(1)}"

    load(1)
    load.expire()
    assert outer() == "of run 1"
    slow.go.set()
    memo.runtime.blocking.drain_blocking(10)
    load.invalidate()
    assert outer() == "of run 3"


@pytest.mark.parametrize("value", [-1, "x", True])
def test_wrong_soft_timeouts(value: Any) -> None:
    """A wrong length is refused, and so is the option without an old value to serve."""
    with pytest.raises(OptionError, match="soft_timeout"):
        cache(soft_timeout=value, stale_if_error=60)
    with pytest.raises(OptionError, match="needs stale_if_error"):
        cache(soft_timeout=5)
