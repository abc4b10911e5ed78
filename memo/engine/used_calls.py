"""Record the cached calls that a computation uses, in its own thread and in those it starts."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from contextvars import ContextVar
from functools import partial, wraps
from typing import Any

from memo.coordination.flights import Flight, FlightResult, current_path, on_path
from memo.engine import replay
from memo.engine.call import Function, Job
from memo.keys.call_keys import Call
from memo.keys.summaries import built_on
from memo.records.seal import RAISED, Entry
from memo.records.stamp_blocks import Block, Stamps, blocks_of, loose_of
from memo.records.stamp_types import Generation, Ref, Result, Stamp, State
from memo.runtime.blocking import LoopDepth, at_loop_depth, current_loop_depth
from memo.runtime.named_tuple import NamedTuple
from memo.runtime.port import Port, Steps
from memo.settings import configuration
from memo.stores.chain import Chain
from memo.validity import stamps
from memo.validity.check import is_unchanged, why_changed
from memo.validity.results import UsedResult, flatten, own_result, unflatten


class Expiry(NamedTuple):
    """The time at which a used result expires.

    Attributes:
        until: nanoseconds since the epoch.
        stale: it had already expired when it was used.
        call: the call whose result it is.
        entry: the entry of that call.
    """

    until: int
    stale: bool
    call: Call
    entry: Entry

    def describe(self) -> str:
        """Name the call and, if its lifetime comes from another call, that one too."""
        beyond = built_on(self.entry.header.summary)
        return self.call.shown if beyond is None else f"{self.call.shown}, that on {beyond[0]}"


class UsedCalls:
    """The stamps of all cached calls that a computation has used; they become its own stamps.

    Attributes:
        sound: no stamp is missing, and no stamp changed during the computation.
        over: the computation has ended; calls that its threads still make are not part of it.
        background: no caller waits for the computation, so its hits save no caller any time.
        pauses: (begin, end) of the time spent in other cached calls, by `time.perf_counter`.
        earliest_expiry: expiry of the used result that expires first (one that was stale already
            comes before all others), or None.
        chains: the chains whose entries answered -> a function of each.
        stream_seconds: additional seconds spent in streams, whose pauses are too many to list.
    """

    __slots__ = (
        "_blocks",
        "_others",
        "_results",
        "_states",
        "_wave",
        "_wave_end",
        "background",
        "chains",
        "earliest_expiry",
        "over",
        "pauses",
        "sound",
        "stream_seconds",
    )

    def __init__(self, *, background: bool = False) -> None:
        self.background = background
        self.pauses: list[tuple[float, float]] = []
        self.stream_seconds = 0.0
        self._states: dict[Ref, State] = {}
        self._blocks: tuple[Block, ...] = ()
        self._others: dict[Stamp, None] = {}
        self._results: dict[tuple[str, str], UsedResult] = {}
        self.earliest_expiry: Expiry | None = None
        self.chains: dict[Chain, str] = {}
        self._wave = 0
        self._wave_end = math.inf
        self.sound = True
        self.over = False

    def add(self, new: tuple[Stamp, ...], begun: float = math.inf) -> None:
        """Add the stamps of an entry that was used.

        Args:
            begun: when its call began, by `time.perf_counter`; infinity: just now.
        """
        if new and type(new[-1]) is Result:
            own = own_result(new)
            wave = self._wave_of(begun)
            if own is not None:
                self._add_result(UsedResult(own._replace(wave=wave), new[:-1]))
                return
            absolute, used_results = unflatten(new)
            for used_result in used_results:
                inner = used_result.result
                self._wave = max(self._wave, wave + inner.wave)
                self._add_result(
                    used_result._replace(result=inner._replace(wave=wave + inner.wave))
                )
            new = tuple(absolute)
        blocks = self._add_blocks(blocks_of(new))
        for stamp in loose_of(new):
            self._add(stamp, blocks)

    def _add_blocks(self, new: tuple[Block, ...]) -> tuple[Block, ...]:
        """Add blocks; return those to compare the other stamps of the same entry with."""
        known = self._blocks
        if not known:
            for block in new:
                for ref in self._states.keys() & block.states.keys():
                    self._compare(self._states[ref], block.states[ref])
            self._blocks = new
        elif new is not known:
            for block in new:
                for stamp in () if block in known else block.generations:
                    self._add(stamp, known)
        return known

    def _add(self, stamp: Stamp, blocks: tuple[Block, ...]) -> None:
        """Add a stamp, unless one of these blocks has it."""
        if type(stamp) is not Generation:
            self._others.setdefault(stamp)
            return
        ref, state = stamp
        for block in blocks:
            known = block.states.get(ref)
            if known is not None:
                self._compare(known, state)
                return
        self._compare(self._states.setdefault(ref, state), state)

    def _compare(self, known: State, other: State) -> None:
        """Compare two states of one ref that the computation has met."""
        self.sound = self.sound and is_unchanged(known.text, other.text)

    @property
    def size(self) -> int:
        """Number of stamps and results."""
        inside = sum(len(block.packed_generations) for block in self._blocks)
        return len(self._states) + inside + len(self._others) + len(self._results)

    def add_expiry(self, life: Expiry) -> None:
        """Add the expiry of a used result."""
        own = self.earliest_expiry
        if own is None or (not life.stale, life.until) < (not own.stale, own.until):
            self.earliest_expiry = life

    def _wave_of(self, begun: float) -> int:
        """Return the number of the wave of a call: those that began before any of them ended."""
        if begun >= self._wave_end:
            self._wave += 1
            self._wave_end = math.inf
        self._wave_end = min(self._wave_end, time.perf_counter())
        return self._wave

    def _add_result(self, used_result: UsedResult) -> None:
        result = used_result.result
        known = self._results.setdefault((result.function, result.key), used_result)
        if known.result.digest != result.digest:
            self.sound = False
        self._results[result.function, result.key] = used_result

    def absolute_stamps(self) -> tuple[Stamp, ...]:
        """Return the stamps that do not belong to results of `cutoff` functions."""
        states = self._states.copy()  # copied in one step, since threads may still add some
        loose = (*map(Generation, states.keys(), states.values()), *self._others.copy())
        return Stamps.of(loose, self._blocks) if self._blocks else loose

    def used_results(self) -> list[UsedResult]:
        """Return the results of `cutoff` functions, in the order of their first use.

        Empty if there are more than `MAX_USED_RESULTS`; their stamps are absolute then.
        """
        found = list(self._results.copy().values())
        return found if len(found) <= MAX_USED_RESULTS else []

    def _stamps_of_results(self) -> Iterable[Stamp]:
        found = list(self._results.copy().values())
        few = len(found) <= MAX_USED_RESULTS
        return () if few else (s for r in found for s in r.stamps if type(s) is not Result)

    def all_stamps(self) -> tuple[Stamp, ...]:
        """Return all stamps and results, in the form an entry stores."""
        return flatten(self.absolute_stamps(), self.used_results())

    def own_time(self, begun: float, ended: float) -> float:
        """Return the seconds between two moments that were not spent in other cached calls."""
        left, until = ended - begun - self.stream_seconds, begun
        for begin, end in sorted(self.pauses):
            left -= max(0.0, min(end, ended) - max(begin, until))
            until = max(until, end)
        return max(0.0, left)

    def merge_with(self, own: Iterable[Stamp]) -> tuple[UsedCalls, bool]:
        """Merge a computation's own stamps with those it used; True if none is missing."""
        whole = UsedCalls()
        whole.add(tuple(own))
        whole.add(self.absolute_stamps())
        for stamp in self._stamps_of_results():
            whole._add(stamp, whole._blocks)
        for used_result in self.used_results():
            whole._add_result(used_result)
        return whole, self.sound and whole.sound


MAX_USED_RESULTS = 1024
"""Maximum number of results of `cutoff` functions that an entry lists; if there are more, their
stamps count."""


async def shorten_stamps(port: Port, chain: Chain, known: tuple[Stamp, ...]) -> tuple[Stamp, ...]:
    """Replace stamps on parts of a group by one on the whole group if they are too many.

    That is more than `stamps.MAX_REFS_PER_GROUP`.  The state of the whole group is read together
    with those of its parts.  If a part has changed, its stamp is kept, so that the entry is
    invalid.

    Raises:
        TierError: no tier can be reached.
    """
    in_one_group = len(loose_of(known)) + sum(block.most_in_one_group for block in blocks_of(known))
    if in_one_group <= stamps.MAX_REFS_PER_GROUP:
        return known
    steps = Steps(port)
    groups: dict[str, list[Generation]] = {}
    for stamp in known:
        await steps.pause_if_due()
        if type(stamp) is Generation:
            groups.setdefault(stamp.ref.group, []).append(stamp)
    big = [name for name, members in groups.items() if len(members) > stamps.MAX_REFS_PER_GROUP]
    if not big:
        return known
    wholes = [Ref(name, None) for name in big]
    members = [stamp for name in big for stamp in groups[name]]
    states = await chain.authorities.states(port, [*wholes, *(stamp.ref for stamp in members)])
    changed = []
    for stamp, state in zip(members, states[len(big) :], strict=True):
        await steps.pause_if_due()
        if why_changed([stamp.state.text], [state.text]):
            changed.append(stamp)
    kept = [s for s in known if type(s) is not Generation or s.ref.group not in big]
    return (*kept, *map(Generation, wholes, states), *changed[:1])


class ThreadContext(NamedTuple):
    """The part of a computation's context that its threads inherit."""

    used_calls: UsedCalls
    path: tuple[Flight, ...]
    recorders: tuple[replay.Recorder, ...]
    loop_depth: LoopDepth


def context_for_thread() -> ThreadContext | None:
    """Return the context for a thread started now; None if no computation runs here."""
    reads = USED_CALLS.get()
    return (
        None
        if reads is None or reads.over
        else ThreadContext(reads, current_path(), replay.current_recorders(), current_loop_depth())
    )


def run_in_context(
    given: ThreadContext, work: Callable[..., Any], /, *args: Any, **kwargs: Any
) -> Any:
    """Call `work` as part of the computation that has started this thread."""
    token = USED_CALLS.set(given.used_calls)
    try:
        with (
            on_path(given.path),
            replay.recorded_by(given.recorders),
            at_loop_depth(given.loop_depth),
        ):
            return work(*args, **kwargs)
    finally:
        USED_CALLS.reset(token)


USED_CALLS: ContextVar[UsedCalls | None] = ContextVar("memo_used_calls", default=None)
"""The record of the innermost computation that the running code is part of."""


def in_background() -> bool:
    """True if the running code is part of a computation for which no caller waits."""
    around = USED_CALLS.get()
    return around is not None and not around.over and around.background


def record_stamps(used: tuple[Stamp, ...] | None) -> None:
    """Record stamps that the current computation, if any, has just used; None: unknown ones."""
    reads = USED_CALLS.get()
    if reads is not None and not reads.over:
        if used is None:
            reads.sound = False
        else:
            reads.add(used)


def record_entry(
    function: Function,
    chain: Chain,
    call: Call,
    entry: Entry,
    begun: float = math.inf,
    *,
    stale: bool = False,
) -> None:
    """Record, in the current computation if any, the entry that has answered a call of it.

    Args:
        begun: when the call began, by `time.perf_counter`.
        stale: count the entry as expired, whatever its age.
    """
    reads = USED_CALLS.get()
    if reads is None or reads.over:
        return
    reads.add(entry.stamps, begun)
    reads.chains.setdefault(chain, function.id)
    if entry.flags & RAISED:
        return
    left = function.remaining(entry.times)
    if stale:
        left = min(0, left or 0)
    if left is not None:
        until = chain.clock.wall_ns() + left
        beyond = built_on(entry.header.summary) if left <= 0 else None
        reads.add_expiry(Expiry(until if beyond is None else beyond[1], left <= 0, call, entry))


def record_flight_result(job: Job, result: FlightResult, begun: float = math.inf) -> None:
    """Record, in the current computation if any, the result that has answered a call of it."""
    if result.entry is None or result.stamps is None:
        record_stamps(result.stamps)
    else:
        record_entry(job.function, job.chain, job.call, result.entry, begun)


# --- threads --------------------------------------------------------------------------------------

_wrapping = threading.RLock()
_originals: list[tuple[type, str, Any, Any]] = []
"""The methods that are wrapped: class, name, original, wrapper."""
_submitting: ContextVar[bool] = ContextVar("memo_submitting", default=False)


def follow_threads() -> None:
    """Make the threads that a computation starts part of it, unless `follow_threads` is off.

    A context variable records the cached calls that a computation uses, since their stamps become
    its own.  But `threading.Thread` starts with an empty context, and so does work submitted to a
    `ThreadPoolExecutor`, including `loop.run_in_executor`.  So `start` and `submit` are wrapped
    before the first computation; they behave as before unless a cached computation calls them.
    Only memo's own variables are carried over; Python's rules apply to those of the user.
    `stop_following_threads` restores the methods.

    Other kinds of pools do not say for which computation a thread works, and other processes
    have their own context: cached calls made there are not part of the computation.
    """
    wanted = configuration.current().follow_threads
    if wanted is bool(_originals):
        return
    if not wanted:
        stop_following_threads()
        return
    with _wrapping:
        if _originals:
            return
        _wrap(threading.Thread, "start", _start_in_context)
        with suppress(ImportError, RuntimeError):  # the interpreter is shutting down
            from concurrent.futures.thread import ThreadPoolExecutor

            _wrap(ThreadPoolExecutor, "submit", _submit_in_context)


def stop_following_threads() -> None:
    """Restore `Thread.start` and `ThreadPoolExecutor.submit`.

    If another library has wrapped our wrapper since, both stay, and ours only passes calls on.
    """
    with _wrapping:
        while _originals:
            owner, name, original, ours = _originals.pop()
            if getattr(owner, name) is ours:
                setattr(owner, name, original)


def _wrap(owner: type, name: str, made: Callable[[Any], Any]) -> None:
    original = getattr(owner, name)
    ours = made(original)
    setattr(owner, name, ours)
    _originals.append((owner, name, original, ours))


def _start_in_context(original: Callable[[threading.Thread], None]) -> Callable[..., None]:
    @wraps(original)
    def start(self: threading.Thread) -> None:
        given = context_for_thread() if _originals else None
        # a pool's thread outlives the work it was started for: each submit carries its context
        if given is not None and not _submitting.get() and not self.name.startswith("memo-"):
            body = self.run

            def run() -> None:
                del self.run
                run_in_context(given, body)

            self.run = run  # type: ignore[method-assign]
            try:
                original(self)
            except Exception:  # the system refused a thread: the caller may try again
                self.run = body  # type: ignore[method-assign]
                raise
        else:
            original(self)

    return start


def _submit_in_context(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def submit(self: Any, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        given = context_for_thread() if _originals else None
        if given is None:
            return original(self, fn, *args, **kwargs)
        token = _submitting.set(True)
        try:
            return original(self, partial(run_in_context, given, fn), *args, **kwargs)
        finally:
            _submitting.reset(token)

    return submit
