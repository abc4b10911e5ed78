"""The host: state that the processes of one machine share, in one owner-only directory.

Generations and the journal are stored in the `host_database`; each lock is a file of its own.  When
an invalidation returns, it is on the disk, and so is its journal row, written in the same
transaction.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from memo.errors import SettingError, TierError, TierUnavailable
from memo.records.stamp_blocks import PackedGeneration, ref_of
from memo.records.stamp_types import LOST, Ref, State
from memo.runtime import private_files
from memo.runtime.checksums import blake2b
from memo.runtime.clock import SECOND, SYSTEM_CLOCK, Clock
from memo.runtime.port import Port
from memo.stores.disk import cache_directory
from memo.stores.disk.cache_directory import READ_ONLY, CacheDirectory
from memo.stores.disk.file_locks import HostLock
from memo.stores.disk.host_database import (
    GENERATIONS_SQL,
    MAX_MIRRORED_GROUPS,
    NEVER_EXPIRES,
    HostDatabase,
    change_fields,
    delete_groups,
    extend_life,
    fields_of,
    last_sweep_commit,
    receivers_in,
)
from memo.stores.disk.sqlite_file import (
    SECONDS_BETWEEN_TRANSACTIONS,
    after_prefix,
    retry_while_locked,
)
from memo.stores.disk.unwritten import Unwritten
from memo.validity import generations, stamps
from memo.validity.generations import MIN_GROUP_SECONDS, TOMBSTONE_SECONDS, Change
from memo.validity.stamps import ALL, TO_ANY_TIER, Turn

if TYPE_CHECKING:
    from memo.stores.disk.recovery import Row

FILE_READ_ATTEMPTS = 3
"""Number of attempts to open and read a file before it is set aside."""
COPY_LIFE_SECONDS = 1.0
"""Seconds for which a copy is used in place of a file that cannot be opened."""
UNWRITTEN_TEXT = "an invalidation could not be written yet"
UNWRITTEN_RETRY_SECONDS = 1.0
"""Seconds after which changes that could not be written are tried again."""
INVALIDATION_RETRY_SECONDS = 0.25
"""Seconds after which an invalidation that could not be written is tried again."""
GROUP_SWEEP_SECONDS = 60.0
"""Seconds between two searches of a process for expired groups."""
GROUPS_PER_SWEEP = 500
"""Maximum number of groups that are deleted in one transaction: between two of them others may
write."""
SPARE_LIFE_SECONDS = 3600
"""Seconds by which a group's life is extended beyond need, so that it is written rarely."""
MAX_WAITING_INVALIDATIONS = 1000
"""Maximum number of invalidations that wait for the next shared tier; beyond it they are merged."""
DATA_ERRORS = (UnicodeError, OverflowError, sqlite3.DataError)
"""Errors that are caused by the data to be written, not by the file."""
OVERDUE_NS = 5 * SECOND
"""Nanoseconds after which a journalled invalidation is due: its process must have died."""
_ANY_TIER_NOTES = f"%{TO_ANY_TIER}"


class CommittedStates(list[State]):
    """States as a host read them, with the number of a commit that they include."""

    __slots__ = ("commit",)

    def __init__(self, states: Iterable[State], commit: int) -> None:
        super().__init__(states)
        self.commit = commit


class HostGenerations:
    """The generations that the processes of one host share; see `Generations`."""

    def __init__(self, host_database: HostDatabase) -> None:
        self.host_database = host_database
        self._queued: list[Callable[[], None]] = []
        self._write_at = 0.0
        self._sweep_at = time.monotonic() + GROUP_SWEEP_SECONDS
        self._unwritten = Unwritten()

    def read(self, refs: Sequence[Ref]) -> list[State]:
        """Read each ref: 1 µs for three refs while no process of the host has written.

        Raises:
            TierError: the file cannot be read, or an invalidation is still to be written.
        """
        host_database = self._up_to_date()
        commit = host_database.commit
        groups = host_database.groups
        states = []
        for ref in refs:
            name, arguments = ref
            group = groups.get(name) or host_database.load(name)
            if not self._unwritten.empty:
                group = self._unwritten.apply_to(name, group)
            if group.plain_state is None or arguments is None:
                states.append(group.state(ref))
            else:
                states.append(group.plain_state)
        return CommittedStates(states, commit)

    def current_texts(self, packed_generations: Iterable[PackedGeneration]) -> list[str]:
        """Return the current token of each generation; as `read`, without creating refs or states.

        Raises:
            TierError: the file cannot be read, or an invalidation is still to be written.
            EntryError: a packed generation is malformed.
        """
        host_database = self._up_to_date()
        groups = host_database.groups
        apply_to = None if self._unwritten.empty else self._unwritten.apply_to
        found = []
        for packed in packed_generations:
            _, name, arguments, _, _ = packed
            group = groups.get(name) or host_database.load(name)
            if apply_to is not None:
                group = apply_to(name, group)
            now = group.plain_state
            if now is None or arguments is None:
                now = group.state(ref_of(packed))
            found.append(now[0])
        return found

    def _up_to_date(self) -> HostDatabase:
        """Return the host database after bringing its mirror up to date.

        Raises:
            TierError: the file cannot be read, or an invalidation is still to be written.
        """
        if self._queued:
            raise TierError(UNWRITTEN_TEXT)
        host_database = self.host_database
        if (
            host_database.bell[0] != host_database.seen_bell
            or time.monotonic() > host_database.check_at
        ):
            host_database.refresh()
        return host_database

    def learn(self, refs: Sequence[Ref], before: Sequence[State], now: Sequence[State]) -> None:
        """Adopt the states that a shared authority reads, if this host still reads `before`.

        Groups with an invalidation that is still on its way to that authority, or that arrived
        there only after `before` was read, are left out: `now` may not include it.

        Args:
            before: the result of `read` before `now` was read.

        Raises:
            TierError: it could not be written.
        """
        since = before.commit if isinstance(before, CommittedStates) else 0
        updates = [
            (ref, old, new) for ref, old, new in zip(refs, before, now, strict=True) if old != new
        ]
        if not updates:
            return

        def work(connection: sqlite3.Connection, commit: int) -> bool:
            journalled = _journalled_groups(connection)
            changed = _mark_shared(connection)
            for name in dict.fromkeys(ref.group for ref, _, _ in updates):
                if name not in journalled and _delivered_at(connection, name) <= since:
                    mine = [(ref, old, new) for ref, old, new in updates if ref.group == name]
                    changed |= _learn(connection, name, mine, commit)
                    extend_life(connection, [name], self._now() + MIN_GROUP_SECONDS)
            return changed

        self.host_database.write(work, durable=False)

    async def states(self, port: Port, refs: Sequence[Ref]) -> list[State]:
        """See `memo.stores.protocols.Generations.states`."""
        if self._queued:
            await port.offload(self._write_queued)
        if not self._unwritten.empty and time.monotonic() > self._write_at:
            await port.offload(self._write_unwritten)
        if not self.host_database.is_at_hand:
            return await port.offload(retry_while_locked, self.read, refs)
        return self.read(refs)

    async def stamp_states(self, port: Port, refs: Sequence[Ref]) -> list[State]:
        """See `memo.stores.protocols.Generations.stamp_states`."""
        states = await self.states(port, refs)
        lives, soon = self.host_database.lives, self._now() + MIN_GROUP_SECONDS // 2
        if LOST not in states and all(lives.get(ref.group, 0) >= soon for ref in refs):
            return states
        return await port.offload(self._create_missing, refs)

    def _create_missing(self, refs: Sequence[Ref]) -> list[State]:
        created = Change({ALL: stamps.token()})  # one for all: equal tokens compress well

        names = dict.fromkeys(ref.group for ref in refs)

        def work(connection: sqlite3.Connection, commit: int) -> bool:
            for name in names:
                if ALL not in fields_of(connection, name):
                    change_fields(connection, name, created, commit)
            extend_life(connection, names, self._now() + MIN_GROUP_SECONDS)
            return True

        try:
            self.host_database.write(work, durable=False)
        except TierError as error:
            if not _is_unusable(error):
                raise
            self._unwritten.add_groups(names)
        found = self.read(refs)
        self._note_expiry(names, self._now() + MIN_GROUP_SECONDS)
        return found

    # --- expiry of groups ------------------------------------------------------------------------

    def _now(self) -> int:
        return self.host_database.clock.wall_ns() // SECOND

    def _note_expiry(self, names: Iterable[str], until: int) -> None:
        lives = self.host_database.lives
        if len(lives) > MAX_MIRRORED_GROUPS:
            lives.clear()
        lives.update(dict.fromkeys(names, until))

    async def extend_life(self, port: Port, groups: Iterable[str], lifetime: float | None) -> None:
        """See `memo.stores.protocols.HostGenerations.extend_life`; writes rarely."""
        now, lives = self._now(), self.host_database.lives
        end = NEVER_EXPIRES if lifetime is None else now + int(lifetime) + 1
        short = [name for name in groups if lives.get(name, 0) < end]
        if short:
            spare = 0 if lifetime is None else SPARE_LIFE_SECONDS + int(lifetime / 4)
            await port.offload(self._extend_life, short, end + spare)

    def _extend_life(self, groups: Sequence[str], until: int) -> None:
        def work(connection: sqlite3.Connection, _: int) -> bool:
            extend_life(connection, groups, until)
            return True

        with suppress(TierError):  # the groups may be deleted early, which costs only misses
            self.host_database.write(work, durable=False)
        self._note_expiry(groups, until)

    def is_sweep_due(self) -> bool:
        """True if a `sweep` is due; only once for each time it is."""
        now = time.monotonic()
        if now < self._sweep_at:
            return False
        self._sweep_at = now + GROUP_SWEEP_SECONDS
        return True

    async def sweep(self, port: Port) -> int:
        """Delete the groups that no entry can name any more; return their number.

        Groups with an invalidation on its way to a shared tier are kept.
        """
        return await port.offload(self._sweep)

    def _sweep(self) -> int:
        count = 0
        while True:
            gone = self._delete_some(lambda connection: _expired_groups(connection, self._now()))
            count += gone
            if gone < GROUPS_PER_SWEEP:
                return count
            time.sleep(SECONDS_BETWEEN_TRANSACTIONS)

    async def clear(self, port: Port) -> None:
        """Delete all groups except the namespace's, whose invalidation must stay known."""
        await port.offload(self._clear)

    def _clear(self) -> None:
        while self._delete_some(_all_but_namespace) == GROUPS_PER_SWEEP:
            time.sleep(SECONDS_BETWEEN_TRANSACTIONS)

    def _delete_some(self, which: Callable[[sqlite3.Connection], list[str]]) -> int:
        """Delete groups, up to `GROUPS_PER_SWEEP` in one transaction.

        Raises:
            TierError: it could not be written.
        """
        gone: list[str] = []

        def work(connection: sqlite3.Connection, commit: int) -> bool:
            journalled = _journalled_groups(connection)
            gone[:] = [name for name in which(connection) if name not in journalled]
            delete_groups(connection, gone, commit)
            return bool(gone)

        self.host_database.write(work, durable=False)
        return len(gone)

    # --- not written yet -------------------------------------------------------------------------

    def _write_unwritten(self) -> None:
        """Write the changes that could not be written before, if that is possible now."""
        self._write_at = time.monotonic() + UNWRITTEN_RETRY_SECONDS
        written: tuple[object, ...] = ()

        def work(connection: sqlite3.Connection, commit: int) -> bool:
            nonlocal written
            written = self._unwritten.write(connection, commit, self._now())
            return True

        with suppress(TierError):
            self.host_database.write(work, durable=True)
            self._unwritten.forget(written)

    def names(self, kind: str, limit: int) -> list[str]:
        """Return the names of the groups of one kind (`"f:"`, `"p:"`, `"t:"`), at most `limit`.

        Groups that were invalidated but never used by an entry are left out.

        Raises:
            TierError: the file cannot be read.
        """
        rows = self.host_database.select(GENERATIONS_SQL["names"], kind, after_prefix(kind), limit)
        return [name.removeprefix(kind) for (name,) in rows]

    def fields_of_groups(self, groups: Sequence[str]) -> dict[str, dict[str, str]]:
        """See `memo.stores.protocols.HostGenerations.fields_of_groups`.

        Raises:
            TierError: the file cannot be read, or an invalidation is still to be written.
        """
        host_database = self._up_to_date()
        found = {}
        for name in groups:
            group = host_database.groups.get(name) or host_database.load(name)
            unwritten = self._unwritten
            fields = (group if unwritten.empty else unwritten.apply_to(name, group)).fields
            if ALL in fields:
                found[name] = dict(fields)
        return found

    def all_groups(self) -> list[str]:
        """Return all groups that have a `*`.

        Raises:
            TierError: the file cannot be read.
        """
        statement = "SELECT name FROM generations WHERE field = '*' ORDER BY name"
        return [name for (name,) in self.host_database.select(statement)]

    async def turn(self, port: Port, turns: Sequence[Turn], note: str) -> None:
        """See `memo.stores.protocols.Generations.turn`."""
        await port.offload(self._turn, turns, note)

    def _turn(self, turns: Sequence[Turn], note: str) -> None:
        def work(connection: sqlite3.Connection, commit: int) -> bool:
            _turn(connection, turns, note, commit, self._now())
            if _is_shared(connection):
                _journal_for_next_tier(
                    connection, self.host_database.clock.wall_ns(), _packed(turns), note
                )
            return True

        self.host_database.write(work, durable=True)

    def queue_unwritten(self, turns: Sequence[Turn], note: str, error: TierError) -> str:
        """Keep an invalidation that could not be written; return what happens next, as text.

        If this process cannot use the directory, the invalidation holds in this process.  After any
        other fault this process reads nothing here until it is written.

        Raises:
            TierError: it can never be written, so it must not block all others.
        """
        if isinstance(error.__cause__, DATA_ERRORS):
            raise error
        if _is_unusable(error):
            self._unwritten.turn(turns, note)
            return f"not written: {error}; it holds in this process, and is written when possible"
        self._queued.append(lambda: self._turn(turns, note))
        return f"failed: {error}; this process reads nothing there until it is written"

    def _write_queued(self) -> None:
        """Write the changes that could not be written before.

        Raises:
            TierError: they still cannot be written.
        """
        if time.monotonic() < self._write_at:
            raise TierError(UNWRITTEN_TEXT)
        for write in list(self._queued):
            self._write_at = time.monotonic() + INVALIDATION_RETRY_SECONDS
            write()
            with suppress(ValueError):  # another thread has removed it
                self._queued.remove(write)
        self._write_at = 0.0

    async def notes(self, port: Port, ref: Ref) -> list[tuple[str, str]]:
        """See `memo.stores.protocols.Generations.notes`."""
        await self.states(port, [ref])
        group = self._unwritten.apply_to(ref.group, self.host_database.load(ref.group))
        return generations.notes_for(group.fields, ref)


def _is_unusable(error: TierError) -> bool:
    """True if the fault is that the directory is missing, not writable, or on a full disk."""
    return isinstance(error, TierUnavailable) or cache_directory.is_full(error.__cause__)


def _expired_groups(connection: sqlite3.Connection, now: int) -> list[str]:
    """Return groups whose life has ended, as many as one transaction deletes."""
    rows = connection.execute(GENERATIONS_SQL["expired_groups"], (now, GROUPS_PER_SWEEP))
    return [name for (name,) in rows]


def _all_but_namespace(connection: sqlite3.Connection) -> list[str]:
    """Return groups other than the namespace's, as many as one transaction deletes."""
    rows = connection.execute(
        "SELECT name FROM groups WHERE name <> 'n' LIMIT ?", (GROUPS_PER_SWEEP,)
    )
    return [name for (name,) in rows]


def _journalled_groups(connection: sqlite3.Connection) -> set[str]:
    """Return the groups with an invalidation in the journal."""
    rows = connection.execute("SELECT turns FROM journal").fetchall()
    return {turn.group for (text,) in rows for turn in _unpacked(text)}


def _is_shared(connection: sqlite3.Connection) -> bool:
    """True if some process of this host may use a shared tier that this one does not use."""
    return connection.execute("SELECT 1 FROM meta WHERE name = 'shared'").fetchone() is not None


def _mark_shared(connection: sqlite3.Connection) -> bool:
    statement = "INSERT OR IGNORE INTO meta VALUES ('shared', 1)"
    return connection.execute(statement).rowcount > 0


def _journal_for_next_tier(connection: sqlite3.Connection, at: int, turns: str, note: str) -> None:
    """Journal an invalidation for the next shared tier in use, once per target."""
    connection.execute(
        "DELETE FROM journal WHERE note LIKE ? AND turns = ?", (_ANY_TIER_NOTES, turns)
    )
    count = "SELECT count(*) FROM journal WHERE note LIKE ?"
    if connection.execute(count, (_ANY_TIER_NOTES,)).fetchone()[0] >= MAX_WAITING_INVALIDATIONS:
        connection.execute("DELETE FROM journal WHERE note LIKE ?", (_ANY_TIER_NOTES,))
        turns = _packed([Turn("n")])
    connection.execute(
        "INSERT INTO journal (at, due, turns, note) VALUES (?, 1, ?, ?)", (at, turns, note)
    )


def _delivered_at(connection: sqlite3.Connection, group: str) -> int:
    row = connection.execute("SELECT settled FROM groups WHERE name = ?", (group,)).fetchone()
    return row[0] if row else last_sweep_commit(connection)


def _learn(
    connection: sqlite3.Connection,
    group: str,
    updates: list[tuple[Ref, State, State]],
    commit: int,
) -> bool:
    fields = original = fields_of(connection, group)
    for ref, old, new in updates:
        present, wanted = stamps.state_of(ref, original), new
        if present != old and present.text == old.text and new != LOST:
            wanted = new._replace(last=present.last)  # another call of the group has learned
        elif present != old:
            continue
        change = generations.change_to_learn(fields, ref, wanted)
        if not change.empty:
            change_fields(connection, group, change, commit)
            fields = generations.apply(fields, change)
    return fields is not original


class Journal:
    """Invalidations that a shared tier has not received yet.

    See `memo.stores.protocols.Journal`.
    """

    def __init__(self, host_database: HostDatabase) -> None:
        self.host_database = host_database
        self._failed: set[int] = set()
        self._done_rows: tuple[int, set[int]] = (0, set())
        self._copy: list[Row] = []
        self._copied_until = 0.0
        self._failed_reads = 0

    def add(self, turns: Sequence[Turn], note: str) -> int:
        """Journal an invalidation and turn the host's own generations, in one durable transaction.

        Raises:
            TierError: it could not be written.
        """
        number = 0

        def work(connection: sqlite3.Connection, commit: int) -> bool:
            nonlocal number
            at = self.host_database.clock.wall_ns()
            _turn(connection, turns, note, commit, at // SECOND)
            _mark_shared(connection)
            cursor = connection.execute(
                "INSERT INTO journal (at, due, turns, note) VALUES (?, 0, ?, ?)",
                (at, _packed(turns), note),
            )
            number = cursor.lastrowid or 0
            return True

        self.host_database.write(work, durable=True)
        return number

    def mark_failed(self, row: int) -> None:
        """Record that an invalidation did not reach the shared tier: it is due from now on.

        Raises:
            TierError: it could not be written; the row is then due at once in this process, and in
                others `OVERDUE_NS` after it was added.
        """
        self._failed.add(row)

        def work(connection: sqlite3.Connection, _: int) -> bool:
            statement = "UPDATE journal SET due = 1 WHERE id = ?"
            return connection.execute(statement, (row,)).rowcount > 0

        self.host_database.write(work, durable=False)

    def mark_done(self, row: int) -> None:
        """Record that an invalidation reached the shared tier.

        Raises:
            TierError: it could not be written; other processes then replay it once more.
        """
        self._done_here().add(row)

        def work(connection: sqlite3.Connection, commit: int) -> bool:
            found = connection.execute("SELECT turns FROM journal WHERE id = ?", (row,)).fetchone()
            if found is None:
                return False
            connection.execute("DELETE FROM journal WHERE id = ?", (row,))
            connection.executemany(
                "UPDATE groups SET settled = ?, changed = ? WHERE name = ?",
                [(commit, commit, turn.group) for turn in _unpacked(found[0])],
            )
            return True

        self.host_database.write(work, durable=False)
        self._failed.discard(row)

    async def has_due_rows(self, port: Port, where: str) -> bool:
        """Like `has_due_rows_now`, in a thread if the file has to be opened."""
        if self.host_database.is_at_hand:
            return self.has_due_rows_now(where)
        return await port.offload(self.has_due_rows_now, where)

    def has_due_rows_now(self, where: str, *, no_opening: bool = False) -> bool:
        """True if rows must be replayed before a shared tier is read; about 0.3 µs.

        False if there is no file and none can be created: nothing was ever journalled there.

        Args:
            where: identifies the tier; rows for other tiers cost nothing.
            no_opening: return True instead of opening the file.

        Raises:
            TierError: the file cannot be read at all.
        """
        host_database = self.host_database
        if (
            host_database.bell[0] != host_database.seen_bell
            or time.monotonic() > host_database.check_at
        ):
            if no_opening and not host_database.is_at_hand:
                return True
            try:
                host_database.refresh()
            except TierError as error:
                rows = self._rows_from_copy(error) if host_database.may_exist() else []
                return any(_is_for(where, row[4]) for row in rows)
        journal = host_database.journal
        return bool(journal) and any(
            self._is_due(row) for one in (where, "*") for row in journal.get(one, ())
        )

    def _rows_from_copy(self, error: TierError) -> list[Row]:
        """Return the due rows from a copy of a file that cannot be opened.

        Raises:
            TierError: the copy cannot be read either; after `FILE_READ_ATTEMPTS` times the file is
                set aside.
        """
        if time.monotonic() > self._copied_until:
            from memo.stores.disk import recovery

            try:
                self._copy = recovery.read_journal(self.host_database.file.path)
            except TierError:
                self._failed_reads += 1
                if self._failed_reads < FILE_READ_ATTEMPTS:
                    raise
                with suppress(OSError, sqlite3.Error):
                    self.host_database.file.set_aside()
                raise error from None
            self._copied_until = time.monotonic() + COPY_LIFE_SECONDS
        self._failed_reads = 0
        return [row for row in self._copy if self._is_due(row[:3])]

    def _done_here(self) -> set[int]:
        """Return the rows of the open file that this process has replayed."""
        if self._done_rows[0] != self.host_database.file.opened:
            self._done_rows = self.host_database.file.opened, set()
        return self._done_rows[1]

    def _is_due(self, row: tuple[int, int, int]) -> bool:
        number, at, due = row
        if number in self._done_here():
            return False
        if due or number in self._failed:
            return True
        return not 0 <= self.host_database.clock.wall_ns() - at < OVERDUE_NS

    def due_rows(self, where: str | None = None) -> list[tuple[int, list[Turn], str]]:
        """Return (row, turns, note) of the rows that are due, oldest first.

        Args:
            where: leave out the rows for other shared tiers than this one.

        Raises:
            TierError: the file cannot be read.
        """
        try:
            rows = self.host_database.select(
                "SELECT id, at, due, turns, note FROM journal ORDER BY id"
            )
        except TierError as error:
            if not self.host_database.may_exist():
                raise
            rows = self._rows_from_copy(error)
        return [
            (row[0], _unpacked(row[3]), row[4])
            for row in rows
            if self._is_due(row[:3]) and (where is None or _is_for(where, row[4]))
        ]


def _is_for(where: str, note: str) -> bool:
    """True if a journalled invalidation with this note is for a shared tier."""
    return not {where, "*"}.isdisjoint(receivers_in(note))


def _packed(turns: Iterable[Turn]) -> str:
    return json.dumps(list(turns), separators=(",", ":"))


def _unpacked(text: str) -> list[Turn]:
    """Parse the turns of a journal row; an unreadable row stands for the whole namespace."""
    try:
        rows = json.loads(text)
        return [Turn(g, tuple((n, d) for n, d in pairs), bool(whole)) for g, pairs, whole in rows]
    except (ValueError, TypeError):
        return [Turn("n")]


def _turn(
    connection: sqlite3.Connection, turns: Iterable[Turn], note: str, commit: int, now: int
) -> None:
    """Write invalidations; each group is read and written once, however many turns it has."""
    groups = generations.by_group(turns)
    for name, own in groups.items():
        change = generations.change_for_all(fields_of(connection, name), own, note)
        change_fields(connection, name, change, commit)
    extend_life(connection, groups, now + TOMBSTONE_SECONDS)


class Host:
    """State that the processes of one host share.

    Args:
        directory: the cache directory; created with mode 0700 if it is missing.
        clock: tells the age of journal rows.
        root: the directory of the setting, if `directory` is inside it.
    """

    def __init__(
        self, directory: Path, clock: Clock = SYSTEM_CLOCK, root: Path | None = None
    ) -> None:
        self.directory = directory
        self.cache_directory = CacheDirectory(directory, root)
        with suppress(OSError, SettingError):  # reported at the first use
            if not directory.exists():
                private_files.claim(directory)
        self.host_database = HostDatabase(self.cache_directory, clock)
        self.generations = HostGenerations(self.host_database)
        self.journal = Journal(self.host_database)
        self._id: tuple[int, str] = (0, "")

    @property
    def id(self) -> str:
        """16 random hex digits, created once per directory.

        Raises:
            TierError: the file cannot be read.
        """
        opened, known = self._id
        if not known or opened != self.host_database.file.opened:
            known = self.load_note("id")
            self._id = self.host_database.file.opened, known
        return known

    def load_note(self, name: str) -> str:
        """Return the text stored under a name, or `""`.

        Raises:
            TierError: the file cannot be read.
        """
        rows = self.host_database.select("SELECT value FROM meta WHERE name = ?", name)
        return str(rows[0][0]) if rows else ""

    def save_note(self, name: str, text: str) -> None:
        """Store a text under a name.

        Raises:
            TierError: it could not be written.
        """

        def work(connection: sqlite3.Connection, _: int) -> bool:
            connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, text))
            return True

        self.host_database.write(work, durable=False)

    def lock(self, name: str) -> HostLock:
        """Return a lock for a name of any length; it is not held yet.

        Raises:
            TierUnavailable: no file can be created for it.
        """
        if self.cache_directory.is_unusable() or self.cache_directory.state == READ_ONLY:
            raise self.cache_directory.unavailable()
        digest = blake2b(name.encode(), digest_size=20).hexdigest()
        return HostLock(self.directory / "locks" / digest)

    def close(self) -> None:
        """Close connections and descriptors; the next use opens them again."""
        self.host_database.close()
