"""How well a model version tells defective images from normal ones. Measures; chooses nothing."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from flawstream.fastflow.head import FastFlowHead, FoldedHead
from flawstream.fastflow.score import image_scores
from flawstream.maps import upsample
from schemas.errors import DatasetError
from schemas.manifest import Metrics
from training.datasets.samples import Sample
from training.features import FeatureExtractor

_F16_MAX = np.float32(np.finfo(np.float16).max)


@dataclass(frozen=True, slots=True)
class ScoredImage:
    """One image as a head sees it.

    Attributes:
        path: Where it was read.
        score: Nats per channel.
        anomaly_map: (S, S) float32 at the input size, nats per channel.
    """

    path: Path
    score: float
    anomaly_map: NDArray[np.float32]


def score_images(
    extractor: FeatureExtractor, head: FastFlowHead, top_fraction: float, paths: Sequence[Path]
) -> Iterator[ScoredImage]:
    """Score image files in order.

    Raises:
        DatasetError: A file cannot be read or is no image.
    """
    folded = FoldedHead(head)
    side = extractor.spec.input_size
    done = 0
    for _, features in extractor.batches(paths):
        grids = folded([scale.cpu() for scale in features])
        scores = image_scores(grids, top_fraction)
        for row, score in enumerate(scores.tolist()):
            values = upsample([grid[row].numpy() for grid in grids], (side, side))
            yield ScoredImage(paths[done + row], score, values)
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
            self._pixel_scores.append(np.minimum(image.anomaly_map, _F16_MAX).astype(np.float16).ravel())
            self._pixel_labels.append(_read_mask(sample, image.anomaly_map.shape[0]).ravel())

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
