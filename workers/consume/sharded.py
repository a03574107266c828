"""The stream worker of a process: a loop for each shard that it reads, with one decoder and one detector for all."""

import asyncio
from copy import deepcopy

from flawstream.telemetry import metrics as m
from flawstream.telemetry.metrics import NO_METRICS, Metrics
from flawstream.telemetry.traces import NO_TRACER, Tracer
from schemas.errors import ConfigError
from schemas.keys import all_keys
from schemas.settings import Settings
from workers.consume.clock import SystemClock
from workers.consume.consumer_lease import ConsumerLease
from workers.consume.decode import Decoder
from workers.consume.reader import RedisStreamReader
from workers.consume.shard_leases import ShardLeases
from workers.consume.shard_loops import ShardLoops
from workers.consume.shard_members import ShardMembers
from workers.consume.sink import RedisResultSink
from workers.consume.slots import Slots
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
    """The stream worker of a process. Knows no Ray and no model.

    Without shards, or with one, it has one loop. With more, the workers share the shards among themselves: see
    `workers.consume.shard_leases`. The batches in flight are divided among the loops, at least one each.

    Args:
        client: A client of the stream server or cluster.
        consumer: The worker's name in each group. A worker that restarts under its name resumes its pending entries.
            One live worker at a time has it: see `workers.consume.consumer_lease`.
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
        self._client = client
        self._detector = detector
        self._settings = settings
        self._metrics = metrics
        self._clock = SystemClock()
        self._shards = all_keys(settings.redis)
        self._lease = ConsumerLease(client, self._shards[0], consumer)
        self._references = ReferenceFetcher(settings.references, settings.limits, client, self._clock)
        self._decoder = Decoder(settings.worker.decode_threads, settings.limits, self._clock, self._references)
        self._drift = DriftMonitor(metrics, settings.metrics.window_images, settings.metrics.max_categories)
        self._tally = Tally(metrics, self._drift, tracer)
        self._gauges = StreamGauges(Backlog(client, self._shards), metrics)
        self._readers = [
            RedisStreamReader(client, keys, consumer, settings.redis, claim_idle_ms=settings.worker.claim_idle_ms)
            for keys in self._shards
        ]

    @property
    def stats(self) -> WorkerStats:
        """Return what all loops together have done since the start; it does not change any more."""
        return deepcopy(self._tally.stats)

    async def take_name(self) -> None:
        """Take the consumer name, as `run` does before it reads. Call `run` at once: the name is renewed there.

        Raises:
            ConfigError: Another live worker has it.
            StreamUnavailableError: The server does not answer.
        """
        await self._lease.take()

    async def run(self, stop: asyncio.Event) -> None:
        """Work until `stop` is set, then finish the batches in flight; what takes too long is released.

        Raises:
            ConfigError: Another live worker has the consumer name. Nothing was read or, where the name was lost while
                this one worked, `stop` was set.
            StageTimeoutError: Decoding or the detector hangs: the process has to end. `stop` was set.
            StreamUnavailableError: The server does not answer at the start.
        """
        await self.take_name()
        holding = asyncio.create_task(self._lease.hold(stop))
        reports = [self._gauges.report, self._report_drift]
        reporting = asyncio.create_task(report_for_ever(self._settings.metrics.report_s, reports))
        try:
            await self._work(stop)
        finally:
            holding.cancel()
            reporting.cancel()
            lost, _ = await asyncio.gather(holding, reporting, return_exceptions=True)
            await self._lease.release()
        if isinstance(lost, ConfigError):
            raise lost

    async def _work(self, stop: asyncio.Event) -> None:
        in_flight = self._settings.worker.in_flight
        if len(self._shards) == 1:
            self._metrics.set(m.SHARDS_READ, 1)
            self._metrics.set(m.SHARDS_UNREAD, 0)
            await self._make_loop(0, Slots(in_flight)).run(stop)
            return
        leases = ShardLeases(self.consumer, len(self._shards))
        members = ShardMembers(self._client, self._shards[0], self.consumer)
        await ShardLoops(leases, members, self._make_loop, in_flight=in_flight, metrics=self._metrics).run(stop)

    def _make_loop(self, shard: int, slots: Slots) -> StreamWorker:
        """Make the loop of a shard. Its reader stays the same: what was pending at the start is read once."""
        keys = self._shards[shard]
        return StreamWorker(
            self._readers[shard],
            RedisResultSink(self._client, keys, self.consumer),
            self._detector,
            self._decoder,
            self._clock,
            settings=self._settings.worker,
            retention=RedisRetention(self._client, keys, self._settings.backlog),
            tally=self._tally,
            slots=slots,
        )

    async def _report_drift(self) -> None:
        self._drift.report()

    async def close(self) -> None:
        """End the decoding threads, and close the connections over which images are fetched."""
        self._decoder.close()
        await self._references.close()
