"""Anomaly maps: upsampling of grids, encoding and decoding, boxes and heatmaps.

Knows no model and no transport. The values are nats per channel throughout (`flawstream.fastflow.score`).
"""

import struct
from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from flawstream.imaging.png import read_png_header
from schemas.errors import MessageError, Reason
from schemas.messages import AnomalyMap, Box, MapCodec

Grid = NDArray[np.float16] | NDArray[np.float32]

_F16_MAX = float(np.finfo(np.float16).max)
_PAINTED_DOUBLINGS = 5

_PNG_RANGE = 64.0
"""The range of png16: 0 to 64 nats per channel; normal images have about 0.5."""

_MAX_SIDE_PX = 4096
"""Larger maps are refused before memory is allocated; models see at most 2048 pixels."""


def bounded(grid: NDArray[np.float32]) -> NDArray[np.float32]:
    """Clip values to the range of float16. NaN becomes the maximum, so that it never counts as normal."""
    return np.nan_to_num(grid, nan=_F16_MAX, posinf=_F16_MAX, neginf=-_F16_MAX).clip(-_F16_MAX, _F16_MAX)


def published_grid(grid: Grid) -> NDArray[np.float16]:
    """Convert a grid to float16 by `bounded`; engines on a GPU return it so."""
    return grid if grid.dtype == np.float16 else bounded(grid).astype(np.float16)  # type: ignore[return-value,arg-type]


def upsample(grids: Sequence[Grid], shape: tuple[int, int]) -> NDArray[np.float32]:
    """Upsample the grids of all scales and average them, as FastFlow does (arXiv 2111.07677, section 3.3).

    Args:
        grids: One (H_s, W_s) map per feature scale.
        shape: (height, width) in pixels of the result.

    Returns:
        (height, width) float32.
    """
    height, width = shape
    total = np.zeros(shape, np.float32)
    for grid in grids:
        total += cv2.resize(grid.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
    return total / np.float32(len(grids))


def encode_map(
    grids: Sequence[NDArray[np.float16]],
    shape: tuple[int, int],
    codec: MapCodec,
    threshold: float,
    values: NDArray[np.float32] | None = None,
) -> AnomalyMap:
    """Encode a map.

    Args:
        grids: One (H_s, W_s) map per feature scale.
        shape: (height, width) in pixels of the decoded map.
        codec: The encoding.
        threshold: Sets the colours of `heatmap-jpeg`, nats per channel.
        values: The grids upsampled to `shape`, if the caller has them.
    """
    if codec is MapCodec.NONE:
        return AnomalyMap(codec=codec)
    if codec is MapCodec.GRID_F16:
        data = b"".join(grid.astype("<f2").tobytes() for grid in grids)
        return AnomalyMap(codec=codec, shape=shape, grids=tuple((g.shape[0], g.shape[1]) for g in grids), data=data)
    if values is None:
        values = upsample(grids, shape)
    if codec is MapCodec.F16:
        return AnomalyMap(codec=codec, shape=shape, data=values.astype("<f2").tobytes())
    if codec is MapCodec.PNG16:
        levels = np.rint(np.clip(values * (65535 / _PNG_RANGE), 0, 65535)).astype(np.uint16)
        return AnomalyMap(codec=codec, shape=shape, data=cv2.imencode(".png", levels)[1].tobytes())
    return AnomalyMap(codec=codec, shape=shape, data=encode_jpeg(paint(values, threshold)))


def decode_grids(encoded: AnomalyMap) -> list[NDArray[np.float16]]:
    """Decode the grids of a `grid-f16` map.

    Returns:
        One (H_s, W_s) map per feature scale, nats per channel.

    Raises:
        MessageError: `malformed`: another codec, or bytes that do not fit the grids.
    """
    if encoded.codec is not MapCodec.GRID_F16:
        raise MessageError(Reason.MALFORMED, f"a map of codec {encoded.codec} has no grids; choose grid-f16")
    try:
        counts = [rows * columns for rows, columns in encoded.grids]
        parts = np.split(np.frombuffer(encoded.data, "<f2"), np.cumsum(counts)[:-1])
        return [part.reshape(grid) for part, grid in zip(parts, encoded.grids, strict=True)]
    except ValueError as error:
        raise MessageError(Reason.MALFORMED, f"the map does not fit its grids {encoded.grids}: {error}") from error


def decode_map(encoded: AnomalyMap) -> NDArray[np.float32]:
    """Decode a map.

    Returns:
        (height, width) float32, nats per channel.

    Raises:
        MessageError: `malformed`: no map, a heatmap without values, or bytes that do not fit the shape.
    """
    height, width = encoded.shape
    try:
        if encoded.codec is not MapCodec.NONE and not (0 < height <= _MAX_SIDE_PX and 0 < width <= _MAX_SIDE_PX):
            raise ValueError(f"a side must have 1 to {_MAX_SIDE_PX} pixels")  # noqa: TRY301 - reported like the errors below
        if encoded.codec is MapCodec.GRID_F16:
            return upsample(decode_grids(encoded), encoded.shape)
        if encoded.codec is MapCodec.F16:
            return np.frombuffer(encoded.data, "<f2").reshape(encoded.shape).astype(np.float32)
        if encoded.codec is MapCodec.PNG16:
            if encoded.data[16:24] != struct.pack(
                ">II", width, height
            ):  # PNG's header: do not unpack a decompression bomb
                raise ValueError("the PNG has another size")  # noqa: TRY301 - the same
            read_png_header(encoded.data)
            levels = np.asarray(cv2.imdecode(np.frombuffer(encoded.data, np.uint8), cv2.IMREAD_UNCHANGED))
            if levels.dtype != np.uint16:
                raise ValueError("not a PNG of 16 bits")  # noqa: TRY301 - the same
            return levels.reshape(encoded.shape).astype(np.float32) * np.float32(_PNG_RANGE / 65535)
    except (TypeError, ValueError, cv2.error, ZeroDivisionError) as error:
        raise MessageError(
            Reason.MALFORMED, f"the {encoded.codec} map does not fit its shape {encoded.shape}: {error}"
        ) from error
    raise MessageError(Reason.MALFORMED, f"a map of codec {encoded.codec} has no values to decode")


def find_boxes(
    values: NDArray[np.float32], threshold: float, image_shape: tuple[int, int], most: int = 32
) -> tuple[Box, ...]:
    """Find the connected regions above a threshold.

    Args:
        values: (height, width) anomaly map.
        threshold: Nats per channel.
        image_shape: (height, width) of the original image, in whose pixels the boxes are.
        most: Maximum number of boxes; those with the highest values are kept.

    Returns:
        The boxes, the highest score first.
    """
    count, labels, stats, _ = cv2.connectedComponentsWithStats((values > threshold).astype(np.uint8), connectivity=8)
    if count == 1:  # only the background
        return ()
    above = np.flatnonzero(labels)  # few of the pixels, as a rule
    peaks = np.full(count, -np.inf, np.float32)
    np.maximum.at(peaks, labels.ravel()[above], values.ravel()[above])
    return tuple(
        _box(stats[k], min(float(peaks[k]), _F16_MAX), (values.shape[0], values.shape[1]), image_shape)
        for k in np.argsort(-peaks)[: min(most, count - 1)]
    )


def _box(stats: NDArray[np.int32], score: float, map_shape: tuple[int, int], image_shape: tuple[int, int]) -> Box:
    """Scale a region to the image's pixels, rounding outwards so that the box covers it."""
    left, top = int(stats[cv2.CC_STAT_LEFT]), int(stats[cv2.CC_STAT_TOP])
    right, bottom = left + int(stats[cv2.CC_STAT_WIDTH]), top + int(stats[cv2.CC_STAT_HEIGHT])
    x, y = left * image_shape[1] // map_shape[1], top * image_shape[0] // map_shape[0]
    end_x, end_y = -(-right * image_shape[1] // map_shape[1]), -(-bottom * image_shape[0] // map_shape[0])
    return Box(x=x, y=y, width=end_x - x, height=end_y - y, score=score)


def paint(values: NDArray[np.float32], threshold: float) -> NDArray[np.uint8]:
    """Colour a map on a logarithmic scale, since gross defects score hundreds of times as high as fine ones.

    Up to half the threshold is dark blue, the threshold light blue, from 16 times the threshold on dark red; each fifth
    of the colours is a doubling.

    Returns:
        (height, width, 3) uint8 RGB.
    """
    doublings = np.log2(np.maximum(values, 1e-6) / max(threshold / 2, 1e-6))
    levels = np.clip(doublings * (255 / _PAINTED_DOUBLINGS), 0, 255).astype(np.uint8)
    coloured: NDArray[np.uint8] = cv2.applyColorMap(levels, cv2.COLORMAP_TURBO)[:, :, ::-1]
    return np.ascontiguousarray(coloured)


def encode_jpeg(pixels: NDArray[np.uint8], quality: int = 85) -> bytes:
    """Encode (H, W, 3) uint8 RGB pixels as JPEG."""
    return bytes(cv2.imencode(".jpg", pixels[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes())
