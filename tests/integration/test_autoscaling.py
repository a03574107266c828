"""The service with tokens and autoscaling on a real Ray Serve and a real Valkey."""

from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import httpx
import numpy as np
import pytest
from helpers.raw_redis import RawRedis
from helpers.tiny_models import write_version
from helpers.waiting import wait_until
from ray import serve

from flawstream.fastflow.backbone import Backbone
from flawstream.registry.registry import Registry
from flawstream_cli.cluster import Cluster
from schemas.settings import Settings
from serving import app as service
from serving import autoscaling
from workers.redis.embedded import EmbeddedServer, free_port

IMAGES, RESULTS = "flawstream:images", "flawstream:results"
TOKEN = "token-of-line-7"  # noqa: S105 - of a service that lives for this test
MOST = 3
WAITING = 1500
"""Images that the tests keep on the stream, so that workers are busy."""


@dataclass
class Service:
    """The service as its users see it."""

    api: httpx.Client
    redis: RawRedis

    def replicas(self, deployment: str) -> dict[str, int]:
        return {str(state): count for state, count in self._status(deployment).items()}

    def await_replicas(self, deployment: str, number: int) -> None:
        """Wait until so many replicas run, and no others are there."""
        wait_until(
            lambda: self.replicas(deployment) == {"RUNNING": number},
            lambda: f"{number} replicas of {deployment}, and not {self.replicas(deployment)}",
        )

    def _status(self, deployment: str) -> dict[object, int]:
        states: dict[object, int] = (
            serve.status().applications[service.APPLICATION].deployments[deployment].replica_states
        )
        return states


@pytest.fixture(scope="module")
def running(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    assert cluster.cpus > 0
    folder = tmp_path_factory.mktemp("service")
    spec = Backbone(Settings().model.model_copy(update={"input_size": 64})).spec
    write_version(Registry(str(folder)), "bottle", spec=spec)
    tokens = folder / "tokens"
    tokens.write_text(f"{TOKEN}\n", encoding="utf-8")
    port = free_port()
    with EmbeddedServer() as server, pytest.MonkeyPatch.context() as patched:
        patched.setattr(autoscaling, "DOWNSCALE_DELAY_S", 1.0)
        service.run(
            Settings.model_validate(
                {
                    "redis": {"url": server.url, "block_ms": 100},
                    "registry": {"root": str(folder)},
                    "api": {"port": port, "tokens_file": tokens, "replicas": 2},
                    "worker": {"max_replicas": MOST, "catch_up_s": 1.0},
                    "detector": {"engine": "torch"},
                }
            )
        )
        with RawRedis(server.port) as redis, httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as api:
            yield Service(api, redis)
        service.stop()
        serve.shutdown()  # whoever comes next has a port of its own


def photograph() -> bytes:
    pixels = np.random.default_rng(7).integers(0, 256, (48, 64, 3), np.uint8)
    return bytes(cv2.imencode(".png", pixels)[1].tobytes())


def test_image_pushed_over_http_with_a_token_comes_back_on_the_results_stream(running: Service) -> None:
    push = {"url": "/v1/images", "params": {"category": "bottle", "id": "cam1-7"}, "content": photograph()}
    refused = running.api.post(**push)  # type: ignore[arg-type]  # each has its own type
    assert (refused.status_code, refused.headers["WWW-Authenticate"]) == (401, "Bearer")
    trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    headers = {"Authorization": f"Bearer {TOKEN}", "Captured-At": "2026-01-01T12:00:00Z", "traceparent": trace}
    accepted = [running.api.post(**push, headers=headers) for _ in range(2)]  # type: ignore[arg-type]  # the same
    assert [answer.status_code for answer in accepted] == [202, 202]
    assert accepted[0].json() == accepted[1].json()
    assert accepted[0].json()["id"] == "cam1-7"
    assert accepted[0].headers["X-Content-Type-Options"] == "nosniff"
    wait_until(lambda: running.redis.count("XLEN", RESULTS), "the image's result")
    ((_, result),) = running.redis.entries(RESULTS)
    assert (result["id"], result["traceparent"]) == (b"cam1-7", trace.encode())
    assert result["captured_at"].startswith(b"2026-01-01T12:00:00")


def test_workers_follow_what_arrives_up_and_down(running: Service) -> None:
    running.await_replicas("StreamWorker", 1)
    photo = photograph()

    def kept_busy() -> bool:
        for _ in range(WAITING - running.redis.count("XLEN", IMAGES)):
            running.redis("XADD", IMAGES, "*", "category", "bottle", "image", photo)
        return running.replicas("StreamWorker") == {"RUNNING": MOST}

    wait_until(kept_busy, lambda: f"{MOST} workers, and not {running.replicas('StreamWorker')}", deadline_s=200)
    reported = running.api.get("/readyz").json()
    assert reported["backlog"]["images"] > 0
    assert reported["backlog"]["oldest_s"] > 0
    assert reported["backlog"]["delivered"] > 0
    assert reported["backlog"]["counters"]["duplicates"] == 1, "either replica of the API has seen a push"
    running.redis("XTRIM", IMAGES, "MAXLEN", 0)
    running.await_replicas("StreamWorker", 1)
    assert running.replicas("Detector") == {"RUNNING": 1}
    assert running.replicas("Api") == {"RUNNING": 2}
