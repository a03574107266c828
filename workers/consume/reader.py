"""Reads and claims entries of the images stream as one named consumer. Knows Redis, and not what is in an entry."""

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
_REPAIR_PENDING = 1000
_REPAIR_ORPHANS = 1000
_REPAIR_BYTES = 8 << 20
"""Most that one script looks at, in some ten milliseconds."""
_STALE_AFTER_MS = 600_000
"""A live consumer calls the server every `block_ms`, whether or not there is something to read."""


class RedisStreamReader:
    """A `StreamReader` on a Redis stream.

    An entry is pending from its delivery until it completes. If the worker dies or a reply is lost in between, it is
    still pending: `read` after a restart, or `claim`, delivers it again.

    Args:
        client: A client of the stream's server; a command that waits takes a connection of its pool for itself.
        keys: Names of the streams and of the group.
        consumer: This worker's name; a worker that restarts under its name resumes its own pending entries at once.
        settings: For `block_ms`.
        claim_idle_ms: Idle time after which an entry may be claimed.
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
        self._heartbeat_script = Script(client, "_owned_by.lua", "heartbeat.lua")
        self._release_script = Script(client, "_owned_by.lua", "release.lua")
        self._repair_script = Script(client, "repair_pending.lua")
        self._remove_stale_script = Script(client, "remove_stale_consumers.lua")
        self._claim_cursor = _OLDEST
        self._own_cursor: str | None = _OLDEST  # None: what was pending at the start has been read

    async def read(self, max_entries: int, max_bytes: int) -> list[Entry]:
        """Read this consumer's own pending entries first, one at a time, then new ones; wait for the first.

        One at a time: where one of them killed the process, the others are not counted as redelivered. After a wait,
        the first new entry is returned at once, in a batch of its own.

        Args:
            max_entries: At most so many.
            max_bytes: No further entry once their fields have so many bytes.

        Raises:
            StreamUnavailableError: The server does not answer.
            ConfigError: The server refuses the user.
        """
        with stream_errors(self._client):
            while self._own_cursor is not None:
                entry = await self._next_own(self._own_cursor)
                if entry is not None:
                    return [entry]
            new = await self._read_at_once(max_entries, max_bytes) or await self._read_group(">", 1, self._block_ms)
        return [Entry(entry_id, fields) for entry_id, fields in new]

    async def claim(self, max_entries: int, in_flight: Collection[str] = ()) -> list[Entry]:
        """Claim entries without a heartbeat for too long, of any consumer, this one included.

        The search goes on where the last call stopped, and starts again at the oldest once it has seen all.

        Args:
            max_entries: At most so many.
            in_flight: Ids of the entries that this worker works on; they are not claimed.

        Raises:
            StreamUnavailableError: The server does not answer.
            ConfigError: The server refuses the user.
        """
        with stream_errors(self._client):
            while True:
                cursor, found = await self._claim_from(self._claim_cursor, max_entries, in_flight)
                self._claim_cursor = cursor
                if found or cursor == _OLDEST:
                    return found

    async def heartbeat(self, in_flight: Collection[str]) -> None:
        """Renew the idle time of entries, so that no other consumer claims them (XCLAIM JUSTID).

        An entry that another consumer owns by now stays with it.

        Raises:
            StreamUnavailableError: The server does not answer.
            ConfigError: The server refuses the user.
        """
        if in_flight:
            with stream_errors(self._client):
                await self._heartbeat_script(
                    keys=[self._keys.images], args=(self._keys.group, self._consumer, *in_flight)
                )

    async def release(self, ids: Collection[str], *, at_once: bool = True) -> None:
        """Release entries: their delivery to this consumer does not count.

        Args:
            ids: Ids of the entries.
            at_once: Whether they may be claimed at once, or only after `claim_idle_ms`.

        Raises:
            StreamUnavailableError: The server does not answer.
            ConfigError: The server refuses the user.
        """
        if ids:
            with stream_errors(self._client):
                idle_ms = self._claim_idle_ms if at_once else 0
                await self._release_script(
                    keys=[self._keys.images], args=(self._keys.group, self._consumer, idle_ms, *ids)
                )

    async def repair_pending(self) -> int:
        """Make entries claimable that no claim finds: orphans, and those whose last delivery lies in the future.

        Returns:
            How many orphans there were.

        Raises:
            StreamUnavailableError: The server does not answer.
            ConfigError: The server refuses the user.
        """
        orphans, start = 0, "-"
        limits = (_REPAIR_PENDING, _REPAIR_ORPHANS, _REPAIR_BYTES)
        with stream_errors(self._client):
            while start:
                found, next_start = await self._repair_script(
                    keys=[self._keys.images],
                    args=(self._keys.group, self._consumer, self._claim_idle_ms, start, *limits),
                )
                orphans += found
                start = next_start.decode()
        return orphans

    async def remove_stale_consumers(self) -> None:
        """Remove consumers that have not called the server for ten minutes and have nothing pending.

        Raises:
            StreamUnavailableError: The server does not answer.
            ConfigError: The server refuses the user.
        """
        with stream_errors(self._client):
            await self._remove_stale_script(
                keys=[self._keys.images], args=(self._keys.group, self._consumer, _STALE_AFTER_MS)
            )

    async def _read_at_once(self, max_entries: int, max_bytes: int) -> list[Row]:
        """Read a batch without waiting."""
        args = (self._keys.group, self._consumer, max_entries, max_bytes)
        read = partial(self._read_script, keys=[self._keys.images], args=args)
        found = await in_group(self._client, self._keys.images, self._keys.group, read)
        return rows((entry_id, _fields(flat)) for entry_id, flat in found)

    async def _next_own(self, cursor: str) -> Entry | None:
        """Read this consumer's next pending entry; None after the last, or where it was deleted: it is acknowledged."""
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

    async def _claim_from(self, cursor: str, max_entries: int, in_flight: Collection[str]) -> tuple[str, list[Entry]]:
        try:
            reply: list[Any] = await self._claim_script(
                keys=[self._keys.images],
                args=(self._keys.group, self._consumer, self._claim_idle_ms, cursor, max_entries, *in_flight),
            )
        except ResponseError as error:
            if is_missing_group(error):  # `read` creates it
                return _OLDEST, []
            raise
        found = [Entry(entry_id.decode(), _fields(flat), deliveries) for entry_id, flat, deliveries in reply[1]]
        return reply[0].decode(), found


def _fields(flat: Sequence[bytes]) -> dict[bytes, bytes]:
    """Return the fields that a script's reply lists as field, value, field, value ..."""
    return dict(zip(flat[::2], flat[1::2], strict=True))
