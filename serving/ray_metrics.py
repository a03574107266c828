"""`Metrics` through Ray: its agent on each node collects them, and Prometheus and the Ray dashboard find them there.

Ray puts `ray_` before each name, adds labels of its own (`WorkerId` distinguishes replicas), passes values on every
ten seconds, and hands on of a histogram how many values each bucket has, so that its `_sum` is a sum of the buckets'
middles.
"""

import sys
from typing import Any

from ray.util import metrics as ray_metrics

from flawstream.telemetry.metrics import ALL, CategoryLabels, Counter, Gauge, Histogram, Metric

PREFIX = "ray_"
"""What Ray puts before every name."""

_NOTHING = sys.float_info.min
"""Makes a counter's line as a 0 would, which Ray's counters do not take: added to any count it changes nothing."""


class RayMetrics:
    """A `Metrics` for what runs inside Ray: a replica, an actor, a driver.

    Args:
        max_categories: Categories that are named in labels.
    """

    def __init__(self, max_categories: int) -> None:
        self._families = {metric.name: _family(metric) for metric in ALL}
        self._categories = CategoryLabels(max_categories)
        for metric in ALL:
            if isinstance(metric, Counter):
                for labels in metric.lines():
                    self._families[metric.name].inc(_NOTHING, labels)

    def add(self, counter: Counter, amount: float = 1.0, /, **labels: str) -> None:
        """Count; an amount of 0 is nothing."""
        if amount:
            self._families[counter.name].inc(amount, self._categories.bounded(labels))

    def set(self, gauge: Gauge, value: float, /, **labels: str) -> None:
        """Say how it is now."""
        self._families[gauge.name].set(value, self._categories.bounded(labels))

    def observe(self, histogram: Histogram, value: float, /, **labels: str) -> None:
        """Take one value more."""
        self._families[histogram.name].observe(value, self._categories.bounded(labels))

    def forget(self, gauge: Gauge, /, **labels: str) -> None:
        """Set it to 0: Ray forgets a value with its process only."""
        self.set(gauge, 0.0, **labels)


def _family(metric: Metric) -> Any:
    match metric:
        case Histogram(buckets=buckets):
            return ray_metrics.Histogram(metric.name, metric.help, list(buckets), metric.labels)
        case Counter():
            return ray_metrics.Counter(metric.name, metric.help, metric.labels)
        case _:
            return ray_metrics.Gauge(metric.name, metric.help, metric.labels)
