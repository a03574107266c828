"""What a training writes beside the weights: a page that is read back from the registry."""

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers.command_line import make_run

from flawstream.engines.torch_engine import TorchEngine
from flawstream.fastflow.backbone import Backbone
from flawstream.registry.registry import REPORT_FILE, Registry
from schemas.settings import BitDepth, LimitSettings, ModelSettings, TrainingSettings
from training.datasets.samples import CategoryData, Sample
from training.pipeline import TrainingJob, run_job
from training.steps.features import FeatureExtractor

MODEL = ModelSettings(strides=(16, 32), input_size=64, flow_steps=2, hidden_ratio=0.2)


def pictures(folder: Path, name: str, count: int, scale: int = 1) -> tuple[Path, ...]:
    folder.mkdir(exist_ok=True)
    noise = np.random.default_rng(0)
    paths = tuple(folder / f"{name}-{k:02}.png" for k in range(count))
    for path in paths:
        levels = noise.normal(128, 30, (64, 64, 3)).clip(0, 255) * scale
        cv2.imwrite(str(path), levels.astype(np.uint8 if scale == 1 else np.uint16))
    return paths


def test_page_is_beside_the_version_and_the_command_writes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    test = [Sample(path, anomalous=True, defect="hole", mask=None) for path in pictures(tmp_path / "x", "hole", 2)]
    data = CategoryData("bottle", pictures(tmp_path / "x", "train", 12), tuple(test))
    backbone = Backbone(MODEL)
    job = TrainingJob(data, MODEL, TrainingSettings(epochs=2, false_alarm_rate=0.4), str(tmp_path / "models"))
    *_, last = run_job(job, FeatureExtractor(backbone, LimitSettings(), 1), TorchEngine(backbone))
    assert last.manifest is not None
    registry = Registry(job.registry_root)
    registry.promote("bottle", last.manifest.version)
    page = registry.read_file(last.manifest, REPORT_FILE)
    for words in (last.manifest.model, "Loss while training", "train-", "hole-00.png"):
        assert words in page.decode()
    run = make_run(monkeypatch, capsys)
    ran = run("models", "report", "bottle", "--to", tmp_path / "new" / "page.html", "--registry", job.registry_root)
    assert (ran.code, ran.out.strip()) == (0, str(tmp_path / "new" / "page.html"))
    assert (tmp_path / "new" / "page.html").read_bytes() == page


@pytest.mark.parametrize(("given", "bits"), [({}, 12), ({"bottle": 14, "cable": 10}, 14)])
def test_depth_is_found_or_given_and_kept_in_the_manifest(
    tmp_path: Path, given: dict[str, BitDepth], bits: int
) -> None:
    test = [Sample(path, anomalous=True, defect="hole", mask=None) for path in pictures(tmp_path, "hole", 2, 16)]
    data = CategoryData("bottle", pictures(tmp_path, "train", 12, 16), tuple(test))
    backbone = Backbone(MODEL)
    recipe = TrainingSettings(epochs=1, false_alarm_rate=0.4, bit_depths=given)
    job = TrainingJob(data, MODEL, recipe, str(tmp_path / "models"))
    extractor = FeatureExtractor(backbone, LimitSettings(), 1)
    *_, last = run_job(job, extractor, TorchEngine(backbone))
    assert last.manifest is not None
    assert last.manifest.bit_depth == bits
    eight = CategoryData("cap", pictures(tmp_path, "eight", 12), ())
    *_, last = run_job(replace(job, data=eight), extractor, TorchEngine(backbone))
    assert last.manifest is not None
    assert last.manifest.bit_depth == 16  # the trainer's next category has its own
