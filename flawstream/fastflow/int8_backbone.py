"""A backbone whose convolutions are int8, the same on every machine and for every category.

The ranges of inputs come from noise that looks like photographs to a convolution, never from a category's images: all
categories share one backbone. Weights have seven bits, as CPUs without VNNI add two products of eight bits in sixteen
and would overflow. What quantisation changes is in the features that statistics, flow and thresholds are computed from:
docs/decisions/0011.

Shape legend: B images, S side of an image in pixels.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flawstream.fastflow.fold import fold_batch_norms
from flawstream.fastflow.quantise import quantise

_WEIGHT_STEPS = 63
_IMAGES = 8
_SEED = 0
_CONTRAST = 64.0
"""Standard deviation of the noise in grey levels, about the middle: both ends of the range occur."""


@torch.inference_mode()
def to_int8(network: nn.Module, shift: Tensor, factor: Tensor, side_px: int) -> nn.Module:
    """Return a copy of a network with folded batch norms and int8 convolutions, simulated in float.

    The first convolution and depthwise ones stay in float: they are a few percent of the work and lose the most.

    Args:
        network: Maps (B, 3, S, S) normalised pixels to features; in evaluation mode, not changed.
        shift: (1, 3, 1, 1) grey levels, subtracted from pixels.
        factor: (1, 3, 1, 1), multiplied with them.
        side_px: S.
    """
    pixels = torch.from_numpy(noise_images(_IMAGES, side_px)).permute(0, 3, 1, 2).to(shift.dtype)
    inputs = (pixels - shift) * factor
    folded, _ = fold_batch_norms(network, inputs[:1])
    convolutions = [module for module in folded.modules() if isinstance(module, nn.Conv2d)]
    chosen = {convolution for convolution in convolutions[1:] if convolution.groups == 1}
    quantise(folded, lambda: folded(inputs), chosen=chosen, weight_steps=_WEIGHT_STEPS, round_range=round_up)
    return folded


def noise_images(count: int, side_px: int) -> NDArray[np.uint8]:
    """Make images whose amplitude falls with the spatial frequency, as that of photographs does.

    Source: Field, Relations between the statistics of natural images and the response properties of cortical cells
    (J. Opt. Soc. Am. A 4, 1987).

    Returns:
        (B, S, S, 3), the same for the same arguments.
    """
    white = np.random.default_rng(_SEED).normal(size=(count, side_px, side_px, 3))
    frequency = np.hypot(np.fft.fftfreq(side_px)[:, None], np.fft.rfftfreq(side_px)[None])
    frequency[0, 0] = 1.0  # the mean, which is set below
    noise = np.fft.irfft2(np.fft.rfft2(white, axes=(1, 2)) / frequency[None, :, :, None], (side_px, side_px), (1, 2))
    levels = (noise - noise.mean()) / noise.std() * _CONTRAST + 128.0
    return np.asarray(levels.clip(0, 255), np.uint8)


def round_up(value: float) -> float:
    """Round a range up to one of 32 values per power of two, so that it does not depend on a machine's rounding."""
    if value == 0:
        return 0.0
    mantissa, exponent = math.frexp(abs(value))
    return math.copysign(math.ldexp(math.ceil(mantissa * 64) / 64, exponent), value)
