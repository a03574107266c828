"""The protocol of engines, which compute backbone and heads on one kind of hardware. Tested in `tests/contracts`.

Shape legend: B images, S side of an image in pixels, C channels, H W height and width of a scale's grid, s a scale.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from flawstream.fastflow.head import FastFlowHead
from flawstream.fastflow.score import score_images
from flawstream.imaging.maps import Grid
from flawstream.imaging.pixels import Pixels
from schemas.errors import RegistryError
from schemas.manifest import Arithmetic, BackboneSpec, ModelManifest

Loaded = Any
"""A head loaded by `Engine.load`; its type is private to the engine."""

Read = Callable[[str], bytes]
"""Reads a file of a version by its name."""

Float32Array = NDArray[np.float32]


def no_files(name: str) -> bytes:
    """Raise `RegistryError`: for versions without further files."""
    raise RegistryError(f"there is no file {name}")


class HeadRows(NamedTuple):
    """A loaded head and the rows of a batch that it judges.

    Attributes:
        loaded: What `Engine.load` returned.
        rows: Rows of the batch.
        top_fraction: Share of the positions that image scores average: `fastflow.score.image_scores`.
    """

    loaded: Loaded
    rows: NDArray[np.int64]
    top_fraction: float


@dataclass(frozen=True, slots=True)
class ScoredBatch:
    """What an engine computes of a batch, in memory that it does not reuse.

    Attributes:
        scores: (B,) float64 image scores, finite, each exactly a float32; nats per channel.
        grids: One (B, H_s, W_s) array per scale, nats per channel: float32, or float16 clipped to its range.
    """

    scores: NDArray[np.float64]
    grids: Sequence[Grid]


class Engine(Protocol):
    """Computes anomaly grids for batches of mixed categories. `load` must be thread-safe, also beside `detect`."""

    spec: BackboneSpec
    precision: Arithmetic
    """Arithmetic of versions that passed no trial."""
    trial_arithmetic: Arithmetic | None
    """Arithmetic of versions that passed its trial, and of `load_for_trial`; None: there is none."""
    concurrent_batches: int
    """Number of threads that may call `detect` at once; above 1 if cores are idle at the end of a batch."""

    def load(self, head: FastFlowHead, manifest: ModelManifest | None, read: Read = no_files) -> Loaded:
        """Load a version and warm it up. May take seconds.

        The version is unloaded when the returned object is garbage-collected.

        Args:
            head: The version's weights; not changed.
            manifest: The version's manifest, with the engine's backbone. None for a head that is not published yet,
                which is computed in `precision`.
            read: Reads further files that the manifest lists.

        Raises:
            RegistryError: The engine cannot run the version.
            TransientError: A remote engine does not answer.
        """
        ...

    @property
    def usable(self) -> bool:
        """Whether the engine can compute; once it cannot, its process must be replaced."""
        ...

    def memory_of(self, head: FastFlowHead) -> int:
        """Return the memory of a loaded head in bytes, on the device that bounds how many fit."""
        ...

    def warm_up(self) -> None:
        """Prepare for batches of every size. Called once, after the first versions are loaded.

        Raises:
            ConfigError: There is too little memory for even one image.
        """
        ...

    def detect(self, images: Pixels, heads: Sequence[HeadRows]) -> ScoredBatch:
        """Compute a batch: the backbone once, then each head on its rows.

        Args:
            images: (B, S, S, 3), in the backbone's `PixelForm`.
            heads: Loaded heads with their rows; every row of the batch has exactly one head.

        Raises:
            MemoryError: Out of memory for this batch size; a smaller batch may fit.
            TransientError: A remote engine does not answer, or a device was lost.
        """
        ...


def arithmetic_of(engine: Engine, manifest: ModelManifest) -> Arithmetic:
    """Return the arithmetic in which an engine computes a version; its thresholds must be from the same."""
    trial = manifest.trial_in(engine.trial_arithmetic)
    return engine.precision if trial is None else trial.arithmetic


def score_batch(grids: Sequence[NDArray[np.float32]], heads: Sequence[HeadRows]) -> ScoredBatch:
    """Score the images of a batch from its grids, each with the fraction of its head."""
    if len({head.top_fraction for head in heads}) == 1:
        return ScoredBatch(score_images(grids, heads[0].top_fraction), grids)
    scores = np.empty(len(grids[0]), np.float64)
    for _, rows, top_fraction in heads:
        scores[rows] = score_images([grid[rows] for grid in grids], top_fraction)
    return ScoredBatch(scores, grids)


def weights_bytes(head: FastFlowHead) -> int:
    """Return the size of a head's weights in float32, in bytes."""
    return sum(tensor.nbytes for tensor in head.state_dict().values())


def run_heads(features: Sequence[Any], heads: Sequence[HeadRows], spec: BackboneSpec) -> list[NDArray[np.float32]]:
    """Run each head on its rows of a batch's features.

    Args:
        features: The batch's features, one array or tensor per scale, on the engine's device.
        heads: Heads that are functions of features, with their rows; every row of the batch has exactly one.
        spec: The backbone.

    Returns:
        One (B, H_s, W_s) float32 grid per scale.
    """
    if len(heads) == 1:
        grids: list[NDArray[np.float32]] = heads[0].loaded(features)
        return grids
    count = sum(len(head.rows) for head in heads)
    grids = empty_grids(count, spec)
    for run, rows, _ in heads:
        fill_rows(grids, rows, run([scale[rows] for scale in features]))
    return grids


def empty_grids(count: int, spec: BackboneSpec) -> list[NDArray[np.float32]]:
    """Allocate the grids of a batch: one (B, H_s, W_s) float32 array per scale."""
    return [np.empty((count, side, side), np.float32) for side in spec.grid_sizes]


def fill_rows(
    grids: Sequence[NDArray[np.float32]], rows: NDArray[np.int64] | int, parts: Sequence[NDArray[np.float32]]
) -> None:
    """Write the grids of some rows, or of one row, into those of a batch."""
    for whole, part in zip(grids, parts, strict=True):
        whole[rows] = part
