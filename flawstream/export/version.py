"""A model version written for another program, with what its consumer needs to know beside it."""

import json
import tempfile
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

import torch

from flawstream.export.graph import Extras, Graph, Port, whole_graph
from flawstream.export.onnx import to_onnx
from flawstream.export.openvino import write_openvino
from flawstream.export.triton import Server, write_triton
from flawstream.fastflow.head import FastFlowHead
from flawstream.registry.registry import WEIGHTS_FILE, Registry
from flawstream.registry.versions import open_backbone
from schemas.errors import ConfigError
from schemas.manifest import ModelManifest
from schemas.settings import ModelSettings


class ExportFormat(StrEnum):
    """For whom."""

    ONNX = "onnx"
    OPENVINO = "openvino"
    TRITON = "triton"


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """How.

    Attributes:
        score: Whether the image score comes out.
        map: Whether the map comes out at the size of the image.
        server: For Triton alone.
    """

    score: bool = True
    map: bool = False
    server: Server = field(default_factory=Server)


def export_version(
    registry: Registry,
    manifest: ModelManifest,
    settings: ModelSettings,
    kind: ExportFormat,
    *,
    folder: Path,
    options: ExportOptions,
) -> Path:
    """Write a version.

    Args:
        registry: Where the version is.
        manifest: The version's.
        settings: For the backbone's weights where they came from a file.
        kind: For whom.
        folder: For Triton the model repository; else the version gets a folder of its own in there.
        options: How.

    Returns:
        The folder that holds the version.

    Raises:
        ConfigError: An extra is not installed, the version was written there before, or the installed timm has no such
            network.
        WeightsError: The backbone's weights cannot be had.
        RegistryError: The version is damaged.
    """
    head = FastFlowHead.from_bytes(registry.read_file(manifest, WEIGHTS_FILE), manifest.backbone, manifest.flow)
    backbone = open_backbone(registry, manifest, settings)
    extras = Extras(manifest.calibration.top_fraction if options.score else None, options.map)
    if kind is ExportFormat.TRITON:
        return write_triton(folder, manifest, backbone, head, extras=extras, server=options.server)
    target = folder / manifest.model
    if target.exists():
        raise ConfigError(f"{target} is there already, and a version never changes; remove it to write it anew")
    graph = whole_graph(backbone, head, extras)
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
    """Say what a program that knows nothing of flawstream must: what goes in, what comes out, how to judge."""
    calibration = manifest.calibration
    return {
        "model": manifest.model,
        "inputs": [_told(port) for port in graph.inputs],
        "resize": manifest.backbone.resize,
        "outputs": [_told(port) for port in graph.outputs],
        "threshold": calibration.threshold,
        "pixel_threshold": calibration.pixel_threshold,
        "top_fraction": calibration.top_fraction,
        "calibration_scores": calibration.scores,
    }


def _told(port: Port) -> dict[str, object]:
    kind = "uint8" if port.dtype is torch.uint8 else "float32"
    return {"name": port.name, "shape": ["batch", *port.shape], "dtype": kind}
