"""A link at any name below the cache directory: its target stays as it was, and calls go on."""

from __future__ import annotations

import os
import shutil
import sqlite3
import stat
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import memo
from memo.testing import isolated

pytestmark = pytest.mark.filterwarnings("ignore:memo")
KEY = "a key of these tests, long enough"
SECRET = "0123456789abcdef" * 4
HEX = "[0-9a-f]" * 8 + "*"
FOLDERS = ["", "bundles", "code", "entries", "locks", "payloads", "payloads/??", "stats"]
FILES = [
    "bundles/*.json",
    f"code/{HEX}.json",
    "entries/cache.db",
    "entries/cache.db-shm",
    "entries/cache.db-wal",
    "entries/cache.lock",
    "entries/swept",
    "host.bell",
    "host.lock",
    "host.sqlite",
    "host.sqlite-shm",
    "host.sqlite-wal",
    f"payloads/??/{HEX}",
    "stats/*.now",
]
SELDOM = ["entries/cache.db-journal", "host.sqlite-journal", "stats/total.json", "stats/total.lock"]
"""Names that are not there as a rule, but would be used."""


@memo.cache(ttl=None, use_lock=True, tags=["links"])
def load(x: int) -> Any:
    return np.full(20_000, x)


@memo.cache(ttl=None)
def small(x: int) -> int:
    return x


def use(bundle: Path) -> None:
    """All that writes below the cache directory: calls, invalidations, statistics, bundles."""
    for x in range(2):
        assert load(x)[0] == x
        assert small(x) == x
    memo.invalidate(tag="links")
    assert load(1)[0] == 1
    memo.stats()
    small.explain(1)
    if small.is_cached(1):
        memo.export_bundle(bundle, small, key=KEY)
        memo.import_bundle(bundle, key=KEY)
        with memo.configure(tiers=["disk", memo.Bundle(bundle, KEY)]):
            small.cache_clear()
            assert small(1) == 1
    assert small(1) == 1
    load.cache_clear()
    assert load(0)[0] == 0


def content(path: Path) -> dict[str, Any]:
    """Names, modes and contents of a file, or of all that lies in a directory."""
    found = [path, *path.rglob("*")] if path.is_dir() else [path]
    return {
        str(one): (stat.S_IMODE(one.stat().st_mode), one.read_bytes() if one.is_file() else None)
        for one in found
    }


def replaced(place: Path, others: Path) -> None:
    """Put a link in the place of a file or folder; its target has the same content."""
    if place.is_dir():
        shutil.copytree(place, others)
        shutil.rmtree(place)
    elif place.exists():
        shutil.copy(place, others)
        place.unlink()
    else:
        others.write_bytes(b"precious" * 512)
    place.symlink_to(others)


def found(home: Path, pattern: str) -> Path:
    """The first file or folder of a cache directory with such a name."""
    if "*" not in pattern and "?" not in pattern:
        return home / pattern if pattern else home
    depth = len(Path(pattern).parts)
    names = sorted(one.relative_to(home) for one in home.rglob("*"))
    return next(
        home / name for name in names if len(name.parts) == depth and fnmatch(str(name), pattern)
    )


@pytest.mark.parametrize("running", [False, True], ids=["at the start", "while it runs"])
@pytest.mark.parametrize("pattern", [*FOLDERS, *FILES, *SELDOM])
def test_a_link_in_any_place(pattern: str, running: bool, tmp_path: Path) -> None:
    """The target of a link is neither written, removed nor closed to others; calls are answered."""
    others, bundle = tmp_path / "others", tmp_path / "some.bundle"
    settings = {"directory": tmp_path / "cache", "secret": SECRET}
    with isolated(**settings):
        use(bundle)
        place = found(tmp_path / "cache" / "memo.2", pattern)
        if running:
            replaced(place, others)
            kept = content(others)
            use(bundle)
    if not running:
        replaced(place, others)
        kept = content(others)
        with isolated(**settings):
            use(bundle)
    assert content(others) == kept


def test_every_name_is_tried(tmp_path: Path) -> None:
    """The test above knows each file and folder that memo makes in its directory."""
    with isolated(directory=tmp_path / "cache"):
        use(tmp_path / "some.bundle")
        home = tmp_path / "cache" / "memo.2"
        names = [str(one.relative_to(home)) for one in home.rglob("*")]
    known = [*FOLDERS, *FILES, "stats/*.json"]  # published at most once a second
    assert [n for n in names if not any(fnmatch(n, p) for p in known)] == []
    for pattern in [*FOLDERS, *FILES]:
        assert not pattern or any(fnmatch(name, pattern) for name in names), pattern


def test_a_link_in_the_place_of_a_lock(tmp_path: Path) -> None:
    """A link with the name of a lock is not followed, and the call still waits for its lock."""
    locks, others, held = tmp_path / "cache" / "memo.2" / "locks", tmp_path / "others", []

    @memo.cache(ttl=None, use_lock=True)
    def compute(x: int) -> int:
        held.extend(os.listdir(locks))
        return x

    with isolated(directory=tmp_path / "cache"):
        compute(1)
        compute.cache_clear()
        others.write_text("mine")
        (locks / held[0]).symlink_to(others)
        assert compute(1) == 1
    assert held[0] == held[1]
    assert others.read_text() == "mine"


@pytest.fixture
def songs(tmp_path: Path) -> Path:
    """Another program's SQLite file, in a folder of its own."""
    others = tmp_path / "others"
    others.mkdir(mode=0o700)
    with sqlite3.connect(others / "cache.db") as connection:
        connection.execute("CREATE TABLE songs (name TEXT)")
        connection.execute("INSERT INTO songs VALUES ('Erlkoenig')")
    connection.close()
    shutil.copy(others / "cache.db", others / "host.sqlite")
    return others


@pytest.fixture(params=["the file", "its folder"])
def swapping(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, songs: Path
) -> Iterator[list[str]]:
    """While SQLite opens a file, a link lies in its place, or in that of its folder."""
    connect, swapped = sqlite3.connect, []

    def connected(database: str, **given: Any) -> sqlite3.Connection:
        if not database.startswith("file:"):  # a copy, elsewhere
            return connect(database, **given)
        place = Path(database.removeprefix("file://").partition("?")[0])
        target = songs / place.name
        if request.param == "its folder":
            place, target = place.parent, songs
        away = place.with_name("away")
        swapped.append(place.name)
        place.rename(away)
        place.symlink_to(target)
        try:
            return connect(database, **given)
        finally:
            place.unlink()
            away.rename(place)

    monkeypatch.setattr(sqlite3, "connect", connected)
    yield swapped
    monkeypatch.undo()


def test_a_link_while_sqlite_opens_a_file(swapping: list[str], songs: Path, tmp_path: Path) -> None:
    """A file that SQLite opened through a link is closed again before anything is done to it."""
    kept = content(songs)
    with isolated(directory=tmp_path / "cache"):
        for _ in range(3):
            assert load(1)[0] == 1
            assert small(1) == 1
        small.invalidate(1)
        memo.health()
    assert swapping
    assert content(songs) == kept
