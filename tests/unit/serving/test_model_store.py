"""Resident models: loaded, swapped, let go, refused."""

import logging
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
from helpers.tiny_models import FLOW, SPEC, TinyEngine, write_version

import serving.model_store
from flawstream.fastflow.head import FastFlowHead
from flawstream.registry.registry import Registry
from schemas.errors import ModelUnavailableError, RegistryError, StorageUnavailableError, UnknownCategoryError
from serving.engines import Engines
from serving.model_store import ModelStore

MODEL_BYTES = sum(tensor.nbytes for tensor in FastFlowHead(SPEC, FLOW).state_dict().values())


class Bench:
    """A store on a registry in a folder."""

    def __init__(self, folder: Path, models: int = 10) -> None:
        self.registry = Registry(str(folder))
        self.folder = folder
        self.engine = TinyEngine()
        self.store = ModelStore(self.registry, Engines(self.engine), models * MODEL_BYTES)

    def serving(self, category: str) -> str:
        """Tell which version would judge an image now."""
        model = self.store.get(category)
        return "" if model is None else model.manifest.version


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_category_is_resident_once_loaded(bench: Bench) -> None:
    write_version(bench.registry, "bottle")
    assert bench.store.get("bottle") is None
    model = bench.store.load("bottle")
    assert model.manifest.model == "bottle@v1"
    assert bench.store.get("bottle") is model
    assert bench.store.resident == ["bottle@v1"]


def test_version_that_is_resident_is_not_prepared_again(bench: Bench) -> None:
    write_version(bench.registry, "bottle")
    assert bench.store.load("bottle") is bench.store.load("bottle")
    bench.store.refresh()
    assert bench.engine.loads == 1


def test_category_without_a_version_is_unknown(bench: Bench) -> None:
    write_version(bench.registry, "cable")
    with pytest.raises(UnknownCategoryError, match=r"'bottle' has no current version.*flawstream train"):
        bench.store.load("bottle")


def test_least_recently_used_category_goes_first(tmp_path: Path) -> None:
    bench = Bench(tmp_path, models=2)
    for category in ("bottle", "cable", "screw"):
        write_version(bench.registry, category)
    bench.store.load("bottle")
    bench.store.load("cable")
    bench.store.get("bottle")
    bench.store.load("screw")
    assert bench.store.resident == ["bottle@v1", "screw@v1"]
    assert bench.store.resident_bytes == 2 * MODEL_BYTES
    assert not bench.store.has_room
    assert bench.store.get("cable") is None
    assert bench.store.load("cable").manifest.model == "cable@v1"


def test_categories_fit_as_long_as_there_is_memory_for_all_of_them(tmp_path: Path) -> None:
    bench = Bench(tmp_path, models=2)
    write_version(bench.registry, "bottle")
    write_version(bench.registry, "cable")
    bench.store.refresh()
    fit = [bench.store.categories_fit]  # nothing is known of their size yet
    bench.store.load("bottle")
    fit.append(bench.store.categories_fit)
    write_version(bench.registry, "screw")
    bench.store.refresh()
    fit.append(bench.store.categories_fit)
    assert fit == [True, True, False]
    assert bench.store.loads == 1


def test_model_larger_than_the_budget_serves_alone(tmp_path: Path) -> None:
    bench = Bench(tmp_path, models=0)
    for category in ("bottle", "cable"):
        write_version(bench.registry, category)
        bench.store.load(category)
        assert bench.store.resident == [f"{category}@v1"]


def test_promoted_version_takes_over_at_the_next_refresh(bench: Bench) -> None:
    write_version(bench.registry, "bottle", "v1")
    bench.store.refresh()
    bench.store.load("bottle")
    write_version(bench.registry, "bottle", "v2", promote=False)
    bench.store.refresh()
    assert bench.serving("bottle") == "v1"
    bench.registry.promote("bottle", "v2")
    bench.store.refresh()
    assert bench.serving("bottle") == "v2"
    assert bench.store.known == {"bottle": "v2"}


def test_version_calibrated_in_another_arithmetic_is_refused_with_the_way_out(bench: Bench) -> None:
    write_version(bench.registry, "bottle")
    bench.engine.precision = "float16"
    with pytest.raises(RegistryError, match=r"calibrated in float32 .* computes in float16, .*; train it again"):
        bench.store.load("bottle")
    assert bench.store.resident == []


def test_category_of_an_empty_folder_is_not_unknown_as_a_missing_mount_looks_like_it(bench: Bench) -> None:
    with pytest.raises(StorageUnavailableError, match=r"no current version in .* not mounted"):
        bench.store.load("bottle")
    with pytest.raises(StorageUnavailableError, match="not mounted"):
        bench.store.refresh()


def test_versions_in_use_count_and_loading_waits_until_they_are_not_used(tmp_path: Path) -> None:
    bench = Bench(tmp_path, models=2)
    for category in ("bottle", "cable", "screw"):
        write_version(bench.registry, category)
    in_use = [bench.store.load("bottle"), bench.store.load("cable")]
    in_use[:] = bench.store.get_all(["bottle", "cable"]).values()
    with ThreadPoolExecutor(1) as thread:
        loading = thread.submit(bench.store.load, "screw")
        with pytest.raises(TimeoutError):
            loading.result(timeout=0.2)
        assert (bench.store.resident, bench.store.resident_bytes) == (["cable@v1"], 2 * MODEL_BYTES)
        del in_use[0]
        assert loading.result().manifest.model == "screw@v1"
    assert bench.store.resident_bytes == 2 * MODEL_BYTES


def test_loading_gives_up_where_versions_are_used_for_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving.model_store, "_ROOM_S", 0.0)
    bench = Bench(tmp_path, models=1)
    for category in ("bottle", "cable"):
        write_version(bench.registry, category)
    in_use = bench.store.load("bottle")
    with pytest.raises(ModelUnavailableError, match=r"raise detector\.max_resident_mb"):
        bench.store.load("cable")
    assert in_use.manifest.model == "bottle@v1"
    del in_use
    assert bench.store.load("cable").manifest.model == "cable@v1"  # at once, and not after 30 s


def test_promoted_version_is_swapped_in_beside_the_one_that_calls_use(tmp_path: Path) -> None:
    bench = Bench(tmp_path, models=1)
    write_version(bench.registry, "bottle", "v1")
    in_use = bench.store.load("bottle")
    write_version(bench.registry, "bottle", "v2")
    bench.store.refresh()
    assert (in_use.manifest.version, bench.serving("bottle")) == ("v1", "v2")


def test_roll_back_takes_the_older_version(bench: Bench) -> None:
    write_version(bench.registry, "bottle", "v1")
    write_version(bench.registry, "bottle", "v2")
    bench.store.load("bottle")
    bench.registry.promote("bottle", "v1")
    bench.store.refresh()
    assert bench.serving("bottle") == "v1"


def test_refresh_loads_no_category_that_nobody_asked_for(bench: Bench) -> None:
    write_version(bench.registry, "bottle")
    bench.store.refresh()
    assert bench.store.known == {"bottle": "v1"}
    assert bench.store.resident == []


@pytest.mark.parametrize("weights", [b"no safetensors", b""])
def test_damaged_version_leaves_the_old_one_serving_and_is_said_once(
    bench: Bench, caplog: pytest.LogCaptureFixture, weights: bytes
) -> None:
    write_version(bench.registry, "bottle", "v1")
    write_version(bench.registry, "cable", "v1")
    bench.store.load("bottle")
    bench.store.load("cable")
    write_version(bench.registry, "bottle", "v2", weights=weights)
    write_version(bench.registry, "cable", "v2")
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            bench.store.refresh()
    assert (bench.serving("bottle"), bench.serving("cable")) == ("v1", "v2")
    assert [record.getMessage().partition(" ")[0] for record in caplog.records] == ["bottle@v2"]


def test_damaged_version_is_not_read_for_every_image(bench: Bench) -> None:
    write_version(bench.registry, "bottle", weights=b"no safetensors")
    with pytest.raises(RegistryError, match="do not fit"):
        bench.store.load("bottle")
    manifest = bench.folder / "bottle" / "v1" / "manifest.json"
    manifest.unlink()  # would be noticed
    with pytest.raises(RegistryError, match="do not fit"):
        bench.store.load("bottle")


def test_version_whose_storage_failed_for_a_moment_is_taken_later(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_version(bench.registry, "bottle", "v1")
    bench.store.load("bottle")
    write_version(bench.registry, "bottle", "v2")
    weights = bench.folder / "bottle" / "v2" / "flow.safetensors"
    away = weights.rename(weights.with_suffix(".away"))
    bench.store.refresh()
    assert bench.serving("bottle") == "v1"
    away.rename(weights)
    bench.store.refresh()
    assert bench.serving("bottle") == "v1"
    monkeypatch.setattr(serving.model_store, "_RETRY_S", 0.0)
    bench.store.refresh()
    assert bench.serving("bottle") == "v2"


def test_version_that_replaces_a_damaged_one_is_taken_at_once(bench: Bench) -> None:
    write_version(bench.registry, "bottle", "v1", weights=b"no safetensors")
    bench.store.refresh()
    with pytest.raises(RegistryError):
        bench.store.load("bottle")
    write_version(bench.registry, "bottle", "v2")
    bench.store.refresh()
    assert bench.store.load("bottle").manifest.version == "v2"


@pytest.mark.parametrize(
    "difference",
    [
        {"name": "other"},
        {"input_size": 96},
        {"strides": (8, 16)},
        {"weights_sha256": "1" * 64},
        {"resize": "antialias"},
    ],
    ids=lambda difference: next(iter(difference)),
)
def test_version_of_another_backbone_is_refused(bench: Bench, difference: dict[str, object]) -> None:
    write_version(bench.registry, "bottle", spec=SPEC.model_copy(update=difference))
    with pytest.raises(RegistryError, match="and this detector runs one backbone"):
        bench.store.load("bottle")
    assert bench.engine.loads == 0


def test_version_whose_head_the_engine_cannot_run_is_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(_head: object, _manifest: object, _read: object) -> None:
        raise RuntimeError("channels do not fit")

    monkeypatch.setattr(bench.engine, "load", load)
    write_version(bench.registry, "bottle")
    with pytest.raises(RegistryError, match=r"bottle@v1 cannot be loaded: channels do not fit"):
        bench.store.load("bottle")


def test_age_of_a_version_does_not_matter_only_the_alias_does(bench: Bench) -> None:
    write_version(bench.registry, "bottle", "v1")
    write_version(bench.registry, "bottle", "v2", age=timedelta(days=9))
    assert bench.store.load("bottle").manifest.version == "v2"
