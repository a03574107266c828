"""Data sets that come in another form than image files, written as folders once: whole or not at all."""

import tempfile
from collections.abc import Callable
from pathlib import Path

from schemas.errors import DatasetError


def export_whole(
    target: Path, build: Callable[[Path], None], is_complete: Callable[[Path], bool], needed_mb: int
) -> Path:
    """Build a folder beside its place and move it there; where it stands already, do nothing.

    Args:
        target: The folder to make.
        build: Fills a folder that does not exist yet.
        is_complete: Tells whether a folder is what `build` makes.
        needed_mb: Room on the disk, for the error's text.

    Returns:
        The target.

    Raises:
        DatasetError: The target holds something else, or cannot be written; or what `build` raises.
    """
    if is_complete(target):
        return target
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise DatasetError(f"{target} exists and holds something else than this data set; name a new folder")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as unfinished:
            built = Path(unfinished) / target.name
            build(built)
            built.replace(target)
    except OSError as error:
        if is_complete(target):  # another process was quicker
            return target
        raise DatasetError(
            f"{target} cannot be written: {error}; name a folder on a disk with {needed_mb} MB to spare"
        ) from error
    return target
