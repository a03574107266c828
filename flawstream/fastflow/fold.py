"""Batch norms folded into the convolutions before them, for inference.

Which convolution feeds which norm is found by running the network, so any module layout will do. A fold that changes
the features is undone: a network may read a convolution's output elsewhere too.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

_MOST_DIFFERENCE = 1e-3
"""Of features, relative to the largest: rounding makes some 1e-6, a wrong fold changes everything."""


@torch.no_grad()
def fold_batch_norms(network: nn.Module, example: Tensor) -> tuple[nn.Module, int]:
    """Fold the batch norms of a network in evaluation mode.

    Args:
        network: Returns a sequence of features; not changed.
        example: An input.

    Returns:
        A copy with folded norms and their number; with 0 the copy is as the network.
    """
    folded = copy.deepcopy(network)
    pairs = _pairs(folded, example)
    for convolution, norm in pairs:
        _fold(convolution, norm)
    replacements = {norm: _after(norm) for _, norm in pairs}
    for parent in list(folded.modules()):
        for name, child in list(parent.named_children()):
            if child in replacements:
                setattr(parent, name, replacements[child])
    if pairs and not _same(network, folded, example):
        return copy.deepcopy(network), 0
    return folded, len(pairs)


def _pairs(network: nn.Module, example: Tensor) -> list[tuple[nn.Conv2d, _BatchNorm]]:
    """Run the network and find the batch norms whose input is the output of a convolution, each used once."""
    producers: dict[int, tuple[nn.Conv2d, Tensor]] = {}  # keeps the tensors, so that no address is used twice
    found: list[tuple[nn.Conv2d, _BatchNorm]] = []

    def produced(module: nn.Module, _: object, output: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)  # noqa: S101 - hooked below
        producers[id(output)] = (module, output)

    def consumed(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(module, _BatchNorm)  # noqa: S101 - hooked below
        if id(inputs[0]) in producers:
            found.append((producers[id(inputs[0])][0], module))

    hooks = []
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_hook(produced))
        elif isinstance(module, _BatchNorm) and module.running_mean is not None:
            hooks.append(module.register_forward_pre_hook(consumed))
    network(example)
    for hook in hooks:
        hook.remove()
    convolutions, norms = [pair[0] for pair in found], [pair[1] for pair in found]
    return [pair for pair in found if convolutions.count(pair[0]) == norms.count(pair[1]) == 1]


def _fold(convolution: nn.Conv2d, norm: _BatchNorm) -> None:
    assert norm.running_mean is not None  # noqa: S101 - `_pairs` asked for it
    assert norm.running_var is not None  # noqa: S101 - it comes with the mean
    factor = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight.double()
    bias = torch.zeros_like(factor) if convolution.bias is None else convolution.bias.double()
    offset = (bias - norm.running_mean.double()) * factor
    if norm.bias is not None:
        offset = offset + norm.bias.double()
    dtype = convolution.weight.dtype
    weight = (convolution.weight.double() * factor[:, None, None, None]).to(dtype)
    convolution.weight = nn.Parameter(weight, requires_grad=False)
    convolution.bias = nn.Parameter(offset.to(dtype), requires_grad=False)


def _after(norm: _BatchNorm) -> nn.Module:
    """Return what remains of a norm: timm's `BatchNormAct2d` has a dropout and an activation in it."""
    rest = [child for name, child in norm.named_children() if name in ("drop", "act")]
    return nn.Sequential(*rest) if rest else nn.Identity()


def _same(network: nn.Module, folded: nn.Module, example: Tensor) -> bool:
    return all(
        float((one - other).abs().max()) <= _MOST_DIFFERENCE * float(one.abs().max())
        for one, other in zip(network(example), folded(example), strict=True)
    )
