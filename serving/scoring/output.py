"""The folder of a scoring run: its results in parts, what it was started with, and its listing.

    OUT/part-00000.parquet               results of the first images of the listing; exists only once it is complete
    OUT/_flawstream.json                 what the run was started with; exists once the listing is complete
    OUT/_listing/part-00000.parquet      the images of the part with the same name
    OUT/_attempts/part-00000.parquet     while a part is scored: serving.scoring.attempts

Readers of Parquet folders skip names that start with `_` or a dot. Knows no model and no Ray.
"""

import hashlib
import io
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import datetime

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from flawstream.storage import UNFINISHED, Location, list_names, read_file, remove_file, write_file
from schemas.errors import ConfigError, TransientError, one_line
from schemas.messages import MapCodec
from serving.scoring.listing import ListedImage

FORMAT = 1
COUNTS = ("images", "failed", "anomalous")
"""What the file of a part notes in its metadata: its images, those not judged, those judged anomalous."""
_RUN = "_flawstream.json"
_LISTING = "_listing"
_ATTEMPTS = "_attempts"
_PART = re.compile(r"part-(\d{5,})\.parquet")
_LISTED = pa.schema([("path", pa.binary()), ("category", pa.binary())])


class RunParameters(BaseModel):
    """What a run is started with; the same for every part of it.

    Attributes:
        url: What is listed.
        suffixes: Of images.
        category: The category of all images.
        category_from: Where each image's category comes from.
        registry: Root of the model registry.
        maps: How maps are written.
        images_per_part: Most images of one part.
        engine: Setting `detector.engine`.
        device: Setting `detector.device`.
        precision: Setting `detector.precision`.
        limits: The section `limits` of the settings.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str
    suffixes: tuple[str, ...]
    category: str | None
    category_from: str | None
    registry: str
    maps: MapCodec
    images_per_part: int
    engine: str
    device: str
    precision: str
    limits: dict[str, float]


class Run(BaseModel):
    """A run of which the listing is complete.

    Attributes:
        format: Of this record.
        parameters: What it was started with.
        versions: The version that judges each category of the listing that has one.
        images: Length of the listing.
        listing_sha256: Digest of the listing's paths and categories.
        listed_at: When the listing was complete.
        flawstream: The version of this program.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = FORMAT
    parameters: RunParameters
    versions: dict[str, str]
    images: int
    listing_sha256: str
    listed_at: datetime
    flawstream: str

    @property
    def parts(self) -> int:
        """Number of parts."""
        return -(-self.images // self.parameters.images_per_part)

    def images_in(self, part: int) -> int:
        """Return the number of images of a part."""
        first = part * self.parameters.images_per_part
        return min(self.parameters.images_per_part, self.images - first)


class Output:
    """Reads and writes the folder of a run.

    Args:
        url: The folder.

    Raises:
        ConfigError: The URL's protocol is unknown, or its package is not installed.
    """

    def __init__(self, url: str) -> None:
        self._folder = Location.of(url)

    @property
    def url(self) -> str:
        """The folder's absolute path, or its URL."""
        return self._folder.url

    def read_run(self) -> Run | None:
        """Return the run, or None if there is none or its listing is not complete.

        Raises:
            ConfigError: The record is damaged or newer than this program reads, or the storage cannot be read.
        """
        try:
            data = read_file(self._folder / _RUN)
        except OSError as error:
            raise ConfigError(f"{self.url} cannot be read: {error}; check the storage and its permissions") from error
        if data is None:
            return None
        try:
            run = Run.model_validate_json(data)
        except ValidationError as error:
            raise ConfigError(
                f"{self.url}/{_RUN} is damaged or of another version of flawstream ({error.error_count()} problems); "
                "start anew with --again, or choose another --out"
            ) from None
        if run.format != FORMAT:
            raise ConfigError(
                f"{self.url}/{_RUN} has format {run.format} and this program reads {FORMAT}; upgrade flawstream, start "
                "anew with --again, or choose another --out"
            )
        return run

    def write_run(self, run: Run) -> None:
        """Write the record of a run whose listing is written."""
        write_file(self._folder / _RUN, run.model_dump_json(indent=2).encode())

    def write_listing(self, images: Iterable[ListedImage], images_per_part: int) -> tuple[int, str, set[str]]:
        """Write a listing in parts; at most one part of it is in memory.

        Returns:
            The number of images, the digest of the listing, and the names of its categories.
        """
        count, digest, categories = 0, hashlib.sha256(), set()
        remaining = iter(images)
        while batch := list(itertools.islice(remaining, images_per_part)):
            table = pa.table(
                [[_bytes(image.path) for image in batch], [_bytes(image.category) for image in batch]], _LISTED
            )
            for image in batch:
                digest.update(_bytes(image.path) + b"\0" + _bytes(image.category) + b"\0")
                categories.add(image.category)
            write_file(self._folder / _LISTING / _name(count // images_per_part), _parquet(table))
            count += len(batch)
        return count, digest.hexdigest(), categories

    def read_listing(self, part: int) -> list[ListedImage]:
        """Return the images of a part.

        Raises:
            ConfigError: The listing cannot be read on this machine.
        """
        file = self._folder / _LISTING / _name(part)
        data = read_file(file)
        if data is None:
            raise ConfigError(
                f"{file.url} is missing on this machine; every node of the cluster must see the folder of --out under "
                "the same path: choose a shared folder or an object store"
            )
        table = pq.read_table(io.BytesIO(data), schema=_LISTED)
        paths, categories = (column.to_pylist() for column in table.columns)
        return [ListedImage(_text(path), _text(name)) for path, name in zip(paths, categories, strict=True)]

    def attempt_file(self, part: int) -> Location:
        """Return where attempts at a part are noted."""
        return self._folder / _ATTEMPTS / _name(part)

    def write_part(self, part: int, table: pa.Table) -> None:
        """Write the results of a part, atomically.

        Raises:
            TransientError: The storage cannot be written.
        """
        file = self._folder / _name(part)
        try:
            write_file(file, _parquet(table))
        except Exception as error:  # the clients of object stores raise many kinds
            raise TransientError(
                f"{file.url} cannot be written ({type(error).__name__}: {one_line(error, 200)}); run the "
                "same command again once it can"
            ) from error

    def finished(self) -> set[int]:
        """Return the parts that are written."""
        return {int(match[1]) for name in list_names(self._folder) if (match := _PART.fullmatch(name))}

    def count(self, parts: Iterable[int]) -> Counter[str]:
        """Sum up what parts that are written note of themselves: `COUNTS`."""
        total: Counter[str] = Counter()
        for part in parts:
            file = self._folder / _name(part)
            with file.fs.open(file.path, "rb") as stream:
                noted = pq.read_schema(stream).metadata or {}
            total.update({name: int(noted.get(name.encode(), b"0")) for name in COUNTS})
        return total

    def has_other_files(self) -> bool:
        """Return whether there are files that a run does not write."""
        return any(not _is_ours(name) for name in list_names(self._folder))

    def clear(self) -> None:
        """Remove everything that a run writes; the record first, so that what remains is never taken for a run."""
        self._remove(self._folder, [name for name in list_names(self._folder) if name == _RUN])
        self._remove(self._folder, [name for name in list_names(self._folder) if _is_ours(name)])
        for folder in (self._folder / _LISTING, self._folder / _ATTEMPTS):
            self._remove(folder, [name for name in list_names(folder) if _is_ours(name)])

    def remove_unfinished(self) -> None:
        """Remove files that killed processes left; for when no process of the run writes any more."""
        for folder in (self._folder, self._folder / _LISTING, self._folder / _ATTEMPTS):
            self._remove(
                folder, [name for name in list_names(folder) if _is_ours(name) and name.startswith(UNFINISHED)]
            )

    @staticmethod
    def _remove(folder: Location, names: Sequence[str]) -> None:
        for name in names:
            remove_file(folder / name)


def _name(part: int) -> str:
    return f"part-{part:05}.parquet"


def _is_ours(name: str) -> bool:
    if name.startswith(UNFINISHED):
        name = name.removeprefix(UNFINISHED).rpartition(".")[0]
    return name == _RUN or _PART.fullmatch(name) is not None


def _parquet(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")
