"""Forks: the state that a forked child renews, in the order of registration.

A child has the memory of its parent and none of its threads: locks may be held by threads that do
not exist there, and descriptors are shared with the parent.  Each part of memo with such state
registers here; nothing else of memo calls `os.register_at_fork`.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable
from typing import Protocol

from memo.runtime import events


class Renewable(Protocol):
    """An object with state that a forked child must not share with its parent."""

    def after_fork(self) -> None:
        """Renew the state, in the child."""
        ...


_steps: list[Callable[[], None]] = []
_before: list[Callable[[], None]] = []
_in_parent: list[Callable[[], None]] = []
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


def around(
    before: Callable[[], None], in_parent: Callable[[], None], renew: Callable[[], None]
) -> None:
    """Call `before()` before a fork; then `in_parent()` in the parent, `renew()` in the child."""
    _before.insert(0, before)  # the last registered lock is taken first, as `os` does
    _in_parent.append(in_parent)
    _steps.append(renew)


def _call(steps: Iterable[Callable[[], None]]) -> None:
    for step in steps:
        try:
            step()
        except Exception as error:  # the others must be renewed all the same
            events.emit(events.Event(events.ERROR, reason="fork", detail=repr(error)))


def _renew() -> None:
    _call((*_steps, *(one.after_fork for one in tuple(_objects))))


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(
        before=lambda: _call(_before),
        after_in_parent=lambda: _call(_in_parent),
        after_in_child=_renew,
    )
