"""Choice of the engine by the settings and by what is installed."""

import importlib.util
from collections.abc import Callable
from typing import Literal

import torch

from flawstream.engines.ncnn.engine import NcnnEngine
from flawstream.engines.ncnn.graphs import ncnn_is_installed, require_ncnn
from flawstream.engines.openvino.compile import openvino_is_installed
from flawstream.engines.openvino.engine import OpenvinoEngine
from flawstream.engines.openvino.int8_graph import int8_pays
from flawstream.engines.protocol import Engine
from flawstream.engines.torch_engine import TorchEngine
from flawstream.fastflow.backbone import Backbone
from schemas.errors import ConfigError
from schemas.settings import DetectorSettings


def resolve_engine(name: str) -> str:
    """Resolve `auto` to the fastest engine: torch on a GPU, else the first installed of ncnn, openvino and torch.

    Raises:
        ConfigError: The engine is not installed.
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
        raise ConfigError("detector.engine=triton needs its client; pip install 'flawstream[triton]', or use auto")
    return name


def make_engine(settings: DetectorSettings, open_backbone: Callable[[], Backbone], threads: int = 0) -> Engine:
    """Create the engine of the settings.

    Args:
        settings: Engine, precision, and the URL of a Triton server.
        open_backbone: Loads the backbone; not called for Triton, whose server has it.
        threads: CPU threads of ncnn and OpenVINO; 0: all.

    Raises:
        ConfigError: The engine is not installed, does not support the backbone or the precision, or the Triton server
            has no model repository of flawstream.
        WeightsError: The backbone's weights cannot be loaded.
        RegistryError: The backbone's weights are damaged.
        TransientError: The Triton server does not answer.
    """
    int8 = settings.precision == "auto" and int8_pays()
    name = resolve_engine(settings.engine)
    if settings.precision == "bf16" and name in ("ncnn", "triton"):
        raise ConfigError(f"detector.precision=bf16 needs the engine openvino or torch, but detector.engine is {name}")
    match name:
        case "triton":
            from flawstream.engines.triton_engine import TritonEngine  # noqa: PLC0415 - an optional extra

            return TritonEngine(settings.triton_url, settings.triton_timeout_s)
        case "ncnn":
            return NcnnEngine(open_backbone(), int8=int8, threads=threads)
        case "openvino":
            precision: Literal["f32", "bf16"] = "bf16" if settings.precision == "bf16" else "f32"
            return OpenvinoEngine(open_backbone(), precision=precision, int8=int8, threads=threads)
        case _:
            half = _half_precision(settings)
            return TorchEngine(open_backbone(), half)


def make_local_engine(settings: DetectorSettings, open_backbone: Callable[[], Backbone], threads: int = 0) -> Engine:
    """Create the engine that training calibrates and evaluates with: the one that will serve, but always local.

    In place of Triton, which cannot have a version before its calibration, a local engine computes in float32 too.
    """
    if settings.engine == "triton":
        settings = settings.model_copy(update={"engine": "auto", "precision": "f32"})
    return make_engine(settings, open_backbone, threads)


def quiet_torch(engine: Engine) -> None:
    """Limit torch to one thread if another library computes: torch's idle threads spin (5 ms per batch).

    For processes that serve or evaluate. Training on the CPU needs torch's threads.
    """
    if not isinstance(engine, TorchEngine):
        torch.set_num_threads(1)


def _half_precision(settings: DetectorSettings) -> torch.dtype | None:
    """Choose the arithmetic of torch's convolutions: float16 or float32 on a GPU, float32 or bfloat16 on a CPU.

    Raises:
        ConfigError: bfloat16 on a GPU.
    """
    if not torch.cuda.is_available():
        return torch.bfloat16 if settings.precision == "bf16" else None
    if settings.precision == "bf16":
        raise ConfigError(
            "detector.precision=bf16 is not supported on a GPU: on an NVIDIA H200 it changed 9 of 489 verdicts and "
            "raised false alarms from 3.4 to 5.1 %; use auto, which computes convolutions in float16, or f32"
        )
    return torch.float16 if settings.precision == "auto" else None
