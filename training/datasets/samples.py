"""What a data set is once read: paths and labels by category. Knows no layout on disk and decodes nothing."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

NORMAL = "good"
"""What MVTec AD's layout calls the defect of a normal image."""


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
    """

    name: str
    train: tuple[Path, ...]
    test: tuple[Sample, ...]

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
