"""NVIDIA GPUs: the whole way from pixels to scores as one captured graph, over the stacked heads of all categories.

A batch of mixed categories costs what one of a single category does, because every image gathers the weights of its
slot. Loading a category writes into a slot while batches go on. Tests run the same code on a CPU, without graphs.

Shape legend: B images, S side of an image in pixels, C channels, H W height and width of a scale's grid, s a scale.
"""

import copy
import logging
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flawstream.engines.cuda.errors import cuda_errors
from flawstream.engines.cuda.fold import fold_batch_norms
from flawstream.engines.cuda.lane import LADDER, Lane, Program, ladder
from flawstream.engines.cuda.whiten import choose_whiten
from flawstream.engines.protocol import HeadRows, Read, ScoredBatch, no_files
from flawstream.fastflow.backbone import Backbone
from flawstream.fastflow.head import FastFlowHead
from flawstream.fastflow.score import finite_scores, half_grid, ranked_scores, top_positions
from flawstream.fastflow.stacked import StackedHeads
from flawstream.imaging.pixels import PixelForm, Pixels
from schemas.errors import ConfigError, DeviceLostError, RegistryError
from schemas.manifest import Arithmetic, FlowSpec, ModelManifest

log = logging.getLogger(__name__)

_FIRST_SLOTS = 8
_LANES = 2
"""Batches in flight: while one is computed, the other's images are copied and its results are read."""


class CudaEngine:
    """Computes in float32 without TF32, or, where a version's trial proved it harmless, in float16.

    In float16, statistics are subtracted and scores are computed in float32.

    Args:
        backbone: The frozen network.
        half: Whether to compute versions in float16 that passed its trial.
        max_batch: The largest batch size to capture a graph for; larger batches are split.
        device: The GPU; a CPU runs the same program without graphs.

    Raises:
        ConfigError: The device has too little memory for even one image.
    """

    precision: Arithmetic = "float32"
    concurrent_batches = _LANES

    def __init__(
        self, backbone: Backbone, *, half: bool, max_batch: int = LADDER[-1], device: torch.device | None = None
    ) -> None:
        self.spec = backbone.spec
        self.trial_arithmetic: Arithmetic | None = "float16" if half else None
        self._device = device or torch.device("cuda")
        self._form = PixelForm.of(backbone.spec)
        self._sizes = ladder(max_batch)
        side = backbone.spec.input_size
        example = torch.zeros((1, 3, side, side), device=backbone.shift.device)
        network, _ = fold_batch_norms(backbone.network, example)
        with cuda_errors():
            self._networks = {
                dtype: copy.deepcopy(network).to(self._device, dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
                for dtype in ((torch.float32, torch.float16) if half else (torch.float32,))
            }
            self._shift, self._factor = backbone.shift.to(self._device), backbone.factor.to(self._device)
        self._families: dict[tuple[FlowSpec, torch.dtype], _Family] = {}
        self._loading = threading.Lock()
        self._is_warm = False
        self._lost = False

    @property
    def usable(self) -> bool:
        """Whether the device works; once it does not, the process must be replaced."""
        return not self._lost

    def memory_of(self, head: FastFlowHead) -> int:
        """Return the device memory of a head's slot in float32, in bytes; in float16 it is about half of that."""
        with torch.device("meta"):
            return StackedHeads(self.spec, head.flow_spec, 1).slot_bytes

    def load(self, head: FastFlowHead, manifest: ModelManifest | None, read: Read = no_files) -> "_Slot":
        """Write a head into a free slot; where there is none, double the slots and capture graphs over them."""
        del read
        proven = manifest is not None and manifest.trial_in(self.trial_arithmetic) is not None
        return self._load(head, torch.float16 if proven else torch.float32)

    def load_for_trial(self, head: FastFlowHead) -> "_Slot":
        """Load a head that is to be computed in float16, as `load` does once its trial is passed."""
        return self._load(head, torch.float16)

    def _load(self, head: FastFlowHead, dtype: torch.dtype) -> "_Slot":
        with self._loading, self._errors():
            family = self._families.setdefault((head.flow_spec, dtype), _Family(head.flow_spec, dtype))
            try:
                if not family.free:
                    self._grow(family)
            except MemoryError as error:
                raise RegistryError(
                    f"the GPU has no memory for another category ({error}); lower detector.max_resident_mb or "
                    "detector.max_batch_images"
                ) from error
            index = family.free.pop()
            assert family.stack is not None  # noqa: S101 - `_grow` made it
            family.stack.put(index, head)
            self._wait()
        slot = _Slot(family, index)
        weakref.finalize(slot, family.free.append, index)
        return slot

    def warm_up(self) -> None:
        """Capture the graphs of all batch sizes; from now on, loading captures what it changes.

        Raises:
            ConfigError: The device has too little memory for even one image.
        """
        with self._loading, self._errors():
            self._is_warm = True
            for family in self._families.values():
                self._capture(family.lanes)

    def detect(self, images: Pixels, heads: Sequence[HeadRows]) -> ScoredBatch:
        """Compute a batch; see `Engine`. Batches above the largest captured size are split.

        Raises:
            MemoryError: Out of memory.
            DeviceLostError: The device has failed; `usable` is false from now on.
        """
        count = len(images)
        scores = np.empty(count, np.float64)
        slots, counts = np.zeros(count, np.int64), np.zeros(count, np.int64)
        positions = min(self.spec.grid_sizes) ** 2
        families: dict[_Family, list[NDArray[np.int64]]] = {}
        for head in heads:
            slot: _Slot = head.loaded
            slots[head.rows] = slot.index
            counts[head.rows] = top_positions(positions, head.top_fraction)
            families.setdefault(slot.family, []).append(head.rows)
        in_half = all(family.dtype is torch.float16 for family in families)
        grids = [np.empty((count, side, side), np.float16 if in_half else np.float32) for side in self.spec.grid_sizes]
        with self._errors():
            for family, parts in families.items():
                rows = parts[0] if len(parts) == 1 else np.concatenate(parts)
                whole = len(rows) == count
                for start in range(0, len(rows), self._sizes[-1]):
                    # rows of a whole batch are taken in the batch's order, which needs no copy
                    chosen = slice(start, start + self._sizes[-1]) if whole else rows[start : start + self._sizes[-1]]
                    found = self._run(family, images[chosen], slots[chosen], counts[chosen])
                    scores[chosen] = finite_scores(np.asarray(found[0], np.float32))
                    for grid, values in zip(grids, found[1:], strict=True):
                        grid[chosen] = values
        return ScoredBatch(scores, grids)

    def _run(
        self, family: "_Family", images: Pixels, slots: NDArray[np.int64], counts: NDArray[np.int64]
    ) -> list[NDArray[np.generic]]:
        size = next(size for size in self._sizes if size >= len(images))
        lanes = family.lanes
        lane = lanes.get()
        try:
            lane.capture(size)  # before `warm_up`, as training calls it
            return lane.run(images, slots, counts, size)
        finally:
            lanes.put(lane)

    def _grow(self, family: "_Family") -> None:
        """Double the slots of a family: a new stack with new lanes, then both are swapped in."""
        old = family.stack
        slots = 2 * old.slots if old is not None else _FIRST_SLOTS
        with torch.device(self._device):
            stack = StackedHeads(self.spec, family.flow, slots, dtype=family.dtype, whiten=choose_whiten(self._device))
        if old is not None:
            stack.copy_slots(old)
            self._wait()
        lanes: SimpleQueue[Lane] = SimpleQueue()
        for _ in range(_LANES):
            lanes.put(Lane(self._program(stack, family.dtype), self._form, self._sizes[-1], self._device))
        if self._is_warm:
            self._capture(lanes)
        family.free += range(slots - 1, -1 if old is None else old.slots - 1, -1)
        family.stack, family.lanes = stack, lanes

    def _program(self, stack: StackedHeads, dtype: torch.dtype) -> Program:
        """Return what a graph captures: from pixels to scores and grids."""
        network = self._networks[dtype]

        def run(images: Tensor, slots: Tensor, counts: Tensor) -> list[Tensor]:
            pixels = (images.permute(0, 3, 1, 2).float() - self._shift) * self._factor
            grids = stack(network(pixels.to(dtype, memory_format=torch.channels_last)), slots)
            return [
                ranked_scores(grids, counts),
                *(half_grid(grid) if dtype is torch.float16 else grid for grid in grids),
            ]

        return run

    def _capture(self, lanes: "SimpleQueue[Lane]") -> None:
        """Capture all batch sizes, the largest first; sizes that do not fit in memory are dropped, for all lanes."""
        taken = [lanes.get() for _ in range(_LANES)]
        try:
            for size in sorted(self._sizes, reverse=True):
                try:
                    for lane in taken:
                        with cuda_errors():
                            lane.capture(size)
                except MemoryError as error:
                    self._sizes = tuple(other for other in self._sizes if other < size)
                    log.warning("batches of %d images do not fit in the GPU's memory (%s): not used", size, error)
        finally:
            for lane in taken:
                lanes.put(lane)
        if not self._sizes:
            raise ConfigError(
                "the GPU has too little memory for even one image; lower detector.max_resident_mb, or choose another "
                "detector.device"
            )

    def _wait(self) -> None:
        """Wait for what this thread has copied: lanes have streams of their own."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn errors as `cuda_errors` does, and remember that the device was lost."""
        try:
            with cuda_errors():
                yield
        except DeviceLostError:
            self._lost = True
            raise


class _Family:
    """Heads of one configuration and arithmetic: a stack, its lanes, and its free slots."""

    def __init__(self, flow: FlowSpec, dtype: torch.dtype) -> None:
        self.flow, self.dtype = flow, dtype
        self.stack: StackedHeads | None = None
        self.lanes: SimpleQueue[Lane] = SimpleQueue()
        self.free: list[int] = []


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class _Slot:
    """A loaded head: its place in the stack, which is free again when this object is gone."""

    family: _Family
    index: int
