"""Forks: the locks that are held meanwhile, and the state that a forked child renews.

A child has the memory of its parent and none of its threads: locks may be held by threads that do
not exist there, and descriptors are shared with the parent.  Each part of memo with such state
registers here, and is renewed in the order of registration, after the locks; nothing else of memo
calls `os.register_at_fork`.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Protocol

from memo.runtime import events


class Renewable(Protocol):
    """An object with state that a forked child must not share with its parent."""

    def after_fork(self) -> None:
        """Renew the state, in the child."""
        ...


class LockOwner(Protocol):
    """An object with locks that are held during a fork, so that the child finds its data whole."""

    def fork_locks(self) -> Sequence[threading.RLock]:
        """Return the locks in the order in which they are taken."""
        ...

    def renew_locks(self, *, whole: bool) -> None:
        """Replace the locks, in the child.

        Args:
            whole: all of them were held; else another thread was changing the data.
        """
        ...


LOCK_SECONDS = 1.0
"""Longest wait for a lock before a fork, in seconds."""
_steps: list[Callable[[], None]] = []
_owners: weakref.WeakSet[LockOwner] = weakref.WeakSet()
_held: dict[LockOwner, list[threading.RLock]] = {}
"""The locks that are held for the fork in progress."""
_forking = threading.Lock()
"""Held during a fork, since threads may fork at the same time."""
_objects: weakref.WeakSet[Renewable] = weakref.WeakSet()


def in_child(renew: Callable[[], None]) -> None:
    """Call `renew()` in every child that is forked from now on."""
    _steps.append(renew)


def renew_in_child(one: Renewable) -> None:
    """Call `one.after_fork()` in every child, as long as `one` lives."""
    _objects.add(one)


def forget(one: Renewable) -> None:
    """Stop renewing `one` in children."""
    _objects.discard(one)


def hold_locks_of(owner: LockOwner) -> None:
    """Hold the locks of an object during forks, as long as it lives."""
    _owners.add(owner)


def _call(steps: Iterable[Callable[[], None]]) -> None:
    for step in steps:
        try:
            step()
        except Exception as error:  # the others must be renewed all the same
            events.emit(events.Event(events.ERROR, reason="fork", detail=repr(error)))


def _take_locks() -> None:
    _forking.acquire()
    _call([partial(_take_locks_of, owner) for owner in tuple(_owners)])


def _take_locks_of(owner: LockOwner) -> None:
    _held[owner] = [lock for lock in owner.fork_locks() if lock.acquire(timeout=LOCK_SECONDS)]


def _release_locks() -> None:
    for locks in _held.values():
        for lock in reversed(locks):
            lock.release()
    _held.clear()
    _forking.release()


def _renew() -> None:
    global _forking
    _forking = threading.Lock()
    _call([partial(_renew_locks_of, owner) for owner in tuple(_owners)])
    _held.clear()
    _call((*_steps, *(one.after_fork for one in tuple(_objects))))


def _renew_locks_of(owner: LockOwner) -> None:
    owner.renew_locks(whole=len(_held.get(owner, ())) == len(owner.fork_locks()))


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(before=_take_locks, after_in_parent=_release_locks, after_in_child=_renew)
