"""A category whose current version runs on another backbone: its images wait on a real Valkey, and no other does."""

from pathlib import Path

import pytest
from helpers.fakes import png
from helpers.raw_redis import RawRedis
from helpers.redis_servers import Server
from helpers.stream_work import working
from helpers.tiny_models import write_version
from helpers.waiting import wait_until_async

from flawstream.fastflow.backbone import Backbone
from flawstream.registry.registry import Registry
from schemas.settings import RedisSettings, Settings
from serving.detector import make_detector
from workers.consume.sharded import ShardedWorker
from workers.redis.connection import make_client

pytestmark = pytest.mark.anyio

MAX_DELIVERIES = 2
BROKEN = 6


def push(raw: RawRedis, category: str, count: int) -> list[str]:
    """Push images as any client does; gives their ids."""
    ids = [f"{category}-{number}" for number in range(count)]
    for number, name in enumerate(ids):
        raw("XADD", "flawstream:images", "*", "id", name, "category", category, "image", png(number))
    return ids


def models(raw: RawRedis) -> dict[str, str]:
    """Tell which version judged each image that has a result."""
    return {fields["id"].decode(): fields["model"].decode() for _, fields in raw.entries("flawstream:results")}


async def test_images_of_a_version_that_cannot_be_served_wait_and_become_results_after_the_cure(
    tmp_path: Path, valkey_server: Server, redis_settings: RedisSettings
) -> None:
    registry = Registry(str(tmp_path))
    settings = Settings.model_validate(
        {
            "redis": redis_settings.model_dump(exclude_unset=True),
            "registry": {"root": str(tmp_path)},
            "detector": {"engine": "torch", "refresh_s": 0.05},
            "worker": {"max_deliveries": MAX_DELIVERIES, "claim_idle_ms": 300, "sweep_s": 0.05},
        }
    )
    spec = Backbone(settings.model.model_copy(update={"input_size": 64})).spec
    other = spec.model_copy(update={"weights_sha256": "1" * 64})
    for category in ("bottle", "cable"):
        write_version(registry, category, spec=spec)
    detector = make_detector(str(tmp_path), settings.model, settings.detector)
    await detector.start()
    for category in ("cable", "tile"):  # as a file edited in the registry, or an older release, does
        write_version(registry, category, "v2", spec=other, promote=False)
        registry.promote(category, "v2", other_backbone=True)

    current = {"bottle": "v1", "cable": "v2", "tile": "v2"}
    await wait_until_async(lambda: detector.status()["categories"] == current, "the detector knows the versions")
    async with make_client(settings.redis) as client:
        worker = ShardedWorker(client, "station", detector, settings)
        with RawRedis(valkey_server.port) as raw:
            first = push(raw, "bottle", 4)
            waiting = push(raw, "tile", BROKEN)
            with_loaded = push(raw, "cable", 4)
            async with working(worker):
                await wait_until_async(lambda: set(models(raw)) >= {*first, *with_loaded}, "the others are judged")
                await wait_until_async(
                    lambda: worker.stats.deferred > BROKEN * 3 * MAX_DELIVERIES,
                    "those that wait are tried more often than one that fails",
                )
                assert set(models(raw)) == {*first, *with_loaded}
                assert {models(raw)[name] for name in with_loaded} == {"cable@v1"}
                assert raw.count("XLEN", "flawstream:dead") == 0
                assert raw.count("XLEN", "flawstream:images") == BROKEN
                write_version(registry, "tile", "v3", spec=spec, promote=False)
                registry.promote("tile", "v3", other_backbone=True)
                await wait_until_async(lambda: set(models(raw)) >= set(waiting), "what waited is judged")
            judged = models(raw)
            assert {judged[name] for name in waiting} == {"tile@v3"}
            assert raw.count("XLEN", "flawstream:dead") == raw.count("XLEN", "flawstream:images") == 0
    await detector.stop()
