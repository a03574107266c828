"""The layout of the magnetic tile defect data set, as in its authors' repository: one category of 1,344 grey images.

    <root>/MT_Free/Imgs/*.jpg                                     normal images; their empty masks (*.png) are ignored
    <root>/MT_{Blowhole,Break,Crack,Fray,Uneven}/Imgs/*.jpg       defective images
    <root>/MT_{Blowhole,Break,Crack,Fray,Uneven}/Imgs/<stem>.png  masks

The data set has no split. Ours: 80 % of the normal images, shuffled with a fixed seed, train; the rest and all
defective images test.

Source: Huang, Qiu, Yuan, Surface defect saliency of magnetic tile, The Visual Computer 36 (2020). Decodes nothing.
"""

from collections.abc import Sequence
from pathlib import Path

from schemas.errors import escaped
from training.datasets.folders import choose_categories, has_folder, list_folder, list_folders, match_masks
from training.datasets.samples import NORMAL, CategoryData, Sample, Skip, Skipped, split_normal

CATEGORY = "magnetic_tile"
MARKER = "MT_Free/Imgs/"
_FREE = "MT_Free"
_PREFIX = "MT_"
_TRAIN_SHARE = 0.8
_IMAGE_SUFFIXES = (".jpg", ".jpeg")
_MASK_SUFFIXES = (".png",)


def is_magnetic_tile(root: Path) -> bool:
    """Check whether a folder has this layout."""
    return has_folder(root, _FREE, "Imgs")


def load_magnetic_tile(root: Path, categories: Sequence[str] | None = None) -> list[CategoryData]:
    """Find the images of the only category, `magnetic_tile`, with the defects `blowhole`, `break` and so on.

    Args:
        root: The folder that contains `MT_Free`.
        categories: `magnetic_tile`, or None.

    Returns:
        One item.

    Raises:
        DatasetError: It is not this data set, a category is unknown, or a folder cannot be read.
    """
    return list(choose_categories(root, _load(root) if is_magnetic_tile(root) else {}, categories).values())


def _load(root: Path) -> dict[str, CategoryData]:
    skipped: list[Skipped] = []
    normal, _ = _list_images(root / _FREE, skipped)
    train, test = split_normal(normal, _TRAIN_SHARE)
    samples = [Sample(path, anomalous=False, defect=NORMAL, mask=None) for path in test]
    orphans: list[Path] = []
    for folder in list_folders(root):
        if folder.name == _FREE or not folder.name.startswith(_PREFIX):
            continue
        images, masks = _list_images(folder, skipped)
        matched, unmatched = match_masks(images, masks, escaped(folder.name.removeprefix(_PREFIX).lower()))
        samples += matched
        orphans += unmatched
    samples.sort(key=lambda sample: (sample.defect, sample.path))
    return {CATEGORY: CategoryData(CATEGORY, tuple(train), tuple(samples), tuple(orphans), tuple(skipped))}


def _list_images(folder: Path, skipped: list[Skipped]) -> tuple[list[Path], list[Path]]:
    """List images and masks of a kind; add what is not read to `skipped`."""
    listing = list_folder(folder / "Imgs", (*_IMAGE_SUFFIXES, *_MASK_SUFFIXES))
    skipped += listing.skipped
    skipped += (Skipped(subfolder, Skip.SUBFOLDER) for subfolder in listing.folders)
    images = [path for path in listing.images if path.suffix.lower() in _IMAGE_SUFFIXES]
    return images, [path for path in listing.images if path.suffix.lower() in _MASK_SUFFIXES]
