"""A head small enough for any test, and features for it."""

import torch
from torch import Tensor

from flawstream.fastflow.head import FastFlowHead
from schemas.manifest import BackboneSpec, FlowSpec

SPEC = BackboneSpec(
    name="none",
    weights="package",
    weights_sha256="0" * 64,
    strides=(8, 16),
    channels=(3, 4),
    input_size=32,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)
FLOW = FlowSpec(steps=2, hidden_ratio=1.0, conv3x3_only=False, clamp=2.0)


def make_head(seed: int = 0) -> FastFlowHead:
    """A head whose every tensor is away from where it starts."""
    head = FastFlowHead(SPEC, FLOW, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*head.parameters(), *head.buffers()]:
            if tensor.is_floating_point():
                tensor.add_(torch.rand(tensor.shape, generator=generator), alpha=0.1)
        for name, tensor in head.named_buffers():
            if name.endswith("whitening"):
                tensor.copy_(tensor.half())  # as training leaves it
    return head.eval()


def features() -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn((2, *shape), generator=generator) for shape in SPEC.feature_shapes]
