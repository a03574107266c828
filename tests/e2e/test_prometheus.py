"""A real Prometheus watches a running plant, configured as the documentation says; every query is asked.

A Ray cluster, `flawstream serve` and `flawstream train` on it and a `flawstream worker` beside it, all as a user starts
them. Good images come, bad ones, a push that is refused, a version that is damaged and then replaced, and a training
job. Then every query of every board has data, and of the alerts those and only those that the scene gives cause
for.
"""

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import pytest
import yaml
from helpers.boards import ALERTS, alerts, boards, filled_in, queries, vector_selectors
from helpers.command_line import clean_environment
from helpers.fakes import png
from helpers.places import ROOT
from helpers.prometheus_server import PrometheusServer, needs_prometheus
from helpers.raw_redis import RawRedis
from helpers.tiny_models import write_version
from helpers.waiting import Deadline, wait_until

from flawstream.fastflow.backbone import Backbone
from flawstream.registry.registry import Registry
from flawstream.telemetry import metrics as m
from flawstream.telemetry.prometheus import serve_metrics
from schemas.errors import BacklogFullError
from schemas.manifest import BackboneSpec
from schemas.settings import BacklogSettings, MetricsSettings, RedisSettings, Settings
from workers.produce.producer import Producer
from workers.redis.embedded import EmbeddedServer, free_port

pytestmark = needs_prometheus

PATIENCE_S = 180.0
REFRESH_S = 0.5
KNOWN_AFTER_S = 4 * REFRESH_S
patiently = partial(wait_until, deadline_s=PATIENCE_S, every_s=0.5)
"""Ray and Prometheus look only every few seconds."""
GUIDE = ROOT / "docs" / "how-to" / "monitor.md"
MODEL = {"strides": [16, 32], "input_size": 64, "flow_steps": 2, "hidden_ratio": 0.2}
NO_DATA_YET: dict[str, str] = {}
"""Queries of boards that have no data in this scene, and why."""
QUIET = {
    "FlawstreamAbsent": "all are scraped",
    "FlawstreamStreamDown": "the server is up",
    "FlawstreamNoResults": "images end",
    "FlawstreamImagesLate": "images end within seconds",
    "FlawstreamBacklogGrows": "a hundred images are never there",
    "FlawstreamPoison": "no image kills a worker",
    "FlawstreamEverythingFails": "the engine works, and the server takes outcomes",
    "FlawstreamOrphans": "nobody deletes a consumer",
    "FlawstreamUnexpectedErrors": "there is no bug",
    "FlawstreamDrift": "windows have fewer than a hundred images",
    "FlawstreamReplicasRestart": "replicas start once",
    "FlawstreamWorkersRestart": "the worker starts once",
    "FlawstreamRegistryDown": "the registry is there",
    "FlawstreamBatchesHalved": "there is memory enough",
    "FlawstreamTrainingFails": "training succeeds",
}
"""Alerts that this scene gives no cause for."""


def guide_jobs(sd_file: Path, worker: str) -> list[dict[str, Any]]:
    """Read the scrape configuration of the guide; put this scene's addresses in the place of its own."""
    (text,) = [
        block.partition("```")[0]
        for block in GUIDE.read_text().split("```yaml\n")[1:]
        if "scrape_configs" in block.partition("```")[0]
    ]
    for written, here in (("/tmp/ray/prom_metrics_service_discovery.json", str(sd_file)), ("127.0.0.1:9091", worker)):  # noqa: S108 - as it stands in the guide
        assert text.count(written) == 1
        text = text.replace(written, here)
    jobs: list[dict[str, Any]] = yaml.safe_load(text)["scrape_configs"]
    return jobs


@dataclass
class Plant:
    """What runs.

    Attributes:
        redis: Settings of the stream server.
        port: Of the stream server.
        metrics: Of this process's own producer.
        head: The process that started the Ray cluster.
        registry: What the detectors load from.
        spec: Of its versions' backbone.
        damaged_at_s: When a damaged version was written, by the monotonic clock.
    """

    redis: RedisSettings
    port: int
    metrics: m.Metrics
    head: int
    registry: Registry
    spec: BackboneSpec
    damaged_at_s: float = 0.0

    def stream_workers(self) -> list[int]:
        """Find the processes of this cluster's stream workers: children of its raylet, which is the head's child."""
        return [
            int(process.name)
            for process in Path("/proc").glob("[0-9]*")
            if _command(process).startswith(b"ray::ServeReplica:flawstream:StreamWorker")
            and _parent(_parent(int(process.name))) == self.head
        ]

    def push_good_and_bad(self) -> None:
        """Push images, what is none, and one of a category that is unknown; write a version that is damaged."""
        with RawRedis(self.port) as redis:
            for number in range(40):
                redis("XADD", "flawstream:images", "*", "category", "bottle", "image", png(number))
            for _ in range(12):
                redis("XADD", "flawstream:images", "*", "category", "bottle", "image", b"no image")
            write_version(self.registry, "broken", spec=self.spec, weights=b"no weights")
            self.damaged_at_s = time.monotonic()
            redis("XADD", "flawstream:images", "*", "category", "ghost", "image", png())

    def push_for_damaged(self) -> None:
        """Push for a category whose version is damaged.

        What a detector knows of the registry is at most `refresh_s` old: an image that came earlier would be of an
        unknown category, and a dead letter.
        """
        time.sleep(max(0.0, self.damaged_at_s + KNOWN_AFTER_S - time.monotonic()))
        with RawRedis(self.port) as redis:
            redis("XADD", "flawstream:images", "*", "category", "broken", "image", png())

    def replace_damaged(self) -> None:
        """Promote a sound version of that category; the images that waited for one end, as no producer is refused."""
        write_version(self.registry, "broken", "v2", spec=self.spec)

    def push_refused(self) -> None:
        """Push where the bound of the backlog is 1: one image is taken, and of those that come at once some are not."""

        async def push() -> None:
            async with Producer(self.redis, backlog=BacklogSettings(max_images=1), metrics=self.metrics) as producer:
                await producer.push(png(), "bottle", wait_s=PATIENCE_S)
                outcomes = await asyncio.gather(
                    *(producer.push(png(), "bottle") for _ in range(20)), return_exceptions=True
                )
                assert any(isinstance(outcome, BacklogFullError) for outcome in outcomes)

        asyncio.run(push())


def _command(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:  # it has ended
        return b""


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


@contextlib.contextmanager
def program(name: str, *arguments: str, log: Path, environment: Mapping[str, str]) -> Iterator[subprocess.Popen[str]]:
    """Run a program of the environment in a process group of its own; end the group."""
    with log.open("w") as out:
        process = subprocess.Popen(  # noqa: S603 - our own program
            [str(Path(sys.executable).parent / name), *arguments],
            stdout=subprocess.PIPE,
            stderr=out,
            text=True,
            env=dict(environment),
            start_new_session=True,
        )
        try:
            yield process
        finally:
            for sent in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, sent)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(20)
            assert process.stdout is not None
            process.stdout.close()


def first_line(stream: IO[str] | None, log: Path) -> dict[str, Any]:
    """Wait for what a program says when it is ready."""
    assert stream is not None
    line = stream.readline()
    assert line, log.read_text()
    ready: dict[str, Any] = json.loads(line)
    return ready


def write_settings(folder: Path, redis: str, worker: str) -> Path:
    """Write the plant's settings: all is done in moments."""
    config = folder / "settings.yaml"
    config.write_text(
        json.dumps(
            {
                "redis": {"url": redis, "block_ms": 100},
                "worker": {"claim_idle_ms": 5000, "sweep_s": 1.0},
                "registry": {"root": str(folder / "models")},
                "api": {"port": free_port()},
                "detector": {"engine": "torch", "refresh_s": REFRESH_S},
                "model": {"input_size": 64, "flow_steps": 2},
                "training": {"epochs": 60, "batch_size": 4, "false_alarm_rate": 0.4},
                "metrics": {"port": int(worker.rpartition(":")[2]), "report_s": 0.5},
            }
        )
    )
    return config


def write_data_set(folder: Path) -> None:
    for number in range(16):
        image = folder / "cable" / "train" / "good" / f"{number:02}.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        image.write_bytes(png(number))


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Plant, PrometheusServer]]:
    folder = tmp_path_factory.mktemp("plant")
    registry = Registry(str(folder / "models"))
    spec = Backbone(Settings().model.model_copy(update={"input_size": 64})).spec
    write_version(registry, "bottle", spec=spec)
    write_data_set(folder / "data")
    environment = clean_environment() | {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    temporary = Path(tempfile.mkdtemp(prefix="fs", dir="/tmp"))  # Ray's sockets ask for a short path
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, temporary, ignore_errors=True)
        server = stack.enter_context(EmbeddedServer())
        worker = f"127.0.0.1:{free_port()}"
        config = write_settings(folder, server.url, worker)
        ray = f"127.0.0.1:{free_port()}"
        cluster = stack.enter_context(
            program(
                *("ray", "start", "--head", "--block", "--num-cpus=4", "--include-dashboard=true"),
                *("--node-ip-address=127.0.0.1", f"--port={ray.rpartition(':')[2]}"),
                *(f"--dashboard-port={free_port()}", f"--temp-dir={temporary}"),
                log=folder / "ray.log",
                environment=environment,
            )
        )
        found = temporary / "prom_metrics_service_discovery.json"
        patiently(lambda: found.exists() or cluster.poll() is not None, "Ray starts")
        for command in (["worker"], ["serve", "--ray", ray]):
            log = folder / f"{command[0]}.log"
            process = stack.enter_context(
                program("flawstream", *command, "--config", str(config), log=log, environment=environment)
            )
            first_line(process.stdout, log)
        metrics, url = stack.enter_context(serve_metrics(MetricsSettings(port=0)))
        assert url is not None
        producer = url.removeprefix("http://").removesuffix("/metrics")
        jobs = [*guide_jobs(found, worker), {"job_name": "camera", "static_configs": [{"targets": [producer]}]}]
        prometheus = PrometheusServer(folder, jobs, [ALERTS])
        stack.callback(prometheus.close)
        patiently(
            lambda: len(prometheus.query("flawstream_stream_up == 1")) >= 3,
            "all are scraped",
        )
        loaded = f'{m.MODEL_LOADS.name}{{outcome="first"}} > 0.5'  # so that a failure from now on is an increase
        patiently(lambda: len(prometheus.query(loaded)) == 2, "both detectors are scraped")
        plant = Plant(RedisSettings(url=server.url), server.port, metrics, cluster.pid, registry, spec)
        plant.push_good_and_bad()
        log = folder / "train.log"
        stack.enter_context(
            program(
                *("flawstream", "train", str(folder / "data"), "--ray", ray, "--config", str(config), "--json"),
                log=log,
                environment=environment,
            )
        )
        yield plant, prometheus


def _as_shown(where: str, expr: str) -> str:
    """Give what to ask for: an alert looks at this moment, a panel at a range, in which training may have ended."""
    return expr if where.startswith("alert: ") else f"last_over_time(({expr})[{PATIENCE_S:.0f}s:1s])"


def test_every_query_has_data_and_alerts_are_those_that_there_is_cause_for(
    watched: tuple[Plant, PrometheusServer],
) -> None:
    plant, prometheus = watched
    asked = {one.where: filled_in(one.expr) for one in queries()}
    quiet = {f"alert: {name}" for name in QUIET}
    missing = set(asked) - set(NO_DATA_YET) - quiet
    unexpected: dict[str, object] = {}
    damaged = True
    deadline = Deadline(lambda: f"data of {sorted(missing)}", PATIENCE_S)
    while missing:
        deadline.check()
        if "alert: FlawstreamModelLoadFails" in missing:
            plant.push_for_damaged()
        elif damaged:
            plant.replace_damaged()
            damaged = False
        elif "alert: FlawstreamProducersRefused" in missing:
            plant.push_refused()
        missing = {where for where in missing if not prometheus.query(_as_shown(where, asked[where]))}
        for where in [*NO_DATA_YET, *quiet]:
            if found := prometheus.query(asked[where]):
                unexpected[where] = found
        time.sleep(1)
    assert not unexpected


def test_every_rule_is_evaluated_and_says_its_sentence(watched: tuple[Plant, PrometheusServer]) -> None:
    _, prometheus = watched
    rules = {rule["name"]: rule for rule in prometheus.rules()}
    assert rules.keys() == {rule["alert"] for rule in alerts()}
    assert {name: rule["lastError"] for name, rule in rules.items() if rule["health"] != "ok"} == {}
    active = {name: rule["alerts"] for name, rule in rules.items() if rule["alerts"]}
    assert active.keys() == rules.keys() - QUIET.keys()
    for alert in (one for several in active.values() for one in several):
        for sentence in alert["annotations"].values():
            assert "<no value>" not in sentence
            assert "{{" not in sentence


def test_what_alerts_look_at_is_there_though_it_gives_no_cause(watched: tuple[Plant, PrometheusServer]) -> None:
    _, prometheus = watched
    for rule in alerts():
        for selector in vector_selectors(rule["expr"]):
            assert prometheus.query(f"{selector.name or ''}{selector.matchers}"), rule["alert"]


def test_boards_offer_what_there_is_to_choose(watched: tuple[Plant, PrometheusServer]) -> None:
    _, prometheus = watched
    offered: dict[tuple[str, str], set[str]] = {}
    for name, whole in boards().items():
        for variable in whole["templating"]["list"][1:]:
            chosen = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"])
            assert chosen is not None
            found = prometheus.label_values(chosen[2], filled_in(chosen[1]))
            offered[name, variable["name"]] = set(found)
    assert offered == {
        ("operations", "namespace"): set(),  # Kubernetes alone has them
        ("quality", "namespace"): set(),
        ("quality", "category"): {"bottle", "broken"},
        ("training", "namespace"): set(),
        ("training", "category"): {"cable"},
    }


def test_what_was_done_is_what_is_reported(watched: tuple[Plant, PrometheusServer]) -> None:
    _, prometheus = watched

    def total(expr: str) -> float:
        return sum(value for _, value in prometheus.query(expr))

    patiently(
        lambda: total('flawstream_dead_letters_total{reason="undecodable"}') == 12,
        "dead letters",
    )
    patiently(lambda: total('flawstream_dead_letters_total{reason="unknown_category"}') == 1, "the unknown category")
    patiently(
        lambda: total('flawstream_training_jobs_total{outcome="done"}') > 0.5,
        "training is done",
    )
    assert total("max(flawstream_stream_up)") == 1
    poison = 'flawstream_dead_letters_total{reason="poison"}'
    assert {labels["job"] for labels, _ in prometheus.query(poison)} == {"ray", "flawstream-worker", "camera"}
    assert round(total(poison), 9) == 0


def test_replicas_that_end_again_and_again_are_an_alert(watched: tuple[Plant, PrometheusServer]) -> None:
    plant, prometheus = watched
    (rule,) = [rule for rule in alerts() if rule["alert"] == "FlawstreamReplicasRestart"]
    ready = 'sum(ray_serve_replica_startup_latency_ms_count{deployment="StreamWorker"})'

    def started() -> float:
        return sum(value for _, value in prometheus.query(ready))

    def started_so_far(number: int) -> bool:
        return started() == number

    usual = rule["expr"].partition("1.5 +")[2]  # looked at each half minute: the scene may be younger

    def healthy() -> list[float]:
        return [value for labels, value in prometheus.query(usual) if labels["deployment"] == "StreamWorker"]

    patiently(lambda: healthy() == [1.0], "the rule sees the stream worker healthy")
    for number in range(1, 4):
        patiently(partial(started_so_far, number), f"Serve starts replica {number}")
        (pid,) = plant.stream_workers()
        os.kill(pid, signal.SIGKILL)
    patiently(lambda: prometheus.query(rule["expr"]), lambda: f"three restarts are an alert; {started()} were started")
    ((labels, restarts),) = prometheus.query(rule["expr"])
    assert labels["deployment"] == "StreamWorker"
    assert 2.5 < restarts < 4  # three, as `increase` extrapolates between scrapes
