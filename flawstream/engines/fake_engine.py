"""An engine without a model, for load tests and tests of serving. Deterministic.

Shape legend: B images, S side of an image in pixels, H W height and width of a scale's grid.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from flawstream.engines.protocol import Read, no_files
from flawstream.fastflow.head import FastFlowHead
from flawstream.fastflow.statistics import FeatureStatistics
from flawstream.imaging.pixels import Pixels
from schemas.manifest import Arithmetic, BackboneSpec, ModelManifest


class FakeEngine:
    """Scores a cell of the grid by its brightness minus the mean in the head.

    Args:
        spec: The backbone that the engine reports.
    """

    precision: Arithmetic = "float32"
    int8 = False
    concurrent_batches = 1
    copies = 0

    def __init__(self, spec: BackboneSpec) -> None:
        self.spec = spec

    def load(self, head: FastFlowHead, manifest: ModelManifest | None, read: Read = no_files) -> list[np.float32]:
        """Return one number of the head per scale, so that categories differ."""
        del manifest, read
        return [
            np.float32(statistics.mean.mean()) if isinstance(statistics, FeatureStatistics) else np.float32(0)
            for statistics in head.statistics
        ]

    def detect(
        self, images: Pixels, heads: Sequence[tuple[list[np.float32], NDArray[np.int64]]]
    ) -> list[NDArray[np.float32]]:
        """Average each cell of the images and subtract the number of the row's head; see `Engine`."""
        grids = []
        for scale, side in enumerate(self.spec.grid_sizes):
            cell = self.spec.input_size // side
            grid = images.reshape(-1, side, cell, side, cell, 3).mean(axis=(2, 4, 5), dtype=np.float32) / np.float32(
                255
            )
            for means, rows in heads:
                grid[rows] -= means[scale]
            grids.append(np.abs(grid))
        return grids
