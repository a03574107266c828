"""An int8 graph of a version's flows, and the proof that it scores as float32 does. No Ray in here.

Ranges are taken from normal images that trained the flow; what is compared are held-out images, and test images where
there are some. A graph that does harm is not kept, and the manifest says what was found (docs/decisions/0005).

Shape legend: B images, S side of an image in pixels, C channels, H W height and width of a scale's grid, s a scale.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor, nn

from flawstream.calibration import is_anomalous
from flawstream.engines.openvino.int8_graph import Int8Flows, int8_pays, write_int8
from flawstream.engines.openvino.int8_versions import open_int8
from flawstream.engines.openvino.quantise import quantise
from flawstream.fastflow.head import FastFlowHead, FoldedHead
from schemas.manifest import Calibration, EvaluationMetrics, Int8Trial
from training.report.metrics import rate_interval
from training.steps.features import FeatureExtractor

LEAST_RANK = 0.99
"""Of normal images' scores in int8 and in float32."""
MOST_AUROC_LOSS = 0.003

_FEWEST = 20
"""Held-out normal images; fewer prove nothing."""
_RANGE_IMAGES = 32


@dataclass(frozen=True, slots=True)
class Int8Candidate:
    """An int8 form of a version, written but not yet proven.

    Attributes:
        files: The graph, by name: what lies beside the weights if it is kept.
        loaded: The same, compiled: a head for the engine.
    """

    files: Mapping[str, bytes]
    loaded: Int8Flows


@dataclass(frozen=True, slots=True)
class Judged:
    """What one form of a version makes of the images.

    Attributes:
        held_out: (N,) scores of held-out normal images, in their order.
        defective: (M,) scores of defective test images, in their order.
        calibration: Set by `held_out`.
        metrics: On all test images, at that calibration's threshold.
    """

    held_out: NDArray[np.float64]
    defective: NDArray[np.float64]
    calibration: Calibration
    metrics: EvaluationMetrics


def make_candidates(
    extractor: FeatureExtractor, head: FastFlowHead, normal: Sequence[Path], held_out_images: int
) -> list[Int8Candidate]:
    """Make int8 forms of a version: one, of its flows.

    The backbone stays in float32: white features enlarge what a quantised one loses beyond any use
    (docs/decisions/0005).

    Args:
        extractor: The backbone.
        head: The trained head.
        normal: Normal images that ranges are taken from, not held out.
        held_out_images: How many others there are to prove it on.

    Returns:
        None where there are too few images or this CPU has no use for int8.

    Raises:
        DatasetError: An image cannot be read.
    """
    if not int8_pays() or held_out_images < _FEWEST:
        return []
    chosen = normal
    if len(normal) > _RANGE_IMAGES:
        chosen = [normal[index] for index in np.linspace(0, len(normal) - 1, _RANGE_IMAGES).round().astype(int)]
    files = write_flows(head, _all_features(extractor, chosen))
    return [Int8Candidate(files, open_int8(head, files, extractor.spec))]


def choose_int8(
    candidates: Sequence[Int8Candidate], judged: Sequence[Judged], exact: Judged
) -> tuple[tuple[Int8Trial, ...], Mapping[str, bytes]]:
    """Keep the first candidate that does no harm.

    Args:
        candidates: What `make_candidates` made.
        judged: What each makes of the images.
        exact: What float32 makes of the same images.

    Returns:
        What was found up to the one that is kept, and that one's files, if one is.
    """
    trials: list[Int8Trial] = []
    for candidate, found in zip(candidates, judged, strict=True):
        trials.append(_compare(found, exact))
        if trials[-1].kept:
            return tuple(trials), candidate.files
    return tuple(trials), {}


def _compare(int8: Judged, exact: Judged) -> Int8Trial:
    """Hold int8 against float32, each judged by the threshold that its own scores set."""
    threshold = exact.calibration.threshold
    verdicts, exact_verdicts = (is_anomalous(one.held_out, one.calibration.threshold) for one in (int8, exact))
    changed = int((verdicts != exact_verdicts).sum())
    missed = exact_verdicts.size * rate_interval(int(exact_verdicts.sum()), exact_verdicts.size)[1]
    found, exact_found = (is_anomalous(one.defective, one.calibration.threshold) for one in (int8, exact))
    lost = int((exact_found & ~found).sum()) if exact_found.size else None
    rank = float(spearmanr(int8.held_out, exact.held_out).statistic)
    auroc, exact_auroc = int8.metrics.image_auroc, exact.metrics.image_auroc
    harmless = (
        rank >= LEAST_RANK
        and exact_verdicts.sum() + changed <= missed
        and not lost
        and (auroc is None or exact_auroc is None or exact_auroc - auroc <= MOST_AUROC_LOSS)
    )
    return Int8Trial(
        scope="flows",
        kept=bool(harmless),
        normal_images=len(exact.held_out),
        rank_correlation=rank,
        alarms=float(is_anomalous(int8.held_out, threshold).mean()),
        alarms_float32=float(exact_verdicts.mean()),
        changed_verdicts=changed,
        lost_defects=lost,
        image_auroc=auroc,
        image_auroc_float32=exact_auroc,
        calibration=int8.calibration,
        metrics=int8.metrics,
    )


def write_flows(head: FastFlowHead, features: list[Tensor]) -> dict[str, bytes]:
    """Write the flows of a head as an int8 graph, from normalised features to grids.

    Args:
        head: Trained; left as it is.
        features: One (B, C_s, H_s, W_s) tensor per scale, which ranges are taken from.

    Returns:
        The files by name.
    """
    flows = _Flows(FoldedHead(head, by_index=True))
    with torch.inference_mode():
        normalised = [statistics(scale) for statistics, scale in zip(flows.head.statistics, features, strict=True)]
    quantise(flows, lambda: flows(*normalised))
    return write_int8(flows, [tuple(scale.shape[1:]) for scale in features], torch.float32)


class _Flows(nn.Module):
    """Normalised features in, anomaly grids out."""

    def __init__(self, head: FoldedHead) -> None:
        super().__init__()
        self.head = head

    def forward(self, *normalised: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.head.score(list(normalised)))


def _all_features(extractor: FeatureExtractor, paths: Sequence[Path]) -> list[Tensor]:
    batches = [features for _, features in extractor.batches(paths)]
    return [torch.cat([scale.cpu() for scale in scales]) for scales in zip(*batches, strict=True)]
