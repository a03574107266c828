"""The device that torch computes on: a GPU if available, without TF32."""

import torch

from schemas.errors import ConfigError


def open_device(name: str = "auto") -> torch.device:
    """Choose a device, and disable TF32 for this process if it is a GPU.

    TF32 rounds the factors of convolutions and matrix products to ten bits. Statistics, thresholds and verdicts would
    depend on the hardware: maps of an NVIDIA H200 differed from a CPU's by 0.03 with TF32, by 8e-6 without.

    Torch's newer setting `fp32_precision` is not used: once it is set, `torch.export` fails in the same process, as it
    still reads the older one (torch 2.14).

    Args:
        name: `auto`: the GPU if there is one, else the CPU; `cpu`, `cuda`, or `cuda:1` and so on.

    Raises:
        ConfigError: The GPU that was asked for cannot be used.
    """
    available = torch.cuda.is_available()
    if name == "cpu" or (name == "auto" and not available):
        return torch.device("cpu")
    if not available:
        raise ConfigError(f"detector.device={name} cannot be used ({_reason()}); set it to auto or cpu")
    device = torch.device("cuda" if name == "auto" else name)
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise ConfigError(f"detector.device={name}, but there are {torch.cuda.device_count()} GPUs, from cuda:0")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    return device


def _reason() -> str:
    """Ask torch why there is no GPU: no driver, one that is too old, or a build without CUDA."""
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]  # torch
    except (RuntimeError, AssertionError) as error:
        return str(error).strip().splitlines()[0]
    return "torch reports no GPU"
