"""Pictures of results, for `flawstream watch --save`: image, heatmap and boxes, at the size of the image.

A result has no image, and the stream's is deleted with its outcome: the originals come from a folder.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray

from flawstream.imaging.decode import decode_image
from flawstream.imaging.maps import decode_map, encode_jpeg, paint
from flawstream.imaging.pixels import PixelForm
from schemas.errors import MessageError, Reason
from schemas.messages import AnomalyMap, DetectionResult, MapCodec
from schemas.settings import LimitSettings

_HEATMAP_WEIGHT = 0.45
_CHECKED_PX = 32
_LINES_OF_A_SIDE = 400
"""A box's line is one pixel wide for so many pixels of the longer side."""
_LONGEST_JPEG_PX = 65_500
"""libjpeg's bound of a side."""
_MOST_NAME = 100
_NAME = re.compile(r".*_(?:\d+-)?(\d+)-(\d+)\.jpg")


class OverlayFolder:
    """Writes a picture of each result to a folder, and deletes the oldest.

    Args:
        folder: The folder; made where it is missing.
        images: Where the originals are: by the field `file` of the result, a path in there, else by its id. Absent, or
            where an original is missing: the picture is the map alone.
        keep: Most pictures in the folder.
        limits: Of images; larger results are not drawn.
        report: Receives messages for a person.

    Raises:
        OSError: The folder cannot be made or read.
    """

    def __init__(
        self, folder: Path, images: Path | None, keep: int, limits: LimitSettings, report: Callable[[str], None]
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._images = images.resolve() if images is not None else None
        self._keep = keep
        self._limits = limits
        self._report = report
        found = [(match, file.name) for file in folder.iterdir() if (match := _NAME.fullmatch(file.name))]
        found.sort(key=lambda pair: (int(pair[0][1]), int(pair[0][2])))
        self._written = dict.fromkeys(name for _, name in found)

    def write(self, outcome_id: str, result: DetectionResult) -> None:
        """Write the picture of a result; one that cannot be drawn is reported.

        Args:
            outcome_id: The result's id on its stream.
            result: The result.

        Raises:
            OSError: It cannot be written.
        """
        try:
            picture = encode_jpeg(self._draw(result))
        except MessageError as error:
            self._report(f"{result.id} is not drawn: {error}")
            return
        name = f"{_safe(result.id)}_{outcome_id.replace(':', '-')}.jpg"
        partial = self._folder / ".part.jpg"  # one name: a kill leaves at most one behind
        partial.write_bytes(picture)
        partial.replace(self._folder / name)
        self._written.pop(name, None)
        self._written[name] = None
        while len(self._written) > self._keep:
            oldest = next(iter(self._written))
            del self._written[oldest]
            (self._folder / oldest).unlink(missing_ok=True)

    def _draw(self, result: DetectionResult) -> NDArray[np.uint8]:
        height, width = result.image_shape
        if not 0 < height * width <= self._limits.max_pixels or max(height, width) > _LONGEST_JPEG_PX:
            raise MessageError(
                Reason.TOO_LARGE,
                f"{width} x {height} pixels; 1 to {self._limits.max_pixels:,} are drawn (limits.max_pixels), "
                f"{_LONGEST_JPEG_PX:,} a side at most",
            )
        image, heat = self._original(result), _heat(result.map, result.threshold)
        if heat is not None:
            heat = cv2.resize(heat, (width, height), interpolation=cv2.INTER_LINEAR)
        if image is None:
            picture = np.zeros((height, width, 3), np.uint8) if heat is None else heat
        elif heat is None:
            picture = image
        else:
            picture = cv2.addWeighted(heat, _HEATMAP_WEIGHT, image, 1 - _HEATMAP_WEIGHT, 0)
        thick = max(1, max(height, width) // _LINES_OF_A_SIDE)
        for box in result.boxes:
            corners = (box.x, box.y), (min(box.x + box.width, width) - 1, min(box.y + box.height, height) - 1)
            cv2.rectangle(picture, *corners, (0, 0, 0), 3 * thick)  # white alone is invisible on bright parts
            cv2.rectangle(picture, *corners, (255, 255, 255), thick)
        return np.asarray(picture, np.uint8)

    def _original(self, result: DetectionResult) -> NDArray[Any] | None:
        """Return the original's (H, W, 3) uint8 RGB pixels; None where there is none, which is reported."""
        if self._images is None:
            return None
        try:
            return self._read(result, self._images)
        except (OSError, ValueError, MessageError) as error:
            self._report(f"{result.id} is drawn without its original: {error}")
            return None

    def _read(self, result: DetectionResult, images: Path) -> NDArray[Any]:
        path = os.fsdecode(result.extra["file"]) if "file" in result.extra else result.id
        file = (images / path).resolve()
        if not file.is_relative_to(images) or not file.is_file():
            raise ValueError(f"{images} has no file of that name")
        if file.stat().st_size > self._limits.max_image_bytes:
            raise ValueError("the file is larger than limits.max_image_bytes")
        data = file.read_bytes()
        if decode_image(data, PixelForm(_CHECKED_PX), self._limits).original_shape != result.image_shape:
            raise ValueError("the file is an image of another size")
        pixels: Any = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)
        if pixels is None:
            raise ValueError("the file cannot be decoded")
        if pixels.dtype != np.uint8:  # as bright as it gets: 12 bits in 16 would be black
            pixels = cv2.convertScaleAbs(pixels, alpha=255 / max(1, int(pixels.max())))
        return np.ascontiguousarray(pixels[:, :, ::-1])


def _heat(encoded: AnomalyMap, threshold: float) -> Any:
    """Return a map as (h, w, 3) uint8 RGB; None where there is no map."""
    if encoded.codec is MapCodec.NONE:
        return None
    if encoded.codec is not MapCodec.HEATMAP_JPEG:
        return paint(decode_map(encoded), threshold)
    try:
        if simplejpeg.decode_jpeg_header(encoded.data)[:2] != encoded.shape:
            raise ValueError("the JPEG has another size")  # noqa: TRY301 - reported like the errors of the decoder
        return simplejpeg.decode_jpeg(encoded.data, colorspace="RGB")
    except ValueError as error:
        raise MessageError(Reason.MALFORMED, f"the heatmap cannot be decoded: {error}") from None


def _safe(message_id: str) -> str:
    """Make an id a part of a file's name: letters, digits, `.`, `_` and `-`, no leading dot, at most so long."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", message_id)[-_MOST_NAME:].lstrip(".") or "image"
