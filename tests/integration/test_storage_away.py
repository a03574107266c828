"""The registry's storage goes away under a running plant, or before it starts: nothing is falsely dead."""

import asyncio
import json
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import boto3
import pytest
from helpers.command_line import Run, make_run
from helpers.fakes import png
from helpers.image_files import write_images
from helpers.raw_redis import RawRedis
from helpers.redis_servers import Server
from helpers.s3_server import point_to, running_s3
from helpers.stream_work import working
from helpers.tiny_models import TinyEngine, write_version
from helpers.waiting import wait_until, wait_until_async

from flawstream.fastflow.backbone import Backbone
from flawstream.registry.registry import Registry
from schemas.settings import DetectorSettings, RedisSettings, Settings
from serving.detector import DetectorService
from workers.consume.sharded import ShardedWorker
from workers.redis.connection import make_client


class S3:
    """A server of S3 that can be stopped and started again with its objects."""

    def __init__(self) -> None:
        self.bucket = f"plant-{uuid.uuid4().hex}"  # the objects of one test are there in the next
        self._running = ExitStack()
        self.address = self._running.enter_context(running_s3())

    @property
    def root(self) -> str:
        """The registry's root."""
        return f"s3://{self.bucket}/models"

    def stop(self) -> None:
        self._running.close()

    def start(self) -> None:
        port = int(self.address.rsplit(":", 1)[1])
        assert self._running.enter_context(running_s3(port)) == self.address


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    """Give a server with the bucket of the registry, which S3's clients of this process ask."""
    server = S3()
    point_to(monkeypatch, server.address)
    boto3.client("s3").create_bucket(Bucket=server.bucket)
    yield server
    server.stop()


@pytest.mark.anyio
async def test_plant_whose_s3_goes_away_serves_what_is_loaded_and_holds_back_the_rest(
    s3: S3, valkey_server: Server, redis_settings: RedisSettings
) -> None:
    registry = Registry(s3.root)
    for category in ("bottle", "cable"):
        write_version(registry, category)
    engine = TinyEngine()
    engine.memory_of = lambda head: 1_000_000  # type: ignore[method-assign]  # noqa: ARG005 - the protocol's name
    detector = DetectorService(registry, engine, DetectorSettings(max_resident_mb=1, refresh_s=0.05))
    await detector.start()
    assert detector.status()["resident"] == ["bottle@v1"]
    settings = Settings.model_validate(
        {
            "redis": redis_settings.model_dump(exclude_unset=True),
            "worker": {"max_deliveries": 2, "claim_idle_ms": 300, "sweep_s": 0.05},
        }
    )
    async with make_client(settings.redis) as client:
        worker = ShardedWorker(client, "station", detector, settings)
        with RawRedis(valkey_server.port) as raw:

            def results() -> set[str]:
                return {fields["id"].decode() for _, fields in raw.entries("flawstream:results")}

            async with working(worker):
                await asyncio.to_thread(s3.stop)
                for number in range(3):
                    for category in ("cable", "new", "bottle"):
                        name = f"{category}-{number}"
                        raw("XADD", "flawstream:images", "*", "id", name, "category", category, "image", png(number))
                resident = {f"bottle-{number}" for number in range(3)}
                await wait_until_async(lambda: results() >= resident, "what is loaded is judged")
                await wait_until_async(lambda: worker.stats.deferred > 20, "the others are tried again and again")
                assert (results(), raw.count("XLEN", "flawstream:dead")) == (resident, 0)
                await asyncio.to_thread(s3.start)
                await wait_until_async(
                    lambda: len(results()) == 6 and raw.count("XLEN", "flawstream:dead") == 3, "S3 is found again"
                )
            dead = {(fields["id"].decode(), fields["dead.reason"]) for _, fields in raw.entries("flawstream:dead")}
            assert dead == {(f"new-{number}", b"unknown_category") for number in range(3)}
            assert raw.count("XLEN", "flawstream:images") == 0
    await detector.stop()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return make_run(monkeypatch, capsys)


@pytest.mark.parametrize("command", [("models", "list"), ("models", "promote", "bottle", "v1"), ("train", "data")])
def test_command_whose_s3_does_not_answer_ends_with_one_clear_line(
    s3: S3, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    write_version(Registry(s3.root), "part")
    write_images(tmp_path / "data" / "part" / "train" / "good", 12)
    monkeypatch.chdir(tmp_path)
    s3.stop()
    ran = run(*command, "--registry", s3.root)
    assert (ran.code, ran.out) == (4, "")
    (line,) = [line for line in ran.err.splitlines() if "error" in line]
    assert line.startswith(f"error (storage_unavailable): the storage failed at {s3.bucket}/models")
    assert "check that it is mounted or answers" in line


def test_worker_that_starts_before_its_volume_is_mounted_waits_for_it(
    tmp_path: Path, valkey_server: Server, redis_settings: RedisSettings
) -> None:
    volume = tmp_path / "models"
    spec = Backbone(Settings().model.model_copy(update={"input_size": 64})).spec
    write_version(Registry(str(tmp_path / "elsewhere")), "bottle", spec=spec)
    log = tmp_path / "log"
    with RawRedis(valkey_server.port) as raw, log.open("w") as stderr:
        raw("XADD", "flawstream:images", "*", "id", "early", "category", "bottle", "image", png())
        program = [sys.executable, "-m", "flawstream_cli", "worker", "--engine", "torch", "--registry", str(volume)]
        with subprocess.Popen(  # noqa: S603 - our own program
            [*program, "--redis", redis_settings.url], stdout=subprocess.PIPE, stderr=stderr, text=True
        ) as process:
            try:
                wait_until(lambda: "waiting for the registry" in log.read_text(), "it says for what it waits")
                time.sleep(1.0)
                assert process.poll() is None
                assert raw.count("XLEN", "flawstream:images") == 1
                (tmp_path / "elsewhere").rename(volume)
                assert process.stdout is not None
                ready = json.loads(process.stdout.readline())
                assert ready["detector"]["categories"] == {"bottle": "v1"}
                wait_until(lambda: raw.count("XLEN", "flawstream:results") == 1, "the image is judged")
            finally:
                process.terminate()
                process.communicate()
        assert raw.count("XLEN", "flawstream:dead") == 0
    assert log.read_text().count("waiting for the registry") == 1
