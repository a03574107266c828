"""An engine without a model, for load tests and tests of serving. Deterministic.

Shape legend: B images, S side of an image in pixels, H W height and width of a scale's grid.
"""

from collections.abc import Sequence

import numpy as np

from flawstream.engines.protocol import HeadRows, Read, ScoredBatch, no_files, score_batch
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
    trial_arithmetic: Arithmetic | None = None
    concurrent_batches = 1
    usable = True

    def __init__(self, spec: BackboneSpec) -> None:
        self.spec = spec

    def load(self, head: FastFlowHead, manifest: ModelManifest | None, read: Read = no_files) -> list[np.float32]:
        """Return one number of the head per scale, so that categories differ."""
        del manifest, read
        return [
            np.float32(statistics.mean.mean()) if isinstance(statistics, FeatureStatistics) else np.float32(0)
            for statistics in head.statistics
        ]

    def memory_of(self, head: FastFlowHead) -> int:
        """Return 0."""
        del head
        return 0

    def warm_up(self) -> None:
        """Do nothing."""

    def detect(self, images: Pixels, heads: Sequence[HeadRows]) -> ScoredBatch:
        """Average each cell of the images and subtract the number of the row's head; see `Engine`."""
        grids = []
        for scale, side in enumerate(self.spec.grid_sizes):
            cell = self.spec.input_size // side
            grid = images.reshape(-1, side, cell, side, cell, 3).mean(axis=(2, 4, 5), dtype=np.float32) / np.float32(
                255
            )
            for means, rows, _ in heads:
                grid[rows] -= means[scale]
            grids.append(np.abs(grid))
        return score_batch(grids, heads)
