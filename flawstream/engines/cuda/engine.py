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
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from queue import SimpleQueue

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flawstream.engines.cuda.errors import cuda_errors
from flawstream.engines.cuda.lane import LADDER, Lane, Program, ladder
from flawstream.engines.cuda.whiten import choose_whiten
from flawstream.engines.protocol import HeadRows, Read, ScoredBatch, no_files
from flawstream.fastflow.backbone import Backbone
from flawstream.fastflow.fold import fold_batch_norms
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
        example = torch.rand((1, 3, side, side), generator=torch.Generator().manual_seed(0))
        network, _ = fold_batch_norms(backbone.network, example.to(backbone.shift.device))
        with cuda_errors():
            self._networks = {
                dtype: copy.deepcopy(network).to(self._device, dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
                for dtype in ((torch.float32, torch.float16) if half else (torch.float32,))
            }
            self._shift, self._factor = backbone.shift.to(self._device), backbone.factor.to(self._device)
        self._whiten = choose_whiten(self._device)
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
            try:
                with cuda_errors():
                    family = self._family_with_room(head.flow_spec, dtype)
                    index = family.free.pop()
                    slot = _Slot(family, index)
                    weakref.finalize(slot, family.free.append, index)
                    family.stack.put(index, head)
                    self._wait()
            except MemoryError as error:
                raise RegistryError(
                    f"the GPU has no memory for another category ({error}); lower detector.max_resident_mb or "
                    "detector.max_batch_images"
                ) from error
        return slot

    def warm_up(self) -> None:
        """Capture the graphs of all batch sizes; from now on, loading captures what it changes.

        The largest sizes that do not fit in memory are dropped.

        Raises:
            ConfigError: The device has too little memory for even one image.
        """
        with self._loading, self._errors():
            self._is_warm = True
            while self._sizes:
                try:
                    for family in self._families.values():
                        family.lanes = SimpleQueue()  # frees what was captured before
                        with cuda_errors():
                            family.lanes = self._make_lanes(family.stack, family.dtype)
                except MemoryError as error:
                    *fewer, size = self._sizes
                    log.warning("batches of %d images do not fit in the GPU's memory (%s): not used", size, error)
                    self._sizes = tuple(fewer)
                else:
                    return
        raise ConfigError(
            "the GPU has too little memory for even one image; lower detector.max_resident_mb, or choose another "
            "detector.device"
        )

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
        sizes = self._sizes  # they may become fewer meanwhile
        with self._errors():
            for family, parts in families.items():
                rows = parts[0] if len(parts) == 1 else np.concatenate(parts)
                whole = len(rows) == count
                for start in range(0, len(rows), sizes[-1]):
                    # rows of a whole batch are taken in the batch's order, which needs no copy
                    chosen = slice(start, start + sizes[-1]) if whole else rows[start : start + sizes[-1]]
                    found = self._run(family, images[chosen], slots[chosen], counts[chosen], sizes)
                    scores[chosen] = finite_scores(np.asarray(found[0], np.float32))
                    for grid, values in zip(grids, found[1:], strict=True):
                        grid[chosen] = values
        return ScoredBatch(scores, grids)

    def _run(
        self,
        family: "_Family",
        images: Pixels,
        slots: NDArray[np.int64],
        counts: NDArray[np.int64],
        sizes: Sequence[int],
    ) -> list[NDArray[np.generic]]:
        size = next(size for size in sizes if size >= len(images))
        lanes, stack = family.lanes, family.stack
        lane = lanes.get()
        try:
            with cuda_errors():
                lane.capture(size)  # before `warm_up`, as training calls it
            return lane.run(images, slots, counts, size)
        except MemoryError:
            lane = self._make_lane(stack, family.dtype)  # its other graphs may have lost what libraries keep for them
            raise
        finally:
            lanes.put(lane)

    def _family_with_room(self, flow: FlowSpec, dtype: torch.dtype) -> "_Family":
        """Return the family of a configuration; where it has no free slot, double its slots.

        A new stack with new lanes is made beside the old one, and then both are swapped in.
        """
        family = self._families.get((flow, dtype))
        if family is not None and family.free:
            return family
        slots = _FIRST_SLOTS if family is None else 2 * family.stack.slots
        with torch.device(self._device):
            stack = StackedHeads(self.spec, flow, slots, dtype=dtype, whiten=self._whiten)
        if family is not None:
            stack.copy_slots(family.stack)
        lanes = self._make_lanes(stack, dtype)
        if family is None:
            family = self._families[flow, dtype] = _Family(dtype, stack, lanes)
            family.free += range(slots - 1, -1, -1)
        else:
            family.free += range(slots - 1, family.stack.slots - 1, -1)
            family.stack, family.lanes = stack, lanes
        return family

    def _make_lanes(self, stack: StackedHeads, dtype: torch.dtype) -> "SimpleQueue[Lane]":
        """Make lanes over a stack, with the graphs of all batch sizes once the engine is warm.

        Raises:
            MemoryError, DeviceLostError: As in `errors.cuda_errors`, if called inside it.
        """
        lanes = [self._make_lane(stack, dtype) for _ in range(_LANES)]
        self._wait()
        if self._is_warm:
            for size in sorted(self._sizes, reverse=True):  # the smaller ones find room in its memory
                for lane in lanes:
                    lane.capture(size)
        queue: SimpleQueue[Lane] = SimpleQueue()
        for lane in lanes:
            queue.put(lane)
        return queue

    def _make_lane(self, stack: StackedHeads, dtype: torch.dtype) -> Lane:
        program = make_program(self._networks[dtype], self._shift, self._factor, stack, dtype)
        return Lane(program, self._form, self._sizes[-1], self._device)

    def _wait(self) -> None:
        """Wait for what this thread has copied: lanes have streams of their own."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn errors as `cuda_errors` does, and remember that the device was lost."""
        on_gpu = self._device.type == "cuda"
        try:
            with cuda_errors(), torch.cuda.device(self._device) if on_gpu else nullcontext():
                yield
        except DeviceLostError:
            self._lost = True
            raise


def make_program(network: nn.Module, shift: Tensor, factor: Tensor, stack: StackedHeads, dtype: torch.dtype) -> Program:
    """Return what a graph captures: from pixels to scores and grids.

    Args:
        network: Returns features; in `dtype` and channels-last.
        shift: Subtracted from pixels, (1, 3, 1, 1) float32.
        factor: Multiplies them, (1, 3, 1, 1) float32.
        stack: The heads.
        dtype: Arithmetic of network and heads; grids are in it.
    """

    def run(images: Tensor, slots: Tensor, counts: Tensor) -> list[Tensor]:
        pixels = (images.permute(0, 3, 1, 2).float() - shift) * factor
        grids = stack(network(pixels.to(dtype, memory_format=torch.channels_last)), slots)
        published = [half_grid(grid) for grid in grids] if dtype is torch.float16 else grids
        return [ranked_scores(grids, counts), *published]

    return run


@dataclass(slots=True, eq=False)
class _Family:
    """Heads of one configuration and arithmetic: a stack, its lanes, and its free slots."""

    dtype: torch.dtype
    stack: StackedHeads
    lanes: "SimpleQueue[Lane]"
    free: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class _Slot:
    """A loaded head: its place in the stack, which is free again when this object is gone."""

    family: _Family
    index: int
