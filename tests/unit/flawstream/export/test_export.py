"""Exports: what comes out of the files, in the programs they are written for, is what torch computes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from helpers.command_line import Run, make_run
from helpers.tiny_models import FLOW, make_manifest
from numpy.typing import NDArray

from flawstream.engines.openvino.compile import openvino_core
from flawstream.export.graph import ExtraOutputs
from flawstream.export.triton import (
    BACKBONE,
    FRONT,
    SPEC_PARAMETER,
    WEIGHTS_PARAMETER,
    TritonOptions,
    read_config,
    write_triton,
)
from flawstream.export.version import ExportFormat, ExportOptions, export_version
from flawstream.fastflow.backbone import Backbone
from flawstream.fastflow.head import FastFlowHead, FoldedHead
from flawstream.fastflow.score import image_scores
from flawstream.imaging.maps import upsample
from flawstream.imaging.pixels import Pixels
from flawstream.registry.registry import Registry
from schemas.errors import ConfigError
from schemas.manifest import BackboneSpec, ModelManifest
from schemas.settings import ModelSettings

pytestmark = pytest.mark.timeout(900)  # torch's exporter takes seconds, on a busy machine minutes

SIZE = 64
WEIGHTS = "flow.safetensors"
Outputs = dict[str, NDArray[np.float32]]


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return Backbone(ModelSettings(input_size=SIZE))


@pytest.fixture(scope="module")
def head(backbone: Backbone) -> FastFlowHead:
    """A head whose every tensor is away from where it starts."""
    head = FastFlowHead(backbone.spec, FLOW)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in head.state_dict().items():
            if tensor.is_floating_point():
                tensor.add_(torch.rand(tensor.shape, generator=generator), alpha=0.2)
            if name.endswith(".whitening"):
                tensor.copy_(tensor.half())
    return head.eval()


@pytest.fixture(scope="module")
def root(backbone: Backbone, head: FastFlowHead, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry with two versions, `v1` the current one."""
    root = tmp_path_factory.mktemp("models")
    files = {WEIGHTS: head.to_bytes()}
    for version in ("v1", "v2"):
        Registry(str(root)).write(make_manifest("bottle", version, spec=backbone.spec, files=files), files)
    Registry(str(root)).promote("bottle", "v1")
    return root


@pytest.fixture(scope="module")
def manifest(root: Path) -> ModelManifest:
    return Registry(str(root)).manifest("bottle", "v1")


@pytest.fixture(scope="module")
def written(root: Path, manifest: ModelManifest, tmp_path_factory: pytest.TempPathFactory) -> dict[ExportFormat, Path]:
    """Give the folder of the version in every format."""
    return {
        kind: export_version(
            Registry(str(root)),
            manifest,
            ModelSettings(),
            kind,
            folder=tmp_path_factory.mktemp(kind) / "exported",
            options=ExportOptions(map=True, triton=TritonOptions(max_batch_images=20, instances=2)),
        )
        for kind in ExportFormat
    }


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], root: Path) -> Run:
    monkeypatch.setenv("FLAWSTREAM_REGISTRY__ROOT", str(root))
    return make_run(monkeypatch, capsys)


def make_images(count: int) -> NDArray[np.uint8]:
    return np.random.default_rng(count).integers(0, 256, (count, SIZE, SIZE, 3), np.uint8)


def assert_same(outputs: Outputs, images: Pixels, backbone: Backbone, head: FastFlowHead) -> None:
    """Hold what came out to plain torch in float32: within a thousandth of the largest value."""
    with torch.no_grad():
        grids = FoldedHead(head)(backbone(torch.from_numpy(images)))
    expected = {f"grid_{scale}": grid.numpy() for scale, grid in enumerate(grids)}
    expected["score"] = image_scores(grids, 0.0)[:, None].numpy()
    expected["map"] = np.stack(
        [upsample([grid[k].numpy() for grid in grids], (SIZE, SIZE)) for k in range(len(images))]
    )
    assert list(outputs) == list(expected)
    for name, values in expected.items():
        assert values.std() > 0.01 * values.mean() or len(images) == 1
        np.testing.assert_allclose(outputs[name], values, rtol=1e-3, atol=1e-3 * float(values.max()), err_msg=name)


def run_onnx(file: Path, inputs: dict[str, NDArray[Any]]) -> Outputs:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [port.name for port in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_onnx_gives_what_torch_gives(
    written: dict[ExportFormat, Path], backbone: Backbone, head: FastFlowHead, count: int
) -> None:
    images = make_images(count)
    outputs = run_onnx(written[ExportFormat.ONNX] / "model.onnx", {"images": images})
    assert_same(outputs, images, backbone, head)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_openvino_gives_what_torch_gives(
    written: dict[ExportFormat, Path], backbone: Backbone, head: FastFlowHead, count: int
) -> None:
    images = make_images(count)
    model = openvino_core().compile_model(
        written[ExportFormat.OPENVINO] / "model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    outputs = {port.any_name: values for port, values in model({"images": images}).items()}
    assert_same(outputs, images, backbone, head)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_networks_for_triton_give_together_what_torch_gives(
    written: dict[ExportFormat, Path], backbone: Backbone, head: FastFlowHead, count: int
) -> None:
    images = make_images(count)
    version = written[ExportFormat.TRITON]
    features = run_onnx(version.parent / BACKBONE / "1" / "model.onnx", {"images": images})
    outputs = run_onnx(version / "1" / "model.onnx", dict(features))
    assert_same(outputs, images, backbone, head)


def test_onnx_says_what_goes_in_and_out_with_any_batch_size(written: dict[ExportFormat, Path]) -> None:
    session = onnxruntime.InferenceSession(
        written[ExportFormat.ONNX] / "model.onnx", providers=["CPUExecutionProvider"]
    )
    ports = {port.name: (port.shape, port.type) for port in (*session.get_inputs(), *session.get_outputs())}
    assert ports == {
        "images": (["batch", 64, 64, 3], "tensor(uint8)"),
        "grid_0": (["batch", 8, 8], "tensor(float)"),
        "grid_1": (["batch", 4, 4], "tensor(float)"),
        "score": (["batch", 1], "tensor(float)"),
        "map": (["batch", 64, 64], "tensor(float)"),
    }


@pytest.mark.parametrize("kind", [ExportFormat.ONNX, ExportFormat.OPENVINO])
def test_what_a_foreign_consumer_needs_lies_beside(
    written: dict[ExportFormat, Path], manifest: ModelManifest, kind: ExportFormat
) -> None:
    folder = written[kind]
    assert folder.name == "bottle@v1"
    assert ModelManifest.model_validate_json((folder / "manifest.json").read_bytes()) == manifest
    interface = json.loads((folder / "interface.json").read_text(encoding="utf-8"))
    assert interface["threshold"] == manifest.calibration.threshold
    assert interface["pixel_threshold"] == manifest.calibration.pixel_threshold
    assert interface["calibration_scores"] == list(manifest.calibration.scores)
    assert interface["inputs"] == [{"name": "images", "shape": ["batch", 64, 64, 3], "dtype": "uint8"}]
    assert interface["resize"] == "area"
    assert [output["name"] for output in interface["outputs"]] == ["grid_0", "grid_1", "score", "map"]


def test_version_that_sees_float_pixels_takes_them(head: FastFlowHead, tmp_path: Path) -> None:
    backbone = Backbone(ModelSettings(input_size=SIZE, resize="antialias"))
    files = {WEIGHTS: head.to_bytes()}
    finer = make_manifest("bottle", "v1", spec=backbone.spec, files=files)
    registry = Registry(str(tmp_path / "models"))
    registry.write(finer, files)
    options = ExportOptions(map=True)
    folder = export_version(
        registry, finer, ModelSettings(), ExportFormat.ONNX, folder=tmp_path / "out", options=options
    )
    interface = json.loads((folder / "interface.json").read_text(encoding="utf-8"))
    assert interface["resize"] == "antialias"
    assert interface["inputs"] == [{"name": "images", "shape": ["batch", 64, 64, 3], "dtype": "float32"}]
    images = make_images(2) * np.float32(0.9)
    assert_same(run_onnx(folder / "model.onnx", {"images": images}), images, backbone, head)
    repository = tmp_path / "triton"
    write_triton(repository, finer, backbone, head, extra_outputs=ExtraOutputs(), options=TritonOptions())
    for model in (FRONT, BACKBONE):
        assert "data_type: TYPE_FP32" in str(configuration(repository / model).input[0])


def test_onnx_carries_how_to_judge_in_the_file_itself(written: dict[ExportFormat, Path]) -> None:
    folder = written[ExportFormat.ONNX]
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    told = json.loads(session.get_modelmeta().custom_metadata_map["flawstream"])
    assert told == json.loads((folder / "interface.json").read_text(encoding="utf-8"))


def configuration(folder: Path) -> Any:
    return read_config((folder / "config.pbtxt").read_text(encoding="utf-8"))


def test_triton_s_repository_is_complete(written: dict[ExportFormat, Path], manifest: ModelManifest) -> None:
    repository = written[ExportFormat.TRITON].parent
    files = {str(file.relative_to(repository)) for file in repository.rglob("*") if file.is_file()}
    assert files == {
        "backbone/config.pbtxt",
        "backbone/1/model.onnx",
        "bottle@v1/config.pbtxt",
        "bottle@v1/1/model.onnx",
        "bottle@v1/manifest.json",
        "flawstream/config.pbtxt",
        "flawstream/1/model.py",
    }
    front = configuration(repository / FRONT)
    assert BackboneSpec.model_validate_json(front.parameters[SPEC_PARAMETER].string_value) == manifest.backbone
    told = configuration(repository / "bottle@v1").parameters[WEIGHTS_PARAMETER].string_value
    assert told == manifest.files[WEIGHTS]


@pytest.mark.parametrize(
    ("name", "backend"), [(FRONT, "python"), (BACKBONE, "onnxruntime"), ("bottle@v1", "onnxruntime")]
)
def test_triton_batches_what_waits_and_waits_for_nothing(
    written: dict[ExportFormat, Path], name: str, backend: str
) -> None:
    config = configuration(written[ExportFormat.TRITON].parent / name)
    assert (config.name, config.backend, config.max_batch_size) == (name, backend, 20)
    assert list(config.dynamic_batching.preferred_batch_size) == [8, 16, 20]
    assert config.dynamic_batching.max_queue_delay_microseconds == 0


@pytest.mark.parametrize("name", [BACKBONE, "bottle@v1"])
def test_triton_s_configuration_fits_its_network(written: dict[ExportFormat, Path], name: str) -> None:
    folder = written[ExportFormat.TRITON].parent / name
    config = configuration(folder)
    session = onnxruntime.InferenceSession(folder / "1" / "model.onnx", providers=["CPUExecutionProvider"])
    for declared, ports in ((config.input, session.get_inputs()), (config.output, session.get_outputs())):
        assert [(one.name, list(one.dims)) for one in declared] == [(port.name, port.shape[1:]) for port in ports]
    assert [group.count for group in config.instance_group] == [2]
    assert [warmup.batch_size for warmup in config.model_warmup] == [1, 20]
    for warmup in config.model_warmup:
        assert {name: list(blank.dims) for name, blank in warmup.inputs.items()} == {
            port.name: port.shape[1:] for port in session.get_inputs()
        }


def test_command_writes_the_current_version_and_says_where(run: Run, tmp_path: Path) -> None:
    ran = run("models", "export", "bottle", "--format", "openvino", "--to", tmp_path, "--no-score")
    assert (ran.code, ran.out.strip()) == (0, str(tmp_path / "bottle@v1"))
    model = openvino_core().read_model(tmp_path / "bottle@v1" / "model.xml")
    assert [port.any_name for port in model.outputs] == ["grid_0", "grid_1"]


def test_command_takes_a_version_by_name(run: Run, tmp_path: Path) -> None:
    ran = run("models", "export", "bottle@v2", "--format", "openvino", "--to", tmp_path)
    assert (ran.code, ran.out.strip()) == (0, str(tmp_path / "bottle@v2"))


def test_command_names_the_versions_there_are(run: Run, tmp_path: Path) -> None:
    ran = run("models", "export", "bottle@v9", "--format", "onnx", "--to", tmp_path)
    assert ran.code == 3
    assert "it has: v1, v2" in ran.err


@pytest.mark.parametrize("kind", ExportFormat)
def test_version_is_never_written_over(run: Run, written: dict[ExportFormat, Path], kind: ExportFormat) -> None:
    ran = run("models", "export", "bottle", "--format", kind, "--to", written[kind].parent, "--map")
    assert ran.code == 3
    assert f"{written[kind]} exists already" in ran.err


def test_repository_takes_no_version_of_other_outputs(run: Run, written: dict[ExportFormat, Path]) -> None:
    repository = written[ExportFormat.TRITON].parent
    ran = run("models", "export", "bottle@v2", "--format", "triton", "--to", repository)
    assert ran.code == 3
    assert "have the outputs grid_0, grid_1, score, map" in ran.err
    assert not (repository / "bottle@v2").exists()


def test_repository_takes_no_version_of_another_backbone(written: dict[ExportFormat, Path], head: FastFlowHead) -> None:
    other = Backbone(ModelSettings(input_size=2 * SIZE))
    manifest = make_manifest("cable", spec=other.spec)
    with pytest.raises(ConfigError, match="a repository for another backbone"):
        write_triton(
            written[ExportFormat.TRITON].parent,
            manifest,
            other,
            head,
            extra_outputs=ExtraOutputs(0.0, map=True),
            options=TritonOptions(),
        )
