"""Entries that a worker holds: kept from others while it works, handed back when it stops, taken over when it dies."""

import asyncio

import pytest
from helpers.fakes import FakeReader, FakeStream, entry_id, image_entry
from helpers.worker_bench import Bench

from schemas.errors import DetectorOverloadedError, StreamUnavailableError
from schemas.settings import WorkerSettings
from workers.ports import Detection, Entry, Refusal

pytestmark = pytest.mark.anyio


async def test_a_stopped_worker_leaves_what_the_detector_refuses_pending() -> None:
    bench = Bench()

    async def overloaded(*_: object) -> list[Detection | Refusal]:
        stop.set()
        raise DetectorOverloadedError("full")

    bench.detector.detect = overloaded  # type: ignore[method-assign, assignment]
    bench.stream.add(image_entry(1))
    stop = asyncio.Event()
    await bench.worker.run(stop)
    assert set(bench.stream.pending) == {entry_id(1)}
    assert bench.stream.ended == []


async def test_entries_in_hand_are_not_claimed_by_the_own_sweep() -> None:
    bench = Bench()
    bench.detector.gate.clear()
    bench.stream.add(image_entry(1))
    working = asyncio.create_task(bench.worker.run_once())
    await bench.detector.started.acquire()
    bench.clock.advance(3600)
    assert await bench.worker.sweep() == 0
    assert bench.stream.pending[entry_id(1)].entry.deliveries == 1
    bench.detector.gate.set()
    assert await working == 1


async def test_what_a_dead_worker_left_behind_is_taken_over_one_at_a_time() -> None:
    stream = FakeStream()
    stream.add(image_entry(1), image_entry(2))
    await FakeReader(stream, "dead").read(2, 1 << 30)
    bench = Bench(stream=stream)
    bench.clock.advance(59)
    assert await bench.worker.sweep() == 0
    bench.clock.advance(1)
    assert await bench.worker.sweep() == 2
    assert bench.detector.batches == [["bottle"], ["bottle"]]


async def test_no_more_batches_are_under_way_than_allowed() -> None:
    bench = Bench(WorkerSettings(batch_size=1, in_flight=2))
    bench.stream.add(*(image_entry(k) for k in range(8)))
    bench.detector.gate.clear()
    stop = asyncio.Event()
    bench.reader.on_idle = stop.set
    running = asyncio.create_task(bench.worker.run(stop))
    await bench.detector.started.acquire()
    await bench.detector.started.acquire()
    for _ in range(50):
        await asyncio.sleep(0)
    assert len(bench.stream.pending) == 2  # and nothing was read for later
    bench.detector.gate.set()
    await running
    assert len(bench.results) == 8
    assert bench.detector.most_under_way == 2


async def test_stopping_finishes_the_batches_under_way() -> None:
    bench = Bench()
    bench.detector.gate.clear()
    bench.stream.add(image_entry(1))
    stop = asyncio.Event()
    running = asyncio.create_task(bench.worker.run(stop))
    await bench.detector.started.acquire()
    stop.set()
    for _ in range(50):
        await asyncio.sleep(0)
    assert not running.done()
    bench.detector.gate.set()
    await running
    assert set(bench.results) == {entry_id(1)}


async def test_batch_that_was_read_as_the_worker_stops_is_completed_and_waits_for_no_other_worker() -> None:
    bench = Bench()
    bench.stream.add(image_entry(1), image_entry(2))
    stop = asyncio.Event()
    read = bench.reader.read

    async def read_and_stop(max_entries: int, max_bytes: int) -> list[Entry]:
        entries = await read(max_entries, max_bytes)
        stop.set()
        return entries

    bench.reader.read = read_and_stop  # type: ignore[method-assign]
    await bench.worker.run(stop)
    assert set(bench.results) == {entry_id(1), entry_id(2)}


async def test_a_restarted_worker_goes_on_with_its_own_entries() -> None:
    stream = FakeStream()
    stream.add(image_entry(1), image_entry(2))
    await FakeReader(stream, "a").read(2, 1 << 30)
    bench = Bench(stream=stream)
    stream.add(image_entry(3), image_entry(4))
    await bench.run_until_idle()
    assert set(bench.results) == {entry_id(k) for k in (1, 2, 3, 4)}
    assert bench.detector.batches == [["bottle"], ["bottle"], ["bottle", "bottle"]]


async def test_entries_given_out_before_are_worked_on_one_after_the_other() -> None:
    stream = FakeStream()
    stream.add(image_entry(1), image_entry(2))
    await FakeReader(stream, "a").read(2, 1 << 30)
    bench = Bench(stream=stream)
    bench.detector.gate.clear()
    stop = asyncio.Event()
    bench.reader.on_idle = stop.set
    running = asyncio.create_task(bench.worker.run(stop))
    await bench.detector.started.acquire()
    assert [stream.pending[entry_id(k)].entry.deliveries for k in (1, 2)] == [2, 1]
    bench.detector.gate.set()
    await running
    assert set(bench.results) == {entry_id(1), entry_id(2)}


async def test_an_entry_given_out_again_while_it_is_in_hand_is_not_taken_up_twice() -> None:
    bench = Bench()
    bench.detector.gate.clear()
    bench.stream.add(image_entry(1))
    working = asyncio.create_task(bench.worker.run_once())
    await bench.detector.started.acquire()
    bench.stream.add(image_entry(1))
    assert await bench.worker.run_once() == 0
    bench.detector.gate.set()
    assert await working == 1
    assert bench.detector.batches == [["bottle"]]


async def test_an_outcome_for_an_entry_of_another_worker_is_dropped() -> None:
    bench = Bench()
    entry = image_entry(1)
    bench.stream.add(entry)
    bench.detector.gate.clear()
    working = asyncio.create_task(bench.worker.run_once())
    await bench.detector.started.acquire()
    bench.stream.give(entry, "b")
    bench.detector.gate.set()
    assert await working == 0
    assert bench.stream.ended == []
    assert bench.worker.stats.not_ours == 1


async def test_entries_in_flight_get_heartbeats_while_the_detector_is_slow() -> None:
    bench = Bench()
    bench.stream.add(image_entry(1), image_entry(2))
    bench.detector.gate.clear()
    stop = asyncio.Event()
    running = asyncio.create_task(bench.worker.run(stop))
    await bench.detector.started.acquire()
    heartbeats = len(bench.reader.heartbeats)
    while len(bench.reader.heartbeats) < heartbeats + 3:  # noqa: ASYNC110 - the fake has no event to await
        await asyncio.sleep(0)
    assert bench.reader.heartbeats[-1] == [entry_id(1), entry_id(2)]
    bench.detector.gate.set()
    stop.set()
    await running
    assert set(bench.results) == {entry_id(1), entry_id(2)}


async def test_stop_hands_back_what_takes_too_long_and_the_next_worker_has_it_at_once() -> None:
    bench = Bench(WorkerSettings(drain_s=0))
    bench.stream.add(image_entry(1), image_entry(2))
    bench.detector.gate.clear()
    stop = asyncio.Event()
    running = asyncio.create_task(bench.worker.run(stop))
    await bench.detector.started.acquire()
    stop.set()
    await running
    assert not bench.stream.ended
    claimed = await FakeReader(bench.stream, "b").claim(8)
    assert [(entry.entry_id, entry.deliveries) for entry in claimed] == [(entry_id(1), 1), (entry_id(2), 1)]


async def test_stop_while_the_server_is_away_hands_back_what_could_not_be_published() -> None:
    bench = Bench()
    bench.stream.add(image_entry(1))
    bench.sink.failures = [StreamUnavailableError("away")] * 1000
    stop = asyncio.Event()
    running = asyncio.create_task(bench.worker.run(stop))
    while not bench.sink.calls:  # noqa: ASYNC110 - the fake tells of nothing
        await asyncio.sleep(0)
    stop.set()
    await running
    claimed = await FakeReader(bench.stream, "b").claim(8)
    assert [(entry.entry_id, entry.deliveries) for entry in claimed] == [(entry_id(1), 1)]


async def test_a_worker_whose_detector_is_away_for_long_hands_its_batch_back() -> None:
    bench = Bench(WorkerSettings(claim_idle_ms=1000))
    bench.stream.add(image_entry(1))
    bench.detector.failures = [DetectorOverloadedError("away")] * 1000
    bench.clock.on_sleep = lambda: bench.clock.advance(0.1)
    assert await bench.worker.run_once() == 0
    (entry,) = await FakeReader(bench.stream, "b", claim_idle_ms=1000).claim(8)
    assert (entry.entry_id, entry.deliveries) == (entry_id(1), 1)
    assert bench.worker.stats.errors == 0
