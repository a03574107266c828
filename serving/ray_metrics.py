"""`Metrics` through Ray: its agent on each node collects them, and Prometheus and the Ray dashboard find them there.

Ray puts `ray_` before each name, adds labels of its own (`WorkerId` distinguishes replicas), passes values on every
ten seconds, and hands on of a histogram how many values each bucket has, so that its `_sum` is a sum of the buckets'
middles. A gauge that is not set again it forgets after twenty seconds; so it is set again here.
"""

import sys
import threading
import time
import weakref
from typing import Any

from ray.util import metrics as ray_metrics

from flawstream.telemetry.metrics import ALL, CategoryLabels, Counter, Gauge, Histogram, Metric

PREFIX = "ray_"
"""What Ray puts before every name."""

_NOTHING = sys.float_info.min
"""Makes a counter's line as a 0 would, which Ray's counters do not take: added to any count it changes nothing."""

_SET_AGAIN_S = 5.0


class RayMetrics:
    """A `Metrics` for what runs inside Ray: a replica, an actor, a driver.

    Args:
        max_categories: Categories that are named in labels.
    """

    def __init__(self, max_categories: int) -> None:
        self._families = {metric.name: _family(metric) for metric in ALL}
        self._gauges: dict[tuple[str, tuple[str, ...]], tuple[float, dict[str, str]]] = {}
        threading.Thread(target=_set_again, args=(weakref.ref(self),), name="gauges", daemon=True).start()
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
        labels = self._categories.bounded(labels)
        self._gauges[gauge.name, tuple(labels.values())] = (value, labels)
        self._families[gauge.name].set(value, labels)

    def observe(self, histogram: Histogram, value: float, /, **labels: str) -> None:
        """Take one value more."""
        self._families[histogram.name].observe(value, self._categories.bounded(labels))

    def forget(self, gauge: Gauge, /, **labels: str) -> None:
        """Set it to 0 for the last time: Ray forgets it some seconds later."""
        labels = self._categories.bounded(labels)
        self._gauges.pop((gauge.name, tuple(labels.values())), None)
        self._families[gauge.name].set(0.0, labels)

    def set_gauges_again(self) -> None:
        """Set every gauge to the value that it has."""
        for (name, _), (value, labels) in list(self._gauges.items()):
            self._families[name].set(value, labels)


def _set_again(reference: "weakref.ref[RayMetrics]") -> None:
    """Set the gauges again and again, as long as anybody has the metrics."""
    while (metrics := reference()) is not None:
        metrics.set_gauges_again()
        del metrics
        time.sleep(_SET_AGAIN_S)


def _family(metric: Metric) -> Any:
    match metric:
        case Histogram(buckets=buckets):
            return ray_metrics.Histogram(metric.name, metric.help, list(buckets), metric.labels)
        case Counter():
            return ray_metrics.Counter(metric.name, metric.help, metric.labels)
        case _:
            return ray_metrics.Gauge(metric.name, metric.help, metric.labels)
