"""The 2D normalizing flow of one feature scale, and its folded form for inference.

Shape legend: B images, C channels, H W height and width of the scale's grid.

A step is the block that public re-implementations of FastFlow use (FrEIA's all-in-one block): affine coupling with a
small convolutional subnet, soft clamp, global affine, fixed permutation. The permutation is an index here and a C x C
matrix there. Knows no backbone and no loss.
"""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

DAMPING = 0.1
"""Subnet outputs start small, so that a new step is close to the identity."""
_SOFTPLUS_BETA = 0.5
_SCALE_FACTOR = 0.1


def global_scale(raw_scale: Tensor) -> Tensor:
    """Compute the positive factors of a global affine from their parameters, of any shape."""
    return _SCALE_FACTOR * functional.softplus(raw_scale, beta=_SOFTPLUS_BETA)


class _Reorder(torch.autograd.Function):
    """`x[:, order]` of a permutation, whose gradient is another index; torch's own adds into a scattered tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return x[:, order]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (order,) = ctx.saved_tensors
        return gradients[0][:, torch.argsort(order)], None


class FlowStep(nn.Module):
    """One invertible step.

    Source: FastFlow, section 3.2 and figure 3; the affine coupling is RealNVP's (arXiv 1605.08803, section 3.2).

    Args:
        channels: C.
        kernel_size: Kernel size of the subnet's two convolutions, 3 or 1.
        hidden_ratio: Hidden channels of the subnet over its input channels.
        clamp: Bound of the log scale.
        generator: Draws the permutation.
    """

    def __init__(
        self, channels: int, *, kernel_size: int, hidden_ratio: float, clamp: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.passive = channels - channels // 2
        self.active = channels // 2
        self.clamp = clamp
        hidden = max(1, int(self.passive * hidden_ratio))
        self.subnet = nn.Sequential(
            nn.Conv2d(self.passive, hidden, kernel_size, padding="same"),
            nn.ReLU(),
            nn.Conv2d(hidden, 2 * self.active, kernel_size, padding="same"),
        )
        raw_one = math.log(math.expm1(_SOFTPLUS_BETA / _SCALE_FACTOR)) / _SOFTPLUS_BETA
        self.raw_scale = nn.Parameter(torch.full((1, channels, 1, 1), raw_one))
        self.offset = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.permutation: Tensor
        self.register_buffer("permutation", torch.randperm(channels, generator=generator))

    def global_scale(self) -> Tensor:
        """Compute the (1, C, 1, 1) positive factor of the global affine."""
        return global_scale(self.raw_scale)

    def coupling(self, passive: Tensor) -> tuple[Tensor, Tensor]:
        """Compute log scale and shift of the active half from the passive one, both (B, C // 2, H, W)."""
        log_scale, shift = torch.split(DAMPING * self.subnet(passive), self.active, dim=1)
        return self.clamp * torch.tanh(log_scale), shift

    def folded_layer(self) -> tuple[Tensor, Tensor]:
        """Compute weight and bias of the subnet's last layer, with damping and the active half's affine in them.

        With damping d, global affine (g, o) and the layer's outputs, log scale s and shift t:
        `(x exp(s) + d t) g + o = x exp(s + log g) + (d g t + o)`, so d and g go into the weights and o into the bias.
        That spares passes over the features, which are far larger than the weights.
        """
        last = self.subnet[-1]
        assert isinstance(last, nn.Conv2d)  # noqa: S101 - __init__ made it so
        assert last.bias is not None  # noqa: S101 - the same
        scale, offset = self.global_scale()[0, self.passive :, 0, 0], self.offset[0, self.passive :, 0, 0]
        gain = DAMPING * torch.cat([torch.ones_like(scale), scale])
        return last.weight * gain[:, None, None, None], last.bias * gain + functional.pad(offset, (self.active, 0))

    @torch.no_grad()
    def shrink(self, share: float) -> None:
        """Move the step towards the identity, in place, by multiplying log scales, shifts and the global affine.

        The step stays invertible, with an exact log-determinant. 0 leaves only the permutation, 1 changes nothing.
        """
        last = self.subnet[-1]
        for parameter in last.parameters():
            parameter.mul_(share)
        scale = self.global_scale() ** share
        self.raw_scale.copy_(torch.log(torch.expm1(_SOFTPLUS_BETA / _SCALE_FACTOR * scale)) / _SOFTPLUS_BETA)
        self.offset.mul_(share)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map features towards the normal distribution.

        Args:
            x: (B, C, H, W) float.

        Returns:
            (B, C, H, W) and the (B,) log-determinant of the Jacobian, nats.
        """
        halves = [self.passive, self.active]
        passive, active = torch.split(x, halves, dim=1)
        scale = self.global_scale()
        passive_scale, active_scale = torch.split(scale, halves, dim=1)
        first, relu, _ = self.subnet
        hidden = functional.conv2d(relu(first(passive)), *self.folded_layer(), padding="same")
        log_scale, shift = torch.split(hidden, self.active, dim=1)
        log_scale = self.clamp * torch.tanh(log_scale)
        passive = torch.addcmul(self.offset[:, : self.passive], passive, passive_scale)
        active = torch.addcmul(shift, active, torch.exp(log_scale + active_scale.log()))
        log_det = log_scale.sum(dim=(1, 2, 3)) + scale.log().sum() * (x.shape[2] * x.shape[3])
        return _Reorder.apply(torch.cat([passive, active], dim=1), self.permutation), log_det

    def inverse(self, z: Tensor) -> Tensor:
        """Undo `forward`; (B, C, H, W) to (B, C, H, W)."""
        y = (z[:, torch.argsort(self.permutation)] - self.offset) / self.global_scale()
        passive, active = torch.split(y, [self.passive, self.active], dim=1)
        log_scale, shift = self.coupling(passive)
        return torch.cat([passive, (active - shift) * (-log_scale).exp()], dim=1)


class Flow(nn.Module):
    """The steps of one scale; 3x3 and 1x1 subnets alternate unless all are 3x3 (FastFlow, section 4.2)."""

    def __init__(
        self,
        channels: int,
        *,
        steps: int,
        hidden_ratio: float,
        conv3x3_only: bool,
        clamp: float,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.steps = nn.ModuleList(
            FlowStep(
                channels,
                kernel_size=3 if conv3x3_only or step % 2 == 0 else 1,
                hidden_ratio=hidden_ratio,
                clamp=clamp,
                generator=generator,
            )
            for step in range(steps)
        )

    def shrink(self, share: float) -> None:
        """Move every step towards the identity, in place: `FlowStep.shrink`."""
        for step in self.steps:
            step.shrink(share)  # type: ignore[operator]  # ModuleList has no element type

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map (B, C, H, W) features to latents of the same shape and the (B,) log-determinant, nats."""
        log_det = x.new_zeros(x.shape[0])
        for step in self.steps:
            x, step_log_det = step(x)
            log_det = log_det + step_log_det
        return x, log_det

    def inverse(self, z: Tensor) -> Tensor:
        """Map (B, C, H, W) latents back to features."""
        for step in reversed(self.steps):
            z = step.inverse(z)  # type: ignore[operator]  # ModuleList has no element type
        return z


class FoldedStep(nn.Module):
    """A step for inference: no log-determinant, and all constants folded into the subnet's last layer.

    The active half's affine is in the subnet's last layer: `FlowStep.folded_layer`. The passive half's cannot be folded
    exactly into a zero-padded 3x3 convolution. It is folded into the permutation, which is two 1x1 convolutions, one
    for each half of the next step. On a CPU they are faster than an index, which would convert the features to another
    memory layout. With int8 convolutions that conversion happens anyway: an index is then faster, and exact.

    Args:
        step: The trained step; not changed.
        permute: Whether another step follows.
        by_index: Permute by an index.
    """

    def __init__(self, step: FlowStep, *, permute: bool, by_index: bool = False) -> None:
        super().__init__()
        first, _, last = step.subnet
        assert isinstance(first, nn.Conv2d)  # noqa: S101 - FlowStep made it so
        assert isinstance(last, nn.Conv2d)  # noqa: S101 - the same
        scale, offset = step.global_scale().detach(), step.offset.detach()
        folded = nn.Conv2d(last.in_channels, last.out_channels, last.kernel_size[0], padding="same")
        weight, bias = step.folded_layer()
        folded.weight = nn.Parameter(weight.detach(), requires_grad=False)
        folded.bias = nn.Parameter(bias.detach(), requires_grad=False)
        self.subnet = nn.Sequential(copy.deepcopy(first), nn.ReLU(), folded)
        self.passive, self.active, self.clamp = step.passive, step.active, step.clamp
        self.passive_scale = nn.Buffer(scale[:, : step.passive].clone())
        self.passive_offset = nn.Buffer(offset[:, : step.passive].clone())
        self.log_scale = nn.Buffer(scale[:, step.passive :].log())
        self.mixes = nn.ModuleList()
        self.permutation = nn.Buffer(step.permutation.clone()) if permute and by_index else None
        if permute and not by_index:
            factors = torch.cat([scale[0, : step.passive, 0, 0], scale.new_ones(step.active)])
            offsets = torch.cat([offset[0, : step.passive, 0, 0], offset.new_zeros(step.active)])
            for rows in torch.split(step.permutation, [step.passive, step.active]):
                mix = nn.Conv2d(len(factors), len(rows), 1)
                mix.weight = nn.Parameter(torch.diag(factors)[rows, :, None, None], requires_grad=False)
                mix.bias = nn.Parameter(offsets[rows], requires_grad=False)
                self.mixes.append(mix)

    def forward(self, passive: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
        """Map both halves, (B, C - C // 2, H, W) and (B, C // 2, H, W), to those of the next step."""
        log_scale, shift = torch.split(self.subnet(passive), self.active, dim=1)
        active = active * torch.exp(self.clamp * torch.tanh(log_scale) + self.log_scale) + shift
        if not self.mixes:
            passive = passive * self.passive_scale + self.passive_offset
            if self.permutation is None:
                return passive, active
            mixed = torch.cat([passive, active], dim=1)[:, self.permutation]
            return mixed[:, : self.passive], mixed[:, self.passive :]
        both = torch.cat([passive, active], dim=1)
        return self.mixes[0](both), self.mixes[1](both)


class FoldedFlow(nn.Module):
    """A flow for inference. Its latents are in another channel order, as the last permutation is omitted.

    Args:
        flow: The trained flow; not changed.
        by_index: Permute by an index: `FoldedStep`.
    """

    def __init__(self, flow: Flow, *, by_index: bool = False) -> None:
        super().__init__()
        last = len(flow.steps) - 1
        self.steps = nn.ModuleList(
            FoldedStep(step, permute=k < last, by_index=by_index)  # type: ignore[arg-type]
            for k, step in enumerate(flow.steps)
        )
        first = flow.steps[0]
        assert isinstance(first, FlowStep)  # noqa: S101 - Flow made it so
        self.halves = [first.passive, first.active]

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) features to latents of the same shape."""
        passive, active = torch.split(x, self.halves, dim=1)
        for step in self.steps:
            passive, active = step(passive, active)
        return torch.cat([passive, active], dim=1)
