"""Lists stored images: a folder, a pattern, a list of paths, or one file; local or on an object store.

A listing is a stream: of a million names no more are in memory than one folder has, on S3 one page. Opens no image.
"""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from fsspec.utils import glob_translate

from flawstream.storage import Location
from schemas.errors import ConfigError

LIST_SUFFIXES = (".txt", ".parquet")
"""A URL that ends so is a list of paths."""
FOLDER = "folder"
"""As `Source.category_from`: the first folder below the URL."""

_PATH_COLUMNS = ("path", "url")
_MAGIC = re.compile(r"[*?\[]")


class ListedImage(NamedTuple):
    """A stored image.

    Attributes:
        path: Absolute path or URL. Bytes of a local name that are not UTF-8 are surrogates, as in `os.fsdecode`.
        category: The category that judges it. Untrusted, as it may be the name of a folder; empty where there is none.
    """

    path: str
    category: str


@dataclass(frozen=True, slots=True)
class Source:
    """Which images to list.

    Attributes:
        url: A folder, a pattern with `*`, `**` or `?`, a list (`.txt`, `.parquet`), or one image.
        suffixes: Suffixes of images in lower case with the dot, for folders and patterns.
        category: The category of all images.
        category_from: Where each image's category comes from: `FOLDER`, or a column of a Parquet list.
    """

    url: str
    suffixes: tuple[str, ...]
    category: str | None = None
    category_from: str | None = None


def list_images(source: Source) -> Iterator[ListedImage]:
    """List the images, in the order of the storage's folders and names, or of the list.

    Raises:
        ConfigError: There is nothing at the URL, it cannot be read, or a list has not the columns that are needed.
    """
    location = Location.of(source.url)
    try:
        if source.category_from not in (None, FOLDER) and not location.path.endswith(".parquet"):
            raise ConfigError(
                f"the category cannot come from the column {source.category_from!r} of {source.url!r}: only a Parquet "
                "list has columns; give --category-from folder, or --category"
            )
        if location.path.endswith(LIST_SUFFIXES):
            yield from _from_list(location, source)
        else:
            yield from _from_storage(location, source)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(f"there is nothing at {source.url!r} ({error}); correct the path or URL") from error
    except OSError as error:
        raise ConfigError(f"{source.url!r} cannot be listed: {error}; check the storage and its permissions") from error


def _from_storage(location: Location, source: Source) -> Iterator[ListedImage]:
    exists = location.is_local and os.path.lexists(location.path)  # then brackets belong to a name
    pattern = None if exists else _MAGIC.search(location.path)
    if pattern is not None:
        base = location.path[: pattern.start()].rpartition("/")[0] or "/"
        matches = re.compile(glob_translate(location.path)).match
        paths: Iterator[str] = (path for path in _walk(Location(location.fs, base, location.prefix)) if matches(path))
    elif not location.is_local and location.fs.isfile(location.path):
        base, paths = location.path.rpartition("/")[0], iter([location.path])
    elif location.is_local and os.path.isfile(location.path):  # noqa: PTH113 - paths here are text
        base, paths = os.path.dirname(location.path), iter([location.path])  # noqa: PTH120 - the same
    else:
        base, paths = location.path, _walk(location)
    below = len(base.rstrip("/")) + 1
    for path in paths:
        if path.lower().endswith(source.suffixes):
            folder, separator, _ = path[below:].partition("/")
            category = source.category or (folder if separator else "")
            yield ListedImage(location.prefix + path, category)


def _walk(folder: Location) -> Iterator[str]:
    """Yield the paths of all files below a folder but the hidden ones. Links to folders are not followed."""
    if folder.is_local:
        return _walk_local(folder.path)
    if "s3" in folder.prefix:
        return _walk_s3(folder)
    return _walk_any(folder)


def _walk_local(folder: str) -> Iterator[str]:
    with os.scandir(folder) as entries:
        names = sorted(
            (entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries if not entry.name.startswith(".")
        )
    start = folder.rstrip("/")
    for name, is_folder in names:
        if is_folder:
            yield from _walk_local(f"{start}/{name}")
        else:
            yield f"{start}/{name}"


def _walk_s3(folder: Location) -> Iterator[str]:
    """List objects page by page; s3fs's own `walk` and `find` hold every object of a folder in memory."""
    bucket, _, key = folder.path.partition("/")
    prefix = f"{key}/" if key else ""
    page: dict[str, str] = {}
    while True:
        answer = folder.fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, **page)
        for found in answer.get("Contents", ()):
            below = found["Key"][len(prefix) :]
            if not below.endswith("/") and not any(part.startswith(".") for part in below.split("/")):
                yield f"{bucket}/{found['Key']}"
        if not answer.get("IsTruncated"):
            return
        page = {"ContinuationToken": answer["NextContinuationToken"]}


def _walk_any(folder: Location) -> Iterator[str]:
    for base, folders, files in folder.fs.walk(folder.path, on_error="raise"):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (f"{base}/{name}" for name in sorted(files) if not name.startswith("."))


def _from_list(location: Location, source: Source) -> Iterator[ListedImage]:
    base = Location(location.fs, location.path.rpartition("/")[0], location.prefix)
    absolute = _absolute_from(base)
    rows = _text_rows(location) if location.path.endswith(".txt") else _parquet_rows(location, source)
    for path, category in rows:
        folder, separator, _ = path.partition("/")
        below = folder if source.category_from == FOLDER and separator and ":" not in folder else category
        yield ListedImage(absolute(path), source.category or below)


def _absolute_from(base: Location) -> Callable[[str], str]:
    start = f"{base.url.rstrip('/')}/"
    return lambda path: path if path.startswith("/") or "://" in path else start + path


def _text_rows(location: Location) -> Iterator[tuple[str, str]]:
    with location.fs.open(location.path, "rb") as stream:
        for line in stream:
            if text := line.rstrip(b"\r\n").decode("utf-8", "surrogateescape"):
                yield text, ""


def _parquet_rows(location: Location, source: Source) -> Iterator[tuple[str, str]]:
    import pyarrow as pa  # noqa: PLC0415 - an optional extra
    import pyarrow.dataset as ds  # noqa: PLC0415 - the same

    try:
        table = ds.dataset(location.path, filesystem=location.fs, format="parquet")
        columns = [next((name for name in _PATH_COLUMNS if name in table.schema.names), "path")]
        if source.category_from not in (None, FOLDER):
            columns.append(str(source.category_from))
        if missing := [name for name in columns if name not in table.schema.names]:
            raise ConfigError(
                f"{source.url!r} has no column {', '.join(missing)}; it has {', '.join(table.schema.names) or 'none'}. "
                f"A list of images needs the column {' or '.join(_PATH_COLUMNS)}"
            )
        for batch in table.to_batches(columns=columns):
            paths, *categories = (column.cast(pa.string()).to_pylist() for column in batch.columns)
            named = categories[0] if categories else [""] * len(paths)
            yield from ((path or "", category or "") for path, category in zip(paths, named, strict=True))
    except pa.ArrowException as error:
        raise ConfigError(f"{source.url!r} is not a list of images in Parquet: {error}") from error
