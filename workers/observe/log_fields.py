"""The fields that a log line has of an image besides its message: its identity, never its contents."""

from collections.abc import Mapping, Sequence

from schemas.messages import DeadLetter, DetectionResult
from workers.ports import Completion, Entry

_MAX_BYTES = 256
_NAMES = {b"id": "image_id", b"category": "category", b"traceparent": "traceparent"}


def entries(concerned: Sequence[Entry]) -> dict[str, object]:
    """Return entries as log fields: one with all its names, several as a list of entry ids, none as no field."""
    if len(concerned) == 1:
        return _fields(concerned[0].entry_id, concerned[0].fields)
    return {"entry_ids": [entry.entry_id for entry in concerned]} if concerned else {}


def completion(completed: Completion) -> dict[str, object]:
    """Return an image and its outcome as log fields."""
    match completed.outcome:
        case DetectionResult() as result:
            named: dict[str, object] = {
                "entry_id": completed.entry_id,
                "image_id": result.id,
                "category": result.category,
                "model": result.model,
                "verdict": result.verdict.value,
                "score": result.score,
                "p_value": result.p_value,
                "total_ms": result.total_ms,
            }
            if result.traceparent:
                named["traceparent"] = result.traceparent
            return named
        case DeadLetter() as letter:
            return _fields(letter.entry_id, letter.fields) | {
                "reason": letter.reason.value,
                "deliveries": letter.deliveries,
            }


def _fields(entry_id: str, fields: Mapping[bytes, bytes]) -> dict[str, object]:
    named: dict[str, object] = {"entry_id": entry_id, "image_id": entry_id}
    for field, name in _NAMES.items():
        value = fields.get(field)
        if value:
            named[name] = value[:_MAX_BYTES].decode("utf-8", "backslashreplace")
    return named
