"""Decodes the images of entries, on threads: the decoders release the interpreter lock while they work.

An image by reference is fetched first; its bytes are freed once it is decoded.
"""

import asyncio
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime

import cv2
import numpy as np

from flawstream.imaging.decode import DecodedImage, decode_image
from flawstream.imaging.pixels import PixelForm
from schemas.errors import MessageError, TransientError
from schemas.messages import ImageMessage
from schemas.settings import LimitSettings
from schemas.wire import parse_image
from workers.observe import log_fields
from workers.ports import Clock, Entry
from workers.references import ImageFetcher, NoReferences

_log = logging.getLogger(__name__)


_PLAIN = Entry(
    "0-0", {b"category": b"plain", b"image": cv2.imencode(".png", np.full((8, 8), 128, np.uint8))[1].tobytes()}
)
"""A plain grey image."""


@dataclass(frozen=True, slots=True)
class DecodedEntry:
    """A decoded image on its way to the detector.

    Attributes:
        entry: The entry.
        message: Parsed from its fields; of an image by reference without the bytes.
        image: Pixels of the form that the detector wants.
        queued_ms: From the entry's arrival on the server to the worker's first look.
        decode_ms: Time to decode the bytes, without the time to fetch them.
    """

    entry: Entry
    message: ImageMessage
    image: DecodedImage
    queued_ms: float
    decode_ms: float


class Decoder:
    """Decodes the images of a batch, each independently of the others.

    Args:
        threads: Images decoded at once; None: as many as there are CPUs for this process.
        limits: What is too large.
        clock: For the times.
        references: Fetches images by reference; absent: references are refused.
    """

    def __init__(
        self, threads: int | None, limits: LimitSettings, clock: Clock, references: ImageFetcher | None = None
    ) -> None:
        self._pool = ThreadPoolExecutor(threads or available_cpus(), thread_name_prefix="flawstream-decode")
        cv2.setNumThreads(1)  # OpenCV's own threads would spin beside these while they wait for work
        self._limits = limits
        self._clock = clock
        self._references = references or NoReferences()

    @property
    def pool(self) -> ThreadPoolExecutor:
        """Return the threads, for other work on pixels."""
        return self._pool

    async def decode(
        self, entries: Sequence[Entry], forms: Sequence[PixelForm]
    ) -> list[DecodedEntry | MessageError | None]:
        """Decode a batch.

        Args:
            entries: As they were delivered.
            forms: For each entry, the form of the pixels to return.

        Returns:
            For each entry its image, why it can never be decoded, or None after a bug of ours, which is logged.

        Raises:
            StreamUnavailableError: The stream server has an image under a key and does not answer.
        """
        seen_at = self._clock.now()
        loop = asyncio.get_running_loop()
        outcomes = await asyncio.gather(
            *(
                self._fetch_and_decode(entry, form, seen_at)
                if entry.fields.get(b"image_ref")
                else loop.run_in_executor(self._pool, self._decode_one, entry, form, seen_at)
                for entry, form in zip(entries, forms, strict=True)
            ),
            return_exceptions=True,  # so that none is still running when the first fails
        )
        decoded: list[DecodedEntry | MessageError | None] = []
        for outcome in outcomes:
            if isinstance(outcome, BaseException) and not isinstance(outcome, MessageError):
                raise outcome
            decoded.append(outcome)
        return decoded

    async def works(self, form: PixelForm) -> bool:
        """Return whether a plain image can be decoded."""
        decoding = asyncio.get_running_loop().run_in_executor(
            self._pool, self._decode_one, _PLAIN, form, self._clock.now()
        )
        return isinstance(await decoding, DecodedEntry)

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _fetch_and_decode(
        self, entry: Entry, form: PixelForm, seen_at: datetime
    ) -> DecodedEntry | MessageError | None:
        try:
            message = parse_image(entry.entry_id, entry.fields, self._limits)
            async with self._references.fetch(message.image_ref or "") as data:
                return await asyncio.get_running_loop().run_in_executor(
                    self._pool, self._decode_bytes, entry, message, data, form, seen_at
                )
        except MessageError as error:
            return error
        except TransientError:
            raise
        except Exception:  # noqa: BLE001 - one image must not take its neighbours down
            _log.exception(
                "entry %s could not be fetched; this is a bug, and the entry stays pending",
                entry.entry_id,
                extra=log_fields.entries([entry]),
            )
            return None

    def _decode_one(self, entry: Entry, form: PixelForm, seen_at: datetime) -> DecodedEntry | MessageError | None:
        try:
            message = parse_image(entry.entry_id, entry.fields, self._limits)
            return self._decode_bytes(entry, message, message.image or b"", form, seen_at)
        except MessageError as error:
            return error
        except Exception:  # noqa: BLE001 - one image must not take its neighbours down
            _log.exception(
                "entry %s could not be decoded; this is a bug, and the entry stays pending",
                entry.entry_id,
                extra=log_fields.entries([entry]),
            )
            return None

    def _decode_bytes(
        self, entry: Entry, message: ImageMessage, data: bytes, form: PixelForm, seen_at: datetime
    ) -> DecodedEntry:
        started_at = self._clock.now()
        image = decode_image(data, form, self._limits)
        return DecodedEntry(
            entry=entry,
            message=message,
            image=image,
            queued_ms=since_arrival_ms(entry.entry_id, seen_at),
            decode_ms=between_ms(started_at, self._clock.now()),
        )


def available_cpus() -> int:
    """Return how many CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def since_arrival_ms(entry_id: str, now: datetime) -> float:
    """Return the time since an entry arrived by the server's clock; 0 where the clocks disagree."""
    arrived_ms = int(entry_id.partition("-")[0])
    return max(0.0, now.timestamp() * 1000 - arrived_ms)


def between_ms(start: datetime, end: datetime) -> float:
    """Return the time between; 0 where the clock was set back."""
    return max(0.0, (end - start).total_seconds() * 1000)
