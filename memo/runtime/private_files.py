"""Private directories and files: owner-only by explicit modes, and never through a link.

Modes are set explicitly, so that the user's umask makes no difference.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from memo.errors import SettingError

if TYPE_CHECKING:
    from pathlib import Path

DIRECTORY_MODE = 0o700
FILE_MODE = 0o600
_NEW_FILE_FLAGS = os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_OLD_FILE_FLAGS = os.O_NOFOLLOW | os.O_CLOEXEC
_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def claim(path: Path, setting: str = "directory") -> None:
    """Create a directory of the user's own, mode 0700, with missing parents.

    Args:
        path: the directory; a symbolic link is followed only if it is the user's or root's.
        setting: the name of the setting that the path comes from, for the error.

    Raises:
        SettingError: it belongs to another user, or is not a directory.
        OSError: it cannot be created.
    """
    _make(path)
    me = os.geteuid()
    link = os.lstat(path)
    if stat.S_ISLNK(link.st_mode) and link.st_uid not in (me, 0):
        raise SettingError(
            setting, str(path), "is another user's link; choose a directory of your own."
        )
    facts = os.stat(path)
    if facts.st_uid != me:
        raise SettingError(setting, str(path), "is another user's; choose a directory of your own.")
    _close_to_others(path, facts)


def claim_folder(path: Path) -> None:
    """Claim a directory of memo's own in the cache directory; a link is refused.

    Raises:
        SettingError: it belongs to another user.
        OSError: it is a link, or cannot be created.
    """
    if path.is_symlink():
        raise NotADirectoryError(errno.ENOTDIR, "a link, not a directory", str(path))
    claim(path)


def _make(path: Path) -> None:
    """Create a directory and its missing parents: all of them mode 0700."""
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
    """Make a directory of this user that others can write owner-only; True if it was open.

    One with the sticky bit, which is shared on purpose, is left alone.
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


def subdirectory(name: str, within: int) -> None:
    """Create a directory inside an open one, mode 0700.

    Raises:
        OSError: it cannot be created, or is something else.
    """
    with suppress(FileExistsError):
        os.mkdir(name, DIRECTORY_MODE, dir_fd=within)
    with open_directory(name, within) as folder:
        if stat.S_IMODE(os.fstat(folder).st_mode) != DIRECTORY_MODE:
            os.fchmod(folder, DIRECTORY_MODE)


@contextmanager
def open_directory(path: str | Path, within: int | None = None) -> Iterator[int]:
    """Yield a descriptor of a directory; paths relative to it stay inside it.

    Args:
        within: the descriptor of the directory that `path` is relative to.

    Raises:
        OSError: there is no directory, or a link in its place.
    """
    descriptor = os.open(path, _FOLDER_FLAGS, dir_fd=within)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def open_directories(top: str, *names: str) -> int:
    """Open a directory some levels below another one, and return its descriptor.

    Raises:
        OSError: one of them is missing, or a link is in its place.
    """
    folder = os.open(top, _FOLDER_FLAGS)
    for name in names:
        above = folder
        try:
            folder = os.open(name, _FOLDER_FLAGS, dir_fd=above)
        finally:
            os.close(above)
    return folder


@contextmanager
def open_folder(path: str | Path, *, make: bool = False) -> Iterator[int]:
    """Yield a descriptor of a folder in the cache directory; neither of the two may be a link.

    Args:
        make: create both if they are missing.

    Raises:
        SettingError: the cache directory belongs to another user.
        OSError: there is no folder and none can be created, or there is a link in its place.
    """
    directory, name = os.path.split(path)
    if make:
        from pathlib import Path

        claim_folder(Path(directory))
        with open_directory(directory) as above:
            subdirectory(name, above)
    folder = open_directories(str(directory), name)
    try:
        yield folder
    finally:
        os.close(folder)


def list_folder(path: str | Path) -> list[str]:
    """Return the names in a folder of the cache directory; empty if it is missing, or a link."""
    try:
        with open_folder(path) as folder:
            return os.listdir(folder)
    except OSError:
        return []


def _close_to_others(path: Path, facts: os.stat_result) -> None:
    if stat.S_IMODE(facts.st_mode) != DIRECTORY_MODE:
        os.chmod(path, DIRECTORY_MODE)


def create(path: str | Path, flags: int = os.O_WRONLY, folder: int | None = None) -> int:
    """Create a file with mode 0600, and return its descriptor.

    Args:
        folder: the descriptor of the directory that `path` is relative to.

    Raises:
        FileExistsError: it exists.
        OSError: it cannot be created.
    """
    descriptor = os.open(path, flags | _NEW_FILE_FLAGS, FILE_MODE, dir_fd=folder)
    try:
        if stat.S_IMODE(os.fstat(descriptor).st_mode) != FILE_MODE:
            os.fchmod(descriptor, FILE_MODE)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def open_old(path: str | Path, flags: int = os.O_RDONLY, folder: int | None = None) -> int:
    """Open an existing plain file, and return its descriptor.

    Args:
        folder: the descriptor of the directory that `path` is relative to.

    Raises:
        OSError: it is missing, is a link, or is not a plain file.
    """
    descriptor = os.open(path, flags | _OLD_FILE_FLAGS | os.O_NONBLOCK, dir_fd=folder)
    try:
        plain = stat.S_ISREG(os.fstat(descriptor).st_mode)
    except BaseException:
        os.close(descriptor)
        raise
    if plain:
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EINVAL, "not a plain file", str(path))


def open_or_create(name: str, folder: int, flags: int = os.O_RDWR) -> int:
    """Open a plain file, created with mode 0600 if it is missing, and return its descriptor.

    A link with its name is removed; the target is not touched.

    Args:
        folder: the descriptor of its directory.

    Raises:
        OSError: it cannot be created or opened, or is not a plain file.
    """
    while True:
        try:
            return open_old(name, flags, folder)
        except FileNotFoundError:
            with suppress(FileExistsError):
                return create(name, flags, folder)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            _remove_link(name, folder)


def _remove_link(name: str, folder: int) -> None:
    """Remove a link, unless another process has already put its own file there."""
    fcntl.flock(folder, fcntl.LOCK_EX)
    try:
        with suppress(FileNotFoundError):
            if stat.S_ISLNK(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
                os.unlink(name, dir_fd=folder)
    finally:
        fcntl.flock(folder, fcntl.LOCK_UN)


def check_plain(name: str, folder: int, *, read_only: bool = False) -> os.stat_result:
    """Check that a file is a plain one of the user's own, for callers that open it themselves.

    Args:
        folder: the descriptor of its directory.
        read_only: it is in a directory that this user cannot write; it may then be root's.

    Returns:
        The file's facts.

    Raises:
        OSError: it is a link, something else, another user's, or missing.
    """
    facts = os.stat(name, dir_fd=folder, follow_symlinks=False)
    owners = (os.geteuid(), 0) if read_only else (os.geteuid(),)
    if not stat.S_ISREG(facts.st_mode) or facts.st_uid not in owners:
        raise OSError(errno.EINVAL, "not a plain file of this user", name)
    if not read_only and stat.S_IMODE(facts.st_mode) != FILE_MODE:
        os.chmod(name, FILE_MODE, dir_fd=folder)
    return facts
