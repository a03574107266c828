"""How many categories train together in the memory of a GPU."""

import math
from collections.abc import Sequence

import torch

from schemas.manifest import FlowSpec
from schemas.settings import TrainingSettings
from training.steps.fit import CategoryFit, statistics_of
from training.steps.stacked import activation_bytes

_USED_SHARE = 0.8
"""Of the free memory; the rest is for what libraries allocate, and for fragments."""
_COPIES_OF_PARAMETERS = 9
"""Values, gradients and two momenta; and what a step computes on the way from gradients to new values."""
_BACKWARD_FACTOR = 1.3
"""The backward pass frees what the forward pass kept, and has gradients of the same sizes meanwhile. An estimate."""
_FLOAT_BYTES = 4


def free_bytes(device: torch.device, share: float) -> float:
    """Return how much memory a stack may take; no limit on a CPU.

    Args:
        device: Where to train.
        share: Share of the device that this process may use.
    """
    if device.type != "cuda":
        return math.inf
    torch.cuda.empty_cache()  # what torch keeps for itself counts as used
    free, total = torch.cuda.mem_get_info(device)
    return _USED_SHARE * min(free, share * total)


def stack_sizes(fits: Sequence[CategoryFit], memory_bytes: float) -> list[int]:
    """Split categories, in their order, into stacks that fit in memory; one that does not is a stack of its own.

    Args:
        fits: The categories; only those of one configuration and recipe share a stack.
        memory_bytes: For a stack.

    Returns:
        Numbers of categories, in order; their sum is that of all.
    """
    if len(fits) == 1:
        return [1]
    sizes: list[int] = []
    last: tuple[FlowSpec, TrainingSettings] | None = None
    activations = left_bytes = 0.0
    for fit in fits:
        configuration = fit.head.flow_spec, fit.settings.model_copy(update={"seed": 0})
        if is_other := configuration != last:
            activations, last = _activation_bytes(fit), configuration
        need_bytes = _kept_bytes(fit) + activations
        if is_other or need_bytes > left_bytes:
            sizes.append(0)
            left_bytes = memory_bytes
        sizes[-1] += 1
        left_bytes -= need_bytes
    return sizes


def _kept_bytes(fit: CategoryFit) -> float:
    """Compute what a category takes over all steps: its features, parameters, and the optimiser's state."""
    values = sum(one.mean.numel() for one in statistics_of(fit.head))
    parameters = sum(parameter.numel() for parameter in fit.head.flows.parameters())
    return _FLOAT_BYTES * (len(fit.rows) * values + _COPIES_OF_PARAMETERS * parameters)


def _activation_bytes(fit: CategoryFit) -> float:
    """Compute what a step takes of a category that is not alone, which computes in another way."""
    shapes = [tuple(one.mean.shape) for one in statistics_of(fit.head)]
    both = activation_bytes(fit.head.flows, shapes, categories=2, batch_size=fit.settings.batch_size)
    return _BACKWARD_FACTOR * both / 2
