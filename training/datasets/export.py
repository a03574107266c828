"""Atomic export of data sets that are not image files to folders."""

import tempfile
from collections.abc import Callable
from pathlib import Path

from schemas.errors import DatasetError


def export_whole(
    target: Path, build: Callable[[Path], None], is_complete: Callable[[Path], bool], needed_mb: int
) -> Path:
    """Build a temporary folder and move it to the target; do nothing if the target is complete.

    Args:
        target: The folder to create.
        build: Creates and fills the folder it is given.
        is_complete: Checks whether a folder is a complete export.
        needed_mb: Disk space, for the error message.

    Returns:
        The target.

    Raises:
        DatasetError: The target has other content, or cannot be written; or raised by `build`.
    """
    if is_complete(target):
        return target
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise DatasetError(f"{target} exists and has other content than this data set; choose a new folder")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as unfinished:
            built = Path(unfinished) / target.name
            build(built)
            built.replace(target)
    except OSError as error:
        if is_complete(target):  # another process was faster
            return target
        raise DatasetError(
            f"{target} cannot be written: {error}; choose a folder on a disk with {needed_mb} MB free"
        ) from error
    return target
