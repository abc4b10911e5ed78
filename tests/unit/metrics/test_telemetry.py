"""`memo.instrument()`: metrics and spans as an OpenTelemetry SDK and Prometheus receive them."""

from __future__ import annotations

import asyncio
import builtins
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from time_ahead import Ahead

import memo
from memo import cache
from memo.testing import ManualClock, isolated


class Backend:
    """The received data."""

    def __init__(self) -> None:
        self.reader = InMemoryMetricReader()
        self.meters = MeterProvider([self.reader])
        self.exporter = InMemorySpanExporter()
        self.tracers = TracerProvider()
        self.tracers.add_span_processor(SimpleSpanProcessor(self.exporter))

    def metrics(self) -> dict[str, list[Any]]:
        """Name -> data points."""
        data = self.reader.get_metrics_data()
        resources = data.resource_metrics if data else ()
        scopes = [scope for resource in resources for scope in resource.scope_metrics]
        return {m.name: list(m.data.data_points) for scope in scopes for m in scope.metrics}

    def value(self, name: str, **attributes: str) -> float:
        """The sum of the points of a metric with these attributes; of a histogram the count."""
        wanted = {f"memo.{at}": text for at, text in attributes.items()}
        points = [
            point
            for point in self.metrics().get(name, [])
            if wanted.items() <= dict(point.attributes).items()
        ]
        return sum(point.count if hasattr(point, "count") else point.value for point in points)

    def spans(self) -> list[ReadableSpan]:
        """The spans that have ended, in that order."""
        return list(self.exporter.get_finished_spans())


@pytest.fixture
def backend() -> Iterator[Backend]:
    """An SDK in memory, to which memo reports while the test runs."""
    made = Backend()
    stop = memo.instrument(meter_provider=made.meters, tracer_provider=made.tracers)
    yield made
    stop()
    made.meters.shutdown()


def test_calls_are_counted_by_function_tier_and_reason(backend: Backend) -> None:
    """Hits, stale hits, misses, refreshes and invalidations, as the counters have them."""

    @cache(name="etl:load", ttl=60, stale_while_revalidate=600)
    def load(x: int) -> bytes:
        return b"x" * 5000

    clock = ManualClock()
    with isolated(clock=clock):
        load(1)
        load(1)
        load(1)
        load.invalidate()
        load(1)
        clock.advance(61)
        load(1)
        from memo.runtime.blocking import drain_blocking

        assert drain_blocking(10)
    assert backend.value("memo.hits", function="etl:load", tier="memory") == 2
    assert backend.value("memo.misses", function="etl:load", reason="not cached yet") == 1
    assert backend.value("memo.misses", function="etl:load", reason="invalidated") == 1
    assert backend.value("memo.stale_hits", function="etl:load", tier="memory") == 1
    assert backend.value("memo.refreshes", function="etl:load") == 1
    assert backend.value("memo.invalidations") == 1
    assert backend.value("memo.lookup.duration", function="etl:load") == 3
    assert backend.value("memo.compute.duration", function="etl:load") == 3
    assert backend.value("memo.stored", function="etl:load") > 3 * 5000
    assert backend.value("memo.read", function="etl:load") > 3 * 5000
    assert backend.value("memo.tier.up", tier="memory") == 1


def test_times_are_those_of_the_clock(backend: Backend, ahead: Ahead) -> None:
    """A computation's own time is in its histogram, in seconds, without the calls inside it."""

    @cache(name="inner", version="1")
    def inner() -> int:
        ahead.work(0.2)
        return 1

    @cache(name="outer", version="1")
    def outer() -> int:
        ahead.work(0.1)
        return inner()

    with isolated():
        outer()
        outer()
    points = {p.attributes["memo.function"]: p for p in backend.metrics()["memo.compute.duration"]}
    assert points["inner"].sum == pytest.approx(0.2, abs=0.1)
    assert points["outer"].sum == pytest.approx(0.1, abs=0.1)
    assert points["outer"].sum < 0.2
    assert backend.value("memo.saved", function="outer") == pytest.approx(0.3, abs=0.15)


def test_units_follow_the_conventions(backend: Backend) -> None:
    """Seconds are `s`, bytes `By`, counts are annotated."""

    @cache(name="unit")
    def unit() -> int:
        return 1

    with isolated():
        unit()
        unit()
    data = backend.reader.get_metrics_data()
    [scope] = [s for r in data.resource_metrics for s in r.scope_metrics]
    assert (scope.scope.name, scope.scope.version) == ("memo", memo.__version__)
    units = {metric.name: metric.unit for metric in scope.metrics}
    assert units["memo.lookup.duration"] == units["memo.compute.duration"] == "s"
    assert units["memo.stored"] == units["memo.read"] == "By"
    assert units["memo.hits"] == "{hit}"


def test_a_computation_is_a_span(backend: Backend) -> None:
    """Nested computations are child spans; what the function itself starts lies inside, too."""
    tracer = backend.tracers.get_tracer("user")

    @cache(name="etl:load")
    def load(region: str) -> str:
        with tracer.start_as_current_span("query"):
            return region

    @cache(name="etl:report")
    def report() -> str:
        return load("EU")

    with isolated(), tracer.start_as_current_span("request"):
        report()
    query, inner, outer, request = backend.spans()
    assert [s.name for s in (query, inner, outer)] == ["query", "etl:load", "etl:report"]
    assert query.parent == inner.context
    assert inner.parent == outer.context
    assert outer.parent == request.context
    assert inner.kind is SpanKind.INTERNAL
    assert inner.attributes["memo.function"] == "etl:load"
    assert inner.attributes["code.function.name"] == "etl.load"
    assert inner.attributes["memo.key"] == load.key("EU")
    assert inner.status.status_code is StatusCode.UNSET
    assert "EU" not in repr(dict(inner.attributes))


def test_a_span_links_to_what_it_was_built_on(backend: Backend) -> None:
    """A result that was taken from the cache is a link to the span that computed it."""

    @cache(name="load")
    def load(region: str) -> str:
        return region

    @cache(name="report")
    def report() -> list[str]:
        return [load("EU"), load("US")]

    with isolated():
        load("EU")
        report()
    eu, us, outer = backend.spans()
    [link] = outer.links
    assert link.context.span_id == eu.context.span_id
    assert us.parent == outer.context


def test_spans_of_concurrent_coroutines_are_apart(backend: Backend) -> None:
    """Each coroutine's span has its caller as parent, though all run at once."""
    tracer = backend.tracers.get_tracer("user")

    @cache(name="load", version="1")
    async def load(x: int) -> int:
        await together.wait()
        return x

    async def one(x: int) -> None:
        with tracer.start_as_current_span(f"caller {x}"):
            await load(x)

    async def main() -> None:
        await asyncio.gather(*(one(x) for x in range(4)))
        await memo.drain()

    together = asyncio.Barrier(4)

    with isolated():
        asyncio.run(main())
    spans = backend.spans()
    callers = {s.context.span_id: s.name for s in spans if s.name.startswith("caller")}
    loads = [s for s in spans if s.name == "load"]
    assert {callers[s.parent.span_id] for s in loads} == {f"caller {x}" for x in range(4)}


def test_what_raises_is_an_error_with_its_type(backend: Backend) -> None:
    """Span and histogram have `error.type`; the message, which may quote a value, is in neither."""

    @cache(name="fails")
    def fails() -> int:
        raise LookupError("the secret value")

    with isolated(), pytest.raises(LookupError):
        fails()
    [span] = backend.spans()
    assert span.status.status_code is StatusCode.ERROR
    assert span.attributes["error.type"] == "LookupError"
    assert "secret" not in span.to_json()
    [point] = backend.metrics()["memo.compute.duration"]
    assert point.attributes["error.type"] == "LookupError"


@pytest.mark.redis
def test_a_tier_that_is_down_is_shown(backend: Backend, tmp_path: Any) -> None:
    """While a Redis is away its gauge is 0; when it is back, 1."""

    @cache(name="down")
    def load(x: int) -> int:
        return x

    with isolated(redis_url="redis://127.0.0.1:1/0"):
        load(1)
        load(2)
        assert backend.value("memo.tier.up", tier="redis") == 0


def test_instrumenting_again_counts_once(backend: Backend) -> None:
    """A second call replaces the first, and what it gives back ends it."""
    second = Backend()
    stop = memo.instrument(meter_provider=second.meters, tracer_provider=second.tracers)

    @cache(name="once")
    def once() -> int:
        return 1

    with isolated():
        once()
        stop()
        once()
    assert second.value("memo.misses") == 1
    assert second.value("memo.hits") == 0
    assert backend.value("memo.misses") == 0


def test_prometheus_receives_it() -> None:
    """The exporter of Prometheus has the names and labels that its conventions want."""
    from prometheus_client import CollectorRegistry, generate_latest

    reader = PrometheusMetricReader()
    meters = MeterProvider([reader])
    stop = memo.instrument(meter_provider=meters)

    @cache(name="etl:load")
    def load(x: int) -> int:
        return x

    try:
        with isolated():
            load(1)
            load(1)
        registry = CollectorRegistry()
        registry.register(reader._collector)
        text = generate_latest(registry).decode()
    finally:
        stop()
        meters.shutdown()
    lines = text.splitlines()
    [hits] = [line for line in lines if line.startswith("memo_hits_total{")]
    assert 'memo_function="etl:load"' in hits
    assert 'memo_tier="memory"' in hits
    assert hits.endswith(" 1.0")
    assert any(line.startswith("memo_lookup_duration_seconds_bucket{") for line in lines)
    assert any(line.startswith("memo_stored_bytes_total{") for line in lines)


def test_without_the_package_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The message has the install line."""
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("opentelemetry"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(memo.MissingExtraError, match=r"pip install 'jupyter-memo\[otel\]'"):
        memo.instrument()
