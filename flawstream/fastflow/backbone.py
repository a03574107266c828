"""The frozen pretrained network: from pixels to features at several scales. Any timm model with stages or blocks.

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

from flawstream.fastflow.weights import (
    PACKAGED_BACKBONES,
    digest,
    first_lines,
    load_weights,
    read_package,
    read_state_dict,
    resolve_source,
)
from schemas.errors import ConfigError, WeightsError
from schemas.manifest import BackboneSpec
from schemas.settings import ModelSettings

_CURE = "model.weights must be auto, package, timm, or the path of a .safetensors, .pth or .pt state dict"


class Backbone(nn.Module):
    """Features of the chosen stages or blocks; what lies past the last of them is cut off.

    Normalising is part of the graph, so that every engine is handed plain pixels.

    Args:
        settings: Which network, weights, layers and input size.
        tensors: Weights at hand; `settings.weights` is then their name. Absent: they are from where it says.

    Attributes:
        spec: What a manifest keeps of it.

    Raises:
        ConfigError: No such network, no layer that was asked for, or one that does not fit the input size.
        WeightsError: The weights cannot be had.
    """

    def __init__(self, settings: ModelSettings, tensors: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        source = settings.weights if tensors is not None else resolve_source(settings.backbone, settings.weights)
        made = make_network(settings, pretrained=tensors is None and source == "timm")
        if tensors is not None:
            load_weights(made.module, tensors, source)
        elif source == "package":
            load_weights(made.module, read_package(settings.backbone), f"the package of {settings.backbone}")
        elif source != "timm":
            load_weights(made.module, read_state_dict(Path(source), f"backbone weights from {source}", _CURE), source)
        weights = source if source in ("timm", "package") else Path(source).name
        self.spec = made.spec(settings, weights, digest(made.module))
        if isinstance(made.module, BlockFeatures):
            made.module.set_input_size(settings.input_size)  # past the digest: it is of the weights as they were had
        self.network = made.module.eval().requires_grad_(requires_grad=False)
        self.shift = nn.Buffer(torch.tensor(made.mean).view(1, 3, 1, 1) * 255)
        self.factor = nn.Buffer(1 / (torch.tensor(made.std).view(1, 3, 1, 1) * 255))
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
    """A transformer up to its last chosen block: the patch tokens after each, under the network's own last norm.

    Source: FastFlow, table 6: block 7 of DeiT, block 40 of CaiT. Class and distillation tokens do not come out.

    Args:
        model: A whole timm transformer; its later blocks are cut off.
        blocks: By index from 0, ascending.
    """

    def __init__(self, model: nn.Module, blocks: tuple[int, ...]) -> None:
        super().__init__()
        model.prune_intermediate_layers(list(blocks), prune_norm=False)  # type: ignore[operator]
        self.model = model
        self.blocks = list(blocks)

    def set_input_size(self, side: int) -> None:
        """Resample the embedding of positions where it is of another size and timm knows how."""
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
    """A timm network that gives features, and what timm says of it.

    Attributes:
        module: (B, 3, S, S) normalised pixels to one (B, C_s, H_s, W_s) tensor per scale.
        channels: C_s.
        strides: S / H_s, pixels.
        mean: Per colour channel, of pixels in [0, 1].
        std: Per colour channel, of pixels in [0, 1].
    """

    module: nn.Module
    channels: tuple[int, ...]
    strides: tuple[int, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def spec(self, settings: ModelSettings, weights: str, weights_sha256: str) -> BackboneSpec:
        """Write down what a manifest keeps."""
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
        )


def make_network(settings: ModelSettings, *, pretrained: bool) -> FeatureNetwork:
    """Make a network that gives the features of the layers asked for, on torch's default device.

    Args:
        settings: Which network, and which of its layers.
        pretrained: Whether timm loads its weights; else they are random.

    Raises:
        ConfigError: No such network, or no layer that was asked for.
        WeightsError: timm cannot load its weights.
    """
    known = timm.list_models()
    if settings.backbone not in known:
        near = get_close_matches(settings.backbone, known, n=8)
        hint = f"; near it: {', '.join(near)}" if near else ""
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
            f"timm cannot take features from the stages of {settings.backbone} ({first_lines(error)}); "
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
    if isinstance(
        network, EfficientNetFeatures | MobileNetV3Features
    ):  # the others end at the last stage by themselves
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
        raise ConfigError(f"{name} is no transformer of equal blocks; choose its stages with model.strides")
    if blocks[-1] >= count:
        raise ConfigError(f"{name} has blocks 0 to {count - 1}, and model.blocks={blocks} asks for others")
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
            f"timm could not load pretrained weights of {name} ({type(error).__name__}: {first_lines(error)}). "
            "There are three ways: (1) let timm fetch them, with internet or a filled Hugging Face cache; "
            "(2) name a local state dict, model.weights=/path/to/weights.safetensors; "
            f"(3) take the default backbone {PACKAGED_BACKBONES[0]}, whose weights are installed with flawstream"
        ) from error
    return network


def load_trained_backbone(
    spec: BackboneSpec, settings: ModelSettings, tensors: Mapping[str, Tensor] | None = None
) -> Backbone:
    """Load the backbone that a model version was trained on.

    Args:
        spec: The version's.
        settings: Its `weights` may name a file with the version's weights; it must where they came from one.
        tensors: The version's weights, where they lie beside it: `flawstream.registry.versions`.

    Raises:
        ConfigError: The installed timm has no such network.
        WeightsError: The weights cannot be had, or are not those of training.
    """
    named = settings.weights
    if tensors is not None or spec.weights == "package" or (spec.weights == "timm" and named in ("auto", "package")):
        named = spec.weights
    changes = {
        "backbone": spec.name,
        "strides": spec.strides,
        "blocks": spec.blocks,
        "input_size": spec.input_size,
        "resize": spec.resize,
        "weights": named,
    }
    backbone = Backbone(settings.model_copy(update=changes), tensors)
    if backbone.spec.weights_sha256 != spec.weights_sha256:
        raise WeightsError(
            f"{spec.name} was trained on weights {spec.weights_sha256[:12]} from {spec.weights}, and those found by "
            f"model.weights={named} are {backbone.spec.weights_sha256[:12]}; name the file that training used"
        )
    return backbone


def _check_shapes(backbone: Backbone) -> None:
    """Run the network once: some take one input size alone, some pad otherwise or put the channels last."""
    spec = backbone.spec
    try:
        with torch.no_grad():
            features = backbone(torch.zeros((1, spec.input_size, spec.input_size, 3), dtype=torch.uint8))
    except Exception as error:
        raise ConfigError(
            f"{spec.name} does not take images of model.input_size={spec.input_size} ({first_lines(error)})"
        ) from error
    shapes = [tuple(scale.shape[1:]) for scale in features]
    if shapes != spec.feature_shapes:
        raise ConfigError(
            f"{spec.name} gives features of (channels, height, width) {shapes} for {spec.layers} at "
            f"{spec.input_size} px, and {spec.feature_shapes} are needed; choose another model.backbone"
        )
