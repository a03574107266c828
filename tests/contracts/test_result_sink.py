"""What every `ResultSink` does, by the fake and on a real Valkey."""

import re
from collections.abc import AsyncIterator
from typing import Protocol

import pytest
from helpers.fakes import ARRIVED, FakeReader, FakeSink, FakeStream, image_entry, make_result, png
from helpers.streams import rows, single_client
from redis.asyncio import Redis

from schemas.errors import Reason
from schemas.keys import StreamKeys
from schemas.messages import DeadLetter, DetectionResult
from schemas.settings import RedisSettings
from schemas.wire import parse_dead_letter, parse_result
from workers.acl import Role, access_rules
from workers.consume.reader import RedisStreamReader
from workers.consume.sink import RedisResultSink
from workers.ports import Completion, ResultSink

pytestmark = pytest.mark.anyio

PLENTY_BYTES = 1 << 30


def result_of(entry_id: str) -> Completion:
    return Completion(entry_id, make_result(entry_id))


def dead_letter_of(entry_id: str, fields: dict[bytes, bytes] | None = None) -> Completion:
    letter = DeadLetter(
        fields=fields or {b"image": b"\xff\x00", b"category": b"bottle"},
        reason=Reason.UNDECODABLE,
        detail="no image",
        deliveries=1,
        failed_at=ARRIVED,
        entry_id=entry_id,
    )
    return Completion(entry_id, letter)


class World(Protocol):
    """A stream of images, some given to a consumer, and what became of them."""

    async def give(self, consumer: str, count: int) -> list[str]: ...
    async def take_over(self, consumer: str, entry_id: str) -> None: ...
    def sink(self, consumer: str) -> ResultSink: ...
    async def results(self) -> list[DetectionResult]: ...
    async def dead(self) -> list[DeadLetter]: ...
    async def left(self) -> int: ...


class ResultSinkContract:
    """The law."""

    async def test_a_result_is_written_and_its_entry_is_gone(self, world: World) -> None:
        (entry_id,) = await world.give("a", 1)
        completion = result_of(entry_id)
        assert await world.sink("a").publish([completion]) == [True]
        assert await world.results() == [completion.outcome]
        assert await world.left() == 0

    async def test_results_and_dead_letters_end_together_each_on_its_stream(self, world: World) -> None:
        first, second, third = await world.give("a", 3)
        completions = [result_of(first), dead_letter_of(second), result_of(third)]
        assert await world.sink("a").publish(completions) == [True, True, True]
        assert [result.id for result in await world.results()] == [first, third]
        assert await world.dead() == [completions[1].outcome]
        assert await world.left() == 0

    async def test_publishing_again_writes_nothing(self, world: World) -> None:
        (entry_id,) = await world.give("a", 1)
        sink = world.sink("a")
        await sink.publish([result_of(entry_id)])
        assert await sink.publish([result_of(entry_id)]) == [False]
        assert len(await world.results()) == 1

    async def test_an_entry_of_another_consumer_is_left_alone(self, world: World) -> None:
        mine, taken = await world.give("a", 2)
        await world.take_over("b", taken)
        assert await world.sink("a").publish([result_of(taken), result_of(mine)]) == [False, True]
        assert [result.id for result in await world.results()] == [mine]
        assert await world.sink("b").publish([result_of(taken)]) == [True]
        assert await world.left() == 0

    async def test_an_entry_that_never_was_is_nobodys(self, world: World) -> None:
        assert await world.sink("a").publish([result_of("1-1")]) == [False]
        assert await world.results() == []

    async def test_nothing_to_publish_is_nothing_done(self, world: World) -> None:
        assert await world.sink("a").publish([]) == []


class FakeWorld:
    def __init__(self) -> None:
        self._stream = FakeStream()

    async def give(self, consumer: str, count: int) -> list[str]:
        self._stream.add(*(image_entry(k) for k in range(count)))
        return [entry.entry_id for entry in await FakeReader(self._stream, consumer).read(count, PLENTY_BYTES)]

    async def take_over(self, consumer: str, entry_id: str) -> None:
        self._stream.give(self._stream.pending[entry_id].entry, consumer)

    def sink(self, consumer: str) -> ResultSink:
        return FakeSink(self._stream, consumer)

    async def results(self) -> list[DetectionResult]:
        return [end.outcome for end in self._stream.ended if isinstance(end.outcome, DetectionResult)]

    async def dead(self) -> list[DeadLetter]:
        return [end.outcome for end in self._stream.ended if isinstance(end.outcome, DeadLetter)]

    async def left(self) -> int:
        return len(self._stream.waiting) + len(self._stream.pending)


class RedisWorld:
    def __init__(self, client: Redis, settings: RedisSettings) -> None:
        self.client = client
        self.keys = StreamKeys(prefix=settings.prefix)
        self.settings = settings

    async def give(self, consumer: str, count: int) -> list[str]:
        for _ in range(count):
            await self.client.xadd(self.keys.images, {"category": "bottle", "image": png()})
        reader = RedisStreamReader(self.client, self.keys, consumer, self.settings, claim_idle_ms=1000)
        return [entry.entry_id for entry in await reader.read(count, PLENTY_BYTES)]

    async def take_over(self, consumer: str, entry_id: str) -> None:
        await self.client.xclaim(self.keys.images, self.keys.group, consumer, 0, [entry_id])

    def sink(self, consumer: str) -> ResultSink:
        return RedisResultSink(self.client, self.keys, consumer)

    async def results(self) -> list[DetectionResult]:
        return [parse_result(fields) for _, fields in await rows(self.client, self.keys.results)]

    async def dead(self) -> list[DeadLetter]:
        return [parse_dead_letter(fields) for _, fields in await rows(self.client, self.keys.dead)]

    async def left(self) -> int:
        return int(await self.client.xlen(self.keys.images))


class TestFakeSink(ResultSinkContract):
    @pytest.fixture
    def world(self) -> FakeWorld:
        return FakeWorld()


class TestRedisResultSink(ResultSinkContract):
    @pytest.fixture
    async def world(self, redis_settings: RedisSettings) -> AsyncIterator[RedisWorld]:
        async with single_client(redis_settings) as client:
            yield RedisWorld(client, redis_settings)

    async def test_a_batch_is_one_call_to_the_server(self, world: RedisWorld) -> None:
        sink = world.sink("a")
        await sink.publish([result_of(key) for key in await world.give("a", 1)])  # the server now knows the script
        ids = await world.give("a", 16)
        await world.client.config_resetstat()
        await sink.publish([result_of(key) for key in ids])
        seen = await world.client.info("commandstats")
        inside_the_script = {f"cmdstat_{name}": 16 for name in ("xpending", "xadd", "xack", "xdel")}
        expected = inside_the_script | {"cmdstat_evalsha": 1, "cmdstat_config|resetstat": 1}
        assert {name: about["calls"] for name, about in seen.items()} == expected

    async def test_a_server_that_forgot_its_scripts_is_taught_again(self, world: RedisWorld) -> None:
        sink = world.sink("a")
        await sink.publish([result_of(key) for key in await world.give("a", 1)])
        await world.client.script_flush()
        assert await sink.publish([result_of(key) for key in await world.give("a", 1)]) == [True]

    async def test_a_server_that_was_emptied_meanwhile_takes_no_result(self, world: RedisWorld) -> None:
        (entry_id,) = await world.give("a", 1)
        await world.client.flushall()
        assert await world.sink("a").publish([result_of(entry_id)]) == [False]
        assert await world.results() == []

    async def test_access_rules_of_an_older_release_are_enough(self, world: RedisWorld) -> None:
        rules = re.sub(r" \(\S*seen:\S* [^)]*\)", "", access_rules(Role.WORKER, world.keys.prefix))
        await world.client.acl_setuser("older", enabled=True, passwords=["+right"], reset=True)
        await world.client.execute_command("ACL", "SETUSER", "older", *rules.split())  # type: ignore[no-untyped-call]
        (entry_id,) = await world.give("a", 1)
        await world.client.set(world.keys.seen("part-7"), f"{entry_id} digest")
        settings = RedisSettings(url=world.settings.url, username="older", password="right")  # noqa: S106
        async with single_client(settings) as client:
            completion = Completion(entry_id, make_result("part-7"))
            assert await RedisResultSink(client, world.keys, "a").publish([completion]) == [True]
        assert await world.results() == [completion.outcome]

    async def test_a_server_that_is_full_can_be_drained(self, world: RedisWorld) -> None:
        ids = await world.give("a", 4)
        await world.client.config_set("maxmemory", "1mb")
        assert await world.sink("a").publish([result_of(key) for key in ids]) == [True] * 4
        assert await world.left() == 0

    async def test_the_largest_dead_letter_that_may_be_can_be_written(self, world: RedisWorld) -> None:
        (entry_id,) = await world.give("a", 1)
        completion = dead_letter_of(entry_id, {f"field-{k}".encode(): b"x" for k in range(1000)})
        assert await world.sink("a").publish([completion]) == [True]
        assert await world.dead() == [completion.outcome]
