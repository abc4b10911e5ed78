"""One budget for all memory tiers of a process."""

from __future__ import annotations

from memo.runtime.memory_budget import FIXED_BYTES, Budget, remember


class Shelf:
    """A holder of entries of 1 MiB; each has the count of its last use."""

    def __init__(self, limit: int, *uses: int) -> None:
        self.limit = limit
        self.uses = sorted(uses)

    def held_bytes(self) -> int:
        return len(self.uses) << 20

    def oldest_use(self) -> int | None:
        return self.uses[0] if self.uses else None

    def evict(self) -> None:
        del self.uses[0]


class Ledger:
    """Bookkeeping of so many bytes."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __sizeof__(self) -> int:
        return self.size


LIMIT = (8 << 20) + FIXED_BYTES
"""Leaves room for eight entries."""


def test_the_least_recently_used_entry_of_all_holders_goes_first() -> None:
    """Together the holders keep within the largest limit of any of them."""
    budget, one, other = Budget(), Shelf(LIMIT, 1, 4, 5, 8, 9), Shelf(1 << 20, 2, 3, 6, 7, 10)
    budget.add_holder(one)
    budget.add_holder(other)
    budget.enforce()
    assert one.uses + other.uses == [4, 5, 8, 9, 3, 6, 7, 10]


def test_bookkeeping_is_part_of_the_budget() -> None:
    """Entries share the limit with the tables."""
    budget, shelf, ledger = Budget(), Shelf(LIMIT, *range(8)), Ledger(3 << 20)
    budget.add_holder(shelf)
    budget.add_table(ledger)
    budget.enforce()
    assert shelf.uses == [3, 4, 5, 6, 7]


def test_a_budget_that_bookkeeping_exceeds_alone_ends() -> None:
    """When nothing is left to evict, the store goes on."""
    budget, shelf, ledger = Budget(), Shelf(LIMIT, 1, 2), Ledger(2 * LIMIT)
    budget.add_holder(shelf)
    budget.add_table(ledger)
    budget.enforce()
    assert shelf.uses == []


def test_a_holder_that_is_gone_no_longer_counts() -> None:
    """Neither its entries nor its limit."""
    budget, shelf, large = Budget(), Shelf(LIMIT, *range(8)), Shelf(2 * LIMIT, *range(100, 108))
    budget.add_holder(shelf)
    budget.add_holder(large)
    budget.enforce()
    assert len(shelf.uses + large.uses) == 16
    del large
    budget.enforce()
    assert len(shelf.uses) == 8
    shelf.uses.append(200)
    budget.enforce()
    assert shelf.uses == [1, 2, 3, 4, 5, 6, 7, 200]


def test_a_bounded_table_drops_its_oldest_pairs() -> None:
    """A pair that is written again becomes the newest one."""
    table: dict[str, int] = {}
    for name in "abcad":
        remember(table, name, ord(name), 3)
    assert list(table) == ["c", "a", "d"]
