"""Files of memo are owner-only, and a link in the place of one is never followed."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from memo.runtime import private_files


@pytest.fixture
def loose_umask() -> Iterator[None]:
    """Files are open to all by default."""
    old = os.umask(0)
    yield None
    os.umask(old)


def mode(path: Path) -> int:
    return stat.S_IMODE(os.lstat(path).st_mode)


@pytest.mark.usefixtures("loose_umask")
def test_what_is_created_is_owner_only_whatever_the_umask(tmp_path: Path) -> None:
    """Directories, their missing parents, folders in them, and files."""
    home = tmp_path / "made" / "cache"
    with private_files.open_folder(home / "stats", make=True) as folder:
        os.close(private_files.create("file", folder=folder))
    made = [home.parent, home, home / "stats"]
    assert [mode(path) for path in made] == [0o700] * 3
    assert mode(home / "stats" / "file") == 0o600


def test_a_restrictive_umask_does_not_lock_the_owner_out(tmp_path: Path) -> None:
    """Modes are set explicitly."""
    old = os.umask(0o777)
    try:
        private_files.claim(tmp_path / "cache")
        os.close(private_files.create(tmp_path / "cache" / "file"))
    finally:
        os.umask(old)
    assert (mode(tmp_path / "cache"), mode(tmp_path / "cache" / "file")) == (0o700, 0o600)


def test_only_a_plain_file_is_opened(tmp_path: Path) -> None:
    """A link, a directory or a pipe in its place is an error at once."""
    (tmp_path / "target").write_text("theirs")
    (tmp_path / "link").symlink_to("target")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "folder", "pipe"):
        with pytest.raises(OSError, match=r"plain|symbolic"):
            private_files.open_old(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        private_files.open_old(tmp_path / "missing")


def test_a_link_in_the_place_of_a_file_is_replaced_and_its_target_kept(tmp_path: Path) -> None:
    """`open_or_create` removes the link only."""
    (tmp_path / "target").write_text("theirs")
    (tmp_path / "file").symlink_to("target")
    with private_files.open_directory(tmp_path) as folder:
        descriptor = private_files.open_or_create("file", folder)
        os.write(descriptor, b"ours")
        os.close(descriptor)
    assert (tmp_path / "target").read_text() == "theirs"
    assert (tmp_path / "file").read_text() == "ours"
    assert not (tmp_path / "file").is_symlink()


def test_a_directory_that_others_can_write_is_closed(tmp_path: Path) -> None:
    """`tighten` says that it was open; one with the sticky bit is shared on purpose."""
    for bits, was_open, after in ((0o777, True, 0o700), (0o1777, False, 0o1777)):
        folder = tmp_path / f"{bits:o}"
        folder.mkdir()
        folder.chmod(bits)
        assert private_files.tighten(folder) is was_open
        assert mode(folder) == after


def test_the_names_in_a_folder_that_is_missing_or_a_link_are_none(tmp_path: Path) -> None:
    """`list_folder` follows no link."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").touch()
    (tmp_path / "link").symlink_to("folder")
    found = [private_files.list_folder(tmp_path / name) for name in ("folder", "link", "missing")]
    assert found == [["file"], [], []]
