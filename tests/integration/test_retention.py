"""Retention on a real Valkey: what goes, what stays, and that nothing goes that somebody has still to read."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from helpers.streams import rows, single_client
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from schemas.keys import StreamKeys
from schemas.settings import BacklogSettings, RedisSettings
from workers.outcomes.retention import RedisRetention

pytestmark = pytest.mark.anyio

KEYS = StreamKeys()
DAY_MS = 86_400_000
FILLS_A_NODE = b"x" * 8192
"""An entry of this size is alone in its node of the stream, so that trimming by number is exact."""


@pytest.fixture
async def client(redis_settings: RedisSettings) -> AsyncIterator[Redis]:
    async with single_client(redis_settings) as client:
        yield client


async def add_results(client: Redis, count: int, *, age_ms: int = 0, map_: bytes = FILLS_A_NODE) -> list[str]:
    """Write results that came so long ago, by the server's clock."""
    seconds, _ = await client.time()
    ids = [f"{seconds * 1000 - age_ms}-{number + 1}" for number in range(count)]
    async with client.pipeline(transaction=False) as pipeline:
        for entry_id in ids:
            pipeline.xadd(KEYS.results, {"map": map_}, id=entry_id)
        await pipeline.execute()
    return ids


async def kept(client: Redis) -> list[str]:
    return [entry_id for entry_id, _ in await rows(client, KEYS.results)]


async def trim(client: Redis, keep: int = 1_000_000, keep_s: float = 1e9) -> int:
    return await RedisRetention(client, KEYS, BacklogSettings(keep_results=keep, keep_results_s=keep_s)).trim()


async def test_results_are_trimmed_to_the_number_that_is_kept(client: Redis) -> None:
    ids = await add_results(client, 10)
    assert await trim(client, keep=4) == 6
    assert await kept(client) == ids[6:]
    assert await trim(client, keep=4) == 0


async def test_results_past_the_age_go_however_few_there_are(client: Redis) -> None:
    await add_results(client, 3, age_ms=8 * DAY_MS, map_=b"small")
    young = await add_results(client, 2, age_ms=6 * DAY_MS, map_=b"small")  # in one node with the old ones
    assert await trim(client, keep_s=7 * 86_400) == 3
    assert await kept(client) == young


async def test_results_past_the_number_go_however_young_they_are(client: Redis) -> None:
    old = await add_results(client, 2, age_ms=8 * DAY_MS)
    young = await add_results(client, 8)
    assert await trim(client, keep=3, keep_s=7 * 86_400) == 7
    assert await kept(client) == young[5:]
    assert not {*old} & {*await kept(client)}


@pytest.mark.parametrize("policy", [{"keep": 2}, {"keep_s": 86_400.0}], ids=["number", "age"])
async def test_results_that_a_group_has_still_to_read_are_never_trimmed(
    client: Redis, policy: dict[str, float]
) -> None:
    ids = await add_results(client, 10, age_ms=2 * DAY_MS)
    await client.xgroup_create(KEYS.results, "quality", id=ids[1])
    await client.xgroup_create(KEYS.results, "archive", id=ids[8])
    await trim(client, **policy)  # type: ignore[arg-type]
    assert set(ids[2:]) <= set(await kept(client))
    assert ids[0] not in await kept(client)


@pytest.mark.parametrize("policy", [{"keep": 2}, {"keep_s": 86_400.0}], ids=["number", "age"])
async def test_results_that_a_group_has_not_acknowledged_are_never_trimmed(
    client: Redis, policy: dict[str, float]
) -> None:
    ids = await add_results(client, 10, age_ms=2 * DAY_MS)
    await client.xgroup_create(KEYS.results, "quality", id="0")
    await client.xreadgroup("quality", "a", {KEYS.results: ">"})
    await client.xack(KEYS.results, "quality", *ids[:3], *ids[4:])
    await trim(client, **policy)  # type: ignore[arg-type]
    assert await kept(client) == ids[3:]


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_groups_have_read_what_they_need_stays_and_the_rest_follows_the_policy(
    redis_settings: RedisSettings, data: st.DataObject
) -> None:
    """Old ones, young ones, and groups that each read and acknowledged some."""
    old, young = data.draw(st.integers(0, 12)), data.draw(st.integers(0, 12))
    keep = data.draw(st.integers(1, 30))
    groups = data.draw(
        st.lists(st.tuples(st.integers(0, 24), st.sets(st.integers(0, 23))), max_size=3), label="read, not acknowledged"
    )

    async def check() -> None:
        async with single_client(redis_settings) as client:
            await client.flushall()
            ids = await add_results(client, old, age_ms=2 * DAY_MS) + await add_results(client, young)
            needed: set[str] = set()
            for number, (read, unacknowledged) in enumerate(groups):
                await client.xgroup_create(KEYS.results, f"group-{number}", id="0", mkstream=True)
                if read:
                    await client.xreadgroup(f"group-{number}", "a", {KEYS.results: ">"}, count=read)
                done = [one for place, one in enumerate(ids[:read]) if place not in unacknowledged]
                if done:
                    await client.xack(KEYS.results, f"group-{number}", *done)
                needed |= {*ids} - {*done}
            await trim(client, keep=keep, keep_s=86_400.0)
            left = await kept(client)
            past = max(old, len(ids) - keep)
            assert needed <= {*left}
            assert left == ids[len(ids) - len(left) :]  # the oldest go first
            assert {*ids[past:]} <= {*left}  # and none that the policy keeps
            if not groups:
                assert left == ids[past:]

    asyncio.run(check())


async def test_a_long_stream_is_trimmed_in_short_steps(client: Redis) -> None:
    await add_results(client, 2500, age_ms=2 * DAY_MS, map_=b"small")
    await add_results(client, 2500, map_=b"small")
    await client.config_resetstat()
    assert await trim(client, keep_s=86_400.0) == 2500
    assert (await client.info("commandstats"))["cmdstat_evalsha"]["calls"] >= 3


async def test_what_was_trimmed_is_counted(client: Redis) -> None:
    await add_results(client, 10)
    await trim(client, keep=4)
    await trim(client, keep=3)
    await trim(client, keep=3)
    assert await client.hgetall(KEYS.counters) == {b"trimmed_results": b"7"}


async def test_a_full_server_is_trimmed(client: Redis) -> None:
    await add_results(client, 10)
    await client.config_set("maxmemory", "1mb")
    assert await trim(client, keep=4) == 6


async def test_each_shard_is_trimmed_by_itself(client: Redis) -> None:
    shards = [StreamKeys(shard=number) for number in range(2)]
    for keys in shards:
        for _ in range(3):
            await client.xadd(keys.results, {"map": FILLS_A_NODE})
    assert await RedisRetention(client, shards[0], BacklogSettings(keep_results=1)).trim() == 2
    assert [await client.xlen(keys.results) for keys in shards] == [1, 3]


async def test_trimming_a_stream_that_is_not_there_does_nothing(client: Redis) -> None:
    assert await trim(client, keep=1) == 0
    assert await client.keys() == []
