"""The producer on a real Valkey."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime

import pytest
from fakes import png
from redis.asyncio import Redis

from schemas.errors import BacklogFullError, ConfigError, MessageError, Reason, StreamUnavailableError
from schemas.keys import StreamKeys
from schemas.settings import BacklogSettings, LimitSettings, RedisSettings
from schemas.wire import parse_image
from workers.connection import make_client
from workers.producer import Producer

pytestmark = [pytest.mark.integration, pytest.mark.anyio]

KEYS = StreamKeys()


@pytest.fixture
async def client(redis_settings: RedisSettings) -> AsyncIterator[Redis]:
    client = make_client(redis_settings)
    yield client
    await client.aclose()


async def test_a_pushed_image_reads_back_as_it_was_given(client: Redis, redis_settings: RedisSettings) -> None:
    taken = datetime(2026, 1, 1, 12, tzinfo=UTC)
    async with Producer(redis_settings) as producer:
        entry_id = await producer.push(png(), "bottle", id="cam1-1", captured_at=taken, extra={"shift": b"\xff"})
    ((stored_id, fields),) = await client.xrange(KEYS.images)
    message = parse_image(stored_id.decode(), fields, LimitSettings())
    assert stored_id.decode() == entry_id
    assert (message.id, message.category, message.image) == ("cam1-1", "bottle", png())
    assert (message.captured_at, message.extra) == (taken, {"shift": b"\xff"})


async def test_a_retry_with_the_same_id_writes_once(client: Redis, redis_settings: RedisSettings) -> None:
    async with Producer(redis_settings) as first, Producer(redis_settings) as second:
        entry_id = await first.push(png(), "bottle", id="cam1-1")
        again = await asyncio.gather(*(producer.push(png(), "bottle", id="cam1-1") for producer in (first, second) * 4))
        assert set(again) == {entry_id}
        assert await first.push(png(), "bottle", id="cam1-2") != entry_id
    assert await client.xlen(KEYS.images) == 2


async def test_images_without_an_id_are_all_written(client: Redis, redis_settings: RedisSettings) -> None:
    async with Producer(redis_settings) as producer:
        await producer.push(png(), "bottle")
        await producer.push(png(), "bottle")
    assert await client.xlen(KEYS.images) == 2
    assert await client.keys() == [KEYS.images.encode()]


async def test_what_remembers_an_id_goes_away_by_itself(client: Redis, redis_settings: RedisSettings) -> None:
    async with Producer(redis_settings) as producer:
        await producer.push(png(), "bottle", id="cam1-1")
    assert 0 < await client.ttl("flawstream:seen:cam1-1") <= 600


async def test_a_full_backlog_refuses_and_writes_nothing(client: Redis, redis_settings: RedisSettings) -> None:
    async with Producer(redis_settings, backlog=BacklogSettings(max_images=2)) as producer:
        first = await producer.push(png(), "bottle", id="a")
        await producer.push(png(), "bottle", id="b")
        with pytest.raises(BacklogFullError, match="2 images wait on flawstream:images and 2 are allowed"):
            await producer.push(png(), "bottle", id="c")
        assert await producer.push(png(), "bottle", id="a") == first  # what was accepted stays accepted
        assert await client.xlen(KEYS.images) == 2
        assert await client.exists("flawstream:seen:c") == 0


async def test_a_producer_may_wait_for_room(client: Redis, redis_settings: RedisSettings) -> None:
    async with Producer(redis_settings, backlog=BacklogSettings(max_images=1)) as producer:
        first = await producer.push(png(), "bottle")
        waiting = asyncio.create_task(producer.push(png(), "bottle", wait_s=240))
        while not (await client.info("commandstats"))["cmdstat_evalsha"]["calls"] > 2:
            assert not waiting.done()
        await client.xdel(KEYS.images, first)
        second = await waiting
    assert [entry_id.decode() for entry_id, _ in await client.xrange(KEYS.images)] == [second]


async def test_a_server_without_memory_is_a_full_backlog(client: Redis, redis_settings: RedisSettings) -> None:
    async with Producer(redis_settings) as producer:
        await client.config_set("maxmemory", "1mb")
        with pytest.raises(BacklogFullError, match="out of memory"):
            await producer.push(png(), "bottle", id="a")
    assert await client.xlen(KEYS.images) == 0


@pytest.mark.parametrize(
    ("image", "category", "reason"),
    [
        (b"x" * 2000, "bottle", Reason.TOO_LARGE),
        (b"", "bottle", Reason.MALFORMED),
        (b"x", "../etc", Reason.MALFORMED),
    ],
)
async def test_what_a_worker_would_refuse_is_not_sent(
    client: Redis, redis_settings: RedisSettings, image: bytes, category: str, reason: Reason
) -> None:
    async with Producer(redis_settings, LimitSettings(max_image_bytes=1024)) as producer:
        with pytest.raises(MessageError) as raised:
            await producer.push(image, category)
    assert raised.value.reason is reason
    assert await client.keys() == []


async def test_a_server_that_is_not_there_is_named(redis_settings: RedisSettings) -> None:
    del redis_settings
    producer = Producer(RedisSettings(url="redis://127.0.0.1:1/0"))
    with pytest.raises(StreamUnavailableError, match=r"127\.0\.0\.1:1"):
        await producer.push(png(), "bottle")
    await producer.close()


async def test_a_wrong_password_is_refused_without_being_told(client: Redis, redis_settings: RedisSettings) -> None:
    await client.acl_setuser("camera", enabled=True, passwords=["+right"], categories=["+@all"], keys=["*"])
    settings = RedisSettings(url=redis_settings.url, username="camera", password="wrong-horse")  # type: ignore[arg-type]  # noqa: S106
    with pytest.raises(ConfigError, match="refuses the user or the password") as raised:
        await Producer(settings).__aenter__()
    assert "horse" not in str(raised.value)
