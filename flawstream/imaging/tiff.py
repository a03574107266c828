"""What decoding a TIFF would take, read from its tags: tiles may be larger than the image, and strips may overlap.

A TIFF of 148 bytes with one tile of 16,384 pixels made a decoder allocate 800 MB for an image of 64 pixels.

Source: TIFF 6.0, sections 3 and 15, for strips and tiles.
"""

from dataclasses import dataclass
from math import ceil

from PIL import Image

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _SAMPLES = 256, 257, 258, 259, 262, 277
_STRIP_OFFSETS, _ROWS_PER_STRIP, _STRIP_BYTES = 273, 278, 279
_TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS, _TILE_BYTES = 322, 323, 324, 325
_JPEG_COMPRESSIONS = (6, 7)
_WHITE_IS_ZERO, _BLACK_IS_ZERO = 0, 1
_WIDE_BITS = 16
_READ_BITS = (1, 2, 4, 8, _WIDE_BITS)
_FAX_GROUP_4 = 4
"""A code of one bit for each change of black and white: 8 MB of thin stripes took 3 s."""
_SCAN = b"\xff\xda"


@dataclass(frozen=True, slots=True)
class TiffLayout:
    """How the pixels of a TIFF are stored.

    Attributes:
        unpacked_bytes: Of all strips or tiles, padding included.
        passes: Most scans of a JPEG inside; 1 without one.
        wide: Whether a sample has 16 bits.
        white_is_zero: Whether the lowest level is white.
        grey: Whether it has one channel of grey levels.
    """

    unpacked_bytes: int
    passes: int
    wide: bool
    white_is_zero: bool
    grey: bool


def read_tiff_layout(image: Image.Image, data: bytes) -> TiffLayout:
    """Read the layout of a TIFF's first page.

    Args:
        image: The TIFF as Pillow has opened it.
        data: The file.

    Raises:
        ValueError: The strips or tiles overlap, a tag is missing, or it is compressed as a fax page.
    """
    tags = image.tag_v2  # type: ignore[attr-defined]  # Pillow's TIFF class has it
    width, height = int(tags[_WIDTH]), int(tags[_HEIGHT])
    if _TILE_OFFSETS in tags:
        side, rows = int(tags[_TILE_WIDTH]), int(tags[_TILE_HEIGHT])
        width, height = ceil(width / side) * side, ceil(height / rows) * rows
        offsets, lengths = tags[_TILE_OFFSETS], tags[_TILE_BYTES]
    else:
        offsets, lengths = tags[_STRIP_OFFSETS], tags.get(_STRIP_BYTES, ())
    if sum(lengths) > len(data):
        raise ValueError("its strips overlap or do not end inside the file")
    if tags.get(_COMPRESSION) == _FAX_GROUP_4:
        raise ValueError("it is compressed as a fax page, by CCITT group 4")
    bits = max(tags.get(_BITS, (1,)))
    if bits not in _READ_BITS:
        raise ValueError(f"it has {bits} bits a sample, not 8 or 16")
    samples = int(tags.get(_SAMPLES, 1))
    passes = 1
    if tags.get(_COMPRESSION) in _JPEG_COMPRESSIONS:
        parts = zip(offsets, lengths, strict=True)
        passes = max((data.count(_SCAN, start, start + length) for start, length in parts), default=1)
    return TiffLayout(
        ceil(width * height * samples * bits / 8),
        max(passes, 1),
        wide=bits == _WIDE_BITS,
        white_is_zero=tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO,
        grey=samples == 1 and tags.get(_PHOTOMETRIC) in (_WHITE_IS_ZERO, _BLACK_IS_ZERO),
    )
