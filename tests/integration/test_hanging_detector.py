"""Behind Ray Serve, an image from which the engine never returns."""

from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import cv2
import numpy as np
import pytest
import ray
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
                "detector": {"engine": "torch", "timeout_s": 2},
                "api": {"port": free_port()},
            }
        )
        with patch.object(service, "DetectorDeployment", HangingDetectorDeployment):
            service.run(settings)
        yield redis
        service.stop()


def detectors() -> set[str]:
    actors = ray.util.list_named_actors(all_namespaces=True)
    return {actor["name"] for actor in actors if "#Detector#" in actor["name"]}


def test_replica_whose_engine_hangs_ends(plant: RawRedis) -> None:
    """What becomes of the image and its neighbours follows from that: `test_poison`."""
    before = detectors()
    _, image = cv2.imencode(".png", np.full((64, 64, 3), HANGS, np.uint8))
    plant("XADD", "flawstream:images", "*", "category", "bottle", "image", image.tobytes())
    wait_until(lambda: not before & detectors(), "the replica has ended")
