"""The one place where tests look inside a cached function, a chain, and computations under way."""

from typing import Any

from waiting import await_until

from memo.coordination.flights import FLIGHTS
from memo.decorators.assembly import default_chain
from memo.engine.call import Function
from memo.runtime.clock import Clock


def inside(function: Any) -> Function:
    """The engine's record of a cached function."""
    made: Function = function._function
    return made


def set_clock(clock: Clock) -> None:
    """Let a clock tell the time of the default chain; `isolated` does that for a new one."""
    default_chain().clock = clock


def joiners() -> int:
    """The number of callers of this process that have joined a running computation."""
    return sum(flight.join_count for flight in FLIGHTS.joinable_flights())


async def joined(count: int) -> None:
    """Wait until so many callers have joined computations that are under way."""
    await await_until(lambda: joiners() == count)
