"""Behind Ray Serve, an image from which the engine never returns: it becomes poison, its neighbours become results."""

from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import cv2
import numpy as np
import pytest
import ray.cloudpickle
from helpers import hanging_detector
from helpers.hanging_detector import HANGS, HangingDetectorDeployment
from helpers.raw_redis import RawRedis
from helpers.tiny_models import write_version
from helpers.waiting import wait_until

from flawstream.fastflow.backbone import Backbone
from flawstream.registry.registry import Registry
from flawstream_cli.cluster import Cluster
from schemas.settings import Settings
from serving import app as service
from workers.redis.embedded import EmbeddedServer, free_port

GREY = 100


@pytest.fixture
def plant(cluster: Cluster, tmp_path: Path) -> Iterator[RawRedis]:
    assert cluster.cpus > 0
    ray.cloudpickle.register_pickle_by_value(hanging_detector)  # replicas cannot import it
    registry = tmp_path / "models"
    write_version(
        Registry(str(registry)), "bottle", spec=Backbone(Settings().model.model_copy(update={"input_size": 64})).spec
    )
    with EmbeddedServer() as server, RawRedis(server.port) as redis:
        settings = Settings.model_validate(
            {
                "redis": {"url": server.url},
                "registry": {"root": str(registry)},
                "worker": {"claim_idle_ms": 20_000, "sweep_s": 0.5, "max_deliveries": 1},
                "detector": {"engine": "torch", "timeout_s": 2},
                "api": {"port": free_port()},
            }
        )
        with patch.object(service, "DetectorDeployment", HangingDetectorDeployment):
            service.run(settings)
        yield redis
        service.stop()


def test_an_image_that_hangs_the_engine_is_poison_and_its_neighbours_become_results(plant: RawRedis) -> None:
    for number, grey in enumerate((GREY, GREY, HANGS, GREY, GREY)):
        _, image = cv2.imencode(".png", np.full((64, 64, 3), grey, np.uint8))
        plant("XADD", "flawstream:images", "*", "id", f"part-{number}", "category", "bottle", "image", image.tobytes())
    wait_until(lambda: not plant.count("XLEN", "flawstream:images"), "all images have ended")
    results = sorted(fields["id"].decode() for _, fields in plant.entries("flawstream:results"))
    ((_, letter),) = plant.entries("flawstream:dead")
    assert results == ["part-0", "part-1", "part-3", "part-4"]
    assert (letter["id"], letter["dead.reason"]) == (b"part-2", b"poison")
