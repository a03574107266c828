"""The step of the optimiser as a CUDA graph: one launch in place of a thousand, and no wait for the device.

A graph repeats the same kernels on the same memory, so what changes from step to step lies on the device: the rows of
the batch, the learning rate and the momentum. Torch's optimisers take the momentum as a number, which a graph would
freeze; AdamW is therefore written out here and tested against torch's. On a CPU the same step runs without a graph.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from flawstream.engines.cuda.capture import capture

_EAGER_STEPS = 2
"""Steps before the graph is captured: libraries choose their kernels and allocate in them."""
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


class DeviceAdamW:
    """AdamW whose rate, momentum and step number are tensors.

    Source: Loshchilov, Hutter, Decoupled Weight Decay Regularization (arXiv 1711.05101), algorithm 2.

    Args:
        values: (K, P): what to optimise, the parameters of each category.
        gradients: Of the same shape.
        weight_decay: Decoupled decay.

    Attributes:
        rate: (K, 1) learning rates; parameters at rate 0 do not change.
        momentum: (K, 1) first momenta.
    """

    def __init__(self, values: Tensor, gradients: Tensor, weight_decay: float) -> None:
        self._values, self._gradients = values, gradients
        self._weight_decay = weight_decay
        self.rate, self.momentum = (torch.zeros((len(values), 1), device=values.device) for _ in range(2))
        self._number = torch.zeros((), device=values.device)
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


class GraphedStep:
    """Runs a step on a stream of its own: twice as it is, then as a captured graph. On a CPU there is no graph.

    Args:
        device: Where the step computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._runs = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch
            self._stream.wait_stream(torch.cuda.current_stream(device))  # which filled what the step reads

    def stream(self) -> torch.cuda.StreamContext:
        """Enter the stream of the step; does nothing on a CPU."""
        return torch.cuda.stream(self._stream)

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Copy from the host without a wait for the device."""
        target.copy_(source.pin_memory() if self._stream else source, non_blocking=True)

    def run(self, step: Callable[[], None]) -> None:
        """Run the step, which is the same at each call; does not wait for the device."""
        self._runs += 1
        if self._stream is None or self._runs <= _EAGER_STEPS:
            step()
            return
        if self._graph is None:
            self._graph = capture(step, self._stream)
        self._graph.replay()
