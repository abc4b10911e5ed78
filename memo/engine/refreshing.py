"""Refresh stale values, and revalidate values whose inputs may have changed.

A stale value is recomputed in the background, once per key and cluster.  A value that was built
on results of `cutoff` functions stays valid, without a computation, if those turn out equal again.
"""

from __future__ import annotations

import functools
import itertools
import time
from binascii import a2b_base64
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

from memo.coordination.flights import (
    FLIGHTS,
    Flight,
    FlightResult,
    current_path,
    inside,
    on_path,
)
from memo.coordination.leases import acquire_lease, free_lost_lease
from memo.engine import used_calls
from memo.engine.call import Function, Job, Raised, cutoff_function, emit, make_call
from memo.engine.computing import ARGUMENTS_CHANGED, close_flight, compute, store_with_new_stamps
from memo.engine.loading import load
from memo.engine.used_calls import USED_CALLS, UsedCalls
from memo.errors import EntryError, MemoError, TierError
from memo.keys.call_keys import Call
from memo.records import codec
from memo.records.stamp_types import Result
from memo.runtime import events
from memo.runtime.blocking import BLOCKING, drive
from memo.runtime.clock import SECOND
from memo.runtime.events import STALE
from memo.runtime.memory_budget import remember
from memo.runtime.native import run_elsewhere
from memo.runtime.port import Port
from memo.runtime.reasons import INVALIDATED
from memo.stores.chain import Answer
from memo.validity import results
from memo.validity.check import FRESH, Unconfirmed
from memo.validity.results import UsedResult

REFRESH_BACKOFF_SECONDS = (1.0, 60.0)
"""Pause after a failed refresh in seconds: first and longest; each failure doubles it."""
MAX_PAUSED_KEYS = 4096
"""Maximum number of keys of a function whose pause is remembered."""
REFRESH_RECHECK_SECONDS = 0.2
"""Seconds without a new attempt after another process turned out to be refreshing the value."""


async def revalidate(
    port: Port, job: Job, flight: Flight, found: Answer, *, background: bool = False
) -> FlightResult | None:
    """Confirm a value if the results that it was built on are equal when they are got again.

    They are got in the order of their first use, concurrently if they were used concurrently, up to
    the first one that differs: later ones may depend on it.

    Args:
        found: an answer whose entry is `Unconfirmed`.
        background: no caller waits for it.

    Returns:
        The result, or None if the value is not confirmed.
    """
    entry, begun = found.entry, time.perf_counter()
    assert entry is not None
    waited_for = not (background or used_calls.in_background())
    absolute, used_results = results.unflatten(entry.stamps)
    used_calls.follow_threads()
    try:
        with inside(flight, background=background):
            confirmed = await _confirm_results(port, job, used_results)
        if confirmed is None:
            return None
        own = results.own_result(entry.stamps)
        known = (*results.flatten(absolute, confirmed), *([] if own is None else [own]))
        value = await load(port, found)
        kept = await store_with_new_stamps(port, job, found, known)
    except (EntryError, TierError) as error:
        emit(job, events.ERROR, reason="renewing", detail=str(error))
        return None
    taken = time.perf_counter() - begun
    saved = max(0.0, entry.times.cost / SECOND - taken) if waited_for else 0.0
    why = events.BY_REFRESH if background else found.verdict.reason
    emit(job, events.REVALIDATED, reason=why, seconds=taken, size=kept.size, saved=saved)
    started = entry.times.started
    return FlightResult(
        value, None, kept, stamps=known, known_stamps=known, started=started, revalidated=True
    )


async def _confirm_results(
    port: Port, job: Job, used_results: Sequence[UsedResult]
) -> list[UsedResult] | None:
    """Return the results that a value was built on, with new stamps; None if one differs."""
    used_results = list(used_results)
    doubts = await job.chain.authorities.why_changed(port, used_results)
    doubtful = [at for at, doubt in enumerate(doubts) if doubt]
    for wave, group in itertools.groupby(doubtful, lambda at: used_results[at].result.wave):
        places = list(group)
        found = await _ask_together(port, [used_results[at].result for at in places])
        for at, again in zip(places, found, strict=False):
            if again is None:
                return None
            used_results[at] = again._replace(result=again.result._replace(wave=wave))
    return used_results


async def _ask_together(port: Port, wanted: Sequence[Result]) -> list[UsedResult | None]:
    """Get several results again: concurrently on an event loop, else up to the first None."""
    found: list[UsedResult | None] = []
    if not port.native or len(wanted) == 1:
        for result in wanted:
            found.append(await ask_again(port, result))
            if found[-1] is None:
                break
        return found
    found += [None] * len(wanted)

    async def one(port: Port, at: int) -> None:
        found[at] = await ask_again(port, wanted[at])

    waiters = [port.waiter() for _ in wanted]
    handles = [
        port.spawn(functools.partial(one, at=at), "memo-ask", waiter.set)
        for at, waiter in enumerate(waiters)
    ]
    try:
        for waiter in waiters:
            await port.wait(waiter, None)
    except BaseException:
        for handle in handles:
            handle.cancel()
        raise
    return found


async def ask_again(port: Port, result: Result) -> UsedResult | None:
    """Get a result again; return it with its new stamps, or None if it differs."""
    reads = UsedCalls(background=True)
    token = USED_CALLS.set(reads)
    try:
        answered = await call_again(port, result)
    finally:
        USED_CALLS.reset(token)
        reads.over = True
    if not answered or not reads.sound:
        return None
    for used_result in reads.used_results():
        new = used_result.result
        if (new.function, new.key, new.digest) == (result.function, result.key, result.digest):
            return used_result
    return None


async def call_again(port: Port, result: Result) -> bool:
    """Call a `cutoff` function again; True if it returned, and its key is still the same."""
    function, arguments = cutoff_function(result.function), _arguments_of(result)
    if function is None or arguments is None:
        return False
    args, kwargs = arguments
    try:
        call = await make_call(port, function, *function.key_arguments(args, kwargs))
        if call.text != result.key:  # the code or the state of `self` has changed
            return False
        if function.is_async == port.native:
            value = await function.answer(port, function, call, args, kwargs)
        elif port.native:
            value = await port.offload(
                lambda: drive(function.answer(BLOCKING, function, call, args, kwargs)),
                own_thread=True,
            )
        else:
            value = run_elsewhere(_for_other_thread(function, call, args, kwargs))
    except (MemoError, TypeError):  # the computation will meet the same error
        return False
    return type(value) is not Raised


def _for_other_thread(
    function: Function, call: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Callable[[Port], Coroutine[Any, Any, Any]]:
    """Wrap a call for another thread's event loop, as part of the computation that runs here."""
    reads, path = USED_CALLS.get(), current_path()

    async def work(port: Port) -> Any:
        token = USED_CALLS.set(reads)
        try:
            with on_path(path):
                return await function.answer(port, function, call, args, kwargs)
        finally:
            USED_CALLS.reset(token)

    return work


def _arguments_of(result: Result) -> tuple[tuple[object, ...], dict[str, object]] | None:
    """Return the arguments of a result's call; None if they were not kept or do not load."""
    if not result.arguments:
        return None
    try:
        args, kwargs = codec.unpickled(memoryview(a2b_base64(result.arguments)))
    except (EntryError, ValueError, TypeError):
        return None
    return args, kwargs


def refresh_in_background(port: Port, job: Job) -> None:
    """Refresh a stale value in the background, unless a refresh is in progress or just failed."""
    until, _ = job.function.history.backoff.get(job.call.text, (0.0, 0.0))
    if time.monotonic() < until:
        return
    flight, leads = FLIGHTS.join(job.name, job.call.refs, background=True)
    if leads:
        flight.handle = port.spawn(
            lambda port: _refresh(port, job, flight),
            f"memo-refresh-{job.function.id}",
            lambda: FLIGHTS.abandon(flight),
        )
    elif FLIGHTS.abandon_if_lost(flight):
        port.spawn(lambda port: free_lost_lease(port, flight), "memo-let-go")


async def _refresh(port: Port, job: Job, flight: Flight) -> None:
    """Run one refresh, and end its flight whatever happens."""
    if not FLIGHTS.begin_refresh(flight):
        return
    result: FlightResult | None = None
    begun = time.perf_counter()
    emit(job, events.REFRESH_STARTED)
    kind, reason = events.REFRESH_FAILED, "dropped"
    try:
        function = job.function
        lease = await acquire_lease(
            *(port, job.chain, job.name, function.policy, flight),
            refresh=True,
            expected=function.history.last_duration,
        )
        assert lease is not None
        try:
            if lease.acquired and not await _was_refreshed_elsewhere(port, job):
                result = await _revalidate_or_compute(port, job, flight)
        finally:
            await lease.release(port, job.chain.uploads.get(job.name))
        kind, reason = _end_refresh(job, result)
    finally:
        FLIGHTS.finish(flight, result)
        emit(job, kind, reason=reason, seconds=time.perf_counter() - begun)


async def _revalidate_or_compute(port: Port, job: Job, flight: Flight) -> FlightResult:
    result = await _revalidate_if_unconfirmed(port, job, flight)
    if result is None:
        result = await compute(port, job, flight, background=True)
    return await close_flight(port, job, flight, result)


async def _revalidate_if_unconfirmed(port: Port, job: Job, flight: Flight) -> FlightResult | None:
    """Revalidate a value that is stale only because results that it was built on may differ."""
    found = await job.chain.lookup(port, job.function.id, job.call.text, job.function.judge)
    if found.verdict.kind != STALE or found.entry is None or not found.entry.results:
        return None
    if not isinstance(
        await job.chain.authorities.why_invalid(port, found.entry.stamps), Unconfirmed
    ):
        return None
    return await revalidate(port, job, flight, found, background=True)


async def _was_refreshed_elsewhere(port: Port, job: Job) -> bool:
    """True if another process has refreshed the entry; drop the old one from the memory tier."""
    front = job.chain.front
    if front is None or len(job.chain.tiers) == 1:
        return False
    found = await job.chain.lookup(
        port, job.function.id, job.call.text, job.function.judge, exclude=front
    )
    if found.verdict.kind == FRESH:
        await front.drop(port, job.name)
    return found.verdict.kind == FRESH


def _end_refresh(job: Job, result: FlightResult | None) -> tuple[str, str]:
    """Set the backoff after a refresh; return the kind and the reason of the event that ends it."""
    backoff, key = job.function.history.backoff, job.call.text
    if result is None:  # another process is refreshing it, or just has
        backoff[key] = (time.monotonic() + REFRESH_RECHECK_SECONDS, 0.0)
        return events.REFRESH_DONE, events.REFRESHED_ELSEWHERE
    if result.cache_failed:
        return events.REFRESH_FAILED, ARGUMENTS_CHANGED
    if result.error is None:
        backoff.pop(key, None)
        if not result.valid:
            return events.REFRESH_FAILED, INVALIDATED
        return events.REFRESH_DONE, ""
    pause = min(
        REFRESH_BACKOFF_SECONDS[1],
        max(REFRESH_BACKOFF_SECONDS[0], backoff.get(key, (0.0, 0.0))[1] * 2),
    )
    pause_after_failure(job, max(pause, job.function.policy.retry_after))
    return events.REFRESH_FAILED, type(result.error).__name__


def pause_after_failure(job: Job, pause: float) -> None:
    """For some seconds, let the old value answer without another try to compute."""
    until = time.monotonic() + pause
    remember(job.function.history.backoff, job.call.text, (until, pause), MAX_PAUSED_KEYS)
