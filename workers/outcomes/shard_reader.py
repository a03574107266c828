"""Reads the outcomes of one shard into a queue, a batch at a time and only while a call waits for them."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from redis.exceptions import ResponseError

from schemas.errors import MessageError, StreamUnavailableError
from schemas.wire import Fields
from workers.redis.backoff import backoff_s
from workers.redis.connection import StreamConnection
from workers.redis.error_texts import is_missing_key
from workers.redis.errors import stream_errors
from workers.redis.groups import Row, create_group, read_group, rows

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
_OLDEST = "0-0"


@dataclass(slots=True)
class Demand:
    """Shared by the shards of a reader: whether a call waits for outcomes, and how many.

    Attributes:
        waiting: Set while a call waits.
        batch: Most entries of the next read.
    """

    waiting: asyncio.Event = field(default_factory=asyncio.Event)
    batch: int = 1


class ShardReader(Generic[_T]):
    """One task that reads one stream, while there is demand, and not before all of its last batch was taken.

    Args:
        client: A client of the stream's server.
        stream: The stream's name.
        parse: Makes an outcome of an entry's fields, or raises MessageError.
        queue: Takes outcomes with their ids and this reader; None where a read found none, or failed.
        demand: When to read, and how much.
        number: The shard's number, which precedes its outcomes' ids; absent: the streams are not sharded.
        group: A consumer group's name; absent: no group.
        consumer: The consumer's name in the group.
        after: Without a group, the entry id to start after, or `$`.
        block_ms: How long a read waits at the server.

    Attributes:
        error: Why the last read failed, whatever it was; None where it succeeded.
    """

    def __init__(
        self,
        client: StreamConnection,
        stream: str,
        parse: Callable[[Fields], _T],
        queue: "asyncio.Queue[tuple[str, _T, ShardReader[_T]] | None]",
        demand: Demand,
        *,
        number: int | None,
        group: str | None,
        consumer: str,
        after: str,
        block_ms: int,
    ) -> None:
        self.error: Exception | None = None
        self._client = client
        self._stream = stream
        self._parse = parse
        self._queue = queue
        self._demand = demand
        self._group = group
        self._consumer = consumer
        self._after = after
        self._block_ms = block_ms
        self._number = number
        self._task: asyncio.Task[None] | None = None
        self._not_taken = 0
        self._all_taken = asyncio.Event()
        self._retry = asyncio.Event()
        self._failures = 0
        self._own_cursor: str | None = _OLDEST  # None: what was delivered before and not acknowledged has been read

    async def open(self) -> None:
        """Create the group, or find out the newest id."""
        with stream_errors(self._client):
            if self._group is not None:
                await create_group(self._client, self._stream, self._group)
            elif self._after == "$":
                self._after = await self._last_id()

    def start(self) -> None:
        """Start the task, unless it runs."""
        if self._task is None:
            self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """End the task."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def retry(self) -> None:
        """Read at once after a failure, instead of waiting longer each time."""
        self.error = None
        self._failures = 0
        self._retry.set()

    def took_one(self) -> None:
        """Note that an outcome of this shard was taken from the queue."""
        self._not_taken -= 1
        if not self._not_taken:
            self._all_taken.set()

    async def ack(self, entry_ids: Sequence[str]) -> None:
        """Acknowledge entries to the group, where there is one."""
        if self._group is not None:
            with stream_errors(self._client):
                await self._client.xack(self._stream, self._group, *entry_ids)

    async def _run(self) -> None:
        while True:
            await self._demand.waiting.wait()
            try:
                outcomes = await self._read_batch()
            except Exception as error:  # noqa: BLE001 - the reader raises it; a task that ends would leave it waiting
                _raise_if_cancelled()
                await self._report(error)
                continue
            _raise_if_cancelled()
            self.error = None
            self._failures = 0
            if outcomes:
                self._not_taken = len(outcomes)
                self._all_taken.clear()
                for outcome_id, outcome in outcomes:
                    await self._queue.put((outcome_id, outcome, self))
                await self._all_taken.wait()
            else:
                await self._queue.put(None)

    async def _report(self, error: Exception) -> None:
        """Report a failed read, and wait before the next one."""
        self._own_cursor = _OLDEST  # the lost reply may have had entries
        self._failures += 1
        self._retry.clear()
        self.error = error
        if self._number is not None and isinstance(error, StreamUnavailableError):
            _log.warning("%s: %s: %s", error.code, self._stream, error)
        await self._queue.put(None)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(backoff_s(self._failures)):
                await self._retry.wait()

    async def _read_batch(self) -> list[tuple[str, _T]]:
        batch = self._demand.batch
        with stream_errors(self._client):
            found = await (self._read_without_group(batch) if self._group is None else self._read_group(batch))
        outcomes: list[tuple[str, _T]] = []
        foreign: list[str] = []
        for entry_id, fields in found:
            try:
                outcome = self._parse(fields)
            except MessageError as error:
                _log.warning("entry %s of %s is skipped: %s", entry_id, self._stream, error)
                foreign.append(entry_id)
            else:
                outcomes.append((entry_id if self._number is None else f"{self._number}:{entry_id}", outcome))
        if foreign:
            await self.ack(foreign)
        return outcomes

    async def _read_without_group(self, batch: int) -> list[Row]:
        if self._after == "$":  # XREAD with `$` again and again misses what comes in between
            self._after = await self._last_id()
        reply: Any = await self._client.xread({self._stream: self._after}, count=batch, block=self._block_ms)
        found = rows(reply.get(self._stream.encode(), ()))
        if found:
            self._after = found[-1][0]
        return found

    async def _read_group(self, batch: int) -> list[Row]:
        while self._own_cursor is not None:
            found = await self._read_as_consumer(self._own_cursor, batch, None)
            self._own_cursor = found[-1][0] if found else None
            deleted = [entry_id for entry_id, fields in found if not fields]
            if deleted:
                await self.ack(deleted)
            left = [row for row in found if row[1]]
            if left:
                return left
        return await self._read_as_consumer(">", batch, self._block_ms)

    async def _read_as_consumer(self, cursor: str, batch: int, block_ms: int | None) -> list[Row]:
        return await read_group(
            self._client,
            self._stream,
            str(self._group),
            self._consumer,
            cursor=cursor,
            max_entries=batch,
            block_ms=block_ms,
        )

    async def _last_id(self) -> str:
        try:
            about: Any = await self._client.xinfo_stream(self._stream)
        except ResponseError as error:
            if is_missing_key(error):
                return _OLDEST
            raise
        return str(about["last-generated-id"].decode())


def _raise_if_cancelled() -> None:
    """Raise the cancellation of this task where redis-py has made an error of its own of it, or a reply."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError
