"""How many bits a camera fills in files of 16: found from all images of a category, and reported by the check."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from flawstream.imaging.decode import read_levels
from flawstream.imaging.levels import Levels, bit_depth_of
from schemas.settings import BitDepth, LimitSettings
from training.datasets.samples import CategoryData
from training.datasets.storage import image_errors, read_file

_ALL_BITS: BitDepth = 16


def find_bit_depth(data: CategoryData, limits: LimitSettings) -> BitDepth:
    """Find the smallest depth of cameras that holds all levels of a category's images of 16 bits.

    Images of 8 bits are read and not decoded. Without any of 16, all bits are read of those that are judged later.

    Args:
        data: The category.
        limits: Maximum size and aspect ratio of images.

    Raises:
        DatasetError: An image cannot be read.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(lambda path: _read_levels(path, limits), data.images()))
    return _depth_of([levels for levels in found if levels is not None])


def warn_of_depth(images: Sequence[Levels | None], given: BitDepth | None = None) -> str | None:
    """Describe what is to be known of the depth of a category's images; None if nothing is.

    Args:
        images: Levels of each image of 16 bits; None for one of 8.
        given: The depth in the settings, if any.
    """
    wide = [levels for levels in images if levels is not None]
    if not wide:
        return None
    bits = given or _depth_of(wide)
    lowest, highest = min(levels.lowest for levels in wide), max(levels.highest for levels in wide)
    parts: list[str] = []
    if len(wide) < len(images):
        parts.append(
            f"{len(images) - len(wide)} images have 8 bits and {len(wide)} have 16, of which {bits} are read: they are "
            "equally bright only if they were recorded so"
        )
    if given is None and bits < _ALL_BITS:
        parts.append(
            f"images of 16 bits have no level over {highest:,}: {bits} bits are read, here as on the stream, where "
            f"higher levels become white; set training.bit_depths if the camera gives more"
        )
    if highest >> bits:
        parts.append(
            f"levels up to {highest:,} are over the {bits} bits of training.bit_depths and become white; raise it"
        )
    if lowest < 0:
        parts.append(f"levels down to {lowest:,} become black; save unsigned images if they matter")
    return "; ".join(parts) or None


def _depth_of(wide: Sequence[Levels]) -> BitDepth:
    return bit_depth_of(max(levels.highest for levels in wide)) if wide else _ALL_BITS


def _read_levels(path: Path, limits: LimitSettings) -> Levels | None:
    with image_errors(path):
        return read_levels(read_file(path), limits)
