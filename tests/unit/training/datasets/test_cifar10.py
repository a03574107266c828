"""CIFAR-10 as folders: pixels and classes as recorded, whole or not at all, and never a pickle."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from schemas.errors import DatasetError
from training.datasets import cifar10
from training.datasets.cifar10 import BINARY_URL, CLASSES, export_cifar10
from training.datasets.mvtec import load_mvtec


def write_records(folder: Path, *, per_class: int = 2) -> dict[str, NDArray[np.uint8]]:
    """Write the binary version with few images; gives the records of each file."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    written = {}
    for name in (*(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin"):
        records = random.integers(0, 256, (10 * per_class, 3073), np.uint8)
        records[:, 0] = np.arange(10 * per_class) % 10
        records.tofile(folder / name)
        written[name] = records
    (folder / "batches.meta.txt").write_text("\n".join(CLASSES) + "\n\n", encoding="ascii")
    return written


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_records(tmp_path / "cifar-10-batches-bin")
    return tmp_path / "cifar-10-batches-bin"


def test_every_class_is_normal_once_and_a_defect_of_the_nine_others(source: Path, tmp_path: Path) -> None:
    found = load_mvtec(export_cifar10(source, tmp_path / "out"))
    assert [data.name for data in found] == list(CLASSES)
    for data in found:
        assert len(data.train) == 5 * 2
        counts = {name: sum(sample.defect == name for sample in data.test) for name in {*CLASSES, "good"}}
        assert counts == {name: 0 if name == data.name else 2 for name in {*CLASSES, "good"}}
        assert not data.orphan_masks


def test_pixels_are_those_of_the_record(tmp_path: Path) -> None:
    records = write_records(tmp_path / "in")
    export_cifar10(tmp_path / "in", tmp_path / "out")
    cat = CLASSES.index("cat")
    planes = records["data_batch_2.bin"][cat, 1:].reshape(3, 32, 32)
    written = cv2.imread(str(tmp_path / "out" / "cat" / "train" / "good" / f"{20 + cat:05}.png"))
    assert np.array_equal(cv2.cvtColor(written, cv2.COLOR_BGR2RGB), np.moveaxis(planes, 0, -1))
    tested = records["test_batch.bin"][cat, 1:].reshape(3, 32, 32)
    as_defect = cv2.imread(str(tmp_path / "out" / "dog" / "test" / "cat" / f"{cat:05}.png"))
    assert np.array_equal(cv2.cvtColor(as_defect, cv2.COLOR_BGR2RGB), np.moveaxis(tested, 0, -1))


def test_disk_without_hard_links_gets_copies(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    linked = export_cifar10(source, tmp_path / "linked")

    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    copied = export_cifar10(source, tmp_path / "copied")
    one = Path("dog", "test", "cat", "00003.png")
    assert (linked / one).stat().st_nlink == 10
    assert (copied / one).stat().st_nlink == 1
    assert [data.sha256() for data in load_mvtec(copied)] == [data.sha256() for data in load_mvtec(linked)]


def test_progress_ends_at_the_whole(source: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    export_cifar10(source.parent, tmp_path / "out", lambda done, total: told.append((done, total)))
    assert told[-1] == (120, 120)
    assert told == sorted(told)


def test_second_call_does_nothing(source: Path, tmp_path: Path) -> None:
    target = export_cifar10(source, tmp_path / "out")
    before = target.stat().st_mtime_ns
    assert export_cifar10(tmp_path / "gone", target) == target
    assert target.stat().st_mtime_ns == before


@pytest.mark.parametrize("folder", [".", "cifar-10-batches-py"])
def test_pickles_are_refused_unread_and_the_binary_version_is_named(tmp_path: Path, folder: str) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (tmp_path / "sprung",)

    (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / folder / "data_batch_1").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(DatasetError, match=f"python version: pickles.*{BINARY_URL}"):
        export_cifar10(tmp_path, tmp_path / "out")
    assert not (tmp_path / "sprung").exists()
    assert not (tmp_path / "out").exists()


def test_folder_without_either_version_says_what_to_download(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=f"does not have CIFAR-10's binary version.*{BINARY_URL}"):
        export_cifar10(tmp_path, tmp_path / "out")


def truncate(folder: Path) -> None:
    with (folder / "data_batch_3.bin").open("r+b") as file:
        file.truncate(5000)


def mislabel(folder: Path) -> None:
    with (folder / "test_batch.bin").open("r+b") as file:
        file.write(b"\x0a")


def rename_class(folder: Path) -> None:
    (folder / "batches.meta.txt").write_text("../up\n", encoding="ascii")


def lose_batch(folder: Path) -> None:
    (folder / "data_batch_5.bin").unlink()


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (truncate, "data_batch_3.bin is damaged: 5,000 bytes"),
        (mislabel, "test_batch.bin is damaged: a label is above 9"),
        (rename_class, "has the classes ../up"),
        (lose_batch, "data_batch_5.bin cannot be read"),
    ],
)
def test_damaged_download_is_refused_and_leaves_nothing(
    source: Path, tmp_path: Path, damage: Callable[[Path], None], told: str
) -> None:
    damage(source)
    with pytest.raises(DatasetError, match=told):
        export_cifar10(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == [source.name]


def test_export_that_fails_on_the_way_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object, path: Path) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(cifar10, "_write", fail)
    with pytest.raises(DatasetError, match="No space left"):
        export_cifar10(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == [source.name]
