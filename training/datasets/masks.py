"""Masks: images that are 0 where the part is normal. Any other value, depth, colour or opacity marks a defect."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from schemas.errors import DatasetError
from training.datasets.storage import read_file

Mask = NDArray[np.bool_]
"""(H, W), true where the defect is."""

_JPEG_SIGNATURE = b"\xff\xd8\xff"
_JPEG_NOISE = 0.25
"""The share of the highest value up to which a JPEG's values are noise of its compression around the edges."""
_COLOURS = 3


def is_jpeg(data: bytes) -> bool:
    """Check whether a mask was compressed with loss, so that values beside the defect are not 0."""
    return data.startswith(_JPEG_SIGNATURE)


def decode_mask(data: bytes) -> Mask:
    """Decode a mask of any depth: 1, 8, 16 or 32 bits or floats, grey, coloured, with a palette or with alpha.

    Transparent pixels are normal. Where all colours are black, the opaque pixels are the defect, unless all are.

    Raises:
        ValueError: The bytes are not an image.
    """
    if is_jpeg(data):
        grey = _decode(data, cv2.IMREAD_GRAYSCALE)
        return np.asarray(grey > _JPEG_NOISE * grey.max())
    marked: Mask = _decode(data, cv2.IMREAD_UNCHANGED) != 0
    if marked.ndim == 2:  # noqa: PLR2004 - no channels
        return marked
    coloured = np.asarray(marked[:, :, :_COLOURS].any(axis=2))
    if marked.shape[2] == _COLOURS:
        return coloured
    opaque = marked[:, :, _COLOURS]
    return coloured & opaque if coloured.any() or opaque.all() else opaque


def read_masks(paths: Sequence[Path], side: int) -> Mask:
    """Read the masks of an image, reduced to the size of the map.

    Args:
        paths: At least one; a pixel that any of them marks is a defect.
        side: S, pixels.

    Returns:
        (S, S), true where any part of the pixel's area is marked, so that no defect is too thin to be kept.

    Raises:
        DatasetError: A file cannot be read.
    """
    reduced = np.zeros((side, side), np.bool_)
    for path in paths:
        try:
            reduced |= reduce_mask(decode_mask(read_file(path)), side)
        except (OSError, ValueError) as error:
            raise DatasetError(f"cannot read the mask {path}; repair or remove the file") from error
    return reduced


def reduce_mask(mask: Mask, side: int) -> Mask:
    """Resize a mask to (side, side): a pixel is marked if any part of its area is."""
    for axis in (0, 1):
        length = mask.shape[axis]
        edges = np.arange(side + 1) * length
        first, last = edges[:-1] // side, -(-edges[1:] // side) - 1  # both are part of the pixel
        mask = np.logical_or.reduceat(mask, first, axis=axis) | mask.take(last, axis=axis)
    return mask


def _decode(data: bytes, flags: int) -> NDArray[Any]:
    """Decode with OpenCV, which keeps 16 bits and floats, or with Pillow, which knows more kinds of TIFF.

    Raises:
        ValueError: Neither can.
    """
    try:
        values = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:  # an empty file
        values = None
    if values is not None:
        return np.asarray(values)
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert("RGBA") if image.mode in {"P", "PA", "LA"} else image)
    except Exception as error:  # Pillow raises any exception
        raise ValueError("not an image") from error
