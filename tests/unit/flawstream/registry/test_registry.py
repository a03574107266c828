"""The registry: whole or not at all, immutable, verified, and never outside its root."""

import hashlib
import json
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import fsspec
import pytest
from botocore.exceptions import EndpointConnectionError
from fsspec.registry import known_implementations
from helpers.registries import FILES, make_manifest, overwrite
from hypothesis import given
from hypothesis import strategies as st

import flawstream.registry.registry
from flawstream.registry.registry import Registry, new_version
from flawstream.storage import write_atomically
from schemas.errors import ConfigError, RegistryError, StorageUnavailableError
from schemas.manifest import MANIFEST_FORMAT

OUTSIDE = ["", ".", "..", "../x", "a/b", "/etc", ".hidden", "a\n", "a\x00", "x" * 129, "ü", "a\\b", "*"]


def test_written_version_reads_back_as_it_was(registry: Registry) -> None:
    manifest = registry.manifest("bottle", "v1")
    assert manifest == make_manifest()
    assert {name: registry.read_file(manifest, name) for name in manifest.files} == FILES


def test_root_that_does_not_exist_is_an_empty_registry(tmp_path: Path) -> None:
    empty = Registry(str(tmp_path / "none"))
    assert (empty.categories(), empty.versions("bottle"), empty.current("bottle"), empty.currents()) == (
        [],
        [],
        None,
        {},
    )
    assert not (tmp_path / "none").exists()


def test_versions_are_listed_oldest_first(root: str) -> None:
    registry = Registry(root)
    start = datetime(2026, 12, 31, 23, 59, 59, tzinfo=UTC)
    names = [new_version(start + timedelta(seconds=k), f"{9 - k}abcdef0") for k in range(3)]
    for name in reversed(names):
        registry.write(make_manifest(version=name), FILES)
    assert registry.versions("bottle") == names


def test_new_version_speaks_utc_and_sorts_by_time() -> None:
    moment = datetime(2026, 11, 23, 15, 45, tzinfo=timezone(timedelta(hours=2)))
    assert new_version(moment, "1a2b3c4d5e6f") == "20261123-134500-1a2b3c4d"


def test_another_registry_on_the_root_sees_what_was_written_at_once(root: str) -> None:
    reader, writer = Registry(root), Registry(root)
    assert reader.categories() == []
    writer.write(make_manifest(), FILES)
    assert reader.categories() == ["bottle"]
    writer.promote("bottle", "v1")
    assert reader.currents() == {"bottle": "v1"}


def test_version_is_immutable(registry: Registry) -> None:
    with pytest.raises(RegistryError, match="immutable"):
        registry.write(make_manifest(libraries={}), FILES)
    assert registry.manifest("bottle", "v1") == make_manifest()


def test_what_a_dead_writer_left_is_no_version_and_is_in_nobodys_way(root: str) -> None:
    registry = Registry(root)
    fs, base = fsspec.core.url_to_fs(root)
    fs.makedirs(f"{base}/bottle/v1", exist_ok=True)
    overwrite(root, "bottle/v1/flow.safetensors", b"half")
    assert (registry.categories(), registry.versions("bottle")) == ([], [])
    registry.write(make_manifest(), FILES)
    assert registry.read_file(registry.manifest("bottle", "v1"), "flow.safetensors") == b"weights"


def test_writer_that_dies_before_the_manifest_leaves_no_version(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry(root)

    def full(fs: Any, path: str, data: bytes) -> None:
        if path.endswith("manifest.json"):
            raise OSError(28, "No space left on device")
        write_atomically(fs, path, data)

    monkeypatch.setattr(flawstream.registry.registry, "write_atomically", full)  # the disk fills up
    with pytest.raises(StorageUnavailableError, match="No space left"):
        registry.write(make_manifest(), FILES)
    assert registry.versions("bottle") == []
    with pytest.raises(RegistryError, match="no version"):
        registry.manifest("bottle", "v1")


def test_no_unfinished_file_stays_on_a_folder(tmp_path: Path) -> None:
    registry = Registry(str(tmp_path))
    registry.write(make_manifest(), FILES)
    registry.promote("bottle", "v1")
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert left == ["bottle/current", "bottle/v1/flow.safetensors", "bottle/v1/manifest.json", "bottle/v1/notes.txt"]


def test_linked_category_folder_is_a_category(tmp_path: Path) -> None:
    Registry(str(tmp_path / "a")).write(make_manifest(), FILES)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "bottle").symlink_to(tmp_path / "a" / "bottle")
    assert Registry(str(tmp_path / "b")).categories() == ["bottle"]


@pytest.mark.parametrize(
    "files", [{}, FILES | {"more": b""}, FILES | {"notes.txt": b"changed"}], ids=["missing", "more", "changed"]
)
def test_files_that_the_manifest_does_not_describe_are_refused(root: str, files: dict[str, bytes]) -> None:
    registry = Registry(root)
    with pytest.raises(RegistryError, match=r"differ in .*(notes\.txt|more)"):
        registry.write(make_manifest(), files)
    assert registry.versions("bottle") == []


def test_manifest_that_would_not_read_back_is_refused(root: str) -> None:
    broken = make_manifest()
    training = broken.training.model_copy(update={"final_loss": float("nan")})
    with pytest.raises(RegistryError, match=r"training\..*final_loss"):
        Registry(root).write(broken.model_copy(update={"training": training}), FILES)


def test_file_with_a_wrong_digest_is_refused(registry: Registry, root: str) -> None:
    overwrite(root, "bottle/v1/flow.safetensors", b"WEIGHTS")
    with pytest.raises(RegistryError, match=r"flow\.safetensors has SHA-256 .* damaged"):
        registry.read_file(registry.manifest("bottle", "v1"), "flow.safetensors")


def test_missing_and_unlisted_files_are_refused(registry: Registry, root: str) -> None:
    fs, base = fsspec.core.url_to_fs(root)
    fs.rm_file(f"{base}/bottle/v1/flow.safetensors")
    manifest = registry.manifest("bottle", "v1")
    with pytest.raises(RegistryError, match="is missing though"):
        registry.read_file(manifest, "flow.safetensors")
    with pytest.raises(RegistryError, match="lists no file 'other'"):
        registry.read_file(manifest, "other")


def test_newer_format_is_refused_and_says_to_upgrade(registry: Registry, root: str) -> None:
    overwrite(root, "bottle/v1/manifest.json", json.dumps({"format": MANIFEST_FORMAT + 1, "new": True}).encode())
    with pytest.raises(RegistryError, match=f"format {MANIFEST_FORMAT + 1} .*upgrade"):
        registry.manifest("bottle", "v1")


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"null", b"[]", b"{}", b'{"format": "x"}', b"[" * 100_000])
def test_damaged_manifest_is_refused_and_cannot_be_promoted(registry: Registry, root: str, data: bytes) -> None:
    overwrite(root, "bottle/v1/manifest.json", data)
    with pytest.raises(RegistryError, match=r"manifest\.json is (not a manifest|damaged)"):
        registry.manifest("bottle", "v1")
    with pytest.raises(RegistryError):
        registry.promote("bottle", "v1")


def test_version_put_under_another_name_is_refused(registry: Registry, root: str) -> None:
    fs, base = fsspec.core.url_to_fs(root)
    fs.makedirs(f"{base}/can/v1")
    overwrite(root, "can/v1/manifest.json", make_manifest().model_dump_json().encode())
    with pytest.raises(RegistryError, match="is the manifest of bottle@v1"):
        registry.manifest("can", "v1")


@pytest.mark.parametrize("data", [b"", b"../../secret", b"\xff\x00", b"v9"])
def test_damaged_alias_stops_its_own_category_only(registry: Registry, root: str, data: bytes) -> None:
    registry.write(make_manifest("can"), FILES)
    registry.promote("can", "v1")
    overwrite(root, "bottle/current", data)
    currents = registry.currents()
    assert currents["can"] == "v1"
    with pytest.raises(RegistryError):
        registry.manifest("bottle", currents["bottle"])


@pytest.mark.parametrize("name", OUTSIDE)
def test_no_name_leaves_the_root(registry: Registry, name: str) -> None:
    calls: list[Callable[[], object]] = [
        lambda: registry.versions(name),
        lambda: registry.current(name),
        lambda: registry.manifest(name, "v1"),
        lambda: registry.manifest("bottle", name),
        lambda: registry.promote(name, "v1"),
        lambda: registry.promote("bottle", name),
        lambda: registry.read_file(make_manifest(files={name: "0" * 64}), name),
        lambda: registry.write(make_manifest(version="v2", files={name: hashlib.sha256(b"").hexdigest()}), {name: b""}),
    ]
    for call in calls:
        with pytest.raises(RegistryError, match="must match"):
            call()


@given(st.text(max_size=8))
def test_any_name_is_either_refused_or_stays_below_the_root(name: str) -> None:
    registry = Registry("/models")
    try:
        path = registry._path(name)  # noqa: SLF001 - without touching the disk
    except RegistryError:
        return
    assert Path(path).resolve().parent == Path("/models").resolve()


@pytest.mark.parametrize("names", [("current", "notes.txt"), ("v2", "manifest.json")])
def test_names_of_the_registry_itself_are_refused(registry: Registry, names: tuple[str, str]) -> None:
    version, file = names
    with pytest.raises(RegistryError, match="are reserved"):
        registry.write(make_manifest(version=version, files={file: hashlib.sha256(b"").hexdigest()}), {file: b""})


def test_relative_root_stays_where_it_was_when_the_process_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    registry = Registry("models")
    registry.write(make_manifest(), FILES)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert registry.categories() == ["bottle"]


def test_protocol_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(known_implementations, "absent", {"class": "absent_fs_package.FileSystem", "err": "Install it"})
    with pytest.raises(ConfigError, match=r"registry\.root='absent://bucket/x'.*pip install absent_fs_package"):
        Registry("absent://bucket/x")


def test_unknown_protocol_is_refused() -> None:
    with pytest.raises(ConfigError, match="nosuch"):
        Registry("nosuch://bucket/x")


@pytest.mark.parametrize(
    "failure",
    [PermissionError(13, "Permission denied"), EndpointConnectionError(endpoint_url="http://s3.plant")],
    ids=lambda failure: type(failure).__name__,
)
def test_storage_that_fails_is_a_transient_error(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise failure

    for name in ("ls", "cat_file", "exists", "pipe_file"):
        monkeypatch.setattr(registry._fs, name, fail, raising=True)  # noqa: SLF001 - a storage that fails
    calls: list[Callable[[], object]] = [
        registry.categories,
        registry.currents,
        lambda: registry.current("bottle"),
        lambda: registry.manifest("bottle", "v1"),
        lambda: registry.read_file(make_manifest(), "notes.txt"),
        lambda: registry.write(make_manifest(version="v2"), FILES),
    ]
    for call in calls:
        with pytest.raises(StorageUnavailableError, match=re.escape(str(failure))):
            call()
