"""What fails around a worker: tried again, tried alone, and in the end poison."""

import asyncio

import pytest
from helpers.fakes import detection, entry_id, image_entry, png
from helpers.worker_bench import Bench

from schemas.errors import DetectorOverloadedError, Reason, StreamUnavailableError
from schemas.settings import WorkerSettings
from workers.ports import Detection, Refusal

pytestmark = pytest.mark.anyio


async def test_entry_is_dead_lettered_after_max_deliveries() -> None:
    bench = Bench(WorkerSettings(max_deliveries=5))
    bench.stream.add(image_entry(1, deliveries=6))
    assert await bench.worker.run_once() == 1
    letter = bench.dead[entry_id(1)]
    assert (letter.reason, letter.deliveries) == (Reason.POISON, 6)
    assert bench.detector.batches == []


async def test_entry_is_still_tried_at_max_deliveries() -> None:
    bench = Bench(WorkerSettings(max_deliveries=5))
    bench.stream.add(image_entry(1, deliveries=5))
    await bench.worker.run_once()
    assert set(bench.results) == {entry_id(1)}


async def test_batch_is_retried_when_detector_is_overloaded() -> None:
    bench = Bench()
    bench.detector.failures = [DetectorOverloadedError("full"), DetectorOverloadedError("full")]
    bench.stream.add(image_entry(1), image_entry(2))
    assert await bench.worker.run_once() == 2
    assert bench.detector.batches == [["bottle", "bottle"]] * 3
    assert bench.worker.stats.retries == 2
    assert bench.worker.stats.errors == 0


async def test_waits_between_tries_grow_and_differ() -> None:
    bench = Bench()
    bench.detector.failures = [DetectorOverloadedError("full") for _ in range(10)]
    bench.stream.add(image_entry(1))
    await bench.worker.run_once()
    waits = bench.clock.slept_s
    assert len(waits) == 10
    for k, wait in enumerate(waits):
        whole = min(5.0, 0.1 * 2**k)
        assert whole / 2 <= wait <= whole


async def test_nothing_is_published_while_the_detector_is_overloaded() -> None:
    bench = Bench()
    bench.detector.failures = [DetectorOverloadedError("full")]
    bench.stream.add(image_entry(1), image_entry(2, image=b"no image"))
    await bench.worker.run_once()
    assert [len(call) for call in bench.sink.calls] == [2]


async def test_publishing_is_tried_again_when_the_server_does_not_answer() -> None:
    bench = Bench()
    bench.sink.failures = [StreamUnavailableError("gone")]
    bench.stream.add(image_entry(1))
    assert await bench.worker.run_once() == 1
    assert len(bench.sink.calls) == 2
    assert len(bench.detector.batches) == 1


async def test_a_lost_reply_publishes_nothing_twice() -> None:
    bench = Bench()
    bench.sink.lost_replies = [StreamUnavailableError("reply lost")]
    bench.stream.add(image_entry(1))
    assert await bench.worker.run_once() == 0
    assert len(bench.stream.ended) == 1
    assert bench.worker.stats.not_ours == 1


async def test_reading_goes_on_after_the_server_came_back() -> None:
    bench = Bench()
    bench.reader.failures = [StreamUnavailableError("gone"), StreamUnavailableError("gone")]
    bench.stream.add(image_entry(1))
    await bench.run_until_idle()
    assert set(bench.results) == {entry_id(1)}
    assert bench.worker.stats.errors == 0


async def test_a_bug_while_reading_does_not_end_the_loop() -> None:
    bench = Bench()
    bench.reader.failures = [KeyError("a bug")]
    bench.stream.add(image_entry(1))
    await bench.run_until_idle()
    assert set(bench.results) == {entry_id(1)}
    assert bench.worker.stats.errors == 1


async def test_a_poisonous_image_never_takes_its_neighbours_down() -> None:
    bench = Bench()
    bench.detector.poisonous = {66}
    bench.stream.add(image_entry(1), image_entry(2, image=png(66)), image_entry(3))
    assert await bench.worker.run_once() == 2
    assert set(bench.results) == {entry_id(1), entry_id(3)}
    assert set(bench.stream.pending) == {entry_id(2)}
    assert bench.worker.stats.errors == 2  # together, then alone


async def test_a_batch_with_a_bug_does_not_end_the_loop() -> None:
    bench = Bench(WorkerSettings(batch_size=1, in_flight=1))
    bench.detector.poisonous = {66}
    bench.stream.add(image_entry(1, image=png(66)), image_entry(2))
    await bench.run_until_idle()
    assert set(bench.results) == {entry_id(2)}
    assert set(bench.stream.pending) == {entry_id(1)}


async def test_an_image_that_always_fails_ends_as_poison() -> None:
    bench = Bench(WorkerSettings(max_deliveries=3, claim_idle_ms=60_000))
    bench.detector.poisonous = {66}
    bench.stream.add(image_entry(1, image=png(66)))
    await bench.worker.run_once()
    for _ in range(3):
        assert not bench.stream.ended
        bench.clock.advance(60)
        await bench.worker.sweep()
    assert bench.dead[entry_id(1)].reason is Reason.POISON
    assert bench.dead[entry_id(1)].deliveries == 4


async def test_a_wrong_number_of_outcomes_is_a_bug_publishes_nothing_and_counts_against_no_image() -> None:
    bench = Bench(WorkerSettings(claim_idle_ms=60_000))
    bench.clock.on_sleep = lambda: bench.clock.advance(10)

    async def short(*_: object) -> list[Detection | Refusal]:
        await asyncio.sleep(0)
        return []

    bench.detector.detect = short  # type: ignore[method-assign, assignment]
    bench.stream.add(image_entry(1))
    assert await bench.worker.run_once() == 0
    assert bench.stream.pending[entry_id(1)].entry.deliveries == 0


async def test_a_result_that_cannot_be_put_together_does_not_concern_its_neighbours() -> None:
    bench = Bench()
    good = detection()
    broken = Detection(**{name: getattr(good, name) for name in good.__slots__} | {"p_value": 7.0})
    bench.detector.unknown["broken"] = broken  # type: ignore[assignment]
    bench.stream.add(image_entry(1), image_entry(2, category="broken"), image_entry(3))
    assert await bench.worker.run_once() == 2
    assert set(bench.stream.pending) == {entry_id(2)}


async def test_an_image_whose_detector_dies_is_tried_alone_and_its_neighbours_end() -> None:
    bench = Bench()
    bench.detector.deadly = {66}
    bench.stream.add(*(image_entry(level, image=png(level)) for level in (30, 66, 90)))
    assert await bench.worker.run_once() == 2
    assert set(bench.results) == {entry_id(30), entry_id(90)}
    assert list(bench.stream.pending) == [entry_id(66)]
    assert bench.worker.stats.errors == 0


async def test_an_image_that_kills_detector_after_detector_ends_as_poison() -> None:
    bench = Bench(WorkerSettings(max_deliveries=2))
    bench.detector.deadly = {66}
    bench.stream.add(image_entry(1, image=png(66)))
    assert await bench.worker.run_once() == 0
    bench.clock.advance(3600)
    assert await bench.worker.sweep() == 0
    bench.clock.advance(3600)
    assert await bench.worker.sweep() == 1
    assert bench.dead[entry_id(1)].reason is Reason.POISON
