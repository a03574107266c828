"""Builds the PromQL of the boards from our metric definitions. Knows no panel.

Names are without Ray's prefix: the chart's monitors and the scrape configuration in docs/how-to/monitor.md remove it.
"""

from flawstream.telemetry.metrics import Histogram, Metric

NAMESPACE = 'namespace=~"$namespace"'
"""Matches the chosen installations; with all chosen it is `.*`, which also matches series without this label."""

_WINDOW = "$__rate_interval"


def select(metric: Metric | str, matchers: str = "") -> str:
    """Select a metric's series of the chosen installations.

    Args:
        metric: Our metric, or the name of one of Ray or Prometheus.
        matchers: Further label matchers in PromQL.
    """
    name = metric.name if isinstance(metric, Metric) else metric
    return f"{name}{{{NAMESPACE}{', ' if matchers else ''}{matchers}}}"


def per_second(metric: Metric | str, by: str = "", matchers: str = "", window: str = _WINDOW) -> str:
    """Return the rate of a counter, summed over all processes."""
    return f"sum {_by(by)}(rate({select(metric, matchers)}[{window}]))"


def counted(metric: Metric | str, by: str = "", matchers: str = "", window: str = _WINDOW) -> str:
    """Return the increase of a counter, summed over all processes."""
    return f"sum {_by(by)}(increase({select(metric, matchers)}[{window}]))"


def quantile(share: float, histogram: Histogram, by: str = "", matchers: str = "") -> str:
    """Return a quantile of a histogram, interpolated within its buckets."""
    buckets = per_second(f"{histogram.name}_bucket", f"le, {by}" if by else "le", matchers)
    return f"histogram_quantile({share:g}, {buckets})"


def mean(histogram: Histogram, by: str = "", matchers: str = "") -> str:
    """Return the mean of a histogram; for metrics exported by Ray it is within a third of the true mean."""
    total, count = (per_second(f"{histogram.name}_{part}", by, matchers) for part in ("sum", "count"))
    return f"{total} / {count}"


def of_the_streams(metric: Metric, matchers: str = "") -> str:
    """Return a gauge that all workers report with the same value: the maximum per installation, summed over these."""
    return f"sum(max by (namespace) ({select(metric, matchers)}))"


def events_of_the_streams(metric: Metric, by: str, matchers: str = "") -> str:
    """Return the rate of a counter of the stream server, which all workers report with the same value."""
    return f"sum by ({by}) (max by (namespace, {by}) (rate({select(metric, matchers)}[{_WINDOW}])))"


def _by(labels: str) -> str:
    return f"by ({labels}) " if labels else ""
