"""Local copies of a category's files, for what reads them several times."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from schemas.errors import ConfigError
from training.datasets.samples import CategoryData
from training.datasets.storage import READS_AT_ONCE, is_url, read_file

_PREFIX = "flawstream-data-"


class LocalCopy:
    """The files of a category in a temporary folder, while the context lasts; local files stay where they are.

    A folder of a process that was killed is removed by the next copy on its machine.

    Args:
        data: The category.
    """

    def __init__(self, data: CategoryData) -> None:
        self._original = data
        self._resources = contextlib.ExitStack()
        self._copies: dict[Path, Path] = {}

    def __enter__(self) -> Self:
        files = [path for path in self._original.files() if is_url(path)]
        if files:
            folder = self._resources.enter_context(_temporary_folder())
            folders = {url: folder / str(number) for number, url in enumerate({path.parent: None for path in files})}
            self._copies = {path: folders[path.parent] / path.name for path in files}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._resources.close()

    def fill(self) -> Iterator[int]:
        """Copy all files, many at once.

        Yields:
            The number of files copied.

        Raises:
            DatasetError: The storage fails.
            ConfigError: The disk for temporary files is full.
        """
        with ThreadPoolExecutor(READS_AT_ONCE) as pool:
            copying = [pool.submit(_copy, url, target) for url, target in self._copies.items()]
            try:
                for done, each in enumerate(copying, start=1):
                    each.result()
                    yield done
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    @property
    def data(self) -> CategoryData:
        """The category with local paths."""
        original, local = self._original, self._local
        return CategoryData(
            original.name,
            tuple(map(local, original.train)),
            tuple(
                replace(
                    sample,
                    path=local(sample.path),
                    mask=None if sample.mask is None else local(sample.mask),
                    more_masks=tuple(map(local, sample.more_masks)),
                )
                for sample in original.test
            ),
        )

    def with_urls(self, text: str) -> str:
        """Replace the paths of copies in a text by their URLs."""
        for url, folder in {url.parent: copy.parent for url, copy in self._copies.items()}.items():
            text = text.replace(f"{folder}/", f"{url}/")
        return text

    def _local(self, path: Path) -> Path:
        return self._copies.get(path, path)


def _copy(url: Path, target: Path) -> None:
    content = read_file(url)
    try:
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(content)
    except OSError as error:
        raise ConfigError(
            f"{url} cannot be copied to {target.parent} ({error.strerror}); free some space, or set TMPDIR to a folder "
            "on another disk"
        ) from error


@contextlib.contextmanager
def _temporary_folder() -> Iterator[Path]:
    """Create a folder that is removed with the context, or by the next call if this process is killed before."""
    parent = Path(tempfile.gettempdir())
    for stale in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError), _locked(stale):  # fails while the process that made it lives
            shutil.rmtree(stale, ignore_errors=True)
    made = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}", dir=parent))
    with _locked(made):
        folder = made.rename(parent / made.name.removeprefix("."))  # visible to others only when it is locked
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
