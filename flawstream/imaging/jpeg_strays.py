"""Stray bytes before a marker of a JPEG, as many webcams write them: they cost nothing of the picture.

libjpeg warns of them, and of nothing after its first warning. So what it could not warn of is looked for here: a JPEG
with stray bytes is taken only if each of its restart intervals is whole.

Source: ITU-T T.81, sections A.2 (units of a scan), B.2.1 and E.1.4 (restart intervals).
"""

import re

import simplejpeg

from flawstream.imaging.jpeg import EOI, JpegHeader, JpegScan

_STRAY = re.compile(r"extraneous bytes before marker 0x([0-9a-f]{2})")
_MARKER = re.compile(rb"\xff+([^\x00\xff])")
_RESTART, _RESTARTS = 0xD0, 8
_FOUR_COLOURS = 4
_END = bytes([0xFF, EOI])
_LONGEST_SIDE_PX = 65_535
_MOST_INTERVALS = 4096
"""Each is decoded apart, in some 20 us more than its pixels take."""


def without_gaps(data: bytes, header: JpegHeader) -> bytes:
    """Cut stray bytes between segments, where it is known which they are."""
    starts, ends = zip(*header.gaps, strict=True)
    return b"".join(data[end:start] for end, start in zip((0, *ends), (*starts, len(data)), strict=True))


def refuse_cut_intervals(data: bytes, header: JpegHeader, warning: str) -> None:
    """Refuse a JPEG of which more is damaged than that it has stray bytes.

    Args:
        data: The JPEG.
        header: Its header.
        warning: libjpeg's first.

    Raises:
        ValueError: The warning is of something else; or a restart interval is damaged, missing or out of order.
    """
    found = _STRAY.search(warning)
    if found is None or header.components == _FOUR_COLOURS:  # of those the decoder gives no pixels beside a warning
        raise ValueError(warning)
    if int(found[1], 16) == EOI:  # nothing before it gave a warning, and nothing comes after it
        return
    if header.scan is None:
        raise ValueError(f"{warning}, between its scans")
    scan, position = header.scan, header.scan.coded_at
    left = scan.columns * scan.rows
    for index in range(_MOST_INTERVALS):
        marker = _MARKER.search(data, position)
        if marker is None:
            raise ValueError("its end is missing")
        units = min(left, scan.restart_interval or left)
        _refuse_cut(_head(data, scan, units) + data[position : marker.start()])
        left -= units
        expected = _RESTART + index % _RESTARTS if left else EOI
        if marker[1][0] != expected:
            raise ValueError(f"marker 0x{marker[1][0]:02x} is where 0x{expected:02x} must be")
        if not left:
            return
        position = marker.end()
    raise ValueError(f"{warning}, and more than {_MOST_INTERVALS:,} restart intervals")


def _head(data: bytes, scan: JpegScan, units: int) -> bytes:
    """Make the header of a picture that has the units of one restart interval."""
    width, height = units * scan.unit_width, scan.unit_height
    if width > _LONGEST_SIDE_PX and units % scan.columns == 0:
        width, height = scan.columns * scan.unit_width, units // scan.columns * scan.unit_height
    if max(width, height) > _LONGEST_SIDE_PX:
        raise ValueError("a restart interval is longer than a row")
    size = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    return data[: scan.size_at] + size + data[scan.size_at + len(size) : scan.coded_at]


def _refuse_cut(picture: bytes) -> None:
    """Decode a restart interval as a picture of its own, at an eighth of its size."""
    try:
        simplejpeg.decode_jpeg(picture + _END, colorspace="RGB", min_height=1, min_width=1, min_factor=1)
    except ValueError as error:
        if not _STRAY.search(str(error)):
            raise
