"""The way of a batch: decode, detect, build the results, publish. Each entry completes on its own, or stays pending."""

import asyncio
import logging
from collections.abc import Collection, Sequence
from functools import partial

from flawstream.imaging.pixels import PixelForm
from schemas.errors import (
    EverythingFailsError,
    MessageError,
    Reason,
    StageTimeoutError,
    TransientError,
    one_line,
)
from schemas.messages import DetectionResult
from schemas.settings import WorkerSettings
from workers.consume.decode import DecodedEntry, Decoder, between_ms, since_arrival_ms
from workers.consume.deferrals import DeferredCategories
from workers.consume.judging import Judging
from workers.consume.result_builder import Times, build_result
from workers.consume.retry import Retry
from workers.consume.stage_limit import stage_limit
from workers.observe import log_fields
from workers.observe.tally import Batch, Tally
from workers.outcomes.dead_letter import make_dead_letter
from workers.ports import (
    Clock,
    Completion,
    Deferral,
    Detector,
    Entry,
    Judgement,
    Refusal,
    Releaser,
    ResultSink,
)

_log = logging.getLogger(__name__)


class Pipeline:
    """Completes batches of entries, each with a result or a dead letter.

    An entry that does not complete stays pending: one that fails alone is redelivered and counted, one that is deferred
    is released, so that the delivery does not count. Where the detector does not answer, or fails for every image, for
    as long as a claim takes, the whole batch is released. Until then it keeps its slot, so that no more is read.

    Args:
        reader: Releases entries.
        sink: Writes outcomes and acknowledges, atomically.
        detector: Judges images.
        decoder: Decodes entries.
        clock: For the times in results.
        settings: Limits of the loop.
        tally: Counts and times what is done.
        retry: Retries the detector and the server.

    Attributes:
        in_flight: Ids of the entries being worked on: a heartbeat keeps them, and they are not claimed again.
        hung: Set once a stage has not ended in time: the process must end.
    """

    def __init__(
        self,
        reader: Releaser,
        sink: ResultSink,
        detector: Detector,
        decoder: Decoder,
        clock: Clock,
        *,
        settings: WorkerSettings,
        tally: Tally,
        retry: Retry,
    ) -> None:
        self.in_flight: set[str] = set()
        self.hung = asyncio.Event()
        self._reader = reader
        self._sink = sink
        self._detector = detector
        self._decoder = decoder
        self._clock = clock
        self._settings = settings
        self._tally = tally
        self._retry = retry
        self._deadline_s = settings.claim_idle_ms / 1000
        self._categories = DeferredCategories(clock)
        self._deferred: set[str] = set()
        self._judging = Judging(detector, settings=settings, tally=tally, retry=retry)

    def is_deferred(self, entry: Entry) -> bool:
        """Return whether the entry's category was deferred a moment ago."""
        return self._categories.has(entry)

    async def complete(self, entries: Sequence[Entry]) -> int:
        """Complete a batch. Whatever goes wrong concerns this batch alone, and its entries stay pending.

        Args:
            entries: Those already in flight are left out.

        Returns:
            How many were completed.
        """
        entries = [entry for entry in entries if entry.entry_id not in self.in_flight]
        if not entries:
            return 0
        seen_at = self._clock.now()
        queued_ms = max(since_arrival_ms(entry.entry_id, seen_at) for entry in entries)
        batch = self._tally.start_batch(len(entries), queued_ms / 1000)
        ids = {entry.entry_id for entry in entries}
        self.in_flight |= ids
        try:
            completions = await self._judge(entries, batch)
            with batch.stage("publish"):
                written = await self._publish(completions)
            if any(isinstance(completion.outcome, DetectionResult) for completion in completions):
                self._tally.everything_fails(False)  # noqa: FBT003 - a gauge's two values
        except StageTimeoutError as error:  # no more heartbeats, and the delivery counts
            _log.error("%s: %s", error.code, error, extra=log_fields.entries(entries))
            self._leave(ids)
            self.hung.set()
            return 0
        except Exception as error:  # noqa: BLE001 - a batch's outermost boundary
            self._retry.log_failure(f"working on {len(entries)} entries, which stay pending,", error, entries)
            if isinstance(error, TransientError):  # no fault of theirs; another worker may have a detector
                await self.release(ids)
            self._leave(ids)
            return 0
        if deferred := ids & self._deferred:
            self._tally.deferred(len(deferred))
            await self.release(deferred, at_once=False)
        self._leave(ids)
        self._tally.completed(batch, completions, written)
        return sum(written)

    def _leave(self, ids: set[str]) -> None:
        """Take entries out of flight. Those of a cancelled batch stay in: the worker releases them."""
        self.in_flight -= ids
        self._deferred -= ids

    async def release(self, ids: Collection[str], *, at_once: bool = True) -> None:
        """Release entries; those for which that fails are claimed later, and the delivery counts.

        Args:
            ids: Ids of the entries.
            at_once: Whether they may be claimed at once, or only after `claim_idle_ms`.
        """
        try:
            await self._reader.release(ids, at_once=at_once)
        except Exception as error:  # noqa: BLE001 - the loop's outermost boundary
            self._retry.log_failure(f"releasing {len(ids)} entries", error)

    async def _judge(self, entries: Sequence[Entry], batch: Batch) -> list[Completion]:
        """Find out how each entry completes. An entry left out is deferred, or met a bug: it stays pending."""
        completions: list[Completion] = []
        sound: list[Entry] = []
        for entry in entries:
            if entry.deliveries > self._settings.max_deliveries:
                completions.append(self._dead_letter(entry, self._poison(entry)))
            elif self.is_deferred(entry):
                self._deferred.add(entry.entry_id)
            else:
                sound.append(entry)
        if not sound:
            return completions
        decoding = partial(self._decode, sound, batch, completions)
        decoded = await self._retry.call(decoding, self._deadline_s, EverythingFailsError)
        if decoded:
            started_at = self._clock.now()
            with batch.stage("call"):
                judgements = await self._judging.judge(decoded)
            detect_ms = between_ms(started_at, self._clock.now())
            with batch.stage("encode"):
                async with stage_limit(self._settings.stage_timeout_s):
                    concluded = await asyncio.gather(
                        *(
                            self._conclude(one, judgement, detect_ms)
                            for one, judgement in zip(decoded, judgements, strict=True)
                            if judgement is not None
                        )
                    )
            completions += [completion for completion in concluded if completion is not None]
        return completions

    async def _decode(
        self, entries: Sequence[Entry], batch: Batch, completions: list[Completion]
    ) -> list[DecodedEntry]:
        """Decode entries; those that can never be decoded are added to `completions` as dead letters.

        Raises:
            EverythingFailsError: Not even a plain image can be decoded.
            StageTimeoutError: Decoding hangs.
        """
        categories = [entry.fields.get(b"category", b"").decode(errors="replace") for entry in entries]
        forms = await self._retry.call(partial(self._detector.pixel_forms, categories), self._deadline_s)
        with batch.stage("decode"):
            attempts = await self._retry.call(partial(self._decode_in_time, entries, forms))
            if all(attempt is None for attempt in attempts) and not await self._decoder.works(forms[0]):
                raise self._everything_fails("no image can be decoded")
        decoded: list[DecodedEntry] = []
        for entry, attempt in zip(entries, attempts, strict=True):
            if isinstance(attempt, DecodedEntry):
                decoded.append(attempt)
            elif attempt is not None:
                completions.append(self._dead_letter(entry, attempt))
            else:
                self._tally.failed()
        return decoded

    async def _decode_in_time(
        self, entries: Sequence[Entry], forms: Sequence[PixelForm]
    ) -> list[DecodedEntry | MessageError | None]:
        async with stage_limit(self._settings.stage_timeout_s):
            return await self._decoder.decode(entries, forms)

    def _everything_fails(self, detail: str) -> EverythingFailsError:
        self._tally.everything_fails(True)  # noqa: FBT003 - a gauge's two values
        return EverythingFailsError(detail)

    async def _publish(self, completions: Sequence[Completion]) -> list[bool]:
        """Write outcomes. One that the server refuses alone stays pending; where it refuses all, they are tried again.

        Returns:
            For each, whether it was written.

        Raises:
            EverythingFailsError: The server refuses every outcome: a key has another type, or a right is missing.
            TransientError: The server does not answer, and the worker stops.
        """
        publishing = partial(self._publish_each, completions)
        return await self._retry.call(publishing, self._deadline_s, EverythingFailsError)

    async def _publish_each(self, completions: Sequence[Completion]) -> list[bool]:
        try:
            return await self._retry.call(partial(self._sink.publish, completions))
        except TransientError:
            raise
        except Exception as error:  # noqa: BLE001 - one outcome must not take its neighbours down
            self._retry.log_failure(f"publishing {len(completions)} outcomes", error)
            refused = error
        written: list[bool | None] = []
        for completion in completions if len(completions) > 1 else ():
            try:
                written += await self._retry.call(partial(self._sink.publish, [completion]))
            except TransientError:
                raise
            except Exception as error:  # noqa: BLE001 - as above
                self._retry.log_failure(f"publishing the outcome of {completion.entry_id}", error)
                written.append(None)
        if all(one is None for one in written):
            raise self._everything_fails(f"no outcome can be published: {one_line(refused)}")
        return [bool(one) for one in written]

    async def _conclude(self, decoded: DecodedEntry, judgement: Judgement, detect_ms: float) -> Completion | None:
        """Build an entry's outcome; None where it is deferred, or where building fails, which is a bug."""
        entry = decoded.entry
        if isinstance(judgement, Deferral):
            self._categories.add(entry, judgement)
            self._deferred.add(entry.entry_id)
            return None
        self._categories.remove(entry)
        if isinstance(judgement, Refusal):
            return self._dead_letter(entry, judgement)
        total_ms = since_arrival_ms(entry.entry_id, self._clock.now())
        times = Times(decoded.queued_ms, decoded.decode_ms, detect_ms, total_ms)
        build = partial(build_result, decoded.message, decoded.image, judgement, self._settings.map_codec, times)
        try:
            result = await asyncio.get_running_loop().run_in_executor(self._decoder.pool, build)
        except Exception as error:  # noqa: BLE001 - one image must not take its neighbours down
            self._retry.log_failure(f"building the result of {entry.entry_id}", error, [entry])
            return None
        return Completion(entry.entry_id, result)

    def _dead_letter(self, entry: Entry, cause: MessageError | Refusal) -> Completion:
        return Completion(entry.entry_id, make_dead_letter(entry, cause, self._clock.now()))

    def _poison(self, entry: Entry) -> Refusal:
        return Refusal(
            Reason.POISON,
            f"delivered {entry.deliveries - 1} times and never completed, and {self._settings.max_deliveries} "
            "deliveries are allowed; the workers' log says what went wrong; push it again once that is fixed",
        )
