"""`flawstream evaluate` with an engine that reads scores off images: what it prints, for programs and for people."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from helpers.command_line import Run, make_run
from helpers.tiny_models import TinyEngine, write_version

from flawstream.registry.registry import Registry
from flawstream_cli.commands import evaluate, train
from flawstream_cli.commands.train import train_all
from flawstream_cli.terminal import read_settings
from schemas.manifest import ModelManifest
from training.datasets.mvtec import load_mvtec
from training.pipeline import Progress, Stage, TrainingJob

LEVELS = {"good": (10, 20, 30, 220), "dent": (40, 200), "scratch": (210, 230, 250)}
"""Grey levels of the test images; a score is the level over 100, and the threshold is 1.9."""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data" / "bottle"
    files = {"train/good": range(12)} | {f"test/{kind}": levels for kind, levels in LEVELS.items()}
    for name, levels in files.items():
        (folder / name).mkdir(parents=True)
        for level in levels:
            cv2.imwrite(str(folder / name / f"{level:03}.png"), np.full((64, 64, 3), level, np.uint8))
    return tmp_path / "data"


def write_seed(registry: Registry, version: str, seed: int, **training: object) -> ModelManifest:
    made = write_version(registry, "bottle", f"{version}-draft", promote=False)
    weights = registry.read_file(made, "flow.safetensors")
    record = made.training.model_copy(update={"seed": seed, **training})
    manifest = made.model_copy(
        update={
            "version": version,
            "training": record,
            "files": {"flow.safetensors": hashlib.sha256(weights).hexdigest()},
        }
    )
    registry.write(manifest, {"flow.safetensors": weights})
    return manifest


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, data: Path) -> Run:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "make_engine", lambda *_: TinyEngine())
    command = make_run(monkeypatch, capsys)
    return lambda *arguments: command("evaluate", data, "--registry", tmp_path / "models", *arguments)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(str(tmp_path / "models"))


def read(run: Run, *arguments: object) -> dict[str, Any]:
    ran = run("--json", *arguments)
    assert ran.code == 0, ran.err
    told = json.loads(ran.out)["bottle"]
    assert isinstance(told, dict)
    return told


def test_report_that_cannot_be_written_is_refused_before_anything_is_loaded(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    ran = run("--report", tmp_path / "file" / "report.html")  # there is no registry either
    assert ran.code == 3
    assert "the report " in ran.err
    assert "cannot be written here" in ran.err


def test_json_tells_metrics_intervals_kinds_and_the_model(run: Run, registry: Registry) -> None:
    write_version(registry, "bottle")
    told = read(run)
    assert told["model"] == "bottle@v1"
    assert (told["threshold"], told["asked_false_alarm_rate"], told["calibration_images"]) == (1.9, 0.05, 19)
    assert (told["normal_images"], told["anomalous_images"]) == (4, 5)
    assert (told["false_alarm_rate"], told["recall"]) == (0.25, 0.8)
    assert told["image_auroc"] == pytest.approx((3 + 3 + 3 + 4 + 4) / 20)
    assert set(told["intervals"]) >= {"image_auroc", "false_alarm_rate", "recall"}
    assert told["aupro"] is None
    assert [(kind["defect"], kind["images"], kind["recall"]) for kind in told["defects"]] == [
        ("dent", 2, 0.5),
        ("scratch", 3, 1.0),
    ]
    assert told["warning"] is None
    assert "images" not in told


def test_images_are_told_one_by_one_when_asked(run: Run, registry: Registry) -> None:
    write_version(registry, "bottle")
    images = read(run, "--images")["images"]
    assert len(images) == 9
    found = next(one for one in images if one["path"].endswith("test/good/220.png"))
    assert found | {"path": ""} == {
        "path": "",
        "label": "good",
        "anomalous": False,
        "score": pytest.approx(2.2),
        "verdict": "anomalous",
    }
    assert run("--images").code == 2


def test_table_shows_intervals_and_kinds_of_defect(run: Run, registry: Registry, tmp_path: Path) -> None:
    write_version(registry, "bottle")
    ran = run("--report", tmp_path / "report.html")
    assert ran.code == 0
    assert all(text in ran.out for text in ("AUPRO", "0.850", "0.28-0.99", "By kind of defect", "scratch"))
    assert "ROC curve" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_too_few_calibration_images_are_told(run: Run, registry: Registry) -> None:
    write_version(registry, "bottle", scores=(1.0, 1.9))
    assert "needs 19 calibration images and there are 2" in read(run)["warning"]
    assert "needs 19 calibration images and there are 2" in " ".join(run().err.split())


def test_versions_of_other_seeds_are_compared_with_the_current_one(run: Run, registry: Registry) -> None:
    for version, seed in (("v1", 0), ("v2", 1), ("v3", 2), ("v4", 1)):
        write_seed(registry, version, seed)
    write_seed(registry, "v5", 3, epochs=9)  # another recipe
    write_seed(registry, "v6", 4, dataset_sha256="1" * 64)  # another data set
    registry.promote("bottle", "v1")
    told = read(run, "--versions", 3)
    assert [(one["model"], one["seed"]) for one in told["versions"]] == [
        ("bottle@v1", 0),
        ("bottle@v4", 1),
        ("bottle@v3", 2),
    ]
    assert told["mean"]["recall"] == pytest.approx(0.8)
    assert told["std"]["recall"] == pytest.approx(0, abs=1e-12)
    assert "aupro" not in told["mean"]
    table = run("--versions", 3).out
    assert "mean of 3" in table


def test_fewer_versions_than_asked_for_are_refused(run: Run, registry: Registry) -> None:
    write_seed(registry, "v1", 0)
    registry.promote("bottle", "v1")
    ran = run("--versions", 2)
    assert ran.code == 3
    assert "flawstream train --seeds 2" in " ".join(ran.err.split())


def test_training_over_seeds_promotes_the_first_alone_and_keeps_the_jobs_apart(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], data: Path, registry: Registry
) -> None:
    seen: list[TrainingJob] = []

    def fleet(jobs: Sequence[TrainingJob], *_: object, **__: object) -> Iterator[Progress]:
        seen.extend(jobs)
        for job in reversed(jobs[:-1]):
            made = write_version(registry, "bottle", f"v{job.training.seed}", scores=(1.0,), promote=False)
            record = made.training.model_copy(update={"seed": job.training.seed})
            yield Progress(job.name, Stage.DONE, 1, 1, "note", made.model_copy(update={"training": record}))
        yield Progress(jobs[-1].name, Stage.FAILED, 0, 1, "broken")

    monkeypatch.setattr(train, "train_fleet", fleet)
    settings = read_settings(None, training={"seed": 5}, registry={"root": registry.root})
    manifests, failures = train_all(load_mvtec(data), settings, seeds=3)
    assert [(job.name, job.training.seed) for job in seen] == [
        ("bottle seed 5", 5),
        ("bottle seed 6", 6),
        ("bottle seed 7", 7),
    ]
    assert registry.currents() == {"bottle": "v5"}
    assert [one.training.seed for one in manifests] == [5, 6]
    assert failures == {"bottle seed 7": "broken"}
    assert "needs 19 calibration images and there are 1" in " ".join(capsys.readouterr().err.split())
    assert replace(seen[0], label="").name == "bottle"
