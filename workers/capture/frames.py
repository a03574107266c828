"""Encodes and pushes the frames of a camera. What the stream does not take in time is dropped, the oldest first."""

import asyncio
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime

import cv2

from flawstream.telemetry import metrics as m
from flawstream.telemetry.metrics import NO_METRICS, Metrics
from schemas.errors import BacklogFullError, IdConflictError, MessageError, Reason, StreamUnavailableError
from workers.capture.camera import Camera, Frame, FrameQueue
from workers.capture.pause import pause
from workers.produce.producer import Producer
from workers.redis.backoff import backoff_s

_PUSHERS = 2
"""One frame is encoded while another is sent."""
_WAIT_S = 1.0
"""How long a frame waits for capacity of the backlog; it is refused then, and the next one tries."""
_REPORT_S = 0.5
_DRAIN_S = 5.0
"""At the end, for the frames that are in the queue, and for the camera's thread."""


@dataclass(slots=True)
class FrameStats:
    """Counts of one camera's capture.

    Attributes:
        frames: Frames that the camera delivered.
        pushed: Frames pushed.
        dropped: Frames dropped from the queue, the oldest first, and those left in it at the end.
        refused: Frames that the stream did not take: the backlog was full, or they are too large.
        reconnects: How often the camera's stream ended and was opened again.
    """

    frames: int = 0
    pushed: int = 0
    dropped: int = 0
    refused: int = 0
    reconnects: int = 0

    def as_dict(self) -> dict[str, int]:
        """Return the counts as JSON has them."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Encoding:
    """How frames are compressed.

    Attributes:
        png: As PNG, without loss; else JPEG.
        quality: Of JPEG, 1 to 100.
    """

    png: bool = False
    quality: int = 95

    def encode(self, frame: Frame) -> bytes:
        """Compress a frame.

        Raises:
            MessageError: `malformed`: it cannot be, as no JPEG has more than 65,500 pixels a side.
        """
        suffix, options = (".png", []) if self.png else (".jpg", [cv2.IMWRITE_JPEG_QUALITY, self.quality])
        encoded, data = cv2.imencode(suffix, frame.pixels, options)
        if not encoded:
            raise MessageError(Reason.MALFORMED, f"a frame of shape {frame.pixels.shape} cannot be encoded as {suffix}")
        return bytes(data.tobytes())


class FrameCapture:
    """Pushes a camera's frames.

    Args:
        camera: The camera.
        name: The camera's name, which ids begin with.
        category: Of all its frames.
        producer: Pushes.
        encoding: How frames are compressed.
        queue_frames: Most frames that wait to be pushed.
        metrics: Receives counts.
        report: Receives messages for a person.
    """

    def __init__(
        self,
        camera: Camera,
        name: str,
        category: str,
        producer: Producer,
        *,
        encoding: Encoding = Encoding(),
        queue_frames: int = 8,
        metrics: Metrics = NO_METRICS,
        report: Callable[[str], None] = lambda _text: None,
    ) -> None:
        self._camera = camera
        self._name = name
        self._category = category
        self._producer = producer
        self._encoding = encoding
        self._queue_frames = queue_frames
        self._metrics = metrics
        self._report = report
        self._reported: set[str] = set()
        self.stats = FrameStats()

    async def run(self, stop: asyncio.Event) -> None:
        """Push frames until it is stopped, or the camera has delivered as many as are wanted.

        Args:
            stop: Ends it, within five seconds, in which the frames in the queue are pushed.

        Raises:
            SourceUnavailableError: The camera does not answer at the start.
            ConfigError: The server refuses the user.
        """
        queue = FrameQueue(self._queue_frames)
        self._camera.start(queue, await asyncio.to_thread(self._camera.open))
        pushers = [asyncio.create_task(self._push_all(queue)) for _ in range(_PUSHERS)]
        try:
            while not stop.is_set() and not any(pusher.done() for pusher in pushers):
                await pause(stop, _REPORT_S)
                self._count(queue.dropped)
        finally:
            queue.close()
            stopping = asyncio.create_task(asyncio.to_thread(self._camera.stop, _DRAIN_S))
            _, late = await asyncio.wait(pushers, timeout=_DRAIN_S)
            for pusher in late:
                pusher.cancel()
            *ended, _ = await asyncio.gather(*pushers, stopping, return_exceptions=True)
            self._count(self._camera.kept - self.stats.pushed - self.stats.refused)
        for error in (self._camera.error, *ended):
            if isinstance(error, BaseException) and not isinstance(error, asyncio.CancelledError):
                raise error

    async def _push_all(self, queue: FrameQueue) -> None:
        while (frame := await queue.get()) is not None:
            try:
                await self._push(frame, await asyncio.to_thread(self._encoding.encode, frame))
            except (BacklogFullError, MessageError, IdConflictError) as error:
                self.stats.refused += 1
                self._metrics.add(m.CAPTURE_REFUSED, category=self._category)
                self._report_once(f"refused: {error}", error.code)
            else:
                self._reported.clear()
                self.stats.pushed += 1
                self._metrics.add(m.CAPTURE_PUSHED, category=self._category)

    async def _push(self, frame: Frame, data: bytes) -> None:
        failures = 0
        while True:
            try:
                await self._producer.push(
                    data,
                    self._category,
                    id=frame_id(self._name, frame.captured_at, frame.number),
                    captured_at=frame.captured_at,
                    extra={"camera": self._name.encode()},
                    wait_s=_WAIT_S,
                )
            except StreamUnavailableError as error:  # perhaps it was written; the same id again is written once
                failures += 1
                self._report_once(f"waiting: {error}", error.code)
                await asyncio.sleep(backoff_s(failures))
            else:
                return

    def _count(self, dropped: int) -> None:
        """Count what the camera's thread and the queue have counted."""
        counts = (
            (m.CAPTURE_FRAMES, "frames", self._camera.frames),
            (m.CAPTURE_DROPPED, "dropped", dropped),
            (m.CAPTURE_RECONNECTS, "reconnects", self._camera.reconnects),
        )
        for counter, name, value in counts:
            self._metrics.add(counter, value - getattr(self.stats, name), category=self._category)
            setattr(self.stats, name, value)

    def _report_once(self, text: str, about: str) -> None:
        if about not in self._reported:
            self._reported.add(about)
            self._report(text)


def frame_id(name: str, captured_at: datetime, number: int) -> str:
    """Return the message id of a frame: camera, time in UTC, number."""
    return f"{name}-{captured_at:%Y%m%dT%H%M%S.%fZ}-{number}"
