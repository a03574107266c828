"""Streams labelled images through a running service and records the outcome and latency of each."""

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
from workers.redis.connection import make_client

_MAX_IN_FLIGHT = 32
"""Images in flight: two batches of a worker, so that the latency is not that of a long queue."""
_TIMEOUT_S = 60.0
"""Longest time without any outcome."""


@dataclass
class RoundTrip:
    """Outcomes of a set of pushed images, by message id.

    Attributes:
        samples: The pushed images.
        pushed_at: Time of the push, seconds of a monotonic clock.
        completed_at: Time of the first outcome, seconds of the same clock.
        results: Images whose outcome is a result.
        dead: Images whose outcome is a dead letter.
        duplicates: Number of outcomes after the first of an image.
    """

    samples: dict[str, Sample] = field(default_factory=dict)
    pushed_at: dict[str, float] = field(default_factory=dict)
    completed_at: dict[str, float] = field(default_factory=dict)
    results: dict[str, DetectionResult] = field(default_factory=dict)
    dead: dict[str, DeadLetter] = field(default_factory=dict)
    duplicates: int = 0

    @property
    def lost(self) -> int:
        """Count the images without an outcome."""
        return len(self.pushed_at) - len(self.completed_at)

    def record(self, message_id: str, outcome: DetectionResult | DeadLetter) -> bool:
        """Record an outcome; return whether it is the first of one of the pushed images."""
        if message_id not in self.pushed_at:
            return False
        if message_id in self.completed_at:
            self.duplicates += 1
            return False
        self.completed_at[message_id] = time.perf_counter()
        if isinstance(outcome, DetectionResult):
            self.results[message_id] = outcome
        else:
            self.dead[message_id] = outcome
        return True

    def latency_ms(self, quantile: float, category: str | None = None) -> float:
        """Return a quantile of the time from push to result, in milliseconds; NaN without results."""
        times = [
            (self.completed_at[key] - self.pushed_at[key]) * 1000
            for key, result in self.results.items()
            if category in (None, result.category)
        ]
        return float(np.quantile(times, quantile)) if times else float("nan")

    def images_per_s(self, category: str | None = None) -> float:
        """Return the throughput between the first push and the last outcome, of one category or of all."""
        if not self.completed_at:
            return 0.0
        first, last = next(iter(self.pushed_at.values())), next(reversed(self.completed_at.values()))  # in time order
        count = (
            len(self.results)
            if category is None
            else sum(category == result.category for result in self.results.values())
        )
        return count / (last - first)

    def metrics(self) -> dict[str, EvaluationMetrics]:
        """Compute each category's metrics from its results and labels, at the threshold that the results report."""
        metrics = {}
        for category in sorted({result.category for result in self.results.values()}):
            results = {key: result for key, result in self.results.items() if result.category == category}
            metrics[category] = summarise(
                np.array([result.score for result in results.values()]),
                [self.samples[key].defect if self.samples[key].anomalous else None for key in results],
                next(iter(results.values())).threshold,
            )
        return metrics


async def stream_samples(settings: Settings, samples: Sequence[tuple[str, Sample]]) -> RoundTrip:
    """Push all samples, with a bounded number in flight, and read until each has an outcome and the streams are quiet.

    Args:
        settings: Settings of the running service.
        samples: (category, sample) in the order in which to push them.
    """
    trip = RoundTrip()
    slots = asyncio.Semaphore(_MAX_IN_FLIGHT)
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
                    if trip.record(key, outcome):
                        slots.release()
                        bars.update(task, completed=len(trip.completed_at), rate=trip.images_per_s())

            readers = [asyncio.create_task(read(results)), asyncio.create_task(read(dead))]
            try:
                for number, (category, sample) in enumerate(samples):
                    await asyncio.wait_for(slots.acquire(), _TIMEOUT_S)
                    key = f"{category}-{number:05d}"
                    data = await asyncio.to_thread(sample.path.read_bytes)
                    trip.samples[key], trip.pushed_at[key] = sample, time.perf_counter()
                    await producer.push(data, category, id=key, wait_s=_TIMEOUT_S)
                await _wait_until_quiet(settings, trip)
            except TimeoutError:
                err.print(f"[bold red]no outcome for {_TIMEOUT_S:g} s; {trip.lost} images are missing[/]")
            finally:
                for reader in readers:
                    reader.cancel()
                await asyncio.gather(*readers, return_exceptions=True)
    return trip


async def _wait_until_quiet(settings: Settings, trip: RoundTrip) -> None:
    """Wait until every image has an outcome, the images stream is empty, and all written outcomes have been read.

    Raises:
        TimeoutError: No outcome came for `_TIMEOUT_S`.
    """
    keys = StreamKeys(prefix=settings.redis.prefix)
    async with make_client(settings.redis) as client:
        completed, changed_s = -1, time.perf_counter()
        while trip.lost or await client.xlen(keys.images):
            if len(trip.completed_at) != completed:
                completed, changed_s = len(trip.completed_at), time.perf_counter()
            elif time.perf_counter() - changed_s > _TIMEOUT_S:
                raise TimeoutError
            await asyncio.sleep(0.05)
        written = await client.xlen(keys.results) + await client.xlen(keys.dead)
        while len(trip.completed_at) + trip.duplicates < written:
            if time.perf_counter() - changed_s > _TIMEOUT_S:
                raise TimeoutError
            await asyncio.sleep(0.05)
