"""OpenVINO on a CPU. Needs the extra `openvino`."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from flawstream.compiled import CompiledModule
from flawstream.fastflow.backbone import Backbone
from flawstream.fastflow.head import FastFlowHead, FoldedHead
from schemas.manifest import ModelManifest
from serving.engines.engine import run_heads


class OpenvinoEngine:
    """Runs in float32.

    Args:
        backbone: The frozen network.

    Raises:
        ConfigError: OpenVINO is not installed.
    """

    copies = 4
    """Measured 3.1 after a batch of one and 3.7 after one of 8: the graph's own, what it repacks, and activations."""

    def __init__(self, backbone: Backbone) -> None:
        self.spec = backbone.spec
        side = self.spec.input_size
        self._backbone = CompiledModule(backbone, [(side, side, 3)], dtype=torch.uint8)

    def load(self, head: FastFlowHead, manifest: ModelManifest) -> "_Run":
        """Fold a head, compile it and run it once."""
        del manifest
        compiled = CompiledModule(FoldedHead(head), self.spec.feature_shapes, dtype=torch.float32, listed=True)

        def run(features: Sequence[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
            return compiled(*features)

        run([np.zeros((1, *shape), np.float32) for shape in self.spec.feature_shapes])
        return run

    def detect(
        self, images: NDArray[np.uint8], heads: Sequence[tuple["_Run", NDArray[np.int64]]]
    ) -> list[NDArray[np.float32]]:
        """Run the backbone, then each head on its rows; see `Engine`."""
        return run_heads(self._backbone(images), heads, self.spec)


_Run = Callable[[Sequence[NDArray[np.float32]]], list[NDArray[np.float32]]]
