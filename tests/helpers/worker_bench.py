"""A worker with fakes for everything around it."""

import asyncio

from helpers.fakes import FakeDetector, FakeReader, FakeSink, FakeStream
from schemas.messages import DeadLetter, DetectionResult
from schemas.settings import LimitSettings, WorkerSettings
from workers.consume.decode import Decoder
from workers.consume.worker import StreamWorker


class Bench:
    """A worker with everything around it."""

    def __init__(self, settings: WorkerSettings | None = None, stream: FakeStream | None = None) -> None:
        self.stream = stream or FakeStream()
        self.clock = self.stream.clock
        self.reader = FakeReader(self.stream)
        self.sink = FakeSink(self.stream)
        self.detector = FakeDetector()
        self.trims = 0
        self.worker = StreamWorker(
            self.reader,
            self.sink,
            self.detector,
            Decoder(2, LimitSettings(), self.clock),
            self.clock,
            settings=settings or WorkerSettings(),
            retention=self,
        )

    async def trim(self) -> int:
        self.trims += 1
        return 0

    @property
    def results(self) -> dict[str, DetectionResult]:
        return {end.entry_id: end.outcome for end in self.stream.ended if isinstance(end.outcome, DetectionResult)}

    @property
    def dead(self) -> dict[str, DeadLetter]:
        return {end.entry_id: end.outcome for end in self.stream.ended if isinstance(end.outcome, DeadLetter)}

    async def run_until_idle(self) -> None:
        """Run the loop until nothing is left to read."""
        stop = asyncio.Event()
        self.reader.on_idle = stop.set
        await self.worker.run(stop)
