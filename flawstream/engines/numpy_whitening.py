"""What stands before a flow, on arrays: for engines whose flows are no torch modules.

In NumPy: torch would start threads of its own under each of an engine's, and takes longer for one image.

Shape legend: B images, C channels, H W height and width of a scale's grid, G groups of g channels.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from torch import nn

from flawstream.fastflow.statistics import FeatureStatistics

Grid = NDArray[np.float32]


def array_normaliser(statistics: nn.Module) -> Callable[[Grid], Grid]:
    """Give what a module of `fastflow.normalisation` does to (B, C, H, W) features, without gaps in memory."""
    match statistics:
        case FeatureStatistics():
            return _whitener(statistics)
        case nn.LayerNorm():
            return _layer_norm(statistics)
        case _:
            return np.ascontiguousarray


def _layer_norm(norm: nn.LayerNorm) -> Callable[[Grid], Grid]:
    factor, offset, epsilon = norm.weight.detach().numpy(), norm.bias.detach().numpy(), np.float32(norm.eps)

    def run(features: Grid) -> Grid:
        centred = features - features.mean(axis=(1, 2, 3), keepdims=True)
        deviation = np.sqrt(np.square(centred).mean(axis=(1, 2, 3), keepdims=True) + epsilon)
        normal: Grid = centred / deviation * factor + offset
        return normal

    return run


def _whitener(statistics: FeatureStatistics) -> Callable[[Grid], Grid]:
    mean, factor = statistics.mean.numpy(), 1 / statistics.deviation.numpy()
    whitening, groups = statistics.whitening.numpy(), statistics.groups

    def run(features: Grid) -> Grid:
        count, channels, height, width = features.shape
        scaled = ((features - mean) * factor).reshape(count, groups, channels // groups, height * width)
        positions = np.ascontiguousarray(scaled.transpose(3, 1, 0, 2))  # (H W, G, B, g)
        white = positions.reshape(-1, count, channels // groups) @ whitening
        return np.ascontiguousarray(white.reshape(positions.shape).transpose(2, 1, 3, 0)).reshape(features.shape)

    return run
