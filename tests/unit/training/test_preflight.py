"""What a node finds about itself; the cluster's part is in the integration tests."""

from pathlib import Path

import pytest

from training.preflight import _check_node, _Storage, _versions

MARKER = ".preflight-marker"


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    (tmp_path / "000.png").write_bytes(b"image")
    return tmp_path / "000.png"


def test_node_that_shares_all_writes_what_the_driver_reads(sample: Path, tmp_path: Path) -> None:
    registry = _Storage(str(tmp_path / "models"))
    registry.write(MARKER, MARKER)
    answer = _check_node(sample, str(tmp_path / "models"), MARKER, f"{MARKER}-node", _versions())
    assert answer.problems == ()
    assert registry.has(answer.written, MARKER)
    registry.remove(MARKER, answer.written, "never-written")
    assert list((tmp_path / "models").iterdir()) == []


def test_node_names_every_difference(tmp_path: Path) -> None:
    versions = _versions() | {"torch": "1.0"}
    answer = _check_node(tmp_path / "none.png", str(tmp_path / "models"), MARKER, f"{MARKER}-node", versions)
    release, data, registry = answer.problems
    assert f"has torch {_versions()['torch']}, and the driver has 1.0" in release
    assert data.startswith(f"cannot read {tmp_path / 'none.png'}: ")
    assert registry.startswith(f"has another registry: {tmp_path / 'models'} is not the same storage there")
    assert not answer.written
    assert not (tmp_path / "models").exists()  # nothing is written to a folder that nobody shares


def test_registry_of_another_content_is_another_registry(sample: Path, tmp_path: Path) -> None:
    _Storage(str(tmp_path / "models")).write(MARKER, "of another run")
    answer = _check_node(sample, str(tmp_path / "models"), MARKER, f"{MARKER}-node", _versions())
    assert len(answer.problems) == 1
    assert answer.problems[0].startswith("has another registry: ")


def test_registry_that_cannot_be_written_is_named(sample: Path, tmp_path: Path) -> None:
    _Storage(str(tmp_path / "models")).write(MARKER, MARKER)
    answer = _check_node(sample, str(tmp_path / "models"), MARKER, f"{'x' * 300}", _versions())  # no file has this name
    assert len(answer.problems) == 1
    assert answer.problems[0].startswith(f"cannot write to the registry {tmp_path / 'models'}: ")
