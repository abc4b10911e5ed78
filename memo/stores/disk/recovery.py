"""Recovery of the journal: read pending invalidations from a host's damaged file.

As long as they are unknown the shared tier must not be read (I7), so one damaged file would cost a
host its Redis.  A file that can be read but not opened, as on a file system that has become
read-only, is copied and read elsewhere.  If nothing can be read, everything counts as invalidated.
"""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
from contextlib import closing, suppress
from pathlib import Path

from memo.errors import TierError
from memo.runtime import events, private_files
from memo.validity.stamps import TO_ANY_TIER

Row = tuple[int, int, int, str, str]
"""A row of the journal: number, time in nanoseconds, 1 if it is due, turns, note."""
NAMESPACE_TURNS = '[["n",[],true]]'
"""The turns that invalidate the whole namespace."""
JOURNAL_LOST_NOTE = f'{{"reason": "the journal was lost", {TO_ANY_TIER}'
"""The note of the invalidation that replaces a lost journal."""
_SELECT_JOURNAL = "SELECT id, at, due, turns, note FROM journal ORDER BY id"
_FILE_COPY_CHUNK_BYTES = 1 << 20


def read_journal(path: Path) -> list[Row]:
    """Return the rows of the journal in a file that cannot be opened where it is.

    Raises:
        TierError: they cannot be read.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="memo-") as place:
            copy = f"{place}/copy"
            _copy(f"{path}", copy)
            with suppress(FileNotFoundError):
                _copy(f"{path}-wal", f"{copy}-wal")
            with closing(sqlite3.connect(copy)) as connection:
                return _rows(connection)
    except (sqlite3.Error, OSError) as error:
        raise TierError(f"{path.name}: no copy of it can be read: {error}") from error


def _rows(connection: sqlite3.Connection) -> list[Row]:
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
    if not tables:  # created, and never written to
        return []
    return connection.execute(_SELECT_JOURNAL).fetchall()


def _copy(source: str, target: str) -> None:
    with (
        open(private_files.open_old(source), "rb") as old,
        open(private_files.create(target), "wb") as new,
    ):
        shutil.copyfileobj(old, new, _FILE_COPY_CHUNK_BYTES)


def rows_to_carry_over(path: Path, now: int) -> list[tuple[int, str, str]]:
    """Return the rows (time, turns, note) of a file that is about to be set aside."""
    try:
        with private_files.open_directory(path.parent) as folder:
            private_files.check_plain(path.name, folder)
        return [(at, turns, note) for _, at, _, turns, note in read_journal(path)]
    except (TierError, OSError):
        return rows_for_lost_journal(path, now)


def rows_for_lost_journal(path: Path, now: int) -> list[tuple[int, str, str]]:
    """Return rows that replace a lost journal; an event says so."""
    outcome = "its journal is lost, so everything is invalidated in the next Redis in use"
    detail = f"{path.name}: {outcome}"
    events.emit(events.Event(events.ERROR, tier="host", reason="journal", detail=detail))
    return [(now, NAMESPACE_TURNS, JOURNAL_LOST_NOTE)]
