"""The worker on a real Valkey, with a fake detector: every image ends exactly once."""

import asyncio
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from helpers.fakes import FakeDetector, png
from helpers.redis_servers import Server
from helpers.stream_work import working
from helpers.streams import add, rows, single_client
from redis.asyncio import Redis

from schemas.errors import Reason
from schemas.keys import StreamKeys
from schemas.messages import DetectionResult
from schemas.settings import BacklogSettings, LimitSettings, RedisSettings, WorkerSettings
from schemas.wire import parse_dead_letter, parse_result
from workers.consume.clock import SystemClock
from workers.consume.decode import Decoder
from workers.consume.reader import RedisStreamReader
from workers.consume.sink import RedisResultSink
from workers.consume.worker import StreamWorker
from workers.outcomes.results import DeadLetterReader, ResultReader
from workers.outcomes.retention import RedisRetention
from workers.ports import Completion, Deferral
from workers.produce.producer import Producer
from workers.redis.embedded import EmbeddedServer

pytestmark = pytest.mark.anyio

KEYS = StreamKeys()
CLAIM_AT_ONCE_MS = 0


@pytest.fixture
async def client(redis_settings: RedisSettings) -> AsyncIterator[Redis]:
    async with single_client(redis_settings) as client:
        yield client


def make_worker(
    client: Redis, settings: RedisSettings, consumer: str, detector: FakeDetector | None = None
) -> StreamWorker:
    return StreamWorker(
        RedisStreamReader(client, KEYS, consumer, settings, claim_idle_ms=CLAIM_AT_ONCE_MS),
        RedisResultSink(client, KEYS, consumer),
        detector or FakeDetector(),
        Decoder(2, LimitSettings(), SystemClock()),
        SystemClock(),
        settings=WorkerSettings(),
        retention=RedisRetention(client, KEYS, BacklogSettings()),
    )


async def push(client: Redis, count: int = 1) -> list[str]:
    fields = {b"category": b"bottle", b"image": png()}
    return [await add(client, KEYS.images, fields) for _ in range(count)]


async def published(client: Redis) -> list[DetectionResult]:
    return [parse_result(fields) for _, fields in await rows(client, KEYS.results)]


def raw_xadd(port: int, key: str, *values: bytes) -> bytes:
    """Do what any client in any language does: one XADD in RESP over a socket."""
    parts = [b"XADD", key.encode(), b"*", *values]
    command = b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%s\r\n" % (len(part), part) for part in parts)
    with socket.create_connection(("127.0.0.1", port)) as raw:
        raw.sendall(command)
        reply = raw.makefile("rb")
        assert reply.readline().startswith(b"$")
        return reply.readline().strip()


async def test_an_image_from_a_plain_socket_comes_back_on_the_results_stream(
    client: Redis, redis_settings: RedisSettings, valkey_server: Server
) -> None:
    async with ResultReader(redis_settings) as results, working(make_worker(client, redis_settings, "a")):
        fields = (b"category", b"bottle", b"id", b"cam1-42", b"image", png(200), b"shift", b"\x00\xff")
        raw_xadd(valkey_server.port, KEYS.images, *fields)
        async for _, result in results:
            assert (result.id, result.category) == ("cam1-42", "bottle")
            assert result.score == pytest.approx(2.0)
            assert result.boxes
            assert result.extra == {"shift": b"\x00\xff"}
            break
    assert await client.xlen(KEYS.images) == 0
    assert (await client.xpending(KEYS.images, KEYS.group))["pending"] == 0


async def test_whatever_is_pushed_ends_as_a_result_or_a_dead_letter(
    client: Redis, redis_settings: RedisSettings
) -> None:
    async with DeadLetterReader(redis_settings) as letters, working(make_worker(client, redis_settings, "a")):
        good = await push(client, 40)
        await client.xadd(KEYS.images, {b"\xff\xfe": b"\x00"})
        await client.xadd(KEYS.images, {"category": "bottle", "image": b"\x89PNG\r\n\x1a\n cut off"})
        await client.xadd(KEYS.images, {f"field-{k}": "x" for k in range(20_000)})
        reasons: list[Reason] = []
        async for _, letter in letters:
            reasons.append(letter.reason)
            if len(reasons) == 3:
                break
    assert sorted(reasons) == [Reason.MALFORMED, Reason.TOO_LARGE, Reason.UNDECODABLE]
    assert sorted(result.id for result in await published(client)) == sorted(good)
    assert await client.xlen(KEYS.images) == 0


async def test_a_worker_killed_before_it_published_is_taken_over_and_the_image_ends_once(
    client: Redis, redis_settings: RedisSettings
) -> None:
    (entry_id,) = await push(client)
    killed = make_worker(client, redis_settings, "a")
    reached = asyncio.Event()

    async def die_here(_: Sequence[Completion]) -> list[bool]:
        reached.set()
        await asyncio.Event().wait()
        return []

    killed._pipeline._sink.publish = die_here  # type: ignore[method-assign, assignment]  # noqa: SLF001 - the moment between detect and publish
    task = asyncio.create_task(killed.run_once())
    await reached.wait()
    task.cancel()
    assert await client.xlen(KEYS.results) == 0
    second = make_worker(client, redis_settings, "b")
    assert await second.sweep() == 1
    assert await second.sweep() == 0
    assert [result.id for result in await published(client)] == [entry_id]


async def test_two_workers_with_the_same_entry_publish_it_once(client: Redis, redis_settings: RedisSettings) -> None:
    detectors = FakeDetector(), FakeDetector()
    first, second = (
        make_worker(client, redis_settings, name, detector) for name, detector in zip("ab", detectors, strict=True)
    )
    for detector in detectors:
        detector.gate.clear()
    ids = await push(client, 8)
    works = [asyncio.create_task(first.run_once())]
    await detectors[0].started.acquire()
    works.append(asyncio.create_task(second.sweep()))  # takes them over while the first has them at its detector
    await detectors[1].started.acquire()
    for detector in detectors:
        detector.gate.set()
    ended = await asyncio.gather(*works)
    assert sum(ended) == 8
    assert ended[1] >= 1
    assert sorted(result.id for result in await published(client)) == sorted(ids)
    assert first.stats.not_ours == 8 - ended[0]


async def test_an_entry_that_breaks_every_worker_ends_as_poison(client: Redis, redis_settings: RedisSettings) -> None:
    await add(client, KEYS.images, {b"category": b"bottle", b"image": png(66)})
    detector = FakeDetector()
    detector.poisonous = {66}
    worker = make_worker(client, redis_settings, "a", detector)
    worker._pipeline._settings = WorkerSettings(max_deliveries=3)  # noqa: SLF001 - fewer rounds
    assert await worker.run_once() == 0
    # Idle for 0 ms is idle: one sweep goes on until the entry has ended.
    assert await worker.sweep() == 1
    ((_, fields),) = await rows(client, KEYS.dead)
    letter = parse_dead_letter(fields)
    assert (letter.reason, letter.deliveries) == (Reason.POISON, 4)
    assert len(detector.batches) == 2 * 3  # each time with a plain image after it


async def test_a_server_that_was_emptied_is_served_on(client: Redis, redis_settings: RedisSettings) -> None:
    async with ResultReader(redis_settings) as results, working(make_worker(client, redis_settings, "a")):
        found = aiter(results)
        await push(client)
        await anext(found)
        await client.flushall()
        (entry_id,) = await push(client)
        assert (await anext(found))[1].id == entry_id


async def test_a_server_that_comes_back_is_served_on(tmp_path: Path) -> None:
    with EmbeddedServer(tmp_path) as first, ExitStack() as later:
        settings = RedisSettings(url=first.url, block_ms=20)
        async with single_client(settings) as client, ResultReader(settings, "quality") as results:
            worker = make_worker(client, settings, "a")
            found = aiter(results)
            async with working(worker):
                await push(client)
                before, _ = await anext(found)
                await results.ack(before)
                await asyncio.to_thread(first.stop)
                later.enter_context(EmbeddedServer(tmp_path, first.port))
                (entry_id,) = await push(client)
                assert (await anext(found))[1].id == entry_id
            assert worker.stats.results == 2


async def test_a_full_server_is_drained(client: Redis, redis_settings: RedisSettings) -> None:
    await push(client, 4)
    await client.config_set("maxmemory", "1mb")
    assert await make_worker(client, redis_settings, "a").run_once() == 4
    async with Producer(redis_settings) as producer:
        await client.config_set("maxmemory", "0")
        await producer.push(png(), "bottle")
    assert await client.xlen(KEYS.images) == 1


async def test_a_sweep_ends_though_deferred_images_can_be_claimed_again_at_once(
    client: Redis, redis_settings: RedisSettings
) -> None:
    detector = FakeDetector()
    detector.unknown["bottle"] = Deferral("its version cannot be used")
    worker = make_worker(client, redis_settings, "a", detector)
    ids = await push(client, 3)
    await worker.run_once()
    assert await worker.sweep() == 0
    pending: Any = await client.xpending_range(KEYS.images, KEYS.group, "-", "+", 10)
    assert [one["message_id"].decode() for one in pending] == ids
    assert {one["times_delivered"] for one in pending} == {0}
    del detector.unknown["bottle"]
    worker._pipeline._categories._deferred_at.clear()  # noqa: SLF001 - as after some seconds
    assert await worker.sweep() == 3
