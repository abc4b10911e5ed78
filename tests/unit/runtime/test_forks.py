"""A forked child renews what it must not share, and finds the data of its parent whole."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence

from memo.runtime import events, fork


def in_child(report: Callable[[], str]) -> str:
    """Fork, and return what `report()` returns in the child."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(writing, report().encode())
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as answer:
        text = answer.read().decode()
    os.waitpid(child, 0)
    return text


class Part:
    """A part of memo with state of its own."""

    def __init__(self, name: str, seen: list[str]) -> None:
        self.name = name
        self.seen = seen

    def after_fork(self) -> None:
        self.seen.append(self.name)
        if self.name == "broken":
            raise OSError("no")


def test_parts_are_renewed_in_the_child_only_and_as_long_as_they_live() -> None:
    """One that raises is an event, and does not keep the others from being renewed."""
    seen: list[str] = []
    parts = {name: Part(name, seen) for name in ("broken", "kept", "forgotten", "gone")}
    for part in parts.values():
        fork.renew_in_child(part)
    fork.forget(parts["forgotten"])
    del parts["gone"], part
    remove = events.on_event(lambda event: seen.append(f"{event.reason}: {event.detail}"))
    told = in_child(lambda: " ".join(sorted(seen)))
    remove()
    assert told == "broken fork: OSError('no') kept"
    assert seen == []
    fork.forget(parts["broken"])


class Table:
    """Two lists that always have the same length, changed under a lock."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.left: list[int] = []
        self.right: list[int] = []
        self.whole: bool | None = None

    def fork_locks(self) -> Sequence[threading.RLock]:
        return [self.lock]

    def renew_locks(self, *, whole: bool) -> None:
        self.lock, self.whole = threading.RLock(), whole


def test_a_fork_waits_for_a_change_under_way() -> None:
    """The locks are held during the fork, free afterwards, and new in the child."""
    table = Table()
    fork.hold_locks_of(table)
    changing, forks = threading.Event(), threading.Event()

    def change() -> None:
        with table.lock:
            table.left.append(1)
            changing.set()
            forks.wait(0.05)  # nothing sets it: the fork has time to go wrong
            table.right.append(1)

    def report() -> str:
        free = table.lock.acquire(blocking=False)
        return f"{len(table.left)} {len(table.right)} {table.whole} {free}"

    thread = threading.Thread(target=change)
    thread.start()
    assert changing.wait(20)
    assert in_child(report) == "1 1 True True"
    thread.join()
    assert table.lock.acquire(blocking=False)
    table.lock.release()
    assert table.whole is None
