"""Promotion: a version serves once it is promoted, and all categories that serve share one backbone."""

import fsspec
import pytest
from helpers.registries import FILES, make_manifest, overwrite

from flawstream.registry.registry import Registry
from schemas.errors import MixedBackbonesError, RegistryError


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


OTHER = make_manifest().backbone.model_copy(update={"name": "wide_resnet50_2", "weights_sha256": "9" * 64})


def test_version_on_another_backbone_than_other_categories_is_not_promoted(registry: Registry) -> None:
    registry.promote("bottle", "v1")
    registry.write(make_manifest("can"), FILES)
    registry.promote("can", "v1")
    registry.write(make_manifest("can", "v2", backbone=OTHER), FILES)
    with pytest.raises(MixedBackbonesError) as caught:
        registry.promote("can", "v2")
    message = str(caught.value)
    assert "resnet18 at 256 px (resize area) with strides 8, 16 and weights 000000000000 (bottle)" in message
    assert "wide_resnet50_2 at 256 px (resize area) with strides 8, 16 and weights 999999999999 (can)" in message
    assert all(way in message for way in ("train", "separate registry and service", "--other-backbone"))
    assert registry.currents() == {"bottle": "v1", "can": "v1"}
    registry.promote("can", "v2", other_backbone=True)
    assert registry.currents() == {"bottle": "v1", "can": "v2"}
    registry.promote("can", "v1")
    assert registry.currents() == {"bottle": "v1", "can": "v1"}


@pytest.mark.parametrize(
    "difference",
    [
        {"name": "other"},
        {"input_size": 96},
        {"strides": (4, 8)},
        {"blocks": (1, 2)},
        {"resize": "antialias"},
        {"weights_sha256": "1" * 64},
    ],
    ids=lambda difference: next(iter(difference)),
)
def test_each_part_of_a_backbone_s_identity_counts(registry: Registry, difference: dict[str, object]) -> None:
    registry.promote("bottle", "v1")
    registry.write(make_manifest("can", backbone=make_manifest().backbone.model_copy(update=difference)), FILES)
    with pytest.raises(MixedBackbonesError):
        registry.promote("can", "v1")


def test_same_weights_from_elsewhere_are_the_same_backbone(registry: Registry) -> None:
    registry.promote("bottle", "v1")
    came_along = make_manifest().backbone.model_copy(update={"weights": "anomalib"})
    registry.write(make_manifest("can", backbone=came_along), FILES)
    registry.promote("can", "v1")
    assert registry.currents() == {"bottle": "v1", "can": "v1"}


def test_only_current_category_may_move_to_another_backbone(registry: Registry) -> None:
    registry.promote("bottle", "v1")
    registry.write(make_manifest("can"), FILES)  # written and never promoted
    registry.write(make_manifest(version="v2", backbone=OTHER), FILES)
    registry.promote("bottle", "v2")
    assert registry.currents() == {"bottle": "v2"}


def test_all_categories_move_together_or_none_does(registry: Registry) -> None:
    for category in ("bottle", "can", "tile"):
        if category != "bottle":
            registry.write(make_manifest(category), FILES)
        registry.promote(category, "v1")
        registry.write(make_manifest(category, "v2", backbone=OTHER), FILES)
    with pytest.raises(MixedBackbonesError):
        registry.promote_all({"bottle": "v2", "can": "v2"})
    with pytest.raises(MixedBackbonesError):
        registry.promote_all({"bottle": "v2", "can": "v2", "tile": "v1"})
    with pytest.raises(RegistryError, match="no version 'v9'"):
        registry.promote_all({"bottle": "v2", "can": "v2", "tile": "v9"})
    assert registry.currents() == dict.fromkeys(("bottle", "can", "tile"), "v1")
    registry.promote_all(dict.fromkeys(("bottle", "can", "tile"), "v2"))
    assert registry.currents() == dict.fromkeys(("bottle", "can", "tile"), "v2")


def test_damaged_version_of_another_category_stops_no_promotion(registry: Registry, root: str) -> None:
    registry.write(make_manifest("can"), FILES)
    registry.promote("can", "v1")
    overwrite(root, "can/v1/manifest.json", b"{")
    registry.promote("bottle", "v1")
    assert registry.current("bottle") == "v1"
    readable, (damaged,) = registry.current_manifests()
    assert readable == [make_manifest()]
    assert "can/v1/manifest.json is damaged" in str(damaged)


def test_error_of_many_categories_names_the_first(registry: Registry) -> None:
    for number in range(12):
        registry.write(make_manifest(f"part-{number:02}", backbone=OTHER), FILES)
        registry.promote(f"part-{number:02}", "v1")
    with pytest.raises(MixedBackbonesError, match=r"\(part-00, .*part-09 and 2 more\); resnet18 .* \(bottle\)"):
        registry.promote("bottle", "v1")
