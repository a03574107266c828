"""A model of another program becomes a version: its weights as they are, calibrated on images it never saw."""

import hashlib
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flawstream.calibration import shortage
from flawstream.fastflow.anomalib import AnomalibModel
from flawstream.registry.versions import BACKBONE_FILE, backbone_file
from schemas.errors import ConfigError, DatasetError
from schemas.manifest import ImportRecord, Metrics
from schemas.messages import CATEGORY_PATTERN
from schemas.settings import LimitSettings
from training.datasets.folders import list_images
from training.datasets.samples import CategoryData
from training.pipeline import Progress, Stage, calibrate_on, publish
from training.steps.evaluate import ImageScorer
from training.steps.features import FeatureExtractor
from training.steps.quantise import Material, try_int8


@dataclass(frozen=True, slots=True)
class ImportJob:
    """What is imported, and where it goes.

    Attributes:
        model: The checkpoint as it was understood.
        checkpoint: The file.
        category: Whose version it becomes.
        normal: A folder of normal images that did not train the model.
        top_fraction: How image scores are taken from maps.
        false_alarm_rate: Share of normal images that may be called anomalous.
        limits: What is too large to be decoded.
        registry_root: Where the version is written.
    """

    model: AnomalibModel
    checkpoint: Path
    category: str
    normal: Path
    top_fraction: float
    false_alarm_rate: float
    limits: LimitSettings
    registry_root: str


def run_import(job: ImportJob) -> Iterator[Progress]:
    """Calibrate and publish an imported model. The backbone's weights are written beside the flow's.

    Args:
        job: What to do.

    Yields:
        Progress; the last one carries the manifest.

    Raises:
        ConfigError: The category's name is impossible, or the model's scores are not finite.
        WeightsError: The flows do not fit the backbone.
        DatasetError: There are no images, or one cannot be read.
        RegistryError: The registry cannot be written.
    """
    started = time.monotonic()
    if not re.fullmatch(CATEGORY_PATTERN, job.category):
        raise ConfigError(f"{job.category!r} cannot name a category: a name must match {CATEGORY_PATTERN}")
    images = CategoryData(job.category, train=list_images(job.normal), test=())
    if not images.train:
        raise DatasetError(
            f"{job.normal} holds no images, and without normal images there is no threshold; name a folder of normal "
            "images that did not train the model"
        )
    backbone = job.model.make_backbone()
    head = job.model.make_head(backbone)
    beside = {BACKBONE_FILE: backbone_file(backbone)}
    extractor = FeatureExtractor(backbone, job.limits)
    scorer = ImageScorer(extractor, head, job.top_fraction)
    calibration = yield from calibrate_on(job.category, scorer, images.train, job.top_fraction, job.false_alarm_rate)
    yield Progress(job.category, Stage.INT8, 0, 1)
    ranges, held_out = images.train[::4], [path for index, path in enumerate(images.train) if index % 4]
    int8, int8_files = try_int8(
        extractor, head, Material(ranges, held_out, (), job.top_fraction, calibration.threshold)
    )
    with job.checkpoint.open("rb") as file:
        checkpoint_sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    manifest = publish(
        job.registry_root,
        head,
        category=job.category,
        backbone=backbone.spec,
        flow=job.model.flow,
        calibration=calibration,
        metrics=Metrics(),
        training=ImportRecord(
            source="anomalib",
            checkpoint_sha256=checkpoint_sha256,
            dataset_sha256=images.sha256(),
            calibration_images=len(images.train),
            duration_s=time.monotonic() - started,
        ),
        int8=int8,
        beside={**beside, **int8_files},
    )
    warning = shortage(len(images.train), job.false_alarm_rate) or ""
    yield Progress(job.category, Stage.DONE, 1, 1, warning, manifest)
