"""Nothing under the cache directory is followed through a link; only memo's own files go."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from folders import FOLDER

import memo
from memo.inspection.live_view import Model
from memo.metrics.running_computations import SLOTS_FILE_SUFFIX
from memo.stores.disk import file_locks, payload_files
from memo.testing import isolated


@pytest.fixture
def others(tmp_path: Path) -> Path:
    """A directory with another user's files, with names of every kind."""
    place = tmp_path / "others"
    place.mkdir(mode=0o700)
    for name in ("thesis.tex", "a" * 40, "b" * 32 + ".tmp", "c" * 64, "x.json"):
        (place / name).write_text("mine")
    for name in (
        "99999999-1.json",
        f"99999999-1{SLOTS_FILE_SUFFIX}",
    ):  # as of a process that ended long ago
        (place / name).write_text("{}")
        os.utime(place / name, (0, 0))
    return place


@pytest.mark.filterwarnings("ignore:memo")
@pytest.mark.parametrize(
    "part", ["locks", "payloads", "code", "entries", "stats", "payloads/ab", ""]
)
def test_a_link_in_the_place_of_a_folder(others: Path, part: str) -> None:
    """If a folder of the cache became a link, calls work, and its target stays as it was."""
    before = sorted(os.listdir(others))

    @memo.cache(ttl=None, use_lock=True)
    def load(x: int) -> Any:
        return np.full(20_000, x)

    with isolated() as directory:
        home = directory / FOLDER
        link = home / part if part else home
        link.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        link.symlink_to(others)
        for x in range(8):
            assert load(x)[0] == x
        memo.stats()
        Model(shared=True).state()
        load.cache_clear()
    assert sorted(os.listdir(others)) == before
    assert stat.S_IMODE(others.stat().st_mode) == 0o700


def test_a_folder_that_is_swapped_for_a_link_meanwhile(
    others: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While old locks are removed their folder becomes a link: what it leads to stays."""
    locks, flock, name = tmp_path / "locks", fcntl.flock, "a" * 40
    locks.mkdir(mode=0o700)
    (locks / name).touch(mode=0o600)
    (others / name).unlink()
    os.link(locks / name, others / name)  # so that the file is the same in both places

    def swapped(*given: Any) -> None:
        locks.rename(tmp_path / "away")
        locks.symlink_to(others)
        flock(*given)

    monkeypatch.setattr(fcntl, "flock", swapped)
    assert file_locks.sweep(locks) == 1
    assert (others / name).exists()
    assert not (tmp_path / "away" / name).exists()


class Swap:
    """Puts links to another directory, which has the same files, in the place of all shards."""

    def __init__(self, payloads: Path, others: Path, instead: Any) -> None:
        self.payloads, self.others, self.instead = payloads, others, instead

    def __call__(self, *given: Any, **named: Any) -> Any:
        for shard in sorted(self.payloads.iterdir()):
            if not shard.is_symlink():
                away, there = self.payloads.parent / f"away-{shard.name}", self.others / shard.name
                shard.rename(away)
                shutil.copytree(away, there, copy_function=os.link)
                shard.symlink_to(there)
        return self.instead(*given, **named)

    def kept(self) -> list[str]:
        return sorted(str(one.relative_to(self.others)) for one in self.others.rglob("*"))


@pytest.fixture
def stored(tmp_path: Path) -> tuple[payload_files.Payloads, list[str]]:
    """Payload files with two entries' records, and the names of the two."""
    payloads = payload_files.Payloads(tmp_path / "payloads")
    (tmp_path / "payloads").mkdir(mode=0o700)
    names = []
    for text in (b"one", b"two"):
        with payloads.write(None, text) as name:
            names.append(str(name))
    return payloads, names


@pytest.mark.parametrize("how", ["remove", "sweep"])
def test_shards_that_are_swapped_for_links_while_files_go(
    stored: Any, others: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Only the file that was looked at is removed, not one that a link leads to since."""
    payloads, names = stored
    swap = Swap(payloads.directory, others, os.unlink)
    monkeypatch.setattr(os, "unlink", swap)
    if how == "remove":
        payloads.remove(names[0])
    else:
        assert payloads.sweep(lambda _: False) >= 1
    monkeypatch.undo()
    assert names[0] in swap.kept()
    assert names[1] in swap.kept()
    assert len(list(payloads.directory.parent.glob("away-*/*"))) < 2


def test_a_shard_that_is_swapped_for_a_link_while_a_file_is_written(
    stored: Any, others: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file goes where it was begun: nothing is made where the link leads."""
    payloads, _ = stored
    swap = Swap(payloads.directory, others, fcntl.flock)
    monkeypatch.setattr(fcntl, "flock", swap)
    with payloads.write(None, b"three") as name:
        pass
    monkeypatch.undo()
    assert name not in swap.kept()
    assert (payloads.directory.parent / f"away-{name}").exists()


def test_a_removed_cache_directory_comes_back_private(tmp_path: Path) -> None:
    """A cache directory that was removed under a running program is made anew with mode 0700."""

    @memo.cache(ttl=None)
    def load(x: int) -> int:
        return x

    before = os.umask(0o022)
    try:
        with isolated(directory=tmp_path / "cache"):
            load(1)
            shutil.rmtree(tmp_path / "cache")
            load(2)
            load.invalidate()
            load(3)
            assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o700
    finally:
        os.umask(before)
