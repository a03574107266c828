"""Export of one model version, with a description of its inputs, outputs and thresholds."""

import json
import tempfile
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

import torch

from flawstream.export.graph import ExtraOutputs, Graph, TensorSpec, whole_graph
from flawstream.export.onnx import to_onnx
from flawstream.export.openvino import write_openvino
from flawstream.export.triton import TritonOptions, write_triton
from flawstream.fastflow.head import FastFlowHead
from flawstream.registry.registry import WEIGHTS_FILE, Registry
from flawstream.registry.versions import open_backbone
from schemas.errors import ConfigError
from schemas.manifest import ModelManifest
from schemas.settings import ModelSettings


class ExportFormat(StrEnum):
    """The format to export to."""

    ONNX = "onnx"
    OPENVINO = "openvino"
    TRITON = "triton"


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """What to export.

    Attributes:
        score: Export the image score.
        map: Export the anomaly map at the size of the image.
        triton: Settings of the Triton server; for that format only.
    """

    score: bool = True
    map: bool = False
    triton: TritonOptions = field(default_factory=TritonOptions)


def export_version(
    registry: Registry,
    manifest: ModelManifest,
    settings: ModelSettings,
    kind: ExportFormat,
    *,
    folder: Path,
    options: ExportOptions,
) -> Path:
    """Export a version.

    Args:
        registry: The registry that has the version.
        manifest: The version's manifest.
        settings: `weights` names the file of the backbone's weights, if they came from one.
        kind: The format.
        folder: For Triton the model repository; otherwise the version gets a subfolder in it.
        options: What to export.

    Returns:
        The version's folder.

    Raises:
        ConfigError: An extra is not installed, the version was exported there before, or the installed timm has no such
            network.
        WeightsError: The backbone's weights cannot be loaded.
        RegistryError: The version is damaged.
    """
    head = FastFlowHead.from_bytes(registry.read_file(manifest, WEIGHTS_FILE), manifest.backbone, manifest.flow)
    if manifest.backbone.arithmetic != "float32":
        raise ConfigError(
            f"{manifest.model} has a backbone in {manifest.backbone.arithmetic}, which is not exported; "
            "train with model.arithmetic=float32"
        )
    backbone = open_backbone(registry, manifest, settings)
    extra_outputs = ExtraOutputs(manifest.calibration.top_fraction if options.score else None, options.map)
    if kind is ExportFormat.TRITON:
        return write_triton(folder, manifest, backbone, head, extra_outputs=extra_outputs, options=options.triton)
    target = folder / manifest.model
    if target.exists():
        raise ConfigError(f"{target} exists already and a version is immutable; remove it to export it again")
    graph = whole_graph(backbone, head, extra_outputs)
    interface = _interface(graph, manifest)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".flawstream-export-") as temporary:
        staged = Path(temporary) / manifest.model
        staged.mkdir()
        if kind is ExportFormat.ONNX:
            (staged / "model.onnx").write_bytes(to_onnx(graph, {"flawstream": json.dumps(interface)}))
        else:
            write_openvino(graph, staged)
        (staged / "interface.json").write_text(json.dumps(interface, indent=2) + "\n", encoding="utf-8")
        (staged / "manifest.json").write_text(manifest.model_dump_json(indent=2), encoding="utf-8")
        staged.rename(target)
    return target


def _interface(graph: Graph, manifest: ModelManifest) -> dict[str, object]:
    """Describe inputs, outputs and thresholds for a program that does not know flawstream."""
    calibration = manifest.calibration
    return {
        "model": manifest.model,
        "inputs": [_tensor_json(tensor) for tensor in graph.inputs],
        "resize": manifest.backbone.resize,
        "outputs": [_tensor_json(tensor) for tensor in graph.outputs],
        "threshold": calibration.threshold,
        "pixel_threshold": calibration.pixel_threshold,
        "top_fraction": calibration.top_fraction,
        "calibration_scores": calibration.scores,
    }


def _tensor_json(tensor: TensorSpec) -> dict[str, object]:
    kind = "uint8" if tensor.dtype is torch.uint8 else "float32"
    return {"name": tensor.name, "shape": ["batch", *tensor.shape], "dtype": kind}
