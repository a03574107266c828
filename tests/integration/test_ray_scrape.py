"""A real service on Ray, asked at the port of Ray's own agent as a Prometheus server asks it."""

import socket
import time
from collections.abc import Callable, Iterator

import pytest
import ray
from fakes import png
from raw_redis import RawRedis
from scraped import Scraped, scrape
from tiny_models import write_version

from flawstream.cluster import Cluster
from flawstream.fastflow.backbone import Backbone
from flawstream.registry import Registry
from flawstream.telemetry import metrics as m
from flawstream.telemetry.metrics import ALL, Counter, Gauge, Metric
from flawstream.telemetry.ray_metrics import PREFIX, RayMetrics
from schemas.settings import Settings
from serving import app as service
from training.job import Progress, Stage
from training.recorded import recorded
from workers.embedded import EmbeddedServer

pytestmark = pytest.mark.integration

PATIENCE_S = 120.0


def scraped_as(metric: Metric) -> str:
    return PREFIX + metric.name


def agent_url() -> str:
    """Tell where Ray's agent of this node answers Prometheus."""
    (node,) = ray.nodes()
    return f"http://127.0.0.1:{node['MetricsExportPort']}/metrics"


def scrape_until(told_all: Callable[[Scraped], bool]) -> Scraped:
    """Scrape until it is so: the agent is some seconds behind."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not told_all(told := scrape(agent_url())):
        assert time.monotonic() < deadline_s, summary(told)
        time.sleep(0.5)
    return told


@pytest.fixture(scope="module")
def redis(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RawRedis]:
    """Serve one category; give the server that has its streams."""
    assert cluster.cpus > 0
    root = str(tmp_path_factory.mktemp("models"))
    spec = Backbone(Settings().model.model_copy(update={"input_size": 64})).spec
    write_version(Registry(root), "bottle", spec=spec)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with EmbeddedServer() as server, RawRedis(server.port) as redis:
        service.run(
            Settings.model_validate(
                {
                    "redis": {"url": server.url, "block_ms": 100},
                    "registry": {"root": root},
                    "api": {"port": port},
                    "detector": {"engine": "torch"},
                    "metrics": {"report_s": 0.5},
                }
            )
        )
        yield redis
        service.stop()


def summary(told: Scraped) -> dict[str, object]:
    """Sum up what the replicas told: each passes its numbers on in its own time."""
    stages = told.matching(f"{scraped_as(m.STAGE_SECONDS)}_count")
    return {
        "read": told.total(scraped_as(m.IMAGES)),
        "results": told.total(scraped_as(m.RESULTS), category="bottle"),
        "p-values": told.total(f"{scraped_as(m.P_VALUE)}_count", category="bottle"),
        "undecodable": told.total(scraped_as(m.DEAD_LETTERS), reason="undecodable"),
        "times": told.total(f"{scraped_as(m.IMAGE_SECONDS)}_count"),
        "stages": {sample.labels["stage"] for sample in stages if sample.value},
        "window": told.most(scraped_as(m.WINDOW_IMAGES), category="bottle"),
        "on the streams": [
            told.most(scraped_as(metric)) for metric in (m.BACKLOG_IMAGES, m.STREAM_RESULTS, m.STREAM_DEAD_LETTERS)
        ],
        "model": told.most(scraped_as(m.MODEL_INFO), category="bottle", version="v1"),
        "loads": told.total(scraped_as(m.MODEL_LOADS), outcome="first"),
        "replicas that see the streams": len(
            {sample.labels["WorkerId"] for sample in told.matching(scraped_as(m.STREAM_UP))}
        ),
    }


def test_rays_agent_tells_what_became_of_each_image(redis: RawRedis) -> None:
    expected = {
        "read": 13,
        "results": 12,
        "p-values": 12,
        "undecodable": 1,
        "times": 12,
        "stages": {"read", "queue", "decode", "call", "encode", "publish", "wait", "detect"},
        "window": 12,
        "on the streams": [0, 12, 1],
        "model": 1,
        "loads": 1,
        "replicas that see the streams": 2,  # the worker and the API
    }
    for number in range(12):
        redis("XADD", "flawstream:images", "*", "category", "bottle", "image", png(number))
    redis("XADD", "flawstream:images", "*", "category", "bottle", "image", b"no image")
    scrape_until(lambda told: summary(told) == expected)


def test_training_is_told_by_its_driver(cluster: Cluster) -> None:
    assert cluster.cpus > 0
    reports = [
        Progress("bottle", Stage.FEATURES, 32, 32),
        Progress("bottle", Stage.TRAINING, 24, 32, epoch=2, loss=1.5),
        Progress("cable", Stage.FAILED, 0, 1, "no luck"),
    ]
    assert list(recorded(reports, RayMetrics(10))) == reports
    told = scrape_until(
        lambda told: (
            told.most(scraped_as(m.TRAINING_EPOCH)) == 2 and told.total(scraped_as(m.TRAINING_IMAGES)) == 32 + 24
        )
    )
    assert told.most(scraped_as(m.TRAINING_LOSS), category="bottle") == 1.5
    assert told.total(scraped_as(m.TRAINING_JOBS), outcome="failed") == 1


def test_every_metric_goes_through_ray_under_its_name_with_the_prefix(cluster: Cluster) -> None:
    assert cluster.cpus > 0
    metrics = RayMetrics(max_categories=1)
    metrics.add(m.RESULTS, category="first", verdict="x")
    for metric in ALL:
        labels = dict.fromkeys(metric.labels, "x")
        match metric:
            case Counter():
                metrics.add(metric, 3, **labels)
            case Gauge():
                metrics.set(metric, 3, **labels)
            case m.Histogram():
                metrics.observe(metric, 0.5, **labels)
    names = {scraped_as(metric) + "_count" * isinstance(metric, m.Histogram) for metric in ALL}
    told = scrape_until(lambda told: names <= told.names())
    assert told.total(scraped_as(m.RESULTS), category="other", verdict="x") == 3
