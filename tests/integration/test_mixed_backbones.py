"""Categories on several backbones behind one worker, on a real Valkey: each image as by a service of its own."""

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
from schemas.manifest import BackboneSpec
from schemas.settings import RedisSettings, Settings
from serving.detector import make_detector
from workers.consume.sharded import ShardedWorker
from workers.redis.connection import make_client

pytestmark = pytest.mark.anyio

MAX_DELIVERIES = 2
IMAGES = 4


def settings_of(root: Path, redis: RedisSettings) -> Settings:
    return Settings.model_validate(
        {
            "redis": redis.model_dump(exclude_unset=True),
            "registry": {"root": str(root)},
            "detector": {"engine": "torch", "refresh_s": 0.05},
            "worker": {"max_deliveries": MAX_DELIVERIES, "claim_idle_ms": 300, "sweep_s": 0.05},
        }
    )


def backbone(settings: Settings, **update: object) -> BackboneSpec:
    return Backbone(settings.model.model_copy(update={"input_size": 64, **update})).spec


def push(raw: RawRedis, categories: list[str]) -> list[str]:
    """Push images of the categories in turn, as any client does; gives their ids."""
    ids = [f"{category}-{number}" for number in range(IMAGES) for category in categories]
    for name in ids:
        category, _, number = name.partition("-")
        image = png(40 * int(number))
        raw("XADD", "flawstream:images", "*", "id", name, "category", category, "image", image)
    return ids


def results(raw: RawRedis) -> dict[str, tuple[str, float]]:
    """Give the version that judged each image that has a result, and the score."""
    entries = [fields for _, fields in raw.entries("flawstream:results")]
    return {fields["id"].decode(): (fields["model"].decode(), float(fields["score"])) for fields in entries}


async def judge_all(settings: Settings, raw: RawRedis, categories: list[str]) -> dict[str, tuple[str, float]]:
    """Serve a registry until images of the categories, pushed together, are judged."""
    detector = make_detector(settings.registry.root, settings.model, settings.detector)
    await detector.start()
    async with make_client(settings.redis) as client:
        ids = push(raw, categories)
        async with working(ShardedWorker(client, "station", detector, settings)):
            await wait_until_async(lambda: results(raw).keys() >= set(ids), "all are judged")
    await detector.stop()
    return results(raw)


async def test_images_of_several_backbones_in_one_batch_have_the_scores_of_services_of_their_own(
    tmp_path: Path, valkey_server: Server, redis_settings: RedisSettings
) -> None:
    plant = settings_of(tmp_path / "plant", redis_settings)
    own = {
        "bottle": backbone(plant),
        "cable": backbone(plant, resize="antialias"),
        "tile": backbone(plant, input_size=96, strides=(8, 16)),
    }
    weights = {}
    for category, spec in own.items():
        manifest = write_version(Registry(plant.registry.root), category, spec=spec)
        weights[category] = Registry(plant.registry.root).read_file(manifest, "flow.safetensors")
    with RawRedis(valkey_server.port) as raw:
        together = await judge_all(plant, raw, list(own))
        assert raw.count("XLEN", "flawstream:dead") == 0
        for category, spec in own.items():
            raw("FLUSHALL")
            alone = settings_of(tmp_path / category, redis_settings)
            write_version(Registry(alone.registry.root), category, spec=spec, weights=weights[category])
            for name, (model, score) in (await judge_all(alone, raw, [category])).items():
                assert together[name][0] == model
                assert together[name][1] == pytest.approx(score, rel=1e-5, abs=1e-5)
    assert len(together) == IMAGES * len(own)


async def test_images_of_a_version_that_cannot_be_served_wait_and_become_results_after_the_cure(
    tmp_path: Path, valkey_server: Server, redis_settings: RedisSettings
) -> None:
    registry = Registry(str(tmp_path))
    settings = settings_of(tmp_path, redis_settings)
    spec = backbone(settings)
    other = spec.model_copy(update={"weights_sha256": "1" * 64})  # weights that nobody has
    for category in ("bottle", "cable"):
        write_version(registry, category, spec=spec)
    detector = make_detector(str(tmp_path), settings.model, settings.detector)
    await detector.start()
    for category in ("cable", "tile"):
        write_version(registry, category, "v2", spec=other)

    current = {"bottle": "v1", "cable": "v2", "tile": "v2"}
    await wait_until_async(lambda: detector.status()["categories"] == current, "the detector knows the versions")
    async with make_client(settings.redis) as client:
        worker = ShardedWorker(client, "station", detector, settings)
        with RawRedis(valkey_server.port) as raw:
            first = push(raw, ["bottle"])
            waiting = push(raw, ["tile"])
            with_loaded = push(raw, ["cable"])
            async with working(worker):
                await wait_until_async(lambda: results(raw).keys() >= {*first, *with_loaded}, "the others are judged")
                await wait_until_async(
                    lambda: worker.stats.deferred > IMAGES * 3 * MAX_DELIVERIES,
                    "those that wait are tried more often than one that fails",
                )
                assert results(raw).keys() == {*first, *with_loaded}
                assert {results(raw)[name][0] for name in with_loaded} == {"cable@v1"}
                assert raw.count("XLEN", "flawstream:dead") == 0
                assert raw.count("XLEN", "flawstream:images") == IMAGES
                write_version(registry, "tile", "v3", spec=spec)
                await wait_until_async(lambda: results(raw).keys() >= set(waiting), "what waited is judged")
            judged = results(raw)
            assert {judged[name][0] for name in waiting} == {"tile@v3"}
            assert raw.count("XLEN", "flawstream:dead") == raw.count("XLEN", "flawstream:images") == 0
    await detector.stop()
