"""Reads what came of images, for consumers written in Python. Any other client needs no more than XREAD."""

import asyncio
import logging
from abc import ABC, abstractmethod
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Generic, TypeVar

from redis.exceptions import ResponseError

from schemas.errors import ConfigError, MessageError, StreamUnavailableError
from schemas.keys import StreamKeys, all_keys
from schemas.messages import DeadLetter, DetectionResult
from schemas.settings import RedisSettings
from schemas.wire import Fields, parse_dead_letter, parse_result
from workers.backoff import backoff_s
from workers.redis.scripts import Row, StreamClient, StreamConnection, create_group, read_group, rows, stream_errors

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
_OLDEST = "0-0"
_BATCH = 32


class OutcomeReader(StreamClient, ABC, Generic[_T]):
    """Reads the streams of outcomes of all shards, each outcome with its id, for ever.

    An outcome's id is its entry's id; with shards it is `<shard>:<entry id>`, as entries of two streams may have the
    same. `ack` takes the ids as they were given. Outcomes of one shard come in order; the shards take turns.

    Without a group: what comes after an id, or from now on; nothing is remembered at the server. With a group: what
    no other consumer of the group was given, from the stream's start; what is not acknowledged comes again when the
    connection was lost and when a consumer of the same name starts again, so each comes at least once.

    One read waits at the server for each shard, on a connection of its own, so none waits for another. What it
    brings is kept until it is handed over, and no more is read of that shard until then; nothing is lost when a call
    of `read` is cancelled. While some shards cannot be read, those that can are, and the log has a warning.

    An entry that is no outcome of ours is skipped with a warning in the log.

    Args:
        settings: Where the streams are.
        group: A consumer group's name, made where it is not there; absent: no group.
        consumer: This consumer's name in the group.
        after: Without a group, the entry id to start behind, the same for all shards; `$` means from `open` on.

    Raises:
        ConfigError: The settings make no client, or `after` has a shard.
    """

    def __init__(
        self, settings: RedisSettings, group: str | None = None, *, consumer: str = "consumer", after: str = "$"
    ) -> None:
        if ":" in after:
            raise ConfigError(f"after={after!r} names a shard; give an entry id alone, it holds for all shards")
        super().__init__(settings)
        self._block_s = settings.block_ms / 1000
        self._group = group
        self._shards = {
            keys.shard: _Shard(
                self._client,
                self._name(keys),
                self._parse,
                number=keys.shard,
                group=group,
                consumer=consumer,
                after=after,
                block_ms=settings.block_ms,
            )
            for keys in all_keys(settings)
        }
        self._turn = deque(self._shards.values())

    @staticmethod
    @abstractmethod
    def _name(keys: StreamKeys) -> str:
        """Choose the stream."""

    @staticmethod
    @abstractmethod
    def _parse(fields: Fields) -> _T:
        """Read an entry's fields, or raise MessageError."""

    async def open(self) -> None:
        """See that the server answers, and settle from where on to read.

        Raises:
            StreamUnavailableError: The server does not answer.
            ConfigError: It is too old, or refuses the user.
        """
        await super().open()
        for shard in self._shards.values():
            await shard.settle_start()

    async def close(self) -> None:
        """Stop reading and close the connections."""
        for shard in self._shards.values():
            await shard.stop()
        await super().close()

    async def read(self, max_entries: int = _BATCH) -> list[tuple[str, _T]]:
        """Take what is there, waiting a moment where nothing is.

        Raises:
            StreamUnavailableError: No shard's server answers.
            ConfigError: A server refuses the user.
        """
        return await self._take(max_entries, max_entries)

    async def ack(self, *outcome_ids: str) -> None:
        """Tell the group that these are done with; without a group there is nothing to tell.

        Raises:
            StreamUnavailableError: The server does not answer.
            ConfigError: The server refuses the user.
            ValueError: An id is none that this reader gives.
        """
        by_shard: defaultdict[int | None, list[str]] = defaultdict(list)
        for outcome_id in outcome_ids:
            shard, colon, entry_id = outcome_id.rpartition(":")
            by_shard[int(shard) if colon else None].append(entry_id)
        if unknown := by_shard.keys() - self._shards.keys():
            raise ValueError(f"{outcome_ids} are of the shards {unknown}, which are not read here")
        for number, entry_ids in by_shard.items():
            await self._shards[number].ack(entry_ids)

    async def __aiter__(self) -> AsyncIterator[tuple[str, _T]]:
        failures = 0
        while True:
            try:
                outcomes = await self._take(1, _BATCH)
                failures = 0
            except StreamUnavailableError as error:
                failures += 1
                _log.warning("%s: %s", error.code, error)
                await asyncio.sleep(backoff_s(failures))
                continue
            for outcome in outcomes:
                yield outcome

    async def _take(self, most: int, batch: int) -> list[tuple[str, _T]]:
        """Hand over at most so many, of what reads of a batch each have brought."""
        deadline = asyncio.get_running_loop().time() + self._block_s
        while True:
            reads = [task for shard in self._turn if (task := shard.reading(batch)) is not None]
            if len(reads) == len(self._turn):  # nothing is here yet
                await asyncio.wait(reads, return_when=asyncio.FIRST_COMPLETED)
            else:
                await asyncio.sleep(0)  # a busy shard must not keep the others' replies from coming in
            for shard in self._turn:
                shard.settle()
            if taken := self._hand_over(most):  # and nothing is awaited from here on: a cancelled call takes nothing
                return taken
            errors = [shard.error for shard in self._turn if shard.error is not None]
            if len(errors) == len(self._turn):
                for shard in self._turn:
                    shard.forgive()  # the caller chooses when to try again
                raise errors[0]
            if asyncio.get_running_loop().time() >= deadline:
                return []

    def _hand_over(self, most: int) -> list[tuple[str, _T]]:
        taken: list[tuple[str, _T]] = []
        empty = 0
        while len(taken) < most and empty < len(self._turn):
            shard = self._turn[0]
            self._turn.rotate(-1)
            if shard.waiting:
                taken.append(shard.waiting.popleft())
                empty = 0
            else:
                empty += 1
        return taken


class _Shard(Generic[_T]):
    """Reads one stream: one read at a time, and the next one once all it has brought is handed over.

    Args:
        client: Of the server that has the stream.
        stream: Its name.
        parse: Makes an outcome of an entry's fields, or raises MessageError.
        number: The shard's, which goes in front of its outcomes' ids; absent: the streams are not sharded.
        group: A consumer group's name; absent: no group.
        consumer: The consumer's name in the group.
        after: Without a group, the entry id to start behind, or `$`.
        block_ms: How long a read waits at the server.

    Attributes:
        waiting: What was read and is not handed over.
        error: Why the last read failed; absent where it did not.
    """

    def __init__(
        self,
        client: StreamConnection,
        stream: str,
        parse: Callable[[Fields], _T],
        *,
        number: int | None,
        group: str | None,
        consumer: str,
        after: str,
        block_ms: int,
    ) -> None:
        self.waiting: deque[tuple[str, _T]] = deque()
        self.error: StreamUnavailableError | None = None
        self._client = client
        self._stream = stream
        self._parse = parse
        self._group = group
        self._consumer = consumer
        self._after = after
        self._block_ms = block_ms
        self._number = number
        self._task: asyncio.Task[None] | None = None
        self._failures = 0
        self._own_cursor: str | None = _OLDEST  # None: what was given before and not acknowledged has come again

    async def settle_start(self) -> None:
        """Make the group, or find out where now is."""
        with stream_errors(self._client):
            if self._group is not None:
                await create_group(self._client, self._stream, self._group)
            elif self._after == "$":
                self._after = await self._last_id()

    def reading(self, batch: int) -> asyncio.Task[None] | None:
        """Give the read that is under way, begun now if there was none; none while something is waiting."""
        if self._task is None and not self.waiting:
            self._task = asyncio.create_task(self._read(batch))
        return self._task

    def settle(self) -> None:
        """See how a read that has ended has ended.

        Raises:
            ConfigError: The server refuses the user.
        """
        if self._task is None or not self._task.done():
            return
        task, self._task = self._task, None
        try:
            task.result()
        except StreamUnavailableError as error:
            self._own_cursor = _OLDEST  # the reply that was lost may have held entries
            self._failures += 1
            self.error = error
            if self._number is not None:
                _log.warning("%s: %s: %s", error.code, self._stream, error)
        else:
            self.forgive()

    def forgive(self) -> None:
        """Read on at once, whatever has failed before."""
        self.error = None
        self._failures = 0

    async def stop(self) -> None:
        """Cut off the read that is under way."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def ack(self, entry_ids: Sequence[str]) -> None:
        """Tell the group that these are done with."""
        if self._group is not None:
            with stream_errors(self._client):
                await self._client.xack(self._stream, self._group, *entry_ids)

    async def _read(self, batch: int) -> None:
        if self._failures:
            await asyncio.sleep(backoff_s(self._failures))
        with stream_errors(self._client):
            found = await (self._read_alone(batch) if self._group is None else self._read_group(batch))
        foreign: list[str] = []
        for entry_id, fields in found:
            try:
                outcome = self._parse(fields)
            except MessageError as error:
                _log.warning("entry %s of %s is skipped: %s", entry_id, self._stream, error)
                foreign.append(entry_id)
            else:
                self.waiting.append((entry_id if self._number is None else f"{self._number}:{entry_id}", outcome))
        if foreign:
            await self.ack(foreign)

    async def _read_alone(self, batch: int) -> list[Row]:
        if self._after == "$":  # asked for `$` again and again, the server leaves out what lies between
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
            gone = [entry_id for entry_id, fields in found if not fields]
            if gone:
                await self.ack(gone)
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
            if "no such key" in str(error):
                return _OLDEST
            raise
        return str(about["last-generated-id"].decode())


class ResultReader(OutcomeReader[DetectionResult]):
    """Reads results: `async for entry_id, result in reader`."""

    @staticmethod
    def _name(keys: StreamKeys) -> str:
        return keys.results

    @staticmethod
    def _parse(fields: Fields) -> DetectionResult:
        return parse_result(fields)


class DeadLetterReader(OutcomeReader[DeadLetter]):
    """Reads dead letters as they come in: `async for entry_id, letter in reader`."""

    @staticmethod
    def _name(keys: StreamKeys) -> str:
        return keys.dead

    @staticmethod
    def _parse(fields: Fields) -> DeadLetter:
        return parse_dead_letter(fields)
