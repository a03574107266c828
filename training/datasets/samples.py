"""A data set in memory: paths and labels by category. Knows no layout on disk and decodes nothing."""

import hashlib
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

from training.datasets.storage import read_digests

NORMAL = "good"
"""The label of normal images, as in MVTec AD."""
NORMAL_NAMES = frozenset({NORMAL, "normal", "ok"})
"""What folders and labels of normal images are called, in lower case."""
NO_VARIATION = (
    "so there is no variation to learn; check that the camera was not covered and the files are not copies of one, and "
    "record different parts"
)
"""Cause and cure where training images are alike: what the check and training say."""

_SEED = 0
_Name = TypeVar("_Name", str, Path)


@dataclass(frozen=True, slots=True)
class Sample:
    """One test image.

    Attributes:
        path: The image.
        anomalous: Whether it shows a defect.
        defect: The kind of defect; `good` if normal.
        mask: An image of the same size, non-zero where the defect is; None if there is none.
        more_masks: Further masks of the same defect or of others, as in MVTec LOCO.
    """

    path: Path
    anomalous: bool
    defect: str
    mask: Path | None
    more_masks: tuple[Path, ...] = ()

    @property
    def masks(self) -> tuple[Path, ...]:
        """Return all masks: a pixel that any of them marks is a defect."""
        return () if self.mask is None else (self.mask, *self.more_masks)


class Skip(StrEnum):
    """Why a file or folder of a data set is not read."""

    DANGLING_LINK = "dangling_link"
    SUBFOLDER = "subfolder"
    MISPLACED_IMAGE = "misplaced_image"
    OTHER_FILE = "other_file"
    HIDDEN_FILE = "hidden_file"


@dataclass(frozen=True, slots=True)
class Skipped:
    """A file or folder of a data set that is not read.

    Attributes:
        path: The file or folder.
        reason: Why it is not read.
    """

    path: Path
    reason: Skip


@dataclass(frozen=True, slots=True)
class CategoryData:
    """The images of one product category.

    Attributes:
        name: The category.
        train: Normal images, sorted.
        test: Images to evaluate on, sorted by defect and name; may be empty.
        orphan_masks: Masks that belong to no image.
        skipped: What else lies in the category's folders and is not read.
    """

    name: str
    train: tuple[Path, ...]
    test: tuple[Sample, ...]
    orphan_masks: tuple[Path, ...] = ()
    skipped: tuple[Skipped, ...] = ()

    def images(self) -> list[Path]:
        """List all images, training images first."""
        return [*self.train, *(sample.path for sample in self.test)]

    def masks(self) -> list[Path]:
        """List the masks that belong to an image."""
        return [mask for sample in self.test for mask in sample.masks]

    def files(self) -> list[Path]:
        """List all images, then all masks."""
        return self.images() + self.masks()

    def sha256(self) -> str:
        """Compute a digest over the role, name and content of every file.

        Does not depend on the path of the folder and on the name of the category.

        Raises:
            OSError: A local file cannot be read.
            DatasetError: The storage of a URL fails.
        """
        sha256 = hashlib.sha256()
        files = list(self._named_files())
        for (name, _), content in zip(files, read_digests([path for _, path in files]), strict=True):
            sha256.update(hashlib.sha256(name.encode(errors="surrogateescape")).digest())  # fixed length: no ambiguity
            sha256.update(content)
        return sha256.hexdigest()

    def _named_files(self) -> Iterator[tuple[str, Path]]:
        for path in self.train:
            yield f"train/{NORMAL}/{path.name}", path
        for sample in self.test:
            yield f"test/{sample.defect}/{sample.path.name}", sample.path
            for mask in sample.masks:
                yield f"ground_truth/{sample.defect}/{mask.name}", mask


def split_normal(names: Iterable[_Name], train_share: float) -> tuple[list[_Name], list[_Name]]:
    """Split the normal images of a data set without a split, reproducibly.

    Args:
        names: All images, in any order.
        train_share: Share of training images, in [0, 1].

    Returns:
        Training and test images, both sorted.
    """
    shuffled = sorted(names)
    random.Random(_SEED).shuffle(shuffled)  # noqa: S311 - reproducible, not a secret
    count = round(train_share * len(shuffled))
    return sorted(shuffled[:count]), sorted(shuffled[count:])
