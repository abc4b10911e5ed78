"""The index of the disk tier: `diskcache` without the parts that unpickle.

When the budget is spent, expired entries are evicted first, then entries of replaced code versions,
then the least valuable entries.  The *worth* of an entry is the cost of its computation per byte;
it halves with every `HALF_LIFE_SECONDS` since the entry was stored or last read.  All worths decay
at the same rate, so their order changes only by use.  An entry therefore has a fixed rank: the time
of its last use plus `HALF_LIFE_SECONDS` for each doubling of its cost per byte.  It is stored in
the column by which `diskcache` evicts.

`diskcache` (up to 5.6.3) unpickles what is in its directory (CVE-2025-69872).  Here keys are text,
values are bytes, nothing else is written or read, and its table of settings is checked before it
reads it.  Only this module knows `diskcache`; it is imported when the disk tier is first opened.
"""

from __future__ import annotations

import math
import sqlite3
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

import diskcache
from diskcache.core import DEFAULT_SETTINGS, METADATA, MODE_RAW

from memo.errors import TierError
from memo.runtime.named_tuple import NamedTuple
from memo.stores.disk.payload_files import Payloads
from memo.stores.disk.sqlite_file import (
    AUTOMATIC_CHECKPOINT_PAGES,
    ENTRIES_SQL,
    KEPT_LOG_BYTES,
    DamagedError,
    SqliteFile,
    after_prefix,
)

EVICTED_PER_TRANSACTION = 10
"""Entries that one transaction evicts, plus one for each `_BYTES_PER_EVICTED` that are lacking."""
_BYTES_PER_EVICTED = 64 * 1024
_MAX_EVICTED_PER_TRANSACTION = 100
"""Maximum number of entries that one transaction evicts."""
_UNLIMITED_BYTES = 1 << 62
"""More bytes than any disk has."""
HALF_LIFE_SECONDS = 86_400
"""Seconds without use in which an entry's worth halves: an entry that costs a thousand times as
much per byte is kept ten days longer."""
_MIN_COST_NS = 1000
"""Minimum cost of a computation, in nanoseconds, for the worth of its entry."""
_MIN_SIZE_BYTES = 1024
"""Minimum size of an entry, in bytes, for its worth."""
_REPLACED_RANK_SECONDS = 10 * 365 * 86_400
"""Seconds by which an entry of a replaced code version ranks behind all others: its rank is the
time of its replacement minus this."""
_CODE_NOTE_SECONDS = 60.0
"""Seconds after which a storing process notes the code version of a function again."""
_BUDGET_SHARE = 16
"""The fraction of the free budget that a process may use before it checks the budget again, and of
the budget by which it may be exceeded until that is worked off."""
_LOGGED_BYTES_PER_STORE = 32 * 1024
"""Approximate bytes that a store adds to the index's log before that is checkpointed."""
_BUDGET_CHECK_SECONDS = 1.0
"""Seconds after which the budget is checked again in any case."""
ROWS_PER_TRANSACTION = 4000
"""Maximum number of entries that are deleted in one transaction, so that others may write in
between.  Each batch writes most pages of the tree of keys, which are in no order, so small batches
cost more."""
_ROWS_PER_STATEMENT = 500
"""Entries that such a transaction deletes before it checks the time."""
_DELETE_SECONDS = 0.02
"""Seconds after which such a transaction ends."""
_EVICT_SECONDS = 0.01
"""Seconds after which a store evicts no more bytes than it adds."""
_CACHED_PAGES = 128
"""Pages of the index that are cached in memory."""
_CACHED_PAGES_TO_CLEAR = 4096
"""Pages that are cached during a long deletion: the tree of keys of about 150,000 entries."""
_SCHEMA_NAMES = {"Cache", "Cache_key_raw", "Settings"} | {
    f"Settings_{number}_{event}"
    for number, event in (
        ("count", "insert"),
        ("count", "delete"),
        ("size", "insert"),
        ("size", "update"),
        ("size", "delete"),
    )
}
_SET_RANK = "UPDATE Cache SET access_time = ? + CAST(tag AS INTEGER) WHERE key = ? AND raw = 1"
_SELECT_FILE_NAME = "SELECT filename FROM Cache WHERE key = ? AND raw = 1"
_SELECT_SOME = "SELECT rowid, filename FROM Cache WHERE key >= ? AND key < ? AND raw = 1 LIMIT ?"
_DELETE_ROW = "DELETE FROM Cache WHERE rowid = ?"


class Row(NamedTuple):
    """An entry's row in the index.

    Attributes:
        record: the record, if it is small.
        name: the name of its files, if it has any.
        size: bytes of its files.
        tag: see `tag`.
    """

    record: bytes | None
    name: str | None
    size: int
    tag: str = "0 "


class Cleared(NamedTuple):
    """The rows that one transaction of a long deletion has deleted.

    Attributes:
        entries: their number.
        names: the names of their files, which the caller removes.
        last: the row that was deleted last.
    """

    entries: int
    names: list[str]
    last: int


def tag(cost: int, size: int, code: str) -> str:
    """Return the tag of an entry: the seconds that its cost adds to its rank, and its code.

    Args:
        cost: nanoseconds that its computation took.
        size: bytes of record and payload.
        code: the function's code version.
    """
    per_byte = max(cost, _MIN_COST_NS) / max(size, _MIN_SIZE_BYTES)
    return f"{int(HALF_LIFE_SECONDS * math.log2(per_byte))} {code}"


def _refuse(what: str) -> NoReturn:
    raise TierError(f"the index must hold text keys and plain bytes, not {what}")


class Rows(diskcache.Disk):  # type: ignore[misc]
    """Text keys, and values stored by `Index.put_rows`; nothing is pickled or unpickled."""

    payloads: Payloads

    # diskcache has no annotations, and the types inferred for its methods are too narrow
    def put(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, key: object
    ) -> tuple[str, bool]:
        return (key, True) if type(key) is str else _refuse(type(key).__name__)

    def get(self, key: object, raw: object) -> str:
        return key if raw and type(key) is str else _refuse("a pickled key")

    def store(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, value: object, read: bool, key: object = None
    ) -> NoReturn:
        _refuse("what diskcache stores by itself")

    def fetch(self, mode: object, filename: object, value: object, read: object) -> NoReturn:
        _refuse("what diskcache reads by itself")

    def remove(self, file_path: str) -> None:
        self.payloads.remove(file_path)


class Index(diskcache.Cache):  # type: ignore[misc]
    """A `diskcache.Cache` on a connection that was opened for it.

    Args:
        file: its connection for writing is used, under the caller's lock.
        payloads: the files that rows name.
        size_limit: bytes.
        other_bytes: returns the bytes of everything else that counts towards the budget.
        now: returns Unix seconds, for the time at which code versions were replaced.

    Raises:
        DamagedError: the file is not an index of this kind.
    """

    def __init__(
        self,
        file: SqliteFile,
        payloads: Payloads,
        size_limit: int,
        other_bytes: Callable[[], int] = lambda: 0,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._file = file
        self._other_bytes = other_bytes
        self._now = now
        self._codes: dict[str, tuple[str, float]] = {}
        self._free = 0
        self._check_at = 0.0
        self._kept = 0
        self._excess: int | None = None
        check(file.writer)
        settings = {
            **DEFAULT_SETTINGS,
            "size_limit": size_limit,
            "cull_limit": EVICTED_PER_TRANSACTION,
            "eviction_policy": "least-recently-used",
            "sqlite_mmap_size": 0,
            "sqlite_cache_size": _CACHED_PAGES,
        }
        try:
            with file.transaction():
                super().__init__(str(file.path.parent), disk=Rows, **settings)
                self._sql(ENTRIES_SQL["by_name"])
                self._sql(ENTRIES_SQL["code_table"])
                self.volume()
        except (TypeError, ValueError, KeyError, AttributeError, AssertionError) as error:
            raise DamagedError(f"an incomplete index: {error}") from error
        self._disk.payloads = payloads  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def _con(self) -> sqlite3.Connection:
        return self._file.writer

    @property
    def _sql(self) -> Callable[..., sqlite3.Cursor]:
        return self._file.writer.execute

    @property
    def _sql_retry(self) -> Callable[..., sqlite3.Cursor]:
        """Skip the retries that `diskcache` makes for 60 s: the caller has the lock, or fails."""
        return self._file.writer.execute

    @contextmanager
    def _transact(
        self, retry: bool = False, filename: str | None = None
    ) -> Iterator[tuple[Callable[..., sqlite3.Cursor], Callable[[str | None], None]]]:
        """Run a transaction; the files of deleted rows are removed after the commit."""
        names: list[str | None] = []
        with self._file.transaction() as connection:
            yield connection.execute, names.append
        for name in names:
            if name is not None:
                self._disk.remove(name)

    def close(self) -> None:
        """Do nothing: the connection belongs to the caller."""

    def put_rows(self, rows: Iterable[tuple[str, Row, float | None]]) -> None:
        """Replace rows in one transaction, given as (name, row, lifetime in seconds)."""
        with self._transact() as (sql, cleanup):
            for name, row, lifetime in rows:
                self._put_row(sql, cleanup, name, row, lifetime)

    def _put_row(
        self,
        sql: Callable[..., sqlite3.Cursor],
        cleanup: Callable[[str | None], None],
        name: str,
        row: Row,
        lifetime: float | None,
    ) -> None:
        now = time.time()
        expire = None if lifetime is None else now + lifetime
        added, _, code = row.tag.partition(" ")
        columns = (
            now, expire, now + int(added), row.tag, row.size, MODE_RAW, row.name, row.record, name,
        )  # fmt: skip
        if not sql(ENTRIES_SQL["insert"], columns).rowcount:
            cleanup(sql(_SELECT_FILE_NAME, (name,)).fetchone()[0])
            sql(ENTRIES_SQL["update"], columns)
        function = name.rpartition(":")[0] + ":"
        known, noted = self._codes.get(function, ("", 0.0))
        if code and (code != known or time.monotonic() - noted > _CODE_NOTE_SECONDS):
            self._note_code(sql, function, code, new=code != known)
        self._kept += 1

    def _note_code(
        self, sql: Callable[..., sqlite3.Cursor], function: str, code: str, *, new: bool
    ) -> None:
        """Note the current code version of a function; entries of other versions rank behind.

        All entries of the function are checked only if other versions are noted.

        Args:
            new: this process has not noted it yet.  A process that continues with older code notes
                it again, so that the next process with newer code finds it.
        """
        if new and list(sql(ENTRIES_SQL["codes"], (function,))) != [(code,)]:
            present = self._now()
            ends = function, after_prefix(function), code, present - _REPLACED_RANK_SECONDS / 2
            sql(ENTRIES_SQL["replace"], (present - _REPLACED_RANK_SECONDS, *ends))
            sql(ENTRIES_SQL["forget_codes"], (function,))
        sql(ENTRIES_SQL["note_code"], (function, code))
        self._codes[function] = code, time.monotonic()

    def record_reads(self, names: Collection[str]) -> None:
        """Rank entries that were read as if they had just been stored."""
        if not names:
            return
        now = time.time()
        with self._file.transaction() as connection:
            connection.executemany(_SET_RANK, [(now, name) for name in names])

    def bytes_to_free(self, size: int) -> int:
        """Return the bytes to free before `size` more fit in the budget; 0 or less if they fit."""
        limit: int = self.size_limit  # pyright: ignore[reportAttributeAccessIssue]
        volume: int = self.volume()
        return volume + min(self._other_bytes(), limit // 2) + size - limit

    def has_room(self, size: int) -> bool:
        """True if `size` more bytes certainly fit, by the last check of the budget.

        Only a fraction of what was free then may be used before the next check, and only for a
        while, since other processes store too.
        """
        if size > self._free or time.monotonic() > self._check_at:
            return False
        self._free -= size + _LOGGED_BYTES_PER_STORE
        return True

    def make_room(self, size: int) -> bool:
        """Evict the least valuable entries until `size` more bytes fit in the budget.

        More than `size` bytes may be lacking: the log has grown, or the limit was lowered.  After
        `_EVICT_SECONDS` the rest is left to later calls, unless more is lacking than at first and
        than a fraction of the budget.  So no single store pays for a lowered limit, and none
        increases what is lacking.  Expired entries are evicted too, a few more than were stored
        since the last check.

        Returns:
            False if later calls have to continue.
        """
        now, end = time.time(), time.monotonic() + _EVICT_SECONDS
        freed, in_time = 0, True
        limit: int = self.size_limit  # pyright: ignore[reportAttributeAccessIssue]
        if self._excess is None:
            self._excess = self.bytes_to_free(self._log_growth())
        most = size + max(limit // _BUDGET_SHARE, self._excess)
        while (bytes_to_free := self.bytes_to_free(size)) > 0 and (
            in_time or freed < size or bytes_to_free > most
        ):
            gone = self._evict(ENTRIES_SQL["expired"], now, bytes_to_free) or self._evict(
                ENTRIES_SQL["least"], now, bytes_to_free
            )
            if not gone:
                break
            freed += gone
            in_time = time.monotonic() < end
        self._kept += EVICTED_PER_TRANSACTION
        while (
            self._kept > 0
            and in_time
            and self._evict(ENTRIES_SQL["expired"], now, _UNLIMITED_BYTES)
        ):
            self._kept -= _MAX_EVICTED_PER_TRANSACTION
            in_time = time.monotonic() < end
        if in_time:
            self._kept = 0
        self._excess = min(self._excess, bytes_to_free + self._log_growth())
        self._free = max(0, -bytes_to_free) // _BUDGET_SHARE
        self._check_at = time.monotonic() + _BUDGET_CHECK_SECONDS
        return in_time

    def _log_growth(self) -> int:
        """Return the bytes by which the log is still going to grow."""
        return max(0, KEPT_LOG_BYTES - self._other_bytes())

    def _evict(self, query: str, now: float, bytes_to_free: int) -> int:
        """Evict entries that a query finds until so many bytes are free; return the freed bytes.

        At most `_MAX_EVICTED_PER_TRANSACTION` entries are evicted.
        """
        freed = 0
        most = min(
            _MAX_EVICTED_PER_TRANSACTION,
            EVICTED_PER_TRANSACTION + bytes_to_free // _BYTES_PER_EVICTED,
        )
        with self._transact() as (sql, cleanup):
            for rowid, name, size in sql(query, (now, most)).fetchall():
                if freed < bytes_to_free:
                    sql(_DELETE_ROW, (rowid,))
                    cleanup(name)
                    freed += max(size, _MIN_SIZE_BYTES)
        return freed

    def free_space(self, size: int) -> int:
        """Evict entries of at least `size` bytes on a full disk; return the freed bytes.

        Entries with files go first: deleting a row takes space in the log, and there may be none.
        """
        rows = []
        freed = 0
        for rowid, name, held in self._sql(ENTRIES_SQL["free_space"]):
            rows.append((rowid,))
            freed += held
            if name is not None:
                self._disk.remove(name)
            if freed >= size:
                break
        with suppress(sqlite3.Error):  # readers keep the log from being truncated
            self._sql("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        with suppress(sqlite3.Error), self._file.transaction() as connection:
            connection.executemany(_DELETE_ROW, rows)
        self._free = 0
        return freed

    def covers_most(self, prefix: str) -> bool:
        """True if most keys begin with `prefix`."""
        ends = (prefix, after_prefix(prefix))
        return bool(self._sql(ENTRIES_SQL["is_most"], ends).fetchone()[0])

    def prepare_to_clear(self) -> None:
        """Prepare for many calls of `clear_some`, with calls of `write_back` in between."""
        self._sql(f"PRAGMA cache_size={_CACHED_PAGES_TO_CLEAR}")
        self._sql("PRAGMA wal_autocheckpoint=0").fetchone()

    def end_clearing(self) -> None:
        """Undo `prepare_to_clear`."""
        self._sql(f"PRAGMA cache_size={_CACHED_PAGES}")
        self._sql(f"PRAGMA wal_autocheckpoint={AUTOMATIC_CHECKPOINT_PAGES}").fetchone()

    def write_back(self) -> None:
        """Checkpoint the log; takes no lock that other processes wait for."""
        self._sql("PRAGMA wal_checkpoint(PASSIVE)").fetchone()

    def clear_some(self, prefix: str, below: int | None = None) -> Cleared:
        """Delete at most `ROWS_PER_TRANSACTION` keys that begin with `prefix`.

        Args:
            below: for a prefix of most keys: start with the highest row below this one, so that the
                file gets shorter instead of being refilled from its end.
        """
        ends = prefix, after_prefix(prefix)
        if below is None:
            return self._delete_some(_SELECT_SOME, *ends)
        return self._delete_some(
            ENTRIES_SQL["most"], below, *ends, delete=ENTRIES_SQL["delete_most"]
        )

    def drop_replaced(self, seconds: float) -> Cleared:
        """Delete entries whose code was replaced at least `seconds` ago.

        At most `ROWS_PER_TRANSACTION` of them.
        """
        return self._delete_some(
            ENTRIES_SQL["replaced"], self._now() - _REPLACED_RANK_SECONDS - seconds
        )

    def _delete_some(self, query: str, *arguments: object, delete: str = "") -> Cleared:
        """Delete the rows that a query finds, in one transaction.

        At most `ROWS_PER_TRANSACTION`, and for at most `_DELETE_SECONDS`.

        Args:
            query: finds rows to delete; its parameters are `arguments` and a limit.
            delete: deletes the found rows in one statement; "": each is deleted by its number.  Its
                parameters are the last found row and `arguments`.  The first of these is the row
                below which the query looks, so the last found row replaces it each time.
        """
        gone: list[tuple[int, str | None]] = []
        with self._file.transaction() as connection:
            end = time.monotonic() + _DELETE_SECONDS
            while (left := ROWS_PER_TRANSACTION - len(gone)) > 0 and (
                not gone or time.monotonic() < end
            ):
                some = connection.execute(
                    query, (*arguments, min(_ROWS_PER_STATEMENT, left))
                ).fetchall()
                if not some:
                    break
                if delete:
                    connection.execute(delete, (some[-1][0], *arguments))
                    arguments = (some[-1][0], *arguments[1:])
                else:
                    connection.executemany(_DELETE_ROW, [(rowid,) for rowid, _ in some])
                gone += some
        names = [name for _, name in gone if name is not None]
        return Cleared(len(gone), names, gone[-1][0] if gone else 0)

    def has_name(self, name: str) -> bool:
        """True if any row has the files of this name."""
        found = self._sql("SELECT 1 FROM Cache WHERE filename = ?", (name,)).fetchone()
        return found is not None


def check(connection: sqlite3.Connection) -> bool:
    """True if there is an index; takes no lock.

    Raises:
        DamagedError: it was not created by `diskcache` with our settings.
    """
    names = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
    if "Settings" not in names and "Cache" not in names:
        return False
    if not names >= _SCHEMA_NAMES:
        raise DamagedError("parts of the index are missing")
    known = {**DEFAULT_SETTINGS, **METADATA}
    present = dict(connection.execute("SELECT key, value FROM Settings"))
    for key, value in present.items():
        if key not in known or type(value) is not type(known[key]):
            raise DamagedError("unknown settings")
    views = connection.execute("SELECT 1 FROM sqlite_master WHERE type = 'view'").fetchone()
    if views is not None or not present.keys() >= METADATA.keys():
        raise DamagedError("not the settings of an index")
    return True
