"""Choice of the engine by the settings and by what is installed."""

import importlib.util
from collections.abc import Callable

import torch

from flawstream.engines.cuda.engine import CudaEngine
from flawstream.engines.device import open_device
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


def resolve_engine(name: str, device: str = "auto") -> str:
    """Resolve `auto` to the fastest engine: cuda on a GPU, else the first installed of ncnn, openvino and torch.

    Args:
        name: `detector.engine`.
        device: `detector.device`.

    Raises:
        ConfigError: The engine is not installed, or its device cannot be used.
    """
    if name == "auto":
        if open_device(device).type == "cuda":
            return "cuda"
        return "ncnn" if ncnn_is_installed() else "openvino" if openvino_is_installed() else "torch"
    if name == "cuda" and open_device(device).type != "cuda":
        raise ConfigError("detector.engine=cuda needs a GPU, and there is none that torch can use; set it to auto")
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
        settings: Engine, device, precision, and the URL of a Triton server.
        open_backbone: Loads the backbone; not called for Triton, whose server has it.
        threads: CPU threads of ncnn and OpenVINO; 0: all.

    Raises:
        ConfigError: The engine is not installed, does not support the backbone, or its device cannot be used; or the
            Triton server has no model repository of flawstream.
        WeightsError: The backbone's weights cannot be loaded.
        RegistryError: The backbone's weights are damaged.
        TransientError: The Triton server does not answer.
    """
    faster = settings.precision == "auto"
    device = open_device(settings.device)
    match resolve_engine(settings.engine, settings.device):
        case "triton":
            from flawstream.engines.triton_engine import TritonEngine  # noqa: PLC0415 - an optional extra

            return TritonEngine(settings.triton_url, settings.triton_timeout_s)
        case "cuda":
            return CudaEngine(
                _in_float32(open_backbone()), half=faster, max_batch=settings.max_batch_images, device=device
            )
        case "ncnn":
            return NcnnEngine(open_backbone(), int8=faster and int8_pays(), threads=threads)
        case "openvino":
            return OpenvinoEngine(open_backbone(), int8=faster and int8_pays(), threads=threads)
        case _:
            return TorchEngine(open_backbone(), device)


def _in_float32(backbone: Backbone) -> Backbone:
    """Refuse a backbone that no GPU computes.

    Raises:
        ConfigError: It is in int8.
    """
    if backbone.spec.arithmetic != "float32":
        raise ConfigError(
            f"the backbone {backbone.spec.summary} is for CPUs: set detector.device=cpu, or train with "
            "model.arithmetic=float32 for GPUs"
        )
    return backbone


def make_local_engine(settings: DetectorSettings, open_backbone: Callable[[], Backbone], threads: int = 0) -> Engine:
    """Create the engine that training calibrates and evaluates with: the one that will serve, but always local.

    In place of Triton, which cannot have a version before its calibration, a local engine computes in float32 too.
    """
    if settings.engine == "triton":
        settings = settings.model_copy(update={"engine": "auto", "precision": "f32"})
    return make_engine(settings, open_backbone, threads)


def quiet_torch(engine: Engine) -> None:
    """Limit torch to one thread if another library or a GPU computes: torch's idle threads spin (5 ms per batch).

    For processes that serve or evaluate. Training on the CPU needs torch's threads.
    """
    if not isinstance(engine, TorchEngine):
        torch.set_num_threads(1)
