"""Four shards and workers that join, leave, are killed and paused while images arrive: real processes and server."""

import asyncio
import logging
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import pytest
from helpers.fakes import FakeDetector, png
from helpers.places import ROOT, TESTS
from helpers.raw_redis import RawRedis
from helpers.redis_servers import Server
from helpers.redis_servers import running as running_servers
from helpers.stream_work import working
from helpers.waiting import wait_until_async
from soak.endings import read_endings

from flawstream.telemetry import metrics as m
from flawstream.telemetry.metrics import Gauge, NoMetrics
from schemas.keys import all_keys
from schemas.settings import Settings
from workers.consume.shard_leases import MISSED_HEARTBEATS
from workers.consume.sharded import ShardedWorker
from workers.produce.producer import Producer
from workers.redis.connection import make_client

pytestmark = pytest.mark.anyio
log = logging.getLogger(__name__)

SHARDS = 4
GAP_S = 5.0
PUSH_EVERY_S = 0.02
READS_AT_LEAST_EVERY_MS = 1500
"""A read waits `redis.block_ms`, a second; a worker that has given a shard up does not read it at all."""

Start = Callable[[str], subprocess.Popen[bytes]]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    one = Server(tmp_path / "valkey", "appendonly yes", "appendfsync always")
    with running_servers(one):
        yield one


@pytest.fixture
def settings(server: Server) -> Settings:
    """Return settings as they are by default, but for the time after which a killed worker's own images are claimed."""
    return Settings.model_validate(
        {"redis": {"url": server.url, "shards": SHARDS}, "worker": {"claim_idle_ms": 2000, "sweep_s": 1.0}}
    )


@pytest.fixture
def start(settings: Settings) -> Iterator[Start]:
    """Return a function that starts a worker and waits until it runs."""
    environment = os.environ | {"PYTHONPATH": str(TESTS)}
    with ExitStack() as stack:

        def begin(name: str) -> subprocess.Popen[bytes]:
            command = [sys.executable, "-m", "helpers.shard_worker", settings.model_dump_json(), name]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, env=environment)  # noqa: S603 - our own program
            stack.enter_context(process)
            stack.callback(process.kill)
            assert process.stdout is not None
            assert process.stdout.readline() == b"starts\n"
            return process

        yield begin


@pytest.fixture
async def pushed(settings: Settings) -> AsyncIterator[list[str]]:
    """Push images at a steady pace as long as the test runs; the ids of those that were taken."""
    taken: list[str] = []

    async def push() -> None:
        async with Producer(settings.redis) as producer:
            while True:
                name = f"part-{len(taken)}"
                await producer.push(png(), "bottle", id=name)
                taken.append(name)
                await asyncio.sleep(PUSH_EVERY_S)

    task = asyncio.create_task(push())
    yield taken
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def readers(server: Server, settings: Settings) -> dict[str, list[int]]:
    """Return the shards that each worker has read within the time of a read, as the server saw it."""
    found: dict[str, list[int]] = {}
    with RawRedis(server.port) as raw:
        for shard, keys in enumerate(all_keys(settings.redis)):
            try:
                consumers = raw("XINFO", "CONSUMERS", keys.images, keys.group)
            except RuntimeError:  # no worker has read it yet
                continue
            assert isinstance(consumers, list)
            for flat in consumers:
                assert isinstance(flat, list)
                about = dict(zip(flat[::2], flat[1::2], strict=True))
                name, idle_ms = about[b"name"], about[b"idle"]
                assert isinstance(name, bytes)
                assert isinstance(idle_ms, int)
                if idle_ms < READS_AT_LEAST_EVERY_MS:
                    found.setdefault(name.decode(), []).append(shard)
    return found


async def await_readers(server: Server, settings: Settings, expected: dict[str, list[int]]) -> None:
    await wait_until_async(
        lambda: readers(server, settings) == expected,
        lambda: f"the readers {expected}, and not {readers(server, settings)}",
        deadline_s=20,
    )


def endings(server: Server, settings: Settings) -> tuple[Counter[str], dict[int, list[int]]]:
    """Return how often each image ended, and when images of each shard did, by the server's clock."""
    count: Counter[str] = Counter()
    times_ms: dict[int, list[int]] = {}
    with RawRedis(server.port) as raw:
        for shard, keys in enumerate(all_keys(settings.redis)):
            found = read_endings(raw, keys.results.removesuffix(":results"))
            assert not found.reasons, "dead letters"
            count += found.count
            times_ms[shard] = sorted(found.ended_ms.values())
    return count, times_ms


async def test_shards_are_served_while_workers_join_leave_are_killed_and_paused(
    server: Server, settings: Settings, start: Start, pushed: list[str]
) -> None:
    first = start("a")
    await wait_until_async(lambda: len(pushed) > SHARDS, "images")
    await await_readers(server, settings, {"a": [0, 1, 2, 3]})
    second = start("b")
    await await_readers(server, settings, {"a": [0, 1], "b": [2, 3]})
    third = start("c")
    everyone = {"a": [0, 1], "b": [1, 2], "c": [2, 3]}
    await await_readers(server, settings, everyone)

    second.kill()
    await await_readers(server, settings, {"a": [0, 1], "c": [2, 3]})
    second = start("b")
    await await_readers(server, settings, everyone)

    os.kill(first.pid, signal.SIGSTOP)
    await await_readers(server, settings, {"b": [0, 1], "c": [2, 3]})
    os.kill(first.pid, signal.SIGCONT)
    await await_readers(server, settings, everyone)

    third.send_signal(signal.SIGTERM)
    await await_readers(server, settings, {"a": [0, 1], "b": [2, 3]})
    await wait_until_async(lambda: third.poll() is not None, "the end of the worker that was stopped", deadline_s=20)
    assert third.returncode == 0

    enough = len(pushed) + 100
    await wait_until_async(lambda: len(pushed) >= enough, "images after the last change")
    taken = pushed[:]
    await wait_until_async(
        lambda: endings(server, settings)[0].keys() >= set(taken), "an outcome of every image", every_s=0.5
    )
    count, times_ms = endings(server, settings)
    assert [name for name, number in count.items() if number != 1] == []
    gaps_s = {
        shard: max(after - before for before, after in pairwise(times)) / 1000 for shard, times in times_ms.items()
    }
    log.info("%d images, longest time without a result, by shard: %s", len(taken), gaps_s)
    assert len(taken) > 50 * SHARDS
    assert max(gaps_s.values()) < GAP_S, gaps_s


class Gauges(NoMetrics):
    """Remembers every value of each gauge."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {}

    def set(self, gauge: Gauge, value: float, /, **labels: str) -> None:
        del labels
        self.values.setdefault(gauge.name, []).append(value)


async def test_shards_without_a_reader_are_a_metric_and_logged_changes_are_few(
    settings: Settings, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    gauges = Gauges()
    caplog.set_level("INFO", "workers.consume.shard_loops")
    read, unread = (gauges.values.setdefault(gauge.name, []) for gauge in (m.SHARDS_READ, m.SHARDS_UNREAD))
    other = start("b")
    async with (
        make_client(settings.redis) as client,
        working(ShardedWorker(client, "a", FakeDetector(), settings, gauges)),
    ):
        await wait_until_async(lambda: read[-1:] == [2], lambda: f"two shards read here, and not {read}", deadline_s=20)
        other.kill()
        await wait_until_async(lambda: read[-1:] == [4], lambda: f"all shards read here, and not {read}", deadline_s=20)
    assert max(unread) == 2
    assert unread[-1] == 0
    assert sum(value > 0 for value in unread) <= MISSED_HEARTBEATS
    changes = [record.getMessage() for record in caplog.records if record.name == "workers.consume.shard_loops"]
    assert changes[-2:] == ["reads shards 0, 1; workers: a, b", "reads shards 0, 1, 2, 3; workers: a"]
    assert len(changes) <= 3


async def test_worker_that_may_not_see_the_others_reads_all_shards(
    server: Server, settings: Settings, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    """As with access rules of a release before this one."""
    start("b")
    names = ("images", "results", "dead", "counters")
    server("ACL", "SETUSER", "default", "resetkeys", *(f"~flawstream:{{[0-9]}}:{name}" for name in names))
    async with make_client(settings.redis) as client:
        stop = asyncio.Event()
        worker = ShardedWorker(client, "a", FakeDetector(), settings)
        task = asyncio.create_task(worker.run(stop))
        await wait_until_async(
            lambda: readers(server, settings).get("a") == [0, 1, 2, 3], "all shards are read", deadline_s=20
        )
        stop.set()
        await task
        await worker.close()
    warnings = [record.getMessage() for record in caplog.records if "cannot be seen" in record.getMessage()]
    assert len(warnings) == 1
