"""The messages on the streams: images in, results and dead letters out.

Knows no encoding: `schemas.wire` turns these into the flat fields of a stream entry and back.
"""

import re
from collections.abc import Mapping
from datetime import datetime
from enum import StrEnum
from typing import Annotated

from pydantic import AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field

from schemas.errors import Reason

CATEGORY_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
"""A category is also a folder's name in the registry: no separators, no leading dot."""

Category = Annotated[str, Field(pattern=CATEGORY_PATTERN)]
MessageId = Annotated[str, Field(min_length=1, max_length=256)]
_DATE = r"^\d{4}-\d\d-\d\d[Tt ]"


def _require_date(value: object) -> object:
    """Refuse a bare number, which would be read as seconds since 1970."""
    if isinstance(value, datetime) or (isinstance(value, str) and re.match(_DATE, value)):
        return value
    raise ValueError("a time has a date and a zone, as in RFC 3339: 2026-11-28T06:00:00.250+01:00")


CaptureTime = Annotated[AwareDatetime, BeforeValidator(_require_date)]
Milliseconds = Annotated[float, Field(ge=0.0)]
PixelCount = Annotated[int, Field(ge=0)]


class Verdict(StrEnum):
    """Whether an image shows a defect: what quality control acts on."""

    NORMAL = "normal"
    ANOMALOUS = "anomalous"


class MapCodec(StrEnum):
    """How an anomaly map is written into bytes; `flawstream.imaging.maps` reads and writes them all."""

    GRID_F16 = "grid-f16"
    F16 = "f16"
    PNG16 = "png16"
    HEATMAP_JPEG = "heatmap-jpeg"
    NONE = "none"


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ImageMessage(_Message):
    """One image to be judged.

    Attributes:
        id: The producer's own key; the stream entry's id where the producer gave none.
        category: The product category whose model judges the image.
        image: JPEG, PNG, WebP, BMP or TIFF bytes.
        image_ref: A key or URL instead of the bytes.
        captured_at: When the camera took it.
        traceparent: W3C trace context.
        extra: Other fields of the producer, copied to the result.
    """

    id: MessageId
    category: Category
    image: bytes | None = None
    image_ref: str | None = None
    captured_at: CaptureTime | None = None
    traceparent: str | None = None
    extra: Mapping[str, bytes] = {}


class Box(_Message):
    """A connected region above the pixel threshold, in pixels of the original image.

    Attributes:
        x: Left edge, pixels.
        y: Top edge, pixels.
        width: Pixels.
        height: Pixels.
        score: Highest value of the anomaly map inside, nats per channel.
    """

    x: int = Field(ge=0)
    y: int = Field(ge=0)
    width: int = Field(ge=1)
    height: int = Field(ge=1)
    score: float


class AnomalyMap(_Message):
    """An anomaly map as bytes.

    Attributes:
        codec: The encoding of `data`.
        shape: (height, width) in pixels of the map once decoded.
        grids: (height, width) of each native grid; empty for all codecs but `grid-f16`.
        data: The bytes.
    """

    codec: MapCodec
    shape: tuple[PixelCount, PixelCount] = (0, 0)
    grids: tuple[tuple[PixelCount, PixelCount], ...] = ()
    data: bytes = b""


class DetectionResult(_Message):
    """The published judgement of one image.

    Attributes:
        id: As in the image message.
        category: As in the image message.
        score: Image score in the log domain, nats per channel, higher is more anomalous.
        p_value: Share of held-out normal images that score at least as high, in (0, 1]; conformal.
        threshold: `score` above it is anomalous.
        verdict: `score` against `threshold`.
        model: `category@version`.
        map: The anomaly map, at the model's input size.
        boxes: Where the map is above the pixel threshold, in pixels of the original image.
        image_shape: (height, width) in pixels of the original image.
        captured_at: As in the image message.
        queued_ms: From the entry's arrival on the server to the worker's first look at it.
        decode_ms: Bytes to pixels.
        detect_ms: In the detector, its queue included.
        total_ms: From the entry's arrival on the server to publishing.
        traceparent: As in the image message.
        extra: As in the image message.
    """

    id: MessageId
    category: Category
    score: float
    p_value: float = Field(gt=0.0, le=1.0)
    threshold: float
    verdict: Verdict
    model: str
    map: AnomalyMap = AnomalyMap(codec=MapCodec.NONE)
    boxes: tuple[Box, ...] = ()
    image_shape: tuple[PixelCount, PixelCount]
    captured_at: CaptureTime | None = None
    queued_ms: Milliseconds = 0.0
    decode_ms: Milliseconds = 0.0
    detect_ms: Milliseconds = 0.0
    total_ms: Milliseconds = 0.0
    traceparent: str | None = None
    extra: Mapping[str, bytes] = {}


class DeadLetter(_Message):
    """An image that can never be judged, with all that is needed to find out why and to replay it.

    Attributes:
        fields: The original entry's fields, untouched.
        reason: One of a closed set.
        detail: What was wrong, where, and what to do.
        deliveries: How often the entry was delivered.
        failed_at: When it became a dead letter.
        entry_id: The entry's id on the images stream.
    """

    fields: Mapping[bytes, bytes]
    reason: Reason
    detail: str
    deliveries: int = Field(ge=1)
    failed_at: AwareDatetime
    entry_id: str
