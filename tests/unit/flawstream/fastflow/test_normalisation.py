"""What stands before a flow: chosen by the manifest, in the head and in its folded form alike."""

import pytest
import torch
from helpers.heads import FLOW, SPEC, features
from torch import nn

from flawstream.fastflow.head import FastFlowHead, FoldedHead
from flawstream.fastflow.statistics import FeatureStatistics
from schemas.manifest import FlowSpec, Normalisation


def flow_with(normalisation: Normalisation) -> FlowSpec:
    return FLOW.model_copy(update={"normalisation": normalisation})


def test_manifest_of_before_means_statistics() -> None:
    written = FLOW.model_dump(exclude={"normalisation"})
    assert FlowSpec(**written).normalisation == "statistics"


@pytest.mark.parametrize(
    ("normalisation", "kind"), [("statistics", FeatureStatistics), ("layer_norm", nn.LayerNorm), ("none", nn.Identity)]
)
def test_head_has_what_its_manifest_says(normalisation: Normalisation, kind: type[nn.Module]) -> None:
    head = FastFlowHead(SPEC, flow_with(normalisation))
    assert all(type(one) is kind for one in head.statistics)


@pytest.mark.parametrize("normalisation", ["layer_norm", "none"])
def test_head_read_back_and_folded_scores_what_the_head_maps(normalisation: Normalisation) -> None:
    flow = flow_with(normalisation)
    head = FastFlowHead(SPEC, flow)
    with torch.no_grad():
        for number, parameter in enumerate(head.parameters()):
            parameter.add_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(number)), alpha=0.1)
    latents, _ = head.eval()(features())
    read = FastFlowHead.from_bytes(head.to_bytes(), SPEC, flow)
    for grid, z in zip(FoldedHead(read)(features()), latents, strict=True):
        torch.testing.assert_close(grid, 0.5 * z.square().mean(dim=1))


def test_layer_norm_makes_each_image_s_scale_zero_mean_and_unit_variance() -> None:
    head = FastFlowHead(SPEC, flow_with("layer_norm"))
    for normalise, scale in zip(head.statistics, features(), strict=True):
        values = normalise(7 * scale + 3).flatten(start_dim=1)
        torch.testing.assert_close(values.mean(dim=1), torch.zeros(2), atol=1e-5, rtol=0)
        torch.testing.assert_close(values.var(dim=1, correction=0), torch.ones(2), atol=1e-3, rtol=0)
