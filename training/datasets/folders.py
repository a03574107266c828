"""Reading of image folders: listing of files, matching of masks to images, selection of categories.

Knows no data set's layout and decodes nothing.
"""

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

from schemas.errors import DatasetError
from schemas.messages import CATEGORY_PATTERN
from training.datasets.samples import NORMAL_NAMES, Sample, Skip, Skipped
from training.datasets.storage import is_url, storage_errors

IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".jfi", ".jif", ".bmp", ".dib", ".tif", ".tiff", ".webp"}
)
_SYSTEM_FILES = frozenset({"__MACOSX", "Thumbs.db", "desktop.ini"})
"""What file managers leave in folders; hidden like names with a leading dot."""

_Found = TypeVar("_Found")


@dataclass(frozen=True, slots=True)
class Listing:
    """What lies in a folder, each sorted by name.

    Attributes:
        images: Files with the suffix of an image.
        folders: Subfolders.
        skipped: Dangling links, hidden files, and files with another suffix.
    """

    images: tuple[Path, ...] = ()
    folders: tuple[Path, ...] = ()
    skipped: tuple[Skipped, ...] = ()


def list_folder(folder: Path, suffixes: Iterable[str] = IMAGE_SUFFIXES) -> Listing:
    """List a folder; a missing folder is empty.

    Args:
        folder: The folder; subfolders are not searched.
        suffixes: In lower case, with the dot; compared without case.

    Raises:
        DatasetError: The folder cannot be read.
    """
    wanted = frozenset(suffixes)
    images: list[Path] = []
    folders: list[Path] = []
    skipped: list[Skipped] = []
    for path in _entries(folder):
        if is_hidden(path.name):
            skipped.append(Skipped(path, Skip.HIDDEN_FILE))
        elif path.is_file():
            if path.suffix.lower() in wanted:
                images.append(path)
            else:
                skipped.append(Skipped(path, Skip.OTHER_FILE))
        elif path.is_dir():
            folders.append(path)
        else:
            skipped.append(Skipped(path, Skip.DANGLING_LINK))
    return Listing(tuple(images), tuple(folders), tuple(skipped))


def list_images(folder: Path, suffixes: Iterable[str] = IMAGE_SUFFIXES) -> tuple[Path, ...]:
    """List a folder's images by name; a missing folder is empty.

    Args:
        folder: The folder; subfolders are not searched.
        suffixes: In lower case, with the dot; compared without case.

    Raises:
        DatasetError: The folder cannot be read.
    """
    return list_folder(folder, suffixes).images


def image_files(paths: Iterable[Path]) -> Iterator[Path]:
    """Yield files unchanged, and the images in folders and their subfolders, by name; hidden ones only if named."""
    for path in paths:
        if path.is_dir():
            yield from sorted(
                file
                for file in path.rglob("*")
                if file.suffix.lower() in IMAGE_SUFFIXES and not any(map(is_hidden, file.relative_to(path).parts))
            )
        else:
            yield path


def list_folders(folder: Path) -> list[Path]:
    """List a folder's subfolders by name; a missing folder is empty.

    Raises:
        DatasetError: The folder cannot be read.
    """
    return list(list_folder(folder).folders)


def is_hidden(name: str) -> bool:
    """Check whether a file or folder is hidden, or is what file managers leave behind."""
    return name.startswith(".") or name in _SYSTEM_FILES


def is_normal(name: str) -> bool:
    """Check whether a folder of this name has normal images."""
    return name.lower() in NORMAL_NAMES


def has_folder(folder: Path, *names: str) -> bool:
    """Check whether a folder has this subfolder, level by level: in a store, a listed level needs no request.

    Args:
        folder: The folder.
        names: Names of a subfolder, its subfolder, and so on.
    """
    return all((folder := folder / name).is_dir() for name in names)


def match_masks(
    images: Sequence[Path],
    masks: Sequence[Path],
    defect: str,
    groups: Mapping[str, Sequence[Path]] = MappingProxyType({}),
) -> tuple[list[Sample], list[Path]]:
    """Match defective images to their masks, named `<stem>_mask` or `<stem>`, or several in a group `<stem>`.

    Args:
        images: Images of one kind of defect.
        masks: Candidates for their masks.
        defect: Name of the defect.
        groups: Masks of one image each, by its stem.

    Returns:
        The samples in the order of the images, and the masks without an image.
    """
    by_stem = {mask.stem: mask for mask in masks}
    samples = []
    for path in images:
        mask = by_stem.get(f"{path.stem}_mask", by_stem.get(path.stem))
        own = (*((mask,) if mask is not None else ()), *groups.get(path.stem, ()))
        samples.append(Sample(path, anomalous=True, defect=defect, mask=own[0] if own else None, more_masks=own[1:]))
    matched = {mask for sample in samples for mask in sample.masks}
    everything = [*masks, *(mask for group in groups.values() for mask in group)]
    return samples, [mask for mask in everything if mask not in matched]


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


def _entries(folder: Path) -> list[Path]:
    """List a folder by name; a missing folder is empty."""
    if not folder.is_dir():
        return []
    try:
        with storage_errors(folder) if is_url(folder) else contextlib.nullcontext():
            return sorted(folder.iterdir())
    except OSError as error:
        raise DatasetError(f"{folder} cannot be read: {error.strerror}; check its permissions") from error
