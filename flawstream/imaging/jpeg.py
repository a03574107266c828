"""The header of a JPEG, read without decoding: size, orientation data, and what decoding it would take.

A progressive JPEG is decoded by going over all its coefficients once for each scan, and a scan of a few bytes is enough
for that: a file of 170 KB with thousands of scans took 11 s.

Source: ITU-T T.81, annex B, for markers and segments.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

EOI = 0xD9
_SOS, _DRI, _APP1 = 0xDA, 0xDD, 0xE1
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""Markers of a frame header; the three others in this range are tables."""
_PROGRESSIVE = frozenset({0xC2, 0xC6, 0xCA, 0xCE})
_ALONE = frozenset({0x01, *range(0xD0, 0xD8)})
"""Markers that no segment follows."""
_FRAME_BYTES = 6  # up to the number of components
_COMPONENT_BYTES = 3
_BLOCK_PX = 8
_EXIF = b"Exif\x00\x00"
_MOST_SEGMENTS = 4096
"""Outside scans. A file of a camera has some ten; one of a microscope with a colour profile some hundreds."""
_MOST_SCANS = 1024
"""libjpeg's own encoder makes ten."""
_NEXT_MARKER = re.compile(rb"\xff([^\x00\xff])")
_MARKER_AFTER_SCAN = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])")
"""In coded data 0xFF is followed by 0, or is a restart marker."""


@dataclass(frozen=True, slots=True)
class JpegScan:
    """The only scan of a JPEG, in units: the smallest rectangles of pixels that are coded together.

    Attributes:
        coded_at: Where its coded data begin.
        size_at: Where height and width of the picture lie, two bytes each.
        restart_interval: Units between two restart markers; 0: there are none.
        unit_width: Pixels.
        unit_height: Pixels.
        columns: Units in a row, with the one that the right edge cuts.
        rows: Rows of units, with the one that the lower edge cuts.
    """

    coded_at: int
    size_at: int
    restart_interval: int
    unit_width: int
    unit_height: int
    columns: int
    rows: int


@dataclass(frozen=True, slots=True)
class JpegHeader:
    """What a JPEG says of itself.

    Attributes:
        width: Pixels, as stored.
        height: Pixels, as stored.
        components: Colour components.
        exif: Its first EXIF segment; empty if there is none.
        passes: How often a decoder goes over all coefficients: the number of scans, if there may be several.
        gaps: Start and end of stray bytes between segments.
        scan: The scan, if a decoder needs no other. Else it holds all coefficients in memory, two bytes each.
    """

    width: int
    height: int
    components: int
    exif: bytes
    passes: int
    gaps: tuple[tuple[int, int], ...] = ()
    scan: JpegScan | None = None


def read_jpeg_header(data: bytes) -> JpegHeader:
    """Read the header, and count the scans if a decoder would go over several.

    Raises:
        ValueError: A segment is damaged, there are too many, or there is no frame or no scan.
    """
    frame, exif, scans, restart_interval = None, b"", 0, 0
    gaps: list[tuple[int, int]] = []
    for segment in _segments(data):
        content = data[segment.start : segment.end]
        if segment.gap is not None:
            gaps.append(segment.gap)
        if segment.marker == _APP1 and not exif and content.startswith(_EXIF):
            exif = content
        elif segment.marker == _DRI:
            restart_interval = int.from_bytes(content[:2], "big")
        elif segment.marker in _FRAMES:
            if frame is not None:
                raise ValueError("it has two frames")
            frame = _Frame.parse(segment, content)
        elif segment.marker == _SOS:
            scans += 1
            frame = _require_frame(frame, scans)
            if frame.is_whole_in(content):
                scan = frame.scan(segment.end, restart_interval)
                return JpegHeader(frame.width, frame.height, frame.components, exif, 1, tuple(gaps), scan)
    if frame is None or not scans:
        raise ValueError("it has no frame or no scan")
    return JpegHeader(frame.width, frame.height, frame.components, exif, scans, tuple(gaps))


@dataclass(frozen=True, slots=True)
class _Segment:
    """Where a segment lies.

    Attributes:
        marker: Its kind.
        start: Of its content.
        end: Of its content.
        gap: Start and end of stray bytes before its marker, if any.
    """

    marker: int
    start: int
    end: int
    gap: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class _Frame:
    """A frame header: T.81, figure B.3."""

    width: int
    height: int
    components: int
    progressive: bool
    sampling: tuple[tuple[int, int], ...]
    size_at: int

    @classmethod
    def parse(cls, segment: _Segment, content: bytes) -> "_Frame":
        if len(content) < _FRAME_BYTES:
            raise ValueError("its frame is too short")
        height, width = int.from_bytes(content[1:3], "big"), int.from_bytes(content[3:5], "big")
        factors = content[_FRAME_BYTES + 1 :: _COMPONENT_BYTES]
        sampling = tuple((factor >> 4, factor & 0xF) for factor in factors)
        return cls(width, height, content[5], segment.marker in _PROGRESSIVE, sampling, segment.start + 1)

    def is_whole_in(self, scan: bytes) -> bool:
        """Tell from a scan's header whether it holds the whole picture, so that decoders stop behind it."""
        return not self.progressive and scan[:1] == bytes([self.components])

    def scan(self, coded_at: int, restart_interval: int) -> JpegScan:
        """Describe a scan that holds the whole picture."""
        across, down = 1, 1  # a scan of one component is coded block by block: T.81, section A.2.2
        if self.components > 1:
            across, down = (max(1, *factors) for factors in zip(*self.sampling, strict=True))
        width, height = _BLOCK_PX * across, _BLOCK_PX * down
        columns, rows = ceil(self.width / width), ceil(self.height / height)
        return JpegScan(coded_at, self.size_at, restart_interval, width, height, columns, rows)


def _require_frame(frame: _Frame | None, scans: int) -> _Frame:
    if frame is None:
        raise ValueError("it has a scan before its frame")
    if scans > _MOST_SCANS:
        raise ValueError(f"it has more than {_MOST_SCANS:,} scans")
    return frame


def _segments(data: bytes) -> Iterator[_Segment]:
    """Yield each segment, passing over coded data.

    Raises:
        ValueError: A segment does not end inside the file, or there are too many.
    """
    position, in_scan = 2, False
    for _ in range(_MOST_SEGMENTS):
        found = (_MARKER_AFTER_SCAN if in_scan else _NEXT_MARKER).search(data, position)
        if found is None or (marker := found[1][0]) == EOI:
            return
        gap = None if in_scan or found.start() == position else (position, found.start())
        position, in_scan = found.end(), False
        if marker in _ALONE:
            continue
        end = position + int.from_bytes(data[position : position + 2], "big")
        if not position + 2 <= end <= len(data):
            raise ValueError("a segment does not end inside the file")
        yield _Segment(marker, position + 2, end, gap)
        position, in_scan = end, marker == _SOS
    raise ValueError(f"it has more than {_MOST_SEGMENTS:,} segments")
