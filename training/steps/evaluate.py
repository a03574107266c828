"""How well a model version tells defective images from normal ones. Measures; chooses nothing."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from flawstream.calibration import is_anomalous
from flawstream.engines.protocol import Engine, Loaded
from flawstream.fastflow.score import score_images
from flawstream.imaging.maps import upsample
from flawstream.imaging.pixels import PixelForm
from schemas.errors import DatasetError
from schemas.manifest import DefectMetrics, Metrics
from schemas.settings import LimitSettings
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
"""What people call the fields of `Metrics`, in the order they are shown."""
RATES = ("false_alarm_rate", "recall")
"""Those that are taken at the deployed threshold."""


@dataclass(frozen=True, slots=True)
class ScoredImage:
    """One image as a head sees it.

    Attributes:
        path: Where it was read.
        score: Nats per channel.
        grids: One (H_s, W_s) anomaly map per feature scale, nats per channel.
        side: S, the input size in pixels.
    """

    path: Path
    score: float
    grids: tuple[NDArray[np.float32], ...]
    side: int

    def anomaly_map(self) -> NDArray[np.float32]:
        """Upsample the grids to (S, S) float32, nats per channel."""
        return upsample(self.grids, (self.side, self.side))


class ImageScorer:
    """Scores image files on the engine that serves, so that what is measured is what the stream will say.

    Args:
        engine: Of the version's backbone.
        heads: What `engine.load` returned: forms of one version, judged on the same pixels.
        limits: What is too large to be decoded.
        top_fraction: How image scores are taken from maps.
    """

    def __init__(self, engine: Engine, heads: Sequence[Loaded], limits: LimitSettings, top_fraction: float) -> None:
        self._engine = engine
        self._heads = heads
        self._limits = limits
        self._top_fraction = top_fraction

    def score(self, paths: Sequence[Path]) -> Iterator[tuple[ScoredImage, ...]]:
        """Score images in order.

        Yields:
            For each image what each head says of it.

        Raises:
            DatasetError: A file cannot be read or is no image.
        """
        form = PixelForm.of(self._engine.spec)
        side = form.side_px
        done = 0
        for images in decode_batches(paths, form, self._limits):
            pixels = np.stack([image.pixels for image in images])
            rows = np.arange(len(images))
            found = [self._engine.detect(pixels, [(head, rows)]) for head in self._heads]
            scores = [score_images(grids, self._top_fraction) for grids in found]
            for row in rows.tolist():
                yield tuple(
                    ScoredImage(paths[done + row], float(of_head[row]), tuple(grid[row] for grid in grids), side)
                    for grids, of_head in zip(found, scores, strict=True)
                )
            done += len(images)


class Evaluation:
    """Collects scored test images and reduces them to metrics.

    Pixels count where they are known: on normal images, and on defective ones with a mask.
    """

    def __init__(self) -> None:
        self._samples: list[Sample] = []
        self._scores: list[float] = []
        self._pixels = PixelTally()

    def add(self, sample: Sample, image: ScoredImage) -> None:
        """Take one image.

        Raises:
            DatasetError: Its mask cannot be read.
        """
        self._samples.append(sample)
        self._scores.append(image.score)
        if sample.mask is not None:
            self._pixels.add(image.anomaly_map(), read_mask(sample.mask, image.side))
        elif not sample.anomalous:
            self._pixels.add(image.anomaly_map(), None)

    def scores(self, *, anomalous: bool) -> NDArray[np.float64]:
        """Give the scores of one class, in their order."""
        return np.array(
            [score for sample, score in zip(self._samples, self._scores, strict=True) if sample.anomalous is anomalous],
            np.float64,
        )

    def metrics(self, threshold: float) -> Metrics:
        """Compare all scores with all labels at a threshold of the image score, nats per channel."""
        return summarise(
            np.array(self._scores, dtype=np.float64),
            [sample.defect if sample.anomalous else None for sample in self._samples],
            threshold,
            self._pixels,
        )


def summarise(
    scores: NDArray[np.float64], defects: Sequence[str | None], threshold: float, pixels: PixelTally | None = None
) -> Metrics:
    """Reduce image scores and labels to metrics; what needs a class or masks that are absent stays empty.

    Args:
        scores: (N,) nats per channel. One that is not finite counts as the highest.
        defects: N kinds of defect; None for a normal image.
        threshold: A score above it is anomalous.
        pixels: Of the same images, where maps are at hand.
    """
    kinds = sorted({kind for kind in defects if kind is not None})
    kind_of = np.array([-1 if kind is None else kinds.index(kind) for kind in defects], dtype=np.int64)
    normal = kind_of < 0
    alarms = is_anomalous(scores, threshold)
    values, intervals = image_metrics(scores, ~normal)
    for found in (
        _rate("false_alarm_rate", alarms[normal]),
        _rate("recall", alarms[~normal]),
        pixels.metrics() if pixels is not None else ({}, {}),
    ):
        values |= found[0]
        intervals |= found[1]
    return Metrics(
        **values,
        normal_images=int(normal.sum()),
        anomalous_images=int((~normal).sum()),
        intervals=intervals,
        defects=tuple(_of_kind(name, scores, normal, kind_of == k, alarms) for k, name in enumerate(kinds)),
    )


@dataclass(frozen=True, slots=True)
class Spread:
    """How a metric varies over versions.

    Attributes:
        mean: Over the versions.
        deviation: Standard deviation of the versions, not of their mean (n - 1 in the denominator).
    """

    mean: float
    deviation: float


def spread(found: Sequence[Metrics]) -> dict[str, Spread]:
    """Compare versions: by name the metrics that all of them have; nothing of fewer than two versions."""
    if len(found) < 2:  # noqa: PLR2004 - one has no deviation
        return {}
    table = {name: [getattr(one, name) for one in found] for name in METRIC_NAMES}
    return {
        name: Spread(float(np.mean(values)), float(np.std(values, ddof=1)))
        for name, values in table.items()
        if None not in values
    }


def _of_kind(
    name: str,
    scores: NDArray[np.float64],
    normal: NDArray[np.bool_],
    shown: NDArray[np.bool_],
    alarms: NDArray[np.bool_],
) -> DefectMetrics:
    used = normal | shown
    values, intervals = image_metrics(scores[used], shown[used], ("image_auroc",))
    rate, rate_interval = _rate("recall", alarms[shown])
    return DefectMetrics(
        defect=name, images=int(shown.sum()), **(values | rate), intervals={**intervals, **rate_interval}
    )


def _rate(name: str, alarms: NDArray[np.bool_]) -> tuple[dict[str, float], dict[str, Interval]]:
    if not alarms.size:
        return {}, {}
    return {name: float(alarms.mean())}, {name: rate_interval(int(alarms.sum()), alarms.size)}


def read_mask(path: Path, side: int) -> NDArray[np.bool_]:
    """Read where a defect is, at a map's size.

    Args:
        path: A picture of the whole image, not 0 where the defect is.
        side: S, pixels.

    Returns:
        (S, S).

    Raises:
        DatasetError: The file cannot be read.
    """
    mask = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
    if mask is None:
        raise DatasetError(f"cannot read the mask {path}; mend the file or take it out")
    return np.asarray(cv2.resize(mask, (side, side), interpolation=cv2.INTER_NEAREST) > 0)
