"""Overload: cameras push three times what the service can take, for minutes.

    PYTHONPATH=tests python -m soak.overload --minutes 5

A real Valkey, one `flawstream worker`, and one reader of results in a group; older results are trimmed. First the
worker's capacity is measured: for a minute images are pushed whenever there is room, and results counted. Then
producers push at three times that rate, each image once, and drop what is refused, as a camera does. At last the rate
falls to half the capacity, until the backlog is gone. Claims: memory of worker and server stays bounded; every refusal
is counted at the server; throughput is within 10 % of the peak; the backlog is gone seconds after the overload; every
image that was taken ended exactly once.

The last line is JSON; the exit code is 1 where a claim fails.
"""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from helpers.raw_redis import RawRedis
from helpers.redis_servers import Server
from helpers.tiny_models import write_version
from rich.console import Console
from rich.table import Table

from flawstream.fastflow.backbone import Backbone
from flawstream.registry.registry import Registry
from schemas.errors import BacklogFullError
from schemas.settings import BacklogSettings, RedisSettings, Settings
from workers.outcomes.results import ResultReader
from workers.produce.producer import Producer

_TIMES_CAPACITY = 3.0
_MAX_IMAGES = 200
_KEEP_RESULTS = 1000
_WINDOW_S = 10.0
_FIRST_S = 20.0
"""Until caches and threads of the worker are warm."""
_RECOVERY_S = 60.0
_MOST_GROWTH_MB = 64.0
_LEAST_OF_PEAK = 0.9
_PRODUCERS = 32
_PHOTOGRAPHS = 32
_SIDE_PX = 256

err = Console(stderr=True)


@dataclass
class Sample:
    """One look at the service.

    Attributes:
        at_s: When, seconds of a monotonic clock.
        ended: Results read so far.
        waiting: Entries of the images stream.
        worker_mb: Resident memory of the worker.
        server_mb: Memory that the server uses.
    """

    at_s: float
    ended: int
    waiting: int
    worker_mb: float
    server_mb: float


@dataclass
class Offer:
    """What producers did.

    Attributes:
        pushed: Ids that were taken.
        refused: Pushes that were refused.
    """

    pushed: set[str] = field(default_factory=set)
    refused: int = 0


class Watch:
    """Looks at the service once a second, and reads all results, as often as they come.

    Attributes:
        ended: How many results came, by the image's id.
    """

    def __init__(self, port: int, pid: int) -> None:
        self.samples: list[Sample] = []
        self.ended: Counter[str] = Counter()
        self._port = port
        self._pid = pid

    async def keep_watching(self) -> None:
        with RawRedis(self._port) as redis:
            while True:
                self.samples.append(self._look(redis))
                await asyncio.sleep(1.0)

    async def keep_reading(self, redis: RedisSettings) -> None:
        async with ResultReader(redis, "quality") as results:
            async for entry_id, result in results:
                self.ended[result.id] += 1
                await results.ack(entry_id)

    def _look(self, redis: RawRedis) -> Sample:
        memory = redis("INFO", "memory")
        assert isinstance(memory, bytes)
        used = next(line for line in memory.split(b"\r\n") if line.startswith(b"used_memory:"))
        pages = int(Path(f"/proc/{self._pid}/statm").read_text(encoding="ascii").split()[1])
        return Sample(
            time.monotonic(),
            self.ended.total(),
            redis.count("XLEN", "flawstream:images"),
            pages * 4096 / 1e6,
            int(used.partition(b":")[2]) / 1e6,
        )

    async def until_read(self, pushed: set[str]) -> None:
        while pushed - set(self.ended):  # noqa: ASYNC110 - the task that reads has nobody else to tell
            await asyncio.sleep(0.5)

    def between(self, start_s: float, end_s: float) -> list[Sample]:
        return [sample for sample in self.samples if start_s <= sample.at_s <= end_s]

    def rates(self, start_s: float, end_s: float) -> list[float]:
        """Give the results per second, window by window."""
        found = self.between(start_s, end_s)
        step = round(_WINDOW_S)
        return [
            (late.ended - early.ended) / (late.at_s - early.at_s)
            for early, late in zip(found[::step], found[step::step], strict=False)
        ]


async def offer(producer: Producer, images_per_s: float, until_s: float, name: str, made: Offer) -> None:
    """Push at a pace, each image once; what is refused is dropped. Without a pace (0), push whenever there is room."""
    photographs = [_photograph(seed) for seed in range(_PHOTOGRAPHS)]
    number = 0
    started_s = time.monotonic()

    async def push_in_turn() -> None:
        nonlocal number
        while time.monotonic() < until_s:
            mine, number = number, number + 1
            if images_per_s:
                await asyncio.sleep(max(0.0, started_s + mine / images_per_s - time.monotonic()))
            key = f"{name}-{mine}"
            try:
                await producer.push(
                    photographs[mine % _PHOTOGRAPHS], "bottle", id=key, wait_s=0.0 if images_per_s else 60.0
                )
                made.pushed.add(key)
            except BacklogFullError:
                made.refused += images_per_s > 0

    await asyncio.gather(*(push_in_turn() for _ in range(_PRODUCERS)))


@contextlib.asynccontextmanager
async def worker_process(folder: Path, redis: RedisSettings) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run a `flawstream worker`."""
    spec = Backbone(Settings().model.model_copy(update={"input_size": _SIDE_PX})).spec
    write_version(Registry(str(folder / "models")), "bottle", spec=spec)
    options = ("--redis", redis.url, "--registry", str(folder / "models"))
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "flawstream_cli", "worker", *options),
        stdout=asyncio.subprocess.PIPE,
        env=os.environ | {"FLAWSTREAM_BACKLOG__KEEP_RESULTS": str(_KEEP_RESULTS)},
    )
    try:
        assert process.stdout is not None
        await process.stdout.readline()
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        await process.wait()


async def run(minutes: float, folder: Path) -> dict[str, object]:
    """Run the three phases; gives what is printed."""
    server = Server(folder / "valkey", "appendonly yes", "appendfsync everysec", 'save ""')
    redis = RedisSettings(url=server.url)
    backlog = BacklogSettings(max_images=_MAX_IMAGES)
    free, over, after = Offer(), Offer(), Offer()
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(server.kill)
        server.start()
        worker = await stack.enter_async_context(worker_process(folder, redis))
        producer = await stack.enter_async_context(Producer(redis, backlog=backlog))
        watch = Watch(server.port, worker.pid)
        chores = [asyncio.create_task(watch.keep_watching()), asyncio.create_task(watch.keep_reading(redis))]
        start_s = time.monotonic()
        peak_until_s = start_s + _FIRST_S + max(30.0, minutes * 12)
        await offer(producer, 0.0, peak_until_s, "free", free)
        calm_rates = watch.rates(start_s + _FIRST_S, peak_until_s)
        peak = sum(calm_rates) / len(calm_rates)
        err.print(f"capacity {peak:.1f} img/s, best ten seconds {max(calm_rates):.1f}")
        err.print(f"now {_TIMES_CAPACITY * peak:.0f} img/s for {minutes:g} minutes")
        over_from_s = time.monotonic()
        over_until_s = over_from_s + minutes * 60
        refused_before = _refusals(server)
        await offer(producer, _TIMES_CAPACITY * peak, over_until_s, "over", over)
        refused = _refusals(server) - refused_before
        recovered_s = await _recover(producer, peak / 2, after, watch)
        pushed = free.pushed | over.pushed | after.pushed
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_RECOVERY_S):
                await watch.until_read(pushed)
        dead = server("XLEN", "flawstream:dead")
        for chore in chores:
            chore.cancel()
        await asyncio.gather(*chores, return_exceptions=True)
        alive = worker.returncode is None
    rates = watch.rates(over_from_s, over_until_s)
    calm, loaded = watch.between(start_s + _FIRST_S, peak_until_s), watch.between(over_from_s, over_until_s)
    err.print(_table(watch.between(over_from_s, over_until_s), rates))
    return {
        "bench": "overload",
        "peak_img_per_s": round(peak, 1),
        "best_10_s_img_per_s": {"before": round(max(calm_rates), 1), "overload": round(max(rates), 1)},
        "offered_img_per_s": round((len(over.pushed) + over.refused) / (over_until_s - over_from_s), 1),
        "overload_img_per_s": round(sum(rates) / len(rates), 1),
        "share_of_peak": round(sum(rates) / len(rates) / peak, 3),
        "taken": len(over.pushed),
        "refused": over.refused,
        "refused_counted": refused,
        "most_waiting": max(sample.waiting for sample in loaded),
        "worker_mb": {"before": _most(calm, "worker_mb"), "overload": _most(loaded, "worker_mb")},
        "server_mb": {"before": _most(calm, "server_mb"), "overload": _most(loaded, "server_mb")},
        "recovery_s": round(recovered_s, 1),
        "lost": len(pushed - set(watch.ended)),
        "duplicates": watch.ended.total() - len(watch.ended),
        "dead": dead,
        "worker_died": int(not alive),
    }


async def _recover(producer: Producer, images_per_s: float, made: Offer, watch: Watch) -> float:
    """Push at a rate that can be served; gives the seconds until the backlog was gone."""
    start_s = time.monotonic()
    calm = asyncio.create_task(offer(producer, images_per_s, start_s + _RECOVERY_S, "after", made))
    gone_s = _RECOVERY_S
    while time.monotonic() < start_s + _RECOVERY_S:
        await asyncio.sleep(0.5)
        if watch.samples[-1].at_s > start_s and watch.samples[-1].waiting < _MAX_IMAGES / 10:
            gone_s = time.monotonic() - start_s
            break
    await calm
    return gone_s


def _refusals(server: Server) -> int:
    flat = server("HGETALL", "flawstream:counters")
    assert isinstance(flat, list)
    texts = [one.decode() for one in flat if isinstance(one, bytes)]
    return sum(int(value) for name, value in zip(texts[::2], texts[1::2], strict=True) if name.startswith("refused"))


def _most(samples: list[Sample], attribute: str) -> float:
    return round(max(float(getattr(sample, attribute)) for sample in samples), 1)


def _table(samples: list[Sample], rates: list[float]) -> Table:
    table = Table(title="Under overload, ten seconds a row", title_justify="left")
    for column in ("second", "img/s", "waiting", "worker MB", "server MB"):
        table.add_column(column, justify="right")
    step = round(_WINDOW_S)
    for k, rate in enumerate(rates):
        sample = samples[(k + 1) * step]
        row = (f"{(k + 1) * _WINDOW_S:.0f}", f"{rate:.1f}", str(sample.waiting))
        table.add_row(*row, f"{sample.worker_mb:.0f}", f"{sample.server_mb:.0f}")
    return table


def _photograph(seed: int) -> bytes:
    """Make a JPEG of smooth noise, some 20 KB."""
    coarse = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8)
    return bytes(cv2.imencode(".jpg", cv2.resize(coarse, (512, 512), interpolation=cv2.INTER_CUBIC))[1].tobytes())


def _holds(told: dict[str, object]) -> bool:
    worker = told["worker_mb"]
    assert isinstance(worker, dict)
    return (
        not (told["lost"] or told["duplicates"] or told["dead"] or told["worker_died"])
        and told["refused"] == told["refused_counted"]
        and worker["overload"] - worker["before"] <= _MOST_GROWTH_MB
        and float(str(told["share_of_peak"])) >= _LEAST_OF_PEAK
        and float(str(told["recovery_s"])) < _RECOVERY_S
    )


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="overload", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=5.0, help="of overload (default 5)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="flawstream-overload-") as folder:
        told = asyncio.run(run(arguments.minutes, Path(folder)))
    sys.stdout.write(json.dumps(told) + "\n")
    if not _holds(told):
        sys.exit(1)


if __name__ == "__main__":
    main()
