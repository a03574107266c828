"""Reads, replays and purges the dead letters on the streams. Does not know how one is made."""

import asyncio
import itertools
import logging
import re
from collections import Counter
from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from schemas.errors import ConfigError, MessageError, Reason
from schemas.keys import StreamKeys, all_keys
from schemas.messages import DeadLetter
from schemas.settings import BacklogSettings, RedisSettings
from schemas.wire import parse_dead_letter
from workers.produce.admission import REMEMBER_S, Admission, retry_until_admitted
from workers.redis.connection import StreamConnection
from workers.redis.errors import stream_errors
from workers.redis.groups import rows
from workers.redis.scripts import Script

_log = logging.getLogger(__name__)

_PAGE = 500
_PAGE_BYTES = 8 << 20
"""Most that one script looks at, in some ten milliseconds."""
_TRIM = 1000
_OURS, _ALL = "*", ""
_REASONS = frozenset(Reason)
_DEAD_ID = re.compile(r"(?:(\d{1,4}):)?(\d{1,20})-(\d{1,20})")


@dataclass(frozen=True, slots=True)
class DeadEntry:
    """An entry on a dead-letter stream.

    Attributes:
        dead_id: Its id there, with shards preceded by `<shard>:`. The letter itself has the id that the entry had on
            the images stream.
        letter: The dead letter.
    """

    dead_id: str
    letter: DeadLetter


@dataclass(frozen=True, slots=True)
class _ListedEntry:
    """An entry on a dead-letter stream, without its image; the reason of a foreign entry is empty."""

    keys: StreamKeys
    entry_id: str
    reason: str
    message_id: str

    @property
    def order(self) -> tuple[int, int, int]:
        """Return the sort key by age, over all shards."""
        ms, seq = map(int, self.entry_id.split("-"))
        return ms, seq, self.keys.shard or 0

    @property
    def dead_id(self) -> str:
        """Return its id, unique over all shards."""
        return self.entry_id if self.keys.shard is None else f"{self.keys.shard}:{self.entry_id}"


class DeadLetterBox:
    """Reads, replays and purges the dead letters of all shards.

    Every method may raise StreamUnavailableError where the server does not answer, and ConfigError where it refuses
    the user or an id names a shard that does not exist.

    Args:
        client: A client of the streams' server.
        settings: Names of the streams.
        backlog: The bounds of the backlog, which a replay adds to.
    """

    def __init__(
        self,
        client: StreamConnection,
        settings: RedisSettings,
        backlog: BacklogSettings = BacklogSettings(),  # noqa: B008 - frozen
    ) -> None:
        self._client = client
        self._shards = all_keys(settings)
        self._admission = Admission(client, backlog)
        self._list_script = Script(client, "list_dead_letters.lua")
        self._replay_script = Script(client, "_capacity.lua", "replay_dead_letter.lua")

    async def newest(
        self, limit: int = 20, *, before: str | None = None, reason: Reason | None = None
    ) -> list[DeadEntry]:
        """Read the newest dead letters of all shards, the newest first.

        Foreign entries, which are no dead letters, are left out.

        Args:
            limit: At most so many.
            before: Only those older than the one with this id, for the next page.
            reason: Only those with this reason.
        """
        with stream_errors(self._client):
            found = await asyncio.gather(
                *(self._newest_of(keys, limit, reason or _OURS, self._end(keys, before)) for keys in self._shards)
            )
            newest = sorted(itertools.chain(*found), key=lambda entry: entry.order, reverse=True)[:limit]
            entries = [await self._read(entry.keys, entry.entry_id) for entry in newest]
        return [entry for entry in entries if entry is not None]

    async def get(self, dead_id: str) -> DeadEntry | None:
        """Return one dead letter by its id; None where it does not exist."""
        keys, entry_id = self._locate(dead_id)
        with stream_errors(self._client):
            return await self._read(keys, entry_id)

    async def count(self) -> int:
        """Count the dead letters."""
        with stream_errors(self._client):
            return sum([await self._client.xlen(keys.dead) for keys in self._shards])

    async def reasons(self, limit: int = _PAGE) -> Counter[str]:
        """Count the newest dead letters of each shard, at most so many, by reason; '' counts foreign entries."""
        with stream_errors(self._client):
            found = await asyncio.gather(*(self._newest_of(keys, limit, _ALL) for keys in self._shards))
        return Counter(entry.reason if entry.reason in _REASONS else "" for entry in itertools.chain(*found))

    async def walk(self, reason: Reason | None = None) -> AsyncIterator[list[str]]:
        """Yield the ids of all dead letters that exist now, page by page, the oldest of each shard first.

        Those added meanwhile are left out: a loop that replays letters which fail again would never end.

        Args:
            reason: Only those with this reason.
        """
        for keys in self._shards:
            last = await self._newest_of(keys, 1, _ALL)
            cursor = "-"
            while last and cursor:
                cursor, listed = await self._list_page(keys, "XRANGE", cursor, last[0].entry_id, reason or _OURS)
                if listed:
                    yield [entry.dead_id for entry in listed]

    async def replay(self, dead_id: str, *, wait_s: float = 0.0) -> str | None:
        """Put an image back on the images stream and delete its dead letter, in one atomic step.

        The image has its original fields; one without an `id` gets its original entry's id, by which it was known.

        Args:
            dead_id: The letter's id.
            wait_s: How long to retry while the backlog is full; 0 tries once.

        Returns:
            The id of the image's new entry; None where the letter does not exist: already replayed, or purged.

        Raises:
            BacklogFullError: The backlog is full; the letter stays.
            MessageError: The entry is not a dead letter; it stays.
        """
        keys, entry_id = self._locate(dead_id)
        _, listed = await self._list_page(keys, "XRANGE", entry_id, entry_id, _ALL)
        if not listed:
            return None
        names = [*Admission.keys(keys), keys.dead]
        if listed[0].message_id:
            names.append(keys.seen(listed[0].message_id))

        async def attempt() -> str | None:
            with stream_errors(self._client):
                async with self._admission.memory_errors(keys):
                    args: list[str | float] = [*self._admission.bounds, REMEMBER_S, entry_id]
                    reply = await self._replay_script(keys=names, args=args)
            if reply[1:] == [b"gone"]:
                return None
            if reply[1:] == [b"foreign"]:
                raise MessageError(
                    Reason.MALFORMED, f"entry {dead_id} of {keys.dead} is no dead letter of flawstream; it stays there"
                )
            return self._admission.entry_id(keys, reply)

        return await retry_until_admitted(attempt, wait_s)

    async def purge(self, dead_ids: Collection[str]) -> int:
        """Delete dead letters, with their images.

        Returns:
            How many existed.
        """
        by_shard: dict[StreamKeys, list[str]] = {}
        for dead_id in dead_ids:
            keys, entry_id = self._locate(dead_id)
            by_shard.setdefault(keys, []).append(entry_id)
        with stream_errors(self._client):
            return sum([int(await self._client.xdel(keys.dead, *ids)) for keys, ids in by_shard.items()])

    async def purge_until(self, latest: datetime | None = None) -> AsyncIterator[int]:
        """Delete all entries that exist now, foreign ones too.

        Args:
            latest: Only those that failed before it.

        Yields:
            How many more were deleted.
        """
        for keys in self._shards:
            last = await self._newest_of(keys, 1, _ALL)
            if not last:
                continue
            ms, seq, _ = last[0].order
            bound = (ms, seq + 1) if latest is None else min((ms, seq + 1), (round(latest.timestamp() * 1000), 0))
            while deleted := await self._trim(keys, bound, limit=_TRIM):
                yield deleted
            yield await self._trim(keys, bound)  # those in a node of the stream with others that stay

    async def _trim(self, keys: StreamKeys, bound: tuple[int, int], limit: int | None = None) -> int:
        with stream_errors(self._client):
            minid = f"{bound[0]}-{bound[1]}"
            return int(await self._client.xtrim(keys.dead, minid=minid, approximate=limit is not None, limit=limit))

    async def _newest_of(self, keys: StreamKeys, limit: int, reason: str, start: str = "+") -> list[_ListedEntry]:
        found: list[_ListedEntry] = []
        while start and len(found) < limit:
            start, listed = await self._list_page(keys, "XREVRANGE", start, "-", reason, limit=min(limit, _PAGE))
            found += listed
        return found[:limit]

    async def _list_page(
        self,
        keys: StreamKeys,
        command: Literal["XRANGE", "XREVRANGE"],
        start: str,
        end: str,
        reason: str,
        *,
        limit: int = _PAGE,
    ) -> tuple[str, list[_ListedEntry]]:
        """List one page; returns the start of the next one too, empty after the last."""
        with stream_errors(self._client):
            reply: list[Any] = await self._list_script(
                keys=[keys.dead], args=[command, start, end, limit, _PAGE_BYTES, reason]
            )
        last, *found = reply
        listed = [
            _ListedEntry(keys, entry_id.decode(), found_reason.decode("utf-8", "replace"), _text_or_empty(message_id))
            for entry_id, found_reason, message_id in found
        ]
        return f"({last.decode()}" if last else "", listed

    async def _read(self, keys: StreamKeys, entry_id: str) -> DeadEntry | None:
        reply = await self._client.xrange(keys.dead, min=entry_id, max=entry_id, count=1)
        for found_id, fields in rows(reply):
            try:
                return DeadEntry(_ListedEntry(keys, found_id, "", "").dead_id, parse_dead_letter(fields))
            except MessageError as error:
                _log.warning("entry %s of %s is skipped: %s", found_id, keys.dead, error)
        return None

    def _locate(self, dead_id: str) -> tuple[StreamKeys, str]:
        """Return the shard's keys and the entry id that an id names."""
        named = _DEAD_ID.fullmatch(dead_id)
        sharded = self._shards[0].shard is not None
        if named is None or sharded is (named[1] is None):
            shape = "3:1763900000000-0, with its shard" if sharded else "1763900000000-0"
            raise ConfigError(f"{dead_id!r} is no id of a dead letter; one looks like {shape}")
        shard = int(named[1] or 0)
        if shard >= len(self._shards):
            raise ConfigError(f"{dead_id!r} is of shard {shard} and redis.shards is {len(self._shards)}")
        return self._shards[shard], f"{int(named[2])}-{int(named[3])}"

    def _end(self, keys: StreamKeys, before: str | None) -> str:
        """Return the XREVRANGE bound on a shard for all that is older than an entry, which may be of another shard."""
        if before is None:
            return "+"
        named, entry_id = self._locate(before)
        return entry_id if (keys.shard or 0) < (named.shard or 0) else f"({entry_id}"


def _text_or_empty(message_id: bytes) -> str:
    try:
        return message_id.decode()
    except UnicodeDecodeError:
        return ""  # no producer of ours can have pushed it
