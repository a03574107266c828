"""Resizing of images to the square that a model sees, with the filter `PixelForm.resize`.

Shape legend: H W height and width of an image, S side of the square, all in pixels.
"""

from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from flawstream.imaging.pixels import PixelForm, Pixels

_COLOUR = 3  # dimensions
_BLOCK_COLUMNS = 4096
"""Columns converted to float32 at a time: all of a large image would take four times its memory."""


def resize(pixels: NDArray[np.uint8], form: PixelForm) -> Pixels:
    """Resize an image to a square, stretching it.

    Args:
        pixels: (H, W, 3), or (H, W) grey, which becomes three equal channels.
        form: Size and filter.

    Returns:
        (S, S, 3) of the form's dtype.
    """
    resized = _antialias(pixels, form.side_px) if form.resize == "antialias" else _area(pixels, form.side_px)
    return resized if pixels.ndim == _COLOUR else cv2.cvtColor(resized, cv2.COLOR_GRAY2RGB)


def _area(pixels: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Average the area under each pixel; interpolate if the image is enlarged."""
    if pixels.shape[:2] == (side, side):
        return pixels
    shrinks = pixels.shape[0] >= side and pixels.shape[1] >= side
    resized: NDArray[np.uint8] = cv2.resize(
        pixels, (side, side), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    )
    return resized


def _antialias(pixels: NDArray[np.uint8], side: int) -> NDArray[np.float32]:
    """Resize as torchvision's `resize(..., antialias=True)` does a float tensor, without torch.

    Source: the triangle filter of Pillow's `BILINEAR`, as in torchvision, without rounding in between.
    """
    height, width, *colours = pixels.shape
    columns = pixels.reshape(height, -1)
    down, across = _triangle_weights(height, side), _triangle_weights(width, side)
    blocks = [
        down @ columns[:, start : start + _BLOCK_COLUMNS].astype(np.float32)
        for start in range(0, columns.shape[1], _BLOCK_COLUMNS)
    ]
    transposed = cv2.transpose(np.hstack(blocks).reshape(side, width, *colours))  # several times faster than NumPy
    resized: NDArray[np.float32] = cv2.transpose((across @ transposed.reshape(width, -1)).reshape(side, side, *colours))
    return resized


@lru_cache(maxsize=64)
def _triangle_weights(count: int, side: int) -> sparse.csr_array:
    """Compute the weights of `count` pixels for each of `side` new ones: a triangle around its centre.

    Returns:
        (side, count) float32; each row sums to 1.
    """
    scale = count / side
    reach = max(scale, 1.0)
    centres = (np.arange(side)[:, None] + 0.5) * scale
    taps = np.floor(centres - reach).astype(np.int64) + np.arange(int(2 * reach) + 2)
    weights = np.maximum(0, 1 - np.abs(taps + 0.5 - centres) / reach)
    weights[(taps < 0) | (taps >= count)] = 0
    weights /= weights.sum(axis=1, keepdims=True)
    rows, columns = weights.nonzero()
    return sparse.csr_array(
        (weights[rows, columns].astype(np.float32), (rows, taps[rows, columns])), shape=(side, count)
    )
