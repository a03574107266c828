"""Gives out the entries of the images stream to one named consumer. Knows Redis, and not what is in an entry."""

from collections.abc import Collection
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from schemas.keys import StreamKeys
from schemas.settings import RedisSettings
from workers.connection import Row, is_missing_group, load_script, read_group, stream_errors
from workers.ports import Entry

_OLDEST = "0-0"


class RedisStreamReader:
    """A `StreamReader` on a Redis stream.

    An entry is pending from the moment it is given out until it is ended. Whatever happens in between (a worker that
    dies, a reply that is lost), it is pending still, and `read` after a restart or `claim` gives it out again.

    Args:
        client: A command that waits takes a connection of its pool for itself.
        keys: Names the streams and the group.
        consumer: This worker's name; a worker that restarts under its name goes on with its own entries at once.
        settings: For `block_ms`.
        claim_idle_ms: An entry untouched for so long may be claimed.
    """

    def __init__(
        self, client: Redis, keys: StreamKeys, consumer: str, settings: RedisSettings, *, claim_idle_ms: int
    ) -> None:
        self._client = client
        self._keys = keys
        self._consumer = consumer
        self._block_ms = settings.block_ms
        self._claim_idle_ms = claim_idle_ms
        self._claim_script = client.register_script(load_script("claim.lua"))
        self._claim_cursor = _OLDEST
        self._own_cursor: str | None = _OLDEST  # None: nothing of before the start is left

    async def read(self, max_entries: int) -> list[Entry]:
        """Take what this consumer was given before it started, one at a time, then new entries; wait where none is.

        One at a time: should one of them have killed the process, the others are not counted as given out again.

        Raises:
            StreamUnavailableError: The server does not answer.
            ConfigError: The server refuses the user.
        """
        with stream_errors(self._client):
            while self._own_cursor is not None:
                entry = await self._next_own(self._own_cursor)
                if entry is not None:
                    return [entry]
            fresh = await self._read_group(">", max_entries, self._block_ms)
        return [Entry(entry_id, fields) for entry_id, fields in fresh]

    async def claim(self, max_entries: int, held: Collection[str] = ()) -> list[Entry]:
        """Take over entries that their consumer, be it this one, has not touched for too long.

        The search goes on where the last call stopped, and starts again once it has seen all.

        Args:
            max_entries: At most so many.
            held: Ids that this worker has in hand; they are not given out again.

        Raises:
            StreamUnavailableError: The server does not answer.
            ConfigError: The server refuses the user.
        """
        with stream_errors(self._client):
            while True:
                cursor, found = await self._claim_from(self._claim_cursor, max_entries, held)
                self._claim_cursor = cursor
                if found or cursor == _OLDEST:
                    return found

    async def _next_own(self, cursor: str) -> Entry | None:
        """Take this consumer's next pending entry; where its body was deleted, acknowledge it and give none."""
        own = await self._read_group(cursor, 1, None)
        if not own:
            self._own_cursor = None
            return None
        entry_id, fields = own[0]
        images, group = self._keys.images, self._keys.group
        if not fields:
            await self._client.xack(images, group, entry_id)
            self._own_cursor = entry_id
            return None
        pending: list[Any] = await self._client.xpending_range(images, group, min=entry_id, max=entry_id, count=1)
        self._own_cursor = entry_id
        return Entry(entry_id, fields, pending[0]["times_delivered"] if pending else 1)

    async def _read_group(self, cursor: str, max_entries: int, block_ms: int | None) -> list[Row]:
        return await read_group(
            self._client,
            self._keys.images,
            self._keys.group,
            self._consumer,
            cursor=cursor,
            max_entries=max_entries,
            block_ms=block_ms,
        )

    async def _claim_from(self, cursor: str, max_entries: int, held: Collection[str]) -> tuple[str, list[Entry]]:
        try:
            reply: list[Any] = await self._claim_script(
                keys=[self._keys.images],
                args=[self._keys.group, self._consumer, self._claim_idle_ms, cursor, max_entries, *held],
            )
        except ResponseError as error:
            if is_missing_group(error):  # `read` makes it
                return _OLDEST, []
            raise
        found = [
            Entry(entry_id.decode(), dict(zip(fields[::2], fields[1::2], strict=True)), deliveries)
            for entry_id, fields, deliveries in reply[1]
        ]
        return reply[0].decode(), found
