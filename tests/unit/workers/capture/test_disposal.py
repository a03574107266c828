"""What happens to pushed files."""

import errno
from pathlib import Path

import pytest

from workers.capture.disposal import Deletion, Move
from workers.capture.hot_folder import FoundFile

FILE = FoundFile("bottle/a.png", 5, 0)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "in/bottle").mkdir(parents=True)
    (tmp_path / "in/bottle/a.png").write_bytes(b"image")
    return tmp_path / "in"


def test_a_moved_file_keeps_its_subfolder(root: Path, tmp_path: Path) -> None:
    Move(root, tmp_path / "done")(FILE, "bottle/a.png@0123456789abcdef")
    assert (tmp_path / "done/bottle/a.png").read_bytes() == b"image"
    assert not (root / "bottle/a.png").exists()


def test_a_moved_file_overwrites_none_of_its_name(root: Path, tmp_path: Path) -> None:
    (tmp_path / "done/bottle").mkdir(parents=True)
    (tmp_path / "done/bottle/a.png").write_bytes(b"first")
    Move(root, tmp_path / "done")(FILE, "bottle/a.png@0123456789abcdef")
    assert (tmp_path / "done/bottle/a.png").read_bytes() == b"first"
    assert (tmp_path / "done/bottle/a.0123456789abcdef.png").read_bytes() == b"image"


def test_a_file_is_moved_to_another_file_system(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rename(_self: Path, _target: Path) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(Path, "rename", rename)
    Move(root, tmp_path / "done")(FILE, "id")
    assert [file.name for file in (tmp_path / "done/bottle").iterdir()] == ["a.png"]
    assert not (root / "bottle/a.png").exists()


def test_a_deleted_file_is_gone(root: Path) -> None:
    Deletion(root)(FILE, "id")
    assert list((root / "bottle").iterdir()) == []
