"""Torch modules whose convolutions compute in int8, in float arithmetic that compilers for int8 recognise.

Weights get a scale for each output channel and inputs one scale, from the range that was seen on real images. Nothing
else loses precision: what a convolution gives is float again. Knows no compiler and no files.

Source: Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference
(arXiv 1712.05877), section 2; Krishnamoorthi (arXiv 1806.08342), section 3, for a scale for each channel.

Shape legend: B images, C channels, H W height and width.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.nn import functional

_SMALLEST = 1e-8
_STEPS_SIGNED, _STEPS_UNSIGNED = 127, 255


class QuantisedConv(nn.Module):
    """A convolution of int8 weights and int8 inputs. Inputs beyond the range that was seen are cut off.

    Args:
        convolution: With its weights in float; left as it is.
        low: Least input that was seen; where there is none below zero, inputs are unsigned.
        high: Largest input that was seen.
    """

    def __init__(self, convolution: nn.Conv2d, low: float, high: float) -> None:
        super().__init__()
        self._convolution = convolution
        self._signed = low < 0
        reach = max(-low, high, _SMALLEST)
        self._input_scale = reach / (_STEPS_SIGNED if self._signed else _STEPS_UNSIGNED)
        reach_of_channels = convolution.weight.detach().abs().amax(dim=(1, 2, 3))
        self.weight_scale = nn.Buffer(reach_of_channels.clamp_min(_SMALLEST) / _STEPS_SIGNED)
        self.zeros = nn.Buffer(torch.zeros(len(reach_of_channels), dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, C, H, W)."""
        bounds = (-_STEPS_SIGNED - 1, _STEPS_SIGNED) if self._signed else (0, _STEPS_UNSIGNED)
        own = self._convolution
        weight = torch.fake_quantize_per_channel_affine(
            own.weight, self.weight_scale, self.zeros, 0, -_STEPS_SIGNED, _STEPS_SIGNED
        )
        x = torch.fake_quantize_per_tensor_affine(x, self._input_scale, 0, *bounds)
        return functional.conv2d(x, weight, own.bias, own.stride, own.padding, own.dilation, own.groups)


def quantise(module: nn.Module, run: Callable[[], object]) -> int:
    """Replace a module's convolutions by int8 ones.

    Args:
        module: Changed in place.
        run: Runs the module on representative inputs; called once.

    Returns:
        How many were replaced.
    """
    seen: dict[nn.Conv2d, tuple[float, float]] = {}

    def look(convolution: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(convolution, nn.Conv2d)  # noqa: S101 - hooked below
        low, high = seen.get(convolution, (0.0, 0.0))
        least, most = inputs[0].aminmax()
        seen[convolution] = min(low, float(least)), max(high, float(most))

    with ExitStack() as hooks:
        for one in module.modules():
            if isinstance(one, nn.Conv2d):
                hooks.callback(one.register_forward_pre_hook(look).remove)
        with torch.inference_mode():
            run()
    _replace(module, {convolution: QuantisedConv(convolution, *range_) for convolution, range_ in seen.items()})
    return len(seen)


def _replace(module: nn.Module, by: Mapping[nn.Module, nn.Module]) -> None:
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if child in by:
                setattr(parent, name, by[child])
