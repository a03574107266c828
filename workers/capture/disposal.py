"""What happens to a file once it is pushed: it stays, is moved to another folder, or is deleted."""

import errno
import os
import shutil
from pathlib import Path
from typing import Protocol

from workers.capture.hot_folder import FoundFile


class Disposal(Protocol):
    """Removes a pushed file from the folder."""

    def __call__(self, file: FoundFile, message_id: str) -> None:
        """Remove the file.

        Raises:
            OSError: It cannot be removed, and is where it was.
        """
        ...


class Deletion:
    """Deletes files.

    Args:
        root: The folder that their paths are relative to.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def __call__(self, file: FoundFile, message_id: str) -> None:
        """Delete the file."""
        del message_id
        (self._root / file.path).unlink()


class Move:
    """Moves files, with their subfolders, to another folder, where nothing is overwritten.

    Args:
        root: The folder that their paths are relative to.
        done: The other folder; may be on another file system.
    """

    def __init__(self, root: Path, done: Path) -> None:
        self._root = root
        self._done = done

    def __call__(self, file: FoundFile, message_id: str) -> None:
        """Move the file; where another has its name, the end of the message's id is added to it."""
        source, target = self._root / file.path, self._done / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(target):
            target = target.with_name(f"{target.stem}.{message_id[-16:]}{target.suffix}")
        try:
            source.rename(target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            partial = target.with_name(f".{target.name}.part")
            shutil.copy2(source, partial, follow_symlinks=False)
            partial.replace(target)
            source.unlink()
