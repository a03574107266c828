"""How well a model version tells defective images from normal ones. Measures; chooses nothing."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from flawstream.fastflow.head import FastFlowHead
from flawstream.fastflow.score import image_scores
from flawstream.maps import bounded, upsample
from schemas.errors import DatasetError
from schemas.manifest import Metrics
from training.datasets.samples import Sample
from training.features import FeatureExtractor


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
    """Scores image files with one head, on what the extractor runs on.

    Args:
        extractor: The backbone.
        head: The trained head.
        top_fraction: How image scores are taken from maps.
    """

    def __init__(self, extractor: FeatureExtractor, head: FastFlowHead, top_fraction: float) -> None:
        self._extractor = extractor
        self._run = extractor.compile_head(head)
        self._top_fraction = top_fraction

    def score(self, paths: Sequence[Path]) -> Iterator[ScoredImage]:
        """Score images in order.

        Raises:
            DatasetError: A file cannot be read or is no image.
        """
        done = 0
        for _, features in self._extractor.batches(paths):
            grids = self._run(features)
            scores = image_scores(grids, self._top_fraction)
            for row, score in enumerate(scores.tolist()):
                of_image = tuple(grid[row].numpy() for grid in grids)
                yield ScoredImage(paths[done + row], score, of_image, self._extractor.spec.input_size)
            done += len(scores)


class Evaluation:
    """Collects scored test images and reduces them to metrics.

    Pixels count where they are known: on normal images, and on defective ones with a mask.
    """

    def __init__(self) -> None:
        self.samples: list[Sample] = []
        self.scores: list[float] = []
        self._pixel_scores: list[NDArray[np.float16]] = []
        self._pixel_labels: list[NDArray[np.bool_]] = []
        self._has_masks = False

    def add(self, sample: Sample, image: ScoredImage) -> None:
        """Take one image.

        Raises:
            DatasetError: Its mask cannot be read.
        """
        self.samples.append(sample)
        self.scores.append(image.score)
        if sample.mask is not None or not sample.anomalous:
            self._has_masks = self._has_masks or sample.mask is not None
            self._pixel_scores.append(bounded(image.anomaly_map()).astype(np.float16).ravel())
            self._pixel_labels.append(_read_mask(sample, image.side).ravel())

    def metrics(self, threshold: float) -> Metrics:
        """Compare all scores with all labels at a threshold of the image score, nats per channel."""
        return summarise(
            np.array(self.scores, dtype=np.float64),
            np.array([sample.anomalous for sample in self.samples], dtype=bool),
            threshold,
            auroc(np.concatenate(self._pixel_labels), np.concatenate(self._pixel_scores)) if self._has_masks else None,
        )


def summarise(
    scores: NDArray[np.float64], anomalous: NDArray[np.bool_], threshold: float, pixel_auroc: float | None = None
) -> Metrics:
    """Reduce image scores and labels to metrics; what needs a class that is absent stays empty."""
    alarms = scores > threshold
    normal = ~anomalous
    return Metrics(
        image_auroc=auroc(anomalous, scores),
        pixel_auroc=pixel_auroc,
        false_alarm_rate=float(alarms[normal].mean()) if normal.any() else None,
        recall=float(alarms[anomalous].mean()) if anomalous.any() else None,
        normal_images=int(normal.sum()),
        anomalous_images=int(anomalous.sum()),
    )


def auroc(labels: NDArray[np.bool_], scores: NDArray[np.floating]) -> float | None:
    """Compute the area under the ROC curve, or nothing where only one class is present.

    A score that is not finite counts as the highest: a gross defect can exceed what floats hold.
    """
    if labels.all() or not labels.any():
        return None
    return float(roc_auc_score(labels, np.where(np.isfinite(scores), scores, np.finfo(scores.dtype).max)))


def _read_mask(sample: Sample, side: int) -> NDArray[np.bool_]:
    if sample.mask is None:
        return np.zeros((side, side), dtype=bool)
    mask = cv2.imread(str(sample.mask), cv2.IMREAD_GRAYSCALE)
    if mask is None:
        raise DatasetError(f"cannot read the mask {sample.mask}; mend the file or take it out")
    return np.asarray(cv2.resize(mask, (side, side), interpolation=cv2.INTER_NEAREST) > 0)
