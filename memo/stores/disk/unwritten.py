"""Changes of generations that hold in this process but are not in the host's file yet.

If the cache directory is missing, read-only or on a full disk, a process continues on its own.  It
applies these changes to everything that it reads, and writes them as soon as possible with the same
tokens, so that the entries it stored meanwhile stay valid.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterable, Mapping, Sequence

from memo.runtime.named_tuple import NamedTuple
from memo.stores.disk.host_database import (
    Group,
    change_fields,
    extend_life,
    fields_of,
)
from memo.validity import generations, stamps
from memo.validity.generations import MIN_GROUP_SECONDS, TOMBSTONE_SECONDS, Change
from memo.validity.stamps import ALL, Turn

MAX_UNWRITTEN = 4096
"""Maximum number of invalidations; beyond it they are merged into one of the whole namespace."""
MAX_NEW_GROUPS = 65_536
"""Maximum number of new groups; beyond it groups are forgotten, which costs only misses."""


class LateTurn(NamedTuple):
    """An invalidation that is not written yet."""

    turn: Turn
    note: str
    token: str


class Unwritten:
    """Invalidations that this process knows and the file does not.  Thread-safe.

    Attributes:
        empty: True if there is nothing to write.
    """

    def __init__(self) -> None:
        self.empty = True
        self._lock = threading.Lock()
        self._new_groups: dict[str, str] = {}
        self._late: dict[tuple[str, object], LateTurn] = {}
        self._patched: dict[str, tuple[Group, Group]] = {}

    def add_groups(self, groups: Iterable[str]) -> None:
        """Give groups a token that have none in the file."""
        with self._lock:
            if len(self._new_groups) > MAX_NEW_GROUPS:
                self._new_groups = {}
            for name in groups:
                self._new_groups.setdefault(name, stamps.token())
            self._note_change()

    def turn(self, turns: Sequence[Turn], note: str) -> None:
        """Add invalidations."""
        with self._lock:
            if len(self._late) + len(turns) > MAX_UNWRITTEN:
                self._late, turns = {}, [Turn("n")]
            for turn in turns:
                key = turn.group, turn.arguments
                # removed first, so that the dict keeps the order of invalidations
                self._late.pop(key, None)
                self._late[key] = LateTurn(turn, note, stamps.token_for(turn, note))
            self._note_change()

    def apply_to(self, name: str, group: Group) -> Group:
        """Return a group with the changes that are not written yet."""
        known = self._patched.get(name)
        if known is not None and known[0] is group:
            return known[1]
        with self._lock:
            fields = self._fields(name, group.fields)
            found = group if fields == group.fields else Group(fields)
            self._patched[name] = group, found
        return found

    def _fields(self, name: str, fields: Mapping[str, str]) -> Mapping[str, str]:
        if ALL not in fields and name in self._new_groups:
            fields = {**fields, ALL: self._new_groups[name]}
        for late in self._late.values():
            if late.turn.group == name:
                change = generations.change_for(fields, late.turn, late.note, late.token)
                fields = generations.apply(fields, change)
        return fields

    def write(self, connection: sqlite3.Connection, commit: int, now: int) -> tuple[object, ...]:
        """Write everything as part of a commit; return what was written, for `forget`.

        Args:
            now: in Unix seconds.
        """
        with self._lock:
            new_groups, late = dict(self._new_groups), dict(self._late)
        for name, token in new_groups.items():
            if ALL not in fields_of(connection, name):
                change_fields(connection, name, Change({ALL: token}), commit)
        for turn, note, token in late.values():
            fields = fields_of(connection, turn.group)
            change = generations.change_for(fields, turn, note, token)
            change_fields(connection, turn.group, change, commit)
        extend_life(connection, new_groups, now + MIN_GROUP_SECONDS)
        extend_life(
            connection, {turn.group for turn, _, _ in late.values()}, now + TOMBSTONE_SECONDS
        )
        return new_groups, late

    def forget(self, written: tuple[object, ...]) -> None:
        """Forget what was written to the file."""
        new_groups, late = written
        assert isinstance(new_groups, dict)
        assert isinstance(late, dict)
        with self._lock:
            self._new_groups = {n: t for n, t in self._new_groups.items() if new_groups.get(n) != t}
            self._late = {k: one for k, one in self._late.items() if late.get(k) != one}
            self._note_change()

    def _note_change(self) -> None:
        self._patched = {}
        self.empty = not (self._new_groups or self._late)
