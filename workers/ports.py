"""The protocols that the worker's loop depends on, and the values that pass between them.

The loop knows these and nothing of Redis, Ray or torch: tests give it fakes, deployments the real implementations.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from flawstream.imaging.pixels import Depths, PixelForm, Pixels
from schemas.errors import Reason
from schemas.messages import DeadLetter, DetectionResult, Verdict


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of the images stream, delivered to this worker.

    Attributes:
        entry_id: Redis's id, `<milliseconds>-<sequence>`.
        fields: As the producer wrote them.
        deliveries: How often the entry was delivered, this time included.
    """

    entry_id: str
    fields: Mapping[bytes, bytes]
    deliveries: int = 1


@dataclass(frozen=True, slots=True)
class Detection:
    """A model's judgement of one image.

    Attributes:
        score: Image score, nats per channel, higher is more anomalous.
        p_value: Conformal, in (0, 1].
        threshold: `score` above it is anomalous.
        pixel_threshold: A map value above it is an anomalous pixel.
        verdict: `score` against `threshold`.
        model: `category@version`.
        grids: One (H_s, W_s) float16 anomaly map per feature scale, nats per channel.
    """

    score: float
    p_value: float
    threshold: float
    pixel_threshold: float
    verdict: Verdict
    model: str
    grids: tuple[NDArray[np.float16], ...]


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why one image of a batch can never be judged; the others of the batch are."""

    reason: Reason
    detail: str


@dataclass(frozen=True, slots=True)
class Deferral:
    """Why one image of a batch cannot be judged now but may be later; the others of the batch are."""

    detail: str


Judgement = Detection | Refusal | Deferral
"""What a detector returns for one image."""


@dataclass(frozen=True, slots=True)
class Completion:
    """How one entry completes: its outcome is written and it leaves the images stream, in one atomic step."""

    entry_id: str
    outcome: DetectionResult | DeadLetter


class Detector(Protocol):
    """Judges decoded images of any mix of categories."""

    async def pixel_forms(self, categories: Sequence[str]) -> Sequence[PixelForm]:
        """Return the form that images of each category must have; for unknown categories any."""
        ...

    async def detect(
        self, images: Pixels, categories: Sequence[str], depths: Depths | None = None
    ) -> Sequence[Judgement]:
        """Judge a batch.

        Args:
            images: (B, S, S, 3), of the form that `pixel_forms()` returned for each of the categories.
            categories: B names.
            depths: By how many bits each was read, if its file has 16.

        Returns:
            B judgements, in order.

        Raises:
            TransientError: Nothing was judged and a later call may succeed.
        """
        ...


class Releaser(Protocol):
    """Releases entries that this consumer does not complete."""

    async def release(self, ids: Collection[str], *, at_once: bool = True) -> None:
        """Release entries: their delivery to this consumer does not count.

        Args:
            ids: Ids of the entries.
            at_once: Whether they may be claimed at once, or only after the idle time of any other entry.

        Raises:
            StreamUnavailableError: The server does not answer.
        """
        ...


class StreamReader(Releaser, Protocol):
    """Delivers entries of the images stream to one named consumer of the workers' consumer group."""

    async def read(self, max_entries: int, max_bytes: int) -> list[Entry]:
        """Read this consumer's own pending entries first, one at a time, then new ones; wait for the first.

        Args:
            max_entries: At most so many.
            max_bytes: No further entry once their fields have so many bytes.

        Raises:
            StreamUnavailableError: The server does not answer.
        """
        ...

    async def claim(self, max_entries: int, in_flight: Collection[str] = ()) -> list[Entry]:
        """Claim entries without a heartbeat for too long, of any consumer.

        Args:
            max_entries: At most so many.
            in_flight: Ids of the entries that this worker works on; they are not claimed.

        Raises:
            StreamUnavailableError: The server does not answer.
        """
        ...

    async def heartbeat(self, in_flight: Collection[str]) -> None:
        """Renew the idle time of entries, so that no other consumer claims them (XCLAIM JUSTID).

        An entry that another consumer owns by now stays with it.

        Raises:
            StreamUnavailableError: The server does not answer.
        """
        ...

    async def repair_pending(self) -> int:
        """Make entries claimable that no claim finds.

        Orphans: entries that were delivered and are neither completed nor pending, as their consumer was removed or
        another client acknowledged them. Their deliveries are counted anew. And entries whose last delivery lies in
        the future, as the server's clock was set back: their idle time starts now.

        Returns:
            How many orphans there were.

        Raises:
            StreamUnavailableError: The server does not answer.
        """
        ...

    async def remove_stale_consumers(self) -> None:
        """Remove consumers that have not read for long and have nothing pending.

        Raises:
            StreamUnavailableError: The server does not answer.
        """
        ...


class ResultSink(Protocol):
    """Writes outcomes and acknowledges their entries, each exactly once."""

    async def publish(self, completions: Sequence[Completion]) -> list[bool]:
        """Write each outcome and take its entry off the images stream, in one atomic step per entry.

        Returns:
            For each, whether the entry was still this consumer's. Where not, nothing was written: another worker
            owns the entry.

        Raises:
            StreamUnavailableError: The server does not answer. Each entry is either completed or still pending.
        """
        ...


class Retention(Protocol):
    """Keeps the results stream within its bounds."""

    async def trim(self) -> int:
        """Remove old results, never one that a registered group has still to read.

        Returns:
            How many were removed.

        Raises:
            StreamUnavailableError: The server does not answer.
        """
        ...


class Clock(Protocol):
    """The time, injected so that a test can control it."""

    def now(self) -> datetime:
        """Return the time of day, with its zone."""
        ...

    async def sleep(self, duration_s: float) -> None:
        """Wait."""
        ...
