"""Promotion: a version serves once it is promoted."""

import fsspec
import pytest
from helpers.registries import FILES, make_manifest, overwrite

from flawstream.registry.registry import Registry
from schemas.errors import RegistryError


def test_version_serves_only_once_promoted(registry: Registry) -> None:
    assert registry.current("bottle") is None
    assert registry.currents() == {}
    registry.promote("bottle", "v1")
    assert registry.current("bottle") == "v1"
    registry.write(make_manifest(version="v2"), FILES)
    assert registry.currents() == {"bottle": "v1"}
    registry.promote("bottle", "v2")
    assert registry.currents() == {"bottle": "v2"}
    registry.promote("bottle", "v1")
    assert registry.currents() == {"bottle": "v1"}


def test_version_that_does_not_exist_cannot_be_promoted(registry: Registry) -> None:
    with pytest.raises(RegistryError, match=r"no version 'v9'.*it has: v1"):
        registry.promote("bottle", "v9")
    assert registry.current("bottle") is None


@pytest.mark.parametrize("damage", [b"WEIGHTS", None])
def test_version_with_a_damaged_or_missing_file_cannot_be_promoted(
    registry: Registry, root: str, damage: bytes | None
) -> None:
    registry.promote("bottle", "v1")
    registry.write(make_manifest("can"), FILES)
    registry.write(make_manifest(version="v2"), FILES)
    if damage is None:
        fs, base = fsspec.core.url_to_fs(root)
        fs.rm_file(f"{base}/bottle/v2/flow.safetensors")
    else:
        overwrite(root, "bottle/v2/flow.safetensors", damage)
    with pytest.raises(RegistryError, match=r"bottle/v2/flow\.safetensors (has SHA-256|is missing)"):
        registry.promote_all({"can": "v1", "bottle": "v2"})
    assert registry.currents() == {"bottle": "v1"}


def test_all_versions_are_promoted_or_none_is(registry: Registry) -> None:
    other = make_manifest().backbone.model_copy(update={"name": "wide_resnet50_2", "weights_sha256": "9" * 64})
    for category in ("bottle", "can"):
        if category != "bottle":
            registry.write(make_manifest(category), FILES)
        registry.promote(category, "v1")
        registry.write(make_manifest(category, "v2", backbone=other), FILES)
    with pytest.raises(RegistryError, match="no version 'v9'"):
        registry.promote_all({"bottle": "v2", "can": "v9"})
    assert registry.currents() == {"bottle": "v1", "can": "v1"}
    registry.promote("can", "v2")
    assert registry.currents() == {"bottle": "v1", "can": "v2"}
    registry.promote_all({"bottle": "v2", "can": "v1"})
    assert registry.currents() == {"bottle": "v2", "can": "v1"}


def test_damaged_version_of_another_category_stops_no_promotion(registry: Registry, root: str) -> None:
    registry.write(make_manifest("can"), FILES)
    registry.promote("can", "v1")
    overwrite(root, "can/v1/manifest.json", b"{")
    registry.promote("bottle", "v1")
    assert registry.current("bottle") == "v1"
    readable, (damaged,) = registry.current_manifests()
    assert readable == [make_manifest()]
    assert "can/v1/manifest.json is damaged" in str(damaged)
