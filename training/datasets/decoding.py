"""What a data set's files hold: every one decoded, on all processors. Judges nothing."""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from flawstream.imaging.decode import decode_image
from flawstream.imaging.pixels import PixelForm
from schemas.errors import MessageError
from schemas.settings import LimitSettings
from training.datasets.samples import CategoryData


@dataclass(frozen=True, slots=True)
class SeenImage:
    """What decoding an image told.

    Attributes:
        path: The file.
        shape: (height, width) in pixels, upright.
        grey: Whether all three channels are equal.
        digest: Equal where the model would see the same.
    """

    path: Path
    shape: tuple[int, int]
    grey: bool
    digest: bytes


@dataclass(frozen=True, slots=True)
class SeenMask:
    """What decoding a mask told.

    Attributes:
        path: The file.
        shape: (height, width) in pixels.
        empty: Whether it marks nothing.
    """

    path: Path
    shape: tuple[int, int]
    empty: bool


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A file that could not be decoded.

    Attributes:
        path: The file.
        reason: Why.
    """

    path: Path
    reason: str


Seen = SeenImage | SeenMask | Unreadable


def count_files(data: CategoryData) -> int:
    """Count what `decode_files` decodes."""
    return sum(path.is_file() for path in data.files())


def decode_files(data: CategoryData, form: PixelForm, limits: LimitSettings) -> Iterator[Seen]:
    """Decode every image and mask of a category, on all processors. Those that are not there are passed over.

    Args:
        data: The category.
        form: What the model sees; images that are equal there are equal.
        limits: What is too large to be decoded.

    Yields:
        What was seen of each file, images before masks.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        images = [path for path in data.images() if path.is_file()]
        yield from pool.map(lambda path: _see_image(path, form, limits), images)
        yield from pool.map(_see_mask, [path for path in data.masks() if path.is_file()])


def _see_image(path: Path, form: PixelForm, limits: LimitSettings) -> Seen:
    try:
        image = decode_image(path.read_bytes(), form, limits)
    except OSError as error:
        return Unreadable(path, f"cannot be read: {error.strerror}; check its permissions and the disk")
    except MessageError as error:
        return Unreadable(path, f"{error}; or take the file out")
    red, green, blue = cv2.split(image.pixels)
    grey = np.array_equal(red, green) and np.array_equal(green, blue)
    height, width = image.original_shape
    digest = hashlib.sha256(f"{height} {width} ".encode())
    digest.update(image.pixels.tobytes())
    return SeenImage(path, (height, width), grey, digest.digest())


def _see_mask(path: Path) -> Seen:
    try:
        mask = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_GRAYSCALE)
    except OSError as error:
        return Unreadable(path, f"cannot be read: {error.strerror}; check its permissions and the disk")
    except cv2.error:  # an empty file
        mask = None
    if mask is None:
        return Unreadable(path, "is a mask that cannot be decoded; write it anew as PNG, or take it out")
    return SeenMask(path, (mask.shape[0], mask.shape[1]), not mask.any())
