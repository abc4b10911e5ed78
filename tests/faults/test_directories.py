"""Directories as containers have them: read-only, foreign, full, missing, open to all users.

Each case is made for real: another uid, a read-only or full file system.  The program that runs in
it is a process of its own.
"""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from folders import FOLDER

UID = 54321
"""A user that no system has: no name, no home, no group."""
SECRET = "0123456789abcdef" * 4
PRELOAD = """
import importlib, os, pkgutil, sys
import asyncio, concurrent.futures, diskcache, platformdirs, sqlite3, subprocess, tempfile
import encodings.ascii, encodings.idna, encodings.latin_1, tomllib
import memo
for module in pkgutil.walk_packages(memo.__path__, "memo."):
    if not module.name.startswith(("memo.__main__", "memo.jupyter")):
        importlib.import_module(module.name)
os.setgroups([])
os.setgid({uid})
os.setuid({uid})
"""
"""Imports that need no right to read Python's own files afterwards, which may lie in a home."""
PROGRAM = """
import json, os, sys, threading, time, warnings
warnings.simplefilter("always")
told = []
warnings.showwarning = lambda message, *rest, **more: told.append(str(message))
import memo
runs = []

@memo.cache(ttl=3600)
def load(x):
    runs.append(x)
    time.sleep(0.05 if x == "slow" else 0)
    return {"x": x}

@memo.cache(ttl=3600, use_lock=True)
def alone(x):
    runs.append(x)
    time.sleep(0.2)
    return {"x": x}

out = {}
def count(call):
    before = len(runs)
    call()
    return len(runs) - before
def later(seconds):
    now = time.monotonic
    time.monotonic = lambda: now() + seconds
def crowd(call, size=8):
    threads = [threading.Thread(target=call) for _ in range(size)]
    [t.start() for t in threads]
    [t.join() for t in threads]
"""
END = """
out["told"] = told
print(json.dumps(out))
"""


def _program(body: str, uid: int | None) -> str:
    preload = "" if uid is None else PRELOAD.format(uid=uid)
    return preload + PROGRAM + textwrap.dedent(body) + END


def run(body: str, uid: int | None = None, **environment: str) -> dict[str, Any]:
    """The file `out` of a program, run by a user in this environment."""
    program = _program(body, uid)
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MEMO_", "XDG_"))}
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        env={**clean, **environment},
        cwd="/",
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(autouse=True)
def _by_root() -> None:
    if os.geteuid() != 0:
        pytest.fail("these tests change users and mount file systems; run them as root")


@pytest.fixture
def open_path() -> Iterator[Path]:
    """A directory that every user can reach, and that no other test session makes private."""
    with tempfile.TemporaryDirectory(prefix="memo-test-") as place:
        Path(place).chmod(0o755)
        yield Path(place)


def mount(place: Path, options: str) -> None:
    place.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
    subprocess.run(command, check=True)


@pytest.fixture
def small(open_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    place = open_path / "small"
    mount(place, "size=4m,mode=777")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


CACHES = """
    out["first"] = count(lambda: load(1))
    out["again"] = count(lambda: [load(1) for _ in range(20)])
    out["other"] = count(lambda: crowd(lambda: load("slow")))
    out["alone"] = count(lambda: crowd(lambda: alone("slow")))
    load.invalidate(1)
    out["invalidated"] = count(lambda: load(1))
    out["and_again"] = count(lambda: [load(1) for _ in range(20)])
    memo.invalidate(function=load)
    out["all"] = count(lambda: [load(1) for _ in range(20)])
"""


def check_memory_caches(out: dict[str, Any], directory: str) -> None:
    """Memory caches, single flight and invalidations hold, and one warning says what is wrong."""
    assert (out["first"], out["again"], out["other"], out["alone"]) == (1, 0, 1, 1)
    assert (out["invalidated"], out["and_again"], out["all"]) == (1, 0, 1)
    assert len(out["told"]) == 1, out["told"]
    assert directory in out["told"][0]
    assert "directory" in out["told"][0]
    assert "MEMO_DIRECTORY" in out["told"][0]


def test_a_user_without_a_home_caches_in_memory(open_path: Path) -> None:
    """A random uid with `HOME=/`: one warning, and memory caches."""
    out = run(CACHES, uid=UID, HOME="/")
    check_memory_caches(out, "/.cache/")


def test_a_home_of_root_that_cannot_even_be_seen(open_path: Path) -> None:
    """A random uid with root's `HOME`: one warning, and memory caches."""
    home = open_path / "root"
    home.mkdir(mode=0o700)
    check_memory_caches(run(CACHES, uid=UID, HOME=str(home)), str(home))


@pytest.mark.parametrize("mode", [0o755, 0o777])
def test_a_directory_of_another_user_is_not_used(open_path: Path, mode: int) -> None:
    """Nothing is read from, or written to, what belongs to another user."""
    place = open_path / "cache"
    (place / FOLDER).mkdir(parents=True)
    for one in (place / FOLDER, place):
        os.chown(one, UID + 1, UID + 1)
        one.chmod(mode)
    out = run(CACHES, uid=UID, HOME="/", MEMO_DIRECTORY=str(place))
    check_memory_caches(out, str(place))
    assert os.listdir(place / FOLDER) == []


def test_root_does_not_use_a_directory_of_another_user(open_path: Path) -> None:
    """Root may write everywhere, and still refuses what another user can change."""
    place = open_path / "cache"
    (place / FOLDER).mkdir(parents=True)
    os.chown(place / FOLDER, UID, UID)
    out = run(CACHES, HOME="/", MEMO_DIRECTORY=str(place), MEMO_SECRET=SECRET)
    check_memory_caches(out, str(place))
    assert os.listdir(place / FOLDER) == []


def test_a_read_only_file_system_without_a_cache(open_path: Path) -> None:
    """On a read-only root even root's memory caches, with one warning."""
    place = open_path / "root"
    mount(place, "ro")
    try:
        directory = str(place / "cache")
        out = run(CACHES, HOME=str(place), MEMO_DIRECTORY=directory)
        check_memory_caches(out, directory)
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


FILL = """
    out["stored"] = count(lambda: [load(x) for x in range(5)])
"""
WARM = """
    out["warm"] = count(lambda: [load(x) for x in range(5)])
    out["first"] = count(lambda: load(10))
    out["again"] = count(lambda: [load(10) for _ in range(20)])
    out["other"] = count(lambda: crowd(lambda: load("slow")))
    out["alone"] = count(lambda: crowd(lambda: alone("slow")))
    load.invalidate(1)
    out["invalidated"] = count(lambda: load(1))
    out["and_again"] = count(lambda: [load(1) for _ in range(20)])
    out["still"] = count(lambda: load(2))
    memo.invalidate(function=load)
    out["all"] = count(lambda: [load(1) for _ in range(20)])
"""


@pytest.mark.parametrize("wal", [False, True], ids=["closed", "killed"])
def test_a_warm_read_only_directory_is_read(open_path: Path, wal: bool) -> None:
    """A cache baked into an image hits, also where its writer was killed.

    New results are cached in memory, and an invalidation holds in this process.
    """
    place = open_path / "image"
    mount(place, "mode=755")
    try:
        os.chown(place, UID, UID)
        settings = {"HOME": "/", "MEMO_DIRECTORY": str(place / "cache"), "MEMO_SECRET": SECRET}
        fill = FILL + ("\n    os.write(1, (json.dumps(out) + chr(10)).encode()); os._exit(0)" * wal)
        assert run(fill, uid=UID, **settings)["stored"] == 5
        remount = ["mount", "-o", "remount,ro", str(place)]
        subprocess.run(remount, check=True)
        out = run(WARM, uid=UID, **settings)
        assert out["warm"] == 0
        assert out["still"] == 0
        check_memory_caches(out, str(place / "cache"))
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_cache_of_root_that_is_not_writable_is_read(open_path: Path) -> None:
    """An image is built by root and run by a random uid: what root stored is read."""
    place = open_path / "cache"
    settings = {"HOME": "/", "MEMO_DIRECTORY": str(place), "MEMO_SECRET": SECRET}
    assert run(FILL, **settings)["stored"] == 5
    for folder, _, files in os.walk(place):
        os.chmod(folder, 0o755)
        for file in files:
            os.chmod(os.path.join(folder, file), 0o644)
    out = run(WARM, uid=UID, **settings)
    assert out["warm"] == 0
    check_memory_caches(out, str(place))


def test_what_is_replaced_in_a_read_only_directory_is_seen(open_path: Path) -> None:
    """A volume that is mounted read-only here may be written elsewhere: its invalidations count."""
    real, seen = open_path / "real", open_path / "seen"
    real.mkdir()
    seen.mkdir()
    os.chown(real, UID, UID)
    settings = {"HOME": "/", "MEMO_SECRET": SECRET}
    assert run(FILL, uid=UID, MEMO_DIRECTORY=str(real / "cache"), **settings)["stored"] == 5
    subprocess.run(["mount", "--bind", str(real), str(seen)], check=True)
    try:
        command = ["mount", "-o", "remount,ro,bind", str(seen)]
        subprocess.run(command, check=True)
        body = f"""
            out["warm"] = count(lambda: load(1))
            if os.fork() == 0:
                memo.configure(directory={str(real / "cache")!r})
                memo.invalidate(function=load)
                os._exit(0)
            os.wait()
            out["after"] = count(lambda: load(1))
        """
        out = run(body, uid=UID, MEMO_DIRECTORY=str(seen / "cache"), **settings)
        assert (out["warm"], out["after"]) == (0, 1)
    finally:
        subprocess.run(["umount", "-l", str(seen)], check=True)


def test_a_full_file_system_caches_in_memory(small: Path) -> None:
    """If the disk is full before the first call: one warning, and memory caches."""
    with (small / "filler").open("wb", 0) as filler, pytest.raises(OSError, match="No space"):
        while True:
            filler.write(bytes(4096))
    out = run(CACHES, uid=UID, HOME="/", MEMO_DIRECTORY=str(small / "cache"), MEMO_SECRET=SECRET)
    check_memory_caches(out, str(small / "cache"))


def test_a_disk_that_fills_up_makes_room_from_its_own_entries(small: Path) -> None:
    """With less space than `size_limit` the oldest entries go, and new ones are found again."""
    body = """
        @memo.cache(ttl=3600)
        def blob(x):
            runs.append(x)
            return os.urandom(200_000)

        out["stored"] = count(lambda: [blob(x) for x in range(60)])
        memo.configure(memory_limit=0)
        out["kept"] = sum(blob.is_cached(x) for x in range(60))
    """
    settings = {"MEMO_DIRECTORY": str(small / "cache"), "MEMO_SECRET": SECRET, "HOME": "/"}
    out = run(body, uid=UID, MEMO_SIZE_LIMIT="1GiB", **settings)
    assert out["stored"] == 60
    assert out["kept"] >= 5
    assert len(out["told"]) <= 1


def test_a_disk_that_others_fill_is_said_once(small: Path) -> None:
    """When there is nothing of its own left to remove, one warning says so."""
    body = f"""
        @memo.cache(ttl=3600)
        def blob(x):
            runs.append(x)
            return os.urandom(200_000)

        blob(0)
        with open({str(small / "filler")!r}, "wb", buffering=0) as filler:
            try:
                while True:
                    filler.write(bytes(4096))
            except OSError:
                pass
        for x in range(1, 30):
            blob(x)
            with open({str(small / "filler")!r}, "ab", buffering=0) as filler:
                try:
                    while True:
                        filler.write(bytes(4096))
                except OSError:
                    pass
        out["again"] = count(lambda: [blob(x) for x in range(20, 30)])
        out["new"] = count(lambda: [load(1) for _ in range(20)])
    """
    settings = {"MEMO_DIRECTORY": str(small / "cache"), "MEMO_SECRET": SECRET, "HOME": "/"}
    out = run(body, uid=UID, MEMO_SIZE_LIMIT="1GiB", **settings)
    assert out["again"] == 0
    assert out["new"] == 1
    assert len(out["told"]) == 1
    assert str(small / "cache") in out["told"][0]


def test_what_others_can_write_is_tightened_with_a_warning(open_path: Path) -> None:
    """A directory of this user's that others can write becomes owner-only, and it is said once."""
    place = open_path / "cache"
    (place / FOLDER).mkdir(parents=True)
    for one in (place / FOLDER, place):
        os.chown(one, UID, UID)
        one.chmod(0o777)
    body = """
        out["stored"] = count(lambda: load(1))
        memo.configure(memory_limit=0)
        out["again"] = count(lambda: load(1))
    """
    settings = {"HOME": "/", "MEMO_DIRECTORY": str(place), "MEMO_SECRET": SECRET}
    out = run(body, uid=UID, **settings)
    assert (out["stored"], out["again"]) == (1, 0)
    assert len(out["told"]) == 1
    assert str(place) in out["told"][0]
    modes = {stat.S_IMODE(one.stat().st_mode) for one in (place, place / FOLDER)}
    assert modes == {0o700}
    assert run(body.replace("load(1)", "load(2)"), uid=UID, **settings)["told"] == []


@pytest.mark.parametrize("folder", ["entries", "payloads", "locks"])
def test_links_in_place_of_folders_are_not_followed(open_path: Path, folder: str) -> None:
    """Nothing is written to or removed from where a link in the directory leads."""
    place, target = open_path / "cache", open_path / "target"
    target.mkdir()
    keep = [target / "keep", target / "ab" / ("0" * 32 + ".tmp"), target / ("0" * 40)]
    for one in keep:
        one.parent.mkdir(exist_ok=True)
        one.write_text("precious")
    (place / FOLDER).mkdir(parents=True)
    (place / FOLDER / folder).symlink_to(target)
    for one in (place, place / FOLDER, target, target / "ab", *keep):
        os.chown(one, UID, UID)
    body = """
        out["first"] = count(lambda: [alone(1) for _ in range(5)])
        out["big"] = count(lambda: [big(1) for _ in range(5)])
        load.cache_clear()
        big.cache_clear()
    """
    big = """
@memo.cache(ttl=3600)
def big(x):
    runs.append(x)
    return bytes(100_000) + b"x"
"""
    settings = {"HOME": "/", "MEMO_DIRECTORY": str(place), "MEMO_SECRET": SECRET}
    out = run(big + textwrap.dedent(body), uid=UID, **settings)
    assert (out["first"], out["big"]) == (1, 1)
    assert sorted(p for p in target.rglob("*") if p.is_file()) == sorted(keep)
    assert all(one.read_text() == "precious" for one in keep)


def test_a_directory_that_is_removed_is_made_again_for_its_owner_only(open_path: Path) -> None:
    """Removed while the program runs: caching goes on in a new one of mode 0700."""
    place = open_path / "parent" / "cache"
    place.parent.mkdir()
    os.chown(place.parent, UID, UID)
    body = f"""
        import shutil
        os.umask(0)
        memo.configure(memory_limit=0)
        out["stored"] = count(lambda: load(1))
        shutil.rmtree({str(place)!r})
        out["lost"] = count(lambda: load(1))
        out["again"] = count(lambda: [load(1) for _ in range(5)])
    """
    settings = {"HOME": "/", "MEMO_DIRECTORY": str(place), "MEMO_SECRET": SECRET}
    out = run(body, uid=UID, **settings)
    assert (out["stored"], out["lost"], out["again"]) == (1, 1, 0)
    folders = [place, *(p for p in place.rglob("*") if p.is_dir())]
    assert {stat.S_IMODE(one.stat().st_mode) for one in folders} == {0o700}


def test_a_directory_that_becomes_writable_is_used(open_path: Path) -> None:
    """A fault of the directory is looked at again: no restart is needed."""
    place = open_path / "later"
    body = f"""
        place = {str(place)!r}
        out["first"] = count(lambda: [load(1) for _ in range(5)])
        print("ready", flush=True)
        sys.stdin.readline()
        memo.configure(memory_limit=0)
        later(1.1)
        out["then"] = count(lambda: [load(2) for _ in range(5)])
    """
    program = _program(body, UID)
    settings = {"HOME": "/", "MEMO_DIRECTORY": str(place), "MEMO_SECRET": SECRET}
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **settings},
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        place.mkdir()
        os.chown(place, UID, UID)
        answer, _ = child.communicate("go\n", timeout=60)
    out = json.loads(answer.splitlines()[-1])
    assert (out["first"], out["then"], len(out["told"])) == (1, 1, 1)


HARM = {
    "emptied": "open(path, 'wb').close()",
    "replaced by another": "os.replace(other(), path)",
    "replaced by an older copy": "os.replace(copy, path)",
    "removed": "os.unlink(path)",
    "a folder in its place": "os.unlink(path); os.mkdir(path)",
    "read-only": "os.chmod(path, 0o400); reopen()",
    "in a read-only folder": "os.chmod(os.path.dirname(path), 0o500); reopen()",
}


@pytest.mark.parametrize("file", ["entries/cache.db", "host.sqlite"])
@pytest.mark.parametrize("harm", HARM)
def test_what_happens_to_a_database_never_ends_caching(
    open_path: Path, file: str, harm: str
) -> None:
    """The next result hits on the disk, in this process and in one that starts later."""
    home = open_path / "home"
    home.mkdir()
    os.chown(home, UID, UID)
    given = {"MEMO_DIRECTORY": str(home), "MEMO_SECRET": SECRET, "MEMO_MEMORY_LIMIT": "0"}
    path = home / FOLDER / file
    body = f"""
    import shutil, sqlite3
    path = {str(path)!r}
    copy = path + ".copy"
    def other():
        connection = sqlite3.connect(path + ".other")
        connection.execute("CREATE TABLE foreign_table (x)")
        connection.commit()
        connection.close()
        return path + ".other"
    def checkpoint():  # otherwise SQLite reads all of it from the log, and meets no harm
        connection = sqlite3.connect(path)
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.close()
    def reopen():
        memo.configure(size_limit="1GiB")

    load("before")
    checkpoint()
    shutil.copy(path, copy)
    load("more")
    checkpoint()
    {HARM[harm]}
    later(0.01)  # the file of a host is looked at once a millisecond
    out["computed"] = [count(lambda: load("after")) for _ in range(3)]
    """
    assert run(body, UID, **given)["computed"] == [1, 0, 0]
    body = f"""
    import sqlite3
    out["computed"] = count(lambda: load("after"))
    connection = sqlite3.connect({str(path)!r})
    [out["check"]] = connection.execute("PRAGMA integrity_check").fetchone()
    connection.close()
    """
    assert run(body, UID, **given) == {"computed": 0, "check": "ok", "told": []}
