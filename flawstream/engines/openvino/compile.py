"""Torch modules as OpenVINO graphs: the fastest way to run them on a CPU. Used by training and the OpenVINO engine."""

import importlib.util
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from schemas.errors import ConfigError

_CONVERTING = threading.Lock()
"""Tracing patches torch while it lasts, and warnings are filtered for the whole process: one at a time."""

_OUT_OF_MEMORY = ("Failed to allocate", "bad_alloc")
"""What OpenVINO's errors say where memory runs out; there is no class for it."""


def openvino_is_installed() -> bool:
    """Tell whether the extra `openvino` is there."""
    return importlib.util.find_spec("openvino") is not None


def convert(module: nn.Module, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> Any:
    """Turn a module into an `openvino.Model` of any batch size.

    Args:
        module: Takes tensors and gives a tuple of tensors.
        shapes: Of each input without the batch dimension.
        dtype: Of all inputs.

    Raises:
        ConfigError: OpenVINO is not installed.
    """
    if not openvino_is_installed():
        raise ConfigError("OpenVINO is not installed; pip install 'flawstream[openvino]' or choose engine torch")
    import openvino  # noqa: PLC0415 - an optional extra

    examples = [torch.zeros((2, *shape), dtype=dtype) for shape in shapes]
    with _CONVERTING, warnings.catch_warnings(), torch.inference_mode():
        warnings.filterwarnings("ignore", "`torch.jit", FutureWarning)  # how OpenVINO converts; not ours to change
        # timm's transformers check shapes while they are traced: the sizes are fixed, only the batch varies
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)  # type: ignore[attr-defined]
        return openvino.convert_model(
            module,
            example_input=tuple(examples),
            input=[openvino.PartialShape([-1, *shape]) for shape in shapes],
        )


@contextmanager
def memory_errors() -> Iterator[None]:
    """Call it `MemoryError` where OpenVINO's memory runs out."""
    try:
        yield
    except RuntimeError as error:
        if any(words in str(error) for words in _OUT_OF_MEMORY):
            raise MemoryError(str(error).strip().splitlines()[-1]) from error
        raise


class CompiledModule:
    """A module as a compiled OpenVINO graph of any batch size. Not for several threads at once.

    Args:
        module: Takes tensors, or one list of tensors, and gives a list of tensors.
        shapes: Of each input without the batch dimension.
        dtype: Of all inputs.
        listed: Whether the module takes one list.
        threads: CPU threads; 0 takes all.
        precision: In what it computes; bf16 has no effect where the CPU has no such instructions.

    Raises:
        ConfigError: OpenVINO is not installed.
    """

    def __init__(
        self,
        module: nn.Module,
        shapes: Sequence[tuple[int, ...]],
        *,
        dtype: torch.dtype,
        listed: bool = False,
        threads: int = 0,
        precision: Literal["f32", "bf16"] = "f32",
    ) -> None:
        self._precision = precision
        self._graph = convert(_Flat(module, listed=listed), shapes, dtype)
        self._threads = threads
        self._compiled = self._compile()
        self._outputs = len(self._graph.outputs)

    def __call__(self, *inputs: NDArray[np.generic]) -> list[NDArray[np.float32]]:
        """Run the graph; every input and output has the batch dimension first.

        Raises:
            MemoryError: There is no memory for so large a batch; the graph can be run again with a smaller one.
        """
        try:
            with memory_errors():
                if self._compiled is None:
                    self._compiled = self._compile()
                results = self._compiled(inputs)
        except MemoryError:
            self._compiled = None  # it would go on to ask for the large batch's memory, with small batches too
            raise
        return [results[index] for index in range(self._outputs)]

    def _compile(self) -> Any:
        import openvino  # noqa: PLC0415 - an optional extra, there if `convert` went through

        config: dict[str, str | int] = {"INFERENCE_PRECISION_HINT": self._precision, "PERFORMANCE_HINT": "LATENCY"}
        if self._threads:
            config["INFERENCE_NUM_THREADS"] = self._threads
        return openvino.compile_model(self._graph, "CPU", config)


class ImageGraph:
    """A module as a compiled OpenVINO graph that takes one image: on all threads, or several images on a thread each.

    Threads that share no layer do not wait for one another, and what a layer hands on stays in a core's cache. Several
    threads may call it at once.

    Args:
        module: Takes a tensor, and gives a list of tensors.
        shape: Of the input without the batch dimension.
        dtype: Of the input.
        threads: CPU threads.

    Raises:
        ConfigError: OpenVINO is not installed.
    """

    def __init__(self, module: nn.Module, shape: tuple[int, ...], *, dtype: torch.dtype, threads: int) -> None:
        graph = convert(_Flat(module, listed=False), [shape], dtype)
        import openvino  # noqa: PLC0415 - an optional extra, there if `convert` went through

        graph.reshape([1, *shape])
        # a thread that is tied to a core waits for it while others use it, though another core may be free
        config = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "ENABLE_CPU_PINNING": False}
        self._alone, self._beside = SimpleQueue[Any](), SimpleQueue[Any]()
        for requests, streams in ((self._alone, 1), (self._beside, threads)):
            compiled = openvino.compile_model(graph, "CPU", config | {"NUM_STREAMS": streams})
            for _ in range(streams):
                requests.put(compiled.create_infer_request())

    def alone(self, image: NDArray[np.generic]) -> list[NDArray[np.float32]]:
        """Run the graph on all threads; neither input nor outputs have a batch dimension.

        Raises:
            MemoryError: There is no memory for it.
        """
        return self._run(self._alone, image)

    def beside(self, image: NDArray[np.generic]) -> list[NDArray[np.float32]]:
        """Run the graph on one thread; else as `alone`."""
        return self._run(self._beside, image)

    @staticmethod
    def _run(requests: "SimpleQueue[Any]", image: NDArray[np.generic]) -> list[NDArray[np.float32]]:
        request = requests.get()
        try:
            with memory_errors():
                request.infer([image[None]], share_inputs=True)
            return [tensor.data[0].copy() for tensor in request.output_tensors]
        finally:
            requests.put(request)


class _Flat(nn.Module):
    """Tensors in, a tuple out, whatever the module takes: what the converter can trace."""

    def __init__(self, module: nn.Module, *, listed: bool) -> None:
        super().__init__()
        self.module = module
        self.listed = listed

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(self.module(list(inputs)) if self.listed else self.module(*inputs))
