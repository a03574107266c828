"""One category from a folder of images to a published model version, told step by step. No Ray in here."""

import hashlib
import platform
import tempfile
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType

import numpy as np

from flawstream.calibration import calibrate, shortage
from flawstream.fastflow.head import FastFlowHead
from flawstream.registry.registry import WEIGHTS_FILE, Registry, new_version
from schemas.manifest import (
    BackboneSpec,
    Calibration,
    FlowSpec,
    ImportRecord,
    Int8Trial,
    Metrics,
    ModelManifest,
    TrainingRecord,
)
from schemas.settings import ModelSettings, TrainingSettings
from training.datasets.samples import CategoryData
from training.steps.evaluate import Evaluation, ImageScorer
from training.steps.features import FeatureCache, FeatureExtractor
from training.steps.fit import Step, fit_head, split_rows
from training.steps.quantise import Material, try_int8


class Stage(StrEnum):
    """What a category's training is busy with."""

    FEATURES = "features"
    TRAINING = "training"
    CALIBRATING = "calibrating"
    EVALUATING = "evaluating"
    INT8 = "int8"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a job is.

    Attributes:
        job: Its name.
        stage: What is being done.
        done: Images done in this stage.
        total: Images to do in this stage.
        note: Something worth showing beside the bar.
        manifest: The published version, at the end.
        epoch: The epoch under way in `Stage.TRAINING`, from 1.
        loss: Its mean loss so far, nats per value summed over the scales.
    """

    job: str
    stage: Stage
    done: int
    total: int
    note: str = ""
    manifest: ModelManifest | None = None
    epoch: int = 0
    loss: float = float("nan")


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be trained, how, and where it goes.

    Attributes:
        data: The category's images.
        model: The shape of the flows.
        training: The recipe.
        registry_root: Where the version is written.
        label: Tells it from other jobs of the category; empty where it is the only one.
    """

    data: CategoryData
    model: ModelSettings
    training: TrainingSettings
    registry_root: str
    label: str = ""

    @property
    def name(self) -> str:
        """Name the job as its progress does."""
        return f"{self.data.name} {self.label}".rstrip()


def run_job(job: Job, extractor: FeatureExtractor) -> Iterator[Progress]:
    """Train, calibrate, evaluate and publish one category.

    Args:
        job: What to do.
        extractor: The backbone, shared by the jobs of a process.

    Yields:
        Progress; the last one carries the manifest.

    Raises:
        DatasetError: An image or a mask cannot be read, or there are too few.
        ConfigError: Training diverged, or the disk for temporary files is full.
        RegistryError: The registry cannot be written.
    """
    started = time.monotonic()
    data, recipe = job.data, job.training
    flow = FlowSpec.of(job.model)
    rows, held_out = split_rows(len(data.train), recipe)
    head = FastFlowHead(extractor.spec, flow, seed=recipe.seed)
    features = FeatureCache(Path(tempfile.gettempdir()), data.train, extractor)
    for done in features.fill():
        yield Progress(job.name, Stage.FEATURES, done, len(data.train))
    last = Step(0, 0, float("nan"))
    for last in fit_head(head, features, rows, recipe):
        note = f"epoch {last.epoch}/{recipe.epochs}  loss {last.loss:.3f}"
        total = recipe.epochs * len(rows)
        yield Progress(job.name, Stage.TRAINING, last.images, total, note, epoch=last.epoch, loss=last.loss)
    del features  # and its room on the disk
    calibration_paths = [data.train[row] for row in held_out]
    top_fraction = job.model.top_fraction
    scorer = ImageScorer(extractor, head, top_fraction)
    calibration = yield from calibrate_on(job.name, scorer, calibration_paths, top_fraction, recipe.false_alarm_rate)
    evaluation = Evaluation()
    test_images = scorer.score([sample.path for sample in data.test])
    for done, (sample, image) in enumerate(zip(data.test, test_images, strict=True), start=1):
        evaluation.add(sample, image)
        yield Progress(job.name, Stage.EVALUATING, done, len(data.test))
    int8: tuple[Int8Trial, ...] = ()
    int8_files: Mapping[str, bytes] = {}
    if recipe.int8:
        yield Progress(job.name, Stage.INT8, 0, 1)
        train = [data.train[row] for row in rows]
        material = Material(train, calibration_paths, data.test, top_fraction, calibration.threshold)
        int8, int8_files = try_int8(extractor, head, material)
    manifest = publish(
        job.registry_root,
        head,
        category=data.name,
        backbone=extractor.spec,
        flow=flow,
        calibration=calibration,
        metrics=evaluation.metrics(calibration.threshold),
        training=TrainingRecord(
            dataset_sha256=data.sha256(),
            train_images=len(rows),
            calibration_images=len(held_out),
            epochs=recipe.epochs,
            batch_size=recipe.batch_size,
            learning_rate=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            clip_norm=recipe.clip_norm,
            seed=recipe.seed,
            final_loss=last.loss,
            duration_s=time.monotonic() - started,
        ),
        int8=int8,
        beside=int8_files,
    )
    warning = shortage(len(held_out), recipe.false_alarm_rate) or ""
    yield Progress(job.name, Stage.DONE, 1, 1, warning, manifest)


def calibrate_on(
    name: str, scorer: ImageScorer, paths: Sequence[Path], top_fraction: float, false_alarm_rate: float
) -> Generator[Progress, None, Calibration]:
    """Score held-out normal images and set the thresholds by them.

    Args:
        name: What its progress is called.
        scorer: The head.
        paths: The images, none of which trained it.
        top_fraction: How the scorer takes image scores from maps.
        false_alarm_rate: Share of normal images that may be called anomalous.

    Yields:
        Progress.

    Returns:
        The calibration.

    Raises:
        DatasetError: An image cannot be read.
        ConfigError: A score is not finite.
    """
    scored = []
    for image in scorer.score(paths):
        scored.append((image.score, image.anomaly_map().max()))
        yield Progress(name, Stage.CALIBRATING, len(scored), len(paths))
    scores, peaks = np.array(scored, dtype=np.float64).T
    return calibrate(scores, peaks, false_alarm_rate, top_fraction)


def publish(
    registry_root: str,
    head: FastFlowHead,
    *,
    category: str,
    backbone: BackboneSpec,
    flow: FlowSpec,
    calibration: Calibration,
    metrics: Metrics,
    training: TrainingRecord | ImportRecord,
    int8: tuple[Int8Trial, ...] = (),
    beside: Mapping[str, bytes] = MappingProxyType({}),
) -> ModelManifest:
    """Write a version. It serves once it is promoted.

    Args:
        registry_root: Where to.
        head: Its weights.
        category: Whose.
        backbone: Goes into the manifest, as do the following.
        flow: The shape of the head.
        calibration: Its thresholds.
        metrics: What it did on test images.
        training: Where it is from.
        int8: What was found of it in int8.
        beside: Further files by name.

    Raises:
        RegistryError: The registry cannot be written.
    """
    files = {WEIGHTS_FILE: head.to_bytes(), **beside}
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    created_at = datetime.now(UTC)
    manifest = ModelManifest(
        category=category,
        version=new_version(created_at, digests[WEIGHTS_FILE]),
        created_at=created_at,
        backbone=backbone,
        flow=flow,
        calibration=calibration,
        metrics=metrics,
        training=training,
        int8=int8,
        libraries={"python": platform.python_version(), **{n: version(n) for n in ("flawstream", "torch", "timm")}},
        files=digests,
    )
    Registry(registry_root).write(manifest, files)
    return manifest
