"""`Tracer` on OpenTelemetry's SDK, to a collector over OTLP/HTTP. Imported only where tracing is set up.

The provider is our own and not OpenTelemetry's global one: a producer is a library in somebody's program.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from flawstream.telemetry.traces import Attributes, Stage
from schemas.settings import TracingSettings

_W3C = TraceContextTextMapPropagator()
_PATH = "/v1/traces"


class OtelTracer:
    """A `Tracer` that sends spans in batches, from a thread of its own.

    Args:
        settings: Where to; the endpoint is set.
    """

    def __init__(self, settings: TracingSettings) -> None:
        resource = Resource.create({"service.name": settings.service_name, "service.version": version("flawstream")})
        self._provider = TracerProvider(sampler=ParentBasedTraceIdRatio(settings.sample_ratio), resource=resource)
        endpoint = f"{(settings.endpoint or '').rstrip('/').removesuffix(_PATH)}{_PATH}"
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint)))
        self._tracer = self._provider.get_tracer("flawstream")

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()

    @contextmanager
    def push(self, traceparent: str | None, attributes: Attributes) -> Iterator[str | None]:
        """Make a span of a push, and give its own traceparent to send along."""
        parent = _context(traceparent) if traceparent else otel_context.get_current()
        with self._tracer.start_as_current_span(
            "flawstream.push", parent, SpanKind.PRODUCER, attributes=_semantic(attributes)
        ):
            carried: dict[str, str] = {}
            _W3C.inject(carried)
            yield carried.get("traceparent", traceparent)

    def image(
        self, traceparent: str | None, whole: Stage, parts: Sequence[Stage], attributes: Attributes, error: str | None
    ) -> None:
        """Make the spans of an image that has ended."""
        span = self._tracer.start_span(
            f"flawstream.{whole.name}",
            _context(traceparent),
            SpanKind.CONSUMER,
            _semantic(attributes),
            start_time=whole.start_ns,
        )
        if span.is_recording():
            within = trace.set_span_in_context(span, Context())
            for part in parts:
                self._tracer.start_span(f"flawstream.{part.name}", within, start_time=part.start_ns).end(part.end_ns)
            if error is not None:
                span.set_status(Status(StatusCode.ERROR, error))
        span.end(whole.end_ns)


def _context(traceparent: str | None) -> Context:
    return _W3C.extract({"traceparent": traceparent} if traceparent else {}, Context())


def _semantic(attributes: Attributes) -> Mapping[str, str | int | float]:
    """Name attributes as OpenTelemetry asks, by the application they belong to."""
    return {"messaging.system": "redis_streams"} | {f"flawstream.{name}": value for name, value in attributes.items()}
