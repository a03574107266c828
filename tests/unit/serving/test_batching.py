"""Drain-when-free batching, with a `run` that a test holds and lets go."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from flawstream.imaging.pixels import Pixels
from schemas.errors import DetectorOverloadedError, ShapeError
from serving.batching import BatchBound, DrainBatcher

pytestmark = pytest.mark.anyio

Outputs = list[tuple[int, str]]


class Run:
    """Gives each image's number beside its tag. While `gate` is clear a batch waits; `started` counts batches begun."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.failures: list[Exception] = []
        self.started = threading.Semaphore(0)
        self.gate = threading.Event()
        self.gate.set()
        self.missing = 0
        self.fits = 1000

    def __call__(self, images: Pixels, tags: Sequence[str]) -> Outputs:
        numbers = [int(image[0, 0, 0]) for image in images]
        self.batches.append(numbers)
        self.started.release()
        self.gate.wait()
        if len(numbers) > self.fits:
            raise MemoryError(f"{len(numbers)} images")
        if self.failures:
            raise self.failures.pop(0)
        return list(zip(numbers, tags, strict=True))[self.missing :]

    async def begun(self) -> None:
        """Wait until one more batch has begun."""
        await asyncio.to_thread(self.started.acquire)


def images(*numbers: int) -> NDArray[np.uint8]:
    return np.array(numbers, np.uint8).reshape(-1, 1, 1, 1).repeat(3, axis=3)


def tags(*numbers: int) -> list[str]:
    return [f"tag {number}" for number in numbers]


def expected(*numbers: int) -> Outputs:
    return list(zip(numbers, tags(*numbers), strict=True))


@asynccontextmanager
async def batching(
    run: Run, *, concurrent_batches: int = 1, max_batch_images: int = 4, max_queue_images: int = 100
) -> AsyncIterator[DrainBatcher[str, tuple[int, str]]]:
    batcher = DrainBatcher(
        run,
        concurrent_batches=concurrent_batches,
        max_batch_images=max_batch_images,
        max_queue_images=max_queue_images,
    )
    batcher.start()
    try:
        yield batcher
    finally:
        run.gate.set()
        await batcher.stop()


async def submit(batcher: DrainBatcher[str, tuple[int, str]], *numbers: int) -> Outputs:
    return await batcher.submit(images(*numbers), tags(*numbers))


async def submitted(batcher: DrainBatcher[str, tuple[int, str]], *numbers: int) -> "asyncio.Task[Outputs]":
    """Submit, and come back once it stands in the queue."""
    task = asyncio.create_task(submit(batcher, *numbers))
    await asyncio.sleep(0)
    return task


async def test_idle_batcher_starts_at_once_with_what_there_is() -> None:
    run = Run()
    async with batching(run) as batcher:
        assert await submit(batcher, 7) == expected(7)
    assert run.batches == [[7]]


async def test_what_arrives_while_a_batch_runs_becomes_one_batch() -> None:
    run = Run()
    run.gate.clear()
    async with batching(run) as batcher:
        first = await submitted(batcher, 1)
        await run.begun()
        others = [await submitted(batcher, number) for number in (2, 3, 4)]
        assert batcher.queued_images == 3
        run.gate.set()
        assert await asyncio.gather(first, *others) == [expected(number) for number in (1, 2, 3, 4)]
        assert batcher.queued_images == 0
    assert run.batches == [[1], [2, 3, 4]]
    assert (batcher.batches, batcher.images) == (2, 4)


async def test_groups_are_never_in_one_batch_and_the_one_that_waits_longest_comes_first() -> None:
    run = Run()
    run.gate.clear()
    odd_even = DrainBatcher(run, group=lambda tag: int(tag[4:]) % 2, max_batch_images=4, max_queue_images=100)
    odd_even.start()
    first = await submitted(odd_even, 8)
    await run.begun()
    others = [await submitted(odd_even, *numbers) for numbers in ((1, 3), (2, 4, 5), (7, 9))]
    assert odd_even.queued_images == 7
    run.gate.set()
    answers = await asyncio.gather(first, *others)
    await odd_even.stop()
    assert answers == [expected(8), expected(1, 3), expected(2, 4, 5), expected(7, 9)]
    assert run.batches == [[8], [1, 3, 5, 7], [2, 4], [9]]


@given(
    calls=st.lists(st.lists(st.integers(0, 255), max_size=9), max_size=12),
    max_batch_images=st.integers(1, 6),
    concurrent_batches=st.integers(1, 3),
)
async def test_outputs_come_back_to_their_caller_in_order(
    calls: list[list[int]], max_batch_images: int, concurrent_batches: int
) -> None:
    run = Run()
    async with batching(
        run, concurrent_batches=concurrent_batches, max_batch_images=max_batch_images, max_queue_images=1000
    ) as batcher:
        outputs = await asyncio.gather(*(submit(batcher, *numbers) for numbers in calls))
    assert outputs == [expected(*numbers) for numbers in calls]
    assert all(len(batch) <= max_batch_images for batch in run.batches)
    assert sum(map(len, run.batches)) == sum(map(len, calls))


async def test_call_larger_than_a_batch_is_split_and_put_together() -> None:
    run = Run()
    async with batching(run, max_batch_images=4) as batcher:
        assert await submit(batcher, *range(10)) == expected(*range(10))
    assert run.batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


async def test_second_batch_begins_while_the_first_runs_and_what_comes_then_waits() -> None:
    run = Run()
    run.gate.clear()
    async with batching(run, concurrent_batches=2) as batcher:
        under_way = [await submitted(batcher, 1)]
        await run.begun()
        under_way.append(await submitted(batcher, 2))
        await run.begun()
        waiting = [await submitted(batcher, 3), await submitted(batcher, 4)]
        await asyncio.sleep(0)
        assert batcher.queued_images == 2
        run.gate.set()
        assert await asyncio.gather(*under_way, *waiting) == [expected(number) for number in (1, 2, 3, 4)]
    assert run.batches == [[1], [2], [3, 4]]
    assert (batcher.batches, batcher.images) == (3, 4)


async def test_split_call_whose_last_part_is_done_first_is_put_together_in_order() -> None:
    first_may_end = threading.Event()

    def run(images: Pixels, tags: Sequence[str]) -> Outputs:
        numbers = [int(image[0, 0, 0]) for image in images]
        if 0 in numbers:
            first_may_end.wait()
        else:
            first_may_end.set()
        return list(zip(numbers, tags, strict=True))

    batcher = DrainBatcher(run, concurrent_batches=2, max_batch_images=2, max_queue_images=100)
    batcher.start()
    assert await submit(batcher, *range(4)) == expected(*range(4))
    await batcher.stop()


async def test_time_of_batches_that_run_at_once_counts_once() -> None:
    run = Run()
    run.gate.clear()
    began_s = time.perf_counter()
    async with batching(run, concurrent_batches=2) as batcher:
        calls = [await submitted(batcher, 1), await submitted(batcher, 2)]
        await run.begun()
        await run.begun()
        await asyncio.sleep(0.05)
        assert batcher.detect_s == 0, "no batch has ended"
        assert 0.05 <= batcher.longest_run_s <= time.perf_counter() - began_s
        assert 0.05 <= batcher.busy_s <= time.perf_counter() - began_s
        run.gate.set()
        await asyncio.gather(*calls)
    assert 0.05 <= batcher.detect_s <= time.perf_counter() - began_s
    assert batcher.busy_s == batcher.detect_s
    assert batcher.longest_run_s == 0


async def test_call_larger_than_the_queue_is_taken_where_nothing_waits() -> None:
    async with batching(Run(), max_queue_images=2) as batcher:
        assert await submit(batcher, *range(10)) == expected(*range(10))


async def test_empty_call_is_answered_without_a_batch() -> None:
    run = Run()
    async with batching(run) as batcher:
        assert await batcher.submit(images()[:0], []) == []
    assert run.batches == []


async def test_full_queue_refuses_and_those_who_wait_are_served() -> None:
    run = Run()
    run.gate.clear()
    async with batching(run, max_queue_images=3) as batcher:
        first = await submitted(batcher, 1)
        await run.begun()
        waiting = await submitted(batcher, 2, 3)
        with pytest.raises(DetectorOverloadedError, match=r"2 images wait and 3 may.*max_queue_images"):
            await submit(batcher, 4, 5)
        run.gate.set()
        assert [await first, await waiting] == [expected(1), expected(2, 3)]
    assert run.batches == [[1], [2, 3]]


async def test_failing_batch_fails_only_its_own_callers_and_the_loop_goes_on() -> None:
    run = Run()
    run.gate.clear()
    run.failures = [ValueError("broken")]
    async with batching(run) as batcher:
        first = await submitted(batcher, 1)
        await run.begun()
        others = [await submitted(batcher, 2), await submitted(batcher, 3)]
        run.gate.set()
        with pytest.raises(ValueError, match="broken"):
            await first
        assert await asyncio.gather(*others) == [expected(2), expected(3)]
        assert batcher.alive
    assert run.batches == [[1], [2, 3]]


async def test_rest_of_a_split_call_is_dropped_once_a_part_of_it_failed() -> None:
    run = Run()
    run.failures = [ValueError("broken")]
    async with batching(run, max_batch_images=2) as batcher:
        with pytest.raises(ValueError, match="broken"):
            await submit(batcher, *range(6))
        assert await submit(batcher, 9) == expected(9)
        assert batcher.queued_images == 0
    assert run.batches == [[0, 1], [9]]


async def test_images_of_different_sizes_fail_their_callers_and_not_the_loop() -> None:
    run = Run()
    run.gate.clear()
    async with batching(run) as batcher:
        first = await submitted(batcher, 1)
        await run.begun()
        small = await submitted(batcher, 2)
        large = asyncio.create_task(batcher.submit(np.zeros((1, 2, 2, 3), np.uint8), ["large"]))
        await asyncio.sleep(0)
        run.gate.set()
        assert await first == expected(1)
        assert [type(error) for error in await asyncio.gather(small, large, return_exceptions=True)] == 2 * [ValueError]
        assert await submit(batcher, 3) == expected(3)


async def test_outputs_that_are_missing_fail_the_callers_who_would_wait_for_ever() -> None:
    run = Run()
    run.missing = 1
    async with batching(run) as batcher:
        with pytest.raises(ShapeError, match="2 images were judged and 1 outputs"):
            await submit(batcher, 1, 2)


async def test_cancelled_caller_does_not_disturb_others() -> None:
    run = Run()
    run.gate.clear()
    async with batching(run) as batcher:
        first = await submitted(batcher, 1)
        await run.begun()
        gone, stays = await submitted(batcher, 2), await submitted(batcher, 3)
        gone.cancel()
        first.cancel()
        await asyncio.wait([gone, first])
        run.gate.set()
        assert await stays == expected(3)
        assert batcher.queued_images == 0
    assert gone.cancelled()
    assert run.batches == [[1], [3]]


async def test_cancelled_call_of_several_batches_does_not_hold_up_the_one_behind_it() -> None:
    run = Run()
    run.gate.clear()
    async with batching(run, max_batch_images=2) as batcher:
        first = await submitted(batcher, 1)
        await run.begun()
        gone, stays = await submitted(batcher, *range(10, 20)), await submitted(batcher, 3)
        gone.cancel()
        await asyncio.wait([gone])
        run.gate.set()
        assert await first == expected(1)
        assert await stays == expected(3)
    assert run.batches == [[1], [3]]


async def test_stop_refuses_those_who_wait_and_finishes_the_batch_under_way() -> None:
    run = Run()
    run.gate.clear()
    batcher = DrainBatcher(run, max_batch_images=2, max_queue_images=100)
    batcher.start()
    under_way = await submitted(batcher, 1)
    await run.begun()
    waiting = [await submitted(batcher, 2), await submitted(batcher, 3, 4, 5)]
    stopping = asyncio.create_task(batcher.stop())
    await asyncio.sleep(0)
    with pytest.raises(DetectorOverloadedError, match="does not run"):
        await submit(batcher, 6)
    run.gate.set()
    await stopping
    assert await under_way == expected(1)
    refused = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(error) for error in refused] == 2 * [DetectorOverloadedError]
    assert not batcher.alive
    assert run.batches == [[1]]


async def test_call_before_the_start_is_refused() -> None:
    batcher = DrainBatcher(Run(), max_batch_images=2, max_queue_images=100)
    with pytest.raises(DetectorOverloadedError, match="does not run"):
        await submit(batcher, 1)
    await batcher.stop()


async def test_stop_finishes_all_batches_under_way() -> None:
    run = Run()
    run.gate.clear()
    batcher = DrainBatcher(run, concurrent_batches=2, max_batch_images=2, max_queue_images=100)
    batcher.start()
    under_way = [await submitted(batcher, 1), await submitted(batcher, 2)]
    await run.begun()
    await run.begun()
    stopping = asyncio.create_task(batcher.stop())
    await asyncio.sleep(0)
    run.gate.set()
    await stopping
    assert await asyncio.gather(*under_way) == [expected(1), expected(2)]
    assert not batcher.alive


@given(fits=st.integers(1, 9), count=st.integers(1, 40))
async def test_batch_that_does_not_fit_in_memory_is_halved_until_it_does(fits: int, count: int) -> None:
    run = Run()
    run.fits = fits
    async with batching(run, max_batch_images=40) as batcher:
        assert await submit(batcher, *range(count)) == expected(*range(count))
        assert await submit(batcher, *range(count)) == expected(*range(count))
        assert (batcher.halvings > 0) == (count > fits)
    ran = [batch for batch in run.batches if len(batch) <= fits]
    assert [number for batch in ran for number in batch] == [*range(count), *range(count)]
    assert sum(len(batch) == count for batch in run.batches) <= 1 or count <= fits  # the second call knew better


async def test_where_not_even_one_image_fits_the_caller_may_come_back() -> None:
    run = Run()
    run.fits = 0
    async with batching(run) as batcher:
        with pytest.raises(DetectorOverloadedError, match=r"no memory for even one image .*max_resident_mb"):
            await submit(batcher, 1, 2, 3)
        run.fits = 1
        assert await submit(batcher, 4) == expected(4)


def test_larger_batches_are_tried_again_once_many_have_fitted() -> None:
    bound = BatchBound(32)
    bound.did_not_fit(32)
    assert bound.images == 16
    for _ in range(255):
        bound.ran(16, 0.1)
    assert bound.images == 16
    bound.ran(16, 0.1)
    assert bound.images == 32


def test_batches_are_as_large_as_the_target_time_allows() -> None:
    bound = BatchBound(32, target_s=0.1)
    assert bound.images == 32
    bound.ran(10, 0.1)
    assert bound.images == 10
    for _ in range(50):
        bound.ran(10, 0.2)
    assert bound.images == 5
    bound.ran(1, 100.0)
    assert bound.images == 1
