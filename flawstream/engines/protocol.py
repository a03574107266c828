"""The protocol of engines, which compute backbone and heads on one kind of hardware. Tested in `tests/contracts`.

Shape legend: B images, S side of an image in pixels, C channels, H W height and width of a scale's grid, s a scale.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from flawstream.fastflow.head import FastFlowHead
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


class Engine(Protocol):
    """Computes anomaly grids for batches of mixed categories. `load` must be thread-safe, also beside `detect`."""

    spec: BackboneSpec
    precision: Arithmetic
    """Arithmetic of versions without an int8 graph."""
    int8: bool
    """Whether versions that passed the int8 trial are computed in int8."""
    copies: int
    """Memory of a loaded version in this process, as a multiple of its float32 weights."""
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

    def detect(self, images: Pixels, heads: Sequence[tuple[Loaded, NDArray[np.int64]]]) -> list[NDArray[np.float32]]:
        """Compute a batch: the backbone once, then each head on its rows.

        Args:
            images: (B, S, S, 3), in the backbone's `PixelForm`.
            heads: Loaded heads with their rows; every row of the batch has exactly one head.

        Returns:
            One (B, H_s, W_s) float32 grid per scale, nats per channel, in memory that the engine does not reuse.

        Raises:
            MemoryError: Out of memory for this batch size; a smaller batch may fit.
            TransientError: A remote engine does not answer.
        """
        ...


def arithmetic_of(engine: Engine, manifest: ModelManifest) -> Arithmetic:
    """Return the arithmetic in which an engine computes a version; its thresholds must be from the same."""
    return "int8" if engine.int8 and manifest.int8_trial is not None else engine.precision


def run_heads(
    features: Sequence[Any],
    heads: Sequence[tuple[Callable[[Sequence[Any]], list[NDArray[np.float32]]], NDArray[np.int64]]],
    spec: BackboneSpec,
) -> list[NDArray[np.float32]]:
    """Run each head on its rows of a batch's features.

    Args:
        features: The batch's features, one array or tensor per scale, on the engine's device.
        heads: Heads with their rows; every row of the batch has exactly one head.
        spec: The backbone.

    Returns:
        One (B, H_s, W_s) float32 grid per scale.
    """
    if len(heads) == 1:
        return heads[0][0](features)
    count = sum(len(rows) for _, rows in heads)
    grids = empty_grids(count, spec)
    for run, rows in heads:
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
