"""The index of the disk tier: `diskcache` with everything that could unpickle taken out.

`diskcache` (up to 5.6.3) unpickles what lies in its directory (CVE-2025-69872).  Here keys are
text, values are bytes, nothing else is written or read, and its table of settings is checked before
it sees it.  Only this module knows `diskcache`; it is imported when the disk tier is first opened.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, NoReturn

import diskcache
from diskcache.core import DEFAULT_SETTINGS, METADATA, MODE_RAW

from memo.errors import TierError
from memo.payloads import Payloads
from memo.sqlite import DamagedError, Database

CULL = 10
"""Entries that go at once when the budget is spent, as `diskcache` has it."""
_BATCH = 1000
_BY_NAME = (
    "CREATE INDEX IF NOT EXISTS Cache_filename ON Cache (filename) WHERE filename IS NOT NULL"
)
_PARTS = {"Cache", "Cache_key_raw", "Settings"} | {
    f"Settings_{number}_{event}"
    for number, event in (
        ("count", "insert"),
        ("count", "delete"),
        ("size", "insert"),
        ("size", "update"),
        ("size", "delete"),
    )
}
_EXPIRED = "SELECT rowid, filename FROM Cache WHERE expire_time < ? ORDER BY expire_time LIMIT ?"
_OLDEST = "SELECT rowid, filename FROM Cache WHERE ? ORDER BY store_time LIMIT ?"
_PREFIX = (
    "SELECT rowid, filename FROM Cache WHERE rowid > ? AND key >= ? AND key < ?"
    " ORDER BY rowid LIMIT ?"
)


class Row(NamedTuple):
    """What an entry is in the index.

    Attributes:
        record: where it is small.
        name: of its files, where it has any.
        size: bytes of its files.
    """

    record: bytes | None
    name: str | None
    size: int


def _refused(what: str) -> NoReturn:
    raise TierError(f"the index must hold text keys and plain bytes, not {what}")


class Rows(diskcache.Disk):  # type: ignore[misc]
    """Keys are text, values are `Row`; nothing is pickled and nothing is unpickled."""

    payloads: Payloads

    # diskcache has no annotations; what it infers of its own methods is narrower than they are.
    def put(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, key: object
    ) -> tuple[str, bool]:
        return (key, True) if type(key) is str else _refused(type(key).__name__)

    def get(self, key: object, raw: object) -> str:
        return key if raw and type(key) is str else _refused("a pickled key")

    def store(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, value: object, read: bool, key: object = None
    ) -> tuple[int, int, str | None, bytes | None]:
        if type(value) is not Row or read:
            _refused(type(value).__name__)
        return value.size, MODE_RAW, value.name, value.record

    def fetch(self, mode: object, filename: object, value: object, read: object) -> NoReturn:
        _refused("what this asks for")

    def remove(self, file_path: str) -> None:
        self.payloads.remove(file_path)


class Index(diskcache.Cache):  # type: ignore[misc]
    """A `diskcache.Cache` on a connection that was opened for it.

    Args:
        database: whose connection to write it uses, under the lock of who calls.
        payloads: the files that rows name.
        size_limit: bytes.

    Raises:
        DamagedError: what is there is no index of this kind.
    """

    def __init__(self, database: Database, payloads: Payloads, size_limit: int) -> None:
        self._database = database
        _check(database.writer)
        settings = {
            **DEFAULT_SETTINGS,
            "size_limit": size_limit,
            "cull_limit": CULL,
            "eviction_policy": "least-recently-stored",
            "sqlite_mmap_size": 0,
        }
        try:
            with database.transaction():
                super().__init__(str(database.path.parent), disk=Rows, **settings)
                self._sql(_BY_NAME)
                self.volume()
        except (TypeError, ValueError, KeyError, AttributeError, AssertionError) as error:
            raise DamagedError(f"half an index: {error}") from error
        self._disk.payloads = payloads  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def _con(self) -> sqlite3.Connection:
        return self._database.writer

    @property
    def _sql(self) -> Callable[..., sqlite3.Cursor]:
        return self._database.writer.execute

    @property
    def _sql_retry(self) -> Callable[..., sqlite3.Cursor]:
        """Without the tries that `diskcache` makes for 60 s: who calls holds the lock, or fails."""
        return self._database.writer.execute

    @contextmanager
    def _transact(
        self, retry: bool = False, filename: str | None = None
    ) -> Iterator[tuple[Callable[..., sqlite3.Cursor], Callable[[str | None], None]]]:
        """A transaction; the files of rows that went are removed when it is committed."""
        names: list[str | None] = []
        with self._database.transaction():
            yield self._sql, names.append
        for name in names:
            if name is not None:
                self._disk.remove(name)

    def close(self) -> None:
        """The connection is not this object's to close."""

    def make_room(self, size: int) -> None:
        """Evict, expired first and then by age, until `size` more bytes fit in the budget."""
        now = time.time()
        limit: int = self.size_limit  # pyright: ignore[reportAttributeAccessIssue]
        while self.volume() + size > limit:
            if not (self._evict(_EXPIRED, now) or self._evict(_OLDEST, now)):
                return

    def _evict(self, which: str, now: float) -> int:
        with self._transact() as (sql, cleanup):
            rows = sql(which, (now, CULL)).fetchall()
            for rowid, name in rows:
                sql("DELETE FROM Cache WHERE rowid = ?", (rowid,))
                cleanup(name)
        return len(rows)

    def clear_prefix(self, prefix: str) -> int:
        """Delete every key that begins with `prefix`; how many."""
        end = f"{prefix}\U0010ffff"
        count: int = self._select_delete(_PREFIX, [0, prefix, end, _BATCH])
        return count

    def has_name(self, name: str) -> bool:
        """Whether any row has these files."""
        found = self._sql("SELECT 1 FROM Cache WHERE filename = ?", (name,)).fetchone()
        return found is not None


def _check(connection: sqlite3.Connection) -> None:
    """Refuse a table of settings that `diskcache` did not write with our settings."""
    names = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
    if "Settings" not in names and "Cache" not in names:
        return
    if not names >= _PARTS:
        raise DamagedError("parts of the index are missing")
    known = {**DEFAULT_SETTINGS, **METADATA}
    present = dict(connection.execute("SELECT key, value FROM Settings"))
    for key, value in present.items():
        if key not in known or type(value) is not type(known[key]):
            raise DamagedError("unknown settings")
    views = connection.execute("SELECT 1 FROM sqlite_master WHERE type = 'view'").fetchone()
    if views is not None or not present.keys() >= METADATA.keys():
        raise DamagedError("not the settings of an index")
