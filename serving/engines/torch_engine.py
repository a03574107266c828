"""PyTorch on a GPU or a CPU: the reference that other engines agree with. The GPU path was not run on a GPU."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flawstream.fastflow.backbone import Backbone
from flawstream.fastflow.head import FastFlowHead, FoldedHead
from serving.engines.engine import HeadRunner


class TorchEngine:
    """Runs in float32, channels last.

    Args:
        backbone: The frozen network; moved to the GPU where there is one.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.spec = backbone.spec
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._backbone = backbone.to(self._device)
        self._backbone.to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def features(self, images: NDArray[np.uint8]) -> list[Tensor]:
        """Compute (B, C_s, H_s, W_s) float32 features per scale of (B, S, S, 3) uint8 RGB images, on the device."""
        # copied: arrays from shared memory are read-only, which torch warns of
        return self._backbone(torch.tensor(images, device=self._device))  # type: ignore[no-any-return]

    def prepare(self, head: FastFlowHead) -> HeadRunner:
        """Fold a head, move it to the device and run it once."""
        folded = FoldedHead(head).to(self._device)
        folded.to(memory_format=torch.channels_last)

        @torch.inference_mode()
        def run(features: Sequence[Tensor]) -> list[NDArray[np.float32]]:
            return [grid.cpu().numpy() for grid in folded(list(features))]

        run([torch.zeros((1, *shape), device=self._device) for shape in self.spec.feature_shapes])
        return run  # type: ignore[return-value]  # features are this engine's own
