"""Curves and histograms as coordinates for an SVG. Knows scores and labels; `report.html.j2` draws.

Coordinates are those of the SVG's viewBox: x to the right, y downwards.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import precision_recall_curve, roc_curve

WIDTH, HEIGHT = 340.0, 300.0
LEFT, TOP, RIGHT, BOTTOM = 50.0, 14.0, 326.0, 252.0
"""The plot's edges within the picture; outside are the labels."""

_SHARES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
_BINS = 36
_LOWEST, _HIGHEST = 1e-3, 1e30  # the histogram's axis is logarithmic and ends somewhere
_MOST_POINTS = 400
_MOST_TICKS = 6
_FEWEST_TICKS = 3
_DIGITS = ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 5.0, 7.0), tuple(np.arange(1.0, 10.0, 0.2)))
"""What marks of a logarithmic axis start with, from coarse to fine."""


@dataclass(frozen=True, slots=True)
class Tick:
    """A mark on an axis.

    Attributes:
        at: x or y.
        text: What it says.
    """

    at: float
    text: str


@dataclass(frozen=True, slots=True)
class Marker:
    """A point with a name.

    Attributes:
        x: Where.
        y: Where.
        text: The name.
        is_left: Whether the name stands left of the point, and not right of it.
    """

    x: float
    y: float
    text: str
    is_left: bool


@dataclass(frozen=True, slots=True)
class Bar:
    """A column of a histogram.

    Attributes:
        kind: `normal` or `anomalous`.
        x: Left edge.
        y: Upper edge.
        width: Of the column.
        height: Of the column.
    """

    kind: str
    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True, slots=True)
class Plot:
    """One picture.

    Attributes:
        title: What it shows.
        x_label: Of the axis.
        y_label: Of the axis.
        x_ticks: Marks.
        y_ticks: Marks.
        curve: An SVG path.
        reference: An SVG path: what chance gives, or the threshold.
        marker: Where the deployed threshold stands.
        bars: Columns.
    """

    title: str
    x_label: str
    y_label: str
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    curve: str = ""
    reference: str = ""
    marker: Marker | None = None
    bars: Sequence[Bar] = ()


def plot_scores(scores: NDArray[np.float64], anomalous: NDArray[np.bool_], threshold: float) -> list[Plot]:
    """Plot what can be: both curves where both classes are present, the histogram where there are scores.

    Args:
        scores: (N,) nats per channel. One that is not finite counts as the highest.
        anomalous: (N,) labels.
        threshold: A score above it is anomalous.
    """
    if not scores.size:
        return []
    bounded = np.where(np.isfinite(scores), scores, np.finfo(np.float64).max)
    plots = [_histogram(bounded, anomalous, threshold)]
    if anomalous.any() and not anomalous.all():
        plots = [_roc(bounded, anomalous, threshold), _precision_recall(bounded, anomalous, threshold), *plots]
    return plots


def _roc(scores: NDArray[np.float64], anomalous: NDArray[np.bool_], threshold: float) -> Plot:
    false_alarms, recall, _ = roc_curve(anomalous, scores)
    alarms = scores > threshold
    return Plot(
        "ROC curve",
        "false alarms, share of normal images",
        "recall, share of defective images",
        _share_ticks(_x),
        _share_ticks(_y),
        curve=_lines(false_alarms, recall),
        reference=f"M{_x(0):.1f},{_y(0):.1f}L{_x(1):.1f},{_y(1):.1f}",
        marker=_operating_point(float(alarms[~anomalous].mean()), float(alarms[anomalous].mean()), threshold, 0.65),
    )


def _precision_recall(scores: NDArray[np.float64], anomalous: NDArray[np.bool_], threshold: float) -> Plot:
    precision, recall, _ = precision_recall_curve(anomalous, scores, drop_intermediate=True)
    precision, recall = precision[::-1], recall[::-1]  # by falling threshold
    alarms = scores > threshold
    chance = float(anomalous.mean())
    at_threshold = float(anomalous[alarms].mean()) if alarms.any() else None
    return Plot(
        "Precision and recall",
        "recall, share of defective images",
        "precision, share of alarms that are right",
        _share_ticks(_x),
        _share_ticks(_y),
        curve=_steps(recall[1:], precision[1:]),  # the first point is scikit-learn's own, of no threshold
        reference=f"M{_x(0):.1f},{_y(chance):.1f}L{_x(1):.1f},{_y(chance):.1f}",
        marker=None
        if at_threshold is None
        else _operating_point(float(alarms[anomalous].mean()), at_threshold, threshold, 0.35),
    )


def _histogram(scores: NDArray[np.float64], anomalous: NDArray[np.bool_], threshold: float) -> Plot:
    """Count scores in bins of equal width on a logarithmic axis."""
    shown = np.clip(scores, _LOWEST, _HIGHEST)
    limit = max(threshold, _LOWEST)
    low, high = min(float(shown.min()), limit) * 0.98, max(float(shown.max()), limit) * 1.02
    edges = np.geomspace(low, high, _BINS + 1)
    edges[0], edges[-1] = low, high  # geomspace rounds
    counts = {
        "normal": np.histogram(shown[~anomalous], edges)[0],
        "anomalous": np.histogram(shown[anomalous], edges)[0],
    }
    step, top = _round_steps(max(int(count.max()) for count in counts.values()))
    width = (RIGHT - LEFT) / _BINS
    at = _x(math.log(limit / low) / math.log(high / low))
    return Plot(
        "Scores",
        "score, nats per channel (logarithmic)",
        "images",
        [Tick(_x(math.log(value / low) / math.log(high / low)), f"{value:g}") for value in _log_ticks(low, high)],
        [Tick(_y(value / top), str(value)) for value in range(0, top + 1, step)],
        reference=f"M{at:.1f},{_y(0):.1f}L{at:.1f},{_y(1):.1f}",
        marker=Marker(at, TOP + 8, f"threshold {threshold:.3g}", is_left=at > (LEFT + RIGHT) / 2),
        bars=[
            Bar(kind, LEFT + k * width, _y(number / top), width, _y(0) - _y(number / top))
            for kind, count in counts.items()
            for k, number in enumerate(count.tolist())
            if number
        ],
    )


def _operating_point(x: float, y: float, threshold: float, left_from: float) -> Marker:
    """Mark a point of a curve, its name on the side where the curve is not: left where x is from `left_from` on."""
    return Marker(_x(x), _y(y), f"threshold {threshold:.3g}", is_left=x >= left_from)


def _lines(x: NDArray[np.float64], y: NDArray[np.float64]) -> str:
    kept = _thinned(x.size)
    return "M" + "L".join(f"{_x(a):.1f},{_y(b):.1f}" for a, b in zip(x[kept], y[kept], strict=True))


def _steps(x: NDArray[np.float64], y: NDArray[np.float64]) -> str:
    """Draw a curve that keeps each value to the left of its point: what average precision sums."""
    kept = _thinned(x.size)
    return f"M{_x(0):.1f},{_y(float(y[0])):.1f}" + "".join(
        f"V{_y(b):.1f}H{_x(a):.1f}" for a, b in zip(x[kept], y[kept], strict=True)
    )


def _thinned(count: int) -> NDArray[np.int64]:
    return np.unique(np.linspace(0, count - 1, min(count, _MOST_POINTS)).round().astype(np.int64))


def _x(share: float) -> float:
    return LEFT + share * (RIGHT - LEFT)


def _y(share: float) -> float:
    return BOTTOM - share * (BOTTOM - TOP)


def _share_ticks(place: Callable[[float], float]) -> list[Tick]:
    return [Tick(place(share), f"{share:g}") for share in _SHARES]


def _round_steps(most: int) -> tuple[int, int]:
    """Choose an axis from 0 that holds a count: the step between marks and the last mark."""
    size = 1
    while True:
        for step in (size, 2 * size, 5 * size):
            if most <= step * (_MOST_TICKS - 1):
                return step, step * max(1, math.ceil(most / step))
        size *= 10


def _log_ticks(low: float, high: float) -> list[float]:
    """Choose round values between two: powers of ten, or finer ones where these are too few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    ticks: list[float] = []
    for digits in _DIGITS:
        ticks = [digit * 10.0**power for power in range(first, last + 1) for digit in digits]
        ticks = [round(tick, 12) for tick in ticks if low <= tick <= high]
        if len(ticks) >= _FEWEST_TICKS:
            break
    return ticks[:: -(-len(ticks) // _MOST_TICKS)] if ticks else [low]
