"""Reads results and dead letters, for consumers written in Python. Any other client needs no more than XREAD."""

import asyncio
import logging
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import AsyncIterator
from typing import Generic, TypeVar

from schemas.errors import ConfigError, StreamUnavailableError
from schemas.keys import StreamKeys, all_keys
from schemas.messages import DeadLetter, DetectionResult
from schemas.settings import RedisSettings
from schemas.wire import Fields, parse_dead_letter, parse_result
from workers.outcomes.shard_reader import Demand, ShardReader
from workers.redis.backoff import backoff_s
from workers.redis.client import StreamClient

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
_BATCH = 32


class OutcomeReader(StreamClient, ABC, Generic[_T]):
    """Reads the outcomes of all shards, each with its id, for ever.

    An outcome's id is its entry's id; with shards it is `<shard>:<entry id>`, as entries of two streams may have the
    same. `ack` takes the ids as they were given. Outcomes of one shard come in order; the shards take turns.

    Without a group: what comes after an id, or from now on; nothing is remembered at the server. With a group: what
    was not delivered to another consumer of the group, from the stream's start. What is not acknowledged is redelivered
    after the connection was lost and when a consumer of the same name restarts: at least once.

    Each shard is read by a task of its own, into one bounded queue, and only while a call waits for outcomes. Nothing
    is lost when a call of `read` is cancelled. While some shards cannot be read, those that can are, and the log has a
    warning. An entry that is no outcome of ours is skipped with a warning in the log.

    Args:
        settings: Where the streams are.
        group: A consumer group's name, created where it is missing; absent: no group.
        consumer: This consumer's name in the group.
        after: Without a group, the entry id to start after, the same for all shards; `$` means from `open` on.

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
        self._queue: asyncio.Queue[tuple[str, _T, ShardReader[_T]] | None] = asyncio.Queue(_BATCH)
        self._demand = Demand()
        self._shards = {
            keys.shard: ShardReader(
                self._client,
                self._name(keys),
                self._parse,
                self._queue,
                self._demand,
                number=keys.shard,
                group=group,
                consumer=consumer,
                after=after,
                block_ms=settings.block_ms,
            )
            for keys in all_keys(settings)
        }

    @staticmethod
    @abstractmethod
    def _name(keys: StreamKeys) -> str:
        """Choose the stream."""

    @staticmethod
    @abstractmethod
    def _parse(fields: Fields) -> _T:
        """Parse an entry's fields, or raise MessageError."""

    async def open(self) -> None:
        """Check that the server answers, and find out from where on to read.

        Raises:
            StreamUnavailableError: The server does not answer.
            ConfigError: It is too old, or refuses the user.
        """
        await super().open()
        for shard in self._shards.values():
            await shard.open()

    async def close(self) -> None:
        """Stop reading and close the connections."""
        for shard in self._shards.values():
            await shard.close()
        await super().close()

    async def read(self, max_entries: int = _BATCH) -> list[tuple[str, _T]]:
        """Return the outcomes that are there, at most so many; wait up to `redis.block_ms` for the first.

        Raises:
            StreamUnavailableError: No shard's server answers.
            ConfigError: A server refuses the user.
        """
        return await self._take(max_entries, max_entries)

    async def ack(self, *outcome_ids: str) -> None:
        """Acknowledge outcomes to the group (XACK); without a group there is nothing to do.

        Raises:
            StreamUnavailableError: The server does not answer.
            ConfigError: The server refuses the user.
            ValueError: An id is of a shard that this reader does not have.
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

    async def _take(self, max_entries: int, batch: int) -> list[tuple[str, _T]]:
        """Take outcomes from the queue; shards with nothing in it read a batch each."""
        shards = self._shards.values()
        all_fail = all(shard.error is not None for shard in shards)
        for shard in shards:
            shard.start()
            if all_fail or _is_final(shard.error):
                shard.retry()  # the caller has chosen when
        taken: list[tuple[str, _T]] = []
        deadline = asyncio.get_running_loop().time() + self._block_s
        self._demand.batch = batch
        self._demand.waiting.set()
        try:
            await asyncio.sleep(0)  # a full queue must not keep the other shards' replies from coming in
            while not taken:
                item = await self._queue.get()
                self._add(taken, item)
                if item is None and asyncio.get_running_loop().time() >= deadline:
                    return []
        finally:
            self._demand.waiting.clear()
        while len(taken) < max_entries and not self._queue.empty():
            self._add(taken, self._queue.get_nowait())
        return taken

    def _add(self, taken: list[tuple[str, _T]], item: tuple[str, _T, ShardReader[_T]] | None) -> None:
        """Add an item of the queue to those taken; None means that a read found no outcome, or failed.

        Raises:
            StreamUnavailableError: No shard can be read, and nothing is taken.
            ConfigError: A server refuses the user, and nothing is taken; any other lasting error likewise.
        """
        if item is not None:
            outcome_id, outcome, shard = item
            shard.took_one()
            taken.append((outcome_id, outcome))
            return
        errors = [shard.error for shard in self._shards.values() if shard.error is not None]
        final = [error for error in errors if _is_final(error)]
        if not taken and (final or len(errors) == len(self._shards)):
            raise (final or errors)[0]


def _is_final(error: Exception | None) -> bool:
    """Return whether the caller must see an error though other shards can be read: it does not pass by itself."""
    return error is not None and not isinstance(error, StreamUnavailableError)


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
