"""Files, directories and callables that a result depends on: a change invalidates it."""

from __future__ import annotations

import builtins
import os
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import limits
import pytest
from time_ahead import Ahead

import memo
from memo import DependencyError, File, OptionError, cache
from memo.validity import dependencies

LONG_AGO = 3600
"""Seconds: older than any clock tick, so that the content is not looked at as well."""


def written(path: Path, text: str, *, ago: float = LONG_AGO) -> Path:
    """A file with a text, modified so many seconds ago."""
    path.write_text(text)
    then = time.time() - ago
    os.utime(path, (then, then))
    return path


def changed(path: Path, text: str) -> None:
    written(path, text, ago=LONG_AGO / 2)


def reader(path: Path, depends_on: Any, **options: Any) -> Any:
    """A function that reads a file and depends on something."""

    @cache(
        **{"ttl": None, "version": "1", "name": "tests:reader", **options}, depends_on=depends_on
    )
    def read() -> str:
        return path.read_text()

    return read


# --- paths ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [str, Path, File, lambda p: File(p, by_content=True)])
def test_a_file_that_changes(tmp_path: Path, kind: Callable[[Any], Any]) -> None:
    """A path in any spelling invalidates the entry when its content changes."""
    path = written(tmp_path / "data.csv", "old")
    read = reader(path, kind(str(path)))
    assert read() == "old"
    assert read.is_cached()
    changed(path, "new")
    assert not read.is_cached()
    assert read() == "new"
    assert read.is_cached()


def test_a_file_that_is_replaced(tmp_path: Path) -> None:
    """A rename over it, with the same size and time, is seen by the inode."""
    path, other = written(tmp_path / "a", "old"), written(tmp_path / "b", "new")
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    read = reader(path, path)
    assert read() == "old"
    other.replace(path)
    assert read() == "new"


def test_a_file_that_was_only_touched(tmp_path: Path) -> None:
    """By content, another time alone is no change; without, it is."""
    path = written(tmp_path / "data.csv", "same")
    by_stat = reader(path, path)
    by_content = reader(path, File(path, by_content=True), name="tests:by content")
    by_stat(), by_content()
    changed(path, "same")
    assert not by_stat.is_cached()
    assert by_content.is_cached()


def test_a_file_that_was_just_written(tmp_path: Path) -> None:
    """A change within the same clock tick, with the same size, is seen by the content."""
    path = tmp_path / "data.csv"
    path.write_text("warm-up")
    read = reader(path, path)
    read()
    path.write_text("old")  # a first call takes too long for one tick
    assert read() == "old"
    status = path.stat()
    with path.open("r+") as file:
        file.write("new")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    assert read() == "new"


def test_a_stamp_that_was_taken_just_after_writing_stays_good(tmp_path: Path, ahead: Ahead) -> None:
    """The entry of a file that was fresh then is still believed when the file has settled."""
    path = tmp_path / "data.csv"
    path.write_text("text")
    read = reader(path, path)
    read()
    ahead.advance(2 * dependencies.RACY_SECONDS)
    assert read.is_cached()


def test_several_dependencies(tmp_path: Path) -> None:
    """Any one of several is enough."""
    paths = [written(tmp_path / name, "old") for name in "abc"]
    read = reader(paths[0], paths)
    for path in paths:
        read()
        assert read.is_cached()
        changed(path, "new")
        assert not read.is_cached()


@pytest.mark.parametrize("by_content", [False, True])
def test_a_pattern(tmp_path: Path, by_content: bool) -> None:
    """A pattern notices a file more, a file less, and another content."""
    first = written(tmp_path / "a.csv", "1")
    read = reader(first, File(tmp_path / "*.csv", by_content=by_content))

    def is_seen(change: Callable[[], Any]) -> bool:
        read()
        assert read.is_cached()
        change()
        return not read.is_cached()

    assert is_seen(lambda: written(tmp_path / "b.csv", "2"))
    assert is_seen(lambda: changed(tmp_path / "b.csv", "3"))
    assert is_seen((tmp_path / "b.csv").unlink)
    assert not is_seen(lambda: written(tmp_path / "c.txt", "4"))


def test_a_directory(tmp_path: Path) -> None:
    """A directory stands for all that lies in it, at any depth."""
    deep = tmp_path / "data" / "2024"
    deep.mkdir(parents=True)
    path = written(deep / "a.csv", "1")
    read = reader(path, tmp_path / "data")
    read()
    assert read.is_cached()
    changed(path, "2")
    assert not read.is_cached()
    read()
    written(deep / "b.csv", "3")
    assert not read.is_cached()


def test_a_relative_path_is_of_the_place_of_the_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative path is looked up where the computation would find it."""
    monkeypatch.chdir(tmp_path)
    path = written(tmp_path / "data.csv", "old")
    read = reader(path, "data.csv")
    read()
    changed(path, "new")
    assert read() == "new"


def test_a_template(tmp_path: Path) -> None:
    """The names of arguments in braces are filled in: each call depends on its own file."""
    for region in ("EU", "US"):
        written(tmp_path / f"{region}.csv", region)

    @cache(ttl=None, version="1", name="tests:template", depends_on=f"{tmp_path}/{{region}}.csv")
    def load(region: str = "EU", **more: int) -> str:
        return (tmp_path / f"{region}.csv").read_text()

    load(), load("US", year=1)
    changed(tmp_path / "EU.csv", "new")
    assert not load.is_cached("EU")
    assert load.is_cached("US", year=1)


def test_a_file_that_changes_during_the_computation(tmp_path: Path) -> None:
    """The stamp is from before: what was read from two versions of a file is not believed."""
    path, times = written(tmp_path / "data.csv", "old"), []

    @cache(ttl=None, version="1", name="tests:underway", depends_on=path)
    def load() -> str:
        text = path.read_text()
        if not times:
            changed(path, "new")
        times.append(1)
        return text

    assert load() == "old"
    assert not load.is_cached()
    assert load() == "new"
    assert load.is_cached()


# --- missing files --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["missing.csv", "*.none", "no/such/place"])
@pytest.mark.parametrize("by_content", [False, True])
def test_that_nothing_is_there_is_a_fact(tmp_path: Path, name: str, by_content: bool) -> None:
    """A function whose dependency is not there runs, and its result holds until it is there."""
    path = tmp_path / name
    runs: list[int] = []

    @cache(ttl=None, version="1", depends_on=File(path, by_content=by_content))
    def load() -> int:
        runs.append(1)
        return len(runs)

    assert load() == load() == 1
    there = tmp_path / name.replace("*", "x")
    there.parent.mkdir(parents=True, exist_ok=True)
    written(there, "now")
    assert not load.is_cached()
    assert load() == load() == 2


async def test_an_error_of_the_function_is_its_own(tmp_path: Path) -> None:
    """The caller gets the function's own error for a missing file; later it works."""
    path = tmp_path / "data.csv"

    @cache(ttl=None, version="1", depends_on=path)
    async def load() -> str:
        return path.read_text()

    with pytest.raises(FileNotFoundError) as caught:
        await load()
    assert not isinstance(caught.value, memo.MemoError)
    written(path, "there")
    assert await load() == await load() == "there"


def test_a_file_that_goes_away(tmp_path: Path) -> None:
    """No entry outlives the file that it was made of, nor do those that were built on it."""
    path = written(tmp_path / "data.csv", "old")

    @cache(ttl=None, version="1", depends_on=path)
    def inner() -> str:
        return path.read_text() if path.exists() else "nothing"

    @cache(ttl=None, version="1")
    def outer() -> str:
        return f"<{inner()}>"

    assert outer() == "<old>"
    path.unlink()
    assert not outer.is_cached()
    assert outer() == "<nothing>"
    assert outer.is_cached()
    written(path, "new")
    assert outer() == "<new>"


@pytest.mark.parametrize(
    "depends_on", [5, [None], "", File(), int, lambda x: x, "{city}.csv", "{}.csv", "{region.csv"]
)
def test_what_cannot_be_depended_on(depends_on: Any) -> None:
    """Anything else is an error at decoration that names the option."""
    with pytest.raises(OptionError, match="depends_on"):

        @cache(depends_on=depends_on)
        def load(region: str) -> str:
            return region


# --- the event loop ------------------------------------------------------------------------------


@pytest.fixture
def threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, set[threading.Thread]]:
    """The threads that open, list and stat something under `tmp_path / "data"`."""
    folder = tmp_path / "data"
    folder.mkdir()
    seen: dict[str, set[threading.Thread]] = {"read": set(), "stat": set()}

    def watch(module: Any, name: str, kind: str) -> None:
        original = getattr(module, name)

        def watched(path: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(str(folder)):
                seen[kind].add(threading.current_thread())
            return original(path, *args, **kwargs)

        monkeypatch.setattr(module, name, watched)

    watch(builtins, "open", "read")
    watch(os, "scandir", "read")
    watch(os, "stat", "stat")
    return seen


@pytest.mark.parametrize("kind", ["directory", "pattern", "content", "just written", "many"])
async def test_a_costly_check_does_not_run_on_the_event_loop(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    threads: dict[str, set[threading.Thread]],
) -> None:
    """Listing a directory, expanding a pattern, reading a file, and a check of many files."""
    path = written(tmp_path / "data" / "x.csv", "same")
    source: Any = {
        "directory": path.parent,
        "pattern": f"{path.parent}/*.csv",
        "just written": path,
    }
    source["content"] = File(path, check="content")
    source["many"] = [path.parent / str(at) for at in range(dependencies.MAX_FILES_ON_LOOP + 1)]

    @cache(ttl=None, version="1", depends_on=source[kind])
    async def load() -> int:
        return 1

    with monkeypatch.context() as patch:
        if kind == "just written":
            limits.change(patch.setattr, just_written=2 * LONG_AGO)
        await load()
    if kind == "content":
        changed(path, "same")
    for seen in threads.values():
        seen.clear()
    assert await load.ais_cached()
    used = threads["stat" if kind == "many" else "read"]
    assert used
    assert threading.current_thread() not in used


async def test_a_cheap_check_uses_no_thread(
    tmp_path: Path, threads: dict[str, set[threading.Thread]]
) -> None:
    """The `stat` of a file is quicker than a thread; a content that is known is not read again."""
    path = written(tmp_path / "data" / "x.csv", "same")

    @cache(ttl=None, version="1", depends_on=[path, File(path, check="content")])
    async def load() -> int:
        return 1

    await load()
    for seen in threads.values():
        seen.clear()
    assert await load.ais_cached()
    assert threads == {"read": set(), "stat": {threading.current_thread()}}


# --- callables -----------------------------------------------------------------------------------


class Table:
    """Something that answers when it was changed last."""

    def __init__(self) -> None:
        self.updated: Any = 1
        self.asked = 0

    def version(self) -> Any:
        self.asked += 1
        return self.updated

    async def aversion(self) -> Any:
        return self.version()


@pytest.mark.parametrize("verb", ["version", "aversion"])
def test_a_callable_of_a_sync_function(verb: str) -> None:
    """A callable, sync or async, is asked at every call, and its answer compared."""
    table, runs = Table(), []

    @cache(ttl=None, version="1", name="tests:table", depends_on=getattr(table, verb))
    def load() -> int:
        runs.append(1)
        return len(runs)

    assert [load(), load()] == [1, 1]
    table.updated = 2
    assert [load(), load()] == [2, 2]


@pytest.mark.parametrize("verb", ["version", "aversion"])
async def test_a_callable_of_a_coroutine(verb: str) -> None:
    """The same for an async function."""
    table, runs = Table(), []

    @cache(ttl=None, version="1", name="tests:atable", depends_on=[getattr(table, verb)])
    async def load() -> int:
        runs.append(1)
        return len(runs)

    assert [await load(), await load()] == [1, 1]
    table.updated = {"max": [2, 3.5]}
    assert [await load(), await load()] == [2, 2]


def test_a_partial_as_a_callable() -> None:
    """A callable whose arguments are bound may be depended on."""
    table = {"sales": 1}

    @cache(ttl=None, version="1", name="tests:partial", depends_on=partial(table.get, "sales"))
    def load() -> int:
        return 1

    load()
    assert load.is_cached()
    table["sales"] = 2
    assert not load.is_cached()


def test_a_callable_of_an_object_leaves_its_class_alone() -> None:
    """A hit asks with a copy of the argument, which brings no copies of its class's methods."""

    class Table:
        def version(self) -> int:
            return 1

    @cache(ttl=None, version="1", name="tests:rows", depends_on=lambda table: table.version())
    def rows(table: Table) -> int:
        return 1

    method, table = Table.version, Table()
    rows(table), rows(table)
    assert memo.stats("tests:rows").total.hits == 1
    assert Table.version is method


def test_a_callable_that_raises() -> None:
    """It is a DependencyError that names the function and what was raised, before computing."""

    def version() -> int:
        raise ConnectionError("no route")

    @cache(ttl=None, version="1", name="tests:raising", depends_on=version)
    def load() -> int:
        raise AssertionError("computed")

    with pytest.raises(DependencyError, match=r"tests:raising.*version.*no route"):
        load()


def test_an_entry_whose_callable_is_elsewhere_is_not_believed() -> None:
    """If the callable cannot be asked, as in a process without the function, it is a miss."""
    table = Table()

    @cache(ttl=None, version="1", name="tests:inner", depends_on=table.version)
    def inner() -> int:
        return 1

    @cache(ttl=None, version="1", name="tests:outer")
    def outer() -> int:
        return inner()

    outer()
    assert outer.is_cached()
    dependencies.CALLABLES.pop("tests:inner")
    assert not outer.is_cached()


# --- File as an annotation -----------------------------------------------------------------------


def test_a_file_as_an_argument(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path is in the key, however it is spelled; the content is in the stamp."""
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        written(tmp_path / name, name)

    @cache(ttl=None, version="1", name="tests:argument")
    def load(path: Annotated[str, memo.File], rows: int = 5) -> str:
        return Path(path).read_text()

    assert [load("a"), load("b")] == ["a", "b"]
    key = load.key("a")
    assert key == load.key(str(tmp_path / "a")) == load.key(tmp_path / "x" / ".." / "a")
    assert load.key("b") != key
    changed(tmp_path / "a", "new")
    assert load.key("a") == key, "the new version replaces the old"
    assert not load.is_cached("a")
    assert load.is_cached("b")
    assert load(tmp_path / "a") == "new"


def test_files_as_an_argument(tmp_path: Path) -> None:
    """A list of paths: each of them counts; None is no path."""
    paths = [str(written(tmp_path / name, name)) for name in "ab"]

    @cache(ttl=None, version="1", name="tests:arguments")
    def load(paths: Annotated[list[str] | None, File(by_content=True)] = None) -> int:
        return len(paths or ())

    assert load(paths) == 2
    assert load() == 0
    changed(tmp_path / "b", "new")
    assert not load.is_cached(paths)
    assert load.is_cached()


def test_an_argument_that_is_no_path() -> None:
    """It is an error that says so."""

    @cache(ttl=None, version="1", name="tests:no path")
    def load(path: Annotated[str, memo.File]) -> str:
        return "?"

    with pytest.raises(OptionError, match="path"):
        load(5)  # type: ignore[arg-type]


def test_a_missing_argument_file(tmp_path: Path) -> None:
    """A path that is an argument may lead nowhere as well."""
    path = tmp_path / "none"

    @cache(ttl=None, version="1")
    def load(path: Annotated[str, memo.File]) -> str:
        return "there" if Path(path).exists() else "nothing"

    assert load(str(path)) == load(str(path)) == "nothing"
    written(path, "new")
    assert load(str(path)) == "there"


# --- on to what was built on it ------------------------------------------------------------------


@pytest.mark.parametrize("warm", [False, True], ids=["computed", "hit"])
def test_files_carry_on(tmp_path: Path, warm: bool) -> None:
    """A file that an inner cached function depends on counts for each outer one."""
    path = written(tmp_path / "data.csv", "old")
    read = reader(path, path)

    @cache(ttl=None, version="1", name="tests:report")
    def report() -> str:
        return f"report on {read()}"

    if warm:
        read()
    assert report() == "report on old"
    changed(path, "new")
    assert report() == "report on new"
