"""A real service on Ray, asked at the port of Ray's own agent as a Prometheus server asks it.

The agent keeps the counters of services that other tests had on the same cluster: what is told is what was added.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import ray
from helpers.fakes import png
from helpers.raw_redis import RawRedis
from helpers.scraped import Scraped, scrape, scrape_until
from helpers.tiny_models import write_version
from ray import serve

from flawstream.fastflow.backbone import Backbone
from flawstream.registry.registry import Registry
from flawstream.telemetry import metrics as m
from flawstream.telemetry.metrics import ALL, Metric
from flawstream_cli.cluster import Cluster
from schemas.settings import Settings
from serving import app as service
from serving.ray_metrics import PREFIX, RayMetrics
from training.pipeline import Progress, Stage
from training.progress_metrics import record_progress
from workers.redis.embedded import EmbeddedServer, free_port

CATEGORY = "scraped"
"""No other test has it."""
STAGES = {"queue", "decode", "call", "encode", "publish", "wait", "detect"}


def scraped_as(metric: Metric) -> str:
    return PREFIX + metric.name


def agent_url() -> str:
    """Tell where Ray's agent of this node answers Prometheus."""
    (node,) = ray.nodes()
    return f"http://127.0.0.1:{node['MetricsExportPort']}/metrics"


def agent_tells(told_all: Callable[[Scraped], bool], explain: Callable[[Scraped], object]) -> Scraped:
    """Scrape until it is so: the agent is some seconds behind."""
    return scrape_until(agent_url(), told_all, explain, every_s=0.5)


@pytest.fixture(scope="module")
def redis(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RawRedis]:
    """Serve one category; give the server that has its streams."""
    assert cluster.cpus > 0
    root = str(tmp_path_factory.mktemp("models"))
    spec = Backbone(Settings().model.model_copy(update={"input_size": 64})).spec
    write_version(Registry(root), CATEGORY, spec=spec)
    with EmbeddedServer() as server, RawRedis(server.port) as redis:
        service.run(
            Settings.model_validate(
                {
                    "redis": {"url": server.url, "block_ms": 100},
                    "registry": {"root": root},
                    "api": {"port": free_port()},
                    "detector": {"engine": "torch"},
                    "metrics": {"report_s": 0.5},
                }
            )
        )
        yield redis
        service.stop()
        serve.shutdown()  # whoever comes next has a port of its own


def counts(told: Scraped) -> Counter[str]:
    """Sum up what all replicas there ever were have counted."""
    found = {
        "read": told.total(scraped_as(m.IMAGES)),
        "undecodable": told.total(scraped_as(m.DEAD_LETTERS), reason="undecodable"),
        "results": told.total(scraped_as(m.RESULTS), category=CATEGORY),
        "p-values": told.total(f"{scraped_as(m.P_VALUE)}_count", category=CATEGORY),
        "times": told.total(f"{scraped_as(m.IMAGE_SECONDS)}_count"),
    }
    for stage in STAGES:
        found[stage] = told.total(f"{scraped_as(m.STAGE_SECONDS)}_count", stage=stage)
    return Counter({name: int(value) for name, value in found.items()})


def gauges(told: Scraped) -> dict[str, object]:
    """Tell what the replicas there are now say; those of former ones go after some seconds."""
    return {
        "window": told.most(scraped_as(m.WINDOW_IMAGES), category=CATEGORY),
        "on the streams": [
            told.most(scraped_as(metric)) for metric in (m.BACKLOG_IMAGES, m.STREAM_RESULTS, m.STREAM_DEAD_LETTERS)
        ],
        "model": told.most(scraped_as(m.MODEL_INFO), category=CATEGORY, version="v1"),
        "replicas that see the streams": len(
            {sample.labels["WorkerId"] for sample in told.matching(scraped_as(m.STREAM_UP))}
        ),
    }


NOTHING_YET = {"window": None, "on the streams": [0, 0, 0], "model": 1, "replicas that see the streams": 2}


def test_rays_agent_tells_what_became_of_each_image(redis: RawRedis) -> None:
    before = counts(agent_tells(lambda told: gauges(told) == NOTHING_YET, gauges))
    for number in range(12):
        redis("XADD", "flawstream:images", "*", "category", CATEGORY, "image", png(number))
    redis("XADD", "flawstream:images", "*", "category", CATEGORY, "image", b"no image")

    def added(told: Scraped) -> Counter[str]:
        return counts(told) - before

    ended = {"read": 13, "undecodable": 1, "results": 12, "p-values": 12, "times": 12}
    now = NOTHING_YET | {"window": 12, "on the streams": [0, 12, 1]}
    agent_tells(
        lambda told: ended.items() <= added(told).items() and gauges(told) == now and set(added(told)) >= STAGES,
        lambda told: (added(told), gauges(told)),
    )


def test_gauge_that_is_set_once_is_told_for_as_long_as_its_process_lives(cluster: Cluster) -> None:
    assert cluster.cpus > 0
    metrics = RayMetrics(max_categories=1)

    def value(scraped: Scraped) -> float | None:
        return scraped.most(scraped_as(m.DRIFT_DISTANCE), category="once")

    metrics.set(m.DRIFT_DISTANCE, 0.5, category="once")
    agent_tells(lambda scraped: value(scraped) == 0.5, value)
    time.sleep(30)  # without being set again it is forgotten after 20 s
    assert value(scrape(agent_url())) == 0.5
    metrics.forget(m.DRIFT_DISTANCE, category="once")
    agent_tells(lambda scraped: value(scraped) is None, value)


def test_training_is_told_by_its_driver(cluster: Cluster) -> None:
    assert cluster.cpus > 0
    reports = [
        Progress(CATEGORY, Stage.FEATURES, 32, 32),
        Progress(CATEGORY, Stage.TRAINING, 24, 32, epoch=2, loss=1.5),
    ]
    assert list(record_progress(reports, RayMetrics(10))) == reports
    expected = [32, 24, 2, 1.5]

    def told_of_training(told: Scraped) -> list[float | None]:
        return [
            told.total(scraped_as(m.TRAINING_IMAGES), category=CATEGORY, stage="features"),
            told.total(scraped_as(m.TRAINING_IMAGES), category=CATEGORY, stage="training"),
            told.most(scraped_as(m.TRAINING_EPOCH), category=CATEGORY),
            told.most(scraped_as(m.TRAINING_LOSS), category=CATEGORY),
        ]

    agent_tells(lambda told: told_of_training(told) == expected, told_of_training)


def test_every_metric_goes_through_ray_under_its_name_with_the_prefix(cluster: Cluster) -> None:
    assert cluster.cpus > 0
    metrics = RayMetrics(max_categories=1)
    metrics.add(m.RESULTS, category="first", verdict="x")
    for metric in ALL:
        labels = dict.fromkeys(metric.labels, "x")
        match metric:
            case m.Counter():
                metrics.add(metric, 3, **labels)
            case m.Gauge():
                metrics.set(metric, 3, **labels)
            case m.Histogram():
                metrics.observe(metric, 0.5, **labels)
    names = {scraped_as(metric) + "_count" * isinstance(metric, m.Histogram) for metric in ALL}

    def lacking(told: Scraped) -> set[str]:
        """Tell what is not there yet; another service may have told the same names before."""
        of_others = told.total(scraped_as(m.RESULTS), category="other", verdict="x") == 3
        return (names - told.names()) | (set() if of_others else {"results of other categories"})

    agent_tells(lambda told: not lacking(told), lacking)
