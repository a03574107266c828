"""Completes entries: writes their outcomes and removes them from the images stream, each exactly once."""

from collections.abc import Sequence

from schemas.keys import StreamKeys
from schemas.messages import DeadLetter, DetectionResult
from schemas.wire import dead_letter_fields, result_fields
from workers.ports import Completion
from workers.redis.connection import StreamConnection
from workers.redis.errors import stream_errors
from workers.redis.scripts import Script


class RedisResultSink:
    """A `ResultSink` on Redis streams.

    One script call completes a whole batch. It writes only for entries that are still pending for this consumer, so a
    call whose reply was lost can be repeated: what it completed is no longer pending and is not written twice.

    Args:
        client: A client of the server that has all three streams.
        keys: Names of the streams and of the group.
        consumer: The name under which the entries were read.
    """

    def __init__(self, client: StreamConnection, keys: StreamKeys, consumer: str) -> None:
        self._client = client
        self._keys = keys
        self._consumer = consumer
        self._script = Script(client, "_owned_by.lua", "publish_outcomes.lua")

    async def publish(self, completions: Sequence[Completion]) -> list[bool]:
        """Write each outcome and take its entry off the images stream, in one atomic step per entry.

        Returns:
            For each completion, whether the entry was still this consumer's. Where not, nothing was written: another
            worker owns the entry, or an earlier call whose reply was lost completed it.

        Raises:
            StreamUnavailableError: The server does not answer. Each entry is either completed or still pending.
            ConfigError: The server refuses the user.
        """
        if not completions:
            return []
        targets: list[str] = []
        values: list[str | bytes | int] = [self._keys.group, self._consumer, self._keys.outcomes_since]
        for completion in completions:
            if isinstance(completion.outcome, DetectionResult):
                targets.append(self._keys.results)
                fields = result_fields(completion.outcome)
            else:
                targets.append(self._keys.dead)
                fields = dead_letter_fields(completion.outcome)
            values += (completion.entry_id, self._seen(completion), 2 * len(fields))
            for name, value in fields.items():
                values += (name, value)
        with stream_errors(self._client):
            reply: list[int] = await self._script(keys=[self._keys.images, *targets], args=values)
        return [bool(written) for written in reply]

    def _seen(self, completion: Completion) -> str:
        """Return the name of the key that may remember the producer's id; empty where there is no such id."""
        match completion.outcome:
            case DetectionResult(id=message_id):
                named = message_id if message_id != completion.entry_id else ""
            case DeadLetter(fields=fields):
                named = fields.get(b"id", b"").decode(errors="ignore")
        return self._keys.seen(named) if named else ""
