"""Steps of the optimiser as CUDA graphs: one launch in place of a thousand, and no wait for the device.

A graph repeats the same kernels on the same memory, so what changes from step to step lies on the device: the rows of
the batch, the learning rate and the momentum. Torch's optimisers take the momentum as a number, which a graph would
freeze; AdamW is therefore written out here and tested against torch's. On a CPU the same steps run without a graph.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flawstream.engines.cuda.capture import capture
from flawstream.fastflow.head import FastFlowHead
from flawstream.fastflow.loss import negative_log_likelihood

_EAGER_STEPS = 2
"""Steps of each batch size before its graph is captured: libraries choose their kernels and allocate in them."""
_CONVOLUTION_DIMENSIONS = 4
_SECOND_MOMENTUM, _EPSILON = 0.999, 1e-8
"""Defaults of torch's AdamW."""
SMALLEST_NORM = 1e-6
"""As torch's `clip_grad_norm_` adds to the norm."""


def one_cycle(highest_rate: float, steps: int, warm_up_share: float) -> tuple[list[float], list[float]]:
    """Return the learning rate and AdamW's first momentum of every step, as torch's `OneCycleLR` sets them.

    Source: Smith, Topin, Super-Convergence (arXiv 1708.07120).
    """
    optimiser = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], highest_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, highest_rate, total_steps=steps, pct_start=warm_up_share)
    rates, momenta = [], []
    for number in range(steps):
        rates.append(float(optimiser.param_groups[0]["lr"]))
        momenta.append(float(optimiser.param_groups[0]["betas"][0]))
        optimiser.step()
        if number < steps - 1:
            schedule.step()
    return rates, momenta


class FlatParameters:
    """The parameters of a module as views of one tensor, and their gradients of another.

    So that what is done to all of them is one kernel. Convolutions' weights stay in the channels-last memory format.

    Args:
        parameters: Made views, in place.

    Attributes:
        values: All parameters, one behind the other.
        gradients: All gradients, in the same order; autograd adds to them.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        count = sum(parameter.numel() for parameter in parameters)
        self.values, self.gradients = (torch.zeros(count, device=parameters[0].device) for _ in range(2))
        start = 0
        for parameter in parameters:
            end = start + parameter.numel()
            view = _view(self.values[start:end], parameter.shape)
            view.copy_(parameter.detach())
            parameter.data = view
            parameter.grad = _view(self.gradients[start:end], parameter.shape)
            start = end


def _view(flat: Tensor, shape: torch.Size) -> Tensor:
    if len(shape) != _CONVOLUTION_DIMENSIONS:
        return flat.view(shape)
    return flat.view(shape[0], shape[2], shape[3], shape[1]).permute(0, 3, 1, 2)


class DeviceAdamW:
    """AdamW whose rate, momentum and step number are tensors.

    Source: Loshchilov, Hutter, Decoupled Weight Decay Regularization (arXiv 1711.05101), algorithm 2.

    Args:
        values: What to optimise: the parameters of one head, (P,), or of several, (K, P).
        gradients: Of the same shape.
        weight_decay: Decoupled decay.

    Attributes:
        rate: Learning rate, a scalar or (K, 1); parameters at rate 0 do not change.
        momentum: First momentum, of the same shape.
    """

    def __init__(self, values: Tensor, gradients: Tensor, weight_decay: float) -> None:
        self._values, self._gradients = values, gradients
        self._weight_decay = weight_decay
        shape = [*values.shape[:-1], 1] if values.ndim > 1 else []
        self.rate, self.momentum, self._number = (torch.zeros(shape, device=values.device) for _ in range(3))
        self._first, self._second = torch.zeros_like(self._values), torch.zeros_like(self._values)

    @torch.no_grad()
    def step(self) -> None:
        """Change the parameters by their gradients."""
        self._number += 1
        self._values.mul_(1 - self.rate * self._weight_decay)
        self._first.lerp_(self._gradients, 1 - self.momentum)
        self._second.mul_(_SECOND_MOMENTUM).addcmul_(self._gradients, self._gradients, value=1 - _SECOND_MOMENTUM)
        root = self._second.sqrt() / (1 - _SECOND_MOMENTUM**self._number).sqrt()
        size = self.rate / (1 - self.momentum**self._number)
        change = size * self._first / (root + _EPSILON)
        self._values.sub_(torch.where(self.rate > 0, change, 0.0))  # exactly 0, also where a gradient is NaN


class Graphs:
    """Runs steps on a stream of their own: each kind twice without a graph, then as a captured one.

    Args:
        device: On a CPU there is no graph.
    """

    def __init__(self, device: torch.device) -> None:
        self._runs: dict[int, int] = {}
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch
            self._stream.wait_stream(torch.cuda.current_stream(device))  # which filled what the steps read

    def stream(self) -> torch.cuda.StreamContext:
        """Enter the stream of the steps; does nothing on a CPU."""
        return torch.cuda.stream(self._stream)

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Copy from the host without a wait for the device."""
        target.copy_(source.pin_memory() if self._stream else source, non_blocking=True)

    def run(self, kind: int, step: Callable[[], None]) -> None:
        """Run a step; steps of one kind have the same shapes and memory."""
        self._runs[kind] = self._runs.get(kind, 0) + 1
        if self._stream is None or self._runs[kind] <= _EAGER_STEPS:
            step()
            return
        if kind not in self._graphs:
            self._graphs[kind] = capture(step, self._stream)
        self._graphs[kind].replay()

    def wait(self) -> None:
        """Wait for all steps."""
        if self._stream is not None:
            self._stream.synchronize()


class GraphedStep:
    """One step of training: loss, gradients, clipping and the optimiser.

    Args:
        head: In training mode, on its device. Its flows' parameters become views of one tensor.
        features: White features of all images, one (N, C_s, H_s, W_s) tensor per scale, on the device.
        weight_decay: Of the optimiser.
        clip_norm: Largest norm of the gradients.
    """

    def __init__(self, head: FastFlowHead, features: list[Tensor], weight_decay: float, clip_norm: float) -> None:
        self._head, self._features, self._clip_norm = head, features, clip_norm
        self._parameters = FlatParameters(list(head.flows.parameters()))
        self._optimiser = DeviceAdamW(self._parameters.values, self._parameters.gradients, weight_decay)
        self._device = self._parameters.values.device
        self._total_loss = torch.zeros((), device=self._device)
        self._rows: dict[int, Tensor] = {}
        self._graphs = Graphs(self._device)

    def run(self, rows: NDArray[np.int64], rate: float, momentum: float) -> None:
        """Take one step; does not wait for the device.

        Args:
            rows: (B,) rows of the features.
            rate: Learning rate.
            momentum: First momentum of AdamW.
        """
        size = len(rows)
        with self._graphs.stream():
            if size not in self._rows:
                self._rows[size] = torch.zeros(size, dtype=torch.int64, device=self._device)
            self._graphs.copy(self._rows[size], torch.from_numpy(rows))
            self._optimiser.rate.fill_(rate)
            self._optimiser.momentum.fill_(momentum)
            self._graphs.run(size, partial(self._step, size))

    def take_total_loss(self) -> float:
        """Wait for the steps so far, and return the sum of their images' losses since the last call."""
        with self._graphs.stream():
            total = float(self._total_loss)
            self._total_loss.zero_()
        return total

    def _step(self, size: int) -> None:
        batch = [
            part.index_select(0, self._rows[size]).contiguous(memory_format=torch.channels_last)
            for part in self._features
        ]
        loss = negative_log_likelihood(*self._head.transform(batch))
        gradients = self._parameters.gradients.zero_()
        loss.backward()  # type: ignore[no-untyped-call]  # torch
        with torch.no_grad():
            gradients.mul_((self._clip_norm / (gradients.norm() + SMALLEST_NORM)).clamp(max=1.0))
        self._optimiser.step()
        self._total_loss += loss.detach() * size
