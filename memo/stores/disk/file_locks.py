"""Locks between the processes of a host.

Files that the kernel locks, and frees when a holder dies.
"""

from __future__ import annotations

import fcntl
import os
import re
from contextlib import suppress
from pathlib import Path

from memo.errors import SettingError, TierError, file_fault
from memo.runtime import fork, private_files

_LOCK_FILE_NAME = re.compile(r"[0-9a-f]{40}")
"""File names that `Host.lock` gives to locks; a sweep removes no other file."""


class HostLock:
    """A lock of this host for one name: a locked file that the kernel frees when the holder dies.

    Not to be shared by threads: each thread asks `Host.lock` for its own.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None
        self._seen: tuple[int, int] | None = None

    def try_acquire(self, holder: str = "") -> bool:
        """Take the lock if it is free, and write the holder's text into it.

        Raises:
            TierError: the file cannot be created or locked.
        """
        if self._descriptor is not None:
            return False
        try:
            return self._try_acquire(holder)
        except SettingError as error:
            raise TierError(f"lock: {error}") from error
        except OSError as error:
            raise file_fault("lock", error) from error

    def _try_acquire(self, holder: str) -> bool:
        try:
            with private_files.open_folder(self._path.parent) as folder:
                return self._acquire_in(folder, holder)
        except FileNotFoundError:
            with private_files.open_folder(self._path.parent, make=True) as folder:
                return self._acquire_in(folder, holder)

    def _acquire_in(self, folder: int, holder: str) -> bool:
        while True:
            descriptor = private_files.open_or_create(self._path.name, folder)
            try:
                taken = flock(descriptor, fcntl.LOCK_EX)
                if taken and _is_at(descriptor, self._path.name, folder):
                    break
                self._seen = _identity(os.fstat(descriptor))
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)
            if not taken:
                return False
            # otherwise the previous holder has unlinked the file, so this lock protects nothing
        self._descriptor = descriptor
        fork.renew_in_child(self)
        self.label(holder)
        return True

    def may_be_free(self) -> bool:
        """True if the file has changed since `try_acquire` found it locked; it takes 2 µs.

        A holder that dies leaves it unchanged.
        """
        try:
            return _identity(os.lstat(self._path)) != self._seen
        except OSError:
            return True

    def label(self, holder: str) -> None:
        """Replace the holder's text, if the lock is held here."""
        if self._descriptor is None:
            return
        with suppress(OSError):  # a full disk: the lock is held all the same, only without a text
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, holder.encode(), 0)

    def release(self) -> None:
        """Release the lock; does nothing if it is not held."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is None:
            return
        fork.forget(self)
        with suppress(OSError), private_files.open_folder(self._path.parent) as folder:
            if _is_at(descriptor, self._path.name, folder):
                os.unlink(self._path.name, dir_fd=folder)
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)

    def __del__(self) -> None:
        self.release()

    def holder(self) -> str:
        """Return the text of the current holder, or `""` if the lock is free."""
        if self._descriptor is not None:
            return os.pread(self._descriptor, 4096, 0).decode(errors="replace")
        try:
            with private_files.open_folder(self._path.parent) as folder:
                descriptor = private_files.open_old(self._path.name, folder=folder)
        except OSError:
            return ""
        try:
            if flock(descriptor, fcntl.LOCK_SH):
                return ""
            return os.pread(descriptor, 4096, 0).decode(errors="replace")
        except OSError:
            return ""
        finally:
            os.close(descriptor)

    def after_fork(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)  # the lock stays with the parent


def sweep(directory: Path) -> int:
    """Remove the files of locks whose holders died; return their number.

    A process that has just opened such a file sees that it is gone, and creates another.
    """
    removed = 0
    with suppress(OSError), private_files.open_folder(directory) as folder:
        for name in filter(_LOCK_FILE_NAME.fullmatch, os.listdir(folder)):
            with suppress(OSError):
                removed += _sweep(folder, name)
    return removed


def _sweep(folder: int, name: str) -> bool:
    descriptor = private_files.open_old(name, folder=folder)
    try:
        free = flock(descriptor, fcntl.LOCK_EX) and _is_at(descriptor, name, folder)
        if free:
            os.unlink(name, dir_fd=folder)
        return free
    finally:
        os.close(descriptor)


def flock(descriptor: int, kind: int) -> bool:
    """Lock an open file without waiting; False if another process has locked it."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _identity(facts: os.stat_result) -> tuple[int, int]:
    return facts.st_ino, facts.st_mtime_ns


def _is_at(descriptor: int, name: str, folder: int) -> bool:
    try:
        there = os.stat(name, dir_fd=folder, follow_symlinks=False)
        return os.path.samestat(os.fstat(descriptor), there)
    except FileNotFoundError:
        return False
