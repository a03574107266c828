"""A file system in memory that can be made full, for the server's files. Needs root and `mount`."""

import os
import subprocess
from pathlib import Path

_SIZE = "4g"
_LEFT_BYTES = 128 << 10
_TRIES = 20


class SmallDisk:
    """A tmpfs whose size is set to what it holds, and back. No memory is used to fill it.

    Args:
        folder: Where it is mounted.

    Attributes:
        refused: Why it cannot be mounted; empty if it is.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.refused = ""

    def mount(self) -> None:
        """Mount it, where that is allowed; elsewhere the folder is an ordinary one."""
        self.folder.mkdir(parents=True)
        try:
            _run("mount", "-t", "tmpfs", "-o", f"size={_SIZE}", "tmpfs", str(self.folder))
        except (OSError, subprocess.CalledProcessError) as error:
            self.refused = (getattr(error, "stderr", "") or str(error)).strip()

    def unmount(self) -> None:
        """Unmount it, with what it holds."""
        if not self.refused:
            _run("umount", "--lazy", str(self.folder))

    def fill(self) -> None:
        """Leave a few blocks free."""
        for _ in range(_TRIES):
            usage = os.statvfs(self.folder)
            used_bytes = (usage.f_blocks - usage.f_bfree) * usage.f_frsize
            try:
                _run("mount", "-o", f"remount,size={used_bytes + _LEFT_BYTES}", str(self.folder))
            except subprocess.CalledProcessError:  # more was written meanwhile
                continue
            return
        raise LookupError("the disk grows too fast to be filled")

    def free(self) -> None:
        """Make it large again."""
        _run("mount", "-o", f"remount,size={_SIZE}", str(self.folder))


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603 - fixed
