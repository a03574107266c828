"""Reads what came of images, for consumers written in Python. Any other client needs no more than XREAD."""

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from typing import Any, Generic, TypeVar

from redis.exceptions import ResponseError

from schemas.errors import MessageError, StreamUnavailableError
from schemas.keys import StreamKeys
from schemas.messages import DeadLetter, DetectionResult
from schemas.settings import RedisSettings
from schemas.wire import Fields, parse_dead_letter, parse_result
from workers.backoff import backoff_s
from workers.connection import Row, StreamClient, create_group, read_group, rows, stream_errors

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
_OLDEST = "0-0"
_BATCH = 32


class OutcomeReader(StreamClient, ABC, Generic[_T]):
    """Reads one stream of outcomes, each with its entry's id, for ever.

    Without a group: what comes after an id, or from now on; nothing is remembered at the server. With a group: what
    no other consumer of the group was given, from the stream's start; what is not acknowledged comes again when the
    connection was lost and when a consumer of the same name starts again, so each comes at least once.

    An entry that is no outcome of ours is skipped with a warning in the log.

    Args:
        settings: Where the stream is.
        group: A consumer group's name, made where it is not there; absent: no group.
        consumer: This consumer's name in the group.
        after: Without a group, the id to start behind; `$` means from `open` on.
    """

    def __init__(
        self, settings: RedisSettings, group: str | None = None, *, consumer: str = "consumer", after: str = "$"
    ) -> None:
        super().__init__(settings)
        self._block_ms = settings.block_ms
        self._stream = self._name(StreamKeys(prefix=settings.prefix))
        self._group = group
        self._consumer = consumer
        self._after = after
        self._own_cursor: str | None = _OLDEST  # None: what was given before and not acknowledged has come again

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
        with stream_errors(self._client):
            if self._group is not None:
                await create_group(self._client, self._stream, self._group)
            elif self._after == "$":
                self._after = await self._last_id()

    async def read(self, max_entries: int = _BATCH) -> list[tuple[str, _T]]:
        """Take what is there, waiting a moment where nothing is.

        Raises:
            StreamUnavailableError: The server does not answer.
            ConfigError: The server refuses the user.
        """
        try:
            with stream_errors(self._client):
                found = await (self._read_alone(max_entries) if self._group is None else self._read_group(max_entries))
        except StreamUnavailableError:
            self._own_cursor = _OLDEST  # the reply that was lost may have held entries
            raise
        outcomes: list[tuple[str, _T]] = []
        for entry_id, fields in found:
            try:
                outcomes.append((entry_id, self._parse(fields)))
            except MessageError as error:
                _log.warning("entry %s of %s is skipped: %s", entry_id, self._stream, error)
                await self.ack(entry_id)
        return outcomes

    async def ack(self, *entry_ids: str) -> None:
        """Tell the group that these are done with; without a group there is nothing to tell.

        Raises:
            StreamUnavailableError: The server does not answer.
            ConfigError: The server refuses the user.
        """
        if self._group is not None and entry_ids:
            with stream_errors(self._client):
                await self._client.xack(self._stream, self._group, *entry_ids)

    async def __aiter__(self) -> AsyncIterator[tuple[str, _T]]:
        failures = 0
        while True:
            try:
                outcomes = await self.read()
                failures = 0
            except StreamUnavailableError as error:
                failures += 1
                _log.warning("%s: %s", error.code, error)
                await asyncio.sleep(backoff_s(failures))
                continue
            for outcome in outcomes:
                yield outcome

    async def _read_alone(self, max_entries: int) -> list[Row]:
        if self._after == "$":
            self._after = (
                await self._last_id()
            )  # asked for `$` again and again, the server leaves out what lies between
        reply: Any = await self._client.xread({self._stream: self._after}, count=max_entries, block=self._block_ms)
        found = rows(reply.get(self._stream.encode(), ()))
        if found:
            self._after = found[-1][0]
        return found

    async def _read_group(self, max_entries: int) -> list[Row]:
        while self._own_cursor is not None:
            found = await self._read_as_consumer(self._own_cursor, max_entries, None)
            self._own_cursor = found[-1][0] if found else None
            gone = [entry_id for entry_id, fields in found if not fields]
            if gone:
                await self.ack(*gone)
            left = [row for row in found if row[1]]
            if left:
                return left
        return await self._read_as_consumer(">", max_entries, self._block_ms)

    async def _read_as_consumer(self, cursor: str, max_entries: int, block_ms: int | None) -> list[Row]:
        return await read_group(
            self._client,
            self._stream,
            str(self._group),
            self._consumer,
            cursor=cursor,
            max_entries=max_entries,
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
