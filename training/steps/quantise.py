"""An int8 graph of a version's flows, with ranges from normal images. Whether it is used: `training.steps.trials`.

Shape legend: B images, C channels, H W height and width of a scale's grid, s a scale.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flawstream.engines.openvino.head_graph import flows_graph
from flawstream.engines.openvino.int8_graph import write_int8
from flawstream.fastflow.head import FastFlowHead, FoldedHead
from flawstream.fastflow.quantise import quantise
from training.steps.features import FeatureExtractor

_RANGE_IMAGES = 32


def range_features(extractor: FeatureExtractor, normal: Sequence[Path]) -> list[Tensor]:
    """Compute the features that ranges are taken from, of a few of the images: one (B, C_s, H_s, W_s) per scale.

    Raises:
        DatasetError: An image cannot be read.
    """
    chosen = normal
    if len(normal) > _RANGE_IMAGES:
        chosen = [normal[index] for index in np.linspace(0, len(normal) - 1, _RANGE_IMAGES).round().astype(int)]
    batches = [features for _, features in extractor.batches(chosen)]
    return [torch.cat([scale.cpu() for scale in scales]) for scales in zip(*batches, strict=True)]


def write_flows(head: FastFlowHead, features: list[Tensor]) -> dict[str, bytes]:
    """Write the flows of a head as an int8 graph, from normalised features to grids.

    Args:
        head: Trained; left as it is.
        features: One (B, C_s, H_s, W_s) tensor per scale, which ranges are taken from.

    Returns:
        The files by name.
    """
    folded = FoldedHead(head, by_index=True)
    with torch.inference_mode():
        normalised = [statistics(scale) for statistics, scale in zip(folded.statistics, features, strict=True)]
    quantise(folded, lambda: folded.score(normalised))
    return write_int8(flows_graph(folded, [(*scale.shape[1:],) for scale in features]))
