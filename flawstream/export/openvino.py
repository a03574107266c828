"""Export to OpenVINO IR. Needs the extra `openvino`."""

from pathlib import Path

from flawstream.engines.openvino.compile import convert
from flawstream.export.graph import Graph


def write_openvino(graph: Graph, folder: Path) -> None:
    """Write `model.xml` and `model.bin` in float32, with a dynamic batch size.

    Args:
        graph: The graph to export.
        folder: The folder to write to.

    Raises:
        ConfigError: OpenVINO is not installed.
    """
    (dtype,) = {tensor.dtype for tensor in graph.inputs}
    converted = convert(graph.module, [tensor.shape for tensor in graph.inputs], dtype)
    import openvino  # noqa: PLC0415 - an optional extra, installed if `convert` succeeded

    for tensor, converted_tensor in zip(
        (*graph.inputs, *graph.outputs), (*converted.inputs, *converted.outputs), strict=True
    ):
        converted_tensor.get_tensor().set_names({tensor.name})
    openvino.save_model(converted, folder / "model.xml", compress_to_fp16=False)
