"""`Tracer` on OpenTelemetry's SDK, sending to a collector over OTLP/HTTP. Imported only if tracing is configured.

Does not use OpenTelemetry's global provider: a producer is a library in another program.
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

from flawstream.telemetry.traces import Attributes, Span
from schemas.settings import TracingSettings

_W3C = TraceContextTextMapPropagator()
_PATH = "/v1/traces"


class OtelTracer:
    """A `Tracer` that sends spans in batches from a background thread.

    Args:
        settings: With an endpoint.
    """

    def __init__(self, settings: TracingSettings) -> None:
        resource = Resource.create({"service.name": settings.service_name, "service.version": version("flawstream")})
        self._provider = TracerProvider(sampler=ParentBasedTraceIdRatio(settings.sample_ratio), resource=resource)
        endpoint = f"{(settings.endpoint or '').rstrip('/').removesuffix(_PATH)}{_PATH}"
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint)))
        self._tracer = self._provider.get_tracer("flawstream")

    def close(self) -> None:
        """Send the remaining spans."""
        self._provider.shutdown()

    @contextmanager
    def push(self, traceparent: str | None, attributes: Attributes) -> Iterator[str | None]:
        """Create a span for a push and yield its traceparent."""
        parent = _context(traceparent) if traceparent else otel_context.get_current()
        with self._tracer.start_as_current_span(
            "flawstream.push", parent, SpanKind.PRODUCER, attributes=_prefix(attributes)
        ):
            carrier: dict[str, str] = {}
            _W3C.inject(carrier)
            yield carrier.get("traceparent", traceparent)

    def image(
        self, traceparent: str | None, whole: Span, parts: Sequence[Span], attributes: Attributes, error: str | None
    ) -> None:
        """Create the spans of a completed image."""
        span = self._tracer.start_span(
            f"flawstream.{whole.name}",
            _context(traceparent),
            SpanKind.CONSUMER,
            _prefix(attributes),
            start_time=whole.start_ns,
        )
        if span.is_recording():
            parent = trace.set_span_in_context(span, Context())
            for part in parts:
                self._tracer.start_span(f"flawstream.{part.name}", parent, start_time=part.start_ns).end(part.end_ns)
            if error is not None:
                span.set_status(Status(StatusCode.ERROR, error))
        span.end(whole.end_ns)


def _context(traceparent: str | None) -> Context:
    return _W3C.extract({"traceparent": traceparent} if traceparent else {}, Context())


def _prefix(attributes: Attributes) -> Mapping[str, str | int | float]:
    """Prefix attributes with the application, as OpenTelemetry recommends."""
    return {"messaging.system": "redis_streams"} | {f"flawstream.{name}": value for name, value in attributes.items()}
