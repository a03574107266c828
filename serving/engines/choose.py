"""Which engine a setting names on this machine."""

import importlib.util
from collections.abc import Callable

import torch

from flawstream.compiled import openvino_is_installed
from flawstream.fastflow.backbone import Backbone
from flawstream.ncnn_graphs import ncnn_is_installed, require_ncnn
from schemas.errors import ConfigError
from schemas.settings import DetectorSettings
from serving.engines.engine import Engine
from serving.engines.ncnn_engine import NcnnEngine
from serving.engines.openvino_engine import OpenvinoEngine
from serving.engines.torch_engine import TorchEngine


def resolve_engine(name: str) -> str:
    """Turn `auto` into the fastest engine present: torch on a GPU, else ncnn, openvino or torch, the first installed.

    Raises:
        ConfigError: The engine named is not installed.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return "torch"
        return "ncnn" if ncnn_is_installed() else "openvino" if openvino_is_installed() else "torch"
    if name == "ncnn":
        require_ncnn()
    if name == "openvino" and not openvino_is_installed():
        raise ConfigError("detector.engine=openvino is not installed; pip install 'flawstream[openvino]', or use auto")
    if name == "triton" and importlib.util.find_spec("tritonclient") is None:
        raise ConfigError("detector.engine=triton needs a client; pip install 'flawstream[triton]', or use auto")
    return name


def make_engine(settings: DetectorSettings, open_backbone: Callable[[], Backbone]) -> Engine:
    """Start the engine that the settings name.

    Args:
        settings: Which engine, and where it is if it is elsewhere.
        open_backbone: Loads the frozen network; not called where the engine is elsewhere and has its own.

    Raises:
        ConfigError: The engine named is not installed or cannot run the backbone, or its server has no models of ours.
        WeightsError: The backbone's weights cannot be had.
        RegistryError: The backbone's weights are damaged.
        TransientError: The engine is elsewhere and does not answer.
    """
    match resolve_engine(settings.engine):
        case "triton":
            from serving.engines.triton_engine import TritonEngine  # noqa: PLC0415 - an optional extra

            return TritonEngine(settings.triton_url, settings.triton_timeout_s)
        case "ncnn":
            return NcnnEngine(open_backbone())
        case "openvino":
            return OpenvinoEngine(open_backbone())
        case _:
            return TorchEngine(open_backbone())
