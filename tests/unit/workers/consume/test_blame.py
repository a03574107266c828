"""Who is to blame where an image fails: it alone, its category, or whatever fails for every image."""

import asyncio
from collections.abc import Sequence

import pytest
from helpers.fakes import FakeReader, entry_id, image_entry, png
from helpers.worker_bench import Bench

from flawstream.imaging.pixels import Depths, Pixels
from schemas.errors import Reason, StageTimeoutError
from schemas.settings import WorkerSettings
from workers.consume.decode import Decoder
from workers.ports import Completion, Judgement

pytestmark = pytest.mark.anyio


def make_bench(**settings: float) -> Bench:
    """Make a bench whose waits move its clock."""
    bench = Bench(WorkerSettings.model_validate(settings))
    bench.clock.on_sleep = lambda: bench.clock.advance(5)
    return bench


def fail_for(bench: Bench, calls: int, *, category: str = "") -> None:
    """Have the detector raise for so many calls, or for those with an image of a category."""
    real = bench.detector.detect
    made = 0

    async def detect(images: Pixels, categories: Sequence[str], depths: Depths | None = None) -> Sequence[Judgement]:
        nonlocal made
        made += 1
        if made <= calls and (not category or category in categories):
            raise ValueError("an engine that raises")
        return await real(images, categories, depths)

    bench.detector.detect = detect  # type: ignore[method-assign]


async def test_engine_that_raises_for_everything_makes_no_image_poison() -> None:
    bench = make_bench(max_deliveries=1)
    fail_for(bench, 10_000)
    bench.stream.add(*(image_entry(number) for number in range(3)))
    assert await bench.worker.run_once() == 0
    assert [pending.entry.deliveries for pending in bench.stream.pending.values()] == [0, 0, 0]
    for _ in range(3):
        bench.clock.advance(60)
        await bench.worker.sweep()
    assert bench.stream.ended == []


async def test_batch_waits_in_its_slot_until_the_engine_works_again() -> None:
    bench = make_bench()
    fail_for(bench, 9)
    bench.stream.add(*(image_entry(number) for number in range(3)))
    assert await bench.worker.run_once() == 3
    assert len(bench.results) == 3
    assert bench.worker.stats.retries > 0


async def test_category_whose_engine_raises_waits_and_the_others_are_judged() -> None:
    bench = make_bench(max_deliveries=1)
    fail_for(bench, 10_000, category="cable")
    bench.stream.add(image_entry(0), image_entry(1, category="cable"), image_entry(2), image_entry(3, category="cable"))
    assert await bench.worker.run_once() == 2
    assert set(bench.results) == {entry_id(0), entry_id(2)}
    assert [pending.entry.deliveries for pending in bench.stream.pending.values()] == [0, 0]
    assert bench.worker.stats.deferred == 2


async def test_image_that_fails_alone_is_counted_though_it_is_the_only_one() -> None:
    bench = make_bench(max_deliveries=1)
    bench.detector.poisonous = {66}
    bench.stream.add(image_entry(0, image=png(66)))
    await bench.worker.run_once()
    bench.clock.advance(60)
    await bench.worker.sweep()
    assert bench.dead[entry_id(0)].reason is Reason.POISON


def refuse(bench: Bench, calls: int, *refused: str) -> None:
    """Have the server refuse outcomes of these entries, for so many calls."""
    real = bench.sink.publish
    made = 0

    async def publish(completions: Sequence[Completion]) -> list[bool]:
        nonlocal made
        made += 1
        if made <= calls and {completion.entry_id for completion in completions} & set(refused):
            raise ValueError("WRONGTYPE Operation against a key holding the wrong kind of value")
        return await real(completions)

    bench.sink.publish = publish  # type: ignore[method-assign]


async def test_server_that_refuses_every_outcome_makes_no_image_poison() -> None:
    bench = make_bench(max_deliveries=1)
    refuse(bench, 10_000, *(entry_id(number) for number in range(3)))
    bench.stream.add(*(image_entry(number) for number in range(3)))
    assert await bench.worker.run_once() == 0
    assert [pending.entry.deliveries for pending in bench.stream.pending.values()] == [0, 0, 0]


async def test_outcomes_are_written_once_the_server_takes_them_again() -> None:
    bench = make_bench()
    refuse(bench, 9, *(entry_id(number) for number in range(3)))
    bench.stream.add(*(image_entry(number) for number in range(3)))
    assert await bench.worker.run_once() == 3
    assert len(bench.detector.batches) == 1


async def test_outcome_that_is_refused_alone_is_counted_and_the_others_are_written() -> None:
    bench = make_bench()
    refuse(bench, 10_000, entry_id(1))
    bench.stream.add(*(image_entry(number) for number in range(3)))
    assert await bench.worker.run_once() == 2
    assert bench.stream.pending[entry_id(1)].entry.deliveries == 1


async def test_decoder_that_fails_for_everything_makes_no_image_poison(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = make_bench()

    def broken(*_: object) -> None:
        raise MemoryError("no memory")

    monkeypatch.setattr(Decoder, "_decode_bytes", broken)
    bench.stream.add(image_entry(0), image_entry(1))
    assert await bench.worker.run_once() == 0
    assert [pending.entry.deliveries for pending in bench.stream.pending.values()] == [0, 0]


async def test_detector_that_hangs_ends_the_worker_and_the_delivery_counts() -> None:
    bench = Bench(WorkerSettings(stage_timeout_s=0.05, drain_s=0.1))
    bench.detector.gate.clear()
    bench.stream.add(image_entry(0))
    stop = asyncio.Event()
    with pytest.raises(StageTimeoutError):
        await bench.worker.run(stop)
    assert stop.is_set()
    pending = bench.stream.pending[entry_id(0)]
    assert pending.entry.deliveries == 1


async def test_image_that_hangs_every_time_ends_as_poison_by_another_worker() -> None:
    first = Bench(WorkerSettings(stage_timeout_s=0.05, drain_s=0.1))
    first.detector.gate.clear()
    first.stream.add(image_entry(0))
    with pytest.raises(StageTimeoutError):
        await first.worker.run(asyncio.Event())
    second = Bench(WorkerSettings(max_deliveries=1), first.stream)
    assert isinstance(second.reader, FakeReader)
    first.clock.advance(61)
    assert await second.worker.sweep() == 1
    assert second.dead[entry_id(0)].reason is Reason.POISON
