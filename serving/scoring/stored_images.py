"""Reads stored images by path or URL. What cannot be read is refused; a store that does not answer may answer later."""

import stat
from pathlib import Path

from flawstream.storage import Location
from schemas.errors import ConfigError, MessageError, Reason, TransientError, one_line

_PROTOCOLS = frozenset({"file", "s3", "s3a", "gs", "gcs", "abfs", "az"})
"""Storage that a list may name: no web servers, archives or caches, as lists are untrusted."""


def read_image(url: str, max_bytes: int) -> bytes:
    """Read a stored image.

    Args:
        url: A path of this machine, or a URL of an object store.
        max_bytes: Largest image; no more than that is read.

    Raises:
        MessageError: `unavailable_reference`, `forbidden_reference`, `too_large`, or `undecodable` for an empty file.
        TransientError: The storage does not answer.
    """
    protocol = url.partition("://")[0] if "://" in url else "file"
    if protocol not in _PROTOCOLS or "::" in url or "\0" in url:
        raise MessageError(
            Reason.FORBIDDEN_REFERENCE,
            f"{url[:200]!r} is no path and no URL of an object store ({', '.join(sorted(_PROTOCOLS - {'file'}))})",
        )
    try:
        file = Location.of(url)
    except ConfigError as error:
        raise MessageError(Reason.FORBIDDEN_REFERENCE, str(error)) from None
    data = _read_local(file.path, max_bytes) if file.is_local else _read_remote(file, max_bytes)
    if len(data) > max_bytes:
        raise MessageError(
            Reason.TOO_LARGE,
            f"the image has more than the allowed {max_bytes:,} bytes; make it smaller or raise limits.max_image_bytes",
        )
    if not data:
        raise MessageError(Reason.UNDECODABLE, "the file is empty; restore it")
    return data


def _read_local(path: str, max_bytes: int) -> bytes:
    file = Path(path)
    try:
        if not stat.S_ISREG(file.stat().st_mode):  # reading a pipe would wait for ever
            raise _unavailable("it is no file")
        with file.open("rb") as stream:
            return stream.read(max_bytes + 1)
    except FileNotFoundError:
        raise _unavailable("there is no such file") from None
    except OSError as error:
        raise _unavailable(error.strerror or type(error).__name__) from None


def _read_remote(file: Location, max_bytes: int) -> bytes:
    try:
        try:
            data: bytes = file.fs.cat_file(file.path, start=0, end=max_bytes + 1)
        except (FileNotFoundError, PermissionError):
            raise
        except OSError:
            if file.fs.info(file.path)["size"] == 0:  # S3 refuses a range of an empty object
                return b""
            raise
    except (FileNotFoundError, IsADirectoryError):
        raise _unavailable("there is no such object") from None
    except PermissionError:
        raise _unavailable("the store does not let it be read") from None
    except Exception as error:  # the clients of object stores raise many kinds, after retries of their own
        raise TransientError(
            f"{file.url}: the store does not answer ({type(error).__name__}: {one_line(error, 200)}); "
            "run the same command again once it does"
        ) from error
    return data


def _unavailable(detail: str) -> MessageError:
    return MessageError(Reason.UNAVAILABLE_REFERENCE, f"{detail}; restore it, or take it off the list")
