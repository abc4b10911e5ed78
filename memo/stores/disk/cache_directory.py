"""The cache directory: is it writable, read-only or unusable, and one warning with the fix.

Rules of this module:

1.  The directory is *writable*, *read-only* (its files are read as they are), or *unusable*.  A
    process that cannot use it still caches in memory.
2.  One warning per process and directory states the fault and the fix.
3.  A fault is checked again after `DIRECTORY_RETRY_SECONDS`, or as soon as the directory changes.
"""

from __future__ import annotations

import errno
import os
import stat
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from memo.errors import SettingError, TierUnavailable
from memo.runtime import events, private_files

if TYPE_CHECKING:
    from pathlib import Path

WRITABLE: Final = "writable"
READ_ONLY: Final = "read-only"
UNUSABLE: Final = "unusable"
DIRECTORY_RETRY_SECONDS = 1.0
"""Seconds after which an unusable directory is tried again."""
STATE_TRUSTED_SECONDS = 0.001
"""Seconds for which the last known state is used without a check."""
DISK_FULL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT})
"""Errors of a full disk."""
_NO_ACCESS_ERRNOS = frozenset(
    {
        *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EEXIST),
        *(errno.ELOOP, errno.ENAMETOOLONG),
    }
)
"""Errors that mean that this process may not use the directory, rather than a passing fault."""
_FIX_DIRECTORY = (
    "To keep results on disk, set MEMO_DIRECTORY (or configure(directory=...)) to a directory that"
    " this user owns and can write."
)


class DirectoryWarning(RuntimeWarning):
    """The cache directory cannot be used as it is; the text names it and the fix."""


class CacheDirectory:
    """A cache directory, as this process can use it.

    Args:
        path: the directory; created with mode 0700 if it is missing.
        root: the directory of the setting, if `path` is inside it.

    Attributes:
        state, why: what is known so far.
        free_space: frees a number of bytes on a full disk by removing entries; True if any was
            removed.
    """

    def __init__(self, path: Path, root: Path | None = None) -> None:
        self.path = path
        self._root = path if root is None else root
        self._text = str(path)
        self.state = ""
        self.why = ""
        self._last_facts: object = None
        self._check_at = 0.0
        self._retry_at = 0.0
        self._warned = False
        self.free_space: Callable[[int], bool] = lambda size: False

    # --- asking ----------------------------------------------------------------------------------

    def is_unusable(self) -> bool:
        """True if the directory is known to be unusable.

        Checks it at most once per tick, in 2 µs.
        """
        if self.state != UNUSABLE:
            return False
        now = time.monotonic()
        if now > self._check_at:
            self._check_at = now + STATE_TRUSTED_SECONDS
            if now > self._retry_at or self._facts() != self._last_facts:
                self.state = self.why = ""
                return False
        return True

    def open(self) -> str:
        """Return `WRITABLE` or `READ_ONLY`; creates the directory if it is missing.

        Raises:
            TierUnavailable: it cannot be used; a warning has said so.
        """
        if self.is_unusable():
            raise self.unavailable()
        try:
            tightened = private_files.tighten(self._root) | private_files.tighten(self.path)
            if self.path == self._root:
                private_files.claim(self.path)
            else:
                private_files.claim_folder(self.path)
            state = WRITABLE
        except (OSError, SettingError) as error:
            state = self._state_after(error)
        else:
            if tightened:
                self._warn(
                    f"other users could write to the cache directory {self._root}; it is"
                    " owner-only now. Entries that they put there are not used."
                )
        if state == WRITABLE and not os.access(self._text, os.W_OK):
            state = READ_ONLY
        if state == READ_ONLY:
            self._warn(
                f"the cache directory {self.path} is read-only: its entries are read, and new"
                f" results are kept in memory only. {_FIX_DIRECTORY}"
            )
        self.state = state
        return state

    def _state_after(self, error: OSError | SettingError) -> str:
        """Return `READ_ONLY` if the directory can at least be read.

        Raises:
            TierUnavailable: it cannot.
        """
        if self._is_readable():
            return READ_ONLY
        if isinstance(error, SettingError):
            raise self.mark_unusable(error.fix) from error
        if error.errno in DISK_FULL_ERRNOS or error.errno in _NO_ACCESS_ERRNOS:
            raise self.mark_unusable(f"cannot be used: {error.strerror}.") from error
        raise error

    def _is_readable(self) -> bool:
        """True if this process can read but not write the directory, and only its owner can.

        Files of root that this user cannot change may be read, as in a container image.
        """
        try:
            facts = os.stat(self._text)
        except OSError:
            return False
        return (
            stat.S_ISDIR(facts.st_mode)
            and facts.st_uid in (0, os.geteuid())
            and not facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
            and os.access(self._text, os.R_OK | os.X_OK)
            and not os.access(self._text, os.W_OK)
        )

    # --- faults ----------------------------------------------------------------------------------

    def mark_unusable(self, why: str) -> TierUnavailable:
        """Mark the directory as unusable for now, and return the error to raise."""
        self.state, self.why = UNUSABLE, why
        self._last_facts = self._facts()
        self._retry_at = time.monotonic() + DIRECTORY_RETRY_SECONDS
        self._warn(
            f"the cache directory {self.path} {why.rstrip('.; ')}, so results are kept in the"
            f" memory of this process only. {_FIX_DIRECTORY}"
        )
        return self.unavailable()

    def warn_full(self) -> None:
        """Warn that nothing more can be written even though all our own entries were removed."""
        self.why = "the disk is full"
        self._warn(
            f"the disk of the cache directory {self.path} is full, and removing its own entries"
            " is not enough: new results are kept in memory only. Free some space, or set"
            " MEMO_DIRECTORY (or configure(directory=...)) to a directory on another disk."
        )

    def unavailable(self) -> TierUnavailable:
        return TierUnavailable(f"{self.path} {self.why}", reported=True)

    def _facts(self) -> object:
        try:
            facts = os.stat(self._text)
        except OSError as error:
            return error.errno
        return facts.st_dev, facts.st_ino, facts.st_uid, facts.st_mode

    def _warn(self, text: str) -> None:
        if self._warned:
            return
        self._warned = True
        events.emit(events.Event(events.ERROR, tier="disk", reason="directory", detail=text))
        with suppress(Warning):  # a filter made it an error; the caller still gets its result
            warnings.warn(f"memo: {text}", DirectoryWarning, stacklevel=2)

    def health(self) -> dict[str, Any]:
        """Return facts for `memo.health()`: directory, state, fault and fix."""
        facts: dict[str, Any] = {"directory": self._text, "state": self.state or "not used yet"}
        if self.why:
            facts.update(why=self.why, fix=_FIX_DIRECTORY)
        return facts


def is_full(error: BaseException | None) -> bool:
    """True if an error says that the disk is full."""
    import sqlite3

    if isinstance(error, OSError):
        return error.errno in DISK_FULL_ERRNOS
    code: int = getattr(error, "sqlite_errorcode", 0)
    return isinstance(error, sqlite3.Error) and (
        code & 0xFF == sqlite3.SQLITE_FULL or code in _DISK_FULL_CODES
    )


_DISK_FULL_CODES = frozenset({10 | (19 << 8), 10 | (3 << 8)})
"""SQLite's codes for a shared memory file that cannot grow, and for a failed write."""
