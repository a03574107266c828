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

from training.datasets.folders import choose_categories, has_folder, list_folders, list_images, match_masks
from training.datasets.samples import NORMAL, CategoryData, Sample, split_normal

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
    train, test = split_normal(list_images(root / _FREE / "Imgs", _IMAGE_SUFFIXES), _TRAIN_SHARE)
    samples = [Sample(path, anomalous=False, defect=NORMAL, mask=None) for path in test]
    orphans: list[Path] = []
    for folder in list_folders(root):
        if folder.name == _FREE or not folder.name.startswith(_PREFIX):
            continue
        images = folder / "Imgs"
        defect = folder.name.removeprefix(_PREFIX).lower()
        matched, unmatched = match_masks(
            list_images(images, _IMAGE_SUFFIXES), list_images(images, _MASK_SUFFIXES), defect
        )
        samples += matched
        orphans += unmatched
    samples.sort(key=lambda sample: (sample.defect, sample.path))
    return {CATEGORY: CategoryData(CATEGORY, tuple(train), tuple(samples), tuple(orphans))}
