"""Curves and histograms as SVG coordinates, drawn by `report.html.j2`. Knows only scores and labels.

Coordinates are in the SVG's viewBox: x to the right, y downwards.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import precision_recall_curve, roc_curve

WIDTH, HEIGHT = 340.0, 300.0
LEFT, TOP, RIGHT, BOTTOM = 50.0, 14.0, 326.0, 252.0
"""Edges of the plot area; labels are outside."""

_SHARES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
_BINS = 36
_LOWEST, _HIGHEST = 1e-3, 1e30  # range of the histogram's logarithmic axis
_MAX_POINTS = 400
_MAX_TICKS = 6
_MIN_TICKS = 3
_DIGITS = ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 5.0, 7.0), tuple(np.arange(1.0, 10.0, 0.2)))
"""Leading digits of ticks on a logarithmic axis, from coarse to fine."""


@dataclass(frozen=True, slots=True)
class Tick:
    """A tick on an axis.

    Attributes:
        at: x or y.
        text: The label.
    """

    at: float
    text: str


@dataclass(frozen=True, slots=True)
class Marker:
    """A labelled point.

    Attributes:
        x: Position.
        y: Position.
        text: The label.
        is_left: Whether the label is left of the point, instead of right.
    """

    x: float
    y: float
    text: str
    is_left: bool


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar of a histogram.

    Attributes:
        kind: `normal` or `anomalous`.
        x: Left edge.
        y: Upper edge.
        width: Width.
        height: Height.
    """

    kind: str
    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True, slots=True)
class Plot:
    """One plot.

    Attributes:
        title: Title.
        x_label: Label of the x axis.
        y_label: Label of the y axis.
        x_ticks: Ticks of the x axis.
        y_ticks: Ticks of the y axis.
        curve: An SVG path.
        reference: An SVG path: a random classifier, or the threshold.
        marker: The deployed threshold.
        bars: Bars of a histogram.
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
    """Plot a histogram of the scores, and ROC and precision-recall curves if both classes are present.

    Args:
        scores: (N,) nats per channel. NaN and infinity count as the highest.
        anomalous: (N,) labels.
        threshold: The threshold of image scores.
    """
    if not scores.size:
        return []
    finite = np.where(np.isfinite(scores), scores, np.finfo(np.float64).max)
    plots = [_histogram(finite, anomalous, threshold)]
    if anomalous.any() and not anomalous.all():
        plots = [_roc(finite, anomalous, threshold), _precision_recall(finite, anomalous, threshold), *plots]
    return plots


def plot_losses(losses: Sequence[float]) -> Plot | None:
    """Plot the mean loss of each epoch; None where no epoch has a finite loss.

    Args:
        losses: Nats per value summed over the scales, from the first epoch on.
    """
    finite = [(epoch, loss) for epoch, loss in enumerate(losses, start=1) if math.isfinite(loss)]
    if not finite:
        return None
    values = [loss for _, loss in finite]
    step = _round_step((max(values) - min(values)) / (_MAX_TICKS - 2) or abs(values[0]) / 10 or 1.0)
    low, high = math.floor(min(values) / step), math.floor(max(values) / step) + 1
    last = len(losses)
    x = np.array([(epoch - 1) / max(1, last - 1) for epoch, _ in finite])
    y = np.array([(loss / step - low) / (high - low) for loss in values])
    epochs = range(1, last + 1, max(1, math.ceil((last - 1) / (_MAX_TICKS - 1))))
    return Plot(
        "Loss while training",
        "epoch",
        "loss, nats per value",
        [Tick(_x((epoch - 1) / max(1, last - 1)), str(epoch)) for epoch in epochs],
        [Tick(_y((k - low) / (high - low)), f"{k * step:g}") for k in range(low, high + 1)],
        curve=_lines(x, y),
    )


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
    precision, recall = precision[::-1], recall[::-1]  # by decreasing threshold
    alarms = scores > threshold
    chance = float(anomalous.mean())
    at_threshold = float(anomalous[alarms].mean()) if alarms.any() else None
    return Plot(
        "Precision and recall",
        "recall, share of defective images",
        "precision, share of alarms that are right",
        _share_ticks(_x),
        _share_ticks(_y),
        curve=_steps(recall[1:], precision[1:]),  # without the first point, which scikit-learn adds
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
    """Mark a point of a curve; the label is left of it from x = `left_from` on, so that it does not cover the curve."""
    return Marker(_x(x), _y(y), f"threshold {threshold:.3g}", is_left=x >= left_from)


def _lines(x: NDArray[np.float64], y: NDArray[np.float64]) -> str:
    kept = _select_points(x.size)
    return "M" + "L".join(f"{_x(a):.1f},{_y(b):.1f}" for a, b in zip(x[kept], y[kept], strict=True))


def _steps(x: NDArray[np.float64], y: NDArray[np.float64]) -> str:
    """Draw a step curve with each value to the left of its point, as average precision sums it."""
    kept = _select_points(x.size)
    return f"M{_x(0):.1f},{_y(float(y[0])):.1f}" + "".join(
        f"V{_y(b):.1f}H{_x(a):.1f}" for a, b in zip(x[kept], y[kept], strict=True)
    )


def _select_points(count: int) -> NDArray[np.int64]:
    return np.unique(np.linspace(0, count - 1, min(count, _MAX_POINTS)).round().astype(np.int64))


def _x(share: float) -> float:
    return LEFT + share * (RIGHT - LEFT)


def _y(share: float) -> float:
    return BOTTOM - share * (BOTTOM - TOP)


def _share_ticks(to_position: Callable[[float], float]) -> list[Tick]:
    return [Tick(to_position(share), f"{share:g}") for share in _SHARES]


def _round_steps(max_count: int) -> tuple[int, int]:
    """Choose the step between ticks and the last tick of an axis from 0 to at least `max_count`."""
    size = 1
    while True:
        for step in (size, 2 * size, 5 * size):
            if max_count <= step * (_MAX_TICKS - 1):
                return step, step * max(1, math.ceil(max_count / step))
        size *= 10


def _round_step(least: float) -> float:
    """Choose 1, 2 or 5 times a power of ten, at least `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next((digit * power for digit in (1.0, 2.0, 5.0) if digit * power >= least), 10 * power)


def _log_ticks(low: float, high: float) -> list[float]:
    """Choose round values between `low` and `high`: powers of ten, or finer ones if those are too few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    ticks: list[float] = []
    for digits in _DIGITS:
        ticks = [digit * 10.0**power for power in range(first, last + 1) for digit in digits]
        ticks = [round(tick, 12) for tick in ticks if low <= tick <= high]
        if len(ticks) >= _MIN_TICKS:
            break
    return ticks[:: -(-len(ticks) // _MAX_TICKS)] if ticks else [low]
