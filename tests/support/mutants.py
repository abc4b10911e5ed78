"""memo with one guard taken out, on purpose: the history checker must notice each of them.

Applied inside a worker process (`history.Plan.mutant`), or for a while by `applied`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from memo.coordination.flights import FLIGHTS, Flights
from memo.engine import answering, computing, refreshing
from memo.engine.sequences import elements, streams
from memo.stores import authorities
from memo.stores.authorities import Authorities
from memo.stores.chain import Chain
from memo.stores.disk.host_state import HostGenerations
from memo.validity.check import LatestAnswers


def comparison() -> None:
    """Mutant: stamps are not compared."""

    async def why_invalid(self: Authorities, *_: Any) -> str:
        return ""

    Authorities.why_invalid = why_invalid  # type: ignore[method-assign]
    comparison_in_memory()


def comparison_in_memory() -> None:
    """The short way over the memory tier does not compare stamps."""

    def at_hand(self: Chain, port: Any, function: str, key: str, since: int = 0) -> Any:
        entry = None if self.front is None else self.front.peek(self.name(function, key))
        return None if self._authority is not None else entry

    Chain.at_hand = at_hand  # type: ignore[method-assign]


def comparison_by_the_host() -> None:
    """The short way does not ask the host whether generations read as they did."""

    def current_texts(self: HostGenerations, packed_generations: Any) -> list[str]:
        return [text for _, _, _, text, _ in packed_generations]

    HostGenerations.current_texts = current_texts  # type: ignore[method-assign]


def stamps_afterwards() -> None:
    """Stamps are taken when the computation is over, not before it begins."""
    seal: Any = computing.seal_result

    async def late(port: Any, job: Any, made: Any) -> Any:
        [used] = await computing.take_stamps(port, [job])
        return await seal(port, job, made._replace(stamps=used))

    computing.seal_result = late


def replay() -> None:
    """Mutant: invalidations that Redis missed are never sent to it."""

    async def nothing(port: Any, journal: Any, where: str) -> Any:
        return ()

    authorities._due_rows = nothing


def detaching() -> None:
    """Mutant: every caller joins a flight that was invalidated."""
    Flights.detach = lambda self, turns: 0  # type: ignore[method-assign]


def landing() -> None:
    """Joiners take what landed, true or not."""

    async def close(port: Any, job: Any, flight: Any, result: Any) -> Any:
        FLIGHTS.close(flight)
        return result

    for module in (answering, refreshing, elements):
        module.close_flight = close  # type: ignore[attr-defined]


def flights() -> None:
    """Neither are flights detached, nor is what landed looked at."""
    detaching()
    landing()


def joining() -> None:
    """A consumer reads from a run of a generator that was invalidated."""

    async def is_overtaken(self: streams.StreamRun, port: Any) -> bool:
        return False

    detaching()
    streams.StreamRun.is_overtaken = is_overtaken  # type: ignore[method-assign]


def digests() -> None:
    """Results of `cutoff` functions that are asked again count as equal, whatever they are."""

    async def asked(port: Any, result: Any) -> Any:
        reads = refreshing.UsedCalls(background=True)
        token = refreshing.USED_CALLS.set(reads)
        try:
            await refreshing.call_again(port, result)
        finally:
            refreshing.USED_CALLS.reset(token)
        return next(iter(reads.used_results()), None)

    refreshing.ask_again = asked


def answer_order() -> None:
    """Mutant: the age of the answers already given is forgotten."""
    LatestAnswers.record = lambda self, key, started: None  # type: ignore[method-assign]


TOUCHED = (
    *((Authorities, "why_invalid"), (Chain, "at_hand"), (LatestAnswers, "record")),
    *((Flights, "detach"), (authorities, "_due_rows")),
)
"""The functions that mutants replace in a test's own process."""


@contextmanager
def applied(mutant: Callable[[], None]) -> Iterator[None]:
    """A mutant in this process, until the block ends."""
    kept = [(owner, name, vars(owner)[name]) for owner, name in TOUCHED]
    try:
        mutant()
        yield
    finally:
        for owner, name, function in kept:
            setattr(owner, name, function)


APPLY: dict[str, Callable[[], None]] = {
    function.__name__: function
    for function in (
        comparison,
        comparison_in_memory,
        comparison_by_the_host,
        stamps_afterwards,
        replay,
        detaching,
        landing,
        joining,
        flights,
        answer_order,
        digests,
    )
}
