"""Streams: the results of generators, shared while they are produced and stored at their end.

Rules of this module:

1.  Nothing runs before the first item is asked for, and nothing runs ahead: if a consumer stops,
    only the items that it has seen were computed.
2.  Consumers on one event loop, or in threads of sync code, share one run.  The consumer that needs
    the next item advances the generator in its own thread or task; the others read the item from a
    spool.
3.  The first consumer of an item gets the item itself, every other one a copy of its own.
4.  The sequence is stored only when the generator has returned.  If it raises, loses its last
    consumer, or is invalidated, nothing is stored.
5.  If a shared run is lost (the consumer that advanced it was cancelled or interrupted, or items
    can no longer be spooled), the other consumers each go on with a run of their own, and skip the
    items that they have seen.
6.  A computation that consumes a stream depends on it from the first item on.
7.  A caller that may not join a run, since that was invalidated, leads the next one.  The lease
    passes from the old run to the new one, as the old run may be waiting for that very caller.
8.  The first item of a run counts as an answer: from then on this process returns no value whose
    computation began before that run.
"""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncIterable, Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from memo.engine import same_types, used_calls
from memo.engine.answering import (
    fall_back,
    look_up,
    lookup_with_lease,
    rekeyed,
    stored_by_another,
)
from memo.engine.call import Function, Job, Outcome, Raised, emit, error_text, read_live
from memo.engine.computing import (
    Computed,
    InputWatch,
    emit_run_ended,
    is_same_call,
    merged_stamps,
    store_result,
    take_stamps,
    warn_not_stored,
)
from memo.engine.coordination.flights import FLIGHTS, Flight, FlightResult, current_path, inside
from memo.engine.coordination.leases import Lease, acquire_lease, patience, wait_until_over
from memo.engine.used_calls import CURRENT, UsedCalls, record_flight_result, record_stamps
from memo.errors import DependencyError, EntryError, ReentryError, TierError, cut_to_user_frames
from memo.records import codec
from memo.records.spool import Cursor, Spool, Stream, load_item
from memo.records.stamp_types import Stamp
from memo.runtime import events, fork, reasons
from memo.runtime.port import Port, Waiter
from memo.stores.chain import Answer
from memo.validity.check import MISS, Verdict

END = object()
"""Returned in place of an item when there are no more."""
_LOST = object()
_WAIT = object()
_attaching = threading.Lock()
_leasing = threading.Lock()
_leased: dict[str, StreamRun] = {}
"""The runs of this process that have a lease, by name."""
fork.in_child(_leased.clear)


def spool_for(function: Function) -> Spool:
    """Return a spool whose file, if it needs one, is kept in the cache directory."""
    host = function.chain().host
    return Spool(None if host is None else Path(host.cache_directory.path), function.compress())


def limit(job: Job) -> int | None:
    """Return the size in bytes of the largest sequence that a tier accepts; None if unknown."""
    budgets = [tier.budget for tier in job.chain.tiers]
    known = [budget for budget in budgets if budget is not None]
    return max(known) if len(known) == len(budgets) else None


class StreamRun:
    """One run of a generator.

    Args:
        skip: number of items that its only consumer has seen already.
        keep: store the items when it has returned.

    Attributes:
        client: the loop that may advance an async generator; None for any thread.
        count: number of items produced so far.
        over: it produces no more items: it returned, raised `error`, or was lost.
        call_stamps: the stamps of its call; None if they are unknown.
        result: the outcome, once it has returned.
    """

    def __init__(
        self,
        port: Port,
        job: Job,
        flight: Flight,
        generate: Callable[..., Any],
        skip: int = 0,
        *,
        keep: bool = True,
    ) -> None:
        self.job = job
        self.flight = flight
        self._generate = generate
        self.loop = port.loop
        self.skip = skip
        self._keeps = keep
        self.spool = spool_for(job.function)
        self.count = 0
        self.over = self.lost = False
        self.error: BaseException | None = None
        self.call_stamps: tuple[Stamp, ...] | None = ()
        self.used_calls = UsedCalls()
        self.result: FlightResult | None = None
        self._lock = threading.Lock()
        self._readers = 1
        self._busy = True
        self._waiters: list[Waiter] = []
        self._iterator: Any = None
        self._held: Lease | None = None
        self._successor: StreamRun | None = None
        self._freed = False
        self._started = 0
        self._watch = InputWatch(job)
        self._active = 0.0
        self._limit = limit(job)

    # --- consumers -------------------------------------------------------------------------------

    def attach(self) -> bool:
        """Add a consumer that reads from the first item on.

        False if the run can no longer be read.
        """
        with self._lock:
            if self.lost or self.spool.fault or not self._readers:
                return False
            self._readers += 1
            return True

    async def leave(self, port: Port) -> None:
        """Remove a consumer; the last one ends the run."""
        with self._lock:
            self._readers -= 1
            if self._readers or self._busy:
                return
            self._busy = True
        try:
            if not self.over:
                await self._stop(port)
        finally:
            self.spool.close()
            if not self.flight.over:  # interrupted while the sequence was being stored
                FLIGHTS.abandon(self.flight)
            await self._free(port)

    async def _stop(self, port: Port) -> None:
        """End a run without consumers: close the generator and store nothing."""
        self._ends(lost=True)
        iterator, self._iterator = self._iterator, None
        try:
            if iterator is not None:
                with self._inside():
                    if port.native:
                        await iterator.aclose()
                    else:
                        iterator.close()
        finally:
            self._emit_end()

    async def is_overtaken(self, port: Port) -> bool:
        """True if no later call may read from it.

        It was invalidated, or there is a newer answer.
        """
        job = self.job
        if not self._started:  # its stamps have not been taken yet
            return False
        if self.call_stamps is None or job.chain.latest_answers.is_newer_than(
            job.call.text, self._started
        ):
            return True
        return bool(await job.chain.authorities.why_invalid(port, self.call_stamps))

    def all_stamps(self) -> tuple[Stamp, ...] | None:
        """Return the stamps of everything it has used so far; None if some are unknown."""
        if self.call_stamps is None or not self.used_calls.sound:
            return None
        return self.used_calls.merged(self.call_stamps)[0].all()

    # --- running ---------------------------------------------------------------------------------

    @contextmanager
    def _inside(self) -> Iterator[None]:
        """Mark the running code as part of the generator's computation."""
        around, begun = CURRENT.get(), time.perf_counter()
        with inside(self.flight):
            token = CURRENT.set(self.used_calls)
            try:
                yield
            finally:
                CURRENT.reset(token)
                took = time.perf_counter() - begun
                self._active += took
                if around is not None and not around.over:
                    around.paused += took

    async def open(self, port: Port, found: Answer, *, alone: bool = False) -> None:
        """Take the lease and the stamps; the run is lost if another process was faster.

        Args:
            alone: take no lease.
        """
        job, policy = self.job, self.job.function.policy
        try:
            if not alone and await self._done_elsewhere(port, found):
                self._ends(lost=True)
                await self._end(port, None)
                return
            with patience(policy):
                [self.call_stamps] = await take_stamps(port, [job])
            used_calls.follow_threads()
            started = job.chain.latest_answers.start_time(job.call.text, job.chain.clock)
            if self.flight.detached:  # during the wait for the lease: the next run may have begun
                self._ends(lost=True)
                await self._end(port, None)
                return
            self._started = started
            self.flight.call, self.flight.expected = job.call, job.function.last_duration
            with inside(self.flight):
                emit(job, events.COMPUTE_STARTED)
            self._watch.__enter__()
            made = self._generate(*job.args, **job.kwargs)
            self._iterator = made.__aiter__() if port.native else iter(made)
        except DependencyError as error:
            self.error = error
            self._ends()
            await self._end(port, FlightResult(error=error))
        except BaseException:
            self._ends(lost=True)
            await self._end(port, None)
            raise
        finally:
            self._release()

    async def _done_elsewhere(self, port: Port, found: Answer) -> bool:
        """True if another process stored the sequence before this one got the lease."""
        job, policy = self.job, self.job.function.policy
        with _leasing:
            before = _leased.get(job.name)
            if before is not None and before.loop is self.loop:
                before._successor = self
                return False
        expected = job.function.last_duration
        held = await acquire_lease(
            *(port, job.chain, job.name, policy, self.flight),
            expected=expected,
            question=partial(lookup_with_lease, port, job),
        )
        self._held = held
        if held is not None and held.acquired:
            _leased[job.name] = self
        return held is not None and await stored_by_another(port, job, held, found)

    def _release(self) -> None:
        """Let the next consumer advance the run."""
        with self._lock:
            self._busy = False
            waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            waiter.set()

    def _ends(self, *, lost: bool = False) -> None:
        self.over, self.lost = True, lost
        self._watch.__exit__()

    async def _end(self, port: Port, result: FlightResult | None) -> None:
        """Release the lease, then end the flight."""
        await self._free(port)
        FLIGHTS.finish(self.flight, result)

    async def _free(self, port: Port) -> None:
        with _leasing:
            held, self._held, self._freed = self._held, None, True
            if held is None:
                return
            if held.acquired:
                _leased.pop(self.job.name, None)
            heir = self._successor
            if heir is not None and not heir._freed:
                heir._held, _leased[self.job.name] = held, heir
                return
        await held.release(port, self.job.chain.uploads.get(self.job.name))

    def take(self, port: Port, at: int, cursor: Cursor) -> Any:
        """Return the item at a position, `END`, `_LOST`, `Raised`, a waiter, or `_WAIT` to advance.

        Raises:
            EntryError: a copy of the item cannot be loaded.
            TierError: the copy is gone.
        """
        with self._lock:
            if at < self.count:
                if self.spool.fault:
                    return _LOST
                item = self.spool.item(at, cursor)
            elif self.lost:
                return _LOST
            elif self.over:
                return END if self.error is None else Raised(self.error)
            elif self._busy:
                if self.flight in current_path():
                    raise ReentryError(f"the generator of {self.job.name} reads its own items")
                waiter = port.waiter()
                self._waiters.append(waiter)
                return _Waiting(waiter)
            else:
                self._busy = True
                return _WAIT
        return load_item(item)

    async def advance(self, port: Port) -> Any:
        """Produce the next item and return as `take`; only for the consumer whose turn it is."""
        try:
            while self.skip:  # items that the consumer has seen in a run that was lost
                self.skip -= 1
                item = await self._next(port)
                if self.over:
                    break
                self._keep(item)
            else:
                item = await self._next(port)
            if not self.over:
                self._keep(item)
                return item
            if self.error is not None:
                await self._failed(port)
                return Raised(self.error)
            await self._finish(port)
            return END
        finally:
            self._release()

    async def _next(self, port: Port) -> Any:
        try:
            with self._inside():
                if port.native:
                    return await self._iterator.__anext__()
                return next(self._iterator)
        except StopAsyncIteration:
            self._ends()
        except StopIteration as stop:
            self.spool.returned = stop.value
            self._ends()
        except Exception as error:
            self.error = cut_to_user_frames(error)
            self._ends()
        except BaseException:
            self._ends(lost=True)
            self._emit_end()
            FLIGHTS.abandon(self.flight)
            await self._free(port)
            raise
        return END

    def _keep(self, item: Any) -> None:
        """Spool an item; if that fails, the run goes on for its present consumers only."""
        with self._lock:
            if self._keeps and not self.spool.fault:
                try:
                    self.spool.add(same_types.packed(item))
                    if self._limit is not None and self.spool.size > self._limit:
                        self.spool.stop("too big")
                except OSError as error:
                    self.spool.stop(f"cannot be spooled: {type(error).__name__}: {error.strerror}")
                except Exception as error:
                    fault = f"cannot be pickled ({type(error).__name__})"
                    if isinstance(error, codec.AlteredError):
                        fault = error.of(type(item))
                    self.spool.stop(fault)
                    fix = "yield plain data instead"
                    warn_not_stored(self.job.function, item, fault, fix, "yielded")
                if self.spool.fault:
                    emit(self.job, events.ERROR, reason="store", detail=self.spool.fault)
                    FLIGHTS.close(self.flight)  # later consumers could not read this item
            if not self.count:
                self.job.chain.latest_answers.record(self.job.call.text, self._started)
            self.count += 1

    def _emit_end(self) -> None:
        """Emit the event that the generator's run has ended."""
        self.used_calls.over = True
        if self._started:
            pauses = (
                sum(end - begin for begin, end in self.used_calls.pauses) + self.used_calls.paused
            )
            seconds = max(0.0, self._active - pauses)
            with inside(self.flight):
                raised = Outcome(error=self.error).raised
                emit_run_ended(self.job, seconds, events.INTERRUPTED if self.lost else raised)

    async def _failed(self, port: Port) -> None:
        """End the run of a generator that raised: nothing is stored."""
        assert self.error is not None
        self._emit_end()
        emit(self.job, events.FAILED, reason=type(self.error).__name__, seconds=self._active)
        known = self.all_stamps()
        await self._end(
            port, FlightResult(error=self.error, stamps=known, known_stamps=known or ())
        )

    async def _finish(self, port: Port) -> None:
        """End the run of a generator that returned: store its items."""
        job, cost = self.job, self._active
        self._emit_end()
        emit(job, events.COMPUTED, seconds=cost)
        job.function.last_duration = cost
        job.function.backoff.pop(job.call.text, None)
        known, used = await merged_stamps(port, job, self.used_calls, self.call_stamps)
        result = FlightResult(stamps=used, known_stamps=known)
        job.chain.latest_answers.record(job.call.text, self._started)
        stored = self._keeps and not (self.flight.detached or self.spool.fault)
        stored = stored and self._watch.unchanged
        if stored and used is not None and await is_same_call(port, job):
            try:
                made = Computed(self.spool, used, self._started, cost, life=self.used_calls.life)
                result = await store_result(port, job, made)
            except Exception as error:
                emit(job, events.ERROR, reason="store", detail=error_text(error))
        self.result = result
        await self._end(port, result)


class _Waiting:
    """Returned when the consumer has to wait for the one that advances the run."""

    __slots__ = ("waiter",)

    def __init__(self, waiter: Waiter) -> None:
        self.waiter = waiter


class Reader:
    """One consumer of a stream.

    Args:
        generate: the generator function.
        fresh: compute the sequence even if it is stored.
        keep: store what is computed.
    """

    def __init__(
        self, job: Job, generate: Callable[..., Any], *, fresh: bool = False, keep: bool = True
    ) -> None:
        self.job = job
        self._generate = generate
        self.returned: Any = None
        self._fresh = fresh
        self._keep = keep
        self._found = Answer(Verdict(MISS, reasons.ABSENT))
        self._stored: Iterator[Any] | None = None
        self._stream: Stream | None = None
        self._live: StreamRun | None = None
        self._at = 0
        self._cursor = Cursor()
        self._recorded_size: int | None = -1
        self._over = False

    async def next(self, port: Port) -> Any:
        """Return the next item, `END`, or `Raised`."""
        if self._stored is None and self._live is None:
            await self._begin(port)
        while True:
            item = self._replayed() if self._stored is not None else await self._shared(port)
            if item is _LOST:
                await self._recover(port)
                continue
            if item is END or type(item) is Raised:
                if type(item) is Raised and not self._at and await self._use_old_items(port, item):
                    continue
                await self._done(port)
            else:
                self._at += 1
            self._record_used()
            return item

    async def leave(self, port: Port) -> None:
        """End the consumer, after the last item or before."""
        self._over = True
        await self._done(port)

    async def _done(self, port: Port) -> None:
        one, self._live = self._live, None
        if one is not None:
            self._record_used_from(one)
            self.returned = one.spool.returned
            FLIGHTS.forget_wait(one.flight)
            await one.leave(port)
            self._stored = iter(())

    # --- where the items come from ----------------------------------------------------------------

    def _replay(self, stream: Stream) -> None:
        self._stream = stream
        self._stored = stream.items(self._at)

    def _replayed(self) -> Any:
        assert self._stored is not None
        try:
            item = next(self._stored, END)
        except EntryError as error:
            emit(self.job, events.ERROR, reason=error.reason, detail=str(error))
            return _LOST
        if item is END and self._stream is not None:
            self.returned = self._stream.returned
        return item

    async def _shared(self, port: Port) -> Any:
        one = self._live
        assert one is not None
        while True:
            try:
                item = one.take(port, self._at, self._cursor)
            except (EntryError, TierError) as error:
                emit(self.job, events.ERROR, reason="spool", detail=str(error))
                return _LOST
            if item is _WAIT:
                return await one.advance(port)
            if type(item) is _Waiting:
                await port.wait(item.waiter, None)
            else:
                return item

    async def _recover(self, port: Port) -> None:
        """Go on after a run was lost or a stored item did not load."""
        if self._at or self._stored is not None:
            await self._alone(port)
            return
        await self._done(port)
        self._stored = None
        await self._begin(port)

    async def _begin(self, port: Port) -> None:
        """Find the source of the items: an entry, a run under way, or a new run."""
        begun, missed, job = time.perf_counter(), False, self.job
        await read_live(port, job.function)
        while not self._fresh:
            since = FLIGHTS.ended
            found, value = await look_up(port, job, begun, shared=missed)
            if isinstance(value, Stream):
                self._replay(value)
                return
            if (other := await rekeyed(port, job)) is not None:
                self.job = job = other
                continue
            self._found = found
            if not missed:
                missed = True
                emit(job, events.MISS, reason=found.verdict.reason)
            if await self._join(port, since):
                return
        await self._alone(port)

    async def _join(self, port: Port, since: int) -> bool:
        """Join a run under way, or begin one; False: look the entry up again."""
        job = self.job
        with _attaching:
            flight, leads = FLIGHTS.join_since(job.name, job.call.refs, since)
            if flight is None:
                return False
            if leads:
                flight.stream = self._live = StreamRun(port, job, flight, self._generate)
        if leads:
            assert self._live is not None
            await self._live.open(port, self._found)
            if not self._live.lost:
                return True
            FLIGHTS.forget_wait(flight)
            self._live = None
            return False
        one: StreamRun | None = flight.stream
        if one is None:  # a refresh in the background, which cannot be read while it runs
            await _wait_until_ended(port, flight)
            return False
        if one.loop is not port.loop:
            FLIGHTS.forget_wait(flight)
            await self._alone(port)
            return True
        if not one.attach():  # it has just ended, or items can no longer be spooled
            if one.spool.fault:
                FLIGHTS.forget_wait(flight)
            else:
                await _wait_until_ended(port, flight)
            return False
        if await one.is_overtaken(port):
            FLIGHTS.supersede(flight)
            FLIGHTS.forget_wait(flight)
            await one.leave(port)
            return False
        self._live = one
        emit(job, events.COALESCED)
        return True

    async def _alone(self, port: Port) -> None:
        """Go on with a run of its own, skipping the items that were seen already."""
        await self._done(port)
        self._stored = self._stream = None
        flight = Flight(self.job.name, self.job.call.refs, background=False)
        self._live = StreamRun(port, self.job, flight, self._generate, self._at, keep=self._keep)
        self._cursor = Cursor()
        await self._live.open(port, self._found, alone=True)

    async def _use_old_items(self, port: Port, raised: Raised) -> bool:
        """True if an old sequence answers because the generator raised before its first item."""
        if not (self._found.verdict.fallback and self._found.entry is not None):
            return False
        failed = FlightResult(error=raised.error)
        old = await fall_back(port, self.job, self._found, failed)
        if old is failed or not isinstance(old.value, Stream):
            return False
        await self._done(port)
        record_flight_result(self.job, old)
        self._replay(old.value)
        return True

    # --- stamps of what was used -----------------------------------------------------------------

    def _record_used(self) -> None:
        if self._live is not None:
            self._record_used_from(self._live)

    def _record_used_from(self, one: StreamRun) -> None:
        """Record in the computation around the consumer the stamps of the stream so far."""
        around = CURRENT.get()
        if around is None or around.over:
            return
        size = one.used_calls.size if one.call_stamps is not None and one.used_calls.sound else None
        if size != self._recorded_size:
            self._recorded_size = size
            record_stamps(one.all_stamps())
            if one.used_calls.life is not None:
                around.expires(one.used_calls.life)
        if one.result is not None and one.result.entry is not None:
            record_flight_result(self.job, one.result)


async def _wait_until_ended(port: Port, flight: Flight) -> None:
    """Wait until a flight has ended."""
    waiter = FLIGHTS.add_waiter(flight, port)
    try:
        await wait_until_over(port, flight, waiter)
    finally:
        FLIGHTS.remove_waiter(flight, waiter)
        FLIGHTS.forget_wait(flight)


# --- whole sequences ------------------------------------------------------------------------------


def run_through(
    run: Callable[..., Any], made: Callable[[], Spool], is_async: bool
) -> Callable[..., Any]:
    """Wrap a generator function so that it runs to its end and returns a `Spool` from `made`."""

    def whole(*args: Any, **kwargs: Any) -> Spool:
        return spooled(run(*args, **kwargs), made())

    async def awhole(*args: Any, **kwargs: Any) -> Spool:
        return await aspooled(run(*args, **kwargs), made())

    return awhole if is_async else whole


def spooled(items: Iterable[Any], spool: Spool) -> Spool:
    """Put the items of an iterable into a spool."""
    iterator = iter(items)
    while True:
        try:
            item = next(iterator)
        except StopIteration as stop:
            spool.returned = stop.value
            return spool
        spool.add(same_types.packed(item))


async def aspooled(items: AsyncIterable[Any] | Iterable[Any], spool: Spool) -> Spool:
    """Put the items of an async or plain iterable into a spool."""
    if not isinstance(items, AsyncIterable):
        return spooled(items, spool)
    async for item in items:
        spool.add(same_types.packed(item))
    return spool
