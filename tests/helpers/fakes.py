"""Everything a worker is handed, in memory: no server, no model, no waiting."""

import asyncio
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import cv2
import numpy as np

from flawstream.imaging.pixels import Depths, PixelForm, Pixels
from schemas.errors import DetectorDiedError
from schemas.messages import DetectionResult, Verdict
from schemas.settings import BitDepth
from workers.ports import Completion, Deferral, Detection, Entry, Judgement, Refusal

ARRIVED = datetime(2026, 1, 1, tzinfo=UTC)
"""When entries made by `entry_id` arrived."""


def entry_id(number: int) -> str:
    """Name an entry that arrived at `ARRIVED`."""
    return f"{int(ARRIVED.timestamp() * 1000)}-{number}"


def png(grey: int = 128, size: tuple[int, int] = (8, 8)) -> bytes:
    """Make a small PNG of one grey; `size` is (height, width) in pixels."""
    return bytes(cv2.imencode(".png", np.full((*size, 3), grey, np.uint8))[1].tobytes())


def make_result(message_id: str, **changes: Any) -> DetectionResult:
    """Make the result of a normal bottle; `changes` are fields of it."""
    fields: dict[str, Any] = {
        "category": "bottle",
        "score": 0.5,
        "p_value": 0.5,
        "threshold": 1.0,
        "verdict": Verdict.NORMAL,
        "model": "bottle@v1",
        "image_shape": (8, 8),
    }
    return DetectionResult(id=message_id, **{**fields, **changes})


def image_entry(number: int, *, category: str = "bottle", image: bytes | None = None, deliveries: int = 1) -> Entry:
    """Make an entry as a producer's XADD does."""
    fields = {b"category": category.encode(), b"image": png() if image is None else image}
    return Entry(entry_id(number), fields, deliveries)


def detection(score: float = 0.5, *, threshold: float = 1.0) -> Detection:
    """Make what a model might say."""
    return Detection(
        score=score,
        p_value=0.25,
        threshold=threshold,
        pixel_threshold=threshold,
        verdict=Verdict.ANOMALOUS if score > threshold else Verdict.NORMAL,
        model="bottle@v1",
        grids=(np.full((2, 2), score, np.float16),),
    )


@dataclass(slots=True)
class FakeClock:
    """A `Clock` that stands still until a test moves it on; sleepers are awake at once, after `on_sleep`."""

    time: datetime = ARRIVED
    slept_s: list[float] = field(default_factory=list)
    on_sleep: Callable[[], None] = lambda: None

    def now(self) -> datetime:
        return self.time

    def advance(self, duration_s: float) -> None:
        self.time += timedelta(seconds=duration_s)

    async def sleep(self, duration_s: float) -> None:
        self.slept_s.append(duration_s)
        self.on_sleep()
        await asyncio.sleep(0)


class FakeStream:
    """An images stream with its group, as far as reader and sink can see it."""

    def __init__(self, clock: FakeClock | None = None) -> None:
        self.clock = clock or FakeClock()
        self.waiting: list[Entry] = []
        self.pending: dict[str, _Pending] = {}
        self.ended: list[Completion] = []
        self.orphans: list[Entry] = []

    def orphan(self, entry_id: str) -> None:
        """Have an entry acknowledged by somebody who does not complete it."""
        self.orphans.append(replace(self.pending.pop(entry_id).entry, deliveries=0))

    def add(self, *entries: Entry) -> None:
        self.waiting += entries

    def give(self, entry: Entry, consumer: str) -> Entry:
        deliveries = self.pending[entry.entry_id].entry.deliveries + 1 if entry.entry_id in self.pending else 1
        given = Entry(entry.entry_id, entry.fields, max(deliveries, entry.deliveries))
        self.pending[entry.entry_id] = _Pending(given, consumer, self.clock.now())
        return given


@dataclass(slots=True)
class _Pending:
    entry: Entry
    consumer: str
    since: datetime


class FakeReader:
    """A `StreamReader` on a `FakeStream`.

    `failures` are raised, one a call, before anything is read. `on_idle` is called when there is nothing to read.
    """

    def __init__(self, stream: FakeStream, consumer: str = "a", *, claim_idle_ms: int = 60_000) -> None:
        self.failures: list[Exception] = []
        self.heartbeats: list[list[str]] = []
        self.on_idle: Callable[[], object] = lambda: None
        self._stream = stream
        self._consumer = consumer
        self._claim_idle = timedelta(milliseconds=claim_idle_ms)
        self._claimed = ""
        self._own = sorted(key for key, pending in stream.pending.items() if pending.consumer == consumer)

    async def read(self, max_entries: int, max_bytes: int) -> list[Entry]:
        await asyncio.sleep(0)
        if self.failures:
            raise self.failures.pop(0)
        while self._own:
            pending = self._stream.pending.get(self._own.pop(0))
            if pending is not None and pending.consumer == self._consumer:
                return [self._stream.give(pending.entry, self._consumer)]
        taken: list[Entry] = []
        while self._stream.waiting and len(taken) < max_entries and max_bytes > 0:
            taken.append(self._stream.waiting.pop(0))
            max_bytes -= sum(len(name) + len(value) for name, value in taken[-1].fields.items())
        if not taken:
            self.on_idle()
        return [self._stream.give(entry, self._consumer) for entry in taken]

    async def claim(self, max_entries: int, in_flight: Collection[str] = ()) -> list[Entry]:
        await asyncio.sleep(0)
        latest = self._stream.clock.now() - self._claim_idle
        idle = [
            pending
            for key, pending in sorted(self._stream.pending.items())
            if key > self._claimed and key not in in_flight and pending.since <= latest
        ]
        claimed = [self._stream.give(pending.entry, self._consumer) for pending in idle[:max_entries]]
        self._claimed = claimed[-1].entry_id if len(claimed) == max_entries else ""
        return claimed

    async def heartbeat(self, in_flight: Collection[str]) -> None:
        self.heartbeats.append(sorted(in_flight))
        for pending in self._ours(in_flight):
            pending.since = self._stream.clock.now()

    async def release(self, ids: Collection[str], *, at_once: bool = True) -> None:
        for pending in self._ours(ids):
            pending.entry = replace(pending.entry, deliveries=pending.entry.deliveries - 1)
            pending.since = self._stream.clock.now() - (self._claim_idle if at_once else timedelta())

    async def repair_pending(self) -> int:
        orphans, self._stream.orphans = self._stream.orphans, []
        for entry in orphans:
            since = self._stream.clock.now() - self._claim_idle
            self._stream.pending[entry.entry_id] = _Pending(entry, self._consumer, since)
        return len(orphans)

    async def remove_stale_consumers(self) -> None:
        """Consumers leave no trace here."""

    def _ours(self, ids: Collection[str]) -> list["_Pending"]:
        found = (self._stream.pending.get(key) for key in ids)
        return [pending for pending in found if pending is not None and pending.consumer == self._consumer]


class FakeSink:
    """A `ResultSink` on a `FakeStream`.

    `failures` are raised, one a call, before anything is written; `lost_replies` after it, as when the reply is lost.
    """

    def __init__(self, stream: FakeStream, consumer: str = "a") -> None:
        self.failures: list[Exception] = []
        self.lost_replies: list[Exception] = []
        self.calls: list[list[Completion]] = []
        self._stream = stream
        self._consumer = consumer

    async def publish(self, completions: Sequence[Completion]) -> list[bool]:
        await asyncio.sleep(0)
        self.calls.append(list(completions))
        if self.failures:
            raise self.failures.pop(0)
        ended = [self._end(completion) for completion in completions]
        if self.lost_replies:
            raise self.lost_replies.pop(0)
        return ended

    def _end(self, completion: Completion) -> bool:
        pending = self._stream.pending.get(completion.entry_id)
        if pending is None or pending.consumer != self._consumer:
            return False
        del self._stream.pending[completion.entry_id]
        self._stream.ended.append(completion)
        return True


class FakeDetector:
    """A `Detector` that calls bright images anomalous.

    The score is the mean grey level over 100. `failures` are raised, one a call. `poisonous` grey levels break every
    batch that has one, `deadly` ones end the detector's process; `unknown` categories are not judged. While `gate` is
    clear, a call waits; each call releases `started` once.
    """

    def __init__(self, size_px: int = 8) -> None:
        self.failures: list[Exception] = []
        self.poisonous: set[int] = set()
        self.deadly: set[int] = set()
        self.unknown: dict[str, Refusal | Deferral] = {}
        self.bits: BitDepth = 16
        self.batches: list[list[str]] = []
        self.depths: list[BitDepth | None] = []
        self.under_way = 0
        self.most_under_way = 0
        self.started = asyncio.Semaphore(0)
        self.gate = asyncio.Event()
        self.gate.set()
        self._size_px = size_px

    async def pixel_forms(self, categories: Sequence[str]) -> list[PixelForm]:
        return [PixelForm(self._size_px, bits=self.bits)] * len(categories)

    async def detect(
        self, images: Pixels, categories: Sequence[str], depths: Depths | None = None
    ) -> Sequence[Judgement]:
        assert images.dtype == np.uint8
        assert images.shape == (len(categories), self._size_px, self._size_px, 3)
        self.batches.append(list(categories))
        self.depths += depths or ()
        self.started.release()
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            await self.gate.wait()
            await asyncio.sleep(0)
            if self.failures:
                raise self.failures.pop(0)
            levels = [int(image.mean()) for image in images]
            if self.deadly & set(levels):
                raise DetectorDiedError("a deadly image")
            if self.poisonous & set(levels):
                raise ValueError("a poisonous image")
            return [
                self.unknown.get(category) or detection(level / 100)
                for level, category in zip(levels, categories, strict=True)
            ]
        finally:
            self.under_way -= 1
