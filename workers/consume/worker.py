"""The worker's loop: entries in, results and dead letters out. Knows no Redis, no Ray and no model, only `ports`."""

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from datetime import datetime
from functools import partial
from typing import TypeVar

import numpy as np

from schemas.errors import (
    DetectorDiedError,
    MessageError,
    ModelUnavailableError,
    Reason,
    RegistryError,
    ShapeError,
    TransientError,
)
from schemas.settings import WorkerSettings
from workers.backoff import backoff_s
from workers.consume.decode import Decoder, Job, between_ms, since_arrival_ms
from workers.consume.result_builder import Times, build_result
from workers.observe import log_fields
from workers.observe.tally import Batch, Tally, WorkerStats
from workers.outcomes.dead_letter import bury
from workers.ports import (
    Clock,
    Deferral,
    Detector,
    Ending,
    Entry,
    Outcome,
    Refusal,
    ResultSink,
    Retention,
    StreamReader,
)

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

_TOUCHES_PER_CLAIM = 3
"""An entry in hand is touched so often before it could be claimed: one touch that fails loses none."""
_DEFERRAL_S = 5.0
"""A category that could not be judged is tried again so much later; until then its images are deferred undecoded."""


class StreamWorker:
    """Reads images, has them judged and publishes what came of it, so that each ends exactly once.

    An entry that was given out before is handled in a batch of its own, so that one which breaks a worker takes
    nobody along. What is in hand is touched now and then, so that nobody else claims it; where the detector cannot
    be had for as long as a claim takes, it is handed back. An image whose category cannot be judged now is deferred: it
    stays pending, is tried again after `claim_idle_ms`, and the delivery does not count.

    Args:
        reader: Gives out entries.
        sink: Ends them.
        detector: Judges images.
        decoder: Makes pixels of entries.
        clock: Tells the time.
        settings: Sizes and limits of the loop.
        retention: Trims the results at every sweep; absent: nobody does.
        tally: Takes note of what is done; absent: for `stats` alone.
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
    ) -> None:
        self._tally = tally or Tally()
        self._reader = reader
        self._sink = sink
        self._detector = detector
        self._decoder = decoder
        self._clock = clock
        self._settings = settings
        self._retention = retention
        self._patience_s = settings.claim_idle_ms / 1000
        self._slots = asyncio.Semaphore(settings.in_flight)
        self._held: set[str] = set()
        self._deferred: set[str] = set()
        self._deferred_at: dict[bytes, datetime] = {}  # by category
        self._batches: set[asyncio.Task[None]] = set()
        self._stop = asyncio.Event()

    @property
    def stats(self) -> WorkerStats:
        """Tell what was done since the start."""
        return self._tally.stats

    async def run(self, stop: asyncio.Event) -> None:
        """Work until told to stop, then finish the batches under way; what takes too long is handed back."""
        self._stop = stop
        reading = asyncio.create_task(self._read_until_told_to_stop())
        sweeping = asyncio.create_task(self._sweep_now_and_then())
        touching = asyncio.create_task(self._touch_now_and_then())
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait([reading, stopping], return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait([reading, sweeping, *self._batches], timeout=self._settings.drain_s)
        finally:
            tasks = [reading, sweeping, touching, stopping, *self._batches]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        await self._hand_back(self._held)
        if not reading.cancelled():
            reading.result()  # raises what should never have been raised

    async def _read_until_told_to_stop(self) -> None:
        failures = 0
        while not self._stop.is_set():
            await self._slots.acquire()  # before reading: what nobody has time for stays with the server
            try:
                entries = [] if self._stop.is_set() else await self._read()
                failures = 0
            except Exception as error:  # noqa: BLE001 - the loop's outermost boundary
                failures += 1
                entries = []
                self._note("reading", error)
                await self._pause(backoff_s(failures))
            if self._stop.is_set():
                self._held |= {entry.entry_id for entry in entries}  # not begun, and handed back
            elif not entries:
                self._slots.release()
            elif _was_given_out_before(entries):
                await self._finish_and_release(entries)
            else:
                batch = asyncio.create_task(self._finish_and_release(entries))
                self._batches.add(batch)
                batch.add_done_callback(self._batches.discard)

    async def run_once(self) -> int:
        """Read one batch and work it to its end.

        Returns:
            How many entries ended.

        Raises:
            StreamUnavailableError: Nothing could be read.
        """
        return await self._finish(await self._read())

    async def sweep(self) -> int:
        """Take over what dead workers left behind, one entry at a time, remove them, and trim the results.

        Returns:
            How many entries ended.

        Raises:
            StreamUnavailableError: The server does not answer.
        """
        ended = 0
        deferred: set[str] = set()
        while not self._stop.is_set():
            async with self._slots:
                entries = [] if self._stop.is_set() else await self._reader.claim(1, self._held)
                ended += await self._finish(entries)
            again = {entry.entry_id for entry in entries if self._was_deferred(entry)}
            if not entries or again & deferred:  # one comes a second time: all have been tried
                break
            deferred |= again
        await self._reader.forget_the_dead()
        if self._retention is not None:
            await self._retention.trim()
        return ended

    async def _read(self) -> list[Entry]:
        began_s = time.perf_counter()
        entries = await self._reader.read(self._settings.batch_size, self._settings.batch_bytes)
        if entries:
            self._tally.spent("read", time.perf_counter() - began_s)
        return entries

    async def _sweep_now_and_then(self) -> None:
        while not self._stop.is_set():
            try:
                await self.sweep()
            except Exception as error:  # noqa: BLE001 - the loop's outermost boundary
                self._note("sweeping", error)
            await self._pause(self._settings.sweep_s)

    async def _touch_now_and_then(self) -> None:
        """Go on until cancelled: batches that are finished after the stop are touched as well."""
        while True:
            await self._clock.sleep(self._patience_s / _TOUCHES_PER_CLAIM)
            try:
                await self._reader.touch(frozenset(self._held))
            except Exception as error:  # noqa: BLE001 - the loop's outermost boundary
                self._note("touching what is in hand", error)

    async def _hand_back(self, ids: Collection[str], *, at_once: bool = True) -> None:
        """Give back what did not end; where that fails it is claimed later, and counted."""
        try:
            await self._reader.release(ids, at_once=at_once)
        except Exception as error:  # noqa: BLE001 - the loop's outermost boundary
            self._note(f"handing back {len(ids)} entries", error)

    async def _finish_and_release(self, entries: Sequence[Entry]) -> None:
        try:
            await self._finish(entries)
        finally:
            self._slots.release()

    async def _finish(self, entries: Sequence[Entry]) -> int:
        """Work a batch to its end. Whatever goes wrong concerns this batch only, and its entries stay pending."""
        entries = [entry for entry in entries if entry.entry_id not in self._held]
        if not entries:
            return 0
        seen_at = self._clock.now()
        queued_ms = max(since_arrival_ms(entry.entry_id, seen_at) for entry in entries)
        batch = self._tally.took_up(len(entries), queued_ms / 1000)
        ids = {entry.entry_id for entry in entries}
        self._held |= ids
        try:
            endings = await self._judge(entries, batch)
            with batch.stage("publish"):
                ended = await self._persist(partial(self._sink.publish, endings))
        except Exception as error:  # noqa: BLE001 - a batch's outermost boundary
            self._note(f"working on {len(entries)} entries, which stay pending,", error, entries)
            if isinstance(error, TransientError):  # no fault of theirs; another worker may have a detector
                await self._hand_back(ids)
            self._held -= ids
            self._deferred -= ids
            return 0
        if deferred := ids & self._deferred:
            self._tally.deferred(len(deferred))
            await self._hand_back(deferred, at_once=False)
        self._held -= ids
        self._deferred -= ids
        self._tally.ended(batch, endings, ended)
        return sum(ended)

    async def _judge(self, entries: Sequence[Entry], batch: Batch) -> list[Ending]:
        """Find out how each entry ends. An entry left out is deferred or one with a bug: it stays pending."""
        endings: list[Ending] = []
        fit: list[Entry] = []
        for entry in entries:
            if entry.deliveries > self._settings.max_deliveries:
                endings.append(self._bury(entry, self._poison(entry)))
            elif self._was_deferred(entry):
                self._deferred.add(entry.entry_id)
            else:
                fit.append(entry)
        if not fit:
            return endings
        form = await self._persist(self._detector.pixel_form, self._patience_s)
        jobs: list[Job] = []
        with batch.stage("decode"):
            decoded = await self._persist(partial(self._decoder.decode, fit, form))
        for entry, opened in zip(fit, decoded, strict=True):
            if isinstance(opened, Job):
                jobs.append(opened)
            elif opened is not None:
                endings.append(self._bury(entry, opened))
            else:
                self._tally.failed()
        if jobs:
            started_at = self._clock.now()
            with batch.stage("call"):
                outcomes = await self._detect(jobs)
            detect_ms = between_ms(started_at, self._clock.now())
            with batch.stage("encode"):
                concluded = await asyncio.gather(
                    *(
                        self._conclude(job, outcome, detect_ms)
                        for job, outcome in zip(jobs, outcomes, strict=True)
                        if outcome is not None
                    )
                )
            endings += [ending for found in concluded for ending in found]
        return endings

    async def _detect(self, jobs: Sequence[Job]) -> list[Outcome | None]:
        """Have a batch judged; where that fails, image by image, and nothing for one that fails alone.

        Raises:
            TransientError: The detector could not for long, or cannot and the worker was told to stop.
        """
        try:
            return list(await self._persist(partial(self._detect_together, jobs), self._patience_s))
        except TransientError:
            raise
        except MessageError as error:
            if len(jobs) == 1:
                return [Refusal(error.reason, str(error))]
        except RegistryError as error:  # the version was lost where it runs
            if len(jobs) == 1:
                return [Deferral(str(error))]
        except DetectorDiedError as error:
            _log.warning("%s: %s", error.code, error, extra=log_fields.entries([job.entry for job in jobs]))
            if len(jobs) == 1:  # it may have died of this image: given out again, it is counted
                return [None]
        except Exception as error:  # noqa: BLE001 - whatever it is, it must not take the neighbours down
            names = ", ".join(job.entry.entry_id for job in jobs)
            self._note(f"detecting {names}", error, [job.entry for job in jobs])
            if len(jobs) == 1:
                return [None]
        return [outcome for job in jobs for outcome in await self._detect([job])]

    async def _detect_together(self, jobs: Sequence[Job]) -> Sequence[Outcome]:
        images = np.stack([job.image.pixels for job in jobs])
        outcomes = await self._detector.detect(images, [job.message.category for job in jobs])
        if len(outcomes) != len(jobs):
            raise ShapeError(f"the detector gave {len(outcomes)} outcomes for {len(jobs)} images")
        return outcomes

    async def _conclude(self, job: Job, outcome: Outcome, detect_ms: float) -> list[Ending]:
        """Put together how one image ends; nothing where it is deferred, or where that fails, which is a bug."""
        if isinstance(outcome, Deferral):
            self._defer(job.entry, outcome)
            return []
        self._deferred_at.pop(job.entry.fields[b"category"], None)
        if isinstance(outcome, Refusal):
            return [self._bury(job.entry, outcome)]
        total_ms = since_arrival_ms(job.entry.entry_id, self._clock.now())
        times = Times(job.queued_ms, job.decode_ms, detect_ms, total_ms)
        build = partial(build_result, job.message, job.image, outcome, self._settings.map_codec, times)
        try:
            result = await asyncio.get_running_loop().run_in_executor(self._decoder.pool, build)
        except Exception as error:  # noqa: BLE001 - whatever it is, it must not take the neighbours down
            self._note(f"putting the result of {job.entry.entry_id} together", error, [job.entry])
            return []
        return [Ending(job.entry.entry_id, result)]

    def _was_deferred(self, entry: Entry) -> bool:
        """Tell whether an image of the entry's category was deferred a moment ago."""
        at = self._deferred_at.get(entry.fields.get(b"category", b""))
        return at is not None and abs((self._clock.now() - at).total_seconds()) < _DEFERRAL_S

    def _defer(self, entry: Entry, why: Deferral) -> None:
        """Leave an entry pending, and for a moment those of its category too; logged once until one can be judged."""
        category = entry.fields[b"category"]
        if category not in self._deferred_at:
            _log.warning(
                "%s: %s; its images stay pending and are tried again",
                ModelUnavailableError.code,
                why.detail,
                extra=log_fields.entries([entry]),
            )
        self._deferred.add(entry.entry_id)
        self._deferred_at[category] = self._clock.now()

    def _bury(self, entry: Entry, why: MessageError | Refusal) -> Ending:
        return Ending(entry.entry_id, bury(entry, why, self._clock.now()))

    def _poison(self, entry: Entry) -> Refusal:
        return Refusal(
            Reason.POISON,
            f"given out {entry.deliveries - 1} times and never ended, and {self._settings.max_deliveries} are allowed; "
            "the log of the workers says what went wrong; push it again once that is mended",
        )

    async def _persist(self, attempt: Callable[[], Awaitable[_T]], patience_s: float = math.inf) -> _T:
        """Try until it is done, or for so long; once told to stop, one last time."""
        failures = 0
        started_at = self._clock.now()
        while True:
            last = self._stop.is_set() or between_ms(started_at, self._clock.now()) >= patience_s * 1000
            try:
                return await attempt()
            except TransientError as error:
                if last:
                    raise
                failures += 1
                self._tally.tried_again(error.code)
                delay_s = backoff_s(failures)
                _log.warning("%s: %s; trying again in %.1f s", error.code, error, delay_s)
            await self._pause(delay_s)

    async def _pause(self, duration_s: float) -> None:
        """Wait, or until told to stop."""
        waits = [asyncio.ensure_future(self._clock.sleep(duration_s)), asyncio.ensure_future(self._stop.wait())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    def _note(self, doing: str, error: Exception, about: Sequence[Entry] = ()) -> None:
        """Log what went wrong; what nobody foresaw is a bug, with its traceback."""
        if isinstance(error, TransientError):
            _log.warning("%s: %s: %s", doing, error.code, error, extra=log_fields.entries(about))
        else:
            self._tally.failed()
            _log.error("%s failed unexpectedly", doing, exc_info=error, extra=log_fields.entries(about))


def _was_given_out_before(entries: Sequence[Entry]) -> bool:
    return any(entry.deliveries > 1 for entry in entries)
