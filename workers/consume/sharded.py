"""One worker over all shards: a loop for each, with one decoder and one detector for all. Knows no Ray and no model."""

import asyncio
from collections import Counter
from dataclasses import fields

from flawstream.telemetry.metrics import NO_METRICS, Metrics
from flawstream.telemetry.traces import NO_TRACER, Tracer
from schemas.keys import all_keys
from schemas.settings import Settings
from workers.consume.clock import SystemClock
from workers.consume.decode import Decoder
from workers.consume.reader import RedisStreamReader
from workers.consume.sink import RedisResultSink
from workers.consume.worker import StreamWorker
from workers.observe.backlog import Backlog
from workers.observe.drift import DriftMonitor
from workers.observe.stream_gauges import StreamGauges, report_for_ever
from workers.observe.tally import Tally, WorkerStats
from workers.outcomes.retention import RedisRetention
from workers.ports import Detector
from workers.redis.connection import StreamConnection
from workers.references import ReferenceFetcher


class ShardedWorker:
    """The stream worker of a process. Without shards it has one loop.

    Every worker reads every shard, so that no shard depends on one worker. The batches in flight are divided among
    the loops, at least one each.

    Args:
        client: A client of the stream server or cluster.
        consumer: The worker's name in each group. A worker that restarts under its name resumes its pending entries.
            Where two workers have the same name, work is done twice, but each image still completes once.
        detector: Judges images.
        settings: The service's.
        metrics: Receives counts and times.
        tracer: Receives a span of each image.

    Raises:
        ConfigError: A package that an allowed reference needs is not installed.
    """

    def __init__(
        self,
        client: StreamConnection,
        consumer: str,
        detector: Detector,
        settings: Settings,
        metrics: Metrics = NO_METRICS,
        *,
        tracer: Tracer = NO_TRACER,
    ) -> None:
        self.consumer = consumer
        clock = SystemClock()
        shards = all_keys(settings.redis)
        worker = settings.worker.model_copy(update={"in_flight": max(1, settings.worker.in_flight // len(shards))})
        self._references = ReferenceFetcher(settings.references, settings.limits, client, clock)
        self._decoder = Decoder(worker.decode_threads, settings.limits, clock, self._references)
        self._drift = DriftMonitor(metrics, settings.metrics.window_images, settings.metrics.max_categories)
        self._gauges = StreamGauges(Backlog(client, shards), metrics)
        self._report_s = settings.metrics.report_s
        self._loops = [
            StreamWorker(
                RedisStreamReader(client, keys, consumer, settings.redis, claim_idle_ms=worker.claim_idle_ms),
                RedisResultSink(client, keys, consumer),
                detector,
                self._decoder,
                clock,
                settings=worker,
                retention=RedisRetention(client, keys, settings.backlog),
                tally=Tally(metrics, self._drift, tracer),
            )
            for keys in shards
        ]

    @property
    def stats(self) -> WorkerStats:
        """Return what all loops together have done since the start."""
        total = WorkerStats()
        for one in fields(WorkerStats):
            sums = [getattr(loop.stats, one.name) for loop in self._loops]
            setattr(total, one.name, sum(sums, Counter()) if one.name == "dead" else sum(sums))
        return total

    async def run(self, stop: asyncio.Event) -> None:
        """Work until `stop` is set, then finish the batches in flight; what takes too long is released."""
        reporting = asyncio.create_task(report_for_ever(self._report_s, [self._gauges.report, self._report_drift]))
        try:
            async with asyncio.TaskGroup() as tasks:
                for loop in self._loops:
                    tasks.create_task(loop.run(stop))
        finally:
            reporting.cancel()
            await asyncio.gather(reporting, return_exceptions=True)

    async def _report_drift(self) -> None:
        self._drift.report()

    async def close(self) -> None:
        """End the decoding threads, and close the connections over which images are fetched."""
        self._decoder.close()
        await self._references.close()
