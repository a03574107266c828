"""Graphs as ONNX files, through torch's exporter. Needs the extra `export`."""

import importlib.util
import threading
from collections.abc import Mapping

import torch

from flawstream.export.graph import Graph
from schemas.errors import ConfigError

OPSET = 18
"""Pinned: what ONNX Runtime 1.14 and later read, and so any Triton since 23.02."""

_EXPORTING = threading.Lock()
"""The exporter patches torch while it lasts."""


def to_onnx(graph: Graph, told: Mapping[str, str]) -> bytes:
    """Write a graph as one ONNX file, weights inside; any batch size.

    Args:
        graph: What to write.
        told: Text by name that stands in the file's metadata.

    Raises:
        ConfigError: The extra is not installed.
    """
    if importlib.util.find_spec("onnxscript") is None:
        raise ConfigError("ONNX files are written with onnxscript, which is missing; pip install 'flawstream[export]'")
    batch = torch.export.Dim("batch")
    with _EXPORTING, torch.no_grad():
        # traced here and not in torch.onnx.export, which falls back to a graph of one batch size where this would fail
        program = torch.export.export(
            graph.module,
            graph.examples(),
            dynamic_shapes=(tuple({0: batch} for _ in graph.inputs),),
            strict=False,
        )
        written = torch.onnx.export(
            program,
            dynamo=True,
            input_names=[port.name for port in graph.inputs],
            output_names=[port.name for port in graph.outputs],
            opset_version=OPSET,
            verbose=False,
        )
    assert written is not None  # noqa: S101 - as ever where no file is named
    document = written.model_proto
    for value in (*document.graph.input, *document.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    for name, text in told.items():
        document.metadata_props.add(key=name, value=text)
    data: bytes = document.SerializeToString()
    return data
