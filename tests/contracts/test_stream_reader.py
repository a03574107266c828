"""What every `StreamReader` does, by the fake and on a real Valkey."""

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Protocol

import pytest
from fakes import FakeReader, FakeStream, image_entry, png
from redis.asyncio import Redis

from schemas.keys import StreamKeys
from schemas.settings import RedisSettings
from workers.connection import make_client
from workers.ports import Entry, StreamReader
from workers.reader import RedisStreamReader

pytestmark = [pytest.mark.contracts, pytest.mark.anyio]

_ALWAYS_IDLE_MS = 0
_NEVER_IDLE_MS = 3_600_000


class World(Protocol):
    """A stream, and readers of it."""

    async def add(self, count: int) -> list[str]: ...
    def reader(self, consumer: str, *, claim_idle_ms: int = _NEVER_IDLE_MS) -> StreamReader: ...


class StreamReaderContract:
    """The law."""

    async def test_new_entries_are_given_in_order_and_no_more_than_asked_for(self, world: World) -> None:
        ids = await world.add(3)
        reader = world.reader("a")
        assert [entry.entry_id for entry in await reader.read(2)] == ids[:2]
        assert [entry.entry_id for entry in await reader.read(2)] == ids[2:]

    async def test_fields_come_as_they_were_written(self, world: World) -> None:
        await world.add(1)
        (entry,) = await world.reader("a").read(1)
        assert entry.fields == {b"category": b"bottle", b"image": png()}
        assert entry.deliveries == 1

    async def test_an_entry_is_given_to_one_consumer(self, world: World) -> None:
        await world.add(1)
        assert len(await world.reader("a").read(8)) == 1
        assert await world.reader("b").read(8) == []

    async def test_nothing_to_read_is_an_empty_list(self, world: World) -> None:
        assert await world.reader("a").read(8) == []

    async def test_a_consumer_that_starts_again_is_given_its_own_entries_one_at_a_time(self, world: World) -> None:
        ids = await world.add(2)
        await world.reader("a").read(8)
        fresh = await world.add(1)
        again = world.reader("a")
        first, second, third = [await again.read(8) for _ in range(3)]
        assert [entry.entry_id for entry in first + second] == ids
        assert [entry.deliveries for entry in first + second] == [2, 2]
        assert [(entry.entry_id, entry.deliveries) for entry in third] == [(fresh[0], 1)]

    async def test_own_entries_are_given_again_only_after_a_start(self, world: World) -> None:
        await world.add(2)
        reader = world.reader("a")
        assert len(await reader.read(8)) == 2
        assert await reader.read(8) == []

    async def test_entries_left_alone_are_claimed_and_counted(self, world: World) -> None:
        ids = await world.add(2)
        await world.reader("a").read(8)
        reader = world.reader("b", claim_idle_ms=_ALWAYS_IDLE_MS)
        claimed = await reader.claim(8)
        assert [entry.entry_id for entry in claimed] == ids
        assert [entry.deliveries for entry in claimed] == [2, 2]
        assert claimed[0].fields == {b"category": b"bottle", b"image": png()}

    async def test_entries_under_work_elsewhere_are_not_claimed(self, world: World) -> None:
        await world.add(1)
        await world.reader("a").read(8)
        assert await world.reader("b").claim(8) == []

    async def test_entries_in_hand_are_neither_claimed_nor_counted(self, world: World) -> None:
        ids = await world.add(2)
        reader = world.reader("a", claim_idle_ms=_ALWAYS_IDLE_MS)
        await reader.read(8)
        claimed = await reader.claim(8, {ids[0]})
        assert [entry.entry_id for entry in claimed] == ids[1:]
        (entry,) = await world.reader("a").read(1)
        assert (entry.entry_id, entry.deliveries) == (ids[0], 2)

    async def test_all_that_was_left_alone_is_found_claim_by_claim(self, world: World) -> None:
        ids = await world.add(5)
        await world.reader("a").read(8)
        reader = world.reader("b", claim_idle_ms=_ALWAYS_IDLE_MS)
        claimed = [entry.entry_id for _ in range(3) for entry in await reader.claim(2)]
        assert claimed == ids

    async def test_claiming_from_nothing_is_an_empty_list(self, world: World) -> None:
        assert await world.reader("a").claim(8) == []


class FakeWorld:
    def __init__(self) -> None:
        self._stream = FakeStream()
        self._added = 0

    async def add(self, count: int) -> list[str]:
        entries = [image_entry(self._added + k) for k in range(count)]
        self._added += count
        self._stream.add(*entries)
        return [entry.entry_id for entry in entries]

    def reader(self, consumer: str, *, claim_idle_ms: int = _NEVER_IDLE_MS) -> StreamReader:
        return FakeReader(self._stream, consumer, claim_idle_ms=claim_idle_ms)


class RedisWorld:
    def __init__(self, client: Redis, settings: RedisSettings) -> None:
        self.client = client
        self.keys = StreamKeys(prefix=settings.prefix)
        self._settings = settings

    async def add(self, count: int) -> list[str]:
        fields = {b"category": b"bottle", b"image": png()}
        return [str((await self.client.xadd(self.keys.images, dict(fields))).decode()) for _ in range(count)]

    def reader(self, consumer: str, *, claim_idle_ms: int = _NEVER_IDLE_MS) -> StreamReader:
        return RedisStreamReader(self.client, self.keys, consumer, self._settings, claim_idle_ms=claim_idle_ms)


class TestFakeReader(StreamReaderContract):
    @pytest.fixture
    def world(self) -> FakeWorld:
        return FakeWorld()


class TestRedisStreamReader(StreamReaderContract):
    @pytest.fixture
    async def world(self, redis_settings: RedisSettings) -> AsyncIterator[RedisWorld]:
        client = make_client(redis_settings)
        yield RedisWorld(client, redis_settings)
        await client.aclose()

    async def test_own_entries_whose_body_was_deleted_are_acknowledged_away(self, world: RedisWorld) -> None:
        ids = await world.add(3)
        await world.reader("a").read(8)
        await world.client.xdel(world.keys.images, ids[0], ids[1])
        again = world.reader("a")
        assert [entry.entry_id for entry in await again.read(8)] == [ids[2]]
        pending = await world.client.xpending(world.keys.images, world.keys.group)
        assert pending["pending"] == 1

    async def test_claimed_entries_whose_body_was_deleted_are_acknowledged_away(self, world: RedisWorld) -> None:
        ids = await world.add(3)
        await world.reader("a").read(8)
        await world.client.xdel(world.keys.images, ids[0], ids[1])
        claimed = await world.reader("b", claim_idle_ms=_ALWAYS_IDLE_MS).claim(1)
        assert [entry.entry_id for entry in claimed] == [ids[2]]
        pending = await world.client.xpending(world.keys.images, world.keys.group)
        assert pending["pending"] == 1

    async def test_a_stream_that_was_emptied_is_read_again(self, world: RedisWorld) -> None:
        reader = world.reader("a")
        await world.add(1)
        await reader.read(8)
        await world.client.flushall()
        assert await reader.claim(8) == []
        ids = await world.add(1)
        assert [entry.entry_id for entry in await reader.read(8)] == ids

    async def test_what_came_before_the_first_worker_is_not_lost(self, world: RedisWorld) -> None:
        ids = await world.add(2)
        assert [entry.entry_id for entry in await world.reader("late").read(8)] == ids


def test_the_fake_counts_deliveries_from_what_it_was_given() -> None:
    stream = FakeStream()
    entry = replace(image_entry(1), deliveries=4)
    given: Entry = stream.give(entry, "a")
    assert given.deliveries == 4
