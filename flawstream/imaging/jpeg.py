"""The header of a JPEG, read without decoding: size, orientation data, and what decoding it would take.

A progressive JPEG is decoded by going over all its coefficients once for each scan, and a scan of a few bytes is enough
for that: a file of 170 KB with thousands of scans took 11 s.

Source: ITU-T T.81, annex B, for markers and segments.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

_EOI, _SOS, _APP1 = 0xD9, 0xDA, 0xE1
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""Markers of a frame header; the three others in this range are tables."""
_PROGRESSIVE = frozenset({0xC2, 0xC6, 0xCA, 0xCE})
_ALONE = frozenset({0x01, *range(0xD0, 0xD8)})
"""Markers that no segment follows."""
_FRAME_BYTES = 6  # up to the number of components
_EXIF = b"Exif\x00\x00"
_MOST_SEGMENTS = 4096
"""Outside scans. A file of a camera has some ten; one of a microscope with a colour profile some hundreds."""
_MOST_SCANS = 1024
"""libjpeg's own encoder makes ten."""
_NEXT_MARKER = re.compile(rb"\xff([^\x00\xff])")
_MARKER_AFTER_SCAN = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])")
"""In coded data 0xFF is followed by 0, or is a restart marker."""


@dataclass(frozen=True, slots=True)
class JpegHeader:
    """What a JPEG says of itself.

    Attributes:
        width: Pixels, as stored.
        height: Pixels, as stored.
        components: Colour components.
        exif: Its first EXIF segment; empty if there is none.
        passes: How often a decoder goes over all coefficients: the number of scans, if there may be several.
        keeps_coefficients: Whether a decoder holds all coefficients in memory, two bytes each.
    """

    width: int
    height: int
    components: int
    exif: bytes
    passes: int
    keeps_coefficients: bool


def read_jpeg_header(data: bytes) -> JpegHeader:
    """Read the header, and count the scans if a decoder would go over several.

    Raises:
        ValueError: A segment is damaged, there are too many, or there is no frame or no scan.
    """
    frame, exif, scans = None, b"", 0
    for marker, segment in _segments(data):
        if marker == _APP1 and not exif and segment.startswith(_EXIF):
            exif = segment
        elif marker in _FRAMES:
            if frame is not None:
                raise ValueError("it has two frames")
            frame = _Frame.parse(marker, segment)
        elif marker == _SOS:
            if frame is None:
                raise ValueError("it has a scan before its frame")
            scans += 1
            if frame.is_whole_in(segment):
                return JpegHeader(frame.width, frame.height, frame.components, exif, 1, keeps_coefficients=False)
            if scans > _MOST_SCANS:
                raise ValueError(f"it has more than {_MOST_SCANS:,} scans")
    if frame is None or not scans:
        raise ValueError("it has no frame or no scan")
    return JpegHeader(frame.width, frame.height, frame.components, exif, scans, keeps_coefficients=True)


@dataclass(frozen=True, slots=True)
class _Frame:
    """A frame header: T.81, figure B.3."""

    width: int
    height: int
    components: int
    progressive: bool

    @classmethod
    def parse(cls, marker: int, segment: bytes) -> "_Frame":
        if len(segment) < _FRAME_BYTES:
            raise ValueError("its frame is too short")
        height, width = int.from_bytes(segment[1:3], "big"), int.from_bytes(segment[3:5], "big")
        return cls(width, height, segment[5], marker in _PROGRESSIVE)

    def is_whole_in(self, scan: bytes) -> bool:
        """Tell from a scan's header whether it holds the whole picture, so that decoders stop behind it."""
        return not self.progressive and scan[:1] == bytes([self.components])


def _segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the marker and content of each segment, passing over coded data.

    Raises:
        ValueError: A segment does not end inside the file, or there are too many.
    """
    position, next_marker = 2, _NEXT_MARKER
    for _ in range(_MOST_SEGMENTS):
        found = next_marker.search(data, position)
        if found is None or (marker := found[1][0]) == _EOI:
            return
        position, next_marker = found.end(), _NEXT_MARKER
        if marker in _ALONE:
            continue
        end = position + int.from_bytes(data[position : position + 2], "big")
        if not position + 2 <= end <= len(data):
            raise ValueError("a segment does not end inside the file")
        yield marker, data[position + 2 : end]
        position = end
        if marker == _SOS:
            next_marker = _MARKER_AFTER_SCAN
    raise ValueError(f"it has more than {_MOST_SEGMENTS:,} segments")
