"""CIFAR-10 as ten one-class problems: one class is normal, the nine others are defects of it.

    <target>/<class>/train/good/*.png           the class's 5,000 training images
    <target>/<class>/test/good/*.png            its 1,000 test images
    <target>/<class>/test/<other class>/*.png   9 x 1,000 images of other classes

Reads only the binary version. The python version consists of pickles, which can run code when loaded: it is never
opened.

Source: Krizhevsky, Learning multiple layers of features from tiny images (2009); the one-class protocol: Ruff et al.,
Deep one-class classification (ICML 2018).
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from schemas.errors import DatasetError
from training.datasets.export import export_whole
from training.datasets.samples import NORMAL

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
BINARY_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"

_BINARY_FOLDER, _PYTHON_FOLDER = "cifar-10-batches-bin", "cifar-10-batches-py"
_NAMES = "batches.meta.txt"
_TRAIN = tuple(f"data_batch_{k}.bin" for k in range(1, 6))
_TEST = ("test_batch.bin",)
_SIDE_PX = 32
_RECORD_BYTES = 1 + 3 * _SIDE_PX * _SIDE_PX
_REPORT_EVERY = 500
_NEEDED_MB = 700


def is_cifar10(source: Path) -> bool:
    """Check whether a folder is CIFAR-10 as downloaded, in the binary or the python version."""
    return _records_folder(source) is not None or _is_python_version(source)


def find_records(source: Path) -> Path:
    """Find the folder of the binary version's files.

    Args:
        source: That folder, or the one that the archive was extracted to.

    Raises:
        DatasetError: The binary version is missing, with or without the python version.
    """
    folder = _records_folder(source)
    if folder is not None:
        return folder
    if _is_python_version(source):
        raise DatasetError(
            f"{source} is CIFAR-10's python version: pickles, which can run code when loaded and are not supported; "
            f"download and extract the binary version instead: {BINARY_URL}"
        )
    raise DatasetError(
        f"{source} does not have CIFAR-10's binary version (looked for {_TRAIN[0]} there and in {_BINARY_FOLDER}); "
        f"download and extract it: {BINARY_URL}"
    )


def export_cifar10(source: Path, target: Path, report: Callable[[int, int], None] | None = None) -> Path:
    """Write the ten one-class problems as MVTec AD folders, once; a second call does nothing.

    A test image is in all ten categories, on disk once if the file system has hard links.

    Args:
        source: The folder of the binary version's files, or the one that the archive was extracted to.
        target: The folder to create, with a category per class.
        report: Called during the export with the number of files written and the total.

    Returns:
        The target.

    Raises:
        DatasetError: The binary version is missing or damaged, the target has other content or cannot be written.
    """

    def build(folder: Path) -> None:
        records = find_records(source)
        _check_names(records / _NAMES)
        _build(_read(records, _TRAIN), _read(records, _TEST), folder, report or (lambda _done, _total: None))

    return export_whole(target, build, _is_complete, _NEEDED_MB)


def _records_folder(source: Path) -> Path | None:
    return next((folder for folder in (source, source / _BINARY_FOLDER) if (folder / _TRAIN[0]).is_file()), None)


def _is_python_version(source: Path) -> bool:
    return any((folder / "data_batch_1").is_file() for folder in (source, source / _PYTHON_FOLDER))


def _is_complete(target: Path) -> bool:
    return all((target / name / "train" / NORMAL).is_dir() for name in CLASSES)


def _check_names(file: Path) -> None:
    try:
        names = tuple(file.read_text(encoding="ascii").split())
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{file} cannot be read: {error}; extract the archive again: {BINARY_URL}") from error
    if names != CLASSES:
        raise DatasetError(
            f"{file} has the classes {', '.join(names)}, not CIFAR-10's; extract the archive again: {BINARY_URL}"
        )


def _read(folder: Path, names: tuple[str, ...]) -> NDArray[np.uint8]:
    """Read (N, 3073) uint8 records: a label, then a red, a green and a blue plane of 32 x 32, row by row."""
    batches = []
    for name in names:
        file = folder / name
        try:
            raw = np.fromfile(file, np.uint8)
        except OSError as error:
            raise DatasetError(f"{file} cannot be read: {error.strerror}; extract the archive again") from error
        if not raw.size or raw.size % _RECORD_BYTES:
            raise DatasetError(
                f"{file} is damaged: {raw.size:,} bytes are not a multiple of the record size {_RECORD_BYTES:,}; "
                f"download it again: {BINARY_URL}"
            )
        batches.append(raw.reshape(-1, _RECORD_BYTES))
        if batches[-1][:, 0].max() >= len(CLASSES):
            raise DatasetError(
                f"{file} is damaged: a label is above {len(CLASSES) - 1}; download it again: {BINARY_URL}"
            )
    return np.concatenate(batches)


def _build(train: NDArray[np.uint8], test: NDArray[np.uint8], folder: Path, report: Callable[[int, int], None]) -> None:
    for normal in CLASSES:
        (folder / normal / "train" / NORMAL).mkdir(parents=True)
        for other in CLASSES:
            (folder / normal / "test" / (NORMAL if other == normal else other)).mkdir(parents=True)
    total = len(train) + len(test)
    for row, record in enumerate(train):
        _write(record, folder / CLASSES[record[0]] / "train" / NORMAL / f"{row:05}.png")
        if row % _REPORT_EVERY == 0:
            report(row, total)
    for row, record in enumerate(test):
        actual = CLASSES[record[0]]
        written = folder / actual / "test" / NORMAL / f"{row:05}.png"
        _write(record, written)
        for normal in CLASSES:
            if normal != actual:
                _link(written, folder / normal / "test" / actual / written.name)
        if row % _REPORT_EVERY == 0:
            report(len(train) + row, total)
    report(total, total)


def _write(record: NDArray[np.uint8], path: Path) -> None:
    bgr = np.ascontiguousarray(record[1:].reshape(3, _SIDE_PX, _SIDE_PX)[::-1].transpose(1, 2, 0))
    _, png = cv2.imencode(".png", bgr)
    path.write_bytes(png.tobytes())


def _link(written: Path, path: Path) -> None:
    try:
        os.link(written, path)
    except OSError:  # the file system has no hard links, or too many
        shutil.copyfile(written, path)
