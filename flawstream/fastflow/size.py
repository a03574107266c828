"""Parameters and multiply-accumulates of a configuration, counted on the meta device: needs no weights."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from flawstream.fastflow.backbone import make_network
from flawstream.fastflow.head import FastFlowHead
from schemas.manifest import BackboneSpec, FlowSpec
from schemas.settings import ModelSettings


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Parameters and multiply-accumulates (MACs) of one configuration.

    Attributes:
        spec: The backbone, without weights.
        backbone_parameters: Up to the last chosen layer.
        added_parameters: Trained parameters.
        backbone_macs: Of the backbone's convolutions and matrix products, for one image.
        flow_macs: Of normalisation and flows, for one image.
    """

    spec: BackboneSpec
    backbone_parameters: int
    added_parameters: int
    backbone_macs: int
    flow_macs: int


def measure(settings: ModelSettings) -> ModelSize:
    """Count a configuration's parameters and multiply-accumulates.

    Raises:
        ConfigError: The network or a layer does not exist.
    """
    side = settings.input_size
    with torch.device("meta"), torch.no_grad():
        network = make_network(settings, pretrained=False)
        spec = network.spec(settings, "none", "")
        head = FastFlowHead(spec, FlowSpec.of(settings)).eval()
        backbone_macs = _count_macs(network.module.eval(), torch.empty(1, 3, side, side))
        flow_macs = _count_macs(head, [torch.empty(1, *shape) for shape in spec.feature_shapes])
    return ModelSize(spec, _count_parameters(network.module), _count_parameters(head), backbone_macs, flow_macs)


def _count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _count_macs(module: nn.Module, example: object) -> int:
    with FlopCounterMode(display=False) as counter:  # counts a multiply-accumulate as two
        module(example)
    return int(counter.get_total_flops()) // 2
