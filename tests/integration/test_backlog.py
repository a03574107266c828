"""How the streams stand, read from a real server."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from helpers.streams import single_client
from redis.asyncio import Redis

from schemas.errors import StreamUnavailableError
from schemas.keys import all_keys
from schemas.settings import RedisSettings
from workers.observe.backlog import Backlog
from workers.redis.connection import make_client

pytestmark = pytest.mark.anyio

GROUP = "workers"


@pytest.fixture
async def client(redis_settings: RedisSettings) -> AsyncIterator[Redis]:
    async with single_client(redis_settings) as client:
        yield client


def backlog_of(client: Redis, *, shards: int = 0) -> Backlog:
    return Backlog(client, all_keys(RedisSettings(shards=shards)), max_age_s=0)


async def test_empty_server_has_nothing_waiting(client: Redis) -> None:
    state = await backlog_of(client).read()
    assert (state.images, state.pending, state.lag, state.results, state.dead) == (0, 0, 0, 0, 0)
    assert state.oldest_s is None
    assert state.counters == {}


async def test_image_that_no_worker_was_given_waits(client: Redis) -> None:
    (keys,) = all_keys(RedisSettings())
    seconds, _ = await client.time()
    await client.xadd(keys.images, {"image": b"x"}, id=f"{(seconds - 100) * 1000}-0")
    await client.xadd(keys.images, {"image": b"x"})
    state = await backlog_of(client).read()
    assert (state.images, state.pending, state.lag) == (2, 0, 2)
    assert state.oldest_s is not None
    assert 100 <= state.oldest_s < 200


async def test_image_in_hand_is_pending_and_counts_as_waiting(client: Redis) -> None:
    (keys,) = all_keys(RedisSettings())
    await client.xgroup_create(keys.images, GROUP, id="0", mkstream=True)
    seconds, _ = await client.time()
    await client.xadd(keys.images, {"image": b"x"}, id=f"{(seconds - 100) * 1000}-0")
    await client.xadd(keys.images, {"image": b"x"})
    await client.xreadgroup(GROUP, "a", {keys.images: ">"}, count=1)
    state = await backlog_of(client).read()
    assert (state.images, state.pending, state.lag) == (2, 1, 1)
    assert state.oldest_s is not None
    assert 100 <= state.oldest_s < 200


async def test_image_that_was_acknowledged_and_has_no_outcome_is_an_orphan(client: Redis) -> None:
    (keys,) = all_keys(RedisSettings())
    await client.xgroup_create(keys.images, GROUP, id="0", mkstream=True)
    ids = [await client.xadd(keys.images, {"image": b"x"}) for _ in range(3)]
    await client.xreadgroup(GROUP, "a", {keys.images: ">"}, count=2)
    assert (await backlog_of(client).read()).orphans == 0
    await client.xack(keys.images, GROUP, ids[0])
    assert (await backlog_of(client).read()).orphans == 1


async def test_lag_is_unknown_where_the_server_cannot_tell_and_the_number_of_images_is_known_all_the_same(
    client: Redis,
) -> None:
    (keys,) = all_keys(RedisSettings())
    await client.xgroup_create(keys.images, GROUP, id="0", mkstream=True)
    ids = [await client.xadd(keys.images, {"image": b"x"}) for _ in range(3)]
    await client.xreadgroup(GROUP, "a", {keys.images: ">"}, count=1)
    await client.xdel(keys.images, ids[1])
    state = await backlog_of(client).read()
    assert state.lag is None
    assert state.images == 2


async def test_shards_count_together(client: Redis) -> None:
    for number, keys in enumerate(all_keys(RedisSettings(shards=3))):
        for _ in range(number):
            await client.xadd(keys.images, {"image": b"x"})
            await client.xadd(keys.results, {"id": b"x"})
        await client.xadd(keys.dead, {"id": b"x"})
        await client.hincrby(keys.counters, "refused_images", 10)
    await client.hincrby(keys.counters, "duplicates", 2)
    state = await backlog_of(client, shards=3).read()
    assert (state.images, state.lag, state.results, state.dead) == (3, 3, 3, 3)
    assert state.counters == {"refused_images": 30, "duplicates": 2}


async def test_many_who_ask_at_once_make_one_read_and_so_do_those_who_ask_again_at_once(client: Redis) -> None:
    backlog = Backlog(client, all_keys(RedisSettings()), max_age_s=3600)
    states = await asyncio.gather(*(backlog.read() for _ in range(50)))
    await client.xadd("flawstream:images", {"image": b"x"})
    states.append(await backlog.read())
    assert len({id(state) for state in states}) == 1


async def test_one_who_gives_up_does_not_take_the_others_along(client: Redis) -> None:
    backlog = backlog_of(client)
    first = asyncio.create_task(backlog.read())
    second = asyncio.create_task(backlog.read())
    await asyncio.sleep(0)
    first.cancel()
    assert (await second).images == 0


async def test_server_that_is_away_is_named_and_asked_once_for_all() -> None:
    async with make_client(RedisSettings(url="redis://127.0.0.1:1/0")) as nowhere:
        backlog = Backlog(nowhere, all_keys(RedisSettings()), max_age_s=3600)
        for _ in range(2):
            with pytest.raises(StreamUnavailableError, match=r"127\.0\.0\.1:1"):
                await backlog.read()
