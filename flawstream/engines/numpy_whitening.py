"""Normalisation of features in NumPy, for engines that do not run flows in torch.

Torch would start additional threads in each thread of an engine, and is slower at batch size 1.

Shape legend: B images, C channels, H W height and width of a scale's grid, G groups of g channels.
"""

from collections.abc import Callable

import numpy as np
from torch import nn

from flawstream.engines.protocol import Float32Array
from flawstream.fastflow.statistics import FeatureStatistics


def array_normaliser(statistics: nn.Module) -> Callable[[Float32Array], Float32Array]:
    """Return the NumPy function for a module of `fastflow.normalisation`; maps contiguous (B, C, H, W) features."""
    match statistics:
        case FeatureStatistics():
            return _whitener(statistics)
        case nn.LayerNorm():
            return _layer_norm(statistics)
        case _:
            return np.ascontiguousarray


def _layer_norm(norm: nn.LayerNorm) -> Callable[[Float32Array], Float32Array]:
    factor, offset, epsilon = norm.weight.detach().numpy(), norm.bias.detach().numpy(), np.float32(norm.eps)

    def run(features: Float32Array) -> Float32Array:
        centred = features - features.mean(axis=(1, 2, 3), keepdims=True)
        deviation = np.sqrt(np.square(centred).mean(axis=(1, 2, 3), keepdims=True) + epsilon)
        normalised: Float32Array = centred / deviation * factor + offset
        return normalised

    return run


def _whitener(statistics: FeatureStatistics) -> Callable[[Float32Array], Float32Array]:
    mean, factor = statistics.mean.numpy(), 1 / statistics.deviation.numpy()
    whitening, groups = statistics.whitening.numpy(), statistics.groups

    def run(features: Float32Array) -> Float32Array:
        count, channels, height, width = features.shape
        scaled = ((features - mean) * factor).reshape(count, groups, channels // groups, height * width)
        positions = np.ascontiguousarray(scaled.transpose(3, 1, 0, 2))  # (H W, G, B, g)
        white = positions.reshape(-1, count, channels // groups) @ whitening
        return np.ascontiguousarray(white.reshape(positions.shape).transpose(2, 1, 3, 0)).reshape(features.shape)

    return run
