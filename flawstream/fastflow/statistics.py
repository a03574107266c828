"""Feature statistics before the flow: mean and covariance at each position, over the normal training images.

Shape legend: B images, N training images, C channels, H W height and width of the scale's grid, G groups of g channels.

A flow of a few steps learns mean and covariance slowly, so features are whitened first: at every position the mean is
subtracted, and the channels are decorrelated and scaled to about unit variance by the symmetric root of the inverse
covariance (ZCA), which changes each channel least. A Gaussian per position is PaDiM's idea (Defard et al., arXiv
2011.08785, section 3.2); the flow models the remainder. If objects are not aligned, all positions see the same and get
similar statistics, so there is nothing to configure.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

_SCALE_FLOOR = 1e-3
_POSITION_FLOOR = 0.1
_MOST_VALUES = 1 << 22
"""Maximum of C x C x H x W, 8 MB on disk per scale; above it, groups of channels are whitened separately."""


class FeatureStatistics(nn.Module):
    """Whiten features by their mean and covariance at each position.

    The covariance is shrunk towards a multiple of the identity by Ledoit and Wolf's rule, more so with fewer images. A
    tenth of the channel's deviation and a thousandth of the scale's are added to deviations, so that noise at a
    position that hardly varies in training does not become an anomaly.

    Source: Ledoit, Wolf, A well-conditioned estimator for large-dimensional covariance matrices, Journal of
    Multivariate Analysis 88 (2004), section 3.

    Args:
        channels: C.
        side: H = W.
    """

    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        self.groups = next(
            count
            for count in range(1, channels + 1)
            if channels % count == 0 and (count == channels or channels**2 // count * side**2 <= _MOST_VALUES)
        )
        size = channels // self.groups
        self.mean: Tensor
        self.deviation: Tensor
        self.whitening: Tensor
        self.register_buffer("mean", torch.zeros(channels, side, side))
        self.register_buffer("deviation", torch.ones(channels, 1, 1))
        self.register_buffer("whitening", torch.eye(size).repeat(side * side * self.groups, 1, 1))

    def forward(self, features: Tensor) -> Tensor:
        """Whiten (B, C, H, W) features."""
        channels, side = self.mean.shape[:2]
        size = channels // self.groups
        scaled = ((features - self.mean) / self.deviation).reshape(-1, self.groups, size, side, side)
        white = torch.bmm(scaled.permute(3, 4, 1, 0, 2).flatten(0, 2), self.whitening)  # (H W G, B, g)
        return white.reshape(side, side, self.groups, -1, size).permute(3, 2, 4, 0, 1).reshape(-1, channels, side, side)

    @torch.no_grad()
    def set_from(self, rows: Callable[[], Iterable[Tensor]]) -> None:
        """Compute the statistics from the training images.

        Args:
            rows: Returns the H rows of the grid from the top, each (N, C, W) float with N at least 2; called twice.
        """
        squares = torch.zeros(len(self.mean), dtype=torch.float64)
        for h, row in enumerate(rows()):
            mean = row.double().mean(dim=0)
            self.mean[:, h].copy_(mean)
            squares += (row.double() - mean).square().mean(dim=0).mean(dim=1)
        deviation = (squares / self.mean.shape[1]).sqrt()
        widened = deviation + _SCALE_FLOOR * deviation.mean()
        self.deviation.copy_(widened.clamp_min(torch.finfo(torch.float32).tiny)[:, None, None])
        for h, row in enumerate(rows()):
            scaled = (row.double() - self.mean[:, h].double()) / self.deviation[:, 0].double()
            count, _, width = scaled.shape
            grouped = scaled.reshape(count, self.groups, -1, width).permute(3, 1, 0, 2)  # (W, G, N, g)
            row_whitening = self.whitening[h * width * self.groups : (h + 1) * width * self.groups]
            row_whitening.copy_(_whitening(grouped).flatten(0, 1).half())  # half: use the values that are saved


def _whitening(samples: Tensor) -> Tensor:
    """Compute the symmetric root of the inverse of a shrunk covariance; (..., N, g) of mean 0 to (..., g, g)."""
    count, size = samples.shape[-2:]
    identity = torch.eye(size, dtype=samples.dtype)
    covariance = samples.mT @ samples / count
    level = covariance.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[..., None, None] * identity
    distance = (covariance - level).square().sum(dim=(-2, -1))
    norms = samples.square().sum(dim=-1)
    noise = norms.square().sum(dim=-1) / count**2 - covariance.square().sum(dim=(-2, -1)) / count
    share = (noise / distance.clamp_min(torch.finfo(samples.dtype).tiny)).clamp(0, 1)[..., None, None]
    shrunk = (1 - share) * covariance + share * level + _POSITION_FLOOR**2 * identity
    values, vectors = torch.linalg.eigh(shrunk)
    root: Tensor = (vectors * values.clamp_min(_POSITION_FLOOR**2).rsqrt()[..., None, :]) @ vectors.mT
    return root
