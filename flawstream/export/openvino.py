"""Graphs as OpenVINO IR. Needs the extra `openvino`."""

from pathlib import Path

from flawstream.engines.openvino.compile import convert
from flawstream.export.graph import Graph


def write_openvino(graph: Graph, folder: Path) -> None:
    """Write `model.xml` and `model.bin` in float32; any batch size.

    Args:
        graph: What to write.
        folder: Where to.

    Raises:
        ConfigError: OpenVINO is not installed.
    """
    (dtype,) = {port.dtype for port in graph.inputs}
    converted = convert(graph.module, [port.shape for port in graph.inputs], dtype)
    import openvino  # noqa: PLC0415 - an optional extra, there if `convert` went through

    for port, place in zip((*graph.inputs, *graph.outputs), (*converted.inputs, *converted.outputs), strict=True):
        place.get_tensor().set_names({port.name})
    openvino.save_model(converted, folder / "model.xml", compress_to_fp16=False)
