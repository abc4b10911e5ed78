"""Reads: what a computation used of other cached functions, across the threads that it starts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextvars import ContextVar
from typing import Any, NamedTuple

from memo.engine import replay
from memo.engine.coordination.flights import Flight, current_path, following
from memo.runtime.port import Port
from memo.stores.chain import Chain
from memo.validity import stamps
from memo.validity.stamps import Generation, Ref, Stamp, State


class Reads:
    """The stamps of every cached call that a computation made: they become stamps of its own.

    Attributes:
        sound: nothing is missing, and nothing changed under the computation.
        over: the computation has ended; what a thread of it still reads is no part of it.
        background: no caller waits for the computation, so its hits save nobody time.
        pauses: (begin, end) of the time spent in other cached calls, by `time.perf_counter`.
    """

    __slots__ = ("_others", "_states", "background", "over", "pauses", "sound")

    def __init__(self, *, background: bool = False) -> None:
        self.background = background
        self.pauses: list[tuple[float, float]] = []
        self._states: dict[Ref, State] = {}
        self._others: dict[Stamp, None] = {}
        self.sound = True
        self.over = False

    def add(self, new: Iterable[Stamp]) -> None:
        for stamp in new:
            if type(stamp) is Generation:
                if self._states.setdefault(stamp.ref, stamp.state).text != stamp.state.text:
                    self.sound = False
            else:
                self._others.setdefault(stamp)

    def all(self) -> tuple[Stamp, ...]:
        states = self._states.copy()  # in one step: threads may still add
        return (*map(Generation, states.keys(), states.values()), *self._others.copy())

    def own_time(self, begun: float, ended: float) -> float:
        """Seconds between two moments that were not spent in other cached calls."""
        left, until = ended - begun, begun
        for begin, end in sorted(self.pauses):
            left -= max(0.0, min(end, ended) - max(begin, until))
            until = max(until, end)
        return max(0.0, left)

    def merged(self, own: Iterable[Stamp]) -> tuple[tuple[Stamp, ...], bool]:
        """A computation's own stamps with those of what it used; whether nothing is missing."""
        whole = Reads()
        whole.add(own)
        whole.add(self.all())
        return whole.all(), self.sound and whole.sound


async def bounded(port: Port, chain: Chain, known: tuple[Stamp, ...]) -> tuple[Stamp, ...]:
    """Stamps in which one on anything in a group stands for more than `stamps.READS` of it.

    It is read in one step with those that it stands for, and stands for them if they still hold.

    Raises:
        TierError: nobody can tell.
    """
    groups: dict[str, list[Generation]] = {}
    for stamp in known:
        if type(stamp) is Generation:
            groups.setdefault(stamp.ref.group, []).append(stamp)
    big = [name for name, members in groups.items() if len(members) > stamps.READS]
    if not big:
        return known
    wholes = [Ref(name, None) for name in big]
    members = [stamp for name in big for stamp in groups[name]]
    states = await chain.authorities.states(port, [*wholes, *(stamp.ref for stamp in members)])
    now = zip(members, states[len(big) :], strict=True)
    changed = [stamp for stamp, state in now if not stamps.holds(stamp.state.text, state.text)]
    kept = [s for s in known if type(s) is not Generation or s.ref.group not in big]
    return (*kept, *map(Generation, wholes, states), *changed[:1])


class Carried(NamedTuple):
    """What a thread must know of the computation that starts it."""

    reads: Reads
    path: tuple[Flight, ...]
    recorders: tuple[replay.Recorder, ...]


def carried() -> Carried | None:
    """What a thread that is started here must be told; None: no computation runs here."""
    reads = CURRENT.get()
    return None if reads is None or reads.over else Carried(reads, current_path(), replay.current())


def carry(given: Carried, work: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Call `work`, in another thread, as part of the computation that started it."""
    token = CURRENT.set(given.reads)
    try:
        with following(given.path), replay.heard_by(given.recorders):
            return work(*args, **kwargs)
    finally:
        CURRENT.reset(token)


def nothing() -> None:
    """What is done before a computation where no driver wants anything."""


prepare: Callable[[], None] = nothing
"""Called before every computation; the drivers put `carry_context` here."""
CURRENT: ContextVar[Reads | None] = ContextVar("memo_reads", default=None)


def tell(used: Iterable[Stamp] | None) -> None:
    """Tell the computation around this call, if any, what it has just used."""
    reads = CURRENT.get()
    if reads is not None and not reads.over:
        if used is None:
            reads.sound = False
        else:
            reads.add(used)
