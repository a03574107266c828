"""No model at all: for load tests of everything around it, and for tests of serving. The same images, the same grids.

Shape legend: B images, S side of an image in pixels, H W height and width of a scale's grid.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from flawstream.fastflow.head import FastFlowHead
from flawstream.fastflow.statistics import FeatureStatistics
from schemas.manifest import BackboneSpec
from serving.engines.engine import HeadRunner


class FakeEngine:
    """Calls a cell of the grid anomalous by how bright it is, less what the head has for its mean.

    Args:
        spec: What the engine says that its backbone is.
    """

    def __init__(self, spec: BackboneSpec) -> None:
        self.spec = spec

    def features(self, images: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
        """Average each cell of (B, S, S, 3) uint8 RGB images; one (B, 1, H_s, W_s) float32 array per scale, 0 to 1."""
        count, size = len(images), self.spec.input_size
        return [
            images.reshape(count, side, size // side, side, size // side, 3).mean(axis=(2, 4, 5), dtype=np.float32)[
                :, None
            ]
            / np.float32(255)
            for side in self.spec.grid_sizes
        ]

    def prepare(self, head: FastFlowHead) -> HeadRunner:
        """Keep one number of a head per scale, so that categories differ."""
        means = [
            float(statistics.mean.mean()) if isinstance(statistics, FeatureStatistics) else 0.0
            for statistics in head.statistics
        ]

        def run(features: Sequence[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
            return [np.abs(scale[:, 0] - np.float32(mean)) for scale, mean in zip(features, means, strict=True)]

        return run  # type: ignore[return-value]  # features are this engine's own
