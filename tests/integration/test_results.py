"""Consumers of results and dead letters on a real Valkey."""

import asyncio
import logging
from collections.abc import AsyncIterator

import pytest
from helpers.fakes import ARRIVED, make_result
from helpers.streams import add, single_client
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError

from schemas.errors import ConfigError, Reason, StreamUnavailableError
from schemas.keys import StreamKeys, all_keys
from schemas.messages import DeadLetter, DetectionResult
from schemas.settings import RedisSettings
from schemas.wire import dead_letter_fields, result_fields
from workers.outcomes.results import DeadLetterReader, ResultReader
from workers.redis.connection import StreamConnection

pytestmark = pytest.mark.anyio

KEYS = StreamKeys()


@pytest.fixture
async def client(redis_settings: RedisSettings) -> AsyncIterator[Redis]:
    async with single_client(redis_settings) as client:
        yield client


async def add_result(client: StreamConnection, name: str, keys: StreamKeys = KEYS) -> str:
    result = make_result(name)
    return await add(client, keys.results, result_fields(result))


@pytest.fixture
def sharded(redis_settings: RedisSettings) -> RedisSettings:
    return redis_settings.model_copy(update={"shards": 3})


async def add_dead(client: Redis, name: str) -> str:
    letter = DeadLetter(
        fields={b"id": name.encode(), b"image": b"\xff"},
        reason=Reason.UNDECODABLE,
        detail="no image",
        deliveries=1,
        failed_at=ARRIVED,
        entry_id="1-1",
    )
    return await add(client, KEYS.dead, dead_letter_fields(letter))


async def test_results_come_from_the_moment_of_opening_on(client: Redis, redis_settings: RedisSettings) -> None:
    await add_result(client, "before")
    async with ResultReader(redis_settings) as reader:
        first, second = [await add_result(client, name) for name in "ab"]
        assert [(key, result.id) for key, result in await reader.read()] == [(first, "a"), (second, "b")]
        third = await add_result(client, "c")
        assert [key for key, _ in await reader.read()] == [third]
        assert await reader.read() == []


async def test_results_come_from_a_given_entry_on(client: Redis, redis_settings: RedisSettings) -> None:
    first, second = [await add_result(client, name) for name in "ab"]
    async with ResultReader(redis_settings, after=first) as reader:
        assert [key for key, _ in await reader.read()] == [second]
    async with ResultReader(redis_settings, after="0-0") as reader:
        assert [key for key, _ in await reader.read()] == [first, second]


async def test_a_group_shares_results_from_the_streams_start(client: Redis, redis_settings: RedisSettings) -> None:
    first, second = [await add_result(client, name) for name in "ab"]
    async with (
        ResultReader(redis_settings, "quality", consumer="one") as one,
        ResultReader(redis_settings, "quality", consumer="two") as two,
    ):
        assert [key for key, _ in await one.read(1)] == [first]
        assert [key for key, _ in await two.read(1)] == [second]
        assert await one.read() == []


async def test_what_was_not_acknowledged_comes_again(client: Redis, redis_settings: RedisSettings) -> None:
    first, second, third = [await add_result(client, name) for name in "abc"]
    async with ResultReader(redis_settings, "quality") as reader:
        await reader.read()
        await reader.ack(first)
        await client.xdel(KEYS.results, second)
    async with ResultReader(redis_settings, "quality") as reader:
        assert [key for key, _ in await reader.read()] == [third]
        await reader.ack(third)
    assert (await client.xpending(KEYS.results, "quality"))["pending"] == 0


async def test_results_whose_reply_was_lost_come_again(
    client: Redis, redis_settings: RedisSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry_id = await add_result(client, "a")
    async with ResultReader(redis_settings, "quality") as reader:
        read = reader._client.xreadgroup  # noqa: SLF001 - the moment between the server's reply and its arrival

        async def lose_the_reply(*args: object, **options: object) -> dict[bytes, object]:
            reply: dict[bytes, object] = await read(*args, **options)  # type: ignore[arg-type, assignment]
            if any(reply.values()):
                monkeypatch.undo()
                raise RedisConnectionError("connection reset by peer")
            return reply

        monkeypatch.setattr(reader._client, "xreadgroup", lose_the_reply)  # noqa: SLF001 - the same
        with pytest.raises(StreamUnavailableError):
            await reader.read()
        assert [key for key, _ in await reader.read()] == [entry_id]


@pytest.mark.parametrize("group", [None, "quality"])
async def test_an_entry_of_others_is_skipped_with_a_warning(
    client: Redis, redis_settings: RedisSettings, caplog: pytest.LogCaptureFixture, group: str | None
) -> None:
    async with ResultReader(redis_settings, group) as reader:
        foreign = await add(client, KEYS.results, {b"\xff": b"\x00"})
        ours = await add_result(client, "a")
        with caplog.at_level(logging.WARNING):
            assert [key for key, _ in await reader.read()] == [ours]
        assert foreign in caplog.text
    if group:
        assert (await client.xpending(KEYS.results, group))["pending"] == 1  # ours alone


async def test_a_group_outlives_a_server_that_was_emptied(client: Redis, redis_settings: RedisSettings) -> None:
    async with ResultReader(redis_settings, "quality") as reader:
        await client.flushall()
        entry_id = await add_result(client, "a")
        assert [key for key, _ in await reader.read()] == [entry_id]


@pytest.mark.parametrize("group", [None, "quality"])
async def test_results_of_all_shards_are_read_and_named_by_their_shard(
    client: Redis, sharded: RedisSettings, group: str | None
) -> None:
    async with ResultReader(sharded, group) as reader:
        added = {f"{keys.shard}:{await add_result(client, str(keys.shard), keys)}" for keys in all_keys(sharded)}
        found = [pair for _ in added for pair in await reader.read(1)]
    assert {key for key, _ in found} == added
    assert all(key.startswith(f"{result.id}:") for key, result in found)


async def test_results_are_acknowledged_in_their_own_shard(client: Redis, sharded: RedisSettings) -> None:
    shards = all_keys(sharded)
    for keys in shards:  # the same entry id in each
        await add(client, keys.results, result_fields(make_result("a")), entry_id="1-1")
    async with ResultReader(sharded, "quality") as reader:
        found = [key async for key, _ in first(reader, 3)]
        assert sorted(found) == ["0:1-1", "1:1-1", "2:1-1"]
        await reader.ack("0:1-1", "2:1-1")
        with pytest.raises(ValueError, match="7"):
            await reader.ack("7:1-1")
    assert [(await client.xpending(keys.results, "quality"))["pending"] for keys in shards] == [0, 1, 0]
    async with ResultReader(sharded, "quality") as reader:
        assert [key for key, _ in await reader.read()] == ["1:1-1"]


async def test_a_shard_does_not_wait_for_one_that_is_idle(client: Redis, sharded: RedisSettings) -> None:
    patient = sharded.model_copy(update={"block_ms": 200_000, "timeout_s": 250.0})  # past the test's own end
    async with ResultReader(patient) as reader:
        for name in ("a", "b", "c"):
            await add_result(client, name, all_keys(sharded)[1])
            assert [result.id for _, result in await reader.read()] == [name]


async def test_a_busy_shard_leaves_room_for_the_others(client: Redis, sharded: RedisSettings) -> None:
    busy, _, quiet = all_keys(sharded)
    async with ResultReader(sharded) as reader:
        assert await reader.read() == []  # and every shard has its connection
        for number in range(100):
            await add_result(client, f"busy-{number}", busy)
        await add_result(client, "quiet", quiet)
        names = [result.id async for _, result in first(reader, 101)]
    assert names.index("quiet") < 65  # after two batches of the busy one at most
    assert [name for name in names if name != "quiet"] == [f"busy-{number}" for number in range(100)]


@pytest.mark.parametrize("group", [None, "quality"])
async def test_what_a_cancelled_read_had_taken_is_given_by_the_next(
    client: Redis, sharded: RedisSettings, group: str | None
) -> None:
    async with ResultReader(sharded, group) as reader:
        names = [str(number) for number in range(30)]
        found: list[str] = []
        for number, name in enumerate(names):
            read = asyncio.create_task(reader.read())
            await add_result(client, name, all_keys(sharded)[number % 3])  # comes in about when the read is cut off
            read.cancel()
            try:
                found += [result.id for _, result in await read]
            except asyncio.CancelledError:
                continue
        found += [result.id async for _, result in first(reader, len(names) - len(found))]
    assert sorted(found, key=int) == names


async def test_an_iteration_that_is_broken_off_loses_nothing(client: Redis, redis_settings: RedisSettings) -> None:
    for name in "abc":
        await add_result(client, name)
    async with ResultReader(redis_settings, "quality") as reader:
        assert [result.id async for _, result in first(reader, 1)] == ["a"]
        assert [result.id for _, result in await reader.read()] == ["b", "c"]


@pytest.mark.parametrize("shards", [0, 3])
async def test_a_key_that_is_no_stream_is_an_error_each_time_and_no_endless_wait(
    client: Redis, redis_settings: RedisSettings, shards: int
) -> None:
    settings = redis_settings.model_copy(update={"shards": shards})
    async with ResultReader(settings, after="0-0") as reader:
        await client.set(all_keys(settings)[-1].results, "no stream")
        for _ in range(2):
            with pytest.raises(ResponseError, match="WRONGTYPE"):
                await asyncio.wait_for(reader.read(), 20)


async def test_a_place_to_start_in_one_shard_is_refused(sharded: RedisSettings) -> None:
    with pytest.raises(ConfigError, match="1:5-0"):
        ResultReader(sharded, after="1:5-0")


async def first(reader: ResultReader, count: int) -> AsyncIterator[tuple[str, DetectionResult]]:
    """Take so many."""
    left = count
    if left:
        async for pair in reader:
            yield pair
            left -= 1
            if not left:
                break


async def test_dead_letters_are_read_as_they_come(client: Redis, redis_settings: RedisSettings) -> None:
    async with DeadLetterReader(redis_settings) as reader:
        entry_id = await add_dead(client, "a")
        async for key, letter in reader:
            assert key == entry_id
            assert letter.reason is Reason.UNDECODABLE
            break
