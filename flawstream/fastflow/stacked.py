"""Heads of many categories, stacked: a batch of mixed categories is one pass, on any device.

Every slot holds one head. A batch gathers each image's weights by its slot; convolutions become batched matrix products
over windows, so that images with different weights share a kernel. The reference is `head.FoldedHead`.

Shape legend: B images, N slots, C channels, P = C - C // 2 passive and A = C // 2 active ones, F hidden channels of a
subnet, k side of its kernels, H W height and width of a scale's grid, L = H W, G groups of g channels, s a scale.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import assert_never

import torch
from torch import Tensor, nn
from torch.nn import functional

from flawstream.fastflow.flow import FoldedFlow, FoldedStep
from flawstream.fastflow.head import FastFlowHead, FoldedHead
from flawstream.fastflow.score import anomaly_grid
from flawstream.fastflow.statistics import FeatureStatistics
from schemas.manifest import BackboneSpec, FlowSpec, Normalisation

_ALIGNED = 64
"""Values: each part of a packed row starts at a multiple, so that matrix products read whole cache lines."""

Whiten = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Multiplies (B, L, G, g) features by the matrices of each image's slot, (N, L, G, g, g); the last argument is (B,)."""


class Rows:
    """The layout of a packed row: parts of given shapes, one behind the other.

    Args:
        shapes: By the name of the part.

    Attributes:
        size: Values in a row.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self._shapes = shapes
        self._starts: dict[str, int] = {}
        self.size = 0
        for name, shape in shapes.items():
            self._starts[name] = self.size
            self.size += -(-prod(shape) // _ALIGNED) * _ALIGNED

    def part(self, rows: Tensor, name: str) -> Tensor:
        """Return a part of (B, `size`) rows as a view, of the part's shape behind B."""
        shape = self._shapes[name]
        start = self._starts[name]
        return rows[:, start : start + prod(shape)].view(len(rows), *shape)

    def pack(self, parts: dict[str, Tensor]) -> Tensor:
        """Pack one value of every part into a (`size`,) float32 row."""
        row = torch.zeros(1, self.size)
        for name in self._shapes:
            self.part(row, name).copy_(parts[name].detach())
        return row[0]


class StackedFlow(nn.Module):
    """The flows of one scale, of all slots.

    Args:
        channels: C.
        side: H = W.
        flow: Configuration that all heads share.
        slots: N.
        dtype: Arithmetic of the flow.
    """

    def __init__(self, channels: int, side: int, flow: FlowSpec, slots: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.passive, self.active = channels - channels // 2, channels // 2
        self.side, self.clamp = side, flow.clamp
        hidden = max(1, int(self.passive * flow.hidden_ratio))
        self.kernels = [3 if flow.conv3x3_only or step % 2 == 0 else 1 for step in range(flow.steps)]
        shapes: dict[str, tuple[int, ...]] = {}
        for step, side_of_kernel in enumerate(self.kernels):
            shapes |= {
                f"{step}.first": (hidden, self.passive * side_of_kernel**2),
                f"{step}.first_bias": (hidden, 1),
                f"{step}.last": (2 * self.active, hidden * side_of_kernel**2),
                f"{step}.last_bias": (2 * self.active, 1),
                f"{step}.log_scale": (self.active, 1),
                f"{step}.passive_scale": (self.passive, 1),
                f"{step}.passive_offset": (self.passive, 1),
            }
        self.rows = Rows(shapes)
        self.weights = nn.Buffer(torch.zeros(slots, self.rows.size, dtype=dtype))
        self.permutations = nn.Buffer(torch.arange(channels).repeat(slots, max(0, flow.steps - 1), 1))

    @torch.no_grad()
    def put(self, slot: int, flow: FoldedFlow) -> None:
        """Write a flow, folded with permutations by index, into a slot."""
        parts: dict[str, Tensor] = {}
        for number, step in enumerate(flow.steps):
            assert isinstance(step, FoldedStep)  # noqa: S101 - FoldedFlow made it so
            first, _, last = step.subnet
            parts |= {
                f"{number}.first": first.weight.flatten(1),  # type: ignore[operator]  # convolutions
                f"{number}.first_bias": first.bias[:, None],  # type: ignore[index]
                f"{number}.last": last.weight.flatten(1),  # type: ignore[operator]
                f"{number}.last_bias": last.bias[:, None],  # type: ignore[index]
                f"{number}.log_scale": step.log_scale[0, :, :, 0],
                f"{number}.passive_scale": step.passive_scale[0, :, :, 0],
                f"{number}.passive_offset": step.passive_offset[0, :, :, 0],
            }
            if step.permutation is not None:
                self.permutations[slot, number].copy_(step.permutation)
        self.weights[slot].copy_(self.rows.pack(parts))

    def forward(self, x: Tensor, slots: Tensor) -> Tensor:
        """Map (B, C, L) normalised features to latents of the same shape, each image by the flow of its slot."""
        weights = self.weights.index_select(0, slots)
        permutations = self.permutations.index_select(0, slots)
        first_channels = torch.arange(len(x), device=x.device)[:, None] * x.shape[1]
        for step, kernel in enumerate(self.kernels):
            passive, active = torch.split(x, [self.passive, self.active], dim=1)
            hidden = functional.relu(self._convolve(passive, weights, f"{step}.first", kernel))
            log_scale, shift = torch.split(
                self._convolve(hidden, weights, f"{step}.last", kernel), [self.active, self.active], dim=1
            )
            exponent = self.clamp * torch.tanh(log_scale) + self.rows.part(weights, f"{step}.log_scale")
            x = torch.cat(
                [
                    passive * self.rows.part(weights, f"{step}.passive_scale")
                    + self.rows.part(weights, f"{step}.passive_offset"),
                    active * torch.exp(exponent) + shift,
                ],
                dim=1,
            )
            if step < len(self.kernels) - 1:
                rows = (permutations[:, step] + first_channels).flatten()
                x = x.flatten(0, 1).index_select(0, rows).view_as(x)
        return x

    def _convolve(self, x: Tensor, weights: Tensor, name: str, kernel: int) -> Tensor:
        """Convolve (B, channels, L) with zero padding, each image with its own weights."""
        if kernel > 1:
            x = windows(x.reshape(len(x), -1, self.side, self.side), kernel)
        return torch.baddbmm(self.rows.part(weights, f"{name}_bias"), self.rows.part(weights, name), x)


def windows(x: Tensor, kernel: int) -> Tensor:
    """Unfold (B, C, H, W), padded with zeros, to the (B, C k k, H W) windows around each position."""
    edge = kernel // 2
    padded = functional.pad(x, (edge, edge, edge, edge))
    views = padded.unfold(2, kernel, 1).unfold(3, kernel, 1)  # (B, C, H, W, k, k)
    return views.permute(0, 1, 4, 5, 2, 3).reshape(len(x), -1, x.shape[2] * x.shape[3])


class StackedStatistics(nn.Module):
    """`FeatureStatistics` of one scale, of all slots. Subtracts in float32; the matrices are exact in float16.

    Args:
        channels: C.
        side: H = W.
        slots: N.
        dtype: Arithmetic of the matrix products; sums are float32 or better.
        whiten: Multiplies by the matrices.
    """

    def __init__(self, channels: int, side: int, slots: int, dtype: torch.dtype, whiten: Whiten) -> None:
        super().__init__()
        self._whiten = whiten
        one = FeatureStatistics(channels, side)
        self.groups = one.groups
        self.rows = Rows({"mean": (channels, side * side), "factor": (channels, 1)})
        size = channels // self.groups
        self.constants = nn.Buffer(torch.zeros(slots, self.rows.size))
        self.whitening = nn.Buffer(torch.zeros(slots, side * side, self.groups, size, size, dtype=dtype))

    @torch.no_grad()
    def put(self, slot: int, statistics: nn.Module) -> None:
        """Write the statistics of a head into a slot."""
        assert isinstance(statistics, FeatureStatistics)  # noqa: S101 - the stack's FlowSpec says so
        parts = {"mean": statistics.mean.flatten(1), "factor": 1 / statistics.deviation[:, :, 0]}
        self.constants[slot].copy_(self.rows.pack(parts))
        self.whitening[slot].copy_(statistics.whitening.view_as(self.whitening[slot]))

    def forward(self, features: Tensor, slots: Tensor) -> Tensor:
        """Whiten (B, C, H, W) features to (B, C, L), each image by the statistics of its slot."""
        constants = self.constants.index_select(0, slots)
        centred = features.flatten(2).float() - self.rows.part(constants, "mean")
        scaled = (centred * self.rows.part(constants, "factor")).to(self.whitening.dtype)
        positions = scaled.reshape(len(scaled), self.groups, -1, scaled.shape[2]).permute(0, 3, 1, 2)  # (B, L, G, g)
        return self._whiten(positions, self.whitening, slots).flatten(2).transpose(1, 2).contiguous()


def whiten_plainly(positions: Tensor, matrices: Tensor, slots: Tensor) -> Tensor:
    """Multiply as `Whiten` has it, in plain torch: the matrices of each image are copied first."""
    chosen = matrices.index_select(0, slots)
    rows = positions.reshape(-1, 1, positions.shape[-1])
    return torch.bmm(rows, chosen.view(-1, *chosen.shape[-2:])).view(positions.shape)


class StackedLayerNorm(nn.Module):
    """`nn.LayerNorm` over an image's scale, of all slots, in float32.

    Args:
        channels: C.
        side: H = W.
        slots: N.
        dtype: Of what is returned.
    """

    def __init__(self, channels: int, side: int, slots: int, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype
        self._epsilon = nn.LayerNorm([1]).eps
        self.rows = Rows({"factor": (channels, side * side), "offset": (channels, side * side)})
        self.constants = nn.Buffer(torch.zeros(slots, self.rows.size))

    @torch.no_grad()
    def put(self, slot: int, norm: nn.Module) -> None:
        """Write the factors and offsets of a head into a slot."""
        assert isinstance(norm, nn.LayerNorm)  # noqa: S101 - the stack's FlowSpec says so
        parts = {"factor": norm.weight.flatten(1), "offset": norm.bias.flatten(1)}
        self.constants[slot].copy_(self.rows.pack(parts))

    def forward(self, features: Tensor, slots: Tensor) -> Tensor:
        """Normalise (B, C, H, W) features to (B, C, L)."""
        constants = self.constants.index_select(0, slots)
        values = features.flatten(2).float()
        normalised = functional.layer_norm(values, values.shape[1:], eps=self._epsilon)
        return (normalised * self.rows.part(constants, "factor") + self.rows.part(constants, "offset")).to(self._dtype)


class StackedIdentity(nn.Module):
    """No normalisation: for networks that end in a norm of their own.

    Args:
        dtype: Of what is returned.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def put(self, slot: int, module: nn.Module) -> None:
        """Do nothing: there is nothing to keep."""

    def forward(self, features: Tensor, slots: Tensor) -> Tensor:
        """Return (B, C, H, W) features as (B, C, L)."""
        del slots
        return features.flatten(2).to(self._dtype)


def _make_normalisation(
    kind: Normalisation, shape: tuple[int, int], slots: int, dtype: torch.dtype, whiten: Whiten
) -> nn.Module:
    channels, side = shape
    match kind:
        case "statistics":
            return StackedStatistics(channels, side, slots, dtype, whiten)
        case "layer_norm":
            return StackedLayerNorm(channels, side, slots, dtype)
        case "none":
            return StackedIdentity(dtype)
        case _:
            assert_never(kind)


class StackedHeads(nn.Module):
    """The heads of all slots, which share one configuration of the flow.

    Args:
        backbone: Channels and grid sizes.
        flow: Configuration of the flows and of the normalisation.
        slots: N.
        dtype: Arithmetic of matrix products; scores and the statistics before them are float32.
        whiten: Multiplies features by whitening matrices.
    """

    def __init__(
        self,
        backbone: BackboneSpec,
        flow: FlowSpec,
        slots: int,
        *,
        dtype: torch.dtype = torch.float32,
        whiten: Whiten = whiten_plainly,
    ) -> None:
        super().__init__()
        scales = list(zip(backbone.channels, backbone.grid_sizes, strict=True))
        self.sides = [side for _, side in scales]
        self.slots = slots
        self.normalise = nn.ModuleList(
            _make_normalisation(flow.normalisation, shape, slots, dtype, whiten) for shape in scales
        )
        self.flows = nn.ModuleList(StackedFlow(channels, side, flow, slots, dtype) for channels, side in scales)

    @property
    def slot_bytes(self) -> int:
        """Return the memory of one slot."""
        return sum(buffer.nbytes for buffer in self.buffers()) // self.slots

    def put(self, slot: int, head: FastFlowHead) -> None:
        """Write a head into a slot; no other slot changes.

        Args:
            slot: In [0, N).
            head: Of the stack's configuration; not changed.
        """
        folded = FoldedHead(head, by_index=True)
        for stacked, statistics in zip(self.normalise, folded.statistics, strict=True):
            stacked.put(slot, statistics)  # type: ignore[operator]  # ModuleList has no element type
        for stacked, flow in zip(self.flows, folded.flows, strict=True):
            stacked.put(slot, flow)  # type: ignore[operator]  # the same

    def copy_slots(self, other: "StackedHeads") -> None:
        """Copy all slots of a stack of the same configuration with at most as many slots."""
        for mine, theirs in zip(self.buffers(), other.buffers(), strict=True):
            mine[: other.slots].copy_(theirs)

    def forward(self, features: Sequence[Tensor], slots: Tensor) -> list[Tensor]:
        """Score every position of every scale.

        Args:
            features: One (B, C_s, H_s, W_s) float tensor per scale.
            slots: (B,) int64.

        Returns:
            One (B, H_s, W_s) float32 tensor per scale, nats per channel.
        """
        grids = []
        for normalise, flow, scale, side in zip(self.normalise, self.flows, features, self.sides, strict=True):
            latents: Tensor = flow(normalise(scale, slots), slots)
            grids.append(anomaly_grid(latents.float()).view(-1, side, side))
        return grids
