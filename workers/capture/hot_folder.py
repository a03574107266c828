"""A folder that other programs write images to: finds its complete files and reads them.

A file is complete when size and time of change have stayed the same for a while and no program on this machine has it
open for writing. The folder is listed again and again instead of being watched by inotify: that works on network shares
too, and misses nothing that was written while nobody looked. Knows nothing of the stream.
"""

import errno
import fcntl
import heapq
import os
import signal
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path, PurePath

from schemas.errors import SourceUnavailableError
from workers.capture.categories import Categories

_MOST_CANDIDATES = 10_000
"""Files that one listing keeps, the oldest; the others' turn comes once those are pushed."""
_CHUNK = 500
_TEMPORARY = frozenset({"tmp", "temp", "part", "partial", "filepart", "crdownload", "download", "swp", "bak"})
_WITHOUT_LEASES = frozenset({"nfs", "nfs4", "cifs", "smb3", "smbfs"})
"""File systems that refuse a lease whether or not the file is open."""


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A file as it was listed.

    Attributes:
        path: Relative to the folder, with `/`; bytes that are no UTF-8 are surrogates, as from `os.fsdecode`.
        size: Bytes.
        mtime_ns: Time of the last change, nanoseconds since 1970.
        category: Its category; empty where the file comes from the ledger.
    """

    path: str
    size: int
    mtime_ns: int
    category: str = field(default="", compare=False)


@dataclass(slots=True)
class Listing:
    """What one listing of the folder found.

    Attributes:
        complete: Files to push, the oldest first, at most 10,000.
        settling: Files that changed a short time ago.
        passed_over: How many files are not pushed, by reason.
        examples: The path of one of them, by reason.
    """

    complete: list[FoundFile] = field(default_factory=list)
    settling: int = 0
    passed_over: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def pass_over(self, path: str, reason: str) -> None:
        """Count a file that is not pushed."""
        self.passed_over[reason] += 1
        self.examples.setdefault(reason, path)


class HotFolder:
    """A folder, with its subfolders, that images are written to.

    Symbolic links are not followed; files of other suffixes, hidden and temporary ones are passed over.

    Args:
        root: The folder.
        suffixes: Of images, in lower case, with the dot.
        categories: Finds a file's category; files without one are passed over.
        settle_s: How long size and time of change must stay the same.
        exclude: A folder that is not looked into, such as the one that files are moved to.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        root: Path,
        suffixes: Iterable[str],
        categories: Categories,
        settle_s: float,
        *,
        exclude: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.root = root
        self._suffixes = frozenset(suffixes)
        self._categories = categories
        self._settle_s = settle_s
        self._exclude = exclude
        self._clock = clock
        self._unchanged_since: dict[FoundFile, float] = {}
        self._leases = _file_system(root) not in _WITHOUT_LEASES

    def scan(self, unknown: Callable[[list[FoundFile]], list[FoundFile]]) -> Listing:
        """List the files that are to be pushed.

        Args:
            unknown: Returns those of some files that were not pushed before.

        Raises:
            SourceUnavailableError: The folder cannot be read.
        """
        listing = Listing()
        files = heapq.nsmallest(
            _MOST_CANDIDATES, self._unknown(listing, unknown), key=lambda file: (file.mtime_ns, file.path)
        )
        now = self._clock()
        self._unchanged_since = {file: self._unchanged_since.get(file, now) for file in files}
        listing.complete = [file for file in files if now - self._unchanged_since[file] >= self._settle_s]
        listing.settling = len(files) - len(listing.complete)
        return listing

    def read(self, file: FoundFile, listing: Listing) -> bytes | None:
        """Read a complete file.

        Args:
            file: Of the listing's complete ones.
            listing: Counts the file where it is not read.

        Returns:
            Its bytes; None where it has changed, is open for writing, or cannot be read.
        """
        try:
            return self._read(file, listing)
        except FileNotFoundError:
            return None
        except OSError as error:
            listing.pass_over(file.path, f"cannot be read ({error.strerror})")
            return None

    def _read(self, file: FoundFile, listing: Listing) -> bytes | None:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with os.fdopen(os.open(self.root / file.path, flags), "rb") as opened:
            if self._leases and _is_open_for_writing(opened.fileno()):
                listing.pass_over(file.path, "open for writing")
                return None
            data = opened.read(file.size) if _is(file, os.fstat(opened.fileno())) else b""
            if len(data) == file.size and _is(file, os.fstat(opened.fileno())):
                return data
        listing.settling += 1
        return None

    def has(self, file: FoundFile) -> bool:
        """Return whether the file is there, unchanged."""
        try:
            return _is(file, os.lstat(self.root / file.path))
        except OSError:
            return False

    def _unknown(self, listing: Listing, unknown: Callable[[list[FoundFile]], list[FoundFile]]) -> Iterator[FoundFile]:
        files = self._images(listing)
        while chunk := list(islice(files, _CHUNK)):
            yield from unknown(chunk)

    def _images(self, listing: Listing) -> Iterator[FoundFile]:
        folders = [""]
        while folders:
            folder = folders.pop()
            try:
                with os.scandir(self.root / folder) as entries:
                    for entry in entries:
                        path = f"{folder}/{entry.name}" if folder else entry.name
                        if entry.is_dir(follow_symlinks=False) and not _is_temporary(entry.name):
                            if self.root / path != self._exclude:
                                folders.append(path)
                        elif (file := self._image(entry, path, listing)) is not None:
                            yield file
            except OSError as error:
                if not folder:
                    raise SourceUnavailableError(
                        f"the folder {self.root} cannot be read: {error.strerror}; is it there, and mounted?"
                    ) from error
                if not isinstance(error, FileNotFoundError):  # removed meanwhile
                    listing.pass_over(folder, f"cannot be read ({error.strerror})")

    def _image(self, entry: os.DirEntry[str], path: str, listing: Listing) -> FoundFile | None:
        """Return an entry of a folder as a file to push, or count why it is none."""
        try:
            found = entry.stat(follow_symlinks=False)
        except FileNotFoundError:  # moved meanwhile
            return None
        category = self._categories.of(path)
        if _is_temporary(entry.name):
            reason = "hidden or temporary name"
        elif stat.S_ISLNK(found.st_mode):
            reason = "symbolic link"
        elif not stat.S_ISREG(found.st_mode):
            reason = "no regular file"
        elif PurePath(entry.name).suffix.lower() not in self._suffixes:
            reason = "no image by its suffix"
        elif not found.st_size:  # its writer has not begun
            reason = "empty"
        elif category is None:
            reason = "no category by its subfolder or a rule"
        else:
            return FoundFile(path, found.st_size, found.st_mtime_ns, category)
        listing.pass_over(path, reason)
        return None


def _is(file: FoundFile, found: os.stat_result) -> bool:
    return stat.S_ISREG(found.st_mode) and (found.st_size, found.st_mtime_ns) == (file.size, file.mtime_ns)


def _is_temporary(name: str) -> bool:
    return name.startswith((".", "~")) or name.endswith("~") or not _TEMPORARY.isdisjoint(name.lower().split(".")[1:])


def _is_open_for_writing(descriptor: int) -> bool:
    """Return whether a program on this machine has the file open for writing; False where that cannot be known.

    A read lease is granted only where none has: fcntl(2). The signal for a program that then opens the file would end
    this process; SIGURG, which is ignored, stands in for it. Leases are for the file's owner and CAP_LEASE.
    """
    fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError as error:
        return error.errno == errno.EAGAIN
    fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return False


def _file_system(path: Path) -> str:
    """Return the kind of file system that a folder is on; empty if that is not known."""
    try:
        device = path.stat().st_dev
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return ""
    for line in mounts.splitlines():
        fields = line.split()
        if fields[2] == f"{os.major(device)}:{os.minor(device)}":
            return fields[fields.index("-") + 1]
    return ""
