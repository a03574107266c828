"""A model repository for Triton: one model that clients call, one backbone, and one head per model version.

    flawstream/      the front model, which clients call: images and the version to run on each
    backbone/        runs once per batch, for all categories in it
    bottle@v1/ ...   one head per version

The backbone and the heads are ONNX, run by Triton's onnxruntime backend or by its Python backend (`onnx_model.py`).
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
    ExtraOutputs,
    Graph,
    TensorSpec,
    backbone_graph,
    feature_tensors,
    grid_tensors,
    head_graph,
    image_tensor,
)
from flawstream.export.onnx import to_onnx
from flawstream.fastflow.backbone import Backbone
from flawstream.fastflow.head import FastFlowHead
from flawstream.registry.registry import WEIGHTS_FILE
from schemas.errors import ConfigError
from schemas.manifest import BackboneSpec, ModelManifest

FRONT = "flawstream"
"""The front model. Versions cannot have this name or the next, as theirs contain an `@`."""
BACKBONE = "backbone"
MODEL = "model"
"""The front model's input that names each image's version, as `category@version`."""
SPEC_PARAMETER = "backbone_spec"
"""The front model's parameter with the `BackboneSpec` as JSON."""
WEIGHTS_PARAMETER = "weights_sha256"
"""A head's parameter with the digest of its weights."""

TritonBackend = Literal["onnxruntime", "python"]

_SMALLEST_PREFERRED = 8
_SOURCES = "flawstream.export.triton_models"
_CONFIG = "config.pbtxt"


@dataclass(frozen=True, slots=True)
class TritonOptions:
    """Settings of the Triton server.

    Attributes:
        backend: The backend that runs the backbone and the heads.
        max_batch_images: Maximum batch size.
        instances: Instances of the backbone and of each head, per GPU or on the CPU.
    """

    backend: TritonBackend = "onnxruntime"
    max_batch_images: int = 32
    instances: int = 1


def write_triton(
    folder: Path,
    manifest: ModelManifest,
    backbone: Backbone,
    head: FastFlowHead,
    *,
    extra_outputs: ExtraOutputs,
    options: TritonOptions,
) -> Path:
    """Add a version to a model repository, with the front model and the backbone if they are missing.

    Every model is written elsewhere and moved in, so that a server that polls the folder never sees an incomplete one.

    Args:
        folder: The repository; created if missing.
        manifest: The version's manifest.
        backbone: The version's backbone.
        head: The version's head.
        extra_outputs: Must be the same for all versions in the repository.
        options: Settings of the Triton server.

    Returns:
        The version's folder.

    Raises:
        ConfigError: An extra is not installed, the version exists already, or the repository has another backbone or
            other outputs.
    """
    if importlib.util.find_spec("tritonclient") is None:
        raise ConfigError(
            "Triton's configurations are written with tritonclient, which is missing; pip install 'flawstream[triton]'"
        )
    spec = backbone.spec
    target = folder / manifest.model
    if target.exists():
        raise ConfigError(f"{target} exists already and a version is immutable; remove it to export it again")
    front = _front_config(spec, extra_outputs, options)
    _refuse_other_front(folder, front)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".flawstream-export-") as temporary:
        staged = Path(temporary)
        if not (folder / BACKBONE).exists():
            graph = backbone_graph(backbone)
            _write_network(staged / BACKBONE, graph, {}, options)
            shutil.move(staged / BACKBONE, folder / BACKBONE)
        graph = head_graph(spec, head, extra_outputs)
        parameters = {MODEL: manifest.model, WEIGHTS_PARAMETER: manifest.files.get(WEIGHTS_FILE, "")}
        _write_network(staged / manifest.model, graph, parameters, options)
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
    """Refuse a repository with another backbone or other outputs. Operators may change batching and instances."""
    file = folder / FRONT / _CONFIG
    if not file.exists():
        return
    present = read_config(file.read_text(encoding="utf-8"))
    if present.parameters != wanted.parameters:
        raise ConfigError(f"{folder} is a repository for another backbone; write this version to another folder")
    if [output.name for output in present.output] != [output.name for output in wanted.output]:
        raise ConfigError(
            f"the versions in {folder} have the outputs {', '.join(output.name for output in present.output)}; choose "
            "the same, or write to another folder"
        )


def _write_network(folder: Path, graph: Graph, parameters: dict[str, str], options: TritonOptions) -> None:
    config = _config(folder.name, graph.inputs, graph.outputs, options)
    config.backend = options.backend
    group = config.instance_group.add(count=options.instances)
    group.kind = type(group).KIND_AUTO
    for name, text in parameters.items():
        config.parameters[name].string_value = text
    for size in (1, options.max_batch_images):
        warmup = config.model_warmup.add(name=f"batch of {size}", batch_size=size)
        for tensor, declared in zip(graph.inputs, config.input, strict=True):
            blank = warmup.inputs[tensor.name]
            blank.data_type, blank.zero_data = declared.data_type, True
            blank.dims.extend(tensor.shape)
    _write_model(folder, config)
    (folder / "1" / "model.onnx").write_bytes(to_onnx(graph, parameters))
    if options.backend == "python":
        _copy_source("onnx_model.py", folder)


def _front_config(spec: BackboneSpec, extra_outputs: ExtraOutputs, options: TritonOptions) -> Any:
    """Configure the front model. No warm-up: it has no weights, and blank input names no version."""
    outputs = (*grid_tensors(spec), *extra_outputs.tensors(spec.input_size))
    config = _config(FRONT, (image_tensor(spec),), outputs, options)
    config.input.add(name=MODEL, data_type="TYPE_STRING", dims=[1])
    config.backend = "python"
    # two: while one waits for the models it called, the other assembles the next batch
    group = config.instance_group.add(count=2 * options.instances)
    group.kind = type(group).KIND_CPU
    config.parameters["backbone"].string_value = BACKBONE
    config.parameters["features"].string_value = " ".join(tensor.name for tensor in feature_tensors(spec))
    config.parameters[SPEC_PARAMETER].string_value = spec.model_dump_json()
    return config


def _config(name: str, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], options: TritonOptions) -> Any:
    from tritonclient.grpc import model_config_pb2  # noqa: PLC0415 - an optional extra

    config = model_config_pb2.ModelConfig(name=name, max_batch_size=options.max_batch_images)
    for tensors, declared in ((inputs, config.input), (outputs, config.output)):
        for tensor in tensors:
            kind = "TYPE_UINT8" if tensor.dtype is torch.uint8 else "TYPE_FP32"
            declared.add(name=tensor.name, data_type=kind, dims=tensor.shape)
    size = _SMALLEST_PREFERRED
    while size < options.max_batch_images:
        config.dynamic_batching.preferred_batch_size.append(size)
        size *= 2
    config.dynamic_batching.preferred_batch_size.append(options.max_batch_images)
    config.dynamic_batching.max_queue_delay_microseconds = (
        0  # requests that arrive while the model is busy form the next batch
    )
    return config


def _write_model(folder: Path, config: Any) -> None:
    from google.protobuf import text_format  # noqa: PLC0415 - an optional extra

    (folder / "1").mkdir(parents=True)
    (folder / _CONFIG).write_text(text_format.MessageToString(config), encoding="utf-8")


def _copy_source(name: str, folder: Path) -> None:
    with (files(_SOURCES) / name).open("rb") as source, (folder / "1" / "model.py").open("wb") as copy:
        shutil.copyfileobj(source, copy)
