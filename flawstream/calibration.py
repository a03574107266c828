"""Thresholds and p-values from the scores of held-out normal images: split conformal prediction.

**Guarantee.** If the calibration images and a new normal image are exchangeable (the same line, camera and light; no
calibration image was used in training), then ``P(p_value <= rate) <= rate`` for every rate, over the draw of both: the
probability that a normal image is called anomalous is at most `rate`. No distribution of scores is assumed. This is an
average over calibration sets: for one set of n images the false alarm rate follows Beta(k, n + 1 - k) with
k = floor(rate (n + 1)), a deviation of about ``sqrt(rate (1 - rate) / n)``. After drift it does not hold: recalibrate.

Source: Vovk, Gammerman, Shafer, Algorithmic Learning in a Random World (2005), chapter 2; Bates, Candès, Lei, Romano,
Sesia, Testing for outliers with conformal p-values, Annals of Statistics 51 (2023), section 2.

Knows no model. Higher scores are more anomalous.
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
    """Set the image and the pixel threshold for a false alarm rate.

    A threshold is the ``ceil((n + 1)(1 - rate))``-th smallest value, so that ``score > threshold`` if and only if
    ``p_value <= false_alarm_rate``. With fewer than `fewest_images` images that rank does not exist: the thresholds are
    then the highest values, with a false alarm rate of at most 1 / (n + 1), and the warning of `shortage` is logged.

    Args:
        scores: (n,) image scores of held-out normal images, nats per channel.
        map_peaks: (n,) highest value of each anomaly map, nats per channel.
        false_alarm_rate: Share of normal images that may be called anomalous, in (0, 1).
        top_fraction: The fraction that `scores` were computed with; only recorded.
        arithmetic: The arithmetic that the images were scored in; only recorded.

    Raises:
        ShapeError: The arrays are not vectors of one length, or are empty.
        ConfigError: The rate is outside (0, 1), or a score is not finite because training diverged.
    """
    if scores.ndim != 1 or scores.shape != map_peaks.shape or not scores.size:
        raise ShapeError(f"scores {scores.shape} and map_peaks {map_peaks.shape} must be two vectors of one length")
    rank = _rank(scores.size, _check_rate(false_alarm_rate))
    not_finite = np.count_nonzero(~(is_finite(scores) & is_finite(map_peaks)))
    if not_finite:
        raise ConfigError(
            f"{not_finite} of {scores.size} calibration images have a score that is not finite: training diverged; "
            "lower training.learning_rate or training.clip_norm"
        )
    if warning := shortage(scores.size, false_alarm_rate):
        _log.warning("%s", warning)
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
    """Return the verdict of each score: anomalous if above the threshold or NaN."""
    return ~(scores <= threshold)


def is_finite(values: NDArray[np.floating]) -> NDArray[np.bool_]:
    """Find the finite values. float32's maximum counts as not finite: `fastflow.score.score_images` puts it there."""
    return np.asarray(np.abs(values) < np.finfo(np.float32).max)


def p_values(calibration_scores_ascending: NDArray[np.floating], scores: NDArray[np.floating]) -> NDArray[np.float64]:
    """Compute the p-value of each score: the share of normal images, itself included, that score at least as high.

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
    """Compute the number of calibration images that a rate needs: ``ceil(1 / rate) - 1``.

    Raises:
        ConfigError: The rate is outside (0, 1).
    """
    total = max(2, math.ceil(1 / _check_rate(false_alarm_rate)))
    while 1 / (total - 1) <= false_alarm_rate:  # 1 / rate was rounded up
        total -= 1
    while 1 / total > false_alarm_rate:  # ... or down
        total += 1
    return total - 1


def shortage(images: int, false_alarm_rate: float) -> str | None:
    """Describe the problem if there are too few calibration images for a rate; None if there are enough.

    Raises:
        ConfigError: The rate is outside (0, 1).
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
    """Describe the problem if a calibration had too few images: `shortage`."""
    return shortage(len(calibration.scores), calibration.false_alarm_rate)


def expected_false_alarms(calibration: Calibration) -> tuple[float, float]:
    """Bound the share of normal images that the threshold calls anomalous, with 95 % confidence.

    The scores are a sample: the share above the threshold of rank n + 1 - k follows Beta(k, n + 1 - k) over calibration
    sets, for any distribution of scores. With 4 images it is between 0.6 % and 60 %, with 100 between 1.7 % and 9.8 %.

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
    """Compute the threshold's rank, counted from 1: ``ceil((n + 1)(1 - rate))``, at most n.

    Found as the largest k with ``k / (n + 1) <= rate``, the same division as in `p_values`, so that both agree to the
    last bit.
    """
    above = math.floor(rate * (count + 1))
    while (above + 1) / (count + 1) <= rate:
        above += 1
    while above / (count + 1) > rate:
        above -= 1
    return count + 1 - max(above, 1)


def _check_rate(rate: float) -> float:
    if not 0.0 < rate < 1.0:
        raise ConfigError(f"false_alarm_rate={rate} must be above 0 and below 1")
    return rate
