"""Evaluation of a model version on labelled test images."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flawstream.calibration import is_anomalous
from flawstream.engines.protocol import Engine, HeadRows, Loaded
from flawstream.imaging.maps import Grid, upsample
from flawstream.imaging.pixels import PixelForm
from schemas.manifest import DefectMetrics, EvaluationMetrics
from schemas.settings import BitDepth, LimitSettings
from training.datasets.masks import read_masks
from training.datasets.samples import Sample
from training.report.metrics import Interval, PixelTally, image_metrics, rate_interval
from training.steps.features import decode_batches

METRIC_NAMES = {
    "image_auroc": "AUROC",
    "average_precision": "average precision",
    "f1_max": "F1-max",
    "pixel_auroc": "pixel AUROC",
    "aupro": "AUPRO",
    "false_alarm_rate": "false alarms",
    "recall": "recall",
}
"""Display names of the fields of `EvaluationMetrics`, in display order."""
RATES = ("false_alarm_rate", "recall")
"""The metrics at the deployed threshold."""


@dataclass(frozen=True, slots=True)
class ScoredImage:
    """One image scored by a head.

    Attributes:
        path: The image file.
        score: Image score, nats per channel.
        grids: One (H_s, W_s) anomaly map per feature scale, nats per channel.
        side: S, the input size in pixels.
        bits: By how many bits it was read, if its file has 16.
    """

    path: Path
    score: float
    grids: tuple[Grid, ...]
    side: int
    bits: BitDepth = 16

    def anomaly_map(self) -> NDArray[np.float32]:
        """Upsample the grids to (S, S) float32, nats per channel."""
        return upsample(self.grids, (self.side, self.side))


class ImageScorer:
    """Scores image files with the engine that will serve.

    Args:
        engine: An engine with the version's backbone.
        heads: Loaded heads, to score the same pixels with.
        limits: Maximum size and aspect ratio of images.
        top_fraction: Fraction of the grid that the image score is computed from.
        bits: By how many bits files of 16 are read.
    """

    def __init__(
        self,
        engine: Engine,
        heads: Sequence[Loaded],
        limits: LimitSettings,
        top_fraction: float,
        bits: BitDepth = 16,
    ) -> None:
        self._engine = engine
        self._heads = heads
        self._limits = limits
        self._top_fraction = top_fraction
        self._form = PixelForm.of(engine.spec, bits)

    def score(self, paths: Sequence[Path]) -> Iterator[tuple[ScoredImage, ...]]:
        """Score images in order.

        Yields:
            For each image one `ScoredImage` per head.

        Raises:
            DatasetError: A file cannot be read or is not an image.
        """
        side, bits = self._form.side_px, self._form.bits
        done = 0
        for images in decode_batches(paths, self._form, self._limits):
            pixels = np.stack([image.pixels for image in images])
            rows = np.arange(len(images))
            of_heads = [self._engine.detect(pixels, [HeadRows(head, rows, self._top_fraction)]) for head in self._heads]
            for row in rows.tolist():
                yield tuple(
                    ScoredImage(
                        paths[done + row],
                        float(one.scores[row]),
                        tuple(grid[row] for grid in one.grids),
                        side,
                        bits,
                    )
                    for one in of_heads
                )
            done += len(images)


class Evaluation:
    """Collects scored test images and computes their metrics.

    Pixel metrics use normal images, and defective images with a mask.
    """

    def __init__(self) -> None:
        self._samples: list[Sample] = []
        self._scores: list[float] = []
        self._pixels = PixelTally()

    def add(self, sample: Sample, image: ScoredImage) -> None:
        """Add one image.

        Raises:
            DatasetError: The mask cannot be read.
        """
        self._samples.append(sample)
        self._scores.append(image.score)
        if sample.masks:
            self._pixels.add(image.anomaly_map(), read_masks(sample.masks, image.side))
        elif not sample.anomalous:
            self._pixels.add(image.anomaly_map(), None)

    def scores(self, *, anomalous: bool) -> NDArray[np.float64]:
        """Return the scores of one class, in order."""
        return np.array(
            [score for sample, score in zip(self._samples, self._scores, strict=True) if sample.anomalous is anomalous],
            np.float64,
        )

    def metrics(self, threshold: float) -> EvaluationMetrics:
        """Compute the metrics at a threshold, nats per channel."""
        return summarise(
            np.array(self._scores, dtype=np.float64),
            [sample.defect if sample.anomalous else None for sample in self._samples],
            threshold,
            self._pixels,
        )


def summarise(
    scores: NDArray[np.float64], defects: Sequence[str | None], threshold: float, pixels: PixelTally | None = None
) -> EvaluationMetrics:
    """Compute metrics of image scores and labels; metrics that need an absent class or masks stay empty.

    Args:
        scores: (N,) nats per channel. NaN and infinity count as the highest.
        defects: N kinds of defect; None for a normal image.
        threshold: The threshold of image scores.
        pixels: Pixel metrics of the same images, if there are maps.
    """
    kinds = sorted({kind for kind in defects if kind is not None})
    kind_of = np.array([-1 if kind is None else kinds.index(kind) for kind in defects], dtype=np.int64)
    normal = kind_of < 0
    alarms = is_anomalous(scores, threshold)
    values, intervals = image_metrics(scores, ~normal)
    for more_values, more_intervals in (
        _rate("false_alarm_rate", alarms[normal]),
        _rate("recall", alarms[~normal]),
        pixels.metrics() if pixels is not None else ({}, {}),
    ):
        values |= more_values
        intervals |= more_intervals
    return EvaluationMetrics(
        **values,
        normal_images=int(normal.sum()),
        anomalous_images=int((~normal).sum()),
        intervals=intervals,
        defects=tuple(_defect_metrics(name, scores, normal, kind_of == k, alarms) for k, name in enumerate(kinds)),
    )


@dataclass(frozen=True, slots=True)
class Spread:
    """Variation of a metric over versions.

    Attributes:
        mean: Over the versions.
        deviation: Standard deviation over the versions, with n - 1 in the denominator.
    """

    mean: float
    deviation: float


def spread(versions: Sequence[EvaluationMetrics]) -> dict[str, Spread]:
    """Compute the variation, by name, of the metrics that all versions have; empty for fewer than two versions."""
    if len(versions) < 2:  # noqa: PLR2004 - a deviation needs two
        return {}
    table = {name: [getattr(metrics, name) for metrics in versions] for name in METRIC_NAMES}
    return {
        name: Spread(float(np.mean(values)), float(np.std(values, ddof=1)))
        for name, values in table.items()
        if None not in values
    }


def _defect_metrics(
    name: str,
    scores: NDArray[np.float64],
    normal: NDArray[np.bool_],
    with_defect: NDArray[np.bool_],
    alarms: NDArray[np.bool_],
) -> DefectMetrics:
    used = normal | with_defect
    values, intervals = image_metrics(scores[used], with_defect[used], ("image_auroc",))
    recall, recall_interval = _rate("recall", alarms[with_defect])
    return DefectMetrics(
        defect=name, images=int(with_defect.sum()), **(values | recall), intervals={**intervals, **recall_interval}
    )


def _rate(name: str, alarms: NDArray[np.bool_]) -> tuple[dict[str, float], dict[str, Interval]]:
    if not alarms.size:
        return {}, {}
    return {name: float(alarms.mean())}, {name: rate_interval(int(alarms.sum()), alarms.size)}
