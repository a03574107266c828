"""The faults of `soak.chaos`, by kind: what is killed, paused, deleted, cut or filled, one at a time or overlapping.

Steps of a clock are not among them: all processes here share the machine's clock, and a step of the server's alone
needs a library such as libfaketime. `soak.simulation` has them.
"""

import asyncio
import contextlib
import os
import random
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from helpers.raw_redis import RawRedis
from helpers.redis_servers import Server
from helpers.waiting import Deadline
from ray.util.state import list_actors
from rich.console import Console

from soak.proxy import CuttingProxy
from soak.small_disk import SmallDisk

IMAGES, RESULTS, GROUP = "flawstream:images", "flawstream:results", "workers"

_SHARE_OVERLAPPING = 0.25
"""After so many of the faults the next one does not wait until the service has recovered."""
_LONGEST_RECOVERY_S = 60.0
_PATIENCE_S = 300.0
_CATCH_S = 10.0
"""How long to wait for an entry to be pending."""
_WORKER, _DETECTOR, _CONTROLLER = (
    "ServeReplica:flawstream:StreamWorker",
    "ServeReplica:flawstream:Detector",
    "ServeController",
)

err = Console(stderr=True)


@dataclass
class Fault:
    """Something that was done to the service.

    Attributes:
        kind: Which.
        over_ms: When it was over, by the machine's clock: a kill at once, a pause when it ended.
        alone: Whether the service had time to recover before the next one.
    """

    kind: str
    over_ms: float
    alone: bool = True


class Station:
    """A `flawstream worker` process that is started again whenever it ends, as systemd would.

    Args:
        settings_file: Its settings.
        log: Receives what it prints.
    """

    def __init__(self, settings_file: Path, log: Path) -> None:
        self.starts = 0
        program = [sys.executable, "-m", "soak.breakable_engine", "worker"]
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

    @property
    def pid(self) -> int:
        """The id of its process.

        Raises:
            LookupError: There is none.
        """
        if self._process is None or self._process.returncode is not None:
            raise LookupError("no station is alive")
        return self._process.pid

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal, if it is there."""
        with contextlib.suppress(LookupError, ProcessLookupError):
            os.kill(self.pid, number)


@dataclass(frozen=True)
class Plant:
    """What can be broken.

    Attributes:
        server: The stream server.
        proxy: Between the server and its clients.
        station: The worker outside Ray.
        disk: Where the server's files are.
        registry: The folder of the models.
        engine_switch: While this file exists, the engines raise.
        claim_s: `worker.claim_idle_ms`.
    """

    server: Server
    proxy: CuttingProxy
    station: Station
    disk: SmallDisk
    registry: Path
    engine_switch: Path
    claim_s: float


class Chaos:
    """The faults. Each method ends when its fault is over.

    Args:
        plant: What they strike.
        dice: Chooses.

    Attributes:
        faults: What was done.
    """

    def __init__(self, plant: Plant, dice: random.Random) -> None:
        self.faults: list[Fault] = []
        self._plant = plant
        self._dice = dice

    async def strike(self, kinds: list[str], pause_s: float, until_s: float) -> None:
        """Do one thing after the other, in an order by chance, until the time is over and each kind had its turn."""
        left: list[str] = []
        deadline = Deadline(lambda: f"a round of faults, without {left}", until_s - time.monotonic() + _PATIENCE_S)
        await asyncio.sleep(pause_s)
        while left or time.monotonic() < until_s:
            deadline.check()
            if not left:
                left = self._dice.sample(sorted(kinds), len(kinds))
            kind = left.pop()
            try:
                await KINDS[kind](self)
            except LookupError as error:  # still away from the last time: its turn comes again
                err.print(f"{kind}: {error}")
                left.insert(0, kind)
            else:
                fault = Fault(kind, time.time() * 1000, alone=self._dice.random() > _SHARE_OVERLAPPING)
                self.faults.append(fault)
                if fault.alone:
                    await self._until_recovered(fault)
            await asyncio.sleep(self._dice.uniform(0.2, 1.8) * pause_s)
        self.faults[-1].alone = True
        await self._until_recovered(self.faults[-1])

    async def _until_recovered(self, fault: Fault) -> None:
        """Wait until every image that had arrived when the fault was over has an outcome, or long enough."""
        with RawRedis(self._plant.server.port) as redis:
            print_backlog(fault.kind, redis)
            while time.time() * 1000 < fault.over_ms + _LONGEST_RECOVERY_S * 1000:
                oldest = redis.entries(IMAGES, "-", 1)
                if not oldest or int(oldest[0][0].partition("-")[0]) > fault.over_ms:
                    return
                await asyncio.sleep(0.2)

    def less_than_a_claim_s(self) -> float:
        return self._dice.uniform(0.1, 0.8) * self._plant.claim_s

    def more_than_a_claim_s(self) -> float:
        return self._dice.uniform(1.2, 2.0) * self._plant.claim_s

    async def _pids(self, name: str) -> list[int]:
        actors = await asyncio.to_thread(list_actors, filters=[("state", "=", "ALIVE")], limit=1000)
        pids = [actor.pid for actor in actors if actor.class_name.startswith(name)]
        if not pids:
            raise LookupError(f"no {name} is alive")
        return pids

    async def kill_actor(self, name: str) -> None:
        os.kill(self._dice.choice(await self._pids(name)), signal.SIGKILL)

    async def signal_station(self, number: signal.Signals) -> None:
        os.kill(self._plant.station.pid, number)

    async def pause_worker(self, duration_s: float) -> None:
        """Stop a worker with SIGSTOP, the station or one of Serve's: it sends nothing and keeps its connections."""
        pid = self._dice.choice([self._plant.station.pid, *await self._pids(_WORKER)])
        os.kill(pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(duration_s)
        finally:
            with contextlib.suppress(ProcessLookupError):  # Serve replaced it
                os.kill(pid, signal.SIGCONT)

    async def fail_engines(self) -> None:
        """Have every engine raise for every image, for less than a claim takes or for more."""
        self._plant.engine_switch.touch()
        await asyncio.sleep(self._dice.choice((self.less_than_a_claim_s(), self.more_than_a_claim_s())))
        self._plant.engine_switch.unlink()

    async def take_storage_away(self) -> None:
        away = self._plant.registry.with_suffix(".away")
        self._plant.registry.rename(away)
        await asyncio.sleep(self._dice.choice((self.less_than_a_claim_s(), self.more_than_a_claim_s())))
        away.rename(self._plant.registry)

    async def kill_redis(self) -> None:
        self._plant.server.kill()
        await asyncio.sleep(self._dice.uniform(0.0, 3.0))
        await asyncio.to_thread(self._plant.server.start)

    async def pause_redis(self, duration_s: float) -> None:
        self._plant.server.pause()
        await asyncio.sleep(duration_s)
        self._plant.server.resume()

    async def fill_disk(self) -> None:
        """Fill the server's disk. With `appendfsync always` it ends itself; it is started again once there is room."""
        self._plant.disk.fill()
        await asyncio.sleep(self._dice.uniform(1.0, 5.0))
        self._plant.disk.free()
        self._plant.server.kill()
        await asyncio.to_thread(self._plant.server.start)

    async def cut_replies(self) -> None:
        for _ in range(5):
            self._plant.proxy.cut()
            await asyncio.sleep(self._dice.uniform(0.05, 0.3))

    async def flush_scripts(self) -> None:
        self._plant.server("SCRIPT", "FLUSH")

    async def destroy_group(self) -> None:
        self._plant.server("XGROUP", "DESTROY", IMAGES, GROUP)

    async def delete_consumer(self) -> None:
        """Delete a consumer that has entries pending."""

        def delete(redis: RawRedis) -> int:
            owners = {owner for _, owner in _pending(redis)}
            return sum(
                redis.count("XGROUP", "DELCONSUMER", IMAGES, GROUP, owner)
                for owner in self._dice.sample(sorted(owners), min(1, len(owners)))
            )

        await self._until_struck(delete)

    async def acknowledge(self) -> None:
        """Acknowledge half of what is pending, without an outcome."""

        def acknowledge(redis: RawRedis) -> int:
            ids = [entry_id for entry_id, _ in _pending(redis)]
            chosen = self._dice.sample(ids, (len(ids) + 1) // 2)
            return redis.count("XACK", IMAGES, GROUP, *chosen) if chosen else 0

        await self._until_struck(acknowledge)

    async def _until_struck(self, attempt: Callable[[RawRedis], int]) -> None:
        """Try until pending entries were hit.

        Raises:
            LookupError: None was pending.
        """
        end_s = time.monotonic() + _CATCH_S
        with RawRedis(self._plant.server.port) as redis:
            while time.monotonic() < end_s:
                if attempt(redis):
                    return
                await asyncio.sleep(0.01)
        raise LookupError("nothing is pending")


KINDS: dict[str, Callable[[Chaos], Awaitable[None]]] = {
    "worker_killed": lambda chaos: chaos.kill_actor(_WORKER),
    "detector_killed": lambda chaos: chaos.kill_actor(_DETECTOR),
    "controller_killed": lambda chaos: chaos.kill_actor(_CONTROLLER),
    "station_killed": lambda chaos: chaos.signal_station(signal.SIGKILL),
    "station_stopped": lambda chaos: chaos.signal_station(signal.SIGTERM),
    "worker_paused": lambda chaos: chaos.pause_worker(chaos.less_than_a_claim_s()),
    "worker_paused_long": lambda chaos: chaos.pause_worker(chaos.more_than_a_claim_s()),
    "engine_fails": Chaos.fail_engines,
    "storage_away": Chaos.take_storage_away,
    "redis_killed": Chaos.kill_redis,
    "redis_paused": lambda chaos: chaos.pause_redis(chaos.less_than_a_claim_s()),
    "redis_paused_long": lambda chaos: chaos.pause_redis(chaos.more_than_a_claim_s()),
    "disk_full": Chaos.fill_disk,
    "replies_cut": Chaos.cut_replies,
    "scripts_flushed": Chaos.flush_scripts,
    "group_destroyed": Chaos.destroy_group,
    "consumer_deleted": Chaos.delete_consumer,
    "foreign_ack": Chaos.acknowledge,
}
"""What can be done."""


def _pending(redis: RawRedis) -> list[tuple[bytes, bytes]]:
    """Return the ids of pending entries, and their consumers."""
    try:
        reply = redis("XPENDING", IMAGES, GROUP, "-", "+", 1000)
    except RuntimeError:  # no group yet
        return []
    assert isinstance(reply, list)
    found = []
    for row in reply:
        assert isinstance(row, list)
        entry_id, owner = row[:2]
        assert isinstance(entry_id, bytes)
        assert isinstance(owner, bytes)
        found.append((entry_id, owner))
    return found


def print_backlog(what: str, redis: RawRedis) -> None:
    """Print a line with the time, how many images are on the stream, and how many each consumer owns."""
    try:
        consumers = redis("XINFO", "CONSUMERS", IMAGES, GROUP)
    except RuntimeError:  # no group yet
        consumers = []
    assert isinstance(consumers, list)
    about = [dict(zip(flat[::2], flat[1::2], strict=True)) for flat in consumers if isinstance(flat, list)]
    owned = ", ".join(f"{one[b'name']!r} {one[b'pending']!r}" for one in about)
    left = redis.count("XLEN", IMAGES)
    err.print(f"{time.strftime('%H:%M:%S')}  {what:<20} {left:>5} left, pending: {owned}", highlight=False)
