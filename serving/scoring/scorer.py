"""Scores stored images with the stream worker's own pipeline. Knows no Ray and no Parquet."""

import asyncio
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from flawstream.registry.registry import Registry
from schemas.errors import MessageError, ModelUnavailableError, TransientError
from schemas.messages import DeadLetter, DetectionResult, MapCodec
from schemas.settings import Settings
from serving.scoring.listing import ListedImage
from serving.scoring.stored_images import read_image
from workers.consume.clock import SystemClock
from workers.consume.decode import Decoder
from workers.consume.pipeline import Pipeline
from workers.consume.retry import Retry
from workers.observe.tally import Tally
from workers.ports import Completion, Deferral, Detector, Entry, Refusal

_CLOCK = SystemClock()


class PinnedRegistry(Registry):
    """A registry whose current versions are given, so that a promotion changes nothing.

    Args:
        root: A folder or an fsspec URL.
        versions: By category.
    """

    def __init__(self, root: str, versions: dict[str, str]) -> None:
        super().__init__(root)
        self._versions = dict(versions)

    def current(self, category: str) -> str | None:
        """Return the category's given version, or None."""
        return self._versions.get(category)

    def currents(self) -> dict[str, str]:
        """Return the given versions."""
        return dict(self._versions)


class Scorer:
    """Scores stored images: each becomes a result, or a refusal with the reason.

    The images go through `workers.consume.pipeline` as the entries of a stream do, with the same batches in flight
    and the same limits, so that scores, verdicts and boxes are those of a worker.

    Args:
        detector: Judges images.
        settings: The sections `worker` and `limits`.
        maps: How maps are written.
        threads: CPU threads that decode.
    """

    def __init__(self, detector: Detector, settings: Settings, maps: MapCodec, threads: int) -> None:
        self._detector = detector
        self._max_bytes = settings.limits.max_image_bytes
        self._worker = settings.worker.model_copy(update={"map_codec": maps})
        self._stream = _MemoryStream()
        self._decoder = Decoder(settings.worker.decode_threads or threads, settings.limits, _CLOCK)
        self._readers = ThreadPoolExecutor(self._worker.batch_size, thread_name_prefix="flawstream-read")
        tally = Tally()
        self._pipeline = Pipeline(
            self._stream,
            self._stream,
            detector,
            self._decoder,
            _CLOCK,
            settings=self._worker,
            tally=tally,
            retry=Retry(_CLOCK, tally),
        )

    async def score(self, images: Sequence[ListedImage]) -> list[DetectionResult | Refusal]:
        """Score images.

        Returns:
            The outcome of each, in order.

        Raises:
            TransientError: The storage or the detector does not answer, or a version cannot be used.
        """
        self._stream.clear()
        slots = asyncio.Semaphore(self._worker.in_flight)
        size = self._worker.batch_size
        try:
            async with asyncio.TaskGroup() as batches:
                for first in range(0, len(images), size):
                    await slots.acquire()
                    batch = batches.create_task(self._score_batch(images[first : first + size], first))
                    batch.add_done_callback(lambda _: slots.release())
        except ExceptionGroup as group:
            raise group.exceptions[0] from None
        return [self._stream.outcomes[_entry_id(row)] for row in range(len(images))]

    def close(self) -> None:
        """End the threads."""
        self._decoder.close()
        self._readers.shutdown(wait=False, cancel_futures=True)

    async def _score_batch(self, images: Sequence[ListedImage], first: int) -> None:
        loop = asyncio.get_running_loop()
        attempts = await asyncio.gather(
            *(loop.run_in_executor(self._readers, self._read, image, first + row) for row, image in enumerate(images))
        )
        entries = [entry for entry in attempts if entry is not None]
        while entries:
            await self._pipeline.complete(entries)
            entries = [
                replace(entry, deliveries=entry.deliveries + 1)
                for entry in entries
                if entry.entry_id not in self._stream.outcomes
            ]
            for entry in entries:
                if entry.entry_id in self._stream.released:
                    await self._raise_cause(entry)

    def _read(self, image: ListedImage, row: int) -> Entry | None:
        """Read an image into an entry; None if it cannot be read, which is its outcome."""
        try:
            data = read_image(image.path, self._max_bytes)
        except MessageError as error:
            self._stream.outcomes[_entry_id(row)] = Refusal(error.reason, str(error))
            return None
        category = image.category.encode("utf-8", "surrogateescape")
        return Entry(_entry_id(row), {b"category": category, b"image": data})

    async def _raise_cause(self, entry: Entry) -> None:
        """Raise why an entry was released: its model cannot be used, or the detector does not answer."""
        category = entry.fields[b"category"].decode()
        (form,) = await self._detector.pixel_forms([category])
        image = np.zeros((1, *form.shape), form.dtype)
        (judgement,) = await self._detector.detect(image, [category])
        if isinstance(judgement, Deferral):
            raise ModelUnavailableError(judgement.detail)
        raise TransientError(
            f"the detector did not answer within {self._worker.claim_idle_ms / 1000:g} s; run the same command again"
        )


class _MemoryStream:
    """Stands for the stream server: keeps outcomes by entry id, and the ids of released entries."""

    def __init__(self) -> None:
        self.outcomes: dict[str, DetectionResult | Refusal] = {}
        self.released: set[str] = set()

    def clear(self) -> None:
        self.outcomes.clear()
        self.released.clear()

    async def publish(self, completions: Sequence[Completion]) -> list[bool]:
        for completion in completions:
            match completion.outcome:
                case DeadLetter(reason=reason, detail=detail):
                    self.outcomes[completion.entry_id] = Refusal(reason, detail)
                case result:
                    self.outcomes[completion.entry_id] = result
        return [True] * len(completions)

    async def release(self, ids: Collection[str], *, at_once: bool = True) -> None:
        del at_once
        self.released.update(ids)


def _entry_id(row: int) -> str:
    return f"0-{row}"
