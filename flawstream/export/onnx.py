"""Export to ONNX with torch's exporter. Needs the extra `export`."""

import importlib.util
import threading
from collections.abc import Mapping

import torch

from flawstream.export.graph import Graph
from schemas.errors import ConfigError

OPSET = 18
"""Pinned: readable by ONNX Runtime 1.14 and later, and so by Triton 23.02 and later."""

_EXPORTING = threading.Lock()
"""The exporter patches torch while it runs."""


def to_onnx(graph: Graph, metadata: Mapping[str, str]) -> bytes:
    """Export a graph as one ONNX file with its weights and a dynamic batch size.

    Args:
        graph: The graph to export.
        metadata: Key-value pairs for the file's metadata.

    Raises:
        ConfigError: The extra is not installed.
    """
    if importlib.util.find_spec("onnxscript") is None:
        raise ConfigError("ONNX files are written with onnxscript, which is missing; pip install 'flawstream[export]'")
    batch = torch.export.Dim("batch")
    with _EXPORTING, torch.no_grad():
        # traced here: torch.onnx.export would fall back to a fixed batch size where this fails
        program = torch.export.export(
            graph.module,
            graph.examples(),
            dynamic_shapes=(tuple({0: batch} for _ in graph.inputs),),
            strict=False,
        )
        exported = torch.onnx.export(
            program,
            dynamo=True,
            input_names=[tensor.name for tensor in graph.inputs],
            output_names=[tensor.name for tensor in graph.outputs],
            opset_version=OPSET,
            verbose=False,
        )
    assert exported is not None  # noqa: S101 - None only if given a file to write
    document = exported.model_proto
    for value in (*document.graph.input, *document.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    for name, text in metadata.items():
        document.metadata_props.add(key=name, value=text)
    data: bytes = document.SerializeToString()
    return data
