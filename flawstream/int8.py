"""Int8 graphs that lie beside a model version: written as OpenVINO IR, run image by image on a CPU. Extra `openvino`.

What is not in int8 in them, the state between a flow's steps above all, is computed in bfloat16 where the CPU has it.
Knows no category: whether a version may be judged so is `training.int8`'s to find out.
"""

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from flawstream.array_normalisation import array_normaliser
from flawstream.compiled import convert, memory_errors, openvino_is_installed
from flawstream.fastflow.head import FastFlowHead

GRAPH_FILE, CONSTANTS_FILE = "int8.xml", "int8.bin"
"""What a version has beside its weights where it may be judged in int8."""

_INSTRUCTIONS = ("avx512_vnni", "avx_vnni", "amx_int8")


def int8_pays() -> bool:
    """Tell whether int8 graphs run here and are worth it: without instructions for them float32 is as fast."""
    return openvino_is_installed() and any(torch.cpu.get_capabilities().get(name) for name in _INSTRUCTIONS)


def write_int8(module: nn.Module, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> dict[str, bytes]:
    """Write a module that `quantised.quantise` has been through, for one image at a time.

    Args:
        module: Takes tensors and gives a tuple of tensors.
        shapes: Of each input without the batch dimension.
        dtype: Of all inputs.

    Returns:
        The files by name.

    Raises:
        ConfigError: OpenVINO is not installed.
    """
    graph = convert(module, shapes, dtype)
    import openvino  # noqa: PLC0415 - an optional extra, there if `convert` went through
    from openvino._offline_transformations import (  # noqa: PLC0415 - what OpenVINO's own quantiser calls
        compress_quantize_weights_transformation,
    )

    graph.reshape({place: [1, *shape] for place, shape in zip(graph.inputs, shapes, strict=True)})
    compress_quantize_weights_transformation(graph)  # stores weights as int8
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        openvino.serialize(graph, folder / GRAPH_FILE, folder / CONSTANTS_FILE)
        return {file: (folder / file).read_bytes() for file in (GRAPH_FILE, CONSTANTS_FILE)}


class Int8Graph:
    """A written graph, compiled. Not for several threads at once.

    It takes one image: several are judged side by side, on a thread each, and a lone one by all threads, by a second
    compilation of the same graph.

    Args:
        files: What `write_int8` gave.
        threads: CPU threads; 0 takes all.

    Raises:
        ConfigError: OpenVINO is not installed.
        RuntimeError: OpenVINO cannot read the files.
    """

    def __init__(self, files: Mapping[str, bytes], threads: int = 0) -> None:
        import openvino  # noqa: PLC0415 - an optional extra

        core = openvino.Core()
        graph = core.read_model(files[GRAPH_FILE], files[CONSTANTS_FILE])
        threads = threads or os.cpu_count() or 1
        bfloat16 = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        config = {"INFERENCE_PRECISION_HINT": "bf16" if bfloat16 else "f32", "INFERENCE_NUM_THREADS": threads}
        self._shapes = [tuple(place.shape)[1:] for place in graph.outputs]
        self._alone = core.compile_model(graph, "CPU", config | {"NUM_STREAMS": 1})
        self._beside: Any = None
        if threads > 1:
            compiled = core.compile_model(graph, "CPU", config | {"NUM_STREAMS": threads})
            self._beside = openvino.AsyncInferQueue(compiled, threads)
            self._beside.set_callback(_take)

    def __call__(self, *inputs: NDArray[np.generic]) -> list[NDArray[np.float32]]:
        """Run the graph; every input and output has the batch dimension first, of any size.

        Raises:
            MemoryError: There is no memory for it.
        """
        count = len(inputs[0])
        found = [np.empty((count, *shape), np.float32) for shape in self._shapes]
        with memory_errors():
            if count == 1 or self._beside is None:
                for row in range(count):
                    results = self._alone([values[row : row + 1] for values in inputs])
                    for index, whole in enumerate(found):
                        whole[row] = results[index][0]
            else:
                for row in range(count):
                    self._beside.start_async([values[row : row + 1] for values in inputs], (found, row))
                self._beside.wait_all()
        return found


def _take(request: Any, place: tuple[list[NDArray[np.float32]], int]) -> None:
    found, row = place
    for index, whole in enumerate(found):
        whole[row] = request.get_output_tensor(index).data[0]


class Int8Flows:
    """A head whose flows are an int8 graph; features are normalised in float32 before it. As for threads: `Int8Graph`.

    Args:
        head: Whose normalisation it is.
        files: What `write_int8` gave.
        threads: CPU threads; 0 takes all.
    """

    def __init__(self, head: FastFlowHead, files: Mapping[str, bytes], threads: int = 0) -> None:
        self._normalise = [array_normaliser(statistics) for statistics in head.statistics]
        self._graph = Int8Graph(files, threads)

    def __call__(self, features: Sequence[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
        """Map one (B, C_s, H_s, W_s) float32 array per scale to one (B, H_s, W_s) per scale, nats per channel.

        Raises:
            MemoryError: There is no memory for it.
        """
        return self._graph(*(normalise(scale) for normalise, scale in zip(self._normalise, features, strict=True)))
