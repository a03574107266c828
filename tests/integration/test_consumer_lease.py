"""One live worker at a time has a consumer name: real `flawstream worker` processes, with a fake detector."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest
from helpers.fakes import FakeDetector, png
from helpers.places import ROOT, TESTS
from helpers.raw_redis import RawRedis
from helpers.redis_servers import Server
from helpers.stream_work import working
from helpers.streams import add, single_client
from helpers.waiting import PATIENCE_S, wait_until, wait_until_async
from soak.endings import read_endings

from flawstream_cli.terminal import ExitCode
from schemas.errors import ConfigError
from schemas.keys import all_keys
from schemas.settings import RedisSettings, Settings
from workers.consume.consumer_lease import LEASE_S
from workers.consume.sharded import ShardedWorker

pytestmark = pytest.mark.anyio

PREFIX = "flawstream"
PUSH_EVERY_S = 0.02
Start = Callable[[], subprocess.Popen[str]]


@pytest.fixture
def start(redis_settings: RedisSettings) -> Iterator[Start]:
    """Return a function that starts a worker named `line7`; its ready line is not awaited."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(TESTS)))}
    with ExitStack() as stack:

        def begin() -> subprocess.Popen[str]:
            options = ("worker", "--redis", redis_settings.url, "--name", "line7")
            process = subprocess.Popen(  # noqa: S603 - our own program
                [sys.executable, "-m", "helpers.hanging_worker", *options],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield begin


def start_ready(start: Start) -> subprocess.Popen[str]:
    """Start a worker and wait for its ready line."""
    worker = start()
    assert worker.stdout is not None
    assert "line7" in worker.stdout.readline()
    return worker


def stop_in_order(worker: subprocess.Popen[str]) -> None:
    """Stop a worker as its supervisor does."""
    worker.terminate()
    assert worker.wait() == ExitCode.OK


@contextmanager
def images_arrive(server: Server) -> Iterator[None]:
    """Push images from a thread; at the end each must have ended once, none of them as a dead letter."""
    names: list[str] = []
    stop = threading.Event()

    def push() -> None:
        with RawRedis(server.port) as redis:
            while not stop.wait(PUSH_EVERY_S):
                names.append(f"part-{len(names)}")
                redis("XADD", f"{PREFIX}:images", "*", "id", names[-1], "category", "bottle", "image", png())

    pusher = threading.Thread(target=push)
    pusher.start()
    try:
        yield
    finally:
        stop.set()
        pusher.join()
    with RawRedis(server.port) as redis:
        wait_until(lambda: not redis.count("XLEN", f"{PREFIX}:images"), "every image has ended")
        endings = read_endings(redis, PREFIX)
    assert endings.count == dict.fromkeys(names, 1)
    assert not endings.reasons


def await_results(server: Server, more: int) -> None:
    """Wait for so many results from now on."""
    with RawRedis(server.port) as redis:
        before = redis.count("XLEN", f"{PREFIX}:results")
        wait_until(lambda: redis.count("XLEN", f"{PREFIX}:results") >= before + more, f"{more} results")


def test_second_worker_of_a_name_ends_with_who_has_it_and_the_first_works_on(
    valkey_server: Server, start: Start
) -> None:
    first = start_ready(start)
    with images_arrive(valkey_server):
        second = start()
        out, err = second.communicate(timeout=PATIENCE_S)
        await_results(valkey_server, 10)
    assert second.returncode == ExitCode.CANNOT_START
    assert out == ""  # neither ready nor any count
    assert f"'line7' is in use by another live worker (host {socket.gethostname()}, pid {first.pid})" in err
    assert "--name" in err
    assert "Traceback" not in err
    stop_in_order(first)


def test_successor_of_a_killed_worker_starts_under_its_name_and_continues_with_its_images(
    valkey_server: Server, start: Start
) -> None:
    first = start_ready(start)
    with images_arrive(valkey_server):
        await_results(valkey_server, 10)
        first.kill()
        second = start_ready(start)
        await_results(valkey_server, 10)
    stop_in_order(second)


def test_worker_that_lost_its_name_while_it_was_paused_ends_and_every_image_has_one_result(
    valkey_server: Server, start: Start
) -> None:
    first = start_ready(start)
    with images_arrive(valkey_server):
        await_results(valkey_server, 10)
        first.send_signal(signal.SIGSTOP)
        second = start_ready(start)
        first.send_signal(signal.SIGCONT)
        _, err = first.communicate(timeout=PATIENCE_S)
        await_results(valkey_server, 10)
    assert first.returncode == ExitCode.CANNOT_START
    assert f"pid {second.pid})" in err
    stop_in_order(second)


@pytest.mark.parametrize("shards", [0, 4])
async def test_worker_whose_name_is_in_use_reads_nothing(redis_settings: RedisSettings, shards: int) -> None:
    settings = Settings(redis=redis_settings.model_copy(update={"shards": shards}))
    keys = all_keys(settings.redis)
    async with single_client(settings.redis) as client:
        await client.set(keys[0].lease("a"), "host plant-3, pid 7, 0123abcd")
        for one in keys:
            await add(client, one.images, {"category": "bottle", "image": png()})
        worker = ShardedWorker(client, "a", FakeDetector(), settings)
        with pytest.raises(ConfigError, match=r"'a' is in use .*\(host plant-3, pid 7\)"):
            await worker.run(asyncio.Event())
        await worker.close()
        assert worker.stats.read == 0
        for one in keys:
            assert await client.xinfo_groups(one.images) == []


async def test_name_is_free_as_soon_as_its_worker_stops(redis_settings: RedisSettings) -> None:
    settings = Settings(redis=redis_settings)
    key = all_keys(redis_settings)[0].lease("a")
    async with single_client(redis_settings) as client:

        async def is_free() -> bool:
            return not await client.exists(key)

        async with working(ShardedWorker(client, "a", FakeDetector(), settings)):
            await wait_until_async(lambda: client.exists(key), "the lease")
        await wait_until_async(is_free, "the end of the lease", deadline_s=LEASE_S / 2)


async def test_worker_whose_lease_the_server_has_lost_takes_it_again(redis_settings: RedisSettings) -> None:
    settings = Settings(redis=redis_settings)
    keys = all_keys(redis_settings)[0]
    async with single_client(redis_settings) as client, working(ShardedWorker(client, "a", FakeDetector(), settings)):
        await wait_until_async(lambda: client.exists(keys.lease("a")), "the lease")
        await client.flushall()
        await wait_until_async(lambda: client.exists(keys.lease("a")), "the lease again")
        await add(client, keys.images, {"category": "bottle", "image": png()})
        await wait_until_async(lambda: client.xlen(keys.results), "a result")


async def test_lease_of_a_dead_worker_ends_though_the_server_s_clock_was_set_back(
    redis_settings: RedisSettings,
) -> None:
    settings = Settings(redis=redis_settings)
    keys = all_keys(redis_settings)[0]
    async with single_client(redis_settings) as client:
        await client.set(keys.lease("a"), "host plant-3, pid 7, 0123abcd", px=3_600_000)
        await add(client, keys.images, {"category": "bottle", "image": png()})
        async with working(ShardedWorker(client, "a", FakeDetector(), settings)):
            await wait_until_async(lambda: client.xlen(keys.results), "a result", deadline_s=20)
