"""The Triton kernel of `whiten`. Imported only where Triton is installed: it comes with torch's builds for CUDA."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_WIDE = 128
_WARPS, _WARPS_OF_WIDE = 4, 16


@triton.jit  # type: ignore[untyped-decorator]  # Triton has no types, and evaluates annotations
def multiply(  # type: ignore[no-untyped-def]  # noqa: ANN201, PLR0917 - the same; it takes arguments by position
    positions,  # noqa: ANN001
    matrices,  # noqa: ANN001
    slots,  # noqa: ANN001
    out,  # noqa: ANN001
    per_image,  # noqa: ANN001
    size: tl.constexpr,
    width: tl.constexpr,
):
    """Multiply one (g,) vector by its (g, g) matrix; programs run over (L G, B)."""
    place = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    slot = tl.load(slots + image)
    rows = tl.arange(0, width)
    inside = rows < size
    vector = tl.load(positions + (image * per_image + place) * size + rows, mask=inside, other=0.0)
    offsets = (slot * per_image + place) * size * size + rows[:, None] * size + rows[None, :]
    matrix = tl.load(matrices + offsets, mask=inside[:, None] & inside[None, :], other=0.0)
    product = tl.sum(vector.to(tl.float32)[:, None] * matrix.to(tl.float32), axis=0)
    tl.store(out + (image * per_image + place) * size + rows, product, mask=inside)


def whiten_in_place(positions: Tensor, matrices: Tensor, slots: Tensor) -> Tensor:
    """Multiply as `fastflow.stacked.Whiten` has it, with float32 sums, without a copy of the matrices.

    Args:
        positions: (B, L, G, g).
        matrices: (N, L, G, g, g) of the same dtype.
        slots: (B,) int64.

    Returns:
        (B, L, G, g) of the same dtype.
    """
    positions = positions.contiguous()
    count, places, groups, size = positions.shape
    out = torch.empty_like(positions)
    width = triton.next_power_of_2(size)
    multiply[(places * groups, count)](
        positions,
        matrices,
        slots,
        out,
        places * groups,
        size=size,
        width=width,
        num_warps=_WARPS if width <= _WIDE else _WARPS_OF_WIDE,
    )
    return out
