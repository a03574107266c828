"""Makes the dead letter of an entry that cannot be judged. `outcomes.dead_letters` reads, replays and purges them."""

from datetime import datetime

from schemas.errors import MessageError
from schemas.messages import DeadLetter
from schemas.wire import MAX_FIELDS
from workers.ports import Entry, Refusal

_KEPT_FIRST = (b"id", b"category", b"image", b"image_ref", b"captured_at", b"traceparent")


def make_dead_letter(entry: Entry, cause: MessageError | Refusal, failed_at: datetime) -> DeadLetter:
    """Make the dead letter of an entry.

    All fields are kept as they came, the image too, so that it can be replayed once the cause is fixed. Only an entry
    with more fields than any message may have loses some.
    """
    detail = str(cause) if isinstance(cause, MessageError) else cause.detail
    fields = entry.fields
    if len(fields) > MAX_FIELDS:
        names = list(dict.fromkeys([*(name for name in _KEPT_FIRST if name in fields), *fields]))[:MAX_FIELDS]
        fields = {name: fields[name] for name in names}
        detail += f" ({len(entry.fields) - MAX_FIELDS:,} of the fields are left out here)"
    return DeadLetter(
        fields=fields,
        reason=cause.reason,
        detail=detail,
        deliveries=entry.deliveries,
        failed_at=failed_at,
        entry_id=entry.entry_id,
    )
