"""The dead letters that lie on the streams: looked through, sent again, thrown away. Knows not how one is made."""

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
from workers.produce.admission import REMEMBER_S, Room, when_there_is_room
from workers.redis.connection import StreamConnection
from workers.redis.errors import stream_errors
from workers.redis.groups import rows
from workers.redis.scripts import Script

_log = logging.getLogger(__name__)

_PAGE = 500
_PAGE_BYTES = 8 << 20
"""Most that the server looks at in one go: some ten milliseconds."""
_TRIM = 1000
_OURS, _ALL = "*", ""
_REASONS = frozenset(Reason)
_DEAD_ID = re.compile(r"(?:(\d{1,4}):)?(\d{1,20})-(\d{1,20})")


@dataclass(frozen=True, slots=True)
class DeadEntry:
    """A dead letter where it lies.

    Attributes:
        dead_id: Where: its id on the stream of dead letters, with shards `<shard>:` before it. The letter itself has
            the id that the entry had on the images stream.
        letter: What is there.
    """

    dead_id: str
    letter: DeadLetter


@dataclass(frozen=True, slots=True)
class _Head:
    """What is known of an entry on a stream of dead letters without its image."""

    keys: StreamKeys
    entry_id: str
    reason: str
    message_id: str

    @property
    def place(self) -> tuple[int, int, int]:
        """Sort by age, over all shards."""
        ms, seq = map(int, self.entry_id.split("-"))
        return ms, seq, self.keys.shard or 0

    @property
    def dead_id(self) -> str:
        """Name it over all shards."""
        return self.entry_id if self.keys.shard is None else f"{self.keys.shard}:{self.entry_id}"


class DeadLetterBox:
    """Looks through the dead letters of all shards, sends them again, and throws them away.

    Every method may raise StreamUnavailableError where the server does not answer, and ConfigError where it refuses
    the user or an id is of a shard that there is not.

    Args:
        client: Of the server that has them.
        settings: Names the streams.
        backlog: When there is no room to send one again.
    """

    def __init__(
        self,
        client: StreamConnection,
        settings: RedisSettings,
        backlog: BacklogSettings = BacklogSettings(),  # noqa: B008 - frozen
    ) -> None:
        self._client = client
        self._shards = all_keys(settings)
        self._room = Room(client, backlog)
        self._letters = Script(client, "list_dead_letters.lua")
        self._replay = Script(client, "_capacity.lua", "replay_dead_letter.lua")

    async def newest(
        self, limit: int = 20, *, before: str | None = None, reason: Reason | None = None
    ) -> list[DeadEntry]:
        """Read the newest dead letters of all shards, the newest first.

        Entries of others, which are no dead letters, are left out.

        Args:
            limit: At most so many.
            before: Only what is older than the one with this id, to page on.
            reason: Only those with this reason.
        """
        with stream_errors(self._client):
            found = await asyncio.gather(
                *(self._newest_of(keys, limit, reason or _OURS, self._end(keys, before)) for keys in self._shards)
            )
            newest = sorted(itertools.chain(*found), key=lambda head: head.place, reverse=True)[:limit]
            entries = [await self._read(head.keys, head.entry_id) for head in newest]
        return [entry for entry in entries if entry is not None]

    async def get(self, dead_id: str) -> DeadEntry | None:
        """Read one dead letter by its id; none where there is no such."""
        keys, entry_id = self._locate(dead_id)
        with stream_errors(self._client):
            return await self._read(keys, entry_id)

    async def count(self) -> int:
        """Count the dead letters."""
        with stream_errors(self._client):
            return sum([await self._client.xlen(keys.dead) for keys in self._shards])

    async def reasons(self, limit: int = _PAGE) -> Counter[str]:
        """Count the newest dead letters of each shard, so many at most, by reason; '' are entries of others."""
        with stream_errors(self._client):
            found = await asyncio.gather(*(self._newest_of(keys, limit, _ALL) for keys in self._shards))
        return Counter(head.reason if head.reason in _REASONS else "" for head in itertools.chain(*found))

    async def walk(self, reason: Reason | None = None) -> AsyncIterator[list[str]]:
        """Go through the ids of all dead letters that are there now, page by page, the oldest of each shard first.

        What comes while one walks is left out: a letter that is sent again and fails again would never end it.

        Args:
            reason: Only those with this reason.
        """
        for keys in self._shards:
            last = await self._newest_of(keys, 1, _ALL)
            cursor = "-"
            while last and cursor:
                cursor, heads = await self._look(keys, "XRANGE", cursor, last[0].entry_id, reason or _OURS)
                if heads:
                    yield [head.dead_id for head in heads]

    async def replay(self, dead_id: str, *, wait_s: float = 0.0) -> str | None:
        """Move an image back to the images stream, in one step with taking its dead letter off.

        The image has its original fields; one that had no `id` has its original entry's, by which it was known.

        Args:
            dead_id: The letter's.
            wait_s: How long to wait for room before giving up.

        Returns:
            The id of the image's new entry; none where the letter is not there: already replayed, or purged.

        Raises:
            BacklogFullError: There is no room; the letter stays.
            MessageError: There is something else than a dead letter; it stays.
        """
        keys, entry_id = self._locate(dead_id)
        _, heads = await self._look(keys, "XRANGE", entry_id, entry_id, _ALL)
        if not heads:
            return None
        names = [*Room.keys(keys), keys.dead]
        if heads[0].message_id:
            names.append(keys.seen(heads[0].message_id))

        async def attempt() -> str | None:
            with stream_errors(self._client):
                async with self._room.memory_errors(keys):
                    reply = await self._replay(keys=names, args=[*self._room.bounds, REMEMBER_S, entry_id])
            if reply[1:] == [b"gone"]:
                return None
            if reply[1:] == [b"foreign"]:
                raise MessageError(
                    Reason.MALFORMED, f"entry {dead_id} of {keys.dead} is no dead letter of flawstream; it stays there"
                )
            return self._room.entry_id(keys, reply)

        return await when_there_is_room(attempt, wait_s)

    async def purge(self, dead_ids: Collection[str]) -> int:
        """Throw dead letters away, their images with them.

        Returns:
            How many were there.
        """
        places: dict[StreamKeys, list[str]] = {}
        for dead_id in dead_ids:
            keys, entry_id = self._locate(dead_id)
            places.setdefault(keys, []).append(entry_id)
        with stream_errors(self._client):
            return sum([int(await self._client.xdel(keys.dead, *ids)) for keys, ids in places.items()])

    async def purge_until(self, latest: datetime | None = None) -> AsyncIterator[int]:
        """Throw away all that is there now, or that was there at a time; entries of others go too.

        Args:
            latest: Only what failed before it.

        Yields:
            How many more have gone.
        """
        for keys in self._shards:
            last = await self._newest_of(keys, 1, _ALL)
            if not last:
                continue
            ms, seq, _ = last[0].place
            bound = (ms, seq + 1) if latest is None else min((ms, seq + 1), (round(latest.timestamp() * 1000), 0))
            while gone := await self._trim(keys, bound, limit=_TRIM):
                yield gone
            yield await self._trim(keys, bound)  # what shares a node with something that stays

    async def _trim(self, keys: StreamKeys, bound: tuple[int, int], limit: int | None = None) -> int:
        with stream_errors(self._client):
            minid = f"{bound[0]}-{bound[1]}"
            return int(await self._client.xtrim(keys.dead, minid=minid, approximate=limit is not None, limit=limit))

    async def _newest_of(self, keys: StreamKeys, limit: int, reason: str, start: str = "+") -> list[_Head]:
        found: list[_Head] = []
        while start and len(found) < limit:
            start, heads = await self._look(keys, "XREVRANGE", start, "-", reason, limit=min(limit, _PAGE))
            found += heads
        return found[:limit]

    async def _look(
        self,
        keys: StreamKeys,
        command: Literal["XRANGE", "XREVRANGE"],
        start: str,
        end: str,
        reason: str,
        *,
        limit: int = _PAGE,
    ) -> tuple[str, list[_Head]]:
        """Look at one page; gives from where to go on, which is nowhere at the end."""
        with stream_errors(self._client):
            reply: list[Any] = await self._letters(
                keys=[keys.dead], args=[command, start, end, limit, _PAGE_BYTES, reason]
            )
        last, *found = reply
        heads = [
            _Head(keys, entry_id.decode(), why.decode("utf-8", "replace"), _text_or_none(message_id))
            for entry_id, why, message_id in found
        ]
        return f"({last.decode()}" if last else "", heads

    async def _read(self, keys: StreamKeys, entry_id: str) -> DeadEntry | None:
        reply = await self._client.xrange(keys.dead, min=entry_id, max=entry_id, count=1)
        for found_id, fields in rows(reply):
            try:
                return DeadEntry(_Head(keys, found_id, "", "").dead_id, parse_dead_letter(fields))
            except MessageError as error:
                _log.warning("entry %s of %s is skipped: %s", found_id, keys.dead, error)
        return None

    def _locate(self, dead_id: str) -> tuple[StreamKeys, str]:
        """Find the stream and the entry that an id names."""
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
        """Give from where on a shard holds what is older than an entry, which may be of another shard."""
        if before is None:
            return "+"
        named, entry_id = self._locate(before)
        return entry_id if (keys.shard or 0) < (named.shard or 0) else f"({entry_id}"


def _text_or_none(message_id: bytes) -> str:
    try:
        return message_id.decode()
    except UnicodeDecodeError:
        return ""  # no producer of ours can have pushed it
