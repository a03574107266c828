"""Training over a real Ray cluster: in parallel, with failures that stay where they are."""

import contextlib
import logging
import os
import signal
from collections.abc import Generator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from logging.handlers import QueueHandler
from pathlib import Path
from queue import SimpleQueue

import cv2
import numpy as np
import pytest
import ray
import safetensors.torch
import torch
from helpers.tiny_models import write_version
from helpers.waiting import wait_until
from ray.util.state import list_actors

import training.fleet
from flawstream.engines.choose import make_local_engine
from flawstream.fastflow.backbone import Backbone
from flawstream.registry.registry import WEIGHTS_FILE, Registry
from flawstream_cli.cluster import Cluster
from flawstream_cli.commands.train import train_all
from schemas.errors import ConfigError
from schemas.settings import DetectorSettings, LimitSettings, ModelSettings, Settings, TrainingSettings
from training.datasets.samples import CategoryData, Sample
from training.fleet import train_fleet
from training.pipeline import Progress, Stage, TrainingJob, run_job
from training.placement import TrainerRequest
from training.steps.features import FeatureExtractor

MODEL = ModelSettings(strides=(16, 32), input_size=64, flow_steps=2, hidden_ratio=0.2)
RECIPE = TrainingSettings(epochs=1, batch_size=4, false_alarm_rate=0.4)
LIMITS = LimitSettings()
DETECTOR = DetectorSettings()


def write_images(folder: Path, name: str, count: int, seed: int, *, defective: bool = False) -> tuple[Path, ...]:
    """Write stripes in noise; a defect is a black square."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    paths = tuple(folder / f"{name}-{number:02}.png" for number in range(count))
    for path in paths:
        stripes = 128 + 60 * np.sin(np.arange(64) / (2 + seed))[None, :, None]
        image = np.clip(stripes + generator.normal(0, 12, (64, 64, 3)), 0, 255).astype(np.uint8)
        if defective:
            image[20:44, 20:44] = 0
        cv2.imwrite(str(path), image)
    return paths


def make_job(folder: Path, name: str, seed: int = 0, *, epochs: int = 1) -> TrainingJob:
    images = folder / name
    test = [
        Sample(path, anomalous=False, defect="good", mask=None) for path in write_images(images, "good", 3, seed)
    ] + [
        Sample(path, anomalous=True, defect="hole", mask=None)
        for path in write_images(images, "hole", 3, seed, defective=True)
    ]
    data = CategoryData(name, write_images(images, "train", 12, seed), tuple(test))
    return TrainingJob(data, MODEL, RECIPE.model_copy(update={"epochs": epochs}), str(folder / "models"))


def fleet(
    jobs: list[TrainingJob], model: ModelSettings = MODEL, training: TrainingSettings = RECIPE
) -> Generator[Progress, None, None]:
    generator = train_fleet(jobs, model, LIMITS, DETECTOR, training)
    assert isinstance(generator, Generator)
    return generator


@dataclass
class Outcome:
    """What came of four jobs: two good ones, one with a corrupt image, one that meets a bug."""

    jobs: dict[str, TrainingJob]
    progress: list[Progress]
    logged: list[str]

    def of(self, name: str) -> list[Progress]:
        return [one for one in self.progress if one.job == name]


@pytest.fixture(scope="module")
def outcome(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    del cluster  # what is trained on
    folder = tmp_path_factory.mktemp("fleet")
    jobs = {name: make_job(folder, name, seed) for seed, name in enumerate(("corrupt", "buggy", "bottle", "cable"))}
    jobs["corrupt"].data.train[5].write_bytes(b"\x89PNG\r\n\x1a\nno image")
    nonsense = CategoryData("buggy", jobs["buggy"].data.train, (None,))  # type: ignore[arg-type]
    jobs["buggy"] = replace(jobs["buggy"], data=nonsense)
    said: SimpleQueue[logging.LogRecord] = SimpleQueue()
    log = QueueHandler(said)
    logging.getLogger("training.fleet").addHandler(log)
    progress = list(fleet(list(jobs.values())))
    logging.getLogger("training.fleet").removeHandler(log)
    return Outcome(jobs, progress, [said.get().getMessage() for _ in range(said.qsize())])


@pytest.mark.parametrize("name", ["bottle", "cable"])
def test_category_is_trained_and_its_version_is_written(outcome: Outcome, name: str) -> None:
    stages = [one.stage for one in outcome.of(name)]
    assert list(dict.fromkeys(stages)) == [
        Stage.FEATURES,
        Stage.TRAINING,
        Stage.INT8,
        Stage.CALIBRATING,
        Stage.EVALUATING,
        Stage.DONE,
    ]
    assert stages.count(Stage.DONE) == 1
    assert all(one.done <= one.total for one in outcome.of(name))
    manifest = outcome.of(name)[-1].manifest
    assert manifest is not None
    registry = Registry(outcome.jobs[name].registry_root)
    assert registry.manifest(name, manifest.version) == manifest
    assert manifest.metrics.image_auroc is not None
    assert (manifest.metrics.normal_images, manifest.metrics.anomalous_images) == (3, 3)
    assert (manifest.training.train_images, manifest.training.calibration_images) == (10, 2)
    assert len(manifest.calibration.scores) == 2


def test_every_stage_is_told_to_its_end(outcome: Outcome) -> None:
    for stage, total in ((Stage.FEATURES, 12), (Stage.TRAINING, 10), (Stage.CALIBRATING, 2), (Stage.EVALUATING, 6)):
        ends = [one for one in outcome.of("bottle") if one.stage is stage]
        assert (ends[-1].done, ends[-1].total) == (total, total)


def test_weights_are_those_of_training_without_ray(outcome: Outcome, tmp_path: Path) -> None:
    there = outcome.jobs["bottle"]
    here = replace(there, registry_root=str(tmp_path))
    backbone = Backbone(MODEL)
    engine = make_local_engine(DETECTOR, lambda: backbone, threads=1)
    *_, alone = run_job(here, FeatureExtractor(backbone, LIMITS, threads=1), engine)
    over_ray = outcome.of("bottle")[-1]
    assert alone.manifest is not None
    assert over_ray.manifest is not None
    assert alone.manifest.training.dataset_sha256 == over_ray.manifest.training.dataset_sha256
    ours = safetensors.torch.load(Registry(here.registry_root).read_file(alone.manifest, WEIGHTS_FILE))
    theirs = safetensors.torch.load(Registry(there.registry_root).read_file(over_ray.manifest, WEIGHTS_FILE))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)  # the number of threads changes the last bits


def test_corrupt_image_fails_its_category_alone_and_is_named(outcome: Outcome) -> None:
    failed = outcome.of("corrupt")[-1]
    assert failed.stage is Stage.FAILED
    assert "train-05.png" in failed.note
    assert failed.note.endswith("repair or remove the file")
    assert Registry(outcome.jobs["bottle"].registry_root).categories() == ["bottle", "cable"]


def test_bug_is_told_in_one_line_and_logged_whole(outcome: Outcome) -> None:
    failed = outcome.of("buggy")[-1]
    assert failed.stage is Stage.FAILED
    assert failed.note == "AttributeError: 'NoneType' object has no attribute 'path'"
    (text,) = outcome.logged
    assert text.startswith("buggy: ")
    assert "in run_on_copy" in text


@pytest.mark.usefixtures("cluster")
def test_fleet_whose_every_job_fails_ends_and_says_why(tmp_path: Path) -> None:
    jobs = [make_job(tmp_path, name) for name in ("bottle", "cable", "tile")]
    (tmp_path / "weights.pth").write_bytes(b"garbage")
    model = MODEL.model_copy(update={"backbone": "resnet18", "weights": str(tmp_path / "weights.pth")})
    progress = list(fleet(jobs, model))
    assert [one.stage for one in progress] == [Stage.FAILED] * 3
    assert {one.job for one in progress} == {"bottle", "cable", "tile"}
    for one in progress:
        assert one.note.startswith("cannot read backbone weights from")
        assert len(one.note) < 600


def trainers(cluster: Cluster) -> set[int]:
    """Find the processes that train."""
    filters = [("class_name", "=", "Trainer"), ("state", "=", "ALIVE")]
    return {actor.pid for actor in list_actors(cluster.dashboard_url, filters=filters)}


def test_killed_trainers_jobs_are_retried_and_whoever_stops_consuming_stops_the_rest(
    cluster: Cluster, tmp_path: Path
) -> None:
    """All are killed as by a kernel out of memory."""
    count = int(cluster.cpus)
    jobs = [make_job(tmp_path, f"slow-{number}", epochs=100_000) for number in range(count)]
    last: dict[str, Progress] = {}
    killed: set[int] = set()
    retried: dict[str, Progress] = {}
    progress = fleet(jobs)
    for one in progress:
        last[one.job] = one
        if not killed and [latest.stage for latest in last.values()] == [Stage.TRAINING] * count:
            killed = trainers(cluster)
            for pid in killed:
                os.kill(pid, signal.SIGKILL)
        if one.stage is Stage.WAITING:
            retried[one.job] = one
        elif retried and all(last[job.name].stage is Stage.TRAINING for job in jobs):
            break
    assert len(killed) == count
    assert len(retried) == count
    for one in retried.values():
        assert one.note.startswith("retry 1 of 3: its trainer on ")
        assert "was lost: " in one.note
        assert "\n" not in one.note
    assert trainers(cluster) - killed
    progress.close()
    wait_until(lambda: not trainers(cluster), "the rest stop")
    assert Registry(jobs[0].registry_root).categories() == []


def test_job_that_always_kills_its_trainer_fails_alone_after_three_retries(cluster: Cluster, tmp_path: Path) -> None:
    jobs = [make_job(tmp_path, "deadly", epochs=100_000), make_job(tmp_path, "bottle")]
    deaths = 0
    ends: dict[str, Progress] = {}
    for one in fleet(jobs):
        if one.job == "deadly" and one.stage is Stage.TRAINING:
            for actor in trainers(cluster):
                if "train deadly" in Path(f"/proc/{actor}/cmdline").read_text():
                    os.kill(actor, signal.SIGKILL)
        deaths += one.stage is Stage.WAITING
        ends[one.job] = one
    assert deaths == 3
    assert ends["deadly"].stage is Stage.FAILED
    assert "was lost: " in ends["deadly"].note
    assert ends["deadly"].note.endswith("so were 3 before it")
    assert ends["bottle"].stage is Stage.DONE
    assert Registry(jobs[0].registry_root).categories() == ["bottle"]


@pytest.fixture
def groups_of_three(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """One trainer, which takes three jobs at once, as on a GPU."""
    request = TrainerRequest("cpu", int(cluster.cpus), gpus=0.0, memory_gb=1.0, labels={}, jobs=3)
    monkeypatch.setattr(training.fleet, "make_requests", lambda *_: [request])


@pytest.mark.usefixtures("groups_of_three")
def test_damaged_category_of_a_group_fails_alone(tmp_path: Path) -> None:
    jobs = [make_job(tmp_path, name, seed) for seed, name in enumerate(("bottle", "corrupt", "cable"))]
    jobs[1].data.train[5].write_bytes(b"no image")
    progress = list(fleet(jobs))
    ends = {one.job: one for one in progress}
    assert [ends[job.name].stage for job in jobs] == [Stage.DONE, Stage.FAILED, Stage.DONE]
    assert "train-05.png" in ends["corrupt"].note
    stages = [one.stage for one in progress]
    last_features = max(number for number, stage in enumerate(stages) if stage is Stage.FEATURES)
    assert last_features < stages.index(Stage.TRAINING)  # they were trained together
    backbone = Backbone(MODEL)
    opened = FeatureExtractor(backbone, LIMITS, threads=1), make_local_engine(DETECTOR, lambda: backbone, threads=1)
    for job in (jobs[0], jobs[2]):
        *_, alone = run_job(replace(job, registry_root=str(tmp_path / "alone")), *opened)
        manifest = ends[job.name].manifest
        assert alone.manifest is not None
        assert manifest is not None
        expected = safetensors.torch.load(Registry(str(tmp_path / "alone")).read_file(alone.manifest, WEIGHTS_FILE))
        found = safetensors.torch.load(Registry(job.registry_root).read_file(manifest, WEIGHTS_FILE))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)  # the number of threads changes the last bits


@pytest.mark.usefixtures("groups_of_three")
def test_each_job_of_a_lost_group_is_retried_alone(cluster: Cluster, tmp_path: Path) -> None:
    jobs = [make_job(tmp_path, name, epochs=3000) for name in ("bottle", "cable")]
    killed: set[int] = set()
    retried: list[Progress] = []
    after: set[str] = set()
    last: dict[str, Stage] = {}
    with contextlib.closing(fleet(jobs)) as progress:
        for one in progress:
            last[one.job] = one.stage
            if not killed and list(last.values()) == [Stage.TRAINING] * 2:
                killed = trainers(cluster)
                for pid in killed:
                    os.kill(pid, signal.SIGKILL)
            if one.stage is Stage.WAITING:
                retried.append(one)
            elif len(retried) == 2:
                after.add(one.job)
                if one.stage is Stage.TRAINING:
                    break
    assert [one.job for one in retried] == ["cable", "bottle"]
    assert all(one.note.startswith("retry 1 of 3: its trainer on ") for one in retried)
    assert after == {"bottle"}


@pytest.mark.usefixtures("cluster")
def test_category_is_trained_beside_a_cpu_that_somebody_else_holds(cluster: Cluster, tmp_path: Path) -> None:
    """All jobs end though the second trainer never gets its CPU: none was given to it."""

    class Holder:  # in here: Ray sends it by value, as workers cannot import tests
        def hold(self) -> bool:
            return True

    holder = ray.remote(Holder).options(num_cpus=int(cluster.cpus) - 1).remote()
    ray.get(holder.hold.remote())
    try:
        jobs = [make_job(tmp_path, name) for name in ("bottle", "cable", "tile")]
        ends = {one.job: one.stage for one in fleet(jobs)}
    finally:
        ray.kill(holder)
    assert ends == dict.fromkeys(("bottle", "cable", "tile"), Stage.DONE)
    wait_until(lambda: not trainers(cluster), "the trainer that waited is released")


@pytest.mark.usefixtures("cluster")
def test_request_that_no_node_meets_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no node can train a category, which needs 999 CPUs, .*The cluster has: "):
        list(fleet([make_job(tmp_path, "bottle")], training=TrainingSettings(threads=999)))
    with pytest.raises(ConfigError, match="the label zone=mars"):
        list(fleet([make_job(tmp_path, "bottle")], training=TrainingSettings(labels={"zone": "mars"})))


def test_largest_category_is_trained_first(cluster: Cluster, tmp_path: Path) -> None:
    alone = RECIPE.model_copy(update={"threads": int(cluster.cpus)})  # one trainer takes all CPUs
    small, large = (replace(make_job(tmp_path, name), training=alone) for name in ("small", "large"))
    small = replace(small, data=replace(small.data, test=()))
    with contextlib.closing(fleet([small, large], training=alone)) as progress:
        assert next(progress).job == "large"


@pytest.mark.usefixtures("cluster")
def test_version_that_the_driver_cannot_read_is_a_failure_that_names_node_and_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The registry is a folder of each node's own: what is written there, the driver does not see."""
    monkeypatch.setattr(training.fleet, "_READ_BACK_S", 0.5)
    job = make_job(tmp_path, "bottle")
    elsewhere = tmp_path / "models"
    monkeypatch.setattr(training.fleet, "Registry", lambda root: Registry(f"{root}-of-the-driver"))
    *_, last = fleet([job])
    assert last.stage is Stage.FAILED
    assert last.manifest is None
    assert "was written on node " in last.note
    assert f"registry.root={elsewhere} must be storage that all nodes share" in last.note


def test_second_attempt_at_a_job_writes_no_second_version(tmp_path: Path) -> None:
    """As when the first one was given up by the driver and went on: both write in the end."""
    job = replace(make_job(tmp_path, "bottle"), created_at=datetime(2026, 1, 1, tzinfo=UTC))
    backbone = Backbone(MODEL)
    engine = make_local_engine(DETECTOR, lambda: backbone, threads=1)
    ends = []
    for _ in range(2):
        *_, last = run_job(job, FeatureExtractor(backbone, LIMITS, threads=1), engine)
        ends.append(last.manifest)
    assert ends[0] == ends[1]
    assert len(Registry(job.registry_root).versions("bottle")) == 1


@pytest.mark.usefixtures("cluster")
def test_run_that_changes_the_backbone_promotes_what_is_trained_beside_what_failed(tmp_path: Path) -> None:
    registry = Registry(str(tmp_path / "models"))
    jobs = [make_job(tmp_path, name, seed) for seed, name in enumerate(("bottle", "cable"))]
    for job in jobs:
        write_version(registry, job.data.name)
    jobs[1].data.train[5].write_bytes(b"no image")
    settings = Settings().model_copy(update={"model": MODEL, "training": RECIPE.model_copy(update={"int8": False})})
    settings = settings.model_copy(update={"registry": settings.registry.model_copy(update={"root": registry.root})})
    (trained,), failures = train_all([job.data for job in jobs], settings)
    assert set(failures) == {"cable"}
    assert registry.currents() == {"bottle": trained.version, "cable": "v1"}
    assert trained.backbone.identity != registry.manifest("cable", "v1").backbone.identity
