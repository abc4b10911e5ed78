"""Refreshing: a stale value is computed anew in the background, once per key and cluster."""

from __future__ import annotations

import time

from memo.engine.call import Job, emit
from memo.engine.computing import CHANGED, close, compute
from memo.engine.coordination.flights import FLIGHTS, Flight, Landing
from memo.engine.coordination.leases import hold, let_go
from memo.runtime import events
from memo.runtime.port import Port
from memo.runtime.reasons import INVALIDATED
from memo.stores.protocols import MEMORY
from memo.validity.lifetimes import FRESH

BACK_OFF = (1.0, 60.0)
"""Seconds before a failed refresh is tried again: the first, doubled each time, up to the last."""
SOON = 0.2
"""Seconds before a refresh that another process has begun is asked about again."""


def refresh_soon(port: Port, job: Job) -> None:
    """Refresh a stale value in the background, unless somebody does or it failed just now."""
    until, _ = job.function.backoff.get(job.call.text, (0.0, 0.0))
    if time.monotonic() < until:
        return
    flight, leads = FLIGHTS.join(job.name, job.call.refs, background=True)
    if leads:
        flight.handle = port.spawn(
            lambda port: _refresh(port, job, flight),
            f"memo-refresh-{job.function.id}",
            lambda: FLIGHTS.abandon(flight),
        )
    elif FLIGHTS.lost(flight):
        port.spawn(lambda port: let_go(port, flight), "memo-let-go")


async def _refresh(port: Port, job: Job, flight: Flight) -> None:
    landing: Landing | None = None
    begun = time.perf_counter()
    emit(job, events.REFRESH_STARTED)
    kind, reason = events.REFRESH_FAILED, "dropped"
    try:
        function = job.function
        held = await hold(
            *(port, job.chain, job.name, function.policy, flight),
            refresh=True,
            expected=function.took,
        )
        assert held is not None
        try:
            if held.mine and not await _done_elsewhere(port, job):
                landing = await compute(port, job, flight, alone=True)
                landing = await close(port, job, flight, landing)
        finally:
            await held.release(port, job.chain.upload(job.name))
        kind, reason = _refresh_ended(job, landing)
    finally:
        FLIGHTS.land(flight, landing)
        emit(job, kind, reason=reason, seconds=time.perf_counter() - begun)


async def _done_elsewhere(port: Port, job: Job) -> bool:
    """Whether another process has refreshed it: then what our memory tier has gives way to that."""
    front, *others = job.chain.tiers
    if front.name != MEMORY or not others:
        return False
    found = await job.chain.lookup(
        port, job.function.id, job.call.text, job.function.judge, behind=front
    )
    if found.verdict.kind == FRESH:
        await front.drop(port, job.name)
    return found.verdict.kind == FRESH


def _refresh_ended(job: Job, landing: Landing | None) -> tuple[str, str]:
    """The kind and the reason of the event that ends a refresh; sets the back-off."""
    backoff, key = job.function.backoff, job.call.text
    if landing is None:  # who has it will have done it soon: do not ask at every stale answer
        backoff[key] = (time.monotonic() + SOON, 0.0)
        return events.REFRESH_DONE, events.ELSEWHERE
    if landing.fault:
        return events.REFRESH_FAILED, CHANGED
    if landing.error is None:
        backoff.pop(key, None)
        if not landing.true:
            return events.REFRESH_FAILED, INVALIDATED
        return events.REFRESH_DONE, ""
    pause = min(BACK_OFF[1], max(BACK_OFF[0], backoff.get(key, (0.0, 0.0))[1] * 2))
    pause_after_failure(job, max(pause, job.function.policy.retry_after))
    return events.REFRESH_FAILED, type(landing.error).__name__


def pause_after_failure(job: Job, pause: float) -> None:
    """Do not compute a call again for some seconds, as long as an old value can answer."""
    backoff = job.function.backoff
    if len(backoff) > 4096:
        backoff.clear()
    backoff[job.call.text] = (time.monotonic() + pause, pause)
