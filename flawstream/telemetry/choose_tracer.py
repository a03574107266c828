"""Choice of the tracer by the settings. OpenTelemetry is imported only if an endpoint is set."""

import contextlib
from collections.abc import Iterator
from importlib import import_module

from flawstream.telemetry.traces import NO_TRACER, Tracer
from schemas.errors import ConfigError
from schemas.settings import TracingSettings


@contextlib.contextmanager
def open_tracer(settings: TracingSettings) -> Iterator[Tracer]:
    """Create a tracer; its remaining spans are sent at the end of the context.

    Raises:
        ConfigError: An endpoint is set, but the extra `otel` is not installed.
    """
    if settings.endpoint is None:
        yield NO_TRACER
        return
    try:
        otel = import_module("flawstream.telemetry.otel")
    except ImportError as error:
        raise ConfigError(
            f"tracing.endpoint is set, but {error.name} is not installed: pip install 'flawstream[otel]', "
            "or unset tracing.endpoint"
        ) from error
    tracer = otel.OtelTracer(settings)
    try:
        yield tracer
    finally:
        tracer.close()
