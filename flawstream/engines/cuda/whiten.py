"""The whitening of a mixed batch as one Triton kernel, which reads each image's matrices where they lie.

Plain torch (`fastflow.stacked.whiten_plainly`) copies the matrices of every image first: 10 MB an image for the default
preset. Triton comes with torch's builds for CUDA on Linux; where it does not, plain torch serves.

Shape legend: B images, N slots, L positions, G groups of g channels.
"""

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

from flawstream.fastflow.stacked import Whiten, whiten_plainly


def choose_whiten(device: torch.device) -> Whiten:
    """Choose the kernel on a GPU where Triton is installed, else plain torch."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return whiten_plainly
    return make_kernel()


def make_kernel() -> Whiten:
    """Define the kernel; compiled at its first run for each dtype and g.

    Returns:
        A function like `whiten_plainly` with float32 sums, which does not copy the matrices.
    """
    triton: Any = importlib.import_module("triton")  # comes with torch for CUDA only; has no types
    tl: Any = importlib.import_module("triton.language")

    @triton.jit  # type: ignore[untyped-decorator]  # it has no types
    def kernel(  # noqa: PLR0917 - Triton takes its arguments by position
        positions: Any, matrices: Any, slots: Any, out: Any, per_image: Any, size: tl.constexpr, width: tl.constexpr
    ) -> None:
        """Multiply one (g,) vector by its (g, g) matrix; programs run over (L G, B)."""
        place = tl.program_id(0)
        image = tl.program_id(1)
        slot = tl.load(slots + image)
        rows = tl.arange(0, width)
        inside = rows < size
        vector = tl.load(positions + (image * per_image + place) * size + rows, mask=inside, other=0.0)
        offsets = (slot * per_image + place) * size * size + rows[:, None] * size + rows[None, :]
        matrix = tl.load(matrices + offsets, mask=inside[:, None] & inside[None, :], other=0.0)
        product = tl.sum(vector.to(tl.float32)[:, None] * matrix.to(tl.float32), axis=0)
        tl.store(out + (image * per_image + place) * size + rows, product, mask=inside)

    def whiten(positions: Tensor, matrices: Tensor, slots: Tensor) -> Tensor:
        positions = positions.contiguous()
        count, places, groups, size = positions.shape
        out = torch.empty_like(positions)
        width = triton.next_power_of_2(size)
        kernel[(places * groups, count)](positions, matrices, slots, out, places * groups, size=size, width=width)
        return out

    return whiten
