"""Errors of CUDA and its libraries, distinguished by their texts: torch has one exception class for most of them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from schemas.errors import DeviceLostError

_OUT_OF_MEMORY = (
    "out of memory",  # the driver and torch's allocator
    "_ALLOC_FAILED",  # cuBLAS and cuDNN: CUBLAS_STATUS_ALLOC_FAILED, CUDNN_STATUS_ALLOC_FAILED
    "CUBLAS_STATUS_NOT_INITIALIZED",  # of a handle for which there is no memory
    "cudaErrorMemoryAllocation",
    "unable to find an engine to execute this computation",  # cuDNN, where no workspace fits
    "Unable to find a valid cuDNN algorithm",  # the same
)
_LOST = (
    "CUDA error",
    "Triton Error [CUDA]",
    "CUDNN_STATUS_EXECUTION_FAILED",
    "CUBLAS_STATUS_EXECUTION_FAILED",
    "CUBLAS_STATUS_INTERNAL",
)


@contextmanager
def cuda_errors() -> Iterator[None]:
    """Turn errors of CUDA into those that callers act on.

    Raises:
        MemoryError: The device, or a library on it, is out of memory: less may fit.
        DeviceLostError: The process can no longer use the device; every later call fails too.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        reason = text.strip().splitlines()[0] if text.strip() else type(error).__name__
        if _is_out_of_memory(error):
            raise MemoryError(reason) from error
        if any(words in text for words in _LOST):
            raise DeviceLostError(
                f"the GPU failed ({reason}); this process cannot use it any more and must be replaced"
            ) from error
        raise


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Look at the errors before it too: a capture that runs out of memory ends with an error of the capture."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY):
            return True
        error = error.__context__
    return False
