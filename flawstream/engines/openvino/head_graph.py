"""Conversion of heads to OpenVINO graphs, layer by layer.

OpenVINO's own converter traces a module with torch. At every conversion of a head that keeps 25 MB of memory for good,
which a trainer of many categories and a detector that swaps versions cannot afford, and takes seconds. A head has few
kinds of layers. Knows no files and no compiler.

Shape legend: B images, C channels, H W height and width of a scale's grid, s a scale.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from flawstream.fastflow.flow import FoldedFlow, FoldedStep
from flawstream.fastflow.head import FoldedHead
from flawstream.fastflow.quantise import QuantisedConv
from flawstream.fastflow.statistics import FeatureStatistics

Shape = tuple[int, int, int]
"""(C, H, W) of a scale."""

_Node = Any
"""An `openvino.Node`; the package is an optional extra and has no types."""


def head_graph(head: FoldedHead, shapes: Sequence[Shape]) -> Any:
    """Convert a head to an `openvino.Model`: (B, C_s, H_s, W_s) features to (B, H_s, W_s) grids, with B dynamic.

    The graph shares the memory of the weights.

    Args:
        head: On the CPU, with the permutation as convolutions.
        shapes: The shape of each scale.
    """
    features = [_ops().parameter([-1, *shape], np.float32) for shape in shapes]
    normalised = [_normalise(scale, module) for scale, module in zip(features, head.statistics, strict=True)]
    return _model(normalised, head, features)


def flows_graph(head: FoldedHead, shapes: Sequence[Shape]) -> Any:
    """Convert the flows of a head: normalised features of one image to grids, both with a batch dimension of 1.

    Args:
        head: On the CPU; its convolutions may be `QuantisedConv`.
        shapes: The shape of each scale.
    """
    normalised = [_ops().parameter([1, *shape], np.float32) for shape in shapes]
    return _model(normalised, head, normalised)


def _ops() -> Any:
    from openvino import opset13  # noqa: PLC0415 - an optional extra

    return opset13


def _model(normalised: Sequence[_Node], head: FoldedHead, parameters: Sequence[_Node]) -> Any:
    import openvino  # noqa: PLC0415 - an optional extra

    grids = [_grid(scale, flow) for scale, flow in zip(normalised, head.flows, strict=True)]  # type: ignore[arg-type]
    return openvino.Model(grids, list(parameters))


def _constant(tensor: Tensor) -> _Node:
    return _ops().constant(tensor.detach().contiguous().numpy(), shared_memory=True)


def _normalise(features: _Node, module: nn.Module) -> _Node:
    """Convert a module of `fastflow.normalisation`."""
    ops = _ops()
    match module:
        case FeatureStatistics():
            return _whiten(features, module)
        case nn.LayerNorm():
            centred = ops.mvn(features, [1, 2, 3], normalize_variance=True, eps=module.eps, eps_mode="INSIDE_SQRT")
            return ops.add(ops.multiply(centred, _constant(module.weight)), _constant(module.bias))
        case nn.Identity():
            return features
        case _:
            raise AssertionError(module)


def _whiten(features: _Node, statistics: FeatureStatistics) -> _Node:
    """Convert `FeatureStatistics.forward`."""
    ops = _ops()
    channels, side = statistics.mean.shape[:2]
    groups, size = statistics.groups, channels // statistics.groups
    centred = ops.subtract(features, _constant(statistics.mean[None]))
    scaled = ops.divide(centred, _constant(statistics.deviation[None]))
    grouped = _reshape(scaled, [-1, groups, size, side, side])
    positions = _reshape(ops.transpose(grouped, [3, 4, 1, 0, 2]), [side * side * groups, -1, size])
    white = ops.matmul(positions, _constant(statistics.whitening), transpose_a=False, transpose_b=False)
    white = ops.transpose(_reshape(white, [side, side, groups, -1, size]), [3, 2, 4, 0, 1])
    return _reshape(white, [-1, channels, side, side])


def _reshape(values: _Node, shape: Sequence[int]) -> _Node:
    return _ops().reshape(values, list(shape), special_zero=False)


def _grid(normalised: _Node, flow: FoldedFlow) -> _Node:
    """Convert `FoldedFlow.forward` and `score.anomaly_grid`."""
    ops = _ops()
    passive, active = _split(normalised, flow.halves)
    for step in flow.steps:
        passive, active = _step(passive, active, step)  # type: ignore[arg-type]
    squares = ops.power(ops.concat([passive, active], 1), np.float32(2))
    return ops.multiply(ops.reduce_mean(squares, [1], keep_dims=False), np.float32(0.5))


def _step(passive: _Node, active: _Node, step: FoldedStep) -> tuple[_Node, _Node]:
    """Convert `FoldedStep.forward`."""
    ops = _ops()
    first, _, last = step.subnet
    log_scale, shift = _split(_convolve(ops.relu(_convolve(passive, first)), last), [step.active, step.active])
    bounded = ops.multiply(ops.tanh(log_scale), np.float32(step.clamp))
    factor = ops.exp(ops.add(bounded, _constant(step.log_scale)))
    active = ops.add(ops.multiply(active, factor), shift)
    if step.mixes:
        both = ops.concat([passive, active], 1)
        first_half, second_half = (_convolve(both, mix) for mix in step.mixes)
        return first_half, second_half
    passive = ops.add(ops.multiply(passive, _constant(step.passive_scale)), _constant(step.passive_offset))
    if step.permutation is None:
        return passive, active
    both = ops.gather(ops.concat([passive, active], 1), _constant(step.permutation), np.int64(1))
    return _split(both, [step.passive, step.active])


def _split(values: _Node, channels: Sequence[int]) -> tuple[_Node, _Node]:
    first, second = _ops().variadic_split(values, np.int64(1), list(channels)).outputs()
    return first, second


def _convolve(values: _Node, module: nn.Module) -> _Node:
    """Convert a convolution with padding that keeps height and width."""
    if isinstance(module, QuantisedConv):
        convolution = module.convolution
        values, weight = _quantise(values, module)
    else:
        assert isinstance(module, nn.Conv2d)  # noqa: S101 - flows have no other kind
        convolution, weight = module, _constant(module.weight)
    ops = _ops()
    pads = [side // 2 for side in convolution.kernel_size]
    assert convolution.bias is not None  # noqa: S101 - folded layers have a bias
    return ops.add(
        ops.convolution(values, weight, [1, 1], pads, pads, [1, 1]), _constant(convolution.bias.view(1, -1, 1, 1))
    )


def _quantise(values: _Node, module: QuantisedConv) -> tuple[_Node, _Node]:
    """Return the inputs and the weight of an int8 convolution in the form that OpenVINO compiles to int8."""
    ops = _ops()
    low, high = module.bounds
    ends = [np.float32(bound * module.input_scale) for bound in (low, high)]
    integers = ops.convert(_constant(module.int8_weight()), np.float32)
    return (
        ops.fake_quantize(values, *ends, *ends, levels=high - low + 1),
        ops.multiply(integers, _constant(module.weight_scale.view(-1, 1, 1, 1))),
    )
