"""One step of training for several categories at once: their flows stacked, so that one GPU is filled.

Every category computes what it would alone. Convolutions are batched matrix products over windows, as in serving
(docs/decisions/0010); gradients, their norms and the optimiser's state have one row for each category.

Shape legend: K categories, B images of the largest batch, P parameters of a head, C channels, H W height and width of a
scale's grid, L = H W, k side of a kernel, s a scale.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from flawstream.fastflow.flow import DAMPING, Flow, FlowStep, global_scale
from training.steps.graphed import SMALLEST_NORM, DeviceAdamW, GraphedStep


class StackedParameters:
    """The parameters of flows of one configuration as rows of one tensor.

    Args:
        flows: Of each category, on a CPU; not changed before `write`.
        device: Where to train.

    Attributes:
        values: (K, P).
        gradients: (K, P).
        parts: For each parameter of a category's flows, by name, a (K, ...) view of `values`.
    """

    def __init__(self, flows: Sequence[nn.ModuleList], device: torch.device) -> None:
        self._flows = flows
        named = [dict(one.named_parameters()) for one in flows]
        self.values = torch.stack([torch.cat([p.detach().flatten() for p in one.values()]) for one in named]).to(device)
        self.gradients = torch.zeros_like(self.values)
        self.parts: dict[str, nn.Parameter] = {}
        start = 0
        for name, parameter in named[0].items():
            end, shape = start + parameter.numel(), (len(flows), *parameter.shape)
            self.parts[name] = nn.Parameter(self.values[:, start:end].view(shape))
            start = end

    def differentiate(self, loss: Tensor) -> None:
        """Compute the gradients of a loss."""
        parts = torch.autograd.grad(loss, list(self.parts.values()))
        self.gradients.copy_(torch.cat([part.flatten(1) for part in parts], dim=1))

    @torch.no_grad()
    def write(self) -> None:
        """Write every row into its category's flows."""
        for name, part in self.parts.items():
            for one, values in zip(self._flows, part.cpu(), strict=True):
                one.get_parameter(name).copy_(values)


@dataclass(frozen=True, slots=True)
class CategoryStep:
    """One step of one category.

    Attributes:
        epoch: From 0.
        rows: Rows of the features, at most B.
        rate: Learning rate.
        momentum: First momentum of AdamW.
    """

    epoch: int
    rows: NDArray[np.int64]
    rate: float
    momentum: float


class StackedTraining:
    """Steps of several categories: loss, gradients, clipping and the optimiser, as one CUDA graph on a GPU.

    Args:
        flows: Of each category, of one configuration, on a CPU; not changed before `write`.
        features: White features of the images of all categories on the device, one (N, C_s, H_s, W_s) tensor per scale.
        batch_size: B.
        epochs: Epochs whose losses are kept.
        weight_decay: Of the optimiser.
        clip_norm: Largest norm of the gradients of a category.
    """

    def __init__(
        self,
        flows: Sequence[nn.ModuleList],
        features: Sequence[Tensor],
        *,
        batch_size: int,
        epochs: int,
        weight_decay: float,
        clip_norm: float,
    ) -> None:
        device, count = features[0].device, len(flows)
        scales = [[_steps_of(one[scale]) for one in flows] for scale in range(len(flows[0]))]
        self._steps = [steps[0] for steps in scales]  # of any category: all have the same shapes
        self._permutations = [
            [_permutation(of_categories).to(device) for of_categories in zip(*steps, strict=True)] for steps in scales
        ]
        self._features, self._clip_norm = features, clip_norm
        self._parameters = StackedParameters(flows, device)
        self._optimiser = DeviceAdamW(self._parameters.values, self._parameters.gradients, weight_decay)
        self._host_rows = np.zeros((count, batch_size), np.int64)
        self._rows = torch.zeros((count, batch_size), dtype=torch.int64, device=device)
        self._counts = torch.zeros((count, 1), device=device)
        self._epochs = torch.zeros((count, 1), dtype=torch.int64, device=device)
        self._places = torch.arange(batch_size, device=device)
        self._total_losses = torch.zeros((count, epochs), device=device)
        self._graphed = GraphedStep(device)

    def run(self, steps: Sequence[CategoryStep | None]) -> None:
        """Take one step of every category; does not wait for the device.

        Args:
            steps: None: the category has finished, and stays exactly as it is.
        """
        for row, step in zip(self._host_rows, steps, strict=True):
            if step is not None:
                row[:] = step.rows[0]  # the rest of a short batch has no weight
                row[: len(step.rows)] = step.rows

        def column(values: list[float]) -> Tensor:
            return torch.tensor(values)[:, None]

        with self._graphed.stream():
            copy_in = self._graphed.copy
            copy_in(self._rows, torch.from_numpy(self._host_rows.copy()))
            copy_in(self._counts, column([len(step.rows) if step else 0.0 for step in steps]))
            copy_in(self._epochs, column([step.epoch if step else 0 for step in steps]))
            copy_in(self._optimiser.rate, column([step.rate if step else 0.0 for step in steps]))
            copy_in(self._optimiser.momentum, column([step.momentum if step else 0.0 for step in steps]))
            self._graphed.run(self._step)

    def total_losses(self) -> NDArray[np.float32]:
        """Wait for the steps so far; return (K, epochs) sums of the losses of the images."""
        with self._graphed.stream():
            return self._total_losses.cpu().numpy()

    def write(self) -> None:
        """Wait for the steps so far, and write the parameters into the flows."""
        with self._graphed.stream():
            self._parameters.write()

    def losses(self) -> Tensor:
        """Compute the (K,) mean losses of the current batches."""
        shape = self._rows.shape
        weights = (self._places < self._counts) / self._counts.clamp_min(1)  # (K, B), of sum 1, or 0 without images
        losses = weights.new_zeros(shape[0])
        for scale, features in enumerate(self._features):
            x = features.index_select(0, self._rows.flatten()).view(*shape, *features.shape[1:])
            losses = losses + (self._image_losses(scale, x.transpose(1, 2)) * weights).sum(dim=1)
        return losses

    def _step(self) -> None:
        losses = self.losses()
        self._parameters.differentiate(losses.sum())
        with torch.no_grad():
            gradients = self._parameters.gradients
            norms = gradients.norm(dim=1, keepdim=True)
            gradients.mul_((self._clip_norm / (norms + SMALLEST_NORM)).clamp(max=1.0))
        self._optimiser.step()
        self._total_losses.scatter_add_(1, self._epochs, losses.detach()[:, None] * self._counts)

    def _image_losses(self, scale: int, x: Tensor) -> Tensor:
        """Map (K, C, B, H, W) features of a scale to (K, B) losses, as `negative_log_likelihood` has them."""
        values = x.shape[1] * x.shape[3] * x.shape[4]
        log_det = x.new_zeros(x.shape[0], x.shape[2])
        for number, step in enumerate(self._steps[scale]):
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


def activation_bytes(flows: nn.ModuleList, shapes: Sequence[tuple[int, ...]], categories: int, batch_size: int) -> int:
    """Count what a step keeps for its backward pass, without the memory for it: on torch's meta device.

    Args:
        flows: Of one category.
        shapes: (C, H, W) of the features of each scale.
        categories: K.
        batch_size: B.
    """
    features = [torch.empty((1, *shape), device="meta") for shape in shapes]
    step = StackedTraining(
        [copy.deepcopy(flows).to("meta")] * categories,
        features,
        batch_size=batch_size,
        epochs=1,
        weight_decay=0.0,
        clip_norm=1.0,
    )
    kept: dict[int, int] = {}  # by storage: several tensors may be views of one

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()  # noqa: SLF001 - the identity of a storage that has no address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = step.losses()
    del losses  # until here it kept all of them, so that no identity was used twice
    return sum(kept.values())


def _steps_of(flow: nn.Module) -> list[FlowStep]:
    assert isinstance(flow, Flow)  # noqa: S101 - FastFlowHead made it so
    return [step for step in flow.steps if isinstance(step, FlowStep)]


def _permutation(steps: Sequence[FlowStep]) -> Tensor:
    """Return the rows of (K C, ...) stacked channels that permute every category's."""
    return torch.cat([step.permutation + number * len(step.permutation) for number, step in enumerate(steps)])


def _convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Convolve (K, C, B, H, W), padded with zeros, with (K, D, C, k, k) weights of each category; (K, D, B, H, W)."""
    kernel, spatial = weight.shape[-1], x.shape[2:]
    if len(x) == 1:  # needs no windows, which take memory and time
        return functional.conv2d(x[0].transpose(0, 1), weight[0], bias[0], padding="same").transpose(0, 1)[None]
    if kernel > 1:
        edge = kernel // 2
        views = functional.pad(x, (edge, edge, edge, edge)).unfold(3, kernel, 1).unfold(4, kernel, 1)
        x = views.permute(0, 1, 5, 6, 2, 3, 4)
    product = torch.baddbmm(bias[:, :, None], weight.flatten(2), x.reshape(len(x), weight[0, 0].numel(), -1))
    return product.view(*product.shape[:2], *spatial)
