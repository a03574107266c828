"""PromQL of the boards, put together from the metrics themselves. Knows no panel.

Boards know our names without Ray's prefix: the chart's monitors take it off, and so does the scrape configuration in
docs/how-to/monitor.md.
"""

from flawstream.telemetry.metrics import Histogram, Metric

NAMESPACE = 'namespace=~"$namespace"'
"""Of the chosen installation; `.*` where all are chosen, which takes in a Prometheus that puts no such label."""

_WINDOW = "$__rate_interval"


def select(metric: Metric | str, matchers: str = "") -> str:
    """Give a metric's lines of the chosen installation.

    Args:
        metric: Ours, or the name of one that is Ray's or Prometheus's own.
        matchers: More that a line must have, as PromQL has it.
    """
    name = metric.name if isinstance(metric, Metric) else metric
    return f"{name}{{{NAMESPACE}{', ' if matchers else ''}{matchers}}}"


def per_second(metric: Metric | str, by: str = "", matchers: str = "", window: str = _WINDOW) -> str:
    """Give how fast a counter grows, over all processes."""
    return f"sum {_by(by)}(rate({select(metric, matchers)}[{window}]))"


def counted(metric: Metric | str, by: str = "", matchers: str = "", window: str = _WINDOW) -> str:
    """Give by how much a counter grew, over all processes."""
    return f"sum {_by(by)}(increase({select(metric, matchers)}[{window}]))"


def quantile(share: float, histogram: Histogram, by: str = "", matchers: str = "") -> str:
    """Give a quantile of a histogram, as good as its buckets are."""
    buckets = per_second(f"{histogram.name}_bucket", f"le, {by}" if by else "le", matchers)
    return f"histogram_quantile({share:g}, {buckets})"


def mean(histogram: Histogram, by: str = "", matchers: str = "") -> str:
    """Give the mean of a histogram; of what came through Ray right to within a third."""
    total, count = (per_second(f"{histogram.name}_{part}", by, matchers) for part in ("sum", "count"))
    return f"{total} / {count}"


def of_the_streams(metric: Metric, matchers: str = "") -> str:
    """Give a gauge that every worker tells alike: the highest of an installation, summed over those chosen."""
    return f"sum(max by (namespace) ({select(metric, matchers)}))"


def events_of_the_streams(metric: Metric, by: str, matchers: str = "") -> str:
    """Give how fast a counter of the stream server grows, which every worker tells alike."""
    return f"sum by ({by}) (max by (namespace, {by}) (rate({select(metric, matchers)}[{_WINDOW}])))"


def _by(labels: str) -> str:
    return f"by ({labels}) " if labels else ""
