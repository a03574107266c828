"""Model versions on a folder or an object store: written whole or not at all, immutable, with one alias a category.

    <root>/<category>/<version>/manifest.json    written last: the version exists if and only if this file does
    <root>/<category>/<version>/<file> ...       listed in the manifest with their SHA-256
    <root>/<category>/current                    the version that serves, as text

Names and contents come from outside and are checked before they become a path or are believed. Knows no model: files
are bytes to it.
"""

import hashlib
import os
import re
import uuid
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fsspec.core import split_protocol, url_to_fs
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import known_implementations
from pydantic import ValidationError
from pydantic_core import from_json

from flawstream.registry.backbones import require_one_backbone
from schemas.errors import ConfigError, RegistryError
from schemas.manifest import MANIFEST_FORMAT, ModelManifest
from schemas.messages import CATEGORY_PATTERN

WEIGHTS_FILE = "flow.safetensors"
"""The trained head, beside every manifest."""
_MANIFEST = "manifest.json"
_CURRENT = "current"
_READS_AT_ONCE = 16
_NAME = re.compile(CATEGORY_PATTERN)


def new_version(created_at: datetime, digest: str) -> str:
    """Name a version so that names sort by time and say what is in it, such as `20261123-134500-1a2b3c4d`.

    Args:
        created_at: With its zone.
        digest: Hexadecimal digest of the version's content; two versions of one second differ by it.
    """
    return f"{created_at.astimezone(UTC):%Y%m%d-%H%M%S}-{digest[:8]}"


class Registry:
    """The model versions under one root. Holds no state: every call looks at the storage anew.

    Args:
        root: A folder, or an fsspec URL such as `s3://bucket/models`. It need not exist before the first `write`.

    Raises:
        ConfigError: The URL's protocol is unknown, or its package is not installed.
    """

    def __init__(self, root: str) -> None:
        self._fs, self._root = _open_root(root)

    @property
    def root(self) -> str:
        """Give the root as paths in it begin, without the URL's protocol."""
        return self._root

    def categories(self) -> list[str]:
        """List the categories that have at least one version, by name.

        Raises:
            RegistryError: The storage does not answer.
        """
        return [category for category in self._folders(self._root) if self.versions(category)]

    def versions(self, category: str) -> list[str]:
        """List a category's versions by name, which for names of `new_version` is the oldest first.

        Raises:
            RegistryError: No such name is possible, or the storage does not answer.
        """
        folder = self._path(category)
        return [
            version
            for version in self._folders(folder)
            if version != _CURRENT and self._exists(f"{folder}/{version}/{_MANIFEST}")
        ]

    def current(self, category: str) -> str | None:
        """Tell the version that serves, or None where none was ever promoted.

        A damaged alias is told as it stands; `manifest` refuses it.

        Raises:
            RegistryError: No such name is possible, or the storage does not answer.
        """
        return self._aliases([self._check(category)]).get(category)

    def currents(self) -> dict[str, str]:
        """Tell the version that serves for every category that has one.

        One listing, and one small read a category, all at once on an object store. A damaged alias is told as it
        stands: `manifest` refuses it, and no other category suffers.

        Raises:
            RegistryError: The storage does not answer.
        """
        return self._aliases(self._folders(self._root))

    def current_manifests(self) -> tuple[list[ModelManifest], list[RegistryError]]:
        """Read the manifest of every category's current version.

        Returns:
            Those that can be read, by category, and for each of the others why it cannot.

        Raises:
            RegistryError: The storage does not answer.
        """

        def read(alias: tuple[str, str]) -> ModelManifest | RegistryError:
            try:
                return self.manifest(*alias)
            except RegistryError as error:
                return error

        with ThreadPoolExecutor(_READS_AT_ONCE) as threads:
            found = list(threads.map(read, sorted(self.currents().items())))
        return (
            [one for one in found if isinstance(one, ModelManifest)],
            [one for one in found if isinstance(one, RegistryError)],
        )

    def manifest(self, category: str, version: str) -> ModelManifest:
        """Read a version's manifest.

        Raises:
            RegistryError: The version is missing, damaged, newer than this program reads, or was put under another
                name than its own.
        """
        path = self._path(category, version, _MANIFEST)
        try:
            data: bytes = self._fs.cat_file(path)
        except (FileNotFoundError, NotADirectoryError):
            known = ", ".join(self.versions(category)) or "none; train the category first"
            raise RegistryError(
                f"category {category!r} has no version {version!r} under {self._root}; it has: {known}"
            ) from None
        except OSError as error:
            raise _unreachable(path, error) from error
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
            manifest: The version's.
            name: One of `manifest.files`.

        Raises:
            RegistryError: The manifest does not list the file, the file is missing, or its content has another digest.
        """
        path = self._path(manifest.category, manifest.version, name)
        if name not in manifest.files:
            raise RegistryError(
                f"{manifest.model} lists no file {name!r}, only {', '.join(sorted(manifest.files)) or 'none'}"
            )
        try:
            data: bytes = self._fs.cat_file(path)
        except FileNotFoundError:
            raise RegistryError(
                f"{path} is missing though the manifest lists it; promote another version, or train again"
            ) from None
        except OSError as error:
            raise _unreachable(path, error) from error
        digest = hashlib.sha256(data).hexdigest()
        if digest != manifest.files[name]:
            raise RegistryError(
                f"{path} has SHA-256 {digest} and the manifest says {manifest.files[name]}: the file is damaged or was "
                "changed; restore it, promote another version, or train again"
            )
        return data

    def write(self, manifest: ModelManifest, files: Mapping[str, bytes]) -> None:
        """Write a new version, whole or not at all. It does not serve before `promote`.

        The manifest comes last, in one step, so a reader never sees half a version, and what a dead writer left is
        no version. Two writers of one name are not kept apart: names carry their content's digest (`new_version`).

        Args:
            manifest: With the SHA-256 of every file.
            files: Content by name.

        Raises:
            RegistryError: The version exists already, a name is not possible, the digests do not match, the manifest
                would not read back, or the storage refuses.
        """
        folder = self._path(manifest.category, manifest.version)
        if manifest.version == _CURRENT or _MANIFEST in files:
            raise RegistryError(f"{manifest.model}: the names {_CURRENT!r} and {_MANIFEST!r} belong to the registry")
        digests = {self._check(name): hashlib.sha256(data).hexdigest() for name, data in files.items()}
        if digests != manifest.files:
            wrong = sorted(
                name for name in digests.keys() | manifest.files if digests.get(name) != manifest.files.get(name)
            )
            raise RegistryError(
                f"{manifest.model}: the manifest and the files given differ in {', '.join(wrong)}; "
                "list every file with its SHA-256"
            )
        document = manifest.model_dump_json(indent=2).encode()
        if _parse(document, f"{manifest.model}, not written:") != manifest:
            raise RegistryError(f"{manifest.model}: the manifest would not read back as it is")
        if self._exists(f"{folder}/{_MANIFEST}"):
            raise RegistryError(f"{folder} exists and a version is immutable; write under a new version's name")
        try:
            for name, data in files.items():
                self._put(f"{folder}/{name}", data)
            self._put(f"{folder}/{_MANIFEST}", document)
        except OSError as error:
            raise _unreachable(folder, error) from error

    def promote(self, category: str, version: str, *, other_backbone: bool = False) -> None:
        """Make a version the one that serves; see `promote_all`."""
        self.promote_all({category: version}, other_backbone=other_backbone)

    def promote_all(self, versions: Mapping[str, str], *, other_backbone: bool = False) -> None:
        """Make versions the ones that serve, each in one step, after all of them were checked.

        Args:
            versions: By category.
            other_backbone: Whether they may run on another backbone than the current versions of other categories.

        Raises:
            MixedBackbonesError: They do, or these differ among themselves; nothing was promoted.
            RegistryError: A version cannot be read (see `manifest`) and nothing was promoted, or the storage refuses.
        """
        promoted = [self.manifest(category, version) for category, version in versions.items()]
        if not other_backbone:
            self._require_one_backbone(promoted)
        for category, version in versions.items():
            path = self._path(category, _CURRENT)
            try:
                self._put(path, f"{version}\n".encode())
            except OSError as error:
                raise _unreachable(path, error) from error

    def _require_one_backbone(self, promoted: list[ModelManifest]) -> None:
        current, _ = self.current_manifests()  # a damaged version serves nothing, and stops no promotion
        require_one_backbone(
            {one.category: one.backbone for one in [*current, *promoted]},
            f"the promotion is refused, as the current versions in {self._root} would run on several backbones",
            "train the category on the backbone of the others, or keep it in a registry and a service of its own; to "
            "move all categories to another backbone, train them in one run, or promote each with --other-backbone and "
            "then restart the service",
        )

    def _aliases(self, categories: list[str]) -> dict[str, str]:
        paths = [f"{self._root}/{category}/{_CURRENT}" for category in categories]
        found: dict[str, str] = {}
        # cat_ranges and not cat: it takes paths as they are (cat expands wildcards) and reads them concurrently.
        for category, path, data in zip(
            categories, paths, self._fs.cat_ranges(paths, None, None, on_error="return"), strict=True
        ):
            if isinstance(data, bytes):
                found[category] = data.decode(errors="replace").strip()
            elif isinstance(data, OSError) and not isinstance(
                data, FileNotFoundError | NotADirectoryError | IsADirectoryError
            ):
                raise _unreachable(path, data) from data
            elif not isinstance(data, OSError):
                raise data
        return found

    def _folders(self, path: str) -> list[str]:
        """List the names under a path that may be a category's or a version's; a missing path has none."""
        try:
            entries = self._fs.ls(path, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise _unreachable(path, error) from error
        # "not a file" and not "a directory": fsspec calls a link to a folder "other".
        names = (entry["name"].rstrip("/").rsplit("/", 1)[-1] for entry in entries if entry["type"] != "file")
        return sorted(name for name in names if _NAME.fullmatch(name))

    def _exists(self, path: str) -> bool:
        try:
            return bool(self._fs.exists(path))
        except OSError as error:
            raise _unreachable(path, error) from error

    def _put(self, path: str, data: bytes) -> None:
        """Write one file so that a reader sees it whole or not at all."""
        if not isinstance(self._fs, LocalFileSystem):
            self._fs.pipe_file(path, data)  # one PUT: object stores show an object once it is complete
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_name(f".{target.name}.{uuid.uuid4().hex}")  # a leading dot: no name of ours
        try:
            with unfinished.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())  # else a power cut may leave the new name with nothing in it
            unfinished.replace(target)
        finally:
            unfinished.unlink(missing_ok=True)

    def _path(self, *names: str) -> str:
        return "/".join([self._root, *map(self._check, names)])

    def _check(self, name: str) -> str:
        """Refuse a name that could leave the root."""
        if not _NAME.fullmatch(name):
            raise RegistryError(
                f"{name[:64]!r} cannot be a category, version or file in {self._root}; "
                f"a name must match {CATEGORY_PATTERN}"
            )
        return name


def _open_root(root: str) -> tuple[Any, str]:
    """Open the root's file system, without its cache of listings: other processes write here too."""
    protocol = split_protocol(root)[0] or "file"
    try:
        fs, path = url_to_fs(root, use_listings_cache=False)
    except ImportError as error:
        package = str(known_implementations.get(protocol, {}).get("class", "")).partition(".")[0]
        cure = f"pip install {package}" if package not in ("", "fsspec") else str(error)
        raise ConfigError(
            f"registry.root={root!r}: reading {protocol}:// needs a package that is not installed; {cure}"
        ) from error
    except ValueError as error:
        raise ConfigError(
            f"registry.root={root!r} is neither a folder nor a URL that fsspec knows ({error}); "
            "give a folder, s3://... or gs://..."
        ) from error
    return fs, str(fs._strip_protocol(path)).rstrip("/")  # noqa: SLF001 - fsspec's documented way to a bare path


def _parse(data: bytes, path: str) -> ModelManifest:
    try:
        document = from_json(data)
        if isinstance(document, dict):
            written = document.get("format")
            if isinstance(written, int) and written > MANIFEST_FORMAT:
                raise RegistryError(
                    f"{path} has format {written} and this program reads up to {MANIFEST_FORMAT}; upgrade flawstream, "
                    "or promote an older version"
                )
        return ModelManifest.model_validate_json(data)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"
            for problem in error.errors(include_url=False, include_input=False)[:4]
        )
        raise RegistryError(
            f"{path} is no manifest ({problems}); restore it, promote another version, or train again"
        ) from None
    except ValueError as error:
        raise RegistryError(
            f"{path} is damaged ({str(error)[:160]}); restore it, promote another version, or train again"
        ) from None


def _unreachable(path: str, error: BaseException) -> RegistryError:
    return RegistryError(f"the registry's storage fails at {path}: {error}; check registry.root and its permissions")
