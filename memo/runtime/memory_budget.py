"""The memory budget of this process, shared by all memory tiers.

Rules of this module:

1.  The memory tier of every chain is a *holder*.  Together they hold at most the largest limit of
    any of them.
2.  Bookkeeping that grows with the number of keys (*tables*) is part of the budget, and so is a
    constant amount (`FIXED_BYTES`).
3.  When the budget is exceeded, the least recently used entry of all holders is evicted.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import suppress
from typing import Protocol, TypeVar

STORES_BETWEEN_MEASUREMENTS = 256
"""Number of stored entries between two measurements of the tables."""
FIXED_BYTES = 2 << 20
"""Bytes that do not grow with the number of keys, such as the page caches of SQLite; at most a
fifth of a small limit."""


class Holder(Protocol):
    """A holder of entries in memory.

    Attributes:
        limit: bytes that it may hold.
    """

    limit: int

    def held_bytes(self) -> int:
        """Return the bytes that it holds."""
        ...

    def oldest_use(self) -> int | None:
        """Return the count of the last use of its least recently used entry; None: it is empty."""
        ...

    def evict(self) -> None:
        """Evict its least recently used entry."""
        ...


class Table(Protocol):
    """Bookkeeping that grows with the number of keys."""

    def __sizeof__(self) -> int:
        """Return its bytes, with everything that only it refers to."""
        ...


T = TypeVar("T")
K = TypeVar("K")
V = TypeVar("V")


def remember(table: dict[K, V], key: K, value: V, max_size: int) -> None:
    """Add a pair to a table as its newest; beyond `max_size` pairs the oldest ones are removed."""
    table.pop(key, None)
    table[key] = value
    while len(table) > max_size:
        with suppress(KeyError, StopIteration, RuntimeError):  # other threads do the same
            del table[next(iter(table))]


class Budget:
    """The memory of all holders and tables of a process."""

    def __init__(self) -> None:
        self._holders: list[weakref.ref[Holder]] = []
        self._tables: list[weakref.ref[Table]] = []
        self._bookkeeping = 0
        self._measure_in = 0

    def add_holder(self, holder: Holder) -> None:
        """Add a holder to the budget, as long as it lives."""
        self._holders.append(weakref.ref(holder, self._forget))

    def add_table(self, table: Table) -> None:
        """Add a table to the budget, as long as it lives."""
        self._tables.append(weakref.ref(table, self._forget))

    def _forget(self, gone: weakref.ref[Holder] | weakref.ref[Table]) -> None:
        for known in (self._holders, self._tables):
            if gone in known:
                known.remove(gone)  # type: ignore[arg-type]

    def enforce(self) -> None:
        """Evict until everything fits; called after a store, with no lock held."""
        self._measure_in -= 1
        if self._measure_in < 0:
            self._measure_in = STORES_BETWEEN_MEASUREMENTS
            self._bookkeeping = sum(table.__sizeof__() for table in _alive(self._tables))
        while self._is_exceeded():
            ages = [
                (age, one) for one in _alive(self._holders) if (age := one.oldest_use()) is not None
            ]
            if not ages:
                return
            min(ages, key=lambda pair: pair[0])[1].evict()

    def _is_exceeded(self) -> bool:
        limit, held = 0, self._bookkeeping
        for holder in _alive(self._holders):
            limit = max(limit, holder.limit)
            held += holder.held_bytes()
        return held + min(FIXED_BYTES, limit // 5) > limit


def _alive(refs: list[weakref.ref[T]]) -> Iterator[T]:
    # The list itself, no copy: before Python 3.12 the garbage collector may run while a list is
    # copied; `_forget` would then take away what is being read, which ends the process.
    for ref in refs:
        if (one := ref()) is not None:
            yield one


BUDGET = Budget()
