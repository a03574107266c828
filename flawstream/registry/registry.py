"""Model versions in a folder or an object store: written atomically, immutable, with one alias per category.

    <root>/<category>/<version>/manifest.json    written last: the version exists if and only if this file does
    <root>/<category>/<version>/<file> ...       listed in the manifest with their SHA-256
    <root>/<category>/current                    the alias: the name of the version that serves, as text

Names and contents are untrusted: names are checked before they become paths, contents by their digests. Knows no
model, only bytes.
"""

import hashlib
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

from fsspec.implementations.local import LocalFileSystem
from pydantic import ValidationError
from pydantic_core import from_json

from flawstream.storage import open_file_system, storage_errors, write_atomically
from schemas.errors import RegistryError
from schemas.manifest import MANIFEST_FORMAT, ModelManifest
from schemas.messages import CATEGORY_PATTERN

WEIGHTS_FILE = "flow.safetensors"
"""The trained head, beside every manifest."""
REPORT_FILE = "report.html"
"""A page about its training, beside every version that was trained here."""
_MANIFEST = "manifest.json"
_CURRENT = "current"
_READS_AT_ONCE = 16
_NAME = re.compile(CATEGORY_PATTERN)
_MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


def new_version(created_at: datetime, digest: str) -> str:
    """Name a version by time and content, for example `20261123-134500-1a2b3c4d`; names sort by time.

    Args:
        created_at: With a time zone.
        digest: Hexadecimal digest of the content; distinguishes versions of the same second.
    """
    return f"{created_at.astimezone(UTC):%Y%m%d-%H%M%S}-{digest[:8]}"


class Registry:
    """The model versions under one root. Stateless: every call reads the storage.

    Args:
        root: A folder or an fsspec URL, for example `s3://bucket/models`; created by the first `write`.

    Raises:
        ConfigError: The URL's protocol is unknown, or its package is not installed.
    """

    def __init__(self, root: str) -> None:
        self._fs, self._root = open_file_system(root, f"registry.root={root!r}")

    @property
    def root(self) -> str:
        """The root as the start of paths, without the URL's protocol."""
        return self._root

    def categories(self) -> list[str]:
        """List the categories that have at least one version, by name.

        Raises:
            StorageUnavailableError: The storage cannot be read.
        """
        return [category for category in self._folders(self._root) if self.versions(category)]

    def versions(self, category: str) -> list[str]:
        """List a category's versions by name, which is the oldest first for names of `new_version`.

        Raises:
            RegistryError: The name is not valid.
            StorageUnavailableError: The storage cannot be read.
        """
        folder = self._path(category)
        return [
            version
            for version in self._folders(folder)
            if version != _CURRENT and self._exists(f"{folder}/{version}/{_MANIFEST}")
        ]

    def current(self, category: str) -> str | None:
        """Return the category's current version, or None if none was promoted.

        A damaged alias is returned unchanged; `manifest` refuses it.

        Raises:
            RegistryError: The name is not valid.
            StorageUnavailableError: The storage cannot be read.
        """
        return self._aliases([self._check(category)]).get(category)

    def currents(self) -> dict[str, str]:
        """Return the current version of every category that has one.

        One listing, and one small read per category, concurrent on an object store. A damaged alias is returned
        unchanged, so that other categories are not affected; `manifest` refuses it.

        Raises:
            StorageUnavailableError: The storage cannot be read.
        """
        return self._aliases(self._folders(self._root))

    def current_manifests(self) -> tuple[list[ModelManifest], list[RegistryError]]:
        """Read the manifest of every category's current version; see `manifests`."""
        return self.manifests(self.currents())

    def manifests(self, versions: Mapping[str, str]) -> tuple[list[ModelManifest], list[RegistryError]]:
        """Read the manifests of versions, concurrently.

        Args:
            versions: By category.

        Returns:
            The manifests that can be read, by category, and the errors of the others.

        Raises:
            StorageUnavailableError: The storage cannot be read.
        """

        def read(alias: tuple[str, str]) -> ModelManifest | RegistryError:
            try:
                return self.manifest(*alias)
            except RegistryError as error:
                return error

        with ThreadPoolExecutor(_READS_AT_ONCE) as threads:
            results = list(threads.map(read, sorted(versions.items())))
        return (
            [result for result in results if isinstance(result, ModelManifest)],
            [result for result in results if isinstance(result, RegistryError)],
        )

    def manifest(self, category: str, version: str) -> ModelManifest:
        """Read a version's manifest.

        Raises:
            RegistryError: The version is missing, damaged, in a newer format than this program reads, or was moved to
                another name.
            StorageUnavailableError: The storage cannot be read.
        """
        path = self._path(category, version, _MANIFEST)
        data = self._read(path)
        if data is None:
            versions = ", ".join(self.versions(category)) or "none; train the category first"
            raise RegistryError(
                f"category {category!r} has no version {version!r} under {self._root}; it has: {versions}"
            )
        manifest = _parse(data, path)
        if (manifest.category, manifest.version) != (category, version):
            raise RegistryError(
                f"{path} is the manifest of {manifest.model}; a version cannot be renamed or copied to another "
                "category: train it there, or move the folder back"
            )
        return manifest

    def read_file(self, manifest: ModelManifest, name: str) -> bytes:
        """Read one of a version's files and verify it.

        Args:
            manifest: The version's manifest.
            name: One of `manifest.files`.

        Raises:
            RegistryError: The manifest does not list the file, the file is missing, or its digest differs.
            StorageUnavailableError: The storage cannot be read.
        """
        path = self._path(manifest.category, manifest.version, name)
        if name not in manifest.files:
            raise RegistryError(
                f"{manifest.model} lists no file {name!r}, only {', '.join(sorted(manifest.files)) or 'none'}"
            )
        data = self._read(path)
        if data is None:
            raise RegistryError(
                f"{path} is missing though the manifest lists it; promote another version, or train again"
            )
        digest = hashlib.sha256(data).hexdigest()
        if digest != manifest.files[name]:
            raise RegistryError(
                f"{path} has SHA-256 {digest}, but the manifest has {manifest.files[name]}: the file is damaged or was "
                "changed; restore it, promote another version, or train again"
            )
        return data

    def verify(self, manifest: ModelManifest) -> None:
        """Read all of a version's files and compare their digests.

        Raises:
            RegistryError: A file is missing or damaged.
            StorageUnavailableError: The storage cannot be read.
        """
        for name in manifest.files:
            self.read_file(manifest, name)

    def write(self, manifest: ModelManifest, files: Mapping[str, bytes]) -> None:
        """Write a new version atomically. It serves only after `promote`.

        The manifest is written last and atomically, so a reader never sees an incomplete version, and files of a
        crashed writer are not a version. Two writers of the same name are not detected: names contain a digest
        (`new_version`).

        Args:
            manifest: Has the SHA-256 of every file.
            files: Content by name.

        Raises:
            RegistryError: The version exists already, a name is not valid, the digests do not match, or the manifest
                does not survive serialisation.
            StorageUnavailableError: The storage cannot be written.
        """
        folder = self._path(manifest.category, manifest.version)
        if manifest.version == _CURRENT or _MANIFEST in files:
            raise RegistryError(f"{manifest.model}: the names {_CURRENT!r} and {_MANIFEST!r} are reserved")
        digests = {self._check(name): hashlib.sha256(data).hexdigest() for name, data in files.items()}
        if digests != manifest.files:
            different = sorted(
                name for name in digests.keys() | manifest.files if digests.get(name) != manifest.files.get(name)
            )
            raise RegistryError(
                f"{manifest.model}: the manifest and the files given differ in {', '.join(different)}; "
                "list every file with its SHA-256"
            )
        document = manifest.model_dump_json(indent=2).encode()
        if _parse(document, f"{manifest.model}, not written:") != manifest:
            raise RegistryError(f"{manifest.model}: the manifest does not survive serialisation")
        if self._exists(f"{folder}/{_MANIFEST}"):
            raise RegistryError(f"{folder} exists already and a version is immutable; write it under a new name")
        for name, data in files.items():
            self._put(f"{folder}/{name}", data)
        self._put(f"{folder}/{_MANIFEST}", document)

    def promote(self, category: str, version: str) -> None:
        """Make a version current; see `promote_all`."""
        self.promote_all({category: version})

    def promote_all(self, versions: Mapping[str, str]) -> None:
        """Make versions current, each atomically, after checking all of them.

        Args:
            versions: By category.

        Raises:
            RegistryError: A version or one of its files is missing or damaged; nothing was promoted.
            StorageUnavailableError: The storage cannot be read, and nothing was promoted, or it cannot be written.
        """
        promoted = [self.manifest(category, version) for category, version in versions.items()]
        with ThreadPoolExecutor(_READS_AT_ONCE) as threads:
            for _ in threads.map(self.verify, promoted):
                pass
        for category, version in versions.items():
            self._put(self._path(category, _CURRENT), f"{version}\n".encode())

    def _aliases(self, categories: list[str]) -> dict[str, str]:
        paths = [f"{self._root}/{category}/{_CURRENT}" for category in categories]
        aliases: dict[str, str] = {}
        with storage_errors(self._root):
            # cat_ranges, not cat: it reads concurrently and does not expand wildcards in paths.
            contents = self._fs.cat_ranges(paths, None, None, on_error="return")
        for category, path, data in zip(categories, paths, contents, strict=True):
            if isinstance(data, bytes):
                aliases[category] = data.decode(errors="replace").strip()
            elif not isinstance(data, _MISSING):
                with storage_errors(path):
                    raise data
        return aliases

    def _folders(self, path: str) -> list[str]:
        """List the valid names of categories or versions under a path; empty if the path is missing."""
        with storage_errors(path):
            try:
                entries = self._fs.ls(path, detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return []
        # != "file" rather than == "directory": fsspec's type of a link to a folder is "other".
        names = (entry["name"].rstrip("/").rsplit("/", 1)[-1] for entry in entries if entry["type"] != "file")
        return sorted(name for name in names if _NAME.fullmatch(name))

    def _exists(self, path: str) -> bool:
        with storage_errors(path):
            return bool(self._fs.exists(path))

    def _read(self, path: str) -> bytes | None:
        """Return a file's content, or None if there is no such file."""
        with storage_errors(path):
            try:
                data: bytes = self._fs.cat_file(path)
            except _MISSING:
                return None
        return data

    def _put(self, path: str, data: bytes) -> None:
        """Write one file atomically; the name of an unfinished one has a leading dot, and so is never a valid name."""
        with storage_errors(path):
            write_atomically(self._fs, path, data)
            if isinstance(self._fs, LocalFileSystem):
                _sync_folders(Path(path).parent, Path(self._root))

    def _path(self, *names: str) -> str:
        return "/".join([self._root, *map(self._check, names)])

    def _check(self, name: str) -> str:
        """Refuse a name that could point outside the root."""
        if not _NAME.fullmatch(name):
            raise RegistryError(
                f"{name[:64]!r} cannot be a category, version or file in {self._root}; "
                f"a name must match {CATEGORY_PATTERN}"
            )
        return name


def _sync_folders(folder: Path, root: Path) -> None:
    """Write a folder's names to disk, and those of the folders above it up to the root: a file is found by them."""
    for one in (folder, *folder.parents):
        descriptor = os.open(one, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if one == root:
            return


def _parse(data: bytes, path: str) -> ModelManifest:
    try:
        document = from_json(data)
        if isinstance(document, dict):
            manifest_format = document.get("format")
            if isinstance(manifest_format, int) and manifest_format > MANIFEST_FORMAT:
                raise RegistryError(
                    f"{path} has format {manifest_format} but this program reads up to {MANIFEST_FORMAT}; upgrade "
                    "flawstream, or promote an older version"
                )
        return ModelManifest.model_validate_json(data)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"
            for problem in error.errors(include_url=False, include_input=False)[:4]
        )
        raise RegistryError(
            f"{path} is not a manifest ({problems}); restore it, promote another version, or train again"
        ) from None
    except ValueError as error:
        raise RegistryError(
            f"{path} is damaged ({str(error)[:160]}); restore it, promote another version, or train again"
        ) from None
