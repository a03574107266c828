"""What a log line says of an image besides its message: who it is, and never what it shows."""

from collections.abc import Mapping, Sequence

from schemas.messages import DeadLetter, DetectionResult
from workers.ports import Completion, Entry

_LONGEST = 256
_NAMED = {b"id": "image_id", b"category": "category", b"traceparent": "traceparent"}


def entries(those: Sequence[Entry]) -> dict[str, object]:
    """Describe entries for `extra`: one by all its names, several by their entry ids, none by nothing."""
    if len(those) == 1:
        return _fields(those[0].entry_id, those[0].fields)
    return {"entry_ids": [entry.entry_id for entry in those]} if those else {}


def completion(one: Completion) -> dict[str, object]:
    """Describe for `extra` how an image ended."""
    match one.outcome:
        case DetectionResult() as result:
            named: dict[str, object] = {
                "entry_id": one.entry_id,
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
    for field, name in _NAMED.items():
        value = fields.get(field)
        if value:
            named[name] = value[:_LONGEST].decode("utf-8", "backslashreplace")
    return named
