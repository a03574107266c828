"""A plant on simulated time: the workers' real loop between streams and detector that are models, with faults.

The streams are `helpers.fakes`, which the contract tests hold equal to the real server. Everything else of a worker is
what runs in production: its loop, decoder, retries, heartbeats, reclaiming and results.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from enum import StrEnum
from typing import TypeVar, cast

import cv2
import numpy as np
from helpers.fakes import FakeClock, FakeReader, FakeSink, FakeStream, detection

from flawstream.imaging.pixels import Depths, PixelForm, Pixels
from schemas.errors import (
    DetectorDiedError,
    DetectorOverloadedError,
    Reason,
    StreamUnavailableError,
)
from schemas.settings import LimitSettings, WorkerSettings
from soak.simulated_time import SimulatedClock, SimulatedLoop
from workers.consume.decode import Decoder
from workers.consume.worker import StreamWorker
from workers.ports import Completion, Deferral, Entry, Judgement, Refusal

_T = TypeVar("_T")

CATEGORIES = ("bottle", "cable", "cap")
_POISONOUS, _DEADLY = range(200, 220), range(230, 250)
"""Grey levels."""
_RESTART_S = (0.5, 5.0)
_DETECTOR_RESTART_S = 2.0
_CALL_S = (0.002, 0.01)
_DETECT_S = (0.02, 0.1)
_SLOW_SERVER_S = (0.5, 5.0)
"""Clients wait no longer for the stream server: `redis.timeout_s`."""
_LONG_S = (1.0, 120.0)


class Kind(StrEnum):
    """What an image is, and so how it must end."""

    GOOD = "good"
    UNDECODABLE = "undecodable"
    UNKNOWN = "unknown"
    POISONOUS = "poisonous"
    DEADLY = "deadly"


SHARES = {Kind.UNDECODABLE: 0.01, Kind.UNKNOWN: 0.005, Kind.POISONOUS: 0.002, Kind.DEADLY: 0.001}
ENDINGS = {
    Kind.UNDECODABLE: Reason.UNDECODABLE,
    Kind.UNKNOWN: Reason.UNKNOWN_CATEGORY,
    Kind.POISONOUS: Reason.POISON,
    Kind.DEADLY: Reason.POISON,
}


def _jpeg(level: int) -> bytes:
    return bytes(cv2.imencode(".jpg", np.full((8, 8, 3), level, np.uint8))[1].tobytes())


_IMAGES = {
    Kind.GOOD: [_jpeg(level) for level in range(10, 130, 10)],  # those above 100 are anomalous
    Kind.UNDECODABLE: [b"no image"],
    Kind.UNKNOWN: [_jpeg(50)],
    Kind.POISONOUS: [_jpeg(210)],
    Kind.DEADLY: [_jpeg(240)],
}


class Fault(StrEnum):
    """What goes wrong: at one call, or everywhere for a while."""

    CALL_FAILS = "call_fails"
    REPLY_LOST = "reply_lost"
    CALL_SLOW = "call_slow"
    CALL_RAISES = "call_raises"
    WORKER_KILLED = "worker_killed"
    WORKER_STOPPED = "worker_stopped"
    CONSUMER_DELETED = "consumer_deleted"
    WORKER_PAUSED = "worker_paused"
    SERVER_AWAY = "server_away"
    PUBLISH_REFUSED = "publish_refused"
    ENGINE_RAISES = "engine_raises"
    ENGINE_HANGS = "engine_hangs"
    DETECTOR_AWAY = "detector_away"
    STORAGE_AWAY = "storage_away"
    WORKER_CLOCK_SET = "worker_clock_set"


AT_A_CALL = (
    Fault.CALL_FAILS,
    Fault.REPLY_LOST,
    Fault.CALL_SLOW,
    Fault.CALL_RAISES,
    Fault.WORKER_KILLED,
    Fault.WORKER_STOPPED,
    Fault.CONSUMER_DELETED,
)
FOR_A_WHILE = tuple(fault for fault in Fault if fault not in AT_A_CALL)


class _DiedError(BaseException):
    """The worker's process is no more: nothing of it goes on."""


@dataclass
class Plan:
    """What happens in an episode, all of it from one seed.

    Attributes:
        images: How many arrive.
        together: So many at once, as from as many cameras.
        pause_s: Between two, on average.
        workers: Their number.
        outages: For each fault of a while: when it begins, s.
        calls: Faults at calls of the workers, by the number of the call.
    """

    images: int
    together: int
    pause_s: float
    workers: int
    outages: list[tuple[float, Fault]] = field(default_factory=list)
    calls: dict[int, Fault] = field(default_factory=dict)


def make_plan(dice: random.Random, images: int) -> Plan:
    """Throw the dice for an episode."""
    plan = Plan(images, dice.choice((1, 8, 40)), dice.choice((0.002, 0.005, 0.03)), dice.randint(1, 4))
    arrival_s = plan.images * plan.pause_s
    plan.outages = sorted((dice.uniform(0, arrival_s + 5), dice.choice(FOR_A_WHILE)) for _ in range(dice.randint(1, 6)))
    plan.calls = {dice.randrange(10, 40 + images): dice.choice(AT_A_CALL) for _ in range(dice.randint(2, 14))}
    return plan


class Plant:
    """Streams, a detector, workers that are started again whenever they end, and what befalls them.

    Args:
        loop: Has the time.
        plan: What happens.
        dice: For durations, and who is hit.
        settings: Of the workers.

    Attributes:
        kinds: What each image is, by its entry's id.
        faults: What went wrong, and how often.
        quiet_s: When the last fault was over, s.
    """

    def __init__(self, loop: SimulatedLoop, plan: Plan, dice: random.Random, settings: WorkerSettings) -> None:
        self.clock = SimulatedClock(loop)
        self.stream = FakeStream(cast("FakeClock", self.clock))
        self.settings = settings
        self.kinds: dict[str, Kind] = {}
        self.faults: Counter[Fault] = Counter()
        self.quiet_s = 0.0
        self.dice = dice
        self._loop = loop
        self._plan = plan
        self._calls = 0
        self._now: Counter[Fault] = Counter()
        self.changed = asyncio.Event()
        self._workers = [_Worker(self, f"worker-{number}", loop) for number in range(plan.workers)]

    async def run(self, patience_s: Callable[[Kind], float]) -> None:
        """Let everything happen, then wait until all images have ended, or should have.

        Args:
            patience_s: By the kind of an image, how long after the last fault it may still be on its way.
        """
        tasks = [asyncio.create_task(worker.run()) for worker in self._workers]
        tasks += [asyncio.create_task(self._outage(at_s, fault)) for at_s, fault in self._plan.outages]
        try:
            await self._arrive()
            await asyncio.gather(*tasks[len(self._workers) :])
            while open_ids := self.open_ids():
                until_s = self.quiet_s + max(patience_s(self.kinds[key]) for key in open_ids)
                if self._loop.time() > until_s:
                    break
                await asyncio.sleep(1.0)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def open_ids(self) -> set[str]:
        """Return the ids of the entries that have not ended."""
        waiting = {entry.entry_id for entry in [*self.stream.waiting, *self.stream.orphans]}
        return waiting | self.stream.pending.keys()

    def is_now(self, fault: Fault) -> bool:
        """Return whether a fault of a while is going on."""
        return self._now[fault] > 0

    def over(self, at_s: float) -> None:
        """Note when a fault was over."""
        self.quiet_s = max(self.quiet_s, at_s)

    def delete_consumer(self, name: str) -> None:
        """Do as XGROUP DELCONSUMER does: nobody has what was pending for the worker."""
        for key in [key for key, pending in self.stream.pending.items() if pending.consumer == name]:
            self.stream.orphan(key)

    def now_s(self) -> float:
        """Return the seconds since the beginning."""
        return self._loop.time()

    def next_fault(self) -> Fault | None:
        """Count a call of a worker, and return what befalls it."""
        self._calls += 1
        return self._plan.calls.pop(self._calls, None)

    async def _arrive(self) -> None:
        for number in range(self._plan.images):
            if number % self._plan.together == 0:
                await asyncio.sleep(self._plan.together * self.dice.expovariate(1 / self._plan.pause_s))
            thrown = self.dice.random()
            kind = Kind.GOOD
            for other, share in SHARES.items():
                if thrown < share:
                    kind = other
                    break
                thrown -= share
            category = "nobody-knows" if kind is Kind.UNKNOWN else self.dice.choice(CATEGORIES)
            arrived_ms = int(self.clock.now().timestamp() * 1000)
            entry_id = f"{arrived_ms}-{len(self.kinds)}"
            fields = {b"category": category.encode(), b"image": self.dice.choice(_IMAGES[kind])}
            self.kinds[entry_id] = kind
            self.stream.add(Entry(entry_id, fields))
        self.over(self.now_s())

    async def _outage(self, at_s: float, fault: Fault) -> None:
        await asyncio.sleep(at_s)
        duration_s = self.dice.uniform(*_LONG_S)
        self.faults[fault] += 1
        if fault in {Fault.WORKER_PAUSED, Fault.WORKER_CLOCK_SET}:
            await self.dice.choice(self._workers).suffer(fault, duration_s)
        else:
            self._now[fault] += 1
            await asyncio.sleep(duration_s)
            self._now[fault] -= 1
            self.changed.set()
            self.changed = asyncio.Event()
        self.over(self.now_s())


class _Worker:
    """A worker's process: ends by a kill, by a signal or by itself, and is started again under its name."""

    def __init__(self, plant: Plant, name: str, loop: SimulatedLoop) -> None:
        self.name = name
        self.clock = _PausedClock(loop)
        self._plant = plant
        self._life = 0
        self._process: asyncio.Task[None] | None = None
        self._stop = asyncio.Event()

    async def run(self) -> None:
        """Run it for ever."""
        try:
            while True:
                self._life += 1
                self._stop = asyncio.Event()
                self._process = asyncio.create_task(self._live(self._life, self._stop))
                await asyncio.wait([self._process])
                self.kill()
                await asyncio.sleep(self._plant.dice.uniform(*_RESTART_S))
        finally:
            self.kill()

    async def _live(self, life: int, stop: asyncio.Event) -> None:
        plant, settings = self._plant, self._plant.settings
        while plant.is_now(Fault.ENGINE_HANGS):  # a detector judges an image before its worker reads any
            await plant.changed.wait()
        ports = _Ports(plant, self, life)
        worker = StreamWorker(
            ports,
            ports,
            ports,
            Decoder(1, LimitSettings(), self.clock),
            self.clock,
            settings=settings,
        )
        await worker.run(stop)

    def kill(self) -> None:
        """End the process as SIGKILL does: nothing that it has begun goes on."""
        self._life += 1
        if self._process is not None:
            self._process.cancel()

    def is_alive(self, life: int) -> bool:
        """Return whether this is still the same process."""
        return self._life == life

    def stop(self) -> None:
        """End it as SIGTERM does."""
        self._stop.set()

    async def suffer(self, fault: Fault, duration_s: float) -> None:
        """Stand still, or have a wrong clock, for a while."""
        if fault is Fault.WORKER_PAUSED:
            with self.clock.paused():
                await asyncio.sleep(duration_s)
        else:
            self.clock.wrong_by = timedelta(seconds=self._plant.dice.choice((-1, 1)) * 30 * duration_s)
            await asyncio.sleep(duration_s)
            self.clock.wrong_by = timedelta()


class _PausedClock(SimulatedClock):
    """The clock of a process that can be paused: whoever sleeps then wakes when it goes on."""

    def __init__(self, loop: SimulatedLoop) -> None:
        super().__init__(loop)
        self._running = asyncio.Event()
        self._running.set()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Pause the process."""
        self._running.clear()
        try:
            yield
        finally:
            self._running.set()

    async def running(self) -> None:
        """Wait while the process is paused."""
        while not self._running.is_set():
            await self._running.wait()

    async def sleep(self, duration_s: float) -> None:
        """Wait."""
        await super().sleep(duration_s)
        await self.running()


class _Ports:
    """Reader, sink and detector of one life of a worker; each call takes its time and may fail as planned."""

    def __init__(self, plant: Plant, worker: _Worker, life: int) -> None:
        self._plant = plant
        self._worker = worker
        self._life = life
        claim_idle_ms = plant.settings.claim_idle_ms
        self._reader = FakeReader(plant.stream, worker.name, claim_idle_ms=claim_idle_ms)
        self._sink = FakeSink(plant.stream, worker.name)

    async def read(self, max_entries: int, max_bytes: int) -> list[Entry]:
        entries = await self._on_server(lambda: self._reader.read(max_entries, max_bytes))
        if not entries:
            await self._worker.clock.sleep(self._plant.dice.uniform(0.1, 2.0))  # as a blocking read does
        return entries

    async def claim(self, max_entries: int, in_flight: Collection[str] = ()) -> list[Entry]:
        return await self._on_server(lambda: self._reader.claim(max_entries, in_flight))

    async def heartbeat(self, in_flight: Collection[str]) -> None:
        await self._on_server(lambda: self._reader.heartbeat(in_flight))

    async def release(self, ids: Collection[str], *, at_once: bool = True) -> None:
        await self._on_server(lambda: self._reader.release(ids, at_once=at_once))

    async def repair_pending(self) -> int:
        return await self._on_server(self._reader.repair_pending)

    async def remove_stale_consumers(self) -> None:
        await self._on_server(self._reader.remove_stale_consumers)

    async def publish(self, completions: Sequence[Completion]) -> list[bool]:
        if self._plant.is_now(Fault.PUBLISH_REFUSED):
            await self._take(_CALL_S)
            raise RuntimeError("WRONGTYPE Operation against a key holding the wrong kind of value")
        return await self._on_server(lambda: self._sink.publish(completions))

    async def pixel_forms(self, categories: Sequence[str]) -> Sequence[PixelForm]:
        return await self._on_detector(lambda: self._forms(len(categories)))

    async def detect(
        self, images: Pixels, categories: Sequence[str], depths: Depths | None = None
    ) -> Sequence[Judgement]:
        del depths  # all images have eight bits
        return await self._on_detector(lambda: self._judge(images, categories))

    async def _forms(self, count: int) -> list[PixelForm]:
        return [PixelForm(8)] * count

    async def _judge(self, images: Pixels, categories: Sequence[str]) -> Sequence[Judgement]:
        await self._take(_DETECT_S)
        if self._plant.is_now(Fault.ENGINE_HANGS):
            await asyncio.Event().wait()
        levels = [int(image.mean()) for image in images]
        if any(level in _DEADLY for level in levels):
            await asyncio.sleep(_DETECTOR_RESTART_S)
            raise DetectorDiedError("the detector's process died")
        if any(level in _POISONOUS for level in levels) or self._plant.is_now(Fault.ENGINE_RAISES):
            raise ValueError("an engine that raises")
        away = self._plant.is_now(Fault.STORAGE_AWAY)
        return [self._judgement(level, category, away=away) for level, category in zip(levels, categories, strict=True)]

    @staticmethod
    def _judgement(level: int, category: str, *, away: bool) -> Judgement:
        if category not in CATEGORIES:
            return Refusal(Reason.UNKNOWN_CATEGORY, f"no model of {category}")
        if away and category != CATEGORIES[0]:  # which is loaded
            return Deferral("the registry's storage cannot be reached")
        return detection(level / 100)

    async def _on_server(self, call: Callable[[], Awaitable[_T]]) -> _T:
        if self._plant.is_now(Fault.SERVER_AWAY):
            await self._take(_CALL_S)
            raise StreamUnavailableError("nobody listens")
        return await self._with_fault(call, StreamUnavailableError("the connection was cut"), _SLOW_SERVER_S)

    async def _on_detector(self, call: Callable[[], Awaitable[_T]]) -> _T:
        if self._plant.is_now(Fault.DETECTOR_AWAY):
            await self._take(_CALL_S)
            raise DetectorOverloadedError("no replica took the call")
        return await self._with_fault(call, DetectorOverloadedError("the call was lost"), _LONG_S)

    async def _with_fault(self, call: Callable[[], Awaitable[_T]], lost: Exception, slow_s: tuple[float, float]) -> _T:
        """Make a call, at which something may go wrong."""
        await self._take(_CALL_S)
        fault = self._plant.next_fault()
        if fault is None:
            return await call()
        self._plant.faults[fault] += 1
        self._plant.over(self._plant.now_s())
        match fault:
            case Fault.CALL_FAILS:
                raise lost
            case Fault.CALL_RAISES:
                raise RuntimeError("a bug of somebody's")
            case Fault.REPLY_LOST:
                await call()
                raise lost
            case Fault.CALL_SLOW:
                duration_s = self._plant.dice.uniform(*slow_s)
                self._plant.over(self._plant.now_s() + duration_s)
                await self._take((duration_s, duration_s))
                return await call()
            case Fault.WORKER_KILLED:
                if self._plant.dice.random() < 0.5:
                    await call()
                self._worker.kill()
                raise _DiedError
            case Fault.CONSUMER_DELETED:
                self._plant.delete_consumer(self._worker.name)
                return await call()
            case _:
                self._worker.stop()
                return await call()

    async def _take(self, duration_s: tuple[float, float]) -> None:
        await self._worker.clock.sleep(self._plant.dice.uniform(*duration_s))
        self._still_alive()

    def _still_alive(self) -> None:
        """Let nothing of a dead process go on."""
        if not self._worker.is_alive(self._life):
            raise asyncio.CancelledError
