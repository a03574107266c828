"""A lane: one batch at a time, through a captured CUDA graph for each batch size. Two lanes overlap copies and work.

A graph holds the copies of a batch to the device, its computation and the copy of the results back, so that a batch is
one launch. Buffers on both sides are allocated once; a smaller batch is padded to the next size. On a CPU the same
program runs without a graph, which is how it is tested.

Shape legend: B images, S side of an image in pixels.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flawstream.engines.cuda.capture import capture
from flawstream.imaging.pixels import PixelForm, Pixels

LADDER = (1, 2, 4, 8, 16, 32, 64, 128)
"""Batch sizes that graphs are captured for."""

_WARM_UP_RUNS = 2

Program = Callable[[Tensor, Tensor, Tensor], Sequence[Tensor]]
"""Maps (B, S, S, 3) images, (B,) int64 slots and (B,) int64 counts to tensors whose first dimension is B."""


class Lane:
    """Buffers, a stream and graphs.

    Args:
        program: What to compute; it must be the same for every call, as its graph is captured once.
        form: Form of the images.
        max_batch: Largest B.
        device: A GPU, or the CPU.
    """

    def __init__(self, program: Program, form: PixelForm, max_batch: int, device: torch.device) -> None:
        self._program = program
        self._device = device
        self._on_gpu = device.type == "cuda"
        dtype = getattr(torch, form.dtype)
        shapes = (((max_batch, *form.shape), dtype), ((max_batch,), torch.int64), ((max_batch,), torch.int64))
        self._host_inputs = [torch.zeros(shape, dtype=dtype, pin_memory=self._on_gpu) for shape, dtype in shapes]
        self._host_inputs[2].fill_(1)
        self._inputs = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype in shapes]
        self._max_batch = max_batch
        self._host_outputs: list[Tensor] = []
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        if self._on_gpu:
            # high priority: those streams are not given to others, whose graphs free what libraries keep for a stream
            self._stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]  # torch
            self._pool = torch.cuda.graph_pool_handle()

    @torch.inference_mode()
    def capture(self, size: int) -> None:
        """Capture the graph of a batch size; on a CPU, run it once.

        Raises:
            MemoryError, DeviceLostError: As in `errors.cuda_errors`, if called inside it.
        """
        if size in self._graphs:
            return
        if not self._on_gpu:
            self._step(size)
            return
        with torch.cuda.stream(self._stream):
            for _ in range(_WARM_UP_RUNS):  # libraries choose their kernels and allocate in the first runs
                self._step(size)
        self._stream.synchronize()
        graph = capture(partial(self._step, size), self._stream, self._pool)
        with torch.cuda.stream(self._stream):
            graph.replay()  # the first replay uploads it
        self._stream.synchronize()
        self._graphs[size] = graph

    @torch.inference_mode()
    def run(
        self, images: Pixels, slots: NDArray[np.int64], counts: NDArray[np.int64], size: int
    ) -> list[NDArray[np.generic]]:
        """Run a batch and wait for it.

        Args:
            images: (B, S, S, 3), in the lane's form.
            slots: (B,).
            counts: (B,), at least 1.
            size: The batch size to pad to; captured.

        Returns:
            Copies of the program's outputs, of B rows.
        """
        count = len(images)
        for host, values in zip(self._host_inputs, (images, slots, counts), strict=True):
            host.numpy()[:count] = values
        self._host_inputs[1].numpy()[count:size] = slots[0]  # of the padding: any slot that holds a head
        if self._on_gpu:
            with torch.cuda.stream(self._stream):
                self._graphs[size].replay()
            done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # torch
            done.record(self._stream)
            done.synchronize()
        else:
            self._step(size)
        return [output.numpy()[:count].copy() for output in self._host_outputs]

    def _step(self, size: int) -> None:
        """Copy a batch to the device, compute it, and copy the results back."""
        inputs = []
        for host, on_device in zip(self._host_inputs, self._inputs, strict=True):
            on_device[:size].copy_(host[:size], non_blocking=True)
            inputs.append(on_device[:size])
        outputs = self._program(*inputs)
        if not self._host_outputs:
            self._host_outputs = [
                torch.zeros((self._max_batch, *output.shape[1:]), dtype=output.dtype, pin_memory=self._on_gpu)
                for output in outputs
            ]
        for host, output in zip(self._host_outputs, outputs, strict=True):
            host[:size].copy_(output, non_blocking=True)


def ladder(max_batch: int) -> tuple[int, ...]:
    """Return the batch sizes to capture for batches of up to `max_batch` images, the next size up included."""
    return tuple(size for index, size in enumerate(LADDER) if not index or LADDER[index - 1] < max_batch)
