"""Heads as OpenVINO graphs: they compute what the module computes, and what OpenVINO's own converter makes of it."""

from typing import Any

import numpy as np
import pytest
import torch
from helpers.heads import FLOW, SPEC, features, make_head

from flawstream.engines.openvino.compile import CompiledGraph, CompiledModule, openvino_is_installed
from flawstream.engines.openvino.head_graph import flows_graph, head_graph
from flawstream.fastflow.head import FastFlowHead, FoldedHead
from flawstream.fastflow.quantise import QuantisedConv, quantise
from schemas.manifest import FlowSpec, Normalisation

pytestmark = pytest.mark.skipif(not openvino_is_installed(), reason="OpenVINO is not installed")

NORMALISATIONS = ("statistics", "layer_norm", "none")
FLOWS = {
    "alternating": FLOW,
    "3x3 only": FLOW.model_copy(update={"conv3x3_only": True, "steps": 3, "clamp": 1.5}),
    "one step": FLOW.model_copy(update={"steps": 1}),
}


def trained(flow: FlowSpec) -> FastFlowHead:
    head = FastFlowHead(SPEC, flow, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in [*head.parameters(), *head.buffers()]:
            if tensor.is_floating_point():
                tensor.add_(torch.rand(tensor.shape, generator=generator), alpha=0.1)
    return head.eval()


class _Traceable(torch.nn.Module):
    """A head with the signature that OpenVINO's converter can trace."""

    def __init__(self, head: FoldedHead) -> None:
        super().__init__()
        self.head = head

    def forward(self, *scales: torch.Tensor) -> list[torch.Tensor]:
        grids: list[torch.Tensor] = self.head(list(scales))
        return grids


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize("flow", FLOWS)
def test_graph_computes_what_the_head_does(flow: str, normalisation: Normalisation) -> None:
    folded = FoldedHead(trained(FLOWS[flow].model_copy(update={"normalisation": normalisation})))
    compiled = CompiledGraph(head_graph(folded, SPEC.feature_shapes), threads=1)
    for batch in (1, 2):
        scales = [scale[:batch] for scale in features()]
        expected = folded(scales)
        for grid, other in zip(compiled(*(scale.numpy() for scale in scales)), expected, strict=True):
            assert grid.dtype == np.float32
            np.testing.assert_allclose(grid, other.numpy(), rtol=1e-5, atol=1e-5)


def test_graph_gives_what_openvinos_converter_gives_to_the_last_bits() -> None:
    folded = FoldedHead(make_head())
    ours = CompiledGraph(head_graph(folded, SPEC.feature_shapes), threads=1)
    converted = CompiledModule(_Traceable(folded), SPEC.feature_shapes, dtype=torch.float32, threads=1)
    scales = [scale.numpy() for scale in features()]
    for grid, other in zip(ours(*scales), converted(*scales), strict=True):
        np.testing.assert_allclose(grid, other, rtol=1e-6, atol=1e-6)


def operations(graph: Any) -> list[str]:
    return [node.get_type_name() for node in graph.get_ordered_ops()]


def test_int8_convolutions_have_int8_weights_and_quantised_inputs() -> None:
    folded = FoldedHead(make_head(), by_index=True)
    scales = features()
    replaced = quantise(folded, lambda: folded.score(scales))
    graph = flows_graph(folded, SPEC.feature_shapes)
    assert operations(graph).count("FakeQuantize") == operations(graph).count("Convolution") == replaced
    weights = [
        node
        for node in graph.get_ordered_ops()
        if node.get_type_name() == "Constant" and node.get_element_type().get_type_name() == "i8"
    ]
    assert len(weights) == replaced
    quantised = [module for module in folded.modules() if isinstance(module, QuantisedConv)]
    for module in quantised:
        weight = module.int8_weight() * module.weight_scale[:, None, None, None]
        exact = module.convolution.weight
        assert ((weight - exact).abs() <= 0.501 * module.weight_scale[:, None, None, None]).all()
    assert all(int(abs(node.data.astype(int)).max()) == 127 for node in weights)
    one_image = [scale[:1] for scale in scales]
    expected = folded.score(one_image)
    found = CompiledGraph(graph, threads=1)(*(scale.numpy() for scale in one_image))
    for grid, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(grid, other.numpy(), rtol=0.02, atol=0.02 * float(other.max()))
