"""The producer on a real Valkey."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime

import pytest
from helpers.fakes import make_result, png
from helpers.streams import rows, single_client
from helpers.waiting import wait_until_async
from redis.asyncio import Redis

from schemas.errors import BacklogFullError, ConfigError, IdConflictError, MessageError, Reason, StreamUnavailableError
from schemas.keys import StreamKeys, all_keys, keys_of
from schemas.settings import BacklogSettings, LimitSettings, RedisSettings
from schemas.wire import parse_image
from workers.acl import Role, access_rules
from workers.consume.reader import RedisStreamReader
from workers.consume.sink import RedisResultSink
from workers.ports import Completion
from workers.produce.producer import Producer

pytestmark = pytest.mark.anyio

KEYS = StreamKeys()
MIB = 1 << 20


@pytest.fixture
async def client(redis_settings: RedisSettings) -> AsyncIterator[Redis]:
    async with single_client(redis_settings) as client:
        yield client


async def test_a_pushed_image_reads_back_as_it_was_given(client: Redis, redis_settings: RedisSettings) -> None:
    taken = datetime(2026, 1, 1, 12, tzinfo=UTC)
    async with Producer(redis_settings) as producer:
        entry_id = await producer.push(png(), "bottle", id="cam1-1", captured_at=taken, extra={"shift": b"\xff"})
    ((stored_id, fields),) = await rows(client, KEYS.images)
    message = parse_image(stored_id, fields, LimitSettings())
    assert stored_id == entry_id
    assert (message.id, message.category, message.image) == ("cam1-1", "bottle", png())
    assert (message.captured_at, message.extra) == (taken, {"shift": b"\xff"})


async def test_a_retry_with_the_same_id_writes_once(client: Redis, redis_settings: RedisSettings) -> None:
    async with Producer(redis_settings) as first, Producer(redis_settings) as second:
        entry_id = await first.push(png(), "bottle", id="cam1-1")
        again = await asyncio.gather(*(producer.push(png(), "bottle", id="cam1-1") for producer in (first, second) * 4))
        assert set(again) == {entry_id}
        assert await first.push(png(), "bottle", id="cam1-2") != entry_id
    assert await client.xlen(KEYS.images) == 2


async def complete_all(client: Redis, settings: RedisSettings) -> None:
    """Complete every image with a result, as a worker does."""
    reader = RedisStreamReader(client, KEYS, "w", settings, claim_idle_ms=60_000)
    entries = await reader.read(100, 1 << 30)
    completions = [Completion(one.entry_id, make_result(one.fields[b"id"].decode())) for one in entries]
    assert all(await RedisResultSink(client, KEYS, "w").publish(completions))


async def workers_have_long_remembered_outcomes(client: Redis) -> None:
    """Have it that every worker has been of this release for longer than any rolling upgrade takes."""
    await client.set(KEYS.outcomes_since, 1)


@pytest.mark.parametrize(("image", "category"), [(png(200), "bottle"), (png(), "cable")], ids=["image", "category"])
@pytest.mark.parametrize("completed", [False, True])
async def test_another_image_with_the_same_id_is_refused_and_counted(
    client: Redis, redis_settings: RedisSettings, image: bytes, category: str, *, completed: bool
) -> None:
    async with Producer(redis_settings) as producer:
        first = await producer.push(png(), "bottle", id="part-7")
        if completed:
            await complete_all(client, redis_settings)
        with pytest.raises(IdConflictError, match=rf"'part-7'.*{first}.*nothing was written"):
            await producer.push(image, category, id="part-7")
        assert await producer.push(png(), "bottle", id="part-7", extra={"try": b"2"}) == first
    assert await client.xlen(KEYS.images) == (0 if completed else 1)
    assert await client.hgetall(KEYS.counters) == {b"id_conflicts": b"1", b"duplicates": b"1"}


async def test_an_id_that_an_older_release_remembered_is_a_duplicate_whatever_the_image(
    client: Redis, redis_settings: RedisSettings
) -> None:
    await client.set(KEYS.seen("part-7"), "1-0")
    await workers_have_long_remembered_outcomes(client)
    async with Producer(redis_settings) as producer:
        assert await producer.push(png(), "bottle", id="part-7") == "1-0"
    assert await client.xlen(KEYS.images) == 0


async def test_an_image_is_written_again_where_its_stream_was_deleted(
    client: Redis, redis_settings: RedisSettings
) -> None:
    async with Producer(redis_settings) as producer:
        first = await producer.push(png(), "bottle", id="part-7")
        await client.delete(KEYS.images)
        again = await producer.push(png(), "bottle", id="part-7")
        assert await producer.push(png(), "bottle", id="part-7") == again
    assert again != first
    assert [entry_id for entry_id, _ in await rows(client, KEYS.images)] == [again]
    assert await client.hgetall(KEYS.counters) == {b"lost_images": b"1", b"duplicates": b"1"}


async def test_an_image_is_written_again_where_its_entry_was_deleted_among_others(
    client: Redis, redis_settings: RedisSettings
) -> None:
    await workers_have_long_remembered_outcomes(client)
    async with Producer(redis_settings) as producer:
        lost = await producer.push(png(), "bottle", id="part-7")
        kept = await producer.push(png(), "bottle", id="part-8")
        await client.xdel(KEYS.images, lost)
        assert await producer.push(png(), "bottle", id="part-8") == kept
        again = await producer.push(png(), "bottle", id="part-7")
    assert [entry_id for entry_id, _ in await rows(client, KEYS.images)] == [kept, again]


async def test_an_image_with_an_outcome_is_not_written_again_though_the_outcome_was_trimmed(
    client: Redis, redis_settings: RedisSettings
) -> None:
    async with Producer(redis_settings) as producer:
        first = await producer.push(png(), "bottle", id="part-7")
        await complete_all(client, redis_settings)
        await workers_have_long_remembered_outcomes(client)
        await client.delete(KEYS.results, KEYS.images)
        assert await producer.push(png(), "bottle", id="part-7") == first
    assert await client.xlen(KEYS.images) == 0
    assert 0 < await client.ttl(KEYS.seen("part-7")) <= 600


async def test_an_image_that_a_worker_of_an_older_release_completed_is_not_written_again(
    client: Redis, redis_settings: RedisSettings
) -> None:
    async with Producer(redis_settings) as producer:
        await producer.push(png(), "bottle", id="part-6")
        await complete_all(client, redis_settings)  # a worker of this release has begun to remember outcomes
        first = await producer.push(png(), "bottle", id="part-7")
        await client.xdel(KEYS.images, first)  # one of an older release completes an image and remembers nothing
        assert await producer.push(png(), "bottle", id="part-7") == first


async def test_a_producer_that_may_not_read_images_confirms_what_it_cannot_look_up(
    client: Redis, redis_settings: RedisSettings
) -> None:
    await client.acl_setuser("camera", enabled=True, passwords=["+right"], reset=True)
    rules = access_rules(Role.PRODUCER, redis_settings.prefix)
    await client.execute_command("ACL", "SETUSER", "camera", *rules.split())  # type: ignore[no-untyped-call]
    await workers_have_long_remembered_outcomes(client)
    settings = RedisSettings(url=redis_settings.url, username="camera", password="right")  # noqa: S106
    async with Producer(settings) as producer:
        first = await producer.push(png(), "bottle", id="part-7")
        other = await producer.push(png(), "bottle", id="part-8")
        await client.xdel(KEYS.images, first)
        assert await producer.push(png(), "bottle", id="part-7") == first
        await client.xdel(KEYS.images, other)
        assert await producer.push(png(), "bottle", id="part-7") != first


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


async def test_a_producer_that_was_refused_asks_before_it_sends_the_next_image(
    client: Redis, redis_settings: RedisSettings
) -> None:
    image = png(size=(64, 64)) + bytes(100_000)

    async def received_bytes() -> int:
        return int((await client.info("stats"))["total_net_input_bytes"])

    async with Producer(redis_settings, backlog=BacklogSettings(max_images=1)) as producer:
        await producer.push(image, "bottle", id="first")
        with pytest.raises(BacklogFullError):
            await producer.push(image, "bottle", id="second")
        before = await received_bytes()
        for number in range(10):
            with pytest.raises(BacklogFullError, match="1 images wait"):
                await producer.push(image, "bottle", id=f"refused-{number}")
        assert await received_bytes() - before < len(image)
        assert await client.hgetall(KEYS.counters) == {b"refused_images": b"11"}
        assert await producer.push(image, "bottle", id="first")  # known already: not refused
        await client.delete(KEYS.images)
        await producer.push(image, "bottle", id="second")
    assert await client.xlen(KEYS.images) == 1


async def test_a_producer_may_wait_for_room(client: Redis, redis_settings: RedisSettings) -> None:
    async with Producer(redis_settings, backlog=BacklogSettings(max_images=1)) as producer:
        first = await producer.push(png(), "bottle")
        waiting = asyncio.create_task(producer.push(png(), "bottle", wait_s=240))

        async def asked_again() -> bool:
            assert not waiting.done()
            return bool((await client.info("commandstats"))["cmdstat_evalsha"]["calls"] > 2)

        await wait_until_async(asked_again, "the producer asks for room again")
        await client.xdel(KEYS.images, first)
        second = await waiting
    assert [one for one, _ in await rows(client, KEYS.images)] == [second]


async def test_a_server_without_memory_is_a_full_backlog_and_counts_that(
    client: Redis, redis_settings: RedisSettings
) -> None:
    async with Producer(redis_settings) as producer:
        await client.config_set("maxmemory", "1mb")
        for number in range(3):
            with pytest.raises(BacklogFullError, match="out of memory"):
                await producer.push(png(), "bottle", id=f"cam1-{number}")
    assert await client.xlen(KEYS.images) == 0
    assert await client.hgetall(KEYS.counters) == {b"refused_memory": b"3"}


async def test_refusals_and_duplicates_are_counted_at_the_server(client: Redis, redis_settings: RedisSettings) -> None:
    async with Producer(redis_settings, backlog=BacklogSettings(max_images=1)) as producer:
        for _ in range(3):
            await producer.push(png(), "bottle", id="a")
        for _ in range(4):
            with pytest.raises(BacklogFullError):
                await producer.push(png(), "bottle", id="b")
    assert await client.hgetall(KEYS.counters) == {b"duplicates": b"2", b"refused_images": b"4"}


async def test_a_backlog_full_of_bytes_refuses_also_where_others_wrote_them(
    client: Redis, redis_settings: RedisSettings
) -> None:
    async with Producer(redis_settings, backlog=BacklogSettings(max_bytes=2 * MIB)) as producer:
        for _ in range(5):
            await client.xadd(KEYS.images, {"category": "bottle", "image": b"x" * (MIB // 2)})
        with pytest.raises(
            BacklogFullError, match=r"take 2,\d{3},\d{3} bytes and 2,097,152 are allowed.*backlog\.max_bytes"
        ):
            await producer.push(png(), "bottle", id="a")
        assert await client.xlen(KEYS.images) == 5
        assert await client.exists(KEYS.seen("a")) == 0
        assert await client.hgetall(KEYS.counters) == {b"refused_bytes": b"1"}
        await client.xtrim(KEYS.images, maxlen=2, approximate=False)
        assert await producer.push(png(), "bottle", id="a")


async def test_few_small_images_before_many_large_ones_do_not_hide_their_bytes(
    client: Redis, redis_settings: RedisSettings
) -> None:
    for size_bytes, count in ((2000, 200), (100_000, 60)):
        for _ in range(count):
            await client.xadd(KEYS.images, {"category": "bottle", "image": b"x" * size_bytes})
    async with Producer(redis_settings, backlog=BacklogSettings(max_bytes=6 * MIB)) as producer:
        with pytest.raises(BacklogFullError, match="bytes"):  # as many as the server's own estimate would be far below
            await producer.push(png(), "bottle")
    assert (await client.memory_usage(KEYS.images, samples=5) or 0) < 6 * MIB


async def test_a_long_stream_is_measured_now_and_then_and_what_is_pushed_in_between_is_added(
    client: Redis, redis_settings: RedisSettings
) -> None:
    async with client.pipeline(transaction=False) as pipeline:
        for _ in range(1001):
            pipeline.xadd(KEYS.images, {"category": "bottle"})
        await pipeline.execute()
    async with Producer(redis_settings, backlog=BacklogSettings(max_bytes=4 * MIB)) as producer:
        await client.set(KEYS.image_bytes, 3 * MIB, ex=60)  # as if it had just been measured
        before = await client.xlen(KEYS.images)
        await producer.push(b"x" * MIB, "bottle")
        with pytest.raises(BacklogFullError, match="take 4,194,3"):
            await producer.push(b"x", "bottle")
        assert 0 < await client.ttl(KEYS.image_bytes) <= 60
        assert await client.xlen(KEYS.images) == before + 1


async def test_images_go_to_the_shard_of_their_id_and_without_one_to_each_in_turn(
    client: Redis, redis_settings: RedisSettings
) -> None:
    settings = redis_settings.model_copy(update={"shards": 4})
    async with Producer(settings) as producer, Producer(settings) as other:
        for number in range(20):
            entry_id = await producer.push(png(), "bottle", id=f"part-{number}")
            assert await other.push(png(), "bottle", id=f"part-{number}") == entry_id
            written = dict(await rows(client, keys_of(settings, f"part-{number}").images))
            assert written[entry_id][b"id"] == f"part-{number}".encode()
        lengths = [await client.xlen(keys.images) for keys in all_keys(settings)]
        assert sum(lengths) == 20
        for _ in range(8):
            await producer.push(png(), "bottle")
        assert [await client.xlen(keys.images) for keys in all_keys(settings)] == [length + 2 for length in lengths]
    assert await client.exists(KEYS.images) == 0


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
    settings = RedisSettings(url=redis_settings.url, username="camera", password="wrong-horse")  # noqa: S106
    with pytest.raises(ConfigError, match="refuses the user or the password") as raised:
        await Producer(settings).__aenter__()
    assert "horse" not in str(raised.value)
