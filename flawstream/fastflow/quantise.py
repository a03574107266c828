"""Quantisation of the convolutions of torch modules to int8, simulated in float as int8 compilers recognise it.

Weights get one scale per output channel and inputs one scale, from the range of inputs on real images. Outputs of a
convolution are float again. Knows no compiler and no files.

Source: Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference
(arXiv 1712.05877), section 2; Krishnamoorthi (arXiv 1806.08342), section 3, for a scale for each channel.

Shape legend: B images, C channels, H W height and width.
"""

from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack

import torch
from timm.layers import Conv2dSame, conv2d_same
from torch import Tensor, nn
from torch.nn import functional

_SMALLEST = 1e-8
_STEPS_SIGNED, _STEPS_UNSIGNED = 127, 255

_Round = Callable[[float], float]


class QuantisedConv(nn.Module):
    """A convolution of int8 weights and int8 inputs. Inputs outside the calibrated range are clipped.

    Args:
        convolution: With float weights; not changed.
        low: Smallest input in the calibrated range; if it is not negative, inputs are unsigned.
        high: Largest input in the calibrated range.
        weight_steps: Largest integer of a weight, at most 127.

    Attributes:
        convolution: As given.
        bounds: Lowest and highest integer of an input.
        input_scale: What an integer of an input stands for.
        weight_scale: (C,) the same of the weights, for each output channel.
        zeros: (C,) int32 zeros: torch wants the integer that stands for zero.
    """

    def __init__(self, convolution: nn.Conv2d, low: float, high: float, weight_steps: int = _STEPS_SIGNED) -> None:
        super().__init__()
        self.convolution = convolution
        self._weight_steps = weight_steps
        self.bounds = (-_STEPS_SIGNED - 1, _STEPS_SIGNED) if low < 0 else (0, _STEPS_UNSIGNED)
        self.input_scale = max(-low, high, _SMALLEST) / self.bounds[1]
        channel_max = convolution.weight.detach().abs().amax(dim=(1, 2, 3))
        self.weight_scale = nn.Buffer(channel_max.clamp_min(_SMALLEST) / weight_steps)
        self.zeros = nn.Buffer(torch.zeros(len(channel_max), dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, C, H, W)."""
        conv = self.convolution
        weight = torch.fake_quantize_per_channel_affine(
            conv.weight, self.weight_scale, self.zeros, 0, -self._weight_steps, self._weight_steps
        )
        x = torch.fake_quantize_per_tensor_affine(x, self.input_scale, 0, *self.bounds)
        convolve = conv2d_same if isinstance(conv, Conv2dSame) else functional.conv2d
        return convolve(x, weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)

    def int8_weight(self) -> Tensor:
        """Return the weight in units of `weight_scale`, as int8; rounded as `forward` rounds it."""
        factor = 1 / self.weight_scale[:, None, None, None]
        integers = (self.convolution.weight.detach() * factor).round()
        return integers.clamp(-self._weight_steps, self._weight_steps).to(torch.int8)


def quantise(
    module: nn.Module,
    run: Callable[[], object],
    *,
    chosen: Collection[nn.Module] | None = None,
    weight_steps: int = _STEPS_SIGNED,
    round_range: _Round = float,
) -> int:
    """Replace the convolutions of a module by int8 convolutions.

    Args:
        module: Changed in place.
        run: Runs the module on representative inputs; called once.
        chosen: The convolutions to replace; None: all.
        weight_steps: Largest integer of a weight, at most 127.
        round_range: Applied to both ends of each range.

    Returns:
        The number of replaced convolutions.
    """
    ranges: dict[nn.Conv2d, tuple[float, float]] = {}

    def observe_range(convolution: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(convolution, nn.Conv2d)  # noqa: S101 - hooked below
        low, high = ranges.get(convolution, (0.0, 0.0))
        batch_low, batch_high = inputs[0].aminmax()
        ranges[convolution] = min(low, float(batch_low)), max(high, float(batch_high))

    with ExitStack() as hooks:
        for child in module.modules():
            if isinstance(child, nn.Conv2d) and (chosen is None or child in chosen):
                hooks.callback(child.register_forward_pre_hook(observe_range).remove)
        with torch.inference_mode():
            run()
    quantised: dict[nn.Module, nn.Module] = {
        convolution: QuantisedConv(convolution, round_range(low), round_range(high), weight_steps)
        for convolution, (low, high) in ranges.items()
    }
    _replace(module, quantised)
    return len(ranges)


def _replace(module: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if child in replacements:
                setattr(parent, name, replacements[child])
