"""Normalisation of features before the flow: one module for each `FlowSpec.normalisation`.

Shape legend: C channels, H W height and width of a scale's grid.
"""

from typing import assert_never

from torch import nn

from flawstream.fastflow.statistics import FeatureStatistics
from schemas.manifest import Normalisation


def make_normalisation(kind: Normalisation, channels: int, side: int) -> nn.Module:
    """Create the module that normalises (B, C, H, W) features; the shape stays.

    Source: public re-implementations use `layer_norm` for CNNs, over all values of one scale of an image, with trained
    (C, H, W) factor and offset, and `none` for transformers, which end in a norm of their own.

    Args:
        kind: `statistics` for versions trained here; the others for imported versions.
        channels: C.
        side: H = W.
    """
    match kind:
        case "statistics":
            return FeatureStatistics(channels, side)
        case "layer_norm":
            return nn.LayerNorm([channels, side, side])
        case "none":
            return nn.Identity()
        case _:
            assert_never(kind)
