"""Images that cannot be judged now: they wait, and are never poison."""

import logging

import pytest
from helpers.fakes import entry_id, image_entry
from helpers.worker_bench import Bench

from schemas.errors import RegistryError
from schemas.settings import WorkerSettings
from workers.ports import Deferral

pytestmark = pytest.mark.anyio


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
