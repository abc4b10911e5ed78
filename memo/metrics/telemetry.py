"""OpenTelemetry: counts and times as metrics, computations as spans.

Hits are read from the counters of the process when metrics are collected, so that a hit only costs
one more histogram; everything else is a hook on the events.  Names follow OpenTelemetry's
conventions: units in UCUM, durations in seconds, `error.type` for the kind of error.  Arguments and
values are never attributes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar, Token
from typing import TYPE_CHECKING, Any, TypeAlias

from memo.errors import MissingExtraError, OptionError, label, public
from memo.metrics.recorder import COUNTERS
from memo.metrics.snapshots import Stats
from memo.runtime import VERSION, events
from memo.runtime.events import Event
from memo.runtime.memory_budget import remember
from memo.runtime.named_tuple import NamedTuple

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.metrics import CallbackOptions, MeterProvider, Observation
    from opentelemetry.trace import Span, SpanContext, TracerProvider
else:
    try:  # so that tools can read the annotations of `instrument`
        from opentelemetry.metrics import MeterProvider
        from opentelemetry.trace import TracerProvider
    except ImportError:
        MeterProvider = TracerProvider = Any

SCOPE = "memo"
"""Name of the instrumentation scope."""
FUNCTION_ATTRIBUTE, TIER_ATTRIBUTE, REASON_ATTRIBUTE, KEY_ATTRIBUTE = (
    "memo.function",
    "memo.tier",
    "memo.reason",
    "memo.key",
)
ERROR_TYPE = "error.type"
MAX_LINKABLE = 4096
"""Recent computations of this process to which later ones can be linked."""


Readings: TypeAlias = "Iterator[tuple[float, dict[str, str]]]"
Read: TypeAlias = "Callable[[Stats], Readings]"


class _OpenSpan(NamedTuple):
    """The span of a running computation, and the context before it."""

    span: Span
    before: Token[Context]
    outer: _OpenSpan | None


_current: ContextVar[_OpenSpan | None] = ContextVar("memo_span", default=None)


class Instrumentation:
    """Instruments and a tracer; an instance is a hook on events."""

    def __init__(self, meters: MeterProvider | None, tracers: TracerProvider | None) -> None:
        from opentelemetry import metrics, trace

        meter = metrics.get_meter(SCOPE, VERSION, meters)
        self._tracer = trace.get_tracer(SCOPE, VERSION, tracers)
        self._contexts: dict[str, SpanContext] = {}
        self._lock = threading.Lock()
        count, times = meter.create_counter, meter.create_histogram
        self._stale = count("memo.stale_hits", "{hit}", "Calls answered by an expired entry")
        self._misses = count("memo.misses", "{miss}", "Calls that no entry could answer")
        self._shared = count(
            "memo.shared", "{call}", "Calls that shared another call's computation"
        )
        self._refreshes = count("memo.refreshes", "{refresh}", "Refreshes in the background")
        self._invalidations = count("memo.invalidations", "{invalidation}", "Invalidations")
        self._errors = count("memo.errors", "{error}", "Faults of the cache, hidden from callers")
        self._stored = count("memo.stored", "By", "Bytes of the results that were stored")
        self._lookup = times("memo.lookup.duration", "s", "Time of the lookups that answered")
        self._compute = times("memo.compute.duration", "s", "Own time of computations")
        self.on = True
        for name, unit, about, read in _COUNTED:
            meter.create_observable_counter(name, [self._reading(read)], unit, about)
        about = "Whether a tier is asked: its breaker is closed"
        meter.create_observable_gauge("memo.tier.up", [self._reading(_up)], "1", about)
        self._handlers: dict[str, Callable[[Event, dict[str, Any]], None]] = {
            events.HIT: self._record_answer,
            events.STALE: self._record_stale_answer,
            events.MISS: self._record_miss,
            events.COALESCED: self._record_shared_answer,
            events.COMPUTE_STARTED: self._begin,
            events.COMPUTE_ENDED: self._end,
            events.STORED: lambda event, at: self._stored.add(event.size, at),
            events.REFRESH_DONE: self._record_refresh,
            events.REFRESH_FAILED: self._record_refresh,
            events.INVALIDATION: lambda event, at: self._invalidations.add(1, at),
            events.ERROR: self._record_fault,
        }

    def _reading(self, read: Read) -> Callable[[CallbackOptions], Iterable[Observation]]:
        """Return the callback of an instrument that is read when metrics are collected."""
        from opentelemetry.metrics import Observation

        def observe(_: CallbackOptions) -> Iterable[Observation]:
            found = list(read(COUNTERS.snapshot())) if self.on else []
            return [Observation(value, attributes) for value, attributes in found]

        return observe

    def __call__(self, event: Event) -> None:
        """Handle an event."""
        handle = self._handlers.get(event.kind)
        if handle is not None:
            handle(event, {FUNCTION_ATTRIBUTE: label(event.function)} if event.function else {})

    def _record_answer(self, event: Event, at: dict[str, Any]) -> None:
        at[TIER_ATTRIBUTE] = event.tier
        self._lookup.record(event.seconds, at)
        self._add_link(event.key)

    def _record_stale_answer(self, event: Event, at: dict[str, Any]) -> None:
        self._record_answer(event, at)
        self._stale.add(1, at)

    def _record_miss(self, event: Event, at: dict[str, Any]) -> None:
        self._misses.add(1, {**at, REASON_ATTRIBUTE: event.reason})

    def _record_shared_answer(self, event: Event, at: dict[str, Any]) -> None:
        self._shared.add(1, at)
        self._add_link(event.key)

    def _record_refresh(self, event: Event, at: dict[str, Any]) -> None:
        if event.reason == events.REFRESHED_ELSEWHERE:
            return
        failed = {ERROR_TYPE: "refresh"} if event.kind == events.REFRESH_FAILED else {}
        self._refreshes.add(1, {**at, **failed})

    def _record_fault(self, event: Event, at: dict[str, Any]) -> None:
        tier = {TIER_ATTRIBUTE: event.tier} if event.tier else {}
        self._errors.add(1, {**at, **tier, ERROR_TYPE: event.reason})

    def _begin(self, event: Event, at: dict[str, Any]) -> None:
        from opentelemetry import context, trace

        facts = {
            **at,
            KEY_ATTRIBUTE: event.key,
            "code.function.name": at[FUNCTION_ATTRIBUTE].replace(":", "."),
        }
        if event.reason:
            facts[REASON_ATTRIBUTE] = event.reason
        span = self._tracer.start_span(at[FUNCTION_ATTRIBUTE], attributes=facts)
        before = context.attach(trace.set_span_in_context(span))
        _current.set(_OpenSpan(span, before, _current.get()))

    def _end(self, event: Event, at: dict[str, Any]) -> None:
        from opentelemetry import context, trace

        failed = {ERROR_TYPE: event.detail} if event.detail else {}
        self._compute.record(event.seconds, {**at, **failed})
        opened = _current.get()
        if opened is None:  # it began before `instrument()`
            return
        _current.set(opened.outer)
        context.detach(opened.before)
        if failed:
            opened.span.set_attributes(failed)
            opened.span.set_status(trace.StatusCode.ERROR)
        opened.span.end()
        with self._lock:
            remember(self._contexts, event.key, opened.span.get_span_context(), MAX_LINKABLE)

    def _add_link(self, key: str) -> None:
        """Link the computation around a call to the one that made the result it uses."""
        around = _current.get()
        made = self._contexts.get(key)
        if around is not None and made is not None:
            around.span.add_link(made, {KEY_ATTRIBUTE: key})


def _hits(now: Stats) -> Readings:
    for name, part in now.functions.items():
        for tier, hits in part.hits_by_tier.items():
            yield hits, {FUNCTION_ATTRIBUTE: label(name), TIER_ATTRIBUTE: tier}


def _of_functions(field: str) -> Read:
    def read(now: Stats) -> Readings:
        for name, part in now.functions.items():
            yield getattr(part, field), {FUNCTION_ATTRIBUTE: label(name)}

    return read


def _up(now: Stats) -> Readings:
    for name, tier in now.tiers.items():
        yield int(tier.up is not False), {TIER_ATTRIBUTE: name}


_COUNTED = (
    ("memo.hits", "{hit}", "Calls answered by a fresh entry", _hits),
    ("memo.read", "By", "Bytes of the entries that answered", _of_functions("bytes_read")),
    ("memo.saved", "s", "Time that callers would have waited longer", _of_functions("saved")),
)
_remove: Callable[[], None] | None = None
_changing = threading.Lock()


@public
def instrument(
    *, meter_provider: MeterProvider | None = None, tracer_provider: TracerProvider | None = None
) -> Callable[[], None]:
    """Report what the cache does to OpenTelemetry from now on, as metrics and spans.

    ::

        memo.instrument()

    Metrics are hits, stale hits, misses, refreshes and errors by function and tier, the times of
    lookups and computations, bytes, the time saved, and the state of each tier.  Each computation
    is a span, linked to the computations of this process whose stored results it used.

    Args:
        meter_provider: receives the metrics; None: the global one.
        tracer_provider: receives the spans; None: the global one.

    Returns:
        A function that stops it.  Another call of `instrument` replaces the first.

    Raises:
        MissingExtraError: the extra `otel` is not installed.
    """
    global _remove
    wanted = (
        ("meter_provider", meter_provider, "get_meter"),
        ("tracer_provider", tracer_provider, "get_tracer"),
    )
    for name, given, method in wanted:
        if given is not None and not hasattr(given, method):
            fix = f"must be a provider of OpenTelemetry, with {method}(); None: the global one."
            raise OptionError(name, given, fix)
    try:
        hook = Instrumentation(meter_provider, tracer_provider)
    except ImportError:
        raise MissingExtraError(
            "memo.instrument() needs OpenTelemetry: pip install 'jupyter-memo[otel]'"
        ) from None
    remove_hook = events.on_event(hook)

    def remove() -> None:
        hook.on = False
        remove_hook()

    with _changing:
        before, _remove = _remove, remove
    if before is not None:
        before()
    return remove
