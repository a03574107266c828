"""The device that torch computes on: a GPU if available, without TF32. Tests run on CPUs only."""

import torch


def open_device() -> torch.device:
    """Choose the GPU if there is one, and disable TF32 for this process.

    TF32 rounds the factors of convolutions and matrix products to ten bits. Statistics, thresholds and verdicts would
    depend on the hardware: maps of an NVIDIA H200 differed from a CPU's by 0.03 with TF32, by 8e-6 without.

    Torch's newer setting `fp32_precision` is not used: once it is set, `torch.export` fails in the same process, as it
    still reads the older one (torch 2.14).
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    return torch.device("cuda")
