"""Which tracer the settings ask for. OpenTelemetry is imported only where an endpoint is set."""

import contextlib
from collections.abc import Iterator
from importlib import import_module

from flawstream.telemetry.traces import NO_TRACER, Tracer
from schemas.errors import ConfigError
from schemas.settings import TracingSettings


@contextlib.contextmanager
def open_tracer(settings: TracingSettings) -> Iterator[Tracer]:
    """Give a tracer; at the end of the context what it still has is sent.

    Raises:
        ConfigError: An endpoint is set, and the packages of the extra `otel` are not installed.
    """
    if settings.endpoint is None:
        yield NO_TRACER
        return
    try:
        otel = import_module("flawstream.telemetry.otel")
    except ImportError as error:
        raise ConfigError(
            f"tracing.endpoint is set, and {error.name} is not installed: pip install 'flawstream[otel]', "
            "or leave tracing.endpoint out"
        ) from error
    tracer = otel.OtelTracer(settings)
    try:
        yield tracer
    finally:
        tracer.close()
