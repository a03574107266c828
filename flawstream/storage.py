"""Folders and objects by path or URL, through fsspec. Knows no images and no models."""

import contextlib
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from fsspec.core import split_protocol, url_to_fs
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import known_implementations

from schemas.errors import ConfigError, FlawstreamError, StorageUnavailableError, one_line

S3_OPTIONS = {
    "config_kwargs": {
        "connect_timeout": 5,
        "read_timeout": 30,
        "retries": {"total_max_attempts": 2},
        "max_pool_connections": 16,
    }
}
"""For fsspec's S3: the defaults take minutes to report that nobody answers."""


@dataclass(frozen=True, slots=True)
class Location:
    """A file or folder.

    Attributes:
        fs: The fsspec file system, without a cache of listings.
        path: The path on it, without a protocol; local ones are absolute.
        prefix: What makes a path a URL again, for example `s3://`; empty on local storage.
    """

    fs: Any
    path: str
    prefix: str

    @classmethod
    def of(cls, url: str) -> Self:
        """Open a path or URL.

        Raises:
            ConfigError: The URL's protocol is unknown, its package is not installed, or URLs are chained.
        """
        if "::" in url:
            raise ConfigError(f"{url!r} chains URLs, which is not supported; give a folder, s3://... or gs://...")
        fs, path = open_file_system(url, repr(url))
        prefix = "" if isinstance(fs, LocalFileSystem) else f"{split_protocol(url)[0]}://"
        return cls(fs, path or "/", prefix)

    @property
    def is_local(self) -> bool:
        """Whether this is a file or folder of this machine."""
        return not self.prefix

    @property
    def url(self) -> str:
        """The absolute path, or the URL."""
        return self.prefix + self.path

    def __truediv__(self, name: str) -> "Location":
        """Return what is below the folder."""
        return Location(self.fs, f"{self.path.rstrip('/')}/{name}", self.prefix)


def open_file_system(url: str, name: str) -> tuple[Any, str]:
    """Open the file system of a path or URL, without a cache of listings, as other processes write there too.

    Args:
        url: The path or URL.
        name: What to call it in errors.

    Returns:
        The fsspec file system, and the path on it without a protocol and a final slash.

    Raises:
        ConfigError: The URL's protocol is unknown, or its package is not installed.
    """
    with url_errors(url, name):
        options = S3_OPTIONS if split_protocol(url)[0] in {"s3", "s3a"} else {}
        fs, path = url_to_fs(url, use_listings_cache=False, **options)
    return fs, str(fs._strip_protocol(path)).rstrip("/")  # noqa: SLF001 - fsspec's documented way to a bare path


@contextlib.contextmanager
def url_errors(url: str, name: str) -> Iterator[None]:
    """Report a URL that fsspec cannot open in the context as `ConfigError`, with the cure.

    Args:
        url: The path or URL.
        name: What to call it in errors.

    Raises:
        ConfigError: The URL's protocol is unknown, or its package is not installed.
    """
    try:
        yield
    except ImportError as error:
        protocol = split_protocol(url)[0] or "file"
        package = str(known_implementations.get(protocol, {}).get("class", "")).partition(".")[0]
        cure = f"pip install {package}" if package not in ("", "fsspec") else str(error)
        raise ConfigError(f"{name}: {protocol}:// needs a package that is not installed; {cure}") from error
    except ValueError as error:
        raise ConfigError(
            f"{name} is neither a path nor a URL that fsspec knows ({error}); give a folder, s3://... or gs://..."
        ) from error


@contextlib.contextmanager
def storage_errors(path: str) -> Iterator[None]:
    """Report any failure of a storage in the context as `StorageUnavailableError`.

    Every backend of fsspec raises the exceptions of its own library, which have no common base: those of S3 are no
    `OSError`.

    Args:
        path: What is read or written.

    Raises:
        StorageUnavailableError: The storage fails, or refuses this user.
    """
    try:
        yield
    except FlawstreamError:
        raise
    except Exception as error:
        raise StorageUnavailableError(
            f"the storage failed at {path}: {type(error).__name__}: {one_line(error)}; check that it is mounted or "
            "answers, and the permissions here"
        ) from error


def read_file(file: Location) -> bytes | None:
    """Return a file's content, or None if there is no such file."""
    try:
        data: bytes = file.fs.cat_file(file.path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return data


def write_file(file: Location, data: bytes) -> None:
    """Write a file atomically: readers see all of it or nothing, also after a crash.

    Raises:
        OSError: The storage cannot be written.
    """
    write_atomically(file.fs, file.path, data)


def write_atomically(fs: Any, path: str, data: bytes) -> None:
    """Write a file of a file system; see `write_file`.

    Raises:
        OSError: The storage cannot be written.
    """
    if not isinstance(fs, LocalFileSystem):
        fs.pipe_file(path, data)  # one PUT: object stores show only complete objects
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f"{UNFINISHED}{target.name}.{uuid.uuid4().hex}")
    try:
        with unfinished.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())  # else the file may be empty after a power cut
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)


UNFINISHED = "."
"""Start of the names of files that are being written: readers of Parquet folders skip them."""


def remove_file(file: Location) -> None:
    """Remove a file; one that is not there is no error."""
    with contextlib.suppress(FileNotFoundError):
        file.fs.rm_file(file.path)


def list_names(folder: Location) -> list[str]:
    """List the names of the files in a folder; empty if there is no such folder."""
    try:
        entries = folder.fs.ls(folder.path, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(str(entry["name"]).rsplit("/", 1)[-1] for entry in entries if entry["type"] == "file")
