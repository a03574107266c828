"""Consumers of results and dead letters on a real Valkey."""

import logging
from collections.abc import AsyncIterator

import pytest
from fakes import ARRIVED, make_result
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from schemas.errors import Reason, StreamUnavailableError
from schemas.keys import StreamKeys
from schemas.messages import DeadLetter
from schemas.settings import RedisSettings
from schemas.wire import dead_letter_fields, result_fields
from workers.connection import make_client
from workers.dead_letters import DeadLetterBox
from workers.results import DeadLetterReader, ResultReader

pytestmark = [pytest.mark.integration, pytest.mark.anyio]

KEYS = StreamKeys()


@pytest.fixture
async def client(redis_settings: RedisSettings) -> AsyncIterator[Redis]:
    client = make_client(redis_settings)
    yield client
    await client.aclose()


async def add_result(client: Redis, name: str) -> str:
    result = make_result(name)
    return str((await client.xadd(KEYS.results, dict(result_fields(result)))).decode())


async def add_dead(client: Redis, name: str) -> str:
    letter = DeadLetter(
        fields={b"id": name.encode(), b"image": b"\xff"},
        reason=Reason.UNDECODABLE,
        detail="no image",
        deliveries=1,
        failed_at=ARRIVED,
        entry_id="1-1",
    )
    return str((await client.xadd(KEYS.dead, dict(dead_letter_fields(letter)))).decode())


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
        foreign = (await client.xadd(KEYS.results, {b"\xff": b"\x00"})).decode()
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


async def test_dead_letters_are_read_as_they_come(client: Redis, redis_settings: RedisSettings) -> None:
    async with DeadLetterReader(redis_settings) as reader:
        entry_id = await add_dead(client, "a")
        async for key, letter in reader:
            assert key == entry_id
            assert letter.reason is Reason.UNDECODABLE
            break


async def test_dead_letters_are_listed_newest_first_and_page_by_page(client: Redis) -> None:
    ids = [await add_dead(client, name) for name in "abcde"]
    await client.xadd(KEYS.dead, {"hello": "world"})
    box = DeadLetterBox(client, KEYS)
    page = await box.newest(3)
    assert [entry.entry_id for entry in page] == [ids[4], ids[3]]  # the third is no dead letter
    assert [entry.entry_id for entry in await box.newest(3, before=ids[3])] == [ids[2], ids[1], ids[0]]
    assert await box.count() == 6


async def test_one_dead_letter_is_shown_by_its_id(client: Redis) -> None:
    entry_id = await add_dead(client, "a")
    box = DeadLetterBox(client, KEYS)
    found = await box.get(entry_id)
    assert found is not None
    assert found.letter.fields[b"image"] == b"\xff"
    assert await box.get("1-1") is None
