"""The disk tier: records in a `diskcache` index, payloads in files that are mapped into memory.

::

    <directory>/host.sqlite, host.bell, locks/   see `host_state`
    <directory>/entries/cache.db                 the index: name -> record, or the name of its files
    <directory>/payloads/ab/...                  see `payload_files`

A lookup is one prepared SELECT on a connection of its own: no commit, no statistics, no write.
Which entries were read is reported to the index in the background once in a while, with a store,
and at exit, so that entries in use are not evicted.  Anything that may take longer than a
millisecond runs off the event loop.
"""

from __future__ import annotations

import atexit
import os
import sqlite3
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from memo.errors import SettingError, TierError, TierUnavailable, described, file_fault
from memo.records import seal
from memo.records.codec import Payload
from memo.records.payload_pieces import IncomingPayload
from memo.runtime import private_files
from memo.runtime.clock import SECOND, SYSTEM_CLOCK, Clock
from memo.runtime.memory_budget import BUDGET
from memo.runtime.port import Port
from memo.settings import secret_keys
from memo.settings.checks import DEFAULT_RETENTION
from memo.settings.secret_keys import Secret
from memo.stores import protocols
from memo.stores.disk import file_locks
from memo.stores.disk.cache_directory import READ_ONLY, is_full
from memo.stores.disk.payload_files import Payloads
from memo.stores.disk.sqlite_file import (
    ENTRIES_SQL,
    KEPT_LOG_BYTES,
    SECONDS_BETWEEN_TRANSACTIONS,
    DamagedError,
    SqliteFile,
    after_prefix,
    retry_while_locked,
)
from memo.stores.protocols import (
    BIG_RECORD_BYTES,
    Found,
    Generations,
    Host,
    Listed,
    RecordToStore,
    Source,
)

if TYPE_CHECKING:
    from memo.stores.disk.index import Cleared, Index, Row

T = TypeVar("T")
MAX_INDEX_RECORD_BYTES = 32 * 1024
"""Largest record in bytes that is stored in the index itself: reading it there costs as much as
opening a file, and writing it is not much slower yet (measured: 32 KiB 7.6 against 5.5 µs to read,
90 against 46 µs to write; 64 KiB 340 against 50 µs to write)."""
ROW_OVERHEAD_BYTES = 1024
"""Approximate bytes that a row takes besides its record, with its places in four trees."""
PRAGMAS = ("auto_vacuum=1", "cache_size=128", "synchronous=1", "mmap_size=0")
"""Like the settings of `index`, whose transaction cannot change them."""
SWEEP_SECONDS = 3600.0
"""Seconds between two sweeps for files of dead writers, unless one is needed sooner."""
EARLY_SWEEP_SECONDS = 1.0
"""Seconds between two sweeps when the budget is spent or a process stores its first payload, since
files of a dead writer may be the reason."""
_SWEEP_PAUSE_FACTOR = 50
"""The pause after a sweep, as a multiple of the sweep's duration."""
REPORT_SECONDS = 60.0
"""Seconds after which a process reports to the index what it has read."""
MAX_REMEMBERED_READS = 16_384
"""Maximum number of names of read entries that are remembered.  Beyond it they are reported early,
or forgotten if the last report was less than `_MIN_REPORT_SECONDS` ago."""
_MIN_REPORT_SECONDS = 5.0
_NAME_BYTES = sys.getsizeof("0" * 120)
"""Approximate bytes of a name."""
MAX_EVICTION_SECONDS = 0.5
"""Longest eviction in seconds in the background, since a process that exits waits for it; the next
store continues it."""
_LONG_LOG_BYTES = 2 * KEPT_LOG_BYTES
"""Bytes of the write-ahead log at which it is checkpointed during a long deletion; less if that is
more than a 64th of the budget."""
_NO_ROW = 1 << 62
"""Higher than any row number."""
ROWS_PER_PAGE = 200
_MIN_FREED_BYTES = 256 * 1024
"""Minimum number of bytes to free when the disk turns out to be full."""
_EVICTION_ATTEMPTS = 4
"""Number of attempts to free space for one entry."""
_SELECT_ENTRY = (
    "SELECT value, filename, expire_time, size FROM Cache WHERE key=? AND raw=1 AND mode=1"
)
_SELECT_INLINE_RECORD = (
    "SELECT value, expire_time FROM Cache WHERE key=? AND raw=1 AND filename IS NULL"
)
_SELECT_NEXT_KEY = "SELECT key FROM Cache WHERE key > ? AND key < ? AND raw=1 ORDER BY key LIMIT 1"
_COUNT_ENTRIES = "SELECT count(*) FROM Cache WHERE key >= ? AND key < ? AND raw=1"
_INDEX_ERRORS = (
    sqlite3.Error,
    OSError,
    DamagedError,
    TypeError,
    ValueError,
    KeyError,
    AssertionError,
)


class Disk:
    """A `memo.stores.protocols.Tier` in a directory that the processes of one host share.

    Args:
        directory: the cache directory.
        size_limit: maximum size of index and payloads together, in bytes.
        host: the host state in the same directory; its generations are this tier's.
        clock: tells what has expired.
        retention: seconds for which an entry is kept after its code was replaced.

    Raises:
        SettingError: the directory belongs to another user.
    """

    name = where = protocols.DISK
    shared = read_only = False

    def __init__(
        self,
        directory: Path,
        size_limit: int,
        host: Host,
        clock: Clock = SYSTEM_CLOCK,
        *,
        retention: float = DEFAULT_RETENTION,
    ) -> None:
        self.directory = directory
        self.size_limit = size_limit
        self.generations: Generations | None = host.generations
        self._cache_directory = host.cache_directory
        self._cache_directory.free_space = self._free_space
        self._clock = clock
        self._retention = retention
        self.payloads = Payloads(directory / "payloads")
        self._swept = directory / "entries" / "swept"
        self.last_sweep_at = -SWEEP_SECONDS
        self._may_have_orphans = False
        self._has_written = False
        self._pause = EARLY_SWEEP_SECONDS
        self._over_budget = False
        self._closed = 0
        self._evict_at = 0.0
        self._used: dict[str, None] = {}
        self._reported_at = 0.0
        self._report_at = time.monotonic() + REPORT_SECONDS
        self._read_in_front: Callable[[], Iterable[str]] = tuple
        _disks.add(self)
        BUDGET.add_table(self)
        self.index: Index | None = None
        self._pending_error: TierError | None = None
        self._in_files: set[str] = set()
        self.index_file = SqliteFile(
            directory / "entries" / "cache.db",
            directory,
            self._prepare,
            self._before_set_aside,
            PRAGMAS,
        )

    def __sizeof__(self) -> int:
        """Return the bytes of the remembered names, the part of this object that grows."""
        return sum(sys.getsizeof(x) + _NAME_BYTES * len(x) for x in (self._used, self._in_files))

    def trust(self, secrets: Sequence[Secret]) -> None:
        """Accept vouchers sealed with one of these secrets, newest first."""
        self.payloads.secrets = secrets

    # --- opening ---------------------------------------------------------------------------------

    def _prepare(self, connection: sqlite3.Connection) -> None:
        from memo.stores.disk.index import check

        found = check(connection)
        self.index = None if found or self.index_file.read_only else self._create_index()

    def _create_index(self) -> Index:
        """Return the index for writing; creating it takes the writers' lock."""
        from memo.stores.disk.index import Index

        return Index(self.index_file, self.payloads, self.size_limit, self._log_bytes, self._now)

    def _now(self) -> float:
        return self._clock.wall_ns() / SECOND

    def _log_bytes(self) -> int:
        """Return the bytes of the write-ahead logs of the index and of the host's file."""
        log = f"{self.index_file.path}-wal"
        shared = f"{self.directory}/host.sqlite"
        return sum(map(_size, (log, shared, f"{shared}-wal")))

    def _before_set_aside(self) -> None:
        """Plan a sweep, since the files named by a damaged index no longer have an owner."""
        self._may_have_orphans = True

    def _open_index_file(self) -> SqliteFile:
        index_file = self.index_file
        if not index_file.is_open:
            try:
                read_only = self._cache_directory.open() == READ_ONLY
                if not read_only:
                    with private_files.open_folder(index_file.path.parent, make=True):
                        pass
                index_file.open(read_only=read_only)
                secret_keys.warn_if_not_kept()
            except TierError:
                raise
            except (*_INDEX_ERRORS, SettingError) as error:
                if is_full(error):
                    raise self._cache_directory.mark_unusable(
                        "cannot be used: the disk is full."
                    ) from error
                raise index_file.handle_error(error) from error
        return index_file

    def _fault(self, error: Exception) -> TierError:
        """Handle an error of the index, and return the `TierError` to raise.

        Any error but those of SQLite and the system comes from `diskcache`, and means damage.
        """
        if not isinstance(error, (sqlite3.Error, OSError, DamagedError, TierError)):
            error = DamagedError(f"an incomplete index: {described(error)}")
        return self.index_file.handle_error(error)

    def write(self, work: Callable[..., T], *args: Any) -> T:
        """Run `work(index, *args)` as the only writer of this process, on the file in its place.

        Raises:
            TierError: it could not be done.
        """
        found: T = retry_while_locked(self._write_now, work, args)
        return found

    def _write_now(self, work: Callable[..., T], args: tuple[Any, ...]) -> T:
        for _ in range(3):
            index_file = self._open_index_file()
            try:
                with index_file.writing:
                    if not index_file.was_replaced():
                        index_file.writer  # noqa: B018 - raises if the file is read-only
                        if self.index is None:  # not `or`: an empty index is false
                            self.index = self._create_index()
                        return work(self.index, *args)
            except _INDEX_ERRORS as error:
                raise self._fault(error) from error
            index_file.close()
        raise TierError("the index is replaced again and again")

    def _read(self, statement: str, *arguments: Any) -> list[Any]:
        index_file = self._open_index_file()
        try:
            with index_file.reading:
                return index_file.reader.execute(statement, arguments).fetchall()
        except _INDEX_ERRORS as error:
            raise self._fault(error) from error

    @property
    def budget(self) -> int:
        """See `memo.stores.protocols.Tier.budget`."""
        return self.size_limit

    # --- looking up ------------------------------------------------------------------------------

    def at_hand(self, name: str) -> bytes | None:
        """See `memo.stores.protocols.LocalTier.at_hand`: a record in the index, if that is open.

        Any error is left to the `lookup` that follows, so that it is reported and waited for once.
        """
        index_file = self.index_file
        if name in self._in_files or time.monotonic() > self._report_at:
            return None  # `lookup` reads the files, or reports the reads to the index
        try:
            with index_file.reading:
                row = index_file.row_cursor.execute(_SELECT_INLINE_RECORD, (name,)).fetchone()
        except TierError:  # the tier is closed
            return None
        except _INDEX_ERRORS as error:
            self._pending_error = self._fault(error)
            return None
        if row is None:
            return None
        record, expire = row
        if expire is not None and not self._clock.wall_ns() < _float(expire) * SECOND:
            return None
        self._note_read(name)
        return _bytes(record)

    async def lookup(self, port: Port, name: str) -> Found | None:
        """See `memo.stores.protocols.Tier.lookup`; a lookup writes nothing."""
        met, self._pending_error = self._pending_error, None
        if met is not None:
            raise met
        index_file = self.index_file
        if not index_file.is_open:
            if self._cache_directory.is_unusable():
                raise self._cache_directory.unavailable()
            await port.offload(retry_while_locked, self._open_index_file)
        try:
            with index_file.reading:
                row = index_file.row_cursor.execute(_SELECT_ENTRY, (name,)).fetchone()
        except _INDEX_ERRORS as error:
            raise self._fault(error) from error
        if row is None:
            if not index_file.was_replaced():
                return None
            row = await port.offload(self._look_up_again, name)
            if row is None:
                return None
        self.record_read(port, name)
        if row[1] is None:
            self._in_files.discard(name)
        elif name not in self._in_files:
            self._in_files = (
                {name} if len(self._in_files) >= MAX_REMEMBERED_READS else self._in_files
            )
            self._in_files.add(name)
        return await self._found(port, name, *row)

    def record_read(self, port: Port, name: str) -> None:
        """Note that an entry was read, here or in a tier above, so that it is kept longer."""
        self._note_read(name)
        if time.monotonic() > self._report_at:
            self._report_at = time.monotonic() + REPORT_SECONDS
            self._spawn(port, self.report_reads, "memo-used")

    def _note_read(self, name: str) -> None:
        """Remember the name for the next report to the index."""
        self._used[name] = None
        if len(self._used) > MAX_REMEMBERED_READS:
            self._used = {}
        elif len(self._used) == MAX_REMEMBERED_READS:
            self._report_at = min(self._report_at, self._reported_at + _MIN_REPORT_SECONDS)

    def count_reads_of(self, front: Callable[[], Iterable[str]]) -> None:
        """See `memo.stores.protocols.LocalTier.count_reads_of`."""
        self._read_in_front = front

    def report_reads(self) -> None:
        """Report to the index which entries were read; forget their names even if that fails."""
        if used := self._take_reads():
            with suppress(TierError):
                self.write(lambda index: index.record_reads(used))

    def _take_reads(self) -> dict[str, None]:
        """Return the names read since the last call."""
        used, self._used = self._used, {}
        self._reported_at = time.monotonic()
        return {**used, **dict.fromkeys(self._read_in_front())}

    def _look_up_again(self, name: str) -> tuple[Any, ...] | None:
        """Look up again, in the file that is now at the path of the index."""
        self.index_file.close()
        rows = self._read(_SELECT_ENTRY, name)
        return rows[0] if rows else None

    async def _found(
        self, port: Port, name: str, record: Any, files: Any, expire: Any, size: Any
    ) -> Found | None:
        if expire is not None and not self._clock.wall_ns() < _float(expire) * SECOND:
            return None
        if files is None:
            return Found(_bytes(record))
        source = self.payloads.source(str(files))
        if record is not None:
            return Found(_bytes(record), source)
        read = self._record_in_file
        big = not isinstance(size, int) or size > BIG_RECORD_BYTES
        text = await port.offload(read, name, files) if big else read(name, files)
        return None if text is None else Found(*text)

    def _record_in_file(self, name: str, files: str) -> tuple[bytes, Source | None] | None:
        """Read a record too big for the index; if it was replaced meanwhile, look it up again."""
        try:
            record = self.payloads.read(files)
            if record is None:
                rows = self._read(_SELECT_ENTRY, name)
                files = rows[0][1] if rows else ""
                record = self.payloads.read(files or "")
        except OSError as error:
            raise file_fault("record", error) from error
        return None if record is None else (record, self.payloads.source(files))

    async def payload(self, port: Port, digest: bytes, size: int) -> Source | None:
        """See `memo.stores.protocols.Tier.payload`."""
        try:
            return self.payloads.find(digest, size)
        except OSError as error:
            raise file_fault("payload", error) from error

    # --- writing ---------------------------------------------------------------------------------

    async def store(
        self,
        port: Port,
        name: str,
        record: bytes,
        payload: Payload | None,
        lifetime: float | None,
    ) -> None:
        """See `memo.stores.protocols.Tier.store`."""
        if self._cache_directory.is_unusable():
            raise self._cache_directory.unavailable()
        await port.offload(self._store_with_room, name, record, payload, lifetime)
        self._start_housekeeping(port)

    async def store_many(self, port: Port, records: Sequence[RecordToStore]) -> None:
        """See `memo.stores.protocols.StoresMany.store_many`; it is one transaction."""
        if self._cache_directory.is_unusable():
            raise self._cache_directory.unavailable()
        await port.offload(self._store_many, records)
        self._start_housekeeping(port)

    def _start_housekeeping(self, port: Port) -> None:
        """After a store, sweep and evict in the background if either is due."""
        if self.is_sweep_due():
            self._spawn(port, self._sweep, "memo-sweep")
        if self._over_budget and time.monotonic() > self._evict_at:
            self._evict_at = time.monotonic() + 2 * MAX_EVICTION_SECONDS
            self._spawn(port, self._evict, "memo-evict")

    def _spawn(self, port: Port, work: Callable[[], object], name: str) -> None:
        """Run `work` in the background, unless the tier is closed first."""
        closed = self._closed

        async def begun(port: Port) -> None:
            if self._closed == closed:
                await port.offload(work)
            if self._closed != closed:  # its last step may have opened the index again
                self.index_file.close()

        port.spawn(begun, name)

    def _store_many(self, records: Sequence[RecordToStore]) -> None:
        size = sum(len(record) + ROW_OVERHEAD_BYTES for _, record, _ in records)
        if size > self.size_limit // 16 or any(
            len(record) > MAX_INDEX_RECORD_BYTES for _, record, _ in records
        ):
            for name, record, lifetime in records:
                self._store_with_room(name, record, None, lifetime)
            return
        rows = [(name, _row(record), lifetime) for name, record, lifetime in records]

        def keep(index: Index) -> None:
            self._make_room(index, size)
            index.put_rows(rows)

        self._with_room(size, self.write, keep)

    async def receive(
        self, port: Port, name: str, record: bytes, payload: IncomingPayload, lifetime: float | None
    ) -> Source | None:
        """See `memo.stores.protocols.LocalTier.receive`."""
        await port.offload(self._store_with_room, name, record, payload, lifetime)
        return await self.payload(port, payload.digest, payload.size)

    def _store_with_room(
        self,
        name: str,
        record: bytes,
        payload: Payload | IncomingPayload | None,
        lifetime: float | None,
    ) -> None:
        """Store an entry; on a full disk, remove less valuable ones and try again."""
        size, once = (
            len(record) + (payload.size if payload else 0),
            isinstance(payload, IncomingPayload),
        )
        self._with_room(size, self._store, name, record, payload, lifetime, once=once)

    def _with_room(
        self, size: int, store: Callable[..., None], *args: Any, once: bool = False
    ) -> None:
        """Call `store(*args)`; on a full disk, remove less valuable entries and call it again.

        Args:
            size: bytes that `store` stores.
            once: `store` cannot be called again.
        """
        for _ in range(_EVICTION_ATTEMPTS):
            try:
                store(*args)
            except TierError as error:
                if not is_full(error.__cause__) or once:
                    raise
                if not self._free_space(size):
                    self._cache_directory.warn_full()
                    raise TierUnavailable(str(error), reported=True) from error
            else:
                return
        self._cache_directory.warn_full()
        raise TierUnavailable("the disk is full", reported=True)

    def _free_space(self, size: int) -> bool:
        """Remove entries of at least `size` bytes on a full disk; True if any was removed."""
        with suppress(TierError, sqlite3.Error):
            index_file = self._open_index_file()
            with index_file.writing:
                if self.index is None:
                    self.index = self._create_index()
                return self.index.free_space(max(2 * size, _MIN_FREED_BYTES)) > 0
        return False

    def _store(
        self,
        name: str,
        record: bytes,
        payload: Payload | IncomingPayload | None,
        lifetime: float | None,
    ) -> None:
        outside = None if len(record) <= MAX_INDEX_RECORD_BYTES else record
        size = (payload.size if payload else 0) + len(outside or b"")
        if max(size, len(record)) > self.size_limit:
            raise TierError(f"{size} bytes do not fit in a budget of {self.size_limit}")
        if not size:
            self.write(self._put_row, name, _row(record), lifetime)
            return
        if not self._has_written:  # the first store: a process that died may have left files
            self._has_written = True
            self._may_have_orphans = self._may_have_orphans or self.payloads.directory.exists()
        self.write(self._make_room, size + len(record))
        try:
            with self.payloads.write(payload, outside) as where:
                row = _row(record, outside=outside is not None, where=where, size=size)
                self.write(self._put_row, name, row, lifetime)
        except OSError as error:
            raise file_fault("payload", error) from error

    def _put_row(self, index: Index, name: str, row: Row, lifetime: float | None) -> None:
        if row.name is None:
            self._make_room(index, len(row.record or b"") + ROW_OVERHEAD_BYTES)
        index.put_rows([(name, row, lifetime)])
        if row.name and not self._over_budget:  # other processes may have used the freed space
            with suppress(sqlite3.OperationalError):  # locked by others: eviction can wait
                self._over_budget = not index.make_room(0)

    def _make_room(self, index: Index, size: int) -> None:
        """Report the reads to the index, then evict until `size` more bytes fit."""
        if index.has_room(size):
            return
        tight = index.bytes_to_free(size) > 0
        self._may_have_orphans = self._may_have_orphans or tight
        if tight or time.monotonic() > self._report_at:
            self._report_at = time.monotonic() + REPORT_SECONDS
            index.record_reads(self._take_reads())
        self._over_budget = not index.make_room(size)

    def _evict(self) -> None:
        """Evict down to the budget for up to `MAX_EVICTION_SECONDS`, taking turns with stores."""

        def evict(index: Index) -> None:
            self._over_budget = not index.make_room(0)

        end = time.monotonic() + MAX_EVICTION_SECONDS
        while self._over_budget and time.monotonic() < end:
            time.sleep(SECONDS_BETWEEN_TRANSACTIONS)
            with suppress(TierError):
                self.write(evict)

    async def drop(self, port: Port, name: str) -> bool:
        """See `memo.stores.protocols.Tier.drop`."""
        return await port.offload(self._drop, name)

    def _drop(self, name: str) -> bool:
        return bool(self.write(lambda index: index.delete(name)))

    async def clear(self, port: Port, prefix: str) -> int:
        """See `memo.stores.protocols.Tier.clear`; also removes the files of dead writers."""
        count = await port.offload(self._clear, prefix)
        await self.sweep(port)
        return count

    def _clear(self, prefix: str) -> int:
        if not self.write(lambda index: index.covers_most(prefix)):
            return self._clear_in_parts(lambda index, _: index.clear_some(prefix))
        self.write(lambda index: index.prepare_to_clear())
        try:
            return self._clear_in_parts(lambda index, last: index.clear_some(prefix, last))
        finally:
            self.write(lambda index: index.end_clearing())

    def _clear_in_parts(self, work: Callable[[Index, int], Cleared]) -> int:
        """Delete entries by many calls of `work(index, last row)`; return the number of entries.

        Files are removed and a long log is checkpointed only while no other process waits for the
        index.
        """

        def below(last: int) -> Cleared:
            return self.write(lambda index: work(index, last))

        long = min(_LONG_LOG_BYTES, max(KEPT_LOG_BYTES, self.size_limit // 64))
        count, some = 0, below(_NO_ROW)
        while some.entries:
            count += some.entries
            for name in some.names:
                self.payloads.remove(name)
            time.sleep(SECONDS_BETWEEN_TRANSACTIONS)
            if _size(f"{self.index_file.path}-wal") > long:
                self.write(lambda index: index.write_back())
            some = below(some.last)
        return count

    async def sweep(self, port: Port) -> int:
        """Remove files without an entry or a living writer, and old replaced entries; count them.

        Raises:
            TierError: the index cannot be read.
        """
        return await port.offload(self._sweep)

    def _sweep(self) -> int:
        begun = time.monotonic()
        self.last_sweep_at = begun
        removed = file_locks.sweep(self.directory / "locks")
        removed += self.payloads.sweep(lambda name: self.write(lambda index: index.has_name(name)))
        removed += self._clear_in_parts(lambda index, _: index.drop_replaced(self._retention))
        self._pause = max(EARLY_SWEEP_SECONDS, _SWEEP_PAUSE_FACTOR * (time.monotonic() - begun))
        return removed

    def is_sweep_due(self) -> bool:
        """True if a sweep is due and no other process of this host has just done one."""
        now = time.monotonic()
        pause = self._pause if self._may_have_orphans else SWEEP_SECONDS
        if now < self.last_sweep_at + pause:
            return False
        self.last_sweep_at = now
        try:
            with private_files.open_folder(self._swept.parent) as folder:
                descriptor = private_files.open_or_create(self._swept.name, folder)
            try:
                facts = os.fstat(descriptor)
                never = self._may_have_orphans and not facts.st_size
                if not never and 0 <= time.time() - facts.st_mtime < pause:
                    return False
                os.pwrite(descriptor, b".", 0)
            finally:
                os.close(descriptor)
        except OSError:
            return False
        self._may_have_orphans = False
        return True

    # --- listing ---------------------------------------------------------------------------------

    def entries(self, prefix: str = "") -> Iterator[Listed]:
        """Yield the entries whose names begin with `prefix`, by name; not for an event loop.

        Raises:
            TierError: the index cannot be read.
        """
        after, whole = "", False
        while not whole:
            page = self._read(
                ENTRIES_SQL["list"], after, prefix, after_prefix(prefix), ROWS_PER_PAGE
            )
            whole = len(page) < ROWS_PER_PAGE
            for row in page:
                if (listed := self._list_row(*row)) is not None:
                    yield listed
                after = row[0]

    def _list_row(
        self, name: str, inline: Any, where: Any, size: int, stored: float
    ) -> Listed | None:
        if inline is not None:
            return Listed(name, inline, size + len(inline), stored)
        record = self.payloads.read(where or "")
        return None if record is None else Listed(name, record, size, stored)

    async def newest(
        self, port: Port, prefixes: Sequence[str], limit: int, *, covers_most: bool
    ) -> list[Listed]:
        """Return the latest entries, at most `limit` for each prefix of names.

        Args:
            covers_most: the prefixes cover most entries of the index.

        Raises:
            TierError: the index cannot be read.
        """
        statement = ENTRIES_SQL["newest_of_all" if covers_most else "newest_of_some"]
        return await port.offload(self._newest, statement, prefixes, limit)

    def _newest(self, statement: str, prefixes: Sequence[str], limit: int) -> list[Listed]:
        found = []
        for prefix in prefixes:
            rows = self._read(statement, prefix, after_prefix(prefix), limit)
            found += [self._list_row(*row) for row in rows]
        return [listed for listed in found if listed is not None]

    async def count_by_prefix(self, port: Port, prefix: str) -> dict[str, int]:
        """Count the names that begin with `prefix`, grouped by the part before the key.

        The time grows with the number of groups, not of names.

        Raises:
            TierError: the index cannot be read.
        """
        return await port.offload(self._count_by_prefix, prefix)

    def _count_by_prefix(self, prefix: str) -> dict[str, int]:
        counts: dict[str, int] = {}
        after, end = prefix, after_prefix(prefix)
        while rows := self._read(_SELECT_NEXT_KEY, after, end):
            head = rows[0][0].rpartition(":")[0] + ":"
            after = after_prefix(head)
            counts[head] = self._read(_COUNT_ENTRIES, head, after)[0][0]
        return counts

    async def holds(self, port: Port, names: Sequence[str]) -> list[bool]:
        """For each of some names, return True if it is stored here.

        Raises:
            TierError: the index cannot be read.
        """
        statement = "SELECT 1 FROM Cache WHERE key=? AND raw=1"
        return await port.offload(lambda: [bool(self._read(statement, name)) for name in names])

    async def names(self, port: Port, prefix: str = "") -> list[str]:
        """Return the names of all entries that begin with `prefix`.

        Raises:
            TierError: the index cannot be read.
        """
        statement = "SELECT key FROM Cache WHERE key >= ? AND key < ? AND raw=1 ORDER BY key"
        rows = await port.offload(self._read, statement, prefix, after_prefix(prefix))
        return [name for (name,) in rows]

    async def health(self, port: Port) -> Mapping[str, Any]:
        """See `memo.stores.protocols.Tier.health`: up, entries, bytes, budget, directory."""
        return await port.offload(self._health)

    def _health(self) -> dict[str, Any]:
        try:
            self._open_index_file()
        except TierUnavailable as error:
            return {"up": False, "error": str(error), **self._cache_directory.health()}
        if self.index_file.read_only:
            (count,) = self._read("SELECT count(*) FROM Cache")[0]
            return {"up": True, "entries": count, **self._cache_directory.health()}
        return {
            "up": True,
            "entries": self.write(lambda index: index.reset("count")),
            "bytes": self.write(lambda index: index.volume()),
            "budget": self.size_limit,
            **self._cache_directory.health(),
        }

    def close(self) -> None:
        """Close connections and descriptors; the next use opens them again."""
        if self.index_file.is_open:
            self.report_reads()
        self._closed += 1
        self.index_file.close()


def _row(record: bytes, *, outside: bool = False, where: str | None = None, size: int = 0) -> Row:
    """Return the index row of an entry.

    Args:
        outside: the record is stored in a file too.
        where: the name of its files.
        size: bytes of its files.
    """
    from memo.stores.disk.index import Row, tag

    worth = seal.worth_of(record)
    mark = tag(worth.cost, size + len(record), worth.code) if worth else "0 "
    return Row(None if outside else record, where, size, mark)


_disks: weakref.WeakSet[Disk] = weakref.WeakSet()


def _at_exit() -> None:
    for disk in tuple(_disks):
        disk.close()


atexit.register(_at_exit)


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def _bytes(value: Any) -> bytes:
    if type(value) is bytes:
        return value
    raise TierError("a row of the index is damaged")


def _float(value: Any) -> float:
    if isinstance(value, (int, float)):
        return float(value)
    raise TierError("a row of the index is damaged")
