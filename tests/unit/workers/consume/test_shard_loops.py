"""Loops that follow the leases: started, resized and stopped; with fakes for server and detector."""

import asyncio
from collections.abc import Callable, Mapping
from typing import cast

import pytest
from helpers.fakes import entry_id, image_entry
from helpers.worker_bench import Bench

from flawstream.telemetry.metrics import NO_METRICS
from schemas.errors import StreamUnavailableError
from workers.consume import shard_loops
from workers.consume.shard_leases import MISSED_HEARTBEATS, ShardLeases
from workers.consume.shard_loops import ShardLoops
from workers.consume.shard_members import ShardMembers
from workers.consume.slots import Slots
from workers.consume.worker import StreamWorker

pytestmark = pytest.mark.anyio

SHARDS = 4


class Members:
    """The hash of counters: what this worker writes, and the others as the test has them."""

    def __init__(self) -> None:
        self.others: dict[str, int] = {}
        self.beats = 0
        self.left = False
        self.away = False

    async def heartbeat(self, dead: Mapping[str, int]) -> dict[str, int]:
        self.beats += 1
        if self.away:
            raise StreamUnavailableError("away")
        for name in dead:
            self.others.pop(name, None)
        return {"a": self.beats, **{name: count + self.beats for name, count in self.others.items() if count >= 0}}

    async def leave(self) -> None:
        assert not self.left
        self.left = True


class Shop:
    """A worker `a` of four shards; each shard has a stream of its own."""

    def __init__(self) -> None:
        self.members = Members()
        self.benches = [Bench() for _ in range(SHARDS)]
        self.slots: dict[int, Slots] = {}
        self.runs: list[int] = []
        self.stop = asyncio.Event()
        loops = ShardLoops(
            ShardLeases("a", SHARDS),
            cast("ShardMembers", self.members),
            self._make_loop,
            in_flight=4,
            metrics=NO_METRICS,
        )
        self.task = asyncio.create_task(loops.run(self.stop))

    def _make_loop(self, shard: int, slots: Slots) -> StreamWorker:
        self.runs.append(shard)
        self.slots[shard] = slots
        return self.benches[shard].worker

    async def until(self, is_so: Callable[[], bool]) -> None:
        while not is_so():
            assert not self.task.done(), self.task
            await asyncio.sleep(0)

    async def beat(self, times: int = 2) -> None:
        """Let some heartbeats pass."""
        enough = self.members.beats + times
        await self.until(lambda: self.members.beats >= enough)


@pytest.fixture
async def shop(monkeypatch: pytest.MonkeyPatch) -> Shop:
    monkeypatch.setattr(shard_loops, "HEARTBEAT_S", 0.001)
    return Shop()


async def test_loops_follow_as_another_worker_comes_and_goes(shop: Shop) -> None:
    await shop.until(lambda: shop.runs == [0, 1, 2, 3])
    shop.members.others["b"] = 0
    await shop.beat()
    for bench in shop.benches:
        bench.stream.add(image_entry(1))
    await shop.until(lambda: all(bench.results for bench in shop.benches[:2]))
    await shop.beat()
    assert not any(bench.results for bench in shop.benches[2:]), "shards of the other worker"
    del shop.members.others["b"]
    await shop.until(lambda: all(bench.results for bench in shop.benches))
    assert shop.runs == [0, 1, 2, 3, 2, 3]
    shop.stop.set()
    await shop.task
    assert shop.members.left


async def test_shard_that_comes_back_waits_for_the_batches_of_its_loop_before(shop: Shop) -> None:
    await shop.until(lambda: shop.runs == [0, 1, 2, 3])
    bench = shop.benches[3]
    bench.detector.gate.clear()
    bench.stream.add(image_entry(1))
    await bench.detector.started.acquire()
    shop.members.others["b"] = 0
    await shop.beat()
    del shop.members.others["b"]
    await shop.beat()
    assert shop.runs.count(3) == 1, "a second loop would read what the first works on"
    bench.detector.gate.set()
    await shop.until(lambda: shop.runs.count(3) == 2)
    assert set(bench.results) == {entry_id(1)}
    assert bench.detector.batches == [["bottle"]]
    shop.stop.set()
    await shop.task


async def test_batches_in_flight_are_divided_again_when_shards_go(shop: Shop) -> None:
    await shop.until(lambda: len(shop.slots) == SHARDS)
    shop.members.others["b"] = 0
    await shop.beat()
    taken = [await shop.slots[0].acquire(), await shop.slots[0].acquire()]
    assert taken == [True, True]
    shop.stop.set()
    await shop.task


async def test_worker_that_sees_nobody_for_long_reads_all_shards(shop: Shop) -> None:
    await shop.until(lambda: shop.runs == [0, 1, 2, 3])
    shop.members.others["b"] = 0
    await shop.beat()
    shop.members.away = True
    await shop.beat(MISSED_HEARTBEATS - 1)
    assert shop.runs == [0, 1, 2, 3]
    await shop.until(lambda: shop.runs == [0, 1, 2, 3, 2, 3])
    shop.stop.set()
    await shop.task
