"""Gives out the entries of the images stream to one named consumer. Knows Redis, and not what is in an entry."""

from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

from redis.exceptions import ResponseError

from schemas.keys import StreamKeys
from schemas.settings import RedisSettings
from workers.ports import Entry
from workers.redis.connection import StreamConnection
from workers.redis.error_texts import is_missing_group
from workers.redis.errors import stream_errors
from workers.redis.groups import Row, in_group, read_group, rows
from workers.redis.scripts import Script

_OLDEST = "0-0"
_DEAD_AFTER_MS = 600_000
"""A consumer asks every `block_ms`, be there something to read or not."""


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
        self, client: StreamConnection, keys: StreamKeys, consumer: str, settings: RedisSettings, *, claim_idle_ms: int
    ) -> None:
        self._client = client
        self._keys = keys
        self._consumer = consumer
        self._block_ms = settings.block_ms
        self._claim_idle_ms = claim_idle_ms
        self._read_script = Script(client, "read_new.lua")
        self._claim_script = Script(client, "claim.lua")
        self._touch_script = Script(client, "_owned_by.lua", "heartbeat.lua")
        self._release_script = Script(client, "_owned_by.lua", "release.lua")
        self._forget_script = Script(client, "remove_stale_consumers.lua")
        self._claim_cursor = _OLDEST
        self._own_cursor: str | None = _OLDEST  # None: nothing of before the start is left

    async def read(self, max_entries: int, max_bytes: int) -> list[Entry]:
        """Take what this consumer was given before it started, one at a time, then new entries; wait where none is.

        One at a time: should one of them have killed the process, the others are not counted as given out again.
        Where nothing is there, the first entry that comes is given alone.

        Args:
            max_entries: At most so many.
            max_bytes: None past so many bytes of fields, but always one.

        Raises:
            StreamUnavailableError: The server does not answer.
            ConfigError: The server refuses the user.
        """
        with stream_errors(self._client):
            while self._own_cursor is not None:
                entry = await self._next_own(self._own_cursor)
                if entry is not None:
                    return [entry]
            fresh = await self._read_at_once(max_entries, max_bytes) or await self._read_group(">", 1, self._block_ms)
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

    async def heartbeat(self, held: Collection[str]) -> None:
        """Say that entries in hand are still under work, so that no other consumer claims them.

        What another consumer has meanwhile stays with it.

        Raises:
            StreamUnavailableError: The server does not answer.
            ConfigError: The server refuses the user.
        """
        if held:
            with stream_errors(self._client):
                await self._touch_script(keys=[self._keys.images], args=(self._keys.group, self._consumer, *held))

    async def release(self, held: Collection[str], *, at_once: bool = True) -> None:
        """Release entries: delivering them to this consumer does not count.

        Args:
            held: Ids.
            at_once: Whether they may be claimed at once, or only after `claim_idle_ms`.

        Raises:
            StreamUnavailableError: The server does not answer.
            ConfigError: The server refuses the user.
        """
        if held:
            with stream_errors(self._client):
                idle_ms = self._claim_idle_ms if at_once else 0
                await self._release_script(
                    keys=[self._keys.images], args=(self._keys.group, self._consumer, idle_ms, *held)
                )

    async def remove_stale_consumers(self) -> None:
        """Remove consumers that have not asked for ten minutes and have nothing pending.

        Raises:
            StreamUnavailableError: The server does not answer.
            ConfigError: The server refuses the user.
        """
        with stream_errors(self._client):
            await self._forget_script(keys=[self._keys.images], args=(self._keys.group, self._consumer, _DEAD_AFTER_MS))

    async def _read_at_once(self, max_entries: int, max_bytes: int) -> list[Row]:
        """Take a batch of what is there, in one call that ends before the batch grows past its bytes."""
        args = (self._keys.group, self._consumer, max_entries, max_bytes)
        read = partial(self._read_script, keys=[self._keys.images], args=args)
        found = await in_group(self._client, self._keys.images, self._keys.group, read)
        return rows((entry_id, _fields(flat)) for entry_id, flat in found)

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
                args=(self._keys.group, self._consumer, self._claim_idle_ms, cursor, max_entries, *held),
            )
        except ResponseError as error:
            if is_missing_group(error):  # `read` makes it
                return _OLDEST, []
            raise
        found = [Entry(entry_id.decode(), _fields(flat), deliveries) for entry_id, flat, deliveries in reply[1]]
        return reply[0].decode(), found


def _fields(flat: Sequence[bytes]) -> dict[bytes, bytes]:
    """Put together what a script gives as field, value, field, value ..."""
    return dict(zip(flat[::2], flat[1::2], strict=True))
