"""The training loss."""

from collections.abc import Sequence

import torch
from torch import Tensor


def negative_log_likelihood(latents: Sequence[Tensor], log_dets: Sequence[Tensor]) -> Tensor:
    """Compute the mean negative log-likelihood of a batch, without its constant.

    Each scale is divided by its number of values, so that a fine grid does not outweigh a coarse one.

    Source: FastFlow, equation 3.

    Args:
        latents: One (B, K_s, H_s, W_s) tensor per feature scale.
        log_dets: One (B,) tensor per feature scale, nats.

    Returns:
        A scalar, nats per value summed over the scales.
    """
    per_scale = [
        ((0.5 * z.square().sum(dim=(1, 2, 3)) - log_det) / z[0].numel()).mean()
        for z, log_det in zip(latents, log_dets, strict=True)
    ]
    return torch.stack(per_scale).sum()
