"""A cluster of three servers, sharded streams over all of them, and a server that is lost and comes back."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from helpers.fakes import FakeDetector, png
from helpers.redis_servers import Server, cluster
from helpers.stream_work import ended, push_surely, working
from helpers.waiting import wait_until_async
from redis.asyncio import RedisCluster

from schemas.errors import ConfigError, StreamUnavailableError
from schemas.keys import StreamKeys, all_keys, keys_of
from schemas.settings import RedisSettings, Settings, WorkerSettings
from workers.consume.sharded import ShardedWorker
from workers.outcomes.results import DeadLetterReader, ResultReader
from workers.produce.producer import Producer
from workers.redis.client import require_server
from workers.redis.connection import make_client
from workers.redis.errors import stream_errors
from workers.redis.groups import create_group, read_group

pytestmark = pytest.mark.anyio

SHARDS = 6
WORKER = WorkerSettings(claim_idle_ms=1000, sweep_s=0.2)


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[list[Server]]:
    with cluster(tmp_path) as servers:
        yield servers


@pytest.fixture
def settings(nodes: list[Server]) -> RedisSettings:
    return RedisSettings(url=nodes[1].url, cluster=True, shards=SHARDS, timeout_s=2.0, block_ms=100)


@pytest.fixture
async def client(settings: RedisSettings) -> AsyncIterator[RedisCluster]:
    async with make_client(settings) as client:
        assert isinstance(client, RedisCluster)
        await require_server(client)
        yield client


def owner(client: RedisCluster, nodes: list[Server], keys: StreamKeys) -> Server:
    node = client.get_node_from_key(keys.images)
    assert node is not None
    return next(server for server in nodes if server.port == node.port)


async def test_every_image_ends_once_though_a_server_is_killed_and_comes_back(
    client: RedisCluster, settings: RedisSettings, nodes: list[Server]
) -> None:
    owners = {keys.shard: owner(client, nodes, keys) for keys in all_keys(settings)}
    assert set(owners.values()) == set(nodes), "the shards are on all servers"
    ids = [f"cam1-{number}" for number in range(300)]
    async with AsyncExitStack() as stack:
        producer = await stack.enter_async_context(Producer(settings))
        results = await stack.enter_async_context(ResultReader(settings, "quality"))
        worker = ShardedWorker(client, "a", FakeDetector(), Settings(redis=settings, worker=WORKER))
        await stack.enter_async_context(working(worker))
        back: asyncio.Task[None] | None = None
        for number, message_id in enumerate(ids):
            if number == 100:
                await asyncio.to_thread(nodes[0].kill)
                back = asyncio.create_task(come_back(*nodes))
            await push_surely(producer, message_id)
        assert back is not None
        await back
        seen: set[str] = set()
        async for key, result in results:
            seen.add(result.id)
            await results.ack(key)
            if len(seen) == len(ids):
                break

        async def nothing_is_left() -> bool:
            return sum([await client.xlen(keys.images) for keys in all_keys(settings)]) == 0

        await wait_until_async(nothing_is_left, "no image is left")
    found = {keys.shard: ended(owner(client, nodes, keys), keys.results) for keys in all_keys(settings)}
    assert sorted(one for shard in found.values() for one in shard) == sorted(ids)
    assert all(keys_of(settings, one).shard == shard for shard, shard_ids in found.items() for one in shard_ids)
    assert sum([await client.xlen(keys.dead) for keys in all_keys(settings)]) == 0
    assert worker.stats.errors == 0


async def come_back(server: Server, *others: Server) -> None:
    """Start a server again, once the others have found that it is gone."""

    def missed() -> bool:
        return all(other.says("cluster_state:fail", "CLUSTER", "INFO") for other in others)

    await wait_until_async(lambda: asyncio.to_thread(missed), "the others find that a server is gone")
    await asyncio.to_thread(server.start)


async def test_an_id_pushed_twice_is_on_one_shard_once(client: RedisCluster, settings: RedisSettings) -> None:
    async with Producer(settings) as producer:
        for number in range(12):
            first, second = [await producer.push(png(), "bottle", id=f"cam1-{number}") for _ in range(2)]
            assert first == second
    assert sum([await client.xlen(keys.images) for keys in all_keys(settings)]) == 12


async def test_dead_letters_of_all_shards_are_read(client: RedisCluster, settings: RedisSettings) -> None:
    async with DeadLetterReader(settings, "quality") as letters, AsyncExitStack() as stack:
        worker = ShardedWorker(client, "a", FakeDetector(), Settings(redis=settings, worker=WORKER))
        await stack.enter_async_context(working(worker))
        for keys in all_keys(settings):
            await client.xadd(keys.images, {"category": "bottle", "image": "none"})
        shards = set()
        async for key, _ in letters:
            shards.add(key.split(":")[0])
            await letters.ack(key)
            if len(shards) == SHARDS:
                break
        assert shards == {str(number) for number in range(SHARDS)}


async def test_a_server_that_is_down_keeps_no_stream_of_another_from_being_read(
    client: RedisCluster, settings: RedisSettings, nodes: list[Server]
) -> None:
    for node in nodes:
        node("CONFIG", "SET", "cluster-require-full-coverage", "no")
    gone = client.get_default_node()
    here = next(keys for keys in all_keys(settings) if owner(client, nodes, keys).port != gone.port)
    await create_group(client, here.images, here.group)
    await asyncio.to_thread(next(server for server in nodes if server.port == gone.port).kill)
    for number in range(3):
        await client.xadd(here.images, {"number": number})
        ((_, fields),) = await read_group(
            client, here.images, here.group, "a", cursor=">", max_entries=10, block_ms=1000
        )
        assert fields == {b"number": str(number).encode()}


async def test_a_cluster_that_is_gone_is_an_unavailable_server(
    client: RedisCluster, settings: RedisSettings, nodes: list[Server]
) -> None:
    for node in nodes:
        await asyncio.to_thread(node.kill)
    for _ in range(2):
        with pytest.raises(StreamUnavailableError, match="a cluster"), stream_errors(client):
            await client.xlen("x")
    async with make_client(settings) as another:
        with pytest.raises(StreamUnavailableError, match="a cluster"):
            await require_server(another)


async def test_a_server_that_is_none_of_a_cluster_is_a_matter_of_configuration(valkey_server: Server) -> None:
    async with make_client(RedisSettings(url=valkey_server.url, cluster=True, shards=2)) as client:
        with pytest.raises(ConfigError, match=r"not part of a cluster; leave redis\.cluster out"):
            await require_server(client)
