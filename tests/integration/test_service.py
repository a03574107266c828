"""The whole service on a real Ray Serve and a real Valkey, with producers and consumers that use none of our code."""

import json
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import httpx
import numpy as np
import pytest
import ray
from helpers.raw_redis import RawRedis
from helpers.tiny_models import write_version
from helpers.waiting import wait_until

from flawstream.fastflow.backbone import Backbone
from flawstream.registry.registry import Registry
from flawstream_cli.cluster import Cluster
from schemas.errors import ConfigError
from schemas.keys import StreamKeys
from schemas.settings import Settings
from serving import app as service
from workers.redis.embedded import EmbeddedServer, free_port

IMAGES, RESULTS, DEAD = "flawstream:images", "flawstream:results", "flawstream:dead"
RESULT_FIELDS = {
    "id",
    "category",
    "score",
    "p_value",
    "threshold",
    "verdict",
    "model",
    "map_codec",
    "map_shape",
    "map_grids",
    "map",
    "boxes",
    "image_shape",
    "queued_ms",
    "decode_ms",
    "detect_ms",
    "total_ms",
}


@dataclass
class Line:
    """A production line: it pushes images over a plain socket and keeps account of how they end."""

    settings: Settings
    redis: RawRedis
    port: int
    pushed: int = 0

    def push(self, category: str = "bottle", image: bytes | None = None, **fields: str) -> str:
        """Push one image; gives its id."""
        self.pushed += 1
        message_id = f"part-{self.pushed}"
        picture = photograph(self.pushed) if image is None else image
        flat = [part for name, value in fields.items() for part in (name, value)]
        self.redis("XADD", IMAGES, "*", "id", message_id, "category", category, "image", picture, *flat)
        return message_id

    def endings(self) -> Counter[str]:
        """Count how often each image has ended so far, as a result or as a dead letter."""
        return Counter(fields["id"].decode() for stream in (RESULTS, DEAD) for _, fields in self.redis.entries(stream))

    def await_ends(self, ids: list[str]) -> None:
        """Wait until all have ended and nothing is left on the images stream; each must have ended once."""
        wait_until(
            lambda: set(ids) <= set(self.endings()) and not self.redis.count("XLEN", IMAGES),
            lambda: f"all have ended, without {set(ids) - set(self.endings())}",
        )
        assert set(self.endings().values()) == {1}

    @contextmanager
    def busy(self, waiting: int) -> Iterator[list[str]]:
        """Push from a thread, so that so many images wait for as long as the block lasts; gives their ids."""
        ids: list[str] = []
        over = threading.Event()

        def push() -> None:
            with RawRedis(self.port) as redis:
                own = Line(self.settings, redis, self.port, self.pushed)
                while not over.is_set():
                    if redis.count("XLEN", IMAGES) < waiting:
                        ids.append(own.push(("bottle", "cable")[len(ids) % 2]))
                    else:
                        over.wait(0.001)
                self.pushed = own.pushed

        before = self.redis.count("XLEN", RESULTS)
        with ThreadPoolExecutor(1) as threads:
            pushing = threads.submit(push)
            try:
                wait_until(lambda: self.redis.count("XLEN", RESULTS) > before, "the first result")
                yield ids
            finally:
                over.set()
                pushing.result()

    def result(self, message_id: str) -> dict[str, bytes]:
        return next(fields for _, fields in self.redis.entries(RESULTS) if fields["id"] == message_id.encode())

    def dead_letter(self, message_id: str) -> dict[str, bytes]:
        return next(fields for _, fields in self.redis.entries(DEAD) if fields["id"] == message_id.encode())


def photograph(seed: int) -> bytes:
    """Make a PNG of noise; no two alike."""
    pixels = np.random.default_rng(seed).integers(0, 256, (48, 64, 3), np.uint8)
    return bytes(cv2.imencode(".png", pixels)[1].tobytes())


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedServer]:
    with EmbeddedServer() as server:
        yield server


@pytest.fixture(scope="module")
def line(cluster: Cluster, server: EmbeddedServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Line]:
    """Serve two categories."""
    assert cluster.cpus > 0
    root = tmp_path_factory.mktemp("models")
    spec = Backbone(Settings().model.model_copy(update={"input_size": 64})).spec
    for category in ("bottle", "cable"):
        write_version(Registry(str(root)), category, spec=spec)
    settings = Settings.model_validate(
        {
            "redis": {"url": server.url, "block_ms": 100},
            "registry": {"root": str(root)},
            "api": {"port": free_port()},
            "limits": {"max_image_bytes": 65536},
            "worker": {"batch_size": 8, "claim_idle_ms": 1000, "sweep_s": 0.5},
            "detector": {"engine": "torch"},
        }
    )
    service.run(settings)
    with RawRedis(server.port) as redis:
        yield Line(settings, redis, server.port)
    service.stop()


def test_image_pushed_over_a_plain_socket_comes_back_with_the_documented_fields(line: Line) -> None:
    message_id = line.push(captured_at="2026-01-01T12:00:00Z", line="7", serial="A-1")
    line.await_ends([message_id])
    result = line.result(message_id)
    assert set(result) >= RESULT_FIELDS
    assert result["category"] == b"bottle"
    assert result["model"] == b"bottle@v1"
    assert result["verdict"] in (b"normal", b"anomalous")
    assert (float(result["score"]) > float(result["threshold"])) == (result["verdict"] == b"anomalous")
    assert 0 < float(result["p_value"]) <= 1
    assert result["image_shape"] == b"48x64"
    assert isinstance(json.loads(result["boxes"]), list)
    assert result["map_codec"] == b"grid-f16"
    assert result["map"]
    assert (result["line"], result["serial"]) == (b"7", b"A-1")
    assert result["captured_at"].startswith(b"2026-01-01T12:00:00")
    assert float(result["total_ms"]) >= float(result["detect_ms"]) > 0


def test_bad_entries_end_as_dead_letters_with_their_reason_and_image(line: Line) -> None:
    bad = {
        line.push(image=b"no image"): b"undecodable",
        line.push(category="nope"): b"unknown_category",
        line.push(image=bytes(65537)): b"too_large",
        line.push(image=b""): b"malformed",
        line.push(category="../etc"): b"malformed",
    }
    good = line.push()
    line.await_ends([*bad, good])
    letters = {message_id: line.dead_letter(message_id) for message_id in bad}
    assert {message_id: letter["dead.reason"] for message_id, letter in letters.items()} == bad
    assert all(letter["dead.detail"] for letter in letters.values())
    assert letters[next(iter(bad))]["image"] == b"no image"
    assert line.result(good)["category"] == b"bottle"


def test_entry_without_an_image_is_a_dead_letter(line: Line) -> None:
    line.redis("XADD", IMAGES, "*", "id", "empty", "category", "bottle")
    line.await_ends(["empty"])
    assert line.dead_letter("empty")["dead.reason"] == b"malformed"


def test_mixed_categories_are_each_judged_by_their_own_model(line: Line) -> None:
    ids = {line.push(category): category for category in ("bottle", "cable") * 20}
    line.await_ends(list(ids))
    for message_id, category in ids.items():
        assert line.result(message_id)["model"] == f"{category}@v1".encode()


def test_http_api_judges_and_tells_counts(line: Line) -> None:
    address = f"http://127.0.0.1:{line.settings.api.port}"
    answer = httpx.post(f"{address}/v1/detect", params={"category": "cable"}, content=photograph(1), timeout=60)
    assert answer.status_code == 200
    assert answer.json()["model"] == "cable@v1"
    refused = httpx.post(f"{address}/v1/detect", params={"category": "nope"}, content=photograph(1), timeout=60)
    assert (refused.status_code, refused.json()["reason"]) == (404, "unknown_category")
    message_id = line.push()
    line.await_ends([message_id])
    ready = httpx.get(f"{address}/readyz", timeout=60)
    assert ready.status_code == 200
    told = ready.json()
    assert told["detector"]["categories"] == {"bottle": "v1", "cable": "v1"}
    assert told["detector"]["images"] >= 2
    assert told["worker"]["results"] >= 1
    assert told["worker"]["errors"] == 0
    assert sum(told["worker"]["dead"].values()) == line.redis.count("XLEN", DEAD)
    assert ["no append-only file" in warning for warning in told["warnings"]] == [True]


def test_service_is_not_ready_while_the_server_evicts_streams(line: Line) -> None:
    address = f"http://127.0.0.1:{line.settings.api.port}/readyz"
    line.redis("CONFIG", "SET", "maxmemory", "1gb")
    line.redis("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    refused = httpx.get(address, timeout=60)
    line.redis("CONFIG", "SET", "maxmemory-policy", "noeviction")
    line.redis("CONFIG", "SET", "maxmemory", 0)
    assert refused.status_code == 503
    assert "CONFIG SET maxmemory-policy noeviction" in refused.json()["detail"]
    assert httpx.get(address, timeout=60).status_code == 200


def is_alive(actor: str) -> bool:
    try:
        ray.get_actor(actor, namespace="serve")
    except ValueError:
        return False
    return True


def test_every_image_ends_once_though_the_detector_is_killed(line: Line) -> None:
    with line.busy(waiting=120) as ids:
        (name,) = (
            actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True) if "#Detector#" in actor["name"]
        )
        ray.kill(ray.get_actor(name, namespace="serve"))
        wait_until(lambda: not is_alive(name), "the detector is gone")
    assert line.redis.count("XLEN", IMAGES) > 0
    line.await_ends(ids)
    assert {line.result(message_id)["id"].decode() for message_id in ids} == set(ids)


def test_service_that_stops_finishes_what_it_has_in_hand_and_one_that_starts_goes_on_with_the_rest(line: Line) -> None:
    before = line.redis.count("XLEN", RESULTS)
    with line.busy(waiting=200) as ids:
        service.stop()
    ended = line.redis.count("XLEN", RESULTS) - before
    left = line.redis.count("XLEN", IMAGES)
    assert 0 < ended < len(ids)
    assert ended + left == len(ids)
    # What was read as the stop came is handed back: not counted as given out, and free for anyone at once.
    handed_back: Any = line.redis("XPENDING", IMAGES, "workers", "-", "+", len(ids))
    assert all(
        idle_ms >= line.settings.worker.claim_idle_ms and deliveries == 0 for _, _, idle_ms, deliveries in handed_back
    )
    while_away = line.push()
    service.run(line.settings)
    line.await_ends([*ids, while_away])


def test_service_on_a_serve_that_already_listens_tells_where(line: Line) -> None:
    elsewhere = line.settings.api.model_copy(update={"port": line.settings.api.port + 1})
    address = service.run(line.settings.model_copy(update={"api": elsewhere}))
    assert address == f"http://127.0.0.1:{line.settings.api.port}"
    assert httpx.get(f"{address}/readyz", timeout=60).status_code == 200


def test_replica_whose_name_is_in_use_takes_another(line: Line) -> None:
    name = f"{socket.gethostname()}-0"
    service.stop()
    line.redis("SET", StreamKeys().lease(name), "host plant-3, pid 7, 0123abcd")
    service.run(line.settings)
    line.await_ends([line.push()])
    consumers: Any = line.redis("XINFO", "CONSUMERS", IMAGES, "workers")
    assert any(consumer[1].decode().startswith(f"{name}-") for consumer in consumers)


def test_service_that_cannot_start_says_why_in_one_line(line: Line) -> None:
    service.stop()
    nowhere = line.settings.redis.model_copy(update={"url": "redis://127.0.0.1:1/0"})
    with pytest.raises(ConfigError) as caught:
        service.run(line.settings.model_copy(update={"redis": nowhere}))
    assert "the stream server at 127.0.0.1:1 does not answer" in str(caught.value)
    assert "StreamWorker" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_start_up_check_refuses_a_port_that_is_taken(server: EmbeddedServer, tmp_path: Path) -> None:
    taken = {"redis": {"url": server.url}, "registry": {"root": str(tmp_path)}, "api": {"port": server.port}}
    with pytest.raises(ConfigError, match=rf"cannot listen on 127\.0\.0\.1 port {server.port}.*--port"):
        service.require_startable(Settings.model_validate(taken))


def test_start_up_check_refuses_a_registry_that_is_a_file(server: EmbeddedServer, tmp_path: Path) -> None:
    (tmp_path / "models").touch()
    wrong = {"redis": {"url": server.url}, "registry": {"root": str(tmp_path / "models")}, "api": {"port": 18_765}}
    with pytest.raises(ConfigError, match="is a file"):
        service.require_startable(Settings.model_validate(wrong))
