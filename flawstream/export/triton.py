"""A model repository for Triton: one model that clients call, one backbone, and one head per model version.

    flawstream/      what clients call: images and, per image, which version is to judge it
    backbone/        run once for every batch, whatever categories are in it
    bottle@v1/ ...   one head per version

The backbone and the heads are ONNX, for Triton's onnxruntime backend or, run by a file beside them, its Python backend.
Needs the extras `export` and `triton`.
"""

import importlib.util
import shutil
import tempfile
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import torch

from flawstream.export.graph import (
    Extras,
    Graph,
    Port,
    backbone_graph,
    feature_ports,
    grid_ports,
    head_graph,
    images_port,
)
from flawstream.export.onnx import to_onnx
from flawstream.fastflow.backbone import Backbone
from flawstream.fastflow.head import FastFlowHead
from flawstream.registry.registry import WEIGHTS_FILE
from schemas.errors import ConfigError
from schemas.manifest import BackboneSpec, ModelManifest

FRONT = "flawstream"
"""What clients call. No version's model has this name or the next: theirs hold an `@`."""
BACKBONE = "backbone"
MODEL = "model"
"""The front model's input that names each image's version, as `category@version`."""
SPEC_PARAMETER = "backbone_spec"
"""The front model's parameter that says what the backbone is, as JSON."""
WEIGHTS_PARAMETER = "weights_sha256"
"""A head's parameter that says which weights it was made of."""

TritonBackend = Literal["onnxruntime", "python"]

_SMALLEST_PREFERRED = 8
_SOURCES = "flawstream.export.triton_models"
_CONFIG = "config.pbtxt"


@dataclass(frozen=True, slots=True)
class Server:
    """What the repository is written for.

    Attributes:
        backend: What runs the backbone and the heads.
        max_batch_images: Most images in one batch of the server.
        instances: Copies of the backbone and of each head that run at once, on each GPU or on the CPU.
    """

    backend: TritonBackend = "onnxruntime"
    max_batch_images: int = 32
    instances: int = 1


def write_triton(
    folder: Path, manifest: ModelManifest, backbone: Backbone, head: FastFlowHead, *, extras: Extras, server: Server
) -> Path:
    """Put a version into a model repository, with the front model and the backbone where they are not there yet.

    Every model is written elsewhere and moved in, so that a server that polls the folder never sees half of one.

    Args:
        folder: The repository; made where it does not exist.
        manifest: The version's.
        backbone: What it runs on.
        head: Its weights.
        extras: What comes out beside the grids; the same for all versions in the repository.
        server: What the repository is written for.

    Returns:
        The version's folder.

    Raises:
        ConfigError: An extra is not installed, the version is there already, or the repository is of another backbone
            or other outputs.
    """
    if importlib.util.find_spec("tritonclient") is None:
        raise ConfigError(
            "Triton's configurations are written with tritonclient, which is missing; pip install 'flawstream[triton]'"
        )
    spec = backbone.spec
    target = folder / manifest.model
    if target.exists():
        raise ConfigError(f"{target} is there already, and a version never changes; remove it to write it anew")
    front = _front_config(spec, extras, server)
    _refuse_other_front(folder, front)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".flawstream-export-") as temporary:
        staged = Path(temporary)
        if not (folder / BACKBONE).exists():
            graph = backbone_graph(backbone)
            _write_network(staged / BACKBONE, graph, {}, server)
            shutil.move(staged / BACKBONE, folder / BACKBONE)
        graph = head_graph(spec, head, extras)
        told = {MODEL: manifest.model, WEIGHTS_PARAMETER: manifest.files.get(WEIGHTS_FILE, "")}
        _write_network(staged / manifest.model, graph, told, server)
        document = manifest.model_dump_json(indent=2)
        (staged / manifest.model / "manifest.json").write_text(document, encoding="utf-8")
        shutil.move(staged / manifest.model, target)
        if not (folder / FRONT).exists():
            _write_model(staged / FRONT, front)
            _copy_source("front_model.py", staged / FRONT)
            shutil.move(staged / FRONT, folder / FRONT)
    return target


def read_config(text: str) -> Any:
    """Read a `config.pbtxt` into Triton's own `ModelConfig`."""
    from google.protobuf import text_format  # noqa: PLC0415 - an optional extra
    from tritonclient.grpc import model_config_pb2  # noqa: PLC0415 - the same

    return text_format.Parse(text, model_config_pb2.ModelConfig())


def _refuse_other_front(folder: Path, wanted: Any) -> None:
    """One repository has one backbone and one set of outputs; batching and instances are the operator's to change."""
    file = folder / FRONT / _CONFIG
    if not file.exists():
        return
    present = read_config(file.read_text(encoding="utf-8"))
    if present.parameters != wanted.parameters:
        raise ConfigError(f"{folder} is a repository of another backbone; write this version to a folder of its own")
    if [output.name for output in present.output] != [output.name for output in wanted.output]:
        raise ConfigError(
            f"the versions in {folder} give {', '.join(output.name for output in present.output)}; ask for the same "
            "here, or write to a folder of its own"
        )


def _write_network(folder: Path, graph: Graph, told: dict[str, str], server: Server) -> None:
    config = _config(folder.name, graph.inputs, graph.outputs, server)
    config.backend = server.backend
    group = config.instance_group.add(count=server.instances)
    group.kind = type(group).KIND_AUTO
    for name, text in told.items():
        config.parameters[name].string_value = text
    for size in (1, server.max_batch_images):
        warmup = config.model_warmup.add(name=f"batch of {size}", batch_size=size)
        for port, declared in zip(graph.inputs, config.input, strict=True):
            blank = warmup.inputs[port.name]
            blank.data_type, blank.zero_data = declared.data_type, True
            blank.dims.extend(port.shape)
    _write_model(folder, config)
    (folder / "1" / "model.onnx").write_bytes(to_onnx(graph, told))
    if server.backend == "python":
        _copy_source("onnx_model.py", folder)


def _front_config(spec: BackboneSpec, extras: Extras, server: Server) -> Any:
    """Configure the front model. Without a warm-up: zeros name no version, and it holds nothing that could be cold."""
    outputs = (*grid_ports(spec), *extras.ports(spec.input_size))
    config = _config(FRONT, (images_port(spec),), outputs, server)
    config.input.add(name=MODEL, data_type="TYPE_STRING", dims=[1])
    config.backend = "python"
    # two: while one waits for the models it called, the other puts the next batch together
    group = config.instance_group.add(count=2 * server.instances)
    group.kind = type(group).KIND_CPU
    config.parameters["backbone"].string_value = BACKBONE
    config.parameters["features"].string_value = " ".join(port.name for port in feature_ports(spec))
    config.parameters[SPEC_PARAMETER].string_value = spec.model_dump_json()
    return config


def _config(name: str, inputs: tuple[Port, ...], outputs: tuple[Port, ...], server: Server) -> Any:
    from tritonclient.grpc import model_config_pb2  # noqa: PLC0415 - an optional extra

    config = model_config_pb2.ModelConfig(name=name, max_batch_size=server.max_batch_images)
    for ports, declared in ((inputs, config.input), (outputs, config.output)):
        for port in ports:
            kind = "TYPE_UINT8" if port.dtype is torch.uint8 else "TYPE_FP32"
            declared.add(name=port.name, data_type=kind, dims=port.shape)
    size = _SMALLEST_PREFERRED
    while size < server.max_batch_images:
        config.dynamic_batching.preferred_batch_size.append(size)
        size *= 2
    config.dynamic_batching.preferred_batch_size.append(server.max_batch_images)
    config.dynamic_batching.max_queue_delay_microseconds = 0  # what waits while the model is busy is a batch
    return config


def _write_model(folder: Path, config: Any) -> None:
    from google.protobuf import text_format  # noqa: PLC0415 - an optional extra

    (folder / "1").mkdir(parents=True)
    (folder / _CONFIG).write_text(text_format.MessageToString(config), encoding="utf-8")


def _copy_source(name: str, folder: Path) -> None:
    with (files(_SOURCES) / name).open("rb") as source, (folder / "1" / "model.py").open("wb") as copy:
        shutil.copyfileobj(source, copy)
