"""Grey levels of files with 16 bits, of which a camera fills 10, 12 or 14, reduced to the 8 that a model sees.

How many are filled is a property of the camera, and cannot be read off one image: a dark image of 12 bits looks like
one of 10. It is found once, from all images of a category, and kept in the version's manifest.

Shape legend: H W height and width of an image in pixels.
"""

from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from schemas.settings import BitDepth

_EIGHT = 8
_SIGNED_BITS = 15


@dataclass(frozen=True, slots=True)
class Levels:
    """The grey levels of a file with 16 bits.

    Attributes:
        lowest: As stored; below 0 only in signed files.
        highest: As stored.
        bits: By how many of the lower bits it was read; levels above are white, below 0 black.
    """

    lowest: int
    highest: int
    bits: BitDepth


def to_eight_bits(stored: NDArray[Any], bits: BitDepth, *, white_is_zero: bool) -> tuple[NDArray[np.uint8], Levels]:
    """Keep the upper eight of the bits that are filled.

    Args:
        stored: (H, W) or (H, W, 3) uint16, or int16, which have one bit less.
        bits: How many of the lower bits are filled.
        white_is_zero: Whether the lowest level is white.

    Returns:
        Pixels of the same shape, and their levels.
    """
    filled: int = bits if stored.dtype == np.uint16 else min(bits, _SIGNED_BITS)
    levels = Levels(int(stored.min()), int(stored.max()), bits)
    if levels.lowest < 0 or levels.highest >> filled:
        np.clip(stored, 0, (1 << filled) - 1, out=stored)
    pixels = np.empty(stored.shape, np.uint8)
    np.right_shift(stored, filled - _EIGHT, out=pixels, casting="unsafe")
    return (np.invert(pixels, out=pixels) if white_is_zero else pixels), levels


def bit_depth_of(highest: int) -> BitDepth:
    """Return the smallest depth of cameras that holds a level."""
    return next(bits for bits in get_args(BitDepth) if highest < 1 << bits)
