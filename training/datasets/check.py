"""What is wrong with a data set, all of it at once, before any time is spent on training.

`check_listing` looks at names and counts and takes no time; `check_content` judges what decoding every file told.
Errors make training or its figures wrong, warnings make them worse. Knows no layout and opens no file.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from flawstream.calibration import shortage
from schemas.settings import TrainingSettings
from training.datasets.decoding import Seen, SeenImage, SeenMask, Unreadable
from training.datasets.samples import CategoryData

MIN_TRAIN_IMAGES = 10
"""A fifth is held out to calibrate by default: with fewer images, the threshold would hang on a single score."""

_GOOD_COUNT = 200
_SAME_ASPECT = 1.02
_SHOWN = 3


class Severity(StrEnum):
    """Whether the category is trained all the same."""

    ERROR = "error"
    WARNING = "warning"


class Problem(StrEnum):
    """What can be wrong: a closed set, for programs to read."""

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


_WARNINGS = frozenset(
    {
        Problem.FALSE_ALARM_RATE,
        Problem.NO_MASK,
        Problem.EMPTY_MASK,
        Problem.DUPLICATE,
        Problem.MIXED_SIZES,
        Problem.MIXED_COLOURS,
    }
)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        category: Where.
        problem: What kind it is.
        path: The file; None where it is about the category.
        text: What is wrong, why that matters, and what to do.
    """

    category: str
    problem: Problem
    path: Path | None
    text: str

    @property
    def severity(self) -> Severity:
        """Whether the category is trained all the same."""
        return Severity.WARNING if self.problem in _WARNINGS else Severity.ERROR


def check_listing(data: CategoryData, settings: TrainingSettings) -> list[Finding]:
    """Find what is wrong by names and counts alone; no file is opened.

    Args:
        data: A category.
        settings: How many images calibrate, and which false-alarm rate they are for.
    """
    findings = [
        Finding(data.name, Problem.MISSING_FILE, path, "is listed and not there; restore the file or unlist it")
        for path in data.files()
        if not path.is_file()
    ]
    findings += _check_counts(data, settings)
    findings += (
        Finding(
            data.name,
            Problem.ORPHAN_MASK,
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
                Problem.NO_MASK,
                sample.path,
                "shows a defect and has no mask, unlike others: the pixel figures leave it out; draw a mask",
            )
            for sample in data.test
            if sample.anomalous and sample.mask is None
        )
    return findings


def calibration_count(train_images: int, fraction: float) -> int:
    """Tell how many of the normal images are held out to calibrate, as `training.steps.fit.split_rows` does."""
    return max(1, round(train_images * fraction))


def check_content(data: CategoryData, seen: Iterable[Seen]) -> list[Finding]:
    """Find what is wrong by what the files hold.

    Args:
        data: A category.
        seen: What `decoding.decode_files` told of it.
    """
    findings: list[Finding] = []
    images: dict[Path, SeenImage] = {}
    masks: dict[Path, SeenMask] = {}
    for one in seen:
        match one:
            case SeenImage():
                images[one.path] = one
            case SeenMask():
                masks[one.path] = one
            case Unreadable():
                findings.append(Finding(data.name, Problem.DAMAGED, one.path, one.reason))
    findings += _check_masks(data, images, masks)
    findings += _check_repeats(data, images)
    findings += _check_mixes(data, list(images.values()))
    return findings


def _check_counts(data: CategoryData, settings: TrainingSettings) -> Iterator[Finding]:
    count = len(data.train)
    if count < MIN_TRAIN_IMAGES:
        yield Finding(
            data.name,
            Problem.TOO_FEW,
            None,
            f"{count or 'no'} normal images to train on, and at least {MIN_TRAIN_IMAGES} are needed, some "
            f"{_GOOD_COUNT} for a good model; add normal images",
        )
    elif missing := shortage(calibration_count(count, settings.calibration_fraction), settings.false_alarm_rate):
        yield Finding(data.name, Problem.FALSE_ALARM_RATE, None, missing)


def _check_masks(data: CategoryData, images: dict[Path, SeenImage], masks: dict[Path, SeenMask]) -> Iterator[Finding]:
    for sample in data.test:
        mask = masks.get(sample.mask) if sample.mask is not None else None
        image = images.get(sample.path)
        if mask is None or image is None:
            continue
        if mask.shape != image.shape:
            yield Finding(
                data.name,
                Problem.MASK_SIZE,
                mask.path,
                f"has {_size(mask.shape)} pixels and its image {sample.path.name} {_size(image.shape)}: it belongs to "
                "another image, or was resized; draw it on the original",
            )
        if mask.empty:
            yield Finding(
                data.name,
                Problem.EMPTY_MASK,
                mask.path,
                f"marks no defect, and its image is called {sample.defect!r}: the pixel figures take all of it for "
                "normal; draw the defect, or move the image to the normal ones",
            )


def _check_repeats(data: CategoryData, images: dict[Path, SeenImage]) -> Iterator[Finding]:
    trained: dict[bytes, Path] = {}
    for path in data.train:
        if path not in images:
            continue
        first = trained.setdefault(images[path].digest, path)
        if first is not path:
            yield Finding(
                data.name,
                Problem.DUPLICATE,
                path,
                f"shows the same as {first.name}: where one trains and the other calibrates, the threshold comes out "
                "too low; remove one",
            )
    for sample in data.test:
        twin = trained.get(images[sample.path].digest) if sample.path in images else None
        if twin is not None:
            yield Finding(
                data.name,
                Problem.LEAKAGE,
                sample.path,
                f"tests what trains already: it shows the same as {twin}, and flatters the figures; remove one",
            )


def _check_mixes(data: CategoryData, images: list[SeenImage]) -> Iterator[Finding]:
    shapes = Counter(image.shape for image in images)
    if len(shapes) > 1:
        aspects = sorted(width / height for height, width in shapes)
        stretched = (
            f"and aspect ratios from {aspects[0]:.2f} to {aspects[-1]:.2f}, so that the same part is stretched "
            "differently"
            if aspects[-1] > _SAME_ASPECT * aspects[0]
            else "so that the same detail comes out sharper or softer"
        )
        common = ", ".join(f"{count} of {_size(shape)}" for shape, count in shapes.most_common(_SHOWN))
        more = f" and {len(shapes) - _SHOWN} more" if len(shapes) > _SHOWN else ""
        yield Finding(
            data.name,
            Problem.MIXED_SIZES,
            None,
            f"{len(shapes)} image sizes: {common}{more}, {stretched}; take or cut all images alike",
        )
    grey = sum(image.grey for image in images)
    if 0 < grey < len(images):
        yield Finding(
            data.name,
            Problem.MIXED_COLOURS,
            None,
            f"{grey} grey images and {len(images) - grey} with colour: the model may learn to tell cameras apart and "
            "not parts; take all images alike",
        )


def _size(shape: tuple[int, int]) -> str:
    return f"{shape[1]} x {shape[0]}"
