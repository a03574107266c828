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

from flawstream.calibration import calibrate, is_finite, shortage
from flawstream.engines.protocol import Engine
from flawstream.fastflow.head import FastFlowHead
from flawstream.registry.registry import WEIGHTS_FILE, Registry, new_version
from schemas.manifest import (
    Arithmetic,
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
from training.datasets.samples import CategoryData, Sample
from training.steps.evaluate import Evaluation, ImageScorer
from training.steps.features import FeatureCache, FeatureExtractor
from training.steps.fit import Step, fit_head, split_rows
from training.steps.quantise import Int8Candidate, Judged, choose_int8, make_candidates


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


def run_job(job: Job, extractor: FeatureExtractor, engine: Engine) -> Iterator[Progress]:
    """Train, calibrate, evaluate and publish one category.

    Args:
        job: What to do.
        extractor: The backbone, shared by the jobs of a process.
        engine: The one that will serve, on the same backbone: thresholds and metrics come from its arithmetic.

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
    proof = Proof(
        held_out=[data.train[row] for row in held_out],
        test=data.test,
        ranges=[data.train[row] for row in rows] if recipe.int8 else (),
        top_fraction=job.model.top_fraction,
        false_alarm_rate=recipe.false_alarm_rate,
    )
    found = yield from judge_version(job.name, extractor, engine, head, proof)
    manifest = publish(
        job.registry_root,
        head,
        category=data.name,
        backbone=extractor.spec,
        flow=flow,
        found=found,
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
    )
    warning = shortage(len(held_out), recipe.false_alarm_rate) or ""
    yield Progress(job.name, Stage.DONE, 1, 1, warning, manifest)


@dataclass(frozen=True, slots=True)
class Proof:
    """What a version is calibrated and measured on.

    Attributes:
        held_out: Normal images that did not train it.
        test: Labelled images; may be none.
        ranges: Normal images that int8 takes its ranges from; none: int8 is not tried.
        top_fraction: How image scores are taken from maps.
        false_alarm_rate: Share of normal images that may be called anomalous.
    """

    held_out: Sequence[Path]
    test: Sequence[Sample]
    ranges: Sequence[Path]
    top_fraction: float
    false_alarm_rate: float


@dataclass(frozen=True, slots=True)
class Findings:
    """What was found of a version.

    Attributes:
        calibration: Its thresholds, in the arithmetic of the engine.
        metrics: What it did on test images.
        int8: What was found of it in int8.
        int8_files: The graph that may serve in int8, if one may, by name.
    """

    calibration: Calibration
    metrics: Metrics
    int8: tuple[Int8Trial, ...]
    int8_files: Mapping[str, bytes]


def judge_version(
    name: str,
    extractor: FeatureExtractor,
    engine: Engine,
    head: FastFlowHead,
    proof: Proof,
) -> Generator[Progress, None, Findings]:
    """Calibrate and measure a head as it will serve, in int8 as well where that may pay. Each image is decoded once.

    Args:
        name: What its progress is called.
        extractor: The backbone, for the ranges of int8.
        engine: The one that will serve.
        head: Trained.
        proof: The images.

    Yields:
        Progress.

    Raises:
        DatasetError: An image or a mask cannot be read.
        ConfigError: A score is not finite.
    """
    candidates: list[Int8Candidate] = []
    if proof.ranges:
        yield Progress(name, Stage.INT8, 0, 1)
        candidates = make_candidates(extractor, head, proof.ranges, len(proof.held_out))
    heads = [engine.load(head, None), *(candidate.loaded for candidate in candidates)]
    scorer = ImageScorer(engine, heads, extractor.limits, proof.top_fraction)
    held_out: list[tuple[tuple[float, float], ...]] = []
    for images in scorer.score(proof.held_out):
        held_out.append(tuple((image.score, float(image.anomaly_map().max())) for image in images))
        yield Progress(name, Stage.CALIBRATING, len(held_out), len(proof.held_out))
    scored = np.array(held_out, dtype=np.float64)  # (N, forms, score and peak)
    evaluations = [Evaluation() for _ in heads]
    for done, (sample, images) in enumerate(
        zip(proof.test, scorer.score([sample.path for sample in proof.test]), strict=True), start=1
    ):
        for evaluation, image in zip(evaluations, images, strict=True):
            evaluation.add(sample, image)
        yield Progress(name, Stage.EVALUATING, done, len(proof.test))

    def judged(form: int, arithmetic: Arithmetic) -> Judged:
        scores, peaks = scored[:, form].T
        calibration = calibrate(scores, peaks, proof.false_alarm_rate, proof.top_fraction, arithmetic)
        evaluation = evaluations[form]
        return Judged(scores, evaluation.scores(anomalous=True), calibration, evaluation.metrics(calibration.threshold))

    exact = judged(0, engine.precision)
    finite = [form for form in range(1, len(heads)) if is_finite(scored[:, form]).all()]
    int8, files = choose_int8(
        [candidates[form - 1] for form in finite], [judged(form, "int8") for form in finite], exact
    )
    return Findings(exact.calibration, exact.metrics, int8, files)


def publish(
    registry_root: str,
    head: FastFlowHead,
    *,
    category: str,
    backbone: BackboneSpec,
    flow: FlowSpec,
    found: Findings,
    training: TrainingRecord | ImportRecord,
    beside: Mapping[str, bytes] = MappingProxyType({}),
) -> ModelManifest:
    """Write a version. It serves once it is promoted.

    Args:
        registry_root: Where to.
        head: Its weights.
        category: Whose.
        backbone: Goes into the manifest, as do the following.
        flow: The shape of the head.
        found: Its thresholds, what it did on test images, and what of it may serve in int8.
        training: Where it is from.
        beside: Further files by name.

    Raises:
        RegistryError: The registry cannot be written.
    """
    files = {WEIGHTS_FILE: head.to_bytes(), **found.int8_files, **beside}
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    created_at = datetime.now(UTC)
    manifest = ModelManifest(
        category=category,
        version=new_version(created_at, digests[WEIGHTS_FILE]),
        created_at=created_at,
        backbone=backbone,
        flow=flow,
        calibration=found.calibration,
        metrics=found.metrics,
        training=training,
        int8=found.int8,
        libraries={"python": platform.python_version(), **{n: version(n) for n in ("flawstream", "torch", "timm")}},
        files=digests,
    )
    Registry(registry_root).write(manifest, files)
    return manifest
