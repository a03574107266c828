"""Reads frames from a camera, by OpenCV in a thread of its own, into a bounded queue. Knows nothing of the stream.

Shape legend: H W height and width of a frame in pixels.
"""

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from schemas.errors import SourceUnavailableError
from workers.redis.backoff import backoff_s

cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # what matters of it is reported here, in one line
_ANSWER_MS = 10_000
"""How long FFmpeg waits for a network camera; Video4Linux waits ten seconds by itself."""
_QUEUE_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame.

    Attributes:
        pixels: (H, W, 3) BGR or (H, W) grey.
        captured_at: When it came from the camera.
        number: How many came before it, since the start.
    """

    pixels: NDArray[Any]
    captured_at: datetime
    number: int


class FrameQueue:
    """Frames between the camera's thread and the event loop; the oldest are dropped where there are too many.

    Args:
        most: Most frames; 256 MiB at most too.

    Attributes:
        dropped: Frames dropped.
    """

    def __init__(self, most: int) -> None:
        self._frames: deque[Frame] = deque()
        self._bytes = 0
        self._most = most
        self._lock = threading.Lock()
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._closed = False
        self.dropped = 0

    def put(self, frame: Frame) -> None:
        """Add a frame, from any thread."""
        with self._lock:
            self._frames.append(frame)
            self._bytes += frame.pixels.nbytes
            while len(self._frames) > self._most or (self._bytes > _QUEUE_BYTES and len(self._frames) > 1):
                self._pop()
                self.dropped += 1
        self._wake()

    def close(self) -> None:
        """Have `get` return None once the queue is empty; from any thread."""
        self._closed = True
        self._wake()

    async def get(self) -> Frame | None:
        """Wait for the oldest frame; None: the queue is closed and empty."""
        while True:
            with self._lock:
                if self._frames:
                    return self._pop()
            if self._closed:
                return None
            self._changed.clear()
            if not self._frames and not self._closed:
                await self._changed.wait()

    def _wake(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended before a camera that hangs
            self._loop.call_soon_threadsafe(self._changed.set)

    def _pop(self) -> Frame:
        frame = self._frames.popleft()
        self._bytes -= frame.pixels.nbytes
        return frame


@dataclass(frozen=True, slots=True)
class Selection:
    """Which of the camera's frames are kept.

    Attributes:
        every: One in so many.
        fps: At most so many a second; None: all.
        count: The camera is stopped after so many; 0: never.
    """

    every: int = 1
    fps: float | None = None
    count: int = 0


class Camera:
    """Reads a camera until it is stopped, and opens it again, with backoff, when its stream ends.

    Args:
        source: A URL or a device's number.
        selection: Which frames are kept.
        report: Receives messages for a person, in the camera's thread.

    Attributes:
        frames: Frames that the camera delivered.
        kept: Those of them that were put into the queue.
        reconnects: How often its stream ended.
        error: What ended the thread unexpectedly.
    """

    def __init__(self, source: str | int, selection: Selection, report: Callable[[str], None]) -> None:
        self._source = source
        self._selection = selection
        self._report = report
        self._stop = threading.Event()
        self._due_s = float("-inf")
        self.frames = 0
        self.kept = 0
        self.reconnects = 0
        self.error: BaseException | None = None

    def start(self, queue: FrameQueue, capture: "cv2.VideoCapture") -> None:
        """Start reading into a queue, which is closed at the end.

        Args:
            queue: Receives the frames that are kept.
            capture: The camera as `open` has opened it.
        """
        self._thread = threading.Thread(target=self._run, args=(queue, capture), name="camera", daemon=True)
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """Have the thread end, and wait so long for it."""
        self._stop.set()
        self._thread.join(timeout_s)

    def open(self) -> "cv2.VideoCapture":
        """Open the camera.

        Raises:
            SourceUnavailableError: It does not answer.
        """
        if isinstance(self._source, int):
            capture = cv2.VideoCapture(self._source, cv2.CAP_V4L2)
        else:
            timeouts = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, _ANSWER_MS, cv2.CAP_PROP_READ_TIMEOUT_MSEC, _ANSWER_MS]
            capture = cv2.VideoCapture(self._source, cv2.CAP_FFMPEG, timeouts)
        if not capture.isOpened():
            raise SourceUnavailableError("the camera does not answer, or gives no video that OpenCV reads")
        return capture

    def _run(self, queue: FrameQueue, capture: "cv2.VideoCapture") -> None:
        try:
            failures = 0
            while not self._stop.is_set():
                before = self.frames
                self._read(capture, queue)
                capture.release()
                if self.frames > before:
                    failures = 0
                capture = self._open_again(failures, capture)
                failures += 1
        except BaseException as error:  # noqa: BLE001 - raised again where the queue is read
            self.error = error
        finally:
            queue.close()

    def _open_again(self, failures: int, capture: "cv2.VideoCapture") -> "cv2.VideoCapture":
        """Open the camera again, however long that takes; where it is stopped, return the old capture."""
        while not self._stop.is_set():
            failures += 1
            if failures == 1:
                self._report("the camera's stream has ended; it is opened again")
            self._stop.wait(backoff_s(failures))
            with contextlib.suppress(SourceUnavailableError):
                opened = self.open()
                self.reconnects += 1
                return opened
        return capture

    def _read(self, capture: "cv2.VideoCapture", queue: FrameQueue) -> None:
        """Read until the stream ends."""
        while not self._stop.is_set():
            try:
                if not capture.grab():
                    break
                now = datetime.now(UTC)
                self.frames += 1
                if not self._is_kept(now.timestamp()):
                    continue
                read, pixels = capture.retrieve()
            except cv2.error:
                break
            if not read:
                break
            queue.put(Frame(np.asarray(pixels), now, self.frames - 1))
            self.kept += 1
            if self.kept == self._selection.count:
                self._stop.set()

    def _is_kept(self, now_s: float) -> bool:
        if (self.frames - 1) % self._selection.every:
            return False
        if self._selection.fps is not None:
            if now_s < self._due_s:
                return False
            interval_s = 1 / self._selection.fps
            in_time = now_s - self._due_s < interval_s
            self._due_s = (self._due_s if in_time else now_s) + interval_s
        return True
