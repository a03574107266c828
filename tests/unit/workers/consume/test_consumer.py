"""The way of an image through a worker, with fakes for everything around it."""

import asyncio

import cv2
import numpy as np
import pytest
from helpers.fakes import ARRIVED, FakeReader, entry_id, image_entry, png
from helpers.worker_bench import Bench

from schemas.errors import Reason
from schemas.messages import Verdict
from workers.ports import Entry, Refusal

pytestmark = pytest.mark.anyio


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


async def test_a_sweep_trims_the_results() -> None:
    bench = Bench()
    await bench.worker.sweep()
    assert bench.trims == 1


async def test_a_sweep_completes_and_counts_orphans() -> None:
    bench = Bench()
    bench.stream.add(image_entry(1), image_entry(2))
    await FakeReader(bench.stream, "removed").read(2, 1 << 30)
    for number in (1, 2):
        bench.stream.orphan(entry_id(number))
    assert await bench.worker.sweep() == 2
    assert set(bench.results) == {entry_id(1), entry_id(2)}
    assert bench.worker.stats.orphans == 2


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


async def test_files_of_sixteen_bits_are_read_by_the_depth_of_their_category() -> None:
    bench = Bench()
    bench.detector.bits = 12
    stored = np.full((8, 8), 50 * 16 + 7, np.uint16)
    bench.stream.add(image_entry(1, image=cv2.imencode(".png", stored)[1].tobytes()), image_entry(2))
    await bench.worker.run_once()
    assert bench.results[entry_id(1)].score == 0.5
    assert bench.detector.depths == [12, None]
