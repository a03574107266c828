"""The device that torch computes on: a GPU where there is one, whose float32 is the CPU's. Tests run on CPUs only."""

import torch


def open_device() -> torch.device:
    """Choose the GPU where there is one, and turn TF32 off there, for this process.

    TF32 rounds the factors of a convolution or matrix product to ten bits. Statistics, thresholds and verdicts would
    depend on where they were computed: on an NVIDIA H200, maps differed from a CPU's by .03 with TF32, by 8e-6 without.

    Torch's newer setting, `fp32_precision`, is not used: once it is set, `torch.export` fails in the same process, as
    it still reads the older one (torch 2.14).
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    return torch.device("cuda")
