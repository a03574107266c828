"""Measures the time of each stage of an image, with the detector in this process or behind Ray Serve."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.progress import Progress

from flawstream.telemetry import metrics as m
from flawstream.telemetry.metrics import Histogram, NoMetrics
from flawstream_cli.cluster import on_cluster
from flawstream_cli.commands.serve import running, with_redis
from flawstream_cli.terminal import busy, err
from schemas.errors import RegistryError
from schemas.settings import BacklogSettings, Settings
from serving.app import detector_handle
from serving.deployments import HandleDetector
from serving.detector import make_detector
from workers.consume.sharded import ShardedWorker
from workers.ports import Detector
from workers.produce.producer import Producer
from workers.redis.connection import make_client
from workers.redis.embedded import EmbeddedServer, free_port

Layout = Literal["worker", "serve"]
"""Where the detector runs."""

_WARM_UP_BATCHES = 4
_POLL_S = 0.005
_UNBOUNDED = BacklogSettings(max_images=1_000_000, max_bytes=1 << 40)

_Work = Sequence[tuple[bytes, str]]


class StageTimes(NoMetrics):
    """Sums the stage times that a worker reports.

    Attributes:
        seconds: Total by stage, over all batches.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def observe(self, histogram: Histogram, value: float, /, **labels: str) -> None:
        """Add a stage time; ignore all other metrics."""
        if histogram is m.STAGE_SECONDS:
            stage = labels["stage"]
            self.seconds[stage] = self.seconds.get(stage, 0.0) + value


@dataclass(frozen=True)
class Profile:
    """Measured stage times of one layout.

    Attributes:
        layout: Where the detector ran.
        engine: Name of the engine.
        images: Images completed during the measurement.
        dead_letters: How many of them became dead letters.
        wall_s: From the first read to the last outcome, seconds.
        worker_batch, detector_batch: Mean images per batch.
        stages_s: Seconds by stage, over all batches; stages of different batches overlap.
    """

    layout: Layout
    engine: str
    images: int
    dead_letters: int
    wall_s: float
    worker_batch: float
    detector_batch: float
    stages_s: dict[str, float]

    def as_dict(self) -> dict[str, object]:
        """Return the fields printed with --json."""
        return {
            "layout": self.layout,
            "engine": self.engine,
            "images": self.images,
            "dead_letters": self.dead_letters,
            "images_per_s": round(self.images / self.wall_s, 1),
            "engine_busy": round(self.stages_s["detect"] / self.wall_s, 3),
            "worker_batch": round(self.worker_batch, 1),
            "detector_batch": round(self.detector_batch, 1),
            "ms_per_image": {name: round(1000 * spent_s / self.images, 3) for name, spent_s in self.stages_s.items()},
        }


def measure_stages(layout: Layout, settings: Settings, work: Sequence[tuple[bytes, str]]) -> Profile:
    """Measure the stages on an embedded server of its own.

    Args:
        layout: Where the detector runs.
        settings: For the registry, the engine and the worker.
        work: Encoded images, with their categories.

    Raises:
        RegistryError: The current version of a category cannot be used.
    """
    with EmbeddedServer() as server:
        return (_in_worker if layout == "worker" else _behind_handle)(with_redis(settings, server.url), work)


def _in_worker(settings: Settings, work: _Work) -> Profile:
    """Measure with the detector in this process."""
    with busy("loading the models"):
        detector = make_detector(settings.registry.root, settings.model, settings.detector)

    async def measure() -> Profile:
        async def status() -> dict[str, Any]:
            return detector.status()

        await detector.start()
        try:
            return await _measure("worker", settings, detector, status, work)
        finally:
            await detector.stop()

    return asyncio.run(measure())


def _behind_handle(settings: Settings, work: _Work) -> Profile:
    """Measure with the detector in a replica of Ray Serve."""
    updates = {"worker": {"replicas": 0}, "api": {"port": free_port()}}
    changed = {name: getattr(settings, name).model_copy(update=update) for name, update in updates.items()}
    without_worker = settings.model_copy(update=changed)
    with on_cluster(None) as cluster, running(without_worker, cluster):
        detector = HandleDetector(detector_handle(), settings.detector.timeout_s)
        return asyncio.run(_measure("serve", settings, detector, detector.status, work))


async def _measure(
    layout: Layout, settings: Settings, detector: Detector, status: Callable[[], Awaitable[dict[str, Any]]], work: _Work
) -> Profile:
    """Measure a worker on all images, after a few batches of warm-up."""
    async with make_client(settings.redis) as client, Producer(settings.redis, settings.limits, _UNBOUNDED) as producer:
        times = StageTimes()
        worker = ShardedWorker(client, "profile", detector, settings, times)
        try:
            warm_up = _WARM_UP_BATCHES * settings.worker.batch_size
            await _run(worker, producer, work[:warm_up])
            stages_before, stats_before, status_before = dict(times.seconds), worker.stats, await status()
            wall_s = await _run(worker, producer, work)
            stats, status_after = worker.stats, await status()
        finally:
            await worker.close()
    spent = {name: seconds - stages_before.get(name, 0.0) for name, seconds in times.seconds.items()}
    detect_s, calls_s = (status_after[name] - status_before[name] for name in ("detect_s", "calls_s"))
    return Profile(
        layout=layout,
        engine=status_after["engine"],
        images=len(work),
        dead_letters=stats.dead.total() - stats_before.dead.total(),
        wall_s=wall_s,
        worker_batch=(stats.read - stats_before.read) / (stats.batches - stats_before.batches),
        detector_batch=(status_after["images"] - status_before["images"])
        / (status_after["batches"] - status_before["batches"]),
        stages_s={
            "read": spent["read"],
            "decode": spent["decode"],
            "handle": spent["call"] - calls_s,
            "wait": calls_s - detect_s,
            "detect": detect_s,
            "encode": spent["encode"],
            "publish": spent["publish"],
        },
    )


async def _run(worker: ShardedWorker, producer: Producer, work: _Work) -> float:
    """Push all images, then run the worker until they are completed; return the seconds that the worker took.

    Raises:
        RegistryError: The current version of a category cannot be used.
    """
    for image, category in work:
        await producer.push(image, category)
    expected = worker.stats.completed + len(work)
    stop = asyncio.Event()
    started_s = time.perf_counter()
    working = asyncio.create_task(worker.run(stop))
    with Progress(console=err, transient=True, disable=not err.is_terminal) as bars:
        bar = bars.add_task("judging", total=len(work))
        while (remaining := expected - (stats := worker.stats).completed) > 0 and not working.done():
            if stats.deferred:
                break
            bars.update(bar, completed=len(work) - remaining)
            await asyncio.sleep(_POLL_S)
    wall_s = time.perf_counter() - started_s
    stop.set()
    await working
    if worker.stats.deferred:
        raise RegistryError("images of a category cannot be judged; `flawstream doctor` gives the reason")
    return wall_s
