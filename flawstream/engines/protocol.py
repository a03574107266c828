"""What an engine is: the backbone and the heads on one kind of hardware. `tests/contracts` holds every engine to it.

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
"""What `Engine.load` gave: only the engine that gave it knows what is in it."""

Read = Callable[[str], bytes]
"""Gives a file that lies beside a version, by its name."""


def no_files(name: str) -> bytes:
    """Read nothing: for versions of weights alone."""
    raise RegistryError(f"{name} is not there")


class Engine(Protocol):
    """Judges batches of mixed categories. `load` is called while batches are under way, by other threads."""

    spec: BackboneSpec
    precision: Arithmetic
    """In what versions without an int8 graph are computed."""
    int8: bool
    """Whether versions that may be judged in int8 are."""
    copies: int
    """How often a version's float32 weights are in this process while it is ready."""
    concurrent_batches: int
    """How many threads may call `detect` at once; more than one where a batch leaves cores idle at its end."""

    def load(self, head: FastFlowHead, manifest: ModelManifest | None, read: Read = no_files) -> Loaded:
        """Make a version ready and warm it up. May take seconds.

        The version stays ready for as long as somebody holds what is given here.

        Args:
            head: The version's weights; left as it is.
            manifest: What the version is; its backbone is the engine's. None for a head that is not published yet: it
                runs in `precision`.
            read: Gives what lies beside the weights, where the manifest names more than those.

        Raises:
            RegistryError: The engine cannot run the version.
            TransientError: The engine is not here and does not answer.
        """
        ...

    def detect(self, images: Pixels, heads: Sequence[tuple[Loaded, NDArray[np.int64]]]) -> list[NDArray[np.float32]]:
        """Judge a batch: the backbone once, then each head on its own rows.

        Args:
            images: (B, S, S, 3), of the form that the backbone sees.
            heads: What `load` gave, with the rows that are its own; together all rows, each once.

        Returns:
            One (B, H_s, W_s) float32 grid per scale, nats per channel; the caller's own.

        Raises:
            MemoryError: There is no memory for so many images; for fewer there may be.
            TransientError: The engine is not here and does not answer.
        """
        ...


def arithmetic_of(engine: Engine, manifest: ModelManifest) -> Arithmetic:
    """Name the arithmetic in which an engine judges a version: its thresholds must come from the same."""
    return "int8" if engine.int8 and manifest.int8_trial is not None else engine.precision


def run_heads(
    features: Sequence[Any],
    heads: Sequence[tuple[Callable[[Sequence[Any]], list[NDArray[np.float32]]], NDArray[np.int64]]],
    spec: BackboneSpec,
) -> list[NDArray[np.float32]]:
    """Run each head on its own rows of a batch's features: what an engine in this process does.

    Args:
        features: Of the batch, one array or tensor per scale, wherever the engine keeps them.
        heads: Each head with the rows that are its own; together all rows, each once.
        spec: The backbone's.

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
    """Make room for the grids of so many images: one (B, H_s, W_s) float32 array per scale."""
    return [np.empty((count, side, side), np.float32) for side in spec.grid_sizes]


def fill_rows(
    grids: Sequence[NDArray[np.float32]], rows: NDArray[np.int64] | int, parts: Sequence[NDArray[np.float32]]
) -> None:
    """Put in the grids of a batch's rows, or of one row, scale by scale."""
    for whole, part in zip(grids, parts, strict=True):
        whole[rows] = part
