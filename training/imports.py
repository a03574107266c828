"""Import of a model of another program as a version, calibrated on images that did not train it."""

import hashlib
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flawstream.calibration import shortage
from flawstream.engines.choose import make_local_engine
from flawstream.fastflow.anomalib import AnomalibModel
from flawstream.registry.versions import BACKBONE_FILE, backbone_file
from schemas.errors import ConfigError, DatasetError
from schemas.manifest import ImportRecord
from schemas.messages import CATEGORY_PATTERN
from schemas.settings import DetectorSettings, LimitSettings
from training.datasets.bit_depth import find_bit_depth
from training.datasets.folders import list_images
from training.datasets.samples import CategoryData
from training.pipeline import EvaluationData, Progress, Stage, evaluate_version, publish
from training.steps.features import FeatureExtractor


@dataclass(frozen=True, slots=True)
class ImportJob:
    """An import of one model.

    Attributes:
        model: The converted checkpoint.
        checkpoint: The file of the checkpoint.
        category: The category of the new version.
        normal: A folder of normal images that did not train the model.
        top_fraction: Fraction of the grid that the image score is computed from.
        false_alarm_rate: Share of normal images that may be called anomalous.
        limits: Maximum size and aspect ratio of images.
        detector: The engine that will serve, used for calibration.
        registry_root: The registry to write to.
    """

    model: AnomalibModel
    checkpoint: Path
    category: str
    normal: Path
    top_fraction: float
    false_alarm_rate: float
    limits: LimitSettings
    detector: DetectorSettings
    registry_root: str


def run_import(job: ImportJob) -> Iterator[Progress]:
    """Calibrate and publish an imported model, including the backbone's weights.

    Args:
        job: The import.

    Yields:
        Progress; the last one has the manifest.

    Raises:
        ConfigError: The category's name is invalid, or the model's scores are not finite.
        WeightsError: The flows do not fit the backbone.
        DatasetError: There are no images, or one cannot be read.
        StorageUnavailableError: The registry cannot be written.
    """
    started = time.monotonic()
    if not re.fullmatch(CATEGORY_PATTERN, job.category):
        raise ConfigError(f"{job.category!r} is not a valid category name: it must match {CATEGORY_PATTERN}")
    images = CategoryData(job.category, train=list_images(job.normal), test=())
    if not images.train:
        raise DatasetError(
            f"{job.normal} has no images, but calibration needs normal images; give a folder of normal images that "
            "did not train the model"
        )
    backbone = job.model.make_backbone()
    head = job.model.make_head(backbone)
    extractor = FeatureExtractor(backbone, job.limits).at_depth(find_bit_depth(images, job.limits))
    engine = make_local_engine(job.detector, lambda: backbone)
    data = EvaluationData(
        held_out=images.train,
        test=(),
        int8_images=images.train[::4],
        top_fraction=job.top_fraction,
        false_alarm_rate=job.false_alarm_rate,
    )
    evaluated = yield from evaluate_version(job.category, extractor, engine, head, data)
    with job.checkpoint.open("rb") as file:
        checkpoint_sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    manifest = publish(
        job.registry_root,
        head,
        category=job.category,
        backbone=backbone.spec,
        flow=job.model.flow,
        bit_depth=extractor.form.bits,
        evaluated=evaluated,
        training=ImportRecord(
            source="anomalib",
            checkpoint_sha256=checkpoint_sha256,
            dataset_sha256=images.sha256(),
            calibration_images=len(images.train),
            duration_s=time.monotonic() - started,
        ),
        extra_files={BACKBONE_FILE: backbone_file(backbone)},
    )
    warning = shortage(len(images.train), job.false_alarm_rate) or ""
    yield Progress(job.category, Stage.DONE, 1, 1, warning, manifest)
