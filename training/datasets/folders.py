"""Folders of images: which files count, which mask belongs to which image, which categories are wanted.

Knows no data set's layout and decodes nothing.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from schemas.errors import DatasetError
from schemas.messages import CATEGORY_PATTERN
from training.datasets.samples import Sample

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"})

_Found = TypeVar("_Found")


def list_images(folder: Path, suffixes: Iterable[str] = IMAGE_SUFFIXES) -> tuple[Path, ...]:
    """List a folder's images by name; a missing folder holds none.

    Args:
        folder: Where to look; not below it.
        suffixes: In lower case, with the dot; files have them in any case.

    Raises:
        DatasetError: The folder cannot be read.
    """
    wanted = frozenset(suffixes)
    return tuple(path for path in _visible(folder) if path.suffix.lower() in wanted and path.is_file())


def image_files(paths: Iterable[Path]) -> Iterator[Path]:
    """Give files as they are named, and of folders all images in them, in order of their names."""
    for path in paths:
        if path.is_dir():
            yield from sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
        else:
            yield path


def list_folders(folder: Path) -> list[Path]:
    """List a folder's folders by name; a missing folder holds none.

    Raises:
        DatasetError: The folder cannot be read.
    """
    return [path for path in _visible(folder) if path.is_dir()]


def match_masks(images: Sequence[Path], masks: Sequence[Path], defect: str) -> tuple[list[Sample], list[Path]]:
    """Give each defective image its mask: the one called `<stem>_mask`, or else `<stem>`.

    Args:
        images: Images that show the defect.
        masks: All masks that may belong to them.
        defect: Its name.

    Returns:
        The images in their order, and the masks that belong to none.
    """
    by_stem = {mask.stem: mask for mask in masks}
    samples = [
        Sample(path, anomalous=True, defect=defect, mask=by_stem.get(f"{path.stem}_mask", by_stem.get(path.stem)))
        for path in images
    ]
    taken = {sample.mask for sample in samples}
    return samples, [mask for mask in masks if mask not in taken]


def choose_categories(root: Path, found: Mapping[str, _Found], wanted: Sequence[str] | None) -> dict[str, _Found]:
    """Take the wanted categories of those found; the others are not judged.

    Args:
        root: Where they were found.
        found: What there is, by category.
        wanted: Those asked for, in the order to keep; absent: all, by name.

    Raises:
        DatasetError: There are none, one asked for is not there, or a name cannot be a category's.
    """
    if not found:
        raise DatasetError(f"{root} holds no category; check that this is the data set, and whole")
    chosen = list(dict.fromkeys(wanted)) if wanted is not None else sorted(found)
    unknown = [name for name in chosen if name not in found]
    if unknown:
        raise DatasetError(
            f"{root} has no category {', '.join(map(repr, unknown))}; it has: {', '.join(sorted(found))}"
        )
    for name in chosen:
        if not re.fullmatch(CATEGORY_PATTERN, name):
            raise DatasetError(
                f"{name!r} in {root} cannot name a category: a name must match {CATEGORY_PATTERN}; rename it there"
            )
    return {name: found[name] for name in chosen}


def _visible(folder: Path) -> list[Path]:
    """List a folder by name, without what systems leave behind (.DS_Store, ._0001.png); a missing one is empty."""
    if not folder.is_dir():
        return []
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise DatasetError(f"{folder} cannot be read: {error.strerror}; check its permissions") from error
