"""Identity of a training: a digest of all that a version depends on, by which finished work is found. Knows no Ray."""

import hashlib
import json
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from flawstream.registry.registry import Registry
from schemas.errors import FlawstreamError, RegistryError
from schemas.manifest import BackboneSpec, Device, FlowSpec, ModelManifest, TrainingRecord
from schemas.settings import DetectorSettings, ModelSettings, TrainingSettings
from schemas.settings.training import PLACEMENT
from training.datasets.samples import CategoryData

_FORMAT = 2
"""Raised when a release trains other weights or thresholds from the same data and recipe."""

_READS_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that a version depends on except its data.

    Attributes:
        backbone: The frozen network, with the digest of its weights.
        model: Configuration of the flows and of the score.
        training: The recipe; fields of the placement are ignored.
        detector: The engine that calibrates.
        device: Kind of device that trains.
    """

    backbone: BackboneSpec
    model: ModelSettings
    training: TrainingSettings
    detector: DetectorSettings
    device: Device

    def work_sha256(self, dataset_sha256: str) -> str:
        """Return the digest of the training on a data set by this recipe."""
        parts = {
            "format": _FORMAT,
            "dataset": dataset_sha256,
            "backbone": self.backbone.model_dump(mode="json"),
            "flow": FlowSpec.of(self.model).model_dump(mode="json"),
            "top_fraction": self.model.top_fraction,
            "training": self.training.model_dump(mode="json", exclude=set(PLACEMENT)),
            "arithmetic": [self.detector.engine, self.detector.precision, self.detector.device, self.device],
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def find_finished(
    registry: Registry, data: Iterable[CategoryData], recipes: Collection[Recipe]
) -> dict[tuple[str, int], ModelManifest]:
    """Find versions that an earlier run trained on the same data by one of the recipes.

    Reads a category's files, to compute their digest, only if the registry has a version of it.

    Args:
        registry: The registry.
        data: The categories.
        recipes: Several if there are several seeds, or several devices that count as the same work.

    Returns:
        The newest such version of each category and seed.

    Raises:
        StorageUnavailableError: The storage cannot be read.
    """

    def find_in(category: CategoryData) -> dict[tuple[str, int], ModelManifest]:
        versions = registry.versions(category.name)
        if not versions:
            return {}
        try:
            dataset_sha256 = category.sha256()
        except (OSError, FlawstreamError):
            return {}  # a file cannot be read: the check of the data set reports it
        wanted = {recipe.work_sha256(dataset_sha256) for recipe in recipes}
        seeds = {recipe.training.seed for recipe in recipes}
        found: dict[tuple[str, int], ModelManifest] = {}
        for version in reversed(versions):
            try:
                manifest = registry.manifest(category.name, version)
            except RegistryError:
                continue  # a damaged version is no finished work
            record = manifest.training
            if isinstance(record, TrainingRecord) and record.work_sha256 in wanted:
                found.setdefault((category.name, record.seed), manifest)
            if len(found) == len(seeds):
                break
        return found

    with ThreadPoolExecutor(_READS_AT_ONCE) as threads:
        return {key: manifest for found in threads.map(find_in, data) for key, manifest in found.items()}
