"""From the scores of held-out normal images to thresholds and p-values: split conformal prediction.

**Guarantee.** If the calibration images and a new normal image are exchangeable (the same line, camera and light; none
of the calibration images trained the flow), then over the draw of both, ``P(p_value <= rate) <= rate`` for every rate,
so a normal image is called anomalous with at most that probability. Nothing is assumed about how scores are
distributed. It is an average over calibration sets: that of one set of n images varies around it as Beta(k, n + 1 - k)
with k = floor(rate (n + 1)), about ``sqrt(rate (1 - rate) / n)``. A drift of the line voids it: calibrate anew.

Source: Vovk, Gammerman, Shafer, Algorithmic Learning in a Random World (2005), chapter 2; Bates, Candès, Lei, Romano,
Sesia, Testing for outliers with conformal p-values, Annals of Statistics 51 (2023), section 2.

Knows no model: scores are numbers here, higher is more anomalous.
"""

import logging
import math

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta

from schemas.errors import ConfigError, ShapeError
from schemas.manifest import Arithmetic, Calibration

_log = logging.getLogger(__name__)

_CONFIDENCE = 0.95


def calibrate(
    scores: NDArray[np.floating],
    map_peaks: NDArray[np.floating],
    false_alarm_rate: float,
    top_fraction: float,
    arithmetic: Arithmetic = "float32",
) -> Calibration:
    """Choose both thresholds so that at most the asked share of normal images goes above each.

    A threshold is the ``ceil((n + 1)(1 - rate))``-th smallest value, so that ``score > threshold`` if and only if
    ``p_value <= false_alarm_rate``. With fewer than `fewest_images` that rank does not exist: the thresholds are then
    the highest values, `shortage` tells why, the same is logged, and false alarms come to at most 1 / (n + 1).

    Args:
        scores: (n,) image scores of held-out normal images, nats per channel.
        map_peaks: (n,) highest value of each of their anomaly maps, nats per channel.
        false_alarm_rate: Share of normal images that may be called anomalous, in (0, 1).
        top_fraction: How `scores` were taken from the maps; kept for the record, as is the next.
        arithmetic: In what the engine computed that scored the images.

    Raises:
        ShapeError: Not two vectors of one length, or empty ones.
        ConfigError: A rate outside (0, 1), or a score that is not finite: training diverged.
    """
    if scores.ndim != 1 or scores.shape != map_peaks.shape or not scores.size:
        raise ShapeError(f"scores {scores.shape} and map_peaks {map_peaks.shape} must be two vectors of one length")
    rank = _rank(scores.size, _checked(false_alarm_rate))
    bad = np.count_nonzero(~(is_finite(scores) & is_finite(map_peaks)))
    if bad:
        raise ConfigError(
            f"{bad} of {scores.size} calibration images have a score that is not finite: training diverged; "
            "lower training.learning_rate or training.clip_norm"
        )
    if missing := shortage(scores.size, false_alarm_rate):
        _log.warning("%s", missing)
    ascending = np.sort(scores.astype(np.float64))
    return Calibration(
        arithmetic=arithmetic,
        top_fraction=top_fraction,
        scores=tuple(ascending.tolist()),
        false_alarm_rate=false_alarm_rate,
        threshold=float(ascending[rank - 1]),
        pixel_threshold=float(np.sort(map_peaks.astype(np.float64))[rank - 1]),
    )


def is_anomalous(scores: NDArray[np.floating], threshold: float) -> NDArray[np.bool_]:
    """Give the verdict of each score: anomalous above the threshold, and where the score is NaN."""
    return ~(scores <= threshold)


def is_finite(values: NDArray[np.floating]) -> NDArray[np.bool_]:
    """Find the finite values; float32's largest number stands for one that was not (`fastflow.score.score_images`)."""
    return np.asarray(np.abs(values) < np.finfo(np.float32).max)


def p_values(calibration_scores_ascending: NDArray[np.floating], scores: NDArray[np.floating]) -> NDArray[np.float64]:
    """Tell for each score the share of normal images at least as anomalous, the new one among them.

    Args:
        calibration_scores_ascending: (n,) image scores of held-out normal images, sorted.
        scores: Any shape; a NaN counts as the most anomalous.

    Returns:
        The shape of `scores`, float64 in [1 / (n + 1), 1]: ``(1 + #{calibration >= score}) / (n + 1)``.
    """
    count = calibration_scores_ascending.size
    below = np.searchsorted(calibration_scores_ascending, scores, side="left")
    return np.asarray((1 + count - below) / (count + 1), dtype=np.float64)


def fewest_images(false_alarm_rate: float) -> int:
    """Tell how many calibration images a rate needs: ``ceil(1 / rate) - 1``.

    Raises:
        ConfigError: A rate outside (0, 1).
    """
    total = max(2, math.ceil(1 / _checked(false_alarm_rate)))
    while 1 / (total - 1) <= false_alarm_rate:  # 1 / rate was rounded up
        total -= 1
    while 1 / total > false_alarm_rate:  # ... or down
        total += 1
    return total - 1


def shortage(images: int, false_alarm_rate: float) -> str | None:
    """Say what is missing where there are too few calibration images for a rate; None where there are enough.

    Raises:
        ConfigError: A rate outside (0, 1).
    """
    needed = fewest_images(false_alarm_rate)
    if images >= needed:
        return None
    return (
        f"a false alarm rate of {false_alarm_rate:g} needs {needed} calibration images and there are {images}: the "
        f"threshold is the highest of their scores; on average {1 / (images + 1):.3g} of normal images are called "
        f"anomalous, and {_false_alarms(1, images)[1]:.2g} may be; add normal images, or raise "
        "training.calibration_fraction or training.false_alarm_rate"
    )


def shortage_of(calibration: Calibration) -> str | None:
    """Say the same of a calibration that was made."""
    return shortage(len(calibration.scores), calibration.false_alarm_rate)


def expected_false_alarms(calibration: Calibration) -> tuple[float, float]:
    """Bound the share of normal images that the threshold calls anomalous, with 95 % confidence.

    The scores are a sample: the share above the threshold of rank n + 1 - k varies over calibration sets as
    Beta(k, n + 1 - k), whatever the distribution of scores. With 4 images it lies between 0.6 % and 60 %, with 100
    between 1.7 % and 9.8 %.

    Source: Vovk, Conditional validity of inductive conformal predictors, Machine Learning 92 (2013), section 3.

    Returns:
        (low, high), in [0, 1].
    """
    count = len(calibration.scores)
    return _false_alarms(count + 1 - _rank(count, calibration.false_alarm_rate), count)


def _false_alarms(above: int, count: int) -> tuple[float, float]:
    low, high = beta(above, count + 1 - above).interval(_CONFIDENCE)
    return float(low), float(high)


def _rank(count: int, rate: float) -> int:
    """Give the threshold's rank from 1, ``ceil((n + 1)(1 - rate))``, or n where that is n + 1.

    Counted from the top, as the most images k with ``k / (n + 1) <= rate`` in the very division that `p_values` does:
    so the two agree to the last bit.
    """
    above = math.floor(rate * (count + 1))
    while (above + 1) / (count + 1) <= rate:
        above += 1
    while above / (count + 1) > rate:
        above -= 1
    return count + 1 - max(above, 1)


def _checked(rate: float) -> float:
    if not 0.0 < rate < 1.0:
        raise ConfigError(f"false_alarm_rate={rate} must lie between 0 and 1, both excluded")
    return rate
