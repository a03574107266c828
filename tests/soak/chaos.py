"""Chaos: a whole service under load while its parts are killed, cut off, paused and deprived at random.

    PYTHONPATH=tests python -m soak.chaos --minutes 20

Valkey with an append-only file on a disk of its own, behind a proxy that cuts replies; Ray Serve with two stream
workers and two detectors; a `flawstream worker` beside them, started again whenever it ends. Producers push through the
proxy, again and again until the push of an image is confirmed, some images twice on purpose, some that are no images.
`soak.chaos_faults` has the faults. At the end every id is counted on the server: it must have one outcome, good images
a result, others a dead letter, and after the last fault in time: within twice `worker.claim_idle_ms` and ten seconds.

The last line is JSON; the exit code is 1 where an image was lost, had two outcomes or the wrong one, or none in time.
"""

import argparse
import asyncio
import contextlib
import json
import math
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar
from unittest.mock import patch

import cv2
import numpy as np
from helpers.raw_redis import RawRedis
from helpers.redis_servers import Server
from helpers.tiny_models import write_version
from rich.table import Table

from flawstream.fastflow.backbone import Backbone
from flawstream.registry.registry import Registry
from flawstream_cli import cluster
from schemas.errors import TransientError
from schemas.settings import RedisSettings, Settings
from serving import app as service
from soak.breakable_engine import SWITCH, BreakableDetectorDeployment
from soak.chaos_faults import IMAGES, KINDS, Chaos, Fault, Plant, Station, err, print_backlog
from soak.endings import Endings, read_endings
from soak.proxy import CuttingProxy
from soak.small_disk import SmallDisk
from workers.outcomes.results import ResultReader
from workers.produce.producer import Producer
from workers.redis.embedded import free_port

_CATEGORIES = ("bottle", "cable", "cap")
_INPUT_PX = 64
_SHARE_OF_BAD = 0.01
_SHARE_PUSHED_TWICE = 0.02
_PRODUCERS = 4
_PATIENCE_S = 300.0
_REPORT_S = 10.0
_CLAIM_IDLE_MS = 5000
_IN_TIME_MS = 2 * _CLAIM_IDLE_MS + 10_000
"""After the last fault every image has its outcome within this time."""
_T = TypeVar("_T")


@dataclass
class Account:
    """What was pushed.

    Attributes:
        pushed_ms: When each image arrived on the server, by its id.
        bad: Ids of those that are no images.
        refused: Tries that were not confirmed and made again.
    """

    pushed_ms: dict[str, int] = field(default_factory=dict)
    bad: set[str] = field(default_factory=set)
    refused: int = 0


async def produce(
    number: int, redis: RedisSettings, over: asyncio.Event, images_per_s: float, account: Account
) -> None:
    """Push images at a pace until it is over, each until its push is confirmed."""
    dice = random.Random(number)  # noqa: S311 - chance, no secret
    photographs = [_photograph(dice.randrange(1 << 30)) for _ in range(16)]
    pushed = 0
    async with contextlib.AsyncExitStack() as stack:
        producer = await _patiently(lambda: stack.enter_async_context(Producer(redis)), account)
        started_s = time.monotonic()
        while not over.is_set():
            await asyncio.sleep(max(0.0, started_s + pushed / images_per_s - time.monotonic()))
            key = f"camera{number}-{pushed}"
            bad = dice.random() < _SHARE_OF_BAD
            image, category = b"no image" if bad else dice.choice(photographs), dice.choice(_CATEGORIES)
            if bad:
                account.bad.add(key)
            for _ in range(2 if dice.random() < _SHARE_PUSHED_TWICE else 1):
                entry_id = await _patiently(lambda: producer.push(image, category, id=key, wait_s=60.0), account)  # noqa: B023 - awaited here
            account.pushed_ms[key] = int(entry_id.partition("-")[0])
            pushed += 1


async def _patiently(attempt: Callable[[], Awaitable[_T]], account: Account) -> _T:
    while True:
        try:
            return await attempt()
        except TransientError:
            account.refused += 1
            await asyncio.sleep(0.1)


async def read_results(redis: RedisSettings, seen: set[str]) -> None:
    """Read results as quality control does: in a group, acknowledging what was seen."""
    while True:
        try:
            async with ResultReader(redis, "quality", consumer="gate") as results:
                async for entry_id, result in results:
                    seen.add(result.id)
                    await results.ack(entry_id)
        except TransientError:
            await asyncio.sleep(0.1)


async def run(
    kinds: list[str], folder: Path, *, minutes: float, images_per_s: float, pause_s: float, seed: int
) -> dict[str, object]:
    """Run the service, the producers and the faults; return the figures of the last line."""
    dice = random.Random(seed)  # noqa: S311 - chance, no secret
    models = folder / "models"
    spec = Backbone(Settings().model.model_copy(update={"input_size": _INPUT_PX})).spec
    for category in _CATEGORIES:
        write_version(Registry(str(models)), category, spec=spec)
    os.environ[SWITCH] = str(folder / "engine-fails")
    account = Account()
    seen: set[str] = set()
    async with contextlib.AsyncExitStack() as stack:
        disk = SmallDisk(folder / "valkey")
        disk.mount()
        stack.callback(disk.unmount)
        skipped = {"disk_full": disk.refused} if disk.refused and "disk_full" in kinds else {}
        server = Server(disk.folder, "appendonly yes", "appendfsync always", 'save ""')
        stack.callback(server.kill)
        server.start()
        proxy = await stack.enter_async_context(CuttingProxy(server.port))
        settings = _settings(proxy.port, folder)
        station = Station(folder / "settings.yaml", folder / "station.log")
        await asyncio.to_thread(cluster.connect)
        stack.callback(cluster.disconnect)
        with patch.object(service, "DetectorDeployment", BreakableDetectorDeployment):
            await asyncio.to_thread(service.run, settings)
        stack.callback(service.stop)
        chores = [asyncio.create_task(station.keep_up()), asyncio.create_task(read_results(settings.redis, seen))]
        plant = Plant(server, proxy, station, disk, models, Path(os.environ[SWITCH]), _CLAIM_IDLE_MS / 1000)
        chaos = Chaos(plant, dice)
        over = asyncio.Event()
        pace = images_per_s / _PRODUCERS
        producers = [asyncio.create_task(produce(k, settings.redis, over, pace, account)) for k in range(_PRODUCERS)]
        await chaos.strike([kind for kind in kinds if kind not in skipped], pause_s, time.monotonic() + minutes * 60)
        over.set()
        await asyncio.gather(*producers)
        await _until_all_ended(server, account, seen)
        for chore in chores:
            chore.cancel()
        await asyncio.gather(*chores, return_exceptions=True)
        with RawRedis(server.port) as redis:
            found = read_endings(redis)
            left = redis.count("XLEN", IMAGES)
            counters = redis("HGETALL", "flawstream:counters")
    err.print(_table(chaos.faults, account, found))
    err.print(
        f"{account.refused} pushes tried again, {proxy.cut_replies} replies cut, "
        f"{station.starts} starts of the station, at the server {counters!r}"
    )
    figures = _figures(chaos.faults, account, found, left=left, seen=seen)
    return {"bench": "chaos", "seed": seed} | figures | {"skipped": skipped}


def _figures(faults: list[Fault], account: Account, found: Endings, *, left: int, seen: set[str]) -> dict[str, object]:
    dead = found.reasons
    good = set(account.pushed_ms) - account.bad
    wrong = [
        key
        for key in account.pushed_ms
        if key in found.count and (key in account.bad) != (dead.get(key) == "undecodable")
    ] + [key for key, reason in dead.items() if reason != "undecodable"]
    falsely_dead = [key for key in dead if key not in account.bad]
    for key in falsely_dead[:5]:
        err.print(f"[red]falsely dead: {key}: {dead[key]}")
    waits_ms = _waits_ms(faults[-1], account, found)
    return {
        "images": len(account.pushed_ms),
        "lost": sum(key not in found.count for key in account.pushed_ms) + left,
        "duplicates": sum(count - 1 for count in found.count.values()),
        "falsely_dead": len(falsely_dead),
        "stuck": sum(wait_ms > _IN_TIME_MS for wait_ms in waits_ms),
        "faults": {kind: sum(fault.kind == kind for fault in faults) for kind in sorted({f.kind for f in faults})},
        "longest_recovery_s": max(_recovery_s(fault, account, found) for fault in faults if fault.alone),
        "recovery_after_last_fault_s": _recovery_s(faults[-1], account, found),
        "wrong_ending": len(set(wrong)),
        "results": sum(key not in dead for key in found.count),
        "dead": len(dead),
        "unread_by_group": len(good - seen),
    }


async def _until_all_ended(server: Server, account: Account, seen: set[str]) -> None:
    """Wait until nothing is left and the group has read it all, or long enough."""
    deadline_s = time.monotonic() + _PATIENCE_S
    good = len(account.pushed_ms) - len(account.bad)
    report_s = 0.0
    while time.monotonic() < deadline_s:
        with RawRedis(server.port) as redis:
            left = redis.count("XLEN", IMAGES)
            if time.monotonic() > report_s:
                report_s = time.monotonic() + _REPORT_S
                print_backlog("pushing has ended", redis)
        if not left and len(seen) >= good:
            return
        await asyncio.sleep(0.5)
    err.print(f"[red]{left} images are left and {good - len(seen)} results unread after {_PATIENCE_S:g} s")


def _waits_ms(fault: Fault, account: Account, found: Endings) -> list[float]:
    """How long after a fault the images that had arrived before its end got their outcomes; inf without one."""
    ends_ms = (found.ended_ms.get(key, math.inf) for key, at_ms in account.pushed_ms.items() if at_ms <= fault.over_ms)
    return [end_ms - fault.over_ms for end_ms in ends_ms if end_ms >= fault.over_ms]


def _recovery_s(fault: Fault, account: Account, found: Endings) -> float:
    """Seconds from a fault's end until the images that had arrived had outcomes; those that never had are left out."""
    return round(max((ms for ms in _waits_ms(fault, account, found) if ms < math.inf), default=0.0) / 1000, 1)


def _table(faults: list[Fault], account: Account, found: Endings) -> Table:
    table = Table(title="Time until every image that had arrived had an outcome, s", title_justify="left")
    for column in ("fault", "times", "alone", "median", "longest"):
        table.add_column(column, justify="left" if column == "fault" else "right")
    for kind in sorted({fault.kind for fault in faults}):
        mine = [fault for fault in faults if fault.kind == kind]
        times = [_recovery_s(fault, account, found) for fault in mine if fault.alone]
        figures = (f"{statistics.median(times):.1f}", f"{max(times):.1f}") if times else ("", "")
        table.add_row(kind, str(len(mine)), str(len(times)), *figures)
    return table


def _settings(port: int, folder: Path) -> Settings:
    tree = {
        "redis": {"url": f"redis://127.0.0.1:{port}/0", "timeout_s": 3.0, "block_ms": 500},
        "registry": {"root": str(folder / "models")},
        "backlog": {"keep_results": 10_000_000},
        "api": {"port": free_port()},
        "worker": {
            "replicas": 2,
            "claim_idle_ms": _CLAIM_IDLE_MS,
            "sweep_s": 1.0,
            "drain_s": 3.0,
        },
        "detector": {"replicas": 2, "timeout_s": 10.0},
    }
    (folder / "settings.yaml").write_text(json.dumps(tree), encoding="utf-8")  # JSON is YAML
    return Settings.model_validate(tree)


def _photograph(seed: int) -> bytes:
    """Make a JPEG of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (96, 128, 3), np.uint8)
    return bytes(cv2.imencode(".jpg", pixels)[1].tobytes())


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="chaos", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--minutes", type=float, default=20.0, help="at least; each kind of fault has its turn (default 20)"
    )
    parser.add_argument("--rate", type=float, default=40.0, help="images pushed per second (default 40)")
    parser.add_argument("--pause", type=float, default=8.0, help="seconds between two faults, on average (default 8)")
    parser.add_argument("--seed", type=int, default=0, help="of the faults and images (default 0)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="of faults (default: all)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="flawstream-chaos-") as folder:
        figures = asyncio.run(
            run(
                options.kinds,
                Path(folder),
                minutes=options.minutes,
                images_per_s=options.rate,
                pause_s=options.pause,
                seed=options.seed,
            )
        )
    sys.stdout.write(json.dumps(figures) + "\n")
    faults = ("lost", "duplicates", "falsely_dead", "stuck", "wrong_ending", "unread_by_group")
    sys.exit(any(figures[name] for name in faults))


if __name__ == "__main__":
    main()
