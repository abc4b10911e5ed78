"""A sheet in place of a screen: tests read there the lines that progress shows."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from waiting import until

import memo

if TYPE_CHECKING:
    from memo.jupyter.progress_view import Line


class Sheet:
    """A screen that keeps all that was shown on it, and what was left at the end of a stretch."""

    def __init__(self) -> None:
        self.looked_at = True
        self.asked = 0
        self.shown: list[list[Line]] = []
        self.closed: list[list[Line]] = []

    def open(self) -> bool:
        self.asked += 1
        return self.looked_at

    def show(self, lines: list[Line]) -> None:
        self.shown.append(lines)

    def close(self, lines: list[Line]) -> None:
        self.closed.append(lines)

    @property
    def lines(self) -> list[str]:
        """The lines that stayed, as text."""
        return [str(line) for lines in self.closed for line in lines]

    def has(self, name: str) -> bool:
        """True if a computation is on it by now: short ones never are."""
        return bool(self.shown) and any(name in str(line) for line in self.shown[-1])

    async def shows(self, name: str) -> None:
        """Wait until a computation is on it."""
        await asyncio.to_thread(until, lambda: self.has(name))


@pytest.fixture
def sheet() -> Iterator[Sheet]:
    """Progress is on, and goes to a sheet."""
    from memo.jupyter.progress_view import WATCHER

    made = Sheet()
    WATCHER.show_on(made)
    memo.progress()
    yield made
    memo.progress(on=False)
    WATCHER.show_on(None)
