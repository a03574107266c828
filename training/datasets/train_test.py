"""The tree of several data sets: `train/<normal>`, `test/<normal or defect>`, `ground_truth/<defect>`.

The name of the normal folders is an argument. Decodes nothing.
"""

from collections.abc import Sequence
from pathlib import Path

from schemas.errors import escaped
from training.datasets.folders import choose_categories, has_folder, list_folders, list_images, match_masks
from training.datasets.samples import NORMAL, CategoryData, Sample


def is_train_test(root: Path, normal: str) -> bool:
    """Check whether a folder is such a data set, or one category of it."""
    return bool(_category_folders(root, normal))


def load_train_test(root: Path, categories: Sequence[str] | None, normal: str) -> list[CategoryData]:
    """Find the images of every category under a folder.

    Args:
        root: The folder of categories, or the folder of one category. Hidden files and other suffixes are ignored.
        categories: Names of categories; None: all.
        normal: Name of the folders of normal images.

    Returns:
        One item per category, in the order of `categories`, else by name.

    Raises:
        DatasetError: There is no category, one is unknown or has an invalid name, or a folder cannot be read.
    """
    chosen = choose_categories(root, _category_folders(root, normal), categories)
    return [_load_category(name, folder, normal) for name, folder in chosen.items()]


def _category_folders(root: Path, normal: str) -> dict[str, Path]:
    if has_folder(root, "train", normal):
        return {root.resolve().name: root}
    return {folder.name: folder for folder in list_folders(root) if has_folder(folder, "train", normal)}


def _load_category(name: str, folder: Path, normal: str) -> CategoryData:
    samples: list[Sample] = []
    orphans: list[Path] = []
    defects = {path.name for part in ("test", "ground_truth") for path in list_folders(folder / part)}
    for defect in sorted(defects):
        images = list_images(folder / "test" / defect)
        if defect == normal:
            samples += [Sample(path, anomalous=False, defect=NORMAL, mask=None) for path in images]
            continue
        masks = list_images(folder / "ground_truth" / defect) if has_folder(folder, "ground_truth", defect) else ()
        matched, unmatched = match_masks(images, masks, escaped(defect))
        samples += matched
        orphans += unmatched
    return CategoryData(name, list_images(folder / "train" / normal), tuple(samples), tuple(orphans))
