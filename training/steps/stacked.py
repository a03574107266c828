"""One step of training for several categories at once: their flows stacked, so that one GPU is filled.

Every category computes what it would alone. Convolutions are batched matrix products over windows, as in serving
(docs/decisions/0010); gradients, their norms and the optimiser's state have one row for each category.

Shape legend: K categories, B images of the largest batch, P parameters of a head, C channels, H W height and width of a
scale's grid, L = H W, k side of a kernel, s a scale.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from flawstream.fastflow.flow import DAMPING, Flow, FlowStep, global_scale
from flawstream.fastflow.head import FastFlowHead
from training.steps.graphed import SMALLEST_NORM, DeviceAdamW, Graphs


class StackedParameters:
    """The parameters of heads of one configuration as rows of one tensor.

    Args:
        heads: Not changed before `write`.

    Attributes:
        values: (K, P).
        gradients: (K, P).
        parts: For each parameter of a head, by name, a (K, ...) view of `values`.
    """

    def __init__(self, heads: Sequence[FastFlowHead]) -> None:
        self._heads = heads
        named = [dict(head.flows.named_parameters()) for head in heads]
        self.values = torch.stack([torch.cat([p.detach().flatten() for p in one.values()]) for one in named])
        self.gradients = torch.zeros_like(self.values)
        self.parts: dict[str, nn.Parameter] = {}
        start = 0
        for name, parameter in named[0].items():
            end, shape = start + parameter.numel(), (len(heads), *parameter.shape)
            self.parts[name] = nn.Parameter(self.values[:, start:end].view(shape))
            start = end

    def differentiate(self, loss: Tensor) -> None:
        """Compute the gradients of a loss."""
        parts = torch.autograd.grad(loss, list(self.parts.values()))
        self.gradients.copy_(torch.cat([part.flatten(1) for part in parts], dim=1))

    @torch.no_grad()
    def write(self) -> None:
        """Write every row into its head."""
        for row, head in enumerate(self._heads):
            for name, parameter in head.flows.named_parameters():
                parameter.copy_(self.parts[name][row])


class StackedTraining:
    """Steps of several categories: loss, gradients, clipping and the optimiser, as one CUDA graph on a GPU.

    Args:
        heads: Of one configuration, on their device.
        features: White features of the images of all categories, one (N, C_s, H_s, W_s) tensor per scale.
        batch_size: B.
        epochs: Epochs whose losses are kept.
        weight_decay: Of the optimiser.
        clip_norm: Largest norm of the gradients of a category.
    """

    def __init__(
        self,
        heads: Sequence[FastFlowHead],
        features: Sequence[Tensor],
        *,
        batch_size: int,
        epochs: int,
        weight_decay: float,
        clip_norm: float,
    ) -> None:
        self._flows = [[_steps_of(head, scale) for head in heads] for scale in range(len(heads[0].flows))]
        self._features, self._clip_norm = features, clip_norm
        self._parameters = StackedParameters(heads)
        values = self._parameters.values
        self._optimiser = DeviceAdamW(values, self._parameters.gradients, weight_decay)
        self._rows = torch.zeros((len(heads), batch_size), dtype=torch.int64, device=values.device)
        self._counts = torch.zeros((len(heads), 1), device=values.device)
        self._epoch = torch.zeros((len(heads), 1), dtype=torch.int64, device=values.device)
        self._places = torch.arange(batch_size, device=values.device)
        self._total_losses = torch.zeros((len(heads), epochs), device=values.device)
        self._permutations = [
            [_permutation([steps[number] for steps in scale]) for number in range(len(scale[0]))]
            for scale in self._flows
        ]
        self._graphs = Graphs(values.device)

    def run(
        self,
        batches: Sequence[NDArray[np.int64]],
        epochs: Sequence[int],
        rates: Sequence[float],
        momenta: Sequence[float],
    ) -> None:
        """Take one step of every category; does not wait for the device.

        Args:
            batches: Rows of the features for each category, at most B; empty: the category does not change.
            epochs: Epoch of each category, from 0.
            rates: Learning rates.
            momenta: First momenta of AdamW.
        """
        rows = np.zeros(self._rows.shape, np.int64)
        for row, batch in zip(rows, batches, strict=True):
            if len(batch):
                row[:] = batch[0]  # the rest of a short batch has no weight
                row[: len(batch)] = batch
        counts = [len(batch) for batch in batches]
        with self._graphs.stream():
            self._graphs.copy(self._rows, torch.from_numpy(rows))
            self._graphs.copy(self._counts, torch.tensor(counts, dtype=torch.float32)[:, None])
            self._graphs.copy(self._epoch, torch.tensor(epochs)[:, None])
            active = [rate if count else 0.0 for rate, count in zip(rates, counts, strict=True)]
            self._graphs.copy(self._optimiser.rate, torch.tensor(active)[:, None])
            self._graphs.copy(self._optimiser.momentum, torch.tensor(momenta)[:, None])
            self._graphs.run(0, self._step)

    def total_losses(self) -> NDArray[np.float32]:
        """Wait for the steps so far; return (K, epochs) sums of the losses of the images."""
        with self._graphs.stream():
            return self._total_losses.cpu().numpy()

    def write(self) -> None:
        """Wait for the steps so far, and write the parameters into the heads."""
        with self._graphs.stream():
            self._parameters.write()
        self._graphs.wait()

    def _step(self) -> None:
        shape = self._rows.shape
        weights = (self._places < self._counts) / self._counts.clamp_min(1)  # (K, B), of sum 1, or 0 without images
        losses = weights.new_zeros(shape[0])
        for scale, features in enumerate(self._features):
            x = features.index_select(0, self._rows.flatten()).view(*shape, *features.shape[1:])
            losses = losses + (self._image_losses(scale, x.transpose(1, 2)) * weights).sum(dim=1)
        self._parameters.differentiate(losses.sum())
        with torch.no_grad():
            gradients = self._parameters.gradients
            norms = gradients.norm(dim=1, keepdim=True)
            gradients.mul_((self._clip_norm / (norms + SMALLEST_NORM)).clamp(max=1.0))
        self._optimiser.step()
        self._total_losses.scatter_add_(1, self._epoch, losses.detach()[:, None] * self._counts)

    def _image_losses(self, scale: int, x: Tensor) -> Tensor:
        """Map (K, C, B, H, W) features of a scale to (K, B) losses, as `negative_log_likelihood` has them."""
        values = x.shape[1] * x.shape[3] * x.shape[4]
        log_det = x.new_zeros(x.shape[0], x.shape[2])
        for number, step in enumerate(self._flows[scale][0]):
            x, step_log_det = self._flow_step(step, f"{scale}.steps.{number}", x)
            x = x.flatten(0, 1).index_select(0, self._permutations[scale][number]).view_as(x)
            log_det = log_det + step_log_det
        return (0.5 * x.square().sum(dim=(1, 3, 4)) - log_det) / values

    def _flow_step(self, step: FlowStep, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """Compute `FlowStep.forward` for every category, without its permutation."""
        part = self._parameters.parts
        passive, active = torch.split(x, [step.passive, step.active], dim=1)
        hidden = functional.relu(_convolve(passive, part[f"{name}.subnet.0.weight"], part[f"{name}.subnet.0.bias"]))
        subnet = _convolve(hidden, part[f"{name}.subnet.2.weight"], part[f"{name}.subnet.2.bias"])
        log_scale, shift = torch.split(DAMPING * subnet, step.active, dim=1)
        log_scale = step.clamp * torch.tanh(log_scale)
        scale = global_scale(part[f"{name}.raw_scale"]).transpose(1, 2)  # (K, C, 1, 1, 1)
        offset = part[f"{name}.offset"].transpose(1, 2)
        y = torch.cat([passive, active * log_scale.exp() + shift], dim=1) * scale + offset
        log_det = (
            log_scale.sum(dim=(1, 3, 4)) + (scale.log().sum(dim=(1, 2, 3, 4)) * (x.shape[3] * x.shape[4]))[:, None]
        )
        return y, log_det


def _steps_of(head: FastFlowHead, scale: int) -> list[FlowStep]:
    flow = head.flows[scale]
    assert isinstance(flow, Flow)  # noqa: S101 - FastFlowHead made it so
    return [step for step in flow.steps if isinstance(step, FlowStep)]


def _permutation(steps: Sequence[FlowStep]) -> Tensor:
    """Return the rows of (K C, ...) stacked channels that permute every category's."""
    return torch.cat([step.permutation + number * len(step.permutation) for number, step in enumerate(steps)])


def _convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Convolve (K, C, B, H, W), padded with zeros, with (K, D, C, k, k) weights of each category; (K, D, B, H, W)."""
    kernel, spatial = weight.shape[-1], x.shape[2:]
    if kernel > 1:
        edge = kernel // 2
        views = functional.pad(x, (edge, edge, edge, edge)).unfold(3, kernel, 1).unfold(4, kernel, 1)
        x = views.permute(0, 1, 5, 6, 2, 3, 4)
    product = torch.baddbmm(bias[:, :, None], weight.flatten(2), x.reshape(len(x), weight[0, 0].numel(), -1))
    return product.view(*product.shape[:2], *spatial)
