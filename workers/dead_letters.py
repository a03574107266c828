"""Dead letters: how one is made of an entry that cannot be judged, and how a person looks through them."""

import logging
from dataclasses import dataclass
from datetime import datetime

from redis.asyncio import Redis

from schemas.errors import MessageError
from schemas.keys import StreamKeys
from schemas.messages import DeadLetter
from schemas.wire import MAX_FIELDS, parse_dead_letter
from workers.connection import rows, stream_errors
from workers.ports import Entry, Refusal

_log = logging.getLogger(__name__)

_KEPT_FIRST = (b"id", b"category", b"image", b"image_ref", b"captured_at", b"traceparent")


def bury(entry: Entry, why: MessageError | Refusal, failed_at: datetime) -> DeadLetter:
    """Make the dead letter of an entry.

    All fields are kept as they came, the image too: the stream has carried them once, and whoever mends the cause
    can send them again. Only of an entry with more fields than any message may have, some are left out.
    """
    detail = str(why) if isinstance(why, MessageError) else why.detail
    fields = entry.fields
    if len(fields) > MAX_FIELDS:
        names = list(dict.fromkeys([*(name for name in _KEPT_FIRST if name in fields), *fields]))[:MAX_FIELDS]
        fields = {name: fields[name] for name in names}
        detail += f" ({len(entry.fields) - MAX_FIELDS:,} of the fields are left out here)"
    return DeadLetter(
        fields=fields,
        reason=why.reason,
        detail=detail,
        deliveries=entry.deliveries,
        failed_at=failed_at,
        entry_id=entry.entry_id,
    )


@dataclass(frozen=True, slots=True)
class DeadEntry:
    """A dead letter where it lies.

    Attributes:
        entry_id: Its id on the stream of dead letters; the letter has that on the images stream.
        letter: What is there.
    """

    entry_id: str
    letter: DeadLetter


class DeadLetterBox:
    """Looks through the dead letters, for a person.

    Args:
        client: Of the server that has them.
        keys: Names the stream.
    """

    def __init__(self, client: Redis, keys: StreamKeys) -> None:
        self._client = client
        self._stream = keys.dead

    async def newest(self, limit: int = 20, *, before: str | None = None) -> list[DeadEntry]:
        """Read the newest dead letters, the newest first.

        Entries of others that are no dead letters are left out, with a warning in the log.

        Args:
            limit: At most so many.
            before: Only what is older than the entry with this id, to page on.

        Raises:
            StreamUnavailableError: The server does not answer.
            ConfigError: The server refuses the user.
        """
        with stream_errors(self._client):
            reply = await self._client.xrevrange(self._stream, max=f"({before}" if before else "+", count=limit)
        found = (_read(*row) for row in rows(reply))
        return [entry for entry in found if entry is not None]

    async def get(self, entry_id: str) -> DeadEntry | None:
        """Read one dead letter by its id on the stream of dead letters; none where there is no such.

        Raises:
            StreamUnavailableError: The server does not answer.
            ConfigError: The server refuses the user.
        """
        with stream_errors(self._client):
            reply = await self._client.xrange(self._stream, min=entry_id, max=entry_id, count=1)
        return next((_read(*row) for row in rows(reply)), None)

    async def count(self) -> int:
        """Count the dead letters.

        Raises:
            StreamUnavailableError: The server does not answer.
            ConfigError: The server refuses the user.
        """
        with stream_errors(self._client):
            return int(await self._client.xlen(self._stream))


def _read(entry_id: str, fields: dict[bytes, bytes]) -> DeadEntry | None:
    try:
        return DeadEntry(entry_id, parse_dead_letter(fields))
    except MessageError as error:
        _log.warning("entry %s is skipped: %s", entry_id, error)
        return None
