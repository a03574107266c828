"""What counts as the same work: everything that weights and thresholds depend on, and nothing else."""

from pathlib import Path
from typing import Any

import pytest
from helpers.image_files import write_image, write_images
from helpers.tiny_models import SPEC, make_manifest

from flawstream.registry.registry import Registry
from schemas.manifest import Device
from schemas.settings import DetectorSettings, ModelSettings, TrainingSettings
from training.datasets.samples import CategoryData
from training.work import Recipe, find_finished

DATA = "d" * 64


def recipe(device: Device = "cpu", **changes: dict[str, Any]) -> Recipe:
    return Recipe(
        SPEC.model_copy(update=changes.get("backbone", {})),
        ModelSettings(**changes.get("model", {})),
        TrainingSettings(**changes.get("training", {})),
        DetectorSettings(**changes.get("detector", {})),
        device,
    )


@pytest.mark.parametrize(
    "other",
    [
        recipe("cuda"),
        recipe(training={"epochs": 19}),
        recipe(training={"threads": 2}),
        recipe(training={"seed": 1}),
        recipe(training={"calibration_fraction": 0.3}),
        recipe(training={"false_alarm_rate": 0.1}),
        recipe(training={"int8": False}),
        recipe(model={"flow_steps": 4}),
        recipe(model={"top_fraction": 0.5}),
        recipe(backbone={"weights_sha256": "1" * 64}),
        recipe(backbone={"input_size": 128}),
        recipe(detector={"engine": "torch"}),
        recipe(detector={"precision": "f32"}),
    ],
)
def test_what_changes_a_version_is_other_work(other: Recipe) -> None:
    assert other.work_sha256(DATA) != recipe().work_sha256(DATA)


@pytest.mark.parametrize(
    "same",
    [
        recipe(training={"num_gpus": 0.5}),
        recipe(training={"categories_per_gpu": 1}),
        recipe(training={"memory_gb": 4.0}),
        recipe(training={"labels": {"zone": "a"}}),
        recipe(training={"wait_for_nodes": True}),
        recipe(training={"device": "cpu"}),
        recipe(detector={"replicas": 3, "max_queue_images": 9}),
    ],
)
def test_where_it_is_trained_and_how_it_is_served_is_the_same_work(same: Recipe) -> None:
    assert same.work_sha256(DATA) == recipe().work_sha256(DATA)


def test_other_data_is_other_work() -> None:
    assert recipe().work_sha256("e" * 64) != recipe().work_sha256(DATA)


def write(registry: Registry, data: CategoryData, version: str, by: Recipe) -> None:
    files = {"flow.safetensors": version.encode()}
    manifest = make_manifest(data.name, version, files=files)
    record = manifest.training.model_copy(
        update={"seed": by.training.seed, "work_sha256": by.work_sha256(data.sha256())}
    )
    registry.write(manifest.model_copy(update={"training": record}), files)


@pytest.fixture
def data(tmp_path: Path) -> CategoryData:
    return CategoryData("bottle", tuple(write_images(tmp_path / "bottle", 3)), ())


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(str(tmp_path / "models"))


def test_newest_version_of_the_same_work_is_found_by_seed(registry: Registry, data: CategoryData) -> None:
    second = recipe(training={"seed": 1})
    write(registry, data, "v1", recipe())
    write(registry, data, "v2", recipe())
    write(registry, data, "v3", second)
    write(registry, data, "v4", recipe(training={"epochs": 3}))
    found = find_finished(registry, [data], [recipe(), second])
    assert {key: manifest.version for key, manifest in found.items()} == {("bottle", 0): "v2", ("bottle", 1): "v3"}


def test_changed_image_is_found_to_be_new_work(registry: Registry, data: CategoryData) -> None:
    write(registry, data, "v1", recipe())
    write_image(data.train[1], of="something else")
    assert find_finished(registry, [data], [recipe()]) == {}


def test_unreadable_image_and_damaged_manifest_are_no_finished_work(
    registry: Registry, data: CategoryData, tmp_path: Path
) -> None:
    write(registry, data, "v1", recipe())
    write(registry, data, "v2", recipe())
    (tmp_path / "models/bottle/v2/manifest.json").write_text("{")
    found = find_finished(registry, [data], [recipe()])
    assert [manifest.version for manifest in found.values()] == ["v1"]
    data.train[0].unlink()
    assert find_finished(registry, [data], [recipe()]) == {}


def test_versions_of_older_releases_and_of_imports_are_no_finished_work(registry: Registry, data: CategoryData) -> None:
    files = {"flow.safetensors": b"weights"}
    registry.write(make_manifest("bottle", files=files), files)
    assert find_finished(registry, [data], [recipe()]) == {}
