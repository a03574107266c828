"""Has batches judged, and finds out who is to blame where that fails: an image, its category, or the detector.

Where an image fails alone, a plain grey one is judged in its place. If that succeeds, the fault is the image's, and its
delivery counts. Else it is not: the category is deferred, or, where no image of any category succeeds, the batch waits.
"""

import asyncio
import logging
from collections.abc import Sequence
from functools import partial

import numpy as np

from flawstream.imaging.pixels import Depths, Pixels
from schemas.errors import (
    DetectorDiedError,
    EverythingFailsError,
    MessageError,
    RegistryError,
    ShapeError,
    StageTimeoutError,
    TransientError,
    one_line,
)
from schemas.settings import WorkerSettings
from workers.consume.decode import DecodedEntry
from workers.consume.retry import Retry
from workers.consume.stage_limit import stage_limit
from workers.observe import log_fields
from workers.observe.tally import Tally
from workers.ports import Deferral, Detection, Detector, Judgement, Refusal

_log = logging.getLogger(__name__)

_GREY = 128


class Judging:
    """Has batches judged by a detector.

    Args:
        detector: Judges images.
        settings: How long a call may take, and is retried.
        tally: Says whether everything fails.
        retry: Retries the detector.
    """

    def __init__(self, detector: Detector, *, settings: WorkerSettings, tally: Tally, retry: Retry) -> None:
        self._detector = detector
        self._deadline_s = settings.claim_idle_ms / 1000
        self._limit_s = settings.stage_timeout_s
        self._tally = tally
        self._retry = retry
        self._judged = 0

    async def judge(self, decoded: Sequence[DecodedEntry]) -> list[Judgement | None]:
        """Have a batch judged, with None for an image that fails alone and is to blame.

        Raises:
            EverythingFailsError: For as long as a claim takes, plain images failed too, and no batch was judged.
            TransientError: The detector did not answer within that time, or the worker stops.
            StageTimeoutError: A call hangs.
        """
        return await self._retry.call(
            partial(self._judge_once, decoded, self._judged), self._deadline_s, EverythingFailsError
        )

    async def _judge_once(self, decoded: Sequence[DecodedEntry], judged_before: int) -> list[Judgement | None]:
        failing: dict[str, str] = {}
        judgements = await self._judge_each(decoded, failing)
        if failing and self._judged == judged_before:
            self._tally.everything_fails(True)  # noqa: FBT003 - a gauge's two values
            raise EverythingFailsError(next(iter(failing.values())))
        return judgements

    async def _judge_each(self, decoded: Sequence[DecodedEntry], failing: dict[str, str]) -> list[Judgement | None]:
        """Have a batch judged; where that fails, image by image.

        Args:
            decoded: The batch.
            failing: Receives the categories of which a plain image fails too, with the error; they are deferred.
        """
        alone = len(decoded) == 1
        if alone and (detail := failing.get(decoded[0].message.category)):
            return [Deferral(detail)]
        try:
            return list(await self._retry.call(partial(self._judge_batch, decoded), self._deadline_s))
        except (TransientError, StageTimeoutError):
            raise
        except Exception as error:  # noqa: BLE001 - one image must not take its neighbours down
            self._log_failure(decoded, error)
            if alone:
                return [await self._blame(decoded[0], error, failing)]
        return [judgement for one in decoded for judgement in await self._judge_each([one], failing)]

    async def _blame(self, one: DecodedEntry, error: Exception, failing: dict[str, str]) -> Judgement | None:
        """Find out who is to blame for an image that failed alone; None if the image is."""
        match error:
            case MessageError():
                return Refusal(error.reason, str(error))
            case RegistryError():  # the version was lost while the detector ran
                return Deferral(str(error))
        category = one.message.category
        plain = np.full_like(one.image.pixels[np.newaxis], _GREY)
        try:
            await self._retry.call(partial(self._call, plain, [category], [None]), self._deadline_s)
        except (TransientError, StageTimeoutError):
            raise
        except Exception as other:  # noqa: BLE001 - whatever the detector raises
            failing[category] = f"the detector fails for a plain image of {category!r} too: {one_line(other)}"
            return Deferral(failing[category])
        _log.warning(
            "%s failed alone, and a plain image in its place did not: the delivery counts",
            one.entry.entry_id,
            extra=log_fields.entries([one.entry]),
        )
        return None

    async def _judge_batch(self, decoded: Sequence[DecodedEntry]) -> Sequence[Judgement]:
        """Have a batch judged: in one call, or in one for each form of pixels."""
        forms: dict[tuple[object, ...], list[DecodedEntry]] = {}
        for one in decoded:
            forms.setdefault((one.image.pixels.shape, one.image.pixels.dtype), []).append(one)
        calls = [
            self._call(
                np.stack([one.image.pixels for one in alike]),
                [one.message.category for one in alike],
                [one.image.depth for one in alike],
            )
            for alike in forms.values()
        ]
        answers = await asyncio.gather(*calls, return_exceptions=True)  # none is running when another has failed
        by_id: dict[str, Judgement] = {}
        for alike, answer in zip(forms.values(), answers, strict=True):
            if isinstance(answer, BaseException):
                raise answer
            by_id.update(zip((one.entry.entry_id for one in alike), answer, strict=True))
        judgements = [by_id[one.entry.entry_id] for one in decoded]
        if any(isinstance(judgement, Detection) for judgement in judgements):
            self._judged += 1
        return judgements

    async def _call(self, images: Pixels, categories: list[str], depths: Depths) -> Sequence[Judgement]:
        async with stage_limit(self._limit_s):
            judgements = await self._detector.detect(images, categories, depths)
        if len(judgements) != len(categories):
            raise ShapeError(f"the detector gave {len(judgements)} judgements for {len(categories)} images")
        return judgements

    def _log_failure(self, decoded: Sequence[DecodedEntry], error: Exception) -> None:
        entries = [one.entry for one in decoded]
        if isinstance(error, DetectorDiedError):
            _log.warning("%s: %s", error.code, error, extra=log_fields.entries(entries))
        elif not isinstance(error, MessageError | RegistryError):
            names = ", ".join(entry.entry_id for entry in entries)
            self._retry.log_failure(f"detecting {names}", error, entries)
