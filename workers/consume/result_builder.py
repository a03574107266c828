"""Builds the result that is published from a model's detection. Used by the stream worker and by the HTTP API."""

from dataclasses import dataclass

from flawstream.imaging.decode import DecodedImage
from flawstream.imaging.maps import encode_map, find_boxes, upsample
from schemas.messages import DetectionResult, ImageMessage, MapCodec, Verdict
from workers.ports import Detection


@dataclass(frozen=True, slots=True)
class Times:
    """How long an image spent where, in milliseconds."""

    queued_ms: float
    decode_ms: float
    detect_ms: float
    total_ms: float


def build_result(
    message: ImageMessage, image: DecodedImage, detection: Detection, codec: MapCodec, times: Times
) -> DetectionResult:
    """Build a result: map, boxes where the verdict is anomalous, times, and the producer's own fields."""
    shape = (image.pixels.shape[0], image.pixels.shape[1])
    values = upsample(detection.grids, shape) if detection.verdict is Verdict.ANOMALOUS else None
    boxes = () if values is None else find_boxes(values, detection.pixel_threshold, image.original_shape)
    return DetectionResult(
        id=message.id,
        category=message.category,
        score=detection.score,
        p_value=detection.p_value,
        threshold=detection.threshold,
        verdict=detection.verdict,
        model=detection.model,
        map=encode_map(detection.grids, shape, codec, threshold=detection.pixel_threshold, values=values),
        boxes=boxes,
        image_shape=image.original_shape,
        captured_at=message.captured_at,
        queued_ms=times.queued_ms,
        decode_ms=times.decode_ms,
        detect_ms=times.detect_ms,
        total_ms=times.total_ms,
        traceparent=message.traceparent,
        extra=message.extra,
    )
