"""Feature statistics before the flow: what is usual at each position of the normal training images.

Shape legend: B images, N training images, C channels, H W height and width of the scale's grid, G groups of g channels.

A flow of a few steps learns slowly what a mean and a covariance tell at once, so features are made white first: at
every position the mean goes, and the channels are decorrelated and scaled to about unit variance by the symmetric root
of the inverse covariance, which keeps each channel nearest to what it was. The idea of a Gaussian at each position is
PaDiM's (Defard et al., arXiv 2011.08785, section 3.2); here the flow starts where PaDiM ends. Where objects lie at any
place, all positions see the same and their statistics come out alike: nothing has to be chosen.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

_SCALE_FLOOR = 1e-3
_POSITION_FLOOR = 0.1
_MOST_VALUES = 1 << 22
"""Of the whitening of one scale: 8 MB on disk. Where C x C x H x W is more, groups of channels are made white apart."""


class FeatureStatistics(nn.Module):
    """Make features white by their mean and covariance at each position.

    A covariance estimated from N images is shrunk towards a multiple of the identity by Ledoit and Wolf's rule, the
    more the fewer the images. Deviations are widened by a tenth of the channel's and a thousandth of the scale's, so
    that a position that hardly varies in a few hundred images does not turn noise into an anomaly.

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
        """Make (B, C, H, W) features white."""
        channels, side = self.mean.shape[:2]
        size = channels // self.groups
        scaled = ((features - self.mean) / self.deviation).reshape(-1, self.groups, size, side, side)
        white = torch.bmm(scaled.permute(3, 4, 1, 0, 2).flatten(0, 2), self.whitening)  # (H W G, B, g)
        return white.reshape(side, side, self.groups, -1, size).permute(3, 2, 4, 0, 1).reshape(-1, channels, side, side)

    @torch.no_grad()
    def set_from(self, rows: Callable[[], Iterable[Tensor]]) -> None:
        """Set the statistics from the training images.

        Args:
            rows: Gives the H rows of the grid from the top, each (N, C, W) float with N at least 2; called twice.
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
            of_row = self.whitening[h * width * self.groups : (h + 1) * width * self.groups]
            of_row.copy_(_whitening(grouped).flatten(0, 1).half())  # half: what is used now is what is kept on disk


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
