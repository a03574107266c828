"""Chaos: a whole service under load while its parts are killed, cut off and paused at random.

    PYTHONPATH=tests python -m soak.chaos --minutes 20

Valkey with an append-only file, behind a proxy that cuts replies; Ray Serve with two stream workers and two detectors;
a `flawstream worker` beside them, started again whenever it ends. Producers push through the proxy, again and again
until told that an image is there, some images twice on purpose, some that are no images. At the end every id is counted
on the server: it must have ended exactly once, good images as results, others as dead letters.

The last line is JSON; the exit code is 1 where an image was lost, ended twice, or ended as the wrong thing.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np
from helpers.raw_redis import RawRedis
from helpers.redis_servers import Server
from helpers.tiny_models import write_version
from helpers.waiting import Deadline
from ray.util.state import list_actors
from rich.console import Console
from rich.table import Table

from flawstream.fastflow.backbone import Backbone
from flawstream.registry.registry import Registry
from flawstream_cli import cluster
from schemas.errors import TransientError
from schemas.settings import RedisSettings, Settings
from serving import app as service
from soak.endings import read_endings
from soak.proxy import CuttingProxy
from workers.outcomes.results import ResultReader
from workers.produce.producer import Producer
from workers.redis.embedded import free_port

_CATEGORIES = ("bottle", "cable", "cap")
_INPUT_PX = 64
_SHARE_OF_BAD = 0.01
_SHARE_PUSHED_TWICE = 0.02
_PRODUCERS = 4
_PATIENCE_S = 300.0
_TELL_S = 10.0
_AT_WORK = 100
"""So many results after a fault, the service is at work again."""
_LONGEST_PAUSE_S = 60
_MAX_DELIVERIES = 100
"""A good image that meets the faults often is no poison; what is, another test tells."""

_T = TypeVar("_T")

err = Console(stderr=True)


@dataclass
class Fault:
    """Something that was done to the service.

    Attributes:
        kind: Which.
        over_ms: When it was over, by the machine's clock: a kill at once, a pause when it ended.
    """

    kind: str
    over_ms: float


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


class Station:
    """A `flawstream worker` process that is started again whenever it ends, as systemd would."""

    def __init__(self, settings_file: Path, log: Path) -> None:
        self.starts = 0
        program = [sys.executable, "-m", "flawstream_cli", "worker"]
        self._command = [*program, "--name", "station", "--config", str(settings_file)]
        self._log = log
        self._process: asyncio.subprocess.Process | None = None

    async def keep_up(self) -> None:
        """Run it for ever."""
        with self._log.open("ab") as log:
            try:
                while True:
                    self._process = await asyncio.create_subprocess_exec(*self._command, stdout=log, stderr=log)
                    self.starts += 1
                    await self._process.wait()
            finally:
                self.signal(signal.SIGKILL)

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal, if it is there."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)


class Chaos:
    """The faults, by kind. Each method ends when its fault is over."""

    def __init__(self, server: Server, proxy: CuttingProxy, station: Station, dice: random.Random) -> None:
        self.faults: list[Fault] = []
        self._server = server
        self._proxy = proxy
        self._station = station
        self._dice = dice
        self.kinds: dict[str, Callable[[], Awaitable[None]]] = {
            "worker_killed": lambda: self._kill_actor("ServeReplica:flawstream:StreamWorker"),
            "detector_killed": lambda: self._kill_actor("ServeReplica:flawstream:Detector"),
            "controller_killed": lambda: self._kill_actor("ServeController"),
            "station_killed": lambda: self._signal_station(signal.SIGKILL),
            "station_stopped": lambda: self._signal_station(signal.SIGTERM),
            "redis_killed": self._kill_redis,
            "redis_paused": self._pause_redis,
            "replies_cut": self._cut_replies,
        }

    async def strike(self, pause_s: float, until_s: float) -> None:
        """Do one thing after the other, in an order by chance, until the time is over and each kind had its turn."""
        kinds: list[str] = []
        deadline = Deadline(lambda: f"a round of faults, without {kinds}", until_s - time.monotonic() + _PATIENCE_S)
        await asyncio.sleep(pause_s)
        while kinds or time.monotonic() < until_s:
            deadline.check()
            if not kinds:
                kinds = self._dice.sample(sorted(self.kinds), len(self.kinds))
            kind = kinds.pop()
            try:
                await self.kinds[kind]()
            except LookupError as error:  # still away from the last time: its turn comes again
                err.print(f"{kind}: {error}")
                kinds.insert(0, kind)
            else:
                self.faults.append(Fault(kind, time.time() * 1000))
                await self._until_at_work(kind)
            await asyncio.sleep(self._dice.uniform(0.2, 1.8) * pause_s)

    async def _until_at_work(self, kind: str) -> None:
        """Wait until images end again: on a busy machine the next fault would else meet a service still starting."""
        with RawRedis(self._server.port) as redis:
            _tell(f"{kind}, {redis.count('XLEN', 'flawstream:images')} left", redis)
            ended = redis.count("XLEN", "flawstream:results")
            for _ in range(_LONGEST_PAUSE_S):
                if redis.count("XLEN", "flawstream:results") > ended + _AT_WORK:
                    return
                await asyncio.sleep(1.0)

    async def _kill_actor(self, name: str) -> None:
        actors = await asyncio.to_thread(list_actors, filters=[("state", "=", "ALIVE")], limit=1000)
        pids = [actor.pid for actor in actors if actor.class_name.startswith(name)]
        if not pids:
            raise LookupError(f"no {name} is alive")
        os.kill(self._dice.choice(pids), signal.SIGKILL)

    async def _signal_station(self, number: signal.Signals) -> None:
        self._station.signal(number)

    async def _kill_redis(self) -> None:
        self._server.kill()
        await asyncio.sleep(self._dice.uniform(0.0, 3.0))
        await asyncio.to_thread(self._server.start)

    async def _pause_redis(self) -> None:
        self._server.pause()
        await asyncio.sleep(self._dice.uniform(0.5, 5.0))
        self._server.resume()

    async def _cut_replies(self) -> None:
        for _ in range(5):
            self._proxy.cut()
            await asyncio.sleep(self._dice.uniform(0.05, 0.3))


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


async def run(minutes: float, images_per_s: float, pause_s: float, seed: int, folder: Path) -> dict[str, object]:
    """Run the service, the producers and the faults; gives what is printed."""
    dice = random.Random(seed)  # noqa: S311 - chance, no secret
    spec = Backbone(Settings().model.model_copy(update={"input_size": _INPUT_PX})).spec
    registry = Registry(str(folder / "models"))
    for category in _CATEGORIES:
        write_version(registry, category, spec=spec)
    server = Server(folder / "valkey", "appendonly yes", "appendfsync always", 'save ""')
    account = Account()
    seen: set[str] = set()
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(server.kill)
        server.start()
        proxy = await stack.enter_async_context(CuttingProxy(server.port))
        settings = _settings(proxy.port, folder)
        station = Station(folder / "settings.yaml", folder / "station.log")
        await asyncio.to_thread(cluster.connect)
        stack.callback(cluster.disconnect)
        await asyncio.to_thread(service.run, settings)
        stack.callback(service.stop)
        chores = [asyncio.create_task(station.keep_up()), asyncio.create_task(read_results(settings.redis, seen))]
        chaos = Chaos(server, proxy, station, dice)
        over = asyncio.Event()
        pace = images_per_s / _PRODUCERS
        producers = [asyncio.create_task(produce(k, settings.redis, over, pace, account)) for k in range(_PRODUCERS)]
        await chaos.strike(pause_s, time.monotonic() + minutes * 60)
        over.set()
        await asyncio.gather(*producers)
        await _until_all_ended(server, account, seen)
        for chore in chores:
            chore.cancel()
        await asyncio.gather(*chores, return_exceptions=True)
        with RawRedis(server.port) as redis:
            found = read_endings(redis)
            left = redis.count("XLEN", "flawstream:images")
            counters = redis("HGETALL", "flawstream:counters")
    recoveries = _recoveries(chaos.faults, account.pushed_ms, found.ended_ms)
    err.print(_table(recoveries))
    err.print(
        f"{account.refused} pushes tried again, {proxy.cut_replies} replies cut, "
        f"{station.starts} starts of the station, at the server {counters!r}"
    )
    wrong = [
        key
        for key in account.pushed_ms
        if key in found.count and (key in account.bad) != (found.reasons.get(key) == "undecodable")
    ] + [key for key, reason in found.reasons.items() if reason != "undecodable"]
    good = set(account.pushed_ms) - account.bad
    return {
        "bench": "chaos",
        "images": len(account.pushed_ms),
        "lost": sum(key not in found.count for key in account.pushed_ms) + left,
        "duplicates": sum(count - 1 for count in found.count.values()),
        "faults": {kind: len(times) for kind, times in recoveries.items()},
        "longest_recovery_s": round(max((max(times) for times in recoveries.values() if times), default=0.0), 1),
        "wrong_ending": len(set(wrong)),
        "results": sum(key not in found.reasons for key in found.count),
        "dead": len(found.reasons),
        "unread_by_group": len(good - seen),
    }


async def _until_all_ended(server: Server, account: Account, seen: set[str]) -> None:
    """Wait until nothing is left and the group has read it all, or long enough."""
    deadline_s = time.monotonic() + _PATIENCE_S
    good = len(account.pushed_ms) - len(account.bad)
    tell_s = 0.0
    while time.monotonic() < deadline_s:
        with RawRedis(server.port) as redis:
            left = redis.count("XLEN", "flawstream:images")
            if time.monotonic() > tell_s:
                tell_s = time.monotonic() + _TELL_S
                _tell(f"{left} left", redis)
        if not left and len(seen) >= good:
            return
        await asyncio.sleep(0.5)
    err.print(f"[red]{left} images are left and {good - len(seen)} results unread after {_PATIENCE_S:g} s")


def _tell(what: str, redis: RawRedis) -> None:
    """Print a line with the time, and who has how much in hand."""
    try:
        consumers = redis("XINFO", "CONSUMERS", "flawstream:images", "workers")
    except RuntimeError:  # no group yet
        consumers = []
    assert isinstance(consumers, list)
    about = [dict(zip(flat[::2], flat[1::2], strict=True)) for flat in consumers if isinstance(flat, list)]
    in_hand = ", ".join(f"{one[b'name']!r} {one[b'pending']!r}" for one in about)
    err.print(f"{time.strftime('%H:%M:%S')}  {what:<20} in hand: {in_hand}", highlight=False)


def _recoveries(faults: list[Fault], pushed_ms: dict[str, int], ended_ms: dict[str, int]) -> dict[str, list[float]]:
    """For each fault, by kind: seconds from its end until all images that were on their way then had ended."""
    found: dict[str, list[float]] = {}
    for fault in faults:
        ends = [ended_ms[key] for key, pushed in pushed_ms.items() if pushed <= fault.over_ms <= ended_ms.get(key, 0)]
        found.setdefault(fault.kind, []).append((max(ends, default=fault.over_ms) - fault.over_ms) / 1000)
    return found


def _table(recoveries: dict[str, list[float]]) -> Table:
    table = Table(title="Time until all that was on its way had ended, s", title_justify="left")
    for column in ("fault", "times", "median", "longest"):
        table.add_column(column, justify="left" if column == "fault" else "right")
    for kind, times in sorted(recoveries.items()):
        table.add_row(kind, str(len(times)), f"{statistics.median(times):.1f}", f"{max(times):.1f}")
    return table


def _settings(port: int, folder: Path) -> Settings:
    tree = {
        "redis": {"url": f"redis://127.0.0.1:{port}/0", "timeout_s": 3.0, "block_ms": 500},
        "registry": {"root": str(folder / "models")},
        "backlog": {"keep_results": 10_000_000},
        "api": {"port": free_port()},
        "worker": {
            "replicas": 2,
            "claim_idle_ms": 5000,
            "sweep_s": 1.0,
            "drain_s": 3.0,
            "max_deliveries": _MAX_DELIVERIES,
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
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="flawstream-chaos-") as folder:
        told = asyncio.run(run(arguments.minutes, arguments.rate, arguments.pause, arguments.seed, Path(folder)))
    sys.stdout.write(json.dumps(told) + "\n")
    if told["lost"] or told["duplicates"] or told["wrong_ending"] or told["unread_by_group"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
