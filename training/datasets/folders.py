"""Reading of image folders: listing of files, matching of masks to images, selection of categories.

Knows no data set's layout and decodes nothing.
"""

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from schemas.errors import DatasetError
from schemas.messages import CATEGORY_PATTERN
from training.datasets.samples import Sample
from training.datasets.storage import is_url, storage_errors

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"})

_Found = TypeVar("_Found")


def list_images(folder: Path, suffixes: Iterable[str] = IMAGE_SUFFIXES) -> tuple[Path, ...]:
    """List a folder's images by name; a missing folder is empty.

    Args:
        folder: The folder; subfolders are not searched.
        suffixes: In lower case, with the dot; compared without case.

    Raises:
        DatasetError: The folder cannot be read.
    """
    wanted = frozenset(suffixes)
    return tuple(path for path in _visible(folder) if path.suffix.lower() in wanted and path.is_file())


def image_files(paths: Iterable[Path]) -> Iterator[Path]:
    """Yield files unchanged, and the images in folders and their subfolders, by name."""
    for path in paths:
        if path.is_dir():
            yield from sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
        else:
            yield path


def list_folders(folder: Path) -> list[Path]:
    """List a folder's subfolders by name; a missing folder is empty.

    Raises:
        DatasetError: The folder cannot be read.
    """
    return [path for path in _visible(folder) if path.is_dir()]


def has_folder(folder: Path, *names: str) -> bool:
    """Check whether a folder has this subfolder, level by level: in a store, a listed level needs no request.

    Args:
        folder: The folder.
        names: Names of a subfolder, its subfolder, and so on.
    """
    return all((folder := folder / name).is_dir() for name in names)


def match_masks(images: Sequence[Path], masks: Sequence[Path], defect: str) -> tuple[list[Sample], list[Path]]:
    """Match defective images to their masks, named `<stem>_mask` or `<stem>`.

    Args:
        images: Images of one kind of defect.
        masks: Candidates for their masks.
        defect: Name of the defect.

    Returns:
        The samples in the order of the images, and the masks without an image.
    """
    by_stem = {mask.stem: mask for mask in masks}
    samples = [
        Sample(path, anomalous=True, defect=defect, mask=by_stem.get(f"{path.stem}_mask", by_stem.get(path.stem)))
        for path in images
    ]
    matched = {sample.mask for sample in samples}
    return samples, [mask for mask in masks if mask not in matched]


def choose_categories(root: Path, found: Mapping[str, _Found], wanted: Sequence[str] | None) -> dict[str, _Found]:
    """Select categories and check their names; names of other categories are not checked.

    Args:
        root: The data set, for error messages.
        found: All categories by name.
        wanted: Names to select, in this order; None: all, by name.

    Raises:
        DatasetError: There is no category, one is unknown, or a name is invalid.
    """
    if not found:
        raise DatasetError(f"{root} has no category; check that this is the data set, and complete")
    chosen = list(dict.fromkeys(wanted)) if wanted is not None else sorted(found)
    unknown = [name for name in chosen if name not in found]
    if unknown:
        raise DatasetError(
            f"{root} has no category {', '.join(map(repr, unknown))}; it has: {', '.join(sorted(found))}"
        )
    for name in chosen:
        if not re.fullmatch(CATEGORY_PATTERN, name):
            raise DatasetError(
                f"{name!r} in {root} is not a valid category name: it must match {CATEGORY_PATTERN}; rename it there"
            )
    return {name: found[name] for name in chosen}


def _visible(folder: Path) -> list[Path]:
    """List a folder by name, without hidden files (.DS_Store, ._0001.png); a missing folder is empty."""
    if not folder.is_dir():
        return []
    try:
        with storage_errors(folder) if is_url(folder) else contextlib.nullcontext():
            return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise DatasetError(f"{folder} cannot be read: {error.strerror}; check its permissions") from error
