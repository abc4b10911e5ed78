"""Streams: the results of generators, shared while they are produced, and stored at their end.

Rules of this module:

1.  Nothing runs before a consumer asks for the first item, and nothing runs ahead: if a consumer
    stops, only the items that it has seen were computed.
2.  Consumers on one event loop, or in threads of sync code, share one run.  The consumer that needs
    the next item advances the generator in its own thread or task; the others read the item from a
    spool.
3.  The first consumer of an item gets the item itself; every other one gets its own copy.
4.  The sequence is stored only when the generator has returned.  If it raises, loses its last
    consumer, or is invalidated, nothing is stored.
5.  If a shared run is lost (the consumer that advanced it was cancelled or interrupted, or items
    can no longer be spooled), each of the other consumers goes on with a run of its own, and skips
    the items that it has seen.
6.  A computation that consumes a stream depends on it from the first item on.
7.  A caller that may not join a run, because the run was invalidated, leads the next one.  The
    lease passes from the old run to the new one, since the old run may be waiting for that caller.
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

from memo.coordination.flights import FLIGHTS, Flight, FlightResult, current_path, inside
from memo.coordination.leases import Lease, acquire_lease, lock_patience, wait_until_over
from memo.engine import same_types, used_calls
from memo.engine.answering import (
    fall_back,
    look_up,
    prepare_lookup,
    rekey,
    stored_by_another,
)
from memo.engine.call import Function, Job, Outcome, Raised, emit, error_text, reload_live_if_due
from memo.engine.computing import (
    Computed,
    InputWatch,
    emit_run_ended,
    has_same_key,
    merged_stamps,
    store_result,
    take_stamps,
    warn_not_stored,
)
from memo.engine.used_calls import USED_CALLS, UsedCalls, record_flight_result, record_stamps
from memo.errors import (
    DependencyError,
    EntryError,
    ReentryError,
    TierError,
    cut_to_user_frames,
    label,
)
from memo.records import codec
from memo.records.spool import Cursor, Spool, Stream, load_item
from memo.records.stamp_types import Stamp
from memo.runtime import events, fork, reasons
from memo.runtime.blocking import BLOCKING
from memo.runtime.events import MISS
from memo.runtime.port import Port, Steps, Waiter
from memo.stores.chain import Answer
from memo.validity.check import Verdict

END = object()
"""Returned instead of an item when there are no more."""
_RUN_LOST = object()
"""Returned instead of an item if the run is lost, or an item cannot be read."""
_ADVANCE = object()
"""Returned instead of an item if it is this consumer's turn to advance the run."""
_joining = threading.Lock()
_leasing = threading.Lock()
_lease_holders: dict[str, StreamRun] = {}
"""The runs of this process that have a lease, by name."""
fork.in_child(_lease_holders.clear)


def spool_for(function: Function) -> Spool:
    """Make a spool whose file, if it needs one, is in the cache directory."""
    host = function.chain().host
    return Spool(None if host is None else Path(host.cache_directory.path), function.compress())


def size_limit(job: Job) -> int | None:
    """Return the size in bytes of the largest sequence that any tier accepts; None if unknown."""
    budgets = [tier.budget for tier in job.chain.tiers]
    known = [budget for budget in budgets if budget is not None]
    return max(known) if len(known) == len(budgets) else None


class StreamRun:
    """One run of a generator.

    Args:
        skip: number of items that its only consumer has seen already.
        keep: store the items when it has returned.

    Attributes:
        loop: the event loop that may advance an async generator; None: any thread may.
        count: number of items produced so far.
        over: it produces no more items: it returned, raised `error`, or was lost.
        call_stamps: the stamps of its call; None if they are unknown.
        result: its result, once it has returned.
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
        self._lease: Lease | None = None
        self._successor: StreamRun | None = None
        self._lease_given_up = False
        self._started = 0
        self._watch = InputWatch(job)
        self._own_seconds = 0.0
        self._size_limit = size_limit(job)

    # --- consumers -------------------------------------------------------------------------------

    def attach(self) -> bool:
        """Add a consumer that reads from the first item on; False if the run cannot be read."""
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
            await self._pass_or_release_lease(port)

    async def _stop(self, port: Port) -> None:
        """End a run without consumers: close the generator and store nothing."""
        self._mark_ended(lost=True)
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
        """True if later calls may not read from it: it was invalidated, or has a newer answer."""
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
        return self.used_calls.merge_with(self.call_stamps)[0].all_stamps()

    # --- running ---------------------------------------------------------------------------------

    @contextmanager
    def _inside(self) -> Iterator[None]:
        """Mark the running code as part of the generator's computation."""
        around, begun = USED_CALLS.get(), time.perf_counter()
        with inside(self.flight):
            token = USED_CALLS.set(self.used_calls)
            try:
                yield
            finally:
                USED_CALLS.reset(token)
                took = time.perf_counter() - begun
                self._own_seconds += took
                if around is not None and not around.over:
                    around.stream_seconds += took

    async def open(self, port: Port, found: Answer, *, alone: bool = False) -> None:
        """Take the lease and the stamps, and begin; the run is lost if another process was faster.

        Args:
            alone: the run is for one consumer only, so take no lease.
        """
        job, policy = self.job, self.job.function.policy
        try:
            if not alone and await self._was_stored_elsewhere(port, found):
                self._mark_ended(lost=True)
                await self._end_flight(port, None)
                return
            with lock_patience(policy):
                [self.call_stamps] = await take_stamps(port, [job])
            used_calls.follow_threads()
            started = job.chain.latest_answers.start_time(job.call.text, job.chain.clock)
            if self.flight.detached:  # while it waited for the lease, the next run may have begun
                self._mark_ended(lost=True)
                await self._end_flight(port, None)
                return
            self._started = started
            self.flight.call, self.flight.expected_duration = (
                job.call,
                job.function.history.last_duration,
            )
            with inside(self.flight):
                emit(job, events.COMPUTE_STARTED)
            self._watch.__enter__()
            made = self._generate(*job.args, **job.kwargs)
            self._iterator = made.__aiter__() if port.native else iter(made)
        except DependencyError as error:
            self.error = error
            self._mark_ended()
            await self._end_flight(port, FlightResult(error=error))
        except BaseException:
            self._mark_ended(lost=True)
            await self._end_flight(port, None)
            raise
        finally:
            self._let_next_advance()

    async def _was_stored_elsewhere(self, port: Port, found: Answer) -> bool:
        """True if another process stored the sequence before this one got the lease."""
        job, policy = self.job, self.job.function.policy
        with _leasing:
            before = _lease_holders.get(job.name)
            if before is not None and before.loop is self.loop:
                before._successor = self
                return False
        lease = await acquire_lease(
            *(port, job.chain, job.name, policy, self.flight),
            expected=job.function.history.last_duration,
            make_lookup=partial(prepare_lookup, port, job),
        )
        self._lease = lease
        if lease is not None and lease.acquired:
            _lease_holders[job.name] = self
        return lease is not None and await stored_by_another(port, job, lease, found)

    def _let_next_advance(self) -> None:
        """Let the next consumer advance the run."""
        with self._lock:
            self._busy = False
            waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            waiter.set()

    def _mark_ended(self, *, lost: bool = False) -> None:
        """Record that the run produces no more items."""
        self.over, self.lost = True, lost
        self._watch.__exit__()

    async def _end_flight(self, port: Port, result: FlightResult | None) -> None:
        """Release the lease, then end the flight."""
        await self._pass_or_release_lease(port)
        FLIGHTS.finish(self.flight, result)

    async def _pass_or_release_lease(self, port: Port) -> None:
        """Pass the lease, if it has one, to the next run that waits for it, else release it."""
        with _leasing:
            lease, self._lease, self._lease_given_up = self._lease, None, True
            if lease is None:
                return
            if lease.acquired:
                _lease_holders.pop(self.job.name, None)
            successor = self._successor
            if successor is not None and not successor._lease_given_up:
                successor._lease, _lease_holders[self.job.name] = lease, successor
                return
        await lease.release(port, self.job.chain.uploads.get(self.job.name))

    def take(self, port: Port, at: int, cursor: Cursor) -> Any:
        """Return the item at a position.

        Returns:
            The item, `END`, `Raised`, `_RUN_LOST`, `_ADVANCE`, or a `_Waiting`.

        Raises:
            EntryError: a copy of the item cannot be loaded.
            TierError: the copy is gone.
        """
        with self._lock:
            if at < self.count:
                if self.spool.fault:
                    return _RUN_LOST
                item = self.spool.item(at, cursor)
            elif self.lost:
                return _RUN_LOST
            elif self.over:
                return END if self.error is None else Raised(self.error)
            elif self._busy:
                if self.flight in current_path():
                    name = label(self.job.function.id)
                    raise ReentryError(f"the generator {name} reads its own items")
                waiter = port.waiter()
                self._waiters.append(waiter)
                return _Waiting(waiter)
            else:
                self._busy = True
                return _ADVANCE
        return load_item(item)

    async def advance(self, port: Port) -> Any:
        """Produce the next item, and return it as `take` does; only after `_ADVANCE`."""
        try:
            while self.skip:  # items that the consumer saw in a run that was lost
                self.skip -= 1
                item = await self._produce(port)
                if self.over:
                    break
                self._spool_item(item)
            else:
                item = await self._produce(port)
            if not self.over:
                self._spool_item(item)
                return item
            if self.error is not None:
                await self._end_failed(port)
                return Raised(self.error)
            await self._end_complete(port)
            return END
        finally:
            self._let_next_advance()

    async def _produce(self, port: Port) -> Any:
        try:
            with self._inside():
                if port.native:
                    return await self._iterator.__anext__()
                return next(self._iterator)
        except StopAsyncIteration:
            self._mark_ended()
        except StopIteration as stop:
            self.spool.returned = stop.value
            self._mark_ended()
        except Exception as error:
            self.error = cut_to_user_frames(error)
            self._mark_ended()
        except BaseException:
            self._mark_ended(lost=True)
            self._emit_end()
            FLIGHTS.abandon(self.flight)
            await self._pass_or_release_lease(port)
            raise
        return END

    def _spool_item(self, item: Any) -> None:
        """Put an item into the spool; if that fails, the run goes on for its current consumers."""
        with self._lock:
            if self._keeps and not self.spool.fault:
                try:
                    self.spool.add(same_types.pickle_item(item))
                    if self._size_limit is not None and self.spool.size > self._size_limit:
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
            if self._keeps and not self.count:
                self.job.chain.latest_answers.record(self.job.call.text, self._started)
            self.count += 1

    def _emit_end(self) -> None:
        """Emit the event that the generator's run has ended."""
        self.used_calls.over = True
        if self._started:
            pauses = (
                sum(end - begin for begin, end in self.used_calls.pauses)
                + self.used_calls.stream_seconds
            )
            seconds = max(0.0, self._own_seconds - pauses)
            with inside(self.flight):
                raised = Outcome(error=self.error).error_name
                emit_run_ended(self.job, seconds, events.INTERRUPTED if self.lost else raised)

    async def _end_failed(self, port: Port) -> None:
        """End the run of a generator that raised; nothing is stored."""
        assert self.error is not None
        self._emit_end()
        emit(self.job, events.FAILED, reason=type(self.error).__name__, seconds=self._own_seconds)
        known = self.all_stamps()
        await self._end_flight(
            port, FlightResult(error=self.error, stamps=known, known_stamps=known or ())
        )

    async def _end_complete(self, port: Port) -> None:
        """End the run of a generator that returned; store its items."""
        job, cost = self.job, self._own_seconds
        self._emit_end()
        emit(job, events.COMPUTED, seconds=cost)
        job.function.history.last_duration = cost
        job.function.history.backoff.pop(job.call.text, None)
        known, used = await merged_stamps(port, job, self.used_calls, self.call_stamps)
        result = FlightResult(stamps=used, known_stamps=known)
        if self._keeps:
            job.chain.latest_answers.record(job.call.text, self._started)
        stored = self._keeps and not (self.flight.detached or self.spool.fault)
        stored = stored and self._watch.unchanged
        if stored and used is not None and await has_same_key(port, job):
            try:
                made = Computed(
                    self.spool,
                    used,
                    self._started,
                    cost,
                    earliest_expiry=self.used_calls.earliest_expiry,
                )
                result = await store_result(port, job, made)
            except Exception as error:
                emit(job, events.ERROR, reason="store", detail=error_text(error))
        self.result = result
        await self._end_flight(port, result)


class _Waiting:
    """Returned instead of an item while another consumer advances the run."""

    __slots__ = ("waiter",)

    def __init__(self, waiter: Waiter) -> None:
        self.waiter = waiter


class Reader:
    """A consumer of a stream.

    Args:
        generate: the generator function.
        fresh: compute the sequence even if it is stored.
        keep: store the results.
    """

    def __init__(
        self, job: Job, generate: Callable[..., Any], *, fresh: bool = False, keep: bool = True
    ) -> None:
        self.job = job
        self._generate = generate
        self.returned: Any = None
        self._port: Port = BLOCKING
        self._steps = Steps(BLOCKING)
        self._fresh = fresh
        self._keep = keep
        self._found = Answer(Verdict(MISS, reasons.ABSENT))
        self._stored: Iterator[Any] | None = None
        self._stream: Stream | None = None
        self._run: StreamRun | None = None
        self._at = 0
        self._cursor = Cursor()
        self._recorded_size: int | None = -1
        self._over = False

    async def next(self, port: Port) -> Any:
        """Return the next item, `END`, or `Raised`."""
        if port is not self._port:
            self._port, self._steps = port, Steps(port)
        await self._steps.pause_if_due()
        if self._stored is None and self._run is None:
            await self._find_source(port)
        while True:
            item = (
                self._next_stored() if self._stored is not None else await self._next_of_run(port)
            )
            if item is _RUN_LOST:
                await self._restart(port)
                continue
            if item is END or type(item) is Raised:
                if type(item) is Raised and not self._at and await self._use_old_items(port, item):
                    continue
                await self._leave_run(port)
            else:
                self._at += 1
            self._record_used()
            return item

    async def leave(self, port: Port) -> None:
        """Stop reading, after the last item or before."""
        self._over = True
        await self._leave_run(port)

    async def _leave_run(self, port: Port) -> None:
        one, self._run = self._run, None
        if one is not None:
            self._record_used_from(one)
            self.returned = one.spool.returned
            FLIGHTS.forget_wait(one.flight)
            await one.leave(port)
            self._stored = iter(())

    # --- where the items come from ----------------------------------------------------------------

    def _use_stored(self, stream: Stream) -> None:
        self._stream = stream
        self._stored = stream.items(self._at)

    def _next_stored(self) -> Any:
        assert self._stored is not None
        try:
            item = next(self._stored, END)
        except EntryError as error:
            emit(self.job, events.ERROR, reason=error.reason, detail=str(error))
            return _RUN_LOST
        if item is END and self._stream is not None:
            self.returned = self._stream.returned
        return item

    async def _next_of_run(self, port: Port) -> Any:
        one = self._run
        assert one is not None
        while True:
            try:
                item = one.take(port, self._at, self._cursor)
            except (EntryError, TierError) as error:
                emit(self.job, events.ERROR, reason="spool", detail=str(error))
                return _RUN_LOST
            if item is _ADVANCE:
                return await one.advance(port)
            if type(item) is _Waiting:
                await port.wait(item.waiter, None)
            else:
                return item

    async def _restart(self, port: Port) -> None:
        """Find another source after a run was lost or a stored item did not load."""
        if self._at or self._stored is not None:
            await self._run_alone(port)
            return
        await self._leave_run(port)
        self._stored = None
        await self._find_source(port)

    async def _find_source(self, port: Port) -> None:
        """Find the source of the items: an entry, a run in progress, or a new run."""
        begun, missed, job = time.perf_counter(), False, self.job
        await reload_live_if_due(port, job.function)
        while not self._fresh:
            since = FLIGHTS.ended_count
            found, value = await look_up(port, job, begun, was_missing=missed)
            if isinstance(value, Stream):
                self._use_stored(value)
                return
            if (other := await rekey(port, job)) is not None:
                self.job = job = other
                continue
            self._found = found
            if not missed:
                missed = True
                emit(job, events.MISS, reason=found.verdict.reason)
            if await self._join(port, since):
                return
        await self._run_alone(port)

    async def _join(self, port: Port, since: int) -> bool:
        """Join a run in progress, or begin one; False if the entry has to be looked up again."""
        job = self.job
        with _joining:
            flight, leads = FLIGHTS.join_since(job.name, job.call.refs, since)
            if flight is None:
                return False
            if leads:
                flight.stream = self._run = StreamRun(port, job, flight, self._generate)
        if leads:
            assert self._run is not None
            await self._run.open(port, self._found)
            if not self._run.lost:
                return True
            FLIGHTS.forget_wait(flight)
            self._run = None
            return False
        one: StreamRun | None = flight.stream
        if one is None:  # a refresh in the background, which cannot be read while it runs
            await _wait_until_ended(port, flight)
            return False
        if one.loop is not port.loop:
            FLIGHTS.forget_wait(flight)
            await self._run_alone(port)
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
        self._run = one
        emit(job, events.COALESCED)
        return True

    async def _run_alone(self, port: Port) -> None:
        """Go on with a run for this consumer only, and skip the items that it has seen."""
        await self._leave_run(port)
        self._stored = self._stream = None
        flight = Flight(self.job.name, self.job.call.refs, background=False)
        self._run = StreamRun(port, self.job, flight, self._generate, self._at, keep=self._keep)
        self._cursor = Cursor()
        await self._run.open(port, self._found, alone=True)

    async def _use_old_items(self, port: Port, raised: Raised) -> bool:
        """After an error before the first item, use an old sequence, if one may; True if so."""
        if not (self._found.verdict.fallback and self._found.entry is not None):
            return False
        failed = FlightResult(error=raised.error)
        old = await fall_back(port, self.job, self._found, failed)
        if old is failed or not isinstance(old.value, Stream):
            return False
        await self._leave_run(port)
        record_flight_result(self.job, old)
        self._use_stored(old.value)
        return True

    # --- stamps of what was used -----------------------------------------------------------------

    def _record_used(self) -> None:
        if self._run is not None:
            self._record_used_from(self._run)

    def _record_used_from(self, one: StreamRun) -> None:
        """Record, in the computation that consumes the stream, the stamps of the stream so far."""
        around = USED_CALLS.get()
        if around is None or around.over:
            return
        size = one.used_calls.size if one.call_stamps is not None and one.used_calls.sound else None
        if size != self._recorded_size:
            self._recorded_size = size
            record_stamps(one.all_stamps())
            if one.used_calls.earliest_expiry is not None:
                around.add_expiry(one.used_calls.earliest_expiry)
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


def returning_spool(
    run: Callable[..., Any], made: Callable[[], Spool], is_async: bool
) -> Callable[..., Any]:
    """Wrap a generator function so that it runs to its end and returns a spool with its items.

    Args:
        made: makes an empty spool.
    """

    def whole(*args: Any, **kwargs: Any) -> Spool:
        return spool_all(run(*args, **kwargs), made())

    async def awhole(*args: Any, **kwargs: Any) -> Spool:
        return await aspool_all(run(*args, **kwargs), made())

    return awhole if is_async else whole


def spool_all(items: Iterable[Any], spool: Spool) -> Spool:
    """Put the items of an iterable into a spool."""
    iterator = iter(items)
    while True:
        try:
            item = next(iterator)
        except StopIteration as stop:
            spool.returned = stop.value
            return spool
        spool.add(same_types.pickle_item(item))


async def aspool_all(items: AsyncIterable[Any] | Iterable[Any], spool: Spool) -> Spool:
    """Put the items of an async or plain iterable into a spool."""
    if not isinstance(items, AsyncIterable):
        return spool_all(items, spool)
    async for item in items:
        spool.add(same_types.pickle_item(item))
    return spool
