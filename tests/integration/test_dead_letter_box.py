"""Dead letters on a real Valkey: looked through, sent again once and no more than once, thrown away; over shards."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from random import Random

import pytest
from helpers.fakes import ARRIVED
from helpers.streams import add, rows
from helpers.waiting import wait_until_async
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from schemas.errors import BacklogFullError, ConfigError, IdConflictError, MessageError, Reason
from schemas.keys import StreamKeys
from schemas.messages import DeadLetter
from schemas.settings import BacklogSettings, RedisSettings
from schemas.wire import dead_letter_fields
from workers.outcomes.dead_letters import DeadLetterBox
from workers.produce.producer import Producer
from workers.redis.connection import make_client

pytestmark = pytest.mark.anyio

KEYS = StreamKeys()
IMAGE = b"\xff\xd8 as it came"


@pytest.fixture
async def client(redis_settings: RedisSettings) -> AsyncIterator[Redis]:
    async with make_client(redis_settings) as client:
        assert isinstance(client, Redis)
        yield client


@pytest.fixture
def box(client: Redis, redis_settings: RedisSettings) -> DeadLetterBox:
    return DeadLetterBox(client, redis_settings)


async def make_dead_letter(
    client: Redis,
    message_id: str | None = None,
    *,
    reason: Reason = Reason.UNDECODABLE,
    keys: StreamKeys = KEYS,
    at: str = "*",
    entry_id: str = "17-1",
    image: bytes = IMAGE,
) -> str:
    """Write a dead letter as a worker does, and give its id on the stream."""
    fields = {b"category": b"bottle", b"image": image, b"shift": b"\x00"}
    if message_id is not None:
        fields[b"id"] = message_id.encode()
    letter = DeadLetter(
        fields=fields, reason=reason, detail="it is broken", deliveries=1, failed_at=ARRIVED, entry_id=entry_id
    )
    return await add(client, keys.dead, dead_letter_fields(letter), entry_id=at)


async def images(client: Redis, keys: StreamKeys = KEYS) -> list[tuple[str, dict[bytes, bytes]]]:
    return await rows(client, keys.images)


async def test_letters_are_listed_newest_first_and_page_by_page(client: Redis, box: DeadLetterBox) -> None:
    ids = [await make_dead_letter(client, name) for name in "abcde"]
    await client.xadd(KEYS.dead, {"hello": "world"})
    assert [entry.dead_id for entry in await box.newest(3)] == [ids[4], ids[3], ids[2]]  # and what is no letter, not
    assert [entry.dead_id for entry in await box.newest(3, before=ids[2])] == [ids[1], ids[0]]
    assert await box.newest(3, before=ids[0]) == []
    assert await box.count() == 6


async def test_letters_of_one_reason_are_found_among_many(client: Redis, box: DeadLetterBox) -> None:
    poison = [await make_dead_letter(client, reason=Reason.POISON)]
    for _ in range(700):
        await make_dead_letter(client, image=b"")
    poison.append(await make_dead_letter(client, reason=Reason.POISON))
    assert [entry.dead_id for entry in await box.newest(5, reason=Reason.POISON)] == poison[::-1]
    assert [page async for page in box.walk(Reason.POISON)] == [poison[:1], poison[1:]]
    await client.xadd(KEYS.dead, {"dead.reason": "bad luck"})
    assert await box.reasons(702) == {Reason.UNDECODABLE: 700, Reason.POISON: 1, "": 1}


async def test_one_letter_is_shown_by_its_id(client: Redis, box: DeadLetterBox) -> None:
    dead_id = await make_dead_letter(client)
    found = await box.get(dead_id)
    assert found is not None
    assert (found.letter.fields[b"image"], found.letter.reason) == (IMAGE, Reason.UNDECODABLE)
    assert await box.get("1-1") is None


async def test_a_replayed_image_has_its_original_fields_and_its_letter_is_gone(
    client: Redis, box: DeadLetterBox
) -> None:
    dead_id = await make_dead_letter(client, "cam1-1")
    entry_id = await box.replay(dead_id)
    fields = {b"category": b"bottle", b"image": IMAGE, b"shift": b"\x00", b"id": b"cam1-1"}
    assert await images(client) == [(entry_id, fields)]
    assert await box.count() == 0


@pytest.mark.parametrize("given_id", [None, ""])
async def test_an_image_without_an_id_is_replayed_under_its_original_entrys(
    client: Redis, box: DeadLetterBox, given_id: str | None
) -> None:
    await box.replay(await make_dead_letter(client, given_id, entry_id="1763900000000-7"))
    ((_, fields),) = await images(client)
    assert fields[b"id"] == b"1763900000000-7"
    assert await client.keys("*seen*") == []


async def test_a_producers_field_that_looks_like_ours_and_is_not_comes_back(client: Redis, box: DeadLetterBox) -> None:
    dead_id = await make_dead_letter(client)
    ((_, fields),) = await rows(client, KEYS.dead)
    await client.xdel(KEYS.dead, dead_id)
    dead_id = await add(client, KEYS.dead, fields | {b"dead.line": b"7"})
    await box.replay(dead_id)
    ((_, fields),) = await images(client)
    assert fields[b"dead.line"] == b"7"
    assert not any(name.startswith(b"dead.") for name in fields if name != b"dead.line")


async def test_a_letter_is_replayed_once(client: Redis, box: DeadLetterBox) -> None:
    dead_id = await make_dead_letter(client, "cam1-1")
    assert await box.replay(dead_id) is not None
    assert await box.replay(dead_id) is None
    assert len(await images(client)) == 1


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    letters=st.integers(1, 8),
    tries=st.integers(1, 6),
    purged=st.sets(st.integers(0, 7)),
    seed=st.randoms(use_true_random=False),
)
def test_however_many_replay_and_purge_at_once_each_image_is_there_at_most_once_and_none_is_lost(
    redis_settings: RedisSettings, letters: int, tries: int, purged: set[int], seed: Random
) -> None:
    async def check() -> None:
        async with make_client(redis_settings) as client:
            assert isinstance(client, Redis)
            await client.flushall()
            box = DeadLetterBox(client, redis_settings)
            dead_ids = [await make_dead_letter(client, f"part-{number}") for number in range(letters)]
            replays = dead_ids * tries
            seed.shuffle(replays)
            doomed = [dead_ids[number] for number in purged if number < letters]
            moved, gone = await asyncio.gather(
                asyncio.gather(*(box.replay(dead_id) for dead_id in replays)), box.purge(doomed)
            )
            found = await images(client)
            assert sorted(one for one in moved if one is not None) == sorted(entry_id for entry_id, _ in found)
            assert len({fields[b"id"] for _, fields in found}) == len(found)
            assert len(found) + gone == letters
            assert await box.count() == 0

    asyncio.run(check())


async def test_a_replay_is_not_taken_for_a_duplicate_and_a_producers_repeat_still_is(
    client: Redis, redis_settings: RedisSettings, box: DeadLetterBox
) -> None:
    async with Producer(redis_settings) as producer:
        first = await producer.push(IMAGE, "bottle", id="cam1-1")
        await client.xdel(KEYS.images, first)  # as a worker does that buries it
        again = await box.replay(await make_dead_letter(client, "cam1-1", entry_id=first))
        assert again not in {None, first}
        assert await producer.push(IMAGE, "bottle", id="cam1-1") == again
        with pytest.raises(IdConflictError):
            await producer.push(IMAGE, "cable", id="cam1-1")
    assert [entry_id for entry_id, _ in await images(client)] == [again]
    assert 0 < await client.ttl(KEYS.seen("cam1-1")) <= 600


async def test_what_is_no_dead_letter_is_not_replayed_and_stays(client: Redis, box: DeadLetterBox) -> None:
    ours = dead_letter_fields(
        DeadLetter(fields={}, reason=Reason.POISON, detail="", deliveries=1, failed_at=ARRIVED, entry_id="1-1")
    )
    foreign = [{b"hello": b"world"}, {**ours, b"dead.entry_id": b"x"}]
    foreign += [{name: value for name, value in ours.items() if name != left_out} for left_out in ours]
    for fields in foreign:
        dead_id = await add(client, KEYS.dead, fields)
        with pytest.raises(MessageError, match="is no dead letter of flawstream"):
            await box.replay(dead_id)
    assert await box.count() == len(foreign)
    assert await images(client) == []


@pytest.mark.parametrize(
    ("backlog", "counter"),
    [(BacklogSettings(max_images=1), b"refused_images"), (BacklogSettings(max_bytes=1 << 20), b"refused_bytes")],
    ids=["images", "bytes"],
)
async def test_a_full_backlog_refuses_a_replay_and_the_letter_stays(
    client: Redis, redis_settings: RedisSettings, backlog: BacklogSettings, counter: bytes
) -> None:
    await client.xadd(KEYS.images, {"category": "bottle", "image": b"x" * (2 << 20)})
    dead_id = await make_dead_letter(client, "cam1-1")
    full = DeadLetterBox(client, redis_settings, backlog)
    with pytest.raises(BacklogFullError, match="nothing was written"):
        await full.replay(dead_id)
    assert await full.get(dead_id) is not None
    assert len(await images(client)) == 1
    assert await client.exists(KEYS.seen("cam1-1")) == 0
    assert await client.hgetall(KEYS.counters) == {counter: b"1"}


async def refused(client: Redis) -> object:
    """Tell whether anything was refused for want of room."""
    return await client.hget(KEYS.counters, "refused_images")


async def test_a_replay_may_wait_for_room(client: Redis, redis_settings: RedisSettings) -> None:
    in_the_way = await client.xadd(KEYS.images, {"category": "bottle"})
    dead_id = await make_dead_letter(client)
    waiting = asyncio.create_task(
        DeadLetterBox(client, redis_settings, BacklogSettings(max_images=1)).replay(dead_id, wait_s=240)
    )
    await wait_until_async(lambda: refused(client), "the replay is refused")
    assert not waiting.done()
    await client.xdel(KEYS.images, in_the_way)
    entry_id = await waiting
    assert [one for one, _ in await images(client)] == [entry_id]


async def test_a_server_without_memory_refuses_a_replay_and_the_letter_stays(client: Redis, box: DeadLetterBox) -> None:
    dead_id = await make_dead_letter(client)
    await client.config_set("maxmemory", "1mb")
    with pytest.raises(BacklogFullError, match="out of memory"):
        await box.replay(dead_id)
    assert await box.get(dead_id) is not None
    assert await client.hgetall(KEYS.counters) == {b"refused_memory": b"1"}


async def test_a_walk_ends_though_what_it_replays_fails_again(client: Redis, box: DeadLetterBox) -> None:
    before = {await make_dead_letter(client, f"part-{number}") for number in range(3)}
    walked: list[str] = []
    async for page in box.walk():
        for dead_id in page:
            walked.append(dead_id)
            await box.replay(dead_id)
            await make_dead_letter(client, "again")
    assert {*walked} == before
    assert await box.count() == 3


async def test_purged_letters_are_gone_and_counted(client: Redis, box: DeadLetterBox) -> None:
    first, second, third = [await make_dead_letter(client) for _ in range(3)]
    assert await box.purge([first, third, "1-1"]) == 2
    assert [entry.dead_id for entry in await box.newest()] == [second]
    assert await box.purge([first]) == 0


async def test_letters_past_an_age_are_purged(client: Redis, box: DeadLetterBox) -> None:
    now = datetime.now(UTC)
    old = now - timedelta(days=8)
    for number in range(1, 1501):  # more than one step's
        await make_dead_letter(client, at=f"{round(old.timestamp() * 1000)}-{number}", image=b"")
    young = await make_dead_letter(client, image=b"")
    assert sum([gone async for gone in box.purge_until(now - timedelta(days=7))]) == 1500
    assert [entry.dead_id for entry in await box.newest()] == [young]


async def test_all_letters_are_purged(client: Redis, box: DeadLetterBox) -> None:
    for _ in range(5):
        await make_dead_letter(client)
    await client.xadd(KEYS.dead, {"hello": "world"})
    assert sum([gone async for gone in box.purge_until()]) == 6
    assert await box.count() == 0
    assert sum([gone async for gone in box.purge_until()]) == 0


@pytest.fixture
def sharded(redis_settings: RedisSettings) -> RedisSettings:
    return redis_settings.model_copy(update={"shards": 3})


async def test_letters_of_all_shards_are_listed_by_age(client: Redis, sharded: RedisSettings) -> None:
    places = [(2, "5-1"), (0, "7-1"), (1, "7-1"), (2, "7-1"), (1, "7-2"), (0, "9-1")]
    for shard, entry_id in places:
        await make_dead_letter(client, keys=StreamKeys(shard=shard), at=entry_id)
    newest_first = [f"{shard}:{entry_id}" for shard, entry_id in places[::-1]]
    box = DeadLetterBox(client, sharded)
    assert [entry.dead_id for entry in await box.newest()] == newest_first
    for limit in (1, 2, 4):
        found: list[str] = []
        before = None
        while page := await box.newest(limit, before=before):
            found += [entry.dead_id for entry in page]
            before = found[-1]
        assert found == newest_first
    assert await box.count() == 6
    assert {dead_id async for page in box.walk() for dead_id in page} == {*newest_first}


async def test_a_letter_is_replayed_and_purged_in_its_shard(client: Redis, sharded: RedisSettings) -> None:
    for shard in range(3):
        await make_dead_letter(client, "cam1-1", keys=StreamKeys(shard=shard), at="5-1")
    box = DeadLetterBox(client, sharded)
    await box.replay("1:5-1")
    assert [len(await images(client, StreamKeys(shard=shard))) for shard in range(3)] == [0, 1, 0]
    assert await client.exists(StreamKeys(shard=1).seen("cam1-1")) == 1
    assert await box.purge(["0:5-1", "1:5-1"]) == 1
    found = await box.get("2:5-1")
    assert found is not None
    assert found.dead_id == "2:5-1"


@pytest.mark.parametrize("dead_id", ["5-1", "3:5-1", "x:5-1", "1:5", ""])
async def test_an_id_of_no_shard_is_refused(client: Redis, sharded: RedisSettings, dead_id: str) -> None:
    with pytest.raises(ConfigError, match=r"no id of a dead letter|redis\.shards is 3"):
        await DeadLetterBox(client, sharded).replay(dead_id)


async def test_an_id_with_a_shard_is_refused_where_there_are_none(box: DeadLetterBox) -> None:
    with pytest.raises(ConfigError, match="one looks like 1763900000000-0"):
        await box.get("0:5-1")
