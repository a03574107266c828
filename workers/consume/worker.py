"""The worker's loop: entries in, results and dead letters out. Knows no Redis, no Ray and no model, only `ports`."""

import asyncio
import time
from collections.abc import Sequence

from schemas.errors import StageTimeoutError
from schemas.settings import WorkerSettings
from workers.consume.decode import Decoder
from workers.consume.heartbeat import Heartbeat
from workers.consume.pipeline import Pipeline
from workers.consume.reclaim import Reclaimer
from workers.consume.retry import Retry
from workers.consume.slots import Slots
from workers.observe.tally import Tally, WorkerStats
from workers.ports import Clock, Detector, Entry, ResultSink, Retention, StreamReader
from workers.redis.backoff import backoff_s


class StreamWorker:
    """Reads entries, has their images judged and publishes the outcomes, so that each completes exactly once.

    So many batches are in flight at once (`in_flight`), and no entry is read before a slot is free: the backlog stays
    on the server. A redelivered entry is worked on in a batch of its own, so that one which kills a worker takes no
    others with it.

    Args:
        reader: Delivers entries.
        sink: Writes outcomes and acknowledges, atomically.
        detector: Judges images.
        decoder: Decodes entries.
        clock: The time.
        settings: Sizes and limits of the loop.
        retention: Trims the results at every sweep; absent: they are not trimmed.
        tally: Counts and times what is done; absent: for `stats` alone.
        slots: One for each batch in flight; absent: as many as `settings` says.
    """

    def __init__(
        self,
        reader: StreamReader,
        sink: ResultSink,
        detector: Detector,
        decoder: Decoder,
        clock: Clock,
        *,
        settings: WorkerSettings,
        retention: Retention | None = None,
        tally: Tally | None = None,
        slots: Slots | None = None,
    ) -> None:
        self._tally = tally or Tally()
        self._reader = reader
        self._settings = settings
        self._slots = slots or Slots(settings.in_flight)
        self._batches: set[asyncio.Task[None]] = set()
        self._retry = Retry(clock, self._tally)
        self._pipeline = Pipeline(
            reader, sink, detector, decoder, clock, settings=settings, tally=self._tally, retry=self._retry
        )
        self._reclaimer = Reclaimer(
            reader, self._pipeline, self._slots, self._retry, self._tally, sweep_s=settings.sweep_s, retention=retention
        )
        self._heartbeat = Heartbeat(reader, self._pipeline.in_flight, clock, self._retry, settings.claim_idle_ms / 1000)

    @property
    def stats(self) -> WorkerStats:
        """Return what was done since the start."""
        return self._tally.stats

    async def run(self, stop: asyncio.Event) -> None:
        """Work until `stop` is set, then finish the batches in flight; what takes too long is released.

        Raises:
            StageTimeoutError: A step does not return. `stop` is set then; the process must end.
        """
        self._retry.stop = stop
        reading = asyncio.create_task(self._read_until_stopped())
        reclaiming = asyncio.create_task(self._reclaimer.run())
        beating = asyncio.create_task(self._heartbeat.run())
        stopping = asyncio.create_task(stop.wait())
        hanging = asyncio.create_task(self._pipeline.hung.wait())
        try:
            await asyncio.wait([reading, stopping, hanging], return_when=asyncio.FIRST_COMPLETED)
            stop.set()
            await asyncio.wait([reading, reclaiming, *self._batches], timeout=self._settings.drain_s)
        finally:
            tasks = [reading, reclaiming, beating, stopping, hanging, *self._batches]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        await self._pipeline.release(self._pipeline.in_flight)
        if self._pipeline.hung.is_set():
            raise StageTimeoutError("decoding or the detector hangs, see above: the process ends, to be replaced")
        if not reading.cancelled():
            reading.result()  # raises what should never have been raised

    async def run_once(self) -> int:
        """Read one batch and complete it.

        Returns:
            How many entries were completed.

        Raises:
            StreamUnavailableError: Nothing could be read.
        """
        return await self._pipeline.complete(await self._read())

    async def sweep(self) -> int:
        """Reclaim the entries of dead workers, remove stale consumers, and trim the results.

        Returns:
            How many entries were completed.

        Raises:
            StreamUnavailableError: The server does not answer.
        """
        return await self._reclaimer.sweep()

    async def _read_until_stopped(self) -> None:
        failures = 0
        while not self._retry.is_stopping():
            await self._slots.acquire()  # before reading: an entry that no slot is free for stays on the server
            try:
                entries = [] if self._retry.is_stopping() else await self._read()
                failures = 0
            except Exception as error:  # noqa: BLE001 - the loop's outermost boundary
                failures += 1
                entries = []
                self._retry.log_failure("reading", error)
                await self._retry.wait(backoff_s(failures))
            if not entries:
                self._slots.release()
            elif self._retry.is_stopping() or _is_redelivered(entries):
                await self._complete(entries)
            else:
                batch = asyncio.create_task(self._complete(entries))
                self._batches.add(batch)
                batch.add_done_callback(self._batches.discard)

    async def _read(self) -> list[Entry]:
        began_s = time.perf_counter()
        entries = await self._reader.read(self._settings.batch_size, self._settings.batch_bytes)
        if entries:
            self._tally.timed("read", time.perf_counter() - began_s)
        return entries

    async def _complete(self, entries: Sequence[Entry]) -> None:
        """Complete a batch, then free its slot."""
        try:
            await self._pipeline.complete(entries)
        finally:
            self._slots.release()


def _is_redelivered(entries: Sequence[Entry]) -> bool:
    return any(entry.deliveries > 1 for entry in entries)
