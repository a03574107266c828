"""Anomaly grids and image scores from latents.

Shape legend: B images, K latent channels, H W height and width of a scale's grid, s a scale.

Source: FastFlow, section 3.3. The paper scores a position by `-exp(log p)`; that saturates for gross defects, so the
score here is the negative log-likelihood without its constant, `0.5 mean_k z_k^2`: nats per channel, 0.5 on average for
normal positions, higher for anomalous ones. `likelihood_score` is the paper's score.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from schemas.errors import ShapeError

HIGHEST_SCORE = float(np.finfo(np.float32).max)
"""The score that `score_images` returns in place of NaN and infinity."""


def anomaly_grid(latents: Tensor) -> Tensor:
    """Score every position of one scale; (B, K, H, W) latents to (B, H, W), nats per channel, 0 or more."""
    return 0.5 * latents.square().mean(dim=1)


def likelihood_score(grid: Tensor) -> Tensor:
    """Convert nats per channel to the paper's score, in [-1, 0); the shape stays."""
    return -torch.exp(-grid)


def likelihood_map(grids: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Convert grids to the paper's anomaly map, as public re-implementations do: score, upsample, average.

    Source: FastFlow, section 3.3.

    Args:
        grids: One (B, H_s, W_s) float tensor per feature scale, nats per channel.
        size: (height, width) in pixels of the map.

    Returns:
        (B, height, width) float, in [-1, 0]; higher is more anomalous.
    """
    scales = [
        functional.interpolate(likelihood_score(grid)[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]
        for grid in grids
    ]
    return torch.stack(scales).mean(dim=0)


def image_scores(grids: Sequence[Tensor], top_fraction: float) -> Tensor:
    """Score whole images: scales averaged at the coarsest grid, then the mean of the highest values.

    Finer scales are pooled first, because single positions of them are high by chance in normal images too
    (docs/decisions/0004).

    Args:
        grids: One (B, H_s, W_s) float32 tensor per feature scale.
        top_fraction: Share of the positions to average, in [0, 1]; 0 takes only the maximum.

    Returns:
        (B,) float32, nats per channel.

    Raises:
        ShapeError: There is no grid, or batch sizes differ.
    """
    if not grids or any(grid.shape[0] != grids[0].shape[0] for grid in grids):
        raise ShapeError(f"grids of one batch are needed, got shapes {[tuple(grid.shape) for grid in grids]}")
    positions = _positions(grids)
    count = top_positions(positions.shape[1], top_fraction)
    return positions.topk(count, dim=1).values.mean(dim=1)


def top_positions(positions: int, top_fraction: float) -> int:
    """Return how many positions an image score averages: a share of the coarsest grid's, at least one."""
    return max(1, int(positions * top_fraction))


def ranked_scores(grids: Sequence[Tensor], counts: Tensor) -> Tensor:
    """Score whole images as `image_scores` does, each from its own number of positions, without a wait for a device.

    Args:
        grids: One (B, H_s, W_s) float tensor per feature scale.
        counts: (B,) int64, from `top_positions`.

    Returns:
        (B,) float32, nats per channel.
    """
    ranked = _positions(grids).sort(dim=1, descending=True).values
    chosen = torch.arange(ranked.shape[1], device=ranked.device) < counts[:, None]
    return torch.where(chosen, ranked, 0.0).sum(dim=1) / counts


def _positions(grids: Sequence[Tensor]) -> Tensor:
    """Average the scales at the coarsest grid: (B, positions) float32."""
    height, width = min((grid.shape[1:] for grid in grids), key=lambda shape: shape[0] * shape[1])
    total = torch.zeros((grids[0].shape[0], height, width), dtype=torch.float32, device=grids[0].device)
    for grid in grids:
        total += functional.adaptive_avg_pool2d(grid.float()[:, None], (height, width))[:, 0]
    return (total / len(grids)).flatten(start_dim=1)


def score_images(grids: Sequence[NDArray[np.float32]], top_fraction: float) -> NDArray[np.float64]:
    """Score whole images from the grids that an engine returns: calibration, evaluation and serving all call this.

    The grids are not clipped as published maps are: a threshold above the clipping bound would never be exceeded.

    Args:
        grids: One (B, H_s, W_s) float32 array per feature scale, nats per channel.
        top_fraction: As in `image_scores`.

    Returns:
        (B,) float64, finite, each exactly a float32. NaN and infinity become float32's maximum, so that an image
        whose score cannot be computed is never normal.

    Raises:
        ShapeError: There is no grid, or batch sizes differ.
    """
    return finite_scores(image_scores([torch.from_numpy(grid) for grid in grids], top_fraction).numpy())


def finite_scores(scores: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return scores as float64, with float32's maximum for NaN and infinity."""
    finite = np.nan_to_num(scores, nan=HIGHEST_SCORE, posinf=HIGHEST_SCORE, neginf=HIGHEST_SCORE)
    return np.asarray(finite, np.float64)


def half_grid(grid: Tensor) -> Tensor:
    """Clip a grid to the range of float16 and convert it, as `flawstream.imaging.maps.bounded` does for arrays."""
    highest = torch.finfo(torch.float16).max
    return torch.nan_to_num(grid, nan=highest, posinf=highest, neginf=-highest).clamp(-highest, highest).half()
