"""Classification metrics of scores, with confidence intervals. Knows no image, model or file.

Metrics are functions of *levels*: the distinct scores, highest first, with the weight of each class at each level. So
the same function computes metrics of images, of a thousand resamples at once, and of pixels.

**Intervals** have 95 % confidence. Those of rates are binomial (Clopper-Pearson): exact for any count, also at 0 % and
100 %, where a bootstrap has no width. Those of areas under curves and F1-max are percentiles of a bootstrap over
images, stratified by class, as the share of defective images is a choice of the test set, not random. Pixels of one
image are not independent, so pixel metrics are also resampled by image.

Not covered: variation over training runs (use several seeds), and a line that differs from the test set.

Source: Clopper, Pearson, Biometrika 26 (1934); Efron, Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
"""

# Shape legend: N scores, K levels, R resamples, I images, H W height and width of a map.

from collections.abc import Callable, Iterator, Mapping, Sequence

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from flawstream.imaging.maps import bounded

Floats = NDArray[np.floating]
Weights = NDArray[np.float64] | NDArray[np.float32] | NDArray[np.int64]
Interval = tuple[float, float]

CONFIDENCE = 0.95
RESAMPLES = 1000
AUPRO_LIMIT = 0.3
"""The false positive rate up to which overlap is integrated, as the papers do."""

_SEED = 0
_TAIL_PERCENT = 100 * (1 - CONFIDENCE) / 2
_COUNTS_PER_GROUP = 1 << 21
"""Counts per group of resamples, about 50 MB for any number of images."""

_PIXEL_RESAMPLES_PER_GROUP = 100

_F16_LEVELS = 1 << 16
_COARSE_LEVELS = 1 << 12
"""Only for resampling of pixels: values within 1.6 % to 3.1 % of each other count as tied."""


def auroc(positives: Weights, negatives: Weights) -> Floats:
    """Compute the area under the ROC curve: the share of pairs in the right order; a tie counts half.

    Args:
        positives: (..., K) weight of the anomalous class at each level, highest level first.
        negatives: (..., K) weight of the normal class. Both classes must have weight.

    Returns:
        (...) in [0, 1].
    """
    above = np.cumsum(positives, axis=-1, dtype=np.float64) - 0.5 * positives
    pairs = positives.sum(-1, dtype=np.float64) * negatives.sum(-1, dtype=np.float64)
    return np.asarray((negatives * above).sum(-1) / pairs)


def average_precision(positives: Weights, negatives: Weights) -> Floats:
    """Compute the mean precision at the levels of the anomalous class; arguments as for `auroc`.

    Without interpolation, as in scikit-learn. Depends on the share of anomalous images.
    """
    found = np.cumsum(positives, axis=-1, dtype=np.float64)
    alarms = found + np.cumsum(negatives, axis=-1, dtype=np.float64)
    precision = np.divide(found, alarms, out=np.zeros_like(found), where=alarms > 0)
    return np.asarray((positives * precision).sum(-1) / found[..., -1])


def f1_max(positives: Weights, negatives: Weights) -> Floats:
    """Compute the highest F1 of any threshold; arguments as for `auroc`.

    Optimistic, as the threshold is chosen on the same images. Depends on the share of anomalous images.
    """
    found = np.cumsum(positives, axis=-1, dtype=np.float64)
    alarms = found + np.cumsum(negatives, axis=-1, dtype=np.float64)
    return np.asarray((2 * found / (alarms + found[..., -1:])).max(-1))


def aupro(overlap: Weights, negatives: Weights, limit: float = AUPRO_LIMIT) -> Floats:
    """Compute the normalised area under the curve of per-region overlap over the false positive rate of pixels.

    Each defective region has the same weight. The curve is linear between levels and ends at the limit.

    Source: Bergmann, Fauser, Sattlegger, Steger, Uninformed Students (CVPR 2020), section 4; The MVTec Anomaly
    Detection Dataset (IJCV 129, 2021), section 5.

    Args:
        overlap: (..., K) sum over regions of the share of the region's pixels at each level, the highest level first.
        negatives: (..., K) normal pixels at each level.
        limit: The false positive rate to integrate to, in (0, 1].

    Returns:
        (...) in [0, 1]: the area divided by `limit`. A random map has half of `limit`. Both arguments must have weight.
    """
    covered = _from_zero(np.cumsum(overlap, axis=-1, dtype=np.float64))
    alarms = _from_zero(np.cumsum(negatives, axis=-1, dtype=np.float64))
    covered, alarms = covered / covered[..., -1:], alarms / alarms[..., -1:]
    run, rise = np.diff(alarms), np.diff(covered)
    width = np.diff(np.minimum(alarms, limit))
    share = np.divide(width, run, out=np.zeros_like(run), where=run > 0)  # below 1 only at the limit
    return np.asarray((width * (covered[..., :-1] + 0.5 * rise * share)).sum(-1) / limit)


def rate_interval(hits: int, count: int) -> Interval:
    """Compute the exact (Clopper-Pearson) interval of the rate `hits` / `count`; `count` is at least 1."""
    interval = binomtest(hits, count).proportion_ci(CONFIDENCE, method="exact")
    return float(interval.low), float(interval.high)


IMAGE_METRICS: Mapping[str, Callable[[Weights, Weights], Floats]] = {
    "image_auroc": auroc,
    "average_precision": average_precision,
    "f1_max": f1_max,
}


def image_metrics(
    scores: Floats, anomalous: NDArray[np.bool_], names: Sequence[str] = tuple(IMAGE_METRICS)
) -> tuple[dict[str, float], dict[str, Interval]]:
    """Compute image metrics that need no threshold.

    Args:
        scores: (N,) image scores. NaN and infinity count as the highest, as scores of gross defects can overflow.
        anomalous: (N,) labels.
        names: Names from `IMAGE_METRICS`.

    Returns:
        Values and intervals by name; empty if a class is absent. If all resamples give the same value, as for perfectly
        separated classes, there is no interval: one of zero width would claim certainty.
    """
    if anomalous.all() or not anomalous.any():
        return {}, {}
    levels, inverse = np.unique(np.where(np.isfinite(scores), -scores, -np.inf), return_inverse=True)
    positive, negative = inverse[anomalous], inverse[~anomalous]
    counts = (np.bincount(positive, minlength=levels.size), np.bincount(negative, minlength=levels.size))
    values = {name: float(IMAGE_METRICS[name](*counts)) for name in names}
    resampled: dict[str, list[Floats]] = {name: [] for name in names}
    for resample in _resamples(positive, negative, levels.size):
        for name in names:
            resampled[name].append(IMAGE_METRICS[name](*resample))
    return values, _intervals(resampled)


class PixelTally:
    """Computes pixel metrics of maps and masks, in memory that does not depend on the number of pixels.

    Scores are counted at the 65,536 values of float16, the precision of published maps: scores within 0.1 % of each
    other may count as tied. Intervals need 16 kB per normal image and 49 kB per image with a mask.
    """

    def __init__(self) -> None:
        self._negatives = np.zeros(_F16_LEVELS, np.int64)
        self._positives = np.zeros(_F16_LEVELS, np.int64)
        self._overlap = np.zeros(_F16_LEVELS, np.float64)
        self._normal_images: list[NDArray[np.float32]] = []
        self._masked_images: list[NDArray[np.float32]] = []

    def add(self, anomaly_map: NDArray[np.float32], mask: NDArray[np.bool_] | None) -> None:
        """Add one image.

        Args:
            anomaly_map: (H, W), higher is more anomalous; NaN counts as the highest.
            mask: (H, W), true where the defect is; None for a normal image. Regions are 8-connected.
        """
        levels = _f16_levels(bounded(anomaly_map)).ravel()
        if mask is None:
            negatives = np.bincount(levels, minlength=_F16_LEVELS)
            self._negatives += negatives
            self._normal_images.append(_coarse(negatives))
            return
        _, regions = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
        inside = mask.ravel()
        region = regions.ravel()[inside]
        share = 1.0 / np.bincount(region)[region] if region.size else np.zeros(0)
        negatives = np.bincount(levels[~inside], minlength=_F16_LEVELS)
        positives = np.bincount(levels[inside], minlength=_F16_LEVELS)
        overlap = np.bincount(levels[inside], weights=share, minlength=_F16_LEVELS)
        self._negatives += negatives
        self._positives += positives
        self._overlap += overlap
        self._masked_images.append(np.stack([_coarse(counts) for counts in (negatives, positives, overlap)]))

    def metrics(self) -> tuple[dict[str, float], dict[str, Interval]]:
        """Compute `pixel_auroc` and `aupro` with their intervals; empty if there are no defective or no normal pixels.

        As in `image_metrics`, there is no interval if all resamples give the same value.
        """
        if not (self._positives.any() and self._negatives.any()):
            return {}, {}
        values = {
            "pixel_auroc": float(auroc(self._positives, self._negatives)),
            "aupro": float(aupro(self._overlap, self._negatives)),
        }
        resampled: dict[str, list[Floats]] = {name: [] for name in values}
        for negatives, positives, overlap in self._resamples():
            usable = positives.any(-1) & negatives.any(-1)  # false for resamples with only empty masks
            resampled["pixel_auroc"].append(auroc(positives[usable], negatives[usable]))
            resampled["aupro"].append(aupro(overlap[usable], negatives[usable]))
        return values, _intervals(resampled)

    def _resamples(self) -> Iterator[NDArray[np.float32]]:
        """Resample normal images and images with a mask, with replacement; yields (3, r, K) arrays."""
        generator = np.random.default_rng(_SEED)
        masked = np.stack(self._masked_images)
        normal = np.stack(self._normal_images) if self._normal_images else None
        for _ in range(0, RESAMPLES, _PIXEL_RESAMPLES_PER_GROUP):
            counts = _sum_resampled(generator, masked)
            if normal is not None:
                counts[0] += _sum_resampled(generator, normal)
            yield counts


def _resamples(
    positive: NDArray[np.int64], negative: NDArray[np.int64], levels: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Resample the images of each class with replacement, `RESAMPLES` times.

    Args:
        positive: The level of each anomalous image.
        negative: The level of each normal image.
        levels: K.

    Yields:
        (r, K) counts of anomalous and normal images at each level, for r resamples.
    """
    generator = np.random.default_rng(_SEED)
    group = max(1, _COUNTS_PER_GROUP // (positive.size + negative.size))

    def draw(images: NDArray[np.int64], rows: int) -> NDArray[np.int64]:
        drawn = generator.choice(images, (rows, images.size)) + levels * np.arange(rows)[:, None]
        return np.bincount(drawn.ravel(), minlength=rows * levels).reshape(rows, levels)

    for start in range(0, RESAMPLES, group):
        rows = min(group, RESAMPLES - start)
        yield draw(positive, rows), draw(negative, rows)


def _sum_resampled(generator: np.random.Generator, images: NDArray[np.float32]) -> NDArray[np.float32]:
    """Sum (I, ..., K) histograms over resamples of the I images, for one group of resamples; (..., r, K)."""
    count = len(images)
    times = generator.multinomial(count, np.full(count, 1 / count), size=_PIXEL_RESAMPLES_PER_GROUP)
    return np.moveaxis(np.tensordot(times.astype(np.float32), images, axes=1), 0, -2)


def _f16_levels(values: NDArray[np.float32]) -> NDArray[np.int64]:
    """Map values to their level among all float16 values, 0 the highest; any shape."""
    bits = (values.astype(np.float16) + np.float16(0)).view(np.uint16).astype(np.int64)  # adding 0 turns -0 into 0
    return np.where(bits < _F16_LEVELS // 2, _F16_LEVELS // 2 - 1 - bits, bits)


def _coarse(levels: Weights) -> NDArray[np.float32]:
    return np.asarray(levels.reshape(_COARSE_LEVELS, -1).sum(-1), np.float32)


def _from_zero(values: Floats) -> Floats:
    return np.concatenate([np.zeros_like(values[..., :1]), values], axis=-1)


def _intervals(drawn: Mapping[str, list[Floats]]) -> dict[str, Interval]:
    intervals = {}
    for name, values in drawn.items():
        low, high = np.percentile(np.concatenate(values), [_TAIL_PERCENT, 100 - _TAIL_PERCENT])
        if low < high:
            intervals[name] = (float(low), float(high))
    return intervals
