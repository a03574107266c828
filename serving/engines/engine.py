"""What an engine is: the backbone and the heads on one kind of hardware. `tests/contracts` holds every engine to it.

Shape legend: B images, S side of an image in pixels, C channels, H W height and width of a scale's grid, s a scale.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from flawstream.fastflow.head import FastFlowHead
from schemas.manifest import BackboneSpec


class FeatureArray(Protocol):
    """(B, C_s, H_s, W_s) features of one scale, wherever the engine keeps them."""

    def __getitem__(self, rows: NDArray[np.int64], /) -> "FeatureArray":
        """Take some rows of the batch."""
        ...


HeadRunner = Callable[[Sequence[FeatureArray]], list[NDArray[np.float32]]]
"""A head made ready: per scale features in, one (B, H_s, W_s) float32 grid per scale out, nats per channel."""


class Engine(Protocol):
    """Runs the backbone once for a whole batch, and heads on their rows; in one thread, `prepare` excepted."""

    spec: BackboneSpec

    def features(self, images: NDArray[np.uint8]) -> Sequence[FeatureArray]:
        """Compute the features of (B, S, S, 3) uint8 RGB images; one array per scale."""
        ...

    def prepare(self, head: FastFlowHead) -> HeadRunner:
        """Make a head ready and warm it up. May take seconds; called in other threads while `features` runs."""
        ...


def detect(
    engine: Engine, images: NDArray[np.uint8], heads: Sequence[tuple[HeadRunner, NDArray[np.int64]]]
) -> list[NDArray[np.float32]]:
    """Judge a batch of mixed categories: the backbone once, then each head on its own rows.

    Args:
        engine: Where it runs.
        images: (B, S, S, 3) uint8 RGB.
        heads: Each head with the rows that are its own; together all rows, each once.

    Returns:
        One (B, H_s, W_s) float32 grid per scale, nats per channel.
    """
    features = engine.features(images)
    if len(heads) == 1:
        return heads[0][0](features)
    grids = [np.empty((len(images), side, side), np.float32) for side in engine.spec.grid_sizes]
    for run, rows in heads:
        for whole, part in zip(grids, run([scale[rows] for scale in features]), strict=True):
            whole[rows] = part
    return grids
