"""The folder layout of MVTec AD, which is also that of one's own images.

    <root>/<category>/train/good/*.png                       normal images
    <root>/<category>/test/good/*.png                        normal images to test on (optional, as all below)
    <root>/<category>/test/<defect>/*.png                    defective images
    <root>/<category>/ground_truth/<defect>/<stem>_mask.png  where the defect is (or <stem>.png)

Source: Bergmann, Fauser, Sattlegger, Steger, MVTec AD (CVPR 2019). Decodes nothing.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from schemas.errors import DatasetError
from schemas.messages import CATEGORY_PATTERN
from training.datasets.samples import NORMAL, CategoryData, Sample

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"})

MIN_TRAIN_IMAGES = 10
"""A fifth is held out to calibrate by default: with fewer images, the threshold would hang on a single score."""

_LAYOUT = "expected <root>/<category>/train/good/*.png, and for evaluation test/good, test/<defect>"
_SHOWN = 5


def load_mvtec(root: Path, categories: Sequence[str] | None = None) -> list[CategoryData]:
    """Find the images of every category under a folder.

    Args:
        root: The folder of categories, or one category's own folder. Hidden files and other suffixes are passed over.
        categories: Those wanted; absent: all.

    Returns:
        One item a category, by name, or in the order asked for.

    Raises:
        DatasetError: No such folder or no category in it, an unknown category, a name that cannot be a category's, too
            few training images, or a mask without an image.
    """
    folders = _category_folders(root)
    wanted = list(dict.fromkeys(categories)) if categories is not None else list(folders)
    unknown = [name for name in wanted if name not in folders]
    if unknown:
        raise DatasetError(f"{root} has no category {', '.join(map(repr, unknown))}; it has: {', '.join(folders)}")
    return [_load_category(name, folders[name]) for name in wanted]


def _category_folders(root: Path) -> dict[str, Path]:
    if not root.is_dir():
        raise DatasetError(f"{root} is not a folder; {_LAYOUT}")
    if _train_folder(root).is_dir():
        return {root.resolve().name: root}
    folders = {folder.name: folder for folder in _visible(root) if _train_folder(folder).is_dir()}
    if not folders:
        raise DatasetError(f"{root} holds no category; {_LAYOUT}")
    return folders


def _load_category(name: str, folder: Path) -> CategoryData:
    if not re.fullmatch(CATEGORY_PATTERN, name):
        raise DatasetError(
            f"the folder {folder} cannot name a category: a name must match {CATEGORY_PATTERN}; rename the folder"
        )
    train = _images(_train_folder(folder))
    if len(train) < MIN_TRAIN_IMAGES:
        raise DatasetError(
            f"{_train_folder(folder)} holds {len(train)} images and at least {MIN_TRAIN_IMAGES} are needed, some 200 "
            f"for a good model; add normal images ({', '.join(sorted(IMAGE_SUFFIXES))})"
        )
    defects = sorted(_folder_names(folder / "test") | _folder_names(folder / "ground_truth"))
    return CategoryData(name, train, tuple(sample for defect in defects for sample in _samples(folder, defect)))


def _samples(folder: Path, defect: str) -> list[Sample]:
    """List one defect's test images with their masks."""
    image_folder, mask_folder = folder / "test" / defect, folder / "ground_truth" / defect
    images = _images(image_folder)
    if defect == NORMAL:
        return [Sample(path, anomalous=False, defect=defect, mask=None) for path in images]
    masks = {path.stem: path for path in _images(mask_folder)}
    samples = [
        Sample(path, anomalous=True, defect=defect, mask=masks.get(f"{path.stem}_mask", masks.get(path.stem)))
        for path in images
    ]
    orphans = sorted(path.name for path in set(masks.values()) - {sample.mask for sample in samples})
    if orphans:
        raise DatasetError(
            f"{mask_folder} holds masks without an image in {image_folder}: {', '.join(orphans[:_SHOWN])}"
            f"{f' and {len(orphans) - _SHOWN} more' if len(orphans) > _SHOWN else ''}; a mask is called "
            "<the image's name>_mask.png: rename it, restore the image, or remove the mask"
        )
    return samples


def _train_folder(folder: Path) -> Path:
    return folder / "train" / NORMAL


def _folder_names(folder: Path) -> set[str]:
    return {path.name for path in _visible(folder) if path.is_dir()}


def _images(folder: Path) -> tuple[Path, ...]:
    return tuple(path for path in _visible(folder) if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())


def _visible(folder: Path) -> list[Path]:
    """List a folder by name, without what systems leave behind (.DS_Store, ._0001.png); a missing one is empty."""
    if not folder.is_dir():
        return []
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise DatasetError(f"{folder} cannot be read: {error.strerror}; check its permissions") from error
