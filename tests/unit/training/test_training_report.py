"""What a training writes beside the weights: a page that is read back from the registry."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers.command_line import make_run

from flawstream.engines.torch_engine import TorchEngine
from flawstream.fastflow.backbone import Backbone
from flawstream.registry.registry import REPORT_FILE, Registry
from schemas.settings import LimitSettings, ModelSettings, TrainingSettings
from training.datasets.samples import CategoryData, Sample
from training.pipeline import TrainingJob, run_job
from training.steps.features import FeatureExtractor

MODEL = ModelSettings(strides=(16, 32), input_size=64, flow_steps=2, hidden_ratio=0.2)


def pictures(folder: Path, name: str, count: int) -> tuple[Path, ...]:
    folder.mkdir(exist_ok=True)
    noise = np.random.default_rng(0)
    paths = tuple(folder / f"{name}-{k:02}.png" for k in range(count))
    for path in paths:
        cv2.imwrite(str(path), noise.normal(128, 30, (64, 64, 3)).clip(0, 255).astype(np.uint8))
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
