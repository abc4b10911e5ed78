"""The host database: `host.sqlite`, in which the processes of a host store what they share.

Rules of this module:

1.  It stores the generations, the journal and the host's id.  A durable commit is on the disk
    (fsync) when `write` returns.
2.  A process keeps a *mirror* of the groups that it uses.  The mirror is current as long as the
    *bell* has not changed: 16 bytes in a file that all processes map, rewritten after every commit.
    Checking it costs a tenth of `PRAGMA data_version` (docs/architecture.md).  Once in
    `BELL_TRUSTED_SECONDS` the file itself is checked too, for changes without a bell: a writer that
    was killed between its commit and the bell, or a directory that was removed.
3.  The bell also holds the number of the last commit.  A file older than its bell has lost
    commits, perhaps an invalidation: it is set aside.
4.  Groups expire.  Each has a time until which an entry may name it, extended by use; `sweep`
    deletes those past that time.  An entry that still names a deleted group is a miss, since a
    group that is created again has another token.  A mirror cannot see what was deleted from the
    table, so after a sweep each process starts its mirror anew.
5.  If in doubt, a miss.  A damaged file is set aside: all its generations are lost, which
    invalidates every entry; readable rows of the journal are carried over.
"""

from __future__ import annotations

import mmap
import os
import sqlite3
import struct
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any, TypeVar

from memo.errors import SettingError, TierError, TierUnavailable
from memo.records.stamp_types import Ref, State
from memo.runtime import ownership, private_files
from memo.runtime.clock import Clock
from memo.stores.disk import sqlite_file
from memo.stores.disk.cache_directory import READ_ONLY, CacheDirectory, is_full
from memo.stores.disk.sqlite_file import DamagedError, SqliteFile
from memo.validity import stamps
from memo.validity.generations import Change
from memo.validity.stamps import SHAPES

T = TypeVar("T")
BELL_TRUSTED_SECONDS = 0.001
"""Seconds for which an unchanged bell is trusted without checking the file."""
MAX_MIRRORED_GROUPS = 65_536
"""Maximum number of groups in the mirror; beyond it the mirror starts again empty."""
MAX_STATES_PER_GROUP = 1024
"""Maximum number of cached states of one group in the mirror; beyond it they are computed again."""
MAX_STORED_GROUPS = 1_000_000
"""Maximum number of groups; beyond it, opening the file deletes the oldest half, which costs only
misses."""
BYTES_FREED_TO_INVALIDATE = 1 << 20
"""Bytes to free on a full disk, so that an invalidation can be written."""
FILE_USE_ATTEMPTS = 3
"""Number of attempts if the file is replaced or set aside during a use."""
HOST_FILE_ERRORS = (sqlite3.Error, OSError, ValueError, TypeError)
LAST_COMMIT = 1 << 62
"""Upper bound of commit numbers; they start at the time in microseconds, about 1 << 51."""
_HOST_FILE_FORMAT = 1
_BELL_LAYOUT = struct.Struct("=QQ")
GENERATIONS_SQL = sqlite_file.statements("generations")
_SCHEMA_STATEMENTS = (
    "meta",
    "groups",
    "generations",
    "journal",
    "groups_changed",
    "lives",
    "lives_until",
)
NEVER_EXPIRES = 1 << 62
"""Expiry of a group that an entry without a ttl names."""


class Group:
    """A group in the mirror: immutable, so it is replaced when it changes.

    Attributes:
        fields: as in the table.
        plain_state: the state of every ref with arguments; None once a shape was invalidated.
    """

    __slots__ = ("_states", "fields", "plain_state")

    def __init__(self, fields: Mapping[str, str]) -> None:
        self.fields = fields
        self.plain_state = stamps.state_of(Ref(""), fields) if SHAPES not in fields else None
        self._states: dict[Any, State] = {}

    def state(self, ref: Ref) -> State:
        state = self._states.get(ref.arguments)
        if state is None:
            state = stamps.state_of(ref, self.fields)
            if len(self._states) >= MAX_STATES_PER_GROUP:
                self._states.clear()
            self._states[ref.arguments] = state
        return state


class ReadBell(Sequence[int]):
    """A bell that is read, not mapped (ten times as slow), as others may truncate its file.

    Missing bytes read as 0, a value that no bell ever has.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __len__(self) -> int:
        return 2

    def __getitem__(self, at: Any) -> Any:
        text = os.pread(self._descriptor, _BELL_LAYOUT.size, 0)
        return _BELL_LAYOUT.unpack(text.ljust(_BELL_LAYOUT.size, b"\0"))[at]

    def __setitem__(self, at: int, value: int) -> None:
        os.pwrite(self._descriptor, value.to_bytes(8, sys.byteorder), 8 * at)

    def __del__(self) -> None:
        os.close(self._descriptor)


class HostDatabase:
    """`host.sqlite`, and a mirror of its groups in this process.

    Attributes:
        bell: its first number changes after every commit of any process.
        seen_bell: that number when the mirror was last brought up to date.
        check_at: when the file itself must be checked again, by `time.monotonic`.
        groups: the mirror.
        commit: the number of a commit that the mirror includes.
        journal: (row, at, due) of every journalled invalidation.
        lives: Unix times from which groups in the mirror may be deleted, as far as known.
    """

    def __init__(self, cache_directory: CacheDirectory, clock: Clock) -> None:
        self.cache_directory = cache_directory
        self.directory = directory = cache_directory.path
        self.clock = clock
        self.file = SqliteFile(
            directory / "host.sqlite", directory, self._prepare, self._before_set_aside
        )
        self._rescued: list[tuple[int, str, str]] | None = None
        self._forget()

    def _forget(self) -> None:
        self.bell: Sequence[int] = (0, 0)
        self.seen_bell = -1
        self.check_at = 0.0
        self.groups: dict[str, Group] = {}
        self.lives: dict[str, int] = {}
        self._swept = 0
        self.commit = 0
        self.journal: dict[str, list[tuple[int, int, int]]] = {}
        self._opened = 0
        self._version = -1

    # --- opening ---------------------------------------------------------------------------------

    def _prepare(self, connection: sqlite3.Connection) -> None:
        if self.file.read_only:
            _check_meta(_read_meta(connection), 0)
            return
        connection.execute("PRAGMA synchronous=NORMAL")
        bell = self._map_bell()
        seen_bell = bell[1]  # read before the commit, which must not be older
        facts = _read_meta(connection)
        if facts:
            _check_meta(facts, seen_bell)
        else:
            _check_meta(self._create(connection), 0)
        if _excess_groups(connection):
            with suppress(sqlite3.OperationalError):  # locked: the next call does it
                _in_transaction(connection, _prune)
        self.bell = bell

    def _create(self, connection: sqlite3.Connection) -> dict[str, Any]:
        """Create the tables unless another process was faster; return the rows of `meta`."""

        def make(connection: sqlite3.Connection) -> dict[str, Any]:
            for name in _SCHEMA_STATEMENTS:
                connection.execute(GENERATIONS_SQL[name])
            return _read_meta(connection) or self._initialize(connection)

        return _in_transaction(connection, make)

    def _initialize(self, connection: sqlite3.Connection) -> dict[str, Any]:
        """Write the first rows; commit numbers start above those of any older bell."""
        bell: Any = self._map_bell()
        last_commit = bell[1]
        if last_commit >= LAST_COMMIT:  # garbage, since no later number could exceed it
            bell[1] = 0
        first = max(time.time_ns() // 1000, bell[1] + 1)
        facts = {"format": _HOST_FILE_FORMAT, "commit": first, "id": os.urandom(8).hex()}
        connection.executemany("INSERT INTO meta VALUES (?, ?)", facts.items())
        connection.executemany(
            "INSERT INTO journal (at, due, turns, note) VALUES (?, 1, ?, ?)",
            self._rows_carried_over(last_commit),
        )
        return facts

    def _rows_carried_over(self, last_commit: int) -> list[tuple[int, str, str]]:
        """Return the rows that a new file takes over from the journal of the one before it."""
        rows, self._rescued = self._rescued, None
        if rows is None and last_commit:  # there is a bell, so its file was removed
            from memo.stores.disk import recovery

            rows = recovery.rows_for_lost_journal(self.file.path, self.clock.wall_ns())
        return rows or []

    def _map_bell(self) -> Sequence[int]:
        with private_files.open_directory(self.directory) as folder:
            descriptor = private_files.open_or_create("host.bell", folder)
        try:
            if os.fstat(descriptor).st_size != _BELL_LAYOUT.size:
                # written, so that a full disk is reported here, not when the map is used
                os.pwrite(descriptor, bytes(_BELL_LAYOUT.size), 0)
                # only cut to size, never shorter: other processes may have it mapped
                os.ftruncate(descriptor, _BELL_LAYOUT.size)
            if ownership.exposed(self.directory):
                return ReadBell(os.dup(descriptor))
            return memoryview(mmap.mmap(descriptor, _BELL_LAYOUT.size)).cast("Q")
        finally:
            os.close(descriptor)

    def _before_set_aside(self) -> None:
        """Save the readable rows of the journal, and notify all users of the damaged file."""
        from memo.stores.disk import recovery

        self._rescued = recovery.rows_to_carry_over(self.file.path, self.clock.wall_ns())
        with suppress(OSError, ValueError):
            bell: Any = self._map_bell()
            bell[0] = int.from_bytes(os.urandom(8))

    def open_file(self) -> SqliteFile:
        """Open the file if it is closed, and return it.

        Raises:
            TierError: it cannot be opened.
        """
        file = self.file
        if not file.is_open:
            try:
                file.open(read_only=self.cache_directory.open() == READ_ONLY)
            except (sqlite3.Error, OSError, DamagedError, SettingError) as error:
                if is_full(error):
                    raise self.cache_directory.mark_unusable(
                        "cannot be used: the disk is full."
                    ) from error
                raise file.handle_error(error) from error
        return file

    @property
    def is_at_hand(self) -> bool:
        """True if a use does not wait: the file is open, or the directory is unusable."""
        return self.file.is_open or self.cache_directory.is_unusable()

    def close(self) -> None:
        with self.file.writing:
            self.file.close()
            self._forget()

    def may_exist(self) -> bool:
        """True if the file may exist, readable or not."""
        try:
            if os.stat(self.directory).st_uid != os.geteuid():
                return False
            os.lstat(self.file.path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:
            return True
        return True

    # --- reading ---------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Bring the mirror up to date.

        Raises:
            TierError: the file cannot be read.
        """
        for _ in range(FILE_USE_ATTEMPTS):
            try:
                file = self.open_file()
            except TierUnavailable:  # nothing can be read, so every group is lost
                self._forget()
                return
            if file.was_replaced():
                file.close()
                continue
            try:
                with file.reading:
                    self._refresh(file)
            except HOST_FILE_ERRORS as error:
                self.handle_error(error)
                continue
            return
        raise TierError("host.sqlite is replaced again and again")

    def handle_error(self, error: BaseException) -> None:
        """Return if a damaged file was set aside, so that the use can be tried again.

        Raises:
            TierError: any other fault.
        """
        fault = self.file.handle_error(error)
        if not sqlite_file.is_damaged(error):
            raise fault from error

    def _refresh(self, file: SqliteFile) -> None:
        if self._opened != file.opened:
            bell = self.bell
            self._forget()
            self.bell = bell
            self._opened = file.opened
        check_at = time.monotonic() + BELL_TRUSTED_SECONDS
        seen_bell = self.bell[0]
        (version,) = file.reader.execute("PRAGMA data_version").fetchone()
        if version != self._version:
            self._catch_up(file.reader)
            self._version = version
        self.seen_bell = seen_bell
        self.check_at = check_at

    def _catch_up(self, connection: sqlite3.Connection) -> None:
        # read before the changes, so that a later sweep is not missed
        swept = last_sweep_commit(connection)
        rows = connection.execute(
            "SELECT name, changed, renewed FROM groups WHERE changed > ?", (self.commit,)
        ).fetchall()
        if len(self.groups) > MAX_MIRRORED_GROUPS or swept != self._swept:
            self.groups, self.lives, self._swept = {}, {}, swept
        for name, _, renewed in rows:
            group = self.groups.get(name)
            if group is None:
                continue
            if renewed > self.commit:
                del self.groups[name]
            else:
                self.groups[name] = Group(
                    {**group.fields, **fields_of(connection, name, self.commit)}
                )
        self.journal = {}
        for number, at, due, note in connection.execute("SELECT id, at, due, note FROM journal"):
            for receiver in receivers_in(note):
                self.journal.setdefault(receiver, []).append((number, at, due))
        self.commit = max(self.commit, swept, *(row[1] for row in rows))

    def load(self, name: str) -> Group:
        """Load a group that is not in the mirror."""
        for _ in range(FILE_USE_ATTEMPTS):
            try:
                file = self.open_file()
            except TierUnavailable:
                return Group({})
            try:
                with file.reading:
                    group = self.groups.get(name)
                    if group is None:
                        group = Group(fields_of(file.reader, name))
                        until = expiry_of(file.reader, name)
                        if self._opened == file.opened:
                            self.groups[name] = group
                            self.lives[name] = until
                    return group
            except HOST_FILE_ERRORS as error:
                self.handle_error(error)
        raise TierError("host.sqlite is damaged again and again")

    def select(self, statement: str, *values: object) -> list[Any]:
        """Return the rows of a query on the file as it is now.

        Raises:
            TierError: the file cannot be read.
        """
        for _ in range(FILE_USE_ATTEMPTS):
            file = self.open_file()
            try:
                with file.reading:
                    return file.reader.execute(statement, values).fetchall()
            except HOST_FILE_ERRORS as error:
                self.handle_error(error)
        raise TierError("host.sqlite is damaged again and again")

    # --- writing ---------------------------------------------------------------------------------

    def write(self, work: Callable[[sqlite3.Connection, int], bool], *, durable: bool) -> None:
        """Run `work(connection, commit)` in a transaction; it returns True if it changed anything.

        Args:
            work: may be called again if the file was replaced meanwhile.
            durable: the commit must be on the disk when this returns.

        Raises:
            TierError: it could not be committed.
        """
        try:
            sqlite_file.retry_while_locked(self._write_now, work, durable)
        except TierError as error:
            if not is_full(error.__cause__):
                raise
            if not self.cache_directory.free_space(BYTES_FREED_TO_INVALIDATE):
                self.cache_directory.warn_full()
                raise
            sqlite_file.retry_while_locked(self._write_now, work, durable)

    def _write_now(self, work: Callable[[sqlite3.Connection, int], bool], durable: bool) -> None:
        for _ in range(FILE_USE_ATTEMPTS):
            file = self.open_file()
            try:
                with file.writing:
                    if self._commit(file, work, durable):
                        return
            except HOST_FILE_ERRORS as error:
                self.handle_error(error)
                continue
            file.close()
        raise TierError("host.sqlite is replaced again and again")

    def _commit(
        self,
        file: SqliteFile,
        work: Callable[[sqlite3.Connection, int], bool],
        durable: bool,
    ) -> bool:
        """Run a transaction; True if the file is still the one at the path."""
        if file.was_replaced():
            return False
        with file.transaction(f"synchronous={'FULL' if durable else 'NORMAL'}") as connection:
            (commit,) = connection.execute("SELECT value FROM meta WHERE name='commit'").fetchone()
            commit += 1
            changed = work(connection, commit)
            if changed:
                connection.execute("UPDATE meta SET value = ? WHERE name = 'commit'", (commit,))
            else:
                sqlite_file.roll_back(connection)
        if changed:
            self.ring_bell(commit)
        return not file.was_replaced()

    def ring_bell(self, commit: int) -> None:
        bell: Any = self.bell
        bell[1] = max(commit, bell[1])
        bell[0] = int.from_bytes(os.urandom(8))


@lru_cache(4096)
def receivers_in(note: str) -> frozenset[str]:
    """Return the shared tiers (`where`, or `*` for any) that a journalled invalidation is for."""
    try:
        return frozenset(stamps.parse_note(note).get("to", ()))
    except TypeError:
        return frozenset()


def fields_of(connection: sqlite3.Connection, group: str, since: int = -1) -> dict[str, str]:
    """Return the fields of a group that changed after a commit."""
    rows = connection.execute(
        "SELECT field, value FROM generations WHERE name = ? AND changed > ?", (group, since)
    )
    return {name: value for name, value in rows if type(name) is type(value) is str}


def expiry_of(connection: sqlite3.Connection, group: str) -> int:
    """Return the Unix time from which a group may be deleted; 0 if unknown."""
    row = connection.execute("SELECT until FROM lives WHERE name = ?", (group,)).fetchone()
    return row[0] if row and isinstance(row[0], int) else 0


def extend_life(connection: sqlite3.Connection, groups: Iterable[str], until: int) -> None:
    """Extend the life of groups to at least this time."""
    connection.executemany(GENERATIONS_SQL["extend_life"], [(name, until) for name in groups])


def last_sweep_commit(connection: sqlite3.Connection) -> int:
    """Return the number of the last commit that deleted groups; 0: none did."""
    row = connection.execute("SELECT value FROM meta WHERE name = 'swept'").fetchone()
    return row[0] if row and isinstance(row[0], int) else 0


def delete_groups(connection: sqlite3.Connection, groups: Iterable[str], commit: int) -> None:
    """Delete groups, as part of a commit: entries that name them become misses for good."""
    names = [(name,) for name in groups]
    for table in ("generations", "groups", "lives"):
        connection.executemany(f"DELETE FROM {table} WHERE name = ?", names)  # noqa: S608 - constants
    connection.execute("INSERT OR REPLACE INTO meta VALUES ('swept', ?)", (commit,))


def change_fields(connection: sqlite3.Connection, group: str, change: Change, commit: int) -> None:
    """Write a change of one group's fields, as part of a commit."""
    if change.renew:
        connection.execute("DELETE FROM generations WHERE name = ?", (group,))
    connection.executemany(
        "DELETE FROM generations WHERE name = ? AND field = ?",
        [(group, field) for field in change.erase],
    )
    connection.executemany(
        "INSERT OR REPLACE INTO generations VALUES (?, ?, ?, ?)",
        [(group, field, value, commit) for field, value in change.write.items()],
    )
    renewed = commit if change.renew or change.erase else 0
    connection.execute(GENERATIONS_SQL["touch"], (group, commit, renewed))


def _in_transaction(connection: sqlite3.Connection, work: Callable[[sqlite3.Connection], T]) -> T:
    """Run `work` in a transaction of its own."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        done = work(connection)
        connection.execute("COMMIT")
    except BaseException:
        sqlite_file.roll_back(connection)
        raise
    return done


def _read_meta(connection: sqlite3.Connection) -> dict[str, Any]:
    """Return the rows of `meta`, name -> value; empty if a table is missing.

    Raises:
        sqlite3.Error: it cannot be read.
    """
    names = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
    if not names.issuperset(_SCHEMA_STATEMENTS):
        return {}
    return dict(connection.execute("SELECT name, value FROM meta"))


def _check_meta(facts: Mapping[str, Any], seen_bell: int) -> None:
    commit = facts.get("commit")
    if (
        facts.get("format") != _HOST_FILE_FORMAT
        or not isinstance(commit, int)
        or commit >= LAST_COMMIT
    ):
        raise DamagedError("not a host database of this format")
    if seen_bell > commit:
        raise DamagedError("commits are missing")


def _excess_groups(connection: sqlite3.Connection) -> int:
    """Return the number of groups beyond the limit; 0 while an invalidation is in the journal."""
    groups, journalled = connection.execute(GENERATIONS_SQL["counts"]).fetchone()
    return 0 if groups <= MAX_STORED_GROUPS or journalled else groups - MAX_STORED_GROUPS // 2


def _prune(connection: sqlite3.Connection) -> None:
    """Delete the oldest groups if there are too many."""
    excess = _excess_groups(connection)
    connection.execute(GENERATIONS_SQL["prune_generations"], (excess,))
    connection.execute(GENERATIONS_SQL["prune_groups"], (excess,))
    connection.execute(GENERATIONS_SQL["prune_lives"])
    (commit,) = connection.execute("SELECT value FROM meta WHERE name = 'commit'").fetchone()
    delete_groups(connection, (), commit)
