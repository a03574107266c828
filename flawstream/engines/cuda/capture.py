"""Capture of CUDA graphs, one at a time in a process.

CUDA forbids a wait for the whole device while any stream is captured, in whatever thread, and torch waits for the
device when a capture begins. Other threads may launch and replay meanwhile.
"""

import threading
from collections.abc import Callable
from typing import Any

import torch

_CAPTURING = threading.Lock()


def capture(run: Callable[[], object], stream: torch.cuda.Stream, pool: Any = None) -> torch.cuda.CUDAGraph:
    """Capture what a function launches, without running it.

    Args:
        run: Launches work on the current stream. It has run before: libraries choose their kernels at the first call.
        stream: The stream to capture on.
        pool: Memory that graphs share which never run at once: `torch.cuda.graph_pool_handle`.

    Raises:
        torch.OutOfMemoryError: The graph's memory does not fit.
    """
    graph = torch.cuda.CUDAGraph()
    with (
        _CAPTURING,
        torch.cuda.stream(stream),  # restores the thread's stream if the capture fails
        torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
    ):
        run()
    return graph
