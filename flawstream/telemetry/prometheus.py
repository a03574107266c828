"""`Metrics` on prometheus-client, and the port they are scraped from: for processes without Ray."""

import contextlib
from collections.abc import Iterator
from typing import Any

import prometheus_client
from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server

from flawstream.telemetry.metrics import ALL, NO_METRICS, CategoryLabels, Counter, Gauge, Histogram, Metric, Metrics
from schemas.errors import ConfigError
from schemas.settings import MetricsSettings


class PrometheusMetrics:
    """A `Metrics` in a registry of prometheus-client.

    A gauge is told from when it was first set: a producer does not say of the streams that they are down.

    Args:
        registry: Where they are put.
        max_categories: Categories that are named in labels.
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
        """Count; an amount of 0 is nothing."""
        if amount:
            self._child(counter, labels).inc(amount)

    def set(self, gauge: Gauge, value: float, /, **labels: str) -> None:
        """Say how it is now."""
        self._child(gauge, labels).set(value)

    def observe(self, histogram: Histogram, value: float, /, **labels: str) -> None:
        """Take one value more."""
        self._child(histogram, labels).observe(value)

    def forget(self, gauge: Gauge, /, **labels: str) -> None:
        """Take these labels' line away."""
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
def serve_metrics(settings: MetricsSettings) -> Iterator[tuple[Metrics, str | None]]:
    """Answer Prometheus for as long as the context lasts, where a port is set.

    Yields:
        The metrics to record, and the URL they are scraped from; nothing is recorded where there is none.

    Raises:
        ConfigError: The port is taken.
    """
    if settings.port is None:
        yield NO_METRICS, None
        return
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]  # a second line for every counter, which tells nobody anything
    metrics = PrometheusMetrics(registry, settings.max_categories)
    try:
        server, thread = start_http_server(settings.port, settings.host, registry)
    except OSError as error:
        raise ConfigError(
            f"metrics cannot be served on {settings.host} port {settings.port}: {error.strerror}; "
            "choose another metrics.port, or leave it out"
        ) from error
    try:
        yield metrics, f"http://{settings.host}:{server.server_port}/metrics"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
