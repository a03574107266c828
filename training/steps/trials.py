"""Faster arithmetics for a version, and the proof that it scores in them as in float32. No Ray in here.

On a CPU, int8 for the flows; on a GPU, float16 for backbone and flows. A faster form that does harm is not kept, and
the manifest says what was found (docs/decisions/0005).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from flawstream.calibration import is_anomalous
from flawstream.engines.cuda.engine import CudaEngine
from flawstream.engines.openvino.int8_graph import int8_pays
from flawstream.engines.openvino.int8_versions import open_int8
from flawstream.engines.protocol import Engine, Loaded
from flawstream.fastflow.head import FastFlowHead
from schemas.manifest import ArithmeticTrial, Calibration, EvaluationMetrics
from training.report.metrics import rate_interval
from training.steps.features import FeatureExtractor
from training.steps.quantise import range_features, write_flows

LEAST_RANK = 0.99
"""Of normal images' scores in the faster arithmetic and in float32."""
MOST_AUROC_LOSS = 0.003

_FEWEST = 20
"""Held-out normal images; fewer prove nothing."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A faster form of a version, not yet proven.

    Attributes:
        arithmetic: In what it computes.
        scope: What is computed in it: the flows, or the whole version.
        loaded: A head for the engine.
        files: What lies beside the weights if it is kept, by name.
    """

    arithmetic: Literal["int8", "float16"]
    scope: Literal["flows", "version"]
    loaded: Loaded
    files: Mapping[str, bytes] = field(default_factory=dict)


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
    extractor: FeatureExtractor, engine: Engine, head: FastFlowHead, normal: Sequence[Path], held_out_images: int
) -> list[Candidate]:
    """Make the faster forms of a version that this machine computes, the preferred first.

    In int8 the backbone stays in float32: white features enlarge what a quantised one loses beyond any use
    (docs/decisions/0005).

    Args:
        extractor: The backbone.
        engine: The engine that will serve.
        head: The trained head.
        normal: Normal images that ranges of int8 are taken from, not held out; empty: no int8.
        held_out_images: How many others there are to prove it on.

    Returns:
        None where there are too few images, or nothing faster.

    Raises:
        DatasetError: An image cannot be read.
    """
    if held_out_images < _FEWEST:
        return []
    if isinstance(engine, CudaEngine):
        return [Candidate("float16", "version", engine.load_for_trial(head))] if engine.trial_arithmetic else []
    if not normal or not int8_pays():
        return []
    files = write_flows(head, range_features(extractor, normal))
    return [Candidate("int8", "flows", open_int8(head, files, extractor.spec), files)]


def choose_candidate(
    candidates: Sequence[Candidate], judged: Sequence[Judged], exact: Judged
) -> tuple[tuple[ArithmeticTrial, ...], Mapping[str, bytes]]:
    """Keep the first candidate that does no harm.

    Args:
        candidates: What `make_candidates` made.
        judged: What each makes of the images.
        exact: What float32 makes of the same images.

    Returns:
        What was found up to the one that is kept, and that one's files, if one is.
    """
    trials: list[ArithmeticTrial] = []
    for candidate, found in zip(candidates, judged, strict=True):
        trials.append(_compare(candidate, found, exact))
        if trials[-1].kept:
            return tuple(trials), candidate.files
    return tuple(trials), {}


def _compare(candidate: Candidate, faster: Judged, exact: Judged) -> ArithmeticTrial:
    """Hold a faster form against float32, each judged by the threshold that its own scores set."""
    threshold = exact.calibration.threshold
    verdicts, exact_verdicts = (is_anomalous(one.held_out, one.calibration.threshold) for one in (faster, exact))
    changed = int((verdicts != exact_verdicts).sum())
    missed = exact_verdicts.size * rate_interval(int(exact_verdicts.sum()), exact_verdicts.size)[1]
    found, exact_found = (is_anomalous(one.defective, one.calibration.threshold) for one in (faster, exact))
    lost = int((exact_found & ~found).sum()) if exact_found.size else None
    rank = float(spearmanr(faster.held_out, exact.held_out).statistic)
    auroc, exact_auroc = faster.metrics.image_auroc, exact.metrics.image_auroc
    harmless = (
        rank >= LEAST_RANK
        and exact_verdicts.sum() + changed <= missed
        and not lost
        and (auroc is None or exact_auroc is None or exact_auroc - auroc <= MOST_AUROC_LOSS)
    )
    return ArithmeticTrial(
        arithmetic=candidate.arithmetic,
        scope=candidate.scope,
        kept=bool(harmless),
        normal_images=len(exact.held_out),
        rank_correlation=rank,
        alarms=float(is_anomalous(faster.held_out, threshold).mean()),
        alarms_float32=float(exact_verdicts.mean()),
        changed_verdicts=changed,
        lost_defects=lost,
        image_auroc=auroc,
        image_auroc_float32=exact_auroc,
        calibration=faster.calibration,
        metrics=faster.metrics,
    )
