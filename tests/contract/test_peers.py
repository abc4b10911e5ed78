"""README's table: each line of it, tried on memo and on the other caches."""

from __future__ import annotations

import asyncio
import functools
import itertools
import re
import textwrap
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cachier
import cashews
import joblib
import pytest
from checkout import ROOT

import memo

_numbers = itertools.count()


class Peer:
    """A cache of one kind, for sync functions; `NotImplementedError` where it has no such call."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def cached(self, function: Callable[..., Any]) -> Callable[..., Any]:
        raise NotImplementedError

    def drop(self, function: Any, *arguments: Any) -> None:
        """Invalidate one call."""
        raise NotImplementedError

    def drop_some(self, function: Any, **arguments: Any) -> None:
        """Invalidate every call with these arguments."""
        raise NotImplementedError


class Memo(Peer):
    def cached(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return memo.cache(function, ttl=None)

    def drop(self, function: Any, *arguments: Any) -> None:
        function.invalidate(*arguments)

    def drop_some(self, function: Any, **arguments: Any) -> None:
        function.invalidate(**arguments)


class Joblib(Peer):
    def cached(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return joblib.Memory(self.place, verbose=0).cache(function)

    def drop(self, function: Any, *arguments: Any) -> None:
        if function.check_call_in_cache(*arguments):
            function.call_and_shelve(*arguments).clear()


class Cashews(Peer):
    """Its functions are async: each call runs a loop to its end."""

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        self.cache = cashews.Cache()
        self.cache.setup("mem://")
        self.loop = asyncio.new_event_loop()
        self.lock = threading.Lock()

    def cached(self, function: Callable[..., Any]) -> Callable[..., Any]:
        async def inner(*args: Any) -> Any:
            return await asyncio.to_thread(function, *args)

        functools.update_wrapper(inner, function)
        found = self.cache(ttl="1h", key=f"{function.__name__}:{{region}}:{{year}}")(inner)

        def call(*args: Any) -> Any:
            return self.run(found(*args))

        call.name = function.__name__  # type: ignore[attr-defined]
        return call

    def run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(20)

    def drop(self, function: Any, *arguments: Any) -> None:
        self.run(self.cache.delete(f"{function.name}:{arguments[0]}:{arguments[1]}"))

    def drop_some(self, function: Any, **arguments: Any) -> None:
        self.run(self.cache.delete_match(f"{function.name}:{arguments['region']}:*"))


class Cachier(Peer):
    def cached(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return cachier.cachier(cache_dir=str(self.place), allow_none=True)(function)


class LruCache(Peer):
    def cached(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return functools.lru_cache(maxsize=None)(function)


class Streamlit(Peer):
    """`st.cache_data`, which works outside of an app as well."""

    def cached(self, function: Callable[..., Any]) -> Callable[..., Any]:
        import streamlit

        return streamlit.cache_data(function, show_spinner=False)

    def drop(self, function: Any, *arguments: Any) -> None:
        function.clear(*arguments)


PEERS = {
    "memo": Memo,
    "joblib": Joblib,
    "cashews": Cashews,
    "cachier": Cachier,
    "lru_cache": LruCache,
    "Streamlit": Streamlit,
}
CHOSEN = [pytest.param(n, marks=pytest.mark.frameworks if n == "Streamlit" else ()) for n in PEERS]
"""Streamlit is heavy: it comes with the extra `frameworks`."""


@pytest.fixture
def peer(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Peer]:
    made = PEERS[request.param](tmp_path / "peer")
    if isinstance(made, Cashews):
        thread = threading.Thread(target=made.loop.run_forever)
        thread.start()
        yield made
        made.loop.call_soon_threadsafe(made.loop.stop)
        thread.join()
        made.loop.run_until_complete(made.cache.close())
        made.loop.run_until_complete(made.loop.shutdown_default_executor())
        made.loop.close()
    else:
        yield made


def written(source: str, place: Path) -> dict[str, Any]:
    """A module with a file, so that every peer can read the source of its functions."""
    file = place / f"written_{next(_numbers)}.py"
    file.write_text(textwrap.dedent(source))
    module = types.ModuleType(file.stem)
    module.__file__ = str(file)
    exec(compile(file.read_text(), str(file), "exec"), vars(module))
    return vars(module)


LOAD = """
runs = []
def rate():
    return 1
def load(region, year):
    runs.append(region)
    return [region, rate()]
"""


def edited_helper(peer: Peer, place: Path) -> bool:
    """After an edit of a function that the cached one calls, the next call computes."""
    names = written(LOAD, place)
    load = peer.cached(names["load"])
    load("EU", 1)
    exec("def rate():\n    return 2", names)
    return bool(load("EU", 1)[1] == 2)


def typed_arguments(peer: Peer, place: Path) -> bool:
    """`1`, `1.0` and `"1"` are different calls."""
    names = written("def load(region, year):\n    return type(year).__name__", place)
    load = peer.cached(names["load"])
    return [load("EU", year) for year in (1, 1.0, "1")] == ["int", "float", "str"]


def own_copy(peer: Peer, place: Path) -> bool:
    """A caller that changes its result changes no other caller's."""
    load = peer.cached(written(LOAD, place)["load"])
    load("EU", 1)
    load("EU", 1).append("spoilt")
    return bool(load("EU", 1) == ["EU", 1])


def any_argument(peer: Peer, place: Path) -> bool:
    """Lists and dicts can be arguments, by their content."""
    load = peer.cached(written(LOAD, place)["load"])
    try:
        return bool(load({"a": [1]}, 1) == load({"a": [1]}, 1))
    except TypeError:
        return False


def some_arguments(peer: Peer, place: Path) -> bool:
    """All entries with `region="EU"` can be dropped, and the others stay."""
    names = written(LOAD, place)
    load = peer.cached(names["load"])
    calls = [("EU", 1), ("EU", 2), ("US", 1)]
    for call in calls:
        load(*call)
    try:
        peer.drop_some(load, region="EU")
    except NotImplementedError:
        return False
    names["runs"].clear()
    for call in calls:
        load(*call)
    return bool(names["runs"] == ["EU", "EU"])


SLOW = """
import threading
started, go_on = threading.Event(), threading.Event()
data = ["old"]
def load(region, year):
    found = data[0]
    started.set()
    go_on.wait(20)
    return found
"""


def invalidation_wins(peer: Peer, place: Path) -> bool:
    """Invalidated while it computes: the outdated result is not served afterwards."""
    names = written(SLOW, place)
    load = peer.cached(names["load"])
    thread = threading.Thread(target=load, args=("EU", 1))
    thread.start()
    names["started"].wait(20)
    names["data"][0] = "new"
    try:
        peer.drop(load, "EU", 1)
    except NotImplementedError:
        return False
    finally:
        names["go_on"].set()
        thread.join()
    return bool(load("EU", 1) == "new")


BUILT = """
data = ["old"]
def load(region, year):
    return data[0]
def report(region, year):
    return cached_load(region, year)
"""


def built_on(peer: Peer, place: Path) -> bool:
    """Invalidating a result drops what was built on it."""
    names = written(BUILT, place)
    names["cached_load"] = load = peer.cached(names["load"])
    report = peer.cached(names["report"])
    report("EU", 1)
    names["data"][0] = "new"
    try:
        peer.drop(load, "EU", 1)
    except NotImplementedError:
        return False
    return bool(report("EU", 1) == "new")


def one_call(peer: Peer, place: Path) -> bool:
    """One call can be dropped by its arguments, and the others stay."""
    names = written(LOAD, place)
    load = peer.cached(names["load"])
    load("EU", 1), load("US", 1)
    try:
        peer.drop(load, "EU", 1)
    except NotImplementedError:
        return False
    names["runs"].clear()
    load("EU", 1), load("US", 1)
    return bool(names["runs"] == ["EU"])


LINES = {
    "invalidation of one call": one_call,
    "an edited helper function is noticed": edited_helper,
    '`1`, `1.0` and `"1"` are different calls': typed_arguments,
    "lists, dicts and frames as arguments": any_argument,
    "a caller may change its result": own_copy,
    "invalidation by some of the arguments": some_arguments,
    "an invalidation wins over a running computation": invalidation_wins,
    "what was built on an invalidated result is invalidated, too": built_on,
}


def table() -> dict[str, dict[str, bool]]:
    """README's table: line -> peer -> yes or no."""
    text = (ROOT / "README.md").read_text("utf-8")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in re.findall(
            r"^\|.*\|$", text.partition("## Beside other caches")[2], re.MULTILINE
        )
    ]
    head, _, *body = rows
    names = [name.strip("`") for name in head[1:]]
    return {
        row[0]: {n: cell == "yes" for n, cell in zip(names, row[1:], strict=True)} for row in body
    }


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("peer", CHOSEN, indirect=True)
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::joblib.memory.JobLibCollisionWarning"
)
def test_the_table_in_readme_is_true(
    request: pytest.FixtureRequest, peer: Peer, line: str, tmp_path: Path
) -> None:
    """README's claims about the other caches are true."""
    name = request.node.callspec.params["peer"]
    said = table()
    assert set(said) == set(LINES)
    assert LINES[line](peer, tmp_path) == said[line][name], f"{name}: {line}"
