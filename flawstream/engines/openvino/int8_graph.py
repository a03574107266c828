"""The flows of a model version as an int8 graph: OpenVINO IR beside the weights, run image by image on a CPU.

What is not in int8 in it, the state between a flow's steps above all, is computed in bfloat16 where the CPU has it.
Whether a version may be judged so is `training.steps.trials`'s to find out. Needs the extra `openvino`.

Shape legend: B images, C channels, H W height and width of a scale's grid, s a scale.
"""

import os
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flawstream.engines.numpy_whitening import array_normaliser
from flawstream.engines.openvino.compile import memory_errors, openvino_core, openvino_is_installed
from flawstream.fastflow.head import FastFlowHead

GRAPH_FILE, CONSTANTS_FILE = "int8.xml", "int8.bin"
"""What a version has beside its weights where its flows may run in int8."""

_Way = Callable[[Sequence[NDArray[np.generic]]], Sequence[NDArray[np.float32]]]

_CALLS_A_TRIAL = 32
_REMEMBERED_CALLS = 5
_INSTRUCTIONS = ("avx512_vnni", "avx_vnni", "amx_int8")


def int8_pays() -> bool:
    """Tell whether int8 graphs run here and are worth it: without instructions for them float32 is as fast."""
    return openvino_is_installed() and any(torch.cpu.get_capabilities().get(name) for name in _INSTRUCTIONS)


def write_int8(graph: Any) -> dict[str, bytes]:
    """Write a graph, an `openvino.Model` from `head_graph.flows_graph`, and return the files by name."""
    import openvino  # noqa: PLC0415 - an optional extra, installed where there is a graph

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        openvino.serialize(graph, folder / GRAPH_FILE, folder / CONSTANTS_FILE)
        return {file: (folder / file).read_bytes() for file in (GRAPH_FILE, CONSTANTS_FILE)}


class Int8Graph:
    """A written graph, compiled: features of each scale in, grids out. Concurrent calls wait for one another.

    It takes one image: a batch has one image on each thread. A batch of one runs on all threads, layer by layer or
    scale by scale, whichever was faster lately: that depends on how near the cores are to one another, and changes on
    a virtual machine while it runs.

    Args:
        files: What `write_int8` gave.
        threads: CPU threads; 0 takes all.

    Raises:
        ConfigError: OpenVINO is not installed.
        RuntimeError: OpenVINO cannot read the files.
    """

    def __init__(self, files: Mapping[str, bytes], threads: int = 0) -> None:
        import openvino  # noqa: PLC0415 - an optional extra

        self._turn = threading.Lock()
        core = openvino_core()
        graph = core.read_model(files[GRAPH_FILE], files[CONSTANTS_FILE])
        threads = threads or os.cpu_count() or 1
        bfloat16 = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        config = {"INFERENCE_PRECISION_HINT": "bf16" if bfloat16 else "f32", "INFERENCE_NUM_THREADS": threads}
        self._shapes = [tuple(place.shape)[1:] for place in graph.outputs]
        compiled_whole = core.compile_model(graph, "CPU", config | {"NUM_STREAMS": 1})
        self._one_image: _Way = lambda inputs: list(compiled_whole(inputs).values())
        flows = cut(graph)
        if 1 < threads <= len(flows):
            single = config | {"NUM_STREAMS": 1, "ENABLE_CPU_PINNING": False, "INFERENCE_NUM_THREADS": 1}
            compiled_flows = [core.compile_model(flow, "CPU", single) for flow in flows]
            self._one_image = Faster(self._one_image, _ScaleByScale(compiled_flows, threads=threads))
        self._batch: Any = None
        if threads > 1:
            compiled = core.compile_model(graph, "CPU", config | {"NUM_STREAMS": threads})
            self._batch = openvino.AsyncInferQueue(compiled, threads)
            self._batch.set_callback(_take)

    def __call__(self, *inputs: NDArray[np.generic]) -> list[NDArray[np.float32]]:
        """Run the graph; every input and output has the batch dimension first, of any size.

        Raises:
            MemoryError: There is no memory for it.
        """
        count = len(inputs[0])
        found = [np.empty((count, *shape), np.float32) for shape in self._shapes]
        with self._turn, memory_errors():
            if count == 1 or self._batch is None:
                for row in range(count):
                    results = self._one_image([values[row : row + 1] for values in inputs])
                    for index, whole in enumerate(found):
                        whole[row] = results[index][0]
            else:
                for row in range(count):
                    self._batch.start_async([values[row : row + 1] for values in inputs], (found, row))
                self._batch.wait_all()
        return found


class Faster:
    """Of two ways to do the same, the one that was faster lately; the other is tried now and then.

    A way is as fast as the fastest of its last calls: a call after a pause, with cold caches, says nothing of it.

    Args:
        ways: Both.
        clock: Seconds.
    """

    def __init__(self, *ways: "_Way", clock: Callable[[], float] = time.perf_counter) -> None:
        self._ways, self._clock = ways, clock
        self._took_s = [deque[float](maxlen=_REMEMBERED_CALLS) for _ in ways]
        self._calls = 0

    def __call__(self, inputs: Sequence[NDArray[np.generic]]) -> Sequence[NDArray[np.float32]]:
        """Do it."""
        self._calls += 1
        order = sorted(range(len(self._ways)), key=lambda way: min(self._took_s[way], default=0.0))
        chosen = order[1] if self._calls % _CALLS_A_TRIAL == 0 else order[0]
        began_s = self._clock()
        results = self._ways[chosen](inputs)
        self._took_s[chosen].append(self._clock() - began_s)
        return results


class _ScaleByScale:
    """One image with a thread for the flow of each scale.

    Threads that share a layer wait for one another at its end, and a flow has dozens of layers; so they wait once.
    """

    def __init__(self, flows: Sequence[Any], *, threads: int) -> None:
        self._flows = flows
        self._pool = ThreadPoolExecutor(threads, "int8")

    def __call__(self, inputs: Sequence[NDArray[np.generic]]) -> list[NDArray[np.float32]]:
        return list(self._pool.map(_run, self._flows, inputs))


def _run(compiled: Any, values: NDArray[np.generic]) -> NDArray[np.float32]:
    result: NDArray[np.float32] = compiled([values])[0]
    return result


def cut(graph: Any) -> list[Any]:
    """Cut a graph of flows into one graph for each scale.

    Args:
        graph: An `openvino.Model` as `Int8Graph` takes it.
    """
    import openvino  # noqa: PLC0415 - an optional extra

    results, places = graph.get_results(), graph.get_parameters()
    return [openvino.Model([result], [place]) for result, place in zip(results, places, strict=True)]


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
