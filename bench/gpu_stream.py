"""JPEGs of solar cells through Valkey and `flawstream worker`, as a plant has it: one process, and several."""

import contextlib
import signal
import subprocess
import sys
import time
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import redis

from bench.engine_versions import train_here
from schemas.keys import StreamKeys
from schemas.settings import ModelSettings, RedisSettings, TrainingSettings
from training.datasets.elpv import export_elpv
from training.datasets.mvtec import load_mvtec
from workers.redis.embedded import EmbeddedServer

IMAGES = 6000
"""For each worker."""
PUSHED_AT_ONCE = 200
COUNTED_FROM = 1000
"""Results before the time is taken: the worker is at work by then."""
WORKERS = (1, 4)
TIMEOUT_S = 60.0
POLL_S = 0.01


def measure(folder: Path) -> dict[str, Any]:
    """Train a version for one epoch, then have all images judged by each number of workers."""
    root = folder / "stream"
    (data,) = load_mvtec(export_elpv(folder / "elpv"), ["mono"])
    train_here(data, ModelSettings(), TrainingSettings(epochs=1), str(root))
    images = [sample.path.read_bytes() for sample in data.test]
    found: dict[str, Any] = {"image_bytes": sum(map(len, images)) // len(images)}
    for count in WORKERS:
        rate = _rate(root, count, data.name, images)
        found[f"{count} workers"] = round(rate, 1)
        print(f"  {count} worker processes: {rate:,.0f} img/s", flush=True)
    return found


def _rate(root: Path, workers: int, category: str, images: list[bytes]) -> float:
    """Start all workers, then push all images; return images a second once all are at work."""
    keys = StreamKeys(prefix=RedisSettings().prefix)
    with EmbeddedServer() as server, contextlib.closing(redis.Redis.from_url(server.url)) as client:
        with contextlib.ExitStack() as running:
            started = [_start(root, server.url, f"worker-{number}") for number in range(workers)]
            for process in started:
                running.callback(_stop, process)
            for process in started:
                _wait_until_ready(process)
            pipeline = client.pipeline(transaction=False)
            for number, image in enumerate(islice(cycle(images), workers * IMAGES)):
                pipeline.xadd(keys.images, {"id": f"{number}", "category": category, "image": image})
                if number % PUSHED_AT_ONCE == 0:
                    pipeline.execute()
            pipeline.execute()
            began_s = _wait_for(client, keys.results, COUNTED_FROM)
            counted_from = client.xlen(keys.results)
            ended_s = _wait_for(client, keys.results, workers * IMAGES)
        if client.xlen(keys.dead):
            raise RuntimeError(f"{client.xlen(keys.dead)} images became dead letters")
        return (workers * IMAGES - counted_from) / (ended_s - began_s)


def _wait_for(client: redis.Redis, key: str, count: int) -> float:
    seen, changed_s = -1, time.perf_counter()
    while (length := client.xlen(key)) < count:
        if length != seen:
            seen, changed_s = length, time.perf_counter()
        elif time.perf_counter() - changed_s > TIMEOUT_S:
            raise RuntimeError(f"{length} of {count} results after {TIMEOUT_S:g} s without another")
        time.sleep(POLL_S)
    return time.perf_counter()


def _start(root: Path, url: str, name: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "flawstream_cli", "worker"]
    command += ["--redis", url, "--registry", str(root), "--name", name]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)  # noqa: S603 - our own interpreter


def _wait_until_ready(process: "subprocess.Popen[str]") -> None:
    assert process.stdout is not None  # noqa: S101 - Popen was given a pipe
    if not process.stdout.readline():
        raise RuntimeError("a worker ended before it was ready")


def _stop(process: "subprocess.Popen[str]") -> None:
    process.send_signal(signal.SIGTERM)
    process.wait(TIMEOUT_S)
