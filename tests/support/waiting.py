"""Waiting for a condition: tests that need other threads, tasks or processes poll only here."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic, sleep  # those of the machine, also where a test moves the clock
from typing import Any

STUCK = 20.0
"""Seconds after which a condition is taken never to come true, on a busy machine too."""
_PAUSE = 0.005


def wait_for(condition: Callable[[], Any], seconds: float = STUCK) -> bool:
    """Wait for a condition; True if it came true in time."""
    end = monotonic() + seconds
    while not condition():
        if monotonic() > end:
            return False
        sleep(_PAUSE)
    return True


class Turns:
    """The turns that the event loop has given to another task.

    Attributes:
        count: their number.
    """

    count = 0


@contextmanager
def counted_turns() -> Iterator[Turns]:
    """Count the turns that the running event loop gives to another task during the block."""
    turns = Turns()

    async def count() -> None:
        while True:
            await asyncio.sleep(0)
            turns.count += 1

    counting = asyncio.get_running_loop().create_task(count())
    try:
        yield turns
    finally:
        counting.cancel()


async def await_until(condition: Callable[[], Any], seconds: float = STUCK) -> None:
    """As `until`, on a running event loop."""
    end = monotonic() + seconds
    while not condition():
        assert monotonic() < end, f"not within {seconds:g} s"
        await asyncio.sleep(_PAUSE / 5)


def until(condition: Callable[[], Any], seconds: float = STUCK) -> None:
    """Wait for a condition; the test fails if it does not come true."""
    assert wait_for(condition, seconds), f"not within {seconds:g} s"
