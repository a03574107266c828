"""Checkpoints of anomalib: the fixtures hold its own maps (`bench/peers/anomalib_fixtures.py` made them)."""

import asyncio
import json
import os
import re
import shlex
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from helpers import engine_bench
from helpers.command_line import Run, make_run
from helpers.places import ROOT, TESTS
from helpers.small_backbones import SIDE, shrink
from helpers.tiny_models import write_version
from torch import Tensor

from flawstream.engines.cuda.engine import CudaEngine
from flawstream.engines.openvino.engine import OpenvinoEngine
from flawstream.engines.torch_engine import TorchEngine
from flawstream.fastflow.anomalib import ANOMALIB_BACKBONES, AnomalibModel, read_anomalib
from flawstream.fastflow.backbone import Backbone
from flawstream.fastflow.head import FoldedHead
from flawstream.fastflow.score import likelihood_map
from flawstream.imaging.decode import decode_image
from flawstream.registry.registry import Registry
from flawstream.registry.versions import BACKBONE_FILE, open_backbone
from schemas.errors import ConfigError, WeightsError
from schemas.manifest import FlowSpec, ImportRecord
from schemas.messages import ImageMessage
from schemas.settings import DetectorSettings, ModelSettings, Settings
from schemas.wire import result_fields
from serving.detector import make_detector
from serving.engines import Engines
from serving.model_store import ModelStore
from workers.consume.result_builder import Times, build_result
from workers.ports import Detection

DATA = TESTS / "data"
PAGE = ROOT / "docs" / "how-to" / "import-from-anomalib.md"
LIMIT = 1e-4
NAMES = {"resnet18": "resnet18", "deit": "deit_base_distilled_patch16_384", "cait": "cait_m48_448"}
FLOWS = {
    "resnet18": FlowSpec(steps=3, hidden_ratio=0.5, conv3x3_only=False, clamp=2.0, normalisation="layer_norm"),
    "deit": FlowSpec(steps=4, hidden_ratio=0.3, conv3x3_only=False, clamp=2.0, normalisation="none"),
    "cait": FlowSpec(steps=2, hidden_ratio=1.0, conv3x3_only=True, clamp=2.0, normalisation="none"),
}
FILES_LIMIT = 1e-3
"""Grids are float16 in a result."""
KINDS = ("jpeg", "png")
NOT_OF_THE_MODEL = ("images", "maps", *KINDS, *(f"{kind}_map" for kind in KINDS))
Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


@pytest.fixture(autouse=True)
def _small_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm, "create_model", shrink(timm.create_model))
    for name in ("deit", "cait"):
        form = ANOMALIB_BACKBONES[NAMES[name]]
        monkeypatch.setitem(ANOMALIB_BACKBONES, NAMES[name], {**form, "input_size": SIDE})


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return make_run(monkeypatch, capsys)


def read_fixture(name: str) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The checkpoint, (B, S, S, 3) uint8 images and anomalib's (B, S, S) maps."""
    tensors = safetensors.torch.load_file(DATA / f"anomalib_{name}.safetensors")
    images, maps = tensors["images"], tensors["maps"]
    return {key: tensor for key, tensor in tensors.items() if key not in NOT_OF_THE_MODEL}, images, maps


def read_file(name: str, kind: str) -> tuple[bytes, Tensor]:
    """An image's bytes, and anomalib's (S, S) map of what it reads in them."""
    tensors = safetensors.torch.load_file(DATA / f"anomalib_{name}.safetensors")
    return tensors[kind].numpy().tobytes(), tensors[f"{kind}_map"]


def write(path: Path, tensors: dict[str, Tensor], **more: object) -> Path:
    torch.save({"state_dict": tensors, **more} if more else tensors, path)
    return path


def read_changed(name: str, folder: Path, change: Change) -> AnomalibModel:
    return read_anomalib(write(folder / "a.pt", change(read_fixture(name)[0])))


@pytest.mark.parametrize("name", FLOWS)
def test_maps_are_anomalib_s(name: str, tmp_path: Path) -> None:
    tensors, images, theirs = read_fixture(name)
    model = read_anomalib(write(tmp_path / "a.pt", tensors))
    assert (model.settings.backbone, model.settings.input_size) == (NAMES[name], SIDE)
    assert model.flow == FLOWS[name]
    backbone = model.make_backbone()
    head = model.make_head(backbone)
    with torch.inference_mode():
        grids = FoldedHead(head)(backbone(images))
        unfolded = [0.5 * z.square().mean(dim=1) for z in head(backbone(images))[0]]
    for ours in (grids, unfolded):
        assert (likelihood_map(ours, (SIDE, SIDE)) - theirs).abs().max() <= LIMIT
    assert theirs.std() > 0.05
    assert theirs.max() - theirs.min() > 0.3


@pytest.mark.parametrize("name", FLOWS)
def test_every_form_of_file_gives_the_same_model(name: str, tmp_path: Path) -> None:
    tensors, _, _ = read_fixture(name)
    inner = {key.removeprefix("model."): tensor for key, tensor in tensors.items()}
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    lightning = {"hyper_parameters": {"backbone": "resnet18"}, "epoch": 3, "loops": {}, "optimizer_states": []}
    one, *others = (
        read_anomalib(path)
        for path in (
            write(tmp_path / "a.pt", tensors),
            write(tmp_path / "b.pt", inner),
            write(tmp_path / "c.ckpt", {**tensors, "post_processor.image_min": torch.zeros(())}, **lightning),
            tmp_path / "a.safetensors",
        )
    )
    for other in others:
        assert (other.settings, other.flow) == (one.settings, one.flow)
        for ours, same in ((one.head_tensors, other.head_tensors), (one.backbone_tensors, other.backbone_tensors)):
            assert ours.keys() == same.keys()
            assert all(torch.equal(ours[key], same[key]) for key in ours)


@pytest.fixture(scope="module")
def normal_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("normal")
    random = np.random.default_rng(0)
    for number in range(20):
        cv2.imwrite(str(folder / f"{number}.png"), random.integers(0, 256, (SIDE, SIDE, 3), np.uint8))
    return folder


@pytest.mark.parametrize("name", FLOWS)
def test_imported_version_is_served_and_gives_anomalib_s_maps(
    name: str, tmp_path: Path, normal_images: Path, run: Run
) -> None:
    tensors, images, theirs = read_fixture(name)
    path = write(tmp_path / "a.ckpt", tensors, epoch=1)
    root = tmp_path / "models"
    arguments = ("-c", "bottle", "--data", str(normal_images), "--registry", str(root), "--json", "--promote")
    ran = run("models", "import-anomalib", str(path), *arguments)
    assert ran.code == 0, ran.err
    told = json.loads(ran.out)
    registry = Registry(str(root))
    assert registry.currents() == {"bottle": told["version"]}
    manifest = registry.manifest("bottle", told["version"])
    assert isinstance(manifest.training, ImportRecord)
    assert manifest.training.calibration_images == len(manifest.calibration.scores) == 20
    assert BACKBONE_FILE in manifest.files
    assert manifest.backbone.resize == "antialias"
    path.unlink()
    for make in (TorchEngine, OpenvinoEngine, cuda_program):
        engine = make(open_backbone(registry, manifest, ModelSettings()))
        loaded = ModelStore(registry, Engines(engine), 1).load("bottle").loaded
        for count in (1, 3):  # the graphs are of any batch size
            many = images.numpy().repeat(count, axis=0).astype(np.float32)
            ours = likelihood_map(
                [torch.from_numpy(grid) for grid in engine_bench.judge(engine, loaded, many)], (SIDE, SIDE)
            )
            assert (ours - theirs).abs().max() <= LIMIT


def cuda_program(backbone: Backbone) -> CudaEngine:
    """Run what a GPU would in strict float32, on a CPU."""
    return CudaEngine(backbone, half=False, max_batch=2, device=torch.device("cpu"))


def import_version(path: Path, root: Path, normal_images: Path, run: Run, *options: str) -> None:
    """Import a checkpoint as category `bottle` and have it serve."""
    arguments = ("-c", "bottle", "--data", str(normal_images), "--registry", str(root), "--promote", *options)
    ran = run("models", "import-anomalib", str(path), *arguments)
    assert ran.code == 0, ran.err


def judge(root: Path, files: Sequence[bytes]) -> list[dict[bytes, bytes]]:
    """Judge images of `bottle` as a worker does, up to the fields of their results on the stream."""
    settings = Settings()
    detector = make_detector(str(root), settings.model, DetectorSettings(engine="torch", precision="f32"))

    async def detect(data: bytes) -> dict[bytes, bytes]:
        image = decode_image(data, (await detector.pixel_forms(["bottle"]))[0], settings.limits)
        (outcome,) = await detector.detect(image.pixels[np.newaxis], ["bottle"])
        assert isinstance(outcome, Detection)
        message = ImageMessage(id="1", category="bottle", image=data)
        return result_fields(build_result(message, image, outcome, settings.worker.map_codec, Times(0, 0, 0, 0)))

    async def detect_all() -> list[dict[bytes, bytes]]:
        await detector.start()
        results = [await detect(data) for data in files]
        await detector.stop()
        return results

    return asyncio.run(detect_all())


def run_page(fields: dict[bytes, bytes]) -> Tensor:
    """Run the lines of the page that make anomalib's map of a result; give the (S, S) map."""
    (lines,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    namespace: dict[str, Any] = {"fields": fields}
    exec(lines, namespace)  # noqa: S102 - our own page
    anomaly_map: Tensor = namespace["anomaly_map"]
    return anomaly_map


@pytest.mark.parametrize("name", FLOWS)
def test_files_come_out_as_anomalib_s_maps(name: str, tmp_path: Path, normal_images: Path, run: Run) -> None:
    import_version(write(tmp_path / "a.pt", read_fixture(name)[0]), tmp_path / "models", normal_images, run)
    files, theirs = zip(*(read_file(name, kind) for kind in KINDS), strict=True)
    for fields, expected in zip(judge(tmp_path / "models", files), theirs, strict=True):
        ours = run_page(fields)
        assert ours.shape == expected.shape
        assert (ours - expected).abs().max() <= FILES_LIMIT


def test_images_are_resized_as_for_models_trained_here_on_request(
    tmp_path: Path, normal_images: Path, run: Run
) -> None:
    root = tmp_path / "models"
    path = write(tmp_path / "a.pt", read_fixture("resnet18")[0])
    import_version(path, root, normal_images, run, "--resize", "area")
    registry = Registry(str(root))
    assert registry.manifest("bottle", registry.currents()["bottle"]).backbone.resize == "area"
    data, theirs = read_file("resnet18", "png")
    (fields,) = judge(root, [data])
    assert (run_page(fields) - theirs).abs().max() > 10 * FILES_LIMIT


def test_imported_version_is_evaluated_with_the_weights_that_came_with_it(
    tmp_path: Path, normal_images: Path, run: Run
) -> None:
    path = write(tmp_path / "a.pt", read_fixture("resnet18")[0])
    registry = ("--registry", str(tmp_path / "models"), "--json")
    arguments = ("-c", "bottle", "--data", str(normal_images), "--promote", *registry)
    assert run("models", "import-anomalib", str(path), *arguments).code == 0
    for folder in ("train/good", "test/good", "test/defective"):
        shutil.copytree(normal_images, tmp_path / "data" / "bottle" / folder)
    ran = run("evaluate", str(tmp_path / "data"), *registry)
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["bottle"]["image_auroc"] == 0.5


def test_import_promotes_nothing_and_prints_the_command_that_does(
    tmp_path: Path, normal_images: Path, run: Run
) -> None:
    root = tmp_path / "the models"
    registry = Registry(str(root))
    path = write(tmp_path / "a.pt", read_fixture("resnet18")[0])
    ran = run("models", "import-anomalib", path, "-c", "bottle", "--data", normal_images, "--registry", root)
    assert ran.code == 0
    (version,) = registry.versions("bottle")
    assert registry.currents() == {}
    assert f"bottle@{version} is written" in ran.err
    command = ran.err.splitlines()[-1].removeprefix("to serve it: ")
    assert command == f"flawstream models promote bottle {version} --registry '{root}'"
    assert run(*shlex.split(command)[1:]).code == 0
    assert registry.currents() == {"bottle": version}


def test_import_into_a_registry_of_another_backbone_is_promoted_beside_it(
    tmp_path: Path, normal_images: Path, run: Run
) -> None:
    root = tmp_path / "models"
    registry = Registry(str(root))
    write_version(registry, "cable")
    path = write(tmp_path / "a.pt", read_fixture("resnet18")[0])
    arguments = ("-c", "bottle", "--data", normal_images, "--registry", root, "--promote", "--json")
    ran = run("models", "import-anomalib", path, *arguments)
    assert ran.code == 0
    version = json.loads(ran.out)["version"]
    assert registry.versions("bottle") == [version]
    assert registry.currents() == {"bottle": version, "cable": "v1"}


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("wrapped", [False, True])
def test_malicious_checkpoint_never_runs(tmp_path: Path, wrapped: bool) -> None:  # noqa: FBT001 - a parameter of the test
    tensors, _, _ = read_fixture("resnet18")
    evil: dict[str, Any] = {"callbacks": Malicious(tmp_path / "ran")}
    torch.save({"state_dict": tensors, **evil} if wrapped else {**tensors, **evil}, tmp_path / "a.ckpt")
    with pytest.raises(WeightsError, match=r"is not executed; .*torch\.save\(model\.state_dict\(\)"):
        read_anomalib(tmp_path / "a.ckpt")
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "a.ckpt", weights_only=False)  # it is a real one
    assert (tmp_path / "ran").exists()


def test_exported_module_is_refused_with_how_to_save_its_tensors(tmp_path: Path) -> None:
    torch.save({"model": torch.nn.Linear(1, 1)}, tmp_path / "model.pt")
    with pytest.raises(WeightsError, match=r"torch\.save\(model\.state_dict\(\)"):
        read_anomalib(tmp_path / "model.pt")


@pytest.mark.parametrize("held", [{}, {"weight": torch.zeros(3)}, [1, 2], torch.zeros(2), {"fast_flow_blocks.x": 1}])
def test_file_of_something_else_is_refused(tmp_path: Path, held: object) -> None:
    torch.save(held, tmp_path / "a.pt")
    with pytest.raises(WeightsError, match=r"a\.pt"):
        read_anomalib(tmp_path / "a.pt")


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="FileNotFoundError"):
        read_anomalib(tmp_path / "nowhere.ckpt")


W_PERM = "model.fast_flow_blocks.0.module_list.1.w_perm"


def blend(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    rotation = torch.linalg.qr(torch.randn(tensors[W_PERM].shape[:2]))[0]
    return {**tensors, W_PERM: rotation[:, :, None, None]}


def repeat_a_row(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    matrix = tensors[W_PERM].clone()
    matrix[0] = matrix[1]
    return {**tensors, W_PERM: matrix}


def contradict(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**tensors, W_PERM + "_inv": tensors[W_PERM].roll(1, 0)}


@pytest.mark.parametrize("change", [blend, repeat_a_row, contradict])
def test_matrix_that_is_no_permutation_is_refused(tmp_path: Path, change: Change) -> None:
    with pytest.raises(WeightsError, match="step 1 of scale 0 mixes channels by a matrix that is not a permutation"):
        read_changed("resnet18", tmp_path, change)


@pytest.mark.parametrize(
    "lost",
    [
        W_PERM,
        "model.fast_flow_blocks.2.module_list.2.subnet.0.bias",
        "model.fast_flow_blocks.0.module_list.0.global_scale",
    ],
)
def test_checkpoint_that_lacks_a_tensor_of_the_flows_is_refused(tmp_path: Path, lost: str) -> None:
    with pytest.raises(WeightsError, match=lost.removeprefix("model.").replace(".", r"\.")):
        read_changed("resnet18", tmp_path, lambda tensors: {k: v for k, v in tensors.items() if k != lost})


@pytest.mark.parametrize("name", FLOWS)
def test_checkpoint_that_lacks_a_tensor_of_the_backbone_is_refused(tmp_path: Path, name: str) -> None:
    lost = {"resnet18": "layer2.0.conv1.weight", "deit": "blocks.7.mlp.fc2.weight", "cait": "blocks.40.gamma_2"}[name]
    with pytest.raises(WeightsError, match="is none of resnet18"):
        read_changed(name, tmp_path, lambda t: {k: v for k, v in t.items() if k != f"model.feature_extractor.{lost}"})


def test_other_backbone_than_the_one_named_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pt", read_fixture("deit")[0])
    with pytest.raises(WeightsError, match="is none of cait_m48_448"):
        read_anomalib(path, "cait_m48_448")
    with pytest.raises(ConfigError, match="no backbone 'vgg16'; choose one of auto, resnet18"):
        read_anomalib(path, "vgg16")


def test_oblong_images_are_refused(tmp_path: Path) -> None:
    def stretch(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: torch.cat([v, v], dim=1) if ".norms." in k else v for k, v in tensors.items()}

    with pytest.raises(WeightsError, match="64 x 128 pixels"):
        read_changed("resnet18", tmp_path, stretch)


def test_import_without_images_is_refused(tmp_path: Path, run: Run) -> None:
    path = write(tmp_path / "a.pt", read_fixture("resnet18")[0])
    arguments = ("-c", "bottle", "--data", str(tmp_path), "--registry", str(tmp_path / "models"))
    ran = run("models", "import-anomalib", str(path), *arguments)
    assert ran.code != 0
    assert "give a folder of normal images that did not train the model" in ran.err
    assert not (tmp_path / "models").exists()
