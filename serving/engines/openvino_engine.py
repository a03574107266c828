"""OpenVINO on a CPU. Needs the extra `openvino`."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from flawstream.compiled import CompiledModule
from flawstream.fastflow.backbone import Backbone
from flawstream.fastflow.head import FastFlowHead, FoldedHead
from serving.engines.engine import HeadRunner


class OpenvinoEngine:
    """Runs in float32.

    Args:
        backbone: The frozen network.

    Raises:
        ConfigError: OpenVINO is not installed.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.spec = backbone.spec
        side = self.spec.input_size
        self._backbone = CompiledModule(backbone, [(side, side, 3)], dtype=torch.uint8)

    def features(self, images: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
        """Compute (B, C_s, H_s, W_s) float32 features per scale of (B, S, S, 3) uint8 RGB images."""
        return self._backbone(images)

    def prepare(self, head: FastFlowHead) -> HeadRunner:
        """Fold a head, compile it and run it once."""
        compiled = CompiledModule(FoldedHead(head), self.spec.feature_shapes, dtype=torch.float32, listed=True)

        def run(features: Sequence[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
            return compiled(*features)

        run([np.zeros((1, *shape), np.float32) for shape in self.spec.feature_shapes])
        return run  # type: ignore[return-value]  # features are this engine's own
