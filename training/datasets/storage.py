"""Data sets by URL: paths in an object store, listed once.

A path by URL is a `UPath`, which has the interface of `pathlib.Path` over fsspec; its annotation is `Path` as that of
local ones, so that adapters and training read both alike.
"""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

from fsspec import AbstractFileSystem
from fsspec.core import split_protocol
from upath import UPath

from flawstream.storage import S3_OPTIONS, url_errors
from schemas.errors import DatasetError, FlawstreamError, MessageError

READS_AT_ONCE = 16
"""Concurrent requests to a store."""


def is_url(path: object) -> bool:
    """Check whether a path is a URL, unlike a path of the file system."""
    return not isinstance(path, Path)


def open_path(root: str | Path) -> Path:
    """Make a path of a folder's name or a URL.

    Args:
        root: A path, or a URL of a protocol that fsspec knows, for example `s3://bucket/mvtec`.

    Raises:
        ConfigError: The URL's protocol is unknown, or its package is not installed.
    """
    if isinstance(root, Path) or "://" not in root:
        return Path(root)
    protocol, bare = split_protocol(root)
    if protocol == "file":
        return Path(bare)
    with url_errors(root, repr(root)):
        path = UPath(root.rstrip("/"), protocol=protocol, **(S3_OPTIONS if protocol in {"s3", "s3a"} else {}))
    return cast("Path", path)


def list_once(root: Path) -> None:
    """List all that is below a URL anew, in few requests; its paths answer from this list. Nothing for a local path.

    Raises:
        DatasetError: Nothing is there, or the storage fails.
    """
    if not is_url(root):
        return
    with storage_errors(root):
        _fs(root).invalidate_cache()
        if not _fs(root).find(_key(root), withdirs=True):
            _fs(root).info(_key(root))  # raises the error that `find` hides


def missing_files(paths: Sequence[Path]) -> list[Path]:
    """Select the paths that are not files; by URL with one listing per folder that is not listed yet.

    Raises:
        DatasetError: The storage fails.
    """
    urls = [path for path in paths if is_url(path)]
    for folder in {path.parent: None for path in urls}:
        with storage_errors(folder), contextlib.suppress(FileNotFoundError):
            _fs(urls[0]).ls(_key(folder))
    return [path for path in paths if not path.is_file()]


def read_file(path: Path) -> bytes:
    """Read a file; one by URL in one request.

    Raises:
        OSError: A local file cannot be read.
        DatasetError: The storage fails.
    """
    if not is_url(path):
        return path.read_bytes()
    with storage_errors(path):
        return cast("bytes", _fs(path).cat_file(_key(path)))


def read_digests(paths: Sequence[Path]) -> Iterator[bytes]:
    """Yield the SHA-256 of each file, many at once if they are URLs.

    Raises:
        OSError: A local file cannot be read.
        DatasetError: The storage fails.
    """
    if any(map(is_url, paths)):
        with ThreadPoolExecutor(READS_AT_ONCE) as pool:
            yield from pool.map(lambda path: hashlib.sha256(read_file(path)).digest(), paths)
        return
    for path in paths:
        with path.open("rb") as file:
            yield hashlib.file_digest(file, "sha256").digest()


@contextlib.contextmanager
def image_errors(path: Path) -> Iterator[None]:
    """Report an image that cannot be read or decoded in the context with its path and cure.

    Raises:
        DatasetError: It cannot.
    """
    try:
        yield
    except OSError as error:
        raise DatasetError(f"cannot read {path}: {error.strerror}") from error
    except MessageError as error:
        raise DatasetError(f"{path}: {error}; repair or remove the file") from error


@contextlib.contextmanager
def storage_errors(url: object) -> Iterator[None]:
    """Report any failure of a storage in the context as `DatasetError` with URL and cure.

    Every backend of fsspec raises the exceptions of its own library, which have no common base.

    Args:
        url: What is read.

    Raises:
        DatasetError: The storage failed.
    """
    try:
        yield
    except FlawstreamError:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DatasetError(
            f"{url} does not exist: there is no such bucket, or nothing has this name; list the bucket with the "
            "storage's own tool and correct the URL"
        ) from error
    except PermissionError as error:
        raise DatasetError(
            f"{url} must not be read with the credentials found here ({_first_line(error)}); give rights to list and "
            "get, or set other credentials (for s3: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE)"
        ) from error
    except Exception as error:
        raise DatasetError(
            f"the storage of {url} failed: {type(error).__name__}: {_first_line(error)}; check the network, the "
            "endpoint (for s3: AWS_ENDPOINT_URL) and the credentials here"
        ) from error


def _fs(path: Path) -> AbstractFileSystem:
    return cast("UPath", path).fs


def _key(path: Path) -> str:
    """Return a URL without its protocol, as fsspec takes it."""
    return cast("UPath", path).path


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "no details")
