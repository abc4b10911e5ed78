"""The one place where tests look inside a cached function, and at computations under way."""

from typing import Any

from waiting import await_until

from memo.coordination.flights import FLIGHTS
from memo.engine.call import Function


def inside(function: Any) -> Function:
    """The engine's record of a cached function."""
    made: Function = function._function
    return made


def joiners() -> int:
    """The number of callers of this process that have joined a running computation."""
    return sum(flight.join_count for flight in FLIGHTS.joinable_flights())


async def joined(count: int) -> None:
    """Wait until so many callers have joined computations that are under way."""
    await await_until(lambda: joiners() == count)
