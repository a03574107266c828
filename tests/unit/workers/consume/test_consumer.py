"""The worker's loop, rule by rule, with fakes for everything around it."""

import asyncio
import logging

import pytest
from helpers.fakes import (
    ARRIVED,
    FakeDetector,
    FakeReader,
    FakeSink,
    FakeStream,
    detection,
    entry_id,
    image_entry,
    png,
)

from schemas.errors import DetectorOverloadedError, Reason, RegistryError, StreamUnavailableError
from schemas.messages import DeadLetter, DetectionResult, Verdict
from schemas.settings import LimitSettings, WorkerSettings
from workers.consume.decode import Decoder
from workers.consume.worker import StreamWorker
from workers.ports import Deferral, Detection, Entry, Refusal

pytestmark = pytest.mark.anyio


class Bench:
    """A worker with everything around it."""

    def __init__(self, settings: WorkerSettings | None = None, stream: FakeStream | None = None) -> None:
        self.stream = stream or FakeStream()
        self.clock = self.stream.clock
        self.reader = FakeReader(self.stream)
        self.sink = FakeSink(self.stream)
        self.detector = FakeDetector()
        self.trims = 0
        self.worker = StreamWorker(
            self.reader,
            self.sink,
            self.detector,
            Decoder(2, LimitSettings(), self.clock),
            self.clock,
            settings=settings or WorkerSettings(),
            retention=self,
        )

    async def trim(self) -> int:
        self.trims += 1
        return 0

    @property
    def results(self) -> dict[str, DetectionResult]:
        return {end.entry_id: end.outcome for end in self.stream.ended if isinstance(end.outcome, DetectionResult)}

    @property
    def dead(self) -> dict[str, DeadLetter]:
        return {end.entry_id: end.outcome for end in self.stream.ended if isinstance(end.outcome, DeadLetter)}

    async def run_until_idle(self) -> None:
        """Run the loop until nothing is left to read."""
        stop = asyncio.Event()
        self.reader.on_idle = stop.set
        await self.worker.run(stop)


async def test_an_image_ends_as_a_result() -> None:
    bench = Bench()
    bench.stream.add(image_entry(1, image=png(50)))
    assert await bench.worker.run_once() == 1
    result = bench.results[entry_id(1)]
    assert (result.id, result.category, result.verdict) == (entry_id(1), "bottle", Verdict.NORMAL)
    assert result.score == pytest.approx(0.5)
    assert not bench.stream.pending
    assert bench.worker.stats.results == 1


async def test_what_the_producer_sent_along_comes_back() -> None:
    bench = Bench()
    fields = {b"category": b"bottle", b"image": png(size=(4, 6)), b"id": b"cam1-7", b"shift": b"\xff\x00"}
    bench.stream.add(Entry(entry_id(1), fields))
    await bench.worker.run_once()
    result = bench.results[entry_id(1)]
    assert (result.id, result.image_shape, result.extra) == ("cam1-7", (4, 6), {"shift": b"\xff\x00"})


async def test_a_batch_of_mixed_categories_is_detected_in_one_call_and_published_in_one() -> None:
    bench = Bench()
    bench.detector.unknown["cap"] = Refusal(Reason.UNKNOWN_CATEGORY, "no model for cap")
    bench.stream.add(*(image_entry(k, category=name) for k, name in enumerate(["bottle", "cable", "cap"])))
    assert await bench.worker.run_once() == 3
    assert bench.detector.batches == [["bottle", "cable", "cap"]]
    assert len(bench.sink.calls) == 1
    assert set(bench.results) == {entry_id(0), entry_id(1)}
    assert bench.dead[entry_id(2)].reason is Reason.UNKNOWN_CATEGORY


async def test_outcomes_go_to_the_entries_they_belong_to() -> None:
    bench = Bench()
    bench.stream.add(*(image_entry(level, image=png(level)) for level in (30, 200, 90)))
    await bench.worker.run_once()
    assert {key: result.score for key, result in bench.results.items()} == {
        entry_id(level): pytest.approx(level / 100) for level in (30, 200, 90)
    }


async def test_one_undecodable_image_does_not_concern_its_neighbours() -> None:
    bench = Bench()
    bench.stream.add(image_entry(1), image_entry(2, image=b"no image"), image_entry(3))
    assert await bench.worker.run_once() == 3
    assert set(bench.results) == {entry_id(1), entry_id(3)}
    letter = bench.dead[entry_id(2)]
    assert (letter.reason, letter.deliveries, letter.entry_id) == (Reason.UNDECODABLE, 1, entry_id(2))
    assert letter.fields[b"image"] == b"no image"


async def test_malformed_entries_end_as_dead_letters_without_the_detector() -> None:
    bench = Bench()
    bench.stream.add(
        Entry(entry_id(1), {b"hello": b"world"}),
        Entry(entry_id(2), {b"category": b"bottle", b"image_ref": b"s3://bucket/a.png"}),
        Entry(entry_id(3), {b"category": b"../etc", b"image": png()}),
        Entry(entry_id(4), {b"category": b"bottle", b"image": png(), b"note": b"x" * (1 << 20)}),
    )
    assert await bench.worker.run_once() == 4
    assert [bench.dead[entry_id(k)].reason for k in (1, 2, 3, 4)] == [
        Reason.MALFORMED,
        Reason.FORBIDDEN_REFERENCE,
        Reason.MALFORMED,
        Reason.TOO_LARGE,
    ]
    assert bench.detector.batches == []
    assert sum(bench.worker.stats.dead.values()) == 4


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


async def test_a_wrong_number_of_outcomes_is_a_bug_and_publishes_nothing() -> None:
    bench = Bench()

    async def short(*_: object) -> list[Detection | Refusal]:
        await asyncio.sleep(0)
        return []

    bench.detector.detect = short  # type: ignore[method-assign, assignment]
    bench.stream.add(image_entry(1))
    assert await bench.worker.run_once() == 0
    assert set(bench.stream.pending) == {entry_id(1)}


async def test_a_result_that_cannot_be_put_together_does_not_concern_its_neighbours() -> None:
    bench = Bench()
    good = detection()
    broken = Detection(**{name: getattr(good, name) for name in good.__slots__} | {"p_value": 7.0})
    bench.detector.unknown["broken"] = broken  # type: ignore[assignment]
    bench.stream.add(image_entry(1), image_entry(2, category="broken"), image_entry(3))
    assert await bench.worker.run_once() == 2
    assert set(bench.stream.pending) == {entry_id(2)}


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


async def test_a_sweep_trims_the_results() -> None:
    bench = Bench()
    await bench.worker.sweep()
    assert bench.trims == 1


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


async def test_times_are_measured_from_the_arrival_on_the_server() -> None:
    bench = Bench()
    bench.clock.advance(2)
    bench.detector.gate.clear()
    bench.stream.add(image_entry(1))
    working = asyncio.create_task(bench.worker.run_once())
    await bench.detector.started.acquire()
    bench.clock.advance(0.5)
    bench.detector.gate.set()
    await working
    result = bench.results[entry_id(1)]
    assert (result.queued_ms, result.decode_ms) == (2000, 0)
    assert (result.detect_ms, result.total_ms) == (500, 2500)


async def test_times_are_never_negative_when_the_clocks_disagree() -> None:
    bench = Bench()
    bench.clock.advance(-60)
    bench.stream.add(image_entry(1))
    await bench.worker.run_once()
    assert bench.clock.now() < ARRIVED
    assert bench.results[entry_id(1)].queued_ms == 0
    assert bench.results[entry_id(1)].total_ms == 0


async def test_what_is_in_hand_is_touched_while_the_detector_is_slow() -> None:
    bench = Bench()
    bench.stream.add(image_entry(1), image_entry(2))
    bench.detector.gate.clear()
    stop = asyncio.Event()
    running = asyncio.create_task(bench.worker.run(stop))
    await bench.detector.started.acquire()
    touches = len(bench.reader.touched)
    while len(bench.reader.touched) < touches + 3:  # noqa: ASYNC110 - the fake tells of nothing
        await asyncio.sleep(0)
    assert bench.reader.touched[-1] == [entry_id(1), entry_id(2)]
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


async def test_a_worker_whose_detector_is_away_for_long_hands_its_batch_back() -> None:
    bench = Bench(WorkerSettings(claim_idle_ms=1000))
    bench.stream.add(image_entry(1))
    bench.detector.failures = [DetectorOverloadedError("away")] * 1000
    bench.clock.on_sleep = lambda: bench.clock.advance(0.1)
    assert await bench.worker.run_once() == 0
    (entry,) = await FakeReader(bench.stream, "b", claim_idle_ms=1000).claim(8)
    assert (entry.entry_id, entry.deliveries) == (entry_id(1), 1)
    assert bench.worker.stats.errors == 0


NOT_NOW = Deferral("the current version of 'cap' cannot be used")


async def test_an_image_that_cannot_be_judged_now_stays_pending_and_its_neighbours_end() -> None:
    bench = Bench()
    bench.detector.unknown["cap"] = NOT_NOW
    bench.stream.add(image_entry(1), image_entry(2, category="cap"), image_entry(3, image=b"no image"))
    assert await bench.worker.run_once() == 2
    assert set(bench.results) == {entry_id(1)}
    assert set(bench.dead) == {entry_id(3)}
    assert list(bench.stream.pending) == [entry_id(2)]
    assert (bench.worker.stats.deferred, bench.worker.stats.errors) == (1, 0)


async def test_a_deferred_image_is_tried_again_for_as_long_as_it_takes_and_never_poison() -> None:
    bench = Bench(WorkerSettings(max_deliveries=2, claim_idle_ms=60_000))
    bench.detector.unknown["cap"] = NOT_NOW
    bench.stream.add(image_entry(1, category="cap"))
    await bench.worker.run_once()
    for _ in range(10):
        bench.clock.advance(50)
        assert await bench.worker.sweep() == 0
        bench.clock.advance(10)
        assert await bench.worker.sweep() == 0
    assert len(bench.detector.batches) == 11  # once at first, and once in each minute
    assert not bench.stream.ended
    del bench.detector.unknown["cap"]
    bench.clock.advance(60)
    assert await bench.worker.sweep() == 1
    assert set(bench.results) == {entry_id(1)}


async def test_after_a_deferral_images_of_the_category_wait_undecoded_for_a_moment() -> None:
    bench = Bench()
    bench.detector.unknown["cap"] = NOT_NOW
    bench.stream.add(image_entry(1, category="cap"))
    await bench.worker.run_once()
    bench.clock.advance(4)
    bench.stream.add(image_entry(2, category="cap", image=b"no image"), image_entry(3))
    assert await bench.worker.run_once() == 1
    assert bench.detector.batches == [["cap"], ["bottle"]]
    assert set(bench.stream.pending) == {entry_id(1), entry_id(2)}
    del bench.detector.unknown["cap"]
    bench.clock.advance(1)
    bench.stream.add(image_entry(4, category="cap"), image_entry(5, category="cap"))
    assert await bench.worker.run_once() == 2
    assert set(bench.results) == {entry_id(3), entry_id(4), entry_id(5)}


async def test_deferrals_are_logged_once_until_the_category_can_be_judged(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench()
    logged = []
    for number, why in enumerate([NOT_NOW, NOT_NOW, None, NOT_NOW]):
        bench.detector.unknown = {"cap": why} if why else {}
        bench.stream.add(image_entry(number, category="cap"))
        with caplog.at_level(logging.WARNING, "workers.consume.worker"):
            await bench.worker.run_once()
        logged.append(len(caplog.records))
        bench.clock.advance(10)
    assert logged == [1, 1, 1, 2]
    assert "model_unavailable: the current version of 'cap' cannot be used" in caplog.text


async def test_an_image_whose_version_is_lost_while_it_is_judged_is_deferred() -> None:
    bench = Bench(WorkerSettings(max_deliveries=1))
    bench.detector.failures = [RegistryError("the server no longer has bottle@v1")] * 3
    bench.stream.add(image_entry(1), image_entry(2))
    assert await bench.worker.run_once() == 0
    bench.clock.advance(60)
    assert await bench.worker.sweep() == 2
    assert set(bench.results) == {entry_id(1), entry_id(2)}
    assert bench.worker.stats.errors == 0
