"""How well scores tell two classes apart, in numbers, and how sure one can be of them. Knows no image, model or file.

Everything is a function of *levels*: the distinct scores, the highest first, and how much of each class lies at each.
So one function serves the images as they are, a thousand resamples of them at once, and the pixels of a data set.

**Intervals** hold 95 %. A rate is a count of independent hits and misses, so its interval is the binomial's own
(Clopper-Pearson): exact for any count, and of sensible width where the bootstrap has none, at 0 % and at 100 %. Areas
under curves and F1-max have no such law: theirs are percentiles of a bootstrap that draws images anew within each
class, so that the share of defective images, which the maker of the test set chose, is not taken for chance. Pixels of
one image are not independent: the metrics of pixels are resampled by image too.

Not covered: another training run (several seeds tell), and a line that differs from the test set (nothing here tells).

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
_CELLS_AT_ONCE = 1 << 21
"""Resamples are drawn in groups of so many counts, some 50 MB, however many images there are."""

_PIXEL_RESAMPLES_AT_ONCE = 100

_F16_LEVELS = 1 << 16
_COARSE_LEVELS = 1 << 12
"""For the resampling of pixels alone: values within 1.6 % to 3.1 % of each other count as tied."""


def auroc(positives: Weights, negatives: Weights) -> Floats:
    """Compute the area under the ROC curve: the share of pairs in the right order, a tie counting half.

    Args:
        positives: (..., K) weight of the anomalous at each level, the highest level first.
        negatives: (..., K) the same of the normal.

    Returns:
        (...) in [0, 1]. Both classes must have weight.
    """
    above = np.cumsum(positives, axis=-1, dtype=np.float64) - 0.5 * positives
    pairs = positives.sum(-1, dtype=np.float64) * negatives.sum(-1, dtype=np.float64)
    return np.asarray((negatives * above).sum(-1) / pairs)


def average_precision(positives: Weights, negatives: Weights) -> Floats:
    """Compute the mean of the precision over the anomalous, each at its own level; arguments as of `auroc`.

    No interpolation, as scikit-learn does it. Depends on the share of anomalous images.
    """
    found = np.cumsum(positives, axis=-1, dtype=np.float64)
    alarms = found + np.cumsum(negatives, axis=-1, dtype=np.float64)
    precision = np.divide(found, alarms, out=np.zeros_like(found), where=alarms > 0)
    return np.asarray((positives * precision).sum(-1) / found[..., -1])


def f1_max(positives: Weights, negatives: Weights) -> Floats:
    """Compute the highest F1 that any threshold reaches; arguments as of `auroc`.

    Chosen on the very images it is computed of, so it flatters. Depends on the share of anomalous images.
    """
    found = np.cumsum(positives, axis=-1, dtype=np.float64)
    alarms = found + np.cumsum(negatives, axis=-1, dtype=np.float64)
    return np.asarray((2 * found / (alarms + found[..., -1:])).max(-1))


def aupro(overlap: Weights, negatives: Weights, limit: float = AUPRO_LIMIT) -> Floats:
    """Compute the normalised area under the curve of per-region overlap over the false positive rate of pixels.

    Each defective region counts the same, however large. The curve is linear between levels and ends at the limit.

    Source: Bergmann, Fauser, Sattlegger, Steger, Uninformed Students (CVPR 2020), section 4; The MVTec Anomaly
    Detection Dataset (IJCV 129, 2021), section 5.

    Args:
        overlap: (..., K) sum over regions of the share of the region's pixels at each level, the highest level first.
        negatives: (..., K) normal pixels at each level.
        limit: The false positive rate to integrate to, in (0, 1].

    Returns:
        (...) in [0, 1]: the area over `limit`. A map by chance has half of `limit`. Both arguments must have weight.
    """
    covered = _from_zero(np.cumsum(overlap, axis=-1, dtype=np.float64))
    alarms = _from_zero(np.cumsum(negatives, axis=-1, dtype=np.float64))
    covered, alarms = covered / covered[..., -1:], alarms / alarms[..., -1:]
    run, rise = np.diff(alarms), np.diff(covered)
    width = np.diff(np.minimum(alarms, limit))
    share = np.divide(width, run, out=np.zeros_like(run), where=run > 0)  # 1, but where the limit cuts
    return np.asarray((width * (covered[..., :-1] + 0.5 * rise * share)).sum(-1) / limit)


def rate_interval(hits: int, count: int) -> Interval:
    """Give the exact (Clopper-Pearson) interval of a rate of which `hits` of `count` were seen, `count` at least 1."""
    found = binomtest(hits, count).proportion_ci(CONFIDENCE, method="exact")
    return float(found.low), float(found.high)


IMAGE_METRICS: Mapping[str, Callable[[Weights, Weights], Floats]] = {
    "image_auroc": auroc,
    "average_precision": average_precision,
    "f1_max": f1_max,
}


def image_metrics(
    scores: Floats, anomalous: NDArray[np.bool_], names: Sequence[str] = tuple(IMAGE_METRICS)
) -> tuple[dict[str, float], dict[str, Interval]]:
    """Compute what needs no threshold.

    Args:
        scores: (N,) image scores. One that is not finite counts as the highest: a gross defect can exceed what floats
            hold.
        anomalous: (N,) labels.
        names: Of `IMAGE_METRICS`, those wanted.

    Returns:
        Values and intervals by name, empty where a class is absent. Where every resample gives the same, as for
        classes that are perfectly separated, there is no interval: one without width would claim certainty.
    """
    if anomalous.all() or not anomalous.any():
        return {}, {}
    levels, inverse = np.unique(np.where(np.isfinite(scores), -scores, -np.inf), return_inverse=True)
    positive, negative = inverse[anomalous], inverse[~anomalous]
    counts = (np.bincount(positive, minlength=levels.size), np.bincount(negative, minlength=levels.size))
    values = {name: float(IMAGE_METRICS[name](*counts)) for name in names}
    drawn: dict[str, list[Floats]] = {name: [] for name in names}
    for resample in _resamples(positive, negative, levels.size):
        for name in names:
            drawn[name].append(IMAGE_METRICS[name](*resample))
    return values, _intervals(drawn)


class PixelTally:
    """Reduces maps and masks to metrics of pixels, in memory that does not grow with the number of pixels.

    Scores are counted at the 65,536 values that float16 holds, so the metrics are exact for maps rounded to float16,
    the precision in which results carry them: scores within 0.1 % of each other may count as tied. For the intervals
    16 kB a normal image and 49 kB a marked one are kept.
    """

    def __init__(self) -> None:
        self._negatives = np.zeros(_F16_LEVELS, np.int64)
        self._positives = np.zeros(_F16_LEVELS, np.int64)
        self._overlap = np.zeros(_F16_LEVELS, np.float64)
        self._normal_images: list[NDArray[np.float32]] = []
        self._marked_images: list[NDArray[np.float32]] = []

    def add(self, anomaly_map: NDArray[np.float32], mask: NDArray[np.bool_] | None) -> None:
        """Take one image.

        Args:
            anomaly_map: (H, W), higher is more anomalous; what is no number counts as the highest.
            mask: (H, W), true where the defect is; None for a normal image. Regions touch across corners.
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
        self._marked_images.append(np.stack([_coarse(one) for one in (negatives, positives, overlap)]))

    def metrics(self) -> tuple[dict[str, float], dict[str, Interval]]:
        """Compute `pixel_auroc` and `aupro` with their intervals; empty without a defective or without a normal pixel.

        As in `image_metrics`, there is no interval where every resample gives the same.
        """
        if not (self._positives.any() and self._negatives.any()):
            return {}, {}
        values = {
            "pixel_auroc": float(auroc(self._positives, self._negatives)),
            "aupro": float(aupro(self._overlap, self._negatives)),
        }
        drawn: dict[str, list[Floats]] = {name: [] for name in values}
        for negatives, positives, overlap in self._resamples():
            usable = positives.any(-1) & negatives.any(-1)  # else a resample of empty masks
            drawn["pixel_auroc"].append(auroc(positives[usable], negatives[usable]))
            drawn["aupro"].append(aupro(overlap[usable], negatives[usable]))
        return values, _intervals(drawn)

    def _resamples(self) -> Iterator[NDArray[np.float32]]:
        """Draw as many normal images and as many with a mask as there are, with replacement; (3, r, K) at a time."""
        generator = np.random.default_rng(_SEED)
        marked = np.stack(self._marked_images)
        normal = np.stack(self._normal_images) if self._normal_images else None
        for _ in range(0, RESAMPLES, _PIXEL_RESAMPLES_AT_ONCE):
            drawn = _redrawn(generator, marked)
            if normal is not None:
                drawn[0] += _redrawn(generator, normal)
            yield drawn


def _resamples(
    positive: NDArray[np.int64], negative: NDArray[np.int64], levels: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Draw as many of each class as there are, with replacement, `RESAMPLES` times.

    Args:
        positive: The level of each anomalous image.
        negative: The level of each normal image.
        levels: K.

    Yields:
        (r, K) counts of the anomalous and of the normal at each level, r resamples at a time.
    """
    generator = np.random.default_rng(_SEED)
    most = max(1, _CELLS_AT_ONCE // (positive.size + negative.size))

    def draw(images: NDArray[np.int64], rows: int) -> NDArray[np.int64]:
        drawn = generator.choice(images, (rows, images.size)) + levels * np.arange(rows)[:, None]
        return np.bincount(drawn.ravel(), minlength=rows * levels).reshape(rows, levels)

    for start in range(0, RESAMPLES, most):
        rows = min(most, RESAMPLES - start)
        yield draw(positive, rows), draw(negative, rows)


def _redrawn(generator: np.random.Generator, images: NDArray[np.float32]) -> NDArray[np.float32]:
    """Sum (I, ..., K) histograms over draws of I of them, some of the `RESAMPLES` at a time; (..., r, K)."""
    count = len(images)
    times = generator.multinomial(count, np.full(count, 1 / count), size=_PIXEL_RESAMPLES_AT_ONCE)
    return np.moveaxis(np.tensordot(times.astype(np.float32), images, axes=1), 0, -2)


def _f16_levels(values: NDArray[np.float32]) -> NDArray[np.int64]:
    """Number the values of float16 from the highest; any shape."""
    bits = (values.astype(np.float16) + np.float16(0)).view(np.uint16).astype(np.int64)  # the sum makes -0 a 0
    return np.where(bits < _F16_LEVELS // 2, _F16_LEVELS // 2 - 1 - bits, bits)


def _coarse(levels: Weights) -> NDArray[np.float32]:
    return np.asarray(levels.reshape(_COARSE_LEVELS, -1).sum(-1), np.float32)


def _from_zero(values: Floats) -> Floats:
    return np.concatenate([np.zeros_like(values[..., :1]), values], axis=-1)


def _intervals(drawn: Mapping[str, list[Floats]]) -> dict[str, Interval]:
    found = {}
    for name, values in drawn.items():
        low, high = np.percentile(np.concatenate(values), [_TAIL_PERCENT, 100 - _TAIL_PERCENT])
        if low < high:
            found[name] = (float(low), float(high))
    return found
