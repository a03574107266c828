"""The choice of how a mixed batch is whitened: by a Triton kernel that reads each image's matrices where they lie.

Plain torch copies the matrices of every image first: 10 MB an image for the default preset.
"""

import importlib.util
import logging

import torch

from flawstream.fastflow.stacked import Whiten, whiten_plainly

log = logging.getLogger(__name__)


def choose_whiten(device: torch.device) -> Whiten:
    """Choose the kernel on a GPU where Triton can compile it, which needs a C compiler; else plain torch."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return whiten_plainly
    from flawstream.engines.cuda.whiten_kernel import whiten_in_place  # noqa: PLC0415 - needs Triton

    try:
        ones = torch.ones((1, 1, 1, 1), device=device)
        whiten_in_place(ones, ones[..., None], torch.zeros(1, dtype=torch.int64, device=device))
    except Exception as error:  # noqa: BLE001 - Triton and the compilers that it calls raise any
        log.warning("Triton cannot compile a kernel here (%s): whitening copies its matrices", str(error)[:200])
        return whiten_plainly
    return whiten_in_place
