"""Users with the rights of `flawstream acl` on a real server: each does its job to the end."""

import asyncio
import contextlib
import itertools
from hashlib import sha256
from pathlib import Path

import pytest
from helpers.acl_plant import PASSWORD, Plant, expect_refusal, until
from helpers.fakes import FakeDetector, png
from helpers.redis_servers import cluster
from helpers.streams import rows

from schemas.errors import BacklogFullError, StreamUnavailableError
from schemas.keys import all_keys
from schemas.settings import BacklogSettings, RedisSettings, Settings, WorkerSettings
from workers.acl import Role, access_rules, user_line
from workers.consume import reader as reader_module
from workers.consume.sharded import ShardedWorker
from workers.observe.backlog import Backlog
from workers.outcomes.dead_letters import DeadLetterBox
from workers.outcomes.results import DeadLetterReader, ResultReader
from workers.produce.producer import Producer
from workers.redis.connection import make_client

pytestmark = pytest.mark.anyio


async def test_producer_pushes_is_recognised_and_is_refused_where_there_is_no_room(plant: Plant) -> None:
    settings = plant.as_(Role.PRODUCER).model_copy(update={"wait_local_fsync": True})
    async with Producer(settings, backlog=BacklogSettings(max_images=3)) as producer:
        first = await producer.push(png(), "bottle", id="part-1")
        assert await producer.push(png(), "bottle", id="part-1") == first
        for _ in range(3 * len(all_keys(plant.base)) - 1):
            with contextlib.suppress(BacklogFullError):  # the shard that has the first is full before the others
                await producer.push(png(), "bottle")
        with pytest.raises(BacklogFullError):
            await producer.push(png(), "bottle", id="part-2")
    counted = [await plant.admin.hgetall(keys.counters) for keys in all_keys(plant.base)]
    assert sum(int(one.get(b"duplicates", 0)) for one in counted) == 1
    assert sum(int(one.get(b"refused_images", 0)) for one in counted) >= 1


async def test_producer_is_told_that_no_replica_has_it(plant: Plant) -> None:
    settings = plant.as_(Role.PRODUCER).model_copy(update={"wait_replicas": 1, "timeout_s": 3.0})
    async with Producer(settings) as producer:
        with pytest.raises(StreamUnavailableError, match="0 of 1 replicas have it"):
            await producer.push(png(), "bottle")


async def test_producer_measures_a_long_stream_and_is_refused_at_the_server_s_memory_limit(plant: Plant) -> None:
    plant.base = plant.base.model_copy(update={"shards": min(plant.base.shards, 1)})
    async with plant.admin.pipeline(transaction=False) as pipe:
        for _ in range(1100):
            pipe.xadd(plant.keys.images, {"image": b"x"})
        await pipe.execute()
    async with Producer(plant.as_(Role.PRODUCER)) as producer:
        await producer.push(png(), "bottle")
        await plant.admin.config_set("maxmemory", 1)
        with pytest.raises(BacklogFullError, match="out of memory"):
            await producer.push(png(), "bottle")
    assert await plant.admin.hget(plant.keys.counters, "refused_memory") == b"1"


async def test_plain_producer_needs_no_more_than_xadd(plant: Plant) -> None:
    async with plant.client(Role.PRODUCER) as client:
        await client.xadd(plant.keys.images, {"category": b"bottle", "image": png()})
    assert await plant.admin.xlen(plant.keys.images) == 1


@pytest.mark.parametrize("role", [Role.WORKER, Role.SERVICE])
async def test_worker_makes_its_group_ends_images_claims_what_others_left_and_cleans_up(
    plant: Plant, role: Role, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader_module, "_STALE_AFTER_MS", 0)
    keys = plant.keys
    await plant.admin.xgroup_create(keys.results, "line", id="0", mkstream=True)
    for number in range(300):
        await plant.admin.xadd(keys.results, {"id": f"old-{number}"})
    await plant.admin.xreadgroup("line", "one", {keys.results: ">"})
    await plant.admin.xack(keys.results, "line", *[entry_id for entry_id, _ in await rows(plant.admin, keys.results)])
    await plant.admin.xgroup_create(keys.images, keys.group, id="0", mkstream=True)
    left_behind = await plant.add_image()
    await plant.admin.xreadgroup(keys.group, "gone", {keys.images: ">"})
    mine = await plant.add_image()
    await plant.admin.xreadgroup(keys.group, "w", {keys.images: ">"})
    good, bad = await plant.add_image(message_id="good"), await plant.add_image(b"no image", message_id="bad")
    backlog, loop = BacklogSettings(keep_results=1), WorkerSettings(claim_idle_ms=100, sweep_s=0.05)
    async with plant.worker(role, backlog=backlog, worker=loop) as worker:
        await until(plant.is_clean, worker)
    async with plant.client(role) as client:
        state = await Backlog(client, all_keys(plant.base)).read()
    assert (worker.stats.results, sum(worker.stats.dead.values())) == (3, 1)
    assert {left_behind, mine, good, bad}
    assert (state.images, state.dead) == (0, 1)
    assert state.results < 303


async def test_worker_makes_the_group_on_an_empty_server(plant: Plant) -> None:
    async with plant.worker() as worker:
        await until(lambda: plant.admin.exists(plant.keys.images), worker)


async def test_worker_and_service_fetch_images_by_reference_and_no_other_keys(plant: Plant) -> None:
    await plant.admin.set("frames:1", b"bytes")
    await plant.admin.set("other", b"bytes")
    for role in (Role.WORKER, Role.SERVICE):
        async with plant.client(role) as client:
            assert await client.strlen("frames:1") == 5
            assert await client.get("frames:1") == b"bytes"
            for command in (("GET", "other"), ("SET", "frames:1", "x"), ("DEL", "frames:1")):
                await expect_refusal(client, *command)


async def test_reader_makes_its_group_reads_and_acknowledges(plant: Plant) -> None:
    await plant.add_image()
    async with plant.worker() as worker:
        await until(lambda: plant.admin.exists(plant.keys.results), worker)
    settings = plant.as_(Role.READER)
    async with ResultReader(settings, "line") as results:
        async for entry_id, result in results:
            assert result.category == "bottle"
            await results.ack(entry_id)
            break
    assert (await plant.admin.xpending(plant.keys.results, "line"))["pending"] == 0
    async with ResultReader(settings) as alone:
        assert await alone.read() == []


async def test_plain_reader_takes_over_what_another_of_its_group_left_and_looks_around(plant: Plant) -> None:
    results = plant.keys.results
    await plant.admin.xadd(results, {"id": "x"})
    async with plant.client(Role.READER) as client:
        await client.xgroup_create(results, "line", id="0")
        await client.xreadgroup("line", "gone", {results: ">"})
        assert (await client.xpending(results, "line"))["pending"] == 1
        claimed = await client.xautoclaim(results, "line", "one", min_idle_time=0)
        assert [fields for _, fields in claimed[1]] == [{b"id": b"x"}]
        assert await client.xlen(results) == len(await rows(client, results)) == 1


async def test_operator_looks_through_dead_letters_sends_them_again_and_throws_them_away(plant: Plant) -> None:
    letter = {
        "id": "x",
        "image": b"no image",
        "dead.reason": "undecodable",
        "dead.detail": "no image",
        "dead.deliveries": "1",
        "dead.failed_at": "2026-01-01T00:00:00+00:00",
        "dead.entry_id": "1-1",
    }
    for _ in range(4):
        await plant.admin.xadd(plant.keys.dead, letter)  # type: ignore[arg-type]  # text and bytes
    async with plant.client(Role.OPERATOR) as client:
        box = DeadLetterBox(client, plant.as_(Role.OPERATOR))
        assert await box.count() == 4
        first, second, *_ = [entry.dead_id for entry in await box.newest()]
        assert await box.get(first) is not None
        assert await box.replay(first) is not None
        full = DeadLetterBox(client, plant.as_(Role.OPERATOR), BacklogSettings(max_images=1))
        with pytest.raises(BacklogFullError):
            await full.replay(second)
        assert await box.purge([second]) == 1
        assert sum([gone async for gone in box.purge_until()]) == 2
    assert await plant.admin.exists(plant.keys.seen("x")) == 1
    async with DeadLetterReader(plant.as_(Role.OPERATOR)) as letters:
        assert await letters.read() == []
        await plant.admin.xadd(plant.keys.dead, letter)  # type: ignore[arg-type]  # the same
        async for _, found in letters:
            assert found.reason == "undecodable"
            break


async def test_users_of_a_cluster_do_their_jobs_on_all_its_servers(tmp_path: Path) -> None:
    base = {"cluster": True, "shards": 6, "block_ms": 100, "password": PASSWORD}
    digest = sha256(PASSWORD.encode()).hexdigest()
    with cluster(tmp_path) as nodes:
        for node, role in itertools.product(nodes, Role):
            node(*user_line(role, access_rules(role, "flawstream", 6), digest).split())
        users = {role: RedisSettings.model_validate({**base, "url": nodes[0].url, "username": role}) for role in Role}
        durable = users[Role.PRODUCER].model_copy(update={"wait_local_fsync": True})
        async with Producer(durable) as producer:
            for number in range(30):
                await producer.push(png() if number else b"no image", "bottle", id=f"part-{number}")
        service = Settings(redis=users[Role.SERVICE])
        async with make_client(service.redis) as client:
            worker = ShardedWorker(client, "w", FakeDetector(), service)
            backlog = Backlog(client, all_keys(service.redis), max_age_s=0.05)
            stop = asyncio.Event()
            running = asyncio.create_task(worker.run(stop))

            async def all_have_ended() -> bool:
                state = await backlog.read()
                return (state.images, state.results, state.dead) == (0, 29, 1)

            await until(all_have_ended, worker)
            stop.set()
            await running
            await worker.close()
            assert worker.stats.errors == 0
        async with ResultReader(users[Role.READER], "line") as results:
            found = set()
            async for entry_id, result in results:
                found.add(result.id)
                await results.ack(entry_id)
                if len(found) == 29:
                    break
        async with make_client(users[Role.OPERATOR]) as client:
            box = DeadLetterBox(client, users[Role.OPERATOR])
            (letter,) = await box.newest()
            assert await box.replay(letter.dead_id) is not None
