"""Which engine a setting names on this machine."""

import torch

from flawstream.compiled import openvino_is_installed
from flawstream.fastflow.backbone import Backbone
from schemas.errors import ConfigError
from serving.engines.engine import Engine
from serving.engines.openvino_engine import OpenvinoEngine
from serving.engines.torch_engine import TorchEngine


def resolve_engine(name: str) -> str:
    """Turn `auto` into the fastest engine present: torch on a GPU, else openvino where installed, else torch.

    Raises:
        ConfigError: The engine named is not installed.
    """
    if name == "auto":
        return "openvino" if openvino_is_installed() and not torch.cuda.is_available() else "torch"
    if name == "openvino" and not openvino_is_installed():
        raise ConfigError("detector.engine=openvino is not installed; pip install 'flawstream[openvino]', or use auto")
    return name


def make_engine(name: str, backbone: Backbone) -> Engine:
    """Start an engine on a backbone.

    Args:
        name: `auto`, `torch` or `openvino`.
        backbone: The frozen network.

    Raises:
        ConfigError: The engine named is not installed.
    """
    if resolve_engine(name) == "openvino":
        return OpenvinoEngine(backbone)
    return TorchEngine(backbone)
