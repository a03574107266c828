"""`flawstream profile`: where the time of an image goes, stage by stage, on this machine with these models."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import cycle, islice
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress

from flawstream.registry.registry import Registry
from flawstream.telemetry import metrics as m
from flawstream.telemetry.metrics import Histogram, NoMetrics
from flawstream_cli.cluster import on_cluster
from flawstream_cli.commands.serve import running, with_redis
from flawstream_cli.terminal import (
    ConfigOption,
    JsonOption,
    RegistryOption,
    busy,
    err,
    out,
    print_json,
    read_settings,
    say,
    table,
)
from schemas.errors import ConfigError, RegistryError
from schemas.settings import BacklogSettings, Settings
from serving.app import detector_handle
from serving.deployments import HandleDetector
from serving.detector import make_detector
from training.datasets.folders import IMAGE_SUFFIXES, image_files
from workers.consume.sharded import ShardedWorker
from workers.ports import Detector
from workers.produce.producer import Producer
from workers.redis.connection import make_client
from workers.redis.embedded import EmbeddedServer, free_port

_WARM_UP_BATCHES = 4
_BAR_CELLS = 24
_LOOK_S = 0.005
_NO_BOUND = BacklogSettings(max_images=1_000_000, max_bytes=1 << 40)
_STAGES = {
    "read": "asking the stream server",
    "decode": "bytes to pixels, resizing",
    "handle": "to the detector's process and back",
    "wait": "in the detector's queue, or in one batch with another call",
    "detect": "backbone, flows, scores: the engine is busy",
    "encode": "maps, boxes, the result put together",
    "publish": "the script that ends the entries",
}

_Work = Sequence[tuple[bytes, str]]


class Layout(StrEnum):
    """Where the detector runs."""

    WORKER = "worker"
    SERVE = "serve"
    BOTH = "both"


class StageTimes(NoMetrics):
    """Sums up what a worker tells of its stages.

    Attributes:
        seconds: By stage, over all batches.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def observe(self, histogram: Histogram, value: float, /, **labels: str) -> None:
        """Take one value more."""
        if histogram is m.STAGE_SECONDS:
            stage = labels["stage"]
            self.seconds[stage] = self.seconds.get(stage, 0.0) + value


@dataclass(frozen=True)
class Profile:
    """Where the time went.

    Attributes:
        layout: Where the detector ran.
        engine: What judged.
        images: Images that ended while it was measured.
        dead_letters: Those of them that were refused.
        wall_s: From the first read to the last ending, seconds.
        worker_batch, detector_batch: Mean images of a batch.
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
        """Give it as JSON takes it."""
        return {
            "layout": self.layout.value,
            "engine": self.engine,
            "images": self.images,
            "dead_letters": self.dead_letters,
            "images_per_s": round(self.images / self.wall_s, 1),
            "engine_busy": round(self.stages_s["detect"] / self.wall_s, 3),
            "worker_batch": round(self.worker_batch, 1),
            "detector_batch": round(self.detector_batch, 1),
            "ms_per_image": {name: round(1000 * spent_s / self.images, 3) for name, spent_s in self.stages_s.items()},
        }


def profile(
    paths: Annotated[list[Path], typer.Argument(help="Image files of your cameras, or folders of them.")],
    layout: Annotated[Layout, typer.Option(help="Where the detector runs.")] = Layout.BOTH,
    images: Annotated[int, typer.Option(min=1, help="How many to judge; files are taken again and again.")] = 512,
    registry: RegistryOption = None,
    engine: Annotated[str | None, typer.Option(help="auto, ncnn, openvino, torch or triton.")] = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure where the time of an image goes, from the stream to its result, stage by stage.

    The images are put on a stream of an embedded server first, at random categories of the registry's; then a worker
    has them judged, with the detector in its own process (`worker`, as `flawstream worker` does) and behind a Ray Serve
    handle (`serve`, as `flawstream serve` does). Nothing is pushed meanwhile, so the figures are those of a worker that
    never waits for images.

    Example: `flawstream profile line7/*.jpg --registry models --layout worker`
    """
    settings = read_settings(config, registry={"root": registry}, detector={"engine": engine})
    categories = sorted(Registry(settings.registry.root).currents())
    if not categories:
        raise ConfigError(f"{settings.registry.root} has no model versions; make some with `flawstream train`")
    files = [file.read_bytes() for file in islice(image_files(paths), images)]
    if not files:
        raise ConfigError(f"no images in {', '.join(map(str, paths))}; looked for {', '.join(sorted(IMAGE_SUFFIXES))}")
    work = [(one, categories[k % len(categories)]) for k, one in enumerate(islice(cycle(files), images))]
    random.Random(0).shuffle(work)  # noqa: S311 - an order, and no secret
    profiles = []
    for one in (Layout.WORKER, Layout.SERVE) if layout is Layout.BOTH else (layout,):
        with EmbeddedServer() as server:
            profiles.append(_PROFILES[one](with_redis(settings, server.url), work))
        if not as_json:
            _show(profiles[-1])
    if as_json:
        print_json([found.as_dict() for found in profiles])


def _in_worker(settings: Settings, work: _Work) -> Profile:
    """Measure with the detector in this process."""
    with busy("loading the models"):
        detector = make_detector(settings.registry.root, settings.model, settings.detector)

    async def measure() -> Profile:
        async def status() -> dict[str, Any]:
            return detector.status()

        await detector.start()
        try:
            return await _measure(Layout.WORKER, settings, detector, status, work)
        finally:
            await detector.stop()

    return asyncio.run(measure())


def _behind_handle(settings: Settings, work: _Work) -> Profile:
    """Measure with the detector in a replica of Ray Serve."""
    none = {"worker": {"replicas": 0}, "api": {"port": free_port()}}
    changed = {name: getattr(settings, name).model_copy(update=update) for name, update in none.items()}
    without_worker = settings.model_copy(update=changed)
    with on_cluster(None) as joined, running(without_worker, joined):
        detector = HandleDetector(detector_handle(), settings.detector.timeout_s)
        return asyncio.run(_measure(Layout.SERVE, settings, detector, detector.status, work))


_PROFILES = {Layout.WORKER: _in_worker, Layout.SERVE: _behind_handle}


async def _measure(
    layout: Layout, settings: Settings, detector: Detector, status: Callable[[], Awaitable[dict[str, Any]]], work: _Work
) -> Profile:
    """Put images on the stream and have them judged: first a few to warm up, then all."""
    async with make_client(settings.redis) as client, Producer(settings.redis, settings.limits, _NO_BOUND) as producer:
        times = StageTimes()
        worker = ShardedWorker(client, "profile", detector, settings, times)
        try:
            warm_up = _WARM_UP_BATCHES * settings.worker.batch_size
            await _run(worker, producer, work[:warm_up])
            stages_before, stats_before, status_before = dict(times.seconds), worker.stats, await status()
            wall_s = await _run(worker, producer, work)
            stats, told = worker.stats, await status()
        finally:
            await worker.close()
    spent = {name: seconds - stages_before.get(name, 0.0) for name, seconds in times.seconds.items()}
    detect_s, calls_s = (told[name] - status_before[name] for name in ("detect_s", "calls_s"))
    return Profile(
        layout=layout,
        engine=told["engine"],
        images=len(work),
        dead_letters=stats.dead.total() - stats_before.dead.total(),
        wall_s=wall_s,
        worker_batch=(stats.read - stats_before.read) / (stats.batches - stats_before.batches),
        detector_batch=(told["images"] - status_before["images"]) / (told["batches"] - status_before["batches"]),
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
    """Put all on the stream, then have a worker end them; gives the seconds that the worker took.

    Raises:
        RegistryError: The current version of a category cannot be used.
    """
    for image, category in work:
        await producer.push(image, category)
    stats = worker.stats
    until = stats.results + stats.dead.total() + len(work)
    stop = asyncio.Event()
    began_s = time.perf_counter()
    working = asyncio.create_task(worker.run(stop))
    with Progress(console=err, transient=True, disable=not err.is_terminal) as bars:
        bar = bars.add_task("judging", total=len(work))
        while (left := until - worker.stats.results - worker.stats.dead.total()) > 0 and not working.done():
            if worker.stats.deferred:
                break
            bars.update(bar, completed=len(work) - left)
            await asyncio.sleep(_LOOK_S)
    wall_s = time.perf_counter() - began_s
    stop.set()
    await working
    if worker.stats.deferred:
        raise RegistryError("images of a category cannot be judged; `flawstream doctor` gives the reason")
    return wall_s


def _show(found: Profile) -> None:
    title = (
        f"{found.layout}, engine {found.engine}: {found.images / found.wall_s:.1f} img/s, "
        f"batches of {found.worker_batch:.1f} (worker) and {found.detector_batch:.1f} (detector)"
    )
    rows = []
    for name, spent_s in found.stages_s.items():
        share = spent_s / found.wall_s
        bar = "\N{FULL BLOCK}" * min(_BAR_CELLS, round(_BAR_CELLS * share))
        rows.append((name, f"{1000 * spent_s / found.images:.2f}", f"{share:.0%}", bar, _STAGES[name]))
    shown = table(title, ("stage", "ms per image", "of the time", "", "what"), rows)
    shown.columns[3].justify = shown.columns[4].justify = "left"
    out.print(shown)
    if found.dead_letters:
        say(f"{found.dead_letters} of {found.images} images were refused; they cost less than a result does", "yellow")
