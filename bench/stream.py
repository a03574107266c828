"""How much of the engine's speed is left at the end of the stream: JPEG in at Redis, results out at Redis.

    PYTHONPATH=tests python -m bench.stream [--rounds 3] [--backbones resnet18 tf_efficientnet_lite0]

A real Valkey, and in turns on the same machine: the bare engine on decoded images; `flawstream serve` (Ray Serve: one
stream worker, one detector) with settings as they are by default; and `flawstream worker` (the detector in the worker's
process). Each is given 512 x 512 px JPEG images of one category, then of 32 mixed at random, and always has images
waiting. The generator pushes and reads with bare Redis commands: cameras and consumers are other machines. Then
`serve` gets 70 % of what it could take in that round, at random moments (Poisson), and the time from push to result is
measured.

Versions have random weights of the presets' shapes: what is judged does not matter to the speed. A batch time is the
bare engine's for `worker.batch_size` images. Prints a table and one JSON line, and draws a picture.
"""

import argparse
import asyncio
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import timm
import torch
from helpers.tiny_models import write_version
from numpy.typing import NDArray
from redis.asyncio import Redis
from rich import box
from rich.console import Console
from rich.table import Table

from bench.stream_plot import Drawn, draw
from flawstream.engines.choose import make_engine, quiet_torch
from flawstream.engines.protocol import HeadRows
from flawstream.fastflow.backbone import Backbone
from flawstream.fastflow.head import FastFlowHead
from flawstream.registry.registry import Registry
from schemas.manifest import FlowSpec
from schemas.settings import ModelSettings, RedisSettings, Settings
from workers.redis.connection import make_client
from workers.redis.embedded import EmbeddedServer, free_port

CATEGORIES = [f"part-{k:02}" for k in range(32)]
PHOTOGRAPHS = 32
SIDE_PX = 512
WAITING = 96
"""Images pushed and not yet answered: two batches of the detector and one of the worker."""
LOAD = 0.7
BARS = {"resnet18": 0.80, "tf_efficientnet_lite0": 0.65}
"""Least of the bare engine's img/s, by backbone."""
LEAST_MIXED = 0.90
MOST_BATCH_TIMES = 3.0
WARM_UP_S = 4.0
LAYOUTS = ("serve", "worker")

err = Console(stderr=True, soft_wrap=True)


@dataclass(slots=True)
class Measured:
    """What was found for one backbone.

    Attributes:
        engine: img/s of the bare engine, one figure a round.
        batch_s: Seconds of the bare engine for a worker's batch, one figure a round.
        streams: img/s by layout, and by whether the categories are mixed, one figure a round.
        latencies_s: Of each image at `LOAD`.
    """

    engine: list[float] = field(default_factory=list)
    batch_s: list[float] = field(default_factory=list)
    streams: dict[tuple[str, bool], list[float]] = field(default_factory=dict)
    latencies_s: list[float] = field(default_factory=list)

    def efficiency(self, layout: str = "serve") -> float:
        """Divide the stream's img/s by the engine's."""
        return statistics.median(self.streams[layout, False]) / statistics.median(self.engine)

    def mixed_ratio(self, layout: str = "serve") -> float:
        """Divide img/s of mixed categories by that of one."""
        return statistics.median(self.streams[layout, True]) / statistics.median(self.streams[layout, False])

    def p99_batch_times(self) -> float:
        """Divide the latency's 99th percentile by a batch time."""
        return float(np.quantile(self.latencies_s, 0.99)) / statistics.median(self.batch_s)


class Generator:
    """Pushes photographs and sees results come, with bare commands.

    Args:
        client: Of the server.
    """

    def __init__(self, client: Redis, seed: int = 0) -> None:
        self._client = client
        self._random = np.random.default_rng(seed)
        self._photographs = [_photograph(seed) for seed in range(PHOTOGRAPHS)]
        self._last: str | bytes = "0-0"
        self._pushed_s: dict[bytes, float] = {}
        self._reading = asyncio.create_task(self._keep_reading())
        self.ended: deque[tuple[float, float]] = deque()
        """When a result came, and how long after its push; seconds."""

    def stop(self) -> None:
        """See no more results."""
        self._reading.cancel()

    async def _keep_reading(self) -> None:
        """See results come; those that were seen go."""
        stream = "flawstream:results"
        while True:
            reply: Any = await self._client.xread({stream: self._last}, count=64, block=1000)
            now_s = time.perf_counter()
            found = [entry for entries in reply.values() for entry in entries]
            for entry_id, fields in found:
                self._last = entry_id
                self.ended.append((now_s, now_s - self._pushed_s.pop(fields[b"id"])))
            if found:
                await self._client.xdel(stream, *(entry_id for entry_id, _ in found))

    async def sustain(self, categories: Sequence[str], seconds: float) -> float:
        """Keep images waiting, and count results; gives img/s past the warm-up.

        Results come a batch at a time: counted is from one batch's coming to another's, so that none is cut.
        """
        from_s = time.perf_counter() + WARM_UP_S
        until_s = from_s + seconds
        while time.perf_counter() < until_s:
            await self._push(categories, max(0, WAITING - len(self._pushed_s)))
            await self._pause()
        came_s = [at_s for at_s, _ in self.ended if from_s <= at_s < until_s]
        await self.settle()
        if not came_s or came_s[0] == came_s[-1]:
            sys.exit(f"no two batches ended within {seconds:g} s: raise --seconds")
        return sum(at_s > came_s[0] for at_s in came_s) / (came_s[-1] - came_s[0])

    async def offer(self, categories: Sequence[str], images_per_s: float, seconds: float) -> list[float]:
        """Push at random moments; gives the seconds from push to result of each image past the warm-up."""
        begin_s = time.perf_counter()
        at_s = begin_s
        while at_s < begin_s + WARM_UP_S + seconds:
            at_s += float(self._random.exponential(1 / images_per_s))
            await asyncio.sleep(max(0.0, at_s - time.perf_counter()))
            await self._push(categories, 1)
        await self.settle(keep=True)
        found = [latency_s for came_s, latency_s in self.ended if came_s - latency_s >= begin_s + WARM_UP_S]
        self.ended.clear()
        return found

    async def settle(self, *, keep: bool = False) -> None:
        """Wait until all that was pushed has ended."""
        while self._pushed_s:
            await self._pause()
        if not keep:
            self.ended.clear()

    async def _pause(self) -> None:
        await asyncio.sleep(0.01)
        if self._reading.done():
            self._reading.result()  # raises what ended it

    async def _push(self, categories: Sequence[str], count: int) -> None:
        if not count:
            return
        pipeline = self._client.pipeline(transaction=False)
        now_s = time.perf_counter()
        for _ in range(count):
            key = self._random.bytes(8).hex()
            category = categories[int(self._random.integers(len(categories)))]
            photograph = self._photographs[int(self._random.integers(PHOTOGRAPHS))]
            self._pushed_s[key.encode()] = now_s
            pipeline.xadd("flawstream:images", {"id": key, "category": category, "image": photograph})
        await pipeline.execute()


class BareEngine:
    """The engine that the service takes, on images that are decoded already.

    Args:
        settings: As the service's.
        root: The registry.
    """

    def __init__(self, settings: Settings, root: str) -> None:
        registry = Registry(root)
        backbone = Backbone(settings.model)
        self._engine = make_engine(settings.detector, lambda: backbone)
        quiet_torch(self._engine)
        manifest = registry.manifest(CATEGORIES[0], "v1")
        weights = registry.read_file(manifest, "flow.safetensors")
        self._loaded = self._engine.load(FastFlowHead.from_bytes(weights, backbone.spec, manifest.flow), manifest)
        self._top_fraction = manifest.calibration.top_fraction
        side = backbone.spec.input_size
        count = max(settings.detector.max_batch_images, settings.worker.batch_size)
        self._images: NDArray[np.uint8] = np.stack(
            [cv2.resize(_pixels(seed), (side, side), interpolation=cv2.INTER_AREA) for seed in range(count)]
        )

    def batch_s(self, size: int, seconds: float) -> float:
        """Judge batches for a while; gives the mean seconds of one."""
        self._detect(size)
        begin_s = time.perf_counter()
        batches = 0
        while time.perf_counter() < begin_s + seconds:
            self._detect(size)
            batches += 1
        return (time.perf_counter() - begin_s) / batches

    def _detect(self, size: int) -> None:
        self._engine.detect(self._images[:size], [HeadRows(self._loaded, np.arange(size), self._top_fraction)])


def _pixels(seed: int) -> NDArray[np.uint8]:
    coarse = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8)
    return np.asarray(cv2.resize(coarse, (SIDE_PX, SIDE_PX), interpolation=cv2.INTER_CUBIC), np.uint8)


def _photograph(seed: int) -> bytes:
    """Make a JPEG of smooth noise, some 60 KB."""
    return cv2.imencode(".jpg", _pixels(seed), [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()


def _write_versions(settings: Settings, root: str) -> None:
    spec = Backbone(settings.model).spec
    flow = FlowSpec.of(settings.model)
    for seed, category in enumerate(CATEGORIES):
        weights = FastFlowHead(spec, flow, seed=seed).to_bytes()
        write_version(Registry(root), category, spec=spec, flow=flow, weights=weights)


@asynccontextmanager
async def _service(layout: str, redis: RedisSettings, root: str, env: dict[str, str]) -> AsyncIterator[None]:
    """Have `flawstream serve` or `flawstream worker` up."""
    ports = ["--port", str(free_port())] if layout == "serve" else []
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "flawstream_cli", layout, "--redis", redis.url, "--registry", root, *ports),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env=os.environ | env,
    )
    assert process.stdout is not None  # noqa: S101 - it was given a pipe
    try:
        if not await process.stdout.readline():
            sys.exit(f"flawstream {layout} did not start; run it by hand to see why")
        yield
    finally:
        process.send_signal(signal.SIGINT)
        await process.communicate()


async def measure(backbone: str, rounds: int, seconds: float, folder: Path) -> Measured:
    """Measure one backbone, layout by layout, the bare engine in every round."""
    given: dict[str, object] = {"preset": "resnet18"} if backbone == "resnet18" else {"backbone": backbone}
    if backbone == "resnet18":  # random weights: speed does not depend on them, and a plant may have no internet
        weights = folder / "resnet18.pth"
        torch.save(timm.create_model(backbone, pretrained=False).state_dict(), weights)
        given["weights"] = str(weights)
    settings = Settings(model=ModelSettings.model_validate(given))
    root = str(folder / "models")
    _write_versions(settings, root)
    env = {f"FLAWSTREAM_MODEL__{name.upper()}": str(value) for name, value in given.items()}
    bare = BareEngine(settings, root)
    most, usual = settings.detector.max_batch_images, settings.worker.batch_size
    found = Measured()
    async with AsyncExitStack() as stack:
        server = stack.enter_context(EmbeddedServer())
        redis = RedisSettings(url=server.url)
        client = await stack.enter_async_context(make_client(redis))
        assert isinstance(client, Redis)  # noqa: S101 - it is one server
        generator = Generator(client)
        stack.callback(generator.stop)
        for layout in LAYOUTS:
            err.print(f"{backbone}: starting flawstream {layout} ...")
            async with _service(layout, redis, root, env):
                await generator.sustain(CATEGORIES, WARM_UP_S + 10.0)
                for turn in range(rounds):
                    found.engine.append(most / await asyncio.to_thread(bare.batch_s, most, seconds / 3))
                    found.batch_s.append(await asyncio.to_thread(bare.batch_s, usual, seconds / 3))
                    for mixed in (False, True):
                        rate = await generator.sustain(CATEGORIES if mixed else CATEGORIES[:1], seconds)
                        found.streams.setdefault((layout, mixed), []).append(rate)
                    if layout == "serve":
                        offered = LOAD * found.streams[layout, True][-1]
                        found.latencies_s += await generator.offer(CATEGORIES, offered, seconds)
                    err.print(
                        f"  round {turn + 1} of {rounds}: engine {found.engine[-1]:.1f}, one category "
                        f"{found.streams[layout, False][-1]:.1f}, mixed {found.streams[layout, True][-1]:.1f} img/s"
                    )
    return found


def show(found: dict[str, Measured]) -> Table:
    """Put everything into a table."""
    table = Table(title="Medians over the rounds, img/s", title_justify="left", box=box.SIMPLE)
    for column in ("backbone", "engine", "through", "one category", "32 mixed", "efficiency", "mixed ratio"):
        text = column in ("backbone", "through")
        table.add_column(
            column, justify="left" if text else "right", no_wrap=text, min_width=len(max(column.split(), key=len))
        )
    for backbone, one in found.items():
        for layout in LAYOUTS:
            table.add_row(
                backbone,
                f"{statistics.median(one.engine):.1f}",
                layout,
                *(f"{statistics.median(one.streams[layout, mixed]):.1f}" for mixed in (False, True)),
                f"{one.efficiency(layout):.3f}",
                f"{one.mixed_ratio(layout):.3f}",
            )
    return table


def _drawn(backbone: str, one: Measured) -> Drawn:
    engine, batch_s = statistics.median(one.engine), statistics.median(one.batch_s)
    rates = {
        layout: (engine, *(statistics.median(one.streams[layout, mixed]) for mixed in (False, True)))
        for layout in LAYOUTS
    }
    return Drawn(rates, BARS[backbone], [latency_s / batch_s for latency_s in one.latencies_s])


def main() -> None:
    """Measure, print, and fail where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement (default 20)")
    parser.add_argument(
        "--plot", type=Path, default=Path(".flawstream/bench-stream.png"), help="where the picture goes"
    )
    parser.add_argument("--backbones", nargs="+", choices=list(BARS), default=list(BARS))
    arguments = parser.parse_args()
    found: dict[str, Measured] = {}
    for backbone in arguments.backbones:
        with tempfile.TemporaryDirectory(prefix="flawstream-stream-") as name:
            found[backbone] = asyncio.run(measure(backbone, arguments.rounds, arguments.seconds, Path(name)))
    err.print(show(found))
    arguments.plot.parent.mkdir(parents=True, exist_ok=True)
    draw({backbone: _drawn(backbone, one) for backbone, one in found.items()}, LOAD, MOST_BATCH_TIMES, arguments.plot)
    err.print(f"drawn: {arguments.plot}")
    for backbone, one in found.items():
        p50, p99 = (1000 * float(np.quantile(one.latencies_s, share)) for share in (0.5, 0.99))
        err.print(
            f"{backbone} at {LOAD:.0%} load, {len(one.latencies_s)} images: median {p50:.0f} ms, 99 % {p99:.0f} ms; "
            f"a batch time is {1000 * statistics.median(one.batch_s):.0f} ms"
        )
    efficiency = {backbone: round(one.efficiency(), 3) for backbone, one in found.items()}
    mixed_ratio = min(one.mixed_ratio() for one in found.values())
    p99_batch_times = max(one.p99_batch_times() for one in found.values())
    ratios = {"mixed_ratio": round(mixed_ratio, 3), "p99_batch_times": round(p99_batch_times, 2)}
    print(json.dumps({"bench": "stream", "efficiency": efficiency, **ratios}))
    held = (
        all(efficiency[backbone] >= BARS[backbone] for backbone in found)
        and mixed_ratio >= LEAST_MIXED
        and p99_batch_times < MOST_BATCH_TIMES
    )
    if not held:
        sys.exit(f"a bar is missed: efficiency {BARS}, mixed {LEAST_MIXED}, p99 {MOST_BATCH_TIMES} batch times")


if __name__ == "__main__":
    main()
