"""The size of a configuration: counted without weights, equal to what is trained, and what the reference page says."""

from helpers.places import ROOT

from flawstream.fastflow.backbone import Backbone
from flawstream.fastflow.head import FastFlowHead
from flawstream.fastflow.size import measure
from flawstream_cli.preset_sizes import preset_sizes
from schemas.manifest import FlowSpec
from schemas.settings import ModelSettings

PAGE = ROOT / "docs" / "reference" / "presets.md"


def test_count_is_that_of_the_model_with_weights() -> None:
    settings = ModelSettings(strides=(8, 16), input_size=64)
    backbone = Backbone(settings)
    size = measure(settings)
    head = FastFlowHead(backbone.spec, FlowSpec.of(settings))
    assert size.backbone_parameters == sum(parameter.numel() for parameter in backbone.parameters())
    assert size.added_parameters == sum(parameter.numel() for parameter in head.parameters())
    assert size.spec.feature_shapes == backbone.spec.feature_shapes


def test_macs_are_those_of_the_whitening_and_the_subnets() -> None:
    size = measure(ModelSettings(strides=(8,), input_size=64, flow_steps=2, hidden_ratio=0.5))
    (channels,), (side,) = size.spec.channels, size.spec.grid_sizes
    passive = channels // 2
    hidden = passive // 2
    weights = (9 + 1) * hidden * (passive + channels)
    assert size.flow_macs == (channels * channels + weights) * side * side


def test_reference_page_holds_the_sizes_of_the_presets() -> None:
    rows = [line.strip("| ") for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    sizes = preset_sizes()
    assert rows[0].split(" | ") == list(sizes[0].columns())
    assert [row.split(" | ") for row in rows[2:]] == [list(size.cells()) for size in sizes]
