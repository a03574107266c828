"""The chunks of a PNG, read before decoding: OpenCV allocates the memory that a chunk's length claims.

One damaged bit in a length makes it allocate and clear up to 2 GB (measured: 2 s for a file of 12 KB).

Source: Portable Network Graphics, third edition (W3C 2025), sections 5.3, 5.4 and 11.2.1.
"""

import zlib
from dataclasses import dataclass

_SIGNATURE_BYTES = 8
_GREY = 0
_CHANNELS = {_GREY: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""By colour type: grey, RGB, palette, grey with alpha, RGB with alpha."""
_BITS_AT, _WIDE_BITS = 24, 16
_FRAME_BYTES = 12  # length, type and checksum of a chunk
_MAX_CHUNKS = 1 << 13
_ANCILLARY = 0x20
"""The bit that makes the first letter of a chunk's type small: a decoder may pass over the chunk."""


@dataclass(frozen=True, slots=True)
class PngHeader:
    """What a PNG says of itself.

    Attributes:
        width: Pixels.
        height: Pixels.
        unpacked_bytes: Of the pixels as stored, before they are converted.
        wide: Whether a sample has 16 bits.
        grey: Whether it has one channel of grey levels.
        ancillary: Start and end of each chunk that is not needed for the pixels.
    """

    width: int
    height: int
    unpacked_bytes: int
    wide: bool
    grey: bool
    ancillary: tuple[tuple[int, int], ...]


def read_png_header(data: bytes) -> PngHeader:
    """Read the header, and refuse a PNG whose chunks do not end inside the file.

    Raises:
        ValueError: A chunk is truncated, the end is missing, there are too many chunks, or the header is missing or has
            an unknown colour type.
    """
    ancillary = _find_ancillary(data)
    if data[12:16] != b"IHDR" or data[25] not in _CHANNELS:
        raise ValueError("it does not begin with a header, or has an unknown colour type")
    width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    bits = data[_BITS_AT]
    unpacked_bytes = (width * _CHANNELS[data[25]] * bits + 7) // 8 * height
    return PngHeader(width, height, unpacked_bytes, bits == _WIDE_BITS, data[25] == _GREY, ancillary)


def without_damaged_texts(data: bytes, header: PngHeader) -> bytes:
    """Cut the ancillary chunks, as texts and times, whose checksum is wrong: the pixels do not need them."""
    kept, position = [], 0
    for start, end in header.ancillary:
        if zlib.crc32(data[start + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            kept.append(data[position:start])
            position = end
    return b"".join([*kept, data[position:]]) if kept else data


def _find_ancillary(data: bytes) -> tuple[tuple[int, int], ...]:
    position = _SIGNATURE_BYTES
    ancillary: list[tuple[int, int]] = []
    for _ in range(_MAX_CHUNKS):
        length = int.from_bytes(data[position : position + 4], "big")
        kind = data[position + 4 : position + 8]
        start, position = position, position + _FRAME_BYTES + length
        if position > len(data):
            raise ValueError("it ends in the middle of a chunk")
        if kind == b"IEND":
            return tuple(ancillary)
        if kind[0] & _ANCILLARY:
            ancillary.append((start, position))
    raise ValueError(f"it has more than {_MAX_CHUNKS:,} chunks")
