"""The secret: given or generated, and refused when it cannot be trusted."""

from __future__ import annotations

import os
import pwd
import stat
import subprocess
import sys
import warnings
from pathlib import Path
from subprocess import PIPE

import pytest
from checkout import ROOT

from memo.errors import SecretError
from memo.runtime import events
from memo.settings import configuration, secret_keys
from memo.settings.secret_keys import Secret

GOOD = "0123456789abcdef" * 2


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    yield tmp_path
    monkeypatch.undo()
    configuration.reset()


def ids(secrets):
    return [one.id for one in secrets]


def private(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    path.chmod(0o600)
    return path


def test_text_is_used_as_its_bytes():
    """A secret means the same as text and as bytes, so it can be moved between hosts."""
    assert ids(secret_keys.from_value(GOOD, "x")) == [Secret(GOOD.encode()).id]
    assert ids(secret_keys.from_value(f"  {GOOD}\n", "x")) == ids(
        secret_keys.from_value(GOOD.encode(), "x")
    )


def test_a_list_rotates_newest_first():
    """More than one secret: the order given is the order kept, in text and in lists."""
    second = GOOD[::-1]
    expected = [Secret(GOOD.encode()).id, Secret(second.encode()).id]
    for given in (
        f"{GOOD},{second}",
        f"{GOOD}\n{second}\n",
        [GOOD, second],
        (GOOD, second.encode()),
    ):
        assert ids(secret_keys.from_value(given, "x")) == expected


def test_bytes_are_never_split():
    """Random bytes may have a comma in them."""
    raw = b"," * 40
    assert ids(secret_keys.from_value(raw, "x")) == [Secret(raw).id]


@pytest.mark.parametrize(
    "value", ["", " , ", [], "short", GOOD[:-1], b"x" * 31, [GOOD, "short"], 5]
)
def test_what_is_too_short_or_no_secret_is_refused(value):
    """32 bytes are the least, for each secret of a list."""
    with pytest.raises(SecretError, match=r"'secret' \(from here\)"):
        secret_keys.from_value(value, "here")


def test_an_error_has_no_part_of_the_secret():
    """A refused secret is not shown: it may be a good one with a slip."""
    with pytest.raises(SecretError) as caught:
        secret_keys.from_value("hunter2hunter2", "here")
    assert "hunter" not in str(caught.value)
    assert "31" not in str(caught.value)


def test_a_file_may_hold_several_and_equals_their_text(home):
    """The content of a secret file may be given as text elsewhere."""
    path = private(home / "s", f"{GOOD}\n{GOOD[::-1]}\n")
    assert ids(secret_keys.from_file(path, "x")) == ids(
        secret_keys.from_value(path.read_text(), "x")
    )


def test_a_binary_file_is_one_secret(home):
    """32 random bytes straight from the system are a secret as they are."""
    raw = bytes(range(0, 64, 2))
    assert ids(secret_keys.from_file(private(home / "s", raw), "x")) == [Secret(raw).id]
    raw = bytes(range(200, 240))
    assert ids(secret_keys.from_file(private(home / "s", raw), "x")) == [Secret(raw).id]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o610])
def test_a_file_that_others_can_reach_is_refused(home, mode):
    """A file that others can read or write is no secret; the error has the fix."""
    path = private(home / "s", GOOD)
    path.chmod(mode)
    with pytest.raises(SecretError, match=f"chmod 600 {path}"):
        secret_keys.from_file(path, "x")


def test_a_symlink_is_refused(home):
    """The owner of a link's directory may turn the link to another file."""
    link = home / "link"
    link.symlink_to(private(home / "s", GOOD))
    with pytest.raises(SecretError, match="symlink"):
        secret_keys.from_file(link, "x")


def test_a_mounted_secret_is_accepted_when_it_is_named(home, monkeypatch):
    """Kubernetes mounts links to files of root that the group can read: `secret_file` takes them.

    Others must not be able to read it, nor the group to write it, and no third user may own it.
    """
    if os.geteuid() != 0:
        pytest.fail("only root can give a file away; run this test as root")
    (home / "..data").mkdir()
    path = private(home / "..data" / "secret", GOOD)
    path.chmod(0o440)
    link = home / "secret"
    link.symlink_to("..data/secret")
    monkeypatch.setattr(os, "geteuid", lambda: 12345)  # as a container's user
    configuration.configure(secret_file=link)
    assert ids(configuration.current().secrets) == [Secret(GOOD.encode()).id]
    with pytest.raises(SecretError):
        configuration.configure(secret=link)
    for mode in (0o444, 0o460):
        path.chmod(mode)
        with pytest.raises(SecretError, match="defaultMode: 0440"):
            configuration.configure(secret_file=link)
    path.chmod(0o440)
    os.chown(path, 999, 999)
    with pytest.raises(SecretError, match="another user"):
        configuration.configure(secret_file=link)


def test_an_empty_secret_in_the_environment_is_an_error(monkeypatch):
    """An empty `MEMO_SECRET` names the setting and where it came from."""
    monkeypatch.setenv("MEMO_SECRET", "")
    configuration.reload()
    with pytest.raises(SecretError, match=r"'secret' \(from MEMO_SECRET\): is empty"):
        configuration.current()


def test_a_file_of_another_user_is_refused(home):
    """Another user's file is refused even where it can be read."""
    path = private(home / "s", GOOD)
    if os.geteuid() != 0:
        pytest.fail("only root can give a file away; run this test as root")
    os.chown(path, 12345, -1)
    with pytest.raises(SecretError, match="another user"):
        secret_keys.from_file(path, "x")


@pytest.mark.parametrize("kind", ["missing", "directory", "fifo", "short", "empty", "long"])
def test_what_is_no_secret_file_is_refused(home, kind):
    """Missing, a directory, a pipe (which would block), too short, empty or too long: an error."""
    path = home / "s"
    if kind == "directory":
        path.mkdir(mode=0o700)
    elif kind == "fifo":
        os.mkfifo(path, 0o600)
    elif kind != "missing":
        private(path, {"short": "x", "empty": "", "long": "x" * 70_000}[kind])
    with pytest.raises(SecretError) as caught:
        secret_keys.from_file(path, "MEMO_SECRET_FILE")
    assert "MEMO_SECRET_FILE" in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o277])
def test_the_generated_file_is_owner_only_whatever_the_umask(umask):
    """Mode 0600 in a directory 0700, kept for the next process, with nothing left beside it."""
    before = os.umask(umask)
    try:
        if umask & 0o200:
            path = secret_keys.default_file()
            path.parent.mkdir(parents=True)
            for directory in (path.parent, path.parent.parent):
                directory.chmod(0o700)
        first = secret_keys.generated()
    finally:
        os.umask(before)
    path = secret_keys.default_file()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert len(bytes.fromhex(path.read_text())) == 32
    assert os.listdir(path.parent) == ["secret"]
    assert ids(secret_keys.generated()) == ids(first)


AT_ONCE = """
import os, sys
from memo.settings import secret_keys
print("ready", flush=True)
sys.stdin.readline()
print(secret_keys.generated()[0].id.hex())
"""


def test_processes_that_start_together_agree_on_one_secret():
    """However many processes make the file at once, all of them use the same secret."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", AT_ONCE]
    processes = [
        subprocess.Popen(command, stdin=PIPE, stdout=PIPE, text=True, env=environment)
        for _ in range(6)
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    answers = {process.communicate(timeout=30)[0] for process in processes}
    assert len(answers) == 1
    assert len(answers.pop().strip()) == 16
    assert os.listdir(secret_keys.default_file().parent) == ["secret"]


def test_the_file_is_never_seen_half_written(monkeypatch):
    """Until the whole secret is on disk, the name does not exist."""
    seen = []
    fsync = os.fsync

    def watched(descriptor):
        seen.append(secret_keys.default_file().exists())
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    secret_keys.generated()
    assert seen == [False]


def test_the_file_is_never_readable_by_others(monkeypatch):
    """It is made owner-only, not closed afterwards."""
    modes = []
    fchmod = os.fchmod

    def watched(descriptor, mode):
        modes.append(stat.S_IMODE(os.fstat(descriptor).st_mode))
        fchmod(descriptor, mode)

    monkeypatch.setattr(os, "fchmod", watched)
    before = os.umask(0)
    try:
        secret_keys.generated()
    finally:
        os.umask(before)
    assert modes == [0o600]


def test_a_process_that_loses_the_race_takes_the_winners_secret(monkeypatch):
    """If another process links its file first, its secret is used, not ours."""
    link = os.link

    def late(source, target):
        private(Path(target), GOOD)
        link(source, target)

    monkeypatch.setattr(os, "link", late)
    assert ids(secret_keys.generated()) == [Secret(GOOD.encode()).id]


def test_an_existing_generated_file_is_checked_too():
    """A generated secret that was made readable is refused, not used."""
    secret_keys.generated()
    secret_keys.default_file().chmod(0o644)
    with pytest.raises(SecretError, match="chmod 600"):
        secret_keys.generated()


def test_without_a_place_for_it_the_secret_is_of_this_process(home, monkeypatch):
    """A home that cannot be written costs one warning and one event, and never the user's call."""
    (home / "config").write_text("a file where the directory should be")
    heard: list[events.Event] = []
    remove = events.on_event(heard.append)
    try:
        first = secret_keys.generated()
        with pytest.warns(
            secret_keys.SecretWarning, match="will not outlive this process"
        ) as caught:
            secret_keys.warn_if_not_kept()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert ids(secret_keys.generated()) == ids(first)
    finally:
        remove()
    assert len(caught) == 1
    assert [(event.kind, event.reason) for event in heard] == [("error", "secret")]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_home_is_no_error(home):
    """A directory without write permission falls back as well."""
    (home / "config").mkdir(mode=0o500)
    assert len(secret_keys.generated()) == 1
    with pytest.warns(secret_keys.SecretWarning):
        secret_keys.warn_if_not_kept()


def test_a_file_system_without_links_falls_back(monkeypatch):
    """If files cannot be linked there is no safe way to make one, and no leftover."""

    def refused(source, target):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    secret_keys.generated()
    with pytest.warns(secret_keys.SecretWarning, match="not permitted"):
        secret_keys.warn_if_not_kept()
    assert os.listdir(secret_keys.default_file().parent) == []


def test_no_home_at_all_falls_back(monkeypatch):
    """A user without a home directory can cache within the process."""

    def unknown(user):
        raise KeyError(user)

    for name in ("HOME", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)  # as in a container that has no such user
    assert len(secret_keys.generated()) == 1
    with pytest.warns(secret_keys.SecretWarning, match="no configuration directory"):
        secret_keys.warn_if_not_kept()
