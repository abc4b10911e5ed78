"""Answer a call: from the cache, from a computation in progress, or by computing it.

The coroutines here run over a port (`runtime.port`), for sync and async callers alike.

::

    call ──> look ──> fresh ─────────────────────────────> load ──> value
               │ ├──> stale ──> refresh in background ───> load ──> value
               │ └──> miss ──> lead or join a flight
               │                 │ lead: lease ──> stamps ──> compute ──> seal, store ──> value
               │                 │         └──> revalidate ──> equal ──> value
               └─── again <──────┘ join: wait ──> a copy of the result

Once the function has returned, its result always reaches the caller: a later fault of the cache is
only an event.  Exceptions of the function are raised unchanged.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from memo.coordination.flights import (
    FLIGHTS,
    Flight,
    FlightResult,
    refuse_reentry,
)
from memo.coordination.leases import (
    LOOP_CHECK_SECONDS,
    Lease,
    acquire_lease,
    lock_patience,
    wait_until_over,
)
from memo.engine import computing
from memo.engine.call import (
    NOTHING,
    Function,
    Job,
    Raised,
    emit,
    error_text,
    make_call,
    reload_live_if_due,
    report_if_resource_failure,
)
from memo.engine.computing import close_flight, compute, encode, invoke, warn_of_change
from memo.engine.loading import OFFLOADED_STREAM_BYTES, load, look_up_and_load
from memo.engine.refreshing import pause_after_failure, refresh_in_background, revalidate
from memo.engine.used_calls import (
    USED_CALLS,
    in_background,
    record_entry,
    record_flight_result,
    record_stamps,
)
from memo.errors import EntryError, TierError
from memo.keys.call_keys import Call
from memo.records import codec, seal
from memo.records.seal import Entry
from memo.runtime import events
from memo.runtime.clock import SECOND
from memo.runtime.events import MISS, STALE
from memo.runtime.named_tuple import new_tuple
from memo.runtime.port import Port
from memo.runtime.reasons import EXPIRED, UNREACHABLE
from memo.stores.chain import Answer, Chain
from memo.stores.protocols import PendingLookup
from memo.validity.check import FRESH, Verdict, judge, may_fall_back

MIN_WAITED_SECONDS = 0.001
"""Seconds below which a lease counts as free: the process did not wait for it."""
SOFT_TIMEOUT_REASON = "soft_timeout"
"""Reason of a stale answer: the computation takes longer than `soft_timeout`."""


LOOK_UP_AGAIN = object()
"""Returned instead of a value when the caller has to look the entry up again."""


# --- answers -------------------------------------------------------------------------------------


def answer_from_first_tier(
    port: Callable[[], Port], function: Function, call: Call, begun: float
) -> Any:
    """Answer a call from the first tier, without a coroutine.

    The most frequent kind of hit, a fresh entry in memory, ends here.

    Args:
        port: returns the port; called only if one is needed.
        begun: when the call began, by `time.perf_counter`.

    Returns:
        The value; or a `PendingLookup`, for `answer_after_lookup`; or `NOTHING`, if the call has to
        take the general path, `answer`.
    """
    chain = function.chain()
    try:
        found = chain.at_hand(port, function.id, call.text, FLIGHTS.ended_count)
    except Exception as error:
        if not report_if_resource_failure(error):
            raise
        return NOTHING
    if type(found) is Entry:
        return _load_if_fresh(function, chain, call, found, begun, chain.first)
    return NOTHING if found is None else found


def answer_after_lookup(
    function: Function, call: Call, pending: PendingLookup, begun: float
) -> Any:
    """Answer a call from a lookup that has its reply; `NOTHING` as in `answer_from_first_tier`."""
    chain = function.chain()
    if pending.chain is not chain:  # the settings have changed
        return NOTHING
    entry = chain.finish_lookup(pending, call.text)
    if entry is None:
        return NOTHING
    return _load_if_fresh(function, chain, call, entry, begun, pending.tier)


def _load_if_fresh(
    function: Function, chain: Chain, call: Call, entry: Entry, begun: float, tier: str
) -> Any:
    """Load the value of a valid entry; `NOTHING` if it is not fresh, is big or does not load."""
    if len(entry.stream) > OFFLOADED_STREAM_BYTES:
        return NOTHING
    if function.live is not None and function.live.due():
        return NOTHING
    ttl = None if function.live is None else function.live_ttl()
    if judge(entry.times, function.policy, chain.clock, ttl).kind != FRESH:
        return NOTHING
    try:
        value = codec.unpickled(entry.stream)
    except EntryError:
        return NOTHING  # `look_up` gets the same error, and reports it
    started, _, _, _, _, _, cost = entry.times
    key = call.text
    if not chain.latest_answers.accept(key, started):
        return NOTHING
    reads = USED_CALLS.get()
    if reads is not None:
        record_entry(function, chain, call, entry, begun)
    taken = time.perf_counter() - begun
    saved = 0.0 if reads is not None and reads.background else cost / SECOND
    facts = (events.HIT, function.id, key, tier, "", taken, entry.size, saved, "")
    events.emit(new_tuple(events.Event, facts))
    return value


async def answer(
    port: Port,
    function: Function,
    call: Call,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    pending: PendingLookup | None = None,
) -> Any:
    """Answer a call by the general path; return its value, or `Raised`.

    Args:
        pending: the lookup that `answer_from_first_tier` sent; it has its reply.
    """
    with excluded_from_own_time():
        return await _answer(port, function, call, args, kwargs, pending)


async def adopt_own_changes(port: Port, job: Job) -> bool:
    """Adopt the state that other hosts found a function to change itself.

    Returns:
        True if keys may differ now.
    """
    keyer = job.function.keyer
    if not keyer.identity.may_change_state(keyer.owner(job.args)):
        return False
    originals = await job.chain.shared_changes.of(port, job.function.id)
    return originals is not None and keyer.identity.adopt_own_changes(originals)


async def rekey(port: Port, job: Job) -> Job | None:
    """Make the key again after `adopt_own_changes`; None if it stays the same."""
    if not await adopt_own_changes(port, job):
        return None
    function = job.function
    call = await make_call(port, function, job.args, job.kwargs)
    if call.text == job.call.text:
        return None
    identity = function.keyer.identity
    new = identity.note_own_changes(identity.adopted_changes(function.keyer.owner(job.args)))
    if new:
        warn_of_change(job, function.own_changes_warning(new, ", as another host has found"))
    return Job(function, job.chain, call, job.args, job.kwargs)


@contextmanager
def excluded_from_own_time() -> Iterator[None]:
    """Exclude the time in this block from the own time of the computation around it."""
    around, begun = USED_CALLS.get(), time.perf_counter()
    try:
        yield
    finally:
        if around is not None and not around.over:
            around.pauses.append((begun, time.perf_counter()))


async def _answer(
    port: Port,
    function: Function,
    call: Call,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    pending: PendingLookup | None,
) -> Any:
    begun = time.perf_counter()
    await reload_live_if_due(port, function)
    job = Job(function, function.chain(), call, args, kwargs)
    if pending is not None and (pending.chain is not job.chain or pending.entry is not None):
        pending = None
    missed = False
    while True:
        since = FLIGHTS.ended_count if pending is None else pending.since
        found, value = await look_up(port, job, begun, pending, was_missing=missed)
        pending = None
        if value is not NOTHING:
            return value
        if (other := await rekey(port, job)) is not None:
            job = other
            continue
        if not missed:
            missed = True
            emit(job, events.MISS, reason=found.verdict.reason)
        value = await _lead_or_join(port, job, found, since, begun)
        if value is not LOOK_UP_AGAIN:
            return value


async def look_up(
    port: Port,
    job: Job,
    begun: float,
    pending: PendingLookup | None = None,
    *,
    was_missing: bool,
    refresh_job: Callable[[], Job] | None = None,
) -> tuple[Answer, Any]:
    """Look a call up, and emit the event if a stored value answers it.

    Args:
        begun: when the call began, by `time.perf_counter`.
        pending: see `Chain.lookup`.
        was_missing: see `emit_hit`.
        refresh_job: makes the job that refreshes a stale value; None: use `job`.

    Returns:
        The chain's answer, and the value; `NOTHING` if there is none that may be used, or if the
        process lacks the resources to look it up.
    """
    try:
        found, value = await look_up_and_load(port, job, pending)
    except Exception as error:
        if not report_if_resource_failure(error):
            raise
        found, value = Answer(Verdict(MISS, UNREACHABLE)), NOTHING
    if value is NOTHING:
        return found, await _during_retry_pause(port, job, found)
    emit_hit(job, found, begun, was_missing=was_missing)
    if found.verdict.kind == STALE:
        refresh_in_background(port, job if refresh_job is None else refresh_job())
    return found, value


def emit_hit(job: Job, found: Answer, begun: float, *, was_missing: bool) -> None:
    """Emit the event of an answer from the cache.

    Args:
        was_missing: an earlier lookup of this call missed, so another caller or process has
            computed the value since.
    """
    assert found.entry is not None
    times = found.entry.times
    job.chain.latest_answers.record(job.call.text, times.started)
    stale = found.verdict.kind == STALE
    late = stale and found.verdict.reason == EXPIRED
    record_entry(job.function, job.chain, job.call, found.entry, begun, stale=late)
    if was_missing and not stale:
        _emit_coalesced(job, begun, times.cost / SECOND)
        return
    saved = 0.0 if in_background() else times.cost / SECOND
    events.emit(
        events.Event(
            events.STALE if stale else events.HIT,
            job.function.id,
            job.call.text,
            found.tier,
            found.verdict.reason,
            time.perf_counter() - begun,
            found.entry.size,
            saved,
        )
    )


def _emit_coalesced(job: Job, begun: float, cost: float) -> None:
    """Emit the event of a value that another caller or process computed during this call."""
    waited = time.perf_counter() - begun
    saved = 0.0 if in_background() else max(0.0, cost - waited)
    emit(job, events.COALESCED, seconds=waited, saved=saved)


async def _lead_or_join(port: Port, job: Job, found: Answer, since: int, begun: float) -> Any:
    """Compute the call, or wait for the flight that does; return a value or `LOOK_UP_AGAIN`."""
    flight, leads = FLIGHTS.join_since(job.name, job.call.refs, since)
    if flight is None:
        return LOOK_UP_AGAIN
    soft = job.function.policy.soft_timeout if found.verdict.fallback else 0.0
    old: FlightResult | None = None
    try:
        if leads and not (port.native or soft):
            await _lead_flight(port, job, flight, found)
        else:
            old = await _wait_for_flight(port, job, flight, found, leads, soft)
    finally:
        FLIGHTS.forget_wait(flight)
    if old is not None:
        record_flight_result(job, old)
        return old.value
    result = flight.result
    if result is None:
        return LOOK_UP_AGAIN
    return await answer_from_flight(port, job, result, leads, begun)


async def _wait_for_flight(
    port: Port, job: Job, flight: Flight, found: Answer, leads: bool, soft: float
) -> FlightResult | None:
    """Wait until a flight has ended or is lost.

    Args:
        soft: seconds after which a valid old value is returned while the computation goes on; 0:
            never.

    Returns:
        The old value as a result if the soft timeout has passed, else None.
    """
    waiter = FLIGHTS.add_waiter(flight, port)
    try:
        if leads:
            flight.handle = port.spawn(
                lambda port: _lead_flight(port, job, flight, found),
                f"memo-{job.function.id}",
                lambda: FLIGHTS.abandon(flight),
                own_thread=not port.native,
            )
        if soft and not await port.wait(waiter, soft):
            old = await _old_value(port, job, found, SOFT_TIMEOUT_REASON)
            if old is not None:
                FLIGHTS.keep_running(flight)
                return old
        await wait_until_over(port, flight, waiter, None if leads else LOOP_CHECK_SECONDS)
    finally:
        FLIGHTS.remove_waiter(flight, waiter)
    return None


async def answer_from_flight(
    port: Port, job: Job, result: FlightResult, leads: bool, begun: float
) -> Any:
    """Turn the result of a flight into the answer for one of its callers."""
    if result.cache_failed:
        return await _compute_alone(port, job)
    if leads:
        record_flight_result(job, result, begun)
        return Raised(result.error) if result.error is not None else result.value
    if not result.valid or result.revalidated:
        return LOOK_UP_AGAIN
    if result.error is not None:
        record_stamps(result.stamps)
        waited = time.perf_counter() - begun
        emit(job, events.COALESCED, reason=type(result.error).__name__, seconds=waited)
        return Raised(result.error)
    if job.chain.latest_answers.is_newer_than(job.call.text, result.started):
        return LOOK_UP_AGAIN
    if result.encoded is None:
        return await _compute_alone(port, job)
    value = await _copy_result(port, job, result.encoded)
    if value is NOTHING:
        return await _compute_alone(port, job)
    cost = result.entry.times.cost / SECOND if result.entry else 0.0
    _emit_coalesced(job, begun, cost)
    record_flight_result(job, result, begun)
    return value


async def _copy_result(port: Port, job: Job, encoded: codec.Encoded) -> Any:
    """Make a copy of a result for a caller that joined its flight."""

    def make() -> Any:
        if encoded.payload is None:
            return codec.decode(encoded.stream, None, (), encoded.flags)
        return codec.unpickled(encoded.stream, codec.copies(encoded.payload.views))

    try:
        return await port.offload(make)
    except EntryError as error:
        emit(job, events.ERROR, reason=error.reason, detail=str(error))
        return NOTHING


async def _compute_alone(port: Port, job: Job) -> Any:
    """Compute for one caller only, because the result cannot be copied or the cache has failed."""
    started = job.chain.latest_answers.start_time(job.call.text, job.chain.clock)
    outcome = await invoke(port, job)
    record_stamps(None)
    if outcome.error is None:
        job.chain.latest_answers.record(job.call.text, started)
    return Raised(outcome.error) if outcome.error is not None else outcome.value


# --- computing -----------------------------------------------------------------------------------


async def _lead_flight(port: Port, job: Job, flight: Flight, found: Answer) -> None:
    """Compute for all callers of the flight; whatever happens, end the flight."""
    result: FlightResult | None = None
    try:
        result = await _compute_as_leader(port, job, flight, found)
    except Exception as error:  # a fault in memo: errors of the user's function are in the result
        emit(job, events.ERROR, reason="engine", detail=error_text(error))
        result = FlightResult(cache_failed=True)
    finally:
        FLIGHTS.finish(flight, result)


async def _compute_as_leader(
    port: Port, job: Job, flight: Flight, found: Answer
) -> FlightResult | None:
    """Compute and return the result; None if another process stored one in the meantime."""
    function = job.function
    lease = await acquire_lease(
        *(port, job.chain, job.name, function.policy, flight),
        expected=function.history.last_duration,
        make_lookup=partial(prepare_lookup, port, job),
    )
    try:
        renewable = found.verdict.renewable
        if lease is not None and await stored_by_another(port, job, lease, found):
            return None
        if renewable:
            renewed = await revalidate(port, job, flight, found)
            if renewed is not None:
                return await close_flight(port, job, flight, renewed)
        result = await compute(port, job, flight, errors=not found.verdict.fallback)
    finally:
        if lease is not None:
            await lease.release(port, job.chain.uploads.get(job.name))
    if result.error is not None and found.verdict.fallback and found.entry is not None:
        result = await fall_back(port, job, found, result)
    return await close_flight(port, job, flight, result)


async def prepare_lookup(port: Port, job: Job) -> PendingLookup | None:
    """Make the lookup for `stored_by_another`, to be sent in the exchange that takes the lease."""
    with lock_patience(job.function.policy):
        return await job.chain.prepare_lookup(port, job.function.id, job.call.text, job.call.refs)


async def stored_by_another(port: Port, job: Job, lease: Lease, before: Answer) -> bool:
    """True if another process stored a fresh result before this one got the lease.

    Args:
        before: the earlier answer; if its entry was unusable, only a later entry counts.
    """
    if lease.acquired and lease.waited >= MIN_WAITED_SECONDS:
        emit(job, events.WAITED, seconds=lease.waited)
    chain, function, call = job.chain, job.function, job.call
    with lock_patience(function.policy):
        job.pending_lookup = lease.pending_lookup or await chain.lookup_with_stamps(
            port, function.id, call.text, call.refs
        )
        found = await chain.lookup(port, function.id, call.text, function.judge, job.pending_lookup)
    if found.verdict.kind != FRESH or found.entry is None:
        return False
    unusable = None if before.verdict.renewable else before.entry
    return unusable is None or found.entry.times.started > unusable.times.started


async def fall_back(port: Port, job: Job, found: Answer, result: FlightResult) -> FlightResult:
    """Replace an error by the old value (`stale_if_error`), unless that was invalidated."""
    old = await _old_value(port, job, found, f"error: {type(result.error).__name__}")
    pause = job.function.policy.retry_after
    if old is not None and pause:
        pause_after_failure(job, pause)
    return result if old is None else old


async def _during_retry_pause(port: Port, job: Job, found: Answer) -> Any:
    """Return the old value during the pause after a failure (`retry_after`), else `NOTHING`."""
    if not (found.verdict.fallback and job.function.policy.retry_after):
        return NOTHING
    until, _ = job.function.history.backoff.get(job.call.text, (0.0, 0.0))
    if time.monotonic() >= until:
        return NOTHING
    old = await _old_value(port, job, found, "retry_after")
    if old is None:
        return NOTHING
    record_flight_result(job, old)
    return old.value


async def _old_value(port: Port, job: Job, found: Answer, reason: str) -> FlightResult | None:
    """Return the expired value as a result; None if it was invalidated or does not load."""
    assert found.entry is not None
    if not may_fall_back(await job.chain.authorities.why_invalid(port, found.entry.stamps)):
        return None
    try:
        value = await load(port, found)
    except (EntryError, TierError):
        return None
    started, used = found.entry.times.started, found.entry.stamps
    job.chain.latest_answers.record(job.call.text, started)
    emit(job, events.STALE, tier=found.tier, reason=reason)
    whole = found.entry.header.flags & seal.STREAM  # a stream is read from its first item
    encoded = None if whole else await encode(port, job, value)
    return FlightResult(
        value, None, found.entry, encoded, stamps=used, known_stamps=used, started=started
    )


# --- the other methods of a decorated function ----------------------------------------------------


async def _make_job(
    port: Port, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Job:
    await reload_live_if_due(port, function)
    job = Job(
        function, function.chain(), await make_call(port, function, args, kwargs), args, kwargs
    )
    return await rekey(port, job) or job


def is_inside_computation() -> bool:
    """True if the running code is part of a cached computation, which records what it uses."""
    reads = USED_CALLS.get()
    return reads is not None and not reads.over


async def read_stored(
    port: Port, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """Return the stored value if it may be used now, else `NOTHING`; never compute or refresh."""
    return await read_entry(port, await _make_job(port, function, args, kwargs))


async def read_entry(port: Port, job: Job) -> Any:
    """Return the stored value of a call if it may be used now, else `NOTHING`; emit the event."""
    begun = time.perf_counter()
    found, value = await look_up_and_load(port, job)
    if value is NOTHING:
        emit(job, events.MISS, reason=found.verdict.reason)
    else:
        emit_hit(job, found, begun, was_missing=False)
    return value


async def put(
    port: Port,
    function: Function,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    value: Any,
) -> None:
    """Store a value as the result of a call, with stamps taken now."""
    job = await _make_job(port, function, args, kwargs)
    await computing.put(port, [job], [value])


async def refresh(
    port: Port,
    function: Function,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    keep: bool = True,
) -> Any:
    """Compute a call now and store the result; return its value, or `Raised`.

    Args:
        keep: store the result.

    Raises:
        ReentryError: the running code is part of the computation of the same key.
    """
    job = await _make_job(port, function, args, kwargs)
    call = job.call
    refuse_reentry(job.name)
    flight = Flight(job.name, call.refs, background=False)
    try:
        with excluded_from_own_time():
            result = await compute(port, job, flight, keep=keep)
    finally:
        flight.over = True
    record_flight_result(job, result)
    return Raised(result.error) if result.error is not None else result.value


async def peek(
    port: Port, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any], default: Any
) -> Any:
    """Return the stored value if it may be used now, else `default`; never compute."""
    value = await peek_entry(port, await _make_job(port, function, args, kwargs))
    return default if value is NOTHING else value


async def peek_entry(port: Port, job: Job) -> Any:
    """Return the stored value of a call if it may be used now, else `NOTHING`; emit no event."""
    found, value = await look_up_and_load(port, job)
    if value is NOTHING or type(value) is Raised:
        return NOTHING
    assert found.entry is not None
    job.chain.latest_answers.record(job.call.text, found.entry.times.started)
    record_entry(job.function, job.chain, job.call, found.entry)
    return value


async def is_cached(
    port: Port, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> bool:
    """True if this call would be answered from the cache; the value is not loaded."""
    return await has_usable_entry(port, await _make_job(port, function, args, kwargs))


async def has_usable_entry(port: Port, job: Job) -> bool:
    """True if a call would be answered from the cache; the value is not loaded."""
    found = await job.chain.lookup(port, job.function.id, job.call.text, job.function.judge)
    return found.verdict.kind != MISS
