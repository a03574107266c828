"""What every `StreamReader` does, by the fake and on a real Valkey."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any, Protocol

import pytest
from helpers.fakes import FakeReader, FakeStream, image_entry, make_result, png
from helpers.streams import add, deliver_in_the_future, single_client
from redis.asyncio import Redis

from schemas.keys import StreamKeys
from schemas.settings import RedisSettings
from workers.consume import reader as reader_module
from workers.consume.reader import RedisStreamReader
from workers.consume.sink import RedisResultSink
from workers.ports import Completion, Entry, StreamReader
from workers.redis.scripts import Script

pytestmark = pytest.mark.anyio

PLENTY_BYTES = 1 << 30

_ALWAYS_IDLE_MS = 0
_NEVER_IDLE_MS = 3_600_000


class World(Protocol):
    """A stream, and readers of it."""

    async def add(self, count: int) -> list[str]: ...
    def reader(self, consumer: str, *, claim_idle_ms: int = _NEVER_IDLE_MS) -> StreamReader: ...
    async def pass_time(self, duration_ms: int) -> None: ...
    async def orphan(self, entry_id: str) -> None: ...


class StreamReaderContract:
    """The law."""

    async def test_new_entries_are_given_in_order_and_no_more_than_asked_for(self, world: World) -> None:
        ids = await world.add(3)
        reader = world.reader("a")
        assert [entry.entry_id for entry in await reader.read(2, PLENTY_BYTES)] == ids[:2]
        assert [entry.entry_id for entry in await reader.read(2, PLENTY_BYTES)] == ids[2:]

    async def test_fields_come_as_they_were_written(self, world: World) -> None:
        await world.add(1)
        (entry,) = await world.reader("a").read(1, PLENTY_BYTES)
        assert entry.fields == {b"category": b"bottle", b"image": png()}
        assert entry.deliveries == 1

    async def test_an_entry_is_given_to_one_consumer(self, world: World) -> None:
        await world.add(1)
        assert len(await world.reader("a").read(8, PLENTY_BYTES)) == 1
        assert await world.reader("b").read(8, PLENTY_BYTES) == []

    async def test_nothing_to_read_is_an_empty_list(self, world: World) -> None:
        assert await world.reader("a").read(8, PLENTY_BYTES) == []

    async def test_a_consumer_that_starts_again_is_given_its_own_entries_one_at_a_time(self, world: World) -> None:
        ids = await world.add(2)
        await world.reader("a").read(8, PLENTY_BYTES)
        fresh = await world.add(1)
        again = world.reader("a")
        first, second, third = [await again.read(8, PLENTY_BYTES) for _ in range(3)]
        assert [entry.entry_id for entry in first + second] == ids
        assert [entry.deliveries for entry in first + second] == [2, 2]
        assert [(entry.entry_id, entry.deliveries) for entry in third] == [(fresh[0], 1)]

    async def test_own_entries_are_given_again_only_after_a_start(self, world: World) -> None:
        await world.add(2)
        reader = world.reader("a")
        assert len(await reader.read(8, PLENTY_BYTES)) == 2
        assert await reader.read(8, PLENTY_BYTES) == []

    async def test_entries_left_alone_are_claimed_and_counted(self, world: World) -> None:
        ids = await world.add(2)
        await world.reader("a").read(8, PLENTY_BYTES)
        reader = world.reader("b", claim_idle_ms=_ALWAYS_IDLE_MS)
        claimed = await reader.claim(8)
        assert [entry.entry_id for entry in claimed] == ids
        assert [entry.deliveries for entry in claimed] == [2, 2]
        assert claimed[0].fields == {b"category": b"bottle", b"image": png()}

    async def test_entries_under_work_elsewhere_are_not_claimed(self, world: World) -> None:
        await world.add(1)
        await world.reader("a").read(8, PLENTY_BYTES)
        assert await world.reader("b").claim(8) == []

    async def test_entries_in_hand_are_neither_claimed_nor_counted(self, world: World) -> None:
        ids = await world.add(2)
        reader = world.reader("a", claim_idle_ms=_ALWAYS_IDLE_MS)
        await reader.read(8, PLENTY_BYTES)
        claimed = await reader.claim(8, {ids[0]})
        assert [entry.entry_id for entry in claimed] == ids[1:]
        (entry,) = await world.reader("a").read(1, PLENTY_BYTES)
        assert (entry.entry_id, entry.deliveries) == (ids[0], 2)

    async def test_all_that_was_left_alone_is_found_claim_by_claim(self, world: World) -> None:
        ids = await world.add(5)
        await world.reader("a").read(8, PLENTY_BYTES)
        reader = world.reader("b", claim_idle_ms=_ALWAYS_IDLE_MS)
        claimed = [entry.entry_id for _ in range(3) for entry in await reader.claim(2)]
        assert claimed == ids

    async def test_a_batch_takes_nothing_more_past_its_bytes(self, world: World) -> None:
        ids = await world.add(3)
        reader = world.reader("a")
        size_bytes = len(b"category" + b"bottle" + b"image" + png())
        assert [entry.entry_id for entry in await reader.read(8, 1)] == ids[:1]
        assert [entry.entry_id for entry in await reader.read(8, size_bytes + 1)] == ids[1:]

    async def test_entries_with_a_heartbeat_are_not_claimed(self, world: World) -> None:
        ids = await world.add(2)
        first = world.reader("a")
        await first.read(8, PLENTY_BYTES)
        await world.pass_time(50)
        await first.heartbeat(ids[:1])
        claimed = await world.reader("b", claim_idle_ms=50).claim(8)
        assert [entry.entry_id for entry in claimed] == ids[1:]

    async def test_heartbeat_counts_no_delivery_and_takes_nothing_from_its_new_owner(self, world: World) -> None:
        ids = await world.add(1)
        first, second = world.reader("a"), world.reader("b", claim_idle_ms=_ALWAYS_IDLE_MS)
        await first.read(8, PLENTY_BYTES)
        await first.heartbeat(ids)
        assert [entry.deliveries for entry in await second.claim(8)] == [2]
        await world.pass_time(50)
        await first.heartbeat(ids)
        (entry,) = await world.reader("c", claim_idle_ms=50).claim(8)
        assert (entry.entry_id, entry.deliveries) == (ids[0], 3)

    async def test_heartbeat_of_what_is_not_pending_does_nothing(self, world: World) -> None:
        await world.reader("a").heartbeat(["1-1"])
        await world.reader("a").heartbeat([])

    async def test_what_is_handed_back_is_claimed_at_once_and_the_delivery_is_not_counted(self, world: World) -> None:
        ids = await world.add(2)
        first, second = world.reader("a", claim_idle_ms=3_600_000), world.reader("b", claim_idle_ms=3_600_000)
        await first.read(8, PLENTY_BYTES)
        await first.release(ids[:1])
        claimed = await second.claim(8)
        assert [(entry.entry_id, entry.deliveries) for entry in claimed] == [(ids[0], 1)]

    async def test_what_is_released_for_later_is_claimed_after_the_idle_time_and_not_counted(
        self, world: World
    ) -> None:
        ids = await world.add(1)
        first, second = (world.reader(name, claim_idle_ms=60_000) for name in "ab")
        await first.read(8, PLENTY_BYTES)
        await world.pass_time(50_000)
        await first.release(ids, at_once=False)
        await world.pass_time(50_000)
        assert await second.claim(8) == []
        await world.pass_time(10_000)
        assert [(entry.entry_id, entry.deliveries) for entry in await second.claim(8)] == [(ids[0], 1)]

    async def test_nobody_hands_back_what_another_has(self, world: World) -> None:
        ids = await world.add(1)
        await world.reader("a").read(8, PLENTY_BYTES)
        await world.reader("b").release(ids)
        assert await world.reader("c").claim(8) == []

    async def test_orphans_are_delivered_again_once_and_nothing_else_is(self, world: World) -> None:
        ids = await world.add(5)
        first, second = world.reader("a"), world.reader("b")
        await first.read(4, PLENTY_BYTES)
        await world.orphan(ids[0])
        await world.orphan(ids[2])
        assert await second.repair_pending() == 2
        assert await second.repair_pending() == 0
        claimed = [entry for _ in range(3) for entry in await second.claim(8)]
        assert [(entry.entry_id, entry.deliveries) for entry in claimed] == [(ids[0], 1), (ids[2], 1)]
        assert [entry.entry_id for entry in await first.read(8, PLENTY_BYTES)] == ids[4:]

    async def test_an_orphan_may_be_completed_by_whoever_repaired_it_only(self, world: World) -> None:
        (entry_id,) = await world.add(1)
        first, second = world.reader("a"), world.reader("b")
        await first.read(1, PLENTY_BYTES)
        await world.orphan(entry_id)
        await second.repair_pending()
        await first.heartbeat([entry_id])  # it is not this one's any more
        assert [entry.entry_id for entry in await world.reader("c").claim(8)] == [entry_id]

    async def test_repairing_nothing_is_nothing(self, world: World) -> None:
        assert await world.reader("a").repair_pending() == 0
        await world.add(3)
        await world.reader("a").read(2, PLENTY_BYTES)
        assert await world.reader("a").repair_pending() == 0

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

    async def pass_time(self, duration_ms: int) -> None:
        self._stream.clock.advance(duration_ms / 1000)

    async def orphan(self, entry_id: str) -> None:
        self._stream.orphan(entry_id)


class RedisWorld:
    def __init__(self, client: Redis, settings: RedisSettings) -> None:
        self.client = client
        self.keys = StreamKeys(prefix=settings.prefix)
        self._settings = settings

    async def add(self, count: int) -> list[str]:
        fields = {b"category": b"bottle", b"image": png()}
        return [await add(self.client, self.keys.images, fields) for _ in range(count)]

    def reader(self, consumer: str, *, claim_idle_ms: int = _NEVER_IDLE_MS) -> StreamReader:
        return RedisStreamReader(self.client, self.keys, consumer, self._settings, claim_idle_ms=claim_idle_ms)

    async def consumers(self) -> set[str]:
        found = await self.client.xinfo_consumers(self.keys.images, self.keys.group)
        return {one["name"].decode() for one in found}

    async def orphan(self, entry_id: str) -> None:
        await self.client.xack(self.keys.images, self.keys.group, entry_id)

    async def pass_time(self, duration_ms: int) -> None:
        """Add to the idle time of the pending entries."""
        pending: Any = await self.client.xpending_range(self.keys.images, self.keys.group, "-", "+", 100)
        for one in pending:
            await self.client.xclaim(
                self.keys.images,
                self.keys.group,
                one["consumer"],
                0,
                [one["message_id"]],
                idle=one["time_since_delivered"] + duration_ms,
                justid=True,
            )


class TestFakeReader(StreamReaderContract):
    @pytest.fixture
    def world(self) -> FakeWorld:
        return FakeWorld()


class TestRedisStreamReader(StreamReaderContract):
    @pytest.fixture
    async def world(self, redis_settings: RedisSettings) -> AsyncIterator[RedisWorld]:
        async with single_client(redis_settings) as client:
            yield RedisWorld(client, redis_settings)

    async def test_own_entries_whose_body_was_deleted_are_acknowledged_away(self, world: RedisWorld) -> None:
        ids = await world.add(3)
        await world.reader("a").read(8, PLENTY_BYTES)
        await world.client.xdel(world.keys.images, ids[0], ids[1])
        again = world.reader("a")
        assert [entry.entry_id for entry in await again.read(8, PLENTY_BYTES)] == [ids[2]]
        pending = await world.client.xpending(world.keys.images, world.keys.group)
        assert pending["pending"] == 1

    async def test_claimed_entries_whose_body_was_deleted_are_acknowledged_away(self, world: RedisWorld) -> None:
        ids = await world.add(3)
        await world.reader("a").read(8, PLENTY_BYTES)
        await world.client.xdel(world.keys.images, ids[0], ids[1])
        claimed = await world.reader("b", claim_idle_ms=_ALWAYS_IDLE_MS).claim(1)
        assert [entry.entry_id for entry in claimed] == [ids[2]]
        pending = await world.client.xpending(world.keys.images, world.keys.group)
        assert pending["pending"] == 1

    async def test_a_stream_that_was_emptied_is_read_again(self, world: RedisWorld) -> None:
        reader = world.reader("a")
        await world.add(1)
        await reader.read(8, PLENTY_BYTES)
        await world.client.flushall()
        assert await reader.claim(8) == []
        ids = await world.add(1)
        assert [entry.entry_id for entry in await reader.read(8, PLENTY_BYTES)] == ids

    async def test_entries_of_a_consumer_that_somebody_removed_are_delivered_again(self, world: RedisWorld) -> None:
        ids = await world.add(3)
        await world.reader("a").read(8, PLENTY_BYTES)
        await world.client.xgroup_delconsumer(world.keys.images, world.keys.group, "a")
        assert await world.reader("b").repair_pending() == 3
        assert [entry.entry_id for entry in await world.reader("b").claim(8)] == ids

    async def test_orphans_are_found_where_the_server_does_not_know_the_lag(self, world: RedisWorld) -> None:
        ids = await world.add(4)
        await world.reader("a").read(2, PLENTY_BYTES)
        await world.client.xdel(world.keys.images, ids[2])
        (group,) = await world.client.xinfo_groups(world.keys.images)
        assert group["lag"] is None
        await world.orphan(ids[0])
        assert await world.reader("b").repair_pending() == 1
        assert [entry.entry_id for entry in await world.reader("b").claim(8)] == ids[:1]

    async def test_any_number_of_orphans_is_found_in_steps(
        self, world: RedisWorld, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for limit in ("_REPAIR_PENDING", "_REPAIR_ORPHANS"):
            monkeypatch.setattr(reader_module, limit, 2)
        monkeypatch.setattr(reader_module, "_REPAIR_BYTES", 100)
        ids = await world.add(12)
        await world.reader("a").read(11, PLENTY_BYTES)
        orphans = [*ids[:4], ids[6], *ids[8:11]]
        for entry_id in orphans:
            await world.orphan(entry_id)
        assert await world.reader("b").repair_pending() == len(orphans)
        assert [entry.entry_id for entry in await world.reader("b").claim(100)] == orphans

    async def test_an_orphan_that_is_completed_meanwhile_has_one_outcome(self, world: RedisWorld) -> None:
        (entry_id,) = await world.add(1)
        await world.reader("a").read(1, PLENTY_BYTES)
        await world.orphan(entry_id)
        completion = Completion(entry_id, make_result(entry_id))
        sinks = [RedisResultSink(world.client, world.keys, name) for name in "ab"]
        assert await sinks[0].publish([completion]) == [False]
        await world.reader("b").repair_pending()
        assert [await sink.publish([completion]) for sink in sinks] == [[False], [True]]
        assert await world.reader("b").repair_pending() == 0
        assert await world.client.xlen(world.keys.images) == 0

    async def test_an_entry_delivered_in_the_future_is_claimed_after_the_idle_time(self, world: RedisWorld) -> None:
        """The server's clock was set back by an hour, and the worker is dead."""
        (entry_id,) = await world.add(1)
        await world.reader("a").read(1, PLENTY_BYTES)
        await deliver_in_the_future(world.client, world.keys.images, entry_id)
        reader = world.reader("b", claim_idle_ms=50)
        await reader.repair_pending()
        await asyncio.sleep(0.06)
        assert [(entry.entry_id, entry.deliveries) for entry in await reader.claim(8)] == [(entry_id, 2)]

    async def test_consumers_are_removed_only_when_long_gone_and_empty(self, world: RedisWorld) -> None:
        await world.add(1)
        await world.reader("busy").read(1, PLENTY_BYTES)
        await world.reader("gone").read(1, PLENTY_BYTES)
        keeper = world.reader("keeper")
        await keeper.read(1, PLENTY_BYTES)
        await keeper.remove_stale_consumers()
        assert await world.consumers() == {"busy", "gone", "keeper"}
        remove_stale = Script(world.client, "remove_stale_consumers.lua")
        await asyncio.sleep(0.002)  # the server counts whole milliseconds
        await remove_stale(keys=[world.keys.images], args=[world.keys.group, "keeper", 0])
        assert await world.consumers() == {"busy", "keeper"}

    async def test_removing_stale_consumers_where_there_is_no_group_does_nothing(self, world: RedisWorld) -> None:
        await world.reader("a").remove_stale_consumers()

    async def test_what_came_before_the_first_worker_is_not_lost(self, world: RedisWorld) -> None:
        ids = await world.add(2)
        assert [entry.entry_id for entry in await world.reader("late").read(8, PLENTY_BYTES)] == ids


def test_the_fake_counts_deliveries_from_what_it_was_given() -> None:
    stream = FakeStream()
    entry = replace(image_entry(1), deliveries=4)
    given: Entry = stream.give(entry, "a")
    assert given.deliveries == 4
