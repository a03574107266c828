"""The training of one category, from image files to a published version, with progress. Knows no Ray."""

import hashlib
import platform
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from flawstream.calibration import calibrate, is_finite, shortage
from flawstream.engines.device import open_device
from flawstream.engines.protocol import Engine
from flawstream.fastflow.head import FastFlowHead
from flawstream.registry.registry import REPORT_FILE, WEIGHTS_FILE, Registry, new_version
from schemas.manifest import (
    Arithmetic,
    ArithmeticTrial,
    BackboneSpec,
    Calibration,
    Device,
    EvaluationMetrics,
    FlowSpec,
    ImportRecord,
    ModelManifest,
    TrainingRecord,
)
from schemas.settings import BitDepth, DetectorSettings, ModelSettings, TrainingSettings
from training.datasets.bit_depth import find_bit_depth
from training.datasets.samples import CategoryData, Sample
from training.report.report import TrainingCourse, judge, training_report
from training.steps.evaluate import Evaluation, ImageScorer, ScoredImage
from training.steps.features import FeatureCache, FeatureExtractor
from training.steps.fit import CategoryFit, FitProgress, fit_heads, prepare_fit, split_rows
from training.steps.trials import Judged, choose_candidate, make_candidates
from training.work import Recipe


class Stage(StrEnum):
    """Stages of a training job. It waits again when its trainer was lost."""

    WAITING = "waiting"
    DOWNLOADING = "downloading"
    FEATURES = "features"
    TRAINING = "training"
    CALIBRATING = "calibrating"
    EVALUATING = "evaluating"
    INT8 = "int8"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress of a training job.

    Attributes:
        job: Name of the job.
        stage: The current stage.
        done: Images processed in this stage.
        total: Images to process in this stage.
        note: Text to display.
        manifest: The published version, at the end.
        epoch: The current epoch in `Stage.TRAINING`, from 1.
        loss: Mean loss of the current epoch, nats per value summed over the scales.
        traceback: Of a bug, in `Stage.FAILED`.
    """

    job: str
    stage: Stage
    done: int
    total: int
    note: str = ""
    manifest: ModelManifest | None = None
    epoch: int = 0
    loss: float = float("nan")
    traceback: str = ""


@dataclass(frozen=True, slots=True)
class TrainingJob:
    """The training of one category.

    Attributes:
        data: The category's images.
        model: Configuration of the flows.
        training: The recipe.
        registry_root: The registry to write to.
        label: Distinguishes several jobs of one category; may be empty.
        detector: The engine that calibrates, for the digest of the work.
        created_at: Time of the version. Attempts at one job have the same, so that they write the same version, once.
    """

    data: CategoryData
    model: ModelSettings
    training: TrainingSettings
    registry_root: str
    label: str = ""
    detector: DetectorSettings = field(default_factory=DetectorSettings)
    created_at: datetime | None = None

    @property
    def name(self) -> str:
        """Name of the job, as in its progress."""
        return f"{self.data.name} {self.label}".rstrip()


class PendingFit:
    """The fit that a job waits for. The caller of `run_stages` carries it out with `fit_heads`, and reports its steps.

    Args:
        job: The training job.
        fit: Its head, and what that is trained on.

    Attributes:
        fit: The same.
        losses: Mean loss of each epoch, so far.
        images: Images processed, so far.
    """

    def __init__(self, job: TrainingJob, fit: CategoryFit) -> None:
        self._job, self.fit = job, fit
        self.losses = [float("nan")] * job.training.epochs
        self.images = 0

    def report(self, step: FitProgress) -> Progress:
        """Record a step of the fit; return the job's progress."""
        self.losses[step.epoch - 1], self.images = step.loss, step.images
        epochs = len(self.losses)
        note = f"epoch {step.epoch}/{epochs}  loss {step.loss:.3f}"
        total = epochs * len(self.fit.rows)
        return Progress(self._job.name, Stage.TRAINING, step.images, total, note, epoch=step.epoch, loss=step.loss)


def run_job(job: TrainingJob, extractor: FeatureExtractor, engine: Engine) -> Iterator[Progress]:
    """Run all stages of one job; `training.groups` runs several."""
    for step in run_stages(job, extractor, engine):
        if isinstance(step, PendingFit):
            for _, progress in fit_heads([step.fit]):
                yield step.report(progress)
        else:
            yield step


def run_stages(
    job: TrainingJob, extractor: FeatureExtractor, engine: Engine
) -> Generator[Progress | PendingFit, None, None]:
    """Train, calibrate, evaluate and publish one category, except for the fit.

    Args:
        job: The training job.
        extractor: The backbone, shared by the jobs of a process.
        engine: The engine that will serve, with the same backbone, used for calibration and evaluation.

    Yields:
        Progress; the last one has the manifest. And once the fit, which has ended when the next is asked for.

    Raises:
        DatasetError: An image or a mask cannot be read, or there are too few images.
        ConfigError: Training diverged, or the disk for temporary files is full.
        StorageUnavailableError: The registry cannot be written.
    """
    started_s = time.monotonic()
    images, recipe = job.data.train, job.training
    train_rows, held_out_rows = split_rows(len(images), recipe)
    extractor = extractor.at_depth(recipe.bit_depths.get(job.data.name) or find_bit_depth(job.data, extractor.limits))
    head = FastFlowHead(extractor.spec, FlowSpec.of(job.model), seed=recipe.seed)
    losses = yield from _fit(job, extractor, head, train_rows)
    data = EvaluationData(
        held_out=[images[row] for row in held_out_rows],
        test=job.data.test,
        int8_images=[images[row] for row in train_rows] if recipe.int8 else (),
        top_fraction=job.model.top_fraction,
        false_alarm_rate=recipe.false_alarm_rate,
    )
    evaluated = yield from evaluate_version(job.name, extractor, engine, head, data)
    device: Device = "cuda" if open_device().type == "cuda" else "cpu"
    dataset_sha256 = job.data.sha256()
    manifest = publish(
        job.registry_root,
        head,
        category=job.data.name,
        backbone=extractor.spec,
        flow=FlowSpec.of(job.model),
        bit_depth=extractor.form.bits,
        evaluated=evaluated,
        training=TrainingRecord(
            dataset_sha256=dataset_sha256,
            train_images=len(train_rows),
            calibration_images=len(held_out_rows),
            epochs=recipe.epochs,
            batch_size=recipe.batch_size,
            learning_rate=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            clip_norm=recipe.clip_norm,
            seed=recipe.seed,
            final_loss=losses[-1],
            duration_s=time.monotonic() - started_s,
            threads=recipe.threads,
            device=device,
            work_sha256=Recipe(extractor.spec, job.model, recipe, job.detector, device).work_sha256(dataset_sha256),
        ),
        created_at=job.created_at,
        report=lambda model: _report(model, job.data, losses, evaluated),
    )
    warning = shortage(len(held_out_rows), recipe.false_alarm_rate) or ""
    yield Progress(job.name, Stage.DONE, 1, 1, warning, manifest)


def _fit(
    job: TrainingJob, extractor: FeatureExtractor, head: FastFlowHead, rows: NDArray[np.int64]
) -> Generator[Progress | PendingFit, None, list[float]]:
    """Compute features, and have the head trained; return the loss of each epoch. Frees the features' disk space."""
    images = job.data.train
    features = FeatureCache(Path(tempfile.gettempdir()), images, extractor)
    for done in features.fill():
        yield Progress(job.name, Stage.FEATURES, done, len(images))
    pending = PendingFit(job, prepare_fit(head, features, rows, job.training))
    del features  # with few images, the fit has white ones in place of them
    yield pending
    return pending.losses


def _report(model: str, data: CategoryData, losses: Sequence[float], evaluated: "EvaluatedVersion") -> bytes:
    """Make the page that lies beside the version."""
    threshold = evaluated.calibration.threshold
    normal = [Sample(image.path, anomalous=False, defect="held out", mask=None) for image in evaluated.held_out]
    held_out = [judge(data.name, *pair, threshold) for pair in zip(normal, evaluated.held_out, strict=True)]
    judged = [judge(data.name, *pair, threshold) for pair in zip(data.test, evaluated.test, strict=True)]
    return training_report(model, TrainingCourse(losses, held_out), judged, evaluated.metrics)


@dataclass(frozen=True, slots=True)
class EvaluationData:
    """Images and settings to calibrate and evaluate a version with.

    Attributes:
        held_out: Normal images that did not train the version.
        test: Labelled images; may be empty.
        int8_images: Normal images that set the ranges of int8; empty: no trial of int8.
        top_fraction: Fraction of the grid that the image score is computed from.
        false_alarm_rate: Share of normal images that may be called anomalous.
    """

    held_out: Sequence[Path]
    test: Sequence[Sample]
    int8_images: Sequence[Path]
    top_fraction: float
    false_alarm_rate: float


@dataclass(frozen=True, slots=True)
class EvaluatedVersion:
    """Calibration and evaluation of a version.

    Attributes:
        calibration: Thresholds in the arithmetic of the engine.
        metrics: Metrics on test images.
        trials: Results of trials of faster arithmetics.
        trial_files: Files of the int8 graph that passed its trial, by name; empty if none did.
        held_out: The held-out images, scored in the arithmetic of the engine.
        test: The test images, scored so.
    """

    calibration: Calibration
    metrics: EvaluationMetrics
    trials: tuple[ArithmeticTrial, ...]
    trial_files: Mapping[str, bytes]
    held_out: Sequence[ScoredImage]
    test: Sequence[ScoredImage]


def evaluate_version(
    name: str,
    extractor: FeatureExtractor,
    engine: Engine,
    head: FastFlowHead,
    data: EvaluationData,
) -> Generator[Progress, None, EvaluatedVersion]:
    """Calibrate and evaluate a head with the engine that will serve, with trials. Decodes each image once.

    Args:
        name: Name of the job, for its progress.
        extractor: The backbone, for the ranges of int8.
        engine: The engine that will serve.
        head: The trained head.
        data: Images and settings.

    Yields:
        Progress.

    Raises:
        DatasetError: An image or a mask cannot be read.
        ConfigError: A score is not finite.
    """
    if data.int8_images:
        yield Progress(name, Stage.INT8, 0, 1)
    candidates = make_candidates(extractor, engine, head, data.int8_images, len(data.held_out))
    heads = [engine.load(head, None), *(candidate.loaded for candidate in candidates)]
    scorer = ImageScorer(engine, heads, extractor.limits, data.top_fraction, extractor.form.bits)
    scores_and_peaks: list[tuple[tuple[float, float], ...]] = []
    scored: list[ScoredImage] = []
    tested: list[ScoredImage] = []
    for images in scorer.score(data.held_out):
        scored.append(images[0])
        scores_and_peaks.append(tuple((image.score, float(image.anomaly_map().max())) for image in images))
        yield Progress(name, Stage.CALIBRATING, len(scores_and_peaks), len(data.held_out))
    held_out = np.array(scores_and_peaks, dtype=np.float64)  # (N, heads, 2: score and peak)
    evaluations = [Evaluation() for _ in heads]
    for done, (sample, images) in enumerate(
        zip(data.test, scorer.score([sample.path for sample in data.test]), strict=True), start=1
    ):
        tested.append(images[0])
        for evaluation, image in zip(evaluations, images, strict=True):
            evaluation.add(sample, image)
        yield Progress(name, Stage.EVALUATING, done, len(data.test))

    def summarise(index: int, arithmetic: Arithmetic) -> Judged:
        scores, peaks = held_out[:, index].T
        calibration = calibrate(scores, peaks, data.false_alarm_rate, data.top_fraction, arithmetic)
        evaluation = evaluations[index]
        return Judged(scores, evaluation.scores(anomalous=True), calibration, evaluation.metrics(calibration.threshold))

    exact = summarise(0, engine.precision)
    finite = [index for index in range(1, len(heads)) if is_finite(held_out[:, index]).all()]
    tried = [candidates[index - 1] for index in finite]
    judged = [summarise(index, candidate.arithmetic) for index, candidate in zip(finite, tried, strict=True)]
    trials, files = choose_candidate(tried, judged, exact)
    return EvaluatedVersion(exact.calibration, exact.metrics, trials, files, scored, tested)


def publish(
    registry_root: str,
    head: FastFlowHead,
    *,
    category: str,
    backbone: BackboneSpec,
    flow: FlowSpec,
    bit_depth: BitDepth,
    evaluated: EvaluatedVersion,
    training: TrainingRecord | ImportRecord,
    extra_files: Mapping[str, bytes] = MappingProxyType({}),
    created_at: datetime | None = None,
    report: Callable[[str], bytes] | None = None,
) -> ModelManifest:
    """Write a version to the registry. It serves only after it is promoted.

    A version of the same time and weights, written by an earlier attempt at the same job, is kept and returned.

    Args:
        registry_root: The registry.
        head: The trained head.
        category: The category.
        backbone: The backbone, for the manifest.
        flow: Configuration of the head, for the manifest.
        bit_depth: By how many bits files of 16 were read.
        evaluated: Calibration, metrics and int8 graph.
        training: Record of the training or import, for the manifest.
        extra_files: Further files by name.
        created_at: Time of the version; None: now.
        report: Makes a page about it, given its name.

    Raises:
        StorageUnavailableError: The registry cannot be written.
    """
    files = {WEIGHTS_FILE: head.to_bytes(), **evaluated.trial_files, **extra_files}
    registry, created_at = Registry(registry_root), created_at or datetime.now(UTC)
    name = new_version(created_at, hashlib.sha256(files[WEIGHTS_FILE]).hexdigest())
    if name in registry.versions(category):
        return registry.manifest(category, name)
    if report is not None:
        files[REPORT_FILE] = report(f"{category}@{name}")
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    manifest = ModelManifest(
        category=category,
        version=name,
        created_at=created_at,
        backbone=backbone,
        flow=flow,
        bit_depth=bit_depth,
        calibration=evaluated.calibration,
        metrics=evaluated.metrics,
        training=training,
        trials=evaluated.trials,
        libraries={"python": platform.python_version(), **{n: version(n) for n in ("flawstream", "torch", "timm")}},
        files=digests,
    )
    registry.write(manifest, files)
    return manifest
