"""Private directories and files: owner-only by explicit modes, and never through a link.

The modes are set, not asked for: what the user's umask allows makes no difference.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from memo.errors import SettingError

if TYPE_CHECKING:
    from pathlib import Path

DIRECTORY_MODE = 0o700
FILE_MODE = 0o600
_NEW = os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_OLD = os.O_NOFOLLOW | os.O_CLOEXEC
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def claim(path: Path, setting: str = "directory") -> None:
    """Make a directory that is the user's own, mode 0700; parents are made where they are missing.

    Args:
        path: where; a symbolic link is followed only when it is the user's or root's.
        setting: the name of the setting that the path comes from, for the error.

    Raises:
        SettingError: it belongs to another user, or is no directory.
        OSError: it cannot be made.
    """
    _make(path)
    me = os.geteuid()
    link = os.lstat(path)
    if stat.S_ISLNK(link.st_mode) and link.st_uid not in (me, 0):
        raise SettingError(setting, str(path), "is another user's link; name a directory of yours.")
    facts = os.stat(path)
    if facts.st_uid != me:
        raise SettingError(setting, str(path), "is another user's; name a directory of your own.")
    _close_to_others(path, facts)


def claim_folder(path: Path) -> None:
    """Claim a folder of memo's own in the cache directory, where a link is refused.

    Raises:
        SettingError: it belongs to another user.
        OSError: it is a link, or cannot be made.
    """
    if path.is_symlink():
        raise NotADirectoryError(errno.ENOTDIR, "a link, not a directory", str(path))
    claim(path)


def _make(path: Path) -> None:
    """Make a directory and its parents, as far as they are missing: all of them mode 0700."""
    if path.is_dir():
        return
    if not path.parent.is_dir() and path.parent != path:
        _make(path.parent)
    try:
        os.mkdir(path, DIRECTORY_MODE)
    except FileExistsError:
        if not path.is_dir():
            raise


def tighten(path: Path) -> bool:
    """Close a directory of this user's that others can write; whether it was open to them.

    Not one with the sticky bit, which people share on purpose.
    """
    try:
        facts = os.lstat(path)
    except OSError:
        return False
    wide = facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not facts.st_mode & stat.S_ISVTX
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.geteuid() or not wide:
        return False
    _close_to_others(path, facts)
    return True


def subdirectory(path: Path) -> Path:
    """Make a directory inside one that was claimed, mode 0700.

    Raises:
        OSError: it cannot be made, or is something else.
    """
    try:
        os.mkdir(path, DIRECTORY_MODE)
    except FileExistsError:
        facts = os.lstat(path)
        if not stat.S_ISDIR(facts.st_mode):
            raise NotADirectoryError(errno.ENOTDIR, "not a directory", str(path)) from None
    else:
        facts = os.lstat(path)
    _close_to_others(path, facts)
    return path


def check_folder(path: str | Path) -> None:
    """Refuse a link in the place of a directory.

    Raises:
        OSError: it is a link or something else, or is not there.
    """
    if not stat.S_ISDIR(os.lstat(path).st_mode):
        raise NotADirectoryError(errno.ENOTDIR, "not a directory", str(path))


@contextmanager
def opened(path: str | Path, within: int | None = None) -> Iterator[int]:
    """A descriptor of a directory: a path relative to it stays inside, even if links are swapped.

    Args:
        within: the descriptor of the directory that `path` is relative to.

    Raises:
        OSError: there is no directory, or a link in its place.
    """
    descriptor = os.open(path, _FOLDER, dir_fd=within)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def listed(path: str | Path) -> list[str]:
    """The names in a directory; none where there is no directory, or a link in its place."""
    try:
        with opened(path) as folder:
            return os.listdir(folder)
    except OSError:
        return []


def _close_to_others(path: Path, facts: os.stat_result) -> None:
    if stat.S_IMODE(facts.st_mode) != DIRECTORY_MODE:
        os.chmod(path, DIRECTORY_MODE)


def create(path: str | Path, flags: int = os.O_WRONLY, folder: int | None = None) -> int:
    """A descriptor of a new file, mode 0600.

    Args:
        folder: the descriptor of the directory that `path` is relative to.

    Raises:
        FileExistsError: there is one.
        OSError: it cannot be made.
    """
    descriptor = os.open(path, flags | _NEW, FILE_MODE, dir_fd=folder)
    try:
        if stat.S_IMODE(os.fstat(descriptor).st_mode) != FILE_MODE:
            os.fchmod(descriptor, FILE_MODE)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def open_old(path: str | Path, flags: int = os.O_RDONLY, folder: int | None = None) -> int:
    """A descriptor of a plain file that exists.

    Args:
        folder: the descriptor of the directory that `path` is relative to.

    Raises:
        OSError: it is not there, is a link, or is not a plain file.
    """
    descriptor = os.open(path, flags | _OLD | os.O_NONBLOCK, dir_fd=folder)
    try:
        plain = stat.S_ISREG(os.fstat(descriptor).st_mode)
    except BaseException:
        os.close(descriptor)
        raise
    if plain:
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EINVAL, "not a plain file", str(path))


def open_or_create(path: str | Path, flags: int = os.O_RDWR) -> int:
    """A descriptor of a plain file, made with mode 0600 where it is missing."""
    while True:
        try:
            return open_old(path, flags)
        except FileNotFoundError:
            try:
                return create(path, flags)
            except FileExistsError:
                continue


def check_plain(path: str | Path, *, read_only: bool = False) -> None:
    """Refuse what is not a plain file of the user's own, for those that open it by themselves.

    Args:
        read_only: it lies in a directory that this user cannot write: root's will do as well.

    Raises:
        OSError: it is a link, something else, another user's, or not there.
    """
    facts = os.lstat(path)
    owners = (os.geteuid(), 0) if read_only else (os.geteuid(),)
    if not stat.S_ISREG(facts.st_mode) or facts.st_uid not in owners:
        raise OSError(errno.EINVAL, "not a plain file of this user", str(path))
    if not read_only and stat.S_IMODE(facts.st_mode) != FILE_MODE:
        os.chmod(path, FILE_MODE)
