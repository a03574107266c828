"""What a data set is once read: paths and labels by category. Knows no layout on disk and decodes nothing."""

import hashlib
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

NORMAL = "good"
"""What MVTec AD's layout calls the defect of a normal image."""

_SEED = 0
_Name = TypeVar("_Name", str, Path)


@dataclass(frozen=True, slots=True)
class Sample:
    """One test image.

    Attributes:
        path: The image.
        anomalous: Whether it shows a defect.
        defect: The kind of defect, `good` for none.
        mask: An image of the original's size, not 0 where the defect is; None where nobody drew one.
    """

    path: Path
    anomalous: bool
    defect: str
    mask: Path | None


@dataclass(frozen=True, slots=True)
class CategoryData:
    """The images of one product category.

    Attributes:
        name: The category.
        train: Normal images, sorted.
        test: Images to evaluate on, sorted by defect and name; may be empty.
        orphan_masks: Masks that belong to no image.
    """

    name: str
    train: tuple[Path, ...]
    test: tuple[Sample, ...]
    orphan_masks: tuple[Path, ...] = ()

    def images(self) -> list[Path]:
        """List all images, those that train first."""
        return [*self.train, *(sample.path for sample in self.test)]

    def masks(self) -> list[Path]:
        """List the masks that belong to an image."""
        return [sample.mask for sample in self.test if sample.mask is not None]

    def files(self) -> list[Path]:
        """List all images, and then their masks."""
        return self.images() + self.masks()

    def sha256(self) -> str:
        """Tell data sets apart by content: one digest over what every file is for, its name and its bytes.

        Where the folder lies and what the category is called do not matter.

        Raises:
            OSError: A file cannot be read.
        """
        whole = hashlib.sha256()
        for name, path in self._named_files():
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256")
            whole.update(hashlib.sha256(name.encode(errors="surrogateescape")).digest())  # fixed length: no ambiguity
            whole.update(content.digest())
        return whole.hexdigest()

    def _named_files(self) -> Iterator[tuple[str, Path]]:
        for path in self.train:
            yield f"train/{NORMAL}/{path.name}", path
        for sample in self.test:
            yield f"test/{sample.defect}/{sample.path.name}", sample.path
            if sample.mask is not None:
                yield f"ground_truth/{sample.defect}/{sample.mask.name}", sample.mask


def split_normal(names: Iterable[_Name], train_share: float) -> tuple[list[_Name], list[_Name]]:
    """Split the normal images of a data set that comes without a split: the same for all who run this.

    Args:
        names: All of them, in any order.
        train_share: How many train, in [0, 1].

    Returns:
        Those that train and those to test on, both sorted.
    """
    shuffled = sorted(names)
    random.Random(_SEED).shuffle(shuffled)  # noqa: S311 - a split that all repeat, not a secret
    count = round(train_share * len(shuffled))
    return sorted(shuffled[:count]), sorted(shuffled[count:])
