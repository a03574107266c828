"""The magnetic tile defect data set, as its authors' repository has it: one category of 1,344 grey photographs.

    <root>/MT_Free/Imgs/*.jpg                                     normal images; the empty masks (*.png) are passed over
    <root>/MT_{Blowhole,Break,Crack,Fray,Uneven}/Imgs/*.jpg       defective images
    <root>/MT_{Blowhole,Break,Crack,Fray,Uneven}/Imgs/<stem>.png  where the defect is

The split is ours, the data set has none: of the normal images, sorted by name and shuffled with a fixed seed, 80 %
train; the rest and all defective ones test.

Source: Huang, Qiu, Yuan, Surface defect saliency of magnetic tile, The Visual Computer 36 (2020). Decodes nothing.
"""

from collections.abc import Sequence
from pathlib import Path

from training.datasets.folders import choose_categories, list_folders, list_images, match_masks
from training.datasets.samples import NORMAL, CategoryData, Sample, split_normal

CATEGORY = "magnetic_tile"
MARK = "MT_Free/Imgs/"
_FREE = "MT_Free"
_PREFIX = "MT_"
_TRAIN_SHARE = 0.8
_PHOTOGRAPHS = (".jpg", ".jpeg")
_MASKS = (".png",)


def is_magnetic_tile(root: Path) -> bool:
    """Tell whether a folder is laid out so."""
    return (root / _FREE / "Imgs").is_dir()


def load_magnetic_tile(root: Path, categories: Sequence[str] | None = None) -> list[CategoryData]:
    """Find the images of the one category, `magnetic_tile`; its defects are `blowhole`, `break` and so on.

    Args:
        root: The folder that holds `MT_Free`.
        categories: `magnetic_tile`, or absent.

    Returns:
        One item.

    Raises:
        DatasetError: Not this data set, another category, or a folder that cannot be read.
    """
    return list(choose_categories(root, _load(root) if is_magnetic_tile(root) else {}, categories).values())


def _load(root: Path) -> dict[str, CategoryData]:
    train, tested = split_normal(list_images(root / _FREE / "Imgs", _PHOTOGRAPHS), _TRAIN_SHARE)
    samples = [Sample(path, anomalous=False, defect=NORMAL, mask=None) for path in tested]
    orphans: list[Path] = []
    for folder in list_folders(root):
        if folder.name == _FREE or not folder.name.startswith(_PREFIX):
            continue
        images = folder / "Imgs"
        defect = folder.name.removeprefix(_PREFIX).lower()
        matched, left = match_masks(list_images(images, _PHOTOGRAPHS), list_images(images, _MASKS), defect)
        samples += matched
        orphans += left
    samples.sort(key=lambda sample: (sample.defect, sample.path))
    return {CATEGORY: CategoryData(CATEGORY, tuple(train), tuple(samples), tuple(orphans))}
