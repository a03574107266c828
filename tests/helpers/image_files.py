"""Small real image files for tests of data sets: every one another picture, unless it is asked to be the same."""

import zlib
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

WIDTH, HEIGHT = 40, 30


def write_image(
    path: Path, *, of: object = None, size: tuple[int, int] = (WIDTH, HEIGHT), colour: bool = False
) -> Path:
    """Write a picture of noise; the same one for the same `of`, which is the path where it is not given."""
    noise = np.random.default_rng(zlib.crc32(str(of or path).encode()))
    return _write(path, noise.integers(0, 256, (size[1], size[0], 3) if colour else (size[1], size[0]), np.uint8))


def write_mask(path: Path, *, size: tuple[int, int] = (WIDTH, HEIGHT), empty: bool = False) -> Path:
    """Write a mask with a defect in its middle, or with none."""
    mask = np.zeros((size[1], size[0]), np.uint8)
    if not empty:
        mask[size[1] // 3 : size[1] // 2, size[0] // 3 : size[0] // 2] = 255
    return _write(path, mask)


def write_images(folder: Path, count: int, suffix: str = ".png") -> list[Path]:
    """Write numbered pictures, `000.png` and on."""
    return [write_image(folder / f"{number:03}{suffix}") for number in range(count)]


def write_category(folder: Path, *, train: int = 100) -> Path:
    """Write a category in MVTec AD's form in which nothing is wrong: two normal and three defective test images."""
    write_images(folder / "train" / "good", train)
    write_images(folder / "test" / "good", 2)
    for path in write_images(folder / "test" / "broken", 3):
        write_mask(folder / "ground_truth" / "broken" / f"{path.stem}_mask.png")
    return folder


def _write(path: Path, pixels: NDArray[np.uint8]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    _, data = cv2.imencode(path.suffix, pixels)
    path.write_bytes(data.tobytes())
    return path
