"""Compiled OpenVINO graphs, and conversion of any torch module to one. Used by training, export and engines.

Heads are converted by `head_graph`: `convert` is for backbones and exports, of which a process converts few.
"""

import importlib.util
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from schemas.errors import ConfigError

_CONVERT_LOCK = threading.Lock()
"""Held during conversion: tracing patches torch, and warning filters are global."""

_OUT_OF_MEMORY = ("Failed to allocate", "bad_alloc")
"""Parts of OpenVINO's messages when it is out of memory; there is no exception class for it."""


def openvino_is_installed() -> bool:
    """Check whether the extra `openvino` is installed."""
    return importlib.util.find_spec("openvino") is not None


def convert(module: nn.Module, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> Any:
    """Convert a module to an `openvino.Model` with a dynamic batch size.

    Every conversion keeps memory for good, 25 MB for a head: torch registers each traced module, with its graph, for
    the life of the process, and OpenVINO's frontend keeps more.

    Args:
        module: Takes tensors and returns a tuple of tensors.
        shapes: Shapes of the inputs without the batch dimension.
        dtype: Dtype of all inputs.

    Raises:
        ConfigError: OpenVINO is not installed.
    """
    if not openvino_is_installed():
        raise ConfigError("OpenVINO is not installed; pip install 'flawstream[openvino]' or choose engine torch")
    import openvino  # noqa: PLC0415 - an optional extra

    examples = [torch.zeros((2, *shape), dtype=dtype) for shape in shapes]
    with _CONVERT_LOCK, warnings.catch_warnings(), torch.inference_mode():
        warnings.filterwarnings("ignore", "`torch.jit", FutureWarning)  # OpenVINO uses torch.jit
        # timm's transformers check shapes while traced, which is safe as only the batch size varies
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)  # type: ignore[attr-defined]
        return openvino.convert_model(
            module,
            example_input=tuple(examples),
            input=[openvino.PartialShape([-1, *shape]) for shape in shapes],
        )


@cache
def openvino_core() -> Any:
    """Return the `openvino.Core` of this process, which stays for good.

    OpenVINO's CPU plugin gives the thread that loads it a stack for signals, and frees that stack with the last of its
    core's models. With a core for each model, as `openvino.compile_model` makes one, the thread may be left with freed
    memory as its stack, and the next signal to Python, such as SIGTERM, ends the process with SIGSEGV.
    """
    import openvino  # noqa: PLC0415 - an optional extra, installed where there is a graph

    return openvino.Core()


@contextmanager
def memory_errors() -> Iterator[None]:
    """Raise `MemoryError` if OpenVINO is out of memory."""
    try:
        yield
    except RuntimeError as error:
        if any(words in str(error) for words in _OUT_OF_MEMORY):
            raise MemoryError(str(error).strip().splitlines()[-1]) from error
        raise


class CompiledGraph:
    """A compiled graph with a dynamic batch size. Not thread-safe.

    Args:
        graph: An `openvino.Model`.
        threads: CPU threads; 0: all.
    """

    def __init__(self, graph: Any, *, threads: int = 0) -> None:
        self._graph = graph
        self._threads = threads
        self._compiled = self._compile()
        self._outputs = len(self._graph.outputs)

    def __call__(self, *inputs: NDArray[np.generic]) -> list[NDArray[np.float32]]:
        """Run the graph; the batch dimension of inputs and outputs is the first.

        Raises:
            MemoryError: Out of memory for this batch size; a smaller batch may fit.
        """
        try:
            with memory_errors():
                if self._compiled is None:
                    self._compiled = self._compile()
                results = self._compiled(inputs)
        except MemoryError:
            self._compiled = None  # it would request the large batch's memory for small batches too
            raise
        return [results[index] for index in range(self._outputs)]

    def _compile(self) -> Any:
        config: dict[str, str | int] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        if self._threads:
            config["INFERENCE_NUM_THREADS"] = self._threads
        return openvino_core().compile_model(self._graph, "CPU", config)


class CompiledModule(CompiledGraph):
    """A module as a compiled graph with a dynamic batch size. Not thread-safe.

    Args:
        module: Takes tensors and returns a list of tensors.
        shapes: Shapes of the inputs without the batch dimension.
        dtype: Dtype of all inputs.
        threads: CPU threads; 0: all.

    Raises:
        ConfigError: OpenVINO is not installed.
    """

    def __init__(
        self, module: nn.Module, shapes: Sequence[tuple[int, ...]], *, dtype: torch.dtype, threads: int = 0
    ) -> None:
        super().__init__(convert(_TupleModule(module), shapes, dtype), threads=threads)


class ImageGraph:
    """A module as a compiled OpenVINO graph at batch size 1, on all threads or on one. Thread-safe.

    With one image per thread, threads need no barrier after each layer, and activations stay in a core's cache.

    Args:
        module: Takes a tensor and returns a list of tensors.
        shape: Shape of the input without the batch dimension.
        dtype: Dtype of the input.
        threads: CPU threads.

    Raises:
        ConfigError: OpenVINO is not installed.
    """

    def __init__(self, module: nn.Module, shape: tuple[int, ...], *, dtype: torch.dtype, threads: int) -> None:
        graph = convert(_TupleModule(module), [shape], dtype)
        graph.reshape([1, *shape])
        # no pinning: a pinned thread waits for its core even if another is idle
        config = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "ENABLE_CPU_PINNING": False}
        self._all_threads, self._one_thread = SimpleQueue[Any](), SimpleQueue[Any]()
        for requests, streams in ((self._all_threads, 1), (self._one_thread, threads)):
            compiled = openvino_core().compile_model(graph, "CPU", config | {"NUM_STREAMS": streams})
            for _ in range(streams):
                requests.put(compiled.create_infer_request())

    def run_on_all_threads(self, image: NDArray[np.generic]) -> list[NDArray[np.float32]]:
        """Run the graph with all threads; input and outputs have no batch dimension.

        Raises:
            MemoryError: Out of memory.
        """
        return self._run(self._all_threads, image)

    def run_on_one_thread(self, image: NDArray[np.generic]) -> list[NDArray[np.float32]]:
        """Run the graph on one thread; otherwise as `run_on_all_threads`."""
        return self._run(self._one_thread, image)

    @staticmethod
    def _run(requests: "SimpleQueue[Any]", image: NDArray[np.generic]) -> list[NDArray[np.float32]]:
        request = requests.get()
        try:
            with memory_errors():
                request.infer([image[None]], share_inputs=True)
            return [tensor.data[0].copy() for tensor in request.output_tensors]
        finally:
            requests.put(request)


class _TupleModule(nn.Module):
    """Adapts a module to the signature that the converter can trace: a tuple out."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(self.module(*inputs))
