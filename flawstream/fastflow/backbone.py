"""The frozen pretrained network, pixels to features at several scales: any timm model with stages or blocks.

Shape legend: B images, S side of an image in pixels, C channels, H W height and width of a scale's grid, s a scale.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import timm
import torch
from timm.models.efficientnet import EfficientNetFeatures
from timm.models.mobilenetv3 import MobileNetV3Features
from torch import Tensor, nn

from flawstream.fastflow.int8_backbone import to_int8
from flawstream.fastflow.weights import (
    PACKAGED_BACKBONES,
    digest,
    load_weights,
    read_package,
    read_state_dict,
    resolve_source,
)
from schemas.errors import ConfigError, WeightsError, one_line
from schemas.manifest import BackboneSpec
from schemas.settings import ModelSettings

_CURE = "model.weights must be auto, package, timm, or the path of a .safetensors, .pth or .pt state dict"


class Backbone(nn.Module):
    """Computes features of the chosen stages or blocks; the layers after the last of them are cut off.

    Normalisation of pixels is part of the graph, so engines receive plain pixels.

    Args:
        settings: Network, weights, layers and input size.
        tensors: The weights, which `settings.weights` then only names; None: load them from `settings.weights`.

    Attributes:
        spec: The description for the manifest.

    Raises:
        ConfigError: The network or a layer does not exist, or does not fit the input size.
        WeightsError: The weights cannot be loaded.
    """

    def __init__(self, settings: ModelSettings, tensors: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        source = settings.weights if tensors is not None else resolve_source(settings.backbone, settings.weights)
        network = make_network(settings, pretrained=tensors is None and source == "timm")
        if tensors is not None:
            load_weights(network.module, tensors, source)
        elif source == "package":
            load_weights(network.module, read_package(settings.backbone), f"the package of {settings.backbone}")
        elif source != "timm":
            load_weights(
                network.module, read_state_dict(Path(source), f"backbone weights from {source}", _CURE), source
            )
        weights = source if source in ("timm", "package") else Path(source).name
        self.spec = network.spec(settings, weights, digest(network.module))
        if isinstance(network.module, BlockFeatures):
            network.module.set_input_size(settings.input_size)  # after the digest, which is of the original weights
        self.network = network.module.eval().requires_grad_(requires_grad=False)
        self.shift = nn.Buffer(torch.tensor(network.mean).view(1, 3, 1, 1) * 255)
        self.factor = nn.Buffer(1 / (torch.tensor(network.std).view(1, 3, 1, 1) * 255))
        if settings.arithmetic == "int8":
            self.network = to_int8(self.network, self.shift, self.factor, settings.input_size)
        _check_shapes(self)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Compute features.

        Args:
            images: (B, S, S, 3) RGB in grey levels, of any dtype.

        Returns:
            One (B, C_s, H_s, W_s) float tensor per scale: stages finest first, or blocks in their order.
        """
        pixels = images.permute(0, 3, 1, 2).to(self.shift.dtype)
        features: list[Tensor] = self.network((pixels - self.shift) * self.factor)
        return list(features)


class BlockFeatures(nn.Module):
    """Computes the patch tokens of a transformer after the chosen blocks, with the network's last norm applied.

    Source: FastFlow, table 6: block 7 of DeiT, block 40 of CaiT. Class and distillation tokens are dropped.

    Args:
        model: A complete timm transformer; blocks after the last chosen one are cut off.
        blocks: Indices from 0, ascending.
    """

    def __init__(self, model: nn.Module, blocks: tuple[int, ...]) -> None:
        super().__init__()
        model.prune_intermediate_layers(list(blocks), prune_norm=False)  # type: ignore[operator]
        self.model = model
        self.blocks = list(blocks)

    def set_input_size(self, side: int) -> None:
        """Resample the position embedding to another input size, if timm supports it."""
        size = (side, side)
        if hasattr(self.model, "set_input_size") and tuple(self.model.patch_embed.img_size) != size:  # type: ignore[arg-type,union-attr]
            self.model.set_input_size(img_size=size)  # type: ignore[operator]

    def forward(self, x: Tensor) -> list[Tensor]:
        """Map (B, 3, S, S) normalised pixels to one (B, C, H, W) tensor per block."""
        features: list[Tensor] = self.model.forward_intermediates(  # type: ignore[operator]
            x, indices=self.blocks, norm=True, output_fmt="NCHW", intermediates_only=True
        )
        return features


@dataclass(frozen=True, slots=True)
class FeatureNetwork:
    """A timm network that returns features, and its properties.

    Attributes:
        module: (B, 3, S, S) normalised pixels to one (B, C_s, H_s, W_s) tensor per scale.
        channels: C_s.
        strides: S / H_s, pixels.
        mean: Mean per colour channel, of pixels in [0, 1].
        std: Standard deviation per colour channel, of pixels in [0, 1].
    """

    module: nn.Module
    channels: tuple[int, ...]
    strides: tuple[int, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def spec(self, settings: ModelSettings, weights: str, weights_sha256: str) -> BackboneSpec:
        """Describe the network for a manifest."""
        return BackboneSpec(
            name=settings.backbone,
            weights=weights,
            weights_sha256=weights_sha256,
            strides=self.strides,
            blocks=settings.blocks,
            channels=self.channels,
            input_size=settings.input_size,
            resize=settings.resize,
            mean=self.mean,
            std=self.std,
            arithmetic=settings.arithmetic,
        )


def make_network(settings: ModelSettings, *, pretrained: bool) -> FeatureNetwork:
    """Create a network that returns the features of the chosen layers, on torch's default device.

    Args:
        settings: Network and layers.
        pretrained: Whether timm loads the weights; else they are random.

    Raises:
        ConfigError: The network or a layer does not exist.
        WeightsError: timm cannot load its weights.
    """
    known = timm.list_models()
    if settings.backbone not in known:
        near = get_close_matches(settings.backbone, known, n=8)
        hint = f"; similar names: {', '.join(near)}" if near else ""
        raise ConfigError(f"timm has no model {settings.backbone!r}{hint}. timm.list_models() lists all")
    return (_make_blocks if settings.blocks else _make_stages)(settings, pretrained=pretrained)


def _make_stages(settings: ModelSettings, *, pretrained: bool) -> FeatureNetwork:
    if list(settings.strides) != sorted(set(settings.strides)):
        raise ConfigError(f"model.strides={settings.strides} must ascend, each stride once")
    try:
        with torch.device("meta"):
            whole = timm.create_model(settings.backbone, features_only=True, pretrained=False)
    except Exception as error:
        raise ConfigError(
            f"timm cannot take features from the stages of {settings.backbone} ({one_line(error)}); "
            "choose another model.backbone"
        ) from error
    available = whole.feature_info.reduction()
    missing = [stride for stride in settings.strides if stride not in available]
    if missing:
        raise ConfigError(
            f"{settings.backbone} has no stage of stride {missing}; model.strides may hold {sorted(set(available))}"
        )
    last = {stride: index for index, stride in enumerate(available)}
    indices = tuple(last[stride] for stride in settings.strides)
    network = _create(settings.backbone, pretrained=pretrained, features_only=True, out_indices=indices)
    info = network.feature_info
    if isinstance(network, EfficientNetFeatures | MobileNetV3Features):  # timm cuts the other networks itself
        network.blocks = network.blocks[: max(stage["stage"] for stage in info.get_dicts())]  # type: ignore[operator,union-attr]
    config = network.pretrained_cfg
    return FeatureNetwork(network, tuple(info.channels()), settings.strides, config["mean"], config["std"])  # type: ignore[operator,union-attr,index,arg-type]


def _make_blocks(settings: ModelSettings, *, pretrained: bool) -> FeatureNetwork:
    name, blocks = settings.backbone, settings.blocks
    if list(blocks) != sorted(set(blocks)):
        raise ConfigError(f"model.blocks={blocks} must ascend, each block once")
    with torch.device("meta"):
        whole = timm.create_model(name, pretrained=False)
    count = len(getattr(whole, "blocks", ()))
    if not count or len(whole.feature_info) != count or not hasattr(whole, "prune_intermediate_layers"):
        raise ConfigError(f"{name} is not a transformer of equal blocks; choose stages with model.strides")
    if blocks[-1] >= count:
        raise ConfigError(f"{name} has blocks 0 to {count - 1}, but model.blocks={blocks}")
    chosen = [whole.feature_info[block] for block in blocks]
    network = _create(name, pretrained=pretrained)
    config = network.pretrained_cfg
    return FeatureNetwork(
        BlockFeatures(network, blocks),
        tuple(info["num_chs"] for info in chosen),
        tuple(info["reduction"] for info in chosen),
        config["mean"],  # type: ignore[index,arg-type]
        config["std"],  # type: ignore[index,arg-type]
    )


def _create(name: str, *, pretrained: bool, **arguments: object) -> nn.Module:
    try:
        network: nn.Module = timm.create_model(name, pretrained=pretrained, **arguments)
    except Exception as error:
        raise WeightsError(
            f"timm could not load pretrained weights of {name} ({type(error).__name__}: {one_line(error)}). "
            "Choose one: (1) let timm download them, with internet access or a filled Hugging Face cache; "
            "(2) set a local state dict, model.weights=/path/to/weights.safetensors; "
            f"(3) use the default backbone {PACKAGED_BACKBONES[0]}, whose weights are installed with flawstream"
        ) from error
    return network


def load_trained_backbone(
    spec: BackboneSpec, settings: ModelSettings, tensors: Mapping[str, Tensor] | None = None
) -> Backbone:
    """Load the backbone that a model version was trained on.

    Args:
        spec: The version's backbone.
        settings: `weights` must name the file of the weights if the version's came from a file.
        tensors: The weights, if they are stored with the version: `flawstream.registry.versions`.

    Raises:
        ConfigError: The installed timm has no such network.
        WeightsError: The weights cannot be loaded, or are not those of training.
    """
    source = settings.weights
    if tensors is not None or spec.weights == "package" or (spec.weights == "timm" and source in ("auto", "package")):
        source = spec.weights
    update = {
        "backbone": spec.name,
        "strides": spec.strides,
        "blocks": spec.blocks,
        "input_size": spec.input_size,
        "resize": spec.resize,
        "arithmetic": spec.arithmetic,
        "weights": source,
    }
    backbone = Backbone(settings.model_copy(update=update), tensors)
    if backbone.spec.weights_sha256 != spec.weights_sha256:
        raise WeightsError(
            f"{spec.name} was trained on weights {spec.weights_sha256[:12]} from {spec.weights}, but "
            f"model.weights={source} has {backbone.spec.weights_sha256[:12]}; set the file that training used"
        )
    return backbone


def _check_shapes(backbone: Backbone) -> None:
    """Run the network once: some accept only one input size, pad differently or put the channels last."""
    spec = backbone.spec
    try:
        with torch.no_grad():
            features = backbone(torch.zeros((1, spec.input_size, spec.input_size, 3), dtype=torch.uint8))
    except Exception as error:
        raise ConfigError(
            f"{spec.name} does not accept images of model.input_size={spec.input_size} ({one_line(error)})"
        ) from error
    shapes = [tuple(scale.shape[1:]) for scale in features]
    if shapes != spec.feature_shapes:
        raise ConfigError(
            f"{spec.name} returns features of (channels, height, width) {shapes} for {spec.layers} at "
            f"{spec.input_size} px, expected {spec.feature_shapes}; choose another model.backbone"
        )
