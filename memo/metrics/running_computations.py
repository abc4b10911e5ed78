"""Running computations, in this process and in every other that shares the directory.

Each process that computes has one small file, mapped into memory: a computation writes a slot of it
when it begins and clears the slot when it ends, without a system call.  A slot that cannot be read
is left out, and so is the file of a process that died.
"""

from __future__ import annotations

import atexit
import functools
import json
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

from memo.coordination.flights import current_path
from memo.errors import MemoError, label
from memo.metrics.recorder import COUNTERS, cancel_publish_soon, publish_soon
from memo.runtime import events, fork, private_files
from memo.runtime.events import Event
from memo.runtime.memory_budget import remember
from memo.runtime.named_tuple import NamedTuple
from memo.settings import configuration
from memo.validity.stamps import Turn

if TYPE_CHECKING:
    from pathlib import Path

MAX_SLOTS = 128
"""Maximum number of computations of one process that others see."""
SLOT_BYTES = 512
"""Bytes of one slot."""
MAX_DURATIONS = 1000
"""Maximum number of calls whose last duration is remembered."""
SLOTS_FILE_SUFFIX = ".now"
LONG_COMPUTATION_SECONDS = 0.5
"""Seconds from which a computation counts as long."""


class Running(NamedTuple):
    """A running computation.

    Attributes:
        function: id of the function.
        call: the call as its address shows it, without secrets.
        since: when it began, in seconds since the epoch.
        expected: seconds that the call, or else its function, took last time; None: unknown.
        background: it refreshes a stale result.
        process: id of the process.
        here: it is this process.
        key: key of the call.
        arguments: the names and digests of its arguments; None: unknown.
    """

    function: str
    call: str
    since: float
    expected: float | None
    background: bool
    process: int
    here: bool
    key: str = ""
    arguments: tuple[tuple[str, str], ...] | None = None

    @property
    def label(self) -> str:
        """The readable name of the function."""
        return label(self.function)


class RunningComputations:
    """This process's computations, and the file in which others see them.

    Args:
        directory: returns the directory whose processes see each other's computations.
    """

    def __init__(self, directory: Callable[[], Path]) -> None:
        self._directory = directory
        self.start_over()

    def start_over(self) -> None:
        """Forget all computations: at creation, and in the child of a fork."""
        self._lock = threading.Lock()
        self._slots: dict[str, list[tuple[int, Running]]] = {}  # by key; refreshes run side by side
        self._free = list(range(MAX_SLOTS - 1, -1, -1))
        self._durations: dict[str, float] = {}
        self._map: mmap.mmap | None = None
        self._path: Path | None = None
        self._mapped_directory: Path | None = None

    def handle(self, event: Event) -> None:
        """Handle an event."""
        if event.kind == events.COMPUTE_STARTED:
            self._begin(event)
        elif event.kind == events.COMPUTE_ENDED:
            self._end(event)

    def _begin(self, event: Event) -> None:
        path = current_path()
        flight = path[-1] if path else None
        call = None if flight is None else flight.call
        expected = self._durations.get(
            event.key, None if flight is None else flight.expected_duration
        )
        if expected is None or expected >= LONG_COMPUTATION_SECONDS:
            publish_soon()  # publish the counts now, as the next event may be far off
        run = Running(
            event.function,
            event.function if call is None else call.shown,
            time.time(),
            expected,
            bool(event.reason),
            os.getpid(),
            True,
            event.key,
            None if call is None else call.arguments,
        )
        with self._lock:
            slot = self._free.pop() if self._free else -1
            self._slots.setdefault(event.key, []).append((slot, run))
            if slot >= 0:
                self._write(slot, run)

    def _end(self, event: Event) -> None:
        with self._lock:
            runs = self._slots.get(event.key)
            slot, run = runs.pop(0) if runs else (-1, None)
            if not runs:
                self._slots.pop(event.key, None)
            if run is not None and not event.detail:  # it ended normally
                remember(self._durations, event.key, time.time() - run.since, MAX_DURATIONS)
            if slot >= 0:
                self._free.append(slot)
                if self._map is not None:
                    self._map[slot * SLOT_BYTES] = 0
            idle = not self._slots
        if idle:
            cancel_publish_soon()

    def _write(self, slot: int, run: Running) -> None:
        file = self._open_map()
        if file is None:
            return
        for arguments in (run.arguments, None):  # many arguments do not fit into a slot
            data = json.dumps((*run[:5], run.key, arguments)).encode("utf-8", "replace") + b"\0"
            if len(data) <= SLOT_BYTES:
                file[slot * SLOT_BYTES : slot * SLOT_BYTES + len(data)] = data
                return

    def _open_map(self) -> mmap.mmap | None:
        with suppress(OSError, MemoError):  # if it fails, other processes do not see it
            directory = self._directory()
            if directory is not self._mapped_directory and directory != self._mapped_directory:
                self._unmap()
                self._map_file(directory)
        return self._map

    def _map_file(self, directory: Path) -> None:
        from memo.metrics.shared_counters import process_name

        self._mapped_directory = directory
        self._path = directory / "stats" / f"{process_name()}{SLOTS_FILE_SUFFIX}"
        with private_files.open_folder(self._path.parent, make=True) as folder:
            descriptor = private_files.open_or_create(self._path.name, folder)
        try:
            # zeros are written, since a hole in a mapped file would crash on a full disk
            os.pwrite(descriptor, bytes(MAX_SLOTS * SLOT_BYTES), 0)
            self._map = mmap.mmap(descriptor, MAX_SLOTS * SLOT_BYTES)
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Remove the file; the next computation creates it again."""
        with self._lock:
            self._unmap()

    def _unmap(self) -> None:
        if self._map is not None:
            self._map.close()
        if self._path is not None:
            # an error means that the file is missing, or the directory has become read-only
            with suppress(OSError), private_files.open_folder(self._path.parent) as folder:
                os.unlink(self._path.name, dir_fd=folder)
        self._map = self._path = self._mapped_directory = None

    def here(self) -> list[Running]:
        """Return the computations of this process, the longest-running first."""
        with self._lock:
            runs = (run for several in self._slots.values() for _, run in several)
            return sorted(runs, key=lambda run: run.since)

    def everywhere(self) -> list[Running]:
        """Return the computations of all processes that share the directory, longest first."""
        others = _read(self._directory() / "stats")
        return sorted([*self.here(), *others], key=lambda run: run.since)


def _files(folder: Path) -> list[tuple[str, bytes]]:
    """Return names and contents of other processes' files; remove those of processes that ended."""
    from memo.metrics.shared_counters import is_alive, process_name

    found: list[tuple[str, bytes]] = []
    with suppress(OSError), private_files.open_folder(folder) as descriptor:
        for name in os.listdir(descriptor):
            process = name.removesuffix(SLOTS_FILE_SUFFIX)
            if process in (name, process_name()) or not process.partition("-")[0].isdigit():
                continue
            with suppress(OSError):
                if not is_alive(process):
                    os.unlink(name, dir_fd=descriptor)
                    continue
                with open(private_files.open_old(name, folder=descriptor), "rb") as file:
                    found.append((name, file.read(MAX_SLOTS * SLOT_BYTES)))
    return found


def _read(folder: Path) -> Iterator[Running]:
    """Yield running computations, from the files of other processes."""
    for name, data in _files(folder):
        process = name.partition("-")[0]
        for start in range(0, len(data), SLOT_BYTES):
            text = data[start : start + SLOT_BYTES].partition(b"\0")[0]
            with suppress(ValueError, TypeError):
                if text:
                    function, call, since, expected, background, key, pairs = json.loads(text)
                    expected = None if expected is None else float(expected)
                    facts = (str(function), str(call), float(since), expected, bool(background))
                    names = None if pairs is None else tuple((str(n), str(d)) for n, d in pairs)
                    yield Running(*facts, int(process), False, str(key), names)


COMPUTATIONS = RunningComputations(configuration.home)
"""The running computations of this process, and access to those of others."""


def turn_of_running(key: str) -> Turn | None:
    """Return the turn that invalidates a call which a process of this host is computing."""
    for run in COMPUTATIONS.everywhere():
        if run.key == key:
            return Turn(f"f:{run.function}", run.arguments or (), whole=run.arguments is not None)
    return None


@functools.cache
def listen() -> None:
    """Start to track running computations; `import memo` does this, a second call nothing."""
    COUNTERS.listen(COMPUTATIONS.handle, (events.COMPUTE_STARTED, events.COMPUTE_ENDED))
    atexit.register(COMPUTATIONS.close)
    fork.in_child(_after_fork)


def _after_fork() -> None:
    COMPUTATIONS.start_over()
    COUNTERS.listen(COMPUTATIONS.handle, (events.COMPUTE_STARTED, events.COMPUTE_ENDED))
