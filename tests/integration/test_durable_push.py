"""A producer that waits until an image is with a replica, or on the server's disk; on real servers."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from helpers.fakes import png
from helpers.redis_servers import Server, cluster, running
from helpers.streams import add, rows, single_client
from redis.asyncio import Redis, RedisCluster

from schemas.errors import BacklogFullError, ConfigError, StreamUnavailableError
from schemas.keys import StreamKeys, all_keys
from schemas.settings import BacklogSettings, RedisSettings
from workers.outcomes.dead_letters import DeadLetterBox
from workers.produce.producer import Producer
from workers.redis.connection import make_client

pytestmark = pytest.mark.anyio

KEYS = StreamKeys()
SOON_S = 1.0
PATIENT_S = 60.0


@pytest.fixture
async def replica(redis_settings: RedisSettings, tmp_path: Path) -> AsyncIterator[Redis]:
    """Give a second server, which copies nobody yet."""
    del redis_settings  # an empty first server
    server = Server(tmp_path, 'save ""')
    with running(server):
        async with single_client(RedisSettings(url=server.url)) as client:
            yield client


def waiting(settings: RedisSettings, timeout_s: float) -> RedisSettings:
    return settings.model_copy(update={"wait_replicas": 1, "timeout_s": timeout_s})


async def test_a_push_that_waits_is_done_when_a_replica_has_the_image(
    redis_settings: RedisSettings, valkey_server: Server, replica: Redis
) -> None:
    await replica.replicaof("127.0.0.1", valkey_server.port)
    async with Producer(waiting(redis_settings, PATIENT_S)) as producer:
        ids = [await producer.push(png(), "bottle", id=f"cam1-{number}") for number in range(5)]
        assert [entry_id for entry_id, _ in await rows(replica, KEYS.images)] == ids


async def test_an_image_that_no_replica_has_is_written_and_said_to_be_unsafe(redis_settings: RedisSettings) -> None:
    async with Producer(waiting(redis_settings, SOON_S)) as producer, make_client(redis_settings) as client:
        with pytest.raises(StreamUnavailableError, match=r"is written.*0 of 1 replicas have it.*with the same id"):
            await producer.push(png(), "bottle", id="cam1-1")
        assert await client.xlen(KEYS.images) == 1


async def test_a_push_made_again_waits_for_the_image_of_the_first(
    redis_settings: RedisSettings, valkey_server: Server, replica: Redis
) -> None:
    async with Producer(waiting(redis_settings, SOON_S)) as hasty:
        with pytest.raises(StreamUnavailableError):
            await hasty.push(png(), "bottle", id="cam1-1")
        with pytest.raises(StreamUnavailableError):  # recognised, and as unsafe as before
            await hasty.push(png(), "bottle", id="cam1-1")
    await replica.replicaof("127.0.0.1", valkey_server.port)
    async with Producer(waiting(redis_settings, PATIENT_S)) as patient:
        entry_id = await patient.push(png(), "bottle", id="cam1-1")
    assert [one for one, _ in await rows(replica, KEYS.images)] == [entry_id]


async def test_a_refused_push_waits_for_nobody(redis_settings: RedisSettings) -> None:
    settings = waiting(redis_settings, PATIENT_S)  # for which there is no replica
    async with Producer(redis_settings) as first:
        await first.push(png(), "bottle")
    async with Producer(settings, backlog=BacklogSettings(max_images=1)) as producer:
        with pytest.raises(BacklogFullError, match="1 images wait"):
            await producer.push(png(), "bottle", id="cam1-1")


async def test_a_push_that_waits_for_the_disk_is_done_on_a_server_that_keeps_an_aof(tmp_path: Path) -> None:
    server = Server(tmp_path, "appendonly yes", "appendfsync always")
    with running(server):
        settings = RedisSettings(url=server.url, wait_local_fsync=True, timeout_s=PATIENT_S)
        async with Producer(settings) as producer, make_client(settings) as client:
            entry_id = await producer.push(png(), "bottle", id="cam1-1")
            log = b"".join(file.read_bytes() for file in (tmp_path / "appendonlydir").glob("*.incr.aof"))
            assert entry_id.encode() in log
            await client.config_set("appendonly", "no")
            with pytest.raises(ConfigError, match=r"redis\.wait_local_fsync"):
                await producer.push(png(), "bottle", id="cam1-2")


async def test_a_server_that_keeps_no_aof_is_refused_at_the_start(redis_settings: RedisSettings) -> None:
    settings = redis_settings.model_copy(update={"wait_local_fsync": True})
    with pytest.raises(ConfigError, match="appendonly yes"):
        await Producer(settings).__aenter__()


def move_slot(client: RedisCluster, nodes: list[Server], keys: StreamKeys) -> Server:
    """Give a shard without entries to another node, behind the back of all clients."""
    known = client.get_node_from_key(keys.images)
    assert known is not None
    new_owner = next(node for node in nodes if node.port != known.port)
    name = new_owner("CLUSTER", "MYID")
    assert isinstance(name, bytes)
    for node in (new_owner, *nodes):
        node("CLUSTER", "SETSLOT", client.keyslot(keys.images), "NODE", name)
    return new_owner


async def test_a_push_to_a_cluster_waits_on_the_node_that_has_the_shard_also_when_that_has_moved(
    tmp_path: Path,
) -> None:
    with cluster(tmp_path) as nodes:
        settings = RedisSettings(url=nodes[0].url, cluster=True, shards=4, wait_local_fsync=True, timeout_s=PATIENT_S)
        async with Producer(settings) as producer, make_client(settings) as client:
            assert isinstance(client, RedisCluster)
            ids = {name: await producer.push(png(), "bottle", id=name) for name in map(str, range(16))}
            assert {name: await producer.push(png(), "bottle", id=name) for name in ids} == ids
            assert sum([await client.xlen(keys.images) for keys in all_keys(settings)]) == 16
            for keys in all_keys(settings):
                await client.delete(keys.images, keys.counters, *map(keys.seen, ids))
                new_owner = move_slot(client, nodes, keys)
                pushed = [await producer.push(png(), "bottle") for _ in range(4)]  # one to each shard
                assert any(entry_id in str(new_owner("XRANGE", keys.images, "-", "+")) for entry_id in pushed)


async def test_a_producer_finds_the_node_that_took_over_from_one_that_died(tmp_path: Path) -> None:
    with cluster(tmp_path) as nodes:
        for node in nodes:
            node("CONFIG", "SET", "cluster-require-full-coverage", "no")
        settings = RedisSettings(url=nodes[0].url, cluster=True, shards=1, wait_local_fsync=True, timeout_s=PATIENT_S)
        async with Producer(settings) as producer, make_client(settings) as client:
            assert isinstance(client, RedisCluster)
            (keys,) = all_keys(settings)
            await producer.push(png(), "bottle", id="cam1-1")
            await client.initialize()
            known = client.get_node_from_key(keys.images)
            assert known is not None
            (dead,) = [node for node in nodes if node.port == known.port]
            dead.kill()
            new_owner = move_slot(client, [node for node in nodes if node is not dead], keys)
            with pytest.raises(StreamUnavailableError):
                await producer.push(png(), "bottle", id="cam1-2")
            entry_id = await producer.push(png(), "bottle", id="cam1-2")
            assert entry_id in str(new_owner("XRANGE", keys.images, "-", "+"))


async def test_dead_letters_of_a_cluster_are_replayed_in_their_shards(tmp_path: Path) -> None:
    with cluster(tmp_path) as nodes:
        settings = RedisSettings(url=nodes[0].url, cluster=True, shards=4)
        async with make_client(settings) as client:
            letter = {"id": "cam1-1", "category": "bottle", "image": "x"}
            ours = {"reason": "poison", "detail": "", "deliveries": "1", "entry_id": "1-1"}
            ours["failed_at"] = "2026-01-01T00:00:00+00:00"
            for keys in all_keys(settings):
                await add(client, keys.dead, letter | {f"dead.{name}": value for name, value in ours.items()})
            box = DeadLetterBox(client, settings)
            found = [entry.dead_id for entry in await box.newest()]
            assert sorted(dead_id[:2] for dead_id in found) == ["0:", "1:", "2:", "3:"]
            assert [await box.replay(dead_id) is None for dead_id in found] == [False] * 4
            assert [await client.xlen(keys.images) for keys in all_keys(settings)] == [1] * 4
            assert await box.count() == 0
