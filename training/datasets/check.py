"""Checks of a data set before training, which report all problems at once.

`check_listing` checks names and counts, which takes no time; `check_content` checks the decoded files. Errors make
training or its metrics wrong, warnings make them worse, notes are to be looked at. Knows no layout and opens no file.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby
from operator import attrgetter
from pathlib import Path

from flawstream.calibration import shortage
from schemas.settings import BitDepth, LimitSettings, TrainingSettings
from training.datasets.bit_depth import warn_of_depth
from training.datasets.decoding import FileCheck, ImageCheck, MaskCheck, UnreadableFile
from training.datasets.folders import image_files, is_normal
from training.datasets.samples import NO_VARIATION, CategoryData, Sample, Skip, Skipped
from training.datasets.storage import missing_files

MIN_TRAIN_IMAGES = 10
"""A fifth is held out by default: with fewer images, the threshold would depend on a single score."""

_GOOD_COUNT = 200
_SAME_ASPECT = 1.02
_MAX_SIZES_LISTED = 3
_MAX_NAMES_LISTED = 3
_MOST_MARKED = 0.5
"""A mask that marks a larger share of its image is suspected to be inverted."""


class Severity(StrEnum):
    """Whether the problem prevents training: errors do, warnings and notes do not. The most severe come first."""

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"


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
    ALL_ALIKE = "all_alike"
    TOO_LONG = "too_long"
    UNWRITABLE = "unwritable"
    NORMAL_NAMES = "normal_names"
    JPEG_MASK = "jpeg_mask"
    INVERTED_MASK = "inverted_mask"
    MARKED = "marked"
    DANGLING_LINK = "dangling_link"
    SUBFOLDER = "subfolder"
    MISPLACED_IMAGE = "misplaced_image"
    OTHER_FILE = "other_file"
    HIDDEN_FILE = "hidden_file"
    BIT_DEPTH = "bit_depth"


_WARNINGS = frozenset(
    {
        DatasetProblem.FALSE_ALARM_RATE,
        DatasetProblem.NO_MASK,
        DatasetProblem.EMPTY_MASK,
        DatasetProblem.DUPLICATE,
        DatasetProblem.MIXED_SIZES,
        DatasetProblem.MIXED_COLOURS,
        DatasetProblem.TOO_LONG,
        DatasetProblem.NORMAL_NAMES,
        DatasetProblem.JPEG_MASK,
        DatasetProblem.INVERTED_MASK,
        DatasetProblem.DANGLING_LINK,
        DatasetProblem.SUBFOLDER,
        DatasetProblem.MISPLACED_IMAGE,
        DatasetProblem.OTHER_FILE,
        DatasetProblem.BIT_DEPTH,
    }
)
_NOTES = frozenset({DatasetProblem.MARKED, DatasetProblem.HIDDEN_FILE})
_NOT_READ = {
    Skip.DANGLING_LINK: ("links to files that do not exist", "restore what they point to, or remove them"),
    Skip.SUBFOLDER: (
        "images in subfolders",
        "move them into the folder that they belong to, or the subfolders out of the data set",
    ),
    Skip.MISPLACED_IMAGE: (
        "images beside the folders of normal images and of defects",
        "move them into the folder that they belong to",
    ),
    Skip.OTHER_FILE: (
        "files whose suffix is not that of an image",
        "save images as PNG, JPEG, BMP, TIFF or WebP, or remove the files",
    ),
    Skip.HIDDEN_FILE: ("hidden files and folders", "nothing has to be done"),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One problem of a data set.

    Attributes:
        category: The category.
        problem: The kind of problem.
        path: The file; None if it concerns the whole category.
        text: What is wrong, why it matters, and what to do.
        count: How many files it concerns.
    """

    category: str
    problem: DatasetProblem
    path: Path | None
    text: str
    count: int = 1

    @property
    def severity(self) -> Severity:
        """Whether the problem prevents training."""
        if self.problem in _NOTES:
            return Severity.NOTE
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
    findings += _check_normal_names(data)
    findings += _check_skipped(data)
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


def check_content(
    data: CategoryData, files: Iterable[FileCheck], limits: LimitSettings, bit_depth: BitDepth | None = None
) -> list[Finding]:
    """Check the content of files.

    Args:
        data: The category.
        files: Output of `decoding.decode_files`.
        limits: What the stream refuses.
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
    alike = _check_alike(data, images)
    findings += alike or _check_duplicates(data, images)
    findings += _check_lengths(data, list(images.values()), limits)
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


def _check_normal_names(data: CategoryData) -> Iterator[Finding]:
    """Report folders side by side that both have normal images by their name, such as `good` and `OK`."""
    normal = [*data.train, *(sample.path for sample in data.test if not sample.anomalous)]
    folders = sorted({path.parent for path in normal if is_normal(path.parent.name)})
    for parent, group in groupby(folders, attrgetter("parent")):
        names = [folder.name for folder in group]
        if len(names) > 1:
            yield Finding(
                data.name,
                DatasetProblem.NORMAL_NAMES,
                parent,
                f"has the folders {', '.join(names)}: all mean normal and are read so; if one means something else, "
                "rename it",
                len(names),
            )


def _check_skipped(data: CategoryData) -> Iterator[Finding]:
    def key(skipped: Skipped) -> tuple[Skip, Path]:
        return skipped.reason, skipped.path.parent

    for (reason, folder), group in groupby(sorted(data.skipped, key=lambda one: (*key(one), one.path)), key):
        paths = [one.path for one in group]
        names = ", ".join(path.name for path in paths[:_MAX_NAMES_LISTED])
        more = ", ..." if len(paths) > _MAX_NAMES_LISTED else ""
        count = sum(1 for _ in image_files(paths)) if reason is Skip.SUBFOLDER else len(paths)
        what, cure = _NOT_READ[reason]
        yield Finding(
            data.name, DatasetProblem(reason), folder, f"{what}, not read: {count} ({names}{more}); {cure}", count
        )


def _check_masks(data: CategoryData, images: dict[Path, ImageCheck], masks: dict[Path, MaskCheck]) -> Iterator[Finding]:
    shares: list[float] = []
    for sample in data.test:
        checked = [masks[path] for path in sample.masks if path in masks]
        image = images.get(sample.path)
        if not checked or image is None:
            continue
        for mask in checked:
            yield from _check_mask(data.name, sample, mask, image)
        share = sum(mask.marked for mask in checked)
        shares.append(min(1.0, share))
        if not share:
            yield Finding(
                data.name,
                DatasetProblem.EMPTY_MASK,
                checked[0].path,
                f"marks no defect, but its image is labelled {sample.defect!r}: all its pixels count as normal in "
                "pixel metrics; mark the defect, or move the image to the normal ones",
            )
    if shares:
        yield Finding(
            data.name,
            DatasetProblem.MARKED,
            None,
            f"masks of {len(shares)} images mark {sum(shares) / len(shares):.2%} of their pixels on average, "
            f"{min(shares):.2%} to {max(shares):.2%}",
            len(shares),
        )


def _check_mask(category: str, sample: Sample, mask: MaskCheck, image: ImageCheck) -> Iterator[Finding]:
    if mask.shape != image.shape:
        yield Finding(
            category,
            DatasetProblem.MASK_SIZE,
            mask.path,
            f"has {_size(mask.shape)} pixels, but its image {sample.path.name} has {_size(image.shape)}: it "
            "belongs to another image or was resized; restore its size",
        )
    if mask.marked > _MOST_MARKED:
        yield Finding(
            category,
            DatasetProblem.INVERTED_MASK,
            mask.path,
            f"marks {mask.marked:.1%} of its image as defect, so it may be inverted: masks are 0 where the part is "
            "normal; invert it, unless the defect is that large",
        )
    if mask.lossy:
        yield Finding(
            category,
            DatasetProblem.JPEG_MASK,
            mask.path,
            "is a JPEG, which blurs the edges of the defect: values up to a quarter of the highest count as normal; "
            "save masks as PNG",
        )


def _check_alike(data: CategoryData, images: dict[Path, ImageCheck]) -> list[Finding]:
    digests = [images[path].digest for path in data.train if path in images]
    if len(digests) < MIN_TRAIN_IMAGES or len(set(digests)) > 1:
        return []
    return [
        Finding(
            data.name,
            DatasetProblem.ALL_ALIKE,
            None,
            f"all {len(digests)} normal training images have the same pixels, {NO_VARIATION}",
            len(digests),
        )
    ]


def _check_lengths(data: CategoryData, images: list[ImageCheck], limits: LimitSettings) -> Iterator[Finding]:
    """Report images that can be trained on, and that the stream refuses for their length."""
    too_long = [image for image in images if image.size_bytes > limits.max_image_bytes]
    if too_long:
        longest = max(too_long, key=attrgetter("size_bytes"))
        yield Finding(
            data.name,
            DatasetProblem.TOO_LONG,
            longest.path,
            f"has {longest.size_bytes:,} bytes, more than the {limits.max_image_bytes:,} that the stream takes, as "
            f"{len(too_long)} of {len(images)} images. Training reads them, but producers and workers refuse them: "
            "raise limits.max_image_bytes there, or send a compressed format such as PNG",
            len(too_long),
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
