"""Shared statistics: the processes of a directory exchange them as files.

One small file per process, replaced as a whole.  A file that is unreadable or damaged is left out,
and is never an error.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

from memo.errors import MemoError
from memo.metrics.snapshots import Stats, as_document, total_of
from memo.runtime import events, private_files
from memo.runtime.blocking import BLOCKING
from memo.runtime.events import Event
from memo.runtime.port import Port

PUBLISH_SECONDS = 1.0
"""Shortest interval in seconds at which a process writes its snapshot."""
PUBLISH_SHARE = 0.01
"""Largest fraction of its time that a process spends on that."""
EARLY_PUBLISH_SECONDS = 0.25
EARLY_PUBLISH_SHARE = 0.2
"""The same two limits after a computation has begun, since the next event may come much later."""
TIMER_THREAD = "memo-background-statistics"
"""The name of the thread that waits until a snapshot is due."""
_SLOW_SNAPSHOT_SECONDS = 0.01
"""If making a snapshot takes this many seconds, it is done in the background: the caller may be an
event loop, and thousands of functions take a tenth of a second."""
SNAPSHOT_KEPT_SECONDS = 7 * 86400
"""Snapshots of processes that ended longer ago are folded into one total."""
_WRITE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
MAX_SNAPSHOT_BYTES = 8 << 20
"""Maximum size of a snapshot file in bytes; a larger file is not memo's."""


class SharedSnapshots:
    """Snapshots of the processes that share a directory.

    `<directory>/stats/<pid>-<start>.json`, one file per process, owner-only, replaced as a whole.
    Files of processes that ended `SNAPSHOT_KEPT_SECONDS` ago are folded into `total.json`.

    Args:
        directory: the cache directory.
    """

    def __init__(self, directory: Path) -> None:
        self.path = Path(directory) / "stats"

    def publish(self, stats: Stats, name: str | None = None) -> None:
        """Write this process's snapshot.

        Raises:
            OSError: it could not be written.
            SettingError: the cache directory belongs to another user.
        """
        self._write(name or process_name(), stats.to_json(), make=True)

    def _write(self, name: str, text: str, *, make: bool = False) -> None:
        temporary = f".{name}.{os.getpid()}.{threading.get_ident()}.tmp"
        with private_files.open_folder(self.path, make=make) as folder:
            descriptor = os.open(temporary, _WRITE_FLAGS, 0o600, dir_fd=folder)
            try:
                with open(descriptor, "w", encoding="utf-8") as file:
                    file.write(text)
                os.replace(temporary, f"{name}.json", src_dir_fd=folder, dst_dir_fd=folder)
            except BaseException:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(temporary, dir_fd=folder)
                raise

    def gather(self, own: Stats | None = None) -> Stats:
        """Add up all snapshots.

        Args:
            own: this process's current snapshot; it replaces the one in its file.
        """
        total, folded = self._total()
        if own is not None and not own.functions:  # this process only reads statistics
            own = replace(own, processes=0)
        parts = [] if own is None else [own]
        for name, snapshot in self._snapshots():
            if name in folded or (own is not None and name == process_name()):
                continue
            parts.append(snapshot if is_alive(name) else _as_ended(snapshot))
        return total_of([*parts, total] if total.processes else parts)

    def _snapshots(self) -> Iterator[tuple[str, Stats]]:
        for name in self._names():
            with contextlib.suppress(OSError, ValueError):
                yield name, Stats.from_json(self._read(name))

    def _names(self) -> list[str]:
        """Return the names of the processes that left a snapshot."""
        names = private_files.list_folder(self.path)
        return sorted(n.removesuffix(".json") for n in names if fnmatch(n, "[!.]*-*.json"))

    def _read(self, name: str) -> bytes:
        with (
            private_files.open_folder(self.path) as folder,
            open(private_files.open_old(f"{name}.json", folder=folder), "rb") as file,
        ):
            text = file.read(MAX_SNAPSHOT_BYTES + 1)
        if len(text) > MAX_SNAPSHOT_BYTES:
            raise ValueError(f"{name}.json is too large")
        return text

    def _total(self) -> tuple[Stats, frozenset[str]]:
        try:
            content = json.loads(self._read("total"))
            return Stats.from_json(json.dumps(content["stats"])), frozenset(content["folded"])
        except (OSError, ValueError, KeyError, TypeError):
            return Stats(processes=0), frozenset()

    def prune(self, now: float | None = None) -> int:
        """Fold the snapshots of processes that ended long ago into the total; return their number.

        Raises:
            OSError: the directory cannot be read or written.
        """
        horizon = (time.time() if now is None else now) - SNAPSHOT_KEPT_SECONDS
        with private_files.open_folder(self.path) as folder:
            old = [name for name in self._names() if _is_old(name, folder, horizon)]
            if not old:
                return 0
            with self._alone(folder) as alone:
                return self._fold(old, folder) if alone else 0

    def _fold(self, old: list[str], folder: int) -> int:
        """Add to the total and name what was added, then unlink: a crash counts nothing twice."""
        total, folded = self._total()
        names = set(old) - folded
        parts = [_as_ended(snapshot) for name, snapshot in self._snapshots() if name in names]
        if names:
            whole = total_of([*parts, total]) if total.processes or parts else total
            content = {"stats": as_document(whole), "folded": sorted(old)}
            self._write("total", json.dumps(content, default=str))
        for name in old:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{name}.json", dir_fd=folder)
        return len(names)

    @contextlib.contextmanager
    def _alone(self, folder: int) -> Iterator[bool]:
        """Yield True in one process at a time; the kernel frees the lock of a process that dies."""
        try:
            import fcntl
        except ImportError:  # no such locks on this system: snapshots are not folded
            yield False
            return
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open("total.lock", flags, 0o600, dir_fd=folder)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                yield False
            else:
                yield True
        finally:
            os.close(descriptor)


def _is_old(name: str, folder: int, horizon: float) -> bool:
    try:
        facts = os.stat(f"{name}.json", dir_fd=folder, follow_symlinks=False)
    except OSError:
        return False
    return facts.st_mtime < horizon and not is_alive(name)


def _as_ended(stats: Stats) -> Stats:
    """Return the snapshot of a process that has ended: no refresh runs, its tiers are unknown."""
    functions = {n: replace(f, refreshes_running=0) for n, f in stats.functions.items()}
    tiers = {n: replace(tier, up=None, health={}) for n, tier in stats.tiers.items()}
    return replace(stats, functions=functions, tiers=tiers)


def is_alive(name: str) -> bool:
    """True if the process that left a snapshot may still run, as far as this host can tell."""
    try:
        os.kill(int(name.partition("-")[0]), 0)
    except (ValueError, OverflowError, ProcessLookupError):
        return False
    except OSError:
        return True
    return True


_started = time.time_ns()
"""Nanoseconds since the epoch; with the process id it identifies this process in every
directory."""


def process_name() -> str:
    """Return the name of this process's file: `<pid>-<start>`."""
    return f"{os.getpid()}-{_started}"


class Publisher:
    """Writes this process's snapshot into the directory in force, at most once a second.

    A fault is one event of kind `ERROR`; counting goes on.

    Args:
        snapshot: returns the snapshot to write.
        directory: returns the directory in force.
    """

    def __init__(self, snapshot: Callable[[], Stats], directory: Callable[[], Path]) -> None:
        self._snapshot = snapshot
        self._directory = directory
        self._due = self._due_soon = 0.0
        self._is_long = False
        self._lock = threading.Lock()
        self._began = False
        self._has_reported = False
        self._timer: threading.Timer | None = None

    def __call__(self) -> None:
        """Publish if it is due."""
        if time.monotonic() >= self._due:
            self._publish_due()

    def publish_soon(self) -> None:
        """Publish now, or shortly if that was just done; called when a computation begins."""
        left = self._due_soon - time.monotonic()
        if left <= 0:
            self._publish_due()
        elif self._timer is None or not self._timer.is_alive():
            timer = threading.Timer(left, self.publish)
            timer.daemon, timer.name = True, TIMER_THREAD
            with contextlib.suppress(RuntimeError):  # no thread: the next event publishes
                timer.start()
                self._timer = timer

    def cancel_soon(self) -> None:
        """Cancel a delayed `publish_soon`: the next event publishes."""
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()

    def _publish_due(self) -> None:
        if self._is_long:
            self._due = self._due_soon = time.monotonic() + PUBLISH_SECONDS
            BLOCKING.spawn(self._publish_in_thread, "memo-statistics")
        else:
            self.publish()

    async def _publish_in_thread(self, port: Port) -> None:
        self.publish()

    def publish(self) -> None:
        """Publish now; if another thread is publishing, do nothing."""
        if not self._lock.acquire(blocking=False):
            return
        began, worked = time.monotonic(), time.thread_time()
        self._due = self._due_soon = began + PUBLISH_SECONDS
        try:
            self._publish()
        except (OSError, MemoError) as error:
            self._report_fault(error)
        finally:
            took = time.monotonic() - began
            self._is_long = time.thread_time() - worked >= _SLOW_SNAPSHOT_SECONDS
            self._due = began + max(PUBLISH_SECONDS, took / PUBLISH_SHARE)
            self._due_soon = began + max(EARLY_PUBLISH_SECONDS, took / EARLY_PUBLISH_SHARE)
            self._lock.release()

    def _publish(self) -> None:
        snapshot = self._snapshot()
        if not (snapshot.functions or self._began):
            return
        shared_snapshots = SharedSnapshots(self._directory())
        shared_snapshots.publish(snapshot)
        if not self._began:
            self._began = True
            shared_snapshots.prune()

    def _report_fault(self, error: Exception) -> None:
        if not self._has_reported:
            self._has_reported = True
            events.emit(Event(events.ERROR, reason="statistics", detail=repr(error)))

    def start_over(self) -> None:
        """Start over in the child of a fork, which has a file of its own."""
        global _started
        _started = time.time_ns()
        self._lock = threading.Lock()
        self._timer = None
        self._due = self._due_soon = 0.0
