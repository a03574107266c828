"""The image sets of `bench.accuracy`: three of a fixed pose, and two made from them where a position means nothing.

ELPV's split is that of `training.datasets.elpv`, the magnetic tiles' that of their adapter: no set has an official one.
The two without a pose are cut from real images with real defects, once, into a folder of MVTec AD's layout:
`elpv-mono-turned` turns every cell by a random angle and shifts it, `mtd-cut` cuts windows at random places of tiles.
"""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from training.datasets.elpv import export_elpv
from training.datasets.magnetic_tile import load_magnetic_tile
from training.datasets.mvtec import load_mvtec
from training.datasets.samples import NORMAL, CategoryData

ALIGNED = ("elpv-mono", "elpv-poly", "mtd")
POSELESS = ("elpv-mono-turned", "mtd-cut")

_Picture = tuple[str, str, NDArray[np.uint8]]
"""The folder in MVTec AD's layout, a name, and the pixels."""

_SEED = 0
_SHIFT = 0.1
_WINDOW_PX = 128
_DEFECT_SHARE = 0.01
"""A window counts as defective where at least this share of it is; one with less, but some, is left out."""


def load_set(name: str, folder: Path, tiles: Path | None) -> CategoryData | None:
    """Give the images of a set, making what must be made; None where it needs tiles and there are none.

    Args:
        name: One of `ALIGNED` or `POSELESS`.
        folder: Where made images are kept.
        tiles: The magnetic tiles' folder.
    """
    if name.startswith("elpv"):
        category = name.split("-")[1]
        cells = load_mvtec(export_elpv(folder / "elpv"), [category])[0]
        made = cells if name in ALIGNED else _made(folder / name, cells, _turned)
    else:
        if tiles is None:
            return None
        whole = load_magnetic_tile(tiles)[0]
        made = whole if name in ALIGNED else _made(folder / name, whole, _cut)
    return CategoryData(name, made.train, made.test)


def _made(folder: Path, source: CategoryData, make: Callable[[CategoryData], Iterator[_Picture]]) -> CategoryData:
    """Write what `make` makes of a set, once: whole or not at all."""
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as unfinished:
            category = Path(unfinished) / "whole" / folder.name
            for part, name, pixels in make(source):
                (category / part).mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(category / part / f"{name}.png"), pixels)
            (category.parent).replace(folder)
    return load_mvtec(folder)[0]


def _turned(source: CategoryData) -> Iterator[_Picture]:
    """Turn every image by any angle about its middle and shift it by up to a tenth; the border is mirrored."""
    random = np.random.default_rng(_SEED)
    for part, path, _ in _files(source):
        pixels = _read(path)
        height, width = pixels.shape[:2]
        matrix = cv2.getRotationMatrix2D((width / 2, height / 2), random.uniform(0, 360), 1.0)
        matrix[:, 2] += random.uniform(-_SHIFT, _SHIFT, 2) * (width, height)
        yield (
            part,
            path.stem,
            np.asarray(cv2.warpAffine(pixels, matrix, (width, height), borderMode=cv2.BORDER_REFLECT), np.uint8),
        )


def _cut(source: CategoryData) -> Iterator[_Picture]:
    """Cut a window out of every image, at any place of a good one and over the defect of another."""
    random = np.random.default_rng(_SEED)
    for part, path, mask_path in _files(source):
        pixels = _read(path)
        window = min(_WINDOW_PX, *pixels.shape[:2])
        corners = np.array(pixels.shape[:2]) - window + 1
        if mask_path is None:
            top, left = (int(random.integers(limit)) for limit in corners)
            yield part, path.stem, pixels[top : top + window, left : left + window]
            continue
        mask = np.asarray(cv2.imread(str(mask_path), cv2.IMREAD_GRAYSCALE)) > 0
        if not mask.any():
            continue
        for _ in range(100):  # a place at random that shows enough of the defect
            row, column = random.permutation(np.argwhere(mask))[0]
            top = int(np.clip(row - random.integers(window), 0, corners[0] - 1))
            left = int(np.clip(column - random.integers(window), 0, corners[1] - 1))
            if mask[top : top + window, left : left + window].mean() >= _DEFECT_SHARE:
                yield part, path.stem, pixels[top : top + window, left : left + window]
                break


def _files(source: CategoryData) -> Iterator[tuple[str, Path, Path | None]]:
    """List every image with its folder in MVTec AD's layout and its mask."""
    for path in source.train:
        yield f"train/{NORMAL}", path, None
    for sample in source.test:
        yield f"test/{sample.defect}", sample.path, sample.mask


def _read(path: Path) -> NDArray[np.uint8]:
    pixels = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
    assert pixels is not None, path  # noqa: S101 - the adapter listed it
    return np.asarray(pixels, np.uint8)
