"""A model of another program becomes a version: its weights as they are, calibrated on images it never saw."""

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
from training.datasets.folders import list_images
from training.datasets.samples import CategoryData
from training.pipeline import Progress, Proof, Stage, judge_version, publish
from training.steps.features import FeatureExtractor


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
        detector: Which engine will serve: it sets the thresholds.
        registry_root: Where the version is written.
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
    engine = make_local_engine(job.detector, lambda: backbone)
    proof = Proof(
        held_out=images.train,
        test=(),
        ranges=images.train[::4],
        top_fraction=job.top_fraction,
        false_alarm_rate=job.false_alarm_rate,
    )
    found = yield from judge_version(job.category, extractor, engine, head, proof)
    with job.checkpoint.open("rb") as file:
        checkpoint_sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    manifest = publish(
        job.registry_root,
        head,
        category=job.category,
        backbone=backbone.spec,
        flow=job.model.flow,
        found=found,
        training=ImportRecord(
            source="anomalib",
            checkpoint_sha256=checkpoint_sha256,
            dataset_sha256=images.sha256(),
            calibration_images=len(images.train),
            duration_s=time.monotonic() - started,
        ),
        beside=beside,
    )
    warning = shortage(len(images.train), job.false_alarm_rate) or ""
    yield Progress(job.category, Stage.DONE, 1, 1, warning, manifest)
