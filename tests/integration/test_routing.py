"""Calls of a real Serve handle go to the replica of their categories, where these do not all fit into one."""

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers.tiny_models import write_version
from helpers.waiting import wait_until_async
from ray import serve
from ray.serve.handle import DeploymentHandle

from flawstream.fastflow.backbone import Backbone
from flawstream.registry.registry import Registry
from flawstream_cli.cluster import Cluster
from schemas.settings import Settings
from serving import app as service
from serving import routing
from serving.deployments import HandleDetector
from serving.routing import Placement, placement_of
from workers.ports import Detection
from workers.redis.embedded import free_port

pytestmark = pytest.mark.anyio
log = logging.getLogger(__name__)

CATEGORIES = [f"part-{number:02}" for number in range(24)]
RESIDENT_MB = 26
"""Memory for 18 of the 24 categories, with the backbone below."""
BATCH, BATCHES = 16, 24
SIDE_PX = 64


@pytest.fixture(scope="module")
def handle(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeploymentHandle]:
    """Run two detectors, without workers."""
    assert cluster.cpus > 0
    folder: Path = tmp_path_factory.mktemp("models")
    spec = Backbone(Settings().model.model_copy(update={"input_size": SIDE_PX})).spec
    for category in CATEGORIES:
        write_version(Registry(str(folder)), category, spec=spec)
    service.run(
        Settings.model_validate(
            {
                "registry": {"root": str(folder)},
                "api": {"port": free_port()},
                "worker": {"replicas": 0},
                "detector": {"engine": "torch", "replicas": 2, "max_resident_mb": RESIDENT_MB},
            }
        )
    )
    yield service.detector_handle()
    service.stop()
    serve.shutdown()  # whoever comes next has a port of its own


async def loads(handle: DeploymentHandle) -> int:
    """Return how many versions all detectors have loaded."""
    return sum(status["loads"] for status in await handle.broadcast("status").results_async())


async def loads_of_batches(handle: DeploymentHandle) -> int:
    """Have mixed batches judged, and return how many versions were loaded for them."""
    detector = HandleDetector(handle, 60.0)
    random = np.random.default_rng(7)
    before = await loads(handle)
    for _ in range(BATCHES):
        names = [CATEGORIES[number] for number in random.integers(len(CATEGORIES), size=BATCH)]
        images = random.integers(0, 256, (BATCH, SIDE_PX, SIDE_PX, 3), np.uint8)
        judgements = await detector.detect(images, names)
        models = [one.model for one in judgements if isinstance(one, Detection)]
        assert models == [f"{name}@v1" for name in names]
    return await loads(handle) - before


async def test_replica_loads_the_versions_of_its_own_categories_only(
    handle: DeploymentHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    await HandleDetector(handle, 60.0).pixel_forms(["bottle"])
    name = handle.deployment_name
    await wait_until_async(
        lambda: len(placement_of(name).replicas) == 2 and not placement_of(name).categories_fit,
        lambda: f"reports that the categories do not fit, and not {placement_of(name)}",
    )
    replicas = placement_of(name).replicas
    with monkeypatch.context() as patched:
        patched.setattr(routing, "placement_of", lambda _: Placement(replicas))
        patched.setattr("serving.deployments.placement_of", lambda _: Placement(replicas))
        anywhere = await loads_of_batches(handle)
    await loads_of_batches(handle)  # each replica now has its own
    routed = await loads_of_batches(handle)
    images = BATCH * BATCHES
    log.info("loads per image: %.3f by any replica, %.3f by that of the category", anywhere / images, routed / images)
    assert anywhere > BATCHES
    assert routed < anywhere / 4
