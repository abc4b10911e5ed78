"""Answer a call: from the cache, from a computation under way, or by computing it.

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

from memo.engine import computing
from memo.engine.call import (
    NOTHING,
    Function,
    Job,
    Raised,
    emit,
    error_text,
    is_resource_failure,
    make_call,
    read_live,
)
from memo.engine.computing import close_flight, compute, encode, invoke, warn_of_change
from memo.engine.coordination.flights import (
    FLIGHTS,
    Flight,
    FlightResult,
    refuse_reentry,
)
from memo.engine.coordination.leases import (
    LOOK_AGAIN,
    Lease,
    acquire_lease,
    patience,
    wait_until_over,
)
from memo.engine.loading import BIG, load, look_and_load
from memo.engine.refreshing import pause_after_failure, refresh_in_background, revalidate
from memo.engine.used_calls import (
    CURRENT,
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
from memo.runtime.named_tuple import new_tuple
from memo.runtime.port import Port
from memo.runtime.reasons import EXPIRED, SOURCE_UNREACHABLE, UNREACHABLE
from memo.settings.live_values import live
from memo.stores.chain import Answer, Chain
from memo.stores.protocols import MEMORY, REDIS, PendingLookup
from memo.validity.check import FRESH, MISS, STALE, Verdict, expiry, judge

WAITED_AT_LEAST = 0.001
"""A lease that was taken within this many seconds counts as free: nothing was waited for."""
SOFT_TIMEOUT = "soft_timeout"
"""Reason of a stale answer: the computation takes longer than `soft_timeout`."""


LOOK_UP_AGAIN = object()


# --- answers -------------------------------------------------------------------------------------


def at_hand(port: Callable[[], Port], function: Function, call: Call, begun: float) -> Any:
    """Return the value of a call from the first tier, without a coroutine.

    The most frequent kind of hit, a fresh entry in memory, ends here.

    Args:
        port: called for the port only if one is needed.
        begun: when the call began, by `time.perf_counter`.

    Returns:
        The value; or a `PendingLookup`, for `settled`; or `NOTHING`: `answer` the call.
    """
    chain = function.chain()
    try:
        found = chain.at_hand(port, function.id, call.text, FLIGHTS.ended)
    except Exception as error:
        if not is_resource_failure(error):
            raise
        return NOTHING
    if type(found) is Entry:
        return _value(function, chain, call, found, begun, chain.first)
    return NOTHING if found is None else found


def settled(function: Function, call: Call, asked: PendingLookup, begun: float) -> Any:
    """Return the value of a call once its pending query is answered, or `NOTHING`."""
    chain = function.chain()
    if asked.chain is not chain:  # the settings have changed
        return NOTHING
    entry = chain.finish_lookup(asked, call.text)
    if entry is None:
        return NOTHING
    tier = MEMORY if asked.entry is not None else REDIS
    return _value(function, chain, call, entry, begun, tier)


def _value(
    function: Function, chain: Chain, call: Call, entry: Entry, begun: float, tier: str
) -> Any:
    """Return the value of a valid entry that is fresh, small and loads, or `NOTHING`."""
    if len(entry.stream) > BIG:
        return NOTHING
    rules, ttl, times = function.policy, None, entry.times
    if rules.ttl_key is not None:
        if live.due():
            return NOTHING
        ttl = function.live_ttl()
    if judge(times, rules, chain.clock, ttl).kind != FRESH:
        return NOTHING
    try:
        value = codec.decode(entry.stream, None, ())
    except EntryError:
        return NOTHING  # `look` meets the same error, and reports it
    started, _, _, _, _, _, cost = times
    key = call.text
    if not chain.latest_answers.accept(key, started):
        return NOTHING
    reads = CURRENT.get()
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
    asked: PendingLookup | None = None,
) -> Any:
    """Answer a call by the general path; return its value, or `Raised`.

    Args:
        asked: the query that `at_hand` sent, now answered.
    """
    with excluded_from_own_time():
        return await _answer(port, function, call, args, kwargs, asked)


async def adopt_findings(port: Port, job: Job) -> bool:
    """Learn from other hosts which state a function changes itself; True: keys may differ."""
    keyer = job.function.keyer
    if not keyer.identity.may_change_state(keyer.owner(job.args)):
        return False
    findings = await job.chain.findings.of(port, job.function.id)
    return findings is not None and keyer.identity.adopt_findings(findings)


async def rekeyed(port: Port, job: Job) -> Job | None:
    """Return the job under the key that other hosts' findings give it; None if it is the same."""
    if not await adopt_findings(port, job):
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
    around, begun = CURRENT.get(), time.perf_counter()
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
    asked: PendingLookup | None,
) -> Any:
    begun = time.perf_counter()
    await read_live(port, function)
    job = Job(function, function.chain(), call, args, kwargs)
    if asked is not None and (asked.chain is not job.chain or asked.entry is not None):
        asked = None
    missed = False
    while True:
        since = FLIGHTS.ended if asked is None else asked.since
        found, value = await look_up(port, job, begun, asked, shared=missed)
        asked = None
        if value is not NOTHING:
            return value
        if (other := await rekeyed(port, job)) is not None:
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
    asked: PendingLookup | None = None,
    *,
    shared: bool,
    refreshing: Callable[[], Job] | None = None,
) -> tuple[Answer, Any]:
    """Look a call up; if its stored value may answer, emit the event of that.

    The value is `NOTHING` if it may not answer, or if the process lacks the resources to look.

    Args:
        begun: when the call began, on the performance counter.

    Returns:
        The value; or a `PendingLookup` for `settled`; or `NOTHING`: `answer` the call.
        asked: see `Chain.lookup`.
        shared: see `emit_hit`.
        refreshing: gives the job that refreshes a stale value; None: `job` does.
    """
    try:
        found, value = await look_and_load(port, job, asked)
    except Exception as error:
        if not is_resource_failure(error):
            raise
        found, value = Answer(Verdict(MISS, UNREACHABLE)), NOTHING
    if value is NOTHING:
        return found, await _during_retry_pause(port, job, found)
    emit_hit(job, found, begun, shared=shared)
    if found.verdict.kind == STALE:
        refresh_in_background(port, job if refreshing is None else refreshing())
    return found, value


def emit_hit(job: Job, found: Answer, begun: float, *, shared: bool) -> None:
    """Emit the event of an answer from the cache.

    Args:
        shared: it was missing at first: another caller or process has computed it meanwhile.
    """
    assert found.entry is not None
    times = found.entry.times
    job.chain.latest_answers.record(job.call.text, times.started)
    stale = found.verdict.kind == STALE
    late = stale and found.verdict.reason == EXPIRED
    record_entry(job.function, job.chain, job.call, found.entry, begun, stale=late)
    if shared and not stale:
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
    """Emit the event of an answer that another caller or process computed during this call."""
    waited = time.perf_counter() - begun
    saved = 0.0 if in_background() else max(0.0, cost - waited)
    emit(job, events.COALESCED, seconds=waited, saved=saved)


async def _lead_or_join(port: Port, job: Job, found: Answer, since: int, begun: float) -> Any:
    flight, leads = FLIGHTS.join_since(job.name, job.call.refs, since)
    if flight is None:
        return LOOK_UP_AGAIN
    soft = job.function.policy.soft_timeout if found.verdict.fallback else 0.0
    old: FlightResult | None = None
    try:
        if leads and not (port.native or soft):
            await _lead(port, job, flight, found)
        else:
            old = await _wait(port, job, flight, found, leads, soft)
    finally:
        FLIGHTS.forget_wait(flight)
    if old is not None:
        record_flight_result(job, old)
        return old.value
    result = flight.result
    if result is None:
        return LOOK_UP_AGAIN
    return await answer_from_flight(port, job, result, leads, begun)


async def _wait(
    port: Port, job: Job, flight: Flight, found: Answer, leads: bool, soft: float
) -> FlightResult | None:
    """Wait until a flight has ended or is known to be lost.

    Args:
        soft: seconds after which the old value is returned if it is still valid, while the
            computation goes on; 0: never.

    Returns:
        The old value as a result if the soft timeout has passed, else None.
    """
    waiter = FLIGHTS.add_waiter(flight, port)
    try:
        if leads:
            flight.handle = port.spawn(
                lambda port: _lead(port, job, flight, found),
                f"memo-{job.function.id}",
                lambda: FLIGHTS.abandon(flight),
                apart=not port.native,
            )
        if soft and not await port.wait(waiter, soft):
            old = await _old_value(port, job, found, SOFT_TIMEOUT)
            if old is not None:
                FLIGHTS.keep_running(flight)
                return old
        await wait_until_over(port, flight, waiter, None if leads else LOOK_AGAIN)
    finally:
        FLIGHTS.remove_waiter(flight, waiter)
    return None


async def answer_from_flight(
    port: Port, job: Job, result: FlightResult, leads: bool, begun: float
) -> Any:
    """Turn the outcome of a flight into the answer of one caller that waited for it."""
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
    value = await _copy(port, job, result.encoded)
    if value is NOTHING:
        return await _compute_alone(port, job)
    cost = result.entry.times.cost / SECOND if result.entry else 0.0
    _emit_coalesced(job, begun, cost)
    record_flight_result(job, result, begun)
    return value


async def _copy(port: Port, job: Job, encoded: codec.Encoded) -> Any:
    """Return a joiner's own copy of a result that has just been computed."""

    def make() -> Any:
        payload: memoryview | None = None
        table: tuple[seal.Buffer, ...] = ()
        if encoded.payload is not None:
            table = encoded.payload.table
            payload = memoryview(bytearray(codec.aligned_bytes(encoded.payload)))
        return codec.decode(encoded.stream, payload, table, encoded.flags)

    try:
        return await port.offload(make)
    except EntryError as error:
        emit(job, events.ERROR, reason=error.reason, detail=str(error))
        return NOTHING


async def _compute_alone(port: Port, job: Job) -> Any:
    """Compute for one caller only, since the result cannot be copied or the cache has failed."""
    started = job.chain.latest_answers.start_time(job.call.text, job.chain.clock)
    outcome = await invoke(port, job)
    record_stamps(None)
    if outcome.error is None:
        job.chain.latest_answers.record(job.call.text, started)
    return Raised(outcome.error) if outcome.error is not None else outcome.value


# --- computing -----------------------------------------------------------------------------------


async def _lead(port: Port, job: Job, flight: Flight, found: Answer) -> None:
    """Compute for all callers of the flight, and end the flight in any case."""
    result: FlightResult | None = None
    try:
        result = await _compute_as_leader(port, job, flight, found)
    except Exception as error:  # an error of memo: the user's are in the result
        emit(job, events.ERROR, reason="engine", detail=error_text(error))
        result = FlightResult(cache_failed=True)
    finally:
        FLIGHTS.finish(flight, result)


async def _compute_as_leader(
    port: Port, job: Job, flight: Flight, found: Answer
) -> FlightResult | None:
    """Compute and return the result; None if another process has stored a result meanwhile."""
    function = job.function
    held = await acquire_lease(
        *(port, job.chain, job.name, function.policy, flight),
        expected=function.last_duration,
        question=partial(lookup_with_lease, port, job),
    )
    try:
        renewable = found.verdict.renewable
        if held is not None and await stored_by_another(port, job, held, found):
            return None
        if renewable:
            renewed = await revalidate(port, job, flight, found)
            if renewed is not None:
                return await close_flight(port, job, flight, renewed)
        result = await compute(port, job, flight, errors=not found.verdict.fallback)
    finally:
        if held is not None:
            await held.release(port, job.chain.uploads.get(job.name))
    if result.error is not None and found.verdict.fallback and found.entry is not None:
        result = await fall_back(port, job, found, result)
    return await close_flight(port, job, flight, result)


async def lookup_with_lease(port: Port, job: Job) -> PendingLookup | None:
    """Make the look-up of `stored_by_another`, to be sent with the acquisition of the lease."""
    with patience(job.function.policy):
        return await job.chain.prepare_lookup(port, job.function.id, job.call.text, job.call.refs)


async def stored_by_another(port: Port, job: Job, held: Lease, before: Answer) -> bool:
    """True if another process stored a fresh result before this one got the lease.

    Args:
        before: the result of the look-up before; if its entry was unusable, only a later one
            counts.
    """
    if held.acquired and held.waited >= WAITED_AT_LEAST:
        emit(job, events.WAITED, seconds=held.waited)
    chain, function, call = job.chain, job.function, job.call
    with patience(function.policy):
        job.asked = held.asked or await chain.lookup_with_stamps(
            port, function.id, call.text, call.refs
        )
        found = await chain.lookup(port, function.id, call.text, function.judge, job.asked)
    if found.verdict.kind != FRESH or found.entry is None:
        return False
    bad = None if before.verdict.renewable else before.entry
    return bad is None or found.entry.times.started > bad.times.started


async def fall_back(port: Port, job: Job, found: Answer, result: FlightResult) -> FlightResult:
    """Return the old value instead of the error (`stale_if_error`), unless it was invalidated."""
    old = await _old_value(port, job, found, f"error: {type(result.error).__name__}")
    pause = job.function.policy.retry_after
    if old is not None and pause:
        pause_after_failure(job, pause)
    return result if old is None else old


async def _during_retry_pause(port: Port, job: Job, found: Answer) -> Any:
    """Return the old value while retries are paused after a failure, else `NOTHING`."""
    if not (found.verdict.fallback and job.function.policy.retry_after):
        return NOTHING
    until, _ = job.function.backoff.get(job.call.text, (0.0, 0.0))
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
    why = await job.chain.authorities.why_invalid(port, found.entry.stamps)
    if why and why != SOURCE_UNREACHABLE and expiry(why) is None:
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
    await read_live(port, function)
    job = Job(
        function, function.chain(), await make_call(port, function, args, kwargs), args, kwargs
    )
    return await rekeyed(port, job) or job


def is_inside_computation() -> bool:
    """True if a cached computation is running here, so that it must record what it uses."""
    reads = CURRENT.get()
    return reads is not None and not reads.over


async def read_stored(
    port: Port, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """Return the stored value if it may be used now, else `NOTHING`; no computation, no refresh."""
    begun = time.perf_counter()
    job = await _make_job(port, function, args, kwargs)
    found, value = await look_and_load(port, job)
    if value is NOTHING:
        emit(job, events.MISS, reason=found.verdict.reason)
    else:
        emit_hit(job, found, begun, shared=False)
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
    """Compute now, store, and return the value, or `Raised`.

    Args:
        keep: store the result.

    Raises:
        ReentryError: this call runs inside the computation of the same key.
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
    """Return the stored value if it may be used now, else `default`; never computes."""
    job = await _make_job(port, function, args, kwargs)
    found, value = await look_and_load(port, job)
    if value is NOTHING or type(value) is Raised:
        return default
    assert found.entry is not None
    job.chain.latest_answers.record(job.call.text, found.entry.times.started)
    record_entry(function, job.chain, job.call, found.entry)
    return value


async def is_cached(
    port: Port, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> bool:
    """True if this call would be answered from the cache; does not load the value."""
    job = await _make_job(port, function, args, kwargs)
    found = await job.chain.lookup(port, function.id, job.call.text, function.judge)
    return found.verdict.kind != MISS
