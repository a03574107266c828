"""Measures drift by category: the quantiles of its scores, and how far its p-values are from uniform.

Without drift, the p-values of normal images are uniform in (0, 1] (`flawstream.calibration`), whatever the category,
its model or the scale of its scores. So their distance from uniform measures drift, in either direction, without
labels. Anomalous parts add to it: a share r of them at most r.
"""

from collections import deque
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from flawstream.telemetry import metrics as m
from flawstream.telemetry.metrics import Metrics
from schemas.messages import DetectionResult

QUANTILES = (0.05, 0.5, 0.95)


@dataclass(slots=True)
class _Window:
    """The latest results of one version."""

    model: str
    threshold: float
    latest: deque[tuple[float, float]] = field(default_factory=deque)  # p-value, score
    changed: bool = True


class DriftMonitor:
    """Keeps the latest results of each category, and measures drift when it reports; adding one takes microseconds.

    Args:
        metrics: Receives p-values, and the gauges.
        window_images: How many of the latest results of a category are measured.
        max_categories: The first so many categories are measured, any further ones are not.
    """

    def __init__(self, metrics: Metrics, window_images: int, max_categories: int) -> None:
        self._metrics = metrics
        self._window_images = window_images
        self._max_categories = max_categories
        self._windows: dict[str, _Window] = {}

    def add(self, result: DetectionResult) -> None:
        """Add a published result. Another version of the model starts an empty window."""
        self._metrics.observe(m.P_VALUE, result.p_value, category=result.category)
        window = self._windows.get(result.category)
        if window is None or window.model != result.model:
            if window is None and len(self._windows) >= self._max_categories:
                return
            window = _Window(result.model, result.threshold, deque(maxlen=self._window_images))
            self._windows[result.category] = window
        window.latest.append((result.p_value, result.score))
        window.changed = True

    def report(self) -> None:
        """Set the gauges of the categories with new results since the last report."""
        for category, window in self._windows.items():
            if window.changed:
                window.changed = False
                p_values, scores = np.array(window.latest).T
                self._metrics.set(m.WINDOW_IMAGES, len(p_values), category=category)
                self._metrics.set(m.DRIFT_DISTANCE, distance_from_uniform(p_values), category=category)
                self._metrics.set(m.THRESHOLD, window.threshold, category=category)
                for share, score in zip(QUANTILES, np.quantile(scores, QUANTILES).tolist(), strict=True):
                    self._metrics.set(m.WINDOW_SCORE, score, category=category, share=str(share))


def distance_from_uniform(p_values: NDArray[np.float64]) -> float:
    """Return the Kolmogorov-Smirnov distance between p-values and the uniform distribution.

    scipy.stats has it too, with 1.4 s and 70 MB for its import and 15 times the time (a test compares the two).

    Args:
        p_values: (n,), n of 1 or more, in [0, 1].

    Returns:
        Between 0 and 1.
    """
    ascending = np.sort(p_values)
    steps = np.arange(len(ascending) + 1) / len(ascending)
    return float(max((steps[1:] - ascending).max(), (ascending - steps[:-1]).max()))
