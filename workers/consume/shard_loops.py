"""The loops of a worker of a sharded stream, one for each shard that it reads: they follow as workers come and go."""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass

from flawstream.telemetry import metrics as m
from flawstream.telemetry.metrics import Metrics
from schemas.errors import FlawstreamError, StageTimeoutError
from workers.consume.shard_leases import HEARTBEAT_S, ShardLeases, divide
from workers.consume.shard_members import ShardMembers
from workers.consume.slots import Slots
from workers.consume.worker import StreamWorker

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Loop:
    """A loop that reads a shard: set `stop`, and it finishes its batches and ends."""

    stop: asyncio.Event
    slots: Slots


class ShardLoops:
    """Reads the shards that `ShardLeases` gives to this worker, and no others.

    Args:
        leases: Which shards this worker reads.
        members: Heartbeats among the workers.
        make_loop: Makes the loop of a shard, with its slots for batches in flight.
        in_flight: Batches in flight at once, over all shards.
        metrics: Receives the numbers of shards read and unread.
    """

    def __init__(
        self,
        leases: ShardLeases,
        members: ShardMembers,
        make_loop: Callable[[int, Slots], StreamWorker],
        *,
        in_flight: int,
        metrics: Metrics,
    ) -> None:
        self._leases = leases
        self._members = members
        self._make_loop = make_loop
        self._in_flight = in_flight
        self._metrics = metrics
        self._loops: dict[int, _Loop] = {}
        self._latest: dict[int, asyncio.Task[None]] = {}
        self._seen: tuple[list[int], list[str]] = ([], [])
        self._hung: StageTimeoutError | None = None

    async def run(self, stop: asyncio.Event) -> None:
        """Work until `stop` is set, then leave the shards to the other workers and finish the batches in flight.

        Raises:
            StageTimeoutError: Decoding or the detector hangs in one loop. `stop` was set, and all loops have ended.
        """
        async with asyncio.TaskGroup() as tasks:
            beating = tasks.create_task(self._beat_until(stop, tasks))
            await stop.wait()
            for loop in self._loops.values():
                loop.stop.set()
            await beating  # a heartbeat that is under way would be counted after leaving
            try:
                await self._members.leave()
            except FlawstreamError as error:  # the others miss the heartbeats
                _log.warning("leaving the other workers: %s: %s", error.code, error)
        if self._hung is not None:
            raise self._hung

    async def _beat_until(self, stop: asyncio.Event, tasks: asyncio.TaskGroup) -> None:
        failed = False
        while not stop.is_set():
            try:
                self._leases.heard(await self._members.heartbeat(self._leases.dead))
                failed = False
            except Exception as error:  # noqa: BLE001 - the loop's outermost boundary
                self._leases.not_heard()
                if not failed:
                    _log.warning(
                        "the other workers cannot be seen; if that lasts, this one reads all shards: %s",
                        error,
                        exc_info=None if isinstance(error, FlawstreamError) else error,
                    )
                failed = True
            if not stop.is_set():
                self._follow(tasks, stop)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(HEARTBEAT_S):
                        await stop.wait()

    def _follow(self, tasks: asyncio.TaskGroup, stop: asyncio.Event) -> None:
        """Start and stop loops, so that they are those of the leases."""
        slots = divide(self._in_flight, self._leases.shares)
        for shard in self._loops.keys() - slots.keys():
            self._loops.pop(shard).stop.set()
        for shard, number in slots.items():
            if shard in self._loops:
                self._loops[shard].slots.resize(number)
            else:
                self._loops[shard] = loop = _Loop(asyncio.Event(), Slots(number))
                self._latest[shard] = tasks.create_task(self._run_loop(shard, loop, self._latest.get(shard), stop))
        self._report(list(slots))

    async def _run_loop(self, shard: int, loop: _Loop, before: asyncio.Task[None] | None, stop: asyncio.Event) -> None:
        """Read a shard until the loop's stop. Where something hangs in it, the worker's `stop` is set.

        Where this worker read it a moment ago, that loop finishes its batches first: two would work on the same ones.
        It takes long only where the detector or the server do not answer, and then no other loop would get on either.
        """
        if before is not None:
            await asyncio.wait([before])
        if not loop.stop.is_set():
            try:
                await self._make_loop(shard, loop.slots).run(loop.stop)
            except StageTimeoutError as error:  # the other loops finish first
                self._hung = error
                stop.set()

    def _report(self, shards: list[int]) -> None:
        self._metrics.set(m.SHARDS_READ, len(shards))
        self._metrics.set(m.SHARDS_UNREAD, len(self._leases.unread))
        now = (shards, self._leases.workers)
        if now != self._seen:
            self._seen = now
            _log.info("reads shards %s; workers: %s", ", ".join(map(str, shards)), ", ".join(now[1]))
