"""Decoding of all files of a data set, with all CPUs. Does not judge them."""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np

from flawstream.imaging.decode import decode_image
from flawstream.imaging.levels import Levels, bit_depth_of
from flawstream.imaging.pixels import PixelForm
from schemas.errors import MessageError
from schemas.settings import LimitSettings
from training.datasets.masks import decode_mask, is_jpeg
from training.datasets.samples import CategoryData
from training.datasets.storage import READS_AT_ONCE, is_url, missing_files, read_file


@dataclass(frozen=True, slots=True)
class ImageCheck:
    """Properties of a decoded image.

    Attributes:
        path: The file.
        shape: (height, width) in pixels, upright.
        grey: Whether all three channels are equal.
        digest: Equal for images that are equal for the model.
        size_bytes: Of the file.
        levels: Of a file with 16 bits; None with 8.
    """

    path: Path
    shape: tuple[int, int]
    grey: bool
    digest: bytes
    size_bytes: int
    levels: Levels | None = None


@dataclass(frozen=True, slots=True)
class MaskCheck:
    """Properties of a decoded mask.

    Attributes:
        path: The file.
        shape: (height, width) in pixels.
        marked: Share of the pixels that it marks, in [0, 1].
        lossy: Whether it is a JPEG.
    """

    path: Path
    shape: tuple[int, int]
    marked: float
    lossy: bool


@dataclass(frozen=True, slots=True)
class UnreadableFile:
    """A file that could not be decoded.

    Attributes:
        path: The file.
        reason: Why, and what to do.
    """

    path: Path
    reason: str


FileCheck = ImageCheck | MaskCheck | UnreadableFile


def count_files(data: CategoryData) -> int:
    """Count the files that `decode_files` decodes."""
    files = data.files()
    return len(files) - len(missing_files(files))


def decode_files(data: CategoryData, form: PixelForm, limits: LimitSettings) -> Iterator[FileCheck]:
    """Decode every image and mask of a category, with all CPUs. Missing files are skipped.

    Args:
        data: The category.
        form: Size and filter of the model; images are compared after resizing.
        limits: Maximum size and aspect ratio.

    Yields:
        One item per file, images before masks.

    Raises:
        DatasetError: The storage of a URL fails.
    """
    missing = set(missing_files(data.files()))
    threads = READS_AT_ONCE if any(map(is_url, data.train)) else os.cpu_count()
    with ThreadPoolExecutor(threads) as pool:
        images = [path for path in data.images() if path not in missing]
        yield from pool.map(lambda path: _check_image(path, form, limits), images)
        yield from pool.map(_check_mask, [path for path in data.masks() if path not in missing])


def _check_image(path: Path, form: PixelForm, limits: LimitSettings) -> FileCheck:
    try:
        data = read_file(path)
        image = decode_image(data, form, limits)
        levels = image.levels
        if levels is not None:  # by the bits that it fills itself, so that no two are alike for lack of levels
            image = decode_image(data, replace(form, bits=bit_depth_of(levels.highest)), limits)
    except OSError as error:
        return UnreadableFile(path, f"cannot be read: {error.strerror}; check its permissions and the disk")
    except MessageError as error:
        return UnreadableFile(path, f"{error}; or remove the file")
    red, green, blue = cv2.split(image.pixels)
    grey = np.array_equal(red, green) and np.array_equal(green, blue)
    height, width = image.original_shape
    digest = hashlib.sha256(f"{height} {width} ".encode())
    digest.update(image.pixels.tobytes())
    return ImageCheck(path, (height, width), grey, digest.digest(), len(data), levels)


def _check_mask(path: Path) -> FileCheck:
    try:
        data = read_file(path)
        mask = decode_mask(data)
    except OSError as error:
        return UnreadableFile(path, f"cannot be read: {error.strerror}; check its permissions and the disk")
    except ValueError:
        return UnreadableFile(path, "is a mask that cannot be decoded; save it again as PNG, or remove it")
    return MaskCheck(path, (mask.shape[0], mask.shape[1]), float(mask.mean()), is_jpeg(data))
