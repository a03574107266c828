"""The trained part of a model version: a normalisation and a flow per scale. Serialised as safetensors.

Shape legend: B images, C channels, K latent channels, H W height and width of a scale's grid, s a scale.
"""

import copy
from collections.abc import Sequence

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from flawstream.fastflow.flow import Flow, FoldedFlow
from flawstream.fastflow.normalisation import make_normalisation
from flawstream.fastflow.score import anomaly_grid
from schemas.errors import RegistryError, one_line
from schemas.manifest import BackboneSpec, FlowSpec


class FastFlowHead(nn.Module):
    """A category's model without the backbone.

    Args:
        backbone: Channels and grid sizes.
        flow: Configuration of the flows and of the normalisation.
        seed: Seed of the permutations and initial weights.

    Attributes:
        statistics: The normalisation of each scale: `FeatureStatistics` unless `flow.normalisation` is another.
        flows: One per scale.
        flow_spec: Configuration of the flows and of the normalisation.
    """

    def __init__(self, backbone: BackboneSpec, flow: FlowSpec, *, seed: int = 0) -> None:
        super().__init__()
        self.flow_spec = flow
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            generator = torch.Generator().manual_seed(seed)
            self.statistics = nn.ModuleList(
                make_normalisation(flow.normalisation, channels, side)
                for channels, side in zip(backbone.channels, backbone.grid_sizes, strict=True)
            )
            self.flows = nn.ModuleList(
                Flow(
                    channels,
                    steps=flow.steps,
                    hidden_ratio=flow.hidden_ratio,
                    conv3x3_only=flow.conv3x3_only,
                    clamp=flow.clamp,
                    generator=generator,
                )
                for channels in backbone.channels
            )

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Map features to latents.

        Args:
            features: One (B, C_s, H_s, W_s) float tensor per scale.

        Returns:
            Per scale (B, K_s, H_s, W_s) latents, and (B,) log-determinants, nats.
        """
        return self.transform([statistics(scale) for statistics, scale in zip(self.statistics, features, strict=True)])

    def transform(self, normalised: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Map normalised features, the output of `statistics`, to latents; returns the same as `forward`."""
        pairs = [flow(scale) for flow, scale in zip(self.flows, normalised, strict=True)]
        return [latents for latents, _ in pairs], [log_det for _, log_det in pairs]

    def shrink_flows(self, share: float) -> None:
        """Move the flows towards the identity, in place; `share` in [0, 1] is kept: `FlowStep.shrink`."""
        for flow in self.flows:
            flow.shrink(share)  # type: ignore[operator]  # ModuleList has no element type

    def to_bytes(self) -> bytes:
        """Serialise all tensors as safetensors; the whitening, already rounded to float16, as float16."""
        return safetensors.torch.save(
            {
                name: tensor.half() if name.endswith(".whitening") else tensor.contiguous()
                for name, tensor in self.state_dict().items()
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes, backbone: BackboneSpec, flow: FlowSpec) -> "FastFlowHead":
        """Read a head.

        Raises:
            RegistryError: The bytes are not safetensors, or of a head of another shape.
        """
        head = cls(backbone, flow)
        try:
            head.load_state_dict(safetensors.torch.load(data))
        except (SafetensorError, RuntimeError) as error:
            reason = one_line(error)
            raise RegistryError(
                f"the weights do not fit their manifest ({reason}); the version is damaged, train it again"
            ) from error
        return head.eval()


class FoldedHead(nn.Module):
    """A head for inference: features in, anomaly grids out. Exact up to float rounding.

    Args:
        head: The trained head; not changed.
        by_index: Permute by an index: `flow.FoldedStep`.
    """

    def __init__(self, head: FastFlowHead, *, by_index: bool = False) -> None:
        super().__init__()
        self.statistics = copy.deepcopy(head.statistics)
        self.flows = nn.ModuleList(FoldedFlow(flow, by_index=by_index) for flow in head.flows)  # type: ignore[arg-type]
        self.requires_grad_(requires_grad=False)
        self.eval()

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Score every position of every scale.

        Args:
            features: One (B, C_s, H_s, W_s) float32 tensor per scale.

        Returns:
            One (B, H_s, W_s) float32 tensor per scale, nats per channel.
        """
        return self.score([statistics(scale) for statistics, scale in zip(self.statistics, features, strict=True)])

    def score(self, normalised: list[Tensor]) -> list[Tensor]:
        """Score normalised features, the output of `statistics`; returns the same as `forward`."""
        return [anomaly_grid(flow(scale)) for flow, scale in zip(self.flows, normalised, strict=True)]
