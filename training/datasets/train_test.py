"""The tree of several data sets: normal images to train, normal and defective ones to test, and their masks.

    <category>/train/<normal>, validation/<normal>                normal images
    <category>/test/<normal or defect>, or test_public/...        labelled images
    <category>/ground_truth/<defect>, or test_public/ground_truth/<defect>
                                   masks: <stem>_mask.png, <stem>.png, or several in a folder <stem>

Folders of normal images are called `good`, `normal` or `ok`, in any case. Decodes nothing.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path

from schemas.errors import escaped
from training.datasets.folders import choose_categories, is_normal, list_folder, list_folders, match_masks
from training.datasets.samples import NORMAL, CategoryData, Sample, Skip, Skipped

_TRAIN = ("train", "validation")
_TEST = ("test", "test_public")
_MASKS = "ground_truth"
_PARTS = frozenset({*_TRAIN, *_TEST, _MASKS})

IsMarker = Callable[[str], bool]
"""Checks whether the name of a folder below `train` is the one by which a layout is recognised."""


def is_train_test(root: Path, is_marker: IsMarker) -> bool:
    """Check whether a folder is such a data set, or one category of it."""
    return bool(_category_folders(root, is_marker))


def load_train_test(root: Path, categories: Sequence[str] | None, is_marker: IsMarker) -> list[CategoryData]:
    """Find the images of every category under a folder.

    Args:
        root: The folder of categories, or the folder of one category.
        categories: Names of categories; None: all.
        is_marker: What makes a folder a category.

    Returns:
        One item per category, in the order of `categories`, else by name.

    Raises:
        DatasetError: There is no category, one is unknown or has an invalid name, or a folder cannot be read.
    """
    chosen = choose_categories(root, _category_folders(root, is_marker), categories)
    return [_load_category(name, folder) for name, folder in chosen.items()]


def _category_folders(root: Path, is_marker: IsMarker) -> dict[str, Path]:
    if _has_marker(root, is_marker):
        return {root.resolve().name: root}
    return {folder.name: folder for folder in list_folders(root) if _has_marker(folder, is_marker)}


def _has_marker(folder: Path, is_marker: IsMarker) -> bool:
    return any(is_marker(kind.name) for kind in list_folders(folder / "train"))


def _load_category(name: str, folder: Path) -> CategoryData:
    reader = _Reader()
    parts = {part.name: part for part in reader.folders(folder)}
    for part_name, part in parts.items():
        if part_name not in _PARTS:
            reader.skip(part)
    train = tuple(image for part in _TRAIN for image in reader.normal_images(folder / part))
    kinds: defaultdict[str, _Kind] = defaultdict(_Kind)
    for part_name in _TEST:
        if part_name in parts:  # in a store, what is below a missing folder would be asked for
            reader.read_images(folder / part_name, kinds)
            reader.read_masks(folder / part_name / _MASKS, kinds)
    reader.read_masks(folder / _MASKS, kinds)
    samples: list[Sample] = []
    orphans: list[Path] = []
    for kind_name, kind in sorted(kinds.items(), key=itemgetter(0)):
        if is_normal(kind_name):
            samples += [Sample(path, anomalous=False, defect=NORMAL, mask=None) for path in kind.images]
            continue
        matched, unmatched = match_masks(kind.images, kind.masks, escaped(kind_name), kind.groups)
        samples += matched
        orphans += unmatched
    return CategoryData(name, train, tuple(samples), tuple(orphans), tuple(reader.skipped))


@dataclass(slots=True)
class _Kind:
    """What was found of one kind of test images; masks in `groups` are of one image each, by its stem."""

    images: list[Path] = field(default_factory=list)
    masks: list[Path] = field(default_factory=list)
    groups: dict[str, Sequence[Path]] = field(default_factory=dict)


class _Reader:
    """Lists folders, and collects what in them is not read."""

    def __init__(self) -> None:
        self.skipped: list[Skipped] = []

    def folders(self, folder: Path) -> tuple[Path, ...]:
        """List the subfolders of a folder that has no images of its own; texts beside them are no concern."""
        listing = list_folder(folder)
        self.skipped += (one for one in listing.skipped if one.reason is not Skip.OTHER_FILE)
        self.skipped += (Skipped(path, Skip.MISPLACED_IMAGE) for path in listing.images)
        return listing.folders

    def images(self, folder: Path) -> tuple[Path, ...]:
        """List the images of a folder."""
        listing = list_folder(folder)
        self.skipped += listing.skipped
        for subfolder in listing.folders:
            self.skip(subfolder)
        return listing.images

    def normal_images(self, part: Path) -> Iterator[Path]:
        """List the images in the folders of normal images below a folder."""
        for folder in self.folders(part):
            if is_normal(folder.name):
                yield from self.images(folder)
            else:
                self.skip(folder)

    def read_images(self, part: Path, kinds: Mapping[str, _Kind]) -> None:
        """Add the images below a folder to their kinds."""
        for folder in self.folders(part):
            if folder.name != _MASKS:
                kinds[folder.name].images += self.images(folder)

    def read_masks(self, part: Path, kinds: Mapping[str, _Kind]) -> None:
        """Add the masks below a folder to their kinds; a folder of a kind may have a folder of masks for each image."""
        for folder in self.folders(part):
            if is_normal(folder.name):
                self.skip(folder)
                continue
            listing = list_folder(folder)
            self.skipped += listing.skipped
            kinds[folder.name].masks += listing.images
            kinds[folder.name].groups |= {group.name: self.images(group) for group in listing.folders}

    def skip(self, folder: Path) -> None:
        """Report a folder that is not read."""
        self.skipped.append(Skipped(folder, Skip.SUBFOLDER))
