"""Backbones by block: the paper's form of DeiT and CaiT, for any timm transformer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.networks import make_network, pixels, save, settings
from torch import Tensor, nn

from flawstream.fastflow.backbone import Backbone, load_trained_backbone
from schemas.errors import ConfigError

DEIT, CAIT = "deit_tiny_distilled_patch16_224", "cait_xxs24_224"
SIDE = 224


@pytest.fixture(scope="module", params=[DEIT, CAIT])
def network(request: pytest.FixtureRequest) -> nn.Module:
    made = make_network(request.param)
    made.name = request.param
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "gamma" in name:  # CaiT's blocks start as almost nothing
                parameter.fill_(0.5)
    return made


@pytest.fixture
def weights(network: nn.Module, tmp_path: Path) -> Path:
    return save(network, tmp_path / "a.safetensors")


def by_hand(network: Any, x: Tensor, block: int) -> Tensor:
    """The paper's features as public re-implementations compute them; (B, C, H, W)."""
    x = network.patch_embed(x)
    if hasattr(network, "dist_token"):
        x = torch.cat([network.cls_token.expand(len(x), -1, -1), network.dist_token.expand(len(x), -1, -1), x], dim=1)
    x = x + network.pos_embed
    for index in range(block + 1):
        x = network.blocks[index](x)
    x = network.norm(x)[:, 2 if hasattr(network, "dist_token") else 0 :]
    side = SIDE // 16
    return x.permute(0, 2, 1).reshape(len(x), -1, side, side)


def test_features_are_the_patch_tokens_after_the_block_under_the_last_norm(network: nn.Module, weights: Path) -> None:
    chosen = settings(backbone=network.name, weights=str(weights), blocks=(2, 5), input_size=SIDE)
    backbone = Backbone(chosen)
    images = pixels(2, SIDE)
    x = (images.permute(0, 3, 1, 2) - backbone.shift) * backbone.factor
    assert backbone.spec.feature_shapes == [(192, 14, 14)] * 2
    assert backbone.spec.strides == (16, 16)
    assert backbone.spec.layers == "blocks 2, 5"
    for block, ours in zip((2, 5), backbone(images), strict=True):
        torch.testing.assert_close(ours, by_hand(network, x, block), rtol=1e-5, atol=1e-5)


def test_blocks_past_the_last_are_cut_off(network: nn.Module, weights: Path) -> None:
    def parameters(block: int) -> int:
        backbone = Backbone(settings(backbone=network.name, weights=str(weights), blocks=(block,), input_size=SIDE))
        return sum(parameter.numel() for parameter in backbone.parameters())

    of_one_block = sum(parameter.numel() for parameter in network.get_submodule("blocks.0").parameters())
    assert parameters(5) - parameters(2) == 3 * of_one_block


def test_version_remembers_its_blocks(network: nn.Module, weights: Path) -> None:
    spec = Backbone(settings(backbone=network.name, weights=str(weights), blocks=(1,), input_size=SIDE)).spec
    assert load_trained_backbone(spec, settings(weights=str(weights))).spec == spec


def test_embedding_of_positions_follows_the_input_size_and_the_digest_does_not(tmp_path: Path) -> None:
    path = save(make_network(DEIT), tmp_path / "a.pth")
    native, small = (
        Backbone(settings(backbone=DEIT, weights=str(path), blocks=(0,), input_size=side)) for side in (SIDE, 64)
    )
    assert [tuple(scale.shape[1:]) for scale in small(pixels())] == small.spec.feature_shapes == [(192, 4, 4)]
    assert small.spec.weights_sha256 == native.spec.weights_sha256


def test_transformer_of_one_input_size_is_refused_at_another(tmp_path: Path) -> None:
    path = save(make_network(CAIT), tmp_path / "a.pth")
    with pytest.raises(ConfigError, match="input_size=64"):
        Backbone(settings(backbone=CAIT, weights=str(path), blocks=(0,)))


@pytest.mark.parametrize("name", ["resnet18", "swin_tiny_patch4_window7_224"])
def test_network_of_stages_has_no_blocks(name: str) -> None:
    with pytest.raises(ConfigError, match=r"not a transformer of equal blocks; choose stages with model\.strides"):
        Backbone(settings(backbone=name, blocks=(1,)))


@pytest.mark.parametrize("blocks", [(3, 3), (4, 1)])
def test_blocks_must_ascend(blocks: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="must ascend"):
        Backbone(settings(backbone=DEIT, blocks=blocks))


def test_block_that_does_not_exist_is_refused_with_those_that_do() -> None:
    with pytest.raises(ConfigError, match=r"blocks 0 to 11, but model\.blocks=\(12,\)"):
        Backbone(settings(backbone=DEIT, blocks=(12,)))
