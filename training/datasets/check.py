"""Checks of a data set before training, which report all problems at once.

`check_listing` checks names and counts, which takes no time; `check_content` checks the decoded files. Errors make
training or its metrics wrong, warnings make them worse. Knows no layout and opens no file.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from flawstream.calibration import shortage
from schemas.settings import BitDepth, TrainingSettings
from training.datasets.bit_depth import warn_of_depth
from training.datasets.decoding import FileCheck, ImageCheck, MaskCheck, UnreadableFile
from training.datasets.samples import CategoryData
from training.datasets.storage import missing_files

MIN_TRAIN_IMAGES = 10
"""A fifth is held out by default: with fewer images, the threshold would depend on a single score."""

_GOOD_COUNT = 200
_SAME_ASPECT = 1.02
_MAX_SIZES_LISTED = 3


class Severity(StrEnum):
    """Whether the problem prevents training: errors do, warnings do not."""

    ERROR = "error"
    WARNING = "warning"


class DatasetProblem(StrEnum):
    """The kinds of problems: a closed set of codes."""

    TOO_FEW = "too_few"
    MISSING_FILE = "missing_file"
    ORPHAN_MASK = "orphan_mask"
    DAMAGED = "damaged"
    MASK_SIZE = "mask_size"
    LEAKAGE = "leakage"
    FALSE_ALARM_RATE = "false_alarm_rate"
    NO_MASK = "no_mask"
    EMPTY_MASK = "empty_mask"
    DUPLICATE = "duplicate"
    MIXED_SIZES = "mixed_sizes"
    MIXED_COLOURS = "mixed_colours"
    BIT_DEPTH = "bit_depth"


_WARNINGS = frozenset(
    {
        DatasetProblem.FALSE_ALARM_RATE,
        DatasetProblem.NO_MASK,
        DatasetProblem.EMPTY_MASK,
        DatasetProblem.DUPLICATE,
        DatasetProblem.MIXED_SIZES,
        DatasetProblem.MIXED_COLOURS,
        DatasetProblem.BIT_DEPTH,
    }
)


@dataclass(frozen=True, slots=True)
class Finding:
    """One problem of a data set.

    Attributes:
        category: The category.
        problem: The kind of problem.
        path: The file; None if it concerns the whole category.
        text: What is wrong, why it matters, and what to do.
    """

    category: str
    problem: DatasetProblem
    path: Path | None
    text: str

    @property
    def severity(self) -> Severity:
        """Whether the problem prevents training."""
        return Severity.WARNING if self.problem in _WARNINGS else Severity.ERROR


def check_listing(data: CategoryData, settings: TrainingSettings) -> list[Finding]:
    """Check names and counts; opens no file.

    Args:
        data: The category.
        settings: Calibration fraction and false-alarm rate.
    """
    findings = [
        Finding(
            data.name,
            DatasetProblem.MISSING_FILE,
            path,
            "is listed but missing; restore the file or remove it from the list",
        )
        for path in missing_files(data.files())
    ]
    findings += _check_counts(data, settings)
    findings += (
        Finding(
            data.name,
            DatasetProblem.ORPHAN_MASK,
            path,
            "is a mask without an image; a mask has its image's name, with or without _mask at the end: rename it, "
            "restore the image, or remove the mask",
        )
        for path in data.orphan_masks
    )
    if data.masks():
        findings += (
            Finding(
                data.name,
                DatasetProblem.NO_MASK,
                sample.path,
                "shows a defect and has no mask, unlike others, so it is left out of pixel metrics; add a mask",
            )
            for sample in data.test
            if sample.anomalous and sample.mask is None
        )
    return findings


def calibration_count(train_images: int, fraction: float) -> int:
    """Compute the number of held-out images, as `training.steps.fit.split_rows` does."""
    return max(1, round(train_images * fraction))


def check_content(data: CategoryData, files: Iterable[FileCheck], bit_depth: BitDepth | None = None) -> list[Finding]:
    """Check the content of files.

    Args:
        data: The category.
        files: Output of `decoding.decode_files`.
        bit_depth: That of the settings, if any.
    """
    findings: list[Finding] = []
    images: dict[Path, ImageCheck] = {}
    masks: dict[Path, MaskCheck] = {}
    for file in files:
        match file:
            case ImageCheck():
                images[file.path] = file
            case MaskCheck():
                masks[file.path] = file
            case UnreadableFile():
                findings.append(Finding(data.name, DatasetProblem.DAMAGED, file.path, file.reason))
    findings += _check_masks(data, images, masks)
    findings += _check_duplicates(data, images)
    findings += _check_uniformity(data, list(images.values()))
    if warning := warn_of_depth([image.levels for image in images.values()], bit_depth):
        findings.append(Finding(data.name, DatasetProblem.BIT_DEPTH, None, warning))
    return findings


def exclusion_reason(errors: Sequence[Finding]) -> str:
    """Describe why a category is not trained, with the first of its errors and the cure.

    Args:
        errors: Findings of one category, at least one.
    """
    first = errors[0]
    return (
        f"not trained: the check of its data found errors: {len(errors)}, the first: "
        f"{f'{first.path}: ' if first.path is not None else ''}{first.text}. Fix what `flawstream datasets check -c "
        f"{first.category}` lists, then train this category with `-c {first.category}`"
    )


def _check_counts(data: CategoryData, settings: TrainingSettings) -> Iterator[Finding]:
    count = len(data.train)
    if count < MIN_TRAIN_IMAGES:
        yield Finding(
            data.name,
            DatasetProblem.TOO_FEW,
            None,
            f"{count or 'no'} normal training images; at least {MIN_TRAIN_IMAGES} are needed, about "
            f"{_GOOD_COUNT} for a good model; add normal images",
        )
    elif warning := shortage(calibration_count(count, settings.calibration_fraction), settings.false_alarm_rate):
        yield Finding(data.name, DatasetProblem.FALSE_ALARM_RATE, None, warning)


def _check_masks(data: CategoryData, images: dict[Path, ImageCheck], masks: dict[Path, MaskCheck]) -> Iterator[Finding]:
    for sample in data.test:
        mask = masks.get(sample.mask) if sample.mask is not None else None
        image = images.get(sample.path)
        if mask is None or image is None:
            continue
        if mask.shape != image.shape:
            yield Finding(
                data.name,
                DatasetProblem.MASK_SIZE,
                mask.path,
                f"has {_size(mask.shape)} pixels, but its image {sample.path.name} has {_size(image.shape)}: it "
                "belongs to another image or was resized; restore its size",
            )
        if mask.empty:
            yield Finding(
                data.name,
                DatasetProblem.EMPTY_MASK,
                mask.path,
                f"marks no defect, but its image is labelled {sample.defect!r}: all its pixels count as normal in "
                "pixel metrics; mark the defect, or move the image to the normal ones",
            )


def _check_duplicates(data: CategoryData, images: dict[Path, ImageCheck]) -> Iterator[Finding]:
    training_digests: dict[bytes, Path] = {}
    for path in data.train:
        if path not in images:
            continue
        first = training_digests.setdefault(images[path].digest, path)
        if first is not path:
            yield Finding(
                data.name,
                DatasetProblem.DUPLICATE,
                path,
                f"has the same pixels as {first.name}: if one is used to train and the other to calibrate, the "
                "threshold becomes too low; remove one",
            )
    for sample in data.test:
        twin = training_digests.get(images[sample.path].digest) if sample.path in images else None
        if twin is not None:
            yield Finding(
                data.name,
                DatasetProblem.LEAKAGE,
                sample.path,
                f"has the same pixels as the training image {twin}, which makes metrics too good; remove one",
            )


def _check_uniformity(data: CategoryData, images: list[ImageCheck]) -> Iterator[Finding]:
    shapes = Counter(image.shape for image in images)
    if len(shapes) > 1:
        aspects = sorted(width / height for height, width in shapes)
        consequence = (
            f"and aspect ratios from {aspects[0]:.2f} to {aspects[-1]:.2f}, so that the same part is stretched "
            "differently"
            if aspects[-1] > _SAME_ASPECT * aspects[0]
            else "so that the same detail comes out sharper or softer"
        )
        common = ", ".join(f"{count} of {_size(shape)}" for shape, count in shapes.most_common(_MAX_SIZES_LISTED))
        more = f" and {len(shapes) - _MAX_SIZES_LISTED} more" if len(shapes) > _MAX_SIZES_LISTED else ""
        yield Finding(
            data.name,
            DatasetProblem.MIXED_SIZES,
            None,
            f"{len(shapes)} image sizes: {common}{more}, {consequence}; record or crop all images alike",
        )
    grey = sum(image.grey for image in images)
    if 0 < grey < len(images):
        yield Finding(
            data.name,
            DatasetProblem.MIXED_COLOURS,
            None,
            f"{grey} grey images and {len(images) - grey} with colour: the model may learn to distinguish cameras, "
            "not parts; record all images alike",
        )


def _size(shape: tuple[int, int]) -> str:
    return f"{shape[1]} x {shape[0]}"
