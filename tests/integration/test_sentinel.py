"""Sentinels and a primary that is lost, on real servers: what a push has confirmed ends once, with no restart."""

import asyncio
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from helpers.fakes import FakeDetector, png
from helpers.redis_servers import Replicated, replicated
from helpers.stream_work import ended, push_surely, working
from helpers.waiting import wait_until_async

from schemas.errors import StreamUnavailableError
from schemas.settings import RedisSettings, Settings, WorkerSettings
from workers.consume.sharded import ShardedWorker
from workers.outcomes.results import ResultReader
from workers.produce.producer import Producer
from workers.redis.client import require_server
from workers.redis.connection import StreamConnection, make_client
from workers.redis.errors import stream_errors

pytestmark = pytest.mark.anyio

WORKER = WorkerSettings(claim_idle_ms=1000, sweep_s=0.2)


@pytest.fixture
def plant(tmp_path: Path) -> Iterator[Replicated]:
    with replicated(tmp_path) as servers:
        yield servers


def settings_of(plant: Replicated) -> RedisSettings:
    return RedisSettings(
        sentinels=plant.addresses, sentinel_primary=plant.name, wait_replicas=1, timeout_s=2.0, block_ms=100
    )


async def written(client: StreamConnection) -> bool:
    with stream_errors(client):
        return bool(await client.xadd("probe", {"a": "b"}))


async def test_what_a_push_has_confirmed_ends_once_though_the_primary_is_killed(plant: Replicated) -> None:
    settings = settings_of(plant)
    lost = plant.primary()
    ids = [f"cam1-{number}" for number in range(300)]
    async with AsyncExitStack() as stack:
        client = make_client(settings)
        stack.push_async_callback(client.aclose)
        producer = await stack.enter_async_context(Producer(settings))
        results = await stack.enter_async_context(ResultReader(settings, "quality"))
        worker = ShardedWorker(client, "a", FakeDetector(), Settings(redis=settings, worker=WORKER))
        await stack.enter_async_context(working(worker))
        for number, message_id in enumerate(ids):
            if number == 100:
                await asyncio.to_thread(lost.kill)
            await push_surely(producer, message_id)
        seen: set[str] = set()
        async for key, result in results:
            seen.add(result.id)
            await results.ack(key)
            if len(seen) == len(ids):
                break
        await wait_until_async(
            lambda: asyncio.to_thread(lambda: plant.primary()("XLEN", "flawstream:images") == 0), "no image is left"
        )
    new = plant.primary()
    assert new is not lost
    assert sorted(ended(new, "flawstream:results")) == sorted(ids)
    assert new("XLEN", "flawstream:dead") == 0
    assert worker.stats.errors == 0


async def test_a_primary_that_was_demoted_is_left(plant: Replicated) -> None:
    demoted = plant.primary()
    async with make_client(settings_of(plant)) as client:
        await require_server(client)
        assert await written(client)
        plant.sentinels[0]("SENTINEL", "FAILOVER", plant.name)
        await wait_until_async(
            lambda: asyncio.to_thread(lambda: demoted.says("role:slave", "INFO", "replication")),
            "it is demoted",
        )

        async def written_elsewhere() -> bool:
            try:
                return await written(client) and plant.primary() is not demoted
            except StreamUnavailableError:
                return False

        await wait_until_async(written_elsewhere, "the new primary takes what is written")


async def test_a_primary_that_nobody_knows_is_an_unavailable_server(plant: Replicated) -> None:
    settings = settings_of(plant).model_copy(update={"sentinel_primary": "elsewhere"})
    async with make_client(settings) as client:
        with pytest.raises(StreamUnavailableError, match=r"elsewhere \(found by the Sentinels 127.*No master found"):
            await require_server(client)


async def test_without_its_first_sentinel_the_primary_is_found_by_another(plant: Replicated) -> None:
    await asyncio.to_thread(plant.sentinels[0].kill)
    async with Producer(settings_of(plant)) as producer:
        await producer.push(png(), "bottle", id="cam1-1")
