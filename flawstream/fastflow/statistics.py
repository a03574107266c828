"""Feature statistics before the flow: what is usual at each position and channel of the normal training images.

Shape legend: B images, C channels, H W height and width of the scale's grid.
"""

import torch
from torch import Tensor, nn

_CHANNEL_FLOOR = 0.1
_SCALE_FLOOR = 1e-3


class FeatureStatistics(nn.Module):
    """Standardise features by their mean and deviation at each position and channel.

    The deviation is widened by a tenth of the channel's average and a thousandth of the scale's, so that a position
    that hardly varies in a few hundred images does not turn noise into an anomaly.

    Args:
        channels: C.
        side: H = W.
    """

    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        self.mean: Tensor
        self.deviation: Tensor
        self.register_buffer("mean", torch.zeros(channels, side, side))
        self.register_buffer("deviation", torch.ones(channels, side, side))

    def forward(self, features: Tensor) -> Tensor:
        """Standardise (B, C, H, W) features."""
        return (features - self.mean) / self.deviation

    @torch.no_grad()
    def set_from(self, total: Tensor, total_of_squares: Tensor, count: int) -> None:
        """Set the statistics from sums over the training images.

        Args:
            total: (C, H, W) float64, sum of the features.
            total_of_squares: (C, H, W) float64, sum of their squares.
            count: Number of images, at least 2.
        """
        mean = total / count
        variance = (total_of_squares - count * mean.square()) / (count - 1)
        deviation = variance.clamp_min(0).sqrt()
        widened = (
            deviation + _CHANNEL_FLOOR * deviation.mean(dim=(1, 2), keepdim=True) + _SCALE_FLOOR * deviation.mean()
        )
        self.mean.copy_(mean)
        self.deviation.copy_(widened.clamp_min(torch.finfo(torch.float32).tiny))
