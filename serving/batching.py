"""Dynamic batching without a timer: an idle model starts at once; while it computes, the next batch fills.

Waiting for a batch to fill adds latency when traffic is low and gains nothing when it is high. Knows nothing of models:
batches go to one function, which runs in a thread, or in a few where it may run at once. A batch that does not fit in
memory is halved until it does.
"""

import asyncio
import logging
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Generic, TypeVar

import numpy as np

from flawstream.imaging.pixels import Pixels
from flawstream.telemetry import metrics as m
from flawstream.telemetry.metrics import NO_METRICS, Metrics
from schemas.errors import DetectorOverloadedError, ShapeError

log = logging.getLogger(__name__)

_BATCHES_BEFORE_GROWTH = 256
"""After a batch that did not fit, so many must fit before a larger one is tried: memory may be short for a while."""
_NEWEST_WEIGHT = 0.2
"""Of the newest batch in the moving average of the time an image takes."""

Tag = TypeVar("Tag")
Out = TypeVar("Out")


@dataclass(eq=False, slots=True)
class _Call:
    images: Pixels
    since_s: float


@dataclass(eq=False, slots=True)
class _Item(Generic[Tag, Out]):
    """One image that waits: a row of its call's images, its tag, and the future of its output."""

    call: _Call
    row: int
    tag: Tag
    output: "asyncio.Future[Out]"


class BatchBound:
    """How many images a batch may have now: what is allowed, what fits in memory, what is done in the target time.

    Thread-safe.

    Args:
        most: Never more than these.
        target_s: How long a batch may take; None sets no target.
    """

    def __init__(self, most: int, target_s: float | None = None) -> None:
        self._most = most
        self._target_s = target_s
        self._fits = most
        self._since_failure = 0
        self._image_s: float | None = None
        self._learning = threading.Lock()

    @property
    def images(self) -> int:
        """Return the bound; at least 1."""
        if self._target_s is None or self._image_s is None:
            return self._fits
        return max(1, min(self._fits, int(self._target_s / self._image_s)))

    def ran(self, images: int, took_s: float) -> None:
        """Learn from a batch that was run."""
        image_s = took_s / images
        with self._learning:
            before = image_s if self._image_s is None else self._image_s
            self._image_s = before + _NEWEST_WEIGHT * (image_s - before)
            self._since_failure += 1
            if self._fits < self._most and self._since_failure >= _BATCHES_BEFORE_GROWTH:
                self._fits = min(self._most, 2 * self._fits)
                self._since_failure = 0

    def did_not_fit(self, images: int) -> None:
        """Learn from a batch that did not fit in memory."""
        with self._learning:
            self._fits = min(self._fits, max(1, images // 2))
            self._since_failure = 0


class DrainBatcher(Generic[Tag, Out]):
    """Collects images of many calls into batches, each of one group of tags; the group that waits longest comes first.

    Args:
        run: Takes (B, S, S, 3) images and B tags, gives B outputs. Runs in the batcher's threads. Where it
            raises `MemoryError` it is called again with halves.
        group: Gives the group of a tag: images of different groups are never in one batch.
        concurrent_batches: How many may run at once: so many threads.
        max_batch_images: Largest B.
        max_queue_images: Images waiting past which a call is refused.
        target_batch_s: How long a batch may take; batches are made smaller as images take longer. None sets no target.
        metrics: Where numbers go.

    Attributes:
        batches: Batches run.
        images: Images in them.
        halvings: How often a batch did not fit in memory.
        detect_s: Seconds in which a batch ran, until none did.
        calls_s: Seconds from a call's arrival to its answer, over all calls; those that overlap count each.
    """

    def __init__(
        self,
        run: Callable[[Pixels, Sequence[Tag]], list[Out]],
        *,
        group: Callable[[Tag], Hashable] = lambda _tag: None,
        concurrent_batches: int = 1,
        max_batch_images: int,
        max_queue_images: int,
        target_batch_s: float | None = None,
        metrics: Metrics = NO_METRICS,
    ) -> None:
        self._run = run
        self._metrics = metrics
        self._group = group
        self._bounds: defaultdict[Hashable, BatchBound] = defaultdict(
            lambda: BatchBound(max_batch_images, target_batch_s)
        )
        self._max_queue = max_queue_images
        self._waiting: defaultdict[Hashable, deque[_Item[Tag, Out]]] = defaultdict(deque)
        self._arrival = asyncio.Event()
        self._concurrent_batches = concurrent_batches
        self._threads = ThreadPoolExecutor(concurrent_batches, thread_name_prefix="detect")
        self._loops: list[asyncio.Task[None]] = []
        self._running: list[float] = []
        """When each batch that runs now began."""
        self._running_since_s = 0.0
        self._stopping = False
        self.batches = 0
        self.images = 0
        self.halvings = 0
        self.detect_s = 0.0
        self.calls_s = 0.0

    def start(self) -> None:
        """Start; in a running event loop."""
        self._loops = [asyncio.create_task(self._work()) for _ in range(self._concurrent_batches)]

    async def stop(self) -> None:
        """Finish the batches that run, whose callers get their outputs; calls that wait are refused."""
        self._stopping = True
        self._arrival.set()
        await asyncio.gather(*self._loops)
        _fail(self._all_waiting(), DetectorOverloadedError("the detector is stopping; call another replica"))
        self._waiting.clear()
        self._threads.shutdown(wait=True)

    @property
    def alive(self) -> bool:
        """Return whether all loops run."""
        return bool(self._loops) and not any(loop.done() for loop in self._loops) and not self._stopping

    @property
    def queued_images(self) -> int:
        """Return how many images wait."""
        return sum(map(len, self._waiting.values()))

    @property
    def longest_run_s(self) -> float:
        """Return the seconds for which the oldest of the batches that run now has run; 0 if none does."""
        return time.perf_counter() - min(self._running) if self._running else 0.0

    @property
    def busy_s(self) -> float:
        """Return the seconds in which a batch ran, those that run now included."""
        running_s = time.perf_counter() - self._running_since_s if self._running else 0.0
        return self.detect_s + running_s

    async def submit(self, images: Pixels, tags: Sequence[Tag]) -> list[Out]:
        """Have images judged, together with those of other calls.

        Args:
            images: (N, S, S, 3).
            tags: N, passed to `run` with the images.

        Returns:
            N outputs, in order.

        Raises:
            DetectorOverloadedError: The queue is full, or the batcher is stopping.
        """
        if not len(images):
            return []
        if not self.alive:
            raise DetectorOverloadedError("the detector does not run; call another replica")
        # an empty queue takes any call, so that one larger than the bound is served and not refused for ever
        waiting = self.queued_images
        if waiting and waiting + len(images) > self._max_queue:
            self._metrics.add(m.DETECTOR_REFUSALS)
            raise DetectorOverloadedError(
                f"{waiting} images wait and {self._max_queue} may; come back later, "
                "add replicas or raise detector.max_queue_images"
            )
        call = _Call(images, time.perf_counter())
        loop = asyncio.get_running_loop()
        items: list[_Item[Tag, Out]] = [_Item(call, row, tag, loop.create_future()) for row, tag in enumerate(tags)]
        for item in items:
            self._waiting[self._group(item.tag)].append(item)
        self._metrics.set(m.DETECTOR_QUEUE_IMAGES, self.queued_images)
        self._arrival.set()
        try:
            outputs = await asyncio.gather(*(item.output for item in items))
        finally:
            for item in items:  # where the caller has gone, they are not to be run
                item.output.cancel()
        self.calls_s += time.perf_counter() - call.since_s
        return outputs

    async def _work(self) -> None:
        while not self._stopping:
            batch = self._next_batch()
            if batch:
                await self._judge(batch)
            else:
                self._arrival.clear()
                await self._arrival.wait()

    async def _judge(self, batch: list[_Item[Tag, Out]]) -> None:
        """Run a batch; afterwards nothing here refers to its tags, which may keep models in memory."""
        began_s = self._begin()
        try:
            run = partial(self._run_what_fits, _stack(batch), [item.tag for item in batch])
            outputs = await asyncio.get_running_loop().run_in_executor(self._threads, run)
            if len(outputs) != len(batch):
                raise ShapeError(f"{len(batch)} images were judged and {len(outputs)} outputs came back")  # noqa: TRY301 - the callers get it, as any other failure
        except Exception as error:  # noqa: BLE001 - the callers get it, and the loop goes on
            calls = {item.call for item in batch}
            _fail([*batch, *(item for item in self._all_waiting() if item.call in calls)], error)
            return
        finally:
            self._end(began_s)
        self._count(len(batch), began_s - batch[0].call.since_s, time.perf_counter() - began_s)
        for item, output in zip(batch, outputs, strict=True):
            if not item.output.done():
                item.output.set_result(output)

    def _begin(self) -> float:
        now_s = time.perf_counter()
        if not self._running:
            self._running_since_s = now_s
        self._running.append(now_s)
        return now_s

    def _end(self, began_s: float) -> None:
        self._running.remove(began_s)
        if not self._running:
            self.detect_s += time.perf_counter() - self._running_since_s

    def _count(self, images: int, waited_s: float, took_s: float) -> None:
        """Count a batch, and how long its first image had waited for it."""
        self.batches += 1
        self.images += images
        self._metrics.observe(m.BATCH_IMAGES, images, stage="detect")
        self._metrics.observe(m.STAGE_SECONDS, waited_s, stage="wait")
        self._metrics.observe(m.STAGE_SECONDS, took_s, stage="detect")
        self._metrics.set(m.DETECTOR_QUEUE_IMAGES, self.queued_images)

    def _run_what_fits(self, images: Pixels, tags: Sequence[Tag]) -> list[Out]:
        """Run a batch, in halves where it does not fit in memory."""
        bound = self._bounds[self._group(tags[0])]
        began_s = time.perf_counter()
        try:
            outputs = self._run(images, tags)
        except MemoryError as error:
            if len(images) == 1:
                raise DetectorOverloadedError(
                    f"there is no memory for even one image ({error}); lower detector.max_resident_mb, or give the "
                    "detector more memory"
                ) from error
            # halves are tried after this block: the exception keeps the failed run's memory
            self.halvings += 1
            self._metrics.add(m.HALVINGS)
            bound.did_not_fit(len(images))
            log.warning("a batch of %d images does not fit in memory (%s): halved", len(images), error)
        else:
            bound.ran(len(images), time.perf_counter() - began_s)
            return outputs
        half = len(images) // 2
        return self._run_what_fits(images[:half], tags[:half]) + self._run_what_fits(images[half:], tags[half:])

    def _next_batch(self) -> list[_Item[Tag, Out]]:
        """Take as many images from the front of the queue that waits longest as a batch may have."""
        batch: list[_Item[Tag, Out]] = []
        while not batch and (groups := [group for group, queue in self._waiting.items() if queue]):
            group = min(groups, key=lambda one: self._waiting[one][0].call.since_s)
            queue, most = self._waiting[group], self._bounds[group].images
            while queue and len(batch) < most:
                item = queue.popleft()
                if not item.output.done():
                    batch.append(item)
        return batch

    def _all_waiting(self) -> Iterable[_Item[Tag, Out]]:
        return chain.from_iterable(self._waiting.values())


def _stack(batch: Sequence[_Item[Tag, Out]]) -> Pixels:
    """Return (B, S, S, 3): without a copy where all are neighbours in one call."""
    call, first = batch[0].call, batch[0].row
    if all(item.call is call and item.row == first + number for number, item in enumerate(batch)):
        return call.images[first : first + len(batch)]
    return np.stack([item.call.images[item.row] for item in batch])


def _fail(batch: Iterable[_Item[Tag, Out]], error: Exception) -> None:
    for item in batch:
        if not item.output.done():
            item.output.set_exception(error)
