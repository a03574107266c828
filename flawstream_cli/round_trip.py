"""Streams labelled images through a running service and keeps account of each: what came back, when, how often."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from flawstream_cli.terminal import err
from schemas.keys import StreamKeys
from schemas.manifest import EvaluationMetrics
from schemas.messages import DeadLetter, DetectionResult
from schemas.settings import Settings
from training.datasets.samples import Sample
from training.steps.evaluate import summarise
from workers.outcomes.results import DeadLetterReader, ResultReader
from workers.produce.producer import Producer
from workers.redis.scripts import make_client

_WINDOW = 32
"""Images under way at once: two batches of a worker, so that latency is not the length of a queue."""
_PATIENCE_S = 60.0


@dataclass
class RoundTrip:
    """What became of a set of images.

    Attributes:
        samples: What was pushed, by message id.
        sent: When, seconds of a monotonic clock, by message id.
        ended: When its first ending came back.
        results: The results, by message id.
        dead: The dead letters, by message id.
        duplicates: Endings beyond the first of an image.
    """

    samples: dict[str, Sample] = field(default_factory=dict)
    sent: dict[str, float] = field(default_factory=dict)
    ended: dict[str, float] = field(default_factory=dict)
    results: dict[str, DetectionResult] = field(default_factory=dict)
    dead: dict[str, DeadLetter] = field(default_factory=dict)
    duplicates: int = 0

    @property
    def lost(self) -> int:
        """Count the images that never ended."""
        return len(self.sent) - len(self.ended)

    def take(self, message_id: str, outcome: DetectionResult | DeadLetter) -> bool:
        """Note an ending; tells whether it is the image's first."""
        if message_id not in self.sent:
            return False
        if message_id in self.ended:
            self.duplicates += 1
            return False
        self.ended[message_id] = time.perf_counter()
        if isinstance(outcome, DetectionResult):
            self.results[message_id] = outcome
        else:
            self.dead[message_id] = outcome
        return True

    def latency_ms(self, quantile: float, category: str | None = None) -> float:
        """Give a quantile of the time from push to result as the producer sees it, milliseconds."""
        times = [
            (self.ended[key] - self.sent[key]) * 1000
            for key, result in self.results.items()
            if category in (None, result.category)
        ]
        return float(np.quantile(times, quantile)) if times else float("nan")

    def images_per_s(self, category: str | None = None) -> float:
        """Give the throughput from the first push to the last ending; of a category: its share of that."""
        if not self.ended:
            return 0.0
        first, last = next(iter(self.sent.values())), next(reversed(self.ended.values()))  # both in order of time
        count = (
            len(self.results)
            if category is None
            else sum(category == result.category for result in self.results.values())
        )
        return count / (last - first)

    def metrics(self) -> dict[str, EvaluationMetrics]:
        """Compare scores and labels, per category, at the threshold that results carry."""
        found = {}
        for name in sorted({result.category for result in self.results.values()}):
            of_name = {key: result for key, result in self.results.items() if result.category == name}
            found[name] = summarise(
                np.array([result.score for result in of_name.values()]),
                [self.samples[key].defect if self.samples[key].anomalous else None for key in of_name],
                next(iter(of_name.values())).threshold,
            )
        return found


async def stream_samples(settings: Settings, samples: Sequence[tuple[str, Sample]]) -> RoundTrip:
    """Push all samples, a bounded number under way at once, and read until each has ended and the streams are quiet.

    Args:
        settings: Of the running service.
        samples: (category, sample) in the order of pushing.
    """
    trip = RoundTrip()
    free = asyncio.Semaphore(_WINDOW)
    async with (
        Producer(settings.redis, settings.limits, settings.backlog) as producer,
        ResultReader(settings.redis) as results,
        DeadLetterReader(settings.redis) as dead,
    ):
        with Progress(
            TextColumn("streaming"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:.1f} img/s"),
            TimeRemainingColumn(),
            console=err,
            disable=not err.is_terminal,
        ) as bars:
            task = bars.add_task("streaming", total=len(samples), rate=0.0)

            async def read(reader: ResultReader | DeadLetterReader) -> None:
                async for _, outcome in reader:
                    key = (
                        outcome.id
                        if isinstance(outcome, DetectionResult)
                        else outcome.fields.get(b"id", b"").decode(errors="replace")
                    )
                    if trip.take(key, outcome):
                        free.release()
                        bars.update(task, completed=len(trip.ended), rate=trip.images_per_s())

            readers = [asyncio.create_task(read(results)), asyncio.create_task(read(dead))]
            try:
                for number, (category, sample) in enumerate(samples):
                    await asyncio.wait_for(free.acquire(), _PATIENCE_S)
                    key = f"{category}-{number:05d}"
                    data = await asyncio.to_thread(sample.path.read_bytes)
                    trip.samples[key], trip.sent[key] = sample, time.perf_counter()
                    await producer.push(data, category, id=key, wait_s=_PATIENCE_S)
                await _until_quiet(settings, trip)
            except TimeoutError:
                err.print(f"[bold red]no answer for {_PATIENCE_S:g} s; {trip.lost} images are missing[/]")
            finally:
                for reader in readers:
                    reader.cancel()
                await asyncio.gather(*readers, return_exceptions=True)
    return trip


async def _until_quiet(settings: Settings, trip: RoundTrip) -> None:
    """Wait until every image has ended, nothing is left on the images stream, and late duplicates would have come."""
    keys = StreamKeys(prefix=settings.redis.prefix)
    async with make_client(settings.redis) as client:
        seen, since = -1, time.perf_counter()
        while trip.lost or await client.xlen(keys.images):
            if len(trip.ended) != seen:
                seen, since = len(trip.ended), time.perf_counter()
            elif time.perf_counter() - since > _PATIENCE_S:
                raise TimeoutError
            await asyncio.sleep(0.05)
        written = await client.xlen(keys.results) + await client.xlen(keys.dead)
        while len(trip.ended) + trip.duplicates < written:
            if time.perf_counter() - since > _PATIENCE_S:
                raise TimeoutError
            await asyncio.sleep(0.05)
