"""`Metrics` on prometheus-client, and a port to scrape: for processes without Ray."""

import contextlib
from collections.abc import Iterator
from typing import Any

import prometheus_client
from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server

from flawstream.telemetry.liveness import Liveness
from flawstream.telemetry.metrics import ALL, NO_METRICS, CategoryLabels, Counter, Gauge, Histogram, Metric, Metrics
from schemas.errors import ConfigError
from schemas.settings import MetricsSettings


class PrometheusMetrics:
    """`Metrics` in a registry of prometheus-client.

    A gauge is exported only once it was set: a producer, which does not measure the streams, must not export them as 0.

    Args:
        registry: The registry of prometheus-client.
        max_categories: Maximum number of values of the label `category`.
    """

    def __init__(self, registry: CollectorRegistry, max_categories: int) -> None:
        self._registry = registry
        self._families: dict[str, Any] = {metric.name: _family(metric, registry) for metric in ALL}
        self._children: dict[tuple[str, ...], Any] = {}
        self._categories = CategoryLabels(max_categories)
        for metric in ALL:
            if isinstance(metric, Counter):
                for labels in metric.lines():
                    self._child(metric, labels)

    def add(self, counter: Counter, amount: float = 1.0, /, **labels: str) -> None:
        """Increase a counter; an amount of 0 does nothing."""
        if amount:
            self._child(counter, labels).inc(amount)

    def set(self, gauge: Gauge, value: float, /, **labels: str) -> None:
        """Set the value of a gauge."""
        self._child(gauge, labels).set(value)

    def observe(self, histogram: Histogram, value: float, /, **labels: str) -> None:
        """Add a value to a histogram."""
        self._child(histogram, labels).observe(value)

    def forget(self, gauge: Gauge, /, **labels: str) -> None:
        """Remove the gauge with these labels."""
        labels = self._categories.bounded(labels)
        values = tuple(labels[name] for name in gauge.labels)
        if self._children.pop((gauge.name, *values), None) is not None:
            self._families[gauge.name].remove(*values)

    def _child(self, metric: Metric, labels: dict[str, str]) -> Any:
        if labels:
            labels = self._categories.bounded(labels)
        key = (metric.name, *(labels[name] for name in metric.labels))
        child = self._children.get(key)
        if child is None:
            family = self._families[metric.name]
            child = self._children[key] = family.labels(**labels) if metric.labels else family
            if isinstance(metric, Gauge) and not metric.labels:
                self._registry.register(family)
        return child


def _family(metric: Metric, registry: CollectorRegistry) -> Any:
    match metric:
        case Histogram(buckets=buckets):
            return prometheus_client.Histogram(
                metric.name, metric.help, metric.labels, buckets=buckets, registry=registry
            )
        case Counter():
            return prometheus_client.Counter(metric.name, metric.help, metric.labels, registry=registry)
        case _:
            return prometheus_client.Gauge(
                metric.name, metric.help, metric.labels, registry=registry if metric.labels else None
            )


@contextlib.contextmanager
def serve_metrics(settings: MetricsSettings, liveness: Liveness | None = None) -> Iterator[tuple[Metrics, str | None]]:
    """Serve metrics to Prometheus during the context, if a port is set.

    Args:
        settings: The port.
        liveness: Answers `/livez` on the same port: 200, or 503 once the process does not get on.

    Yields:
        The metrics and the URL to scrape; without a port, metrics that record nothing, and None.

    Raises:
        ConfigError: The port is in use.
    """
    if settings.port is None:
        yield NO_METRICS, None
        return
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]  # drop the _created line of every counter
    metrics = PrometheusMetrics(registry, settings.max_categories)
    try:
        server, thread = start_http_server(settings.port, settings.host, registry)
    except OSError as error:
        raise ConfigError(
            f"metrics cannot be served on {settings.host} port {settings.port}: {error.strerror}; "
            "choose another metrics.port, or unset it"
        ) from error
    if liveness is not None:
        server.set_app(_with_liveness(server.get_app(), liveness))
    try:
        yield metrics, f"http://{settings.host}:{server.server_port}/metrics"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _with_liveness(metrics: Any, liveness: Liveness) -> Any:
    """Put `/livez` in front of a WSGI application."""

    def app(environ: dict[str, Any], start_response: Any) -> Any:
        if environ["PATH_INFO"] != "/livez":
            return metrics(environ, start_response)
        alive = liveness.alive
        start_response("200 OK" if alive else "503 Service Unavailable", [("Content-Type", "text/plain")])
        return [b"alive\n" if alive else b"the event loop is blocked\n"]

    return app
