"""Drain-when-free batching: an idle model starts at once; while it computes, the next batch fills.

No timer: waiting for a batch to fill costs latency when traffic is low and nothing is gained when it is high. Knows
nothing of models; it hands slices of what was submitted to one function, which runs in one thread.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from schemas.errors import DetectorOverloadedError, ShapeError

Tag = TypeVar("Tag")
Out = TypeVar("Out")


@dataclass(eq=False)
class _Request(Generic[Tag, Out]):
    images: NDArray[np.uint8]
    tags: Sequence[Tag]
    done: "asyncio.Future[list[Out]]"
    taken: int = 0
    outputs: list[Out] = field(default_factory=list)


class DrainBatcher(Generic[Tag, Out]):
    """Collects images of many calls into batches.

    Args:
        run: Takes (B, S, S, 3) uint8 images and B tags, gives B outputs. Runs in the batcher's one thread.
        max_batch_images: Largest B.
        max_queue_images: Images waiting past which a call is refused.

    Attributes:
        batches: Batches run.
        images: Images in them.
    """

    def __init__(
        self,
        run: Callable[[NDArray[np.uint8], Sequence[Tag]], list[Out]],
        *,
        max_batch_images: int,
        max_queue_images: int,
    ) -> None:
        self._run = run
        self._max_batch = max_batch_images
        self._max_queue = max_queue_images
        self._waiting: deque[_Request[Tag, Out]] = deque()
        self._queued_images = 0
        self._arrival = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="detect")
        self._loop_task: asyncio.Task[None] | None = None
        self._stopping = False
        self.batches = 0
        self.images = 0

    def start(self) -> None:
        """Begin to work; in a running event loop."""
        self._loop_task = asyncio.create_task(self._work())

    async def stop(self) -> None:
        """Finish the batch under way, whose callers get their outputs; calls that still wait are refused."""
        self._stopping = True
        self._arrival.set()
        if self._loop_task is not None:
            await self._loop_task
        for request in self._waiting:
            _fail(request, DetectorOverloadedError("the detector is stopping; call another replica"))
        self._waiting.clear()
        self._queued_images = 0
        self._thread.shutdown(wait=True)

    @property
    def alive(self) -> bool:
        """Tell whether the loop runs."""
        return self._loop_task is not None and not self._loop_task.done() and not self._stopping

    @property
    def queued_images(self) -> int:
        """Tell how many images wait."""
        return self._queued_images

    async def submit(self, images: NDArray[np.uint8], tags: Sequence[Tag]) -> list[Out]:
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
            raise DetectorOverloadedError(
                f"{self._queued_images} images wait and {self._max_queue} may; come back later, "
                "add replicas or raise detector.max_queue_images"
            )
        request: _Request[Tag, Out] = _Request(images, tags, asyncio.get_running_loop().create_future())
        self._waiting.append(request)
        self._queued_images += len(images)
        self._arrival.set()
        return await request.done

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while not self._stopping:
            parts = self._drain()
            if not parts:
                self._arrival.clear()
                await self._arrival.wait()
                continue
            tags = [tag for _, _, part_tags in parts for tag in part_tags]
            try:
                images = parts[0][1] if len(parts) == 1 else np.concatenate([images for _, images, _ in parts])
                outputs = await loop.run_in_executor(self._thread, self._run, images, tags)
                if len(outputs) != len(images):
                    raise ShapeError(f"{len(images)} images were judged and {len(outputs)} outputs came back")  # noqa: TRY301 - it belongs to the callers, as any other failure does
            except Exception as error:  # noqa: BLE001 - whatever it was, it belongs to those who wait for it
                for request, _, _ in parts:
                    _fail(request, error)
                continue
            self.batches += 1
            self.images += len(images)
            start = 0
            for request, part, _ in parts:
                request.outputs.extend(outputs[start : start + len(part)])
                start += len(part)
                if len(request.outputs) == len(request.images) and not request.done.done():
                    request.done.set_result(request.outputs)

    def _drain(self) -> list[tuple[_Request[Tag, Out], NDArray[np.uint8], Sequence[Tag]]]:
        """Take up to a batch's worth from the front of the queue; calls larger than the rest of it are split."""
        parts: list[tuple[_Request[Tag, Out], NDArray[np.uint8], Sequence[Tag]]] = []
        room = self._max_batch
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
            parts.append((request, request.images[first:last], request.tags[first:last]))
        return parts


def _fail(request: _Request[Any, Any], error: Exception) -> None:
    if not request.done.done():
        request.done.set_exception(error)
