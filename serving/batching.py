"""Drain-when-free batching: an idle model starts at once; while it computes, the next batch fills.

No timer: waiting for a batch to fill costs latency when traffic is low and nothing is gained when it is high. Knows
nothing of models; it hands slices of what was submitted to one function, which runs in a thread, or in a few where it
may run at once. A batch that does not fit in memory is halved until it does.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np

from flawstream.imaging.pixels import Pixels
from flawstream.telemetry import metrics as m
from flawstream.telemetry.metrics import NO_METRICS, Metrics
from schemas.errors import DetectorOverloadedError, ShapeError

log = logging.getLogger(__name__)

_BATCHES_BEFORE_GROWTH = 256
"""So many batches must fit after one that did not before a larger one is tried: memory may be short for a while."""
_NEWEST_WEIGHT = 0.2
"""Of the newest batch in the moving average of the time an image takes."""

Tag = TypeVar("Tag")
Out = TypeVar("Out")


@dataclass(eq=False)
class _Request(Generic[Tag, Out]):
    images: Pixels
    tags: Sequence[Tag]
    done: "asyncio.Future[list[Out]]"
    taken: int = 0
    outputs: dict[int, Out] = field(default_factory=dict)
    since_s: float = field(default_factory=time.perf_counter)


class BatchBound:
    """How many images a batch may have now: what is allowed, what fits in memory, what is done in the target time.

    Several threads may teach it.

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
        """Tell the bound; at least 1."""
        if self._target_s is None or self._image_s is None:
            return self._fits
        return max(1, min(self._fits, int(self._target_s / self._image_s)))

    def ran(self, images: int, took_s: float) -> None:
        """Learn from a batch that went through."""
        image_s = took_s / images
        with self._learning:
            before = image_s if self._image_s is None else self._image_s
            self._image_s = before + _NEWEST_WEIGHT * (image_s - before)
            self._since_failure += 1
            if self._fits < self._most and self._since_failure >= _BATCHES_BEFORE_GROWTH:
                self._fits = min(self._most, 2 * self._fits)
                self._since_failure = 0

    def did_not_fit(self, images: int) -> None:
        """Learn from a batch for which there was no memory."""
        with self._learning:
            self._fits = min(self._fits, max(1, images // 2))
            self._since_failure = 0


class DrainBatcher(Generic[Tag, Out]):
    """Collects images of many calls into batches.

    Args:
        run: Takes (B, S, S, 3) images and B tags, gives B outputs. Runs in the batcher's threads. Where it
            raises `MemoryError` it is called again with halves.
        concurrent_batches: How many may run at once: so many threads.
        max_batch_images: Largest B.
        max_queue_images: Images waiting past which a call is refused.
        target_batch_s: How long a batch may take; batches are made smaller as images take longer. None sets no target.
        metrics: Where numbers go.

    Attributes:
        batches: Batches run.
        images: Images in them.
        halvings: How often a batch did not fit in memory.
        detect_s: Seconds in which a batch ran.
        calls_s: Seconds from a call's arrival to its answer, over all calls; those that overlap count each.
    """

    def __init__(
        self,
        run: Callable[[Pixels, Sequence[Tag]], list[Out]],
        *,
        concurrent_batches: int = 1,
        max_batch_images: int,
        max_queue_images: int,
        target_batch_s: float | None = None,
        metrics: Metrics = NO_METRICS,
    ) -> None:
        self._run = run
        self._metrics = metrics
        self._bound = BatchBound(max_batch_images, target_batch_s)
        self._max_queue = max_queue_images
        self._waiting: deque[_Request[Tag, Out]] = deque()
        self._queued_images = 0
        self._arrival = asyncio.Event()
        self._concurrent_batches = concurrent_batches
        self._threads = ThreadPoolExecutor(concurrent_batches, thread_name_prefix="detect")
        self._loops: list[asyncio.Task[None]] = []
        self._running = 0
        self._running_since_s = 0.0
        self._stopping = False
        self.batches = 0
        self.images = 0
        self.halvings = 0
        self.detect_s = 0.0
        self.calls_s = 0.0

    def start(self) -> None:
        """Begin to work; in a running event loop."""
        self._loops = [asyncio.create_task(self._work()) for _ in range(self._concurrent_batches)]

    async def stop(self) -> None:
        """Finish the batches under way, whose callers get their outputs; calls that still wait are refused."""
        self._stopping = True
        self._arrival.set()
        await asyncio.gather(*self._loops)
        for request in self._waiting:
            _fail(request, DetectorOverloadedError("the detector is stopping; call another replica"))
        self._waiting.clear()
        self._queued_images = 0
        self._threads.shutdown(wait=True)

    @property
    def alive(self) -> bool:
        """Tell whether all loops run."""
        return bool(self._loops) and not any(loop.done() for loop in self._loops) and not self._stopping

    @property
    def queued_images(self) -> int:
        """Tell how many images wait."""
        return self._queued_images

    async def submit(self, images: Pixels, tags: Sequence[Tag]) -> list[Out]:
        """Have images judged, together with those of other calls.

        Args:
            images: (N, S, S, 3).
            tags: N, handed to `run` beside the images.

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
        if self._queued_images and self._queued_images + len(images) > self._max_queue:
            self._metrics.add(m.DETECTOR_REFUSALS)
            raise DetectorOverloadedError(
                f"{self._queued_images} images wait and {self._max_queue} may; come back later, "
                "add replicas or raise detector.max_queue_images"
            )
        request: _Request[Tag, Out] = _Request(images, tags, asyncio.get_running_loop().create_future())
        self._waiting.append(request)
        self._queued_images += len(images)
        self._metrics.set(m.DETECTOR_QUEUE_IMAGES, self._queued_images)
        self._arrival.set()
        outputs = await request.done
        self.calls_s += time.perf_counter() - request.since_s
        return outputs

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while not self._stopping:
            parts = self._drain()
            if not parts:
                self._arrival.clear()
                await self._arrival.wait()
                continue
            tags = [tag for request, rows in parts for tag in request.tags[rows]]
            began_s = self._begin()
            try:
                pieces = [request.images[rows] for request, rows in parts]
                images = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
                outputs = await loop.run_in_executor(self._threads, self._run_what_fits, images, tags)
                if len(outputs) != len(images):
                    raise ShapeError(f"{len(images)} images were judged and {len(outputs)} outputs came back")  # noqa: TRY301 - it belongs to the callers, as any other failure does
            except Exception as error:  # noqa: BLE001 - whatever it was, it belongs to those who wait for it
                for request, _ in parts:
                    _fail(request, error)
                continue
            finally:
                self._end()
            self._count(len(images), began_s - parts[0][0].since_s, time.perf_counter() - began_s)
            remaining = iter(outputs)
            for request, rows in parts:
                request.outputs |= zip(range(rows.start, rows.stop), remaining, strict=False)
                if len(request.outputs) == len(request.images) and not request.done.done():
                    request.done.set_result([request.outputs[row] for row in range(len(request.images))])

    def _begin(self) -> float:
        now_s = time.perf_counter()
        if not self._running:
            self._running_since_s = now_s
        self._running += 1
        return now_s

    def _end(self) -> None:
        self._running -= 1
        if not self._running:
            self.detect_s += time.perf_counter() - self._running_since_s

    def _count(self, images: int, waited_s: float, took_s: float) -> None:
        """Note a batch, and how long the first of its calls had waited for it."""
        self.batches += 1
        self.images += images
        self._metrics.observe(m.BATCH_IMAGES, images, stage="detect")
        self._metrics.observe(m.STAGE_SECONDS, waited_s, stage="wait")
        self._metrics.observe(m.STAGE_SECONDS, took_s, stage="detect")
        self._metrics.set(m.DETECTOR_QUEUE_IMAGES, self._queued_images)

    def _run_what_fits(self, images: Pixels, tags: Sequence[Tag]) -> list[Out]:
        """Run a batch, in halves where it does not fit in memory."""
        began_s = time.perf_counter()
        try:
            outputs = self._run(images, tags)
        except MemoryError as error:
            if len(images) == 1:
                raise DetectorOverloadedError(
                    f"there is no memory for even one image ({error}); lower detector.max_resident_mb, or give the "
                    "detector more memory"
                ) from error
            # halves are tried after this block: with the exception goes what the failed run held
            self.halvings += 1
            self._metrics.add(m.HALVINGS)
            self._bound.did_not_fit(len(images))
            log.warning("a batch of %d images does not fit in memory (%s): halved", len(images), error)
        else:
            self._bound.ran(len(images), time.perf_counter() - began_s)
            return outputs
        half = len(images) // 2
        return self._run_what_fits(images[:half], tags[:half]) + self._run_what_fits(images[half:], tags[half:])

    def _drain(self) -> list[tuple[_Request[Tag, Out], slice]]:
        """Take up to a batch's worth from the front of the queue; calls larger than the rest of it are split.

        Returns:
            Calls, and which of their rows are in this batch.
        """
        parts: list[tuple[_Request[Tag, Out], slice]] = []
        room = self._bound.images
        while room and self._waiting:
            request = self._waiting[0]
            if request.done.done():  # failed with an earlier part, or its caller has gone
                self._queued_images -= len(request.images) - request.taken
                self._waiting.popleft()
                continue
            first, last = request.taken, min(request.taken + room, len(request.images))
            self._queued_images -= last - first
            room -= last - first
            request.taken = last
            if last == len(request.images):
                self._waiting.popleft()
            parts.append((request, slice(first, last)))
        return parts


def _fail(request: _Request[Any, Any], error: Exception) -> None:
    if not request.done.done():
        request.done.set_exception(error)
