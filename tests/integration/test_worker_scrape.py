"""A real `flawstream worker` process, asked as a Prometheus server asks it."""

import asyncio
import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from helpers.fakes import png
from helpers.raw_redis import RawRedis
from helpers.scraped import scrape_until
from helpers.tiny_models import write_version

from flawstream.fastflow.backbone import Backbone
from flawstream.registry.registry import Registry
from flawstream.telemetry import metrics as m
from flawstream.telemetry.prometheus import serve_metrics
from schemas.errors import BacklogFullError, ConfigError
from schemas.settings import BacklogSettings, MetricsSettings, RedisSettings, Settings
from workers.produce.producer import Producer
from workers.redis.embedded import EmbeddedServer


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedServer]:
    with EmbeddedServer() as server:
        yield server


@pytest.fixture(scope="module")
def worker(server: EmbeddedServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Start a worker with a port for metrics; give what it says when it is ready."""
    root = tmp_path_factory.mktemp("models")
    write_version(
        Registry(str(root)), "bottle", spec=Backbone(Settings().model.model_copy(update={"input_size": 64})).spec
    )
    config = root / "settings.yaml"
    config.write_text(
        json.dumps(
            {
                "redis": {"url": server.url, "block_ms": 50},
                "registry": {"root": str(root)},
                "detector": {"engine": "torch"},
                "metrics": {"report_s": 0.2},
            }
        )
    )
    program = [sys.executable, "-m", "flawstream_cli", "worker", "--metrics-port", "0", "--config", str(config)]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603 - our own program
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())
        process.terminate()
        process.communicate()


def test_worker_answers_that_it_lives(worker: dict[str, Any]) -> None:
    with urllib.request.urlopen(worker["metrics"].replace("/metrics", "/livez")) as answer:  # noqa: S310 - the test's own worker
        assert (answer.status, answer.read()) == (200, b"alive\n")


def test_a_worker_tells_prometheus_what_became_of_each_image(server: EmbeddedServer, worker: dict[str, Any]) -> None:
    with RawRedis(server.port) as redis:
        for number in range(12):
            redis("XADD", "flawstream:images", "*", "category", "bottle", "image", png(number))
        for image in (b"no image", b"none either"):
            redis("XADD", "flawstream:images", "*", "category", "bottle", "image", image)
        redis("XADD", "flawstream:images", "*", "category", "ghost", "image", png())
    told = scrape_until(
        worker["metrics"],
        lambda told: (
            told.total(m.RESULTS.name) + told.total(m.DEAD_LETTERS.name) >= 15
            and told.most(m.STREAM_RESULTS.name) == 12
            and told.most(m.BACKLOG_IMAGES.name) == 0
            and told.most(m.WINDOW_IMAGES.name) == 12
        ),
    )
    assert told.total(m.IMAGES.name) == 15
    assert told.total(m.RESULTS.name, category="bottle") == 12
    assert told.total(m.DEAD_LETTERS.name, reason="undecodable") == 2
    assert told.total(m.DEAD_LETTERS.name, reason="unknown_category") == 1
    assert told.total(f"{m.P_VALUE.name}_count", category="bottle") == 12
    assert told.total(f"{m.IMAGE_SECONDS.name}_count") == 12
    assert told.total(f"{m.BATCH_IMAGES.name}_sum", stage="detect") == 12
    batches = told.total(f"{m.BATCH_IMAGES.name}_count", stage="read")
    assert told.total(f"{m.STAGE_SECONDS.name}_count", stage="publish") == batches
    assert told.total(f"{m.STAGE_SECONDS.name}_sum", stage="detect") > 0
    assert told.most(m.STREAM_UP.name) == 1
    assert told.most(m.STREAM_DEAD_LETTERS.name) == 3
    assert told.most(m.RESIDENT_CATEGORIES.name) == 1
    assert told.total(m.MODEL_LOADS.name, outcome="first") == 1
    assert told.most(m.MODEL_INFO.name, category="bottle", version="v1") == 1
    assert (told.most("process_resident_memory_bytes") or 0) > 0
    assert 0 < (told.most(m.DRIFT_DISTANCE.name, category="bottle") or 0) <= 1


@pytest.mark.anyio
async def test_what_the_server_refused_is_told_by_the_worker_whoever_pushed(
    server: EmbeddedServer, worker: dict[str, Any]
) -> None:
    redis = RedisSettings(url=server.url)
    async with Producer(redis, backlog=BacklogSettings(max_images=1)) as producer:
        for _ in range(2):
            await producer.push(png(), "bottle", id="the same")
        outcomes = await asyncio.gather(*(producer.push(png(), "bottle") for _ in range(50)), return_exceptions=True)
    refused = sum(isinstance(outcome, BacklogFullError) for outcome in outcomes)
    assert refused
    scrape_until(
        worker["metrics"],
        lambda told: (
            told.total(m.STREAM_EVENTS.name, event="duplicates") == 1
            and told.total(m.STREAM_EVENTS.name, event="refused_images") == refused
        ),
    )


def test_a_port_that_is_taken_is_a_setting_that_is_wrong(worker: dict[str, Any]) -> None:
    port = int(worker["metrics"].split(":")[2].split("/")[0])
    with pytest.raises(ConfigError, match=r"metrics\.port"), serve_metrics(MetricsSettings(port=port)):
        pass
