"""Converts messages to and from the flat fields of a stream entry.

Plain `XADD key * field value ...` from any Redis client must be enough, so every value is text or raw bytes and only
`category` and an image are required. Knows no transport, only mappings of bytes.
"""

import json
import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from pydantic import TypeAdapter, ValidationError

from schemas.errors import MessageError, Reason
from schemas.messages import AnomalyMap, Box, DeadLetter, DetectionResult, ImageMessage, MapCodec
from schemas.settings import LimitSettings

Fields = Mapping[bytes, bytes]

MAX_FIELDS = 1000
"""Most fields of an entry: a script at the server can pass some 4,000 at most to a command."""

_IMAGE_FIELDS = ("id", "category", "image", "image_ref", "captured_at", "traceparent")
_RESULT_FIELDS = frozenset(DetectionResult.model_fields) - {"extra"} | {"map_codec", "map_shape", "map_grids"}
_BOXES = TypeAdapter(tuple[Box, ...])
_DEAD_FIELDS = {name: f"dead.{name}".encode() for name in ("reason", "detail", "deliveries", "failed_at", "entry_id")}
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


def parse_image(entry_id: str, fields: Fields, limits: LimitSettings) -> ImageMessage:
    """Parse an image message; what is too large is refused before anything is parsed.

    Args:
        entry_id: The entry's id on the stream; it is the message's id where the producer gave none.
        fields: The entry's fields as they came.
        limits: What is too large.

    Raises:
        MessageError: `too_large` or `malformed`. A reference is not checked against the allow-list here.
    """
    _refuse_oversized(fields, limits)
    known, extra = _split_fields(fields)
    known["id"] = known.get("id") or entry_id
    if not _TRACEPARENT.fullmatch(known.get("traceparent", "")):
        known.pop("traceparent", None)  # W3C Trace Context 3.2: a malformed header is ignored, never an error
    match (known.pop("image", None) or None, known.pop("image_ref", None) or None):
        case (None, None):
            raise MessageError(
                Reason.MALFORMED,
                "field image is absent or empty; put the bytes of a JPEG, PNG, WebP, BMP or TIFF into it, or into "
                "image_ref where they are",
            )
        case (image, None):
            known["image"] = image
        case (None, image_ref):
            known["image_ref"] = image_ref
        case _:  # ambiguous
            raise MessageError(Reason.MALFORMED, "field image and field image_ref are both there; send one of them")
    try:
        return ImageMessage(**known, extra=extra)
    except ValidationError as error:
        raise MessageError(Reason.MALFORMED, _explain(error)) from None


def image_fields(message: ImageMessage) -> dict[bytes, bytes]:
    """Return an image message as fields, as a producer writes them."""
    fields = {name.encode(): value for name, value in message.extra.items()}
    fields[b"id"] = message.id.encode()
    fields[b"category"] = message.category.encode()
    if message.image is not None:
        fields[b"image"] = message.image
    if message.image_ref is not None:
        fields[b"image_ref"] = message.image_ref.encode()
    _put_context(fields, message)
    return fields


def result_fields(result: DetectionResult) -> dict[bytes, bytes]:
    """Return a result as fields. Ours replace extra fields of the producer that have the same name."""
    fields = {name.encode(): value for name, value in result.extra.items() if name not in _RESULT_FIELDS}
    for name in ("id", "category", "verdict", "model"):
        fields[name.encode()] = str(getattr(result, name)).encode()
    for name in ("score", "p_value", "threshold"):
        fields[name.encode()] = f"{getattr(result, name):.9g}".encode()
    for name in ("queued_ms", "decode_ms", "detect_ms", "total_ms"):
        fields[name.encode()] = f"{getattr(result, name):.3f}".encode()
    fields[b"boxes"] = json.dumps([box.model_dump() for box in result.boxes], separators=(",", ":")).encode()
    fields[b"image_shape"] = _write_shape(result.image_shape)
    fields[b"map_codec"] = result.map.codec.encode()
    if result.map.codec is not MapCodec.NONE:
        fields[b"map_shape"] = _write_shape(result.map.shape)
        fields[b"map"] = result.map.data
    if result.map.grids:
        fields[b"map_grids"] = b",".join(map(_write_shape, result.map.grids))
    _put_context(fields, result)
    return fields


def parse_result(fields: Fields) -> DetectionResult:
    """Parse a result.

    Raises:
        MessageError: `malformed`.
    """
    try:
        known: dict[str, Any] = {
            name: fields[name.encode()].decode()
            for name in DetectionResult.model_fields
            if name.encode() in fields and name not in ("map", "boxes", "image_shape", "extra")
        }
        return DetectionResult(
            **known,
            boxes=_BOXES.validate_json(fields.get(b"boxes", b"[]")),
            image_shape=_read_shape(fields[b"image_shape"]),
            map=AnomalyMap(
                codec=MapCodec(fields.get(b"map_codec", b"none").decode()),
                shape=_read_shape(fields.get(b"map_shape", b"0x0")),
                grids=tuple(map(_read_shape, filter(None, fields.get(b"map_grids", b"").split(b",")))),
                data=fields.get(b"map", b""),
            ),
            extra={key.decode(): value for key, value in fields.items() if key.decode() not in _RESULT_FIELDS},
        )
    except (KeyError, ValueError) as error:  # pydantic's ValidationError is a ValueError
        raise MessageError(Reason.MALFORMED, f"not a result of flawstream: {error}") from error


def dead_letter_fields(letter: DeadLetter) -> dict[bytes, bytes]:
    """Return a dead letter as fields: the original ones unchanged, ours with a prefix."""
    ours = {
        "reason": letter.reason.value,
        "detail": letter.detail,
        "deliveries": str(letter.deliveries),
        "failed_at": letter.failed_at.isoformat(),
        "entry_id": letter.entry_id,
    }
    return {**letter.fields, **{_DEAD_FIELDS[name]: value.encode() for name, value in ours.items()}}


def parse_dead_letter(fields: Fields) -> DeadLetter:
    """Parse a dead letter.

    Raises:
        MessageError: `malformed`.
    """
    try:
        ours = {name: fields[key].decode() for name, key in _DEAD_FIELDS.items()}
        return DeadLetter(
            fields={key: value for key, value in fields.items() if key not in _DEAD_FIELDS.values()},
            reason=Reason(ours["reason"]),
            detail=ours["detail"],
            deliveries=int(ours["deliveries"]),
            failed_at=datetime.fromisoformat(ours["failed_at"]),
            entry_id=ours["entry_id"],
        )
    except (KeyError, ValueError) as error:
        raise MessageError(Reason.MALFORMED, f"not a dead letter of flawstream: {error}") from error


def _split_fields(fields: Fields) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Split fields into those of `ImageMessage` and extra ones."""
    known: dict[str, Any] = {}
    extra: dict[str, bytes] = {}
    for key, value in fields.items():
        name = key.decode("utf-8", "backslashreplace")
        if name not in _IMAGE_FIELDS:
            extra[name] = value
        elif name == "image":
            known[name] = value
        elif name == "traceparent":
            known[name] = value.decode("ascii", "replace")
        else:
            known[name] = _text(name, value)
    return known, extra


def _refuse_oversized(fields: Fields, limits: LimitSettings) -> None:
    if len(fields) > MAX_FIELDS:
        raise MessageError(
            Reason.TOO_LARGE, f"the entry has {len(fields):,} fields and {MAX_FIELDS:,} are allowed; send fewer"
        )
    size_bytes = len(fields.get(b"image", b""))
    if size_bytes > limits.max_image_bytes:
        raise MessageError(
            Reason.TOO_LARGE,
            f"field image has {size_bytes:,} bytes and {limits.max_image_bytes:,} are allowed; "
            "send a smaller image or raise limits.max_image_bytes",
        )
    rest_bytes = sum(len(key) + len(value) for key, value in fields.items() if key != b"image")
    if rest_bytes > limits.max_fields_bytes:
        raise MessageError(
            Reason.TOO_LARGE,
            f"the fields beside image have {rest_bytes:,} bytes and {limits.max_fields_bytes:,} are allowed; "
            "send less or raise limits.max_fields_bytes",
        )


def _put_context(fields: dict[bytes, bytes], message: ImageMessage | DetectionResult) -> None:
    if message.captured_at is not None:
        fields[b"captured_at"] = message.captured_at.isoformat().encode()
    if message.traceparent is not None:
        fields[b"traceparent"] = message.traceparent.encode()


def _text(name: str, value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise MessageError(Reason.MALFORMED, f"field {name} is not UTF-8 text") from None


def _explain(error: ValidationError) -> str:
    """Return which fields are wrong, with at most the start of their values, which may be megabytes."""
    return "; ".join(
        f"field {'.'.join(map(str, problem['loc']))}: {problem['msg']}, got {str(problem['input'])[:64]!r}"
        for problem in error.errors(include_url=False, include_context=False)
    )


def _write_shape(shape: tuple[int, int]) -> bytes:
    return f"{shape[0]}x{shape[1]}".encode()


def _read_shape(text: bytes) -> tuple[int, int]:
    height, width = text.split(b"x")
    return int(height), int(width)
