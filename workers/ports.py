"""What the worker loop is handed, as protocols, and the values that pass between them.

The loop knows these and nothing of Redis, Ray or torch; a test hands it fakes, a deployment the real things.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from flawstream.imaging.pixels import PixelForm, Pixels
from schemas.errors import Reason
from schemas.messages import DeadLetter, DetectionResult, Verdict


@dataclass(frozen=True, slots=True)
class Entry:
    """One row of the images stream, given to this worker.

    Attributes:
        entry_id: Redis's id, `<milliseconds>-<sequence>`.
        fields: As the producer wrote them.
        deliveries: How often the entry was given out, this time included.
    """

    entry_id: str
    fields: Mapping[bytes, bytes]
    deliveries: int = 1


@dataclass(frozen=True, slots=True)
class Detection:
    """What a model says of one image.

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
    """Why one image of a batch cannot be judged; its neighbours are not concerned."""

    reason: Reason
    detail: str


@dataclass(frozen=True, slots=True)
class Deferral:
    """Why one image of a batch cannot be judged now but may be later; its neighbours are not concerned."""

    detail: str


Outcome = Detection | Refusal | Deferral
"""What a detector answers for one image."""


@dataclass(frozen=True, slots=True)
class Ending:
    """How one entry ends: it leaves the images stream and this is written, in one step."""

    entry_id: str
    outcome: DetectionResult | DeadLetter


class Detector(Protocol):
    """Judges decoded images of any mix of categories."""

    async def pixel_form(self) -> PixelForm:
        """Return the form that images must have."""
        ...

    async def detect(self, images: Pixels, categories: Sequence[str]) -> Sequence[Outcome]:
        """Judge a batch.

        Args:
            images: (B, S, S, 3), of the form that `pixel_form()` returns.
            categories: B names.

        Returns:
            B outcomes, in order.

        Raises:
            TransientError: Nothing was judged and a later call may succeed.
        """
        ...


class StreamReader(Protocol):
    """Gives out entries of the images stream to one named consumer of the workers' group."""

    async def read(self, max_entries: int, max_bytes: int) -> list[Entry]:
        """Take what this consumer was given before it started, one at a time, then new entries; wait where none is.

        Args:
            max_entries: At most so many.
            max_bytes: None past so many bytes of fields, but always one.

        Raises:
            StreamUnavailableError: The server does not answer.
        """
        ...

    async def claim(self, max_entries: int, held: Collection[str] = ()) -> list[Entry]:
        """Take over entries that their consumer, be it this one, has not touched for too long.

        Args:
            max_entries: At most so many.
            held: Ids that this worker has in hand; they are not given out again.

        Raises:
            StreamUnavailableError: The server does not answer.
        """
        ...

    async def touch(self, held: Collection[str]) -> None:
        """Say that entries in hand are still under work, so that no other consumer claims them.

        What another consumer has meanwhile stays with it.

        Raises:
            StreamUnavailableError: The server does not answer.
        """
        ...

    async def release(self, held: Collection[str], *, at_once: bool = True) -> None:
        """Release entries: delivering them to this consumer does not count.

        Args:
            held: Ids.
            at_once: Whether they may be claimed at once, or only when they have been idle as others must be.

        Raises:
            StreamUnavailableError: The server does not answer.
        """
        ...

    async def forget_the_dead(self) -> None:
        """Remove consumers that have not asked for long and have nothing pending.

        Raises:
            StreamUnavailableError: The server does not answer.
        """
        ...


class ResultSink(Protocol):
    """Ends entries, each exactly once."""

    async def publish(self, endings: Sequence[Ending]) -> list[bool]:
        """Write each outcome and take its entry off the images stream, in one step per entry.

        Returns:
            For each ending, whether the entry was still this consumer's. Where not, nothing was written: another
            worker has the entry.

        Raises:
            StreamUnavailableError: The server does not answer. Each entry either ended or is still pending.
        """
        ...


class Retention(Protocol):
    """Keeps the results stream from growing for ever."""

    async def trim(self) -> int:
        """Take old results off their stream, never one that a registered group has still to read.

        Returns:
            How many were taken off.

        Raises:
            StreamUnavailableError: The server does not answer.
        """
        ...


class Clock(Protocol):
    """Time, handed in so that a test can hold it."""

    def now(self) -> datetime:
        """Tell the time of day, with its zone."""
        ...

    async def sleep(self, duration_s: float) -> None:
        """Let a time pass."""
        ...
