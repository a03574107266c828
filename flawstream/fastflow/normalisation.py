"""What stands before a flow and brings features to one scale: one module a `FlowSpec.normalisation`.

Shape legend: C channels, H W height and width of a scale's grid.
"""

from typing import assert_never

from torch import nn

from flawstream.fastflow.statistics import FeatureStatistics
from schemas.manifest import Normalisation


def make_normalisation(kind: Normalisation, channels: int, side: int) -> nn.Module:
    """Make what maps (B, C, H, W) features to the flow's input of the same shape.

    Source: `layer_norm` is what public re-implementations do for CNNs: over all values of an image's scale, with a
    trained (C, H, W) factor and offset. `none` is theirs for transformers, whose own last norm has been applied.

    Args:
        kind: `statistics`, which training sets, or one of the two that imported versions have.
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
