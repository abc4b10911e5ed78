"""One SQLite file that many processes and threads share, and that may break or vanish at any time.

Rules of this module:

1.  A process has two connections to a file, one to read and one to write, whichever threads use
    them: a reader never waits for a writer's fsync.
2.  A lock that another process holds costs at most `WRITER_WAIT_SECONDS`, then it is a `TierError`.
    A lease holder (`use_lock`) waits longer, see `retry_while_locked`.  Opening an
    intact file takes no lock.
3.  A file that is damaged is set aside under another name, once, by one process, and the next use
    makes a new one.  A file that is gone or was replaced is noticed by its inode.
4.  Around a fork no statement runs; the child closes what it inherited and opens its own, since
    SQLite must know which locks the child really holds.
"""

from __future__ import annotations

import atexit
import errno
import fcntl
import os
import re
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from memo.errors import TierError, TierUnavailable, described
from memo.runtime import fork, private_files
from memo.runtime.port import LOCK_WAIT_UNTIL

T = TypeVar("T")
WRITER_WAIT_SECONDS = 0.25
"""Longest wait of a writer for a lock of another process, in seconds."""
READER_WAIT_SECONDS = 0.04
"""Longest wait of a reader, which may be on an event loop, in seconds."""
KEPT_LOG_BYTES = 4 << 20
"""Bytes that the log (the `-wal` file) keeps after a checkpoint; one big change makes it longer for
a while."""
AUTOMATIC_CHECKPOINT_PAGES = 1000
"""Pages in the log at which a commit checkpoints it: SQLite's default."""
_SUFFIXES = ("-wal", "-shm", "-journal")
"""Suffixes of the files that SQLite creates beside its file."""
_DECODE_TEXT = partial(str, encoding="utf-8", errors="replace")
"""Decodes the text of a column, whatever its bytes are: a damaged text equals nothing."""
SECONDS_BETWEEN_TRANSACTIONS = 0.002
"""Seconds between two transactions of a long deletion, so that waiting writers get their turn."""
LOCK_RETRY_SECONDS = 0.01
"""Seconds between retries while a lock is waited for."""
_DAMAGED_CODES = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
_BUSY_CODES = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED})
_INCOMPLETE_TEXTS = ("no such table", "no such column", "has no column")
_opening = threading.RLock()
_SQL_FOLDER = Path(__file__).parent / "sql"


def statements(file: str) -> Mapping[str, str]:
    """Return the statements in `sql/<file>.sql`, by their names (`-- name: ...` above each)."""
    text = (_SQL_FOLDER / f"{file}.sql").read_text("utf-8")
    parts = re.split(r"^-- name: (\w+)\n", text, flags=re.MULTILINE)
    return {name: one.strip() for name, one in zip(parts[1::2], parts[2::2], strict=True)}


ENTRIES_SQL = statements("entries")
"""The statements on the index of entries, by their names."""


def after_prefix(prefix: str) -> str:
    """Return a text that sorts after every name with a prefix."""
    return f"{prefix}\U0010ffff"


class DamagedError(Exception):
    """A SQLite file lacks tables or rows that it must have, or is no plain file."""


class SqliteFile:
    """The two connections of this process to one file.

    Args:
        path: the file; its directory exists.
        cache_directory: it, the file, and any directory between them must not be a link.
        prepare: called with the connection for writing after it was opened, to create the tables.
        before_set_aside: called before a damaged file is renamed, to notify its other users.
        pragmas: for both connections, such as `"cache_size=8192"`; set before any table is created.

    Attributes:
        reader, writer: the connections; only to be used under `reading` and `writing`.
        reading, writing: locks among the threads of this process.
        is_open: both connections are open.
        opened: counts the openings, so that a cache of the content can be dropped at each.
    """

    def __init__(
        self,
        path: Path,
        cache_directory: Path,
        prepare: Callable[[sqlite3.Connection], None],
        before_set_aside: Callable[[], None] = lambda: None,
        pragmas: Sequence[str] = (),
    ) -> None:
        self.path = path
        self._text = str(path)
        self._lock_name = path.with_suffix(".lock").name
        self._in_folder = path.parent != cache_directory
        self._prepare = prepare
        self._before_set_aside = before_set_aside
        self._pragmas = ("trusted_schema=0", f"journal_size_limit={KEPT_LOG_BYTES}", *pragmas)
        self.opened = 0
        self.read_only = False
        self._new_locks()
        self._forget()
        _files.add(self)
        fork.hold_locks_of(self)

    def _new_locks(self) -> None:
        self.reading = threading.RLock()
        self.writing = threading.RLock()

    def _forget(self) -> None:
        self._reader: sqlite3.Connection | None = None
        self._row_cursor: sqlite3.Cursor | None = None
        self._writer: sqlite3.Connection | None = None
        self._file_id: tuple[int, ...] = ()
        self.is_open = False

    def _closed_error(self) -> TierError:
        """Return the error of a use that finds it closed.

        At the end of the process it is not reported.
        """
        text = f"{self.path.name}: closed while it was used"
        return TierUnavailable(text, reported=True) if _exiting else TierError(text)

    @property
    def reader(self) -> sqlite3.Connection:
        """The connection for reading; `open` first, then take `reading`."""
        if self._reader is None:
            raise self._closed_error()
        return self._reader

    @property
    def row_cursor(self) -> sqlite3.Cursor:
        """Return a cursor of `reader` that is reused for queries of one row, which saves 1 µs.

        To be used under `reading`, until its row was fetched.
        """
        if self._row_cursor is None:
            raise self._closed_error()
        return self._row_cursor

    @property
    def writer(self) -> sqlite3.Connection:
        """The connection for writing; `open` first, then take `writing`."""
        if self.read_only and self._reader is not None:
            raise TierUnavailable(f"{self.path.name}: read-only", reported=True)
        if self._writer is None:
            raise self._closed_error()
        return self._writer

    def open(self, *, read_only: bool = False) -> None:
        """Open the connections that are closed; a damaged file is set aside and created anew.

        Never to be called with only `reading` held: the order of the locks is `writing`, `reading`.

        Args:
            read_only: the file and its directory cannot be written, so the file is read as it is.

        Raises:
            sqlite3.Error, OSError: it cannot be opened.
        """
        if self.is_open:
            return
        with self.writing, self.reading, _opening:
            if self.is_open:
                return
            self.read_only = read_only
            if read_only:
                self._open_to_read()
                return
            with self._exclusive():
                try:
                    self.open_both()
                except (sqlite3.Error, DamagedError) as error:
                    if not is_damaged(error):
                        raise
                    self._move_aside()
                    self.open_both()

    def open_both(self) -> None:
        place: tuple[int, ...] = ()
        try:
            with self._folder() as folder, suppress(FileExistsError):
                os.close(private_files.create(self.path.name, folder=folder))
            self._check_plain(_SUFFIXES)
            self._file_id = place = _file_id(self._text)
            self._writer = self._connect(WRITER_WAIT_SECONDS)
            self._writer.execute("PRAGMA journal_mode=WAL").fetchone()
            self._prepare(self._writer)
            self._reader = self._connect(READER_WAIT_SECONDS)
            self._reader.execute("PRAGMA query_only=1")
            self._reader.execute("SELECT count(*) FROM sqlite_master").fetchone()
            self._row_cursor = self._reader.cursor()
            self._file_id = (*self._check_not_replaced(place), *_file_id(f"{self._text}-wal"))
        except BaseException:
            self._close()
            self._file_id = place
            raise
        self.opened += 1
        self.is_open = True

    def _open_to_read(self) -> None:
        try:
            self._check_plain()
            self._file_id = place = self._version()
            immutable = not (len(place) > 5 and place[-1])
            more = "mode=ro&immutable=1" if immutable else "mode=ro"
            self._reader = self._connect(READER_WAIT_SECONDS, more)
            self._reader.execute("SELECT count(*) FROM sqlite_master").fetchone()
            self._prepare(self._reader)
            self._row_cursor = self._reader.cursor()
        except BaseException:
            self._close()
            raise
        self.opened += 1
        self.is_open = True

    def _version(self) -> tuple[int, ...]:
        """Return a value that identifies the content of the file and its log."""
        facts = os.stat(self._text)
        version: tuple[int, ...] = (facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns)
        with suppress(FileNotFoundError):
            log = os.stat(f"{self._text}-wal")
            version = (*version, log.st_ino, log.st_mtime_ns, log.st_size)
        return version

    def _check_not_replaced(self, place: tuple[int, ...]) -> tuple[int, ...]:
        if _file_id(self._text) != place:
            raise OSError(errno.ESTALE, "replaced while it was opened", self._text)
        return place

    def _folder(self) -> AbstractContextManager[int]:
        folder = self.path.parent
        return (
            private_files.open_folder(folder)
            if self._in_folder
            else private_files.open_directory(folder)
        )

    @contextmanager
    def _exclusive(self) -> Iterator[bool]:
        """Exclude other processes; yields False if that took more than `WRITER_WAIT_SECONDS`."""
        with self._folder() as folder:
            descriptor = private_files.open_or_create(self._lock_name, folder)
        try:
            yield _locked(descriptor)
        finally:
            os.close(descriptor)

    def _check_plain(self, beside: Sequence[str] = ()) -> os.stat_result:
        """Refuse a link, a directory, or another user's file; return the file's facts.

        Args:
            beside: suffixes of other files that are checked too if they exist.
        """
        try:
            with self._folder() as folder:
                for suffix in beside:
                    with suppress(FileNotFoundError):
                        private_files.check_plain(f"{self.path.name}{suffix}", folder)
                return private_files.check_plain(self.path.name, folder, read_only=self.read_only)
        except OSError as error:
            if error.errno == errno.EINVAL:
                raise DamagedError("not a plain file of this user") from error
            raise

    def _check_opened(self, connection: sqlite3.Connection) -> None:
        """Refuse what SQLite has opened if it is not the file that was checked.

        SQLite opens a file by its path, and tells where that led; nothing was read or written yet.
        """
        connection.text_factory = os.fsdecode
        ((_, _, place),) = connection.execute("PRAGMA database_list")
        there = os.stat(place, follow_symlinks=False)
        if not os.path.samestat(there, self._check_plain()):
            raise OSError(errno.ESTALE, "replaced while it was opened", self._text)

    def _connect(self, patience: float, mode: str = "mode=rw") -> sqlite3.Connection:
        connection = sqlite3.connect(
            f"{self.path.absolute().as_uri()}?{mode}",
            timeout=patience,
            isolation_level=None,
            check_same_thread=False,
            uri=True,
        )
        try:
            self._check_opened(connection)
            connection.text_factory = _DECODE_TEXT
            for pragma in () if self.read_only else self._pragmas:
                _set(connection, pragma)
        except BaseException:
            connection.close()
            raise
        return connection

    def was_replaced(self) -> bool:
        """True if the open file is no longer the one at the path; takes about 3 µs."""
        place = self._file_id
        try:
            if self.read_only:
                return self._version() != place or os.access(self.path.parent, os.W_OK)
            file = os.stat(self._text)
            if (file.st_dev, file.st_ino) != place[:2]:
                return True
            if len(place) == 2:
                return False
            log = os.stat(f"{self._text}-wal")
            return (log.st_dev, log.st_ino) != place[2:]
        except OSError:
            return True

    @contextmanager
    def transaction(self, *pragmas: str) -> Iterator[sqlite3.Connection]:
        """Run a transaction that excludes all other writers of the file.

        Args:
            pragmas: set before it begins.
        """
        connection = self.writer
        for pragma in pragmas:
            connection.execute(f"PRAGMA {pragma}")
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield connection
            if connection.in_transaction:
                connection.execute("COMMIT")
        except BaseException:
            roll_back(connection)
            raise

    def close(self) -> None:
        """Close both connections; the next use opens them again."""
        with self.writing, self.reading:
            self._close()

    def _close(self) -> None:
        connections = (self._reader, self._writer)
        self._forget()
        for connection in connections:
            if connection is not None:
                with suppress(sqlite3.Error):
                    roll_back(connection)
                    connection.close()

    def __del__(self) -> None:
        self._close()

    def handle_error(self, error: BaseException) -> TierError:
        """Handle an error, and return the `TierError` to raise.

        Never to be called with only `reading` held.
        """
        if isinstance(error, TierError):
            return error
        code = result_code(error)
        if is_damaged(error) and not self.read_only:
            with suppress(OSError, sqlite3.Error):
                self.set_aside()
        elif code not in _BUSY_CODES and code != sqlite3.SQLITE_FULL:
            self.close()
        return TierError(f"{self.path.name}: {described(error)}")

    def set_aside(self) -> None:
        """Rename a damaged file, unless another process has done so already.

        Raises:
            OSError: it cannot be renamed, or another process holds it for too long.
        """
        with self.writing, self.reading, self._exclusive() as alone:
            if not alone:
                raise OSError(errno.EAGAIN, "another process has it", self._text)
            self._move_aside()

    def _move_aside(self) -> None:
        place = self._file_id
        self._close()
        with suppress(FileNotFoundError):
            if place and _file_id(self._text) != place[:2]:
                return
        self._before_set_aside()
        name = self.path.name
        with self._folder() as folder:
            for suffix in (*_SUFFIXES, ""):
                old, new = f"{name}{suffix}", f"{name}.damaged{suffix}"
                with suppress(FileNotFoundError):
                    os.replace(old, new, src_dir_fd=folder, dst_dir_fd=folder)

    def fork_locks(self) -> tuple[threading.RLock, threading.RLock]:
        """See `memo.runtime.fork.LockOwner.fork_locks`."""
        return self.writing, self.reading

    def renew_locks(self, *, whole: bool) -> None:
        """See `memo.runtime.fork.LockOwner.renew_locks`."""
        self._new_locks()
        if whole:
            self._close()
        else:  # a statement was running: its connection must not be used here
            _abandoned.append((self._reader, self._writer))
            self._forget()


def _set(connection: sqlite3.Connection, pragma: str) -> None:
    """Set a pragma unless it is set already: setting some takes the writers' lock."""
    name, _, value = pragma.partition("=")
    if connection.execute(f"PRAGMA {name}").fetchone() != (int(value),):
        connection.execute(f"PRAGMA {pragma}")


def is_damaged(error: BaseException) -> bool:
    """True if an error means that the file itself is damaged."""
    if isinstance(error, DamagedError) or result_code(error) in _DAMAGED_CODES:
        return True
    return isinstance(error, sqlite3.OperationalError) and str(error).startswith(_INCOMPLETE_TEXTS)


def retry_while_locked(work: Callable[..., T], *args: Any) -> T:
    """Call `work(*args)`; retry while the file is locked and the caller may wait longer.

    Not to be called with a lock held, nor on an event loop.

    Raises:
        TierError: as `work` does.
    """
    while True:
        try:
            return work(*args)
        except TierError as error:
            cause = error.__cause__
            if result_code(cause) not in _BUSY_CODES or time.monotonic() >= LOCK_WAIT_UNTIL.get():
                raise
        time.sleep(LOCK_RETRY_SECONDS)


def result_code(error: BaseException | None) -> int:
    """Return SQLite's primary result code of an error; 0 for other errors."""
    code: int = getattr(error, "sqlite_errorcode", 0)
    return code & 0xFF


def roll_back(connection: sqlite3.Connection) -> None:
    """Roll a transaction back; SQLite may have done so itself."""
    if connection.in_transaction:
        with suppress(sqlite3.Error):
            connection.execute("ROLLBACK")


def _file_id(path: str) -> tuple[int, int]:
    facts = os.stat(path)
    return facts.st_dev, facts.st_ino


def _locked(descriptor: int) -> bool:
    """Lock a file; False if that took more than `WRITER_WAIT_SECONDS`."""
    end = time.monotonic() + WRITER_WAIT_SECONDS
    while time.monotonic() < end:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.002)
        else:
            return True
    return False


_files: weakref.WeakSet[SqliteFile] = weakref.WeakSet()
_abandoned: list[object] = []


def _renew_opening() -> None:
    global _opening
    _opening = threading.RLock()


_exiting = False
"""The process is exiting: threads that still run find their file closed."""


def _at_exit() -> None:
    global _exiting
    _exiting = True
    for file in tuple(_files):
        file.close()


fork.in_child(_renew_opening)
atexit.register(_at_exit)
